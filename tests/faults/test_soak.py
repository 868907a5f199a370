"""What the soak does with plans, against runs that are made up; and that a worker tells a crash and a hang."""

import contextlib
import os
import subprocess

import pytest

from tests.faults import soak, worker
from tests.faults.history import MET
from tests.faults.outbox_plan import (
    FAULTS,
    STEPS_OF_ADD,
    STEPS_OF_LISTENER,
    STEPS_OF_RELAY,
    STEPS_OF_SEND,
    OutboxPlan,
)
from tests.faults.plan import Fault, Plan, make_plan
from tests.faults.worker import Result, Worker


def result(plan: Plan, *violations: str) -> Result:
    return Result(plan, violations, 0.1, {})


def test_a_plan_is_made_as_short_as_it_can_be() -> None:
    plan = make_plan(7)
    needed = {plan.keep[1], plan.keep[-2]}
    runs = 0

    def run(plan: Plan) -> Result:
        nonlocal runs
        runs += 1
        return result(plan, *(["I4: out of order"] if needed <= set(plan.keep) else ["I1: another one"]))

    shortest = soak.shorten(run(plan), run)
    assert set(shortest.plan.keep) == needed
    assert runs < 200
    assert f'again: make soak ARGS="--seed 7 --keep {plan.keep[1]},{plan.keep[-2]}"' in str(shortest)
    assert "I4: out of order" in str(shortest)


def test_what_fails_now_and_then_is_tried_again() -> None:
    runs = 0

    def run(plan: Plan) -> Result:
        nonlocal runs
        runs += 1
        return result(plan, *(["I4: out of order"] if runs % 2 else []))

    assert soak.shorten(run(make_plan(7)), run).plan.keep == ()


def test_a_whole_plan_has_a_short_command() -> None:
    assert 'make soak ARGS="--seed 7"' in str(result(make_plan(7), "I1: lost"))


@pytest.mark.parametrize("kafka", [False, True])
def test_of_a_whole_history_the_command_and_the_process_are_those_of_its_cluster(kafka: bool) -> None:
    kind = soak.Kind(kafka=kafka, database="postgres", conninfo="host=here", whole=True)
    plan = kind.plan(4)
    assert isinstance(plan, OutboxPlan)
    assert (plan.kafka, plan.transactional) == (kafka, kafka)
    target = "soak-kafka" if kafka else "soak"
    assert f'make {target} ARGS="--whole postgres --seed 4"' in str(Result(plan, ("I1: lost",), 0.1, {}))
    with contextlib.closing(kind.worker()) as process:
        assert process._arguments == [*(["kafka"] if kafka else []), "whole", "postgres", "host=here"]


def test_an_outbox_alone_has_no_plans_for_kafka(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--kafka", "--outbox", "sqlite"])
    assert "--whole has" in capsys.readouterr().err


class Failing(Worker):
    """Seed 3 fails if a fault of its plan is taken."""

    def run(self, plan: Plan) -> Result:
        faults = [step for _, step in plan.taken if isinstance(step, Fault)]
        return result(plan, *(["I1: lost"] if plan.seed == 3 and faults else []))


def test_the_soak_prints_the_shortest_plan_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "Worker", Failing)
    assert soak.main(["--seeds", "3"]) == 0
    assert "3 plans" in capsys.readouterr().out
    assert soak.main(["--seeds", "0:10", "--jobs", "2"]) == 1
    shown = capsys.readouterr().out.rpartition("the shortest plan that fails:")[2]
    (fault,) = [line for line in shown.splitlines() if ". " in line]
    assert "fault: " in fault
    assert "I1: lost" in shown
    assert "--seed 3 --keep " in shown


class Idle(Worker):
    """Nothing that its plans promise happens but for the kills of relays."""

    def run(self, plan: OutboxPlan) -> Result:
        return Result(plan, (), 0.1, {f"{MET}{name}": 2 for name in plan.promised if name in self.happen})

    happen: tuple[str, ...] = ()


def test_the_soak_fails_if_a_step_or_an_outage_never_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "Worker", Idle)
    arguments = ["--whole", "sqlite", "--seeds", "8"]
    Idle.happen = (*STEPS_OF_ADD, *STEPS_OF_SEND, *STEPS_OF_RELAY, *STEPS_OF_LISTENER, *FAULTS)
    assert soak.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "killed at each step, and each outage met, 2 to 4 times" in shown
    Idle.happen = tuple(name for name in Idle.happen if name not in ("locked", "after read"))
    assert soak.main(arguments) == 1
    assert "never: after read, locked\n" in capsys.readouterr().out


def test_a_crash_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = Worker()
    try:
        crashing._start()
        assert crashing._process is not None
        crashing._process.kill()
        (violation,) = crashing.run(make_plan(0)).violations
        assert violation.startswith("crash: exit status -9")
        assert crashing.run(make_plan(0).only(())).violations == ()  # the next plan has a process of its own
    finally:
        crashing.close()


def test_a_hang_is_a_result_with_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def hanging(arguments: list[str], **options: object) -> subprocess.Popen[str]:
        code = "import faulthandler, sys, time; faulthandler.enable(); sys.stdin.readline(); time.sleep(100)"
        return popen([arguments[0], "-c", code], **options)

    monkeypatch.setattr(worker.subprocess, "Popen", hanging)
    monkeypatch.setattr(worker, "DEADLINE_S", 1.0)
    stuck = Worker()
    try:
        (violation,) = stuck.run(make_plan(0)).violations
    finally:
        stuck.close()
    assert violation.startswith("hang: ")
    assert 'File "<string>", line 1' in violation, os.linesep + violation
