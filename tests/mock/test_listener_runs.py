"""A listener on threads: its run, its ends, what one slow handler does to the others, rebalances."""

import logging
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from typing import Any

import msgspec
import pytest

import kbatch
from kbatch.testing import ApiKey, MockCluster
from tests.listening import Order, committed, config_of, ended_after, running, send, signal_after
from tests.waiting import later, until

Received = kbatch.ReceivedEnvelope[Any]


def listener_of(cluster: MockCluster, handler: Any, *topics: str, group: str = "billing", **options: Any) -> Any:
    settings = options.pop("settings", {})
    options.setdefault("types", {"Order": Order})
    return kbatch.Listener(config_of(cluster, group, **settings), topics or ["orders"], handler, **options)


def run_until(listener: kbatch.Listener) -> None:
    with ended_after(60, listener.stop):
        listener.run()


def test_stop_before_run_ends_the_next_run_and_no_other() -> None:
    seen: list[int] = []
    with MockCluster() as cluster:
        send(cluster, 10)

        def handle(envelope: Received) -> None:
            seen.append(envelope.message.number)
            if len(seen) == 10:
                listener.stop()

        listener = listener_of(cluster, handle)
        listener.stop()
        listener.stop()
        run_until(listener)
        assert seen == []
        run_until(listener)
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("strategy", ["cooperative-sticky", "range"])
def test_a_topic_that_comes_later_is_read_soon(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    # librdkafka looks for it after five minutes.
    monkeypatch.setattr("kbatch._receiving._missing._LOOK_EVERY_S", 0.1)
    seen: list[str | None] = []
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 1)
        settings = {"partition_assignment_strategy": strategy}
        listener = listener_of(cluster, lambda each: seen.append(each.topic), "orders", "later", settings=settings)
        with running(listener) as raised:
            until(lambda: seen, "the topic that is there")
            cluster.create_topic("later", partitions=1)
            send(cluster, 1, topic="later")
            until(lambda: len(seen) == 2, "the one that has come")
            until(lambda: not listener._reading._missing._has_thread, "that nobody looks any more")
            send(cluster, 1)
            until(lambda: len(seen) == 3, "the first one is read further")
    assert (seen, raised) == (["orders", "later", "orders"], [])


def test_a_listener_runs_again_and_reads_what_was_not_handled() -> None:
    seen: list[int] = []
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 50)

        def handle(envelope: Received) -> None:
            seen.append(envelope.message.number)
            if len(seen) in (20, 50):
                listener.stop()

        with listener_of(cluster, handle) as listener:
            run_until(listener)
            assert seen == list(range(20))
            assert listener.stats()["handled"] == 20
            run_until(listener)
    assert seen == list(range(50))


def test_it_runs_once_at_a_time() -> None:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        listener = listener_of(cluster, lambda envelope: None)
        with running(listener) as raised:
            until(lambda: "running" in repr(listener) and "not" not in repr(listener), "it runs")
            with pytest.raises(RuntimeError, match="runs already"):
                listener.run()
        assert raised == []
        assert repr(listener) == "<kbatch.Listener of orders for billing, not running>"


def test_a_signal_handler_stops_it() -> None:
    begun = threading.Event()
    with MockCluster() as cluster:
        send(cluster, 1)
        listener = listener_of(cluster, lambda envelope: begun.set())
        before = signal.signal(signal.SIGTERM, lambda *_: listener.stop())
        try:
            signal_after(begun, signal.SIGTERM)
            run_until(listener)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert listener.stats()["handled"] == 1


@pytest.mark.long
def test_a_signal_handler_stops_it_wherever_it_is() -> None:
    """It takes no lock that the thread which it has interrupted holds."""
    with MockCluster() as cluster:
        send(cluster, 2000)
        for round_ in range(5):
            listener = listener_of(cluster, lambda envelope: None, concurrency=4, group=f"g{round_}")
            count = 0

            def on_alarm(*_: object, listener: kbatch.Listener = listener, most: int = 20 * (round_ + 1)) -> None:
                nonlocal count
                count += 1
                listener.stats()
                listener.lag()
                if count > most:
                    listener.stop()

            before = signal.signal(signal.SIGALRM, on_alarm)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            try:
                run_until(listener)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)


