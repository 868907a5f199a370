"""A listener with a transactional_id: its options, what a handler sends by, and what is sent again. Kafka's part is in
tests/kafka: the mock cluster's readers see no transactions, and it keeps no offsets of theirs."""

from collections.abc import Iterator
from typing import Any

import pytest

import kbatch
from kbatch._codes import ABORTED_CODE
from kbatch._receiving import _transacting
from kbatch.testing import MockCluster
from tests.listening import Order, config_of, running, send
from tests.mock.clients import read
from tests.waiting import until

Received = kbatch.ReceivedEnvelope[Any]
CONFIG = {"bootstrap.servers": "localhost:9", "group.id": "g"}


def listener_of(config: dict[str, Any], handler: Any, **options: Any) -> kbatch.Listener:
    return kbatch.Listener(config, ["orders"], handler, types={"Order": Order}, transactional_id="one", **options)


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=2)
        cluster.create_topic("out", partitions=1)
        yield cluster


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"transactional_id": ""}, "transactional_id must be a name"),
        ({"inbox": kbatch.SqliteInbox("shop.db")}, "contradicts inbox"),
        ({"commit_interval_s": 5.0}, "contradicts commit_interval_s"),
        ({"config": {**CONFIG, "isolation.level": "read_uncommitted"}}, r"contradicts isolation\.level"),
        ({"producer": kbatch.Producer({"bootstrap.servers": "localhost:9"})}, r"must have transactional\.id=one"),
        (
            {"producer": kbatch.Producer({"bootstrap.servers": "localhost:9", "transactional.id": "two"})},
            r"must have transactional\.id=one",
        ),
        ({"producer": "localhost:9"}, r"must be a kbatch\.Producer"),
        ({"handler": lambda envelope: None}, r"must take \(envelope, transaction\)"),
    ],
)
def test_what_contradicts_transactions_is_refused(options: dict[str, Any], text: str) -> None:
    handler: Any = options.get("handler", lambda envelope, other, third=None: None)
    rest = {name: value for name, value in options.items() if name not in ("handler", "config")}
    with pytest.raises(kbatch.ConfigError, match=text):
        kbatch.Listener(options.get("config", CONFIG), ["orders"], handler, **{"transactional_id": "one", **rest})


def test_what_cannot_be_mapped_is_told_at_once_and_a_transaction_that_is_over_takes_nothing() -> None:
    transacting = listener_of(CONFIG, lambda envelope, transaction: None)._transacting
    assert transacting is not None
    transaction = transacting.transaction()
    transaction.send("out", [kbatch.Envelope(1), kbatch.Envelope(2)])
    with pytest.raises(kbatch.SerializationError):
        transaction.send("out", [kbatch.Envelope(3), kbatch.Envelope(object())])
    assert len(transaction._end()) == 2
    with pytest.raises(kbatch.ProducerError, match="its handler has returned"):
        transaction.send("out", [kbatch.Envelope(4)])


def test_an_encoder_of_the_producer_is_used(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "transactional.id": "one"}
    producer = kbatch.Producer(config, wire="raw", encoder=lambda message, context: b"<%d>" % message)

    def handle(envelope: Received, transaction: kbatch.Transaction) -> None:
        transaction.send("out", [kbatch.Envelope(envelope.message.number)])

    send(cluster, 1)
    listener = listener_of(config_of(cluster), handle, producer=producer)
    with running(listener) as raised:
        until(lambda: listener.stats()["handled"] == 1, "the record")
    assert raised == []
    assert [record.value for record in read(cluster.bootstrap_servers, "out", 1)[0] if record.value] == [b"<0>"]


def test_a_transaction_that_was_aborted_is_sent_again_without_the_handler(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[int] = []
    refused: list[int] = []
    send_offsets = _transacting._send_offsets

    def refusing(reading: Any, work: Any, producer: Any, timeout_ms: int) -> Any:
        if len(refused) < 2:
            refused.append(work.next_offset)
            return ABORTED_CODE, "made up", False, False, True
        return send_offsets(reading, work, producer, timeout_ms)

    def handle(envelope: Received, transaction: kbatch.Transaction) -> None:
        handled.append(envelope.message.number)
        transaction.send("out", [kbatch.Envelope(envelope.message.number)])

    monkeypatch.setattr(_transacting, "_send_offsets", refusing)
    send(cluster, 10)
    listener = listener_of(config_of(cluster), handle)
    with running(listener) as raised:
        until(lambda: listener.stats()["handled"] == 10, "the records")
    assert raised == []
    assert sorted(handled) == list(range(10))
    assert refused == [refused[0]] * 2


def test_a_dead_letter_is_told_once_its_transaction_is_committed(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, str, bool]] = []
    committed: list[int] = []
    commit = _transacting.Transacting.commit

    def committing(self: Any, reading: Any, work: Any, packed: list[bytes]) -> None:
        commit(self, reading, work, packed)
        committed.append(work.envelope.message.number)

    def handle(envelope: Received, transaction: kbatch.Transaction) -> None:
        if envelope.message.number == 3:
            raise ValueError("poison")

    def on_dead(envelope: Received, error: Exception) -> None:
        number = envelope.message.number
        told.append((number, str(error), number in committed))

    monkeypatch.setattr(_transacting.Transacting, "commit", committing)
    send(cluster, 5)
    listener = listener_of(
        config_of(cluster),
        handle,
        retry=kbatch.RetryPolicy(max_attempts=1),
        dead_letter_topic="out",
        on_dead=on_dead,
    )
    with listener, running(listener) as raised:
        until(lambda: listener.stats()["handled"] == 5, "the records")
    assert raised == []
    assert told == [(3, "poison", True)]


def test_the_membership_is_taken_before_it_is_asked_whether_the_partition_is_held() -> None:
    """The other way round, a membership that has come since would commit offsets of a partition that it has not."""
    steps: list[str] = []

    class Membership:
        def send_offsets(self, *arguments: Any) -> None:
            steps.append("offsets")

    class Core:
        def membership(self) -> Membership:
            steps.append("membership")
            return Membership()

    class Reading:
        core = Core()

        def __init__(self, is_held: bool) -> None:
            self.is_held = is_held

        def holds(self, work: Any) -> bool:
            steps.append("holds")
            return self.is_held

    class Work:
        partition, next_offset = ("orders", 0), 1

    answer = _transacting._send_offsets(Reading(False), Work(), None, 1)  # type: ignore[arg-type]
    assert answer is not None
    assert steps == ["membership", "holds"]
    steps.clear()
    assert _transacting._send_offsets(Reading(True), Work(), None, 1) is None  # type: ignore[arg-type]
    assert steps == ["membership", "holds", "offsets"]


def test_a_stop_ends_the_wait_for_the_coordinator() -> None:
    listener = listener_of({**CONFIG, "log_level": 0}, lambda envelope, transaction: None)
    with running(listener) as raised:
        until(lambda: listener._reading is not None, "the run")
    assert raised == []
