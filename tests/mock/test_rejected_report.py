"""Batches that are sent without the envelopes that cannot be mapped: what is stored, and what the report says."""

from datetime import datetime, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope
from kbatch._pending import PendingBatch
from kbatch.testing import ApiKey, MockCluster
from tests.waiting import until

from .clients import end_offsets, read, read_back

REJECTED = "_VALUE_SERIALIZATION"


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic("t", partitions=1)
    return kafka_cluster


def make(cluster: MockCluster, **config: Any) -> kbatch.Producer:
    return kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0} | config)


def envelopes(count: int, bad: Any = ()) -> list[Envelope[Any]]:
    return [Envelope(object() if n in bad else n) for n in range(count)]


def map_all_but(producer: kbatch.Producer, batch: list[Envelope[Any]], bad: Any) -> PendingBatch:
    pending = PendingBatch(producer._core)
    rejected: list[tuple[int, kbatch.SerializationError]] = []
    producer._core.map(pending, "t", batch, rejected)
    assert [index for index, _ in rejected] == list(bad)
    return pending


def stored(cluster: MockCluster) -> list[int]:
    return [int(record.value or b"") for record in read_back(cluster.bootstrap_servers, "t")]


def assert_rejected(report: kbatch.DeliveryReport, bad: Any) -> None:
    for index in bad:
        error = report.errors[index]
        assert (error.name, error.retriable, error.fatal, error.possibly_persisted) == (REJECTED, False, False, False)
        assert report.offsets[index] == -1


@pytest.mark.parametrize("bad", [(0,), (150,), (299,), (0, 1, 127, 128, 129, 255, 299)])
@pytest.mark.parametrize("idempotent", [False, True])
def test_the_rest_is_sent(cluster: MockCluster, bad: tuple[int, ...], idempotent: bool) -> None:
    with make(cluster, **{"enable.idempotence": idempotent}) as producer:
        batch = map_all_but(producer, envelopes(300, bad), bad)
        assert producer._core.send(batch, wait=True)
        report = batch.report
        counters = producer.stats()
    assert list(report.errors) == list(bad)
    assert_rejected(report, bad)
    assert (report.acked, report.failed) == (300 - len(bad), len(bad))
    assert (counters["envelopes"], counters["acked"], counters["failed"]) == (300, 300 - len(bad), len(bad))
    assert counters["in_flight"] == 0
    assert stored(cluster) == [n for n in range(300) if n not in bad]
    error = report.exception()
    assert type(error) is kbatch.BatchError
    assert str(error).startswith(f"{len(bad)} of 300 envelopes failed; the first is envelope {bad[0]}: ")


def test_all_of_a_batch(cluster: MockCluster) -> None:
    with make(cluster, **{"enable.idempotence": False}) as producer:
        batch = map_all_but(producer, envelopes(300, range(300)), range(300))
        assert producer._core.send(batch, wait=True)
        assert_rejected(batch.report, range(300))
    assert end_offsets(cluster.bootstrap_servers, "t") == {0: 0}


def test_detached(cluster: MockCluster) -> None:
    bad = (0, 5, 9)
    with make(cluster) as producer:
        batch = map_all_but(producer, envelopes(10, bad), bad)
        producer._core.send_detached(batch)
        report = batch.wait(30)
    assert_rejected(report, bad)
    assert stored(cluster) == [1, 2, 3, 4, 6, 7, 8]


def test_a_partition_and_an_expired_one_beside_it(cluster: MockCluster) -> None:
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    with make(cluster) as producer:
        several = [Envelope(1), Envelope(object(), partition=0), Envelope(2, deliver_by=past), Envelope(object())]
        batch = map_all_but(producer, several, (1, 3))
        assert producer._core.send(batch, wait=True)
        report = batch.report
    assert_rejected(report, (1, 3))
    assert (report.acked, report.expired_indices) == (1, (2,))
    assert report.partitions == (0, 0, -1, -1)
    assert stored(cluster) == [1]


