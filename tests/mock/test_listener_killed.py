"""Listeners with an inbox that are killed at any of their steps: every order has one effect, in order of its key."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch.testing import MockCluster
from tests import inboxes, outboxes
from tests.inboxes import Inbox
from tests.waiting import until

from .test_listener_inbox import check, orders, send

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")

ROOT = Path(__file__).parents[2]
KILLS = 10


@pytest.fixture
def inbox(new_inbox: Callable[..., Inbox]) -> Inbox:
    return new_inbox()


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=3)
        yield cluster


def start(inbox: Inbox, cluster: MockCluster, table: str, **settings: Any) -> subprocess.Popen[str]:
    given = {**inboxes.where(inbox), "config": inboxes.consumer(cluster), "table": table, **settings}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.mock.listener_program", json.dumps(given)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_a_listener_that_is_killed_at_its_steps(inbox: Inbox, cluster: MockCluster) -> None:
    seeded = random.Random(0)
    table = inboxes.effects(inbox)
    kills = KILLS if isinstance(inbox, kbatch.SqliteInbox) else KILLS // 2
    sent: list[Any] = []
    told: list[str] = []
    for _ in range(kills):
        new = orders(200, len(sent))
        send(cluster, new + seeded.choices(sent + new, k=30))  # some come twice, as of a relay that was killed
        sent += new
        with start(inbox, cluster, table, kill_at=seeded.randint(1, 120)) as process:
            out, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        told.append(out.strip())
    count = f"SELECT count(*) FROM {table}"
    with start(inbox, cluster, table) as process:
        try:
            until(lambda: outboxes.rows(inbox, count) == [(len(sent),)], f"all effects; killed {told}", 60)
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    check(inbox, table, len(sent))
    assert inboxes.ids(inbox) == {each.id for each in sent}
