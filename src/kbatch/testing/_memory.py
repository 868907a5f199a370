"""Producers without Kafka, for an application's own unit tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbatch import aio
from kbatch._base_producer import BaseProducer
from kbatch._callbacks import is_coroutine_function
from kbatch._errors import ConfigError, fatal_error
from kbatch._fastmap import Batch, Core, Envelope
from kbatch._producer import Producer
from kbatch._transactions import Transactions
from kbatch.testing._memory_broker import (
    MSG_TIMED_OUT,
    NOT_PERSISTED,
    POSSIBLY_PERSISTED,
    Fault,
    Mapped,
    MemoryBroker,
    MemoryRecord,
    error_code,
)

if TYPE_CHECKING:
    import msgspec
    from typing_extensions import Self

    from kbatch._pending import PendingBatch
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["AioMemoryProducer", "MemoryProducer"]

# librdkafka's codes
_TIMED_OUT_QUEUE = -166
_PURGE_QUEUE = -152
_PURGE_INFLIGHT = -151

_LAST_S = 1.0  # for callbacks, when the time to close is over, as a producer has it


@dataclass(eq=False)
class _Sent:
    """A batch in flight."""

    core: MemoryCore
    batch: Batch
    envelopes: tuple[Envelope[Any], ...]
    mapped: list[Mapped]

    def fail(self, code: int, persistence: int) -> None:
        self.core.settle_in_memory(
            self.batch, [(code, persistence, -1 if record is None else record[1], -1) for record in self.mapped]
        )


class _Line(MemoryBroker):
    """A broker and what is in flight to it."""

    def __init__(self, partitions: int) -> None:
        super().__init__(partitions)
        self.holds = False
        self.held: list[_Sent] = []

    def take(self, sent: _Sent) -> None:
        if self.holds and not self.is_down and any(sent.mapped):
            self.held.append(sent)
        else:
            self.answer(sent)

    def answer(self, sent: _Sent) -> None:
        sent.core.settle_in_memory(
            sent.batch, self.receive(sent.envelopes, sent.mapped, transaction=sent.core.transactional)
        )

    def answer_held(self, count: int) -> None:
        while self.held and count:
            count -= 1
            sent = self.held.pop(0)
            try:
                self.answer(sent)
            except BaseException:
                if not sent.batch.done():
                    sent.fail(_PURGE_INFLIGHT, POSSIBLY_PERSISTED)
                raise
            finally:
                self.changed.notify_all()

    def fail_held(self, code: int, core: MemoryCore | None = None) -> None:
        """It was on its way: it may have arrived."""
        for sent in self.held[:]:
            if core is None or sent.core is core:
                self.held.remove(sent)
                sent.fail(code, POSSIBLY_PERSISTED)
        self.changed.notify_all()

    def holds_some_of(self, core: MemoryCore) -> bool:
        return any(sent.core is core for sent in self.held)


class MemoryCore(Core):
    """Phase 1 is the real one. Phase 2 hands a batch to a broker in memory; librdkafka is never started.

    Whatever in `Core` needs librdkafka is overridden. The line's lock is held from where a batch is taken until it is
    answered or in flight, so that closing finds each batch in one of these states.
    """

    line: _Line
    transactional = False
    _started_in: int | None = None  # a process
    _fatal: tuple[str, int] | None = None

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
        self._hand_over(batch, timeout, callback=callback)
        return batch._wait(timeout) if wait else True

    def send_detached(
        self,
        batch: Batch,
        timeout: float | None = None,
        *,
        enqueued: Callable[[], object] | None = None,
        waker: Callable[[], object] | None = None,
    ) -> None:
        self._hand_over(batch, timeout, enqueued=enqueued, waker=waker)

    def _hand_over(self, batch: Batch, timeout: float | None, **listeners: Any) -> None:
        self.start()  # before a lock that a thread of the parent may have held
        with self.line.changed:
            if self._fatal is not None:
                raise fatal_error(*self._fatal)
            try:
                sent = _Sent(self, batch, *self.take_in_memory(batch, **listeners))
                if timeout is not None and timeout <= 0:
                    sent.fail(_TIMED_OUT_QUEUE, NOT_PERSISTED)
                else:
                    self.line.take(sent)
            except BaseException:
                # Ctrl-C, or what a test's own `when` raises: an answer comes all the same.
                if batch.begun and not batch.done() and all(sent.batch is not batch for sent in self.line.held):
                    self.settle_in_memory(batch, [(_PURGE_QUEUE, NOT_PERSISTED, -1, -1)] * len(batch))
                raise
            finally:
                self.line.changed.notify_all()

    def flush(self, timeout: float | None = None) -> int:
        if not self.started():
            return 0
        self.start()
        with self.line.changed:
            done = self.line.changed.wait_for(lambda: self.closed() or not self.line.holds_some_of(self), timeout)
        if done:
            self.await_release(_LAST_S)
        return self.in_flight()

    def purge(self) -> None:
        if not self.started():
            return
        self.start()
        with self.line.changed:
            self.line.fail_held(_PURGE_INFLIGHT, self)

    def close(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        if self._started_in in (None, os.getpid()):
            self.shut_in_memory()
            with self.line.changed:
                self.line.changed.notify_all()
                try:
                    self.line.changed.wait_for(lambda: not self.line.holds_some_of(self), timeout)
                finally:
                    self.line.fail_held(_PURGE_INFLIGHT, self)
                    self.end_in_memory()
        return super().close(None if end is None else max(_LAST_S, end - time.monotonic()))

    def name(self) -> str | None:
        return "in memory" if self.started() and not self.closed() else None

    def probe(self, topic: str, timeout_s: float) -> str | None:
        self.start()
        return "no broker answers: this producer in memory is down()" if self.line.is_down else None

    def inject_fatal_error(self, code: int, reason: str) -> None:
        self.start()
        with self.line.changed:
            if self._fatal is None:
                self._fatal = reason, code
            self.line.fail_held(self._fatal[1], self)


class _CommittedAtOnce(Transactions):
    """A batch is a transaction that is committed when its last envelope is acknowledged."""

    def __init__(self, core: MemoryCore) -> None:
        self._memory_core = core

    def send(self, batch: PendingBatch, timeout: float | None, waker: Callable[[], object] | None = None) -> None:
        self._memory_core.send_detached(batch, timeout, waker=waker)


class _InMemory(BaseProducer):
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
        close_timeout: float = 30.0,
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
                close_timeout=close_timeout,
                carry_scheduled_time=carry_scheduled_time,
            )
        finally:
            del config  # it may hold passwords
        self._join(_Line(partitions))

    def _join(self, line: _Line) -> None:
        core = self._core
        assert isinstance(core, MemoryCore)
        self._memory_core, self._line = core, line
        core.line = line
        if self._transactions is not None:
            core.transactional = True
            self._transactions = _CommittedAtOnce(core)

    def _twin(self, *, solo: bool = False) -> Self:
        """It goes on with what this one has kept, and with the same faults, as on the same cluster."""
        twin = super()._twin(solo=solo)
        twin._join(self._line)
        return twin

    # -- what has come

    @property
    def envelopes(self) -> tuple[Envelope[Any], ...]:
        """The envelopes that were acknowledged, the very objects, in that order."""
        with self._line.changed:
            return tuple(self._line.envelopes)

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """The same as records, as a consumer would see them: the bytes of the wire format."""
        with self._line.changed:
            return tuple(self._line.records)

    @property
    def in_flight(self) -> tuple[Envelope[Any], ...]:
        """The envelopes that `hold` keeps from being answered, in the order in which they were sent."""
        with self._line.changed:
            return tuple(
                envelope
                for sent in self._line.held
                for envelope, record in zip(sent.envelopes, sent.mapped, strict=True)
                if record is not None
            )

    def clear(self) -> None:
        """Forgets `envelopes` and `records`. Offsets go on; faults and what is in flight stay."""
        with self._line.changed:
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
    ) -> None:
        """Makes the next envelopes fail. Of several such orders the first that fits an envelope counts.

        Args:
            error: librdkafka's code or its name, such as ``"NOT_ENOUGH_REPLICAS"``. What ends a producer is `fatal`.
            times: How many envelopes; one that is sent again counts again. ``None``: until `up`.
            when: Called with an envelope: whether it is to fail. By default each.
            possibly_persisted: What its `DeliveryError` says of it. It is not kept either way.
        """
        if times is not None and (isinstance(times, bool) or not isinstance(times, int) or times < 1):
            raise ValueError(f"times must be an int, 1 or more, or None, not {times!r}")
        if when is not None and not callable(when):
            raise TypeError(f"when must be callable, not {type(when).__name__}")
        if is_coroutine_function(when):
            raise TypeError("when must not be a coroutine function: nothing awaits its answer")
        persistence = POSSIBLY_PERSISTED if possibly_persisted else NOT_PERSISTED
        fault = Fault(error_code(error), persistence, times, when)
        with self._line.changed:
            self._line.faults.append(fault)

    def down(self) -> None:
        """No broker answers, until `up`: what is sent fails at once, as timed out, and so does what is in flight."""
        with self._line.changed:
            self._line.is_down = True
            self._line.fail_held(MSG_TIMED_OUT)

    def up(self) -> None:
        """Ends `down`, and what `fail` has ordered and nothing has met yet."""
        with self._line.changed:
            self._line.is_down = False
            self._line.faults.clear()

    def fatal(self, error: int | str = "OUT_OF_ORDER_SEQUENCE_NUMBER", reason: str = "made up by a test") -> None:
        """Puts the producer into its fatal state: what is in flight fails, and each later batch is refused.

        ``"_FENCED"`` is another producer with the same ``transactional.id``.
        """
        self._memory_core.inject_fatal_error(error_code(error), reason)

    def hold(self) -> None:
        """Batches stay in flight from now on, until `release`. ``flush`` and ``close`` wait for them."""
        with self._line.changed:
            self._line.holds = True

    def release(self, batches: int | None = None) -> None:
        """Answers what is in flight, in the order in which it was sent, and holds no longer.

        Args:
            batches: Only the oldest so many, and goes on holding.
        """
        if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 0):
            raise ValueError(f"batches must be an int, 0 or more, or None, not {batches!r}")
        with self._line.changed:
            if batches is None:
                self._line.holds = False
            self._line.answer_held(len(self._line.held) if batches is None else batches)


def _with_brokers(config: Any) -> Any:
    if config is None or isinstance(config, Mapping):
        return {"bootstrap.servers": "in-memory", **(config or {})}
    return config  # to be refused as every producer does it


class MemoryProducer(_InMemory, Producer):
    """A `kbatch.Producer` that keeps in memory what it is given, for unit tests: no broker and no librdkafka.

    Envelopes are mapped as in production, with the same errors, expiry, sizes and bytes; all but the broker is the real
    thing. Each batch is acknowledged at once, unless `fail`, `down`, `fatal` or `hold` say otherwise.

        producer = MemoryProducer()
        place_order(producer)  # the application's own code
        assert [envelope.key for envelope in producer.envelopes] == ["order-1"]

    Every topic exists. A record without a partition goes where librdkafka's default partitioner sends its key, and one
    without a key to each partition in turn. With a ``transactional.id`` a batch is kept as a whole or not at all. Any
    number of batches can be in flight; what is held does not time out.

    Args:
        config: As for `kbatch.Producer`, and checked in the same way; ``bootstrap.servers`` may be missing. Only
            ``message.max.bytes``, ``queue.buffering.max.kbytes`` and ``transactional.id`` change what it does, and its
            callbacks are not called.
        partitions: How many each topic has.
        wire, encoder, source, header_hook, close_timeout, carry_scheduled_time: As for `kbatch.Producer`.

    Raises:
        ConfigError: As `kbatch.Producer`.
    """

    _shown = "kbatch.testing.MemoryProducer"


class AioMemoryProducer(_InMemory, aio.Producer):
    """A `kbatch.aio.Producer` that keeps in memory what it is given: the `MemoryProducer` of asyncio.

    Takes the same, and has the same methods besides; these are no coroutines.
    """

    _shown = "kbatch.testing.AioMemoryProducer"
