"""The producer: batches in, one answer per batch out."""

from __future__ import annotations

import atexit
import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._callbacks import CallbackThread
from kbatch._config import ProducerConfig
from kbatch._errors import BatchPending, ConfigError, UndeliveredError
from kbatch._fastmap import Core, Dispatcher, Mapper
from kbatch._pending import PendingBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from kbatch._fastmap import Envelope
    from kbatch._report import DeliveryReport
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["Producer"]

_WIRES = ("kbatch", "wolverine", "raw")
_EXIT_TIMEOUT_S = 5.0
# Cores, not producers: a batch in flight keeps its core alive when its producer is forgotten.
_cores: weakref.WeakSet[Core] = weakref.WeakSet()


class Producer:
    """Sends batches of envelopes to Kafka. Any number of threads may use one producer.

    librdkafka starts at the first use, not here: a producer made before a fork and not used yet works in the child.

    Args:
        config: The dict that confluent-kafka's ``Producer`` takes: librdkafka's keys, and ``error_cb``, ``stats_cb``,
            ``throttle_cb``, ``oauth_cb`` and ``logger``. Defaults that differ from librdkafka's: ``acks=all``,
            ``enable.idempotence=true``, ``linger.ms=0``.
        wire: How envelopes become Kafka messages: ``"kbatch"``, ``"wolverine"``, ``"raw"``, or an object with
            ``write(envelope) -> (key, value, headers)``.
        encoder: A msgspec encoder (JSON by default), or a callable ``(message, SerializationContext) -> bytes``.
        source: The ``source`` of envelopes that have none.
        header_hook: Called once per batch; returns headers that are added to each of its envelopes.
        close_timeout: Seconds that leaving a ``with`` block waits for what is in flight.
        max_in_flight: How many messages may be in flight before ``submit`` waits.

    Raises:
        ConfigError: An unknown key, a bad value, a contradiction, a missing ``bootstrap.servers``.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        wire: str | WireFormat = "kbatch",
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        close_timeout: float = 30.0,
        max_in_flight: int = 20_000,
    ) -> None:
        _check_arguments(wire, encoder, source, header_hook, close_timeout, max_in_flight)
        parsed = ProducerConfig.parse(config)
        self._close_timeout = close_timeout
        self._callback_thread = CallbackThread("kbatch-callbacks")
        self._core = Core(
            parsed.native,
            Mapper(
                wire,
                msgspec.json.Encoder() if encoder is None else encoder,
                source,
                header_hook,
                parsed.message_max_bytes,
                parsed.queue_max_bytes,
            ),
            _make_dispatcher(parsed, self._callback_thread, lambda: core()),
            max_in_flight=max_in_flight,
            delivery_timeout_s=parsed.delivery_timeout_s,
        )
        core = weakref.ref(self._core)
        _cores.add(self._core)

    # -- sending

    def send_batch(
        self, topic: str | None, envelopes: Iterable[Envelope[Any]], *, timeout: float | None = None
    ) -> DeliveryReport:
        """Sends a batch and blocks until each of its envelopes has an outcome.

        The GIL is released while it waits, and Ctrl-C works.

        Args:
            topic: Where envelopes without a topic of their own go; ``None`` if each has one.
            envelopes: Any iterable; it is read once, before anything is sent.
            timeout: Seconds to wait; ``None`` waits until all is settled, which ``delivery.timeout.ms`` bounds.

        Returns:
            The outcome of each envelope. It is true if none failed; `DeliveryReport.raise_for_errors` raises.

        Raises:
            SerializationError: An envelope could not be mapped. Nothing was sent.
            BatchPending: `timeout` has passed. The error carries the batch, which goes on; what was not yet handed
                to librdkafka is settled as failed.
            ProducerClosedError, ProducerFatalError, ForkError: The producer cannot send. Nothing was sent.
        """
        batch = PendingBatch(self._core)
        end = None if timeout is None else time.monotonic() + timeout
        self._core.map(batch, topic, envelopes)
        if not self._core.send(batch, None if end is None else end - time.monotonic(), wait=True):
            raise BatchPending(f"no answer for a batch of {len(batch)} envelopes within {timeout} s; it goes on", batch)
        return batch.report

    def submit(
        self,
        topic: str | None,
        envelopes: Iterable[Envelope[Any]],
        *,
        callback: Callable[[DeliveryReport], object] | None = None,
    ) -> PendingBatch:
        """Hands a batch to librdkafka and returns without waiting for the broker.

        It waits while ``max_in_flight`` messages are in flight or librdkafka's queue is full.

        Args:
            topic, envelopes: As in `send_batch`.
            callback: Called once with the report, on the producer's callback thread. An exception from it is logged.

        Raises:
            SerializationError, ProducerClosedError, ProducerFatalError, ForkError: Nothing was sent, and `callback`
                is not called.
        """
        batch = PendingBatch(self._core)
        self._core.map(batch, topic, envelopes)
        self._core.send(batch, wait=False, callback=None if callback is None else (lambda done: callback(done.report)))
        return batch

    # -- the producer as a whole

    def flush(self, timeout: float | None = None) -> int:
        """Waits until nothing is in flight, without waiting for ``linger.ms``.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes.

        Returns:
            How many messages are still in flight.
        """
        return self._core.flush(timeout)

    def purge(self) -> None:
        """Gives up every message that is queued or in flight: its outcome is a failure. Does not wait for it."""
        self._core.purge()

    def close(self, timeout: float | None = None) -> int:
        """Refuses new batches, sends what is in flight, gives up what is left at the deadline, ends librdkafka.

        Every batch has its answer, and its callbacks have run, when it returns; a callback that does not end within
        the deadline is left behind. May be called again, from any thread and from a callback.

        Args:
            timeout: Seconds; ``None`` is the producer's ``close_timeout``.

        Returns:
            How many messages ended without an acknowledgement since closing began.
        """
        return self._core.close(self._close_timeout if timeout is None else timeout)

    def stats(self) -> dict[str, int]:
        """Counters since the start.

        ``batches``, ``envelopes`` (mapped), ``acked``, ``failed``, ``in_flight``; ``map_ns`` and ``enqueue_ns``, the
        time spent in the two phases; ``pooled_bytes``, memory kept for the next batches; ``pinned_buffers``, batches
        of this process whose memory librdkafka may still read or that was not given back yet.
        """
        return self._core.counters()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed()

    def __len__(self) -> int:
        """How many messages are queued or in flight."""
        return self._core.in_flight()

    def __bool__(self) -> bool:
        # len() may be 0, and `if producer:` must not mean that.
        return True

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        left = self.close()
        if left and error is None:
            raise UndeliveredError(
                f"{left} messages were not acknowledged when the producer was closed, within {self._close_timeout} s",
                count=left,
            )

    def __repr__(self) -> str:
        name = self._core.name()
        state = "closed" if self.closed else "not started" if name is None else f"{len(self)} in flight"
        return f"<kbatch.Producer {name or ''}{' ' if name else ''}{state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "a Producer cannot be pickled: it owns threads and connections, and its config may hold secrets"
        )

    def _map(self, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> list[Any]:
        """What phase 1 makes of the envelopes, for tests; starts nothing."""
        batch = PendingBatch(self._core)
        self._core.map(batch, topic, envelopes)
        return self._core.records(batch)


def _check_arguments(
    wire: Any, encoder: Any, source: Any, header_hook: Any, close_timeout: Any, max_in_flight: Any
) -> None:
    if isinstance(wire, str):
        if wire not in _WIRES:
            raise ConfigError(f"wire must be one of {', '.join(_WIRES)} or an object with write(), not {wire!r}")
    elif not callable(getattr(wire, "write", None)):
        raise ConfigError(f"wire must be a name or an object with a write() method, not {type(wire).__name__}")
    if (
        encoder is not None
        and not isinstance(encoder, (msgspec.json.Encoder, msgspec.msgpack.Encoder))
        and not callable(encoder)
    ):
        raise ConfigError(f"encoder must be a msgspec encoder or callable, not {type(encoder).__name__}")
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"source must be str, not {type(source).__name__}")
    if header_hook is not None and not callable(header_hook):
        raise ConfigError(f"header_hook must be callable, not {type(header_hook).__name__}")
    if isinstance(close_timeout, bool) or not isinstance(close_timeout, (int, float)) or not close_timeout >= 0:
        raise ConfigError(f"close_timeout must be seconds, 0 or more, not {close_timeout!r}")
    if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int) or max_in_flight < 1:
        raise ConfigError(f"max_in_flight must be an int of at least 1, not {max_in_flight!r}")


def _make_dispatcher(
    config: ProducerConfig, callbacks: CallbackThread, find_core: Callable[[], Core | None]
) -> Dispatcher:
    """Turns librdkafka's events into calls of the user's callbacks, which have confluent-kafka's signatures."""
    on_error = on_stats = on_log = on_oauth = on_throttle = None
    others: tuple[CallbackThread, ...] = ()
    if config.error_cb is not None:
        error_cb = config.error_cb

        def on_error(code: int, reason: str, fatal: bool) -> None:
            from confluent_kafka import KafkaError

            callbacks.put(error_cb, KafkaError(code, reason, fatal=fatal))

    if config.stats_cb is not None:
        stats_cb = config.stats_cb

        def on_stats(json: str) -> None:
            callbacks.put(stats_cb, json)

    if config.throttle_cb is not None:
        throttle_cb = config.throttle_cb

        def on_throttle(broker: str, broker_id: int, throttle_ms: int) -> None:
            from confluent_kafka import ThrottleEvent

            callbacks.put(throttle_cb, ThrottleEvent(broker, broker_id, throttle_ms / 1000))

    if config.logger is not None:
        logger = config.logger

        def on_log(level: int, facility: str, text: str) -> None:
            callbacks.put(logger.log, _LEVELS[level], "%s %s", facility, text)

    if config.oauth_cb is not None:
        oauth_cb = config.oauth_cb
        refresher = CallbackThread("kbatch-oauth")  # its own: a token must not wait behind other callbacks
        others = (refresher,)

        def on_oauth(oauth_config: str) -> None:
            refresher.put(_refresh_token, oauth_cb, oauth_config, find_core)

    return Dispatcher(
        callbacks,
        others,
        on_error=on_error,
        on_stats=on_stats,
        on_log=on_log,
        on_oauth=on_oauth,
        throttle_cb=on_throttle,
    )


# syslog's levels as Python's
_LEVELS = (50, 50, 50, 40, 30, 20, 20, 10)


def _refresh_token(oauth_cb: Callable[[str], Any], config: str, find_core: Callable[[], Core | None]) -> None:
    core = find_core()
    if core is None:
        return
    try:
        # (token, expiry in seconds since 1970, [principal, [extensions]]), as in confluent-kafka
        token, lifetime, *rest = oauth_cb(config)
        principal = rest[0] if rest else ""
        extensions = rest[1] if len(rest) > 1 else {}
        core.set_oauth_token(token, lifetime, principal, extensions)
    except Exception as error:
        core.set_oauth_failure(f"oauth_cb failed: {type(error).__name__}")
        raise


@atexit.register
def _close_all() -> None:
    end = time.monotonic() + _EXIT_TIMEOUT_S  # for all of them: what is in flight goes on while another is closed
    for core in list(_cores):
        with contextlib.suppress(Exception):  # the interpreter is ending; there is nobody to tell
            core.close(max(0.0, end - time.monotonic()))
