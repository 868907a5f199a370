"""The messages of an outbox that wait."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from kbatch._errors import ConfigError, type_name
from kbatch._outbox._kept import Keeper, KeptMessage, OutboxQuery, milliseconds, moment

if TYPE_CHECKING:
    from kbatch._outbox._store import OutboxAdmin, Place

__all__ = ["ScheduledCount", "ScheduledMessage", "ScheduledMessages"]


@dataclass(frozen=True)
class ScheduledMessage(KeptMessage):
    """A message that waits, for its next attempt or for its time.

    Attributes:
        due_at: When it is sent.
    """

    due_at: datetime


class ScheduledCount(NamedTuple):
    """How many messages that wait are alike.

    Attributes:
        topic, message_type, error: What is the same. The error is empty of those that no broker has refused.
        messages: How many there are.
    """

    topic: str | None
    message_type: str | None
    error: str
    messages: int


class ScheduledMessages:
    """The messages of an outbox that wait, for their next attempt or for their time: `SqliteOutbox.scheduled`,
    `PostgresOutbox.scheduled`.

    What a method changes it changes in one transaction, and relays may be at work. What a relay has on its way when it
    is cancelled or scheduled anew may be sent nevertheless, once at most: it is not waited for.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def find(
        self, query: OutboxQuery | None = None, *, limit: int | None = 100, after: ScheduledMessage | None = None
    ) -> list[ScheduledMessage]:
        """Messages that wait, those first that are due first.

        Args:
            query: Which of them; all by default.
            limit: How many at most; ``None`` for all.
            after: The last one of the page before.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer.
        """
        found = self._keeper.page(query, limit, after)
        return [ScheduledMessage(**seen.values, due_at=moment(seen.row.at_ms * 1000)) for seen in found]

    def summary(self, query: OutboxQuery | None = None) -> list[ScheduledCount]:
        """How many there are of each topic, message type and error, the most first.

        Raises:
            OutboxError: As for `find`.
        """
        return [ScheduledCount(*counted) for counted in self._keeper.counts(query)]

    def cancel(self, query: OutboxQuery) -> int:
        """Deletes messages for good. Later ones of their keys that wait behind them go on.

        Returns:
            How many there were.

        Raises:
            OutboxError: As for `find`. Then nothing was changed, unless it is ``possibly_persisted``.
        """
        return self._keeper.change(query, lambda store, places: store.delete("later", places))

    def reschedule(self, query: OutboxQuery, due_at: datetime) -> int:
        """Has messages sent at another time, by the database's clock.

        That of a message that waits for its next attempt should not be further ahead than the longest back-off of
        relays: they take it for one of before the clock was set back, and send at once.

        Args:
            due_at: With a time zone.

        Returns:
            How many there were.

        Raises:
            ConfigError: `due_at` has no time zone.
            OutboxError: As for `find`. Then nothing was changed, unless it is ``possibly_persisted``.
        """
        if not isinstance(due_at, datetime):
            raise ConfigError(f"due_at must be a datetime, not {type_name(due_at)}")
        if due_at.tzinfo is None:
            raise ConfigError(f"due_at must have a time zone: {due_at.isoformat()}")
        due_at_ms = milliseconds(due_at)

        def change(store: OutboxAdmin, places: list[Place]) -> int:
            return store.reschedule(places, due_at_ms)

        return self._keeper.change(query, change)
