"""Envelopes one at a time go out in batches: the sender for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any

from kbatch._batch_sender import answer_refusal, answer_report
from kbatch._checks import check_timeout
from kbatch._errors import ProducerClosedError, SenderFullError, named_exception_text
from kbatch._fastmap import (
    SEND_NOT_STARTED,
    SEND_TAKEN,
    SEND_TAKEN_PAUSE,
    AioAnsweringSender,
    Call,
    LoopWaker,
    call_on_loop,
    monotonic,
    running_loop,
)
from kbatch._loop import in_thread
from kbatch._options import AgentOptions, AioAgentOptions
from kbatch._recovery._user_calls import UserCalls
from kbatch._sending._agent import BaseSendingAgent
from kbatch._sending._batched import BaseBatchedSender
from kbatch.aio._batch_sender import send_answered
from kbatch.aio._producer import Producer

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Never, Self

    from kbatch._batch_sender import Told
    from kbatch._fastmap import Answer, Envelope
    from kbatch._report import DeliveryReport

__all__ = ["BatchedSender", "SendingAgent"]

_NO_CONTEXT = contextvars.Context()  # to be copied
_LOOK_AT_LOOP_S = 1.0  # whether it was closed before a callback had ended


class LoopCalls(UserCalls):
    """Calls of callbacks on an event loop, for which a thread waits."""

    loop: asyncio.AbstractEventLoop | None = None
    _task: asyncio.Task[None] | None = None  # the last; a loop itself keeps weak references

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        loop = self.loop
        if loop is None:
            raise RuntimeError("no event loop for the callback: nothing was awaited on one yet")
        if _runs_here(loop):  # it would wait for itself
            raise RuntimeError("no thread to call the callback from could be had")
        ended = threading.Event()
        # What it ends with, None if it has called the callback. Made first: later there may be no memory.
        outcome: list[Any] = [RuntimeError("the callback's task was cancelled")]
        unmade = RuntimeError("no task could be made for the callback")

        async def run() -> None:
            try:
                with Call(self._queue):  # its own, which ends with it
                    result = callback(*arguments)
                    if inspect.isawaitable(result):
                        await result
                outcome[0] = None
            except Exception as error:
                outcome[0] = error
            except BaseException as error:
                outcome[0] = RuntimeError(named_exception_text(error))
                raise
            finally:
                ended.set()

        coroutine = run()

        def start() -> None:
            try:
                self._task = loop.create_task(coroutine)
                self._task.add_done_callback(lambda _: ended.set())  # it may be cancelled before its first step
            except BaseException as error:  # no memory, or a task factory of the application
                outcome[0] = unmade
                try:
                    coroutine.close()
                    outcome[0] = RuntimeError(f"{unmade}: {named_exception_text(error)}")
                finally:
                    ended.set()
                if not isinstance(error, Exception):
                    raise

        if not call_on_loop(loop, functools.partial(_NO_CONTEXT.copy().run, start)):
            coroutine.close()
            raise RuntimeError("the event loop for the callback is closed")
        while not ended.wait(_LOOK_AT_LOOP_S):
            closed = loop.is_closed()  # before the other look: what has ended did so on the open loop
            if closed and not ended.is_set():
                if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                    coroutine.close()  # else it would be missed that nobody awaits it
                raise RuntimeError("the event loop was closed before the callback had ended")
        if outcome[0] is not None:
            raise outcome.pop()  # this frame is in its traceback


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return running_loop() is loop
    except RuntimeError:
        return False


class SendingAgent(AioAnsweringSender, BaseSendingAgent):
    """As `kbatch.SendingAgent`; ``on_failed`` and ``on_state_change`` may be coroutine functions.

    They are called on the event loop on which the sender or `send_batch` was awaited first. If there was none yet, or
    it is closed, envelopes that are given up are in ``recent_failures``, and an error is logged.
    """

    _shown = "kbatch.aio.SendingAgent"
    _producer_class = Producer
    _calls_class = LoopCalls
    _options_class: type[AgentOptions[Never]] = AioAgentOptions
    _calls: LoopCalls

    # `send_batch` is `AioAnsweringSender`'s, in `native/answer.pxi`: it calls these three.

    async def _send_answered(self, answer: Answer) -> Told:
        self._adopt_loop()
        if self._is_forked() or not self._has_thread():
            await in_thread("kbatch-start", self._start)
        answer.trial = self._gate.admit()
        while True:
            producer: Any = self._handle.producer
            answer.then = functools.partial(self._gate.note_answer, producer)
            try:
                return await send_answered(producer, self.topic, answer)
            except ProducerClosedError as error:
                if self._handle.fate(producer, error) != "successor":
                    raise

    def _refuse_answered(self, answer: Answer, error: BaseException) -> Told:
        return answer_refusal(self._handle.producer, answer.batch, error, answer.mapping)

    def _tell(self, report: DeliveryReport) -> Told:
        return answer_report(report)

    async def close(self) -> None:
        """As `kbatch.SendingAgent.close`."""
        await in_thread("kbatch-close", lambda: self._end(0))

    def _adopt_loop(self) -> None:
        """The running loop is that of the callbacks, unless there is one: `try_send` may have been called without."""
        if self._calls.loop is None:
            self._calls.loop = running_loop()


class BatchedSender(BaseBatchedSender):
    """Takes envelopes one at a time, from any task and loop, and sends them in batches; the agent sees to what fails.

    As `kbatch.BatchedSender`. `send` waits while the buffer is full, without a thread; a task that does nothing but
    send lets others run now and then.
    """

    _shown = "kbatch.aio.BatchedSender"
    _agent_class = SendingAgent
    _agent: SendingAgent

    async def send(self, envelope: Envelope[Any], *, timeout: float | None = None) -> None:  # type: ignore[override]
        """As `kbatch.BatchedSender.send`. If the task is cancelled, its envelope may have been taken."""
        if timeout is not None:
            check_timeout(timeout)
        if self._agent._calls.loop is None:
            self._agent._adopt_loop()
        answer = self._send_on_loop(envelope)
        if answer == SEND_TAKEN:
            return
        if answer == SEND_NOT_STARTED:
            await self._await_start()
        if answer == SEND_TAKEN_PAUSE:
            await asyncio.sleep(0)
        elif not self.try_send(envelope):
            await self._wait_for_place(envelope, timeout)

    def _start(self) -> None:
        with contextlib.suppress(RuntimeError):  # try_send was first, and perhaps in a thread
            self._agent._adopt_loop()
        super()._start()

    async def _await_start(self) -> None:
        # In the order of the calls.
        with self._starting.turn() as turn:
            turn.join()
            before = turn.come()
            if before is not None:
                await before
            if not self._is_used:
                await in_thread("kbatch-start", self._start)

    async def _wait_for_place(self, envelope: Envelope[Any], timeout: float | None) -> None:
        self._check_wait()
        waker = LoopWaker()
        timer = None if timeout is None else waker.loop.call_later(timeout, waker.resolve)
        waiter = self._line_up(envelope, waker)
        try:
            await waker.future
        finally:
            self._leave_line(waiter)
            if timer is not None:
                timer.cancel()
        if waiter.taken:
            return
        if self._is_refusing:
            self._refuse()
        raise SenderFullError(f"no room for the envelope within {timeout} s: {len(self)} have no outcome yet")

    async def flush(self, timeout: float | None = None) -> int:
        """As `kbatch.BatchedSender.flush`."""
        left = await self._flush_on_loop(timeout)
        self._agent._undelivered.raise_all()
        return left

    async def _flush_on_loop(self, timeout: float | None) -> int:
        check_timeout(timeout)
        self._agent._adopt_loop()
        self._agent._check_caller()
        timeout = await self._await_starting(timeout)
        if not self._is_used:
            return 0
        self._check_fork()
        if len(self) == 0:  # its thread may never have begun
            return 0
        seq = self._hasten_filling()
        return 0 if await self._come_to(seq, timeout) else self._agent._left(seq)

    async def drain(self, timeout: float | None = None) -> int:
        """As `kbatch.BatchedSender.drain`."""
        check_timeout(timeout)
        self._check_fork()
        self._agent._adopt_loop()
        self._agent._check_caller()
        timeout = await self._await_starting(timeout)
        self._stop_accepting()
        if len(self):
            self._agent._hurry()
            await self._come_to(None, timeout)
        left = len(self)
        self._agent._undelivered.raise_all()
        return left

    async def close(self, timeout: float | None = None) -> int:
        """As `kbatch.BatchedSender.close`. If the task is cancelled, closing goes on without it."""
        not_sent = await self._close_on_loop(timeout)
        self._agent._undelivered.raise_all()
        return not_sent

    async def _close_on_loop(self, timeout: float | None) -> int:
        check_timeout(timeout)
        self._agent._adopt_loop()
        self._agent._check_caller()
        if timeout is None:
            timeout = self._close_timeout
        end = monotonic() + timeout

        def close() -> int:
            if not self._is_forked:  # those of the parent's loops never come to an end here
                self._starting.wait(self._starting.last, timeout)
            return self._close(max(0.0, end - monotonic()))

        return await in_thread("kbatch-close", close, begin=self._starting.forget_closed_loops)

    async def _await_starting(self, timeout: float | None) -> float | None:
        """Waits for the sends of tasks that were made before this call; returns the time that is left."""
        await asyncio.sleep(0)
        if not self._starting.standing or self._is_forked:
            return timeout
        self._starting.forget_closed_loops()
        end = None if timeout is None else monotonic() + timeout
        last = self._starting.last
        await in_thread("kbatch-flush", lambda: self._starting.wait(last, timeout))
        return None if end is None else max(0.0, end - monotonic())

    async def _come_to(self, seq: int | None, timeout: float | None) -> bool:
        waker = LoopWaker()
        timer = None if timeout is None else waker.loop.call_later(timeout, waker.resolve)
        watcher = self._agent._when_done(seq, waker)
        try:
            await waker.future
        finally:
            watcher.gone = True
            if timer is not None:
                timer.cancel()
        return watcher.done

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close_on_loop(None)
        self._check_sent(error)
