"""A topic, how envelopes are sent to it, and by which producer."""

from __future__ import annotations

import enum
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kbatch._base_producer import BaseProducer
from kbatch._checks import check_close_timeout, check_topic
from kbatch._errors import ConfigError, type_name
from kbatch._options import AgentOptions, BatchingOptions, RelayOptions, shows, taken
from kbatch._outbox._base import check_relay_outbox, dead_letters_of
from kbatch._outbox._relay_producer import lease_of, relay_producer
from kbatch._outbox._shared import OutboxUse, RelayPlan
from kbatch._producer import Producer
from kbatch._recovery._handle import ProducerHandle
from kbatch._sending._agent import BaseSendingAgent, SendingAgent
from kbatch._sending._batched import BaseBatchedSender, BatchedSender
from kbatch._sending._durable import BaseDurableSender, DurableSender, check_outbox
from kbatch._sending._inline import BaseInlineSender, InlineSender

if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Literal, overload

    import msgspec
    from typing_extensions import Unpack

    from kbatch._options import AgentKeywords, BatchingKeywords, RelayKeywords
    from kbatch._outbox._store import DurableOutbox
    from kbatch._wire import HeadersLike, WireFormat

__all__ = ["BaseTopic", "KafkaTopic", "SenderMode"]

_CALLBACKS = ("error_cb", "stats_cb", "throttle_cb", "oauth_cb", "logger")
_NO_OUTBOX: dict[str, Any] = {"_outbox": None, "_plan": None}

_S_co = TypeVar("_S_co", covariant=True)  # the sender

if TYPE_CHECKING:

    class SenderKeywords(BatchingKeywords[None], AgentKeywords[None], total=False):
        """What a topic's senders are told."""

    class Options(SenderKeywords, total=False):
        """What a topic takes besides a producer."""

        close_timeout_s: float

    class OptionsWithConfig(Options, total=False):
        """With `config`, what its producer takes as well."""

        wire: str | WireFormat | None
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None
        source: str | None
        header_hook: Callable[[], HeadersLike | None] | None
        carry_scheduled_time: bool | None
        max_in_flight: int | None


class SenderMode(enum.Enum):
    """How a topic's envelopes are sent."""

    INLINE = "inline"
    """One at a time, each awaited: `InlineSender`."""
    BUFFERED = "buffered"
    """In batches from memory, with retries and a circuit breaker: `BatchedSender`. A crash loses what is buffered."""
    DURABLE = "durable"
    """Each is committed to an outbox, from which a relay sends it: `DurableSender`. A crash loses nothing."""


