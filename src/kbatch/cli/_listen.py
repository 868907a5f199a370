"""``kbatch listen``: a topic's records to a function, until it is told to end."""

import contextlib
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import kbatch
from kbatch._errors import named_exception_text
from kbatch._fastmap import monotonic
from kbatch._text import printable
from kbatch.cli._connection import Connection
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._interrupt import Interrupt
from kbatch.cli._listen_file import ListenFile
from kbatch.cli._log import Log
from kbatch.cli._place import InboxPlace
from kbatch.cli._screen import Bar, Screen
from kbatch.cli._settings import Settings
from kbatch.cli._work import command_of

_LOOK_EVERY_S = 0.1
_TELL_EVERY_S = 60.0
_LAST_S = 15.0  # the last commit and the leaving of the group, with brokers that do not answer, take 12
_GRACE_S = 30.0


@dataclass(frozen=True)
class ListenJob:
    """What the command line asks for."""

    handler: str | None
    topics: list[str]
    settings: Settings
    file: ListenFile
    transactional_id: str | None
    grace_s: float | None
    as_json: bool


def run_listener(job: ListenJob, screen: Screen) -> int:
    """Runs a listener and returns the exit status, which says why it ended."""
    with Log(screen, as_json=job.as_json) as log:
        connection = Connection(log)
        listener, topics, options = _listener(job, connection)
        id_ = options.get("transactional_id")
        # What `run` still does when the time for handlers is over takes a moment.
        grace_s = options["close_timeout_s"] + _LAST_S
        with Interrupt(lambda: _abort(log, listener, interrupt.status), grace_s) as interrupt:
            log.tell(f"listener of {', '.join(topics)} begins{_told_of_transactions(id_)}")
            error: Exception | None = None
            with screen.live("listen") as bar, _watched(listener, log, connection, interrupt, bar):
                try:
                    listener.run()
                except kbatch.ConfigError as raised:  # what librdkafka sees only when it starts
                    raise Failure(str(raised), USAGE) from None
                except Exception as raised:  # a handler's, or kbatch's
                    error = raised
        if error is not None:
            status, why = 1, f"it cannot go on: {named_exception_text(error)}{command_of(error)}"
        else:
            status, why = interrupt.status, "stopped by a signal" if interrupt.requested else "stopped by the handler"
            status = status if interrupt.requested else 0
        log.tell(f"{why}; {_told(listener)}", "error" if error is not None else "info")
        if job.as_json:
            screen.say(json.dumps({**listener.stats(), "exit_status": status, "reason": why}))
        return status


def _abort(log: Log, listener: kbatch.Listener, status: int) -> None:
    # A handler that hangs cannot be ended in another way; what it had under way is not committed, and is read again.
    who = "handlers do not end; their records" if listener.stats()["running"] else "brokers do not answer; some records"
    log.tell(f"{who} will be read again", "warning")
    os._exit(status)


def _told_of_transactions(id_: str | None) -> str:
    return "" if id_ is None else f", in transactions of {printable(id_)}"


def _told(listener: kbatch.Listener) -> str:
    stats = listener.stats()
    text = f"{stats['handled']:,} done"
    for key, name in (("attempts_failed", "failed attempts"), ("to_retry", "to retry topics"), ("dead", "dead")):
        if stats[key]:
            text += f", {stats[key]:,} {name}"
    return text


def _listener(job: ListenJob, connection: Connection) -> tuple[kbatch.Listener, list[str], dict[str, Any]]:
    """A listener, its topics and its other options."""
    file = job.file
    name = job.handler or file.values.get("handler")
    if not name:
        raise Failure("no handler is named: give --handler MODULE:NAME, or handler in a --config FILE", USAGE)
    topics = job.topics or file.values.get("topics") or []
    if not topics:
        raise Failure("no topic is named: give TOPIC, or topics in a --config FILE", USAGE)
    for key in job.settings.values:
        if key.endswith("_cb") or key == "logger":
            raise Failure(job.settings.explain(f"{key} is for programs; a command line has no place for it"), USAGE)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the command is called in, as `python -m` has it
    options: dict[str, Any] = {"close_timeout_s": _GRACE_S, **file.table("listener")}
    if job.grace_s is not None:
        options["close_timeout_s"] = job.grace_s
    if job.transactional_id is not None:
        options["transactional_id"] = job.transactional_id
    if "types" in file.values:
        options["types"] = {type_: _named(where, f"[types] {type_}") for type_, where in file.table("types").items()}
    if "reject_on" in file.values:
        options["reject_on"] = [_named(where, "reject_on") for where in file.values["reject_on"]]
    if "inbox" in file.values:
        options["inbox"] = InboxPlace.find(None, None, None, file.values).open()
    if file.retry:
        own: dict[str, Any] = {"max_attempts": 3, "initial_backoff_s": 0.1, "max_backoff_s": 1.0, **file.retry}
        try:
            options["retry"] = kbatch.RetryPolicy(**own)
        except kbatch.ConfigError as error:
            raise Failure(f"[retry] {error}", USAGE) from None
    config = {"log_level": "0", **job.settings.values, "error_cb": connection}
    try:
        listener = kbatch.Listener(config, topics, _named(name, "--handler"), **options)
    except kbatch.ConfigError as error:
        raise Failure(job.settings.explain(str(error)), USAGE) from None
    return listener, topics, options


def _named(where: Any, what: str) -> Any:
    """The object that ``module:name`` names."""
    module, colon, name = where.partition(":") if isinstance(where, str) else ("", "", "")
    if not (module and colon and name):
        raise Failure(f"{what} takes MODULE:NAME, such as shop.billing:handle", USAGE)
    try:
        found: Any = importlib.import_module(module)
        for each in name.split("."):
            found = getattr(found, each)
    except Exception as error:  # whatever the module does at its import
        raise Failure(f"{what}: cannot import {where}: {named_exception_text(error)}", USAGE) from None
    return found


@contextlib.contextmanager
def _watched(
    listener: kbatch.Listener, log: Log, connection: Connection, interrupt: Interrupt, bar: Bar
) -> Iterator[None]:
    """Tells how it goes, and passes on the wish to stop, while the main thread runs the listener."""
    over = threading.Event()

    def watch() -> None:
        is_stopping = False
        told, told_at = listener.stats(), monotonic()
        while not over.wait(_LOOK_EVERY_S):
            stats, now = listener.stats(), monotonic()
            if interrupt.requested and not is_stopping:
                is_stopping = True
                log.tell("stopping: what is being handled may end; another signal does not wait for it")
                listener.stop()
            if stats["handled"] > told["handled"]:
                connection.answered(all_is_well=True)
            connection.look()
            if now - told_at >= _TELL_EVERY_S:
                handled = stats["handled"] - told["handled"]
                if handled:
                    log.tell(f"{_told(listener)}; {handled / (now - told_at):,.0f}/s")
                told, told_at = stats, now
            if bar.is_seen:
                bar.show(0, f"{_told(listener)}, {stats['in_flight']:,} under way")

    thread = threading.Thread(target=watch, name="kbatch-listen-watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
