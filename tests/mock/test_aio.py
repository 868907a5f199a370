"""kbatch.aio: awaited answers, no thread per batch, several loops, cancellation anywhere, a loop that stays free."""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

import kbatch
from kbatch import Envelope, OutgoingBatch, aio
from kbatch._fastmap import LoopWaker
from kbatch.testing import ApiKey, MemoryProducer, MockCluster
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..waiting import until
from .clients import end_offsets, read_back

TOPIC = "orders"


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


def make_producer(cluster: MockCluster, *, close_timeout_s: float = 30.0, **options: Any) -> aio.Producer:
    config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "enable.idempotence": False}
    config |= options.pop("config", {})
    return aio.Producer(config, close_timeout_s=close_timeout_s, **options)


def envelopes(numbers: range) -> list[Envelope]:
    return [Envelope(i) for i in numbers]


def stored(cluster: MockCluster) -> list[int]:
    return [int(record.value or b"") for record in read_back(cluster.bootstrap_servers, TOPIC)]


@asynccontextmanager
async def away(cluster: MockCluster) -> AsyncIterator[None]:
    """The broker is not there meanwhile."""
    cluster.set_broker_down(1)
    try:
        yield
    finally:
        cluster.set_broker_up(1)


async def ticks_during(work: Coroutine[Any, Any, Any]) -> int:
    """How often another task ran until `work` was done."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.create_task(tick())
    try:
        await work
    finally:
        ticker.cancel()
    return ticks


class Recorder(aio.SenderCallback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("mark_"):
            return super().__getattribute__(name)

        async def record(batch: OutgoingBatch, answer: Any) -> None:
            await asyncio.sleep(0)
            self.calls.append((name, answer))

        return record


# -- sending


def test_a_batch_is_sent_and_its_report_awaited(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            report = await producer.send_batch(TOPIC, envelopes(range(100)))
            assert report.ok
            assert report.offsets == tuple(range(100))
            assert len(producer) == 0
        assert producer.closed

    asyncio.run(main())
    assert stored(cluster) == list(range(100))


def test_submitted_batches_are_answered_in_any_way(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            first = await producer.submit(TOPIC, envelopes(range(10)))
            second = await producer.submit(TOPIC, (e for e in envelopes(range(10, 20))))
            third = await producer.submit(TOPIC, iter(envelopes(range(20, 30))))
            report = await asyncio.wait_for(first, 30)
            assert await first is report  # again, and done
            assert [r.acked for r in await asyncio.gather(second, third)] == [10, 10]
            waited = await asyncio.to_thread(second.wait)  # a thread may wait for it, too
            assert waited.offsets == tuple(range(10, 20))

    asyncio.run(main())
    assert stored(cluster) == list(range(30))


def test_callbacks_run_on_the_loop_with_their_context(cluster: MockCluster, caplog: pytest.LogCaptureFixture) -> None:
    request = contextvars.ContextVar[str]("request")
    seen: list[tuple[Any, ...]] = []

    async def main() -> None:
        loop_thread = threading.current_thread()

        def plain(report: kbatch.DeliveryReport) -> None:
            seen.append(("plain", report.acked, request.get(), threading.current_thread() is loop_thread))

        async def coroutine(report: kbatch.DeliveryReport) -> None:
            await asyncio.sleep(0.01)
            seen.append(("coroutine", report.acked, request.get(), threading.current_thread() is loop_thread))

        async def failing(report: kbatch.DeliveryReport) -> None:
            raise ZeroDivisionError

        async with make_producer(cluster) as producer:
            request.set("one")
            await producer.submit(TOPIC, envelopes(range(5)), callback=coroutine)
            request.set("two")
            await producer.submit(TOPIC, envelopes(range(6)), callback=plain)
            await producer.submit(TOPIC, envelopes(range(7)), callback=failing)
        # Leaving the block waits for them.

    asyncio.run(main())
    assert sorted(seen) == [("coroutine", 5, "one", True), ("plain", 6, "two", True)]
    (record,) = caplog.records
    assert "a callback failed" in record.message
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_a_callback_may_send_and_close(cluster: MockCluster) -> None:
    async def main() -> None:
        producer = make_producer(cluster)
        closed = asyncio.Event()

        async def again(report: kbatch.DeliveryReport) -> None:
            assert (await producer.send_batch(TOPIC, envelopes(range(10, 20)))).acked == 10
            assert await producer.flush() == 0
            assert await producer.close() == 0
            closed.set()

        await producer.submit(TOPIC, envelopes(range(10)), callback=again)
        await asyncio.wait_for(closed.wait(), 30)

    asyncio.run(main())
    assert stored(cluster) == list(range(20))


def test_errors_are_those_of_the_blocking_producer(cluster: MockCluster) -> None:
    async def main() -> None:
        def never(report: kbatch.DeliveryReport) -> None:
            pytest.fail("called for a batch that was refused")

        async with make_producer(cluster) as producer:
            with pytest.raises(kbatch.SerializationError, match="envelope 2 "):
                await producer.submit(TOPIC, [*envelopes(range(2)), Envelope(object())], callback=never)
            with pytest.raises(TypeError, match="iterable of kbatch"):
                await producer.send_batch(TOPIC, Envelope(1))  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="not iterable"):
                await producer.send_batch(TOPIC, 5)  # type: ignore[arg-type]
        with pytest.raises(kbatch.ProducerClosedError):
            await producer.submit(TOPIC, envelopes(range(2)), callback=never)
        with pytest.raises(kbatch.ProducerClosedError):
            await producer.send_batch(TOPIC, [])
        unused = make_producer(cluster)
        assert await unused.close() == 0
        with pytest.raises(kbatch.ProducerClosedError):
            await unused.send_batch(TOPIC, [])

    asyncio.run(main())
    assert sum(end_offsets(cluster.bootstrap_servers, TOPIC).values()) == 0


def test_a_timeout_bounds_the_wait_only(cluster: MockCluster) -> None:
    others = [o for o in gc.get_objects() if type(o) is LoopWaker]  # of tests before this one

    async def main() -> None:
        async with make_producer(cluster) as producer:
            async with away(cluster):
                with pytest.raises(kbatch.BatchPendingError, match="a batch of 7 envelopes within") as caught:
                    await producer.send_batch(TOPIC, envelopes(range(7)), timeout=0.5)
                assert isinstance(caught.value, TimeoutError)
                pending = caught.value.pending
                del caught  # its traceback has the frame that waited
                for _ in range(50):  # waits that end early leave nothing behind
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(pending, 0)
                gc.collect()
                assert not [o for o in gc.get_objects() if type(o) is LoopWaker and o not in others]
            assert (await pending).acked == 7

    asyncio.run(main())
    assert stored(cluster) == list(range(7))


@pytest.mark.parametrize("memory", [False, True], ids=["librdkafka", "memory"])
def test_no_time_at_all_is_told_as_by_threads(cluster: MockCluster, memory: bool) -> None:
    blocking = MemoryProducer() if memory else kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers})
    with blocking:
        expected = blocking.send_batch(TOPIC, envelopes(range(3)), timeout=0)

    async def main() -> kbatch.DeliveryReport:
        async with AioMemoryProducer() if memory else make_producer(cluster) as producer:
            return await producer.send_batch(TOPIC, envelopes(range(3)), timeout=0)

    report = asyncio.run(main())
    assert {error.name for error in report.errors.values()} == {"_TIMED_OUT_QUEUE"}
    assert report.errors.keys() == expected.errors.keys() == {0, 1, 2}
    assert {error.code for error in report.errors.values()} == {error.code for error in expected.errors.values()}


def test_a_fatal_error_is_raised(cluster: MockCluster) -> None:
    async def main() -> None:
        producer = make_producer(cluster, close_timeout_s=0, config={"enable.idempotence": True})
        assert (await producer.send_batch(TOPIC, envelopes(range(3)))).acked == 3
        producer._core.inject_fatal_error(45, "for a test")
        with pytest.raises(kbatch.ProducerFatalError):
            await producer.send_batch(TOPIC, envelopes(range(3)))
        await producer.close()

    asyncio.run(main())


def test_a_child_of_a_fork_is_refused(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            await producer.send_batch(TOPIC, envelopes(range(3)))
            await producer.submit(TOPIC, envelopes(range(3, 6)))
            pid = os.fork()
            if pid == 0:
                answer = 1
                try:
                    asyncio.run(producer.send_batch(TOPIC, envelopes(range(3))))
                except kbatch.ForkError:
                    answer = 0
                finally:
                    os._exit(answer)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert (await producer.send_batch(TOPIC, envelopes(range(6, 9)))).acked == 3

    asyncio.run(main())
    assert stored(cluster) == list(range(9))


# -- many at a time


def test_many_tasks_keep_their_order(cluster: MockCluster) -> None:
    tasks, batches, size = 20, 20, 30

    async def main() -> None:
        async with make_producer(cluster, max_in_flight=1000) as producer:

            async def send(task: int) -> int:
                start = task * batches * size
                batch = [range(start + i * size, start + (i + 1) * size) for i in range(batches)]
                return sum([(await producer.send_batch(TOPIC, envelopes(numbers))).acked for numbers in batch])

            assert await asyncio.gather(*map(send, range(tasks))) == [batches * size] * tasks

    asyncio.run(main())
    got = stored(cluster)
    assert sorted(got) == list(range(tasks * batches * size))
    for task in range(tasks):
        mine = [n for n in got if n // (batches * size) == task]
        assert mine == sorted(mine)


def test_submissions_are_enqueued_in_their_order_and_wait_for_room(cluster: MockCluster) -> None:
    in_flight: list[int] = []

    async def main() -> None:
        async with make_producer(cluster, max_in_flight=100) as producer:
            async with away(cluster):
                first = await producer.submit(TOPIC, envelopes(range(100)))
                others = [
                    asyncio.create_task(producer.submit(TOPIC, envelopes(range(i, i + 50)))) for i in (100, 150, 200)
                ]
                for _ in range(20):
                    await asyncio.sleep(0.005)
                    in_flight.append(producer.stats()["in_flight"])
                    assert len(producer) == 250
                assert not any(task.done() for task in others)
                assert not first.done()
            for pending in await asyncio.gather(*others):
                assert (await pending).acked == 50

    asyncio.run(main())
    assert max(in_flight) == 100
    assert stored(cluster) == list(range(250))


def test_a_full_queue_of_librdkafka_is_waited_for(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster, config={"queue.buffering.max.messages": 50}) as producer:
            reports = await asyncio.gather(
                *(producer.send_batch(TOPIC, envelopes(range(i, i + 300))) for i in range(0, 1500, 300))
            )
            assert all(reports)

    asyncio.run(main())
    assert stored(cluster) == list(range(1500))


def test_a_batch_calls_the_drainer_out_of_its_poll(cluster: MockCluster) -> None:
    """With a callback configured it always polls, 100 ms at a time; without one it sleeps until there is a batch."""
    enough = 2000

    async def main() -> None:
        calm = make_producer(cluster)
        polling = make_producer(cluster, config={"error_cb": lambda error: None})
        sent = {calm: 0, polling: 0}

        async def send(producer: aio.Producer) -> None:
            while sent[calm] < enough:
                await producer.send_batch(TOPIC, envelopes(range(1)))
                sent[producer] += 1

        async with calm, polling:
            await asyncio.gather(*(each.send_batch(TOPIC, envelopes(range(1))) for each in sent))  # connected
            await asyncio.gather(send(calm), send(polling))
        assert sent[polling] > enough // 40  # some 10 come if each waits for the end of a poll

    asyncio.run(main())


def test_no_thread_waits_for_a_batch(cluster: MockCluster) -> None:
    process = psutil.Process()

    async def main() -> None:
        async with make_producer(cluster) as producer:
            await producer.send_batch(TOPIC, envelopes(range(1)))
            async with away(cluster):
                few = [await producer.submit(TOPIC, envelopes(range(1))) for _ in range(2)]
                sends = [asyncio.create_task(producer.send_batch(TOPIC, envelopes(range(1)))) for _ in range(2)]
                await asyncio.sleep(0.05)
                threads = process.num_threads()
                many = [await producer.submit(TOPIC, envelopes(range(1))) for _ in range(200)]
                sends += [asyncio.create_task(producer.send_batch(TOPIC, envelopes(range(1)))) for _ in range(200)]
                await asyncio.sleep(0.05)
                assert process.num_threads() < threads + 10  # librdkafka may have started some of its own
            await asyncio.gather(*few, *many, *sends)

    asyncio.run(main())


def loops() -> list[Callable[[], asyncio.AbstractEventLoop]]:
    found: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop]
    try:
        import uvloop
    except ImportError:
        return found
    return [*found, uvloop.new_event_loop]


@pytest.mark.parametrize("new_loop", loops())
def test_several_loops_share_a_producer(cluster: MockCluster, new_loop: Callable[[], Any]) -> None:
    producer = make_producer(cluster)
    answers: list[int] = []

    async def send(thread: int) -> None:
        for i in range(50):
            n = thread * 1000 + i * 10
            answers.append((await producer.send_batch(TOPIC, envelopes(range(n, n + 10)))).acked)

    def run(thread: int) -> None:
        loop = new_loop()
        try:
            loop.run_until_complete(send(thread))
        finally:
            loop.close()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asyncio.run(producer.close()) == 0
    assert answers == [10] * 200
    assert sorted(stored(cluster)) == sorted(t * 1000 + i for t in range(4) for i in range(500))


def test_one_batch_is_awaited_on_several_loops(cluster: MockCluster) -> None:
    producer = make_producer(cluster)

    async def send() -> kbatch.PendingBatch:
        return await producer.submit(TOPIC, envelopes(range(10)))

    async def wait(pending: kbatch.PendingBatch) -> int:
        return (await pending).acked

    cluster.set_broker_down(1)
    pending = asyncio.run(send())
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(asyncio.run(wait(pending))), daemon=True) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    cluster.set_broker_up(1)
    for thread in threads:
        thread.join()
    assert answers == [10, 10, 10]
    asyncio.run(producer.close())


def test_a_loop_closed_while_batches_are_in_flight(cluster: MockCluster, caplog: pytest.LogCaptureFixture) -> None:
    producer = make_producer(cluster)
    pending: list[kbatch.PendingBatch] = []

    async def leave() -> None:
        cluster.set_broker_down(1)
        pending.append(await producer.submit(TOPIC, envelopes(range(5)), callback=lambda report: None))
        for start in (5, 10):
            asyncio.get_running_loop().create_task(producer.send_batch(TOPIC, envelopes(range(start, start + 5))))
        await asyncio.sleep(0.05)
        # No asyncio.run: the tasks stay as they are, not even cancelled.

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    cluster.set_broker_up(1)
    until(pending[0].done, "the answer of a batch whose loop is closed")
    asyncio.run(producer.close())
    assert stored(cluster) == list(range(15))
    (record,) = [record for record in caplog.records if record.name == "kbatch"]
    assert "loop on which its batch was sent is closed" in record.message
    with caplog.at_level(logging.CRITICAL, "asyncio"):  # "Task was destroyed but it is pending": on purpose
        gc.collect()


# -- the loop stays free


def slowly(message: Any, context: kbatch.SerializationContext) -> bytes:
    """An encoder that takes longer than the loop may be kept."""
    time.sleep(0.003)
    return str(message).encode()


def test_mapping_is_sliced(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster, encoder=slowly) as producer:
            await producer.send_batch(TOPIC, [])
            assert await ticks_during(producer.send_batch(TOPIC, envelopes(range(20)))) >= 20

    asyncio.run(main())
    assert stored(cluster) == list(range(20))


def test_a_generator_is_read_in_slices(cluster: MockCluster) -> None:
    def generate() -> Iterator[Envelope]:
        for i in range(20):
            time.sleep(0.003)
            yield Envelope(i)

    async def main() -> None:
        async with make_producer(cluster) as producer:
            await producer.send_batch(TOPIC, [])
            assert await ticks_during(producer.send_batch(TOPIC, generate())) >= 20

    asyncio.run(main())
    assert stored(cluster) == list(range(20))


def test_batches_that_are_mapped_in_turns_do_not_mix(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster, encoder=slowly) as producer:
            reports.extend(await asyncio.gather(*(producer.send_batch(TOPIC, envelopes(batch)) for batch in batches)))

    batches = [range(i, i + 10) for i in range(0, 50, 10)]
    reports: list[kbatch.DeliveryReport] = []
    asyncio.run(main())
    got = stored(cluster)
    assert [[got[offset] for offset in report.offsets] for report in reports] == [list(batch) for batch in batches]


def test_batches_are_sent_in_the_order_of_the_calls(cluster: MockCluster) -> None:
    """Also by a producer that is yet to start, and when an earlier one takes longer to map, fails or is cancelled."""

    async def main() -> None:
        async with make_producer(cluster, encoder=slowly) as producer:
            sends = [
                producer.send_batch(TOPIC, envelopes(range(20))),
                producer.send_batch(TOPIC, [Envelope(20)]),
                producer.submit(TOPIC, [*envelopes(range(10)), Envelope(1, topic="no topic")]),
                producer.send_batch(TOPIC, envelopes(range(10))),
                producer.send_batch(TOPIC, envelopes(range(21, 30))),
                producer.submit(TOPIC, [Envelope(30)]),
                aio.KafkaSender(producer, TOPIC).send_batch(Recorder(), OutgoingBatch([Envelope(31)])),
            ]
            tasks = [asyncio.create_task(send) for send in sends]
            await asyncio.sleep(0.01)
            tasks[3].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(answers[2], kbatch.SerializationError)
            assert isinstance(answers[3], asyncio.CancelledError)
            assert producer._turns.standing == 0

    asyncio.run(main())
    assert stored(cluster) == list(range(32))


def test_a_large_batch_leaves_the_loop_to_others(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            await producer.send_batch(TOPIC, [])
            assert await ticks_during(producer.send_batch(TOPIC, envelopes(range(50_000)))) >= 10

    asyncio.run(main())
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 50_000}  # more than the mock cluster keeps


# -- cancellation


async def cancel_after(steps: int, work: Coroutine[Any, Any, Any]) -> bool:
    """Runs `work` for so many turns of the loop, then cancels it; whether it was cancelled."""
    task = asyncio.create_task(work)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


def steps_and_turns(was_sent: Callable[[], object]) -> Iterator[tuple[int, int]]:
    """After how many turns of the loop to cancel; on a busy machine a dozen are few, so there are more until
    something was sent."""
    for step in itertools.count():
        if step >= 12 and (was_sent() or step > 30):
            return
        yield step, step if step < 12 else 2 ** (step - 8)


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("how", ["send_batch", "submit"])
def test_sending_is_cancelled_at_every_await(cluster: MockCluster, how: str, started: bool) -> None:
    """All or nothing of a small batch, whenever it is cancelled."""

    async def main() -> None:
        first = producer = make_producer(cluster, encoder=slowly)
        if started:
            await producer.send_batch(TOPIC, [])
        for step, turns in steps_and_turns(lambda: not started or first.stats()["acked"]):
            if not started:
                with contextlib.suppress(kbatch.UndeliveredError):
                    await producer.close()
                producer = make_producer(cluster, encoder=slowly)
            async with away(cluster):
                send = getattr(producer, how)(TOPIC, envelopes(range(step * 10, step * 10 + 5)))
                cancelled = await cancel_after(turns, send)
                assert cancelled or how == "submit"
            with contextlib.suppress(kbatch.UndeliveredError):  # no report has told
                assert await producer.flush(30) == 0
        with contextlib.suppress(kbatch.UndeliveredError):
            await producer.close()

    asyncio.run(main())
    got = stored(cluster)
    sent = {n // 10 for n in got}
    assert got == [step * 10 + i for step in sorted(sent) for i in range(5)]
    assert 0 not in sent
    assert sent or not started


@pytest.mark.parametrize("kind", [aio.KafkaSender, aio.SendingAgent])
@pytest.mark.parametrize("started", [True, False])
def test_a_sender_is_cancelled_at_every_await(cluster: MockCluster, started: bool, kind: Any) -> None:
    """Exactly one callback, whenever it is cancelled, and a true one."""
    answers: list[list[tuple[str, Any]]] = []

    async def main() -> None:
        first = producer = make_producer(cluster, encoder=slowly)
        if started:
            await producer.send_batch(TOPIC, [])
        for step, turns in steps_and_turns(lambda: not started or first.stats()["acked"]):
            if not started:
                await producer.close()
                producer = make_producer(cluster, encoder=slowly)
            recorder = Recorder()
            batch = OutgoingBatch(envelopes(range(step * 10, step * 10 + 5)))
            sender = kind(producer, TOPIC)
            async with away(cluster):
                assert await cancel_after(turns, sender.send_batch(recorder, batch))
                answers.append(recorder.calls)
            assert await producer.flush(30) == 0
            if kind is aio.SendingAgent:
                await sender.close()
        await producer.close()
        assert producer.stats()["pinned_buffers"] == 0

    asyncio.run(main())
    sent = []
    for step, calls in enumerate(answers):  # the first was cancelled before its first step
        ((method, answer),) = calls
        if method == "mark_successful":
            assert answer.acked == 5
            sent += range(step * 10, step * 10 + 5)
        else:
            assert method == "mark_processing_failure"
            assert answer.report.failed == 5
            assert not any(error.possibly_persisted for error in answer.report.errors.values())
    assert stored(cluster) == sent
    assert sent or not started


def test_what_is_not_enqueued_when_cancelled_is_not_sent(cluster: MockCluster) -> None:
    reports: list[kbatch.DeliveryReport] = []

    async def main() -> None:
        async with make_producer(cluster, max_in_flight=10) as producer:
            async with away(cluster):
                task = asyncio.create_task(producer.submit(TOPIC, envelopes(range(50)), callback=reports.append))
                while producer.stats()["in_flight"] < 10:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert (await producer.send_batch(TOPIC, envelopes(range(50, 60)))).acked == 10

    asyncio.run(main())
    (report,) = reports
    assert (report.acked, sorted(report.errors)) == (10, list(range(10, 50)))
    assert {(e.name, e.possibly_persisted) for e in report.errors.values()} == {("_PURGE_QUEUE", False)}
    assert stored(cluster) == [*range(10), *range(50, 60)]


def test_waiting_is_cancelled(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            await producer.send_batch(TOPIC, [])
            async with away(cluster):
                pending = await producer.submit(TOPIC, envelopes(range(5)))
                for step in range(4):
                    assert await cancel_after(step, pending._answer())
                    assert await cancel_after(step, producer.flush())
            assert (await pending).acked == 5

    asyncio.run(main())


def test_closing_is_cancelled(cluster: MockCluster) -> None:
    """It goes on without the task, and every batch has its answer."""

    async def main() -> None:
        for step in range(4):
            producer = make_producer(cluster)
            await producer.send_batch(TOPIC, [])
            async with away(cluster):
                pending = await producer.submit(TOPIC, envelopes(range(step * 10, step * 10 + 5)))
                assert await cancel_after(step, producer.close())
                assert producer.closed or step == 0
            assert await producer.close() == 0
            assert pending.report.acked == 5

    asyncio.run(main())


# -- closing


def test_leaving_the_block_says_what_was_lost(cluster: MockCluster) -> None:
    async def main() -> None:
        cluster.set_broker_down(1)
        pending = []

        async def leave(error: BaseException | None) -> None:
            async with make_producer(cluster, close_timeout_s=0.1) as producer:
                pending.append(await producer.submit(TOPIC, envelopes(range(5))))
                if error is not None:
                    raise error

        with pytest.raises(kbatch.UndeliveredError, match="5 messages") as caught:
            await leave(None)
        assert caught.value.count == 5
        with pytest.raises(ZeroDivisionError):
            await leave(ZeroDivisionError())
        assert [(await batch).failed for batch in pending] == [5, 5]

    asyncio.run(main())


def test_closing_while_others_send(cluster: MockCluster) -> None:
    """Each batch is sent as a whole, answered and acknowledged, or refused."""
    acknowledged: list[int] = []

    async def main() -> None:
        producer = make_producer(cluster, max_in_flight=100)

        async def send(task: int) -> None:
            n = task * 10_000
            while True:
                try:
                    report = await producer.send_batch(TOPIC, envelopes(range(n, n + 20)))
                except kbatch.ProducerClosedError:
                    return
                acknowledged.extend(n + i for i in range(20) if i not in report.errors)
                n += 20

        tasks = [asyncio.create_task(send(i)) for i in range(8)]
        while len(acknowledged) < 2000:
            await asyncio.sleep(0.001)
        await producer.close()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert sorted(stored(cluster)) == sorted(acknowledged)


# -- the batch callback contract


def test_the_contract_with_coroutines(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            sender = aio.KafkaSender(producer, TOPIC)
            assert isinstance(sender, aio.SenderProtocol)

            async def send(batch: list[Any]) -> tuple[str, Any]:
                recorder = Recorder()
                await sender.send_batch(recorder, OutgoingBatch(batch))
                (call,) = recorder.calls
                return call

            method, report = await send(envelopes(range(10)))
            assert (method, report.acked) == ("mark_successful", 10)
            method, error = await send([*envelopes(range(2)), Envelope(object())])
            assert (method, error.index, error.report.failed) == ("mark_serialization_failure", 2, 3)
            method, error = await send([Envelope(1, partition=7)])
            assert (method, error.report.failed) == ("mark_topic_does_not_exist", 1)
            cluster.push_request_errors(ApiKey.PRODUCE, [29, 29])  # the two may go in two requests
            method, error = await send(envelopes(range(10, 12)))
            assert (method, error.report.failed) == ("mark_processing_failure", 2)
        method, error = await send(envelopes(range(2)))
        assert method == "mark_processing_failure"
        assert isinstance(error, kbatch.ProducerClosedError)

    asyncio.run(main())
    assert stored(cluster) == list(range(10))


def test_a_timed_out_batch(cluster: MockCluster) -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make_producer(cluster, config={"delivery.timeout.ms": 300}) as producer:
            await producer.send_batch(TOPIC, [])
            async with away(cluster):
                sender = aio.KafkaSender(producer, TOPIC)
                await sender.send_batch(recorder, OutgoingBatch(envelopes(range(3))))
        ((method, error),) = recorder.calls
        assert (method, error.report.failed) == ("mark_timed_out", 3)

    asyncio.run(main())


def test_the_blocking_contracts_callback_serves_too(cluster: MockCluster, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    class Plain(kbatch.SenderCallback):
        def mark_successful(self, batch: OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            calls.append("mark_successful")
            raise ZeroDivisionError

    async def main() -> None:
        async with make_producer(cluster) as producer:
            await aio.KafkaSender(producer, TOPIC).send_batch(Plain(), OutgoingBatch(envelopes(range(3))))

    asyncio.run(main())
    assert calls == ["mark_successful"]
    assert "a sender callback failed" in caplog.text


def test_unhandled_failures_are_logged(cluster: MockCluster, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            sender = aio.KafkaSender(producer, TOPIC)
            await sender.send_batch(aio.SenderCallback(), OutgoingBatch([Envelope(1, partition=7)]))
            await sender.send_batch(aio.SenderCallback(), OutgoingBatch([Envelope(object())]))
            await sender.send_batch(aio.SenderCallback(), OutgoingBatch([Envelope(1)]))

    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


# -- what waits for room


def test_a_batch_behind_one_that_waits_is_given_up_before_its_turn(cluster: MockCluster) -> None:
    recorder = Recorder()

    async def main() -> None:
        async with make_producer(cluster, max_in_flight=10) as producer:
            await producer.send_batch(TOPIC, [])
            async with away(cluster):
                head = asyncio.create_task(producer.send_batch(TOPIC, envelopes(range(50))))
                while producer.stats()["in_flight"] < 10:
                    await asyncio.sleep(0.001)
                sender = aio.KafkaSender(producer, TOPIC)
                task = asyncio.create_task(sender.send_batch(recorder, OutgoingBatch(envelopes(range(50, 55)))))
                report = await producer.send_batch(TOPIC, envelopes(range(55, 60)), timeout=0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert {error.name for error in report.errors.values()} == {"_TIMED_OUT_QUEUE"}
                while not recorder.calls:
                    await asyncio.sleep(0.001)
                assert not head.done()
            assert (await head).acked == 50

    asyncio.run(asyncio.wait_for(main(), 60))
    ((method, error),) = recorder.calls
    assert (method, error.report.failed) == ("mark_processing_failure", 5)
    assert stored(cluster) == list(range(50))


@pytest.mark.parametrize("awaited", [True, False])
def test_a_fatal_error_while_a_batch_waits_for_room(cluster: MockCluster, awaited: bool) -> None:
    """Nobody but the one that waits is there to see it."""
    config = {"enable.idempotence": True, "socket.timeout.ms": 1000}

    async def main() -> None:
        producer = make_producer(cluster, max_in_flight=10, close_timeout_s=0.1, config=config)
        await producer.send_batch(TOPIC, envelopes(range(1)))
        cluster.set_rtt(1, 20_000)
        if awaited:
            send = asyncio.create_task(producer.send_batch(TOPIC, envelopes(range(50))))
        else:
            pending = kbatch.PendingBatch(producer._core)
            producer._core.map(pending, TOPIC, envelopes(range(50)))
            send = asyncio.create_task(asyncio.to_thread(producer._core.send, pending, wait=True))
        while producer.stats()["in_flight"] < 10:
            await asyncio.sleep(0.001)
        producer._core.inject_fatal_error(47, "for a test")
        report = await asyncio.wait_for(send, 60)
        assert (report if awaited else pending.report).failed == 50
        await producer.close()

    asyncio.run(main())


def test_callbacks_that_close_do_not_wait_for_each_other(cluster: MockCluster) -> None:
    closed = 0

    async def main() -> None:
        producer = make_producer(cluster, close_timeout_s=1000)

        async def close(report: kbatch.DeliveryReport) -> None:
            nonlocal closed
            await producer.close()
            closed += 1

        for start in (0, 10):
            await producer.submit(TOPIC, envelopes(range(start, start + 10)), callback=close)
        while closed < 2:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_loop_that_was_closed_while_calls_waited_for_their_turn_is_forgotten(cluster: MockCluster) -> None:
    producer = make_producer(cluster, encoder=slowly)

    async def leave() -> None:
        for _ in range(3):
            asyncio.get_running_loop().create_task(producer.send_batch(TOPIC, envelopes(range(10))))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    asyncio.run(producer.close())
    with pytest.raises(kbatch.ProducerClosedError):
        asyncio.run(producer.send_batch(TOPIC, []))
    gc.collect()
    assert producer._turns.standing == 0


def test_a_closed_producer_refuses_to_flush(cluster: MockCluster) -> None:
    async def main() -> None:
        producer = make_producer(cluster)
        assert await producer.flush() == 0  # not started
        await producer.send_batch(TOPIC, envelopes(range(3)))
        assert repr(producer).startswith("<kbatch.aio.Producer rdkafka#producer-")
        await producer.close()
        with pytest.raises(kbatch.ProducerClosedError):
            await producer.flush()

    asyncio.run(main())


# -- who was accepted counts


@pytest.mark.parametrize("end", ["flush", "close"])
@pytest.mark.parametrize("kind", ["list", "generator"])
def test_what_is_being_mapped_is_counted_and_waited_for(cluster: MockCluster, kind: str, end: str) -> None:
    def slow(message: Any, context: Any) -> bytes:
        time.sleep(0.001)
        return b"%d" % message

    async def main() -> None:
        producer = make_producer(cluster, encoder=slow)
        (await producer.send_batch(TOPIC, envelopes(range(1)))).raise_for_errors()
        batch: Any = envelopes(range(1, 101))
        sending = [asyncio.create_task(producer.send_batch(TOPIC, batch if kind == "list" else iter(batch)))]
        sending.append(asyncio.create_task(producer.send_batch(TOPIC, envelopes(range(101, 121)))))
        await asyncio.sleep(0)
        assert len(producer) == 120
        assert producer.stats()["in_flight"] == 0
        assert await producer.flush(0) == 120
        assert await getattr(producer, end)(30) == 0
        assert producer.stats()["acked"] == 121
        assert len(producer) == 0
        assert [(await task).acked for task in sending] == [100, 20]
        if end == "close":
            with pytest.raises(kbatch.ProducerClosedError):
                await producer.send_batch(TOPIC, [])
        await producer.close()

    asyncio.run(main())
    assert stored(cluster) == list(range(121))


def test_who_gives_up_while_being_mapped_counts_no_more(cluster: MockCluster) -> None:
    async def main() -> None:
        async with make_producer(cluster) as producer:
            await producer.send_batch(TOPIC, envelopes(range(1)))
            task = asyncio.create_task(producer.send_batch(TOPIC, envelopes(range(200_000))))
            await asyncio.sleep(0)
            assert len(producer) == 200_000
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(producer) == 0
            assert await producer.flush(30) == 0

    asyncio.run(main())
    assert stored(cluster) == [0]
