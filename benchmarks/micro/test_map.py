"""Phase 1: a batch of 1,000 envelopes to packed records, without a client. Divide by 1,000 for one envelope."""

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kbatch
from benchmarks.data import format_time, header_pairs, orders
from benchmarks.micro.conftest import BATCH

pytestmark = pytest.mark.benchmark(group="computing")

Envelopes = list[kbatch.Envelope[Any]]


def mapper(wire: str) -> Callable[[Envelopes], None]:
    # Nothing listens there, and nothing connects: the client starts when the first batch is enqueued.
    source = "/shop" if wire == "cloudevents" else None
    core = kbatch.Producer({"bootstrap.servers": "localhost:1"}, wire=wire, source=source)._core

    def map_once(envelopes: Envelopes) -> None:
        core.map(kbatch.PendingBatch(core), "orders", envelopes)

    return map_once


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents"])
def test_map(benchmark: BenchmarkFixture, envelopes: Envelopes, wire: str) -> None:
    benchmark(mapper(wire), envelopes)


def test_map_of_encoded_bodies(benchmark: BenchmarkFixture, encoded_envelopes: Envelopes) -> None:
    benchmark(mapper("kbatch"), encoded_envelopes)


def test_map_raw(benchmark: BenchmarkFixture) -> None:
    benchmark(mapper("raw"), [kbatch.Envelope(data=b"x" * 100) for _ in range(BATCH)])


@pytest.mark.benchmark(group="for comparison")
def test_the_same_in_python(benchmark: BenchmarkFixture, headers: int) -> None:
    """What the mapping alone costs in Python, before `produce` is called."""
    plain = list(orders(BATCH, headers))
    encode = msgspec.json.Encoder().encode

    def map_once() -> None:
        sent_at = format_time(datetime.now(timezone.utc))
        for envelope in plain:
            encode(envelope.message)
            if headers:
                header_pairs(envelope, sent_at)

    benchmark(map_once)


@pytest.mark.benchmark(group="for comparison")
def test_encoding_alone(benchmark: BenchmarkFixture) -> None:
    """msgspec's part of it."""
    messages = [envelope.message for envelope in orders(BATCH)]
    encoder = msgspec.json.Encoder()
    buffer = bytearray()

    def encode_all() -> None:
        buffer.clear()
        for message in messages:
            encoder.encode_into(message, buffer, -1)

    benchmark(encode_all)
