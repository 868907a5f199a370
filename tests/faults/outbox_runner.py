"""Carries out the plans of an outbox, and writes down what was committed, what a consumer reads back, and of a whole
history what handlers have done."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sqlite3
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import confluent_kafka
import psutil

import kbatch
from kbatch.testing import MockCluster
from tests import inboxes, outboxes
from tests.faults import outbox_processes as processes
from tests.faults.checker import Violation, check_outbox
from tests.faults.history import MET, OutboxHistory
from tests.faults.outbox_plan import (
    BROKERS_DECIDE,
    FIRST,
    JUMPED,
    KILLED,
    SENT,
    SHARED,
    Application,
    Await,
    Brokers,
    Crashed,
    End,
    Hang,
    Listen,
    Locked,
    OutboxPlan,
    Pass,
    Relay,
    RoundTrip,
    RunOut,
    Severed,
)
from tests.faults.outbox_processes import Names, Notes
from tests.mock.clients import read_back, read_committed
from tests.postgres import Server
from tests.waiting import stop

IN_FLIGHT_BATCHES = 2
_LANE = 1_000_000  # numbers of each
_RETRY_S = 0.2
_LEASE_IS_TAKEN_S = 0.3
_LAST_SLOT = 99  # of a listener that is not killed
_NAMES = Names()
_LAST = Listen(_LAST_SLOT, concurrency=4, batch_size=None, max_in_flight=2_000, commit_interval_s=0.05, kill=None)
_SEVER = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name = current_setting('application_name') AND pid <> pg_backend_pid()"
)


class OutboxRun:
    """One plan.

    Args:
        place: "" for SQLite files, or the conninfo of a PostgreSQL server.
        server: That server, if it is the plan's own.
    """

    session_ms = 1_500  # after so long the group gives a member's partitions away
    patience_s = 40.0
    #: What a transaction of a relay may take, and a record of it.
    transaction_ms = 30_000
    delivery_ms = 20_000

    def __init__(
        self,
        cluster: Any,
        plan: OutboxPlan,
        place: str,
        outbox: Any,
        inbox: Any,
        server: Server | None = None,
        names: Names = _NAMES,
    ) -> None:
        self.cluster, self.plan, self.place, self.outbox, self.inbox = cluster, plan, place, outbox, inbox
        self._server = server
        self.names = names
        self.history = OutboxHistory()
        self._running: dict[tuple[str, int], Any] = {}  # "relay" or "listener", and its slot
        self._dead: list[int] = []  # relays whose leases have not run out
        self._next = [lane * _LANE for lane in range(10)]
        is_sqlite = isinstance(outbox, kbatch.SqliteOutbox)
        self._table = "orders" if is_sqlite else outboxes.in_schema(outbox, "orders")
        self._config = {**self.client_config(), "log_level": 0}
        self._options = {
            "batch_size": plan.batch_size,
            "max_in_flight_batches": IN_FLIGHT_BATCHES,
            "strict_order": plan.strict_order,
        }
        self._of_relay = dict(self._config)
        if plan.fenced:
            self._options["fencing"] = "kafka"
            self._of_relay |= {
                "transaction.timeout.ms": self.transaction_ms,
                "delivery.timeout.ms": self.delivery_ms,
            }
        self._place = {**outboxes.where(outbox), "wire": _wire(plan)}
        self._effects = ""
        self._notes = Notes("")
        self._are_brokers_away = False
        self._retry_topics = [_RETRY_S] if plan.handling is not None and plan.handling.late else []

    def run(self, folder: Path) -> OutboxHistory:
        self._notes = Notes(str(folder))
        outboxes.run(self.outbox, f"CREATE TABLE {self._table} (n INTEGER PRIMARY KEY)")
        self.create_topics()
        if self.plan.assignment == BROKERS_DECIDE:
            self.set_session()
        if self.inbox is not None:
            self._effects = inboxes.effects(self.inbox)
        try:
            for _, step in self.plan.taken:
                self._take(step)
        finally:
            if self._are_brokers_away:
                self._disturb()
            self.heal()
            try:
                self._relay_the_rest()
                if self.plan.handling is not None:
                    self._handle_the_rest()
            finally:
                for who, slot in list(self._running):
                    self._end(who, slot, is_killed=False)
        self._read_notes()
        self.history.committed.update(n for (n,) in outboxes.rows(self.outbox, f"SELECT n FROM {self._table}"))
        self.history.log = self._numbered(self.names.orders)
        if self.plan.handling is not None:
            self._look_at_effects()
        return self.history

    # -- what is the mock cluster's

    def client_config(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.cluster.bootstrap_servers}

    def listener_config(self) -> dict[str, Any]:
        found = {**self._config, "group.id": self.names.group}
        if self.plan.assignment == BROKERS_DECIDE:
            return found | {"group.protocol": "consumer"}
        times = {"session.timeout.ms": self.session_ms, "heartbeat.interval.ms": self.session_ms // 5}
        return found | times | {"partition.assignment.strategy": self.plan.assignment}

    def set_session(self) -> None:
        """As `listener_config` says it, where brokers decide."""
        self.cluster.set_group_session(self.session_ms, self.session_ms // 5)

    def topics(self) -> dict[str, int]:
        """All that are read or written, and their partitions."""
        found = {self.names.orders: self.plan.partitions}
        if self.plan.handling is not None:
            found |= {
                self.names.dead: 1,
                **dict.fromkeys(map(self.names.retry, self._retry_topics), self.plan.partitions),
            }
        return found | ({self.names.invoices: 3} if self.plan.transactional else {})

    def create_topics(self) -> None:
        for name, partitions in self.topics().items():
            self.cluster.create_topic(name, partitions=partitions)

    def heal(self) -> None:
        self.cluster.set_broker_up()
        self.cluster.set_rtt(-1, 0)

    def set_brokers(self, step: Brokers) -> None:
        (self.cluster.set_broker_up if step.are_up else self.cluster.set_broker_down)()

    def set_round_trip(self, ms: int) -> None:
        self.cluster.set_rtt(-1, ms)

    def end_of(self, group: confluent_kafka.Consumer, partition: confluent_kafka.TopicPartition) -> int:
        """What a group has committed that has handled all of a partition."""
        return int(group.get_watermark_offsets(partition, timeout=10)[1])

    def read(self, topic: str) -> list[Any]:
        if self.plan.fenced:  # behind whose records there are markers; the mock cluster shows what was aborted, too
            return read_committed(self.cluster.bootstrap_servers, topic, "read_uncommitted")
        return read_back(self.cluster.bootstrap_servers, topic)

    def wait_until_readable(self, topic: str) -> None:
        """Until a reader sees all that there is."""

    # -- a plan

    def _numbered(self, topic: str) -> list[tuple[str, int]]:
        self.wait_until_readable(topic)
        return [(record.key.decode(), int(record.value)) for record in self.read(topic)]

    def _relay_the_rest(self) -> None:
        for who, slot in list(self._running):
            if who == "relay":
                self._end(who, slot, is_killed=False)
        self._run_out()
        with kbatch.Relay(self.outbox, self._of_relay, **self._options) as relay:
            left = relay.drain(self.patience_s)
        if left:
            self.history.findings.append(f"{left} rows are left at the end: {self.outbox.status()}")

    def _handle_the_rest(self) -> None:
        """Until the group has committed all that there is."""
        self._begin("listener", _LAST_SLOT, processes.listen, self._of_listener(_LAST))
        left: dict[str, str] = {}
        with contextlib.closing(confluent_kafka.Consumer({**self._config, "group.id": self.names.group})) as group:
            end = time.monotonic() + self.patience_s
            while time.monotonic() < end:
                time.sleep(0.05)
                self._bury()
                left = self._uncommitted(group)
                if not left or ("listener", _LAST_SLOT) not in self._running:
                    break
        if left:
            self.history.findings.append(f"not committed at the end: {left}")

    def _uncommitted(self, group: confluent_kafka.Consumer) -> dict[str, str]:
        topics = [self.names.orders, *map(self.names.retry, self._retry_topics)]
        asked = [confluent_kafka.TopicPartition(each, n) for each in topics for n in range(self.plan.partitions)]
        found = {}
        for each in group.committed(asked, timeout=10):
            end = self.end_of(group, each)
            if max(0, each.offset) < end:
                found[f"{each.topic} [{each.partition}]"] = f"{max(0, each.offset)} of {end}"
        return found

    def _look_at_effects(self) -> None:
        handling, history = self.plan.handling, self.history
        assert handling is not None
        history.letters = self._numbered(self.names.dead)
        history.dead = {number for _, number in history.letters}
        if self.plan.transactional:
            history.outputs = self._outputs()
        else:
            history.effects = self._outputs()
        numbers = {number for _, number in history.log}
        history.poison = {number for number in numbers if handling.is_poison(number)}
        history.late = {number for number in numbers if handling.is_late(number)}

    def _read_notes(self) -> None:
        for jump in self._notes.read(processes.JUMPED):
            self.history.met["clock"] += 1
            self.history.unrecorded.update(json.loads(jump))
        self.history.met.update(self._notes.read(processes.KILLED))

    def _take(self, step: Any) -> None:
        self._bury()
        if isinstance(step, Application):
            self._run_application(step)
        elif isinstance(step, Relay):
            arguments = (self._place, self._of_relay, self._options, self._notes, step)
            self._begin("relay", step.slot, processes.relay, arguments)
        elif isinstance(step, Listen):
            self._begin("listener", step.slot, processes.listen, self._of_listener(step))
        elif isinstance(step, End):
            self._end(step.who, step.slot, step.is_killed)
        elif isinstance(step, Hang):
            self._hang(step)
        elif isinstance(step, Await):
            self._await(step)
        elif isinstance(step, Pass):
            time.sleep(step.ms / 1000)
        elif isinstance(step, Brokers):
            self._disturb()
            self.set_brokers(step)
            self._are_brokers_away = not step.are_up
            if not step.are_up:
                self.history.met.update(filter(None, ("brokers", step.how)))
        elif isinstance(step, Locked):
            self._lock(step.ms / 1000)
        elif isinstance(step, Severed):
            self._disturb()
            self.history.met["severed"] += bool(outboxes.rows(self.place, _SEVER))
        elif isinstance(step, Crashed):
            self._disturb()
            assert self._server is not None
            self._server.crash()
            time.sleep(step.ms / 1000)
            self._server.start()
            self.history.met["crashed"] += 1
        elif isinstance(step, RunOut):
            self._run_out()
        elif isinstance(step, RoundTrip):
            self.set_round_trip(step.ms)

    def _of_listener(self, step: Listen) -> tuple[Any, ...]:
        config = {**self.listener_config(), "fetch.wait.max.ms": 20}
        where = None if self.inbox is None else inboxes.where(self.inbox)
        return (
            *(where, self._effects, config, self.names, self._retry_topics, self.plan.handling),
            *(self._notes, step),
        )

    def _begin(self, who: str, slot: int, target: Any, arguments: tuple[Any, ...]) -> None:
        if (who, slot) not in self._running:
            process = self._running[who, slot] = processes.SERVER.Process(target=target, args=arguments)
            process.start()

    def _disturb(self) -> None:
        """Notes what may be sent again: relays have some of it in flight. Nothing is added meanwhile."""
        self.history.unrecorded.update(processes.unrecorded(self.outbox))

    def _hang(self, step: Hang) -> None:
        process = self._running.get((step.who, step.slot))
        if process is None:
            return
        try:
            stop(process.pid)
            self.history.met[f"hang {step.who}"] += 1
            if step.who == "relay":
                self._disturb()
                try:
                    self._run_out([process.pid], wait_s=1)
                except Exception as error:  # it may hang in a transaction
                    if not isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlstate", "") != "55P03":
                        raise
                time.sleep(_LEASE_IS_TAKEN_S)
            else:
                time.sleep(self.session_ms / 1000 + 0.3)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return  # it has killed itself
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)

    def _lock(self, seconds: float) -> None:
        with contextlib.ExitStack() as stack:
            for each in filter(None, (self.outbox, self.inbox)):
                connection = stack.enter_context(outboxes.connected(each))
                if isinstance(self.outbox, kbatch.SqliteOutbox):
                    connection.execute("BEGIN EXCLUSIVE")
                else:
                    connection.execute("BEGIN")
                    name = each._tables.names["outbox" if each is self.outbox else "inbox"]
                    connection.execute(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE")
            self.history.met["locked"] += 1
            time.sleep(seconds)

    def _await(self, step: Await) -> None:
        """Until it is so. In a plan that was made shorter, it may never be."""
        end = time.monotonic() + self.patience_s
        while not self._is_so(step) and time.monotonic() < end:
            time.sleep(0.03)
            self._bury()

    def _is_so(self, step: Await) -> bool:
        count = sum(who == step.who for who, _ in self._running)
        is_killed = (step.who, FIRST) not in self._running
        if step.what == KILLED or not count:
            return is_killed
        if step.what == SHARED:
            return is_killed or outboxes.query(self.outbox, "SELECT count(DISTINCT owner) FROM {lease}") == [(count,)]
        if step.what == SENT:
            return not processes.unrecorded(self.outbox)
        if step.what == JUMPED:
            return bool(self._notes.read(processes.JUMPED))
        return bool(self._outputs())

    def _outputs(self) -> list[Any]:
        """What handlers have written, or sent in transactions."""
        if self.plan.transactional:
            return self._numbered(self.names.invoices)
        return inboxes.numbers(self.inbox, self._effects)

    def _run_application(self, step: Application) -> None:
        first = self._next[step.lane]
        count = sum(step.sizes)
        self._next[step.lane] += count
        target = processes.add if step.way == "add" else processes.send
        arguments = (self._place, self.names.orders, self._table, self._notes, first, step)
        process: Any = processes.SERVER.Process(target=target, args=arguments)
        process.start()
        self._join(process, step.kill_after_s if step.kill_after_s is not None else self.patience_s)
        if process.exitcode is None:
            if step.kill_after_s is None:
                self.history.findings.append(f"hangs: {step}")
            process.kill()
            process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            self.history.findings.append(f"exit status {process.exitcode} of {step}")
        self.history.application_kills += process.exitcode == -signal.SIGKILL
        self.history.told.update(map(int, self._notes.read(processes.told(first))))
        if step.way == "send":  # what was not told may be committed
            self.history.possible.update(range(first, first + count))

    def _end(self, who: str, slot: int, is_killed: bool) -> None:
        process = self._running.get((who, slot))
        if process is None:
            return
        if is_killed:
            process.kill()
        elif process.exitcode is None:
            process.terminate()
        self._join(process, self.patience_s)
        if process.exitcode is None:
            self.history.findings.append(f"{who} {slot} does not end")
            process.kill()
            process.join()
        self._bury()

    def _join(self, process: Any, seconds: float) -> None:
        """Waits for its end, and buries others that end: long before their leases do, so that nobody has sent again
        what is noted then."""
        end = time.monotonic() + seconds
        while process.exitcode is None and (left := end - time.monotonic()) > 0:
            process.join(min(left, 1.0))
            self._bury()

    def _bury(self) -> None:
        for (who, slot), process in list(self._running.items()):
            if process.exitcode is None:
                continue
            del self._running[who, slot]
            if process.exitcode == -signal.SIGKILL and who == "listener":
                self.history.listener_kills += 1
            elif process.exitcode == -signal.SIGKILL:
                self.history.relay_kills += 1
                self._dead.append(process.pid)
                self._disturb()
            elif process.exitcode not in (0, -signal.SIGTERM):  # the latter before it began
                self.history.findings.append(f"exit status {process.exitcode} of {who} {slot}")

    def _run_out(self, pids: Sequence[int] = (), wait_s: int = 30) -> None:
        is_sqlite = isinstance(self.outbox, kbatch.SqliteOutbox)
        waits = f"PRAGMA busy_timeout = {wait_s * 1000}" if is_sqlite else f"SET lock_timeout = '{wait_s}s'"
        for pid in pids or self._dead:
            for table in ("lease", "relay"):
                outboxes.query(self.outbox, f"UPDATE {{{table}}} SET until = 0 WHERE owner LIKE '%:{pid}:%'", waits)
        if not pids:
            self._dead.clear()


def _wire(plan: OutboxPlan) -> str:
    """Inboxes know messages by their ids, which the raw format does not carry."""
    return "raw" if plan.handling is None else "kbatch"


def _has_inbox(plan: OutboxPlan) -> bool:
    return plan.handling is not None and not plan.transactional


@contextlib.contextmanager
def _databases_of(plan: OutboxPlan, place: str, folder: Path) -> Iterator[tuple[Any, Any]]:
    """The outbox, and the inbox of a whole history that has one."""
    if plan.database == "sqlite":
        yield (
            outboxes.made(folder, wire=_wire(plan)),
            inboxes.made(folder, "billing.db") if _has_inbox(plan) else None,
        )
        return
    schema = outboxes.new_schema(place)
    try:
        outbox = kbatch.PostgresOutbox(place, schema=schema, wire=_wire(plan))
        outbox.create()
        inbox = None
        if _has_inbox(plan):
            inbox = kbatch.PostgresInbox(place, schema=schema)
            inbox.create()
        yield outbox, inbox
    finally:
        outboxes.drop_schema(place, schema)


def run_outbox_plan(
    plan: OutboxPlan, place: str, make_run: Callable[..., OutboxRun] | None = None
) -> tuple[list[Violation], Counter[str]]:
    """Runs a plan with an outbox of its own, and a mock cluster of its own unless `make_run` knows another cluster."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if make_run is None:
            make_run = functools.partial(OutboxRun, stack.enter_context(MockCluster()))
        server = None
        if plan.crashes:
            server = stack.enter_context(contextlib.closing(Server()))
            server.start()
            place = server.conninfo
        if plan.handling is not None and place:
            from psycopg.conninfo import make_conninfo

            place = make_conninfo(place, application_name=f"plan {uuid.uuid4().hex}")  # whom `_SEVER` cuts off
        outbox, inbox = stack.enter_context(_databases_of(plan, place, folder))
        history = make_run(plan, place, outbox, inbox, server).run(folder)
    seen = Counter(
        {
            "committed": len(history.committed | history.told),
            "applications killed": history.application_kills,
            "relays killed": history.relay_kills,
            "listeners killed": history.listener_kills,
            "stored twice": len(history.log) - len({number for _, number in history.log}),
            "effects": len(history.effects or history.outputs or ()),
            "dead letters": len(history.dead),
            **{f"{MET}{name}": count for name, count in history.met.items()},
        }
    )
    return check_outbox(history), +seen
