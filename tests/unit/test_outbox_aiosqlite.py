"""Adding to an outbox in SQLite on an event loop, within the application's own transaction."""

import asyncio
import contextlib
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

import kbatch
from kbatch import Envelope, OutboxError, OutboxQuery, SerializationError, SqliteOutbox, Tombstone, aio
from tests import outboxes

ISOLATION = ["", "DEFERRED", "IMMEDIATE", "EXCLUSIVE", None]
FUTURE = datetime.now(timezone.utc) + timedelta(days=1)
PAST = datetime.now(timezone.utc) - timedelta(days=1)


@pytest.fixture
def outbox(tmp_path: Path) -> SqliteOutbox:
    """Of threads, for what tests look at."""
    outbox = outboxes.made(tmp_path, wire="raw")
    outboxes.run(outbox, "CREATE TABLE orders (n)")
    return outbox


def of_aio(outbox: SqliteOutbox, **options: Any) -> aio.SqliteOutbox:
    return aio.SqliteOutbox(outbox._path, **{"wire": "raw", **options})


def envelopes(count: int, first: int = 0) -> list[Envelope]:
    return [Envelope(data=b"%d" % n, key=f"k{n % 5}") for n in range(first, first + count)]


def counted(outbox: SqliteOutbox) -> tuple[int, int]:
    """How many orders and how many messages there are, for others."""
    ((orders,),) = outboxes.rows(outbox, "SELECT count(*) FROM orders")
    return orders, len(outboxes.bodies(outbox))


@contextlib.asynccontextmanager
async def begun(outbox: SqliteOutbox, begin: str = "BEGIN IMMEDIATE", **options: Any) -> AsyncIterator[Any]:
    """A connection of aiosqlite in a transaction, which is rolled back."""
    async with aiosqlite.connect(outbox._path, isolation_level=None, **options) as connection:
        await connection.execute(begin)
        yield connection
        if connection.in_transaction:
            await connection.rollback()


@contextlib.asynccontextmanager
async def connected(outbox: SqliteOutbox, driver: str) -> AsyncIterator[tuple[Any, Callable[[str], Any]]]:
    """A connection or session of a driver, and how it executes a statement."""
    if driver == "aiosqlite":
        async with aiosqlite.connect(outbox._path) as connection:
            yield connection, connection.execute
        return
    sqlalchemy = pytest.importorskip("sqlalchemy", reason="platform: it has no wheel here")
    of_loops = pytest.importorskip("sqlalchemy.ext.asyncio")
    engine = of_loops.create_async_engine(f"sqlite+aiosqlite:///{outbox._path}")
    async with of_loops.AsyncSession(engine) if driver.endswith("session") else engine.connect() as connection:
        yield connection, lambda statement: connection.execute(sqlalchemy.text(statement))
    await engine.dispose()


DRIVERS = ["aiosqlite", "sqlalchemy connection", "sqlalchemy session"]


# -- transactions


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("driver", DRIVERS)
def test_it_joins_the_transaction_of_each_driver(outbox: SqliteOutbox, driver: str, count: int, commits: bool) -> None:
    other = of_aio(outbox)

    async def work() -> None:
        async with connected(outbox, driver) as (connection, execute):
            for first in (0, count):
                await execute("INSERT INTO orders VALUES (1)")
                assert await other.add(connection, envelopes(count, first), topic="orders") == count
                assert counted(outbox) == ((1, first) if first and commits else (0, 0))
                await (connection.commit() if commits else connection.rollback())

    asyncio.run(work())
    assert counted(outbox) == ((2, 2 * count) if commits else (0, 0))
    if commits:
        assert outboxes.bodies(outbox) == [b"%d" % n for n in range(2 * count)]


