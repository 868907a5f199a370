"""Runs `threads` under ThreadSanitizer; the mock cluster is in this process, which is not watched.

Only kbatch's modules are instrumented. CPython's and librdkafka's locks are seen all the same where they are
pthread's; `suppressions.txt` tells of the rest.
"""

import os
import subprocess
import sys
from pathlib import Path

from kbatch.testing import MockCluster

from .threads import TOPICS

ROOT = Path(__file__).parents[2]
RACE = 66  # ThreadSanitizer's exit status


def main() -> int:
    tree, *arguments = sys.argv[1:]
    compiler = os.environ.get("CC", "cc")
    asked = subprocess.run([compiler, "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True)
    shim = Path(tree).absolute() / "c11_threads.so"
    source = Path(__file__).with_name("c11_threads.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-g", "-o", shim, source, "-lpthread"], check=True)
    options = (
        f"halt_on_error=0:history_size=4:exitcode={RACE}:suppressions={Path(__file__).parent / 'suppressions.txt'}"
    )
    with MockCluster(brokers=2) as cluster:
        cluster.set_group_rebalance_delay(0)
        for topic in TOPICS:
            cluster.create_topic(topic, partitions=3)
        watched = {
            "LD_PRELOAD": f"{asked.stdout.strip()} {shim}",
            "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}",
            "TSAN_OPTIONS": options,
        }
        return subprocess.run(
            [sys.executable, "-m", "tests.races.threads", cluster.bootstrap_servers, *arguments],
            env={**os.environ, **watched},
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
