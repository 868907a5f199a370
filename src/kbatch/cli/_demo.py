"""``kbatch demo``: orders into an embedded Kafka and back."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

import kbatch
from kbatch._text import counted
from kbatch.cli._check import PARTITIONS, Check, read_all
from kbatch.cli._failure import Failure
from kbatch.cli._orders import Orders
from kbatch.cli._screen import Bar, Screen
from kbatch.testing import MockCluster

_TOPIC = "orders"
_SINGLY_TOPIC = "orders-singly"
# So many envelopes are made at a time, outside the measured time, and then sent.
_MADE_AT_ONCE = 50_000


@dataclass(frozen=True)
class Plan:
    count: int
    batch_size: int
    in_flight: int
    one_at_a_time: int


@dataclass
class Figures:
    first_batch_s: float = 0.0
    sending_s: float = 0.0
    making_s: float = 0.0
    reading_s: float = 0.0
    singly_s: float = 0.0
    mapping_us: float = 0.0
    sent: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def latency_ms(self, quantile: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1000


def run(plan: Plan, screen: Screen) -> int:
    """Runs the demo and returns its exit status."""
    orders = Orders(plan.count)
    figures = Figures()
    with MockCluster(process=True) as cluster:
        cluster.create_topic(_TOPIC, PARTITIONS)
        cluster.create_topic(_SINGLY_TOPIC, PARTITIONS)
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            with screen.bar("sending", plan.count) as bar:
                _send(producer, orders, plan, figures, bar)
            with screen.bar("sending one at a time", plan.one_at_a_time) as bar:
                _send_singly(producer, orders, plan, figures, bar)
        with screen.bar("reading back", plan.count) as bar:
            began = time.perf_counter()
            check = Check(orders)
            for messages in read_all(cluster.bootstrap_servers, _TOPIC, plan.count, check):
                for message in messages:
                    check.see(message)
                bar.show(check.seen_count)
            figures.reading_s = time.perf_counter() - began
    problems = check.problems()
    if not screen.quiet:
        screen.show(_table(plan, figures))
    if problems:
        for problem in problems:
            screen.tell(problem)
        raise Failure("the orders that were sent are not what was read back")
    screen.say(
        f"{counted(plan.count, 'envelope was', 'envelopes were')} sent, acknowledged, read back and compared: "
        "none is missing, changed, doubled or out of order."
    )
    return 0


def _send(producer: kbatch.Producer, orders: Orders, plan: Plan, figures: Figures, bar: Bar) -> None:
    # By itself: it waits for the connection and for what the client must learn of the topic.
    began = time.perf_counter()
    done = min(plan.batch_size, plan.count)
    producer.send_batch(_TOPIC, [orders.envelope(index) for index in range(done)]).raise_for_errors()
    figures.first_batch_s = time.perf_counter() - began
    for first in range(done, plan.count, _MADE_AT_ONCE):
        began = time.perf_counter()
        envelopes = [orders.envelope(index) for index in range(first, min(first + _MADE_AT_ONCE, plan.count))]
        made = time.perf_counter()
        figures.making_s += made - began
        for report in _send_batches(producer, envelopes, plan):
            report.raise_for_errors()
            figures.latencies_s.append(report.latency_s)
            figures.sent += len(report)
            bar.show(done + figures.sent)
        figures.sending_s += time.perf_counter() - made
    stats = producer.stats()
    figures.mapping_us = stats["map_ns"] / 1000 / stats["envelopes"]


def _send_batches(
    producer: kbatch.Producer, envelopes: Sequence[kbatch.Envelope[Any]], plan: Plan
) -> Iterator[kbatch.DeliveryReport]:
    """Keeps several batches in flight: the next one is mapped while the last ones are on their way."""
    flights: deque[kbatch.PendingBatch] = deque()
    batches_in_flight = max(1, plan.in_flight // plan.batch_size)
    for start in range(0, len(envelopes), plan.batch_size):
        if len(flights) == batches_in_flight:
            yield flights.popleft().wait()
        flights.append(producer.submit(_TOPIC, envelopes[start : start + plan.batch_size]))
    for pending in flights:
        yield pending.wait()


def _send_singly(producer: kbatch.Producer, orders: Orders, plan: Plan, figures: Figures, bar: Bar) -> None:
    envelopes = [orders.envelope(index) for index in range(plan.one_at_a_time)]
    began = time.perf_counter()
    for i, envelope in enumerate(envelopes, 1):
        producer.send_batch(_SINGLY_TOPIC, [envelope]).raise_for_errors()
        if i % 100 == 0:
            bar.show(i)
    figures.singly_s = time.perf_counter() - began


def _table(plan: Plan, figures: Figures) -> Table:
    table = Table(show_header=False, title="kbatch demo", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = [("first batch, with connecting", f"{figures.first_batch_s * 1000:,.0f} ms")]
    speed = 0.0
    if figures.sent:
        speed = figures.sent / figures.sending_s
        rows += [
            ("then, sent and acknowledged", f"{figures.sent:,} in {figures.sending_s:.2f} s"),
            ("  envelopes/s", f"{speed:,.0f}"),
            (f"  latency of a batch of {plan.batch_size:,}, p50", f"{figures.latency_ms(0.50):.1f} ms"),
            ("  p99", f"{figures.latency_ms(0.99):.1f} ms"),
        ]
    rows.append(("mapping, per envelope", f"{figures.mapping_us:.2f} µs"))
    if plan.one_at_a_time:
        singly = plan.one_at_a_time / figures.singly_s
        rows += [
            ("one awaited message at a time", f"{plan.one_at_a_time:,} in {figures.singly_s:.2f} s"),
            ("  messages/s", f"{singly:,.0f}"),
        ]
        if speed:
            rows.append(("  batches are faster by", f"{speed / singly:,.0f} times"))
    rows += [
        ("making the orders in Python", f"{figures.making_s:.2f} s"),
        ("reading back and comparing", f"{figures.reading_s:.2f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table
