"""Which offset of each partition may be committed: the lowest that is not done yet. No threads, no clocks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    Partition = tuple[str, int]

__all__ = ["Positions"]


class _Position:
    """One partition, from when it was given until it is taken."""

    __slots__ = ("done", "next", "told", "under_way")

    def __init__(self) -> None:
        self.under_way: deque[int] = deque()  # in the order of the log; gaps are nobody's
        self.done: set[int] = set()  # of those under way, behind one that is not
        self.next = -1  # may be committed: what is below is done
        self.told = -1  # was committed, or is on its way


class Positions:
    """Offsets under way, by partition. A record of a partition that was taken meanwhile counts for nothing."""

    def __init__(self) -> None:
        self._positions: dict[Partition, _Position] = {}

    def give(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._positions[partition] = _Position()

    def take(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._positions.pop(partition, None)

    def partitions(self) -> list[Partition]:
        return list(self._positions)

    def begin(self, partition: Partition, offset: int) -> object:
        """A record is under way. The answer goes to `end`; ``None``: the partition is not ours."""
        position = self._positions.get(partition)
        if position is not None:
            position.under_way.append(offset)
        return position

    def holds(self, partition: Partition, position: object) -> bool:
        """Whether what `begin` has answered is still of use."""
        return self._positions.get(partition) is position

    def end(self, position: object, offset: int) -> None:
        """It is done."""
        assert isinstance(position, _Position)
        if not position.under_way or position.under_way[0] != offset:
            position.done.add(offset)
            return
        position.under_way.popleft()
        position.next = offset + 1
        while position.under_way and position.under_way[0] in position.done:
            offset = position.under_way.popleft()
            position.done.discard(offset)
            position.next = offset + 1

    def under_way(self, partition: Partition) -> int:
        position = self._positions.get(partition)
        return 0 if position is None else len(position.under_way)

    def collect(self, partitions: Iterable[Partition] | None = None) -> list[tuple[str, int, int]]:
        """What may be committed and was not yet, as ``(topic, partition, offset)``."""
        found = []
        for partition in self._positions if partitions is None else partitions:
            position = self._positions.get(partition)
            if position is not None and position.next > position.told:
                position.told = position.next
                found.append((*partition, position.next))
        return found

    def give_back(self, offsets: Iterable[tuple[str, int, int]]) -> None:
        """These were collected and not committed: they are to be collected again."""
        for topic, number, _ in offsets:
            position = self._positions.get((topic, number))
            if position is not None:
                position.told = -1
