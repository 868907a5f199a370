"""What a handler sends, and the offsets of what it was given, in one transaction of Kafka."""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._codes import ABORTED_CODE
from kbatch._errors import (
    ConfigError,
    DeliveryError,
    KbatchError,
    ProducerClosedError,
    ProducerError,
    spares_brokers,
    type_name,
)
from kbatch._fastmap import Mapper, RecordPool, monotonic
from kbatch._producer import Producer
from kbatch._receiving._consumer import ConsumerCallError
from kbatch._receiving._copies import LARGEST, shared_config
from kbatch._recovery._handle import ProducerHandle, ProducerUse
from kbatch._recovery._retry import RetryPolicy, entropy
from kbatch._text import counted
from kbatch._transactions import BatchWithOffsets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kbatch._base_producer import BaseProducer
    from kbatch._fastmap import Core, Envelope
    from kbatch._receiving._lanes import Work
    from kbatch._receiving._reading import Reading

__all__ = ["CannotCommitError", "OvertakenError", "Transacting", "Transaction"]

_logger = logging.getLogger("kbatch")

_AGAIN = RetryPolicy(max_attempts=None, initial_backoff_s=0.05, max_backoff_s=5.0)
# rd_kafka_send_offsets_to_transaction heeds no timeout: if the group's coordinator has gone, it waits for the next
# change of a broker's state (librdkafka's issues 5456, 5511). The end of an idle connection is one.
_WAKES = {"connections.max.idle.ms": "5000"}
_COMMITTED_S = 5.0  # for the group's answer
_LOOK_S = 0.02  # whether what waits is still wanted
_TOLD_EVERY_S = 30.0


class OvertakenError(Exception):
    """Nothing was committed, and the records are another's now, or the listener stops."""


class CannotCommitError(Exception):
    """The producer can commit no more."""

    def __init__(self, error: KbatchError) -> None:
        super().__init__(str(error))
        self.error = error


