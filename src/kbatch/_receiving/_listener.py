"""What hands the records of topics to a handler, on threads."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from kbatch._callbacks import is_coroutine_function, refuse_coroutine
from kbatch._errors import InboxError
from kbatch._fastmap import Flag, monotonic
from kbatch._receiving._base import COMMIT_INTERVAL_S, BaseListener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from kbatch._fastmap import ReceivedEnvelope
    from kbatch._inbox._base import ListenerInbox, ListenerSession
    from kbatch._producer import Producer
    from kbatch._receiving._lanes import Work
    from kbatch._receiving._reading import Reading
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["Listener"]


class Listener(BaseListener):
    """Reads topics as a member of a group, and calls a handler with each envelope, in order of keys.

    The offset of a record is committed when it and all before it in its partition were handled. After a crash, and
    when partitions change hands, records may be handled again: an inbox removes those copies. A record whose
    handler raises is tried again, then goes to other topics. Without those `run` raises the handler's exception, and
    the record is read again.

    `run` reads on the thread that calls it, and handlers run on threads of their own. So the group does not lose the
    member, however long a handler takes. When a partition is to be given to another member, what runs of it gets
    ``close_timeout_s`` to end, at most half of ``max.poll.interval.ms``.

    Args:
        config: librdkafka's configuration, with ``group.id``. ``auto.offset.reset`` is ``earliest`` by default, and
            ``partition.assignment.strategy`` ``cooperative-sticky``.
        topics: Their names; one that begins with ``^`` is a regular expression.
        handler: Called with each `ReceivedEnvelope`, on one of `concurrency` threads. Records of one key of a partition
            come one after the other, in order; those without a key in any order. With a `concurrency` of 1 all records
            of a partition come in order. It must not be a coroutine function: `kbatch.aio.Listener` takes those.
        types: By message type, what its data are decoded to by msgspec, from JSON, or from msgpack if the content type
            says so. What cannot be decoded is a `DeserializationError`, and is tried no more. A record that names no
            type has the type ``bytes``. Of other message types ``envelope.message`` is ``msgspec.UNSET``: the handler
            has ``envelope.data``.
        wire: The format of the records: one of the names that `Producer` takes, and no object.
        concurrency: How many calls of the handler run at a time.
        batch_size: The handler is called with a list of up to so many envelopes of one partition, in the order of the
            log. One batch of a partition is handled at a time, so keys are in order, and `concurrency` is how many
            partitions are. A batch is done as a whole, or fails as a whole; then each of its records is handled
            alone.
        batch_timeout_ms: How long the first record of a batch waits for others. By default a batch is what is there
            when a handler has time.
        max_in_flight, max_in_flight_bytes: How many records, and about how many bytes, are read and not handled yet. A
            partition that takes more than its share of them is not read further until half of its records are handled,
            so that the others flow.
        inbox: A `SqliteInbox` or `PostgresInbox`, or one of your own, a `kbatch.stores.ListenerInbox`. The handler is
            called with an envelope, or a list of them, and a connection: what it writes there is committed together
            with the mark that these ids were handled, and an envelope that the group has handled before is left out.
            The handler must not end the transaction. While the database does not answer, the listener waits for it.
        commit_interval_s: Seconds between two commits.
        close_timeout_s: Seconds that the end of `run` waits for handlers. What they still handle then is logged,
            counted as ``abandoned``, and read again.
        retry: How often a record whose handler raises is tried again at once. Later ones of its key wait meanwhile;
            with a `concurrency` of 1, the default, with `batch_size` and with `transactional_id` all later ones of its
            partition. By default three attempts within a second; a `RetryPolicy` that is given has its own defaults,
            with pauses of up to 10 seconds. It has no ``max_age_s``. ``docs/failures.md`` says what becomes of the
            record then.
        retry_topics: Seconds, such as ``[5, 60, 600]``. What has failed so often goes to the topic
            ``<group.id>.retry.5``, which the listener reads as well, is tried again once after 5 seconds, then goes to
            the next one.
        dead_letter_topic: Where a record goes that has failed everywhere. Without one the listener ends with the
            handler's error, and does not commit the record.
        on_dead: Called with the `ReceivedEnvelope` and the exception, once a broker has acknowledged its copy in the
            dead letter topic (of a transaction: has committed it), on a thread that senders share, one record after
            the other. What it raises is logged, and the listener does not wait for it: 1,000 records or 16 MiB wait
            for it at most, and the log tells how many more there were. A record that is read again after a crash may
            be told twice, as its copy may be there twice; after a crash, or the end of the process, what waited is not
            told. Only with a `dead_letter_topic`.
        reject_on: Exceptions after which a record goes to the dead letter topic at once, as it does when it cannot be
            read or decoded.
        producer: What sends to these topics. By default the listener makes one of its own configuration. With a
            `transactional_id` it must have that one; the listener does not use it, but a new one with its
            configuration and options in each run.
        transactional_id: The handler is called with an envelope, or a list of them, and a `Transaction`. What it sends
            by that, and the offsets of what it was given, are committed in one transaction of Kafka; so are copies that
            go to retry topics and the dead letter topic. Each process needs an id of its own, the same after a restart.
            Records of one partition come one after the other; `concurrency` is how many partitions are handled at a
            time. ``docs/listener.md`` says what is promised.

    Raises:
        ConfigError: A wrong option.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: Iterable[str],
        handler: Callable[..., object],
        *,
        types: Mapping[str, Any] | None = None,
        wire: str = "kbatch",
        concurrency: int = 1,
        batch_size: int | None = None,
        batch_timeout_ms: float = 0.0,
        max_in_flight: int = 2_000,
        max_in_flight_bytes: int = 64 * 1024 * 1024,
        inbox: ListenerInbox | None = None,
        commit_interval_s: float = COMMIT_INTERVAL_S,
        close_timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        retry_topics: Iterable[float] = (),
        dead_letter_topic: str | None = None,
        reject_on: Iterable[type[Exception]] = (),
        producer: Producer | None = None,
        transactional_id: str | None = None,
        on_dead: Callable[[ReceivedEnvelope[Any], Exception], object] | None = None,
    ) -> None:
        super().__init__(
            config,
            topics,
            handler,
            types=types,
            wire=wire,
            concurrency=concurrency,
            batch_size=batch_size,
            batch_timeout_ms=batch_timeout_ms,
            max_in_flight=max_in_flight,
            max_in_flight_bytes=max_in_flight_bytes,
            commit_interval_s=commit_interval_s,
            close_timeout_s=close_timeout_s,
            retry=retry,
            retry_topics=retry_topics,
            dead_letter_topic=dead_letter_topic,
            reject_on=reject_on,
            producer=producer,
            inbox=inbox,
            transactional_id=transactional_id,
            on_dead=on_dead,
        )
        self._of_thread = threading.local()  # of handlers: `session` and `reading`
        self._idle: list[Flag] = []  # of handlers' threads that wait; under the lock of the run

    @staticmethod
    def _handler_fault(handler: object) -> str | None:
        if is_coroutine_function(handler):
            return "must not be a coroutine function, which nothing awaits on a thread: kbatch.aio.Listener takes it"
        return None

    def run(self) -> None:
        """Reads and handles until `stop` is called. It may be called again after its end.

        Raises:
            Exception: What a handler has raised. Its record is not committed.
            DeserializationError: A record cannot be decoded, and there is no dead letter topic.
            DeliveryError: A retry topic, or the dead letter topic, will never take a copy.
            ListenerError: The group, or a topic, is refused, or another member with the same ``group.instance.id`` has
                taken its place.
            ConfigError: librdkafka refuses the configuration.
            ProducerClosedError: A record is to be sent on, and the `producer` that was given is closed.
            ProducerFencedError: Another with the same `transactional_id` has begun.
            ProducerFatalError: The producer of its transactions is refused, as one that may not have the id.
            InboxError: The inbox has no tables, or another version's; or a handler has ended its transaction.
            RuntimeError: It runs already, or there are no threads to be had.
        """
        self._check_inbox()
        claim = object()
        try:
            self._run(claim)
        finally:
            self._over(claim, is_last=True)  # Ctrl-C may have come before the run's own end, or in it

    def close(self) -> None:
        """Stops it, and waits until `run` has ended. Then it waits for calls of ``on_dead`` that are left, up to 2
        seconds, unless it is called by one.

        Raises:
            RuntimeError: It is called within `run` or by a handler, which call `stop`.
        """
        if self._runs_here() and (self._runner == threading.get_ident() or _is_handlers_thread()):
            raise RuntimeError("close waits for the end of run, so it must not be called within it; call stop")
        if self._runs_here():
            self.stop()
            self._wait_until_over(float("inf"))
        self._await_calls()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, claim: object) -> None:
        workers: list[threading.Thread] = []

        def prepare() -> None:
            for number in range(self._concurrency):
                worker = threading.Thread(
                    target=self._work, args=(reading,), name=f"kbatch-handler-{number}", daemon=True
                )
                worker.start()
                workers.append(worker)
            if self._keeper is not None:
                self._keeper.start()

        reading = self._begin(claim, self._wake)
        try:
            self._idle = []
            self._read(reading, prepare)
        finally:
            self._over(claim, is_last=False)
            end = monotonic() + (0.0 if reading.stats()["running"] else 1.0)
            for worker in workers:
                worker.join(max(0.0, end - monotonic()))
        if reading.error is not None:
            raise reading.error

    # -- handlers' threads

    def _wake(self, count: int) -> None:
        for _ in range(min(count, len(self._idle))):
            self._idle.pop().set()

    def _work(self, reading: Reading) -> None:
        flag = Flag()
        session = work = None
        try:
            if self._inbox is not None:
                session = self._inbox.open_session(self._parsed.group)
            self._of_thread.session, self._of_thread.reading = session, reading
            while not reading.is_over():
                work = reading.take(lambda: self._idle.append(flag))
                if work is None:
                    if not reading.is_over():
                        flag.wait(interruptible=False)
                    continue
                self._attempt(reading, work)
                work = None
        except BaseException as error:  # no memory, or transactions have ended
            if work is None:
                reading.end_with(error)
            else:
                reading.fail(work, error)
        finally:
            if session is not None:
                session.close()

    def _attempt(self, reading: Reading, work: Work) -> None:
        is_copied = work.copy is not None
        if not is_copied:
            try:
                self._handle(work)
            except BaseException as error:
                is_copied = self._fail(reading, work, error)
            else:
                self._failing.handled(reading, work)
        if is_copied:
            self._failing.send_on(reading, work)

    def _handle(self, work: Work) -> None:
        for envelope in work.handled:
            self._decode(envelope)
        handled = work.envelope if self._batch_size is None else list(work.handled)
        if self._transacting is not None:
            transaction = self._transacting.transaction()
            try:
                self._call(handled, transaction)
            finally:
                packed = transaction._end()
            self._transacting.commit(self._of_thread.reading, work, packed)
            return
        session: ListenerSession | None = self._of_thread.session
        if session is None:
            self._call(handled)
            return
        handle: Callable[..., object] = session.handle if self._batch_size is None else session.handle_batch
        wait_s = self._first_wait_s
        while True:
            try:
                handle(handled, self._call)
            except InboxError as error:
                if not error.is_outage or not self._waits(work, error, wait_s):
                    raise
                wait_s = min(2 * wait_s, self._longest_wait_s)
            else:
                return

    def _call(self, *handled: object) -> None:
        refuse_coroutine(self._handler(*handled))

    def _waits(self, work: Work, error: InboxError, wait_s: float) -> bool:
        """Waits for an inbox whose database does not answer; whether the work is still wanted then."""
        reading: Reading = self._of_thread.reading
        self._tell_of_outage(error)
        end = monotonic() + wait_s
        while monotonic() < end:
            if reading.is_given_up(work):
                return False
            time.sleep(self._look_s)
        return True


def _is_handlers_thread() -> bool:
    return threading.current_thread().name.startswith("kbatch-handler-")
