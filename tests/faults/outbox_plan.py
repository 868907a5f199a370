"""A plan of an outbox: applications that add, relays that send, and which of them is killed at which of its steps. A
whole history has listeners as well, and outages. The same seed makes the same plan, whatever it meets."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

LANES = 3
SLOTS = 3
#: In place of a strategy: a group of the new protocol (KIP-848), whose brokers decide who has which partitions.
BROKERS_DECIDE = "consumer"
#: Of an application that adds in transactions of its own, and of one that sends through a durable sender.
STEPS_OF_ADD = ("begin", "data", "add", "commit", "committed")
STEPS_OF_SEND = ("open", "begin", "take", "taken", "committed")
STEPS_OF_RELAY = (
    *("before open_store", "after open_store", "before renew", "after renew", "before changes"),
    *("before read", "after read", "before read_due", "before due_scheduled", "after due_scheduled"),
    *(
        "before admit_scheduled",
        "after admit_scheduled",
        "before settle",
        "after settle",
        "before leave",
        "after leave",
    ),
    *("before COMMIT", "after COMMIT", "mapped", "handed over", "answered"),
)
#: Of a listener: its sessions with the inbox, its offsets, rebalances, and copies of what fails.
STEPS_OF_LISTENER = tuple(
    f"{when} {name}"
    for name in (
        *("connect", "mark", "handle", "commit", "done"),
        *("begin_commit", "commit_and_wait", "rebalance", "take_away", "finish", "send_copy", "copy_stored"),
    )
    for when in ("before", "after")
)
#: Of a listener with transactions, which has no inbox.
STEPS_OF_TRANSACTIONAL = tuple(
    f"{when} {name}"
    for name in (
        *("init", "handle", "begin_transaction", "send_offsets", "commit_transaction", "abort_transaction"),
        *("transact", "store", "done", "rebalance", "take_away", "finish"),
    )
    for when in ("before", "after")
)
#: A process comes there once, or a few times.
ONCE = frozenset(
    (
        *("open", "before open_store", "after open_store", "before leave", "after leave"),
        *(f"{when} {name}" for name in ("connect", "init", "take_away", "finish") for when in ("before", "after")),
    )
)
#: How a real broker is away.
OUTAGES = ("refuses", "does not answer", "stands still", "is killed")
#: Of whole histories each of these has its turn; a PostgreSQL has some of its own as well.
FAULTS = ("hang relay", "hang listener", "brokers", "locked")
FAULTS_OF_POSTGRES = ("severed", "crashed", "clock")
#: Slots of the processes that a plan begins with, and of nobody else.
FIRST, OTHER, THIRD = SLOTS, SLOTS + 1, SLOTS + 2
#: What a plan may wait for.
KILLED = f"the {{}} {FIRST} is killed"
SHARED = f"each {{}} has buckets, or the {{}} {FIRST} is killed"
SENT = "a {} has sent all"
HANDLED = "a {} has handled something"
JUMPED = "the clock of a {} has jumped"


class Kill(NamedTuple):
    """Kills a process at a step of its own, when it comes there for the nth time."""

    step: str
    nth: int

    def __str__(self) -> str:
        return f"killed at its {self.nth}. {self.step!r}"


class Application(NamedTuple):
    """Adds in some transactions, of which some are rolled back. An application has the keys of its lane for itself."""

    lane: int
    way: str  # "add", "send"
    sizes: tuple[int, ...]
    rolled_back: frozenset[int]
    scheduled: bool
    kill: Kill | None
    #: Seconds after which it is killed wherever it is.
    kill_after_s: float | None
    #: How many keys its messages have.
    keys: int = 3

    def __str__(self) -> str:
        of = f"{len(self.sizes)} transactions of {', '.join(map(str, self.sizes))} by {self.way}"
        back = f", rolled back: {sorted(self.rolled_back)}" if self.rolled_back else ""
        end = f", {self.kill}" if self.kill else ""
        end += f", killed after {self.kill_after_s * 1000:.0f} ms" if self.kill_after_s is not None else ""
        return f"application of lane {self.lane}: {of}{', scheduled' if self.scheduled else ''}{back}{end}"


class Relay(NamedTuple):
    """Begins in a slot, in place of the one there, which must have been killed; else that goes on."""

    slot: int
    kill: Kill | None
    #: By how many seconds the clock of its machine jumps, there and back; the database has its own.
    clock_s: int = 0
    is_aio: bool = False

    def __str__(self) -> str:
        kind = "asyncio relay" if self.is_aio else "relay"
        return f"{kind} {self.slot} begins{f', {self.kill}' if self.kill else ''}{_jumping(self.clock_s)}"


class Listen(NamedTuple):
    """A listener begins in a slot, in place of the one there, which must have ended; else that goes on."""

    slot: int
    concurrency: int
    batch_size: int | None
    max_in_flight: int
    commit_interval_s: float
    kill: Kill | None
    is_aio: bool = False
    clock_s: int = 0  # as of a relay

    def __str__(self) -> str:
        handler = "single messages" if self.batch_size is None else f"batches of {self.batch_size}"
        of = f"{handler}, {self.concurrency} at a time, {self.max_in_flight} in flight"
        kind = "asyncio listener" if self.is_aio else "listener"
        end = f"{f', {self.kill}' if self.kill else ''}{_jumping(self.clock_s)}"
        return f"{kind} {self.slot} of {of} begins{end}"


class End(NamedTuple):
    """Ends a process: by SIGTERM, or by SIGKILL."""

    slot: int
    is_killed: bool
    who: str = "relay"  # "listener"

    def __str__(self) -> str:
        return f"{self.who} {self.slot} {'is killed' if self.is_killed else 'is told to end'}"


class Hang(NamedTuple):
    """Stops a process by SIGSTOP until its lease, or its session with the group, is another's; then it goes on."""

    slot: int
    who: str

    def __str__(self) -> str:
        return f"{self.who} {self.slot} hangs, loses what it holds, and goes on"


