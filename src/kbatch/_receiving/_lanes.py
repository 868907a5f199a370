"""Who is handled next: records of one key one after the other, others side by side. No threads, no clocks."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from kbatch._fastmap import Envelope, ReceivedEnvelope
    from kbatch._receiving._positions import Partition, Place

__all__ = ["BatchLanes", "Lanes", "Waiting", "Work"]


class Work:
    """What one call of a handler gets: one record, or several of one partition in the order of the log."""

    __slots__ = (
        "begun_at", "cause", "copy", "ended", "envelopes", "failures", "is_told", "lane", "outages", "part",
        "partition", "places", "size",
    )  # fmt: skip

    def __init__(
        self,
        partition: Partition,
        envelopes: tuple[ReceivedEnvelope[Any], ...],
        places: tuple[Place, ...],
        size: int,
        lane: Hashable = None,
    ) -> None:
        self.partition = partition
        self.envelopes = envelopes
        self.places = places
        self.size = size  # bytes
        self.lane = lane  # None: it waits for nobody
        self.begun_at = 0.0
        self.is_told = False  # that it takes long
        self.part: int | None = None  # which of the envelopes is handled alone; None: all together
        self.ended = 0  # how many are done, as its run has noted
        self.failures = 0  # how often handling that has failed
        self.outages = 0  # how often since, for no fault of its own
        self.copy: Envelope[Any] | None = None  # what is to be sent in place of handling it again
        self.cause: Exception | None = None  # of a copy that is a dead letter, if somebody is told of those

    @property
    def envelope(self) -> ReceivedEnvelope[Any]:
        """The one that is handled alone, else the first."""
        return self.envelopes[self.part or 0]

    @property
    def handled(self) -> tuple[ReceivedEnvelope[Any], ...]:
        """What the next call of the handler gets."""
        return self.envelopes if self.part is None else (self.envelope,)

    @property
    def next_offset(self) -> int:
        """The offset behind what is handled."""
        return self.places[-1 if self.part is None else self.part].offset + 1

    @property
    def left(self) -> int:
        """How many of the envelopes are not done."""
        return len(self.envelopes) - self.ended

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


class Waiting(Protocol):
    """Records that wait for a handler. What is under way is known by its `Work`, until `end`."""

    def __len__(self) -> int:
        """How many calls may begin."""

    def add(self, work: Work, now: float) -> None: ...
    def take(self, now: float) -> Work | None: ...
    def end(self, work: Work, now: float) -> None: ...

    def put_off(self, work: Work, due: float) -> None:
        """What was taken may begin once more at this time, after `ripen`. What is behind it waits for it."""

    def drop(self, partitions: Collection[Partition] | None = None) -> list[Work]:
        """Forgets what waits of these partitions, or of all, and returns it."""

    def ripen(self, now: float) -> float | None:
        """When it is to be called again: something waits for its time. What has waited long enough may begin."""

    def hurry(self, partition: Partition | None = None) -> None:
        """Nothing more will come of this partition, or of all, until some of it is done."""


class _Later:
    """Work that begins once more at its time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Work]] = []
        self._numbers = itertools.count()

    def add(self, work: Work, due: float) -> None:
        heapq.heappush(self._heap, (due, next(self._numbers), work))

    def take_due(self, now: float) -> list[Work]:
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        return due

    def next_due(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def drop(self, partitions: Collection[Partition] | None) -> list[Work]:
        dropped, kept = [], []
        for each in self._heap:
            if partitions is None or each[2].partition in partitions:
                dropped.append(each[2])
            else:
                kept.append(each)
        heapq.heapify(kept)
        self._heap = kept
        return dropped


class Lanes:
    """One record at a time. Those of one lane come one after the other."""

    def __init__(self) -> None:
        self._ready: deque[Work] = deque()
        self._lanes: dict[Hashable, deque[Work]] = {}  # of keys with work under way or ready: what waits behind it
        self._later = _Later()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, work: Work, now: float) -> None:
        if work.lane is not None:
            behind = self._lanes.get(work.lane)
            if behind is not None:
                behind.append(work)
                return
            self._lanes[work.lane] = deque()
        self._ready.append(work)

    def take(self, now: float) -> Work | None:
        return self._ready.popleft() if self._ready else None

    def put_off(self, work: Work, due: float) -> None:
        self._later.add(work, due)

    def end(self, work: Work, now: float) -> None:
        if work.lane is None:
            return
        behind = self._lanes[work.lane]
        if behind:
            self._ready.append(behind.popleft())
        else:
            del self._lanes[work.lane]

    def drop(self, partitions: Collection[Partition] | None = None) -> list[Work]:
        dropped = self._later.drop(partitions)
        for work in dropped[:]:
            if work.lane is not None:
                dropped.extend(self._lanes.pop(work.lane))
        kept: deque[Work] = deque()
        for work in self._ready:
            if partitions is None or work.partition in partitions:
                dropped.append(work)
                if work.lane is not None:
                    dropped.extend(self._lanes.pop(work.lane))
            else:
                kept.append(work)
        self._ready = kept
        for behind in self._lanes.values():  # of what is under way, or stays
            if behind and (partitions is None or behind[0].partition in partitions):
                dropped.extend(behind)
                behind.clear()
        return dropped

    def ripen(self, now: float) -> float | None:
        self._ready.extend(self._later.take_due(now))
        return self._later.next_due()

    def hurry(self, partition: Partition | None = None) -> None:
        pass


