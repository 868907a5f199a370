"""Batched senders on real brokers: outages under load, what brokers refuse, producers that cannot go on."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from confluent_kafka.admin._acl import AclOperation

import kbatch
from kbatch import CircuitState, Envelope, RetryPolicy
from tests.kafka.cluster import KafkaCluster
from tests.kafka.conftest import NIGHTLY
from tests.kafka.proxy import Direction
from tests.mock.clients import end_offsets, read, read_back
from tests.sending import KINDS, Driver, Load, check_nothing_lost, check_overtaken, check_strict_order, numbers
from tests.waiting import until

QUIET: dict[str, Any] = {"log_level": 0, "reconnect.backoff.max.ms": 500}
SOON: dict[str, Any] = {
    "retry": RetryPolicy(initial_backoff_s=0.05, max_backoff_s=0.5),
    "probe_interval_s": 0.2,
    "max_probe_interval_s": 1.0,
}
PRINCIPAL = "User:CN=client"
OUTAGE_S = 10
LONG_S = 120.0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def producer_of(kafka: KafkaCluster, **config: Any) -> kbatch.Producer:
    return kbatch.Producer({"bootstrap.servers": kafka.bootstrap_servers, **QUIET, **config}, close_timeout_s=0)


# -- no broker answers, under load


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("how", ["stopped", pytest.param("killed", marks=[] if NIGHTLY else pytest.mark.nightly)])
def test_an_outage_under_load(kafka3: KafkaCluster, kind: str, how: str, strict: bool) -> None:
    """For five times the messages' time no broker answers. Nothing is lost, the order holds, memory is bounded."""
    in_flight, batch_size, bound = 5, 20, 400
    topic = kafka3.create_topic(partitions=3)
    options = {"batch_size": batch_size, "batch_timeout_ms": 1.0, "max_buffered": bound}
    agent = {"strict_order": strict, "max_in_flight_batches": in_flight, **SOON}
    with (
        producer_of(kafka3, **{"message.timeout.ms": 2_000}) as producer,
        Driver(kind, producer, topic, options=options, **agent) as driver,
    ):
        load = Load(driver)
        with load.running():
            until(lambda: driver.stats()["acked"] > 500, "what is sent before")
            for broker in kafka3.brokers:
                if how == "stopped":
                    broker.pause()
                else:
                    broker.kill()
            until(lambda: len(driver) == bound, "a full buffer")
            time.sleep(OUTAGE_S)
            until(lambda: driver.agent.state is CircuitState.OPEN, "an open circuit")
            taken = load.count
            time.sleep(0.5)
            assert load.count == taken
            assert driver.try_send(Envelope(1)) is False
            kafka3.heal()
            until(lambda: load.count > taken + 500, "going on", LONG_S)
        assert driver.drain() == 0
        assert driver.close() == 0
        assert load.most <= bound
        assert driver.given_up == []
        assert driver.stats()["acked"] == load.count
        assert driver.states[-2:] == ["half-open", "closed"]
    seen = numbers(read_back(kafka3.bootstrap_servers, topic))
    # What timed out and was stored all the same is sent again.
    check_nothing_lost(load, seen, copies=True)
    if strict:
        check_strict_order(seen)
    else:
        check_overtaken(seen, in_flight * batch_size)


def test_the_leader_is_killed_under_load(kafka3: KafkaCluster, kind: str) -> None:
    topic = kafka3.create_topic(partitions=1)
    options = {"batch_size": 20, "batch_timeout_ms": 1.0, "max_buffered": 400}
    with (
        producer_of(kafka3, **{"message.timeout.ms": 60_000}) as producer,
        Driver(kind, producer, topic, options=options, **SOON) as driver,
    ):
        load = Load(driver)
        with load.running():
            until(lambda: driver.stats()["acked"] > 500, "what is sent before")
            kafka3.leader(topic).kill()
            goal = load.count + 2_000
            until(lambda: load.count > goal, "going on", LONG_S)
        assert driver.drain() == 0
        assert driver.given_up == []
        assert driver.stats()["retried"] == 0  # librdkafka's own retries keep the order, and make no copies
    seen = numbers(read_back(kafka3.bootstrap_servers, topic))
    assert seen == {key: list(range(count)) for key, count in load.sent.items()}


