"""The options of agents and topics, checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kbatch._callbacks import call_fault, loops_own
from kbatch._errors import ConfigError
from kbatch._recovery._retry import RetryPolicy

if TYPE_CHECKING:
    from kbatch._base_producer import BaseProducer

__all__ = ["check_agent_options", "check_strict", "check_topic", "check_whole"]

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def check_agent_options(
    retry: Any,
    failures_to_open: Any,
    probe_interval_s: Any,
    max_probe_interval_s: Any,
    max_in_flight_batches: Any,
    strict_order: Any,
    stalled_after_s: Any,
    on_failed: Any,
    dead_letter_topic: Any,
    on_state_change: Any,
    *,
    takes_coroutines: bool,
) -> None:
    """Raises ConfigError for what an agent cannot take."""
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise ConfigError(f"retry must be a kbatch.RetryPolicy, not {type(retry).__name__}")
    check_whole("failures_to_open", failures_to_open)
    check_whole("max_in_flight_batches", max_in_flight_batches)
    for name, value in (
        ("probe_interval_s", probe_interval_s),
        ("max_probe_interval_s", max_probe_interval_s),
        ("stalled_after_s", stalled_after_s),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ConfigError(f"{name} must be seconds above 0, not {value!r}")
    if probe_interval_s > max_probe_interval_s:
        raise ConfigError(
            f"probe_interval_s={probe_interval_s!r} is longer than max_probe_interval_s={max_probe_interval_s!r}"
        )
    if not isinstance(strict_order, bool):
        raise ConfigError(f"strict_order must be bool, not {type(strict_order).__name__}")
    for name, value, arguments in (
        ("on_failed", on_failed, ("envelope", "error")),
        ("on_state_change", on_state_change, ("before", "after")),
    ):
        fault = None if value is None else call_fault(value, *arguments)
        if fault is not None:
            raise ConfigError(f"{name} {fault}")
        owned = None if takes_coroutines else loops_own(value)
        if owned is not None:
            raise ConfigError(f"{name} must not be {owned}; kbatch.aio's topics and agents take them")
    if dead_letter_topic is not None:
        check_topic("dead_letter_topic", dead_letter_topic)


def check_strict(producer: BaseProducer) -> None:
    """Raises ConfigError where a record's key, or its partition, does not follow from the envelope's key."""
    reason = None
    if producer._has_custom_wire:
        reason = (
            "a wire object of your own, which may write another record key than the envelope's; use a built-in wire"
        )
    elif producer._parsed.native.get("partitioner") == "random":
        reason = "partitioner=random, which spreads a key over partitions; choose another partitioner"
    if reason is not None:
        raise ConfigError(f"strict_order=True contradicts {reason}")


def check_topic(what: str, name: Any) -> None:
    """Raises ConfigError for what is no name of a topic."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} must be str, not {type(name).__name__}")
    if not _LEGAL_NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(
            f"{what} must be 1 to 249 letters, digits, '.', '_' and '-', as Kafka's topics are, not {name!r}"
        )


def check_whole(name: str, value: Any, bits: int = 31) -> None:
    """Raises ConfigError for what is no int of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**bits:
        raise ConfigError(f"{name} must be an int from 1 to 2**{bits} - 1, not {value!r}")
