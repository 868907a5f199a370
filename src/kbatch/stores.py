"""What a store of your own implements: the database behind an outbox or an inbox.

An outbox derives from `OutboxBase` and opens connections: an `OutboxStore` for each relay, an `OutboxWriter` for the
DURABLE senders of a process, an `OutboxAdmin` for those who look after dead letters. An inbox has the methods of
`ListenerInbox`. `kbatch.testing.compliance` has the tests that a store must pass; ``docs/stores.md`` is the guide.
"""

from kbatch._fastmap import MappedBatch
from kbatch._inbox._base import ListenerInbox, ListenerSession, Partition
from kbatch._outbox._base import OutboxBase
from kbatch._outbox._store import (
    BIGGEST_NUMBER,
    BUCKETS,
    DueRow,
    DurableOutbox,
    Failure,
    HeldKey,
    KeptRow,
    Lease,
    NewRow,
    OutboxAdmin,
    OutboxStore,
    OutboxWriter,
    Place,
    Position,
    Reading,
    RefusedWriteError,
    RelayOutbox,
    ScheduledRow,
    StoredRow,
    Table,
)

__all__ = [
    "BIGGEST_NUMBER",
    "BUCKETS",
    "DueRow",
    "DurableOutbox",
    "Failure",
    "HeldKey",
    "KeptRow",
    "Lease",
    "ListenerInbox",
    "ListenerSession",
    "MappedBatch",
    "NewRow",
    "OutboxAdmin",
    "OutboxBase",
    "OutboxStore",
    "OutboxWriter",
    "Partition",
    "Place",
    "Position",
    "Reading",
    "RefusedWriteError",
    "RelayOutbox",
    "ScheduledRow",
    "StoredRow",
    "Table",
]