# -- what a broker refuses


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_only_the_one_that_is_too_large_is_given_up(one_broker: KafkaCluster, kind: str, strict: bool) -> None:
    """The broker refuses a whole record batch; those that were with the large ones are delivered, once."""
    topic = one_broker.create_topic(partitions=1, config={"max.message.bytes": "4000"})
    small = [Envelope(data=b"%d" % n, key=f"k{n % 5}") for n in range(60)]
    large = [Envelope(data=os.urandom(8_000), key=f"k{n}") for n in range(3)]
    sent = [*small[:10], large[0], *small[10:40], large[1], large[2], *small[40:]]
    options = {"batch_size": 100, "batch_timeout_ms": 10_000}
    with (
        producer_of(one_broker, **{"linger.ms": 50}) as producer,
        Driver(kind, producer, topic, options=options, strict_order=strict, **SOON) as driver,
    ):
        driver.send_all(sent)
        assert driver.flush() == 0
        assert {envelope.id for envelope, _ in driver.given_up} == {envelope.id for envelope in large}
        assert driver.reasons == ["MSG_SIZE_TOO_LARGE"] * 3
        assert driver.agent.state is CircuitState.CLOSED
        assert driver.states == ["closed"]
    stored = [record.value for record in read_back(one_broker.bootstrap_servers, topic)]
    assert Counter(stored) == Counter(envelope.data for envelope in small)
    if strict:
        for key in range(5):
            numbers = [int(value) for value in stored if value is not None and int(value) % 5 == key]
            assert numbers == sorted(numbers)


@pytest.fixture
def elsewhere(one_broker: KafkaCluster) -> Iterator[str]:
    """A topic to which the client may write: whoever may write nowhere gets no producer id."""
    topic = one_broker.create_topic()
    one_broker.allow(PRINCIPAL, topic, AclOperation.WRITE)
    yield topic
    one_broker.forbid(PRINCIPAL, topic)


def test_a_permission_that_comes_later(one_broker: KafkaCluster, elsewhere: str, kind: str) -> None:
    topic = one_broker.create_topic()
    config = {**one_broker.tls("client"), "topic.metadata.refresh.interval.ms": 500, **QUIET}
    with (
        kbatch.Producer(config, close_timeout_s=0) as producer,
        Driver(
            *(kind, producer, topic),
            options={"batch_size": 1, "batch_timeout_ms": 0},
            max_in_flight_batches=1,
            failures_to_open=3,
            **SOON,
        ) as driver,
    ):
        sent = [Envelope(n, key="k") for n in range(10)]
        driver.send_all(sent)
        until(lambda: len(driver.given_up) == 10, "what was refused, told")
        until(lambda: len(driver) == 0, "their places, given back")
        assert driver.reasons == ["TOPIC_AUTHORIZATION_FAILED"] * 10
        assert driver.agent.state is CircuitState.CLOSED  # a refusal is no outage
        assert end_offsets(one_broker.bootstrap_servers, topic) == dict.fromkeys(range(4), 0)
        one_broker.allow(PRINCIPAL, topic, AclOperation.WRITE)
        try:
            while len(driver.given_up) == len(sent):  # until librdkafka has asked for the topic again
                sent.append(Envelope(len(sent), key="k"))
                driver.send(sent[-1])
                assert driver.flush() == 0
            assert driver.agent.state is CircuitState.CLOSED
            told = {envelope.id for envelope, _ in driver.given_up}
            stored = [record.value for record in read_back(one_broker.bootstrap_servers, topic)]
            assert stored == [b"%d" % envelope.message for envelope in sent if envelope.id not in told]
            assert stored
        finally:
            one_broker.forbid(PRINCIPAL, topic)


