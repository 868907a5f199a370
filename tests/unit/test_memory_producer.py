"""Producers in memory: what an application's own tests see, and that they behave as the ones they stand for."""

import asyncio
import contextlib
import gc
import inspect
import linecache
import logging
import os
import pickle
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, OutgoingBatch, aio
from kbatch._fastmap import Core
from kbatch._recovery._handle import ProducerHandle
from kbatch.testing import MemoryProducer, MemoryRecord
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..injection import TESTING, Injector
from ..mapping import NOWHERE
from ..waiting import later, until

TOPIC = "orders"


def envelopes(count: int, **fields: Any) -> list[Envelope]:
    return [Envelope(i, **fields) for i in range(count)]


def messages(found: tuple[Envelope, ...]) -> list[Any]:
    return [envelope.message for envelope in found]


def values(producer: MemoryProducer | AioMemoryProducer) -> list[bytes | None]:
    return [record.value() for record in producer.records]


def names(report: kbatch.DeliveryReport) -> dict[int, str]:
    return {index: error.name for index, error in report.errors.items()}


@pytest.fixture
def producer() -> Iterator[MemoryProducer]:
    with MemoryProducer(close_timeout_s=0) as producer:
        yield producer
        producer.release()


# -- it is a producer


def test_it_is_usable_wherever_a_producer_is() -> None:
    assert isinstance(MemoryProducer(), kbatch.Producer)
    assert isinstance(AioMemoryProducer(), aio.Producer)


@pytest.mark.parametrize(
    ("memory", "real"), [(MemoryProducer, kbatch.Producer), (AioMemoryProducer, aio.Producer)], ids=["threads", "aio"]
)
def test_its_surface_is_that_of_the_real_one(memory: type, real: type) -> None:
    for name in dir(real):
        if not name.startswith("_"):
            assert getattr(memory, name) is getattr(real, name), name
    of_memory = dict(inspect.signature(memory).parameters)
    of_real = dict(inspect.signature(real).parameters)
    assert of_memory.pop("config").default is None
    assert of_real.pop("config").default is inspect.Parameter.empty
    del of_memory["partitions"]
    assert of_memory == of_real


@pytest.mark.parametrize("memory", [MemoryProducer, AioMemoryProducer], ids=["threads", "aio"])
def test_every_method_of_the_core_that_needs_librdkafka_is_overridden(memory: Callable[[], Any]) -> None:
    # By what they do: each of these would start librdkafka, or use the one that is not there.
    core = memory()._core
    own = {name for name in vars(type(core)) if not name.startswith("_")}
    assert own >= {"start", "send", "send_detached", "flush", "purge", "close", "name", "probe", "inject_fatal_error"}
    assert own >= {"abandon", "counters"}
    harmless = {"map", "map_packed", "begin_mapping", "map_slice", "records", "fail", "without_outcome", "closed"}
    harmless |= {"dispatcher", "undelivered", "has_unreleased", "await_release"}
    inherited = {name for name in dir(Core) if not name.startswith("_")} - own
    assert inherited == harmless


