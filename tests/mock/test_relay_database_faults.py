"""What a relay does when its SQLite database is locked for long, is full or refuses a row, and with many topics."""

import contextlib
import itertools
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from kbatch import Envelope, OutboxError, Relay, RetryPolicy, SqliteOutbox
from kbatch._fastmap import monotonic
from kbatch._outbox._store import Failure, RefusedWriteError
from kbatch.testing import MockCluster
from tests import outboxes
from tests.relays import WatchedOutbox, check_history, numbered
from tests.waiting import until

from .clients import read_back, read_many
from .test_relay import make, running

LONG_S = 60.0 if os.environ.get("KBATCH_NIGHTLY", "") not in ("", "0") else 7.0


@pytest.fixture
def outbox(tmp_path: Path) -> SqliteOutbox:
    return outboxes.made(tmp_path, wire="raw")


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


def stored(cluster: MockCluster, topic: str = "orders") -> list[Any]:
    return list(read_back(cluster.bootstrap_servers, topic))


# -- locked


@pytest.mark.long
def test_a_writer_that_locks_the_database_for_longer_than_a_lease(
    outbox: SqliteOutbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.5)
    outboxes.add(outbox, numbered(range(500)))
    options = {"batch_size": 50, "max_in_flight_batches": 2, "lease_s": 5.0}
    with running(make(outbox, cluster, {"delivery.timeout.ms": 500}, **options)) as relay:
        until(lambda: relay.stats()["acked"] >= 100, "its start")
        with outboxes.transaction(outbox) as connection:
            outbox.add(connection, numbered(range(500, 600)), topic="orders")
            time.sleep(LONG_S)
        assert relay.drain(60) == 0
    # What it had in flight when the lock came was acknowledged, and could not be recorded before its lease ran out.
    check_history(range(600), stored(cluster), copies=100)
    assert outbox.status().dead == 0


# -- full


def pages(outbox: SqliteOutbox) -> int:
    return int(outboxes.query(outbox, "PRAGMA page_count")[0][0])


class FullOutbox(WatchedOutbox):
    """An outbox of which a relay's connection finds no more room than there is, until there is."""

    def __init__(self, outbox: SqliteOutbox) -> None:
        super().__init__(outbox, before=self._limit)
        self.most = pages(outbox)

    def open_store(self) -> Any:
        store = super().open_store()
        self._store = store._store
        return store

    def _limit(self, name: str) -> None:
        if name == "settle":
            self._store._connection.execute(f"PRAGMA max_page_count = {self.most}")


