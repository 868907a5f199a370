"""Lets sides take turns on one broker, and checks that what was acknowledged is what the broker holds."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import psutil  # type: ignore[import-untyped]
from confluent_kafka import Consumer, TopicPartition

from benchmarks.broker import Broker, OpenBroker, cpu_seconds, peak_bytes
from benchmarks.data import prepare
from benchmarks.library import BUILD
from benchmarks.side_process import Side, command_line
from benchmarks.sides.base import Result, Spec
from benchmarks.sides.competitor import NICE, processors

WARM_UP_S = 0.5
MOST_AT_ONCE = 5_000_000
#: A cycle of turns is taken again if programs that are no part of it used more than this share of the machine.
MOST_FOREIGN = 0.1


@dataclass(frozen=True)
class Contender:
    """One side with its settings, under the name that the table gives it."""

    label: str
    side: str
    batch: int
    window: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    #: instead of those that all sides have, where a side cannot carry them
    headers: int | None = None
    competitor: bool = False
    #: for how long it sends before it is measured; what is compiled while it runs needs more of it
    warm_up_s: float = WARM_UP_S
    #: instead of the length of a turn that all sides have
    seconds: float | None = None
    #: above 0: a batch is due so many times a second; else the next is sent when the one before has its answer
    batches_per_s: float = 0.0

    @property
    def interval_ns(self) -> int:
        return round(1e9 / self.batches_per_s) if self.batches_per_s else 0


@dataclass(frozen=True)
class Effort:
    """`rounds` times all sides are started anew, with a broker of their own; in each they take `turns` turns of about
    `seconds`, with `batches` at least."""

    rounds: int
    turns: int
    seconds: float
    batches: int = 1


@dataclass
class Score:
    """A side's turns, in the order of time, and what it said at the end of each round. `foreign` is the share of the
    machine that other programs used during each turn."""

    contender: Contender
    headers: int = 0
    turns: list[Result] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    finals: list[dict[str, Any]] = field(default_factory=list)
    #: seconds of CPU that the broker used during each turn, and during all the most memory that it ever had
    broker_cpu_s: list[float] = field(default_factory=list)
    broker_peak: int = 0
    #: resident bytes when the side had made its messages, but sent none
    resident: int = 0

    @property
    def rates(self) -> list[float]:
        return [turn.rate for turn in self.turns]

    @property
    def cpu_us(self) -> float:
        return median(turn.cpu_us for turn in self.turns)

    @property
    def broker_cpu_us(self) -> float:
        """The broker's CPU per message, of all turns together: the kernel counts it in steps of 10 ms."""
        return sum(self.broker_cpu_s) / sum(turn.messages for turn in self.turns) * 1e6

    @property
    def peak(self) -> int:
        """The most bytes that were ever resident."""
        return max(turn.rss_peak for turn in self.turns)


def pairs(one: Score, other: Score, figure: Callable[[Result, Result], float]) -> list[float]:
    """`figure` of turns that followed one another: so a machine that slows down slows both halves of a pair."""
    return [figure(mine, its) for mine, its in zip(one.turns, other.turns, strict=True)]


def rate_ratio(mine: Result, its: Result) -> float:
    return mine.rate / its.rate


class Onlooker:
    """Finds out which share of the machine was used by programs that are no part of the measurement."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._own = [psutil.Process(pid) for pid in pids]
        self._own += [child for process in self._own for child in process.children()]
        self._before = self._read()

    def _read(self) -> tuple[float, float, float]:
        # interrupts are left out: those of the loopback network are the measurement's own
        every, own = psutil.cpu_times(), [process.cpu_times() for process in self._own]
        busy = every.user + every.system + getattr(every, "nice", 0.0)
        return time.monotonic(), busy, sum(each.user + each.system for each in own)

    def foreign(self) -> float:
        """The share since the last call."""
        now = self._read()
        wall, busy, own = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return float(max(0.0, busy - own) / (wall * (psutil.cpu_count() or 1)))


def stored(bootstrap: str, topic: str, partitions: int) -> int:
    """How many records the broker has appended to the topic, evicted ones included."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "benchmarks"})
    try:
        return sum(
            consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30, cached=False)[1]
            for partition in range(partitions)
        )
    finally:
        consumer.close()


