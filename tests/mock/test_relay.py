"""A relay brings what an outbox has to Kafka: all of it, nothing else, in order per key, whatever fails meanwhile.

Of the original's compliance suite of nodes, which are relays here, these are with relays at work;
`unit/test_outbox_store.py` has the others, and says what is left out:

- the original node knows all, a second node is balanced, hand-over between nodes:
  `test_two_relays_share_the_buckets_and_the_second_one_hands_its_own_back`
- pausing stops at once: `test_it_stops_with_what_is_in_flight_written_and_may_run_again`,
  `test_a_stop_before_it_runs_ends_it_at_once`
- every bucket survives the loss of the node that held it:
  `test_one_of_three_relays_is_killed_and_the_others_take_its_buckets`
- start several, take away the first, take away another: `test_start_several_take_away_the_first_take_away_another`
- eject a stale one, and what becomes of it: `test_a_relay_whose_lease_ran_out_deletes_nothing_and_moves_nothing`,
  `test_a_relay_that_was_stopped_past_its_lease_writes_nothing_to_the_database_and_sends_nothing_new`
- registering again after an ejection: `test_a_relay_that_was_ejected_registers_again_as_itself`; one that fences takes
  another name, `test_one_that_was_taken_for_dead_begins_anew`

Of its suite of recovery:

- dormant messages are recovered: `test_a_relay_that_is_killed_at_one_of_its_steps`,
  `test_what_is_scheduled_outlives_a_relay`; those of a listener are in Kafka,
  `test_a_listener_that_is_killed_at_its_steps`
- an open circuit recovers nothing: `test_an_outage_moves_nothing_and_counts_nothing`
- the exclusive listener recovers its own inbox end to end: `test_a_listener_that_is_killed_at_its_steps`

Left out of that suite:

- clearing storage empties all tables, is idempotent: nothing clears an outbox, `create` never takes anything away
- it rebuilds dropped tables: `create` does, `test_tables_that_are_missing`; nothing else makes tables
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import CircuitState, ConfigError, Envelope, OutboxError, OutboxQuery, Relay, RetryPolicy, SqliteOutbox
from kbatch._fastmap import monotonic, packed_key_hash
from kbatch._outbox._leases import Times
from kbatch._outbox._store import Reading
from kbatch.testing import ApiKey, MockCluster
from tests import outboxes
from tests.injection import Injector
from tests.outboxes import Outbox, in_sqlite
from tests.relays import WatchedOutbox, WatchedStore, check_history, numbered
from tests.waiting import until

from .clients import read_back

SOON = RetryPolicy(max_attempts=3, initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox(wire="raw")


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        for topic in ("orders", "refused", "other"):
            cluster.create_topic(topic, partitions=3)
        yield cluster


def config(cluster: MockCluster, **own: Any) -> dict[str, Any]:
    return {
        "bootstrap.servers": cluster.bootstrap_servers,
        "log_level": 0,
        "delivery.timeout.ms": 3000,
        "reconnect.backoff.ms": 10,
        "reconnect.backoff.max.ms": 100,
        "retry.backoff.ms": 10,
        **own,
    }


def make(outbox: Any, cluster: MockCluster, producer: dict[str, Any] | None = None, **options: Any) -> Relay:
    options = {"retry": SOON, "probe_interval_s": 0.05, "max_probe_interval_s": 0.2, **options}
    return Relay(outbox, config(cluster, **(producer or {})), **options)


@contextlib.contextmanager
def running(relay: Relay) -> Iterator[Relay]:
    """In a thread of its own, until the block ends."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            relay.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    with relay:
        thread.start()
        until(lambda: relay._loop._store is not None or errors, "its start")
        yield relay
        relay.stop()
        thread.join()
    assert errors == []


def stored(cluster: MockCluster, *topics: str) -> list[Any]:
    return [record for topic in topics or ("orders",) for record in read_back(cluster.bootstrap_servers, topic)]


# -- what arrives


def test_everything_arrives_once_in_order_per_key_as_a_producer_would_have_sent_it(
    new_outbox: Callable[..., Outbox], cluster: MockCluster
) -> None:
    outbox = new_outbox()
    seeded = random.Random(7)
    moment = datetime(2026, 11, 23, 9, 16, 45, 123456, timezone.utc)
    envelopes = [
        Envelope(
            {"n": n},
            key=f"schlüssel{n % 50}",
            headers=[("n", str(n)), ("none", None), ("bytes", b"\x00\xff")],
            timestamp=1_764_000_000_000 + n,
            sent_at=moment,
            topic="orders" if n % 2 else "other",
        )
        for n in range(6000)
    ]
    rest = list(envelopes)
    while rest:
        count = seeded.randint(1, 500)
        outboxes.add(outbox, rest[:count], topic=None)
        del rest[:count]
    with make(outbox, cluster) as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["acked"] == 6000
    with kbatch.Producer(config(cluster)) as producer:
        producer.send_batch(None, [each.replace(topic="direct") for each in envelopes]).raise_for_errors()
    sent = {
        (record.timestamp, record.key, record.value, tuple(record.headers))
        for record in stored(cluster, "orders", "other")
    }
    direct = {
        (record.timestamp, record.key, record.value, tuple(record.headers)) for record in stored(cluster, "direct")
    }
    assert sent == direct
    assert len(stored(cluster, "orders", "other")) == 6000
    for topic in ("orders", "other"):
        of_key: dict[Any, list[int]] = {}
        for record in stored(cluster, topic):
            of_key.setdefault(record.key, []).append(record.timestamp)
        assert all(times == sorted(times) for times in of_key.values())
    assert outbox.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)


def test_what_is_added_while_it_runs(outbox: Outbox, cluster: MockCluster) -> None:
    with running(make(outbox, cluster, batch_size=100)) as relay:
        for first in range(0, 2000, 50):
            outboxes.add(outbox, numbered(range(first, first + 50)))
        assert relay.drain(30) == 0
    check_history(range(2000), stored(cluster))


class SlowOutbox:
    """Reading a bucket from its beginning takes `slow_s`, as where much was deleted and is kept for an old snapshot.
    Its clock is that of relays."""

    def __init__(self, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, slow_s: float) -> None:
        self.outbox, self.slow_s, self.now = outbox, slow_s, 1000.0
        self.calls: list[str] = []
        self.read_at: dict[int, list[float]] = defaultdict(list)  # of each bucket, from its beginning
        for module in ("_relay_loop", "_admission", "_unwritten"):
            monkeypatch.setattr(f"kbatch._outbox.{module}.monotonic", lambda: self.now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outbox, name)

    def open_store(self) -> Any:
        store = self.outbox.open_store()
        read = store.read

        def read_slowly(floors: dict[int, int], **options: Any) -> Reading:
            began = self.now
            chosen: dict[int, int] = {}
            for bucket, floor in floors.items():
                if self.now - began >= 2.0:
                    break
                chosen[bucket] = floor
                if floor == 0:
                    self.now += self.slow_s
                    self.read_at[bucket].append(self.now)
            rows, found, ended = read(chosen, **options)
            return Reading(rows, {**dict.fromkeys(chosen, 1), **found}, ended)

        store.read = read_slowly
        return WatchedStore(store, self.calls.append, lambda name: None)