def test_no_librdkafka_is_started() -> None:
    before = set(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else set()
    with MemoryProducer() as producer:
        producer.send_batch(TOPIC, envelopes(3))
        if before:
            # the dispatcher, and no thread of librdkafka or of the drainer
            assert len(set(os.listdir("/proc/self/task")) - before) == 1


# -- what has come


def test_a_batch(producer: MemoryProducer) -> None:
    batch = [Envelope({"id": i}, key=f"k{i}", headers={"h": "x"}) for i in range(3)]
    report = producer.send_batch(TOPIC, batch)
    assert (report.ok, report.acked, report.partitions, report.offsets) == (True, 3, (0, 0, 0), (0, 1, 2))
    assert all(kept is sent for kept, sent in zip(producer.envelopes, batch, strict=True))
    assert [record.value() for record in producer.records] == [b'{"id":0}', b'{"id":1}', b'{"id":2}']
    record = producer.records[1]
    assert (record.topic(), record.partition(), record.offset(), record.key()) == (TOPIC, 0, 1, b"k1")
    assert record.error() is None
    assert repr(record) == "<MemoryRecord orders [0] at offset 1>"
    assert ("h", b"x") in record.headers()
    assert (producer.in_flight, len(producer)) == ((), 0)
    stats = producer.stats()
    assert (stats["batches"], stats["envelopes"], stats["acked"], stats["failed"], stats["in_flight"]) == (
        1,
        3,
        3,
        0,
        0,
    )


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents", "raw"])
def test_a_record_is_what_the_wire_format_writes(wire: str) -> None:
    real = kbatch.Producer(NOWHERE, wire=wire, source="here", header_hook=lambda: {"hook": "1"})
    time = datetime(2026, 11, 23, 9, 16, 45, tzinfo=timezone.utc)
    batch = [
        Envelope({"a": 1}, key="k", sent_at=time, timestamp=17, tenant_id="t", headers={"mine": None}),
        Envelope(data=b"", sent_at=time, timestamp=18),
        kbatch.Tombstone("gone", partition=1),
    ]
    with MemoryProducer(partitions=2, wire=wire, source="here", header_hook=lambda: {"hook": "1"}) as producer:
        producer.send_batch(TOPIC, batch).raise_for_errors()
        for record, mapped in zip(producer.records[:2], real._map(TOPIC, batch)[:2], strict=True):
            _, _, timestamp, key, value, headers = mapped
            assert (record.timestamp(), record.key(), record.value()) == ((1, timestamp), key, value)
            assert record.headers() == headers
        read = [kbatch.read_envelope(record, wire=wire) for record in producer.records]
    assert bytes(read[0].data) == b'{"a":1}'
    assert (read[0].partition, read[0].topic, read[0].timestamp) == (zlib.crc32(b"k") % 2, TOPIC, 17)
    if wire != "raw":
        assert (read[0].id, read[0].tenant_id, read[0].sent_at) == (batch[0].id, "t", time)
    assert isinstance(read[2], kbatch.Tombstone)
    assert (read[2].key, read[2].partition) == (b"gone", 1)


def test_a_record_can_be_kept_and_compared(producer: MemoryProducer) -> None:
    producer.send_batch(TOPIC, envelopes(2))
    first, second = producer.records
    again = pickle.loads(pickle.dumps(first))
    assert again == first
    assert hash(again) == hash(first)
    assert first != second
    assert isinstance(first, MemoryRecord)


def test_partitions() -> None:
    with MemoryProducer(partitions=3) as producer:
        report = producer.send_batch(TOPIC, [Envelope(i, key=f"key {i % 5}") for i in range(20)])
        assert report.partitions == tuple(zlib.crc32(f"key {i % 5}".encode()) % 3 for i in range(20))
        assert len(set(report.partitions)) > 1
        # Without a key each in turn, by topic; an explicit one is kept.
        assert producer.send_batch("a", envelopes(4)).partitions == (0, 1, 2, 0)
        assert producer.send_batch("b", [Envelope(1), Envelope(2, partition=2), Envelope(3, key="")]).partitions == (
            0,
            2,
            1,
        )
        assert producer.send_batch("a", envelopes(2)).partitions == (1, 2)
        report = producer.send_batch("a", envelopes(1, partition=3))
        assert isinstance(report.exception(), kbatch.UnknownTopicError)
        assert (names(report), report.partitions) == ({0: "_UNKNOWN_PARTITION"}, (3,))
    places = [(record.topic(), record.partition(), record.offset()) for record in producer.records]
    assert len(set(places)) == len(places) == 29


@pytest.mark.parametrize(
    ("partitioner", "partitions"),
    [("random", (0, 1, 2, 3, 0)), ("consistent_random", (0, 1, 0, 0, 2)), ("consistent", (0, 0, 0, 0, 0))],
)
def test_where_librdkafka_takes_any_partition_each_has_its_turn(partitioner: str, partitions: tuple[int, ...]) -> None:
    # What each partitioner makes of a key is compared with librdkafka's in tests/mock.
    assert zlib.crc32(b"key 4") % 4 == 0
    with MemoryProducer({"partitioner": partitioner}, partitions=4) as producer:
        batch = [Envelope(1, key=key) for key in (None, "", "key 4", "key 4", None)]
        assert producer.send_batch(TOPIC, batch).partitions == partitions


def test_clear_forgets_and_offsets_go_on(producer: MemoryProducer) -> None:
    producer.send_batch(TOPIC, envelopes(3))
    producer.clear()
    assert (producer.envelopes, producer.records) == ((), ())
    assert producer.send_batch(TOPIC, envelopes(1)).offsets == (3,)
    assert len(producer.records) == len(producer.envelopes) == 1
    producer.fail(times=2)
    producer.hold()
    pending = [producer.submit(TOPIC, [Envelope(n)]) for n in range(2)]
    producer.release(1)
    producer.clear()
    assert messages(producer.in_flight) == [1]
    producer.release()
    assert [batch.report.failed for batch in pending] == [1, 1]
    assert producer.records == ()


def test_what_is_handed_out_does_not_change(producer: MemoryProducer) -> None:
    producer.send_batch(TOPIC, envelopes(1))
    found, records = producer.envelopes, producer.records
    producer.send_batch(TOPIC, envelopes(1))
    producer.clear()
    assert (len(found), len(records)) == (1, 1)


# -- phase 1 is the real one


def test_an_envelope_that_cannot_be_mapped(producer: MemoryProducer) -> None:
    with pytest.raises(kbatch.SerializationError) as caught:
        producer.send_batch(TOPIC, [Envelope(0), Envelope(object()), Envelope(2)])
    assert caught.value.index == 1
    assert producer.envelopes == ()
    with pytest.raises(kbatch.SerializationError, match="is not a Kafka topic name"):
        producer.submit("no topic!", envelopes(1))


def test_sizes_are_those_of_the_config() -> None:
    with (
        MemoryProducer({"message.max.bytes": 1_000}) as producer,
        pytest.raises(kbatch.SerializationError, match=r"message\.max\.bytes=1000"),
    ):
        producer.send_batch(TOPIC, [Envelope(data=b"x" * 1_000)])


def test_the_queue_of_the_configuration_bounds_a_message_and_what_is_in_flight() -> None:
    config = {"queue.buffering.max.kbytes": 2, "queue.buffering.max.messages": 5}
    with MemoryProducer(config, close_timeout_s=0) as producer:
        with pytest.raises(kbatch.SerializationError, match=r"queue\.buffering\.max\.kbytes"):
            producer.send_batch(TOPIC, [Envelope(data=b"x" * 3_000)])
        producer.hold()
        for _ in range(4):
            with contextlib.suppress(kbatch.BatchPendingError):
                report = producer.send_batch(TOPIC, envelopes(1), timeout=0.01)
        assert names(report) == {0: "_TIMED_OUT_QUEUE"}
        assert 0 < len(producer.in_flight) < 4
        producer.release()


def test_what_has_expired_is_not_sent(producer: MemoryProducer) -> None:
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    producer.down()
    report = producer.send_batch(TOPIC, envelopes(2, deliver_by=past))
    assert (report.ok, report.expired_indices) == (True, (0, 1))
    producer.up()
    report = producer.send_batch(TOPIC, [Envelope(0, deliver_by=past), Envelope(1)])
    assert (report.expired_indices, report.acked, report.offsets) == ((0,), 1, (-1, 0))
    producer.hold()
    # Nothing of it is in flight: it is answered at once, as by librdkafka.
    assert producer.submit(TOPIC, envelopes(2, deliver_by=past)).done()
    assert producer.submit(TOPIC, []).done()
    pending = producer.submit(TOPIC, [Envelope(7), Envelope(8, deliver_by=past)])
    assert (len(producer), messages(producer.in_flight)) == (1, [7])
    producer.release()
    assert (pending.wait().acked, len(producer)) == (1, 0)
    assert messages(producer.envelopes) == [1, 7]


def test_empty_batches(producer: MemoryProducer) -> None:
    report = producer.send_batch(TOPIC, [])
    assert (report.ok, len(report)) == (True, 0)


# -- configuration


def test_the_configuration_is_checked_as_in_production() -> None:
    MemoryProducer({"bootstrap.servers": "kafka:9092", "linger.ms": 5, "compression.type": "lz4"})
    with pytest.raises(kbatch.ConfigError, match=r"no\.such\.key"):
        MemoryProducer({"no.such.key": 1})
    with pytest.raises(kbatch.ConfigError, match=r"bootstrap\.servers is missing"):
        MemoryProducer({"bootstrap.servers": ""})
    with pytest.raises(kbatch.ConfigError, match="config must be a mapping"):
        MemoryProducer("kafka:9092")  # type: ignore[arg-type]
    with pytest.raises(kbatch.ConfigError, match="wire must be one of"):
        MemoryProducer(wire="nothing")
    with pytest.raises(kbatch.ConfigError, match="acks=0"):
        MemoryProducer({"acks": 0})
    with pytest.warns(UserWarning, match="acks=1"):
        MemoryProducer({"acks": 1})
    with pytest.raises(kbatch.ConfigError, match="max_in_flight must be"):
        MemoryProducer(max_in_flight=0)


def test_what_only_a_start_refuses_is_not_refused() -> None:
    for config in (
        {"linger.ms": 5_000, "message.timeout.ms": 1_000},
        {"security.protocol": "ssl", "ssl.ca.location": "/no/such/file"},
    ):
        with MemoryProducer(config) as producer:
            assert producer.send_batch(TOPIC, envelopes(1)).ok


def test_callbacks_of_librdkafka_are_not_called() -> None:
    called: list[Any] = []
    logger = logging.Logger("of its own")
    logger.addFilter(lambda record: called.append(record) is not None)
    config = {
        "statistics.interval.ms": 1,
        "stats_cb": called.append,
        "throttle_cb": called.append,
        "oauth_cb": called.append,
        "logger": logger,
        "security.protocol": "sasl_plaintext",
        "sasl.mechanisms": "OAUTHBEARER",
        "debug": "all",
    }
    with MemoryProducer(config) as producer:
        producer.send_batch(TOPIC, envelopes(3)).raise_for_errors()
        producer.down(timeout=0)
        assert producer.send_batch(TOPIC, envelopes(1)).failed == 1
    assert called == []


@pytest.mark.parametrize("partitions", [0, -1, 1.0, True, "3", 2**31])
def test_partitions_out_of_range(partitions: Any) -> None:
    with pytest.raises(kbatch.ConfigError, match="partitions must be an int from 1"):
        MemoryProducer(partitions=partitions)


def test_no_password_stays_in_a_frame() -> None:
    with pytest.raises(kbatch.ConfigError) as caught:
        MemoryProducer({"sasl.password": "hunter2", "no.such.key": 1})
    traceback = caught.value.__traceback__
    shown = []
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename != __file__:
            shown.append(repr(traceback.tb_frame.f_locals))
        traceback = traceback.tb_next
    assert shown
    assert "hunter2" not in "".join(shown)


def test_reprs() -> None:
    producer = MemoryProducer()
    assert repr(producer) == "<kbatch.testing.MemoryProducer not started>"
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(2))
    assert repr(producer) == "<kbatch.testing.MemoryProducer in memory 2 without an outcome>"
    producer.release()
    pending.wait()
    producer.close()
    assert repr(producer) == "<kbatch.testing.MemoryProducer closed>"
    assert repr(AioMemoryProducer()) == "<kbatch.testing.aio.MemoryProducer not started>"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(producer)


