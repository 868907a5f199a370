"""From other threads to an event loop."""

import asyncio
import contextlib
import gc
import threading
import weakref

import pytest

from kbatch import Envelope
from kbatch._fastmap import LoopWaker, TaskStarter, Turns
from kbatch.testing.aio import MemoryProducer


class CountingLoop(asyncio.SelectorEventLoop):
    woken = 0

    def call_soon_threadsafe(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.woken += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def on_a_thread(*functions: LoopWaker) -> None:
    def run() -> None:
        for function in functions:
            function()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_loop_is_woken_once_for_all_that_come_before_it_looks() -> None:
    async def main() -> None:
        for _ in range(3):
            wakers = [LoopWaker() for _ in range(100)]
            before = loop.woken
            on_a_thread(*wakers)
            assert loop.woken == before + 1
            await asyncio.wait_for(asyncio.gather(*(waker.future for waker in wakers)), 30)

    loop = CountingLoop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_two_loops_are_woken_each_for_its_own() -> None:
    async def wakers() -> list[LoopWaker]:
        return [LoopWaker() for _ in range(3)]

    async def answers(of: list[LoopWaker]) -> None:
        await asyncio.wait_for(asyncio.gather(*(waker.future for waker in of)), 30)

    loops = [CountingLoop(), CountingLoop()]
    try:
        both = [loop.run_until_complete(wakers()) for loop in loops]
        on_a_thread(*(waker for pair in zip(*both, strict=True) for waker in pair))
        assert [loop.woken for loop in loops] == [1, 1]
        for loop, own in zip(loops, both, strict=True):
            loop.run_until_complete(answers(own))
    finally:
        for loop in loops:
            loop.close()


def test_who_comes_after_one_that_was_interrupted_is_resolved() -> None:
    async def main() -> None:
        wakers = [LoopWaker() for _ in range(3)]
        interrupted.append(wakers[0].future)
        wakers[0].future.add_done_callback(lambda _: None)
        waiting.extend(waker.future for waker in wakers[1:])
        on_a_thread(*wakers)
        await asyncio.gather(*waiting)

    class Interrupted(asyncio.Future):  # type: ignore[type-arg]
        def set_result(self, result: object) -> None:
            super().set_result(result)
            if self in interrupted:
                raise KeyboardInterrupt

    interrupted: list[asyncio.Future[None]] = []
    waiting: list[asyncio.Future[None]] = []
    loop = asyncio.new_event_loop()
    loop.create_future = lambda: Interrupted(loop=loop)  # type: ignore[method-assign]
    task = loop.create_task(main())
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        assert not any(future.done() for future in waiting)
        loop.run_until_complete(asyncio.wait_for(task, 30))
    finally:
        loop.close()


@pytest.mark.parametrize("lost", ["the call", "what was called"])
def test_a_wake_up_that_is_lost_makes_no_loop_deaf(lost: str) -> None:
    """Ctrl-C may come anywhere in the main thread, and then the loop runs again to clean up."""

    class Interrupted(asyncio.SelectorEventLoop):
        loses = True

        def call_soon_threadsafe(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.loses:
                self.loses = False
                if lost == "the call":
                    raise KeyboardInterrupt
                return None
            return super().call_soon_threadsafe(*args, **kwargs)

    async def main() -> None:
        first = LoopWaker()
        with contextlib.suppress(KeyboardInterrupt):
            first()
        second = LoopWaker()
        on_a_thread(second)
        await asyncio.wait_for(asyncio.gather(first.future, second.future), 30)

    loop = Interrupted()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_closed_loop_is_forgotten_with_what_came_for_it() -> None:
    async def main() -> list[LoopWaker]:
        return [LoopWaker() for _ in range(3)]

    loop = asyncio.new_event_loop()
    wakers = loop.run_until_complete(main())
    on_a_thread(wakers[0])
    loop.close()  # before it has looked
    on_a_thread(*wakers[1:])
    assert not any(waker.future.done() for waker in wakers)
    gone = weakref.ref(loop)
    del loop, wakers
    asyncio.run(main())  # another one begins
    gc.collect()
    assert gone() is None


def test_turns_are_taken_from_joining_to_leaving() -> None:
    async def main() -> None:
        turns = Turns()
        assert not turns.are_taken()
        with turns.turn() as first:
            first.join()
            second = turns.turn()
            second.join()
        assert turns.are_taken()
        assert second.come() is None
        third = turns.turn()
        third.join()
        before = third.come()
        assert before is not None
        del second  # one that is forgotten leaves
        await asyncio.wait_for(before, 10)
        assert turns.standing == 1
        third.__exit__()
        assert not turns.are_taken()

    asyncio.run(main())


def test_who_waits_in_a_thread_for_others_to_leave() -> None:
    async def main() -> None:
        turns = Turns()
        first, second, late = turns.turn(), turns.turn(), turns.turn()
        first.join()
        first.count = 3
        second.join()
        second.count = 4
        last = turns.last
        late.join()
        late.count = 5
        waiting = threading.Thread(target=turns.wait, args=(last, None))
        waiting.start()
        assert (turns.count(), turns.count(last)) == (12, 7)
        second.__exit__()
        assert turns.count(last) == 3
        assert waiting.is_alive()
        first.__exit__()
        await asyncio.to_thread(waiting.join, 30)
        assert not waiting.is_alive()
        assert turns.count() == 5

    asyncio.run(main())


class Forgetful(asyncio.SelectorEventLoop):
    """Lacks memory at first, and does what it was to do at the second try all the same."""

    left = 3

    def call_soon_threadsafe(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left > 1:
            raise MemoryError
        handle = super().call_soon_threadsafe(*args, **kwargs)
        if self.left > 0:
            raise MemoryError
        return handle


def test_a_lack_of_memory_delays_a_waker() -> None:
    async def main() -> None:
        waker = LoopWaker()
        on_a_thread(waker)
        await asyncio.wait_for(waker.future, 30)

    loop = Forgetful()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert loop.left == 0


def test_a_lack_of_memory_starts_no_task_twice() -> None:
    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    async def main() -> None:
        tasks: set[asyncio.Task[None]] = set()
        starter = TaskStarter(run, tasks)
        on_a_thread(starter)
        while not ran or tasks:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)

    loop = Forgetful()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 30))
    finally:
        loop.close()
    assert (ran, loop.left) == ([1], 0)


