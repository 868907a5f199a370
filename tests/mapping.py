"""Runs kbatch's phase 1 on what the reference maps too, and puts both results in one shape."""

import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import kbatch
from tests.reference import Record, Rejected, Setting, Spec, map_batch

# Phase 1 starts no librdkafka, and nothing listens here.
NOWHERE = {"bootstrap.servers": "localhost:1"}


class Mapped(NamedTuple):
    """A record without what only the reference knows; no partition is -1, no timestamp 0, as librdkafka has it."""

    topic: str
    partition: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


class Failed(NamedTuple):
    index: int
    field: str
    envelope_id: uuid.UUID


def envelope_of(spec: Spec) -> Any:
    if not spec.tombstone:
        return kbatch.Envelope(**spec.arguments)
    others = {name: value for name, value in spec.arguments.items() if name != "key"}
    return kbatch.Tombstone(spec.arguments["key"], **others)


def producer_of(setting: Setting) -> Any:
    return kbatch.Producer(
        {
            **NOWHERE,
            "message.max.bytes": setting.message_max_bytes,
            "queue.buffering.max.kbytes": setting.body_max_bytes // 1024,
        },
        wire=setting.wire,
        encoder=setting.encoder,
        source=setting.source,
        header_hook=(lambda: setting.hook_headers) if setting.hook_headers else None,
    )


def kbatch_maps(producer: Any, topic: str | None, envelopes: Iterable[Any]) -> list[Mapped] | Failed:
    try:
        return [
            Mapped(topic, -1 if partition is None else partition, timestamp or 0, key, value, list(headers))
            for topic, partition, timestamp, key, value, headers in producer._map(topic, envelopes)
        ]
    except kbatch.SerializationError as error:
        return Failed(error.index, error.field, error.envelope_id)


def reference_maps(topic: str | None, specs: Sequence[Spec], setting: Setting) -> list[Mapped] | Rejected:
    records = map_batch(topic, specs, setting)
    return records if isinstance(records, Rejected) else without_size(records)


def without_size(records: Sequence[Record]) -> list[Mapped]:
    return [
        Mapped(
            record.topic,
            -1 if record.partition is None else record.partition,
            record.timestamp or 0,
            record.key,
            record.value,
            record.headers,
        )
        for record in records
    ]


def batch_time_of(records: Sequence[Mapped], specs: Sequence[Spec], wire: str) -> datetime | None:
    """The time that kbatch stamped the batch with, or None if no record shows it."""
    if wire == "raw":
        return None
    for record, spec in zip(records, specs, strict=True):
        if spec.arguments.get("sent_at") is None:
            for name, value in record.headers:
                if name == "sent-at":
                    return parsed_time(value)
    return None


def parsed_time(value: bytes | None) -> datetime:
    """Either wire's time, strictly: any other text is a ValueError."""
    text = (value or b"").decode("ascii")
    for pattern in ("%Y-%m-%dT%H:%M:%S.%fZ", "%Y-%m-%d %H:%M:%S:%f Z"):
        try:
            return datetime.strptime(text, pattern).replace(tzinfo=timezone.utc)
        except ValueError:
            continue
    raise ValueError(f"not a time of kbatch's or wolverine's: {text!r}")


def assert_agree(producer: Any, topic: str | None, specs: Sequence[Spec], setting: Setting) -> list[Mapped] | Failed:
    """kbatch and the reference: the same records, or the same envelope refused for one of its bad fields."""
    envelopes = [envelope_of(spec) for spec in specs]
    specs = [
        Spec({**spec.arguments, "id": envelope.id}, spec.tombstone)
        for spec, envelope in zip(specs, envelopes, strict=True)
    ]
    before = datetime.now(timezone.utc)
    got = kbatch_maps(producer, topic, envelopes)
    after = datetime.now(timezone.utc) + timedelta(microseconds=1)
    if isinstance(got, Failed):
        expected = reference_maps(topic, specs, setting)
        assert isinstance(expected, Rejected), f"kbatch refuses what the reference maps: {got}"
        assert got.index == expected.index
        assert got.field in expected.fields
        assert got.envelope_id == envelopes[got.index].id
        return got
    stamped = batch_time_of(got, specs, setting.wire)
    if stamped is not None:
        assert before <= stamped <= after
    expected = reference_maps(topic, specs, _at(setting, stamped))
    assert not isinstance(expected, Rejected), f"kbatch maps what the reference refuses: {expected}"
    assert got == expected
    return got


def _at(setting: Setting, time: datetime | None) -> Setting:
    return setting if time is None else Setting(**{**vars(setting), "batch_time": time})
