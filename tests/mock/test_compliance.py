"""The public compliance suite, on the mock cluster."""

from collections.abc import Callable
from typing import Any

import pytest

from kbatch.testing import MockCluster
from kbatch.testing.compliance import TransportCompliance
from tests.formats import InOtherFormats


class TestMockCluster(TransportCompliance):
    @pytest.fixture
    def bootstrap_servers(self, kafka_cluster: MockCluster) -> str:
        return kafka_cluster.bootstrap_servers

    @pytest.fixture
    def consumer_settings(self) -> dict[str, Any]:
        # Who comes after the last member has left waits for nearly a session.
        return {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300}

    @pytest.fixture
    def create_topic(self, kafka_cluster: MockCluster) -> Callable[[str], object]:
        return lambda name: kafka_cluster.create_topic(name, partitions=3)


class TestOtherFormats(InOtherFormats, TestMockCluster):
    pass
