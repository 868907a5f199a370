"""Seeded fault plans on real brokers; `make soak-kafka` runs more of them and makes a failing one shorter."""

import pytest

from tests.faults.kafka_kinds import KAFKA_KINDS
from tests.faults.plan import make_plan
from tests.kafka.cluster import KafkaCluster
from tests.kafka.conftest import NIGHTLY
from tests.kafka.scenario import run_plan

# Each kind of fault leads a plan once in so many seeds.
SEEDS = range(3 * len(KAFKA_KINDS) if NIGHTLY else 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_seed(kafka3: KafkaCluster, seed: int) -> None:
    plan = make_plan(seed, kafka=True)
    violations, _ = run_plan(kafka3, plan)
    assert not violations, "\n".join([str(plan), *map(str, violations[:6])])


def test_a_seed_makes_the_same_plan_each_time() -> None:
    for seed in range(50):
        plan = make_plan(seed, kafka=True)
        assert plan == make_plan(seed, kafka=True)
        assert plan.kinds[0] == KAFKA_KINDS[seed % len(KAFKA_KINDS)].name
        # A real broker deduplicates.
        assert not (plan.idempotent and plan.rules().copies)
