"""What every Python side shares: its settings, the clocks around each turn, the conversation with the harness."""

import asyncio
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
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
    #: of the topic
    partitions: int = 4


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
    #: of a paced turn: when it began on the machine's monotonic clock, then for each batch how long after it was due
    #: its sending began, and how long that took
    start_ns: int = 0
    waited_ns: list[int] = []
    served_ns: list[int] = []

    @property
    def rate(self) -> float:
        """Messages acknowledged per second."""
        return self.messages / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU per message, all threads of the process."""
        return (self.cpu_user + self.cpu_system) / self.messages * 1e6

    @property
    def latencies_ns(self) -> list[int]:
        """For each batch of a paced turn, the time from when it was due to its answer."""
        return [waited + served for waited, served in zip(self.waited_ns, self.served_ns, strict=True)]


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0


def peak_bytes() -> int:
    """The most memory that was ever resident. Linux's `ru_maxrss` begins with what the parent held when it forked."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Turn:
    """The clocks, from its making to `end`."""

    def __init__(self) -> None:
        self._resident = resident_bytes()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._thread, self._start = time.thread_time(), time.perf_counter()

    def end(self, messages: int, acknowledged: int, extra: dict[str, float], pace: "Pace | None" = None) -> Result:
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
            rss_peak=peak_bytes(),
            extra=extra,
            start_ns=pace.start_ns if pace else 0,
            waited_ns=pace.waited_ns if pace else [],
            served_ns=pace.served_ns if pace else [],
        )


class Pace:
    """A batch is due every `interval_ns`, whether or not the one before has its answer: what waits for a slow answer
    counts as waiting. Until a batch is due the processor is kept busy, as every side does: a sleep would add the
    kernel's wake-up to all of them. An interval of 1 means: at once after the answer before."""

    def __init__(self, batches: int, interval_ns: int) -> None:
        self.waited_ns = [0] * batches
        self.served_ns = [0] * batches
        self._interval_ns = interval_ns
        self.start_ns = time.monotonic_ns()

    def due(self, number: int) -> int:
        """Returns when it is time for batch `number`: the time."""
        due = self.start_ns + number * self._interval_ns
        now = time.monotonic_ns()
        while now < due:
            now = time.monotonic_ns()
        self.waited_ns[number] = now - due
        return now

    def answered(self, number: int, called_ns: int) -> None:
        self.served_ns[number] = time.monotonic_ns() - called_ns


def read_spec() -> Spec:
    return msgspec.json.decode(sys.argv[1], type=Spec)


def say_ready(name: str, acknowledged: int = 0) -> None:
    """Everything is in place: what is resident now is the interpreter, the libraries and the pool of messages."""
    say({"ready": name, "acknowledged": acknowledged, "resident": resident_bytes()})


def say(answer: Any) -> None:
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()


def settle() -> None:
    """The pool of messages lives for ever, so no collection need look at it; the same on every Python side."""
    gc.collect()
    gc.freeze()


def read_order(line: str) -> tuple[int, int]:
    """How many messages to send, and the interval in nanoseconds at which a batch is due; 0: as fast as it goes."""
    count, _, interval_ns = line.partition(" ")
    return int(count), int(interval_ns or 0)


class Sender(Protocol):
    def send(self, count: int) -> int:
        """Sends and awaits so many messages; returns how many were acknowledged."""

    def close(self) -> dict[str, Any]:
        """Ends; returns figures that only exist at the end."""


def _send_paced(sender: Sender, pace: Pace, batch: int) -> int:
    acknowledged = 0
    for number in range(len(pace.served_ns)):
        called_ns = pace.due(number)
        acknowledged += sender.send(batch)
        pace.answered(number, called_ns)
    return acknowledged


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
    say_ready(name, acknowledged)
    for line in sys.stdin:
        count, interval_ns = read_order(line)
        extra: dict[str, float] = {}
        if competitor is not None:
            competitor.begin()
        turn = Turn()
        pace = None
        if interval_ns:
            pace = Pace(count // spec.batch, interval_ns)
            acknowledged = _send_paced(sender, pace, spec.batch)
        else:
            acknowledged = sender.send(count)
        if competitor is not None:
            extra = competitor.end()
        say(turn.end(count, acknowledged, extra, pace))
    say({"closed": True} | sender.close())


class AsyncSender(Protocol):
    async def send(self, count: int) -> int:
        """Sends and awaits so many messages; returns how many were acknowledged."""


def serve_async(name: str, make: Callable[[Spec], AbstractAsyncContextManager[AsyncSender]]) -> None:
    """The same for a sender that lives on an event loop, without a competitor for the GIL."""
    asyncio.run(_serve_async(name, read_spec(), make))


async def _serve_async(name: str, spec: Spec, make: Callable[[Spec], AbstractAsyncContextManager[AsyncSender]]) -> None:
    async with make(spec) as sender:
        settle()
        say_ready(name)
        while line := await asyncio.to_thread(sys.stdin.readline):  # what the client does in the background goes on
            turn = Turn()
            count, interval_ns = read_order(line)
            pace = Pace(count // spec.batch, interval_ns) if interval_ns else None
            if pace is None:
                acknowledged = await sender.send(count)
            else:
                acknowledged = 0
                for number in range(len(pace.served_ns)):
                    called_ns = pace.due(number)
                    acknowledged += await sender.send(spec.batch)
                    pace.answered(number, called_ns)
            say(turn.end(count, acknowledged, {}, pace))
    say({"closed": True})