def test_a_task_whose_start_is_interrupted_starts_all_the_same() -> None:
    class Interrupted(asyncio.SelectorEventLoop):
        loses = False

        def create_task(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.loses:
                self.loses = False
                raise KeyboardInterrupt
            return super().create_task(*args, **kwargs)

    ran: list[int] = []

    async def run() -> None:
        ran.append(1)

    async def main() -> None:
        starters.append(TaskStarter(run, set()))
        loop.loses = True
        starters[0]()
        while not ran:
            await asyncio.sleep(0.001)

    starters: list[TaskStarter] = []
    loop = Interrupted()
    task = loop.create_task(main())
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        loop.run_until_complete(asyncio.wait_for(task, 30))
    finally:
        loop.close()
    assert ran == [1]


def test_a_task_that_cannot_be_made_is_told_and_leaves_the_loop_at_rest(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        raise AssertionError("it has no task")

    async def main() -> None:
        def refuse(*args, **kwargs):  # type: ignore[no-untyped-def]
            asked.append(1)
            raise RuntimeError("the nursery is closed")

        asyncio.get_running_loop().set_task_factory(refuse)
        starter = TaskStarter(run, tasks)
        on_a_thread(starter)
        while not asked:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert starter.task is None
        asyncio.get_running_loop().set_task_factory(None)

    asked: list[int] = []
    tasks: set[TaskStarter] = set()
    asyncio.run(asyncio.wait_for(main(), 30))
    assert (asked, tasks) == ([1], set())
    assert [record.getMessage() for record in caplog.records] == [
        "a callback was not called: no task could be made for it"
    ]
    assert "the nursery is closed" in caplog.text


def test_a_producer_closes_when_no_task_can_be_made_for_its_callback() -> None:
    async def main() -> None:
        async with MemoryProducer() as producer:
            asyncio.get_running_loop().set_task_factory(refuse)
            await producer.submit("t", [Envelope(1)], callback=print)
            assert await producer.flush(20) == 0
            await producer.close(20)
            asyncio.get_running_loop().set_task_factory(None)

    def refuse(*args, **kwargs):  # type: ignore[no-untyped-def]
        raise RuntimeError("the nursery is closed")

    asyncio.run(asyncio.wait_for(main(), 30))