def test_a_session_is_to_be_flushed_before_and_a_savepoint_of_it_takes_its_messages_alone(outbox: SqliteOutbox) -> None:
    orm = pytest.importorskip("sqlalchemy.orm", reason="platform: it has no wheel here")
    import sqlalchemy

    class Order:
        def __init__(self, n: int) -> None:
            self.n = n

    columns = sqlalchemy.Column("n", sqlalchemy.Integer, primary_key=True)
    orm.registry().map_imperatively(Order, sqlalchemy.Table("orders", sqlalchemy.MetaData(), columns))

    async def work() -> None:
        async with connected(outbox, "sqlalchemy session") as (session, _):
            session.add(Order(1))
            assert "by flush()" in await refused(of_aio(outbox), session)
            await session.flush()
            assert await of_aio(outbox).add(session, envelopes(1), topic="orders") == 1
            for n, keeps in ((2, False), (3, True)):
                nested = await session.begin_nested()
                session.add(Order(n))
                await session.flush()
                assert await of_aio(outbox).add(session, envelopes(2, n), topic="orders") == 2
                await (nested.commit() if keeps else nested.rollback())
            await session.commit()

    asyncio.run(work())
    assert counted(outbox) == (2, 3)
    assert outboxes.bodies(outbox) == [b"0", b"3", b"4"]


@pytest.mark.parametrize("isolation_level", ISOLATION)
@pytest.mark.parametrize("commits", [True, False])
def test_it_joins_the_transaction_of_each_isolation_level(
    outbox: SqliteOutbox, isolation_level: Any, commits: bool
) -> None:
    other = of_aio(outbox)

    async def work() -> None:
        async with aiosqlite.connect(outbox._path, isolation_level=isolation_level) as connection:
            with pytest.raises(OutboxError, match="BEGIN IMMEDIATE"):
                await other.add(connection, envelopes(1), topic="orders")
            assert not connection.in_transaction
            if isolation_level is None:
                await connection.execute("BEGIN")
            await connection.execute("INSERT INTO orders VALUES (1)")
            await other.add(connection, envelopes(3), topic="orders")
            assert connection.in_transaction
            assert counted(outbox) == (0, 0)
            await (connection.commit() if commits else connection.rollback())

    asyncio.run(work())
    assert counted(outbox) == ((1, 3) if commits else (0, 0))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="platform: sqlite3.connect(autocommit=…) is of Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_it_joins_the_transaction_of_each_autocommit(outbox: SqliteOutbox, autocommit: bool) -> None:
    other = of_aio(outbox)

    async def work() -> None:
        async with aiosqlite.connect(outbox._path, autocommit=autocommit) as connection:
            if autocommit:
                with pytest.raises(OutboxError, match="in no transaction"):
                    await other.add(connection, envelopes(1), topic="orders")
                await connection.execute("BEGIN")
            await other.add(connection, envelopes(3), topic="orders")
            assert counted(outbox) == (0, 0)
            await (connection.execute("COMMIT") if autocommit else connection.commit())

    asyncio.run(work())
    assert counted(outbox) == (0, 3)


def test_a_connection_with_factories_and_converters_of_its_own(outbox: SqliteOutbox) -> None:
    sqlite3.register_converter("INTEGER", lambda value: b"converted " + value)

    async def work() -> None:
        async with begun(outbox, detect_types=sqlite3.PARSE_DECLTYPES) as connection:
            connection.row_factory = sqlite3.Row
            connection.text_factory = bytes
            for count in (1, 2):
                assert await of_aio(outbox).add(connection, envelopes(count), topic="orders") == count
            assert connection.row_factory is sqlite3.Row
            await connection.commit()

    try:
        asyncio.run(work())
    finally:
        sqlite3.converters.pop("INTEGER")  # type: ignore[attr-defined]
    assert counted(outbox) == (0, 3)


# -- what is stored


