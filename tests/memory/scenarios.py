"""What is done while an allocation fails, and what must hold then and afterwards.

A scenario is made once and gives a step, which is repeated with another allocation failing: ``step(attempt)`` calls
``attempt(function)`` for what may fail.
"""

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import datetime, timezone
from typing import Any

import msgspec
from confluent_kafka import KafkaError

import kbatch
from kbatch import Envelope, KafkaSender, OutgoingBatch, SenderCallback, Tombstone, aio
from kbatch._fastmap import (
    Accumulator,
    RecordPool,
    pinned_buffers,
    read_packed,
    received,
    set_oauth_token,
    unpack_record,
)
from kbatch._pending import PendingBatch
from kbatch._receiving._consumer import BEGINNING
from kbatch._transactions import BatchWithOffsets
from kbatch.testing import ApiKey, MemoryProducer, MockCluster
from tests.mock.clients import read_back
from tests.mock.test_consumer_core import make_core
from tests.records import Consumed

from ..loops import beside
from ..waiting import until
from .hooks import Outcome

Attempt = Callable[[Callable[[], Any]], Outcome]
Step = Callable[[Attempt], None]
TOPIC = "orders"
MOMENT = datetime(2026, 11, 23, 9, 16, 45, 123456, tzinfo=timezone.utc)
# Nothing else may come of it. Where a thread or a lock cannot be made, Python raises RuntimeError itself.
ALLOWED = (MemoryError,)
NO_THREAD = ("thread", "can't allocate lock")


class World:
    """A cluster, the producers of a scenario, and the books of what must and may be on the wire."""

    def __init__(self, cluster: MockCluster) -> None:
        self.cluster = cluster
        self.opened: list[kbatch.Producer] = []
        self.serial = 0
        self.sent: set[bytes] = set()
        self.perhaps: set[bytes] = set()
        self.at_end: list[Callable[[], object]] = []

    def config(self, **config: Any) -> dict[str, Any]:
        servers = self.cluster.bootstrap_servers
        return {"bootstrap.servers": servers, "log_level": 0, "enable.idempotence": False, **config}

    def producer(self, *, config: dict[str, Any] | None = None, **options: Any) -> kbatch.Producer:
        made = kbatch.Producer(self.config(**(config or {})), **options)
        self.opened.append(made)
        return made

    def started(self, **options: Any) -> kbatch.Producer:
        producer = self.producer(**options)
        producer.send_batch(TOPIC, self.batch()).raise_for_errors()
        return producer

    def batch(self, count: int = 3) -> list[Envelope]:
        """Bodies that are there once; `book` tells what became of them."""
        self.serial += 1
        self.bodies = [b"%d/%d" % (self.serial, n) for n in range(count)]
        self.perhaps |= set(self.bodies)
        return [Envelope(data=body, key=f"kéy{n}", headers={"n": str(n)}) for n, body in enumerate(self.bodies)]

    def book(self, acked: bool | None) -> None:
        """Of the last batch: all sent, nothing sent, or unknown."""
        if acked is not None:
            self.perhaps -= set(self.bodies)
        if acked:
            self.sent |= set(self.bodies)

    def check_wire(self) -> None:
        stored = [record.value for record in read_back(self.cluster.bootstrap_servers, TOPIC)]
        assert len(stored) == len(set(stored)), "something was stored twice"
        assert self.sent <= set(stored), "something acknowledged is not there"
        assert set(stored) <= self.sent | self.perhaps, "something is there that was said not to be sent"

    def close(self) -> None:
        while self.opened:
            with contextlib.suppress(kbatch.UndeliveredError):  # of a call that failed, its caller was told nothing
                self.opened.pop().close()

    def end(self) -> None:
        self.close()
        while self.at_end:
            self.at_end.pop()()


def settled() -> None:
    gc.collect()
    until(lambda: pinned_buffers() == 0, "the buffers of a finished batch")


def usable(world: World, producer: kbatch.Producer) -> None:
    report = producer.send_batch(TOPIC, world.batch())
    assert report.acked == 3, report.errors
    world.book(True)
    settled()


def checked(outcome: Outcome, *others: type[BaseException]) -> Outcome:
    error = outcome.error
    if error is None or isinstance(error, (*ALLOWED, *others)):
        return outcome
    if isinstance(error, RuntimeError) and any(text in str(error) for text in NO_THREAD):
        return outcome
    # CPython 3.11 forgets an exception when it has no memory for the frame object of its traceback. It names the
    # function that ended so, which is one of Python; of ours it would be a built-in one, or a method.
    if isinstance(error, SystemError) and re.match("<function .* returned NULL without setting", str(error)):
        return outcome
    raise AssertionError(f"not an answer to a lack of memory:\n{outcome.trace}")


# --- phase 1

PLAIN: list[dict[str, Any]] = [
    {"message": {"total": 3, "name": "Größe"}, "key": "schlüssel", "id": kbatch.uuid7()},
    {"data": b"body", "key": b"key", "headers": [("trace", "ünïcödé"), ("none", None), ("b", b"\xff")], "topic": "a"},
    {"data": bytearray(b"copied"), "headers": {"n": "1"}, "partition": 3, "topic": "b-topic"},
    {"data": b"x" * 10, "timestamp": 7, "sent_at": MOMENT, "scheduled_time": MOMENT, "user_name": "müller"},
    {"data": memoryview(b"y" * 70_000)},
    {"message": "z" * 70_000, "conversation_id": "11111111222233334444555555555555", "attempts": 2, "source": "shöp"},
    {"data": b"", "headers": [("h", "v")] * 3_000},
]


