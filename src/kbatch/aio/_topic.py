"""A topic, how envelopes are sent to it from an event loop, and by which producer."""

from __future__ import annotations

from kbatch._sending._topic import BaseTopic
from kbatch.aio._batched import BatchedSender, SendingAgent
from kbatch.aio._inline import InlineSender
from kbatch.aio._producer import Producer

__all__ = ["KafkaTopic"]


class KafkaTopic(BaseTopic):
    """As `kbatch.KafkaTopic`, with a `kbatch.aio.Producer` and senders for asyncio."""

    _shown = "kbatch.aio.KafkaTopic"
    _producer_class = Producer
    _inline_class = InlineSender
    _agent_class = SendingAgent
    _batched_class = BatchedSender

    def create_sender(self) -> InlineSender | BatchedSender:
        """As `kbatch.KafkaTopic.create_sender`: a `kbatch.aio.InlineSender` or a `kbatch.aio.BatchedSender`."""
        sender: InlineSender | BatchedSender = self._create()
        return sender