def test_ctrl_c_in_run_lets_handlers_end_and_commits_what_they_have_done() -> None:
    begun, done = threading.Event(), []

    def handle(envelope: Received) -> None:
        begun.set()
        time.sleep(0.3)
        done.append(envelope.offset)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 3)
        listener = listener_of(cluster, handle)
        signal_after(begun, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run_until(listener)
        assert done
        assert committed(cluster, partitions=1) == {0: done[-1] + 1}


@pytest.mark.parametrize("error", [ValueError("no such customer"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_handler_raises_ends_it_and_its_record_is_not_committed(error: BaseException) -> None:
    def handle(envelope: Received) -> None:
        if envelope.message.number == 5:
            raise error

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 10)
        listener = listener_of(cluster, handle)
        with pytest.raises(type(error)) as raised:
            run_until(listener)
        assert raised.value is error
        assert committed(cluster, partitions=1) == {0: 5}
        assert listener.stats()["failed"] == 1


def test_a_handler_that_hangs_does_not_keep_run_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    def handle(envelope: Received) -> None:
        if envelope.message.number == 3:
            listener.stop()
            release.wait(60)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 10)
        listener = listener_of(cluster, handle, close_timeout_s=0.3)
        run_until(listener)
        release.set()
        assert listener.stats()["abandoned"] == 1
        assert committed(cluster, partitions=1) == {0: 3}
        assert "orders [0] at offset 3" in caplog.text
        seen: list[int] = []

        def handle_again(envelope: Received) -> None:
            seen.append(envelope.message.number)
            if len(seen) == 7:
                second.stop()

        second = listener_of(cluster, handle_again)
        run_until(second)
    assert seen == list(range(3, 10))


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    release, begun = threading.Event(), threading.Event()

    def handle(envelope: Received) -> None:
        begun.set()
        release.wait(60)

    def interrupt() -> None:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    with MockCluster() as cluster:
        send(cluster, 1)
        listener = listener_of(cluster, handle, close_timeout_s=300.0)
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_until(listener)
        assert not release.is_set()
        assert listener.stats()["abandoned"] == 1
        release.set()


def test_close_waits_for_the_end_of_run_and_is_refused_to_a_handler() -> None:
    refused: list[BaseException] = []

    def handle(envelope: Received) -> None:
        try:
            listener.close()
        except RuntimeError as error:
            refused.append(error)

    with MockCluster() as cluster:
        send(cluster, 1)
        listener = listener_of(cluster, handle)
        with running(listener) as raised:
            until(lambda: refused, "the handler has called close")
            listener.close()
            assert "not running" in repr(listener)
        assert raised == []
    assert "call stop" in str(refused[0])


def test_threads_that_cannot_be_had_end_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "kbatch-handler-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    with MockCluster() as cluster:
        listener = listener_of(cluster, lambda envelope: None, concurrency=4)
        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            run_until(listener)
        monkeypatch.undo()
        assert not [each for each in threading.enumerate() if each.name.startswith("kbatch-handler")]


def test_a_fault_in_a_workers_machinery_ends_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with MockCluster() as cluster:
        send(cluster, 5)
        listener = listener_of(cluster, lambda envelope: None, close_timeout_s=0.2)
        monkeypatch.setattr(
            type(listener), "_fail", lambda *_: (_ for _ in ()).throw(MemoryError("none left")), raising=True
        )
        monkeypatch.setattr(
            type(listener), "_handle", lambda *_: (_ for _ in ()).throw(ValueError("unhandled")), raising=True
        )
        with pytest.raises(MemoryError, match="none left"):
            run_until(listener)


def test_an_unknown_topic_is_waited_for_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def handle(envelope: Received) -> None:
        seen.append(envelope.message.number)
        listener.stop()

    with MockCluster() as cluster:
        cluster.set_topic_error("orders", "UNKNOWN_TOPIC_OR_PART")
        listener = listener_of(cluster, handle, settings={"topic_metadata_refresh_interval_ms": 200})
        with running(listener) as raised:
            until(lambda: "orders" in caplog.text, "a word about the topic")
            time.sleep(1.0)
        assert raised == []
    assert len([record for record in caplog.records if "a consumer of" in record.getMessage()]) == 1


def test_a_group_that_is_refused_ends_run() -> None:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        cluster.push_request_errors(ApiKey.JOIN_GROUP, ["GROUP_AUTHORIZATION_FAILED"] * 10)
        listener = listener_of(cluster, lambda envelope: None)
        with pytest.raises(kbatch.ListenerError, match="authorization") as raised:
            run_until(listener)
    assert raised.value.code == 30


def test_a_commit_that_fails_is_made_again() -> None:
    seen: list[int] = []
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 5)
        cluster.push_request_errors(ApiKey.OFFSET_COMMIT, ["INVALID_COMMIT_OFFSET_SIZE"] * 2)
        listener = listener_of(cluster, lambda envelope: seen.append(envelope.offset), commit_interval_s=0.05)
        with running(listener):
            until(lambda: len(seen) == 5, "all are handled")
            until(lambda: committed(cluster, partitions=1) == {0: 5}, "the commit")


def test_a_partition_that_hangs_does_not_keep_the_others_from_flowing() -> None:
    release = threading.Event()
    seen: list[Any] = []

    def handle(envelope: Received) -> None:
        if envelope.partition == 0:
            release.wait(60)
        seen.append(envelope.partition)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=2)
        send(cluster, 3000, partition=0)
        send(cluster, 3000, partition=1)
        listener = listener_of(cluster, handle, concurrency=9, max_in_flight=100)
        with running(listener):
            try:
                until(lambda: seen.count(1) == 3000, "all of the other partition")
                assert seen.count(0) == 0
                # It has more room when the other one has nothing left, and takes it.
                until(lambda: listener.stats()["full_partitions"] == 1, "the partition is not read further")
                assert listener.stats()["in_flight"] <= 100
            finally:
                release.set()
            until(lambda: seen.count(0) == 3000, "the partition is read again")
    assert Counter(seen) == {0: 3000, 1: 3000}


