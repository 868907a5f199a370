"""A thread of pure Python that competes for the GIL, and how long it stands still for want of it.

The thread counts. It never sleeps, reads or writes, so there are only three states it can be in: on a processor,
runnable but without a processor (the machine's doing), or asleep because another thread holds the GIL. The kernel
counts the first two for each thread; what is left of the wall-clock time is the third.

Where processors are short the states blur: a thread that was told that the GIL is free, but gets a processor only after
the sender has taken it again, has waited for both; and a sender that loses its processor while it holds the GIL makes
the competitor wait for longer than its work takes. Therefore the competitor has a processor of its own, and all other
threads and the broker share the rest, on which the sending thread goes first: librdkafka's threads and the broker are
nicer. So the rate of such a turn says nothing, but its GIL figure says what it should.

`control_side.py` shows that the figure is zero when nothing in the process takes the GIL.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

NICE = 10
#: Seconds for which the competitor runs alone before each turn, to find out its speed.
ALONE = 0.1


def processors() -> tuple[set[int], set[int]]:
    """The competitor's processor, and those of all others."""
    usable = sorted(os.sched_getaffinity(0))
    return set(usable[:1]), set(usable[1:] or usable)


class Competitor:
    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise NotImplementedError("the GIL figure needs Linux, which counts how long a thread was runnable")
        self._mine, others = processors()
        os.sched_setaffinity(0, others)  # of this thread, and of those that it starts
        self._active = False
        self._count = 0
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)

    def _run(self) -> None:
        os.sched_setaffinity(0, self._mine)
        while True:
            self._go.wait()
            self._go.clear()
            count = self._count
            while self._active:
                count += 1
                self._count = count

    def make_nicer(self, make: Callable[[], T]) -> T:
        """Calls `make` on a thread that lets others go first, as will all threads that it starts."""

        def call() -> T:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            return make()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()

    def make_native_threads_nicer(self) -> None:
        """Makes all threads that are not Python's own let the others go first; for clients with Python threads, which
        `make_nicer` would make so too."""
        own = {thread.native_id for thread in threading.enumerate()}
        for thread in map(int, os.listdir("/proc/self/task")):
            if thread not in own:
                os.setpriority(os.PRIO_PROCESS, thread, NICE)

    def begin(self) -> None:
        """Starts counting: first alone, to know its speed; then the turn begins."""
        self._active = True
        self._go.set()
        time.sleep(ALONE / 2)
        before = self._read()
        self._start = before
        while self._start[1] == before[1]:  # on a machine in great demand it may get no processor for so long
            time.sleep(ALONE)
            self._start = self._read()
        self._speed = (self._start[3] - before[3]) / (self._start[1] - before[1])

    def end(self) -> dict[str, float]:
        """Of the turn: seconds by the clock, on a processor, runnable without one, standing still; and `progress`, how
        much it counted per second, as a share of what it counts alone."""
        end = self._read()
        self._active = False
        wall, cpu, runnable, count = (new - old for new, old in zip(end, self._start, strict=True))
        return {
            "wall": wall,
            "cpu": cpu,
            "runnable": runnable,
            "still": wall - cpu - runnable,
            "progress": count / wall / self._speed,
        }

    def _read(self) -> tuple[float, float, float, int]:
        with open(f"/proc/self/task/{self._thread.native_id}/schedstat", encoding="ascii") as file:
            runnable = int(file.read().split()[1]) / 1e9
        return time.perf_counter(), time.clock_gettime(self._clock), runnable, self._count