@in_sqlite
def test_a_look_at_all_rows_that_takes_long_comes_to_its_end_before_the_next_one(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowOutbox(outbox, monkeypatch, 0.7)
    with Relay(slow, {"bootstrap.servers": "127.0.0.1:1"}) as relay:
        relay._loop._begin()
        try:
            began = slow.now
            while slow.now < began + 1000.0:
                relay._loop._use_store()
                slow.now += 2.0
        finally:
            relay._loop._end()
    assert len(slow.read_at) == 64
    looks = [at for of_bucket in slow.read_at.values() for at in of_bucket]
    assert max(of_bucket[0] for of_bucket in slow.read_at.values()) < began + 150.0
    assert len(looks) == 128  # of 44.8 s each, one in 15 minutes


@in_sqlite
def test_what_is_found_beside_a_slow_look_does_not_have_the_next_one_come_soon(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowOutbox(outbox, monkeypatch, 0.7)
    outboxes.add(outbox, numbered(range(20_000), keys=500))
    with Relay(slow, config(cluster), batch_size=500) as relay:
        relay._loop._begin()
        try:
            relay._loop._use_store()
            assert relay._loop._look_took_s == pytest.approx(2.1)
            assert relay._loop._has_to_pause(slow.now + 35.0)
        finally:
            relay._loop._end()


@in_sqlite
def test_the_next_look_at_all_waits_for_readings_and_for_no_outage(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowOutbox(outbox, monkeypatch, 0.0)
    with Relay(slow, {"bootstrap.servers": "127.0.0.1:1"}) as relay:
        relay._loop._begin()
        try:
            for trial in range(5):  # the circuit opens
                relay._gate.note("failed", None, slow.now + trial)
            slow.now += 29.0
            relay._loop._use_store()
            assert not slow.read_at
            relay._gate.note("succeeded", None, slow.now)
            relay._gate.circuit.probed(True, slow.now)
            relay._loop._use_store()
            assert len(slow.read_at) == 64
            slow.now += 2.0
            relay._loop._use_store()
            slow.now += 0.2
            relay._loop._use_store()
            assert {len(of_bucket) for of_bucket in slow.read_at.values()} == {2}
        finally:
            relay._loop._end()


@in_sqlite
def test_after_a_slow_reading_leases_are_renewed_before_the_next_one(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowOutbox(outbox, monkeypatch, 0.7)
    outboxes.add(outbox, numbered(range(5_000), keys=500))
    with Relay(slow, config(cluster)) as relay:
        relay._loop._begin()
        try:
            for _ in range(3):
                relay._loop._use_store()
            assert [name for name in slow.calls if name in ("renew", "read")] == ["renew", "read"] * 3
        finally:
            relay._loop._end()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_relay_that_reaches_no_broker_leaves_the_outbox_to_one_that_does(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._STAND_ASIDE_AFTER_S", 0.2)
    with MockCluster() as unreachable:
        unreachable.create_topic("orders", partitions=3)
        # Others would wait for its leases until this test is over.
        cut_off = make(outbox, unreachable, {"delivery.timeout.ms": 500}, failures_to_open=1, lease_s=300)
        other = make(outbox, cluster)
        with running(cut_off if is_first else other):
            until(lambda: outbox.status().relays == 1, "its leases")
            with running(other if is_first else cut_off):
                until(lambda: other.stats()["buckets"] == cut_off.stats()["buckets"] == 32, "shares")
                unreachable.set_broker_down()
                outboxes.add(outbox, numbered(range(1000)))
                assert other.drain(60) == 0
                assert cut_off.stats()["acked"] == 0
                until(lambda: other.stats()["buckets"] == 64, "all buckets")
                assert cut_off.stats()["buckets"] == 0
                assert outbox.status().relays == 1
                unreachable.set_broker_up()
                until(lambda: other.stats()["buckets"] == cut_off.stats()["buckets"] == 32, "shares again")
    check_history(range(1000), stored(cluster))


def test_it_looks_again_soon_after_an_add_in_its_process_and_not_in_a_child(outbox: Outbox) -> None:
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1"}) as relay:
        relay._loop._begin()
        for pid, poll_s in ((os.getpid() + 1, 0.1), (os.getpid(), 0.005)):
            relay._loop._poll_s, relay._loop._pid = 0.1, pid
            outboxes.add(outbox, numbered(range(3)))
            assert relay._loop._poll_s == poll_s
            assert relay._flag.wait(0.0) is (poll_s < 0.1)
        outboxes.add(outbox, numbered(range(3)))
        assert not relay._flag.wait(0.0)  # it looks already
        relay._loop._end()
        assert outbox._watchers == []


@pytest.mark.parametrize(("batch_size", "readings"), [(1, 4), (2, 2), (100, 1)])
def test_it_rests_when_there_is_no_more_and_not_before(outbox: Outbox, batch_size: int, readings: int) -> None:
    outboxes.add(outbox, numbered(range(3), keys=1))
    options = {"batch_size": batch_size, "close_timeout_s": 0.0}
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, **options) as relay:
        relay._loop._begin()
        relay._loop._renew()
        seen = 0
        relay._loop._read_at = 0.0
        while not relay._loop._read_at and seen < 9:
            relay._loop._send_next()
            seen += 1
        relay._loop._end()
    assert seen == readings


@in_sqlite
def test_a_transaction_that_is_long_delays_nobody(outbox: SqliteOutbox, cluster: MockCluster) -> None:
    with sqlite3.connect(outbox._path, isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute(outbox._tables.sql("SELECT count(*) FROM {outbox}")).fetchone()  # a snapshot of nothing
        outboxes.add(outbox, numbered(range(500)))
        with make(outbox, cluster) as relay:
            assert relay.drain(30) == 0
    reader.close()
    check_history(range(500), stored(cluster))


def test_rows_without_a_key_and_tombstones(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, [*(Envelope(data=b"%d" % n) for n in range(300)), kbatch.Tombstone("gone")])
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
    values = [record.value for record in stored(cluster)]
    assert sorted(int(value) for value in values if value is not None) == list(range(300))
    assert values.count(None) == 1


def test_large_records_are_read_by_their_bytes(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, [Envelope(data=b"%03d" % n * 100_000, key=str(n)) for n in range(30)])
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
        assert relay.stats()["acked"] == 30


def test_what_expires_in_the_outbox_is_not_sent(outbox: Outbox, cluster: MockCluster) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.5)
    outboxes.add(outbox, [*numbered(range(10), deliver_by=soon), *numbered(range(10, 20))])
    time.sleep(0.6)
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
        assert (relay.stats()["acked"], relay.stats()["expired"]) == (10, 10)
    check_history(range(10, 20), stored(cluster))


# -- what is scheduled


def test_what_is_scheduled_is_sent_at_its_time_and_holds_back_nothing(outbox: Outbox, cluster: MockCluster) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=4)
    outboxes.add(outbox, numbered(range(20), scheduled_time=soon))
    outboxes.add(outbox, numbered(range(20, 25), scheduled_time=soon + timedelta(days=1)))
    outboxes.add(outbox, numbered(range(30, 50)))
    with running(make(outbox, cluster)) as relay:
        until(lambda: relay.stats()["acked"] >= 20, "what is not scheduled")
        assert relay.drain(30) == 0  # it does not wait for what is due later
        until(lambda: relay.stats()["acked"] == 40, "what is scheduled")
        assert datetime.now(timezone.utc) >= soon
        assert relay.drain(30) == 0
    records = stored(cluster)
    assert [int(record.value) for record in records if record.key == b"k3"] == [43, 23 - 20]
    assert sorted(int(record.value) for record in records) == [*range(20), *range(30, 50)]
    assert outbox.status().scheduled == 5


def test_what_is_scheduled_and_then_refused_waits_as_others_do(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    patient = RetryPolicy(max_attempts=None, initial_backoff_s=0.02, max_backoff_s=0.1)
    with running(make(outbox, cluster, retry=patient)) as relay:
        outboxes.add(outbox, numbered(range(3), keys=1, topic="refused", scheduled_time=soon), topic=None)
        until(lambda: outbox.status().later == 3, "refused")
        outboxes.add(outbox, numbered(range(3, 6), keys=1, topic="refused"), topic=None)
        until(lambda: outbox.status().waiting == 3, "those behind it")
        cluster.set_topic_error("refused", 0)
        until(lambda: relay.stats()["acked"] == 6, "all")
    check_history(range(6), stored(cluster, "refused"))


def test_what_is_scheduled_outlives_a_relay(outbox: Outbox, cluster: MockCluster) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=4)
    outboxes.add(outbox, numbered(range(5), scheduled_time=soon))
    with make(outbox, cluster) as relay:
        in_time = relay.drain(0.1) == 0 and datetime.now(timezone.utc) < soon
        early = relay.stats()["acked"]
    assert not (in_time and early)
    time.sleep(max(0.0, (soon - datetime.now(timezone.utc)).total_seconds()) + 0.1)
    with make(outbox, cluster, batch_size=2) as relay:
        assert relay.drain(30) == 0
        assert early + relay.stats()["acked"] == 5
    check_history(range(5), stored(cluster))


# -- one record of a key in flight


def test_with_strict_order_one_record_of_a_key_is_in_flight_whatever_fails(
    outbox: Outbox, cluster: MockCluster
) -> None:
    outboxes.add(outbox, numbered(range(300), keys=10))
    relay = make(outbox, cluster, {"delivery.timeout.ms": 500}, strict_order=True, batch_size=20, failures_to_open=1)
    together: list[int] = []
    hand_over = relay._loop._hand_over

    def watched(flight: Any, producer: Any) -> None:
        hand_over(flight, producer)
        keys = [packed_key_hash(packed) for each in list(relay._loop._flights) for packed in each.packed]
        together.append(len(keys) - len(set(keys)))

    relay._loop._hand_over = watched  # type: ignore[method-assign]
    with running(relay):
        until(lambda: relay.stats()["acked"] >= 100, "some")
        cluster.set_broker_down()
        time.sleep(1.0)
        outboxes.add(outbox, numbered(range(300, 400), keys=10))
        cluster.set_broker_up()
        assert relay.drain(60) == 0
    assert len(together) > 20
    assert set(together) == {0}
    check_history(range(400), stored(cluster), copies=None)


def test_strict_order_and_a_topic_that_refuses(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(60), topic="refused"), topic=None)
    outboxes.add(outbox, numbered(range(100)))
    patient = RetryPolicy(max_attempts=None, initial_backoff_s=0.02, max_backoff_s=0.1)
    with running(make(outbox, cluster, strict_order=True, retry=patient)) as relay:
        until(lambda: relay.stats()["acked"] == 100, "the others")
        cluster.set_topic_error("refused", 0)
        assert relay.drain(60) == 0
    check_history(range(60), stored(cluster, "refused"))
    check_history(range(100), stored(cluster))


# -- what is refused


def test_a_topic_that_refuses_everything_stops_no_other_and_dies_after_its_attempts(
    outbox: Outbox, cluster: MockCluster
) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(100, 160), topic="refused"), topic=None)
    outboxes.add(outbox, numbered(range(100)))
    with make(outbox, cluster) as relay:
        assert relay.drain(60) == 0
        stats = relay.stats()
    check_history(range(100), stored(cluster))
    assert (stats["acked"], stats["dead"]) == (100, 60)
    assert outbox.status().dead == 60
    dead = outboxes.query(outbox, "SELECT attempts, last_error FROM {dead}")
    assert {attempts for attempts, _ in dead} == {3}
    assert all("TOPIC_AUTHORIZATION_FAILED" in error for _, error in dead)
    assert sorted(outboxes.bodies(outbox, "dead")) == sorted(b"%d" % n for n in range(100, 160))