# -- submit, wait, callbacks


def test_callbacks_come_on_the_callback_thread_in_order(producer: MemoryProducer) -> None:
    seen: list[tuple[str, int]] = []
    for i in range(20):
        producer.submit(
            TOPIC, envelopes(i), callback=lambda report: seen.append((threading.current_thread().name, report.acked))
        )
    until(lambda: len(seen) == 20, "the callbacks")
    assert seen == [("kbatch-callbacks", i) for i in range(20)]


def test_a_done_callback_of_a_batch_that_is_done(producer: MemoryProducer) -> None:
    pending = producer.submit(TOPIC, envelopes(1))
    called = threading.Event()
    pending.add_done_callback(lambda batch: called.set())
    assert called.wait(30)


def test_a_wait_that_ends_early(producer: MemoryProducer) -> None:
    producer.hold()
    with pytest.raises(kbatch.BatchPendingError) as caught:
        producer.send_batch(TOPIC, envelopes(2), timeout=0.01)
    pending = caught.value.pending
    assert pending is not None
    assert not pending.done()
    with pytest.raises(kbatch.BatchPendingError):
        pending.wait(0)
    assert producer.envelopes == ()
    producer.release()
    assert pending.wait().acked == 2
    assert messages(producer.envelopes) == [0, 1]


def test_no_time_at_all_sends_nothing(producer: MemoryProducer) -> None:
    # As the real one: phase 2 never comes to it.
    report = producer.send_batch(TOPIC, envelopes(2), timeout=0)
    assert names(report) == {0: "_TIMED_OUT_QUEUE", 1: "_TIMED_OUT_QUEUE"}
    assert isinstance(report.exception(), kbatch.BatchTimeoutError)
    assert producer.envelopes == ()


def test_a_waiting_thread_is_woken(producer: MemoryProducer) -> None:
    producer.hold()
    reports: list[kbatch.DeliveryReport] = []
    threads = [
        threading.Thread(target=lambda i=i: reports.append(producer.send_batch(TOPIC, envelopes(i + 1))))
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(producer) == 15, "all in flight")
    assert reports == []
    assert len(producer.in_flight) == 15
    producer.release()
    for thread in threads:
        thread.join(30)
    assert sorted(report.acked for report in reports) == [1, 2, 3, 4, 5]


def test_many_threads(producer: MemoryProducer) -> None:
    acked: list[int] = []

    def send(name: int) -> None:
        for i in range(50):
            acked.append(producer.send_batch(TOPIC, [Envelope([name, i])]).acked)

    threads = [threading.Thread(target=send, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(acked) == len(producer.records) == 400
    assert [record.offset() for record in producer.records] == list(range(400))
    for name in range(8):  # each thread's are in its order
        assert [i for who, i in messages(producer.envelopes) if who == name] == list(range(50))


def test_batches_of_threads_do_not_mix(producer: MemoryProducer) -> None:
    def send(name: int) -> None:
        for _ in range(50):
            producer.send_batch(TOPIC, [Envelope([name, i]) for i in range(20)]).raise_for_errors()

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stored = messages(producer.envelopes)
    batches = [stored[first : first + 20] for first in range(0, len(stored), 20)]
    assert len(batches) == 200
    assert all(batch == [[batch[0][0], i] for i in range(20)] for batch in batches)


def test_nothing_waits_for_linger_and_enqueueing_takes_no_time() -> None:
    with MemoryProducer({"linger.ms": 60_000}) as producer:
        assert producer.submit(TOPIC, envelopes(2)).done()
        assert producer.stats()["enqueue_ns"] == 0


# -- faults


def test_a_record_that_is_refused_takes_no_others_with_it(producer: MemoryProducer) -> None:
    producer.fail("INVALID_RECORD", when=lambda envelope: envelope.message == 1)
    assert names(producer.send_batch(TOPIC, envelopes(3))) == {1: "INVALID_RECORD"}
    assert messages(producer.envelopes) == [0, 2]


def test_fail(producer: MemoryProducer) -> None:
    producer.fail("NOT_ENOUGH_REPLICAS", times=2)
    report = producer.send_batch(TOPIC, envelopes(3))
    assert names(report) == {0: "NOT_ENOUGH_REPLICAS", 1: "NOT_ENOUGH_REPLICAS"}
    assert not any(error.possibly_persisted for error in report.errors.values())
    assert report.offsets == (-1, -1, 0)
    assert (messages(producer.envelopes), values(producer)) == ([2], [b"2"])
    assert producer.send_batch(TOPIC, envelopes(3)).ok  # it is over
    producer.fail(times=2)
    again = Envelope(4)
    assert [producer.send_batch(TOPIC, [again]).ok for _ in range(3)] == [False, False, True]


def test_fail_as_told(producer: MemoryProducer) -> None:
    producer.fail(-192, times=None, when=lambda envelope: envelope.key == "bad", possibly_persisted=True)
    producer.fail("RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE", when=lambda envelope: envelope.message == 5)
    for _ in range(3):
        report = producer.send_batch(TOPIC, [Envelope(1, key="bad"), Envelope(2, key="good")])
        assert names(report) == {0: "_MSG_TIMED_OUT"}
        assert report.errors[0].possibly_persisted
    assert names(producer.send_batch(TOPIC, [Envelope(5)])) == {0: "MSG_SIZE_TOO_LARGE"}
    assert producer.send_batch(TOPIC, [Envelope(5)]).ok
    assert messages(producer.envelopes) == [1, 2, 1, 2, 1, 2, 5]
    producer.up()
    assert producer.send_batch(TOPIC, [Envelope(1, key="bad")]).ok


def test_the_default_is_a_timeout(producer: MemoryProducer) -> None:
    producer.fail()
    report = producer.send_batch(TOPIC, envelopes(2))
    assert (names(report), isinstance(report.exception(), kbatch.BatchTimeoutError)) == ({0: "_MSG_TIMED_OUT"}, True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"error": "NO_SUCH_ERROR"}, ValueError),
        ({"error": 0}, ValueError),
        ({"error": 40_000}, ValueError),
        ({"error": 1.5}, TypeError),
        ({"error": True}, TypeError),
        ({"times": 0}, ValueError),
        ({"times": 1.5}, ValueError),
        ({"when": 3}, TypeError),
        ({"stored": True}, ValueError),
    ],
)
def test_orders_that_make_no_sense(producer: MemoryProducer, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        producer.fail(**arguments)
    with pytest.raises(ValueError, match="batches must be"):
        producer.release(-1)
    with pytest.raises(ValueError, match="timeout must be"):
        producer.down(-1)
    assert producer.send_batch(TOPIC, envelopes(1)).ok


def test_a_condition_that_raises_costs_no_answer(producer: MemoryProducer) -> None:
    called: list[kbatch.DeliveryReport] = []
    producer.fail(when=lambda envelope: envelope.message / 0)
    with pytest.raises(ZeroDivisionError):
        producer.submit(TOPIC, envelopes(1), callback=called.append)
    until(lambda: called, "the callback")
    assert (names(called[0]), len(producer), producer.envelopes) == ({0: "_PURGE_QUEUE"}, 0, ())
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(1))
    with pytest.raises(ZeroDivisionError):
        producer.release()
    assert names(pending.wait()) == {0: "_PURGE_INFLIGHT"}