def test_the_rows_are_those_of_an_add_on_a_thread(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "wire": "raw",
        "encoder": lambda message, _: str(message).encode(),
        "header_hook": lambda: {"trace": "x"},
    }
    given = [
        *(Envelope({"n": n}, key=f"k{n}", timestamp=7, headers={"n": str(n)}) for n in range(20)),
        Tombstone("gone", timestamp=7),
        Envelope("partition", topic="other", partition=3, timestamp=7, deliver_by=FUTURE),
        Envelope("expired", deliver_by=PAST),
        *(Envelope(n, key="later", scheduled_time=FUTURE + timedelta(seconds=n)) for n in range(3)),
        Envelope("due", timestamp=7, scheduled_time=PAST),
    ]
    of_threads, seen_by = outboxes.made(tmp_path, **options), outboxes.made(tmp_path, "aio.db")
    other = aio.SqliteOutbox(seen_by._path, **options)

    async def work(batch: list[Any]) -> int:
        async with begun(seen_by) as connection:
            count = await other.add(connection, batch, topic="orders")
            await connection.commit()
        return count

    for batch in (given, given[:1], given[2:3], given[-2:-1]):
        assert asyncio.run(work(batch)) == outboxes.add(of_threads, batch)
    for statement in (
        "SELECT bucket, seq, id, packed, deliver_by FROM {outbox} ORDER BY seq",
        "SELECT bucket, seq, id, packed, deliver_by, due_at, attempts, scheduled, key_hash FROM {later} ORDER BY seq",
        "SELECT last_seq FROM {meta}",
    ):
        found = outboxes.query(seen_by, statement)
        assert found == outboxes.query(of_threads, statement)
        assert found


def test_nothing_to_add(outbox: SqliteOutbox) -> None:
    async def work() -> None:
        async with begun(outbox) as connection:
            assert await of_aio(outbox).add(connection, [], topic="orders") == 0
            assert await of_aio(outbox).add(connection, [Envelope(data=b"", deliver_by=PAST)], topic="orders") == 0
            await connection.rollback()
            with pytest.raises(OutboxError, match="in no transaction"):
                await of_aio(outbox).add(connection, [], topic="orders")

    asyncio.run(work())


def test_relays_of_the_process_are_told_of_an_add(outbox: SqliteOutbox) -> None:
    other, told = of_aio(outbox), []

    async def work() -> None:
        other.watch(lambda is_committed: told.append((is_committed, threading.current_thread())))
        async with begun(outbox) as connection:
            await other.add(connection, envelopes(1), topic="orders")

    asyncio.run(work())
    assert told == [(False, threading.current_thread())]


def test_envelopes_are_mapped_on_the_loop_and_written_on_the_connections_thread(outbox: SqliteOutbox) -> None:
    mapped: list[threading.Thread] = []
    other = of_aio(outbox, encoder=lambda message, _: mapped.append(threading.current_thread()) or b"x")
    written: list[threading.Thread] = []

    async def work() -> None:
        async with begun(outbox) as connection:
            await connection.set_trace_callback(lambda _: written.append(threading.current_thread()))
            await other.add(connection, [Envelope(n) for n in range(3)], topic="orders")

    asyncio.run(work())
    assert set(mapped) == {threading.current_thread()}
    assert len(set(written)) == 1
    assert not set(written) & set(mapped)


# -- what is refused


async def refused(outbox: aio.SqliteOutbox, connection: Any, what: Any = None, **arguments: Any) -> str:
    with pytest.raises((OutboxError, SerializationError, TypeError)) as caught:
        await outbox.add(connection, envelopes(3) if what is None else what, **{"topic": "orders", **arguments})
    return str(caught.value)


@pytest.mark.parametrize("driver", DRIVERS)
def test_no_transaction_and_a_closed_connection(outbox: SqliteOutbox, driver: str) -> None:
    other = of_aio(outbox)

    def given() -> Iterator[Envelope]:
        raise AssertionError("nothing is read")
        yield

    async def work() -> None:
        async with connected(outbox, driver) as (connection, execute):
            assert "BEGIN IMMEDIATE" in await refused(other, connection, given())
            await execute("INSERT INTO orders VALUES (1)")
            await connection.commit()
            assert "BEGIN IMMEDIATE" in await refused(other, connection, given())
        if not driver.endswith("session"):  # which is as new
            assert "closed" in await refused(other, connection, given())

    asyncio.run(work())


