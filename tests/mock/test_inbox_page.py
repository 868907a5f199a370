"""examples/inbox, which docs/inbox.md names: a shop, and billing that is killed."""

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbatch.testing import MockCluster
from tests.waiting import until

EXAMPLES = Path(__file__).parents[2] / "examples" / "inbox"
COUNT = 300


@contextlib.contextmanager
def billing(cluster: MockCluster, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "billing.py"), cluster.bootstrap_servers]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def invoices(folder: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(folder / "billing.db", timeout=30)) as db:
        try:
            return [number for (number,) in db.execute("SELECT number FROM invoices ORDER BY place")]
        except sqlite3.OperationalError:
            return []


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="platform: no SIGTERM")
def test_billing_that_is_killed_writes_one_invoice_for_each_order(kafka_cluster: MockCluster, tmp_path: Path) -> None:
    kafka_cluster.create_topic("orders", partitions=3)
    command = [sys.executable, "-W", "error", str(EXAMPLES / "shop.py"), kafka_cluster.bootstrap_servers, str(COUNT)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    with billing(kafka_cluster, tmp_path) as process:
        until(lambda: len(invoices(tmp_path)) > COUNT // 10, "some invoices", 60)
        process.kill()
    assert len(invoices(tmp_path)) <= COUNT
    with billing(kafka_cluster, tmp_path) as process:
        until(lambda: len(invoices(tmp_path)) >= COUNT, "all of them", 60)
        time.sleep(0.5)  # for copies, if there were any
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    found = invoices(tmp_path)
    assert sorted(found) == list(range(COUNT))
    for customer in range(100):
        of_customer = [number for number in found if number % 100 == customer]
        assert of_customer == sorted(of_customer)
