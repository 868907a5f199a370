"""Sending 10,000 envelopes to their acknowledgements, and the C loop, to which `benchmarks.compare` relates all others.

Batches of 1,000 with 8 headers, 4 partitions.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kbatch
from benchmarks.broker import Broker, MockBroker
from benchmarks.data import kbatch_envelopes, prepare
from benchmarks.library import BUILD
from benchmarks.micro.conftest import BATCH
from benchmarks.side_process import Side
from benchmarks.sides.base import Spec

pytestmark = pytest.mark.benchmark(group="sending")

COUNT = 10_000
PARTITIONS = 4
Batches = list[list[kbatch.Envelope[Any]]]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with MockBroker() as broker:
        yield broker


@pytest.fixture(scope="module")
def batches() -> Batches:
    envelopes = kbatch_envelopes(COUNT)
    return [envelopes[start : start + BATCH] for start in range(0, COUNT, BATCH)]


@pytest.fixture
def producer(broker: Broker) -> Iterator[kbatch.Producer]:
    with kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}, max_in_flight=5_000) as producer:
        yield producer


@pytest.fixture
def c_loop(broker: Broker) -> Iterator[Side]:
    data = prepare(BUILD / "micro", 8, count=COUNT).path
    with Side("cloop", Spec(broker.bootstrap_servers, broker.new_topic("cloop", PARTITIONS), BATCH), data=data) as side:
        yield side


def test_c_loop(benchmark: BenchmarkFixture, c_loop: Side) -> None:
    benchmark.pedantic(c_loop.run, (COUNT,), rounds=80, warmup_rounds=5)  # type: ignore[no-untyped-call]


cpu_seconds = 0.0


@pytest.mark.benchmark(timer=lambda: cpu_seconds, group="computing")
def test_c_loop_cpu(benchmark: BenchmarkFixture, c_loop: Side) -> None:
    """The same, but the time is the processors'."""

    def run() -> None:
        global cpu_seconds
        result = c_loop.run(COUNT)
        cpu_seconds += result.cpu_user + result.cpu_system

    benchmark.pedantic(run, rounds=80, warmup_rounds=5)  # type: ignore[no-untyped-call]


def test_send_batch(benchmark: BenchmarkFixture, broker: Broker, producer: kbatch.Producer, batches: Batches) -> None:
    topic = broker.new_topic("send", PARTITIONS)

    def send_all() -> int:
        return sum(producer.send_batch(topic, batch).acked for batch in batches)

    acknowledged = benchmark.pedantic(send_all, rounds=40, warmup_rounds=5)  # type: ignore[no-untyped-call]
    assert acknowledged == COUNT


def test_submit(benchmark: BenchmarkFixture, broker: Broker, producer: kbatch.Producer, batches: Batches) -> None:
    """Several batches in flight."""
    topic = broker.new_topic("submit", PARTITIONS)

    def submit_all() -> int:
        pending = [producer.submit(topic, batch) for batch in batches]
        return sum(one.wait().acked for one in pending)

    acknowledged = benchmark.pedantic(submit_all, rounds=40, warmup_rounds=5)  # type: ignore[no-untyped-call]
    assert acknowledged == COUNT