def test_a_key_that_hangs_does_not_keep_other_keys_from_flowing() -> None:
    release = threading.Event()
    seen: list[Any] = []

    def handle(envelope: Received) -> None:
        if envelope.key == b"3":
            release.wait(60)
        seen.append(envelope.key)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 700)
        listener = listener_of(cluster, handle, concurrency=2, max_in_flight=700)
        with running(listener):
            try:
                until(lambda: len(seen) == 600, "all of the others")
                assert b"3" not in seen
            finally:
                release.set()
            until(lambda: len(seen) == 700, "the rest")


def test_what_is_done_behind_one_that_hangs_does_not_grow_without_end() -> None:
    release = threading.Event()
    seen: list[Any] = []

    def handle(envelope: Received) -> None:
        if envelope.message.number == 0:
            release.wait(60)
        seen.append(envelope.key)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 1000, keys=None)
        listener = listener_of(cluster, handle, concurrency=2, max_in_flight=10)
        with running(listener):
            try:
                until(lambda: listener.stats()["full_partitions"] == 1, "the partition is not read further")
                until(lambda: listener.stats()["in_flight"] == 1, "what was read is handled")
                assert len(seen) <= 200
            finally:
                release.set()
            until(lambda: len(seen) == 1000, "the rest")


def test_what_is_done_one_by_one_behind_one_that_hangs_does_not_grow_without_end() -> None:
    # There is always room for a record, so room is not what ends it.
    release = threading.Event()
    seen: list[Any] = []

    def handle(envelope: Received) -> None:
        if envelope.message.number == 0:
            release.wait(60)
        seen.append(envelope.message.number)

    def has_stopped() -> bool:
        return listener.stats()["full_partitions"] == 1

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        listener = listener_of(cluster, handle, concurrency=2, max_in_flight=10)
        with running(listener), kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            try:
                for number in range(300):
                    envelope = kbatch.Envelope(Order(number), key=str(number))
                    assert producer.send_batch("orders", [envelope]).ok
                    while len(seen) < number and not has_stopped():
                        time.sleep(0.001)
                    if has_stopped():
                        break
                assert 50 <= len(seen) <= 200
            finally:
                release.set()
            until(lambda: len(seen) == number + 1, "the rest")


def test_bytes_in_flight_are_bounded() -> None:
    most = 0
    count = 0

    def handle(envelope: Received) -> None:
        nonlocal most, count
        most = max(most, listener.stats()["in_flight_bytes"])
        count += 1
        if count == 200:
            listener.stop()

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            bodies = [kbatch.Envelope(data=bytes(20_000)) for _ in range(200)]
            producer.send_batch("orders", bodies).raise_for_errors()
        listener = listener_of(cluster, handle, max_in_flight_bytes=100_000)
        run_until(listener)
    assert count == 200
    assert most < 150_000


def test_a_thousand_partitions() -> None:
    seen: list[Any] = []

    def handle(envelope: Received) -> None:
        seen.append(envelope.partition)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1000)
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            orders = [kbatch.Envelope(Order(n), partition=n % 1000) for n in range(5000)]
            producer.send_batch("orders", orders).raise_for_errors()
        listener = listener_of(cluster, handle, concurrency=4, max_in_flight=200)
        with running(listener) as raised:
            until(lambda: len(seen) >= 5000 or raised, "all records", patience_s=120)
        assert raised == []
        assert len(committed(cluster, partitions=1000)) == 1000
    assert set(Counter(seen).values()) == {5}


