"""What becomes a dead letter is told one after the other, whatever its callback does; nobody waits for it."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import kbatch
from kbatch import OutboxError, aio
from kbatch._recovery._deaths import Deaths
from kbatch._recovery._user_calls import UserCalls
from tests.waiting import until

NOWHERE = {"bootstrap.servers": "127.0.0.1:1", "group.id": "billing"}


class Scene:
    """Numbers have died, and what is told of each is its text."""

    def __init__(self, on_dead: Any = None, **options: Any) -> None:
        self.told: list[str] = []
        self.asked: list[list[int]] = []
        self.failures = 0  # of the next calls
        self.gone: set[int] = set()
        self.calls = UserCalls()
        on_dead = on_dead or self.told.append
        self.deaths: Deaths[int] = Deaths(self.calls, on_dead, self.look_up, "the test", **options)

    def look_up(self, numbers: list[int]) -> Iterator[tuple[str, tuple[str]]]:
        self.asked.append(numbers)
        if self.failures:
            self.failures -= 1
            raise OutboxError("the database is away")
        yield from ((f"number {number}", (str(number),)) for number in numbers if number not in self.gone)


def test_all_are_told_in_order() -> None:
    scene = Scene()
    scene.deaths.put(range(60))
    scene.deaths.put(range(60, 120))
    scene.deaths.join(10.0)
    assert scene.told == [str(number) for number in range(120)]
    assert max(map(len, scene.asked)) == 50
    assert scene.deaths.left == 0


def test_what_is_gone_when_it_is_looked_up_is_not_told() -> None:
    scene = Scene()
    scene.gone = {0, 2}
    scene.deaths.put(range(4))
    scene.deaths.join(10.0)
    assert scene.told == ["1", "3"]


def test_what_cannot_be_looked_up_is_looked_up_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbatch._recovery._deaths._TRY_AGAIN_S", 0.0)
    scene = Scene()
    scene.failures = 2
    scene.deaths.put([1])
    until(lambda: scene.deaths._again_at is not None, "the first time")
    until(lambda: scene.deaths.tell_again() or scene.told, "the third time")
    scene.deaths.join(10.0)
    assert scene.told == ["1"]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["on_dead waits, since the dead letters of the test cannot be read: the database is away"]


def test_one_that_raises_is_logged_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def on_dead(number: str) -> None:
        told.append(number)
        if number == "1":
            raise SystemExit("no more")

    scene = Scene(on_dead)
    scene.deaths.put(range(3))
    scene.deaths.join(10.0)
    assert told == ["0", "1", "2"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("on_dead failed: ")
    assert record.getMessage().endswith("on_dead; of number 1")
    assert record.exc_info is not None


def test_behind_one_that_hangs_a_number_waits_and_the_rest_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hangs, goes_on, told = threading.Event(), threading.Event(), []

    def on_dead(number: str) -> None:
        hangs.set()
        goes_on.wait(60)
        told.append(number)

    scene = Scene(on_dead, most_waiting=5)
    scene.deaths.put([0])
    assert hangs.wait(30)
    for number in range(1, 10):
        scene.deaths.put([number])
    scene.deaths.join(0.01)
    until(lambda: caplog.records, "that it was not told")
    assert caplog.records[0].getMessage() == "on_dead was not told yet of 10 dead letters of the test"
    goes_on.set()
    scene.deaths.join(10.0)
    assert told == ["0", "1", "2", "3", "4", "5"]
    text = "on_dead is not told of 4 dead letters of the test: too many have waited for slow calls of it"
    assert caplog.records[1].getMessage() == text


def test_large_ones_wait_to_a_bound_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbatch._recovery._deaths.KEPT_BYTES", 100)
    goes_on, told = threading.Event(), []

    def on_dead(number: str) -> None:
        goes_on.wait(60)
        told.append(number)

    scene = Scene(on_dead)
    scene.deaths.put([0], 1000)  # one, however large
    until(lambda: len(scene.deaths._found) == 1, "its call")
    scene.deaths.put([1], 1000)
    scene.deaths.put([2], 1)
    goes_on.set()
    scene.deaths.join(10.0)
    scene.deaths.put([3], 60)
    scene.deaths.join(10.0)
    assert told == ["0", "1", "3"]


def test_a_callback_that_waits_for_the_end_of_its_calls_does_not_wait_for_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def on_dead(number: str) -> None:
        scene.deaths.join(60.0)
        scene.told.append(number)

    scene = Scene(on_dead)
    scene.deaths.put([0, 1])
    scene.deaths.join(10.0)
    assert scene.told == ["0", "1"]
    assert caplog.records == []


def test_a_forked_child_forgets_what_its_parent_tells_and_tells_what_comes_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene()
    with monkeypatch.context() as patch:
        patch.setattr(scene.calls, "put_surely", lambda *call: None)  # the parent's thread is not there
        scene.deaths.put(range(3))
    scene.deaths.forget()
    assert scene.deaths.left == 0
    scene.deaths.put([3])
    scene.deaths.join(10.0)
    assert scene.told == ["3"]


async def told_later(envelope: Any, error: Exception) -> None: ...


async def handled(envelope: Any) -> None: ...


def test_a_listener_refuses_what_it_could_never_tell() -> None:
    options: Any = {"dead_letter_topic": "dead"}
    with pytest.raises(kbatch.ConfigError, match=r"on_dead must not be a coroutine function; kbatch\.aio\.Listener"):
        kbatch.Listener(NOWHERE, ["orders"], print, on_dead=told_later, **options)
    with pytest.raises(kbatch.ConfigError, match="on_dead is told of what is in the dead letter topic"):
        kbatch.Listener(NOWHERE, ["orders"], print, on_dead=print)
    aio.Listener(NOWHERE, ["orders"], handled, on_dead=told_later, **options)
    aio.Listener(NOWHERE, ["orders"], handled, on_dead=print, **options)


def test_close_of_a_listener_that_never_ran_ends_at_once() -> None:
    kbatch.Listener(NOWHERE, ["orders"], print, on_dead=print, dead_letter_topic="dead").close()
    listener = aio.Listener(NOWHERE, ["orders"], handled, on_dead=told_later, dead_letter_topic="dead")
    asyncio.run(listener.close())