@dataclass(frozen=True, init=False, repr=False)
class BaseTopic(BatchingOptions[None], AgentOptions[None]):
    """What the topics for threads and for asyncio have in common. The options are attributes, None without a buffer."""

    name: str
    mode: SenderMode
    close_timeout_s: float
    _settings: Hashable  # the same where the producer, or what it is made of, is
    # The caller's, or one that is never used and others are made of; None with an outbox.
    _producer: BaseProducer | None = field(compare=False)
    _is_given: bool = field(compare=False)
    _outbox: DurableOutbox | None = field(compare=False)
    _plan: RelayPlan | None = field(compare=False)  # of its relay; None if others forward what is in the outbox

    _shown = "kbatch.KafkaTopic"
    _producer_class: type[BaseProducer] = Producer
    _inline_class: type[BaseInlineSender] = InlineSender
    _agent_class: type[BaseSendingAgent] = SendingAgent
    _batched_class: type[BaseBatchedSender] = BatchedSender
    _durable_class: type[BaseDurableSender] = DurableSender

    @shows(BatchingOptions, AgentOptions, or_none=True)
    def __init__(
        self,
        name: str,
        mode: SenderMode,
        *,
        producer: BaseProducer | None = None,
        config: Mapping[str, Any] | None = None,
        outbox: DurableOutbox | None = None,
        relay: RelayKeywords | None = None,
        wire: str | WireFormat | None = None,
        encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], bytes | None] | None = None,
        source: str | None = None,
        header_hook: Callable[[], HeadersLike | None] | None = None,
        carry_scheduled_time: bool | None = None,
        max_in_flight: int | None = None,
        close_timeout_s: float = 30.0,
        **keywords: Unpack[SenderKeywords],
    ) -> None:
        options = {
            "wire": wire,
            "encoder": encoder,
            "source": source,
            "header_hook": header_hook,
            "carry_scheduled_time": carry_scheduled_time,
            "max_in_flight": max_in_flight,
        }
        options = {name: value for name, value in options.items() if value is not None}
        values = vars(self)  # past the guard of a frozen dataclass
        try:
            check_topic("name", name)
            batching, agent = (
                {option: value for option, value in own.items() if value is not None}
                for own in taken(self, keywords, BatchingOptions, AgentOptions)
            )
            _check_mode(mode, {**batching, **agent})
            values.update(name=name, mode=mode, close_timeout_s=close_timeout_s)
            values.update(self._checked(batching, agent))
            if self.dead_letter_topic == name:
                raise ConfigError(f"dead_letter_topic must not be the topic itself, {name!r}")
            if mode is SenderMode.DURABLE:
                values.update(self._bind_outbox(outbox, producer, config, relay, options))
            elif relay is not None:
                raise ConfigError(
                    f"relay: not with SenderMode.{mode.name}, which has no outbox; use SenderMode.DURABLE"
                )
            else:
                values.update(self._bind(outbox, producer, config, options))
        except BaseException as error:
            # As the producer's: passwords must not be found in the local variables of a traceback.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            del producer, config

    def _checked(self, batching: dict[str, Any], agent: dict[str, Any]) -> dict[str, Any]:
        """The options of the sender and its agent with their defaults; without a buffer, None."""
        options: dict[str, Any] = vars(BatchingOptions(**batching))
        check_close_timeout(self.close_timeout_s)
        options = {**options, **vars(self._agent_class._options_class(**agent))}
        return options if self.mode is SenderMode.BUFFERED else dict.fromkeys(options)

    def _bind_outbox(
        self, outbox: Any, producer: Any, config: Any, relay: Any, options: dict[str, Any]
    ) -> dict[str, Any]:
        if outbox is None:
            raise ConfigError("outbox is missing: SenderMode.DURABLE sends through one, such as a kbatch.SqliteOutbox")
        check_outbox(outbox)
        if producer is not None:
            raise ConfigError(
                "producer: not with SenderMode.DURABLE, whose relay has one for itself alone; give config=, or run a "
                "kbatch.Relay with it"
            )
        if options:
            raise ConfigError(
                f"{', '.join(options)}: not with SenderMode.DURABLE: the outbox maps envelopes, and its relay sends "
                "what is in it; give them to these"
            )
        if config is None and relay is not None:
            raise ConfigError("relay: only with config=; without it a kbatch.Relay that you run has these options")
        if config is not None:
            check_relay_outbox(outbox)
        plan = None if config is None else self._plan_of(config, relay, outbox)
        return {
            "_settings": (_Same(outbox), None if plan is None else plan.key),
            "_producer": None,
            "_is_given": False,
            "_outbox": outbox,
            "_plan": plan,
        }

    def _plan_of(self, config: Any, relay: Any, outbox: Any) -> RelayPlan:
        options = _relay_options({} if relay is None else relay)
        prototype = relay_producer(config, options.most_in_flight, is_fencing=options.is_fencing)
        try:
            lease_of(options, prototype)
            if options.on_dead is not None:
                dead_letters_of(outbox)
        except ConfigError as error:
            raise ConfigError(f"relay: {error}") from None
        return RelayPlan(prototype, options, (*self._fingerprint_of(prototype), options))

    def _fingerprint_of(self, prototype: BaseProducer) -> tuple[Hashable, ...]:
        return (
            type(prototype),
            prototype._fingerprint,
            *(_Same(getattr(prototype._parsed, name)) for name in _CALLBACKS),
        )

    def _bind(self, outbox: Any, producer: Any, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        if outbox is not None:
            raise ConfigError(
                f"outbox: not with SenderMode.{self.mode.name}, which sends to Kafka; use SenderMode.DURABLE"
            )
        if producer is None and config is None:
            raise ConfigError(
                f"producer and config are missing: give a {self._producer_class._shown} as producer=, "
                "or librdkafka's keys as config="
            )
        if producer is not None:
            self._check_producer(producer)
            refused = [*(["config"] if config is not None else []), *options]
            if refused:
                raise ConfigError(
                    f"{', '.join(refused)}: not with producer=, which has its settings already; give config= alone, "
                    "and topics whose settings agree share one producer"
                )
            return {"_settings": _Same(producer), "_producer": producer, "_is_given": True, **_NO_OUTBOX}
        prototype = self._producer_class(config, **options)
        wire = options.get("wire", "kbatch")
        settings = (
            *self._fingerprint_of(prototype),
            wire if isinstance(wire, str) else _Same(wire),
            *(_Same(options.get(name)) for name in ("encoder", "header_hook")),
            *(prototype._max_in_flight, options.get("source"), options.get("carry_scheduled_time", False)),
        )
        return {"_settings": settings, "_producer": prototype, "_is_given": False, **_NO_OUTBOX}

    def _check_producer(self, producer: object) -> None:
        if isinstance(producer, self._producer_class):
            return
        if isinstance(producer, BaseProducer):
            other = "kbatch.KafkaTopic" if isinstance(producer, Producer) else "kbatch.aio.KafkaTopic"
            raise ConfigError(f"{self._shown} takes no {producer._shown}; use {other}")
        raise ConfigError(
            f"producer must be a {self._producer_class._shown}, not {type_name(producer)}; "
            "give librdkafka's keys as config="
        )

    def _create(self) -> Any:
        if self._outbox is not None:
            return self._create_durable(self._outbox)
        assert self._producer is not None
        if self._is_given:
            use = ProducerHandle.of(self._producer).acquire()
        else:
            use = ProducerHandle.shared(self._settings, self._producer)
        try:
            if self.mode is SenderMode.INLINE:
                return self._inline_class(use, self.name, close_timeout_s=self.close_timeout_s)
            agent = self._agent_class(use, self.name, **self._options_of(AgentOptions))
        except BaseException:
            use.release(0)
            raise
        # From here on the agent releases it, or does so when it is forgotten.
        batching = self._options_of(BatchingOptions)
        return self._batched_class(agent, **batching, close_timeout_s=self.close_timeout_s)

    def _create_durable(self, outbox: DurableOutbox) -> BaseDurableSender:
        use = outbox if self._plan is None else OutboxUse(outbox, self._plan)
        return self._durable_class(use, self.name, close_timeout_s=self.close_timeout_s)

    def _options_of(self, kind: type) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(kind)}

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(f"a {self._shown} cannot be pickled: its settings may hold secrets; make it where it is used")

    def __repr__(self) -> str:
        if "_is_given" not in vars(self):
            return f"<{self._shown} refused>"  # in a traceback of the constructor
        return f"<{self._shown} {self.name!r} {self.mode.name}>"


