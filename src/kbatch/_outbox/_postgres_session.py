"""A connection of kbatch's own to an outbox in PostgreSQL."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg

from kbatch._database._postgres_connection import not_begun, run_raw
from kbatch._errors import OutboxError
from kbatch._outbox._postgres_rows import array_text
from kbatch._outbox._store import RefusedWriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeAlias

    from kbatch._outbox._postgres_tables import PostgresTables
    from kbatch._outbox._store import Place, Table

    Rows: TypeAlias = list[tuple[Any, ...]]
    Run: TypeAlias = Callable[..., Rows]

__all__ = ["BEGIN_WRITING", "IDENTITY", "PostgresSession"]

_STATEMENT_S = 20  # the server ends what takes longer

# Statements go by the primary key, however wrong the statistics are: a table that was analysed while it was empty, or
# full, has others. The settings end with the transaction, so that a pool between may give the connection to others.
_SETTINGS = f"""
SET LOCAL statement_timeout = '{_STATEMENT_S}s'; SET LOCAL lock_timeout = '{_STATEMENT_S // 2}s';
SET LOCAL idle_in_transaction_session_timeout = '{_STATEMENT_S}s'; SET LOCAL synchronous_commit = on;
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off;
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL jit = off;
"""
BEGIN_WRITING = f"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;{_SETTINGS}"
_BEGIN_READING = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;{_SETTINGS}"
# The number of a transaction, or of a row, may mean another one, or none, on a server that goes on from elsewhere. A
# standby that was promoted, and a backup that was restored, have another timeline.
IDENTITY = "(SELECT system_identifier FROM pg_control_system())::text || ' ' || "
IDENTITY += "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
# What a constraint or a trigger refuses, and a disk that is full.
_REFUSED = ("23", "P0001", "53100")


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
        with self._transaction(BEGIN_WRITING, writes=True) as (run, _):
            yield run

    @contextlib.contextmanager
    def _transaction(self, begin: str, *, writes: bool = False) -> Iterator[tuple[Run, Rows]]:
        with self._errors():
            is_committing = False
            try:
                yield self._run, self._begun(begin)
                is_committing = writes
                self._connection.execute("COMMIT")
            except BaseException as error:
                is_in_doubt = is_committing and isinstance(error, psycopg.Error) and self._is_in_doubt(error)
                self._roll_back()
                if is_in_doubt:
                    raise self._in_doubt(self._tables.as_outbox_error(error)) from error
                raise

    def _is_in_doubt(self, error: psycopg.Error) -> bool:
        """Whether COMMIT has no answer: else the server has refused it, as a deferred constraint does."""
        return error.sqlstate is None or self._connection.closed

    @staticmethod
    def _in_doubt(error: OutboxError) -> OutboxError:
        told = f"{error}; whether the transaction was committed is not known"
        return OutboxError(told, possibly_persisted=True)

    def _begun(self, begin: str) -> Rows:
        try:
            return self._run(begin)
        except psycopg.Error as error:
            raise not_begun(self._connection, error) from error

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
        return run_raw(self._connection, statement, parameters)
