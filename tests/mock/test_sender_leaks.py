"""The senders keep nothing of what they have sent, refused or given up; nothing is left of one that is closed."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, OutgoingBatch, SendingAgent, Tombstone, aio
from kbatch._fastmap import pinned_buffers
from kbatch.testing import MemoryProducer, MockCluster

from ..loops import beside
from ..waiting import until
from .test_stored_records import TOPIC, Unwritable, leaks_of, make_producer

REPEAT = 60


def things() -> tuple[list[Any], list[Any]]:
    """Envelopes that can be sent, and what is watched."""
    body, view, key, value = b"body" * 100, bytearray(b"view"), "kéy" * 9, "valué" * 9
    envelopes = [
        Envelope(data=body, key=key),
        Envelope(data=view, headers={"a": value}),
        Envelope({"a": 1}),
        Tombstone(key),
    ]
    return envelopes, [body, view, key, value, *envelopes]


def running() -> list[str]:
    """The senders' own threads."""
    names = ("kbatch-sender", "kbatch-probe", "kbatch-close", "kbatch-start")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def check_leaks(step: Callable[[], object], watched: list[Any]) -> None:
    def is_little(objects: int, references: list[int]) -> bool:
        # The last batches and the last failures may still be in the hands of a thread.
        return objects < 60 and all(count <= 8 for count in references)

    left = leaks_of(step, watched, REPEAT, is_little=is_little)
    assert is_little(*left), left
    # The dispatcher tells of a batch first, and then gives back its buffers.
    until(lambda: pinned_buffers() == 0, "the buffers of the last batch")


def test_a_batched_sender(kafka_cluster: MockCluster) -> None:
    envelopes, watched = things()
    bad = Envelope(Unwritable(), key="bad")
    told: list[int] = []
    with make_producer(kafka_cluster) as producer:
        agent = SendingAgent(producer, TOPIC, on_failed=lambda envelope, error: told.append(1))
        with kbatch.BatchedSender(agent, batch_size=3) as sender:

            def step() -> None:
                for envelope in envelopes:
                    sender.send(envelope)
                    assert sender.try_send(envelope)
                sender.send(bad)
                assert (sender.flush(), len(sender)) == (0, 0)
                assert sender.stats()["buffered"] == 0
                with pytest.raises(TypeError):
                    sender.send(watched)  # type: ignore[arg-type]

            check_leaks(step, [*watched, bad])
        until(lambda: len(told) == REPEAT + 5, "the last failure")


def test_a_batched_sender_that_is_full() -> None:
    envelopes, watched = things()
    later = Envelope(1, scheduled_time=datetime(9000, 1, 1, tzinfo=timezone.utc))
    with MemoryProducer() as producer:
        agent = SendingAgent(producer, TOPIC, on_failed=lambda envelope, error: None)
        sender = kbatch.BatchedSender(agent, batch_size=1, max_buffered=2)
        for _ in range(2):
            sender.send(later)

        def step() -> None:
            for envelope in envelopes:
                assert not sender.try_send(envelope)
                with pytest.raises(kbatch.SenderFullError):
                    sender.send(envelope, timeout=0)
            assert (sender.flush(), len(sender)) == (0, 2)

        check_leaks(step, watched)
        assert sender.close(0) == 2


def test_a_batched_sender_on_a_loop(kafka_cluster: MockCluster) -> None:
    envelopes, watched = things()
    bad = Envelope(Unwritable(), key="bad")
    told: list[int] = []

    async def on_failed(envelope: Envelope[Any], error: kbatch.KbatchError) -> None:
        told.append(1)

    with make_producer(kafka_cluster) as producer, contextlib.closing(asyncio.new_event_loop()) as loop:

        async def made() -> aio.BatchedSender:
            agent = aio.SendingAgent(beside(producer), TOPIC, on_failed=on_failed)
            return aio.BatchedSender(agent, batch_size=3, max_buffered=4)

        sender = loop.run_until_complete(made())

        async def several() -> None:
            await asyncio.gather(*(sender.send(envelope) for envelope in [*envelopes, bad] * 2))
            with contextlib.suppress(kbatch.SenderFullError):
                await sender.send(envelopes[0], timeout=0)
            impatient = asyncio.ensure_future(sender.send(envelopes[1]))
            await asyncio.sleep(0)
            impatient.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await impatient
            assert (await sender.flush(), len(sender)) == (0, 0)

        check_leaks(lambda: loop.run_until_complete(several()), [*watched, bad])
        assert loop.run_until_complete(sender.close()) == 0
        assert len(told) == 2 * (REPEAT + 5)


