"""Who is handled next: records of one key one after the other, others side by side. No threads."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kbatch._fastmap import ReceivedEnvelope

__all__ = ["Lanes", "Work"]


class Work:
    """One record on its way through a handler."""

    __slots__ = ("envelope", "lane", "position")

    def __init__(self, envelope: ReceivedEnvelope, lane: Hashable, position: object) -> None:
        self.envelope = envelope
        self.lane = lane  # None: it waits for nobody
        self.position = position


class Lanes:
    """Work that waits, and the keys that are being handled."""

    def __init__(self) -> None:
        self._ready: deque[Work] = deque()
        self._lanes: dict[Hashable, deque[Work]] = {}  # of keys with work under way: what waits behind it

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, work: Work) -> bool:
        """Whether it is ready: nothing of its lane is under way."""
        if work.lane is not None:
            waiting = self._lanes.get(work.lane)
            if waiting is not None:
                waiting.append(work)
                return False
            self._lanes[work.lane] = deque()
        self._ready.append(work)
        return True

    def take(self) -> Work | None:
        return self._ready.popleft() if self._ready else None

    def end(self, work: Work) -> bool:
        """It is done, whatever came of it. Whether another of its lane is ready now."""
        if work.lane is None:
            return False
        waiting = self._lanes[work.lane]
        if not waiting:
            del self._lanes[work.lane]
            return False
        self._ready.append(waiting.popleft())
        return True

    def clear(self) -> list[Work]:
        """Forgets what nobody has begun, and returns it."""
        dropped = list(self._ready)
        for work in dropped:
            if work.lane is not None:
                dropped.extend(self._lanes.pop(work.lane))
        for waiting in self._lanes.values():
            dropped.extend(waiting)
            waiting.clear()
        self._ready.clear()
        return dropped
