"""kbatch's pytest plugin: the fixtures ``kafka_cluster``, ``memory_producer``, ``memory_listener``, ``sqlite_outbox``.

pytest imports this in every project of an environment with kbatch. So it stands outside the package and imports it only
when a test asks for the fixture: `import kbatch` takes a while, and fails where confluent-kafka is broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from kbatch import SqliteOutbox
    from kbatch.testing import MemoryListener, MemoryProducer, MockCluster


@pytest.fixture
def kafka_cluster() -> Iterator[MockCluster]:
    """A fresh `kbatch.testing.MockCluster` with one broker, closed when the test ends."""
    from kbatch.testing import MockCluster

    with MockCluster() as cluster:
        yield cluster


@pytest.fixture
def memory_producer() -> Iterator[MemoryProducer]:
    """A fresh `kbatch.testing.MemoryProducer`, closed when the test ends."""
    from kbatch.testing import MemoryProducer

    with MemoryProducer() as producer:
        yield producer


@pytest.fixture
def memory_listener() -> type[MemoryListener]:
    """`kbatch.testing.MemoryListener`: ``memory_listener(handler, dead_letter_topic="dead").send(envelope)``."""
    from kbatch.testing import MemoryListener

    return MemoryListener


@pytest.fixture
def sqlite_outbox(tmp_path: Path) -> SqliteOutbox:
    """A `kbatch.SqliteOutbox` in a file of its own, with its tables."""
    from kbatch import SqliteOutbox

    outbox = SqliteOutbox(tmp_path / "kbatch.db")
    outbox.create()
    return outbox
