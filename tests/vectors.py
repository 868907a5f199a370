"""Reads tests/data/wire_vectors.json into what the tests map and what they expect."""

import json
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from tests.messages import ENCODERS, MESSAGES
from tests.reference import TIME_FIELDS, Record, Setting, Spec

FILE = Path(__file__).parent / "data" / "wire_vectors.json"


@dataclass(frozen=True)
class Vector:
    name: str
    topic: str | None
    spec: Spec
    setting: Setting
    expected: Record | str  # the record, or the bad field


def load() -> list[Vector]:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return [_vector({**content["defaults"], **entry}) for entry in content["vectors"]]


def _vector(entry: dict[str, Any]) -> Vector:
    arguments = {"id": entry["id"], **entry["envelope"]}
    tombstone = arguments.pop("tombstone", False)
    message_class = arguments.pop("message_class", None)
    arguments = {name: _argument(name, value) for name, value in arguments.items()}
    if message_class is not None:
        arguments["message"] = msgspec.convert(arguments["message"], MESSAGES[message_class])
    setting = Setting(
        wire=entry["wire"],
        batch_time=datetime.fromisoformat(entry["batch_time"]),
        source=entry["source"],
        encoder=ENCODERS[entry["encoder"]],
        hook_headers=_pairs(entry["hook_headers"]),
        carry_scheduled_time=entry["carry_scheduled_time"],
    )
    expected = _record(entry, entry["expected"]) if "expected" in entry else entry["error"]
    return Vector(entry["name"], entry["topic"], Spec(arguments, tombstone), setting, expected)


def _argument(name: str, value: Any) -> Any:
    if name == "id":
        return uuid.UUID(value)
    if name in TIME_FIELDS:
        return datetime.fromisoformat(value)
    if name == "headers":
        return {key: _literal(content) for key, content in value.items()} if isinstance(value, dict) else _pairs(value)
    if name == "message" and not (isinstance(value, dict) and "repeat" in value):
        return value
    literal = _literal(value)
    return literal.encode() if name == "data" and isinstance(literal, str) else literal


def _pairs(pairs: list[Any]) -> list[tuple[Any, Any]]:
    return [(_literal(name), _literal(value)) for name, value in pairs]


def _literal(value: Any) -> Any:
    if isinstance(value, dict):
        if "hex" in value:
            return bytes.fromhex(value["hex"])
        if "uuid" in value:
            return uuid.UUID(value["uuid"])
        return value["repeat"] * value["times"]
    return value


def _bytes(value: Any) -> bytes | None:
    literal = _literal(value)
    return literal.encode() if isinstance(literal, str) else literal


def _record(entry: dict[str, Any], expected: dict[str, Any]) -> Record:
    return Record(
        topic=expected.get("topic", entry["topic"]),
        partition=expected.get("partition", -1),
        timestamp=expected.get("timestamp", entry["timestamp"]),
        key=_bytes(expected["key"]),
        value=_bytes(expected["value"]),
        headers=[(_literal(name), _bytes(value)) for name, value in expected["headers"]],
        size=expected["wire_size"],
    )
