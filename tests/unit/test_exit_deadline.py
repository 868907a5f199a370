"""The end of the interpreter has one deadline for all senders and producers; on a clock of its own."""

from collections.abc import Iterator
from typing import Any

import pytest

from kbatch import _exit


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Stuck:
    """Waits as long as it may, whatever it is asked."""

    def __init__(self, clock: Clock, calls: list[tuple[str, float]]) -> None:
        self.clock, self.calls = clock, calls

    def _wait(self, name: str, until: float) -> int:
        self.calls.append((name, until - self.clock.now))
        self.clock.now = max(self.clock.now, until)
        return 1

    def _begin_end(self) -> None:
        self.calls.append(("begin_end", 0))

    def _await_end(self, end: float) -> int:
        return self._wait("await_end", end)

    def __getattr__(self, name: str) -> Any:
        return lambda timeout: self._wait(name.strip("_"), self.clock.now + timeout)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    clock = Clock()
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(_exit, "monotonic", clock.monotonic)
    monkeypatch.setattr(_exit, "SENDERS", [Stuck(clock, calls) for _ in range(3)])
    monkeypatch.setattr(_exit, "CORES", [Stuck(clock, calls) for _ in range(2)])
    return calls


def test_senders_that_never_end_share_the_time(calls: list[tuple[str, float]]) -> None:
    _exit._close_all()
    assert calls == [
        *[("drain", 0)] * 3,  # each sends what it has, before any is waited for
        *[("drain", 5.0), ("drain", 0), ("drain", 0)],
        *[("begin_end", 0)] * 3,
        *[("await_end", _exit._LAST_WORDS_S), ("await_end", 0), ("await_end", 0)],
        *[("close", 0)] * 2,
    ]


def test_a_thread_that_makes_a_sender_meanwhile_keeps_none_from_its_end(
    calls: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing(list[Any]):
        looks = 0

        def __iter__(self) -> Iterator[Any]:
            self.looks += 1
            if self.looks == 1:
                raise RuntimeError("Set changed size during iteration")
            return super().__iter__()

    for name in ("SENDERS", "CORES"):
        monkeypatch.setattr(_exit, name, Changing(getattr(_exit, name)))
    _exit._close_all()
    assert [name for name, _ in calls] == ["drain"] * 6 + ["begin_end"] * 3 + ["await_end"] * 3 + ["close"] * 2


def test_those_of_a_child_of_multiprocessing_do_too(
    calls: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        daemon = False

    monkeypatch.setattr(_exit.threading, "enumerate", lambda: [Other()])
    _exit._end_multiprocessing_child()
    assert calls == [
        *[("flush", 0)] * 3,
        *[("flush", _exit._TIMEOUT_S), ("flush", 0), ("flush", 0)],
        *[("flush", 0)] * 2,
    ]
