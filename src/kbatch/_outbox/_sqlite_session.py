"""A connection of kbatch's own to an outbox in SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from kbatch._database._sqlite import is_locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from kbatch._outbox._sqlite_tables import SqliteTables

    Run: TypeAlias = Callable[..., sqlite3.Cursor]

__all__ = ["SqliteSession", "may_be_committed"]


class SqliteSession:
    """Reads, and writes in transactions. What SQLite raises becomes an `OutboxError`.

    `BEGIN IMMEDIATE` takes SQLite's one lock for writing at once: a transaction that begins with reading and then
    writes would be refused.

    Args:
        connection: In autocommit mode. It is the session's from now on.
    """

    def __init__(self, connection: sqlite3.Connection, tables: SqliteTables, path: str) -> None:
        self._connection = connection
        self._tables = tables
        self._path = path

    def close(self) -> None:
        """Gives the connection back."""
        self._connection.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Run]:
        try:
            yield self._connection.execute
        except sqlite3.Error as error:
            raise self._tables.as_outbox_error(error, self._path, own=True) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Run]:
        run = self._connection.execute
        is_committing = False
        try:
            try:
                run("BEGIN IMMEDIATE")
                yield run
                is_committing = True
                run("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        run("ROLLBACK")
                raise
        except sqlite3.Error as error:
            told = self._tables.as_outbox_error(error, self._path, own=True)
            told.possibly_persisted = is_committing and may_be_committed(error)
            raise told from error


def may_be_committed(error: sqlite3.Error) -> bool:
    """Whether what COMMIT was to write may be there all the same: what was written when the disk failed may be found at
    the next start of the database. When it is full, what ends a transaction in the log is missing."""
    return not (isinstance(error, sqlite3.IntegrityError) or is_locked(error) or "is full" in str(error))
