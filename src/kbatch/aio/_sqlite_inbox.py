"""The inbox in SQLite for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._database._aiosqlite import AioSqliteDatabase
from kbatch._inbox._base import check_group, id_of
from kbatch._inbox._sqlite import BaseSqliteInbox
from kbatch.aio._inbox import AwaitableInbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    import aiosqlite
    import sqlalchemy.ext.asyncio

    from kbatch._fastmap import Envelope
    from kbatch._inbox._tables import SqliteInboxTables

__all__ = ["SqliteInbox"]


class SqliteInbox(AioSqliteDatabase, BaseSqliteInbox, AwaitableInbox):
    """Knows which ids a consumer group has handled, in tables of the SQLite database that its handlers write.

    Takes what `kbatch.SqliteInbox` takes.
    """

    _shown = "kbatch.aio.SqliteInbox"
    _tables: SqliteInboxTables

    async def accept(
        self,
        connection: aiosqlite.Connection | sqlalchemy.ext.asyncio.AsyncConnection | sqlalchemy.ext.asyncio.AsyncSession,
        envelope: Envelope[Any],
        *,
        group: str,
    ) -> bool:
        """Marks an envelope's id as handled by a group, within the transaction that `connection` is in.

        Takes, returns and raises what `kbatch.SqliteInbox.accept` does, but for the connection: it is one of aiosqlite,
        or a connection or session of SQLAlchemy 2 for asyncio that uses one. If the task is cancelled, the id may be
        marked: roll back.
        """
        return (await self.accept_many(connection, (envelope,), group=group))[0]

    async def accept_many(
        self,
        connection: aiosqlite.Connection | sqlalchemy.ext.asyncio.AsyncConnection | sqlalchemy.ext.asyncio.AsyncSession,
        envelopes: Iterable[Envelope[Any]],
        *,
        group: str,
    ) -> list[bool]:
        """As `accept`, for many: whether each is new. Of those with the same id only the first one may be."""
        check_group(group)
        driver = await self._driver_aio(connection)
        ids = [id_of(envelope) for envelope in envelopes]
        return await self._on_its_thread(driver, lambda connection: self._accept_all(connection, ids, group))
