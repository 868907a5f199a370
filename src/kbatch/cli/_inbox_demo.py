"""``kbatch inbox demo``: orders from an application's outbox through Kafka into the database of another one, each once,
whoever is killed on the way."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

import kbatch
from kbatch._fastmap import monotonic
from kbatch._text import counted
from kbatch.cli._check import PARTITIONS
from kbatch.cli._failure import Failure
from kbatch.cli._inbox_listener import INVOICES, TOPIC
from kbatch.cli._orders import Orders
from kbatch.cli._outbox_demo import Demo, OutboxPlan, demo_folder
from kbatch.cli._screen import Bar, Screen
from kbatch.testing import MockCluster

_LOOK_EVERY_S = 0.02
_PATIENCE_S = 60.0
_LAST_LINES = 3
_PROBLEMS_NAMED = 5
_FIRST_ORDER = 1_000_000  # of `Orders`


@dataclass(frozen=True)
class InboxPlan:
    """What the command line asks for."""

    count: int
    relay_kills: int
    listener_kills: int
    one_at_a_time: int
    seed: int


@dataclass
class ListenerRun:
    """What one listener did."""

    before: int  # invoices that there were
    began: float
    waited_s: float = 0.0  # until its first invoice
    invoices: int = 0
    working_s: float = 0.0  # since then


@dataclass
class ListenerProcesses:
    """Listeners, one after another: each is killed at its share of the invoices, and the next one begins."""

    folder: Path
    servers: str
    count: int
    kills: int
    runs: list[ListenerRun] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.path = self.folder / "billing.db"
        kbatch.SqliteInbox(self.path).create()
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=_PATIENCE_S)
        self._db.execute(INVOICES)
        self._next_look = 0.0

    def close(self) -> None:
        """Kills the last one, if it lives, and gives the connection back."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._db.close()

    def begin(self) -> None:
        """Starts one."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KBATCH_")}
        self.runs.append(ListenerRun(self.invoices(), monotonic()))
        with self._log().open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kbatch.cli._inbox_listener", str(self.path), self.servers],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
            )

    def look(self) -> int:
        """Kills the listener if it is time; how many invoices there are."""
        if monotonic() < self._next_look:
            return self.runs[-1].before + self.runs[-1].invoices
        self._next_look = monotonic() + _LOOK_EVERY_S
        process, run = self._process, self.runs[-1]
        assert process is not None
        if process.poll() is not None:
            words = self._log().read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            raise Failure(f"the listener ended with status {process.returncode}: " + " / ".join(words))
        found = self.invoices()
        if found > run.before and not run.invoices:
            run.waited_s = monotonic() - run.began
        run.invoices = found - run.before
        run.working_s = monotonic() - run.began - run.waited_s
        killed = len(self.runs) - 1
        # In the middle of its work: it has handled what the group has not committed yet.
        if killed < self.kills and found > run.before and found >= self.count * (killed + 1) / (self.kills + 2):
            process.kill()
            process.wait()
            self.begin()
        return found

    def stop(self) -> None:
        """SIGTERM: it commits what it has handled."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(_PATIENCE_S)
        if os.name != "nt" and status not in (0, -signal.SIGTERM):
            raise Failure(f"the listener ended with status {status} after SIGTERM")

    def invoices(self) -> int:
        (count,) = self._db.execute("SELECT coalesce(max(place), 0) FROM invoices").fetchone()
        return int(count)

    def rows(self) -> Iterable[tuple[int, str, int]]:
        """What was invoiced, in its order."""
        return self._db.execute("SELECT number, customer, total_cents FROM invoices ORDER BY place")

    def _log(self) -> Path:
        return self.folder / f"listener-{len(self.runs)}.log"


class WholeDemo(Demo):
    """The demo of an outbox, with listeners at work meanwhile."""

    def __init__(self, plan: OutboxPlan, folder: Path, servers: str, listeners: ListenerProcesses) -> None:
        super().__init__(plan, folder, servers)
        self._listeners = listeners

    def _add_some(self) -> bool:
        self._listeners.look()
        return super()._add_some()

    def _wait_a_little(self) -> None:
        self._listeners.look()
        super()._wait_a_little()


