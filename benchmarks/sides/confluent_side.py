"""confluent-kafka with the mapping written in Python, as fast as its own documentation allows.

Options: `linger_ms`; `form`, one of

callback     `produce(..., on_delivery=f)`; f counts, and keeps the first error
errors-only  `delivery.report.only.error` with one callback for failures: a message is delivered when the producer's
             queue is empty and no failure was reported. No offsets, no outcome per message, but no Python call per
             message either; it still confirms delivery, so it is the form that kbatch is compared with.
"""

from datetime import datetime, timezone
from typing import Any

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from benchmarks.data import PlainEnvelope, format_time, orders, plain_value
from benchmarks.sides.base import Spec, read_spec, serve

#: Messages between two calls of `poll(0)`.
POLL_EVERY = 500


class Sender:
    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._next = 0
        self._acknowledged = 0
        self._error: KafkaError | None = None
        only_errors = spec.options.get("form", "errors-only") == "errors-only"
        config = {
            "bootstrap.servers": spec.bootstrap,
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": spec.options.get("linger_ms", 5),
            "queue.buffering.max.messages": 1_000_000,
            "delivery.report.only.error": only_errors,
            "on_delivery": self._on_failure if only_errors else self._on_delivery,
        }
        self._only_errors = only_errors
        self._producer = Producer(config)
        self._encode = msgspec.json.Encoder().encode
        self._pool = list(orders(spec.pool, spec.headers)) if not spec.values else []
        self._value = plain_value(spec.values) if spec.values else b""

    def _on_delivery(self, error: KafkaError | None, _message: Message) -> None:
        if error is None:
            self._acknowledged += 1
        elif self._error is None:
            self._error = error

    def _on_failure(self, error: KafkaError | None, _message: Message) -> None:
        self._error = self._error or error

    def _produce_values(self, count: int) -> None:
        produce, topic, value = self._producer.produce, self._spec.topic, self._value
        for _ in range(count):
            produce(topic, value)

    def _produce(self, envelopes: list[PlainEnvelope]) -> None:
        produce, topic, encode = self._producer.produce, self._spec.topic, self._encode
        if not self._spec.headers:
            for e in envelopes:
                produce(topic, encode(e.message), e.key)
            return
        # one time per batch; pairs that repeat are made once
        sent_at = ("sent-at", format_time(datetime.now(timezone.utc)))
        repeated: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for e in envelopes:
            kind = (e.message_type, e.content_type)
            first = repeated.get(kind)
            if first is None:
                first = repeated[kind] = [("message-type", e.message_type), ("content-type", e.content_type), sent_at]
            headers = [("id", e.id), *first]
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

    def _take(self, count: int) -> list[PlainEnvelope]:
        start = self._next
        self._next = (start + count) % len(self._pool)
        return self._pool[start : start + count]

    def send(self, count: int) -> int:
        spec, producer = self._spec, self._producer
        before = self._acknowledged
        for _ in range(count // spec.batch):
            left = spec.batch
            while left:
                piece = min(left, POLL_EVERY)
                if spec.values:
                    self._produce_values(piece)
                else:
                    self._produce(self._take(piece))
                producer.poll(0)
                left -= piece
            if not spec.window:
                producer.flush()
            else:
                while len(producer) > spec.window:
                    producer.poll(0.01)
        producer.flush()
        if self._error is not None or len(producer):
            raise RuntimeError(f"not everything was delivered: {self._error}, {len(producer)} left")
        return count if self._only_errors else self._acknowledged - before

    def close(self) -> dict[str, Any]:
        return {}


def main() -> None:
    spec = read_spec()
    sender = Sender(spec)
    serve("confluent-kafka", sender.send, sender.close)


if __name__ == "__main__":
    main()
