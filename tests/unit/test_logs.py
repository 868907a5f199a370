"""Whatever a handler or a filter of logs raises ends nothing of kbatch, and it may ask a listener how it is."""

import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kbatch import Envelope, OutboxError, RetryPolicy
from kbatch._inbox._keeper import Keeper
from kbatch._logs import Reminder, tell
from kbatch._outbox._group import GroupCommit
from kbatch._receiving._transacting import Transacting
from kbatch._transactions import Transactions
from kbatch.testing import MemoryListener
from tests import inboxes
from tests.waiting import until

from .test_group_commit import Outbox, added, ended
from .test_inbox_keeper import FakeInbox
from .test_listener_reading import Consumer, P, reading_of, record, take


@pytest.fixture
def refused() -> Iterator[list[str]]:
    """The lines that a filter of logs refuses."""
    lines: list[str] = []

    def refuse(line: logging.LogRecord) -> bool:
        lines.append(line.getMessage())
        raise ZeroDivisionError

    logger = logging.getLogger("kbatch")
    logger.addFilter(refuse)
    yield lines
    logger.removeFilter(refuse)


def test_a_line_names_the_place_that_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("one")
    tell("%d of %s", 1, "two", exc_info=error)
    tell("three", level=logging.ERROR)
    first, second = caplog.records
    assert (first.getMessage(), first.levelno, first.name, second.levelno) == ("1 of two", 30, "kbatch", 40)
    assert first.exc_info is not None
    assert first.exc_info[1] is error
    assert {Path(each.pathname).name for each in (first, second)} == {"test_logs.py"}


def test_what_it_raises_is_dropped(refused: list[str]) -> None:
    tell("%d of %s", 1, "two")
    assert refused == ["1 of two"]


def test_a_listener_reads_on_and_commits(refused: list[str]) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, close_timeout_s=0)
    reading._limits = reading._limits._replace(max_poll_interval_s=0.0)
    consumer.records = [record(0), record(1)]
    consumer.errors = [(-195, "no broker", None, -1, -1)]
    reading._turn()
    done, _ = take(reading, 2)
    reading._next_look = 0.0
    reading._turn()  # a handler has run for long
    reading.done(done)
    reading._turn()
    consumer.answers = [[("orders", 0, 15)]]  # of the commit
    reading._turn()
    with mock.patch.object(consumer, "commit", lambda offsets, timeout: [(*offsets[0], 15)]):
        reading._commit_and_wait(None, 1.0)
    consumer.commits.clear()
    consumer.started = lambda: True  # type: ignore[method-assign]
    consumer.closed = lambda: False  # type: ignore[attr-defined]
    reading._finish()
    assert consumer.commits == [[("orders", 0, 1)]]
    told = ["no broker", "has run for", "has run for", "and tries again", "is read again", "handlers still ran"]
    assert [text in line for text, line in zip(told, refused, strict=True)] == [True] * 6


def test_a_listener_gives_partitions_away(refused: list[str]) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, close_timeout_s=0)
    consumer.records = [record(7)]
    reading._turn()
    take(reading, 1)
    consumer.change = (False, [P])
    reading._turn()
    assert consumer.answered == 2
    assert "orders [0] at offset 7" in refused[0]


def test_a_second_error_of_a_listener_keeps_nobody_waiting(refused: list[str]) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0), record(1)]
    reading._turn()
    for work in take(reading, 2):
        reading.fail(work, ValueError("of a handler"))
    stats = reading.stats()
    assert (stats["failed"], stats["running"]) == (2, 0)
    assert refused == ["a listener ends for another error already; this one came, too"]


def test_a_handler_of_logs_may_ask_a_listener_how_it_is() -> None:
    answered: list[bool] = []

    def ask(line: logging.LogRecord) -> bool:
        asking = threading.Thread(target=reading.stats, daemon=True)
        asking.start()
        asking.join(5)
        answered.append(not asking.is_alive())
        return True

    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0), record(1)]
    reading._turn()
    logger = logging.getLogger("kbatch")
    logger.addFilter(ask)
    try:
        for work in take(reading, 2):
            reading.fail(work, ValueError("of a handler"))
    finally:
        logger.removeFilter(ask)
    assert answered == [True]