class KafkaTopic(BaseTopic, Generic[_S_co]):
    """A topic and how envelopes are sent to it; makes senders. Immutable; checked as a whole when it is made.

    Topics that are given a `config` share one producer where their settings agree: the same configuration, and the same
    objects for callbacks, encoder, wire format and hook. It is made with the first sender and closed with the last one,
    so each sender must be closed. After a fork, the child has producers of its own, unless nothing was sent yet.

    Args:
        name: The topic.
        mode: What kind of sender.
        producer: A `Producer`, which stays the caller's. Either this or `config` is given, but not with
            ``SenderMode.DURABLE``.
        config: librdkafka's keys, of which kbatch makes a `Producer` and closes it. With ``SenderMode.DURABLE`` it may
            be left out: then a `Relay` that is run elsewhere sends what is in the outbox. Else a relay in this process
            does, from the first envelope until the last of these senders is closed; all of one outbox have the same.
        outbox: What ``SenderMode.DURABLE`` sends through, such as a `SqliteOutbox`, or one of your own, a
            `kbatch.stores.DurableOutbox`; only with it.
        relay: Keyword arguments of `Relay` for the relay in this process: each but ``producer`` and
            ``close_timeout_s``. Only with an `outbox` and `config`; all of one outbox have the same. Its
            ``on_state_change`` and ``on_dead`` must be no coroutine functions, also of `kbatch.aio`.
        wire, encoder, source, header_hook, carry_scheduled_time, max_in_flight: As for `Producer`; only with `config`,
            and not with ``SenderMode.DURABLE``.
        batch_size, batch_bytes, batch_timeout_ms, max_buffered, max_buffered_bytes: As for `BatchedSender`; only with
            ``SenderMode.BUFFERED``.
        retry, failures_to_open, probe_interval_s, max_probe_interval_s, max_in_flight_batches, strict_order,
            stalled_after_s, on_failed, dead_letter_topic, on_state_change: As for `SendingAgent`; only with
            ``SenderMode.BUFFERED``.
        close_timeout_s: Seconds that leaving the ``with`` block of a sender waits for what it has not sent.

    Raises:
        ConfigError: A value of the wrong type or out of its range, an option that the mode does not have, a setting
            that `Producer` or `Relay` refuses, both `producer` and `config`, or neither; no `outbox` where one is
            needed.
    """

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: KafkaTopic[InlineSender],
            name: str,
            mode: Literal[SenderMode.INLINE],
            *,
            producer: Producer,
            **options: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[InlineSender],
            name: str,
            mode: Literal[SenderMode.INLINE],
            *,
            config: Mapping[str, Any],
            **options: Unpack[OptionsWithConfig],
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[BatchedSender],
            name: str,
            mode: Literal[SenderMode.BUFFERED],
            *,
            producer: Producer,
            **options: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[BatchedSender],
            name: str,
            mode: Literal[SenderMode.BUFFERED],
            *,
            config: Mapping[str, Any],
            **options: Unpack[OptionsWithConfig],
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[DurableSender],
            name: str,
            mode: Literal[SenderMode.DURABLE],
            *,
            outbox: DurableOutbox,
            config: Mapping[str, Any] | None = None,
            close_timeout_s: float = 30.0,
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[DurableSender],
            name: str,
            mode: Literal[SenderMode.DURABLE],
            *,
            outbox: DurableOutbox,
            config: Mapping[str, Any],
            relay: RelayKeywords | None,
            close_timeout_s: float = 30.0,
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[InlineSender | BatchedSender],
            name: str,
            mode: SenderMode,
            *,
            producer: Producer,
            **options: Unpack[Options],
        ) -> None: ...
        @overload
        def __init__(
            self: KafkaTopic[InlineSender | BatchedSender],
            name: str,
            mode: SenderMode,
            *,
            config: Mapping[str, Any],
            **options: Unpack[OptionsWithConfig],
        ) -> None: ...
        def __init__(self, name: str, mode: SenderMode, **options: Any) -> None: ...

    def create_sender(self) -> _S_co:
        """A new sender, to be closed: a context manager, whose ``close(timeout)`` says how many were not sent.

        With ``SenderMode.INLINE`` an `InlineSender`, with ``SenderMode.BUFFERED`` a `BatchedSender`, with
        ``SenderMode.DURABLE`` a `DurableSender`. It starts with its first envelope.

        Raises:
            ConfigError: Another sender of the same outbox has a relay with another `config` or `relay`.
        """
        sender: _S_co = self._create()
        return sender


