"""An exception at any line of a listener: Ctrl-C in `run`, no memory where it is decided what becomes of a record."""

import asyncio
import contextlib
import itertools
import threading
from typing import Any

import pytest

import kbatch
from kbatch import aio
from kbatch._fastmap import received
from kbatch._receiving._failing import Failing
from kbatch._receiving._failures import Failures
from tests.injection import Injector
from tests.unit.test_listener_reading import Consumer, P, reading_of
from tests.waiting import until

CONFIG = {"bootstrap.servers": "localhost:9", "group.id": "g", "log_level": 0}
OPTIONS: list[dict[str, Any]] = [
    {"concurrency": 2},
    {"dead_letter_topic": "dead"},
    {"transactional_id": "one"},
    {"inbox": kbatch.SqliteInbox("there is none.db")},
]
KINDS = [KeyboardInterrupt, MemoryError]


def names_of(options: dict[str, Any]) -> str:
    return " ".join(options)


def handlers() -> list[threading.Thread]:
    return [
        each
        for each in threading.enumerate()
        if each.name.startswith(("kbatch-handler", "kbatch-listener", "kbatch-inbox"))
    ]


@pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=names_of)
def test_a_run_that_was_interrupted_at_any_line_is_over(options: dict[str, Any], make: Any) -> None:
    listener = kbatch.Listener(CONFIG, ["orders"], lambda *_: None, **options)
    listener._check_inbox = lambda: None  # type: ignore[method-assign]
    for nth in itertools.count(1):
        listener.stop()  # so that it ends at once
        injector = Injector(nth, make)
        injector.run(listener.run)
        assert "not running" in repr(listener), injector.place
        listener.stop()
        with contextlib.suppress(kbatch.InboxError):
            listener.run()
        until(lambda: not handlers(), f"the end of threads after {injector.place}")
        if injector.place is None:
            break
    assert nth > 50


@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")
@pytest.mark.parametrize("make", [*KINDS, asyncio.CancelledError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=names_of)
def test_a_run_on_a_loop_that_was_interrupted_at_any_line_is_over(options: dict[str, Any], make: Any) -> None:
    async def handle(*_: Any) -> None: ...

    listener = aio.Listener(CONFIG, ["orders"], handle, **options)
    for nth in itertools.count(1):
        loop = asyncio.new_event_loop()
        listener.stop()
        injector = Injector(nth, make)
        injector.run(lambda: loop.run_until_complete(listener.run()))  # noqa: B023
        until(lambda: "not running" in repr(listener), f"its end after {injector.place}")
        listener.stop()
        loop.run_until_complete(listener.run())
        loop.close()
        until(lambda: not handlers(), f"the end of threads after {injector.place}")
        if injector.place is None:
            break
    assert nth > 50


class Copies:
    def send(self, work: Any, answer: Any) -> None:
        answer(None)


def settle_everywhere(handler: Any, work_of: Any, options: dict[str, Any]) -> None:
    """Has one record handled, with no memory at each line in turn: it never stays under way."""
    for nth in itertools.count(1):
        consumer = Consumer()
        reading = reading_of(consumer, P)
        consumer.records = [received("orders", 0, 0, 0, b"k", b"{}", ())]
        reading._turn()
        failures = Failures("billing", ["orders"], "kbatch", **options)
        injector = Injector(nth, MemoryError)
        work_of(injector, reading, Failing(failures, Copies()))
        assert reading._running == set(), injector.place
        if injector.place is None:
            return
        assert reading.is_stopping or reading.handled or reading.stats()["in_flight"] == 1, injector.place
        assert nth < 1_000


def raising(*_: Any) -> None:
    raise ValueError("no such customer")


CASES: list[tuple[Any, dict[str, Any]]] = [
    (lambda *_: None, {}),
    (raising, {}),
    (raising, {"retry": kbatch.RetryPolicy(max_attempts=1)}),
    (raising, {"retry": kbatch.RetryPolicy(max_attempts=1), "dead_letter_topic": "dead"}),
]
IDS = ["handled", "again", "the end", "dead"]


@pytest.mark.parametrize(("handler", "options"), CASES, ids=IDS)
def test_without_memory_at_any_line_no_record_stays_under_way(handler: Any, options: dict[str, Any]) -> None:
    def work(injector: Injector, reading: Any, failing: Failing) -> None:
        class Idle:
            def append(self, flag: Any) -> None:
                reading._is_over = True

        listener: Any = kbatch.Listener(CONFIG, ["orders"], handler)
        listener._idle = Idle()
        listener._failing = failing
        listener._decode = lambda envelope: None
        injector.run(lambda: listener._work(reading))

    settle_everywhere(handler, work, options)


@pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning")
@pytest.mark.parametrize(("handler", "options"), CASES, ids=IDS)
def test_without_memory_at_any_line_no_record_of_a_loop_stays_under_way(handler: Any, options: dict[str, Any]) -> None:
    async def handle(envelope: Any) -> None:
        await asyncio.sleep(0)
        handler(envelope)

    def work(injector: Injector, reading: Any, failing: Failing) -> None:
        listener = aio.Listener(CONFIG, ["orders"], handle)
        listener._failing = failing
        listener._decode = lambda envelope: None  # type: ignore[method-assign]

        async def main() -> None:
            handlers = aio._listener._Handlers(listener, asyncio.get_running_loop())
            handlers.reading = reading
            handlers._begin()
            if handlers._tasks:
                await asyncio.wait(handlers._tasks)

        loop = asyncio.new_event_loop()
        injector.run(lambda: loop.run_until_complete(main()))
        loop.close()

    settle_everywhere(handler, work, options)
