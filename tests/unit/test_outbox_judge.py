"""What an answer means for each row of a flight: deleted, moved, or left where it is."""

from typing import Any

import pytest

from kbatch import DeliveryError, DeserializationError, RetryPolicy
from kbatch._outbox._flight import Judge, RowFlight

SOON = RetryPolicy(max_attempts=3, initial_backoff_s=1.0, max_backoff_s=8.0, jitter=0.0)

TIMED_OUT, TRANSPORT, FATAL, CLUSTER = -192, -195, -150, 31
UNKNOWN_TOPIC, NOT_ALLOWED, TOO_LARGE, INVALID_RECORD = 3, 29, 10, 87


class Report:
    def __init__(self, count: int, errors: dict[int, Any], expired: int) -> None:
        self.errors, self.failed, self.expired = errors, len(errors), expired
        self.acked = count - expired - self.failed


def flight(count: int, codes: dict[int, int], *, expired: int = 0, **options: Any) -> RowFlight:
    errors = {index: DeliveryError(code, possibly_persisted=False) for index, code in codes.items()}
    made = RowFlight([(0, n + 1) for n in range(count)], [b"%d" % n for n in range(count)], None, {0: 1}, **options)
    made.pending = type("Pending", (), {"report": Report(count, errors, expired)})()
    return made


def judge(policy: RetryPolicy = SOON) -> Judge:
    return Judge(policy, lambda packed: int(packed), lambda: 0.0)


def test_what_is_acknowledged_or_has_expired_is_done() -> None:
    answers = judge().answers(flight(3, {}, expired=1))
    assert (answers.done, answers.failures, answers.unsent) == ([(0, 1), (0, 2), (0, 3)], [], [])
    assert (answers.verdict, answers.acked, answers.expired) == ("succeeded", 2, 1)
    assert judge().answers(flight(2, {}, expired=2)).verdict == "nothing"


@pytest.mark.parametrize("code", [TIMED_OUT, TRANSPORT, FATAL, CLUSTER])
def test_an_outage_leaves_rows_where_they_are(code: int) -> None:
    mine = judge()
    for _ in range(3):
        answers = mine.answers(flight(2, {0: code, 1: code}))
        assert (answers.done, answers.failures, answers.unsent) == ([], [], [(0, 1), (0, 2)])
        assert answers.verdict == "failed"
        assert sum(answers.moved.values()) == 0


def test_what_times_out_again_beside_what_is_acknowledged_is_put_off_without_an_attempt() -> None:
    mine = judge()
    assert mine.answers(flight(2, {0: TIMED_OUT})).unsent == [(0, 1)]
    answers = mine.answers(flight(2, {0: TIMED_OUT}))
    (failure,) = answers.failures
    assert (failure.seq, failure.due_in_s, failure.attempts, failure.key_hash) == (1, 1.0, 0, 0)
    assert answers.moved == {"refused": 0, "put_off": 1, "dead": 0}
    assert answers.verdict == "succeeded"


def test_what_has_timed_out_and_was_acknowledged_then_begins_anew() -> None:
    mine = judge()
    mine.answers(flight(2, {0: TIMED_OUT}))
    mine.answers(flight(2, {}))
    assert mine.answers(flight(2, {0: TIMED_OUT})).unsent == [(0, 1)]
    mine.forget()
    assert mine.answers(flight(2, {0: TIMED_OUT})).unsent == [(0, 1)]


def test_a_trial_that_times_out_again_is_put_off() -> None:
    mine = judge()
    mine.answers(flight(1, {0: TIMED_OUT}))
    answers = mine.answers(flight(1, {0: TIMED_OUT}, trial=object()))
    assert ([failure.due_in_s for failure in answers.failures], answers.verdict) == ([1.0], "failed")


@pytest.mark.parametrize("code", [UNKNOWN_TOPIC, NOT_ALLOWED])
def test_a_refusal_counts_an_attempt_until_the_last(code: int) -> None:
    mine = judge()
    seen = [mine.answers(flight(1, {0: code})).failures[0]]
    seen += [mine.answers(flight(1, {0: code}, is_due=True, attempts=[n])).failures[0] for n in (1, 2)]
    assert [(each.attempts, each.due_in_s) for each in seen] == [(1, 1.0), (2, 2.0), (3, None)]


def test_without_a_limit_it_goes_on() -> None:
    mine = judge(RetryPolicy(max_attempts=None, initial_backoff_s=1.0, max_backoff_s=8.0, jitter=0.0))
    answers = mine.answers(flight(1, {0: NOT_ALLOWED}, is_due=True, attempts=[100]))
    assert answers.failures[0].due_in_s == 8.0


@pytest.mark.parametrize("code", [TOO_LARGE, INVALID_RECORD])
def test_what_may_have_been_refused_for_another_record_is_sent_alone_before_it_is_dead(code: int) -> None:
    mine = judge()
    first = mine.answers(flight(2, {0: code, 1: code}))
    assert [(each.due_in_s, each.attempts) for each in first.failures] == [(0.0, 0), (0.0, 0)]
    assert (first.moved["put_off"], first.verdict) == (2, "nothing")
    alone = mine.answers(flight(1, {0: code}, is_due=True, attempts=[0]))
    assert [(each.due_in_s, each.attempts) for each in alone.failures] == [(None, 1)]
    assert alone.moved["dead"] == 1


def test_what_cannot_be_read_is_dead_at_once() -> None:
    damaged = flight(2, {1: -161})
    damaged.packed[1] = b"damaged"
    reason = DeserializationError("damaged", topic=None, partition=None, offset=None, header=None)
    damaged.rejected.append((1, reason))
    (failure,) = judge().answers(damaged).failures
    assert (failure.due_in_s, failure.key_hash, "damaged" in failure.error) == (None, None, True)


def test_what_cannot_be_read_says_nothing_about_the_brokers() -> None:
    damaged = flight(1, {0: -161})
    damaged.packed[0] = b"damaged"
    reason = DeserializationError("damaged", topic=None, partition=None, offset=None, header=None)
    damaged.rejected.append((0, reason))
    answers = judge().answers(damaged)
    assert (answers.moved["dead"], answers.verdict) == (1, "nothing")


@pytest.mark.parametrize("code", [TIMED_OUT, TRANSPORT, CLUSTER])
def test_what_was_due_and_is_not_answered_is_due_again_later_without_an_attempt(code: int) -> None:
    (failure,) = judge().answers(flight(1, {0: code}, is_due=True, attempts=[2])).failures
    assert (failure.due_in_s, failure.attempts) == (2.0, 2)


def test_what_is_due_counts_against_brokers_only_as_the_trial() -> None:
    assert judge().answers(flight(1, {0: TIMED_OUT}, is_due=True, attempts=[1])).verdict == "nothing"
    assert judge().answers(flight(1, {0: TIMED_OUT}, is_due=True, attempts=[1], trial=object())).verdict == "failed"
