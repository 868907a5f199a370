"""The wire formats, byte by byte, as tests/data/wire_vectors.json fixes them."""

import re
from collections import Counter

import pytest

from tests import mapping, vectors
from tests.reference import (
    CLOUDEVENTS_NAMES,
    KBATCH_NAMES,
    TEXT_FIELDS,
    TIME_FIELDS,
    WOLVERINE_NAMES,
    Record,
    map_one,
)

VECTORS = vectors.load()
every_vector = pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])


def test_the_vectors_cover_the_wire_formats():
    assert len(VECTORS) >= 40
    assert [name for name, count in Counter(vector.name for vector in VECTORS).items() if count > 1] == []
    mapped = [vector for vector in VECTORS if isinstance(vector.expected, Record)]
    assert {vector.setting.wire for vector in mapped} == {"kbatch", "wolverine", "cloudevents", "raw"}
    for wire, names in (
        ("kbatch", KBATCH_NAMES),
        ("wolverine", WOLVERINE_NAMES),
        ("cloudevents", CLOUDEVENTS_NAMES),
    ):
        of_wire = [vector for vector in mapped if vector.setting.wire == wire]
        written = {name for vector in of_wire for name, _ in vector.expected.headers}
        assert set(names) <= written
        given = {name for vector in of_wire for name in vector.spec.arguments}
        assert {*TEXT_FIELDS, *TIME_FIELDS, "conversation_id", "attempts", "headers", "partition", "timestamp"} <= given
        assert any(vector.spec.tombstone for vector in of_wire)


@every_vector
def test_reference(vector):
    record = map_one(vector.topic, vector.spec, vector.setting)
    if isinstance(vector.expected, Record):
        assert record == vector.expected
    else:
        assert record == {vector.expected}


@every_vector
def test_kbatch(vector):
    with mapping.producer_of(vector.setting) as producer:
        got = mapping.kbatch_maps(producer, vector.topic, [mapping.envelope_of(vector.spec)])
    if isinstance(vector.expected, str):
        assert got == mapping.Failed(0, vector.expected, vector.spec.arguments["id"])
        return
    assert isinstance(got, list)
    assert len(got) == 1
    assert _timeless(got[0], vector) == _timeless(mapping.Mapped(*vector.expected[:-1]), vector)


def _timeless(record, vector):
    """The record as it is at any time: digits of the batch's time are all 0."""
    given = vector.spec.arguments
    if given.get("timestamp") is None:
        record = record._replace(timestamp=0)
    if given.get("sent_at") is None and vector.setting.wire != "raw":
        headers = [
            (name, re.sub(rb"\d", b"0", value) if name in ("sent-at", "ce_time") else value)
            for name, value in record.headers
        ]
        record = record._replace(headers=headers)
    return record


@every_vector
def test_kbatch_and_reference(vector):
    # with the batch's time as it is now
    with mapping.producer_of(vector.setting) as producer:
        mapping.assert_agree(producer, vector.topic, [vector.spec], vector.setting)
