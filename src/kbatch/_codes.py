"""librdkafka's error codes: what they are called, and what they mean for the messages that end with them.

Each code is written here and nowhere else. Names are librdkafka's, without the underscore that its own ones begin with:
negative codes arise in this process, positive ones are the broker's.
"""

from __future__ import annotations

import functools
from typing import Literal

__all__ = ["blamed", "codes_by_name"]

BAD_MSG = -199
DESTROY = -197
TRANSPORT = -195
RESOLVE = -193
MSG_TIMED_OUT = -192
PARTITION_EOF = -191
UNKNOWN_PARTITION = -190
UNKNOWN_TOPIC = -188
ALL_BROKERS_DOWN = -187
TIMED_OUT = -185
QUEUE_FULL = -184
ISR_INSUFF = -183
SSL = -181
WAIT_COORD = -180
AUTHENTICATION = -169
NO_OFFSET = -168
TIMED_OUT_QUEUE = -166
UNSUPPORTED_FEATURE = -165
INTR = -163
KEY_SERIALIZATION = -162
VALUE_SERIALIZATION = -161
RETRY = -153
PURGE_QUEUE = -152
PURGE_INFLIGHT = -151
FATAL = -150
GAPLESS_GUARANTEE = -148
FENCED = -144
AUTO_OFFSET_RESET = -140
INVALID_DIFFERENT_RECORD = -138
INVALID_MSG = 2
UNKNOWN_TOPIC_OR_PART = 3
LEADER_NOT_AVAILABLE = 5
NOT_LEADER_FOR_PARTITION = 6
REQUEST_TIMED_OUT = 7
BROKER_NOT_AVAILABLE = 8
REPLICA_NOT_AVAILABLE = 9
MSG_SIZE_TOO_LARGE = 10
NETWORK_EXCEPTION = 13
COORDINATOR_LOAD_IN_PROGRESS = 14
COORDINATOR_NOT_AVAILABLE = 15
NOT_COORDINATOR = 16
TOPIC_EXCEPTION = 17
RECORD_LIST_TOO_LARGE = 18
NOT_ENOUGH_REPLICAS = 19
NOT_ENOUGH_REPLICAS_AFTER_APPEND = 20
INVALID_REQUIRED_ACKS = 21
ILLEGAL_GENERATION = 22
UNKNOWN_MEMBER_ID = 25
REBALANCE_IN_PROGRESS = 27
TOPIC_AUTHORIZATION_FAILED = 29
GROUP_AUTHORIZATION_FAILED = 30
CLUSTER_AUTHORIZATION_FAILED = 31
INVALID_TIMESTAMP = 32
UNSUPPORTED_SASL_MECHANISM = 33
ILLEGAL_SASL_STATE = 34
UNSUPPORTED_VERSION = 35
NOT_CONTROLLER = 41
UNSUPPORTED_FOR_MESSAGE_FORMAT = 43
POLICY_VIOLATION = 44
OUT_OF_ORDER_SEQUENCE_NUMBER = 45
INVALID_PRODUCER_EPOCH = 47
INVALID_TXN_STATE = 48
INVALID_PRODUCER_ID_MAPPING = 49
INVALID_TRANSACTION_TIMEOUT = 50
CONCURRENT_TRANSACTIONS = 51
TRANSACTIONAL_ID_AUTHORIZATION_FAILED = 53
SECURITY_DISABLED = 54
KAFKA_STORAGE_ERROR = 56
LOG_DIR_NOT_FOUND = 57
SASL_AUTHENTICATION_FAILED = 58
UNKNOWN_PRODUCER_ID = 59
FENCED_LEADER_EPOCH = 74
UNKNOWN_LEADER_EPOCH = 75
UNSUPPORTED_COMPRESSION_TYPE = 76
FENCED_INSTANCE_ID = 82
INVALID_RECORD = 87
THROTTLING_QUOTA_EXCEEDED = 89
PRODUCER_FENCED = 90
UNKNOWN_TOPIC_ID = 100
INCONSISTENT_TOPIC_ID = 103
STALE_MEMBER_EPOCH = 113
TRANSACTION_ABORTABLE = 120

# What librdkafka says of a message besides its error: whether the broker has stored it.
NOT_PERSISTED = 0
POSSIBLY_PERSISTED = 1
PERSISTED = 2

# What envelopes are told that were acknowledged when their transaction was aborted because of others.
ABORTED_CODE = TRANSACTION_ABORTABLE

# What an envelope is told that could not be mapped, if its batch was sent without it.
REJECTED_CODE = VALUE_SERIALIZATION

# After these the same message may well be accepted later, as the Kafka protocol and librdkafka mark them.
RETRIABLE_CODES = frozenset(
    (
        DESTROY,  # librdkafka drops the partitions of a topic in error, and what was in flight for them
        TRANSPORT,
        RESOLVE,
        MSG_TIMED_OUT,
        UNKNOWN_PARTITION,
        UNKNOWN_TOPIC,
        ALL_BROKERS_DOWN,
        TIMED_OUT,
        QUEUE_FULL,
        ISR_INSUFF,
        WAIT_COORD,
        TIMED_OUT_QUEUE,
        INTR,
        RETRY,
        PURGE_QUEUE,
        PURGE_INFLIGHT,
        INVALID_DIFFERENT_RECORD,  # refused for another record of its record batch
        INVALID_MSG,  # damaged on its way
        UNKNOWN_TOPIC_OR_PART,
        LEADER_NOT_AVAILABLE,
        NOT_LEADER_FOR_PARTITION,
        REQUEST_TIMED_OUT,
        BROKER_NOT_AVAILABLE,
        REPLICA_NOT_AVAILABLE,
        NETWORK_EXCEPTION,
        COORDINATOR_LOAD_IN_PROGRESS,
        COORDINATOR_NOT_AVAILABLE,
        NOT_COORDINATOR,
        NOT_ENOUGH_REPLICAS,
        NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        NOT_CONTROLLER,
        CONCURRENT_TRANSACTIONS,
        KAFKA_STORAGE_ERROR,
        FENCED_LEADER_EPOCH,
        UNKNOWN_LEADER_EPOCH,
        THROTTLING_QUOTA_EXCEEDED,
        UNKNOWN_TOPIC_ID,
        INCONSISTENT_TOPIC_ID,
        TRANSACTION_ABORTABLE,
    )
)

