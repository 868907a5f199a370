"""Applications, relays and listeners of a plan, each in a process of its own that may be killed at each of its steps.

A server that has imported this module forks them: a process that imports kbatch anew takes half a second.
"""

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import kbatch
import kbatch.aio
from kbatch import _transactions
from kbatch._database import _tables
from kbatch._fastmap import monotonic, unpack_record, wall_time
from kbatch._inbox._session import InboxSession
from kbatch._options import AioRelayOptions
from kbatch._outbox import _relay_loop
from kbatch._receiving import _reading, _transacting
from kbatch._receiving._copies import Copies
from kbatch._receiving._failing import Failing
from kbatch._receiving._reading import Reading
from kbatch._receiving._transacting import Transacting
from kbatch._transactions import Transactions
from kbatch.aio._batched import LoopCalls
from kbatch.aio._inbox_session import AioInboxSession
from tests import inboxes, outboxes
from tests.faults.outbox_plan import Application, Handling, Listen, Relay
from tests.relays import WatchedOutbox

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.outbox_processes"])


class Names(NamedTuple):
    """Topics, and the listeners' group."""

    orders: str = "orders"
    dead: str = "dead"
    #: What handlers send in transactions.
    invoices: str = "invoices"
    group: str = inboxes.GROUP

    def retry(self, delay: float) -> str:
        return f"{self.group}.retry.{delay:g}"


class Notes(NamedTuple):
    """Lines that processes leave in files, which outlive them."""

    folder: str

    def add(self, name: str, text: str) -> None:
        with open(Path(self.folder, name), "ab", buffering=0) as file:  # in one piece: it may be killed
            file.write(f"{text}\n".encode())

    def read(self, name: str) -> list[str]:
        path = Path(self.folder, name)
        return path.read_text().splitlines() if path.exists() else []


#: The bytes of an invoice that its topic does not take.
TOO_LARGE = 200_000
#: Names of notes: steps at which a process was killed; and what was unrecorded when a clock jumped, as JSON.
KILLED, JUMPED = "killed", "jumped"


class Steps:
    """Kills this process when it comes to a step for the nth time."""

    def __init__(self, kill: tuple[str, int] | None, notes: Notes) -> None:
        self._step, self._left = kill or ("", 0)
        self._notes = notes
        self._lock = threading.Lock()

    def __call__(self, step: str) -> None:
        if step != self._step:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._notes.add(KILLED, step)
                os.kill(os.getpid(), signal.SIGKILL)


def opened(place: dict[str, Any]) -> outboxes.Outbox:
    kind: Any = kbatch.SqliteOutbox if "path" in place else kbatch.PostgresOutbox
    return kind(**place)  # with its wire format


def _envelope(number: int, of: Application) -> kbatch.Envelope:
    moment = datetime.now(timezone.utc) + timedelta(milliseconds=20 + number % 3) if of.scheduled else None
    # What is scheduled has no order.
    key = f"scheduled {number}" if of.scheduled else f"lane {of.lane}, {number % of.keys}"
    return kbatch.Envelope(data=b"%d" % number, key=key, scheduled_time=moment)


class _Told:
    """Numbers that were committed as this process knows it; they outlive it."""

    def __init__(self, notes: Notes, first: int) -> None:
        self._file = os.open(Path(notes.folder, told(first)), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, numbers: Sequence[int]) -> None:
        os.write(self._file, b"".join(b"%d\n" % number for number in numbers))


def told(first: int) -> str:
    """The name of the notes of an application whose numbers begin with this one."""
    return f"told {first}"


def add(place: dict[str, Any], topic: str, table: str, notes: Notes, first: int, application: Application) -> None:
    """Data and messages in each transaction."""
    outbox, step, tell = opened(place), Steps(application.kill, notes), _Told(notes, first)
    is_postgres = "path" not in place
    with outboxes.connected(outbox) as connection:
        for index, size in enumerate(application.sizes):
            numbers = range(first, first + size)
            first += size
            step("begin")
            connection.execute("BEGIN" if is_postgres else "BEGIN IMMEDIATE")
            step("data")
            values = ", ".join(f"({number})" for number in numbers)
            connection.execute(f"INSERT INTO {table} VALUES {values}")
            step("add")
            outbox.add(connection, [_envelope(number, application) for number in numbers], topic=topic)
            step("commit")
            connection.execute("ROLLBACK" if index in application.rolled_back else "COMMIT")
            if index not in application.rolled_back:
                step("committed")
                tell(numbers)


