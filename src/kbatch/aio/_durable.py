"""One envelope at a time on an event loop, through an outbox."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kbatch._checks import check_timeout
from kbatch._fastmap import LoopWaker, monotonic
from kbatch._loop import in_thread
from kbatch._outbox._group import Waiting
from kbatch._sending._durable import BaseDurableSender

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Envelope

__all__ = ["DurableSender"]


class DurableSender(BaseDurableSender):
    """Commits one envelope at a time to an outbox. Any number of tasks and loops may use one sender.

    Takes what `kbatch.DurableSender` takes. What tasks, loops and threads send at the same time is committed together.
    """

    _shown = "kbatch.aio.DurableSender"

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
        end = None if timeout is None else monotonic() + timeout
        waiting = Waiting(batch, waker, patient=timeout is not None)
        del batch  # else an error has it with this frame
        look = None
        try:
            self._put(waiting)
            look = _Look(self, waiting, waker, end)
            await waker.future
            self._answer(waiting, timeout)
        finally:
            self._leave(waiting)
            if look is not None:
                look.timer.cancel()
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


class _Look:
    """Ends a wait when its time is over, or when the thread that would has died."""

    def __init__(self, sender: DurableSender, waiting: Waiting, waker: LoopWaker, end: float | None) -> None:
        self._sender, self._waiting, self._waker, self._end = sender, waiting, waker, end
        self._arm()

    def _arm(self) -> None:
        self.timer = self._waker.loop.call_later(self._sender._pause(self._end), self._look)

    def _look(self) -> None:
        if self._sender._is_answered(self._waiting, self._end):
            self._waker.resolve()
        else:
            self._arm()


def _nothing() -> None:
    """Tasks that were made before have their first step."""
