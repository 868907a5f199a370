"""A topic, how envelopes are sent to it from an event loop, and by which producer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kbatch._sending._topic import BaseTopic
from kbatch.aio._batched import BatchedSender, SendingAgent
from kbatch.aio._durable import DurableSender
from kbatch.aio._inline import InlineSender
from kbatch.aio._producer import Producer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal, overload

    from typing_extensions import Unpack

    from kbatch._options import RelayKeywords
    from kbatch._outbox._store import DurableOutbox
    from kbatch._sending._topic import Options, OptionsWithConfig, SenderMode

__all__ = ["KafkaTopic"]


_S_co = TypeVar("_S_co", covariant=True)  # the sender


class KafkaTopic(BaseTopic, Generic[_S_co]):
    """As `kbatch.KafkaTopic`, with a `kbatch.aio.Producer` and senders for asyncio."""

    _shown = "kbatch.aio.KafkaTopic"
    _producer_class = Producer
    _inline_class = InlineSender
    _agent_class = SendingAgent
    _batched_class = BatchedSender
    _durable_class = DurableSender

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
        """As `kbatch.KafkaTopic.create_sender`: a `kbatch.aio.InlineSender`, a `kbatch.aio.BatchedSender`
        or a `kbatch.aio.DurableSender`."""
        sender: _S_co = self._create()
        return sender
