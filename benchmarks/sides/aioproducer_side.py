"""confluent-kafka's AIOProducer: `produce` gives a future for each message; it cannot carry headers.

Its own buffer is as large as the batch, so that each batch is handed to librdkafka by one `produce_batch` on its pool
of threads. It polls for delivery reports only then, and sets the results of futures on a thread of the pool, which does
not wake the event loop; so `flush()` is awaited before the futures are, after each batch or as soon as so many messages
as the window holds have no answer. Without it a batch would wait for the buffer's timer, a second by default.

Options: `linger_ms`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from confluent_kafka.aio import AIOProducer

from benchmarks.data import orders
from benchmarks.sides.base import Spec, serve_async


class Sender:
    def __init__(self, spec: Spec, producer: AIOProducer) -> None:
        self._topic, self._batch = spec.topic, spec.batch
        self._most = max(spec.window, spec.batch)
        self._producer = producer
        self._encode = msgspec.json.Encoder().encode
        pool = list(orders(spec.pool, spec.headers))
        self._batches = [pool[at : at + spec.batch] for at in range(0, spec.pool, spec.batch)]
        self._next = 0

    async def _answers(self, futures: list[Any]) -> int:
        await self._producer.flush()
        for future in futures:
            future.result()  # raises what the delivery report said, or that there was none
        return len(futures)

    async def send(self, count: int) -> int:
        produce, topic, encode = self._producer.produce, self._topic, self._encode
        acknowledged = 0
        futures: list[Any] = []
        for _ in range(count // self._batch):
            batch = self._batches[self._next]
            self._next = (self._next + 1) % len(self._batches)
            for e in batch:
                futures.append(await produce(topic, encode(e.message), e.key))
            if len(futures) >= self._most:
                acknowledged += await self._answers(futures)
                futures = []
        return acknowledged + await self._answers(futures)


@asynccontextmanager
async def make(spec: Spec) -> AsyncIterator[Sender]:
    if spec.headers or spec.values:
        raise ValueError("AIOProducer sends orders without headers")
    config = {
        "bootstrap.servers": spec.bootstrap,
        "acks": "all",
        "enable.idempotence": True,
        "linger.ms": spec.options.get("linger_ms", 0),
        "queue.buffering.max.messages": 1_000_000,
    }
    async with AIOProducer(config, batch_size=spec.batch) as producer:
        yield Sender(spec, producer)


if __name__ == "__main__":
    serve_async("AIOProducer", make)
