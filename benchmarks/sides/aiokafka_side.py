"""aiokafka with the mapping in Python. Options: `linger_ms`; `tasks`, which share the messages of a turn (1), and so
their batches and the window; `form`, one of

send        one `send` per message, the batch's futures awaited together; for batches of one that is `send_and_wait`
send_batch  record batches of its own making, one for each partition, with one future each; the partition comes from
            the key's CRC-32, as librdkafka's does

A large `max_batch_size` was best for both.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]

from benchmarks.data import PlainEnvelope, format_time, header_pairs, orders
from benchmarks.sides.base import Spec, serve_async


class Sender:
    def __init__(self, spec: Spec, producer: AIOKafkaProducer) -> None:
        self._spec = spec
        self._producer = producer
        self._encode = msgspec.json.Encoder().encode
        self._enqueue = self._send_batch if spec.options.get("form") == "send_batch" else self._send
        pool = list(orders(spec.pool, spec.headers))
        self._batches = [pool[at : at + spec.batch] for at in range(0, spec.pool, spec.batch)]
        self._next = 0

    async def _send(self, envelopes: list[PlainEnvelope]) -> list[Any]:
        send, topic, encode = self._producer.send, self._spec.topic, self._encode
        sent_at = format_time(datetime.now(timezone.utc))
        futures = []
        for e in envelopes:
            headers = [(name, value.encode()) for name, value in header_pairs(e, sent_at)] if self._spec.headers else []
            key = e.key.encode() if e.key is not None else None
            futures.append(await send(topic, encode(e.message), key, headers=headers))
        return futures

    async def _send_batch(self, envelopes: list[PlainEnvelope]) -> list[Any]:
        encode, create = self._encode, self._producer.create_batch
        sent_at = format_time(datetime.now(timezone.utc))
        partitions = self._spec.partitions
        batches = [create() for _ in range(partitions)]
        futures = []
        for e in envelopes:
            headers = [(name, value.encode()) for name, value in header_pairs(e, sent_at)] if self._spec.headers else []
            key = (e.key or "").encode()
            value = encode(e.message)
            partition = zlib.crc32(key) % partitions
            while batches[partition].append(timestamp=None, key=key, value=value, headers=headers) is None:
                futures.append(await self._hand_over(batches[partition], partition))
                batches[partition] = create()
        for partition, batch in enumerate(batches):
            if batch.record_count():
                futures.append(await self._hand_over(batch, partition))
        return futures

    async def _hand_over(self, batch: Any, partition: int) -> Any:
        return await self._producer.send_batch(batch, self._spec.topic, partition=partition)

    async def send(self, count: int) -> int:
        batches = count // self._spec.batch
        tasks = self._spec.options.get("tasks", 1)
        numbers = [batches // tasks + (at < batches % tasks) for at in range(tasks)]
        if tasks == 1:
            await self._send_batches(batches)
        else:
            await asyncio.gather(*map(self._send_batches, numbers))
        return count  # a future whose messages were not acknowledged has raised

    async def _send_batches(self, number: int) -> None:
        flying: deque[list[Any]] = deque()
        most = max(1, self._spec.window // self._spec.batch // self._spec.options.get("tasks", 1))
        for _ in range(number):
            batch = self._batches[self._next]
            self._next = (self._next + 1) % len(self._batches)
            flying.append(await self._enqueue(batch))
            if len(flying) >= most:
                await asyncio.gather(*flying.popleft())
        for futures in flying:
            await asyncio.gather(*futures)


@asynccontextmanager
async def make(spec: Spec) -> AsyncIterator[Sender]:
    producer = AIOKafkaProducer(
        bootstrap_servers=spec.bootstrap,
        acks="all",
        enable_idempotence=True,
        linger_ms=spec.options.get("linger_ms", 0),
        max_batch_size=spec.options.get("max_batch_size", 1_000_000),
    )
    await producer.start()
    try:
        yield Sender(spec, producer)
    finally:
        await producer.stop()


if __name__ == "__main__":
    serve_async("aiokafka", make)
