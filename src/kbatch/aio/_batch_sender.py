"""A batch goes out on an event loop, exactly one callback is awaited: the contract for asyncio, and the sender."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kbatch._base_producer import check_kind
from kbatch._batch_sender import answer_refusal, answer_report
from kbatch._fastmap import AioAnsweringSender
from kbatch._pending import PendingBatch
from kbatch.aio._producer import Producer

if TYPE_CHECKING:
    from kbatch import _batch_sender
    from kbatch._batch_sender import OutgoingBatch, Told
    from kbatch._errors import KbatchError
    from kbatch._fastmap import Answer
    from kbatch._report import DeliveryReport

__all__ = ["KafkaSender", "SenderCallback", "SenderProtocol", "send_answered"]

_logger = logging.getLogger("kbatch")


class SenderCallback:
    """As `kbatch.SenderCallback`, with coroutines: exactly one is awaited, once, on the loop that sends the batch."""

    async def mark_successful(self, batch: OutgoingBatch, report: DeliveryReport) -> None:
        """No envelope failed: each was acknowledged, or had expired before it was sent (``report.expired``)."""

    async def mark_processing_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Some envelopes failed, or the batch could not be sent at all."""
        _logger.error("%r failed: %s", batch, error)

    async def mark_serialization_failure(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """An envelope could not be mapped; nothing was sent."""
        _logger.error("%r could not be serialized: %s", batch, error)

    async def mark_timed_out(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed timed out."""
        await self.mark_processing_failure(batch, error)

    async def mark_topic_does_not_exist(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """Every envelope that failed went to an unknown topic or partition."""
        await self.mark_processing_failure(batch, error)

    async def mark_circuit_open(self, batch: OutgoingBatch, error: KbatchError) -> None:
        """The circuit is open, or a producer is to be replaced; nothing was sent."""
        await self.mark_processing_failure(batch, error)


@runtime_checkable
class SenderProtocol(Protocol):
    """Anything that sends a batch on an event loop and answers through a `SenderCallback`."""

    async def send_batch(self, callback: SenderCallback | _batch_sender.SenderCallback, batch: OutgoingBatch) -> None:
        """Sends `batch` and calls exactly one method of `callback`, once no envelope of it is in flight any more."""


class KafkaSender(AioAnsweringSender):
    """Sends batches to one topic. Implements `kbatch.aio.SenderProtocol`.

    ``await sender.send_batch(callback, batch)`` calls exactly one method of the callback, whenever its task is
    cancelled. If that comes before the first step, or while the batch is mapped, nothing is sent: the task awaits
    ``mark_processing_failure``, then ends. While the batch is in flight the task ends at once, and a task of its own
    awaits the method when the batch is settled. While the method runs, the method is cancelled and not called again.
    If a method raises, `CancelledError` too, that is logged, and the caller is not told.

    Args:
        producer: Stays the caller's; closing it is not this object's business.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.

    Raises:
        TypeError: `producer` is none, or one that blocks.
    """

    def __init__(self, producer: Producer, topic: str | None) -> None:
        check_kind(producer, Producer)
        self.producer = producer
        self.topic = topic

    # `send_batch` is `AioAnsweringSender`'s, in `native/answer.pxi`: it calls these three.

    async def _send_answered(self, answer: Answer) -> Told:
        return await send_answered(self.producer, self.topic, answer)

    def _refuse_answered(self, answer: Answer, error: BaseException) -> Told:
        return answer_refusal(self.producer, answer.batch, error, answer.mapping)

    def _tell(self, report: DeliveryReport) -> Told:
        return answer_report(report)

    def __repr__(self) -> str:
        return f"<kbatch.aio.KafkaSender to {self.topic!r} by {self.producer!r}>"


async def send_answered(producer: Producer, topic: str | None, answer: Answer) -> Told:
    """Sends the batch of `answer`, and returns what it is to be told."""
    pending = PendingBatch(producer._core)
    pending._look()  # the callback is told
    # Made before it is needed: there may be no loop any more, or no memory.
    answer.later = producer._task_starter(answer.give_later)
    answer.mapping = True
    with producer._turns.turn() as turn:
        await producer._map_batch(turn, pending, topic, answer.batch.envelopes)
        answer.mapping = False
        answer.pending = pending
        producer._send_detached(pending)
    await pending
    return answer_report(pending.report)
