"""Batched senders and their agents on the mock cluster: outages, retries, the circuit breaker, fatal producers."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

import kbatch
from kbatch import CircuitState, Envelope, RetryPolicy
from kbatch.testing import ApiKey, MockCluster

from ..sending import KINDS, Driver, Load, check_nothing_lost, check_overtaken, check_strict_order, numbers
from ..waiting import until
from .clients import end_offsets, read_back

TOPIC = "orders"
QUICK: dict[str, Any] = {
    "reconnect.backoff.ms": 10,
    "reconnect.backoff.max.ms": 100,
    "retry.backoff.ms": 10,
    "retry.backoff.max.ms": 50,
    "topic.metadata.refresh.fast.interval.ms": 10,
    "topic.metadata.propagation.max.ms": 200,
    "log_level": 0,
}
# What the broker refuses comes back at once, as it does when librdkafka has tried often enough.
NO_RETRIES: dict[str, Any] = {"retries": 0, "enable.idempotence": False, "max.in.flight": 1}
# A batch that `flush` closes is one request.
ONE_BATCH: dict[str, Any] = {"batch_timeout_ms": 10_000}
ONE_REQUEST: dict[str, Any] = {"linger.ms": 20}
SOON = RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.1)
NOT_ENOUGH_REPLICAS = "NOT_ENOUGH_REPLICAS"

Open = Callable[..., Driver]

# Slow, and the agent does the same for both kinds.
ONLY_THREADS = pytest.mark.parametrize("kind", ["threads"])


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster(brokers=3) as cluster:
        cluster.create_topic(TOPIC, partitions=2)
        yield cluster


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(cluster: MockCluster, kind: str) -> Iterator[Open]:
    """Makes a sender: options of the agent; those of the sender and the producer as dicts."""
    open_ones: list[tuple[Driver, kbatch.Producer]] = []

    def make(*, sender: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **agent: Any) -> Driver:
        own = {"bootstrap.servers": cluster.bootstrap_servers, **QUICK, **(config or {})}
        producer = kbatch.Producer(own, close_timeout_s=0)
        agent = {"retry": SOON, "probe_interval_s": 0.1, "max_probe_interval_s": 0.5, **agent}
        driver = Driver(kind, producer, TOPIC, options={"batch_timeout_ms": 1.0, **(sender or {})}, **agent)
        open_ones.append((driver, producer))
        return driver

    try:
        yield make
    finally:
        for driver, producer in open_ones:
            with driver:
                pass
            producer.close(0)


def values(cluster: MockCluster, topic: str = TOPIC) -> list[bytes | None]:
    return [record.value for record in read_back(cluster.bootstrap_servers, topic)]


def datas(count: int, prefix: str = "", **fields: Any) -> list[Envelope[Any]]:
    return [Envelope(data=f"{prefix}{n}".encode(), **fields) for n in range(count)]


def later(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


# -- no broker answers, under load


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_outage_under_load(cluster: MockCluster, opened: Open, strict: bool) -> None:
    """For five times the messages' time no broker answers. Nothing is lost, the order holds, memory is bounded."""
    in_flight, batch_size, bound = 5, 20, 400
    driver = opened(
        sender={"batch_size": batch_size, "max_buffered": bound},
        config={"message.timeout.ms": 1_000},
        strict_order=strict,
        max_in_flight_batches=in_flight,
    )
    load = Load(driver)
    with load.running():
        until(lambda: driver.stats()["acked"] > 200, "what is sent before")
        cluster.set_broker_down()
        until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")  # nothing is acknowledged any more
        until(lambda: len(driver) == bound, "a full buffer")
        assert driver.try_send(Envelope(1)) is False
        with pytest.raises(kbatch.SenderFullError):
            driver.send(Envelope(1), timeout=0.01)
        time.sleep(5)
        taken = load.count
        time.sleep(0.2)
        assert load.count == taken  # nobody gets in
        cluster.set_broker_up()
        until(lambda: load.count > taken + 500, "going on")
    assert driver.drain() == 0
    assert driver.close() == 0
    assert load.most <= bound
    assert load.refused > 0
    assert driver.given_up == []
    assert driver.states[:2] == ["closed", "open"]
    assert driver.states[-2:] == ["half-open", "closed"]
    stats = driver.stats()
    assert (stats["accepted"], stats["acked"], stats["buffered"], stats["failed"]) == (load.count, load.count, 0, 0)
    assert stats["retried"] > 0
    seen = numbers(read_back(cluster.bootstrap_servers, TOPIC))
    check_nothing_lost(load, seen, copies=True)  # the mock cluster does not deduplicate
    if strict:
        check_strict_order(seen)
    else:
        check_overtaken(seen, in_flight * batch_size)


