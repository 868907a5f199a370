"""Outboxes in SQLite files and in schemas of PostgreSQL, and what is in their tables."""

import contextlib
import os
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import pytest

import kbatch
from kbatch import Envelope
from kbatch._fastmap import packed_key_hash, unpack_record
from kbatch._outbox._sqlite_store import SqliteStore
from tests.waiting import stop, until

Outbox: TypeAlias = kbatch.SqliteOutbox | kbatch.PostgresOutbox
Database: TypeAlias = Outbox | kbatch.SqliteInbox | kbatch.PostgresInbox

# What concerns one kind of database only; other tests that use `new_outbox` run for each.
in_sqlite = pytest.mark.parametrize("new_outbox", ["sqlite"], indirect=True)


def made(directory: Path, name: str = "shop.db", **options: Any) -> kbatch.SqliteOutbox:
    """An outbox whose tables are there."""
    outbox = kbatch.SqliteOutbox(directory / name, **options)
    outbox.create()
    return outbox


def where(outbox: Outbox) -> dict[str, str]:
    """Where it is, for another process."""
    if isinstance(outbox, kbatch.SqliteOutbox):
        return {"path": outbox._path}
    return {"conninfo": outbox._conninfo, "schema": outbox._tables.schema}


def same(outbox: Outbox, **options: Any) -> Outbox:
    """Another object for it."""
    kind: Any = type(outbox)
    return cast("Outbox", kind(**where(outbox), **options))


def named(outbox: Outbox) -> list[str]:
    """Where it is, for a command."""
    found = where(outbox)
    return ["-o", found["path"]] if "path" in found else ["-o", found["conninfo"], "--schema", found["schema"]]


def new_schema(conninfo: str) -> str:
    """Makes a schema of PostgreSQL, whose name is quoted."""
    name = f'Test "{uuid.uuid4().hex[:12]}" {{%s}}'
    with connected(conninfo) as connection:
        connection.execute(_sql("CREATE SCHEMA {}", name))
    return name


def drop_schema(conninfo: str, name: str) -> None:
    """Drops it with all that it has."""
    with connected(conninfo) as connection:
        connection.execute(_sql("DROP SCHEMA {} CASCADE", name))


def _sql(statement: str, name: str) -> Any:
    from psycopg import sql

    return sql.SQL(statement).format(sql.Identifier(name))


def connected(where: Any) -> contextlib.AbstractContextManager[Any]:
    """A connection in autocommit mode, closed at the end."""
    if isinstance(where, (kbatch.SqliteOutbox, kbatch.SqliteInbox)):
        return contextlib.closing(sqlite3.connect(where._path, isolation_level=None, timeout=30))
    conninfo = getattr(where, "_conninfo", where)
    return _kept(conninfo) if conninfo in _lasting else contextlib.closing(_connect(conninfo))


@contextlib.contextmanager
def connections_kept(conninfo: str) -> Iterator[None]:
    """Meanwhile `connected` keeps those that are as good as new for the next ones: tests look thousands of times, and
    each connection is a process of the server's."""
    _lasting.add(conninfo)
    yield
    _lasting.remove(conninfo)
    for connection in _idle.pop((os.getpid(), conninfo), ()):
        connection.close()


_lasting: set[str] = set()
_idle: dict[tuple[int, str], list[Any]] = {}  # of each process: a child of a fork has none of its parent's


def _connect(conninfo: str, **options: Any) -> Any:
    import psycopg

    return psycopg.connect(conninfo, autocommit=True, **options)


@contextlib.contextmanager
def _kept(conninfo: str) -> Iterator[Any]:
    from psycopg.pq import TransactionStatus

    idle = _idle.setdefault((os.getpid(), conninfo), [])
    try:
        connection = idle.pop()
    except IndexError:
        connection = _connect(conninfo, prepare_threshold=None)  # DISCARD ALL discards what psycopg counts on
    is_good = is_kept = False
    try:
        yield connection
        is_good = connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE
    finally:
        try:
            if is_good:
                connection.execute("DISCARD ALL")
                idle.append(connection)
                is_kept = True
        finally:
            if not is_kept:
                connection.close()


@contextlib.contextmanager
def holding_all_connections(where: Any, most: int) -> Iterator[list[Any]]:
    """Has all connections that a PostgreSQL server gives, so that nobody else has one; what others had is ended."""
    import psycopg

    with contextlib.ExitStack() as undo:
        held = [undo.enter_context(connected(where))]

        def has_all() -> bool:
            """Another one may have been faster with one of them."""
            held[0].execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> ALL (%s) "
                "AND backend_type = 'client backend'",
                ([connection.info.backend_pid for connection in held],),
            )
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    held.append(undo.enter_context(connected(where)))
            return len(held) == most

        until(has_all, "all connections")
        yield held


