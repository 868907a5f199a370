"""Sends an outgoing batch through a producer and answers through the batch callback contract."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeAlias

from kbatch._base_producer import check_kind
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

if TYPE_CHECKING:
    from kbatch._base_producer import BaseProducer
    from kbatch._contract import OutgoingBatch
    from kbatch._fastmap import Answer
    from kbatch._report import DeliveryReport

    # a method of a `SenderCallback`, and what it is told
    Told: TypeAlias = tuple[str, KbatchError | DeliveryReport]

__all__ = ["KafkaSender"]

# librdkafka's codes for envelopes of a batch that never reached it
_VALUE_SERIALIZATION = -161
_PURGE_QUEUE = -152


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
    index, code, rest = -1, 0, _PURGE_QUEUE
    if isinstance(error, SerializationError) and error.index is not None:
        index, code = error.index, _VALUE_SERIALIZATION
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
