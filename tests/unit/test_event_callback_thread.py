"""The callbacks of a producer's configuration: confluent-kafka's signatures, on a thread of their own. No broker."""

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import KafkaError

import kbatch
from kbatch import aio
from kbatch._fastmap import set_oauth_token

from ..naming import shown
from ..waiting import until

NOBODY = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


@pytest.mark.parametrize("kind", [kbatch.Producer, aio.Producer])
def test_error_cb(kind: Any) -> None:
    errors: list[KafkaError] = []
    threads: set[str] = set()

    def error_cb(error: KafkaError) -> None:
        errors.append(error)
        threads.add(threading.current_thread().name)

    producer = kind({**NOBODY, "error_cb": error_cb})
    producer._core.start()
    until(lambda: len(errors) >= 2, "errors about the broker")
    producer._core.close(30)
    assert all(type(error) is KafkaError for error in errors)
    assert {error.name() for error in errors} <= {"_TRANSPORT", "_ALL_BROKERS_DOWN"}
    assert any("127.0.0.1:1" in error.str() for error in errors)
    assert not any(error.fatal() for error in errors)
    assert threads == {"kbatch-callbacks"}


def test_a_fatal_error_is_told_as_fatal() -> None:
    errors: list[KafkaError] = []
    with kbatch.Producer({**NOBODY, "error_cb": errors.append}) as producer:
        producer._core.inject_fatal_error(45, "made up")
        until(lambda: any(error.fatal() for error in errors), "the fatal error")
        (fatal,) = [error for error in errors if error.fatal()]
        assert "made up" in fatal.str()


def test_stats_cb() -> None:
    texts: list[str] = []
    with kbatch.Producer({**NOBODY, "stats_cb": texts.append, "statistics.interval.ms": 20}) as producer:
        producer.submit("orders", [])
        until(lambda: len(texts) >= 2, "statistics")
        assert repr(producer).startswith(f"<kbatch.Producer {json.loads(texts[0])['name']} ")
    assert {json.loads(text)["type"] for text in texts} == {"producer"}


def test_logger() -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger = logging.getLogger("tests.kbatch.lines")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(Keep())
    with kbatch.Producer({"bootstrap.servers": "127.0.0.1:1", "logger": logger, "debug": "broker"}) as producer:
        producer.submit("orders", [])
        until(lambda: any(record.levelno == logging.ERROR for record in records), "a line about the broker")
    assert any(record.levelno == logging.DEBUG for record in records)
    assert any("127.0.0.1:1" in record.getMessage() for record in records)


def test_without_a_logger_librdkafka_writes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    written = ""

    def failed() -> bool:
        nonlocal written
        written += capfd.readouterr().err
        return "FAIL" in written

    with kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer:
        producer.submit("orders", [])
        until(failed, "a line about the broker")


def test_log_level_0_leaves_them_out(capfd: pytest.CaptureFixture[str]) -> None:
    errors: list[KafkaError] = []
    with kbatch.Producer({**NOBODY, "log_level": 0, "error_cb": errors.append}) as producer:
        producer.submit("orders", [])
        until(lambda: len(errors) >= 2, "errors about the broker")
    assert capfd.readouterr().err == ""


def test_a_callback_that_raises_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def stats_cb(text: str) -> None:
        calls.append(text)
        raise ZeroDivisionError("from a callback")

    with kbatch.Producer({**NOBODY, "stats_cb": stats_cb, "statistics.interval.ms": 20}) as producer:
        producer.submit("orders", [])
        until(lambda: len(calls) >= 2, "statistics")
    assert "from a callback" in caplog.text


OAUTH = {**NOBODY, "security.protocol": "SASL_PLAINTEXT", "sasl.mechanisms": "OAUTHBEARER"}
UNSECURED = {
    **OAUTH,
    "enable.sasl.oauthbearer.unsecure.jwt": True,
    "sasl.oauthbearer.config": "principal=me lifeSeconds=2",
}
OIDC = {
    **OAUTH,
    "sasl.oauthbearer.method": "oidc",
    "sasl.oauthbearer.client.id": "me",
    "sasl.oauthbearer.client.secret": "x",
    "sasl.oauthbearer.token.endpoint.url": "http://127.0.0.1:1/token",
}
PRODUCERS = [kbatch.Producer, aio.Producer]


@contextlib.contextmanager
def started(producer_class: Any, config: dict[str, Any]) -> Iterator[Any]:
    producer = producer_class(config)
    producer._core.start()
    try:
        yield producer
    finally:
        producer._core.close(0)


