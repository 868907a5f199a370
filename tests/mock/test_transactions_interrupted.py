"""Transactions against the mock cluster: refusals that a real one cannot be asked for, and what interrupts them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kbatch
from kbatch import _transactions, aio
from kbatch.testing import ApiKey, MockCluster
from tests.loops import beside
from tests.mock.clients import read
from tests.sending import KINDS, Driver
from tests.waiting import until


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("t", partitions=2)
        yield cluster


@pytest.fixture
def producer(cluster: MockCluster) -> Iterator[kbatch.Producer]:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "transactional.id": "one", "log_level": 0}
    producer = kbatch.Producer(config)
    assert producer.send_batch("t", envelopes(2)).ok
    yield producer
    producer.close(20)


def envelopes(count: int) -> list[kbatch.Envelope[int]]:
    return [kbatch.Envelope(n) for n in range(count)]


def test_a_commit_that_is_refused_but_aborted_may_be_sent_again(
    cluster: MockCluster, producer: kbatch.Producer
) -> None:
    cluster.push_request_errors(ApiKey.END_TXN, ["UNKNOWN_PRODUCER_ID"])
    report = producer.send_batch("t", envelopes(3))
    assert report.failed == 3
    assert all(error.retriable and not error.fatal for error in report.errors.values())
    assert not any(error.possibly_persisted for error in report.errors.values())
    assert producer.send_batch("t", envelopes(3)).ok


def test_an_abort_that_is_refused_is_tried_again(cluster: MockCluster, producer: kbatch.Producer) -> None:
    cluster.push_request_errors(ApiKey.END_TXN, ["UNKNOWN", "UNKNOWN", "UNKNOWN"])
    report = producer.send_batch("t", envelopes(3))
    assert report.failed == 3
    assert not any(error.possibly_persisted for error in report.errors.values())
    assert producer.send_batch("t", envelopes(3)).ok


def test_a_commit_that_is_refused_and_cannot_be_aborted_may_have_been_made(
    cluster: MockCluster, producer: kbatch.Producer
) -> None:
    # As if the answer of a first commit had been lost, and the coordinator knew of no transaction any more.
    cluster.push_request_errors(ApiKey.END_TXN, ["UNKNOWN", "INVALID_TXN_STATE"])
    report = producer.send_batch("t", envelopes(3))
    assert report.failed == 3
    assert all(error.possibly_persisted for error in report.errors.values())
    with pytest.raises(kbatch.ProducerFatalError):
        producer.send_batch("t", envelopes(3))


def test_flush_counts_a_transaction_that_is_not_decided(producer: kbatch.Producer) -> None:
    transactions = producer._transactions
    assert transactions is not None
    commit, go = transactions._commit, threading.Event()

    def late(batch: Any) -> None:
        go.wait(30)
        commit(batch)

    transactions._commit = late  # type: ignore[method-assign]
    with pytest.raises(kbatch.BatchPendingError) as error:
        producer.send_batch("t", envelopes(3), timeout=1)
    until(lambda: len(producer) == 0, "the acknowledgements")
    assert producer.flush(0.01) == 3
    go.set()
    assert producer.flush(30) == 0
    assert error.value.pending is not None
    assert error.value.pending.done()


class Interrupted(BaseException):
    pass


class Failing:
    """The batches on hold, but one of the methods raises, before or after it has done its work."""

    def __init__(self, held: Any, method: str, nth: int, *, after: bool) -> None:
        self._held, self._method, self._left, self._after = held, method, nth, after

    def __getattr__(self, name: str) -> Any:
        real: Callable[..., Any] = getattr(self._held, name)
        if name != self._method:
            return real

        def failing(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left != 0:
                return real(*args, **kwargs)
            if self._after:
                real(*args, **kwargs)
            raise Interrupted

        return failing


STEPS = [
    ("refusal", 1, False),
    ("transaction_call", 1, False),  # begin
    ("transaction_call", 1, True),
    ("enqueue_held", 1, False),
    ("enqueue_held", 1, True),
    ("wait_for_decision", 1, False),
    ("wait_for_decision", 1, True),
    ("transaction_call", 2, False),  # commit
    ("transaction_call", 2, True),
    ("conclude", 1, False),
    ("conclude", 1, True),
]


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(("method", "nth", "after"), STEPS)
def test_whatever_interrupts_a_transaction_its_batch_is_answered(
    producer: kbatch.Producer, method: str, nth: int, after: bool, count: int
) -> None:
    transactions = producer._transactions
    assert transactions is not None
    transactions._held = Failing(transactions._held, method, nth, after=after)  # type: ignore[assignment]
    report = producer.send_batch("t", envelopes(count), timeout=30)
    if (method, after) == ("conclude", True):
        assert report.acked == count
    else:
        assert report.failed == count
    unsent = (method in ("refusal", "enqueue_held") and not after) or (method, nth) == ("transaction_call", 1)
    if unsent:
        assert not any(error.possibly_persisted for error in report.errors.values())
    elif (method, nth, after) == ("transaction_call", 2, True):  # it was committed
        assert all(error.possibly_persisted for error in report.errors.values())
    with pytest.raises(kbatch.ProducerError, match="interrupted; make a new one"):
        producer.send_batch("t", envelopes(1))
    assert producer.close(20) == 0
    assert producer._core.name() is None


@pytest.mark.parametrize("where", ["hold", "put before", "put after"])
def test_who_is_interrupted_while_sending_leaves_nothing_behind(producer: kbatch.Producer, where: str) -> None:
    transactions = producer._transactions
    assert transactions is not None
    held, thread = transactions._held, transactions._thread
    answers: list[str] = []
    given_up = threading.Event()

    class Callback(kbatch.SenderCallback):
        def mark_successful(self, batch: Any, report: Any) -> None:
            answers.append("successful")

        def mark_processing_failure(self, batch: Any, error: Any) -> None:
            assert not any(one.possibly_persisted for one in error.report.errors.values())
            answers.append("failure")

    class Thread:
        def put(self, function: Callable[..., object], *arguments: object) -> None:
            if where == "put after":
                # The thread comes to it only when its sender has given it up.
                thread.put(given_up.wait)
                thread.put(function, *arguments)
            raise Interrupted

    if where == "hold":
        transactions._held = Failing(held, "hold", 1, after=True)  # type: ignore[assignment]
    else:
        transactions._thread = Thread()  # type: ignore[assignment]
    with pytest.raises(Interrupted):
        kbatch.KafkaSender(producer, "t").send_batch(Callback(), kbatch.OutgoingBatch(envelopes(3)))
    given_up.set()
    transactions._held, transactions._thread = held, thread
    assert producer.send_batch("t", envelopes(3)).ok
    until(lambda: answers, "the answer")
    assert producer.close(20) == 0
    assert answers == ["failure"]
    assert producer._core.name() is None


# -- a commit of unknown outcome, and who replaces the producer


def stop_answering(producer: Any) -> None:
    """The next commit is asked for, and its answer never comes."""
    transactions = producer._transactions
    transactions._timeout_s = 0.0
    call = transactions._call

    def unanswered(which: int) -> Any:
        error = call(which)
        return error if which != _transactions._COMMIT else _transactions._Error(-185, "timed out", False, True, False)

    transactions._call = unanswered


def test_a_commit_is_tried_again_for_twice_the_transactions_time_out(
    producer: kbatch.Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    transactions = producer._transactions
    assert transactions is not None
    call = transactions._call

    def unanswered(which: int) -> Any:
        nonlocal now
        if which != _transactions._COMMIT:
            return call(which)
        now += 1
        return _transactions._Error(-185, "timed out", False, True, False)

    monkeypatch.setattr(_transactions, "monotonic", lambda: now)
    monkeypatch.setattr(transactions, "_call", unanswered)
    assert all(error.possibly_persisted for error in producer.send_batch("t", envelopes(3)).errors.values())
    assert 2 * 60 <= now <= 2 * 60 + 1


class Told(kbatch.SenderCallback):
    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def mark_successful(self, batch: Any, report: Any) -> None:
        self.told.append(("successful", report))

    def mark_processing_failure(self, batch: Any, error: Any) -> None:
        self.told.append(("failure", error))


def test_a_producer_with_a_transaction_without_an_end_refuses_before_it_takes_a_batch(
    producer: kbatch.Producer,
) -> None:
    stop_answering(producer)
    report = producer.send_batch("t", envelopes(3))
    assert all(error.possibly_persisted for error in report.errors.values())
    told = Told()
    kbatch.KafkaSender(producer, "t").send_batch(told, kbatch.OutgoingBatch(envelopes(3)))
    [(name, error)] = told.told
    assert name == "failure"
    assert isinstance(error, kbatch.TransactionUnknownError)
    assert not any(one.possibly_persisted for one in error.report.errors.values())
    with pytest.raises(kbatch.TransactionUnknownError):
        producer.send_batch("t", envelopes(1))
    until(lambda: producer.stats()["pinned_buffers"] == 0, "the buffers of the refused batch")


def test_a_fenced_producer_is_not_one_whose_transaction_is_unknown(producer: kbatch.Producer) -> None:
    stop_answering(producer)
    assert not producer.send_batch("t", envelopes(3)).ok
    producer._core.inject_fatal_error(-144, "made up")
    with pytest.raises(kbatch.ProducerFencedError):
        producer.send_batch("t", envelopes(1))


def test_a_closed_producer_is_not_one_whose_transaction_is_unknown(producer: kbatch.Producer) -> None:
    stop_answering(producer)
    assert not producer.send_batch("t", envelopes(3)).ok
    producer.close(20)
    with pytest.raises(kbatch.ProducerClosedError):
        producer.send_batch("t", envelopes(1))


def values(cluster: MockCluster) -> list[int]:
    # The mock cluster's control records have a wrong checksum, so not by `read_back`.
    found = read(cluster.bootstrap_servers, "t", 1)
    return sorted(int(record.value) for records in found.values() for record in records if record.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_replaces_a_producer_whose_transaction_is_unknown(
    cluster: MockCluster, producer: kbatch.Producer, kind: str
) -> None:
    stop_answering(producer)
    told = Told()
    with Driver(kind, producer, "t", options={}) as driver:
        agent: Any = driver.agent
        driver._do(agent.send_batch(told, kbatch.OutgoingBatch([kbatch.Envelope(10)])))
        driver._do(agent.send_batch(told, kbatch.OutgoingBatch([kbatch.Envelope(11)])))
        until(lambda: agent._handle.producer._core is not producer._core, "a new producer")
        driver._do(agent.send_batch(told, kbatch.OutgoingBatch([kbatch.Envelope(12)])))
    assert [name for name, _ in told.told] == ["failure", "failure", "successful"]
    assert told.told[0][1].report.errors[0].possibly_persisted
    assert isinstance(told.told[1][1], kbatch.TransactionUnknownError)
    assert 11 not in values(cluster)
    assert values(cluster).count(12) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_batched_sender_replaces_a_producer_whose_transaction_is_unknown(
    cluster: MockCluster, producer: kbatch.Producer, kind: str
) -> None:
    stop_answering(producer)
    policy = kbatch.RetryPolicy(initial_backoff_s=0.001)
    with Driver(kind, producer, "t", options={"batch_timeout_ms": 0}, retry=policy, probe_interval_s=0.01) as driver:
        for n in range(10, 20):
            driver.send(kbatch.Envelope(n))
        assert driver.flush() == 0
        assert driver.given_up == []
        assert driver.agent._handle.producer._core is not producer._core
    assert set(range(10, 20)) <= set(values(cluster))


@pytest.mark.parametrize("kind", KINDS)
def test_an_inline_sender_replaces_a_producer_whose_transaction_is_unknown(
    cluster: MockCluster, producer: kbatch.Producer, kind: str
) -> None:
    stop_answering(producer)
    loop = asyncio.new_event_loop()
    sender: Any = kbatch.InlineSender(producer, "t") if kind == "threads" else aio.InlineSender(beside(producer), "t")

    def send(n: int) -> kbatch.DeliveryReport:
        sent = sender.send(kbatch.Envelope(n))
        report: kbatch.DeliveryReport = sent if kind == "threads" else loop.run_until_complete(sent)
        return report

    with pytest.raises(kbatch.DeliveryError) as error:
        send(10)
    assert error.value.possibly_persisted
    assert send(11).ok
    assert send(12).ok
    loop.run_until_complete(sender.close()) if kind == "asyncio" else sender.close()
    loop.close()
    assert [n for n in values(cluster) if n > 10] == [11, 12]


def test_what_was_not_sent_of_an_interrupted_transaction_is_not_told_as_possibly_stored(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "transactional.id": "two", "log_level": 0}
    with kbatch.Producer(config, max_in_flight=1) as producer:
        producer.send_batch("t", envelopes(1)).raise_for_errors()
        transactions = producer._transactions
        assert transactions is not None
        cluster.set_rtt(1, 500)
        transactions._held = Failing(transactions._held, "wait_for_decision", 1, after=False)  # type: ignore[assignment]
        report = producer.send_batch("t", envelopes(50), timeout=30)
        assert report.failed == 50
        possibly = [index for index, error in report.errors.items() if error.possibly_persisted]
        assert len(possibly) <= 2
        assert 49 not in possibly
