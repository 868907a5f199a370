"""A listener's failures on the mock cluster: what fails is tried again, sent on, and read back by confluent-kafka."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

import kbatch
from kbatch import aio
from kbatch._receiving._copies import Copies
from kbatch._recovery._handle import ProducerHandle
from kbatch.testing import ApiKey, MockCluster
from tests.waiting import until

from .clients import produce, read_back

QUICK = {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300, "topic.metadata.refresh.interval.ms": 500}
ONCE = kbatch.RetryPolicy(max_attempts=1)
BRIEFLY = kbatch.RetryPolicy(max_attempts=3, initial_backoff_s=0.05, max_backoff_s=0.05)
Handler = Callable[[kbatch.Listener, kbatch.ReceivedEnvelope[Any]], object]


@pytest.fixture
def cluster() -> Any:
    with MockCluster() as made:
        for topic in ("orders", "dead", "billing.retry.0.3", "billing.retry.0.6"):
            made.create_topic(topic, 1)
        yield made


def send(cluster: MockCluster, *envelopes: kbatch.Envelope[Any], wire: str = "kbatch") -> None:
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers}, wire=wire) as producer:
        producer.send_batch("orders", envelopes).raise_for_errors()


def numbered(*numbers: int, key: str = "k") -> list[kbatch.Envelope[Any]]:
    return [kbatch.Envelope({"n": n}, key=key, message_type="order", headers=[("h", b"\xff")]) for n in numbers]


def made(cluster: MockCluster, handle: Handler, **options: Any) -> kbatch.Listener:
    def handler(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        handle(listener, envelope)

    config = {"bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing", **QUICK}
    options = {"types": {"order": dict[str, int]}, "commit_interval_s": 0.1, "close_timeout_s": 10.0, **options}
    listener = kbatch.Listener(config, ["orders"], handler, **options)
    return listener


def run(listener: kbatch.Listener, seconds: float = 40.0) -> None:
    end = threading.Timer(seconds, listener.stop)
    end.start()
    try:
        listener.run()
    finally:
        end.cancel()


def counts(listener: kbatch.Listener) -> dict[str, int]:
    names = ("handled", "attempts_failed", "to_retry", "dead", "in_flight")
    return {name: listener.stats()[name] for name in names}


class Running:
    """A listener in a thread of its own."""

    def __init__(self, listener: kbatch.Listener) -> None:
        self.listener = listener
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.listener.run()
        except Exception as error:
            self.error = error

    def __enter__(self) -> "Running":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.stop()
        self.thread.join()


def committed(cluster: MockCluster, topic: str = "orders") -> int:
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing"})
    try:
        return int(consumer.committed([TopicPartition(topic, 0)], timeout=10)[0].offset)
    finally:
        consumer.close()


@pytest.mark.parametrize("poison", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_poison_goes_to_the_dead_letters_and_stops_no_partition(
    cluster: MockCluster, poison: int, concurrency: int
) -> None:
    seen: list[int] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.message["n"] == poison:
            raise ValueError(f"poison {poison}")
        seen.append(envelope.message["n"])

    send(cluster, *numbered(*range(5)))
    with Running(made(cluster, handle, retry=BRIEFLY, dead_letter_topic="dead", concurrency=concurrency)) as running:
        until(
            lambda: running.listener.stats()["handled"] == 5 and running.listener.stats()["dead"] == 1,
            "the listener has done it",
        )
    assert running.error is None
    assert seen == [n for n in range(5) if n != poison]
    assert committed(cluster) == 5
    (letter,) = read_back(cluster.bootstrap_servers, "dead")
    (original,) = [each for each in read_back(cluster.bootstrap_servers, "orders") if each.offset == poison]
    assert (letter.key, letter.value) == (original.key, original.value)
    own = len(original.headers)
    assert letter.headers[:own] == original.headers
    added = dict(letter.headers[own:])
    assert abs(int(added.pop("failed-at") or b"") / 1000 - time.time()) < 600
    assert added == {
        "attempts": b"3",
        "exception-type": b"ValueError",
        "exception-message": f"poison {poison}".encode(),
        "failed-group": b"billing",
        "original-destination": b"kafka://topic/orders",
        "original-partition": b"0",
        "original-offset": str(poison).encode(),
        "original-timestamp": str(original.timestamp).encode(),
    }


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_hundred_dead_letters_are_sent_by_one_producer(cluster: MockCluster, concurrency: int) -> None:
    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ValueError("poison")

    send(cluster, *(kbatch.Envelope({"n": n}, key=f"k{n % 7}", message_type="order") for n in range(100)))
    cluster.start_request_tracking()
    with Running(made(cluster, handle, retry=ONCE, dead_letter_topic="dead", concurrency=concurrency)) as running:
        until(lambda: running.listener.stats()["dead"] == 100, "the listener has given up all of them")
    assert running.error is None
    # Each producer, which is idempotent, asks for a number of its own.
    assert sum(request.api_key == ApiKey.INIT_PRODUCER_ID for request in cluster.requests()) == 1
    assert committed(cluster) == 100
    letters = read_back(cluster.bootstrap_servers, "dead")
    originals = [int(dict(each.headers)["original-offset"] or b"") for each in letters]
    assert sorted(originals) == list(range(100))
    values = [each.value for each in read_back(cluster.bootstrap_servers, "orders")]
    assert [each.value for each in letters] == [values[offset] for offset in originals]


def test_a_header_without_a_name_goes_with_its_record_to_the_dead_letters(cluster: MockCluster) -> None:
    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.key == b"poison":
            raise ValueError("poison")

    given = [("", b"x"), ("h", b"y"), ("", None)]
    poison = {"value": b"1", "key": b"poison", "headers": given}
    assert produce(cluster.bootstrap_servers, "orders", [poison, {"value": b"2"}]) == [None, None]
    with Running(made(cluster, handle, retry=ONCE, dead_letter_topic="dead")) as running:
        until(lambda: running.listener.stats()["handled"] == 2 or running.error, "both are done")
    assert running.error is None
    assert committed(cluster) == 2
    (letter,) = read_back(cluster.bootstrap_servers, "dead")
    assert letter.headers[:3] == given


def test_headers_that_cannot_be_read_are_an_error_and_no_tombstone(cluster: MockCluster) -> None:
    seen: list[Any] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        seen.append(envelope.key)

    many = [("message-type", b"order"), *(("h", b"") for _ in range(100_000))]  # readers take 100,000
    assert produce(
        cluster.bootstrap_servers,
        "orders",
        [{"value": None, "key": b"many", "headers": many}, {"value": b"2", "key": b"k"}],
    ) == [None, None]
    with Running(made(cluster, handle, retry=ONCE, dead_letter_topic="dead")) as running:
        until(lambda: running.listener.stats()["handled"] == 2 or running.error, "both are done")
    assert running.error is None
    assert seen == [b"k"]
    (letter,) = read_back(cluster.bootstrap_servers, "dead")
    assert (letter.key, letter.value) == (b"many", None)
    assert b"headers" in (dict(letter.headers)["exception-message"] or b"")


def test_a_key_waits_for_its_retries_in_place_and_others_do_not(cluster: MockCluster) -> None:
    seen: list[tuple[bytes, int]] = []
    tries = 0
    others_done = threading.Event()

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        nonlocal tries
        if envelope.key == b"slow" and envelope.message["n"] == 0:
            tries += 1
            if not others_done.is_set():
                raise ValueError("not yet")
        seen.append((envelope.key, envelope.message["n"]))
        if seen.count((b"fast", 2)):
            others_done.set()

    send(cluster, *numbered(0, 1, 2, key="slow"), *numbered(0, 1, 2, key="fast"))
    policy = kbatch.RetryPolicy(max_attempts=None, initial_backoff_s=0.2, max_backoff_s=0.2)
    # Two lanes and one thread would be told apart by nobody, so two: neither may sleep for the slow one.
    with Running(made(cluster, handle, retry=policy, concurrency=2)) as running:
        until(lambda: running.listener.stats()["handled"] == 6, "the listener has done it")
    assert running.error is None
    assert [n for key, n in seen if key == b"slow"] == [0, 1, 2]
    assert [n for key, n in seen if key == b"fast"] == [0, 1, 2]
    assert seen[:3] == [(b"fast", n) for n in range(3)]
    assert tries >= 2
    assert committed(cluster) == 6


@pytest.mark.parametrize("reset", ["latest", "error"])
def test_retry_topics_begin_at_their_beginning_wherever_the_users_topics_do(cluster: MockCluster, reset: str) -> None:
    cluster.create_topic("billing.retry.2", 1)
    config = {
        "bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing", "auto.offset.reset": reset, **QUICK
    }  # fmt: skip
    consumer = Consumer(config)
    consumer.commit(offsets=[TopicPartition("orders", 0, 0)], asynchronous=False)
    consumer.close()
    send(cluster, *numbered(1))
    seen: list[str | None] = []

    def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        seen.append(envelope.topic)
        if envelope.topic == "orders":
            raise ValueError("not yet")

    for count in (1, 2):  # the first ends before the copy is due, when the group has committed nothing of its topic
        with Running(kbatch.Listener(config, ["orders"], handle, retry=ONCE, retry_topics=[2])) as running:
            stats = running.listener.stats
            until(lambda given=stats, n=count: len(seen) >= n and not given()["in_flight"], "it is handled")
        assert running.error is None
    assert seen == ["orders", "billing.retry.2"]


def test_a_record_goes_through_all_retry_topics_to_the_dead_letters(cluster: MockCluster) -> None:
    tries: list[tuple[str, int]] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        tries.append((envelope.topic, envelope.attempts))
        if envelope.message["n"] == 0:
            raise LookupError("no stock")

    send(cluster, *numbered(0, 1))
    with Running(
        made(cluster, handle, retry=ONCE, retry_topics=[0.3, 0.6], dead_letter_topic="dead", concurrency=2)
    ) as running:
        until(lambda: running.listener.stats()["dead"] == 1, "the listener has done it")
    assert running.error is None
    assert counts(running.listener) == {"handled": 4, "attempts_failed": 3, "to_retry": 2, "dead": 1, "in_flight": 0}
    assert sorted(tries) == [("billing.retry.0.3", 1), ("billing.retry.0.6", 2), ("orders", 0), ("orders", 0)]
    original = read_back(cluster.bootstrap_servers, "orders")[0]
    for topic, attempts, delay in (("billing.retry.0.3", 1, 300), ("billing.retry.0.6", 2, 600), ("dead", 3, None)):
        (copy,) = read_back(cluster.bootstrap_servers, topic)
        assert (copy.key, copy.value) == (original.key, original.value)
        assert copy.headers[: len(original.headers)] == original.headers
        added = dict(copy.headers[len(original.headers) :])
        failed_at, due = int(added.pop("failed-at") or b""), added.pop("retry-due-at", None)
        assert due is None if delay is None else abs(int(due or b"") - failed_at - delay) <= 1
        assert added == {
            "attempts": str(attempts).encode(),
            "exception-type": b"LookupError",
            "exception-message": b"no stock",
            "failed-group": b"billing",
            "original-destination": b"kafka://topic/orders",
            "original-partition": b"0",
            "original-offset": b"0",
            "original-timestamp": str(original.timestamp).encode(),
        }
    for topic in ("orders", "billing.retry.0.3", "billing.retry.0.6"):
        assert committed(cluster, topic) == (2 if topic == "orders" else 1)


def test_a_record_that_waits_for_its_time_holds_up_no_other_topic(cluster: MockCluster) -> None:
    handled: list[int] = []
    cluster.create_topic("billing.retry.1000", 1)

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.message["n"] < 5:
            raise ValueError
        handled.append(envelope.message["n"])

    send(cluster, *numbered(*range(5)))
    with Running(made(cluster, handle, retry=ONCE, retry_topics=[1000], max_in_flight=2)) as running:
        until(lambda: running.listener.stats()["to_retry"] == 5, "the listener has done it")
        send(cluster, *numbered(*range(5, 50)))
        until(lambda: running.listener.stats()["handled"] == 50, "the listener has done it")
    assert running.error is None
    assert handled == list(range(5, 50))
    assert committed(cluster, "billing.retry.1000") < 0  # nothing of it is done
    assert len(read_back(cluster.bootstrap_servers, "billing.retry.1000")) == 5


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents"])
def test_what_cannot_be_decoded_goes_to_the_dead_letters_at_once(cluster: MockCluster, wire: str) -> None:
    handled: list[object] = []
    good, bad = numbered(1, 2)
    bad = bad.replace(data=b'{"n": "secret"}')
    envelopes = [each.replace(source="shop") for each in (bad, good)]
    send(cluster, *envelopes, wire=wire)
    listener = made(cluster, lambda _, each: handled.append(each.message), retry_topics=[0.3], wire=wire,
                    dead_letter_topic="dead")  # fmt: skip
    with Running(listener) as running:
        until(
            lambda: running.listener.stats()["handled"] == 2 and running.listener.stats()["dead"] == 1,
            "the listener has done it",
        )
    assert (running.error, handled) == (None, [{"n": 1}])
    (letter,) = read_back(cluster.bootstrap_servers, "dead")
    original = read_back(cluster.bootstrap_servers, "orders")[0]
    assert letter.value == original.value
    counter = "ce_attempts" if wire == "cloudevents" else "attempts"
    kept = [pair for pair in original.headers if pair[0] != counter]
    assert letter.headers[: len(kept)] == kept
    assert dict(letter.headers)[counter] == b"1"
    assert dict(letter.headers)["exception-type"] == b"kbatch.DeserializationError"


def test_without_a_dead_letter_topic_the_listener_ends_and_does_not_commit_the_record(cluster: MockCluster) -> None:
    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.message["n"] == 2:
            raise ZeroDivisionError("of the handler")

    send(cluster, *numbered(*range(5)))
    with pytest.raises(ZeroDivisionError, match="of the handler"):
        run(made(cluster, handle, retry=BRIEFLY))
    assert committed(cluster) == 2


def test_while_no_broker_takes_a_dead_letter_the_record_waits_and_is_not_lost(cluster: MockCluster) -> None:
    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.message["n"] == 1:
            down.set()
            assert is_down.wait(30)
            raise ValueError("poison")

    down, is_down = threading.Event(), threading.Event()
    send(cluster, *numbered(*range(3)))
    producer = kbatch.Producer(
        {"bootstrap.servers": cluster.bootstrap_servers, "delivery.timeout.ms": 500, "reconnect.backoff.max.ms": 100}
    )
    with producer, Running(made(cluster, handle, retry=ONCE, dead_letter_topic="dead", producer=producer)) as running:
        assert down.wait(30)
        cluster.set_broker_down(1)
        is_down.set()
        until(lambda: producer.stats()["failed"] >= 1, "the listener has done it", 30)
        assert running.listener.stats()["dead"] == 0
        cluster.set_broker_up(1)
        until(
            lambda: running.listener.stats()["dead"] == 1 and running.listener.stats()["handled"] == 3,
            "the listener has done it",
            60,
        )
    assert running.error is None
    letters = read_back(cluster.bootstrap_servers, "dead")
    assert {dict(each.headers)["attempts"] for each in letters} == {b"1"}
    assert committed(cluster) == 3


def test_stopping_waits_for_no_back_off_and_commits_nothing_of_it(cluster: MockCluster) -> None:
    failed = threading.Event()

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.message["n"] == 1:
            failed.set()
            raise ValueError

    send(cluster, *numbered(*range(3)))
    policy = kbatch.RetryPolicy(max_attempts=5, initial_backoff_s=1000, max_backoff_s=1000)
    with Running(made(cluster, handle, retry=policy, dead_letter_topic="dead", close_timeout_s=1000)) as running:
        assert failed.wait(30)
        running.listener.stop()
        running.thread.join(60)
        assert not running.thread.is_alive()
    assert running.error is None
    assert committed(cluster) == 1


class DatabaseGoneError(Exception):
    is_outage = True


@pytest.mark.parametrize("error", [DatabaseGoneError(), kbatch.InboxError("of the handler's own", is_outage=True)])
def test_an_outage_of_the_database_fills_no_topic_and_counts_no_attempt(cluster: MockCluster, error: Exception) -> None:
    tries: list[int] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        tries.append(envelope.message["n"])
        if len(tries) < 5:
            raise error

    send(cluster, *numbered(0, 1))
    with Running(made(cluster, handle, retry=ONCE, retry_topics=[0.3], dead_letter_topic="dead")) as running:
        until(lambda: running.listener.stats()["handled"] == 2, "the listener has done it")
    assert counts(running.listener) == {"handled": 2, "attempts_failed": 0, "to_retry": 0, "dead": 0, "in_flight": 0}
    assert tries == [0, 0, 0, 0, 0, 1]


def test_an_error_of_an_inbox_that_the_handler_uses_by_itself_is_one_of_the_handler(cluster: MockCluster) -> None:
    tries: list[int] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        tries.append(envelope.message["n"])
        if len(tries) == 1:
            raise kbatch.InboxError("of accept: database is locked")

    send(cluster, *numbered(0, 1))
    with Running(made(cluster, handle, retry=BRIEFLY, dead_letter_topic="dead")) as running:
        until(lambda: running.listener.stats()["handled"] == 2 or running.error, "the listener has done it")
    assert running.error is None
    assert (tries, running.listener.stats()["attempts_failed"]) == ([0, 0, 1], 1)


def test_each_failed_attempt_is_logged_once_and_its_payload_never(
    cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ValueError("why")

    send(cluster, kbatch.Envelope({"n": 40417}, key="k", message_type="order"))
    with Running(made(cluster, handle, retry=BRIEFLY, dead_letter_topic="dead")) as running:
        until(lambda: running.listener.stats()["dead"] == 1, "the listener has done it")
    lines = [each.getMessage() for each in caplog.records if "record orders" in each.getMessage()]
    assert [line.partition(": ")[2][:20] for line in lines] == [
        "attempt 1 failed, th", "attempt 2 failed, th", "sent to dead letter "
    ]  # fmt: skip
    assert all(line.startswith("record orders [0] at offset 0") and "ValueError: why" in line for line in lines)
    assert "40417" not in caplog.text


PROGRAM = """
import sys, kbatch
def handle(envelope):
    if envelope.message["n"] % 3 == 0:
        raise ValueError("poison")
    print("handled", envelope.message["n"], flush=True)