def test_what_is_possibly_persisted_is_stored_and_a_retry_stores_it_again(producer: MemoryProducer) -> None:
    producer.fail("REQUEST_TIMED_OUT", possibly_persisted=True)
    envelope = Envelope(1, key="k")
    report = producer.send_batch(TOPIC, [envelope])
    assert (report.ok, report.errors[0].possibly_persisted, report.partitions, report.offsets) == (
        False,
        True,
        (0,),
        (-1,),
    )
    assert producer.send_batch(TOPIC, [envelope]).offsets == (1,)
    assert producer.envelopes == (envelope, envelope)
    first, second = producer.records
    assert (first.offset(), second.offset()) == (0, 1)
    assert kbatch.read_envelope(first).id == kbatch.read_envelope(second).id == envelope.id


def test_a_condition_may_send(producer: MemoryProducer) -> None:
    def when(envelope: Envelope) -> bool:
        if envelope.message != "audit":
            producer.send_batch("audit", [Envelope("audit")]).raise_for_errors()
        return False

    producer.fail(when=when)
    producer.send_batch(TOPIC, [Envelope(1)]).raise_for_errors()
    producer.hold()
    producer.submit(TOPIC, [Envelope(2)])
    producer.release()
    assert messages(producer.envelopes) == ["audit", 1, "audit", 2]


def test_what_is_possibly_persisted_may_be_lost(producer: MemoryProducer) -> None:
    producer.fail(possibly_persisted=True, stored=False)
    report = producer.send_batch(TOPIC, envelopes(2))
    assert report.errors[0].possibly_persisted
    assert (report.offsets, messages(producer.envelopes)) == ((-1, 0), [1])


def test_a_sender_sends_again_what_was_stored(producer: MemoryProducer) -> None:
    topic = kbatch.KafkaTopic(TOPIC, mode=kbatch.SenderMode.BUFFERED, producer=producer)
    producer.fail("REQUEST_TIMED_OUT", possibly_persisted=True)
    with topic.create_sender() as sender:
        sender.send(Envelope(1))
        assert sender.flush() == 0
    first, second = (kbatch.read_envelope(record).id for record in producer.records)
    assert first == second


def test_down_and_up(producer: MemoryProducer) -> None:
    producer.hold()
    pending = [producer.submit(TOPIC, [Envelope(0)])]
    assert producer._core.probe(TOPIC, 1.0) is None
    producer.down()
    assert "no broker answers" in str(producer._core.probe(TOPIC, 1.0))
    pending.append(producer.submit(TOPIC, [Envelope(1)]))
    producer.release()  # no broker answers all the same
    pending.append(producer.submit(TOPIC, [Envelope(2)]))
    with pytest.raises(kbatch.BatchPendingError) as caught:
        producer.send_batch(TOPIC, [Envelope(3)], timeout=0.01)
    assert caught.value.pending is not None
    pending.append(caught.value.pending)
    assert producer.flush(0.01) == 4
    assert (messages(producer.in_flight), producer.envelopes) == ([0, 1, 2, 3], ())
    producer.up()  # each of them once, as the idempotent producer does it
    assert [batch.wait().ok for batch in pending] == [True] * 4
    assert messages(producer.envelopes) == [0, 1, 2, 3]
    assert producer._core.probe(TOPIC, 1.0) is None


def test_up_stores_nothing_that_is_held(producer: MemoryProducer) -> None:
    producer.hold()
    producer.down()
    pending = producer.submit(TOPIC, envelopes(1))
    producer.up()
    assert (len(producer.in_flight), producer.envelopes) == (1, ())
    producer.down(timeout=0)
    assert pending.report.errors[0].possibly_persisted  # it was on its way in between


def test_an_outage_that_no_test_waits_for(producer: MemoryProducer) -> None:
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(2))
    producer.down(timeout=0)
    report = pending.report
    assert names(report) == {0: "_MSG_TIMED_OUT", 1: "_MSG_TIMED_OUT"}
    assert all(error.possibly_persisted for error in report.errors.values())  # it was on its way
    report = producer.send_batch(TOPIC, envelopes(2))  # at once, although it holds
    assert names(report) == {0: "_MSG_TIMED_OUT", 1: "_MSG_TIMED_OUT"}
    assert not any(error.possibly_persisted for error in report.errors.values())
    assert isinstance(report.exception(), kbatch.BatchTimeoutError)
    producer.down()  # from here on as long as in production
    pending = producer.submit(TOPIC, envelopes(2))
    assert not pending.done()
    producer.down(timeout=0)
    assert not any(error.possibly_persisted for error in pending.report.errors.values())
    producer.up()
    producer.release()
    assert producer.send_batch(TOPIC, envelopes(2)).ok
    assert len(producer.records) == 2


@pytest.mark.parametrize("order", ["down", "hold"])
def test_what_no_broker_answers_times_out_as_configured(order: str) -> None:
    with MemoryProducer({"delivery.timeout.ms": 50}) as producer:
        getattr(producer, order)()
        report = producer.send_batch(TOPIC, envelopes(2))
        assert names(report) == {0: "_MSG_TIMED_OUT", 1: "_MSG_TIMED_OUT"}
        assert {error.possibly_persisted for error in report.errors.values()} == {order == "hold"}
        assert (producer.envelopes, len(producer), producer.flush()) == ((), 0, 0)


def test_an_outage_of_a_time(producer: MemoryProducer) -> None:
    producer.down()
    pending = producer.submit(TOPIC, envelopes(1))
    producer.down(timeout=0.05)
    assert names(pending.wait()) == {0: "_MSG_TIMED_OUT"}
    assert names(producer.send_batch(TOPIC, envelopes(1))) == {0: "_MSG_TIMED_OUT"}


def test_the_timer_ends_when_nothing_is_in_flight(producer: MemoryProducer) -> None:
    def timers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "kbatch-memory-timer"]

    producer.hold()
    for _ in range(3):
        pending = producer.submit(TOPIC, envelopes(1))
        assert len(timers()) == 1
        producer.release(1)
        assert pending.wait().ok
        until(lambda: timers() == [], "the end of the timer")


def test_error_cb_is_told_of_an_outage_and_of_a_fatal_error() -> None:
    told: list[tuple[str, bool, str]] = []
    with MemoryProducer(
        {"error_cb": lambda error: told.append((error.name(), error.fatal(), error.str()))}
    ) as producer:
        producer.down()
        producer.up()
        producer.fatal(reason="made up")
        producer.fatal("INVALID_PRODUCER_EPOCH")  # the first one stays
    assert told == [
        ("_ALL_BROKERS_DOWN", False, "1/1 brokers are down"),
        ("OUT_OF_ORDER_SEQUENCE_NUMBER", True, "made up"),
    ]


