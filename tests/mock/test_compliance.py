"""The public compliance suite, on the mock cluster."""

from typing import Any

import pytest

from kbatch.testing import MockCluster
from kbatch.testing.compliance import TransportCompliance


class TestMockCluster(TransportCompliance):
    @pytest.fixture
    def bootstrap_servers(self, kafka_cluster: MockCluster) -> str:
        return kafka_cluster.bootstrap_servers

    @pytest.fixture
    def consumer_settings(self) -> dict[str, Any]:
        # Who comes after the last member has left waits for nearly a session.
        return {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300}
