"""One envelope at a time on an event loop, through an outbox."""

from __future__ import annotations

import inspect
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
    _watch: _Watch | None = None  # of the loop that sent last

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
        watch = self._watch
        if watch is None or watch.loop is not waker.loop:
            watch = self._watch = _Watch(self._shared.group, waker.loop, self._look_s)
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
    each, asyncio makes and cancels an object or two with each call."""

    def __init__(self, group: GroupCommit, loop: asyncio.AbstractEventLoop, look_s: float) -> None:
        self.loop = loop
        self._group = group  # not the sender: nobody has to find that both are garbage
        self._look_s = look_s
        self._waits: dict[Waiting, LoopWaker] = {}
        self._is_armed = False

    def add(self, waiting: Waiting, waker: LoopWaker) -> None:
        self._waits[waiting] = waker
        if not self._is_armed:
            self._arm()

    def discard(self, waiting: Waiting) -> None:
        self._waits.pop(waiting, None)

    def _arm(self) -> None:
        self.loop.call_later(self._look_s, self._look)  # a loop that is closed forgets it
        self._is_armed = True

    def _look(self) -> None:
        self._is_armed = False
        if self._waits:
            self._arm()
        for waiting, waker in self._waits.items():
            if self._group.has_answered(waiting):
                waker.resolve()


def _nothing() -> None:
    """Tasks that were made before have their first step."""