def test_what_is_given_up_is_told_apart(cluster: MockCluster) -> None:
    # Nothing is enqueued within no time.
    bad = (0, 2)
    with make(cluster) as producer:
        producer._core.start()
        batch = map_all_but(producer, envelopes(4, bad), bad)
        producer._core.send(batch, 0, wait=True)
        report = batch.wait(30)
        assert producer.stats()["failed"] == 4
    assert {index: error.name for index, error in report.errors.items()} == {
        0: REJECTED,
        1: "_TIMED_OUT_QUEUE",
        2: REJECTED,
        3: "_TIMED_OUT_QUEUE",
    }
    assert_rejected(report, bad)
    assert end_offsets(cluster.bootstrap_servers, "t") == {0: 0}


def test_abandoned(cluster: MockCluster) -> None:
    with make(cluster) as producer:
        producer._core.start()
        batch = map_all_but(producer, envelopes(3, (1,)), (1,))
        producer._core.abandon(batch)
        producer._core.send_detached(batch)
        report = batch.wait(30)
    assert [error.name for error in report.errors.values()] == ["_PURGE_QUEUE", REJECTED, "_PURGE_QUEUE"]
    assert_rejected(report, (1,))


# -- in a transaction


def transactional(cluster: MockCluster) -> kbatch.Producer:
    return make(cluster, **{"transactional.id": "one"})


@pytest.mark.parametrize("bad", [(0,), (1, 5, 9), range(10)])
def test_a_transaction_is_committed_without_them(cluster: MockCluster, bad: Any) -> None:
    with transactional(cluster) as producer:
        transactions = producer._transactions
        assert transactions is not None
        batch = map_all_but(producer, envelopes(10, bad), bad)
        transactions.send(batch, None)
        report = batch.wait(30)
        assert_rejected(report, bad)
        assert (report.acked, report.failed) == (10 - len(bad), len(bad))
        assert producer.send_batch("t", [Envelope(77)]).ok
    # The mock cluster writes no checksums on batches of transactions.
    expected = [*(n for n in range(10) if n not in bad), 77]
    records = read(cluster.bootstrap_servers, "t", len(expected))[0]
    assert [int(record.value or b"") for record in records] == expected


def test_a_transaction_that_is_aborted_for_another_reason(cluster: MockCluster) -> None:
    with transactional(cluster) as producer:
        transactions = producer._transactions
        assert transactions is not None
        assert producer.send_batch("t", [Envelope(1)]).ok
        several = [Envelope(object()), Envelope(1), Envelope(2, partition=7)]
        batch = map_all_but(producer, several, (0,))
        transactions.send(batch, None)
        report = batch.wait(30)
        assert_rejected(report, (0,))
        assert [report.errors[n].name for n in (1, 2)] == ["TRANSACTION_ABORTABLE", "_UNKNOWN_PARTITION"]
        error = report.exception()
        assert type(error) is kbatch.UnknownTopicError
        assert "the cause is envelope 2" in str(error)


def test_a_commit_whose_end_is_unknown(cluster: MockCluster) -> None:
    with transactional(cluster) as producer:
        transactions = producer._transactions
        assert transactions is not None
        assert producer.send_batch("t", [Envelope(1)]).ok
        batch = map_all_but(producer, envelopes(3, (1,)), (1,))
        cluster.push_request_errors(ApiKey.END_TXN, ["UNKNOWN", "INVALID_TXN_STATE"])
        transactions.send(batch, None)
        report = batch.wait(30)
        assert [report.errors[n].possibly_persisted for n in range(3)] == [True, False, True]
        assert_rejected(report, (1,))
        assert "the cause is envelope 1" not in str(report.exception())


def test_a_transaction_that_is_given_up_at_once(cluster: MockCluster) -> None:
    with transactional(cluster) as producer:
        transactions = producer._transactions
        assert transactions is not None
        batch = map_all_but(producer, envelopes(3, (1,)), (1,))
        transactions.send(batch, 0)
        until(batch.done, "the answer")
        assert [error.name for error in batch.report.errors.values()] == [
            "_TIMED_OUT_QUEUE",
            REJECTED,
            "_TIMED_OUT_QUEUE",
        ]
        assert_rejected(batch.report, (1,))
