from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kbatch
from benchmarks.broker import MockBroker
from benchmarks.data import kbatch_envelopes

BATCH = 1_000


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Says in the results which kbatch was measured."""
    output_json["kbatch"] = {"folder": str(Path(kbatch.__file__).parent), "librdkafka": kbatch.librdkafka_version}


@pytest.fixture(scope="session", params=(0, 8, 15))
def headers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="session")
def envelopes(headers: int) -> "list[kbatch.Envelope[Any]]":
    return kbatch_envelopes(BATCH, headers)


@pytest.fixture(scope="session")
def encoded_envelopes(headers: int) -> "list[kbatch.Envelope[Any]]":
    return kbatch_envelopes(BATCH, headers, encoded=True)


@pytest.fixture(scope="session")
def report() -> Iterator[kbatch.DeliveryReport]:
    """The report of 10,000 envelopes that were delivered."""
    with MockBroker() as broker, kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        yield producer.send_batch(broker.new_topic("report", 4), kbatch_envelopes(10_000))