@pytest.mark.parametrize("producer_class", PRODUCERS)
@pytest.mark.parametrize("forgotten", ["error_cb", "stats_cb", "throttle_cb", "oauth_cb", "logger"])
def test_events_that_nobody_asked_for_are_silent(
    producer_class: Any, forgotten: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *arguments: calls.update([name]) or ("token", time.time() + 3_600)

    config = {name: count(name) for name in ("error_cb", "stats_cb", "throttle_cb", "oauth_cb") if name != forgotten}
    kind = UNSECURED if forgotten == "oauth_cb" else OAUTH
    with started(producer_class, {**kind, **config, "statistics.interval.ms": 20}):
        seen = {"error_cb", "stats_cb"} - {forgotten}
        until(lambda: all(calls[name] >= 3 for name in seen), "the others' events")
    assert not caplog.records


def test_statistics_that_come_all_the_same_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[KafkaError] = []
    producer = kbatch.Producer({**NOBODY, "error_cb": errors.append})
    producer._parsed.native.set("statistics.interval.ms", "20")
    with producer:
        producer.submit("orders", [])
        until(lambda: len(errors) >= 3, "errors, among the statistics")
    assert not caplog.records


@pytest.mark.parametrize("producer_class", PRODUCERS)
@pytest.mark.parametrize("protocol", ["sasl_plaintext", "SASL_SSL"])
@pytest.mark.parametrize("key", ["sasl.mechanism", "sasl.mechanisms"])
def test_an_oauth_cb_that_was_forgotten_is_named(producer_class: Any, protocol: str, key: str) -> None:
    config = {**NOBODY, "security.protocol": protocol, key: "OAUTHBEARER"}
    for more in ({}, {"oauth_cb": None}, {"enable.sasl.oauthbearer.unsecure.jwt": False, "error_cb": print}):
        with pytest.raises(kbatch.ConfigError, match=r"^oauth_cb is missing"):
            producer_class({**config, **more})


@pytest.mark.parametrize("producer_class", PRODUCERS)
@pytest.mark.parametrize("config", [OIDC, UNSECURED, {**OAUTH, "security.protocol": "ssl"}], ids=["oidc", "jwt", "ssl"])
def test_who_needs_no_oauth_cb_starts_without_one(producer_class: Any, config: dict[str, Any]) -> None:
    with started(producer_class, config):
        pass


@pytest.mark.parametrize("producer_class", PRODUCERS)
def test_unsecured_tokens_are_renewed(producer_class: Any, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    errors: list[KafkaError] = []

    class Logger:
        def log(self, level: int, text: str, *arguments: object) -> None:
            lines.append(text % arguments)

    config = {**UNSECURED, "log_level": 7, "debug": "security", "logger": Logger(), "error_cb": errors.append}
    with started(producer_class, config):
        until(lambda: sum("Creating unsecured token" in line for line in lines) >= 3, "the third token")
    assert "_AUTHENTICATION" not in {error.name() for error in errors}
    assert not caplog.records


def test_oauth_cb_comes_before_librdkafkas_own_way_to_tokens() -> None:
    configs: list[str | None] = []

    def oauth_cb(config: str | None) -> tuple[str, float]:
        configs.append(config)
        return "token", time.time() + 3_600

    with started(kbatch.Producer, {**OIDC, "oauth_cb": oauth_cb}):
        until(lambda: configs, "the question")
    confluent = confluent_kafka.Producer({**OIDC, "oauth_cb": oauth_cb})
    until(lambda: (confluent.poll(0.05), len(configs) == 2)[1], "their question")
    with pytest.raises(kbatch.ConfigError, match=r"unsecure\.jwt=true contradicts oauth_cb"):
        kbatch.Producer({**UNSECURED, "oauth_cb": oauth_cb})
    with pytest.raises(confluent_kafka.KafkaException, match="mutually exclusive"):
        confluent_kafka.Producer({**UNSECURED, "oauth_cb": oauth_cb})


def test_oauth_cb() -> None:
    configs: list[str] = []
    errors: list[KafkaError] = []

    def oauth_cb(config: str) -> tuple[str, float, str, dict[str, str]]:
        configs.append(config)
        # It is asked again when four fifths of the token's life are over.
        return "token", time.time() + 0.5, "principal", {"scope": "orders"}

    config = {**OAUTH, "oauth_cb": oauth_cb, "sasl.oauthbearer.config": "scope=orders", "error_cb": errors.append}
    with kbatch.Producer(config) as producer:
        producer.submit("orders", [])
        until(lambda: len(configs) >= 2, "a refresh")
    assert set(configs) == {"scope=orders"}
    assert "_AUTHENTICATION" not in {error.name() for error in errors}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ZeroDivisionError("the-token"), "ZeroDivisionError"),
        (("the-token", 0.0), "ValueError"),  # it has expired
        (("the-token",), "TypeError"),
        (None, "TypeError"),
        (("the-token", time.time() + 9, "p", {"auth": "reserved"}), "ValueError"),
    ],
)
def test_an_oauth_cb_that_fails_is_told_to_error_cb_without_the_token(answer: Any, reason: str) -> None:
    errors: list[KafkaError] = []

    def oauth_cb(config: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with kbatch.Producer({**OAUTH, "oauth_cb": oauth_cb, "error_cb": errors.append}) as producer:
        producer.submit("orders", [])
        until(lambda: any(error.name() == "_AUTHENTICATION" for error in errors), "the failure")
    (failure,) = {error.str() for error in errors if error.name() == "_AUTHENTICATION"}
    assert reason in failure
    assert "the-token" not in failure


def test_without_a_configuration_oauth_cb_gets_none_as_in_confluent_kafka() -> None:
    configs: list[str | None] = []

    def oauth_cb(config: str | None) -> tuple[str, float]:
        configs.append(config)
        return "token", time.time() + 3_600

    with kbatch.Producer({**OAUTH, "oauth_cb": oauth_cb}) as producer:
        producer.submit("orders", [])
        until(lambda: configs, "the question")
    confluent = confluent_kafka.Producer({**OAUTH, "oauth_cb": oauth_cb})
    until(lambda: (confluent.poll(0.05), len(configs) == 2)[1], "their question")
    assert configs == [None, None]


LATER = 4_000_000_000


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (("token", LATER), None),
        (("token", float(LATER)), None),
        (("token", Decimal(LATER)), None),
        (("token", LATER, "principal"), None),
        (("token", LATER, "müller", {}), None),
        (("token", LATER, "", {"scope": "orders", "tenant": "shop"}), None),
        (("token", LATER, None), r"oauth_cb's principal must be str, not NoneType"),
        (("token", LATER, "", None), r"oauth_cb's extensions must be a dict, not NoneType"),
        (("token", LATER, "", [("scope", "orders")]), r"oauth_cb's extensions must be a dict, not list"),
        (("token", LATER, "", {"scope": b"orders"}), r"oauth_cb's extension must be str, not bytes"),
        (("token", LATER, "", {"scope": "orders\0"}), r"oauth_cb's extension is not UTF-8 text without a NUL"),
        (("token", LATER, "", {"auth": "x"}), "reserved"),
        (("token", LATER, "", {}, "more"), r"oauth_cb must return \(token, .*, not a tuple of 5"),
        (("token",), r"oauth_cb must return \(token, .*, not a tuple of 1"),
        (["token", LATER], r"oauth_cb must return \(token, .*, not list"),
        ("token", r"oauth_cb must return \(token, .*, not str"),
        (None, r"oauth_cb must return \(token, .*, not NoneType"),
        ((b"token", LATER), r"oauth_cb's token must be str, not bytes"),
        (("token\0", LATER), r"oauth_cb's token is not UTF-8 text without a NUL"),
        (("\ud800", LATER), r"oauth_cb's token is not UTF-8 text"),
        (("token", "soon"), "must be real number, not str"),
        (("token", float("nan")), "oauth_cb's expiry must be seconds since 1970, not nan"),
        (("token", float("inf")), "oauth_cb's expiry must be seconds since 1970, not inf"),
        (("token", -1), "oauth_cb's expiry must be seconds since 1970, not -1"),
        (("token", 0), "unexpired"),
        (("token", time.time() - 1), "unexpired"),
    ],
    ids=shown,
)
def test_what_oauth_cb_may_return(answer: Any, refusal: str | None) -> None:
    config = {**OAUTH, "oauth_cb": lambda config: ("token", LATER)}
    with kbatch.Producer(config) as producer:
        producer.submit("orders", [])
        if refusal is None:
            set_oauth_token(producer._core, answer)
        else:
            with pytest.raises((TypeError, ValueError), match=refusal):
                set_oauth_token(producer._core, answer)


def test_a_token_does_not_wait_behind_another_callback() -> None:
    asked = threading.Event()
    done = threading.Event()

    def stats_cb(text: str) -> None:
        done.wait(30)

    def oauth_cb(config: str) -> tuple[str, float]:
        asked.set()
        return "token", time.time() + 0.2

    with kbatch.Producer(
        {**OAUTH, "oauth_cb": oauth_cb, "stats_cb": stats_cb, "statistics.interval.ms": 1}
    ) as producer:
        producer.submit("orders", [])
        assert asked.wait(30)
        asked.clear()
        assert asked.wait(30)
        done.set()


def test_a_dispatcher_that_cannot_be_made_is_made_at_the_next_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any, **options: Any) -> threading.Thread:
        raise MemoryError

    with kbatch.Producer(NOBODY) as producer:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", no_memory)
            with pytest.raises(MemoryError):
                producer.submit("orders", [])
        assert producer.submit("orders", []).wait().ok