def test_while_the_disk_is_full_what_is_sent_is_recorded_and_what_was_refused_waits(
    outbox: SqliteOutbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._unwritten._TRY_AGAIN_S", 0.02)
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    # A row of its own size, which finds no room in the other table before the others' room is free.
    outboxes.add(outbox, [Envelope(data=b"x" * 500_000, key="k", topic="refused")], topic=None)
    outboxes.add(outbox, numbered(range(20)))
    full = FullOutbox(outbox)
    with running(make(full, cluster)) as relay:
        until(lambda: relay.stats()["refused"] + relay.stats()["dead"] >= 1, "the refused")
        outboxes.add(outbox, numbered(range(20, 300)))
        until(lambda: outbox.status().waiting == 1, "the others, sent and recorded")
        assert outbox.status().later == 0
        full.most = 10**6
        until(lambda: outbox.status().dead == 1, "the refused, after its attempts")
        assert relay.drain(60) == 0
    check_history(range(300), stored(cluster))


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("platform: nothing mounts a small file system")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip("platform: a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run([umount, "-l", folder], check=True)


def fill(outbox: SqliteOutbox, first: int) -> int:
    """Adds until there is no more room; the number after the last one that was committed."""
    while first < 1_000_000:
        try:
            outboxes.add(outbox, numbered(range(first, first + 50)))
        except (OutboxError, sqlite3.OperationalError) as error:
            assert "full" in str(error)  # noqa: PT017
            return first
        first += 50
    raise AssertionError("it is not small")


@pytest.mark.long
def test_a_full_disk_loses_what_could_not_be_committed_and_a_relay_goes_on_once_there_is_room(
    tmp_path: Path, cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 8) as folder:
        outbox = outboxes.made(folder, wire="raw")
        (folder / "ballast").write_bytes(bytes(4_000_000))
        end = fill(outbox, 0)
        assert end
        with running(make(outbox, cluster, batch_size=100, max_in_flight_batches=1)) as relay:
            until(lambda: "is full" in caplog.text, "that the relay cannot write")
            (folder / "ballast").unlink()
            assert relay.drain(60) == 0
        # What it could not record before its lease ran out was sent again.
        check_history(range(end), stored(cluster), copies=200)
        assert outboxes.query(outbox, "PRAGMA integrity_check") == [("ok",)]


# -- a row that cannot be moved


@pytest.mark.parametrize("table", ["dead", "later"])
def test_a_row_that_cannot_be_moved_stops_no_other_and_is_moved_when_it_can_be(
    new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    outbox = new_outbox(wire="raw")
    monkeypatch.setattr("kbatch._outbox._unwritten._TRY_AGAIN_S", 0.02)
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.refuse_rows(outbox, table, number=3)
    outboxes.add(outbox, numbered(range(5), topic="refused"), topic=None)
    options: dict[str, Any] = {"lease_s": 5.0}
    with running(make(outbox, cluster, {"delivery.timeout.ms": 500}, **options)) as relay:
        until(lambda: outbox.status().dead == 4, "the others that were refused")
        for first in range(0, 300, 100):
            outboxes.add(outbox, numbered(range(first, first + 100)))
            until(lambda: outbox.status().waiting + outbox.status().later == 1, "what came later")
        assert relay.stats()["lost_buckets"] == 0
        assert outboxes.query(outbox, "SELECT seq FROM {outbox} UNION ALL SELECT seq FROM {later}") == [(3,)]
        outboxes.take_rows(outbox, table)
        until(lambda: outbox.status().dead == 5, "it can be moved now")
        assert relay.stats()["dead"] == 5  # it was not sent again meanwhile
        assert relay.drain(30) == 0
    check_history(range(300), stored(cluster))


def test_a_row_that_cannot_be_moved_does_not_keep_its_bucket_from_another_relay(
    new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster
) -> None:
    outbox = new_outbox(wire="raw")
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(40), keys=40, topic="refused"), topic=None)
    bucket, number = max(outboxes.query(outbox, "SELECT bucket, seq FROM {outbox}"))  # one that the first gives up
    outboxes.refuse_rows(outbox, "later", number=number)
    with running(make(outbox, cluster)) as first:
        until(lambda: outbox.status().dead == 39, "the others that were refused")
        assert first.stats()["buckets"] == 64
        with running(make(outbox, cluster)) as second:
            until(lambda: (first.stats()["buckets"], second.stats()["buckets"]) == (32, 32), "half for each")
            with outboxes.transaction(outbox) as connection:
                outbox.add(connection, numbered(range(200), keys=200), topic="orders")
                found = connection.execute(outbox._tables.sql("SELECT DISTINCT bucket FROM {outbox}")).fetchall()
                assert (bucket,) in found
            until(lambda: outboxes.query(outbox, "SELECT seq FROM {outbox}") == [(number,)], "what came later")
            outboxes.take_rows(outbox, "later")
            assert second.drain(30) == 0
        assert first.stats()["lost_buckets"] == second.stats()["lost_buckets"] == 0
    assert outbox.status().dead == 40
    check_history(range(200), stored(cluster))


def test_a_row_that_cannot_be_moved_is_found_among_many_by_halves(
    new_outbox: Callable[..., outboxes.Outbox],
) -> None:
    outbox = new_outbox(wire="raw")
    outboxes.add(outbox, numbered(range(256), keys=256))
    outboxes.refuse_rows(outbox, "dead", number=100)
    found = outboxes.query(outbox, "SELECT bucket, seq FROM {outbox} ORDER BY seq")
    calls: list[str] = []
    watched = WatchedOutbox(outbox, before=calls.append)
    with Relay(watched, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0.0) as relay:
        relay._loop._begin()
        relay._loop._renew()
        relay._loop._unwritten.failures = [Failure(*place, None, 1, "refused", None) for place in found]
        relay._loop._unwritten.write(relay._loop._store, relay._loop._note_lost)
        assert outbox.status().dead == 99
        relay._loop._unwritten.failures_at = 0.0  # its time has come
        relay._loop._unwritten.write(relay._loop._store, relay._loop._note_lost)
        assert outbox.status().dead == 255
        assert [failure.seq for failure in relay._loop._unwritten.failures] == [100]
        relay._loop._end()
    assert calls.count("settle") < 50


def test_a_row_that_cannot_be_moved_does_not_keep_a_relay_that_reaches_no_broker_from_standing_aside(
    outbox: SqliteOutbox,
) -> None:
    outboxes.refuse_rows(outbox, "later")
    outboxes.add(outbox, numbered(range(1)))
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0.0) as relay:
        relay._loop._begin()
        relay._loop._renew()
        ((bucket, seq),) = outboxes.query(outbox, "SELECT bucket, seq FROM {outbox}")
        relay._loop._unwritten.failures = [Failure(bucket, seq, 1.0, 1, "refused", None)]
        for _ in range(5):
            relay._gate.note("failed", None, monotonic())
        relay._gate._opened_at -= 60.0
        relay._loop._use_store()
        assert relay.stats()["buckets"] == 64  # it asks for leases once a second
        relay._loop._renew_at = 0.0
        relay._loop._use_store()
        assert relay.stats()["buckets"] == 0
        assert relay._loop._unwritten.failures == []
        relay._loop._end()
    assert outbox.status().relays == 0


