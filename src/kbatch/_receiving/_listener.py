"""What hands the records of topics to a handler."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kbatch._checks import check_close_timeout, is_number, is_whole
from kbatch._errors import ConfigError, DeserializationError, type_name
from kbatch._events import make_dispatcher
from kbatch._exit import CORES, watch_multiprocessing_child
from kbatch._fastmap import WIRE_NAMES, CallbackThread, monotonic, wall_time
from kbatch._receiving._config import ConsumerConfig
from kbatch._receiving._consumer import ConsumerCore
from kbatch._receiving._copies import Copies
from kbatch._receiving._delayed import Delayed
from kbatch._receiving._failing import Failing
from kbatch._receiving._failures import Failures
from kbatch._receiving._lanes import Lanes, Work
from kbatch._receiving._positions import Positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kbatch._fastmap import ReceivedEnvelope
    from kbatch._producer import Producer
    from kbatch._receiving._positions import Partition
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["Listener"]

_logger = logging.getLogger("kbatch")

_POLL_S = 0.05  # after so long without a record the group is asked what is new
_READ_AGAIN_S = 1.0
_COMMIT_TIMEOUT_S = 5.0


class _Steps(NamedTuple):
    done: Callable[[Work], None]
    fail: Callable[[Work, BaseException], None]
    put_off: Callable[[Work, float], None]


class Listener:
    """Reads topics as a member of a group, and calls a handler with each envelope, in order of keys.

    The offset of a record is committed when it and all before it in its partition were handled. After a crash records
    may be handled again: an inbox removes those copies.

    Args:
        config: librdkafka's configuration, with ``group.id``. ``auto.offset.reset`` is ``earliest`` by default, and
            ``partition.assignment.strategy`` ``cooperative-sticky``.
        topics: Their names; one that begins with ``^`` is a regular expression.
        handler: Called with each `ReceivedEnvelope`, on one of `concurrency` threads. Records of one key of a partition
            come one after the other, in order; those without a key in any order, unless `concurrency` is 1.
        types: By message type, what its data are decoded to by msgspec.
        wire: The format of the records, as for `Producer`.
        concurrency: How many records are handled at a time.
        max_in_flight: How many records are taken from librdkafka and not handled yet.
        commit_interval_s: Seconds between two commits.
        close_timeout_s: Seconds that the end of `run` waits for handlers.
        retry: How often a record whose handler raises is tried again at once, while later ones of its key wait; by
            default three attempts within a second. What happens then says `docs/failures.md`.
        retry_topics: Seconds, such as ``[5, 60, 600]``. What has failed so often goes to the topic
            ``<group.id>.retry.5``, which the listener reads as well, is tried again once after 5 seconds, then goes to
            the next one.
        dead_letter_topic: Where a record goes that has failed everywhere. Without one the listener ends with the
            handler's error, and does not commit the record.
        reject_on: Exceptions after which a record goes to the dead letter topic at once, as it does when it cannot be
            read or decoded.
        producer: What sends to these topics. By default the listener makes one of its own configuration.

    Raises:
        ConfigError: A wrong option.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: Iterable[str],
        handler: Callable[..., object],
        *,
        types: Mapping[str, type] | None = None,
        wire: str = "kbatch",
        concurrency: int = 1,
        max_in_flight: int = 1_000,
        commit_interval_s: float = 1.0,
        close_timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        retry_topics: Iterable[float] = (),
        dead_letter_topic: str | None = None,
        reject_on: Iterable[type[Exception]] = (),
        producer: Producer | None = None,
    ) -> None:
        if isinstance(topics, str) or not (names := list(topics)) or not all(isinstance(name, str) for name in names):
            raise ConfigError("topics must be a list of names, with one at least")
        if not callable(handler):
            raise ConfigError(f"handler must be callable, not {type_name(handler)}")
        if wire not in WIRE_NAMES:
            raise ConfigError(f"wire must be one of {', '.join(WIRE_NAMES)}, not {wire!r}")
        for name, value in (("concurrency", concurrency), ("max_in_flight", max_in_flight)):
            if not (is_whole(value) and 1 <= value <= 100_000):
                raise ConfigError(f"{name} must be an int from 1 to 100,000, not {value!r}")
        if not (is_number(commit_interval_s) and 0 < commit_interval_s < 1e6):
            raise ConfigError(f"commit_interval_s must be seconds above 0, not {commit_interval_s!r}")
        check_close_timeout(close_timeout_s)
        parsed = ConsumerConfig.parse(config)
        self._failures = Failures(parsed.group, names, wire, retry, retry_topics, dead_letter_topic, reject_on)
        self._copies = Copies(config, producer) if self._failures.sends else None
        self._failing = Failing(self._failures, self._copies)
        self._steps = _Steps(self._done, self._end_with, self._put_off)
        self._topics = names
        self._handler = handler
        self._decoders: dict[str | None, msgspec.json.Decoder[Any]] = {
            name: msgspec.json.Decoder(type_) for name, type_ in (types or {}).items()
        }
        self._concurrency = concurrency
        self._max_in_flight = max_in_flight
        self._commit_interval_s = commit_interval_s
        self._close_timeout_s = close_timeout_s
        self._max_wait_s = parsed.max_poll_interval_s / 2
        self._callback_thread = CallbackThread("kbatch-callbacks")
        self._core = ConsumerCore(
            parsed.native,
            make_dispatcher(parsed, self._callback_thread, lambda: self._core),
            wire,
            on_start=watch_multiprocessing_child,
        )
        CORES.add(self._core)
        # Under the lock of `_changed`, all below.
        self._changed = threading.Condition()
        self._lanes = Lanes()
        self._positions = Positions()
        self._delayed = Delayed()  # the polling thread's
        self._running: Counter[Partition] = Counter()
        self._leaving: set[Partition] = set()  # nothing of them is begun any more
        self._in_flight = 0
        self._stopping = False
        self._workers_end = False
        self._error: BaseException | None = None
        self._handled = 0

    # -- for any thread

    def stop(self) -> None:
        """Lets `run` end when the handlers that run are done. For any thread, and for a signal handler."""
        self._stopping = True

    def stats(self) -> dict[str, int]:
        """Counters since the start.

        ``handled``, records that are done, those that were sent on among them; ``attempts_failed``, times that a
        handler raised, and that a record could not be read; ``to_retry`` and ``dead``, records that were stored in a
        retry topic and in the dead letter topic; ``in_flight``, records that were read and are not done.
        """
        with self._changed:
            return {"handled": self._handled, "in_flight": self._in_flight, **self._failing.stats()}

    # -- the thread that polls

    def run(self) -> None:
        """Reads and handles until `stop` is called.

        Raises:
            Exception: What a handler has raised. Its record is not committed.
        """
        workers = [
            threading.Thread(target=self._work, name=f"kbatch-handler-{n}", daemon=True)
            for n in range(self._concurrency)
        ]
        for worker in workers:
            worker.start()
        try:
            self._core.subscribe([*self._topics, *self._failures.delays])
            self._poll()
        finally:
            self._stopping = True
            self._end(workers)
        if self._error is not None:
            raise self._error

    def _poll(self) -> None:
        next_commit = monotonic() + self._commit_interval_s
        next_read = monotonic() + _READ_AGAIN_S
        while not self._stopping:
            room = self._max_in_flight - self._in_flight
            if room <= 0:
                with self._changed:
                    self._changed.wait_for(lambda: self._in_flight < self._max_in_flight, _POLL_S)
                room = max(0, self._max_in_flight - self._in_flight)
            self._look(room, _POLL_S)
            now = monotonic()
            self._accept_due(now)
            if now >= next_commit:
                next_commit = now + self._commit_interval_s
                with self._changed:
                    offsets = self._positions.collect()
                self._core.commit(offsets)
            if now >= next_read:
                next_read = now + _READ_AGAIN_S
                self._core.read([each for each in self._positions.partitions() if each not in self._delayed])

    def _look(self, most: int, timeout: float) -> None:
        envelopes, errors = self._core.poll(most, timeout)
        if envelopes:
            self._accept(envelopes)
        for code, text, topic, partition, _ in errors:
            _logger.warning(
                "the consumer of %s: %s (%s, %s, %s)", ", ".join(self._topics), text, code, topic, partition
            )
        change = self._core.rebalance()
        if change is not None:
            self._rebalance(*change)

    def _accept(self, envelopes: list[ReceivedEnvelope]) -> None:
        if self._failures.delays:
            envelopes = [envelope for envelope in envelopes if not self._puts_off(envelope)]
        self._begin(envelopes)

    def _puts_off(self, envelope: ReceivedEnvelope) -> bool:
        partition = (envelope.topic, envelope.partition)
        left_s = self._failures.due_in_s(envelope, wall_time())
        if not left_s and partition not in self._delayed:
            return False
        if self._delayed.add(partition, envelope, monotonic() + left_s):
            self._core.read([partition], False)
        return True

    def _accept_due(self, now: float) -> None:
        due = self._delayed.take_due(now, max(0, self._max_in_flight - self._in_flight))
        if due:
            self._begin(due)
            self._core.read(self._delayed.take_empty())

    def _begin(self, envelopes: list[ReceivedEnvelope]) -> None:
        with self._changed:
            for envelope in envelopes:
                partition = (envelope.topic, envelope.partition)
                position = self._positions.begin(partition, envelope.offset)
                if position is None:
                    continue
                self._in_flight += 1
                lane = (*partition, envelope.key) if envelope.key is not None or self._concurrency == 1 else None
                self._lanes.add(Work(envelope, lane, position))
            self._changed.notify_all()

    def _rebalance(self, gives: bool, partitions: list[Partition]) -> None:
        if gives:
            with self._changed:
                self._positions.give(partitions)
            self._core.answer()
            return
        is_lost = self._core.assignment_lost()
        with self._changed:
            if not is_lost:
                # Nothing of them begins any more; what runs may end, and is committed with the rest.
                self._leaving.update(partitions)
                self._changed.wait_for(
                    lambda: not any(self._running[partition] for partition in partitions),
                    min(self._close_timeout_s, self._max_wait_s),
                )
                self._leaving.clear()
            offsets = self._positions.collect(partitions)
            self._positions.take(partitions)
        self._delayed.forget(partitions)
        if not is_lost:
            self._core.commit(offsets, _COMMIT_TIMEOUT_S)
        self._core.answer()

    def _end(self, workers: list[threading.Thread]) -> None:
        deadline = monotonic() + self._close_timeout_s
        while monotonic() < deadline:
            with self._changed:
                self._changed.notify_all()
                if not sum(self._running.values()):
                    break
                self._changed.wait(_POLL_S)
            self._look(0, 0.0)
        with self._changed:
            self._workers_end = True
            self._changed.notify_all()
            offsets = self._positions.collect()
        self._core.commit(offsets, max(1.0, deadline - monotonic()))
        self._core.close(max(1.0, deadline - monotonic()))
        if self._copies is not None:
            self._copies.close(max(1.0, deadline - monotonic()))
        for worker in workers:
            worker.join(max(0.0, deadline - monotonic()))

    # -- handlers' threads

    def _work(self) -> None:
        while (work := self._next()) is not None:
            self._attempt(work)

    def _attempt(self, work: Work) -> None:
        if not self._failing.goes_on(self._steps, work):
            return
        try:
            self._handle(work.envelope)
        except BaseException as error:
            self._fail(work, error)
        else:
            self._failing.handled(self._steps, work)

    def _next(self) -> Work | None:
        with self._changed:
            while True:
                if self._workers_end:
                    return None
                now = monotonic()
                work = None if self._stopping else self._lanes.take(now)
                if work is None:
                    due = self._lanes.next_due()
                    self._changed.wait(None if due is None or self._stopping else max(0.0, due - now))
                    continue
                partition = (work.envelope.topic, work.envelope.partition)
                if partition in self._leaving or not self._positions.holds(partition, work.position):
                    self._forget(work)
                    continue
                self._running[partition] += 1
                return work

    def _handle(self, envelope: ReceivedEnvelope) -> None:
        self._decode(envelope)
        self._handler(envelope)

    def _decode(self, envelope: ReceivedEnvelope) -> None:
        if envelope.error is not None:
            raise envelope.error
        decoder = self._decoders.get(envelope.message_type)
        if decoder is not None and envelope.data is not None:
            try:
                envelope.decode(decoder.decode)
            except (msgspec.MsgspecError, RecursionError) as error:
                raise DeserializationError(
                    f"its data are no {envelope.message_type}: {error}",
                    topic=envelope.topic,
                    partition=envelope.partition,
                    offset=envelope.offset,
                    header=None,
                ) from error

    def _fail(self, work: Work, error: BaseException) -> None:
        self._failing.failed(self._steps, work, error)

    def _done(self, work: Work) -> None:
        with self._changed:
            self._positions.end(work.position, work.envelope.offset)
            self._handled += 1
            self._leave(work)

    def _put_off(self, work: Work, due: float) -> None:
        with self._changed:
            self._running[work.envelope.topic, work.envelope.partition] -= 1
            self._lanes.put_off(work, due)
            self._changed.notify_all()

    def _end_with(self, work: Work, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._stopping = True
            self._leave(work)

    def _leave(self, work: Work) -> None:
        self._running[work.envelope.topic, work.envelope.partition] -= 1
        self._forget(work)

    def _forget(self, work: Work) -> None:
        self._in_flight -= 1
        if self._lanes.end(work) or self._in_flight < self._max_in_flight:
            self._changed.notify_all()
