"""Producers in memory beside the ones that they stand for."""

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import confluent_kafka
import pytest

import kbatch
from kbatch import Envelope, KafkaSender, OutgoingBatch, SenderCallback
from kbatch.testing import ApiKey, MemoryProducer, MockCluster

from .clients import read_back


def test_records_are_where_and_what_a_consumer_reads(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=7)
    batch = [Envelope(i, key=f"key {i % 50}", timestamp=1 + i, headers={"h": str(i)}) for i in range(500)]
    batch.append(kbatch.Tombstone("key 3", partition=6))
    with kbatch.Producer({"bootstrap.servers": kafka_cluster.bootstrap_servers}, wire="raw") as real:
        of_real = real.send_batch("orders", batch)
    with MemoryProducer(wire="raw", partitions=7) as memory:
        of_memory = memory.send_batch("orders", batch)
    assert of_memory.partitions == of_real.partitions
    assert of_memory.offsets == of_real.offsets
    records = sorted(memory.records, key=lambda record: (record.partition(), record.offset()))
    # The tombstone's time is that of its batch.
    assert [
        (r.partition(), r.offset(), r.timestamp()[1] if r.value() else 0, r.key(), r.value(), r.headers() or [])
        for r in records
    ] == [
        (r.partition, r.offset, r.timestamp if r.value else 0, r.key, r.value, r.headers)
        for r in read_back(kafka_cluster.bootstrap_servers, "orders")
    ]


def test_a_record_answers_as_a_consumers_message(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    batch = [
        Envelope(data=b"body", key="k", headers={"h": "1"}, timestamp=1),
        Envelope(data=b"", timestamp=2),
        kbatch.Tombstone("k", timestamp=3),
    ]
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers}
    with kbatch.Producer(config, wire="raw") as real, MemoryProducer(wire="raw") as memory:
        real.send_batch("orders", batch).raise_for_errors()
        memory.send_batch("orders", batch).raise_for_errors()
    consumer = confluent_kafka.Consumer(config | {"group.id": "tests"})
    consumer.assign([confluent_kafka.TopicPartition("orders", 0, 0)])
    try:
        messages = consumer.consume(len(batch), timeout=30)
    finally:
        consumer.close()
    names = ("topic", "partition", "offset", "timestamp", "key", "value", "headers", "error")
    for message, record in zip(messages, memory.records, strict=True):
        assert [getattr(record, name)() for name in names] == [getattr(message, name)() for name in names]
        assert (len(record), bool(record)) == (len(message), bool(message))


@pytest.mark.parametrize(
    "partitioner",
    ["consistent", "random", "consistent_random", "murmur2", "murmur2_random", "fnv1a", "fnv1a_random"],
)
def test_partitions_are_librdkafkas(kafka_cluster: MockCluster, partitioner: str) -> None:
    kafka_cluster.create_topic("orders", partitions=7)
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers, "partitioner": partitioner}
    # Of each length up to 20, some with bytes beyond ASCII.
    keys = [bytes((n * 37 + i * 101) % 256 for i in range(n % 21)) for n in range(300)]
    batch = [Envelope(n, key=key) for n, key in enumerate([*keys, None])]
    with kbatch.Producer(config) as real, MemoryProducer(config, partitions=7) as memory:
        real.send_batch("orders", batch).raise_for_errors()
        memory.send_batch("orders", batch).raise_for_errors()
    of_real = {record.value: record.partition for record in read_back(kafka_cluster.bootstrap_servers, "orders")}
    of_memory = {record.value(): record.partition() for record in memory.records}
    # Where librdkafka takes any partition, there is nothing to compare.
    free = {
        str(n).encode()
        for n, envelope in enumerate(batch)
        if partitioner == "random"
        or (partitioner == "consistent_random" and not envelope.key)
        or (partitioner.endswith("_random") and envelope.key is None)
    }
    assert of_real.keys() == of_memory.keys()
    assert {value: of_real[value] for value in of_real.keys() - free} == {
        value: of_memory[value] for value in of_memory.keys() - free
    }
    assert len(set(of_memory.values())) == 7


