"""InlineSender, blocking and for asyncio: one envelope, one answer; many at once share requests."""

import asyncio
import contextlib
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, aio
from kbatch.testing import ApiKey, MemoryProducer, MockCluster
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..naming import shown
from ..waiting import later, until
from .clients import Stored, end_offsets, read_back
from .processes import needs_fork, run

TOPIC = "orders"
PATIENCE_S = 60.0
ENQUEUED_BY_THEN_S = 0.5  # on a busy machine, too: what is not enqueued in time is given up


class Blocking:
    """The blocking classes."""

    Producer: Any = kbatch.Producer
    InlineSender: Any = kbatch.InlineSender

    def do(self, answer: Any) -> Any:
        return answer

    def enter(self, sender: Any) -> Any:
        return sender.__enter__()

    def leave(self, sender: Any, error: BaseException | None = None) -> None:
        sender.__exit__(None, error, None)

    def in_background(self, call: Callable[[], Any]) -> "Future[Any]":
        executor = ThreadPoolExecutor(1)
        future = executor.submit(call)
        executor.shutdown(wait=False)
        return future


class OnALoop:
    """Those for asyncio, on a loop that runs in a thread, so that they can be called in the same way."""

    Producer: Any = aio.Producer
    InlineSender: Any = aio.InlineSender

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def do(self, answer: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(answer, self.loop).result(PATIENCE_S)

    def enter(self, sender: Any) -> Any:
        return self.do(sender.__aenter__())

    def leave(self, sender: Any, error: BaseException | None = None) -> None:
        self.do(sender.__aexit__(None, error, None))

    def in_background(self, call: Callable[[], Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(call(), self.loop)


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "blocking":
        yield Blocking()
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield OnALoop(loop)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


@pytest.fixture
def producer(kind: Any, cluster: MockCluster) -> Iterator[Any]:
    producer = make_producer(kind, cluster)
    yield producer
    kind.do(producer.close())


def make_producer(kind: Any, cluster: MockCluster, **config: Any) -> Any:
    return kind.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, **config})


def values(cluster: MockCluster) -> list[bytes | None]:
    return [record.value for record in read_back(cluster.bootstrap_servers, TOPIC)]


# -- one envelope, one answer


def test_the_answer_is_that_envelopes(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    for offset in range(3):
        report = kind.do(sender.send(Envelope(offset)))
        assert isinstance(report, kbatch.DeliveryReport)
        assert (len(report), report.acked, report.partitions, report.offsets) == (1, 1, (0,), (offset,))
    assert values(cluster) == [b"0", b"1", b"2"]


def test_what_is_sent_is_what_a_batch_of_one_sends(kind: Any, cluster: MockCluster, producer: Any) -> None:
    envelope = Envelope(
        {"a": [1, None]},
        key="k",
        headers={"x": "1", "y": None},
        correlation_id="c",
        tenant_id="t",
        attempts=2,
        sent_at=datetime(2026, 11, 23, tzinfo=timezone.utc),
        timestamp=1_700_000_000_000,
    )
    sender = kind.InlineSender(producer, TOPIC)
    kind.do(sender.send(envelope))
    kind.do(producer.send_batch(TOPIC, [envelope]))
    kind.do(sender.send(kbatch.Tombstone("k")))
    one, other, tombstone = read_back(cluster.bootstrap_servers, TOPIC)
    assert one._replace(offset=1) == other
    assert isinstance(one, Stored)
    assert one.value == b'{"a":[1,null]}'
    assert dict(one.headers)["correlation-id"] == b"c"
    assert (tombstone.key, tombstone.value) == (b"k", None)


def test_an_envelopes_topic_wins(kind: Any, cluster: MockCluster, producer: Any) -> None:
    cluster.create_topic("others", partitions=1)
    kind.do(kind.InlineSender(producer, TOPIC).send(Envelope(1, topic="others")))
    kind.do(kind.InlineSender(producer, None).send(Envelope(2, topic="others")))
    assert [record.value for record in read_back(cluster.bootstrap_servers, "others")] == [b"1", b"2"]
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}
    with pytest.raises(kbatch.SerializationError, match="topic"):
        kind.do(kind.InlineSender(producer, None).send(Envelope(3)))


def test_what_has_expired_is_not_sent_and_no_failure(kind: Any, cluster: MockCluster, producer: Any) -> None:
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    report = kind.do(kind.InlineSender(producer, TOPIC).send(Envelope(1, deliver_by=past)))
    assert (report.ok, report.acked, report.expired_indices) == (True, 0, (0,))
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


@pytest.mark.parametrize("bad", [Envelope(object()), Envelope(1, key=7), None, [Envelope(1)], "text"], ids=shown)
def test_what_cannot_be_mapped(kind: Any, cluster: MockCluster, producer: Any, bad: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    with pytest.raises(kbatch.SerializationError):
        kind.do(sender.send(bad))
    kind.do(sender.send(Envelope(1)))
    assert values(cluster) == [b"1"]


def test_what_was_not_acknowledged_raises_why(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    with pytest.raises(kbatch.DeliveryError) as caught:
        kind.do(sender.send(Envelope(1, partition=7)))
    assert caught.value.name == "_UNKNOWN_PARTITION"
    assert caught.value.report is not None
    assert caught.value.report.failed == 1
    assert not caught.value.possibly_persisted
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy, str(copy), copy.report.failed) == (caught.value, str(caught.value), 1)
    kind.do(sender.send(Envelope(2)))
    assert values(cluster) == [b"2"]


def test_what_is_refused_is_sent_twice_at_most(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    kind.do(sender.send(Envelope(1)))
    cluster.push_request_errors(ApiKey.PRODUCE, ["INVALID_RECORD"] * 9)
    cluster.start_request_tracking()
    with pytest.raises(kbatch.DeliveryError, match="INVALID_RECORD"):
        kind.do(sender.send(Envelope(2)))
    assert cluster.produce_requests() == 2  # the second one alone
    cluster.clear_request_errors(ApiKey.PRODUCE)
    kind.do(sender.close())


def test_who_waits_for_a_successor_waits_no_longer_in_all(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float] = []
    memory: Any = AioMemoryProducer if kind.Producer is aio.Producer else MemoryProducer
    send_batch = memory.send_batch

    def sending(self: Any, topic: Any, envelopes: Any, *, timeout: float) -> Any:
        timeouts.append(timeout)
        return send_batch(self, topic, envelopes, timeout=timeout)

    monkeypatch.setattr(memory, "send_batch", sending)
    producer = memory()
    sender = kind.InlineSender(producer, TOPIC)
    producer.fatal()
    assert kind.do(sender.send(Envelope(1), timeout=PATIENCE_S)).ok
    assert timeouts[0] == PATIENCE_S > timeouts[1] > 0
    kind.do(sender.close())


def test_a_broker_that_is_away(kind: Any, cluster: MockCluster) -> None:
    quick = {"message.timeout.ms": 1_500, "reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 100}
    producer = make_producer(kind, cluster, **quick)
    sender = kind.InlineSender(producer, TOPIC)
    kind.do(sender.send(Envelope(0)))
    cluster.set_broker_down(1)
    with pytest.raises(kbatch.DeliveryError) as caught:
        kind.do(sender.send(Envelope(1)))
    assert caught.value.name == "_MSG_TIMED_OUT"
    assert caught.value.retriable
    cluster.set_broker_up(1)

    def gets_through() -> bool:
        try:
            kind.do(sender.send(Envelope(2)))
        except kbatch.DeliveryError as error:  # it may take longer to connect again
            if error.name != "_MSG_TIMED_OUT":
                raise
            return False
        return True

    until(gets_through, "the broker's return")
    kind.do(producer.close())
    assert [*dict.fromkeys(values(cluster))] == [b"0", b"2"]


def test_a_timeout_ends_the_wait_and_not_the_envelope(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    kind.do(sender.send(Envelope(0)))
    cluster.set_broker_down(1)
    with pytest.raises(kbatch.BatchPendingError) as caught:
        kind.do(sender.send(Envelope(1), timeout=0.2))
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.pending is not None
    cluster.set_broker_up(1)
    assert caught.value.pending.wait(PATIENCE_S).acked == 1
    assert values(cluster) == [b"0", b"1"]


def test_with_a_transactional_id_each_is_a_transaction(kind: Any, cluster: MockCluster) -> None:
    producer = make_producer(kind, cluster, **{"transactional.id": "shop"})
    sender = kind.InlineSender(producer, TOPIC)
    assert kind.do(sender.send(Envelope(1))).acked == 1
    assert kind.do(sender.send(Envelope(2))).acked == 1
    kind.do(producer.close())


# -- many at once


def test_what_other_threads_send_has_its_answer_when_it_is_closed(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    sender = kbatch.KafkaTopic(TOPIC, kbatch.SenderMode.INLINE, config=config).create_sender()
    assert sender.send(Envelope(0)).ok
    cluster.set_rtt(1, 300)
    reports: list[kbatch.DeliveryReport] = []
    thread = threading.Thread(target=lambda: reports.append(sender.send(Envelope(1))))
    thread.start()
    until(lambda: sender._handle.producer.stats()["in_flight"], "the envelope in flight")
    assert sender.close(30) == 0
    thread.join(30)
    assert reports[0].ok


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="platform: no interval timers")
def test_ctrl_c_ends_the_wait_and_not_the_envelope(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    with kbatch.Producer(config) as producer, kbatch.InlineSender(producer, TOPIC) as sender:
        assert sender.send(Envelope(0)).ok
        cluster.set_rtt(1, 2_000)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                sender.send(Envelope(1))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        cluster.set_rtt(1, 0)
    assert [record.value for record in read_back(cluster.bootstrap_servers, TOPIC)] == [b"0", b"1"]


def test_threads_share_requests(cluster: MockCluster) -> None:
    threads, each = 50, 10
    cluster.set_rtt(1, 10)
    failures: list[BaseException] = []
    with make_producer(Blocking(), cluster) as producer:
        sender = kbatch.InlineSender(producer, TOPIC)
        sender.send(Envelope("first"))
        cluster.start_request_tracking()

        def work(number: int) -> None:
            try:
                for i in range(each):
                    assert sender.send(Envelope([number, i])).acked == 1
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    requests = cluster.produce_requests()
    assert not failures
    assert_each_once_and_in_order(cluster, threads, each)
    assert requests < threads * each / 3


def test_tasks_share_requests(cluster: MockCluster) -> None:
    tasks, each = 50, 10
    cluster.set_rtt(1, 10)

    async def work(sender: aio.InlineSender, number: int) -> None:
        for i in range(each):
            assert (await sender.send(Envelope([number, i]))).acked == 1

    async def main() -> int:
        async with make_producer(OnALoop(asyncio.get_running_loop()), cluster) as producer:
            sender = aio.InlineSender(producer, TOPIC)
            await sender.send(Envelope("first"))
            cluster.start_request_tracking()
            await asyncio.gather(*(work(sender, number) for number in range(tasks)))
            return cluster.produce_requests()

    requests = asyncio.run(main())
    assert_each_once_and_in_order(cluster, tasks, each)
    assert requests < tasks * each / 3


def test_loops_share_a_sender(cluster: MockCluster) -> None:
    loops, each = 4, 25
    producer = aio.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
    sender = aio.InlineSender(producer, TOPIC)

    async def work(number: int) -> int:
        return sum([(await sender.send(Envelope([number, i]))).acked for i in range(each)])

    asyncio.run(producer.send_batch(TOPIC, [Envelope("first")]))
    with ThreadPoolExecutor(loops) as threads:
        assert list(threads.map(lambda number: asyncio.run(work(number)), range(loops))) == [each] * loops
    asyncio.run(producer.close())
    assert_each_once_and_in_order(cluster, loops, each)


def assert_each_once_and_in_order(cluster: MockCluster, senders: int, each: int) -> None:
    found = values(cluster)[1:]
    expected = [f"[{number},{i}]".encode() for number in range(senders) for i in range(each)]
    assert sorted(found, key=str) == sorted(expected, key=str)
    for number in range(senders):
        mine = [value for value in found if value and value.startswith(f"[{number},".encode())]
        assert mine == [f"[{number},{i}]".encode() for i in range(each)]


def test_a_cancelled_send_is_sent_once_or_not_at_all(cluster: MockCluster) -> None:
    cluster.set_rtt(1, 5)

    async def main() -> list[int]:
        finished = []

        async def send(sender: aio.InlineSender, number: int) -> None:
            await sender.send(Envelope(number))
            finished.append(number)

        producer = make_producer(OnALoop(asyncio.get_running_loop()), cluster)
        sender = aio.InlineSender(producer, TOPIC)
        for number in range(60):
            task = asyncio.create_task(send(sender, number))
            for _ in range(number % 12):
                await asyncio.sleep(0 if number % 2 else 0.001)
            task.cancel()
            await asyncio.wait([task])
        for end in (producer.flush, producer.close):
            with contextlib.suppress(kbatch.UndeliveredError):  # a task that was cancelled cannot tell
                assert await end() == 0
        return finished

    finished = asyncio.run(main())
    counts = Counter(values(cluster))
    assert set(counts.values()) <= {1}
    assert {str(number).encode() for number in finished} <= set(counts)


# -- a producer that cannot go on


def make_fatal(producer: Any, code: int = 45) -> None:
    producer._core.inject_fatal_error(code, "made up")


def test_a_dead_producer_is_replaced_for_all_its_senders(kind: Any, cluster: MockCluster, producer: Any) -> None:
    one, other = kind.InlineSender(producer, TOPIC), kind.InlineSender(producer, TOPIC)
    kind.do(one.send(Envelope(0)))
    make_fatal(producer)
    kind.do(one.send(Envelope(1)))
    kind.do(other.send(Envelope(2)))
    twin = one._handle.producer
    assert other._handle.producer is twin is not producer
    make_fatal(twin)  # kbatch's own: it is closed, and who still has it tries again
    kind.do(other.send(Envelope(3)))
    assert twin.closed
    kind.do(one.send(Envelope(4)))
    successor = other._handle.producer
    assert kind.do(one.close()) == 0
    kind.do(other.send(Envelope(5)))
    assert kind.do(other.close()) == 0
    assert successor.closed
    assert not producer.closed
    assert values(cluster) == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_a_fenced_producer_is_not_replaced(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    make_fatal(producer, 90)
    with pytest.raises(kbatch.ProducerFencedError):
        kind.do(sender.send(Envelope(1)))
    assert sender._handle.producer is producer


def test_threads_go_on_over_the_death_of_their_producer(cluster: MockCluster) -> None:
    stop = threading.Event()
    sent: list[int] = []
    failures: list[BaseException] = []
    with make_producer(Blocking(), cluster) as producer:
        sender = kbatch.InlineSender(producer, TOPIC)

        def work(number: int) -> None:
            count = 0
            try:
                while not stop.is_set():
                    # What is in flight of a dead producer may fail; what was refused must not.
                    try:
                        sender.send(Envelope([number, count]))
                        sent.append(number)
                    except kbatch.DeliveryError:
                        pass
                    count += 1
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for _ in range(5):
            before = len(sent)
            until(lambda before=before: len(sent) > before + 20 or failures, "progress")  # type: ignore[misc]
            dead = sender._handle.producer
            make_fatal(dead)
            until(lambda dead=dead: sender._handle.producer is not dead or failures, "its successor")  # type: ignore[misc]
        stop.set()
        for worker in workers:
            worker.join()
        sender.close()
    assert not failures
    stored = values(cluster)
    assert len(stored) >= len(sent)
    assert len(set(stored)) == len(stored)


# -- closing


def test_a_closed_one_refuses_and_the_callers_producer_goes_on(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    kind.do(sender.send(Envelope(0)))
    assert not sender.closed
    assert kind.do(sender.close()) == 0
    assert kind.do(sender.close(0)) == 0
    assert sender.closed
    with pytest.raises(kbatch.SenderClosedError):
        kind.do(sender.send(Envelope(1)))
    with pytest.raises(ValueError, match="timeout"):
        kind.do(sender.close(-1))
    assert not producer.closed
    kind.do(producer.send_batch(TOPIC, [Envelope(2)]))
    assert values(cluster) == [b"0", b"2"]


def test_leaving_a_with_block_closes(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    assert kind.enter(sender) is sender
    kind.do(sender.send(Envelope(0)))
    kind.leave(sender)
    assert sender.closed
    assert not producer.closed


def test_a_closed_producer(kind: Any, cluster: MockCluster) -> None:
    producer = make_producer(kind, cluster)
    sender = kind.InlineSender(producer, TOPIC)
    kind.do(producer.close())
    with pytest.raises(kbatch.ProducerClosedError):
        kind.do(sender.send(Envelope(1)))
    assert kind.do(sender.close()) == 0


def test_what_a_successor_had_in_flight_is_told(kind: Any, cluster: MockCluster, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC, close_timeout_s=0.0)
    make_fatal(producer)
    kind.do(sender.send(Envelope(0)))
    cluster.set_broker_down(1)
    waiting = kind.in_background(lambda: sender.send(Envelope(1)))
    until(lambda: len(sender._handle.producer) == 1, "the envelope")
    kind.leave(sender)
    with pytest.raises(kbatch.DeliveryError, match=r"PURGE"):
        waiting.result(PATIENCE_S)


def test_what_a_send_had_no_time_to_tell_is_told_by_the_end(kind: Any, cluster: MockCluster) -> None:
    topics: Any = kbatch.KafkaTopic if isinstance(kind, Blocking) else aio.KafkaTopic
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
    topic = topics(TOPIC, mode=kbatch.SenderMode.INLINE, config=config, close_timeout_s=0.0)
    cluster.set_broker_down(1)
    sender = topic.create_sender()
    with pytest.raises(kbatch.BatchPendingError):
        kind.do(sender.send(Envelope(0), timeout=ENQUEUED_BY_THEN_S))
    with pytest.raises(kbatch.UndeliveredError) as caught:
        kind.leave(sender)
    assert [envelope.message for envelope, _ in caught.value.failures] == [0]
    assert kind.do(sender.close()) == 0


@pytest.mark.parametrize(("close_timeout_s", "back_after_s"), [(0.05, 15), (60, 0.2)])
def test_leaving_the_block_waits_for_its_close_timeout(
    kind: Any, cluster: MockCluster, close_timeout_s: float, back_after_s: float
) -> None:
    topics: Any = kbatch.KafkaTopic if isinstance(kind, Blocking) else aio.KafkaTopic
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "reconnect.backoff.max.ms": 100}
    topic = topics(TOPIC, mode=kbatch.SenderMode.INLINE, config=config, close_timeout_s=close_timeout_s)
    cluster.set_broker_down(1)
    sender = kind.enter(topic.create_sender())
    with pytest.raises(kbatch.BatchPendingError):
        kind.do(sender.send(Envelope(0), timeout=ENQUEUED_BY_THEN_S))
    is_longer = close_timeout_s > back_after_s
    told = contextlib.nullcontext() if is_longer else pytest.raises(kbatch.UndeliveredError)
    with later(back_after_s, cluster.set_broker_up), told:  # who waits longer has it sent
        kind.leave(sender)
    cluster.set_broker_up(1)
    assert values(cluster) == ([b"0"] if is_longer else [])


def test_leaving_the_block_does_not_wait_for_a_producer_that_stays_open(kind: Any, cluster: MockCluster) -> None:
    producer = make_producer(kind, cluster)
    cluster.set_broker_down(1)
    sender = kind.enter(kind.InlineSender(producer, TOPIC, close_timeout_s=1e6))
    with pytest.raises(kbatch.BatchPendingError):
        kind.do(sender.send(Envelope(0), timeout=ENQUEUED_BY_THEN_S))
    kind.leave(sender)
    assert len(producer) == 1
    cluster.set_broker_up(1)
    assert kind.do(producer.close()) == 0
    assert values(cluster) == [b"0"]


@pytest.mark.parametrize("close_timeout_s", [-1, -0.5])
def test_a_time_is_not_negative(kind: Any, producer: Any, close_timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        kind.InlineSender(producer, TOPIC, close_timeout_s=close_timeout_s)


def test_a_sender_is_neither_pickled_nor_unclear(kind: Any, producer: Any) -> None:
    sender = kind.InlineSender(producer, TOPIC)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(sender)
    assert "InlineSender to 'orders' by <kbatch" in repr(sender)
    kind.do(sender.close())
    assert repr(sender).endswith("InlineSender to 'orders' closed>")


# -- forks


class TestForks:
    pytestmark = needs_fork

    @pytest.mark.parametrize("used", [False, True], ids=["not used", "used"])
    def test_in_a_forked_child(self, cluster: MockCluster, used: bool) -> None:
        code = f"""
            used = {used}
            sender = kbatch.InlineSender(kbatch.Producer(CONFIG), "orders")
            if used:
                sender.send(kbatch.Envelope("parent"))
            child = os.fork()
            if child == 0:
                try:
                    sender.send(kbatch.Envelope("child"))
                except kbatch.ForkError as error:
                    assert used and "post_fork" in str(error)
                else:
                    assert not used
                assert sender.close() == 0
                sys.stdout.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            sender.send(kbatch.Envelope("parent"))
            sender.close()
            print("done")
            """
        result = run(cluster, code)
        assert result.stdout.strip() == "done", result.stderr
        assert values(cluster) == ([b'"parent"'] * 2 if used else [b'"child"', b'"parent"'])
