"""A plan of an outbox: applications that add, relays that send, and which of them is killed at which of its steps. The
same seed makes the same plan, whatever it meets."""

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

LANES = 3
SLOTS = 3
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
#: A process comes there once.
ONCE = frozenset(("open", "before open_store", "after open_store", "before leave", "after leave"))


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

    def __str__(self) -> str:
        return f"relay {self.slot} begins{f', {self.kill}' if self.kill else ''}"


class End(NamedTuple):
    """Ends a relay: by SIGTERM, or by SIGKILL."""

    slot: int
    is_killed: bool

    def __str__(self) -> str:
        return f"relay {self.slot} {'is killed' if self.is_killed else 'is told to end'}"


class RunOut(NamedTuple):
    """The leases of relays that were killed run out."""

    def __str__(self) -> str:
        return "the leases of the dead run out"


class RoundTrip(NamedTuple):
    """How long brokers take to answer from here on."""

    ms: int

    def __str__(self) -> str:
        return f"brokers take {self.ms} ms"


Step = Application | Relay | End | RunOut | RoundTrip


@dataclass(frozen=True)
class OutboxPlan:
    seed: int
    database: str  # "sqlite", "postgres"
    partitions: int
    batch_size: int
    strict_order: bool
    kinds: tuple[str, ...]
    steps: tuple[Step, ...]
    #: The indices of the steps that are taken, for a plan that was made shorter.
    keep: tuple[int, ...]

    @property
    def taken(self) -> list[tuple[int, Step]]:
        return [(index, self.steps[index]) for index in self.keep]

    def only(self, keep: tuple[int, ...]) -> "OutboxPlan":
        return replace(self, keep=keep)

    @property
    def command(self) -> tuple[str, str]:
        """The target of `make` that runs plans like it, and its arguments."""
        return "soak", f"--outbox {self.database} "

    def __str__(self) -> str:
        strict = ", in strict order" if self.strict_order else ""
        lines = [
            f"seed {self.seed}: an outbox in {self.database}",
            f"  {self.partitions} partitions, relays with batches of {self.batch_size}{strict}",
        ]
        lines += [f"  {index:>3}. {step}" for index, step in self.taken]
        return "\n".join(lines)


def make_outbox_plan(seed: int, database: str) -> OutboxPlan:
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
    return OutboxPlan(
        seed=seed,
        database=database,
        partitions=rng.choice((1, 3)),
        batch_size=rng.choice((5, 50, 50)),
        strict_order=rng.random() < 0.15,
        kinds=tuple(sorted(kills)),
        steps=tuple(steps),
        keep=tuple(range(len(steps))),
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
