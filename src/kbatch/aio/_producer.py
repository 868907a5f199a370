"""The producer for asyncio."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from kbatch._base_producer import BaseProducer
from kbatch._callbacks import callback_name, check_callback
from kbatch._checks import check_timeout
from kbatch._errors import ProducerClosedError
from kbatch._fastmap import Call, Envelope, LoopWaker, TaskStarter, Turns, comes_from, monotonic, running_loop
from kbatch._loop import in_thread
from kbatch._pending import PendingBatch, no_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Turn
    from kbatch._report import DeliveryReport

__all__ = ["Producer"]

_logger = logging.getLogger("kbatch")

_SLICE_S = 0.002  # how long the loop may be kept at a time
_LONG = 10_000

_F = TypeVar("_F", bound="Callable[..., Any]")


def _marked_as_coroutine_function(function: _F) -> _F:
    """For inspect and for mocks: it takes its arguments when it is called, and returns a coroutine.

    Up to Python 3.11 only asyncio and unittest.mock see it.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return function


class Producer(BaseProducer):
    """Sends batches of envelopes to Kafka from asyncio. Any number of tasks and loops may use one producer.

    Takes what `kbatch.Producer` takes. The callbacks of `config` run on a thread, as there.
    """

    _shown = "kbatch.aio.Producer"

    def _prepare(self) -> None:
        self._turns = Turns()  # of the calls that were accepted and have not handed their batch over
        self._is_closing = False
        self._callbacks: set[TaskStarter] = set()  # those that run
        self._closers: list[Call] = []  # those of them that wait for the end of `close`

    # -- sending

    @_marked_as_coroutine_function
    def send_batch(
        self, topic: str | None, envelopes: Iterable[Envelope[Any]], *, timeout: float | None = None
    ) -> Coroutine[Any, Any, DeliveryReport]:
        """Sends a batch and waits until each of its envelopes has an outcome.

        Takes, returns and raises what `kbatch.Producer.send_batch` does. The call itself reads a list, which may be
        used again at once; the task reads what has no length, such as a generator. If the task is cancelled, nothing is
        sent of a batch that is still being mapped; later, what was not yet handed to librdkafka is settled as failed,
        and the rest goes on.
        """
        return self._send_batch(topic, _taken(envelopes), timeout)

    async def _send_batch(
        self, topic: str | None, envelopes: Iterable[Envelope[Any]], timeout: float | None
    ) -> DeliveryReport:
        check_timeout(timeout)
        end = None if timeout is None else monotonic() + timeout
        batch = PendingBatch(self._core)
        waker = LoopWaker()
        with self._turns.turn() as turn:
            mapping = self._map_batch(turn, batch, topic, envelopes)
            del envelopes  # what the caller does not keep is freed with the batch, in slices
            await mapping
            left = None if end is None else end - monotonic()
            enqueued = None if left is None else LoopWaker()
            self._send_detached(batch, left, waker=waker, enqueued=enqueued)
        timer = None if left is None else waker.loop.call_later(left, waker.resolve)
        try:
            await waker.future
            if enqueued is not None and self._transactions is None and not batch.done():
                await enqueued.future  # what was not handed over is settled now, which may be all of it
        except BaseException:
            if not batch._remove_waker(waker):
                batch._wait_no_longer()
            self._core.abandon(batch)
            del batch  # up to Python 3.10 a task keeps its error, and with it this frame
            raise
        finally:
            if timer is not None:
                timer.cancel()
        batch._remove_waker(waker)
        if not batch.done():
            raise no_answer(batch, timeout)
        return batch.report

    @_marked_as_coroutine_function
    def submit(
        self,
        topic: str | None,
        envelopes: Iterable[Envelope[Any]],
        *,
        callback: Callable[[DeliveryReport], object] | None = None,
    ) -> Coroutine[Any, Any, PendingBatch]:
        """Hands a batch to librdkafka and returns without waiting for the broker; await the answer for that.

        It waits while ``max_in_flight`` messages of the topic are in flight or librdkafka's queue is full. Batches for
        one topic keep their order. If the task is cancelled meanwhile, what was not yet handed over is settled as
        failed, and the rest goes on.

        Args:
            topic, envelopes: As in `send_batch`.
            callback: Called once with the report, in a task of this loop; may be a coroutine function. An exception
                from it is logged, `CancelledError` too.

        Raises:
            SerializationError, NotYetDueError, ProducerClosedError, ProducerFatalError, ForkError, ConfigError: As of
                `send_batch`. Nothing was sent, and `callback` is not called.
            ProducerError: The producer has a ``transactional.id``.
            TypeError: `callback` cannot be called with one argument. Nothing was sent.
        """
        return self._submit(topic, _taken(envelopes), callback)

    async def _submit(
        self,
        topic: str | None,
        envelopes: Iterable[Envelope[Any]],
        callback: Callable[[DeliveryReport], object] | None,
    ) -> PendingBatch:
        self._refuse_submit()
        if callback is not None:
            check_callback("callback", callback, "report", takes_coroutines=True)
        batch = PendingBatch(self._core)
        with self._turns.turn() as turn:
            mapping = self._map_batch(turn, batch, topic, envelopes)
            del envelopes
            await mapping
            enqueued = LoopWaker()
            done = None
            if callback is not None:
                done = self._task_starter(
                    lambda: _call_back(callback, batch), batch._unlook, lambda: _log_cancelled(callback)
                )
                batch._look()
            self._core.send_detached(batch, enqueued=enqueued, waker=done)
        try:
            await enqueued.future
        except BaseException:
            self._core.abandon(batch)
            if callback is None:
                del batch  # as in _send_batch
            raise
        return batch

    async def _map_batch(
        self, turn: Turn, batch: PendingBatch, topic: str | None, envelopes: Iterable[Envelope[Any]]
    ) -> None:
        """Phase 1, in this call's turn, which lasts until the batch is handed over."""
        core, mapping = self._core, None
        if self._is_closing:
            raise ProducerClosedError("the producer is closed")
        if isinstance(envelopes, (list, tuple)) and core.started() and not self._turns.are_taken():
            mapping = core.begin_mapping(batch, topic, envelopes)
            if len(batch) <= _LONG and core.map_slice(mapping, _SLICE_S):
                return
        turn.join()  # nothing was awaited yet: nobody has come meanwhile
        turn.count = len(envelopes) if isinstance(envelopes, Sized) else 0
        if mapping is None:
            mapping = core.begin_mapping(batch, topic, await _gather(envelopes, turn))
        del envelopes
        before = turn.come()  # one of a loop at a time: together their slices would hold it up
        if before is not None:
            await before
        if not core.started():
            await in_thread("kbatch-start", core.start)
        if len(batch) > _LONG:  # to copy and to free so many references is a slice of its own
            await asyncio.sleep(0)
        while not core.map_slice(mapping, _SLICE_S):
            await asyncio.sleep(0)

    def _task_starter(
        self,
        make: Callable[[], Coroutine[Any, Any, object]],
        lost: Callable[[], object] | None = None,
        dropped: Callable[[], object] | None = None,
    ) -> TaskStarter:
        # Close waits for what it starts.
        return TaskStarter(make, self._callbacks, lost, dropped)

    # -- the producer as a whole

    async def flush(self, timeout: float | None = None) -> int:
        """As `kbatch.Producer.flush`. Tasks that were made before the call and send at their first step count."""
        left = await self._flush(timeout)
        self._core.undelivered.raise_all()
        return left

    async def _flush(self, timeout: float | None) -> int:
        check_timeout(timeout)
        await asyncio.sleep(0)  # what tasks that were made before this call send counts
        core = self._core
        idle = len(self) == 0 and not self._turns.standing and self._transactions is None
        if idle and not self.closed and not core.has_unreleased():
            return 0
        last = self._turns.last

        def flush() -> int:
            end = None if timeout is None else monotonic() + timeout
            self._turns.wait(last, timeout)
            left = core.flush(None if end is None else max(0.0, end - monotonic()))
            return left + self._turns.count(last)

        return await in_thread("kbatch-flush", flush)

    async def close(self, timeout: float | None = None) -> int:
        """As `kbatch.Producer.close`; callbacks on other loops than this are not waited for.

        Nor is a callback that has called this, itself or in a task that it made, nor one that closes as well. If the
        task is cancelled, closing goes on without it.
        """
        left = await self._close(timeout)
        self._core.undelivered.raise_all(reachable=True)
        return left

    async def _close(self, timeout: float | None) -> int:
        check_timeout(timeout)
        if timeout is None:
            timeout = self._close_timeout
        end = monotonic() + timeout
        loop = running_loop()
        mine = [each.call for each in self._callbacks.copy() if comes_from(each.call)]
        self._closers += mine  # callbacks that close do not wait for each other

        def begin() -> None:
            self._is_closing = self._core.started()  # from here on nobody is accepted; who was, is waited for
            self._turns.forget_closed_loops()

        def close() -> int:
            last = self._turns.last
            self._turns.wait(last, max(0.0, end - monotonic()))
            late = self._turns.count(last)
            return self._core.close(max(0.0, end - monotonic())) + late

        try:
            left = await in_thread("kbatch-close", close, begin=begin)
            callbacks = {
                each.task
                for each in self._callbacks.copy()
                if each.task is not None and each.loop is loop and each.call not in self._closers
            }
            if callbacks:
                await asyncio.wait(callbacks, timeout=max(0.0, end - monotonic()))
        finally:
            for call in mine:
                self._closers.remove(call)
        return left

    @property
    def closed(self) -> bool:
        return self._is_closing or super().closed

    def __len__(self) -> int:
        return super().__len__() + self._turns.count()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close(None)
        self._check_delivered(error)


