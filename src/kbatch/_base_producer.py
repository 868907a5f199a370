"""What the blocking producer and the one for asyncio have in common."""

from __future__ import annotations

import traceback
import weakref
from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._callbacks import call_fault, encoder_fault, is_coroutine_function
from kbatch._checks import check_close_timeout, check_whole
from kbatch._config import ProducerConfig
from kbatch._errors import ConfigError, ProducerError, UndeliveredError, type_name
from kbatch._events import make_dispatcher
from kbatch._exit import CORES, watch_multiprocessing_child
from kbatch._fastmap import WIRE_NAMES, CallbackThread, Core, Mapper
from kbatch._logs import tell_beside
from kbatch._pending import PendingBatch
from kbatch._text import counted, printable
from kbatch._transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from typing_extensions import Self

    from kbatch._fastmap import Envelope, Undelivered
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["BaseProducer", "check_kind", "check_mapping"]

_TIMEOUT_SCAN_S = 2.0  # librdkafka looks for messages whose time is over once a second; the rest is for the reports


class BaseProducer:
    """A producer, but for what waits: sending, flushing, closing."""

    _shown = "kbatch.Producer"
    _core_type = Core

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        wire: str | WireFormat = "kbatch",
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        close_timeout_s: float = 30.0,
        max_in_flight: int = 10_000,
        carry_scheduled_time: bool = False,
    ) -> None:
        try:
            _check_arguments(wire, encoder, source, header_hook, close_timeout_s, max_in_flight, carry_scheduled_time)
            parsed = ProducerConfig.parse(config)
        except BaseException as error:
            # A tool that prints local variables with a traceback must not find passwords in those of kbatch.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            del config
        self._parsed = parsed
        self._fingerprint = parsed.fingerprint
        self._mapper = Mapper(
            wire,
            msgspec.json.Encoder() if encoder is None else encoder,
            source,
            header_hook,
            parsed.message_max_bytes,
            parsed.queue_max_bytes,
            carry_scheduled_time=carry_scheduled_time,
        )
        self._carries_scheduled_time = carry_scheduled_time
        self._has_custom_wire = not isinstance(wire, str)
        self._close_timeout = close_timeout_s
        self._max_in_flight = max_in_flight
        self._assemble()

    def _assemble(self, undelivered: Undelivered | None = None) -> None:
        """Makes what a twin does not share."""
        parsed = self._parsed
        self._callback_thread = CallbackThread("kbatch-callbacks")
        transactions = CallbackThread("kbatch-transactions")
        self._core = self._core_type(
            parsed.native,
            self._mapper,
            make_dispatcher(parsed, self._callback_thread, lambda: core(), (transactions,)),
            max_in_flight=self._max_in_flight,
            queue_max_messages=parsed.queue_max_messages,
            queue_max_bytes=parsed.queue_max_bytes,
            delivery_timeout_s=parsed.delivery_timeout_s,
            on_start=watch_multiprocessing_child,
            undelivered=undelivered,
        )
        core = weakref.ref(self._core)
        self._transactions: Transactions | None = None
        if parsed.transaction_timeout_s is not None:
            self._transactions = Transactions(self._core, transactions, parsed.transaction_timeout_s)
        CORES.add(self._core)
        self._prepare()

    def _prepare(self) -> None:
        """What a kind of producer needs besides."""

    def _twin(self, *, solo: bool = False, transactional_id: str | None = None) -> Self:
        """A new producer with the same configuration and options, not started. What this one is doing stays its own.

        With `solo` each of its record batches has one record. With `transactional_id` it has this one.
        """
        # The configuration is librdkafka's object, which each start copies: Python has no password to give again.
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        if solo:
            twin._parsed = self._parsed.solo()
        if transactional_id is not None:
            twin._parsed = twin._parsed.with_transactional_id(transactional_id)
        twin._assemble(self._core.undelivered)  # what is given up by a twin is told where it would have been
        return twin

    def purge(self) -> None:
        """Gives up every message that is queued or in flight: its outcome is a failure.

        Does not wait for it: a batch sent before those failures have come may be given up as well.

        Raises:
            ProducerClosedError: The producer is closed, or closing.
        """
        self._core.purge()

    def stats(self) -> dict[str, int]:
        """Counters since the start.

        ``batches``, ``envelopes`` (mapped), ``acked``, ``failed``, ``in_flight``; ``map_ns``, the time spent in
        mapping; ``enqueue_ns``, the sum of the batches' times from when each was taken until all of it was enqueued,
        waits included; ``pooled_bytes``, memory kept for the next batches; ``pinned_buffers``, batches of this process
        whose memory librdkafka may still read or that was not given back yet.
        """
        return self._core.counters()

    def max_delivery_s(self) -> float:
        """The longest time in seconds that a batch can take, from the call that sends it to its last outcome.

        Its envelopes may wait for their turn as long as ``delivery.timeout.ms``; librdkafka, which begins to count when
        it takes one, then waits as long again, and looks at its time-outs once a second. A transaction's end comes on
        top. A `timeout` of the call bounds only the wait for the turn. A relay's lease of what it sends must be longer.
        The time to map the batch is not in it, nor that in which the process is stopped.
        """
        parsed = self._parsed
        end_s = 4 * parsed.transaction_timeout_s if parsed.transaction_timeout_s is not None else 0.0
        return 2 * parsed.delivery_timeout_s + _TIMEOUT_SCAN_S + end_s

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed()

    def __len__(self) -> int:
        """How many accepted messages have no outcome yet, those that wait for room in flight included."""
        return self._core.without_outcome()

    def __bool__(self) -> bool:
        # len() may be 0, and `if producer:` must not mean that.
        return True

    def __repr__(self) -> str:
        if not hasattr(self, "_core"):
            return f"<{self._shown} refused>"  # in a traceback of the constructor
        name = self._core.name()
        state = "closed" if self.closed else "not started" if name is None else f"{len(self)} without an outcome"
        return f"<{self._shown} {printable(name or '')}{' ' if name else ''}{state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "a Producer cannot be pickled: it owns threads and connections, and its config may hold secrets"
        )

    def _refuse_submit(self) -> None:
        if self._transactions is not None:
            raise ProducerError(
                "submit is not possible with transactional.id: a batch is one transaction, and a producer has one at a "
                "time; use send_batch, or a producer without transactional.id"
            )

    def _map(self, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> list[Any]:
        """What phase 1 makes of the envelopes; starts nothing."""
        batch = PendingBatch(self._core)
        self._core.map(batch, topic, envelopes)
        return self._core.records(batch)

    def _send_detached(
        self,
        batch: PendingBatch,
        timeout: float | None = None,
        *,
        waker: Callable[[], object] | None = None,
        enqueued: Callable[[], object] | None = None,
    ) -> None:
        """Sends what is mapped, from any thread: returns at once, and its answer will come.

        Raises as sending does; then there is no answer. `waker` is called at the end, unless this raises, on the thread
        that wakes every event loop, so it must not block. So is `enqueued`, once nothing more of the batch is handed to
        librdkafka; not in a transaction.
        """
        if self._transactions is None:
            self._core.send_detached(batch, timeout, waker=waker, enqueued=enqueued)
        else:
            self._transactions.send(batch, timeout, waker)

    def _check_delivered(self, error: BaseException | None) -> None:
        # At the end of a `with` block, whose own error comes first. Also if it was closed within the block: what was
        # lost is never lost silently.
        self._core.undelivered.raise_beside(error, reachable=True)
        left = self._core.without_outcome()
        if left:  # librdkafka did not give them back within the time
            text = f"{counted(left, 'message was', 'messages were')} still in flight when the producer was closed"
            if error is None:
                raise UndeliveredError(text, count=left)
            tell_beside(error, text)


def check_kind(producer: object, kind: type[BaseProducer]) -> None:
    """Raises TypeError for what is no producer of this kind."""
    if not isinstance(producer, kind):
        shown = producer._shown if isinstance(producer, BaseProducer) else type_name(producer)
        raise TypeError(f"producer must be a {kind._shown}, not {shown}")


def _check_call(name: str, function: Any, *arguments: str) -> None:
    fault = call_fault(function, *arguments)
    if fault is None and is_coroutine_function(function):
        fault = "must not be a coroutine function: mapping awaits nothing"
    if fault is not None:
        raise ConfigError(f"{name} {fault}")


def check_mapping(wire: Any, encoder: Any, source: Any, header_hook: Any) -> None:
    """Raises ConfigError for what envelopes cannot be mapped with."""
    if isinstance(wire, str):
        if wire not in WIRE_NAMES:
            raise ConfigError(f"wire must be one of {', '.join(WIRE_NAMES)} or an object with write(), not {wire!r}")
    elif not callable(getattr(wire, "write", None)):
        raise ConfigError(f"wire must be a name or an object with a write() method, not {type(wire).__name__}")
    else:
        _check_call("wire.write", wire.write, "envelope")
    if encoder is not None and not isinstance(encoder, (msgspec.json.Encoder, msgspec.msgpack.Encoder)):
        if not callable(encoder):
            raise ConfigError(f"encoder must be a msgspec encoder or callable, not {type(encoder).__name__}")
        if is_coroutine_function(encoder):
            raise ConfigError("encoder must not be a coroutine function: mapping awaits nothing")
        fault = encoder_fault(encoder)
        if fault is not None:
            raise ConfigError(f"encoder {fault}")
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"source must be str, not {type(source).__name__}")
    if header_hook is not None:
        _check_call("header_hook", header_hook)


def _check_arguments(
    wire: Any,
    encoder: Any,
    source: Any,
    header_hook: Any,
    close_timeout_s: Any,
    max_in_flight: Any,
    carry_scheduled_time: Any,
) -> None:
    check_mapping(wire, encoder, source, header_hook)
    check_close_timeout(close_timeout_s)
    check_whole("max_in_flight", max_in_flight)
    if not isinstance(carry_scheduled_time, bool):
        raise ConfigError(f"carry_scheduled_time must be bool, not {type(carry_scheduled_time).__name__}")
    if carry_scheduled_time and wire == "raw":
        raise ConfigError("carry_scheduled_time=True contradicts wire='raw', which has no place for it")