def test_an_outage_before_the_first_envelope(cluster: MockCluster, opened: Open) -> None:
    cluster.set_broker_down()
    driver = opened(config={"message.timeout.ms": 300})
    driver.send_all(datas(10, partition=0))
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    cluster.set_broker_up()
    assert driver.flush() == 0
    assert values(cluster) == [str(n).encode() for n in range(10)]


@ONLY_THREADS
def test_an_outage_counts_no_attempt(cluster: MockCluster, opened: Open) -> None:
    driver = opened(
        config={"message.timeout.ms": 100}, retry=RetryPolicy(2, initial_backoff_s=0.01), failures_to_open=1_000
    )
    driver.send(Envelope(data=b"0"))
    assert driver.flush() == 0
    cluster.set_broker_down()
    driver.send(Envelope(data=b"1"))
    until(lambda: driver.stats()["retried"] >= 4, "failures")
    cluster.set_broker_up()
    assert driver.flush() == 0
    assert driver.given_up == []
    assert set(values(cluster)) == {b"0", b"1"}


# -- order


def test_several_batches_in_flight_keep_the_order(cluster: MockCluster, opened: Open) -> None:
    cluster.set_rtt(-1, 20)
    driver = opened(sender={"batch_size": 10}, max_in_flight_batches=5)
    driver.send_all(Envelope({"key": "k", "n": n}, key="k") for n in range(2_000))
    until(lambda: driver.stats()["in_flight_batches"] > 1, "several batches in flight")
    assert driver.flush() == 0
    assert numbers(read_back(cluster.bootstrap_servers, TOPIC)) == {"k": list(range(2_000))}


@ONLY_THREADS
def test_strict_order_with_failures_all_the_time(cluster: MockCluster, opened: Open) -> None:
    driver = opened(
        sender={"batch_size": 7},
        config=NO_RETRIES,
        strict_order=True,
        retry=RetryPolicy(None, initial_backoff_s=0.001, max_backoff_s=0.005),
        failures_to_open=1_000,
    )
    load = Load(driver)
    with load.running():
        for n in range(30):
            cluster.push_partition_errors(TOPIC, n % 2, ApiKey.PRODUCE, [NOT_ENOUGH_REPLICAS] * (n % 3 + 1))
            goal = driver.stats()["acked"] + 20
            until(lambda goal=goal: driver.stats()["acked"] > goal, "acknowledgements")
    assert driver.drain() == 0
    assert driver.given_up == []
    assert driver.stats()["retried"] >= 30
    seen = numbers(read_back(cluster.bootstrap_servers, TOPIC))
    check_nothing_lost(load, seen, copies=False)
    assert seen == {key: list(range(n)) for key, n in load.sent.items()}


