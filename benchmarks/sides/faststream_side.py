"""FastStream's `publish_batch`: the headers are those of the whole batch, so the orders have none of their own.

It adds one header itself, `correlation_id`. Bodies are encoded by msgspec beforehand, as for the other sides, which is
faster than to let FastStream do it. Keys are per message, by `KafkaPublishMessage`.

Options: `over`: "aiokafka" (each call makes one batch of records for one partition; here the partitions take turns) or
"confluent-kafka" (one task and one callback for each message); `linger_ms` for the latter.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from faststream import confluent, kafka

from benchmarks.data import orders
from benchmarks.sides.base import Spec, serve_async

Publish = Callable[..., Any]
#: The limit of one batch of records for aiokafka; brokers take 1 MiB unless they are told otherwise.
MOST_BYTES = 1_000_000


class Sender:
    def __init__(self, spec: Spec, publish: Publish, message: Callable[..., Any], partitions: int) -> None:
        self._spec, self._publish, self._message = spec, publish, message
        self._partitions = partitions
        self._encode = msgspec.json.Encoder().encode
        pool = list(orders(spec.pool, spec.headers))
        self._batches = [pool[at : at + spec.batch] for at in range(0, spec.pool, spec.batch)]
        self._next = self._partition = 0

    async def _send_batch(self) -> None:
        encode, message = self._encode, self._message
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        where: dict[str, Any] = {"topic": self._spec.topic}
        if self._partitions:
            where["partition"] = self._partition
            self._partition = (self._partition + 1) % self._partitions
        await self._publish(*[message(encode(e.message), key=e.key and e.key.encode()) for e in batch], **where)

    async def send(self, count: int) -> int:
        flying: deque[asyncio.Task[None]] = deque()
        most = max(1, self._spec.window // self._spec.batch)
        for _ in range(count // self._spec.batch):
            if len(flying) >= most:
                await flying.popleft()
            flying.append(asyncio.create_task(self._send_batch()))
        await asyncio.gather(*flying)
        return count  # a publish_batch that failed has raised


@asynccontextmanager
async def make(spec: Spec) -> AsyncIterator[Sender]:
    if spec.headers or spec.values:
        raise ValueError("publish_batch knows no headers of single messages")
    if spec.options.get("over", "aiokafka") == "aiokafka":
        over_aiokafka = kafka.KafkaBroker(
            spec.bootstrap, acks="all", enable_idempotence=True, max_batch_size=MOST_BYTES, logger=None
        )
        async with over_aiokafka as broker:
            await broker.start()
            yield Sender(spec, broker.publish_batch, kafka.KafkaPublishMessage, spec.partitions)
    else:
        over_confluent = confluent.KafkaBroker(
            spec.bootstrap,
            acks="all",
            enable_idempotence=True,
            linger_ms=spec.options.get("linger_ms", 0),
            config={"queue.buffering.max.messages": 1_000_000},
            logger=None,
        )
        async with over_confluent as other:
            await other.start()
            yield Sender(spec, other.publish_batch, confluent.KafkaPublishMessage, 0)


if __name__ == "__main__":
    serve_async("FastStream", make)
