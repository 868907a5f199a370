"""Each of kbatch's own allocations fails once: an answer, no crash, nothing left, and the producer goes on."""

import gc
import logging

import pytest

from kbatch.testing import MockCluster

from ..waiting import until
from .hooks import NativeHook, mock_hook
from .scenarios import SCENARIOS, TOPIC, World

# how many allocations each scenario makes at least, so that none stops being tested unseen
ALLOCATIONS = {
    "mapping kbatch": 8,
    "mapping wolverine": 8,
    "mapping cloudevents": 8,
    "mapping raw": 8,
    "mapping by an encoder": 8,
    "mapping by a custom wire": 8,
    "mapping without a producer": 80,
    "packing": 4,
    "refused": 4,
    "refused events": 4,
    "sending": 1,
    "sending fresh": 6,
    "making and closing": 3,
    "submitting": 1,
    "sending on a loop": 1,
    "submitting on a loop": 1,
    "rejecting": 8,
    "sending without the rejected": 1,
    "batched": 1,
    "batched fresh": 1,
    "inline": 1,
    "inline on a loop": 1,
    "answering by an agent": 1,
    "in memory": 1,
    "statistics": 1,
    "errors": 1,
    "polled": 2,  # its envelopes have memory of others before; that of "received" is new each time
    "received": 1,
    "rebalanced": 2,
    "sending offsets": 1,
    "tokens": 1,
    "setting a token": 1,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_allocation_fails_once(kafka_cluster: MockCluster, caplog: pytest.LogCaptureFixture, name: str) -> None:
    kafka_cluster.create_topic(TOPIC, partitions=1)
    caplog.set_level(logging.CRITICAL, "kbatch")  # what pytest keeps of a logged exception would keep a producer
    hook = mock_hook() if name == "pushing errors" else NativeHook()
    gc.collect()
    before = hook.live()
    world = World(kafka_cluster)
    step = SCENARIOS[name](world)
    failed = 0
    while True:
        hook.nth += 1
        failures = hook.failures()
        step(hook)
        if hook.failures() == failures:
            break
        failed += 1
    world.check_wire()
    world.end()
    del step, world

    def nothing_left() -> bool:
        gc.collect()
        return hook.live() == before

    until(nothing_left, f"the last of {hook.live() - before} allocations given back")
    print(f"{name}: {failed} allocations")
    assert failed >= ALLOCATIONS.get(name, 0)
