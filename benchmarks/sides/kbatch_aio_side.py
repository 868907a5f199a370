"""kbatch on an event loop, one batch at a time, and what the loop's other tasks notice of it.

During a turn without a pace a second task does nothing but give way (`await asyncio.sleep(0)`), again and again; the
longest time between two of its steps is the longest for which any task would have stood still. It also runs for as long
with nothing sent: what it sees then is the machine's doing. `extra` of a turn, in milliseconds: `longest_ms`,
`alone_ms`; and `steps`, how many steps it made.

Options: `form`: "aio", `await` of `kbatch.aio.Producer.send_batch`; or "submit", `await` of `kbatch.Producer.submit`,
which maps and enqueues on the loop's own thread, in one go.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from copy import copy
from itertools import cycle
from typing import Any

import msgspec

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.sides.base import Pace, Spec, Turn, read_order, read_spec, say, say_ready, settle
from kbatch import aio

Send = Callable[[str, list[kbatch.Envelope[Any]]], Awaitable[kbatch.DeliveryReport]]


class Ticker:
    def __init__(self) -> None:
        self.longest_ns = self.steps = 0
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        last = time.perf_counter_ns()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter_ns()
            if now - last > self.longest_ns:
                self.longest_ns = now - last
            last = now
            self.steps += 1

    @classmethod
    async def begun(cls) -> "Ticker":
        ticker = cls()
        await asyncio.sleep(0)  # it makes its first step
        return ticker

    async def end(self) -> float:
        """Ends it; the longest time between two steps, in milliseconds."""
        await asyncio.sleep(0)  # it sees the pause that ended just now
        self._task.cancel()
        await asyncio.wait([self._task])
        return self.longest_ns / 1e6


class Sender:
    def __init__(self, spec: Spec, send: Send) -> None:
        self._topic, self._batch, self._send = spec.topic, spec.batch, send
        self._envelopes = cycle(kbatch_envelopes(spec.pool, spec.headers))

    def make(self, count: int) -> list[list[kbatch.Envelope[Any]]]:
        """Envelopes that nobody else keeps, so that it is kbatch that frees them."""
        return [[copy(next(self._envelopes)) for _ in range(self._batch)] for _ in range(count // self._batch)]

    async def send_one(self, batches: list[list[kbatch.Envelope[Any]]]) -> int:
        return (await self._send(self._topic, batches.pop())).raise_for_errors().acked

    async def send(self, batches: list[list[kbatch.Envelope[Any]]]) -> int:
        acknowledged = 0
        while batches:
            acknowledged += await self.send_one(batches)
        return acknowledged

    async def send_paced(self, batches: list[list[kbatch.Envelope[Any]]], pace: Pace) -> int:
        acknowledged = 0
        for number in range(len(batches)):
            called_ns = pace.due(number)
            acknowledged += await self.send_one(batches)
            pace.answered(number, called_ns)
        return acknowledged


async def _sender(form: str, config: dict[str, Any], stack: AsyncExitStack) -> Send:
    if form == "aio":
        return (await stack.enter_async_context(aio.Producer(config))).send_batch
    return stack.enter_context(kbatch.Producer(config)).submit


async def main() -> None:
    spec = read_spec()
    async with AsyncExitStack() as stack:
        config = {"bootstrap.servers": spec.bootstrap, **spec.options.get("config", {})}
        sender = Sender(spec, await _sender(spec.options.get("form", "aio"), config, stack))
        say_ready(f"kbatch {kbatch.__version__}")
        for line in sys.stdin:
            count, interval_ns = read_order(line)
            batches = sender.make(count)
            settle()
            if interval_ns:
                turn, pace = Turn(), Pace(count // spec.batch, interval_ns)
                say(turn.end(count, await sender.send_paced(batches, pace), {}, pace))
                continue
            ticker = await Ticker.begun()
            turn = Turn()
            result = turn.end(count, await sender.send(batches), {})
            longest_ms = await ticker.end()
            control = await Ticker.begun()
            await asyncio.sleep(result.seconds)
            extra = {"longest_ms": longest_ms, "alone_ms": await control.end(), "steps": ticker.steps}
            say(msgspec.structs.replace(result, extra=extra))
    say({"closed": True})


if __name__ == "__main__":
    asyncio.run(main())
