"""Packed records go to Kafka byte for byte as their envelopes would."""

import gc
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, Tombstone
from kbatch._fastmap import RecordPool, pinned_buffers
from kbatch._pending import PendingBatch
from kbatch.testing import MockCluster
from tests import mapping
from tests.waiting import until

from .clients import Record, read

MOMENT = mapping.parsed_time(b"2026-11-23T09:16:45.123456Z")


def envelopes(count: int) -> list[Envelope]:
    return [
        *(
            Envelope(
                {"n": n},
                key=f"schlüssel{n}",
                partition=n % 2,
                timestamp=1_764_000_000_000 + n,
                headers=[("n", str(n)), ("none", None), ("empty", ""), ("bytes", b"\x00\xff")],
                conversation_id="11111111-2222-3333-4444-555555555555",
                sent_at=MOMENT,
                scheduled_time=MOMENT,
                attempts=n,
            )
            for n in range(count)
        ),
        Envelope(data=b"", partition=0, sent_at=MOMENT, timestamp=1),
        Envelope(data=b"x" * 100_000, key=b"", partition=1, sent_at=MOMENT, timestamp=1),
        Tombstone(b"gone", partition=1, sent_at=MOMENT, timestamp=1),
    ]


def without_offsets(records: dict[int, list[Record]]) -> dict[int, list[Any]]:
    return {partition: [record._replace(offset=0) for record in of_one] for partition, of_one in records.items()}


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents", "raw"])
def test_what_was_packed_arrives_as_what_is_sent(kafka_cluster: MockCluster, wire: str) -> None:
    for topic in ("direct", "packed"):
        kafka_cluster.create_topic(topic, partitions=2)
    batch = envelopes(500)
    servers = kafka_cluster.bootstrap_servers
    with kbatch.Producer(
        {"bootstrap.servers": servers, "enable.idempotence": False}, wire=wire, source="/s"
    ) as producer:
        producer.send_batch("direct", batch).raise_for_errors()
        pool = RecordPool()
        packed = pool.pack(pool.map(producer._mapper, "packed", batch))
        pending = PendingBatch(producer._core)
        producer._core.map_packed(pending, packed)
        # The batch alone keeps what librdkafka reads from.
        del packed, pool
        gc.collect()
        assert producer._core.send(pending, 30, wait=True)
        assert (pending.outcomes.acked(), pending.outcomes.failed()) == (len(batch), 0)
        until(lambda: pinned_buffers() == 0, "the packed records given back")
    direct, sent = (read(servers, topic, len(batch)) for topic in ("direct", "packed"))
    assert without_offsets(sent) == without_offsets(direct)
    assert sum(len(of_one) for of_one in sent.values()) == len(batch)


def test_packed_records_of_several_topics(kafka_cluster: MockCluster) -> None:
    topics = [f"topic-{n}" for n in range(3)]
    for topic in topics:
        kafka_cluster.create_topic(topic, partitions=1)
    servers = kafka_cluster.bootstrap_servers
    pool = RecordPool()
    with kbatch.Producer({"bootstrap.servers": servers, "enable.idempotence": False}) as producer:
        batch = [Envelope(data=b"%d" % n, topic=topics[n % 3]) for n in range(30)]
        packed = pool.pack(pool.map(producer._mapper, None, batch))
        for _ in range(2):
            pending = PendingBatch(producer._core)
            producer._core.map_packed(pending, packed)
            assert producer._core.send(pending, 30, wait=True)
            assert pending.outcomes.acked() == 30
    for n, topic in enumerate(topics):
        (of_topic,) = read(servers, topic, 20).values()
        assert [record.value for record in of_topic] == 2 * [b"%d" % m for m in range(30) if m % 3 == n]


def test_what_is_refused_of_packed_records_has_an_outcome_and_no_envelope(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers, "enable.idempotence": False}
    pool = RecordPool()
    with kbatch.Producer(config) as producer:
        batch = [Envelope(data=b"x", partition=7), Envelope(data=b"y")]
        packed = pool.pack(pool.map(producer._mapper, "orders", batch))
        pending = PendingBatch(producer._core)
        producer._core.map_packed(pending, packed)
        assert producer._core.send(pending, 30, wait=True)
        assert (pending.outcomes.acked(), pending.outcomes.failed()) == (1, 1)
        assert [(index, code) for index, code, _ in pending.outcomes.failures()] == [(0, -190)]  # _UNKNOWN_PARTITION
