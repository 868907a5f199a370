"""Threads that share a producer: each envelope once, each thread's order kept, one outcome per envelope."""

import threading
from typing import Any

import kbatch
from kbatch.testing import MockCluster

from .clients import read


def make_producer(cluster: MockCluster, **options: Any) -> kbatch.Producer:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0} | options.pop("config", {})
    return kbatch.Producer(config, **options)


def envelopes(count: int, prefix: str = "m", key: str | None = None) -> list[kbatch.Envelope[Any]]:
    return [kbatch.Envelope(data=f"{prefix}{i}".encode(), key=key) for i in range(count)]


def test_threads_share_a_producer_and_each_keeps_its_order(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    threads, rounds, size = 8, 12, 250
    failures: list[BaseException] = []
    with make_producer(kafka_cluster, max_in_flight=2_000, config={"queue.buffering.max.messages": 1_000}) as producer:

        def send(number: int) -> None:
            try:
                pending = []
                for turn in range(rounds):
                    batch = envelopes(size, prefix=f"{number}:{turn}:", key=f"key-{number}")
                    if turn % 3 == 0:
                        producer.send_batch("orders", batch).raise_for_errors()
                    else:
                        pending.append(producer.submit("orders", batch))
                for batch_in_flight in pending:
                    batch_in_flight.wait().raise_for_errors()
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        assert producer.flush() == 0
    records = read(kafka_cluster.bootstrap_servers, "orders", threads * rounds * size)
    values: dict[bytes, list[bytes]] = {}
    for partition in records.values():
        for record in partition:
            assert record.key is not None
            values.setdefault(record.key, []).append(record.value or b"")
    for number in range(threads):
        expected = [f"{number}:{turn}:{i}".encode() for turn in range(rounds) for i in range(size)]
        assert values[f"key-{number}".encode()] == expected


def test_batches_of_two_threads_never_interleave(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    size, rounds = 700, 10
    with make_producer(kafka_cluster, max_in_flight=200) as producer:

        def send(name: str) -> None:
            for turn in range(rounds):
                producer.submit("orders", envelopes(size, prefix=f"{name}{turn}-"))

        workers = [threading.Thread(target=send, args=(name,)) for name in "ab"]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    (records,) = read(kafka_cluster.bootstrap_servers, "orders", 2 * size * rounds).values()
    batches = [(record.value or b"").split(b"-")[0] for record in records]
    for start in range(0, len(batches), size):
        assert set(batches[start : start + size]) == {batches[start]}


def test_many_threads_wait_for_one_batch(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 50)
    reports: list[kbatch.DeliveryReport] = []
    with make_producer(kafka_cluster) as producer:
        pending = producer.submit("orders", envelopes(100))
        waiters = [threading.Thread(target=lambda: reports.append(pending.wait())) for _ in range(6)]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
    assert len(reports) == 6
    assert all(report.acked == 100 for report in reports)
