"""Durable sends of many threads, or tasks, beside a bare group commit: one thread that inserts the rows that wait,
commits them together, and tells who waits, without an outbox's order, packing and time-outs.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.figures import Section, figure
from kbatch import aio

CALLERS = 64
SENDS = 100  # of each
TARGET = 0.7

#: inserts rows, by the index of an envelope, and commits them
Write = Callable[[list[int]], object]


def durable_sends(
    section: Section,
    outbox: Any,
    writing: Callable[[], contextlib.AbstractContextManager[Write]],
    clear: Callable[[], object],
    turns: int,
) -> None:
    """Adds the figures of an outbox.

    Args:
        writing: Opens the connection of a bare group commit, whose thread it is called in.
        clear: Empties the outbox.
    """
    envelopes = kbatch_envelopes(SENDS)
    rates: dict[str, list[float]] = {"threads": [], "tasks": []}
    bare: dict[str, list[float]] = {"threads": [], "tasks": []}
    for _ in range(turns):
        with kbatch.DurableSender(outbox, "orders") as sender:
            sender.send(envelopes[0])
            rates["threads"].append(_in_threads(lambda number: sender.send(envelopes[number])))
        clear()
        bare["threads"].append(_bare_in_threads(writing))
        clear()
        rates["tasks"].append(asyncio.run(_tasks(outbox, envelopes)))
        clear()
        bare["tasks"].append(asyncio.run(_bare_tasks(writing)))
        clear()
    for name in rates:
        ratios = [one / other for one, other in zip(rates[name], bare[name], strict=True)]
        section.figures += [
            figure(f"{name}, sends/s", rates[name], digits=0),
            figure(f"{name}, bare group commit, sends/s", bare[name], digits=0),
            figure(f"{name}: durable / bare", ratios, target=TARGET),
        ]


def _in_threads(send: Callable[[int], object]) -> float:
    """Sends a second."""

    def work() -> None:
        for number in range(SENDS):
            send(number)

    threads = [threading.Thread(target=work) for _ in range(CALLERS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return CALLERS * SENDS / (time.perf_counter() - began)


async def _in_tasks(send: Callable[[int], Any]) -> float:
    async def work() -> None:
        for number in range(SENDS):
            await send(number)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CALLERS)))
    return CALLERS * SENDS / (time.perf_counter() - began)


async def _tasks(outbox: Any, envelopes: list["kbatch.Envelope[Any]"]) -> float:
    async with aio.DurableSender(outbox, "orders") as sender:
        await sender.send(envelopes[0])
        return await _in_tasks(lambda number: sender.send(envelopes[number]))


@contextlib.contextmanager
def _group_commit(
    writing: Callable[[], contextlib.AbstractContextManager[Write]], tell: Callable[[list[Any]], object]
) -> Iterator[Callable[[int, Any], None]]:
    """Takes an index and who waits for it; `tell` is called with all whose rows were committed together."""
    waiting: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()

    def work() -> None:
        with writing() as write:
            while (first := waiting.get()) is not None:
                group = [first]
                with contextlib.suppress(queue.Empty):
                    while (more := waiting.get_nowait()) is not None:
                        group.append(more)
                write([number for number, _ in group])
                tell([waiter for _, waiter in group])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda number, waiter: waiting.put((number, waiter))
    finally:
        waiting.put(None)
        thread.join()


def _bare_in_threads(writing: Callable[[], contextlib.AbstractContextManager[Write]]) -> float:
    def tell(waiters: Iterable[threading.Event]) -> None:
        for waiter in waiters:
            waiter.set()

    with _group_commit(writing, tell) as put:

        def send(number: int) -> None:
            done = threading.Event()
            put(number, done)
            done.wait()

        send(0)
        return _in_threads(send)


async def _bare_tasks(writing: Callable[[], contextlib.AbstractContextManager[Write]]) -> float:
    loop = asyncio.get_running_loop()

    def resolve(waiters: Iterable["asyncio.Future[None]"]) -> None:
        for waiter in waiters:
            waiter.set_result(None)

    with _group_commit(writing, lambda waiters: loop.call_soon_threadsafe(resolve, waiters)) as put:

        async def send(number: int) -> None:
            done = loop.create_future()
            put(number, done)
            await done

        await send(0)
        return await _in_tasks(send)