@in_sqlite
def test_the_trial_of_a_circuit_is_what_was_not_refused_before(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(30), keys=30))
    outboxes.move_to_later(outbox, 1, 5)
    with make(outbox, cluster, failures_to_open=1) as relay:
        relay._loop._begin()
        try:
            relay._gate.note("failed", None, monotonic())
            relay._gate.circuit.probed(True, monotonic())
            relay._loop._use_store()
            assert [flight.is_due for flight in relay._loop._flights] == [False]
        finally:
            relay._loop._end()
        assert relay.drain(30) == 0
    check_history(range(30), stored(cluster))


def test_what_waits_holds_back_its_key_until_it_is_accepted(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    patient = RetryPolicy(max_attempts=None, initial_backoff_s=0.02, max_backoff_s=0.1)
    with running(make(outbox, cluster, retry=patient)) as relay:
        outboxes.add(outbox, numbered(range(20), topic="refused"), topic=None)
        until(lambda: outbox.status().later == 20, "the first of each key, refused")
        outboxes.add(outbox, numbered(range(20, 60), topic="refused"), topic=None)
        outboxes.add(outbox, numbered(range(100)))
        until(lambda: relay.stats()["acked"] == 100, "the others")
        until(lambda: outbox.status().waiting == 40, "those behind them, in their place")
        assert outbox.status().later == 20
        cluster.set_topic_error("refused", 0)
        assert relay.drain(60) == 0
    check_history(range(60), stored(cluster, "refused"))
    check_history(range(100), stored(cluster))


def test_a_key_that_is_held_back_waits_also_for_a_relay_that_starts_later(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    patient = RetryPolicy(max_attempts=None, initial_backoff_s=0.02, max_backoff_s=0.1)
    outboxes.add(outbox, numbered(range(20), topic="refused"), topic=None)
    with running(make(outbox, cluster, retry=patient)):
        until(lambda: outbox.status().later == 20, "the first of each key, refused")
    outboxes.add(outbox, numbered(range(20, 60), topic="refused"), topic=None)
    outboxes.add(outbox, numbered(range(100)))
    with running(make(outbox, cluster, retry=patient)) as relay:
        until(lambda: relay.stats()["acked"] == 100, "the others")
        until(lambda: (outbox.status().later, outbox.status().waiting) == (20, 40), "what is held back")
        cluster.set_topic_error("refused", 0)
        assert relay.drain(60) == 0
    check_history(range(60), stored(cluster, "refused"))


def test_a_row_behind_many_of_a_held_key_is_reached_however_often_all_are_looked_at_again(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._LOOK_AT_ALL_EVERY_S", 0.0)
    outboxes.add(outbox, numbered(range(1000, 1200), keys=1))
    outboxes.move_to_later(outbox, 1, 1)
    outbox.scheduled.reschedule(OutboxQuery(), datetime.now(timezone.utc) + timedelta(hours=1))
    outboxes.add(outbox, [Envelope(data=b"%d" % n, key=f"other{n}") for n in range(300)])
    ((bucket,),) = outboxes.query(outbox, "SELECT bucket FROM {later}")
    ((behind,),) = outboxes.query(outbox, f"SELECT count(*) FROM {{outbox}} WHERE bucket = {bucket} AND seq > 200")
    assert behind
    not_soon = RetryPolicy(initial_backoff_s=3600.0, max_backoff_s=3600.0)
    with running(make(outbox, cluster, retry=not_soon, batch_size=10, max_in_flight_batches=2)) as relay:
        until(lambda: relay.stats()["acked"] == 300, "the others")
    check_history(range(300), stored(cluster))
    assert outbox.status().waiting == 199


def test_a_row_that_waits_is_sent_after_the_earlier_ones_of_its_key_and_before_the_later_ones(
    outbox: Outbox, cluster: MockCluster
) -> None:
    # As after a batch that had timed out, whose records were not sent again yet, and a later one that was refused.
    outboxes.add(outbox, numbered(range(30), keys=5))
    outboxes.move_to_later(outbox, 11, 15)
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
    check_history(range(30), stored(cluster))


def test_one_record_that_is_refused_takes_none_of_its_record_batch_with_it(
    outbox: Outbox, cluster: MockCluster
) -> None:
    outboxes.add(outbox, numbered(range(500)))
    cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"])
    with make(outbox, cluster, {"max.in.flight": 1}) as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["put_off"] > 0
        assert relay.stats()["dead"] == 0
    check_history(range(500), stored(cluster), copies=None)


def test_what_is_refused_alone_is_dead_and_the_others_of_its_record_batch_are_not(
    outbox: Outbox, cluster: MockCluster
) -> None:
    outboxes.add(outbox, [Envelope(data=b"7", key="one")])
    outboxes.add(outbox, [Envelope(data=b"8", key="one")])
    cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE", "MSG_SIZE_TOO_LARGE"])
    with make(outbox, cluster, {"max.in.flight": 1}) as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["dead"] == 1
    assert outboxes.bodies(outbox, "dead") == [b"7"]
    check_history([8], stored(cluster))


@in_sqlite
def test_a_record_that_is_damaged_or_larger_than_the_relay_sends_is_dead_at_once(
    outbox: SqliteOutbox, cluster: MockCluster
) -> None:
    outboxes.add(outbox, numbered(range(20)))
    outboxes.add(outbox, [Envelope(data=b"x" * 5000)])
    outboxes.query(outbox, "UPDATE {outbox} SET packed = substr(packed, 1, 20) WHERE seq = 3")
    for wrong, seq in (("packed = 'text'", 4), ("packed = 7", 5), ("deliver_by = 'soon'", 6)):
        change = f"UPDATE {{outbox}} SET {wrong} WHERE seq = {seq}"
        with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
            outboxes.query(outbox, change)
        outboxes.query(outbox, change, "PRAGMA ignore_check_constraints = 1")
    with make(outbox, cluster, {"message.max.bytes": 2000}) as relay:
        assert relay.drain(30) == 0
        assert relay.stats()["dead"] == 5
    errors = [error for (error,) in outboxes.query(outbox, "SELECT last_error FROM {dead} ORDER BY seq")]
    assert "damaged" in errors[0]
    assert "must be bytes, not str" in errors[1]
    assert "must be bytes, not int" in errors[2]
    assert "must be bytes, not str" in errors[3]
    assert "message.max.bytes=2000" in errors[4]
    check_history(set(range(20)) - {2, 3, 4, 5}, stored(cluster))


def test_each_dead_letter_is_told_once_it_is_committed(outbox: Outbox, cluster: MockCluster) -> None:
    told: list[tuple[kbatch.DeadLetter, bool, str]] = []

    def on_dead(letter: kbatch.DeadLetter) -> None:
        is_there = outbox.dead_letters.find(OutboxQuery(numbers=[letter.number])) == [letter]
        told.append((letter, is_there, threading.current_thread().name))

    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(20)))
    outboxes.add(outbox, numbered(range(100, 160), topic="refused"), topic=None)
    with make(outbox, cluster, on_dead=on_dead) as relay:
        assert relay.drain(60) == 0
        until(lambda: len(told) >= 60, "that all are told")
    assert sorted(int(letter.envelope.data or b"") for letter, _, _ in told) == list(range(100, 160))
    assert {(is_there, thread) for _, is_there, thread in told} == {(True, "kbatch-sender-callbacks")}
    assert {(letter.topic, letter.attempts) for letter, _, _ in told} == {("refused", 3)}
    assert all("TOPIC_AUTHORIZATION_FAILED" in letter.error for letter, _, _ in told)


def test_what_was_never_dead_is_not_told(outbox: Outbox, cluster: MockCluster) -> None:
    # A message that was cancelled while it was on its way moves no row.
    told: list[object] = []
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(1), topic="refused"), topic=None)
    with running(make(outbox, cluster, on_dead=told.append, retry=RetryPolicy(max_attempts=2))) as relay:
        until(lambda: outbox.status().later == 1, "its first refusal")
        cluster.set_rtt(-1, 300)
        until(lambda: relay.stats()["in_flight"] == 1, "its second attempt")
        outbox.scheduled.cancel(OutboxQuery())
        until(lambda: relay.stats()["dead"] == 1 and not relay._loop._unwritten, "its second refusal")
    assert told == []
    assert outbox.status().dead == 0


