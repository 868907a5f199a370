"""Marking within the transactions of each driver, and of ``sqlite3`` in each of its modes."""

import asyncio
import contextlib
import itertools
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

import kbatch
from kbatch import Envelope, InboxError, PostgresInbox, SqliteInbox, aio
from tests import inboxes
from tests.inboxes import GROUP
from tests.outboxes import in_schema, rows, run

ISOLATION = ["", "DEFERRED", "IMMEDIATE", "EXCLUSIVE", None]
COUNTS = [1, 3, 100]


@pytest.fixture
def of_postgres(new_inbox: Callable[..., Any]) -> PostgresInbox:
    inbox: PostgresInbox = new_inbox()
    run(inbox, f"CREATE TABLE {in_schema(inbox, 'orders')} (n integer)")
    return inbox


@pytest.fixture
def of_sqlite(tmp_path: Path) -> SqliteInbox:
    inbox = inboxes.made(tmp_path)
    run(inbox, "CREATE TABLE orders (n)")
    return inbox


in_postgres = pytest.mark.parametrize("new_inbox", ["postgres"], indirect=True)


def given(count: int) -> list[Envelope]:
    return [Envelope(data=b"%d" % n) for n in range(count)]


def found(inbox: Any) -> tuple[int, int]:
    """How many orders and how many marks there are, for others."""
    table = "orders" if isinstance(inbox, SqliteInbox) else in_schema(inbox, "orders")
    ((orders,),) = rows(inbox, f"SELECT count(*) FROM {table}")
    return orders, len(inboxes.ids(inbox))


# -- sqlite3


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("isolation_level", ISOLATION)
def test_it_joins_the_transaction_of_each_isolation_level(
    of_sqlite: SqliteInbox, isolation_level: Any, commits: bool
) -> None:
    connection = sqlite3.connect(of_sqlite._path, isolation_level=isolation_level)
    if isolation_level is None:
        connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    assert of_sqlite.accept_many(connection, given(3), group=GROUP) == [True] * 3
    assert connection.in_transaction
    assert found(of_sqlite) == (0, 0)
    connection.commit() if commits else connection.rollback()
    connection.close()
    assert found(of_sqlite) == ((1, 3) if commits else (0, 0))


@pytest.mark.parametrize("isolation_level", ISOLATION)
def test_no_transaction(of_sqlite: SqliteInbox, isolation_level: Any) -> None:
    connection = sqlite3.connect(of_sqlite._path, isolation_level=isolation_level)
    with pytest.raises(InboxError, match="BEGIN IMMEDIATE"):
        of_sqlite.accept(connection, given(1)[0], group=GROUP)
    assert not connection.in_transaction
    connection.close()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="platform: sqlite3.connect(autocommit=…) is of Python 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_it_joins_the_transaction_of_each_autocommit(of_sqlite: SqliteInbox, autocommit: bool) -> None:
    connection = sqlite3.connect(of_sqlite._path, autocommit=autocommit)  # type: ignore[call-arg, unused-ignore]
    if autocommit:
        connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    assert of_sqlite.accept(connection, given(1)[0], group=GROUP)
    assert found(of_sqlite) == (0, 0)
    connection.execute("COMMIT") if autocommit else connection.commit()
    connection.close()
    assert found(of_sqlite) == (1, 1)


def test_a_connection_with_factories_and_converters_of_its_own(of_sqlite: SqliteInbox) -> None:
    sqlite3.register_converter("INTEGER", lambda value: b"converted " + value)
    try:
        connection = sqlite3.connect(of_sqlite._path, isolation_level=None, detect_types=sqlite3.PARSE_DECLTYPES)
        connection.row_factory = sqlite3.Row
        connection.text_factory = bytes
        connection.execute("CREATE TEMP TABLE kbatch_inbox (x)")
        connection.execute("BEGIN")
        assert of_sqlite.accept_many(connection, given(2), group=GROUP) == [True, True]
        connection.execute("COMMIT")
        connection.close()
    finally:
        sqlite3.converters.pop("INTEGER")  # type: ignore[attr-defined]


