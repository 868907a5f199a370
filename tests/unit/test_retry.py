"""When a failed envelope is sent again."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kbatch
from kbatch import RetryPolicy


def delays(policy: RetryPolicy, count: int, random: float = 0.0) -> list[float]:
    return [policy.delay_s(failures, lambda: random) for failures in range(1, count + 1)]


def test_each_delay_is_a_multiple_of_the_one_before_up_to_the_longest() -> None:
    policy = RetryPolicy(initial_backoff_s=0.25, max_backoff_s=10, multiplier=3)
    assert delays(policy, 6) == [0.25, 0.75, 2.25, 6.75, 10, 10]


def test_a_multiplier_of_1_waits_the_same_each_time() -> None:
    assert delays(RetryPolicy(initial_backoff_s=0.5, multiplier=1), 4) == [0.5] * 4


@pytest.mark.parametrize(
    ("jitter", "random", "delay_s"), [(0, 1, 8), (0.25, 1, 6), (0.5, 0.5, 6), (1, 0, 8), (1, 1, 0)]
)
def test_a_random_part_of_up_to_jitter_is_taken_off(jitter: float, random: float, delay_s: float) -> None:
    policy = RetryPolicy(initial_backoff_s=8, jitter=jitter)
    assert policy.delay_s(1, lambda: random) == delay_s
    # Off the longest one as well: else all that wait longest would come back at once.
    assert RetryPolicy(initial_backoff_s=1, max_backoff_s=8, jitter=jitter).delay_s(99, lambda: random) == delay_s


@pytest.mark.parametrize("multiplier", [1.001, 1.01, 1.05, 2, 2.0, 999_999, 999_999.0])
@pytest.mark.parametrize("longest_s", [10, 10.0, 999_999])
def test_the_longest_delay_is_reached_and_never_overflows(multiplier: float, longest_s: float) -> None:
    policy = RetryPolicy(initial_backoff_s=1e-3, max_backoff_s=longest_s, multiplier=multiplier)
    for failures in (50_000, 10**9, 10**400):
        assert policy.delay_s(failures, lambda: 0.0) == longest_s


numbers = st.floats(1e-6, 999_999, allow_nan=False) | st.integers(1, 999_999)


@given(
    backoffs=st.tuples(numbers, numbers).map(sorted),
    multiplier=st.floats(1, 999_999) | st.integers(1, 999_999),
    jitter=st.floats(0, 1),
    random=st.floats(0, 1),
    failures=st.integers(1, 10**6),
)
def test_delays_are_within_their_bounds(
    backoffs: list[float], multiplier: float, jitter: float, random: float, failures: int
) -> None:
    initial_s, longest_s = backoffs
    policy = RetryPolicy(initial_backoff_s=initial_s, max_backoff_s=longest_s, multiplier=multiplier, jitter=jitter)
    delay_s = policy.delay_s(failures, lambda: random)
    assert type(delay_s) is float
    assert initial_s * (1 - jitter) <= delay_s * (1 + 1e-9) + 1e-12
    assert delay_s <= longest_s
    whole = [policy.delay_s(n, lambda: 0.0) for n in (failures, failures + 1)]
    assert whole[0] <= whole[1]
    for before, after in itertools.pairwise(policy.delay_s(n, lambda: 0.0) for n in range(1, 8)):
        assert math.isclose(after, min(before * multiplier, longest_s), rel_tol=1e-9)


def test_it_is_a_value() -> None:
    assert RetryPolicy() == RetryPolicy(max_attempts=10)
    assert hash(RetryPolicy()) == hash(RetryPolicy())
    assert RetryPolicy() != RetryPolicy(max_attempts=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy().max_attempts = 3  # type: ignore[misc]
    with pytest.raises(kbatch.ConfigError, match="max_attempts"):
        dataclasses.replace(RetryPolicy(), max_attempts=0)


SECONDS = "must be seconds above 0"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_attempts": 0}, "max_attempts must be 1 or more, or None for no limit, not 0"),
    ({"max_attempts": -1}, "max_attempts must be 1 or more, or None for no limit, not -1"),
    ({"max_attempts": True}, "max_attempts must be 1 or more, or None for no limit, not True"),
    ({"max_attempts": 2.0}, "max_attempts must be 1 or more, or None for no limit, not 2.0"),
    ({"max_attempts": "3"}, "max_attempts must be 1 or more, or None for no limit, not '3'"),
    ({"max_age_s": 0}, f"max_age_s {SECONDS}, or None for no limit, not 0"),
    ({"max_age_s": -1.5}, f"max_age_s {SECONDS}, or None for no limit, not -1.5"),
    ({"max_age_s": math.nan}, f"max_age_s {SECONDS}, or None for no limit, not nan"),
    ({"max_age_s": False}, f"max_age_s {SECONDS}, or None for no limit, not False"),
    ({"max_age_s": "60"}, f"max_age_s {SECONDS}, or None for no limit, not '60'"),
    ({"initial_backoff_s": 0}, f"initial_backoff_s {SECONDS}, not 0"),
    ({"initial_backoff_s": math.nan}, f"initial_backoff_s {SECONDS}, not nan"),
    ({"initial_backoff_s": None}, f"initial_backoff_s {SECONDS}, not None"),
    ({"max_backoff_s": -1}, f"max_backoff_s {SECONDS}, not -1"),
    ({"max_backoff_s": True}, f"max_backoff_s {SECONDS}, not True"),
    ({"initial_backoff_s": 20}, "initial_backoff_s=20 is longer than max_backoff_s=10.0"),
    ({"max_backoff_s": 0.01}, "initial_backoff_s=0.1 is longer than max_backoff_s=0.01"),
    ({"multiplier": 0.5}, "multiplier must be 1 or more, not 0.5"),
    ({"multiplier": math.nan}, "multiplier must be 1 or more, not nan"),
    ({"multiplier": "2"}, "multiplier must be 1 or more, not '2'"),
    ({"multiplier": True}, "multiplier must be 1 or more, not True"),
    ({"jitter": -0.1}, "jitter must be from 0 to 1, not -0.1"),
    ({"jitter": 1.1}, "jitter must be from 0 to 1, not 1.1"),
    ({"jitter": math.nan}, "jitter must be from 0 to 1, not nan"),
    ({"jitter": None}, "jitter must be from 0 to 1, not None"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_what_is_wrong_is_said(options: dict[str, Any], text: str) -> None:
    with pytest.raises(kbatch.ConfigError) as caught:
        RetryPolicy(**options)
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["initial_backoff_s", "max_backoff_s", "multiplier"])
@pytest.mark.parametrize("value", [1e6, math.inf, 10**400])
def test_what_would_overflow_is_refused(name: str, value: Any) -> None:
    with pytest.raises(kbatch.ConfigError, match=name):
        RetryPolicy(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 1},
        {"max_attempts": None},
        {"max_attempts": 2**40},
        {"max_age_s": 1},
        {"max_age_s": math.inf},
        {"initial_backoff_s": 5, "max_backoff_s": 5},
        {"initial_backoff_s": 1e-9},
        {"max_backoff_s": 999_999},
        {"multiplier": 1},
        {"jitter": 0},
        {"jitter": 1},
    ],
    ids=str,
)
def test_what_is_right_is_taken(options: dict[str, Any]) -> None:
    policy = RetryPolicy(**options)
    assert {name: getattr(policy, name) for name in options} == options
