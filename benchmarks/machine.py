"""What the figures were taken on."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import confluent_kafka
import psutil  # type: ignore[import-untyped]

from benchmarks.library import build

RIVALS = ("aiokafka", "faststream")


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def line_round_trip_ns() -> float | None:
    """Nanoseconds for a cache line from one processor to another and back (machine.c); None with one processor."""
    if (os.cpu_count() or 1) < 2:
        return None
    return float(subprocess.run([build("machine")], check=True, capture_output=True, text=True, timeout=60).stdout)


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def describe() -> dict[str, Any]:
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": sys.version.split()[0],
        "librdkafka": confluent_kafka.libversion()[0],
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "versions": {name: version(name) for name in ("kbatch-kafka", "confluent-kafka", "msgspec", *RIVALS)},
        "line_round_trip_ns": line_round_trip_ns(),
        "load": load(),
    }
