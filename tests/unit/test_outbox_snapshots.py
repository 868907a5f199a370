"""Which ranges of numbers are read once more in PostgreSQL: those in which a transaction may have committed since."""

from kbatch._outbox._snapshots import _MOST_GAPS, Gaps, Open, Snapshot


def snapshot(xmax: int, *running: int, given: int | None = None) -> Snapshot:
    return Snapshot(xmax, frozenset(running), xmax if given is None else given)


def test_the_text_of_a_snapshot() -> None:
    assert Snapshot.parsed("7:12:7,9,11", 3) == snapshot(12, 7, 9, 11, given=15)
    assert Snapshot.parsed("12:12:", 0) == snapshot(12)


def test_what_may_be_open_is_what_runs_and_what_began_since_the_last_that_ended() -> None:
    assert not snapshot(12).open().has_any()
    assert snapshot(12, 7, given=15).open() == Open(frozenset({7}), 12, 15)


def test_what_is_left_of_the_open_ones() -> None:
    were = Open(frozenset({7, 9}), 12, 15)
    assert were.left(snapshot(12, 7, 9, given=20)) == were
    assert were.left(snapshot(12, 9)) == Open(frozenset({9}), 12, 15)
    assert were.left(snapshot(14, 7, 9, 12)) == Open(frozenset({7, 9, 12}), 14, 15)  # 13 has ended
    assert were.left(snapshot(30, 7, 14, 20, 22)) == Open(frozenset({7, 14}), 0, 0)
    assert not were.left(snapshot(30, 20)).has_any()


def test_a_range_is_read_again_when_one_of_its_transactions_has_ended_and_not_before() -> None:
    gaps = Gaps()
    before = snapshot(12, 7, 9)
    gaps.was_read(0, 0, 100, before, is_empty=False)
    gaps.was_read(1, 0, 100, snapshot(12), is_empty=False)
    floors = {0: 100, 1: 100, 2: 0}
    assert gaps.to_read(floors, before) == {}
    after = snapshot(20, 9)
    assert gaps.to_read(floors, after) == {0: [(0, 100)]}
    assert gaps.to_read(floors, after) == {0: [(0, 100)]}  # it was not read yet
    gaps.was_read_again(0, 0, 100, after, is_empty=False)
    assert gaps.to_read(floors, after) == {}
    assert gaps.to_read(floors, snapshot(30)) == {0: [(0, 100)]}
    gaps.was_read_again(0, 0, 100, snapshot(30), is_empty=False)
    assert gaps._of == {}


def test_what_stays_open_keeps_one_range_however_many_readings_there_are() -> None:
    gaps = Gaps()
    for n in range(1, 1000):
        now = snapshot(10 * n, 7, 10 * n - 1)
        for low, high in gaps.to_read({0: n - 1}, now).get(0, []):
            assert (low, high) == (n - 2, n - 1)  # of the short transaction alone
            gaps.was_read_again(0, low, high, now, is_empty=False)
        gaps.was_read(0, n - 1, n, now, is_empty=False)
        assert len(gaps._of[0]) <= 2
    assert gaps.to_read({0: 999}, snapshot(10_000)) == {0: [(0, 999)]}


def test_of_a_range_a_part_was_read() -> None:
    gaps = Gaps()
    gaps.was_read(0, 0, 50, snapshot(12, 7), is_empty=False)
    gaps.was_read(0, 50, 100, snapshot(20, 7, 15), is_empty=False)
    after = snapshot(30)
    assert gaps.to_read({0: 100}, after) == {0: [(0, 100)]}
    gaps.was_read_again(0, 0, 70, after, is_empty=False)
    assert gaps.to_read({0: 100}, after) == {0: [(70, 100)]}


def test_what_lies_above_a_floor_that_fell_is_read_anyway() -> None:
    gaps = Gaps()
    gaps.was_read(0, 0, 50, snapshot(12, 7), is_empty=False)
    gaps.was_read(0, 50, 100, snapshot(20, 7, 15), is_empty=False)
    after = snapshot(30)
    assert gaps.to_read({0: 70}, after) == {0: [(0, 70)]}
    assert gaps.to_read({0: 30}, after) == {0: [(0, 30)]}
    assert gaps.to_read({0: 0}, after) == {}
    assert gaps._of == {}


def test_many_transactions_that_stay_open_are_looked_after_together() -> None:
    gaps = Gaps()
    count = 3 * _MOST_GAPS
    for n in range(count):
        gaps.was_read(0, n, n + 1, snapshot(1000 + n, *range(n + 1), given=1001 + n), is_empty=False)
    assert len(gaps._of[0]) == _MOST_GAPS
    assert gaps._of[0][0].low == 0
    assert gaps.to_read({0: count}, snapshot(5000, *range(1, count)))[0] == [(0, count)]


def test_readings_that_find_nothing_beside_other_transactions_keep_few_ranges() -> None:
    gaps = Gaps()
    most = 0
    for n in range(1, 500):  # 50 transactions are open, and one has ended since the last reading
        now = snapshot(n + 50, *range(n, n + 50))
        found = gaps.to_read({0: n - 1}, now).get(0, [])
        most = max(most, len(found), len(gaps._of.get(0, ())))
        for low, high in found:
            gaps.was_read_again(0, low, high, now, is_empty=True)
        gaps.was_read(0, n - 1, n, now, is_empty=True)
    assert most == 1
    assert gaps.to_read({0: 499}, snapshot(1_000)) == {0: [(0, 499)]}


def test_where_rows_were_found_late_nothing_is_looked_for_with_each_transaction_that_ends() -> None:
    gaps = Gaps()
    for n in range(2, 500):  # 1 stays open, and each other one has a row, which comes to light when it has ended
        now = snapshot(n + 1, 1, n)
        found = gaps.to_read({0: n - 1}, now).get(0, [])
        assert sum(high - low for low, high in found) <= 2
        for low, high in found:
            gaps.was_read_again(0, low, high, now, is_empty=False)
        gaps.was_read(0, n - 1, n, now, is_empty=True)
    assert len(gaps._of[0]) <= 2
