"""What kbatch sends, confluent-kafka's consumer gets and `kbatch.read_envelope` reads; and what others send."""

import time
import uuid
from datetime import datetime, timezone
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import Consumer, Message, TopicPartition

import kbatch
from kbatch import Envelope, Tombstone, read_envelope
from kbatch.testing import MockCluster

from .clients import produce, produce_named

TOPIC = "orders"
MOMENT = datetime(2026, 11, 23, 9, 16, 45, 123456, tzinfo=timezone.utc)
FULL = Envelope(
    {"total": 3},
    key="schlüssel",
    timestamp=1_764_000_000_123,
    headers=[("trace", "ünïcödé"), ("trace", b"\x00\xff"), ("none", None), ("empty", "")],
    message_type="order",
    content_type="application/vnd.order+json",
    source="shop",
    correlation_id="c-1",
    conversation_id="11111111-2222-3333-4444-555555555555",
    parent_id="p-1",
    tenant_id="t-1",
    user_name="müller",
    sent_at=MOMENT,
    scheduled_time=MOMENT,
    deliver_by=datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc),
    attempts=2,
)
USERS = [("trace", "ünïcödé".encode()), ("trace", b"\x00\xff"), ("none", None), ("empty", b"")]


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


def messages(cluster: MockCluster, count: int) -> list[Message]:
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap_servers, "group.id": "tests", "log_level": 0})
    try:
        consumer.assign([TopicPartition(TOPIC, 0, 0)])
        found: list[Message] = []
        deadline = time.monotonic() + 30
        while len(found) < count:
            assert time.monotonic() < deadline
            found += consumer.consume(count - len(found), timeout=0.2)
        return found
    finally:
        consumer.close()


def send(cluster: MockCluster, *envelopes: Envelope, **options: Any) -> list[Message]:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "enable.idempotence": False}
    with kbatch.Producer(config, **options) as producer:
        producer.send_batch(TOPIC, envelopes).raise_for_errors()
    return messages(cluster, len(envelopes))


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents"])
def test_every_field_comes_back(cluster: MockCluster, wire: str) -> None:
    gone = Tombstone(b"\xff", headers={"why": "gone"})
    full, tombstone = (read_envelope(message, wire=wire) for message in send(cluster, FULL, gone, wire=wire))
    assert full == FULL.replace(data=b'{"total":3}', key="schlüssel".encode(), headers=USERS, topic=TOPIC, partition=0)
    assert (type(tombstone), tombstone.key, tombstone.headers) == (Tombstone, b"\xff", (("why", b"gone"),))
    assert tombstone.id == gone.id or wire != "kbatch"


def test_what_raw_carries_comes_back(cluster: MockCluster) -> None:
    (read,) = (read_envelope(message, wire="raw") for message in send(cluster, FULL, wire="raw"))
    assert read == Envelope(
        data=b'{"total":3}',
        key="schlüssel".encode(),
        headers=USERS,
        topic=TOPIC,
        partition=0,
        timestamp=1_764_000_000_123,
        id=read.id,
    )


class Both:
    """A format of one's own that both sides use."""

    def write(self, envelope: Envelope[Any]) -> tuple[bytes, bytes, dict[str, str]]:
        return envelope.id.bytes, repr(envelope.message).encode(), {"n": "1"}

    def read(self, record: kbatch.ConsumedRecord) -> Envelope[Any]:
        key = record.key()
        assert isinstance(key, bytes)
        return Envelope(data=record.value() or b"", id=uuid.UUID(bytes=key))


def test_a_format_of_ones_own(cluster: MockCluster) -> None:
    envelope = Envelope([1, 2])
    (message,) = send(cluster, envelope, wire=Both())
    assert read_envelope(message, wire=Both()) == Envelope(data=b"[1, 2]", id=envelope.id)


def test_the_error_says_which_record(cluster: MockCluster) -> None:
    produce(cluster.bootstrap_servers, TOPIC, [{"value": b""}, {"value": b"", "headers": {"id": b"seven"}}])
    good, bad = messages(cluster, 2)
    read_envelope(good)
    with pytest.raises(
        kbatch.DeserializationError, match=r"record orders \[0\] at offset 1: header 'id' must be a UUID"
    ):
        read_envelope(bad)


def test_events_go_both_ways(cluster: MockCluster) -> None:
    envelope = Envelope({"total": 3}, source="/shop", message_type="order", key="k", sent_at=MOMENT)
    (message,) = send(cluster, envelope, wire="cloudevents")
    event = from_kafka(KafkaMessage(dict(message.headers() or []), message.key(), message.value() or b""), JSONFormat())
    assert event.get_data() == {"total": 3}
    assert (event.get_id(), event.get_time(), event.get_type()) == (str(envelope.id), MOMENT, "order")
    # and back, in both modes, by another producer
    made = CloudEvent({"source": "/theirs", "type": "order.v2", "time": MOMENT, "partitionkey": "k"}, {"total": 4})
    written = [write(made, JSONFormat()) for write in (to_binary, to_structured)]
    theirs = [{"key": one.key, "value": one.value, "headers": one.headers} for one in written]
    assert produce(cluster.bootstrap_servers, TOPIC, theirs) == [None, None]
    for message in messages(cluster, 3)[1:]:
        read = read_envelope(message, wire="cloudevents")
        assert (read.data, read.key, read.source) == (b'{"total": 4}', b"k", "/theirs")
        assert (str(read.id), read.sent_at, read.message_type) == (made.get_id(), MOMENT, "order.v2")


def test_a_record_whose_headers_cannot_be_read_may_be_read_twice(cluster: MockCluster) -> None:
    # confluent-kafka gives pairs without a name when it is asked again.
    produce_named(cluster.bootstrap_servers, TOPIC, b"\xff")
    (message,) = messages(cluster, 1)
    for wire in ("kbatch", "raw", "cloudevents"):
        with pytest.raises(kbatch.DeserializationError, match="the name of one of its headers is not UTF-8"):
            read_envelope(message, wire=wire)