def test_a_letter_that_cannot_be_read_yet_is_told_when_it_can(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[kbatch.DeadLetter] = []
    failures = [OutboxError("away"), OutboxError("away")]
    open_admin = outbox.open_admin

    def failing() -> Any:
        if failures:
            raise failures.pop()
        return open_admin()

    monkeypatch.setattr(outbox, "open_admin", failing)
    monkeypatch.setattr("kbatch._recovery._deaths._TRY_AGAIN_S", 0.05)
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    with running(make(outbox, cluster, on_dead=told.append, retry=RetryPolicy(max_attempts=1))):
        outboxes.add(outbox, numbered(range(1), topic="refused"), topic=None)
        until(lambda: told, "its letter")
    assert [letter.topic for letter in told] == ["refused"]


def test_a_callback_of_dead_letters_that_closes_the_relay_ends_it(outbox: Outbox, cluster: MockCluster) -> None:
    told: list[object] = []

    def on_dead(letter: kbatch.DeadLetter) -> None:
        relay.close()
        told.append(letter)

    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(3), topic="refused"), topic=None)
    relay = make(outbox, cluster, on_dead=on_dead, retry=RetryPolicy(max_attempts=1))
    relay.run()
    relay.close()
    until(lambda: len(told) == 3, "the others")


@in_sqlite
def test_a_callback_of_dead_letters_that_hangs_stops_no_relay(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay._LAST_CALLS_S", 0.1)
    goes_on = threading.Event()
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(10), topic="refused"), topic=None)
    try:
        with make(outbox, cluster, on_dead=lambda letter: goes_on.wait(60)) as relay:
            assert relay.drain(30) == 0
            outboxes.add(outbox, numbered(range(100)))
            assert relay.drain(30) == 0
            assert (relay.stats()["dead"], relay.stats()["acked"]) == (10, 100)
        assert f"on_dead was not told yet of 10 dead letters of {outbox!r}" in caplog.text
    finally:
        goes_on.set()