def test_what_was_not_sent_yet_waits_behind_what_failed(cluster: MockCluster, opened: Open) -> None:
    """Without strict order: only what was in flight already overtakes; what is sent later does not."""
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, [NOT_ENOUGH_REPLICAS])
    driver = opened(config=NO_RETRIES, retry=RetryPolicy(initial_backoff_s=0.3, jitter=0))
    driver.send(Envelope(data=b"0", partition=0))
    until(lambda: driver.stats()["retried"], "the failure")
    driver.send_all(datas(20, "late ", partition=0))
    driver.send_all(datas(20, "other ", partition=1))
    assert driver.flush() == 0
    records = read_back(cluster.bootstrap_servers, TOPIC)
    assert [record.value for record in records if record.partition == 0] == [
        b"0",
        *(f"late {n}".encode() for n in range(20)),
    ]
    others = [record for record in records if record.partition == 1]
    assert len(others) == 20
    # Others have not waited for it: their batch was mapped before it went again.
    assert max(r.timestamp for r in others) < next(r.timestamp for r in records if r.value == b"late 0")


# -- what is sent again, and what is not


def test_only_what_failed_is_sent_again(cluster: MockCluster, opened: Open) -> None:
    cluster.push_partition_errors(TOPIC, 1, ApiKey.PRODUCE, [NOT_ENOUGH_REPLICAS] * 2)
    driver = opened(config=NO_RETRIES | ONE_REQUEST, sender=ONE_BATCH)
    sent = datas(5, "a", partition=0) + datas(5, "b", partition=1)
    driver.send_all(sent)
    assert driver.flush() == 0
    assert driver.given_up == []
    stats = driver.stats()
    assert (stats["acked"], stats["retried"]) == (10, 10)  # five, twice
    records = read_back(cluster.bootstrap_servers, TOPIC)
    assert [record.value for record in records] == [envelope.data for envelope in sent]
    assert [dict(record.headers)["id"] for record in records] == [str(envelope.id).encode() for envelope in sent]


@pytest.mark.parametrize("attempts", [1, 3])
def test_attempts_come_to_an_end(cluster: MockCluster, opened: Open, attempts: int) -> None:
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, [NOT_ENOUGH_REPLICAS] * attempts)
    driver = opened(
        config=NO_RETRIES,
        retry=RetryPolicy(attempts, initial_backoff_s=0.01),
        failures_to_open=1_000,
        strict_order=True,
    )
    sent = datas(3, partition=0, key="k")
    driver.send(sent[0])
    assert driver.flush() == 0
    assert [envelope for envelope, _ in driver.given_up] == sent[:1]
    assert driver.reasons == [NOT_ENOUGH_REPLICAS]
    assert driver.stats()["retried"] == attempts - 1
    driver.send_all(sent[1:])  # its key goes on
    assert driver.flush() == 0
    assert values(cluster) == [b"1", b"2"]


@ONLY_THREADS
def test_age_comes_to_an_end_while_brokers_are_away(cluster: MockCluster, opened: Open) -> None:
    driver = opened(
        config={"message.timeout.ms": 1000},
        retry=RetryPolicy(max_age_s=4.0, initial_backoff_s=0.01),
        failures_to_open=1,
    )
    driver.send(Envelope(data=b"before"))
    assert driver.flush() == 0
    cluster.set_broker_down()
    sent = datas(10)
    driver.send_all(sent[:5])
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    driver.send_all(sent[5:])
    assert driver.flush() == 0
    assert [envelope for envelope, _ in driver.given_up] == sent
    assert driver.reasons == ["_MSG_TIMED_OUT"] * 5 + ["CircuitOpenError"] * 5
    cluster.set_broker_up()
    driver.send(Envelope(data=b"after"))
    assert driver.flush() == 0
    assert sorted(values(cluster)) == [b"after", b"before"]


@ONLY_THREADS
def test_deliver_by_passes_while_it_waits(cluster: MockCluster, opened: Open) -> None:
    cluster.set_broker_down()
    driver = opened(config={"message.timeout.ms": 1000})
    driver.send_all(datas(3, "short ", deliver_by=later(1)))
    driver.send_all(datas(3, "long ", deliver_by=later(600)))
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    time.sleep(1)
    cluster.set_broker_up()
    assert driver.flush() == 0
    assert driver.given_up == []
    stats = driver.stats()
    assert (stats["expired"], stats["acked"]) == (3, 3)
    assert sorted(values(cluster)) == [b"long 0", b"long 1", b"long 2"]


