"""Dead letters that are replayed, and what waits that is cancelled or scheduled anew, while relays are at work."""

import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kbatch import Envelope, OutboxQuery, Relay, RetryPolicy
from kbatch.testing import ApiKey, MockCluster
from tests import outboxes
from tests.outboxes import Outbox
from tests.relays import WatchedOutbox, check_history, numbered
from tests.waiting import until

from .clients import read_back
from .test_relay import config, make, running

ALL = OutboxQuery()
NOT_SOON = RetryPolicy(max_attempts=None, initial_backoff_s=3600.0, max_backoff_s=3600.0, jitter=0.0)


@pytest.fixture(autouse=True)
def nothing_is_found_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that looks at everything every 30 s finds what it was not told of."""
    monkeypatch.setattr("kbatch._outbox._relay_loop._LOOK_AT_ALL_EVERY_S", 3600.0)


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox(wire="raw")


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        for topic in ("orders", "refused"):
            cluster.create_topic(topic, partitions=3)
        yield cluster


def stored(cluster: MockCluster, topic: str = "orders") -> list[Any]:
    return list(read_back(cluster.bootstrap_servers, topic))


class Once:
    """Calls something after the last of these calls of a store's methods, which come in this order."""

    def __init__(self, call: Any, *names: str) -> None:
        self.call, self.names = call, list(names)

    def __call__(self, name: str) -> None:
        if self.names and name == self.names[0]:
            del self.names[0]
            if not self.names:
                self.call()


# -- replaying


def test_what_was_replayed_before_a_relay_starts_is_sent_before_later_rows_of_its_key(
    outbox: Outbox, cluster: MockCluster
) -> None:
    outboxes.add(outbox, numbered(range(60)))
    outboxes.move_to_dead(outbox, "seq % 3 = 0")
    assert outbox.dead_letters.replay(ALL) == 20
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
    check_history(range(60), stored(cluster))


def test_an_idle_relay_notices_a_replay_at_once(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(60)))
    outboxes.move_to_dead(outbox, "seq % 3 = 0")
    with running(make(outbox, cluster)) as relay:
        until(lambda: relay.stats()["acked"] == 40, "the others")
        outbox.dead_letters.replay(ALL)
        until(lambda: relay.stats()["acked"] == 60, "the replayed")
        assert relay.drain(30) == 0
    check_history(range(60), stored(cluster), in_order=False)


def test_rows_that_were_read_just_before_a_replay_wait_for_it(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(60)))
    outboxes.move_to_dead(outbox, "seq <= 20")
    watched = WatchedOutbox(outbox, after=Once(lambda: outbox.dead_letters.replay(ALL), "read"))
    with make(watched, cluster) as relay:
        assert relay.drain(30) == 0
    check_history(range(60), stored(cluster))


def test_a_row_that_is_due_waits_for_an_earlier_one_of_its_key_that_was_replayed_just_then(
    outbox: Outbox, cluster: MockCluster
) -> None:
    watched = WatchedOutbox(outbox)
    with make(watched, cluster) as relay:
        # The producer of what is due is connected, so what is handed over to it first is there first.
        outboxes.add(outbox, numbered(range(2), topic="refused"), topic=None)
        outboxes.move_to_later(outbox, 1, 1)
        assert relay.drain(30) == 0
        outboxes.add(outbox, numbered(range(60)))
        outboxes.move_to_dead(outbox, "seq <= 22")
        outboxes.move_to_later(outbox, 23, 42)
        # What is due is not sent before everything below it was read.
        watched.after = Once(lambda: outbox.dead_letters.replay(ALL), "read", "read_due")
        assert relay.drain(30) == 0
    check_history(range(60), stored(cluster))


def test_what_is_refused_again_is_dead_again_and_others_of_its_record_batch_are_sent(
    outbox: Outbox, cluster: MockCluster
) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(100, 120), topic="refused"), topic=None)
    outboxes.add(outbox, numbered(range(20)))
    outboxes.move_to_dead(outbox, "true")
    with running(make(outbox, cluster)) as relay:
        assert outbox.dead_letters.replay(ALL) == 40
        until(lambda: len(outbox.dead_letters.find()) == 20, "the refused")
        assert relay.drain(30) == 0
    check_history(range(20), stored(cluster))
    assert {letter.topic for letter in outbox.dead_letters.find()} == {"refused"}
    assert {letter.attempts for letter in outbox.dead_letters.find()} == {3}