def test_one_at_a_time_is_the_order_of_each_partition() -> None:
    seen: dict[int, list[int]] = defaultdict(list)
    count = 0

    def handle(envelope: Received) -> None:
        nonlocal count
        seen[envelope.partition].append(envelope.offset)
        count += 1
        if count == 500:
            listener.stop()

    with MockCluster() as cluster:
        send(cluster, 500, keys=None)
        listener = listener_of(cluster, handle)
        run_until(listener)
    assert count == 500
    for offsets in seen.values():
        assert offsets == list(range(len(offsets)))


def test_batches_are_of_one_partition_in_order_and_committed_as_a_whole() -> None:
    batches: list[list[tuple[int, int]]] = []

    def handle(envelopes: list[Received]) -> None:
        batches.append([(each.partition, each.offset) for each in envelopes])
        envelopes.clear()  # the list is the handler's own
        if sum(map(len, batches)) == 500:
            listener.stop()

    with MockCluster() as cluster:
        send(cluster, 500)
        listener = listener_of(cluster, handle, batch_size=50, concurrency=3)
        run_until(listener)
        offsets = committed(cluster)
    assert sum(offsets.values()) == 500
    for partition in range(4):
        of_it = [offset for batch in batches for number, offset in batch if number == partition]
        assert of_it == list(range(len(of_it)))
    for batch in batches:
        assert len({partition for partition, _ in batch}) == 1
        assert len(batch) <= 50


def test_a_batch_that_fails_commits_nothing_of_it() -> None:
    def handle(envelopes: list[Received]) -> None:
        if envelopes[0].offset >= 20:
            raise ValueError("no database")

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 100)
        listener = listener_of(cluster, handle, batch_size=20, batch_timeout_ms=60_000)
        with pytest.raises(ValueError, match="no database"):
            run_until(listener)
        assert committed(cluster, partitions=1) == {0: 20}
        assert listener.stats()["failed"] == 20


def test_a_batch_waits_for_others_as_long_as_it_was_told() -> None:
    batches: list[int] = []

    def handle(envelopes: list[Received]) -> None:
        batches.append(len(envelopes))
        listener.stop()

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        listener = listener_of(cluster, handle, batch_size=50, batch_timeout_ms=1_500)
        with running(listener):
            until(lambda: listener.stats()["partitions"], "the partition")
            send(cluster, 5)
            send(cluster, 5)
            until(lambda: batches, "a batch")
    assert batches == [10]


def test_what_cannot_be_decoded_fails_as_what_it_is() -> None:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            bad = kbatch.Envelope(data=b'{"number": "x"}', message_type="Order", content_type="application/json")
            producer.send_batch("orders", [bad]).raise_for_errors()
        listener = listener_of(cluster, lambda envelope: None)
        with pytest.raises(kbatch.DeserializationError, match="cannot be decoded as 'Order'") as raised:
            run_until(listener)
    assert (raised.value.topic, raised.value.partition, raised.value.offset) == ("orders", 0, 0)


@pytest.mark.parametrize(
    ("content_type", "data", "message"),
    [
        (None, b'{"number": 1}', Order(1)),
        ("application/json; charset=utf-8", b'{"number": 1}', Order(1)),
        ("application/cloudevents+json", b'{"number": 1}', Order(1)),
        ("application/msgpack", msgspec.msgpack.encode({"number": 1}), Order(1)),
        ("application/x-msgpack", msgspec.msgpack.encode({"number": 1}), Order(1)),
    ],
)
def test_data_are_decoded_by_their_content_type(content_type: str | None, data: bytes, message: Order) -> None:
    seen: list[Any] = []

    def handle(envelope: Received) -> None:
        seen.append(envelope.message)
        if len(seen) == 2:
            listener.stop()

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            known = kbatch.Envelope(data=data, message_type="Order", content_type=content_type)
            unknown = kbatch.Envelope(data=data, message_type="Another", content_type=content_type)
            producer.send_batch("orders", [known, unknown]).raise_for_errors()
        listener = listener_of(cluster, handle)
        run_until(listener)
    assert seen == [message, msgspec.UNSET]


