"""The public compliance suite, on Apache Kafka: of DURABLE senders alone, unless it is night."""

from typing import Any

import pytest

from kbatch import SenderMode
from kbatch.testing.compliance import TransportCompliance
from tests.formats import InOtherFormats

from .cluster import KafkaCluster


class TestKafka(TransportCompliance):
    @pytest.fixture(
        params=[
            SenderMode.DURABLE,
            pytest.param(SenderMode.INLINE, marks=pytest.mark.nightly),
            pytest.param(SenderMode.BUFFERED, marks=pytest.mark.nightly),
        ],
        ids=lambda mode: mode.name,
    )
    def mode(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture
    def bootstrap_servers(self, one_broker: KafkaCluster) -> str:
        return one_broker.bootstrap_servers


@pytest.mark.nightly
class TestOtherFormats(InOtherFormats, TestKafka):
    pass
