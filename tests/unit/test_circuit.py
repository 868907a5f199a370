"""The circuit breaker, without brokers and with a clock that the tests turn."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kbatch._fastmap import Trial
from kbatch._recovery._circuit import CircuitBreaker, CircuitState

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
NOW = 1000.0


def make(
    failures_to_open: int = 3, first_s: float = 1.0, longest_s: float = 30.0, random: float = 0.0
) -> CircuitBreaker:
    return CircuitBreaker(
        failures_to_open=failures_to_open,
        probe_interval_s=first_s,
        max_probe_interval_s=longest_s,
        random=lambda: random,
    )


def opened(**options: float) -> CircuitBreaker:
    circuit = make(failures_to_open=1, **options)
    circuit.failed(circuit.sent(), NOW)
    assert circuit.state is OPEN
    return circuit


def half_open(**options: float) -> CircuitBreaker:
    circuit = opened(**options)
    circuit.probe_started()
    circuit.probed(True, NOW)
    assert circuit.state is HALF_OPEN
    return circuit


# -- closed


def test_it_is_closed_at_first_and_any_number_of_batches_may_be_sent() -> None:
    circuit = make()
    for _ in range(10):
        assert circuit.may_send()
        assert not circuit.sent()
    assert circuit.state is CLOSED
    assert circuit.probe_at() is None


@pytest.mark.parametrize("failures_to_open", [1, 2, 7])
def test_so_many_failures_in_a_row_open_it(failures_to_open: int) -> None:
    circuit = make(failures_to_open)
    for failures in range(failures_to_open):
        assert (circuit.state, circuit.failures) == (CLOSED, failures)
        circuit.failed(circuit.sent(), NOW)
    assert circuit.state is OPEN
    assert not circuit.may_send()


def test_a_success_starts_the_count_again() -> None:
    circuit = make(3)
    for _ in range(5):
        circuit.failed(None, NOW)
        circuit.failed(None, NOW)
        circuit.succeeded(None, NOW)
        assert circuit.failures == 0
    assert circuit.state is CLOSED


def test_a_batch_that_says_nothing_neither_counts_nor_starts_the_count_again() -> None:
    circuit = make(2)
    circuit.failed(None, NOW)
    circuit.said_nothing(False)
    assert (circuit.state, circuit.failures) == (CLOSED, 1)
    circuit.failed(None, NOW)
    assert circuit.state is OPEN


# -- open


@pytest.mark.parametrize(("random", "after_s"), [(0.0, 4.0), (0.5, 3.0), (1.0, 2.0)])
def test_it_probes_after_the_interval_less_a_random_half(random: float, after_s: float) -> None:
    assert opened(first_s=4.0, random=random).probe_at() == NOW + after_s


def test_a_batch_that_was_on_its_way_when_it_opened_is_no_trial() -> None:
    circuit = opened()
    assert not circuit.sent()


def test_nothing_is_due_while_a_probe_is_under_way() -> None:
    circuit = opened()
    circuit.probe_started()
    assert circuit.probe_at() is None
    circuit.probed(False, NOW + 5)
    assert circuit.probe_at() == NOW + 7


def test_each_probe_that_fails_doubles_the_interval_up_to_the_longest() -> None:
    circuit = opened(first_s=1.0, longest_s=10.0)
    waits = []
    for _ in range(6):
        circuit.probe_started()
        circuit.probed(False, NOW)
        due = circuit.probe_at()
        assert due is not None
        waits.append(due - NOW)
        assert not circuit.may_send()
    assert waits == [2, 4, 8, 10, 10, 10]


def test_a_probe_that_succeeds_lets_one_batch_through() -> None:
    circuit = half_open()
    assert circuit.may_send()
    assert circuit.probe_at() is None
    trial = circuit.sent()
    assert trial
    assert not circuit.may_send()
    del trial  # its sender is gone
    assert circuit.may_send()


def test_what_was_sent_before_and_fails_late_changes_nothing() -> None:
    circuit = opened(first_s=1.0)
    circuit.failed(None, NOW + 0.5)
    assert (circuit.state, circuit.failures, circuit.probe_at()) == (OPEN, 1, NOW + 1)


def test_what_was_sent_before_and_succeeds_late_closes_nothing_but_is_worth_a_probe_at_once() -> None:
    circuit = opened(first_s=10.0)
    circuit.succeeded(None, NOW + 3)
    assert (circuit.state, circuit.probe_at()) == (OPEN, NOW + 3)
    circuit.succeeded(None, NOW + 4)
    assert circuit.probe_at() == NOW + 3  # not put off


def test_a_late_success_does_not_shorten_the_interval_after_a_probe_that_failed() -> None:
    circuit = opened(first_s=10.0)
    circuit.probe_started()
    circuit.succeeded(None, NOW + 3)
    assert circuit.probe_at() is None
    circuit.probed(False, NOW + 4)
    assert circuit.probe_at() == NOW + 24


# -- half-open


def test_only_the_success_of_the_trial_closes_it() -> None:
    circuit = half_open()
    circuit.succeeded(None, NOW)
    assert circuit.state is HALF_OPEN
    trial = circuit.sent()
    assert trial
    circuit.succeeded(None, NOW)
    assert circuit.state is HALF_OPEN
    assert not circuit.may_send()
    circuit.succeeded(trial, NOW)
    assert (circuit.state, circuit.failures) == (CLOSED, 0)
    assert circuit.may_send()
    assert not circuit.sent()


def test_only_the_failure_of_the_trial_opens_it_again() -> None:
    circuit = half_open(first_s=1.0)
    trial = circuit.sent()
    circuit.failed(None, NOW + 5)
    assert circuit.state is HALF_OPEN
    circuit.failed(trial, NOW + 5)
    assert (circuit.state, circuit.probe_at()) == (OPEN, NOW + 7)
    circuit.probe_started()
    circuit.probed(True, NOW + 7)
    circuit.failed(circuit.sent(), NOW + 8)
    assert circuit.probe_at() == NOW + 12


def test_trials_double_the_interval_no_further_than_the_longest() -> None:
    circuit = half_open(first_s=1.0, longest_s=1.5)
    circuit.failed(circuit.sent(), NOW)
    assert circuit.probe_at() == NOW + 1.5


def test_after_a_trial_that_says_nothing_the_next_batch_is_the_trial() -> None:
    circuit = half_open()
    trial = circuit.sent()
    circuit.said_nothing(None)
    assert not circuit.may_send()
    circuit.said_nothing(trial)
    assert circuit.state is HALF_OPEN
    assert circuit.may_send()
    assert circuit.sent()


def test_once_it_was_closed_the_interval_is_the_first_again() -> None:
    circuit = opened(first_s=1.0)
    for succeeded in (False, False, True):
        circuit.probe_started()
        circuit.probed(succeeded, NOW)
    circuit.succeeded(circuit.sent(), NOW)
    circuit.failed(circuit.sent(), NOW)
    assert (circuit.state, circuit.probe_at()) == (OPEN, NOW + 1)


def test_an_answer_of_a_probe_that_nobody_waits_for_changes_nothing() -> None:
    circuit = half_open()
    circuit.probed(False, NOW)
    assert circuit.state is HALF_OPEN
    circuit.succeeded(circuit.sent(), NOW)
    circuit.probed(True, NOW)
    assert circuit.state is CLOSED


# -- any order of events


class Circuits(RuleBasedStateMachine):
    """Batches are sent when they may be, and answer in any order; so does the probe, and time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.random = 0.0
        self.in_flight: list[Trial | None] = []
        self.probing = False
        self.in_a_row = 0
        self.interval_s = 0.0  # the one that runs, or that the next opening has
        self.planned_at = 0.0
        self.hurried = False

    @initialize(
        failures_to_open=st.integers(1, 4),
        first_s=st.sampled_from([0.5, 1.0, 3.0]),
        times=st.sampled_from([1, 1.5, 4, 100]),
    )
    def start(self, failures_to_open: int, first_s: float, times: float) -> None:
        self.failures_to_open, self.first_s, self.longest_s = failures_to_open, first_s, first_s * times
        self.interval_s = first_s
        self.circuit = CircuitBreaker(
            failures_to_open=failures_to_open,
            probe_interval_s=first_s,
            max_probe_interval_s=self.longest_s,
            random=lambda: self.random,
        )
        self.state = CLOSED

    def expect(self, state: CircuitState) -> None:
        assert self.circuit.state is state, f"{self.state} to {self.circuit.state}, not {state}"
        self.state = state

    def expect_open(self) -> None:
        self.expect(OPEN)
        self.planned_at = self.now
        self.hurried = False

    @rule(seconds=st.sampled_from([0.25, 1.0, 40.0]), random=st.floats(0, 1))
    def time_passes(self, seconds: float, random: float) -> None:
        self.now += seconds
        self.random = random

    @precondition(lambda self: self.circuit.may_send())
    @rule()
    def a_batch_is_sent(self) -> None:
        assert self.state is not OPEN
        trial = self.circuit.sent()
        assert (trial is not None) == (self.state is HALF_OPEN)
        self.in_flight.append(trial)
        self.expect(self.state)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def a_batch_succeeds(self, data: st.DataObject) -> None:
        trial = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.circuit.succeeded(trial, self.now)
        if self.state is CLOSED:
            self.in_a_row = 0
        if trial:
            self.in_a_row = 0
            self.interval_s = self.first_s
            self.expect(CLOSED)
        elif self.state is OPEN and not self.probing:
            self.hurried = True
        self.expect(self.state)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def a_batch_fails(self, data: st.DataObject) -> None:
        trial = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.circuit.failed(trial, self.now)
        if trial:
            self.interval_s = min(self.interval_s * 2, self.longest_s)
            self.expect_open()
        elif self.state is CLOSED:
            self.in_a_row += 1
            if self.in_a_row == self.failures_to_open:
                self.expect_open()
        self.expect(self.state)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def a_batch_says_nothing(self, data: st.DataObject) -> None:
        trial = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.circuit.said_nothing(trial)
        self.expect(self.state)

    @precondition(lambda self: self.circuit.probe_at() is not None)
    @rule()
    def a_probe_starts_when_it_is_due(self) -> None:
        due = self.circuit.probe_at()
        assert due is not None
        self.now = max(self.now, due)
        self.circuit.probe_started()
        self.probing = True
        self.expect(OPEN)

    @precondition(lambda self: self.probing)
    @rule(succeeded=st.booleans())
    def a_probe_ends(self, succeeded: bool) -> None:
        self.probing = False
        self.circuit.probed(succeeded, self.now)
        if succeeded:
            self.expect(HALF_OPEN)
        else:
            self.interval_s = min(self.interval_s * 2, self.longest_s)
            self.expect_open()

    @rule(at_most_s=st.sampled_from([0.25, 1.0]))
    def closing_hurries(self, at_most_s: float) -> None:
        self.circuit.hurry(self.now, at_most_s)
        self.first_s = min(self.first_s, at_most_s)
        self.longest_s = min(self.longest_s, at_most_s)
        self.interval_s = min(self.interval_s, at_most_s)
        if self.state is OPEN:
            self.planned_at, self.hurried = self.now, True
            if not self.probing:
                assert (self.circuit.probe_at() or 0.0) <= self.now
        self.expect(self.state)

    @invariant()
    def at_most_one_trial(self) -> None:
        assert sum(map(bool, self.in_flight)) <= 1
        if any(self.in_flight):
            assert self.state is HALF_OPEN

    @invariant()
    def what_may_be_sent(self) -> None:
        expected = {CLOSED: True, OPEN: False, HALF_OPEN: not any(self.in_flight)}
        assert self.circuit.may_send() == expected[self.state]

    @invariant()
    def when_to_probe(self) -> None:
        due = self.circuit.probe_at()
        assert (due is not None) == (self.state is OPEN and not self.probing)
        if due is None:
            return
        assert due <= self.planned_at + self.interval_s
        if not self.hurried:
            assert due >= self.planned_at + self.interval_s / 2
        assert self.interval_s <= self.longest_s

    @invariant()
    def it_counts_the_failures_in_a_row(self) -> None:
        if self.state is CLOSED:
            assert self.circuit.failures == self.in_a_row < self.failures_to_open


TestCircuits = Circuits.TestCase
