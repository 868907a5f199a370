"""What a listener for threads and one for asyncio have in common."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._callbacks import call_fault
from kbatch._checks import check_close_timeout, check_methods, is_number, is_whole
from kbatch._errors import ConfigError, DeserializationError, InboxError, exception_text, type_name
from kbatch._events import make_dispatcher
from kbatch._exit import CORES, SENDERS, watch_multiprocessing_child
from kbatch._fastmap import WIRE_NAMES, CallbackThread, monotonic
from kbatch._inbox._keeper import Keeper
from kbatch._logs import tell
from kbatch._options import check_option
from kbatch._receiving._config import ConsumerConfig
from kbatch._receiving._consumer import ConsumerCore
from kbatch._receiving._copies import Copies
from kbatch._receiving._failing import Failing, OvertakenError
from kbatch._receiving._failures import Failures
from kbatch._receiving._lanes import BatchLanes, Lanes
from kbatch._receiving._reading import Limits, Reading
from kbatch._receiving._transacting import CannotCommitError, Transacting
from kbatch._recovery._deaths import Deaths
from kbatch._recovery._user_calls import UserCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from kbatch._fastmap import ReceivedEnvelope
    from kbatch._inbox._base import ListenerInbox
    from kbatch._producer import Producer
    from kbatch._receiving._failing import Dead, TakenFrom
    from kbatch._receiving._lanes import Work
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["BaseListener"]

COMMIT_INTERVAL_S = 1.0

_REMIND_EVERY_S = 60.0
_LOOK_WHETHER_OVER_S = 0.02
_LAST_WORDS_S = 2.0  # for calls of on_dead
_MOST_DEATHS = 1_000  # that wait for on_dead; a traceback may hold much
_CLOSE_COPIES_S = 1.0  # what is not answered then is not committed
_COUNTS = ("handled", "failed", "in_flight", "in_flight_bytes", "running", "partitions", "full_partitions")


class BaseListener:
    """The options of a listener, checked as a whole, and its run. Whatever changes while it runs is the run's."""

    _name = "kbatch.Listener"
    _calls_class: type[UserCalls] = UserCalls
    _takes_coroutines_instead: str | None = "kbatch.aio.Listener takes them"
    _first_wait_s, _longest_wait_s = 0.2, 5.0  # for an inbox whose database is away
    _look_s = 0.02  # whether what waits is still wanted

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: Iterable[str],
        handler: Callable[..., object],
        *,
        types: Mapping[str, Any] | None,
        wire: str,
        concurrency: int,
        batch_size: int | None,
        batch_timeout_ms: float,
        max_in_flight: int,
        max_in_flight_bytes: int,
        commit_interval_s: float,
        close_timeout_s: float,
        retry: RetryPolicy | None,
        retry_topics: Iterable[float],
        dead_letter_topic: str | None,
        reject_on: Iterable[type[Exception]],
        producer: Producer | None,
        inbox: ListenerInbox | None = None,
        transactional_id: str | None = None,
        on_dead: Callable[[ReceivedEnvelope[Any], Exception], object] | None = None,
    ) -> None:
        names = [] if isinstance(topics, (str, bytes)) else list(topics)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError("topics must be a list of names, with one at least")
        if inbox is not None:
            check_methods(
                "inbox",
                inbox,
                "a kbatch.SqliteInbox or kbatch.PostgresInbox, or a kbatch.stores.ListenerInbox",
                ("open_session", "check", "clock_us", "note_offsets", "purge_old"),
            )
        options = {"connection": inbox, "transaction": transactional_id}
        given = ["envelope", *(name for name, option in options.items() if option is not None)]
        fault = call_fault(handler, *given) or self._handler_fault(handler)
        if fault is not None:
            raise ConfigError(f"handler {fault}")
        if wire not in WIRE_NAMES:
            raise ConfigError(f"wire must be one of {', '.join(WIRE_NAMES)}, not {wire!r}")
        for name, value, most in (
            ("concurrency", concurrency, 10_000),
            ("max_in_flight", max_in_flight, 1_000_000),
            ("max_in_flight_bytes", max_in_flight_bytes, 2**40),
            ("batch_size", 1 if batch_size is None else batch_size, 100_000),
        ):
            if not (is_whole(value) and 1 <= value <= most):
                raise ConfigError(f"{name} must be an int from 1 to {most:,}, not {value!r}")
        if batch_size is not None and batch_size > max_in_flight:
            raise ConfigError(f"{batch_size=} is larger than {max_in_flight=}: no batch would be full")
        if not (is_number(batch_timeout_ms) and 0 <= batch_timeout_ms < 1e9):
            raise ConfigError(f"batch_timeout_ms must be milliseconds, 0 or more, not {batch_timeout_ms!r}")
        if batch_timeout_ms and batch_size is None:
            raise ConfigError("batch_timeout_ms is for a handler of batches: give a batch_size, too")
        if not (is_number(commit_interval_s) and 0 < commit_interval_s < 1e6):
            raise ConfigError(f"commit_interval_s must be seconds above 0, not {commit_interval_s!r}")
        check_close_timeout(close_timeout_s)
        self._decoders = {name: _Decoders(name, type_) for name, type_ in _checked_types(types)}
        self._parsed = ConsumerConfig.parse(config)
        group = self._parsed.group
        self._failures = Failures(group, names, wire, retry, retry_topics, dead_letter_topic, reject_on)
        if inbox is not None and self._failures.delays:
            _check_retention(inbox, max(self._failures.delays.values()))
        self._transacting: Transacting | None = None
        self._copies: Copies | Transacting | None = None
        if transactional_id is not None:
            _check_transactional(self._parsed, inbox, commit_interval_s)
            self._copies = self._transacting = Transacting(config, transactional_id, wire, producer)
        elif self._failures.sends:
            self._copies = Copies(config, producer)
        check_option("on_dead", on_dead, "envelope", "error", elsewhere=self._takes_coroutines_instead)
        if on_dead is not None and dead_letter_topic is None:
            raise ConfigError("on_dead is told of what is in the dead letter topic: give a dead_letter_topic, too")
        self._calls = self._calls_class()
        shown = f"{self._name} of {', '.join(names)}"
        self._deaths = None if on_dead is None else Deaths(self._calls, on_dead, _shown_deaths, shown, _MOST_DEATHS)
        self._failing = Failing(self._failures, self._copies, deaths=self._deaths)  # of the last run
        self._topics = names
        self._handler = handler
        self._inbox = inbox
        self._told_of_outage = float("-inf")
        self._wire = wire
        self._concurrency = concurrency
        self._batch_size = batch_size
        self._batch_timeout_s = batch_timeout_ms / 1000
        self._limits = Limits(
            max_in_flight, max_in_flight_bytes, commit_interval_s, close_timeout_s, self._parsed.max_poll_interval_s
        )
        # Of the last run.
        self._reading: Reading | None = None
        self._keeper: Keeper | None = None
        self._claim: object | None = None  # of the run that there is
        self._runner: int | None = None  # its thread
        self._pid = os.getpid()
        self._is_to_stop = False  # the next run, at once
        self._claims = threading.RLock()  # re-entrant: a signal handler may come here from within

    @staticmethod
    def _handler_fault(handler: object) -> str | None:
        raise NotImplementedError

    def __repr__(self) -> str:
        state = "running" if self._runs_here() else "not running"
        return f"<{self._name} of {', '.join(self._topics)} for {self._parsed.group}, {state}>"

    # -- for any thread

    def stop(self) -> None:
        """Has `run` end when the handlers that run are done. Any thread may call it, a handler, and a signal handler.
        If it does not run yet, the next `run` ends at once."""
        self._is_to_stop = True
        reading = self._reading
        if reading is not None and self._runs_here():
            reading.stop()

    def stats(self) -> dict[str, int]:
        """Counters of the last run, of records: ``handled``; ``failed``; ``in_flight``, that were read and are not
        handled, of which ``running`` are in handlers; ``in_flight_bytes``, about; ``abandoned``, whose handlers still
        ran at its end. ``attempts_failed``, times that a handler raised or a record could not be read; ``to_retry`` and
        ``dead``, records that were stored in a retry topic and in the dead letter topic; both count as handled. And
        ``partitions``, that it has, of which ``full_partitions`` are not read further until some of their records are
        handled; ``rebalances``, in which it was given some."""
        reading = self._reading
        if reading is None or self._pid != os.getpid():
            counts = dict.fromkeys((*_COUNTS, "rebalances", "abandoned"), 0)
            return {**counts, **Failing(self._failures, None).stats()}
        return {**reading.stats(), **self._failing.stats()}

    def lag(self) -> dict[tuple[str, int], int]:
        """Of each partition, how many offsets are not handled, as the last answer of its broker told. Those of which
        nothing was read yet are left out."""
        reading = self._reading
        return reading.lag() if reading is not None and self._runs_here() else {}

    def _runs_here(self) -> bool:
        return self._claim is not None and self._pid == os.getpid()

    # -- a run

    def _begin(
        self, claim: object, wake: Callable[[int], object], give_up: Callable[[], object] | None = None
    ) -> Reading:
        """A run for who has made the claim, who calls `_over` with it, also if this raises."""
        if self._pid != os.getpid():  # a forked child: what its parent runs is not here
            self._claims = threading.RLock()
            self._claim, self._is_to_stop = None, False
            if self._deaths is not None:
                self._deaths.forget()
            self._pid = os.getpid()
        with self._claims:
            if self._claim is not None:
                raise RuntimeError("this listener runs already")
            self._claim = claim
            self._runner = threading.get_ident()
        callbacks = CallbackThread("kbatch-callbacks")
        core = ConsumerCore(
            self._parsed.native,
            make_dispatcher(self._parsed, callbacks, lambda: core),
            self._wire,
            on_start=watch_multiprocessing_child,
        )
        waiting: Lanes | BatchLanes = (
            Lanes() if self._batch_size is None else BatchLanes(self._batch_size, self._batch_timeout_s)
        )
        if self._copies is not None:
            self._copies.open()
        self._failing = Failing(self._failures, self._copies, deaths=self._deaths)
        self._reading = Reading(
            core,
            self._topics,
            waiting,
            self._limits,
            self._lane,
            self._failures,
            wake,
            give_up,
            commits=self._transacting is None,
        )
        if self._inbox is not None:
            self._keeper = Keeper(self._inbox, self._parsed.group, self._reading.offsets)
        CORES.add(core)
        SENDERS.add(self)
        if self._is_to_stop:
            self._reading.stop()
        return self._reading

    def _read(self, reading: Reading, prepare: Callable[[], object] | None = None) -> None:
        """Reads until its end, on the thread that polls."""
        try:
            if self._transacting is not None:
                self._transacting.begin(reading)
            if prepare is not None:
                prepare()
        except BaseException:
            reading.stop()
            raise
        finally:
            reading.run()  # it ends at once if it is stopped

    def _over(self, claim: object, *, is_last: bool) -> None:
        """Ends the run of this claim, unless it has ended. A call that is interrupted is followed by the last one."""
        if self._claim is not claim:
            return
        try:
            SENDERS.discard(self)
            if self._keeper is not None:
                self._keeper.stop()
            if self._reading is not None:
                self._reading.close()
            if self._copies is not None:
                self._copies.close(_CLOSE_COPIES_S)
            is_last = True
        finally:
            if is_last:
                self._is_to_stop = False
                self._claim = None

    def _lane(self, envelope: ReceivedEnvelope[Any]) -> Hashable:
        if self._concurrency == 1 or self._transacting is not None:  # offsets are committed one after the other
            return envelope.topic, envelope.partition
        key = envelope.key
        return None if key is None else (envelope.topic, envelope.partition, key)

    def _decode(self, envelope: ReceivedEnvelope[Any]) -> None:
        if envelope.error is not None:
            raise envelope.error
        decoders = self._decoders.get(envelope.message_type or "")
        if decoders is not None and envelope.data is not None:
            decoders.decode(envelope)

    def _wait_until_over(self, end: float) -> None:
        while self._runs_here() and monotonic() < end:
            threading.Event().wait(min(_LOOK_WHETHER_OVER_S, max(0.0, end - monotonic())))

    def _await_calls(self) -> None:
        """Those of `on_dead` that are left."""
        if self._deaths is not None and self._pid == os.getpid():
            self._deaths.join(_LAST_WORDS_S)

    def _check_inbox(self) -> None:
        if self._inbox is not None:
            try:
                self._inbox.check()
            except InboxError as error:
                if not error.is_outage:  # else it is waited for
                    raise

    def _fail(self, reading: TakenFrom, work: Work, error: BaseException) -> bool:
        """What becomes of work that could not be handled. Whether no step was taken, since its copy is sent next."""
        if isinstance(error, OvertakenError):
            reading.put_off(work, monotonic())
            return False
        if isinstance(error, CannotCommitError):
            reading.fail(work, error.error)
            return False
        if isinstance(error, InboxError) and self._inbox is not None:  # else the handler uses one by itself
            # No fault of the record: no attempt is counted, and it is sent nowhere.
            if not error.is_outage:
                reading.fail(work, error)
                return False
            if reading.is_given_up(work):
                reading.abandon(work)
                return False
        if isinstance(error, Exception) and not reading.holds(work):
            self._failing.overtaken(reading, work, error)
            return False
        return self._failing.failed(reading, work, error)

    def _tell_of_outage(self, error: InboxError) -> None:
        now = monotonic()
        if now >= self._told_of_outage + _REMIND_EVERY_S:
            self._told_of_outage = now
            tell("a listener of %s waits for its inbox: %s", ", ".join(self._topics), error)

    # -- at the end of the interpreter

    def _flush(self, timeout: float) -> int:
        return 0

    def _drain(self, timeout: float) -> int:
        self.stop()
        self._wait_until_over(monotonic() + timeout)
        return 0

    def _begin_end(self) -> None:
        reading = self._reading
        if reading is not None and self._runs_here():
            reading.stop(hurried=True)

    def _await_end(self, end: float) -> int:
        self._wait_until_over(end)
        return 0


