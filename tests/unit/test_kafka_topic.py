"""KafkaTopic: what it takes and refuses, which topics share a producer, and that it shows no password."""

import ast
import copy
import dataclasses
import gc
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

import kbatch
from kbatch import ConfigError, KafkaTopic, SenderMode, _options, aio
from kbatch._options import AgentOptions
from kbatch._recovery import _handle
from kbatch._sending import _topic

from ..naming import shown
from .test_secrets import SECRET, SECRETS, assert_no_secret, strings_within, texts_of

SERVERS = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


@pytest.fixture(autouse=True)
def nothing_stays_shared() -> Iterator[None]:
    yield
    gc.collect()
    assert not list(_handle._shared.values())


@pytest.fixture(params=[KafkaTopic, aio.KafkaTopic], ids=["blocking", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def topic(kind: Any = KafkaTopic, **options: Any) -> Any:
    """By default with a configuration of its own, which `config` adds to."""
    if isinstance(config := options.get("config", {}), dict) and "producer" not in options:
        options["config"] = {**SERVERS, **config}
    return kind(**{"name": "orders", "mode": SenderMode.INLINE, **options})


def producer_of(sender: Any) -> Any:
    handle = sender._handle if hasattr(sender, "_handle") else sender.agent._handle
    return handle.producer


def close(sender: Any) -> int:
    """Of either kind."""
    if isinstance(sender, (kbatch.InlineSender, aio.InlineSender)):
        sender._begin_closing()
        return sender._use.release(0)
    left: int = sender._close(0)
    return left


# -- what it is


@pytest.mark.parametrize("mode", [SenderMode.INLINE, SenderMode.BUFFERED])
def test_the_mode_says_what_is_made(kind: Any, mode: SenderMode) -> None:
    sender = topic(kind, mode=mode).create_sender()
    place = aio if kind is aio.KafkaTopic else kbatch
    assert type(sender) is (place.InlineSender if mode is SenderMode.INLINE else place.BatchedSender)
    assert type(producer_of(sender)) is place.Producer
    assert (sender.topic if mode is SenderMode.INLINE else sender.agent.topic) == "orders"
    assert close(sender) == 0
    assert producer_of(sender).closed


def test_the_mode_may_stand_second(kind: Any) -> None:
    assert kind("orders", SenderMode.INLINE, config=SERVERS) == topic(kind)


def test_a_value_that_does_not_change() -> None:
    one = topic(mode=SenderMode.BUFFERED, batch_size=7)
    assert (one.name, one.mode, one.batch_size, one.batch_bytes, one.strict_order) == (
        *("orders", SenderMode.BUFFERED, 7, 1_000_000, False),
    )
    assert topic().batch_size is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.batch_size = 8
    assert one == topic(mode=SenderMode.BUFFERED, batch_size=7, max_buffered=100_000)
    assert hash(one) == hash(topic(mode=SenderMode.BUFFERED, batch_size=7))
    for other in ({"batch_size": 8}, {"name": "others"}, {"config": {"acks": "all", "linger.ms": 1}}, {"source": "x"}):
        assert one != topic(**{"mode": SenderMode.BUFFERED, "batch_size": 7, **other}), other
    assert topic() != topic(aio.KafkaTopic)


def test_options_reach_the_sender_and_its_agent() -> None:
    policy = kbatch.RetryPolicy(max_attempts=3)
    made = topic(
        mode=SenderMode.BUFFERED,
        retry=policy,
        max_in_flight_batches=2,
        on_failed=print,
        close_timeout_s=7.0,
        batch_size=8,
        batch_bytes=9_000,
        max_buffered=10,
        max_buffered_bytes=10_000,
        dead_letter_topic="dead",
    )
    with made.create_sender() as sender:
        agent = sender.agent
        assert agent._options == AgentOptions(
            retry=policy, max_in_flight_batches=2, on_failed=print, dead_letter_topic="dead"
        )
        assert (sender.batch_size, sender.batch_bytes, sender._close_timeout) == (8, 9_000, 7.0)
        assert sender.max_buffered_bytes == 10_000
    with topic(close_timeout_s=8.0).create_sender() as sender:
        assert sender._close_timeout == 8.0


# -- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": None}, "name must be str, not NoneType"),
        ({"name": ""}, "name must be 1 to 249 letters"),
        ({"name": "a b"}, "name must be 1 to 249 letters"),
        ({"name": "orders\n"}, "name must be 1 to 249 letters"),
        ({"name": ".."}, "name must be 1 to 249 letters"),
        ({"name": "x" * 250}, "name must be 1 to 249 letters"),
        (
            {"mode": "inline"},
            "mode must be kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED or kbatch.SenderMode.DURABLE, "
            "not 'inline'",
        ),
        ({"mode": SenderMode.DURABLE}, "outbox is missing: SenderMode.DURABLE sends through one"),
        ({"batch_size": 5}, "batch_size: not with SenderMode.INLINE"),
        ({"retry": kbatch.RetryPolicy(), "batch_bytes": 1}, "batch_bytes, retry: not with SenderMode.INLINE"),
        ({"strict_order": False}, "strict_order: not with SenderMode.INLINE"),
        ({"close_timeout_s": -1}, "close_timeout_s must be seconds, 0 or more"),
        ({"mode": SenderMode.BUFFERED, "batch_size": 0}, "batch_size must be an int from 1"),
        ({"mode": SenderMode.BUFFERED, "batch_bytes": 1.5}, "batch_bytes must be an int from 1"),
        ({"mode": SenderMode.BUFFERED, "batch_timeout_ms": -1}, "batch_timeout_ms must be milliseconds, 0 or more"),
        ({"mode": SenderMode.BUFFERED, "batch_timeout_ms": float("nan")}, "batch_timeout_ms must be milliseconds"),
        (
            {"mode": SenderMode.BUFFERED, "max_buffered_bytes": 10},
            "max_buffered_bytes=10 is less than batch_bytes=1000000",
        ),
        ({"mode": SenderMode.BUFFERED, "max_buffered": 10}, "max_buffered=10 is less than batch_size=1000"),
        ({"mode": SenderMode.BUFFERED, "retry": 3}, "retry must be a kbatch.RetryPolicy, not int"),
        ({"mode": SenderMode.BUFFERED, "max_in_flight_batches": True}, "max_in_flight_batches must be an int from 1"),
        ({"mode": SenderMode.BUFFERED, "failures_to_open": 0}, "failures_to_open must be an int from 1"),
        (
            {"mode": SenderMode.BUFFERED, "probe_interval_s": 60},
            "probe_interval_s=60 is longer than max_probe_interval_s",
        ),
        ({"mode": SenderMode.BUFFERED, "strict_order": 1}, "strict_order must be bool, not int"),
        ({"mode": SenderMode.BUFFERED, "on_failed": 7}, "on_failed must be callable, not int"),
        ({"mode": SenderMode.BUFFERED, "on_state_change": "x"}, "on_state_change must be callable, not str"),
        ({"mode": SenderMode.BUFFERED, "dead_letter_topic": "a b"}, "dead_letter_topic must be 1 to 249 letters"),
        (
            {"mode": SenderMode.BUFFERED, "dead_letter_topic": "orders"},
            "dead_letter_topic must not be the topic itself",
        ),
        ({"producer": None}, "producer and config are missing: give a kbatch.Producer as producer=, or librdkafka's"),
        ({"config": None}, "producer and config are missing"),
        ({"producer": SERVERS}, "producer must be a kbatch.Producer, not dict; give librdkafka's keys as config="),
        ({"producer": SERVERS, "config": SERVERS}, "producer must be a kbatch.Producer, not dict"),
        ({"producer": "127.0.0.1:1"}, "producer must be a kbatch.Producer, not str"),
        ({"config": 7}, "config must be a mapping of librdkafka's keys, not int"),
        ({"config": {"lingre.ms": 1}}, "lingre.ms is not a configuration key"),
        ({"config": {"bootstrap.servers": None}}, "bootstrap.servers is missing"),
        ({"config": {"acks": 1, "enable.idempotence": True}}, "acks=1 contradicts enable.idempotence=true"),
        ({"wire": "xml"}, "wire must be one of"),
        ({"encoder": 7}, "encoder must be a msgspec encoder or callable"),
        ({"max_in_flight": 0}, "max_in_flight must be an int"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topic(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        {"config": {}},
        {"wire": "kbatch"},
        {"encoder": msgspec.json.Encoder()},
        {"source": "x"},
        {"header_hook": dict},
        {"max_in_flight": 5},
        {"carry_scheduled_time": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_producer_has_already_is_refused(kind: Any, options: dict[str, Any]) -> None:
    producer = kbatch.Producer(SERVERS) if kind is KafkaTopic else aio.Producer(SERVERS)
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: not with producer=, which has its settings already"):
        topic(kind, producer=producer, **options)


def test_a_producer_of_the_other_kind() -> None:
    with pytest.raises(ConfigError, match=r"kbatch\.KafkaTopic takes no kbatch\.aio\.Producer; use kbatch\.aio\.Kaf"):
        topic(producer=aio.Producer(SERVERS))
    with pytest.raises(ConfigError, match=r"kbatch\.aio\.KafkaTopic takes no kbatch\.Producer; use kbatch\.KafkaTopic"):
        topic(aio.KafkaTopic, producer=kbatch.Producer(SERVERS))


def test_a_warning_names_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="idempotent") as caught:
        topic(config={"acks": 1})
    assert [warning.filename for warning in caught] == [__file__]


# -- sharing


class Hooks:
    def hook(self) -> None:
        return None


class Wire:
    def write(self, envelope: Any) -> Any:
        return None, b"", None


HOOKS = Hooks()
WIRE = Wire()
ENCODER = msgspec.json.Encoder()
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"name": "others"}),
    ({}, {"mode": SenderMode.BUFFERED, "batch_size": 5}),
    ({}, {"close_timeout_s": 1}),
    ({}, {"carry_scheduled_time": False}),
    ({}, {"config": {"acks": "all", "linger.ms": "0"}, "wire": "kbatch", "max_in_flight": 10_000}),
    ({"config": {"delivery.timeout.ms": 9}}, {"config": {"message.timeout.ms": 9}}),
    ({"config": {"error_cb": print}}, {"config": {"error_cb": print}}),
    ({"config": {"error_cb": print}}, {"config": {"default.topic.config": {"error_cb": print}}}),
    ({"config": {"error_cb": None}}, {}),
    ({"config": SECRETS}, {"config": dict(SECRETS)}),
    ({"header_hook": HOOKS.hook}, {"header_hook": HOOKS.hook}),
    ({"wire": WIRE}, {"wire": WIRE}),
    ({"encoder": ENCODER, "source": "x"}, {"encoder": ENCODER, "source": "x"}),
]
OTHER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"config": {"linger.ms": 5}}),
    ({}, {"config": {"bootstrap.servers": "127.0.0.1:2"}}),
    ({}, {"config": {"error_cb": print}}),
    ({"config": {"error_cb": print}}, {"config": {"error_cb": repr}}),
    ({"config": {"oauth_cb": print}}, {"config": {"stats_cb": print}}),
    ({"config": SECRETS}, {"config": {**SECRETS, "sasl.password": SECRET + "."}}),
    ({}, {"wire": "raw"}),
    ({"wire": WIRE}, {"wire": Wire()}),
    ({"encoder": msgspec.json.Encoder()}, {"encoder": msgspec.json.Encoder()}),
    ({}, {"source": "x"}),
    ({"header_hook": HOOKS.hook}, {"header_hook": Hooks().hook}),
    ({}, {"max_in_flight": 5}),
    ({}, {"carry_scheduled_time": True}),
]


