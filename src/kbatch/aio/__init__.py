"""kbatch for asyncio: the same names as in `kbatch`, awaitable. Envelopes, reports and errors are the same objects.

import kbatch
from kbatch import aio

async with aio.Producer({"bootstrap.servers": "localhost:9092"}) as producer:
    report = await producer.send_batch("orders", [kbatch.Envelope(order, key=order.id) for order in orders])
    report.raise_for_errors()

Sending does not hold the event loop up: long batches are mapped in slices, a thread without the GIL hands them to
librdkafka, and no thread waits for a batch. A producer belongs to no loop; each call
answers the one it was made on.

A `PendingBatch` is the same as in `kbatch`: await it. ``asyncio.wait`` takes ``asyncio.ensure_future(pending)``. Its
``wait()`` blocks the thread, and what its ``add_done_callback()`` takes runs on a thread of the producer, not on the
loop; `Producer.submit` takes a ``callback`` that runs on the loop.
"""

from kbatch._pending import PendingBatch
from kbatch.aio._batch_sender import KafkaSender, SenderCallback, SenderProtocol
from kbatch.aio._batched import BatchedSender, SendingAgent
from kbatch.aio._dead_letters import DeadLetters
from kbatch.aio._durable import DurableSender
from kbatch.aio._inline import InlineSender
from kbatch.aio._listener import Listener
from kbatch.aio._postgres import PostgresOutbox
from kbatch.aio._postgres_inbox import PostgresInbox
from kbatch.aio._producer import Producer
from kbatch.aio._relay import Relay
from kbatch.aio._scheduled import ScheduledMessages
from kbatch.aio._sqlite import SqliteOutbox
from kbatch.aio._sqlite_inbox import SqliteInbox
from kbatch.aio._topic import KafkaTopic
from kbatch.aio._transaction import Transaction

__all__ = [
    "BatchedSender",
    "DeadLetters",
    "DurableSender",
    "InlineSender",
    "KafkaSender",
    "KafkaTopic",
    "Listener",
    "PendingBatch",
    "PostgresInbox",
    "PostgresOutbox",
    "Producer",
    "Relay",
    "ScheduledMessages",
    "SenderCallback",
    "SenderProtocol",
    "SendingAgent",
    "SqliteInbox",
    "SqliteOutbox",
    "Transaction",
]
