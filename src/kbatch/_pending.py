"""A batch that is on its way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kbatch._errors import BatchPending
from kbatch._fastmap import Batch
from kbatch._report import DeliveryReport

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["PendingBatch"]


class PendingBatch(Batch):
    """A batch that was submitted: wait for it, await it, or be called when it is done.

    ``len()`` is the number of envelopes. It answers once, whatever happens; a wait that times out or is cancelled
    ends the wait only.
    """

    _report: DeliveryReport | None = None

    def wait(self, timeout: float | None = None) -> DeliveryReport:
        """Blocks until every envelope has its outcome. The GIL is released and Ctrl-C works.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes, which ``delivery.timeout.ms`` bounds.

        Raises:
            BatchPending: `timeout` seconds have passed.
            ForkError: The producer was used before a fork, and this is the child.
        """
        if not self._wait(timeout):
            raise BatchPending(f"no answer for a batch of {len(self)} envelopes within {timeout} s; it goes on", self)
        return self.report

    @property
    def report(self) -> DeliveryReport:
        """The outcome of each envelope.

        Raises:
            BatchPending: Some are not known yet.
        """
        if self._report is None:
            if not self.done():
                raise BatchPending(f"a batch of {len(self)} envelopes has no answer yet", self)
            self._report = DeliveryReport(self.outcomes, self.latency_s)
        return self._report

    def add_done_callback(self, callback: Callable[[PendingBatch], object]) -> None:
        """Calls ``callback(self)`` once, on the producer's callback thread, when every envelope has its outcome.

        An exception from it is logged. If the batch is done, it is called soon.
        """
        super().add_done_callback(callback)

    def __await__(self) -> Generator[object, None, DeliveryReport]:
        """Waits on the running event loop. Cancelling the task ends the wait only."""
        if not self.done():
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[None] = loop.create_future()

            def resolve() -> None:
                if not answer.done():
                    answer.set_result(None)

            def wake() -> None:
                try:
                    loop.call_soon_threadsafe(resolve)
                except RuntimeError:
                    if not loop.is_closed():
                        raise
                    # A closed loop has nobody left who waits.

            self._add_waker(wake)
            yield from answer
        return self.report

    def __repr__(self) -> str:
        return f"<PendingBatch of {len(self)} envelopes, {'done' if self.done() else 'in flight'}>"