def test_another_content_type_is_not_taken_for_json() -> None:
    with MockCluster() as cluster:
        with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}) as producer:
            other = kbatch.Envelope(data=b"1", message_type="Order", content_type="application/x-protobuf")
            producer.send_batch("orders", [other]).raise_for_errors()
        listener = listener_of(cluster, lambda envelope: None)
        with pytest.raises(kbatch.DeserializationError, match="neither JSON nor msgpack"):
            run_until(listener)


async def _coroutine(envelope: object) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"handler": _coroutine}, r"kbatch\.aio\.Listener takes it"),
        ({"handler": lambda: None}, r"must take \(envelope\)"),
        ({"handler": 3}, "must be callable"),
        ({"topics": "orders"}, "topics must be a list"),
        ({"topics": []}, "topics must be a list"),
        ({"concurrency": 0}, "concurrency"),
        ({"batch_size": 3000}, "larger than max_in_flight"),
        ({"batch_timeout_ms": 5}, "give a batch_size"),
        ({"batch_size": 5, "batch_timeout_ms": -1}, "batch_timeout_ms"),
        ({"types": {"Order": 3}}, "msgspec cannot decode"),
        ({"types": {3: Order}}, "a message type must be str"),
        ({"types": [Order]}, "types must be a mapping"),
        ({"wire": "avro"}, "wire must be"),
        ({"close_timeout_s": -1}, "close_timeout_s"),
        ({"config": {"group.id": ""}}, r"group\.id"),
        ({"config": {"enable.auto.commit": True}}, "a listener commits by itself"),
        ({"config": {"enable.auto.offset.store": True}}, "a listener commits by itself"),
        ({"config": {"on_commit": print}}, "on_commit is refused"),
        ({"config": {"key.deserializer": bytes}}, r"key\.deserializer is refused"),
        ({"config": {"value.deserializer": bytes}}, r"value\.deserializer is refused"),
    ],
)
def test_a_wrong_option_is_an_error(options: dict[str, Any], text: str) -> None:
    config = {"bootstrap.servers": "localhost:9", "group.id": "g", **options.pop("config", {})}
    handler = options.pop("handler", lambda envelope: None)
    with pytest.raises(kbatch.ConfigError, match=text):
        kbatch.Listener(config, options.pop("topics", ["orders"]), handler, **options)


def test_its_repr_shows_no_secret() -> None:
    config = {"bootstrap.servers": "localhost:9", "group.id": "g", "sasl.password": "hush", "sasl.mechanism": "PLAIN"}
    listener = kbatch.Listener({**config, "security.protocol": "sasl_plaintext"}, ["orders"], lambda envelope: None)
    assert repr(listener) == "<kbatch.Listener of orders for g, not running>"


def test_a_forked_child_runs_it_anew() -> None:
    with MockCluster() as cluster:
        send(cluster, 1)
        seen: list[int] = []
        listener = listener_of(cluster, lambda envelope: seen.append(1))
        with running(listener):
            until(lambda: seen, "a record")
            pid = os.fork()
            if pid == 0:
                try:
                    listener.stop()  # that of the child, which does not run
                    os._exit(0 if listener.stats()["handled"] == 0 and "not running" in repr(listener) else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(pid, 0)[1] == 0
            assert "not running" not in repr(listener)


def test_the_lag_is_what_is_not_handled() -> None:
    release = threading.Event()

    def handle(envelope: Received) -> None:
        if envelope.offset == 4:
            release.wait(60)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 10)
        listener = listener_of(cluster, handle)
        assert listener.lag() == {}
        with running(listener):
            try:
                until(lambda: listener.lag() == {("orders", 0): 6}, "the lag")
            finally:
                release.set()
            until(lambda: listener.lag() == {("orders", 0): 0}, "no lag")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["cooperative-sticky", "range"])
