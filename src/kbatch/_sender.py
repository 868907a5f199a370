"""Sends an outgoing batch through a producer and answers through the batch callback contract."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from kbatch._errors import (
    BatchInterrupted,
    BatchTimedOut,
    KbatchError,
    ProducerError,
    ProducerFatalError,
    SerializationError,
    TopicDoesNotExist,
    named_exception_text,
)
from kbatch._pending import PendingBatch

if TYPE_CHECKING:
    from kbatch._base_producer import BaseProducer
    from kbatch._contract import OutgoingBatch, SenderCallback
    from kbatch._producer import Producer
    from kbatch._report import DeliveryReport

__all__ = ["KafkaSender"]

_logger = logging.getLogger("kbatch")

# librdkafka's codes for envelopes of a batch that never reached it
_VALUE_SERIALIZATION = -161
_PURGE_QUEUE = -152


class KafkaSender:
    """Sends batches to one topic. Implements `SenderProtocol`.

    Args:
        producer: Stays the caller's; closing it is not this object's business.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.
    """

    def __init__(self, producer: Producer, topic: str | None) -> None:
        self.producer = producer
        self.topic = topic

    def send_batch(self, callback: SenderCallback, batch: OutgoingBatch) -> None:
        """Blocks until each envelope has its outcome, then calls exactly one method of `callback`, in this thread.

        An exception from `callback` is logged. On Ctrl-C it raises at once; if something of the batch is in flight,
        the one callback then comes on the producer's callback thread when it is settled.
        """
        core = self.producer._core
        answer = _Answer(callback, batch)
        pending = None
        mapped = False
        try:
            pending = PendingBatch(core)
            core.map(pending, self.topic, batch.envelopes)
            mapped = True
            self.producer._send(pending)
            answer.give(*answer_report(pending.report))
        except BaseException as error:
            if answer.given:
                raise
            if pending is not None and pending.begun:
                pending.add_done_callback(lambda done: answer.give(*answer_report(done.report)))
                raise
            answer.give(*answer_refusal(self.producer, batch, error, mapped))
            if not isinstance(error, Exception):
                raise

    def __repr__(self) -> str:
        return f"<KafkaSender to {self.topic!r} by {self.producer!r}>"


class _Answer:
    """The one call of a batch's callback."""

    def __init__(self, callback: SenderCallback, batch: OutgoingBatch) -> None:
        self.callback = callback
        self.batch = batch
        self.given = False

    def give(self, method: str, outcome: KbatchError | DeliveryReport) -> None:
        self.given = True
        try:
            getattr(self.callback, method)(self.batch, outcome)
        except Exception:
            _logger.exception("a sender callback failed; the batch keeps its outcome: %r", outcome)


def answer_report(report: DeliveryReport) -> tuple[str, KbatchError | DeliveryReport]:
    """The method of a `SenderCallback` that answers a batch that has settled, and what it is told."""
    error = report.error()
    if error is None:
        return "mark_successful", report
    if isinstance(error, TopicDoesNotExist):
        return "mark_topic_does_not_exist", error
    if isinstance(error, BatchTimedOut):
        return "mark_timed_out", error
    return "mark_processing_failure", error


def answer_refusal(
    producer: BaseProducer, batch: OutgoingBatch, reason: BaseException, mapped: bool
) -> tuple[str, KbatchError]:
    """The same for a batch of which nothing was sent: every envelope failed, one perhaps for a reason of its own."""
    error = _as_answer(reason, mapped)
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
    return "mark_processing_failure", error


def _as_answer(error: BaseException, mapped: bool) -> KbatchError:
    """What a batch is told of an exception because of which nothing of it was sent."""
    if isinstance(error, KbatchError):
        return error
    text = named_exception_text(error)
    made: KbatchError
    if not isinstance(error, Exception):
        made = BatchInterrupted(f"interrupted before anything was sent: {text}")
    elif mapped or isinstance(error, MemoryError):
        made = ProducerError(f"the producer could not take the batch: {text}")
    else:
        made = SerializationError(text, index=None, envelope_id=None, field="batch")
    made.__cause__ = error
    return made
