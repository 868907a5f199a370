"""Durable senders in PostgreSQL whose server or connection fails: what was told as committed is there, and what was
told as not added is not."""

import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from kbatch import DurableSender, Envelope, OutboxError, PostgresOutbox, aio
from kbatch._outbox import _postgres_writer
from kbatch._outbox._postgres_writer import PostgresWriter
from tests import outboxes
from tests.kafka.proxy import Direction, FaultProxy
from tests.relays import numbered
from tests.waiting import later, until

FUTURE = datetime.now(timezone.utc) + timedelta(days=1)


@pytest.fixture
def outbox(in_postgres: Callable[..., PostgresOutbox]) -> PostgresOutbox:
    return in_postgres(wire="raw")


@pytest.fixture
def sender(outbox: PostgresOutbox) -> Iterator[DurableSender]:
    with DurableSender(outbox, "orders") as sender:
        yield sender


def numbers(outbox: PostgresOutbox) -> list[int]:
    return [int(body or b"") for body in outboxes.bodies(outbox)]


def envelope(number: int, **options: Any) -> Envelope:
    return Envelope(data=b"%d" % number, key=f"k{number % 5}", **options)


# -- how a group is added


@pytest.mark.parametrize("count", [1, 2, 49, 50, 300])
def test_a_group_of_any_size_is_one_transaction_in_the_order_of_the_calls(outbox: PostgresOutbox, count: int) -> None:
    writer = outbox.open_writer()
    batches = [outbox.map("orders", each) for each in numbered(range(count))]
    batches += [outbox.map("orders", each) for each in numbered(range(3), scheduled_time=FUTURE)]
    try:
        assert writer.commit(lambda: [batch for batch in batches if batch is not None])
    finally:
        writer.close()
    assert numbers(outbox) == list(range(count))
    assert outbox.status().scheduled == 3
    assert outboxes.query(outbox, "SELECT count(DISTINCT xmin::text) FROM {outbox}") == [(1,)]


def test_a_group_of_callers_that_have_all_left_is_nothing(outbox: PostgresOutbox) -> None:
    writer = outbox.open_writer()
    assert writer.commit(list)
    writer.close()
    assert numbers(outbox) == []


def test_a_sender_that_blocks_does_not_add_by_an_outbox_for_asyncio(outbox: PostgresOutbox) -> None:
    other = aio.PostgresOutbox(outbox._conninfo, schema=outbox._tables.schema, wire="raw")
    with DurableSender(other, "orders") as sender:
        assert sender.send(envelope(1))
        with outboxes.transaction(outbox) as connection, pytest.raises(TypeError, match=r"use kbatch\.aio"):
            sender.send(envelope(2), connection=connection)
    assert numbers(outbox) == [1]


@pytest.mark.parametrize("of", ["psycopg", "asyncpg", "sqlalchemy"])
def test_on_a_loop_it_joins_the_transaction_of_each_driver(outbox: PostgresOutbox, of: str) -> None:
    plain = outbox._conninfo
    other = aio.PostgresOutbox(plain, schema=outbox._tables.schema, wire="raw")

    async def main() -> None:
        async with aio.DurableSender(other, "orders") as sender:
            if of == "psycopg":
                connection = await psycopg.AsyncConnection.connect(plain)
                assert await sender.send(envelope(1), connection=connection)
                await connection.rollback()
                assert await sender.send(envelope(2), connection=connection)
                await connection.commit()
                await connection.close()
            elif of == "asyncpg":
                asyncpg = pytest.importorskip("asyncpg")
                connection = await asyncpg.connect(plain)
                for number in (1, 2):
                    transaction = connection.transaction()
                    await transaction.start()
                    assert await sender.send(envelope(number), connection=connection)
                    await (transaction.commit() if number == 2 else transaction.rollback())
                await connection.close()
            else:
                sqlalchemy = pytest.importorskip("sqlalchemy.ext.asyncio")
                engine = sqlalchemy.create_async_engine(plain.replace("postgresql://", "postgresql+psycopg://"))
                async with sqlalchemy.AsyncSession(engine) as session:
                    assert await sender.send(envelope(1), connection=session)
                    await session.rollback()
                    assert await sender.send(envelope(2), connection=session)
                    await session.commit()
                await engine.dispose()

    asyncio.run(main())
    assert numbers(outbox) == [2]


# -- COMMIT without an answer


class Cut:
    """A connection that is lost at COMMIT: before it arrives, or after it."""

    def __init__(self, connection: Any, arrives: bool, then: Callable[[], object]) -> None:
        self._connection, self._arrives, self._then = connection, arrives, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str) -> Any:
        if statement != "COMMIT":
            return self._connection.execute(statement)
        if self._arrives:
            self._connection.execute(statement)
        self._then()
        raise psycopg.OperationalError("server closed the connection unexpectedly")


