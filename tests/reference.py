"""The mapping of envelopes to Kafka records once more: slow, plain Python, from the design and not from the code.

It is the oracle of the fuzz tests and imports nothing of kbatch. What it cannot know, it is told: the batch's time,
and the id of an envelope that was given none.
"""

import re
import string
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import msgspec
from confluent_kafka.serialization import MessageField, SerializationContext

Header = tuple[str, bytes | None]
Encoder = Any  # a msgspec encoder, or a callable (message, SerializationContext) -> bytes

KBATCH_NAMES = (
    "id",
    "message-type",
    "content-type",
    "sent-at",
    "correlation-id",
    "conversation-id",
    "parent-id",
    "source",
    "tenant-id",
    "user-name",
    "time-to-send",
    "deliver-by",
    "attempts",
)
WOLVERINE_NAMES = (
    "correlation-id",
    "id",
    "conversation-id",
    "parent-id",
    "content-type",
    "source",
    "time-to-send",
    "sent-at",
    "message-type",
    "tenant-id",
    "user-name",
    "deliver-by",
    "attempts",
    "wolverine-protocol-version",
)
CLOUDEVENTS_NAMES = (
    "ce_specversion",
    "ce_id",
    "ce_source",
    "ce_type",
    "ce_time",
    "content-type",
    "ce_correlationid",
    "ce_conversationid",
    "ce_parentid",
    "ce_tenantid",
    "ce_username",
    "ce_scheduledtime",
    "ce_expirytime",
    "ce_attempts",
)
RESERVED = {
    "kbatch": frozenset(KBATCH_NAMES),
    "wolverine": frozenset(WOLVERINE_NAMES),
    # The specification gives these two another place: the record's value and content-type. An envelope's own ce_id is
    # that of the event.
    "cloudevents": frozenset((*CLOUDEVENTS_NAMES, "ce_data", "ce_datacontenttype")) - {"ce_id"},
    "raw": frozenset[str](),
}

TEXT_FIELDS = ("message_type", "content_type", "source", "correlation_id", "parent_id", "tenant_id", "user_name")
TIME_FIELDS = ("sent_at", "scheduled_time", "deliver_by")

RECORD_OVERHEAD = 36
LONGEST_TOPIC = 249
TOPIC_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._-")


@dataclass(frozen=True)
class Spec:
    """An envelope, or a tombstone, before it is one: the arguments of its constructor."""

    arguments: Mapping[str, Any]
    tombstone: bool = False


@dataclass(frozen=True)
class Setting:
    """What an envelope's bytes depend on beside the envelope."""

    wire: str = "kbatch"
    batch_time: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    source: str | None = None
    encoder: Encoder = field(default_factory=msgspec.json.Encoder)
    hook_headers: Sequence[tuple[str, Any]] = ()
    message_max_bytes: int = 1_000_000
    body_max_bytes: int = 1_048_576 * 1024
    carry_scheduled_time: bool = False


class Record(NamedTuple):
    """A record as it goes to librdkafka; `size` is what librdkafka holds against ``message.max.bytes``."""

    topic: str
    partition: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    size: int


@dataclass(frozen=True)
class Rejected:
    """The first envelope that cannot be mapped; an implementation may name any one of its bad fields."""

    index: int
    fields: frozenset[str]


# librdkafka's consumers refuse a record with more.
MOST_HEADERS = 100_000


class _BadError(Exception):
    """One bad field of one envelope."""


def map_batch(topic: str | None, specs: Iterable[Spec], setting: Setting) -> list[Record | None] | Rejected:
    """All records, None for each envelope that is too late; or the first envelope that cannot be a record."""
    records: list[Record | None] = []
    for index, spec in enumerate(specs):
        record = map_one(topic, spec, setting)
        if isinstance(record, frozenset):
            return Rejected(index, record)
        records.append(record)
    return records


