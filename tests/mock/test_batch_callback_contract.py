"""The batch callback contract, row by row: exactly one callback, never early, with the outcome of each envelope."""

import logging
import os
import pickle
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

import pytest

import kbatch
from kbatch import Envelope, KafkaSender, OutgoingBatch, SenderCallback
from kbatch.testing import ApiKey, MockCluster

from ..waiting import until
from .clients import end_offsets, read_back

TOPIC = "orders"
METHODS = [name for name in vars(SenderCallback) if name.startswith("mark_")]
FAILURES = [name for name in METHODS if name != "mark_successful"]
# A topic that librdkafka is told not to exist is given up after this.
FAST = {"topic.metadata.refresh.fast.interval.ms": 10, "topic.metadata.propagation.max.ms": 200}


class Call(NamedTuple):
    method: str
    batch: OutgoingBatch
    answer: Any
    thread: threading.Thread


class Recorder(SenderCallback):
    """Keeps every call, whatever it is."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("mark_"):
            return super().__getattribute__(name)

        def record(batch: OutgoingBatch, answer: Any) -> None:
            self.calls.append(Call(name, batch, answer, threading.current_thread()))

        return record


def make_producer(cluster: MockCluster, *, idempotent: bool = False, **config: Any) -> kbatch.Producer:
    # An idempotent producer asks for its id first, which takes librdkafka up to half a second.
    own = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0, "enable.idempotence": idempotent}
    return kbatch.Producer(own | config, close_timeout_s=0)


def envelopes(count: int, **fields: Any) -> list[Envelope]:
    return [Envelope(i, **fields) for i in range(count)]


def send(producer: kbatch.Producer, batch: list[Any], topic: str | None = TOPIC) -> Call:
    """Sends a batch through a sender, and checks what holds for every answer."""
    callback, outgoing = Recorder(), OutgoingBatch(batch)
    assert KafkaSender(producer, topic).send_batch(callback, outgoing) is None
    (call,) = callback.calls  # exactly one, before send_batch returned
    assert call.batch is outgoing
    assert call.thread is threading.current_thread()
    report = call.answer if call.method == "mark_successful" else call.answer.report
    assert isinstance(report, kbatch.DeliveryReport)
    assert len(report) == len(report.partitions) == len(report.offsets) == len(batch)
    # Each envelope is settled, one way.
    assert report.acked + report.failed + report.expired == len(batch)
    assert report.ok == (call.method == "mark_successful")
    again = pickle.loads(pickle.dumps(call.answer))
    assert type(again) is type(call.answer)
    assert str(again) == str(call.answer)
    if call.method != "mark_successful":
        assert isinstance(call.answer, kbatch.KbatchError)
        assert again.report.errors == report.errors
    return call


def names(report: kbatch.DeliveryReport) -> dict[int, str]:
    return {index: error.name for index, error in report.errors.items()}


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    return kafka_cluster


@pytest.fixture
def producer(cluster: MockCluster) -> Iterator[kbatch.Producer]:
    with make_producer(cluster, **FAST) as producer:
        yield producer


def stored(cluster: MockCluster) -> list[bytes | None]:
    return [record.value for record in read_back(cluster.bootstrap_servers, TOPIC)]


# -- all acknowledged


def test_all_acknowledged(cluster: MockCluster, producer: kbatch.Producer) -> None:
    call = send(producer, envelopes(100))
    assert call.method == "mark_successful"
    assert (call.answer.acked, call.answer.offsets) == (100, tuple(range(100)))
    assert stored(cluster) == [str(i).encode() for i in range(100)]
    assert len(producer) == 0


def test_an_empty_batch(cluster: MockCluster, producer: kbatch.Producer) -> None:
    assert send(producer, []).method == "mark_successful"
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_expired_envelopes_are_no_failure(cluster: MockCluster, producer: kbatch.Producer) -> None:
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    call = send(producer, [Envelope(0), Envelope(1, deliver_by=past), Envelope(2)])
    assert (call.method, call.answer.expired_indices, call.answer.acked) == ("mark_successful", (1,), 2)
    call = send(producer, [Envelope(3, deliver_by=past)])
    assert (call.method, call.answer.expired_indices, call.answer.acked) == ("mark_successful", (0,), 0)
    assert stored(cluster) == [b"0", b"2"]


def test_a_full_queue_is_no_failure(cluster: MockCluster) -> None:
    with make_producer(cluster, **{"queue.buffering.max.messages": 10}) as producer:
        assert send(producer, envelopes(1_000)).method == "mark_successful"
    assert stored(cluster) == [str(i).encode() for i in range(1_000)]


def test_a_topic_of_each_envelope(cluster: MockCluster, producer: kbatch.Producer) -> None:
    assert send(producer, envelopes(3, topic=TOPIC), topic=None).method == "mark_successful"
    assert stored(cluster) == [b"0", b"1", b"2"]


# -- an envelope could not be mapped


@pytest.mark.parametrize("index", [0, 50, 99])
@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (Envelope(object()), "message"),
        (Envelope(1, key=7), "key"),
        (Envelope(1, headers={"x": 7}), "headers['x']"),
        (Envelope(data=b"x" * 1_100_000), "data"),
        (None, "envelope"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_serialization_failure_leaves_nothing_on_the_wire(
    cluster: MockCluster, producer: kbatch.Producer, bad: Any, field: str, index: int
) -> None:
    batch = envelopes(100)
    batch[index] = bad
    call = send(producer, batch)
    assert call.method == "mark_serialization_failure"
    error = call.answer
    assert isinstance(error, kbatch.SerializationError)
    assert (error.index, error.field, error.envelope_id) == (index, field, bad and bad.id)
    assert (error.report.acked, error.report.failed) == (0, 100)
    # One is to blame, the others may be sent again as they are.
    outcomes = names(error.report)
    assert outcomes.pop(index) == "_VALUE_SERIALIZATION"
    assert set(outcomes.values()) == {"_PURGE_QUEUE"}
    assert [error.retriable for i, error in error.report.errors.items() if i != index] == [True] * 99
    assert not error.report.errors[index].retriable
    assert not any(error.possibly_persisted for error in error.report.errors.values())
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}
    assert send(producer, envelopes(1)).method == "mark_successful"
    assert stored(cluster) == [b"0"]


def test_no_single_envelope_is_to_blame(cluster: MockCluster) -> None:
    config = {"bootstrap.servers": cluster.bootstrap_servers}
    with kbatch.Producer(config, header_hook=lambda: 1 / 0) as producer:
        call = send(producer, envelopes(3))
    assert (call.method, call.answer.index, call.answer.field) == ("mark_serialization_failure", None, "header_hook")
    assert set(names(call.answer.report).values()) == {"_PURGE_QUEUE"}


def test_memory_that_is_short_is_answered_too(cluster: MockCluster) -> None:
    def encode(message: object, context: object) -> bytes:
        raise MemoryError

    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}, encoder=encode) as producer:
        call = send(producer, envelopes(3))
    assert call.method == "mark_processing_failure"
    assert isinstance(call.answer.__cause__, MemoryError)
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


# -- every failure is an unknown topic or partition


def test_topic_does_not_exist(cluster: MockCluster, producer: kbatch.Producer) -> None:
    cluster.set_topic_error("gone", "UNKNOWN_TOPIC_OR_PART")
    for _ in range(2):  # librdkafka waits for the topic first, and knows of it then
        call = send(producer, envelopes(5), "gone")
        assert call.method == "mark_topic_does_not_exist"
        assert isinstance(call.answer, kbatch.UnknownTopicError)
        assert call.answer.report.failed == 5
        assert set(names(call.answer.report).values()) <= {"_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART"}


def test_a_partition_does_not_exist(cluster: MockCluster, producer: kbatch.Producer) -> None:
    call = send(producer, envelopes(5, partition=9))
    assert call.method == "mark_topic_does_not_exist"
    assert names(call.answer.report) == dict.fromkeys(range(5), "_UNKNOWN_PARTITION")


def test_some_of_an_unknown_topic_and_the_others_acknowledged(cluster: MockCluster, producer: kbatch.Producer) -> None:
    cluster.set_topic_error("gone", "UNKNOWN_TOPIC_OR_PART")
    batch = [Envelope(i, topic="gone" if i % 3 == 1 else None, partition=9 if i % 3 == 2 else None) for i in range(9)]
    call = send(producer, batch)
    assert call.method == "mark_topic_does_not_exist"
    assert (call.answer.report.acked, list(call.answer.report.errors)) == (3, [1, 2, 4, 5, 7, 8])
    assert stored(cluster) == [b"0", b"3", b"6"]


# -- every failure is a timeout


def test_timed_out(cluster: MockCluster) -> None:
    cluster.set_broker_down(1)
    with make_producer(cluster, **{"message.timeout.ms": 200}) as producer:
        call = send(producer, envelopes(5))
    assert call.method == "mark_timed_out"
    assert isinstance(call.answer, kbatch.BatchTimeoutError)
    assert names(call.answer.report) == dict.fromkeys(range(5), "_MSG_TIMED_OUT")
    assert all(error.retriable for error in call.answer.report.errors.values())
    assert not any(error.possibly_persisted for error in call.answer.report.errors.values())  # no broker was there


def test_timed_out_on_its_way_may_be_stored(cluster: MockCluster) -> None:
    with make_producer(cluster, **{"message.timeout.ms": 1_000}) as producer:
        assert send(producer, envelopes(1)).method == "mark_successful"
        cluster.set_rtt(1, 10_000)  # stored, but the answer comes too late: librdkafka looks once a second
        call = send(producer, envelopes(2))
    assert call.method == "mark_timed_out"
    assert all(error.possibly_persisted for error in call.answer.report.errors.values())


def test_some_timed_out_and_the_others_acknowledged(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic(TOPIC, partitions=2)
    kafka_cluster.set_partition_leader(TOPIC, 1, -1)
    with make_producer(kafka_cluster, **{"message.timeout.ms": 300}) as producer:
        call = send(producer, [Envelope(i, partition=i % 2) for i in range(6)])
    assert call.method == "mark_timed_out"
    assert call.answer.report.acked == 3
    assert names(call.answer.report) == dict.fromkeys([1, 3, 5], "_MSG_TIMED_OUT")
    kafka_cluster.set_partition_leader(TOPIC, 1, 1)
    assert stored(kafka_cluster) == [b"0", b"2", b"4"]


# -- any other failure, or mixed causes


@pytest.mark.parametrize("error", ["MSG_SIZE_TOO_LARGE", "TOPIC_AUTHORIZATION_FAILED", "INVALID_RECORD"])
@pytest.mark.parametrize("idempotent", [False, True])
def test_the_broker_refuses(cluster: MockCluster, error: str, idempotent: bool) -> None:
    cluster.push_request_errors(ApiKey.PRODUCE, [error] * 5)  # as many requests as there may be
    with make_producer(cluster, idempotent=idempotent) as producer:
        call = send(producer, envelopes(5))
    assert call.method == "mark_processing_failure"
    assert type(call.answer) is kbatch.BatchError
    assert names(call.answer.report) == dict.fromkeys(range(5), error)
    assert stored(cluster) == []


def test_mixed_causes(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic(TOPIC, partitions=2)
    kafka_cluster.set_partition_leader(TOPIC, 1, -1)
    kafka_cluster.set_topic_error("gone", "UNKNOWN_TOPIC_OR_PART")
    with make_producer(kafka_cluster, **FAST, **{"message.timeout.ms": 500}) as producer:
        batch = [
            Envelope(0, partition=0),
            Envelope(1, partition=1),
            Envelope(2, topic="gone"),
            Envelope(3, partition=7),
        ]
        call = send(producer, batch)
    assert call.method == "mark_processing_failure"
    assert type(call.answer) is kbatch.BatchError
    outcomes = names(call.answer.report)
    assert (outcomes[1], outcomes[3]) == ("_MSG_TIMED_OUT", "_UNKNOWN_PARTITION")
    assert outcomes[2] in ("_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART")
    kafka_cluster.set_partition_leader(TOPIC, 1, 1)
    assert stored(kafka_cluster) == [b"0"]


def test_a_closed_producer(cluster: MockCluster, producer: kbatch.Producer) -> None:
    send(producer, envelopes(1))
    producer.close()
    for batch in (envelopes(3), []):
        callback = Recorder()
        KafkaSender(producer, TOPIC).send_batch(callback, OutgoingBatch(batch))
        (call,) = callback.calls
        assert call.method == "mark_processing_failure"
        assert isinstance(call.answer, kbatch.ProducerClosedError)
        assert names(call.answer.report) == dict.fromkeys(range(len(batch)), "_PURGE_QUEUE")
        assert not any(error.possibly_persisted for error in call.answer.report.errors.values())
    assert stored(cluster) == [b"0"]


def test_a_producer_closed_before_its_first_use(cluster: MockCluster) -> None:
    producer = make_producer(cluster)
    producer.close()
    call = send(producer, envelopes(3))
    assert (call.method, type(call.answer)) == ("mark_processing_failure", kbatch.ProducerClosedError)


def test_a_producer_that_cannot_start(cluster: MockCluster) -> None:
    with make_producer(cluster, **{"security.protocol": "ssl", "ssl.ca.location": "/no/such/file"}) as producer:
        for _ in range(2):
            call = send(producer, envelopes(3))
            assert (call.method, type(call.answer)) == ("mark_processing_failure", kbatch.ConfigError)
            assert call.answer.report.failed == 3


def test_no_thread_for_a_producer(cluster: MockCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with make_producer(cluster) as producer:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            call = send(producer, envelopes(3))
        assert (call.method, type(call.answer)) == ("mark_processing_failure", kbatch.ProducerError)
        assert "can't start new thread" in str(call.answer)
        assert send(producer, envelopes(3)).method == "mark_successful"


def test_a_fatal_error(cluster: MockCluster) -> None:
    with make_producer(cluster, idempotent=True) as producer:
        send(producer, envelopes(1))
        producer._core.inject_fatal_error(45, "made up")
        call = send(producer, envelopes(3))
    assert call.method == "mark_processing_failure"
    assert isinstance(call.answer, kbatch.ProducerFatalError)
    assert "made up" in str(call.answer)
    assert names(call.answer.report) == dict.fromkeys(range(3), "OUT_OF_ORDER_SEQUENCE_NUMBER")
    assert all(error.fatal for error in call.answer.report.errors.values())
    assert stored(cluster) == [b"0"]


def in_background(producer: kbatch.Producer, batch: list[Envelope], left: int) -> tuple[threading.Thread, Recorder]:
    """Sends a batch on a thread of its own, and waits until `left` of its envelopes are in flight."""
    callback = Recorder()
    sender = KafkaSender(producer, TOPIC)
    thread = threading.Thread(target=sender.send_batch, args=(callback, OutgoingBatch(batch)))
    thread.start()

    def in_flight() -> bool:
        stats = producer.stats()
        return (stats["enqueue_ns"] > 0, stats["acked"], stats["in_flight"]) == (True, len(batch) - left, left)

    until(in_flight, "the batch in flight")
    return thread, callback


@pytest.mark.parametrize("end", ["purge", "close", "fatal"])
def test_what_is_in_flight_is_given_up(cluster: MockCluster, end: str) -> None:
    cluster.set_broker_down(1)
    producer = make_producer(cluster, idempotent=True)
    thread, callback = in_background(producer, envelopes(50), 50)
    assert callback.calls == []  # not before all is settled
    if end == "purge":
        producer.purge()
    elif end == "close":
        assert producer.close(0) == 50
    else:
        producer._core.inject_fatal_error(45, "made up")
    thread.join(30)
    (call,) = callback.calls
    assert call.thread is thread
    assert call.method == "mark_processing_failure"
    assert type(call.answer) is kbatch.BatchError
    assert set(names(call.answer.report).values()) <= {"_PURGE_QUEUE", "OUT_OF_ORDER_SEQUENCE_NUMBER"}
    assert call.answer.report.failed == 50
    producer.close(0)


def test_a_callback_comes_when_the_last_envelope_is_settled(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic(TOPIC, partitions=2)
    kafka_cluster.set_partition_leader(TOPIC, 1, -1)
    with make_producer(kafka_cluster) as producer:
        thread, callback = in_background(producer, [Envelope(i, partition=i % 2) for i in range(10)], 5)
        assert callback.calls == []
        kafka_cluster.set_partition_leader(TOPIC, 1, 1)
        thread.join(30)
        assert [call.method for call in callback.calls] == ["mark_successful"]
        assert callback.calls[0].answer.acked == 10


# -- many batches


def test_each_of_many_batches_is_answered_once(cluster: MockCluster, producer: kbatch.Producer) -> None:
    batches = [[OutgoingBatch(Envelope([t, n, i]) for i in range(t + 1)) for n in range(20)] for t in range(8)]
    callbacks = [Recorder() for _ in batches]

    def run(callback: Recorder, mine: list[OutgoingBatch]) -> None:
        sender = KafkaSender(producer, TOPIC)
        for batch in mine:
            sender.send_batch(callback, batch)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(callbacks, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for callback, mine, thread in zip(callbacks, batches, threads, strict=True):
        assert [call.batch for call in callback.calls] == mine
        assert {call.method for call in callback.calls} == {"mark_successful"}
        assert {call.thread for call in callback.calls} == {thread}
        assert [call.answer.acked for call in callback.calls] == [len(batch) for batch in mine]
    assert len(stored(cluster)) == sum(len(batch) for mine in batches for batch in mine)


def test_a_batch_may_be_sent_again(cluster: MockCluster, producer: kbatch.Producer) -> None:
    batch, callback, sender = OutgoingBatch(envelopes(2)), Recorder(), KafkaSender(producer, TOPIC)
    cluster.push_request_errors(ApiKey.PRODUCE, ["MSG_SIZE_TOO_LARGE"])
    sender.send_batch(callback, batch)
    sender.send_batch(callback, batch)
    assert [call.method for call in callback.calls] == ["mark_processing_failure", "mark_successful"]
    assert stored(cluster) == [b"0", b"1"]


# -- callbacks that raise


class Raises(Recorder):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("mark_"):
            return value

        def record_and_raise(batch: OutgoingBatch, answer: Any) -> None:
            value(batch, answer)
            raise ZeroDivisionError(f"from {name}")

        return record_and_raise


@pytest.mark.parametrize(
    ("batch", "topic", "method"),
    [
        ([Envelope(1)], TOPIC, "mark_successful"),
        ([Envelope(1), None], TOPIC, "mark_serialization_failure"),
        ([Envelope(1)], "gone", "mark_topic_does_not_exist"),
        ([Envelope(1, topic="gone"), Envelope(2, topic="refused", partition=0)], None, "mark_processing_failure"),
    ],
)
def test_a_callback_that_raises_is_logged_and_costs_nothing(
    cluster: MockCluster,
    producer: kbatch.Producer,
    caplog: pytest.LogCaptureFixture,
    batch: list[Any],
    topic: str | None,
    method: str,
) -> None:
    cluster.set_topic_error("gone", "UNKNOWN_TOPIC_OR_PART")
    cluster.set_topic_error("refused", "TOPIC_AUTHORIZATION_FAILED")
    callback = Raises()
    KafkaSender(producer, topic).send_batch(callback, OutgoingBatch(batch))
    assert [call.method for call in callback.calls] == [method]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("kbatch", logging.ERROR)
    assert f"from {method}" in caplog.text
    assert repr(callback.calls[0].answer) in record.getMessage()  # the outcome is not lost
    assert send(producer, envelopes(1)).method == "mark_successful"


def test_an_object_without_the_method_is_logged_too(
    cluster: MockCluster, producer: kbatch.Producer, caplog: pytest.LogCaptureFixture
) -> None:
    KafkaSender(producer, TOPIC).send_batch(object(), OutgoingBatch(envelopes(1)))
    assert "mark_successful" in caplog.text
    assert stored(cluster) == [b"0"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_to_end_the_program_goes_on_its_way(
    cluster: MockCluster, producer: kbatch.Producer, error: type[BaseException]
) -> None:
    class Ends(SenderCallback):
        calls = 0

        def mark_successful(self, batch: OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            self.calls += 1
            raise error

    callback = Ends()
    with pytest.raises(error):
        KafkaSender(producer, TOPIC).send_batch(callback, OutgoingBatch(envelopes(1)))
    assert callback.calls == 1


def test_an_interrupt_while_mapping_is_answered_and_raised(cluster: MockCluster) -> None:
    def encode(message: object, context: object) -> bytes:
        raise KeyboardInterrupt

    callback, batch = Recorder(), OutgoingBatch(envelopes(3))
    with (
        kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}, encoder=encode) as producer,
        pytest.raises(KeyboardInterrupt),
    ):
        KafkaSender(producer, TOPIC).send_batch(callback, batch)
    (call,) = callback.calls
    assert (call.method, type(call.answer), call.batch) == (
        "mark_processing_failure",
        kbatch.BatchInterruptedError,
        batch,
    )
    assert call.answer.report.failed == 3
    assert end_offsets(cluster.bootstrap_servers, TOPIC) == {0: 0}


def test_a_callback_may_send(cluster: MockCluster, producer: kbatch.Producer) -> None:
    sender = KafkaSender(producer, TOPIC)
    inner = Recorder()

    class Sends(SenderCallback):
        def mark_successful(self, batch: OutgoingBatch, report: kbatch.DeliveryReport) -> None:
            sender.send_batch(inner, OutgoingBatch([Envelope("inner")]))

    sender.send_batch(Sends(), OutgoingBatch([Envelope("outer")]))
    assert [call.method for call in inner.calls] == ["mark_successful"]
    assert stored(cluster) == [b'"outer"', b'"inner"']


# -- a forked child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
def test_a_forked_child_is_answered(cluster: MockCluster, producer: kbatch.Producer) -> None:
    send(producer, envelopes(1))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            callback = Recorder()
            KafkaSender(producer, TOPIC).send_batch(callback, OutgoingBatch(envelopes(2)))
            (call,) = callback.calls
            answer = f"{call.method} {type(call.answer).__name__} {call.answer.report.failed}"
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "mark_processing_failure ForkError 2"
    assert os.waitpid(pid, 0)[1] == 0
    assert send(producer, envelopes(1)).method == "mark_successful"


# -- the callback's own defaults


def test_the_methods_are_the_designs() -> None:
    assert METHODS == [
        "mark_successful",
        "mark_processing_failure",
        "mark_serialization_failure",
        "mark_timed_out",
        "mark_topic_does_not_exist",
        "mark_circuit_open",
    ]


def test_success_is_silent_by_default(
    cluster: MockCluster, producer: kbatch.Producer, caplog: pytest.LogCaptureFixture
) -> None:
    KafkaSender(producer, TOPIC).send_batch(SenderCallback(), OutgoingBatch(envelopes(1)))
    assert caplog.records == []


@pytest.mark.parametrize("method", FAILURES)
def test_each_failure_is_logged_by_default(caplog: pytest.LogCaptureFixture, method: str) -> None:
    batch = OutgoingBatch(envelopes(3))
    getattr(SenderCallback(), method)(batch, kbatch.KbatchError("the reason"))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("kbatch", logging.ERROR)
    assert "<OutgoingBatch of 3 envelopes>" in record.getMessage()
    assert "the reason" in record.getMessage()


@pytest.mark.parametrize("method", ["mark_timed_out", "mark_topic_does_not_exist", "mark_circuit_open"])
def test_the_special_failures_fall_back(caplog: pytest.LogCaptureFixture, method: str) -> None:
    calls: list[tuple[OutgoingBatch, kbatch.KbatchError]] = []

    class Callback(SenderCallback):
        def mark_processing_failure(self, batch: OutgoingBatch, error: kbatch.KbatchError) -> None:
            calls.append((batch, error))

    batch, error = OutgoingBatch([]), kbatch.KbatchError("x")
    getattr(Callback(), method)(batch, error)
    assert calls == [(batch, error)]
    assert caplog.records == []


def test_protocol() -> None:
    class Mine:
        def send_batch(self, callback: SenderCallback, batch: OutgoingBatch) -> None: ...

    producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"})
    sender = KafkaSender(producer, TOPIC)
    assert isinstance(sender, kbatch.SenderProtocol)
    assert isinstance(Mine(), kbatch.SenderProtocol)
    assert not isinstance(object(), kbatch.SenderProtocol)
    assert (sender.producer, sender.topic) == (producer, TOPIC)
    assert repr(sender) == "<KafkaSender to 'orders' by <kbatch.Producer not started>>"


def test_outgoing_batches() -> None:
    batch = OutgoingBatch(envelope for envelope in envelopes(3))
    assert (len(batch), repr(batch)) == (3, "<OutgoingBatch of 3 envelopes>")
    assert [envelope.message for envelope in batch] == [0, 1, 2]
    assert list(batch) == list(batch.envelopes)
    with pytest.raises(AttributeError):
        batch.envelopes = ()
    assert pickle.loads(pickle.dumps(batch)).envelopes == batch.envelopes
