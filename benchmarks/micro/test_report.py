"""Reading the report of 10,000 envelopes."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import kbatch

pytestmark = pytest.mark.benchmark(group="computing")


def fresh(report: kbatch.DeliveryReport) -> kbatch.DeliveryReport:
    # the report remembers what it was asked
    return kbatch.DeliveryReport(report._outcomes, report.latency_s)


def test_is_it_ok(benchmark: BenchmarkFixture, report: kbatch.DeliveryReport) -> None:
    assert benchmark(lambda: bool(fresh(report)))


def test_how_many(benchmark: BenchmarkFixture, report: kbatch.DeliveryReport) -> None:
    assert benchmark(lambda: fresh(report).acked) == 10_000


def test_offsets(benchmark: BenchmarkFixture, report: kbatch.DeliveryReport) -> None:
    assert len(benchmark(lambda: fresh(report).offsets)) == 10_000


def test_partitions_and_offsets(benchmark: BenchmarkFixture, report: kbatch.DeliveryReport) -> None:
    def both() -> int:
        asked = fresh(report)
        return len(list(zip(asked.partitions, asked.offsets, strict=True)))

    assert benchmark(both) == 10_000
