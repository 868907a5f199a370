"""What the sides do that send one message at a time, with a client that is none: `make bench-test`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.broker import MockBroker
from benchmarks.side_process import Side
from benchmarks.sides.base import Pace, Spec
from benchmarks.sides.one_at_a_time import Turns, percentiles, shares

MESSAGES = list(range(10))


class Late:
    """Acknowledges what it is sent at the second look."""

    def __init__(self) -> None:
        self.messages = MESSAGES
        self.sent: list[int] = []
        self._seen = self._flushed = 0

    def sending(self) -> Any:
        return self.sent.append

    def waiting(self) -> int:
        before, self._seen = self._seen, len(self.sent)
        return len(self.sent) - before

    def flush(self) -> int:
        before, self._flushed = self._flushed, len(self.sent)
        return len(self.sent) - before

    def close(self) -> dict[str, Any]:
        return {}


def turns(client: Late, **options: Any) -> Turns:
    return Turns(client, Spec("", "", 1, options=options))


def test_shares_are_all_messages_from_different_places() -> None:
    assert list(shares(7, MESSAGES, 2)) == [[0, 1, 2, 3], [5, 6, 7]]
    assert list(shares(12, MESSAGES, 1)) == [[*MESSAGES, 0, 1]]


def test_percentiles_of_a_name() -> None:
    found = percentiles([*range(1000)][::-1], "empty_")
    assert found == {"empty_p50": 500, "empty_p99": 989, "empty_p99.9": 998, "empty_max": 999}


@pytest.mark.parametrize("threads", [1, 3])
def test_all_messages_of_a_turn_are_sent(threads: int) -> None:
    client = Late()
    assert turns(client, threads=threads).take(25, 0, None) == (25, {}, None)
    assert len(client.sent) == 25


def test_the_messages_of_other_yardsticks_are_not_acknowledged() -> None:
    client = Late()
    acknowledged, extra, _ = turns(client, calls="cost").take(20, 0, None)
    assert acknowledged == len(client.sent) == 20
    assert extra.keys() >= {"cpu", "wall", "p50", "p99", "p99.9", "max", "empty_cpu", "append_cpu", "queue_cpu"}


def test_a_paced_message_is_timed_from_when_it_was_due_to_when_it_was_seen() -> None:
    client = Late()
    interval_ns = 1_000_000
    acknowledged, _, pace = turns(client).take(20, interval_ns, Pace(20, interval_ns))
    assert acknowledged == 20
    assert client.sent == [*MESSAGES, *MESSAGES]
    assert pace is not None
    assert all(waited >= 0 for waited in pace.waited_ns)
    assert all(served > 0 for served in pace.served_ns)


def test_awaited_calls_are_timed_each() -> None:
    client = Late()
    *_, pace = turns(client, calls="awaited", threads=2).take(9, 0, None)
    assert pace is not None
    assert len(pace.served_ns) == 9


@contextmanager
def produce_side(**options: Any) -> Iterator[Side]:
    with MockBroker() as broker:
        spec = Spec(broker.bootstrap_servers, broker.new_topic("produce", 4), 1, options=options)
        with Side("produce", spec) as side:
            yield side


@pytest.mark.parametrize("form", ["errors-only", "callback"])
def test_produce_waits_for_room_when_the_queue_is_full(form: str) -> None:
    with produce_side(form=form, queue=100, threads=2) as side:
        assert side.run(2_000).acknowledged == 2_000


@pytest.mark.parametrize("form", ["flush", "future"])
def test_produce_that_is_awaited(form: str) -> None:
    with produce_side(form=form, calls="awaited", threads=2, linger_ms=0) as side:
        assert len(side.run(20).served_ns) == 20
