"""The reference itself: its size formula against librdkafka's, through confluent-kafka and not kbatch."""

from collections.abc import Iterator

import confluent_kafka
import pytest
from hypothesis import given

from tests import strategies, vectors
from tests.reference import Record, wire_size

LIMIT = 100_000


@pytest.fixture(scope="module")
def producer() -> Iterator[confluent_kafka.Producer]:
    """Nothing listens there: what is accepted waits, and is purged."""
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": "localhost:1", "log_level": 0, "message.max.bytes": LIMIT}
    )
    yield producer
    producer.purge()
    producer.flush(10)


def accepts(producer, key, value, headers):
    try:
        producer.produce("topic", key=key, value=value, headers=headers)
    except confluent_kafka.KafkaException as error:
        if error.args[0].code() != confluent_kafka.KafkaError.MSG_SIZE_TOO_LARGE:
            raise
        return False
    producer.purge()
    producer.poll(0)
    return True


def assert_size(producer, key, headers):
    room = LIMIT - wire_size(key, b"", headers)
    assert accepts(producer, key, b"x" * room, headers)
    assert not accepts(producer, key, b"x" * (room + 1), headers)


@given(key=strategies.octets, headers=strategies.few_headers)
def test_size_is_librdkafkas(producer, key, headers):
    encoded = [(name, value.encode() if isinstance(value, str) else value) for name, value in headers]
    assert_size(producer, key, encoded)


@pytest.mark.parametrize("size", sorted({*strategies.VARINT_EDGES, 0, 1, 65, 8193}))
def test_size_at_the_edges_of_varints(producer, size):
    assert_size(producer, None, [("v", b"v" * size), ("n" * max(1, size), None)])


@pytest.mark.parametrize("vector", [v for v in vectors.load() if isinstance(v.expected, Record)], ids=lambda v: v.name)
def test_size_of_the_vectors(producer, vector):
    record = vector.expected
    assert record.size == wire_size(record.key, record.value, record.headers)
    assert_size(producer, record.key, record.headers)
