"""What every Python side shares: its settings, the clock around each turn, the conversation with the harness."""

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.data import POOL

PAGE = os.sysconf("SC_PAGESIZE")


class Spec(msgspec.Struct, frozen=True):
    """What a side is told at its start. `window` 0: one batch at a time, each awaited; otherwise about so many messages
    are in flight across batches."""

    bootstrap: str
    topic: str
    batch: int
    window: int = 0
    headers: int = 8
    #: above 0: bodies of so many bytes, no key, no headers, instead of orders
    values: int = 0
    pool: int = POOL
    #: what only one side understands
    options: dict[str, Any] = {}


class Result(msgspec.Struct, frozen=True):
    """One turn: what was sent, and what the process spent between the first enqueue and the last acknowledgement."""

    messages: int
    acknowledged: int
    seconds: float
    cpu_user: float
    cpu_system: float
    cpu_thread: float
    rss_start: int
    rss_end: int
    rss_peak: int
    extra: dict[str, Any] = {}

    @property
    def rate(self) -> float:
        """Messages acknowledged per second."""
        return self.messages / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU per message, all threads of the process."""
        return (self.cpu_user + self.cpu_system) / self.messages * 1e6


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0


def measured(send: Callable[[int], int], count: int) -> Result:
    """Runs `send(count)`, which returns how many were acknowledged, between two readings of every clock."""
    rss_start = resident_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF)
    thread, start = time.thread_time(), time.perf_counter()
    acknowledged = send(count)
    end, thread_end = time.perf_counter(), time.thread_time()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return Result(
        messages=count,
        acknowledged=acknowledged,
        seconds=end - start,
        cpu_user=after.ru_utime - before.ru_utime,
        cpu_system=after.ru_stime - before.ru_stime,
        cpu_thread=thread_end - thread,
        rss_start=rss_start,
        rss_end=resident_bytes(),
        rss_peak=after.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def read_spec() -> Spec:
    return msgspec.json.decode(sys.argv[1], type=Spec)


def say(answer: Any) -> None:
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()


def serve(name: str, send: Callable[[int], int], close: Callable[[], dict[str, Any]]) -> None:
    """Obeys the harness until it closes standard input. `close` may return figures that only exist at the end."""
    gc.collect()
    gc.freeze()  # the pool of messages lives for ever: no collection need look at it, on any side
    say({"ready": name})
    for line in sys.stdin:
        say(measured(send, json.loads(line)))
    say({"closed": True} | close())
