"""What brokers refuse for good is no outage, and costs nobody else anything."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, RetryPolicy
from kbatch.testing import ApiKey, MockCluster

from ..sending import KINDS, Driver
from .clients import read, read_back

SOON = RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        for topic in ("orders", "refused"):
            cluster.create_topic(topic, partitions=2)
        yield cluster


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(cluster: MockCluster, **config: Any) -> kbatch.Producer:
    own = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "retry.backoff.ms": 10}
    return kbatch.Producer({**own, **config}, close_timeout_s=5)


def drive(kind: str, producer: kbatch.Producer, **options: Any) -> Driver:
    agent = {"retry": SOON, "probe_interval_s": 0.05, **options}
    return Driver(kind, producer, "orders", options={"batch_timeout_ms": 1.0, "batch_size": 1000}, **agent)


def stored(cluster: MockCluster, topic: str = "orders") -> list[int]:
    return sorted(int(record.value or b"") for record in read_back(cluster.bootstrap_servers, topic))


def told(driver: Driver) -> Counter[tuple[str, str]]:
    return Counter(
        (str(envelope.topic), getattr(error, "name", type(error).__name__)) for envelope, error in driver.given_up
    )


# -- a topic that takes nothing


def test_a_topic_that_refuses_everything_is_no_outage(cluster: MockCluster, kind: str) -> None:
    error = "TOPIC_AUTHORIZATION_FAILED"
    cluster.set_topic_error("refused", error)
    count = 20_000
    with make(cluster) as producer, drive(kind, producer) as driver:
        driver.send_all([Envelope(n, topic="refused") for n in range(count)])
        driver.send_all([Envelope(n) for n in range(100)])
        assert driver.flush() == 0
        assert driver.states == ["closed"]
        assert told(driver) == {("refused", error): count}
        assert driver.stats()["retried"] == 0
    assert stored(cluster) == list(range(100))


@pytest.mark.parametrize("error", ["POLICY_VIOLATION", "UNSUPPORTED_FOR_MESSAGE_FORMAT"])
def test_batches_that_are_refused_for_good_are_no_outage(cluster: MockCluster, kind: str, error: str) -> None:
    cluster.push_request_errors(ApiKey.PRODUCE, [error] * 10)
    with make(cluster, **{"linger.ms": 20}) as producer, drive(kind, producer) as driver:
        for n in range(10):
            driver.send(Envelope(n, partition=0))
            assert driver.flush() == 0
        assert told(driver) == {("None", error): 10}
        assert driver.states == ["closed"]
        driver.send(Envelope(10, partition=0))
        assert driver.flush() == 0
    assert stored(cluster) == [10]


def test_for_an_outbox_it_is_no_outage_either(cluster: MockCluster) -> None:
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    with make(cluster) as producer:
        agent = kbatch.SendingAgent(producer, "refused")
        for _ in range(10):
            agent.send_batch(Silent(), kbatch.OutgoingBatch([Envelope(n) for n in range(3)]))
        assert agent.state is kbatch.CircuitState.CLOSED
        agent.close()


class Silent(kbatch.SenderCallback):
    def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        pass


# -- a transaction with an envelope that cannot be stored


@pytest.mark.parametrize("error", ["UNKNOWN_TOPIC_OR_PART", "TOPIC_AUTHORIZATION_FAILED"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_one_envelope_takes_no_others_with_it(cluster: MockCluster, kind: str, strict: bool, error: str) -> None:
    cluster.set_topic_error("refused", error)
    retry = RetryPolicy(max_attempts=3, initial_backoff_s=0.02, max_backoff_s=0.1)
    with (
        make(cluster, **{"transactional.id": "one", "topic.metadata.propagation.max.ms": 200}) as producer,
        drive(kind, producer, retry=retry, strict_order=strict) as driver,
    ):
        driver.send_all([Envelope(n, key=str(n % 7), topic="refused" if n == 50 else None) for n in range(100)])
        assert driver.flush() == 0
        assert [envelope.topic for envelope, _ in driver.given_up] == ["refused"]
        assert driver.states == ["closed"]
        assert driver.stats()["acked"] == 99
    records = read(cluster.bootstrap_servers, "orders", 99)  # of aborted transactions, too: the mock keeps them
    seen = {int(record.value or b"") for each in records.values() for record in each}
    assert seen == set(range(100)) - {50}


# -- what strict order cannot be kept with


class Rekeying:
    def write(self, envelope: Envelope[Any]) -> tuple[bytes, bytes, None]:
        return b"one", b"body", None


def test_strict_order_refuses_what_spreads_a_key(cluster: MockCluster) -> None:
    own = {"bootstrap.servers": cluster.bootstrap_servers}
    for producer, reason in (
        (kbatch.Producer(own, wire=Rekeying()), "wire object"),
        (kbatch.Producer({**own, "partitioner": "random"}), "partitioner=random"),
    ):
        with pytest.raises(kbatch.ConfigError, match=reason):
            kbatch.SendingAgent(producer, "orders", strict_order=True)
        kbatch.SendingAgent(producer, "orders").close()
    kbatch.SendingAgent(kbatch.Producer(own), "orders", strict_order=True).close()
