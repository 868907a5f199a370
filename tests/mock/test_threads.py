"""Threads that share a producer: each envelope once, each thread's order kept, one outcome per envelope."""

import asyncio
import contextlib
import itertools
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import kbatch
from kbatch._fastmap import pinned_buffers
from kbatch.testing import MockCluster

from ..waiting import until
from .clients import Stored, read, read_back, read_back_with_aiokafka


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


def test_batches_of_two_threads_that_take_turns_keep_their_order(kafka_cluster: MockCluster) -> None:
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
    values = [record.value or b"" for record in records]
    for name in "ab":
        sent = [f"{name}{turn}-{i}".encode() for turn in range(rounds) for i in range(size)]
        assert [value for value in values if value.startswith(name.encode())] == sent


def test_other_threads_run_while_a_batch_is_handed_over() -> None:
    count = 300_000
    config = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0, "queue.buffering.max.messages": 1_000_000}
    producer = kbatch.Producer(config, max_in_flight=1_000_000, wire="raw")
    producer.submit("orders", [])  # it starts
    batch = [kbatch.Envelope(data=b"x")] * count
    seen: list[int] = []
    sender = threading.Thread(target=lambda: producer.submit("orders", batch, callback=lambda report: None))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody gets the GIL but by its release
    try:
        sender.start()
        while not seen or seen[-1] < count:
            seen.append(producer.stats()["in_flight"])
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    sender.join()
    producer.close(0)
    # Without giving it up, or but for looking at signals in between, a few at most.
    assert sum(0 < in_flight < count for in_flight in seen) > 20


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


class Ledger:
    """What sixteen threads sent, and the one outcome that each envelope was given."""

    def __init__(self) -> None:
        self.sent: dict[str, list[str]] = {}  # of each key the ids, in the order of the calls
        self.outcomes: Counter[str] = Counter()
        self.acked: set[str] = set()
        self.maybe: set[str] = set()  # failed, but a broker may have written it
        self.refused: set[str] = set()
        self._lock = threading.Lock()

    def batch(self, key: str, count: int) -> list[kbatch.Envelope[Any]]:
        made = [kbatch.Envelope(data=b"x", key=key) for _ in range(count)]
        with self._lock:
            self.sent.setdefault(key, []).extend(str(envelope.id) for envelope in made)
        return made

    def settle(self, batch: list[kbatch.Envelope[Any]], report: kbatch.DeliveryReport) -> None:
        ids = [str(envelope.id) for envelope in batch]
        with self._lock:
            self.outcomes.update(ids)
            self.acked.update(id for i, id in enumerate(ids) if i not in report.errors)
            self.maybe.update(ids[i] for i, error in report.errors.items() if error.possibly_persisted)

    def refuse(self, batch: list[kbatch.Envelope[Any]]) -> None:
        with self._lock:
            self.refused.update(str(envelope.id) for envelope in batch)

    def check(self, records: list[Stored]) -> None:
        """One outcome for what was taken, none for what was refused; what is acknowledged is in the log once."""
        everything = {id for ids in self.sent.values() for id in ids}
        assert set(self.outcomes) == everything - self.refused
        assert set(self.outcomes.values()) <= {1}
        log: dict[str, list[str]] = {}
        for record in records:
            assert record.key is not None
            log.setdefault(record.key.decode(), []).append((dict(record.headers)["id"] or b"").decode())
        in_log = Counter(id for ids in log.values() for id in ids)
        assert set(in_log.values()) <= {1}
        assert self.acked <= set(in_log) <= self.acked | self.maybe
        for key, ids in log.items():
            assert ids == [id for id in self.sent[key] if id in in_log]


class _Recorder(kbatch.SenderCallback):
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def mark_successful(self, batch: kbatch.OutgoingBatch, report: kbatch.DeliveryReport) -> None:
        self.ledger.settle(list(batch.envelopes), report)

    def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: Any) -> None:
        if isinstance(error, kbatch.ProducerClosedError):
            self.ledger.refuse(list(batch.envelopes))
        else:
            self.ledger.settle(list(batch.envelopes), error.report)


