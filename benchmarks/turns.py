"""Lets sides take turns on one broker, and checks that what was acknowledged is what the broker holds."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from benchmarks.broker import Broker
from benchmarks.data import prepare
from benchmarks.library import BUILD
from benchmarks.side_process import Side, command_line
from benchmarks.sides.base import Result, Spec

WARM_UP_S = 0.5
MOST_AT_ONCE = 5_000_000


@dataclass(frozen=True)
class Contender:
    """One side with its settings, under the name that the table gives it."""

    label: str
    side: str
    batch: int
    window: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    competitor: bool = False


@dataclass(frozen=True)
class Effort:
    """`rounds` times all sides are started anew, with a broker of their own; in each they take `turns` turns of about
    `seconds`."""

    rounds: int
    turns: int
    seconds: float


@dataclass
class Score:
    """A side's turns, in the order of time, and what it said at the end of each round."""

    turns: list[Result] = field(default_factory=list)
    finals: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [turn.rate for turn in self.turns]

    @property
    def cpu_us(self) -> float:
        return median(turn.cpu_us for turn in self.turns)


def pairs(one: Score, other: Score, figure: Callable[[Result, Result], float]) -> list[float]:
    """`figure` of turns that followed one another: so a machine that slows down slows both halves of a pair."""
    return [figure(mine, its) for mine, its in zip(one.turns, other.turns, strict=True)]


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


def _warm_up(side: Side, seconds: float) -> int:
    """Creates connections, fills pools and caches, and finds out how many messages make a turn of `seconds`."""
    batch = side.spec.batch
    count, spent = max(batch, 10 if batch == 1 else 2_000 // batch * batch), 0.0
    while True:
        result = side.run(count)
        spent += result.seconds
        batches = max(1, round(result.rate * seconds / batch))
        if spent >= WARM_UP_S:
            return min(batches * batch, MOST_AT_ONCE)
        count = min(batches * batch, 20 * count)


def take_turns(
    contenders: Sequence[Contender],
    effort: Effort,
    *,
    partitions: int,
    headers: int = 8,
    values: int = 0,
    rtt_ms: int = 0,
    counts: Callable[[Contender], int] | None = None,
) -> dict[str, Score]:
    """Every side's turns. The order is turned round after each, so that none always follows the same neighbour.

    Raises RuntimeError if a side's acknowledgements are not what it sent, or not what the broker holds.
    """
    data: Path = prepare(BUILD, headers, values=values).path
    scores = {contender.label: Score() for contender in contenders}
    for _ in range(effort.rounds):
        with Broker() as broker, ExitStack() as stack:
            sides: dict[str, Side] = {}
            turn_counts: dict[str, int] = {}
            broker.set_rtt(rtt_ms)
            for contender in contenders:
                side = _start(contender, broker, partitions, headers, values, data)
                sides[contender.label] = stack.enter_context(side)
                if counts is None:
                    turn_counts[contender.label] = _warm_up(side, effort.seconds)
                else:
                    turn_counts[contender.label] = counts(contender)
            order = [contender.label for contender in contenders]
            for _ in range(effort.turns):
                for label in order:
                    scores[label].turns.append(sides[label].run(turn_counts[label]))
                order.reverse()
            broker.set_rtt(0)
            for label, side in sides.items():
                held = stored(broker.bootstrap_servers, side.spec.topic, partitions)
                if held != side.acknowledged:
                    raise RuntimeError(f"{label}: {side.acknowledged} messages acknowledged, but the broker has {held}")
                scores[label].finals.append(side.close())
    return scores


def _start(c: Contender, broker: Broker, partitions: int, headers: int, values: int, data: Path) -> Side:
    topic = broker.create_topic(c.side, partitions)
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
        competitor=c.competitor,
        options=options,
    )
    return Side(c.side, spec, data=data)
