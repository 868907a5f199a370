"""An outbox and its relay on real brokers: they stop and start, refuse, answer nothing, and nothing is lost.

A real broker deduplicates, so nothing is there twice unless the relay gave up a batch and sent it again.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kbatch import Envelope, OutboxQuery, Relay, RetryPolicy, aio
from tests import outboxes
from tests.kafka.cluster import KafkaCluster
from tests.kafka.proxy import Direction
from tests.mock.clients import read_back, read_back_with_aiokafka, read_committed
from tests.mock.test_relay import running
from tests.mock.test_relay_killed import ROOT, let_leases_run_out
from tests.outboxes import Outbox
from tests.relays import check_history, numbered
from tests.waiting import until

BATCH, FLIGHTS = 100, 4
LEVELS = ("read_committed", "read_uncommitted")


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox()


def config(kafka: KafkaCluster, timeout_ms: int = 60_000) -> dict[str, Any]:
    return {
        "bootstrap.servers": kafka.proxied_servers,
        "log_level": 0,
        "delivery.timeout.ms": timeout_ms,
        "reconnect.backoff.max.ms": 500,
    }


def make(outbox: Outbox, kafka: KafkaCluster, timeout_ms: int = 60_000, **options: Any) -> Relay:
    options = {"batch_size": BATCH, "max_in_flight_batches": FLIGHTS, "probe_interval_s": 0.1, **options}
    return Relay(outbox, config(kafka, timeout_ms), max_probe_interval_s=0.5, **options)


class Load:
    """An application that adds all the time, in transactions of 1 to 50, some of which it rolls back."""

    def __init__(self, outbox: Outbox, topic: str) -> None:
        self.committed: list[int] = []
        self._outbox, self._topic = outbox, topic
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def more(self, count: int = 300) -> None:
        goal = len(self.committed) + count
        until(lambda: len(self.committed) >= goal or not self._thread.is_alive(), "more of the application")

    def _work(self) -> None:
        seeded = random.Random(7)
        first = 0
        while not self._over.wait(0.01):
            numbers = range(first, first + seeded.randint(1, 50))
            with outboxes.transaction(self._outbox) as connection:
                self._outbox.add(connection, numbered(numbers), topic=self._topic)
                if seeded.random() < 0.1:
                    connection.execute("ROLLBACK")
                    connection.execute("BEGIN")
                    continue
            self.committed += numbers
            first = numbers.stop


@pytest.fixture
def stored(one_broker: KafkaCluster) -> Any:
    return lambda topic: read_back(one_broker.bootstrap_servers, topic)


def test_everything_arrives_once_and_in_order(outbox: Outbox, one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic(partitions=3)
    outboxes.add(outbox, numbered(range(20_000), keys=300), topic=topic)
    with make(outbox, one_broker, batch_size=2_000) as relay:
        assert relay.drain(60) == 0
    check_history(range(20_000), read_back_with_aiokafka(one_broker.bootstrap_servers, topic))


@pytest.mark.parametrize("end", ["kill", "stop", "pause"])
def test_kafka_is_stopped_and_started_while_a_relay_is_at_work(
    outbox: Outbox, one_broker: KafkaCluster, stored: Any, end: str
) -> None:
    topic = one_broker.create_topic(partitions=3)
    with running(make(outbox, one_broker)) as relay, Load(outbox, topic) as load:
        for _ in range(2):
            load.more()
            getattr(one_broker.brokers[0], end)()
            acked = relay.stats()["acked"]
            load.more()
            one_broker.heal()
            until(lambda: relay.stats()["acked"] > acked, "its work goes on", 60)  # noqa: B023
        load.more()
        load.__exit__()
        assert relay.drain(90) == 0
        stats = relay.stats()
    # The brokers came back within the delivery time-out, so nothing was given up.
    assert (stats["refused"], stats["put_off"], stats["dead"], stats["lost_buckets"]) == (0, 0, 0, 0)
    check_history(load.committed, stored(topic))


def test_an_outage_that_is_longer_than_a_delivery_moves_nothing_and_doubles_only_what_was_given_up(
    outbox: Outbox, one_broker: KafkaCluster, stored: Any
) -> None:
    topic = one_broker.create_topic(partitions=3)
    with running(make(outbox, one_broker, 2_000, failures_to_open=1)) as relay, Load(outbox, topic) as load:
        load.more()
        one_broker.brokers[0].kill()
        until(lambda: not relay._gate.may_send(), "the circuit is open", 60)
        load.more()
        waiting = outbox.status()
        assert waiting.waiting >= 300
        assert (waiting.later, waiting.dead) == (0, 0)
        one_broker.heal()
        load.more()
        load.__exit__()
        assert relay.drain(90) == 0
    check_history(load.committed, stored(topic), copies=2 * BATCH * FLIGHTS, in_order=False)


def test_acknowledgements_that_are_lost_make_no_copies(outbox: Outbox, one_broker: KafkaCluster, stored: Any) -> None:
    topic = one_broker.create_topic(partitions=3)
    proxy = one_broker.brokers[0].proxy
    with running(make(outbox, one_broker)) as relay, Load(outbox, topic) as load:
        load.more()
        for _ in range(3):
            dropped = proxy.dropped[Direction.TO_CLIENT]
            proxy.drop(Direction.TO_CLIENT)
            until(lambda: proxy.dropped[Direction.TO_CLIENT] > dropped, "an answer that is lost")  # noqa: B023
            proxy.heal()
            load.more()
        load.__exit__()
        assert relay.drain(90) == 0
    check_history(load.committed, stored(topic))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")
def test_a_relay_process_is_killed_and_doubles_only_what_it_had_not_recorded(
    outbox: Outbox, one_broker: KafkaCluster, stored: Any
) -> None:
    topic = one_broker.create_topic(partitions=3)
    command = [sys.executable, "-m", "kbatch", "relay", *outboxes.named(outbox), "-q"]
    for key, value in config(one_broker).items():  # nothing times out, so nothing is overtaken
        command += ["-X", f"{key}={value}"]
    unrecorded: set[int] = set()
    with Load(outbox, topic) as load:

        def sent() -> int:
            return len(load.committed) - outbox.status(count_up_to=10**6).waiting

        for _ in range(2):
            before = sent()
            with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
                try:
                    until(lambda: sent() > before + 300, "its work", 60)  # noqa: B023
                finally:
                    process.kill()
                process.communicate()
            unrecorded.update(int(body or b"") for body in outboxes.bodies(outbox))
            for table in ("lease", "relay"):  # as if so much time had passed
                outboxes.query(outbox, f"UPDATE {{{table}}} SET until = 0")
    with make(outbox, one_broker) as relay:
        assert relay.drain(90) == 0
    records = stored(topic)
    check_history(load.committed, records, copies=None)
    seen: set[int] = set()
    doubled = [n for n in (int(record.value) for record in records) if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
    assert set(doubled) <= unrecorded


def test_a_topic_that_does_not_exist_stops_no_other_and_its_dead_letters_are_replayed_once_it_does(
    outbox: Outbox, one_broker: KafkaCluster, stored: Any
) -> None:
    topic = one_broker.create_topic(partitions=3)
    missing = f"{topic}-later"
    soon = RetryPolicy(max_attempts=8, initial_backoff_s=0.1, max_backoff_s=1.0)
    producer = {**config(one_broker, 5_000), "topic.metadata.propagation.max.ms": 500}
    outboxes.add(outbox, numbered(range(100), topic=missing), topic=None)
    options = {"batch_size": BATCH, "max_in_flight_batches": FLIGHTS, "retry": soon}
    with running(Relay(outbox, producer, **options)) as relay, Load(outbox, topic) as load:
        load.more()
        until(lambda: relay.stats()["acked"] >= 300, "the others", 60)
        until(lambda: outbox.status().dead == 100, "those of the missing topic", 120)
        one_broker.create_topic(missing, partitions=3)
        assert outbox.dead_letters.replay(OutboxQuery(topic=missing)) == 100
        load.more()
        load.__exit__()
        assert relay.drain(90) == 0
    check_history(load.committed, stored(topic))
    check_history(range(100), stored(missing))
    assert outbox.status().dead == 0


def test_a_message_that_is_too_large_for_its_topic_is_dead_alone_and_may_be_edited(
    outbox: Outbox, one_broker: KafkaCluster, stored: Any
) -> None:
    topic = one_broker.create_topic(partitions=1, config={"max.message.bytes": "20000"})
    outboxes.add(outbox, numbered(range(50), keys=5), topic=topic)
    outboxes.add(outbox, [Envelope(data=b"50".rjust(50_000, b"0"), key="k0")], topic=topic)
    outboxes.add(outbox, numbered(range(51, 100), keys=5), topic=topic)
    with running(make(outbox, one_broker)) as relay:
        until(lambda: relay.stats()["dead"] == 1, "the one that is too large", 60)
        assert relay.drain(60) == 0
        (letter,) = outbox.dead_letters.find()
        assert "MSG_SIZE_TOO_LARGE" in letter.error
        outbox.dead_letters.replay_edited(letter.number, letter.envelope.replace(data=b"50"))
        assert relay.drain(60) == 0
    check_history(range(100), stored(topic), in_order=False)


# -- fencing


def fencing(kafka: KafkaCluster) -> dict[str, Any]:
    return {**config(kafka, 5_000), "transaction.timeout.ms": 5_000}


def start_fencing(outbox: Outbox, kafka: KafkaCluster, **settings: Any) -> subprocess.Popen[str]:
    options = {"batch_size": BATCH, "fencing": "kafka"}
    given = {**outboxes.where(outbox), "config": fencing(kafka), "options": options, "drain": False, **settings}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.mock.relay_program", json.dumps(given)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def drain(outbox: Outbox, kafka: KafkaCluster, is_aio: bool) -> int:
    options: dict[str, Any] = {"fencing": "kafka", "batch_size": BATCH}
    if not is_aio:
        with Relay(outbox, fencing(kafka), **options) as relay:
            return relay.drain(60)

    async def on_loop() -> int:
        async with aio.Relay(outbox, fencing(kafka), **options) as relay:
            return await relay.drain(60)

    return asyncio.run(on_loop())


def test_a_relay_that_fences_sends_everything_once_and_in_order(outbox: Outbox, one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic(partitions=3)
    outboxes.add(outbox, numbered(range(20_000), keys=300), topic=topic)
    with Relay(outbox, fencing(one_broker), fencing="kafka") as relay:
        assert relay.drain(60) == 0
    check_history(range(20_000), read_committed(one_broker.bootstrap_servers, topic))


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="platform: no SIGSTOP")
@pytest.mark.parametrize("stops_itself", [True, False], ids=["after-reading", "anywhere"])
@pytest.mark.parametrize("is_aio", [False, True], ids=["threads", "asyncio"])
def test_a_relay_that_goes_on_after_its_lease_writes_nothing_to_kafka_if_another_has_its_buckets(
    outbox: Outbox, one_broker: KafkaCluster, is_aio: bool, stops_itself: bool
) -> None:
    topic = one_broker.create_topic(partitions=3)
    outboxes.add(outbox, numbered(range(5_000), keys=200), topic=topic)
    settings: dict[str, Any] = {"aio": is_aio, **({"stop_at_reading": 5} if stops_itself else {})}
    with start_fencing(outbox, one_broker, **settings) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            if stops_itself:
                assert process.stdout.readline() == "read\n"
            else:
                until(lambda: outbox.status(count_up_to=10**6).waiting < 4_000, "its work", 60)
                outboxes.stop_between_transactions(outbox, process.pid)
            unrecorded = {int(body or b"") for body in outboxes.bodies(outbox)}
            assert unrecorded
            let_leases_run_out(outbox)  # by the database's clock; by its own it still has them
            assert drain(outbox, one_broker, is_aio) == 0
            before = {level: read_committed(one_broker.bootstrap_servers, topic, level) for level in LEVELS}
            os.kill(process.pid, signal.SIGCONT)
            outboxes.add(outbox, numbered(range(5_000, 5_100), keys=200), topic=topic)
            until(lambda: outbox.status().waiting == 0, "its work goes on", 60)
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
    for level in LEVELS:  # not even what a reader of everything sees
        after = read_committed(one_broker.bootstrap_servers, topic, level)
        assert [record for record in after if int(record.value) < 5_000] == before[level]
    committed = read_committed(one_broker.bootstrap_servers, topic)
    # At most the batch that it had committed and not deleted, and that is not its doing later.
    check_history(range(5_100), committed, copies=BATCH)
    assert outbox.status().later == outbox.status().dead == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")
def test_a_relay_that_fences_is_killed_and_doubles_at_most_the_batch_that_it_had_not_recorded(
    outbox: Outbox, one_broker: KafkaCluster
) -> None:
    topic = one_broker.create_topic(partitions=3)
    outboxes.add(outbox, numbered(range(5_000), keys=200), topic=topic)
    for goal in (4_000, 2_500):
        with start_fencing(outbox, one_broker) as process:
            try:
                until(lambda: outbox.status(count_up_to=10**6).waiting < goal, "its work", 60)  # noqa: B023
            finally:
                process.kill()
        let_leases_run_out(outbox)
    with Relay(outbox, fencing(one_broker), fencing="kafka", batch_size=BATCH) as relay:
        assert relay.drain(60) == 0
    check_history(range(5_000), read_committed(one_broker.bootstrap_servers, topic), copies=2 * BATCH)


def test_a_message_that_is_too_large_for_its_topic_is_dead_alone_also_in_a_transaction(
    outbox: Outbox, one_broker: KafkaCluster
) -> None:
    topic = one_broker.create_topic(partitions=1, config={"max.message.bytes": "20000"})
    outboxes.add(outbox, numbered(range(50), keys=5), topic=topic)
    outboxes.add(outbox, [Envelope(data=b"50".rjust(50_000, b"0"), key="other")], topic=topic)
    outboxes.add(outbox, numbered(range(50, 100), keys=5), topic=topic)
    with Relay(outbox, fencing(one_broker), fencing="kafka") as relay:
        assert relay.drain(60) == 0
        assert relay.stats()["dead"] == 1
    (letter,) = outbox.dead_letters.find()
    assert "MSG_SIZE_TOO_LARGE" in letter.error
    check_history(range(100), read_committed(one_broker.bootstrap_servers, topic))
