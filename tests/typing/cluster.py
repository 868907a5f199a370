"""The mock cluster in a user's own test."""

import pytest
from typing_extensions import assert_type

import kbatch
from kbatch.testing import ApiKey, MockCluster, Request


@pytest.fixture
def producer(kafka_cluster: MockCluster) -> kbatch.Producer:
    return kbatch.Producer({"bootstrap.servers": kafka_cluster.bootstrap_servers})


def test_orders(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=3)
    kafka_cluster.push_request_errors(ApiKey.PRODUCE, ["NOT_ENOUGH_REPLICAS", 7])
    assert_type(kafka_cluster.bootstrap_servers, str)
    assert_type(kafka_cluster.requests(), list[Request])
    assert_type(kafka_cluster.produce_requests(), int)
