"""What a real broker stores: every wire format and codec, read back byte for byte by clients that are not kbatch."""

import collections
import dataclasses
import random
import re
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest

import kbatch
from kbatch import Envelope, Tombstone
from tests import mapping, strategies, vectors
from tests.kafka.cluster import ExternalCluster, KafkaCluster
from tests.messages import ENCODERS
from tests.mock.clients import Stored, read_back, read_back_with_aiokafka
from tests.reference import Record, Rejected, Setting, Spec, map_batch

PARTITIONS = 4
READERS = [read_back, read_back_with_aiokafka]
WIRES = ["kbatch", "wolverine", "cloudevents", "raw"]
# Beside each envelope's own headers; the wire formats do not know it.
NUMBER = "test-number"


def make_producer(kafka: ExternalCluster, setting: Setting, **config: Any) -> kbatch.Producer:
    return kbatch.Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0, **config},
        wire=setting.wire,
        encoder=setting.encoder,
        source=setting.source,
        header_hook=(lambda: setting.hook_headers) if setting.hook_headers else None,
        carry_scheduled_time=setting.carry_scheduled_time,
    )


def as_stored(record: Record, partition: int, offset: int) -> Stored:
    return Stored(partition, offset, record.timestamp, record.key, record.value, record.headers)


def timeless(record: Stored, spec: Spec) -> Stored:
    """The record as it is at any time: the batch's time is all 0."""
    if spec.arguments.get("timestamp") is None:
        record = record._replace(timestamp=0)
    if spec.arguments.get("sent_at") is None:
        headers = [(n, re.sub(rb"\d", b"0", v) if n in ("sent-at", "ce_time") and v else v) for n, v in record.headers]
        record = record._replace(headers=headers)
    return record


# -- the vectors


VECTORS = [vector for vector in vectors.load() if isinstance(vector.expected, Record)]


def to_be_sent(vector: vectors.Vector, topic: str) -> vectors.Vector:
    """Its partition is one of the topic's, and its time one that every broker takes."""
    assert isinstance(vector.expected, Record)
    arguments = {name: value for name, value in vector.spec.arguments.items() if name != "topic"}
    if arguments.get("partition") is not None:
        arguments["partition"] %= PARTITIONS
    value = vector.expected.value
    if vector.setting.encoder is ENCODERS["repr"] and value is not None:  # it writes the topic
        value = topic.encode() + value[value.index(b"|") :]
    expected = vector.expected._replace(partition=arguments.get("partition", -1), value=value)
    return dataclasses.replace(vector, spec=Spec(arguments, vector.spec.tombstone), expected=expected)


@pytest.mark.parametrize("wire", WIRES)
def test_the_vectors(kafka: ExternalCluster, wire: str) -> None:
    topic = kafka.create_topic(partitions=PARTITIONS, config=ANY_TIME)
    sent: dict[tuple[int, int], vectors.Vector] = {}
    for vector in [to_be_sent(each, topic) for each in VECTORS if each.setting.wire == wire]:
        # An idempotent producer begins half a second later.
        with make_producer(kafka, vector.setting, **{"enable.idempotence": False}) as producer:
            report = producer.send_batch(topic, [mapping.envelope_of(vector.spec)]).raise_for_errors()
        sent[report.partitions[0], report.offsets[0]] = vector
    assert len(sent) >= 5
    for read in READERS:
        records = {record[:2]: record for record in read(kafka.bootstrap_servers, topic)}
        assert records.keys() == sent.keys()
        for place, vector in sent.items():
            assert isinstance(vector.expected, Record)
            if vector.expected.partition >= 0:
                assert place[0] == vector.expected.partition, vector.name
            expected = timeless(as_stored(vector.expected, *place), vector.spec)
            assert timeless(records[place], vector.spec) == expected, vector.name


# -- envelopes at random

# A broker takes a time that is an hour ahead at most, by default.
ANY_TIME = {"message.timestamp.after.max.ms": str(2**63 - 1), "message.timestamp.before.max.ms": str(2**63 - 1)}
COUNT = 300


def random_specs(setting: Setting, seed: int, count: int) -> list[Spec]:
    """What hypothesis makes of a strategy, without its shrinking."""
    specs: list[Spec] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, phases=[hypothesis.Phase.generate], derandomize=False)
    @hypothesis.given(spec=strategies.specs(setting))
    def collect(spec: Spec) -> None:
        specs.append(spec)

    collect()
    return specs


def for_a_topic(specs: Sequence[Spec], partitions: int) -> list[Spec]:
    """The same, each for a topic that exists, with its number among its headers."""
    ours = []
    for number, spec in enumerate(specs):
        arguments = {**spec.arguments, "topic": None}
        if arguments.get("partition") is not None:
            arguments["partition"] %= partitions
        headers = arguments.get("headers") or ()
        pairs = list(headers.items()) if hasattr(headers, "items") else list(headers)
        arguments["headers"] = [*pairs[:1_000], (NUMBER, str(number))]
        ours.append(Spec(arguments, spec.tombstone))
    return ours


def number_of(record: Stored) -> int:
    (number,) = [value for name, value in record.headers if name == NUMBER]
    assert number is not None
    return int(number)