def test_an_edited_letter_is_sent_as_it_is_now(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, [Envelope(data=b"x" * 5000, key="k"), Envelope(data=b"2", key="k")])
    with running(make(outbox, cluster, {"message.max.bytes": 2000})) as relay:
        until(outbox.dead_letters.find, "the one that is too large")
        (letter,) = outbox.dead_letters.find()
        outbox.dead_letters.replay_edited(letter.number, letter.envelope.replace(data=b"1"))
        assert relay.drain(30) == 0
        until(lambda: relay.stats()["acked"] == 2, "the edited")
    assert sorted(record.value for record in stored(cluster)) == [b"1", b"2"]
    assert outbox.dead_letters.find() == []


def test_replays_while_the_application_adds_lose_nothing_and_send_nothing_twice(
    outbox: Outbox, cluster: MockCluster
) -> None:
    seeded = random.Random(7)
    outboxes.add(outbox, numbered(range(2000)))
    outboxes.move_to_dead(outbox, "seq % 2 = 0")
    dead = [letter.number for letter in outbox.dead_letters.find(limit=None)]
    first = 2000
    with running(make(outbox, cluster, batch_size=50)) as relay:
        while dead:
            count = seeded.randint(1, 100)
            assert outbox.dead_letters.replay(OutboxQuery(numbers=dead[:count])) == len(dead[:count])
            del dead[:count]
            outboxes.add(outbox, numbered(range(first, first + 20)))
            first += 20
        assert relay.drain(60) == 0
    check_history(range(first), stored(cluster), in_order=False)
    assert outbox.status().dead == 0


# -- what waits


def held(outbox: Outbox, cluster: MockCluster) -> None:
    """One row of a key waits for its next attempt, for an hour, and others of the key behind it."""
    outboxes.add(outbox, numbered(range(5), keys=1))
    outboxes.move_to_later(outbox, 1, 1)
    hour = timedelta(hours=1)
    outbox.scheduled.reschedule(ALL, datetime.now(timezone.utc) + hour)


def test_a_message_that_is_cancelled_is_not_sent_and_its_key_goes_on(outbox: Outbox, cluster: MockCluster) -> None:
    held(outbox, cluster)
    with running(make(outbox, cluster, retry=NOT_SOON)) as relay:
        outboxes.add(outbox, numbered(range(10, 20), topic="refused"), topic=None)
        until(lambda: relay.stats()["acked"] == 10, "the others")
        until(lambda: outbox.status().waiting == 4, "those behind it, in their place")
        assert outbox.scheduled.cancel(ALL) == 1
        until(lambda: relay.stats()["acked"] == 14, "those behind it")
        assert relay.drain(30) == 0
    check_history(range(1, 5), stored(cluster))


def test_a_message_that_is_scheduled_anew_is_sent_then_and_its_key_after_it(
    outbox: Outbox, cluster: MockCluster
) -> None:
    held(outbox, cluster)
    with running(make(outbox, cluster, retry=NOT_SOON)) as relay:
        until(lambda: relay.stats()["buckets"] == 64, "its start")
        assert outbox.scheduled.reschedule(ALL, datetime.now(timezone.utc)) == 1
        assert relay.drain(30) == 0
    check_history(range(5), stored(cluster))


def test_a_scheduled_message_is_cancelled_or_sent_when_it_is_scheduled_anew(
    outbox: Outbox, cluster: MockCluster
) -> None:
    now = datetime.now(timezone.utc)
    outboxes.add(outbox, numbered(range(3), scheduled_time=now + timedelta(hours=1)))
    with running(make(outbox, cluster)) as relay:
        until(lambda: relay.stats()["buckets"] == 64, "its start")
        first = min(message.number for message in outbox.scheduled.find())
        assert outbox.scheduled.cancel(OutboxQuery(numbers=[first])) == 1
        assert outbox.scheduled.reschedule(ALL, now + timedelta(hours=2)) == 2
        assert outbox.scheduled.reschedule(ALL, now) == 2
        until(lambda: relay.stats()["acked"] == 2, "the others")
        assert relay.drain(30) == 0
    check_history(range(1, 3), stored(cluster), in_order=False)


