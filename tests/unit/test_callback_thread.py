"""The thread on which callbacks run."""

import threading
from typing import Any

import pytest

from kbatch import Envelope
from kbatch._fastmap import CallbackThread
from kbatch.testing import MemoryProducer
from tests.waiting import until


@pytest.mark.parametrize("begins", [False, True])
def test_a_thread_whose_start_was_interrupted_is_replaced(monkeypatch: pytest.MonkeyPatch, begins: bool) -> None:
    thread = CallbackThread("tests")
    ran: list[tuple[int, threading.Thread]] = []
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if begins:
            start(self)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(MemoryError):
            thread.put(lambda: ran.append((1, threading.current_thread())))
    thread.put(lambda: ran.append((2, threading.current_thread())))
    thread.put(lambda: ran.append((3, threading.current_thread())))
    until(lambda: 3 in [number for number, _ in ran], "the jobs that were put afterwards")
    assert [number for number, _ in ran] == [2, 3]  # what could not be put does not run
    assert len({one for _, one in ran}) == 1
    thread.join(30)


def test_what_is_put_after_the_end_runs_on_a_thread_that_ends() -> None:
    thread = CallbackThread("tests")
    ran: list[threading.Thread] = []
    thread.join(30)
    for count in (1, 2):
        thread.put(lambda: ran.append(threading.current_thread()))
        until(lambda count=count: len(ran) == count and not ran[-1].is_alive(), "the end of the thread")


def test_a_thread_that_has_begun_and_ended_while_it_was_looked_at_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(threading.Thread):
        """Begins when it is looked at, and has ended by the end of the look."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.looked = threading.Event()

        def run(self) -> None:
            self.looked.wait()
            super().run()

        def is_alive(self) -> bool:
            self.looked.set()
            self.join()
            return super().is_alive()

    with MemoryProducer() as producer:
        pending = producer.submit("orders", [Envelope(1)])
        pending.wait()
    ran = threading.Event()
    monkeypatch.setattr(threading, "Thread", Late)
    pending.add_done_callback(lambda _: ran.set())
    until(ran.is_set, "the callback")
