"""A PostgreSQL database with tables of kbatch, and connections to it."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any, cast

from kbatch._callbacks import call_fault, callback_name, loops_own
from kbatch._database._tables import Tables, driver_of, driver_of_aio, not_taken
from kbatch._errors import ConfigError, exception_text, named_exception_text, shown, type_name
from kbatch._text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import psycopg

    from kbatch._database._postgres_connection import OwnConnection
    from kbatch._errors import KbatchError

__all__ = ["AioPostgresDatabase", "PostgresDatabase", "PostgresNames", "is_asyncpg", "is_lost"]

_IN_TRANSACTION, _NO_PIPELINE = 2, 0  # libpq's PQTRANS_INTRANS and PQ_PIPELINE_OFF
_LONGEST_NAME = 63  # bytes; PostgreSQL cuts off what is longer

_OF_A_POOL = (
    "behind a pool in transaction mode nothing may be prepared: connect with prepare_threshold=None (psycopg) or "
    "statement_cache_size=0 (asyncpg)"
)

# What to do, by the beginning of PostgreSQL's code.
_HINTS = {
    "42P01": "call create() of the {what} once, or have its ddl() executed; the connection must be to its database",
    "42703": "its tables are not those that create() makes: use other tables by prefix=",
    "3F000": "make the schema first, or name another one by schema=",
    "3D000": "make the database first",
    "42501": "the user must be granted what ddl() of the {what} tells of, on its tables, schema and sequence",
    "25006": "give a connection that may write, to the primary server",
    "25P02": "a statement of this transaction has failed before: roll back",
    "53300": "the server has no connection left; give it more, or a pool in front of it",
    "53200": "the server has no memory or no locks left: lock fewer keys at a time, or raise max_locks_per_transaction",
    "53100": "make room on the server's disk",
    "57014": "a statement took too long, or was cancelled",
    "55P03": "another session has held a lock for long; transactions should be short",
    # A statement that was prepared, of which another session knows nothing or knows another one.
    "42P05": _OF_A_POOL,
    "26000": _OF_A_POOL,
    "40": "roll the transaction back, and do it again",
    "28": "look at the user and the password of {given}",
}


# What a server says that refuses a connection for want of room, in English: libpq tells no code of it. In other
# languages it is a connection that was not made.
_NO_ROOM = re.compile(
    "sorry, too many clients already|remaining connection slots are reserved|too many connections for (role|database) "
)


class PostgresNames(Tables):
    """Tables in PostgreSQL, by their quoted names.

    Args:
        names: Of the tables but the first.
        indexes: Of the indexes.

    Attributes:
        now_ms: The database's clock, in milliseconds since 1970: asked once for each statement, so that an index may be
            used.
        bare: The names without schema and quotes.
        given: What was given to find the database by, for messages.
    """

    given = "conninfo"
    now_ms = "(SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint)"

    def __init__(
        self, schema: str, prefix: str, names: Sequence[str], indexes: Sequence[str], values: dict[str, str]
    ) -> None:
        for name, value in (("schema", schema), ("prefix", prefix)):
            if not isinstance(value, str) or not value or "\0" in value or not _is_utf_8(value):
                raise ConfigError(f"{name} must be the text of a name, without NUL characters, not {shown(value)}")
        bare = {name: f"{prefix}{self.what}_{name}" for name in (*names, *indexes)}
        bare[self.what] = f"{prefix}{self.what}"
        for what, of in (("schema", schema), ("prefix", max(bare.values(), key=len))):
            length = len(of.encode())
            if length > _LONGEST_NAME:
                value = schema if what == "schema" else prefix
                raise ConfigError(
                    f"{what}={shown(value)} makes names of {length} bytes, and PostgreSQL allows {_LONGEST_NAME}"
                )
        quoted = {name: f"{_quoted(schema)}.{_quoted(bare[name])}" for name in (self.what, *names)}
        # An index is in the schema of its table.
        super().__init__({**quoted, **{name: _quoted(bare[name]) for name in indexes}}, values)
        self.schema = schema
        self.bare = bare

    def ddl(self) -> str:
        """The statements that make what is missing."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return printable(self.names[self.what])

    def as_error(self, error: BaseException) -> KbatchError:
        """What to do about an error of a driver, of any."""
        cause = getattr(error, "orig", None) or error  # SQLAlchemy wraps it
        code = getattr(cause, "sqlstate", None) or ""
        text = exception_text(cause).split("\\n")[0]  # the lines after it show the statement
        hint = _HINTS.get(code) or _HINTS.get(code[:2])
        if "is closed" in text:
            hint = "give a connection that is open"
        elif _is_timeout(cause):
            hint = _HINTS["57014"]
        elif not code and _NO_ROOM.search(text) and is_lost(cause):
            hint = _HINTS["53300"]
        elif hint is None and (code.startswith(("08", "57P")) if code else is_lost(cause)):
            hint = "the connection is lost, or was not made: is the server there, and is {given} right?"
        hint = hint.format(what=self.what, given=self.given) if hint else None
        return self._made(cause, f"the {self.what} {self!r}: {text}" + (f"; {hint}" if hint else ""))

    def as_outage(self, error: Exception) -> KbatchError:
        """That the user's function has made no connection, for whatever reason, and may make one later."""
        if any(kind.__module__.partition(".")[0] == "psycopg" for kind in type(error).__mro__):
            return self._outage(str(self.as_error(error)))
        return self._outage(f"the {self.what} {self!r}: connect has failed: {named_exception_text(error)}")

    def _outage(self, text: str) -> KbatchError:
        return self.error(text)

    def _made(self, error: BaseException, text: str) -> KbatchError:
        return self.error(text)

    def lacks_meta(self) -> KbatchError:
        """What to do about tables without their one line."""
        return self.error(f"the {self.what} {self!r} has no line in its table meta: call create()")


