"""``kbatch replay`` and ``kbatch dead-topic``: records that failed, shown and sent back."""

import datetime
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from confluent_kafka import Message
from rich.table import Table

import kbatch
from kbatch._errors import ConfigError
from kbatch._receiving._copies import shared_config
from kbatch._receiving._failures import FAILURE_HEADERS, origin_of, raw_copy
from kbatch._text import counted, printable
from kbatch.cli._connection import Connection
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._interrupt import Interrupt
from kbatch.cli._outbox import _confirmed, _shown, _text
from kbatch.cli._record_text import headers_of, record_line, record_text
from kbatch.cli._screen import Screen
from kbatch.cli._settings import Settings
from kbatch.cli._topic_reader import Range, TopicReader

_BATCH = 500
_GRACE_S = 30.0
_ATTEMPTS = ("attempts", "ce_attempts")


@dataclass(frozen=True)
class Letters:
    """Which records of the topic."""

    range: Range
    settings: Settings
    wire: str = "kbatch"
    which: Collection[str] = ()  # PARTITION:OFFSET
    error: str | None = None
    origin: str | None = None
    connect_timeout_s: float = 10.0
    count: int | None = None

    def places(self) -> set[tuple[int, int]]:
        """Those that are named one by one."""
        found = set()
        for each in self.which:
            match = re.fullmatch("([0-9]{1,9}):([0-9]{1,18})", each)
            if match is None:
                raise Failure("a record is named by PARTITION:OFFSET, such as 0:17", USAGE)
            found.add((int(match[1]), int(match[2])))
        return found

    def read(self, connection: Connection, interrupt: Interrupt) -> Iterator[Message]:
        """They, one after the other."""
        places = self.places()
        given = 0
        with TopicReader(self.settings, self.range, connection, self.connect_timeout_s) as reader:
            for message in reader.messages(lambda: interrupt.requested):
                if message is None:
                    continue
                headers = dict(headers_of(message))
                if places and (message.partition(), message.offset()) not in places:
                    continue
                if self.error is not None and self.error not in _reason(headers):
                    continue
                if self.origin is not None and (found := origin_of(headers.items())) is not None:
                    if found.topic != self.origin:
                        continue
                elif self.origin is not None:
                    continue
                yield message
                given += 1
                if given == self.count:
                    return


@dataclass(frozen=True)
class ReplayJob:
    """What the command line asks for."""

    letters: Letters
    to: str | None
    dry_run: bool
    yes: bool
    as_json: bool


def replay(job: ReplayJob, screen: Screen) -> int:
    """Sends records back and returns the exit status: 0 if each of them was acknowledged."""
    connection = Connection(screen)
    with Interrupt(lambda: None, _GRACE_S) as interrupt:
        # Counted first: what comes meanwhile is not meant.
        targets: Counter[str] = Counter()
        lost = 0
        ends: dict[int, int] = {}
        for message in job.letters.read(connection, interrupt):
            target = _target(message, job.to)
            ends[message.partition() or 0] = message.offset() or 0
            if target is None:
                lost += 1
            else:
                targets[target] += 1
        if interrupt.requested:
            return interrupt.status
        if lost:
            raise Failure(
                f"{counted(lost, 'record does', 'records do')} not say which topic was the first; give --to TOPIC",
                USAGE,
            )
        found = sum(targets.values())
        shown = ", ".join(f"{count:,} to {topic}" for topic, count in sorted(targets.items()))
        if job.dry_run or not found:
            return _tell(job, 0, found, shown if found else "nothing is there to be replayed", screen)
        if not _confirmed(f"replay {counted(found, 'record')} ({shown})?", found, job.yes, screen):
            return 1
        sent = _send(job, connection, interrupt, ends, found)
        status = _tell(job, sent, found, shown, screen)
        return interrupt.status if interrupt.requested else status


def _tell(job: ReplayJob, sent: int, found: int, shown: str, screen: Screen) -> int:
    if job.as_json:
        screen.say(json.dumps({"replayed": sent, "found": found, "dry_run": job.dry_run}))
    elif job.dry_run or not found:
        screen.say(f"would be replayed: {shown}" if found else shown)
    else:
        screen.say(
            f"{counted(sent, 'record')} replayed: {shown}" if sent == found else f"{sent:,} of {found:,} replayed"
        )
    return 0 if job.dry_run or sent == found else 1


