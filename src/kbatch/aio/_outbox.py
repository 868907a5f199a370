"""What the outboxes for asyncio have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._loop import in_thread
from kbatch._outbox._base import BaseOutbox
from kbatch.aio._dead_letters import DeadLetters
from kbatch.aio._scheduled import ScheduledMessages

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbatch._outbox._base import OutboxStatus

__all__ = ["AwaitableOutbox"]

_THREAD = "kbatch-outbox"


class AwaitableOutbox(BaseOutbox):
    """An outbox for asyncio, over what its database has."""

    _create: Callable[[], None]
    _status: Callable[[int], OutboxStatus]

    async def create(self) -> None:
        """As `kbatch.SqliteOutbox.create`, or `kbatch.PostgresOutbox.create` with psycopg, on a thread."""
        await in_thread(_THREAD, self._create)

    async def status(self, *, count_up_to: int = 100_000) -> OutboxStatus:
        """As `kbatch.SqliteOutbox.status`, or `kbatch.PostgresOutbox.status` with psycopg, on a thread."""
        return await in_thread(_THREAD, lambda: self._status(count_up_to))

    @property
    def dead_letters(self) -> DeadLetters:
        """As `kbatch.SqliteOutbox.dead_letters` and `kbatch.PostgresOutbox.dead_letters`, with methods to await."""
        return DeadLetters(self._dead_letters())

    @property
    def scheduled(self) -> ScheduledMessages:
        """As `kbatch.SqliteOutbox.scheduled` and `kbatch.PostgresOutbox.scheduled`, with methods to await."""
        return ScheduledMessages(self._scheduled())
