"""A SQLite database with tables of kbatch, and connections to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
from typing import TYPE_CHECKING, Any

from kbatch._database._tables import Tables, driver_of
from kbatch._errors import ConfigError, exception_text, shown, type_name
from kbatch._logs import tell
from kbatch._text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kbatch._errors import KbatchError

__all__ = [
    "NOW_MS",
    "SqliteDatabase",
    "SqliteNames",
    "end_if_interrupted",
    "is_locked",
    "lacks_tables",
    "take_back",
    "tell_of_fault",
]

_BUSY_TIMEOUT_S = 5.0
_LONGEST_WAL = 16_000_000  # what the file is cut to when SQLite begins it anew, after a reader had kept it growing
_LONGEST_NAME = 63  # PostgreSQL's, so that a prefix fits everywhere
_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# The database's clock, in milliseconds since 1970.
NOW_MS = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"

_told_of_fault = False


class SqliteNames(Tables):
    """Tables in SQLite, by their quoted names.

    Args:
        names: Of the tables but the first, and of indexes.
        indexed: Those of them that have indexes, beside which a name has no schema: ``{later_bare}``.
    """

    def __init__(self, prefix: str, names: Sequence[str], indexed: Sequence[str], values: dict[str, str]) -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ConfigError(f"prefix must begin a table's name, of a-z A-Z 0-9 and _ only, not {shown(prefix)}")
        if prefix.lower().startswith("sqlite_"):
            raise ConfigError(f"prefix={shown(prefix)} makes names that SQLite keeps for itself")
        bare = {self.what: f"{prefix}{self.what}", **{name: f"{prefix}{self.what}_{name}" for name in names}}
        longest = max(map(len, bare.values()))
        if longest > _LONGEST_NAME:
            raise ConfigError(
                f"prefix={shown(prefix)} makes names of {longest} characters, and {_LONGEST_NAME} are allowed"
            )
        # With the schema, so that a temporary table of the same name is not meant.
        quoted = {name: f'main."{bare[name]}"' for name in bare}
        quoted.update({f"{name}_bare": f'"{bare[name]}"' for name in indexed})
        super().__init__(quoted, values)

    def ddl(self) -> str:
        """The statements that make what is missing."""
        raise NotImplementedError

    def as_error(self, error: sqlite3.Error, path: str | os.PathLike[str], *, own: bool = False) -> KbatchError:
        """What to do about an error of SQLite; `own` of a connection that is not the caller's."""
        text = str(error)
        if lacks_tables(error):
            hint = f"call create() of the {self.what} once, or have its ddl() executed"
        elif "not a database" in text or "malformed" in text:
            hint = "give the path of a SQLite database, or of none yet"
        elif "is full" in text:
            hint = "make room on the disk; SQLite may have ended the transaction"
        elif is_locked(error) and own:
            hint = "another connection has written for long; transactions that write should be short"
        elif is_locked(error):
            hint = "another connection writes; wait longer (sqlite3.connect(timeout=…)) and begin with BEGIN IMMEDIATE"
        elif "readonly" in text or "read-only" in text:
            hint = "open the database for writing; the file and its folder must be writable"
        elif "unable to open" in text:
            hint = "the folder must be there and writable"
        elif "thread" in text:
            hint = "use the connection in the thread that made it"
        elif "closed" in text:
            hint = "give a connection that is open"
        else:
            hint = ""
        return self._made(error, f"the {self.what} in {path}: {text}" + (f"; {hint}" if hint else ""), own)

    def _made(self, error: sqlite3.Error, text: str, own: bool) -> KbatchError:
        return self.error(text)

    def lacks_meta(self, path: str) -> KbatchError:
        """What to do about tables without their one line."""
        return self.error(f"the {self.what} in {path} has no line in its table meta: call create()")


