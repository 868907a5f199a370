"""Tests without Kafka: producers and listeners in memory, a mock cluster with faults to order, and pytest fixtures.

The plugin `pytest_kbatch`, which pytest finds by itself, gives the fixtures ``kafka_cluster``, ``memory_producer``,
``memory_listener``, and ``sqlite_outbox``, ``sqlite_inbox``, ``postgres_outbox`` and ``postgres_inbox`` with tables of
the test's own. What is in memory for asyncio is in `kbatch.testing.aio`.
"""

from kbatch.testing._api_key import ApiKey
from kbatch.testing._cluster import MockCluster
from kbatch.testing._errors import MockClusterError
from kbatch.testing._memory import MemoryProducer
from kbatch.testing._memory_broker import MemoryRecord
from kbatch.testing._memory_listener import MemoryListener, MemoryOutcome
from kbatch.testing._request import Request

__all__ = [
    "ApiKey",
    "MemoryListener",
    "MemoryOutcome",
    "MemoryProducer",
    "MemoryRecord",
    "MockCluster",
    "MockClusterError",
    "Request",
]
