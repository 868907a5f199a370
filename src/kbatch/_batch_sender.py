"""A batch goes out through a producer, exactly one callback comes back: the contract, the sender, what it answers."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from kbatch._base_producer import check_kind
from kbatch._codes import PURGE_QUEUE, REJECTED_CODE
from kbatch._errors import (
    BatchInterruptedError,
    BatchTimeoutError,
    CircuitOpenError,
    KbatchError,
    ProducerError,
    ProducerFatalError,
    SerializationError,
    UnknownTopicError,
    named_exception_text,
)
from kbatch._fastmap import AnsweringSender
from kbatch._pending import PendingBatch
from kbatch._producer import Producer
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kbatch._base_producer import BaseProducer
    from kbatch._fastmap import Answer, Envelope
    from kbatch._report import DeliveryReport

    # a method of a `SenderCallback`, and what it is told
    Told: TypeAlias = tuple[str, KbatchError | DeliveryReport]

__all__ = ["KafkaSender", "OutgoingBatch", "SenderCallback", "SenderProtocol"]

_logger = logging.getLogger("kbatch")


class OutgoingBatch:
    """Envelopes that go out together and are answered together. Immutable.

    Args:
        envelopes: Read once, here.
    """

    __slots__ = ("_envelopes",)

    def __init__(self, envelopes: Iterable[Envelope[Any]]) -> None:
        self._envelopes = tuple(envelopes)

    @property
    def envelopes(self) -> tuple[Envelope[Any], ...]:
        """The envelopes, in order."""
        return self._envelopes

    def __len__(self) -> int:
        return len(self._envelopes)

    def __iter__(self) -> Iterator[Envelope[Any]]:
        return iter(self._envelopes)

    def __repr__(self) -> str:
        return f"<OutgoingBatch of {counted(len(self), 'envelope')}>"


class SenderCallback:
    """What a sender tells about a batch: exactly one of these methods, once, when every envelope has its outcome.

    Override what you need. The two failure methods log an error by default, and the three special failures fall back
    to `mark_processing_failure`, so that no failure goes unseen. Each ``error.report`` holds the outcome of each
    envelope.
    """

    def mark_successful(self, batch: OutgoingBatch, report: DeliveryReport) -> None:
        """No envelope failed: each was acknowledged, or had expired before it was sent (``report.expired``)."""

    def mark_processing_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Some envelopes failed, or the batch could not be sent at all."""
        _logger.error("%r failed: %s", batch, error)

    def mark_serialization_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """An envelope could not be mapped; nothing was sent."""
        _logger.error("%r could not be serialized: %s", batch, error)

    def mark_timed_out(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed timed out."""
        self.mark_processing_failure(batch, error)

    def mark_topic_does_not_exist(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed went to an unknown topic or partition."""
        self.mark_processing_failure(batch, error)

    def mark_circuit_open(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """The circuit is open, or a producer is to be replaced; nothing was sent."""
        self.mark_processing_failure(batch, error)


@runtime_checkable
class SenderProtocol(Protocol):
    """Anything that sends a batch and answers through a `SenderCallback`."""

    def send_batch(self, callback: SenderCallback, batch: OutgoingBatch) -> None:
        """Sends `batch` and calls exactly one method of `callback`, once no envelope of it is in flight any more."""


class KafkaSender(AnsweringSender):
    """Sends batches to one topic. Implements `SenderProtocol`.

    Args:
        producer: Stays the caller's; closing it is not this object's business.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.

    Raises:
        TypeError: `producer` is none, or one for asyncio.
    """

    def __init__(self, producer: Producer, topic: str | None) -> None:
        check_kind(producer, Producer)
        self.producer = producer
        self.topic = topic

    # `send_batch` is `AnsweringSender`'s, in `native/answer.pxi`: it calls these three.

    def _send_answered(self, answer: Answer) -> Told:
        return send_answered(self.producer, self.topic, answer)

    def _refuse_answered(self, answer: Answer, error: BaseException) -> Told:
        return answer_refusal(self.producer, answer.batch, error, answer.mapping)

    def _tell(self, report: DeliveryReport) -> Told:
        return answer_report(report)

    def __repr__(self) -> str:
        return f"<KafkaSender to {self.topic!r} by {self.producer!r}>"


def send_answered(producer: Producer, topic: str | None, answer: Answer) -> Told:
    """Sends the batch of `answer`, and returns what it is to be told."""
    pending = PendingBatch(producer._core)
    pending._look()  # the callback is told
    answer.mapping = True
    producer._core.map(pending, topic, answer.batch.envelopes)
    answer.mapping = False
    answer.pending = pending
    producer._send(pending)
    return answer_report(pending.report)


def answer_report(report: DeliveryReport) -> Told:
    """The method of a `SenderCallback` that answers a batch that has settled, and what it is told."""
    error = report.exception()
    if error is None:
        return "mark_successful", report
    if isinstance(error, UnknownTopicError):
        return "mark_topic_does_not_exist", error
    if isinstance(error, BatchTimeoutError):
        return "mark_timed_out", error
    return "mark_processing_failure", error


def answer_refusal(producer: BaseProducer, batch: OutgoingBatch, reason: BaseException, mapping: bool) -> Told:
    """The same for a batch of which nothing was sent: every envelope failed, one perhaps for a reason of its own."""
    error = _as_answer(reason, mapping)
    index, code, rest = -1, 0, PURGE_QUEUE
    if isinstance(error, SerializationError) and error.index is not None:
        index, code = error.index, REJECTED_CODE
    elif isinstance(error, ProducerFatalError):
        rest = error.code
    # No memory, or envelopes that nobody can count, which is then the error, too: an answer without a report is better
    # than none.
    with contextlib.suppress(Exception):
        unsent = PendingBatch(producer._core)
        producer._core.fail(unsent, batch.envelopes, index, code, rest)
        error.report = unsent.report
    if isinstance(error, SerializationError):
        return "mark_serialization_failure", error
    if isinstance(error, CircuitOpenError):
        return "mark_circuit_open", error
    return "mark_processing_failure", error


def _as_answer(error: BaseException, mapping: bool) -> KbatchError:
    """What a batch is told of an exception because of which nothing of it was sent."""
    if isinstance(error, KbatchError):
        return error
    text = named_exception_text(error)
    made: KbatchError
    if not isinstance(error, Exception):
        made = BatchInterruptedError(f"interrupted before anything was sent: {text}")
    elif not mapping or isinstance(error, MemoryError):
        made = ProducerError(f"the producer could not take the batch: {text}")
    else:
        made = SerializationError(text, index=None, envelope_id=None, field="batch")
    made.__cause__ = error
    return made
