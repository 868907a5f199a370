"""The runner of whole histories on a real broker: the same plans, processes and checker, with topics of their own."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.faults.outbox_plan import Brokers, OutboxPlan
from tests.faults.outbox_processes import TOO_LARGE, Names
from tests.faults.outbox_runner import OutboxRun, run_outbox_plan
from tests.kafka.proxy import Direction
from tests.mock.clients import read_committed
from tests.waiting import until

if TYPE_CHECKING:
    from collections import Counter

    from tests.faults.checker import Violation
    from tests.kafka.cluster import KafkaCluster

#: A listener's transaction that a killed one has left open holds those up who come after it, and hides what is behind.
_TRANSACTION_MS = 6_000
_numbers = itertools.count()


def run_history(cluster: KafkaCluster, plan: OutboxPlan, place: str) -> tuple[list[Violation], Counter[str]]:
    """What the plan's run has violated, and what it met. The cluster is left as it was."""
    return run_outbox_plan(plan, place, functools.partial(KafkaOutboxRun, cluster))


class KafkaOutboxRun(OutboxRun):
    """A run through the proxies of a real cluster."""

    session_ms = 3_000
    patience_s = 90.0
    transaction_ms, delivery_ms = 20_000, 15_000

    def __init__(self, *arguments: Any) -> None:
        of = f"{os.getpid()}-{next(_numbers)}"
        names = Names(*(f"{name}-{of}" for name in Names()))
        super().__init__(*arguments, names=names)

    def client_config(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self.cluster.proxied_servers,
            "reconnect.backoff.max.ms": 300,
            "socket.timeout.ms": 5_000,
        }

    def listener_config(self) -> dict[str, Any]:
        limit = {"transaction.timeout.ms": _TRANSACTION_MS} if self.plan.transactional else {}
        return super().listener_config() | limit

    def create_topics(self) -> None:
        for name, partitions in self.topics().items():
            config = {"max.message.bytes": str(TOO_LARGE // 2)} if name == self.names.invoices else {}
            self.cluster.create_topic(name, partitions=partitions, config=config)

    def set_session(self) -> None:
        times = {"consumer.session.timeout.ms": self.session_ms, "consumer.heartbeat.interval.ms": self.session_ms // 5}
        entries = [
            ConfigEntry(name, str(value), incremental_operation=AlterConfigOpType.SET) for name, value in times.items()
        ]
        group = ConfigResource(ResourceType.GROUP, self.names.group, incremental_configs=entries)
        self.cluster.admin.incremental_alter_configs([group])[group].result(30)

    def heal(self) -> None:
        self.cluster.heal()

    def set_brokers(self, step: Brokers) -> None:
        if step.are_up:
            self.cluster.heal()
        for broker in () if step.are_up else self.cluster.brokers:
            if step.how == "refuses":
                broker.proxy.refuse()
            elif step.how == "does not answer":
                broker.proxy.drop(Direction.TO_CLIENT)
            elif not broker.runs:
                pass
            elif step.how == "stands still":
                broker.pause()
            else:
                broker.kill()

    def set_round_trip(self, ms: int) -> None:
        for proxy in self.cluster.proxies:
            proxy.delay(ms / 2_000)

    def end_of(self, group: Consumer, partition: TopicPartition) -> int:
        """What is behind the last record is a transaction's marker, which nobody commits."""
        offsets = [record.offset for record in self.read(partition.topic) if record.partition == partition.partition]
        return max(offsets, default=-1) + 1

    def read(self, topic: str) -> list[Any]:
        return read_committed(self.cluster.bootstrap_servers, topic)

    def wait_until_readable(self, topic: str) -> None:
        """Until no transaction is open: that of a process that was killed hides all behind it until it times out."""
        until(lambda: self._ends(topic, "read_committed") == self._ends(topic, "read_uncommitted"), "the last marker")

    def _ends(self, topic: str, isolation: str) -> list[int]:
        config = {**self._config, "group.id": self.names.group, "isolation.level": isolation}
        with contextlib.closing(Consumer(config)) as consumer:
            partitions = [TopicPartition(topic, number) for number in range(self.topics()[topic])]
            return [consumer.get_watermark_offsets(each, timeout=10)[1] for each in partitions]

    def run(self, folder: Any) -> Any:
        try:
            return super().run(folder)
        finally:
            for topic in self.topics():
                with contextlib.suppress(KafkaException):
                    self.cluster.delete_topic(topic)
