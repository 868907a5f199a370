"""The messages of an outbox that wait, for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._loop import in_thread

if TYPE_CHECKING:
    from datetime import datetime

    import kbatch

__all__ = ["ScheduledMessages"]

_THREAD = "kbatch-outbox"


class ScheduledMessages:
    """The messages of an outbox that wait, for their next attempt or for their time: `SqliteOutbox.scheduled`,
    `PostgresOutbox.scheduled`.

    Each method does what that of `kbatch.ScheduledMessages` does, on a thread, which goes on if the task is cancelled.
    """

    def __init__(self, messages: kbatch.ScheduledMessages) -> None:
        self._messages = messages

    async def find(
        self,
        query: kbatch.OutboxQuery | None = None,
        *,
        limit: int | None = 100,
        after: kbatch.ScheduledMessage | None = None,
    ) -> list[kbatch.ScheduledMessage]:
        """As `kbatch.ScheduledMessages.find`."""
        return await in_thread(_THREAD, lambda: self._messages.find(query, limit=limit, after=after))

    async def summary(self, query: kbatch.OutboxQuery | None = None) -> list[kbatch.ScheduledCount]:
        """As `kbatch.ScheduledMessages.summary`."""
        return await in_thread(_THREAD, lambda: self._messages.summary(query))

    async def cancel(self, query: kbatch.OutboxQuery) -> int:
        """As `kbatch.ScheduledMessages.cancel`."""
        return await in_thread(_THREAD, lambda: self._messages.cancel(query))

    async def reschedule(self, query: kbatch.OutboxQuery, due_at: datetime) -> int:
        """As `kbatch.ScheduledMessages.reschedule`."""
        return await in_thread(_THREAD, lambda: self._messages.reschedule(query, due_at))
