"""Ten listeners with one inbox, which all come and go at the same time, and are killed: one effect of each order."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kbatch.testing import MockCluster
from tests import inboxes
from tests.inboxes import Inbox
from tests.listening import running
from tests.waiting import until

from .test_listener_inbox import check, listener, orders, send, writer
from .test_listener_killed import start

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")

IS_NIGHT = os.environ.get("KBATCH_NIGHTLY", "") not in ("", "0")
SECONDS = 60.0 if IS_NIGHT else 3.0
IN_THREADS = 8
IN_PROCESSES = 2  # which are killed
PER_SEND = 40


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create_topic("orders", partitions=12)
        # Members that come at the same time join together; else each of them begins a rebalance of all.
        cluster.set_group_rebalance_delay(100)
        yield cluster


class Members:
    """What comes and goes until the block ends."""

    def __init__(self, cluster: MockCluster, inbox: Inbox, effects: str) -> None:
        self._cluster, self._inbox, self._effects = cluster, inbox, effects
        self._over = threading.Event()
        works = [self._in_thread] * IN_THREADS + [self._in_process] * IN_PROCESSES
        self._threads = [threading.Thread(target=self._loop, args=(work, n)) for n, work in enumerate(works)]
        self.errors: list[BaseException] = []
        self.killed = 0
        self.handled = [0] * len(works)

    def _loop(self, work: Callable[[int, random.Random], None], number: int) -> None:
        seeded = random.Random(number)
        try:
            while not self._over.wait(seeded.uniform(0.0, 0.3)):
                work(number, seeded)
        except BaseException as error:
            self.errors.append(error)

    def _in_thread(self, number: int, seeded: random.Random) -> None:
        of = listener(
            self._cluster,
            self._inbox,
            writer(self._effects),
            concurrency=seeded.choice([1, 3]),
            commit_interval_s=seeded.choice([0.05, 5.0]),
        )
        with running(of) as raised:
            self._over.wait(seeded.uniform(0.3, 2.0))
        self.errors += raised
        self.handled[number] += of.stats()["handled"]

    def _in_process(self, number: int, seeded: random.Random) -> None:
        with start(self._inbox, self._cluster, self._effects, kill_at=seeded.randint(1, 60)) as process:
            try:
                while process.poll() is None and not self._over.wait(0.05):
                    pass
            finally:
                process.kill()
            process.communicate()
        self.killed += 1

    def __enter__(self) -> "Members":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.long
def test_ten_members_that_come_and_go_at_once(cluster: MockCluster, new_inbox: Callable[..., Inbox]) -> None:
    inbox = new_inbox()
    effects = inboxes.effects(inbox)
    seeded = random.Random(1)
    sent: list[Any] = []
    end = time.monotonic() + SECONDS
    with Members(cluster, inbox, effects) as members:
        while time.monotonic() < end or not (members.killed and sum(map(bool, members.handled)) > 2):
            new = orders(PER_SEND, len(sent))
            send(cluster, new + seeded.choices(sent + new, k=10))  # some come twice
            sent += new
            time.sleep(0.1)
            assert not members.errors
    assert members.errors == []
    with running(listener(cluster, inbox, writer(effects), concurrency=3)) as raised:
        until(lambda: len(inboxes.numbers(inbox, effects)) >= len(sent), "an effect of each")
    assert raised == []
    check(inbox, effects, len(sent))
    assert inboxes.ids(inbox) == {each.id for each in sent}
