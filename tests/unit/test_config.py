"""What a producer takes as its configuration, and what it says about the rest. No broker is needed: nothing is sent."""

import functools
import logging
import pickle
import traceback
import warnings
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import psutil
import pytest

import kbatch
from kbatch import ConfigError, aio
from kbatch._config import ProducerConfig, inherit

from ..naming import shown
from ..waiting import until

SERVERS = {"bootstrap.servers": "127.0.0.1:1"}
SECRET = "hunter2-hunter2"


def setting(config: Mapping[str, Any], key: str) -> str | None:
    """What librdkafka makes of a key of `config`, with kbatch's defaults."""
    return ProducerConfig.parse({**SERVERS, **config}).native.get(key)


def error_of(config: Any, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        kbatch.Producer(config, **options)
    return caught.value


def threads() -> set[int]:
    return {thread.id for thread in psutil.Process().threads()}


def start(config: Mapping[str, Any]) -> None:
    """Makes a producer and lets librdkafka start."""
    producer = kbatch.Producer({**SERVERS, "log_level": 0, **config})
    try:
        producer.submit("orders", [])
    finally:
        producer.close(0)


# -- the constructor starts nothing


def test_a_constructor_starts_no_thread() -> None:
    before = threads()
    producer = kbatch.Producer(
        {**SERVERS, "error_cb": print, "stats_cb": print, "oauth_cb": print, "logger": logging.getLogger()}
    )
    assert threads() <= before
    assert repr(producer) == "<kbatch.Producer not started>"
    assert (len(producer), bool(producer), producer.flush(0), producer.closed) == (0, True, 0, False)
    assert producer.close() == 0
    assert threads() <= before
    assert repr(producer) == "<kbatch.Producer closed>"


def test_mapping_starts_no_thread() -> None:
    before = threads()
    with kbatch.Producer(SERVERS) as producer:
        with pytest.raises(kbatch.SerializationError):
            producer.send_batch("orders", [kbatch.Envelope(object())])
        assert threads() <= before


# -- defaults and values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("acks", "-1"),
        ("enable.idempotence", "true"),
        ("linger.ms", "0"),
        ("client.software.name", "kbatch"),
        ("client.software.version", kbatch.__version__),
    ],
)
def test_defaults(key: str, value: str) -> None:
    assert setting({}, key) == value


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({"linger.ms": 5}, "linger.ms", "5"),
        ({"linger.ms": 0.25}, "linger.ms", "0.25"),
        ({"linger.ms": "7"}, "linger.ms", "7"),
        ({"queue.buffering.max.ms": 9}, "linger.ms", "9"),
        ({"enable.idempotence": False}, "enable.idempotence", "false"),
        ({"enable.idempotence": "f"}, "enable.idempotence", "false"),
        ({"socket.keepalive.enable": True}, "socket.keepalive.enable", "true"),
        ({"compression.type": "zstd"}, "compression.codec", "zstd"),
        ({"client.software.name": "mine"}, "client.software.name", "mine"),
        ({"client.id": "müller"}, "client.id", "müller"),
        ({"delivery.timeout.ms": 1_500}, "message.timeout.ms", "1500"),
        ({"default.topic.config": {"message.timeout.ms": 1_500}}, "message.timeout.ms", "1500"),
        ({"client.id": None}, "client.id", "rdkafka"),
        ({"transactional.id": None}, "linger.ms", "0"),
        ({"linger.ms": Decimal("2.5")}, "linger.ms", "2.5"),
        ({"ssl.ca.location": Path("/etc/ca.pem")}, "ssl.ca.location", "/etc/ca.pem"),
        ({"default.topic.config": {"acks": "all", "linger.ms": 3}, "linger.ms": 4}, "linger.ms", "3"),
        ({"log.queue": True}, "log.queue", "false"),  # nobody would take the lines
        ({"logger": logging.getLogger()}, "log.queue", "true"),
        ({"statistics.interval.ms": 100}, "statistics.interval.ms", "0"),  # nor statistics
        ({"statistics.interval.ms": 100, "stats_cb": print}, "statistics.interval.ms", "100"),
        ({"linger.ms": 5, "queue.buffering.max.ms": "5"}, "linger.ms", "5"),
        ({"default.topic.config": {"request.required.acks": "all"}, "acks": 0}, "acks", "-1"),
    ],
)
def test_values_reach_librdkafka(config: dict[str, Any], key: str, value: str) -> None:
    assert setting(config, key) == value


