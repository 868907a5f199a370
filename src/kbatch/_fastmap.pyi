import uuid
from collections.abc import Callable, Iterable
from datetime import datetime
from types import GenericAlias
from typing import Any, Generic, Protocol, TypeAlias, final, overload

import msgspec
from msgspec import UNSET, UnsetType
from typing_extensions import Buffer, Self, TypeVar, disjoint_base

from kbatch._wire import HeadersLike, WireFormat

# Without an argument, Envelope means Envelope[Any].
_T_co = TypeVar("_T_co", covariant=True, default=Any)
_U = TypeVar("_U")

_Encoder: TypeAlias = msgspec.json.Encoder | msgspec.msgpack.Encoder | Callable[[Any, Any], Buffer | None]

@disjoint_base
class Envelope(Generic[_T_co]):
    # An envelope with `data` has no message object: its message is msgspec.UNSET.
    @overload
    def __init__(
        self,
        message: _T_co,
        *,
        data: None = None,
        key: str | bytes | None = None,
        topic: str | None = None,
        partition: int | None = None,
        timestamp: int | None = None,
        headers: HeadersLike = (),
        id: uuid.UUID | None = None,
        message_type: str | None = None,
        content_type: str | None = None,
        source: str | None = None,
        correlation_id: str | None = None,
        conversation_id: str | uuid.UUID | None = None,
        parent_id: str | None = None,
        tenant_id: str | None = None,
        user_name: str | None = None,
        sent_at: datetime | None = None,
        scheduled_time: datetime | None = None,
        deliver_by: datetime | None = None,
        attempts: int = 0,
    ) -> None: ...
    @overload
    def __init__(
        self: Envelope[UnsetType],
        message: UnsetType = UNSET,
        *,
        data: Buffer,
        key: str | bytes | None = None,
        topic: str | None = None,
        partition: int | None = None,
        timestamp: int | None = None,
        headers: HeadersLike = (),
        id: uuid.UUID | None = None,
        message_type: str | None = None,
        content_type: str | None = None,
        source: str | None = None,
        correlation_id: str | None = None,
        conversation_id: str | uuid.UUID | None = None,
        parent_id: str | None = None,
        tenant_id: str | None = None,
        user_name: str | None = None,
        sent_at: datetime | None = None,
        scheduled_time: datetime | None = None,
        deliver_by: datetime | None = None,
        attempts: int = 0,
    ) -> None: ...
    @classmethod
    def __class_getitem__(cls, item: Any) -> GenericAlias: ...
    @property
    def message(self) -> _T_co: ...
    @property
    def data(self) -> Buffer | None: ...
    @property
    def key(self) -> str | bytes | None: ...
    @property
    def topic(self) -> str | None: ...
    @property
    def partition(self) -> int | None: ...
    @property
    def timestamp(self) -> int | None: ...
    @property
    def headers(self) -> tuple[tuple[str, str | bytes | None], ...]: ...
    @property
    def id(self) -> uuid.UUID: ...
    @property
    def message_type(self) -> str | None: ...
    @property
    def content_type(self) -> str | None: ...
    @property
    def source(self) -> str | None: ...
    @property
    def correlation_id(self) -> str | None: ...
    @property
    def conversation_id(self) -> str | None: ...
    @property
    def parent_id(self) -> str | None: ...
    @property
    def tenant_id(self) -> str | None: ...
    @property
    def user_name(self) -> str | None: ...
    @property
    def sent_at(self) -> datetime | None: ...
    @property
    def scheduled_time(self) -> datetime | None: ...
    @property
    def deliver_by(self) -> datetime | None: ...
    @property
    def attempts(self) -> int: ...
    @overload
    def replace(
        self,
        *,
        key: str | bytes | None = ...,
        topic: str | None = ...,
        partition: int | None = ...,
        timestamp: int | None = ...,
        headers: HeadersLike = ...,
        id: uuid.UUID | None = ...,
        message_type: str | None = ...,
        content_type: str | None = ...,
        source: str | None = ...,
        correlation_id: str | None = ...,
        conversation_id: str | uuid.UUID | None = ...,
        parent_id: str | None = ...,
        tenant_id: str | None = ...,
        user_name: str | None = ...,
        sent_at: datetime | None = ...,
        scheduled_time: datetime | None = ...,
        deliver_by: datetime | None = ...,
        attempts: int = ...,
    ) -> Self: ...
    @overload
    def replace(
        self,
        *,
        message: _U,
        key: str | bytes | None = ...,
        topic: str | None = ...,
        partition: int | None = ...,
        timestamp: int | None = ...,
        headers: HeadersLike = ...,
        id: uuid.UUID | None = ...,
        message_type: str | None = ...,
        content_type: str | None = ...,
        source: str | None = ...,
        correlation_id: str | None = ...,
        conversation_id: str | uuid.UUID | None = ...,
        parent_id: str | None = ...,
        tenant_id: str | None = ...,
        user_name: str | None = ...,
        sent_at: datetime | None = ...,
        scheduled_time: datetime | None = ...,
        deliver_by: datetime | None = ...,
        attempts: int = ...,
    ) -> Envelope[_U]: ...
    @overload
    def replace(
        self,
        *,
        data: Buffer,
        key: str | bytes | None = ...,
        topic: str | None = ...,
        partition: int | None = ...,
        timestamp: int | None = ...,
        headers: HeadersLike = ...,
        id: uuid.UUID | None = ...,
        message_type: str | None = ...,
        content_type: str | None = ...,
        source: str | None = ...,
        correlation_id: str | None = ...,
        conversation_id: str | uuid.UUID | None = ...,
        parent_id: str | None = ...,
        tenant_id: str | None = ...,
        user_name: str | None = ...,
        sent_at: datetime | None = ...,
        scheduled_time: datetime | None = ...,
        deliver_by: datetime | None = ...,
        attempts: int = ...,
    ) -> Envelope[UnsetType]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

