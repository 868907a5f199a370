"""Batches that are sent without waiting, from any thread, with and without transactions; and twins of a producer."""

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import kbatch
import kbatch.aio
from kbatch import Envelope
from kbatch._pending import PendingBatch
from kbatch.testing import MockCluster
from tests.waiting import until

from .clients import read
from .processes import needs_fork

KINDS: list[type[Any]] = [kbatch.Producer, kbatch.aio.Producer]


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic("t", partitions=1)
    return kafka_cluster


@pytest.fixture(params=[None, "one"], ids=["plain", "transactional"])
def config(request: pytest.FixtureRequest, cluster: MockCluster) -> dict[str, Any]:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    return config if request.param is None else {**config, "transactional.id": request.param}


@pytest.fixture(params=KINDS, ids=["blocking", "aio"])
def producer(request: pytest.FixtureRequest, config: dict[str, Any]) -> Iterator[Any]:
    producer = request.param(config)
    yield producer
    producer._core.close(20)


def mapped(producer: Any, values: Any) -> PendingBatch:
    batch = PendingBatch(producer._core)
    producer._core.map(batch, "t", [Envelope(value) for value in values])
    return batch


def values(cluster: MockCluster, count: int) -> list[int]:
    return [int(record.value or b"") for record in read(cluster.bootstrap_servers, "t", count).get(0, [])]


def test_it_returns_at_once_and_the_waker_is_called_once(cluster: MockCluster, producer: Any) -> None:
    calls: list[threading.Thread] = []
    cluster.set_broker_down(1)
    batch = mapped(producer, range(5))
    producer._send_detached(batch, waker=lambda: calls.append(threading.current_thread()))
    assert not batch.done()
    assert calls == []
    cluster.set_broker_up(1)
    assert batch.wait(30).ok
    until(lambda: len(calls) == 1, "the waker")
    assert calls[0].name == "kbatch-dispatcher"
    producer._send_detached(mapped(producer, [5]))  # the first is over for good
    assert producer._core.flush(30) == 0
    assert len(calls) == 1
    assert values(cluster, 6) == list(range(6))