@pytest.mark.parametrize("refused", [False, True])
def test_a_message_that_is_cancelled_on_its_way_may_be_sent_once_and_does_not_come_back(
    outbox: Outbox, cluster: MockCluster, refused: bool
) -> None:
    outboxes.add(
        outbox, [*numbered(range(100, 102), topic="refused"), *numbered(range(5), keys=1, topic="orders")], topic=None
    )
    outboxes.move_to_later(outbox, 1, 1)
    outboxes.move_to_later(outbox, 3, 3)
    outbox.scheduled.reschedule(OutboxQuery(topic="orders"), datetime.now(timezone.utc) + timedelta(hours=1))
    with running(make(outbox, cluster, {"delivery.timeout.ms": 30_000}, retry=NOT_SOON)) as relay:
        # Both its producers are connected: what is handed over is on its way at once.
        until(lambda: relay.stats()["acked"] == 2, "the others")
        cluster.set_rtt(-1, 500)
        if refused:
            cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"])
        outbox.scheduled.reschedule(ALL, datetime.now(timezone.utc))
        until(lambda: relay.stats()["in_flight"] == 1, "it is on its way")
        assert outbox.scheduled.cancel(ALL) == 1
        until(lambda: relay.stats()["acked"] + relay.stats()["dead"] >= 3, "its answer")
        cluster.set_rtt(-1, 0)
        assert relay.drain(30) == 0
    check_history(range(1 if refused else 0, 5), stored(cluster))
    assert outbox.status() == type(outbox.status())(0, 0, 0, 0.0, 0)


# -- the end of a relay


def test_a_second_stop_may_shorten_the_wait_for_what_is_in_flight(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._LAST_WORDS_S", 60.0)  # on a machine that is busy, more than 2
    outboxes.add(outbox, numbered(range(10)))
    with running(make(outbox, cluster, {"delivery.timeout.ms": 60_000}, close_timeout_s=3600.0)) as relay:
        cluster.set_broker_down()
        until(lambda: relay.stats()["in_flight"] == 10, "something in flight")
        relay.stop()
        relay.stop(0)
    cluster.set_broker_up()
    assert_all_is_given_back(outbox, cluster)


def test_what_was_answered_while_the_database_took_long_keeps_no_bucket(
    outbox: Outbox, cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._outbox._relay_loop._LAST_WORDS_S", 0.05)
    watched = WatchedOutbox(outbox)
    outboxes.add(outbox, numbered(range(10)))
    with running(make(watched, cluster, {"delivery.timeout.ms": 60_000}, close_timeout_s=3600.0)) as relay:
        cluster.set_broker_down()
        until(lambda: relay.stats()["in_flight"] == 10, "something in flight")
        loop = relay._loop
        slow: list[str] = []

        def take_long(name: str) -> None:
            if name == "renew" and loop._gives_up:
                slow.append(name)
                until(lambda: all(flight.pending.done() for flight in list(loop._flights)), "the purge")
                time.sleep(0.1)

        watched.before = take_long
        use_store = loop._use_store
        monkeypatch.setattr(loop, "_use_store", lambda: (setattr(loop, "_renew_at", 0.0), use_store()))
        relay.stop(0)
    assert slow
    cluster.set_broker_up()
    assert_all_is_given_back(outbox, cluster)


def assert_all_is_given_back(outbox: Outbox, cluster: MockCluster) -> None:
    let_go = outboxes.query(outbox, "SELECT count(*) FROM {lease} WHERE owner IS NOT NULL")
    assert let_go == [(0,)]
    assert outbox.status().waiting == 10
    with Relay(outbox, config(cluster)) as other:
        assert other.drain(30) == 0
    check_history(range(10), stored(cluster), copies=10)
