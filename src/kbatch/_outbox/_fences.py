"""Brokers are told to listen no more to relays whose leases have run out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbatch._errors import ProducerError
from kbatch._pending import PendingBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from kbatch._base_producer import BaseProducer

__all__ = ["Fences", "initialize", "is_initialized", "transactional_id"]


def transactional_id(owner: str) -> str:
    """Of the one producer that the relay `owner` ever has."""
    return f"kbatch-relay-{owner}"


def initialize(producer: BaseProducer, waker: Callable[[], object]) -> PendingBatch:
    """Begins to have brokers listen to no earlier producer with this ``transactional.id``. What it had not committed is
    aborted. The batch, an empty transaction, is done when that is over."""
    pending = PendingBatch(producer._core)
    producer._core.map_packed(pending, [], [])
    producer._send_detached(pending, waker=waker)
    return pending


def is_initialized(producer: BaseProducer) -> bool:
    """Whether brokers listen to no earlier producer with its ``transactional.id``."""
    return producer._transactions is not None and producer._transactions.is_initialized


class Fences:
    """Fences owners of leases, each by a producer with its ``transactional.id`` that sends nothing.

    An owner that was fenced stays so: no relay initialises an id of which it has sent before.

    Attributes:
        fenced: Those of whom brokers take nothing any more.

    Args:
        waker: Called, on any thread, when there is something for `look`. It must not block.
        put: Calls a function where it may block.
    """

    def __init__(self, waker: Callable[[], object], put: Callable[[Callable[[], object]], object]) -> None:
        self.fenced: set[str] = set()
        self._waker = waker
        self._put = put
        self._under_way: dict[str, tuple[BaseProducer, PendingBatch]] = {}

    def want(self, owners: Collection[str], prototype: BaseProducer) -> None:
        """Fences these, and forgets others."""
        self.fenced.intersection_update(owners)
        for owner in owners:
            if owner in self.fenced or owner in self._under_way:
                continue
            producer = prototype._twin(transactional_id=transactional_id(owner))
            try:
                self._under_way[owner] = producer, initialize(producer, self._waker)
            except ProducerError:
                self._close(producer)

    def look(self) -> bool:
        """Whether others are fenced now. What has failed is to be wanted again."""
        done = [owner for owner, (_, pending) in self._under_way.items() if pending.done()]
        before = len(self.fenced)
        for owner in done:
            producer, _ = self._under_way[owner]
            if is_initialized(producer):
                self.fenced.add(owner)
            del self._under_way[owner]
            self._close(producer)
        return len(self.fenced) > before

    def close(self) -> None:
        """Ends what is under way."""
        while self._under_way:
            _, (producer, _) = self._under_way.popitem()
            self._close(producer)

    def _close(self, producer: BaseProducer) -> None:
        self._put(lambda: producer._core.close(0.0))
