"""Records of retry topics that are not due yet. No threads, no clocks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kbatch._fastmap import ReceivedEnvelope
    from kbatch._receiving._positions import Partition

__all__ = ["Delayed"]


class Delayed:
    """By partition, in order: behind a record that is not due no other of its partition is handled."""

    def __init__(self) -> None:
        self._waiting: dict[Partition, deque[tuple[float, ReceivedEnvelope[Any]]]] = {}

    def __contains__(self, partition: Partition) -> bool:
        return partition in self._waiting

    def add(self, partition: Partition, envelope: ReceivedEnvelope[Any], due: float) -> bool:
        """Whether it is the first of its partition that waits."""
        waiting = self._waiting.get(partition)
        if waiting is not None:
            waiting.append((due, envelope))
            return False
        self._waiting[partition] = deque([(due, envelope)])
        return True

    def take_due(self, now: float, most: int) -> list[ReceivedEnvelope[Any]]:
        """Up to `most` records whose time has come."""
        due: list[ReceivedEnvelope[Any]] = []
        for waiting in self._waiting.values():
            while waiting and len(due) < most and waiting[0][0] <= now:
                due.append(waiting.popleft()[1])
        return due

    def next_due(self) -> float | None:
        """When the first of them is due; ``None`` if none waits. A `MemoryListener` asks, which sets its own clock."""
        return min((waiting[0][0] for waiting in self._waiting.values() if waiting), default=None)

    def take_empty(self) -> list[Partition]:
        """Partitions of which nothing waits any more."""
        empty = [partition for partition, waiting in self._waiting.items() if not waiting]
        self.forget(empty)
        return empty

    def forget(self, partitions: Iterable[Partition]) -> None:
        """They were taken, or nothing waits."""
        for partition in partitions:
            self._waiting.pop(partition, None)