def envelopes() -> list[Envelope]:
    made = [Envelope(**{"id": kbatch.uuid7(), "sent_at": MOMENT, "timestamp": 7, **fields}) for fields in PLAIN]
    return [*made, Tombstone("tömb", id=kbatch.uuid7())]


class Wire:
    def write(self, envelope: Envelope) -> Any:
        return envelope.key, b"x" if envelope.data is None else envelope.data, envelope.headers


def encode(message: Any, context: kbatch.SerializationContext) -> bytes:
    context.headers.append(("extra", "é"))
    return repr(message).encode()  # msgspec.json.encode() crashes when its buffer cannot grow


class Unwritable:
    """No encoder takes it."""


def mapping(**options: Any) -> Callable[[World], Step]:
    def scenario(world: World) -> Step:
        batch = envelopes()

        def mapped(producer: kbatch.Producer) -> list[Any]:
            # without times, which a tombstone has of the batch
            return [
                (*record[:2], *record[3:5], [pair for pair in record[5] if pair[0] != "sent-at"])
                for record in producer._map(TOPIC, batch)
            ]

        expected = mapped(world.producer(**options))

        def step(attempt: Attempt) -> None:
            producer = world.producer(**options)
            pending = PendingBatch(producer._core)
            checked(attempt(lambda: producer._core.map(pending, TOPIC, batch)))
            assert mapped(producer) == expected
            world.close()

        return step

    return scenario


def mapping_without_a_producer(world: World) -> Step:
    batch = [*envelopes(), *(Envelope(data=b"x", topic=f"topic-{n}") for n in range(40))]  # some hashes more
    mapper = world.producer()._mapper

    def step(attempt: Attempt) -> None:
        pool = RecordPool()
        checked(attempt(lambda: pool.map(mapper, TOPIC, batch)))
        records = pool.records(pool.map(mapper, TOPIC, batch))
        assert [record and record[0] for record in records] == [envelope.topic or TOPIC for envelope in batch]

    return step


EVENT = [("ce_specversion", b"1.0"), ("ce_id", b"seven"), ("ce_source", b"/s"), ("ce_type", b"order")]
STRUCTURED = (
    b'{"specversion": "1.0", "id": "7", "source": "/s", "type": "order", "time": "2026-11-23T09:16:45Z", "data": 1}'
)
CONSUMED: list[tuple[str, Consumed]] = [
    (
        "kbatch",
        Consumed(b"{}", b"k", [("sent-at", b"2026-11-23T09:16:45Z"), ("tenant-id", "größe".encode()), ("x", b"1")]),
    ),
    ("kbatch", Consumed(b"{}", "k", {"id": "7d6a7a3c-0b1e-5d43-9a55-6b62617463a8", "source": "größe"})),
    ("kbatch", Consumed(None, b"k", [("x", None)])),
    ("cloudevents", Consumed(b"{}", None, [*EVENT, ("CE_Subject", b"s"), ("ce_time", b"2026-11-23T09:16:45Z")])),
    ("cloudevents", Consumed(STRUCTURED, None, [("content-type", b"application/cloudevents+json")])),
]
UNREADABLE: list[tuple[str, Consumed]] = [
    ("kbatch", Consumed(a_headers=[("x", b"1"), ("id", b"seven")])),
    ("kbatch", Consumed(a_headers=[("tenant-id", b"\xff")])),
    ("kbatch", Consumed(a_headers=[("attempts", "\ud800")])),
    ("cloudevents", Consumed(b"{", a_headers=[("content-type", b"application/cloudevents+json")])),
]


def reading(world: World) -> Step:
    expected = [kbatch.read_envelope(record, wire=wire) for wire, record in CONSUMED]

    def step(attempt: Attempt) -> None:
        outcome = checked(attempt(lambda: [kbatch.read_envelope(record, wire=wire) for wire, record in CONSUMED]))
        assert outcome.error is not None or outcome.value == expected
        for wire, record in UNREADABLE:
            error = checked(
                attempt(functools.partial(kbatch.read_envelope, record, wire=wire)), kbatch.DeserializationError
            ).error
            assert error is not None

    return step


def packing(world: World) -> Step:
    producer = world.started()
    mapper = producer._mapper
    pool = RecordPool()
    batch = pool.map(mapper, TOPIC, envelopes())
    records = pool.records(batch)

    def sent() -> list[bytes]:
        packed = pool.pack(pool.map(mapper, TOPIC, world.batch()))
        pending = PendingBatch(producer._core)
        producer._core.map_packed(pending, packed)
        producer._core.send(pending, 30, wait=True)
        return packed

    def step(attempt: Attempt) -> None:
        outcome = checked(attempt(lambda: pool.pack(batch)))
        if outcome.error is None:
            packed = outcome.value
            unpacked = checked(attempt(lambda: [unpack_record(one) for one in packed]))
            assert unpacked.error is not None or unpacked.value == records
            checked(attempt(lambda: [read_packed(one) for one in packed]))
            cut = functools.partial(unpack_record, packed[0][:-1])  # no lambda: its frame may lose what is raised in it
            damaged = checked(attempt(cut), kbatch.DeserializationError)
            assert damaged.error is not None
        checked(attempt(sent))
        world.book(None)
        settled()

    return step


RECEIVED = [("tenant-id", b"t"), ("größe", b"1"), ("x", None), ("id", b"01934a2b-3c4d-7e5f-8a9b-0c1d2e3f4a5b")]
ASKED_FOR = ("data", "key", "headers", "id", "message_type", "tenant_id", "raw_headers", "raw_value", "offset", "topic")


def everything(envelope: Any) -> Any:
    hash(envelope)
    return [getattr(envelope, name) for name in ASKED_FOR], str(envelope.error), envelope.replace()