def test_what_the_mapping_needs_is_read_back() -> None:
    parsed = ProducerConfig.parse(SERVERS)
    assert (parsed.message_max_bytes, parsed.queue_max_bytes) == (1_000_000, 1_048_576 * 1024)
    assert parsed.delivery_timeout_s == 300.0
    given = {"message.max.bytes": 5_000, "queue.buffering.max.kbytes": 7, "request.timeout.ms": 5, "acks": "all"}
    parsed = ProducerConfig.parse({**SERVERS, **given, "delivery.timeout.ms": 1_500})
    assert (parsed.message_max_bytes, parsed.queue_max_bytes, parsed.delivery_timeout_s) == (5_000, 7 * 1024, 1.5)


def test_any_mapping_will_do() -> None:
    kbatch.Producer(MappingProxyType(SERVERS)).close()


def test_the_config_stays_the_callers() -> None:
    config = {**SERVERS, "retries": 0, "enable.idempotence": False}
    before = dict(config)
    kbatch.Producer(config).close()
    assert config == before


@pytest.mark.parametrize("key", ["bootstrap.servers", "metadata.broker.list"])
def test_both_names_of_the_brokers(key: str) -> None:
    kbatch.Producer({key: "127.0.0.1:1"}).close()


def test_an_empty_callback_is_none() -> None:
    names = ("error_cb", "stats_cb", "throttle_cb", "oauth_cb", "logger")
    start(dict.fromkeys(names))


# -- what is refused


@pytest.mark.parametrize("config", [None, "127.0.0.1:1", [("bootstrap.servers", "127.0.0.1:1")], 7])
def test_config_is_a_mapping(config: Any) -> None:
    assert str(error_of(config)).startswith("config must be a mapping of librdkafka's keys, not ")


