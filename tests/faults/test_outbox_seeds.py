"""The first plans of outboxes, and of whole histories: outbox, relays, Kafka, listeners, inbox. `make soak
ARGS="--outbox sqlite"`, or `--whole sqlite`, runs more of them and makes a failing one shorter."""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.faults.outbox_plan import (
    BROKERS_DECIDE,
    FAULTS,
    FAULTS_OF_POSTGRES,
    STEPS_OF_ADD,
    STEPS_OF_LISTENER,
    STEPS_OF_RELAY,
    STEPS_OF_SEND,
    Listen,
    OutboxPlan,
    Relay,
    make_outbox_plan,
    make_whole_plan,
)
from tests.faults.worker import Result, Worker

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")

SEEDS = range(30)
# So many are run to their end, the others as far as they keep their promises, in half of the time.
COMPLETE, WHOLE_COMPLETE = 15, 9
OUTAGES = {*FAULTS, *FAULTS_OF_POSTGRES}

Run = Callable[[OutboxPlan], Result]


def outbox_plan(seed: int) -> OutboxPlan:
    plan = make_outbox_plan(seed, "postgres" if seed % 3 == 2 else "sqlite")
    return plan if seed < COMPLETE else plan.beginning()


def whole_plan(seed: int) -> OutboxPlan:
    plan = make_whole_plan(seed, "postgres" if seed % 3 == 2 else "sqlite")
    return plan if seed < WHOLE_COMPLETE else plan.beginning()


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    workers: dict[tuple[bool, str], Worker] = {}

    def run_one(plan: OutboxPlan) -> Result:
        is_whole = plan.handling is not None
        kind = (is_whole, plan.database)
        if kind not in workers:
            place = [request.getfixturevalue("postgres")] if plan.database == "postgres" else []
            workers[kind] = Worker(outbox=[*(["whole"] if is_whole else []), plan.database, *place])
        return workers[kind].run(plan)

    yield run_one
    for worker in workers.values():
        worker.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed: int, run: Run) -> None:
    check(run(outbox_plan(seed)))


@pytest.mark.long
@pytest.mark.timeout(450)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_has_exactly_one_effect_in_order_per_key(seed: int, run: Run) -> None:
    check(run(whole_plan(seed)))


def check(result: Result) -> None:
    """Nothing is violated, and what the plan promises has happened."""
    assert not result.violations, f"\n{result}"
    assert set(result.plan.promised) - result.met == set(), f"\n{result}"


def test_each_step_and_each_outage_has_its_turn() -> None:
    plans = [outbox_plan(seed) for seed in SEEDS]
    whole_plans = [whole_plan(seed) for seed in SEEDS]
    steps = {*STEPS_OF_ADD, *STEPS_OF_SEND, *STEPS_OF_RELAY}
    assert {name for plan in plans for name in plan.promised} == steps
    assert {name for plan in whole_plans for name in plan.promised} == {*steps, *STEPS_OF_LISTENER, *OUTAGES}
    assert {plan.assignment for plan in whole_plans} == {"range", "cooperative-sticky", BROKERS_DECIDE}
    listeners = [step for plan in whole_plans for _, step in plan.taken if isinstance(step, Listen)]
    assert {each.is_aio for each in listeners} == {True, False}
    fenced = [step for plan in plans if plan.fenced for _, step in plan.taken if isinstance(step, Relay)]
    assert {each.is_aio for each in fenced} == {True, False}


def test_a_seed_makes_the_same_plan_each_time() -> None:
    for make in (outbox_plan, whole_plan):
        for seed in SEEDS:
            assert str(make(seed)) == str(make(seed))
