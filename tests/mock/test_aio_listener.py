"""A listener on an event loop: its handlers are tasks, its end waits for them, cancelling is a stop."""

import asyncio
import contextlib
import contextvars
import signal
import threading
from collections import defaultdict
from typing import Any

import pytest

import kbatch
from kbatch import aio
from kbatch.testing import MockCluster
from tests.listening import Order, committed, config_of, send, signal_after

Received = kbatch.ReceivedEnvelope[Any]


def listener_of(cluster: MockCluster, handler: Any, **options: Any) -> aio.Listener:
    options.setdefault("types", {"Order": Order})
    return aio.Listener(config_of(cluster), ["orders"], handler, **options)


async def run_until(listener: aio.Listener) -> None:
    handle = asyncio.get_running_loop().call_later(60, listener.stop)
    try:
        await listener.run()
    finally:
        handle.cancel()


async def until(condition: Any, what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"never came: {what}")


def test_each_record_is_awaited_in_order_of_its_key() -> None:
    async def main() -> None:
        seen: dict[Any, list[int]] = defaultdict(list)
        running = most = 0

        async def handle(envelope: Received) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001 * (envelope.message.number % 3))
            seen[envelope.key].append(envelope.message.number)
            running -= 1
            if sum(map(len, seen.values())) == 500:
                listener.stop()

        with MockCluster() as cluster:
            send(cluster, 500)
            async with listener_of(cluster, handle, concurrency=5) as listener:
                await run_until(listener)
            assert sum(committed(cluster).values()) == 500
        assert 1 < most <= 5
        for key in range(7):
            assert seen[str(key).encode()] == list(range(key, 500, 7))

    asyncio.run(main())


def test_batches_are_awaited() -> None:
    async def main() -> None:
        sizes: list[int] = []

        async def handle(envelopes: list[Received]) -> None:
            sizes.append(len(envelopes))
            await asyncio.sleep(0)
            if sum(sizes) == 300:
                listener.stop()

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 300)
            listener = listener_of(cluster, handle, batch_size=100)
            await run_until(listener)
            assert committed(cluster, partitions=1) == {0: 300}
        assert max(sizes) <= 100

    asyncio.run(main())


def test_what_a_handler_raises_ends_it() -> None:
    async def main() -> None:
        async def handle(envelope: Received) -> None:
            if envelope.offset == 3:
                raise ValueError("no such customer")

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 10)
            with pytest.raises(ValueError, match="no such customer"):
                await run_until(listener_of(cluster, handle))
            assert committed(cluster, partitions=1) == {0: 3}

    asyncio.run(main())


def test_a_handler_that_is_cancelled_has_failed() -> None:
    async def main() -> None:
        async def handle(envelope: Received) -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 1)
            with pytest.raises(kbatch.ListenerError, match=r"was cancelled, of orders \[0\] at offset 0"):
                await run_until(listener_of(cluster, handle))
            assert committed(cluster, partitions=1) == {}

    asyncio.run(main())


def test_cancelling_run_lets_handlers_end_and_commits() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def handle(envelope: Received) -> None:
            begun.set()
            await asyncio.sleep(0.3)

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 1)
            listener = listener_of(cluster, handle)
            task = asyncio.create_task(listener.run())
            await asyncio.wait_for(begun.wait(), 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert listener.stats()["handled"] == 1
            assert committed(cluster, partitions=1) == {0: 1}

    asyncio.run(main())


def test_a_handler_that_hangs_is_cancelled_at_the_deadline() -> None:
    async def main() -> None:
        cancelled: list[int] = []

        async def handle(envelope: Received) -> None:
            listener.stop()
            try:
                await asyncio.sleep(1_000)
            except asyncio.CancelledError:
                cancelled.append(envelope.offset)
                raise

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 5)
            listener = listener_of(cluster, handle, close_timeout_s=0.3)
            await run_until(listener)
            assert cancelled == [0]
            assert listener.stats()["abandoned"] == 1
            assert committed(cluster, partitions=1) == {}

    asyncio.run(main())


