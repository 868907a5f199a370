"""What a batched sender, its agent and a relay are told: each option with its type, its default and its check, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kbatch._callbacks import call_fault, loops_own
from kbatch._checks import check_topic, check_whole, is_number, is_whole
from kbatch._errors import ConfigError, type_name
from kbatch._recovery._retry import RetryPolicy

if TYPE_CHECKING:
    from typing import Literal, TypedDict

    from kbatch._errors import KbatchError
    from kbatch._fastmap import Envelope
    from kbatch._outbox._dead_letters import DeadLetter
    from kbatch._recovery._circuit import CircuitState

__all__ = [
    "AgentOptions",
    "AioAgentOptions",
    "AioRelayOptions",
    "BatchingOptions",
    "RelayOptions",
    "check_option",
    "shows",
    "taken",
]

_F = TypeVar("_F", bound=Callable[..., object])
# What an option may be besides. Of a topic: None, for the default, or in a mode that has no such option. Else: Never.
_Unset = TypeVar("_Unset")


@dataclass(frozen=True, kw_only=True)
class BatchingOptions(Generic[_Unset]):
    """How single envelopes become batches; `BatchedSender` tells what each is.

    Raises:
        ConfigError: A value of the wrong type or out of its range, or two that contradict each other.
    """

    batch_size: int | _Unset = 1000
    batch_bytes: int | _Unset = 1_000_000
    batch_timeout_ms: float | _Unset = 5.0
    max_buffered: int | _Unset = 100_000
    max_buffered_bytes: int | None = None

    def __post_init__(self: BatchingOptions[Any]) -> None:
        for name in ("batch_size", "batch_bytes", "max_buffered"):
            check_whole(name, getattr(self, name))
        if self.max_buffered_bytes is not None:
            check_whole("max_buffered_bytes", self.max_buffered_bytes, 62)
        if self.max_buffered < self.batch_size:
            raise ConfigError(
                f"max_buffered={self.max_buffered} is less than batch_size={self.batch_size}: no batch would be full"
            )
        if self.max_buffered_bytes is not None and self.max_buffered_bytes < self.batch_bytes:
            raise ConfigError(
                f"max_buffered_bytes={self.max_buffered_bytes} is less than batch_bytes={self.batch_bytes}: "
                "no batch would be full"
            )
        timeout_ms = self.batch_timeout_ms
        if not (is_number(timeout_ms) and 0 <= timeout_ms < 1e9):
            raise ConfigError(f"batch_timeout_ms must be milliseconds, 0 or more and below 1e9, not {timeout_ms!r}")


@dataclass(frozen=True, kw_only=True)
class AgentOptions(Generic[_Unset]):
    """How batches are sent, and what becomes of what fails; `SendingAgent` tells what each is.

    Raises:
        ConfigError: A value of the wrong type or out of its range, or two that contradict each other.
    """

    retry: RetryPolicy | None = None
    failures_to_open: int | _Unset = 3
    probe_interval_s: float | _Unset = 1.0
    max_probe_interval_s: float | _Unset = 30.0
    max_in_flight_batches: int | _Unset = 5
    strict_order: bool | _Unset = False
    stalled_after_s: float | _Unset = 30.0
    on_failed: Callable[[Envelope[Any], KbatchError], object] | None = None
    dead_letter_topic: str | None = None
    on_state_change: Callable[[CircuitState, CircuitState], object] | None = None

    _takes_coroutines: ClassVar[bool] = False

    def __post_init__(self: AgentOptions[Any]) -> None:
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise ConfigError(f"retry must be a kbatch.RetryPolicy, not {type_name(self.retry)}")
        check_whole("failures_to_open", self.failures_to_open)
        check_whole("max_in_flight_batches", self.max_in_flight_batches)
        _check_sending(self, "probe_interval_s", "max_probe_interval_s", "stalled_after_s")
        who = None if self._takes_coroutines else "kbatch.aio's topics and agents take them"
        check_option("on_failed", self.on_failed, "envelope", "error", elsewhere=who)
        check_option("on_state_change", self.on_state_change, "before", "after", elsewhere=who)
        if self.dead_letter_topic is not None:
            check_topic("dead_letter_topic", self.dead_letter_topic)


class AioAgentOptions(AgentOptions[_Unset]):
    """The same for asyncio, where callbacks may be coroutine functions, and asyncio's self."""

    _takes_coroutines = True


