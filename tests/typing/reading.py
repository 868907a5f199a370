"""Reading what a consumer gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer
from typing_extensions import assert_type

import kbatch


class Text:
    """A wire format of the user's own, that reads too."""

    def write(self, envelope: kbatch.Envelope[Any]) -> tuple[None, bytes, None]:
        return None, str(envelope.message).encode(), None

    def read(self, record: kbatch.ConsumedRecord) -> kbatch.Envelope[Any]:
        return kbatch.Envelope(data=record.value() or b"", topic=record.topic())


class WritesOnly:
    def write(self, envelope: kbatch.Envelope[Any]) -> tuple[None, bytes, None]:
        return None, b"", None


reader: kbatch.WireReader = Text()
writer: kbatch.WireFormat = Text()


def poll(consumer: Consumer) -> kbatch.Envelope[Any] | None:
    message = consumer.poll()
    if message is None:
        return None
    record: kbatch.ConsumedRecord = message
    assert_type(kbatch.read_envelope(record, wire=reader), kbatch.Envelope[Any])
    try:
        return kbatch.read_envelope(message, wire="cloudevents")
    except kbatch.DeserializationError as error:
        assert_type(error.topic, str | None)
        assert_type(error.offset, int | None)
        assert_type(error.header, str | None)
        raise


@dataclass
class ConsumerRecord:
    """As aiokafka's, whose types are not checked."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    timestamp_type: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


def consumed(record: ConsumerRecord) -> kbatch.Envelope[Any]:
    return kbatch.read_envelope(record)


# What the checker must refuse.
kbatch.read_envelope(b"value")  # type: ignore[arg-type]
kbatch.read_envelope(reader, wire="kbatch")  # type: ignore[arg-type]


def refused(record: kbatch.ConsumedRecord) -> None:
    kbatch.read_envelope(record, wire=WritesOnly())  # type: ignore[arg-type]
    kbatch.read_envelope(record, "kbatch")  # type: ignore[call-arg]
