"""One run of a listener without librdkafka: what a consumer tells it, step by step."""

import asyncio
import time
from typing import Any
from unittest import mock

import pytest

import kbatch
from kbatch import ListenerError, ProducerClosedError, aio
from kbatch._fastmap import received
from kbatch._receiving._failing import Failing
from kbatch._receiving._failures import Failures
from kbatch._receiving._lanes import BatchLanes, Lanes, Waiting, Work
from kbatch._receiving._reading import Limits, Reading
from kbatch.aio._listener import _Handlers

P, Q = ("orders", 0), ("orders", 1)


class Consumer:
    """Answers as it was told to."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.errors: list[Any] = []
        self.change: tuple[bool, list[tuple[str, int]]] | None = None
        self.is_lost = False
        self.commits: list[list[tuple[str, int, int]]] = []
        self.answers: list[list[tuple[str, int, int]]] = []
        self.answered = 0
        self.reads: list[tuple[list[tuple[str, int]], bool]] = []
        self.most: list[int] = []

    def poll(self, most: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.most.append(most)
        records, self.records = self.records, []
        errors, self.errors = self.errors, []
        return records, errors

    def rebalance(self) -> tuple[bool, list[tuple[str, int]]] | None:
        return self.change

    def answer(self) -> None:
        self.change = None
        self.answered += 1

    def assignment_lost(self) -> bool:
        return self.is_lost

    def commit(self, offsets: list[tuple[str, int, int]], timeout: float) -> list[Any]:
        self.commits.append(offsets)
        return []

    def begin_commit(self, offsets: list[tuple[str, int, int]]) -> int:
        self.commits.append(offsets)
        return 0

    def commit_answer(self, offsets: list[tuple[str, int, int]]) -> list[tuple[str, int, int]] | None:
        return self.answers.pop() if self.answers else None

    def read(self, partitions: list[tuple[str, int]], wanted: bool = True) -> None:
        self.reads.append((partitions, wanted))

    def wake(self) -> None:
        pass

    def started(self) -> bool:
        return False

    def close(self, timeout: float) -> None:
        pass


def record(
    offset: int, partition: int = 0, key: bytes | None = None, topic: str = "orders", due: float | None = None
) -> Any:
    headers = () if due is None else (("retry-due-at", b"%d" % (due * 1000)),)
    return received(topic, partition, offset, 1, key, b"x", headers)


def reading_of(
    consumer: Consumer,
    *partitions: tuple[str, int],
    records: int = 100,
    close_timeout_s: float = 60,
    retry_topics: tuple[float, ...] = (),
    waiting: Waiting | None = None,
) -> Any:
    failures = Failures("billing", ["orders"], "kbatch", retry_topics=retry_topics)
    limits = Limits(records, 1_000_000, 0.0, close_timeout_s, 300.0)
    lanes = Lanes() if waiting is None else waiting
    reading: Any = Reading(consumer, ["orders"], lanes, limits, lambda each: each.key, failures, lambda count: None)  # type: ignore[arg-type]
    consumer.change = (True, list(partitions))
    reading._turn()
    assert consumer.answered == 1
    return reading


def take(reading: Any, count: int) -> list[Work]:
    works = [reading.take() for _ in range(count)]
    assert None not in works
    return works


def test_a_rebalance_waits_for_what_runs_and_commits_it() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, Q)
    consumer.records = [record(0), record(1), record(0, 1)]
    reading._turn()
    first, _, other = take(reading, 3)
    consumer.change = (False, [P])
    reading.done(first)
    reading._turn()
    assert consumer.answered == 1
    reading.done(other)
    reading._turn()
    assert consumer.answered == 1  # the second record of the partition still runs
    assert ("orders", 0, 2) not in [offset for commit in consumer.commits for offset in commit]
    reading.done(_)
    reading._turn()
    assert consumer.answered == 2
    assert ("orders", 0, 2) in consumer.commits[-1]


def test_what_waits_of_a_partition_that_leaves_does_not_begin() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, Q)
    consumer.records = [record(0), record(1), record(0, 1)]
    reading._turn()
    (running,) = take(reading, 1)
    consumer.change = (False, [P])
    reading._turn()
    consumer.records = [record(2)]  # by the group's queue
    reading._turn()
    reading.done(running)
    reading._turn()
    assert consumer.answered == 2
    assert [work.partition for work in take(reading, 1)] == [Q]
    assert reading.take() is None
    assert reading.stats()["in_flight"] == 1


def test_what_is_put_off_while_a_rebalance_begins_does_not_begin() -> None:
    consumer = Consumer()
    reading, batch = split_batch(consumer)

    class Lock:  # after each time that it is held, another thread comes
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            if steps:
                steps.pop()()

    taken: list[Work | None] = []
    steps = [lambda: taken.append(reading.take()), lambda: reading.put_off(batch, 0.0)]
    lock, reading.lock = reading.lock, Lock()
    reading._rebalance(False, [P])
    assert taken == [None]
    assert consumer.answered == 2


def test_a_partition_that_was_lost_is_given_up_at_once_and_not_committed() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0), record(1)]
    reading._turn()
    first, second = take(reading, 2)
    reading.done(first)
    consumer.commits.clear()
    consumer.change, consumer.is_lost = (False, [P]), True
    reading._look(0, 0.0)
    assert consumer.answered == 2
    reading.done(second)
    reading._turn()
    assert consumer.commits == []


def test_a_partition_that_is_lost_while_its_handlers_are_waited_for_is_not_committed() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0), record(1)]
    reading._turn()
    first, _ = take(reading, 2)
    consumer.change = (False, [P])
    reading._turn()
    consumer.is_lost = True
    reading.done(first)
    reading._turn()
    assert (consumer.answered, consumer.commits) == (2, [])


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_record_whose_partition_another_member_has_by_now_is_sent_nowhere(
    is_lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = Consumer()
    once = kbatch.RetryPolicy(max_attempts=1)
    listener = kbatch.Listener(
        {"bootstrap.servers": "localhost:1", "group.id": "billing"}, ["orders"], print, retry=once,
        dead_letter_topic="dead",
    )  # fmt: skip
    reading = reading_of(consumer, P, close_timeout_s=0)
    consumer.records = [record(0), record(1)]
    reading._turn()
    first, second = take(reading, 2)
    assert listener._fail(reading, first, ValueError("mine"))  # its copy is sent next
    reading.done(first)
    consumer.change, consumer.is_lost = (False, [P]), is_lost
    reading._turn()
    caplog.clear()
    assert not listener._fail(reading, second, ValueError("too late"))
    assert second.copy is None
    assert len(caplog.records) == 1
    assert "ValueError: too late" in caplog.text
    assert reading.stats()["in_flight"] == 0
    assert listener._failing.stats()["attempts_failed"] == 2
    assert not reading.is_stopping


def test_a_record_whose_handler_fails_after_the_end_is_read_again_and_sent_nowhere() -> None:
    listener = kbatch.Listener(
        {"bootstrap.servers": "localhost:1", "group.id": "billing"}, ["orders"], print, dead_letter_topic="dead",
        retry=kbatch.RetryPolicy(max_attempts=1),
    )  # fmt: skip
    reading = reading_of(Consumer(), P, close_timeout_s=0)
    reading.core.records = [record(0), record(1)]
    reading._turn()
    first, second = take(reading, 2)
    reading.stop()
    reading.run()
    assert not listener._fail(reading, first, ValueError("too late"))
    assert first.copy is None
    second.copy = kbatch.Envelope(data=b"x", topic="dead")  # it had failed right before
    listener._failing.send_on(reading, second)
    assert (reading.error, reading.stats()["in_flight"]) == (None, 0)
    assert listener._failing.stats()["dead"] == 0


@pytest.mark.parametrize("is_leaving", [True, False])
def test_what_was_handled_of_a_batch_that_was_split_is_committed_when_its_partition_leaves(is_leaving: bool) -> None:
    consumer = Consumer()
    reading, batch = split_batch(consumer)
    if is_leaving:
        consumer.change = (False, [P])
        reading._turn()
    Failing(reading._failures, None).handled(reading, batch)
    consumer.change = (False, [P])
    reading._turn()
    assert consumer.commits == [[("orders", 0, 1)]]
    assert consumer.answered == 2
    stats = reading.stats()
    assert (stats["handled"], stats["in_flight"]) == (1, 0)


def test_each_record_of_a_batch_that_was_split_counts_once() -> None:
    def counts() -> tuple[int, int, int]:
        stats = reading.stats()
        return stats["handled"], stats["in_flight"], stats["running"]

    reading, batch = split_batch(Consumer())
    failing = Failing(reading._failures, None)
    assert counts() == (0, 3, 3)
    failing.handled(reading, batch)
    assert counts() == (1, 2, 0)
    for _ in range(2):
        assert take(reading, 1) == [batch]
        assert counts() == (1, 2, 2)
        reading.put_off(batch, 0.0)  # its second record fails
    assert counts() == (1, 2, 0)
    for _ in range(2):
        assert take(reading, 1) == [batch]
        failing.handled(reading, batch)
    assert counts() == (3, 0, 0)
    assert reading._positions.collect() == [("orders", 0, 3)]


def test_what_waits_behind_a_record_is_not_left_to_the_next_poll_when_its_copy_is_stored() -> None:
    woken: list[int] = []
    reading = reading_of(Consumer(), P)
    reading.core.records = [record(n, key=b"k") for n in range(3)]
    reading._turn()
    reading._wake = woken.append
    reading.done(take(reading, 1)[0])
    assert woken == []  # the thread that has handled it takes the next one
    for expected in ([1], [1]):
        (work,) = take(reading, 1)
        work.copy = kbatch.Envelope(data=b"x", topic="dead")
        Failing(reading._failures, None).sent_on(reading, work, None)
        assert woken == expected  # nothing waits behind the last one
    assert reading.stats()["handled"] == 3


def split_batch(consumer: Consumer) -> tuple[Any, Work]:
    """A run that handles the first one of three records alone."""
    reading = reading_of(consumer, P, waiting=BatchLanes(3, 0.0))
    consumer.records = [record(0), record(1), record(2)]
    reading._turn()
    (batch,) = take(reading, 1)
    assert batch.split()
    reading.put_off(batch, 0.0)
    assert take(reading, 1) == [batch]
    return reading, batch


def test_what_came_while_a_partition_left_is_forgotten_when_it_comes_back() -> None:
    consumer = Consumer()
    topic, later = "billing.retry.5", time.time() + 5
    reading = reading_of(consumer, (topic, 0), retry_topics=(5,))
    consumer.records = [record(0, topic=topic)]
    reading._turn()
    (running,) = take(reading, 1)
    consumer.change = (False, [(topic, 0)])
    reading._turn()
    consumer.records = [record(7, topic=topic, due=later)]  # by the group's queue
    reading._turn()
    reading.done(running)
    reading._turn()
    consumer.change = (True, [(topic, 0)])
    reading._turn()
    consumer.records = [record(1, topic=topic)]
    reading._turn()
    assert [work.places[0].offset for work in take(reading, 1)] == [1]


def test_a_handlers_error_is_told_if_something_else_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0), record(1)]
    reading._turn()
    first, _ = take(reading, 2)
    reading.fail(first, ValueError("of a handler"))
    with mock.patch.object(consumer, "poll", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        reading.run()
    assert "of a handler" in caplog.text


def test_a_consumer_that_is_closed_while_handlers_are_waited_for_is_one_of_a_listener() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0)]
    reading._turn()
    take(reading, 1)
    reading.stop()
    with (
        mock.patch.object(consumer, "poll", side_effect=ProducerClosedError("the consumer is closed")),
        pytest.raises(ListenerError, match="the listener's consumer was closed under it"),
    ):
        reading.run()


def test_a_rebalance_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, close_timeout_s=0)
    consumer.records = [record(7)]
    reading._turn()
    take(reading, 1)
    consumer.change = (False, [P])
    reading._turn()
    assert consumer.answered == 2
    assert "orders [0] at offset 7" in caplog.text


def test_a_full_partition_is_read_again_when_half_of_it_is_done() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, Q)
    consumer.records = [record(offset) for offset in range(40)]
    reading._turn()
    assert consumer.reads == [([P], False)]
    works = take(reading, 40)
    for work in works[:19]:
        reading.done(work)
    reading._turn()
    assert len(consumer.reads) == 1
    reading.done(works[19])
    reading._turn()
    assert consumer.reads[1:] == [([P], True)]


def test_without_room_nothing_is_read() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, records=3)
    consumer.records = [record(offset) for offset in range(3)]
    reading._turn()
    reading._turn()
    assert consumer.most[-1] == 0
    reading.done(take(reading, 1)[0])
    reading._turn()
    assert consumer.most[-1] == 1


@pytest.mark.parametrize(("due", "room"), [(100, 0), (60, 40), (150, 0)])
def test_what_comes_due_takes_room_from_what_is_read_next(due: int, room: int) -> None:
    consumer = Consumer()
    topic = "billing.retry.5"
    reading = reading_of(consumer, P, (topic, 0), records=100, retry_topics=(5,))
    reading._mean_size = 100.0
    for offset in range(due):
        reading._delayed.add((topic, 0), record(offset, topic=topic), 0.0)
    reading._turn()
    assert consumer.most[-1] == room
    assert reading.stats()["in_flight"] == 100 - room


def test_a_commit_that_fails_is_collected_again_and_one_that_a_rebalance_has_overtaken_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [record(0)]
    reading._turn()
    reading.done(take(reading, 1)[0])
    for code in (27, 28, 28):  # REBALANCE_IN_PROGRESS, INVALID_COMMIT_OFFSET_SIZE
        reading._turn()
        consumer.answers = [[("orders", 0, code)]]
        reading._turn()
    reading._turn()
    assert consumer.commits.count([("orders", 0, 1)]) >= 3
    assert len(caplog.records) == 1
    consumer.answers = [[]]
    reading._turn()
    count = len(consumer.commits)
    reading._turn()
    assert len(consumer.commits) == count


@pytest.mark.parametrize("code", [-150, -140, 29, 30, 82])
def test_what_nobody_can_go_on_after_ends_the_run(code: int) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.errors = [(code, "no", "orders", 0, -1)]
    reading._turn()
    assert reading.is_stopping
    assert isinstance(reading.error, ListenerError)
    assert reading.error.code == code


def test_other_errors_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    for _ in range(50):
        consumer.errors = [(3, "unknown", "orders", -1, -1), (-191, "the end", "orders", 0, 5)]
        reading._turn()
    assert not reading.is_stopping
    assert len(caplog.records) == 1
    reading.close()


def test_headers_count_among_the_bytes_in_flight() -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P)
    consumer.records = [received("orders", 0, n, 1, None, b"x", [("h", bytes(600_000))]) for n in range(2)]
    reading._turn()
    assert 1_200_000 < reading.stats()["in_flight_bytes"] < 1_210_000
    consumer.records = []
    reading._turn()
    assert consumer.most[-1] == 0


def test_a_commit_that_fails_for_one_partition_of_several_is_told_and_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    consumer = Consumer()
    reading = reading_of(consumer, P, Q)
    consumer.records = [record(0), record(0, 1)]
    reading._turn()
    for work in take(reading, 2):
        reading.done(work)
    reading._turn()
    assert [sorted(offsets) for offsets in consumer.commits] == [[("orders", 0, 1), ("orders", 1, 1)]]
    consumer.answers = [[("orders", 1, 3)]]  # UNKNOWN_TOPIC_OR_PART
    reading._turn()
    reading._turn()
    assert consumer.commits[1:] == [[("orders", 1, 1)]]
    assert "could not commit 1 offset, and tries again" in caplog.text


def test_what_a_loop_cannot_take_ends_no_record_whose_handler_runs() -> None:
    async def handle(envelope: Any) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        config = {"bootstrap.servers": "localhost:1", "group.id": "billing"}
        handlers = _Handlers(aio.Listener(config, ["orders"], handle, concurrency=2), asyncio.get_running_loop())
        reading = reading_of(Consumer(), P)
        reading.core.records = [record(0)]
        reading._turn()
        handlers.reading = mock.Mock(wraps=reading)
        (work,) = take(reading, 1)
        error = MemoryError("no memory for the next")
        handlers.reading.take.side_effect = [work, error]
        handlers._begin()
        await asyncio.sleep(0)
        assert (reading.error, reading.stats()["running"], reading.stats()["failed"]) == (error, 1, 0)
        handlers.cancel()
        while reading.stats()["running"]:
            await asyncio.sleep(0)
        assert reading.stats()["abandoned"] == 1

    asyncio.run(main())
