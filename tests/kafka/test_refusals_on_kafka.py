"""What a real broker refuses: records that are too large, and clients that may not or cannot prove who they are."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError
from confluent_kafka.admin._acl import AclOperation

import kbatch
from kbatch import Envelope, KafkaSender
from tests.faults.history import ACKED, FAILED, Sent
from tests.faults.runner import ENCODER
from tests.kafka.cluster import KafkaCluster
from tests.kafka.scenario import Scenario
from tests.kafka.test_contract_on_kafka import Recorder
from tests.mock.clients import end_offsets, read_back
from tests.waiting import until

MSG_SIZE_TOO_LARGE, TOPIC_AUTHORIZATION_FAILED = 10, 29


class Refused(Scenario):
    """Batches, of which one envelope is too large for the topic."""

    def send_with_one_large(self, count: int, large: int, size: int) -> Sent:
        sent, envelopes = self.by_hand(count)
        body = os.urandom(size)
        message = sent.messages[large]
        old = envelopes[large]
        envelopes[large] = Envelope(data=body, key=old.key, headers=old.headers, id=old.id, partition=old.partition)
        sent.messages = (*sent.messages[:large], message._replace(value=body), *sent.messages[large + 1 :])
        self.answer(sent, self.producer.send_batch(self.topic, envelopes))
        return sent


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("idempotent", [True, False], ids=["idempotent", "not idempotent"])
def test_too_large_for_the_broker(one_broker: KafkaCluster, idempotent: bool, codec: str) -> None:
    """The broker refuses a whole record batch, so its other records fail too; none is stored, none is tried again."""
    limit = {"max.message.bytes": "4000"}
    codes = frozenset((MSG_SIZE_TOO_LARGE,))
    config = {"linger.ms": 50, "compression.codec": codec}
    with Refused(
        one_broker, partitions=2, idempotent=idempotent, topic_config=limit, codes=codes, ordered=False, **config
    ) as run:
        before = end_offsets(one_broker.bootstrap_servers, run.topic)
        sent = run.send_with_one_large(10, 5, 8_000)
        outcomes = run.outcomes(sent)
        assert outcomes[5].state == FAILED
        failed = {outcome.partition for outcome in outcomes if outcome.state == FAILED}
        assert failed == {outcomes[5].partition}
        assert not any(
            outcome.retriable or outcome.possibly_persisted for outcome in outcomes if outcome.state == FAILED
        )
        # What the report says is what the log has: the checker looks at each record; here that nothing was kept.
        after = end_offsets(one_broker.bootstrap_servers, run.topic)
        assert sum(after.values()) - sum(before.values()) == sum(outcome.state == ACKED for outcome in outcomes)
        assert after[outcomes[5].partition] == before[outcomes[5].partition]
        # The others are accepted without it.
        run.send(5)
        assert run.states(run.send(5)) == {ACKED}


def test_a_client_that_knows_the_limit_fails_the_one_only(one_broker: KafkaCluster) -> None:
    """With the topic's limit for ``message.max.bytes`` small records are split, and a large one is named."""
    topic = one_broker.create_topic(partitions=1, config={"max.message.bytes": "4000"})
    config = {"bootstrap.servers": one_broker.bootstrap_servers, "message.max.bytes": 4_000}
    with kbatch.Producer(config) as producer:
        assert producer.send_batch(topic, [Envelope(data=os.urandom(300)) for _ in range(200)]).acked == 200
        with pytest.raises(kbatch.SerializationError) as caught:
            producer.send_batch(topic, [Envelope(1), Envelope(data=os.urandom(8_000)), Envelope(2)])
        assert caught.value.index == 1
    assert len(read_back(one_broker.bootstrap_servers, topic)) == 200


# -- ACLs

PRINCIPAL = "User:CN=client"


@pytest.fixture
def elsewhere(one_broker: KafkaCluster) -> Iterator[str]:
    """A topic to which the client may write: whoever may write nowhere gets no producer id."""
    topic = one_broker.create_topic()
    one_broker.allow(PRINCIPAL, topic, AclOperation.WRITE)
    yield topic
    one_broker.forbid(PRINCIPAL, topic)


class Restricted(Scenario):
    """A run whose producer proves by a certificate who it is."""

    def _make_producer(self) -> kbatch.Producer:
        config = {**self.cluster.tls("client"), "log_level": 0, **dict(self.plan.config)}
        config = {**config, "enable.idempotence": self.plan.idempotent}
        return kbatch.Producer(config, encoder=ENCODER, max_in_flight=20_000)

    def __enter__(self) -> "Restricted":
        self._prepare()
        return self

    def _drop_topics(self) -> None:
        self.cluster.forbid(PRINCIPAL, self.topic)
        super()._drop_topics()

    def send_until(self, state: str, way: str = "sender") -> Sent:
        """Sends until that is the answer: what a topic's metadata say, a client learns now and then."""
        sent: list[Sent] = []

        def answered() -> bool:
            sent.append(self.send(10, way))
            return self.states(sent[-1]) == {state}

        until(answered, f"an answer that is {state}")
        return sent[-1]


