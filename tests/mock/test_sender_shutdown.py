"""Batched senders that are closed under load, forgotten, forked, cancelled and slowed down: the account is exact."""

import asyncio
import contextlib
import logging
import random
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, KbatchError, aio
from kbatch.testing import MockCluster

from ..waiting import until
from .clients import end_offsets, read_back
from .processes import needs_fork, run

TOPIC = "orders"


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


def config_of(cluster: MockCluster) -> dict[str, Any]:
    soon = {"reconnect.backoff.ms": 10, "reconnect.backoff.max.ms": 100}  # after the broker
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, **soon}


def stored(cluster: MockCluster, topic: str = TOPIC) -> list[str]:
    return [(record.value or b"").decode() for record in read_back(cluster.bootstrap_servers, topic)]


def named(name: str, **options: Any) -> Envelope:
    return Envelope(data=name.encode(), **options)


class Account:
    """What became of each envelope, as the one who sent it knows it."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self.unknown: list[str] = []  # of calls that were cancelled
        self.failed: list[tuple[str, KbatchError]] = []
        self.raised: list[tuple[str, KbatchError]] = []

    def on_failed(self, envelope: Envelope, error: KbatchError) -> None:
        self.failed.append((bytes(envelope.data or b"").decode(), error))

    async def on_failed_async(self, envelope: Envelope, error: KbatchError) -> None:
        await asyncio.sleep(0)
        self.on_failed(envelope, error)

    def check(self, log: list[str], sender: Any, not_sent: int) -> None:
        """That each accepted envelope is in the log once, or told to `on_failed` once, and no other is in either."""
        failed = Counter(name for name, _ in self.failed)
        unsure = {name for name, error in self.failed if is_unsure(error)}
        in_log = Counter(log)
        assert max(in_log.values(), default=1) == 1
        assert max(failed.values(), default=1) == 1
        assert set(self.accepted) <= in_log.keys() | failed.keys()
        assert in_log.keys() | failed.keys() <= {*self.accepted, *self.unknown}
        assert in_log.keys() & failed.keys() <= unsure
        assert not_sent == len(self.failed)
        assert all(is_unsure(error) or isinstance(error, kbatch.SenderClosedError) for _, error in self.failed)
        stats = sender.stats()
        assert len(sender) == stats["buffered"] == stats["in_flight_batches"] == 0
        assert stats["accepted"] == stats["acked"] + stats["failed"]
        assert stats["failed"] == len(self.failed)
        assert stats["acked"] == len(in_log) - len(in_log.keys() & failed.keys())


@contextlib.contextmanager
def told(account: Account) -> Iterator[None]:
    """What on_failed could not be told, since its loop has ended, is raised."""
    try:
        yield
    except kbatch.UndeliveredError as error:
        for envelope, reason in error.failures:
            account.raised.append((bytes(envelope.data or b"").decode(), reason))


def is_unsure(error: KbatchError) -> bool:
    return isinstance(error, kbatch.DeliveryError) and error.possibly_persisted


# -- under load

ROUNDS = 25  # of each of the four ways below


def options_of(chance: random.Random, account: Account) -> tuple[dict[str, Any], dict[str, Any]]:
    batch_size = chance.choice((1, 7, 100))
    batching = {
        "batch_size": batch_size,
        "batch_timeout_ms": chance.choice((0, 1, 20)),
        "max_buffered": batch_size * chance.choice((1, 10, 100)),
        "close_timeout_s": 30,
    }
    sending = {"max_in_flight_batches": chance.choice((1, 2, 5)), "strict_order": chance.random() < 0.25}
    return batching, sending


def check_order(log: list[str]) -> None:
    """What one thread or task sent is in the order of its calls."""
    last: dict[str, int] = {}
    for name in log:
        who, _, number = name.rpartition("-")
        assert last.get(who, -1) < int(number), name
        last[who] = int(number)


TIMEOUTS = (0, 0.002, 0.02, 30)
WAYS = ("close", "with", "drain", "many close", "flush")


@pytest.mark.long
@pytest.mark.parametrize("own_producer", [False, True])
def test_threads_send_while_the_sender_is_closed(kafka_cluster: MockCluster, own_producer: bool) -> None:
    shared = kbatch.Producer(config_of(kafka_cluster))
    for seed in range(ROUNDS):
        chance = random.Random(f"{seed} {own_producer}")
        account = Account()
        batching, sending = options_of(chance, account)
        topic = f"round-{seed}"
        kafka_cluster.create_topic(topic, partitions=1)
        kafka_cluster.set_rtt(1, chance.choice((0, 1, 10)))
        producer = kbatch.Producer(config_of(kafka_cluster)) if own_producer else shared
        agent = kbatch.SendingAgent(producer, topic, on_failed=account.on_failed, **sending)
        sender = kbatch.BatchedSender(agent, **batching)

        def send(who: int, chance: random.Random, sender: kbatch.BatchedSender, account: Account) -> None:
            for number in range(1_000_000):
                name = f"{who}-{number}"
                envelope = named(name, key=f"key {who}")
                try:
                    if chance.random() < 0.5:
                        sender.send(envelope, timeout=chance.choice((None, 0.001, 5)))
                    elif not sender.try_send(envelope):
                        raise kbatch.SenderFullError
                except kbatch.SenderClosedError:
                    account.refused.append(name)
                    return
                except kbatch.SenderFullError:
                    account.refused.append(name)
                else:
                    account.accepted.append(name)
                if number % 50 == 49:
                    time.sleep(0.001)  # bounds what is sent

        way, timeout = chance.choice(WAYS), chance.choice(TIMEOUTS)
        with ThreadPoolExecutor() as pool:
            threads = [
                pool.submit(send, who, random.Random(chance.random()), sender, account)
                for who in range(chance.choice((1, 4)))
            ]
            time.sleep(chance.random() * 0.05)
            if way == "with":
                with sender:
                    pass
            elif way == "drain":
                assert sender.drain() == 0
            elif way == "many close":
                others = [pool.submit(sender.close, timeout) for _ in range(3)]
                assert {sender.close(timeout)} == {other.result() for other in others}
            elif way == "flush":
                sender.flush(timeout)
            not_sent = sender.close(timeout)
            for thread in threads:
                thread.result(60)
        assert sender.close() == not_sent
        if own_producer:
            producer.close()
        else:
            producer.flush()
        log = stored(kafka_cluster, topic)
        account.check(log, sender, not_sent)
        check_order(log)
        if way in ("with", "drain"):
            assert not_sent == 0
    shared.close()


@pytest.mark.long
@pytest.mark.parametrize("loops", [1, 2])
def test_tasks_send_while_the_sender_is_closed(kafka_cluster: MockCluster, loops: int) -> None:
    shared = aio.Producer(config_of(kafka_cluster))

    async def send(who: str, chance: random.Random, sender: aio.BatchedSender, account: Account) -> None:
        for number in range(1_000_000):
            name = f"{who}-{number}"
            envelope = named(name, key=f"key {who}")
            try:
                if chance.random() < 0.5:
                    await sender.send(envelope, timeout=chance.choice((None, 0.001, 5)))
                elif not sender.try_send(envelope):
                    raise kbatch.SenderFullError
            except kbatch.SenderClosedError:
                account.refused.append(name)
                return
            except kbatch.SenderFullError:
                account.refused.append(name)
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                account.unknown.append(name)
                raise
            else:
                account.accepted.append(name)
            if number % 50 == 49:
                await asyncio.sleep(0.001)

    async def senders(who: str, chance: random.Random, sender: aio.BatchedSender, account: Account) -> None:
        tasks = [
            asyncio.create_task(send(f"{who}.{task}", random.Random(chance.random()), sender, account))
            for task in range(chance.choice((1, 10)))
        ]
        for task in tasks:
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.01)
                task.cancel()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert answer is None or isinstance(answer, asyncio.CancelledError), answer

    for seed in range(ROUNDS):
        chance = random.Random(f"{seed} {loops}")
        account = Account()
        batching, sending = options_of(chance, account)
        topic = f"round-{seed}"
        kafka_cluster.create_topic(topic, partitions=1)
        kafka_cluster.set_rtt(1, chance.choice((0, 1, 10)))
        batching["max_buffered"] = min(batching["max_buffered"], 1_000)  # so many can `recent_failures` hold
        agent = aio.SendingAgent(shared, topic, on_failed=account.on_failed_async, **sending)
        sender = aio.BatchedSender(agent, **batching)
        way, timeout = chance.choice(WAYS), chance.choice(TIMEOUTS)

        async def main(
            chance: random.Random, sender: aio.BatchedSender, account: Account, way: str, timeout: float
        ) -> int:
            work = asyncio.create_task(senders("0", random.Random(chance.random()), sender, account))
            await asyncio.sleep(chance.random() * 0.05)
            if way == "with":
                with told(account):
                    async with sender:
                        pass
            elif way == "drain":
                with told(account):
                    assert await sender.drain() == 0
            elif way == "many close":
                with told(account):
                    assert len(set(await asyncio.gather(*(sender.close(timeout) for _ in range(4))))) == 1
            elif way == "flush":
                with told(account):
                    await sender.flush(timeout)
            with told(account):
                await sender.close(timeout)
            await work
            with told(account):
                await sender.close()
            not_sent = await sender.close()
            await shared.flush()
            return not_sent

        with ThreadPoolExecutor() as pool:
            beside = [
                pool.submit(asyncio.run, senders(str(who), random.Random(chance.random()), sender, account))
                for who in range(1, loops)
            ]
            not_sent = asyncio.run(asyncio.wait_for(main(chance, sender, account, way, timeout), 60))
            for each in beside:
                each.result(60)
        until(lambda sender=sender: len(sender) == 0, "the callbacks")  # a loop that has ended is found out in a second
        # What the loop of the first envelope, if it has ended, could not be told.
        for envelope, error in agent.recent_failures:
            account.on_failed(envelope, error)
        raised = [name for name, _ in account.raised]
        assert len(set(raised)) == len(raised)
        assert set(raised) <= {bytes(envelope.data or b"").decode() for envelope, _ in agent.recent_failures}
        log = stored(kafka_cluster, topic)
        account.check(log, sender, not_sent)
        check_order(log)
        if way in ("with", "drain"):
            assert not_sent == 0
    asyncio.run(shared.close())


# -- forgotten, at the end of the interpreter

SENDER = """
    def on_failed(envelope, error):
        print(type(error).__name__, flush=True)
    def make_sender(kind=kbatch, **options):
        agent = kind.SendingAgent(kind.Producer(CONFIG), "orders", on_failed=on_failed)
        return kind.BatchedSender(agent, batch_timeout_ms=60_000, **options)
    """
ENDS = {
    "main returns": (0, ""),
    "sys.exit": (7, "sys.exit(7)"),
    "an exception": (1, "raise ZeroDivisionError"),
    "sys.exit in a thread": (0, "thread = threading.Thread(target=sys.exit, args=(7,)); thread.start(); thread.join()"),
    "a signal handler": (
        7,
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); signal.raise_signal(signal.SIGTERM); time.sleep(9)",
    ),
}


def code(*parts: str) -> str:
    return "\n".join(textwrap.dedent(part) for part in parts)


@pytest.mark.parametrize("end", ENDS)
def test_what_is_buffered_is_sent_before_the_interpreter_ends(cluster: MockCluster, end: str) -> None:
    status, how = ENDS[end]
    result = run(
        cluster,
        code(
            SENDER,
            f"""
            sender = make_sender()
            for envelope in envelopes(2500):
                sender.send(envelope)
            {how}
            """,
        ),
    )
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    assert ("ZeroDivisionError" in result.stderr) == (end == "an exception")
    assert stored(cluster) == [f"m{i}" for i in range(2500)]


def test_what_an_event_loop_left_buffered_is_sent_before_the_interpreter_ends(cluster: MockCluster) -> None:
    result = run(
        cluster,
        code(
            SENDER,
            """
            from kbatch import aio
            async def main():
                global sender
                sender = make_sender(aio)
                for envelope in envelopes(2500):
                    await sender.send(envelope)
            asyncio.run(main())
            """,
        ),
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert stored(cluster) == [f"m{i}" for i in range(2500)]


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_fork), "spawn"])
@pytest.mark.parametrize("made", ["in the child", "before the fork"])
def test_what_a_child_of_multiprocessing_buffered_is_sent_before_it_ends(
    cluster: MockCluster, tmp_path: Path, method: str, made: str
) -> None:
    result = run(
        cluster,
        code(
            SENDER,
            f"""
            import multiprocessing
            unused = make_sender()
            def work():
                sender = unused if {made == "before the fork"} else make_sender()
                for envelope in envelopes(2500):
                    sender.send(envelope)
            if __name__ == "__main__":
                child = multiprocessing.get_context({method!r}).Process(target=work)
                child.start()
                child.join(30)
                print(child.exitcode)
            """,
        ),
        directory=tmp_path,
    )
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr
    assert stored(cluster) == [f"m{i}" for i in range(2500)]


def test_the_interpreter_does_not_wait_for_ever_for_a_broker(cluster: MockCluster) -> None:
    cluster.set_broker_down(1)
    result = run(
        cluster,
        code(
            SENDER,
            """
            sender = make_sender(batch_size=10)
            for envelope in envelopes(75):
                sender.send(envelope)
            """,
        ),
    )
    assert result.returncode == 0, result.stderr
    # Five batches were in flight, by a producer that goes on without the sender.
    assert Counter(result.stdout.split()) == {"DeliveryError": 50, "SenderClosedError": 25}
    cluster.set_broker_up(1)
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_daemon_threads_send_while_the_interpreter_ends(cluster: MockCluster) -> None:
    result = run(
        cluster,
        code(
            SENDER,
            """
            sender = make_sender(batch_size=10)
            turns = []
            def loop():
                while True:
                    try:
                        sender.send(kbatch.Envelope(data=b"x"), timeout=60)
                    except kbatch.SenderClosedError:
                        time.sleep(0.001)
                    turns.append(1)
            for _ in range(4):
                threading.Thread(target=loop, daemon=True).start()
            while len(turns) < 1000:
                time.sleep(0.001)
            print("end", flush=True)
            """,
        ),
    )
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr
    assert result.stderr == ""


# -- forks


@needs_fork[0]
@needs_fork[1]
def test_a_used_sender_refuses_in_a_forked_child_and_goes_on_in_the_parent(cluster: MockCluster) -> None:
    cluster.create_topic("child", partitions=1)
    result = run(
        cluster,
        code(
            SENDER,
            """
            sender = make_sender()
            unused = kbatch.BatchedSender(kbatch.SendingAgent(kbatch.Producer(CONFIG), "child"))
            for envelope in envelopes(1500):
                sender.send(envelope)
            def refused(call):
                try:
                    call()
                except kbatch.ForkError as error:
                    assert "post_fork" in str(error)
                else:
                    raise AssertionError(call)
            for ending in (sys.exit, os._exit, None):
                child = os.fork()
                if child == 0:
                    signal.alarm(30)
                    refused(lambda: sender.send(kbatch.Envelope(1)))
                    refused(lambda: sender.try_send(kbatch.Envelope(1)))
                    refused(sender.flush)
                    refused(sender.drain)
                    len(sender), repr(sender), sender.stats(), sender.closed, sender.agent.state
                    if ending is None:
                        unused.send(kbatch.Envelope(data=b"by the child"))
                        unused.close()
                    else:
                        assert sender.close() == 0
                        ending(0)
                    os._exit(0)
                status = os.waitpid(child, 0)[1]
                assert status == 0, status
            assert len(sender) >= 500  # the batch that is not full
            for envelope in envelopes(1500):
                sender.send(envelope)
            print(sender.close(), unused.close())
            """,
        ),
    )
    assert (result.returncode, result.stdout) == (0, "0 0\n"), result.stderr
    assert stored(cluster) == [f"m{i}" for _ in range(2) for i in range(1500)]
    assert stored(cluster, "child") == ["by the child"]


@needs_fork[0]
@needs_fork[1]
def test_a_fork_while_threads_send(cluster: MockCluster) -> None:
    cluster.set_rtt(1, 10)  # bounds what is sent
    result = run(
        cluster,
        code(
            SENDER,
            """
            sender = make_sender(batch_size=10, max_buffered=100)
            stop = threading.Event()
            def send(who):
                number = 0
                while not stop.is_set():
                    sender.send(kbatch.Envelope(data=b"%d-%d" % (who, number)))
                    number += 1
                    if number % 100 == 0:
                        time.sleep(0.001)
                sent.append(number)
            sent = []
            threads = [threading.Thread(target=send, args=(who,)) for who in range(3)]
            for thread in threads:
                thread.start()
            for number in range(20):
                time.sleep(0.01)
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    try:
                        sender.send(kbatch.Envelope(data=b"by the child"), timeout=5)
                    except kbatch.ForkError:
                        if number % 2:
                            os._exit(0)
                        sys.exit(0)
                    os._exit(1)
                status = os.waitpid(child, 0)[1]
                if status:
                    print("a child's status", status, flush=True)
                    os._exit(1)
            stop.set()
            for thread in threads:
                thread.join()
            assert sender.close() == 0
            print(sum(sent))
            """,
        ),
    )
    assert result.returncode == 0, (result.stdout, result.stderr)
    log = stored(cluster)
    assert len(set(log)) == len(log) == int(result.stdout)
    check_order(log)


# -- cancellation

STEPS = range(12)


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


def make_aio_sender(cluster: MockCluster, account: Account, **options: Any) -> tuple[aio.Producer, aio.BatchedSender]:
    producer = aio.Producer(config_of(cluster))
    return producer, aio.BatchedSender(aio.SendingAgent(producer, TOPIC, on_failed=account.on_failed_async), **options)


@pytest.mark.long
@pytest.mark.parametrize("state", ["not started", "started", "full"])
def test_sending_is_cancelled_at_every_await(cluster: MockCluster, state: str) -> None:
    account = Account()
    senders = []

    async def main() -> None:
        for step in STEPS:
            producer, sender = make_aio_sender(cluster, account, batch_size=1, max_buffered=1)
            senders.append(sender)
            if state != "not started":
                await sender.send(named(f"first-{step}"))
                account.accepted.append(f"first-{step}")
                await sender.flush()
            if state == "full":
                cluster.set_broker_down(1)
                await sender.send(named(f"second-{step}"))
                account.accepted.append(f"second-{step}")
            if await cancel_after(step, sender.send(named(f"third-{step}"))):
                account.unknown.append(f"third-{step}")
            else:
                account.accepted.append(f"third-{step}")
            with contextlib.suppress(kbatch.SenderFullError):  # a place that was waited for in vain is not lost
                cluster.set_broker_up(1)
                await sender.send(named(f"fourth-{step}"), timeout=30)
                account.accepted.append(f"fourth-{step}")
            assert await sender.close() == 0
            assert sender.stats()["accepted"] == sender.stats()["acked"]
            await producer.close()

    asyncio.run(asyncio.wait_for(main(), 90))
    assert {f"fourth-{step}" for step in STEPS} <= set(account.accepted)
    log = Counter(stored(cluster))
    assert set(log.values()) == {1}
    assert set(account.accepted) <= log.keys() <= {*account.accepted, *account.unknown}
    assert account.failed == []
    assert "third-0" not in log  # cancelled before its first step, a coroutine does not run at all
    assert sum(sender.stats()["accepted"] for sender in senders) == len(log)


@pytest.mark.long
@pytest.mark.parametrize("how", ["flush", "drain", "close", "with"])
def test_ending_is_cancelled_at_every_await(cluster: MockCluster, how: str) -> None:
    """It goes on without the task, or can be asked for again."""

    async def leave(sender: aio.BatchedSender) -> None:
        async with sender:
            pass

    async def main() -> None:
        for step in STEPS:
            producer, sender = make_aio_sender(cluster, account, batch_size=10, batch_timeout_ms=60_000)
            for number in range(25):
                await sender.send(named(f"{step}-{number}"))
            cluster.set_broker_down(1)
            work = leave(sender) if how == "with" else getattr(sender, how)()
            assert await cancel_after(step, work)
            cluster.set_broker_up(1)
            assert await sender.close() == 0
            assert len(sender) == 0
            assert sender.stats()["acked"] == 25
            with pytest.raises(kbatch.SenderClosedError):
                await sender.send(named("too late"))
            await producer.close()

    account = Account()
    asyncio.run(asyncio.wait_for(main(), 90))
    assert stored(cluster) == [f"{step}-{number}" for step in STEPS for number in range(25)]
    assert account.failed == []


# -- loops


def test_two_loops_share_a_sender(cluster: MockCluster) -> None:
    """The loop of the first envelope ends before the other."""
    account = Account()
    producer, sender = make_aio_sender(cluster, account, batch_size=10, max_buffered=20)
    count = 1_000

    async def send(who: int) -> None:
        for number in range(count * (who + 1)):
            await sender.send(named(f"{who}-{number}"))

    async def end() -> int:
        try:
            return await sender.close()
        finally:
            await producer.close()

    with ThreadPoolExecutor() as pool:
        for each in [pool.submit(asyncio.run, send(who)) for who in range(2)]:
            each.result(60)
    assert asyncio.run(end()) == 0
    log = stored(cluster)
    check_order(log)
    assert sorted(log) == sorted(f"{who}-{number}" for who in range(2) for number in range(count * (who + 1)))


# -- callbacks

BAD = object()  # cannot be encoded


def test_a_slow_callback_delays_nothing_but_callbacks(cluster: MockCluster) -> None:
    go_on = threading.Event()
    told: list[int] = []

    def on_failed(envelope: Envelope, error: KbatchError) -> None:
        assert go_on.wait(60)
        told.append(envelope.attempts)

    with kbatch.Producer(config_of(cluster)) as producer:
        sender = kbatch.BatchedSender(kbatch.SendingAgent(producer, TOPIC, on_failed=on_failed), batch_size=10)
        for number in range(100):
            sender.send(Envelope(BAD, attempts=number) if number % 10 == 0 else named(str(number)))
        until(lambda: sender.stats()["acked"] == 90, "what can be sent")
        assert told == []
        assert sender.flush(0.01) == len(sender) == 10  # they have no outcome before the callback has ended
        go_on.set()
        assert sender.close() == 0  # given up before
    assert told == list(range(0, 100, 10))
    assert stored(cluster) == [str(number) for number in range(100) if number % 10]


def test_closing_does_not_wait_for_a_callback_that_does_not_end(cluster: MockCluster) -> None:
    go_on = threading.Event()
    with kbatch.Producer(config_of(cluster)) as producer:
        agent = kbatch.SendingAgent(producer, TOPIC, on_failed=lambda envelope, error: go_on.wait(60))
        sender = kbatch.BatchedSender(agent)
        sender.send(Envelope(BAD))
        sender.send(named("good"))
        sender.close(0.1)
        assert not go_on.is_set()
        go_on.set()
        until(lambda: len(sender) == 0, "the end of the callback")
    assert stored(cluster) == ["good"]


@pytest.mark.parametrize("kind", ["function", "coroutine function", "started by try_send"])
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, asyncio.CancelledError])
def test_callbacks_that_raise_lose_nothing(
    cluster: MockCluster, caplog: pytest.LogCaptureFixture, error: type[BaseException], kind: str
) -> None:
    caplog.set_level(logging.CRITICAL, "kbatch")

    def on_failed(envelope: Envelope, _: KbatchError) -> None:
        called.append(envelope.attempts)
        raise error

    async def on_failed_async(envelope: Envelope, _: KbatchError) -> None:
        await asyncio.sleep(0)
        on_failed(envelope, _)

    def each(sender: Any) -> Iterator[Envelope]:
        for number in range(100):
            yield Envelope(BAD, attempts=number) if number % 10 == 0 else named(str(number))

    async def main() -> None:
        async with aio.Producer(config_of(cluster)) as producer:
            agents.append(agent := aio.SendingAgent(producer, TOPIC, on_failed=on_failed_async))
            async with aio.BatchedSender(agent) as sender:
                for envelope in each(sender):
                    if kind == "started by try_send":
                        assert sender.try_send(envelope)
                    else:
                        await sender.send(envelope)
                with pytest.raises(kbatch.UndeliveredError) as caught:
                    await sender.flush(30)
                lost.append(caught.value)

    called: list[int] = []
    lost: list[kbatch.UndeliveredError] = []
    agents: list[Any] = []
    if kind == "function":
        with kbatch.Producer(config_of(cluster)) as producer:
            agents.append(agent := kbatch.SendingAgent(producer, TOPIC, on_failed=on_failed))
            with kbatch.BatchedSender(agent) as sender:
                for envelope in each(sender):
                    sender.send(envelope)
                with pytest.raises(kbatch.UndeliveredError) as caught:
                    sender.flush(30)
                lost.append(caught.value)
    elif error is SystemExit:
        return  # it ends the loop, as everywhere in asyncio
    else:
        asyncio.run(asyncio.wait_for(main(), 60))
    assert called == [envelope.attempts for envelope, _ in agents[0].recent_failures] == list(range(0, 100, 10))
    assert called == [envelope.attempts for envelope, _ in lost[0].failures]
    assert {type(reason) for _, reason in agents[0].recent_failures} == {kbatch.SerializationError}
    assert stored(cluster) == [str(number) for number in range(100) if number % 10]
