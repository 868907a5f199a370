"""Every key that librdkafka documents, accepted or refused as confluent-kafka's Producer does it. Nothing is sent."""

import contextlib
import ctypes
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import cimpl

import kbatch
from kbatch._config import _CANONICAL, ProducerConfig, canonical
from kbatch._fastmap import Config

from ..refusals import refusal

SERVERS = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}

if sys.platform == "win32":
    pytest.skip("platform: librdkafka's list of keys is printed through libc's FILE", allow_module_level=True)


@dataclass(frozen=True)
class Key:
    name: str
    range: str  # "0 .. 900000", "true, false", "" for text
    default: str
    kind: str
    alias_of: str
    use: str  # "P" and "C", producers and consumers, or "*"


def read_keys(path: Path) -> list[Key]:
    """librdkafka's own CONFIGURATION.md, global and topic keys."""
    librdkafka, libc = ctypes.CDLL(cimpl.__file__), ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(os.fsencode(path), b"w"))
    librdkafka.rd_kafka_conf_properties_show(file)
    libc.fclose(file)
    keys = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if len(cells) == 6 and cells[0] != "Property":
            kind = re.search(r"\*Type: (.*)\*$", cells[5])
            alias = re.match(r"Alias for `(.*?)`", cells[5])
            more = (kind[1] if kind else "", alias[1] if alias else "", cells[1])
            keys.setdefault(cells[0], Key(cells[0], cells[2], cells[3], *more))
    return list(keys.values())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Key]:
    keys = read_keys(tmp_path_factory.mktemp("librdkafka") / "CONFIGURATION.md")
    names = {key.name for key in keys}
    assert len(keys) > 180
    assert {"acks", "client.id", "group.id", "sasl.password", "interceptors", "error_cb", "message.timeout.ms"} <= names
    return keys


def values_of(key: Key) -> Iterator[Any]:
    """Its default, its limits, what is just outside of them, and what it may not mean at all, in Python's types."""
    if key.name == "plugin.library.paths":
        yield from ("", "/no/such/plugin")
        return
    yield from ("", " ", "soon", None, True, False, "true", "T", 0, "0", 1, -1, 1.5, 5_000_000_000)
    if key.default:
        yield key.default
    if ".." in key.range:
        low, high = (int(number) for number in key.range.split(" .. "))
        yield from {low, high, low - 1, high + 1, str(high), str(high + 1), float(high)}
    elif "," in key.range:
        yield from (choice.strip() for choice in key.range.split(","))
        yield key.range


def _servers_beside(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in SERVERS.items() if canonical(key) not in map(canonical, config)}


def refused_by_confluent_kafka(config: dict[str, Any]) -> str | None:
    try:
        confluent_kafka.Producer({**SERVERS, **config})
    except (confluent_kafka.KafkaException, ValueError, TypeError) as error:
        return str(error)
    return None


def refused_by_kbatch(config: dict[str, Any]) -> kbatch.ConfigError | None:
    return refusal({**_servers_beside(config), **config})


NEVER_ANSWERED = "delivery reports would not come, or not before for ever"


def deliberate(key: str, value: Any, theirs: str | None, mine: kbatch.ConfigError | None) -> str | None:
    """Why kbatch differs from confluent-kafka here; None if it must not."""
    if key in ("bootstrap.servers", "metadata.broker.list") and not str(value or "").strip():
        return "without brokers, confluent-kafka starts and waits for ever"
    if key in ("acks", "request.required.acks") and mine is not None and "told as stored" in str(mine):
        return "nobody would confirm a message"
    if key in ("message.timeout.ms", "delivery.timeout.ms") and str(value) == "0":
        return NEVER_ANSWERED
    if key == "delivery.report.only.error":
        # confluent-kafka takes nothing but a bool here; librdkafka takes its usual words for it.
        return NEVER_ANSWERED if value is True else "the wrapper's own check" if "bool type" in (theirs or "") else None
    if key == "enable.gapless.guarantee" and "enable.idempotence" in (theirs or ""):
        return "it needs idempotence, which is kbatch's default"
    if key in ("linger.ms", "queue.buffering.max.ms") and value in (900_000, "900000"):
        return "above message.timeout.ms; librdkafka looks at it once a topic's key is set, as kbatch's acks"
    if key.endswith("_cb") and value is None and "callable" in (theirs or ""):
        return "None is no callback"
    if key == "sasl.oauthbearer.metadata.authentication.type" and value == "aws_iam":
        return "confluent-kafka brings an oauth_cb of its own for it; librdkafka takes the word"
    return None


