"""What is sent: read back with clients that are not kbatch, and compared byte by byte."""

import array
import gc
import itertools
import json
import math
import os
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Any

import msgspec
import psutil
import pytest
from confluent_kafka.serialization import StringSerializer

import kbatch
from kbatch import Envelope, Tombstone
from kbatch._fastmap import pinned_buffers
from kbatch.testing import MockCluster

from ..naming import shown
from ..waiting import later
from .clients import Stored, end_offsets, produce, read_back, read_back_with_aiokafka

TOPIC = "orders"
MOMENT = datetime(2026, 11, 23, 9, 16, 45, 123456, tzinfo=timezone.utc)


def make_producer(cluster: MockCluster, *, idempotent: bool = False, **options: Any) -> kbatch.Producer:
    # An idempotent producer asks for its id first, which takes librdkafka up to half a second.
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "enable.idempotence": idempotent}
    return kbatch.Producer(config | options.pop("config", {}), **options)


def send(cluster: MockCluster, envelopes: Any, *, topic: str | None = TOPIC, **options: Any) -> kbatch.DeliveryReport:
    with make_producer(cluster, **options) as producer:
        return producer.send_batch(topic, envelopes).raise_for_errors()


def stored(cluster: MockCluster, topic: str = TOPIC) -> list[Stored]:
    return read_back(cluster.bootstrap_servers, topic)


def values(cluster: MockCluster, topic: str = TOPIC) -> list[bytes | None]:
    return [record.value for record in stored(cluster, topic)]


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    """With one topic of one partition, so that what is read back is in the order of sending."""
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


# -- the wire formats, byte by byte

ID = kbatch.uuid7()
FULL = Envelope(
    {"total": 3, "name": "Größe"},
    key="schlüssel",
    timestamp=1_764_000_000_123,
    headers=[("trace", "ünïcödé"), ("trace", b"\x00\xff"), ("none", None), ("empty", ""), ("ключ", "значение")],
    id=ID,
    message_type="order",
    content_type="application/vnd.order+json",
    source="shop",
    correlation_id="c-1",
    conversation_id="11111111-2222-3333-4444-555555555555",
    parent_id="p-1",
    tenant_id="t-1",
    user_name="müller",
    sent_at=MOMENT,
    scheduled_time=MOMENT + timedelta(hours=1),
    deliver_by=datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc),
    attempts=2,
)
FULL_VALUE = '{"total":3,"name":"Größe"}'.encode()
FULL_USER_HEADERS = [
    ("trace", "ünïcödé".encode()),
    ("trace", b"\x00\xff"),
    ("none", None),
    ("empty", b""),
    ("ключ", "значение".encode()),
]
MINIMAL = Envelope(data=b"\x00", id=ID, sent_at=MOMENT)
GONE = Tombstone(b"\xff\x00", headers={"why": "gone"}, id=ID)

Content = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]
WIRES: dict[str, list[Content]] = {
    "kbatch": [
        (
            "schlüssel".encode(),
            FULL_VALUE,
            [
                ("id", str(ID).encode()),
                ("message-type", b"order"),
                ("content-type", b"application/vnd.order+json"),
                ("sent-at", b"2026-11-23T09:16:45.123456Z"),
                ("correlation-id", b"c-1"),
                ("conversation-id", b"11111111-2222-3333-4444-555555555555"),
                ("parent-id", b"p-1"),
                ("source", b"shop"),
                ("tenant-id", b"t-1"),
                ("user-name", "müller".encode()),
                ("time-to-send", b"2026-11-23T10:16:45.123456Z"),
                ("deliver-by", b"9999-12-31T23:59:59.999999Z"),
                ("attempts", b"2"),
                *FULL_USER_HEADERS,
            ],
        ),
        (
            None,
            b"\x00",
            [
                ("id", str(ID).encode()),
                ("message-type", b"bytes"),
                ("content-type", b"application/octet-stream"),
                ("sent-at", b"2026-11-23T09:16:45.123456Z"),
            ],
        ),
        (b"\xff\x00", None, [("id", str(ID).encode()), ("sent-at", b"(of the batch)"), ("why", b"gone")]),
    ],
    "wolverine": [
        (
            "schlüssel".encode(),
            FULL_VALUE,
            [
                *FULL_USER_HEADERS,
                ("correlation-id", b"c-1"),
                ("id", str(ID).encode()),
                ("conversation-id", b"11111111-2222-3333-4444-555555555555"),
                ("parent-id", b"p-1"),
                ("content-type", b"application/vnd.order+json"),
                ("source", b"shop"),
                ("time-to-send", b"2026-11-23 10:16:45:123456 Z"),
                ("sent-at", b"2026-11-23 09:16:45:123456 Z"),
                ("message-type", b"order"),
                ("tenant-id", b"t-1"),
                ("user-name", "müller".encode()),
                ("deliver-by", b"9999-12-31 23:59:59:999999 Z"),
                ("attempts", b"2"),
                ("wolverine-protocol-version", b"1.0"),
            ],
        ),
        (
            str(ID).encode(),
            b"\x00",
            [
                ("id", str(ID).encode()),
                ("content-type", b"application/octet-stream"),
                ("sent-at", b"2026-11-23 09:16:45:123456 Z"),
                ("message-type", b"bytes"),
                ("attempts", b"0"),
                ("wolverine-protocol-version", b"1.0"),
            ],
        ),
        (b"\xff\x00", None, [("why", b"gone")]),
    ],
    "cloudevents": [
        (
            "schlüssel".encode(),
            FULL_VALUE,
            [
                ("ce_specversion", b"1.0"),
                ("ce_id", str(ID).encode()),
                ("ce_source", b"shop"),
                ("ce_type", b"order"),
                ("ce_time", b"2026-11-23T09:16:45.123456Z"),
                ("content-type", b"application/vnd.order+json"),
                ("ce_correlationid", b"c-1"),
                ("ce_conversationid", b"11111111-2222-3333-4444-555555555555"),
                ("ce_parentid", b"p-1"),
                ("ce_tenantid", b"t-1"),
                ("ce_username", "müller".encode()),
                ("ce_scheduledtime", b"2026-11-23T10:16:45.123456Z"),
                ("ce_expirytime", b"9999-12-31T23:59:59.999999Z"),
                ("ce_attempts", b"2"),
                *FULL_USER_HEADERS,
            ],
        ),
        (
            None,
            b"\x00",
            [
                ("ce_specversion", b"1.0"),
                ("ce_id", str(ID).encode()),
                ("ce_source", b"/producer"),
                ("ce_type", b"bytes"),
                ("ce_time", b"2026-11-23T09:16:45.123456Z"),
                ("content-type", b"application/octet-stream"),
            ],
        ),
        (b"\xff\x00", None, [("why", b"gone")]),
    ],
    "raw": [
        ("schlüssel".encode(), FULL_VALUE, FULL_USER_HEADERS),
        (None, b"\x00", []),
        (b"\xff\x00", None, [("why", b"gone")]),
    ],
}


@pytest.mark.parametrize("read", [read_back, read_back_with_aiokafka])
@pytest.mark.parametrize("wire", WIRES)
def test_the_bytes_of_each_wire_format(
    cluster: MockCluster, wire: str, read: Callable[[str, str], list[Stored]]
) -> None:
    source = "/producer" if wire == "cloudevents" else None  # which is required there
    report = send(cluster, [FULL, MINIMAL, GONE], wire=wire, source=source)
    records = read(cluster.bootstrap_servers, TOPIC)
    # What has no sent_at gets the time of the batch, as its timestamp.
    of_batch = datetime.fromtimestamp(0, timezone.utc) + timedelta(milliseconds=records[1].timestamp)
    for record, expected in zip(records, WIRES[wire], strict=True):
        key, value, headers = expected
        got = list(record.headers)
        for i, (name, text) in enumerate(headers):
            if text == b"(of the batch)":
                assert got[i][0] == name
                assert got[i][1].startswith(of_batch.isoformat(timespec="milliseconds")[:23].encode())
                got[i] = (name, text)
        assert (record.key, record.value, got) == (key, value, headers)
    assert records[0].timestamp == 1_764_000_000_123
    assert records[1].timestamp == records[2].timestamp
    assert [record.offset for record in records] == list(report.offsets) == [0, 1, 2]