def test_a_connection_to_another_database(of_sqlite: SqliteInbox, tmp_path: Path) -> None:
    other = inboxes.made(tmp_path, "other.db")
    with inboxes.transaction(other) as connection, pytest.raises(InboxError, match="give a connection to that file"):
        of_sqlite.accept_many(connection, given(3), group=GROUP)
    assert inboxes.ids(other) == set()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("BEGIN")
    with pytest.raises(InboxError, match="give a connection to that file"):
        of_sqlite.accept_many(connection, given(3), group=GROUP)
    connection.close()


def test_a_row_that_sqlite_refuses_leaves_no_mark_of_its_batch(of_sqlite: SqliteInbox) -> None:
    some = given(5)
    run(
        of_sqlite,
        f"CREATE TRIGGER refuses BEFORE INSERT ON kbatch_inbox WHEN NEW.id = X'{some[3].id.hex}' "
        "BEGIN SELECT raise(ABORT, 'no room'); END",
    )
    with inboxes.transaction(of_sqlite) as connection:
        connection.execute("INSERT INTO orders VALUES (1)")
        with pytest.raises(InboxError, match="no room"):
            of_sqlite.accept_many(connection, some, group=GROUP)
    assert found(of_sqlite) == (1, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_progress_handler_that_interrupts_at_any_time_leaves_no_mark(of_sqlite: SqliteInbox, count: int) -> None:
    for calls in range(1000):
        asked = itertools.count()
        with contextlib.closing(sqlite3.connect(of_sqlite._path)) as connection:
            connection.execute("INSERT INTO orders VALUES (1)")
            connection.set_progress_handler(lambda: next(asked) >= calls, 5)  # noqa: B023
            try:
                of_sqlite.accept_many(connection, given(count), group=GROUP)
            except InboxError:
                connection.set_progress_handler(None, 0)
                connection.commit()
            else:
                break
        assert not inboxes.ids(of_sqlite)
    assert calls > 5


class Interrupted(sqlite3.Connection):
    """Gets Ctrl-C right after it has marked so many ids."""

    marks_left = 0

    def cursor(self, _: Any = None) -> sqlite3.Cursor:  # type: ignore[override]
        return super().cursor(InterruptedCursor)


class InterruptedCursor(sqlite3.Cursor):
    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        super().execute(sql, *values)
        if isinstance(self.connection, Interrupted) and sql.startswith("INSERT"):
            self.connection.marks_left -= 1
            if self.connection.marks_left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("marks", [1, 2, 3, 4])
def test_ctrl_c_takes_back_its_own_marks_and_none_of_before(of_sqlite: SqliteInbox, marks: int) -> None:
    some = given(4)
    before = {some[0].id, some[2].id}
    inboxes.accept(of_sqlite, [some[0], some[2]])
    connection = sqlite3.connect(of_sqlite._path, isolation_level=None, factory=Interrupted)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO orders VALUES (1)")
    connection.marks_left = marks
    with pytest.raises(KeyboardInterrupt):
        of_sqlite.accept_many(connection, some, group=GROUP)
    connection.execute("COMMIT")
    connection.close()
    assert found(of_sqlite) == (1, 2)
    assert inboxes.ids(of_sqlite) == before


def test_a_connection_that_is_opened_anew_is_looked_at_again(of_sqlite: SqliteInbox, tmp_path: Path) -> None:
    connection = sqlite3.connect(of_sqlite._path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    assert of_sqlite.accept_many(connection, given(2), group=GROUP) == [True, True]
    connection.execute("COMMIT")
    other = inboxes.made(tmp_path, "other.db")
    connection.__init__(other._path, isolation_level=None)  # type: ignore[misc]
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(InboxError, match="give a connection to that file"):
        of_sqlite.accept(connection, given(1)[0], group=GROUP)
    connection.execute("COMMIT")
    connection.close()
    assert inboxes.ids(other) == set()
    assert found(of_sqlite) == (0, 2)


def test_a_connection_that_only_reads(of_sqlite: SqliteInbox) -> None:
    connection = sqlite3.connect(f"file:{of_sqlite._path}?mode=ro", uri=True, isolation_level=None)
    connection.execute("BEGIN")
    with pytest.raises(InboxError, match="open the database for writing"):
        of_sqlite.accept(connection, given(1)[0], group=GROUP)
    assert connection.in_transaction
    connection.close()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_transaction_goes_on_when_another_has_the_lock(of_sqlite: SqliteInbox, is_first: bool) -> None:
    connection = sqlite3.connect(of_sqlite._path, isolation_level=None, timeout=0)
    connection.execute("BEGIN")
    if not is_first:
        of_sqlite.accept(connection, given(1)[0], group=GROUP)
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
    connection.execute("SELECT * FROM orders").fetchall()
    with inboxes.transaction(of_sqlite), pytest.raises(InboxError, match="locked"):
        of_sqlite.accept_many(connection, given(2), group=GROUP)
    assert connection.in_transaction
    assert of_sqlite.accept_many(connection, given(2), group=GROUP) == [True, True]
    connection.execute("COMMIT")
    connection.close()
    assert found(of_sqlite) == (0, 2)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("session", [True, False])
def test_it_joins_the_transaction_of_sqlalchemy(of_sqlite: SqliteInbox, session: bool, commits: bool) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy", reason="platform: it has no wheel here")
    orm = pytest.importorskip("sqlalchemy.orm")
    engine = sqlalchemy.create_engine(f"sqlite:///{of_sqlite._path}")
    with orm.Session(engine) if session else engine.connect() as connection:
        connection.execute(sqlalchemy.text("INSERT INTO orders VALUES (1)"))
        assert of_sqlite.accept(connection, given(1)[0], group=GROUP)
        assert found(of_sqlite) == (0, 0)
        connection.commit() if commits else connection.rollback()
    engine.dispose()
    assert found(of_sqlite) == ((1, 1) if commits else (0, 0))


# -- sqlite3 on an event loop


def of_loops(inbox: SqliteInbox) -> aio.SqliteInbox:
    return aio.SqliteInbox(inbox._path)


@contextlib.asynccontextmanager
async def connected_to_sqlite(inbox: SqliteInbox, driver: str) -> AsyncIterator[tuple[Any, Any]]:
    """A connection, and how it executes a statement."""
    if driver == "aiosqlite":
        async with aiosqlite.connect(inbox._path) as connection:
            yield connection, connection.execute
        return
    sqlalchemy = pytest.importorskip("sqlalchemy", reason="platform: it has no wheel here")
    extension = pytest.importorskip("sqlalchemy.ext.asyncio")
    engine = extension.create_async_engine(f"sqlite+aiosqlite:///{inbox._path}")
    async with extension.AsyncSession(engine) if driver.endswith("session") else engine.connect() as connection:
        yield connection, lambda statement: connection.execute(sqlalchemy.text(statement))
    await engine.dispose()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("driver", ["aiosqlite", "sqlalchemy connection", "sqlalchemy session"])
def test_it_joins_the_transaction_of_each_driver_of_asyncio_in_sqlite(
    of_sqlite: SqliteInbox, driver: str, count: int
) -> None:
    inbox, some = of_loops(of_sqlite), given(count)

    async def work() -> None:
        async with connected_to_sqlite(of_sqlite, driver) as (connection, execute):
            with pytest.raises(InboxError, match="BEGIN IMMEDIATE"):
                await inbox.accept(connection, some[0], group=GROUP)
            await execute("INSERT INTO orders VALUES (1)")
            assert await inbox.accept_many(connection, some, group=GROUP) == [True] * count
            assert found(of_sqlite) == (0, 0)
            await connection.rollback()
            await execute("INSERT INTO orders VALUES (1)")
            assert await inbox.accept(connection, some[0], group=GROUP)
            expected = [False] + [True] * (count - 1)
            assert await inbox.accept_many(connection, some, group=GROUP) == expected
            assert await inbox.accept_many(connection, some * 2, group=GROUP) == [False] * count * 2
            assert await inbox.accept_many(connection, [], group=GROUP) == []
            assert found(of_sqlite) == (0, 0)
            await connection.commit()

    asyncio.run(work())
    assert found(of_sqlite) == (1, count)
    assert inboxes.ids(of_sqlite) == {each.id for each in some}


def test_what_is_refused_on_an_event_loop_marks_nothing_and_the_transaction_goes_on(
    of_sqlite: SqliteInbox, tmp_path: Path
) -> None:
    inbox, some = of_loops(of_sqlite), given(5)
    other = inboxes.made(tmp_path, "other.db")
    run(
        of_sqlite,
        f"CREATE TRIGGER refuses BEFORE INSERT ON kbatch_inbox WHEN NEW.id = X'{some[3].id.hex}' "
        "BEGIN SELECT raise(ABORT, 'no room'); END",
    )

    def failing() -> Any:
        yield some[0]
        raise KeyError

    async def work() -> None:
        async with aiosqlite.connect(of_sqlite._path, check_same_thread=False) as connection:
            cursor = await connection.execute("INSERT INTO orders VALUES (1)")
            with pytest.raises(InboxError, match="no room"):
                await inbox.accept_many(connection, some, group=GROUP)
            with pytest.raises(KeyError):
                await inbox.accept_many(connection, failing(), group=GROUP)
            with pytest.raises(TypeError, match=r"must be a kbatch\.Envelope"):
                await inbox.accept_many(connection, [some[0], "no envelope"], group=GROUP)  # type: ignore[list-item]
            await connection.commit()
            assert found(of_sqlite) == (1, 0)
            await connection.execute("BEGIN")
            ends = (cursor.connection.rollback() or each for each in some)
            with pytest.raises(InboxError, match="in no transaction"):
                await inbox.accept_many(connection, ends, group=GROUP)
        with pytest.raises(InboxError, match="give a connection that is open"):
            await inbox.accept(connection, some[0], group=GROUP)
        with pytest.raises(TypeError, match=r"an aiosqlite\.Connection"):
            await inbox.accept("shop.db", some[0], group=GROUP)  # type: ignore[arg-type]
        async with aiosqlite.connect(other._path) as connection:
            await connection.execute("BEGIN")
            with pytest.raises(InboxError, match="give a connection to that file"):
                await inbox.accept(connection, some[0], group=GROUP)

    asyncio.run(work())
    assert found(of_sqlite) == (1, 0)
    assert inboxes.ids(other) == set()


def test_the_inbox_of_sqlite_for_asyncio_makes_tables_tells_its_status_and_purges(tmp_path: Path) -> None:
    inbox = aio.SqliteInbox(tmp_path / "new.db", retention_s=1)
    of_threads = SqliteInbox(tmp_path / "new.db")

    async def work() -> None:
        with pytest.raises(InboxError, match=r"call create\(\)"):
            await inbox.status()
        await inbox.create()
        assert await inbox.status() == kbatch.InboxStatus(0)
        inboxes.accept(of_threads, given(3))
        inboxes.let_time_pass(of_threads, 60)
        assert await inbox.purge() == 0
        assert await inbox.purge(committed={GROUP: inboxes.days_ago(0)}) == 3

    asyncio.run(work())
    assert repr(inbox) == f"<kbatch.aio.SqliteInbox {tmp_path / 'new.db'}>"
    session = inbox.open_session(GROUP)
    assert session.handle(given(1)[0], lambda envelope, connection: connection.execute("SELECT 1"))
    session.close()
    assert len(inboxes.ids(of_threads)) == 1


# -- PostgreSQL


@in_postgres
@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", ["implicit", "block", "nested", "begin", "serializable"])
def test_it_joins_the_transaction_of_psycopg(of_postgres: PostgresInbox, how: str, count: int, commits: bool) -> None:
    import psycopg
    from psycopg.rows import dict_row

    some = given(count)
    insert = f"INSERT INTO {in_schema(of_postgres, 'orders')} VALUES (1)"
    with contextlib.closing(
        psycopg.connect(of_postgres._conninfo, autocommit=how in ("block", "begin"), row_factory=dict_row)
    ) as connection:
        if how == "serializable":
            connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        with contextlib.suppress(KeyError), contextlib.ExitStack() as blocks:
            for _ in range({"block": 1, "nested": 2}.get(how, 0)):
                blocks.enter_context(connection.transaction())
            if how == "begin":
                connection.execute("BEGIN")
            connection.execute(insert)
            assert of_postgres.accept_many(connection, some, group=GROUP) == [True] * count
            assert of_postgres.accept_many(connection, some, group=GROUP) == [False] * count
            assert found(of_postgres) == (0, 0)
            if how in ("block", "nested") and not commits:
                raise KeyError
        connection.commit() if commits else connection.rollback()
    assert found(of_postgres) == ((1, count) if commits else (0, 0))


@contextlib.asynccontextmanager
async def connected(inbox: PostgresInbox, driver: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    """A connection in a transaction, how it executes a statement, and how it commits."""
    url = inbox._conninfo
    async with contextlib.AsyncExitStack() as undo:
        if driver == "psycopg":
            import psycopg

            connection: Any = await psycopg.AsyncConnection.connect(url)
            undo.push_async_callback(connection.close)
            yield connection, connection.execute, connection.commit
        elif driver == "asyncpg":
            import asyncpg

            connection = await asyncpg.connect(url)
            undo.push_async_callback(connection.close)
            transaction = connection.transaction()
            await transaction.start()
            yield connection, connection.execute, transaction.commit
        else:
            import sqlalchemy.ext.asyncio

            _, name, kind = driver.split()
            base = url.replace("postgresql:", f"postgresql+{name}:")
            engine = sqlalchemy.ext.asyncio.create_async_engine(
                base.replace("sslmode=", "ssl=") if name == "asyncpg" else base
            )
            undo.push_async_callback(engine.dispose)
            made = sqlalchemy.ext.asyncio.AsyncSession(engine) if kind == "session" else engine.connect()
            connection = await undo.enter_async_context(made)

            async def execute(statement: str) -> None:
                await connection.execute(sqlalchemy.text(statement.replace(":", "\\:")))

            yield connection, execute, connection.commit


DRIVERS = [
    "psycopg",
    "asyncpg",
    *(f"sqlalchemy {name} {kind}" for name in ("psycopg", "asyncpg") for kind in ("session", "connection")),
]


@in_postgres
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_it_joins_the_transaction_of_each_driver_of_asyncio(
    of_postgres: PostgresInbox, driver: str, count: int
) -> None:
    inbox = aio.PostgresInbox(of_postgres._conninfo, schema=of_postgres._tables.schema)
    some = given(count)
    insert = f"INSERT INTO {in_schema(of_postgres, 'orders')} VALUES (1)"

    async def work() -> None:
        async with connected(of_postgres, driver) as (connection, execute, _):
            await execute(insert)
            assert await inbox.accept_many(connection, some, group=GROUP) == [True] * count
        assert found(of_postgres) == (0, 0)
        async with connected(of_postgres, driver) as (connection, execute, commit):
            assert await inbox.accept(connection, some[0], group=GROUP)
            await execute(insert)
            expected = [False] + [True] * (count - 1)
            assert await inbox.accept_many(connection, some, group=GROUP) == expected
            assert await inbox.accept_many(connection, some * 2, group=GROUP) == [False] * count * 2
            await commit()
        assert found(of_postgres) == (1, count)

    asyncio.run(work())


@in_postgres
def test_what_a_driver_says_of_its_use_is_no_outage_and_a_lost_connection_is(of_postgres: PostgresInbox) -> None:
    import asyncpg

    inbox = aio.PostgresInbox(of_postgres._conninfo, schema=of_postgres._tables.schema)
    (order,) = given(1)

    async def work() -> list[Any]:
        connection = await asyncpg.connect(of_postgres._conninfo, command_timeout=2)
        await connection.execute("BEGIN")
        both = (inbox.accept(connection, order, group=GROUP) for _ in range(2))
        found = await asyncio.gather(*both, return_exceptions=True)
        await connection.execute("ROLLBACK")
        await connection.execute("BEGIN")
        with inboxes.transaction(of_postgres) as holder:
            holder.execute(of_postgres._tables.sql("LOCK TABLE {inbox}"))
            found += await asyncio.gather(inbox.accept(connection, order, group=GROUP), return_exceptions=True)
        await connection.execute("ROLLBACK")
        await connection.execute("BEGIN")
        run(of_postgres, f"SELECT pg_terminate_backend({connection.get_server_pid()})")
        found += await asyncio.gather(inbox.accept(connection, order, group=GROUP), return_exceptions=True)
        await connection.close()
        return found

    first, *others = asyncio.run(work())
    assert first is True
    assert all(isinstance(each, InboxError) for each in others), others
    assert [each.is_outage for each in others] == [False, False, True]


@in_postgres
def test_a_connection_whose_text_is_bytes(of_postgres: PostgresInbox) -> None:
    ascii_only = "SET client_encoding TO 'SQL_ASCII'"
    some = given(3)
    with inboxes.transaction(of_postgres) as connection:
        connection.execute(ascii_only)
        assert of_postgres.accept(connection, some[1], group=GROUP)
        assert of_postgres.accept_many(connection, some, group=GROUP) == [True, False, True]
    inbox = aio.PostgresInbox(of_postgres._conninfo, schema=of_postgres._tables.schema)

    async def work() -> None:
        async with connected(of_postgres, "psycopg") as (connection, execute, _):
            await execute(ascii_only)
            assert await inbox.accept_many(connection, [*some, *given(1)], group=GROUP) == [False] * 3 + [True]

    asyncio.run(work())
    session = of_postgres.open_session(GROUP)

    def handle(envelopes: list[Envelope], connection: Any) -> None:
        connection.execute(ascii_only)

    assert [session.handle_batch([*some, *given(n)], handle) for n in (1, 2)] == [1, 2]
    session.close()


@in_postgres
def test_the_inbox_for_asyncio_makes_tables_tells_its_status_and_purges(of_postgres: PostgresInbox) -> None:
    inbox = aio.PostgresInbox(of_postgres._conninfo, schema=of_postgres._tables.schema, prefix="aio_")

    async def work() -> None:
        with pytest.raises(InboxError, match=r"call create\(\)"):
            await inbox.status()
        await inbox.create()
        assert await inbox.status() == kbatch.InboxStatus(0)
        assert await inbox.purge() == 0
        async with connected(of_postgres, "asyncpg") as (connection, execute, _):
            await execute("ROLLBACK")
            with pytest.raises(InboxError, match="in no transaction"):
                await inbox.accept(connection, given(1)[0], group=GROUP)
        with pytest.raises(TypeError, match=r"psycopg\.AsyncConnection"):
            await inbox.accept("shop.db", given(1)[0], group=GROUP)  # type: ignore[arg-type]

    asyncio.run(work())
    assert repr(inbox).startswith("<kbatch.aio.PostgresInbox ")