def run_inbox_demo(plan: InboxPlan, screen: Screen) -> int:
    """Runs the demo and returns its exit status."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(demo_folder())
        cluster = stack.enter_context(MockCluster(process=True))
        cluster.create_topic(TOPIC, PARTITIONS)
        servers = cluster.bootstrap_servers
        listeners = ListenerProcesses(folder, servers, plan.count, plan.listener_kills)
        stack.callback(listeners.close)
        of_outbox = OutboxPlan(plan.count, plan.relay_kills, plan.seed)
        demo = stack.enter_context(contextlib.closing(WholeDemo(of_outbox, folder, servers, listeners)))
        began = monotonic()
        listeners.begin()
        demo.run(screen)
        with screen.bar("invoicing", plan.count) as bar:
            _await_invoices(listeners, plan.count, bar)
        whole_s = monotonic() - began
        listeners.stop()
        problems = check_invoices(listeners.rows(), demo.orders)
        slow_rate = _await_each(folder, servers, plan.one_at_a_time) if plan.one_at_a_time else None
    if not screen.quiet:
        screen.show(_table(plan, demo, listeners, whole_s, slow_rate))
    if problems:
        for problem in problems:
            screen.tell(problem)
        raise Failure("the invoices are not those of the orders that were committed")
    screen.say(
        f"{counted(plan.count, 'order was', 'orders were')} committed, relayed, received and invoiced: each once, and "
        "those of a customer in their order."
    )
    return 0


def _await_invoices(listeners: ListenerProcesses, count: int, bar: Bar) -> None:
    last, since = -1, monotonic()
    while (found := listeners.look()) < count:
        bar.show(found, f"listener {len(listeners.runs)} at work")
        if found != last:
            last, since = found, monotonic()
        if monotonic() - since > _PATIENCE_S:
            raise Failure(f"no more invoices within {_PATIENCE_S:g} s; there are {found:,}")
        time.sleep(_LOOK_EVERY_S)


def check_invoices(rows: Iterable[tuple[int, str, int]], orders: Orders) -> list[str]:
    """What is wrong, at most a few lines; empty if every order has one invoice, in the order of its customer."""
    seen = bytearray(orders.count)
    last: dict[str, int] = {}
    problems: list[str] = []
    for number, customer, total_cents in rows:
        index = number - _FIRST_ORDER
        if not 0 <= index < orders.count:
            problems.append(f"an invoice of order {number}, which nobody has committed")
            continue
        if seen[index]:
            problems.append(f"order {number} was invoiced twice")
        seen[index] = 1
        order = orders.order(index)
        if (order.customer, order.total_cents) != (customer, total_cents):
            problems.append(f"the invoice of order {number} is another's")
        if last.get(customer, -1) > index:
            problems.append(f"order {number} was invoiced after a later one of the same customer")
        last[customer] = index
    missing = seen.count(0)
    if missing:
        problems.append(f"{counted(missing, 'order')} without an invoice, the first is {_FIRST_ORDER + seen.index(0)}")
    more = len(problems) - _PROBLEMS_NAMED
    return problems if more <= 0 else [*problems[:_PROBLEMS_NAMED], f"{more:,} more of this kind"]


def _await_each(folder: Path, servers: str, count: int) -> float:
    """Messages a second of a relay that awaits each message and then deletes its row."""
    outbox = kbatch.SqliteOutbox(folder / "slow.db")
    outbox.create()
    orders = Orders(count)
    with contextlib.closing(sqlite3.connect(folder / "slow.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        outbox.add(db, [orders.envelope(index) for index in range(count)], topic="slow")
        db.execute("COMMIT")
        rows = db.execute("SELECT bucket, seq FROM kbatch_outbox ORDER BY seq").fetchall()
        with kbatch.Producer({"bootstrap.servers": servers}) as producer:
            producer.send_batch("slow", [kbatch.Envelope(data=b"")]).raise_for_errors()
            began = monotonic()
            for index, row in enumerate(rows):
                producer.send_batch("slow", [orders.envelope(index)]).raise_for_errors()
                db.execute("DELETE FROM kbatch_outbox WHERE bucket = ? AND seq = ?", row)
            return count / (monotonic() - began)


def _table(plan: InboxPlan, demo: Demo, listeners: ListenerProcesses, whole_s: float, slow_rate: float | None) -> Table:
    figures = demo.figures
    table = Table(show_header=False, title="kbatch inbox demo", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = [
        ("orders added in transactions, all else being at work", f"{plan.count:,} in {figures.adding_s:.2f} s"),
        ("  orders/s", f"{plan.count / figures.adding_s:,.0f}"),
    ]
    for number, run in enumerate(figures.runs, 1):
        rows.append((f"relay {number}, a process, sent", f"{run.sent:,}"))
        if run.unrecorded is not None:
            rows.append(("  and was killed", ""))
    for number, of_listener in enumerate(listeners.runs, 1):
        rows.append((f"listener {number}, a process, invoiced", f"{of_listener.invoices:,}"))
        if of_listener.working_s > 0.1:
            rows.append(("  orders/s, as fast as they came", f"{of_listener.invoices / of_listener.working_s:,.0f}"))
        if number < len(listeners.runs):
            rows.append(("  and was killed", ""))
    rows += [
        ("from the first order to the last invoice", f"{whole_s:.1f} s"),
        ("invoices", f"{listeners.runs[-1].before + listeners.runs[-1].invoices:,}"),
    ]
    if slow_rate is not None:
        rows.append(("a relay that awaits each message, messages/s", f"{slow_rate:,.0f}"))
    for name, value in rows:
        table.add_row(name, value)
    return table
