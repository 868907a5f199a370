"""Sends an outgoing batch through a producer and answers through the batch callback contract."""

from __future__ import annotations

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
        pending = PendingBatch(core)
        try:
            core.map(pending, self.topic, batch.envelopes)
        except ProducerError as error:
            self._fail(callback, batch, error)
            return
        except Exception as error:
            self._fail(callback, batch, _as_serialization_error(error))
            return
        except BaseException:
            self._fail(callback, batch, BatchInterrupted("the batch was interrupted before anything was sent"))
            raise
        try:
            core.send(pending, wait=True)
        except BaseException as error:
            if pending.begun:
                pending.add_done_callback(lambda done: self._answer(callback, batch, done.report))
                raise
            # The producer refused or could not start: librdkafka has none of it.
            self._fail(callback, batch, _as_producer_error(error))
            if not isinstance(error, Exception):
                raise
        else:
            self._answer(callback, batch, pending.report)

    def _fail(self, callback: SenderCallback, batch: OutgoingBatch, error: KbatchError) -> None:
        """Nothing was sent: every envelope of the batch failed, one of them perhaps for a reason of its own."""
        unsent = PendingBatch(self.producer._core)
        index, code, rest = -1, 0, _PURGE_QUEUE
        if isinstance(error, SerializationError) and error.index is not None:
            index, code = error.index, _VALUE_SERIALIZATION
        elif isinstance(error, ProducerFatalError):
            rest = error.code
        self.producer._core.fail(unsent, batch.envelopes, index, code, rest)
        error.report = unsent.report
        method = "mark_serialization_failure" if isinstance(error, SerializationError) else "mark_processing_failure"
        _call(callback, method, batch, error)

    def _answer(self, callback: SenderCallback, batch: OutgoingBatch, report: DeliveryReport) -> None:
        error = report.error()
        if error is None:
            _call(callback, "mark_successful", batch, report)
        elif isinstance(error, TopicDoesNotExist):
            _call(callback, "mark_topic_does_not_exist", batch, error)
        elif isinstance(error, BatchTimedOut):
            _call(callback, "mark_timed_out", batch, error)
        else:
            _call(callback, "mark_processing_failure", batch, error)

    def __repr__(self) -> str:
        return f"<KafkaSender to {self.topic!r} by {self.producer!r}>"


def _as_serialization_error(error: Exception) -> SerializationError:
    if isinstance(error, SerializationError):
        return error
    made = SerializationError(f"{type(error).__name__}: {error}", index=None, envelope_id=None, field="batch")
    made.__cause__ = error
    return made


def _as_producer_error(error: BaseException) -> KbatchError:
    if isinstance(error, KbatchError):
        return error
    made = ProducerError(f"the producer could not take the batch: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def _call(callback: SenderCallback, method: str, batch: OutgoingBatch, answer: KbatchError | DeliveryReport) -> None:
    try:
        getattr(callback, method)(batch, answer)
    except Exception:
        _logger.exception("a sender callback failed; the batch keeps its outcome: %r", answer)