def send_one(producer: kbatch.Producer, ledger: Ledger, how: str, batch: list[kbatch.Envelope[Any]]) -> Any:
    """Sends a batch in one of the ways there are; returns what is still to be waited for."""
    if how == "send_batch":
        ledger.settle(batch, producer.send_batch("orders", batch))
    elif how == "submit":
        pending = producer.submit("orders", batch)
        return lambda: ledger.settle(batch, pending.wait())
    elif how == "callback":
        producer.submit("orders", batch, callback=lambda report: ledger.settle(batch, report))
    elif how == "done_callback":
        producer.submit("orders", batch).add_done_callback(lambda done: ledger.settle(batch, done.report))
    elif how == "await":

        async def main() -> None:
            ledger.settle(batch, await producer.submit("orders", batch))

        asyncio.run(main())
    elif how == "sender":
        kbatch.KafkaSender(producer, "orders").send_batch(_Recorder(ledger), kbatch.OutgoingBatch(batch))
    return None


WAYS = ["send_batch", "submit", "callback", "done_callback", "await", "sender"]


def in_threads(work: list[Callable[[], object]]) -> None:
    """Runs each on a thread of its own, all at once; fails with what one of them raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(one: Callable[[], object]) -> None:
        try:
            start.wait()
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert failures == []


def test_sixteen_threads_send_in_every_way(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    ledger = Ledger()
    rounds, size = 18, 40
    config = {"queue.buffering.max.messages": 1_000}
    with make_producer(kafka_cluster, max_in_flight=1_500, config=config) as producer:

        def work(number: int) -> None:
            later = []
            for turn in range(rounds):
                how = WAYS[(number + turn) % len(WAYS)]
                left = send_one(producer, ledger, how, ledger.batch(f"key-{number}", size))
                later += [left] if left is not None else []
                if turn % 5 == number % 5:
                    assert producer.flush() >= 0
                assert len(producer) >= 0
            for wait in later:
                wait()

        in_threads([lambda number=number: work(number) for number in range(16)])
    total = 16 * rounds * size
    stats = producer.stats()
    assert (stats["acked"], stats["failed"], stats["envelopes"]) == (total, 0, total)
    assert (stats["batches"], stats["in_flight"], stats["pinned_buffers"]) == (16 * rounds, 0, 0)
    assert len(ledger.acked) == total
    ledger.check(read_back_with_aiokafka(kafka_cluster.bootstrap_servers, "orders"))


def test_submit_wait_flush_and_close_from_different_threads(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=2)
    ledger = Ledger()
    producer = make_producer(kafka_cluster, max_in_flight=500)
    handed_over: queue.SimpleQueue[Any] = queue.SimpleQueue()
    submitted = threading.Event()
    left: list[int] = []

    def submit() -> None:
        for _ in range(100):
            batch = ledger.batch("key", 20)
            handed_over.put((batch, producer.submit("orders", batch)))
        handed_over.put(None)
        submitted.set()

    def wait() -> None:
        while (item := handed_over.get()) is not None:
            batch, pending = item
            ledger.settle(batch, pending.wait())

    def flush() -> None:
        with contextlib.suppress(kbatch.ProducerClosedError):
            while not submitted.is_set():
                producer.flush()

    def close() -> None:
        submitted.wait(30)
        left.append(producer.close())

    in_threads([submit, wait, flush, close])
    assert left == [0]
    assert len(ledger.acked) == 2_000
    ledger.check(read_back(kafka_cluster.bootstrap_servers, "orders"))


@pytest.mark.parametrize("closer", ["thread", "callback", "two threads"])
@pytest.mark.parametrize("timeout", [30, 0])
def test_close_while_the_others_send_wait_and_flush(kafka_cluster: MockCluster, closer: str, timeout: float) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    ledger = Ledger()
    producer = make_producer(kafka_cluster, max_in_flight=2_000)
    left: list[int] = []
    refusals: list[int] = []
    batches_before_close = 60

    def send(number: int) -> None:
        later = []
        for turn in itertools.count():
            batch = ledger.batch(f"key-{number}", 30)
            refused_before = len(ledger.refused)
            try:
                later.append(send_one(producer, ledger, WAYS[(number + turn) % len(WAYS)], batch))
            except kbatch.ProducerClosedError:
                if not any(str(envelope.id) in ledger.outcomes for envelope in batch):
                    ledger.refuse(batch)
            if len(ledger.refused) != refused_before and producer.closed:
                break
        refusals.append(number)
        for wait in later:
            if wait is not None:
                wait()

    def flush() -> None:
        with contextlib.suppress(kbatch.ProducerClosedError):
            while True:
                producer.flush()

    def close_now() -> None:
        patience: tuple[float, ...] = (timeout,)
        while True:
            try:
                left.append(producer.close(*patience))
                return
            except kbatch.UndeliveredError:  # nobody has waited yet for what was submitted
                patience = ()

    def close() -> None:
        until(lambda: len(ledger.acked) > batches_before_close * 30, "acknowledgements")
        if closer == "callback":
            producer.submit("orders", [], callback=lambda report: close_now())
            until(lambda: left, "the close")
        else:
            close_now()

    in_threads(
        [lambda number=number: send(number) for number in range(10)]
        + [flush, flush]
        + [close] * (2 if closer == "two threads" else 1)
    )
    with contextlib.suppress(kbatch.UndeliveredError):
        producer.close()
    assert sorted(refusals) == list(range(10))
    until(lambda: len(ledger.outcomes) + len(ledger.refused) == sum(map(len, ledger.sent.values())), "the last answer")
    ledger.check(read_back(kafka_cluster.bootstrap_servers, "orders"))
    lost = len(ledger.outcomes) - len(ledger.acked)
    assert lost in left  # what a second closer in a hurry counts, others may still be settling
    if timeout:
        assert set(left) == {lost}
        assert not ledger.maybe  # what was not enqueued yet is given up, the rest is waited for
    assert (len(producer), pinned_buffers()) == (0, 0)


def test_several_threads_flush_at_once(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_broker_down(1)
    left: list[int] = []
    with make_producer(kafka_cluster) as producer:
        pending = producer.submit("orders", envelopes(100))
        in_threads([lambda: left.append(producer.flush(0.05))] * 4)
        assert left == [100] * 4
        left.clear()

        def flush() -> None:
            left.append(producer.flush())
            assert pending.done()

        in_threads([flush] * 4 + [lambda: kafka_cluster.set_broker_up(1)])
        assert left == [0] * 4
        assert pending.report.acked == 100


# -- callbacks


def test_a_callback_may_call_whatever_there_is(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    answers: list[object] = []
    producer = make_producer(kafka_cluster)

    def callback(report: kbatch.DeliveryReport) -> None:
        assert threading.current_thread().name == "kbatch-callbacks"
        answers.append(producer.send_batch("orders", envelopes(3)).acked)
        answers.append(producer.submit("orders", envelopes(4)).wait().acked)
        producer.submit("orders", envelopes(5))
        answers.append(producer.flush())
        answers.append(len(producer))
        answers.append(producer.stats()["acked"])
        answers.append(asyncio.run(_await(producer.submit("orders", envelopes(6)))).acked)
        producer.purge()
        answers.append(producer.close())
        with pytest.raises(kbatch.ProducerClosedError):
            producer.submit("orders", envelopes(1))
        answers.append("end")

    producer.submit("orders", envelopes(2), callback=callback)
    until(lambda: "end" in answers, "the callback's end")
    assert answers == [3, 4, 0, 0, 2 + 3 + 4 + 5, 6, 0, "end"]
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 20


async def _await(pending: kbatch.PendingBatch) -> kbatch.DeliveryReport:
    return await pending


def test_a_sender_callback_may_flush_and_close(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    answers: list[object] = []
    producer = make_producer(kafka_cluster)

    class Closes(kbatch.SenderCallback):
        def mark_successful(self, batch: kbatch.OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            answers.extend([report.acked, producer.flush(), producer.close(), producer.closed])

        def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: Exception) -> None:
            answers.append(type(error))

    sender = kbatch.KafkaSender(producer, "orders")
    sender.send_batch(Closes(), kbatch.OutgoingBatch(envelopes(5)))
    sender.send_batch(Closes(), kbatch.OutgoingBatch(envelopes(5)))
    assert answers == [5, 0, 0, True, kbatch.ProducerClosedError]


def test_a_slow_callback_does_not_delay_draining(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    release = threading.Event()
    answers: list[int] = []

    def slow(report: kbatch.DeliveryReport) -> None:
        release.wait(60)
        answers.append(report.acked)

    with make_producer(kafka_cluster, config={"queue.buffering.max.messages": 100}) as producer:
        for count in range(1, 41):  # together many times the queue
            producer.submit(
                "orders", envelopes(count), callback=slow if count == 1 else lambda r: answers.append(r.acked)
            )
        assert producer.flush() == 0
        until(lambda: pinned_buffers() == 0, "the memory of what is acknowledged")
        assert answers == []
        release.set()
    assert answers[0] == 1
    assert sorted(answers) == list(range(1, 41))


def test_a_callback_has_its_thread_before_the_batch_is_done(
    kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    called: list[str] = []
    kafka_cluster.create_topic("orders", partitions=1)
    with make_producer(kafka_cluster, config={"linger.ms": 300}) as producer:
        pending = producer.submit("orders", envelopes(1))
        pending.add_done_callback(lambda _: called.append(threading.current_thread().name))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            until(lambda: called, "the callback")
    assert called == ["kbatch-callbacks"]


def test_callbacks_of_a_batch_run_in_the_order_in_which_they_were_added(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    calls: list[str] = []

    def first(done: kbatch.PendingBatch) -> None:
        calls.append("first")
        done.add_done_callback(lambda _: calls.append("added by the first"))

    interval = sys.getswitchinterval()
    with make_producer(kafka_cluster) as producer:
        pending = producer.submit("orders", envelopes(10))
        pending.add_done_callback(first)
        sys.setswitchinterval(60)  # nobody else gets the GIL: the batch is done, and its callbacks are not yet called
        try:
            while not pending.done():
                pass
            pending.add_done_callback(lambda _: calls.append("second"))
            pending.add_done_callback(lambda _: calls.append("third"))
        finally:
            sys.setswitchinterval(interval)
    assert calls == ["first", "second", "third", "added by the first"]


def test_callbacks_added_while_the_batch_completes_run_once_and_in_order(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    calls: list[tuple[int, int, int]] = []
    threads, rounds = 8, 60
    with make_producer(kafka_cluster) as producer:
        for turn in range(rounds):
            pending = producer.submit("orders", envelopes(3))

            def add(number: int, pending: kbatch.PendingBatch = pending, turn: int = turn) -> None:
                at = 0
                while not pending.done() or at < 5:
                    pending.add_done_callback(lambda _, call=(turn, number, at): calls.append(call))
                    at += 1
                    time.sleep(0.0002)

            in_threads([lambda number=number: add(number) for number in range(threads)])
    assert max(Counter(calls).values()) == 1
    for turn in range(rounds):
        for number in range(threads):
            mine = [at for of, by, at in calls if (of, by) == (turn, number)]
            assert mine == list(range(len(mine)))
            assert len(mine) >= 5


def test_a_callback_that_adds_itself_again(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    calls: list[int] = []

    def again(done: kbatch.PendingBatch) -> None:
        calls.append(len(done))
        if len(calls) < 500:
            done.add_done_callback(again)

    with make_producer(kafka_cluster) as producer:
        producer.submit("orders", envelopes(2)).add_done_callback(again)
        until(lambda: len(calls) == 500, "the last of them")
    assert calls == [2] * 500