def test_a_lease_that_is_lost_while_failures_are_moved_by_halves_counts_once(
    outbox: SqliteOutbox, caplog: pytest.LogCaptureFixture
) -> None:
    outboxes.add(outbox, numbered(range(8), keys=1))
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0.0) as relay:
        relay._loop._begin()
        relay._loop._renew()
        bucket = outboxes.query(outbox, "SELECT bucket FROM {outbox} LIMIT 1")[0][0]
        relay._loop._unwritten.failures = [Failure(bucket, seq, None, 1, "refused", None) for seq in range(1, 8)]
        relay._loop._unwritten.failures.append(Failure((bucket + 1) % 64, 8, None, 1, "refused", None))
        store = relay._loop._store

        class Store:
            def settle(self, tokens: Any, *, failures: Any, **_: Any) -> set[int]:
                if any(failure.seq == 8 for failure in failures):
                    raise RefusedWriteError("no room")
                return set(tokens)

        relay._loop._store = Store()  # type: ignore[assignment]
        relay._loop._unwritten.write(relay._loop._store, relay._loop._note_lost)
        assert [failure.seq for failure in relay._loop._unwritten.failures] == [8]
        relay._loop._store = store
        assert (relay.stats()["lost_buckets"], relay.stats()["buckets"]) == (1, 63)
        assert caplog.text.count("lost the leases of 1 bucket") == 1
        relay._loop._end()


