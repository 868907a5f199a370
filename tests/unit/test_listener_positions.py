"""Which offsets a listener may commit: the cases of the original's offset committer, and a model of all of them."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kbatch._receiving._positions import Place, Positions

P = ("orders", 0)
Q = ("orders", 1)


def given(*partitions: tuple[str, int]) -> Positions:
    positions = Positions()
    positions.give(partitions or (P,))
    return positions


def begin(positions: Positions, *offsets: int, partition: tuple[str, int] = P) -> list[Place]:
    places = [positions.begin(partition, offset) for offset in offsets]
    return [place for place in places if place is not None]


def test_nothing_is_stored_for_what_is_under_way() -> None:
    positions = given()
    begin(positions, 0, 1, 2)
    assert positions.collect() == []


def test_stored_is_the_offset_behind_the_record_that_is_done() -> None:
    positions = given()
    (place,) = begin(positions, 41)
    positions.end(place)
    assert positions.collect() == [("orders", 0, 42)]


def test_stored_only_below_the_lowest_unfinished() -> None:
    positions = given()
    first, second, third = begin(positions, 5, 6, 7)
    positions.end(first)
    positions.end(third)
    assert positions.collect() == [("orders", 0, 6)]
    positions.end(second)
    assert positions.collect() == [("orders", 0, 8)]


def test_completion_out_of_order_stores_nothing_until_the_first_is_done() -> None:
    positions = given()
    places = begin(positions, *range(10))
    for place in reversed(places[1:]):
        positions.end(place)
        assert positions.collect() == []
    positions.end(places[0])
    assert positions.collect() == [("orders", 0, 10)]


def test_gaps_of_compacted_topics_are_nobodys() -> None:
    positions = given()
    for place in begin(positions, 3, 17, 90):
        positions.end(place)
    assert positions.collect() == [("orders", 0, 91)]


def test_a_gap_before_the_lowest_unfinished_is_not_stored_over() -> None:
    positions = given()
    first, _ = begin(positions, 3, 90)
    positions.end(first)
    assert positions.collect() == [("orders", 0, 4)]


def test_what_was_stored_is_not_stored_again() -> None:
    positions = given()
    (place,) = begin(positions, 0)
    positions.end(place)
    assert positions.collect() == [("orders", 0, 1)]
    assert positions.collect() == []


def test_what_could_not_be_stored_is_stored_again() -> None:
    positions = given()
    (place,) = begin(positions, 0)
    positions.end(place)
    offsets = positions.collect()
    positions.give_back(offsets)
    assert positions.collect() == offsets


def test_partitions_do_not_hold_each_other_up() -> None:
    positions = given(P, Q)
    begin(positions, 0)
    (place,) = begin(positions, 0, partition=Q)
    positions.end(place)
    assert positions.collect() == [("orders", 1, 1)]


def test_an_idle_partition_stores_nothing() -> None:
    positions = given(P, Q)
    for place in begin(positions, 0, 1):
        positions.end(place)
    assert positions.collect([Q]) == []
    assert positions.collect() == [("orders", 0, 2)]
    assert positions.reached() == {P: 2}


def test_nothing_is_stored_after_a_revoke() -> None:
    positions = given(P, Q)
    first, second = begin(positions, 0, 1)
    positions.end(first)
    positions.take([P])
    positions.end(second)
    assert positions.collect() == []
    assert positions.collect([P]) == []
    positions.give_back([("orders", 0, 1)])
    assert positions.collect() == []


def test_records_of_a_revoked_partition_are_not_begun() -> None:
    positions = given(P, Q)
    positions.take([P])
    assert begin(positions, 5) == []


def test_a_partition_that_comes_back_knows_nothing_of_before() -> None:
    positions = given()
    before, _ = begin(positions, 0, 1)
    positions.take([P])
    positions.give([P])
    assert not positions.holds(P, before)
    (again,) = begin(positions, 0)
    positions.end(before)
    assert positions.collect() == []
    positions.end(again)
    assert positions.collect() == [("orders", 0, 1)]


def test_a_seek_back_stores_where_it_has_come_to() -> None:
    positions = given()
    for place in begin(positions, 5, 6, 7):
        positions.end(place)
    assert positions.collect() == [("orders", 0, 8)]
    again = begin(positions, 3, 4, 5)
    positions.end(again[0])
    assert positions.collect() == [("orders", 0, 4)]


def test_a_seek_back_over_what_is_under_way_ends_with_all_of_it() -> None:
    positions = given()
    places = begin(positions, 6, 5, 5)
    for place in reversed(places):
        positions.end(place)
    assert positions.collect() == [("orders", 0, 6)]
    assert positions.spread(P) == 0


def test_what_was_under_way_before_a_seek_back_is_not_stored_over_what_is_read_again() -> None:
    positions = given()
    before, again, _ = begin(positions, 100, 3, 4)
    positions.end(before)
    assert positions.collect() == [("orders", 0, 3)]
    positions.end(again)
    assert positions.collect() == [("orders", 0, 4)]


class Model(RuleBasedStateMachine):
    """Beside `Positions`: of each partition a list of (offset, done), from where it was given on."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.records: dict[tuple[str, int], list[list[Any]]] = {}  # [offset, done, place]
        self.old: list[Place] = []
        self.stored: dict[tuple[str, int], int] = {}
        self.next: dict[tuple[str, int], int] = dict.fromkeys((P, Q), 0)

    @rule(partition=st.sampled_from([P, Q]))
    def give(self, partition: tuple[str, int]) -> None:
        if partition not in self.records:
            self.positions.give([partition])
            self.records[partition] = []

    @rule(partition=st.sampled_from([P, Q]))
    def take(self, partition: tuple[str, int]) -> None:
        self.positions.take([partition])
        self.old += [place for _, done, place in self.records.pop(partition, []) if not done]
        self.stored.pop(partition, None)

    @rule(partition=st.sampled_from([P, Q]), gap=st.integers(0, 3))
    def read(self, partition: tuple[str, int], gap: int) -> None:
        offset = self.next[partition] + gap
        place = self.positions.begin(partition, offset)
        assert (place is not None) == (partition in self.records)
        if place is not None:
            self.next[partition] = offset + 1
            self.records[partition].append([offset, False, place])

    @precondition(lambda self: any(not done for records in self.records.values() for _, done, _ in records))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        left = [record for records in self.records.values() for record in records if not record[1]]
        record = data.draw(st.sampled_from(left))
        record[1] = True
        self.positions.end(record[2])

    @precondition(lambda self: self.old)
    @rule()
    def end_of_a_partition_that_was_taken(self) -> None:
        self.positions.end(self.old.pop())

    @rule(fails=st.booleans())
    def commit(self, fails: bool) -> None:
        found = self.positions.collect()
        for topic, number, offset in found:
            lowest = next((o for o, done, _ in self.records[topic, number] if not done), None)
            assert lowest is None or offset <= lowest
            assert all(done for o, done, _ in self.records[topic, number] if o < offset)
            assert offset - 1 in [o for o, _, _ in self.records[topic, number]]
            assert offset != self.stored.get((topic, number))
            if not fails:
                self.stored[topic, number] = offset
        if fails:
            self.positions.give_back(found)
            assert sorted(self.positions.collect()) == sorted(found)
            self.positions.give_back(found)

    @invariant()
    def all_that_is_done_is_stored_at_the_end(self) -> None:
        for partition, records in self.records.items():
            begun = next((n for n, (_, done, _) in enumerate(records) if not done), len(records))
            assert self.positions.spread(partition) == len(records) - begun


def test_all_of_it_agrees_with_a_model() -> None:
    run_state_machine_as_test(Model)
