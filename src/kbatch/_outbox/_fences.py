"""What a relay is called, and how brokers are told to listen no more to relays whose leases have run out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kbatch._errors import ProducerError, ProducerFencedError
from kbatch._fastmap import monotonic, uuid7
from kbatch._logs import Reminder, tell
from kbatch._transactions import BatchWithOffsets

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from kbatch._base_producer import BaseProducer
    from kbatch._fastmap import Trial
    from kbatch._outbox._store import OutboxStore
    from kbatch._recovery._gate import Gate

__all__ = ["Fences", "Owner", "initialize", "is_initialized", "transactional_id"]


def transactional_id(owner: str) -> str:
    """Of the one producer that the relay `owner` ever has."""
    return f"kbatch-relay-{owner}"


def initialize(producer: BaseProducer, waker: Callable[[], object]) -> BatchWithOffsets:
    """Begins to have brokers listen to no earlier producer with this ``transactional.id``. What it had not committed is
    aborted. The batch, an empty transaction, is done when that is over; if it failed, its `reason` says why."""
    pending = BatchWithOffsets(producer._core)
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
        self._under_way: dict[str, tuple[BaseProducer, BatchWithOffsets]] = {}

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


class Owner:
    """The owner of leases that a relay is.

    With fencing each owner has a transactional id of its own. Who takes a bucket whose lease has run out initialises
    that of its owner before. So an id must not be initialised once its owner may have lost a lease: it is before the
    first lease, and never again. A relay that needs another producer is another owner.

    Attributes:
        name: In the database, and in the transactional id.
        former: Names that it had, and whose leases nobody may take yet.

    Args:
        gate: Of the relay. It is told what the producer refuses, and replaces it.
        put: Calls a function where it may block.
    """

    def __init__(self, gate: Gate, put: Callable[[Callable[[], object]], object], *, is_fencing: bool) -> None:
        self.name = ""
        self.former: set[str] = set()
        self._gate = gate
        self._put = put
        self._is_fencing = is_fencing
        self._fences: Fences | None = None
        self._naming: BatchWithOffsets | None = None  # has the producer's transactional id initialised
        self._trouble = Reminder()  # brokers do not let it be initialised

    def begin(self) -> None:
        """In a process: two children of one that made it are two owners."""
        self.name = _new_name()
        if self._is_fencing:
            self._gate.handle.name(transactional_id(self.name))
            self._fences = Fences(self._gate.flag.set, self._put)
            self._naming = None
            self.former.clear()

    def start_over(self) -> None:
        """Is another owner from now on, with another producer. The relay has no leases."""
        self.former.add(self.name)
        self.name = _new_name()  # before the producer: what is not of this name must be one that can send no more
        self._naming = None
        self._gate.replace(transactional_id=transactional_id(self.name))

    def is_named(self) -> bool:
        """Whether brokers know its transactional id, so that others can fence it: before, it must have no lease. If
        they do not, it is asked for."""
        if self._fences is None:
            return True
        producer = self._gate.handle.producer
        if is_initialized(producer):
            self._naming = self._trouble.told_at = None
            return True
        if self._naming is None or self._naming.done():
            if self._naming is not None and self._trouble.tells_now(monotonic()):
                tell(
                    "a relay waits: brokers do not let it have the transactional id %s: %s",
                    transactional_id(self.name),
                    self._naming.reason,
                )
            self._naming = None
            try:
                self._naming = initialize(producer, self._gate.flag.set)
            except ProducerError as error:
                self.note_refusal(producer, error, None)
        return False

    def is_to_be_named(self) -> bool:
        """Whether it has a transactional id that brokers have not refused to know."""
        return self._fences is not None and self._trouble.told_at is None

    def fenced(self) -> Collection[str] | None:
        """The owners whose leases it may take once these have run out; ``None`` for all."""
        return None if self._fences is None else self._fences.fenced

    def look(self) -> bool:
        """Whether it is named now, or others are fenced, so that leases are to be asked for."""
        if self._fences is None:
            return False
        is_named = self._naming is not None and is_initialized(self._gate.handle.producer)
        return self._fences.look() or is_named

    def fence(self, store: OutboxStore) -> bool:
        """Has owners fenced whose leases have run out. Whether it gave leases of a former name back."""
        if self._fences is None:
            return False
        self._fences.want((store.run_out() | self.former) - {self.name}, self._gate.handle.producer)
        own = self.former & self._fences.fenced
        for name in own:
            store.leave(name, keep=())
            self.former.discard(name)
        return bool(own)

    def note_refusal(self, producer: BaseProducer, error: ProducerError, trial: Trial | None) -> None:
        """Learns why its producer took nothing of a batch."""
        if self._is_fencing and isinstance(error, ProducerFencedError):
            tell("a relay was taken for dead by another, and begins anew: %s", error)
            self._gate.give_up(producer)
            self._gate.note("nothing", trial, monotonic())
        else:
            self._gate.note_refusal(producer, error, trial)

    def close(self) -> None:
        """Ends what is under way."""
        if self._fences is not None:
            self._fences.close()


def _new_name() -> str:
    import socket  # for relays only

    return f"{socket.gethostname()}:{os.getpid()}:{uuid7()}"
