"""What hands the records of topics to a handler, on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
from typing import TYPE_CHECKING, Any

from kbatch._callbacks import callback_name, is_coroutine_function
from kbatch._errors import InboxError, KbatchError, ListenerError
from kbatch._fastmap import LoopWaker, monotonic
from kbatch._loop import in_thread
from kbatch._receiving._base import BaseListener
from kbatch._receiving._copies import Copies
from kbatch.aio._batched import LoopCalls
from kbatch.aio._inbox_session import aio_session
from kbatch.aio._transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import ReceivedEnvelope
    from kbatch._inbox._base import ListenerInbox
    from kbatch._producer import Producer
    from kbatch._receiving._lanes import Work
    from kbatch._receiving._reading import Reading
    from kbatch._recovery._retry import RetryPolicy
    from kbatch.aio._inbox_session import AioInboxSession, AioListenerSession

__all__ = ["Listener"]

_THREAD = "kbatch-transaction"  # which waits for the commit of one call


class Listener(BaseListener):
    """Reads topics as a member of a group, and awaits a handler with each envelope, in order of keys.

    As `kbatch.Listener`. It reads on a thread of its own, and each call of the handler is a task of the event loop on
    which `run` is awaited; a handler that blocks the loop does not lose the member. A handler that is cancelled has
    failed, and ends the listener.

    Args:
        handler: A coroutine function. At most `concurrency` calls of it run at a time.
        config, topics, types, wire, concurrency, batch_size, batch_timeout_ms, max_in_flight, max_in_flight_bytes,
            commit_interval_s: As for `kbatch.Listener`.
        inbox: The same; also one of `kbatch.aio`. The handler's connection is a ``psycopg.AsyncConnection``,
            or one of ``sqlite3``, whose statements block the loop. A session of an inbox of your own waits on a thread
            while the handler is awaited, which gets its connection as it is.
        close_timeout_s: The same; the tasks that still run then are cancelled.
        retry, retry_topics, dead_letter_topic, reject_on, producer: As for `kbatch.Listener`; the producer is one of
            threads.
        on_dead: As for `kbatch.Listener`; it may be a coroutine function. It is called on the event loop on which `run`
            is awaited.
        transactional_id: The same; the handler gets a `Transaction` whose `send <Transaction.send>` it awaits. A
            commit that is under way when its task is cancelled is made as a whole, or not at all.

    Raises:
        ConfigError: A wrong option.
    """

    _name = "kbatch.aio.Listener"
    _calls_class = LoopCalls
    _takes_coroutines_instead = None
    _calls: LoopCalls

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: Iterable[str],
        handler: Callable[..., Awaitable[object]],
        *,
        types: Mapping[str, Any] | None = None,
        wire: str = "kbatch",
        concurrency: int = 1,
        batch_size: int | None = None,
        batch_timeout_ms: float = 0.0,
        max_in_flight: int = 2_000,
        max_in_flight_bytes: int = 64 * 1024 * 1024,
        inbox: ListenerInbox | None = None,
        commit_interval_s: float = 1.0,
        close_timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        retry_topics: Iterable[float] = (),
        dead_letter_topic: str | None = None,
        reject_on: Iterable[type[Exception]] = (),
        producer: Producer | None = None,
        transactional_id: str | None = None,
        on_dead: Callable[[ReceivedEnvelope[Any], Exception], object] | None = None,
    ) -> None:
        super().__init__(
            config,
            topics,
            handler,
            types=types,
            wire=wire,
            concurrency=concurrency,
            batch_size=batch_size,
            batch_timeout_ms=batch_timeout_ms,
            max_in_flight=max_in_flight,
            max_in_flight_bytes=max_in_flight_bytes,
            commit_interval_s=commit_interval_s,
            close_timeout_s=close_timeout_s,
            inbox=inbox,
            retry=retry,
            retry_topics=retry_topics,
            dead_letter_topic=dead_letter_topic,
            reject_on=reject_on,
            producer=producer,
            transactional_id=transactional_id,
            on_dead=on_dead,
        )
        self._sessions: list[AioInboxSession | AioListenerSession] = []  # that no handler uses

    @staticmethod
    def _handler_fault(handler: object) -> str | None:
        if not is_coroutine_function(handler):
            return (
                f"must be a coroutine function, and {callback_name(handler)} is none: kbatch.Listener takes it, and "
                "runs it on threads"
            )
        return None

    async def run(self) -> None:
        """Reads and handles until `stop` is called. It may be called again after its end. If the task is cancelled, it
        ends as after `stop`. Cancelled once more, it ends at once, and its thread does the rest.

        Raises:
            Exception: What a handler has raised. Its record is not committed.
            ListenerError, ConfigError, RuntimeError: As `kbatch.Listener.run`; also if a handler was cancelled.
            DeserializationError, DeliveryError, InboxError: As `kbatch.Listener.run`.
            ProducerClosedError, ProducerFencedError, ProducerFatalError: As `kbatch.Listener.run`.
        """
        if self._inbox is not None:
            await in_thread("kbatch-inbox", self._check_inbox)
        claim = object()
        ended = LoopWaker()
        handlers = _Handlers(self, ended.loop)
        errors: list[BaseException] = []
        waits = [ended]
        is_begun: list[bool] = []

        def run() -> None:
            with self._claims:
                if self._claim is not claim:  # who has started this thread was interrupted, and has ended the run
                    return
                is_begun.append(True)
            try:
                try:
                    self._read(reading)
                finally:
                    try:
                        self._close_sessions()
                    finally:
                        self._over(claim, is_last=True)
                    self._close_sessions()  # of handlers that have ended meanwhile
            except BaseException as error:
                errors.append(error)
            handlers.is_over = True
            for waker in waits:
                waker()

        try:
            self._calls.loop = ended.loop
            reading = handlers.reading = self._begin(claim, handlers.wake, handlers.give_up)
            threading.Thread(
                target=contextvars.copy_context().run, args=(run,), name="kbatch-listener", daemon=True
            ).start()
            if self._keeper is not None:
                self._keeper.start()
            await ended.future
        except BaseException as cancelled:
            with self._claims:
                if not is_begun:
                    self._over(claim, is_last=True)
                    raise
            reading.stop()
            waits.append(again := LoopWaker())
            if handlers.is_over:  # it may have called what there was before
                again()
            try:
                await again.future
            except BaseException:
                reading.stop(hurried=True)
                handlers.cancel()
                raise
            reading.tell_unless(cancelled)
            raise
        if errors:
            raise errors.pop()  # this frame is in its traceback
        if reading.error is not None:
            raise reading.error

    async def close(self) -> None:
        """Stops it, and waits until `run` has ended, and for calls of ``on_dead`` as `kbatch.Listener.close` does.

        Raises:
            RuntimeError: A handler calls it, which calls `stop`.
        """
        if self._runs_here():
            if _handled_by.get() is self:
                raise RuntimeError("close waits for the end of handlers, so none must call it; call stop")
            self.stop()
            await in_thread("kbatch-close", lambda: self._wait_until_over(float("inf")))
        if self._deaths is not None:
            await in_thread("kbatch-close", self._await_calls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _handle(self, reading: Reading, work: Work) -> None:
        for envelope in work.handled:
            self._decode(envelope)
        handled = work.envelope if self._batch_size is None else list(work.handled)
        if self._transacting is not None:
            transaction = Transaction(self._transacting.transaction())
            try:
                await self._call(handled, transaction)
                transaction._check()
            finally:
                packed = transaction._end()
            await in_thread(_THREAD, functools.partial(self._transacting.commit, reading, work, packed))
        elif self._inbox is None:
            await self._call(handled)
        else:
            await self._call_in(reading, work, self._inbox, handled)

    async def _call(self, *handled: object) -> None:
        await self._handler(*handled)  # type: ignore[misc]

    async def _send_on(self, reading: Reading, work: Work) -> None:
        if self._transacting is None:
            assert isinstance(self._copies, Copies)
            try:
                while not self._copies.is_ready():
                    await in_thread("kbatch-start", self._copies.prepare)
            except KbatchError as refusal:
                if self._copies.is_final(refusal):
                    raise
                self._failing.sent_on(reading, work, refusal)
            else:
                self._failing.send_on(reading, work)
        else:
            error = await in_thread(_THREAD, functools.partial(self._transacting.store, work))
            self._failing.sent_on(reading, work, error)

    async def _call_in(self, reading: Reading, work: Work, inbox: ListenerInbox, handled: Any) -> None:
        try:
            session = self._sessions.pop()
        except IndexError:
            session = aio_session(inbox.open_session(self._parsed.group))
        try:
            handle: Callable[..., Awaitable[object]] = session.handle
            if self._batch_size is not None:
                handle = session.handle_batch
            wait_s = self._first_wait_s
            while True:
                try:
                    await handle(handled, self._call)
                except InboxError as error:
                    if not error.is_outage:
                        raise
                    self._tell_of_outage(error)
                    end = monotonic() + wait_s
                    while monotonic() < end:
                        if reading.is_given_up(work):
                            raise
                        await asyncio.sleep(self._look_s)
                    wait_s = min(2 * wait_s, self._longest_wait_s)
                else:
                    return
        finally:
            self._sessions.append(session)
            if not self._runs_here():  # its run has ended without it
                self._close_sessions()

    def _close_sessions(self) -> None:
        with contextlib.suppress(IndexError):  # others take from it
            while True:
                self._sessions.pop().close()


class _Handlers:
    """The tasks of one run, on its loop."""

    reading: Reading

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self._listener = listener
        self._loop = loop
        self._context = contextvars.copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_called = False  # to begin, soon
        self._gave_up = False
        self.is_over = False

    # -- on the thread that polls

    def wake(self, count: int) -> None:
        if not self._is_called and len(self._tasks) < self._listener._concurrency:
            self._is_called = True
            self._on_loop(self._begin)

    def give_up(self) -> None:
        self._on_loop(self.cancel)

    def _on_loop(self, function: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            self.reading.stop(hurried=True)

    # -- on the loop

    def cancel(self) -> None:
        self._gave_up = True
        for task in self._tasks:
            task.cancel()

    def _begin(self) -> None:
        self._is_called = False
        work: Work | None = None
        try:
            while len(self._tasks) < self._listener._concurrency:
                work = None  # the one before has a task
                work = self.reading.take()
                if work is None:
                    return
                task = self._context.copy().run(self._loop.create_task, self._work(work))
                self._tasks.add(task)
                task.add_done_callback(functools.partial(self._end, work))
        except BaseException as error:  # no memory
            if work is None:
                self.reading.end_with(error)
            else:
                self.reading.fail(work, error)

    def _end(self, work: Work, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # before it began
            self._cancelled(work, None)
        elif (error := task.exception()) is not None:  # an exception came before it could be caught
            self.reading.fail(work, error)
        if not self._is_called:
            self._loop.call_soon(self._begin)
            self._is_called = True

    async def _work(self, work: Work) -> None:
        listener, reading = self._listener, self.reading
        try:
            _handled_by.set(listener)
            is_copied = work.copy is not None
            if not is_copied:
                try:
                    await listener._handle(reading, work)
                except asyncio.CancelledError:
                    raise
                except BaseException as error:
                    is_copied = listener._fail(reading, work, error)
                else:
                    listener._failing.handled(reading, work)
            if is_copied:
                await listener._send_on(reading, work)
        except asyncio.CancelledError as error:
            self._cancelled(work, error)
        except BaseException as error:  # no memory, or transactions have ended
            reading.fail(work, error)

    def _cancelled(self, work: Work, error: asyncio.CancelledError | None) -> None:
        if self._gave_up:
            self.reading.abandon(work)
            return
        cancelled = ListenerError(
            f"a handler was cancelled, of {work.partition[0]} [{work.partition[1]}] at offset {work.places[0].offset}"
        )
        cancelled.__cause__ = error
        self.reading.fail(work, cancelled)


_handled_by: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("kbatch_handled_by", default=None)
