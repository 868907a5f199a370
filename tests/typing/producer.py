"""A producer as users call it."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from confluent_kafka import KafkaError, ThrottleEvent
from confluent_kafka.serialization import StringSerializer
from typing_extensions import assert_type

import kbatch


def on_error(error: KafkaError) -> None: ...


def on_stats(json: str) -> None: ...


def on_throttle(event: ThrottleEvent) -> None: ...


def on_token(config: str) -> tuple[str, float]:
    return "token", 0.0


def encode(message: object, context: kbatch.SerializationContext) -> bytes:
    assert_type(context.topic, str | None)
    context.headers.append(("schema", b"\x01"))
    return repr(message).encode()


class Text:
    """A wire format of the user's own."""

    def write(self, envelope: kbatch.Envelope[Any]) -> tuple[str | None, bytes, dict[str, str]]:
        return envelope.topic, str(envelope.message).encode(), {"text": "yes"}


def with_key(envelope: kbatch.Envelope[Any]) -> tuple[str, None, None]:
    return "key", None, None


class NoWire:
    def write(self, envelope: kbatch.Envelope[Any]) -> bytes:
        return b""


def trace_headers() -> dict[str, str]:
    return {"traceparent": "00-…"}


wire: kbatch.WireFormat = Text()

config: dict[str, object] = {
    "bootstrap.servers": "localhost:9092",
    "error_cb": on_error,
    "stats_cb": on_stats,
    "throttle_cb": on_throttle,
    "oauth_cb": on_token,
    "logger": logging.getLogger(),
}


def several() -> Iterator[kbatch.Envelope[int]]:
    yield from (kbatch.Envelope(i) for i in range(3))


def main() -> None:
    with kbatch.Producer(config, source="shop", header_hook=trace_headers, close_timeout_s=5.0) as producer:
        assert_type(producer, kbatch.Producer)
        report = producer.send_batch("orders", several())
        assert_type(report, kbatch.DeliveryReport)
        assert_type(report.ok, bool)
        assert_type(report.acked, int)
        assert_type(report.failed, int)
        assert_type(report.expired, int)
        assert_type(report.expired_indices, tuple[int, ...])
        assert_type(report.partitions, tuple[int, ...])
        assert_type(report.offsets, tuple[int, ...])
        assert_type(report.latency_s, float)
        assert_type(report.errors, Mapping[int, kbatch.DeliveryError])
        assert_type(report.exception(), kbatch.BatchError | None)
        assert_type(report.raise_for_errors(), kbatch.DeliveryReport)
        for index, error in report.errors.items():
            assert_type(index, int)
            assert_type(error.code, int)
            assert_type(error.name, str)
            assert_type(error.retriable, bool)
            assert_type(error.fatal, bool)
            assert_type(error.possibly_persisted, bool)

        # Envelopes of several kinds, each with its topic.
        mixed = [kbatch.Envelope("a", topic="t"), kbatch.Tombstone("k", topic="t"), kbatch.Envelope(data=b"")]
        producer.send_batch(None, mixed, timeout=1.5)

        pending = producer.submit("orders", (kbatch.Envelope(i) for i in "abc"), callback=done)
        assert_type(pending, kbatch.PendingBatch)
        assert_type(pending.wait(timeout=3), kbatch.DeliveryReport)
        assert_type(pending.done(), bool)
        assert_type(len(pending), int)
        pending.add_done_callback(settled)

        assert_type(producer.flush(1), int)
        assert_type(producer.close(), int)
        assert_type(producer.stats(), dict[str, int])
        assert_type(len(producer), int)
        try:
            pending.wait(0)
        except kbatch.BatchPendingError as error:
            assert_type(error.pending, kbatch.PendingBatch | None)
        except kbatch.SerializationError as error:
            assert_type(error.index, int | None)
        except kbatch.KbatchError as error:
            assert_type(error.report, kbatch.DeliveryReport | None)


def done(report: kbatch.DeliveryReport) -> None: ...


def settled(batch: kbatch.PendingBatch) -> None: ...


async def awaiting(producer: kbatch.Producer) -> None:
    pending = producer.submit("orders", [kbatch.Envelope(1)])
    assert_type(await pending, kbatch.DeliveryReport)
    assert_type(await asyncio.wait_for(pending, 1), kbatch.DeliveryReport)


kbatch.Producer(config, encoder=msgspec.json.Encoder())
kbatch.Producer(config, encoder=msgspec.msgpack.Encoder(enc_hook=str))
kbatch.Producer(config, encoder=encode)
kbatch.Producer(config, encoder=lambda message, context: bytes(message))
kbatch.Producer(config, encoder=StringSerializer("utf_8"))
kbatch.Producer(config, wire=Text(), max_in_flight=5_000)
kbatch.Producer(config, wire="raw")

# What the checker must refuse.
kbatch.Producer("localhost:9092")  # type: ignore[arg-type]
kbatch.Producer(config, wire=NoWire())  # type: ignore[arg-type]
kbatch.Producer(config, encoder=lambda message: b"")  # type: ignore[arg-type, misc]
kbatch.Producer(config, lambda message, context: b"")  # type: ignore[arg-type, call-arg]