def _send(job: ReplayJob, connection: Connection, interrupt: Interrupt, ends: dict[int, int], found: int) -> int:
    config = {"log_level": "0", **shared_config(job.letters.settings.values), "error_cb": connection}
    try:
        producer = kbatch.Producer(config, wire="raw")
    except ConfigError as error:
        raise Failure(job.letters.settings.explain(str(error)), USAGE) from None
    sent = 0
    with producer:
        batch: list[kbatch.Envelope[Any]] = []

        def flush() -> int:
            acked = producer.send_batch(None, batch).acked if batch else 0
            batch.clear()
            return acked

        # Partitions may come in another order this time: not the first so many, but those up to the ends.
        for message in replace(job.letters, count=None).read(connection, interrupt):
            if (message.offset() or 0) > ends.get(message.partition() or 0, -1):
                continue
            batch.append(_without_failure(message, _target(message, job.to) or ""))
            if sent + len(batch) == found:
                break
            if len(batch) == _BATCH:
                full = len(batch)
                acked = flush()
                sent += acked
                if acked < full:
                    return sent
        return sent + flush()


def _target(message: Message, to: str | None) -> str | None:
    origin = None if to is not None else origin_of(headers_of(message))
    return to if origin is None else origin.topic


def _without_failure(message: Message, topic: str) -> kbatch.Envelope[Any]:
    headers = headers_of(message)
    failed = any(name in FAILURE_HEADERS for name, _ in headers)
    kept = [pair for pair in headers if pair[0] not in FAILURE_HEADERS and not (failed and pair[0] in _ATTEMPTS)]
    value = message.value()
    return raw_copy(topic, message.key(), value.encode() if isinstance(value, str) else value, kept)


# -- looking at dead letters


def list_letters(letters: Letters, as_json: bool, screen: Screen) -> int:
    """A line of each."""
    table = Table("place", "failed", "origin", "key", "attempts", "error")
    found = 0
    with Interrupt(lambda: None, _GRACE_S) as interrupt:
        for message in letters.read(Connection(screen), interrupt):
            found += 1
            headers = dict(headers_of(message))
            if as_json:
                screen.say(json.dumps(_summary(message, headers)))
                continue
            summary = _summary(message, headers)
            cells = (summary["failed_at"], summary["origin"], _shown(_key(message)), summary["attempts"])
            table.add_row(summary["place"], *(_text(None if each is None else str(each)) for each in cells),
                          _text(_reason(headers)))  # fmt: skip
        if not as_json:
            screen.show(table) if found else screen.say("no records")
        return interrupt.status if interrupt.requested else 0


def show_letters(letters: Letters, as_json: bool, screen: Screen) -> int:
    """Everything about some."""
    places = letters.places()
    with Interrupt(lambda: None, _GRACE_S) as interrupt:
        for message in letters.read(Connection(screen), interrupt):
            places.discard((message.partition() or 0, message.offset() or 0))
            if as_json:
                screen.print(record_line(message, letters.wire))
            else:
                screen.print(record_text(message, letters.wire))
            if letters.which and not places:
                break
        if interrupt.requested:
            return interrupt.status
    if places:
        raise Failure(f"{counted(len(places), 'record')} not found")
    return 0


def _summary(message: Message, headers: dict[str, bytes | None]) -> dict[str, Any]:
    origin = origin_of(headers.items())
    failed_at = headers.get("failed-at") or b""
    at = None
    if re.fullmatch(rb"[0-9]{1,15}", failed_at) and int(failed_at) < 253_402_300_800_000:
        moment = datetime.datetime.fromtimestamp(int(failed_at) / 1000, datetime.timezone.utc)
        at = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
    attempts = headers.get("attempts") or headers.get("ce_attempts")
    return {
        "place": f"{message.partition()}:{message.offset()}",
        "failed_at": at,
        "origin": None if origin is None else f"{origin.topic} [{origin.partition}] {origin.offset}",
        "key": None if message.key() is None else printable(_shown(_key(message)) or ""),
        "attempts": None if attempts is None else printable(attempts.decode("utf-8", "replace")),
        "error": _reason(headers),
    }


def _key(message: Message) -> bytes | None:
    key = message.key()
    return key.encode() if isinstance(key, str) else key


def _reason(headers: dict[str, bytes | None]) -> str:
    parts = [(headers.get(name) or b"").decode("utf-8", "replace") for name in ("exception-type", "exception-message")]
    return ": ".join(part for part in parts if part)
