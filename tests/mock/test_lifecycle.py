"""Waits that end early, callbacks, close, purge, fatal errors: one outcome each, nothing pinned."""

import asyncio
import contextlib
import gc
import os
import threading
import time
import weakref
from collections import Counter
from typing import Any

import pytest

import kbatch
from kbatch._fastmap import Config, pinned_buffers, set_oauth_token
from kbatch.testing import MockCluster

from ..waiting import later, until
from .clients import read

OUT_OF_ORDER_SEQUENCE = 45


def make_producer(cluster: MockCluster, **options: Any) -> kbatch.Producer:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0} | options.pop("config", {})
    return kbatch.Producer(config, **options)


def envelopes(count: int, prefix: str = "m", key: str | None = None) -> list[kbatch.Envelope[Any]]:
    return [kbatch.Envelope(data=f"{prefix}{i}".encode(), key=key) for i in range(count)]


@pytest.fixture
def dark_cluster(kafka_cluster: MockCluster) -> MockCluster:
    """A cluster whose only broker is down: what is sent stays in flight."""
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_broker_down(1)
    return kafka_cluster


# -- waits that end early


def test_a_wait_that_times_out_ends_the_wait_only(dark_cluster: MockCluster) -> None:
    with make_producer(dark_cluster) as producer:
        with pytest.raises(kbatch.BatchPendingError) as caught:
            producer.send_batch("orders", envelopes(10), timeout=0.2)
        pending = caught.value.pending
        assert isinstance(caught.value, TimeoutError)
        assert pending is not None
        assert not pending.done()
        assert len(producer) == 10
        with pytest.raises(kbatch.BatchPendingError):
            pending.wait(0.05)
        with pytest.raises(kbatch.BatchPendingError):
            _ = pending.report
        dark_cluster.set_broker_up(1)
        assert pending.wait().acked == 10
    (records,) = read(dark_cluster.bootstrap_servers, "orders", 10).values()
    assert [record.value for record in records] == [f"m{i}".encode() for i in range(10)]


def test_a_timeout_in_the_middle_of_enqueueing_settles_the_rest_as_not_sent(dark_cluster: MockCluster) -> None:
    with make_producer(dark_cluster, config={"queue.buffering.max.messages": 50}) as producer:
        with pytest.raises(kbatch.BatchPendingError) as caught:
            producer.send_batch("orders", envelopes(80), timeout=0.3)
        pending = caught.value.pending
        assert pending is not None
        assert len(producer) == 32
        dark_cluster.set_broker_up(1)
        report = pending.wait()
    assert (report.acked, report.failed) == (32, 48)
    assert sorted(report.errors) == list(range(32, 80))
    assert {error.name for error in report.errors.values()} == {"_TIMED_OUT_QUEUE"}
    assert not any(error.possibly_persisted for error in report.errors.values())
    (records,) = read(dark_cluster.bootstrap_servers, "orders", 32).values()
    assert len(records) == 32


def test_enqueueing_ends_after_the_delivery_timeout(dark_cluster: MockCluster) -> None:
    config = {"queue.buffering.max.messages": 50, "delivery.timeout.ms": 1_000}
    with make_producer(dark_cluster, config=config) as producer:
        report = producer.send_batch("orders", envelopes(120))
    assert report.acked == 0
    assert report.failed == 120
    assert {error.name for error in report.errors.values()} <= {"_MSG_TIMED_OUT", "_TIMED_OUT_QUEUE"}


# -- callbacks and event loops


