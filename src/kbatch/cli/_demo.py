"""``kbatch demo``: orders into an embedded Kafka and back."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from rich.table import Table

import kbatch
from kbatch._text import counted
from kbatch.cli._failure import Failure
from kbatch.cli._orders import Orders, index_of
from kbatch.cli._screen import Bar, Screen
from kbatch.testing import MockCluster

# The mock cluster keeps 5 MiB a partition: 64 of them hold 400,000 orders with room to spare.
_PARTITIONS = 64
_TOPIC = "orders"
_SINGLY_TOPIC = "orders-singly"
# So many envelopes are made at a time, outside the measured time, and then sent.
_MADE_AT_ONCE = 50_000
_READ_PATIENCE_S = 15.0
_PROBLEMS_NAMED = 5


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
        cluster.create_topic(_TOPIC, _PARTITIONS)
        cluster.create_topic(_SINGLY_TOPIC, _PARTITIONS)
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            with screen.bar("sending", plan.count) as bar:
                _send(producer, orders, plan, figures, bar)
            with screen.bar("sending one at a time", plan.one_at_a_time) as bar:
                _send_singly(producer, orders, plan, figures, bar)
        with screen.bar("reading back", plan.count) as bar:
            began = time.perf_counter()
            check = Check(orders)
            for messages in _read(cluster.bootstrap_servers, plan.count, check):
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


class Check:
    """Compares every record with the order that it must be, made again from its index. Keeps one byte per order."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._seen = bytearray(orders.count)
        self._last_of_customer: dict[int, int] = {}
        self._problems: list[str] = []
        self._problem_count = 0
        self.seen_count = 0

    def see(self, message: Message) -> None:
        self.seen_count += 1
        where = f"partition {message.partition()}, offset {message.offset()}"
        pairs: Any = message.headers() or []
        headers = dict(pairs)
        try:
            index = index_of(headers["id"])
            if not 0 <= index < self._orders.count:
                raise ValueError
        except (KeyError, ValueError):
            self.problem(f"{where}: no order was sent with the id header of this record")
            return
        if self._seen[index]:
            self.problem(f"{where}: order {index} a second time")
            return
        self._seen[index] = 1
        if message.value() != self._orders.body(index):
            self.problem(f"{where}: the body is not that of order {index}")
        if headers != self._orders.headers(index) or len(headers) != len(pairs):
            self.problem(f"{where}: the headers are not those of order {index}")
        if message.key() != self._orders.key(index).encode():
            self.problem(f"{where}: the key is not that of order {index}")
        customer = self._orders.customer(index)
        if self._last_of_customer.get(customer, -1) > index:
            self.problem(f"{where}: order {index} after a later one of the same customer")
        self._last_of_customer[customer] = index

    def problem(self, text: str) -> None:
        self._problem_count += 1
        if self._problem_count <= _PROBLEMS_NAMED:
            self._problems.append(text)

    def problems(self) -> list[str]:
        """What is wrong, at most a few lines; empty if every order came once, as it was sent and in order."""
        problems = list(self._problems)
        if self._problem_count > len(problems):
            problems.append(f"{self._problem_count - len(problems):,} more of this kind")
        missing = self._seen.count(0)
        if missing:
            problems.append(f"{counted(missing, 'order')} missing, the first is order {self._seen.index(0)}")
        return problems


def _read(bootstrap_servers: str, count: int, check: Check) -> Iterator[list[Message]]:
    """The topic's records from the beginning to the end, by confluent-kafka's consumer."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "kbatch-demo",
            "enable.auto.commit": False,
            "check.crcs": True,
            "fetch.wait.max.ms": 20,
        }
    )
    try:
        partitions = [TopicPartition(_TOPIC, partition, 0) for partition in range(_PARTITIONS)]
        stored = 0
        for partition in partitions:
            low, high = consumer.get_watermark_offsets(partition, timeout=_READ_PATIENCE_S)
            stored += high - low
        if stored != count:
            check.problem(f"the topic holds {counted(stored, 'record')}, not {count:,}")
        consumer.assign(partitions)
        left = stored
        while left > 0:
            messages = consumer.consume(min(left, 5_000), timeout=_READ_PATIENCE_S)
            if not messages:
                check.problem(f"no more records came within {_READ_PATIENCE_S:g} s; {left:,} are left to read")
                return
            for message in messages:
                error = message.error()
                if error is not None:
                    raise Failure(f"reading back failed: {error.str()}")
            left -= len(messages)
            yield messages
    except KafkaException as error:
        raise Failure(f"reading back failed: {error.args[0].str()}") from None
    finally:
        consumer.close()


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