def test_a_handler_that_will_not_be_cancelled_does_not_keep_run_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def handle(envelope: Received) -> None:
            listener.stop()
            while not ended.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await ended.wait()

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 1)
            listener = listener_of(cluster, handle, close_timeout_s=0.1)
            await run_until(listener)
            assert "orders [0] at offset 0" in caplog.text
            assert committed(cluster, partitions=1) == {}
            ended.set()

    asyncio.run(main())


def test_cancelling_run_twice_ends_it_at_once() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def handle(envelope: Received) -> None:
            begun.set()
            await asyncio.sleep(1_000)

        with MockCluster() as cluster:
            send(cluster, 1)
            listener = listener_of(cluster, handle, close_timeout_s=300)
            task = asyncio.create_task(listener.run())
            await asyncio.wait_for(begun.wait(), 60)
            task.cancel()
            await asyncio.sleep(0.1)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: "not running" in repr(listener), "the end of its thread")

    asyncio.run(main())


def test_ctrl_c_ends_asyncio_run_gracefully() -> None:
    handled: list[int] = []
    begun = threading.Event()

    async def main(cluster: MockCluster) -> None:
        async def handle(envelope: Received) -> None:
            begun.set()
            await asyncio.sleep(0.2)
            handled.append(envelope.offset)

        await listener_of(cluster, handle).run()

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 1)
        signal_after(begun, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main(cluster))
        assert handled == [0]
        assert committed(cluster, partitions=1) == {0: 1}


def test_a_handler_may_stop_it_and_may_not_close_it() -> None:
    async def main() -> None:
        refused: list[str] = []

        async def handle(envelope: Received) -> None:
            try:
                await listener.close()
            except RuntimeError as error:
                refused.append(str(error))
            listener.stop()

        with MockCluster() as cluster:
            send(cluster, 1)
            listener = listener_of(cluster, handle)
            await run_until(listener)
            await listener.close()
        assert "call stop" in refused[0]

    asyncio.run(main())


def test_close_from_elsewhere_waits_for_the_end() -> None:
    async def main() -> None:
        seen: list[int] = []

        async def handle(envelope: Received) -> None:
            seen.append(envelope.offset)

        with MockCluster() as cluster:
            send(cluster, 1)
            listener = listener_of(cluster, handle)
            task = asyncio.create_task(listener.run())
            await until(lambda: seen, "a record")
            await listener.close()
            assert "not running" in repr(listener)
            await task

    asyncio.run(main())


def test_a_loop_that_is_held_up_does_not_lose_the_member() -> None:
    async def main() -> None:
        seen: list[int] = []

        async def handle(envelope: Received) -> None:
            if not seen:
                threading.Event().wait(3.0)  # longer than a session
            seen.append(envelope.offset)
            if len(seen) == 5:
                listener.stop()

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 5)
            listener = listener_of(cluster, handle)
            await run_until(listener)
            assert listener.stats()["rebalances"] == 1
        assert seen == list(range(5))

    asyncio.run(main())


def test_each_call_has_the_context_of_run() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def main() -> None:
        seen: list[str] = []

        async def handle(envelope: Received) -> None:
            seen.append(variable.get())
            variable.set("another's")
            if len(seen) == 3:
                listener.stop()

        with MockCluster() as cluster:
            send(cluster, 3)
            listener = listener_of(cluster, handle)
            variable.set("run's")
            await run_until(listener)
        assert seen == ["run's"] * 3

    asyncio.run(main())


def test_it_runs_once_at_a_time_and_again_after_its_end() -> None:
    async def main() -> None:
        seen: list[int] = []

        async def handle(envelope: Received) -> None:
            seen.append(envelope.offset)
            listener.stop()

        with MockCluster() as cluster:
            cluster.create_topic("orders", partitions=1)
            send(cluster, 2)
            listener = listener_of(cluster, handle)
            task = asyncio.create_task(run_until(listener))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="runs already"):
                await listener.run()
            await task
            await run_until(listener)
        assert seen == [0, 1]

    asyncio.run(main())


def test_a_plain_function_is_refused() -> None:
    with pytest.raises(kbatch.ConfigError, match=r"must be a coroutine function.* kbatch\.Listener takes it"):
        aio.Listener({"bootstrap.servers": "localhost:9", "group.id": "g"}, ["orders"], lambda envelope: None)  # type: ignore[arg-type, return-value]