@pytest.mark.parametrize("error", ["UNSUPPORTED_FOR_MESSAGE_FORMAT", "POLICY_VIOLATION"])
def test_what_is_refused_for_good_is_not_sent_again(cluster: MockCluster, opened: Open, error: str) -> None:
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, [error])
    driver = opened(config=NO_RETRIES | ONE_REQUEST, sender=ONE_BATCH)
    sent = datas(3, partition=0)
    driver.send_all(sent)
    assert driver.flush() == 0
    assert [envelope for envelope, _ in driver.given_up] == sent
    assert driver.reasons == [error] * 3
    assert driver.stats()["retried"] == 0
    until(lambda: driver.agent.state is CircuitState.CLOSED, "a closed circuit")
    driver.send(Envelope(data=b"after", partition=1))
    assert driver.flush() == 0
    assert values(cluster) == [b"after"]


def test_what_cannot_be_mapped_is_the_only_one_that_fails(cluster: MockCluster, opened: Open) -> None:
    driver = opened()
    sent = datas(10, partition=0)
    bad = [Envelope(object()), Envelope(1, key=7), Envelope(data=b"x" * 2_000_000)]  # type: ignore[arg-type]
    driver.send_all([*sent[:5], bad[0], *sent[5:], *bad[1:]])
    assert driver.flush() == 0
    assert {envelope.id for envelope, _ in driver.given_up} == {envelope.id for envelope in bad}
    assert driver.reasons == ["SerializationError"] * 3
    assert driver.agent.state is CircuitState.CLOSED
    assert values(cluster) == [str(n).encode() for n in range(10)]


def test_records_that_are_too_large_together(cluster: MockCluster, opened: Open) -> None:
    """A record batch that the broker refuses for its size is sent again in parts, of which none is too large."""
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"] * 3)
    driver = opened(config=NO_RETRIES | ONE_REQUEST, sender=ONE_BATCH)
    driver.send_all(datas(16, partition=0))
    assert driver.flush() == 0
    assert driver.given_up == []
    assert Counter(values(cluster)) == Counter(str(n).encode() for n in range(16))


def test_one_alone_that_is_too_large(cluster: MockCluster, opened: Open) -> None:
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"] * 2)
    driver = opened(config=NO_RETRIES)
    driver.send(Envelope(data=b"large", partition=0))
    assert driver.flush() == 0
    assert driver.reasons == ["MSG_SIZE_TOO_LARGE"]
    assert driver.agent.state is CircuitState.CLOSED
    driver.send(Envelope(data=b"next", partition=0))
    assert driver.flush() == 0
    assert values(cluster) == [b"next"]


