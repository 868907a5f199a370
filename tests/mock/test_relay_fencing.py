"""A relay with `fencing="kafka"`: one transaction at a time, and brokers take nothing of it once another has its rows.

What it takes real brokers for, as what a reader of committed records sees, is in `tests/kafka/test_relay_on_kafka.py`.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kbatch.aio
from kbatch import CircuitState, ConfigError, Envelope, Relay, SqliteOutbox
from kbatch._outbox import _fences
from kbatch._outbox._fences import initialize
from kbatch.testing import ApiKey, MockCluster
from tests import outboxes
from tests.outboxes import Outbox
from tests.relays import WatchedOutbox, check_history, numbered
from tests.waiting import until

from .clients import read_committed
from .test_relay import SOON, config, running


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox(wire="raw")


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        for topic in ("orders", "refused"):
            cluster.create_topic(topic, partitions=3)
        yield cluster


def make(outbox: Any, cluster: MockCluster, **options: Any) -> Relay:
    own = {"transaction.timeout.ms": 3000}
    options = {"retry": SOON, "probe_interval_s": 0.05, "max_probe_interval_s": 0.2, **options}
    return Relay(outbox, config(cluster, **own), fencing="kafka", **options)


def stored(cluster: MockCluster, topic: str = "orders") -> list[Any]:
    return read_committed(cluster.bootstrap_servers, topic)


def test_everything_arrives_once_and_in_order(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(5_000)))
    with make(outbox, cluster, batch_size=500) as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["acked"] == 5_000
    check_history(range(5_000), stored(cluster))


def test_the_same_from_an_event_loop(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(500)))

    async def drain() -> int:
        own = config(cluster, **{"transaction.timeout.ms": 3000})
        async with kbatch.aio.Relay(outbox, own, fencing="kafka") as relay:
            return await relay.drain(60)

    assert asyncio.run(drain()) == 0
    check_history(range(500), stored(cluster))


def test_it_runs_again_after_its_end(outbox: Outbox, cluster: MockCluster) -> None:
    with make(outbox, cluster) as relay:
        for first in (0, 100, 200):
            outboxes.add(outbox, numbered(range(first, first + 100)))
            assert relay.drain(30) == 0
        assert relay.stats()["lost_buckets"] == 0
    check_history(range(300), stored(cluster))


def test_what_is_handed_over_within_the_lease_fences_nobody(outbox: Outbox, cluster: MockCluster) -> None:
    numbers = iter(range(10**6))
    with running(make(outbox, cluster)) as first:
        until(lambda: first.stats()["buckets"] == 64, "all buckets")
        with running(make(outbox, cluster)) as second:
            for _ in range(10):
                outboxes.add(outbox, numbered([next(numbers) for _ in range(50)], keys=200))
            until(lambda: (first.stats()["buckets"], second.stats()["buckets"]) == (32, 32), "half for each")
            for _ in range(10):
                outboxes.add(outbox, numbered([next(numbers) for _ in range(50)], keys=200))
            assert first.drain(30) == 0
        until(lambda: first.stats()["buckets"] == 64, "the buckets of the second one")
        assert first.stats()["lost_buckets"] == second.stats()["lost_buckets"] == 0
    check_history(range(next(numbers)), stored(cluster))


def test_one_that_was_taken_for_dead_begins_anew(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(100)))
    with running(make(outbox, cluster)) as relay:
        until(lambda: outbox.status().waiting == 0, "the first rows")
        before = relay._loop._owner.name
        # The mock cluster fences nobody.
        relay._use.handle.producer._core.inject_fatal_error(
            90, "There is a newer producer with the same transactionalId"
        )
        outboxes.add(outbox, numbered(range(100, 1_000), keys=200))
        until(lambda: outbox.status().waiting == 0, "the others")
        assert relay._loop._owner.name != before
        assert relay.stats()["refused"] == relay.stats()["put_off"] == 0
    check_history(range(1_000), stored(cluster))
    assert outbox.status().dead == outbox.status().later == 0


@pytest.fixture
def dead(outbox: Outbox) -> str:
    """The owner of all buckets, whose lease has run out."""
    with contextlib.closing(outbox.open_store()) as store:
        assert len(store.renew("dead", 60.0, release=(), avoid=())[0]) == 64
        outboxes.query(outbox, "UPDATE {lease} SET until = 0")
        outboxes.query(outbox, "DELETE FROM {relay}")
    return "dead"


def test_what_has_run_out_is_taken_only_of_those_who_are_fenced(outbox: Outbox, dead: str) -> None:
    with contextlib.closing(outbox.open_store()) as store:
        assert store.run_out() == {dead}
        assert store.renew("another", 60.0, release=(), avoid=(), fenced={"third"})[0] == []
        assert len(store.renew("another", 60.0, release=(), avoid=(), fenced={dead})[0]) == 64
        assert store.run_out() == set()
        store.leave("another", keep=range(8))
        assert len(store.renew("third", 60.0, release=(), avoid=(), fenced=())[0]) == 56  # what was given back
        outboxes.query(outbox, "UPDATE {lease} SET until = 0 WHERE owner = 'third'")
        assert len(store.renew("third", 60.0, release=(), avoid=(), fenced=())[0]) == 56  # and what was its own


def test_a_dead_relays_buckets_are_taken_once_it_is_fenced(
    outbox: Outbox, cluster: MockCluster, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialized: list[str | None] = []
    fails = True

    def watched(producer: Any, waker: Any) -> Any:
        if producer is relay._use.handle.producer:
            return initialize(producer, waker)
        initialized.append(producer._parsed.native.get("transactional.id"))
        if fails:
            raise kbatch.ProducerError("for the test")
        return initialize(producer, waker)

    monkeypatch.setattr(_fences, "initialize", watched)
    outboxes.add(outbox, numbered(range(100)))
    with make(outbox, cluster) as relay:
        assert relay.drain(1.5) == 100
        fails = False
        assert relay.drain(30) == 0
    assert set(initialized) == {f"kbatch-relay-{dead}"}
    check_history(range(100), stored(cluster))


def test_brokers_know_its_name_before_it_has_a_lease(outbox: Outbox, cluster: MockCluster) -> None:
    known: list[bool] = []

    def before(name: str) -> None:
        if name == "renew":
            known.append(_fences.is_initialized(relay._use.handle.producer))

    outboxes.add(outbox, numbered(range(100)))
    with make(WatchedOutbox(outbox, before=before), cluster) as relay:
        assert relay.drain(30) == 0
        relay._use.handle.producer._core.inject_fatal_error(
            90, "There is a newer producer with the same transactionalId"
        )
        outboxes.add(outbox, numbered(range(100, 200)))
        assert relay.drain(30) == 0
    assert set(known) == {True}


def test_what_it_is_not_allowed_to_name_is_told_and_tried_again(
    outbox: Outbox, cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.push_request_errors(ApiKey.INIT_PRODUCER_ID, 2 * ["TRANSACTIONAL_ID_AUTHORIZATION_FAILED"])
    outboxes.add(outbox, numbered(range(100)))
    with make(outbox, cluster) as relay:
        assert relay.drain(60) == 0
    assert "brokers do not let it have the transactional id kbatch-relay-" in caplog.text
    assert "authorization failed" in caplog.text
    check_history(range(100), stored(cluster))


@pytest.mark.parametrize("api", [ApiKey.ADD_PARTITIONS_TO_TXN, ApiKey.PRODUCE, ApiKey.END_TXN])
def test_a_transaction_that_is_fenced_at_any_request_counts_no_attempt(
    outbox: Outbox, cluster: MockCluster, api: ApiKey
) -> None:
    outboxes.add(outbox, numbered(range(100)))
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
        before = relay._loop._owner.name
        cluster.push_request_errors(api, ["INVALID_PRODUCER_EPOCH" if api == ApiKey.PRODUCE else "PRODUCER_FENCED"])
        outboxes.add(outbox, numbered(range(100, 200)))
        assert relay.drain(60) == 0
        stats = relay.stats()
        assert relay._loop._owner.name != before or api == ApiKey.PRODUCE  # there librdkafka asks for another epoch
    assert (stats["refused"], stats["put_off"], stats["dead"]) == (0, 0, 0)
    assert {int(record.value) for record in stored(cluster)} == set(range(200))


def test_a_record_that_is_refused_is_sent_alone_and_the_rest_at_once(outbox: Outbox, cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(50)))
    outboxes.add(outbox, [Envelope(data=b"0", key="a", topic="refused")])
    outboxes.add(outbox, numbered(range(50, 100)))
    with make(outbox, cluster) as relay:
        assert relay.drain(60) == 0
        stats = relay.stats()
    assert (stats["acked"], stats["dead"], stats["refused"]) == (100, 1, 2)
    (letter,) = outbox.dead_letters.find()
    assert letter.attempts == 3
    check_history(range(100), stored(cluster), copies=None)


def test_a_record_that_is_damaged_aborts_nothing(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(100)))
    first = "seq = (SELECT min(seq) FROM {outbox})"
    outboxes.query(outbox, "UPDATE {outbox} SET packed = substr(packed, 1, 5) WHERE " + first)
    with make(outbox, cluster) as relay:
        assert relay.drain(60) == 0
        assert (relay.stats()["acked"], relay.stats()["dead"]) == (99, 1)
    assert len(stored(cluster)) == 99


def test_what_has_expired_aborts_nothing(outbox: Outbox, cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(100)))
    outboxes.query(outbox, "UPDATE {outbox} SET deliver_by = 1 WHERE seq = (SELECT min(seq) FROM {outbox})")
    with make(outbox, cluster) as relay:
        assert relay.drain(60) == 0
        assert (relay.stats()["acked"], relay.stats()["expired"]) == (99, 1)


def test_a_producer_in_its_fatal_state_is_replaced_by_one_with_another_name(
    outbox: Outbox, cluster: MockCluster
) -> None:
    outboxes.add(outbox, numbered(range(100)))
    with make(outbox, cluster) as relay:
        assert relay.drain(30) == 0
        before = relay._loop._owner.name
        relay._use.handle.producer._core.inject_fatal_error(45, "as a broker would")
        outboxes.add(outbox, numbered(range(100, 200)))
        assert relay.drain(30) == 0
        assert relay._loop._owner.name != before
    check_history(range(200), stored(cluster))


def test_one_that_reaches_no_broker_to_end_its_transaction_leaves_its_buckets_to_others(
    outbox: Outbox, cluster: MockCluster
) -> None:
    with running(make(outbox, cluster, failures_to_open=1)) as relay:
        outboxes.add(outbox, numbered(range(100)))
        until(lambda: relay.stats()["acked"] == 100, "the first")
        transactions: Any = relay._use.handle.producer._transactions

        def cannot_abort(batch: Any, code: int, *, asked: bool = False) -> None:
            transactions._undecided = "its last transaction could not be aborted"
            transactions._held.wait_until_settled(batch)
            transactions._held.conclude(batch, code)

        transactions._abort = cannot_abort
        before = relay._loop._owner.name
        cluster.set_broker_down()
        outboxes.add(outbox, numbered(range(100, 200)))
        until(lambda: relay._loop._owner.former == {before}, "that it has begun anew", 20)
        assert relay.stats()["buckets"] == 0
        assert relay.state is not CircuitState.CLOSED
        cluster.set_broker_up()
        until(lambda: relay.stats()["acked"] == 200, "the others")
    check_history(range(200), stored(cluster))


def test_a_row_that_cannot_be_moved_does_not_keep_its_producer_from_being_replaced(
    outbox: Outbox, cluster: MockCluster
) -> None:
    outboxes.refuse_rows(outbox, "dead")
    outboxes.add(outbox, numbered(range(11)))
    outboxes.query(outbox, "UPDATE {outbox} SET packed = substr(packed, 1, 5) WHERE seq = 11")
    with running(make(outbox, cluster)) as relay:
        until(lambda: outbox.status().waiting == 1, "one row that the database refuses to move")
        before = relay._loop._owner.name
        relay._use.handle.producer._core.inject_fatal_error(45, "as a broker would")
        outboxes.add(outbox, numbered(range(20, 100)))
        until(lambda: outbox.status().waiting == 1, "the others")
        assert relay._loop._owner.name != before
        outboxes.take_rows(outbox, "dead")
        assert relay.drain(30) == 0
    assert outbox.status().dead == 1
    check_history([*range(10), *range(20, 100)], stored(cluster))


@pytest.mark.parametrize(
    ("producer", "options", "says"),
    [
        ({}, {"fencing": "zookeeper"}, "fencing must be 'kafka' or None"),
        ({"transactional.id": "mine"}, {"fencing": "kafka"}, "transactional.id"),
        ({"transactional.id": "kbatch-relay"}, {}, "transactional.id"),
        ({"delivery.timeout.ms": 30_000}, {"fencing": "kafka"}, "is longer than transaction.timeout.ms"),
    ],
)
def test_wrong_options(outbox: SqliteOutbox, producer: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Relay(outbox, {"bootstrap.servers": "127.0.0.1:1", **producer}, **options)


def test_a_producer_of_the_callers_is_refused(outbox: SqliteOutbox) -> None:
    with (
        kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer,
        pytest.raises(ConfigError, match="give their configuration"),
    ):
        Relay(outbox, producer, fencing="kafka")
