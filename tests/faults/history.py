"""What happened in one run of a plan: what was sent, what was answered, what a consumer read back. Plain data."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

ACKED, FAILED, EXPIRED = "acked", "failed", "expired"

# How a batch may be answered: by what a call returned or raised, by a callback, by a SenderCallback.
RETURN, CALLBACK, CONTRACT = "return", "callback", "contract"


class Outcome(NamedTuple):
    """One envelope's outcome, as a report told it."""

    state: str
    code: int = 0
    possibly_persisted: bool = False
    retriable: bool = False
    partition: int = -1
    offset: int = -1


class Message(NamedTuple):
    """An envelope as it was when it was handed in. The token is unique; a message sent again keeps its id only."""

    token: str
    id: str
    key: bytes | None
    value: bytes | None


class Answer(NamedTuple):
    """One answer for a batch. `refusal` is the exception that says that nothing was sent."""

    channel: str
    outcomes: tuple[Outcome, ...] | None
    method: str = ""
    refusal: str = ""


@dataclass
class Sent:
    """A batch and its answers. `began` and `handed_in` are places in the run's order of events."""

    number: int
    topic: str
    messages: tuple[Message, ...]
    channels: frozenset[str]
    instance: int = 0
    began: int = 0
    handed_in: int | None = None
    answers: list[Answer] = field(default_factory=list)
    #: The refusal that its envelopes ask for, "" for none.
    spoilt: str = ""
    #: A batch sent to a healthy cluster when all faults were over, the last of its kind.
    probe: bool = False
    #: Whether nobody was told yet when a close or a flush may have come: these may tell instead.
    untold: bool = False


@dataclass
class Stream:
    """What a batched sender was given, one envelope at a time, and what it told of it when it was closed.

    The sender sends again: `attempts` are the outcomes of each of its batches, by the message's token.
    """

    number: int
    topic: str
    strict: bool
    #: Those that it took, in the order of the calls.
    taken: list[Message] = field(default_factory=list)
    #: Of a token: what its order is kept in. Without one there is no order.
    groups: dict[str, str] = field(default_factory=dict)
    #: Tokens of those that had expired, and of those that cannot be mapped.
    expired: set[str] = field(default_factory=set)
    unmappable: set[str] = field(default_factory=set)
    #: Tokens of those that a broker refuses for a reason of their own.
    guilty: set[str] = field(default_factory=set)
    #: How often the circuit opened.
    opened: int = 0
    attempts: dict[str, list[Outcome]] = field(default_factory=dict)
    #: Whether it has no `on_failed`: then flush and close raise.
    silent: bool = False
    #: What `on_failed` was told, or flush and close raised: token, and the error's type or, of a DeliveryError, its
    #: code.
    told: list[tuple[str, str | int]] = field(default_factory=list)
    #: Why it ended by itself, and could send no more.
    death: str = ""
    #: Whether its topic may never be there: then closing gives up.
    hopeless: bool = False
    #: The longest that the sender was, and how long it may be.
    most: int = 0
    bound: int = 0
    #: What `close` returned (of those that were told, how many since closing began), and how many had no outcome then.
    not_sent: int | None = None
    left: int = 0
    stats: dict[str, int] = field(default_factory=dict)


class Read(NamedTuple):
    """A record that a consumer read back."""

    partition: int
    offset: int
    token: str
    id: str | None
    key: bytes | None
    value: bytes | None


@dataclass
class Rules:
    """What the faults of the plan excuse."""

    #: librdkafka's codes that a failure may have.
    codes: frozenset[int] = frozenset()
    #: Exceptions that may refuse a batch that is not spoilt.
    refusals: frozenset[str] = frozenset()
    #: Whether an acknowledgement may be lost after the append: then the mock cluster, which does not deduplicate, has a
    #: message as often as it was sent.
    copies: bool = False
    #: Whether the order of the calls holds.
    ordered: bool = True
    #: Whether the brokers may seem to be away: else no circuit may open.
    outage: bool = True
    #: Whether the brokers refuse single records, whose neighbours are innocent.
    single: bool = False


@dataclass
class History:
    rules: Rules
    sends: list[Sent] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    logs: dict[str, list[Read]] = field(default_factory=dict)
    #: Topics that were deleted after records of theirs had been acknowledged.
    deleted: set[str] = field(default_factory=set)
    #: How often a producer's flush and close have raised an envelope as undelivered, by its token.
    raised: Counter[str] = field(default_factory=Counter)
    pinned_buffers: int = 0
    live_batches: int = 0
    live_threads: tuple[str, ...] = ()
    #: What the runner itself saw go wrong.
    findings: list[str] = field(default_factory=list)


def seen(history: History) -> Counter[str]:
    """What the faults have brought about, to tell a plan that met them from one that did not."""
    counts: Counter[str] = Counter()
    for sent in history.sends:
        counts.update(answer.refusal for answer in sent.answers if answer.refusal)
        for outcome in next((answer.outcomes for answer in sent.answers if answer.outcomes and not answer.refusal), ()):
            counts[outcome.state] += 1
            if outcome.state == FAILED:
                counts[f"failed with {outcome.code}{', perhaps stored' if outcome.possibly_persisted else ''}"] += 1
    for stream in history.streams:
        counts["one at a time"] += len(stream.taken)
        counts["sent again by a sender"] += stream.stats.get("retried", 0)
        counts.update(f"given up by a sender: {reason}" for _, reason in stream.told)
    counts["raised as undelivered"] = len(history.raised)
    counts["given up by a sender, and raised"] = sum(len(stream.told) for stream in history.streams if stream.silent)
    copies = Counter(record.token for records in history.logs.values() for record in records)
    counts["stored twice"] = sum(count > 1 for count in copies.values())
    return +counts


#: What `seen` counts of an outbox's `met` begins with.
MET = "met: "


@dataclass
class OutboxHistory:
    """What happened to an outbox: numbers, which of a key grow in the order of their transactions."""

    #: By the application's own data, and as it was told.
    committed: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    #: Sent through a durable sender, which leaves no data: what was not told may be committed.
    possible: set[int] = field(default_factory=set)
    #: Key and number of each record, those of a partition in their order.
    log: list[tuple[str, int]] = field(default_factory=list)
    #: How often a process was killed at a step of its own, by the step's name, and each kind of fault has happened.
    met: Counter[str] = field(default_factory=Counter)
    application_kills: int = 0
    relay_kills: int = 0
    #: Of a number: at how many disturbances its row was still in the hot table or in `later`, so that a relay may have
    #: had it in flight, and it is sent again. One is a relay that was killed or hung, an outage, a clock that jumped.
    unrecorded: Counter[int] = field(default_factory=Counter)
    listener_kills: int = 0
    #: Of a whole history: the number of each effect, in the order in which handlers wrote them; else None.
    effects: list[int] | None = None
    #: Of one with transactions: key and number of each record that handlers have sent, those of a key in their order;
    #: and of each dead letter. Else None.
    outputs: list[tuple[str, int]] | None = None
    letters: list[tuple[str, int]] = field(default_factory=list)
    #: Numbers in the dead letter topic; those that belong there; those that later ones of their key may overtake.
    dead: set[int] = field(default_factory=set)
    poison: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    #: What the runner itself saw go wrong.
    findings: list[str] = field(default_factory=list)
