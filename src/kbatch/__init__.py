"""kbatch sends batches of message envelopes to Apache Kafka at the speed of librdkafka, with one answer per batch.

import kbatch

with kbatch.Producer({"bootstrap.servers": "localhost:9092"}) as producer:
    report = producer.send_batch("orders", [kbatch.Envelope(order, key=order.id) for order in orders])
    report.raise_for_errors()
"""

from kbatch._batch_sender import KafkaSender, OutgoingBatch, SenderCallback, SenderProtocol
from kbatch._errors import (
    BatchError,
    BatchInterruptedError,
    BatchPendingError,
    BatchTimeoutError,
    CircuitOpenError,
    ConfigError,
    DeliveryError,
    DeserializationError,
    ForkError,
    InboxError,
    KbatchError,
    ListenerError,
    NotYetDueError,
    OutboxError,
    OutboxTimeoutError,
    ProducerClosedError,
    ProducerError,
    ProducerFatalError,
    ProducerFencedError,
    SenderClosedError,
    SenderError,
    SenderFullError,
    SerializationError,
    TransactionUnknownError,
    UndeliveredError,
    UnknownTopicError,
)
from kbatch._fastmap import Envelope, ReceivedEnvelope, Tombstone, read_envelope, uuid7
from kbatch._inbox._base import InboxStatus
from kbatch._inbox._postgres import PostgresInbox
from kbatch._inbox._sqlite import SqliteInbox
from kbatch._librdkafka import version as librdkafka_version
from kbatch._outbox._base import OutboxStatus
from kbatch._outbox._dead_letters import DeadLetter, DeadLetterCount, DeadLetters
from kbatch._outbox._kept import KeptMessage, OutboxQuery
from kbatch._outbox._postgres import PostgresOutbox
from kbatch._outbox._relay import Relay
from kbatch._outbox._scheduled import ScheduledCount, ScheduledMessage, ScheduledMessages
from kbatch._outbox._sqlite import SqliteOutbox
from kbatch._pending import PendingBatch
from kbatch._producer import Producer
from kbatch._receiving._listener import Listener
from kbatch._receiving._transacting import Transaction
from kbatch._recovery._circuit import CircuitState
from kbatch._recovery._retry import RetryPolicy
from kbatch._report import DeliveryReport
from kbatch._sending._agent import SendingAgent
from kbatch._sending._batched import BatchedSender
from kbatch._sending._durable import DurableSender
from kbatch._sending._inline import InlineSender
from kbatch._sending._topic import KafkaTopic, SenderMode
from kbatch._serialization import SerializationContext
from kbatch._version import __version__
from kbatch._wire import ConsumedRecord, WireFormat, WireReader

__all__ = [
    "BatchError",
    "BatchInterruptedError",
    "BatchPendingError",
    "BatchTimeoutError",
    "BatchedSender",
    "CircuitOpenError",
    "CircuitState",
    "ConfigError",
    "ConsumedRecord",
    "DeadLetter",
    "DeadLetterCount",
    "DeadLetters",
    "DeliveryError",
    "DeliveryReport",
    "DeserializationError",
    "DurableSender",
    "Envelope",
    "ForkError",
    "InboxError",
    "InboxStatus",
    "InlineSender",
    "KafkaSender",
    "KafkaTopic",
    "KbatchError",
    "KeptMessage",
    "Listener",
    "ListenerError",
    "NotYetDueError",
    "OutboxError",
    "OutboxQuery",
    "OutboxStatus",
    "OutboxTimeoutError",
    "OutgoingBatch",
    "PendingBatch",
    "PostgresInbox",
    "PostgresOutbox",
    "Producer",
    "ProducerClosedError",
    "ProducerError",
    "ProducerFatalError",
    "ProducerFencedError",
    "ReceivedEnvelope",
    "Relay",
    "RetryPolicy",
    "ScheduledCount",
    "ScheduledMessage",
    "ScheduledMessages",
    "SenderCallback",
    "SenderClosedError",
    "SenderError",
    "SenderFullError",
    "SenderMode",
    "SenderProtocol",
    "SendingAgent",
    "SerializationContext",
    "SerializationError",
    "SqliteInbox",
    "SqliteOutbox",
    "Tombstone",
    "Transaction",
    "TransactionUnknownError",
    "UndeliveredError",
    "UnknownTopicError",
    "WireFormat",
    "WireReader",
    "__version__",
    "librdkafka_version",
    "read_envelope",
    "uuid7",
]