def lose_commits(
    monkeypatch: pytest.MonkeyPatch, *, arrives: bool, then: Callable[[], object] = lambda: None, times: int = 1
) -> None:
    left = [None] * times
    commit = PostgresWriter._commit

    def cut(self: PostgresWriter, number: str) -> None:
        connection = self._connection
        if left:
            left.pop()
            self._connection = Cut(connection, arrives, then)  # type: ignore[assignment]
        commit(self, number)

    monkeypatch.setattr(PostgresWriter, "_commit", cut)


def test_a_commit_whose_answer_was_lost_is_looked_up(
    outbox: PostgresOutbox, sender: DurableSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_commits(monkeypatch, arrives=True)
    assert sender.send(envelope(1)) is True
    assert sender.send(envelope(2)) is True
    assert numbers(outbox) == [1, 2]


def test_it_is_looked_up_also_if_a_relay_has_deleted_its_rows(
    outbox: PostgresOutbox, sender: DurableSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_commits(monkeypatch, arrives=True, then=lambda: outboxes.query(outbox, "DELETE FROM {outbox}"))
    assert sender.send(envelope(1)) is True


def test_a_commit_that_did_not_arrive_is_told_as_not_added(
    outbox: PostgresOutbox, sender: DurableSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_commits(monkeypatch, arrives=False)
    with pytest.raises(OutboxError, match="closed the connection") as caught:
        sender.send(envelope(1))
    assert caught.value.possibly_persisted is False
    assert sender.send(envelope(2))
    assert numbers(outbox) == [2]


def test_where_it_cannot_be_looked_up_nobody_says_that_it_was_not_added(
    outbox: PostgresOutbox, sender: DurableSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_commits(monkeypatch, arrives=True, times=3)
    monkeypatch.setattr(_postgres_writer, "_LOOK_UP_S", 0.3)
    # Another server, a transaction that is forgotten, and no server.
    monkeypatch.setattr(PostgresWriter, "_was_committed", _on_another_server(PostgresWriter._was_committed))
    with pytest.raises(OutboxError, match="whether the transaction was committed is not known") as caught:
        sender.send(envelope(1))
    assert caught.value.possibly_persisted is True
    monkeypatch.undo()
    lose_commits(monkeypatch, arrives=True)
    monkeypatch.setattr(_postgres_writer, "_LOOK_UP_S", 0.3)
    monkeypatch.setattr(PostgresWriter, "_was_committed", _without_an_answer(PostgresWriter._was_committed))
    with pytest.raises(OutboxError, match="is not known") as caught:
        sender.send(envelope(2))
    assert caught.value.possibly_persisted is True
    assert sender.send(envelope(3))
    assert numbers(outbox) == [1, 2, 3]


def _on_another_server(look: Any) -> Any:
    def look_there(self: PostgresWriter, number: str) -> Any:
        self._server = "7 00000002"
        return look(self, number)

    return look_there


def _without_an_answer(look: Any) -> Any:
    def look_there(self: PostgresWriter, number: str) -> Any:
        def connected() -> Any:
            raise OutboxError("no answer")

        self._connected = connected
        return look(self, number)

    return look_there


def test_what_a_deferred_constraint_refuses_at_the_commit_is_not_added(
    outbox: PostgresOutbox, sender: DurableSender
) -> None:
    name = outboxes.in_schema(outbox, "refuses")
    outboxes.run(
        outbox,
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'too late'; END $$",
        f"CREATE CONSTRAINT TRIGGER refuses AFTER INSERT ON {outbox._tables.names['outbox']} "
        f"DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {name}()",
    )
    with pytest.raises(OutboxError, match="too late") as caught:
        sender.send(envelope(1))
    assert caught.value.possibly_persisted is False
    outboxes.query(outbox, "DROP TRIGGER refuses ON {outbox}")
    assert sender.send(envelope(2))
    assert numbers(outbox) == [2]


def test_a_connection_that_was_cut_while_nobody_sent_is_told_to_nobody(
    outbox: PostgresOutbox, sender: DurableSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[Any] = []
    open_writer = outbox.open_writer
    monkeypatch.setattr(outbox, "open_writer", lambda: writers.append(open_writer()) or writers[-1])
    assert sender.send(envelope(1))
    (writer,) = writers
    outboxes.run(outbox, f"SELECT pg_terminate_backend({writer._connection.info.backend_pid})")
    assert sender.send(envelope(2)) is True
    assert numbers(outbox) == [1, 2]


# -- a server that is away


class Senders:
    """Threads that send numbers until the block ends, and what each was told."""

    def __init__(self, outbox: PostgresOutbox, threads: int = 8) -> None:
        self.told: dict[int, bool | OutboxError] = {}
        self._sender = DurableSender(outbox, "orders")
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def _run(self, first: int) -> None:
        number = first
        while not self._over.is_set():
            try:
                self.told[number] = self._sender.send(envelope(number))
            except OutboxError as error:
                self.told[number] = error
                self._over.wait(0.02)
            number += 100

    def committed(self) -> int:
        return sum(answer is True for answer in list(self.told.values()))

    def __enter__(self) -> "Senders":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._sender.close()

    def check(self, outbox: PostgresOutbox) -> None:
        stored = numbers(outbox)
        assert len(stored) == len(set(stored))
        committed = {number for number, answer in self.told.items() if answer is True}
        not_added = {
            number
            for number, answer in self.told.items()
            if isinstance(answer, OutboxError) and not answer.possibly_persisted
        }
        assert committed <= set(stored), f"lost {sorted(committed - set(stored))[:10]}"
        assert not not_added & set(stored), f"told as not added {sorted(not_added & set(stored))[:10]}"


@pytest.fixture
def server(new_postgres: Callable[[], Any]) -> Iterator[Any]:
    """A server of the test's own, which it may stop."""
    server = new_postgres()
    yield server
    server.close()


def made(server: Any) -> PostgresOutbox:
    outbox = PostgresOutbox(server.conninfo, wire="raw")
    outbox.create()
    return outbox


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "crash"])
def test_a_server_that_is_restarted_while_threads_send(server: Any, how: signal.Signals) -> None:
    outbox = made(server)
    with Senders(outbox) as senders:
        for _ in range(3):
            before = senders.committed()
            until(lambda: senders.committed() > before + 50, "some that are committed")  # noqa: B023
            server.stop(how)
            time.sleep(0.1)
            server.start(fsync="on")
        until(lambda: senders.committed() > before + 100, "it goes on")
    senders.check(outbox)


@pytest.mark.parametrize("seed", range(3))
def test_connections_that_are_cut_while_threads_send(postgres: str, outbox: PostgresOutbox, seed: int) -> None:
    seeded = random.Random(seed)
    before, _, after = postgres.partition("127.0.0.1:")
    if not after:
        pytest.skip("platform: the server is not at 127.0.0.1")
    port, slash, path = after.partition("/")
    proxy = FaultProxy(int(port))
    through = PostgresOutbox(f"{before}127.0.0.1:{proxy.port}{slash}{path}", schema=outbox._tables.schema, wire="raw")
    try:
        with Senders(through) as senders:
            for _ in range(10):
                begin = senders.committed()
                until(lambda: senders.committed() > begin + 5, "some that are committed")  # noqa: B023
                time.sleep(seeded.uniform(0.0, 0.01))
                # What goes one way may have arrived when the other is lost.
                proxy.drop(seeded.choice([Direction.TO_CLIENT, Direction.TO_BROKER]))
                time.sleep(seeded.uniform(0.0, 0.02))
                proxy.heal()
                proxy.cut()
    finally:
        proxy.close()
    senders.check(outbox)
    assert any(isinstance(answer, OutboxError) for answer in senders.told.values())


def test_a_server_that_is_away_is_told_at_once_and_found_when_it_is_back(server: Any) -> None:
    outbox = made(server)
    with DurableSender(outbox, "orders") as sender:
        assert sender.send(envelope(1))
        server.stop()
        for options in ({}, {"timeout": 60}):
            with pytest.raises(OutboxError, match="is the server there") as caught:
                sender.send(envelope(2), **options)
            assert caught.value.possibly_persisted is False
        server.start()
        assert sender.send(envelope(3))
    assert numbers(outbox) == [1, 3]


def test_a_server_that_has_no_connection_left_is_told_at_once(server: Any) -> None:
    most = 8
    server.stop()
    server.start(max_connections=str(most), superuser_reserved_connections="0", max_wal_senders="0")
    outbox = made(server)
    with DurableSender(outbox, "orders") as sender:
        assert sender.send(envelope(1))
        with outboxes.holding_all_connections(outbox, most) as held:  # the sender's has been ended
            for _ in range(2):
                with pytest.raises(OutboxError, match=r"too many clients.*; the server has no connection") as caught:
                    sender.send(envelope(2), timeout=60)
                assert caught.value.possibly_persisted is False
            held[0].execute("BEGIN")
            assert sender.send(envelope(3), connection=held[0])
            held[0].execute("COMMIT")
        assert sender.send(envelope(4))
    assert numbers(outbox) == [1, 3, 4]


def test_a_table_that_is_locked_is_waited_for_within_the_callers_time(
    outbox: PostgresOutbox, sender: DurableSender
) -> None:
    with outboxes.transaction(outbox) as connection:
        connection.execute(outbox._tables.sql("LOCK TABLE {outbox}").encode())
        with pytest.raises(OutboxError, match="its transaction is under way") as caught:
            sender.send(envelope(1), timeout=0.2)
        assert caught.value.possibly_persisted
        with later(0.2, lambda: connection.execute("SELECT 1")):
            pass
    assert sender.send(envelope(2))
    assert numbers(outbox) == [1, 2]