def test_an_outage_of_an_inbox_blames_no_record(
    tmp_path: Path, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.0)
    inbox = inboxes.made(tmp_path)
    listener = MemoryListener(lambda *_: None, inbox=inbox, retry=RetryPolicy(max_attempts=1), dead_letter_topic="dead")
    with inboxes.transaction(inbox):
        (outcome,) = listener.send(Envelope(data=b"x"))
    assert (outcome.outcome, outcome.errors) == ("waiting", [])
    assert listener.stats()["attempts_failed"] == 0
    (outcome,) = listener.send(Envelope(data=b"x"))
    assert outcome.outcome == "handled"
    assert "waits for its inbox" in refused[-1]


def test_an_outage_of_transactions_blames_no_record(refused: list[str]) -> None:
    transacting = Transacting({"bootstrap.servers": "nowhere:1", "group.id": "g"}, "one", "kbatch", None)
    transacting._tell("a transaction of a listener was not committed, and is tried again: %s", "no broker")
    assert len(refused) == 1


def test_an_inbox_is_looked_after_again(refused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbatch._inbox._keeper._FIRST_NOTE_S", 0.01)
    monkeypatch.setattr("kbatch._inbox._keeper._NOTE_EVERY_S", 0.01)
    inbox: Any = FakeInbox()
    note = mock.Mock(side_effect=[sqlite3.OperationalError("no answer"), {("orders", 0): (1, 2)}, {}, {}, {}, {}])
    keeper = Keeper(inbox, "billing", note)
    keeper.start()
    try:
        until(lambda: inbox.noted, "a note after the one that failed")
    finally:
        keeper.stop()
    assert "could not be looked after" in refused[0]


def test_an_outbox_whose_connection_does_not_close_is_written_by_the_same_thread(refused: list[str]) -> None:
    outbox = Outbox()
    group = GroupCommit(outbox)
    assert added(group, 1) == [None]
    thread = group._thread

    def fault(step: str) -> None:
        if step in ("insert", "close"):
            raise OutboxError("cut")

    outbox.fault = fault
    (error,) = added(group, 2)
    assert isinstance(error, OutboxError)
    outbox.fault = lambda step: None
    assert added(group, 3) == [None]
    assert group._thread is thread
    ended(group)
    assert refused == ["the connection to an outbox did not close: OutboxError: cut"]


class Held:
    """Batches of a producer whose transaction cannot be committed."""

    def __init__(self, _: object) -> None:
        self.calls: list[int] = []
        self.concluded: list[Any] = []

    def transaction_call(self, call: int, timeout_ms: int) -> Any:
        self.calls.append(call)
        return None if len(self.calls) > 1 else (47, "another epoch", False, False, True)

    def is_finishing(self) -> bool:
        return False

    def wait_until_settled(self, batch: Any) -> None:
        pass

    def conclude(self, batch: Any, code: int = 0, *, unknown: bool = False) -> None:
        self.concluded.append((code, unknown))


def test_a_transaction_that_cannot_be_committed_is_aborted(refused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbatch._transactions.HeldBatches", Held)
    core: Any = None
    transactions: Any = Transactions(core, core, 1.0)
    transactions._commit([None] * 3)
    assert transactions._held.calls == [2, 3]
    assert len(transactions._held.concluded) == 1
    assert not transactions.is_undecided
    assert refused == ["a transaction of 3 envelopes is aborted: another epoch"]


def test_a_trouble_is_told_at_once_once_a_minute_and_at_once_when_it_has_come_back() -> None:
    trouble = Reminder()
    told = []
    for now in (0.0, 1.0, 59.0, 60.0, 61.0, 120.0, 121.0):
        if now == 121.0:
            trouble.told_at = None  # it was over
        if trouble.tells_now(now):
            told.append(now)
    assert told == [0.0, 60.0, 120.0, 121.0]