def test_a_connection_that_is_closed_tells_what_one_of_sqlite3_does(outbox: SqliteOutbox) -> None:
    of_thread = sqlite3.connect(outbox._path)
    of_thread.close()
    with pytest.raises(OutboxError) as caught:
        outbox.add(of_thread, envelopes(1), topic="orders")

    async def work() -> None:
        not_open = aiosqlite.connect(outbox._path)
        assert await refused(of_aio(outbox), not_open) == str(caught.value)
        async with not_open as connection:
            pass
        assert await refused(of_aio(outbox), connection) == str(caught.value)

    asyncio.run(work())
    assert "give a connection that is open" in str(caught.value)


@pytest.mark.parametrize("given", ["shop.db", None, "sqlite3"])
def test_what_is_no_connection_of_a_loop(outbox: SqliteOutbox, given: Any) -> None:
    with contextlib.closing(sqlite3.connect(outbox._path)) as connection:
        connection.execute("BEGIN")
        said = asyncio.run(refused(of_aio(outbox), connection if given == "sqlite3" else given))
    name = {"shop.db": "str", None: "NoneType", "sqlite3": "Connection: kbatch.SqliteOutbox takes one of sqlite3"}[
        given
    ]
    what = "an aiosqlite.Connection, or SQLAlchemy's AsyncConnection or AsyncSession over one"
    assert said == f"connection must be {what}, not {name}"


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_outbox_for_threads_says_which_one_takes_a_connection_of_aiosqlite(
    outbox: SqliteOutbox, driver: str
) -> None:
    async def work() -> None:
        async with connected(outbox, driver) as (connection, _):
            with pytest.raises(TypeError, match=r"kbatch\.aio\.SqliteOutbox takes one of aiosqlite"):
                outbox.add(connection, envelopes(1), topic="orders")

    asyncio.run(work())


@pytest.mark.parametrize("has_tables", [True, False])
def test_a_connection_to_another_database(outbox: SqliteOutbox, tmp_path: Path, has_tables: bool) -> None:
    other = outboxes.made(tmp_path, "other.db")
    if not has_tables:
        outboxes.run(other, "DROP TABLE kbatch_outbox_meta")

    async def work() -> None:
        async with begun(other) as connection:
            assert "give a connection to that file" in await refused(of_aio(outbox), connection)
            assert connection.in_transaction
            await connection.commit()

    asyncio.run(work())
    assert outboxes.bodies(other) == []


def test_tables_that_are_missing_and_of_another_version(outbox: SqliteOutbox) -> None:
    async def work() -> None:
        async with begun(outbox) as connection:
            await connection.execute(outbox._tables.sql("UPDATE {meta} SET version = 2"))
            assert "tables of version 2" in await refused(of_aio(outbox), connection)
            await connection.execute(outbox._tables.sql("DROP TABLE {meta}"))
            assert "call create()" in await refused(of_aio(outbox), connection)
            assert connection.in_transaction

    asyncio.run(work())