def test_only_an_outbox_that_has_dead_letters_tells_of_them(outbox: Outbox, cluster: MockCluster) -> None:
    with pytest.raises(ConfigError, match="on_dead needs an outbox that has dead letters"):
        make(WatchedOutbox(outbox), cluster, on_dead=print)


# -- outages


def test_an_outage_moves_nothing_and_counts_nothing(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(300)))
    cluster.set_broker_down()
    with running(make(outbox, cluster, {"delivery.timeout.ms": 300}, batch_size=100, failures_to_open=1)) as relay:
        until(lambda: relay.state is CircuitState.OPEN, "the circuit is open")
        outboxes.add(outbox, numbered(range(300, 400)))
        time.sleep(0.5)
        assert outbox.status().waiting == 400
        stats = relay.stats()
        assert (stats["acked"], stats["refused"], stats["put_off"], stats["dead"]) == (0, 0, 0, 0)
        cluster.set_broker_up()
        assert relay.drain(60) == 0
    check_history(range(400), stored(cluster), copies=None, in_order=False)


def test_its_circuit_and_why_it_is_open_are_told(outbox: Outbox, cluster: MockCluster) -> None:
    told: list[tuple[CircuitState, CircuitState, str]] = []

    def on_state_change(before: CircuitState, after: CircuitState) -> None:
        told.append((before, after, threading.current_thread().name))

    outboxes.add(outbox, numbered(range(10)))
    cluster.set_broker_down()
    options = {"failures_to_open": 1, "on_state_change": on_state_change}
    with running(make(outbox, cluster, {"delivery.timeout.ms": 300}, **options)) as relay:
        assert (relay.state, relay.last_error) == (CircuitState.CLOSED, None)
        until(lambda: told, "that it is open")
        assert relay.state is not CircuitState.CLOSED
        assert isinstance(relay.last_error, kbatch.DeliveryError)
        cluster.set_broker_up()
        assert relay.drain(60) == 0
    closed, opened, half_open = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
    assert [states[:2] for states in (told[0], *told[-2:])] == [
        (closed, opened),
        (opened, half_open),
        (half_open, closed),
    ]
    assert {thread for _, _, thread in told} == {"kbatch-sender-callbacks"}
    assert relay.state is closed
    assert isinstance(relay.last_error, kbatch.DeliveryError)  # it stays


def test_close_waits_until_a_change_is_told(outbox: Outbox, cluster: MockCluster) -> None:
    begun, goes_on, told = threading.Event(), threading.Event(), []

    def on_state_change(before: CircuitState, after: CircuitState) -> None:
        begun.set()
        goes_on.wait(10)
        told.append(after)
        relay.close()  # it waits for nothing of its own

    outboxes.add(outbox, numbered(range(1)))
    cluster.set_broker_down()
    relay = make(outbox, cluster, {"delivery.timeout.ms": 300}, failures_to_open=1, on_state_change=on_state_change)
    relay._gate.circuit.hurry(monotonic(), 3600.0)
    with running(relay):
        assert begun.wait(30)
        threading.Timer(0.2, goes_on.set).start()
    assert told == [CircuitState.OPEN]


def test_one_partition_without_a_leader_stops_no_other(outbox: Outbox, cluster: MockCluster) -> None:
    # Version 10 of the request crashes the mock cluster there.
    cluster.set_api_version(ApiKey.PRODUCE, 0, 9)
    cluster.set_partition_leader("orders", 0, -1)
    outboxes.add(outbox, [Envelope(data=b"%d" % n, key=f"k{n}", partition=n % 3) for n in range(300)])
    with running(make(outbox, cluster, {"delivery.timeout.ms": 500})) as relay:
        until(lambda: relay.stats()["acked"] >= 200, "the other partitions")
        until(lambda: relay.stats()["put_off"] >= 100, "those of the partition put off")
        outboxes.add(outbox, [Envelope(data=b"%d" % n, key=f"k{n}", partition=1) for n in range(300, 600)])
        until(lambda: relay.stats()["acked"] >= 500, "what came later")
        assert outboxes.query(outbox, "SELECT DISTINCT attempts FROM {later}") == [(0,)]
        cluster.set_partition_leader("orders", 0, 1)
        assert relay.drain(60) == 0
    check_history(range(600), stored(cluster), copies=None)