listener = kbatch.Listener(
    {"bootstrap.servers": sys.argv[1], "group.id": "billing", "session.timeout.ms": 1500, "heartbeat.interval.ms": 300},
    ["orders"], handle, types={"order": dict[str, int]}, dead_letter_topic="dead", commit_interval_s=3600.0,
    retry=kbatch.RetryPolicy(max_attempts=1),
)
listener.run()
"""


def test_a_kill_between_copy_and_commit_doubles_copies_and_loses_none() -> None:
    with MockCluster(process=True) as cluster:
        for topic in ("orders", "dead"):
            cluster.create_topic(topic, 1)
        send(cluster, *numbered(*range(30)))
        command = [sys.executable, "-c", PROGRAM, cluster.bootstrap_servers]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                while "29" not in process.stdout.readline():  # the next commit is an hour away
                    assert process.poll() is None
            finally:
                process.send_signal(signal.SIGKILL)
        assert committed(cluster) < 0
        first = [each.headers for each in read_back(cluster.bootstrap_servers, "dead")]

        def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
            if envelope.message["n"] % 3 == 0:
                raise ValueError("poison")

        with Running(made(cluster, handle, retry=ONCE, dead_letter_topic="dead")) as running:
            until(
                lambda: running.listener.stats()["handled"] == 30 and running.listener.stats()["dead"] == 10,
                "the listener has done it",
                60,
            )
        letters = [dict(each.headers) for each in read_back(cluster.bootstrap_servers, "dead")]
        offsets = sorted(int(each["original-offset"] or b"") for each in letters)
        assert set(offsets) == set(range(0, 30, 3))
        assert len(offsets) == len(first) + 10
        assert committed(cluster) == 30
        assert os.getpid() != process.pid


def test_of_a_batch_only_the_record_that_is_to_blame_is_dead(cluster: MockCluster) -> None:
    calls: list[list[int]] = []

    def handle(listener: kbatch.Listener, envelopes: Any) -> None:
        calls.append([each.message["n"] for each in envelopes])
        if 2 in calls[-1]:
            raise ValueError("poison")

    send(cluster, *numbered(*range(5)))
    listener = made(cluster, handle, retry=ONCE, dead_letter_topic="dead", batch_size=5, batch_timeout_ms=5_000)
    with Running(listener) as running:
        until(lambda: running.listener.stats()["handled"] == 5, "all is done")
    assert running.error is None
    assert calls == [[0, 1, 2, 3, 4], [0], [1], [2], [3], [4]]
    (letter,) = read_back(cluster.bootstrap_servers, "dead")
    assert dict(letter.headers)["original-offset"] == b"2"
    assert committed(cluster) == 5


def test_a_listener_of_a_loop_does_the_same(cluster: MockCluster) -> None:
    seen: list[tuple[str, int]] = []

    async def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        seen.append((envelope.topic, envelope.message["n"]))
        if envelope.message["n"] == 1:
            raise ValueError("poison")

    async def listen() -> dict[str, int]:
        config = {"bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing", **QUICK}
        async with aio.Listener(
            config, ["orders"], handle, types={"order": dict[str, int]}, retry=BRIEFLY, retry_topics=[0.3],
            dead_letter_topic="dead", concurrency=2,
        ) as listener:  # fmt: skip
            task = asyncio.create_task(listener.run())
            async with asyncio.timeout(60) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
                while listener.stats()["dead"] < 1 or listener.stats()["handled"] < 4:
                    await asyncio.sleep(0.01)
            listener.stop()
            await task
            return listener.stats()

    send(cluster, *numbered(0, 1, 2))
    stats = asyncio.run(listen())
    assert (stats["handled"], stats["attempts_failed"], stats["to_retry"], stats["dead"]) == (4, 4, 1, 1)
    assert [n for topic, n in seen if topic == "orders"] == [0, 1, 1, 1, 2]
    assert [each for each in seen if each[0] != "orders"] == [("billing.retry.0.3", 1)]
    assert len(read_back(cluster.bootstrap_servers, "dead")) == 1
    assert committed(cluster) == 3


def test_a_loop_neither_starts_the_producer_of_copies_nor_closes_a_dead_one(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_copy, replace = Copies.send, ProducerHandle.replace
    ready: list[bool] = []
    threads: list[threading.Thread] = []

    def watched_send(copies: Copies, *arguments: Any) -> None:
        assert copies._handle is not None
        ready.append(copies._handle.producer._core.started())
        send_copy(copies, *arguments)
        if len(ready) == 1:
            copies._handle.producer._core.inject_fatal_error(45, "as a broker would")

    def watched_replace(handle: ProducerHandle, *arguments: Any) -> None:
        threads.append(threading.current_thread())
        replace(handle, *arguments)

    monkeypatch.setattr(Copies, "send", watched_send)
    monkeypatch.setattr(ProducerHandle, "replace", watched_replace)

    async def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ValueError("poison")

    async def listen() -> None:
        config = {"bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing", **QUICK}
        async with aio.Listener(config, ["orders"], handle, retry=ONCE, dead_letter_topic="dead") as listener:
            task = asyncio.create_task(listener.run())
            end = asyncio.get_running_loop().call_later(60, listener.stop)
            while listener.stats()["dead"] < 2 and not task.done():
                await asyncio.sleep(0.01)
            end.cancel()
            listener.stop()
            await task

    send(cluster, *numbered(0, 1))
    asyncio.run(listen())
    assert {json.loads(letter.value or b"")["n"] for letter in read_back(cluster.bootstrap_servers, "dead")} == {0, 1}
    assert all(ready)
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_dead_letter_of_a_listener_is_told_once_it_is_stored(cluster: MockCluster, batch_size: int | None) -> None:
    told: list[tuple[int, str, str, bool]] = []

    def handle(listener: kbatch.Listener, envelope: Any) -> None:
        for each in [envelope] if batch_size is None else envelope:
            if each.message["n"] in (1, 3):
                raise ValueError(f"poison {each.message['n']}")

    def on_dead(envelope: kbatch.ReceivedEnvelope[Any], error: Exception) -> None:
        is_stored = len(read_back(cluster.bootstrap_servers, "dead")) > len(told)
        told.append((envelope.message["n"], str(error), envelope.topic, is_stored))

    send(cluster, *numbered(*range(5)))
    options = {"retry": BRIEFLY, "retry_topics": [0.3], "dead_letter_topic": "dead", "batch_size": batch_size}
    with made(cluster, handle, on_dead=on_dead, **options) as listener, Running(listener) as running:
        until(lambda: listener.stats()["dead"] == 2, "the dead letters")
    assert running.error is None
    assert sorted(told) == [(n, f"poison {n}", "billing.retry.0.3", True) for n in (1, 3)]


def test_what_cannot_be_read_is_told_with_its_error(cluster: MockCluster) -> None:
    told: list[tuple[bytes | None, type[Exception]]] = []
    send(cluster, kbatch.Envelope(data=b"no JSON", message_type="order"))
    listener = made(
        cluster,
        lambda listener, envelope: None,
        dead_letter_topic="dead",
        on_dead=lambda envelope, error: told.append((envelope.data, type(error))),
    )
    with listener, Running(listener):
        until(lambda: listener.stats()["dead"] == 1, "the dead letter")
    assert told == [(b"no JSON", kbatch.DeserializationError)]


def test_a_callback_of_dead_letters_that_hangs_stops_no_listener(
    cluster: MockCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kbatch._receiving._base._LAST_WORDS_S", 0.1)
    goes_on = threading.Event()

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        if envelope.message["n"] < 3:
            raise ValueError("poison")

    send(cluster, *numbered(*range(6)))
    options = {"retry": ONCE, "dead_letter_topic": "dead", "on_dead": lambda envelope, error: goes_on.wait(60)}
    try:
        with made(cluster, handle, **options) as listener, Running(listener) as running:
            until(lambda: listener.stats()["handled"] == 6, "all of them")
        assert running.error is None
        assert "on_dead was not told yet of 3 dead letters of kbatch.Listener of orders" in caplog.text
        assert committed(cluster) == 6
    finally:
        goes_on.set()


def test_a_callback_of_dead_letters_may_close_the_listener_which_may_run_again(cluster: MockCluster) -> None:
    told: list[int] = []

    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ValueError("poison")

    def on_dead(envelope: kbatch.ReceivedEnvelope[Any], error: Exception) -> None:
        listener.close()
        told.append(envelope.message["n"])

    listener = made(cluster, handle, retry=ONCE, dead_letter_topic="dead", on_dead=on_dead)
    for n in range(2):
        send(cluster, *numbered(n))
        run(listener)
        until(lambda: len(told) == n + 1, "that it is told")  # noqa: B023
    assert told == [0, 1]


@pytest.mark.parametrize("kind", ["function", "coroutine function"])
def test_dead_letters_of_a_listener_of_a_loop_are_told_on_it(cluster: MockCluster, kind: str) -> None:
    told: list[tuple[int, str, str]] = []

    async def handle(envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ValueError(f"poison {envelope.message['n']}")

    def plain(envelope: kbatch.ReceivedEnvelope[Any], error: Exception) -> None:
        told.append((envelope.message["n"], str(error), threading.current_thread().name))

    async def later(envelope: kbatch.ReceivedEnvelope[Any], error: Exception) -> None:
        await asyncio.sleep(0)
        plain(envelope, error)
        await listener.close()

    async def listen() -> None:
        nonlocal listener
        config = {"bootstrap.servers": cluster.bootstrap_servers, "group.id": "billing", **QUICK}
        listener = aio.Listener(
            config, ["orders"], handle, types={"order": dict[str, int]}, retry=ONCE, dead_letter_topic="dead",
            on_dead=plain if kind == "function" else later,
        )  # fmt: skip
        task = asyncio.create_task(listener.run())
        async with asyncio.timeout(60) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
            while not told:
                await asyncio.sleep(0.01)
        listener.stop()
        await task
        await listener.close()

    listener: Any = None
    send(cluster, *numbered(0))
    asyncio.run(listen())
    assert told == [(0, "poison 0", threading.current_thread().name)]


def test_a_listener_that_runs_again_sends_on_again(cluster: MockCluster) -> None:
    def handle(listener: kbatch.Listener, envelope: kbatch.ReceivedEnvelope[Any]) -> None:
        raise ValueError("poison")

    listener = made(cluster, handle, retry=ONCE, dead_letter_topic="dead")
    for n in range(2):
        send(cluster, *numbered(n))
        with Running(listener) as running:
            until(lambda: listener.stats()["dead"] == 1, "a dead letter")
        assert running.error is None
    assert len(read_back(cluster.bootstrap_servers, "dead")) == 2