def test_defaults_of_the_producer_and_of_the_batch(cluster: MockCluster) -> None:
    class Order(msgspec.Struct):
        __message_type__ = "order.v1"
        total: int

    envelopes = [Envelope(Order(3)), Envelope(Order(4), source="own"), Envelope(None)]
    send(cluster, envelopes, source="shop")
    records = stored(cluster)
    headers = [dict(record.headers) for record in records]
    assert [record.value for record in records] == [b'{"total":3}', b'{"total":4}', b"null"]
    assert [h["source"] for h in headers] == [b"shop", b"own", b"shop"]
    assert [h["message-type"] for h in headers] == [b"order.v1", b"order.v1", b"NoneType"]
    assert {h["content-type"] for h in headers} == {b"application/json"}
    assert [h["id"] for h in headers] == [str(envelope.id).encode() for envelope in envelopes]
    assert len({h["sent-at"] for h in headers}) == 1
    assert len({record.timestamp for record in records}) == 1


# -- keys, partitions, topics, order


def test_empty_is_not_null(cluster: MockCluster) -> None:
    envelopes = [
        Envelope(data=b""),
        Envelope(data=b"", key=""),
        Envelope(data=bytearray(), key=b""),
        Tombstone("", headers={"a": ""}),
        Envelope(data=memoryview(b""), headers=[("a", b""), ("b", None)]),
    ]
    send(cluster, envelopes, wire="raw")
    assert [(record.key, record.value, record.headers) for record in stored(cluster)] == [
        (None, b"", []),
        (b"", b"", []),
        (b"", b"", []),
        (b"", None, [("a", b"")]),
        (None, b"", [("a", b""), ("b", None)]),
    ]


def test_an_empty_body_alone_in_its_batch(cluster: MockCluster) -> None:
    # No buffer is allocated then; the value must not be null all the same.
    for envelope in (Envelope(data=b""), Envelope(data=bytearray()), Tombstone("k")):
        send(cluster, [envelope], wire="raw")
    assert values(cluster) == [b"", b"", None]