class Transaction:
    """What a handler of a listener with a ``transactional_id`` sends by. The listener makes one for each call.

    What was sent becomes visible together with the commit of the offsets that the handler was called with, or not at
    all. It leaves when the handler has returned. If the handler raises, it is dropped.
    """

    __slots__ = ("_lock", "_mapper", "_packed")

    def __init__(self, mapper: Mapper) -> None:
        self._mapper = mapper
        self._packed: list[bytes] | None = []
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        packed = self._packed
        return f"<kbatch.Transaction {'over' if packed is None else counted(len(packed), 'envelope')}>"

    def send(self, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> None:
        """Takes envelopes, in order; they are mapped before it returns. Any thread may call it while the handler runs.

        Args:
            topic: Where envelopes without a topic of their own go; ``None`` if each has one.
            envelopes: Any iterable; it is read once. One whose ``deliver_by`` has passed is left out.

        Raises:
            SerializationError: An envelope could not be mapped. None of this call was taken.
            NotYetDueError: The ``scheduled_time`` of an envelope is in the future. None of this call was taken.
            ProducerError: The handler that it was made for has returned.
        """
        pool = RecordPool()
        packed = [one for one in pool.pack(pool.map(self._mapper, topic, envelopes)) if one is not None]
        with self._lock:
            if self._packed is None:
                raise ProducerError("this transaction is over: its handler has returned")
            self._packed += packed

    def _end(self) -> list[bytes]:
        with self._lock:
            packed, self._packed = self._packed, None
        return packed or []


class Transacting:
    """The transactions of a listener: one producer for each run. A `CopyTaker`, too: copies are sent in them.

    Args:
        config: The listener's; of its keys a producer is made, unless `producer` is given.
        producer: A `kbatch.Producer` with this `transactional_id`, of which each run uses a twin.
    """

    def __init__(self, config: Mapping[str, Any], transactional_id: str, wire: str, producer: Producer | None) -> None:
        if not (isinstance(transactional_id, str) and transactional_id):
            raise ConfigError(f"transactional_id must be a name, not {transactional_id!r}")
        if producer is None:
            producer = Producer({**shared_config(config), "transactional.id": transactional_id}, wire=wire)
        elif not isinstance(producer, Producer):
            raise ConfigError(f"producer must be a kbatch.Producer, not {type_name(producer)}")
        elif producer._parsed.native.get("transactional.id") != transactional_id:
            raise ConfigError(f"producer must have transactional.id={transactional_id}, as the listener has")
        self._prototype = producer._twin()  # not used: each run has a twin
        if self._prototype._parsed.native.get("connections.max.idle.ms") in (None, "0"):
            self._prototype._parsed = producer._parsed.changed(_WAKES)
        self._handle: ProducerHandle | None = None  # of a run
        self._use: ProducerUse | None = None
        self._reading: Reading | None = None
        self._raw = Mapper("raw", msgspec.json.Encoder(), None, None, LARGEST, LARGEST)
        self._told_at = float("-inf")

    # -- a run

    def open(self) -> None:
        self._use = ProducerHandle(self._prototype._twin(), given=False).acquire()
        self._handle = self._use.handle

    def begin(self, reading: Reading) -> None:
        """Waits until the coordinator has ended what another with this id has left open, and fences that one.

        Before the group is joined: committed offsets are not told while a transaction about them is open.

        Raises:
            ProducerError: The producer is refused.
        """
        self._reading = reading
        failures = 0
        while not reading.is_stopping:
            handle = self._running_handle()
            producer = handle.producer
            try:
                batch = _send(producer, [], None)
            except ProducerError as error:
                if handle.fate(producer, error) == "end":
                    raise
                handle.replace(producer)
                reason = str(error)
            else:
                while not batch._wait(_LOOK_S):
                    if reading.is_stopping:
                        producer._core.abandon(batch)
                if batch.is_committed:
                    return
                reason = batch.reason
            failures += 1
            self._tell("a listener waits for the coordinator of its transactions: %s", reason)
            self._wait(_AGAIN.delay_s(failures, entropy), lambda: reading.is_stopping)

    def close(self, timeout_s: float) -> None:
        self._handle = None
        if self._use is not None:
            self._use.release(timeout_s)
            self._use = None

    def _running_handle(self) -> ProducerHandle:
        handle = self._handle
        if handle is None:
            raise ProducerClosedError("the listener has ended")
        return handle

    # -- handlers' threads

    def transaction(self) -> Transaction:
        return Transaction(self._prototype._mapper)

    def commit(self, reading: Reading, work: Work, packed: list[bytes]) -> None:
        """Commits these records and the offsets of what is handled. What fails for no fault of theirs is tried again.

        Raises:
            DeliveryError: A record cannot be stored. Nothing was committed.
            OvertakenError: The work is not wanted any more. Nothing was committed.
            CannotCommitError: The listener has to end.
        """
        failures = 0
        used: BaseProducer | None = None
        is_unknown = False  # what was sent before may have been committed
        while True:
            producer = None
            try:
                handle = self._running_handle()
                producer = handle.producer
                # In place of one that could send no more: the last transaction of that may be the one of this work.
                is_unknown |= used is not None and producer is not used
                used = producer
                if is_unknown:
                    was_committed = self._was_committed(producer, reading, work)
                    if was_committed:
                        return
                    is_unknown = was_committed is None
                reason = "the group does not tell what it has committed"
                if not is_unknown:
                    batch = _send(producer, packed, functools.partial(_send_offsets, reading, work))
                    batch._wait(None)
                    if batch.is_committed:
                        return
                    reason = _cause_of(batch)
            except ProducerError as error:
                if producer is None or handle.fate(producer, error) == "end":
                    raise CannotCommitError(error) from error
                handle.replace(producer)
                reason = str(error)
            failures += 1
            if reading.holds(work):
                self._tell("a transaction of a listener was not committed, and is tried again: %s", reason)
            is_waited = self._wait(_AGAIN.delay_s(failures, entropy), lambda: reading.is_given_up(work))
            if not (is_waited and reading.holds(work)):
                raise OvertakenError

    def _was_committed(self, producer: BaseProducer, reading: Reading, work: Work) -> bool | None:
        """Whether a transaction of a producer before this one has committed it; ``None``: nobody tells yet."""
        batch = _send(producer, [], None)  # the coordinator ends that one first
        batch._wait(None)
        if not batch.is_committed:
            return None
        try:
            committed = reading.core.committed([work.partition], _COMMITTED_S)
        except ProducerClosedError:
            raise OvertakenError from None
        except ConsumerCallError:
            return None
        return committed.get(work.partition, -1) >= work.next_offset

    def send(self, work: Work, answer: Callable[[KbatchError | None], object]) -> None:
        answer(self.store(work))

    def store(self, work: Work) -> KbatchError | None:
        """Commits the copy that the work has, and the offset of its record; why it is not stored."""
        assert work.copy is not None
        assert self._reading is not None
        pool = RecordPool()
        (packed,) = pool.pack(pool.map(self._raw, None, [work.copy]))
        assert packed is not None
        try:
            self.commit(self._reading, work, [packed])
        except DeliveryError as error:
            return error
        except OvertakenError:
            return ProducerError("its record is not the listener's any more")
        except CannotCommitError as error:
            raise error.error from None
        return None

    def _wait(self, seconds: float, is_over: Callable[[], bool]) -> bool:
        end = monotonic() + seconds
        while not is_over():
            left = end - monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, _LOOK_S))
        return False

    def _tell(self, message: str, reason: str) -> None:
        now = monotonic()
        if now >= self._told_at + _TOLD_EVERY_S:
            self._told_at = now
            _logger.warning(message, reason)


def _send(
    producer: BaseProducer,
    packed: list[bytes],
    send_offsets: Callable[[Core, int], tuple[int, str, bool, bool, bool] | None] | None,
) -> BatchWithOffsets:
    batch = BatchWithOffsets(producer._core)
    batch.send_offsets = send_offsets
    producer._core.map_packed(batch, packed)
    producer._send_detached(batch)
    return batch


def _cause_of(batch: BatchWithOffsets) -> str:
    """Why it was not committed. Raises what is the fault of one of its envelopes."""
    reason = batch.reason
    for failed in batch.report.errors.values():
        if failed.code != ABORTED_CODE:
            reason = str(failed)
            if spares_brokers(failed) and not failed.retriable:
                raise failed
    return reason


def _send_offsets(
    reading: Reading, work: Work, producer: Core, timeout_ms: int
) -> tuple[int, str, bool, bool, bool] | None:
    # In this order: if the partition is still held after the membership was taken, this membership has it. One that is
    # over when it arrives is refused by the coordinator.
    try:
        membership = reading.core.membership()
        if not reading.holds(work):
            return ABORTED_CODE, "its partition is another member's", False, False, True
        return membership.send_offsets(producer, [(*work.partition, work.next_offset)], timeout_ms)
    except ProducerClosedError as error:
        return ABORTED_CODE, str(error), False, False, True
