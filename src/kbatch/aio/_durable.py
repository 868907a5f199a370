"""One envelope at a time on an event loop, through an outbox."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

from kbatch._checks import check_timeout
from kbatch._fastmap import LoopWaker
from kbatch._loop import in_thread
from kbatch._outbox._group import Waiting
from kbatch._sending._durable import BaseDurableSender

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Envelope
    from kbatch._outbox._group import GroupCommit

__all__ = ["DurableSender"]


class DurableSender(BaseDurableSender):
    """Commits one envelope at a time to an outbox. Any number of tasks and loops may use one sender.

    Takes what `kbatch.DurableSender` takes. What tasks, loops and threads send at the same time is committed together.
    """

    _shown = "kbatch.aio.DurableSender"
    _watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] | None = None

    async def send(self, envelope: Envelope[Any], *, connection: Any = None, timeout: float | None = None) -> bool:
        """Waits until the envelope is committed to the outbox.

        Takes, returns and raises what `kbatch.DurableSender.send` does. If the task is cancelled, the envelope is not
        added if its transaction had not begun, and may be added otherwise.
        """
        check_timeout(timeout)
        if connection is not None:
            self._begin_use()
            added = self._shared.outbox.add(connection, (envelope,), topic=self.topic)
            return bool(await added if inspect.isawaitable(added) else added)
        batch = self._map(envelope)
        if batch is None:
            return False
        waker = LoopWaker()
        waiting = Waiting(batch, waker, patient=timeout is not None)
        del batch  # else an error has it with this frame
        watch = self._watch_of(waker.loop)
        timer = None
        try:
            watch.add(waiting, waker)
            if timeout is not None:
                timer = waker.loop.call_later(timeout, waker.resolve)
            self._put(waiting)
            await waker.future
            self._answer(waiting, timeout)
        finally:
            self._leave(waiting)
            watch.discard(waiting)
            if timer is not None:
                timer.cancel()
        return True

    def _watch_of(self, loop: asyncio.AbstractEventLoop) -> _Watch:
        if self._watches is None:
            self._watches = weakref.WeakKeyDictionary()
        watch = self._watches.get(loop)
        if watch is None:
            watch = self._watches[loop] = _Watch(self._shared.group, self._look_s)
        return watch

    async def flush(self, timeout: float | None = None) -> int:
        """As `kbatch.DurableSender.flush`. Tasks that were made before the call and send at their first step count."""
        check_timeout(timeout)
        return await in_thread("kbatch-flush", lambda: self._flush(timeout), begin=_nothing)

    async def close(self, timeout: float | None = None) -> int:
        """As `kbatch.DurableSender.close`. If the task is cancelled, closing goes on without it."""
        check_timeout(timeout)
        return await in_thread("kbatch-close", lambda: self._close(timeout), begin=_nothing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Watch:
    """Ends the waits of one loop when the thread that would has died. It has one timer for all of them: of a timer for
    each, asyncio makes and cancels an object or two with each call.

    It holds neither the sender nor the loop: both may be forgotten.
    """

    def __init__(self, group: GroupCommit, look_s: float) -> None:
        self._group = group
        self._look_s = look_s
        self._waits: dict[Waiting, LoopWaker] = {}
        self._is_armed = False

    def add(self, waiting: Waiting, waker: LoopWaker) -> None:
        self._waits[waiting] = waker
        if not self._is_armed:
            self._arm(waker.loop)

    def discard(self, waiting: Waiting) -> None:
        self._waits.pop(waiting, None)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(self._look_s, self._look, loop)
        self._is_armed = True

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_armed = False
        try:
            for waiting, waker in list(self._waits.items()):
                if self._group.has_answered(waiting) or waiting.is_withdrawn:
                    waker.resolve()
                    self.discard(waiting)  # whoever waits was interrupted, or does it in a moment
        finally:
            if self._waits:
                self._arm(loop)


def _nothing() -> None:
    """Tasks that were made before have their first step."""
