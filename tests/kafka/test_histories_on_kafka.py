"""Whole histories on a real broker: outbox, relays, Kafka, listeners with an inbox or with transactions, and outages.
`make soak-kafka ARGS="--whole sqlite"` runs more of them and makes a failing one shorter."""

import pytest

from tests.faults.outbox_plan import (
    BROKERS_DECIDE,
    FAULTS,
    FAULTS_OF_POSTGRES,
    OUTAGES,
    STEPS_OF_ADD,
    STEPS_OF_LISTENER,
    STEPS_OF_RELAY,
    STEPS_OF_SEND,
    STEPS_OF_TRANSACTIONAL,
    OutboxPlan,
    make_whole_plan,
)
from tests.faults.worker import Result
from tests.kafka.cluster import KafkaCluster
from tests.kafka.conftest import NIGHTLY
from tests.kafka.histories import run_history

# By day an inbox and brokers that stand still, and transactions of listeners and relays.
SEEDS = range(48) if NIGHTLY else (1, 16)


def plan_of(seed: int) -> OutboxPlan:
    return make_whole_plan(seed, "postgres" if seed % 3 == 2 else "sqlite", kafka=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_has_exactly_one_effect_in_order_per_key(
    one_broker: KafkaCluster, request: pytest.FixtureRequest, seed: int
) -> None:
    plan = plan_of(seed)
    place = request.getfixturevalue("postgres") if plan.database == "postgres" else ""
    violations, seen = run_history(one_broker, plan, place)
    result = Result(plan, tuple(map(str, violations)), 0.0, seen)
    assert not violations, f"\n{result}"
    assert set(plan.promised) - result.met == set(), f"\n{result}"


def test_each_step_of_a_listener_and_each_outage_has_its_turn() -> None:
    plans = [plan_of(seed) for seed in range(2 * len(STEPS_OF_LISTENER))]
    steps = {*STEPS_OF_ADD, *STEPS_OF_SEND, *STEPS_OF_RELAY, *STEPS_OF_LISTENER, *STEPS_OF_TRANSACTIONAL}
    promised = {name for plan in plans for name in plan.promised}
    assert promised == {*steps, *FAULTS, *FAULTS_OF_POSTGRES, *OUTAGES}
    assert {(plan.transactional, plan.fenced) for plan in plans} == {(a, b) for a in (0, 1) for b in (0, 1)}
    groups = {(plan.transactional, plan.assignment) for plan in plans}
    assert {(transactional, BROKERS_DECIDE) for transactional in (True, False)} < groups
    assert {"cooperative-sticky", "range"} < {assignment for _, assignment in groups}
    assert [str(plan) for plan in plans] == [str(plan_of(plan.seed)) for plan in plans]
