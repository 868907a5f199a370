"""A listener on an event loop with a transactional_id: what it has besides the one of threads, whose transactions it
uses. Kafka's part is in tests/kafka."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import kbatch
from kbatch import aio
from kbatch._codes import ABORTED_CODE
from kbatch._receiving import _transacting
from kbatch.testing import MockCluster
from tests.listening import Order, config_of, send
from tests.mock.clients import read
from tests.mock.test_aio_listener import run_until, until

Received = kbatch.ReceivedEnvelope[Any]


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        cluster.create_topic("out", partitions=1)
        cluster.create_topic("dead", partitions=1)
        yield cluster


def listener_of(cluster: MockCluster, handler: Any, **options: Any) -> aio.Listener:
    options = {"types": {"Order": Order}, "transactional_id": "one", **options}
    return aio.Listener(config_of(cluster), ["orders"], handler, **options)


def values(cluster: MockCluster, topic: str = "out") -> list[bytes | None]:
    records = read(cluster.bootstrap_servers, topic, 0).get(0, [])
    return [record.value for record in records if record.headers]  # control records have none


async def forward(envelope: Received, transaction: aio.Transaction) -> None:
    await asyncio.sleep(0)
    await transaction.send("out", [kbatch.Envelope(envelope.message.number)])


def test_what_a_coroutine_sends_is_committed_with_its_records(cluster: MockCluster) -> None:
    async def main() -> None:
        sizes: list[int] = []

        async def handle(envelopes: list[Received], transaction: aio.Transaction) -> None:
            assert repr(transaction) == "<kbatch.aio.Transaction 0 envelopes>"
            sizes.append(len(envelopes))
            for envelope in envelopes:
                await forward(envelope, transaction)

        send(cluster, 50)
        listener = listener_of(cluster, handle, batch_size=20)
        task = asyncio.create_task(run_until(listener))
        await until(lambda: listener.stats()["handled"] == 50, "the records")
        listener.stop()
        await task
        assert sum(sizes) == 50
        assert max(sizes) > 1

    asyncio.run(main())
    assert values(cluster) == [b"%d" % number for number in range(50)]


def test_the_loop_goes_on_while_a_commit_waits(cluster: MockCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()
    send_offsets = _transacting._send_offsets

    def slow(*arguments: Any) -> Any:
        entered.set()
        release.wait(60)
        return send_offsets(*arguments)

    monkeypatch.setattr(_transacting, "_send_offsets", slow)

    async def main() -> None:
        send(cluster, 1)
        listener = listener_of(cluster, forward)
        task = asyncio.create_task(run_until(listener))
        await until(entered.is_set, "the commit")
        assert listener.stats()["running"] == 1
        release.set()
        await until(lambda: listener.stats()["handled"] == 1, "the record")
        listener.stop()
        await task

    asyncio.run(main())


def test_a_transaction_that_was_aborted_is_sent_again_without_the_handler(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    send_offsets = _transacting._send_offsets

    def refusing(reading: Any, work: Any, producer: Any, timeout_ms: int) -> Any:
        if len(refused) < 2:
            refused.append(work.next_offset)
            return ABORTED_CODE, "made up", False, False, True
        return send_offsets(reading, work, producer, timeout_ms)

    monkeypatch.setattr(_transacting, "_send_offsets", refusing)

    async def main() -> None:
        handled: list[int] = []

        async def handle(envelope: Received, transaction: aio.Transaction) -> None:
            handled.append(envelope.message.number)
            await forward(envelope, transaction)
            if envelope.message.number == 9:
                listener.stop()

        send(cluster, 10)
        listener = listener_of(cluster, handle)
        await run_until(listener)
        assert handled == list(range(10))
        assert listener.stats()["handled"] == 10

    asyncio.run(main())
    assert refused == [1, 1]


def test_a_handler_that_raises_has_sent_nothing_and_its_copy_is_sent_in_a_transaction(cluster: MockCluster) -> None:
    async def main() -> None:
        async def handle(envelope: Received, transaction: aio.Transaction) -> None:
            await forward(envelope, transaction)
            if envelope.message.number == 3:
                raise ValueError("no such customer")

        send(cluster, 6)
        retry = kbatch.RetryPolicy(max_attempts=2, initial_backoff_s=0.01)
        listener = listener_of(cluster, handle, retry=retry, dead_letter_topic="dead")
        task = asyncio.create_task(run_until(listener))
        await until(lambda: listener.stats()["handled"] == 6, "the records")
        stats = listener.stats()
        listener.stop()
        await task
        assert (stats["dead"], stats["attempts_failed"]) == (1, 2)

    asyncio.run(main())
    assert values(cluster) == [b"0", b"1", b"2", b"4", b"5"]
    assert values(cluster, "dead") == [b'{"number":3}']


@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")
def test_a_send_that_was_not_awaited_is_the_handlers_failure(cluster: MockCluster) -> None:
    async def handle(envelope: Received, transaction: aio.Transaction) -> None:
        await transaction.send("out", [])
        transaction.send("out", [kbatch.Envelope(1)])  # type: ignore[unused-coroutine]

    send(cluster, 1)
    listener = listener_of(cluster, handle, retry=kbatch.RetryPolicy(max_attempts=1))
    with pytest.raises(kbatch.ProducerError, match="1 send of this transaction had not begun"):
        asyncio.run(run_until(listener))
    assert values(cluster) == []


def test_a_handler_that_is_cancelled_has_sent_nothing(cluster: MockCluster) -> None:
    async def handle(envelope: Received, transaction: aio.Transaction) -> None:
        await forward(envelope, transaction)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(60)

    send(cluster, 1)
    with pytest.raises(kbatch.ListenerError, match="was cancelled"):
        asyncio.run(run_until(listener_of(cluster, handle)))
    assert values(cluster) == []


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6])
def test_a_task_that_is_cancelled_at_any_await_ends_the_listener_and_the_next_run_goes_on(
    cluster: MockCluster, steps: int
) -> None:
    async def main() -> None:
        is_first = True

        async def handle(envelope: Received, transaction: aio.Transaction) -> None:
            await forward(envelope, transaction)

        make = asyncio.get_running_loop().create_task

        def watched(coroutine: Any, **named: Any) -> Any:
            nonlocal is_first
            task = make(coroutine, **named)
            if is_first and coroutine.__qualname__ == "_Handlers._work":
                is_first = False
                cancelling.append(make(cancel(task)))
            return task

        async def cancel(task: Any) -> None:
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()

        cancelling: list[Any] = []
        send(cluster, 2)
        listener = listener_of(cluster, handle)
        asyncio.get_running_loop().create_task = watched  # type: ignore[method-assign,assignment]
        with contextlib.suppress(kbatch.ListenerError):
            task = make(run_until(listener))
            await until(lambda: task.done() or listener.stats()["handled"] == 2, "the end")
            if not task.done():  # else the next run would end at once
                listener.stop()
            await task
        stats = listener.stats()
        assert (stats["running"], stats["abandoned"]) == (0, 0)
        task = make(run_until(listener))
        await until(lambda: listener.stats()["handled"] == 2, "the records")
        listener.stop()
        await task

    asyncio.run(main())


def test_a_stop_whose_time_is_over_leaves_what_is_committed_then(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        entered.set()
        release.wait(60)
        return ABORTED_CODE, "made up", False, False, True

    monkeypatch.setattr(_transacting, "_send_offsets", slow)

    async def main() -> None:
        send(cluster, 1)
        listener = listener_of(cluster, forward, close_timeout_s=0.1)
        task = asyncio.create_task(run_until(listener))
        await until(entered.is_set, "the commit")
        listener.stop()
        await task
        release.set()
        stats = listener.stats()
        assert (stats["handled"], stats["abandoned"], stats["running"]) == (0, 1, 0)

    asyncio.run(main())


def test_a_record_whose_partition_leaves_is_not_committed(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another has it before the transaction is committed, which is aborted then; the work is over, here."""

    async def main() -> None:
        entered = asyncio.Event()
        release = asyncio.Event()

        async def handle(envelope: Received, transaction: aio.Transaction) -> None:
            await forward(envelope, transaction)
            entered.set()
            await release.wait()

        send(cluster, 1)
        listener = listener_of(cluster, handle)
        task = asyncio.create_task(run_until(listener))
        await entered.wait()
        reading = listener._reading
        assert reading is not None
        with reading.lock:
            reading._positions.take([("orders", 0)])
        release.set()
        await until(lambda: reading.stats()["running"] == 0, "the end of the work")
        stats = listener.stats()
        listener.stop()
        await task
        assert (stats["handled"], stats["failed"]) == (0, 0)

    asyncio.run(main())
