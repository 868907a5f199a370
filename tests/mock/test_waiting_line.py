"""The line of a producer: batches that have room pass those that have none, and a long one does not hold up a short."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
import kbatch.aio
from kbatch import Envelope, KafkaTopic, SenderMode
from kbatch.testing import MockCluster
from tests.waiting import until

from .clients import read

ROOM = 200


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    for name in ("dead", "healthy"):
        kafka_cluster.create_topic(name)
    # For version 10 the mock cluster looks up the leader, and crashes where there is none.
    kafka_cluster.set_api_version(0, 0, 9)
    kafka_cluster.set_partition_leader("dead", 0, -1)
    return kafka_cluster


@pytest.fixture
def config(cluster: MockCluster) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "delivery.timeout.ms": 60_000}


@pytest.fixture
def producer(config: dict[str, Any]) -> Iterator[kbatch.Producer]:
    producer = kbatch.Producer(config, max_in_flight=ROOM)
    yield producer
    producer._core.close(0)


def envelopes(count: int, first: int = 0) -> list[Envelope[int]]:
    return [Envelope(n) for n in range(first, first + count)]


def stored(cluster: MockCluster, topic: str, count: int) -> list[int]:
    records = read(cluster.bootstrap_servers, topic, count)
    return [int(record.value or b"") for partition in sorted(records) for record in records[partition]]


class Sending(threading.Thread):
    """A thread that sends one batch."""

    def __init__(self, producer: kbatch.Producer, topic: str | None, batch: list[Any]) -> None:
        super().__init__(daemon=True)
        self.arguments = producer, topic, batch
        self.report: kbatch.DeliveryReport | None = None
        self.start()

    def run(self) -> None:
        producer, topic, batch = self.arguments
        self.report = producer.send_batch(topic, batch)


def in_flight(producer: Any) -> int:
    return int(producer.stats()["in_flight"])


def wait_until_full(producer: Any) -> None:
    until(lambda: in_flight(producer) >= ROOM, "the dead topic's share")


def test_threads(cluster: MockCluster, producer: kbatch.Producer) -> None:
    waiting = Sending(producer, "dead", envelopes(3 * ROOM))
    wait_until_full(producer)
    for n in range(0, 3 * ROOM, ROOM):
        assert producer.send_batch("healthy", envelopes(ROOM, n), timeout=30).ok
    assert waiting.is_alive()
    assert in_flight(producer) == ROOM
    assert stored(cluster, "healthy", 3 * ROOM) == list(range(3 * ROOM))
    cluster.set_partition_leader("dead", 0, 1)
    waiting.join(60)
    assert waiting.report is not None
    assert waiting.report.ok
    assert stored(cluster, "dead", 3 * ROOM) == list(range(3 * ROOM))


def test_many_dead_topics(cluster: MockCluster, producer: kbatch.Producer) -> None:
    names = [f"dead-{n}" for n in range(10)]
    for name in names:
        cluster.create_topic(name)
        cluster.set_partition_leader(name, 0, -1)
    waiting = [Sending(producer, name, envelopes(ROOM)) for name in names]
    wait_until_full(producer)
    assert producer.send_batch("healthy", envelopes(50), timeout=30).ok
    assert in_flight(producer) <= ROOM * 5 // 4 + 3 * len(names)
    assert all(thread.is_alive() for thread in waiting)
    assert stored(cluster, "healthy", 50) == list(range(50))


def test_what_one_topic_all_together_and_each_always_may_have(cluster: MockCluster, config: dict[str, Any]) -> None:
    # Each has four fifths of what is left of 12,500, and the last two 128 all the same.
    producer = kbatch.Producer(config)
    waiting = []
    for n, expected in enumerate((10_000, 12_000, 12_400, 12_528, 12_656, 12_784)):
        cluster.create_topic(f"dead-{n}")
        cluster.set_partition_leader(f"dead-{n}", 0, -1)
        waiting.append(Sending(producer, f"dead-{n}", envelopes(11_000)))
        until(lambda expected=expected: in_flight(producer) >= expected, "its share")  # type: ignore[misc]
        time.sleep(0.05)
        assert in_flight(producer) == expected
    producer._core.close(0)
    for thread in waiting:
        thread.join(30)


def test_more_topics_than_librdkafkas_queue_has_room_for(cluster: MockCluster, config: dict[str, Any]) -> None:
    names = [f"topic-{n}" for n in range(20)]
    for name in names:
        cluster.create_topic(name)
    with kbatch.Producer(config | {"queue.buffering.max.messages": 10}) as producer:
        waiting = [Sending(producer, name, envelopes(50)) for name in names]
        for thread in waiting:
            thread.join(60)
            assert thread.report is not None
            assert thread.report.ok
    for name in names:
        assert stored(cluster, name, 50) == list(range(50))


def test_event_loops(cluster: MockCluster, config: dict[str, Any]) -> None:
    async def main() -> None:
        producer = kbatch.aio.Producer(config, max_in_flight=ROOM, close_timeout_s=0)
        waiting = [asyncio.ensure_future(producer.send_batch("dead", envelopes(ROOM))) for _ in range(3)]
        while in_flight(producer) < ROOM:
            await asyncio.sleep(0.01)
        for n in range(0, 3 * ROOM, ROOM):
            assert (await producer.send_batch("healthy", envelopes(ROOM, n), timeout=30)).ok
        # One of both topics waits for its turn in each, and one that comes after it must not pass it.
        both = [Envelope(n, topic=("healthy", "dead")[n % 2]) for n in range(600, 610)]
        waiting.append(asyncio.ensure_future(producer.send_batch(None, both)))
        await asyncio.sleep(0.1)
        waiting.append(asyncio.ensure_future(producer.send_batch("healthy", envelopes(5, 610))))
        cluster.create_topic("other")
        assert (await producer.send_batch("other", envelopes(5), timeout=30)).ok
        assert not any(task.done() for task in waiting)
        cluster.set_partition_leader("dead", 0, 1)
        assert all(report.ok for report in await asyncio.wait_for(asyncio.gather(*waiting), 60))
        await producer.close()

    asyncio.run(main())
    assert stored(cluster, "healthy", 610) == [*range(600), *range(600, 610, 2), *range(610, 615)]
    assert stored(cluster, "dead", 605) == [*range(ROOM), *range(ROOM), *range(ROOM), *range(601, 610, 2)]
    assert stored(cluster, "other", 5) == list(range(5))


def test_batched_senders(cluster: MockCluster, config: dict[str, Any]) -> None:
    producer = kbatch.Producer(config, max_in_flight=ROOM)
    given_up: list[Any] = []
    dead, healthy = (
        KafkaTopic(
            name, mode=SenderMode.BUFFERED, producer=producer, on_failed=lambda *told: given_up.append(told)
        ).create_sender()
        for name in ("dead", "healthy")
    )
    for n in range(3 * ROOM):
        dead.send(Envelope(n, key="k"))
    wait_until_full(producer)
    for n in range(3 * ROOM):
        healthy.send(Envelope(n, key="k"))
    assert healthy.flush(30) == 0
    assert stored(cluster, "healthy", 3 * ROOM) == list(range(3 * ROOM))
    assert not given_up
    cluster.set_partition_leader("dead", 0, 1)
    assert dead.close(60) == healthy.close(60) == 0
    assert producer.close(60) == 0
    assert stored(cluster, "dead", 3 * ROOM) == list(range(3 * ROOM))


def test_a_dead_topic_takes_not_all_bytes(cluster: MockCluster, config: dict[str, Any]) -> None:
    producer = kbatch.Producer(config | {"queue.buffering.max.kbytes": 1_000}, wire="raw")
    waiting = Sending(producer, "dead", [Envelope(data=b"x" * 10_000) for _ in range(200)])
    until(lambda: in_flight(producer) >= 60, "its share of librdkafka's queue")
    for n in range(100):
        assert producer.send_batch("healthy", [Envelope(data=b"%d" % n + b" " * 9_000)], timeout=30).ok
    assert waiting.is_alive()
    assert stored(cluster, "healthy", 100) == list(range(100))
    producer.close(0)
    waiting.join(30)
    assert not waiting.is_alive()


def test_batches_of_several_topics_count_for_each(cluster: MockCluster, producer: kbatch.Producer) -> None:
    both = [Envelope(n, topic=("healthy", "dead")[n % 2]) for n in range(4 * ROOM)]
    waiting = [Sending(producer, None, both) for _ in range(3)]
    wait_until_full(producer)
    for n in range(5):
        assert producer.send_batch("healthy", envelopes(ROOM, n), timeout=30).ok
    assert all(thread.is_alive() for thread in waiting)
    cluster.set_partition_leader("dead", 0, 1)
    for thread in waiting:
        thread.join(60)
        assert thread.report is not None
        assert thread.report.ok
    assert len(producer) == 0
    assert len(stored(cluster, "dead", 6 * ROOM)) == 6 * ROOM


@pytest.mark.parametrize("topic", ["healthy", "other"])
def test_a_short_batch_does_not_wait_for_a_long_one(cluster: MockCluster, config: dict[str, Any], topic: str) -> None:
    cluster.create_topic("other")
    with kbatch.Producer(config, wire="raw") as producer:
        assert producer.send_batch(topic, [Envelope(-1)]).ok
        long = Sending(producer, "healthy", envelopes(200_000))
        until(lambda: in_flight(producer) > 0, "the long batch")
        for n in range(5):
            assert producer.send_batch(topic, [Envelope(-2 - n)]).ok
        # Not a time: the short ones stand in the log amid the long one.
        long.join(60)
        assert long.report is not None
        assert long.report.ok
    values = stored(cluster, "healthy", 200_000)
    assert [n for n in values if n >= 0] == list(range(200_000))
    if topic == "healthy":
        assert values.index(-6) < 150_000


def test_other_threads_run_while_a_long_batch_is_mapped() -> None:
    producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"})
    over = threading.Event()
    times_let_in = [0]

    def run() -> None:
        last = time.monotonic()
        while not over.is_set():
            now = time.monotonic()
            times_let_in[0] += now - last > 0.001
            last = now

    batch = envelopes(500_000)
    pending = kbatch.PendingBatch(producer._core)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        before = times_let_in[0]
        producer._core.map(pending, "orders", batch)
        during = times_let_in[0] - before
    finally:
        over.set()
        thread.join()
    assert during >= 5


@pytest.mark.parametrize("kind", [kbatch.Producer, kbatch.aio.Producer])
def test_the_longest_time_is_told(kind: Any) -> None:
    server = {"bootstrap.servers": "127.0.0.1:1"}
    assert kind(server).max_delivery_s() == 2 * 300 + 2
    assert kind({**server, "delivery.timeout.ms": 5_000}).max_delivery_s() == 12
    assert kind({**server, "transactional.id": "one"}).max_delivery_s() == 2 * 60 + 2 + 4 * 60


def test_time_in_line_comes_on_top_of_librdkafkas(cluster: MockCluster, config: dict[str, Any]) -> None:
    with kbatch.Producer(config | {"delivery.timeout.ms": 1_500}, max_in_flight=ROOM) as producer:
        report = producer.send_batch("dead", envelopes(3 * ROOM))
        assert {error.name for error in report.errors.values()} == {"_MSG_TIMED_OUT", "_TIMED_OUT_QUEUE"}
        assert report.latency_s <= producer.max_delivery_s()


def test_what_expires_while_it_waits_for_room_is_not_sent(cluster: MockCluster, producer: kbatch.Producer) -> None:
    waiting = Sending(producer, "dead", envelopes(3 * ROOM))
    wait_until_full(producer)
    soon = datetime.now(timezone.utc) + timedelta(milliseconds=500)
    late = Sending(producer, "dead", [Envelope(1000 + n, deliver_by=soon if n % 2 else None) for n in range(10)])
    until(lambda: datetime.now(timezone.utc) > soon, "the time of half of the envelopes")
    assert late.is_alive()
    cluster.set_partition_leader("dead", 0, 1)
    for thread in (waiting, late):
        thread.join(60)
        assert thread.report is not None
        assert thread.report.ok
    assert late.report is not None
    assert late.report.expired_indices == (1, 3, 5, 7, 9)
    assert late.report.acked == 5
    assert sorted(stored(cluster, "dead", 3 * ROOM + 5)) == [*range(3 * ROOM), *range(1000, 1010, 2)]


def test_many_dead_topics_do_not_fill_librdkafkas_queue(cluster: MockCluster, config: dict[str, Any]) -> None:
    names = [f"dead-{n}" for n in range(30)]
    for name in names:
        cluster.create_topic(name)
        cluster.set_partition_leader(name, 0, -1)
    producer = kbatch.Producer(config | {"queue.buffering.max.messages": 2_000})
    waiting = [Sending(producer, name, envelopes(200)) for name in names]
    until(lambda: in_flight(producer) > 1_500, "what the dead topics take")
    for n in range(5):
        assert producer.send_batch("healthy", envelopes(50, n), timeout=30).ok
    assert all(thread.is_alive() for thread in waiting)
    producer._core.close(0)
    for thread in waiting:
        thread.join(30)


def test_small_messages_leave_room_for_a_large_one(cluster: MockCluster, config: dict[str, Any]) -> None:
    # Small requests, one at a time: what comes free does so in pieces that are too small for the large message.
    names = ["large", *(f"small-{n}" for n in range(4))]
    for name in names:
        cluster.create_topic(name)
    limits = {"queue.buffering.max.kbytes": 16_384, "message.max.bytes": 8_000_000}
    limits |= {"batch.size": 200_000, "max.in.flight": 1}
    producer = kbatch.Producer(config | limits, wire="raw")
    for name in names:
        assert producer.send_batch(name, [Envelope(data=b"first")]).ok
    cluster.set_rtt(1, 5)
    over = threading.Event()

    def flow(topic: str) -> None:
        small = [Envelope(data=b"x" * 20_000) for _ in range(400)]
        while not over.is_set():
            producer.submit(topic, small)

    flowing = [threading.Thread(target=flow, args=[name], daemon=True) for name in names[1:]]
    for thread in flowing:
        thread.start()
    until(lambda: in_flight(producer) > 550, "the small ones")
    try:
        assert producer.send_batch("large", [Envelope(data=b"y" * 7_800_000)], timeout=20).ok
    finally:
        over.set()
        producer._core.close(0)
        for thread in flowing:
            thread.join(30)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="platform: there are no such signals")
def test_what_a_signal_handler_hands_over_keeps_its_place(cluster: MockCluster, config: dict[str, Any]) -> None:
    cluster.set_rtt(1, 200)
    producer = kbatch.Producer(config | {"max.in.flight": 5}, max_in_flight=ROOM)
    flushed: list[int] = []

    def handler(*_: object) -> None:
        flushed.append(producer.flush(0))
        cluster.set_rtt(1, 0)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        first = producer.submit("healthy", envelopes(15 * ROOM))
        second = producer.submit("healthy", envelopes(ROOM, 15 * ROOM))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert first.wait(60).ok
    assert second.wait(60).ok
    assert flushed
    producer.close()
    assert stored(cluster, "healthy", 16 * ROOM) == list(range(16 * ROOM))


def test_what_expires_in_line_has_expired_also_if_its_batch_is_given_up(producer: kbatch.Producer) -> None:
    waiting = Sending(producer, "dead", envelopes(3 * ROOM))
    wait_until_full(producer)
    soon = datetime.now(timezone.utc) + timedelta(milliseconds=100)
    report = producer.send_batch("dead", [Envelope(0, deliver_by=soon), Envelope(1)], timeout=1)
    assert report.expired_indices == (0,)
    assert report.failed == 1
    assert waiting.is_alive()