def received_records(world: World) -> Step:
    """Records that a listener reads, and those that cannot be read; what was asked for once is not damaged by it."""
    place = ("orders", 3, 17, 1)
    records = [
        (*place, b"k", b"x", RECEIVED[:1] + RECEIVED[2:], "kbatch"),
        (*place, b"k", b"x" * 5_000, RECEIVED, "kbatch"),
        (*place, None, b"x", [*RECEIVED, ("sent-at", b"yesterday"), (b"\xff", b"1")], "kbatch"),
        (*place, b"k", None, [], "raw"),
    ]
    expected = [everything(received(*record)) for record in records]

    def step(attempt: Attempt) -> None:
        for record, whole in zip(records, expected, strict=True):
            read = checked(attempt(functools.partial(received, *record)))
            if read.error is None:
                checked(attempt(functools.partial(everything, read.value)))
                assert everything(read.value) == whole

    return step


def polled(world: World) -> Step:
    """A poll that had no memory has lost nothing: the next one goes on where it was."""
    with kbatch.Producer(world.config()) as producer:
        batch = [Envelope(data=b"%d" % n, partition=0) for n in range(20)]
        producer.send_batch("polled", batch).raise_for_errors()
    core = make_core(world.cluster)
    world.at_end.append(lambda: core.close(10.0))
    core.assign([("polled", 0, BEGINNING)])

    def step(attempt: Attempt) -> None:
        found: list[bytes] = []
        first = checked(attempt(lambda: core.poll(3, 5.0)))
        if first.error is None:
            found.extend(envelope.data for envelope in first.value[0])

        def enough() -> bool:
            found.extend(envelope.data for envelope in core.poll(3, 0.05)[0])
            return len(found) >= 20

        until(enough, "20 records")
        assert found == [b"%d" % n for n in range(20)]
        checked(attempt(lambda: core.commit([("polled", 0, 1), ("polled", 0, 2)], 0.0)))
        checked(attempt(lambda: core.read([("polled", 0)])))
        assert core.seek([("polled", 0, BEGINNING)], 10.0) == []

    return step


def rebalanced(world: World) -> Step:
    """An answer to a rebalance that had no memory is owed still: the next one gives it, and records come."""
    groups = (f"group {n}" for n in itertools.count())
    world.cluster.create_topic("shared", partitions=2)
    with kbatch.Producer(world.config()) as producer:
        producer.send_batch("shared", [Envelope(data=b"x", partition=n) for n in range(2)]).raise_for_errors()

    def step(attempt: Attempt) -> None:
        core = make_core(world.cluster, group=next(groups))
        world.at_end.append(lambda: core.close(10.0))
        core.subscribe(["shared"])
        until(lambda: core.poll(0, 0.05) and core.rebalance() is not None, "a rebalance")
        if checked(attempt(core.answer)).error is not None:
            assert core.rebalance() is not None
            core.answer()
        found: list[int] = []

        def enough() -> bool:
            found.extend(envelope.partition for envelope in core.poll(3, 0.05)[0])
            return len(found) >= 2

        until(enough, "2 records")
        assert sorted(found) == [0, 1]
        world.at_end.pop()()

    return step


def placed(world: World) -> Step:
    """What a listener asks brokers about a partition is answered, or was not asked."""
    with kbatch.Producer(world.config()) as producer:
        producer.send_batch("asked", [Envelope(data=b"%d" % n, partition=0) for n in range(3)]).raise_for_errors()
    core = make_core(world.cluster)
    world.at_end.append(lambda: core.close(10.0))
    core.assign([("asked", 0, BEGINNING)])
    until(lambda: core.poll(3, 0.05)[0], "a record")
    assert core.commit([("asked", 0, 2)], 10.0) == []
    questions: list[tuple[Callable[[], Any], Any]] = [
        (lambda: core.committed([("asked", 0)], 10.0), {("asked", 0): 2}),
        (lambda: core.ends([("asked", 0)]), {("asked", 0): 3}),
        (lambda: core.watermarks("asked", 0, 10.0), (0, 3)),
        (lambda: len(core.partitions("asked", 10.0)), len(core.partitions("asked", 10.0))),
        (lambda: core.offsets_for_times([("asked", 0, 1)], 10.0).keys(), {("asked", 0): None}.keys()),
        (lambda: core.pause([("asked", 0)]), []),
        (lambda: core.resume([("asked", 0)]), []),
    ]

    def step(attempt: Attempt) -> None:
        for ask, expected in questions:
            got = checked(attempt(ask))
            if got.error is None:
                assert got.value == expected
            assert ask() == expected

    return step


def sending_offsets(world: World) -> Step:
    """A transaction is committed with the offsets it has, or not at all; without memory the call can be made again.

    Nothing goes to the topic that is read back: the mock cluster's markers of transactions have no checksum.
    """
    with kbatch.Producer(world.config()) as producer:
        producer.send_batch("shared", [Envelope(data=b"x")]).raise_for_errors()
    core = make_core(world.cluster)
    world.at_end.append(lambda: core.close(10.0))
    core.subscribe(["shared"])
    until(lambda: core.poll(0, 0.05) and core.rebalance() is not None, "a rebalance")
    core.answer()
    producer = world.producer(config={"transactional.id": "offsets", "enable.idempotence": True})
    producer.send_batch("invoices", world.batch()).raise_for_errors()
    pool = RecordPool()

    def commit(membership: Any) -> BatchWithOffsets:
        batch = BatchWithOffsets(producer._core)
        batch.send_offsets = lambda used, timeout_ms: membership.send_offsets(used, [("shared", 0, 1)], timeout_ms)
        producer._core.map_packed(batch, pool.pack(pool.map(producer._mapper, "invoices", world.batch())))
        producer._send_detached(batch)
        batch._wait(30.0)
        return batch

    def step(attempt: Attempt) -> None:
        membership = checked(attempt(core.membership))
        # Outside of a transaction it is refused, in words that need memory.
        told = checked(attempt(lambda: core.membership().send_offsets(producer._core, [("shared", 0, 1)], 5_000)))
        assert told.error is not None or told.value is not None
        if membership.error is None:
            checked(attempt(lambda: commit(membership.value)))
        assert commit(core.membership()).is_committed

    return step