class Recorder(SenderCallback):
    """Keeps every call, whatever it is."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("mark_"):
            return super().__getattribute__(name)
        return lambda batch, answer: self.calls.append((name, answer))


def no_order(_: Any) -> None:
    pass


PAST = datetime(2020, 1, 1, tzinfo=timezone.utc)
THREE = [Envelope(i, key=str(i)) for i in range(3)]


@pytest.mark.parametrize(
    ("batch", "of_cluster", "of_memory", "of_both"),
    [
        (THREE, no_order, no_order, no_order),
        ([], no_order, no_order, no_order),
        ([Envelope(1), Envelope(2, deliver_by=PAST)], no_order, no_order, no_order),
        ([Envelope(1), Envelope(object())], no_order, no_order, no_order),
        ([Envelope(1), Envelope(2, partition=9)], no_order, no_order, no_order),
        (THREE, lambda cluster: cluster.set_broker_down(1), lambda memory: memory.down(), no_order),
        (
            THREE,
            lambda cluster: cluster.push_request_errors(ApiKey.PRODUCE, ["INVALID_RECORD"] * 3),
            lambda memory: memory.fail("INVALID_RECORD", times=3),
            no_order,
        ),
        (THREE, no_order, no_order, lambda producer: producer.close()),
        (THREE, no_order, no_order, lambda producer: producer._core.inject_fatal_error(45, "made up")),
    ],
    ids=["acknowledged", "empty", "expired", "unmapped", "partition", "down", "refused", "closed", "fatal"],
)
def test_answers_are_the_same(
    kafka_cluster: MockCluster,
    batch: list[Envelope],
    of_cluster: Callable[[MockCluster], object],
    of_memory: Callable[[MemoryProducer], object],
    of_both: Callable[[kbatch.Producer], object],
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers, "message.timeout.ms": 500, "log_level": 0}
    answers = []
    with (
        kbatch.Producer(config | {"enable.idempotence": "false"}, close_timeout_s=0) as real,
        MemoryProducer({"message.timeout.ms": 500}) as memory,
    ):
        of_cluster(kafka_cluster)
        of_memory(memory)
        for producer in (real, memory):
            of_both(producer)
            callback = Recorder()
            KafkaSender(producer, "orders").send_batch(callback, OutgoingBatch(batch))
            ((method, answer),) = callback.calls
            report = answer if method == "mark_successful" else answer.report
            text = "" if answer is report else f"{type(answer).__name__}: {answer}"
            answers.append(
                {
                    "method": method,
                    "answer": text.replace("test_fatal_error: ", ""),  # which librdkafka puts before the reason
                    "errors": report.errors,
                    "expired": report.expired_indices,
                    "acked": report.acked,
                    "offsets": report.offsets,
                }
            )
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("of_cluster", "of_memory", "more"),
    [
        (
            lambda cluster: cluster.push_request_errors(ApiKey.PRODUCE, ["INVALID_RECORD"] * 100),
            lambda memory: memory.fail("INVALID_RECORD", times=None),
            {},
        ),
        (lambda cluster: cluster.set_broker_down(1), lambda memory: memory.down(), {"message.timeout.ms": 3000}),
        (
            lambda cluster: cluster.push_request_errors(ApiKey.PRODUCE, ["INVALID_RECORD"] * 100),
            lambda memory: memory.fail("INVALID_RECORD", times=None),
            {"transactional.id": "orders"},
        ),
    ],
    ids=["refused", "down", "aborted"],
)
def test_a_failure_tells_the_partition_as_an_acknowledgement_does(
    kafka_cluster: MockCluster,
    of_cluster: Callable[[MockCluster], object],
    of_memory: Callable[[MemoryProducer], object],
    more: dict[str, Any],
) -> None:
    kafka_cluster.create_topic("orders", partitions=7)
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers, "log_level": 0, **more}
    batch = [Envelope(i, key=f"key {i}") for i in range(20)]
    with kbatch.Producer(config, close_timeout_s=0) as real, MemoryProducer(config, partitions=7) as memory:
        assert real.send_batch("orders", batch).partitions == memory.send_batch("orders", batch).partitions
        of_cluster(kafka_cluster)
        of_memory(memory)
        of_real, in_memory = real.send_batch("orders", batch), memory.send_batch("orders", batch)
        assert of_real.acked == in_memory.acked == 0
        assert of_real.partitions == in_memory.partitions
