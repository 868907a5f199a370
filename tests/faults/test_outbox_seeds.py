"""The first plans of outboxes, and of whole histories: outbox, relays, Kafka, listeners, inbox. `make soak
ARGS="--outbox sqlite"`, or `--whole sqlite`, runs more of them and makes a failing one shorter."""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.faults.outbox_plan import (
    BROKERS_DECIDE,
    STEPS_OF_ADD,
    STEPS_OF_LISTENER,
    STEPS_OF_RELAY,
    STEPS_OF_SEND,
    Relay,
    make_outbox_plan,
    make_whole_plan,
)
from tests.faults.worker import Result, Worker

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")

# Each step of a relay is once the first that is killed.
SEEDS = range(30)
WHOLE_SEEDS = range(12)  # a second and a half of a processor each

Run = Callable[[str, int, str], Result]


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    workers: dict[tuple[str, str], Worker] = {}

    def run_one(kind: str, seed: int, database: str) -> Result:
        """`kind` is "outbox" or "whole"."""
        if (kind, database) not in workers:
            place = [request.getfixturevalue("postgres")] if database == "postgres" else []
            workers[kind, database] = Worker(outbox=[*(["whole"] if kind == "whole" else []), database, *place])
        make = make_whole_plan if kind == "whole" else make_outbox_plan
        return workers[kind, database].run(make(seed, database))

    yield run_one
    for worker in workers.values():
        worker.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed: int, run: Run) -> None:
    result = run("outbox", seed, "postgres" if seed % 3 == 2 else "sqlite")
    assert not result.violations, f"\n{result}"


@pytest.mark.timeout(450)
@pytest.mark.parametrize("seed", WHOLE_SEEDS)
def test_every_order_has_exactly_one_effect_in_order_per_key(seed: int, run: Run) -> None:
    result = run("whole", seed, "postgres" if seed % 3 == 2 else "sqlite")
    assert not result.violations, f"\n{result}"


def test_each_step_of_a_listener_and_each_outage_has_its_turn() -> None:
    plans = [make_whole_plan(seed, "postgres") for seed in range(len(STEPS_OF_LISTENER))]
    kinds = {kind for plan in plans for kind in plan.kinds}
    outages = {"hang", "brokers", "locked", "severed", "crashed", "clock"}
    assert {*STEPS_OF_LISTENER, *outages, "aio", "range", "cooperative-sticky", BROKERS_DECIDE} <= kinds
    named = {make_whole_plan(seed, "postgres" if seed % 3 == 2 else "sqlite").assignment for seed in WHOLE_SEEDS}
    assert named == {"range", "cooperative-sticky", BROKERS_DECIDE}
    fenced = [make_outbox_plan(seed, "sqlite") for seed in SEEDS if make_outbox_plan(seed, "sqlite").fenced]
    relays = [step for plan in fenced for step in plan.steps if isinstance(step, Relay)]
    assert {relay.is_aio for relay in relays} == {True, False}
    assert [str(plan) for plan in plans] == [str(make_whole_plan(plan.seed, "postgres")) for plan in plans]


def test_each_step_is_killed_and_a_seed_makes_the_same_plan_each_time() -> None:
    kinds = {kind for seed in SEEDS for kind in make_outbox_plan(seed, "sqlite").kinds}
    assert kinds == {*STEPS_OF_ADD, *STEPS_OF_SEND, *STEPS_OF_RELAY}
    for seed in SEEDS:
        assert str(make_outbox_plan(seed, "sqlite")) == str(make_outbox_plan(seed, "sqlite"))
