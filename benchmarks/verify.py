"""Do all sides send the same? Each sends the same messages to a topic of its own; they are read back and compared."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from confluent_kafka import Consumer, TopicPartition

from benchmarks.broker import OpenBroker
from benchmarks.data import prepare
from benchmarks.library import BUILD
from benchmarks.side_process import Side
from benchmarks.sides.base import Spec

Record: TypeAlias = tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...]]

COUNT = 1_000
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def _read(bootstrap: str, topic: str) -> Iterator[Record]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "verify", "auto.offset.reset": "earliest"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    try:
        for _ in range(COUNT):
            message = consumer.poll(30)
            if message is None or message.error():
                raise RuntimeError(f"{topic}: a message is missing: {message and message.error()}")
            headers = []
            pairs: list[Any] = list(message.headers() or ())
            for name, value in pairs:
                headers.append((name, b"now" if name == "sent-at" and _TIME.fullmatch(value) else value))
            yield message.key(), message.value(), tuple(headers)
    finally:
        consumer.close()


def same_bytes(
    open_broker: OpenBroker, headers: int, sides: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[float, float]:
    """Compares keys, values and headers, but for the digits of `sent-at`; returns bytes per body and per header set.

    Raises RuntimeError that shows the first difference.
    """
    prepared = prepare(BUILD, headers)
    with open_broker() as broker:
        first: list[Record] = []
        for name, options in sides:
            topic = broker.new_topic(name, 1)
            spec = Spec(broker.bootstrap_servers, topic, 100, 0, headers, partitions=1, options=options)
            with Side(name, spec, data=prepared.path) as side:
                side.run(COUNT)
            records = list(_read(broker.bootstrap_servers, topic))
            first = first or records
            for number, (one, other) in enumerate(zip(first, records, strict=True)):
                if one != other:
                    raise RuntimeError(f"message {number} of {sides[0][0]} and {name} differ:\n  {one}\n  {other}")
    return prepared.value_bytes, prepared.header_bytes