class _Same:
    """Equal to what holds the same object, or the same method of it."""

    def __init__(self, thing: object) -> None:
        self._thing = thing  # kept, so that its id stays its own
        is_method = isinstance(thing, types.MethodType)
        self._ids = (id(thing.__self__), id(thing.__func__)) if is_method else (id(thing),)  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._ids == other._ids

    def __hash__(self) -> int:
        return hash(self._ids)


def _relay_options(given: Any) -> RelayOptions:
    if not isinstance(given, Mapping):
        raise ConfigError(f"relay must be a dict of keyword arguments of kbatch.Relay, not {type_name(given)}")
    known = [each.name for each in fields(RelayOptions)]
    for name in given:
        if name == "close_timeout_s":
            raise ConfigError("relay: close_timeout_s is that of the senders; give it to the topic")
        if name not in known:
            raise ConfigError(f"relay: {name!r} is none of its options, which are {', '.join(known)}")
    try:
        return RelayOptions(**given)
    except ConfigError as error:
        raise ConfigError(f"relay: {error}") from None


def _check_mode(mode: Any, given: dict[str, Any]) -> None:
    if not isinstance(mode, SenderMode):
        raise ConfigError(
            "mode must be kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED or kbatch.SenderMode.DURABLE, "
            f"not {mode!r}"
        )
    if mode is SenderMode.DURABLE and given:
        raise ConfigError(
            f"{', '.join(given)}: not with SenderMode.DURABLE, whose envelopes a relay sends; give relay= what a "
            "kbatch.Relay takes of them"
        )
    if mode is SenderMode.INLINE and given:
        raise ConfigError(
            f"{', '.join(given)}: not with SenderMode.INLINE, which sends each envelope by itself, once; "
            "use SenderMode.BUFFERED"
        )
