"""The outbox in SQLite for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._database._aiosqlite import AioSqliteDatabase
from kbatch._outbox._sqlite import BaseSqliteOutbox
from kbatch.aio._outbox import AwaitableOutbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    import aiosqlite
    import sqlalchemy.ext.asyncio

    from kbatch._fastmap import Envelope
    from kbatch._outbox._sqlite_tables import SqliteTables

__all__ = ["SqliteOutbox"]


class SqliteOutbox(AioSqliteDatabase, BaseSqliteOutbox, AwaitableOutbox):
    """Takes envelopes within transactions of the application, in tables of its SQLite database.

    Takes what `kbatch.SqliteOutbox` takes. A `kbatch.aio.Relay` sends them, or a `kbatch.Relay` in a thread or a
    process of its own.
    """

    _shown = "kbatch.aio.SqliteOutbox"
    _tables: SqliteTables

    async def add(
        self,
        connection: aiosqlite.Connection | sqlalchemy.ext.asyncio.AsyncConnection | sqlalchemy.ext.asyncio.AsyncSession,
        envelopes: Iterable[Envelope[Any]],
        *,
        topic: str | None = None,
    ) -> int:
        """Adds envelopes within the transaction that `connection` is in: they are sent if it is committed.

        Takes, returns and raises what `kbatch.SqliteOutbox.add` does, but for the connection: it is one of aiosqlite,
        or a connection or session of SQLAlchemy 2 for asyncio that uses one. The envelopes are mapped at once, without
        a pause for other tasks; all statements are executed on the connection's thread, and none of another task comes
        between them. If the task is cancelled, none of them was added, or all were: roll back.
        """
        driver = await self._driver_aio(connection)
        batch = self._pool.map(self._mapper, topic, envelopes)
        count = await self._on_its_thread(driver, lambda connection: self._add(connection, batch))
        self._tell_watchers()
        return count