def test_rows_that_are_due_and_that_nobody_takes_stop_no_other_that_is_due(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._MOST_DUE", 5)
    cluster.set_api_version(ApiKey.PRODUCE, 0, 9)
    cluster.set_partition_leader("orders", 0, -1)
    outboxes.add(outbox, [Envelope(data=b"%d" % n, key=f"k{n}", partition=0) for n in range(9)])
    outboxes.add(outbox, numbered(range(1), topic="other"), topic=None)
    outboxes.move_to_later(outbox, 1, 10)
    outboxes.query(outbox, "UPDATE {later} SET due_at = seq")
    options = {"batch_size": 1, "max_in_flight_batches": 1, "retry": RetryPolicy(initial_backoff_s=1.0, jitter=0.0)}
    with running(make(outbox, cluster, {"delivery.timeout.ms": 300}, **options)) as relay:
        until(lambda: relay.stats()["acked"] == 1, "the other")
        assert {attempts for (attempts,) in outboxes.query(outbox, "SELECT attempts FROM {later}")} == {1}


@pytest.mark.parametrize("max_in_flight_batches", [1, 2, 4])
def test_rows_that_are_due_and_that_nobody_takes_stop_no_row_that_was_not_sent_yet(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, max_in_flight_batches: int
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._MOST_DUE", 2)
    cluster.set_api_version(ApiKey.PRODUCE, 0, 9)
    cluster.set_partition_leader("orders", 0, -1)
    outboxes.add(outbox, [Envelope(data=b"%d" % n, key=f"k{n}", partition=0) for n in range(20)])
    outboxes.move_to_later(outbox, 1, 20)
    with running(
        make(outbox, cluster, {"delivery.timeout.ms": 1000}, max_in_flight_batches=max_in_flight_batches)
    ) as relay:
        until(lambda: relay.stats()["in_flight"], "rows that nobody takes")
        time.sleep(0.6)  # as many as it sends
        assert relay.stats()["in_flight"] <= 2 * max(max_in_flight_batches // 2, 1)
        outboxes.add(outbox, numbered(range(10), topic="other"), topic=None)
        until(lambda: relay.stats()["acked"] == 10, "the others")
    check_history(range(10), stored(cluster, "other"))


def test_rows_that_are_due_again_and_again_take_every_other_turn(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_api_version(ApiKey.PRODUCE, 0, 9)
    cluster.set_partition_leader("orders", 0, -1)
    outboxes.add(outbox, [Envelope(data=b"%d" % n, key=f"k{n}", partition=0) for n in range(9)])
    outboxes.move_to_later(outbox, 1, 9)
    at_once = RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.001, jitter=0.0)
    options = {"max_in_flight_batches": 1, "failures_to_open": 1_000, "retry": at_once}
    with running(make(outbox, cluster, {"delivery.timeout.ms": 500}, **options)) as relay:
        until(lambda: relay.stats()["put_off"] >= 18, "rows that nobody takes, twice")
        outboxes.add(outbox, numbered(range(10), topic="other"), topic=None)
        until(lambda: relay.stats()["acked"] == 10, "the others")
    check_history(range(10), stored(cluster, "other"))


def test_a_producer_in_its_fatal_state_is_replaced(outbox: Outbox, cluster: MockCluster) -> None:
    with running(make(outbox, cluster)) as relay:
        outboxes.add(outbox, numbered(range(100)))
        assert relay.drain(30) == 0
        relay._use.handle.producer._core.inject_fatal_error(45, "as a broker would")
        outboxes.add(outbox, numbered(range(100, 200)))
        assert relay.drain(30) == 0
    check_history(range(200), stored(cluster))


def test_an_answer_whose_wake_up_was_lost_is_found(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(100)))
    with make(outbox, cluster) as relay:
        send = relay._use.handle.producer._send_detached
        relay._use.handle.producer._send_detached = lambda batch, *, waker: send(batch)  # type: ignore[method-assign]
        assert relay.drain(30) == 0
    check_history(range(100), stored(cluster))


@in_sqlite
def test_a_database_that_is_locked_for_long_is_waited_for(
    outbox: SqliteOutbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kbatch._database._sqlite._BUSY_TIMEOUT_S", 0.05)
    outboxes.add(outbox, numbered(range(100)))
    with running(make(outbox, cluster)) as relay:
        assert relay.drain(30) == 0
        with outboxes.transaction(outbox) as connection:
            outbox.add(connection, numbered(range(100, 200)), topic="orders")
            time.sleep(2.5)  # renewals fail meanwhile
        assert relay.drain(30) == 0
    check_history(range(200), stored(cluster))
    told = [record.message for record in caplog.records if "relay" in record.message]
    assert len(told) == 2
    assert "cannot use its outbox" in told[0]
    assert "transactions that write should be short" in told[0]
    assert "can use its outbox again" in told[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_database_that_fails_at_any_call_before_or_after_it_was_done(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._TRY_STORE_AGAIN_S", 0.01)
    seeded = random.Random(seed)
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(600)))
    outboxes.add(outbox, numbered(range(600, 640), topic="refused"), topic=None)
    failed: list[str] = []

    def fail(name: str) -> None:
        if name not in ("open_store", "left", "close") and seeded.random() < 0.2:
            failed.append(name)
            raise OutboxError(f"{name} failed")

    with make(WatchedOutbox(outbox, before=fail, after=fail), cluster, batch_size=50) as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["lost_buckets"] == 0
    assert len(failed) >= 5
    check_history(range(600), stored(cluster))
    assert sorted(int(body or b"") for body in outboxes.bodies(outbox, "dead")) == list(range(600, 640))
    assert [attempts for (attempts,) in outboxes.query(outbox, "SELECT DISTINCT attempts FROM {dead}")] == [3]


# -- leases


def test_two_relays_share_the_buckets_and_the_second_one_hands_its_own_back(
    outbox: Outbox, cluster: MockCluster
) -> None:
    numbers = iter(range(10**6))
    with running(make(outbox, cluster)) as first:
        until(lambda: first.stats()["buckets"] == 64, "all buckets")
        with running(make(outbox, cluster)) as second:
            for _ in range(40):
                outboxes.add(outbox, numbered([next(numbers) for _ in range(50)], keys=200))
            until(lambda: (first.stats()["buckets"], second.stats()["buckets"]) == (32, 32), "half for each")
            for _ in range(40):
                outboxes.add(outbox, numbered([next(numbers) for _ in range(50)], keys=200))
            assert first.drain(30) == 0
            assert second.stats()["acked"] > 0
        until(lambda: first.stats()["buckets"] == 64, "the buckets of the second one")
        outboxes.add(outbox, numbered([next(numbers) for _ in range(50)], keys=200))
        assert first.drain(30) == 0
        assert first.stats()["lost_buckets"] == 0
    check_history(range(next(numbers)), stored(cluster))


def test_a_relay_whose_lease_ran_out_deletes_nothing_and_moves_nothing(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(100)))
    outboxes.add(outbox, numbered(range(20), topic="refused"), topic=None)
    kept: list[int] = []

    def before(name: str) -> None:
        if name == "settle" and not kept:
            # As if it had been stopped for long: by the database's clock its leases are over.
            outboxes.query(outbox, "UPDATE {lease} SET until = 0")

    def after(name: str) -> None:
        if name == "settle" and not kept:
            kept.append(outbox.status().waiting)

    with make(WatchedOutbox(outbox, before=before, after=after), cluster) as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["lost_buckets"] > 0
    assert kept == [120]
    check_history(range(100), stored(cluster), copies=100)


def test_a_relay_that_was_ejected_registers_again_as_itself(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(100)))
    with running(make(outbox, cluster)) as relay:
        until(lambda: outbox.status().waiting == 0 and relay.stats()["buckets"] == 64, "all sent, and all buckets")
        before = relay._loop._owner.name
        outboxes.query(outbox, "DELETE FROM {relay}")
        outboxes.query(outbox, "UPDATE {lease} SET owner = NULL, until = 0, token = token + 1")
        until(lambda: relay.stats()["lost_buckets"] == 64, "that it knows")
        until(lambda: relay.stats()["buckets"] == 64, "all buckets")
        assert outboxes.query(outbox, "SELECT owner FROM {relay}") == [(before,)]
        assert outboxes.query(outbox, "SELECT DISTINCT owner, token FROM {lease}") == [(before, 3)]
        outboxes.add(outbox, numbered(range(100, 200)))
        until(lambda: outbox.status().waiting == 0, "the others")
    check_history(range(200), stored(cluster))


def test_a_relay_that_another_has_followed_writes_nothing(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(100)))
    owners: list[Any] = []

    def before(name: str) -> None:
        if name == "settle" and not owners:
            outboxes.query(outbox, "UPDATE {lease} SET owner = 'another', token = token + 1")
            owners.append("another")

    with make(WatchedOutbox(outbox, before=before), cluster) as relay:
        assert relay.drain(1.5) == 100
        assert relay.stats()["buckets"] == 0
    assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [("another",)]


