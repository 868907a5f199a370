"""The checker against histories made by hand: a sound one, and for each invariant ones that break it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.checker import check, check_outbox
from tests.faults.history import (
    ACKED,
    CALLBACK,
    CONTRACT,
    EXPIRED,
    FAILED,
    RETURN,
    Answer,
    History,
    Message,
    OutboxHistory,
    Outcome,
    Read,
    Rules,
    Sent,
    Stream,
    seen,
)

TOPIC = "t"
TIMED_OUT = -192


def message(token: str, id: str | None = None) -> Message:
    return Message(token, id or f"id of {token}", b"key", f"body of {token}".encode())


def record(offset: int, message: Message, partition: int = 0) -> Read:
    return Read(partition, offset, message.token, message.id, message.key, message.value)


def acked(offset: int, partition: int = 0) -> Outcome:
    return Outcome(ACKED, partition=partition, offset=offset)


def sound() -> History:
    """Three batches of one producer, in three ways; the third failed in part, and one of it had expired."""
    first = [message("a0"), message("a1")]
    second = [message("b0"), message("b1")]
    third = [message("c0"), message("c1"), message("c2"), message("c3")]
    return History(
        Rules(codes=frozenset((TIMED_OUT,)), refusals=frozenset(("ProducerClosedError",))),
        sends=[
            Sent(
                0,
                TOPIC,
                tuple(first),
                frozenset((RETURN,)),
                began=0,
                handed_in=1,
                answers=[Answer(RETURN, (acked(0), acked(1)))],
            ),
            Sent(
                1,
                TOPIC,
                tuple(second),
                frozenset((RETURN, CALLBACK)),
                began=2,
                handed_in=3,
                answers=[Answer(channel, (acked(2), acked(-1))) for channel in (CALLBACK, RETURN)],
            ),
            Sent(
                2,
                TOPIC,
                tuple(third),
                frozenset((CONTRACT,)),
                began=4,
                handed_in=5,
                answers=[
                    Answer(
                        CONTRACT,
                        (
                            acked(0, 1),
                            Outcome(FAILED, TIMED_OUT, possibly_persisted=True, retriable=True, partition=1),
                            Outcome(FAILED, TIMED_OUT, retriable=True),
                            Outcome(EXPIRED),
                        ),
                        "mark_timed_out",
                    )
                ],
            ),
            Sent(
                3,
                TOPIC,
                (message("d0"),),
                frozenset((CONTRACT,)),
                began=6,
                handed_in=7,
                answers=[
                    Answer(CONTRACT, (Outcome(FAILED, -161),), "mark_serialization_failure", "SerializationError")
                ],
                spoilt="SerializationError",
            ),
            Sent(
                4,
                TOPIC,
                (message("e0"),),
                frozenset((RETURN, CALLBACK)),
                began=8,
                handed_in=9,
                answers=[Answer(RETURN, None, refusal="ProducerClosedError")],
            ),
            Sent(
                5,
                TOPIC,
                (message("f0"),),
                frozenset((RETURN,)),
                began=10,
                handed_in=11,
                answers=[Answer(RETURN, (acked(4),))],
                probe=True,
            ),
        ],
        logs={
            TOPIC: [
                *(record(offset, m) for offset, m in enumerate([*first, *second, message("f0")])),
                record(0, third[0], 1),
                record(1, third[1], 1),
            ]
        },
    )


def change_record(history: History, index: int, **fields: object) -> None:
    log = history.logs[TOPIC]
    log[index] = log[index]._replace(**fields)


def change_outcome(history: History, batch: int, index: int, outcome: Outcome) -> None:
    sent = history.sends[batch]
    for i, answer in enumerate(sent.answers):
        assert answer.outcomes is not None
        outcomes = (*answer.outcomes[:index], outcome, *answer.outcomes[index + 1 :])
        sent.answers[i] = answer._replace(outcomes=outcomes)


def change_answer(history: History, batch: int, **fields: object) -> None:
    sent = history.sends[batch]
    sent.answers[0] = sent.answers[0]._replace(**fields)


def swap(history: History, one: int, other: int) -> None:
    """Two records change places, and what was told of them with them."""
    log = history.logs[TOPIC]
    first, second = log[one], log[other]
    log[one] = second._replace(offset=first.offset)
    log[other] = first._replace(offset=second.offset)
    moved = {first.token: second.offset, second.token: first.offset}
    for sent in history.sends:
        for i, m in enumerate(sent.messages):
            outcomes = sent.answers[0].outcomes
            if m.token in moved and outcomes is not None and outcomes[i].offset >= 0:
                change_outcome(history, sent.number, i, outcomes[i]._replace(offset=moved[m.token]))


def send_again(history: History, *, possibly_persisted: bool) -> None:
    """An id that is in the log already is sent again, and stored a second time."""
    again = message("x0", id="id of c1")
    change_outcome(
        history, 2, 1, Outcome(FAILED if possibly_persisted else ACKED, TIMED_OUT, possibly_persisted, partition=1)
    )
    history.sends.append(
        Sent(6, TOPIC, (again,), frozenset((RETURN,)), 0, 12, 13, [Answer(RETURN, (acked(5),))]),
    )
    history.logs[TOPIC].append(record(5, again))


def test_a_sound_history() -> None:
    assert check(sound()) == []
    assert seen(sound()) == {
        "acked": 6,
        "failed": 2,
        "expired": 1,
        "failed with -192": 1,
        "failed with -192, perhaps stored": 1,
        "SerializationError": 1,
        "ProducerClosedError": 1,
    }


Break = Callable[[History], object]
BREAKS: dict[str, tuple[str, Break]] = {
    "acknowledged, not in the log": ("I1", lambda h: h.logs[TOPIC].pop(1)),
    "acknowledged without an offset, not in the log": ("I1", lambda h: h.logs[TOPIC].pop(3)),
    "another value": ("I1", lambda h: change_record(h, 0, value=b"!!!!!!!!!!")),
    "no value": ("I1", lambda h: change_record(h, 0, value=None)),
    "another key": ("I1", lambda h: change_record(h, 1, key=b"other")),
    "another id": ("I1", lambda h: change_record(h, 1, id="other")),
    "acknowledged elsewhere": ("I1", lambda h: change_outcome(h, 0, 1, acked(7))),
    "acknowledged in another partition": ("I1", lambda h: change_outcome(h, 0, 1, acked(1, partition=1))),
    "two callbacks": ("I2", lambda h: h.sends[1].answers.append(h.sends[1].answers[0])),
    "two contract callbacks": ("I2", lambda h: h.sends[2].answers.append(h.sends[2].answers[0])),
    "the callback of another way": ("I2", lambda h: h.sends[0].answers.append(Answer(CALLBACK, (acked(0), acked(1))))),
    "answers differ": ("I2", lambda h: change_answer(h, 1, outcomes=(acked(2), Outcome(FAILED, TIMED_OUT, True)))),
    "an outcome is missing": ("I2", lambda h: change_answer(h, 0, outcomes=(acked(0),))),
    "an outcome too many": ("I2", lambda h: change_answer(h, 0, outcomes=(acked(0), acked(1), acked(2)))),
    "no outcome": ("I2", lambda h: change_outcome(h, 0, 0, Outcome("none"))),
    "the wrong method": ("I2", lambda h: change_answer(h, 2, method="mark_processing_failure")),
    "success that is none": ("I2", lambda h: change_answer(h, 2, method="mark_successful")),
    "the wrong refusal": ("I2", lambda h: change_answer(h, 3, method="mark_processing_failure")),
    "refused and called back": ("I2", lambda h: h.sends[4].answers.append(Answer(CALLBACK, (Outcome(FAILED),)))),
    "no answer": ("settled", lambda h: h.sends[0].answers.clear()),
    "no callback": ("settled", lambda h: h.sends[1].answers.pop(0)),
    "no contract callback": ("settled", lambda h: h.sends[2].answers.clear()),
    "a refused batch without its contract callback": (
        "settled",
        lambda h: change_answer(h, 3, channel=RETURN, outcomes=None),
    ),
    "order within a batch": ("I4", lambda h: swap(h, 0, 1)),
    "order of batches": ("I4", lambda h: swap(h, 1, 4)),
    "pinned buffers": ("I5", lambda h: setattr(h, "pinned_buffers", 1)),
    "live batches": ("I5", lambda h: setattr(h, "live_batches", 2)),
    "live threads": ("I5", lambda h: setattr(h, "live_threads", ("kbatch-dispatcher",))),
    "stored twice": ("I6", lambda h: h.logs[TOPIC].append(h.logs[TOPIC][0]._replace(offset=5))),
    "sent again although it was acknowledged": ("I6", lambda h: send_again(h, possibly_persisted=False)),
    "not persisted, and in the log": ("not-sent", lambda h: h.logs[TOPIC].append(record(2, message("c2"), 1))),
    "expired, and in the log": ("not-sent", lambda h: h.logs[TOPIC].append(record(2, message("c3"), 1))),
    "not serializable, and in the log": ("not-sent", lambda h: h.logs[TOPIC].append(record(0, message("d0"), 2))),
    "refused, and in the log": ("not-sent", lambda h: h.logs[TOPIC].append(record(0, message("e0"), 2))),
    "never sent": ("stranger", lambda h: h.logs[TOPIC].append(record(5, message("of the child")))),
    "sent to another topic": ("stranger", lambda h: h.logs.update({"other": [h.logs[TOPIC].pop(6)]})),
    "a failure without a reason": ("unexplained", lambda h: setattr(h.rules, "codes", frozenset())),
    "a refusal without a reason": ("unexplained", lambda h: setattr(h.rules, "refusals", frozenset())),
    "spoilt, and taken": ("unexplained", lambda h: setattr(h.sends[0], "spoilt", "SerializationError")),
    "for good, and called retriable": (
        "unexplained",
        lambda h: (
            setattr(h.rules, "codes", frozenset((TIMED_OUT, 29))),
            change_outcome(h, 2, 2, Outcome(FAILED, 29, retriable=True)),
            change_answer(h, 2, method="mark_processing_failure"),
        ),
    ),
    "no recovery": (
        "recovered",
        lambda h: (
            change_outcome(h, 5, 0, Outcome(FAILED, TIMED_OUT, possibly_persisted=True)),
            change_record(h, 4, offset=4),
        ),
    ),
    "what the runner saw": ("runner", lambda h: h.findings.append("a forked child that sends hangs")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_history(name: str) -> None:
    invariant, spoil = BREAKS[name]
    history = sound()
    spoil(history)
    violations = check(history)
    assert {violation.invariant for violation in violations} == {invariant}, "\n".join(map(str, violations))


def test_each_invariant_is_broken_here() -> None:
    assert {invariant for invariant, _ in BREAKS.values()} == {
        *("I1", "I2", "I4", "I5", "I6", "settled", "not-sent", "stranger", "unexplained", "recovered", "runner")
    }


def test_copies_are_excused_where_acknowledgements_are_lost() -> None:
    history = sound()
    history.logs[TOPIC].append(history.logs[TOPIC][0]._replace(offset=5))
    history.rules.copies = True
    assert check(history) == []


def test_an_id_may_be_stored_twice_if_it_was_possibly_persisted() -> None:
    history = sound()
    send_again(history, possibly_persisted=True)
    assert check(history) == []


def test_the_order_is_excused_in_a_partition_in_which_a_message_failed() -> None:
    history = sound()
    swap(history, 1, 4)
    change_outcome(history, 2, 2, Outcome(FAILED, TIMED_OUT, partition=0))
    assert check(history) == []


def test_the_order_is_excused_between_producers_and_without_idempotence() -> None:
    history = sound()
    swap(history, 3, 4)
    history.sends[5] = replace(history.sends[5], instance=1)
    assert check(history) == []
    history = sound()
    swap(history, 0, 1)
    history.rules.ordered = False
    assert check(history) == []


def test_batches_of_two_threads_have_no_order() -> None:
    history = sound()
    swap(history, 3, 4)
    history.sends[1].handed_in = 20  # still being handed in when the last one began
    assert check(history) == []


def test_what_was_acknowledged_in_a_deleted_topic_is_gone() -> None:
    history = sound()
    history.logs[TOPIC].clear()
    assert {violation.invariant for violation in check(history)} == {"I1"}
    history.deleted.add(TOPIC)
    assert check(history) == []


def test_what_is_raised_has_failed_and_was_told_to_nobody() -> None:
    history = sound()
    history.sends[2].answers[0] = history.sends[2].answers[0]._replace(channel=RETURN)
    outcomes = zip(history.sends[2].messages, history.sends[2].answers[0].outcomes or (), strict=False)
    failed = [message.token for message, outcome in outcomes if outcome.state == FAILED]
    assert failed
    history.sends[2].channels = frozenset((RETURN,))
    history.raised.update(failed)
    assert {violation.invariant for violation in check(history)} == {"silent"}
    history.sends[2].untold = True
    assert check(history) == []
    for wrong in ("a0", "c0", "another", *failed):
        history.raised[wrong] += 1
        assert {violation.invariant for violation in check(history)} == {"silent"}
        history.raised[wrong] -= 1
        history.raised += Counter()


# -- batched senders


def sound_stream() -> History:
    """A sender that is healthy but for one envelope that failed once, one refused for good and one that had expired."""
    taken = [message(f"s{n}") for n in range(5)]
    timed_out = Outcome(FAILED, TIMED_OUT, possibly_persisted=True, retriable=True)
    stream = Stream(
        7,
        TOPIC,
        strict=True,
        taken=taken,
        groups=dict.fromkeys((m.token for m in taken), "key"),
        expired={"s4"},
        attempts={
            "s0": [acked(0)],
            "s1": [timed_out, acked(2)],
            "s2": [acked(3)],
            "s3": [Outcome(FAILED, 10)],
            "s4": [Outcome(EXPIRED)],
        },
        told=[("s3", 10)],
        most=3,
        bound=3,
        not_sent=0,
        stats={"accepted": 5, "acked": 3, "failed": 1, "expired": 1, "retried": 1, "max_attempts": 3},
    )
    log = [record(0, taken[0]), record(1, taken[1]), record(2, taken[1]), record(3, taken[2])]
    return History(Rules(codes=frozenset((TIMED_OUT, 10, -188))), streams=[stream], logs={TOPIC: log})


def test_a_sound_stream_violates_nothing() -> None:
    assert check(sound_stream()) == []
    assert seen(sound_stream())["one at a time"] == 5


def tell(token: str, reason: str | int) -> Callable[[History], None]:
    def told(history: History) -> None:
        history.streams[0].told.append((token, reason))

    return told


def attempt(token: str, *outcomes: Outcome) -> Callable[[History], None]:
    def attempted(history: History) -> None:
        history.streams[0].attempts[token] = list(outcomes)

    return attempted


def log(*tokens: str) -> Callable[[History], None]:
    def logged(history: History) -> None:
        history.logs[TOPIC] = [record(offset, message(token)) for offset, token in enumerate(tokens)]

    return logged


def stream(**fields: object) -> Callable[[History], None]:
    def change(history: History) -> None:
        history.streams[0] = replace(history.streams[0], **fields)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (log("s0", "s1", "s1"), "I1"),
        (log("s1", "s0", "s1", "s2"), "I1"),  # s0 is not where it was acknowledged
        (log("s2", "s1", "s0", "s2"), "I4"),
        (log("s0", "s1", "s1", "s2", "s2"), "I6"),
        (log("s0", "s1", "s1", "s2", "s3"), "not-sent"),
        (log("s0", "s1", "s1", "s2", "another"), "stranger"),
        (attempt("s0", acked(0), acked(0)), "I6"),
        (attempt("s2"), "I2"),
        (attempt("s4", acked(3)), "I2"),
        (tell("s3", 10), "I2"),
        (tell("s0", 10), "I2"),
        (tell("other", 10), "stranger"),
        (stream(told=[]), "I2"),
        (stream(told=[("s3", TIMED_OUT)]), "unexplained"),
        (stream(told=[("s3", 29)]), "unexplained"),
        (stream(told=[("s3", -188)]), "unexplained"),  # too early
        (stream(told=[("s3", "SenderClosedError")]), "unexplained"),
        (stream(unmappable={"s3"}), "unexplained"),
        (stream(death="ProducerClosedError()"), "unexplained"),
        (stream(not_sent=None), "settled"),
        (stream(not_sent=2), "settled"),
        (stream(left=1), "settled"),
        (stream(most=4), "bounded"),
    ],
)
def test_what_is_wrong_with_a_stream_is_found(change: Callable[[History], None], invariant: str) -> None:
    history = sound_stream()
    change(history)
    assert invariant in {violation.invariant for violation in check(history)}


def test_a_stream_is_excused() -> None:
    history = sound_stream()
    log("s0", "s2", "s1", "s2")(history)
    attempt("s1", Outcome(FAILED, TIMED_OUT), acked(2))(history)
    attempt("s2", Outcome(FAILED, TIMED_OUT, possibly_persisted=True), acked(3))(history)
    assert {violation.invariant for violation in check(history)} == {"I4"}
    stream(strict=False)(history)  # what was sent again may be overtaken
    assert check(history) == []
    log("s0", "s0", "s1", "s2")(history)
    assert {violation.invariant for violation in check(history)} == {"I6"}
    history.rules.copies = True
    assert check(history) == []


# -- outboxes


def outbox_history(**values: object) -> OutboxHistory:
    log = [("a", 1), ("a", 2), ("b", 3)]
    return OutboxHistory(**{"committed": {1, 2, 3}, "told": {1, 2}, "log": log, **values})  # type: ignore[arg-type]


DOUBLED: dict[str, object] = {
    "log": [("a", 1), ("a", 2), ("a", 1), ("a", 2), ("b", 3)],
    "unrecorded": Counter((1, 2)),
}


@pytest.mark.parametrize(
    ("values", "violated"),
    [
        ({}, []),
        ({"committed": {1, 2, 3, 4}}, ["I1"]),
        ({"told": {1, 4}, "possible": {4}}, ["I1"]),
        ({"told": {1, 4}, "committed": {1, 2, 3}, "log": [("a", 1), ("a", 2), ("b", 3), ("b", 4)]}, ["settled"]),
        ({"committed": {1, 2}}, ["stranger"]),
        ({"committed": {1, 2}, "possible": {3}}, []),
        ({"log": [("a", 2), ("a", 1), ("b", 3)]}, ["I4"]),
        ({"log": [("a", 1), ("a", 2), ("a", 1), ("b", 3)]}, ["I6"]),
        ({"log": [("a", 1), ("a", 2), ("a", 1), ("b", 3)], "relay_kills": 1, "unrecorded": Counter((1, 2))}, []),
        # It was acknowledged and deleted when the relay was killed.
        ({"log": [("a", 1), ("a", 2), ("a", 1), ("b", 3)], "relay_kills": 1, "unrecorded": Counter((2, 3))}, ["I6"]),
        # Once more than relays were killed while it was not recorded.
        ({"log": [("b", 3), *[("a", 1)] * 3, ("a", 2)], "relay_kills": 2, "unrecorded": Counter((1, 2, 1))}, []),
        ({"log": [("b", 3), *[("a", 1)] * 3, ("a", 2)], "relay_kills": 2, "unrecorded": Counter((1, 2))}, ["I6"]),
        ({"findings": ["hangs"]}, ["runner"]),
        ({"effects": [1, 3, 2]}, []),
        ({"effects": [1, 2]}, ["I1"]),
        ({"effects": [1, 2, 3, 1]}, ["I6", "I4"]),
        ({"effects": [2, 1, 3]}, ["I4"]),
        ({"effects": [2, 1, 3], "late": {1}}, []),
        ({"effects": [1, 2, 3, 4]}, ["stranger"]),
        ({"effects": [1, 2], "poison": {3}, "dead": {3}}, []),
        ({"effects": [1, 2], "poison": {3}}, ["I1"]),
        ({"effects": [1, 2, 3], "poison": {3}, "dead": {3}}, ["stranger"]),
        ({"effects": [1, 2], "dead": {3}}, ["I1", "stranger"]),
        ({"outputs": [("b", 3), ("a", 1), ("a", 2)]}, []),
        ({"outputs": [("b", 3), ("a", 1)]}, ["I1"]),
        ({"outputs": [("a", 1), ("a", 2), ("b", 3), ("a", 2)]}, ["I6"]),
        ({"outputs": [("a", 1), ("a", 2), ("b", 3), ("b", 4)]}, ["stranger"]),
        ({"outputs": [("a", 2), ("a", 1), ("b", 3)]}, ["I4"]),
        ({"outputs": [("a", 2), ("a", 1), ("b", 3)], "late": {1}}, []),
        ({"outputs": [("a", 1), ("a", 2)], "poison": {3}, "letters": [("b", 3)]}, []),
        ({"outputs": [("a", 1), ("a", 2)], "poison": {3}}, ["I1"]),
        ({"outputs": [("a", 1), ("a", 2)], "poison": {3}, "letters": [("b", 3), ("b", 3)]}, ["I6"]),
        ({"outputs": [("a", 1), ("a", 2), ("b", 3)], "letters": [("b", 3)]}, ["stranger"]),
        (
            {**DOUBLED, "outputs": [("a", 1), ("a", 2), ("a", 1), ("a", 2), ("b", 3)]},
            [],  # a copy is a record
        ),
        ({**DOUBLED, "outputs": [("a", 1), ("a", 1), ("a", 2), ("a", 2), ("b", 3)]}, ["I4"]),
        ({**DOUBLED, "outputs": [("a", 1), ("a", 2), ("b", 3)]}, ["I1"]),
    ],
)
def test_what_is_wrong_with_an_outbox_is_found(values: dict[str, object], violated: list[str]) -> None:
    assert [violation.invariant for violation in check_outbox(outbox_history(**values))] == violated
