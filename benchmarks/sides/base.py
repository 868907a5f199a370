"""What every Python side shares: its settings, the clocks around each turn, the conversation with the harness."""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from benchmarks.data import POOL
from benchmarks.sides.competitor import Competitor

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
    #: a pure-Python thread competes for the GIL during each turn
    competitor: bool = False
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
    extra: dict[str, float] = {}

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


class Turn:
    """The clocks, from its making to `end`."""

    def __init__(self) -> None:
        self._resident = resident_bytes()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._thread, self._start = time.thread_time(), time.perf_counter()

    def end(self, messages: int, acknowledged: int, extra: dict[str, float]) -> Result:
        seconds, thread = time.perf_counter() - self._start, time.thread_time() - self._thread
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Result(
            messages=messages,
            acknowledged=acknowledged,
            seconds=seconds,
            cpu_user=usage.ru_utime - self._usage.ru_utime,
            cpu_system=usage.ru_stime - self._usage.ru_stime,
            cpu_thread=thread,
            rss_start=self._resident,
            rss_end=resident_bytes(),
            rss_peak=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            extra=extra,
        )


def read_spec() -> Spec:
    return msgspec.json.decode(sys.argv[1], type=Spec)


def say(answer: Any) -> None:
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()


def settle() -> None:
    """The pool of messages lives for ever, so no collection need look at it; the same on every Python side."""
    gc.collect()
    gc.freeze()


class Sender(Protocol):
    def send(self, count: int) -> int:
        """Sends and awaits so many messages; returns how many were acknowledged."""

    def close(self) -> dict[str, Any]:
        """Ends; returns figures that only exist at the end."""


def serve(name: str, make: Callable[[Spec], Sender]) -> None:
    """Makes the sender and obeys the harness until it closes standard input."""
    spec = msgspec.json.decode(sys.argv[1], type=Spec)
    acknowledged = 0
    competitor = Competitor() if spec.competitor else None
    if competitor is None:
        sender = make(spec)
    else:
        sender = competitor.make_nicer(lambda: make(spec))
        # some start librdkafka, and with it the threads that must be nicer, at first use
        acknowledged = competitor.make_nicer(lambda: sender.send(spec.batch))
    settle()
    say({"ready": name, "acknowledged": acknowledged})
    for line in sys.stdin:
        count = int(line)
        extra: dict[str, float] = {}
        if competitor is not None:
            competitor.begin()
        turn = Turn()
        acknowledged = sender.send(count)
        if competitor is not None:
            extra = competitor.end()
        say(turn.end(count, acknowledged, extra))
    say({"closed": True} | sender.close())
