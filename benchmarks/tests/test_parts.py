"""Outbox, reading and inbox from their beginning to their tables, with little of everything: `make bench-test`."""

import random

import pytest

from benchmarks import awaiting, docs, inbox, outbox, outbox_postgres, reading, relays, whole_way
from benchmarks.figures import show
from benchmarks.inbox import measured
from benchmarks.measures import GROUPS, MEASURES
from benchmarks.pacer import Sent
from benchmarks.plan import Plan
from benchmarks.run import describe_plan, parse, plan_of
from benchmarks.turns import Effort

TINY = Plan(
    effort=Effort(rounds=1, turns=1, seconds=0.05), memory_envelopes=20_000, backlogs=(5_000, 8_000),
    relay_rows=9_000, read_records=3_000, half_load_s=0.3, way_turns=1,
)  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, counts in (
        (outbox, {"ROWS": 5_000, "COMMITS": 3}),
        (outbox_postgres, {"ROWS": 5_000, "COMMITS": 3, "SENDS": 3}),
        (awaiting, {"ROWS": 5_000, "SECONDS": 0.1}),
        (whole_way, {"ORDERS": 3_000, "AWAITED": 200, "FIRST": 100}),
        (relays, {"SEED": 2_000, "FIRST": 4_000}),
        (reading, {"RECORDS": 4_000}),
        (inbox, {"MESSAGES": 1_000, "SINGLE_MESSAGES": 50, "MOST_PACED": 2_000}),
    ):
        for name, count in counts.items():
            monkeypatch.setattr(module, name, count)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", [name for group in GROUPS.values() for name in group])
def test_a_part_runs_to_its_end_and_can_be_shown(name: str) -> None:
    sections = list(MEASURES[name](TINY))
    assert sections
    for section in sections:
        assert section.measure == name
        assert section.figures
        assert all(figure.value == figure.value for figure in section.figures)  # no NaN
        assert section.title in show(section)
        assert section.title in docs.render(section)


def test_a_group_is_all_measures_that_begin_with_its_name() -> None:
    assert [name for name in MEASURES if name.startswith(docs.PARTS)] == [
        name for group in ("outbox", "reading", "inbox") for name in GROUPS[group]
    ]


def test_backlogs_and_memory_can_be_made_smaller() -> None:
    plan = plan_of(parse(["--only", "outbox,reading", "--backlogs", "50_000,300_000", "--memory-envelopes", "1000000"]))
    assert (plan.backlogs, plan.memory_envelopes) == ((50_000, 300_000), 1_000_000)
    assert describe_plan(plan)["backlogs"] == (50_000, 300_000)
    with pytest.raises(SystemExit):
        parse(["--backlogs", "100"])


def test_latency_is_from_the_call_that_sent_the_nth_to_when_n_are_handled() -> None:
    sent = Sent([1.0, 2.0, 3.0], [2, 3, 4])
    found = measured(sent, [(0.5, 0), (1.5, 1), (2.5, 3), (3.5, 4)])
    assert found.latencies == [0.5, 0.5, 0.5, 1.5]
    assert found.lags == [1, 0]


def test_latencies_have_the_mean_of_those_that_were_taken_one_by_one() -> None:
    rng = random.Random(7)
    calls = [float(n) for n in range(50)]
    ends = [call + rng.uniform(0.0, 9.0) for call in calls]
    curve = [(0.0, 0), *((end, n + 1) for n, end in enumerate(sorted(ends)))]
    found = measured(Sent(calls, list(range(1, 51))), curve)
    taken = [end - call for call, end in zip(calls, ends, strict=True)]
    assert sum(found.latencies) == pytest.approx(sum(taken))
