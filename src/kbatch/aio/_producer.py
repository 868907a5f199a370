"""The producer for asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Sized
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from kbatch._base_producer import BaseProducer, check_timeout
from kbatch._errors import BatchPending, ProducerClosedError
from kbatch._fastmap import Envelope
from kbatch._loop import LoopWaker, Turn, Turns, call_on_loop, in_thread
from kbatch._pending import PendingBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._report import DeliveryReport

__all__ = ["Producer"]

_logger = logging.getLogger("kbatch")

_SLICE_S = 0.002  # how long the loop may be kept at a time
_LONG = 10_000
_LOOK_S = 0.1  # between two looks for loops that were closed
_NO_TURN = nullcontext()


class Producer(BaseProducer):
    """Sends batches of envelopes to Kafka from asyncio. Any number of tasks and loops may use one producer.

    Takes what `kbatch.Producer` takes. The callbacks of `config` run on a thread, as there.
    """

    _shown = "kbatch.aio.Producer"

    def _prepare(self) -> None:
        self._turns = Turns()
        self._arrivals = _Arrivals()
        self._is_closing = False
        self._tasks: set[asyncio.Task[Any]] = set()  # callbacks that run; a loop itself keeps weak references
        self._closers: set[asyncio.Task[Any] | None] = set()

    # -- sending

    async def send_batch(
        self, topic: str | None, envelopes: Iterable[Envelope[Any]], *, timeout: float | None = None
    ) -> DeliveryReport:
        """Sends a batch and waits until each of its envelopes has an outcome.

        Takes, returns and raises what `kbatch.Producer.send_batch` does. If the task is cancelled, nothing is sent of
        a batch that is still being mapped; later, what was not yet handed to librdkafka is settled as failed, and the
        rest goes on.
        """
        check_timeout(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        batch = PendingBatch(self._core)
        mapping = self._map_batch(batch, topic, envelopes)
        del envelopes  # what the caller does not keep is freed with the batch, in slices
        waker = LoopWaker()
        with await mapping:
            left = None if end is None else end - time.monotonic()
            self._send_detached(batch, left, waker=waker)
        timer = None if left is None else waker.loop.call_later(left, waker.resolve)
        try:
            await waker.future
        except BaseException:
            self._core.abandon(batch)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            batch._remove_waker(waker)
        if not batch.done():
            raise BatchPending(f"no answer for a batch of {len(batch)} envelopes within {timeout} s; it goes on", batch)
        return batch.report

    async def submit(
        self,
        topic: str | None,
        envelopes: Iterable[Envelope[Any]],
        *,
        callback: Callable[[DeliveryReport], object] | None = None,
    ) -> PendingBatch:
        """Hands a batch to librdkafka and returns without waiting for the broker; await the answer for that.

        It waits while ``max_in_flight`` messages are in flight or librdkafka's queue is full. If the task is cancelled
        meanwhile, what was not yet handed over is settled as failed, and the rest goes on.

        Args:
            topic, envelopes: As in `send_batch`.
            callback: Called once with the report, in a task of this loop; may be a coroutine function. An exception
                from it is logged.

        Raises:
            SerializationError, ProducerClosedError, ProducerFatalError, ForkError: Nothing was sent, and `callback`
                is not called.
        """
        self._refuse_submit()
        batch = PendingBatch(self._core)
        mapping = self._map_batch(batch, topic, envelopes)
        del envelopes
        with await mapping:
            enqueued = LoopWaker()
            done = None if callback is None else self._task_starter(callback, lambda: callback(batch.report))
            self._core.send_detached(batch, enqueued=enqueued, waker=done)
        try:
            await enqueued.future
        except BaseException:
            self._core.abandon(batch)
            raise
        return batch

    async def _map_batch(
        self, batch: PendingBatch, topic: str | None, envelopes: Iterable[Envelope[Any]]
    ) -> AbstractContextManager[object]:
        """Phase 1, in this call's turn. The batch is to be sent before the turn is left: the end of a `with` block."""
        core, mapping = self._core, None
        if self._is_closing:
            raise ProducerClosedError("the producer is closed")
        if isinstance(envelopes, (list, tuple)) and core.started() and not self._turns.are_taken():
            mapping = core.begin_mapping(batch, topic, envelopes)
            if len(batch) <= _LONG and core.map_slice(mapping, _SLICE_S):
                return _NO_TURN
        turn = _Arrival(self._arrivals, self._turns.join())  # nothing was awaited yet: nobody has come meanwhile
        try:
            turn.count = len(envelopes) if isinstance(envelopes, Sized) else 0
            if mapping is None:
                mapping = core.begin_mapping(batch, topic, await _gather(envelopes, turn))
            del envelopes
            await turn.come()  # one of a loop at a time: together their slices would hold it up
            if not core.started():
                await in_thread("kbatch-start", core.start)
            if len(batch) > _LONG:  # to copy and to free so many references is a slice of its own
                await asyncio.sleep(0)
            while not core.map_slice(mapping, _SLICE_S):
                await asyncio.sleep(0)
        except BaseException:
            turn.leave()
            raise
        return turn

    def _task_starter(self, callback: object, call: Callable[[], object]) -> Callable[[], None]:
        # What starts `call`, from any thread, as a task of the running loop with this context; close waits for it.
        # `callback` is the user's, for a log.
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()

        async def run() -> None:
            try:
                result = call()
                if inspect.isawaitable(result):
                    await result
            except Exception:
                _logger.exception(
                    "a callback failed: %s", getattr(callback, "__qualname__", type(callback).__qualname__)
                )

        def start() -> None:
            task = context.run(loop.create_task, run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        def starter() -> None:
            if not call_on_loop(loop, start):
                _logger.error("a callback was not called: the event loop on which its batch was sent is closed")

        return starter

    # -- the producer as a whole

    async def flush(self, timeout: float | None = None) -> int:
        """As `kbatch.Producer.flush`."""
        check_timeout(timeout)
        if len(self) == 0 and not self._arrivals and self._transactions is None and not self.closed:
            return 0
        arriving = set(self._arrivals)

        def flush() -> int:
            end = None if timeout is None else time.monotonic() + timeout
            self._arrivals.wait(arriving, end)
            left = self._core.flush(None if end is None else max(0.0, end - time.monotonic()))
            return left + sum(arrival.count for arrival in self._arrivals.among(arriving))

        return await in_thread("kbatch-flush", flush)

    async def close(self, timeout: float | None = None) -> int:
        """As `kbatch.Producer.close`; callbacks on other loops than this are not waited for.

        If the task is cancelled, closing goes on without it.
        """
        check_timeout(timeout)
        if timeout is None:
            timeout = self._close_timeout
        end = time.monotonic() + timeout
        loop, me = asyncio.get_running_loop(), asyncio.current_task()
        self._closers.add(me)  # callbacks that close do not wait for each other
        self._is_closing = self._core.started()  # from here on nobody is accepted; who was, is waited for
        self._turns.forget_closed_loops()

        def close() -> int:
            arriving = set(self._arrivals)
            self._arrivals.wait(arriving, end)
            late = sum(arrival.count for arrival in self._arrivals.among(arriving))
            return self._core.close(max(0.0, end - time.monotonic())) + late

        try:
            left = await in_thread("kbatch-close", close)
            callbacks = {task for task in self._tasks.copy() - self._closers if task.get_loop() is loop}
            if callbacks:
                await asyncio.wait(callbacks, timeout=max(0.0, end - time.monotonic()))
        finally:
            self._closers.discard(me)
        return left

    @property
    def closed(self) -> bool:
        return self._is_closing or super().closed

    def __len__(self) -> int:
        return super().__len__() + sum(arrival.count for arrival in set(self._arrivals))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._check_delivered(await self.close(), error)


class _Arrivals(set["_Arrival"]):
    """The calls of all loops that were accepted and have not handed their batch over yet."""

    def __init__(self) -> None:
        self._gone = threading.Condition(threading.RLock())  # a finalizer may take one away

    def among(self, arriving: set[_Arrival]) -> list[_Arrival]:
        """Those of `arriving` that will still hand something over: not those of a loop that is closed."""
        return [arrival for arrival in arriving if arrival in self and not arrival.loop.is_closed()]

    def wait(self, arriving: set[_Arrival], end: float | None) -> None:
        """Waits until these have handed over, or given up."""
        with self._gone:
            while self.among(arriving) and (end is None or time.monotonic() < end):
                self._gone.wait(_LOOK_S if end is None else min(_LOOK_S, max(0.0, end - time.monotonic())))

    def end(self, arrival: _Arrival) -> None:
        with self._gone:
            self.discard(arrival)
            self._gone.notify_all()


class _Arrival:
    """A call that was accepted, until it has handed its batch over: the end of a `with` block, which is its turn."""

    def __init__(self, arrivals: _Arrivals, turn: Turn) -> None:
        self.count = 0  # envelopes, as far as is known
        self.loop = asyncio.get_running_loop()
        self._arrivals = arrivals
        self._turn = turn
        arrivals.add(self)

    async def come(self) -> None:
        await self._turn.come()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        self._turn.leave()
        self._arrivals.end(self)


async def _gather(envelopes: Iterable[Envelope[Any]], arrival: _Arrival) -> Iterable[Envelope[Any]]:
    # What has a length is copied at once, natively; a generator may take long.
    if isinstance(envelopes, (Sized, Envelope)):
        return envelopes
    gathered = []
    end = time.monotonic() + _SLICE_S
    for envelope in envelopes:
        gathered.append(envelope)
        if time.monotonic() >= end:
            arrival.count = len(gathered)
            await asyncio.sleep(0)
            end = time.monotonic() + _SLICE_S
    arrival.count = len(gathered)
    return gathered
