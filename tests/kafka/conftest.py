"""Real Apache Kafka: one broker, or three, each started once per run when the first test asks for it."""

from collections.abc import Iterator

import pytest

from tests.kafka import install
from tests.kafka.cluster import ExternalCluster, KafkaCluster

OURS = {"one_broker", "kafka3"}  # fixtures whose brokers must be ours


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(install.HERE)]
    external = config.getoption("--kafka")
    lacking = install.missing() if mine and external is None else None
    for item in mine:
        item.add_marker(pytest.mark.timeout(300))  # the first one starts the brokers
        if lacking is not None:
            item.add_marker(pytest.mark.skip(reason=lacking))
        elif external is not None and OURS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason="platform: an external cluster's brokers are not ours"))


@pytest.fixture(scope="session")
def _one_broker() -> Iterator[KafkaCluster]:
    with KafkaCluster(1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _three_brokers() -> Iterator[KafkaCluster]:
    with KafkaCluster(3) as cluster:
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
