"""Where the sides send to: librdkafka's mock cluster, or a real Kafka (`real.py`).

The mock cluster is the same librdkafka on both ends, it keeps 5 MiB per partition in memory and writes nothing to disk,
so it costs as little as a broker can, and it favours no side.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import psutil  # type: ignore[import-untyped]

from kbatch.testing import MockCluster


class Broker(Protocol):
    """One broker, for as long as some sides take turns."""

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect to; another address while there is a delay, if that takes a proxy."""

    @property
    def pids(self) -> list[int]:
        """Its processes: the broker's own comes first, then what stands before it."""

    def new_topic(self, prefix: str, partitions: int) -> str:
        """Creates a topic with a name of its own, so that no measurement sees another's records."""

    def set_delay(self, milliseconds: int | None) -> None:
        """Delays every response by so many milliseconds. None: none, and no proxy either."""

    def confine(self, processors: set[int], nice: int = 0) -> None:
        """Keeps every thread of the broker to these processors. Linux."""


#: Opens one: the mock cluster anew, the real one with no topics.
OpenBroker: TypeAlias = Callable[[], AbstractContextManager[Broker]]


class MockBroker(MockCluster):
    def __init__(self, brokers: int = 1) -> None:
        super().__init__(brokers=brokers, process=True)
        self._topics = 0
        self.set_group_rebalance_delay(0)  # 3 s before a group of one has its partitions, otherwise

    def __enter__(self) -> "MockBroker":
        return self

    @property
    def pids(self) -> list[int]:
        return [self.pid]

    def new_topic(self, prefix: str, partitions: int) -> str:
        self._topics += 1
        name = f"{prefix}-{self._topics}"
        self.create_topic(name, partitions)
        return name

    def set_delay(self, milliseconds: int | None) -> None:
        self.set_rtt(-1, milliseconds or 0)

    def confine(self, processors: set[int], nice: int = 0) -> None:
        confine(self.pids, processors, nice)


def confine(pids: list[int], processors: set[int], nice: int) -> None:
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), processors)
            if nice:
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def cpu_seconds(pid: int) -> float:
    """What the process has used so far, all threads."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def peak_bytes(pid: int) -> int:
    """The most memory of the process that was ever resident; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