@contextlib.contextmanager
def transaction(outbox: Outbox) -> Iterator[Any]:
    """A connection of the application within a transaction, which is committed unless this ends by an exception."""
    with connected(outbox) as connection:
        connection.execute("BEGIN IMMEDIATE" if isinstance(outbox, kbatch.SqliteOutbox) else "BEGIN")
        yield connection
        connection.execute("COMMIT")


def add(outbox: Outbox, envelopes: Iterable[Envelope], topic: str | None = "orders") -> int:
    """Adds in a transaction of its own."""
    with transaction(outbox) as connection:
        return outbox.add(connection, envelopes, topic=topic)


def query(outbox: Database, sql: str, *before: str) -> list[Any]:
    """The rows of a query on its database, after others, in which ``{outbox}``, ``{later}``, … are its tables."""
    with connected(outbox) as connection:
        for statement in before:
            connection.execute(statement)
        cursor = connection.execute(outbox._tables.sql(sql))
        return cursor.fetchall() if cursor.description is not None else []


def stop_between_transactions(outbox: Outbox, pid: int) -> None:
    """Stops a process that works on it where it holds up nobody else: in a transaction it would keep its locks."""
    stop(pid)
    while _is_held(outbox):
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
        stop(pid)


def _is_held(outbox: Outbox) -> bool:
    if isinstance(outbox, kbatch.PostgresOutbox):
        open_ones = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in trans%'"
        return bool(query(outbox, open_ones))
    with contextlib.closing(sqlite3.connect(outbox._path, isolation_level=None, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
        return False


def has_table(outbox: Database, name: str) -> bool:
    """Whether one of its tables is there."""
    if isinstance(outbox, kbatch.SqliteOutbox):
        return bool(query(outbox, f"SELECT 1 FROM sqlite_master WHERE name = 'kbatch_outbox_{name}'"))
    with connected(outbox) as connection:
        (found,) = connection.execute("SELECT to_regclass(%s)", (outbox._tables.names[name],)).fetchone()
    return found is not None


def run(outbox: Database, *statements: str) -> None:
    """Executes statements as they are."""
    with connected(outbox) as connection:
        for statement in statements:
            connection.execute(statement)


def rows(outbox: Database, statement: str) -> list[Any]:
    """The rows of a statement that is executed as it is."""
    with connected(outbox) as connection:
        found: list[Any] = connection.execute(statement).fetchall()
    return found


def in_schema(outbox: kbatch.PostgresOutbox | kbatch.PostgresInbox, name: str) -> str:
    """The quoted name of something in its schema."""
    return f"{_quoted(outbox._tables.schema)}.{_quoted(name)}"


def literal(outbox: Outbox, value: bytes) -> str:
    """Bytes in a statement."""
    return f"X'{value.hex()}'" if isinstance(outbox, kbatch.SqliteOutbox) else f"'\\x{value.hex()}'::bytea"


def refuse_rows(
    outbox: Outbox,
    table: str,
    *,
    number: int | None = None,
    message_id: uuid.UUID | None = None,
    deliver_by: bool = False,
) -> None:
    """Has inserts into one of its tables fail, or those of the row of this number or id, or of rows with a
    `deliver_by`."""
    when = "" if number is None else f"WHEN (NEW.seq = {number}) "
    if message_id is not None:
        value = literal(outbox, message_id.bytes) if isinstance(outbox, kbatch.SqliteOutbox) else f"'{message_id}'"
        when = f"WHEN (NEW.id = {value}) "
    when = "WHEN (NEW.deliver_by IS NOT NULL) " if deliver_by else when
    if isinstance(outbox, kbatch.SqliteOutbox):
        query(
            outbox,
            f"CREATE TRIGGER refuses BEFORE INSERT ON {outbox._tables.names[table]} {when}"
            "BEGIN SELECT raise(ABORT, 'no room'); END",
        )
    else:
        name = in_schema(outbox, "refuses")
        run(
            outbox,
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no room'; END $$",
            f"CREATE TRIGGER refuses BEFORE INSERT ON {outbox._tables.names[table]} "
            f"FOR EACH ROW {when}EXECUTE FUNCTION {name}()",
        )


def let_time_pass(outbox: Outbox, seconds: float) -> None:
    """As if so much had passed by the database's clock."""
    for change in (
        "{lease} SET until = until - ? WHERE owner IS NOT NULL",
        "{relay} SET until = until - ?",
        "{later} SET due_at = due_at - ?",
        "{dead} SET died_at = died_at - ?",
    ):
        query(outbox, f"UPDATE {change}".replace("?", f"({int(seconds * 1000)})"))


class OurStores:
    """What the suites of `kbatch.testing.compliance` ask of our stores."""

    @pytest.fixture
    def outbox(self, new_outbox: Callable[..., Outbox]) -> Outbox:
        return new_outbox()

    def let_time_pass(self, outbox: Outbox, seconds: float) -> None:
        let_time_pass(outbox, seconds)

    def refuse_row(self, outbox: Outbox, table: str, message_id: uuid.UUID) -> None:
        refuse_rows(outbox, table, message_id=message_id)

    def take_rows(self, outbox: Outbox, table: str) -> None:
        take_rows(outbox, table)


def take_rows(outbox: Outbox, table: str) -> None:
    """After `refuse_rows`, has them succeed again."""
    query(outbox, "DROP TRIGGER refuses" + ("" if isinstance(outbox, kbatch.SqliteOutbox) else f" ON {{{table}}}"))


def explained(store: Any) -> list[str]:
    """The plans of the statements with parameters that a store will execute."""
    plans: list[str] = []
    if isinstance(store, SqliteStore):
        connection = store._connection

        class Planned:
            in_transaction = property(lambda self: connection.in_transaction)

            def execute(self, sql: str, parameters: Any = ()) -> Any:
                if parameters:
                    plans.append(str(connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters).fetchall()))
                return connection.execute(sql, parameters)

            def executemany(self, sql: str, parameters: Any) -> Any:
                for each in parameters:
                    self.execute(sql, each)

            def close(self) -> None:
                connection.close()

        store._connection = Planned()  # type: ignore[assignment]
    else:
        run = store._run

        def planned(statement: str, parameters: Any = None) -> Any:
            if parameters:
                plans.append("\n".join(line for (line,) in run(f"EXPLAIN {statement}", parameters)))
            return run(statement, parameters)

        store._run = planned
    return plans


@contextlib.contextmanager
def granted(database: kbatch.PostgresOutbox | kbatch.PostgresInbox, rights: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The conninfo of a user who may use the schema, and has these rights on these tables."""
    from psycopg.conninfo import make_conninfo

    role = f"kbatch_{uuid.uuid4().hex[:12]}"
    schema = _quoted(database._tables.schema)
    names = database._tables.names
    run(
        database,
        f"CREATE ROLE {role}",
        f"GRANT USAGE ON SCHEMA {schema} TO {role}",
        *(f"GRANT {right} ON {names.get(what, what)} TO {role}" for right, what in rights),
    )
    try:
        yield make_conninfo(database._conninfo, options=f"-c role={role}")
    finally:
        run(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def sequence(outbox: kbatch.PostgresOutbox) -> str:
    """The sequence of the numbers, as GRANT takes it."""
    ((name,),) = rows(outbox, f"SELECT pg_get_serial_sequence('{outbox._tables.names['outbox']}', 'seq')")
    return f"SEQUENCE {name}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def move_to_later(outbox: Outbox, first: int, last: int) -> None:
    """Rows with these numbers were refused once, and are due."""
    for bucket, seq, packed in query(
        outbox, f"SELECT bucket, seq, packed FROM {{outbox}} WHERE seq BETWEEN {first} AND {last}"
    ):
        key_hash = packed_key_hash(packed)
        query(
            outbox,
            "INSERT INTO {later} (bucket, seq, id, packed, created_at, due_at, attempts, last_error, key_hash) "
            f"SELECT bucket, seq, id, packed, created_at, 0, 1, 'refused', {'NULL' if key_hash is None else key_hash} "
            f"FROM {{outbox}} WHERE bucket = {bucket} AND seq = {seq}",
        )
        query(outbox, f"DELETE FROM {{outbox}} WHERE bucket = {bucket} AND seq = {seq}")


def move_to_dead(outbox: Outbox, which: str) -> None:
    """Rows of which a condition is true were refused for good."""
    rows = "bucket, seq, id, packed, created_at, deliver_by"
    query(
        outbox,
        f"INSERT INTO {{dead}} ({rows}, died_at, attempts, last_error) "
        f"SELECT {rows}, 1000 * seq, 1, 'refused' FROM {{outbox}} WHERE {which}",
    )
    query(outbox, f"DELETE FROM {{outbox}} WHERE {which}")


def bodies(outbox: Outbox, table: str = "outbox") -> list[bytes | None]:
    """The bodies of the records in a table, by their numbers."""
    return [unpack_record(packed)[4] for (packed,) in query(outbox, f"SELECT packed FROM {{{table}}} ORDER BY seq")]
