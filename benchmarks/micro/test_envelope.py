"""Making one envelope, and what is made inside it."""

import uuid
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kbatch
from benchmarks.data import CONTENT_TYPE, MESSAGE_TYPE, SOURCE, PlainEnvelope, orders

pytestmark = pytest.mark.benchmark(group="computing")

ORDER = next(orders(1))


def test_envelope(benchmark: BenchmarkFixture) -> None:
    message, key = ORDER.message, ORDER.key

    def make() -> "kbatch.Envelope[Any]":
        return kbatch.Envelope(message, key=key)

    benchmark(make)


def test_envelope_with_all_that_makes_8_headers(benchmark: BenchmarkFixture) -> None:
    message, key, tenant = ORDER.message, ORDER.key, ORDER.tenant_id
    correlation, conversation = ORDER.correlation_id, ORDER.conversation_id

    def make() -> "kbatch.Envelope[Any]":
        return kbatch.Envelope(
            message,
            key=key,
            correlation_id=correlation,
            conversation_id=conversation,
            source=SOURCE,
            tenant_id=tenant,
        )

    benchmark(make)


def test_envelope_with_a_given_id(benchmark: BenchmarkFixture) -> None:
    message, key, given = ORDER.message, ORDER.key, uuid.UUID(ORDER.id)
    benchmark(lambda: kbatch.Envelope(message, key=key, id=given))


def test_replace(benchmark: BenchmarkFixture) -> None:
    envelope = kbatch.Envelope(ORDER.message, key=ORDER.key)
    benchmark(lambda: envelope.replace(attempts=1))


@pytest.mark.benchmark(group="for comparison")
def test_plain_python_envelope(benchmark: BenchmarkFixture) -> None:
    """A dataclass with slots and an id from `uuid.uuid4`."""
    message, key = ORDER.message, ORDER.key
    benchmark(lambda: PlainEnvelope(message, key, str(uuid.uuid4()), MESSAGE_TYPE, CONTENT_TYPE))


def test_uuid7(benchmark: BenchmarkFixture) -> None:
    benchmark(kbatch.uuid7)


@pytest.mark.benchmark(group="for comparison")
def test_uuid4_of_the_standard_library(benchmark: BenchmarkFixture) -> None:
    benchmark(uuid.uuid4)


def test_reading_the_id(benchmark: BenchmarkFixture) -> None:
    envelope = kbatch.Envelope(ORDER.message)
    benchmark(lambda: envelope.id)
