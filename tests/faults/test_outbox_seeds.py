"""The first plans of outboxes; `make soak ARGS="--outbox sqlite"` runs more of them and makes a failing one shorter."""

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.faults.checker import check_outbox
from tests.faults.history import OutboxHistory
from tests.faults.outbox_plan import STEPS_OF_ADD, STEPS_OF_RELAY, STEPS_OF_SEND, make_outbox_plan
from tests.faults.worker import Result, Worker

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")

# Each step of a relay is once the first that is killed.
SEEDS = range(30)


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[int, str, str], Result]]:
    workers: dict[str, Worker] = {}

    def run_one(seed: int, database: str, conninfo: str) -> Result:
        if database not in workers:
            workers[database] = Worker(outbox=[database, *([conninfo] if conninfo else [])])
        return workers[database].run(make_outbox_plan(seed, database))

    yield run_one
    for worker in workers.values():
        worker.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed: int, run: Callable[[int, str, str], Result], request: pytest.FixtureRequest) -> None:
    database = "postgres" if seed % 3 == 2 else "sqlite"
    result = run(seed, database, request.getfixturevalue("postgres") if database == "postgres" else "")
    assert not result.violations, f"\n{result}"


def test_each_step_is_killed_and_a_seed_makes_the_same_plan_each_time() -> None:
    kinds = {kind for seed in SEEDS for kind in make_outbox_plan(seed, "sqlite").kinds}
    assert kinds == {*STEPS_OF_ADD, *STEPS_OF_SEND, *STEPS_OF_RELAY}
    for seed in SEEDS:
        assert str(make_outbox_plan(seed, "sqlite")) == str(make_outbox_plan(seed, "sqlite"))


def history(**values: object) -> OutboxHistory:
    log = [("a", 1), ("a", 2), ("b", 3)]
    return OutboxHistory(**{"in_flight": 10, "committed": {1, 2, 3}, "told": {1, 2}, "log": log, **values})  # type: ignore[arg-type]


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
        ({"log": [("a", 1), ("a", 2), ("a", 1), ("b", 3)], "relay_kills": 1}, []),
        ({"log": [("a", 1), ("a", 2), ("b", 3), *[("b", 3)] * 11], "relay_kills": 1}, ["I6"]),
        ({"findings": ["hangs"]}, ["runner"]),
    ],
)
def test_the_checker_finds_what_is_wrong(values: dict[str, object], violated: list[str]) -> None:
    assert [violation.invariant for violation in check_outbox(history(**values))] == violated
