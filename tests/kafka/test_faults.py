"""Faults that only real brokers have, each with the checker of invariants (`tests/faults/checker.py`)."""

import pytest

from tests.faults.history import ACKED, FAILED
from tests.kafka.cluster import KafkaCluster
from tests.kafka.conftest import NIGHTLY
from tests.kafka.proxy import Direction
from tests.kafka.scenario import Scenario
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


def test_leaders_are_killed_under_load(kafka3: KafkaCluster) -> None:
    with Scenario(kafka3) as run, run.load() as more:
        more(10)
        for partition in range(2 if NIGHTLY else 1):
            leader = kafka3.leader(run.topic, partition)
            leader.kill()
            assert kafka3.leader(run.topic, partition) is not leader
            more(10)
            kafka3.heal()
            more(10)


def test_rolling_hard_restarts(kafka3: KafkaCluster) -> None:
    with Scenario(kafka3) as run, run.load() as more:
        for _ in range(5 if NIGHTLY else 1):
            for broker in kafka3.brokers:
                broker.kill()
                kafka3.heal()
                more(5)


# -- too few replicas


def test_too_few_replicas_is_tried_again(kafka3: KafkaCluster) -> None:
    every_replica = {"min.insync.replicas": "3"}
    witness = kafka3.create_topic(partitions=1, config=every_replica)
    with Scenario(kafka3, partitions=1, topic_config=every_replica) as run:
        leader = kafka3.leader(run.topic)
        follower = next(broker for broker in kafka3.brokers if broker is not leader)
        follower.kill()
        until(lambda: refusal(kafka3, witness) == "NOT_ENOUGH_REPLICAS", "too few replicas")
        before = written(kafka3, run.topic)
        with run.sending(300, "callback") as job, run.sending(30, "aio sender") as other:
            until(lambda: refusal(kafka3, witness) == "NOT_ENOUGH_REPLICAS", "too few replicas")
            assert not job.settled()
            assert not other.settled()
            assert written(kafka3, run.topic) == before
            kafka3.heal()
        assert job.sent is not None
        assert run.states(job.sent) == {ACKED}
        assert written(kafka3, run.topic) == run.acked


def test_too_few_replicas_for_too_long(kafka3: KafkaCluster) -> None:
    every_replica = {"min.insync.replicas": "3"}
    witness = kafka3.create_topic(partitions=1, config=every_replica)
    codes = frozenset((MSG_TIMED_OUT,))
    config = {"delivery.timeout.ms": 3_000}
    with Scenario(kafka3, partitions=1, topic_config=every_replica, codes=codes, **config) as run:
        leader = kafka3.leader(run.topic)
        follower = next(broker for broker in kafka3.brokers if broker is not leader)
        follower.kill()
        until(lambda: refusal(kafka3, witness) == "NOT_ENOUGH_REPLICAS", "too few replicas")
        sent = run.send(100, "sender")
        print(run.outcomes(sent)[0])
        assert run.states(sent) == {FAILED}
        kafka3.heal()
        assert run.states(run.resend(sent)) == {ACKED}


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
    with Scenario(kafka3, codes=frozenset((MSG_TIMED_OUT,)), **{"delivery.timeout.ms": 2_000}) as run:
        for broker in kafka3.brokers:
            broker.pause()
        on_their_way = run.send(300, "sender")
        assert run.states(on_their_way) == {FAILED}
        print({outcome[:4] for outcome in run.outcomes(on_their_way)})
        kafka3.heal()
        run.resend(on_their_way)
        run.send(10)