@pytest.mark.long
def test_every_key_is_accepted_or_refused_as_by_confluent_kafka(
    keys: list[Key], capfd: pytest.CaptureFixture[str]
) -> None:
    differences, tried, accepted, reasons = [], 0, 0, set()
    for key in keys:
        for value in values_of(key):
            config = {key.name: value}
            theirs = refused_by_confluent_kafka(config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # idempotence that gives way
                mine = refused_by_kbatch(config)
            tried += 1
            accepted += mine is None
            if (mine is None) != (theirs is None):
                reason = deliberate(key.name, value, theirs, mine)
                reasons.add(reason)
                if reason is None:
                    differences.append((config, theirs, mine))
            elif mine is not None and key.name not in str(mine) and str(mine).split(": ", 1)[1] not in str(theirs):
                differences.append((config, theirs, mine))  # neither the key nor librdkafka's own words
    capfd.readouterr()
    assert not differences
    assert tried > 2_500
    assert accepted > 1_000
    assert len(reasons) >= 7  # the exceptions are real ones (librdkafka 2.12 has no aws_iam)


def test_every_alias_counts_as_one_key_with_its_other_name(keys: list[Key]) -> None:
    # By librdkafka itself: one name is set, and every other one is read.
    names = {key.name for key in keys} - {"default_topic_conf"}  # a pointer
    before = settings_of(names, None, None)
    pairs = set()
    for key in keys:
        for value in values_of(key):
            after = settings_of(names, key.name, value)
            if after and after[key.name] != before[key.name]:
                changed = {name for name in names if after[name] != before[name]}
                pairs |= {frozenset((key.name, name)) for name in changed - {key.name}}
                break
    assert len(pairs) >= 10
    known = {frozenset(pair) for pair in _CANONICAL.items()}
    assert {pair for pair in known if pair <= names} == pairs  # the older ones of librdkafka have fewer
    documented = {frozenset((key.name, key.alias_of)) for key in keys if key.alias_of}
    assert documented - pairs <= {
        frozenset(("enable.auto.commit", "auto.commit.enable"))
    }  # a consumer's topic key only


def settings_of(names: set[str], key: str | None, value: Any) -> dict[str, str | None]:
    """What librdkafka reads of each key after one was set; empty if it refuses the value."""
    config = Config()
    config.set("request.timeout.ms", "30000")  # before, topics have no settings to be read
    if key is not None:
        try:
            config.set(key, None if value is None else str(value))
        except ValueError:
            return {}
    return {name: config.get(name) for name in names}


def test_a_setting_may_be_given_by_each_of_its_names_alone() -> None:
    for alias, name in _CANONICAL.items():
        for value in ("5", "text", "none", "127.0.0.1:1"):
            configs = [{**SERVERS, key: value} for key in (alias, name)]
            if canonical(name) == "bootstrap.servers":
                configs = [{key: value} for key in (alias, name)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                outcomes = [_settings_or_refusal(config, name) for config in configs]
            assert outcomes[0] == outcomes[1], (alias, name, value)


def _settings_or_refusal(config: dict[str, Any], name: str) -> tuple[str | None, bool]:
    try:
        return ProducerConfig.parse(config).native.get(name), True
    except kbatch.ConfigError:
        return None, False


@pytest.mark.parametrize("key", ["linger", "group_id", "", "dr.cb", "bootstrap_servers"])
@pytest.mark.parametrize("value", ["5", None])
def test_an_unknown_key_is_refused_by_both(key: str, value: str | None) -> None:
    assert refused_by_confluent_kafka({key: value}) is not None
    assert f"{key} is not a configuration key" in str(refused_by_kbatch({key: value}))


def test_topic_keys_within_default_topic_config_are_as_by_confluent_kafka() -> None:
    for config in (
        {"default.topic.config": {"acks": "all"}, "acks": "most"},  # the nested one wins
        {"acks": "most", "default.topic.config": {"acks": "all"}},
        {"default.topic.config": {"acks": "most"}, "acks": "all"},
        {"default.topic.config": {"error_cb": 7}},
        {"default.topic.config": {"acks": None}},
        {"default.topic.config": "acks=all"},
        {"default.topic.config": None},
    ):
        theirs: object = None
        with contextlib.suppress(AttributeError):  # its way to refuse what is no mapping
            theirs = refused_by_confluent_kafka(config)
            assert (refused_by_kbatch(config) is None) == (theirs is None), config
            continue
        assert refused_by_kbatch(config) is not None, config
