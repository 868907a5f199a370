"""One envelope at a time on an event loop, each with its own answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._checks import check_timeout
from kbatch._errors import ProducerClosedError, ProducerError, ProducerFatalError, TransactionUnknownError
from kbatch._fastmap import monotonic
from kbatch._loop import in_thread
from kbatch._sending._inline import BaseInlineSender, time_left
from kbatch.aio._producer import Producer

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Envelope
    from kbatch._report import DeliveryReport

__all__ = ["InlineSender"]


class InlineSender(BaseInlineSender):
    """Sends one envelope at a time and awaits its answer. Any number of tasks and loops may use one sender.

    Takes what `kbatch.InlineSender` takes, with a `kbatch.aio.Producer`.
    """

    _shown = "kbatch.aio.InlineSender"
    _producer_class = Producer

    if TYPE_CHECKING:

        def __init__(self, producer: Producer, topic: str | None, *, close_timeout_s: float = 30.0) -> None: ...

    async def send(self, envelope: Envelope[Any], *, timeout: float | None = None) -> DeliveryReport:
        """Waits until the envelope has its outcome.

        Takes, returns and raises what `kbatch.InlineSender.send` does. If the task is cancelled, the envelope is not
        sent if it was not yet handed to librdkafka, and goes on otherwise.
        """
        if self._closed:
            self._refuse()
        producer: Any = self._handle.producer
        end = None if timeout is None else monotonic() + timeout
        try:
            report: DeliveryReport = await producer.send_batch(self.topic, (envelope,), timeout=timeout)
        except (ProducerFatalError, ProducerClosedError, TransactionUnknownError) as error:
            if not self._may_succeed(producer, error):
                raise
        else:
            return self._answer(await self._again_alone(envelope, report, end) if self._is_suspect(report) else report)
        await in_thread("kbatch-replace", lambda: self._handle.replace(producer))
        successor: Any = self._handle.producer
        return self._answer(await successor.send_batch(self.topic, (envelope,), timeout=time_left(end)))

    async def _again_alone(self, envelope: Envelope[Any], report: DeliveryReport, end: float | None) -> DeliveryReport:
        """Its report from a record batch of its own; `report` if there can be none."""
        solo: Any = self._handle.solo()
        if solo is None:
            return report
        try:
            alone: DeliveryReport = await solo.send_batch(self.topic, (envelope,), timeout=time_left(end))
        except ProducerError:  # closed, or in its fatal state: the next one has a new one
            await in_thread("kbatch-close", lambda: self._handle.drop_solo(solo))
            return report
        return alone

    async def close(self, timeout: float | None = None) -> int:
        """As `kbatch.InlineSender.close`. If the task is cancelled, closing goes on without it."""
        left = await self._close(timeout)
        self._check_delivered(None)
        return left

    async def _close(self, timeout: float | None) -> int:
        check_timeout(timeout)
        left = self._close_timeout if timeout is None else timeout
        return await in_thread("kbatch-close", lambda: self._use.release(left), begin=self._begin_closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close(None)
        self._check_delivered(error)
