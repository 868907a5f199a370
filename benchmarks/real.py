"""A real broker for the measurements: one Apache Kafka that is started for the run, and a proxy for longer ways to it.

The broker runs with the Java options of Kafka's own start script. Topics are deleted when those who used them are done.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.broker import Broker, confine
from benchmarks.data import prepare
from benchmarks.library import BUILD, build
from benchmarks.side_process import Side
from benchmarks.sides.base import Spec
from tests.kafka import install
from tests.kafka.cluster import KafkaCluster

HEAP_MB = 1024
#: of kafka-server-start.sh and kafka-run-class.sh
JAVA_OPTIONS = (
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
)
SETTINGS = {
    # Kafka's defaults, where the tests have less
    "num.network.threads": 3,
    "num.io.threads": 8,
    "background.threads": 10,
    # what was deleted is gone soon: a run writes far more than there is room for
    "log.segment.delete.delay.ms": 500,
    "log.segment.bytes": 128 << 20,
    "log.initial.task.delay.ms": 1000,
}
#: The rate of the C loop has long stopped growing by then.
WARM_UP_S = 20
#: What the log folder must have room for.
ROOM_BYTES = 8 << 30


class DelayProxy:
    """delay.c before a broker's port: a Python proxy would be the bottleneck. What of `FaultProxy` a cluster needs."""

    def __init__(self, target_port: int) -> None:
        command = [str(build("delay")), "127.0.0.1", str(target_port), "0"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port: int = self._answer()["port"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def delay_ms(self, milliseconds: float) -> None:
        """Of every answer from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{round(milliseconds * 1000)}\n")
        self._process.stdin.flush()
        self._answer()

    def heal(self) -> None:
        self.delay_ms(0)

    def close(self) -> None:
        self._process.communicate(timeout=10)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


class KafkaBroker:
    """Stays for a whole run; `session` gives it without topics."""

    def __init__(self, folder: Path | None = None) -> None:
        self._proxies: list[DelayProxy] = []
        self.folder = folder or _roomy_folder()
        self._cluster = KafkaCluster(
            heap_mb=HEAP_MB,
            settings=SETTINGS,
            folder=str(self.folder),
            java_options=JAVA_OPTIONS,
            make_proxy=self._make_proxy,
        )
        self._topics: list[str] = []
        self._numbers = 0
        self._proxied = False

    def _make_proxy(self, port: int) -> Any:
        self._proxies.append(DelayProxy(port))
        return self._proxies[-1]

    def __enter__(self) -> "KafkaBroker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cluster.close()

    @property
    def bootstrap_servers(self) -> str:
        return self._cluster.proxied_servers if self._proxied else self._cluster.bootstrap_servers

    @property
    def pids(self) -> list[int]:
        return [self._cluster.brokers[0].pid, self._proxies[0].pid]

    def new_topic(self, prefix: str, partitions: int) -> str:
        self._numbers += 1
        name = self._cluster.create_topic(f"{prefix}-{self._numbers}", partitions=partitions)
        self._topics.append(name)
        return name

    def set_delay(self, milliseconds: int | None) -> None:
        self._proxies[0].delay_ms(milliseconds or 0)
        self._proxied = milliseconds is not None

    def confine(self, processors: set[int], nice: int = 0) -> None:
        if nice:
            raise ValueError("who has been nice cannot be otherwise again, and this broker is used again")
        confine(self.pids, processors, nice)

    @contextmanager
    def session(self) -> Iterator[Broker]:
        try:
            yield self
        finally:
            self.set_delay(None)
            self.confine(set(range(psutil.cpu_count() or 1)))
            while self._topics:
                self._cluster.delete_topic(self._topics.pop())

    def warm_up(self) -> list[float]:
        """Lets the C loop send until the JVM has compiled what it will; returns its rate in each second."""
        rates: list[float] = []
        with self.session():
            quiet = {"config": {"log_level": "0"}}  # that the broker's coordinators are not ready yet is no news
            spec = Spec(self.bootstrap_servers, self.new_topic("warm-up", 4), 1_000, 5_000, options=quiet)
            with Side("cloop", spec, data=prepare(BUILD, 8).path) as side:
                count, start = 20_000, time.monotonic()
                while time.monotonic() - start < WARM_UP_S:
                    rates.append(side.run(count).rate)
                    count = max(1, round(rates[-1] / 1000)) * 1000
        return rates

    def describe(self) -> dict[str, Any]:
        jar = re.search(r"kafka-clients-([\d.]+)\.jar", install.class_path())
        version = jar[1] if jar else "?"
        java = subprocess.run([install.java(), "-version"], capture_output=True, text=True, check=True).stderr
        return {
            "kind": "kafka",
            "name": f"Apache Kafka {version}",
            "java": java.splitlines()[-1].strip() if java else "",
            "heap_mb": HEAP_MB,
            "java_options": JAVA_OPTIONS,
            "folder": "tmpfs" if str(self.folder).startswith("/dev/shm") else "disk",
        }


def _roomy_folder() -> Path:
    """Memory if there is enough: the disks of rented machines have moods."""
    memory, disk = Path("/dev/shm"), Path("/var/tmp")
    if memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES < psutil.virtual_memory().available:
        return memory
    return disk


def class_path() -> str:
    return install.class_path()
