"""What a relay reads next: nothing twice, nothing left out, nothing of a key that is held."""

import random
from bisect import bisect

import pytest

from kbatch._outbox._floors import Floors
from kbatch._outbox._store import DueRow, HeldKey, Reading


def rows(bucket: int, *numbers: int) -> list[tuple[int, int, bytes, None]]:
    return [(bucket, number, b"%d" % (number % 10), None) for number in numbers]


def key_of(packed: bytes) -> int | None:
    """The last digit of a row's number; 0 has no key."""
    if packed == b"damaged":
        raise ValueError("damaged")
    return int(packed) or None


def begun(*buckets: int, held: tuple[HeldKey, ...] = ()) -> Floors:
    positions = Floors(key_of)
    positions.begin(buckets or (0,), held)
    return positions


def taken(
    positions: Floors, bucket: int, *numbers: int, in_flight: tuple[int, ...] = (), ended: bool = True
) -> list[int]:
    """Which rows are sent, if the store has these above the floor."""
    (floor,) = (each for of, each in positions.floors([bucket]).items() if of == bucket)
    found = [number for number in numbers if number > floor]
    floors = {bucket: found[-1]} if found else {}
    reading = Reading(rows(bucket, *found), floors, {bucket} if ended else set())
    sent = positions.taken(reading, lambda: {(bucket, number) for number in in_flight})
    return [row[1] for row in sent]


def test_what_was_read_is_not_read_again() -> None:
    positions = begun()
    assert taken(positions, 0, 1, 2, 3) == [1, 2, 3]
    assert taken(positions, 0, 1, 2, 3, 4) == [4]


def test_what_is_put_back_is_read_again_and_what_is_in_flight_beside_it_is_not() -> None:
    positions = begun()
    assert taken(positions, 0, 1, 2, 3, 4) == [1, 2, 3, 4]
    positions.put_back([(0, 3), (0, 2), (7, 1)])
    assert taken(positions, 0, 1, 2, 3, 4, 5, in_flight=(1, 4)) == [2, 3, 5]
    assert taken(positions, 0, 1, 4, 6, in_flight=(1, 4)) == [6]


def test_all_are_looked_at_again_and_what_comes_to_light_late_is_found() -> None:
    positions = begun()
    assert taken(positions, 0, 1, 3, 4) == [1, 3, 4]
    positions.start_again()
    assert taken(positions, 0, 1, 2, 3, 4, in_flight=(1, 3, 4)) == [2]


def test_only_buckets_that_were_read_to_their_end_are_looked_at_again_from_time_to_time() -> None:
    positions = begun(held=(HeldKey(0, 2, 2),))
    assert taken(positions, 0, 12, 22, ended=False) == []
    positions.start_ended_again()
    assert positions.floors([0]) == {0: 22}
    assert taken(positions, 0, 32, 33) == [33]
    positions.start_ended_again()
    assert positions.floors([0]) == {0: 0}
    assert taken(positions, 0, 3, 12, ended=False, in_flight=(33,)) == [3]
    positions.start_ended_again()
    assert positions.floors([0]) == {0: 12}
    positions.start_again()
    assert positions.floors([0]) == {0: 0}


def test_rows_of_a_held_key_wait_and_go_on_in_order_once_it_is_let_go() -> None:
    positions = begun(held=(HeldKey(0, 2, 2),))
    assert taken(positions, 0, 1, 3, 10, 12) == [1, 3, 10]
    assert taken(positions, 0, 22, 23) == [23]
    positions.let_go([HeldKey(0, 2, 2)])
    assert taken(positions, 0, 24) == [24]
    positions.let_go([])
    assert not positions.has_held()
    assert taken(positions, 0, 3, 12, 22, 23, 24, 25, in_flight=(3, 23, 24)) == [12, 22, 25]


def test_a_key_that_is_held_twice_forgets_no_row() -> None:
    positions = begun()
    positions.hold(0, 2, 12)
    assert taken(positions, 0, 22, 32) == []
    positions.hold(0, 2, 2)
    positions.hold(0, None, 1)
    positions.hold(9, 2, 2)
    assert taken(positions, 0, 42) == []
    positions.let_go([])
    assert taken(positions, 0, 22, 32, 42) == [22, 32, 42]


def test_earlier_rows_of_a_held_key_go_first() -> None:
    positions = begun(held=(HeldKey(0, 2, 12),))
    assert taken(positions, 0, 2, 3, 22) == [2, 3]
    positions.hold(0, 2, 2)  # and failed
    positions.let_go([HeldKey(0, 2, 12)])  # and was sent then
    assert taken(positions, 0, 22, 32) == []


def test_rows_between_two_that_wait_go_on_when_the_first_of_them_is_gone() -> None:
    positions = begun(held=(HeldKey(0, 2, 2),))
    assert taken(positions, 0, 12, 22, 42) == []
    positions.let_go([HeldKey(0, 2, 32)])
    assert taken(positions, 0, 12, 22, 42) == [12, 22]
    positions.let_go([])
    assert taken(positions, 0, 42) == [42]


