"""Producers without Kafka, for an application's own unit tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kbatch._base_producer import BaseProducer
from kbatch._callbacks import call_fault, is_coroutine_function
from kbatch._checks import check_timeout
from kbatch._codes import ALL_BROKERS_DOWN, NOT_PERSISTED, POSSIBLY_PERSISTED, PURGE_QUEUE
from kbatch._config import inherit
from kbatch._errors import ConfigError, fatal_error
from kbatch._fastmap import Batch, Envelope, monotonic
from kbatch._producer import Producer
from kbatch._transactions import Transactions
from kbatch.testing._memory_broker import Fault, MemoryRecord, error_code
from kbatch.testing._memory_core import NativeMemoryCore
from kbatch.testing._memory_line import SHARE, MemoryLine, Sent

if TYPE_CHECKING:
    import msgspec
    from typing_extensions import Self

    from kbatch._pending import PendingBatch
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["BaseMemoryProducer", "MemoryCore", "MemoryProducer"]

_LAST_S = 1.0  # for callbacks, when the time to close is over, as a producer has it


class MemoryCore(NativeMemoryCore):
    """Phase 1 is the real one. Phase 2 hands a batch to a broker in memory; librdkafka is never started.

    Whatever in `Core` needs librdkafka is overridden. The line's lock is held from where a batch is taken until it is
    in the line or answered, so that closing finds each batch in one of these states.
    """

    line: MemoryLine
    room: int
    queue_messages: int
    delivery_timeout_s: float
    transactional = False
    _started_in: int | None = None  # a process
    _fatal: tuple[str, int] | None = None

    def set_room(self, max_in_flight: int, queue_messages: int) -> None:
        self.queue_messages = queue_messages
        self.room = max(1, min(max_in_flight + -(-max_in_flight // SHARE), queue_messages * 4 // 5))

    def start(self) -> None:
        self.start_in_memory()
        self._started_in = os.getpid()

    def started(self) -> bool:
        return self._started_in is not None or self.closed()

    def send(
        self,
        batch: Batch,
        timeout: float | None = None,
        *,
        wait: bool,
        callback: Callable[[Any], object] | None = None,
    ) -> bool:
        sent = self._hand_over(batch, timeout, callback=callback)
        try:
            if not wait:
                self.line.wait_until(lambda: not self.line.waits_for_room(sent), None)
                return True
            if batch._wait(timeout):
                return True
            with self.line.lock:
                self.line.expire()  # if it still waits for room, nothing of it is sent
            return batch.done() and batch._wait(0)
        except BaseException:
            self.abandon(batch)
            raise

    def send_detached(
        self,
        batch: Batch,
        timeout: float | None = None,
        *,
        enqueued: Callable[[], object] | None = None,
        waker: Callable[[], object] | None = None,
    ) -> None:
        self._hand_over(batch, timeout, enqueued, waker=waker)

    def _hand_over(
        self, batch: Batch, timeout: float | None, enqueued: Callable[[], object] | None = None, **listeners: Any
    ) -> Sent:
        self.start()  # before a lock that a thread of the parent may have held
        with self.line.lock:
            if self._fatal is not None:
                raise fatal_error(*self._fatal)
            patience_s = self.delivery_timeout_s if timeout is None else min(timeout, self.delivery_timeout_s)
            try:
                envelopes, mapped = self.take_in_memory(batch, **listeners)
                sent = Sent(self, batch, envelopes, mapped, enqueued, monotonic() + patience_s)
                if patience_s <= 0:
                    sent.time_out()
                else:
                    self.line.take(sent)
            except BaseException:  # Ctrl-C, or what a test's own `when` raises: an answer comes all the same
                if not self.line.abandon(batch) and batch.begun and not batch.done():
                    self.settle_in_memory(batch, [(PURGE_QUEUE, NOT_PERSISTED, -1, -1)] * len(batch))
                raise
            return sent

    def abandon(self, batch: Batch) -> None:
        super().abandon(batch)
        if self._started_in == os.getpid():
            with self.line.lock:
                self.line.abandon(batch)

    def counters(self) -> dict[str, int]:
        counters = super().counters()
        with self.line.lock:
            counters["in_flight"] -= self.line.messages_without_room(self)
        return counters

    def flush(self, timeout: float | None = None) -> int:
        if not self.started():
            return 0
        self.start()
        if self.line.wait_until(lambda: self.closed() or not self.line.has_some_of(self), timeout):
            self.await_release(_LAST_S)
        return self.without_outcome()

    def purge(self) -> None:
        if not self.started():
            return
        self.start()
        with self.line.lock:
            self.line.purge(self)

    def close(self, timeout: float | None = None) -> int:
        end = None if timeout is None else monotonic() + timeout
        if self._started_in in (None, os.getpid()):
            self.shut_in_memory()
            try:
                self.line.tell()
                self.line.wait_until(lambda: not self.line.has_some_of(self), timeout)
            finally:
                with self.line.lock:
                    self.line.end_all(self)
                    self.end_in_memory()
        return super().close(None if end is None else max(_LAST_S, end - monotonic()))

    def name(self) -> str | None:
        return "in memory" if self.started() and not self.closed() else None

    def probe(self, topic: str, timeout_s: float) -> str | None:
        self.start()
        return "no broker answers: this producer in memory is down()" if self.line.is_down else None

    def inject_fatal_error(self, code: int, reason: str) -> bool:  # type: ignore[override]
        """Whether it is the first one, which stays."""
        self.start()
        with self.line.lock:
            is_first = self._fatal is None
            if self._fatal is None:
                self._fatal = reason, code
            self.line.end_all(self, self._fatal[1])
        return is_first


class _CommittedAtOnce(Transactions):
    """A batch is a transaction that is committed when its last envelope is acknowledged."""

    def __init__(self, core: MemoryCore) -> None:
        self._memory_core = core

    def send(self, batch: PendingBatch, timeout: float | None, waker: Callable[[], object] | None = None) -> None:
        self._memory_core.send_detached(batch, timeout, waker=waker)


class BaseMemoryProducer(BaseProducer):
    """What the producers in memory have in common."""

    _core_type = MemoryCore

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        partitions: int = 1,
        wire: str | WireFormat = "kbatch",
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        close_timeout_s: float = 30.0,
        max_in_flight: int = 10_000,
        carry_scheduled_time: bool = False,
    ) -> None:
        try:
            if isinstance(partitions, bool) or not isinstance(partitions, int) or not 0 < partitions < 2**31:
                raise ConfigError(f"partitions must be an int from 1 to 2**31 - 1, not {partitions!r}")
            super().__init__(
                _with_brokers(config),
                wire=wire,
                encoder=encoder,
                source=source,
                header_hook=header_hook,
                close_timeout_s=close_timeout_s,
                max_in_flight=max_in_flight,
                carry_scheduled_time=carry_scheduled_time,
            )
        finally:
            del config  # it may hold passwords
        self._join(MemoryLine(partitions, self._parsed.native.get("partitioner") or "consistent_random"))

    def _join(self, line: MemoryLine) -> None:
        core = self._core
        assert isinstance(core, MemoryCore)
        self._memory_core, self._line = core, line
        core.line = line
        core.set_room(self._max_in_flight, self._parsed.queue_max_messages)
        core.delivery_timeout_s = self._parsed.delivery_timeout_s
        if self._transactions is not None:
            core.transactional = True
            self._transactions = _CommittedAtOnce(core)

    def _twin(self, *, solo: bool = False, transactional_id: str | None = None) -> Self:
        """It goes on with what this one has kept, and with the same faults, as on the same cluster."""
        twin = super()._twin(solo=solo, transactional_id=transactional_id)
        twin._join(self._line)
        return twin

    # -- what has come

    @property
    def envelopes(self) -> tuple[Envelope[Any], ...]:
        """The envelopes that were stored, the very objects, in that order: one for each of `records`."""
        with self._line.lock:
            return tuple(self._line.envelopes)

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """What was stored, as a consumer would see it: the bytes of the wire format."""
        with self._line.lock:
            return tuple(self._line.records)

    @property
    def in_flight(self) -> tuple[Envelope[Any], ...]:
        """The envelopes that `hold` or `down` keeps from being answered, in the order in which they were sent.

        What waits for room (``max_in_flight``) is not among them.
        """
        with self._line.lock:
            return tuple(
                envelope
                for sent in self._line.in_flight()
                for envelope, record in zip(sent.envelopes, sent.mapped, strict=True)
                if record is not None
            )

    def clear(self) -> None:
        """Forgets `envelopes` and `records`. Offsets go on; faults and what is in flight stay."""
        with self._line.lock:
            self._line.envelopes.clear()
            self._line.records.clear()

    # -- faults

    def fail(
        self,
        error: int | str = "_MSG_TIMED_OUT",
        *,
        times: int | None = 1,
        when: Callable[[Envelope[Any]], object] | None = None,
        possibly_persisted: bool = False,
        stored: bool | None = None,
    ) -> None:
        """Makes the next envelopes fail. Of several such orders the first that fits an envelope counts.

        Args:
            error: librdkafka's code or its name, such as ``"NOT_ENOUGH_REPLICAS"``: the one that comes out after
                librdkafka's own retries. What ends a producer is `fatal`.
            times: How many envelopes; one that is sent again counts again. ``None``: until `up`.
            when: Called with an envelope: whether it is to fail. By default each.
            possibly_persisted: What its `DeliveryError` says of it, as when the answer to a request is lost. The
                envelope is stored all the same, so that sending it again makes a duplicate.
            stored: ``False`` with `possibly_persisted`: it is not stored, as when the request itself is lost.
        """
        if times is not None and (isinstance(times, bool) or not isinstance(times, int) or times < 1):
            raise ValueError(f"times must be an int, 1 or more, or None, not {times!r}")
        wrong = None if when is None else call_fault(when, "envelope")
        if wrong is not None:
            raise TypeError(f"when {wrong}")
        if is_coroutine_function(when):
            raise TypeError("when must not be a coroutine function: nothing awaits its answer")
        if stored and not possibly_persisted:
            raise ValueError("stored=True needs possibly_persisted=True: what is told as not persisted is never stored")
        fault = Fault(
            error_code(error),
            POSSIBLY_PERSISTED if possibly_persisted else NOT_PERSISTED,
            possibly_persisted if stored is None else bool(stored),
            times,
            when,
        )
        with self._line.lock:
            self._line.faults.append(fault)

    def down(self, timeout: float | None = None) -> None:
        """No broker answers, until `up`. What is sent, and what is in flight, stays in flight until then.

        It times out after ``delivery.timeout.ms`` (5 minutes by default), as in production, so ``send_batch`` may block
        for that long.

        Args:
            timeout: Seconds after which it times out already; with 0 at once, also what is in flight, so that a
                test need not wait. It may be called again with another one.
        """
        check_timeout(timeout)
        with self._line.lock:
            self._line.go_down(timeout)
        self._tell_error_cb(ALL_BROKERS_DOWN, "1/1 brokers are down")

    def up(self) -> None:
        """Ends `down`: what is in flight is stored, unless `hold` keeps it. Ends what `fail` has ordered, too."""
        with self._line.lock:
            self._line.faults.clear()
            self._line.come_up()

    def fatal(self, error: int | str = "OUT_OF_ORDER_SEQUENCE_NUMBER", reason: str = "made up by a test") -> None:
        """Puts the producer into its fatal state: what is in flight fails, and each later batch is refused.

        ``"_FENCED"`` is another producer with the same ``transactional.id``.
        """
        code = error_code(error)
        if self._memory_core.inject_fatal_error(code, reason):
            self._tell_error_cb(code, reason, fatal=True)

    def hold(self) -> None:
        """Batches stay in flight from now on, until `release`. ``flush`` and ``close`` wait for them.

        They time out after ``delivery.timeout.ms``.
        """
        with self._line.lock:
            self._line.holds = True

    def release(self, batches: int | None = None) -> None:
        """Answers what is in flight, in the order in which it was sent, and holds no longer. Nothing while `down`.

        Args:
            batches: Only the oldest so many, and goes on holding.
        """
        if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 0):
            raise ValueError(f"batches must be an int, 0 or more, or None, not {batches!r}")
        with self._line.lock:
            self._line.release(batches)

    def _tell_error_cb(self, code: int, reason: str, *, fatal: bool = False) -> None:
        error_cb = self._parsed.error_cb
        if error_cb is not None:
            from confluent_kafka import KafkaError

            self._core.start()
            self._callback_thread.put(error_cb, KafkaError(code, reason, fatal=fatal))


def _with_brokers(config: Any) -> Any:
    if config is None or isinstance(config, Mapping):
        return inherit({"bootstrap.servers": "in-memory"}, config or {})
    return config  # to be refused as every producer does it


class MemoryProducer(BaseMemoryProducer, Producer):
    """A `kbatch.Producer` that keeps in memory what it is given, for unit tests: no broker and no librdkafka.

    Envelopes are mapped as in production, with the same errors, expiry, sizes and bytes; all but the broker is the real
    thing. Each batch is stored and acknowledged at once, unless `fail`, `down`, `fatal` or `hold` say otherwise.

        producer = MemoryProducer()
        place_order(producer)  # the application's own code
        assert [envelope.key for envelope in producer.envelopes] == ["order-1"]

    What differs from `kbatch.Producer`:

    - Every topic exists and has `partitions` partitions.
    - ``partitioner`` sends each key where librdkafka sends it. Where librdkafka takes any partition, each has its turn.
    - A batch is in flight as a whole: one with room for its first message departs with all of them. It also is
      stored as a whole, so no other batch comes in between. On an event loop the loop does it, in one go.
    - Nothing waits for ``linger.ms``, and no record batch is refused for one of its records.
    - What `fail` lets fail is not tried again as librdkafka would do it, whatever the code. What `down` keeps is stored
      once.
    - Of the configuration ``message.max.bytes``, ``queue.buffering.max.messages``, ``queue.buffering.max.kbytes`` (for
      one message), ``delivery.timeout.ms``, ``partitioner`` and ``transactional.id`` change what it does. What only
      librdkafka's start refuses is not refused.
    - A transaction is committed with the acknowledgement of its batch. Of a transaction that fails
      nothing is stored, and the end of one takes no offset.
    - ``error_cb`` is told of `down` and of `fatal` only. ``stats_cb``, ``throttle_cb``, ``oauth_cb`` and ``logger`` are
      not called.
    - ``stats()["enqueue_ns"]`` is 0.

    Args:
        config: As for `kbatch.Producer`, and checked in the same way; ``bootstrap.servers`` may be missing.
        partitions: How many each topic has.
        wire, encoder, source, header_hook, close_timeout_s, max_in_flight, carry_scheduled_time: As for
            `kbatch.Producer`.

    Raises:
        ConfigError: As `kbatch.Producer`.
    """

    _shown = "kbatch.testing.MemoryProducer"