def test_on_failed_that_raises(cluster: MockCluster, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    told = []

    def fail(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        told.append(envelope)
        raise ZeroDivisionError

    driver = opened(on_failed=fail)
    sent = [Envelope(object()) for _ in range(3)]
    driver.send_all([*sent, Envelope(data=b"good")])
    with pytest.raises(kbatch.UndeliveredError) as caught:
        driver.drain()
    assert told == sent
    assert [envelope for envelope, _ in caught.value.failures] == sent
    assert [envelope for envelope, _ in driver.agent.recent_failures] == sent
    assert caplog.text.count("on_failed failed") == 3
    assert values(cluster) == [b"good"]


# -- dead letters


def test_dead_letters(cluster: MockCluster, opened: Open) -> None:
    cluster.create_topic("dead")
    cluster.push_partition_errors(
        TOPIC, 0, ApiKey.PRODUCE, ["POLICY_VIOLATION", NOT_ENOUGH_REPLICAS, NOT_ENOUGH_REPLICAS]
    )
    driver = opened(
        sender={"batch_timeout_ms": 0},
        config=NO_RETRIES,
        dead_letter_topic="dead",
        retry=RetryPolicy(2, initial_backoff_s=0.01),
        failures_to_open=1_000,
    )
    first = Envelope(data=b"refused", partition=0, key="k", headers=[("x", "1")], deliver_by=later(60))
    second = Envelope({"n": 1}, partition=0)
    for envelope in (first, second):
        driver.send(envelope)
        assert driver.flush() == 0
    driver.send(Envelope(object()))  # cannot be written there either
    assert driver.drain() == 0
    assert driver.reasons == ["SerializationError"]
    stats = driver.stats()
    assert (stats["dead_letters"], stats["acked"], stats["failed"]) == (2, 0, 1)
    assert values(cluster) == []
    refused, tried = read_back(cluster.bootstrap_servers, "dead")
    headers = {name: value.decode() for name, value in refused.headers if value is not None}
    assert (refused.key, refused.value, headers["id"], headers["x"]) == (b"k", b"refused", str(first.id), "1")
    assert headers["dead-letter-topic"] == TOPIC
    assert (headers["dead-letter-error"], headers["dead-letter-attempts"]) == ("POLICY_VIOLATION", "1")
    assert "POLICY_VIOLATION" in headers["dead-letter-reason"]
    assert "deliver-by" not in headers
    told = datetime.fromisoformat(headers["dead-letter-time"].replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - told).total_seconds()) < 60
    headers = {name: value.decode() for name, value in tried.headers if value is not None}
    assert (tried.value, headers["id"]) == (b'{"n":1}', str(second.id))
    assert (headers["dead-letter-error"], headers["dead-letter-attempts"]) == (NOT_ENOUGH_REPLICAS, "2")


def test_a_dead_letter_that_is_refused(cluster: MockCluster, opened: Open) -> None:
    cluster.create_topic("dead")
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, ["POLICY_VIOLATION"])
    cluster.push_partition_errors("dead", 0, ApiKey.PRODUCE, ["TOPIC_AUTHORIZATION_FAILED"])
    driver = opened(config=NO_RETRIES, dead_letter_topic="dead")
    envelope = Envelope(data=b"1", partition=0)
    driver.send(envelope)
    assert driver.flush() == 0
    assert [told for told, _ in driver.given_up] == [envelope]
    assert driver.reasons == ["POLICY_VIOLATION"]  # the first reason
    assert values(cluster, "dead") == []


# -- scheduled


def test_what_is_scheduled_is_held_until_then(cluster: MockCluster, opened: Open) -> None:
    driver = opened()
    driver.send_all(datas(3, "never ", scheduled_time=later(600), partition=0))
    due = later(1.0)
    driver.send_all(datas(3, "late ", scheduled_time=due, partition=1))
    driver.send_all(datas(3, "now ", partition=0))
    assert driver.flush() == 0  # does not wait for what is scheduled
    assert [record.value for record in read_back(cluster.bootstrap_servers, TOPIC) if record.partition == 0] == [
        b"now 0",
        b"now 1",
        b"now 2",
    ]
    assert driver.stats()["scheduled"] >= 3
    until(lambda: driver.stats()["scheduled"] == 3 and driver.stats()["acked"] == 6, "what is due")
    assert (driver.stats()["buffered"], len(driver)) == (3, 3)
    records = [record for record in read_back(cluster.bootstrap_servers, TOPIC) if record.partition == 1]
    assert [record.value for record in records] == [b"late 0", b"late 1", b"late 2"]
    assert all(record.timestamp >= due.timestamp() * 1_000 - 1 for record in records)
    assert driver.close(0.1) == 3


def test_a_drain_waits_for_what_is_scheduled(cluster: MockCluster, opened: Open) -> None:
    driver = opened()
    driver.send_all(datas(3, scheduled_time=later(0.3), partition=0))
    assert driver.drain() == 0
    assert values(cluster) == [b"0", b"1", b"2"]