# -- room


def test_a_batch_waits_while_its_topic_has_max_in_flight_messages_in_flight() -> None:
    with MemoryProducer(max_in_flight=4, close_timeout_s=0) as producer:
        producer.hold()
        producer.submit(TOPIC, envelopes(3))
        producer.submit(TOPIC, envelopes(3))  # there was room for its first one
        submitted = threading.Event()

        def submit() -> None:
            producer.submit(TOPIC, [Envelope("third")]).wait()
            submitted.set()

        thread = threading.Thread(target=submit)
        thread.start()
        until(lambda: len(producer) == 7, "the third one")
        assert len(producer.in_flight) == producer.stats()["in_flight"] == 6
        producer.release(1)
        until(lambda: len(producer.in_flight) == 4, "the third one in flight")
        assert not submitted.is_set()
        producer.release()
        thread.join(30)
        assert messages(producer.envelopes) == [0, 1, 2, 0, 1, 2, "third"]


def test_a_topic_that_is_stuck_leaves_room_for_another() -> None:
    with MemoryProducer(max_in_flight=8, close_timeout_s=0) as producer:
        producer.hold()
        producer.submit("a", envelopes(8))
        report = producer.send_batch("a", envelopes(1), timeout=0.01)
        assert names(report) == {0: "_TIMED_OUT_QUEUE"}  # nothing of it was sent
        assert not report.errors[0].possibly_persisted
        producer.submit("b", envelopes(1))
        assert len(producer.in_flight) == 9
        producer.release()


def test_what_waits_for_room_is_in_order_and_purge_makes_room() -> None:
    async def main() -> None:
        async with AioMemoryProducer(max_in_flight=1, close_timeout_s=0) as producer:
            producer.hold()
            first = await producer.submit(TOPIC, [Envelope(0)])
            tasks = [asyncio.create_task(producer.submit(TOPIC, [Envelope(n)])) for n in (1, 2, 3)]
            while len(producer) < 4:
                await asyncio.sleep(0)
            assert messages(producer.in_flight) == [0]
            assert not any(task.done() for task in tasks)
            tasks[1].cancel()  # what waits is not sent
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            producer.purge()
            assert names(await first) == {0: "_PURGE_INFLIGHT"}
            second = await tasks[0]
            assert messages(producer.in_flight) == [1]
            producer.release()
            assert (await second).ok
            assert (await (await tasks[2])).ok
            assert messages(producer.envelopes) == [1, 3]
            with pytest.raises(kbatch.UndeliveredError, match="1 message "):
                await producer.flush()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_ctrl_c_while_a_batch_waits_for_room_sends_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryProducer(max_in_flight=1, close_timeout_s=0) as producer:
        producer.hold()
        producer.submit(TOPIC, [Envelope(0)])

        def interrupt(*_: Any) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(producer._line, "wait_until", interrupt)
        monkeypatch.setattr(kbatch.PendingBatch, "_wait", interrupt)
        for send in (producer.submit, producer.send_batch):
            with pytest.raises(KeyboardInterrupt):
                send(TOPIC, [Envelope(1)])
        monkeypatch.undo()
        assert len(producer) == 1
        producer.release()
        assert messages(producer.envelopes) == [0]
        with pytest.raises(kbatch.UndeliveredError, match="2 messages "):
            producer.flush()


class LockInjector(Injector):
    """Raises in `kbatch.testing`, and where a lock that is written in Python was taken."""

    def _enter(self, frame: Any, event: str, _: object) -> Any:
        if frame.f_globals.get("__name__") == "threading" and frame.f_code.co_name == "__enter__":
            return self._taken
        return self._line if frame.f_code.co_filename.startswith(TESTING) else None

    def _line(self, frame: Any, event: str, _: object) -> Any:
        # Of `try` CPython makes an instruction that does nothing, at which no signal is looked at.
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() == "try:":
            return self._line
        return super()._line(frame, event, _)

    def _taken(self, frame: Any, event: str, _: object) -> Any:
        if event == "return" and self.place is None:
            self._left -= 1
            if self._left == 0:
                self.place = "threading"
                raise self._make()
        return self._taken


def test_ctrl_c_leaves_no_lock_behind() -> None:
    def use(producer: MemoryProducer) -> None:
        producer.hold()
        producer.submit(TOPIC, [Envelope(0)])
        producer.flush(0)
        producer.release()
        producer.send_batch(TOPIC, [Envelope(1)])

    nth, place = 0, ""
    while nth == 0 or place:
        nth += 1
        producer = MemoryProducer()
        injector = LockInjector(nth, KeyboardInterrupt)
        with contextlib.suppress(kbatch.UndeliveredError):
            injector.run(lambda producer=producer: use(producer))
        place = injector.place or ""

        def go_on(producer: MemoryProducer = producer) -> None:
            producer.release()
            with contextlib.suppress(kbatch.UndeliveredError):
                producer.flush(30)

        other = threading.Thread(target=go_on, daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive(), f"another thread waits for ever after an exception in {place}"
        assert len(producer) == 0, place
        with contextlib.suppress(kbatch.UndeliveredError):
            producer.close(30)
    assert nth > 50


def test_closing_gives_up_what_waits_for_room() -> None:
    producer = MemoryProducer(max_in_flight=1)
    producer.hold()
    in_flight = producer.submit(TOPIC, [Envelope(0)])
    waiting = threading.Thread(target=lambda: producer.send_batch(TOPIC, [Envelope(1)]))
    waiting.start()
    until(lambda: len(producer) == 2, "the second one")
    with pytest.raises(kbatch.UndeliveredError, match="1 message "):  # the thread is told of the other
        producer.close(0)
    waiting.join(30)
    assert names(in_flight.report) == {0: "_PURGE_INFLIGHT"}
    assert producer.envelopes == ()


@pytest.mark.parametrize("timeout", [1e10, float("inf"), 2**70])
def test_a_time_out_longer_than_a_lock_can_wait(timeout: float) -> None:
    producer = MemoryProducer(close_timeout_s=timeout)
    producer.down(timeout)
    pending = producer.submit(TOPIC, envelopes(1))
    timer = threading.Timer(0.05, producer.up)
    timer.start()
    assert producer.flush(timeout) == 0
    timer.join()
    assert pending.wait(timeout).ok
    assert producer.send_batch(TOPIC, envelopes(1), timeout=timeout).ok
    topic = kbatch.KafkaTopic(TOPIC, mode=kbatch.SenderMode.BUFFERED, producer=producer, close_timeout_s=timeout)
    with topic.create_sender() as sender:
        sender.send(Envelope(1), timeout=timeout)
        assert (sender.flush(timeout), sender.drain(timeout)) == (0, 0)
    assert producer.close(timeout) == 0


def test_hold_and_release_some(producer: MemoryProducer) -> None:
    producer.hold()
    pending = [producer.submit(TOPIC, [Envelope(i)]) for i in range(4)]
    assert messages(producer.in_flight) == [0, 1, 2, 3]
    producer.release(2)
    assert [batch.done() for batch in pending] == [True, True, False, False]
    assert (messages(producer.in_flight), messages(producer.envelopes)) == ([2, 3], [0, 1])
    pending.append(producer.submit(TOPIC, [Envelope(4)]))
    assert not pending[-1].done()
    producer.release()
    assert producer.send_batch(TOPIC, [Envelope(5)]).ok
    assert messages(producer.envelopes) == [0, 1, 2, 3, 4, 5]
    producer.release()  # of nothing


def test_a_fatal_error(producer: MemoryProducer) -> None:
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(2))
    producer.fatal()
    assert names(pending.wait()) == dict.fromkeys(range(2), "OUT_OF_ORDER_SEQUENCE_NUMBER")
    for _ in range(2):
        with pytest.raises(kbatch.ProducerFatalError, match="made up by a test") as caught:
            producer.send_batch(TOPIC, envelopes(1))
        assert (caught.value.code, caught.value.name) == (45, "OUT_OF_ORDER_SEQUENCE_NUMBER")
        producer.fatal("INVALID_PRODUCER_EPOCH")  # the first one stays
    with pytest.raises(kbatch.ProducerFatalError):
        producer.submit(TOPIC, envelopes(1), callback=lambda report: pytest.fail("called"))
    assert producer.flush() == 0