def test_an_inline_sender(kafka_cluster: MockCluster) -> None:
    envelopes, watched = things()
    bad, refused = Envelope(Unwritable(), key="bad"), Envelope(1, partition=9)
    with make_producer(kafka_cluster) as producer, kbatch.InlineSender(producer, TOPIC) as sender:

        def step() -> None:
            for envelope in envelopes:
                assert sender.send(envelope).acked == 1
                with contextlib.suppress(kbatch.BatchPendingError, kbatch.DeliveryError):
                    sender.send(envelope, timeout=0)
            with pytest.raises(kbatch.SerializationError):
                sender.send(bad)
            with pytest.raises(kbatch.DeliveryError):
                sender.send(refused)
            producer.flush()

        check_leaks(step, [*watched, bad, refused])


def test_an_inline_sender_on_a_loop(kafka_cluster: MockCluster) -> None:
    envelopes, watched = things()
    bad = Envelope(Unwritable(), key="bad")
    with make_producer(kafka_cluster) as producer, contextlib.closing(asyncio.new_event_loop()) as loop:
        sender = aio.InlineSender(beside(producer), TOPIC)

        async def several() -> None:
            reports = await asyncio.gather(*(sender.send(envelope) for envelope in envelopes))
            assert [report.acked for report in reports] == [1] * 4
            with pytest.raises(kbatch.SerializationError):
                await sender.send(bad)

        check_leaks(lambda: loop.run_until_complete(several()), [*watched, bad])
        loop.run_until_complete(sender.close())


class Answer(kbatch.SenderCallback):
    """Remembers how it was called, not with what."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def mark_successful(self, batch: Any, report: Any) -> None:
        self.methods.append("successful")

    def mark_serialization_failure(self, batch: Any, error: Any) -> None:
        self.methods.append("serialization")

    def mark_processing_failure(self, batch: Any, error: Any) -> None:
        self.methods.append("processing")

    def mark_circuit_open(self, batch: Any, error: Any = None) -> None:
        self.methods.append("circuit open")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent(kafka_cluster: MockCluster, asynchronous: bool) -> None:
    envelopes, watched = things()
    bad = Envelope(Unwritable(), key="bad")
    with make_producer(kafka_cluster) as producer, contextlib.closing(asyncio.new_event_loop()) as loop:
        blocking = SendingAgent(producer, TOPIC)
        on_loop = aio.SendingAgent(beside(producer), TOPIC)

        def send(callback: Answer, batch: OutgoingBatch) -> None:
            if asynchronous:
                loop.run_until_complete(on_loop.send_batch(callback, batch))
            else:
                blocking.send_batch(callback, batch)

        def step() -> None:
            callback = Answer()
            for batch in (envelopes, [*envelopes, bad]):
                send(callback, OutgoingBatch(batch))
            assert callback.methods == ["successful", "serialization"]

        check_leaks(step, [*watched, bad])
        for agent in (blocking, on_loop):
            agent._end(0)


def test_an_agent_whose_circuit_is_open() -> None:
    envelopes, watched = things()
    with MemoryProducer() as producer:
        agent = SendingAgent(producer, TOPIC, failures_to_open=1, probe_interval_s=1000, max_probe_interval_s=1000)
        producer.fail(times=len(envelopes))
        callback = Answer()
        agent.send_batch(callback, OutgoingBatch(envelopes))
        assert agent.state is kbatch.CircuitState.OPEN

        def step() -> None:
            callback.methods.clear()
            agent.send_batch(callback, OutgoingBatch(envelopes))
            assert callback.methods == ["circuit open"]

        check_leaks(step, watched)
        agent.close()


def test_nothing_is_left_of_a_sender_that_is_closed() -> None:
    envelopes, watched = things()
    later = Envelope(1, scheduled_time=datetime(9000, 1, 1, tzinfo=timezone.utc))
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    with MemoryProducer() as producer, contextlib.closing(asyncio.new_event_loop()) as loop:

        def in_threads() -> None:
            agent = SendingAgent(producer, TOPIC, on_failed=lambda envelope, error: None)
            sender = kbatch.BatchedSender(agent, batch_size=3)
            made.update((agent, sender))
            for envelope in [*envelopes, later]:
                sender.send(envelope)
            sender.flush()
            assert sender.close(0) == 1

        async def on_a_loop() -> None:
            agent = aio.SendingAgent(beside(producer), TOPIC, on_failed=lambda envelope, error: None)
            sender = aio.BatchedSender(agent, batch_size=3)
            made.update((agent, sender))
            for envelope in [*envelopes, later]:
                await sender.send(envelope)
            await sender.flush()
            assert await sender.close(0) == 1

        def inline() -> None:
            with kbatch.InlineSender(producer, TOPIC) as sender:
                made.add(sender)
                for envelope in envelopes:
                    sender.send(envelope)

        def unused() -> None:
            agent = SendingAgent(producer, TOPIC)
            made.update((agent, kbatch.BatchedSender(agent)))

        def step() -> None:
            producer.clear()
            in_threads()
            loop.run_until_complete(on_a_loop())
            inline()
            unused()
            until(lambda: not running(), "the end of the threads")

        check_leaks(step, [*watched, later])
        gc.collect()
        assert not list(made)