def test_members_that_come_and_go_handle_each_record_in_order(strategy: str) -> None:
    """Ten of them. At least once; nothing is committed that was not handled; order per key and owner."""
    lock = threading.Lock()
    seen: list[tuple[int, Any, int, int, int]] = []  # member, key, number, partition, offset

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=8)

        def member(number: int) -> kbatch.Listener:
            def handle(envelope: Received) -> None:
                time.sleep(0.0005)
                with lock:
                    place = (envelope.partition, envelope.offset)
                    seen.append((number, envelope.key, envelope.message.number, *place))

            return kbatch.Listener(
                config_of(cluster, partition_assignment_strategy=strategy),
                ["orders"],
                handle,
                types={"Order": Order},
                concurrency=3,
                max_in_flight=200,
                commit_interval_s=0.1,
                close_timeout_s=5.0,
            )

        errors: list[list[BaseException]] = []
        count = 0
        with running(member(0)) as raised:
            errors.append(raised)
            for number in range(1, 10):
                with running(member(number)) as raised:
                    errors.append(raised)
                    send(cluster, 300, first=count, keys=20)
                    count += 300
                    time.sleep(0.4)
            until(lambda: {each[2] for each in seen} == set(range(count)), "every record", patience_s=60)
        assert errors == [[] for _ in range(10)]
        handled = {(partition, offset) for _, _, _, partition, offset in seen}
        for partition, offset in committed(cluster, partitions=8).items():
            assert {(partition, each) for each in range(offset)} <= handled
    for number in range(10):
        of_key: dict[bytes, list[int]] = defaultdict(list)
        for who, key, order, _, _ in seen:
            if who == number and order not in of_key[key]:  # again, after a rebalance
                of_key[key].append(order)
        for orders in of_key.values():
            assert orders == sorted(orders)


def test_a_handler_that_runs_when_its_partition_is_revoked_ends_first() -> None:
    begun, release = threading.Event(), threading.Event()
    seen: list[tuple[str, int]] = []

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 1)
        send(cluster, 1)

        def handle_first(envelope: Received) -> None:
            begun.set()
            release.wait(60)
            seen.append(("first", envelope.offset))

        def handle_second(envelope: Received) -> None:
            seen.append(("second", envelope.offset))

        # Eager: all partitions are given back in each rebalance.
        settings = {"partition_assignment_strategy": "range", "session_timeout_ms": 6000}
        first = listener_of(cluster, handle_first, settings=settings)
        second = listener_of(cluster, handle_second, settings=settings)
        with running(first):
            assert begun.wait(60)
            with running(second):
                time.sleep(2.0)  # the rebalance waits, and the group keeps the member meanwhile
                assert seen == []
                release.set()
                until(lambda: {offset for _, offset in seen} == {0, 1}, "both")
    # The mock cluster refuses a commit while members join, so the first record may come again.
    assert seen[0] == ("first", 0)


def test_stop_while_a_rebalance_waits() -> None:
    begun, release = threading.Event(), threading.Event()

    def handle(envelope: Received) -> None:
        begun.set()
        release.wait(60)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 1)
        settings = {"partition_assignment_strategy": "range"}
        first = listener_of(cluster, handle, settings=settings, close_timeout_s=60.0)
        second = listener_of(cluster, lambda envelope: None, settings=settings)
        with running(first):
            assert begun.wait(60)
            with running(second):
                time.sleep(1.0)
                first.stop()
                with later(0.3, release.set):
                    first.close()
        assert first.stats()["handled"] == 1


def test_a_handler_that_takes_long_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    with MockCluster() as cluster:
        send(cluster, 1)
        listener = listener_of(
            cluster, lambda envelope: release.wait(60), settings={"max_poll_interval_ms": 2000}, close_timeout_s=1.0
        )
        with caplog.at_level(logging.WARNING), running(listener) as raised:
            until(lambda: "a handler has run for" in caplog.text, "a warning")
            time.sleep(2.5)
            release.set()
            until(lambda: listener.stats()["handled"] == 1, "its end")
        assert raised == []
        assert "poll interval" not in caplog.text  # the member was never lost


def test_static_members_keep_their_partitions() -> None:
    seen: list[int] = []
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 5)
        listener = listener_of(
            cluster, lambda envelope: seen.append(envelope.offset), settings={"group_instance_id": "one"}
        )
        for first in (5, 10):
            with running(listener) as raised:
                until(lambda first=first: len(seen) == first, "all")  # type: ignore[misc]
            assert raised == []
            send(cluster, 5)
    assert seen == list(range(10))


def test_an_inbox_is_told_the_end_of_a_log_that_the_listener_has_not_read_to() -> None:
    over = threading.Event()

    def handle(envelope: Received) -> None:
        if envelope.offset >= 3:
            over.wait(60)

    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=1)
        send(cluster, 10)
        # It asks for no more while one that it has fetched is not handled.
        settings = {"queued_min_messages": 1}
        with running(of := listener_of(cluster, handle, max_in_flight=1, commit_interval_s=0.05, settings=settings)):
            try:
                until(lambda: committed(cluster, partitions=1).get(0) == 3, "the commit of what it has handled")
                send(cluster, 50, 10)
                assert of._reading.offsets() == {("orders", 0): (3, 60)}
            finally:
                over.set()
