"""The messages of an outbox that were given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kbatch._errors import OutboxError, type_name
from kbatch._fastmap import Envelope, wall_time
from kbatch._outbox._kept import Keeper, KeptMessage, OutboxQuery, moment
from kbatch._recovery._deaths import Deaths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from kbatch._outbox._store import NewRow
    from kbatch._recovery._user_calls import UserCalls

__all__ = ["DeadLetter", "DeadLetterCount", "DeadLetters", "deaths_of"]


@dataclass(frozen=True)
class DeadLetter(KeptMessage):
    """A message that was given up: it can never be accepted, or was refused too often.

    Attributes:
        died_at: When it was given up.
    """

    died_at: datetime


class DeadLetterCount(NamedTuple):
    """How many dead letters are alike.

    Attributes:
        topic, message_type, error: What is the same.
        letters: How many there are.
    """

    topic: str | None
    message_type: str | None
    error: str
    letters: int


class DeadLetters:
    """The dead letters of an outbox: `SqliteOutbox.dead_letters`, `PostgresOutbox.dead_letters`.

    What a method changes it changes in one transaction, and relays may be at work.
    """

    def __init__(self, keeper: Keeper, map_row: Callable[[Envelope[Any], int, int], NewRow]) -> None:
        self._keeper = keeper
        self._map_row = map_row

    def find(
        self, query: OutboxQuery | None = None, *, limit: int | None = 100, after: DeadLetter | None = None
    ) -> list[DeadLetter]:
        """Dead letters, those first that died first.

        Args:
            query: Which of them; all by default.
            limit: How many at most; ``None`` for all.
            after: The last one of the page before.

        Raises:
            OutboxError: The tables are missing or another version's; the database does not answer.
        """
        found = self._keeper.page(query, limit, after)
        return [DeadLetter(**seen.values, died_at=moment(seen.row.at_ms * 1000)) for seen in found]

    def summary(self, query: OutboxQuery | None = None) -> list[DeadLetterCount]:
        """How many there are of each topic, message type and error, the most first.

        Raises:
            OutboxError: As for `find`.
        """
        return [DeadLetterCount(*counted) for counted in self._keeper.counts(query)]

    def replay(self, query: OutboxQuery) -> int:
        """Has relays send messages again, as if they had never been sent.

        They go back to their old places. Of each key they are sent in the order in which they were added, and before
        all later ones of their key that no relay had handed over yet. A message that has expired by its ``deliver_by``
        stays a dead letter.

        Returns:
            How many will be sent.

        Raises:
            OutboxError: As for `find`. Then nothing was changed, unless it is ``possibly_persisted``.
        """
        return self._keeper.change(query, lambda store, places: store.replay(places, int(wall_time() * 1e6)))

    def replay_edited(self, number: int, envelope: Envelope[Any]) -> None:
        """Has an envelope sent in place of a dead letter, which is gone then: ``letter.envelope.replace(…)``, or a new
        one. It takes the old place, as by `replay`, also under another key.

        Args:
            number: The dead letter's.
            envelope: It is mapped as by the outbox's ``add``, and must have a topic.

        Raises:
            SerializationError: It could not be mapped, or is too large.
            NotYetDueError: Its ``scheduled_time`` is in the future.
            OutboxError: As for `find`; or the dead letter is not there, or `envelope` has expired. Then nothing was
                changed, unless it is ``possibly_persisted``.
        """
        if not isinstance(envelope, Envelope):
            raise TypeError(f"envelope must be a kbatch.Envelope, not {type_name(envelope)}")
        with self._keeper.open() as store:
            for row in store.look_up("dead", OutboxQuery(numbers=[number]).numbers or ()):
                created_at = row.created_at if isinstance(row.created_at, int) else int(wall_time() * 1e6)
                if store.replace((row.bucket, row.seq), self._map_row(envelope, number, created_at)):
                    return
        raise OutboxError(f"there is no dead letter {number}")

    def discard(self, query: OutboxQuery) -> int:
        """Deletes dead letters for good.

        Returns:
            How many there were.

        Raises:
            OutboxError: As for `find`. Then nothing was changed, unless it is ``possibly_persisted``.
        """
        return self._keeper.change(query, lambda store, places: store.delete("dead", places))


def deaths_of(
    letters: DeadLetters, calls: UserCalls, on_dead: Callable[[DeadLetter], object], name: str
) -> Deaths[int]:
    """What tells `on_dead` of the rows of these numbers."""

    def look_up(numbers: list[int]) -> Iterator[tuple[str, tuple[DeadLetter]]]:
        for letter in letters.find(OutboxQuery(numbers=numbers), limit=None):
            yield f"dead letter {letter.number}", (letter,)

    return Deaths(calls, on_dead, look_up, name)