def test_a_relay_that_cannot_move_what_is_refused_reads_no_more_of_it_than_it_may_have_in_flight(
    new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = new_outbox(wire="raw")
    monkeypatch.setattr("kbatch._outbox._unwritten._TRY_AGAIN_S", 0.01)
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.refuse_rows(outbox, "later")
    outboxes.add(outbox, numbered(range(100), keys=100, topic="refused"), topic=None)
    tries: list[int] = []

    def before(name: str) -> None:
        if name == "settle" and len(relay._loop._unwritten.failures) >= 10:
            tries.append(len(relay._loop._unwritten.failures))

    relay = make(WatchedOutbox(outbox, before=before), cluster, batch_size=5, max_in_flight_batches=2)
    with running(relay):
        until(lambda: len(tries) >= 50, "that it has tried again and again")
        assert max(tries) < 20
        outboxes.take_rows(outbox, "later")
        assert relay.drain(60) == 0
    assert outbox.status().dead == 100


@pytest.mark.parametrize("batch_size", [100, 5])
def test_a_relay_that_is_to_finish_does_not_wait_for_what_cannot_be_moved(
    new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster, batch_size: int
) -> None:
    outbox = new_outbox(wire="raw")
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.refuse_rows(outbox, "later")
    outboxes.add(outbox, numbered(range(10)))
    with running(make(outbox, cluster, batch_size=batch_size, max_in_flight_batches=1)) as relay:
        until(lambda: relay.stats()["acked"] == 10, "the others")
        outboxes.add(outbox, numbered(range(20), keys=20, topic="refused"), topic=None)
        most = min(batch_size, 20)  # it reads no more then
        until(
            lambda: relay._loop._unwritten.refusal.told_at is not None and len(relay._loop._unwritten.failures) >= most,
            "that they cannot be moved",
        )
        relay._finish()
        until(lambda: not relay._run_lock.locked(), "its end", 10)
    check_history(range(10), stored(cluster))
    assert outbox.status().waiting == 20


def test_what_is_scheduled_and_cannot_be_moved_stops_no_other(
    new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._admission._TRY_AGAIN_S", 0.02)
    outbox = new_outbox(wire="raw")
    soon = datetime.now(timezone.utc) + timedelta(days=1)
    # The first, one in the middle and the last of those that are due; their times are their deliver_by.
    refused = {0: soon + timedelta(days=1, seconds=1), 7: soon + timedelta(days=1, seconds=1)}
    refused[19] = refused[0]
    for number in range(20):
        outboxes.add(outbox, numbered([number], scheduled_time=soon, deliver_by=refused.get(number)))
    outboxes.add(outbox, numbered(range(20, 40)))
    outboxes.refuse_rows(outbox, "outbox", deliver_by=True)
    outboxes.query(outbox, "UPDATE {later} SET due_at = 0")
    with running(make(outbox, cluster)) as relay:
        until(lambda: relay.stats()["acked"] == 37, "the others")
        assert outbox.status().scheduled == 3
        outboxes.add(outbox, numbered(range(40, 45), scheduled_time=datetime.now(timezone.utc)))
        soon = datetime.now(timezone.utc) + timedelta(seconds=0.1)
        outboxes.add(outbox, numbered(range(45, 50), scheduled_time=soon))
        until(lambda: relay.stats()["acked"] == 47, "what came later")
        outboxes.take_rows(outbox, "outbox")
        assert relay.drain(30) == 0
    check_history(range(50), stored(cluster), in_order=False)


# -- many topics


def test_five_hundred_topics_mixed(new_outbox: Callable[..., outboxes.Outbox], cluster: MockCluster) -> None:
    outbox = new_outbox(wire="raw")
    names = [f"topic-{n}" for n in range(500)]
    for name in names:
        cluster.create_topic(name, partitions=1)
    for first in range(0, 10_000, 1000):
        outboxes.add(
            outbox,
            [Envelope(data=b"%d" % n, key=f"k{n % 500}", topic=names[n % 500]) for n in range(first, first + 1000)],
            topic=None,
        )
    with make(outbox, cluster, {"delivery.timeout.ms": 30_000}) as relay:
        assert relay.drain(60) == 0
    records = read_many(cluster.bootstrap_servers, names)
    assert {name: [int(record.value() or b"") for record in records[name]] for name in names} == {
        name: list(range(n, 10_000, 500)) for n, name in enumerate(names)
    }


def test_a_topic_that_does_not_exist_stops_no_other_and_its_messages_are_sent_once_it_does(
    outbox: SqliteOutbox, cluster: MockCluster
) -> None:
    cluster.set_topic_error("missing", "UNKNOWN_TOPIC_OR_PART")
    outboxes.add(outbox, numbered(range(100), topic="missing"), topic=None)
    producer = {"topic.metadata.propagation.max.ms": 100, "topic.metadata.refresh.interval.ms": 200}
    patient = RetryPolicy(max_attempts=None, initial_backoff_s=0.02, max_backoff_s=0.1)
    with running(make(outbox, cluster, producer, retry=patient)) as relay:
        for first in range(0, 500, 100):
            outboxes.add(outbox, numbered(range(first, first + 100)))
            until(lambda: relay.stats()["acked"] >= first + 100, "the others")  # noqa: B023
        assert relay.stats()["dead"] == 0
        cluster.set_topic_error("missing", 0)
        assert relay.drain(60) == 0
    check_history(range(500), stored(cluster))
    check_history(range(100), stored(cluster, "missing"))


def test_drain_beside_run_waits_for_the_database_as_run_does(outbox: SqliteOutbox, cluster: MockCluster) -> None:
    failures: Iterator[int] = iter(range(3))

    def before(name: str) -> None:
        if name == "left" and next(failures, None) is not None:
            raise OutboxError("the outbox in shop.db: database is locked")

    watched = WatchedOutbox(outbox, before=before)
    with running(make(watched, cluster)) as relay:
        outboxes.add(outbox, numbered(range(10)))
        assert relay.drain(60) == 0
        assert next(failures, None) is None
        failures = itertools.count()
        with pytest.raises(OutboxError, match="locked"):
            relay.drain(0.1)
    check_history(range(10), stored(cluster))


@contextlib.contextmanager
def run_by_another(outbox: Any) -> Iterator[Relay]:
    """A relay to which it seems that another thread is in `run`."""
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}) as relay, relay._run_lock:
        yield relay


