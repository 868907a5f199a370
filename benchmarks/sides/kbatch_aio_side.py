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
from typing import Any

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.sides.base import Pace, Spec, Turn, read_order, read_spec, say, settle

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

    async def stop(self) -> None:
        await asyncio.sleep(0)  # it sees the pause that ended just now
        self._task.cancel()
        await asyncio.wait([self._task])


class Sender:
    def __init__(self, spec: Spec, send: Send) -> None:
        self._topic, self._batch, self._send = spec.topic, spec.batch, send
        envelopes = kbatch_envelopes(spec.pool, spec.headers)
        envelopes *= -(-spec.batch // spec.pool)
        self._batches = [envelopes[at : at + spec.batch] for at in range(0, len(envelopes), spec.batch)]
        self._next = 0

    async def send_one(self) -> int:
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        return (await self._send(self._topic, batch)).raise_for_errors().acked

    async def send(self, count: int) -> tuple[int, dict[str, float]]:
        acknowledged, start = 0, time.monotonic()
        ticker = Ticker()
        await asyncio.sleep(0)  # its clock begins
        for _ in range(count // self._batch):
            acknowledged += await self.send_one()
        await ticker.stop()
        control = Ticker()
        await asyncio.sleep(time.monotonic() - start)
        await control.stop()
        return acknowledged, {
            "longest_ms": ticker.longest_ns / 1e6,
            "alone_ms": control.longest_ns / 1e6,
            "steps": ticker.steps,
        }

    async def send_paced(self, pace: Pace) -> int:
        acknowledged = 0
        for number in range(len(pace.served_ns)):
            called_ns = pace.due(number)
            acknowledged += await self.send_one()
            pace.answered(number, called_ns)
        return acknowledged


async def _sender(form: str, config: dict[str, Any], stack: AsyncExitStack) -> Send:
    if form == "aio":
        from kbatch import aio  # type: ignore[attr-defined,unused-ignore]

        return (await stack.enter_async_context(aio.Producer(config))).send_batch  # type: ignore[no-any-return,unused-ignore]
    producer = stack.enter_context(kbatch.Producer(config))
    return producer.submit


async def main() -> None:
    spec = read_spec()
    async with AsyncExitStack() as stack:
        config = {"bootstrap.servers": spec.bootstrap, **spec.options.get("config", {})}
        sender = Sender(spec, await _sender(spec.options.get("form", "aio"), config, stack))
        settle()
        say({"ready": f"kbatch {kbatch.__version__}"})
        for line in sys.stdin:
            count, interval_ns = read_order(line)
            pace, extra = None, dict[str, float]()
            turn = Turn()
            if interval_ns:
                pace = Pace(count // spec.batch, interval_ns)
                acknowledged = await sender.send_paced(pace)
            else:
                acknowledged, extra = await sender.send(count)
            say(turn.end(count, acknowledged, extra, pace))
    say({"closed": True})


if __name__ == "__main__":
    asyncio.run(main())
