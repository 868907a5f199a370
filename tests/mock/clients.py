"""Clients of the mock cluster that are not kbatch: confluent-kafka's own producer and consumer, and aiokafka's."""

import asyncio
import ctypes
import sysconfig
import threading
import time
from collections import defaultdict
from typing import NamedTuple

import confluent_kafka
from confluent_kafka import (
    TIMESTAMP_CREATE_TIME,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class Record(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


_NO_LEADER_YET = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)


def produce(bootstrap_servers: str, topic: str, messages: list[dict], **config) -> list[KafkaError | None]:
    """Sends messages, each the arguments of `Producer.produce`, and returns the error of each, None if acknowledged."""
    outcomes: list[KafkaError | None] = [None] * len(messages)
    settings = {"bootstrap.servers": bootstrap_servers, "log_level": 0, **config}
    producer = Producer(settings)
    for i, message in enumerate(messages):

        def on_delivery(error: KafkaError | None, _: Message, i: int = i) -> None:
            outcomes[i] = error

        producer.produce(topic, on_delivery=on_delivery, **message)
        producer.poll(0)
    assert producer.flush(30) == 0
    # librdkafka may wait for ever for its broker's thread, once in thousands of times, after a connection was cut.
    last = [producer]
    del producer
    end = threading.Thread(target=last.clear, daemon=True)
    end.start()
    end.join(20)
    return outcomes


def produce_named(bootstrap_servers: str, topic: str, header: bytes, value: bytes = b"{}") -> None:
    """Sends a record whose header has any bytes as its name, as a program in C may: by librdkafka's own functions."""
    librdkafka = ctypes.CDLL(confluent_kafka.cimpl.__file__)
    made = {name: getattr(librdkafka, f"rd_kafka_{name}") for name in ("conf_new", "conf_set", "new", "destroy")}
    for each in ("conf_new", "new"):
        made[each].restype = ctypes.c_void_p
    text, size = ctypes.c_char_p, ctypes.c_size_t
    conf, error = ctypes.c_void_p(made["conf_new"]()), ctypes.create_string_buffer(512)
    for setting in (b"bootstrap.servers", bootstrap_servers.encode()), (b"log_level", b"0"):
        assert made["conf_set"](conf, *map(text, setting), error, size(512)) == 0, error.value
    producer = ctypes.c_void_p(made["new"](0, conf, error, size(512)))
    assert producer.value is not None, error.value
    try:
        # By numbers of rd_kafka_vtype_t: the topic, flags (copy the value), the value, a header, the end.
        fields = (1, text(topic.encode()), 7, 2, 4, text(value), size(len(value)))
        assert librdkafka.rd_kafka_producev(producer, *fields, 9, text(header), text(b"v"), size(1), 0) == 0
        assert librdkafka.rd_kafka_flush(producer, 30_000) == 0
    finally:
        made["destroy"](producer)


def read(bootstrap_servers: str, topic: str, count: int, timeout_s: float = 30.0) -> dict[int, list[Record]]:
    """Reads a topic's partitions from their beginning, until `count` records came and each partition is at its end."""
    config = {"bootstrap.servers": bootstrap_servers, "group.id": "tests", "log_level": 0, "enable.auto.commit": False}
    consumer = Consumer(config | {"fetch.wait.max.ms": 10, "enable.partition.eof": True})
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        records: dict[int, list[Record]] = defaultdict(list)
        to_read = set(partitions)
        got = 0
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and (got < count or to_read):
            message = consumer.poll(0.2)
            if message is None:
                continue
            error = message.error()
            if error is not None and error.code() == KafkaError._PARTITION_EOF:
                to_read.discard(message.partition())
                continue
            assert error is None, error
            record = Record(
                message.partition(), message.offset(), message.key(), message.value(), message.headers() or []
            )
            records[record.partition].append(record)
            to_read.add(record.partition)
            got += 1
        return dict(records)
    finally:
        consumer.close()


class Stored(NamedTuple):
    """A record as a consumer sees it."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def end_offsets(bootstrap_servers: str, topic: str) -> dict[int, int]:
    """Of each partition, how many records were ever written: what a test compares that nothing was sent."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "tests", "log_level": 0})
    try:
        return _end_offsets(consumer, topic)
    finally:
        consumer.close()


def _end_offsets(consumer: Consumer, topic: str) -> dict[int, int]:
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    return {partition: _end_offset(consumer, TopicPartition(topic, partition)) for partition in partitions}


def _end_offset(consumer: Consumer, partition: TopicPartition) -> int:
    end = time.monotonic() + 30
    while True:
        try:
            return int(consumer.get_watermark_offsets(partition, timeout=10)[1])
        except KafkaException as error:  # of a topic that is new, the broker may not know yet that it leads it
            if error.args[0].code() not in _NO_LEADER_YET or time.monotonic() > end:
                raise
            time.sleep(0.1)


def read_back(bootstrap_servers: str, topic: str) -> list[Stored]:
    """Every record of a topic by confluent-kafka's consumer, by partition and offset."""
    config = {"bootstrap.servers": bootstrap_servers, "group.id": "tests", "log_level": 0, "enable.auto.commit": False}
    consumer = Consumer(config | {"fetch.wait.max.ms": 10, "check.crcs": True})
    try:
        ends = {partition: end for partition, end in _end_offsets(consumer, topic).items() if end}
        records: list[Stored] = []
        for partition in ends:
            begin, _ = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            assert begin == 0, f"the first {begin} records are gone: the mock cluster keeps 5 MB of a partition"
        consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
        deadline = time.monotonic() + 30
        while missing := sum(ends.values()) - len(records):
            assert time.monotonic() < deadline, f"{missing} of {sum(ends.values())} records do not come"
            for message in consumer.consume(min(missing, 10_000), timeout=0.2):
                assert message.error() is None, message.error()
                kind, timestamp = message.timestamp()
                assert kind == TIMESTAMP_CREATE_TIME
                records.append(
                    Stored(
                        message.partition(),
                        message.offset(),
                        timestamp,
                        message.key(),
                        message.value(),
                        message.headers() or [],
                    )
                )
        return sorted(records, key=lambda record: record[:2])
    finally:
        consumer.close()


def read_many(bootstrap_servers: str, topics: list[str]) -> dict[str, list[Message]]:
    """Every record of topics that have one partition each, by one consumer."""
    config = {"bootstrap.servers": bootstrap_servers, "group.id": "tests", "log_level": 0, "enable.auto.commit": False}
    consumer = Consumer(config | {"fetch.wait.max.ms": 10, "check.crcs": True})
    try:
        ends = {topic: _end_offset(consumer, TopicPartition(topic, 0)) for topic in topics}
        consumer.assign([TopicPartition(topic, 0, 0) for topic in topics])
        records: dict[str, list[Message]] = {topic: [] for topic in topics}
        deadline = time.monotonic() + 60
        missing = sum(ends.values())
        while missing:
            assert time.monotonic() < deadline, f"{missing} of {sum(ends.values())} records do not come"
            for message in consumer.consume(min(missing, 10_000), timeout=0.2):
                assert message.error() is None, message.error()
                records[message.topic() or ""].append(message)
                missing -= 1
        return records
    finally:
        consumer.close()


def read_committed(bootstrap_servers: str, topic: str, isolation: str = "read_committed") -> list[Stored]:
    """Every record of a topic that a reader sees who asks for committed ones, by partition and offset."""
    config = {"bootstrap.servers": bootstrap_servers, "group.id": "tests", "log_level": 0, "enable.auto.commit": False}
    # The mock cluster gives control records no checksum.
    config |= {"isolation.level": isolation, "enable.partition.eof": True, "fetch.wait.max.ms": 10}
    consumer = Consumer(config)
    try:
        left = set(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in left])
        records: list[Stored] = []
        deadline = time.monotonic() + 60
        while left:
            assert time.monotonic() < deadline, f"the ends of {left} do not come"
            for message in consumer.consume(10_000, timeout=0.2):
                error = message.error()
                if error is not None:
                    assert error.code() == KafkaError._PARTITION_EOF, error
                    left.discard(message.partition())
                    continue
                where = message.partition(), message.offset(), message.timestamp()[1]
                records.append(Stored(*where, message.key(), message.value(), message.headers() or []))
        return sorted(records, key=lambda record: record[:2])
    finally:
        consumer.close()


def read_back_with_aiokafka(bootstrap_servers: str, topic: str) -> list[Stored]:
    """The same by aiokafka, which shares no code with librdkafka."""
    # here, since other processes than pytest import this module, and not everywhere is there an aiokafka
    import pytest

    if FREE_THREADED:
        pytest.skip("platform: aiokafka has no wheels for a free-threaded CPython")
    import aiokafka

    async def read() -> list[Stored]:
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest")
        await consumer.start()
        try:
            await consumer._client.force_metadata_update()
            partitions = [
                aiokafka.TopicPartition(topic, p) for p in sorted(consumer._client.cluster.partitions_for_topic(topic))
            ]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            records: list[Stored] = []
            while len(records) < sum(ends.values()):
                for messages in (await consumer.getmany(timeout_ms=100)).values():
                    records += [
                        Stored(m.partition, m.offset, m.timestamp, m.key, m.value, list(m.headers)) for m in messages
                    ]
            return sorted(records, key=lambda record: record[:2])
        finally:
            await consumer.stop()

    return asyncio.run(asyncio.wait_for(read(), 30))