# Another producer with the same transactional.id has started.
FENCED_CODES = frozenset((FENCED, INVALID_PRODUCER_EPOCH, PRODUCER_FENCED))

# These put an idempotent or transactional producer into its fatal state.
FATAL_CODES = FENCED_CODES | {
    FATAL,
    GAPLESS_GUARANTEE,
    OUT_OF_ORDER_SEQUENCE_NUMBER,
    INVALID_TXN_STATE,
    INVALID_PRODUCER_ID_MAPPING,
    INVALID_TRANSACTION_TIMEOUT,
    TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    UNKNOWN_PRODUCER_ID,
}

TIMEOUT_CODES = frozenset((MSG_TIMED_OUT, TIMED_OUT, TIMED_OUT_QUEUE, REQUEST_TIMED_OUT))
UNKNOWN_TOPIC_CODES = frozenset((UNKNOWN_PARTITION, UNKNOWN_TOPIC, UNKNOWN_TOPIC_OR_PART, UNKNOWN_TOPIC_ID))
NOT_ALLOWED_CODES = frozenset((TOPIC_AUTHORIZATION_FAILED, GROUP_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED))

# No broker answered, or the producer or the transaction was given up.
OUTAGE_CODES = FATAL_CODES | {
    TRANSPORT,
    RESOLVE,
    MSG_TIMED_OUT,
    ALL_BROKERS_DOWN,
    TIMED_OUT,
    WAIT_COORD,
    TIMED_OUT_QUEUE,
    INTR,
    RETRY,
    PURGE_QUEUE,
    PURGE_INFLIGHT,
    ABORTED_CODE,
}

# A broker refuses a record batch as a whole for one of its records, so each record of it is told one of these.
WHOLE_BATCH_CODES = frozenset(
    (
        INVALID_DIFFERENT_RECORD,  # by librdkafka, of those that the broker has not named
        MSG_SIZE_TOO_LARGE,  # a record, or the record batch
        RECORD_LIST_TOO_LARGE,  # the record batch is larger than a segment of the log
        INVALID_TIMESTAMP,
        INVALID_RECORD,  # no key for a compacted topic, or a schema that the broker checks
    )
)

# Who is to blame for what will not be accepted later. What is in none of these is of unknown cause, and counts against
# the brokers: while the circuit is open nothing is given up.

# A message, which would be refused by any broker.
_ENVELOPE_CODES = WHOLE_BATCH_CODES | {BAD_MSG, KEY_SERIALIZATION, VALUE_SERIALIZATION}

# The topic, or the permission for it: brokers answer, and whatever goes there is refused.
_TOPIC_CODES = frozenset(
    (
        UNSUPPORTED_FEATURE,  # headers, with the message format of the topic
        TOPIC_EXCEPTION,  # no legal name, or an internal topic
        TOPIC_AUTHORIZATION_FAILED,
        UNSUPPORTED_FOR_MESSAGE_FORMAT,
        POLICY_VIOLATION,
        UNSUPPORTED_COMPRESSION_TYPE,
    )
)

# The cluster, or what this client is for it: whatever is sent is refused.
_CLUSTER_CODES = FATAL_CODES | {
    SSL,
    AUTHENTICATION,
    INVALID_REQUIRED_ACKS,
    CLUSTER_AUTHORIZATION_FAILED,
    UNSUPPORTED_SASL_MECHANISM,
    ILLEGAL_SASL_STATE,
    UNSUPPORTED_VERSION,
    SECURITY_DISABLED,
    LOG_DIR_NOT_FOUND,
    SASL_AUTHENTICATION_FAILED,
}


def blamed(code: int) -> Literal["envelope", "topic", "cluster", "unknown"]:
    """Who is to blame for an error of librdkafka's `code`, if the same message will not be accepted later."""
    if code in _ENVELOPE_CODES:
        return "envelope"
    if code in _TOPIC_CODES:
        return "topic"
    return "cluster" if code in _CLUSTER_CODES else "unknown"


# A listener's consumer, or its group, cannot go on.
LISTENER_CODES = frozenset(
    {
        FATAL,
        AUTO_OFFSET_RESET,  # auto.offset.reset=error: somebody has to decide
        FENCED_INSTANCE_ID,
        TOPIC_AUTHORIZATION_FAILED,
        GROUP_AUTHORIZATION_FAILED,
        CLUSTER_AUTHORIZATION_FAILED,
    }
)
# A commit that a rebalance has overtaken: whoever has the partition now reads the records again.
OVERTAKEN_CODES = frozenset(
    {ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, STALE_MEMBER_EPOCH, NO_OFFSET}
)
# No error: a partition was read to its end.
END_CODES = frozenset({PARTITION_EOF})


@functools.cache
def codes_by_name() -> dict[str, int]:
    """The codes that librdkafka has names for, such as ``"_TRANSPORT"``."""
    from kbatch._librdkafka import error_text

    # It tells no bounds: its own errors lie above -200, and Kafka has not reached 200.
    found = {error_text(code)[0]: code for code in range(-200, 200)}
    return {name: code for name, code in found.items() if not name.startswith("ERR_")}
