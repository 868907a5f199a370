"""The producer: batches in, one answer per batch out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._base_producer import BaseProducer
from kbatch._callbacks import ReportCallback, check_callback
from kbatch._checks import check_timeout
from kbatch._fastmap import monotonic
from kbatch._pending import PendingBatch, no_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import Envelope
    from kbatch._report import DeliveryReport

__all__ = ["Producer"]


class Producer(BaseProducer):
    """Sends batches of envelopes to Kafka. Any number of threads may use one producer.

    librdkafka starts at the first use, not here: a producer made before a fork and not used yet works in the child.

    Args:
        config: The dict that confluent-kafka's ``Producer`` takes: librdkafka's keys, and ``error_cb``, ``stats_cb``,
            ``throttle_cb``, ``oauth_cb`` and ``logger``. Defaults that differ from librdkafka's: ``acks=all``,
            ``enable.idempotence=true``, ``linger.ms=0``. The callbacks run on a thread of the producer; what one of
            them raises is logged under ``kbatch``, and nothing else comes of it.
        wire: How envelopes become Kafka messages: ``"kbatch"``, ``"wolverine"``, ``"cloudevents"``, ``"raw"``, or an
            object with ``write(envelope) -> (key, value, headers)``.
        encoder: A msgspec encoder (JSON by default), or a callable ``(message, SerializationContext) -> bytes``, such
            as confluent-kafka's Avro, Protobuf and JSON Schema serializers. Those of aiokafka and kafka-python take
            one argument: write ``lambda message, context: serialize(message)``.
        source: The ``source`` of envelopes that have none. CloudEvents needs one.
        header_hook: Called once per batch, when it is mapped; returns headers that are added to each of its envelopes.
            ``send_batch`` and ``submit`` call it in the caller's thread and context, a buffered sender on its own
            thread, where context variables are not set.
        close_timeout_s: Seconds that leaving a ``with`` block waits for what is in flight.
        max_in_flight: How many messages of one topic may be in flight before ``submit`` waits. All topics together may
            have a quarter more, and each topic always a few (128 at most), so that one that is stuck does not stop the
            others.
        carry_scheduled_time: An envelope whose ``scheduled_time`` is in the future is sent at once and carries it, for
            a reader that waits until then. Without it such an envelope is refused with `NotYetDueError`.

    Raises:
        ConfigError: An unknown key, a bad value, a contradiction, a missing ``bootstrap.servers``; an encoder, a hook
            or a callback that cannot be called with what it gets.
    """

    # -- sending

    def send_batch(
        self, topic: str | None, envelopes: Iterable[Envelope[Any]], *, timeout: float | None = None
    ) -> DeliveryReport:
        """Sends a batch and blocks until each of its envelopes has an outcome.

        The GIL is released while it waits, and Ctrl-C works. With a ``transactional.id`` the batch is one transaction:
        readers with ``isolation.level=read_committed`` see all of it or nothing. If one of its envelopes fails, so do
        all.

        Args:
            topic: Where envelopes without a topic of their own go; ``None`` if each has one.
            envelopes: Any iterable; it is read once, before anything is sent.
            timeout: Seconds to wait; ``None`` waits until all is settled, at most `max_delivery_s`.

        Returns:
            The outcome of each envelope. It is true if none failed; `DeliveryReport.raise_for_errors` raises.

        Raises:
            SerializationError: An envelope could not be mapped. Nothing was sent.
            NotYetDueError: The ``scheduled_time`` of an envelope is in the future. Nothing was sent.
            BatchPendingError: `timeout` has passed. The error carries the batch, which goes on; what was not yet handed
                to librdkafka is settled as failed.
            ProducerClosedError, ProducerFatalError, TransactionUnknownError, ForkError: The producer cannot send.
                Nothing was sent.
            ConfigError: librdkafka refuses the configuration, which shows at the first use.
        """
        check_timeout(timeout)
        batch = PendingBatch(self._core)
        end = None if timeout is None else monotonic() + timeout
        self._core.map(batch, topic, envelopes)
        if not self._send(batch, None if end is None else end - monotonic()):
            raise no_answer(batch, timeout)
        return batch.report

    def submit(
        self,
        topic: str | None,
        envelopes: Iterable[Envelope[Any]],
        *,
        callback: Callable[[DeliveryReport], object] | None = None,
    ) -> PendingBatch:
        """Hands a batch to librdkafka and returns without waiting for the broker.

        It waits while ``max_in_flight`` messages of the topic are in flight or librdkafka's queue is full. Batches of
        one thread keep their order. A long batch may be interleaved with one of another thread.

        Args:
            topic, envelopes: As in `send_batch`.
            callback: Called once with the report, on the producer's callback thread. An exception from it is logged.
                No coroutine function: `kbatch.aio` takes those.

        Raises:
            SerializationError, NotYetDueError, ProducerClosedError, ProducerFatalError, ForkError, ConfigError: As of
                `send_batch`. Nothing was sent, and `callback` is not called.
            ProducerError: The producer has a ``transactional.id``.
            TypeError: `callback` cannot be called with one argument, is a coroutine function, or asyncio's own, such as
                ``asyncio.Queue().put_nowait``, which wakes nobody when a thread calls it. Nothing was sent.
        """
        self._refuse_submit()
        if callback is not None:
            check_callback("callback", callback, "report")
        batch = PendingBatch(self._core)
        self._core.map(batch, topic, envelopes)
        self._core.send(batch, wait=False, callback=None if callback is None else ReportCallback(callback))
        return batch

    def _send(self, batch: PendingBatch, timeout: float | None = None) -> bool:
        """Sends what is mapped and waits for its answer; false after `timeout` seconds."""
        if self._transactions is None:
            return self._core.send(batch, timeout, wait=True)
        self._transactions.send(batch, timeout)
        try:
            return batch._wait(timeout)
        except BaseException:
            self._core.abandon(batch)
            raise

    # -- the producer as a whole

    def flush(self, timeout: float | None = None) -> int:
        """Waits until each accepted message has its outcome, without waiting for ``linger.ms``.

        A batch is accepted when its mapping is over and it stands in line; with `kbatch.aio`, when it was sent by a
        call of `send_batch` or `submit`.

        Args:
            timeout: Seconds; ``None`` waits as long as it takes.

        Returns:
            How many messages still have no outcome, or are in a transaction that is not decided.

        Raises:
            UndeliveredError: Messages were not acknowledged, and nobody looked at their `PendingBatch` or keeps it. Of
                one that somebody keeps `close` tells.
            ProducerClosedError: The producer is closed, or closing: `close` flushes it.
        """
        check_timeout(timeout)
        left = self._core.flush(timeout)
        self._core.undelivered.raise_all()
        return left

    def close(self, timeout: float | None = None) -> int:
        """Refuses new batches, sends what was accepted, gives up what is left at the deadline, ends librdkafka.

        Every batch has its answer, and its callbacks have run, when it returns; a callback that does not end within
        the deadline is left behind. May be called again, from any thread and from a callback: then it does not wait for
        callbacks, nor does it in a task or thread to which the callback's context was copied.

        Args:
            timeout: Seconds; ``None`` is the producer's ``close_timeout_s``.

        Returns:
            How many messages ended without an acknowledgement since closing began.

        Raises:
            UndeliveredError: Messages were not acknowledged, and nobody looked at their `PendingBatch`.
        """
        left = self._close(timeout)
        self._core.undelivered.raise_all(reachable=True)
        return left

    def _close(self, timeout: float | None) -> int:
        check_timeout(timeout)
        return self._core.close(self._close_timeout if timeout is None else timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(None)
        self._check_delivered(error)
