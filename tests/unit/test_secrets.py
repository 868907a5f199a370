"""No password in what kbatch shows, raises, logs, keeps or pickles. The frames of the caller are its own."""

import contextlib
import copy
import functools
import gc
import logging
import pickle
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import aio
from kbatch._config import ProducerConfig, is_harmless
from kbatch.testing import MemoryProducer

from ..naming import shown
from ..refusals import refusal
from ..waiting import until
from .test_config_keys import Key, keys  # noqa: F401 (a fixture)

SERVERS = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
SECRET = "hunter2-hunter2"
SECRETS = {
    "sasl.username": SECRET,
    "sasl.password": SECRET,
    "ssl.key.password": SECRET,
    "ssl.keystore.password": SECRET,
    "ssl.key.pem": f"-----BEGIN {SECRET}",
    "ssl.ca.pem": SECRET,
    "sasl.oauthbearer.client.secret": SECRET,
    "sasl.oauthbearer.config": SECRET,
    "sasl.oauthbearer.assertion.private.key.passphrase": SECRET,
    "sasl.oauthbearer.assertion.private.key.pem": SECRET,
}
OAUTH = {**SERVERS, "security.protocol": "SASL_PLAINTEXT", "sasl.mechanisms": "OAUTHBEARER"}
PACKAGE = str(Path(kbatch.__file__).parent)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and whatever hangs on it, also where a traceback would not show it."""
    yield error
    for other in (error.__cause__, error.__context__):
        if other is not None:
            yield from chain(other)


def texts_of(error: BaseException) -> Iterator[str]:
    for link in chain(error):
        yield from (str(link), repr(link), repr(link.args), repr(vars(link)))
        yield from traceback.format_exception(link)
        if isinstance(link, UnicodeError):
            yield repr(link.object)  # type: ignore[attr-defined]
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if frame.f_code.co_filename.startswith((PACKAGE, "src/kbatch")):
                yield repr(frame.f_locals)


def assert_no_secret(texts: Iterator[str]) -> None:
    leaks = [text for text in texts if SECRET in text]
    assert not leaks


def strings_within(root: object) -> Iterator[str]:
    """Every string that can be reached from `root` without going through a module or a class."""
    modules = {id(vars(module)) for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or id(thing) in modules or isinstance(thing, (types.ModuleType, type, logging.Logger)):
            continue
        seen.add(id(thing))
        if isinstance(thing, (str, bytes, bytearray)):
            yield thing if isinstance(thing, str) else thing.decode("latin-1")
        waiting += gc.get_referents(thing)


def test_what_librdkafka_redacts_is_a_secret(keys: list[Key]) -> None:  # noqa: F811
    class Lines:
        def __init__(self) -> None:
            self.values: dict[str, str] = {}

        def log(self, level: int, text: str, *arguments: Any) -> None:
            name, equals, value = arguments[-1].partition(" = ")
            if equals:
                self.values[name.split()[-1]] = value.strip()

    redacted: set[str] = set()
    for key in keys:
        if key.kind == "string" and key.name not in ("plugin.library.paths", "transactional.id", "bootstrap.servers"):
            lines = Lines()
            config = {**SERVERS, "log_level": 7, "debug": "conf", "logger": lines, key.name: "x"}
            with contextlib.suppress(kbatch.ConfigError), contextlib.closing(kbatch.Producer(config)) as producer:
                producer.submit("orders", [])  # files that are not there are refused
                until(lambda values=lines.values: "request.required.acks" in values, "the last line of them")
            redacted |= {name for name, value in lines.values.items() if value == "[redacted]"}
    assert {"sasl.password", "sasl.username", "ssl.key.password", "sasl.oauthbearer.client.secret"} <= redacted
    assert not any(map(is_harmless, redacted))


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value + "\0",
        lambda value: value + "\udcff",
        lambda value: value.encode(),
        lambda value: [value],
        lambda value: {value: value},
    ],
    ids=["nul", "surrogate", "bytes", "list", "dict"],
)
def test_a_secret_that_is_no_value(secret: str, spoil: Callable[[str], Any]) -> None:
    with pytest.raises(kbatch.ConfigError, match=secret) as caught:
        kbatch.Producer({**SERVERS, **SECRETS, secret: spoil(SECRETS[secret])})
    assert_no_secret(texts_of(caught.value))


def topic(config: dict[str, Any]) -> kbatch.KafkaTopic[Any]:
    return kbatch.KafkaTopic("orders", mode=kbatch.SenderMode.INLINE, config=config)


@pytest.mark.parametrize(
    "take", [kbatch.Producer, aio.Producer, MemoryProducer, topic], ids=lambda take: take.__qualname__
)
@pytest.mark.parametrize("value", ["=", "", None, b"=", ["="], "\0", "\udcff"], ids=shown)
@pytest.mark.parametrize(
    ("key", "told"),
    [
        (f"sasl.password: {SECRET}", "sasl.password…"),  # YAML's habit, which a file's parser splits at the value's "="
        (f"sasl.password:{SECRET}", "sasl.password…"),
        (f"sasl.password {SECRET}", "sasl.password…"),
        (f"ssl.key.pem\n-----BEGIN {SECRET}", "ssl.key.pem…"),
        (f"sasl.password\0{SECRET}", "sasl.password…"),
        (f"\udcff{SECRET}", "…"),
        (SECRET, "hunter…"),
    ],
    ids=["yaml", "colon", "blank", "lines", "nul", "surrogate", "alone"],
)
def test_a_secret_in_a_key(take: Callable[[Any], Any], value: object, key: str, told: str) -> None:
    for config in ({**SERVERS, key: value}, {**SERVERS, "default.topic.config": {key: value}}):
        with pytest.raises(kbatch.ConfigError) as caught:
            take(config)
        assert str(caught.value).startswith(told)
        assert_no_secret(texts_of(caught.value))
        assert SECRET.encode() not in pickle.dumps(caught.value)


# What decides whether librdkafka looks at a value when it starts.
STARTS: tuple[dict[str, Any], ...] = (
    {},
    {"security.protocol": "ssl"},
    {"security.protocol": "sasl_ssl", "sasl.mechanisms": "PLAIN", "sasl.username": "me", "sasl.password": "x"},
    {"security.protocol": "sasl_plaintext", "sasl.mechanisms": "OAUTHBEARER", "sasl.oauthbearer.method": "oidc"},
)


@pytest.mark.parametrize("value", [SECRET, f"1{SECRET}", f"all,{SECRET}", f"{SECRET}/" * 60], ids=shown)
def test_a_secret_where_none_belongs(value: str, keys: list[Key], capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    refused = 0
    for key in keys:
        if is_harmless(key.name):
            continue
        for start in STARTS:
            error = refusal({**SERVERS, **start, key.name: value})
            if error is not None:
                refused += 1
                assert_no_secret(texts_of(error))
                assert SECRET.encode() not in pickle.dumps(error)
    assert refused > 100
    capfd.readouterr()


def test_a_password_before_the_name_of_a_broker() -> None:
    for key in ("bootstrap.servers", "metadata.broker.list"):
        with pytest.raises(kbatch.ConfigError, match=rf"^{key}: '@' is in no broker's name") as caught:
            kbatch.Producer({key: f"127.0.0.1:1,me:{SECRET}@kafka:9092"})
        assert_no_secret(texts_of(caught.value))


def test_a_harmless_value_is_shown() -> None:
    with pytest.raises(kbatch.ConfigError, match=r'compression\.type: Invalid value "gzpi"'):
        kbatch.Producer({**SERVERS, "compression.type": "gzpi"})


def test_values_are_harmless_for_keys_that_librdkafka_has(keys: list[Key]) -> None:  # noqa: F811
    texts = {key.name for key in keys if key.kind == "string" and is_harmless(key.name)}
    assert texts == {"plugin.library.paths", "partitioner", "broker.version.fallback"}


@pytest.mark.parametrize(
    ("bad", "options"),
    [
        ({"sasl.pasword": SECRET}, {}),
        ({"sasl.jaas.config": SECRET}, {}),
        ({"acks": "most"}, {}),
        ({"linger.ms": None}, {}),
        ({"acks": 1}, {}),  # a warning, which is an error here
        ({"acks": 0}, {}),
        ({"message.timeout.ms": 0}, {}),
        ({"delivery.report.only.error": True}, {}),
        ({"on_delivery": SECRET}, {}),
        ({"error_cb": SECRET}, {}),
        ({"logger": SECRET}, {}),
        ({"bootstrap.servers": None}, {}),
        ({7: SECRET}, {}),
        ({}, {"wire": "xml"}),
        ({}, {"source": 7}),
        ({}, {"close_timeout_s": -1}),
    ],
    ids=str,
)
def test_secrets_are_in_no_error_and_in_no_frame_of_it(bad: dict[Any, Any], options: dict[str, Any]) -> None:
    with pytest.raises((kbatch.ConfigError, UserWarning)) as caught:
        kbatch.Producer({**SERVERS, **SECRETS, **bad}, **options)
    assert_no_secret(texts_of(caught.value))
    assert SECRET.encode() not in pickle.dumps(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"security.protocol": "ssl"},
        {"security.protocol": "ssl", "ssl.key.pem": None, "ssl.ca.pem": SECRET},
        {"security.protocol": "ssl", "ssl.key.pem": None, "ssl.ca.pem": None, "ssl.keystore.location": __file__},
        {"security.protocol": "sasl_ssl", "sasl.mechanisms": "OAUTHBEARER", "sasl.oauthbearer.method": "oidc"},
        {"linger.ms": 5_000, "message.timeout.ms": 1_000},
    ],
    ids=str,
)
def test_secrets_are_not_in_what_librdkafka_refuses_at_the_first_use(config: dict[str, Any]) -> None:
    with kbatch.Producer({**SERVERS, **SECRETS, **config}) as producer:
        with pytest.raises(kbatch.ConfigError, match="librdkafka refused to start") as caught:
            producer.send_batch("orders", [kbatch.Envelope(1)])
        assert_no_secret(texts_of(caught.value))


def test_secrets_cannot_be_reached_from_a_producer_and_its_batches() -> None:
    config = {**SERVERS, **SECRETS, "error_cb": lambda error: None, "oauth_cb": lambda config: None}
    producer = kbatch.Producer(config)
    assert any("not started" in text for text in strings_within([repr(producer)]))  # it does find strings
    assert_no_secret(strings_within(producer))
    pending = producer.submit("orders", [kbatch.Envelope(1)])
    sender = kbatch.KafkaSender(producer, "orders")
    assert_no_secret(strings_within([producer, pending, sender]))
    with pytest.raises(kbatch.UndeliveredError) as caught:
        producer.close(0)
    assert_no_secret(strings_within([caught.value.with_traceback(None)]))  # the frames are this test's, too
    things = [producer, pending, sender, pending.report, *pending.report.errors.values()]
    assert_no_secret(strings_within(things))
    assert_no_secret(text for thing in things for text in (repr(thing), str(thing)))
    config.clear()


def test_neither_a_pickle_nor_a_copy() -> None:
    with kbatch.Producer({**SERVERS, **SECRETS}) as producer:
        parsed = ProducerConfig.parse({**SERVERS, **SECRETS})
        for thing in (
            producer,
            producer._core,
            producer._twin(),
            parsed,
            parsed.native,
            kbatch.KafkaSender(producer, "orders"),
        ):
            for attempt in (pickle.dumps, copy.deepcopy):
                with pytest.raises(TypeError) as caught:
                    attempt(thing)
                assert_no_secret(texts_of(caught.value))


def test_librdkafkas_lines_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    written = ""

    def told(what: str) -> bool:
        nonlocal written
        written += capfd.readouterr().err
        return what in written

    config = {**SERVERS, **SECRETS, "debug": "all", "log_level": 7, "sasl.mechanism": "PLAIN"}
    with kbatch.Producer(config) as producer:
        producer.submit("orders", [])
        until(lambda: told("sasl.username"), "the configuration")
        until(lambda: told("CONNECT"), "a connection")
    told("")
    assert SECRET not in written


def ask(secret: str, answer: object, config: str) -> object:
    """An ``oauth_cb`` with the secret as an argument, as confluent-kafka's example has it."""
    del secret
    if isinstance(answer, BaseException):
        raise answer
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        ZeroDivisionError("no token"),
        SystemExit(3),
        (SECRET, 0.0),  # expired
        (SECRET,),
        (SECRET, SECRET),
        (0.0, SECRET),
        (SECRET.encode(), time.time() + 9),
        (SECRET + "\udcff", time.time() + 9),
        (SECRET + "\0", time.time() + 9),
        (SECRET, time.time() + 9, "principal", {"auth": "reserved"}),
        (SECRET, time.time() + 9, "principal", {"scope": 7}),
        (SECRET, time.time() + 9, "principal", {"scope": f"{SECRET}\1"}),
        (SECRET, time.time() + 9, "principal", {SECRET: "orders"}),
        (SECRET, time.time() + 9, "principal", {"scope": f"{SECRET}\1" * 99}),
        [SECRET, time.time() + 9],
        SECRET,
    ],
    ids=lambda answer: shown(answer).replace(SECRET, "token")[:40],
)
def test_a_token_and_what_oauth_cb_was_made_with(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Any] = []
    config = {**OAUTH, **SECRETS, "oauth_cb": functools.partial(ask, SECRET, answer), "error_cb": errors.append}
    with kbatch.Producer(config) as producer:
        producer.submit("orders", [])
        until(lambda: any(error.name() == "_AUTHENTICATION" for error in errors), "the failure")
        until(lambda: caplog.records, "the log line")
    assert_no_secret(iter([error.str() for error in errors]))
    assert_no_secret(iter([caplog.text]))
    for record in caplog.records:
        assert record.levelno == logging.ERROR
        assert record.exc_info
        assert record.exc_info[1] is not None
        assert_no_secret(texts_of(record.exc_info[1]))
        assert_no_secret(iter([repr(record.args)]))
