"""Who is handled next: order per key, batches of a partition, and what is dropped."""

from collections.abc import Hashable
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from kbatch._receiving._lanes import BatchLanes, Lanes, Work
from kbatch._receiving._positions import Place, Positions


def work(number: int, lane: Hashable = None, partition: int = 0) -> Work:
    positions = Positions()
    positions.give([("orders", partition)])
    place = positions.begin(("orders", partition), number)
    assert place is not None
    return Work(("orders", partition), (cast("Any", number),), (place,), 1, lane)


def numbers(taken: Work | None) -> list[int]:
    assert taken is not None
    return [place.offset for place in taken.places]


def taken(lanes: Lanes | BatchLanes, now: float = 0.0) -> Work:
    found = lanes.take(now)
    assert found is not None
    return found


def test_what_has_no_lane_waits_for_nobody() -> None:
    lanes = Lanes()
    for number in range(3):
        lanes.add(work(number), 0.0)
    assert [numbers(lanes.take(0.0)) for _ in range(3)] == [[0], [1], [2]]
    assert lanes.take(0.0) is None


def test_the_next_of_a_lane_waits_for_the_one_before() -> None:
    lanes = Lanes()
    for number in range(3):
        lanes.add(work(number, "a"), 0.0)
    first = taken(lanes)
    assert lanes.take(0.0) is None
    lanes.end(first, 0.0)
    assert numbers(lanes.take(0.0)) == [1]


def test_a_lane_that_hangs_holds_up_no_other() -> None:
    lanes = Lanes()
    lanes.add(work(0, "slow"), 0.0)
    taken(lanes)
    for number in range(1, 5):
        lanes.add(work(number, "slow"), 0.0)
        lanes.add(work(number, "fast"), 0.0)
    assert numbers(lanes.take(0.0)) == [1]
    assert lanes.take(0.0) is None  # the next "fast" waits for this one


def test_what_is_dropped_waits_no_more_and_what_comes_back_stays_behind_what_runs() -> None:
    lanes = Lanes()
    for number in range(3):
        lanes.add(work(number, "a"), 0.0)
    lanes.add(work(9, "b", partition=1), 0.0)
    running = taken(lanes)
    assert sorted(offset for each in lanes.drop({("orders", 0)}) for offset in numbers(each)) == [1, 2]
    lanes.add(work(1, "a"), 0.0)  # the partition is back, its old handler still runs
    assert numbers(lanes.take(0.0)) == [9]
    assert lanes.take(0.0) is None
    lanes.end(running, 0.0)
    assert numbers(lanes.take(0.0)) == [1]


def test_a_full_batch_begins_at_once() -> None:
    lanes = BatchLanes(3, 10.0)
    for number in range(4):
        lanes.add(work(number), 0.0)
    batch = taken(lanes)
    assert numbers(batch) == [0, 1, 2]
    assert batch.size == 3
    assert lanes.take(0.0) is None


def test_a_batch_that_is_not_full_begins_when_its_first_record_has_waited() -> None:
    lanes = BatchLanes(3, 10.0)
    lanes.add(work(0), 0.0)
    lanes.add(work(1), 5.0)
    assert lanes.ripen(9.0) == 10.0
    assert lanes.take(9.0) is None
    lanes.ripen(10.0)
    assert numbers(lanes.take(10.0)) == [0, 1]


def test_one_batch_of_a_partition_is_handled_at_a_time() -> None:
    lanes = BatchLanes(2, 0.0)
    for number in range(4):
        lanes.add(work(number), 0.0)
    lanes.add(work(7, partition=1), 0.0)
    first = taken(lanes)
    assert numbers(first) == [0, 1]
    assert numbers(lanes.take(0.0)) == [7]
    assert lanes.take(0.0) is None
    lanes.end(first, 0.0)
    assert numbers(lanes.take(0.0)) == [2, 3]


def test_what_came_while_a_batch_ran_has_waited_since_then() -> None:
    lanes = BatchLanes(2, 10.0)
    for number in range(3):
        lanes.add(work(number), 0.0)
    first = taken(lanes)
    lanes.end(first, 4.0)
    assert lanes.take(4.0) is None
    assert lanes.ripen(4.0) == 10.0
    lanes.ripen(10.0)
    assert numbers(lanes.take(10.0)) == [2]


def test_batches_that_were_full_leave_no_timers_behind() -> None:
    lanes = BatchLanes(2, 1e6)
    for number in range(10_000):
        lanes.add(work(number), 0.0)
        if number % 2:
            lanes.end(taken(lanes), 0.0)
    assert len(lanes._timers) == 1


def test_the_timer_of_a_batch_that_was_full_is_followed_by_that_of_the_next() -> None:
    lanes = BatchLanes(2, 10.0)
    for number, now in ((0, 0.0), (1, 0.0)):
        lanes.add(work(number), now)
    lanes.end(taken(lanes), 1.0)
    lanes.add(work(2), 4.0)
    assert lanes.ripen(10.0) == 14.0
    assert lanes.take(10.0) is None
    lanes.ripen(14.0)
    assert numbers(lanes.take(14.0)) == [2]


def test_a_batch_does_not_wait_for_what_will_not_be_read() -> None:
    lanes = BatchLanes(3, 10.0)
    lanes.add(work(0), 0.0)
    lanes.hurry(("orders", 0))
    assert numbers(lanes.take(0.0)) == [0]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["add", "take", "end", "drop", "wait"])), max_size=60),
    st.booleans(),
)
def test_each_record_is_taken_once_in_order_of_its_lane(steps: list[tuple[int, str]], in_batches: bool) -> None:
    lanes: Lanes | BatchLanes = BatchLanes(2, 3.0) if in_batches else Lanes()
    now = 0.0
    added: dict[int, list[int]] = {0: [], 1: [], 2: []}
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    running: list[Work] = []
    count = 0

    def take_one() -> bool:
        lanes.ripen(now)
        found = lanes.take(now)
        if found is not None:
            assert not any(each.partition == found.partition for each in running)
            running.append(found)
            seen[found.partition[1]] += numbers(found)
        return found is not None

    for partition, step in steps:
        if step == "add":
            lanes.add(work(count, partition, partition), now)
            added[partition].append(count)
            count += 1
        elif step == "take":
            take_one()
        elif step == "end" and running:
            lanes.end(running.pop(0), now)
        elif step == "drop":
            for dropped in lanes.drop({("orders", partition)}):
                added[partition].remove(dropped.places[0].offset)
        elif step == "wait":
            now += 2.0
    now += 10.0
    while running or len(lanes) or lanes.ripen(now) is not None or len(lanes):
        while take_one():
            pass
        if running:
            lanes.end(running.pop(0), now)
    assert seen == added


def test_a_place_is_one_records() -> None:
    assert isinstance(work(3).places[0], Place)
