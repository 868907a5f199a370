"""What of each bucket is to be read next. No threads, no clock, no database."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from kbatch._outbox._store import DueRow, HeldKey, Place, Reading, StoredRow

__all__ = ["Floors"]


_ALL = 2**63
_BY_TURNS = 4


class _Held:
    __slots__ = ("behind", "skipped")

    def __init__(self, behind: int) -> None:
        self.behind = behind  # the key's lowest row in `later`: rows above it wait, and rows below it come first
        self.skipped: int | None = None  # the lowest row above it that was read


class _Position:
    __slots__ = ("floor", "flying", "has_ended", "held", "highest", "known")

    def __init__(self) -> None:
        self.floor = 0  # what is read next lies above
        self.has_ended = False  # it was read to its end since it was begun again
        self.highest = 0  # what lies above was never read
        self.known = 0  # up to here no row has to be sent but for those in flight and those of held keys
        self.held: dict[int, _Held] = {}  # by the number of a key
        # With one in flight of each key: the lowest row that was read behind it.
        self.flying: dict[int, int | None] = {}


class Floors:
    """Of each bucket its floor, and the keys whose rows are held back.

    Args:
        key_of: The number of the key of packed bytes; ``None`` without a key.
        one_in_flight: Of each key one row is sent at a time, until it has `landed`.
    """

    def __init__(self, key_of: Callable[[bytes], int | None], *, one_in_flight: bool = False) -> None:
        self._key_of = key_of
        self._one_in_flight = one_in_flight
        self._of: dict[int, _Position] = {}
        self._first = 0
        self._by_turns: list[int] = []

    def begin(self, buckets: Iterable[int], held: Iterable[HeldKey]) -> None:
        """Reads these buckets from their beginning."""
        for bucket in buckets:
            self._of[bucket] = _Position()
        self.hold_all(held)

    def hold_all(self, held: Iterable[HeldKey]) -> None:
        """Holds back rows of these keys."""
        for bucket, key_hash, seq in held:
            self.hold(bucket, key_hash, seq)

    def knows(self, bucket: int) -> bool:
        """Whether a bucket was begun."""
        return bucket in self._of

    def end(self, buckets: Iterable[int]) -> None:
        """Forgets buckets."""
        for bucket in buckets:
            self._of.pop(bucket, None)

    def floors(self, buckets: Collection[int]) -> dict[int, int]:
        """The floors of buckets, in the order in which they are to be read.

        The first few come by turns, so that none waits for long behind full ones. Then come those whose floors are
        lowest: the oldest rows first. So buckets of unlike sizes are read side by side, and what is read and deleted
        together lies on few pages.
        """
        floors = {bucket: self._of[bucket].floor for bucket in buckets if bucket in self._of}
        if not floors:
            return {}
        known = list(floors)
        first, self._first = self._first % len(known), self._first + 1
        self._by_turns = list(itertools.islice(itertools.cycle(known), first, first + min(_BY_TURNS, len(known))))
        return {bucket: floors[bucket] for bucket in (*self._by_turns, *sorted(known, key=floors.__getitem__))}

    def taken(self, reading: Reading, in_flight: Callable[[], Collection[Place]]) -> list[StoredRow]:
        """Learns what was read. The rows that are to be sent: not in flight, and behind no row of their key that waits
        in `later`, or that is in flight if one is at a time."""
        rows, floors, ended = reading
        # The next reading begins with the last of them that this one got to, and may have left before it was through.
        self._first += max(sum(bucket in floors or bucket in ended for bucket in self._by_turns) - 2, 0)
        read = (self._of[bucket] for bucket in floors)
        if self._one_in_flight or any(each.held or each.floor < each.highest for each in read):
            rows = self._filtered(rows, in_flight)
        for bucket, floor in floors.items():
            position = self._of[bucket]
            position.floor = floor
            position.highest = max(position.highest, floor)
            position.known = max(position.known, floor)
        for bucket in ended:
            position = self._of[bucket]
            position.has_ended = True
            position.known = _ALL  # what comes to light later has a higher number than any row that failed
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
            if position.held or self._one_in_flight:
                key_hash = self._key_hash(packed)
                held = None if key_hash is None else position.held.get(key_hash)
                if held is not None and seq > held.behind:
                    held.skipped = _lower(held.skipped, seq)
                    continue
                if self._one_in_flight and key_hash is not None:
                    if key_hash in position.flying:
                        position.flying[key_hash] = _lower(position.flying[key_hash], seq)
                        continue
                    position.flying[key_hash] = None
            kept.append(row)
        return kept

    def _key_hash(self, packed: bytes) -> int | None:
        try:
            return self._key_of(packed)
        except (TypeError, ValueError):  # damaged: whoever sends it learns so
            return None

    def first_of_keys(self, due: Iterable[DueRow], in_flight: Iterable[tuple[Place, bytes]]) -> list[DueRow]:
        """Rows of `later` that may be sent: no earlier row of their key is to be sent, or on its way, from the hot
        table.

        Args:
            in_flight: What is on its way from there.
        """
        known = {bucket: position.known for bucket, position in self._of.items()}
        read = [row for row in due if known.get(row.bucket, -1) >= (0 if row.key_hash is None else row.seq - 1)]
        highest: dict[int, int] = {}
        for row in read:
            if row.key_hash is not None:
                highest[row.bucket] = max(row.seq, highest.get(row.bucket, 0))
        lowest: dict[tuple[int, int], int] = {}  # of each key, on its way
        for (bucket, seq), packed in in_flight if highest else ():
            key_hash = self._key_hash(packed) if seq < highest.get(bucket, 0) else None
            if key_hash is not None:
                lowest[bucket, key_hash] = min(seq, lowest.get((bucket, key_hash), seq))
        return [
            row for row in read if row.key_hash is None or row.seq <= lowest.get((row.bucket, row.key_hash), row.seq)
        ]

    def landed(self, places: Iterable[Place], packed: Iterable[bytes]) -> bool:
        """Rows that were `taken` are in flight no more. Whether others of their keys are to be read now."""
        if not self._one_in_flight:
            return False
        found = False
        for (bucket, _), content in zip(places, packed, strict=True):
            position = self._of.get(bucket)
            key_hash = self._key_hash(content)
            if position is None or key_hash is None:
                continue
            skipped = position.flying.pop(key_hash, None)
            if skipped is not None:
                self._read_again(position, skipped)
                found = True
        return found

    def put_back(self, places: Iterable[Place]) -> None:
        """Rows are to be read again."""
        for bucket, seq in places:
            position = self._of.get(bucket)
            if position is not None:
                self._read_again(position, seq)

    def _read_again(self, position: _Position, seq: int) -> None:
        position.floor = min(position.floor, seq - 1)
        position.known = min(position.known, seq - 1)

    def start_again(self) -> None:
        """All rows are to be looked at again."""
        for position in self._of.values():
            self._begin_again(position)

    def start_ended_again(self) -> None:
        """The same for buckets that were read to their end since the last time. The others are on their way there:
        what lies behind more rows of held keys than are read in between would never be reached."""
        for position in self._of.values():
            if position.has_ended:
                self._begin_again(position)

    def is_of_a_look(self, reading: Reading) -> bool:
        """Whether a bucket was read from its beginning, or for the first time since then to its end."""
        return any(self._of[bucket].floor == 0 for bucket in reading.floors) or any(
            not self._of[bucket].has_ended for bucket in reading.ended
        )

    def _begin_again(self, position: _Position) -> None:
        position.floor = 0
        position.has_ended = False

    def look_again(self) -> None:
        """The same, and any row may have to be sent before those that wait in `later`."""
        for position in self._of.values():
            self._read_again(position, 1)
            position.has_ended = False

    def hold(self, bucket: int, key_hash: int | None, seq: int) -> None:
        """Later rows of a key wait behind this one."""
        position = self._of.get(bucket)
        if position is not None and key_hash is not None:
            held = position.held.setdefault(key_hash, _Held(seq))
            held.behind = min(held.behind, seq)

    def let_go(self, still_held: Collection[HeldKey]) -> None:
        """Rows of other keys go on, and of these keys those below the row that waits now."""
        waiting: dict[tuple[int, int], int] = {}  # of a key the lowest row
        for bucket, key_hash, seq in still_held:
            waiting[bucket, key_hash] = min(seq, waiting.get((bucket, key_hash), seq))
        for bucket, position in self._of.items():
            for key_hash, held in list(position.held.items()):
                behind = waiting.get((bucket, key_hash))
                if held.skipped is not None and (behind is None or held.skipped < behind):
                    self._read_again(position, held.skipped)
                    held.skipped = None
                if behind is None:
                    del position.held[key_hash]
                else:
                    held.behind = behind

    def has_held(self) -> bool:
        """Whether rows of any key are held back."""
        return any(position.held for position in self._of.values())


def _lower(one: int | None, other: int) -> int:
    return other if one is None else min(one, other)
