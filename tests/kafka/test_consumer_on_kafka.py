"""The native consumer on real brokers: what the mock cluster does not know."""

import time

import pytest

import kbatch
from kbatch import Envelope
from kbatch._receiving._consumer import BEGINNING, END
from tests.kafka.cluster import KafkaCluster
from tests.mock.test_consumer_core import await_rebalance, bodies, consumer, take

from ..waiting import until


def sent(kafka: KafkaCluster, topic: str, count: int) -> None:
    with kbatch.Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0}) as producer:
        batch = [Envelope(data=b"%d" % n, partition=0, timestamp=1_000 * (n + 1)) for n in range(count)]
        producer.send_batch(topic, batch).raise_for_errors()


def test_offsets_of_times_and_watermarks(kafka: KafkaCluster) -> None:
    topic = f"times-{time.time_ns()}"
    kafka.create_topic(topic, partitions=1)
    sent(kafka, topic, 10)
    with consumer(kafka.bootstrap_servers) as core:
        assert core.partitions(topic, 30.0) == [0]
        assert core.watermarks(topic, 0, 30.0) == (0, 10)
        for milliseconds, offset in ((1, 0), (1_000, 0), (1_001, 1), (10_000, 9), (10_001, END)):
            assert core.offsets_for_times([(topic, 0, milliseconds)], 30.0) == {(topic, 0): offset}
        core.assign([(topic, 0, 3)])
        assert bodies(take(core, 7)) == list(range(3, 10))
        assert core.seek([(topic, 0, BEGINNING)], 30.0) == []
        assert bodies(take(core, 10)) == list(range(10))


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_group_reads_and_commits(kafka: KafkaCluster, protocol: str) -> None:
    topic = f"group-{protocol}-{time.time_ns()}"
    kafka.create_topic(topic, partitions=1)
    sent(kafka, topic, 10)
    with consumer(kafka.bootstrap_servers, group=topic, protocol=protocol) as core:
        core.subscribe([topic])
        assert await_rebalance(core) == [(topic, 0)]
        core.answer()
        assert bodies(take(core, 10)) == list(range(10))
        assert core.member_id()
        until(lambda: core.commit([(topic, 0, 4)], 10.0) == [], "a commit")
        assert core.committed([(topic, 0)], 30.0) == {(topic, 0): 4}
    with consumer(kafka.bootstrap_servers, group=topic, protocol=protocol) as core:
        core.subscribe([topic])
        assert bodies(take(core, 6)) == list(range(4, 10))
