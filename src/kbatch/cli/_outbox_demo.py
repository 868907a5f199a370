"""``kbatch outbox demo``: orders into a SQLite outbox, relays that are killed, and what arrives."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.table import Table

import kbatch
from kbatch._fastmap import monotonic
from kbatch._text import counted
from kbatch.cli._check import PARTITIONS, Check, read_all
from kbatch.cli._failure import Failure
from kbatch.cli._orders import Orders, index_of
from kbatch.cli._screen import Bar, Screen
from kbatch.testing import MockCluster

_TOPIC = "orders"
_LARGEST_TRANSACTION = 500
_ROLLED_BACK = 0.05  # of the transactions
_LAST_LINES = 3  # of a relay that has ended
_LOOK_EVERY_S = 0.01
_PATIENCE_S = 60.0
_SHORTEST_MEASURED_S = 0.1
# A killed relay's buckets wait for the end of its lease, so it is as short as such a delivery time-out allows.
_SETTINGS = """\
outbox = {path}

[relay]
lease_s = 9

[kafka]
"bootstrap.servers" = "{servers}"
"delivery.timeout.ms" = 2500
"""


@dataclass(frozen=True)
class OutboxPlan:
    """What the command line asks for."""

    count: int
    kills: int
    seed: int


@dataclass
class RelayRun:
    """What one relay did."""

    waited_s: float = 0.0  # until something that it had sent was seen
    seen: int = 0  # how much that was
    sent: int = 0
    sending_s: float = 0.0  # since then
    unrecorded: int | None = None  # when it was killed

    @property
    def rate(self) -> float:
        """Messages a second, since it was seen to send."""
        return (self.sent - self.seen) / self.sending_s


@dataclass
class Figures:
    transactions: int = 0
    rolled_back: int = 0
    adding_s: float = 0.0
    making_s: float = 0.0
    reading_s: float = 0.0
    runs: list[RelayRun] = field(default_factory=list)


class RelayProcess:
    """``kbatch relay`` in a process of its own, which ends with a ``with`` block."""

    def __init__(self, settings: Path, log: Path) -> None:
        self._log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KBATCH_")}
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kbatch", "relay", "--config", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
            )

    def __enter__(self) -> "RelayProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def check(self) -> None:
        """Raises Failure if it has ended."""
        if self._process.poll() is not None:
            words = self._log.read_text("utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            raise Failure(f"the relay ended with status {self._process.returncode}: " + " / ".join(words))

    def kill(self) -> None:
        """SIGKILL: it can do nothing more."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM: it hands its buckets back."""
        # Else the signal may come before its handler is there.
        while "begins" not in self._log.read_text("utf-8", errors="replace"):
            self.check()
            time.sleep(_LOOK_EVERY_S)
        self._process.terminate()
        status = self._process.wait(_PATIENCE_S)
        if os.name != "nt" and status != 128 + signal.SIGTERM:
            raise Failure(f"the relay ended with status {status} after SIGTERM")


