"""The public compliance suite, on Apache Kafka."""

import pytest

from kbatch.testing.compliance import TransportCompliance

from .cluster import KafkaCluster


class TestKafka(TransportCompliance):
    @pytest.fixture
    def bootstrap_servers(self, one_broker: KafkaCluster) -> str:
        return one_broker.bootstrap_servers