@pytest.mark.parametrize(
    ("one", "other", "same"), [(*pair, True) for pair in SAME] + [(*pair, False) for pair in OTHER], ids=shown
)
def test_topics_share_a_producer_where_their_settings_agree(
    kind: Any, one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    first, second = topic(kind, **one).create_sender(), topic(kind, **other).create_sender()
    producer = producer_of(first)
    assert (producer is producer_of(second)) is same
    assert close(first) == 0
    assert producer.closed is not same
    assert not producer_of(second).closed
    assert close(second) == 0
    assert producer_of(second).closed


def test_the_last_sender_closes_and_the_next_begins_anew() -> None:
    one = topic()
    first = one.create_sender()
    second = one.create_sender()
    buffered = topic(mode=SenderMode.BUFFERED).create_sender()
    producer = producer_of(first)
    assert producer_of(second) is producer_of(buffered) is producer
    buffered.close()
    second.close()
    second.close()
    assert not producer.closed
    first.close()
    assert producer.closed
    with one.create_sender() as sender:
        assert producer_of(sender) is not producer
        assert not producer_of(sender).closed


def test_blocking_and_asyncio_do_not_share() -> None:
    first, second = topic().create_sender(), topic(aio.KafkaTopic).create_sender()
    assert producer_of(first) is not producer_of(second)
    close(first)
    close(second)


@pytest.mark.parametrize("mode", [SenderMode.INLINE, SenderMode.BUFFERED])
def test_a_given_producer_stays_the_callers(mode: SenderMode) -> None:
    with kbatch.Producer(SERVERS) as producer:
        made = topic(mode=mode, producer=producer)
        for _ in range(2):
            with made.create_sender() as sender:
                assert producer_of(sender) is producer
        assert not producer.closed


def test_the_callers_dict_stays_theirs() -> None:
    own = {**SERVERS, "linger.ms": 6}
    made = KafkaTopic("orders", SenderMode.INLINE, config=own)
    assert own == {**SERVERS, "linger.ms": 6}
    own["linger.ms"] = 7
    assert made == topic(config={"linger.ms": 6})


def test_a_sender_that_cannot_be_made_holds_no_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = topic(mode=SenderMode.BUFFERED)
    held = topic().create_sender()
    monkeypatch.setattr(KafkaTopic, "_agent_class", None)
    with pytest.raises(TypeError):
        made.create_sender()
    producer = producer_of(held)
    held.close()
    assert producer.closed


# -- secrets


def test_no_secret_can_be_reached() -> None:
    made = topic(config={**SECRETS, "sasl.password": SECRET})
    sender = made.create_sender()
    assert any("orders" in text for text in strings_within(made))  # it does find strings
    assert_no_secret(strings_within([made, sender, dict(_handle._shared)]))
    assert_no_secret(text for thing in (made, sender) for text in (repr(thing), str(vars(thing))))
    close(sender)


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "a b"},
        {"mode": SenderMode.DURABLE},
        {"batch_size": 5},
        {"producer": SECRETS},
        {"producer": {**SERVERS, **SECRETS}, "config": SECRETS},
        {"config": {"lingre.ms": SECRET}},
        {"config": {"sasl.password": [SECRET]}},
        {"config": {"acks": 1}},  # a warning, which is an error here
        {"wire": "xml"},
        {"close_timeout_s": -1},
    ],
    ids=str,
)
def test_no_secret_is_in_an_error_or_its_frames(kind: Any, bad: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UserWarning)) as caught:
        topic(kind, **{**bad, "config": {**SECRETS, **bad.get("config", {})}})
    assert_no_secret(texts_of(caught.value))


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.deepcopy])
def test_neither_a_pickle_nor_a_deep_copy(attempt: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        attempt(topic(config=SECRETS))
    assert_no_secret(texts_of(caught.value))


def annotations_of(module: Any, name: str) -> dict[str, str]:
    """What a class in `if TYPE_CHECKING` declares."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    (found,) = (node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(each.target): ast.unparse(each.annotation) for each in fields}


@pytest.mark.parametrize("name", ["Batching", "Agent"])
def test_what_type_checkers_are_told_is_what_senders_and_agents_take(name: str) -> None:
    options = getattr(_options, f"{name}Options")
    assert annotations_of(_options, f"{name}Keywords") == {each.name: each.type for each in dataclasses.fields(options)}


def test_what_type_checkers_are_told_is_what_it_takes() -> None:
    told = {**annotations_of(_topic, "Options"), **annotations_of(_topic, "OptionsWithConfig")}
    assert set(annotations_of(_topic, "OptionsWithConfig")) < set(inspect.signature(kbatch.Producer).parameters)
    for name in ("BatchingKeywords", "AgentKeywords"):
        keywords = annotations_of(_options, name)
        told |= {option: kind.replace("_Unset", "None") for option, kind in keywords.items()}
    taken = inspect.signature(_topic.BaseTopic.__init__).parameters.values()
    own = ("self", "name", "mode", "producer", "config", "outbox", "relay")
    assert told == {each.name: each.annotation for each in taken if each.name not in own}
    of_relays = inspect.signature(kbatch.Relay.__init__).parameters.values()
    not_of_topics = ("self", "outbox", "producer", "close_timeout_s")
    of_relays_own = {each.name: each.annotation for each in of_relays if each.name not in not_of_topics}
    assert annotations_of(_options, "RelayKeywords") == of_relays_own


def test_an_option_that_nothing_has_is_refused_as_python_does(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"KafkaTopic\(\) got an unexpected keyword argument 'colour'") as caught:
        topic(kind, config=SECRETS, colour="red")
    assert_no_secret(texts_of(caught.value))
    with pytest.raises(TypeError, match="'colour'"):
        topic(kind, colour=None)
    with kbatch.Producer(SERVERS) as producer:
        with pytest.raises(TypeError, match=r"SendingAgent\(\) got an unexpected keyword argument 'batch_size'"):
            kbatch.SendingAgent(producer, "orders", batch_size=1)  # type: ignore[call-arg]
        agent = kbatch.SendingAgent(producer, "orders")
        with pytest.raises(TypeError, match=r"BatchedSender\(\) got an unexpected keyword argument 'retry'"):
            kbatch.BatchedSender(agent, retry=None)  # type: ignore[call-arg]