class Await(NamedTuple):
    """Until something is so: one of those above."""

    what: str
    who: str = "relay"  # "listener"

    def __str__(self) -> str:
        return f"until {self.what.replace('{}', self.who)}"


class Pass(NamedTuple):
    """Time passes."""

    ms: int

    def __str__(self) -> str:
        return f"{self.ms} ms pass"


class Brokers(NamedTuple):
    """All brokers are away, or are back."""

    are_up: bool
    #: One of `OUTAGES`, of real brokers.
    how: str = ""

    def __str__(self) -> str:
        how = f": each {self.how}" if self.how else ""
        return f"the brokers are {'back' if self.are_up else 'away'}{how}"


class Locked(NamedTuple):
    """Somebody holds a lock of all tables for some time."""

    ms: int

    def __str__(self) -> str:
        return f"the database is locked for {self.ms} ms"


class Severed(NamedTuple):
    """A PostgreSQL ends all connections."""

    def __str__(self) -> str:
        return "the database ends its connections"


class Crashed(NamedTuple):
    """All processes of a PostgreSQL are killed, and it is started again after a while."""

    ms: int

    def __str__(self) -> str:
        return f"the database is killed, and started again after {self.ms} ms"


class RunOut(NamedTuple):
    """The leases of relays that were killed run out."""

    def __str__(self) -> str:
        return "the leases of the dead run out"


class RoundTrip(NamedTuple):
    """How long brokers take to answer from here on."""

    ms: int

    def __str__(self) -> str:
        return f"brokers take {self.ms} ms"


Step = (
    Application | Relay | Listen | End | Hang | Await | Pass | Brokers | Locked | Severed | Crashed | RunOut | RoundTrip
)


def _jumping(seconds: int) -> str:
    return f", its clock jumps by {seconds} s" if seconds else ""


