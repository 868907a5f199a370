"""A thread of pure Python that competes for the GIL, and how long it stood still for want of it.

The thread counts. It never sleeps, reads or writes, so there are only three states it can be in: on a processor,
runnable but without a processor (the machine's doing), or asleep because another thread holds the GIL. The kernel
counts the first two for each thread; what is left of the wall-clock time is the third. On a machine whose processors
are all busy this tells the GIL apart from the lack of a processor, which the progress of the counter alone cannot.
It still errs to the sender's disadvantage: a sender that is preempted while it holds the GIL is charged for that too.

`control_side.py` shows that the figure is zero when nothing in the process takes the GIL.
"""

import sys
import threading
import time

#: Seconds that a thread may keep the GIL once another wants it. Python's default of 5 ms would only make the sender
#: wait longer for each turn of its own; the time that it then holds the GIL does not depend on it.
SWITCH_INTERVAL = 0.001
ALONE = 0.1


class Competitor:
    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise NotImplementedError("the GIL figure needs Linux, which counts how long a thread was runnable")
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._active = False
        self._count = 0
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)

    def _run(self) -> None:
        while True:
            self._go.wait()
            self._go.clear()
            count = self._count
            while self._active:
                count += 1
                self._count = count

    def begin(self) -> None:
        """Starts counting: first alone, to know its speed; then the turn begins."""
        self._active = True
        self._go.set()
        time.sleep(ALONE / 2)
        before = self._read()
        time.sleep(ALONE)
        self._start = self._read()
        self._speed = (self._start[3] - before[3]) / (self._start[1] - before[1])

    def end(self) -> dict[str, float]:
        """Seconds of the turn: `wall`, on a processor, runnable without one, standing still; and `lost`, the time that
        the count is short of, at its speed alone, after the time without a processor is set aside."""
        end = self._read()
        self._active = False
        wall, cpu, runnable, count = (new - old for new, old in zip(end, self._start, strict=True))
        return {
            "wall": wall,
            "cpu": cpu,
            "runnable": runnable,
            "still": wall - cpu - runnable,
            "lost": wall - runnable - count / self._speed,
        }

    def _read(self) -> tuple[float, float, float, int]:
        with open(f"/proc/self/task/{self._thread.native_id}/schedstat", encoding="ascii") as file:
            runnable = int(file.read().split()[1]) / 1e9
        return time.perf_counter(), time.clock_gettime(self._clock), runnable, self._count
