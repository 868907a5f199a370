"""Sends an outgoing batch through a producer for asyncio and answers through the batch callback contract."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import TYPE_CHECKING

from kbatch._pending import PendingBatch
from kbatch._sender import answer_refusal, answer_report

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from kbatch import _contract
    from kbatch._contract import OutgoingBatch
    from kbatch._errors import KbatchError
    from kbatch._report import DeliveryReport
    from kbatch.aio._contract import SenderCallback
    from kbatch.aio._producer import Producer

__all__ = ["KafkaSender", "give"]

_logger = logging.getLogger("kbatch")


class KafkaSender:
    """Sends batches to one topic. Implements `kbatch.aio.SenderProtocol`.

    Args:
        producer: Stays the caller's; closing it is not this object's business.
        topic: Where envelopes without a topic of their own go; ``None`` if each has one.
    """

    def __init__(self, producer: Producer, topic: str | None) -> None:
        self.producer = producer
        self.topic = topic

    async def send_batch(self, callback: SenderCallback | _contract.SenderCallback, batch: OutgoingBatch) -> None:
        """Waits until each envelope has its outcome, then awaits exactly one method of `callback`, in this task.

        An exception from `callback` is logged. If the task is cancelled while something of the batch is in flight, it
        ends at once, and the one callback then comes in a task of its own when the batch is settled. If the loop is
        closed by then nothing can be awaited on it, and an error is logged instead.
        """
        producer = self.producer
        pending = None
        mapped = False
        try:
            pending = PendingBatch(producer._core)
            # Made before it is needed: there may be no loop any more, or no memory.
            later = producer._task_starter(callback, functools.partial(_give_later, callback, batch, pending))
            with await producer._map_batch(pending, self.topic, batch.envelopes):
                mapped = True
                producer._send_detached(pending)
            await pending
        except BaseException as error:
            if pending is not None and pending.begun:
                producer._core.abandon(pending)
                pending._add_waker(later)
                raise
            if isinstance(error, GeneratorExit):  # nothing can be awaited any more
                _logger.error("%r was not sent, and has no answer: its event loop is closed", batch)
                raise
            await give(callback, batch, *answer_refusal(producer, batch, error, mapped))
            if not isinstance(error, Exception):
                raise
        else:
            await give(callback, batch, *answer_report(pending.report))

    def __repr__(self) -> str:
        return f"<kbatch.aio.KafkaSender to {self.topic!r} by {self.producer!r}>"


def _give_later(
    callback: SenderCallback | _contract.SenderCallback, batch: OutgoingBatch, pending: PendingBatch
) -> Coroutine[None, None, None]:
    return give(callback, batch, *answer_report(pending.report))


async def give(
    callback: SenderCallback | _contract.SenderCallback,
    batch: OutgoingBatch,
    method: str,
    outcome: KbatchError | DeliveryReport,
) -> None:
    try:
        answer = getattr(callback, method)(batch, outcome)
        if inspect.isawaitable(answer):
            await answer
    except Exception:
        _logger.exception("a sender callback failed; the batch keeps its outcome: %r", outcome)
