"""What a durable sender has committed arrives, by its own relay or another, whatever is killed when."""

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import CircuitState, Envelope, KafkaTopic, Relay, RetryPolicy, SenderMode, aio
from kbatch._outbox import _shared
from kbatch.testing import ApiKey, MockCluster
from tests import outboxes
from tests.outboxes import Outbox
from tests.relays import check_history, numbered
from tests.waiting import until

from .clients import read_back, read_committed
from .processes import start as start_program
from .test_relay_killed import let_leases_run_out

ROOT = Path(__file__).parents[2]
ROUNDS = 4
LANES = 8


@pytest.fixture
def outbox(new_outbox: Callable[..., Outbox]) -> Outbox:
    return new_outbox(wire="raw")


def config(cluster: MockCluster) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}


def durable(
    outbox: Outbox, cluster: MockCluster, kind: Any = KafkaTopic, producer: dict[str, Any] | None = None, **options: Any
) -> Any:
    settings = {**config(cluster), **(producer or {})}
    return kind("orders", SenderMode.DURABLE, outbox=outbox, config=settings, **options)


def test_a_relay_of_its_own_forwards_what_is_sent(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    outboxes.add(outbox, numbered(range(10)))  # by an earlier process
    with durable(outbox, kafka_cluster).create_sender() as sender:
        for envelope in numbered(range(10, 100)):
            assert sender.send(envelope)
        until(lambda: outbox.status().waiting == 0, "all of them in Kafka")
    check_history(range(100), read_back(kafka_cluster.bootstrap_servers, "orders"))
    assert outbox.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0)


