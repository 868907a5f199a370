"""Dead letters, and what waits, in an outbox that no relay works on: the public suite, and what is about our databases.

Of the original's compliance suite of the administration of dead letters these are here:

- summaries with no options: `test_summaries_with_no_options`
- summaries after, before, within a time range: `test_summaries_after_before_and_within_a_time_range`
- big queries: `test_big_queries`
- paging and totals: `test_paging_and_totals`
- discard by query: `test_discard_by_query`
- replay by query: `test_replay_by_query`
- discard and replay by a batch of messages: `test_discard_and_replay_by_a_batch_of_messages`

Of its suite of a message store:

- delete a dead letter by id: `test_discard_and_replay_by_a_batch_of_messages`
- load dead letters with a limit: `test_load_dead_letters_with_a_limit`
- load them by exception type and by message type, query from and until:
  `test_load_by_exception_type_by_message_type_and_by_time`; the type of an exception is part of the text of an error
- edit and replay a dead letter: `test_edit_and_replay_a_dead_letter`
- query scheduled, by message type; cancel scheduled by id, by type: `test_query_and_cancel_scheduled_by_type_and_by_id`
- reschedule: `test_reschedule`

Left out:

- query by the replayable flag: there is none; a letter is replayed at once, by the call
- summarize scheduled: nothing counts by kinds what is scheduled; `status` has its number
"""

import functools
import re
import sqlite3
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import ConfigError, Envelope, OutboxError, OutboxQuery, SqliteOutbox
from kbatch.testing.compliance import DeadLetterCompliance
from tests import outboxes
from tests.outboxes import Outbox
from tests.packed import checksummed

ALL = OutboxQuery()
LONG_AGO = datetime(2026, 11, 23, 9, 0, tzinfo=timezone.utc)


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox()


def bury(outbox: Outbox, *envelopes: Envelope[Any], error: str = "refused", **times: Any) -> None:
    """Adds envelopes that have died, an hour after each other."""
    (before,) = outboxes.query(outbox, "SELECT coalesce(max(died_at), ?) FROM {dead}".replace("?", str(ms(LONG_AGO))))
    outboxes.add(outbox, envelopes, topic="orders")
    outboxes.query(
        outbox,
        "INSERT INTO {dead} (bucket, seq, id, packed, created_at, deliver_by, died_at, attempts, last_error) "
        "SELECT bucket, seq, id, packed, created_at, deliver_by, "
        f"{before[0]} + 3600000 * row_number() OVER (ORDER BY seq), 3, '{error}' FROM {{outbox}}",
    )
    outboxes.query(outbox, "DELETE FROM {outbox}")


def ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def keyed(*keys: str, **options: Any) -> list[Envelope[Any]]:
    return [Envelope(data=key.encode(), key=key, **options) for key in keys]


def numbers(letters: Any) -> list[int]:
    return [letter.number for letter in letters]


def changes(outbox: Outbox) -> int:
    return int(outboxes.query(outbox, "SELECT changes FROM {meta}")[0][0])


@outboxes.in_sqlite
@pytest.mark.parametrize(
    ("kind", "says", "possibly"),
    [
        (sqlite3.OperationalError, "disk I/O error", True),
        (sqlite3.OperationalError, "database or disk is full", False),
        (sqlite3.IntegrityError, "FOREIGN KEY constraint failed", False),
    ],
)
def test_a_change_that_may_be_made_when_the_disk_fails_says_so(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, kind: type[sqlite3.Error], says: str, possibly: bool
) -> None:
    class Failing(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                raise kind(says)
            return super().execute(sql, *arguments)

    bury(outbox, *keyed("a"))
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Failing))
    with pytest.raises(OutboxError, match=says) as caught:
        outbox.dead_letters.discard(ALL)
    assert caught.value.possibly_persisted is possibly


# -- finding


