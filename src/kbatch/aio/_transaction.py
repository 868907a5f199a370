"""What a handler on an event loop sends by, in the transaction of what it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._errors import ProducerError
from kbatch._text import counted

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from kbatch._fastmap import Envelope
    from kbatch._receiving._transacting import Transaction as TransactionOfThreads

__all__ = ["Transaction"]


class Transaction:
    """What a coroutine function sends by that handles records in a transaction: the `kbatch.Transaction` of asyncio."""

    __slots__ = ("_left", "_of_threads")

    def __init__(self, of_threads: TransactionOfThreads) -> None:
        self._of_threads = of_threads
        self._left = 0  # coroutines that were made, and have not been run

    def __repr__(self) -> str:
        return repr(self._of_threads).replace("kbatch.", "kbatch.aio.", 1)

    def send(self, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> Coroutine[Any, Any, None]:
        """Takes, and raises, what `kbatch.Transaction.send` does. A handler that has not awaited it fails."""
        self._left += 1
        return self._send(topic, envelopes)

    async def _send(self, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> None:
        self._left -= 1
        self._of_threads.send(topic, envelopes)

    def _check(self) -> None:
        if self._left:
            raise ProducerError(f"{counted(self._left, 'send')} of this transaction had not begun: await it")

    def _end(self) -> list[bytes]:
        return self._of_threads._end()
