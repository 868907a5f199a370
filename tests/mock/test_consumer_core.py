"""The native consumer on the mock cluster: its records, its group, and what happens when it ends in mid-call."""

import gc
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka import KafkaError

import kbatch
from kbatch import Envelope, ReceivedEnvelope, Tombstone
from kbatch._errors import ConfigError, ForkError, ProducerClosedError
from kbatch._events import make_dispatcher
from kbatch._exit import CORES
from kbatch._fastmap import CallbackThread
from kbatch._receiving._config import ConsumerConfig
from kbatch._receiving._consumer import BEGINNING, COMMITTED, END, ConsumerCallError, ConsumerCore, check_version
from kbatch.testing import ApiKey, MockCluster

from ..waiting import later, until
from .clients import produce
from .processes import needs_fork, run

# The mock cluster lets a member that comes after the last one has left wait for nearly a session.
SESSION = {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300}


@contextmanager
def consumer(
    cluster: MockCluster | str, *, wire: Any = "kbatch", group: str = "billing", **config: Any
) -> Iterator[ConsumerCore]:
    core = make_core(cluster, wire=wire, group=group, **config)
    try:
        yield core
    finally:
        core.close(10.0)


def make_core(
    cluster: MockCluster | str,
    *,
    wire: Any = "kbatch",
    group: str = "billing",
    protocol: str = "classic",
    **config: Any,
) -> ConsumerCore:
    servers = cluster if isinstance(cluster, str) else cluster.bootstrap_servers
    settings = {"bootstrap.servers": servers, "group.id": group, "log_level": 0, "fetch.wait.max.ms": 10}
    if isinstance(cluster, str):
        settings["group.protocol"] = protocol  # whose brokers refuse so short a session
    else:
        settings |= SESSION
    parsed = ConsumerConfig.parse(settings | {name.replace("_", "."): value for name, value in config.items()})
    dispatcher = make_dispatcher(parsed, CallbackThread("kbatch-callbacks"), lambda: None)
    return ConsumerCore(parsed.native, dispatcher, wire)


def send(cluster: MockCluster, count: int, first: int = 0, partition: int | None = 0, **options: Any) -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}, **options) as producer:
        batch = [Envelope(data=b"%d" % n, key=b"k%d" % n, partition=partition) for n in range(first, first + count)]
        producer.send_batch("orders", batch).raise_for_errors()


def take(core: ConsumerCore, count: int, *, most: int = 1000) -> list[ReceivedEnvelope[Any]]:
    """So many records; answers rebalances on the way."""
    found: list[ReceivedEnvelope[Any]] = []

    def enough() -> bool:
        envelopes, errors = core.poll(most, 0.1)
        assert not errors
        found.extend(envelopes)
        if core.rebalance() is not None:
            core.answer()
        return len(found) >= count

    until(enough, f"{count} records")
    return found


def bodies(envelopes: list[ReceivedEnvelope[Any]]) -> list[int]:
    return [int(envelope.data) for envelope in envelopes]


def await_rebalance(core: ConsumerCore, gives: bool = True) -> list[tuple[str, int]]:
    found: list[tuple[bool, list[tuple[str, int]]]] = []

    def there() -> bool:
        core.poll(0, 0.1)
        if (change := core.rebalance()) is not None:
            found.append(change)
        return bool(found)

    until(there, "a rebalance")
    assert found[0][0] == gives
    return found[0][1]


@pytest.fixture
def orders(kafka_cluster: MockCluster) -> MockCluster:
    kafka_cluster.create_topic("orders", partitions=1)
    kafka_cluster.set_group_rebalance_delay(0)
    return kafka_cluster


# -- without a group