@pytest.mark.parametrize("config", [{}, {"bootstrap.servers": ""}, {"bootstrap.servers": " "}, {"client.id": "x"}])
def test_brokers_are_needed(config: dict[str, Any]) -> None:
    assert str(error_of(config)).startswith("bootstrap.servers is missing")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"linger": 5}, "linger is not a configuration key of librdkafka"),
        ({"group_id": "x"}, "group_id is not a configuration key"),
        ({"": "x"}, " is not a configuration key"),
        ({"default.topic.config": {"lingerie": 1}}, "lingerie is not a configuration key"),
        ({7: "x"}, "configuration keys must be str, not int"),
        ({b"linger.ms": 1}, "configuration keys must be str, not bytes"),
        ({"linger.ms": "soon"}, 'linger.ms: Invalid value for configuration property "queue.buffering.max.ms"'),
        ({"acks": "most"}, "acks: Invalid value"),
        ({"enable.idempotence": "maybe"}, 'enable.idempotence: Expected bool value for "enable.idempotence"'),
        ({"message.max.bytes": 10}, "message.max.bytes: .* value 10 is outside allowed range 1000..1000000000$"),
        ({"linger.ms": [5]}, "linger.ms must be str, int, float, bool or a path, not list"),
        ({"client.id": b"x"}, "client.id must be str, int, float, bool or a path, not bytes"),
        ({"client.id": "a\0b"}, "client.id: a key and its value must not contain a NUL character"),
        ({"linger.ms\0": 5}, "linger.ms…: a key and its value must not contain a NUL"),
        ({"client.id": "\udcff"}, "client.id: not a valid value"),
        ({"linger.ms": "\udcff"}, "linger.ms: 'utf-8' codec can't encode"),
        ({"security.protocol": "tls"}, "security.protocol: not a valid value$"),
        (
            {"linger.ms": 5, "queue.buffering.max.ms": 6},
            "linger.ms and queue.buffering.max.ms are two names of one setting and have different values; give one",
        ),
        (
            {"default.topic.config": {"acks": 1, "request.required.acks": -1}},
            "acks and request.required.acks are two names of one setting",
        ),
        ({"opaque": "x"}, "opaque: Property .* must be set through"),
        ({"error_cb": 7}, "error_cb must be callable, not int"),
        ({"stats_cb": "print"}, "stats_cb must be callable, not str"),
        ({"logger": print}, "logger must have a log method as logging.Logger has, not builtin_function_or_method"),
        ({"lingerie": None}, "lingerie is not a configuration key"),
        ({"linger.ms": None}, "linger.ms: Float configuration property .* cannot be set to empty value"),
        ({"default.topic.config": {"on_delivery": print}}, "on_delivery is refused"),
        ({"default.topic.config": "acks=all"}, "default.topic.config is not a configuration key"),
        ({"delivery.report.only.error": True}, "delivery.report.only.error=true: acknowledgements would never arrive"),
        ({"default.topic.config": {"delivery.report.only.error": "true"}}, "delivery.report.only.error=true"),
        ({"message.timeout.ms": 0}, "message.timeout.ms=0 lets a batch wait for ever"),
        ({"delivery.timeout.ms": "0"}, "delivery.timeout.ms=0 lets a batch wait for ever"),
        ({"default.topic.config": {"message.timeout.ms": 0}}, "message.timeout.ms=0 lets a batch wait for ever"),
        ({"transactional.id": "x", "acks": 1}, "acks=1 contradicts transactional.id, which needs the idempotent"),
        (
            {"transactional.id": "x", "enable.idempotence": False},
            "enable.idempotence=false contradicts transactional.id",
        ),
        (
            {"transactional.id": "x", "delivery.timeout.ms": 60_001},
            "delivery.timeout.ms=60001 is longer than transaction.timeout.ms=60000",
        ),
        ({"transactional.id": "x", "max.in.flight": 6}, "max.in.flight=6 contradicts transactional.id"),
        ({"key.serializer": print}, r"key.serializer is refused: .* Envelope\(…, key=serialize\(key\)\)"),
        ({"value.serializer": None}, r"value.serializer is refused: .* Producer\(config, encoder=…\)"),
        ({"background_event_cb": print}, "background_event_cb is refused: .* use error_cb, stats_cb"),
        *(
            ({key: print}, rf"{key} is refused: .* send_batch's report, submit\(callback=…\) or a SenderCallback")
            for key in ("on_delivery", "dr_cb", "dr_msg_cb")
        ),
    ],
    ids=shown,
)
def test_bad_settings_are_named(config: dict[Any, Any], message: str) -> None:
    error = error_of({**SERVERS, **config})
    with pytest.raises(ConfigError, match=message):
        raise error
    assert isinstance(error, ValueError)


async def coroutine_function(*arguments: Any) -> None:
    """What confluent-kafka's AIOProducer takes for a callback."""


class CoroutineCallable:
    __call__ = coroutine_function


@pytest.mark.parametrize("key", ["error_cb", "stats_cb", "throttle_cb", "oauth_cb"])
@pytest.mark.parametrize("kind", ["function", "partial", "object"])
def test_a_callback_is_no_coroutine_function(key: str, kind: str) -> None:
    callbacks = {
        "function": coroutine_function,
        "partial": functools.partial(coroutine_function),
        "object": CoroutineCallable(),
    }
    error = error_of({**SERVERS, key: callbacks[kind]})
    assert str(error) == f"{key} must not be a coroutine function: it is called on a thread of the producer"


async def encode_later(message: object, context: object) -> bytes:
    raise AssertionError


class Later:
    """An object that is called like a coroutine function."""

    async def __call__(self, message: object, context: object) -> bytes:
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wire": "xml"}, "wire must be one of kbatch, wolverine, cloudevents, raw .*, not 'xml'"),
        ({"wire": 7}, r"wire must be a name or an object with a write\(\) method, not int"),
        ({"wire": None}, "wire must be a name or an object"),
        ({"encoder": "json"}, "encoder must be a msgspec encoder or callable, not str"),
        ({"encoder": encode_later}, "encoder must not be a coroutine function"),
        ({"encoder": Later()}, "encoder must not be a coroutine function"),
        ({"source": b"shop"}, "source must be str, not bytes"),
        ({"header_hook": {}}, "header_hook must be callable, not dict"),
        ({"carry_scheduled_time": 1}, "carry_scheduled_time must be bool, not int"),
        ({"carry_scheduled_time": None}, "carry_scheduled_time must be bool, not NoneType"),
        (
            {"carry_scheduled_time": True, "wire": "raw"},
            "carry_scheduled_time=True contradicts wire='raw', which has no place for it",
        ),
        ({"close_timeout_s": -1}, "close_timeout_s must be seconds, 0 or more, not -1"),
        ({"close_timeout_s": float("nan")}, "close_timeout_s must be seconds"),
        ({"close_timeout_s": None}, "close_timeout_s must be seconds"),
        ({"close_timeout_s": True}, "close_timeout_s must be seconds"),
        ({"max_in_flight": 0}, "max_in_flight must be an int from 1 to .*, not 0"),
        ({"max_in_flight": 1.5}, "max_in_flight must be an int from 1 to .*, not 1.5"),
        ({"max_in_flight": True}, "max_in_flight must be an int"),
        ({"max_in_flight": 1 << 80}, "max_in_flight must be an int"),
    ],
    ids=shown,
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kbatch.Producer(SERVERS, **options)