@pytest.mark.parametrize("slow", ["renew", "read"])
def test_nothing_is_handed_over_when_the_lease_is_too_short_for_it(
    outbox: Outbox, cluster: MockCluster, slow: str
) -> None:
    outboxes.add(outbox, numbered(range(100)))
    slept: list[str] = []

    def after(name: str) -> None:
        if name == slow and not slept:
            slept.append(name)
            time.sleep(1.2)  # of the 2 s by which the lease is longer than a delivery, one is the margin

    left = "SELECT (min(until) - {now}) / 1000.0 FROM {lease}"
    with make(WatchedOutbox(outbox, after=after), cluster, {"delivery.timeout.ms": 1000}, lease_s=6.0) as relay:
        handed_over: list[float] = []
        send = relay._use.handle.producer._send_detached

        def send_detached(*arguments: Any, **keywords: Any) -> None:
            handed_over.extend(seconds for (seconds,) in outboxes.query(outbox, left))
            send(*arguments, **keywords)

        relay._use.handle.producer._send_detached = send_detached  # type: ignore[method-assign]
        assert relay.drain(30) == 0
    assert slept
    assert min(handed_over) >= 5.0 - 0.1
    check_history(range(100), stored(cluster))


def test_a_bucket_is_given_up_only_when_nothing_of_it_is_in_flight(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.set_rtt(-1, 300)
    given_up: list[tuple[set[int], set[int]]] = []
    store = outbox.open_store()
    store.close()
    store_class: Any = type(store)
    renew = store_class.renew
    with running(make(outbox, cluster, batch_size=200)) as first:
        until(lambda: first.stats()["buckets"] == 64, "all buckets")

        def watched(store: Any, owner: str, lease_s: float, *, release: Any, **others: Any) -> Any:
            if owner == first._loop._owner.name and release:
                in_flight = {bucket for flight in list(first._loop._flights) for bucket in flight.tokens}
                given_up.append((set(release), in_flight))
            return renew(store, owner, lease_s, release=release, **others)

        monkeypatch.setattr(store_class, "renew", watched)
        numbers = iter(range(10**6))
        with running(make(outbox, cluster, batch_size=200)) as second:
            while (first.stats()["buckets"], second.stats()["buckets"]) != (32, 32):
                outboxes.add(outbox, numbered([next(numbers) for _ in range(50)], keys=200))
                time.sleep(0.02)
            cluster.set_rtt(-1, 0)
            assert first.drain(60) == 0
    assert given_up
    assert any(in_flight for _, in_flight in given_up)
    assert [release & in_flight for release, in_flight in given_up if release & in_flight] == []
    check_history(range(next(numbers)), stored(cluster))


# -- its life


def test_it_stops_with_what_is_in_flight_written_and_may_run_again(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_rtt(-1, 200)
    with make(outbox, cluster, batch_size=50, max_in_flight_batches=2) as relay:
        outboxes.add(outbox, numbered(range(1000)))
        thread = threading.Thread(target=relay.run)
        thread.start()
        until(lambda: relay.stats()["in_flight"], "something in flight")
        relay.stop()
        thread.join()
        assert relay.stats()["in_flight"] == 0
        assert outbox.status().waiting == 1000 - relay.stats()["acked"] < 1000
        assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)]
        cluster.set_rtt(-1, 0)
        assert relay.drain(30) == 0
    check_history(range(1000), stored(cluster))


def test_drain_ends_at_its_time_and_tells_how_many_are_left(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_broker_down()
    outboxes.add(outbox, numbered(range(7)))
    with make(outbox, cluster, {"delivery.timeout.ms": 300}) as relay:
        assert relay.drain(0.2) == 7
        with pytest.raises(ValueError, match="timeout must be seconds"):
            relay.drain(-1)


def test_drain_gives_up_what_is_in_flight_at_its_end(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_broker_down()
    outboxes.add(outbox, numbered(range(7)))
    with make(outbox, cluster, {"delivery.timeout.ms": 60_000}, close_timeout_s=60.0) as relay:
        ends: list[float] = []
        await_answers = relay._loop._await_answers

        def watched(end: float) -> bool:
            ends.append(end)
            return await_answers(end)

        relay._loop._await_answers = watched  # type: ignore[method-assign]
        before = monotonic()
        assert relay.drain(0.5) == 7
        assert before + 0.5 <= ends[0] < before + 60.0
        assert relay.stats()["in_flight"] == 0


def test_drain_beside_run_ends_with_it(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_broker_down()
    outboxes.add(outbox, numbered(range(7)))
    with running(make(outbox, cluster, {"delivery.timeout.ms": 300})) as relay:
        timer = threading.Timer(0.3, relay.stop)
        timer.start()
        assert relay.drain() == 7
        timer.join()


def test_what_its_end_gives_up_stays_and_its_buckets_are_free(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(50)))
    with make(outbox, cluster, {"delivery.timeout.ms": 30_000}, close_timeout_s=0.1) as relay:
        cluster.set_rtt(-1, 60_000)
        assert relay.drain(0.5) == 50
        assert relay.stats()["in_flight"] == 0
        assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)]
        assert (outbox.status().later, outbox.status().dead) == (0, 0)


def test_a_stop_before_it_runs_ends_it_at_once(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(7)))
    with make(outbox, cluster) as relay:
        relay.stop()
        relay.run()
        assert outbox.status().waiting == 7
        assert relay.drain(30) == 0


def test_a_relay_that_is_to_finish_leaves_what_is_added_meanwhile_and_sends_what_is_put_back(
    outbox: Outbox, cluster: MockCluster
) -> None:
    added = itertools.count()
    put_back: list[list[Any]] = []

    def add(name: str) -> None:
        if name == "read":
            outboxes.add(outbox, numbered([next(added)]))

    with running(make(WatchedOutbox(outbox, before=add), cluster)) as relay:
        hand_over = relay._loop._hand_over

        def put_one_back(flight: Any, producer: Any) -> None:
            if relay._loop._finishing and not put_back:
                put_back.append(flight.places)
                relay._loop._put_back(flight)
            else:
                hand_over(flight, producer)

        relay._loop._hand_over = put_one_back  # type: ignore[method-assign]
        until(lambda: relay.stats()["acked"] >= 20, "some")
        relay._finish()
        until(lambda: not relay._run_lock.locked(), "its end", 20)
    assert put_back
    check_history(range(next(added)), stored(cluster))


def test_a_signal_ends_it(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(50)))
    with make(outbox, cluster) as relay:
        before = signal.signal(signal.SIGTERM, lambda *_: relay.stop())
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM])
        timer.start()
        try:
            relay.run()
        finally:
            signal.signal(signal.SIGTERM, before)
            timer.join()
    check_history(range(50), stored(cluster))


