"""A record as text: for people, and as a JSON object."""

import datetime
import json
from typing import Any

import msgspec
from confluent_kafka import Message

import kbatch
from kbatch._text import printable
from kbatch.cli._outbox import _plain, _shown


def record_object(message: Message, wire: str) -> dict[str, Any]:
    """What ``--json`` prints of a record. A value that is JSON stands in ``value`` as what it is."""
    value = message.value()
    found: dict[str, Any] = {
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
        "time": _time(message),
        **_plain("key", _bytes(message.key())),
        **_fields(message, wire),
        "headers": [{"name": name, **_plain("value", text)} for name, text in headers_of(message)],
    }
    if value is None:
        return {**found, "value": None}
    try:
        return {**found, "value": json.loads(value)}
    except (ValueError, RecursionError):
        return {**found, **_plain("value_text", _bytes(value))}


def record_text(message: Message, wire: str) -> str:
    """The same in lines, the last of which is empty."""
    fields = _fields(message, wire)
    kind = fields.get("message_type")
    error = fields.get("error")
    first = f"{message.topic()} [{message.partition()}] at offset {message.offset()}, {_time(message) or 'no time'}"
    first += f", key {_shown(_bytes(message.key()))}" if message.key() is not None else ", no key"
    lines = [first + (f", {kind}" if kind else "")]
    if error:
        lines.append(f"  not readable: {error}")
    lines += [f"  {name}: {_shown(value)}" for name, value in headers_of(message)]
    value = message.value()
    lines.append("  a null value" if value is None else "  " + (_shown(_compact(value)) or ""))
    return "\n".join(printable(line) for line in lines) + "\n"


def value_line(message: Message) -> bytes:
    """The value as one line, such as `kbatch produce` reads."""
    value = _bytes(message.value())
    return b"" if value is None else _compact(value)


def headers_of(message: Message) -> list[tuple[str, bytes | None]]:
    """All headers of a record."""
    given: Any = message.headers() or []
    return [(name, value.encode() if isinstance(value, str) else value) for name, value in given]


def _compact(value: Any) -> bytes:
    data = _bytes(value) or b""
    try:
        return msgspec.json.format(data, indent=-1) if b"\n" in data or b"\r" in data else data
    except msgspec.DecodeError:
        return data


def _fields(message: Message, wire: str) -> dict[str, Any]:
    try:
        envelope = kbatch.read_envelope(message, wire=wire)
    except kbatch.DeserializationError as error:
        return {"error": error.reason}
    fields: dict[str, Any] = {}
    if wire != "raw":
        fields = {"id": str(envelope.id), "message_type": envelope.message_type, "attempts": envelope.attempts}
    return fields


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _time(message: Message) -> str | None:
    kind, milliseconds = message.timestamp()
    if not kind or milliseconds < 0:
        return None
    at = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
