"""What of each bucket is to be read next. No threads, no clock, no database."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from kbatch._outbox._store import HeldKey, Place, StoredRow

__all__ = ["Positions"]


class _Position:
    __slots__ = ("floor", "held", "highest")

    def __init__(self) -> None:
        self.floor = 0  # what is read next lies above
        self.highest = 0  # what lies above was never read
        self.held: dict[int, int | None] = {}  # by the number of a key that is held back, its lowest row that was read


class Positions:
    """Of each bucket its floor, and the keys whose rows are held back.

    Args:
        key_of: The number of the key of packed bytes; ``None`` without a key.
    """

    def __init__(self, key_of: Callable[[bytes], int | None]) -> None:
        self._key_of = key_of
        self._of: dict[int, _Position] = {}
        self._first = 0

    def begin(self, buckets: Iterable[int], held: Iterable[HeldKey]) -> None:
        """Reads these buckets from their beginning."""
        for bucket in buckets:
            self._of[bucket] = _Position()
        self.hold_all(held)

    def hold_all(self, held: Iterable[HeldKey]) -> None:
        """Holds back rows of these keys."""
        for bucket, key_hash in held:
            self.hold(bucket, key_hash)

    def knows(self, bucket: int) -> bool:
        """Whether a bucket was begun."""
        return bucket in self._of

    def end(self, buckets: Iterable[int]) -> None:
        """Forgets buckets."""
        for bucket in buckets:
            self._of.pop(bucket, None)

    def floors(self, buckets: Collection[int]) -> dict[int, int]:
        """The floors of buckets, beginning with another one each time, so that none waits behind a full one."""
        known = [bucket for bucket in buckets if bucket in self._of]
        if not known:
            return {}
        self._first = (self._first + 1) % len(known)
        return {bucket: self._of[bucket].floor for bucket in known[self._first :] + known[: self._first]}

    def taken(
        self, rows: list[StoredRow], floors: Mapping[int, int], in_flight: Callable[[], Collection[Place]]
    ) -> list[StoredRow]:
        """Learns what was read. The rows that are to be sent: those of no key that is held, and not in flight."""
        if any(self._of[bucket].held or self._of[bucket].floor < self._of[bucket].highest for bucket in floors):
            rows = self._filtered(rows, in_flight)
        for bucket, floor in floors.items():
            position = self._of[bucket]
            position.floor = floor
            position.highest = max(position.highest, floor)
        return rows

    def _filtered(self, rows: list[StoredRow], in_flight: Callable[[], Collection[Place]]) -> list[StoredRow]:
        kept: list[StoredRow] = []
        known: Collection[Place] | None = None
        for row in rows:
            bucket, seq, packed, _ = row
            position = self._of[bucket]
            if seq <= position.highest:
                known = in_flight() if known is None else known
                if (bucket, seq) in known:
                    continue
            if position.held:
                key_hash = self._key_hash(packed)
                if key_hash is not None and key_hash in position.held:
                    lowest = position.held[key_hash]
                    position.held[key_hash] = seq if lowest is None else min(lowest, seq)
                    continue
            kept.append(row)
        return kept

    def _key_hash(self, packed: bytes) -> int | None:
        try:
            return self._key_of(packed)
        except (TypeError, ValueError):  # damaged: whoever sends it learns so
            return None

    def put_back(self, places: Iterable[Place]) -> None:
        """Rows are to be read again."""
        for bucket, seq in places:
            position = self._of.get(bucket)
            if position is not None:
                position.floor = min(position.floor, seq - 1)

    def start_again(self) -> None:
        """All rows are to be looked at again."""
        for position in self._of.values():
            position.floor = 0

    def hold(self, bucket: int, key_hash: int | None) -> None:
        """Rows of a key wait behind one of it."""
        position = self._of.get(bucket)
        if position is not None and key_hash is not None:
            position.held.setdefault(key_hash, None)

    def let_go(self, still_held: Collection[HeldKey]) -> None:
        """Rows of all other keys go on."""
        held = set(still_held)
        for bucket, position in self._of.items():
            for key_hash in [key for key in position.held if (bucket, key) not in held]:
                lowest = position.held.pop(key_hash)
                if lowest is not None:
                    position.floor = min(position.floor, lowest - 1)

    def has_held(self) -> bool:
        """Whether rows of any key are held back."""
        return any(position.held for position in self._of.values())
