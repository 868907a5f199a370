"""A plan: what a seed makes a run do. The same seed makes the same plan, whatever it meets."""

import random
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tests.faults import kafka_kinds
from tests.faults.history import Rules
from tests.faults.kinds import BY_NAME, KINDS, Kind

WAYS = ("send_batch", "wait", "callback", "await", "forgotten", "sender", "aio", "aio callback", "aio sender")
#: One envelope at a time, to a sender of its own that is closed at the end of the step.
ONE_AT_A_TIME = ("batched", "aio batched")
BODIES = ("json", "bytes", "bytearray", "memoryview", "tombstone", "hooked")


class Send(NamedTuple):
    """Hand a batch to a sender; does not wait for it."""

    sender: int
    count: int
    way: str = "send_batch"
    body: str = "json"
    topic: str = "main"
    spoil: str = ""
    #: Send again what failed of the step with this index, with the same ids.
    again: int | None = None

    def __str__(self) -> str:
        what = f"{self.count} envelopes" if self.again is None else f"what failed of step {self.again}"
        spoil = f", one {self.spoil}" if self.spoil else ""
        topic = f" to the {self.topic} topic" if self.topic != "main" else ""
        return f"sender {self.sender}: {what} of {self.body}{spoil}{topic}, by {self.way}"


class Fault(NamedTuple):
    """Begin a fault; it ends after `span` more sends and `hold_ms`."""

    kind: str
    span: int
    hold_ms: int
    amount: int

    def __str__(self) -> str:
        return f"fault: {self.kind}, for {self.span} sends and {self.hold_ms} ms, amount {self.amount}"


@dataclass(frozen=True)
class Plan:
    seed: int
    partitions: int
    senders: int
    kinds: tuple[str, ...]
    wire: str
    idempotent: bool
    in_flight: int
    #: Whether a first batch is sent before the steps, so that faults meet a producer that is connected.
    warm: bool
    #: The bound of ``submit``.
    max_in_flight: int
    config: tuple[tuple[str, Any], ...]
    steps: tuple[Send | Fault, ...]
    #: The indices of the steps that are taken, for a plan that was made shorter.
    keep: tuple[int, ...]
    #: Run it on real brokers.
    kafka: bool = False

    def kind(self, name: str) -> Kind:
        return (kafka_kinds.BY_NAME if self.kafka else BY_NAME)[name]

    @property
    def taken(self) -> list[tuple[int, Send | Fault]]:
        return [(index, self.steps[index]) for index in self.keep]

    @property
    def command(self) -> tuple[str, str]:
        """The target of `make` that runs plans like it, and its arguments."""
        return "soak-kafka" if self.kafka else "soak", ""

    def only(self, keep: tuple[int, ...]) -> "Plan":
        return replace(self, keep=keep)

    def rules(self) -> Rules:
        kinds = [self.kind(name) for name in self.kinds]
        return Rules(
            codes=frozenset().union(*(kind.codes for kind in kinds)),
            refusals=frozenset().union(*(kind.refusals for kind in kinds)),
            copies=any(kind.copies and not (kind.deduplicated and self.idempotent) for kind in kinds),
            outage=any(kind.outage for kind in kinds),
            single=any(kind.send.get("spoil") == "bad timestamp" for kind in kinds),
            # librdkafka keeps the order of what it sends again if it is idempotent; max.in.flight=1 alone does not.
            ordered=self.idempotent or not any(kind.copies or kind.one_in_flight for kind in kinds),
        )

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {', '.join(self.kinds)}",
            f"  {self.partitions} partitions, {self.senders} senders, wire {self.wire}, "
            f"{'idempotent' if self.idempotent else 'not idempotent'}, {self.in_flight} requests in flight, "
            f"max_in_flight {self.max_in_flight}{'' if self.warm else ', not connected before'}",
            f"  {dict(self.config)}",
        ]
        lines += [f"  {index:>3}. {step}" for index, step in self.taken]
        return "\n".join(lines)


def make_plan(seed: int, *, kafka: bool = False) -> Plan:
    rng = random.Random(seed)
    known = kafka_kinds.KAFKA_KINDS if kafka else KINDS
    # Each kind leads a plan once in so many seeds; the others come by chance.
    kinds = [known[seed % len(known)]]
    kinds += [kind for kind in rng.sample(known, rng.choice((0, 0, 1, 1, 2, 3))) if kind not in kinds]
    idempotent = any(kind.idempotent for kind in kinds) or rng.random() < 0.7
    in_flight = 1 if any(kind.one_in_flight for kind in kinds) else rng.choice((1, 5))
    senders = rng.choice((1, 1, 1, 2, 3))
    config: dict[str, Any] = {"linger.ms": rng.choice((0, 0, 5))}
    if rng.random() < 0.4:
        config["batch.num.messages"] = rng.choice((5, 20, 100))
    for kind in kinds:
        config |= kind.config
    return Plan(
        seed=seed,
        partitions=rng.choice((1, 1, 2, 3)),
        senders=senders,
        kinds=tuple(kind.name for kind in kinds),
        wire=rng.choice(("kbatch", "kbatch", "wolverine", "raw")),
        idempotent=idempotent,
        in_flight=in_flight,
        warm=rng.random() < 0.9 and not any(kind.cold for kind in kinds),
        max_in_flight=rng.choice((20_000, 20_000, 50)),
        config=tuple(sorted(config.items())),
        steps=(steps := tuple(_make_steps(rng, kinds, senders))),
        keep=tuple(range(len(steps))),
        kafka=kafka,
    )


def _make_steps(rng: random.Random, kinds: list[Kind], senders: int) -> list[Send | Fault]:
    steps: list[Send | Fault] = []
    for kind in kinds:
        steps += [_any_send(rng, senders) for _ in range(rng.choice((0, 1, 1, 2)))]
        own = rng.randint(1, 3)
        steps.append(Fault(kind.name, own + rng.choice((0, 0, 1, 2)), rng.randint(*kind.hold_ms), rng.randint(0, 20)))
        needed = rng.randrange(own)
        for i in range(own):
            send = _any_send(rng, senders)
            if i == needed or rng.random() < 0.3:
                send = send._replace(**kind.send)
            steps.append(send)
    for _ in range(rng.choice((0, 1, 2))):
        sends = [(index, step) for index, step in enumerate(steps) if isinstance(step, Send)]
        repeated = {step.again for _, step in sends}
        earlier = [
            index
            for index, step in sends
            if step.topic == "main" and index not in repeated and step.way not in ONE_AT_A_TIME
        ]
        if earlier and rng.random() < 0.5:
            again = {"again": rng.choice(earlier), "spoil": "", "way": rng.choice(WAYS)}
            steps.append(_any_send(rng, senders)._replace(**again))
        else:
            steps.append(_any_send(rng, senders))
    return steps


def _any_send(rng: random.Random, senders: int) -> Send:
    return Send(
        sender=rng.randrange(senders),
        count=rng.choice((0, 1, 1, 2, 5, 20, 50, 129, 300)),
        way=rng.choice(WAYS + ONE_AT_A_TIME),
        body=rng.choice(BODIES),
        spoil="expired" if rng.random() < 0.1 else "",
    )
