"""How DURABLE senders add to an outbox in SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from kbatch._database._sqlite import is_locked
from kbatch._outbox._sqlite_session import may_be_committed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kbatch._fastmap import MappedBatch
    from kbatch._outbox._sqlite_tables import SqliteTables

__all__ = ["SqliteWriter"]

_WAIT_FOR_OTHERS_MS = 100


class SqliteWriter:
    """A connection of its own, whose transactions have nothing but rows of the outbox.

    Args:
        connection: In autocommit mode. It is the writer's from now on.
        insert: Adds batches within the connection's transaction.
        tell: Called after each commit.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        tables: SqliteTables,
        path: str,
        insert: Callable[[sqlite3.Connection, Sequence[MappedBatch]], object],
        tell: Callable[[bool], object],
    ) -> None:
        self._connection = connection
        self._tables = tables
        self._path = path
        self._insert = insert
        self._tell = tell
        connection.execute(f"PRAGMA busy_timeout = {_WAIT_FOR_OTHERS_MS}")

    def commit(self, take: Callable[[], Sequence[MappedBatch]]) -> bool:
        """As `OutboxWriter.commit`."""
        is_committing = False
        try:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not is_locked(error):
                    raise
                return False
            try:
                batches = take()
                if batches:
                    self._insert(self._connection, batches)
                is_committing = True
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            told = self._tables.as_outbox_error(error, self._path, own=True)
            told.possibly_persisted = is_committing and may_be_committed(error)
            raise told from error
        self._tell(True)
        return True

    def close(self) -> None:
        """As `OutboxWriter.close`."""
        self._connection.close()