@pytest.mark.parametrize("rows_that_wait", [[2, 32], [32, 2]])
def test_of_two_rows_of_a_key_that_wait_the_first_holds_it(rows_that_wait: list[int]) -> None:
    positions = begun(held=(HeldKey(0, 2, 2),))
    assert taken(positions, 0, 12, 22) == []
    positions.let_go([HeldKey(0, 2, seq) for seq in rows_that_wait])
    assert taken(positions, 0, 12, 22) == []
    positions.let_go([HeldKey(0, 2, 32)])
    assert taken(positions, 0, 12, 22) == [12, 22]


def due(*numbers: int, bucket: int = 0, key_hash: int | None = 2) -> list[DueRow]:
    return [DueRow(bucket, number, b"", None, 1, key_hash) for number in numbers]


def test_a_row_that_waits_is_sent_when_everything_before_it_was_read_and_is_not_on_its_way() -> None:
    positions = begun(held=(HeldKey(0, 2, 12),))
    waiting = due(12)
    assert positions.first_of_keys(waiting, []) == []  # nothing was read yet
    assert taken(positions, 0, 2, ended=False) == [2]
    assert positions.first_of_keys(waiting, []) == []
    assert taken(positions, 0, 3, 22, ended=False) == [3]
    on_its_way = [((0, 2), b"2"), ((0, 3), b"3"), ((1, 2), b"2"), ((0, 32), b"2")]
    assert positions.first_of_keys(waiting, on_its_way) == []
    assert positions.first_of_keys(waiting, on_its_way[1:]) == waiting
    positions.put_back([(0, 2)])
    assert positions.first_of_keys(waiting, []) == []
    assert taken(positions, 0, 2, 3, 22, in_flight=(3,)) == [2]
    assert positions.first_of_keys(waiting, on_its_way) == []
    positions.start_again()  # what was known stays known
    assert positions.first_of_keys(waiting, []) == waiting


def test_a_row_that_waits_waits_for_what_others_may_have_put_back() -> None:
    positions = begun(held=(HeldKey(0, 2, 12),))
    assert taken(positions, 0, 3) == [3]
    assert positions.first_of_keys(due(12), []) == due(12)
    positions.look_again()
    assert positions.first_of_keys(due(12), []) == []
    assert taken(positions, 0, 2, 3, in_flight=(3,)) == [2]
    assert positions.first_of_keys(due(12), [((0, 2), b"2")]) == []
    assert positions.first_of_keys(due(12), []) == due(12)


def test_a_row_that_waits_without_a_key_waits_for_no_other() -> None:
    positions = begun()
    assert positions.first_of_keys(due(12, key_hash=None), [((0, 2), b"2")]) == due(12, key_hash=None)
    assert positions.first_of_keys(due(12, bucket=9, key_hash=None), []) == []


def test_a_bucket_that_was_read_to_its_end_has_no_earlier_row() -> None:
    positions = begun(held=(HeldKey(0, 2, 12),))
    assert taken(positions, 0) == []
    assert positions.first_of_keys(due(12), []) == due(12)


def test_a_damaged_row_is_held_by_nobody() -> None:
    positions = begun(held=(HeldKey(0, 2, 1),))
    sent = positions.taken(Reading([(0, 2, b"damaged", None)], {0: 2}, {0}), set)
    assert [row[1] for row in sent] == [2]


def test_each_reading_begins_with_other_buckets() -> None:
    buckets = range(16)
    positions = begun(*buckets)
    orders = [list(positions.floors(buckets)) for _ in range(16)]
    assert all(sorted(order) == list(buckets) for order in orders)
    assert sorted(order[0] for order in orders) == list(buckets)
    positions = begun(1, 2, 3)
    firsts = [next(iter(positions.floors([1, 2, 3]))) for _ in range(6)]
    assert sorted(firsts) == [1, 1, 2, 2, 3, 3]
    assert list(positions.floors([1, 9])) == [1]
    assert positions.floors([]) == {}


