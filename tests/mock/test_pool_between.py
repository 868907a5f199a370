"""PgBouncer in transaction mode between an application and its outbox or inbox: each transaction may have another
session of the server."""

import asyncio
import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kbatch import DurableSender, OutboxError, PostgresInbox, PostgresOutbox, aio
from kbatch.testing import MockCluster
from tests import inboxes, outboxes
from tests.listening import running
from tests.pooling import pool_before
from tests.relays import numbered
from tests.waiting import until

from .test_listener_inbox import check, listener, orders, send, writer

pytestmark = pytest.mark.usefixtures("postgres")  # where it cannot be had, it says so
LANES = 8


@pytest.fixture
def server(new_postgres: Callable[[], Any]) -> Iterator[Any]:
    """A server of the test's own, which it may stop."""
    server = new_postgres()
    yield server
    server.close()


@pytest.fixture
def pool(server: Any) -> Iterator[str]:
    with pool_before(server) as conninfo:
        yield conninfo


def added(outbox: PostgresOutbox) -> list[int]:
    return sorted(int(body or b"") for body in outboxes.bodies(outbox))


def session_of(connection: Any) -> int:
    """The number of the server's session that a transaction has."""
    return int(connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()[0])


def test_psycopg_adds_by_connections_whose_sessions_change(server: Any, pool: str) -> None:
    """More than the five times after which psycopg prepares, by more connections than the pool has sessions."""
    import psycopg

    outbox = PostgresOutbox(server.conninfo, wire="raw")
    outbox.create()
    used: dict[int, set[int]] = {lane: set() for lane in range(LANES)}

    def work(lane: int) -> None:
        with psycopg.connect(pool, prepare_threshold=None) as connection:
            for n in range(20):
                first = lane * 1000 + n * 3
                outbox.add(connection, numbered(range(first, first + 2)), topic="orders")
                used[lane].add(session_of(connection))
                outbox.add(connection, numbered([first + 2]), topic="orders")
                connection.commit()
            outbox.add(connection, numbered(range(lane * 1000 + 100, lane * 1000 + 200)), topic="orders")  # COPY
            connection.commit()
            outbox.add(connection, numbered([999_999]), topic="orders")
            connection.rollback()

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(len(each) > 1 for each in used.values())
    assert added(outbox) == sorted(lane * 1000 + n for lane in range(LANES) for n in (*range(60), *range(100, 200)))


def test_asyncpg_adds_by_connections_whose_sessions_change(server: Any, pool: str) -> None:
    asyncpg = pytest.importorskip("asyncpg")
    outbox = PostgresOutbox(server.conninfo, wire="raw")
    outbox.create()
    used: dict[int, set[int]] = {lane: set() for lane in range(LANES)}

    async def work(lane: int) -> None:
        connection = await asyncpg.connect(pool.partition("?")[0], ssl=False, statement_cache_size=0)
        for n in range(20):
            async with connection.transaction():
                first = lane * 1000 + n * 3
                await of_loop.add(connection, numbered(range(first, first + 2)), topic="orders")
                used[lane].add(await connection.fetchval("SELECT pg_backend_pid()"))
                await of_loop.add(connection, numbered([first + 2]), topic="orders")
        await connection.close()

    async def main() -> None:
        await asyncio.gather(*(work(lane) for lane in range(LANES)))

    of_loop = aio.PostgresOutbox(pool, wire="raw")
    asyncio.run(main())
    assert any(len(each) > 1 for each in used.values())
    assert added(outbox) == sorted(lane * 1000 + n for lane in range(LANES) for n in range(60))


def test_what_psycopg_prepares_is_another_sessions_which_the_error_says(server: Any, pool: str) -> None:
    import psycopg

    outbox = PostgresOutbox(server.conninfo, wire="raw")
    outbox.create()
    with contextlib.ExitStack() as undo:
        # Nothing else goes on, so that each transaction has the session of the last one.
        first, second, other = (undo.enter_context(contextlib.closing(psycopg.connect(pool))) for _ in range(3))

        def add(connection: Any, number: int) -> None:
            outbox.add(connection, numbered([number]), topic="orders")
            connection.commit()

        for n in range(6):
            add(first, n)
        for n in range(6, 11):
            add(second, n)
        with pytest.raises(OutboxError, match="nothing may be prepared") as caught:
            add(second, 11)
        assert isinstance(caught.value.__cause__, psycopg.errors.DuplicatePreparedStatement)
        second.rollback()
        session_of(other)  # keeps that session
        with pytest.raises(OutboxError, match="nothing may be prepared") as caught:
            add(first, 12)
        assert isinstance(caught.value.__cause__, psycopg.errors.InvalidSqlStatementName)
        first.rollback()
        first.prepare_threshold = None
        add(first, 13)
    assert added(outbox) == [*range(11), 13]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_a_durable_sender_whose_server_ends_and_comes_back(server: Any, pool: str, end: int) -> None:
    outbox = PostgresOutbox(server.conninfo, wire="raw")
    outbox.create()
    told: list[int] = []
    unknown: list[int] = []
    over = threading.Event()

    with DurableSender(PostgresOutbox(pool, wire="raw"), "orders") as sender:

        def work(lane: int) -> None:
            for n in itertools.count(lane, LANES):
                if over.is_set():
                    return
                try:
                    assert sender.send(numbered([n])[0])
                    told.append(n)
                except OutboxError as error:
                    if error.possibly_persisted:
                        unknown.append(n)
                    over.wait(0.01)

        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(LANES)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(told) > 300, "its start")
            server.stop(end)
            server.start()
            before = len(told)
            until(lambda: len(told) > before + 300, "that it goes on")
        finally:
            over.set()
            for thread in threads:
                thread.join()
    found = added(outbox)
    assert set(told) <= set(found) <= set(told) | set(unknown)
    assert len(found) == len(set(found))


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_a_listener_whose_inbox_ends_and_comes_back(server: Any, pool: str, end: int) -> None:
    inbox = PostgresInbox(server.conninfo)
    inbox.create()
    effects = inboxes.effects(inbox)
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        given = send(cluster, orders(300))
        # More workers than the pool has sessions.
        with running(of := listener(cluster, PostgresInbox(pool), writer(effects), concurrency=6)) as raised:
            until(lambda: of.stats()["handled"] > 50, "some")
            server.stop(end)
            send(cluster, [*given[:100], *orders(100, 300)])
            server.start()
            until(lambda: of.stats()["handled"] == 500, "all of them")
            assert of.stats()["failed"] == 0
        assert raised == []
    check(inbox, effects, 400)