@ONLY_THREADS
def test_what_comes_due_while_brokers_are_away(cluster: MockCluster, opened: Open) -> None:
    driver = opened(config={"message.timeout.ms": 1000})
    cluster.set_broker_down()
    driver.send_all(datas(3, "late ", scheduled_time=later(0.5), partition=0))
    driver.send_all(datas(3, "now ", partition=0))
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    time.sleep(0.5)
    cluster.set_broker_up()
    assert driver.drain() == 0
    assert driver.given_up == []
    assert set(values(cluster)) == {f"{name} {n}".encode() for name in ("now", "late") for n in range(3)}


def test_what_is_scheduled_is_given_up_by_close(cluster: MockCluster, opened: Open) -> None:
    driver = opened()
    sent = datas(3, scheduled_time=later(600))
    driver.send_all([*sent, Envelope(data=b"now")])
    assert driver.flush() == 0
    assert driver.close(0.1) == 3
    assert [envelope for envelope, _ in driver.given_up] == sent
    assert driver.reasons == ["SenderClosedError"] * 3
    assert values(cluster) == [b"now"]


# -- the topic


def test_an_error_of_the_topic_that_goes_away(cluster: MockCluster, opened: Open) -> None:
    driver = opened(retry=RetryPolicy(None, initial_backoff_s=0.02, max_backoff_s=0.1))
    load = Load(driver, lanes=2)
    with load.running():
        until(lambda: driver.stats()["acked"] > 100, "what is sent before")
        cluster.set_topic_error(TOPIC, "UNKNOWN_TOPIC_OR_PART")
        driver.agent._handle.producer._core.probe(TOPIC, 5)  # so that it learns of it
        until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
        cluster.set_topic_error(TOPIC, 0)
        goal = load.count + 200
        until(lambda: load.count > goal, "going on")
    assert driver.drain() == 0
    assert driver.given_up == []
    check_nothing_lost(load, numbers(read_back(cluster.bootstrap_servers, TOPIC)), copies=False)


# -- fatal producers


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_fatal_producer_is_replaced_twice(cluster: MockCluster, opened: Open, strict: bool) -> None:
    driver = opened(sender={"batch_size": 20}, strict_order=strict)
    given = driver.agent._handle.producer
    seen_ones = [given]
    load = Load(driver, lanes=2)
    with load.running():
        for _ in range(2):
            until(lambda: driver.stats()["in_flight_batches"] and driver.stats()["acked"] > 100, "what is sent before")
            driver.agent._handle.producer._core.inject_fatal_error(45, "made up")
            until(lambda: driver.agent._handle.producer is not seen_ones[-1], "another producer")
            seen_ones.append(driver.agent._handle.producer)
            goal = load.count + 200
            until(lambda goal=goal: load.count > goal, "going on")
    assert driver.drain() == 0
    assert driver.close() == 0
    assert driver.given_up == []
    assert driver.stats()["acked"] == load.count
    assert [producer.closed for producer in seen_ones] == [False, True, True]  # the first one is the caller's
    seen = numbers(read_back(cluster.bootstrap_servers, TOPIC))
    check_nothing_lost(load, seen, copies=True)
    if strict:
        check_strict_order(seen)


def test_a_fatal_error_of_the_broker(cluster: MockCluster, opened: Open) -> None:
    driver = opened()
    given = driver.agent._handle.producer
    driver.send_all(datas(5, partition=0))
    assert driver.flush() == 0
    cluster.push_partition_errors(TOPIC, 0, ApiKey.PRODUCE, ["OUT_OF_ORDER_SEQUENCE_NUMBER"])
    driver.send_all(datas(5, "again ", partition=0))
    assert driver.flush() == 0
    assert driver.given_up == []
    assert driver.agent._handle.producer is not given
    assert Counter(values(cluster)) == Counter([*(b"%d" % n for n in range(5)), *(b"again %d" % n for n in range(5))])


