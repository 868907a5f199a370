"""The invariants of a producer, checked on a history. No I/O, no clock.

I1          what was acknowledged is in the log, with the content it was handed in with, where the report says
I2          each envelope has one outcome, each batch one answer by each way in which it is answered
I4          a partition's log has the order of the calls, while one producer lives and no message of it has failed
I5          nothing stays pinned, no batch and no thread stays alive
I6          a message is in the log once, and an id twice only if an attempt was possibly persisted
not-sent    what is reported as not persisted, expired or refused is not in the log
stranger    the log has nothing that was not sent, and nothing that was changed
unexplained no failure and no refusal that the plan's faults do not explain; what is spoilt is refused
settled     every batch is answered in the end
recovered   when the faults are over, a batch is acknowledged
silent      what a producer's flush or close raises has failed, was told to nobody before, and is raised once. A batch
            that is forgotten has no other answer: what is not raised counts as acknowledged (I1)

Of batched senders (`Stream`): each envelope that was taken is acknowledged (I1), or had expired, or is told to
``on_failed``, or without one raised by flush or close, once (I2), and counted. What was acknowledged is not sent again,
so that it is in the log once, and besides as often as it was possibly persisted (I6). Given up is what is refused for
good or failed too often, never for an outage (unexplained), and never what stands beside a record that a broker
refuses (innocent). The circuit opens for an outage only (outage). In strict order no message comes after a later one
of its key; else that holds if nothing was sent again (I4). ``max_buffered`` is kept (bounded).

Of an outbox (`OutboxHistory`): what was committed, by the application's data or as its sender was told, is in the log
(I1), and nothing else is (stranger). What was told is in the data (settled). The first copies of a key are in the order
of its transactions (I4). A number is in the log once, and once more for each disturbance at which its row was not
recorded yet (I6): what was acknowledged and deleted is not sent again. Of a whole history every order has exactly one
effect, in order per key: what is in the log has an effect (I1), once (I6), and nothing else has one (stranger); the
effects of a key are in the order of its transactions, but for what came from a retry topic (I4). What no handler takes
has no effect, and is in the dead letter topic (I1), where nothing else is (stranger).
Listeners with transactions know no copies: there each record of the log, and a copy is one, has exactly one output, or
one dead letter, and the outputs of a key are in the order of the log.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.faults.history import (
    ACKED,
    CALLBACK,
    CONTRACT,
    EXPIRED,
    FAILED,
    Answer,
    History,
    Message,
    OutboxHistory,
    Outcome,
    Read,
    Sent,
    Stream,
)

TIMEOUTS = frozenset((-192, -185, -166, 7))
UNKNOWN_TOPICS = frozenset((-190, -188, 3, 100))
PERMANENT = frozenset((10, 17, 29, 32, 44, 87))


class Violation(NamedTuple):
    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


class _Attempt(NamedTuple):
    sent: Sent | Stream
    index: int
    message: Message
    outcome: Outcome | None  # None: refused or not settled

    @property
    def name(self) -> str:
        return f"batch {self.sent.number}, envelope {self.index} (token {self.message.token})"


def check(history: History) -> list[Violation]:
    """Every violation, in the order of the invariants."""
    attempts = {attempt.message.token: attempt for sent in history.sends for attempt in _attempts(sent)}
    streamed = {
        message.token: _Attempt(stream, index, message, None)
        for stream in history.streams
        for index, message in enumerate(stream.taken)
    }
    found = list(_answers(history))
    for topic, records in history.logs.items():
        found += _strangers(topic, records, attempts | streamed)
    for stream in history.streams:
        found += _stream(history, stream, streamed)
    found += _raised(history, attempts)
    found += _acknowledged(history, attempts)
    found += _not_sent(history, attempts)
    found += _copies(history, attempts)
    if history.rules.ordered:
        found += _order(history, attempts)
    found += _leftovers(history)
    found += _recovered(history)
    found += [Violation("runner", finding) for finding in history.findings]
    order = ("settled", "I2", "I1", "I4", "I5", "I6")
    return sorted(found, key=lambda v: order.index(v.invariant) if v.invariant in order else len(order))


def check_outbox(history: OutboxHistory) -> list[Violation]:
    """Every violation of an outbox's history."""
    found = [Violation("runner", finding) for finding in history.findings]
    numbers = Counter(number for _, number in history.log)
    committed = history.committed | history.told
    for name, wrong, what in (
        ("settled", history.told - history.committed - history.possible, "told as committed, and have no data"),
        ("I1", committed - set(numbers), "committed, and not in the log"),
        ("stranger", set(numbers) - committed - history.possible, "in the log, and not committed"),
    ):
        if wrong:
            found.append(Violation(name, f"{len(wrong)} {what}, such as {sorted(wrong)[:5]}"))
    firsts: dict[int, str] = {}
    for key, number in history.log:
        firsts.setdefault(number, key)
    found += _in_order([(key, number) for number, key in firsts.items()], "record")
    for number, count in sorted(numbers.items()):
        if count - 1 > history.unrecorded[number]:
            text = f"{number} is in the log {count} times, unrecorded at {history.unrecorded[number]} disturbances"
            found.append(Violation("I6", text))
    if history.effects is not None:
        found += _effects(history, history.effects, firsts)
    if history.outputs is not None:
        found += _outputs(history, history.outputs)
    return found