class Name(str):
    """Whatever it overrides is not asked."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return False


def test_a_batch_of_many_topics_stands_in_line_once_for_each(cluster: MockCluster, producer: Any) -> None:
    """However its names are written: twice, and it would wait for itself."""
    topics = [f"t{n}" for n in range(20)]
    for topic in topics:
        cluster.create_topic(topic, partitions=1)
    for start in (0, 100):  # the second time, they are known
        names = [Name(topic) if turn % 2 else topic.encode().decode() for turn in range(5) for topic in topics]
        batch = PendingBatch(producer._core)
        producer._core.map(batch, None, [Envelope(start + n, topic=name) for n, name in enumerate(names)])
        assert [record[0] for record in producer._core.records(batch)] == topics * 5
        producer._send_detached(batch)
        assert batch.wait(30).acked == 100
    for n, topic in enumerate(topics):
        stored = [int(record.value or b"") for record in read(cluster.bootstrap_servers, topic, 10)[0]]
        assert stored == [start + turn * 20 + n for start in (0, 100) for turn in range(5)]


def test_the_order_of_a_topic_stays_however_many_topics_come_after_it(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    with kbatch.Producer(config, max_in_flight=2) as producer:
        cluster.set_broker_down(1)
        batches = [mapped(producer, range(50))]
        producer._send_detached(batches[0])
        producer._map(None, [Envelope(0, topic=f"other-{n}") for n in range(100)])
        batches.append(mapped(producer, range(50, 60)))
        producer._send_detached(batches[1])
        cluster.set_broker_up(1)
        assert all(batch.wait(30).ok for batch in batches)
    assert values(cluster, 60) == list(range(60))


def test_from_many_threads(cluster: MockCluster, producer: Any) -> None:
    done = threading.Semaphore(0)

    def run(first: int) -> None:
        for n in range(first, first + 5):
            producer._send_detached(mapped(producer, [n]), waker=done.release)

    threads = [threading.Thread(target=run, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(20):
        assert done.acquire(timeout=30)
    stored = values(cluster, 20)
    assert sorted(stored) == sorted(100 * n + m for n in range(4) for m in range(5))
    for n in range(4):
        assert [value for value in stored if value // 100 == n] == [100 * n + m for m in range(5)]


def test_a_timeout(cluster: MockCluster, producer: Any) -> None:
    woken = threading.Event()
    producer._core.start()
    batch = mapped(producer, range(3))
    producer._send_detached(batch, 0, waker=woken.set)
    assert woken.wait(30)
    assert {error.name for error in batch.report.errors.values()} == {"_TIMED_OUT_QUEUE"}


def test_a_closed_producer_refuses_and_calls_nobody(producer: Any) -> None:
    calls: list[int] = []
    assert producer._core.close(20) == 0
    batch = mapped(producer, range(3))
    with pytest.raises(kbatch.ProducerClosedError):
        producer._send_detached(batch, waker=lambda: calls.append(1))
    assert not batch.begun
    assert calls == []


def test_a_transactional_producer_that_can_send_no_more_calls_nobody(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "transactional.id": "one"}
    with kbatch.Producer(config) as producer:
        assert producer._transactions is not None
        producer._transactions._undecided = "its last transaction was interrupted"
        calls: list[int] = []
        batch = mapped(producer, range(3))
        with pytest.raises(kbatch.TransactionUnknownError, match="was interrupted"):
            producer._send_detached(batch, waker=lambda: calls.append(1))
        assert not batch.begun
        assert producer.flush(30) == 0
        assert calls == []


# -- twins


def test_a_twin_is_a_producer_of_its_own(cluster: MockCluster, config: dict[str, Any], producer: Any) -> None:
    first = mapped(producer, [1])
    producer._send_detached(first)
    assert first.wait(30).ok
    twin = producer._twin()
    assert type(twin) is type(producer)
    assert not twin._core.started()
    assert twin.stats()["batches"] == 0
    assert producer._core.close(20) == 0
    second = mapped(twin, [2])
    twin._send_detached(second)
    assert second.wait(30).ok
    assert twin._core.close(20) == 0
    assert values(cluster, 2) == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_has_the_same_options(cluster: MockCluster, kind: Any) -> None:
    seen: list[str] = []
    statistics = threading.Event()

    def encode(message: Any, context: Any) -> bytes:
        return msgspec.json.encode([message])

    def stats_cb(text: str) -> None:
        seen.append(threading.current_thread().name)
        statistics.set()

    class Own(kind):  # type: ignore[misc]
        name = "class"

    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "client.id": "the-one"}
    config |= {"statistics.interval.ms": 50, "stats_cb": stats_cb, "message.max.bytes": 2000}
    producer = Own(
        config,
        wire="cloudevents",
        encoder=encode,
        source="fleet-1",
        header_hook=lambda: {"h": "v"},
        close_timeout_s=7.5,
        max_in_flight=3,
    )
    producer.name = "own"
    twin = producer._twin()
    assert type(twin) is Own
    assert twin.name == "own"
    batch = mapped(twin, [1, 2])
    twin._send_detached(batch)
    assert batch.wait(30).ok
    assert repr(twin).startswith(f"<{kind._shown} the-one#producer-")
    assert statistics.wait(30)
    with pytest.raises(kbatch.SerializationError, match=r"more than message\.max\.bytes=2000"):
        mapped(twin, ["x" * 3000])
    assert twin._close_timeout == 7.5
    assert twin._core.close(20) == 0
    assert not producer._core.started()
    records = read(cluster.bootstrap_servers, "t", 2)[0]
    assert [record.value for record in records] == [b"[1]", b"[2]"]
    for record in records:
        headers = dict(record.headers)
        assert (headers["ce_source"], headers["h"]) == (b"fleet-1", b"v")


def test_a_twin_of_a_fatal_one_sends(cluster: MockCluster) -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        producer._core.inject_fatal_error(47, "for the test")
        with pytest.raises(kbatch.ProducerFatalError):
            producer.send_batch("t", [Envelope(2)])
        with producer._twin() as twin:
            assert twin.send_batch("t", [Envelope(2)]).ok
            with twin._twin() as third:
                assert third.send_batch("t", [Envelope(3)]).ok
    assert values(cluster, 3) == [1, 2, 3]


def test_a_twin_on_an_event_loop(cluster: MockCluster) -> None:
    async def main() -> None:
        async with kbatch.aio.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}) as producer:
            called = asyncio.Event()
            async with producer._twin() as twin:
                reports = await asyncio.gather(*(twin.send_batch("t", [Envelope(n)]) for n in range(5)))
                assert all(report.ok for report in reports)
                await twin.submit("t", [Envelope(5)], callback=lambda report: called.set())
                await asyncio.wait_for(called.wait(), 30)
            assert (await producer.send_batch("t", [Envelope(6)])).ok

    asyncio.run(main())
    assert sorted(values(cluster, 7)) == list(range(7))


@needs_fork[0]
@needs_fork[1]
def test_a_twin_in_a_child_of_a_used_one(cluster: MockCluster) -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}) as producer:
        assert producer.send_batch("t", [Envelope(1)]).ok
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with producer._twin() as twin:
                    code = 0 if twin.send_batch("t", [Envelope(2)], timeout=30).ok else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert values(cluster, 2) == [1, 2]
