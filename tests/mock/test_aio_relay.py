"""The relay for asyncio: the same machinery, its thread hidden; a cancelled run gives its buckets back."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

import kbatch
from kbatch import CircuitState, ConfigError, OutboxError, SenderClosedError, SqliteOutbox, aio
from kbatch.testing import MockCluster
from tests import outboxes
from tests.relays import WatchedOutbox, check_history, numbered
from tests.waiting import until

from .clients import read_back


@pytest.fixture
def outbox(tmp_path: Path) -> SqliteOutbox:
    return outboxes.made(tmp_path, wire="raw")


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    yield
    until(lambda: "kbatch-relay" not in [thread.name for thread in threading.enumerate()], "the end of all threads")


def config(cluster: MockCluster, **own: Any) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "delivery.timeout.ms": 3000, **own}


def owners(outbox: SqliteOutbox) -> list[Any]:
    return outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}")


async def comes(condition: Any) -> None:
    async with asyncio.timeout(30) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
        while not condition():
            await asyncio.sleep(0.005)


def test_it_takes_what_the_other_one_takes() -> None:
    of_threads, of_loops = (inspect.signature(kind.__init__) for kind in (kbatch.Relay, aio.Relay))
    assert list(of_threads.parameters.values()) == list(of_loops.parameters.values())
    assert {name for name in vars(kbatch.Relay) if name[0] != "_"} == {
        name for name in vars(aio.Relay) if name[0] != "_"
    }


def test_it_drains(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    async def main() -> None:
        async with aio.Relay(outbox, config(kafka_cluster)) as relay:
            outboxes.add(outbox, numbered(range(500)))
            assert await relay.drain(30) == 0
            assert relay.stats()["acked"] == 500
            assert repr(relay).startswith("<kbatch.aio.Relay of <kbatch.SqliteOutbox")

    asyncio.run(main())
    check_history(range(500), read_back(kafka_cluster.bootstrap_servers, "orders"))
    assert owners(outbox) == [(None,)]


def test_what_tasks_add_by_an_outbox_for_asyncio_is_sent(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    other = aio.SqliteOutbox(outbox._path, wire="raw")

    async def add(connection: aiosqlite.Connection, numbers: range, ends: Callable[[], Awaitable[None]]) -> None:
        await connection.execute("BEGIN IMMEDIATE")
        assert await other.add(connection, numbered(numbers), topic="orders") == len(numbers)
        await ends()

    async def main() -> None:
        async with aio.Relay(other, config(kafka_cluster)) as relay, aiosqlite.connect(outbox._path) as connection:
            run = asyncio.create_task(relay.run())
            for first in range(0, 500, 50):
                await add(connection, range(1000, 1100), connection.rollback)
                await add(connection, range(first, first + 50), connection.commit)
            assert await relay.drain(30) == 0
            relay.stop()
            await run
            topic = aio.KafkaTopic(
                "orders", kbatch.SenderMode.DURABLE, outbox=other, config=config(kafka_cluster), relay={}
            )
            async with topic.create_sender() as sender:
                (last,) = numbered(range(500, 501))
                await connection.execute("BEGIN IMMEDIATE")
                assert await sender.send(last, connection=connection)
                await connection.commit()

    asyncio.run(main())
    check_history(range(501), read_back(kafka_cluster.bootstrap_servers, "orders"))


def test_it_runs_until_stop_and_the_loop_goes_on_meanwhile(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    async def main() -> None:
        async with aio.Relay(outbox, config(kafka_cluster)) as relay:
            run = asyncio.create_task(relay.run())
            for first in range(0, 500, 50):
                outboxes.add(outbox, numbered(range(first, first + 50)))
                await asyncio.sleep(0.01)
            assert await relay.drain(30) == 0
            with pytest.raises(RuntimeError, match="runs already"):
                await relay.run()
            assert not run.done()
            relay.stop()
            await run
            assert owners(outbox) == [(None,)]
            outboxes.add(outbox, numbered(range(500, 550)))
            assert await relay.drain(30) == 0  # it may run again
        with pytest.raises(SenderClosedError):
            await relay.run()

    asyncio.run(main())
    check_history(range(550), read_back(kafka_cluster.bootstrap_servers, "orders"))


def test_a_cancelled_run_ends_with_what_is_in_flight_written_and_its_buckets_given_back(
    outbox: SqliteOutbox, kafka_cluster: MockCluster
) -> None:
    kafka_cluster.set_rtt(-1, 200)

    async def main() -> None:
        async with aio.Relay(outbox, config(kafka_cluster), batch_size=50) as relay:
            outboxes.add(outbox, numbered(range(1000)))
            run = asyncio.create_task(relay.run())
            await comes(lambda: relay.stats()["in_flight"])
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert owners(outbox) == [(None,)]
            assert outbox.status().waiting == 1000 - relay.stats()["acked"] < 1000
            kafka_cluster.set_rtt(-1, 0)
            assert await relay.drain(30) == 0  # the cancelled run has stopped nothing else

    asyncio.run(main())
    check_history(range(1000), read_back(kafka_cluster.bootstrap_servers, "orders"))


def test_cancelled_twice_it_ends_at_once_and_its_thread_soon(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    kafka_cluster.set_rtt(-1, 500)

    async def main() -> None:
        relay = aio.Relay(outbox, config(kafka_cluster))
        outboxes.add(outbox, numbered(range(10)))
        run = asyncio.create_task(relay.run())
        await comes(lambda: relay.stats()["in_flight"])
        for _ in range(2):
            run.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await run
        assert owners(outbox) != [(None,)]
        await relay.close()

    asyncio.run(main())
    assert owners(outbox) == [(None,)]


def test_a_cancelled_drain_ends_and_a_run_beside_it_goes_on(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    kafka_cluster.set_broker_down()

    async def main() -> None:
        async with aio.Relay(outbox, config(kafka_cluster, **{"delivery.timeout.ms": 500})) as relay:
            outboxes.add(outbox, numbered(range(10)))
            alone = asyncio.create_task(relay.drain())
            await comes(lambda: relay.stats()["buckets"])
            alone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await alone
            assert owners(outbox) == [(None,)]
            run = asyncio.create_task(relay.run())
            await comes(lambda: relay.stats()["buckets"])
            beside = asyncio.create_task(relay.drain())
            await asyncio.sleep(0.1)
            beside.cancel()
            with pytest.raises(asyncio.CancelledError):
                await beside
            assert not run.done()
            assert await relay.drain(0.1) == 10
            relay.stop()
            await run

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["function", "coroutine function"])
def test_its_circuit_is_told_on_its_loop(outbox: SqliteOutbox, kafka_cluster: MockCluster, kind: str) -> None:
    told: list[CircuitState] = []
    threads: set[str] = set()
    outboxes.add(outbox, numbered(range(10)))
    kafka_cluster.set_broker_down()

    def plain(before: CircuitState, after: CircuitState) -> None:
        told.append(after)
        threads.add(threading.current_thread().name)

    async def later(before: CircuitState, after: CircuitState) -> None:
        await asyncio.sleep(0)
        plain(before, after)

    async def main() -> None:
        settings = config(kafka_cluster, **{"delivery.timeout.ms": 300, "reconnect.backoff.max.ms": 100})
        options: Any = {"failures_to_open": 1, "probe_interval_s": 0.05, "max_probe_interval_s": 0.1}
        told_by = plain if kind == "function" else later
        async with aio.Relay(outbox, settings, on_state_change=told_by, **options) as relay:
            assert (relay.state, relay.last_error) == (CircuitState.CLOSED, None)
            run = asyncio.create_task(relay.run())
            await comes(lambda: told)
            assert isinstance(relay.last_error, kbatch.DeliveryError)
            kafka_cluster.set_broker_up()
            await comes(lambda: told[-1] is CircuitState.CLOSED)
            assert relay.state is CircuitState.CLOSED
            relay.stop()
            await run

    asyncio.run(main())
    assert told[0] is CircuitState.OPEN
    assert threads == {threading.current_thread().name}


@pytest.mark.parametrize("kind", ["function", "coroutine function"])
def test_its_dead_letters_are_told_on_its_loop(outbox: SqliteOutbox, kafka_cluster: MockCluster, kind: str) -> None:
    told: list[tuple[bytes | None, str]] = []
    kafka_cluster.create_topic("refused", 1)
    kafka_cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(10), topic="refused"), topic=None)

    def plain(letter: kbatch.DeadLetter) -> None:
        told.append((letter.envelope.data, threading.current_thread().name))

    async def later(letter: kbatch.DeadLetter) -> None:
        await asyncio.sleep(0)
        plain(letter)

    async def main() -> None:
        on_dead = plain if kind == "function" else later
        once = kbatch.RetryPolicy(max_attempts=1)
        async with aio.Relay(outbox, config(kafka_cluster), retry=once, on_dead=on_dead) as relay:
            assert await relay.drain(30) == 0

    asyncio.run(main())
    assert sorted(told) == [(b"%d" % n, threading.current_thread().name) for n in range(10)]


def test_a_coroutine_function_for_dead_letters_may_close_it_and_may_be_cancelled(
    outbox: SqliteOutbox, kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    kafka_cluster.create_topic("refused", 1)
    kafka_cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    outboxes.add(outbox, numbered(range(3), topic="refused", keys=1), topic=None)

    async def on_dead(letter: kbatch.DeadLetter) -> None:
        told.append(letter.number)
        if len(told) == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(60)
        await relay.close()

    async def main() -> None:
        nonlocal relay
        once = kbatch.RetryPolicy(max_attempts=1)
        relay = aio.Relay(outbox, config(kafka_cluster), retry=once, on_dead=on_dead)
        await relay.run()
        await relay.close()
        await comes(lambda: len(told) == outbox.status().dead)

    relay: Any = None
    asyncio.run(main())
    assert len(told) >= 2
    assert caplog.text.count("on_dead failed: ") == 1


def test_the_end_of_its_loop_ends_it(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    relay = aio.Relay(outbox, config(kafka_cluster), close_timeout_s=0.0)

    async def main() -> None:
        task = asyncio.create_task(relay.run())
        await comes(lambda: relay.stats()["buckets"])
        assert not task.done()

    asyncio.run(main())  # cancels the task
    assert owners(outbox) == [(None,)]
    asyncio.run(relay.close())


def test_errors_are_those_of_the_other_one(outbox: SqliteOutbox, tmp_path: Path, kafka_cluster: MockCluster) -> None:
    async def main() -> None:
        async with aio.Relay(SqliteOutbox(tmp_path / "none.db"), config(kafka_cluster)) as relay:
            with pytest.raises(OutboxError, match="call create"):
                await relay.run()
            with pytest.raises(ValueError, match="timeout must be"):
                await relay.drain(-1)
        await relay.close()

    asyncio.run(main())
    with pytest.raises(ConfigError, match=r"a relay takes no kbatch\.aio\.Producer"):
        aio.Relay(outbox, aio.Producer(config(kafka_cluster)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lease_s must be"):
        aio.Relay(outbox, config(kafka_cluster), lease_s=1.0)
    with pytest.raises(TypeError, match=r"Relay\(\) got an unexpected keyword argument 'colour'"):
        aio.Relay(outbox, config(kafka_cluster), colour=1)  # type: ignore[call-arg]


def test_close_waits_for_a_run_in_another_task(outbox: SqliteOutbox, kafka_cluster: MockCluster) -> None:
    left: list[str] = []
    watched = WatchedOutbox(outbox, after=lambda name: left.append(name) if name == "leave" else None)

    async def main() -> None:
        relay = aio.Relay(watched, config(kafka_cluster))
        run = asyncio.create_task(relay.run())
        await comes(lambda: relay.stats()["buckets"])
        await relay.close()
        assert left == ["leave"]
        await run

    asyncio.run(main())