def _in_order(numbered: Iterable[tuple[str, int]], what: str) -> Iterator[Violation]:
    latest: dict[str, int] = {}
    for key, number in numbered:
        if number < latest.get(key, -1):
            yield Violation("I4", f"the {what} of {number}, of key {key!r}, comes after that of {latest[key]}")
        latest[key] = max(number, latest.get(key, -1))


def _effects(history: OutboxHistory, effects: list[int], keys: dict[int, str]) -> Iterator[Violation]:
    """Every order has exactly one effect, in order per key."""
    counts = Counter(effects)
    wanted = set(keys)
    for name, wrong, what in (
        ("I1", wanted - history.poison - set(counts), "in the log, and without an effect"),
        ("I1", (wanted & history.poison) - history.dead, "poison, and not in the dead letter topic"),
        ("I6", {number for number, count in counts.items() if count > 1}, "with more than one effect"),
        ("stranger", set(counts) - (wanted - history.poison), "with an effect that nobody has ordered"),
        ("stranger", history.dead - history.poison, "in the dead letter topic, and not poison"),
    ):
        if wrong:
            yield Violation(name, f"{len(wrong)} {what}, such as {sorted(wrong)[:5]}")
    known = [number for number in effects if number in keys and number not in history.late]
    yield from _in_order([(keys[number], number) for number in known], "effect")


def _outputs(history: OutboxHistory, outputs: list[tuple[str, int]]) -> Iterator[Violation]:
    """Every record has exactly one output, in order per key."""
    wanted = Counter(record for record in history.log if record[1] not in history.poison)
    poison = Counter(record for record in history.log if record[1] in history.poison)
    for due, found, what in ((wanted, Counter(outputs), "outputs"), (poison, Counter(history.letters), "dead letters")):
        for name, wrong, more in (
            ("I1", due - found, f"records have no {what} of their own"),
            ("I6", Counter({record: n for record, n in (found - due).items() if record in due}), f"{what} are doubled"),
            (
                "stranger",
                Counter({record: n for record, n in found.items() if record not in due}),
                f"{what} of nothing",
            ),
        ):
            if wrong:
                yield Violation(name, f"{wrong.total()} {more}, such as {sorted(wrong)[:5]}")
    expected, kept = (_by_key(records, history.late | history.poison) for records in (history.log, outputs))
    for key, numbers in kept.items():
        if numbers != expected.get(key) and Counter(numbers) == Counter(expected.get(key)):
            yield Violation("I4", f"the outputs of key {key!r} are {numbers}, its records {expected[key]}")


