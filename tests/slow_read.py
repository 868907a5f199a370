"""Consumed records become envelopes, slowly: a reading of its own against which `kbatch.read_envelope` is fuzzed."""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from kbatch._errors import ConfigError, DeserializationError
from kbatch._fastmap import NULL_VALUE, Envelope, Tombstone

if TYPE_CHECKING:
    from kbatch._wire import ConsumedRecord, RecordFields, WireReader

__all__ = ["read_envelope"]

_Pairs = Iterable[tuple[str, "str | bytes | None"]]

_guid = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32}").fullmatch
_attribute_name = re.compile(r"[cC][eE]_[a-zA-Z0-9]+").fullmatch
_digits = re.compile(r"[0-9]{1,10}").fullmatch
_wolverine_time = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d):(\d{6}) Z").fullmatch
_IDS = uuid.UUID("7d6a7a3c-0b1e-5d43-9a55-6b62617463a8")  # the namespace of ids that are made from something else


def _id(text: str) -> uuid.UUID:
    if not _guid(text):
        raise ValueError("must be a UUID")
    return uuid.UUID(text)


# Its class as it is now: msgspec knows no `datetime` that a test has put in its place (freezegun).
_to_datetime = functools.partial(msgspec.convert, type=datetime)


def _time(text: str) -> datetime:
    # Both formats' times; msgspec reads RFC 3339, and rounds to microseconds.
    match = _wolverine_time(text)
    try:
        time: datetime = _to_datetime("{}T{}.{}Z".format(*match.groups()) if match else text)
        if time.tzinfo is not None:
            return time.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a time of RFC 3339, such as 2026-11-23T09:16:45.123456Z")


def _count(text: str) -> int:
    if not _digits(text) or int(text) >= 2**31:
        raise ValueError("must be a whole number from 0 to 2147483647")
    return int(text)


def _none_if_empty(text: str) -> str | None:
    return text or None


def _version(text: str) -> None:
    if text != "1.0":
        raise ValueError("must be 1.0, the only version of CloudEvents that is read")


# Of each header of a format: which argument of Envelope it is (None: of no use), and what reads its text (None: it is
# text). What is not here is the user's.
_Table = Mapping[str, tuple["str | None", "Callable[[str], Any] | None"]]

_KBATCH: _Table = {
    "id": ("id", _id),
    "message-type": ("message_type", None),
    "content-type": ("content_type", None),
    "sent-at": ("sent_at", _time),
    "correlation-id": ("correlation_id", None),
    "conversation-id": ("conversation_id", None),
    "parent-id": ("parent_id", None),
    "source": ("source", None),
    "tenant-id": ("tenant_id", None),
    "user-name": ("user_name", None),
    "time-to-send": ("scheduled_time", _time),
    "deliver-by": ("deliver_by", _time),
    "attempts": ("attempts", _count),
}
_CLOUDEVENTS: _Table = {
    "ce_specversion": (None, _version),
    "ce_id": ("id", None),  # any text
    "ce_source": ("source", None),
    "ce_type": ("message_type", None),
    "ce_time": ("sent_at", _time),
    "content-type": ("content_type", _none_if_empty),
    "ce_correlationid": ("correlation_id", _none_if_empty),
    "ce_conversationid": ("conversation_id", None),
    "ce_parentid": ("parent_id", None),
    "ce_tenantid": ("tenant_id", None),
    "ce_username": ("user_name", None),
    "ce_scheduledtime": ("scheduled_time", _time),
    "ce_expirytime": ("deliver_by", _time),
    "ce_attempts": ("attempts", _count),
}
_TABLES: Mapping[str, _Table] = {
    "kbatch": _KBATCH,
    "wolverine": {**_KBATCH, "wolverine-protocol-version": (None, None)},
    "cloudevents": _CLOUDEVENTS,
    "raw": {},
}
_REQUIRED = ("ce_specversion", "ce_id", "ce_source", "ce_type")


def read_envelope(record: ConsumedRecord | RecordFields, *, wire: str | WireReader = "kbatch") -> Envelope[Any]:
    consumed = _by_methods(record)
    if not isinstance(wire, str):
        return _read_custom(consumed, wire)
    table = _TABLES.get(wire)
    if table is None:
        raise ConfigError(f"wire must be one of {', '.join(_TABLES)} or an object with read(), not {wire!r}")
    return _read(consumed, wire, table)


