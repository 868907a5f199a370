"""With a transactional.id a batch is one transaction: readers see all of it or nothing, whatever happens."""

import asyncio
import contextlib
import json
import pickle
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AclOperation

import kbatch
from kbatch import aio
from tests.kafka.cluster import KafkaCluster
from tests.kafka.proxy import Direction
from tests.waiting import until

QUIET = {"log_level": 0}


def config(cluster: KafkaCluster, name: str = "orders", **more: Any) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "transactional.id": name, **QUIET, **more}


def envelopes(batch: int, count: int) -> list[kbatch.Envelope[Any]]:
    return [kbatch.Envelope({"batch": batch, "n": n, "of": count}) for n in range(count)]


def read(cluster: KafkaCluster, topic: str, isolation: str = "read_committed") -> list[dict[str, Any]]:
    """All that a reader sees now, by partition and offset. An open transaction would hold it up, and fails it."""
    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap_servers,
            "group.id": "tests",
            "isolation.level": isolation,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 10,
            **QUIET,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        seen: list[dict[str, Any]] = []
        ended = set()
        deadline = time.monotonic() + 60
        while len(ended) < len(partitions):
            assert time.monotonic() < deadline, "the end of a partition is never reached"
            for message in consumer.consume(1000, timeout=0.1):
                if message.error() is not None:
                    assert message.error().name() == "_PARTITION_EOF", message.error()
                    low, high = consumer.get_watermark_offsets(TopicPartition(topic, message.partition()), timeout=10)
                    position = consumer.position([TopicPartition(topic, message.partition())])[0].offset
                    if position >= high or high == low:
                        ended.add(message.partition())
                else:
                    seen.append({"partition": message.partition(), **json.loads(message.value())})
        return sorted(seen, key=lambda one: one["partition"])
    finally:
        consumer.close()


def batches(records: list[dict[str, Any]]) -> dict[int, int]:
    """Of each batch that is seen, how many envelopes; fails if it is not all of them, each once."""
    counted = Counter((record["batch"], record["n"]) for record in records)
    assert max(counted.values(), default=1) == 1, "an envelope is seen twice"
    sizes = {record["batch"]: record["of"] for record in records}
    seen = dict(Counter(record["batch"] for record in records))
    assert seen == sizes, "a part of a batch is seen"
    return seen