def test_each_key_stays_in_one_partition_and_in_order(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic(TOPIC, partitions=6)
    keys = [f"customer-{n}" for n in range(40)]
    with make_producer(kafka_cluster, idempotent=True, max_in_flight=500) as producer:
        pending = []
        for batch in range(20):
            envelopes = [Envelope([batch, i], key=key) for i in range(5) for key in keys]
            pending.append(producer.submit(TOPIC, envelopes))
        reports = [one.wait().raise_for_errors() for one in pending]
    records = stored(kafka_cluster)
    assert len({record.partition for record in records}) == 6
    by_key: dict[bytes | None, list[Stored]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    assert sorted(by_key) == sorted(key.encode() for key in keys)
    for got in by_key.values():
        assert len({record.partition for record in got}) == 1
        assert [json.loads(record.value or b"") for record in got] == [[b, i] for b in range(20) for i in range(5)]
    # The report and the consumer tell the same.
    where = {(record.partition, record.offset): record for record in records}
    for batch, report in enumerate(reports):
        for index, place in enumerate(zip(report.partitions, report.offsets, strict=True)):
            assert json.loads(where[place].value or b"") == [batch, index // len(keys)]
            assert where[place].key == keys[index % len(keys)].encode()


def test_partitions_are_as_asked(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic(TOPIC, partitions=4)
    asked = [3, 0, 0, 2, 1, 3, 3]
    envelopes = [Envelope(i, partition=partition, key="same") for i, partition in enumerate(asked)]
    report = send(kafka_cluster, envelopes)
    assert report.partitions == tuple(asked)
    assert sorted((record.partition, record.value) for record in stored(kafka_cluster)) == sorted(
        (partition, str(i).encode()) for i, partition in enumerate(asked)
    )


def test_partitions_are_librdkafkas_choice_for_the_same_keys(kafka_cluster: MockCluster) -> None:
    # Two producers of one topic must agree where a key belongs, whichever library they use.
    kafka_cluster.create_topic(TOPIC, partitions=12)
    kafka_cluster.create_topic("theirs", partitions=12)
    keys = [f"k{i}".encode() for i in range(100)] + [b"\x00", b"\xff" * 100]
    for config in ({}, {"partitioner": "murmur2_random"}):
        send(kafka_cluster, [Envelope(data=key, key=key) for key in keys], config=config)
        produce(kafka_cluster.bootstrap_servers, "theirs", [{"value": key, "key": key} for key in keys], **config)
    places = [sorted((r.value, r.partition) for r in stored(kafka_cluster, topic)) for topic in (TOPIC, "theirs")]
    assert places[0] == places[1]


def test_an_envelopes_topic_wins(kafka_cluster: MockCluster) -> None:
    for topic in ("a", "b", "c"):
        kafka_cluster.create_topic(topic, partitions=1)
    envelopes = [Envelope(i, topic=topic) for i, topic in enumerate(["a", None, "b", "a", None, "c"])]
    send(kafka_cluster, envelopes, topic="b")
    assert [values(kafka_cluster, topic) for topic in "abc"] == [[b"0", b"3"], [b"1", b"2", b"4"], [b"5"]]
    send(kafka_cluster, [Envelope(9, topic="c")], topic=None)
    assert values(kafka_cluster, "c") == [b"5", b"9"]


def test_many_topics_in_one_batch(kafka_cluster: MockCluster) -> None:
    topics = [f"t{n}" for n in range(50)]
    for topic in topics:
        kafka_cluster.create_topic(topic, partitions=1)
    send(kafka_cluster, [Envelope(i, topic=topics[i % 50]) for i in range(500)], topic=None)
    for n in (0, 1, 25, 49):
        assert values(kafka_cluster, topics[n]) == [str(i).encode() for i in range(n, 500, 50)]


def test_timestamps(cluster: MockCluster) -> None:
    # Kafka's timestamps are milliseconds since 1970, kept to the last one; the batch's base is not their least.
    asked = [1_764_000_000_000, 1, 1_764_000_000_001, 253_402_300_799_999]
    send(cluster, [Envelope(i, timestamp=timestamp) for i, timestamp in enumerate(asked)])
    assert [record.timestamp for record in stored(cluster)] == asked


# -- bodies


def test_kinds_of_buffers(cluster: MockCluster) -> None:
    class Bytes(bytes):
        pass

    bodies = [
        b"bytes",
        Bytes(b"a subclass"),
        bytearray(b"bytearray"),
        memoryview(b"a view"),
        memoryview(bytearray(b"a part of a view"))[2:6],
        memoryview(array.array("I", [1, 2])).cast("B"),
        array.array("H", [1, 2, 3]),
        memoryview(array.array("d", [1.5])),
    ]
    send(cluster, [Envelope(data=body) for body in bodies], wire="raw")
    assert values(cluster) == [bytes(body) for body in bodies]


def test_a_view_with_gaps_is_refused(cluster: MockCluster) -> None:
    with make_producer(cluster) as producer:
        with pytest.raises(kbatch.SerializationError, match="data is not one contiguous buffer") as caught:
            producer.send_batch(TOPIC, [Envelope(data=b"ok"), Envelope(data=memoryview(b"abcdef")[::2])])
        assert (caught.value.index, caught.value.field) == (1, "data")
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_a_buffer_changed_after_submit_does_not_change_what_is_sent(cluster: MockCluster) -> None:
    cluster.set_broker_down(1)
    bodies = [bytearray(b"first body"), bytearray(b"second body"), array.array("B", b"third body")]
    with make_producer(cluster) as producer:
        pending = producer.submit(TOPIC, [Envelope(data=bodies[0]), Envelope(data=memoryview(bodies[1]))])
        pending_too = producer.submit(TOPIC, [Envelope(data=bodies[2])])
        # No export is held either: a bytearray may be resized.
        bodies[0][:] = b"X" * 1_000
        bodies[1][:] = b"Y" * 11
        bodies[2].extend(b"!")
        assert (pending.done(), pending_too.done()) == (False, False)
        cluster.set_broker_up(1)
        pending.wait().raise_for_errors()
        pending_too.wait().raise_for_errors()
    assert values(cluster) == [b"first body", b"second body", b"third body"]


def from_envelopes(key: str, value: str, header: str) -> tuple[Envelope, dict[str, Any]]:
    return Envelope(data=value.encode(), key=key.encode(), headers={"h": header.encode()}), {"wire": "raw"}


def from_an_encoder(key: str, value: str, header: str) -> tuple[Envelope, dict[str, Any]]:
    def encode(message: str, context: kbatch.SerializationContext) -> bytes:
        context.headers.append(("h", f"header{message[5:9]}" * 9))
        return message.encode()

    return Envelope(value, key=key), {"wire": "raw", "encoder": encode}


def from_a_wire_object(key: str, value: str, header: str) -> tuple[Envelope, dict[str, Any]]:
    class Wire:
        def write(self, envelope: Envelope) -> tuple[bytes, bytes, dict[str, bytes]]:
            key, value, header = envelope.message
            return key.encode(), value.encode(), {"h": header.encode()}

    return Envelope([key, value, header]), {"wire": Wire()}


@pytest.mark.parametrize("make", [from_envelopes, from_an_encoder, from_a_wire_object])
def test_borrowed_bytes_outlive_their_names(
    cluster: MockCluster, make: Callable[[str, str, str], tuple[Envelope, dict[str, Any]]]
) -> None:
    # Nothing but the batch in flight refers to bodies, keys and headers.
    cluster.set_broker_down(1)
    expected = [(f"key {i}" * 9, f"value {i:03}" * 99, f"header {i:03}" * 9) for i in range(300)]
    with make_producer(cluster, **make("", "", "")[1]) as producer:
        pending = producer.submit(TOPIC, (make(*texts)[0] for texts in expected))
        gc.collect()
        noise = [bytes([i % 256]) * (i % 1_000) for i in range(20_000)]
        cluster.set_broker_up(1)
        pending.wait().raise_for_errors()
        del noise
    assert [(r.key.decode(), r.value.decode(), r.headers[0][1].decode()) for r in stored(cluster)] == expected


@pytest.mark.allocator
def test_bytes_are_sent_without_a_copy() -> None:
    # Nobody is there: what is in flight has to be somewhere.
    body, count = os.urandom(20_000_000), 20
    config = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0, "message.max.bytes": 30_000_000}
    producer = kbatch.Producer(config)
    before = psutil.Process().memory_info().rss
    producer.submit(TOPIC, [Envelope(data=body) for _ in range(count)], callback=lambda report: None)
    assert len(producer) == count
    assert psutil.Process().memory_info().rss - before < len(body)
    producer.close(0)


@pytest.mark.parametrize("size", [1, 127, 128, 65_535, 65_536, 1_000_000, 2_000_000])
def test_large_bodies(cluster: MockCluster, size: int) -> None:
    body = os.urandom(size)
    config = {"message.max.bytes": 4_000_000}
    send(cluster, [Envelope(data=body), Envelope(data=bytearray(body[::-1]))], wire="raw", config=config)
    assert values(cluster) == [body, body[::-1]]


def test_many_small_and_some_large_messages_in_one_batch(cluster: MockCluster) -> None:
    # The buffer of encoded bodies grows and moves while it is mapped.
    messages = ["x" * (100_000 if i % 50 == 7 else i % 90) for i in range(500)]
    send(cluster, [Envelope(message) for message in messages], wire="raw")
    assert values(cluster) == [json.dumps(message).encode() for message in messages]


# -- encoders, hooks, wire objects


def test_msgpack(cluster: MockCluster) -> None:
    messages = [{"a": [1, 2.5, None]}, "text", b"\x00", None, 2**63]
    send(cluster, [Envelope(message) for message in messages], encoder=msgspec.msgpack.Encoder())
    records = stored(cluster)
    assert [msgspec.msgpack.decode(record.value) for record in records] == messages
    assert {dict(record.headers)["content-type"] for record in records} == {b"application/msgpack"}


def test_what_json_is_made_of(cluster: MockCluster) -> None:
    @dataclass
    class Shop:
        name: str

    class Order(msgspec.Struct):
        id: uuid.UUID
        day: date
        shop: Shop

    send(cluster, [Envelope(Order(ID, date(2026, 11, 29), Shop("Köln"))), Envelope(b"x"), Envelope("x")], wire="raw")
    order = f'{{"id":"{ID}","day":"2026-11-29","shop":{{"name":"Köln"}}}}'
    assert values(cluster) == [order.encode(), b'"eA=="', b'"x"']


def test_json_encoder_with_a_hook(cluster: MockCluster) -> None:
    encoder = msgspec.json.Encoder(enc_hook=lambda value: f"<{value!r}>", decimal_format="number")
    send(cluster, [Envelope({"c": 1 + 2j})], encoder=encoder)
    assert values(cluster) == [b'{"c":"<(1+2j)>"}']


def test_an_encoders_hook_may_use_the_producer(cluster: MockCluster) -> None:
    # The hook runs in the middle of mapping a batch; another batch is mapped and sent meanwhile.
    producer: kbatch.Producer

    def enc_hook(value: object) -> str:
        producer.send_batch(TOPIC, [Envelope("inner")]).raise_for_errors()
        return "outer"

    with make_producer(cluster, wire="raw", encoder=msgspec.json.Encoder(enc_hook=enc_hook)) as producer:
        producer.send_batch(TOPIC, [Envelope("before"), Envelope(object()), Envelope("after")]).raise_for_errors()
    assert values(cluster) == [b'"inner"', b'"before"', b'"outer"', b'"after"']


def test_a_callable_encoder_and_its_context(cluster: MockCluster) -> None:
    contexts: list[kbatch.SerializationContext] = []

    def encode(message: object, context: kbatch.SerializationContext) -> bytes:
        contexts.append(context)
        context.headers.append(("schema-id", b"\x00\x01"))
        context.headers += [("schema-id", "2"), ("none", None)]
        return f"<{message}>".encode()

    envelopes = [Envelope(1, headers={"own": "x"}), Envelope(2, topic=TOPIC), Tombstone("k"), Envelope(data=b"encoded")]
    send(cluster, envelopes, encoder=encode, wire="raw")
    added = [("schema-id", b"\x00\x01"), ("schema-id", b"2"), ("none", None)]
    assert [(record.value, record.headers) for record in stored(cluster)] == [
        (b"<1>", [*added, ("own", b"x")]),
        (b"<2>", added),
        (None, []),
        (b"encoded", []),
    ]
    assert [(context.topic, context.field) for context in contexts] == [(TOPIC, "value")] * 2


def test_what_a_callable_encoder_may_return(cluster: MockCluster) -> None:
    shared = bytearray()

    def encode(message: Any, context: object) -> Any:
        if message == "reused":
            # The encoder's own buffer, filled anew for each message.
            shared[:] = f"{len(shared)}".encode() * 3
            return shared
        return message

    messages = [b"bytes", bytearray(b"bytearray"), memoryview(b"view"), None, b"", "reused", "reused", "reused"]
    send(cluster, [Envelope(message) for message in messages], encoder=encode, wire="raw")
    assert values(cluster) == [b"bytes", b"bytearray", b"view", None, b"", b"000", b"333", b"333"]


def test_confluent_kafkas_serializers_are_encoders(cluster: MockCluster) -> None:
    send(cluster, [Envelope("Größe")], encoder=StringSerializer("utf_8"))
    (record,) = stored(cluster)
    assert record.value == "Größe".encode()
    assert dict(record.headers)["content-type"] == b"application/octet-stream"


def test_header_hook(cluster: MockCluster) -> None:
    calls = itertools.count(1)

    def hook() -> dict[str, str | bytes | None] | None:
        turn = next(calls)
        return None if turn == 2 else {"traceparent": f"00-{turn}", "none": None, "raw": b"\xff"}

    with make_producer(cluster, header_hook=hook) as producer:
        for _ in range(3):
            producer.send_batch(TOPIC, [Envelope(1, headers={"own": "x"}), Tombstone("k")]).raise_for_errors()
        producer.send_batch(TOPIC, [])
    assert next(calls) == 4  # once per batch, and not for an empty one
    tails = [record.headers[-4:] for record in stored(cluster)]
    hooked = [("none", None), ("raw", b"\xff")]
    assert tails[0] == [("traceparent", b"00-1"), *hooked, ("own", b"x")]
    assert tails[1][1:] == [("traceparent", b"00-1"), *hooked]
    assert all("traceparent" not in dict(headers) for headers in tails[2:4])
    assert tails[4] == [("traceparent", b"00-3"), *hooked, ("own", b"x")]


def test_a_header_hook_that_returns_pairs(cluster: MockCluster) -> None:
    send(cluster, [Envelope(1)], wire="raw", header_hook=lambda: [("a", "1"), ("a", "2")])
    assert stored(cluster)[0].headers == [("a", b"1"), ("a", b"2")]


class Custom:
    """Writes what the message says."""

    def write(self, envelope: Envelope) -> Any:
        return envelope.message


def test_a_wire_object(cluster: MockCluster) -> None:
    messages = [
        ("key", b"value", {"a": "1", "b": None}),
        (b"\xff", bytearray(b"changing"), [("a", b"1"), ("a", "2")]),
        (None, None, None),
        ("", b"", ()),
        ["list", memoryview(b"view"), {}],
    ]
    send(cluster, [Envelope(message) for message in messages], wire=Custom(), header_hook=lambda: {"hook": "h"})
    hook = ("hook", b"h")
    assert [(record.key, record.value, record.headers) for record in stored(cluster)] == [
        (b"key", b"value", [hook, ("a", b"1"), ("b", None)]),
        (b"\xff", b"changing", [hook, ("a", b"1"), ("a", b"2")]),
        (None, None, [hook]),
        (b"", b"", [hook]),
        (b"list", b"view", [hook]),
    ]


@pytest.mark.parametrize(
    ("answer", "field", "message"),
    [
        (None, "wire", "the wire format could not write the envelope"),
        (("k", b"v"), "wire", "the wire format could not write the envelope"),
        ((7, b"v", None), "key", "the wire format's key must be str, bytes or None, not int"),
        (("\ud800", b"v", None), "key", "cannot be encoded as UTF-8"),
        (("k", "text", None), "wire", "the wire format's value must be bytes or None, not str"),
        (("k", memoryview(b"abc")[::2], None), "data", "contiguous"),
        (("k", b"v", 7), "wire", "headers must be a mapping"),
        (("k", b"v", {"": "x"}), "headers", "name must not be empty"),
        (("k", b"v", {"x": 1}), "headers['x']", "header 'x' must be str, bytes or None, not int"),
        (("k", b"v" * 1_100_000, None), "message", "more than message.max.bytes"),
    ],
    ids=shown,
)
def test_a_wire_object_that_answers_nonsense(cluster: MockCluster, answer: Any, field: str, message: str) -> None:
    with make_producer(cluster, wire=Custom()) as producer:
        good = Envelope(("k", b"v", None))
        with pytest.raises(kbatch.SerializationError, match=message) as caught:
            producer.send_batch(TOPIC, [good, Envelope(answer), good])
        assert (caught.value.index, caught.value.field) == (1, field)
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


# -- inputs


def test_any_iterable_is_read_once(cluster: MockCluster) -> None:
    def generate() -> Iterator[Envelope]:
        for i in range(3):
            yield Envelope(i)

    class Iterable:
        def __iter__(self) -> Iterator[Envelope]:
            return generate()

    batch = kbatch.OutgoingBatch(generate())
    for envelopes in (generate(), Iterable(), batch, tuple(generate()), dict.fromkeys(generate()).keys()):
        assert len(send(cluster, envelopes, wire="raw")) == 3
    assert values(cluster) == [b"0", b"1", b"2"] * 5


def test_one_envelope_may_be_sent_several_times(cluster: MockCluster) -> None:
    envelope = Envelope({"a": 1}, key="k")
    with make_producer(cluster) as producer:
        producer.send_batch(TOPIC, [envelope] * 3).raise_for_errors()
        producer.send_batch(TOPIC, [envelope]).raise_for_errors()
    assert [(record.key, record.value) for record in stored(cluster)] == [(b"k", b'{"a":1}')] * 4


@pytest.mark.parametrize("envelopes", [[], (), iter([])], ids=shown)
def test_an_empty_batch(cluster: MockCluster, envelopes: Any) -> None:
    with make_producer(cluster) as producer:
        report = producer.send_batch(TOPIC, envelopes)
        assert (len(report), report.ok, report.acked, report.partitions, report.offsets) == (0, True, 0, (), ())
        assert report.raise_for_errors() is report
        pending = producer.submit(None, [])
        assert pending.wait(10).ok
        assert pending.done()
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


@pytest.mark.parametrize(
    "envelopes", [None, 7, Envelope(1), "text", b"bytes", {"a": Envelope(1)}], ids=lambda e: type(e).__name__
)
def test_what_is_no_batch(cluster: MockCluster, envelopes: Any) -> None:
    with make_producer(cluster) as producer:
        with pytest.raises(TypeError):
            producer.send_batch(TOPIC, envelopes)
        with pytest.raises(TypeError):
            producer.submit(TOPIC, envelopes)
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_an_iterable_that_fails_sends_nothing(cluster: MockCluster) -> None:
    def generate() -> Iterator[Envelope]:
        yield Envelope(1)
        raise ZeroDivisionError

    with make_producer(cluster) as producer:
        with pytest.raises(ZeroDivisionError):
            producer.send_batch(TOPIC, generate())
        assert len(producer) == 0
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_a_list_that_an_encoder_changes(cluster: MockCluster) -> None:
    envelopes = [Envelope(i) for i in range(100)]

    def encode(message: int, context: object) -> bytes:
        if message == 3:
            del envelopes[2:]
            gc.collect()
        elif message == 5:
            envelopes[:] = [Envelope("never")] * 500
        return str(message).encode()

    report = send(cluster, envelopes, encoder=encode, wire="raw")
    assert len(report) == 100
    assert values(cluster) == [str(i).encode() for i in range(100)]


def test_a_list_that_another_thread_changes(cluster: MockCluster) -> None:
    envelopes = [Envelope(i) for i in range(2_000)]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            envelopes.append(Envelope(-1))
            del envelopes[1_000]
            envelopes[0] = Envelope(0)

    changing = threading.Thread(target=change)
    with make_producer(cluster, wire="raw") as producer:
        changing.start()
        try:
            reports = [producer.send_batch(TOPIC, envelopes).raise_for_errors() for _ in range(20)]
        finally:
            stop.set()
            changing.join()
    assert sum(map(len, reports)) == len(values(cluster))
    assert all(abs(len(report) - 2_000) <= 1 for report in reports)


# -- sizes


def varint(value: int) -> int:
    """How many bytes Kafka's zig-zag varint of a length takes."""
    value <<= 1
    size = 1
    while value >= 128:
        value >>= 7
        size += 1
    return size


def wire_size(record: Stored) -> int:
    """What librdkafka holds against message.max.bytes: the overhead of a message, its key, value and headers."""
    headers = 0
    for name, value in record.headers:
        name_length, value_length = len(name.encode()), len(value or b"")
        headers += varint(name_length) + name_length + varint(value_length) + value_length
    return 36 + len(record.key or b"") + len(record.value or b"") + headers


LIMIT = 20_000
SHAPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a key": {"key": "käy"},
    "a header": {"headers": {"name": "value"}},
    "a null header": {"headers": {"none": None, "empty": b""}},
    "many headers": {"headers": [(f"name{i}", "v" * i) for i in range(100)]},
    "short of a varint's next byte": {"headers": {"n" * 63: "v" * 63, "m": "v" * 8_191}},
    "at a varint's next byte": {"headers": {"n" * 64: "v" * 64, "m": "v" * 8_192}},
    "unicode": {"key": "ö" * 99, "headers": {"ö" * 40: "ö" * 40}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_limit_is_librdkafkas_to_the_byte(cluster: MockCluster, shape: str) -> None:
    fields = SHAPES[shape]
    pairs = [(name, value) for name, value in Envelope(0, **fields).headers]
    theirs: dict[str, Any] = {"headers": pairs} if pairs else {}
    if "key" in fields:
        theirs["key"] = fields["key"]
    empty = Stored(0, 0, 0, fields.get("key", "").encode(), b"", [
        (name, value.encode() if isinstance(value, str) else value) for name, value in pairs
    ])  # fmt: skip
    room = LIMIT - wire_size(empty)
    config = {"message.max.bytes": LIMIT, "enable.idempotence": False}
    with make_producer(cluster, wire="raw", config=config) as producer:
        for size in (room - 1, room):
            producer.send_batch(TOPIC, [Envelope(data=b"b" * size, **fields)]).raise_for_errors()
        with pytest.raises(kbatch.SerializationError, match=f"would take {LIMIT + 1} bytes") as caught:
            producer.send_batch(TOPIC, [Envelope(1), Envelope(data=b"b" * (room + 1), **fields)])
        assert (caught.value.index, caught.value.field) == (1, "data")
        assert f"more than message.max.bytes={LIMIT}" in str(caught.value)
        message = "m" * (room - 2)
        producer.send_batch(TOPIC, [Envelope(message, **fields)]).raise_for_errors()
        with pytest.raises(kbatch.SerializationError) as caught:
            producer.send_batch(TOPIC, [Envelope(message + "m", **fields)])
        assert (caught.value.index, caught.value.field) == (0, "message")
    # Its own client draws the line in the same place.
    assert produce(cluster.bootstrap_servers, TOPIC, [{"value": b"b" * room, **theirs}], **config) == [None]
    with pytest.raises(Exception, match="MSG_SIZE_TOO_LARGE"):
        produce(cluster.bootstrap_servers, TOPIC, [{"value": b"b" * (room + 1), **theirs}], **config)
    assert [wire_size(record) for record in stored(cluster)] == [LIMIT - 1, LIMIT, LIMIT, LIMIT]


@pytest.mark.parametrize(
    "wire", ["kbatch", "wolverine", "cloudevents", Custom()], ids=["kbatch", "wolverine", "cloudevents", "custom"]
)
def test_the_size_limit_counts_the_wire_formats_own_headers(cluster: MockCluster, wire: Any) -> None:
    def envelope(size: int) -> Envelope:
        if isinstance(wire, Custom):
            return Envelope(("key", b"b" * size, {"a": "1", "b": None}))
        return FULL.replace(data=b"b" * size)

    config = {"message.max.bytes": LIMIT}
    send(cluster, [envelope(0)], wire=wire, config=config)
    room = LIMIT - wire_size(stored(cluster)[0])
    with make_producer(cluster, wire=wire, config=config) as producer:
        producer.send_batch(TOPIC, [envelope(room), envelope(room - 1)]).raise_for_errors()
        with pytest.raises(kbatch.SerializationError, match=f"would take {LIMIT + 1} bytes"):
            producer.send_batch(TOPIC, [envelope(room), envelope(room + 1)])
    assert [wire_size(record) for record in stored(cluster)][1:] == [LIMIT, LIMIT - 1]


@pytest.mark.parametrize("key", ["k" * (LIMIT - 36), b"k" * (LIMIT - 36)], ids=["text", "bytes"])
def test_a_key_at_the_limit(cluster: MockCluster, key: Any) -> None:
    with make_producer(cluster, wire="raw", config={"message.max.bytes": LIMIT}) as producer:
        producer.send_batch(TOPIC, [Envelope(data=b"", key=key), Tombstone(key)]).raise_for_errors()
        with pytest.raises(kbatch.SerializationError, match=f"would take {LIMIT + 1} bytes"):
            producer.send_batch(TOPIC, [Tombstone(key + key[:1])])
    assert [len(record.key or b"") for record in stored(cluster)] == [LIMIT - 36] * 2


def test_a_body_that_can_never_be_queued_is_refused(cluster: MockCluster) -> None:
    config = {"queue.buffering.max.kbytes": 1}
    with make_producer(cluster, wire="raw", config=config) as producer:
        for kind in (bytes, bytearray):
            with pytest.raises(
                kbatch.SerializationError, match=r"1025 bytes can never fit into queue\.buffering\.max\.kbytes=1"
            ) as caught:
                producer.send_batch(TOPIC, [Envelope(data=b"b"), Envelope(data=kind(1_025))])
            assert (caught.value.index, caught.value.field) == (1, "data")
        # Those that fit are sent, although the queue holds one at a time. Keys and headers do not count.
        envelopes = [
            Envelope(data=b"%d" % (i % 10) * 1_024, key="k" * 500, headers={"h": "h" * 500}) for i in range(20)
        ]
        producer.send_batch(TOPIC, envelopes).raise_for_errors()
    assert values(cluster) == [b"%d" % (i % 10) * 1_024 for i in range(20)]


def test_a_batch_larger_than_librdkafkas_queue(cluster: MockCluster) -> None:
    config = {"queue.buffering.max.messages": 100}
    with make_producer(cluster, wire="raw", config=config) as producer:
        report = producer.send_batch(TOPIC, (Envelope(i, headers={"n": str(i)}) for i in range(5_000)))
        report.raise_for_errors()
        assert producer.stats()["failed"] == 0
    records = stored(cluster)
    assert [record.value for record in records] == [str(i).encode() for i in range(5_000)]
    assert [record.headers for record in records] == [[("n", str(i).encode())] for i in range(5_000)]
    assert report.offsets == tuple(range(5_000))


@pytest.mark.parametrize("wire", ["raw", "kbatch"])
def test_a_hundred_thousand_headers_on_one_envelope(cluster: MockCluster, wire: str) -> None:
    own = 0 if wire == "raw" else 4
    headers = [(f"h{i % 7}", None if i % 11 == 0 else str(i)) for i in range(100_000 - own)]
    envelopes = [Envelope(1), Envelope(2, headers=headers), Envelope(3)]
    send(cluster, envelopes, wire=wire, config={"message.max.bytes": 4_000_000})
    with make_producer(cluster, wire=wire, config={"message.max.bytes": 500_000}) as producer:
        with pytest.raises(kbatch.SerializationError, match=r"more than message\.max\.bytes=500000") as caught:
            producer.send_batch(TOPIC, envelopes)
        assert caught.value.index == 1
    # librdkafka's consumer takes 100,000 headers and, without a word, none of a record that has more.
    read = read_back if wire == "raw" else read_back_with_aiokafka
    records = read(cluster.bootstrap_servers, TOPIC)
    assert [record.value for record in records] == [b"1", b"2", b"3"]
    expected = [(name, None if value is None else value.encode()) for name, value in headers]
    assert records[1].headers[own:] == expected
    assert [len(record.headers) for record in records] == [own, 100_000, own]


# -- what cannot be mapped: nothing of its batch is sent


class Unwritable:
    """No encoder takes it."""


SURROGATE = "a\ud800b"
TEXT_FIELDS = [
    "message_type",
    "content_type",
    "source",
    "correlation_id",
    "conversation_id",
    "parent_id",
    "tenant_id",
    "user_name",
    "topic",
    "key",
]

BAD: list[tuple[str, Callable[[], Any], str, str]] = [
    ("unwritable", lambda: Envelope(Unwritable()), "message", "message cannot be encoded: .*Unwritable"),
    ("half written", lambda: Envelope(["x" * 5_000, Unwritable()]), "message", "message cannot be encoded"),
    ("surrogate in the body", lambda: Envelope({"a": SURROGATE}), "message", "message cannot be encoded"),
    ("too large", lambda: Envelope("x" * 1_100_000), "message", "message.max.bytes=1000000"),
    ("too large a key", lambda: Envelope(1, key="x" * 1_100_000), "message", "message.max.bytes=1000000"),
    ("key", lambda: Envelope(1, key=7), "key", "key must be str, bytes or None, not int"),
    ("bytearray key", lambda: Envelope(1, key=bytearray(b"k")), "key", "key must be str, bytes or None, not bytearray"),
    ("topic", lambda: Envelope(1, topic=7), "topic", "topic must be str, not int"),
    ("no topic name", lambda: Envelope(1, topic=""), "topic", "topic '' is not a Kafka topic name"),
    ("spaces", lambda: Envelope(1, topic="a b"), "topic", "topic 'a b' is not a Kafka topic name"),
    ("newline", lambda: Envelope(1, topic="ab\n"), "topic", r"topic 'ab\\n' is not a Kafka topic name"),
    ("dots", lambda: Envelope(1, topic=".."), "topic", r"topic '\.\.' is not a Kafka topic name"),
    ("NUL", lambda: Envelope(1, topic="a\0"), "topic", r"topic 'a\\x00' is not a Kafka topic name"),
    ("known topic, NUL", lambda: Envelope(1, topic=f"{TOPIC}\0"), "topic", r"\\x00' is not a Kafka topic name"),
    ("long topic", lambda: Envelope(1, topic="x" * 250), "topic", "is not a Kafka topic name: 1 to 249"),
    ("header name", lambda: Envelope(1, headers={7: "x"}), "headers", "a header's name must be str, not int"),
    ("header name None", lambda: Envelope(1, headers={None: "x"}), "headers", "name must be str, not NoneType"),
    ("header name bytes", lambda: Envelope(1, headers={b"a": "x"}), "headers", "name must be str, not bytes"),
    ("header name empty", lambda: Envelope(1, headers={"": "x"}), "headers", "a header's name must not be empty"),
    ("header name NUL", lambda: Envelope(1, headers={"a\0": "x"}), r"headers['a\x00']", "NUL"),
    (
        "header value",
        lambda: Envelope(1, headers={"x": 7}),
        "headers['x']",
        "header 'x' must be str, bytes or None, not",
    ),
    ("header float", lambda: Envelope(1, headers={"x": 1.5}), "headers['x']", "or None, not float"),
    ("header view", lambda: Envelope(1, headers={"x": memoryview(b"")}), "headers['x']", "or None, not memoryview"),
    ("reserved", lambda: Envelope(1, headers={"content-type": "x"}), "headers['content-type']", "is reserved"),
    ("reserved too", lambda: Tombstone("k", headers=[("a", "1"), ("id", "x")]), "headers['id']", "is reserved"),
    ("surrogate name", lambda: Envelope(1, headers={SURROGATE: "x"}), f"headers[{SURROGATE!r}]", "UTF-8: surrogates"),
    ("surrogate value", lambda: Envelope(1, headers={"x": SURROGATE}), "headers['x']", "UTF-8: surrogates"),
    ("None", lambda: None, "envelope", "expected a kbatch.Envelope, not NoneType"),
    ("dict", lambda: {"a": 1}, "envelope", "expected a kbatch.Envelope, not dict"),
    ("class", lambda: Envelope, "envelope", "expected a kbatch.Envelope, not type"),
    *(
        (
            f"surrogate in {field}",
            lambda f=field: Envelope(1, **{f: SURROGATE}),
            field,
            f"{field} cannot be encoded as UTF-8",
        )
        for field in TEXT_FIELDS
    ),
    *(
        (f"bytes as {field}", lambda f=field: Envelope(1, **{f: b"x"}), field, f"{field} must be str, not bytes")
        for field in TEXT_FIELDS
        if field != "key"
    ),
]


@pytest.mark.parametrize(("make", "field", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_one_that_cannot_be_mapped_keeps_all_from_the_wire(
    cluster: MockCluster, make: Callable[[], Any], field: str, message: str
) -> None:
    with make_producer(cluster) as producer:
        for index in (0, 50, 99):
            envelopes: list[Any] = [Envelope({"i": i}, key=f"k{i}", headers={"n": str(i)}) for i in range(100)]
            envelopes[index] = make()
            for give in (envelopes, iter(envelopes)):
                with pytest.raises(kbatch.SerializationError, match=message) as caught:
                    producer.send_batch(TOPIC, give)
                error = caught.value
                id = getattr(envelopes[index], "id", None) if isinstance(envelopes[index], Envelope) else None
                assert (error.index, error.envelope_id, error.field) == (index, id, field)
                assert str(error).startswith(f"envelope {index} (id {id}): " if id else f"envelope {index}: ")
            with pytest.raises(kbatch.SerializationError):
                producer.submit(TOPIC, envelopes, callback=lambda report: pytest.fail("called"))
        assert (len(producer), pinned_buffers()) == (0, 0)
        assert producer.stats()["envelopes"] == 0
        # The producer is as good as new.
        producer.send_batch(TOPIC, [Envelope("good")]).raise_for_errors()
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 1}


@pytest.mark.parametrize(
    ("options", "index", "field", "message"),
    [
        ({"source": SURROGATE}, 0, "source", "source cannot be encoded as UTF-8"),
        ({"header_hook": lambda: {"x": 7}}, 0, "header_hook['x']", "must be str, bytes or None, not int"),
        ({"header_hook": lambda: {"id": "x"}}, 0, "header_hook['id']", "is reserved"),
        ({"header_hook": lambda: {SURROGATE: "x"}}, 0, f"header_hook[{SURROGATE!r}]", "UTF-8"),
        ({"header_hook": lambda: 7}, None, "header_hook", "headers must be a mapping"),
        ({"header_hook": lambda: 1 / 0}, None, "header_hook", "header_hook failed: division by zero"),
        ({"encoder": lambda m, c: 1 / 0}, 0, "message", "message cannot be encoded: division by zero"),
        ({"encoder": lambda m, c: "text"}, 0, "message", "the encoder must return bytes, not str"),
        ({"encoder": lambda m, c: memoryview(b"abc")[::2]}, 0, "data", "contiguous"),
        (
            {"encoder": lambda m, c: c.headers.append(7) or b""},
            0,
            "message",
            r"the encoder's headers\[0\] must be a pair",
        ),
        ({"encoder": lambda m, c: c.headers.append(("x", 7)) or b""}, 0, "encoder headers['x']", "not int"),
        ({"encoder": lambda m, c: c.headers.append(("id", "7")) or b""}, 0, "encoder headers['id']", "is reserved"),
        ({"wire": "wolverine", "source": SURROGATE}, 0, "source", "source cannot be encoded as UTF-8"),
        ({"wire": "cloudevents"}, 0, "source", "needs a source: give one to the envelope or to the producer"),
        ({"wire": "cloudevents", "source": ""}, 0, "source", "source is empty"),
        (
            {"wire": "cloudevents", "source": "/", "header_hook": lambda: {"ce_trace-parent": "x"}},
            0,
            "header_hook['ce_trace-parent']",
            "not an attribute of CloudEvents: it must be ce_ and then a-z and 0-9 only",
        ),
    ],
    ids=shown,
)
def test_what_the_producers_options_get_wrong(
    cluster: MockCluster, options: dict[str, Any], index: int | None, field: str, message: str
) -> None:
    with make_producer(cluster, **options) as producer:
        with pytest.raises(kbatch.SerializationError, match=message) as caught:
            producer.send_batch(TOPIC, [Envelope(1), Envelope(2)])
        assert (caught.value.index, caught.value.field) == (index, field)
        assert caught.value.report is None
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_wolverines_conversation_id_is_a_guid(cluster: MockCluster) -> None:
    with make_producer(cluster, wire="wolverine") as producer:
        with pytest.raises(kbatch.SerializationError, match="conversation_id must be a UUID") as caught:
            producer.send_batch(TOPIC, [Envelope(1, conversation_id="c-2")])
        assert caught.value.field == "conversation_id"


@pytest.mark.parametrize("topic", [None, "", "a b", SURROGATE, 7, b"orders"], ids=repr)
def test_a_batchs_topic(cluster: MockCluster, topic: Any) -> None:
    with make_producer(cluster) as producer:
        # It is looked at where an envelope needs it.
        producer.send_batch(topic, [Envelope(1, topic=TOPIC)]).raise_for_errors()
        with pytest.raises(kbatch.SerializationError, match="topic") as caught:
            producer.send_batch(topic, [Envelope(1, topic=TOPIC), Envelope(2)])
        assert (caught.value.index, caught.value.field) == (1, "topic")
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 1}


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_mistake_of_the_envelope_is_raised_as_it_is(
    cluster: MockCluster, error: type[BaseException]
) -> None:
    def encode(message: object, context: object) -> bytes:
        raise error

    for options in ({"encoder": encode}, {"header_hook": lambda: encode(1, 1)}):
        with make_producer(cluster, **options) as producer:
            with pytest.raises(error):
                producer.send_batch(TOPIC, [Envelope(1)])
            assert len(producer) == 0
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


# -- leaks


def leaks_of(
    step: Callable[[], object],
    watched: list[Any],
    repeat: int,
    *,
    is_little: Callable[[int, list[int]], bool] = lambda objects, references: True,
) -> tuple[int, list[int]]:
    """How many objects, and references to each of `watched`, are left over after `repeat` steps.

    What other threads hold goes within some seconds, which are waited for unless it is little.
    """
    for _ in range(5):  # caches fill
        step()
    gc.collect()
    before = len(gc.get_objects())
    references = [sys.getrefcount(thing) for thing in watched]
    for _ in range(repeat):
        step()
    end = time.monotonic() + 20
    while True:
        gc.collect()
        objects = len(gc.get_objects()) - before
        now = [sys.getrefcount(thing) for thing in watched]
        more = [count - earlier for count, earlier in zip(now, references, strict=True)]
        if is_little(objects, more) or time.monotonic() > end:
            return objects, more
        time.sleep(0.05)


@pytest.mark.parametrize("index", [0, 25, 49])
@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents", "raw", "custom"])
def test_the_error_path_leaks_nothing(kafka_cluster: MockCluster, wire: str, index: int) -> None:
    body, view, key, name, value, text = (
        b"body" * 100,
        bytearray(b"view"),
        "kéy" * 9,
        "namé" * 9,
        "valué" * 9,
        "téxt" * 9,
    )
    hooked = {name: value}
    written = (key, body, hooked)

    def encode(message: Any, context: kbatch.SerializationContext) -> bytes:
        context.headers.append((name, value))
        return body

    class Wire:
        def write(self, envelope: Envelope) -> Any:
            if isinstance(envelope.message, Unwritable):
                raise ValueError
            return written

    envelopes: list[Any] = [
        [Envelope(1, key=key, headers=[(name, value)], user_name=text), Envelope(data=body), Envelope(data=view)][i % 3]
        for i in range(50)
    ]
    watched = [body, view, key, name, value, text, hooked, written, envelopes[3], envelopes[4], encode]
    bad: list[Any] = [
        None,
        Envelope(Unwritable(), headers={name: Unwritable()}),
        Envelope(1, key=7),
        Envelope(data=memoryview(b"abc")[::2]),
        Envelope(1, headers={name: value, SURROGATE: value}),
        Envelope(data=b"x" * 1_100_000),
    ]
    if wire == "custom":
        bad = [None, Envelope(Unwritable()), Envelope(1, topic=SURROGATE)]
    given = Wire() if wire == "custom" else wire
    options = {"wire": given, "encoder": encode, "header_hook": lambda: hooked, "source": text}
    with make_producer(kafka_cluster, **options) as producer:

        def step() -> None:
            for broken in bad:
                batch = [*envelopes[:index], broken, *envelopes[index + 1 :]]
                try:
                    producer.send_batch(TOPIC, batch)
                except kbatch.SerializationError:
                    continue
                raise AssertionError(f"{broken!r} was sent")

        objects, references = leaks_of(step, watched, 1_000 // len(bad))
        assert references == [0] * len(watched)
        assert objects < 50
        assert pinned_buffers() == 0
        view.extend(b"!")  # no export is held


@pytest.mark.allocator
def test_the_error_path_leaks_no_memory(kafka_cluster: MockCluster) -> None:
    # What is not a Python object: records, headers, buffers of bodies. Each batch takes some 300 KB of them.
    envelopes: list[Any] = [Envelope("x" * 200, headers={f"h{i}": "v" for i in range(20)}) for _ in range(500)]
    envelopes.append(None)
    with make_producer(kafka_cluster) as producer:

        def step() -> None:
            with pytest.raises(kbatch.SerializationError):
                producer.send_batch(TOPIC, envelopes)

        for _ in range(50):
            step()
        before = psutil.Process().memory_info().rss
        for _ in range(1_000):
            step()
        assert psutil.Process().memory_info().rss - before < 30_000_000  # a leak of one part would be ten times that


@pytest.mark.allocator
@pytest.mark.parametrize("headers", [20, 70], ids=["lists that are used again", "lists that are not"])
def test_what_librdkafka_refuses_leaks_no_memory(cluster: MockCluster, headers: int) -> None:
    # The list of headers stays the caller's when a message is refused; each batch has some 1 MB of them.
    count = 10_000 // headers
    envelopes = [Envelope(1, partition=9, headers={f"h{i}": "v" * 30 for i in range(headers)}) for _ in range(count)]
    with make_producer(cluster) as producer:

        def step() -> None:
            report = producer.send_batch(TOPIC, envelopes)
            assert (report.failed, report.errors[0].name) == (count, "_UNKNOWN_PARTITION")

        for _ in range(20):
            step()
        before = psutil.Process().memory_info().rss
        for _ in range(200):
            step()
        assert psutil.Process().memory_info().rss - before < 20_000_000


def test_sending_leaks_nothing(cluster: MockCluster) -> None:
    body, view, key, value = b"body" * 100, bytearray(b"view"), "kéy" * 9, "valué" * 9
    envelopes = [
        Envelope(data=body, key=key),
        Envelope(data=view, headers={"a": value}),
        Envelope({"a": 1}),
        Tombstone(key),
    ]
    watched = [body, view, key, value, *envelopes]
    with make_producer(cluster) as producer:

        def step() -> None:
            producer.send_batch(TOPIC, envelopes).raise_for_errors()
            report = producer.submit(TOPIC, envelopes, callback=lambda report: None).wait()
            assert (len(report.offsets), dict(report.errors)) == (4, {})
            producer.submit(TOPIC, envelopes)  # nobody waits for it
            producer.flush()

        objects, references = leaks_of(step, watched, 100)
        assert producer.stats()["pooled_bytes"] < 20_000_000
    # Batches that nobody waits for are given back a little later: some may still be held at any one time.
    assert objects < 100
    assert all(count <= 8 for count in references)
    assert pinned_buffers() == 0


# -- outcomes


def test_a_report_can_be_kept(cluster: MockCluster) -> None:
    report = send(cluster, [Envelope(i) for i in range(10)])
    assert report.latency_s > 0
    assert (len(report), report.acked, report.failed, report.expired) == (10, 10, 0, 0)
    assert (dict(report.errors), report.expired_indices) == ({}, ())
    again = pickle.loads(pickle.dumps(report))
    for made in (report, again):
        assert made.offsets == tuple(range(10))
        assert made.partitions == (0,) * 10
        assert made.latency_s == report.latency_s
        assert (made.ok, bool(made), made.acked) == (True, True, 10)
        assert made.raise_for_errors() is made
    assert repr(again) == repr(report)


def test_the_time_of_both_phases_is_counted(cluster: MockCluster) -> None:
    with make_producer(cluster) as producer:
        phases = [(0, 0)]
        for _ in range(2):
            producer.send_batch(TOPIC, [Envelope(i) for i in range(100)])
            stats = producer.stats()
            phases.append((stats["map_ns"], stats["enqueue_ns"]))
    none, first, second = phases
    assert none[0] < first[0] < second[0]
    assert none[1] < first[1] < second[1]


@pytest.mark.allocator
def test_nothing_per_message_is_a_python_object_before_it_is_asked_for(cluster: MockCluster) -> None:
    envelopes = [Envelope(data=b"x")] * 20_000
    with make_producer(cluster, wire="raw") as producer:
        producer.send_batch(TOPIC, envelopes[:1]).raise_for_errors()
        gc.collect()
        before = sys.getallocatedblocks()
        report = producer.send_batch(TOPIC, envelopes)
        assert (report.ok, report.acked) == (True, 20_000)
        gc.collect()
        assert sys.getallocatedblocks() - before < 1_000
        assert report.offsets[-1] == 20_000
        assert sys.getallocatedblocks() - before > 10_000  # these are objects


def test_an_expired_envelope_is_not_sent_and_no_failure(cluster: MockCluster) -> None:
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    future = datetime(9000, 1, 1, tzinfo=timezone.utc)
    envelopes = [Envelope(i, deliver_by=[None, past, future][i % 3]) for i in range(9)]
    with make_producer(cluster) as producer:
        report = producer.send_batch(TOPIC, envelopes).raise_for_errors()
        assert (report.ok, report.acked, report.failed, report.expired) == (True, 6, 0, 3)
        assert report.expired_indices == (1, 4, 7)
        assert report.offsets == (0, -1, 1, 2, -1, 3, 4, -1, 5)
        assert report.partitions == (0, -1, 0, 0, -1, 0, 0, -1, 0)
        again = pickle.loads(pickle.dumps(report))
        assert (again.expired_indices, again.ok) == ((1, 4, 7), True)
        all_of_them = producer.send_batch(TOPIC, [Envelope(1, deliver_by=past)] * 3)
        assert (all_of_them.ok, all_of_them.acked, all_of_them.expired) == (True, 0, 3)
        assert len(producer) == 0
    assert values(cluster) == [b"0", b"2", b"3", b"5", b"6", b"8"]


def test_what_has_expired_is_not_even_encoded(cluster: MockCluster) -> None:
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    report = send(cluster, [Envelope(Unwritable(), deliver_by=past), Envelope(1)])
    assert report.expired_indices == (0,)


FAST = {"topic.metadata.refresh.fast.interval.ms": 10, "topic.metadata.propagation.max.ms": 200}


def test_an_unknown_topic(kafka_cluster: MockCluster) -> None:
    kafka_cluster.set_topic_error("gone", "UNKNOWN_TOPIC_OR_PART")
    kafka_cluster.create_topic(TOPIC, partitions=1)
    with make_producer(kafka_cluster, config=FAST) as producer:
        # The first time librdkafka waits for the topic, then it knows.
        for _ in range(2):
            report = producer.send_batch("gone", [Envelope(i) for i in range(3)])
            assert (report.ok, bool(report), report.acked, report.failed) == (False, False, 0, 3)
            assert {error.name for error in report.errors.values()} <= {"_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART"}
            assert list(report.errors) == [0, 1, 2]
            assert not any(error.possibly_persisted for error in report.errors.values())
            assert report.offsets == (-1, -1, -1)
            with pytest.raises(kbatch.UnknownTopicError, match="3 of 3 envelopes failed; the first is envelope 0"):
                report.raise_for_errors()
        # Only those of the unknown topic fail.
        report = producer.send_batch(TOPIC, [Envelope(1), Envelope(2, topic="gone"), Envelope(3)])
        assert (report.acked, list(report.errors)) == (2, [1])
        with pytest.raises(kbatch.UnknownTopicError) as caught:
            report.raise_for_errors()
        assert caught.value.report is report
    assert values(kafka_cluster) == [b"1", b"3"]


def test_an_unknown_partition(cluster: MockCluster) -> None:
    with make_producer(cluster) as producer:
        report = producer.send_batch(TOPIC, [Envelope(1), Envelope(2, partition=7), Envelope(3, partition=0)])
        assert (report.acked, list(report.errors)) == (2, [1])
        assert report.errors[1].name == "_UNKNOWN_PARTITION"
        assert report.partitions == (0, 7, 0)
        with pytest.raises(kbatch.UnknownTopicError):
            report.raise_for_errors()
        # Known by now: the second time it is refused at once.
        again = producer.send_batch(TOPIC, [Envelope(2, partition=7)])
        assert again.errors[0].name == "_UNKNOWN_PARTITION"
    assert values(cluster) == [b"1", b"3"]


def test_a_failure_and_what_the_report_says_of_it(cluster: MockCluster) -> None:
    from kbatch.testing import ApiKey

    cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"] * 5)
    with make_producer(cluster, idempotent=True) as producer:
        report = producer.send_batch(TOPIC, [Envelope(i) for i in range(5)])
        again = pickle.loads(pickle.dumps(report))
        for made in (report, again):
            assert (made.ok, made.acked, made.failed) == (False, 0, 5)
            assert [error.name for error in made.errors.values()] == ["MSG_SIZE_TOO_LARGE"] * 5
            error = made.errors[4]
            assert (error.code, error.retriable, error.fatal, error.possibly_persisted) == (10, False, False, False)
            assert made.partitions == (0,) * 5
            assert made.offsets == (-1,) * 5
            with pytest.raises(kbatch.BatchError, match="5 of 5 envelopes failed") as caught:
                made.raise_for_errors()
            assert type(caught.value) is kbatch.BatchError
            assert pickle.loads(pickle.dumps(caught.value)).report.failed == 5
        assert producer.stats()["failed"] == 5
        cluster.clear_request_errors(ApiKey.PRODUCE)
        # Idempotence: the producer goes on after a message that failed for good.
        producer.send_batch(TOPIC, [Envelope("next")]).raise_for_errors()
    assert values(cluster) == [b'"next"']


def test_pending_batches(cluster: MockCluster) -> None:
    cluster.set_broker_down(1)
    with make_producer(cluster) as producer:
        pending = producer.submit(TOPIC, [Envelope(i) for i in range(4)])
        assert (len(pending), pending.done(), repr(pending)) == (4, False, "<PendingBatch of 4 envelopes, in flight>")
        assert math.isnan(pending.latency_s)
        with pytest.raises(kbatch.BatchPendingError, match="no answer yet"):
            pending.report  # noqa: B018
        with pytest.raises(TypeError):
            pickle.dumps(pending)
        assert producer.stats()["pinned_buffers"] == 1
        with later(0.2, cluster.set_broker_up):  # on a thread, which needs the GIL
            assert pending.wait() is pending.wait()
        assert pending.report is pending.wait(0)
        assert repr(pending) == "<PendingBatch of 4 envelopes, done>"
        assert pending.latency_s == pending.report.latency_s
    assert len(values(cluster)) == 4


def test_compression(cluster: MockCluster) -> None:
    message = "compressible " * 1_000
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        send(cluster, [Envelope(data=message.encode())] * 20, wire="raw", config={"compression.type": codec})
    assert values(cluster) == [message.encode()] * 80


def test_idempotent_or_not(cluster: MockCluster) -> None:
    reports = [
        send(cluster, [Envelope(i) for i in range(100)], wire="raw", idempotent=True),
        send(cluster, [Envelope(i) for i in range(100, 200)], wire="raw"),
    ]
    with pytest.warns(UserWarning, match="is lost if the partition's leader fails"):
        reports.append(send(cluster, [Envelope(200)], wire="raw", config={"acks": 1}))
    assert [report.acked for report in reports] == [100, 100, 1]
    assert values(cluster) == [str(i).encode() for i in range(201)]


def test_what_librdkafka_calls_possibly_persisted_is_never_told_as_stored(cluster: MockCluster) -> None:
    # The configuration refuses acks=0; here the broker's answer is switched off behind its back.
    with make_producer(cluster, config={"max.in.flight": 1}) as producer:
        producer._parsed.native.set("acks", "0")
        report = producer.send_batch(TOPIC, [Envelope(i) for i in range(3)])
    assert (report.acked, report.failed) == (0, 3)
    assert all(error.possibly_persisted for error in report.errors.values())
    assert report.offsets == (-1, -1, -1)
    assert producer.stats()["acked"] == 0


# -- the reason for it all


def test_a_batch_is_few_requests_and_one_at_a_time_is_many(cluster: MockCluster) -> None:
    envelopes = [Envelope({"order": i}, key=f"k{i}") for i in range(1_000)]
    with make_producer(cluster, idempotent=True, config={"linger.ms": 50}) as producer:
        # What is queued before librdkafka knows the partition's leader may go in a request of its own.
        producer.send_batch(TOPIC, [Envelope({"order": "first"})]).raise_for_errors()
        cluster.start_request_tracking()
        producer.send_batch(TOPIC, envelopes).raise_for_errors()
        assert cluster.produce_requests() <= 2
    with make_producer(cluster, idempotent=True) as producer:
        cluster.start_request_tracking()
        for envelope in envelopes:
            producer.send_batch(TOPIC, [envelope]).raise_for_errors()
        assert cluster.produce_requests() == 1_000
    assert [json.loads(v or b"")["order"] for v in values(cluster)] == ["first", *range(1_000), *range(1_000)]


def test_submitted_batches_share_requests(cluster: MockCluster) -> None:
    with make_producer(cluster, config={"linger.ms": 300}) as producer:
        producer.send_batch(TOPIC, [Envelope("first")]).raise_for_errors()
        cluster.start_request_tracking()
        pending = [producer.submit(TOPIC, [Envelope([batch, i]) for i in range(10)]) for batch in range(100)]
        for one in pending:
            one.wait().raise_for_errors()
        assert cluster.produce_requests() <= 3
    messages = [json.loads(value or b"") for value in values(cluster)]
    assert messages == ["first", *([batch, i] for batch in range(100) for i in range(10))]