@pytest.mark.parametrize("seen", [False, True], ids=["it sees nothing", "it sees the topic"])
@pytest.mark.parametrize("idempotent", [True, False], ids=["idempotent", "not idempotent"])
def test_not_authorised(one_broker: KafkaCluster, elsewhere: str, idempotent: bool, seen: bool) -> None:
    codes = frozenset((TOPIC_AUTHORIZATION_FAILED,))
    with Restricted(one_broker, idempotent=idempotent, codes=codes, ordered=False) as run:
        if seen:
            one_broker.allow(PRINCIPAL, run.topic, AclOperation.DESCRIBE)
        for way in ("sender", "send_batch", "aio sender", "callback"):
            refused = run.send(10, way)
            assert {outcome.code for outcome in run.outcomes(refused)} == codes  # the checker: and not retriable
            assert not any(outcome.possibly_persisted for outcome in run.outcomes(refused))
        assert end_offsets(one_broker.bootstrap_servers, run.topic) == dict.fromkeys(range(3), 0)
        assert run.producer.send_batch(elsewhere, [Envelope(1)]).ok  # nothing else is refused
        one_broker.allow(PRINCIPAL, run.topic, AclOperation.WRITE)
        run.send_until(ACKED)
        assert run.states(run.resend(refused)) == {ACKED}
        one_broker.forbid(PRINCIPAL, run.topic)
        with run.load() as more:
            run.send_until(FAILED)
            more(5)
            one_broker.allow(PRINCIPAL, run.topic, AclOperation.WRITE)
            run.send_until(ACKED)


def test_who_may_write_nowhere_gets_no_producer_id(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    told: list[KafkaError] = []
    config = {**one_broker.tls("client"), "log_level": 0, "error_cb": told.append}
    with kbatch.Producer(config, close_timeout_s=0) as producer:
        callback = Recorder()

        def fatal() -> bool:
            KafkaSender(producer, topic).send_batch(callback, kbatch.OutgoingBatch([Envelope(1)]))
            return isinstance(callback.answers[-1].outcome, kbatch.ProducerFatalError)

        until(fatal, "the fatal error")
        until(lambda: told, "error_cb")
    assert {answer.method for answer in callback.answers} == {"mark_processing_failure"}
    assert callback.answers[-1].outcome.name == "CLUSTER_AUTHORIZATION_FAILED"
    assert told[0].fatal()
    # It is the idempotent producer that needs one, and a new producer may get it.
    one_broker.allow(PRINCIPAL, topic, AclOperation.WRITE)
    with kbatch.Producer(config) as producer:
        assert producer.send_batch(topic, [Envelope(1)]).ok
    one_broker.forbid(PRINCIPAL, topic)


# -- credentials

SECRET = "not alice's password"
CREDENTIALS: dict[str, Any] = {
    "wrong password": (lambda kafka: kafka.sasl(password=SECRET), {"_AUTHENTICATION"}, "SCRAM-SHA-512"),
    "unknown user": (lambda kafka: kafka.sasl(user="mallory", password=SECRET), {"_AUTHENTICATION"}, "SCRAM-SHA-512"),
    # TLS 1.3 tells a client after its handshake, when the connection ends.
    "client's certificate expired": (lambda kafka: kafka.tls("expired_client"), {"_TRANSPORT", "_SSL"}, "certificate"),
    "broker's certificate expired": (lambda kafka: kafka.tls(listener="EXPIRED"), {"_SSL"}, "certificate verify"),
    "another CA": (
        lambda kafka: {**kafka.tls(), "ssl.ca.location": kafka.certificate("client")},
        {"_SSL"},
        "certificate verify",
    ),
}


@pytest.mark.parametrize("name", CREDENTIALS)
def test_credentials_that_are_refused(
    one_broker: KafkaCluster, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """`error_cb` is told the reason; the batch times out, since credentials may be mended while it waits."""
    make_config, codes, text = CREDENTIALS[name]
    topic = one_broker.create_topic()
    told: list[KafkaError] = []
    everything_told = threading.Event()

    def on_error(error: KafkaError) -> None:
        told.append(error)
        if error.name() in codes:
            everything_told.set()

    config = {**make_config(one_broker), "delivery.timeout.ms": 2_000, "error_cb": on_error}
    callback = Recorder()
    with kbatch.Producer(config, close_timeout_s=0) as producer:
        shown = repr(producer)
        KafkaSender(producer, topic).send_batch(callback, kbatch.OutgoingBatch([Envelope(1), Envelope(2)]))
        assert everything_told.wait(30)
    (answer,) = callback.answers
    assert answer.method == "mark_timed_out"
    assert isinstance(answer.outcome, kbatch.BatchTimeoutError)
    assert {error.name for error in answer.report.errors.values()} == {"_MSG_TIMED_OUT"}
    assert not any(error.possibly_persisted for error in answer.report.errors.values())
    errors = [error for error in told if error.name() in codes]
    assert errors
    assert any(text in error.str() for error in errors)
    assert not any(error.fatal() for error in told)
    said = "\n".join([shown, str(answer.outcome), *map(str, told), caplog.text, *capfd.readouterr()])
    assert SECRET not in said
    assert end_offsets(one_broker.bootstrap_servers, topic) == dict.fromkeys(range(4), 0)


@pytest.mark.parametrize("protocol", ["tls", "sasl"])
def test_credentials_that_are_accepted(one_broker: KafkaCluster, protocol: str) -> None:
    topic = one_broker.create_topic(partitions=1)
    principal = PRINCIPAL if protocol == "tls" else "User:alice"
    one_broker.allow(principal, topic, AclOperation.WRITE)
    config = one_broker.tls("client") if protocol == "tls" else one_broker.sasl()
    with kbatch.Producer(config) as producer:
        assert producer.send_batch(topic, [Envelope(data=b"1"), Envelope(data=b"2")]).ok
    assert [record.value for record in read_back(one_broker.bootstrap_servers, topic)] == [b"1", b"2"]
    one_broker.forbid(principal, topic)