class PostgresDatabase:
    """What an outbox and an inbox know of their database.

    Attributes:
        _added: What an application adds, for messages.
    """

    _tables: PostgresNames
    _added: str
    _shown: str

    def _set_database(self, conninfo: str | None, connect: Callable[[], psycopg.Connection[Any]] | None) -> None:
        self._conninfo: str | None = None
        self._connect = connect
        if (conninfo is None) == (connect is None):
            raise ConfigError("give either conninfo or connect, which makes connections")
        if connect is None:
            self._set_conninfo(conninfo)
            return
        fault = call_fault(connect)
        if fault is not None and callable(connect):  # not its signature: that of a partial shows a password
            fault = f"must take no arguments, which {callback_name(connect)} does not"
        owned = None if fault else loops_own(connect)
        if owned is not None:
            fault = f"must not be {owned}: connections of kbatch's own are used on threads"
        if fault is not None:
            raise ConfigError(f"connect {fault}")
        self._tables.given = "connect"

    def _set_conninfo(self, conninfo: str | None) -> None:
        if not isinstance(conninfo, str) or "\0" in conninfo:
            what = type_name(conninfo) if not isinstance(conninfo, str) else "one with a NUL character"
            raise ConfigError(f'conninfo must be a text, as "postgresql://user@host/database", not {what}')
        _check_url(conninfo)
        self._conninfo = conninfo

    def __repr__(self) -> str:
        return f"<{self._shown} {self._tables!r}>"

    # -- with a connection of its own

    def _meta(self) -> str:
        return self._tables.sql(f"SELECT {', '.join(self._tables.meta)} FROM {{meta}} WHERE one = 1")

    @contextlib.contextmanager
    def _checked_connection(self) -> Iterator[OwnConnection]:
        """It stays open unless this ends by an exception."""
        with self._connection(keep=True) as connection:
            self._check_tables(connection)
            yield connection

    def _create(self) -> None:
        with self._connection() as connection:
            if self._lacks_any(connection):
                self._make(connection)
            self._check_tables(connection)

    def _make(self, connection: OwnConnection) -> None:
        from kbatch._database._postgres_connection import writing

        run = connection.execute
        with writing(connection):
            # Of two who make them at the same time the second one would fail.
            name = self._tables.names[self._tables.what]
            run("SELECT pg_advisory_xact_lock(hashtext('kbatch'), hashtext(%s))", (name,))
            if self._lacks_any(connection):
                run("SET LOCAL lock_timeout = '10s'")
                self._refuse_other_tables(connection)
                run(self._tables.ddl().encode())
                self._check_tables(connection)

    def _lacks_any(self, connection: psycopg.Connection[Any]) -> bool:
        # So that it waits for no lock, and may be on a standby, when nothing is to be made.
        tables = self._tables
        statement = (
            "SELECT count(*) FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
            "WHERE nspname = %s AND relname = ANY(%s)"
        )
        row = connection.execute(statement, (tables.schema, list(tables.bare.values()))).fetchone()
        assert row is not None
        return bool(row[0] < len(tables.bare))

    def _refuse_other_tables(self, connection: psycopg.Connection[Any]) -> None:
        name = self._tables.names["meta"]
        row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone()
        assert row is not None
        if row[0]:
            found = connection.execute(self._meta().encode()).fetchone()
            if found is not None:
                self._tables.check_meta(*found)

    def _check_tables(self, connection: psycopg.Connection[Any]) -> None:
        from kbatch._database._postgres_connection import run_raw

        self._check_look(next(iter(run_raw(connection, self._meta())), None))

    def _check_look(self, found: Any) -> None:
        if found is None:
            raise self._tables.lacks_meta()
        self._tables.check_meta(*(found[at] for at in range(len(self._tables.meta))))

    @contextlib.contextmanager
    def _connection(self, *, keep: bool = False) -> Iterator[OwnConnection]:
        try:
            import psycopg

            from kbatch._database._postgres_connection import connect, not_begun, taken_over
        except ImportError as error:
            raise self._tables.error(
                f"the {self._tables.what} {self._tables!r} needs psycopg for a connection of its own: pip install "
                f"'kbatch-kafka[postgres]' ({error})"
            ) from error
        connection = None
        try:
            if self._connect is None:
                assert self._conninfo is not None
                connection = connect(self._conninfo, self._tables.error)
            else:
                connection = taken_over(self._made_by_user(self._connect), self._tables.error)
            yield connection
        except BaseException as error:
            told = error
            if connection is not None:
                if isinstance(error, psycopg.Error):
                    told = not_begun(connection, error)
                connection.close()
            if isinstance(error, psycopg.Error):
                raise self._tables.as_error(told) from error
            raise
        if not keep:
            connection.close()

    def _made_by_user(self, connect: Callable[[], object]) -> object:
        try:
            return connect()
        except Exception as error:
            raise self._tables.as_outage(error) from error

    # -- with a connection of the application

    def _driver(self, connection: Any) -> psycopg.Connection[Any]:
        module = sys.modules.get("psycopg")
        driver = connection
        if module is None or not isinstance(driver, module.Connection):
            driver = driver_of(connection, self._tables.as_error)
            module = sys.modules.get("psycopg")
        if module is not None and isinstance(driver, module.Connection):
            return cast("psycopg.Connection[Any]", driver)
        raise not_taken(connection, driver, "a psycopg.Connection, or SQLAlchemy's Connection or Session over psycopg")

    def _check_psycopg(self, connection: Any) -> None:
        pgconn = connection.pgconn
        if pgconn.transaction_status == _IN_TRANSACTION and pgconn.pipeline_status == _NO_PIPELINE:
            return  # as at most times: what follows is slower
        from psycopg.pq import PipelineStatus, TransactionStatus

        status = connection.info.transaction_status
        error = self._tables.error
        if connection.closed or status is TransactionStatus.UNKNOWN:
            raise error("the connection is closed: give one that is open")
        if status is TransactionStatus.INERROR:
            raise error("a statement of the connection's transaction has failed before: roll back")
        if status is TransactionStatus.ACTIVE:
            raise error("the connection is in the middle of another statement: wait for its end")
        if status is TransactionStatus.IDLE and connection.autocommit:
            raise error(
                f"the connection is in no transaction, so that the {self._added} would not be committed together with "
                "the data: add them within its `with connection.transaction():`"
            )
        if pgconn.pipeline_status != PipelineStatus.OFF:
            raise error("the connection is in pipeline mode, which tells of errors later: add outside of it")