def _warm_up(side: Side, seconds: float, warm_up_s: float) -> int:
    """Creates connections, fills pools and caches, and finds out how many messages make a turn of `seconds`."""
    batch = side.spec.batch
    side.run(batch)  # connecting and finding the topic takes longer than all that follows
    count, spent, best = max(batch, 10 if batch == 1 else 2_000 // batch * batch), 0.0, 0.0
    while spent < warm_up_s:
        result = side.run(count)
        spent += result.seconds
        best = max(best, result.rate)
        count = min(max(1, round(best * seconds / batch)) * batch, 20 * count, MOST_AT_ONCE)
    return count


def take_turns(
    contenders: Sequence[Contender],
    effort: Effort,
    *,
    open_broker: OpenBroker,
    partitions: int,
    headers: int = 8,
    values: int = 0,
    rtt_ms: int | None = None,
    counts: Callable[[Contender], int] | None = None,
    patient: bool = True,
    apart: bool = False,
    split: bool = False,
) -> dict[str, Score]:
    """Every side's turns. The order is turned round after each, so that none always follows the same neighbour.

    Unless `patient` is false, turns are taken again while other programs are busy: up to three times as many as
    `effort` asks for. With `apart` the broker keeps off the competitor's processor; with `split` the sides have one
    half of the processors and the broker the other. `rtt_ms` 0 goes where 1 would, through the proxy if there is one.

    Raises RuntimeError if a side's acknowledgements are not what it sent, or not what the broker holds.
    """
    scores = {
        each.label: Score(each, 0 if values else headers if each.headers is None else each.headers)
        for each in contenders
    }
    for _ in range(effort.rounds):
        with open_broker() as broker, ExitStack() as stack:
            sides: dict[str, Side] = {}
            turn_counts: dict[str, int] = {}
            broker.set_delay(rtt_ms)
            own, others = halves() if split else (None, None)
            if apart:
                broker.confine(processors()[1], NICE)
            elif others:
                broker.confine(others)
            for contender in contenders:
                score = scores[contender.label]
                side = stack.enter_context(start(contender, broker, partitions, score.headers, values, own))
                sides[contender.label] = side
                score.resident = max(score.resident, side.resident)
                if counts is None:
                    count = _warm_up(side, contender.seconds or effort.seconds, contender.warm_up_s)
                    if contender.batches_per_s:
                        count = round(contender.batches_per_s * effort.seconds) * contender.batch
                    turn_counts[contender.label] = max(count, effort.batches * contender.batch)
                else:
                    turn_counts[contender.label] = counts(contender)
            order = [contender.label for contender in contenders]
            intervals = {contender.label: contender.interval_ns for contender in contenders}
            onlooker = Onlooker([*broker.pids, *(side.pid for side in sides.values())])
            left, again = effort.turns, 2 * effort.turns if patient else 0
            while left:
                cycle: dict[str, tuple[Result, float, float]] = {}
                for label in order:
                    before = cpu_seconds(broker.pids[0])
                    turn = sides[label].run(turn_counts[label], intervals[label])
                    cycle[label] = turn, onlooker.foreign(), cpu_seconds(broker.pids[0]) - before
                if again and max(foreign for _, foreign, _ in cycle.values()) > MOST_FOREIGN:
                    again -= 1
                    continue
                for label, (turn, foreign, broker_cpu_s) in cycle.items():
                    scores[label].turns.append(turn)
                    scores[label].foreign.append(foreign)
                    scores[label].broker_cpu_s.append(broker_cpu_s)
                left -= 1
                order.reverse()
            broker.set_delay(None)
            peak = peak_bytes(broker.pids[0])
            for label, side in sides.items():
                held = stored(broker.bootstrap_servers, side.spec.topic, partitions)
                if held != side.acknowledged:
                    raise RuntimeError(f"{label}: {side.acknowledged} messages acknowledged, but the broker has {held}")
                scores[label].finals.append(side.close())
                scores[label].broker_peak = max(scores[label].broker_peak, peak)
    return scores


@cache
def _prepared(headers: int, values: int) -> Path:
    return prepare(BUILD, headers, values=values).path


def halves() -> tuple[set[int], set[int]] | tuple[None, None]:
    """The sides' processors and the broker's. None where the system cannot tell them apart."""
    if not sys.platform.startswith("linux"):
        return None, None
    usable = sorted(os.sched_getaffinity(0))
    half = max(1, len(usable) // 2)
    return set(usable[:half]), set(usable[half:] or usable)


def start(
    c: Contender,
    broker: Broker,
    partitions: int,
    headers: int,
    values: int,
    processors: set[int] | None = None,
) -> Side:
    """The contender's process, with a topic of its own."""
    data = _prepared(headers, values)
    topic = broker.new_topic(c.side, partitions)
    options = c.options
    if c.side == "control":
        inner = Spec(broker.bootstrap_servers, topic, c.batch, c.window, headers, values)
        options = {"command": command_line("cloop", inner, data)}
    spec = Spec(
        bootstrap=broker.bootstrap_servers,
        topic=topic,
        batch=c.batch,
        window=c.window,
        headers=headers,
        values=values,
        partitions=partitions,
        competitor=c.competitor,
        options=options,
    )
    return Side(c.side, spec, data=data, processors=processors)