def refused(world: World) -> Step:
    """A bad envelope: the error that it deserves, or the lack of memory; always whole."""
    bad = [
        None,
        Envelope(object()),
        Envelope(1, headers={"\ud800": "x"}),
        Envelope(1, headers={"x": 5}),
        Envelope(1, key=7),
        Envelope(1, topic="a b"),
        Envelope(data=b"x" * 1_100_000),
        Envelope(1, conversation_id="conv", key="k"),
    ]
    return _refused(world, bad, wire="wolverine")


def refused_events(world: World) -> Step:
    """The same for CloudEvents."""
    bad = [
        Envelope(1, source=""),
        Envelope(1, source="\ud800"),
        Envelope(1, headers={"ce_größe": "x"}),
        Envelope(1, headers={"ce_x": None}),
        Envelope(1, headers={"ce_x": b"\xff"}),
        Envelope(1, headers={"ce_id": ""}),
        Envelope(1, headers=[("ce_id", "x"), ("ce_id", "y")]),
    ]
    return _refused(world, bad, wire="cloudevents", source="/shop")


def _refused(world: World, bad: list[Any], **options: Any) -> Step:
    turn = 0

    def step(attempt: Attempt) -> None:
        nonlocal turn
        turn += 1
        producer = world.producer(**options)
        batch = [*envelopes()[:2], bad[turn % len(bad)]]
        pending = PendingBatch(producer._core)
        got = checked(attempt(lambda: producer._core.map(pending, TOPIC, batch)), kbatch.SerializationError)
        if isinstance(got.error, kbatch.SerializationError):
            assert got.error.index == 2
            assert str(got.error)
        world.close()

    return step


def making(world: World) -> Step:
    """The constructors, and what an envelope tells."""

    def make() -> list[Any]:
        # No replace(): Cython 3.3.1 crashes when its __init__, called with many keywords, finds no memory for them.
        return [(repr(each), hash(each), each.id, each.sent_at, each.message_type) for each in envelopes()[:4]]

    def step(attempt: Attempt) -> None:
        got = checked(attempt(make))
        assert got.error is not None or len(got.value) == 4

    return step


# --- sending, on a producer that has started


def sending(world: World) -> Step:
    producer = world.started()

    def step(attempt: Attempt) -> None:
        batch = world.batch()
        got = checked(attempt(lambda: producer.send_batch(TOPIC, batch).raise_for_errors()))
        world.book(True if got.error is None else None)
        settled()
        usable(world, producer)

    return step


def sending_fresh(world: World) -> Step:
    """The first use of a producer: everything is taken for the first time."""

    def step(attempt: Attempt) -> None:
        batch = world.batch()
        producer = world.producer()
        got = checked(attempt(lambda: producer.send_batch(TOPIC, batch)))
        world.book(True if got.error is None else None)
        settled()
        usable(world, producer)
        world.close()

    return step


def making_and_closing(world: World) -> Step:
    def use() -> int:
        producer = kbatch.Producer(world.config())
        world.opened.append(producer)
        producer.submit(TOPIC, [])
        return producer.close()

    def step(attempt: Attempt) -> None:
        checked(attempt(use))
        world.close()
        settled()

    return step


def closing(world: World) -> Step:
    def step(attempt: Attempt) -> None:
        producer = world.producer()
        batch = world.batch()
        pending = producer.submit(TOPIC, batch)
        checked(attempt(producer.close))
        assert producer.close() == 0
        world.book(pending.wait(30).ok)
        del pending
        world.close()
        settled()

    return step


def submitting(world: World) -> Step:
    """Two callbacks: each is called once if it was taken, and never if it was refused."""
    # Time to add a callback before the batch is done. After that the caller would use a threading.Condition, which
    # stays locked when its __exit__ finds no memory.
    producer = world.started(config={"linger.ms": 20})

    # Its thread: threading's own lock stays taken if there is no memory to give it back.
    begun: list[Any] = []
    world.book(producer.submit(TOPIC, world.batch(), callback=begun.append).wait(30).ok)
    until(lambda: begun, "the thread for callbacks")

    def step(attempt: Attempt) -> None:
        batch = world.batch()
        first: list[Any] = []
        second: list[Any] = []
        pending: list[kbatch.PendingBatch] = []

        def use() -> None:
            pending.append(producer.submit(TOPIC, batch, callback=first.append))
            pending[0].add_done_callback(second.append)

        got = checked(attempt(lambda: (use(), pending[0].wait(30), wait_for(lambda: first and second))))
        producer.flush()
        usable(world, producer)
        if pending:
            world.book(pending[0].wait(30).ok)
            until(lambda: first, "the callback of a batch that was taken")
        assert len(first) <= 1
        if got.error is None:
            assert (len(first), len(second)) == (1, 1)
        assert len(second) <= 1
        pending.clear()
        settled()

    return step


def wait_for(condition: Callable[[], Any]) -> None:
    """As `until`, but what comes of it is seen afterwards."""
    deadline = time.monotonic() + 0.3
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)