def test_partitions_are_assigned_by_hand_from_any_place(orders: MockCluster) -> None:
    send(orders, 10)
    with consumer(orders) as core:
        for offset, expected in ((BEGINNING, 0), (7, 7), (0, 0), (COMMITTED, 0)):
            core.assign([("orders", 0, offset)])
            assert bodies(take(core, 10 - expected)) == list(range(expected, 10))
        core.assign([("orders", 0, END)])
        assert core.poll(10, 0.3) == ([], [])
        send(orders, 2, first=10)
        assert bodies(take(core, 2)) == [10, 11]
        core.assign([])
        assert core.poll(10, 0.2) == ([], [])
        assert core.committed([("orders", 0)], 10.0) == {}


def test_reading_by_hand_joins_no_group_and_commits_nothing(orders: MockCluster) -> None:
    send(orders, 3)
    orders.start_request_tracking()
    with consumer(orders) as core:
        core.assign([("orders", 0, BEGINNING)])
        take(core, 3)
    seen = {request.api_key for request in orders.requests()}
    assert not seen & {ApiKey.JOIN_GROUP, ApiKey.OFFSET_COMMIT}


def test_the_end_of_a_partition_is_told(orders: MockCluster) -> None:
    send(orders, 3)
    with consumer(orders, enable_partition_eof=True) as core:
        core.assign([("orders", 0, BEGINNING)])
        found: list[Any] = []
        ends: list[Any] = []

        def at_end() -> bool:
            envelopes, errors = core.poll(100, 0.1)
            found.extend(envelopes)
            ends.extend(errors)
            return bool(ends)

        until(at_end, "the end")
    assert bodies(found) == [0, 1, 2]
    code, _, topic, partition, offset = ends[0]
    assert (code, topic, partition, offset) == (KafkaError._PARTITION_EOF, "orders", 0, 3)


def test_what_partitions_and_offsets_there_are(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=3)
    before = [Envelope(data=b"x", partition=1, timestamp=1_000 * n, topic="orders") for n in range(1, 6)]
    with kbatch.Producer({"bootstrap.servers": kafka_cluster.bootstrap_servers}) as producer:
        producer.send_batch(None, before).raise_for_errors()
    with consumer(kafka_cluster) as core:
        assert core.partitions("orders", 10.0) == [0, 1, 2]
        assert core.watermarks("orders", 1, 10.0) == (0, 5)
        assert core.watermarks("orders", 0, 10.0) == (0, 0)
        with pytest.raises(ConsumerCallError):
            core.watermarks("orders", 99, 2.0)


def test_offsets_of_times(orders: MockCluster) -> None:
    # The mock cluster knows of no times: it answers with the end.
    send(orders, 3)
    with consumer(orders) as core:
        found = core.offsets_for_times([("orders", 0, 1_000)], 10.0)
        assert set(found) == {("orders", 0)}


def test_seek_goes_back_and_forth(orders: MockCluster) -> None:
    send(orders, 100)
    with consumer(orders) as core:
        core.assign([("orders", 0, BEGINNING)])
        take(core, 10, most=10)
        for offset in (50, 3, 99, 0):
            assert core.seek([("orders", 0, offset)], 10.0) == []
            assert bodies(take(core, 1, most=1)) == [offset]
        assert core.seek([("orders", 7, 0)], 1.0) != []


def test_what_is_paused_is_fetched_again(orders: MockCluster) -> None:
    send(orders, 100)
    with consumer(orders) as core:
        core.assign([("orders", 0, BEGINNING)])
        first = take(core, 10, most=10)
        assert core.pause([("orders", 0)]) == []
        assert core.poll(100, 0.3) == ([], [])
        assert core.resume([("orders", 0)]) == []
        assert bodies([*first, *take(core, 90)]) == list(range(100))


def test_what_is_not_wanted_waits_where_it_is(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=2)
    for partition in (0, 1):
        send(kafka_cluster, 10, first=10 * partition, partition=partition)
    with consumer(kafka_cluster) as core:
        core.assign([("orders", 0, BEGINNING), ("orders", 1, BEGINNING)])
        core.read([("orders", 1)], False)
        assert bodies(take(core, 10)) == list(range(10))
        core.read([("orders", 1)])
        assert bodies(take(core, 10)) == list(range(10, 20))


