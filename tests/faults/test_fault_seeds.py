"""The first plans, in processes of their own; `make soak` runs more of them and makes a failing one shorter."""

import concurrent.futures
import contextlib
import os
import queue
from collections.abc import Callable, Iterator

import pytest

from tests.faults.kinds import KINDS
from tests.faults.plan import ONE_AT_A_TIME, Send, make_plan
from tests.faults.runner import WAYS
from tests.faults.worker import Result, Worker

SEEDS = range(50)
# The plans mostly wait, so several run at a time: in the processes of pytest, or else in three of this one.
_PROCESSES = 1 if "PYTEST_XDIST_WORKER" in os.environ else 3


@pytest.fixture(scope="module")
def result_of(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Result]]:
    """The result of a seed. Where this is the only process of pytest, the next selected seeds run meanwhile."""
    selected = [item for item in request.session.items if item.name.startswith("test_seed[")]
    seeds = [item.callspec.params["seed"] for item in selected if isinstance(item, pytest.Function)]
    workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def run(seed: int) -> Result:
        worker = workers.get()
        try:
            return worker.run(make_plan(seed))
        finally:
            workers.put(worker)

    with contextlib.ExitStack() as stack:
        for _ in range(_PROCESSES):
            worker = Worker()
            stack.callback(worker.close)
            workers.put(worker)
        if _PROCESSES == 1:
            yield run
            return
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(_PROCESSES))
        stack.callback(pool.shutdown, cancel_futures=True)
        results = {seed: pool.submit(run, seed) for seed in seeds}
        yield lambda seed: results[seed].result()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed: int, result_of: Callable[[int], Result]) -> None:
    result = result_of(seed)
    assert not result.violations, f"\n{result}"


def test_a_seed_makes_the_same_plan_each_time() -> None:
    for seed in SEEDS:
        assert make_plan(seed) == make_plan(seed)
        assert str(make_plan(seed)) == str(make_plan(seed))


def test_the_seeds_cover_every_kind_of_fault_and_every_way_to_send() -> None:
    plans = [make_plan(seed) for seed in SEEDS]
    assert {name for plan in plans for name in plan.kinds} == {kind.name for kind in KINDS}
    sends = [step for plan in plans for step in plan.steps if isinstance(step, Send)]
    assert {send.way for send in sends} == {*WAYS, *ONE_AT_A_TIME}
    assert {send.body for send in sends} == {"json", "bytes", "bytearray", "memoryview", "tombstone", "hooked"}
    assert any(send.again is not None for send in sends)
    assert {plan.in_flight for plan in plans} == {1, 5}
    assert {plan.senders for plan in plans} == {1, 2, 3}
    assert {plan.wire for plan in plans} == {"kbatch", "wolverine", "raw"}
    assert {plan.idempotent for plan in plans} == {True, False}