def test_a_fenced_producer(producer: MemoryProducer) -> None:
    producer.fatal("_FENCED", "another has come")
    with pytest.raises(kbatch.ProducerFencedError, match="another has come"):
        producer.send_batch(TOPIC, envelopes(1))


# -- flush, purge, close


def test_flush_waits_for_what_is_held(producer: MemoryProducer) -> None:
    assert producer.flush() == 0  # not started
    producer.hold()
    producer.submit(TOPIC, envelopes(3))
    assert producer.flush(0.01) == 3
    timer = threading.Timer(0.05, producer.release)
    timer.start()
    assert producer.flush() == 0
    timer.join()
    with pytest.raises(ValueError, match="timeout must be"):
        producer.flush(-1)


def test_purge(producer: MemoryProducer) -> None:
    producer.purge()  # not started
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(3))
    producer.purge()
    report = pending.wait()
    assert set(names(report).values()) == {"_PURGE_INFLIGHT"}
    assert all(error.possibly_persisted for error in report.errors.values())
    assert (producer.envelopes, producer.in_flight, len(producer)) == ((), (), 0)


@pytest.mark.parametrize(("close_timeout_s", "timeout"), [(30, 0), (0, None)])
def test_close_gives_up_what_is_held_at_the_deadline(close_timeout_s: float, timeout: float | None) -> None:
    producer = MemoryProducer(close_timeout_s=close_timeout_s)
    producer.hold()
    called: list[kbatch.DeliveryReport] = []
    pending = producer.submit(TOPIC, envelopes(3), callback=called.append)
    assert not producer.closed
    with later(15, producer.release):  # who waits longer has them acknowledged
        assert producer.close(timeout) == 3
    assert producer.closed
    assert set(names(pending.wait()).values()) == {"_PURGE_INFLIGHT"}
    assert len(called) == 1  # before close returned
    assert producer.close() == 3
    assert producer.records == ()


def test_close_waits_for_what_is_released() -> None:
    producer = MemoryProducer()
    producer.hold()
    producer.submit(TOPIC, envelopes(3))
    closed: list[int] = []
    thread = threading.Thread(target=lambda: closed.append(producer.close()))
    thread.start()
    until(lambda: producer.closed, "closing")
    with pytest.raises(kbatch.ProducerClosedError):
        producer.send_batch(TOPIC, envelopes(1))
    producer.release()
    thread.join(30)
    assert closed == [0]
    assert messages(producer.envelopes) == [0, 1, 2]  # what it has kept can be looked at


@pytest.mark.parametrize("used", [True, False])
def test_a_closed_producer_refuses(used: bool) -> None:
    producer = MemoryProducer()
    if used:
        producer.send_batch(TOPIC, envelopes(1))
    assert producer.close() == 0
    calls: list[Callable[[], object]] = [
        lambda: producer.send_batch(TOPIC, envelopes(1)),
        lambda: producer.submit(TOPIC, envelopes(1)),
        producer.flush,
        producer.purge,
        producer.fatal,
    ]
    for call in calls:
        with pytest.raises(kbatch.ProducerClosedError):
            call()
    assert producer.close() == 0
    assert producer.stats()["acked"] == int(used)


def test_a_with_block_says_what_was_lost() -> None:
    def lose() -> None:
        with MemoryProducer(close_timeout_s=0) as producer:
            producer.hold()
            producer.submit(TOPIC, envelopes(3))

    with pytest.raises(kbatch.UndeliveredError) as caught:
        lose()
    assert caught.value.count == 3


def test_close_from_a_callback() -> None:
    producer = MemoryProducer()
    closed = threading.Event()

    def close(report: kbatch.DeliveryReport) -> None:
        producer.close()
        closed.set()

    producer.submit(TOPIC, envelopes(1), callback=close)
    assert closed.wait(30)


