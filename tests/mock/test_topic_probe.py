"""Asking the brokers for a topic: what is answered, and that nothing is written and no topic is made."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

import kbatch
from kbatch import Envelope
from kbatch.testing import ApiKey, MockCluster
from tests.waiting import until

from .clients import end_offsets

TELEMETRY = 71  # librdkafka's own question on each new connection
LONG_S = 30.0  # a guard; no answer takes it


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster(brokers=3) as cluster:
        cluster.create_topic("t", partitions=2)
        yield cluster


def make(cluster: MockCluster, **config: Any) -> kbatch.Producer:
    return kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0} | config)


def topics(cluster: MockCluster) -> set[str]:
    return set(AdminClient({"bootstrap.servers": cluster.bootstrap_servers}).list_topics(timeout=10).topics)


@pytest.mark.parametrize("transactional", [False, True])
def test_a_topic_that_is_there(cluster: MockCluster, transactional: bool) -> None:
    config = {"transactional.id": "one"} if transactional else {}
    with make(cluster, **config) as producer:
        assert producer._core.probe("t", LONG_S) is None
        assert len(producer) == 0
        assert producer.stats()["batches"] == 0
        assert end_offsets(cluster.bootstrap_servers, "t") == {0: 0, 1: 0}
        assert producer.send_batch("t", [Envelope(1, partition=0)]).ok
        assert producer._core.probe("t", LONG_S) is None
        assert producer.send_batch("t", [Envelope(2, partition=1)]).ok
    if not transactional:  # whose end is a record, too
        assert end_offsets(cluster.bootstrap_servers, "t") == {0: 1, 1: 1}


def test_a_topic_that_was_never_sent_to_is_not_asked_for_and_not_made(cluster: MockCluster) -> None:
    # The mock cluster makes topics that are asked for by name.
    with make(cluster) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        for _ in range(3):
            assert producer._core.probe("unknown", LONG_S) is None  # a broker answers, and that is all one knows
        assert topics(cluster) == {"t"}


def test_an_error_of_the_topic(cluster: MockCluster) -> None:
    with make(cluster) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        cluster.set_topic_error("t", "TOPIC_AUTHORIZATION_FAILED")
        assert producer._core.probe("t", LONG_S) == "the topic: Broker: Topic authorization failed"
        cluster.set_topic_error("t", 0)
        assert producer._core.probe("t", LONG_S) is None


def test_partitions_without_a_leader(cluster: MockCluster) -> None:
    with make(cluster, **{"enable.idempotence": False}) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        cluster.set_partition_leader("t", 0, -1)
        assert producer._core.probe("t", LONG_S) is None
        cluster.set_partition_leader("t", 1, -1)
        assert producer._core.probe("t", LONG_S) == "none of the topic's 2 partitions has a leader"
        cluster.set_partition_leader("t", 1, 2)
        assert producer._core.probe("t", LONG_S) is None


def test_all_brokers_are_down(cluster: MockCluster) -> None:
    with make(cluster) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        cluster.set_broker_down()
        reason = producer._core.probe("t", 1.0)
        assert reason is not None
        assert reason.startswith("no broker answers: ")
        cluster.set_broker_up()
        until(lambda: producer._core.probe("t", 2.0) is None, "the brokers")
        assert producer.send_batch("t", [Envelope(1)]).ok


@pytest.mark.parametrize("down", [1, 2, 3])
def test_any_broker_that_is_up_answers(cluster: MockCluster, down: int) -> None:
    with make(cluster, **{"enable.idempotence": False}) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        for partition in (0, 1):
            cluster.set_partition_leader("t", partition, down % 3 + 1)
        cluster.set_broker_down(down)
        until(lambda: producer._core.probe("t", 2.0) is None, "an answer of another broker")


def test_it_is_a_request_for_metadata_and_no_other(cluster: MockCluster) -> None:
    with make(cluster, **{"enable.idempotence": False}) as producer:
        producer._core.start()
        assert producer._core.probe("t", LONG_S) is None
        cluster.start_request_tracking()
        for _ in range(3):
            assert producer._core.probe("t", LONG_S) is None
        keys = {request.api_key for request in cluster.requests()}
        assert ApiKey.METADATA in keys
        assert keys <= {ApiKey.METADATA, ApiKey.API_VERSIONS, TELEMETRY}


def test_many_at_once_while_sending(cluster: MockCluster) -> None:
    answers: list[str | None] = []
    with make(cluster) as producer:

        def probe() -> None:
            for _ in range(20):
                answers.append(producer._core.probe("t", LONG_S))

        threads = [threading.Thread(target=probe) for _ in range(4)]
        for thread in threads:
            thread.start()
        for n in range(50):
            assert producer.send_batch("t", [Envelope(n)]).ok
        for thread in threads:
            thread.join()
    assert answers == [None] * 80
    assert sum(end_offsets(cluster.bootstrap_servers, "t").values()) == 50


def test_a_closed_producer(cluster: MockCluster) -> None:
    producer = make(cluster)
    assert producer._core.probe("t", LONG_S) is None
    producer.close()
    with pytest.raises(kbatch.ProducerClosedError):
        producer._core.probe("t", LONG_S)
    never_used = make(cluster)
    never_used.close()
    with pytest.raises(kbatch.ProducerClosedError):
        never_used._core.probe("t", LONG_S)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
def test_after_a_fork(cluster: MockCluster) -> None:
    with make(cluster) as used, make(cluster) as fresh:
        assert used._core.probe("t", LONG_S) is None
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                used._core.probe("t", LONG_S)
            except kbatch.ForkError:
                code = 0 if fresh._core.probe("t", LONG_S) is None else 2
                fresh.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert used._core.probe("t", LONG_S) is None


def test_a_producer_in_its_fatal_state_may_still_ask(cluster: MockCluster) -> None:
    with make(cluster) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        producer._core.inject_fatal_error(47, "for the test")
        assert producer._core.probe("t", LONG_S) is None


def test_closing_while_it_waits_for_an_answer(cluster: MockCluster) -> None:
    producer = make(cluster)
    assert producer.send_batch("t", [Envelope(1)]).ok
    cluster.set_broker_down()
    reasons: list[str | None] = []
    threads = [threading.Thread(target=lambda: reasons.append(producer._core.probe("t", 3.0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert producer.close(0.5) == 0
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert len(reasons) == 3
    assert None not in reasons
