"""Real Apache Kafka: one broker, or three, each started once per run when the first test asks for it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kafka import install
from tests.kafka.cluster import ExternalCluster, KafkaCluster

# More of what takes long: `make nightly`.
NIGHTLY = os.environ.get("KBATCH_NIGHTLY", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nightly: takes long; `make test-kafka` has something shorter for the same row")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not NIGHTLY:
        late = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in late]
    for item in items:
        if item.path.is_relative_to(install.HERE):
            item.add_marker(pytest.mark.timeout(300))  # the first one starts the brokers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """What is skipped for lack of a cluster has the same place, so that the summary has one line for all of it."""
    report = yield
    if report.when == "setup" and report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = (str(install.HERE), None, report.longrepr[2])
    return report


def _ours(request: pytest.FixtureRequest, brokers: int) -> KafkaCluster:
    lacking = install.missing()
    if request.config.getoption("--kafka") is not None:
        lacking = "platform: an external cluster's brokers are not ours"
    if lacking is not None:
        pytest.skip(lacking)
    return KafkaCluster(brokers)


@pytest.fixture(scope="session")
def _one_broker(request: pytest.FixtureRequest) -> Iterator[KafkaCluster]:
    with _ours(request, 1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _three_brokers(request: pytest.FixtureRequest) -> Iterator[KafkaCluster]:
    with _ours(request, 3) as cluster:
        yield cluster


@pytest.fixture
def one_broker(_one_broker: KafkaCluster) -> Iterator[KafkaCluster]:
    """One broker, with its listeners and its proxy; as new after each test, but for its topics."""
    yield _one_broker
    _one_broker.heal()


@pytest.fixture
def kafka3(_three_brokers: KafkaCluster) -> Iterator[KafkaCluster]:
    """Three brokers, replication 3, `min.insync.replicas=2`; all of them run again after each test."""
    yield _three_brokers
    _three_brokers.heal()


@pytest.fixture
def kafka(request: pytest.FixtureRequest) -> Iterator[ExternalCluster]:
    """Where to send to: one broker of ours, or the cluster of `--kafka`."""
    external = request.config.getoption("--kafka")
    if external is None:
        yield request.getfixturevalue("one_broker")
    else:
        with ExternalCluster(external) as cluster:
            yield cluster