class Tombstone(Envelope[UnsetType]):
    def __init__(
        self,
        key: str | bytes,
        *,
        topic: str | None = None,
        partition: int | None = None,
        headers: HeadersLike = (),
        id: uuid.UUID | None = None,
    ) -> None: ...
    # Only what its constructor takes.
    def replace(  # type: ignore[override]
        self,
        *,
        key: str | bytes = ...,
        topic: str | None = ...,
        partition: int | None = ...,
        headers: HeadersLike = ...,
        id: uuid.UUID | None = ...,
    ) -> Self: ...

def uuid7() -> uuid.UUID: ...
def pinned_buffers() -> int: ...

@disjoint_base
class Outcomes:
    @property
    def count(self) -> int: ...
    def __len__(self) -> int: ...
    def acked(self) -> int: ...
    def failed(self) -> int: ...
    def expired(self) -> list[int]: ...
    def failures(self) -> list[tuple[int, int, int]]: ...
    def partitions(self) -> tuple[int, ...]: ...
    def offsets(self) -> tuple[int, ...]: ...

@disjoint_base
class Config:
    def set(self, name: str, value: str | None) -> None: ...
    def get(self, name: str) -> str | None: ...

@disjoint_base
class Mapper:
    def __init__(
        self,
        wire: str | WireFormat,
        encoder: _Encoder,
        source: str | None,
        header_hook: Callable[[], HeadersLike | None] | None,
        message_max_bytes: int,
        queue_max_bytes: int,
    ) -> None: ...

@disjoint_base
class Batch:
    def __new__(cls, core: Core) -> Self: ...
    @property
    def core(self) -> Core: ...
    @property
    def outcomes(self) -> Outcomes: ...
    @property
    def begun(self) -> bool: ...
    @property
    def latency_s(self) -> float: ...
    def __len__(self) -> int: ...
    def done(self) -> bool: ...
    def add_done_callback(self, callback: Callable[[Any], object]) -> None: ...
    def _add_waker(self, waker: Callable[[], object]) -> None: ...
    def _remove_waker(self, waker: Callable[[], object]) -> None: ...
    def _wait(self, timeout: float | None = None) -> bool: ...