class Handling(NamedTuple):
    """What a handler makes of a number: of so many one is poison, one fails until it comes from a retry topic, and one
    fails once or twice. 0: none does."""

    poison: int
    late: int
    flaky: int

    def is_poison(self, number: int) -> bool:
        return self.poison > 0 and number % self.poison == 1

    def is_too_large(self, number: int) -> bool:
        """Whether it is poison since brokers do not take what its handler sends, so that its transaction is aborted.

        A handler that raises has no transaction yet.
        """
        return self.is_poison(number) and number % 2 == 0

    def is_late(self, number: int) -> bool:
        return self.late > 0 and number % self.late == 2 and not self.is_poison(number)

    def failures(self, number: int) -> int:
        """How often it fails in place, in a process."""
        return 1 + number % 2 if self.flaky and number % self.flaky == 3 else 0

    def __str__(self) -> str:
        kinds = zip(("poison", "handled from a retry topic", "handled in place at last"), self, strict=True)
        return ", ".join(f"one of {of} {what}" for what, of in kinds if of) or "no handler fails"


@dataclass(frozen=True)
class OutboxPlan:
    seed: int
    database: str  # "sqlite", "postgres"
    partitions: int
    batch_size: int
    strict_order: bool
    kinds: tuple[str, ...]
    #: The steps at which a process is killed, and the faults, of which its first steps see to it that they happen.
    promised: tuple[str, ...]
    #: How many steps these are.
    first: int
    steps: tuple[Step, ...]
    #: Whether each batch of a relay is a transaction of Kafka.
    fenced: bool
    #: Of a whole history, with listeners.
    handling: Handling | None
    #: How partitions are given to listeners: all members of a group agree on it.
    assignment: str
    #: The indices of the steps that are taken, for a plan that was made shorter.
    keep: tuple[int, ...]
    #: Run it on real brokers.
    kafka: bool = False
    #: Whether listeners commit what handlers send together with the offsets, and have no inbox.
    transactional: bool = False

    @property
    def taken(self) -> list[tuple[int, Step]]:
        return [(index, self.steps[index]) for index in self.keep]

    def only(self, keep: tuple[int, ...]) -> "OutboxPlan":
        return replace(self, keep=keep)

    def beginning(self) -> "OutboxPlan":
        """Without what comes by chance."""
        return self.only(tuple(range(self.first)))

    @property
    def crashes(self) -> bool:
        """Whether it needs a PostgreSQL of its own."""
        return any(isinstance(step, Crashed) for _, step in self.taken)

    @property
    def command(self) -> tuple[str, str]:
        """The target of `make` that runs plans like it, and its arguments."""
        target = "soak-kafka" if self.kafka else "soak"
        return target, f"--{'outbox' if self.handling is None else 'whole'} {self.database} "

    def __str__(self) -> str:
        strict = ", in strict order" if self.strict_order else ""
        strict += ", fenced by transactions" if self.fenced else ""
        what = "an outbox" if self.handling is None else "outbox and inbox"
        what = "an outbox, and listeners with transactions," if self.transactional else what
        lines = [
            f"seed {self.seed}: {what} in {self.database}{', on Kafka' if self.kafka else ''}",
            f"  {self.partitions} partitions, relays with batches of {self.batch_size}{strict}",
        ]
        lines += [] if self.handling is None else [f"  {self.handling}; assignment {self.assignment}"]
        lines += [f"  {index:>3}. {step}" for index, step in self.taken]
        return "\n".join(lines)


def make_outbox_plan(seed: int, database: str) -> OutboxPlan:
    plan = _later_steps(seed, database)
    named, first = plan.promised
    others = [Relay(OTHER, None), Relay(THIRD, None, is_aio=seed % 2 == 0)]
    end = [End(slot, is_killed=seed % 2 == 0) for slot in (OTHER, THIRD)]
    return _begun_with(plan, [_killed_application(seed, named), *_killed_relay(seed, first, *others), *end])


