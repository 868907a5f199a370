"""Producers and listeners without Kafka for asyncio.

Not imported by `kbatch.testing`: tests without asyncio need none of it.
"""

import functools
from typing import Any

from kbatch._fastmap import Envelope, running_loop
from kbatch._loop import in_thread
from kbatch.aio import Listener, Producer
from kbatch.testing._memory import BaseMemoryProducer
from kbatch.testing._memory_listener import BaseMemoryListener, MemoryOutcome

__all__ = ["MemoryListener", "MemoryProducer"]


class MemoryListener(BaseMemoryListener):
    """Awaits a handler with envelopes: the `kbatch.testing.MemoryListener` of asyncio, which takes the same."""

    _listener_type = Listener

    async def send(self, *envelopes: Envelope[Any], topic: str | None = None) -> list[MemoryOutcome]:
        """As that of `kbatch.testing.MemoryListener`; one call of the handler is awaited after the other."""
        memory: Any = self._memory
        listener = self._listener
        listener._calls.loop = running_loop()
        outcomes: list[MemoryOutcome] = memory.take_in(envelopes, topic or self._topic)
        for work in memory.works():
            is_copied = False
            try:
                await listener._handle(memory, work)
            except Exception as error:
                is_copied = listener._fail(memory, work, error)
            else:
                memory.failing.handled(memory, work)
            if is_copied:
                memory.failing.send_on(memory, work)
        if listener._deaths is not None:
            await in_thread("kbatch-close", functools.partial(listener._deaths.join, None))
        return outcomes


class MemoryProducer(BaseMemoryProducer, Producer):
    """A `kbatch.aio.Producer` that keeps in memory what it is given: the `kbatch.testing.MemoryProducer` of asyncio.

    Takes the same, and has the same methods besides; these are no coroutines. It differs from `kbatch.aio.Producer` as
    that one from `kbatch.Producer`.
    """

    _shown = "kbatch.testing.aio.MemoryProducer"
