"""``kbatch relay``: an outbox to Kafka, until it is told to end."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import kbatch
from kbatch._fastmap import monotonic
from kbatch._text import counted
from kbatch.cli._connection import Connection
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._interrupt import Interrupt
from kbatch.cli._log import Log
from kbatch.cli._place import OutboxPlace
from kbatch.cli._relay_file import RelayFile
from kbatch.cli._screen import Bar, Screen
from kbatch.cli._settings import Settings
from kbatch.cli._work import for_people

#: Exit status when the time of ``--timeout`` is over and the outbox is not empty.
NOT_EMPTY = 3
_LOOK_EVERY_S = 0.1
_COUNT_EVERY_S = 1.0
_COUNT_UP_TO = 10_000
_TELL_EVERY_S = 60.0
_STALLED_AFTER_S = 10.0
_GRACE_S = 30.0


@dataclass(frozen=True)
class RelayJob:
    """What the command line asks for."""

    place: OutboxPlace
    settings: Settings
    file: RelayFile
    drain: bool
    timeout_s: float | None
    grace_s: float | None
    as_json: bool


def run_relay(job: RelayJob, screen: Screen) -> int:
    """Runs a relay and returns the exit status, which says why it ended."""
    with Log(screen, as_json=job.as_json) as log:
        connection = Connection(log)
        outbox = job.place.open()
        with contextlib.ExitStack() as stack:
            relay, grace_s = _relay(job, outbox, connection)
            stack.callback(_close, relay)
            # At its end, at the second signal, or when the time for it is over.
            interrupt = stack.enter_context(Interrupt(lambda: relay.stop(0), grace_s))
            log.tell(f"relay of {job.place.shown} to {_brokers(job.settings)} begins")
            with screen.live("relay") as bar, _watched(relay, outbox, log, connection, interrupt, bar):
                try:
                    left = 0
                    if job.drain:
                        left = relay.drain(job.timeout_s)
                    else:
                        relay.run()
                except kbatch.KbatchError as error:
                    log.tell(for_people(error), "error")
                    log.tell(_told(relay))
                    return 1
            status, why = _why(left, job, interrupt)
            log.tell(f"{why}: {_told(relay)}")
            if job.as_json:
                last_error = None if relay.last_error is None else str(relay.last_error)
                seen = {**relay.stats(), "state": relay.state.value, "last_error": last_error}
                screen.say(json.dumps({**seen, "exit_status": status, "reason": why}))
            return status


def _why(left: int, job: RelayJob, interrupt: Interrupt) -> tuple[int, str]:
    if interrupt.requested:
        return interrupt.status, "stopped by a signal" + (", at once" if interrupt.aborted else "")
    if left:
        return NOT_EMPTY, f"the time is over, and {counted(left, 'message is', 'messages are')} left, or more"
    return 0, "the outbox is empty"


def _told(relay: kbatch.Relay) -> str:
    stats = relay.stats()
    text = f"{stats['acked']:,} acknowledged"
    for key, name in (("expired", "expired"), ("refused", "refused"), ("dead", "dead"), ("in_flight", "given up")):
        if stats[key]:
            text += f", {stats[key]:,} {name}"
    return text


def _relay(job: RelayJob, outbox: Any, connection: Connection) -> tuple[kbatch.Relay, float]:
    """A relay, and how many seconds a signal leaves to what is in flight."""
    if job.settings.find("bootstrap.servers") is None:
        raise Failure(
            "no broker is named: give -X bootstrap.servers=HOST:PORT, KBATCH_BOOTSTRAP_SERVERS, or "
            "bootstrap.servers in [kafka] of a --config FILE",
            USAGE,
        )
    for key in job.settings.values:
        if key.endswith("_cb") or key in ("logger", "on_delivery"):
            raise Failure(job.settings.explain(f"{key} is for programs; a command line has no place for it"), USAGE)
    config = {"log_level": "0", **job.settings.values, "error_cb": connection}
    options: dict[str, Any] = {"close_timeout_s": _GRACE_S, **job.file.relay}
    if job.grace_s is not None:
        options["close_timeout_s"] = job.grace_s
    if job.file.retry:
        # What a file does not say is as a relay has it without one.
        own: dict[str, Any] = {"max_attempts": 20, "initial_backoff_s": 0.5, "max_backoff_s": 60.0, **job.file.retry}
        try:
            options["retry"] = kbatch.RetryPolicy(**own)
        except kbatch.ConfigError as error:
            raise Failure(f"[retry] {error}", USAGE) from None
    try:
        relay = kbatch.Relay(outbox, config, **options)
    except kbatch.ConfigError as error:
        raise Failure(job.settings.explain(str(error)), USAGE) from None
    try:
        # What librdkafka sees only when it starts: settings that do not go together, a certificate that is not there.
        relay._use.handle.producer._core.start()
    except kbatch.ConfigError as error:
        _close(relay)
        raise Failure(str(error), USAGE) from None
    return relay, options["close_timeout_s"]


def _close(relay: kbatch.Relay) -> None:
    # What was not sent stays in the outbox: nothing is lost that had to be told.
    with contextlib.suppress(kbatch.UndeliveredError):
        relay.close()


def _brokers(settings: Settings) -> str:
    found = settings.find("bootstrap.servers")
    return "" if found is None else found.value


@contextlib.contextmanager
def _watched(
    relay: kbatch.Relay, outbox: Any, log: Log, connection: Connection, interrupt: Interrupt, bar: Bar
) -> Iterator[None]:
    """Tells how it goes, and passes on the wish to stop, while the main thread runs the relay."""
    over = threading.Event()
    watcher = _Watcher(relay, outbox, log, connection, interrupt, bar)
    thread = threading.Thread(target=lambda: watcher.watch(over), name="kbatch-relay-watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Watcher:
    def __init__(
        self, relay: kbatch.Relay, outbox: Any, log: Log, connection: Connection, interrupt: Interrupt, bar: Bar
    ) -> None:
        self._relay, self._outbox, self._log, self._bar = relay, outbox, log, bar
        self._connection, self._interrupt = connection, interrupt
        self._is_stopping = False
        self._acked = 0
        self._acked_at = monotonic()
        self._told = relay.stats()
        self._told_at = self._shown_at = monotonic()
        self._shown_acked = 0
        self._rate = 0.0
        self._waiting = ""

    def watch(self, over: threading.Event) -> None:
        self._look()
        while not over.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        stats, now = self._relay.stats(), monotonic()
        if self._interrupt.requested and not self._is_stopping:
            self._is_stopping = True
            in_flight = stats["in_flight"]
            what = f": {counted(in_flight, 'message')} in flight, which another signal gives up" if in_flight else ""
            self._log.tell(f"stopping{what}")
            self._relay.stop()
        if stats["acked"] > self._acked or not stats["in_flight"]:
            if stats["acked"] > self._acked:
                self._connection.answered(all_is_well=not stats["in_flight"])
            self._acked, self._acked_at = stats["acked"], now
        stall = "nothing was acknowledged" if stats["in_flight"] else ""
        self._connection.look(stall, self._acked_at, _STALLED_AFTER_S)
        if now - self._told_at >= _TELL_EVERY_S:
            self._tell(stats, now)
        if self._bar.is_seen:
            self._show(stats, now)

    def _tell(self, stats: dict[str, int], now: float) -> None:
        acked = stats["acked"] - self._told["acked"]
        if acked or stats["dead"] > self._told["dead"] or stats["refused"] > self._told["refused"]:
            self._log.tell(f"{_told(self._relay)}; {acked / (now - self._told_at):,.0f}/s")
        self._told, self._told_at = stats, now

    def _show(self, stats: dict[str, int], now: float) -> None:
        if now - self._shown_at >= _COUNT_EVERY_S:
            self._rate = (stats["acked"] - self._shown_acked) / (now - self._shown_at)
            self._shown_acked, self._shown_at = stats["acked"], now
            with contextlib.suppress(kbatch.OutboxError):  # the relay tells
                waiting = self._outbox.status(count_up_to=_COUNT_UP_TO).waiting
                self._waiting = f"{waiting:,}{' or more' if waiting >= _COUNT_UP_TO else ''} waiting, "
        dead = f", {stats['dead']:,} dead" if stats["dead"] else ""
        self._bar.show(
            0,
            f"{stats['acked']:,} acknowledged ({self._rate:,.0f}/s), {self._waiting}{stats['in_flight']:,} in flight, "
            f"{counted(stats['buckets'], 'bucket')}{dead}",
        )
