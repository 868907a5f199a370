"""What the sides share that take messages one at a time and confirm them later, all but their clients.

Options: `threads`, which share the messages of a turn (1); and `calls`, what a turn is for, one of

rate     as fast as it goes; if the order names an interval, a message is due at each, on one thread, see `_paced`
cost     what one call takes while there is room, see `_cost`
awaited  each call returns with its message's acknowledgement; how long each took, or, if there is an interval, how
         long after it was due
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, islice
from queue import SimpleQueue
from typing import Any, Protocol

from benchmarks.sides.base import Pace, Spec, Turn, read_order, read_spec, say, say_ready, settle
from benchmarks.sides.competitor import Competitor

Send = Callable[[Any], object]

#: How long a paced sender sleeps at least before it looks again what is due and what has its acknowledgement.
LOOK_EVERY_S = 50e-6
_PR_SET_TIMERSLACK = 29


class OneAtATime(Protocol):
    """A client."""

    @property
    def messages(self) -> Sequence[Any]:
        """What it sends over and over."""

    def sending(self) -> Send:
        """What sends one message. Each thread asks for one of its own."""

    def waiting(self) -> int:
        """How many messages have no outcome yet; the client may look after its events meanwhile."""

    def flush(self) -> int:
        """Waits for all outcomes; returns how many messages were acknowledged since the last call."""

    def close(self) -> dict[str, Any]:
        """Ends; returns figures that only exist at the end."""


class Nothing:
    def send(self, message: Any) -> None:
        """An empty method, which takes what calling a method takes."""


def shares(count: int, messages: Sequence[Any], number: int) -> Iterator[list[Any]]:
    """`count` messages dealt out to so many, each of whom begins at another place."""
    for at in range(number):
        size = count // number + (at < count % number)
        start = at * len(messages) // number
        yield list(islice(cycle(chain(messages[start:], messages[:start])), size))


def percentiles(durations_ns: list[int], name: str = "") -> dict[str, float]:
    ordered = sorted(durations_ns)
    last = len(ordered) - 1
    found = {f"{name}p{share:g}": float(ordered[round(last * share / 100)]) for share in (50, 99, 99.9)}
    return found | {f"{name}max": float(ordered[-1])}


def _loop(send: Send, messages: Sequence[Any]) -> tuple[int, int]:
    """Nanoseconds by the clock, and of this thread on a processor."""
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for message in messages:
        send(message)
    return time.perf_counter_ns() - wall, time.thread_time_ns() - cpu


def _timed(send: Send, messages: Sequence[Any]) -> list[int]:
    now, durations = time.perf_counter_ns, []
    for message in messages:
        before = now()
        send(message)
        durations.append(now() - before)
    return durations


def _cost(one: OneAtATime, count: int) -> tuple[int, dict[str, float]]:
    """Sends half of the messages between two clocks and the other half each between two of its own. The same is done
    before with a method that is empty: `empty_wall` and so on are that one's; and with two methods that keep what they
    are given. Nanoseconds per call."""
    messages = next(shares(count // 2, one.messages, 1))
    calls: dict[str, Send] = {
        "empty_": Nothing().send,
        "append_": list[Any]().append,
        "queue_": SimpleQueue[Any]().put,
        "": one.sending(),
    }
    extra: dict[str, float] = {}
    acknowledged = 0
    for name, call in calls.items():
        wall, cpu = _loop(call, messages)
        acknowledged += one.flush()
        extra |= {f"{name}wall": wall / len(messages), f"{name}cpu": cpu / len(messages)}
        extra |= percentiles(_timed(call, messages), name)
        acknowledged += one.flush()
    return acknowledged, extra


def _paced(one: OneAtATime, count: int, pace: Pace, interval_ns: int) -> tuple[int, dict[str, float]]:
    """Sends what is due, looks how many have no outcome yet, sleeps a little, and so on. A busy wait, as other paced
    sides have it, would keep the GIL from the client's own threads. The first so many are taken to be done as have an
    outcome, so an answer is seen up to about 0.1 ms late, on all sides."""
    send, start_ns = one.sending(), pace.start_ns
    called_ns, durations = [0] * count, []
    sent = settled = 0
    while settled < count:
        now = time.monotonic_ns()
        while sent < count and (due := start_ns + sent * interval_ns) <= now:
            called_ns[sent] = before = time.monotonic_ns()
            send(next_message(one, sent))
            durations.append(time.monotonic_ns() - before)
            pace.waited_ns[sent] = before - due
            sent += 1
        done = sent - one.waiting()
        now = time.monotonic_ns()
        for number in range(settled, done):
            pace.served_ns[number] = now - called_ns[number]
        settled = max(settled, done)
        time.sleep(LOOK_EVERY_S)
    return one.flush(), percentiles(durations)


def next_message(one: OneAtATime, number: int) -> Any:
    return one.messages[number % len(one.messages)]


def _awaited_paced(one: OneAtATime, count: int, pace: Pace) -> int:
    send = one.sending()
    for number in range(count):
        called_ns = pace.due(number)
        send(next_message(one, number))
        pace.answered(number, called_ns)
    return one.flush()


def _sleep_exactly() -> None:
    """Of this thread: Linux ends sleeps up to 50 µs late otherwise."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


class Turns:
    """One client and what its turns are for."""

    def __init__(self, one: OneAtATime, spec: Spec) -> None:
        self._one, self._calls = one, spec.options.get("calls", "rate")
        self._number = spec.options.get("threads", 1)
        self._threads = ThreadPoolExecutor(self._number) if self._number > 1 else None

    def take(self, count: int, interval_ns: int, pace: Pace | None) -> tuple[int, dict[str, float], Pace | None]:
        """Returns how many were acknowledged, figures of the turn, and the times of its messages if it has some."""
        one = self._one
        if pace is not None:
            if self._calls == "awaited":
                return _awaited_paced(one, count, pace), {}, pace
            return *_paced(one, count, pace, interval_ns), pace
        if self._calls == "cost":
            return *_cost(one, count), None
        work: Callable[[Send, Sequence[Any]], Any] = _timed if self._calls == "awaited" else _loop
        dealt = list(shares(count, one.messages, self._number))
        if self._threads is None:
            done = [work(one.sending(), dealt[0])]
        else:
            done = list(self._threads.map(lambda share: work(one.sending(), share), dealt))
        if self._calls == "awaited":
            pace = Pace(count, 0)
            pace.served_ns = list(chain.from_iterable(done))
        return one.flush(), {}, pace


def serve(name: str, make: Callable[[Spec], OneAtATime]) -> None:
    """As `base.serve`, of which `Result.extra` and the times of messages are more."""
    spec = read_spec()
    competitor = Competitor() if spec.competitor else None
    one = make(spec)
    acknowledged = 0
    if competitor is not None:  # threads that are to be nicer start with the first message
        one.sending()(one.messages[0])
        acknowledged = one.flush()
    turns = Turns(one, spec)
    _sleep_exactly()
    settle()
    say_ready(name, acknowledged)
    for line in sys.stdin:
        count, interval_ns = read_order(line)
        extra: dict[str, float] = {}
        if competitor is not None:
            competitor.make_native_threads_nicer()
            competitor.begin()
        turn = Turn()
        acknowledged, extra, pace = turns.take(count, interval_ns, Pace(count, interval_ns) if interval_ns else None)
        if competitor is not None:
            extra = competitor.end()
        say(turn.end(count, acknowledged, extra, pace))
    say({"closed": True} | one.close())