def test_a_batch_is_committed(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic(partitions=1)
    with kbatch.Producer(config(one_broker)) as producer:
        reports = [producer.send_batch(topic, envelopes(i, count)) for i, count in enumerate((10, 1, 2_500, 0))]
        assert [report.acked for report in reports] == [10, 1, 2_500, 0]
        # Behind each transaction stands its marker, which has an offset too.
        assert reports[0].offsets == tuple(range(10))
        assert reports[1].offsets == (11,)
    seen = read(one_broker, topic)
    assert batches(seen) == {0: 10, 1: 1, 2: 2_500}
    assert [record["n"] for record in seen if record["batch"] == 2] == list(range(2_500))


def test_nothing_is_committed_before_all_is_acknowledged(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    with kbatch.Producer(config(one_broker)) as producer:
        assert producer.send_batch(topic, envelopes(0, 5)).ok
        report = producer.send_batch(topic, [*envelopes(1, 5), kbatch.Envelope(0, partition=99)])
        assert (report.acked, report.failed) == (0, 6)
        assert report.errors[5].name == "_UNKNOWN_PARTITION"
        assert {report.errors[i].name for i in range(5)} == {"TRANSACTION_ABORTABLE"}
        assert all(error.retriable for i, error in report.errors.items() if i != 5)
        assert not any(error.possibly_persisted for error in report.errors.values())
        assert set(report.offsets) == {-1}
        assert isinstance(report.exception(), kbatch.UnknownTopicError)  # the cause's own kind
        assert "the transaction of 6 envelopes was aborted; the cause is envelope 5: " in str(report.exception())
        assert producer.send_batch(topic, envelopes(2, 5)).ok
        assert (producer.stats()["acked"], producer.stats()["failed"]) == (10, 6)
    assert batches(read(one_broker, topic)) == {0: 5, 2: 5}


def test_what_the_broker_refuses_aborts_the_batch(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic(config={"max.message.bytes": "20000"}, partitions=1)
    with kbatch.Producer(config(one_broker, **{"batch.num.messages": 10})) as producer:
        large = kbatch.Envelope("x" * 50_000)
        report = producer.send_batch(topic, [*envelopes(0, 50), large, *envelopes(1, 50)])
        assert (report.acked, report.failed) == (0, 101)
        assert report.errors[50].name == "MSG_SIZE_TOO_LARGE"
        # librdkafka goes on with a sequence number that the broker does not expect, and aborts once more.
        for _ in range(3):
            report = producer.send_batch(topic, envelopes(2, 50))
            if report.ok:
                break
            assert str(report.exception()) == "the transaction of 50 envelopes was aborted"
            assert all(error.retriable and not error.possibly_persisted for error in report.errors.values())
        assert report.ok
    assert batches(read(one_broker, topic)) == {2: 50}
    # Those before it were written, and are seen by readers that do not mind.
    assert {record["batch"] for record in read(one_broker, topic, "read_uncommitted")} >= {0, 2}


def test_the_contract_holds(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    answers: list[tuple[str, Any]] = []

    class Callback(kbatch.SenderCallback):
        def mark_successful(self, batch: Any, report: Any) -> None:
            answers.append(("successful", report))

        def mark_processing_failure(self, batch: Any, error: Any) -> None:
            answers.append(("processing failure", error))

        def mark_serialization_failure(self, batch: Any, error: Any) -> None:
            answers.append(("serialization failure", error))

        def mark_topic_does_not_exist(self, batch: Any, error: Any) -> None:
            answers.append(("topic does not exist", error))

    waits = {"topic.metadata.propagation.max.ms": 1000}
    with kbatch.Producer(config(one_broker, **waits)) as producer:
        sender = kbatch.KafkaSender(producer, topic)
        sender.send_batch(Callback(), kbatch.OutgoingBatch(envelopes(0, 5)))
        sender.send_batch(Callback(), kbatch.OutgoingBatch([*envelopes(1, 5), kbatch.Envelope({1: object()})]))
        sender.send_batch(Callback(), kbatch.OutgoingBatch([*envelopes(2, 5), kbatch.Envelope(0, topic="nowhere")]))
    sender.send_batch(Callback(), kbatch.OutgoingBatch(envelopes(3, 5)))
    kinds = [kind for kind, _ in answers]
    assert kinds == ["successful", "serialization failure", "topic does not exist", "processing failure"]
    assert [answer.report.failed for _, answer in answers[1:]] == [6, 6, 5]
    assert batches(read(one_broker, topic)) == {0: 5}


def test_on_an_event_loop(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()

    async def send() -> None:
        async with aio.Producer(config(one_broker)) as producer:
            reports = await asyncio.gather(*(producer.send_batch(topic, envelopes(i, 200)) for i in range(5)))
            assert [report.acked for report in reports] == [200] * 5
            report = await producer.send_batch(topic, [*envelopes(5, 5), kbatch.Envelope(0, partition=99)])
            assert report.failed == 6
            with pytest.raises(kbatch.ProducerError, match="submit is not possible"):
                await producer.submit(topic, envelopes(6, 1))
            cancelled = asyncio.create_task(producer.send_batch(topic, envelopes(7, 200)))
            while not producer.stats()["in_flight"]:
                assert not cancelled.done()
                await asyncio.sleep(0)
            assert cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert (await producer.send_batch(topic, envelopes(8, 3))).ok

    untold = 0
    try:
        asyncio.run(send())
    except kbatch.UndeliveredError as error:  # the end tells what the one that was cancelled cannot
        untold = error.count
    seen = batches(read(one_broker, topic))
    assert (untold, seen.pop(7, 0)) in ((0, 200), (200, 0), (0, 0))  # all of it, or nothing
    assert seen == {0: 200, 1: 200, 2: 200, 3: 200, 4: 200, 8: 3}


def test_submit_is_refused(one_broker: KafkaCluster) -> None:
    with (
        kbatch.Producer(config(one_broker)) as producer,
        pytest.raises(kbatch.ProducerError, match="a batch is one transaction, and a producer has one at a time"),
    ):
        producer.submit("orders", envelopes(0, 1))


def test_transactions_of_several_threads_come_one_at_a_time(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic(partitions=1)
    with kbatch.Producer(config(one_broker)) as producer:
        oks: list[bool] = []

        def send(thread: int) -> None:
            for i in range(5):
                oks.append(producer.send_batch(topic, envelopes(10 * thread + i, 20)).ok)

        threads = [threading.Thread(target=send, args=(each,)) for each in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert oks == [True] * 20
    seen = read(one_broker, topic)
    assert len(batches(seen)) == 20
    runs = [seen[i : i + 20] for i in range(0, len(seen), 20)]
    assert all(len({record["batch"] for record in run}) == 1 for run in runs), "two transactions are mixed"
    assert all([record["n"] for record in run] == list(range(20)) for run in runs)


def test_a_fenced_producer_says_so(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    old, new = kbatch.Producer(config(one_broker)), kbatch.Producer(config(one_broker))
    with old, new:
        assert old.send_batch(topic, envelopes(0, 5)).ok
        assert new.send_batch(topic, envelopes(1, 5)).ok
        report = old.send_batch(topic, envelopes(2, 5))
        assert report.failed == 5
        assert {error.name for error in report.errors.values()} == {"_FENCED"}
        assert all(error.fatal and not error.retriable for error in report.errors.values())
        with pytest.raises(kbatch.ProducerFencedError, match="another producer with the same") as error:
            old.send_batch(topic, envelopes(3, 5))
        assert isinstance(error.value, kbatch.ProducerFatalError)
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        assert new.send_batch(topic, envelopes(4, 5)).ok
    assert batches(read(one_broker, topic)) == {1: 5, 0: 5, 4: 5}


def test_who_may_not_have_the_id_is_told(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    one_broker.allow("User:alice", topic, AclOperation.WRITE, AclOperation.DESCRIBE)
    alice = {**one_broker.sasl(), **QUIET}
    with kbatch.Producer({**alice, "transactional.id": "not alice's"}) as producer:
        report = producer.send_batch(topic, envelopes(0, 5))
        assert {error.name for error in report.errors.values()} == {"TRANSACTIONAL_ID_AUTHORIZATION_FAILED"}
        assert all(error.fatal and not error.possibly_persisted for error in report.errors.values())
        with pytest.raises(kbatch.ProducerFatalError, match="TRANSACTIONAL_ID_AUTHORIZATION_FAILED"):
            producer.send_batch(topic, envelopes(1, 5))
    one_broker.allow_transactions("User:alice", "alice's")
    with kbatch.Producer({**alice, "transactional.id": "alice's"}) as producer:
        assert producer.send_batch(topic, envelopes(2, 5)).ok
    assert batches(read(one_broker, topic)) == {2: 5}


def test_who_stops_waiting_does_not_stop_the_transaction(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    through_proxy = {"bootstrap.servers": one_broker.proxied_servers}
    with kbatch.Producer(config(one_broker, **through_proxy)) as producer:
        assert producer.send_batch(topic, envelopes(0, 5)).ok
        one_broker.proxies[0].delay(0.3)
        with pytest.raises(kbatch.BatchPendingError) as error:
            producer.send_batch(topic, envelopes(1, 5), timeout=0.1)
        pending = error.value.pending
        assert pending is not None
        assert not pending.done()
        called: list[kbatch.DeliveryReport] = []
        pending.add_done_callback(lambda done: called.append(done.report))
        assert pending.wait(60).acked == 5
        until(lambda: called, "the callback")
        assert called[0].acked == 5
    assert batches(read(one_broker, topic)) == {0: 5, 1: 5}


def test_closing_waits_for_the_transaction(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    producer = kbatch.Producer(config(one_broker, **{"bootstrap.servers": one_broker.proxied_servers}))
    assert producer.send_batch(topic, envelopes(0, 5)).ok
    one_broker.proxies[0].delay(0.2)
    with pytest.raises(kbatch.BatchPendingError) as error:
        producer.send_batch(topic, envelopes(1, 5), timeout=0.1)
    assert producer.close(60) == 0
    assert error.value.pending is not None
    assert error.value.pending.report.acked == 5
    assert batches(read(one_broker, topic)) == {0: 5, 1: 5}


def test_closing_in_a_hurry_says_what_is_lost(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    settings = {"bootstrap.servers": one_broker.proxied_servers, "transaction.timeout.ms": 5_000}
    producer = kbatch.Producer(config(one_broker, **settings))
    assert producer.send_batch(topic, envelopes(0, 5)).ok
    one_broker.proxies[0].refuse()
    with pytest.raises(kbatch.BatchPendingError) as error:
        producer.send_batch(topic, envelopes(1, 5), timeout=0.1)
    with pytest.raises(kbatch.UndeliveredError) as lost:
        producer.close(0.1)
    assert lost.value.count == 5
    pending = error.value.pending
    assert pending is not None
    assert pending.wait(60).failed == 5
    one_broker.proxies[0].heal()
    with kbatch.Producer(config(one_broker)) as producer:  # ends what the first has left
        assert producer.send_batch(topic, envelopes(2, 5)).ok
    assert batches(read(one_broker, topic)) == {0: 5, 2: 5}


def test_a_commit_is_tried_again(one_broker: KafkaCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = one_broker.create_topic()
    proxy = one_broker.proxies[0]
    with kbatch.Producer(config(one_broker, **{"bootstrap.servers": one_broker.proxied_servers})) as producer:
        assert producer.send_batch(topic, envelopes(0, 5)).ok
        with before_commit(producer, lambda: proxy.drop(Direction.TO_CLIENT)):
            # The commit arrives, its answer does not, until the connection is cut and a new one made.
            healer = threading.Timer(1.0, proxy.heal)
            healer.start()
            report = producer.send_batch(topic, envelopes(1, 5))
            healer.join()
        assert report.acked == 5
        assert producer.send_batch(topic, envelopes(2, 5)).ok
    assert batches(read(one_broker, topic)) == {0: 5, 1: 5, 2: 5}


def test_a_commit_without_an_answer_may_have_been_made(one_broker: KafkaCluster) -> None:
    topic = one_broker.create_topic()
    proxy = one_broker.proxies[0]
    settings = {
        "bootstrap.servers": one_broker.proxied_servers,
        "transaction.timeout.ms": 3_000,
        "socket.timeout.ms": 1_000,
    }
    with kbatch.Producer(config(one_broker, **settings)) as producer:
        assert producer.send_batch(topic, envelopes(0, 5)).ok
        with before_commit(producer, lambda: proxy.drop(Direction.TO_CLIENT)):
            report = producer.send_batch(topic, envelopes(1, 5))
        assert report.failed == 5
        assert all(error.possibly_persisted for error in report.errors.values())
        proxy.heal()
        with pytest.raises(kbatch.ProducerError, match="make a new one"):
            producer.send_batch(topic, envelopes(2, 5))
    with kbatch.Producer(config(one_broker)) as producer:
        assert producer.send_batch(topic, envelopes(3, 5)).ok
    seen = batches(read(one_broker, topic))
    assert seen.pop(1, 5) == 5
    assert seen == {0: 5, 3: 5}


@contextlib.contextmanager
def before_commit(producer: kbatch.Producer, act: Any) -> Iterator[None]:
    """Does something when a transaction's messages are acknowledged, before it is committed."""
    transactions = producer._transactions
    assert transactions is not None
    commit = transactions._commit

    def acting(batch: Any) -> None:
        act()
        commit(batch)

    transactions._commit = acting  # type: ignore[method-assign]
    try:
        yield
    finally:
        transactions._commit = commit  # type: ignore[method-assign]


def test_a_broker_is_killed(kafka3: KafkaCluster) -> None:
    topic = kafka3.create_topic(partitions=3)
    stop = threading.Event()
    outcomes: dict[int, kbatch.DeliveryReport] = {}
    with kbatch.Producer(config(kafka3, "killed")) as producer:

        def send() -> None:
            while not stop.is_set():
                outcomes[len(outcomes)] = producer.send_batch(topic, envelopes(len(outcomes), 50))

        sender = threading.Thread(target=send)
        sender.start()
        until(lambda: len(outcomes) > 3, "the first transactions")
        victim = kafka3.leader(topic)
        victim.kill()
        before = len(outcomes)
        kafka3.leader(topic)
        until(lambda: len(outcomes) > before + 10, "transactions after the leader was killed")
        victim.start()
        kafka3.wait_until_up()
        stop.set()
        sender.join()
    seen = batches(read(kafka3, topic))
    committed = {i for i, report in outcomes.items() if report.ok}
    unknown = {
        i
        for i, report in outcomes.items()
        if not report.ok and any(error.possibly_persisted for error in report.errors.values())
    }
    assert committed <= set(seen) <= committed | unknown


def test_a_time_out_that_makes_copies_elsewhere_makes_none_in_a_transaction(kafka3: KafkaCluster) -> None:
    topic = kafka3.create_topic(partitions=1)
    short = {"delivery.timeout.ms": 2000, "request.timeout.ms": 1000}
    with kbatch.Producer(config(kafka3, "no-copies", **short)) as producer:
        producer.send_batch(topic, envelopes(0, 1)).raise_for_errors()
        leader = kafka3.leader(topic)
        for broker in kafka3.brokers:
            if broker is not leader:
                broker.pause()
        healing = threading.Timer(6, kafka3.heal)
        healing.start()
        try:
            report = producer.send_batch(topic, envelopes(1, 100))
        finally:
            healing.join()
        assert len(report.errors) == 100
        assert not any(error.possibly_persisted for error in report.errors.values())
    with kbatch.Producer(config(kafka3, "no-copies")) as producer:  # the first one's abort may have been fatal
        producer.send_batch(topic, envelopes(1, 100)).raise_for_errors()
    assert batches(read(kafka3, topic)) == {0: 1, 1: 100}


STEPS = ("hold", "init", "begin", "enqueue", "commit", "committed", "answer")


@pytest.mark.parametrize("step", STEPS)
def test_the_sender_is_killed(one_broker: KafkaCluster, step: str) -> None:
    topic = one_broker.create_topic()
    name = f"killed at {step}"
    victim = run_sender(one_broker, topic, name, step, first=0)
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    told = [int(line) for line in victim.stdout.split()]
    after = run_sender(one_broker, topic, name, "never", first=100)
    assert after.returncode == 0, after.stderr
    told += [int(line) for line in after.stdout.split()]
    seen = batches(read(one_broker, topic))
    dying = {1} if step != "init" else {0}
    assert set(told) <= set(seen) <= set(told) | dying
    if step in ("hold", "init", "begin", "enqueue", "commit"):
        assert set(seen) == set(told), "it was never committed"
    else:
        assert set(seen) == set(told) | dying, "it was committed, and only the answer was lost"


@pytest.mark.parametrize("seed", range(3))
def test_the_sender_is_killed_at_any_time(one_broker: KafkaCluster, seed: int) -> None:
    topic = one_broker.create_topic()
    name = f"killed at any time {seed}"
    told: list[int] = []
    first = 0
    for i in range(3):
        delay_s = ((seed * 7 + i * 3) % 11) * 0.013
        victim = run_sender(one_broker, topic, name, "never", first=first, batches=10_000, kill_after_s=delay_s)
        told += [int(line) for line in victim.stdout.split()]
        first += 10_000
    assert told
    run_sender(one_broker, topic, name, "never", first=first, batches=1)
    seen = set(batches(read(one_broker, topic)))
    assert set(told) <= seen
    # At most the one that each was about.
    assert len({number for number in seen if number < first} - set(told)) <= 3


def run_sender(
    cluster: KafkaCluster,
    topic: str,
    name: str,
    step: str,
    *,
    first: int,
    batches: int = 3,
    kill_after_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """A process that sends batches and prints the number of each that is committed; it kills itself at `step`."""
    program = str(Path(__file__).with_name("transactional_sender.py"))
    settings = json.dumps(config(cluster, name))
    command = [sys.executable, "-u", program, settings, topic, step, str(first), str(batches)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begun = ""
        if kill_after_s is not None:
            assert process.stdout is not None
            begun = process.stdout.readline()
            time.sleep(kill_after_s)
            process.kill()
        out, err = process.communicate(timeout=60)
    if kill_after_s is not None:
        # The last line may be cut off.
        out = begun + out[: out.rfind("\n") + 1]
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_pair_of_the_page_of_migration(one_broker: KafkaCluster, side: str) -> None:
    orders = [{"id": f"order-{i}", "batch": 0, "n": i, "of": 20} for i in range(20)]
    with contextlib.suppress(KafkaException):
        one_broker.delete_topic("orders")
    one_broker.create_topic("orders")
    program = Path(__file__).parents[2] / "examples" / "migration" / "transactions" / f"{side}.py"
    settings = {"bootstrap.servers": one_broker.bootstrap_servers, **QUIET}
    runpy.run_path(str(program))["send_orders"](settings, orders)
    assert batches(read(one_broker, "orders")) == {0: 20}
