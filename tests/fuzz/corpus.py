"""Batches as text, one JSON object a line: what the fuzzer found or saw first, mapped again by every `make test`."""

import array
import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from tests.fuzz.generate import ODD, SETTINGS, Number
from tests.messages import ENCODERS, MESSAGES
from tests.reference import Setting, Spec
from tests.strategies import Octets, Once, Text, Time

FOLDER = Path(__file__).parents[1] / "data" / "fuzz_corpus"


def lines() -> list[str]:
    return [
        line
        for file in sorted(FOLDER.glob("*.jsonl"))
        for line in file.read_text(encoding="ascii").splitlines()
        if line
    ]


def written(setting: Setting, specs: list[Spec]) -> str:
    entry = {
        "wire": setting.wire,
        "encoder": next(name for name, encoder in ENCODERS.items() if encoder is setting.encoder),
        "small": setting.source is not None,
        "envelopes": [
            {"tombstone": spec.tombstone, **{name: _text_of(value) for name, value in spec.arguments.items()}}
            for spec in specs
        ],
    }
    return json.dumps(entry, separators=(",", ":"))


def read(line: str) -> tuple[Setting, list[Spec]]:
    entry = json.loads(line)
    setting = next(
        setting
        for setting in SETTINGS
        if setting.wire == entry["wire"]
        and setting.encoder is ENCODERS[entry["encoder"]]
        and (setting.source is not None) == entry["small"]
    )
    specs = []
    for envelope in entry["envelopes"]:
        tombstone = envelope.pop("tombstone")
        specs.append(Spec({name: _value_of(text) for name, text in envelope.items()}, tombstone))
    return setting, specs


# A value is itself if JSON has it, else {"its kind": its content}.
_PLAIN = (type(None), bool, int, float, str)


def _octets_text(content: bytes) -> Any:
    if len(content) > 100 and content == content[:1] * len(content):
        return [content[:1].hex(), len(content)]
    return content.hex()


def _octets(text: Any) -> bytes:
    return bytes.fromhex(text) if isinstance(text, str) else bytes.fromhex(text[0]) * text[1]


def _text_of(value: Any) -> Any:
    for name, odd in ODD.items():
        if value is odd or (name == "unprintable" and type(value) is type(odd)):
            return {"odd": name}
    if type(value) in _PLAIN:
        long = isinstance(value, str) and len(value) > 100 and value == value[:1] * len(value)
        return {"long": [value[:1], len(value)]} if long else value
    return {_kind_of(value): _content_of(value)}


def _kind_of(value: Any) -> str:
    return type(value).__qualname__ if not isinstance(value, msgspec.Struct) else f"message {type(value).__qualname__}"


def _content_of(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview, array.array)):
        return _octets_text(bytes(value))
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, (list, tuple)):
        return [_text_of(part) for part in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (str, uuid.UUID, complex)):
        return str(value)
    if isinstance(value, int):
        return int(value)
    return [[_text_of(name), _text_of(part)] for name, part in value.items()]


def _pairs(text: list[Any]) -> Iterator[tuple[Any, Any]]:
    return ((_value_of(name), _value_of(part)) for name, part in text)


_BUILDERS: dict[str, Any] = {
    "odd": ODD.__getitem__,
    "long": lambda text: text[0] * text[1],
    "bytes": _octets,
    "Octets": lambda text: Octets(_octets(text)),
    "bytearray": lambda text: bytearray(_octets(text)),
    "memoryview": lambda text: memoryview(_octets(text)),
    "array": lambda text: array.array("b", _octets(text)),
    "list": lambda text: [_value_of(part) for part in text],
    "tuple": lambda text: tuple(_value_of(part) for part in text),
    "dict": lambda text: dict(_pairs(text)),
    "Once": lambda text: Once(_pairs(text)),
    "mappingproxy": lambda text: MappingProxyType(dict(_pairs(text))),
    "datetime": datetime.fromisoformat,
    "Time": Time.fromisoformat,
    "UUID": uuid.UUID,
    "Text": Text,
    "Number": Number,
    "complex": complex,
}


def _value_of(text: Any) -> Any:
    if not isinstance(text, dict):
        return text
    ((kind, content),) = text.items()
    if kind.startswith("message "):
        return msgspec.convert(content, MESSAGES[kind.removeprefix("message ")])
    return _BUILDERS[kind](content)
