"""``kbatch outbox``: what is in it, dead letters and what waits."""

import base64
import dataclasses
import datetime
import json
import re
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import kbatch
from kbatch._fastmap import wall_time
from kbatch._text import counted, printable
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._place import OutboxPlace
from kbatch.cli._screen import Screen
from kbatch.cli._tables import number, sheet

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LETTER = ("dead letter", "dead letters")
_MESSAGE = ("message", "messages")
_PAGE = 1000


@dataclass(frozen=True)
class Selection:
    """Which messages the command line means."""

    which: Sequence[str] = ()
    topic: str | None = None
    message_type: str | None = None
    error: str | None = None
    older_than: str | None = None
    newer_than: str | None = None
    is_all: bool = False

    def query(self, *, needed: bool = False) -> kbatch.OutboxQuery:
        """The same as a query; with `needed` the command line must say something."""
        numbers = [int(each) for each in self.which if re.fullmatch("[0-9]{1,18}", each)]
        ids = [_uuid(each) for each in self.which if not re.fullmatch("[0-9]{1,18}", each)]
        if numbers and ids:
            raise Failure("give numbers or ids, not both at a time", USAGE)
        query = kbatch.OutboxQuery(
            numbers=numbers or None,
            ids=ids or None,
            topic=self.topic,
            message_type=self.message_type,
            error=self.error,
            since=None if self.newer_than is None else _from_now("--newer-than", self.newer_than, -1),
            until=None if self.older_than is None else _from_now("--older-than", self.older_than, -1),
        )
        if needed and query.is_all != self.is_all:
            what = "numbers or ids, --topic, --type or --error"
            raise Failure(f"--all goes without {what}" if self.is_all else f"say which: {what}; or --all", USAGE)
        return query


def _uuid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise Failure("a message is named by its number, or by its id, which is a UUID", USAGE) from None


