"""The faults of a real cluster behind its proxies, as kinds for the same plans: `tests/kafka/` has the brokers.

Such a cluster deduplicates for an idempotent producer, so that only others may have copies.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException

from tests.faults import kinds
from tests.faults.kinds import DROPPED, TIMED_OUT, UNKNOWN, Kind
from tests.kafka.proxy import Direction

if TYPE_CHECKING:
    from tests.faults.plan import Fault
    from tests.faults.runner import Run


def _lose(direction: Direction) -> kinds.Action:
    def lose(run: Run, fault: Fault) -> None:
        for proxy in run.cluster.proxies:
            proxy.drop(direction)

    return lose


def _cut(run: Run, fault: Fault) -> None:
    for proxy in run.cluster.proxies:
        proxy.cut()


def _refuse(run: Run, fault: Fault) -> None:
    run.cluster.proxies[fault.amount % 3].refuse()


def _delay(run: Run, fault: Fault) -> None:
    for proxy in run.cluster.proxies:
        proxy.delay(fault.amount / 100)


def _clear(run: Run, fault: Fault) -> None:
    for proxy in run.cluster.proxies:
        proxy.heal()


def _kill_leader(run: Run, fault: Fault) -> None:
    """Or any broker, if another fault keeps the cluster from telling who leads."""
    leader = fault.amount % 3 + 1
    with contextlib.suppress(KafkaException, KeyError):
        partitions = run.cluster.admin.list_topics(run.topic, timeout=2).topics[run.topic].partitions
        told = partitions[fault.amount % run.plan.partitions].leader
        leader = told if told > 0 else leader
    run.cluster.brokers[leader - 1].kill()


def _kill_one(run: Run, fault: Fault) -> None:
    run.cluster.brokers[fault.amount % 3].kill()


def _kill_all(run: Run, fault: Fault) -> None:
    for broker in run.cluster.brokers:
        broker.kill()


def _stop_one(run: Run, fault: Fault) -> None:
    run.cluster.brokers[fault.amount % 3].stop()


def _pause_one(run: Run, fault: Fault) -> None:
    broker = run.cluster.brokers[fault.amount % 3]
    if broker.runs:
        broker.pause()


def _pause_all(run: Run, fault: Fault) -> None:
    for broker in run.cluster.brokers:
        if broker.runs:
            broker.pause()


def _up(run: Run, fault: Fault) -> None:
    run.cluster.heal()


def _delete_doomed(run: Run, fault: Fault) -> None:
    run.history.deleted.add(run.topics["doomed"])
    with contextlib.suppress(KafkaException):  # a second time in a plan, or nobody answers: it is deleted at the end
        run.cluster.delete_topic(run.topics["doomed"])


DOOMED = "topic deleted"  # made before the plan begins, while the cluster can
# INVALID_TIMESTAMP, and _INVALID_DIFFERENT_RECORD for its neighbours.
INVALID = frozenset((32, -138))
_ROW_LOST = "written, acknowledgement lost"
_ROW_LEADER = "leader moves; no leader"
_ROW_DOWN = "all brokers down past the timeout"
_ASKING = {"topic.metadata.refresh.interval.ms": 500, "topic.metadata.propagation.max.ms": 500}

KAFKA_KINDS = tuple(
    replace(kind, deduplicated=True)
    for kind in (
        Kind("answers lost", _ROW_LOST, _lose(Direction.TO_CLIENT), _clear, hold_ms=(0, 500), copies=True),
        Kind("leader killed", _ROW_LEADER, _kill_leader, _up, hold_ms=(0, 6_000), copies=True),
        Kind("requests not received", _ROW_LOST, _lose(Direction.TO_BROKER), _clear, hold_ms=(0, 500), copies=True),
        Kind("connections cut", _ROW_LOST, _cut, hold_ms=(0, 50), copies=True),
        Kind("slow network", "slow broker", _delay, _clear, hold_ms=(0, 500)),
        Kind("broker killed", "rolling hard restart", _kill_one, _up, hold_ms=(0, 2_000), copies=True),
        Kind("broker refuses", _ROW_LEADER, _refuse, _clear, hold_ms=(100, 1_000), copies=True),
        Kind("broker stands still", _ROW_DOWN, _pause_one, _up, hold_ms=(100, 8_000), copies=True),
        Kind(
            "brokers stand still past the timeout",
            _ROW_DOWN,
            _pause_all,
            _up,
            config={"message.timeout.ms": 2_000},
            until_settled=True,
            codes=TIMED_OUT,
            copies=True,
        ),
        Kind("broker stopped", _ROW_LEADER, _stop_one, _up, hold_ms=(0, 2_000), copies=True),
        Kind("all brokers killed", "rolling hard restart", _kill_all, _up, hold_ms=(0, 2_000), copies=True),
        Kind(
            DOOMED,
            "unknown topic; deleted in flight",
            end=_delete_doomed,
            send={"topic": "doomed"},
            config=_ASKING,
            codes=UNKNOWN | DROPPED,
            hold_ms=(0, 500),
        ),
        Kind(
            "one record refused",
            "refused for a reason of its own",
            send={"spoil": "bad timestamp", "way": "batched"},
            codes=INVALID,
        ),
        *(kinds.BY_NAME[name] for name in ("unknown partition", "unserialisable", "too large", "no memory")),
    )
)
BY_NAME = {kind.name: kind for kind in KAFKA_KINDS}