class Demo:
    """Adds the orders, starts and kills relays, and keeps what was unrecorded at each kill."""

    def __init__(self, plan: OutboxPlan, folder: Path, servers: str) -> None:
        self.figures = Figures()
        self.orders = Orders(plan.count)
        self.unrecorded: list[set[int]] = []
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._settings = folder / "relay.toml"
        self._folder = folder
        path = folder / "shop.db"
        self._settings.write_text(_SETTINGS.format(path=json.dumps(str(path)), servers=servers), "utf-8")
        self._outbox = kbatch.SqliteOutbox(path)
        self._outbox.create()
        self._db = sqlite3.connect(path, isolation_level=None, timeout=_PATIENCE_S)
        self._db.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY, customer TEXT, total_cents INTEGER)")
        self._added = 0
        self._next_rolled_back = plan.count

    def close(self) -> None:
        """Gives the connection back."""
        self._db.close()

    def run(self, screen: Screen) -> None:
        """Until everything that was committed has left the outbox."""
        kills, plan = 0, self._plan
        relay = self._begin_relay()
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: relay.kill())
            with screen.bar("adding orders", plan.count) as bar:
                while self._add_some():
                    bar.show(self._added, f"relay {kills + 1} at work")
                    # It is killed in its work: some of what it sent is not recorded yet.
                    is_time = kills < plan.kills and self._added >= plan.count * (0.4 + 0.5 * kills / plan.kills)
                    if is_time and self._works():
                        relay, kills = self._kill(relay), kills + 1
            with screen.bar("relaying", plan.count) as bar:
                while kills < plan.kills:
                    self._await_work(relay, bar)
                    self._await_left(relay, self._left() // 2, bar)
                    relay, kills = self._kill(relay), kills + 1
                self._await_work(relay, bar)
                self._await_left(relay, 0, bar)
            self._end_run()
            relay.stop()
        (stored,) = self._db.execute("SELECT count(*) FROM orders").fetchone()
        if stored != self._plan.count:
            raise Failure(f"the application's own table holds {counted(stored, 'order')}, not {self._plan.count:,}")

    # -- the application

    def _add_some(self) -> bool:
        """One transaction, which may be rolled back; whether there are more orders."""
        size = min(self._random.randint(1, _LARGEST_TRANSACTION), self._plan.count - self._added)
        goes_back = self._random.random() < _ROLLED_BACK
        first = self._next_rolled_back if goes_back else self._added
        began = monotonic()
        orders = [self.orders.order(index) for index in range(first, first + size)]
        envelopes = [self.orders.envelope(index) for index in range(first, first + size)]
        made = monotonic()
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            "INSERT INTO orders VALUES (?, ?, ?)", [(each.order, each.customer, each.total_cents) for each in orders]
        )
        self._outbox.add(self._db, envelopes, topic=_TOPIC)
        self._db.execute("ROLLBACK" if goes_back else "COMMIT")
        figures = self.figures
        figures.making_s += made - began
        figures.adding_s += monotonic() - made
        if goes_back:
            figures.rolled_back += 1
            self._next_rolled_back += size
        else:
            figures.transactions += 1
            self._added += size
        return self._added < self._plan.count

    # -- relays

    def _begin_relay(self) -> RelayProcess:
        self._gone_before = self._added - self._left()
        self.figures.runs.append(RelayRun())
        self._began = monotonic()
        return RelayProcess(self._settings, self._folder / f"relay-{len(self.figures.runs)}.log")

    def _kill(self, relay: RelayProcess) -> RelayProcess:
        """Kills it, and starts another one."""
        relay.kill()
        self._end_run()
        ids = self._db.execute("SELECT id FROM kbatch_outbox UNION ALL SELECT id FROM kbatch_outbox_later")
        self.unrecorded.append({index_of(each.hex().encode()) for (each,) in ids})
        self.figures.runs[-1].unrecorded = len(self.unrecorded[-1])
        return self._begin_relay()

    def _end_run(self) -> None:
        run = self.figures.runs[-1]
        run.sending_s = monotonic() - self._began - run.waited_s
        run.sent = self._added - self._left() - self._gone_before

    def _works(self) -> bool:
        """Whether this relay has sent something."""
        run = self.figures.runs[-1]
        if not run.seen:
            run.seen = self._added - self._left() - self._gone_before
            run.waited_s = monotonic() - self._began
        return run.seen > 0

    def _await_work(self, relay: RelayProcess, bar: Bar) -> None:
        """Waits until this relay has sent something, if there is anything."""
        number = len(self.figures.runs)
        note = f"relay {number} waits for the lease of the killed one" if number > 1 else f"relay {number} begins"
        while not self._works() and (left := self._left()):
            bar.show(self._added - left, note)
            self._pause(relay)

    def _await_left(self, relay: RelayProcess, most: int, bar: Bar) -> None:
        """Waits until no more rows are left."""
        while (left := self._left()) > most:
            bar.show(self._added - left, f"relay {len(self.figures.runs)} sends")
            self._pause(relay)

    def _pause(self, relay: RelayProcess) -> None:
        relay.check()
        if monotonic() - self._began > _PATIENCE_S:
            raise Failure(f"nothing more was sent within {_PATIENCE_S:g} s")
        self._wait_a_little()

    def _wait_a_little(self) -> None:
        time.sleep(_LOOK_EVERY_S)

    def _left(self) -> int:
        hot, later = self._db.execute(
            "SELECT (SELECT count(*) FROM kbatch_outbox), (SELECT count(*) FROM kbatch_outbox_later)"
        ).fetchone()
        return int(hot + later)


def run_outbox_demo(plan: OutboxPlan, screen: Screen) -> int:
    """Runs the demo and returns its exit status."""
    with demo_folder() as folder, MockCluster(process=True) as cluster:
        cluster.create_topic(_TOPIC, PARTITIONS)
        demo = Demo(plan, folder, cluster.bootstrap_servers)
        with contextlib.closing(demo):
            demo.run(screen)
        figures = demo.figures
        check = Check(demo.orders, demo.unrecorded)
        with screen.bar("reading back", plan.count) as bar:
            began = monotonic()
            for messages in read_all(cluster.bootstrap_servers, _TOPIC, None, check):
                for message in messages:
                    check.see(message)
                bar.show(check.seen_count)
            figures.reading_s = monotonic() - began
    problems = check.problems()
    if not screen.quiet:
        screen.show(_table(plan, figures, check))
    if problems:
        for problem in problems:
            screen.tell(problem)
        raise Failure("the orders that were committed are not what was read back")
    screen.say(
        f"{counted(plan.count, 'order was', 'orders were')} committed, relayed, read back and compared: none is lost, "
        "invented, changed or out of order."
    )
    if check.copies:
        screen.say(f"{counted(check.copies, 'order')} came twice: their relay was killed before it had recorded them.")
    return 0


@contextlib.contextmanager
def demo_folder() -> Iterator[Path]:
    """A folder for the files of a demo, gone at its end."""
    with tempfile.TemporaryDirectory(prefix="kbatch-outbox-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _table(plan: OutboxPlan, figures: Figures, check: Check) -> Table:
    table = Table(show_header=False, title="kbatch outbox demo", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = [
        ("orders added, a relay being at work", f"{plan.count:,} in {figures.adding_s:.2f} s"),
        ("  orders/s", f"{plan.count / figures.adding_s:,.0f}"),
        (f"  transactions of 1 to {_LARGEST_TRANSACTION} orders", f"{figures.transactions:,}"),
        ("  rolled back, of which nothing may arrive", f"{figures.rolled_back:,}"),
    ]
    for number, run in enumerate(figures.runs, 1):
        if number == 1:
            rows.append(("relay 1, a process, sent meanwhile", f"{run.sent:,}"))
        else:
            rows += [
                (f"relay {number} waited for the killed one's lease", f"{run.waited_s:.1f} s"),
                ("  and sent", f"{run.sent:,}"),
                ("  messages/s", f"{run.rate:,.0f}" if run.sending_s >= _SHORTEST_MEASURED_S else "-"),
            ]
        if run.unrecorded is not None:
            rows.append(("  when it was killed, still in the outbox", f"{run.unrecorded:,}"))
    rows += [
        ("records read back", f"{check.seen_count:,}"),
        ("  orders that came twice", f"{check.copies:,}"),
        ("making the orders in Python", f"{figures.making_s:.2f} s"),
        ("reading back and comparing", f"{figures.reading_s:.2f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table