def waiting(world: World) -> Step:
    producer = world.started()

    def step(attempt: Attempt) -> None:
        pending = producer.submit(TOPIC, world.batch())
        got = checked(attempt(lambda: (pending.wait(30), pending.report.exception(), repr(pending.report))))
        report = pending.wait(30)
        assert got.error is not None or got.value[0] is report
        assert (report.acked, len(report.offsets), report.errors) == (3, 3, {})
        world.book(True)
        settled()

    return step


def awaiting(world: World) -> Step:
    producer = world.started()
    loop = asyncio.new_event_loop()
    world.at_end.append(loop.close)

    def step(attempt: Attempt) -> None:
        batch = world.batch()

        async def use() -> Any:
            pending = producer.submit(TOPIC, batch)
            failed = None
            try:
                await asyncio.wait_for(Awaited(pending, attempt), 30)
            except MemoryError as error:
                failed = error
            return failed, await asyncio.wait_for(pending, 30)

        class Awaited:
            def __init__(self, pending: kbatch.PendingBatch, attempt: Attempt) -> None:
                self.pending, self.attempt = pending, attempt

            def __await__(self) -> Any:
                steps = self.pending.__await__()
                first = self.attempt(lambda: next(steps))
                if first.error is not None and not isinstance(first.error, StopIteration):
                    raise first.error
                if first.error is None:
                    yield first.value
                    yield from steps

        _failed, report = loop.run_until_complete(use())
        world.book(report.ok)
        assert report.acked == 3
        usable(world, producer)

    return step


class Started:
    """An awaitable whose first step, up to what it waits for, is what may fail."""

    def __init__(self, work: Coroutine[Any, Any, Any], attempt: Attempt) -> None:
        self.work, self.attempt = work, attempt

    def __await__(self) -> Any:
        # SystemError: CPython's send(), of a coroutine that returns at once, finds no memory for StopIteration.
        first = checked(self.attempt(lambda: self.work.send(None)), StopIteration, SystemError)
        if isinstance(first.error, SystemError) and "returned NULL" in str(first.error):
            return None
        if isinstance(first.error, StopIteration):
            return first.error.value
        if first.error is not None:
            raise first.error
        # The rest of a coroutine that has begun, by hand: `yield from` would begin with what its first step gave.
        waits_for = first.value
        while True:
            try:
                got = yield waits_for
            except BaseException as error:
                step = functools.partial(self.work.throw, error)
            else:
                step = functools.partial(self.work.send, got)
            try:
                waits_for = step()
            except StopIteration as end:
                return end.value


def on_a_loop(send: Callable[[aio.Producer, list[Envelope]], Coroutine[Any, Any, Any]]) -> Callable[[World], Step]:
    def scenario(world: World) -> Step:
        producer = world.started()
        loop = asyncio.new_event_loop()
        world.at_end.append(loop.close)
        loop.run_until_complete(send(beside(producer), world.batch()))  # fills caches of the standard library
        world.book(True)

        def step(attempt: Attempt) -> None:
            batch = world.batch()

            async def use() -> None:
                await Started(send(beside(producer), batch), attempt)

            try:
                loop.run_until_complete(use())
            except MemoryError:
                world.book(None)  # either nothing was sent, or the wait could not begin
            else:
                world.book(True)
            producer.flush()
            usable(world, producer)

        return step

    return scenario


async def _send(producer: aio.Producer, batch: list[Envelope]) -> None:
    assert (await producer.send_batch(TOPIC, batch)).acked == 3


async def _submit(producer: aio.Producer, batch: list[Envelope]) -> None:
    told: list[kbatch.DeliveryReport] = []
    pending = await producer.submit(TOPIC, batch, callback=told.append)
    report = await pending
    while not told:
        await asyncio.sleep(0)
    assert told == [report]
    assert report.acked == 3


def reporting(world: World) -> Step:
    """A batch of which every part is refused: the report with its errors, the error, its message."""
    producer = world.started()

    def use() -> Any:
        report = producer.send_batch(TOPIC, [Envelope(1, partition=9), Envelope(2, partition=9)])
        error = report.exception()
        return repr(report), str(error), report.errors, report.partitions, report.offsets, report.expired_indices

    def step(attempt: Attempt) -> None:
        got = checked(attempt(use))
        assert got.error is not None or len(got.value[2]) == 2
        settled()
        usable(world, producer)

    return step


class Recorder(SenderCallback):
    """Takes no memory itself."""

    def __init__(self) -> None:
        self.count = 0
        self.method = ""
        self.answer: Any = None
        for name in dir(self):
            if name.startswith("mark_"):
                setattr(self, name, getattr(self, name))  # bound, so that not even to look it up takes memory

    def mark_successful(self, batch: Any, answer: Any) -> None:
        self.count, self.method, self.answer = self.count + 1, "mark_successful", answer

    def mark_serialization_failure(self, batch: Any, answer: Any) -> None:
        self.count, self.method, self.answer = self.count + 1, "mark_serialization_failure", answer

    def mark_timed_out(self, batch: Any, answer: Any) -> None:
        self.count, self.method, self.answer = self.count + 1, "mark_timed_out", answer

    def mark_topic_does_not_exist(self, batch: Any, answer: Any) -> None:
        self.count, self.method, self.answer = self.count + 1, "mark_topic_does_not_exist", answer

    def mark_processing_failure(self, batch: Any, answer: Any) -> None:
        self.count, self.method, self.answer = self.count + 1, "mark_processing_failure", answer