@pytest.mark.parametrize("wire", WIRES)
def test_envelopes_at_random(kafka: ExternalCluster, wire: str) -> None:
    topic = kafka.create_topic(partitions=PARTITIONS, config=ANY_TIME)
    hook = (("traceparent", "00-ab-cd-01"), ("baggage", None))
    setting = Setting(wire=wire, source="fleet-1", hook_headers=hook, carry_scheduled_time=wire != "raw")
    specs = for_a_topic(random_specs(setting, 7, COUNT), PARTITIONS)
    envelopes = [mapping.envelope_of(spec) for spec in specs]
    specs = [
        Spec({**spec.arguments, "id": envelope.id}, spec.tombstone)
        for spec, envelope in zip(specs, envelopes, strict=True)
    ]
    expected = map_batch(topic, specs, setting)
    assert not isinstance(expected, Rejected)
    before = time.time_ns() // 1_000_000
    with make_producer(kafka, setting, **{"compression.codec": "lz4"}) as producer:
        report = producer.send_batch(topic, envelopes).raise_for_errors()
    after = time.time_ns() // 1_000_000
    assert report.expired_indices == tuple(i for i, record in enumerate(expected) if record is None)
    assert report.acked > COUNT / 2
    for read in READERS:
        records = read(kafka.bootstrap_servers, topic)
        # In each partition, in the order of the batch: every envelope once, where the report says.
        places = {number_of(record): record for record in records}
        assert len(places) == len(records) == report.acked
        order = collections.defaultdict(list)
        for record in records:
            order[record.partition].append(number_of(record))
        assert all(numbers == sorted(numbers) for numbers in order.values())
        for number, record in places.items():
            due = expected[number]
            assert due is not None
            assert record[:2] == (report.partitions[number], report.offsets[number])
            if due.partition >= 0:
                assert record.partition == due.partition
            if specs[number].arguments.get("timestamp") is None:
                assert before <= record.timestamp <= after
            assert timeless(record, specs[number]) == timeless(as_stored(due, *record[:2]), specs[number])


# -- a wire format of one's own


class Mine:
    def write(self, envelope: Any) -> tuple[bytes, bytes | None, list[tuple[str, bytes | None]]]:
        if isinstance(envelope, Tombstone):
            return envelope.key, None, [("gone", None)]
        return f"k{envelope.message}".encode(), b"\x00" * envelope.message, [("h", b"\xff"), ("h", b"")]


def test_a_wire_format_of_ones_own(kafka: ExternalCluster) -> None:
    topic = kafka.create_topic(partitions=1)
    with kbatch.Producer({"bootstrap.servers": kafka.bootstrap_servers}, wire=Mine()) as producer:
        producer.send_batch(topic, [Envelope(0), Envelope(3), Tombstone(b"k3")]).raise_for_errors()
    for read in READERS:
        assert [record[3:] for record in read(kafka.bootstrap_servers, topic)] == [
            (b"k0", b"", [("h", b"\xff"), ("h", b"")]),
            (b"k3", b"\x00\x00\x00", [("h", b"\xff"), ("h", b"")]),
            (b"k3", None, [("gone", None)]),
        ]


# -- codecs

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}


def bodies(count: int) -> list[bytes]:
    """Some of them compress well, and some do not."""
    chance = random.Random(3)
    return [chance.randbytes(chance.randrange(200)) + b"abc" * (i % 300) for i in range(count)]


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec(kafka: ExternalCluster, codec: str) -> None:
    topic = kafka.create_topic(partitions=PARTITIONS)
    expected = bodies(2_000)
    with make_producer(kafka, Setting(wire="raw"), **{"compression.codec": codec}) as producer:
        envelopes = [Envelope(data=body, partition=i % PARTITIONS) for i, body in enumerate(expected)]
        producer.send_batch(topic, envelopes).raise_for_errors()
    for read in READERS:
        records = read(kafka.bootstrap_servers, topic)
        for partition in range(PARTITIONS):
            got = [record.value for record in records if record.partition == partition]
            assert got == expected[partition::PARTITIONS]
    if isinstance(kafka, KafkaCluster):
        batches = [each for partition in range(PARTITIONS) for each in record_batches(kafka, topic, partition)]
        assert {batch.codec for batch in batches} == {CODECS[codec]}
        assert sum(batch.records for batch in batches) == len(expected)
        plain = sum(map(len, expected))
        assert (sum(batch.size for batch in batches) < plain / 2) == (codec != "none")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Of a record batch in a log: what it takes, how it is compressed, how many records are in it."""

    size: int
    codec: int
    records: int


def record_batches(kafka: KafkaCluster, topic: str, partition: int) -> Iterator[Segment]:
    """Read from the broker's file: https://kafka.apache.org/documentation/#recordbatch"""
    (log,) = (kafka.brokers[0].folder / "data" / f"{topic}-{partition}").glob("*.log")
    content = log.read_bytes()
    at = 0
    while at + 61 <= len(content):
        _, length, _, magic, _, attributes = struct.unpack_from(">qiibIh", content, at)
        if length == 0:  # preallocated
            return
        (records,) = struct.unpack_from(">i", content, at + 57)
        assert magic == 2
        yield Segment(12 + length, attributes & 7, records)
        at += 12 + length