# -- transactions


def committed(kafka: KafkaCluster, topic: str) -> Counter[bytes | None]:
    return Counter(record.value for record in read_back(kafka.bootstrap_servers, topic))


def test_a_fatal_transactional_producer_is_replaced(one_broker: KafkaCluster, kind: str) -> None:
    topic = one_broker.create_topic(partitions=1)
    with (
        producer_of(one_broker, **{"transactional.id": f"fatal-{kind}"}) as producer,
        Driver(kind, producer, topic, options={"batch_timeout_ms": 1.0}, **SOON) as driver,
    ):
        for n in range(3):
            driver.send_all(Envelope(data=b"%d-%d" % (n, i)) for i in range(20))
            assert driver.flush() == 0
            if n < 2:
                driver.agent._handle.producer._core.inject_fatal_error(45, "made up")
        assert driver.given_up == []
        assert driver.agent._handle.producer is not producer
        assert driver.close() == 0
        assert driver.stats()["acked"] == 60


def test_a_request_that_is_read_late_is_overtaken_by_nothing_after_a_fatal_error(
    one_broker: KafkaCluster, kind: str
) -> None:
    """A new producer with a connection of its own must not be faster than what the old one has under way."""
    topic = one_broker.create_topic(partitions=1)
    proxy = one_broker.brokers[0].proxy
    with (
        producer_of(one_broker, **{"bootstrap.servers": one_broker.proxied_servers}) as producer,
        Driver(kind, producer, topic, options={"batch_timeout_ms": 0}, strict_order=True, **SOON) as driver,
    ):
        driver.send(Envelope(data=b"first", key="k"))
        assert driver.flush() == 0
        before = proxy.forwarded[Direction.TO_BROKER]
        proxy.delay(4.0)
        driver.send(Envelope(data=b"A1", key="k"))
        until(lambda: driver.stats()["in_flight_batches"] == 1, "A1 under way")
        time.sleep(0.5)  # the proxy has it, and delivers it after seconds
        assert proxy.forwarded[Direction.TO_BROKER] == before
        proxy.delay(0.0)
        driver.send(Envelope(data=b"A2", key="k"))
        driver.agent._handle.producer._core.inject_fatal_error(45, "made up")
        assert driver.flush() == 0
        assert driver.given_up == []
        assert driver.agent._handle.producer is not producer
    values = [record.value for record in read_back(one_broker.bootstrap_servers, topic)]
    assert [value for value in values if value != b"first"] == [b"A1", b"A2"]


def test_one_envelope_to_a_missing_topic_takes_no_others_with_it(one_broker: KafkaCluster, kind: str) -> None:
    topic = one_broker.create_topic(partitions=2)
    config = {"transactional.id": f"missing-{kind}", "topic.metadata.propagation.max.ms": 500}
    retry = RetryPolicy(max_attempts=3, initial_backoff_s=0.05, max_backoff_s=0.1)
    with (
        producer_of(one_broker, **config) as producer,
        Driver(kind, producer, topic, options={"batch_timeout_ms": 5.0}, **{**SOON, "retry": retry}) as driver,
    ):
        sent = [Envelope(data=b"%d" % n, key=str(n % 7), topic="missing" if n == 50 else None) for n in range(100)]
        driver.send_all(sent)
        assert driver.flush() == 0
        assert [envelope for envelope, _ in driver.given_up] == [sent[50]]
        assert driver.states == ["closed"]
    records = [record for each in read(one_broker.bootstrap_servers, topic, 99).values() for record in each]
    assert Counter(record.value for record in records) == {b"%d" % n: 1 for n in range(100) if n != 50}
    by_key: dict[bytes | None, list[int]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(int(record.value or b""))
    assert all(order == sorted(order) for order in by_key.values())


# -- records that a broker refuses, and their record batches with them

ONE_RECORD: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no key for a compacted topic": ({"cleanup.policy": "compact"}, {"key": None}, "INVALID_RECORD"),
    "a time of long ago": ({"message.timestamp.before.max.ms": "3600000"}, {"timestamp": 1}, "INVALID_TIMESTAMP"),
}


