"""Which buckets a relay has, and until when. No threads, no clock, no database: each call says what time it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from kbatch._outbox._store import Lease

__all__ = ["Leases", "Times"]


class Times(NamedTuple):
    """The same moment by two clocks, in seconds. The monotonic one stands still while a machine is suspended, and the
    other may be set back."""

    monotonic: float
    wall: float


class Leases:
    """The buckets that a relay has. All leases are renewed together, so they end together.

    Attributes:
        tokens: Of each bucket the token of its lease.
        leaving: Buckets above the relay's share: nothing more is read of them, and they go when nothing is in flight.
    """

    def __init__(self, lease_s: float) -> None:
        self.tokens: dict[int, int] = {}
        self.leaving: set[int] = set()
        self._lease_s = lease_s
        self._asked = Times(0.0, 0.0)

    def left_s(self, now: Times) -> float:
        """Seconds for which the leases certainly hold; 0.0 or less without any."""
        if not self.tokens:
            return 0.0
        return self._lease_s - max(now.monotonic - self._asked.monotonic, abs(now.wall - self._asked.wall))

    def renewed(self, asked: Times, leases: Collection[Lease], share: int) -> set[int]:
        """Learns what a renewal gave that was asked for at a time.

        Returns:
            The buckets that were lost since then, also those that were lost and taken again.
        """
        now = dict(leases)
        lost = {bucket for bucket, token in self.tokens.items() if now.get(bucket) != token}
        self.tokens = now
        self._asked = asked
        self.leaving &= set(self.tokens)
        surplus = len(self.tokens) - len(self.leaving) - share
        if surplus > 0:
            # Not those that are idle: the other relay is to have its share of the work.
            self.leaving.update(sorted(set(self.tokens) - self.leaving)[-surplus:])
        elif surplus < 0:
            for bucket in sorted(self.leaving)[:-surplus]:
                self.leaving.discard(bucket)
        return lost

    def tokens_of(self, buckets: Collection[int]) -> dict[int, int]:
        """The tokens of these buckets; 0, which no lease has, for those that it has lost."""
        return {bucket: self.tokens.get(bucket, 0) for bucket in buckets}

    def to_read(self) -> list[int]:
        """The buckets whose rows may be sent."""
        return [bucket for bucket in self.tokens if bucket not in self.leaving]

    def drop(self, buckets: Collection[int]) -> None:
        """These buckets are not its own any more."""
        for bucket in buckets:
            self.tokens.pop(bucket, None)
            self.leaving.discard(bucket)

    def forget(self) -> set[int]:
        """Gives all buckets up for lost."""
        lost = set(self.tokens)
        self.tokens = {}
        self.leaving = set()
        return lost