@pytest.mark.parametrize("fit", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("count", [64, 32, 22, 3, 1])
def test_every_bucket_has_its_turn_however_many_a_reading_gets_through(count: int, fit: int) -> None:
    buckets = range(count)
    positions = begun(*buckets)
    turns = dict.fromkeys(buckets, 0)
    for seq in range(1, 65):  # each bucket has more rows than fit, and of the last one that is read perhaps one row
        order = list(positions.floors(buckets))
        for bucket in order[:4][: max(fit - 1, 1)]:
            turns[bucket] += 1
        positions.taken(Reading([], dict.fromkeys(order[:fit], seq), set()), set)
    assert min(turns.values()) >= 1
    assert max(turns.values()) <= min(turns.values()) + 2


def test_then_come_the_buckets_that_are_furthest_behind() -> None:
    buckets = range(16)
    positions = begun(*buckets)
    floors = {bucket: 1 + 7 * bucket % 16 for bucket in buckets}
    positions.taken(Reading([], floors, set()), set)
    for _ in range(5):
        order = positions.floors(buckets)
        assert order == floors
        assert list(order)[4:] == sorted(list(order)[4:], key=floors.__getitem__)


def test_buckets_of_unlike_sizes_are_read_side_by_side() -> None:
    owners = [random.Random(seq).choice((*range(16), *range(8))) for seq in range(40_000)]
    numbers = {bucket: [seq for seq, owner in enumerate(owners, 1) if owner == bucket] for bucket in range(16)}
    positions = begun(*numbers)
    for _ in range(100):  # 200 rows, 20 of a bucket, as a store does it
        floors, left = {}, 200
        for bucket, floor in positions.floors(numbers).items():
            at = bisect(numbers[bucket], floor)
            found = numbers[bucket][at : at + min(20, left)]
            floors[bucket], left = found[-1], left - len(found)
            if not left:
                break
        positions.taken(Reading([], floors, set()), set)
    lowest, *_, highest = sorted(positions.floors(numbers).values())
    assert lowest > 0.9 * highest


def test_a_bucket_that_comes_back_is_read_from_its_beginning() -> None:
    positions = begun(0, 1)
    assert taken(positions, 0, 1, 2) == [1, 2]
    positions.end([0])
    assert not positions.knows(0)
    assert list(positions.floors([0, 1])) == [1]
    positions.begin([0], [])
    assert taken(positions, 0, 1, 2) == [1, 2]


# -- one record of a key in flight


def strict(*buckets: int, held: tuple[HeldKey, ...] = ()) -> Floors:
    positions = Floors(key_of, one_in_flight=True)
    positions.begin(buckets or (0,), held)
    return positions


def landed(positions: Floors, *numbers: int) -> bool:
    return positions.landed([(0, number) for number in numbers], [b"%d" % (number % 10) for number in numbers])


def test_one_of_each_key_is_sent_and_the_next_one_when_it_has_landed() -> None:
    positions = strict()
    assert taken(positions, 0, 1, 2, 11, 21) == [1, 2]
    assert taken(positions, 0, 1, 2, 11, 21, 23, 31) == [23]
    assert landed(positions, 2) is False
    assert landed(positions, 1) is True
    assert taken(positions, 0, 11, 21, 23, 31, in_flight=(23,)) == [11]
    assert landed(positions, 11)
    assert taken(positions, 0, 21, 23, 31, 32, in_flight=(23,)) == [21, 32]


def test_rows_without_a_key_and_damaged_ones_do_not_wait_for_each_other() -> None:
    positions = strict()
    assert taken(positions, 0, 10, 20, 30) == [10, 20, 30]
    assert not landed(positions, 10, 20, 30)


def test_what_is_put_back_goes_before_the_later_ones_of_its_key() -> None:
    positions = strict()
    assert taken(positions, 0, 1, 2, 11) == [1, 2]
    positions.put_back([(0, 1)])
    assert landed(positions, 1)
    assert taken(positions, 0, 1, 2, 11, in_flight=(2,)) == [1]


def test_what_failed_and_waits_holds_back_the_later_ones_of_its_key() -> None:
    positions = strict()
    assert taken(positions, 0, 1, 11) == [1]
    positions.hold(0, 1, 1)
    landed(positions, 1)
    assert taken(positions, 0, 11) == []
    positions.let_go([])
    assert taken(positions, 0, 11) == [11]


def test_a_row_that_waited_is_not_due_before_the_earlier_ones_that_were_skipped() -> None:
    positions = strict(held=(HeldKey(0, 1, 21),))
    due = [DueRow(0, 21, b"1", None, 1, 1)]
    assert taken(positions, 0, 1, 11) == [1]
    assert positions.first_of_keys(due, [((0, 1), b"1")]) == []
    landed(positions, 1)
    assert positions.first_of_keys(due, []) == []
    assert taken(positions, 0, 11) == [11]
    assert positions.first_of_keys(due, [((0, 11), b"1")]) == []
    landed(positions, 11)
    assert positions.first_of_keys(due, []) == due


def test_without_it_nothing_waits_and_nothing_lands() -> None:
    positions = begun()
    assert taken(positions, 0, 1, 11, 21) == [1, 11, 21]
    assert not landed(positions, 1, 11, 21)


def test_rows_of_a_bucket_that_was_lost_land_without_a_trace() -> None:
    positions = strict()
    assert taken(positions, 0, 1, 11) == [1]
    positions.end([0])
    assert not landed(positions, 1)
    positions.begin([0], ())
    assert taken(positions, 0, 1, 11) == [1]