def test_an_aiosqlite_without_row_factories_of_cursors(outbox: SqliteOutbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(aiosqlite.Cursor, "row_factory")

    async def work() -> None:
        async with begun(outbox) as connection:
            assert "use aiosqlite 0.19 or later" in await refused(of_aio(outbox), connection)
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (0, 0)


# -- what fails in the middle


def failing(envelope: Envelope) -> Iterator[Envelope]:
    yield envelope
    raise KeyError("of the generator")


@pytest.mark.parametrize(
    "what",
    [
        lambda: failing(envelopes(1)[0]),
        lambda: [*envelopes(1), Envelope(object())],
        lambda: [*envelopes(1), Envelope(data=b"x" * 2_000_000)],
        lambda: [*envelopes(1), "no envelope"],
    ],
    ids=["generator", "encoder", "large", "none"],
)
def test_what_cannot_be_mapped_adds_nothing_and_the_transaction_goes_on(
    outbox: SqliteOutbox, what: Callable[[], Any]
) -> None:
    other = of_aio(outbox)

    async def work() -> None:
        async with begun(outbox) as connection:
            await connection.execute("INSERT INTO orders VALUES (1)")
            with pytest.raises((KeyError, SerializationError, TypeError)):
                await other.add(connection, what(), topic="orders")
            assert await other.add(connection, envelopes(2), topic="orders") == 2
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (1, 2)
    assert outboxes.bodies(outbox) == [b"0", b"1"]


@pytest.mark.parametrize("table", ["outbox", "later"])
def test_a_row_that_sqlite_refuses_in_the_middle_leaves_none(outbox: SqliteOutbox, table: str) -> None:
    later = [Envelope(data=b"", scheduled_time=FUTURE) for _ in range(5)]
    given = [*envelopes(5), *later]
    outboxes.refuse_rows(outbox, table, message_id=(later if table == "later" else given)[3].id)

    async def work() -> None:
        async with begun(outbox) as connection:
            await connection.execute("INSERT INTO orders VALUES (1)")
            assert "no room" in await refused(of_aio(outbox), connection, given)
            assert connection.in_transaction
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (1, 0)
    assert outbox.status().scheduled == 0


@pytest.mark.parametrize("how", ["rollback", "commit", "close", "task", "stop"])
def test_an_encoder_that_ends_the_transaction_or_closes_the_connection(outbox: SqliteOutbox, how: str) -> None:
    connections: list[Any] = []
    tasks: list[Any] = []

    def encode(message: Any, _: Any) -> bytes:
        connection, of_thread = connections
        if how == "task":
            tasks.append(asyncio.ensure_future(connection.rollback()))
        elif how == "stop":
            tasks.append(connection.stop())
        else:
            getattr(of_thread, how)()
        return b"x"

    if how == "stop" and not hasattr(aiosqlite.Connection, "stop"):
        pytest.skip("platform: this aiosqlite has no stop")

    async def work() -> None:
        other = of_aio(outbox, encoder=encode)
        async with aiosqlite.connect(outbox._path, isolation_level=None, check_same_thread=False) as connection:
            cursor = await connection.execute("BEGIN IMMEDIATE")
            connections[:] = connection, cursor.connection
            said = await refused(other, connection, [Envelope(1)])
            assert ("in no transaction" in said) == (how in ("rollback", "commit", "task")), said
            assert ("is open" in said) == (how in ("close", "stop")), said
            for task in tasks:
                await task

    asyncio.run(work())
    assert counted(outbox) == (0, 0)


# -- tasks


class Gate:
    """A function of SQL at which a connection's thread waits."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    async def add_to(self, connection: aiosqlite.Connection) -> None:
        await connection.create_function("gate", 0, self._wait)

    def _wait(self) -> int:
        self.reached.set()
        assert self.opened.wait(60)
        return 1

    async def is_reached(self) -> None:
        while not self.reached.is_set():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("driver", DRIVERS[:2])
@pytest.mark.parametrize("is_begun", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_an_add_that_is_cancelled_adds_all_or_none_before_what_comes_next(
    outbox: SqliteOutbox, count: int, is_begun: bool, driver: str
) -> None:
    gate = Gate()

    async def work() -> None:
        async with connected(outbox, driver) as (connection, execute):
            at_driver = connection
            if driver != "aiosqlite":
                at_driver = (await connection.get_raw_connection()).driver_connection
            await gate.add_to(at_driver)
            if is_begun:
                await execute("CREATE TEMP TRIGGER waits AFTER INSERT ON main.kbatch_outbox BEGIN SELECT gate(); END")
            await execute("INSERT INTO orders VALUES (1)")
            before = None if is_begun else asyncio.ensure_future(at_driver.execute("SELECT gate()"))
            if before is not None:
                await gate.is_reached()
            adding = asyncio.ensure_future(of_aio(outbox).add(connection, envelopes(count), topic="orders"))
            if is_begun:
                await gate.is_reached()
            else:
                await asyncio.sleep(0.01)  # it has queued what it can
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            gate.opened.set()
            if before is not None:
                await before
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (1, count if is_begun else 0)


def test_what_the_connections_thread_has_not_begun_when_its_task_is_cancelled_is_not_done(
    outbox: SqliteOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, tasks, fetch = Gate(), [], aiosqlite.Cursor.fetchone

    async def work() -> None:
        async with begun(outbox) as connection:
            await gate.add_to(connection)
            is_queued = asyncio.Event()

            async def fetch_behind_another(cursor: aiosqlite.Cursor) -> Any:
                tasks.append(asyncio.ensure_future(connection.execute("SELECT gate()")))
                await gate.is_reached()
                is_queued.set()
                return await fetch(cursor)

            monkeypatch.setattr(aiosqlite.Cursor, "fetchone", fetch_behind_another)
            adding = asyncio.ensure_future(of_aio(outbox).add(connection, envelopes(3), topic="orders"))
            await is_queued.wait()
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            gate.opened.set()
            await tasks[0]
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (0, 0)


def test_tasks_add_on_connections_of_their_own_at_the_same_time(outbox: SqliteOutbox) -> None:
    other = of_aio(outbox)

    async def add(task: int) -> None:
        async with aiosqlite.connect(outbox._path, isolation_level=None, timeout=60) as connection:
            for n in range(20):
                await connection.execute("BEGIN IMMEDIATE")
                given = [Envelope(data=b"%d %d" % (task, m), key=f"{task}") for m in range(3 * n, 3 * n + 3)]
                assert await other.add(connection, given, topic="orders") == 3
                await (connection.rollback() if n % 5 == 4 else connection.commit())

    async def work() -> None:
        await asyncio.gather(*(add(task) for task in range(3)))

    asyncio.run(work())
    found = [tuple(map(int, (body or b"").split())) for body in outboxes.bodies(outbox)]
    committed = [m for n in range(20) if n % 5 != 4 for m in range(3 * n, 3 * n + 3)]
    assert [[m for of, m in found if of == task] for task in range(3)] == [committed] * 3
    assert len(set(outboxes.query(outbox, "SELECT seq FROM {outbox}"))) == len(found)


def test_no_statement_of_another_task_comes_between_those_of_an_add(outbox: SqliteOutbox) -> None:
    statements: list[str] = []

    async def work() -> None:
        async with begun(outbox) as connection:
            adds = [of_aio(outbox).add(connection, envelopes(3, 3 * n), topic="orders") for n in range(10)]
            others = [connection.execute("SELECT 'of another task'") for _ in range(50)]
            await connection.set_trace_callback(statements.append)
            assert await asyncio.gather(*adds, *others)
            await connection.set_trace_callback(None)
            await connection.commit()

    asyncio.run(work())
    assert outboxes.bodies(outbox) == [b"%d" % n for n in range(30)]
    kinds = [statement.split()[0] for statement in statements if "another task" not in statement]
    written = [at for at, statement in enumerate(statements) if statement.startswith(("UPDATE", "INSERT"))]
    assert kinds.count("UPDATE") == 10
    for first in range(0, len(written), 4):
        of_one = written[first : first + 4]  # numbers, and three rows; one SELECT tells the numbers
        assert of_one[-1] - of_one[0] == 4, statements[of_one[0] : of_one[-1] + 1]


def test_the_loop_goes_on_while_an_add_waits_for_another_connections_lock(outbox: SqliteOutbox) -> None:
    async def work() -> None:
        async with begun(outbox, timeout=60) as connection:
            assert await of_aio(outbox).add(connection, envelopes(1), topic="orders") == 1
            await connection.commit()
            await connection.execute("BEGIN")
            with outboxes.transaction(outbox):
                adding = asyncio.ensure_future(of_aio(outbox).add(connection, envelopes(3), topic="orders"))
                for _ in range(5):
                    await asyncio.sleep(0.01)
                assert not adding.done()
            assert await adding == 3
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (0, 4)


def test_a_lock_that_another_connection_keeps_is_told_with_what_to_do(outbox: SqliteOutbox) -> None:
    async def work() -> None:
        async with begun(outbox, "BEGIN", timeout=0) as connection:
            with outboxes.transaction(outbox):
                assert "begin with BEGIN IMMEDIATE" in await refused(of_aio(outbox), connection)
            assert await of_aio(outbox).add(connection, envelopes(1), topic="orders") == 1
            await connection.commit()

    asyncio.run(work())
    assert counted(outbox) == (0, 1)


# -- the rest of it


def test_it_makes_tables_and_tells_its_status(tmp_path: Path) -> None:
    other = aio.SqliteOutbox(tmp_path / "new.db")

    async def work() -> None:
        with pytest.raises(OutboxError, match=r"call create\(\)"):
            await other.status()
        await other.create()
        await other.create()
        assert await other.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)

    asyncio.run(work())
    assert repr(other) == f"<kbatch.aio.SqliteOutbox {tmp_path / 'new.db'}>"
    assert other.ddl() == SqliteOutbox(tmp_path / "new.db").ddl()


def test_it_looks_after_dead_letters_and_what_waits(outbox: SqliteOutbox) -> None:
    other = of_aio(outbox)
    outboxes.add(outbox, envelopes(5))
    outboxes.move_to_dead(outbox, "seq <= 3")
    outboxes.move_to_later(outbox, 4, 5)

    async def work() -> None:
        letters, scheduled = other.dead_letters, other.scheduled
        first, second, _ = await letters.find()
        await letters.replay_edited(first.number, first.envelope.replace(data=b"edited"))
        assert await letters.replay(OutboxQuery(numbers=[second.number])) == 1
        assert await letters.discard(OutboxQuery()) == 1
        assert await scheduled.reschedule(OutboxQuery(numbers=[4, 5]), FUTURE) == 2
        assert await scheduled.cancel(OutboxQuery(numbers=[5])) == 1
        assert [each.number for each in await scheduled.find()] == [4]

    asyncio.run(work())
    assert outboxes.bodies(outbox) == [b"edited", b"1"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_durable_sender_of_a_loop_commits_or_joins_a_transaction(outbox: SqliteOutbox, driver: str) -> None:
    async def work() -> None:
        async with (
            aio.DurableSender(of_aio(outbox), "orders") as sender,
            connected(outbox, driver) as (connection, run),
        ):
            assert await sender.send(Envelope(data=b"0"))
            for n, commits in ((1, False), (2, True)):
                await run("INSERT INTO orders VALUES (1)")
                assert await sender.send(Envelope(data=b"%d" % n), connection=connection)
                await (connection.commit() if commits else connection.rollback())

    asyncio.run(work())
    assert counted(outbox) == (1, 2)
    assert outboxes.bodies(outbox) == [b"0", b"2"]


def test_a_durable_sender_that_blocks_does_not_add_by_an_outbox_for_asyncio(outbox: SqliteOutbox) -> None:
    with kbatch.DurableSender(of_aio(outbox), "orders") as sender:
        assert sender.send(Envelope(data=b"0"))
        with outboxes.transaction(outbox) as connection, pytest.raises(TypeError, match="or an outbox for threads"):
            sender.send(Envelope(data=b"1"), connection=connection)
    assert outboxes.bodies(outbox) == [b"0"]