def _by_key(records: Iterable[tuple[str, int]], left_out: set[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for key, number in records:
        if number not in left_out:
            found[key].append(number)
    return found


def _outcomes(sent: Sent) -> tuple[Outcome, ...] | None:
    return next((answer.outcomes for answer in sent.answers if answer.outcomes is not None), None)


def _refusal(sent: Sent) -> str:
    return next((answer.refusal for answer in sent.answers if answer.refusal), "")


def _attempts(sent: Sent) -> Iterator[_Attempt]:
    outcomes = _outcomes(sent)
    for index, message in enumerate(sent.messages):
        known = outcomes is not None and index < len(outcomes)
        yield _Attempt(sent, index, message, outcomes[index] if known else None)


# -- the answers by themselves


def _answers(history: History) -> Iterator[Violation]:
    for sent in history.sends:
        by_channel: dict[str, list[Answer]] = defaultdict(list)
        for answer in sent.answers:
            by_channel[answer.channel].append(answer)
        refusal = _refusal(sent)
        for channel, answers in by_channel.items():
            if len(answers) > 1:
                yield Violation("I2", f"batch {sent.number} was answered {len(answers)} times by its {channel}")
            if channel not in sent.channels and not (refusal and channel == "return"):
                yield Violation("I2", f"batch {sent.number} was answered by a {channel} it does not have")
        for channel in sorted(sent.channels - by_channel.keys()):
            if not (refusal and channel != CONTRACT):
                yield Violation("settled", f"batch {sent.number} was never answered by its {channel}")
        if refusal and CALLBACK in by_channel:
            yield Violation("I2", f"batch {sent.number} was refused ({refusal}), and its callback was called")
        yield from _agreement(sent)
        yield from _methods(sent)
        yield from _explanations(history, sent, refusal)


def _agreement(sent: Sent) -> Iterator[Violation]:
    told = [answer for answer in sent.answers if answer.outcomes is not None]
    for answer in told:
        assert answer.outcomes is not None
        if len(answer.outcomes) != len(sent.messages):
            yield Violation("I2", f"batch {sent.number} of {len(sent.messages)} has {len(answer.outcomes)} outcomes")
        if answer.outcomes != told[0].outcomes:
            yield Violation("I2", f"batch {sent.number}: {answer.channel} and {told[0].channel} differ")
        strange = {outcome.state for outcome in answer.outcomes} - {ACKED, FAILED, EXPIRED}
        if strange:
            yield Violation("I2", f"batch {sent.number} has envelopes that are {', '.join(sorted(strange))}")


def _methods(sent: Sent) -> Iterator[Violation]:
    for answer in sent.answers:
        if answer.channel != CONTRACT or answer.outcomes is None:
            continue
        codes = {outcome.code for outcome in answer.outcomes if outcome.state == FAILED}
        if answer.refusal:
            due = "mark_serialization_failure" if answer.refusal == "SerializationError" else "mark_processing_failure"
        elif not codes:
            due = "mark_successful"
        elif codes <= UNKNOWN_TOPICS:
            due = "mark_topic_does_not_exist"
        elif codes <= TIMEOUTS:
            due = "mark_timed_out"
        else:
            due = "mark_processing_failure"
        if answer.method != due:
            yield Violation("I2", f"batch {sent.number} was answered by {answer.method}, not by {due}")


def _explanations(history: History, sent: Sent, refusal: str) -> Iterator[Violation]:
    allowed = history.rules.refusals
    if sent.spoilt:
        allowed = allowed | {sent.spoilt}
        if sent.answers and not refusal:
            yield Violation("unexplained", f"batch {sent.number} asks for {sent.spoilt} and was not refused")
    if refusal and refusal not in allowed:
        yield Violation("unexplained", f"batch {sent.number} was refused: {refusal}")
    if refusal:
        return
    for attempt in _attempts(sent):
        outcome = attempt.outcome
        if outcome is None or outcome.state != FAILED:
            continue
        if outcome.code not in history.rules.codes:
            yield Violation("unexplained", f"{attempt.name} failed with {outcome.code}")
            break
        if outcome.retriable and outcome.code in PERMANENT:
            yield Violation("unexplained", f"{attempt.name} failed with {outcome.code}, which is said to be retriable")
            break


def _raised(history: History, attempts: dict[str, _Attempt]) -> Iterator[Violation]:
    for token, count in history.raised.items():
        attempt = attempts.get(token)
        if attempt is None:
            yield Violation("silent", f"token {token!r} was never sent, and is raised")
        elif not isinstance(attempt.sent, Sent) or not attempt.sent.untold:
            yield Violation("silent", f"{attempt.name} was told already, and is raised")
        elif attempt.outcome is not None and attempt.outcome.state != FAILED:
            yield Violation("silent", f"{attempt.name} has not failed, and is raised: {attempt.outcome}")
        if count > 1:
            yield Violation("silent", f"token {token!r} is raised {count} times")


# -- the answers against the log


def _strangers(topic: str, records: list[Read], attempts: dict[str, _Attempt]) -> Iterator[Violation]:
    for record in records:
        attempt = attempts.get(record.token)
        where = f"{topic}[{record.partition}] at {record.offset}"
        if attempt is None:
            yield Violation("stranger", f"{where}: token {record.token!r} was never sent")
        elif attempt.sent.topic != topic:
            yield Violation("stranger", f"{where}: {attempt.name} was sent to {attempt.sent.topic}")
        elif (record.key, record.value) != (attempt.message.key, attempt.message.value):
            yield Violation("I1", f"{where}: {attempt.name} has another key or value than was handed in")
        elif record.id is not None and record.id != attempt.message.id:
            yield Violation("I1", f"{where}: {attempt.name} has another id than was handed in")


def _places(history: History) -> dict[str, list[tuple[int, int]]]:
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for records in history.logs.values():
        for record in records:
            places[record.token].append((record.partition, record.offset))
    return places


def _acknowledged(history: History, attempts: dict[str, _Attempt]) -> Iterator[Violation]:
    places = _places(history)
    for token, attempt in attempts.items():
        outcome = attempt.outcome
        if outcome is None or outcome.state != ACKED or attempt.sent.topic in history.deleted:
            continue
        found = places.get(token, [])
        if not found:
            yield Violation("I1", f"{attempt.name} was acknowledged and is not in the log")
        elif outcome.offset >= 0 and (outcome.partition, outcome.offset) not in found:
            told = (outcome.partition, outcome.offset)
            yield Violation("I1", f"{attempt.name} was acknowledged at {told} and is at {found}")


def _not_sent(history: History, attempts: dict[str, _Attempt]) -> Iterator[Violation]:
    places = _places(history)
    for token, attempt in attempts.items():
        if token not in places:
            continue
        outcome = attempt.outcome
        refusal = _refusal(attempt.sent)
        if refusal:
            yield Violation("not-sent", f"{attempt.name} was refused ({refusal}) and is in the log")
        elif outcome is None or outcome.state == ACKED:
            continue
        elif outcome.state == EXPIRED:
            yield Violation("not-sent", f"{attempt.name} had expired and is in the log")
        elif outcome.state == FAILED and not outcome.possibly_persisted:
            yield Violation("not-sent", f"{attempt.name} failed ({outcome.code}), not persisted, and is in the log")


def _copies(history: History, attempts: dict[str, _Attempt]) -> Iterator[Violation]:
    places = _places(history)
    if not history.rules.copies:
        for token, found in places.items():
            if len(found) > 1 and token in attempts:
                yield Violation("I6", f"{attempts[token].name} is in the log {len(found)} times: {found}")
    certain = Counter(
        attempt.message.id
        for token, attempt in attempts.items()
        if token in places and attempt.outcome is not None and not attempt.outcome.possibly_persisted
    )
    for id, count in certain.items():
        if count > 1:
            yield Violation("I6", f"id {id} is in the log {count} times, each acknowledged")


def _order(history: History, attempts: dict[str, _Attempt]) -> Iterator[Violation]:
    failed = {
        (attempt.sent.instance, attempt.sent.topic, attempt.outcome.partition)
        for attempt in attempts.values()
        if attempt.outcome is not None and attempt.outcome.state == FAILED
    }
    # What is raised as undelivered does not say where it went.
    anywhere = {
        (attempt.sent.instance, attempt.sent.topic)
        for attempt in attempts.values()
        if isinstance(attempt.sent, Sent) and attempt.sent.untold and attempt.message.token in history.raised
    }
    for topic, records in history.logs.items():
        if topic in history.deleted:
            continue
        # Of each producer and partition: the latest batch begun so far, and of each batch the last index.
        latest: dict[tuple[int, int], _Attempt] = {}
        last: dict[tuple[int, int], _Attempt] = {}
        seen: set[str] = set()
        for record in sorted(records, key=lambda record: (record.partition, record.offset)):
            attempt = attempts.get(record.token)
            if attempt is None or record.token in seen:  # only a first copy has an order
                continue
            seen.add(record.token)
            sent = attempt.sent
            place = (sent.instance, record.partition)
            if (sent.instance, topic, record.partition) in failed or (sent.instance, topic) in anywhere:
                continue
            before = last.get((sent.number, record.partition))
            if before is not None and before.index > attempt.index:
                yield Violation("I4", f"{attempt.name} comes after envelope {before.index} of the same batch")
            last[sent.number, record.partition] = attempt
            newest = latest.get(place)
            if newest is None or sent.began > newest.sent.began:
                latest[place] = attempt
            elif sent.handed_in is not None and sent.handed_in < newest.sent.began:
                yield Violation("I4", f"{attempt.name} comes after {newest.name}, which was sent later")


# -- batched senders

# What fails because no broker answers is no reason to give up.
OUTAGES = frozenset((-195, -192, -187, -185, -166, -152, -151, -150, 45))
# Of what is in flight when a sender is closed nothing is known.
GIVEN_UP = -185
TOO_OFTEN = frozenset((-197, -190, -188, 3, 100))
# What a broker that refuses a record tells of its whole record batch.
WHOLE = frozenset((10, 32, 87, -138))


def _stream(history: History, stream: Stream, streamed: dict[str, _Attempt]) -> Iterator[Violation]:
    if stream.not_sent is None:
        yield Violation("settled", f"the sender of step {stream.number} was not closed")
        return
    places = _places(history)
    told = Counter(token for token, _ in stream.told)
    if stream.death and "ProducerClosedError" not in history.rules.refusals:
        yield Violation("unexplained", f"the sender of step {stream.number} ended: {stream.death}")
    if stream.left or stream.not_sent > len(stream.told):
        yield Violation("settled", f"sender of step {stream.number}: {stream.left} left, {stream.not_sent} not sent")
    if stream.opened and not history.rules.outage:
        yield Violation("outage", f"the circuit of step {stream.number} opened {stream.opened} times")
    if stream.most > stream.bound:
        yield Violation("bounded", f"the sender of step {stream.number} held {stream.most}, not {stream.bound}")
    expired = 0
    for message in stream.taken:
        name = streamed[message.token].name
        attempts = stream.attempts.get(message.token, [])
        acked = [outcome for outcome in attempts if outcome.state == ACKED]
        expired += any(outcome.state == EXPIRED for outcome in attempts)
        outcomes = told[message.token] + sum(outcome.state != FAILED for outcome in attempts)
        if outcomes != 1:
            yield Violation("I2", f"{name} has {outcomes} outcomes: told {told[message.token]} times, {attempts}")
        if any(outcome.state != FAILED for outcome in attempts[:-1]):
            yield Violation("I6", f"{name} was sent again after its end: {attempts}")
        if message.token in stream.expired and acked:
            yield Violation("I2", f"{name} had expired, and is acknowledged")
        if stream.topic in history.deleted:
            continue
        found = places.get(message.token, [])
        perhaps = sum(outcome.possibly_persisted for outcome in attempts) + ((message.token, GIVEN_UP) in stream.told)
        if acked and not found:
            yield Violation("I1", f"{name} was acknowledged and is not in the log")
        elif acked and acked[0].offset >= 0 and (acked[0].partition, acked[0].offset) not in found:
            yield Violation("I1", f"{name} was acknowledged at {acked[0]} and is at {found}")
        if found and not acked and not perhaps:
            yield Violation("not-sent", f"{name} was neither acknowledged nor perhaps stored, and is in the log")
        if len(found) > len(acked) + perhaps and not history.rules.copies:
            yield Violation("I6", f"{name} is at {found}, after {attempts}")
    counted = {"acked": 0, "expired": expired, "failed": len(stream.told), "accepted": len(stream.taken)}
    counted["acked"] = len(stream.taken) - expired - len(stream.told)
    if any(stream.stats[name] != count for name, count in counted.items()):
        yield Violation("I2", f"the sender of step {stream.number} counts {stream.stats}, but it is {counted}")
    yield from _given_up(history, stream, streamed)
    if stream.topic not in history.deleted:
        yield from _stream_order(history, stream, streamed)


def _given_up(history: History, stream: Stream, streamed: dict[str, _Attempt]) -> Iterator[Violation]:
    given_up = bool(stream.death or stream.hopeless)
    codes = history.rules.codes | {GIVEN_UP} if given_up else history.rules.codes
    for token, reason in stream.told:
        if token not in streamed:
            yield Violation("stranger", f"on_failed of step {stream.number} was told of {token}")
        elif history.rules.single and reason in WHOLE:
            if token not in stream.guilty:
                yield Violation("innocent", f"{streamed[token].name} was given up with {reason}")
        elif token in stream.unmappable:
            if reason != "SerializationError" and not given_up:
                yield Violation("unexplained", f"{streamed[token].name} cannot be mapped, but is told {reason}")
        elif isinstance(reason, str):
            if reason != "SenderClosedError" or not given_up:
                yield Violation("unexplained", f"{streamed[token].name} was given up: {reason}")
        elif reason not in codes or (reason in OUTAGES and not given_up):
            yield Violation("unexplained", f"{streamed[token].name} was given up: {reason}")
        elif reason in TOO_OFTEN and not given_up and len(stream.attempts[token]) < stream.stats["max_attempts"]:
            yield Violation("unexplained", f"{streamed[token].name} was given up too early: {stream.attempts[token]}")


def _stream_order(history: History, stream: Stream, streamed: dict[str, _Attempt]) -> Iterator[Violation]:
    if not stream.strict and (stream.stats["retried"] or not history.rules.ordered):
        return
    latest: dict[str, _Attempt] = {}
    seen: set[str] = set()
    for record in sorted(history.logs.get(stream.topic, ()), key=lambda record: (record.partition, record.offset)):
        attempt = streamed.get(record.token)
        if attempt is None or attempt.sent is not stream or record.token in seen:
            continue
        seen.add(record.token)
        group = stream.groups.get(record.token, "")
        before = latest.get(group)
        if group and before is not None and before.index > attempt.index:
            yield Violation("I4", f"{attempt.name} comes after {before.name}, which was sent later")
        latest[group] = attempt


# -- the end


def _leftovers(history: History) -> Iterator[Violation]:
    if history.pinned_buffers:
        yield Violation("I5", f"{history.pinned_buffers} batches still pin their buffers")
    if history.live_batches:
        yield Violation("I5", f"{history.live_batches} batches are still alive")
    if history.live_threads:
        yield Violation("I5", f"threads are still alive: {', '.join(history.live_threads)}")


def _recovered(history: History) -> Iterator[Violation]:
    probes = [sent for sent in history.sends if sent.probe]
    if probes and not any(
        outcomes is not None and all(outcome.state == ACKED for outcome in outcomes)
        for outcomes in map(_outcomes, probes)
    ):
        yield Violation("recovered", f"none of {len(probes)} batches was acknowledged when the faults were over")
