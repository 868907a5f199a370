"""The callbacks of a producer's configuration, side by side with confluent-kafka's, and what raises in them."""

import functools
import itertools
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import KafkaError, ThrottleEvent

import kbatch
from kbatch import _events
from kbatch.testing import MockCluster

from ..waiting import until
from .clients import read
from .throttling_proxy import ThrottlingProxy

NOBODY = "127.0.0.1:1"


@pytest.fixture
def proxy(kafka_cluster: MockCluster) -> Iterator[ThrottlingProxy]:
    kafka_cluster.create_topic("orders", partitions=1)
    with ThrottlingProxy(kafka_cluster.bootstrap_servers, throttle_ms=1_234) as proxy:
        yield proxy


def confluent_producer(config: dict[str, Any]) -> confluent_kafka.Producer:
    return confluent_kafka.Producer({"log_level": 0, **config})


def poll_until(producer: confluent_kafka.Producer, condition: Callable[[], object], what: str) -> None:
    until(lambda: (producer.poll(0.05), condition())[1], what)


class Calls:
    """Takes any callback's arguments, and raises what `fail` makes each time."""

    def __init__(self, fail: Callable[[], BaseException] | None = None) -> None:
        self.arguments: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()
        self.fail = fail

    def __call__(self, *arguments: Any) -> None:
        self.arguments.append(arguments)
        self.threads.add(threading.current_thread().name)
        if self.fail is not None:
            raise self.fail()

    log = __call__


def test_throttle_cb(proxy: ThrottlingProxy) -> None:
    config = {"bootstrap.servers": proxy.bootstrap_servers, "log_level": 0}
    mine, theirs = Calls(), Calls()
    with kbatch.Producer({**config, "throttle_cb": mine}) as producer:
        assert producer.send_batch("orders", [kbatch.Envelope(data=b"1")]).ok
        until(lambda: mine.arguments, "the throttling")
    confluent = confluent_producer({**config, "throttle_cb": theirs})
    confluent.produce("orders", b"2")
    assert confluent.flush(30) == 0
    poll_until(confluent, lambda: theirs.arguments, "their throttling")
    assert proxy.throttled == 2
    (event,) = mine.arguments[0]
    (their_event,) = theirs.arguments[0]
    assert type(event) is type(their_event) is ThrottleEvent
    assert vars(event) == vars(their_event)
    assert vars(event) == {"broker_name": proxy.bootstrap_servers, "broker_id": 1, "throttle_time": 1.234}
    assert mine.threads == {"kbatch-callbacks"}


def test_error_cb_is_told_what_confluent_kafkas_is_told() -> None:
    config = {"bootstrap.servers": NOBODY, "log_level": 0}
    mine, theirs = Calls(), Calls()

    def told(calls: Calls) -> set[tuple[Any, ...]]:
        errors = [error for (error,) in list(calls.arguments)]
        assert all(type(error) is KafkaError for error in errors)
        return {
            # The text up to a time; how many brokers are down is counted while they go down.
            (e.code(), e.name(), e.str().partition(" (after ")[0].lstrip("0123456789/"), e.fatal(), e.retriable())
            for e in errors
        }

    with kbatch.Producer({**config, "error_cb": mine}) as producer:
        producer.submit("orders", [])
        until(lambda: len(told(mine)) == 2, "both errors")
    confluent = confluent_producer({**config, "error_cb": theirs})
    poll_until(confluent, lambda: len(told(theirs)) == 2, "both errors")
    assert told(mine) == told(theirs)
    assert {error[1] for error in told(mine)} == {"_TRANSPORT", "_ALL_BROKERS_DOWN"}


def test_error_cb_is_told_the_cause_of_a_fatal_error() -> None:
    # confluent-kafka raises it from poll() as KafkaException(KafkaError(cause, text, fatal=True)).
    errors: list[KafkaError] = []
    config = {"bootstrap.servers": NOBODY, "log_level": 0, "error_cb": errors.append}
    with kbatch.Producer(config) as producer:
        producer._core.inject_fatal_error(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "made up")
        until(lambda: any(error.fatal() for error in errors), "the fatal error")
    (fatal,) = [error for error in errors if error.fatal()]
    assert fatal.code() == KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER
    assert fatal.str() == "test_fatal_error: made up"
    assert not fatal.retriable()


def test_stats_cb_is_told_what_confluent_kafkas_is_told(kafka_cluster: MockCluster) -> None:
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers, "statistics.interval.ms": 20}
    mine, theirs = Calls(), Calls()
    with kbatch.Producer({**config, "stats_cb": mine}) as producer:
        producer.submit("orders", [])
        until(lambda: len(mine.arguments) >= 2, "statistics")
    confluent = confluent_producer({**config, "stats_cb": theirs, "enable.idempotence": True})
    poll_until(confluent, lambda: len(theirs.arguments) >= 2, "their statistics")
    (text,), (their_text,) = mine.arguments[0], theirs.arguments[0]
    assert type(text) is type(their_text) is str
    assert json.loads(text).keys() == json.loads(their_text).keys()


