"""Clients of the mock cluster that are not kbatch: confluent-kafka's own producer and consumer."""

import time
from collections import defaultdict
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition


class Record(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


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
    return outcomes


def read(bootstrap_servers: str, topic: str, count: int, timeout_s: float = 30.0) -> dict[int, list[Record]]:
    """Reads a topic's partitions from their beginning until `count` records came and then nothing more."""
    config = {"bootstrap.servers": bootstrap_servers, "group.id": "tests", "log_level": 0, "enable.auto.commit": False}
    config |= {"fetch.wait.max.ms": 10}
    consumer = Consumer(config)
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        records: dict[int, list[Record]] = defaultdict(list)
        got = 0
        deadline = time.monotonic() + timeout_s
        quiet = 0
        while time.monotonic() < deadline and not (got >= count and quiet >= 2):
            messages = consumer.consume(1_000, timeout=0.2)
            quiet = 0 if messages else quiet + 1
            for message in messages:
                assert message.error() is None, message.error()
                record = Record(
                    message.partition(), message.offset(), message.key(), message.value(), message.headers() or []
                )
                records[record.partition].append(record)
                got += 1
        return dict(records)
    finally:
        consumer.close()