@dataclass(frozen=True, kw_only=True)
class RelayOptions:
    """How a relay sends what is in an outbox; `Relay` tells what each is.

    Raises:
        ConfigError: A value of the wrong type or out of its range, or two that contradict each other.
    """

    retry: RetryPolicy | None = None
    batch_size: int = 2_000
    max_in_flight_batches: int = 4
    strict_order: bool = False
    lease_s: float | None = None
    fencing: Literal["kafka"] | None = None
    failures_to_open: int = 3
    probe_interval_s: float = 1.0
    max_probe_interval_s: float = 30.0
    on_state_change: Callable[[CircuitState, CircuitState], object] | None = None
    on_dead: Callable[[DeadLetter], object] | None = None

    _takes_coroutines: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise ConfigError(f"retry must be a RetryPolicy, not {type_name(self.retry)}")
        if self.retry is not None and self.retry.max_age_s is not None:
            raise ConfigError("retry.max_age_s is not for a relay: give envelopes a deliver_by")
        for name in ("batch_size", "max_in_flight_batches", "failures_to_open"):
            value = getattr(self, name)
            if not (is_whole(value) and 1 <= value <= 100_000):
                raise ConfigError(f"{name} must be an int from 1 to 100,000, not {value!r}")
        _check_sending(self, "probe_interval_s", "max_probe_interval_s")
        if self.fencing not in (None, "kafka"):
            raise ConfigError(f"fencing must be 'kafka' or None, not {self.fencing!r}")
        check_whole("batch_size * max_in_flight_batches", self.most_in_flight)
        who = None if self._takes_coroutines else "kbatch.aio.Relay takes them"
        check_option("on_state_change", self.on_state_change, "before", "after", elsewhere=who)
        check_option("on_dead", self.on_dead, "letter", elsewhere=who)

    @property
    def most_in_flight(self) -> int:
        """Records."""
        return self.batch_size * self.max_in_flight_batches

    @property
    def is_fencing(self) -> bool:
        """Whether brokers take nothing of a relay whose buckets others have taken."""
        return self.fencing is not None


class AioRelayOptions(RelayOptions):
    """The same for asyncio, where callbacks may be coroutine functions, and asyncio's self."""

    _takes_coroutines = True


if TYPE_CHECKING:
    # The same once more as keyword arguments, for type checkers: no dataclass is one for them.

    class BatchingKeywords(TypedDict, Generic[_Unset], total=False):
        batch_size: int | _Unset
        batch_bytes: int | _Unset
        batch_timeout_ms: float | _Unset
        max_buffered: int | _Unset
        max_buffered_bytes: int | None

    class AgentKeywords(TypedDict, Generic[_Unset], total=False):
        retry: RetryPolicy | None
        failures_to_open: int | _Unset
        probe_interval_s: float | _Unset
        max_probe_interval_s: float | _Unset
        max_in_flight_batches: int | _Unset
        strict_order: bool | _Unset
        stalled_after_s: float | _Unset
        on_failed: Callable[[Envelope[Any], KbatchError], object] | None
        dead_letter_topic: str | None
        on_state_change: Callable[[CircuitState, CircuitState], object] | None

    class RelayKeywords(TypedDict, total=False):
        retry: RetryPolicy | None
        batch_size: int
        max_in_flight_batches: int
        strict_order: bool
        lease_s: float | None
        fencing: Literal["kafka"] | None
        failures_to_open: int
        probe_interval_s: float
        max_probe_interval_s: float
        on_state_change: Callable[[CircuitState, CircuitState], object] | None
        on_dead: Callable[[DeadLetter], object] | None


def _check_sending(options: AgentOptions[Any] | RelayOptions, *seconds: str) -> None:
    """What agents and relays are told alike, and which of their options are `seconds`."""
    for name in seconds:
        value = getattr(options, name)
        if not (is_number(value) and 0 < value < 1e6):
            raise ConfigError(f"{name} must be seconds above 0, not {value!r}")
    if options.probe_interval_s > options.max_probe_interval_s:
        raise ConfigError(
            f"probe_interval_s={options.probe_interval_s!r} is longer than "
            f"max_probe_interval_s={options.max_probe_interval_s!r}"
        )
    if not isinstance(options.strict_order, bool):
        raise ConfigError(f"strict_order must be bool, not {type_name(options.strict_order)}")


def check_option(name: str, value: Any, *arguments: str, elsewhere: str | None) -> None:
    """Raises ConfigError for what cannot be called so, and for what is asyncio's if that is taken `elsewhere` only."""
    fault = None if value is None else call_fault(value, *arguments)
    if fault is not None:
        raise ConfigError(f"{name} {fault}")
    owned = None if elsewhere is None else loops_own(value)
    if owned is not None:
        raise ConfigError(f"{name} must not be {owned}; {elsewhere}")


def shows(*kinds: type, or_none: bool = False) -> Callable[[_F], _F]:
    """The signature of a constructor has the options that it takes as ``**options``; `or_none`: ``None`` of each."""

    def show(function: _F) -> _F:
        signature = inspect.signature(function)
        shown = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        for option in (each for kind in kinds for each in fields(kind)):
            shown.append(
                inspect.Parameter(
                    option.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None if or_none else option.default,
                    annotation=str(option.type).replace(" | _Unset", " | None" if or_none else ""),
                )
            )
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return show


def taken(owner: object, options: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """What of the `options` of a constructor each kind has, in its order. Raises TypeError for what none has."""
    names = [[each.name for each in fields(kind)] for kind in kinds]
    known_to_any = [name for known in names for name in known]
    for name in options:
        if name not in known_to_any:
            raise TypeError(f"{type_name(owner)}() got an unexpected keyword argument {name!r}")
    return [{name: options[name] for name in known if name in options} for known in names]