def test_a_logger_is_told_what_confluent_kafkas_is_told() -> None:
    config = {"bootstrap.servers": NOBODY, "debug": "broker"}
    mine, theirs = Calls(), Calls()

    def lines(calls: Calls) -> dict[tuple[Any, ...], str]:
        return {arguments[:3]: arguments[4].partition(" (after ")[0] for arguments in list(calls.arguments)}

    fail, state = (logging.ERROR, "%s [%s] %s", "FAIL"), (logging.DEBUG, "%s [%s] %s", "STATE")
    # confluent-kafka always takes errors as events, and then librdkafka does not log them.
    with kbatch.Producer({**config, "logger": mine}) as producer:
        producer.submit("orders", [])
        until(lambda: {fail, state} <= lines(mine).keys(), "a line about the broker")
        name = repr(producer).split()[1]
    confluent = confluent_kafka.Producer({**config, "logger": theirs})
    poll_until(confluent, lambda: state in lines(theirs), "their line about it")
    assert {len(arguments) for arguments in mine.arguments + theirs.arguments} == {5}
    assert {arguments[3] for arguments in mine.arguments} == {name}
    assert lines(mine)[fail].startswith(
        f"[thrd:{NOBODY}/bootstrap]: {NOBODY}/bootstrap: Connect to ipv4#{NOBODY} failed"
    )
    common = lines(mine).keys() & lines(theirs).keys()
    assert {facility for _, _, facility in common} >= {"STATE", "CONNECT"}


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_raises_in_callbacks_is_logged_each_time_and_breaks_nothing(
    error: type[BaseException], kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    # confluent-kafka raises it from poll() or flush(); here nobody is in a call when a callback runs.
    kafka_cluster.create_topic("orders", partitions=1)
    names = ("error_cb", "stats_cb", "throttle_cb", "logger")
    with ThrottlingProxy(kafka_cluster.bootstrap_servers, throttle_ms=5) as proxy:
        calls = {name: Calls(functools.partial(error, f"from {name}")) for name in names}
        config = {"bootstrap.servers": proxy.bootstrap_servers, "statistics.interval.ms": 10, "debug": "broker"}
        config |= {"reconnect.backoff.ms": 1, "reconnect.backoff.max.ms": 10, "metadata.recovery.strategy": "none"}
        reports = Calls(functools.partial(error, "from a report's callback"))
        with kbatch.Producer({**config, **calls}) as producer:
            sent = 0

            def everyone_was_called_again() -> bool:
                nonlocal sent
                assert producer.submit("orders", [kbatch.Envelope(data=b"%d" % sent)], callback=reports).wait().ok
                sent += 1
                if sent % 10 == 0:
                    proxy.disconnect()  # for error_cb
                return all(len(each.arguments) >= 2 for each in calls.values())

            until(everyone_was_called_again, "more calls of each")
            assert producer.flush(30) == 0
    assert [record.value for record in read(kafka_cluster.bootstrap_servers, "orders", sent)[0]] == [
        b"%d" % number for number in range(sent)
    ]
    assert len(reports.arguments) == sent  # none was lost behind those that raised
    logged = Counter(str(record.exc_info[1]) for record in caplog.records if record.exc_info)
    assert logged == {f"from {name}": len(each.arguments) for name, each in calls.items()} | {
        "from a report's callback": sent
    }
    assert {(record.name, record.levelno) for record in caplog.records} == {("kbatch", logging.ERROR)}


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_an_oauth_cb_that_raises_has_failed(error: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    # librdkafka asks again ten seconds after it was told of a failure, and not before.
    config = {"bootstrap.servers": NOBODY, "log_level": 0}
    config |= {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanisms": "OAUTHBEARER"}
    errors = Calls()
    with kbatch.Producer(
        {**config, "oauth_cb": Calls(lambda: error("no token today")), "error_cb": errors}
    ) as producer:
        producer.submit("orders", [])
        until(lambda: any(each.code() == KafkaError._AUTHENTICATION for (each,) in errors.arguments), "the failure")
        until(lambda: caplog.records, "the log line")
    (failure,) = {each.str() for (each,) in errors.arguments if each.code() == KafkaError._AUTHENTICATION}
    assert failure == f"Failed to acquire SASL OAUTHBEARER token: oauth_cb failed: {error.__name__}"
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]
    assert "no token today" in caplog.text


def test_a_logging_filter_that_raises_does_not_end_the_callbacks(
    kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture
) -> None:
    kafka_cluster.create_topic("orders", partitions=1)

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter")

    reports = Calls(ZeroDivisionError)
    logger = logging.getLogger("kbatch")
    logger.addFilter(refuse)
    try:
        with kbatch.Producer({"bootstrap.servers": kafka_cluster.bootstrap_servers}) as producer:
            for _ in range(5):
                producer.submit("orders", [kbatch.Envelope(data=b"x")], callback=reports).wait()
    finally:
        logger.removeFilter(refuse)
    assert len(reports.arguments) == 5


def test_a_logging_filter_that_raises_cuts_no_events_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter")

    put = _events._Events.put
    given = itertools.count()

    def refuses_each_second(self: Any, *arguments: Any, **options: Any) -> None:
        if next(given) % 2:
            raise ZeroDivisionError
        put(self, *arguments, **options)

    monkeypatch.setattr(_events._Events, "put", refuses_each_second)
    statistics = Calls()
    config = {"bootstrap.servers": NOBODY, "log_level": 0, "statistics.interval.ms": 1, "stats_cb": statistics}
    logger = logging.getLogger("kbatch")
    logger.addFilter(refuse)
    try:
        with kbatch.Producer(config) as producer:
            producer._core.start()
            until(lambda: len(statistics.arguments) >= 10, "statistics")
    finally:
        logger.removeFilter(refuse)


def test_a_fatal_error_before_a_close_is_told_before_it_ends() -> None:
    for _ in range(20):
        errors = Calls()
        config = {"bootstrap.servers": NOBODY, "log_level": 0, "statistics.interval.ms": 1, "stats_cb": Calls()}
        producer = kbatch.Producer({**config, "error_cb": errors})
        producer._core.inject_fatal_error(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "made up")
        producer.close()
        assert [error.fatal() for (error,) in errors.arguments if error.fatal()] == [True]


def test_throttling_before_a_close_is_told_before_it_ends(proxy: ThrottlingProxy) -> None:
    throttled = Calls()
    config = {"bootstrap.servers": proxy.bootstrap_servers, "log_level": 0, "throttle_cb": throttled}
    for _ in range(5):
        with kbatch.Producer(config) as producer:
            producer.submit("orders", [kbatch.Envelope(data=b"x")])
        assert len(throttled.arguments) == proxy.throttled


def test_a_close_does_not_wait_for_events_without_end(kafka_cluster: MockCluster) -> None:
    kafka_cluster.create_topic("orders", partitions=1)
    config = {"bootstrap.servers": kafka_cluster.bootstrap_servers, "log_level": 7, "debug": "all"}
    config |= {"statistics.interval.ms": 1, "stats_cb": Calls(), "logger": Calls(), "error_cb": Calls()}
    with kbatch.Producer(config) as producer:
        assert producer.send_batch("orders", [kbatch.Envelope(data=b"x")] * 1_000).ok
        began = threading.active_count()
    assert threading.active_count() < began


def test_what_has_no_room_behind_a_callback_that_hangs_is_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_events, "_MOST_WAITING_BEFORE_STATS", 5)
    goes_on = threading.Event()
    told: list[str] = []

    def stats_cb(json: str) -> None:
        told.append(json)
        goes_on.wait(90)

    config = {"bootstrap.servers": NOBODY, "log_level": 0, "statistics.interval.ms": 1, "stats_cb": stats_cb}
    with kbatch.Producer(config) as producer:
        producer._core.start()
        callbacks = producer._callback_thread
        until(lambda: callbacks.waiting == 10, "statistics that wait, each with its count")
        others = Calls()
        for number in range(20):
            callbacks.put(others, number)  # such as answers of batches: they are told, however many wait
        assert callbacks.waiting == 30
        goes_on.set()
        until(lambda: "had no room" in caplog.text, "word of what was dropped")
        began_again = len(told)
        until(lambda: len(told) > began_again, "later statistics")
    assert [number for (number,) in others.arguments] == list(range(20))
    (line, *_) = [record.getMessage() for record in caplog.records if "had no room" in record.getMessage()]
    assert re.fullmatch(r"[\d,]+ events? of librdkafka had no room behind slow callbacks and were dropped", line)


def test_answers_of_batches_take_no_room_of_events_and_a_fatal_error_has_it_always(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_events, "_MOST_WAITING", 5)
    goes_on = threading.Event()
    told: list[Any] = []
    config: dict[str, Any] = {"bootstrap.servers": NOBODY, "log_level": 0, "error_cb": told.append}
    config |= {"reconnect.backoff.ms": 10, "reconnect.backoff.max.ms": 10}
    with kbatch.Producer(config) as producer:
        callbacks = producer._callback_thread
        callbacks.put(goes_on.wait, 90)
        for _ in range(1_000):
            callbacks.put(int)
        producer._core.start()
        until(lambda: callbacks.waiting == 1_010, "5 errors, each with its count", 20)
        producer._core.inject_fatal_error(45, "as a broker would")
        until(lambda: callbacks.waiting == 1_012, "the fatal one", 20)
        goes_on.set()
        until(lambda: any(error.fatal() for error in told), "word of it")
    assert [error.fatal() for error in told[:6]] == [False] * 5 + [True]