class AioPostgresDatabase(PostgresDatabase):
    """The same for connections of asyncio."""

    async def _driver_aio(self, connection: Any) -> Any:
        driver = await driver_of_aio(connection, self._tables.as_error, _begins_late)
        psycopg = sys.modules.get("psycopg")
        if is_asyncpg(driver) or (psycopg is not None and isinstance(driver, psycopg.AsyncConnection)):
            return driver
        raise not_taken(
            connection,
            driver,
            "one of psycopg.AsyncConnection, asyncpg.Connection, or SQLAlchemy's AsyncConnection or AsyncSession over "
            "them",
        )

    def _check_aio(self, driver: Any) -> None:
        if not is_asyncpg(driver):
            self._check_psycopg(driver)
            return
        if driver.is_closed():
            raise self._tables.error("the connection is closed: give one that is open")
        if not driver.is_in_transaction():
            raise self._tables.error(
                f"the connection is in no transaction, so that the {self._added} would not be committed together with "
                "the data: add them within its `async with connection.transaction():`"
            )


def is_lost(error: BaseException) -> bool:
    """Whether an error of a driver without a code of PostgreSQL is about the connection; others are about what was done
    with it, as when two tasks use it at the same time."""
    if isinstance(error, OSError):
        return not _is_timeout(error)
    kinds = (kind.__name__ for kind in type(error).__mro__)
    return "OperationalError" in kinds or "is closed" in exception_text(error)  # of psycopg and SQLAlchemy; of asyncpg


def _is_timeout(error: BaseException) -> bool:
    """Of asyncpg's ``command_timeout``; what the system calls so has a number."""
    return isinstance(error, TimeoutError) and error.errno is None


def is_asyncpg(driver: object) -> bool:
    """Whether a driver's connection is one of asyncpg, or of its pool."""
    asyncpg = sys.modules.get("asyncpg")
    return asyncpg is not None and isinstance(driver, (asyncpg.Connection, asyncpg.pool.PoolConnectionProxy))


def _begins_late(driver: Any) -> bool:
    return is_asyncpg(driver) and not driver.is_in_transaction()


def _check_url(conninfo: str) -> None:
    """Raises ConfigError for a URL of which libpq would take a part of the password for a host or a database, which
    its errors show."""
    scheme, separator, rest = conninfo.partition("://")
    if separator and scheme in ("postgresql", "postgres"):
        place = re.sub("^[^/@]*@", "", rest).partition("?")[0]
        if "@" in place:
            raise ConfigError(
                "conninfo has an @ where a host or a database is: in a URL, special characters of a user's name or "
                "password are written as %XX: @ is %40, / is %2F"
            )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
