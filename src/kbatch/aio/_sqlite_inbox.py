"""The inbox in SQLite for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._database._aiosqlite import AioSqliteDatabase
from kbatch._inbox._base import check_group, id_of
from kbatch._inbox._sqlite import BaseSqliteInbox
from kbatch._loop import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    import aiosqlite
    import sqlalchemy.ext.asyncio

    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import InboxStatus
    from kbatch._inbox._session import InboxSession
    from kbatch._inbox._tables import SqliteInboxTables

__all__ = ["SqliteInbox"]

_THREAD = "kbatch-inbox"


class SqliteInbox(AioSqliteDatabase, BaseSqliteInbox):
    """Knows which ids a consumer group has handled, in tables of the SQLite database that its handlers write.

    Takes what `kbatch.SqliteInbox` takes.
    """

    _shown = "kbatch.aio.SqliteInbox"
    _tables: SqliteInboxTables

    async def create(self) -> None:
        """As `kbatch.SqliteInbox.create`, on a thread."""
        await in_thread(_THREAD, self._create)

    async def status(self, *, count_up_to: int = 100_000) -> InboxStatus:
        """As `kbatch.SqliteInbox.status`, on a thread."""
        return await in_thread(_THREAD, lambda: self._status(count_up_to))

    async def purge(self, older_than_s: float | None = None, *, committed: Mapping[str, datetime] | None = None) -> int:
        """As `kbatch.SqliteInbox.purge`, on a thread."""
        return await in_thread(_THREAD, lambda: self._purge(older_than_s, committed))

    def open_session(self, group: str) -> InboxSession:
        """As `kbatch.SqliteInbox.open_session`: for a `kbatch.Listener`, whose handlers run on threads."""
        return self._open_session(group)

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
