"""Which buckets a relay has and until when, by two clocks."""

from kbatch._outbox._leases import Leases, Times
from kbatch._outbox._store import Lease


def leases_of(*buckets: int, token: int = 1) -> list[Lease]:
    return [Lease(bucket, token) for bucket in buckets]


def test_a_lease_counts_from_before_it_was_asked_for() -> None:
    leases = Leases(10.0)
    assert leases.left_s(Times(100.0, 1000.0)) == 0.0
    assert leases.renewed(Times(100.0, 1000.0), leases_of(1, 2), 64) == set()
    assert leases.left_s(Times(103.0, 1003.0)) == 7.0


def test_the_clock_that_says_less_counts() -> None:
    leases = Leases(10.0)
    leases.renewed(Times(100.0, 1000.0), leases_of(1), 64)
    assert leases.left_s(Times(101.0, 1009.0)) == 1.0  # the machine was suspended
    assert leases.left_s(Times(109.0, 1001.0)) == 1.0
    assert leases.left_s(Times(101.0, 900.0)) < 0.0  # set back: nobody knows


def test_what_is_gone_or_has_another_token_is_lost() -> None:
    leases = Leases(10.0)
    leases.renewed(Times(0.0, 0.0), leases_of(1, 2, 3), 64)
    assert leases.renewed(Times(1.0, 1.0), [*leases_of(1), *leases_of(2, token=2)], 64) == {2, 3}
    assert leases.tokens == {1: 1, 2: 2}
    assert leases.forget() == {1, 2}
    assert leases.left_s(Times(1.0, 1.0)) == 0.0


def test_the_surplus_leaves_and_stays_when_another_relay_is_gone() -> None:
    leases = Leases(10.0)
    leases.renewed(Times(0.0, 0.0), leases_of(1, 2, 3, 4), 2)
    assert leases.leaving == {3, 4}
    assert leases.to_read() == [1, 2]
    leases.renewed(Times(0.0, 0.0), leases_of(1, 2, 3, 4), 2)
    assert leases.leaving == {3, 4}
    leases.drop([4])
    assert (leases.tokens, leases.leaving) == ({1: 1, 2: 1, 3: 1}, {3})
    leases.renewed(Times(0.0, 0.0), leases_of(1, 2, 3), 4)
    assert leases.leaving == set()
