"""Exactly one callback for each way to send, whatever comes at whatever line, and the next send works."""

import asyncio
import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kbatch
from kbatch import CircuitState, Envelope, OutgoingBatch, aio
from kbatch.testing import MockCluster
from tests.injection import Injected, Injector
from tests.loops import beside
from tests.waiting import until

KINDS = [Injected, KeyboardInterrupt, SystemExit, MemoryError, asyncio.CancelledError]


# Between two lines of which one makes a coroutine and the next awaits it.
NEVER_AWAITED = pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")


@pytest.fixture(scope="module")
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("t")
        yield cluster


SOON: Any = {"probe_interval_s": 0.02, "max_probe_interval_s": 0.02}  # the trial after one that an exception has ended


class Told(kbatch.SenderCallback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def mark_successful(self, batch: Any, report: Any) -> None:
        self.told.append("successful")  # first: an exception may come below
        assert report.acked == len(batch)

    def mark_processing_failure(self, batch: Any, error: Any) -> None:
        self.told.append("failed")
        assert error.report is not None
        assert error.report.failed == len(batch)

    def mark_serialization_failure(self, batch: Any, error: Any) -> None:
        self.mark_processing_failure(batch, error)


class AioTold(aio.SenderCallback):
    def __init__(self) -> None:
        self.told: list[str] = []

    async def mark_successful(self, batch: Any, report: Any) -> None:
        self.told.append("successful")
        await asyncio.sleep(0)  # first: an exception may come below
        assert report.acked == len(batch)

    async def mark_processing_failure(self, batch: Any, error: Any) -> None:
        self.told.append("failed")
        await asyncio.sleep(0)
        assert error.report.failed == len(batch)

    async def mark_serialization_failure(self, batch: Any, error: Any) -> None:
        await self.mark_processing_failure(batch, error)


def producer_of(cluster: MockCluster, transactional: str | None = None) -> kbatch.Producer:
    more = {} if transactional is None else {"transactional.id": transactional}
    return kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, **more})


@contextlib.contextmanager
def silenced(producer: kbatch.Producer) -> Iterator[kbatch.Producer]:
    """Of a send that was interrupted its caller is told nothing, so the producer tells at its end."""
    try:
        yield producer
    finally:
        with contextlib.suppress(kbatch.UndeliveredError):
            producer.close()


def inject_everywhere(run: Callable[[Injector], None], make: Any = Injected, step: int = 1) -> int:
    for nth in itertools.count(1, step):
        injector = Injector(nth, make)
        try:
            run(injector)
        except BaseException as error:
            error.add_note(f"raised at line {nth}: {injector.place}") if hasattr(error, "add_note") else None
            raise
        if injector.place is None:
            return nth
    raise AssertionError


def half_open(agent: Any) -> None:
    """Now the next batch is the trial."""
    agent._gate.circuit.state = CircuitState.HALF_OPEN


def batch() -> OutgoingBatch:
    return OutgoingBatch([Envelope(1), Envelope(2)])


@pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("transactional", [False, True])
def test_a_sender(cluster: MockCluster, make: Any, transactional: bool) -> None:
    with producer_of(cluster, f"s-{make.__name__}" if transactional else None) as producer:
        sender = kbatch.KafkaSender(producer, "t")

        def run(injector: Injector) -> None:
            told, after, outgoing = Told(), Told(), batch()
            injector.run(lambda: sender.send_batch(told, outgoing))
            until(lambda: told.told, "the callback", 10)
            sender.send_batch(after, batch())
            assert (len(told.told), after.told) == (1, ["successful"]), injector.place

        assert inject_everywhere(run, make) > 5
        assert producer.flush(30) == 0
        until(lambda: producer.stats()["pinned_buffers"] == 0, "all given back")


@pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("fresh", [False, True], ids=["trial", "first"])
def test_an_agent(cluster: MockCluster, make: Any, fresh: bool) -> None:
    with producer_of(cluster) as producer:
        agents = [kbatch.SendingAgent(producer, "t", **SOON)]
        agents[0].send_batch(Told(), batch())

        def run(injector: Injector) -> None:
            if fresh:
                agents.append(kbatch.SendingAgent(producer, "t", **SOON))
            agent = agents[-1]
            if not fresh:
                half_open(agent)
            told, after, outgoing = Told(), Told(), batch()
            injector.run(lambda: agent.send_batch(told, outgoing))
            until(lambda: told.told, "the callback", 10)
            until(agent._gate.circuit.may_send, "the end of the trial")
            agent.send_batch(after, batch())
            assert (len(told.told), after.told) == (1, ["successful"]), injector.place
            assert agent.state is CircuitState.CLOSED
            assert agent._has_thread()
            if fresh:
                agents.pop().close()

        assert inject_everywhere(run, make) > 20
        agents[0].close()


@pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)
def test_a_batched_sender(cluster: MockCluster, make: Any) -> None:
    with producer_of(cluster) as producer:

        def run(injector: Injector) -> None:
            failed: list[Any] = []
            agent = kbatch.SendingAgent(producer, "t", on_failed=lambda *what: failed.append(what))
            sender = kbatch.BatchedSender(agent, batch_timeout_ms=0)
            error = injector.run(lambda: sender.send(Envelope(data=b"x")))
            sender.send(Envelope(data=b"y"))
            assert sender.flush(20) == 0, injector.place
            accepted = sender.stats()["accepted"]
            assert sender.stats()["acked"] == accepted, injector.place
            assert accepted == 2 or error is not None
            assert failed == []
            assert sender.close(20) == 0

        assert inject_everywhere(run, make) > 20


@pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)
def test_an_inline_sender(cluster: MockCluster, make: Any) -> None:
    with silenced(producer_of(cluster)) as producer, kbatch.InlineSender(producer, "t") as sender:

        def run(injector: Injector) -> None:
            reports: list[Any] = []
            error = injector.run(lambda: reports.append(sender.send(Envelope(1))))
            assert (error is None) == bool(reports)
            assert sender.send(Envelope(2)).ok

        assert inject_everywhere(run, make) > 5
        until(lambda: producer.stats()["pinned_buffers"] == 0, "all given back")


@NEVER_AWAITED
@pytest.mark.parametrize("make", [Injected, MemoryError, asyncio.CancelledError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["sender", "trial", "first"])
def test_on_an_event_loop(cluster: MockCluster, make: Any, way: str) -> None:
    with producer_of(cluster) as producer:
        # A `BaseException` leaves `run_until_complete` at once, so each run has its loop.
        def run(injector: Injector) -> None:
            loop = asyncio.new_event_loop()
            on_loop = beside(producer)
            agent = None if way == "sender" else aio.SendingAgent(on_loop, "t", **SOON)
            sender: Any = aio.KafkaSender(on_loop, "t") if agent is None else agent
            if agent is not None and way == "trial":
                loop.run_until_complete(agent.send_batch(AioTold(), batch()))
                half_open(agent)
            told, after, outgoing = AioTold(), AioTold(), batch()
            injector.run(lambda: loop.run_until_complete(sender.send_batch(told, outgoing)))
            end = time.monotonic() + 10
            # The trial ends with the callback, which runs on the loop.
            while not (told.told and (agent is None or agent._gate.circuit.may_send())) and time.monotonic() < end:
                loop.run_until_complete(asyncio.sleep(0.002))
            assert len(told.told) == 1, injector.place
            loop.run_until_complete(asyncio.wait_for(sender.send_batch(after, batch()), 10))
            assert (len(told.told), after.told) == (1, ["successful"]), injector.place
            if agent is not None:
                assert agent.state is CircuitState.CLOSED
                loop.run_until_complete(agent.close())
            loop.close()

        assert inject_everywhere(run, make) > 20
        until(lambda: producer.stats()["pinned_buffers"] == 0, "all given back")


@NEVER_AWAITED
@pytest.mark.parametrize("make", [Injected, MemoryError, asyncio.CancelledError], ids=lambda kind: kind.__name__)
def test_an_inline_sender_on_an_event_loop(cluster: MockCluster, make: Any) -> None:
    with silenced(producer_of(cluster)) as producer:

        def run(injector: Injector) -> None:
            loop = asyncio.new_event_loop()
            sender = aio.InlineSender(beside(producer), "t")
            reports: list[Any] = []

            async def send() -> None:
                reports.append(await sender.send(Envelope(1)))

            error = injector.run(lambda: loop.run_until_complete(send()))
            assert (error is None) == bool(reports), injector.place
            report = loop.run_until_complete(asyncio.wait_for(sender.send(Envelope(2)), 10))
            assert report.ok, injector.place
            loop.run_until_complete(sender.close())
            loop.close()

        assert inject_everywhere(run, make) > 10
        until(lambda: producer.stats()["pinned_buffers"] == 0, "all given back")


@NEVER_AWAITED
@pytest.mark.parametrize("make", [Injected, MemoryError, asyncio.CancelledError], ids=lambda kind: kind.__name__)
def test_a_batched_sender_on_an_event_loop(cluster: MockCluster, make: Any) -> None:
    with producer_of(cluster) as producer:

        def run(injector: Injector) -> None:
            loop = asyncio.new_event_loop()
            failed: list[Any] = []
            agent = aio.SendingAgent(beside(producer), "t", on_failed=lambda *what: failed.append(what))
            sender = aio.BatchedSender(agent, batch_timeout_ms=0)
            error = injector.run(lambda: loop.run_until_complete(sender.send(Envelope(data=b"x"))))
            loop.run_until_complete(asyncio.wait_for(sender.send(Envelope(data=b"y")), 10))
            assert loop.run_until_complete(asyncio.wait_for(sender.flush(20), 30)) == 0, injector.place
            accepted = sender.stats()["accepted"]
            assert sender.stats()["acked"] == accepted, injector.place
            assert accepted == 2 or error is not None
            assert failed == []
            assert loop.run_until_complete(asyncio.wait_for(sender.close(20), 30)) == 0, injector.place
            loop.close()

        assert inject_everywhere(run, make) > 20


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="platform: there are no such signals")
def test_ctrl_c_again_while_the_answer_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    start, left, told = threading.Thread.start, [2], Told()

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "kbatch-callbacks" and left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        start(thread)

    def handler(*_: object) -> None:
        raise Injected

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with MockCluster() as cluster:
        cluster.create_topic("t")
        with silenced(producer_of(cluster)) as producer:
            sender = kbatch.KafkaSender(producer, "t")
            sender.send_batch(Told(), batch())
            cluster.set_rtt(1, 500)
            before = signal.signal(signal.SIGALRM, handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(Injected):
                    sender.send_batch(told, batch())
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            until(lambda: told.told, "the answer", 10)
            assert left == [0]
    assert told.told == ["successful"]


def test_a_task_that_is_cancelled_before_it_began_has_its_answer(cluster: MockCluster) -> None:
    told = AioTold()

    async def main() -> None:
        async with aio.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            task = asyncio.create_task(aio.KafkaSender(producer, "t").send_batch(told, batch()))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert told.told == ["failed"]
