"""Faults that only real brokers have, each with the checker of invariants (`tests/faults/checker.py`)."""

import asyncio

import pytest

from tests.faults.history import ACKED, FAILED
from tests.faults.kinds import UNKNOWN
from tests.kafka.cluster import KafkaCluster
from tests.kafka.conftest import NIGHTLY
from tests.kafka.proxy import Direction
from tests.kafka.scenario import Scenario
from tests.loops import beside
from tests.mock.clients import end_offsets, produce
from tests.waiting import until

MSG_TIMED_OUT = -192


def written(kafka: KafkaCluster, topic: str) -> int:
    return sum(end_offsets(kafka.bootstrap_servers, topic).values())


# -- written, acknowledgement lost


def lose_acknowledgements(kafka: KafkaCluster, run: Scenario, way: str) -> int:
    """Sends a batch; how many of its records were written by requests that had no answer."""
    before = written(kafka, run.topic)
    proxy = kafka.brokers[0].proxy
    dropped = proxy.dropped[Direction.TO_CLIENT]
    proxy.drop(Direction.TO_CLIENT)
    with run.sending(300, way) as job:
        until(lambda: written(kafka, run.topic) > before, "what the broker writes")
        until(lambda: proxy.dropped[Direction.TO_CLIENT] > dropped, "an answer that is lost")
        assert not job.settled()
        unanswered = written(kafka, run.topic) - before
        proxy.heal()
    assert job.sent is not None
    assert run.states(job.sent) == {ACKED}
    return unanswered


# All of a batch in one request.
ONE_REQUEST = {"linger.ms": 100}


@pytest.mark.parametrize("way", ["send_batch", "callback", "sender", "aio", "aio sender"])
def test_an_acknowledgement_is_lost(one_broker: KafkaCluster, way: str) -> None:
    with Scenario(one_broker, partitions=1, **ONE_REQUEST) as run:
        lose_acknowledgements(one_broker, run, way)
        run.send(10)
        assert written(one_broker, run.topic) == run.acked  # each once


def test_without_idempotence_the_checker_finds_the_copies(one_broker: KafkaCluster) -> None:
    with Scenario(one_broker, partitions=1, idempotent=False, **ONE_REQUEST) as run:
        run.expected = {"I6"}
        unanswered = lose_acknowledgements(one_broker, run, "send_batch")
        assert written(one_broker, run.topic) == run.acked + unanswered


# -- brokers that die


def test_rolling_hard_restarts_under_load(kafka3: KafkaCluster) -> None:
    with Scenario(kafka3) as run, run.load() as more:
        more(10)
        for _ in range(5 if NIGHTLY else 1):
            # One that leads stays away until another has its place.
            leader = kafka3.leader(run.topic)
            leader.kill()
            assert kafka3.leader(run.topic) is not leader
            more(10)
            kafka3.heal()
            for broker in kafka3.brokers:
                if broker is not leader:
                    broker.kill()
                    kafka3.heal()
                    more(5)


# -- too few replicas


def test_too_few_replicas(kafka3: KafkaCluster) -> None:
    every_replica = {"min.insync.replicas": "3"}
    witness = kafka3.create_topic(partitions=1, config=every_replica)

    def too_few() -> bool:
        return refusal(kafka3, witness) == "NOT_ENOUGH_REPLICAS"

    short = {"codes": frozenset((MSG_TIMED_OUT,)), "message.timeout.ms": 2_000}
    with (
        Scenario(kafka3, partitions=1, topic_config=every_replica, **short) as impatient,
        Scenario(kafka3, partitions=1, topic_config=every_replica) as patient,
    ):
        next(broker for broker in kafka3.brokers if broker is not kafka3.leader(patient.topic)).kill()
        until(too_few, "too few replicas")
        before = written(kafka3, patient.topic)
        with patient.sending(300, "callback") as job, patient.sending(30, "aio sender") as other:
            given_up = impatient.send(100, "sender")
            assert impatient.states(given_up) == {FAILED}
            assert not any(outcome.possibly_persisted for outcome in impatient.outcomes(given_up))
            assert too_few()
            assert not job.settled()
            assert not other.settled()
            assert written(kafka3, patient.topic) == before
            kafka3.heal()
        assert patient.failed == 0
        assert impatient.states(impatient.resend(given_up)) == {ACKED}
        for run in (patient, impatient):
            assert written(kafka3, run.topic) == run.acked  # each once