@pytest.mark.parametrize("encoder", [None, msgspec.json.Encoder(), msgspec.msgpack.Encoder(), lambda message, ctx: b""])
def test_encoders(encoder: Any) -> None:
    kbatch.Producer(SERVERS, encoder=encoder).close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"linger.ms": 5_000, "message.timeout.ms": 1_000}, "`message.timeout.ms` must be greater than `linger.ms`"),
        ({"security.protocol": "ssl", "ssl.ca.location": "/no/such/file"}, "ssl.ca.location failed"),
        ({"security.protocol": "ssl", "ssl.key.pem": SECRET}, "ssl.key.pem failed"),
    ],
)
def test_what_only_a_start_can_check_is_refused_at_the_first_use(config: dict[str, Any], message: str) -> None:
    before = threads()
    with kbatch.Producer({**SERVERS, "log_level": 0, **config}) as producer:
        for _ in range(2):  # it stays refused, and nothing is left behind
            with pytest.raises(ConfigError, match=f"librdkafka refused to start: .*{message}") as caught:
                producer.send_batch("orders", [kbatch.Envelope(1)])
            assert SECRET not in str(caught.value)
            assert len(producer) == 0
    until(lambda: threads() <= before, "the end of the threads")


# -- idempotence

# As kbatch is told, and as its message names it.
CONTRADICTIONS = [
    ({"acks": 1}, "acks=1"),
    ({"request.required.acks": 1}, "request.required.acks=1"),
    ({"default.topic.config": {"acks": 1}}, "acks=1"),
    ({"max.in.flight": 6}, "max.in.flight=6"),
    ({"max.in.flight.requests.per.connection": "0x10"}, "max.in.flight.requests.per.connection=16"),
    ({"retries": 0}, "retries=0"),
    ({"message.send.max.retries": "00"}, "message.send.max.retries=0"),
    ({"queuing.strategy": "LIFO"}, "queuing.strategy=lifo"),
    ({"queue.buffering.backpressure.threshold": 2}, "queue.buffering.backpressure.threshold=2"),
]