def map_one(topic: str | None, spec: Spec, setting: Setting) -> Record | frozenset[str] | None:
    """The record, None if it is too late to send it, or the names of all fields that are bad."""
    arguments = spec.arguments
    bad: set[str] = set()

    def attempt(name: str, function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except _BadError:
            bad.add(name)
            return None

    topic = attempt("topic", check_topic, arguments.get("topic") if arguments.get("topic") is not None else topic)
    if not bad and arguments.get("deliver_by") is not None and arguments["deliver_by"] <= setting.batch_time:
        return None  # what is not sent is not looked at
    scheduled = arguments.get("scheduled_time")
    if scheduled is not None and scheduled > setting.batch_time and not setting.carry_scheduled_time:
        bad.add("scheduled_time")
    key = attempt("key", key_or_value, arguments.get("key"))
    body_field = "data" if arguments.get("data") is not None else "message"
    value = None if spec.tombstone else attempt(body_field, body_bytes, arguments, topic, setting.encoder)

    own: list[Header] = []
    for name, attribute, text in own_headers(spec, setting):
        encoded = attempt(attribute, text)
        if encoded is not None:
            own.append((name, encoded))
    users: list[Header] = []
    pairs = header_pairs(arguments.get("headers", ()))
    for name, value_of_user in [*setting.hook_headers, *pairs]:
        header = attempt(header_field(name), user_header, name, value_of_user, setting.wire)
        if header is not None:
            users.append(header)
    if setting.wire == "cloudevents" and sum(name == "ce_id" for name, _ in pairs) > 1:
        bad.add("headers['ce_id']")

    if setting.wire == "wolverine":
        headers = users + own
        # The original: Key = IsNullOrEmpty(PartitionKey) ? Id : PartitionKey, but a tombstone's key as it is.
        if not key and not spec.tombstone and "key" not in bad:
            key = str(arguments["id"]).encode()
    else:
        headers = own + users

    if len(headers) > MOST_HEADERS:
        bad.add("headers")
    size = wire_size(key, value, headers)
    if size > setting.message_max_bytes or len(value or b"") > setting.body_max_bytes:
        bad.add("key" if spec.tombstone else body_field)
    if bad:
        return frozenset(bad)
    partition = -1 if arguments.get("partition") is None else arguments["partition"]
    timestamp = milliseconds(setting.batch_time) if arguments.get("timestamp") is None else arguments["timestamp"]
    return Record(topic, partition, timestamp, key, value, headers, size)


# --- fields ---------------------------------------------------------------------------------------------------------


def utf8(value: Any) -> bytes:
    if not isinstance(value, str):
        raise _BadError
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadError from None


def check_topic(topic: Any) -> Any:
    if not utf8(topic) or len(topic) > LONGEST_TOPIC or topic in (".", "..") or not set(topic) <= TOPIC_CHARACTERS:
        raise _BadError
    return topic


def key_or_value(given: Any) -> bytes | None:
    if given is None:
        return None
    return bytes(given) if isinstance(given, bytes) else utf8(given)


def body_bytes(arguments: Mapping[str, Any], topic: str | None, encoder: Encoder) -> bytes:
    if arguments.get("data") is not None:
        try:
            view = memoryview(arguments["data"])
        except (TypeError, ValueError):  # ValueError: one that was released
            raise _BadError from None
        if not view.c_contiguous:
            raise _BadError
        return view.tobytes()
    try:
        if hasattr(encoder, "encode"):
            return bytes(encoder.encode(arguments["message"]))
        encoded = encoder(arguments["message"], SerializationContext(topic, MessageField.VALUE))
    except Exception:
        raise _BadError from None
    if not isinstance(encoded, bytes):
        raise _BadError
    return encoded


def message_type(arguments: Mapping[str, Any]) -> Any:
    if arguments.get("message_type") is not None:
        return arguments["message_type"]
    if arguments.get("data") is not None:
        return "bytes"
    of_class = getattr(type(arguments["message"]), "__message_type__", None)
    return of_class if isinstance(of_class, str) else type(arguments["message"]).__qualname__


def content_type(arguments: Mapping[str, Any], encoder: Encoder) -> Any:
    if arguments.get("content_type") is not None:
        return arguments["content_type"]
    if arguments.get("data") is None and isinstance(encoder, msgspec.json.Encoder):
        return "application/json"
    if arguments.get("data") is None and isinstance(encoder, msgspec.msgpack.Encoder):
        return "application/msgpack"
    return "application/octet-stream"


def _utc(time: datetime) -> datetime:
    try:
        return time.astimezone(timezone.utc)
    except OverflowError:
        raise _BadError from None


def iso_time(time: datetime) -> bytes:
    """``2026-11-23T09:16:45.123456Z``"""
    t = _utc(time)
    day, clock = f"{t.year:04}-{t.month:02}-{t.day:02}", f"{t.hour:02}:{t.minute:02}:{t.second:02}"
    return f"{day}T{clock}.{t.microsecond:06}Z".encode()


def wolverine_time(time: datetime) -> bytes:
    """``2026-11-23 09:16:45:123456 Z``"""
    t = _utc(time)
    day, clock = f"{t.year:04}-{t.month:02}-{t.day:02}", f"{t.hour:02}:{t.minute:02}:{t.second:02}"
    return f"{day} {clock}:{t.microsecond:06} Z".encode()


def any_conversation(value: str | uuid.UUID) -> bytes:
    return str(value).encode() if isinstance(value, uuid.UUID) else utf8(value)


def guid(value: str | uuid.UUID) -> bytes | None:
    """Lower-case with dashes; nothing for the one that is all zero."""
    text = any_conversation(value).decode()
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32}", text):
        raise _BadError
    digits = text.replace("-", "").lower()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return None if set(digits) == {"0"} else "-".join(parts).encode()


