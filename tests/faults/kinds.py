"""The faults: what each does to the cluster or the producer, what sends it needs, and what it excuses.

These are the faults that concern the producer and that the mock cluster can play. Not here: what only a real broker
does (a killed leader, min.insync.replicas, fencing), and interpreter exit, Ctrl-C and clock jumps, which have tests of
their own.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kbatch
from kbatch.testing import ApiKey

if TYPE_CHECKING:
    from tests.faults.plan import Fault
    from tests.faults.runner import Run

# librdkafka's codes
TRANSPORT, MSG_TIMED_OUT, TIMED_OUT_QUEUE = -195, -192, -166
UNKNOWN_PARTITION, UNKNOWN_TOPIC, UNKNOWN_TOPIC_OR_PART = -190, -188, 3
PURGE_QUEUE, PURGE_INFLIGHT, FATAL, DESTROY = -152, -151, -150, -197
OUT_OF_ORDER_SEQUENCE = 45

TIMED_OUT = frozenset((MSG_TIMED_OUT, TIMED_OUT_QUEUE))
# For a topic in error librdkafka drops the partitions, and fails what is queued for them with one of these.
DROPPED = frozenset((UNKNOWN_PARTITION, DESTROY))
UNKNOWN = frozenset((UNKNOWN_TOPIC, UNKNOWN_TOPIC_OR_PART)) | DROPPED
PURGED = frozenset((PURGE_QUEUE, PURGE_INFLIGHT))
RETRIABLE = ("REQUEST_TIMED_OUT", "NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "KAFKA_STORAGE_ERROR")
PERMANENT = {"MSG_SIZE_TOO_LARGE": 10, "INVALID_RECORD": 87, "POLICY_VIOLATION": 44}


Action = Callable[["Run", "Fault"], None]


def _nothing(run: Run, fault: Fault) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    name: str
    #: The fault of which this is one form.
    row: str
    begin: Callable[[Run, Fault], None] = _nothing
    end: Callable[[Run, Fault], None] = _nothing
    #: Fields of the sends that the fault is about.
    send: dict[str, Any] = field(default_factory=dict)
    #: Keys of librdkafka's configuration.
    config: dict[str, Any] = field(default_factory=dict)
    #: The fault goes on until the batches sent meanwhile are settled.
    until_settled: bool = False
    #: How long it goes on, in milliseconds, at least and at most.
    hold_ms: tuple[int, int] = (0, 0)
    #: The mock cluster checks no sequence numbers: with several requests in flight an error of the first lets the
    #: second overtake it, or be taken for its acknowledgement.
    one_in_flight: bool = False
    idempotent: bool = False
    #: It is about a producer that has not sent yet.
    cold: bool = False
    codes: frozenset[int] = frozenset()
    refusals: frozenset[str] = frozenset()
    #: Connections are cut, or answers given up, while a request may have been carried out: librdkafka sends again, and
    #: the mock cluster does not deduplicate.
    copies: bool = False
    #: A real cluster does, for an idempotent producer.
    deduplicated: bool = False
    #: Brokers may seem to be away, or to be there without taking anything.
    outage: bool = True


def _push(*errors: str) -> Callable[[Run, Fault], None]:
    def push(run: Run, fault: Fault) -> None:
        run.cluster.push_request_errors(ApiKey.PRODUCE, [errors[fault.amount % len(errors)]] * (fault.amount % 5 + 1))

    return push


def _lose_requests(run: Run, fault: Fault) -> None:
    run.cluster.push_request_errors(ApiKey.PRODUCE, ["_TRANSPORT"] * 2_000)


def _clear(run: Run, fault: Fault) -> None:
    run.cluster.clear_request_errors(ApiKey.PRODUCE)


def _push_on_partition(run: Run, fault: Fault) -> None:
    error = RETRIABLE[fault.amount % len(RETRIABLE)]
    run.cluster.push_partition_errors(run.topic, fault.amount % run.plan.partitions, ApiKey.PRODUCE, [error] * 2)


def _push_producer_id(run: Run, fault: Fault) -> None:
    run.cluster.push_request_errors(ApiKey.INIT_PRODUCER_ID, ["COORDINATOR_NOT_AVAILABLE"] * (fault.amount % 2 + 1))


def _clear_producer_id(run: Run, fault: Fault) -> None:
    run.cluster.clear_request_errors(ApiKey.INIT_PRODUCER_ID)


def _brokers_down(run: Run, fault: Fault) -> None:
    run.cluster.set_broker_down()


def _brokers_up(run: Run, fault: Fault) -> None:
    run.cluster.set_broker_up()


def _lose_answers(run: Run, fault: Fault) -> None:
    run.cluster.set_broker_down()
    _brokers_up(run, fault)
    _quick(run, fault)


def _broker_down(run: Run, fault: Fault) -> None:
    run.cluster.set_broker_down(fault.amount % run.brokers + 1)


def _broker_up(run: Run, fault: Fault) -> None:
    run.cluster.set_broker_up(fault.amount % run.brokers + 1)


def _move_leaders(run: Run, fault: Fault) -> None:
    for partition in range(run.plan.partitions):
        run.cluster.set_partition_leader(run.topic, partition, (partition + fault.amount) % run.brokers + 1)


def _move_leaders_back(run: Run, fault: Fault) -> None:
    for partition in range(run.plan.partitions):
        run.cluster.set_partition_leader(run.topic, partition, partition % run.brokers + 1)


def _no_leaders(run: Run, fault: Fault) -> None:
    for partition in range(run.plan.partitions):
        run.cluster.set_partition_leader(run.topic, partition, -1)


def _slow(rtt_ms: int) -> Callable[[Run, Fault], None]:
    def slow(run: Run, fault: Fault) -> None:
        run.cluster.set_rtt(-1, rtt_ms + fault.amount)

    return slow


def _quick(run: Run, fault: Fault) -> None:
    run.cluster.set_rtt(-1, 0)


def _unknown(run: Run, fault: Fault) -> None:
    run.cluster.set_topic_error(run.topics["unknown"], "UNKNOWN_TOPIC_OR_PART")
    run.at_end.append(lambda: run.cluster.set_topic_error(run.topics["unknown"], 0))


def _topic_error(run: Run, fault: Fault) -> None:
    run.cluster.set_topic_error(run.topic, "UNKNOWN_TOPIC_OR_PART")


def _no_topic_error(run: Run, fault: Fault) -> None:
    run.cluster.set_topic_error(run.topic, 0)


def _create_doomed(run: Run, fault: Fault) -> None:
    if run.topics["doomed"] not in run.history.deleted:
        run.cluster.create_topic(run.topics["doomed"], 2)
    run.history.deleted.add(run.topics["doomed"])
    _slow(20)(run, fault)


def _delete_doomed(run: Run, fault: Fault) -> None:
    run.cluster.delete_topic(run.topics["doomed"])
    _quick(run, fault)


def _renew(run: Run, fault: Fault) -> None:
    run.cluster.clear_request_errors(ApiKey.PRODUCE)
    run.renew_producer(close_timeout_s=0.2)
    _quick(run, fault)


def _inject_fatal(run: Run, fault: Fault) -> None:
    run.start_producer()
    _slow(20)(run, fault)
    run.producer._core.inject_fatal_error(OUT_OF_ORDER_SEQUENCE, "injected by a test")


def _purge(run: Run, fault: Fault) -> None:
    run.producer.purge()
    _quick(run, fault)


def _close(run: Run, fault: Fault) -> None:
    run.renew_producer(close_timeout_s=fault.amount / 1000)
    _quick(run, fault)


def _lose_leader_beside(run: Run, fault: Fault) -> None:
    run.begin_beside(fault)


def _end_beside(run: Run, fault: Fault) -> None:
    run.end_beside(fault)


_CHILD_REFUSED, _CHILD_SENT, _CHILD_FAILED = 0, 1, 2


def _fork(run: Run, fault: Fault) -> None:
    run.start_producer()
    if not hasattr(os, "fork") or os.environ.get("KBATCH_SLOW_BUILD", "") not in ("", "0"):
        # In a forked child glibc reuses the stacks of threads that are gone, whose redzones AddressSanitizer keeps.
        _quick(run, fault)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks is the point
        child = os.fork()
    if child == 0:
        outcome = _CHILD_FAILED
        try:
            run.producer.send_batch(run.topic, [kbatch.Envelope(data=b"of the child")])
            outcome = _CHILD_SENT
        except kbatch.ForkError:
            outcome = _CHILD_REFUSED
        finally:
            os._exit(outcome)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status != _CHILD_REFUSED:
        told = {_CHILD_SENT: "sent a batch", _CHILD_FAILED: "met another error than ForkError"}
        run.history.findings.append(f"a forked child {told.get(status, f'hung or crashed ({status})')}")
    _quick(run, fault)


_ROW_LOST = "request lost before append; written, acknowledgement lost"
_ROW_DOWN = "all brokers down past the timeout"
_ROW_LEADER = "leader moves; no leader"
_ROW_REPLICAS = "not enough replicas, before and after append"
_ROW_SIZE = "too large for the client; for the broker"
_ROW_TOPIC = "unknown topic; deleted in flight"
_ROW_FATAL = "fatal idempotence error"
_ROW_END = "purge, close, interpreter exit in flight"
_ROW_CANCELLED = "task cancelled, loop closed, MemoryError"
_SHORT = {"message.timeout.ms": 1_000}
_ASKING = {"topic.metadata.refresh.interval.ms": 500, "topic.metadata.propagation.max.ms": 200}

BESIDE = "another topic without a leader"

KINDS = (
    Kind("request lost", _ROW_LOST, _push("_TRANSPORT"), _clear, hold_ms=(0, 100), one_in_flight=True),
    Kind(
        "requests lost past the timeout",
        _ROW_LOST,
        _lose_requests,
        _clear,
        config=_SHORT,
        until_settled=True,
        codes=TIMED_OUT,
        one_in_flight=True,
    ),
    Kind("brokers blink", _ROW_DOWN, _brokers_down, _brokers_up, hold_ms=(20, 200), copies=True),
    Kind("acknowledgement lost", _ROW_LOST, _slow(50), _lose_answers, hold_ms=(0, 40), copies=True),
    Kind("one broker blinks", _ROW_DOWN, _broker_down, _broker_up, hold_ms=(20, 200), copies=True),
    Kind(
        "brokers down past the timeout",
        _ROW_DOWN,
        _brokers_down,
        _brokers_up,
        config=_SHORT,
        until_settled=True,
        codes=TIMED_OUT,
        copies=True,
    ),
    Kind("leader moves", _ROW_LEADER, _move_leaders, _move_leaders_back, hold_ms=(0, 100), one_in_flight=True),
    Kind("no leader", _ROW_LEADER, _no_leaders, _move_leaders_back, hold_ms=(20, 200), one_in_flight=True),
    Kind(
        "not enough replicas",
        _ROW_REPLICAS,
        _push("NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND"),
        _clear,
        hold_ms=(0, 100),
        one_in_flight=True,
    ),
    Kind("slow broker", "slow broker", _slow(10), _quick, hold_ms=(0, 100), outage=False),
    Kind(
        "answers past the timeout",
        "slow broker",
        _slow(2_000),
        _quick,
        config=_SHORT,
        until_settled=True,
        codes=TIMED_OUT,
        copies=True,
    ),
    Kind(
        "queue full",
        "queue full in mid-batch",
        _slow(5),
        _quick,
        send={"count": 300},
        config={"queue.buffering.max.messages": 40},
        until_settled=True,
    ),
    Kind("too large", _ROW_SIZE, send={"spoil": "too large"}, config={"message.max.bytes": 4_000}, outage=False),
    Kind("too large for the broker", _ROW_SIZE, _push("MSG_SIZE_TOO_LARGE"), _clear, one_in_flight=True, outage=False,
         codes=frozenset((10,)), hold_ms=(0, 50)),
    Kind("unserialisable", "too large for the client; for the broker", send={"spoil": "unserialisable"}, outage=False),
    Kind("unknown topic", _ROW_TOPIC, _unknown, send={"topic": "unknown"}, config=_ASKING, codes=UNKNOWN,
         until_settled=True),
    Kind("unknown partition", _ROW_TOPIC, send={"spoil": "unknown partition"}, codes=frozenset((UNKNOWN_PARTITION,))),
    Kind("topic error in flight", _ROW_TOPIC, _topic_error, _no_topic_error, config=_ASKING, codes=UNKNOWN,
         hold_ms=(50, 700)),
    Kind("topic deleted in flight", _ROW_TOPIC, _create_doomed, _delete_doomed, send={"topic": "doomed"},
         config=_ASKING, codes=UNKNOWN, hold_ms=(0, 60), one_in_flight=True),
    Kind("not authorised", "authorisation, expired credentials", _push("TOPIC_AUTHORIZATION_FAILED"), _clear,
         codes=frozenset((29,)) | DROPPED, hold_ms=(0, 50), one_in_flight=True, outage=False),
    Kind("fatal error of the broker", _ROW_FATAL, _push("OUT_OF_ORDER_SEQUENCE_NUMBER"), _renew,
         codes=frozenset((OUT_OF_ORDER_SEQUENCE, FATAL)) | PURGED,
         refusals=frozenset(("ProducerFatalError", "ProducerClosedError")),
         hold_ms=(0, 200), one_in_flight=True, idempotent=True),
    Kind("fatal error", _ROW_FATAL, _inject_fatal, _renew,
         codes=frozenset((OUT_OF_ORDER_SEQUENCE, FATAL)) | PURGED,
         refusals=frozenset(("ProducerFatalError", "ProducerClosedError")),
         hold_ms=(0, 200), idempotent=True),
    Kind("purge", _ROW_END, _slow(50), _purge, codes=PURGED, hold_ms=(0, 50)),
    Kind("close in flight", _ROW_END, _slow(100), _close, codes=PURGED, refusals=frozenset(("ProducerClosedError",)),
         hold_ms=(0, 50)),
    Kind("fork", "fork in mid-send", _slow(20), _fork),
    Kind("task cancelled", _ROW_CANCELLED, _slow(30), _quick, send={"way": "cancelled"}, until_settled=True),
    Kind("sender's task cancelled", _ROW_CANCELLED, _slow(30), _quick, send={"way": "aio cancelled"},
         codes=frozenset((PURGE_QUEUE,)), refusals=frozenset(("BatchInterruptedError",)), until_settled=True),
    Kind("loop closed", _ROW_CANCELLED, _slow(30), _quick, send={"way": "loop closed"}, until_settled=True),
    Kind("no memory", _ROW_CANCELLED, send={"spoil": "no memory"}, outage=False),
    Kind("wait times out", _ROW_END, _slow(30), _quick, send={"way": "timed"}, codes=frozenset((TIMED_OUT_QUEUE,)),
         until_settled=True),
    Kind("payload changed", "payload changed while in flight", _slow(20), _quick,
         send={"way": "wait", "body": "bytearray"}, hold_ms=(0, 30), outage=False),
    Kind("retriable errors", _ROW_REPLICAS, _push(*RETRIABLE), _clear, hold_ms=(0, 100), one_in_flight=True),
    Kind("retriable errors of a partition", _ROW_REPLICAS, _push_on_partition, hold_ms=(0, 100), one_in_flight=True),
    Kind("permanent errors", _ROW_SIZE, _push(*PERMANENT), _clear, codes=frozenset(PERMANENT.values()),
         hold_ms=(0, 50), one_in_flight=True, outage=False),
    Kind(BESIDE, _ROW_LEADER, _lose_leader_beside, _end_beside, codes=TIMED_OUT, until_settled=True),
    Kind("interrupted", "task cancelled, loop closed, MemoryError", send={"way": "interrupted"},
         codes=frozenset((PURGE_QUEUE,)), refusals=frozenset(("BatchInterruptedError",)), outage=False),
    Kind("no producer id", _ROW_REPLICAS, _push_producer_id, _clear_producer_id, idempotent=True, cold=True,
         hold_ms=(0, 100)),
)  # fmt: skip

BY_NAME = {kind.name: kind for kind in KINDS}