def test_a_fenced_producer_is_never_replaced(cluster: MockCluster, opened: Open) -> None:
    driver = opened()
    given = driver.agent._handle.producer
    driver.send(Envelope(data=b"before"))
    assert driver.flush() == 0
    given._core.inject_fatal_error(47, "made up")  # INVALID_PRODUCER_EPOCH
    envelope = Envelope(data=b"after")
    driver.send(envelope)
    assert driver.flush() == 0
    assert [told for told, _ in driver.given_up] == [envelope]
    assert driver.reasons in (["SenderClosedError"], ["INVALID_PRODUCER_EPOCH"], ["_FENCED"])
    with pytest.raises(kbatch.SenderClosedError) as caught:
        driver.send(Envelope(1))
    assert isinstance(caught.value.__cause__, kbatch.ProducerFencedError)
    assert driver.agent._handle.producer is given
    assert driver.close() == 1
    assert values(cluster) == [b"before"]


# -- the circuit


@ONLY_THREADS
def test_while_it_is_open_nothing_is_written_and_nothing_is_made(cluster: MockCluster, opened: Open) -> None:
    cluster.push_request_errors(ApiKey.PRODUCE, [NOT_ENOUGH_REPLICAS])
    driver = opened(
        config=NO_RETRIES,
        retry=RetryPolicy(None, initial_backoff_s=0.01),
        failures_to_open=1,
        probe_interval_s=1.0,
        max_probe_interval_s=1.0,
    )
    driver.send(Envelope(data=b"1", partition=0))
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    cluster.set_partition_leader(TOPIC, 0, -1)
    cluster.set_partition_leader(TOPIC, 1, -1)
    cluster.start_request_tracking()
    until(lambda: sum(request.api_key == ApiKey.METADATA for request in cluster.requests()) >= 3, "probes")
    asked = {request.api_key for request in cluster.requests()}
    cluster.stop_request_tracking()
    assert asked <= {ApiKey.METADATA, ApiKey.API_VERSIONS}
    assert driver.agent.state is CircuitState.OPEN
    for partition in (0, 1):
        cluster.set_partition_leader(TOPIC, partition, 1)
    assert driver.flush() == 0
    until(lambda: driver.states == ["closed", "open", "half-open", "closed"], "what the callback is told")
    assert values(cluster) == [b"1"]
    topics = AdminClient({"bootstrap.servers": cluster.bootstrap_servers}).list_topics(timeout=10).topics
    assert set(topics) == {TOPIC}


def test_a_trial_that_fails_opens_it_again(cluster: MockCluster, opened: Open) -> None:
    cluster.push_request_errors(ApiKey.PRODUCE, [NOT_ENOUGH_REPLICAS] * 3)
    retry = RetryPolicy(None, initial_backoff_s=0.01, max_backoff_s=0.02)
    driver = opened(config=NO_RETRIES, retry=retry, failures_to_open=1)
    driver.send(Envelope(data=b"1", partition=0))
    assert driver.flush() == 0
    until(lambda: driver.states == ["closed", *["open", "half-open"] * 3, "closed"], "what the callback is told")
    assert values(cluster) == [b"1"]


