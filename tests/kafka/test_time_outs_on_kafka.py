"""Followers that stop: the leader appends and cannot answer. What a time-out makes of what was appended."""

import threading
import time
from collections import Counter
from typing import Any

import kbatch
from tests.kafka.cluster import KafkaCluster
from tests.mock.clients import read_back

OUTAGE_S = 6


def copies(kafka: KafkaCluster, config: dict[str, Any], outage_s: float) -> tuple[Counter[bytes], dict[bytes, Any]]:
    """Sends singly while no follower answers; how often each body is in the log, and each one's error or None."""
    topic = kafka.create_topic(partitions=1)
    leader = kafka.leader(topic)
    pending: list[tuple[bytes, kbatch.PendingBatch]] = []
    config = {"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0, **config}
    with kbatch.Producer(config) as producer:
        producer.send_batch(topic, [kbatch.Envelope(data=b"first")]).raise_for_errors()
        for broker in kafka.brokers:
            if broker is not leader:
                broker.pause()
        end = time.monotonic() + outage_s
        pause = threading.Event()
        while time.monotonic() < end:
            body = str(len(pending)).encode()
            pending.append((body, producer.submit(topic, [kbatch.Envelope(data=body)])))
            pause.wait(0.05)
        kafka.heal()
        outcomes = {body: batch.wait(60).errors.get(0) for body, batch in pending}
    log = Counter(stored.value for stored in read_back(kafka.bootstrap_servers, topic))
    return log, outcomes


def test_a_short_delivery_timeout_makes_copies_of_what_is_acknowledged(kafka3: KafkaCluster) -> None:
    log, outcomes = copies(kafka3, {"delivery.timeout.ms": 2000, "request.timeout.ms": 1000}, OUTAGE_S)
    acked = [body for body, error in outcomes.items() if error is None]
    assert any(log[body] > 1 for body in acked)


def test_the_default_delivery_timeout_makes_none(kafka3: KafkaCluster) -> None:
    log, outcomes = copies(kafka3, {"request.timeout.ms": 1000}, OUTAGE_S)
    assert set(outcomes.values()) == {None}
    assert {log[body] for body in outcomes} == {1}
