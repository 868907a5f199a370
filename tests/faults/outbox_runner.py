"""Carries out the plans of an outbox, and writes down what was committed and what a consumer reads back."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import kbatch
from kbatch.testing import MockCluster
from tests import outboxes
from tests.faults import outbox_processes as processes
from tests.faults.checker import Violation, check_outbox
from tests.faults.history import OutboxHistory
from tests.faults.outbox_plan import Application, End, OutboxPlan, Relay, RoundTrip, RunOut
from tests.mock.clients import read_back

IN_FLIGHT_BATCHES = 2
_LANE = 1_000_000  # numbers of each
_PATIENCE_S = 40.0


class OutboxRun:
    """One plan. `place` is a folder for SQLite files, or the conninfo of a PostgreSQL server."""

    def __init__(self, cluster: MockCluster, plan: OutboxPlan, place: str, outbox: Any) -> None:
        self.cluster, self.plan, self.place, self.outbox = cluster, plan, place, outbox
        self.topic = f"orders-{uuid.uuid4().hex[:8]}"
        self.history = OutboxHistory(in_flight=plan.batch_size * IN_FLIGHT_BATCHES)
        self._relays: dict[int, Any] = {}
        self._dead: list[int] = []  # processes whose leases have not run out
        self._next = [lane * _LANE for lane in range(10)]
        is_sqlite = isinstance(outbox, kbatch.SqliteOutbox)
        self._table = "orders" if is_sqlite else outboxes.in_schema(outbox, "orders")
        self._config = {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}
        self._options = {
            "batch_size": plan.batch_size,
            "max_in_flight_batches": IN_FLIGHT_BATCHES,
            "strict_order": plan.strict_order,
        }

    def run(self, folder: Path) -> OutboxHistory:
        outboxes.run(self.outbox, f"CREATE TABLE {self._table} (n INTEGER PRIMARY KEY)")
        self.cluster.create_topic("orders", partitions=self.plan.partitions)
        try:
            for _, step in self.plan.taken:
                self._take(step, folder)
        finally:
            self.cluster.set_rtt(-1, 0)
            for slot in list(self._relays):
                self._end(slot, is_killed=False)
        self._run_out()
        with kbatch.Relay(self.outbox, self._config, **self._options) as relay:
            left = relay.drain(_PATIENCE_S)
        if left:
            self.history.findings.append(f"{left} rows are left at the end: {self.outbox.status()}")
        self.history.committed.update(n for (n,) in outboxes.rows(self.outbox, f"SELECT n FROM {self._table}"))
        records = read_back(self.cluster.bootstrap_servers, "orders")
        self.history.log = [(record.key.decode(), int(record.value)) for record in records]
        return self.history

    def _take(self, step: Any, folder: Path) -> None:
        self._bury()
        if isinstance(step, Application):
            self._run_application(step, folder)
        elif isinstance(step, Relay):
            if step.slot not in self._relays:
                arguments = (outboxes.where(self.outbox), self._config, self._options, step.kill)
                self._relays[step.slot] = processes.SERVER.Process(target=processes.relay, args=arguments)
                self._relays[step.slot].start()
        elif isinstance(step, End):
            self._end(step.slot, step.is_killed)
        elif isinstance(step, RunOut):
            self._run_out()
        elif isinstance(step, RoundTrip):
            self.cluster.set_rtt(-1, step.ms)

    def _run_application(self, step: Application, folder: Path) -> None:
        first = self._next[step.lane]
        count = sum(step.sizes)
        self._next[step.lane] += count
        told = folder / f"told-{first}"
        target = processes.add if step.way == "add" else processes.send
        arguments = (outboxes.where(self.outbox), self._table, str(told), step.lane, first, step)
        process: Any = processes.SERVER.Process(target=target, args=arguments)
        process.start()
        process.join(step.kill_after_s if step.kill_after_s is not None else _PATIENCE_S)
        if process.exitcode is None:
            if step.kill_after_s is None:
                self.history.findings.append(f"hangs: {step}")
            process.kill()
            process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            self.history.findings.append(f"exit status {process.exitcode} of {step}")
        self.history.application_kills += process.exitcode == -signal.SIGKILL
        numbers = [int(line) for line in told.read_text().split()] if told.exists() else []
        self.history.told.update(numbers)
        if step.way == "send":  # what was not told may be committed
            self.history.possible.update(range(first, first + count))

    def _end(self, slot: int, is_killed: bool) -> None:
        process = self._relays.get(slot)
        if process is None:
            return
        if is_killed:
            process.kill()
        elif process.exitcode is None:
            process.terminate()
        process.join(_PATIENCE_S)
        if process.exitcode is None:
            self.history.findings.append(f"relay {slot} does not end")
            process.kill()
            process.join()
        self._bury()

    def _bury(self) -> None:
        for slot, process in list(self._relays.items()):
            if process.exitcode is None:
                continue
            del self._relays[slot]
            if process.exitcode == -signal.SIGKILL:
                self.history.relay_kills += 1
                self._dead.append(process.pid)
            elif process.exitcode not in (0, -signal.SIGTERM):  # the latter before it began
                self.history.findings.append(f"exit status {process.exitcode} of relay {slot}")

    def _run_out(self) -> None:
        for pid in self._dead:
            for table in ("lease", "relay"):
                outboxes.query(self.outbox, f"UPDATE {{{table}}} SET until = 0 WHERE owner LIKE '%:{pid}:%'")
        self._dead.clear()


@contextlib.contextmanager
def _outbox_of(plan: OutboxPlan, place: str, folder: Path) -> Any:
    if plan.database == "sqlite":
        yield outboxes.made(folder, wire="raw")
        return
    schema = outboxes.new_schema(place)
    try:
        outbox = kbatch.PostgresOutbox(place, schema=schema, wire="raw")
        outbox.create()
        yield outbox
    finally:
        outboxes.drop_schema(place, schema)


def run_outbox_plan(plan: OutboxPlan, place: str) -> tuple[list[Violation], Counter[str]]:
    """Runs a plan with a cluster and an outbox of its own."""
    with tempfile.TemporaryDirectory() as name, MockCluster() as cluster, _outbox_of(plan, place, Path(name)) as outbox:
        history = OutboxRun(cluster, plan, place, outbox).run(Path(name))
    seen = Counter(
        {
            "committed": len(history.committed | history.told),
            "applications killed": history.application_kills,
            "relays killed": history.relay_kills,
            "stored twice": len(history.log) - len({number for _, number in history.log}),
        }
    )
    return check_outbox(history), +seen
