"""Who waits until envelopes have their outcome: ``flush``, ``drain`` and ``close``."""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NONE_LEFT", "Watcher", "Watchers"]

NONE_LEFT = sys.maxsize  # a number that no envelope reaches


class Watcher:
    """Waits until all envelopes before `seq` have their outcome; with `NONE_LEFT`, until there is none at all."""

    def __init__(self, seq: int, wake: Callable[[], None]) -> None:
        self.seq = seq
        self.wake = wake
        self.done = False
        self.gone = False  # it waits no longer


class Watchers:
    """Those of one sender. They come from any thread, and are woken by the sender's own."""

    def __init__(self) -> None:
        self.newcomers: deque[Watcher] = deque()  # to be sorted in
        self.waiting: list[tuple[int, int, Watcher]] = []  # by number
        self._is_over = False
        self._count = 0  # ever
        self._many = 100  # when those that are gone are taken out

    def add(self, seq: int, wake: Callable[[], None]) -> Watcher:
        """Has `wake` called; more than once, perhaps."""
        # No lock: a signal handler that closes may come in between, and waits for the sender's thread.
        watcher = Watcher(seq, wake)
        self.newcomers.append(watcher)
        if self._is_over:
            wake()
        return watcher

    def wake(self, oldest: Callable[[], int | None]) -> None:
        """Wakes those that wait no more. `oldest` is the lowest number without an outcome, ``None`` if all have one."""
        waiting = self.waiting
        while self.newcomers:
            self._count += 1
            watcher = self.newcomers.popleft()
            insort(waiting, (watcher.seq, self._count, watcher))
        if not waiting:
            return
        before = oldest()
        count = len(waiting) if before is None else bisect_left(waiting, (min(before, NONE_LEFT - 1) + 1,))
        done, waiting[:count] = waiting[:count], []
        for _, _, watcher in done:
            watcher.done = True
            watcher.wake()
        if len(waiting) > self._many:
            waiting[:] = [each for each in waiting if not each[2].gone]
            self._many = 100 + 2 * len(waiting)

    def wake_all(self) -> None:
        """The thread has ended, or is about to: nobody is woken by it any more."""
        self._is_over = True
        for watcher in (*(watcher for _, _, watcher in self.waiting), *self.newcomers.copy()):
            watcher.wake()