def answering(world: World) -> Step:
    """A sender's callback: exactly one answer, a right one."""
    producer = world.started()

    def step(attempt: Attempt) -> None:
        batch = OutgoingBatch(world.batch())
        callback = Recorder()
        sender = KafkaSender(producer, TOPIC)
        got = checked(attempt(lambda: sender.send_batch(callback, batch)))
        if got.error is None:
            assert callback.count == 1
        elif not callback.count:
            # It raised, so either the answer comes later, or there was no memory to begin with: nothing was sent then.
            wait_for(lambda: callback.count)
            if not callback.count:
                world.book(False)
                return
        settled()
        assert callback.count == 1
        method, answer = callback.method, callback.answer
        assert method in ("mark_successful", "mark_processing_failure"), (method, answer)
        if method == "mark_successful":
            world.book(True)
        else:
            # either nothing was sent, or the batch is in flight and the error says so
            world.book(None)
        usable(world, producer)

    return step


def answering_on_a_loop(world: World) -> Step:
    """As `answering`, by a sender on a loop."""
    producer = world.started()
    loop = asyncio.new_event_loop()
    world.at_end.append(loop.close)

    def step(attempt: Attempt) -> None:
        batch = OutgoingBatch(world.batch())
        callback = Recorder()
        sender = aio.KafkaSender(beside(producer), TOPIC)

        async def use() -> None:
            error = None
            try:
                await Started(sender.send_batch(callback, batch), attempt)
            except MemoryError as raised:
                error = raised
            for _ in range(50):
                if callback.count:
                    break
                await asyncio.sleep(0.001)
            assert callback.count == 1 or (error is not None and callback.count == 0)

        loop.run_until_complete(use())
        world.book(True if callback.method == "mark_successful" else False if not callback.count else None)
        producer.flush()
        usable(world, producer)

    return step


def answering_a_bad_batch(world: World) -> Step:
    producer = world.started()

    def step(attempt: Attempt) -> None:
        batch = OutgoingBatch([*world.batch(), Envelope(1, headers={"x": 5})])
        callback = Recorder()
        sender = KafkaSender(producer, TOPIC)
        got = checked(attempt(lambda: sender.send_batch(callback, batch)))
        world.book(False)
        if got.error is not None and not callback.count:
            return
        assert callback.count == 1
        method, answer = callback.method, callback.answer
        assert method in ("mark_serialization_failure", "mark_processing_failure"), (method, answer)
        world.book(False)
        settled()

    return step


# --- single envelopes


class Buffer(Accumulator):
    """A buffer without a sender."""

    def _start(self) -> None:
        self._accept()

    def _refuse(self) -> None:
        raise kbatch.SenderClosedError("the sender is closed")


def accumulating(world: World) -> Step:
    """An envelope is taken once or not at all, and the answer tells which; also if it must wait."""
    numbers = [Envelope(n) for n in range(5)]

    def taken(buffer: Buffer) -> list[Envelope]:
        buffer._close_filling()
        envelopes: list[Envelope] = []
        while (batch := buffer._next_batch()) is not None:
            assert batch.first_seq == len(envelopes)
            assert batch.envelopes, "a batch of nothing"
            envelopes += batch.envelopes
        return envelopes

    def step(attempt: Attempt) -> None:
        buffer = Buffer(batch_size=2, batch_bytes=1000, batch_timeout_s=3600, max_buffered=3)
        accepted = [False] * len(numbers)
        waiters: list[Any] = [None]

        def use() -> None:
            for n in range(3):
                buffer.send(numbers[n])
                accepted[n] = True
            assert not buffer.try_send(numbers[3])
            waiters[0] = buffer._line_up(numbers[4], lambda: None)
            buffer._give_back(1, 0)

        checked(attempt(use))
        if waiters[0] is not None:
            buffer._leave_line(waiters[0])
            accepted[4] = waiters[0].taken
        assert taken(buffer) == [envelope for envelope, was_taken in zip(numbers, accepted, strict=True) if was_taken]
        buffer._give_back(len(buffer), buffer._buffered_bytes)
        buffer.send(numbers[0])
        assert len(buffer) == 1

    return step


def rejecting(world: World) -> Step:
    """Those that cannot be mapped are told, no other, or nothing is mapped."""
    bad = {
        1: Envelope(Unwritable(), headers={"h": "v"}),
        3: Envelope(1, headers={"x": 5}),
        9: Envelope(data=b"x" * 1_100_000),
    }
    batch: list[Any] = envelopes()
    for index, envelope in bad.items():
        batch.insert(index, envelope)

    def step(attempt: Attempt) -> None:
        producer = world.producer()
        pending = PendingBatch(producer._core)
        rejected: list[tuple[int, kbatch.SerializationError]] = []
        got = checked(attempt(lambda: producer._core.map(pending, TOPIC, batch, rejected)))
        if got.error is None:
            without_memory = {index for index, error in rejected if isinstance(error.__cause__, MemoryError)}
            assert len(without_memory - bad.keys()) <= 1
            assert [index for index, _ in rejected] == sorted(without_memory | bad.keys())
            assert [record is None for record in producer._core.records(pending)] == [
                n in bad or n in without_memory for n in range(len(batch))
            ]
        else:
            assert rejected == []
        world.close()

    return step


def sending_without_the_rejected(world: World) -> Step:
    producer = world.started()

    def step(attempt: Attempt) -> None:
        batch = [*world.batch(), Envelope(Unwritable())]
        done = threading.Event()

        def use() -> tuple[PendingBatch, list[tuple[int, kbatch.SerializationError]]]:
            pending = PendingBatch(producer._core)
            rejected: list[tuple[int, kbatch.SerializationError]] = []
            producer._core.map(pending, TOPIC, batch, rejected)
            producer._send_detached(pending, waker=done.set)
            return pending, rejected

        got = checked(attempt(use))
        world.book(None)
        if got.error is None:
            assert done.wait(30)
            pending, rejected = got.value
            report = pending.report
            assert list(report.errors) == [index for index, _ in rejected]
            assert not any(error.possibly_persisted for error in report.errors.values())
            without_memory = [index for index, error in rejected if isinstance(error.__cause__, MemoryError)]
            assert len(without_memory) <= 1
            assert report.acked == len(batch) - len(rejected)
            assert {*without_memory, 3} == set(report.errors)
            if not without_memory:
                world.book(True)
        settled()
        usable(world, producer)

    return step


