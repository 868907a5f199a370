"""What the inboxes for asyncio have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._inbox._base import BaseInbox
from kbatch._loop import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from kbatch._inbox._base import InboxStatus

__all__ = ["AwaitableInbox"]

_THREAD = "kbatch-inbox"


class AwaitableInbox(BaseInbox):
    """An inbox for asyncio, over what its database has."""

    _create: Callable[[], None]
    _status: Callable[[int], InboxStatus]

    async def create(self) -> None:
        """As `kbatch.SqliteInbox.create`, or `kbatch.PostgresInbox.create` with psycopg, on a thread."""
        await in_thread(_THREAD, self._create)

    async def status(self, *, count_up_to: int = 100_000) -> InboxStatus:
        """As `kbatch.SqliteInbox.status`, or `kbatch.PostgresInbox.status` with psycopg, on a thread."""
        return await in_thread(_THREAD, lambda: self._status(count_up_to))

    async def purge(self, older_than_s: float | None = None, *, committed: Mapping[str, datetime] | None = None) -> int:
        """As `kbatch.SqliteInbox.purge`, or `kbatch.PostgresInbox.purge` with psycopg, on a thread."""
        return await in_thread(_THREAD, lambda: self._purge(older_than_s, committed))
