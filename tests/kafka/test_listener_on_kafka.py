"""A listener on real brokers: what it reads, hands over and commits when members and brokers come and go."""

import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from typing import Any

import confluent_kafka
import pytest

import kbatch
from kbatch._receiving._config import ConsumerConfig
from tests.kafka.cluster import KafkaCluster
from tests.listening import Order, committed, config_of, running, send
from tests.waiting import until

Received = kbatch.ReceivedEnvelope[Any]
PROTOCOLS = {
    "cooperative": {"partition_assignment_strategy": "cooperative-sticky"},
    "eager": {"partition_assignment_strategy": "range"},
    "consumer": {"group_protocol": "consumer"},
}


def settings_of(kafka: Any, group: str, **settings: Any) -> dict[str, Any]:
    config = config_of(kafka, group, **settings)
    if settings.get("group_protocol") == "consumer":  # its brokers decide these
        del config["session.timeout.ms"], config["heartbeat.interval.ms"]
    else:
        config["session.timeout.ms"] = 6000
    return config


def listener_of(kafka: Any, topic: str, handler: Any, *, group: str | None = None, **options: Any) -> kbatch.Listener:
    settings = options.pop("settings", {})
    options.setdefault("types", {"Order": Order})
    options.setdefault("commit_interval_s", 0.2)
    return kbatch.Listener(settings_of(kafka, group or topic, **settings), [topic], handler, **options)


@pytest.fixture
def topic(kafka: KafkaCluster) -> str:
    name = f"listened-{uuid.uuid4().hex[:8]}"
    kafka.create_topic(name, partitions=4)
    return name


def test_what_was_sent_is_what_the_handler_gets(kafka: KafkaCluster, topic: str) -> None:
    sent = [
        kbatch.Envelope(
            Order(n),
            key=f"k{n % 5}",
            headers=[("trace", f"t{n}"), ("raw", bytes([n, 255]))],
            correlation_id=f"c{n}",
            tenant_id="acme",
        )
        for n in range(100)
    ]
    got: dict[uuid.UUID, Received] = {}
    with kbatch.Producer({"bootstrap.servers": kafka.bootstrap_servers}) as producer:
        report = producer.send_batch(topic, [*sent, kbatch.Tombstone("k0")])
        report.raise_for_errors()

    def handle(envelope: Received) -> None:
        got[envelope.id] = envelope

    with running(listener_of(kafka, topic, handle, concurrency=4)) as raised:
        until(lambda: len(got) == 101, "all of them")
    assert raised == []
    for envelope in sent:
        read = got.pop(envelope.id)
        assert read.message == envelope.message
        assert (read.key, read.topic, read.tenant_id) == (str(envelope.key).encode(), topic, "acme")
        assert read.correlation_id == envelope.correlation_id
        assert [(name, value) for name, value in read.headers] == [
            ("trace", dict(envelope.headers)["trace"].encode()),  # type: ignore[union-attr]
            ("raw", dict(envelope.headers)["raw"]),
        ]
    (tombstone,) = got.values()
    assert tombstone.is_tombstone
    assert sum(committed(kafka, topic, topic).values()) == 101


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_members_come_and_go(kafka: KafkaCluster, topic: str, protocol: str) -> None:
    """At least once, in order per key and owner, and nothing is committed that was not handled."""
    lock = threading.Lock()
    seen: list[tuple[int, Any, int, int, int]] = []  # member, key, number, partition, offset

    def member(number: int) -> kbatch.Listener:
        def handle(envelope: Received) -> None:
            time.sleep(0.001)
            with lock:
                seen.append((number, envelope.key, envelope.message.number, envelope.partition, envelope.offset))

        return listener_of(kafka, topic, handle, concurrency=3, max_in_flight=200, settings=PROTOCOLS[protocol])

    count = 0
    errors = []
    with running(member(0)) as raised:
        errors.append(raised)
        for number in range(1, 4):
            with running(member(number)) as raised:
                errors.append(raised)
                for _ in range(4):
                    send(kafka, 250, first=count, topic=topic, keys=20)
                    count += 250
                    time.sleep(0.5)
        until(lambda: {each[2] for each in seen} == set(range(count)), "every record", patience_s=90)
    assert errors == [[] for _ in errors]
    handled = {(partition, offset) for _, _, _, partition, offset in seen}
    offsets = committed(kafka, topic, topic)
    for partition, offset in offsets.items():
        assert {(partition, each) for each in range(offset)} <= handled
    assert sum(offsets.values()) == count  # all of it, at the end
    for number in range(4):
        of_key: dict[Any, list[int]] = defaultdict(list)
        for who, key, order, _, _ in seen:
            if who == number and order not in of_key[key]:  # a copy, of what was done behind one that was not
                of_key[key].append(order)
        for orders in of_key.values():
            assert orders == sorted(orders)


def test_a_broker_that_restarts_is_waited_for(kafka: KafkaCluster, topic: str) -> None:
    seen: Counter[int] = Counter()
    listener = listener_of(kafka, topic, lambda envelope: seen.update([envelope.message.number]))
    with running(listener) as raised:
        send(kafka, 200, topic=topic)
        until(lambda: len(seen) == 200, "those from before")
        broker = kafka.brokers[0]
        broker.kill()
        broker.start()
        kafka.wait_until_up()
        send(kafka, 200, first=200, topic=topic)
        until(lambda: len(seen) == 400, "those from after", patience_s=90)
    assert raised == []
    assert sum(committed(kafka, topic, topic).values()) == 400