@pytest.mark.parametrize("call", ["close", "drain"])
def test_what_waits_for_run_is_refused_within_it(outbox: Outbox, cluster: MockCluster, call: str) -> None:
    with make(outbox, cluster) as relay:
        before = signal.signal(signal.SIGTERM, lambda *_: getattr(relay, call)())
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGTERM])
        timer.start()
        try:
            with pytest.raises(RuntimeError, match="within it"):
                relay.run()
        finally:
            signal.signal(signal.SIGTERM, before)
            timer.join()


@pytest.mark.long
@in_sqlite
def test_an_exception_at_any_line_of_a_run_leaves_no_bucket_and_nothing_for_close_to_wait_for(
    outbox: SqliteOutbox,
) -> None:
    places = 0
    for nth in range(1, 10**6, 5):
        relay = Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0.0)
        injector = Injector(nth)
        injector.run(lambda relay=relay: relay.drain(5.0))
        relay.close()
        assert outbox._watchers == []
        assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)], injector.place
        if injector.place is None:
            break
        places += 1
    assert places > 20


@in_sqlite
@pytest.mark.parametrize("call", ["_use_store", "_give_back"])
def test_an_exception_at_any_line_where_it_loses_its_leases_leaves_no_floor_and_writes_nothing(
    outbox: SqliteOutbox, call: str
) -> None:
    outboxes.add(outbox, numbered(range(100)))
    places, injector = 0, Injector(0)
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0.0) as relay:
        for nth in range(1, 10**6):
            relay._loop._begin()
            relay._loop._renew()
            assert relay._loop._store is not None
            floors = relay._loop._floors.floors(relay._loop._leases.to_read())
            assert set(floors.values()) == {0}, injector.place
            reading = relay._loop._store.read(floors, limit=1000, max_bytes=10**6, in_flight=set)
            assert len(relay._loop._floors.taken(reading, set)) == 100
            relay._loop._unwritten.done = [row[:2] for row in reading.rows]  # acknowledged, and not written yet
            relay._loop._leases._asked = Times(-1e6, -1e6)  # its leases are over
            relay._loop._stopping = True
            injector = Injector(nth)
            injector.run(getattr(relay._loop, call))
            if call == "_use_store":
                relay._loop._end()
            relay._loop._give_back()
            if injector.place is None:
                break
            places += 1
    assert places > 10
    assert outbox.status().waiting == 100


@in_sqlite
def test_close_that_was_interrupted_at_any_line_is_called_again(outbox: SqliteOutbox) -> None:
    places = 0
    for nth in range(1, 10**6):
        relay = Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}, close_timeout_s=0.0)
        producer = relay._use.handle.producer
        injector = Injector(nth)
        injector.run(relay.close)
        again = threading.Thread(target=relay.close)  # a lock that is still held is not the thread's
        again.start()
        again.join()
        assert producer.closed, injector.place
        assert not relay._use.handle._users
        if injector.place is None:
            break
        places += 1
    assert places > 10


def test_buckets_are_given_back_when_the_database_is_in_trouble_at_the_end(
    outbox: Outbox, cluster: MockCluster
) -> None:
    troubled: list[str] = []

    def before(name: str) -> None:
        if name == "renew" and relay._loop._leases.tokens and not troubled:
            troubled.append(name)
            relay.stop()
            raise OutboxError("no answer")

    with make(WatchedOutbox(outbox, before=before), cluster) as relay:
        relay.run()
        assert troubled
        assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)]
        assert outbox.status().relays == 0


def test_ctrl_c_ends_it_with_what_is_in_flight_written(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(50)))
    with make(outbox, cluster) as relay:
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            relay.run()
        timer.join()
    assert outbox.status().waiting == 0
    assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)]


def test_it_is_run_by_one_thread_and_not_after_its_end(outbox: Outbox, cluster: MockCluster) -> None:
    with running(make(outbox, cluster)) as relay, pytest.raises(RuntimeError, match="runs already"):
        relay.run()
    with pytest.raises(kbatch.SenderClosedError):
        relay.run()
    relay.close()


def test_tables_that_are_missing_are_told_at_its_start(tmp_path: Path, cluster: MockCluster) -> None:
    with make(SqliteOutbox(tmp_path / "none.db"), cluster) as relay, pytest.raises(OutboxError, match="call create"):
        relay.run()


def test_one_that_was_made_before_a_fork_is_another_one_in_each_child(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = []
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}) as relay:
        for pid in (11, 12, 12):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda pid=pid: pid)
                relay._loop._begin()
                relay._loop._end()
            owners.append(relay._loop._owner.name)
    assert owners[0] != owners[1] == owners[2]


def test_a_producer_of_the_callers_stays_open(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(10)))
    with kbatch.Producer(config(cluster)) as producer:
        with Relay(outbox, producer) as relay:
            assert relay.drain(30) == 0
        assert not producer.closed
    check_history(range(10), stored(cluster))


@in_sqlite
@pytest.mark.parametrize(
    ("producer", "options", "says"),
    [
        ({"enable.idempotence": False}, {}, "enable.idempotence=false"),
        ({"transactional.id": "relay", "delivery.timeout.ms": 1000}, {}, "transactional.id"),
        ({"delivery.timeout.ms": 1000}, {"lease_s": 5.0}, "lease_s must be seconds, 6 at least"),
        ({}, {"retry": 3}, "retry must be a RetryPolicy"),
        ({}, {"retry": RetryPolicy(max_age_s=3)}, "deliver_by"),
        ({}, {"batch_size": 0}, "batch_size"),
        ({}, {"batch_size": 50_000, "max_in_flight_batches": 50_000}, r"batch_size \* max_in_flight_batches must be"),
        ({}, {"probe_interval_s": 0}, "probe_interval_s"),
        ({}, {"probe_interval_s": 60}, "is longer than"),
        ({}, {"close_timeout_s": -1}, "close_timeout_s"),
        ({}, {"on_state_change": 7}, "on_state_change must be callable, not int"),
        ({}, {"on_dead": 7}, "on_dead must be callable, not int"),
        ({}, {"on_dead": asyncio.sleep}, r"on_dead must not be .*; kbatch\.aio\.Relay takes"),
        (
            {},
            {"on_state_change": asyncio.sleep},
            r"on_state_change must not be .*; kbatch\.aio\.Relay takes",
        ),
        ({}, {"strict_order": 1}, "strict_order must be bool, not int"),
        ({"partitioner": "random"}, {"strict_order": True}, "strict_order=True contradicts partitioner=random"),
    ],
)
def test_wrong_options(outbox: SqliteOutbox, producer: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", **producer}, **options)


def test_what_is_no_outbox() -> None:
    with pytest.raises(ConfigError, match=r"or a kbatch\.stores\.RelayOutbox, not str, which has no method open_store"):
        Relay("shop.db", {"bootstrap.servers": "127.0.0.1:1"})  # type: ignore[arg-type]


@in_sqlite
def test_its_defaults_have_time_for_a_delivery(outbox: SqliteOutbox) -> None:
    with Relay(outbox, {"bootstrap.servers": "127.0.0.1:1"}) as relay:
        assert relay._loop._max_delivery_s == 62.0
        assert relay._loop._lease_s == 67.0