class SqliteDatabase:
    """What an outbox and an inbox know of their SQLite file.

    Attributes:
        _added: What an application adds, for messages.
    """

    _tables: SqliteNames
    _added: str
    _shown: str

    def _set_path(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"path must be the path of a database file, not {type_name(path)}")
        name = os.fsdecode(path)
        self._path = os.path.abspath(name)
        if "\0" in name:
            raise ConfigError(f"path must have no NUL character: {printable(name)}")
        if name in ("", ":memory:"):
            raise ConfigError("path must be a file: a database in memory is gone with its process, and so are its rows")
        self._own_files: set[str] = {self._path}  # names by which the database is known to be this one
        # SQL functions are the connection's, and gone with it. One of this name means that its file is this one.
        self._known = f"kbatch_{hashlib.sha256(os.fsencode(self._path)).hexdigest()[:16]}"

    def __repr__(self) -> str:
        return f"<{self._shown} {printable(self._path)}>"

    # -- tables

    def _meta(self) -> str:
        # CAST, since a connection may convert what comes from a column of a type.
        columns = ", ".join(f"CAST({name} AS INTEGER)" for name in self._tables.meta)
        return self._tables.sql(f"SELECT {columns} FROM {{meta}}")

    def ddl(self) -> str:
        """The statements that make the tables, for those who do so themselves. Executed again, they change nothing.

        The database should be in WAL mode, as `create` sets it: else whoever reads stops whoever writes.
        """
        return self._tables.ddl()

    def _create(self) -> None:
        with self._connection(create=True) as connection:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise self._tables.error(
                    f"the {self._tables.what} in {self._path}: SQLite cannot use WAL mode there, and stays in "
                    f"{mode!r}; put the file on a local disk"
                )
            connection.execute("BEGIN IMMEDIATE")
            self._refuse_other_tables(connection)
            for statement in self._tables.ddl().split(";\n")[:-1]:
                connection.execute(statement)
            connection.execute("COMMIT")
            self._check_tables(connection)

    def _refuse_other_tables(self, connection: sqlite3.Connection) -> None:
        try:
            found = connection.execute(self._meta()).fetchone()
        except sqlite3.OperationalError as error:
            if not lacks_tables(error):
                raise
        else:
            if found is not None:
                self._tables.check_meta(*found)

    def _check_tables(self, connection: sqlite3.Connection | sqlite3.Cursor) -> None:
        found = connection.execute(self._meta()).fetchone()
        if found is None:
            raise self._tables.lacks_meta(self._path)
        self._tables.check_meta(*found)

    # -- connections of kbatch's own

    @contextlib.contextmanager
    def _connection(
        self, *, create: bool = False, keep: bool = False, of_many_threads: bool = False
    ) -> Iterator[sqlite3.Connection]:
        connection = None
        try:
            if not create and not os.path.exists(self._path):  # else SQLite would make an empty one
                raise self._tables.error(
                    f"there is no database {self._path}; call create() of the {self._tables.what} once"
                )
            connection = sqlite3.connect(
                self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=not of_many_threads
            )
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA mmap_size=0")
            connection.execute(f"PRAGMA journal_size_limit={_LONGEST_WAL}")
            yield connection
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                raise self._tables.as_error(error, self._path, own=True) from error
            raise
        if not keep:
            connection.close()

    @contextlib.contextmanager
    def _checked_connection(self, *, of_many_threads: bool = False) -> Iterator[sqlite3.Connection]:
        """It stays open unless this ends by an exception."""
        with self._connection(keep=True, of_many_threads=of_many_threads) as connection:
            self._check_tables(connection)
            yield connection

    # -- the application's

    def _as_error(self, error: BaseException) -> KbatchError:
        cause = getattr(error, "orig", None)  # SQLAlchemy wraps it
        if isinstance(cause, sqlite3.Error):
            return self._tables.as_error(cause, self._path)
        return self._tables.error(f"the {self._tables.what} in {self._path}: {exception_text(error)}")

    def _driver(self, connection: Any) -> sqlite3.Connection:
        if not isinstance(connection, sqlite3.Connection):
            connection = driver_of(connection, self._as_error)
            if not isinstance(connection, sqlite3.Connection):
                text = f"connection must be a sqlite3.Connection, not {type_name(connection)}"
                if type(connection).__module__.startswith(("aiosqlite", "sqlalchemy.ext.asyncio")):
                    text += f": {self._shown.replace('kbatch', 'kbatch.aio')} takes one of aiosqlite"
                raise TypeError(text)
        self._check_connection(connection)
        return connection

    def _check_connection(self, connection: sqlite3.Connection) -> None:
        try:
            in_transaction = connection.in_transaction
        except sqlite3.Error as error:
            raise self._tables.as_error(error, self._path) from error
        if not in_transaction:
            raise self._tables.error(
                f"the connection is in no transaction, so that the {self._added} would not be committed together with "
                "the data: add them after the first statement that writes the data, which a session of SQLAlchemy "
                'executes by flush(), or after connection.execute("BEGIN IMMEDIATE")'
            )

    def _check_file_of(self, connection: sqlite3.Connection) -> None:
        cursor = connection.cursor()
        cursor.row_factory = None
        (file,) = cursor.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()
        self._check_file(file)

    def _set_known(self, connection: sqlite3.Connection) -> None:
        """Checks a connection's file, once for each connection: statements with `_if_known` can be prepared then."""
        self._check_file_of(connection)
        connection.create_function(self._known, 0, int)

    def _if_known(self) -> str:
        """A condition that is true, and that SQLite can prepare only after `_set_known`. It costs nothing later."""
        return f"(1 OR {self._known}())"

    def _check_file(self, file: str | None) -> None:
        if file in self._own_files:
            return
        try:
            same = bool(file) and os.path.samefile(file or "", self._path)
        except OSError:
            same = False
        if not same:
            raise self._tables.error(
                f"the connection is to {file or 'a database in memory'}, and the {self._tables.what} is in "
                f"{self._path}: give a connection to that file"
            )
        self._own_files.add(file or "")


def lacks_tables(error: sqlite3.Error) -> bool:
    """Whether a statement failed since a table is not there, or is another one."""
    return any(told in str(error) for told in ("no such table", "no such column", "has no column"))


def is_locked(error: sqlite3.Error) -> bool:
    """Whether a statement failed since another connection reads or writes."""
    return "locked" in str(error) or "busy" in str(error)


def end_if_interrupted(connection: sqlite3.Connection, error: sqlite3.Error) -> None:
    """Ends a transaction whose statement a progress handler has interrupted. SQLite does so by itself, but not when the
    statement was complete: it asks the handler afterwards, too, and what was written stays."""
    if str(error) == "interrupted" and connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):  # of this statement, likewise
            take_back(connection)


def take_back(connection: sqlite3.Connection) -> None:
    """Ends a transaction, of which a half must not be committed."""
    if getattr(connection, "autocommit", None) is True:  # then rollback() does nothing
        connection.execute("ROLLBACK")
    else:
        connection.rollback()


def tell_of_fault(version: str) -> None:
    """Logs, once, that this version of SQLite may damage a database in WAL mode (its WAL-reset fault)."""
    global _told_of_fault
    is_faulty = _numbers("3.7.0") <= _numbers(version) <= _numbers("3.51.2") and version not in ("3.44.6", "3.50.7")
    if _told_of_fault or not is_faulty:
        return
    _told_of_fault = True
    tell(
        "SQLite %s has a fault that may, very rarely, damage a database in WAL mode that several connections "
        "write; 3.51.3 and later are without it, and so are 3.50.7 and 3.44.6",
        version,
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