def test_a_dead_letter_shows_what_it_is_and_why_it_died(outbox: Outbox) -> None:
    until = datetime(2036, 1, 1, tzinfo=timezone.utc)
    bury(outbox, Envelope({"n": 1}, key="k", partition=2, message_type="order.placed", deliver_by=until), error="why")
    (letter,) = outbox.dead_letters.find()
    assert (letter.number, letter.topic, letter.partition, letter.key) == (1, "orders", 2, b"k")
    assert (letter.message_type, letter.attempts, letter.error) == ("order.placed", 3, "why")
    assert letter.deliver_by == until
    assert letter.died_at == LONG_AGO + timedelta(hours=1)
    assert abs(letter.added_at - datetime.now(timezone.utc)) < timedelta(minutes=1)
    envelope = letter.envelope
    assert (envelope.id, envelope.data, envelope.key, envelope.topic) == (letter.id, b'{"n":1}', b"k", "orders")
    topic, partition, _, key, value, headers = letter.record
    assert (topic, partition, key, value) == ("orders", 2, b"k", b'{"n":1}')
    assert dict(headers)["id"] == str(letter.id).encode()
    assert "packed" not in repr(letter)


def test_the_id_of_an_envelope_is_its_own_whatever_the_format_writes(new_outbox: Callable[..., Outbox]) -> None:
    outbox = new_outbox(wire="raw")
    envelope = Envelope(data=b"1")
    bury(outbox, envelope)
    (letter,) = outbox.dead_letters.find()
    assert letter.id == letter.envelope.id == envelope.id


def test_a_damaged_letter_is_found_and_may_be_replayed_or_discarded(outbox: Outbox) -> None:
    bury(outbox, *keyed("a", "b", "c"))
    outboxes.query(outbox, f"UPDATE {{dead}} SET packed = {outboxes.literal(outbox, b'0')} WHERE seq < 3")
    letter = outbox.dead_letters.find()[0]
    assert (letter.number, letter.topic, letter.key, letter.error) == (1, None, None, "refused")
    with pytest.raises(kbatch.DeserializationError, match="version is not 1"):
        letter.envelope  # noqa: B018
    assert outbox.dead_letters.replay(OutboxQuery(numbers=[1])) == 1
    assert outbox.dead_letters.discard(OutboxQuery(numbers=[2])) == 1
    assert numbers(outbox.dead_letters.find()) == [3]


@outboxes.in_sqlite
@pytest.mark.parametrize(
    ("packed", "error"),
    [("X'00'", "version is not 1"), ("'text'", "must be bytes, not str"), ("7", "must be bytes, not int")],
)
def test_a_letter_of_other_types_is_found_by_its_number_and_may_be_discarded(
    outbox: Outbox, packed: str, error: str
) -> None:
    bury(outbox, *keyed("a", "b"))
    outboxes.query(outbox, f"UPDATE {{dead}} SET packed = {packed}, id = 'x', created_at = 'y' WHERE seq = 1")
    (letter, _) = outbox.dead_letters.find()
    assert (letter.id, letter.topic, letter.key) == (None, None, None)
    for look in (lambda: letter.envelope, lambda: letter.record):
        with pytest.raises(kbatch.DeserializationError, match=error):
            look()
    assert outbox.dead_letters.replay(OutboxQuery(numbers=[1])) == 0
    assert outbox.dead_letters.discard(OutboxQuery(numbers=[1])) == 1
    assert numbers(outbox.dead_letters.find()) == [2]


