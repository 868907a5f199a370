"""Runs kbatch's phase 1 on what the reference maps too, and puts both results in one shape."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import kbatch
from kbatch._pending import PendingBatch
from tests.reference import Record, Rejected, Setting, Spec, map_batch, map_one

# Phase 1 starts no librdkafka, and nothing listens here.
NOWHERE = {"bootstrap.servers": "localhost:1"}


class Mapped(NamedTuple):
    """A record without its size, which kbatch does not tell."""

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
        carry_scheduled_time=setting.carry_scheduled_time,
    )


def kbatch_maps(producer: Any, topic: str | None, envelopes: Iterable[Any]) -> list[Mapped | None] | Failed:
    """The records, None for an envelope that has expired."""
    try:
        return [None if record is None else Mapped(*record) for record in producer._map(topic, envelopes)]
    except (kbatch.SerializationError, kbatch.NotYetDueError) as error:
        return Failed(error.index, error.field, error.envelope_id)


def kbatch_maps_all_but(
    producer: Any, topic: str | None, envelopes: Iterable[Any]
) -> tuple[list[Mapped | None], list[Failed]]:
    """The records of a batch that goes on without what cannot be mapped, None for what is not sent; and these."""
    batch = PendingBatch(producer._core)
    rejected: list[tuple[int, kbatch.SerializationError | kbatch.NotYetDueError]] = []
    producer._core.map(batch, topic, envelopes, rejected)
    records = [None if record is None else Mapped(*record) for record in producer._core.records(batch)]
    assert [index for index, _ in rejected] == [error.index for _, error in rejected]
    return records, [Failed(index, error.field, error.envelope_id) for index, error in rejected]


def reference_maps(topic: str | None, specs: Sequence[Spec], setting: Setting) -> list[Mapped | None] | Rejected:
    records = map_batch(topic, specs, setting)
    if isinstance(records, Rejected):
        return records
    return [None if record is None else Mapped(*record[:-1]) for record in records]


def batch_time_of(records: Sequence[Mapped | None], specs: Sequence[Spec], setting: Setting) -> datetime | None:
    """The time that kbatch stamped the batch with, as exactly as a record shows it, or None."""
    milliseconds = None
    for record, spec in zip(records, specs, strict=True):
        if record is None:
            continue
        if spec.arguments.get("sent_at") is None and setting.wire != "raw":
            for name, value in record.headers:
                if name in ("sent-at", "ce_time"):
                    return parsed_time(value)
        if spec.arguments.get("timestamp") is None:
            milliseconds = datetime.fromtimestamp(record.timestamp / 1000, timezone.utc)
    return milliseconds


def parsed_time(value: bytes | None) -> datetime:
    """Either wire's time; any other text is a ValueError."""
    text = (value or b"").decode("ascii")
    for pattern in ("%Y-%m-%dT%H:%M:%S.%fZ", "%Y-%m-%d %H:%M:%S:%f Z"):
        try:
            return datetime.strptime(text, pattern).replace(tzinfo=timezone.utc)
        except ValueError:
            continue
    raise ValueError(f"not a time of kbatch's or wolverine's: {text!r}")


def assert_agree(
    producer: Any, topic: str | None, specs: Sequence[Spec], setting: Setting
) -> list[Mapped | None] | Failed:
    """kbatch and the reference: the same records, or the same envelope refused for one of its bad fields."""
    envelopes = [envelope_of(spec) for spec in specs]
    specs = [
        Spec({**spec.arguments, "id": envelope.id}, spec.tombstone)
        for spec, envelope in zip(specs, envelopes, strict=True)
    ]
    before = datetime.now(timezone.utc) - timedelta(milliseconds=1)
    got = kbatch_maps(producer, topic, envelopes)
    after = datetime.now(timezone.utc) + timedelta(milliseconds=1)
    if isinstance(got, Failed):
        expected = reference_maps(topic, specs, setting)
        assert isinstance(expected, Rejected), f"kbatch refuses what the reference maps: {got}"
        assert got.index == expected.index
        assert got.field in expected.fields
        assert got.envelope_id == envelopes[got.index].id
        return got
    assert len(got) == len(specs)
    stamped = batch_time_of(got, specs, setting)
    if stamped is not None:
        assert before <= stamped <= after
        setting = replace(setting, batch_time=stamped)
    expected = reference_maps(topic, specs, setting)
    assert not isinstance(expected, Rejected), f"kbatch maps what the reference refuses: {expected}"
    assert got == expected
    return got


def assert_agree_on_each(
    producer: Any, topic: str | None, specs: Sequence[Spec], setting: Setting
) -> tuple[list[Mapped | None], list[Failed]]:
    """kbatch, which leaves out what it cannot map, and the reference, which maps each envelope by itself."""
    envelopes = [envelope_of(spec) for spec in specs]
    specs = [
        Spec({**spec.arguments, "id": envelope.id}, spec.tombstone)
        for spec, envelope in zip(specs, envelopes, strict=True)
    ]
    got, rejected = kbatch_maps_all_but(producer, topic, envelopes)
    assert len(got) == len(specs)
    stamped = batch_time_of(got, specs, setting)
    if stamped is not None:
        setting = replace(setting, batch_time=stamped)
    expected: list[Mapped | None] = []
    refused: dict[int, frozenset[str]] = {}
    for index, spec in enumerate(specs):
        record = map_one(topic, spec, setting)
        if isinstance(record, frozenset):
            refused[index] = record
        expected.append(Mapped(*record[:-1]) if isinstance(record, Record) else None)
    assert got == expected
    assert [failed.index for failed in rejected] == list(refused)
    for failed in rejected:
        assert failed.field in refused[failed.index]
        assert failed.envelope_id == envelopes[failed.index].id
    return got, rejected
