"""A batch that is on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._callbacks import check_callback
from kbatch._errors import BatchPendingError
from kbatch._fastmap import Batch, LoopWaker
from kbatch._report import DeliveryReport
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["PendingBatch", "no_answer"]


class PendingBatch(Batch):
    """A batch that was submitted: wait for it, await it, or be called when it is done.

    ``len()`` is the number of envelopes. It answers once, whatever happens; a wait that times out or is cancelled
    ends the wait only.

    A caller that waits for it, awaits it, reads `report` or adds a callback is told of what fails. If nobody does and
    it is forgotten, the producer's next ``flush`` raises `UndeliveredError` for what failed. ``close`` and the end of
    the producer's ``with`` block do so even if the batch is still there.

    Producers make it. ``core`` and ``outcomes`` are the native parts that it is made of, and not for users.
    """

    _report: DeliveryReport | None = None

    def wait(self, timeout: float | None = None) -> DeliveryReport:
        """Blocks until every envelope has its outcome. The GIL is released and Ctrl-C works.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes, at most `max_delivery_s`.

        Raises:
            BatchPendingError: `timeout` seconds have passed.
            ForkError: The producer was used before a fork, and this is the child.
        """
        if not self._wait(timeout):
            raise no_answer(self, timeout)
        return self.report

    @property
    def report(self) -> DeliveryReport:
        """The outcome of each envelope.

        Raises:
            BatchPendingError: Some are not known yet.
        """
        if self._report is None:
            if not self.done():
                raise BatchPendingError(f"a batch of {counted(len(self), 'envelope')} has no answer yet", self)
            self._report = DeliveryReport(self.outcomes, self.latency_s)
        return self._look(self._report)  # in one line: a caller that is interrupted before it has not looked

    def add_done_callback(self, callback: Callable[[PendingBatch], object]) -> None:
        """Calls ``callback(self)`` once, on the producer's callback thread, when every envelope has its outcome.

        An exception from it is logged. If the batch is done, it is called soon.

        Raises:
            TypeError: It cannot be called with one argument, is a coroutine function, or is asyncio's own, such as
                ``asyncio.Queue().put_nowait``, which wakes nobody when a thread calls it.
        """
        check_callback("callback", callback, "batch")
        super().add_done_callback(callback)

    def __await__(self) -> Generator[object, None, DeliveryReport]:
        """Waits on the running event loop, without a thread. Cancelling the task ends the wait only."""
        return self._answer().__await__()

    async def _answer(self) -> DeliveryReport:
        await self._wait_on_loop(None)
        return self.report

    async def _wait_on_loop(self, timeout: float | None) -> bool:
        # Whether it is done; not so after `timeout` seconds.
        if self.done():
            return True
        waker = LoopWaker()
        timer = None if timeout is None else waker.loop.call_later(timeout, waker.resolve)
        is_added = False
        try:
            self._add_waker(waker)
            is_added = True
            await waker.future
        except BaseException:
            if is_added and not self._remove_waker(waker):
                self._wait_no_longer()
            raise
        finally:
            self._remove_waker(waker)
            if timer is not None:
                timer.cancel()
        return self.done()

    def __repr__(self) -> str:
        return f"<PendingBatch of {counted(len(self), 'envelope')}, {'done' if self.done() else 'in flight'}>"


def no_answer(batch: PendingBatch, timeout: float | None) -> BatchPendingError:
    """The error of who has waited for `batch` for so many seconds."""
    return BatchPendingError(
        f"no answer for a batch of {counted(len(batch), 'envelope')} within {timeout} s; it goes on", batch
    )