@pytest.mark.nightly
def test_two_of_three_brokers_are_stopped(kafka3: KafkaCluster) -> None:
    with Scenario(kafka3, partitions=1) as run:
        leader = kafka3.leader(run.topic)
        others = [broker for broker in kafka3.brokers if broker is not leader]
        for broker in others:
            broker.kill()
        with run.sending(300, "send_batch") as job:
            for broker in others:
                broker.start()
            kafka3.wait_until_up()
        assert job.sent is not None
        assert run.states(job.sent) == {ACKED}


def refusal(kafka: KafkaCluster, topic: str) -> str | None:
    """What a producer is told that does not try again."""
    config = {"retries": 0, "acks": "all", "message.timeout.ms": 5_000}
    (error,) = produce(kafka.bootstrap_servers, topic, [{"value": b"x"}], **config)
    return None if error is None else error.name()


# -- brokers that stand still


def test_brokers_stand_still_past_the_timeout(kafka3: KafkaCluster) -> None:
    with Scenario(kafka3, codes=frozenset((MSG_TIMED_OUT,)), **{"message.timeout.ms": 2_000}) as run:
        for broker in kafka3.brokers:
            broker.pause()
        on_their_way = run.send(300, "sender")
        assert run.states(on_their_way) == {FAILED}
        assert any(outcome.possibly_persisted for outcome in run.outcomes(on_their_way))
        # Nobody is asked for these: what is not sent is not persisted.
        waiting = run.send(5, "aio sender")
        assert run.states(waiting) == {FAILED}
        assert not any(outcome.possibly_persisted for outcome in run.outcomes(waiting))
        kafka3.heal()
        for sent in (on_their_way, waiting):
            assert run.states(run.resend(sent)) == {ACKED}


# -- a slow broker


def test_a_slow_broker_holds_up_no_event_loop(one_broker: KafkaCluster) -> None:
    """The loop turns while answers take 0.4 s, and what is in flight is bounded."""
    bound = 3_000
    ticks, most = 0, 0
    with Scenario(one_broker, max_in_flight=bound, **{"batch.num.messages": 500}) as run:
        one_broker.brokers[0].proxy.delay(0.2)

        async def tick() -> None:
            nonlocal ticks, most
            while True:
                ticks, most = ticks + 1, max(most, run.producer.stats()["in_flight"])
                await asyncio.sleep(0.005)

        async def main() -> None:
            ticking = asyncio.create_task(tick())
            # One after the other is handed over, and nobody waits for an answer.
            pending = [await producer.submit(run.topic, envelopes) for _, envelopes in batches]
            assert ticks > 50  # they had to wait for room
            for (sent, _), batch in zip(batches, pending, strict=True):
                run.answer(sent, await batch)
            ticking.cancel()

        producer = beside(run.producer)
        batches = [run.by_hand(1_000) for _ in range(10)]
        asyncio.run(main())
        assert most < bound + 128  # so many are enqueued between two looks at the bound
        assert run.failed == 0


# -- a topic that is deleted


def test_a_topic_is_deleted_in_flight(one_broker: KafkaCluster) -> None:
    quick = {"topic.metadata.propagation.max.ms": 500, "message.timeout.ms": 20_000}
    with Scenario(one_broker, codes=UNKNOWN, ordered=False, **quick) as run:
        run.history.deleted.add(run.topic)
        with run.load() as more:
            more(5)
            one_broker.delete_topic(run.topic)
            more(10)
        assert run.failed
        one_broker.create_topic(run.topic, partitions=3)