def test_a_callback_may_use_and_close_the_producer(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    producer = make_producer(kafka_cluster)
    answers: list[object] = []

    def second(report: kbatch.DeliveryReport) -> None:
        answers.append(("second", report.acked))
        answers.append(("left", producer.close()))

    def first(report: kbatch.DeliveryReport) -> None:
        answers.append(("first", report.acked))
        answers.append(("inside", producer.send_batch("orders", envelopes(3)).acked))
        producer.submit("orders", envelopes(4), callback=second)

    producer.submit("orders", envelopes(5), callback=first)
    until(lambda: len(answers) == 4, "the last answer")
    assert answers == [("first", 5), ("inside", 3), ("second", 4), ("left", 0)]
    producer.close()


def test_a_callback_that_raises_is_logged_and_costs_nothing(
    kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    answers: list[int] = []

    def broken(report: kbatch.DeliveryReport) -> None:
        raise RuntimeError("from the callback")

    with make_producer(kafka_cluster) as producer:
        producer.submit("orders", envelopes(5), callback=broken)
        producer.submit("orders", envelopes(6), callback=lambda report: answers.append(report.acked))
    assert answers == [6]
    assert "from the callback" in caplog.text


def test_a_slow_callback_delays_neither_waiters_nor_loops(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    release = threading.Event()
    order: list[str] = []

    def slow(report: kbatch.DeliveryReport) -> None:
        release.wait(30)
        order.append("slow")

    with make_producer(kafka_cluster) as producer:
        producer.submit("orders", envelopes(5), callback=slow)

        async def on_a_loop() -> int:
            return (await producer.submit("orders", envelopes(7))).acked

        assert asyncio.run(on_a_loop()) == 7
        assert producer.send_batch("orders", envelopes(8)).acked == 8
        order.append("others")
        release.set()
    assert order == ["others", "slow"]


def test_every_callback_runs_once(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    calls: Counter[int] = Counter()
    with make_producer(kafka_cluster) as producer:
        for number in range(200):
            pending = producer.submit("orders", envelopes(3), callback=lambda report, n=number: calls.update([n]))
            if number % 3 == 0:
                pending.wait()
                pending.add_done_callback(lambda done, n=1_000 + number: calls.update([n]))
    assert set(calls.values()) == {1}
    assert len(calls) == 200 + 67


def test_several_loops_await_batches_of_one_producer(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    acked: list[int] = []
    with make_producer(kafka_cluster) as producer:

        async def main() -> None:
            pending = [producer.submit("orders", envelopes(20)) for _ in range(10)]
            reports = await asyncio.gather(*(_await(batch) for batch in pending))
            acked.append(sum(report.acked for report in reports))

        async def _await(batch: kbatch.PendingBatch) -> kbatch.DeliveryReport:
            return await batch

        loops = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(3)]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join()
    assert acked == [200, 200, 200]


def test_cancelling_an_await_ends_the_wait_only(dark_cluster: MockCluster) -> None:
    with make_producer(dark_cluster) as producer:
        pending = producer.submit("orders", envelopes(10))

        async def give_up() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(_await(), 0.1)

        async def _await() -> None:
            await pending

        asyncio.run(give_up())
        assert not pending.done()
        dark_cluster.set_broker_up(1)
        assert pending.wait().acked == 10


# -- close, purge, fatal


def test_who_uses_the_producer_from_within_its_start_is_refused(
    kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="reentrant use"):  # as a signal handler would send
            producer.send_batch("orders", envelopes(1))
        start(self)

    with make_producer(kafka_cluster) as producer:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        assert producer.send_batch("orders", envelopes(2)).ok
        assert producer.send_batch("orders", envelopes(3)).ok


def test_a_start_without_memory_leaves_nothing_behind(
    kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ["plugin.library.paths", "enable_sasl_queue"]

    class Poor(Config):
        def get(self, name: str) -> str | None:
            if name in missing:
                missing.remove(name)
                raise MemoryError
            return super().get(name)

    monkeypatch.setattr("kbatch._config.Config", Poor)
    with make_producer(kafka_cluster) as producer:
        for _ in range(2):
            with pytest.raises(MemoryError):
                producer.send_batch("orders", envelopes(1))
            assert producer._core.name() is None
        assert producer.send_batch("orders", envelopes(2)).ok
    assert producer.closed


def test_close_without_use_and_twice(kafka_cluster: MockCluster) -> None:
    producer = make_producer(kafka_cluster)
    assert producer.close() == 0
    assert producer.close() == 0
    assert producer.closed
    for call in (lambda: producer.send_batch("orders", envelopes(1)), producer.flush, producer.purge):
        with pytest.raises(kbatch.ProducerClosedError):
            call()


def test_close_gives_up_what_is_left_and_answers_for_it(dark_cluster: MockCluster) -> None:
    answers: list[kbatch.DeliveryReport] = []
    producer = make_producer(dark_cluster)
    pending = producer.submit("orders", envelopes(30), callback=answers.append)
    assert producer.close(timeout=0.2) == 30
    assert pending.done()
    assert [report.failed for report in answers] == [30]
    assert {error.name for error in pending.report.errors.values()} <= {"_PURGE_QUEUE", "_PURGE_INFLIGHT"}
    assert pinned_buffers() == 0


def test_leaving_a_with_block_says_what_was_lost(dark_cluster: MockCluster) -> None:
    with (
        later(15, lambda: dark_cluster.set_broker_up(1)),  # who waits longer loses nothing
        pytest.raises(kbatch.UndeliveredError) as caught,
        make_producer(dark_cluster, close_timeout_s=0.2) as producer,
    ):
        producer.submit("orders", envelopes(7))
    assert caught.value.count == 7


def test_leaving_a_with_block_waits_for_what_is_in_flight(dark_cluster: MockCluster) -> None:
    with later(0.2, lambda: dark_cluster.set_broker_up(1)), make_producer(dark_cluster) as producer:
        pending = producer.submit("orders", envelopes(7))
    assert pending.report.acked == 7


def test_an_exception_on_its_way_is_not_replaced(dark_cluster: MockCluster) -> None:
    def use() -> None:
        with make_producer(dark_cluster, close_timeout_s=0.2) as producer:
            producer.submit("orders", envelopes(7))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()


def test_close_ends_a_batch_that_is_being_enqueued(dark_cluster: MockCluster) -> None:
    reports: list[kbatch.DeliveryReport] = []
    producer = make_producer(dark_cluster, config={"queue.buffering.max.messages": 50})
    sender = threading.Thread(target=lambda: reports.append(producer.send_batch("orders", envelopes(200))))
    sender.start()
    until(lambda: producer.stats()["in_flight"] >= 32, "a full queue")
    left = producer.close(timeout=0.2)
    sender.join()
    assert left == 200
    assert reports[0].failed == 200


def test_close_from_several_threads_at_once(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    producer = make_producer(kafka_cluster)
    pending = producer.submit("orders", envelopes(1_000))
    left: list[int] = []
    closers = [threading.Thread(target=lambda: left.append(producer.close())) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    assert left == [0, 0, 0, 0]
    assert pending.report.acked == 1_000


def test_purge_settles_every_envelope(dark_cluster: MockCluster) -> None:
    with make_producer(dark_cluster) as producer:
        pending = producer.submit("orders", envelopes(30))
        producer.purge()
        report = pending.wait()
        assert report.failed == 30
        dark_cluster.set_broker_up(1)
        assert producer.send_batch("orders", envelopes(5)).acked == 5


def test_flush_counts_what_is_left(dark_cluster: MockCluster) -> None:
    with make_producer(dark_cluster) as producer:
        assert producer.flush() == 0
        pending = producer.submit("orders", envelopes(30))
        assert producer.flush(0.1) == 30
        dark_cluster.set_broker_up(1)
        assert producer.flush() == 0
        assert pending.report.acked == 30


def test_flush_does_not_wait_for_linger(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    with make_producer(kafka_cluster, config={"linger.ms": 250_000}) as producer:
        pending = producer.submit("orders", envelopes(10))
        assert producer.flush(60) == 0
        assert pending.report.acked == 10


def test_close_leaves_a_callback_behind_that_does_not_end(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    running, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def endless(report: kbatch.DeliveryReport) -> None:
        running.set()
        go_on.wait(60)
        ended.set()

    producer = make_producer(kafka_cluster)
    producer.submit("orders", envelopes(1), callback=endless)
    assert running.wait(30)
    assert producer.close(0.1) == 0
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(30)


def test_fatal_error_settles_what_is_in_flight_and_refuses_the_rest(dark_cluster: MockCluster) -> None:
    producer = make_producer(dark_cluster)
    pending = producer.submit("orders", envelopes(20))
    producer._core.inject_fatal_error(OUT_OF_ORDER_SEQUENCE, "made by the test")
    report = pending.wait()
    assert report.failed == 20
    with pytest.raises(kbatch.ProducerFatalError, match="made by the test") as caught:
        producer.send_batch("orders", envelopes(1))
    assert caught.value.code == OUT_OF_ORDER_SEQUENCE
    assert producer.close(timeout=5) == 0


def test_a_request_under_way_at_a_fatal_error_gets_its_answer(kafka_cluster: MockCluster) -> None:
    # Purged, it would be sent again by a new producer while the broker may still append it after that.
    kafka_cluster.create_topic("orders", partitions=1)
    with make_producer(kafka_cluster, config={"max.in.flight": 1}) as producer:
        producer.send_batch("orders", envelopes(1, "first")).raise_for_errors()
        kafka_cluster.set_rtt(1, 5000)
        kafka_cluster.start_request_tracking()
        pending = producer.submit("orders", envelopes(1))
        until(kafka_cluster.produce_requests, "the request")
        queued = producer.submit("orders", envelopes(1, "queued"))
        producer._core.inject_fatal_error(OUT_OF_ORDER_SEQUENCE, "made by the test")
        assert not queued.wait().errors[0].possibly_persisted
        assert pending.wait().acked == 1
    kafka_cluster.set_rtt(1, 0)
    assert [record.value for record in read(kafka_cluster.bootstrap_servers, "orders", 2)[0]] == [b"first0", b"m0"]


def test_a_request_without_an_answer_ends_with_the_socket_timeout_after_a_fatal_error(
    kafka_cluster: MockCluster,
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    with make_producer(kafka_cluster, config={"socket.timeout.ms": 2000}) as producer:
        producer.send_batch("orders", envelopes(1)).raise_for_errors()
        kafka_cluster.set_rtt(1, 60_000)
        kafka_cluster.start_request_tracking()
        pending = producer.submit("orders", envelopes(1))
        until(kafka_cluster.produce_requests, "the request")
        producer._core.inject_fatal_error(OUT_OF_ORDER_SEQUENCE, "made by the test")
        assert pending.wait(30).errors[0].possibly_persisted


@pytest.mark.long
def test_what_a_former_leader_answered_is_possibly_persisted(kafka_cluster: MockCluster) -> None:
    # A leader that has appended and is then deposed answers so as well; librdkafka says: not persisted.
    kafka_cluster.create_topic("orders", partitions=1)
    lost: list[Any] = []
    with make_producer(kafka_cluster, config={"delivery.timeout.ms": 4000, "error_cb": lost.append}) as producer:
        until(lambda: producer.send_batch("orders", envelopes(1)).ok, "the broker")
        kafka_cluster.push_request_errors(0, ["NOT_LEADER_FOR_PARTITION"] * 1000)
        error = producer.send_batch("orders", envelopes(1)).errors[0]
        assert (error.name, error.possibly_persisted) == ("_MSG_TIMED_OUT", True)
        kafka_cluster.clear_request_errors(0)
        kafka_cluster.set_broker_down(1)
        until(lambda: lost, "the client to notice")  # what it still sends may be stored, as far as anybody knows
        assert not producer.send_batch("orders", envelopes(1)).errors[0].possibly_persisted


def test_a_forgotten_producer_ends_its_threads(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)

    def native_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = native_threads()
    producer = make_producer(kafka_cluster)
    producer.send_batch("orders", envelopes(10)).raise_for_errors()
    assert native_threads() > before
    gone = weakref.ref(producer)
    del producer
    gc.collect()
    assert gone() is None
    until(lambda: native_threads() <= before, "the end of the threads")


def test_a_pending_batch_outlives_its_producer(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(1, 100)
    pending = make_producer(kafka_cluster).submit("orders", envelopes(10))
    gc.collect()
    assert pending.wait().acked == 10


def test_a_closer_in_a_hurry_takes_no_answer_away(dark_cluster: MockCluster) -> None:
    answers: list[int] = []
    left: list[int] = []
    producer = make_producer(dark_cluster)
    producer.submit("orders", envelopes(5), callback=lambda report: answers.append(report.failed))
    patient = threading.Thread(target=lambda: left.append(producer.close(timeout=1)))
    patient.start()
    until(lambda: producer.closed, "the first close")
    assert producer.close(timeout=0) == 5
    patient.join()
    assert (left, answers) == ([5], [5])


def test_close_stops_an_enqueuer_that_is_in_full_swing(dark_cluster: MockCluster) -> None:
    producer = make_producer(dark_cluster, max_in_flight=1_000_000)
    reports: list[kbatch.DeliveryReport] = []
    batch = envelopes(50_000)
    sender = threading.Thread(target=lambda: reports.append(producer.send_batch("orders", batch)))
    sender.start()
    until(lambda: len(producer), "the first message")
    left = producer.close(timeout=0)
    sender.join()
    assert reports[0].failed == left == 50_000


def test_close_and_first_use_at_once(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    for _ in range(20):
        producer = make_producer(kafka_cluster)
        used = threading.Thread(target=_use_ignoring_close, args=(producer,))
        used.start()
        producer.close()
        with pytest.raises(kbatch.ProducerClosedError):
            producer.send_batch("orders", envelopes(1))
        used.join()


def _use_ignoring_close(producer: kbatch.Producer) -> None:
    with contextlib.suppress(kbatch.ProducerClosedError):
        producer.submit("orders", envelopes(1), callback=lambda report: None)


def test_a_fatal_error_frees_a_thread_that_waits(dark_cluster: MockCluster) -> None:
    producer = make_producer(dark_cluster)
    reports: list[kbatch.DeliveryReport] = []
    waiter = threading.Thread(target=lambda: reports.append(producer.send_batch("orders", envelopes(5))))
    waiter.start()
    until(lambda: len(producer) == 5, "messages in flight")
    producer._core.inject_fatal_error(OUT_OF_ORDER_SEQUENCE, "made by the test")
    waiter.join(30)
    assert [report.failed for report in reports] == [5]
    producer.close(timeout=5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_no_exception_of_a_callback_ends_the_callbacks(kafka_cluster: MockCluster, error: type[BaseException]) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    answers: list[int] = []

    def broken(report: kbatch.DeliveryReport) -> None:
        raise error

    with make_producer(kafka_cluster) as producer:
        producer.submit("orders", envelopes(1), callback=broken).wait()
        producer.submit("orders", envelopes(2), callback=lambda report: answers.append(report.acked))
    assert answers == [2]


def test_statistics_keep_coming_while_batches_are_sent(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    seen: list[str] = []
    config = {"statistics.interval.ms": 20, "stats_cb": seen.append}
    with make_producer(kafka_cluster, config=config) as producer:
        for _ in range(1_500):
            producer.send_batch("orders", envelopes(1)).raise_for_errors()
        seen.clear()
        until(lambda: len(seen) >= 3, "statistics after the batches")


def test_a_batch_that_nobody_waits_for_is_given_back(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    for config in ({}, {"error_cb": print}):
        with make_producer(kafka_cluster, config=config) as producer:
            producer.submit("orders", envelopes(10))
            until(lambda: pinned_buffers() == 0, "the buffers of a finished batch")


def test_a_loss_is_told_by_the_close_and_not_again_by_the_block_around_it(dark_cluster: MockCluster) -> None:
    producer = make_producer(dark_cluster)
    producer.submit("orders", envelopes(3))
    with pytest.raises(kbatch.UndeliveredError, match=r"^3 messages were not acknowledged; the first: ") as caught:
        producer.close(0)
    assert caught.value.count == len(caught.value.failures) == 3
    assert producer.close() == 3  # told already
    producer.__exit__(None, None, None)


OAUTH = {"security.protocol": "sasl_plaintext", "sasl.mechanisms": "OAUTHBEARER"}


def test_a_token_that_comes_while_closing_is_taken(dark_cluster: MockCluster, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    def token(config: str) -> tuple[str, float]:
        asked.append(config)
        until(lambda: producer.closed, "the close")
        return "token", time.time() + 3600

    producer = make_producer(dark_cluster, config={**OAUTH, "oauth_cb": token})
    producer.submit("orders", envelopes(3), callback=lambda report: None)
    until(lambda: asked, "the request for a token")
    assert producer.close(timeout=1) == 3
    assert asked
    assert not caplog.records


def test_a_token_that_is_no_text_does_not_keep_librdkafka_alive(dark_cluster: MockCluster) -> None:
    before = len(os.listdir("/proc/self/task"))
    producer = make_producer(dark_cluster, config={**OAUTH, "oauth_cb": lambda config: ("token", time.time() + 3600)})
    producer.submit("orders", envelopes(1), callback=lambda report: None)
    for broken in (None, "\ud800"):
        with pytest.raises((TypeError, ValueError)):
            set_oauth_token(producer._core, (broken, 0.0))
    producer.close(timeout=0.1)
    until(lambda: len(os.listdir("/proc/self/task")) <= before, "the end of librdkafka's threads")


# -- who was accepted counts


def submit_in_thread(producer: kbatch.Producer, count: int) -> tuple[threading.Thread, list[kbatch.PendingBatch]]:
    pending: list[kbatch.PendingBatch] = []
    thread = threading.Thread(target=lambda: pending.append(producer.submit("orders", envelopes(count))))
    thread.start()
    return thread, pending


@pytest.mark.parametrize("end", ["flush", "close"])
def test_what_stands_in_line_is_counted_and_waited_for(dark_cluster: MockCluster, end: str) -> None:
    with make_producer(dark_cluster, max_in_flight=10) as producer:
        thread, pending = submit_in_thread(producer, 30)
        until(lambda: producer.stats()["in_flight"] == 10, "all room taken")
        assert len(producer) == 30
        assert producer.flush(0.05) == 30
        left: list[int] = []
        ending = threading.Thread(target=lambda: left.append(getattr(producer, end)(30)))
        ending.start()
        until(lambda: end == "flush" or producer.closed, "the beginning of the end")
        dark_cluster.set_broker_up(1)
        ending.join()
        thread.join()
        assert left == [0]
        assert pending[0].done()
        assert pending[0].report.acked == 30
    (records,) = read(dark_cluster.bootstrap_servers, "orders", 30).values()
    assert [record.value for record in records] == [b"m%d" % i for i in range(30)]