def test_drain_beside_run_keeps_one_connection_while_the_database_answers(outbox: SqliteOutbox) -> None:
    calls: list[str] = []
    answers = iter([1, 1, None, 1, 0])

    def before(name: str) -> None:
        calls.append(name)
        if name == "left":
            answer = next(answers)
            if answer is None:
                raise OutboxError("cut")
            if not answer:
                outboxes.query(outbox, "DELETE FROM {outbox}")

    outboxes.add(outbox, numbered(range(10)))
    with run_by_another(WatchedOutbox(outbox, before=before)) as relay:
        assert relay.drain(60) == 0
    one = ["open_store", "left"]
    assert calls == [*one, "left", "left", "close", *one, "left", "close"]


def test_drain_beside_run_does_not_ask_again_when_the_answer_has_taken_all_its_time(
    outbox: SqliteOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("kbatch._outbox._relay.monotonic", lambda: now[0])

    def before(name: str) -> None:
        now[0] += 10.0
        raise OutboxError("no answer")

    with run_by_another(WatchedOutbox(outbox, before=before)) as relay, pytest.raises(OutboxError, match="no answer"):
        relay.drain(1)
    assert now == [10.0]


def test_threads_that_add_and_a_writer_that_holds_the_lock_again_and_again(
    outbox: SqliteOutbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.05)
    over = threading.Event()

    def lock() -> None:
        while not over.wait(0.05):
            with outboxes.transaction(outbox):
                time.sleep(0.2)

    thread = threading.Thread(target=lock)
    with running(make(outbox, cluster, batch_size=50)) as relay:
        thread.start()
        try:
            for first in range(0, 1000, 100):
                outboxes.add(outbox, numbered(range(first, first + 100)))
            assert relay.drain(60) == 0
            assert relay.stats()["lost_buckets"] == 0
        finally:
            over.set()
            thread.join()
    check_history(range(1000), stored(cluster))
