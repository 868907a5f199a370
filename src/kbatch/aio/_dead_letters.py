"""The dead letters of an outbox, for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._loop import in_thread

if TYPE_CHECKING:
    import kbatch

__all__ = ["DeadLetters"]

_THREAD = "kbatch-outbox"


class DeadLetters:
    """The dead letters of an outbox: `SqliteOutbox.dead_letters`, `PostgresOutbox.dead_letters`.

    Each method does what that of `kbatch.DeadLetters` does, on a thread, which goes on if the task is cancelled.
    """

    def __init__(self, letters: kbatch.DeadLetters) -> None:
        self._letters = letters

    async def find(
        self,
        query: kbatch.OutboxQuery | None = None,
        *,
        limit: int | None = 100,
        after: kbatch.DeadLetter | None = None,
    ) -> list[kbatch.DeadLetter]:
        """As `kbatch.DeadLetters.find`."""
        return await in_thread(_THREAD, lambda: self._letters.find(query, limit=limit, after=after))

    async def summary(self, query: kbatch.OutboxQuery | None = None) -> list[kbatch.DeadLetterCount]:
        """As `kbatch.DeadLetters.summary`."""
        return await in_thread(_THREAD, lambda: self._letters.summary(query))

    async def replay(self, query: kbatch.OutboxQuery) -> int:
        """As `kbatch.DeadLetters.replay`."""
        return await in_thread(_THREAD, lambda: self._letters.replay(query))

    async def replay_edited(self, number: int, envelope: kbatch.Envelope[Any]) -> None:
        """As `kbatch.DeadLetters.replay_edited`. The envelope is mapped on the thread."""
        await in_thread(_THREAD, lambda: self._letters.replay_edited(number, envelope))

    async def discard(self, query: kbatch.OutboxQuery) -> int:
        """As `kbatch.DeadLetters.discard`."""
        return await in_thread(_THREAD, lambda: self._letters.discard(query))