class _Decoders:
    """What decodes the data of one message type."""

    __slots__ = ("_json", "_msgpack", "_name")

    def __init__(self, name: str, type_: Any) -> None:
        self._name = name
        try:
            self._json: Callable[[bytes], Any] = msgspec.json.Decoder(type_).decode
            self._msgpack: Callable[[bytes], Any] = msgspec.msgpack.Decoder(type_).decode
        except Exception as error:
            raise ConfigError(f"types[{name!r}]: msgspec cannot decode to this: {exception_text(error)}") from error

    def decode(self, envelope: ReceivedEnvelope[Any]) -> None:
        content_type = envelope.content_type
        # The second is what a producer says that was given bytes and no type.
        if content_type is None or content_type == "application/octet-stream" or "json" in content_type:
            decoder = self._json
        elif "msgpack" in content_type:
            decoder = self._msgpack
        else:
            raise _undecodable(
                envelope,
                f"its content type {content_type!r} is neither JSON nor msgpack, and types "
                f"has {self._name!r}: decode envelope.data in the handler",
            )
        try:
            envelope.decode(decoder)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _undecodable(
                envelope, f"its data cannot be decoded as {self._name!r}: {exception_text(error)}"
            ) from error


def _shown_deaths(dead: list[Dead]) -> Iterator[tuple[str, Dead]]:
    for envelope, error in dead:
        yield f"record {envelope.topic} [{envelope.partition}] at offset {envelope.offset}", (envelope, error)


