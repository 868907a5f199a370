"""A line of JSON as a message: is it JSON, and what is its key?"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec


class BadLine(Exception):
    """Why a line cannot be sent."""


class _Number(str):
    """A number as it is written."""


def key_reader(field: str | None) -> Callable[[bytes], str | None]:
    """A function that checks that a line is JSON and returns its key, None without a `field`.

    The key is the value of the field `field` of the object on the line: text as it is, a number as it is written.
    The function raises `BadLine`.
    """
    return _reader_without_key() if field is None else _reader_of_key(field)


def _reader_without_key() -> Callable[[bytes], None]:
    skim = msgspec.json.Decoder(msgspec.Raw).decode

    def read(line: bytes) -> None:
        try:
            line.decode()
            skim(line)
        except (ValueError, RecursionError):
            second_opinion(line)

    return read


def _reader_of_key(field: str) -> Callable[[bytes], str]:
    # A struct of one field: everything else on the line is checked but not built.
    try:
        keyed = msgspec.defstruct("Keyed", [("key", msgspec.Raw, msgspec.field(name=field))])
    except ValueError:  # msgspec has no names with quotation marks, backslashes or control characters
        return lambda line: _key_of(second_opinion(line), field)
    decode: Callable[[bytes], Any] = msgspec.json.Decoder(keyed).decode
    decode_text = msgspec.json.Decoder(str).decode

    def read(line: bytes) -> str:
        try:
            line.decode()
            raw = bytes(decode(line).key)
            if raw[0] == 34:  # a quotation mark
                return decode_text(raw)
            if raw[0] in b"-0123456789":
                return raw.decode()
        except (ValueError, RecursionError):
            pass
        return _key_of(second_opinion(line), field)

    return read


def _key_of(value: Any, field: str) -> str:
    if not isinstance(value, dict):
        raise BadLine(f"{_kind(value)}, not an object with a field {field!r}")
    if field not in value:
        raise BadLine(f"no field {field!r}")
    key = value[field]
    if not isinstance(key, str):
        raise BadLine(f"field {field!r} is {_kind(key)}; a key must be text or a number")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise BadLine(f"field {field!r} has half a surrogate pair; a key must be Unicode text") from None
    return str(key)


def second_opinion(line: bytes) -> Any:
    """What Python's own parser makes of a line that msgspec refused; raises `BadLine` if it refuses it as well.

    They agree but for half surrogate pairs in text, which JSON's grammar allows; and it says better what is wrong.
    """
    try:
        # As text: of bytes it would guess the encoding.
        return json.loads(line.decode(), parse_int=_Number, parse_float=_Number, parse_constant=_no_constant)
    except UnicodeDecodeError as failed:
        raise BadLine(f"not UTF-8: byte 0x{line[failed.start]:02x} at column {failed.start + 1}") from None
    except RecursionError:
        raise BadLine("nested too deeply") from None
    except json.JSONDecodeError as failed:
        raise BadLine(f"not JSON: {failed.msg} at column {failed.colno}") from None
    except ValueError as failed:
        raise BadLine(f"not JSON: {failed}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _kind(value: Any) -> str:
    if isinstance(value, _Number):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "an object"
    return "an array" if isinstance(value, list) else json.dumps(value)