def test_a_poll_takes_no_more_than_half_of_what_it_may_from_one_of_several(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=2)
    send(kafka_cluster, 300, partition=0)
    with consumer(kafka_cluster) as core:
        core.assign([("orders", 0, BEGINNING), ("orders", 1, BEGINNING)])
        polls: list[int] = []
        until(lambda: polls.append(len(core.poll(100, 0.1)[0])) or sum(polls) == 300, "all of them")
        assert max(polls) == 50


def test_one_that_waits_is_woken(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders")
    with consumer(kafka_cluster) as core:
        core.assign([("orders", 0, BEGINNING)])
        with later(0.2, core.wake):
            assert core.poll(100, 600.0) == ([], [])
        core.wake()  # before it waits
        assert core.poll(100, 600.0) == ([], [])


def test_a_commit_that_nobody_waits_for_is_answered(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders")
    send(kafka_cluster, 3)
    with consumer(kafka_cluster) as core:
        core.assign([("orders", 0, BEGINNING)])
        take(core, 3)
        answers: list[list[tuple[str, int, int]] | None] = []
        for failed in ([], [("orders", 0, 28)]):
            if failed:
                kafka_cluster.push_request_errors(ApiKey.OFFSET_COMMIT, [28])
            offsets = [("orders", 0, 3 - len(failed))]
            assert core.commit_answer(offsets) is None
            assert core.begin_commit(offsets) == 0
            until(lambda given=offsets: answers.append(core.commit_answer(given)) or answers[-1] is not None, "one")
            assert answers[-1] == failed
        assert core.ends([("orders", 0)]) == {("orders", 0): 3}


# -- records


def test_records_of_other_clients(orders: MockCluster) -> None:
    messages = [
        {"value": None, "key": None},
        {"value": b"", "key": b""},
        {"value": None, "key": b"gone"},
        {"value": b"x" * 5000, "key": b"large"},
        {"value": b"x", "headers": [("h", None), ("h", b""), ("h", b"\xff"), ("größe", b"1"), ("tenant-id", b"t")]},
        {"value": b"x", "headers": [("sent-at", b"yesterday"), ("h", b"1")]},
    ]
    assert produce(orders.bootstrap_servers, "orders", messages) == [None] * 6
    with consumer(orders) as core:
        core.assign([("orders", 0, BEGINNING)])
        nothing, empty, gone, large, full, bad = take(core, 6)
    assert (nothing.key, nothing.data, nothing.message, nothing.is_tombstone) == (None, None, None, False)
    assert (empty.key, empty.data) == (b"", b"")
    assert (gone.key, gone.data, gone.is_tombstone) == (b"gone", None, True)
    assert isinstance(gone.replace(), Tombstone)
    assert (large.key, large.data) == (b"large", b"x" * 5000)
    assert full.headers == (("h", None), ("h", b""), ("h", b"\xff"), ("größe", b"1"))
    assert full.tenant_id == "t"
    assert [envelope.offset for envelope in (nothing, empty, gone, large, full, bad)] == list(range(6))
    assert [envelope.error for envelope in (nothing, empty, gone, large, full)] == [None] * 5
    assert "header 'sent-at' must be a time" in str(bad.error)
    assert (bad.data, bad.headers) == (b"x", (("sent-at", b"yesterday"), ("h", b"1")))
    assert len({envelope.id for envelope in (nothing, empty, gone, large, full, bad)}) == 6


def test_a_record_with_as_many_headers_as_librdkafka_reads(orders: MockCluster) -> None:
    headers = [(f"h{n}", b"1") for n in range(99_990)]
    envelope = Envelope(data=b"x", headers=headers)
    with kbatch.Producer({"bootstrap.servers": orders.bootstrap_servers, "message.max.bytes": 4_000_000}) as producer:
        producer.send_batch("orders", [envelope]).raise_for_errors()
    with consumer(orders) as core:
        core.assign([("orders", 0, BEGINNING)])
        (read,) = take(core, 1)
    assert read.headers == tuple(headers)
    assert read.id == envelope.id


def test_envelopes_outlive_their_consumer_and_keep_no_fetch(orders: MockCluster) -> None:
    with kbatch.Producer({"bootstrap.servers": orders.bootstrap_servers}) as producer:
        big = [Envelope(data=bytes(500_000), key=str(n)) for n in range(5)]
        producer.send_batch("orders", big).raise_for_errors()
    with consumer(orders) as core:
        core.assign([("orders", 0, BEGINNING)])
        kept = take(core, 5)[3]
    gc.collect()
    assert (kept.key, kept.topic, kept.data) == (b"3", "orders", bytes(500_000))
    with kbatch.Producer({"bootstrap.servers": orders.bootstrap_servers}) as producer:
        assert producer.send_batch(None, [kept]).acked == 1


def test_topics_are_told_apart(kafka_cluster: MockCluster) -> None:
    topics = [f"orders{n}" for n in range(30)]
    for topic in topics:
        kafka_cluster.create_topic(topic, partitions=1)
    with kbatch.Producer({"bootstrap.servers": kafka_cluster.bootstrap_servers}) as producer:
        batch = [Envelope(data=topic.encode(), topic=topic) for _ in range(20) for topic in topics]
        producer.send_batch(None, batch).raise_for_errors()
    with consumer(kafka_cluster) as core:
        core.assign([(topic, 0, BEGINNING) for topic in topics])
        found = take(core, 600, most=7)
    assert all(envelope.topic.encode() == envelope.data for envelope in found)
    assert Counter(envelope.topic for envelope in found) == dict.fromkeys(topics, 20)


def test_a_format_of_ones_own_reads_each_record(orders: MockCluster) -> None:
    class Lines:
        def read(self, record: Any) -> Envelope[Any]:
            if record.value() == b"3":
                raise ValueError("three")
            return Envelope(int(record.value()), key=record.key())

    send(orders, 5)
    with consumer(orders, wire=Lines()) as core:
        core.assign([("orders", 0, BEGINNING)])
        found = take(core, 5)
    assert [envelope.message for envelope in found if envelope.error is None] == [0, 1, 2, 4]
    assert "three" in str(found[3].error)
    assert found[3].data == b"3"


def test_what_a_poll_raises_loses_no_record(orders: MockCluster) -> None:
    class Interrupted(BaseException):
        pass

    class Failing:
        calls = 0

        def read(self, record: Any) -> Envelope[Any]:
            self.calls += 1
            if self.calls % 3 == 0:
                raise Interrupted
            return Envelope(data=record.value())

    send(orders, 50)
    found: list[ReceivedEnvelope[Any]] = []
    interrupted = 0
    with consumer(orders, wire=Failing()) as core:
        core.assign([("orders", 0, BEGINNING)])

        def enough() -> bool:
            nonlocal interrupted
            try:
                found.extend(core.poll(10, 0.1)[0])
            except Interrupted:
                interrupted += 1
            return len(found) == 50

        until(enough, "50 records")
    assert bodies(found) == list(range(50))
    assert interrupted >= 20


def test_a_consumer_ends_while_records_were_taken_and_not_given_out(orders: MockCluster) -> None:
    class Never:
        def read(self, record: Any) -> Envelope[Any]:
            raise KeyboardInterrupt

    send(orders, 50)
    core = make_core(orders, wire=Never())
    core.assign([("orders", 0, BEGINNING)])
    with pytest.raises(KeyboardInterrupt):
        take(core, 1)
    core.close(10.0)
    assert core.name() is None  # it did not hang in librdkafka's end
    core = make_core(orders, wire=Never())
    core.assign([("orders", 0, BEGINNING)])
    with pytest.raises(KeyboardInterrupt):
        take(core, 1)
    del core


def test_one_thread_at_a_time_polls(orders: MockCluster) -> None:
    class Polling:
        def read(self, record: Any) -> Envelope[Any]:
            core.poll(1, 0.0)
            raise AssertionError

    send(orders, 1)
    with consumer(orders, wire=Polling()) as core:
        core.assign([("orders", 0, BEGINNING)])
        (read,) = take(core, 1)
    assert "one thread at a time polls a consumer" in str(read.error)


def test_a_bad_list_is_an_error(orders: MockCluster) -> None:
    with consumer(orders) as core:
        for bad, error in (
            ([("orders", 0, 0), ("orders", "x", 0)], TypeError),
            ([("orders", 0, 0), (b"orders", 0, 0)], TypeError),
            ([("orders", 0, 0), ("orders", 2**40, 0)], OverflowError),
            ([("orders", 0, 0), ("orders", 0, "x")], TypeError),
            ([("orders", 0, 0), ("ord\0ers", 0, 0)], ValueError),
            ([("orders", 0, 0), ("ord\ud800ers", 0, 0)], UnicodeEncodeError),
            ([("orders", 0, 0), ("orders",)], ValueError),
            ([("orders", 0, 0), 7], TypeError),
        ):
            for call in (core.assign, core.commit, lambda items: core.committed(items, 1.0), core.pause, core.read):
                with pytest.raises(error):
                    call(bad)  # type: ignore[operator]
        with pytest.raises(TypeError):
            core.subscribe(["orders", 7])  # type: ignore[list-item]


# -- the group


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_a_member_that_is_closed_before_it_has_heard_of_its_partitions(orders: MockCluster, strategy: str) -> None:
    # It has left the group when librdkafka asks it to take them. That takes luck: without the look whether there is a
    # protocol, one run of six crashed.
    for number in range(8):
        core = make_core(orders, group=f"group {number}", partition_assignment_strategy=strategy)
        orders.start_request_tracking()
        core.subscribe(["orders"])
        if number % 2:
            until(lambda: any(each.api_key == ApiKey.SYNC_GROUP for each in orders.requests()), "that it joins")
        time.sleep(number * 0.01)
        core.close(10.0)
        assert core.name() is None
        orders.stop_request_tracking()


def test_commits_are_told_and_kept(orders: MockCluster) -> None:
    send(orders, 10)
    with consumer(orders) as core:
        core.subscribe(["orders"])
        take(core, 10)
        assert core.member_id()
        assert core.commit([("orders", 0, 4)], 10.0) == []
        assert core.commit([]) == []
        assert core.committed([("orders", 0)], 10.0) == {("orders", 0): 4}
        orders.push_request_errors(ApiKey.OFFSET_COMMIT, ["GROUP_AUTHORIZATION_FAILED"])
        failed = core.commit([("orders", 0, 5)], 10.0)
        assert failed == [("orders", 0, KafkaError.GROUP_AUTHORIZATION_FAILED)]
    with consumer(orders) as core:
        core.subscribe(["orders"])
        assert bodies(take(core, 6)) == [4, 5, 6, 7, 8, 9]


def test_a_commit_that_nobody_answers_times_out_and_hears_signals(orders: MockCluster) -> None:
    send(orders, 1)
    with consumer(orders) as core:
        core.subscribe(["orders"])
        take(core, 1)
        orders.set_broker_down(1)
        assert core.commit([("orders", 0, 1)], 0.2) == [("orders", 0, KafkaError._TIMED_OUT)]
        with later(0.3, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            core.commit([("orders", 0, 1)], 30.0)
        with later(0.3, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            core.poll(10, 30.0)


@pytest.mark.parametrize("strategy", ["range", "roundrobin", "cooperative-sticky"])
def test_members_share_partitions(kafka_cluster: MockCluster, strategy: str) -> None:
    kafka_cluster.create_topic("orders", partitions=4)
    send(kafka_cluster, 100, partition=None)
    settings = {"partition_assignment_strategy": strategy}
    with consumer(kafka_cluster, **settings) as one, consumer(kafka_cluster, **settings) as two:
        held: dict[ConsumerCore, set[tuple[str, int]]] = {one: set(), two: set()}
        for core in held:
            core.subscribe(["orders"])

        def shared() -> bool:
            for core, partitions in held.items():
                core.poll(1000, 0.05)
                if (change := core.rebalance()) is None:
                    continue
                gives, changed = change
                partitions.update(changed) if gives else partitions.difference_update(changed)
                core.answer()
            return sorted(map(len, held.values())) == [2, 2]

        until(shared, "two partitions for each")
        assert set.union(*held.values()) == {("orders", n) for n in range(4)}
        two.unsubscribe()
        assert set(await_rebalance(two, gives=False)) == held[two]
        two.answer()


def test_a_static_member_comes_back(orders: MockCluster) -> None:
    send(orders, 3)
    for expected in (3, 1):
        with consumer(orders, group_instance_id="one") as core:
            core.subscribe(["orders"])
            found = take(core, expected)
            assert len(found) == expected
            assert core.commit([("orders", 0, found[-1].offset + 1)], 10.0) == []
        send(orders, 1)


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
@pytest.mark.parametrize("end", ["close", "forget"])
def test_a_rebalance_that_nobody_answers_does_not_hold_up_the_end(orders: MockCluster, strategy: str, end: str) -> None:
    core = make_core(orders, partition_assignment_strategy=strategy)
    core.subscribe(["orders"])
    assert await_rebalance(core) == [("orders", 0)]
    if end == "close":
        core.close(20.0)
        assert core.name() is None
    del core
    gc.collect()
    with consumer(orders, partition_assignment_strategy=strategy) as next_core:
        next_core.subscribe(["orders"])
        assert await_rebalance(next_core) == [("orders", 0)]


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_a_partition_that_is_taken_and_not_given_back_does_not_hold_up_the_end(
    orders: MockCluster, strategy: str
) -> None:
    core = make_core(orders, partition_assignment_strategy=strategy)
    core.subscribe(["orders"])
    await_rebalance(core)
    core.answer()
    core.unsubscribe()
    assert await_rebalance(core, gives=False) == [("orders", 0)]
    core.close(20.0)
    assert core.name() is None


def test_a_forgotten_consumer_leaves_its_group(orders: MockCluster) -> None:
    send(orders, 1)
    core = make_core(orders)
    CORES.add(core)
    core.subscribe(["orders"])
    take(core, 1)
    orders.start_request_tracking()
    del core
    gc.collect()
    until(
        lambda: any(request.api_key == ApiKey.LEAVE_GROUP for request in orders.requests()), "the forgotten one's leave"
    )


def test_the_end_comes_while_others_are_in_calls(orders: MockCluster) -> None:
    send(orders, 10)
    core = make_core(orders)
    core.subscribe(["orders"])
    take(core, 10)
    errors: list[BaseException] = []

    def repeat(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except ProducerClosedError:
            pass
        except BaseException as error:
            errors.append(error)

    calls: list[Callable[[], object]] = [
        lambda: core.poll(100, 30.0),
        lambda: core.commit([("orders", 0, 3)]),
        lambda: core.commit([("orders", 0, 3)], 15.0),
        lambda: core.committed([("orders", 0)], 15.0),
        lambda: core.assignment_lost(),
        lambda: core.read([("orders", 0)]),
        lambda: core.member_id(),
    ]
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    core.close(20.0)
    for thread in threads:
        thread.join(60.0)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(ProducerClosedError, match="the consumer is closed"):
        core.rebalance()


# -- callbacks


def test_tokens_are_asked_for(orders: MockCluster) -> None:
    asked = threading.Event()

    def oauth_cb(config: str | None) -> tuple[str, float]:
        asked.set()
        return "token", 4e9

    settings = {"security_protocol": "sasl_plaintext", "sasl_mechanisms": "OAUTHBEARER", "oauth_cb": oauth_cb}
    parsed = {"bootstrap.servers": orders.bootstrap_servers, "group.id": "g", "log_level": 0}
    parsed |= {name if name == "oauth_cb" else name.replace("_", "."): value for name, value in settings.items()}
    config = ConsumerConfig.parse(parsed)
    cores: list[ConsumerCore] = []
    core = ConsumerCore(config.native, make_dispatcher(config, CallbackThread("c"), lambda: cores[0]), "kbatch")
    cores.append(core)
    core.start()
    assert asked.wait(30.0)
    core.close(10.0)
    cores.clear()


def test_errors_statistics_and_logs_are_passed_on() -> None:
    errors, stats, logs = threading.Event(), threading.Event(), threading.Event()

    class Logger:
        def log(self, *_: object) -> None:
            logs.set()

    config = ConsumerConfig.parse(
        {
            "bootstrap.servers": "127.0.0.1:1",
            "group.id": "g",
            "statistics.interval.ms": 20,
            "debug": "cgrp",
            "error_cb": lambda _: errors.set(),
            "stats_cb": lambda _: stats.set(),
            "logger": Logger(),
        }
    )
    core = ConsumerCore(config.native, make_dispatcher(config, CallbackThread("c"), lambda: None), "kbatch")
    core.subscribe(["orders"])
    for event in (errors, stats, logs):
        until(lambda event=event: (core.poll(0, 0.05), event.is_set())[1], "a callback")  # type: ignore[misc]
    core.close(10.0)


# -- what librdkafka must be, forks, exits


def test_an_older_librdkafka_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"librdkafka 2\.13\.1 is too old for a listener"):
        check_version(0x020D01FF, "2.13.1")
    check_version(0x020D02FF, "2.13.2")


def test_a_wire_that_is_none(orders: MockCluster) -> None:
    for wire in (7, "xml", object()):
        with pytest.raises(ConfigError, match="wire must be"):
            make_core(orders, wire=wire)


@needs_fork[0]
@needs_fork[1]
def test_a_child_refuses_and_the_parent_goes_on(orders: MockCluster) -> None:
    send(orders, 10)
    result = run(
        orders,
        """
        from tests.mock.test_consumer_core import make_core, take
        core = make_core(CONFIG["bootstrap.servers"])
        core.subscribe(["orders"])
        assert len(take(core, 10)) == 10
        stop = threading.Event()
        def poll():
            while not stop.is_set():
                core.poll(10, 0.05)
        thread = threading.Thread(target=poll)
        thread.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                for call in (lambda: core.poll(1, 1.0), core.rebalance, core.answer, lambda: core.commit([("a", 0, 1)]),
                             core.assignment_lost):
                    try:
                        call()
                    except kbatch.ForkError:
                        continue
                    os._exit(2)
                core.close(1.0)
                del core
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        thread.join()
        assert core.commit([("orders", 0, 10)], 10.0) == []
        core.close(10.0)
        print("fine")
        """,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")
    assert ForkError is kbatch.ForkError


@pytest.mark.parametrize("thread", [False, True])
def test_the_interpreter_ends_while_a_consumer_is_open(orders: MockCluster, thread: bool) -> None:
    send(orders, 10)
    result = run(
        orders,
        f"""
        from kbatch._exit import CORES
        from tests.mock.test_consumer_core import make_core, take
        core = make_core(CONFIG["bootstrap.servers"])
        CORES.add(core)
        core.subscribe(["orders"])
        kept = take(core, 10)
        if {thread}:
            def poll():
                while True:
                    core.poll(10, 60.0)
            threading.Thread(target=poll, daemon=True).start()
        print("end")
        """,
    )
    assert (result.returncode, result.stdout) == (0, "end\n")
    assert thread or result.stderr == ""