def _read(record: ConsumedRecord, wire: str, table: _Table) -> Envelope[Any]:
    # A consumer tells its own errors by records, too.
    error = record.error() if hasattr(record, "error") else None
    if error is not None:
        raise _error(record, f"it is an error of the consumer: {error}", None)
    headers = _headers(record)
    pairs: _Pairs = headers.items() if isinstance(headers, Mapping) else headers
    value: Any = record.value()
    _check_encoded(record, value)
    tombstone = value is None
    if wire == "cloudevents":
        pairs = _attributes(pairs)
        if not tombstone:
            pairs, value = _of_structured_mode(record, pairs, value)
            pairs = _attributes(pairs)
        if not tombstone or any(name == "ce_type" for name, _ in pairs):
            _check_required(record, pairs)
    arguments, users = _parsed(record, pairs, table)
    if wire == "cloudevents" and "id" in arguments:
        _read_cloudevents_id(arguments, users)
    if "id" not in arguments:
        arguments["id"] = _id_of_place(record)
    key, partition, (kind, milliseconds) = record.key(), record.partition(), record.timestamp()
    place: dict[str, Any] = {"topic": record.topic()}
    if partition is not None and partition >= 0:
        place["partition"] = partition
    timestamp = milliseconds if kind and milliseconds > 0 else None
    if tombstone and key is not None and "message_type" not in arguments:
        of_record = {name: arguments.get(name) for name in ("id", "sent_at")}
        return Tombstone(key, headers=users, timestamp=timestamp, **of_record, **place)
    if value is None:
        arguments["message"] = NULL_VALUE
    else:
        arguments["data"] = value
    return Envelope(key=key, headers=users, timestamp=timestamp, **place, **arguments)


def _headers(record: ConsumedRecord) -> Any:
    try:
        return record.headers() or ()
    except (SystemError, UnicodeDecodeError) as error:  # confluent-kafka raises the first, from the second
        raise _error(record, "the name of one of its headers is not UTF-8", None) from error


def _parsed(
    record: ConsumedRecord, pairs: _Pairs, table: _Table
) -> tuple[dict[str, Any], list[tuple[str, str | bytes | None]]]:
    arguments: dict[str, Any] = {}
    users: list[tuple[str, str | bytes | None]] = []
    for name, value in pairs:
        entry = table.get(name)
        if entry is None:
            users.append((name, value))
            continue
        if value is None:
            continue
        argument, parse = entry
        if not isinstance(value, (str, bytes)):
            raise _error(record, f"header {name!r} must be text or bytes, not {type(value).__name__}", name)
        try:
            content: Any = value if isinstance(value, str) else value.decode()
            content.encode()  # other consumers may give a lone surrogate
            if parse is not None:
                content = parse(content)
        except ValueError as error:
            reason = "must be UTF-8" if isinstance(error, UnicodeError) else str(error)
            raise _error(record, f"header {name!r} {reason}, not {_shown(value)}", name) from None
        if argument is not None:
            arguments[argument] = content
    return arguments, users


def _read_custom(record: ConsumedRecord, wire: WireReader) -> Envelope[Any]:
    if not callable(getattr(wire, "read", None)):
        raise ConfigError(f"wire must be a name or an object with a read() method, not {type(wire).__name__}")
    try:
        envelope = wire.read(record)
    except (MemoryError, DeserializationError):
        raise
    except Exception as error:
        raise _error(record, f"the wire format could not read it: {error}", None) from error
    if not isinstance(envelope, Envelope):
        raise _error(record, f"the wire format gave no kbatch.Envelope but {type(envelope).__name__}", None)
    return envelope


# --- records ---------------------------------------------------------------------------------------------------------


class _OfFields:
    """A record with attributes, as those of aiokafka and kafka-python, by the methods that confluent-kafka's has."""

    __slots__ = ("_fields",)

    def __init__(self, fields: RecordFields) -> None:
        self._fields = fields

    def topic(self) -> str | None:
        return self._fields.topic

    def partition(self) -> int | None:
        return self._fields.partition

    def offset(self) -> int | None:
        return self._fields.offset

    def timestamp(self) -> tuple[int, int]:
        milliseconds = self._fields.timestamp
        if milliseconds is None:
            return 0, 0
        return (2 if getattr(self._fields, "timestamp_type", None) == 1 else 1), milliseconds

    def key(self) -> Any:
        return self._fields.key

    def value(self) -> Any:
        return self._fields.value

    def headers(self) -> Any:
        return self._fields.headers


def _by_methods(record: Any) -> ConsumedRecord:
    if callable(getattr(record, "topic", None)):
        return record  # type: ignore[no-any-return]
    names = ("topic", "partition", "offset", "timestamp", "key", "value", "headers")
    if all(hasattr(record, name) for name in names):
        return _OfFields(record)
    given = "None: the consumer had no record" if record is None else type(record).__name__
    raise TypeError(
        "record must be a confluent_kafka.Message, or a ConsumerRecord of aiokafka or kafka-python, or have their "
        f"methods or attributes, not {given}"
    )


