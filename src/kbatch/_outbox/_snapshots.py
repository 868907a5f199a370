"""Below which numbers rows may still come to light in PostgreSQL, and by which transactions. No threads, no clock, no
database."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Gaps", "Open", "Snapshot"]

Range: TypeAlias = tuple[int, int]  # above the first number, up to the second

_MOST_GAPS = 64  # of a bucket; beyond, two of them become one


class Open(NamedTuple):
    """Transactions that were open, by their numbers: `running`, and any from `first` on and below `end`."""

    running: frozenset[int]
    first: int
    end: int

    def left(self, now: Snapshot) -> Open:
        """Those of them that are still open."""
        first = min(max(self.first, now.xmax), self.end)
        running = {xid for xid in now.running if xid in self.running or self.first <= xid < self.end}
        return Open(frozenset(running), first, self.end) if first < self.end else Open(frozenset(running), 0, 0)

    def with_all_of(self, other: Open) -> Open:
        """Those of both, and perhaps some between them."""
        tails = [each for each in (self, other) if each.first < each.end]
        first, end = (min(each.first for each in tails), max(each.end for each in tails)) if tails else (0, 0)
        return Open(self.running | other.running, first, end)

    def has_any(self) -> bool:
        """Whether there are any."""
        return bool(self.running) or self.first < self.end


class Snapshot(NamedTuple):
    """What a reading sees: what was done by transactions below `xmax` that are not `running`.

    Attributes:
        given: No transaction had a number from here on.
    """

    xmax: int
    running: frozenset[int]
    given: int

    @classmethod
    def parsed(cls, text: str, ahead: int) -> Snapshot:
        """From the text of a ``pg_snapshot``, and by how many numbers the next transaction's is above its xmax."""
        _, xmax, running = text.split(":")
        return cls(int(xmax), frozenset(map(int, running.split(","))) if running else frozenset(), int(xmax) + ahead)

    def open(self) -> Open:
        """Transactions whose rows it does not see, and that may have numbers of rows below those that it sees: a
        transaction has its own number before it takes one for a row."""
        return Open(self.running, self.xmax, self.given) if self.xmax < self.given else Open(self.running, 0, 0)


class _Gap(NamedTuple):
    low: int
    high: int
    open: Open
    is_empty: bool  # whenever it was read, so that what is deleted later is not passed by when it is read again


class Gaps:
    """Of each bucket the ranges of numbers that were read while transactions were open that may have rows in them.

    Rows of these come to light below the number up to which a bucket was read. When one of the transactions of a range
    has ended, the range is read once more. One that stays open keeps its ranges, and nothing else. Ranges in which
    nothing was found become one, however many readings there are beside other transactions.
    """

    def __init__(self) -> None:
        self._of: dict[int, list[_Gap]] = {}

    def to_read(self, floors: Mapping[int, int], now: Snapshot) -> dict[int, list[Range]]:
        """Of buckets the ranges up to their floors in which rows may have come to light. What lies above is read
        anyway, and forgotten here."""
        found: dict[int, list[Range]] = {}
        left: dict[Open, Open] = {}
        for bucket, floor in floors.items():
            gaps = self._of.get(bucket)
            if gaps is None:
                continue
            if gaps[-1].high > floor:
                gaps = [gap._replace(high=min(gap.high, floor)) for gap in gaps if gap.low < floor]
                self._keep(bucket, gaps)
            ranges: list[Range] = []
            for gap in gaps:
                if gap.open not in left:
                    left[gap.open] = gap.open.left(now)
                if left[gap.open] == gap.open:
                    continue
                if ranges and ranges[-1][1] == gap.low:
                    ranges[-1] = (ranges[-1][0], gap.high)
                else:
                    ranges.append((gap.low, gap.high))
            if ranges:
                found[bucket] = ranges
        return found

    def was_read(self, bucket: int, low: int, high: int, now: Snapshot, *, is_empty: bool) -> None:
        """A range of numbers above all that were read before was read."""
        still = now.open()
        if not still.has_any():
            return
        gaps = list(self._of.get(bucket, ()))
        if is_empty and gaps and gaps[-1].is_empty and gaps[-1].high == low:
            gap = gaps.pop()
            low, still = gap.low, gap.open.with_all_of(still)
        self._keep(bucket, [*gaps, _Gap(low, high, still, is_empty)])

    def was_read_again(self, bucket: int, low: int, high: int, now: Snapshot, *, is_empty: bool) -> None:
        """A range, or the first part of one, that `to_read` had told was read."""
        gaps: list[_Gap] = []
        for gap in self._of.get(bucket, ()):
            begin, end = max(gap.low, low), min(gap.high, high)
            if begin >= end:
                gaps.append(gap)
                continue
            if gap.low < begin:
                gaps.append(gap._replace(high=begin))
            still = gap.open.left(now)
            if still.has_any():
                gaps.append(_Gap(begin, end, still, gap.is_empty and is_empty))
            if end < gap.high:
                gaps.append(gap._replace(low=end))
        self._keep(bucket, gaps)

    def _keep(self, bucket: int, gaps: Iterable[_Gap]) -> None:
        kept: list[_Gap] = []
        for gap in gaps:
            if kept and kept[-1].high == gap.low and kept[-1].open == gap.open:
                kept[-1] = kept[-1]._replace(high=gap.high, is_empty=kept[-1].is_empty and gap.is_empty)
            else:
                kept.append(gap)
        while len(kept) > _MOST_GAPS:  # together they are read more often than each would be
            first, second = kept[:2]
            is_empty = first.is_empty and second.is_empty
            kept[:2] = [_Gap(first.low, second.high, first.open.with_all_of(second.open), is_empty)]
        if kept:
            self._of[bucket] = kept
        else:
            self._of.pop(bucket, None)
