"""A Kafka for the measurements: librdkafka's mock cluster with one broker, alone in a child process.

It is the same librdkafka on both ends, it keeps 5 MiB per partition in memory and writes nothing to disk, so it costs
as little as a broker can, and it favours no side.
"""

import os

from kbatch.testing import MockCluster


class Broker(MockCluster):
    def __init__(self) -> None:
        super().__init__(brokers=1, process=True)
        self._topics = 0

    def __enter__(self) -> "Broker":
        return self

    def new_topic(self, prefix: str, partitions: int) -> str:
        """Creates a topic with a name of its own, so that no measurement sees another's records."""
        self._topics += 1
        name = f"{prefix}-{self._topics}"
        self.create_topic(name, partitions)
        return name

    def set_delay(self, milliseconds: int) -> None:
        """Delays every response by so many milliseconds."""
        self.set_rtt(-1, milliseconds)

    def confine(self, processors: set[int], nice: int = 0) -> None:
        """Keeps every thread of the broker to these processors. Linux."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(thread), processors)
            if nice:
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)