def test_a_record_that_is_no_message_of_the_format_is_shown_as_far_as_it_goes(outbox: Outbox) -> None:
    bury(outbox, Envelope(data=b"1", key="a"))
    # One header, whose name this format reads, and whose value it cannot.
    content = b"\x01\x00" + bytes(8) + b"\xff" * 4 + b"\x07orders" + b"\x02k" + b"\x01" + b"\x0bdeliver-by" + b"\x02x"
    packed = checksummed(content + b"\x02v")
    outboxes.query(outbox, f"UPDATE {{dead}} SET packed = {outboxes.literal(outbox, packed)}")
    (letter,) = outbox.dead_letters.find()
    assert (letter.topic, letter.key, letter.message_type) == ("orders", b"k", None)
    assert letter.record[4] == b"v"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": 7}, "numbers must be a collection, not int"),
        ({"numbers": "7"}, "numbers must be a collection, not str"),
        ({"numbers": [True]}, "numbers must hold int only, not bool"),
        ({"numbers": ["7"]}, "numbers must hold int only, not str"),
        ({"ids": ["7"]}, "ids must hold UUID only, not str"),
        ({"topic": b"t"}, "topic must be str, not bytes"),
        ({"error": 7}, "error must be str, not int"),
        ({"since": "now"}, "since must be a datetime, not str"),
        ({"until": datetime(2026, 1, 1)}, "until must have a time zone"),
    ],
)
def test_wrong_queries(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        OutboxQuery(**options)


def test_wrong_calls(outbox: Outbox, tmp_path: Path) -> None:
    letters, scheduled = outbox.dead_letters, outbox.scheduled
    for call in (
        letters.find,
        letters.replay,
        letters.discard,
        letters.summary,
        scheduled.cancel,
        scheduled.find,
        scheduled.summary,
    ):
        with pytest.raises(TypeError, match=r"query must be a kbatch.OutboxQuery, not dict"):
            call({})  # type: ignore[arg-type]
    for limit in (0, True, "7"):
        with pytest.raises(ConfigError, match="limit must be an int"):
            letters.find(limit=limit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"envelope must be a kbatch.Envelope, not bytes"):
        letters.replay_edited(1, b"")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="due_at must have a time zone"):
        scheduled.reschedule(ALL, datetime(2026, 1, 1))
    with pytest.raises(ConfigError, match="due_at must be a datetime, not int"):
        scheduled.reschedule(ALL, 7)  # type: ignore[arg-type]
    with pytest.raises(OutboxError, match="there is no database"):
        SqliteOutbox(tmp_path / "none.db").dead_letters.find()


class TestDeadLetters(outboxes.OurStores, DeadLetterCompliance):
    pass


# -- replaying


def test_an_expired_letter_is_not_replayed_into_nothing(outbox: Outbox) -> None:
    bury(outbox, *keyed("a", "b", "c", deliver_by=datetime(2036, 1, 1, tzinfo=timezone.utc)))
    outboxes.query(outbox, "UPDATE {dead} SET deliver_by = 1 WHERE seq = 1")
    outboxes.query(outbox, "UPDATE {dead} SET deliver_by = NULL WHERE seq = 2")
    assert outbox.dead_letters.replay(ALL) == 2
    assert numbers(outbox.dead_letters.find()) == [1]


@outboxes.in_sqlite
def test_what_the_hot_table_would_not_take_is_not_replayed(outbox: Outbox) -> None:
    bury(outbox, *keyed("a", "b"))
    outboxes.query(outbox, "UPDATE {dead} SET deliver_by = 'soon' WHERE seq = 1")
    assert outbox.dead_letters.replay(ALL) == 1
    assert numbers(outbox.dead_letters.find()) == [1]


def test_what_was_scheduled_for_a_time_that_has_passed_since_it_was_added_can_be_edited(outbox: Outbox) -> None:
    bury(outbox, *keyed("a"))
    outboxes.query(outbox, f"UPDATE {{dead}} SET created_at = {ms(LONG_AGO) * 1000}")
    envelope = outbox.dead_letters.find()[0].envelope
    outbox.dead_letters.replay_edited(1, envelope.replace(scheduled_time=LONG_AGO + timedelta(hours=1)))
    assert outboxes.query(outbox, "SELECT seq, created_at FROM {outbox}") == [(1, ms(LONG_AGO) * 1000)]


def test_an_edit_that_cannot_be_sent_changes_nothing(outbox: Outbox) -> None:
    bury(outbox, *keyed("a"))
    letters = outbox.dead_letters
    envelope = letters.find()[0].envelope
    with pytest.raises(kbatch.SerializationError, match="topic"):
        letters.replay_edited(1, Envelope(data=b"1"))
    with pytest.raises(kbatch.SerializationError, match="bytes"):
        letters.replay_edited(1, envelope.replace(data=b"x" * 2_000_000))
    with pytest.raises(OutboxError, match="the envelope has expired"):
        letters.replay_edited(1, envelope.replace(deliver_by=LONG_AGO))
    with pytest.raises(kbatch.NotYetDueError, match="scheduled_time"):
        letters.replay_edited(1, envelope.replace(scheduled_time=datetime.now(timezone.utc) + timedelta(days=1)))
    with pytest.raises(OutboxError, match="there is no dead letter 2"):
        letters.replay_edited(2, envelope)
    assert (outboxes.bodies(outbox), outboxes.bodies(outbox, "dead")) == ([], [b"a"])