def _seconds(option: str, age: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", age)
    if match is None:
        raise Failure(f"{option} takes a number and s, m, h or d, such as 90s, 15m, 2h, 7d", USAGE)
    return int(match[1]) * _UNITS[match[2]]


def _from_now(option: str, age: str, sign: int) -> datetime.datetime:
    """A time before now, or after it."""
    seconds = _seconds(option, age)
    now = datetime.datetime.fromtimestamp(wall_time(), datetime.timezone.utc)
    try:
        return now + sign * datetime.timedelta(seconds=seconds)
    except OverflowError:
        raise Failure(f"{option} is out of range: {age}", USAGE) from None


# -- all of it


def status(place: OutboxPlace, count_up_to: int, as_json: bool, screen: Screen) -> int:
    """What is in the outbox."""
    outbox = place.open()
    found = outbox.status(count_up_to=count_up_to)
    if as_json:
        screen.say(json.dumps(dataclasses.asdict(found)))
        return 0

    table = sheet(place)
    table.add_row("to be sent", number(found.waiting, count_up_to))
    table.add_row("  the oldest was added", f"{_span(found.oldest_age_s)} ago" if found.waiting else "-")
    table.add_row("refused, and tried again later", number(found.later, count_up_to))
    table.add_row("scheduled", number(found.scheduled, count_up_to))
    table.add_row("dead letters", number(found.dead, count_up_to))
    table.add_row("relays at work", str(found.relays))
    if isinstance(outbox, kbatch.PostgresOutbox):
        table.add_row("rows whose room vacuum has not freed yet", f"{found.unvacuumed:,}")
    screen.show(table)
    return 0


# -- dead letters


def list_dead(place: OutboxPlace, selection: Selection, limit: int, offset: int, as_json: bool, screen: Screen) -> int:
    """A page of them."""
    letters = place.open().dead_letters
    query = selection.query()
    page = letters.find(query, limit=limit + offset + 1 if limit else None)[offset:]
    return _list(page, limit, offset, as_json, screen, _LETTER)


def count_dead(place: OutboxPlace, selection: Selection, as_json: bool, screen: Screen) -> int:
    """How many are alike."""
    return _list_counts(place.open().dead_letters.summary(selection.query()), as_json, screen, _LETTER)


def show_dead(place: OutboxPlace, selection: Selection, as_json: bool, screen: Screen) -> int:
    """Everything about some."""
    return _show(place.open().dead_letters.find(selection.query(), limit=None), selection, as_json, screen, _LETTER)


def replay_dead(place: OutboxPlace, selection: Selection, as_json: bool, screen: Screen) -> int:
    """Has them sent again."""
    letters = place.open().dead_letters
    query = selection.query(needed=True)
    found = sum(each.letters for each in letters.summary(query))
    replayed = letters.replay(query)
    if as_json:
        screen.say(json.dumps({"replayed": replayed, "left": found - replayed}))
    else:
        screen.say(f"{counted(replayed, *_LETTER)} will be sent again")
        if replayed < found:
            screen.say(f"{found - replayed:,} stay dead: they have expired, or cannot be read")
    return 0 if replayed == found and replayed >= _named(query) else 1


def discard_dead(place: OutboxPlace, selection: Selection, yes: bool, as_json: bool, screen: Screen) -> int:
    """Deletes them."""
    letters = place.open().dead_letters
    query = selection.query(needed=True)
    meant = query if yes else _asked("discard", letters.find, query, _LETTER, screen)
    if meant is None:
        return 1
    discarded = letters.discard(meant)
    screen.say(json.dumps({"discarded": discarded}) if as_json else f"{counted(discarded, *_LETTER)} discarded")
    return 0 if discarded >= _named(query) else 1


def edit_dead(
    place: OutboxPlace,
    number: int,
    body: Path | None,
    topic: str | None,
    key: str | None,
    as_json: bool,
    screen: Screen,
) -> int:
    """Has one sent again, changed."""
    if body is None and topic is None and key is None:
        raise Failure("say what is changed: --body FILE, --to TOPIC or --key KEY", USAGE)
    letters = place.open().dead_letters
    found = letters.find(kbatch.OutboxQuery(numbers=[number]))
    if not found:
        raise Failure(f"there is no dead letter {number}")
    changes: dict[str, Any] = {} if topic is None else {"topic": topic}
    if key is not None:
        changes["key"] = key
    if body is not None:
        changes["data"] = _content(body)
    try:
        letters.replay_edited(number, found[0].envelope.replace(**changes))
    except (kbatch.SerializationError, kbatch.DeserializationError, TypeError, ValueError) as error:
        raise Failure(str(error)) from None
    screen.say(json.dumps({"replayed": 1}) if as_json else f"dead letter {number} will be sent again, changed")
    return 0


def _content(body: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(body) == "-" else body.read_bytes()
    except OSError as error:
        raise Failure(f"--body {printable(str(body))}: {error.strerror}", USAGE) from None


# -- what waits


def list_later(place: OutboxPlace, selection: Selection, limit: int, offset: int, as_json: bool, screen: Screen) -> int:
    """A page of it."""
    page = place.open().scheduled.find(selection.query(), limit=limit + offset + 1 if limit else None)[offset:]
    return _list(page, limit, offset, as_json, screen, _MESSAGE)


def count_later(place: OutboxPlace, selection: Selection, as_json: bool, screen: Screen) -> int:
    """How much of it is alike."""
    return _list_counts(place.open().scheduled.summary(selection.query()), as_json, screen, _MESSAGE)


def cancel_later(place: OutboxPlace, selection: Selection, yes: bool, as_json: bool, screen: Screen) -> int:
    """Deletes it."""
    scheduled = place.open().scheduled
    query = selection.query(needed=True)
    meant = query if yes else _asked("cancel", scheduled.find, query, _MESSAGE, screen)
    if meant is None:
        return 1
    cancelled = scheduled.cancel(meant)
    screen.say(json.dumps({"cancelled": cancelled}) if as_json else f"{counted(cancelled, *_MESSAGE)} cancelled")
    return 0 if cancelled >= _named(query) else 1


def reschedule_later(
    place: OutboxPlace, selection: Selection, at: str | None, within: str | None, as_json: bool, screen: Screen
) -> int:
    """Has it sent at another time."""
    if (at is None) == (within is None):
        raise Failure("say when: --at TIME or --in AGE", USAGE)
    due_at = _time("--at", at) if within is None else _from_now("--in", within, 1)
    query = selection.query(needed=True)
    moved = place.open().scheduled.reschedule(query, due_at)
    screen.say(json.dumps({"rescheduled": moved}) if as_json else f"{counted(moved, *_MESSAGE)} due {_when(due_at)}")
    return 0 if moved >= _named(query) else 1


def _time(option: str, text: str | None) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat((text or "").replace("Z", "+00:00"))
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise Failure(f"{option} takes a time with its zone, such as 2030-01-31T12:00:00Z", USAGE)
    try:
        return time.astimezone(datetime.timezone.utc)
    except OverflowError:
        raise Failure(f"{option} is out of range: {text}", USAGE) from None


# -- parts


def _named(query: kbatch.OutboxQuery) -> int:
    """How many messages were named one by one."""
    return len(query.numbers or query.ids or ())


def _asked(
    verb: str, find: Callable[..., list[Any]], query: kbatch.OutboxQuery, nouns: tuple[str, str], screen: Screen
) -> kbatch.OutboxQuery | None:
    """The messages that `query` means now, if somebody says yes to them: not what comes while that is thought over."""
    numbers: list[int] = []
    last = None
    while page := find(query, limit=_PAGE, after=last):
        numbers += [each.number for each in page]
        last = page[-1]
    if not _confirmed(f"{verb} {counted(len(numbers), *nouns)} for good?", len(numbers), False, screen):
        return None
    return dataclasses.replace(query, numbers=numbers)


def _confirmed(question: str, found: int, yes: bool, screen: Screen) -> bool:
    if yes or not found:
        return True
    if not screen.is_asked:
        raise Failure(f"{question} Say so by --yes", USAGE)
    return screen.ask(question)


def _list(page: Sequence[Any], limit: int, offset: int, as_json: bool, screen: Screen, nouns: tuple[str, str]) -> int:
    more = bool(limit) and len(page) > limit
    page = page[:limit] if limit else page
    if as_json:
        for each in page:
            screen.say(json.dumps(_summary(each)))
        return 0
    if not page:
        screen.say(f"no {nouns[1]}" + (" there" if offset else ""))
        return 0
    is_dead = isinstance(page[0], kbatch.DeadLetter)
    table = Table("number", "died" if is_dead else "due", "topic", "key", "type", "tries", "error")
    table.columns[0].justify = table.columns[5].justify = "right"
    for each in page:
        at = each.died_at if is_dead else each.due_at
        cells = (each.topic, _shown(each.key), each.message_type, str(each.attempts), each.error)
        table.add_row(str(each.number), _when(at), *map(_text, cells))
    screen.show(table)
    if more:
        screen.tell(f"there are more: --offset {offset + limit}, or --limit 0 for all")
    return 0


def _list_counts(
    counts: Sequence[kbatch.DeadLetterCount | kbatch.ScheduledCount],
    as_json: bool,
    screen: Screen,
    nouns: tuple[str, str],
) -> int:
    if as_json:
        for each in counts:
            screen.say(json.dumps(each._asdict()))
        return 0
    if not counts:
        screen.say(f"no {nouns[1]}")
        return 0
    table = Table(counts[0]._fields[-1], "topic", "type", "error")
    table.columns[0].justify = "right"
    for topic, message_type, error, count in counts:
        table.add_row(f"{count:,}", _text(topic), _text(message_type), _text(error))
    screen.show(table)
    return 0


def _show(found: Sequence[Any], selection: Selection, as_json: bool, screen: Screen, nouns: tuple[str, str]) -> int:
    for each in found:
        if as_json:
            screen.say(json.dumps(_details(each)))
        else:
            screen.show(_card(each))
            screen.print(_body(each) + "\n")
    missing = _named(selection.query()) - len(found)
    if missing > 0:
        raise Failure(f"{counted(missing, *nouns)} not found")
    return 0


def _summary(message: Any) -> dict[str, Any]:
    is_dead = isinstance(message, kbatch.DeadLetter)
    return {
        "number": message.number,
        "id": None if message.id is None else str(message.id),
        "topic": message.topic,
        "partition": message.partition,
        **_plain("key", message.key),
        "message_type": message.message_type,
        "added_at": message.added_at.isoformat(),
        **({"died_at": message.died_at.isoformat()} if is_dead else {"due_at": message.due_at.isoformat()}),
        "deliver_by": None if message.deliver_by is None else message.deliver_by.isoformat(),
        "attempts": message.attempts,
        "error": message.error,
    }


def _details(message: Any) -> dict[str, Any]:
    try:
        _, _, timestamp, _, value, headers = message.record
    except kbatch.DeserializationError as error:
        return {**_summary(message), "damaged": error.reason}
    return {
        **_summary(message),
        "timestamp": timestamp,
        "headers": [{"name": name, **_plain("value", text)} for name, text in headers],
        **_plain("value", value),
    }


def _plain(name: str, value: bytes | None) -> dict[str, str | None]:
    """Bytes as text if they are UTF-8."""
    if value is None:
        return {name: None}
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {name + "_base64": base64.b64encode(value).decode()}


def _card(message: Any) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    is_dead = isinstance(message, kbatch.DeadLetter)
    rows = [
        ("number", str(message.number)),
        ("id", None if message.id is None else str(message.id)),
        ("topic", message.topic),
        ("partition", "the partitioner's choice" if message.partition is None else str(message.partition)),
        ("key", _shown(message.key)),
        ("type", message.message_type),
        ("added", _when(message.added_at)),
        ("died", _when(message.died_at)) if is_dead else ("due", _when(message.due_at)),
        ("deliver by", None if message.deliver_by is None else _when(message.deliver_by)),
        ("attempts", str(message.attempts)),
        ("error", message.error),
    ]
    try:
        rows += [(f"header {printable(name)}", _shown(value)) for name, value in message.record[5]]
    except kbatch.DeserializationError as error:
        rows.append(("damaged", error.reason))
    for name, value in rows:
        table.add_row(Text(name), _text(value))
    return table


def _body(message: Any) -> str:
    try:
        value = message.record[4]
    except kbatch.DeserializationError:
        return ""
    if value is None:
        return "no body: a tombstone"
    try:
        text = json.dumps(json.loads(value), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = _shown(value) or ""
    return f"body, {counted(len(value), 'byte')}:\n" + "\n".join(map(printable, text.split("\n")))


def _shown(value: bytes | None) -> str | None:
    """Bytes as people read them."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "hex " + value.hex(" ")


def _text(value: str | None) -> Text:
    """A cell: what is in it is no markup."""
    return Text("-" if value is None else printable(value))


def _when(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.1f} s"