def probing(world: World) -> Step:
    producer = world.started()

    def step(attempt: Attempt) -> None:
        got = checked(attempt(lambda: [producer._core.probe(topic, 10.0) for topic in (TOPIC, "ünknown")]))
        assert got.value in (None, [None, None])
        assert producer._core.probe(TOPIC, 10.0) is None

    return step


def batched(world: World) -> Step:
    """What was taken is sent, whatever fails; what raised was not taken."""
    producer = world.started()
    failed: list[Any] = []
    agent = kbatch.SendingAgent(
        producer,
        TOPIC,
        retry=kbatch.RetryPolicy(initial_backoff_s=0.001),
        failures_to_open=1_000_000,
        on_failed=lambda *what: failed.append(what),
    )
    sender = kbatch.BatchedSender(agent, batch_size=2)
    world.at_end.append(sender.close)

    def step(attempt: Attempt) -> None:
        batch = world.batch()
        taken = [False] * len(batch)

        def use() -> None:
            for n, envelope in enumerate(batch):
                sender.send(envelope)
                taken[n] = True
            assert sender.flush() == 0

        checked(attempt(use))
        world.perhaps -= set(world.bodies)
        world.sent |= {body for body, was_taken in zip(world.bodies, taken, strict=True) if was_taken}
        assert sender.flush() == 0
        assert len(sender) == 0
        assert failed == []

    return step


def batched_fresh(world: World) -> Step:
    """A sender from its making to its end."""
    producer = world.started()

    def step(attempt: Attempt) -> None:
        made: list[kbatch.BatchedSender] = []
        add = made.append

        def use() -> None:
            agent = kbatch.SendingAgent(producer, TOPIC, on_failed=lambda envelope, error: None)
            add(kbatch.BatchedSender(agent))
            for envelope in world.batch():
                made[0].send(envelope)
            assert made[0].close() == 0

        got = checked(attempt(use))
        if made:
            world.book(None)
            left = made.pop().close()
            assert left <= 3
        if got.error is None:
            world.book(True)
        settled()
        usable(world, producer)

    return step


def batched_on_a_loop(world: World) -> Step:
    producer = world.started()
    loop = asyncio.new_event_loop()
    world.at_end.append(loop.close)
    failed: list[Any] = []

    async def make() -> aio.BatchedSender:
        agent = aio.SendingAgent(
            beside(producer),
            TOPIC,
            retry=kbatch.RetryPolicy(initial_backoff_s=0.001),
            failures_to_open=1_000_000,
            on_failed=lambda *what: failed.append(what),
        )
        sender = aio.BatchedSender(agent, batch_size=2, max_buffered=2)
        await sender.send(world.batch()[0])
        world.book(None)
        await sender.flush()
        return sender

    sender = loop.run_until_complete(make())

    def step(attempt: Attempt) -> None:
        async def use() -> None:
            for envelope in world.batch():
                with contextlib.suppress(MemoryError):
                    await Started(sender.send(envelope), attempt)
            with contextlib.suppress(MemoryError):
                await Started(sender.flush(), attempt)

        loop.run_until_complete(use())
        world.book(None)
        assert loop.run_until_complete(sender.flush()) == 0
        assert (len(sender), failed) == (0, [])

    def end() -> None:
        loop.run_until_complete(sender.close())

    world.at_end.append(end)
    return step


def inline(world: World) -> Step:
    producer = world.started()
    sender = kbatch.InlineSender(producer, TOPIC)
    world.at_end.append(sender.close)

    def step(attempt: Attempt) -> None:
        (envelope,) = world.batch(1)
        got = checked(attempt(lambda: sender.send(envelope)))
        world.book(True if got.error is None else None)
        assert got.error is not None or got.value.acked == 1
        settled()
        usable(world, producer)

    return step


def inline_on_a_loop(world: World) -> Step:
    producer = world.started()
    loop = asyncio.new_event_loop()
    world.at_end.append(loop.close)
    sender = aio.InlineSender(beside(producer), TOPIC)

    def step(attempt: Attempt) -> None:
        (envelope,) = world.batch(1)

        async def use() -> None:
            report = await Started(sender.send(envelope), attempt)
            assert report.acked == 1

        try:
            loop.run_until_complete(use())
        except MemoryError:
            world.book(None)
        else:
            world.book(True)
        producer.flush()
        usable(world, producer)

    return step


def answering_by_an_agent(world: World) -> Step:
    """As `answering`, under a circuit breaker."""
    producer = world.started()
    agent = kbatch.SendingAgent(producer, TOPIC)
    world.at_end.append(agent.close)

    def step(attempt: Attempt) -> None:
        batch = OutgoingBatch(world.batch())
        callback = Recorder()
        got = checked(attempt(lambda: agent.send_batch(callback, batch)))
        assert callback.count <= 1
        if got.error is None:
            assert callback.count == 1
        if not callback.count:
            wait_for(lambda: callback.count)
        world.book(True if callback.method == "mark_successful" else None)
        producer.flush()
        assert agent.state is kbatch.CircuitState.CLOSED
        usable(world, producer)

    return step


