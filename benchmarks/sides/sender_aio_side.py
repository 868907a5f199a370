"""kbatch's senders on an event loop. Options: `tasks`, which share the messages of a turn (1); `form`, one of

batched     `kbatch.aio.BatchedSender.send` for each message; `sender`: its arguments
inline      `kbatch.aio.InlineSender.send` for each message
send_batch  prepared batches, `kbatch.aio.Producer.send_batch`

and `calls`: "rate", or "cost" as one_at_a_time.py has it, of the first form on one task.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.sides.base import Spec, Turn, read_order, read_spec, say, say_ready, settle
from benchmarks.sides.one_at_a_time import percentiles, shares
from kbatch import aio

Send = Callable[[Any], Awaitable[object]]


class Nothing:
    async def send(self, message: Any) -> None:
        """An empty coroutine, which takes what awaiting one takes."""


class Client:
    """One that sends, with what it sends: messages, or batches of them."""

    def __init__(self, spec: Spec) -> None:
        self.given_up: list[Exception] = []
        messages = kbatch_envelopes(spec.pool, spec.headers)
        self.items: Sequence[Any] = messages
        self.each = 1
        self._spec = spec
        self._acked = 0
        self._sender: Any = None
        if spec.options.get("form") == "send_batch":
            self.each = spec.batch
            self.items = [messages[at : at + spec.batch] for at in range(0, spec.pool, spec.batch)]

    async def open(self, stack: AsyncExitStack) -> Send:
        spec = self._spec
        config = {"bootstrap.servers": spec.bootstrap, **spec.options.get("config", {})}
        form = spec.options.get("form", "batched")
        producer = await stack.enter_async_context(aio.Producer(config))
        if form == "batched":
            agent = aio.SendingAgent(producer, spec.topic, on_failed=lambda _, error: self.given_up.append(error))
            self._sender = await stack.enter_async_context(aio.BatchedSender(agent, **spec.options.get("sender", {})))
            send: Send = self._sender.send
            return send
        if form == "inline":
            inline = await stack.enter_async_context(aio.InlineSender(producer, spec.topic))
            return inline.send
        topic = spec.topic

        async def send_batch(batch: list[kbatch.Envelope[Any]]) -> None:
            (await producer.send_batch(topic, batch)).raise_for_errors()

        return send_batch

    async def flush(self, count: int) -> int:
        """Waits for the outcomes of `count` messages; returns how many were acknowledged."""
        if self._sender is None:
            return count  # each call has awaited its own, and raised if it failed
        left = await self._sender.flush()
        if left or self.given_up:
            raise RuntimeError(f"not everything was delivered: {left} left, {self.given_up[:1]}")
        acked: int = self._sender.stats()["acked"]
        more, self._acked = acked - self._acked, acked
        return more


async def _loop(send: Send, items: Sequence[Any]) -> tuple[int, int]:
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for item in items:
        await send(item)
    return time.perf_counter_ns() - wall, time.thread_time_ns() - cpu


async def _timed(send: Send, items: Sequence[Any]) -> list[int]:
    now, durations = time.perf_counter_ns, []
    for item in items:
        before = now()
        await send(item)
        durations.append(now() - before)
    return durations


async def _cost(client: Client, send: Send, count: int) -> tuple[int, dict[str, float]]:
    messages = next(shares(count // 2, client.items, 1))
    acknowledged, extra = 0, dict[str, float]()
    for name, call in (("empty_", Nothing().send), ("", send)):
        wall, cpu = await _loop(call, messages)
        if call is send:
            acknowledged += await client.flush(len(messages))
        extra |= {f"{name}wall": wall / len(messages), f"{name}cpu": cpu / len(messages)}
        extra |= percentiles(await _timed(call, messages), name)
        if call is send:
            acknowledged += await client.flush(len(messages))
    return acknowledged, extra


async def main() -> None:
    spec = read_spec()
    client = Client(spec)
    async with AsyncExitStack() as stack:
        send = await client.open(stack)
        settle()
        say_ready(f"kbatch {kbatch.__version__}")
        tasks = spec.options.get("tasks", 1)
        while line := await asyncio.to_thread(sys.stdin.readline):
            count, _ = read_order(line)
            turn, extra = Turn(), dict[str, float]()
            if spec.options.get("calls") == "cost":
                acknowledged, extra = await _cost(client, send, count)
            else:
                await asyncio.gather(
                    *(_loop(send, share) for share in shares(count // client.each, client.items, tasks))
                )
                acknowledged = await client.flush(count)
            say(turn.end(count, acknowledged, extra))
    say({"closed": True})


if __name__ == "__main__":
    asyncio.run(main())
