"""A listener of asyncio with an inbox: handlers are coroutines, on connections of theirs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import kbatch
from kbatch import InboxError, aio
from kbatch.testing import MockCluster
from tests import inboxes, outboxes
from tests.inboxes import Inbox, in_postgres, in_sqlite

from .test_listener_inbox import check, orders, send


@pytest.fixture
def inbox(new_inbox: Callable[..., Inbox]) -> Inbox:
    return new_inbox()


@pytest.fixture
def effects(inbox: Inbox) -> str:
    return inboxes.effects(inbox)


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


async def write(effects: str, connection: Any, envelope: Any) -> None:
    done = connection.execute(f"INSERT INTO {effects} (n) VALUES ({int(envelope.data)})")
    if asyncio.iscoroutine(done):
        await done


@contextlib.asynccontextmanager
async def running(
    cluster: MockCluster, inbox: Any, handler: Any, **options: Any
) -> AsyncIterator[tuple[aio.Listener, asyncio.Task[None]]]:
    listener = aio.Listener(inboxes.consumer(cluster), ["orders"], handler, inbox=inbox, **options)
    task = asyncio.create_task(listener.run())
    try:
        yield listener, task
    finally:
        listener.stop()
        await asyncio.wait([task])
        task.exception()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("batch_size", [None, 20])
def test_a_message_that_comes_twice_has_one_effect(
    cluster: MockCluster, inbox: Inbox, effects: str, batch_size: int | None
) -> None:
    given = send(cluster, orders(200))
    send(cluster, given)

    async def handle(given: Any, connection: Any) -> None:
        for envelope in [given] if batch_size is None else given:
            await write(effects, connection, envelope)

    async def work() -> None:
        async with running(cluster, inbox, handle, concurrency=4, batch_size=batch_size) as (listener, _):
            await until(lambda: listener.stats()["handled"] == 400)

    asyncio.run(work())
    check(inbox, effects, 200)


def test_it_goes_on_when_the_main_thread_has_ended(
    cluster: MockCluster, inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Then executors take nothing more, while threads that are no daemons go on.
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    send(cluster, orders(20))

    async def handle(envelope: Any, connection: Any) -> None:
        await write(effects, connection, envelope)

    async def work() -> None:
        async with running(cluster, inbox, handle, dead_letter_topic="dead") as (listener, _):
            await until(lambda: listener.stats()["handled"] == 20)
            assert listener.stats()["attempts_failed"] == 0
        assert "not running" in repr(listener)

    asyncio.run(work())
    check(inbox, effects, 20)


def test_the_inbox_for_asyncio_is_one_for_its_listener(cluster: MockCluster, inbox: Inbox, effects: str) -> None:
    send(cluster, orders(50))
    own: Any = getattr(aio, type(inbox).__name__)(**inboxes.where(inbox))

    async def handle(envelope: Any, connection: Any) -> None:
        is_psycopg = isinstance(own, aio.PostgresInbox)
        async with connection.transaction() if is_psycopg else contextlib.nullcontext():  # a savepoint
            await write(effects, connection, envelope)

    async def work() -> None:
        async with running(cluster, own, handle, concurrency=4) as (listener, _):
            await until(lambda: listener.stats()["handled"] == 50)

    asyncio.run(work())
    check(inbox, effects, 50)


@in_sqlite
def test_a_handler_adds_to_an_outbox_in_the_transaction_of_its_message(cluster: MockCluster, inbox: Any) -> None:
    outbox = kbatch.SqliteOutbox(inbox._path, wire="raw")
    outbox.create()
    send(cluster, given := send(cluster, orders(20)))

    async def handle(envelope: Any, connection: Any) -> None:
        outbox.add(connection, [kbatch.Envelope(data=envelope.data)], topic="invoices")

    async def work() -> None:
        own = aio.SqliteInbox(inbox._path)
        async with running(cluster, own, handle, concurrency=4) as (listener, _):
            await until(lambda: listener.stats()["handled"] == 2 * len(given))

    asyncio.run(work())
    assert sorted(int(body or b"") for body in outboxes.bodies(outbox)) == list(range(20))


def test_what_a_handler_raises_ends_it_and_nothing_of_it_is_committed(
    cluster: MockCluster, inbox: Inbox, effects: str
) -> None:
    send(cluster, orders(20))

    async def handle(envelope: Any, connection: Any) -> None:
        await write(effects, connection, envelope)
        if int(envelope.data) == 11:
            raise KeyError("a fault of the handler")

    async def work() -> None:
        async with running(cluster, inbox, handle) as (_, task):
            with pytest.raises(KeyError):
                await task

    asyncio.run(work())
    found = inboxes.numbers(inbox, effects)
    assert 11 not in found
    assert len(inboxes.ids(inbox)) == len(found)


@pytest.mark.parametrize("how", ["commit", "close"])
def test_a_handler_that_ends_the_transaction_ends_the_listener(
    cluster: MockCluster, inbox: Inbox, effects: str, how: str
) -> None:
    send(cluster, orders(1))

    async def handle(envelope: Any, connection: Any) -> None:
        done = getattr(connection, how)()
        if asyncio.iscoroutine(done):
            await done

    async def work() -> None:
        async with running(cluster, inbox, handle) as (_, task):
            with pytest.raises(InboxError, match="the handler has ended the transaction"):
                await task

    asyncio.run(work())


@in_sqlite
def test_a_locked_database_is_waited_for_and_a_stop_ends_the_waiting(
    cluster: MockCluster, inbox: Inbox, effects: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.05)
    send(cluster, orders(60))

    async def handle(envelope: Any, connection: Any) -> None:
        await write(effects, connection, envelope)

    async def work() -> None:
        with inboxes.transaction(inbox):
            async with running(cluster, inbox, handle, concurrency=3) as (listener, task):
                await until(lambda: "waits for its inbox" in caplog.text and listener.stats()["running"] == 3)
            assert task.exception() is None
            assert listener.stats()["abandoned"] == 3
        async with running(cluster, inbox, handle, concurrency=3) as (listener, _):
            await until(lambda: listener.stats()["handled"] == 60)

    asyncio.run(work())
    check(inbox, effects, 60)


@in_postgres
def test_a_connection_that_is_cut_is_waited_for(cluster: MockCluster, inbox: Inbox, effects: str) -> None:
    send(cluster, orders(100))
    cut: set[Any] = set()

    async def handle(envelope: Any, connection: Any) -> None:
        await write(effects, connection, envelope)
        if int(envelope.data) % 30 == 7 and envelope.id not in cut:
            cut.add(envelope.id)
            outboxes.run(inbox, f"SELECT pg_terminate_backend({connection.info.backend_pid})")

    async def work() -> None:
        async with running(cluster, inbox, handle, concurrency=4) as (listener, _):
            await until(lambda: listener.stats()["handled"] == 100)
            assert listener.stats()["failed"] == 0

    asyncio.run(work())
    check(inbox, effects, 100)