class Recorder(kbatch.SenderCallback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("mark_"):
            return super().__getattribute__(name)
        return lambda _, answer: self.calls.append((name, answer))


def test_a_sender_of_whole_batches_says_that_the_circuit_is_open(cluster: MockCluster, kind: str) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, **QUICK, "message.timeout.ms": 1_500}
    with kbatch.Producer(config, close_timeout_s=0) as producer:
        driver = Driver(kind, producer, TOPIC, options={}, failures_to_open=2, probe_interval_s=0.05, retry=SOON)
        with driver:
            agent = driver.agent

            def send(*envelopes: Envelope[Any]) -> tuple[str, Any]:
                callback = Recorder()
                driver._do(agent.send_batch(callback, kbatch.OutgoingBatch(envelopes)))
                (call,) = callback.calls
                return call

            assert send(Envelope(data=b"0"))[0] == "mark_successful"
            cluster.set_broker_down()
            assert [send(Envelope(data=b"lost"))[0] for _ in range(2)] == ["mark_timed_out"] * 2
            assert agent.state is CircuitState.OPEN
            for _ in range(3):
                method, error = send(Envelope(data=b"refused"), Envelope(data=b"refused"))
                assert method == "mark_circuit_open"
                assert isinstance(error, kbatch.CircuitOpenError)
                assert error.report is not None
                assert error.report.failed == 2
                assert not any(each.possibly_persisted for each in error.report.errors.values())
            cluster.set_broker_up()
            until(lambda: agent.state is CircuitState.HALF_OPEN, "a probe that succeeds")
            assert send(Envelope(data=b"trial"))[0] == "mark_successful"
            assert agent.state is CircuitState.CLOSED
    assert Counter(values(cluster)) == Counter([b"0", b"trial"])


def test_the_trial_is_one_batch_of_many_senders(cluster: MockCluster, kind: str) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, **QUICK, "message.timeout.ms": 1_500}
    with kbatch.Producer(config, close_timeout_s=0) as producer:
        driver = Driver(kind, producer, TOPIC, options={}, failures_to_open=1, probe_interval_s=0.05, retry=SOON)
        with driver:
            agent = driver.agent

            def send() -> str:
                callback = Recorder()
                driver._do(agent.send_batch(callback, kbatch.OutgoingBatch([Envelope(1)])))
                return callback.calls[0][0]

            cluster.set_broker_down()
            assert send() == "mark_timed_out"
            cluster.set_broker_up()
            until(lambda: agent.state is CircuitState.HALF_OPEN, "a probe that succeeds")
            cluster.set_rtt(-1, 500)
            answers: list[str] = []
            trial = threading.Thread(target=lambda: answers.append(send()))
            trial.start()
            until(lambda: len(producer) > 0, "the trial in flight")
            assert send() == "mark_circuit_open"
            trial.join()
            cluster.set_rtt(-1, 0)
    assert len(answers) == 1


# -- closing


def test_the_producer_is_closed_while_the_circuit_is_open(cluster: MockCluster, opened: Open) -> None:
    driver = opened(config={"message.timeout.ms": 300}, sender={"max_buffered": 50, "batch_size": 10})
    driver.send(Envelope(data=b"0"))
    assert driver.flush() == 0
    cluster.set_broker_down()
    sent = datas(50)
    driver.send_all(sent)
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    driver.agent._handle.producer._core.close(0)
    with pytest.raises(kbatch.SenderClosedError) as caught:
        driver.send(Envelope(data=b"no room"))
    assert isinstance(caught.value.__cause__, kbatch.ProducerClosedError)
    until(lambda: len(driver) == 0, "what on_failed is told")
    assert Counter(envelope.id for envelope, _ in driver.given_up) == Counter(envelope.id for envelope in sent)


def test_close_tells_what_was_not_sent(cluster: MockCluster, opened: Open) -> None:
    driver = opened(config={"message.timeout.ms": 300})
    driver.send(Envelope(data=b"0"))
    assert driver.flush() == 0
    cluster.set_broker_down()
    sent = datas(50)
    driver.send_all(sent)
    until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
    assert driver.close(0.2) == 50
    assert [envelope for envelope, _ in driver.given_up] == sent
    assert set(driver.reasons) <= {"SenderClosedError", "_MSG_TIMED_OUT"}
    cluster.set_broker_up()
    stats = driver.stats()
    assert (stats["accepted"], stats["acked"], stats["failed"], stats["buffered"]) == (51, 1, 50, 0)
    assert sum(end_offsets(cluster.bootstrap_servers, TOPIC).values()) == 1
