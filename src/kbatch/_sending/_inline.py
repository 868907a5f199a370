"""One envelope at a time, each with its own answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._base_producer import BaseProducer
from kbatch._checks import check_close_timeout, check_timeout, check_topic
from kbatch._errors import (
    ConfigError,
    DeliveryError,
    ProducerClosedError,
    ProducerError,
    ProducerFatalError,
    SenderClosedError,
    TransactionUnknownError,
    is_for_whole_batch,
)
from kbatch._fastmap import monotonic
from kbatch._producer import Producer
from kbatch._recovery._handle import ProducerHandle, ProducerUse

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Envelope
    from kbatch._report import DeliveryReport

__all__ = ["BaseInlineSender", "InlineSender", "time_left"]


def _with_report(error: DeliveryError, report: DeliveryReport) -> DeliveryError:
    # Another one: the report holds that error, and no variable may hold what is raised, or there is a cycle.
    told = DeliveryError(error.code, possibly_persisted=error.possibly_persisted)
    told.report = report
    return told


class BaseInlineSender:
    """What does not wait of an inline sender, be it blocking or for asyncio."""

    _shown = "kbatch.InlineSender"
    _producer_class: type[BaseProducer] = Producer

    def __init__(
        self, producer: BaseProducer | ProducerUse, topic: str | None, *, close_timeout_s: float = 30.0
    ) -> None:
        check_close_timeout(close_timeout_s)
        if not isinstance(producer, (self._producer_class, ProducerUse)):
            shown = getattr(producer, "_shown", type(producer).__name__)
            raise ConfigError(f"producer must be a {self._producer_class._shown}, not {shown}")
        if topic is not None:
            check_topic("topic", topic)
        self.topic = topic
        self._close_timeout = close_timeout_s
        self._use = producer if isinstance(producer, ProducerUse) else ProducerHandle.of(producer).acquire()
        self._handle = self._use.handle
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _refuse(self) -> None:
        raise SenderClosedError("the sender is closed")

    def _may_succeed(self, producer: BaseProducer, error: Exception) -> bool:
        """Whether what a producer refused may be sent by its successor. Nothing of it was sent."""
        if self._closed:
            raise SenderClosedError("the sender is closed") from None
        return self._handle.fate(producer, error) != "end"

    def _is_suspect(self, report: DeliveryReport) -> bool:
        """Whether it may have been refused for another envelope: a broker refuses record batches as a whole."""
        return report.failed > 0 and is_for_whole_batch(report.errors[0])

    def _answer(self, report: DeliveryReport) -> DeliveryReport:
        if report.failed:
            raise _with_report(report.errors[0], report)
        return report

    def _begin_closing(self) -> None:
        self._closed = True

    def _check_delivered(self, error: BaseException | None) -> None:
        # Of sends that were given up before they had an answer. `error` ends a `with` block, and comes first.
        undelivered = self._handle.undelivered()
        if undelivered is not None:
            undelivered.raise_beside(error, reachable=True)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"by {self._handle.producer!r}"
        return f"<{self._shown} to {self.topic!r} {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a sender cannot be pickled: it shares a producer, which owns threads and connections")


class InlineSender(BaseInlineSender):
    """Sends one envelope at a time and waits for its answer. Any number of threads may use one sender.

    Envelopes that are sent at the same time share requests to the broker. A broker refuses a record batch as a whole
    for one record of it; then each envelope is sent again in a record batch of its own, so that only the guilty one
    raises. A second producer with the same settings does that, made when it is needed first.

    Args:
        producer: Stays the caller's; closing it is not this object's business. When it is in its fatal state, or its
            last transaction has no known end, a new one with its settings sends in its place, for all senders that
            share it, until the last of them is closed.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.
        close_timeout_s: Seconds that leaving a ``with`` block waits for what is in flight, if that closes a producer.
    """

    if TYPE_CHECKING:

        def __init__(self, producer: Producer, topic: str | None, *, close_timeout_s: float = 30.0) -> None: ...

    def send(self, envelope: Envelope[Any], *, timeout: float | None = None) -> DeliveryReport:
        """Blocks until the envelope has its outcome. The GIL is released while it waits, and Ctrl-C works.

        Args:
            envelope: With a ``deliver_by`` that has passed it is not sent, and the report says so: ``expired``.
            timeout: Seconds to wait; ``None`` waits until it is settled, at most the producer's `max_delivery_s`, twice
                that if it is sent again alone.

        Returns:
            The report of this envelope: its partition, its offset.

        Raises:
            DeliveryError: It was not acknowledged. ``possibly_persisted`` says whether it may be stored all the same.
            SerializationError: It could not be mapped. Nothing was sent.
            NotYetDueError: Its ``scheduled_time`` is in the future. Nothing was sent.
            BatchPendingError: `timeout` has passed. The error carries what is pending, which goes on.
            SenderClosedError, ProducerClosedError, ProducerFatalError, ForkError: Nothing was sent.
            ConfigError: librdkafka refuses the configuration, which shows at the first use.
        """
        if self._closed:
            self._refuse()
        producer: Any = self._handle.producer
        end = None if timeout is None else monotonic() + timeout
        try:
            report: DeliveryReport = producer.send_batch(self.topic, (envelope,), timeout=timeout)
        except (ProducerFatalError, ProducerClosedError, TransactionUnknownError) as error:
            if not self._may_succeed(producer, error):
                raise
        else:
            return self._answer(self._again_alone(envelope, report, end) if self._is_suspect(report) else report)
        self._handle.replace(producer)
        successor: Any = self._handle.producer
        return self._answer(successor.send_batch(self.topic, (envelope,), timeout=time_left(end)))

    def _again_alone(self, envelope: Envelope[Any], report: DeliveryReport, end: float | None) -> DeliveryReport:
        """Its report from a record batch of its own; `report` if there can be none."""
        solo: Any = self._handle.solo()
        if solo is None:
            return report
        try:
            alone: DeliveryReport = solo.send_batch(self.topic, (envelope,), timeout=time_left(end))
        except ProducerError:  # closed, or in its fatal state: the next one has a new one
            self._handle.drop_solo(solo)
            return report
        return alone

    def close(self, timeout: float | None = None) -> int:
        """Refuses envelopes from now on, and closes the producer if it is the last sender of one that kbatch made.

        What other threads are sending has its answer; if the producer is closed, by then. May be called again.

        Args:
            timeout: Seconds for what is in flight; ``None`` is the ``close_timeout_s``.

        Returns:
            How many envelopes ended without an acknowledgement since closing began; 0 if this closed no producer.

        Raises:
            UndeliveredError: The producer was closed, and an envelope failed after its `send` had ended with
                `BatchPendingError`, Ctrl-C or a cancelled task, which could not tell.
        """
        left = self._close(timeout)
        self._check_delivered(None)
        return left

    def _close(self, timeout: float | None) -> int:
        check_timeout(timeout)
        self._begin_closing()
        return self._use.release(self._close_timeout if timeout is None else timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(None)
        self._check_delivered(error)


def time_left(end: float | None) -> float | None:
    """Seconds to a time of `monotonic`; ``None`` if there is none."""
    return None if end is None else max(0.0, end - monotonic())