def _undecodable(envelope: ReceivedEnvelope[Any], reason: str) -> DeserializationError:
    return DeserializationError(
        reason, topic=envelope.topic, partition=envelope.partition, offset=envelope.offset, header=None
    )


def _check_retention(inbox: ListenerInbox, longest: float) -> None:
    # What waits for its time in a retry topic of which nothing was handled yet holds no id back.
    if inbox.retention_s is not None and inbox.retention_s <= longest:
        raise ConfigError(
            f"retention_s={inbox.retention_s} of the inbox is not above the longest of retry_topics, {longest}: an id "
            "would be purged before its record is read again there"
        )


def _check_transactional(parsed: ConsumerConfig, inbox: ListenerInbox | None, commit_interval_s: float) -> None:
    if inbox is not None:
        raise ConfigError(
            "transactional_id contradicts inbox: a transaction of Kafka and one of a database do not commit together"
        )
    if commit_interval_s != COMMIT_INTERVAL_S:
        raise ConfigError("transactional_id contradicts commit_interval_s: each transaction commits its offsets")
    if parsed.native.get("isolation.level") == "read_uncommitted":
        raise ConfigError(
            "transactional_id contradicts isolation.level=read_uncommitted: offsets of open transactions would be read"
        )


def _checked_types(types: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    try:
        items = list((types or {}).items())
    except AttributeError:
        raise ConfigError(f"types must be a mapping of message types to types, not {type_name(types)}") from None
    for name, _ in items:
        if not isinstance(name, str):
            raise ConfigError(f"types: a message type must be str, not {type_name(name)}")
    return items
