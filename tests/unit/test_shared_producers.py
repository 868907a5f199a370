"""Producers that senders share: who has which, when one is closed, and what takes a dead one's place."""

import gc
import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import kbatch
from kbatch import aio
from kbatch._recovery import _handle
from kbatch._recovery._handle import ProducerHandle
from tests.injection import Injector
from tests.waiting import until

SERVERS = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    yield
    gc.collect()
    assert not list(_handle._handles.values())
    assert not list(_handle._shared.values())


def make_fatal(producer: kbatch.Producer) -> None:
    producer._core.inject_fatal_error(45, "made up")
    with pytest.raises(kbatch.ProducerFatalError):
        producer.send_batch("orders", [kbatch.Envelope(1)])


# -- a producer that is the caller's


def test_a_producer_has_one_handle() -> None:
    one, other = kbatch.Producer(SERVERS), kbatch.Producer(SERVERS)
    handle = ProducerHandle.of(one)
    assert handle.producer is one
    assert ProducerHandle.of(one) is handle
    assert ProducerHandle.of(other) is not handle
    assert ProducerHandle.of(other).producer is other


def test_the_callers_producer_stays_open() -> None:
    producer = kbatch.Producer(SERVERS)
    handle = ProducerHandle.of(producer)
    for _ in range(2):
        assert handle.acquire().release(0) == 0
    assert not producer.closed


def test_a_handle_keeps_its_producer_and_a_producer_no_handle() -> None:
    handle = ProducerHandle.of(kbatch.Producer(SERVERS))
    gc.collect()
    assert handle.producer.stats()["batches"] == 0
    producer = handle.producer
    del handle
    gc.collect()
    assert not list(_handle._handles.values())
    assert not producer.closed


def test_a_dead_producer_is_replaced_once_for_all_its_users(caplog: pytest.LogCaptureFixture) -> None:
    with kbatch.Producer(SERVERS, source="shop") as given:
        first, second = ProducerHandle.of(given), ProducerHandle.of(given)
        uses = first.acquire(), second.acquire()
        make_fatal(given)
        first.replace(given)
        twin = first.producer
        assert twin is not given
        assert type(twin) is kbatch.Producer
        assert not twin._core.started()
        second.replace(given)  # it comes late
        assert second.producer is twin
        assert ProducerHandle.of(given) is ProducerHandle.of(twin) is first
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert not given.closed
        assert uses[0].release(0) == 0
        assert uses[0].release(0) == 0  # once more, and the other goes on
        assert not twin.closed
        assert uses[1].release(0) == 0
        assert twin.closed
        assert not given.closed


def test_who_comes_after_the_last_user_begins_with_the_callers_producer() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        use = handle.acquire()
        make_fatal(given)
        handle.replace(given)
        twin = handle.producer
        use.release(0)
        assert ProducerHandle.of(given).producer is given
        use = handle.acquire()
        handle.replace(given)
        assert handle.producer not in (given, twin)
        use.release(0)


def test_a_twin_that_dies_is_replaced_and_closed() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        use = handle.acquire()
        handle.replace(given)
        twin = handle.producer
        make_fatal(twin)
        handle.replace(twin)
        assert twin.closed
        assert not handle.producer.closed
        assert not given.closed
        use.release(0)


def test_nothing_is_replaced_for_nobody() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        handle.replace(given)
        assert handle.producer is given


