"""The public compliance suite, on the mock cluster, and the page of its results."""

from collections.abc import Callable
from pathlib import Path
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

    @pytest.fixture
    def create_topic(self, kafka_cluster: MockCluster) -> Callable[[str], object]:
        return lambda name: kafka_cluster.create_topic(name, partitions=3)


def test_the_page_has_each_test_and_none_that_failed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compliance.md").read_text(encoding="utf-8")
    names = [name.removeprefix("test_").replace("_", " ") for name in vars(TransportCompliance) if name[:5] == "test_"]
    assert len(names) > 15
    for table in page.split("<!-- results: ")[1:]:
        assert [name for name in names if f"\n| {name} |" not in table] == []
    assert "FAILED" not in page
