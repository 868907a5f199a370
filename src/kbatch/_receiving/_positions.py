"""Which offset of each partition may be committed: the lowest that is not done yet. No threads, no clocks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    Partition = tuple[str, int]

__all__ = ["Place", "Positions"]


class Place:
    """One record's place in its partition."""

    __slots__ = ("done", "offset", "position")

    def __init__(self, position: _Position, offset: int) -> None:
        self.position = position
        self.offset = offset
        self.done = False


class _Position:
    """One partition, from when it was given until it is taken."""

    __slots__ = ("next", "places", "told")

    def __init__(self) -> None:
        self.places: deque[Place] = (
            deque()
        )  # in the order of the log, from the lowest that is not done; gaps are nobody's
        self.next = -1  # may be committed: what is below is done. -1: nothing of it is done
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

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, partition: Partition) -> bool:
        return partition in self._positions

    def reached(self) -> dict[Partition, int]:
        """The lowest offset that is not done, of the partitions where it is known."""
        found = {}
        for partition, position in self._positions.items():
            if position.places:
                found[partition] = position.places[0].offset
            elif position.next >= 0:
                found[partition] = position.next
        return found

    def partitions(self) -> list[Partition]:
        return list(self._positions)

    def begin(self, partition: Partition, offset: int) -> Place | None:
        """A record is under way. The answer goes to `end`; ``None``: the partition is not ours."""
        position = self._positions.get(partition)
        if position is None:
            return None
        place = Place(position, offset)
        position.places.append(place)
        return place

    def holds(self, partition: Partition, place: Place) -> bool:
        """Whether the partition is still ours as it was when the record came."""
        return self._positions.get(partition) is place.position

    def end(self, place: Place) -> None:
        """It is done."""
        place.done = True
        position = place.position
        while position.places and position.places[0].done:
            position.next = position.places.popleft().offset + 1
            if position.places:  # lower, if the log is read again from there
                position.next = min(position.next, position.places[0].offset)

    def spread(self, partition: Partition) -> int:
        """How many records there are from the lowest that is not done, with those behind it that are."""
        position = self._positions.get(partition)
        return 0 if position is None else len(position.places)

    def collect(self, partitions: Iterable[Partition] | None = None) -> list[tuple[str, int, int]]:
        """What may be committed and was not yet, as ``(topic, partition, offset)``."""
        found = []
        for partition in self._positions if partitions is None else partitions:
            position = self._positions.get(partition)
            if position is not None and position.next != position.told:  # lower, if the log was read again from there
                position.told = position.next
                found.append((*partition, position.next))
        return found

    def give_back(self, offsets: Iterable[tuple[str, int, int]]) -> None:
        """These were collected and not committed: they are to be collected again."""
        for topic, number, _ in offsets:
            position = self._positions.get((topic, number))
            if position is not None:
                position.told = -1
