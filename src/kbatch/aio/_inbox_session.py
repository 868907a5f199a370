"""What a listener on an event loop does with an inbox."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from kbatch._fastmap import Flag, LoopWaker
from kbatch._inbox._session import InboxSession
from kbatch._loop import StepThread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import ListenerSession

__all__ = ["AioInboxSession", "AioListenerSession", "aio_session"]


def aio_session(session: ListenerSession) -> AioInboxSession | AioListenerSession:
    """A session of an inbox for handlers that are awaited."""
    return AioInboxSession(session) if isinstance(session, InboxSession) else AioListenerSession(session)


class AioInboxSession:
    """A session of kbatch whose steps run on a thread of its own, one after the other, and whose handlers are awaited
    between them. One call at a time.

    A call that is cancelled leaves a step that runs to its end; what cleans up comes after it, before the next call.
    """

    def __init__(self, session: InboxSession) -> None:
        session._is_shared = True
        self._session = session
        self._thread = StepThread("kbatch-inbox")

    async def handle(self, envelope: Envelope[Any], handler: Callable[[Any, Any], Awaitable[object]]) -> bool:
        """As `InboxSession.handle`."""
        return bool(await self._handle((envelope,), lambda new, connection: handler(new[0], connection)))

    async def handle_batch(
        self, envelopes: Sequence[Envelope[Any]], handler: Callable[[list[Any], Any], Awaitable[object]]
    ) -> int:
        """As `InboxSession.handle_batch`."""
        return await self._handle(tuple(envelopes), handler)

    def close(self) -> None:
        """Gives the connection back, and does not wait for that."""
        self._thread.put(self._session.close)
        self._thread.end()

    async def _handle(
        self, envelopes: Sequence[Envelope[Any]], handler: Callable[[list[Any], Any], Awaitable[object]]
    ) -> int:
        session = self._session
        try:
            new = await self._thread.run(lambda: session._prepare(envelopes))
            if new:
                await self._give(new, handler)
                await self._thread.run(lambda: session._finish(envelopes))
        except BaseException:
            self._thread.put(session._clean_up)
            raise
        return len(new)

    async def _give(self, new: list[Any], handler: Callable[[list[Any], Any], Awaitable[object]]) -> None:
        try:
            await handler(new, self._session._for_loop())
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            given = error  # which this block's end forgets
            told = await self._thread.run(lambda: self._session._after(given))
            if told is not None:
                raise told from error
            raise


class AioListenerSession:
    """A session of anybody's inbox, on a thread of its own, which waits within its call while the handler is awaited.
    One call at a time.

    What the handler raises, and its cancellation, is raised on that thread, where the session rolls back.
    """

    def __init__(self, session: ListenerSession) -> None:
        self._session = session
        self._thread = StepThread("kbatch-inbox")

    async def handle(self, envelope: Envelope[Any], handler: Callable[[Any, Any], Awaitable[object]]) -> bool:
        """As `ListenerSession.handle`."""
        return bool(await self._handle(functools.partial(self._session.handle, envelope), handler))

    async def handle_batch(
        self, envelopes: Sequence[Envelope[Any]], handler: Callable[[list[Any], Any], Awaitable[object]]
    ) -> int:
        """As `ListenerSession.handle_batch`."""
        return int(await self._handle(functools.partial(self._session.handle_batch, envelopes), handler))

    def close(self) -> None:
        """As `AioInboxSession.close`."""
        self._thread.put(self._session.close)
        self._thread.end()

    async def _handle(
        self, handle: Callable[[Callable[[Any, Any], object]], object], handler: Callable[[Any, Any], Awaitable[object]]
    ) -> Any:
        calls = _Calls()
        try:
            await calls.begin(self._thread, lambda: handle(calls.call))
            while calls.asked:
                try:
                    await handler(*calls.asked)
                except asyncio.CancelledError:
                    raise
                except BaseException as error:
                    await calls.answer(error)
                else:
                    await calls.answer(None)
        except BaseException:  # it is cancelled
            calls.give_up()
            raise
        return calls.result()


class _Calls:
    """What passes between a session's thread and the task that awaits the handler for it."""

    def __init__(self) -> None:
        self.asked: tuple[Any, ...] = ()  # what the handler is to be called with; nothing: the session has returned
        self._waker: LoopWaker
        self._answered = Flag()
        self._raised: list[BaseException] = []  # by the handler
        self._is_given_up = False
        self._results: list[object] = []
        self._errors: list[BaseException] = []

    # -- on the loop

    async def begin(self, thread: StepThread, function: Callable[[], object]) -> None:
        self._waker = waker = LoopWaker()

        def step() -> None:
            try:
                self._results.append(function())
            except BaseException as error:
                self._errors.append(error)
            self._waker()

        thread.put(step)
        await waker.future

    async def answer(self, error: BaseException | None) -> None:
        """Has the session go on, until it asks for another call or has returned."""
        self.asked = ()
        if error is not None:
            self._raised.append(error)
        self._waker = waker = LoopWaker()
        self._answered.set()
        await waker.future

    def give_up(self) -> None:
        """Nobody awaits a handler any more."""
        self._is_given_up = True
        self._answered.set()

    def result(self) -> object:
        if self._errors:
            raise self._errors.pop()  # this frame is in its traceback
        return self._results.pop()

    # -- on the session's thread

    def call(self, given: Any, connection: Any) -> None:
        if not self._is_given_up:
            self.asked = (given, connection)
            self._waker()
            self._answered.wait(interruptible=False)
        if self._is_given_up:
            raise asyncio.CancelledError
        if self._raised:
            raise self._raised.pop()  # this frame is in its traceback