def milliseconds(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(milliseconds=1)


# --- headers --------------------------------------------------------------------------------------------------------


def header_pairs(headers: Any) -> list[tuple[Any, Any]]:
    if headers is None:
        return []
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return [(name, value) for name, value in pairs]


def header_field(name: Any) -> str:
    """What an error calls a header: by its name, if it has one."""
    return f"headers[{name!r}]" if isinstance(name, str) and name else "headers"


def user_header(name: Any, value: Any, wire: str) -> Header:
    encoded = utf8(name)
    if (not encoded and wire != "raw") or b"\0" in encoded or name in RESERVED[wire]:
        raise _BadError
    content = key_or_value(value)
    if wire == "cloudevents":
        check_attribute(name, content)
    return str(name), content


def check_attribute(name: str, content: bytes | None) -> None:
    """What has the name of an attribute of CloudEvents must be a legal one. Some readers ignore the case of names."""
    if name.lower() == "content-type":
        raise _BadError
    if name.lower().startswith("ce_"):
        if not re.fullmatch("ce_[a-z0-9]+", name) or content is None or (name == "ce_id" and not content):
            raise _BadError
        try:
            content.decode()
        except UnicodeDecodeError:
            raise _BadError from None


def own_headers(spec: Spec, setting: Setting) -> list[tuple[str, str, Callable[[], bytes | None]]]:
    """The headers that the wire format writes itself: name, field, and what gives the value (None: absent)."""
    arguments = spec.arguments
    if setting.wire == "raw" or (setting.wire in ("wolverine", "cloudevents") and spec.tombstone):
        return []
    if setting.wire == "cloudevents":
        return cloudevents_headers(arguments, setting)
    wolverine = setting.wire == "wolverine"
    time_text = wolverine_time if wolverine else iso_time
    conversation = guid if wolverine else any_conversation

    def optional(attribute: str, convert: Callable[[Any], bytes | None]) -> Callable[[], bytes | None]:
        value = arguments.get(attribute)
        return lambda: None if value is None else convert(value)

    def envelope_id() -> bytes | None:
        return guid(arguments["id"]) if wolverine else str(arguments["id"]).encode()

    def sent_at() -> bytes:
        given = arguments.get("sent_at")
        return time_text(setting.batch_time if given is None else given)

    def source() -> bytes | None:
        given = arguments.get("source", None)
        chosen = setting.source if given is None else given
        return None if chosen is None else utf8(chosen)

    def attempts() -> bytes | None:
        count = arguments.get("attempts", 0)
        return str(int(count)).encode() if count > 0 or wolverine else None

    headers: dict[str, tuple[str, Callable[[], bytes | None]]] = {
        "id": ("id", envelope_id),
        "sent-at": ("sent_at", sent_at),
    }
    if not spec.tombstone:
        headers |= {
            "message-type": ("message_type", lambda: utf8(message_type(arguments))),
            "content-type": ("content_type", lambda: utf8(content_type(arguments, setting.encoder))),
            "correlation-id": ("correlation_id", optional("correlation_id", utf8)),
            "conversation-id": ("conversation_id", optional("conversation_id", conversation)),
            "parent-id": ("parent_id", optional("parent_id", utf8)),
            "source": ("source", source),
            "tenant-id": ("tenant_id", optional("tenant_id", utf8)),
            "user-name": ("user_name", optional("user_name", utf8)),
            "time-to-send": ("scheduled_time", optional("scheduled_time", time_text)),
            "deliver-by": ("deliver_by", optional("deliver_by", time_text)),
            "attempts": ("attempts", attempts),
            "wolverine-protocol-version": ("wire", lambda: b"1.0"),
        }
    order = WOLVERINE_NAMES if wolverine else KBATCH_NAMES
    return [(name, *headers[name]) for name in order if name in headers]


def cloudevents_headers(
    arguments: Mapping[str, Any], setting: Setting
) -> list[tuple[str, str, Callable[[], bytes | None]]]:
    """The Kafka protocol binding of CloudEvents 1.0, binary content mode."""

    def not_empty(text: Any) -> bytes:
        encoded = utf8(text)
        if not encoded:
            raise _BadError
        return encoded

    def optional(attribute: str, convert: Callable[[Any], bytes | None]) -> Callable[[], bytes | None]:
        value = arguments.get(attribute)
        return lambda: None if value is None else convert(value)

    own_source, own_time = arguments.get("source"), arguments.get("sent_at")
    count = arguments.get("attempts", 0)
    values: dict[str, tuple[str, Callable[[], bytes | None]]] = {
        "ce_specversion": ("wire", lambda: b"1.0"),
        "ce_id": ("id", lambda: str(arguments["id"]).encode()),
        # required: None is no text
        "ce_source": ("source", lambda: not_empty(setting.source if own_source is None else own_source)),
        "ce_type": ("message_type", lambda: not_empty(message_type(arguments))),
        "ce_time": ("sent_at", lambda: iso_time(setting.batch_time if own_time is None else own_time)),
        "content-type": ("content_type", lambda: not_empty(content_type(arguments, setting.encoder))),
        "ce_correlationid": ("correlation_id", optional("correlation_id", not_empty)),
        "ce_conversationid": ("conversation_id", optional("conversation_id", any_conversation)),
        "ce_parentid": ("parent_id", optional("parent_id", utf8)),
        "ce_tenantid": ("tenant_id", optional("tenant_id", utf8)),
        "ce_username": ("user_name", optional("user_name", utf8)),
        "ce_scheduledtime": ("scheduled_time", optional("scheduled_time", iso_time)),
        "ce_expirytime": ("deliver_by", optional("deliver_by", iso_time)),
        "ce_attempts": ("attempts", lambda: str(int(count)).encode() if count > 0 else None),
    }
    if any(name == "ce_id" for name, _ in header_pairs(arguments.get("headers", ()))):
        del values["ce_id"]  # the envelope's own
    return [(name, *values[name]) for name in CLOUDEVENTS_NAMES if name in values]


# --- size -----------------------------------------------------------------------------------------------------------


def varint_size(number: int) -> int:
    """Bytes of a signed number as Kafka writes it: zig-zag, seven bits a byte. Sizes are not negative."""
    zigzag = number * 2
    size = 1
    while zigzag > 0x7F:
        zigzag >>= 7
        size += 1
    return size


def wire_size(key: bytes | None, value: bytes | None, headers: Iterable[Header]) -> int:
    """`rd_kafka_msg_max_wire_size` with `rd_kafka_headers_serialized_size`: the most that the record can take."""
    size = RECORD_OVERHEAD + len(key or b"") + len(value or b"")
    for name, content in headers:
        name_size, content_size = len(name.encode()), len(content or b"")
        size += name_size + content_size + varint_size(name_size) + varint_size(content_size)
    return size


# --- the constructor ------------------------------------------------------------------------------------------------

INTEGER_RANGES = {"partition": (0, 2**31 - 1), "timestamp": (1, 2**63 - 1), "attempts": (0, 2**31 - 1)}


def refused_arguments(arguments: Mapping[str, Any]) -> frozenset[str]:
    """Which arguments the constructor of an envelope refuses; what it lets pass, the mapping checks."""
    refused = set()
    if ("message" in arguments) == (arguments.get("data") is not None):
        refused |= {"message", "data"}
    if arguments.get("data") is not None:
        try:
            memoryview(arguments["data"])
        except TypeError:
            refused.add("data")
        except ValueError:  # a buffer that was released: the mapping finds out
            pass
    for name in TIME_FIELDS:
        time = arguments.get(name)
        if time is None:
            continue
        try:
            if not isinstance(time, datetime) or datetime.utcoffset(time) is None:
                raise _BadError
            _utc(time)  # years 1 to 9999 there, too
        except _BadError:
            refused.add(name)
    if arguments.get("id") is not None and not isinstance(arguments["id"], uuid.UUID):
        refused.add("id")
    for name, (low, high) in INTEGER_RANGES.items():
        number = arguments.get(name)
        if number is None and name != "attempts":
            continue
        whole = isinstance(number, int) and not isinstance(number, bool)
        if name in arguments and not (whole and low <= number <= high):
            refused.add(name)
    try:
        headers = arguments.get("headers")
        if not isinstance(headers, Mapping) and any(isinstance(pair, str | bytes) for pair in headers or ()):
            raise ValueError
        header_pairs(headers)
    except (TypeError, ValueError):
        refused.add("headers")
    return frozenset(refused)
