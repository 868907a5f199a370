"""An answer comes although memory is short when it does."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import _testcapi
import kbatch
from kbatch import Envelope
from kbatch._fastmap import Flag
from kbatch.testing import MockCluster

def answer(producer, first, count):
    told = Flag()  # its methods are C: they need no memory
    batch = producer.submit("t", [Envelope(1), Envelope(2)])
    batch.add_done_callback(told.set)
    came = None
    _testcapi.set_nomemory(first, first + count)
    try:
        came = told.wait(30, interruptible=False)
    except MemoryError:  # before it waited
        pass
    _testcapi.remove_mem_hooks()
    if not (told.wait(30) if came is None else came):
        sys.exit(f"no answer: {first}, {count}, {batch}")
    if not batch.report.ok:
        sys.exit(f"{first}, {count}: {batch.report}")

with MockCluster() as cluster:
    cluster.create_topic("t")
    with kbatch.Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}) as producer:
        producer.submit("t", [Envelope(0)]).wait(30)
        cluster.set_rtt(1, 5)
        for first in range(60):
            for count in (1, 5):
                answer(producer, first, count)
print("all answered")
"""


def test_callbacks_come() -> None:
    pytest.importorskip("_testcapi")
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert process.stdout.strip() == "all answered", process.stderr[-3000:]