# -- what waits


def test_what_holds_back_no_key_makes_no_relay_look_again(outbox: Outbox) -> None:
    day = timedelta(days=1)
    outboxes.add(outbox, keyed("a", "b", scheduled_time=datetime.now(timezone.utc) + day))
    bury(outbox, *keyed("c"))
    outboxes.add(outbox, [Envelope(data=b"without a key", topic="orders")])
    outboxes.move_to_later(outbox, 4, 4)
    before = changes(outbox)
    assert outbox.scheduled.reschedule(ALL, LONG_AGO) == 3
    assert outbox.scheduled.cancel(ALL) == 3
    assert outbox.dead_letters.discard(ALL) == 1
    assert changes(outbox) == before
    assert outbox.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)


def test_paging_and_totals(outbox: Outbox) -> None:
    bury(outbox, *keyed(*(f"k{n}" for n in range(50))))
    outboxes.query(outbox, "UPDATE {dead} SET last_error = 'too large' WHERE seq % 2 = 0")
    letters, large = outbox.dead_letters, OutboxQuery(error="too large")
    pages: list[list[int]] = []
    last: Any = None
    while page := letters.find(large, limit=10, after=last):
        pages.append(numbers(page))
        last = page[-1]
        # What died before does not move what is on the next page.
        letters.discard(OutboxQuery(numbers=pages[-1][:1]))
    assert pages == [list(range(first, first + 20, 2)) for first in (2, 22)] + [[42, 44, 46, 48, 50]]
    assert {error: count for _, _, error, count in letters.summary()} == {"refused": 25, "too large": 22}
    assert sum(each.letters for each in letters.summary()) == outbox.status().dead == 47
    assert [each.letters for each in letters.summary(large)] == [len(letters.find(large, limit=None))] == [22]


def test_discard_and_replay_by_a_batch_of_messages(outbox: Outbox) -> None:
    bury(outbox, *keyed(*"abcdefgh"))
    letters = outbox.dead_letters
    ids = {letter.number: letter.id for letter in letters.find()}

    def these(*wanted: int) -> OutboxQuery:
        return OutboxQuery(ids=[id for number in wanted if (id := ids[number]) is not None])

    assert letters.discard(these(2)) == 1
    assert letters.discard(these(1, 2, 5)) == 2  # one of which is gone
    assert letters.replay(these(3, 5, 8)) == 2
    assert letters.replay(these(3, 8)) == 0
    assert (outboxes.bodies(outbox), outboxes.bodies(outbox, "dead")) == ([b"c", b"h"], [b"d", b"f", b"g"])


def test_query_and_cancel_scheduled_by_type_and_by_id(outbox: Outbox) -> None:
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    for kind, *keys in (("placed", "a", "b", "c"), ("paid", "d", "e")):
        outboxes.add(outbox, keyed(*keys, message_type=kind, scheduled_time=tomorrow))
    outboxes.add(outbox, keyed("f", message_type="placed"))
    outboxes.add(outbox, keyed("g", message_type="placed", scheduled_time=tomorrow + timedelta(days=1)))
    scheduled, placed = outbox.scheduled, OutboxQuery(message_type="placed")
    by_then = OutboxQuery(message_type="placed", until=tomorrow + timedelta(hours=1))
    found = {each.key: each.id for each in scheduled.find(placed)}
    assert set(found) == {b"a", b"b", b"c", b"g"}
    assert {each.key for each in scheduled.find(by_then)} == {b"a", b"b", b"c"}
    assert found[b"b"] is not None
    assert scheduled.cancel(OutboxQuery(ids=[found[b"b"]])) == 1
    assert scheduled.cancel(by_then) == 2
    assert scheduled.cancel(placed) == 1
    assert scheduled.cancel(placed) == 0
    assert {(each.key, each.message_type) for each in scheduled.find()} == {(b"d", "paid"), (b"e", "paid")}
    assert outboxes.bodies(outbox) == [b"f"]  # which is not scheduled
