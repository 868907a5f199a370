"""Producers that senders share: who has which, when one is closed, and what takes a dead one's place."""

import gc
import logging
import threading
from collections.abc import Iterator

import pytest

import kbatch
from kbatch import aio
from kbatch._recovery import _handle
from kbatch._recovery._handle import ProducerHandle

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
        handle.acquire()
        assert handle.release(0) == 0
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
        first.acquire()
        second.acquire()
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
        assert first.release(0) == 0
        assert not twin.closed
        assert second.release(0) == 0
        assert twin.closed
        assert not given.closed


def test_who_comes_after_the_last_user_begins_with_the_callers_producer() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        handle.acquire()
        make_fatal(given)
        handle.replace(given)
        twin = handle.producer
        handle.release(0)
        assert ProducerHandle.of(given).producer is given
        handle.acquire()
        handle.replace(given)
        assert handle.producer not in (given, twin)
        handle.release(0)


def test_a_twin_that_dies_is_replaced_and_closed() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        handle.acquire()
        handle.replace(given)
        twin = handle.producer
        make_fatal(twin)
        handle.replace(twin)
        assert twin.closed
        assert not handle.producer.closed
        assert not given.closed
        handle.release(0)


def test_nothing_is_replaced_for_nobody() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        handle.replace(given)
        assert handle.producer is given


def test_threads_that_find_a_producer_dead_agree_on_one_other() -> None:
    with kbatch.Producer(SERVERS) as given:
        handle = ProducerHandle.of(given)
        handle.acquire()
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
        handle.release(0)


# -- a producer made of settings


def test_settings_that_agree_share_a_producer_which_is_closed_with_its_last_user() -> None:
    prototypes = [kbatch.Producer(SERVERS) for _ in range(2)]
    first, second = (ProducerHandle.shared("settings", prototype) for prototype in prototypes)
    other = ProducerHandle.shared("other settings", prototypes[0])
    producer = first.producer
    assert second is first
    assert other is not first
    assert other.producer is not producer
    assert producer not in prototypes
    assert ProducerHandle.of(producer) is first  # as a sender asks
    assert first.release(0) == 0
    assert not producer.closed
    assert second.release(0) == 0
    assert producer.closed
    assert not other.producer.closed
    other.release(0)
    again = ProducerHandle.shared("settings", prototypes[1])
    assert again.producer is not producer
    assert not again.producer.closed
    again.release(0)
    assert not any(prototype.closed for prototype in prototypes)


def test_the_successor_of_a_shared_producer_is_shared_and_closed() -> None:
    prototype = kbatch.Producer(SERVERS)
    handle = ProducerHandle.shared("settings", prototype)
    dead = handle.producer
    assert isinstance(dead, kbatch.Producer)
    make_fatal(dead)
    handle.replace(dead)
    assert dead.closed
    assert ProducerHandle.shared("settings", prototype) is handle
    successor = handle.producer
    assert not successor.closed
    handle.release(0)
    handle.release(0)
    assert successor.closed


def test_a_shared_producer_that_somebody_closed_is_not_given_to_others() -> None:
    prototype = kbatch.Producer(SERVERS)
    closed = ProducerHandle.shared("settings", prototype)
    closed.producer._core.close(0)
    handle = ProducerHandle.shared("settings", prototype)
    assert not handle.producer.closed
    closed.release(0)
    assert ProducerHandle.shared("settings", prototype) is handle
    handle.release(0)
    handle.release(0)
    assert handle.producer.closed


def test_what_is_left_is_told_to_the_last_user() -> None:
    handle = ProducerHandle.shared("settings", kbatch.Producer(SERVERS))
    ProducerHandle.shared("settings", handle.producer)
    assert isinstance(handle.producer, kbatch.Producer)
    pending = handle.producer.submit("orders", [kbatch.Envelope(1)] * 3)
    assert handle.release(0) == 0
    assert not pending.done()
    assert handle.release(0) == 3
    assert pending.done()


def test_a_producer_for_asyncio_is_shared_and_closed_as_well() -> None:
    handle = ProducerHandle.shared("settings", aio.Producer(SERVERS))
    assert type(handle.producer) is aio.Producer
    handle.replace(handle.producer)
    assert type(handle.producer) is aio.Producer
    assert handle.release(None) == 0
    assert handle.producer.closed