# (topic, partition, timestamp, key, value, headers)
_MappedRecord: TypeAlias = tuple[str, int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]

@final
class _Mapping: ...

@disjoint_base
class Core:
    def __init__(
        self,
        config: Config,
        mapper: Mapper,
        dispatcher: Dispatcher,
        *,
        max_in_flight: int,
        delivery_timeout_s: float,
        on_start: Callable[[], object] | None = None,
    ) -> None: ...
    @property
    def dispatcher(self) -> Dispatcher: ...
    def start(self) -> None: ...
    def started(self) -> bool: ...
    def map(self, batch: Batch, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> None: ...
    def begin_mapping(self, batch: Batch, topic: str | None, envelopes: Iterable[Envelope[Any]]) -> _Mapping: ...
    def map_slice(self, mapping: _Mapping, seconds: float) -> bool: ...
    def records(self, batch: Batch) -> list[_MappedRecord | None]: ...
    def fail(
        self, batch: Batch, envelopes: tuple[Envelope[Any], ...], index: int, code: int, rest_code: int
    ) -> None: ...
    def send(
        self,
        batch: Batch,
        timeout: float | None = None,
        *,
        wait: bool,
        callback: Callable[[Any], object] | None = None,
    ) -> bool: ...
    def send_detached(
        self,
        batch: Batch,
        timeout: float | None = None,
        *,
        enqueued: Callable[[], object] | None = None,
        waker: Callable[[], object] | None = None,
    ) -> None: ...
    def abandon(self, batch: Batch) -> None: ...
    def hold(self, batch: Batch, timeout: float | None = None) -> None: ...
    def take_held(self, batch: Batch) -> bool: ...
    def refuse_held(self, batch: Batch, code: int) -> None: ...
    def end_held(self, batch: Batch) -> None: ...
    def refusal(self, batch: Batch) -> int: ...
    def is_finishing(self) -> bool: ...
    def enqueue_held(self, batch: Batch) -> None: ...
    def wait_for_outcome(self, batch: Batch) -> bool: ...
    def wait_until_settled(self, batch: Batch) -> None: ...
    def give_up_held(self, batch: Batch, code: int) -> None: ...
    def conclude(self, batch: Batch, code: int = 0, *, unknown: bool = False) -> None: ...
    def transaction_call(self, call: int, timeout_ms: int) -> tuple[int, str, bool, bool, bool] | None: ...
    def in_flight(self) -> int: ...
    def flush(self, timeout: float | None = None) -> int: ...
    def purge(self) -> None: ...
    def close(self, timeout: float | None = None) -> int: ...
    def closed(self) -> bool: ...
    def name(self) -> str | None: ...
    def counters(self) -> dict[str, int]: ...
    def inject_fatal_error(self, code: int, reason: str) -> None: ...
    def set_oauth_token(self, answer: object) -> None: ...
    def set_oauth_failure(self, reason: str) -> None: ...

@disjoint_base
class TokenRefresh:
    def __init__(
        self, oauth_cb: Callable[[str | None], object], config: str | None, find_core: Callable[[], Core | None]
    ) -> None: ...
    def run(self) -> None: ...

class _CallbackThread(Protocol):
    def put(self, function: Callable[..., object], /, *arguments: object) -> None: ...
    def stop(self) -> None: ...
    def join(self, timeout: float | None, /) -> None: ...

@disjoint_base
class Dispatcher:
    def __init__(
        self,
        callback_thread: _CallbackThread,
        other_threads: tuple[_CallbackThread, ...] = (),
        *,
        on_error: Callable[[int, str, bool], object] | None = None,
        on_stats: Callable[[str], object] | None = None,
        on_log: Callable[[int, str, str, str], object] | None = None,
        on_oauth: Callable[[str | None], object] | None = None,
        throttle_cb: Callable[[str, int, int], object] | None = None,
    ) -> None: ...
    @property
    def events(self) -> int: ...
    @property
    def throttle_cb(self) -> Callable[[str, int, int], object] | None: ...
    def call(self, callback: Callable[[Any], object], argument: object) -> None: ...