def unrecorded(outbox: outboxes.Outbox) -> list[int]:
    """The numbers whose rows wait to be sent, or are in flight, or were sent and that is not written yet."""
    statement = "SELECT packed FROM {outbox} UNION ALL SELECT packed FROM {later}"
    return [int(unpack_record(packed)[4] or b"") for (packed,) in outboxes.query(outbox, statement)]


def _away(outbox: outboxes.Outbox) -> type[Exception]:
    if isinstance(outbox, kbatch.SqliteOutbox):
        return sqlite3.Error
    import psycopg

    return psycopg.Error


class _Writer:
    def __init__(self, writer: Any, step: Steps) -> None:
        self._writer, self._step = writer, step

    def commit(self, take: Callable[[], Sequence[Any]]) -> bool:
        def taken() -> Sequence[Any]:
            self._step("take")
            group = take()
            self._step("taken")
            return group

        self._step("begin")
        done: bool = self._writer.commit(taken)
        self._step("committed")
        return done

    def close(self) -> None:
        self._writer.close()


def send(place: dict[str, Any], topic: str, table: str, notes: Notes, first: int, application: Application) -> None:
    """Threads send through a durable sender, each the numbers of a key."""
    outbox: Any = opened(place)
    step, tell = Steps(application.kill, notes), _Told(notes, first)
    open_writer = outbox.open_writer

    def watched() -> _Writer:
        step("open")
        return _Writer(open_writer(), step)

    outbox.open_writer = watched
    numbers = range(first, first + sum(application.sizes))
    with kbatch.DurableSender(outbox, topic) as sender:

        def work(of: int) -> None:
            for number in numbers:
                if number % 3 == of:
                    sender.send(_envelope(number, application), timeout=60)
                    tell([number])

        threads = [threading.Thread(target=work, args=(of,)) for of in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class _Committing:
    """A connection that tells of each COMMIT."""

    def __init__(self, connection: sqlite3.Connection, step: Steps) -> None:
        self._connection, self._step = connection, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql != "COMMIT":
            return self._connection.execute(sql, *arguments)
        self._step("before COMMIT")
        found = self._connection.execute(sql)
        self._step("after COMMIT")
        return found


class _Outbox(WatchedOutbox):
    def __init__(self, outbox: outboxes.Outbox, step: Steps) -> None:
        super().__init__(outbox, before=lambda name: step(f"before {name}"), after=lambda name: step(f"after {name}"))
        self._step = step
        self.was_opened = False

    def open_store(self) -> Any:
        store = super().open_store()
        self.was_opened = True
        inner = store._store
        committing = _Committing(inner._connection, self._step)
        if isinstance(self.outbox, kbatch.SqliteOutbox):
            inner._connection = committing
        else:
            plain = inner._connection.execute
            committing._connection = type("Plain", (), {"execute": staticmethod(plain)})()
            inner._connection.execute = committing.execute
        self._step("after open_store")
        return store


class _Relay(kbatch.Relay):
    def __init__(self, outbox: _Outbox, *arguments: Any, **options: Any) -> None:
        super().__init__(outbox, *arguments, **options)
        loop, step = self._loop, outbox._step
        may_hand_over, hand_over, settle = loop._may_hand_over, loop._hand_over, loop._settle

        def mapped() -> bool:
            step("mapped")
            return may_hand_over()

        def handed_over(*arguments: Any) -> None:
            hand_over(*arguments)
            step("handed over")

        def answered(flight: Any) -> None:
            settle(flight)
            step("answered")

        loop._may_hand_over = mapped  # type: ignore[method-assign]
        loop._hand_over = handed_over  # type: ignore[method-assign]
        loop._settle = answered  # type: ignore[method-assign]


class _RelayOnLoop(_Relay):
    _calls_class = LoopCalls
    _options_class = AioRelayOptions


_JUMP_EVERY_S = 0.2
_PAUSE_S = 0.05  # the database was away at the start of a relay: whoever watches relays begins another


def _jump(seconds: int, note: Callable[[], bool] = lambda: True) -> None:
    """Has the wall clock of this process jump by so much, and back, over and over.

    Args:
        note: Called before each jump, by who looks at the clock. If it returns False, the clock does not jump yet.
    """
    if not seconds:
        return
    turn = monotonic() // _JUMP_EVERY_S
    lock = threading.Lock()

    def jumping() -> float:
        nonlocal turn
        now = monotonic() // _JUMP_EVERY_S
        with lock:
            if now % 2 != turn % 2 and note():
                turn = now
            return wall_time() + (seconds if turn % 2 else 0)

    for module in (_tables, _relay_loop, _reading):
        vars(module)["wall_time"] = jumping
    Failing.__init__.__defaults__ = (monotonic, jumping, None)


def relay(place: dict[str, Any], config: dict[str, Any], options: dict[str, Any], notes: Notes, plan: Relay) -> None:
    """Sends until SIGTERM. When its clock jumps, what is in flight is given up, since a lease ends by each of two."""
    plain = opened(place)
    outbox = _Outbox(plain, Steps(plan.kill, notes))

    def note() -> bool:
        try:
            left = unrecorded(plain)
        except _away(plain):
            return False
        notes.add(JUMPED, json.dumps(left))
        return True

    _jump(plan.clock_s, note)
    if plan.is_aio:
        asyncio.run(_relay_on_loop(outbox, config, options))
        return
    is_over = False
    while not is_over:
        with _Relay(outbox, config, **options) as running:

            def stop(*_: object, running: kbatch.Relay = running) -> None:
                nonlocal is_over
                is_over = True
                running.stop()

            signal.signal(signal.SIGTERM, stop)
            try:
                running.run()
            except kbatch.OutboxError:
                if outbox.was_opened:
                    raise
                time.sleep(_PAUSE_S)
            else:
                return


async def _relay_on_loop(outbox: _Outbox, config: dict[str, Any], options: dict[str, Any]) -> None:
    over = asyncio.Event()
    while not over.is_set():
        async with kbatch.aio.Relay(outbox, config, **options) as running:
            running._relay = _RelayOnLoop(outbox, config, **options)  # type: ignore[assignment]

            def stop(running: kbatch.aio.Relay = running) -> None:
                over.set()
                running.stop()

            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
            try:
                await running.run()
            except kbatch.OutboxError:
                if outbox.was_opened:
                    raise
                await asyncio.sleep(_PAUSE_S)
            else:
                return


#: What a listener does, whose steps `Steps` may kill before and after.
_OF_SESSION = {"_open": "connect", "_begin": "mark", "_give": "handle", "_commit": "commit"}
_OF_READING = {
    name: name.strip("_")
    for name in ("done", "_begin_commit", "_commit_and_wait", "_rebalance", "_take_away", "_finish")
}


def _watched(method: Callable[..., Any], name: str, step: Steps) -> Callable[..., Any]:
    async def awaited(*arguments: Any, **keywords: Any) -> Any:
        step(f"before {name}")
        answer = await method(*arguments, **keywords)
        step(f"after {name}")
        return answer

    def called(*arguments: Any, **keywords: Any) -> Any:
        step(f"before {name}")
        answer = method(*arguments, **keywords)
        step(f"after {name}")
        return answer

    return awaited if asyncio.iscoroutinefunction(method) else called


def _watch(owner: Any, names: dict[str, str], step: Steps) -> None:
    for method, name in names.items():
        setattr(owner, method, _watched(getattr(owner, method), name, step))


_CALLS = {
    _transactions._INIT: "init",
    _transactions._BEGIN: "begin_transaction",
    _transactions._COMMIT: "commit_transaction",
    _transactions._ABORT: "abort_transaction",
}


def _watch_transactions(step: Steps) -> None:
    call = Transactions._call

    def watched(self: Transactions, which: int) -> Any:
        step(f"before {_CALLS[which]}")
        error = call(self, which)
        step(f"after {_CALLS[which]}")
        return error

    Transactions._call = watched  # type: ignore[method-assign]
    _watch(_transacting, {"_send_offsets": "send_offsets"}, step)
    _watch(Transacting, {"commit": "transact", "store": "store"}, step)


class Refused(Exception):
    """The handler does not take a message."""


def listen(
    place: dict[str, Any] | None,
    table: str,
    config: dict[str, Any],
    names: Names,
    retry_topics: list[float],
    handling: Handling,
    notes: Notes,
    plan: Listen,
) -> None:
    """Handles until SIGTERM.

    Args:
        place: Where the inbox is; without one handlers send in transactions what they would write.
    """
    _jump(plan.clock_s)
    logging.getLogger("kbatch").setLevel(logging.CRITICAL)  # of what fails on purpose
    step = Steps(plan.kill, notes)
    options: dict[str, Any] = {
        "concurrency": plan.concurrency,
        "batch_size": plan.batch_size,
        "max_in_flight": plan.max_in_flight,
        "retry": kbatch.RetryPolicy(max_attempts=3, initial_backoff_s=0.005, max_backoff_s=0.02),
        "retry_topics": retry_topics,
        "dead_letter_topic": names.dead,
    }
    if place is None:
        options["transactional_id"] = f"{names.group} {plan.slot}"
        _watch_transactions(step)
    else:
        options |= {"inbox": _watched_inbox(place, step), "commit_interval_s": plan.commit_interval_s}
    _watch(Reading, _OF_READING, step)
    _watch(Copies, {"send": "send_copy"}, step)
    _watch(Failing, {"sent_on": "copy_stored"}, step)
    failures: Counter[int] = Counter()

    def write(envelope: Any, into: Any) -> Any:
        """The effect, of which nothing is left if the handler fails then."""
        if place is None:
            fill = bytes(TOO_LARGE) if handling.is_too_large(int(envelope.data)) else b""
            return into.send(names.invoices, [kbatch.Envelope(data=envelope.data + fill, key=envelope.key.decode())])
        return into.execute(f"INSERT INTO {table} (n) VALUES ({int(envelope.data)})")

    def refuse(envelope: Any) -> None:
        number = int(envelope.data)
        if place is None and handling.is_too_large(number):
            return
        if handling.is_poison(number) or (handling.is_late(number) and envelope.topic == names.orders):
            raise Refused(number)
        if not handling.is_late(number) and failures[number] < handling.failures(number):
            failures[number] += 1
            raise Refused(number)

    def handle(given: Any, into: Any) -> None:
        for envelope in given if isinstance(given, list) else (given,):
            write(envelope, into)
            refuse(envelope)

    async def handle_on_loop(given: Any, into: Any) -> None:
        for envelope in given if isinstance(given, list) else (given,):
            done = write(envelope, into)
            await (asyncio.sleep(0) if isinstance(into, sqlite3.Connection) else done)
            refuse(envelope)

    handler: Any = handle_on_loop if plan.is_aio else handle
    if place is None:  # else the inbox's session is watched, whose calls of the handler are known
        handler = _watched(handler, "handle", step)
    if plan.is_aio:
        asyncio.run(_run_on_loop(kbatch.aio.Listener(config, [names.orders], handler, **options)))
        return
    listener = kbatch.Listener(config, [names.orders], handler, **options)
    signal.signal(signal.SIGTERM, lambda *_: listener.stop())
    listener.run()


def _watched_inbox(place: dict[str, Any], step: Steps) -> Any:
    kind: Any = kbatch.SqliteInbox if "path" in place else kbatch.PostgresInbox
    inbox = kind(**place)
    open_session = inbox.open_session

    def opened(group: str) -> InboxSession:
        session: InboxSession = open_session(group)
        _watch(session, _OF_SESSION, step)
        return session

    inbox.open_session = opened
    _watch(AioInboxSession, {"_give": "handle"}, step)
    return inbox


async def _run_on_loop(listener: kbatch.aio.Listener) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, listener.stop)
    await listener.run()
