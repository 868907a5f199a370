"""Producers without Kafka for asyncio. Not imported by `kbatch.testing`: tests without asyncio need none of it."""

from kbatch.aio import Producer
from kbatch.testing._memory import BaseMemoryProducer

__all__ = ["MemoryProducer"]


class MemoryProducer(BaseMemoryProducer, Producer):
    """A `kbatch.aio.Producer` that keeps in memory what it is given: the `kbatch.testing.MemoryProducer` of asyncio.

    Takes the same, and has the same methods besides; these are no coroutines. It differs from `kbatch.aio.Producer` as
    that one from `kbatch.Producer`.
    """

    _shown = "kbatch.testing.aio.MemoryProducer"