class _Line:
    """What waits of one partition."""

    __slots__ = ("is_busy", "is_ready", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[tuple[Work, float]] = deque()  # single records, and when each is late
        self.is_busy = False  # a batch of it is under way
        self.is_ready = False


class BatchLanes:
    """Several records of one partition at a time, one batch of a partition after the other.

    A batch begins when it is full, or when its first record has waited for `wait_s`.
    """

    def __init__(self, size: int, wait_s: float) -> None:
        self._size = size
        self._wait_s = wait_s
        self._lines: dict[Partition, _Line] = {}
        self._ready: deque[Partition] = deque()
        # One of a partition at most, which may be of a batch that has begun: then it is too early, and sets another.
        self._timers: list[tuple[float, int, Partition]] = []
        self._timed: set[Partition] = set()
        self._numbers = itertools.count()
        self._later = _Later()
        self._again: deque[Work] = deque()  # what was put off, and is due

    def __len__(self) -> int:
        return len(self._ready) + len(self._again)

    def add(self, work: Work, now: float) -> None:
        line = self._lines.get(work.partition)
        if line is None:
            line = self._lines[work.partition] = _Line()
        line.waiting.append((work, now + self._wait_s))
        self._look(work.partition, line, now)

    def _look(self, partition: Partition, line: _Line, now: float) -> None:
        if line.is_busy or line.is_ready or not line.waiting:
            return
        due = line.waiting[0][1]
        if len(line.waiting) >= self._size or due <= now:
            line.is_ready = True
            self._ready.append(partition)
        elif partition not in self._timed:
            heapq.heappush(self._timers, (due, next(self._numbers), partition))
            self._timed.add(partition)

    def take(self, now: float) -> Work | None:
        if self._again:
            return self._again.popleft()
        if not self._ready:
            return None
        partition = self._ready.popleft()
        line = self._lines[partition]
        line.is_ready, line.is_busy = False, True
        singles = [line.waiting.popleft()[0] for _ in range(min(self._size, len(line.waiting)))]
        return Work(
            partition,
            tuple(work.envelopes[0] for work in singles),
            tuple(work.places[0] for work in singles),
            sum(work.size for work in singles),
            lane=partition,
        )

    def put_off(self, work: Work, due: float) -> None:
        self._later.add(work, due)

    def end(self, work: Work, now: float) -> None:
        line = self._lines[work.partition]
        line.is_busy = False
        if not line.waiting:
            del self._lines[work.partition]
            return
        self._look(work.partition, line, now)

    def drop(self, partitions: Collection[Partition] | None = None) -> list[Work]:
        dropped = self._later.drop(partitions)
        again = [work for work in self._again if partitions is None or work.partition in partitions]
        for work in again:
            self._again.remove(work)
        dropped += again
        for work in dropped:
            self._lines[work.partition].is_busy = False
        for partition in list(self._lines) if partitions is None else partitions:
            line = self._lines.get(partition)
            if line is None:
                continue
            dropped.extend(work for work, _ in line.waiting)
            line.waiting.clear()
            if line.is_ready:
                line.is_ready = False
                self._ready.remove(partition)
            if not line.is_busy:
                del self._lines[partition]
        return dropped

    def ripen(self, now: float) -> float | None:
        while self._timers and self._timers[0][0] <= now:
            partition = heapq.heappop(self._timers)[2]
            self._timed.discard(partition)
            line = self._lines.get(partition)
            if line is not None:
                self._look(partition, line, now)
        self._again.extend(self._later.take_due(now))
        times = [self._timers[0][0]] if self._timers else []
        due = self._later.next_due()
        return min(times if due is None else [*times, due], default=None)

    def hurry(self, partition: Partition | None = None) -> None:
        for each in list(self._lines) if partition is None else (partition,):
            line = self._lines.get(each)
            if line is not None and line.waiting and not (line.is_busy or line.is_ready):
                line.is_ready = True
                self._ready.append(each)