def test_threads_that_find_a_producer_dead_agree_on_one_other() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        use = handle.acquire()
        barrier = threading.Barrier(8)
        found: list[object] = []

        def replace() -> None:
            barrier.wait()
            handle.replace(given)
            found.append(handle.producer)

        threads = [threading.Thread(target=replace) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1
        assert handle.producer is not given
        use.release(0)


# -- a producer made of settings


def test_settings_that_agree_share_a_producer_which_is_closed_with_its_last_user() -> None:
    prototypes = [kbatch.Producer(SERVERS) for _ in range(2)]
    first, second = (ProducerHandle.shared("settings", prototype) for prototype in prototypes)
    other = ProducerHandle.shared("other settings", prototypes[0])
    producer = first.handle.producer
    assert second.handle is first.handle
    assert other.handle is not first.handle
    assert other.handle.producer is not producer
    assert producer not in prototypes
    assert ProducerHandle.of(producer) is first.handle  # as a sender asks
    assert first.release(0) == 0
    assert not producer.closed
    assert second.release(0) == 0
    assert producer.closed
    assert not other.handle.producer.closed
    other.release(0)
    again = ProducerHandle.shared("settings", prototypes[1])
    assert again.handle.producer is not producer
    assert not again.handle.producer.closed
    again.release(0)
    assert not any(prototype.closed for prototype in prototypes)


def test_the_successor_of_a_shared_producer_is_shared_and_closed() -> None:
    prototype = kbatch.Producer(SERVERS)
    use = ProducerHandle.shared("settings", prototype)
    handle = use.handle
    dead = handle.producer
    assert isinstance(dead, kbatch.Producer)
    make_fatal(dead)
    handle.replace(dead)
    assert dead.closed
    other = ProducerHandle.shared("settings", prototype)
    assert other.handle is handle
    successor = handle.producer
    assert not successor.closed
    use.release(0)
    assert not successor.closed
    other.release(0)
    assert successor.closed


def test_a_shared_producer_that_somebody_closed_is_not_given_to_others() -> None:
    prototype = kbatch.Producer(SERVERS)
    closed = ProducerHandle.shared("settings", prototype)
    closed.handle.producer._core.close(0)
    use = ProducerHandle.shared("settings", prototype)
    assert not use.handle.producer.closed
    closed.release(0)
    other = ProducerHandle.shared("settings", prototype)
    assert other.handle is use.handle
    use.release(0)
    other.release(0)
    assert use.handle.producer.closed


def test_what_is_left_is_told_to_the_last_user() -> None:
    first = ProducerHandle.shared("settings", kbatch.Producer(SERVERS))
    producer = first.handle.producer
    last = ProducerHandle.shared("settings", producer)
    assert isinstance(producer, kbatch.Producer)
    pending = producer.submit("orders", [kbatch.Envelope(1)] * 3)
    assert first.release(0) == 0
    assert not pending.done()
    assert last.release(0) == 3
    assert pending.done()
    assert last.release(0) == 0


def test_a_use_that_is_forgotten_counts_no_more() -> None:
    first = ProducerHandle.shared("settings", kbatch.Producer(SERVERS))
    producer = first.handle.producer
    last = ProducerHandle.shared("settings", producer)
    del first
    last.release(0)
    assert producer.closed


@pytest.mark.parametrize("is_given", [False, True])
def test_a_release_that_is_interrupted_at_any_line_goes_on_when_it_is_called_again(is_given: bool) -> None:
    with kbatch.Producer(SERVERS) as prototype:
        for nth in itertools.count(1):
            if is_given:
                use = ProducerHandle.of(prototype).acquire()
                use.handle.replace(prototype)
            else:
                use = ProducerHandle.shared("settings", prototype)
            producer, solo = use.handle.producer, use.handle.solo()
            injector = Injector(nth)
            injector.run(lambda use=use: use.release(0))  # type: ignore[misc]
            with ExitStack() as others:  # somebody comes in between
                if is_given:
                    others.callback(ProducerHandle.of(prototype).acquire().release, 0)
                use.release(0)
            assert producer.closed
            assert solo is not None
            assert solo.closed, injector.place
            assert not use.handle._users
            if injector.place is None:
                break
        assert nth > 15
        assert not prototype.closed


@pytest.mark.parametrize("mode", [kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED])
def test_a_close_that_is_interrupted_at_any_line_closes_the_producer_when_it_is_called_again(
    mode: kbatch.SenderMode,
) -> None:
    topic = kbatch.KafkaTopic("orders", mode, config=SERVERS, close_timeout_s=0.0)
    places = 0
    for nth in itertools.count(1):
        sender = topic.create_sender()
        (handle,) = _handle._shared.values()
        producer = handle.producer
        injector = Injector(nth)
        injector.run(sender.close)
        sender.close()
        assert producer.closed, injector.place
        assert not handle._users
        if injector.place is None:
            break
        places += 1
    assert places > 15


@pytest.mark.parametrize("mode", [kbatch.SenderMode.INLINE, kbatch.SenderMode.BUFFERED])
def test_a_sender_that_is_interrupted_at_any_line_while_it_is_made_takes_no_producer_from_another(
    mode: kbatch.SenderMode,
) -> None:
    topic = kbatch.KafkaTopic("orders", mode, config=SERVERS, close_timeout_s=0.0)
    with topic.create_sender():
        (handle,) = _handle._shared.values()
        for nth in itertools.count(1):
            made: list[Any] = []
            injector = Injector(nth)
            injector.run(lambda made=made: made.append(topic.create_sender()))  # type: ignore[misc]
            if made:
                made.pop().close()
            # A collection that another thread is in makes this one do nothing.
            until(lambda: (gc.collect(), len(handle._users))[1] == 1, f"the end of what {injector.place} has left")
            assert not handle.producer.closed
            if injector.place is None:
                break
        assert nth > 15


def test_a_producer_for_asyncio_is_shared_and_closed_as_well() -> None:
    use = ProducerHandle.shared("settings", aio.Producer(SERVERS))
    handle = use.handle
    assert type(handle.producer) is aio.Producer
    handle.replace(handle.producer)
    assert type(handle.producer) is aio.Producer
    assert use.release(None) == 0
    assert handle.producer.closed