def test_a_forgotten_producer_ends_its_thread() -> None:
    producer = MemoryProducer()
    producer.send_batch(TOPIC, envelopes(1))
    core = weakref.ref(producer._core)
    thread = next(thread for thread in threading.enumerate() if thread.name == "kbatch-dispatcher")
    del producer
    gc.collect()
    assert core() is None
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
def test_a_forked_child() -> None:
    used, unused = MemoryProducer(), MemoryProducer()
    used.send_batch(TOPIC, envelopes(1))
    used.hold()
    pending = used.submit(TOPIC, envelopes(1))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            refused = 0
            for call in (
                lambda: used.send_batch(TOPIC, envelopes(1)),
                lambda: used.submit(TOPIC, envelopes(1)),
                lambda: used.flush(),
                lambda: used.purge(),
            ):
                try:
                    call()
                except kbatch.ForkError:
                    refused += 1
            answer = [refused, used.close(), unused.send_batch(TOPIC, envelopes(3)).acked, unused.close()]
            os.write(writer, repr(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "[4, 0, 3, 0]"
    assert os.waitpid(pid, 0)[1] == 0
    used.release()
    assert pending.wait().ok
    assert len(used.records) == 2
    used.close()
    unused.close()


# -- transactions


@pytest.fixture
def transactional() -> Iterator[MemoryProducer]:
    with MemoryProducer({"transactional.id": "t"}, close_timeout_s=0) as producer:
        yield producer
        producer.release()


def test_a_transaction_is_kept_as_a_whole(transactional: MemoryProducer) -> None:
    assert transactional.send_batch(TOPIC, envelopes(3)).acked == 3
    transactional.fail("MSG_SIZE_TOO_LARGE", when=lambda envelope: envelope.message == 1, possibly_persisted=True)
    report = transactional.send_batch(TOPIC, envelopes(3))
    assert names(report) == {0: "TRANSACTION_ABORTABLE", 1: "MSG_SIZE_TOO_LARGE", 2: "TRANSACTION_ABORTABLE"}
    assert not any(error.possibly_persisted for error in report.errors.values())
    assert "the cause is envelope 1" in str(report.exception())
    assert messages(transactional.envelopes) == [0, 1, 2]
    assert transactional.send_batch(TOPIC, envelopes(1)).offsets == (3,)


def test_what_has_expired_aborts_no_transaction(transactional: MemoryProducer) -> None:
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    report = transactional.send_batch(TOPIC, [Envelope(0), Envelope(1, deliver_by=past)])
    assert (report.ok, report.acked, report.expired_indices) == (True, 1, (1,))
    transactional.fail()
    report = transactional.send_batch(TOPIC, [Envelope(0), Envelope(1, deliver_by=past)])
    assert (names(report), report.expired_indices) == ({0: "_MSG_TIMED_OUT"}, (1,))


def test_a_transaction_waits_as_others_do(transactional: MemoryProducer) -> None:
    with pytest.raises(kbatch.ProducerError, match="submit is not possible"):
        transactional.submit(TOPIC, envelopes(1))
    transactional.hold()
    with pytest.raises(kbatch.BatchPendingError) as caught:
        transactional.send_batch(TOPIC, envelopes(1), timeout=0.01)
    transactional.release()
    assert caught.value.pending is not None
    assert caught.value.pending.wait().ok


# -- the batch callback contract


class Recorder(kbatch.SenderCallback):
    """Keeps every call, whatever it is."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("mark_"):
            return super().__getattribute__(name)
        return lambda batch, answer: self.calls.append((name, answer))


def no_order(producer: Any) -> None:
    pass


CONTRACT = [
    (no_order, envelopes(2), "mark_successful"),
    (no_order, [Envelope(1), Envelope(object())], "mark_serialization_failure"),
    (lambda producer: producer.down(timeout=0), envelopes(2), "mark_timed_out"),
    (lambda producer: producer.fail("UNKNOWN_TOPIC_OR_PART"), envelopes(2), "mark_topic_does_not_exist"),
    (lambda producer: producer.fail("MSG_SIZE_TOO_LARGE"), envelopes(2), "mark_processing_failure"),
    (lambda producer: producer.fatal(), envelopes(2), "mark_processing_failure"),
    (lambda producer: producer._core.close(), envelopes(2), "mark_processing_failure"),
]


@pytest.mark.parametrize(("order", "batch", "method"), CONTRACT)
def test_kafka_sender(order: Callable[[Any], object], batch: list[Envelope], method: str) -> None:
    with MemoryProducer() as producer:
        order(producer)
        callback = Recorder()
        kbatch.KafkaSender(producer, TOPIC).send_batch(callback, OutgoingBatch(batch))
        ((called, answer),) = callback.calls
        assert called == method
        report = answer if method == "mark_successful" else answer.report
        assert report.acked + report.failed == 2
        assert report.acked == len(producer.records)


@pytest.mark.parametrize(("order", "batch", "method"), CONTRACT)
def test_aio_kafka_sender(order: Callable[[Any], object], batch: list[Envelope], method: str) -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            order(producer)
            callback = Recorder()
            await aio.KafkaSender(producer, TOPIC).send_batch(callback, OutgoingBatch(batch))
            ((called, _),) = callback.calls
            assert called == method

    asyncio.run(main())


# -- asyncio


def test_for_asyncio_it_has_the_same_methods_besides() -> None:
    besides = [name for name in dir(MemoryProducer) if not name.startswith("_") and not hasattr(kbatch.Producer, name)]
    assert {"fail", "down", "up", "hold", "release", "records"} <= set(besides)
    for name in besides:
        method = inspect.getattr_static(AioMemoryProducer, name)
        assert method is inspect.getattr_static(MemoryProducer, name)
        assert not inspect.iscoroutinefunction(method)
    assert inspect.signature(AioMemoryProducer) == inspect.signature(MemoryProducer)


def test_asyncio() -> None:
    async def main() -> None:
        async with AioMemoryProducer(partitions=2) as producer:
            report = await producer.send_batch(TOPIC, envelopes(4))
            assert (report.acked, report.partitions) == (4, (0, 1, 0, 1))
            assert messages(producer.envelopes) == [0, 1, 2, 3]
            reports: list[kbatch.DeliveryReport] = []

            async def on_report(report: kbatch.DeliveryReport) -> None:
                await asyncio.sleep(0)
                reports.append(report)

            producer.hold()
            pending = await producer.submit(TOPIC, envelopes(2), callback=on_report)
            waiting = asyncio.create_task(producer.send_batch(TOPIC, [Envelope("x")]))
            while producer.stats()["in_flight"] < 3:
                await asyncio.sleep(0.001)
            with pytest.raises(kbatch.BatchPendingError):
                await producer.send_batch(TOPIC, envelopes(1), timeout=0.3)  # time to be put
            assert await producer.flush(0.01) == 4
            assert not waiting.done()
            producer.release()
            assert (await pending).acked == 2
            assert (await waiting).acked == 1
            assert await producer.flush() == 0
            producer.fail()
            assert names(await producer.send_batch(TOPIC, envelopes(1))) == {0: "_MSG_TIMED_OUT"}
        assert [report.acked for report in reports] == [2]  # closing waits for callbacks
        with pytest.raises(kbatch.ProducerClosedError):
            await producer.send_batch(TOPIC, envelopes(1))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_closing_does_not_wait_for_a_callback_on_another_loop() -> None:
    producer = AioMemoryProducer()
    running, closed = threading.Event(), threading.Event()

    async def on_report(_: kbatch.DeliveryReport) -> None:
        running.set()
        while not closed.is_set():
            await asyncio.sleep(0.001)

    async def send() -> None:
        await producer.submit(TOPIC, envelopes(1), callback=on_report)
        while not closed.is_set():
            await asyncio.sleep(0.001)

    other = threading.Thread(target=lambda: asyncio.run(send()))
    other.start()
    assert running.wait(30)
    assert asyncio.run(asyncio.wait_for(producer.close(), 30)) == 0
    closed.set()
    other.join(30)
    assert not other.is_alive()


def test_a_batch_whose_loop_is_closed_has_no_answer_but_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    producer = AioMemoryProducer()
    producer.hold()
    callback = Recorder()

    async def leave() -> None:
        sender = aio.KafkaSender(producer, TOPIC)
        task = asyncio.create_task(sender.send_batch(callback, OutgoingBatch(envelopes(2))))
        while not producer.in_flight:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    producer.release()
    until(lambda: caplog.records, "the log line")
    assert [record.getMessage() for record in caplog.records] == [
        "a callback was not called: the event loop on which its batch was sent is closed"
    ]
    assert callback.calls == []


def test_a_task_that_is_cancelled_ends_the_wait_only() -> None:
    async def main() -> None:
        async with AioMemoryProducer() as producer:
            producer.hold()
            task = asyncio.create_task(producer.send_batch(TOPIC, envelopes(2)))
            while producer.stats()["in_flight"] < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            producer.release()
            assert len(producer.envelopes) == 2

    asyncio.run(asyncio.wait_for(main(), 60))


def test_on_an_event_loop_the_loop_stores() -> None:
    threads = set()

    async def main() -> None:
        async with AioMemoryProducer() as producer:
            producer.fail(when=lambda _: threads.add(threading.get_ident()), times=None)
            assert (await producer.send_batch(TOPIC, envelopes(5_000))).acked == 5_000

    asyncio.run(main())
    assert threads == {threading.get_ident()}


def test_asyncio_transactions_and_losses() -> None:
    tasks = []

    async def lose() -> None:
        async with AioMemoryProducer({"transactional.id": "t"}, close_timeout_s=0.05) as producer:
            with pytest.raises(kbatch.ProducerError, match="submit is not possible"):
                await producer.submit(TOPIC, envelopes(1))
            producer.fail(when=lambda envelope: envelope.message == 1)
            assert (await producer.send_batch(TOPIC, envelopes(3))).failed == 3
            assert (await producer.send_batch(TOPIC, envelopes(3))).acked == 3
            producer.hold()
            tasks.append(asyncio.create_task(producer.send_batch(TOPIC, envelopes(1))))
            while not producer.in_flight:
                await asyncio.sleep(0.001)

    async def main() -> None:
        await lose()  # its own task is told
        assert names(await tasks[0]) == {0: "_PURGE_INFLIGHT"}

    asyncio.run(asyncio.wait_for(main(), 60))


# -- what senders use


def test_a_twin_goes_on_with_what_was_kept() -> None:
    producer = MemoryProducer({"transactional.id": "t"}, partitions=3, wire="raw")
    producer.send_batch(TOPIC, envelopes(1, partition=2)).raise_for_errors()
    producer.fail(times=None, when=lambda envelope: envelope.message == 5)
    producer.fatal()
    handle = ProducerHandle.of(producer)
    use = handle.acquire()
    handle.replace(producer)
    twin = handle.producer
    assert type(twin) is MemoryProducer
    assert twin is not producer
    assert twin.send_batch(TOPIC, envelopes(2, partition=2)).offsets == (1, 2)
    assert twin.send_batch(TOPIC, [Envelope(5), Envelope(6)]).failed == 2  # a transaction, and the same fault
    twin.hold()
    with pytest.raises(kbatch.ProducerFatalError):
        producer.send_batch(TOPIC, envelopes(1))
    waiting = threading.Thread(target=twin.send_batch, args=(TOPIC, envelopes(1)))
    waiting.start()
    until(lambda: producer.in_flight, "what the twin has sent")
    assert producer.close() == 0  # what is in flight is the other's
    producer.release()
    waiting.join(30)
    assert values(producer) == [b"0", b"0", b"1", b"0"]
    assert producer.records == twin.records
    assert use.release(None) == 0
    assert twin.closed


@pytest.mark.parametrize("config", [{}, {"transactional.id": "t"}], ids=["plain", "transactional"])
def test_a_batch_goes_on_without_what_cannot_be_mapped(config: dict[str, str]) -> None:
    with MemoryProducer(config, close_timeout_s=0) as producer:
        rejected: list[tuple[int, kbatch.SerializationError]] = []
        batch = kbatch.PendingBatch(producer._core)
        producer._core.map(batch, TOPIC, [Envelope(0), Envelope(object()), Envelope(2)], rejected)
        done = threading.Event()
        producer.hold()
        producer._send_detached(batch, waker=done.set)
        assert (len(producer), messages(producer.in_flight)) == (2, [0, 2])
        producer.release()
        assert done.wait(30)
        assert [(index, error.field) for index, error in rejected] == [(1, "message")]
        assert (names(batch.report), batch.report.offsets) == ({1: "_VALUE_SERIALIZATION"}, (0, -1, 1))
        assert messages(producer.envelopes) == [0, 2]
        assert producer.stats()["failed"] == 1


# -- the native part


def test_outcomes_are_given_once_and_checked(producer: MemoryProducer) -> None:
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(2))
    core = producer._core
    good = [(0, 2, 0, 7), (-192, 1, -1, -1)]
    with pytest.raises(ValueError, match="1 outcomes for a batch of 2"):
        core.settle_in_memory(pending, good[:1])
    for bad in [(0, 2, 0), ("x", 2, 0, 1), (2**40, 2, 0, 1), (0, 300, 0, 1), None]:
        with pytest.raises((ValueError, TypeError, OverflowError)):
            core.settle_in_memory(pending, [good[0], bad])
        assert not pending.done()
    with pytest.raises(ValueError, match="waits for no outcomes"), MemoryProducer() as other:
        other._core.settle_in_memory(pending, good)
    core.settle_in_memory(pending, good)
    report = pending.wait()
    assert (report.acked, report.offsets, names(report)) == (1, (7, -1), {1: "_MSG_TIMED_OUT"})
    with pytest.raises(ValueError, match="waits for no outcomes"):
        core.settle_in_memory(pending, good)
    with pytest.raises(ValueError, match="waits for no outcomes"):
        core.settle_in_memory(kbatch.PendingBatch(core), [])
    producer._line._sents.clear()
    assert len(producer) == 0


def test_a_number_that_settles_the_batch_itself(producer: MemoryProducer) -> None:
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(2))

    class Number:
        def __int__(self) -> int:
            producer._core.settle_in_memory(pending, [(0, 2, 0, 0)] * 2)
            return 0

    with pytest.raises(ValueError, match="waits for no outcomes"):
        producer._core.settle_in_memory(pending, [(Number(), 2, 0, 0)] * 2)
    assert pending.wait().acked == 2
    producer._line._sents.clear()


def test_a_number_that_empties_the_list_of_outcomes(producer: MemoryProducer) -> None:
    producer.hold()
    pending = producer.submit(TOPIC, envelopes(200))

    class Number:
        def __int__(self) -> int:
            outcomes.clear()
            return 0

    outcomes: list[Any] = [(Number(), 2, 0, 0), *((0, 2, 0, n) for n in range(1, 200))]
    producer._core.settle_in_memory(pending, outcomes)
    report = pending.wait()
    assert (report.acked, report.offsets) == (200, tuple(range(200)))
    producer._line._sents.clear()


@pytest.mark.parametrize("is_started", [False, True])
@pytest.mark.parametrize("end", ["flush", "close"])
@pytest.mark.parametrize("by", ["producer", "sender"])
def test_what_was_given_to_a_task_before_it_is_waited_for(by: str, end: str, is_started: bool) -> None:
    async def main() -> list[Any]:
        producer = AioMemoryProducer()
        sender = aio.KafkaTopic(TOPIC, mode=kbatch.SenderMode.BUFFERED, producer=producer).create_sender()
        target: Any = producer if by == "producer" else sender

        def send(n: int) -> Any:
            return producer.send_batch(TOPIC, [Envelope(n)]) if by == "producer" else sender.send(Envelope(n))

        if is_started:
            await send(0)
            await target.flush()
            producer.clear()
        tasks = [asyncio.create_task(send(n)) for n in range(3)]
        assert await getattr(target, end)() == 0
        seen = messages(producer.envelopes)
        await asyncio.gather(*tasks)
        await sender.close()
        await producer.close()
        return seen

    assert asyncio.run(main()) == [0, 1, 2]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("by", ["producer", "sender"])
def test_closing_goes_on_whenever_its_task_is_cancelled(by: str, steps: int) -> None:
    producer = AioMemoryProducer()
    sender = aio.KafkaTopic(TOPIC, mode=kbatch.SenderMode.BUFFERED, producer=producer).create_sender()

    async def main() -> None:
        await (producer.send_batch(TOPIC, [Envelope(0)]) if by == "producer" else sender.send(Envelope(0)))
        task = asyncio.create_task((producer if by == "producer" else sender).close())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def refuses() -> bool:
        if by == "producer":
            return producer.closed
        try:
            sender.try_send(Envelope(1))
        except kbatch.SenderClosedError:
            return True
        return False

    asyncio.run(main())
    until(refuses, "the end")
    asyncio.run(sender.close())


def test_closing_goes_on_when_its_loop_stops_before_it_has_begun() -> None:
    producer = AioMemoryProducer()
    producer._core.start()
    loop = asyncio.new_event_loop()
    task = loop.create_task(producer.close())
    loop.call_soon(loop.stop)
    loop.run_forever()
    until(lambda: producer._core.closed(), "the end")
    loop.run_until_complete(task)
    loop.close()
