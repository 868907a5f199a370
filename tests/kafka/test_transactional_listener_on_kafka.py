"""A listener with a transactional_id: what its handler sends and its offsets are committed together, or not at all."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from random import Random
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

import kbatch
from kbatch import _transactions
from kbatch._transactions import Transactions
from tests.kafka.cluster import KafkaCluster
from tests.kafka.transactional_listener import STEPS
from tests.listening import Order, committed, config_of, running, send
from tests.waiting import until

Received = kbatch.ReceivedEnvelope[Any]


def output(cluster: KafkaCluster, topic: str) -> dict[str, list[int]]:
    """By key, the numbers that a reader of committed records sees now, in the order of the log."""
    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap_servers,
            "group.id": "tests",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        found: dict[str, list[int]] = defaultdict(list)
        ended = set()
        while len(ended) < len(partitions):
            for message in consumer.consume(1000, timeout=0.1):
                if message.error() is not None:
                    ended.add(message.partition())
                else:
                    found[message.key().decode()].append(json.loads(message.value())["number"])
        return found
    finally:
        consumer.close()


def expected(count: int, keys: int = 7) -> dict[str, list[int]]:
    return {str(key): list(range(key, count, keys)) for key in range(keys)}


def settings_of(cluster: KafkaCluster, group: str) -> dict[str, Any]:
    return config_of(cluster, group, session_timeout_ms=6000, transaction_timeout_ms=10_000)


@pytest.fixture
def topics(one_broker: KafkaCluster) -> tuple[str, str]:
    return one_broker.create_topic(partitions=4), one_broker.create_topic(partitions=3)


def forward(out: str) -> Any:
    def handle(given: Any, transaction: kbatch.Transaction) -> None:
        for envelope in given if isinstance(given, list) else (given,):
            sent = kbatch.Envelope(data=envelope.data, key=envelope.key.decode(), message_type="Order")
            transaction.send(out, [sent])

    return handle


def listener_of(cluster: KafkaCluster, topic: str, handler: Any, **options: Any) -> kbatch.Listener:
    options.setdefault("transactional_id", topic)
    config = settings_of(cluster, topic)
    config["transaction.timeout.ms"] = options.pop("transaction_timeout_ms", config["transaction.timeout.ms"])
    return kbatch.Listener(config, [topic], handler, **options)


def total(found: dict[str, list[int]]) -> int:
    return sum(len(each) for each in found.values())


# One before the transaction ends, one after.
SHORT = (("threads", "offsets"), ("asyncio", "committed"))
COMMAND = [sys.executable, "-m", "tests.kafka.transactional_listener"]
KILLS = [(kind, step) for kind in ("threads", "asyncio") for step in STEPS]


def run_until_killed(settings: dict[str, Any]) -> None:
    child = subprocess.run([*COMMAND, json.dumps(settings)], timeout=90, check=False)
    assert child.returncode == -signal.SIGKILL


def run_until_all_are_committed(cluster: KafkaCluster, settings: dict[str, Any], count: int) -> None:
    last = subprocess.Popen([*COMMAND, json.dumps(settings)])
    topic = settings["topic"]
    try:
        until(lambda: sum(committed(cluster, topic, topic).values()) == count, "all offsets", patience_s=60)
    finally:
        last.terminate()
        assert last.wait(60) == 0


@pytest.mark.parametrize(
    ("kind", "step"), [each if each in SHORT else pytest.param(*each, marks=pytest.mark.nightly) for each in KILLS]
)
def test_a_listener_killed_at_a_step_has_each_effect_once(
    one_broker: KafkaCluster, topics: tuple[str, str], kind: str, step: str
) -> None:
    topic, out = topics
    send(one_broker, 40, topic=topic)
    settings = {"config": settings_of(one_broker, topic), "topic": topic, "out": out, "id": topic, "batch_size": 3}
    settings["kind"] = kind
    for at in (1, 2, 4):
        run_until_killed({**settings, "step": step, "at": at})
    run_until_all_are_committed(one_broker, settings, 40)
    assert output(one_broker, out) == expected(40)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 12))])
def test_a_history_of_orders_and_listeners_that_are_killed_has_one_invoice_for_each_order(
    one_broker: KafkaCluster, topics: tuple[str, str], seed: int
) -> None:
    """Orders come while listeners of both kinds are killed at steps, and others take their place. The seed chooses."""
    topic, out = topics
    random = Random(seed)
    count = 0
    for _ in range(4):
        orders = random.randrange(30, 90)
        send(one_broker, orders, first=count, topic=topic)
        count += orders
        settings = {
            "config": settings_of(one_broker, topic),
            "topic": topic,
            "out": out,
            "id": topic,
            "kind": random.choice(("threads", "asyncio")),
            "batch_size": random.choice((1, 3, 8)),
            "concurrency": random.choice((1, 2, 4)),
        }
        run_until_killed({**settings, "step": random.choice(STEPS), "at": random.choice((1, 2, 3))})
    run_until_all_are_committed(one_broker, settings, count)
    assert output(one_broker, out) == expected(count)


def test_a_handler_that_raises_has_sent_nothing_and_its_record_goes_to_the_dead_letter_topic(
    one_broker: KafkaCluster, topics: tuple[str, str]
) -> None:
    topic, out = topics
    dead = one_broker.create_topic(partitions=1)
    send(one_broker, 30, topic=topic)
    into = forward(out)
    attempts: list[int] = []

    def handle(envelope: Received, transaction: kbatch.Transaction) -> None:
        into(envelope, transaction)
        if envelope.message.number == 11:
            attempts.append(11)
            raise ValueError("poison")

    retry = kbatch.RetryPolicy(max_attempts=2, initial_backoff_s=0.01)
    listener = listener_of(one_broker, topic, handle, types={"Order": Order}, retry=retry, dead_letter_topic=dead)
    with running(listener) as raised:
        until(lambda: sum(committed(one_broker, topic, topic).values()) == 30, "all offsets", patience_s=60)
    assert raised == []
    assert attempts == [11, 11]
    found = output(one_broker, out)
    found["4"].insert(1, 11)
    assert found == expected(30)
    assert output(one_broker, dead) == {"4": [11]}


def test_without_another_topic_the_record_that_failed_is_read_again_by_the_next_run(
    one_broker: KafkaCluster, topics: tuple[str, str]
) -> None:
    topic, out = topics
    send(one_broker, 30, topic=topic)
    into = forward(out)
    is_repaired = False

    def handle(envelopes: list[Received], transaction: kbatch.Transaction) -> None:
        for envelope in envelopes:
            into(envelope, transaction)
            if envelope.message.number == 11 and not is_repaired:
                raise ValueError("poison")

    options: dict[str, Any] = {"types": {"Order": Order}, "retry": kbatch.RetryPolicy(max_attempts=1)}
    listener = listener_of(one_broker, topic, handle, batch_size=10, concurrency=4, **options)
    with pytest.raises(ValueError, match="poison"):
        listener.run()
    assert total(output(one_broker, out)) == sum(committed(one_broker, topic, topic).values()) < 30
    is_repaired = True
    with running(listener) as raised:
        until(lambda: sum(committed(one_broker, topic, topic).values()) == 30, "all offsets", patience_s=60)
    assert raised == []
    assert output(one_broker, out) == expected(30)


def test_an_output_that_cannot_be_stored_is_the_handlers_failure(
    one_broker: KafkaCluster, topics: tuple[str, str]
) -> None:
    topic, out = topics
    small = one_broker.create_topic(partitions=1, config={"max.message.bytes": "20000"})
    send(one_broker, 20, topic=topic)

    def handle(envelope: Received, transaction: kbatch.Transaction) -> None:
        forward(out)(envelope, transaction)
        if envelope.message.number == 5:
            transaction.send(small, [kbatch.Envelope("x" * 50_000)])

    dead = one_broker.create_topic(partitions=1)
    retry = kbatch.RetryPolicy(max_attempts=1)
    listener = listener_of(one_broker, topic, handle, types={"Order": Order}, retry=retry, dead_letter_topic=dead)
    with running(listener) as raised:
        until(lambda: sum(committed(one_broker, topic, topic).values()) == 20, "all offsets", patience_s=60)
    assert raised == []
    assert output(one_broker, dead) == {"5": [5]}
    found = output(one_broker, out)
    found["5"].insert(0, 5)
    assert found == expected(20)
    assert total(output(one_broker, small)) == 0


def test_a_zombie_is_fenced_and_ends(one_broker: KafkaCluster, topics: tuple[str, str]) -> None:
    topic, out = topics
    first, second = (listener_of(one_broker, topic, forward(out)) for _ in range(2))
    with running(first) as ended:
        until(lambda: first.stats()["partitions"] == 4, "its partitions", patience_s=60)
        with running(second) as raised:
            until(lambda: second.stats()["partitions"] > 0, "the second's partitions", patience_s=60)
            send(one_broker, 50, topic=topic)
            until(lambda: ended, "the end of the first", patience_s=60)
            until(lambda: sum(committed(one_broker, topic, topic).values()) == 50, "all offsets", patience_s=60)
    assert isinstance(ended[0], kbatch.ProducerFencedError)
    assert raised == []
    assert output(one_broker, out) == expected(50)


def test_members_that_come_and_go_have_each_effect_once(one_broker: KafkaCluster, topics: tuple[str, str]) -> None:
    topic, out = topics
    count = 0
    errors = []

    def member(number: int) -> kbatch.Listener:
        options: dict[str, Any] = {"batch_size": 20, "concurrency": 2, "max_in_flight": 200}
        return listener_of(one_broker, topic, handle, transactional_id=f"{topic}-{number}", **options)

    def handle(envelopes: list[Received], transaction: kbatch.Transaction) -> None:
        time.sleep(0.02)
        for envelope in envelopes:
            forward(out)(envelope, transaction)

    with running(member(0)) as raised:
        errors.append(raised)
        for number in range(1, 4):
            with running(member(number)) as raised:
                errors.append(raised)
                for _ in range(4):
                    send(one_broker, 100, first=count, topic=topic)
                    count += 100
                    time.sleep(0.5)
        until(lambda: sum(committed(one_broker, topic, topic).values()) == count, "all offsets", patience_s=90)
    assert errors == [[] for _ in errors]
    assert output(one_broker, out) == expected(count)


def test_a_member_that_lost_its_partition_while_it_handled_commits_nothing(
    one_broker: KafkaCluster, topics: tuple[str, str]
) -> None:
    topic, out = topics
    send(one_broker, 1, topic=topic)
    entered, release = threading.Event(), threading.Event()

    def hang(envelope: Received, transaction: kbatch.Transaction) -> None:
        forward(out)(envelope, transaction)
        entered.set()
        release.wait(60)

    slow = listener_of(one_broker, topic, hang, transactional_id=f"{topic}-slow", close_timeout_s=0.2)
    quick = listener_of(one_broker, topic, forward(out), transactional_id=f"{topic}-quick")
    with running(slow) as raised:
        until(entered.is_set, "the record")
        with running(quick) as others:
            # The range of the second is its own only when the first gives it away; so it has all once that leaves.
            slow.stop()
            until(lambda: sum(committed(one_broker, topic, topic).values()) == 1, "the offset", patience_s=60)
            release.set()
            until(lambda: slow.stats()["running"] == 0, "the end of the handler")
    assert raised == others == []
    assert output(one_broker, out) == {"0": [0]}


@pytest.mark.parametrize("is_made", [True, False])
def test_after_a_commit_without_an_answer_the_group_tells_whether_it_was_made(
    one_broker: KafkaCluster, topics: tuple[str, str], is_made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, out = topics
    call, conclude = Transactions._call, Transactions._commit
    lost: list[int] = []

    def unanswered(self: Transactions, which: int) -> Any:
        if which != _transactions._COMMIT or self._timeout_s:
            return call(self, which)
        lost.append(which)
        if is_made:
            assert call(self, which) is None
        return _transactions._Error(-185, "timed out", False, True, False)

    def commit(self: Transactions, batch: Any) -> None:
        if len(batch) and len(lost) < 3:
            self._timeout_s = 0.0
        conclude(self, batch)

    monkeypatch.setattr(Transactions, "_call", unanswered)
    monkeypatch.setattr(Transactions, "_commit", commit)
    send(one_broker, 30, topic=topic)
    listener = listener_of(one_broker, topic, forward(out), concurrency=4, batch_size=4)
    with running(listener) as raised:
        until(lambda: listener.stats()["handled"] == 30, "the records", patience_s=90)
    assert raised == []
    assert len(lost) >= 3
    assert output(one_broker, out) == expected(30)


@pytest.mark.nightly
def test_a_broker_that_restarts_is_waited_for(one_broker: KafkaCluster, topics: tuple[str, str]) -> None:
    topic, out = topics
    listener = listener_of(one_broker, topic, forward(out), transaction_timeout_ms=60_000)
    with running(listener) as raised:
        send(one_broker, 30, topic=topic)
        until(lambda: listener.stats()["handled"] == 30, "those from before", patience_s=60)
        send(one_broker, 30, first=30, topic=topic)
        one_broker.brokers[0].kill()
        one_broker.brokers[0].start()
        one_broker.wait_until_up()
        until(lambda: listener.stats()["handled"] >= 60, "those from after", patience_s=120)
    assert raised == []
    assert output(one_broker, out) == expected(60)