@pytest.mark.parametrize(("config", "named"), CONTRADICTIONS, ids=str)
def test_idempotence_gives_way_with_one_warning(config: dict[str, Any], named: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert setting(config, "enable.idempotence") == "false"
        kbatch.Producer({**SERVERS, **config}).close()
    assert len(caught) == 2  # one for each of the two
    assert str(caught[1].message).startswith(f"{named} does not allow the idempotent producer")
    assert caught[1].filename == __file__  # it points at the line that made the producer


@pytest.mark.parametrize(("config", "named"), CONTRADICTIONS, ids=str)
@pytest.mark.parametrize("idempotent", [True, "true", "T", "1"])
def test_a_contradiction_to_explicit_idempotence(config: dict[str, Any], named: str, idempotent: object) -> None:
    error = error_of({**SERVERS, **config, "enable.idempotence": idempotent})
    assert str(error) == f"{named} contradicts enable.idempotence=true"


@pytest.mark.parametrize("config", [config for config, named in CONTRADICTIONS if "acks" not in named], ids=str)
def test_explicitly_without_idempotence_there_is_no_warning(config: dict[str, Any]) -> None:
    start({**config, "enable.idempotence": False})


@pytest.mark.parametrize("more", [{}, {"enable.idempotence": False}], ids=str)
@pytest.mark.parametrize(
    ("config", "named"), [(config, named) for config, named in CONTRADICTIONS if "acks" in named], ids=str
)
def test_one_acknowledgement_warns_of_loss_whatever_is_confirmed(
    config: dict[str, Any], named: str, more: dict[str, Any]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kbatch.Producer({**SERVERS, **config, **more}).close()
    assert len(caught) == 1
    assert f"{named}: a message that was told as stored is lost if" in str(caught[0].message)
    assert ("does not allow the idempotent producer" in str(caught[0].message)) is not more
    assert caught[0].filename == __file__


@pytest.mark.parametrize("key", ["acks", "request.required.acks"])
@pytest.mark.parametrize("none", [0, "0", "00"])
@pytest.mark.parametrize("idempotent", [None, True, False])
def test_no_acknowledgements_are_refused(key: str, none: object, idempotent: bool | None) -> None:
    more = {} if idempotent is None else {"enable.idempotence": idempotent}
    for config in ({key: none, **more}, {"default.topic.config": {key: none}, **more}):
        error = error_of({**SERVERS, **config})
        assert str(error).startswith(f"{key}=")
        assert "would be told as stored" in str(error)


@pytest.mark.parametrize(
    "config",
    [
        {"acks": "all"},
        {"acks": -1},
        {"acks": "ALL"},
        {"max.in.flight": 5},
        {"max.in.flight": 1},
        {"retries": 1},
        {"queuing.strategy": "fifo"},
        {"queue.buffering.backpressure.threshold": 1},
    ],
    ids=shown,
)
def test_what_idempotence_allows(config: dict[str, Any]) -> None:
    start(config)
    assert setting(config, "enable.idempotence") == "true"


@pytest.mark.parametrize(("config", "named"), CONTRADICTIONS, ids=str)
def test_librdkafka_would_refuse_the_contradictions(config: dict[str, Any], named: str) -> None:
    # kbatch's list is librdkafka's: what gives way above could not have started otherwise.
    from confluent_kafka import KafkaException, Producer

    with pytest.raises((KafkaException, ValueError), match=r"enable\.idempotence"):
        Producer({**SERVERS, **config, "enable.idempotence": True})


# -- secrets

SECRETS = {
    "sasl.password": SECRET,
    "ssl.key.password": SECRET,
    "ssl.keystore.password": SECRET,
    "ssl.key.pem": f"-----BEGIN {SECRET}",
    "sasl.oauthbearer.client.secret": SECRET,
    "sasl.oauthbearer.config": SECRET,
    "sasl.oauthbearer.assertion.private.key.passphrase": SECRET,
}


@pytest.mark.parametrize(
    "bad",
    [
        {"sasl.pasword": SECRET},
        {"acks": "most"},
        {"sasl.password": SECRET + "\0"},
        {"sasl.password": SECRET.encode()},
        {"sasl.password": [SECRET]},
        {"ssl.key.password": SECRET + "\udcff"},
        {"sasl.jaas.config": SECRET},
        {"on_delivery": SECRET},
        {"acks": 0, "enable.idempotence": True},
        {"bootstrap.servers": None},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_secrets_are_in_no_error(bad: dict[str, Any]) -> None:
    error = error_of({**SERVERS, **SECRETS, **bad})
    texts = [str(error), repr(error), repr(error.args), repr(error.__dict__), *traceback.format_exception(error)]
    assert not any(SECRET in text for text in texts)
    assert SECRET.encode() not in pickle.dumps(error)


def test_secrets_are_in_no_repr() -> None:
    parsed = ProducerConfig.parse({**SERVERS, **SECRETS})
    assert SECRET not in repr(parsed)
    assert "127.0.0.1" not in repr(parsed)
    with kbatch.Producer({**SERVERS, **SECRETS}) as producer:
        texts = [repr(producer), str(producer), repr(vars(producer)), repr(kbatch.KafkaSender(producer, "orders"))]
        assert not any(SECRET in text for text in texts)


def test_a_producer_is_not_pickled() -> None:
    with kbatch.Producer({**SERVERS, **SECRETS}) as producer:
        for thing in (producer, producer._core):
            with pytest.raises(TypeError):
                pickle.dumps(thing)
    with pytest.raises(TypeError):
        pickle.dumps(ProducerConfig.parse({**SERVERS, **SECRETS}))


def test_secrets_are_not_logged() -> None:
    lines: list[str] = []

    class Logger:
        def log(self, level: int, text: str, *arguments: object) -> None:
            lines.append(text % arguments)

    config = {"debug": "all", "log_level": 7, "sasl.mechanism": "PLAIN", "sasl.username": "u", **SECRETS}
    with kbatch.Producer({**SERVERS, **config, "logger": Logger()}) as producer:
        producer.submit("orders", [])
        # librdkafka tells its configuration, and what it does.
        until(lambda: any("sasl.username" in line for line in lines), "the configuration")
        until(lambda: any("CONNECT" in line for line in lines), "a connection")
    assert not any(SECRET in line for line in lines)


# -- a configuration that inherits another


@pytest.mark.parametrize(
    ("shared", "own", "expected"),
    [
        ({"acks": 1}, {}, {"acks": 1}),
        ({}, {"acks": 1}, {"acks": 1}),
        ({"acks": 1, "retries": 2}, {"acks": -1}, {"acks": -1, "retries": 2}),
        ({"delivery.timeout.ms": 1}, {"message.timeout.ms": 2}, {"message.timeout.ms": 2}),
        ({"message.timeout.ms": 1}, {"delivery.timeout.ms": 2}, {"delivery.timeout.ms": 2}),
        ({"sasl.mechanism": "PLAIN"}, {"sasl.mechanisms": "SCRAM-SHA-256"}, {"sasl.mechanisms": "SCRAM-SHA-256"}),
        ({"request.required.acks": 1}, {"acks": None}, {"acks": None}),
        ({"default.topic.config": {"acks": 1}}, {"acks": 0}, {"acks": 0}),
        ({"acks": 1}, {"default.topic.config": {"request.required.acks": 0}}, {"request.required.acks": 0}),
        ({"acks": 1, "default.topic.config": {"acks": 0}}, {}, {"acks": 0}),
        ({"error_cb": print}, {"error_cb": None}, {"error_cb": None}),
    ],
    ids=shown,
)
def test_one_inherits_the_other_key_by_key(
    shared: dict[str, Any], own: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = str((shared, own))
    assert inherit(shared, own) == expected
    assert str((shared, own)) == before


def fingerprint(config: dict[str, Any]) -> bytes:
    return ProducerConfig.parse({**SERVERS, **config}).fingerprint


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {}, True),
        ({"linger.ms": 5, "client.id": "x"}, {"client.id": "x", "linger.ms": "5"}, True),
        ({"linger.ms": 5}, {"queue.buffering.max.ms": 5.0}, True),
        ({"message.timeout.ms": 9}, {"default.topic.config": {"delivery.timeout.ms": 9}}, True),
        ({"acks": "all"}, {}, True),
        ({"acks": -1, "enable.idempotence": "T", "linger.ms": 0}, {}, True),
        ({"linger.ms": 5}, {"linger.ms": 6}, False),
        ({"linger.ms": 5}, {}, False),
        ({"client.id": "x"}, {"client.rack": "x"}, False),
        ({"sasl.password": SECRET}, {"sasl.password": SECRET}, True),
        ({"sasl.password": SECRET}, {"sasl.password": SECRET + "."}, False),
        ({"sasl.username": "a", "sasl.password": "b"}, {"sasl.username": "b", "sasl.password": "a"}, False),
        ({"ssl.key.pem": SECRET}, {"ssl.key.pem": SECRET + "."}, False),
        ({"bootstrap.servers": "127.0.0.1:2"}, {}, False),
    ],
    ids=shown,
)
def test_fingerprints_agree_where_settings_do(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert (fingerprint(one) == fingerprint(other)) is same


def test_every_key_that_can_be_set_changes_the_fingerprint() -> None:
    # librdkafka does not read everything back.
    for key, value in (("plugin.library.paths", ""), ("ssl.ca.pem", "x"), ("sasl.oauthbearer.config", "x")):
        assert fingerprint({key: value}) != fingerprint({}), key


def test_the_warning_names_the_callers_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kbatch.Producer({**SERVERS, "acks": 1})
        aio.Producer({**SERVERS, "acks": 1})
    assert [warning.filename for warning in caught] == [__file__] * 2
