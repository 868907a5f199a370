"""confluent-kafka's `produce` for each message as it comes, mapped in Python.

What a careful program would do that has its messages one at a time: one function that maps and produces and is as
short as it can be; headers that many messages share are made once per millisecond, `sent-at` among them; `poll(0)`
every 500 messages; and when the queue is full (`BufferError`), `poll` until there is room.

Options: `linger_ms`; `queue`, the most messages in it; `form`, "callback" or "errors-only", see confluent_side.py; or,
where each call returns with the acknowledgement, "flush" after each message, or "future": one for each message, set by
its callback on a thread that polls; and those of one_at_a_time.py.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime, timezone
from itertools import count
from typing import Any, TypeAlias

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from benchmarks.data import PlainEnvelope, format_time, orders
from benchmarks.sides.base import Spec
from benchmarks.sides.one_at_a_time import Send, serve

OnDelivery: TypeAlias = Callable[[KafkaError | None, Message], None]

POLL_EVERY = 500
#: for how long a thread polls that waits for room; without callbacks nothing ends it earlier
FULL_POLL_S = 0.002
STAMP_S = 0.001


class Single:
    def __init__(self, spec: Spec) -> None:
        self.messages = list(orders(spec.pool, spec.headers))
        self._topic = spec.topic
        self._form = spec.options.get("form", "errors-only")
        self._delivered: list[None] = []
        self._error: KafkaError | None = None
        self._numbers = count(1)
        self._before = 0
        self._producer = Producer(
            {
                "bootstrap.servers": spec.bootstrap,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": spec.options.get("linger_ms", 5),
                "queue.buffering.max.messages": spec.options.get("queue", 100_000),
                "delivery.report.only.error": self._form not in ("callback", "future"),
                "on_delivery": self._on_delivery,
                **spec.options.get("config", {}),
            }
        )
        self._stopped = False
        self._poller = threading.Thread(target=self._poll)
        if self._form == "future":
            self._poller.start()

    def _poll(self) -> None:
        while not self._stopped:
            self._producer.poll(0.1)

    def _on_delivery(self, error: KafkaError | None, _message: Message) -> None:
        if error is None:
            self._delivered.append(None)
        elif self._error is None:
            self._error = error

    def sending(self) -> Send:
        produce, poll, topic = self._producer.produce, self._producer.poll, self._topic
        encode, now = msgspec.json.Encoder().encode, time.time
        numbers = self._numbers
        shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
        stamped = 0.0
        stamp = ("sent-at", "")

        def send(e: PlainEnvelope, on_delivery: OnDelivery | None = None) -> None:
            nonlocal stamped, stamp
            if (moment := now()) > stamped:
                stamped = moment + STAMP_S
                stamp = ("sent-at", format_time(datetime.fromtimestamp(moment, timezone.utc)))
                shared.clear()
            kind = (e.message_type, e.content_type)
            same = shared.get(kind)
            if same is None:
                same = shared[kind] = [("message-type", e.message_type), ("content-type", e.content_type), stamp]
            headers: list[Any] = [("id", e.id), *same]
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
            value = encode(e.message)
            while True:
                try:
                    produce(topic, value, e.key, headers=headers, on_delivery=on_delivery)
                    break
                except BufferError:
                    poll(FULL_POLL_S)
            if not next(numbers) % POLL_EVERY:
                poll(0)

        return self._awaited(send) if self._form in ("flush", "future") else send

    def _awaited(self, send: Callable[[PlainEnvelope, OnDelivery | None], None]) -> Send:
        flush = self._producer.flush
        if self._form == "flush":

            def send_and_flush(e: PlainEnvelope) -> None:
                send(e, None)
                flush()

            return send_and_flush

        def send_and_wait(e: PlainEnvelope) -> None:
            answer: Future[None] = Future()

            def on_delivery(error: KafkaError | None, message: Message) -> None:
                self._on_delivery(error, message)
                answer.set_result(None)

            send(e, on_delivery)
            answer.result()

        return send_and_wait

    def waiting(self) -> int:
        self._producer.poll(0)
        return len(self._producer)

    def flush(self) -> int:
        left = self._producer.flush()
        if left or self._error is not None:
            raise RuntimeError(f"not everything was delivered: {self._error}, {left} left")
        now = next(self._numbers)  # which takes one itself
        sent, self._before = now - self._before - 1, now
        delivered = len(self._delivered)
        self._delivered.clear()
        return delivered if self._form in ("callback", "future") else sent

    def close(self) -> dict[str, Any]:
        self._stopped = True
        if self._form == "future":
            self._poller.join()
        return {}


if __name__ == "__main__":
    serve("confluent-kafka", Single)
