"""A connection of kbatch's own to an outbox in PostgreSQL."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from kbatch._errors import OutboxError
from kbatch._fastmap import monotonic
from kbatch._outbox._postgres_rows import array_text
from kbatch._outbox._store import RefusedWriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from typing import TypeAlias, TypeVar

    from kbatch._outbox._postgres_tables import PostgresTables
    from kbatch._outbox._store import Place, Table

    _T = TypeVar("_T")
    Rows: TypeAlias = list[tuple[Any, ...]]
    Run: TypeAlias = Callable[..., Rows]

__all__ = ["SETTINGS", "PostgresSession", "connect"]

_CONNECT_S = 10
_STATEMENT_S = 20  # the server ends what takes longer
_SILENCE_S = 25  # and this end what has no answer then

# Statements go by the primary key, however wrong the statistics are: a table that was analysed while it was empty, or
# full, has others. The settings end with the transaction, so that a pool between may give the connection to others.
SETTINGS = f"""
SET LOCAL statement_timeout = '{_STATEMENT_S}s'; SET LOCAL lock_timeout = '{_STATEMENT_S // 2}s';
SET LOCAL idle_in_transaction_session_timeout = '{_STATEMENT_S}s'; SET LOCAL synchronous_commit = on;
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off;
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL jit = off;
"""
_BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;{SETTINGS}"
_BEGIN_READING = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;{SETTINGS}"
# What a constraint or a trigger refuses, and a disk that is full.
_REFUSED = ("23", "P0001", "53100")


class _Connection(psycopg.Connection[Any]):
    """One on which no call waits for ever: a server, or what is between, may be silent."""

    def wait(self, gen: Any, *arguments: Any, **keywords: Any) -> Any:
        return super().wait(_until(gen, monotonic() + _SILENCE_S), *arguments, **keywords)


def _until(steps: Generator[Any, Any, _T], end: float) -> Generator[Any, Any, _T]:
    """The same steps, until a time."""
    try:
        state = next(steps)
        while True:
            ready = yield state
            if not ready and monotonic() >= end:
                raise psycopg.OperationalError(f"no answer for {_SILENCE_S} s")
            state = steps.send(ready)
    except StopIteration as stop:
        result: _T = stop.value
        return result


def connect(conninfo: str) -> psycopg.Connection[Any]:
    """A connection in autocommit mode.

    Raises:
        OutboxError: libpq does not understand `conninfo`.
        psycopg.Error: There is none to be had.
    """
    own: dict[str, Any] = {"fallback_application_name": "kbatch", "client_encoding": "utf8"}
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        # Not libpq's text, which shows what it does not understand: it may be a part of a password.
        raise OutboxError(
            "is conninfo right? It is neither a URL, as postgresql://user@host/database, in which special characters "
            "are written as %XX, nor text as host=… dbname=…"
        ) from None
    own.update({name: value for name, value in (("connect_timeout", _CONNECT_S),) if name not in given})
    # Prepared statements would be another session's behind a pool, and their plans might be of an empty table.
    return _Connection.connect(conninfo, autocommit=True, prepare_threshold=None, **own)


class PostgresSession:
    """Reads and writes in transactions. What psycopg raises becomes an `OutboxError`.

    Args:
        connection: In autocommit mode. It is the session's from now on.
    """

    def __init__(self, connection: psycopg.Connection[Any], tables: PostgresTables) -> None:
        self._connection = connection
        self._tables = tables

    def close(self) -> None:
        """Gives the connection back."""
        self._connection.close()

    @contextlib.contextmanager
    def _reading(self, first: str = "") -> Iterator[tuple[Run, Rows]]:
        """One snapshot, which the rows of the statement `first` are of, too."""
        with self._transaction(_BEGIN_READING + first) as begun:
            yield begun

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Run]:
        with self._transaction(_BEGIN) as (run, _):
            yield run

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[tuple[Run, Rows]]:
        with self._errors():
            try:
                yield self._run, self._run(begin)
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with contextlib.suppress(psycopg.Error):
            if not self._connection.closed:
                self._connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            told = self._tables.as_outbox_error(error)
            is_refused = (error.sqlstate or "").startswith(_REFUSED)
            raise (RefusedWriteError(str(told)) if is_refused else told) from error

    def _lock(self, run: Run, table: Table, places: Sequence[Place]) -> None:
        """Takes the locks of rows in the order of their places, in which everybody takes them: so nobody waits for one
        who waits for him."""
        if places:
            # Not ORDER BY, for which all of the table might be walked through: row by row in the order of the arrays.
            run(
                self._tables.sql(
                    "SELECT FROM unnest($1::smallint[], $2::bigint[]) AS place (bucket, seq) CROSS JOIN LATERAL ("
                    f"SELECT FROM {{{table}}} AS kept WHERE kept.bucket = place.bucket AND kept.seq = place.seq "
                    "FOR UPDATE) AS locked"
                ),
                tuple(map(array_text, zip(*sorted(places), strict=True))),
            )

    def _run(self, statement: str, parameters: Sequence[Any] | None = None) -> Rows:
        """The rows of a statement, or of the last one of several without parameters."""
        cursor = psycopg.RawCursor(self._connection)
        cursor.execute(statement.encode(), parameters, binary=parameters is not None)
        while cursor.nextset():
            pass
        return cursor.fetchall() if cursor.description is not None else []
