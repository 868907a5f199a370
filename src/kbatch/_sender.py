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
)
from kbatch._pending import PendingBatch

if TYPE_CHECKING:
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
        pending = PendingBatch(core)
        mapped = False
        try:
            core.map(pending, self.topic, batch.envelopes)
            mapped = True
            core.send(pending, wait=True)
            answer.by_report(pending.report)
        except BaseException as error:
            if answer.given:
                raise
            if pending.begun:
                pending.add_done_callback(lambda done: answer.by_report(done.report))
                raise
            self._refuse(answer, error, mapped)
            if not isinstance(error, Exception):
                raise

    def _refuse(self, answer: _Answer, reason: BaseException, mapped: bool) -> None:
        """Nothing was sent: every envelope of the batch failed, one of them perhaps for a reason of its own."""
        error = _as_answer(reason, mapped)
        index, code, rest = -1, 0, _PURGE_QUEUE
        if isinstance(error, SerializationError) and error.index is not None:
            index, code = error.index, _VALUE_SERIALIZATION
        elif isinstance(error, ProducerFatalError):
            rest = error.code
        with contextlib.suppress(MemoryError):  # an answer without a report is better than none
            unsent = PendingBatch(self.producer._core)
            self.producer._core.fail(unsent, answer.batch.envelopes, index, code, rest)
            error.report = unsent.report
        if isinstance(error, SerializationError):
            answer.give("mark_serialization_failure", error)
        else:
            answer.give("mark_processing_failure", error)

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

    def by_report(self, report: DeliveryReport) -> None:
        error = report.error()
        if error is None:
            self.give("mark_successful", report)
        elif isinstance(error, TopicDoesNotExist):
            self.give("mark_topic_does_not_exist", error)
        elif isinstance(error, BatchTimedOut):
            self.give("mark_timed_out", error)
        else:
            self.give("mark_processing_failure", error)


def _as_answer(error: BaseException, mapped: bool) -> KbatchError:
    """What a batch is told of an exception because of which nothing of it was sent."""
    if isinstance(error, KbatchError):
        return error
    text = f"{type(error).__name__}: {error}"
    made: KbatchError
    if not isinstance(error, Exception):
        made = BatchInterrupted(f"interrupted before anything was sent: {text}")
    elif mapped or isinstance(error, MemoryError):
        made = ProducerError(f"the producer could not take the batch: {text}")
    else:
        made = SerializationError(text, index=None, envelope_id=None, field="batch")
    made.__cause__ = error
    return made
