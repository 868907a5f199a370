"""``kbatch inbox``: what is in it, and what may go."""

import datetime
import json
from collections.abc import Iterable

from kbatch._fastmap import wall_time
from kbatch._text import counted
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._outbox import _confirmed, _seconds, _text, _time, _when
from kbatch.cli._place import InboxPlace
from kbatch.cli._screen import Screen
from kbatch.cli._tables import number, sheet


def status(place: InboxPlace, count_up_to: int, as_json: bool, screen: Screen) -> int:
    """What is in the inbox."""
    found = place.open().status(count_up_to=count_up_to)
    if as_json:
        safe = {group: None if until is None else until.isoformat() for group, until in found.safe_until.items()}
        screen.say(json.dumps({"handled": found.handled, "safe_until": safe}))
        return 0
    table = sheet(place)
    table.add_row("ids that were handled", number(found.handled, count_up_to))
    for group, until in sorted(found.safe_until.items()):
        table.add_row(_text(f"committed by {group} up to"), "not known" if until is None else _when(until))
    screen.show(table)
    return 0


def purge(place: InboxPlace, age: str, claims: Iterable[str], yes: bool, as_json: bool, screen: Screen) -> int:
    """Deletes ids."""
    older_than_s = _seconds("--older-than", age)
    committed = dict(map(_claim, claims))
    inbox = place.open()
    if not (yes or _confirmed(_question(age, committed), inbox.status(count_up_to=1).handled, False, screen)):
        return 1
    try:
        purged = inbox.purge(older_than_s, committed=committed)
    except ValueError:
        raise Failure(f"--older-than is out of range: {age}", USAGE) from None
    screen.say(json.dumps({"purged": purged}) if as_json else f"{counted(purged, 'id')} purged")
    return 0


def _question(age: str, committed: dict[str, datetime.datetime]) -> str:
    said = ", ".join(f"{group} up to {_when(until)}" for group, until in committed.items())
    told = f"; committed, as you say: {said}" if said else ""
    return f"purge ids that were handled {age} ago or before, for good{told}?"


def _claim(text: str) -> tuple[str, datetime.datetime]:
    """A group, and up to when all that it had handled is committed."""
    group, equals, time = text.rpartition("=")
    if not (group and equals):
        raise Failure("--committed takes GROUP=TIME, such as billing=now", USAGE)
    if time == "now":
        return group, datetime.datetime.fromtimestamp(wall_time(), datetime.timezone.utc)
    return group, _time("--committed", time)