def in_memory(world: World) -> Step:
    """A producer without Kafka. What is told to be sent is there."""

    def step(attempt: Attempt) -> None:
        producer = MemoryProducer()
        batch = [Envelope(data=b"%d" % n) for n in range(3)]

        def use() -> None:
            assert producer.send_batch(TOPIC, batch).acked == 3
            assert producer.submit(TOPIC, batch, callback=lambda report: None).wait().ok
            producer.close()

        got = checked(attempt(use))
        if got.error is None:
            values = [record.value() for record in producer.records]
            assert values == [b"0", b"1", b"2"] * 2
        try:
            assert producer.close() == 0
        except kbatch.UndeliveredError:
            assert got.error is not None

    return step


# --- what librdkafka tells


def statistics(world: World) -> Step:
    """A notice that finds no memory is dropped; the next one comes."""
    texts: list[str] = []

    def new_ones() -> None:
        # What was made before may have its notice already. "ts" is of the monotonic clock, in microseconds.
        begun = 1e6 * time.monotonic()
        until(lambda: any(json.loads(text)["ts"] > begun for text in texts), "statistics that were made since")

    def step(attempt: Attempt) -> None:
        producer = world.started(config={"stats_cb": texts.append, "statistics.interval.ms": 5})
        texts.clear()
        attempt(new_ones)
        texts.clear()
        until(lambda: texts, "statistics after a notice was dropped")
        usable(world, producer)
        world.close()

    return step


def errors(world: World) -> Step:
    told: list[Any] = []

    def step(attempt: Attempt) -> None:
        producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0, "error_cb": told.append})
        world.opened.append(producer)
        # From the start on: the first error may come before one has begun to wait for it.
        checked(attempt(lambda: (producer.submit(TOPIC, []), wait_for(lambda: told))))
        told.clear()
        producer._core.inject_fatal_error(45, "made up")
        until(lambda: any(error.fatal() for error in told), "the fatal error")
        world.close()

    return step


def tokens(world: World) -> Step:
    """A token that finds no memory on its way is asked for again."""
    config = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanisms": "OAUTHBEARER",
        "bootstrap.servers": "127.0.0.1:1",
    }

    def step(attempt: Attempt) -> None:
        asked = threading.Event()
        failed = threading.Event()

        def error_cb(error: KafkaError) -> None:
            if error.name() == "_AUTHENTICATION":
                failed.set()

        def token(config: str) -> tuple[str, float, str, dict[str, str]]:
            asked.set()
            return "token", time.time() + 3600, "me", {"extension": "value"}

        producer = world.producer(config={**config, "oauth_cb": token, "error_cb": error_cb})

        def use() -> None:
            producer.submit(TOPIC, [])
            wait_for(asked.is_set)

        checked(attempt(use))
        producer.submit(TOPIC, [])
        # A failure that librdkafka is told of is one that it asks again after, ten seconds later.
        until(lambda: asked.is_set() or failed.is_set(), "a token or its failure")
        world.close()

    return step


def setting_a_token(world: World) -> Step:
    config = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanisms": "OAUTHBEARER",
        "bootstrap.servers": "127.0.0.1:1",
    }
    producer = world.producer(config={**config, "oauth_cb": lambda config: ("token", time.time() + 3600)})

    def step(attempt: Attempt) -> None:
        answer = ("token", time.time() + 3600, "me", {"a": "b", "c": "d"})
        checked(attempt(lambda: set_oauth_token(producer._core, answer)))
        set_oauth_token(producer._core, answer)

    return step


# --- the mock cluster


def pushing_errors(world: World) -> Step:
    producer = world.started(config={"retry.backoff.ms": 1, "retry.backoff.max.ms": 1})

    def step(attempt: Attempt) -> None:
        checked(attempt(lambda: world.cluster.push_request_errors(ApiKey.PRODUCE, ["NOT_ENOUGH_REPLICAS"])))
        usable(world, producer)

    return step


SCENARIOS: dict[str, Callable[[World], Step]] = {
    "making": making,
    "mapping kbatch": mapping(source="söurce", header_hook=lambda: {"hööked": "1"}),
    "mapping wolverine": mapping(wire="wolverine"),
    "mapping cloudevents": mapping(wire="cloudevents", source="/söurce", header_hook=lambda: {"ce_hooked": b"1"}),
    "mapping raw": mapping(wire="raw", encoder=msgspec.msgpack.Encoder()),
    "mapping by an encoder": mapping(encoder=encode),
    "mapping by a custom wire": mapping(wire=Wire()),
    "mapping without a producer": mapping_without_a_producer,
    "reading": reading,
    "packing": packing,
    "refused": refused,
    "received": received_records,
    "polled": polled,
    "rebalanced": rebalanced,
    "placed": placed,
    "sending offsets": sending_offsets,
    "refused events": refused_events,
    "sending": sending,
    "sending fresh": sending_fresh,
    "making and closing": making_and_closing,
    "closing": closing,
    "submitting": submitting,
    "waiting": waiting,
    "awaiting": awaiting,
    "sending on a loop": on_a_loop(_send),
    "submitting on a loop": on_a_loop(_submit),
    "reporting": reporting,
    "answering": answering,
    "answering on a loop": answering_on_a_loop,
    "answering a bad batch": answering_a_bad_batch,
    "accumulating": accumulating,
    "rejecting": rejecting,
    "sending without the rejected": sending_without_the_rejected,
    "probing": probing,
    "batched": batched,
    "batched fresh": batched_fresh,
    "batched on a loop": batched_on_a_loop,
    "inline": inline,
    "inline on a loop": inline_on_a_loop,
    "answering by an agent": answering_by_an_agent,
    "in memory": in_memory,
    "statistics": statistics,
    "errors": errors,
    "tokens": tokens,
    "setting a token": setting_a_token,
    "pushing errors": pushing_errors,
}