def test_records_of_aborted_transactions_are_not_read_and_control_records_are_no_gap(
    kafka: KafkaCluster, topic: str
) -> None:
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": topic, "linger.ms": 0}
    )
    producer.init_transactions(30)
    wanted = []
    for number in range(20):
        producer.begin_transaction()
        producer.produce(topic, key=str(number), value=b'{"number": %d}' % number, partition=0)
        producer.flush(30)
        if number % 3:
            wanted.append(number)
            producer.commit_transaction(30)
        else:
            producer.abort_transaction(30)
    seen: list[tuple[int, int]] = []
    listener = listener_of(
        kafka, topic, lambda envelope: seen.append((int(envelope.key), envelope.offset)), wire="raw", types={}
    )
    with running(listener) as raised:
        until(lambda: len(seen) == len(wanted), "those that were committed")
        until(lambda: committed(kafka, topic, topic).get(0) == seen[-1][1] + 1, "a commit over the gaps")
    assert raised == []
    assert [number for number, _ in seen] == wanted


def test_gaps_of_a_compacted_topic(kafka: KafkaCluster) -> None:
    name = f"compacted-{uuid.uuid4().hex[:8]}"
    kafka.create_topic(
        name,
        partitions=1,
        config={
            "cleanup.policy": "compact",
            "segment.ms": "100",
            "min.cleanable.dirty.ratio": "0.01",
            "max.compaction.lag.ms": "200",
        },
    )
    for round_ in range(6):
        send(kafka, 50, first=50 * round_, topic=name, keys=5)
        time.sleep(0.3)

    def remaining() -> list[int]:
        offsets: list[int] = []
        listener = listener_of(
            kafka,
            name,
            lambda envelope: offsets.append(envelope.offset),
            group=f"g{uuid.uuid4().hex[:6]}",
            concurrency=4,
        )
        with running(listener):
            until(lambda: offsets and max(offsets) == 299, "the last")
        return sorted(offsets)

    until(lambda: len(remaining()) < 250, "the log's compaction", patience_s=90)
    seen: list[int] = []
    with running(listener_of(kafka, name, lambda envelope: seen.append(envelope.offset), concurrency=4)) as raised:
        until(lambda: seen and max(seen) == 299, "the last")
        until(lambda: committed(kafka, name, name, 1) == {0: 300}, "the commit")
    assert raised == []


def test_sigkilled_listeners_records_are_read_again(kafka: KafkaCluster, topic: str) -> None:
    """What is not committed when a member dies is another's, and nothing of it is missing."""
    send(kafka, 400, topic=topic)
    program = (
        "import os, time, kbatch\n"
        "def handle(envelope):\n"
        "    os.write(1, b'%d %d\\n' % (envelope.partition, envelope.offset))\n"
        "    time.sleep(0.002)\n"
        f"listener = kbatch.Listener({settings_of(kafka, topic)!r}, [{topic!r}], handle, concurrency=4)\n"
        "listener.run()\n"
    )
    handled: set[tuple[int, int]] = set()
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        partition, offset = line.split()
        handled.add((int(partition), int(offset)))
        if len(handled) == 150:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    for line in child.stdout:
        if line.endswith("\n"):
            partition, offset = line.split()
            handled.add((int(partition), int(offset)))
    child.stdout.close()
    after: set[tuple[int, int]] = set()
    with running(
        listener_of(kafka, topic, lambda envelope: after.add((envelope.partition, envelope.offset)))
    ) as raised:
        until(lambda: len(handled | after) == 400, "all of them", patience_s=60)
    assert raised == []


def test_a_static_member_that_is_replaced_ends(kafka: KafkaCluster, topic: str) -> None:
    settings = {"group_instance_id": "one"}
    first = listener_of(kafka, topic, lambda envelope: None, settings=settings)
    second = listener_of(kafka, topic, lambda envelope: None, settings=settings)
    with running(first) as raised:
        until(lambda: first.stats()["partitions"] == 4, "its partitions")
        with running(second) as others:
            until(lambda: raised, "its end", patience_s=60)
        assert others == []
    assert isinstance(raised[0], kbatch.ListenerError)


def test_a_partition_that_hangs_does_not_lose_the_member(kafka: KafkaCluster, topic: str) -> None:
    release = threading.Event()
    seen: set[tuple[int, int]] = set()

    def handle(envelope: Received) -> None:
        if envelope.partition == 0:
            release.wait(60)
        seen.add((envelope.partition, envelope.offset))

    settings = {"max_poll_interval_ms": 8000}
    listener = listener_of(kafka, topic, handle, concurrency=5, max_in_flight=100, settings=settings)
    for partition in range(4):
        send(kafka, 1000, topic=topic, partition=partition, keys=1)
    with running(listener) as raised:
        until(lambda: len(seen) == 3000, "those of the others")
        time.sleep(9.0)
        assert listener.stats()["rebalances"] == 1
        release.set()
        until(lambda: len(seen) == 4000, "the rest")
    assert raised == []


def test_the_config_of_the_consumer_protocol_has_nothing_that_it_refuses() -> None:
    config = {"bootstrap.servers": "localhost:9", "group.id": "g", "group.protocol": "consumer"}
    assert ConsumerConfig.parse(config).native.get("partition.assignment.strategy") != "cooperative-sticky"