async def _call_back(callback: Callable[[DeliveryReport], object], batch: PendingBatch) -> None:
    try:
        result = callback(batch.report)
        if inspect.isawaitable(result):
            await result
    except (Exception, asyncio.CancelledError):  # nobody awaits this task who could be told
        _logger.exception("a callback failed: %s", callback_name(callback))


def _log_cancelled(callback: Callable[[DeliveryReport], object]) -> None:
    _logger.error("a callback was cancelled before it began: %s", callback_name(callback))


def _taken(envelopes: Iterable[Envelope[Any]]) -> Iterable[Envelope[Any]]:
    """What the caller may change when the call has returned is copied."""
    if isinstance(envelopes, list):
        return tuple(envelopes)
    if isinstance(envelopes, (tuple, Envelope, str, bytes, Mapping)):
        return envelopes  # all but the first are refused
    return tuple(envelopes) if isinstance(envelopes, Sized) else envelopes


async def _gather(envelopes: Iterable[Envelope[Any]], turn: Turn) -> Iterable[Envelope[Any]]:
    # What has a length is copied at once, natively; a generator may take long.
    if isinstance(envelopes, (Sized, Envelope)):
        return envelopes
    gathered = []
    end = monotonic() + _SLICE_S
    for envelope in envelopes:
        gathered.append(envelope)
        if monotonic() >= end:
            turn.count = len(gathered)
            await asyncio.sleep(0)
            end = monotonic() + _SLICE_S
    turn.count = len(gathered)
    return gathered