@pytest.mark.parametrize("bad", [(50,), (0, 250, 499)], ids=["one", "several"])
@pytest.mark.parametrize("name", ONE_RECORD)
def test_a_record_that_is_refused_takes_no_others_with_it(
    one_broker: KafkaCluster, kind: str, name: str, bad: tuple[int, ...]
) -> None:
    settings, fields, error = ONE_RECORD[name]
    topic = one_broker.create_topic(partitions=1, config=settings)
    sent = [Envelope(data=b"%d" % n, **{"key": str(n), **(fields if n in bad else {})}) for n in range(500)]
    with (
        producer_of(one_broker, **{"linger.ms": 20}) as producer,
        Driver(kind, producer, topic, options={"batch_timeout_ms": 20.0}, **SOON) as driver,
    ):
        driver.send_all(sent)
        assert driver.flush() == 0
        assert [(envelope, reason) for (envelope, _), reason in zip(driver.given_up, driver.reasons, strict=True)] == [
            (sent[n], error) for n in bad
        ]
        assert driver.states == ["closed"]
    values = [int(record.value or b"") for record in read_back(one_broker.bootstrap_servers, topic)]
    assert values == [n for n in range(500) if n not in bad]


@pytest.mark.parametrize("name", ONE_RECORD)
def test_threads_beside_one_whose_record_is_refused(one_broker: KafkaCluster, name: str) -> None:
    settings, fields, error = ONE_RECORD[name]
    topic = one_broker.create_topic(partitions=1, config=settings)
    sent = [Envelope(data=b"%d" % n, **{"key": str(n), **(fields if n == 7 else {})}) for n in range(20)]
    with (
        producer_of(one_broker, **{"linger.ms": 100}) as producer,
        kbatch.InlineSender(producer, topic) as sender,
        ThreadPoolExecutor(20) as threads,
    ):
        futures = [threads.submit(sender.send, envelope) for envelope in sent]
        errors = {n: reason for n, future in enumerate(futures) if (reason := future.exception()) is not None}
    assert {n: getattr(reason, "name", reason) for n, reason in errors.items()} == {7: error}
    values = [int(record.value or b"") for record in read_back(one_broker.bootstrap_servers, topic)]
    assert sorted(values) == [n for n in range(20) if n != 7]


def test_a_fenced_producer_ends_its_sender(one_broker: KafkaCluster, kind: str) -> None:
    topic = one_broker.create_topic(partitions=1)
    transactional = {"transactional.id": f"fenced-{kind}"}
    with (
        producer_of(one_broker, **transactional) as producer,
        Driver(kind, producer, topic, options={"batch_timeout_ms": 1.0}, **SOON) as driver,
    ):
        driver.send(Envelope(data=b"first"))
        assert driver.flush() == 0
        with producer_of(one_broker, **transactional) as other:
            assert other.send_batch(topic, [Envelope(data=b"of the other")]).ok
            sent = [Envelope(data=b"late") for _ in range(3)]
            driver.send_all(sent[:1])
            until(lambda: driver.given_up, "the end")
            with pytest.raises(kbatch.SenderClosedError) as caught:
                driver.send(sent[1])
            assert isinstance(caught.value.__cause__, kbatch.ProducerFencedError)
            assert [envelope for envelope, _ in driver.given_up] == sent[:1]
            assert driver.agent._handle.producer is driver.sender.agent._handle.producer
            assert other.send_batch(topic, [Envelope(data=b"of the other")]).ok  # it was not fenced in turn
