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


LEDGER = """
import _testcapi
import kbatch
from kbatch import Envelope
from kbatch._fastmap import Undelivered

def ledger_of_30():
    ledger = Undelivered("envelopes were given up")
    for n in range(30):
        ledger.add(Envelope(n), kbatch.SenderError("made up"))
    return ledger

def told_by(ledger, first):
    raised = None
    _testcapi.set_nomemory(first, first + 1)
    try:
        ledger.raise_all()
    except Exception as error:
        raised = error
    _testcapi.remove_mem_hooks()
    while isinstance(raised, MemoryError):  # of its traceback, perhaps
        raised = raised.__context__
    return 0 if raised is None else raised.count

told_by(ledger_of_30(), 10_000)  # Cython makes what a traceback needs
for first in range(1, 100):
    ledger = ledger_of_30()
    told = told_by(ledger, first)
    # 0: it was raised, and what Cython could not make for its traceback took its place.
    if told + len(ledger) not in (0, 30):
        raise SystemExit(f"{first}: {told} were told, {len(ledger)} are left")
    told_by(ledger, 10_000)
print("all told")
"""


def test_what_cannot_be_told_for_want_of_memory_is_told_later() -> None:
    pytest.importorskip("_testcapi")
    process = subprocess.run([sys.executable, "-c", LEDGER], capture_output=True, text=True, timeout=300)
    assert process.stdout.strip() == "all told", process.stderr[-3000:]


def test_callbacks_come() -> None:
    pytest.importorskip("_testcapi")
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert process.stdout.strip() == "all answered", process.stderr[-3000:]
