"""What is scheduled goes into the hot table when its time has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._fastmap import monotonic
from kbatch._logs import Reminder, tell
from kbatch._outbox._store import RefusedWriteError

if TYPE_CHECKING:
    from kbatch._outbox._leases import Leases
    from kbatch._outbox._store import OutboxStore, Place

__all__ = ["Admission"]

_LOOK_EVERY_S = 0.1
_TRY_AGAIN_S = 0.25
_MOST_ROWS = 2_000


class Admission:
    """Moves what is scheduled and due. A row that the database refuses to move is passed over until the others are
    through, so that it stops none of them.

    Args:
        leases: Of their buckets it moves rows.

    Attributes:
        look_at: When to look next.
    """

    def __init__(self, leases: Leases) -> None:
        self.look_at = 0.0
        self._leases = leases
        self._refused: set[Place] = set()
        self._refusal = Reminder()

    def begin(self) -> None:
        """At the start of a run."""
        self.look_at = monotonic()
        self.forget_refused()
        self._refusal.told_at = None

    def forget_refused(self) -> None:
        """What was refused has its turn again."""
        self._refused.clear()

    def admit(self, store: OutboxStore) -> bool:
        """Moves some. Whether any was due, so that there may be rows to read."""
        now = monotonic()
        buckets = self._leases.to_read()
        places: list[Place] = []
        if buckets:
            places = store.due_scheduled(buckets, avoid=self._refused, limit=_MOST_ROWS)
        self.look_at = now if len(places) == _MOST_ROWS else now + _LOOK_EVERY_S
        is_refused = bool(places) and not self._move(store, places)
        if not places and self._refused:  # all others are through: these have their turn again
            self._refused.clear()
            is_refused = True
        if is_refused:
            self.look_at = now + _TRY_AGAIN_S
        return bool(places)

    def _move(self, store: OutboxStore, places: list[Place]) -> bool:
        """Whether the database takes these rows. The first one that it refuses is found by halves."""
        try:
            store.admit_scheduled(self._leases.tokens_of({bucket for bucket, _ in places}), places)
        except RefusedWriteError as error:
            if self._refusal.tells_now(monotonic()):
                tell("a relay cannot admit what is scheduled, and tries again: %s", error)
            if len(places) == 1:
                self._refused.update(places)
                return False
            half = len(places) // 2
            return self._move(store, places[:half]) and self._move(store, places[half:])
        return True
