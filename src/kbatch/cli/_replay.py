"""``kbatch replay`` and ``kbatch dead-topic``: records that failed, shown and sent back."""

import contextlib
import datetime
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

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
Headers: TypeAlias = list[tuple[str, "bytes | None"]]


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

    def open(self, connection: Connection) -> TopicReader:
        """What reads their topic."""
        self.places()  # wrong ones are told before a broker is asked
        return TopicReader(self.settings, self.range, connection, self.connect_timeout_s)

    def read(self, reader: TopicReader, interrupt: Interrupt) -> Iterator[Message]:
        """They, one after the other."""
        places = self.places()
        given = 0
        for message in reader.messages(lambda: interrupt.requested):
            if message is None:
                continue
            if places and (message.partition(), message.offset()) not in places:
                continue
            headers, reason = _known(message)
            if self.error is not None and self.error not in reason:
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
    with contextlib.ExitStack() as stack:
        # Counted first: what comes meanwhile is not meant.
        targets: Counter[str] = Counter()
        lost = unreadable = 0
        ends: dict[int, int] = {}
        places = job.letters.places()
        with Interrupt(None, _GRACE_S) as interrupt:
            reader = stack.enter_context(job.letters.open(connection))
            for message in job.letters.read(reader, interrupt):
                number, offset = message.partition() or 0, message.offset() or 0
                places.discard((number, offset))
                ends[number] = offset
                try:
                    target = _target(headers_of(message), job.to)
                except kbatch.DeserializationError:
                    unreadable += 1
                    continue
                if target is None:
                    lost += 1
                else:
                    targets[target] += 1
        if interrupt.requested:
            return interrupt.status
        if places:
            raise _not_found(places)
        if lost:
            raise Failure(
                f"{counted(lost, 'record does', 'records do')} not say which topic was the first; give --to TOPIC",
                USAGE,
            )
        if unreadable:
            screen.tell(f"{counted(unreadable, 'record')} left out: the name of a header is not UTF-8")
        found = sum(targets.values())
        shown = ", ".join(f"{count:,} to {topic}" for topic, count in sorted(targets.items()))
        if job.dry_run or not found:
            status = _tell(job, 0, found, shown if found else "nothing is there to be replayed", screen)
        elif _confirmed(f"replay {counted(found, 'record')} ({shown})?", found, job.yes, screen):
            sent, interrupt = _send(job, reader, connection, ends, found)
            status = _tell(job, sent, found, shown, screen)
            if interrupt.requested:
                return interrupt.status
        else:
            return 1
        return 1 if unreadable and not job.dry_run else status


def _not_found(places: Collection[tuple[int, int]]) -> Failure:
    return Failure(f"{counted(len(places), 'record')} not found")


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


def _send(
    job: ReplayJob, reader: TopicReader, connection: Connection, ends: dict[int, int], found: int
) -> tuple[int, Interrupt]:
    """Sends what was counted. Returns how much was acknowledged, and whether it was told to stop."""
    config = {"log_level": "0", **shared_config(job.letters.settings.values), "error_cb": connection}
    try:
        producer = kbatch.Producer(config, wire="raw")
    except ConfigError as error:
        raise Failure(job.letters.settings.explain(str(error)), USAGE) from None
    sent = 0
    with producer, Interrupt(lambda: _give_up(producer), _GRACE_S) as interrupt:
        batch: list[kbatch.Envelope[Any]] = []

        def flush() -> int:
            acked = 0
            if batch and not interrupt.requested:
                # Closed by a second signal: nothing more is sent.
                with contextlib.suppress(kbatch.ProducerClosedError):
                    acked = producer.send_batch(None, batch).acked
            batch.clear()
            return acked

        # Partitions may come in another order this time: not the first so many, but those up to the ends.
        for message in replace(job.letters, count=None).read(reader, interrupt):
            if (message.offset() or 0) > ends.get(message.partition() or 0, -1):
                continue
            try:
                headers = headers_of(message)
            except kbatch.DeserializationError:
                continue
            batch.append(_without_failure(message, headers, _target(headers, job.to) or ""))
            if sent + len(batch) == found:
                break
            if len(batch) == _BATCH:
                full = len(batch)
                acked = flush()
                sent += acked
                if acked < full:
                    return sent, interrupt
        return sent + flush(), interrupt


def _give_up(producer: kbatch.Producer) -> None:
    # What is lost is told by its batch.
    with contextlib.suppress(kbatch.UndeliveredError):
        producer.close(0)


def _target(headers: Headers, to: str | None) -> str | None:
    origin = None if to is not None else origin_of(headers)
    return to if origin is None else origin.topic


def _without_failure(message: Message, headers: Headers, topic: str) -> kbatch.Envelope[Any]:
    failed = any(name in FAILURE_HEADERS for name, _ in headers)
    kept = [pair for pair in headers if pair[0] not in FAILURE_HEADERS and not (failed and pair[0] in _ATTEMPTS)]
    value = message.value()
    return raw_copy(topic, message.key(), value.encode() if isinstance(value, str) else value, kept)


# -- looking at dead letters


def list_letters(letters: Letters, as_json: bool, screen: Screen) -> int:
    """A line of each."""
    table = Table("place", "failed", "origin", "key", "attempts", "error")
    found = 0
    with Interrupt(None, _GRACE_S) as interrupt, letters.open(Connection(screen)) as reader:
        for message in letters.read(reader, interrupt):
            found += 1
            summary = _summary(message)
            if as_json:
                screen.say(json.dumps(summary))
                continue
            cells = (summary["failed_at"], summary["origin"], _shown(_key(message)), summary["attempts"])
            table.add_row(summary["place"], *(_text(None if each is None else str(each)) for each in cells),
                          _text(summary["error"]))  # fmt: skip
        if not as_json:
            screen.show(table) if found else screen.say("no records")
        return interrupt.status if interrupt.requested else 0


def show_letters(letters: Letters, as_json: bool, screen: Screen) -> int:
    """Everything about some."""
    places = letters.places()
    with Interrupt(None, _GRACE_S) as interrupt, letters.open(Connection(screen)) as reader:
        for message in letters.read(reader, interrupt):
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
        raise _not_found(places)
    return 0


def _known(message: Message) -> tuple[dict[str, bytes | None], str]:
    """The headers of a record, and why it failed."""
    try:
        headers = dict(headers_of(message))
    except kbatch.DeserializationError as error:
        return {}, error.reason
    return headers, _reason(headers)


def _summary(message: Message) -> dict[str, Any]:
    headers, reason = _known(message)
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
        "error": reason,
    }


def _key(message: Message) -> bytes | None:
    key = message.key()
    return key.encode() if isinstance(key, str) else key


def _reason(headers: dict[str, bytes | None]) -> str:
    parts = [(headers.get(name) or b"").decode("utf-8", "replace") for name in ("exception-type", "exception-message")]
    return ": ".join(part for part in parts if part)
