"""confluent-kafka with the mapping written in Python, as fast as its own documentation allows.

Options: `linger_ms`; `form`, one of

callback     `produce(..., on_delivery=f)`; f keeps each offset, and the first error: an outcome for each message
errors-only  `delivery.report.only.error` with one callback for failures: a message is delivered when the producer's
             queue is empty and no failure was reported. No offsets, no outcome per message, but no Python call per
             message either; it still confirms delivery, so it is the form that kbatch is compared with.

`call`: "produce", or "produce_batch", which knows no headers and takes a list of dicts, as many as there are between
two polls; `poll_every`, how many that are; and `wait`, how the answer to one batch is awaited: `flush`, or (with
callbacks only) `poll`: `poll(1)` until as many callbacks as messages have come.
"""

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from benchmarks.data import PlainEnvelope, format_time, orders, plain_value
from benchmarks.sides.base import Spec, serve

#: Messages between two calls of `poll(0)`.
POLL_EVERY = 500


class Sender:
    def __init__(self, spec: Spec) -> None:
        self._topic = spec.topic
        self._batch = spec.batch
        self._window = spec.window
        self._headers = bool(spec.headers)
        self._only_errors = spec.options.get("form", "errors-only") == "errors-only"
        self._polls = spec.options.get("wait", "flush") == "poll"
        self._acknowledged = 0
        self._offsets: list[int | None] = []
        self._error: KafkaError | None = None
        self._producer = Producer(
            {
                "bootstrap.servers": spec.bootstrap,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": spec.options.get("linger_ms", 5),
                "queue.buffering.max.messages": 1_000_000,
                "delivery.report.only.error": self._only_errors,
                "on_delivery": self._on_delivery,
                **spec.options.get("config", {}),
            }
        )
        self._encode = msgspec.json.Encoder().encode
        self._next = 0
        # each batch cut into the pieces between two polls
        piece = min(spec.batch, spec.options.get("poll_every", POLL_EVERY))
        self._batches: list[list[list[Any]]] = []
        self._produce: Callable[[list[Any]], None]
        if spec.values:
            value = bytearray(plain_value(spec.values))
            pool: list[Any] = [bytes(value) for _ in range(spec.pool)]
            self._produce = self._produce_values
        else:
            pool = list(orders(spec.pool, spec.headers))
            self._produce = self._produce_envelopes
            if spec.options.get("call") == "produce_batch":
                if spec.headers:
                    raise ValueError("produce_batch would drop the headers")
                self._produce = self._produce_batch
        for start in range(0, spec.pool, spec.batch):
            end = start + spec.batch
            self._batches.append([pool[at : min(at + piece, end)] for at in range(start, end, piece)])

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._acknowledged += 1
            self._offsets.append(message.offset())
        elif self._error is None:
            self._error = error

    def _produce_values(self, values: list[bytes]) -> None:
        produce, topic = self._producer.produce, self._topic
        for value in values:
            produce(topic, value)

    def _produce_envelopes(self, envelopes: list[PlainEnvelope]) -> None:
        produce, topic, encode = self._producer.produce, self._topic, self._encode
        if not self._headers:
            for e in envelopes:
                produce(topic, encode(e.message), e.key)
            return
        sent_at = ("sent-at", format_time(datetime.now(timezone.utc)))
        same: dict[tuple[str, str], list[tuple[str, str]]] = {}  # headers that many messages share are made once
        for e in envelopes:
            kind = (e.message_type, e.content_type)
            shared = same.get(kind)
            if shared is None:
                shared = same[kind] = [("message-type", e.message_type), ("content-type", e.content_type), sent_at]
            headers: list[Any] = [("id", e.id), *shared]
            if e.correlation_id is not None:
                headers.append(("correlation-id", e.correlation_id))
            if e.conversation_id is not None:
                headers.append(("conversation-id", e.conversation_id))
            if e.parent_id is not None:
                headers.append(("parent-id", e.parent_id))
            if e.source is not None:
                headers.append(("source", e.source))
            if e.tenant_id is not None:
                headers.append(("tenant-id", e.tenant_id))
            if e.user_name is not None:
                headers.append(("user-name", e.user_name))
            if e.headers:
                headers.extend(e.headers)
            produce(topic, encode(e.message), e.key, headers=headers)

    def _produce_batch(self, envelopes: list[PlainEnvelope]) -> None:
        encode = self._encode
        messages = [{"value": encode(e.message), "key": e.key} for e in envelopes]
        queued = self._producer.produce_batch(self._topic, messages)
        if queued != len(messages):
            raise RuntimeError(f"produce_batch queued {queued} of {len(messages)}")

    def send(self, count: int) -> int:
        producer, window, produce, batches = self._producer, self._window, self._produce, self._batches
        before, sent = self._acknowledged, 0
        for _ in range(count // self._batch):
            self._offsets.clear()
            batch = batches[self._next]
            self._next = (self._next + 1) % len(batches)
            for piece in batch:
                produce(piece)
                producer.poll(0)
            if window:
                while len(producer) > window:
                    producer.poll(0.01)
            elif self._polls:
                sent += self._batch
                while self._acknowledged - before < sent and self._error is None:
                    producer.poll(1)
            else:
                producer.flush()
        if window:
            producer.flush()
        if self._error is not None or len(producer):
            raise RuntimeError(f"not everything was delivered: {self._error}, {len(producer)} left")
        return count if self._only_errors else self._acknowledged - before

    def close(self) -> dict[str, Any]:
        return {}


if __name__ == "__main__":
    serve("confluent-kafka", Sender)
