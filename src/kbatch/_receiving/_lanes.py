"""Who is handled next: records of one key one after the other, others side by side. No threads."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kbatch._fastmap import Envelope, ReceivedEnvelope

__all__ = ["Lanes", "Work"]


class Work:
    """One record on its way through a handler."""

    __slots__ = ("copy", "envelopes", "failures", "lane", "outages", "part", "position")

    def __init__(self, envelope: ReceivedEnvelope, lane: Hashable, position: object) -> None:
        self.envelopes = (envelope,)
        self.lane = lane  # None: it waits for nobody
        self.position = position
        self.part: int | None = None  # which of the envelopes is handled alone; None: all together
        self.failures = 0  # how often handling that has failed
        self.outages = 0  # how often since, for no fault of its own
        self.copy: Envelope[Any] | None = None  # what is to be sent in place of handling it again

    @property
    def envelope(self) -> ReceivedEnvelope:
        """The one that is handled alone, else the first."""
        return self.envelopes[self.part or 0]

    def split(self) -> bool:
        """From now on each envelope is handled alone. Whether that is new."""
        if self.part is not None or len(self.envelopes) == 1:
            return False
        self.part, self.failures = 0, 0
        return True

    def next_part(self) -> bool:
        """What was to be handled is done. Whether another part is left."""
        if self.part is None or self.part + 1 == len(self.envelopes):
            return False
        self.part += 1
        self.failures = self.outages = 0
        return True


class Lanes:
    """Work that waits, and the keys that are being handled."""

    def __init__(self) -> None:
        self._ready: deque[Work] = deque()
        self._lanes: dict[Hashable, deque[Work]] = {}  # of keys with work under way: what waits behind it
        self._later: list[tuple[float, int, Work]] = []  # a heap: what is begun again at its time
        self._numbers = count()

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

    def put_off(self, work: Work, due: float) -> None:
        """What was taken is ready again at this time. Its lane waits for it, the others do not."""
        heappush(self._later, (due, next(self._numbers), work))

    def next_due(self) -> float | None:
        """When the first of what was put off is ready."""
        return self._later[0][0] if self._later else None

    def take(self, now: float) -> Work | None:
        if self._later and self._later[0][0] <= now:
            return heappop(self._later)[2]
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
        dropped = [*self._ready, *(work for _, _, work in self._later)]
        self._later.clear()
        for work in dropped:
            if work.lane is not None:
                dropped.extend(self._lanes.pop(work.lane))
        for waiting in self._lanes.values():
            dropped.extend(waiting)
            waiting.clear()
        self._ready.clear()
        return dropped
