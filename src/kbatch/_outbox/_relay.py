"""What brings an outbox to Kafka."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from kbatch._checks import check_close_timeout, check_timeout
from kbatch._errors import ConfigError, OutboxError, SenderClosedError
from kbatch._fastmap import CallQueue, monotonic
from kbatch._options import RelayOptions, shows, taken
from kbatch._outbox._base import check_relay_outbox, dead_letters_of
from kbatch._outbox._dead_letters import deaths_of
from kbatch._outbox._relay_loop import RelayLoop
from kbatch._outbox._relay_producer import lease_of, use_of
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._gate import Gate
from kbatch._recovery._user_calls import UserCalls
from kbatch._text import counted
from kbatch._threads import PROBES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from kbatch._errors import KbatchError
    from kbatch._options import RelayKeywords
    from kbatch._outbox._store import OutboxStore, RelayOutbox
    from kbatch._producer import Producer

__all__ = ["Relay"]

_LOOK_WHETHER_OVER_S = 0.02
_LAST_CALLS_S = 2.0  # for what its callbacks are to be told


class Relay:
    """Brings the records of an outbox to Kafka, and deletes those that were acknowledged.

    Each record is sent until it was acknowledged; it may be stored twice if the relay, or its database, fails in
    between. Of one topic and key (or partition, without a key) records are sent in the order in which they were added.
    When a delivery fails, those that were not sent yet wait behind it, and those under way may overtake it.
    Any number of relays may work on one outbox, in threads and processes: they share its 64 buckets, and a key is in
    one bucket.

    A record that a broker refuses waits for its next attempt, and later ones of its key with it; what can never be
    accepted, or was refused too often, goes to the dead letters. When no broker answers, nothing is moved and no
    attempt is counted: the records stay, and are sent when brokers answer again.

    It needs a process or a thread of its own, in which `run` is called. It holds no transaction open while it sends.

    Args:
        outbox: A `SqliteOutbox` or `PostgresOutbox`, whose tables are there, or one of your own, a
            `kbatch.stores.RelayOutbox`.
        producer: A producer's ``config``, or a `Producer` that is used for nothing else and that the caller closes. It
            must be idempotent with ``acks=all``, without a ``transactional.id``. With a ``config``,
            ``delivery.timeout.ms`` is 30,000 by default.
        retry: When a record that was refused is sent again, and when no more. By default 20 attempts, at most a minute
            apart; a `RetryPolicy` that is given has its own defaults, with pauses of at most 10 seconds. It has no
            ``max_age_s``: give envelopes a ``deliver_by``.
        batch_size, max_in_flight_batches: How many records are sent together, and how often at a time. With `fencing`
            it is one batch at a time, whatever the second says.
        strict_order: At most one record of a key is in flight, so that none overtakes another of its key, also when a
            delivery fails. It is slow if there are few keys.
        lease_s: Seconds after which others take the buckets of a relay that has died. It must be longer than the
            producer's `Producer.max_delivery_s` and 2 seconds, and by default it is 5 seconds longer.
        fencing: With ``"kafka"`` each batch is one transaction of Kafka, one at a time, and brokers take nothing more
            of a relay whose buckets others take because its lease has run out. All relays of an outbox must have it,
            and readers ``isolation.level=read_committed``. ``producer`` is then a ``config``, in which
            ``delivery.timeout.ms`` and ``transaction.timeout.ms`` are 10,000 by default. Transactional ids begin with
            ``kbatch-relay-``.
        failures_to_open, probe_interval_s, max_probe_interval_s, on_state_change: As for `SendingAgent`.
        on_dead: Called with the `DeadLetter` of each record that this relay has given up, soon after that is committed,
            as it is read from the database then: one that was replayed or discarded before is left out. It is called on
            the thread of ``on_state_change``, one letter after the other; what it raises is logged, and the relay does
            not wait for it. 10,000 letters wait for it at most, and the log tells how many more there were. After a
            crash, or the end of the process, what waited is not told by any relay: the outbox's ``dead_letters`` has
            all. A letter may be told twice. It needs an outbox of kbatch, or a `kbatch.stores.OutboxBase`.
        close_timeout_s: Seconds that the end of `run` and of the ``with`` block waits for what is in flight.

    Raises:
        ConfigError: A wrong option, or a producer that may lose or reorder records.
    """

    _calls_class: type[UserCalls] = UserCalls
    _options_class: type[RelayOptions] = RelayOptions

    @shows(RelayOptions)
    def __init__(
        self,
        outbox: RelayOutbox,
        producer: Mapping[str, Any] | Producer,
        *,
        close_timeout_s: float = 30.0,
        **keywords: Unpack[RelayKeywords],
    ) -> None:
        check_relay_outbox(outbox)
        (given,) = taken(self, keywords, RelayOptions)
        options = self._options_class(**given)
        check_close_timeout(close_timeout_s)
        self._calls = self._calls_class()
        self._deaths = (
            None
            if options.on_dead is None
            else deaths_of(dead_letters_of(outbox), self._calls, options.on_dead, repr(outbox))
        )
        self._outbox = outbox
        self._close_timeout_s = close_timeout_s
        self._use = use_of(producer, options)
        try:
            lease_s = lease_of(options, self._use.handle.producer)
        except ConfigError:
            self._use.release(0.0)
            raise
        self._prober = CallQueue(PROBES)
        self._gate = Gate(
            self._use.handle,
            None,
            self._calls,
            self._prober,
            failures_to_open=options.failures_to_open,
            probe_interval_s=options.probe_interval_s,
            max_probe_interval_s=options.max_probe_interval_s,
            on_state_change=options.on_state_change,
            name=repr(outbox),
        )
        self._flag = self._gate.flag
        self._claim_lock = threading.RLock()  # re-entrant, as the next one: a signal handler may come here from within
        self._release_lock = threading.RLock()
        self._run_lock = threading.Lock()  # the last run's own, which holds it until its end
        self._runner: int | None = None  # the thread of the last run
        self._closed = self._released = False
        self._loop = RelayLoop(
            outbox,
            options,
            self._gate,
            self._prober.put,
            self._deaths,
            lease_s=lease_s,
            close_timeout_s=close_timeout_s,
        )

    def __repr__(self) -> str:
        return f"<kbatch.Relay of {self._outbox!r}, {counted(self._loop.stats()['buckets'], 'bucket')}>"

    # -- what others call

    @property
    def state(self) -> CircuitState:
        """The state of the circuit breaker."""
        return self._gate.circuit.state

    @property
    def last_error(self) -> KbatchError | None:
        """Why a record failed the last time that one did, whether or not it is sent again; ``None`` before."""
        return self._gate.last_error

    def run(self) -> None:
        """Sends what is in the outbox, until `stop`; then waits for what is in flight, and gives its buckets back.

        When the database does not answer, it tries again until it does.

        Raises:
            OutboxError: At its start, the outbox cannot be opened.
            SenderClosedError: The relay is closed, or its producer cannot send any more and cannot be replaced.
            ConfigError: librdkafka refuses the configuration, which shows at the first use.
            RuntimeError: It runs already.
        """
        self._run(until_empty=False, end=None, given_up=_never)

    def drain(self, timeout: float | None = None) -> int:
        """Sends until the outbox is empty but for the dead letters and what is scheduled for later. If another thread
        is in `run`, it waits for that, or for its end.

        Args:
            timeout: Seconds; ``None`` takes as long as it takes: a record that is refused may wait for its next
                attempt, and a bucket for the end of the lease of a relay that has died. What is in flight at its end
                is given up. It is sent again some time, also if a broker has stored it.

        Returns:
            0 if it is empty, else about how many records are left.

        Raises:
            OutboxError: At its start, the outbox cannot be opened; or at its end, the database does not answer how many
                records are left.
            SenderClosedError, ConfigError: As for `run`.
            RuntimeError: It is called within `run`, as by a signal handler.
        """
        return self._drain(timeout, _never)

    def _drain(self, timeout: float | None, given_up: Callable[[], bool]) -> int:
        check_timeout(timeout)
        end = None if timeout is None else monotonic() + timeout
        if self._run_lock.locked():
            if self._is_run_here():
                raise RuntimeError("drain waits for what run does, so it must not be called within it")
            return self._await_empty(end, given_up)
        if self._run(until_empty=True, end=end, given_up=given_up):
            return 0
        return self._count_left()

    def stop(self, timeout: float | None = None) -> None:
        """Has `run` and `drain` end. Any thread may call it, and a signal handler. If neither is called yet, the next
        one ends at once.

        Args:
            timeout: Seconds that they wait for what is in flight, ``close_timeout_s`` at most; what is then left is
                given up, and sent again some time. It may be called again, to wait less.
        """
        check_timeout(timeout)
        self._loop.stop(timeout)

    def stats(self) -> dict[str, int]:
        """Counters since the start, of records.

        ``acked``; ``expired``, whose ``deliver_by`` had passed; ``refused``, that wait for their next attempt, counted
        each time; ``put_off``, the same without an attempt counted; ``dead``; ``in_flight``. And of buckets:
        ``buckets``, those that it has; ``lost_buckets``, whose lease ran out.
        """
        return self._loop.stats()

    def close(self) -> None:
        """Stops it, waits until `run` has ended, and closes the producer, unless it is the caller's. Then it waits for
        calls of ``on_state_change`` and ``on_dead`` that are left, up to 2 seconds, unless it is called by one.

        Raises:
            RuntimeError: It is called within `run`, as by a signal handler, which calls `stop`.
        """
        if self._is_run_here():
            raise RuntimeError("close waits for the end of run, so it must not be called within it; call stop")
        self._close(self._close_timeout_s)
        self._await_calls()

    def _await_calls(self) -> None:
        if self._deaths is None:
            self._calls.join(_LAST_CALLS_S)
        else:
            self._deaths.join(_LAST_CALLS_S)

    def _close(self, timeout: float) -> None:
        """Closes what is its own, the producer within `timeout` seconds."""
        with self._claim_lock:
            self._closed = True
        self.stop()
        while self._run_lock.locked():
            threading.Event().wait(_LOOK_WHETHER_OVER_S)
        with self._release_lock:
            self._release(timeout)

    def _release(self, timeout: float) -> None:
        if self._released:
            return
        try:
            self._gate.close()
            self._use.release(timeout)
        finally:
            self._prober.stop()
            self._calls.stop()
        self._released = True  # last: who was interrupted calls again

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _await_empty(self, end: float | None, given_up: Callable[[], bool]) -> int:
        store: OutboxStore | None = None
        try:
            while True:
                has_ended = not self._run_lock.locked()  # before the count: nobody sends what that finds
                try:
                    if store is None:
                        store = self._outbox.open_store()
                    left = store.left()
                except OutboxError:
                    # Who is in `run` waits until the database answers, or ends for the same reason.
                    if has_ended or _is_over(end, given_up):
                        raise
                    _close(store)
                    store = None
                else:
                    if not left or has_ended or _is_over(end, given_up):
                        return left
                pause = _LOOK_WHETHER_OVER_S if end is None else min(_LOOK_WHETHER_OVER_S, max(0.0, end - monotonic()))
                threading.Event().wait(pause)
        finally:
            _close(store)

    def _count_left(self) -> int:
        store = self._outbox.open_store()
        try:
            return store.left()
        finally:
            store.close()

    def _run(self, *, until_empty: bool, end: float | None, given_up: Callable[[], bool]) -> bool:
        """As `RelayLoop.run`, in one thread at a time."""
        mine = threading.Lock()
        with mine:  # whatever interrupts this, nobody finds it held afterwards
            self._claim(mine)
            return self._loop.run(until_empty=until_empty, end=end, given_up=given_up)

    def _claim(self, mine: threading.Lock) -> None:
        with self._claim_lock:
            if self._run_lock.locked():
                raise RuntimeError("this relay runs already")
            if self._closed:
                raise SenderClosedError("the relay is closed")
            self._runner = threading.get_ident()
            self._run_lock = mine

    def _is_run_here(self) -> bool:
        return self._run_lock.locked() and self._runner == threading.get_ident()

    def _finish(self) -> None:
        """Has `run` end once it has sent what is to be sent now, or cannot."""
        self._loop.finish()


def _never() -> bool:
    return False


def _is_over(end: float | None, given_up: Callable[[], bool]) -> bool:
    return (end is not None and monotonic() >= end) or given_up()


def _close(store: OutboxStore | None) -> None:
    if store is not None:
        with contextlib.suppress(OutboxError):
            store.close()