def _begun_with(plan: OutboxPlan, first: list[Step]) -> OutboxPlan:
    steps = (*first, *plan.steps)
    kinds = tuple(sorted({*plan.kinds, *plan.promised}))
    return replace(plan, steps=steps, first=len(first), kinds=kinds, keep=tuple(range(len(steps))))


def _killed_application(seed: int, step: str) -> Application:
    return _plain(seed, (2, 7))._replace(way=("add", "send")[seed % 2], kill=Kill(step, 1))


def _killed_relay(seed: int, step: str, *others: Relay) -> list[Step]:
    """One that is killed at this step, alone or beside others, when there are rows for each of them."""
    begun: list[Step] = [Relay(FIRST, Kill(step, 1), is_aio=seed % 3 == 1), *others, Await(SHARED)]
    rows = _plain(seed, (1, 7, 40))._replace(scheduled="scheduled" in step, keys=48)
    end: list[Step] = [Await(SENT), End(FIRST, False)] if "leave" in step else [Await(KILLED)]
    return [*begun, rows, *end, RunOut()]


def _plain(seed: int, sizes: tuple[int, ...]) -> Application:
    return Application(seed % LANES, "add", sizes, frozenset(), scheduled=False, kill=None, kill_after_s=None)


def _later_steps(seed: int, database: str) -> OutboxPlan:
    """An outbox's plan but for the steps that it begins with."""
    rng = random.Random(seed)
    relays = rng.choice((1, 2, 3, 3))
    # Each step of a relay, and of an application, has its turn as the first that is killed.
    first = STEPS_OF_RELAY[seed % len(STEPS_OF_RELAY)]
    ways = ("add", "send")
    way = ways[seed % 2]
    named = (STEPS_OF_ADD if way == "add" else STEPS_OF_SEND)[seed // 2 % 5]
    steps: list[Step] = [_application(rng, way, _at(rng, named))]
    begun: list[Step] = [Relay(slot, _kill(rng) if slot else _at(rng, first)) for slot in range(relays)]
    steps = [*begun, *steps] if rng.random() < 0.6 else [*steps, *begun]
    for _ in range(rng.randint(3, 7)):
        what = rng.random()
        if what < 0.45:
            own = rng.choice(ways)
            at = _at(rng, rng.choice(STEPS_OF_ADD if own == "add" else STEPS_OF_SEND))
            steps.append(_application(rng, own, at if rng.random() < 0.5 else None))
        elif what < 0.7:
            steps.append(Relay(rng.randrange(SLOTS), _kill(rng)))
        elif what < 0.8:
            steps.append(End(rng.randrange(SLOTS), rng.random() < 0.7))
        elif what < 0.9:
            steps.append(RunOut())
        else:
            steps.append(RoundTrip(rng.choice((0, 5, 40))))
    kills = {str(step.kill.step) for step in steps if isinstance(step, (Application, Relay)) and step.kill}
    plan = OutboxPlan(
        seed=seed,
        database=database,
        partitions=rng.choice((1, 3)),
        batch_size=rng.choice((5, 50, 50)),
        strict_order=rng.random() < 0.15,
        kinds=tuple(sorted(kills)),
        promised=(named, first),
        first=0,
        steps=tuple(steps),
        fenced=rng.random() < 0.2,
        handling=None,
        assignment="",
        keep=tuple(range(len(steps))),
    )
    return replace(plan, steps=tuple(_on_a_loop(rng, step) if isinstance(step, Relay) else step for step in plan.steps))


def _on_a_loop(rng: random.Random, step: Relay) -> Relay:
    return step._replace(is_aio=rng.random() < 0.3)


def make_whole_plan(seed: int, database: str, *, kafka: bool = False) -> OutboxPlan:
    """The plan of an outbox with this seed, listeners and outages among its steps.

    On Kafka listeners have transactions in each second plan; the mock cluster commits no offsets in them.
    """
    plan = _later_steps(seed, database)
    rng = random.Random(f"whole {seed}")
    steps = list(plan.steps)
    is_transactional = kafka and seed % 2 == 0
    # Each step of a listener has its turn as the first that is killed.
    of_listener = STEPS_OF_TRANSACTIONAL if is_transactional else STEPS_OF_LISTENER
    first = of_listener[(seed // 2 if kafka else seed) % len(of_listener)]
    begun = [_listen(rng, slot, _of_listener(rng, of_listener)) for slot in range(1, rng.randint(1, 3))]
    steps[:0] = [_listen(rng, 0, _at(rng, first)), *begun, Pass(300)]
    for _ in range(rng.randint(6, 12)):
        added: list[Step] = [_step_of_whole(rng, database, of_listener)]
        at = rng.randint(len(begun) + 2, len(steps))
        if isinstance(added[0], Brokers):
            added.append(Pass(rng.choice((50, 500))))
            steps.insert(rng.randint(at, len(steps)), Brokers(True))
        steps[at:at] = added
    kills = {str(step.kill.step) for step in steps if isinstance(step, (Application, Relay, Listen)) and step.kill}
    others = {
        type(step).__name__.lower() for step in steps if isinstance(step, (Hang, Brokers, Locked, Severed, Crashed))
    }
    if database == "postgres":  # SQLite's processes have one clock
        steps = [_with_jumps(rng, step) if isinstance(step, (Relay, Listen)) else step for step in steps]
    steps = [step._replace(is_aio=rng.random() < 0.3) if isinstance(step, Listen) else step for step in steps]
    listens = [step for step in steps if isinstance(step, Listen)]
    others |= {"aio"} if any(step.is_aio for step in listens) else set()
    others |= {"clock"} if any(step.clock_s for step in steps if isinstance(step, (Relay, Listen))) else set()
    assignment = rng.choice(("cooperative-sticky", "cooperative-sticky", "range"))
    handling = Handling(rng.choice((0, 17, 40)), rng.choice((0, 0, 23)), rng.choice((0, 11, 50)))
    if "copy" in first or "store" in first or "abort" in first:
        handling = handling._replace(poison=17)
    if kafka:
        # Each way in which partitions are given away has its turn, the one that brokers decide in each second plan.
        assignment = (BROKERS_DECIDE, assignment)[seed // 2 % 2]
        steps = [_on_kafka(rng, step) for step in steps]
        others |= {step.how for step in steps if isinstance(step, Brokers) and step.how}
    elif rng.random() < 0.25:
        assignment = BROKERS_DECIDE
    others.add(assignment)
    faults = [FAULTS[seed // 2 % 4 if kafka else seed % 4]]
    faults += [FAULTS_OF_POSTGRES[seed // 3 % 3]] if database == "postgres" else []
    how = OUTAGES[seed // 8 % 4] if kafka else ""
    faults += [how] if kafka and "brokers" in faults else []
    plan = replace(
        plan,
        kinds=tuple(sorted(kills | others)),
        promised=(*plan.promised, first, *faults),
        steps=tuple(steps),
        # The mock cluster's end of a partition is behind a transaction's marker, which is never committed: nobody could
        # tell when all is done.
        fenced=kafka and plan.fenced,
        handling=handling,
        assignment=assignment,
        kafka=kafka,
        transactional=is_transactional,
        # Else a second listener may get no partition of the first one's.
        partitions=3 if "take_away" in first else plan.partitions,
    )
    return _begun_with(plan, _first_of_whole(plan, seed, first, faults, how))


def _first_of_whole(plan: OutboxPlan, seed: int, of_listener: str, faults: Sequence[str], how: str) -> list[Step]:
    """The promised kills of an application, a relay and a listener, one after the other, and the faults."""
    named, of_relay, *_ = plan.promised
    rng = random.Random(f"first {seed}")
    other = _listen(rng, OTHER, None)._replace(is_aio=rng.random() < 0.3)
    is_killed = rng.random() < 0.5
    steps: list[Step] = [
        _listen(rng, FIRST, Kill(of_listener, 1))._replace(is_aio=rng.random() < 0.3),
        _killed_application(seed, named),
        *_killed_relay(seed, of_relay),
        Relay(FIRST, None, clock_s=3_600 if "clock" in faults else 0, is_aio=rng.random() < 0.3),
    ]
    if "take_away" in of_listener:
        steps.append(other)
    if "finish" in of_listener or "commit_and_wait" in of_listener:  # at its end
        steps += [Await(HANDLED, "listener"), End(FIRST, False, "listener")]
    steps += [Await(KILLED, "listener"), Await(SENT), other, _plain(seed, (1, 7))]
    of_faults: dict[str, list[Step]] = {
        "hang relay": [Hang(FIRST, "relay")],
        "hang listener": [Hang(OTHER, "listener")],
        "brokers": [Brokers(False, how), Pass(50), Brokers(True)],
        "locked": [Locked(50)],
        "severed": [Severed()],
        "crashed": [Crashed(0)],
        "clock": [Await(JUMPED)],
    }
    for fault in faults:
        steps += of_faults.get(fault, [])
    return [*steps, End(FIRST, is_killed), *(End(slot, is_killed, "listener") for slot in (FIRST, OTHER))]


def _on_kafka(rng: random.Random, step: Step) -> Step:
    if isinstance(step, Brokers) and not step.are_up:
        return step._replace(how=rng.choice(OUTAGES))
    return step


def _step_of_whole(rng: random.Random, database: str, of_listener: Sequence[str]) -> Step:
    what = rng.random()
    if what < 0.2:
        return _application(rng, "add", None)
    if what < 0.25:
        return Relay(rng.randrange(SLOTS), None)
    if what < 0.5:
        return _listen(rng, rng.randrange(SLOTS), _of_listener(rng, of_listener))
    if what < 0.57:
        return End(rng.randrange(SLOTS), rng.random() < 0.5, "listener")
    if what < 0.62:
        return Hang(rng.randrange(SLOTS), rng.choice(("relay", "listener")))
    if what < 0.82:
        return Pass(rng.choice((20, 200, 700)))
    if what < 0.9:
        return Brokers(False)
    if database == "postgres" and what < 0.96:
        return Severed() if what < 0.93 else Crashed(rng.choice((0, 400)))
    return Locked(rng.choice((50, 400)))


def _with_jumps(rng: random.Random, step: Relay | Listen) -> Relay | Listen:
    return step._replace(clock_s=rng.choice((-3600, 3600, 1_000_000))) if rng.random() < 0.3 else step


def _of_listener(rng: random.Random, steps: Sequence[str]) -> Kill | None:
    return _at(rng, rng.choice(steps)) if rng.random() < 0.5 else None


def _listen(rng: random.Random, slot: int, kill: Kill | None) -> Listen:
    return Listen(
        slot=slot,
        concurrency=rng.choice((1, 4)),
        batch_size=rng.choice((None, None, 5, 50)),
        max_in_flight=rng.choice((50, 2_000)),
        commit_interval_s=rng.choice((0.02, 0.3)),
        kill=kill,
    )


def _at(rng: random.Random, step: str) -> Kill:
    return Kill(step, 1 if step in ONCE else rng.randint(1, rng.choice((2, 6, 40))))


def _kill(rng: random.Random) -> Kill | None:
    return _at(rng, rng.choice(STEPS_OF_RELAY)) if rng.random() < 0.5 else None


def _application(rng: random.Random, way: str, kill: Kill | None) -> Application:
    count = rng.randint(2, 10)
    return Application(
        lane=rng.randrange(LANES),
        way=way,
        sizes=tuple(rng.choice((1, 1, 2, 7, 60)) for _ in range(count)),
        rolled_back=frozenset(n for n in range(count) if way == "add" and rng.random() < 0.2),
        scheduled=rng.random() < 0.2,
        kill=kill,
        kill_after_s=rng.uniform(0.0, 0.2) if kill is None and rng.random() < 0.3 else None,
    )