def test_a_relay_of_its_own_under_asyncio(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    async def main() -> None:
        async with durable(outbox, kafka_cluster, aio.KafkaTopic).create_sender() as sender:
            assert await asyncio.gather(*(sender.send(envelope) for envelope in numbered(range(200)))) == [True] * 200
            while outbox.status().waiting:
                await asyncio.sleep(0.02)

    asyncio.run(main())
    check_history(range(200), read_back(kafka_cluster.bootstrap_servers, "orders"))


@pytest.mark.parametrize("kind", [KafkaTopic, aio.KafkaTopic], ids=["threads", "asyncio"])
def test_its_relay_has_the_options_that_a_topic_gives(outbox: Outbox, kafka_cluster: MockCluster, kind: Any) -> None:
    retry = RetryPolicy(max_attempts=1)
    relay = {"retry": retry, "batch_size": 30, "max_in_flight_batches": 2, "strict_order": True, "lease_s": 99.0}
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_topic_error("orders", "TOPIC_AUTHORIZATION_FAILED")

    def look(sender: Any) -> None:
        until(lambda: outbox.status().dead == 1, "it dead after its one attempt")
        made = sender._shared.relay._relay
        assert (made._loop._batch_size, made._loop._max_flights, made._loop._lease_s) == (30, 2, 99.0)
        assert made._loop._floors._one_in_flight
        assert made._use.handle.producer._max_in_flight == 10_000

    async def main() -> None:
        async with durable(outbox, kafka_cluster, kind, relay=relay).create_sender() as sender:
            await sender.send(Envelope(data=b"1", key="k1"))
            look(sender)

    if kind is aio.KafkaTopic:
        asyncio.run(main())
    else:
        with durable(outbox, kafka_cluster, relay=relay).create_sender() as sender:
            sender.send(Envelope(data=b"1", key="k1"))
            look(sender)


def test_a_fencing_relay_of_its_own_sends_by_transactions(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    topic = durable(outbox, kafka_cluster, relay={"fencing": "kafka", "batch_size": 50})
    for first in (0, 200):  # each time a relay with a name of its own
        with topic.create_sender() as sender:
            for envelope in numbered(range(first, first + 200)):
                sender.send(envelope)
            until(lambda: outbox.status().waiting == 0, "all of them in Kafka")
            relay = sender._shared.relay._relay
            assert relay._use.handle.producer._transactions is not None
            assert (
                relay._use.handle.producer._parsed.native.get("transactional.id")
                == f"kbatch-relay-{relay._loop._owner.name}"
            )
    check_history(range(400), read_committed(kafka_cluster.bootstrap_servers, "orders"))


def test_close_sends_what_is_in_the_outbox_when_brokers_do_not_know_a_fencing_relay_yet(
    outbox: Outbox, kafka_cluster: MockCluster
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_rtt(-1, 50)
    with durable(outbox, kafka_cluster, relay={"fencing": "kafka"}).create_sender() as sender:
        sender.send(Envelope(data=b"0", key="k0"))
    assert (outbox.status().waiting, outbox.status().relays) == (0, 0)
    check_history(range(1), read_committed(kafka_cluster.bootstrap_servers, "orders"))


def test_close_does_not_wait_for_brokers_that_do_not_let_a_fencing_relay_have_its_name(
    outbox: Outbox, kafka_cluster: MockCluster
) -> None:
    kafka_cluster.push_request_errors(ApiKey.INIT_PRODUCER_ID, 1_000 * ["TRANSACTIONAL_ID_AUTHORIZATION_FAILED"])
    topic = durable(outbox, kafka_cluster, relay={"fencing": "kafka"}, close_timeout_s=3600.0)
    with topic.create_sender() as sender:
        sender.send(Envelope(data=b"0", key="k0"))
    assert (outbox.status().waiting, outbox.status().relays) == (1, 0)


def test_the_circuit_of_its_relay_is_told(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    told: list[tuple[CircuitState, CircuitState]] = []
    relay = {
        "failures_to_open": 1,
        "probe_interval_s": 0.05,
        "max_probe_interval_s": 0.1,
        "on_state_change": lambda *states: told.append(states),
    }
    kafka_cluster.set_broker_down()
    soon = {"delivery.timeout.ms": 300, "reconnect.backoff.max.ms": 100}
    with durable(outbox, kafka_cluster, producer=soon, relay=relay).create_sender() as sender:
        sender.send(Envelope(data=b"0", key="k0"))
        until(lambda: told, "that it is open")
        kafka_cluster.set_broker_up()
        until(lambda: told[-1][1] is CircuitState.CLOSED, "that it is closed")
    assert told[0] == (CircuitState.CLOSED, CircuitState.OPEN)
    check_history(range(1), read_back(kafka_cluster.bootstrap_servers, "orders"), copies=None)


def test_the_dead_letters_of_its_relay_are_told(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    told: list[str | None] = []
    kafka_cluster.create_topic("orders", 1)
    kafka_cluster.set_topic_error("orders", "TOPIC_AUTHORIZATION_FAILED")
    relay = {"retry": kbatch.RetryPolicy(max_attempts=1), "on_dead": lambda letter: told.append(letter.topic)}
    with durable(outbox, kafka_cluster, relay=relay).create_sender() as sender:
        sender.send(Envelope(data=b"0", key="k0"))
    assert told == ["orders"]


def test_without_a_config_another_relay_forwards_it(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    with KafkaTopic("orders", SenderMode.DURABLE, outbox=outbox).create_sender() as sender:
        for envelope in numbered(range(20)):
            sender.send(envelope)
        assert outbox.status().waiting == 20
        with Relay(outbox, config(kafka_cluster)) as relay:
            assert relay.drain(30) == 0
    check_history(range(20), read_back(kafka_cluster.bootstrap_servers, "orders"))


def test_what_its_relay_has_not_sent_stays_for_the_next_one(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    kafka_cluster.set_broker_down()
    with durable(outbox, kafka_cluster, close_timeout_s=0.2).create_sender() as sender:
        for envelope in numbered(range(20)):
            sender.send(envelope)
        until(lambda: outbox.status().relays == 1, "its relay")
    assert (outbox.status().waiting, outbox.status().relays) == (20, 0)
    kafka_cluster.set_broker_up()
    with durable(outbox, kafka_cluster).create_sender() as sender:
        sender.send(Envelope(data=b"20", key="k0"))
        until(lambda: outbox.status().waiting == 0, "all of them in Kafka", 60)
    check_history(range(21), read_back(kafka_cluster.bootstrap_servers, "orders"), copies=None)


def test_close_sends_what_is_in_the_outbox(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    later = datetime.now(timezone.utc) + timedelta(days=1)
    outboxes.add(outbox, numbered(range(3000)))
    outboxes.add(outbox, numbered(range(5000, 5003), scheduled_time=later))
    with durable(outbox, kafka_cluster).create_sender() as sender:
        sender.send(Envelope(data=b"3000", key="k0"))
    check_history(range(3001), read_back(kafka_cluster.bootstrap_servers, "orders"))
    assert outbox.status() == kbatch.OutboxStatus(0, 0, 0, 0.0, 0, scheduled=3)


def test_close_does_not_wait_for_what_waits(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_topic_error("orders", "TOPIC_AUTHORIZATION_FAILED")
    with durable(outbox, kafka_cluster, close_timeout_s=3600.0).create_sender() as sender:
        for envelope in numbered(range(20), keys=3):
            sender.send(envelope)
        until(lambda: outbox.status().later, "the first of a key, refused")
    assert (outbox.status().waiting + outbox.status().later, outbox.status().relays) == (20, 0)


def test_a_relay_that_fails_begins_again(
    outbox: Outbox,
    kafka_cluster: MockCluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_shared, "_BEGIN_AGAIN_S", 0.05)
    failures = iter(range(3))
    run = Relay.run

    def failing(relay: Relay) -> None:
        if next(failures, None) is not None:
            raise kbatch.OutboxError("no answer")
        run(relay)

    monkeypatch.setattr(Relay, "run", failing)
    with caplog.at_level(logging.WARNING), durable(outbox, kafka_cluster).create_sender() as sender:
        sender.send(Envelope(data=b"0"))
        until(lambda: outbox.status().waiting == 0, "it in Kafka")
    told = [record.message for record in caplog.records if "begins again" in record.message]
    assert told == ["the relay of DURABLE senders has failed, and begins again: OutboxError: no answer"]


def test_the_circuit_of_a_relay_that_fails_is_told_as_closed_when_the_next_one_begins(
    outbox: Outbox, kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shared, "_BEGIN_AGAIN_S", 0.05)
    told: list[tuple[CircuitState, CircuitState]] = []
    failed: list[Relay] = []
    run = Relay.run

    def failing(relay: Relay) -> None:
        renew = relay._loop._renew

        def fail_once() -> None:
            if told and not failed:
                failed.append(relay)
                raise RuntimeError("as a store of one's own may")
            renew()

        relay._loop._renew = fail_once  # type: ignore[method-assign]
        run(relay)

    monkeypatch.setattr(Relay, "run", failing)
    relay = {"failures_to_open": 1, "probe_interval_s": 0.05, "max_probe_interval_s": 0.1}
    kafka_cluster.set_broker_down()
    soon = {"delivery.timeout.ms": 300, "reconnect.backoff.max.ms": 100}
    options = {**relay, "on_state_change": lambda *states: told.append(states)}
    with durable(outbox, kafka_cluster, producer=soon, relay=options).create_sender() as sender:
        sender.send(Envelope(data=b"0", key="k0"))
        until(lambda: failed and len(told) >= 2, "that it has failed, and what is told then")
        kafka_cluster.set_broker_up()
        until(lambda: outbox.status().waiting == 0, "it in Kafka")
    is_open, is_closed = (CircuitState.CLOSED, CircuitState.OPEN), (CircuitState.OPEN, CircuitState.CLOSED)
    assert told[:2] == [is_open, is_closed]


class Raising(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("a handler of logs")


def test_a_relay_that_fails_begins_again_whatever_a_handler_of_logs_raises(
    outbox: Outbox, kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shared, "_BEGIN_AGAIN_S", 0.05)
    monkeypatch.setattr(logging.getLogger("kbatch"), "handlers", [Raising()])
    monkeypatch.setattr("kbatch._database._sqlite._told_of_fault", False)
    open_store: Callable[[], Any] = outbox.open_store
    opened: list[Any] = []

    def fail(*_: Any, **__: Any) -> Any:
        raise kbatch.OutboxError("no answer")

    def failing() -> Any:
        opened.append(None)
        if len(opened) == 1:
            fail()
        store = open_store()
        if len(opened) == 2:
            store.renew = fail
        return store

    monkeypatch.setattr(outbox, "open_store", failing)
    with durable(outbox, kafka_cluster).create_sender() as sender:
        sender.send(Envelope(data=b"0"))
        until(lambda: outbox.status().waiting == 0, "it in Kafka")
    assert len(opened) >= 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_relay_whose_thread_has_died_begins_again_with_the_next_message(
    outbox: Outbox, kafka_cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs = Relay.run, []

    def dying(relay: Relay) -> None:
        runs.append(relay)
        if len(runs) == 1:
            raise SystemExit
        run(relay)

    monkeypatch.setattr(Relay, "run", dying)
    with durable(outbox, kafka_cluster).create_sender() as sender:
        sender.send(Envelope(data=b"0"))
        until(lambda: runs and not sender._shared.relay._has_thread(), "its end")
        sender.send(Envelope(data=b"1"))
        until(lambda: outbox.status().waiting == 0, "both in Kafka")


def test_the_end_of_the_interpreter_gives_the_buckets_back(outbox: Outbox, kafka_cluster: MockCluster) -> None:
    code = f"""
        outbox = kbatch.{type(outbox).__name__}(**{outboxes.where(outbox)!r}, wire="raw")
        topic = kbatch.KafkaTopic("orders", kbatch.SenderMode.DURABLE, outbox=outbox, config=CONFIG)
        sender = topic.create_sender()
        for envelope in envelopes(20):
            sender.send(envelope)
        while outbox.status().waiting:
            time.sleep(0.02)
        """
    with start_program(kafka_cluster, code) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert outboxes.query(outbox, "SELECT DISTINCT owner FROM {lease}") == [(None,)]
    assert outbox.status().relays == 0
    assert len(read_back(kafka_cluster.bootstrap_servers, "orders")) == 20


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_an_application_that_is_killed_at_any_step_loses_nothing_that_send_has_returned_for(
    outbox: Outbox, kafka_cluster: MockCluster, tmp_path: Path, seed: int
) -> None:
    seeded = random.Random(seed)
    kafka_cluster.create_topic("orders", partitions=3)
    told: list[int] = []
    kills = 0
    begin = 0
    for _ in range(4):
        end = begin + 400
        settings = {
            "where": outboxes.where(outbox),
            "config": config(kafka_cluster),
            "lanes": LANES,
            "begin": begin,
            "end": end,
            "relay": seeded.random() < 0.5,
            "aio": seeded.random() < 0.5,
        }
        by_step = seeded.random() < 0.7
        if by_step:
            settings["kill_at"] = seeded.randint(1, 120)
        command = [sys.executable, "-W", "error", "-m", "tests.mock.durable_program", json.dumps(settings)]
        with (tmp_path / "told").open("w+") as output:
            with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True) as process:
                if not by_step:
                    until(lambda: os.fstat(output.fileno()).st_size or process.poll() is not None, "the first")
                    time.sleep(seeded.uniform(0.0, 0.2))
                    process.kill()
                _, errors = process.communicate(timeout=60)
            output.seek(0)
            numbers = [int(line) for line in output]
        assert process.returncode in (0, -signal.SIGKILL), errors
        kills += process.returncode != 0
        assert sorted(numbers) == sorted(set(numbers))
        told += numbers
        if not settings["relay"]:  # else its relay may have sent some
            assert set(numbers) <= {int(body or b"") for body in outboxes.bodies(outbox)}
        begin = end
        let_leases_run_out(outbox)
    with Relay(outbox, config(kafka_cluster)) as relay:
        assert relay.drain(60) == 0
    records = read_back(kafka_cluster.bootstrap_servers, "orders")
    stored = {int(record.value or b"") for record in records}
    assert set(told) <= stored, f"lost {sorted(set(told) - stored)[:10]} of seed {seed}"
    # What was not told may be there: at most one of each lane for each kill.
    assert len(stored - set(told)) <= LANES * kills
    check_history(stored, records, copies=None)
    assert outbox.status().waiting == 0
    assert kills or seed