def _check_encoded(record: ConsumedRecord, value: Any) -> None:
    if type(value) is not bytes and value is not None:
        try:
            memoryview(value).release()
        except TypeError:
            raise _error(
                record,
                f"its value must be bytes, not {type(value).__name__}: use a consumer that does not deserialize",
                None,
            ) from None
    key = record.key()
    if not isinstance(key, (str, bytes, type(None))):
        raise _error(
            record,
            f"its key must be bytes or text, not {type(key).__name__}: use a consumer that does not deserialize",
            None,
        )


# --- CloudEvents ----------------------------------------------------------------------------------------------------


def _attributes(pairs: _Pairs) -> list[tuple[str, str | bytes | None]]:
    """Headers with the names of attributes as CloudEvents has them: readers take them in any case."""
    found: list[tuple[str, str | bytes | None]] = []
    for name, value in pairs:
        if not _attribute_name(name) and name.lower() != "content-type":
            found.append((name, value))
        elif value is not None:
            lower = name.lower()
            found.append(("content-type" if lower == "ce_datacontenttype" else lower, value))
    return found


def _of_structured_mode(
    record: ConsumedRecord, pairs: list[tuple[str, str | bytes | None]], value: Any
) -> tuple[_Pairs, bytes | None]:
    """An event that is all in the value becomes the headers and the value of binary mode."""
    declared = next((content for name, content in reversed(pairs) if name == "content-type"), None) or b""
    content_type = declared.encode(errors="surrogatepass") if isinstance(declared, str) else declared
    if not isinstance(content_type, bytes):
        return pairs, value  # reading the headers refuses it
    if content_type[:23].lower() != b"application/cloudevents":
        return pairs, value
    if content_type.partition(b";")[0].strip().lower() != b"application/cloudevents+json":
        raise _error(record, f"of structured CloudEvents only JSON is read, not {_shown(declared)}", "content-type")
    try:
        event = msgspec.json.decode(value, type=dict[str, msgspec.Raw])
        attributes = {name: _attribute(name, raw) for name, raw in event.items() if name not in ("data", "data_base64")}
        data: bytes | None = None
        if "data_base64" in event:
            data = msgspec.json.decode(event["data_base64"], type=bytes | None)
        elif "data" in event:
            data = _data(event["data"], attributes.get("datacontenttype"))
    except (ValueError, RecursionError) as error:
        raise _error(record, f"its value is no CloudEvent in JSON: {error}", None) from None
    found: list[tuple[str, str | bytes | None]] = [
        ("content-type" if name == "datacontenttype" else f"ce_{name}", text.encode())
        for name, text in attributes.items()
        if text is not None
    ]
    # The same attributes may stand in the headers as well.
    found += [pair for pair in pairs if pair[0] != "content-type" and not pair[0].startswith("ce_")]
    return found, data


def _attribute(name: str, raw: msgspec.Raw) -> str | None:
    """Text, a number or a truth value as the text that it is in binary mode."""
    value = msgspec.json.decode(raw)
    if isinstance(value, (dict, list, float)):
        raise ValueError(f"the attribute {name!r} must be text, a whole number, true or false")
    return value if value is None or isinstance(value, str) else bytes(raw).decode()


def _data(raw: msgspec.Raw, content_type: str | None) -> bytes | None:
    """Data in JSON as they are; text of another content type is that text."""
    if content_type is None or re.fullmatch(r"[^/]+/(?:[^;]+\+)?json *(?:;.*)?", content_type, re.IGNORECASE):
        return bytes(raw)
    data = msgspec.json.decode(raw)
    return data.encode() if isinstance(data, str) else None if data is None else bytes(raw)


def _check_required(record: ConsumedRecord, pairs: _Pairs) -> None:
    values = dict(pairs)  # the last counts
    for name in _REQUIRED:
        if not values.get(name):
            raise _error(record, f"it is no CloudEvent: header {name!r} is missing or empty", name)


def _read_cloudevents_id(arguments: dict[str, Any], users: list[tuple[str, str | bytes | None]]) -> None:
    text = arguments["id"]
    # Source and id together are unique.
    id = uuid.UUID(text) if _guid(text) else uuid.uuid5(_IDS, f"{arguments.get('source', '')}\n{text}")
    arguments["id"] = id
    if text and text != str(id):
        users.insert(0, ("ce_id", text.encode()))


# --- places and errors ----------------------------------------------------------------------------------------------


def _id_of_place(record: ConsumedRecord) -> uuid.UUID | None:
    offset = record.offset()
    return None if offset is None or offset < 0 else uuid.uuid5(_IDS, f"{record.topic()}/{record.partition()}/{offset}")


def _error(record: ConsumedRecord, reason: str, header: str | None) -> DeserializationError:
    return DeserializationError(
        reason, topic=record.topic(), partition=record.partition(), offset=record.offset(), header=header
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
