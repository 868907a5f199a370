"""What a number, a time or the name of a topic must be that a user gives."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kbatch._errors import ConfigError, type_name

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "check_close_timeout",
    "check_methods",
    "check_timeout",
    "check_topic",
    "check_whole",
    "is_number",
    "is_whole",
]

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_timeout(timeout: float | None) -> None:
    """Raises for a negative time: confluent-kafka's -1 waits for ever, and must not end a wait at once here."""
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout >= 0):  # nor NaN
        raise ValueError(f"timeout must be seconds, 0 or more, or None to wait as long as it takes, not {timeout!r}")


def check_close_timeout(close_timeout_s: Any) -> None:
    """Raises ConfigError for what is no time to wait at the end of a ``with`` block."""
    if not (is_number(close_timeout_s) and close_timeout_s >= 0):
        raise ConfigError(f"close_timeout_s must be seconds, 0 or more, not {close_timeout_s!r}")


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
    if not (is_whole(value) and 1 <= value < 2**bits):
        raise ConfigError(f"{name} must be an int from 1 to 2**{bits} - 1, not {value!r}")


def check_methods(name: str, value: object, wanted: str, methods: Collection[str]) -> None:
    """Raises ConfigError for what has not all of these methods."""
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if missing:
        raise ConfigError(f"{name} must be {wanted}, not {type_name(value)}, which has no method {missing[0]}")
