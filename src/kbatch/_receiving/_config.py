"""A consumer's configuration: confluent-kafka's dict, checked as a whole before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kbatch._config import ClientConfig, begin_config, finish_config, set_key
from kbatch._errors import ConfigError
from kbatch._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kbatch._fastmap import Config

__all__ = ["ConsumerConfig"]

_DEFAULTS = {
    "auto.offset.reset": "earliest",  # a group that is new must not lose what was sent before it came
    "client.software.name": "kbatch",
    "client.software.version": __version__,
}
# Of kbatch, not of the user: it commits what is done, and nothing else.
_FIXED = {"enable.auto.commit": "false", "enable.auto.offset.store": "false"}

_WHOLE = "kbatch decodes values by the listener's types: give types={…}"
_REFUSED = {
    "on_commit": "a listener commits what is done and reports what fails to its logger",
    "key.deserializer": "keys are bytes; decode envelope.key in the handler",
    "value.deserializer": _WHOLE,
    "background_event_cb": "kbatch takes librdkafka's events itself: use error_cb, stats_cb, throttle_cb or oauth_cb",
}


@dataclass(frozen=True)
class ConsumerConfig(ClientConfig):
    """What `Listener` takes as ``config``."""

    group: str
    max_poll_interval_s: float
    partition_eof: bool = field(default=False)

    @classmethod
    def parse(cls, config: Mapping[str, Any], *, needs_group: bool = True) -> ConsumerConfig:
        """Checks `config` as a whole.

        Raises:
            ConfigError: An unknown key, a bad value, a contradiction, no ``bootstrap.servers`` or no ``group.id``.
        """
        callbacks, _, names, native = begin_config(config, _REFUSED)
        for key, value in _FIXED.items():
            if key in names and native.get(key) != value:
                raise ConfigError(
                    f"{names[key]}={native.get(key)}: librdkafka would commit what no handler has seen to its end; "
                    "leave it out, a listener commits by itself"
                )
            set_key(native, key, value)
        for key, value in _defaults(native).items():
            if key not in names:
                set_key(native, key, value)
        group = native.get("group.id") or ""
        if not group and needs_group:
            raise ConfigError("group.id is missing: the name by which listeners share the partitions of their topics")
        if not group:
            set_key(native, "group.id", "kbatch-reader")  # librdkafka wants one, also of who joins no group
        finish_config(native, callbacks)
        return cls(
            native=native,
            **callbacks,
            group=group,
            max_poll_interval_s=int(native.get("max.poll.interval.ms") or 300_000) / 1000,
            partition_eof=native.get("enable.partition.eof") == "true",
        )


def _defaults(native: Config) -> dict[str, str]:
    if native.get("group.protocol") == "consumer":  # its brokers decide, and librdkafka refuses what decides otherwise
        return _DEFAULTS
    return {**_DEFAULTS, "partition.assignment.strategy": "cooperative-sticky"}
