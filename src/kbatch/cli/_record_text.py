"""A record as text: for people, and as a JSON object, which is read back."""

import contextlib
import datetime
import json
import re
from typing import Any

import msgspec
from confluent_kafka import Message

import kbatch
from kbatch._fastmap import record_headers
from kbatch._receiving._failures import raw_copy
from kbatch._text import printable
from kbatch.cli._json_line import BadLine, second_opinion
from kbatch.cli._outbox import _plain, _shown

_NOT_ASCII = re.compile("[^\0-\x7f]")
_ABSENT = msgspec.Raw()
_YEAR_10000 = 253_402_300_800_000


def record_line(message: Message, wire: str) -> str:
    """What ``--json`` prints of a record, in ASCII. A value that is JSON stands in ``value`` as what it is, its numbers
    as they are written; other text in ``value_text``, and bytes that are no UTF-8 in ``value_text_base64``. Headers
    that cannot be read are null, and `read_record` does not take them."""
    fields = _fields(message, wire)
    try:
        headers: Any = [{"name": name, **_plain("value", text)} for name, text in headers_of(message)]
    except kbatch.DeserializationError:  # as `error` says
        headers = None
    found: dict[str, Any] = {
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
        "time": _time(message),
        **_plain("key", _bytes(message.key())),
        **fields,
        "headers": headers,
    }
    value = _bytes(message.value())
    text = "null" if value is None else _as_json(value)
    if text is None:
        return json.dumps({**found, **_plain("value_text", value)}) + "\n"
    return f'{json.dumps(found)[:-1]}, "value": {text}}}\n'


def _as_json(value: bytes) -> str | None:
    """A value that is JSON, but for null, which a record without a value shows."""
    try:
        text = msgspec.json.format(value, indent=-1).decode()
    except (ValueError, RecursionError):
        return None
    return None if text == "null" else _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


class _Header(msgspec.Struct):
    name: str
    value: str | msgspec.UnsetType | None = msgspec.UNSET
    value_base64: bytes | msgspec.UnsetType = msgspec.UNSET


class _Line(msgspec.Struct):
    headers: list[_Header] = []
    key: str | None = None
    key_base64: bytes | msgspec.UnsetType = msgspec.UNSET
    value: msgspec.Raw = _ABSENT
    value_text: str | msgspec.UnsetType = msgspec.UNSET
    value_text_base64: bytes | msgspec.UnsetType = msgspec.UNSET


_decode = msgspec.json.Decoder(_Line).decode


def read_record(line: bytes) -> kbatch.Envelope[Any]:
    """What `record_line` has written, as the wire format "raw" sends it: key, headers and value.

    Raises:
        BadLine: It is no such line.
    """
    try:
        line.decode()
        found = _decode(line)
    except (ValueError, RecursionError) as error:
        second_opinion(line)  # says what is wrong with what is no JSON
        raise BadLine(f"not a record as `kbatch consume --json` prints it: {error}") from None
    if found.value_text is not msgspec.UNSET:
        value: bytes | None = found.value_text.encode()
    elif found.value_text_base64 is not msgspec.UNSET:
        value = found.value_text_base64
    elif found.value is _ABSENT:
        raise BadLine("not a record as `kbatch consume --json` prints it: it has no `value`")
    else:
        value = bytes(found.value)
        value = None if value == b"null" else value
    key = found.key if found.key_base64 is msgspec.UNSET else found.key_base64
    return raw_copy(None, key, value, [(each.name, _value_of(each)) for each in found.headers])


def _value_of(header: _Header) -> str | bytes | None:
    if header.value_base64 is not msgspec.UNSET:
        return header.value_base64
    if header.value is msgspec.UNSET:
        raise BadLine(f"header {header.name!r} has no `value`")
    return header.value


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
    with contextlib.suppress(kbatch.DeserializationError):  # as `error` says
        lines += [f"  {name}: {_shown(value)}" for name, value in headers_of(message)]
    value = message.value()
    lines.append("  a null value" if value is None else "  " + (_shown(_compact(value)) or ""))
    return "\n".join(printable(line) for line in lines) + "\n"


def value_line(message: Message) -> bytes:
    """The value as one line, such as `kbatch produce` reads."""
    value = _bytes(message.value())
    return b"" if value is None else _compact(value)


def headers_of(message: Message) -> list[tuple[str, bytes | None]]:
    """All headers of a record.

    Raises:
        DeserializationError: The name of one is not UTF-8.
    """
    given = record_headers(message)
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
    if not kind or not 0 <= milliseconds < _YEAR_10000:  # it may have been microseconds
        return None
    at = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
