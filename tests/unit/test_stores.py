"""What kbatch.stores gives to whoever writes a store, and who takes it."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import kbatch.testing.aio
from kbatch import Envelope, SerializationError
from kbatch.aio._inbox_session import AioListenerSession, aio_session
from tests.memory_inbox import MemoryInbox, Tables
from tests.memory_outbox import MemoryOutbox


def test_an_outbox_maps_all_or_none() -> None:
    outbox = MemoryOutbox()
    with outbox.transaction() as tables:
        with pytest.raises(SerializationError):
            outbox.add(tables, [Envelope(1), Envelope(object())], topic="orders")
        assert outbox.add(tables, [Envelope(1), Envelope(2)], topic="orders") == 2
    assert (len(outbox.tables.outbox), outbox.tables.last_number) == (2, 2)


async def add(envelope: Envelope, tables: Tables) -> None:
    await asyncio.sleep(0)
    tables.effects.append(envelope.message)


def test_of_copies_in_an_inbox_of_ones_own_one_is_awaited() -> None:
    async def work() -> None:
        inbox = MemoryInbox()
        session = aio_session(inbox.open_session("billing"))
        orders = [Envelope(n) for n in range(3)]
        assert [await session.handle(orders[0], add) for _ in range(2)] == [True, False]

        async def add_all(envelopes: list[Envelope], tables: Tables) -> None:
            for envelope in envelopes:
                await add(envelope, tables)

        assert [await session.handle_batch([*orders, *orders[1:]], add_all) for _ in range(2)] == [2, 0]
        assert inbox.tables.effects == [0, 1, 2]
        session.close()

    asyncio.run(work())


def test_a_handler_may_be_called_again_by_a_session_of_ones_own() -> None:
    async def work() -> None:
        seen: list[object] = []

        class Session:  # of a database that asks for a transaction to be made again
            def handle(self, envelope: Envelope, handler: Callable[[Any, Any], object]) -> bool:
                with contextlib.suppress(KeyError):
                    handler(envelope, "first")
                handler(envelope, "second")
                return True

        async def handle(envelope: Envelope, connection: str) -> None:
            await asyncio.sleep(0)
            seen.append(connection)
            if connection == "first":
                raise KeyError("a conflict")

        session: Any = AioListenerSession(Session())  # type: ignore[arg-type]
        assert await session.handle(Envelope(1), handle)
        assert seen == ["first", "second"]

    asyncio.run(work())


def test_what_a_handler_raises_and_its_cancellation_roll_back_in_an_inbox_of_ones_own() -> None:
    async def work() -> None:
        inbox = MemoryInbox()
        session = aio_session(inbox.open_session("billing"))
        begun = asyncio.Event()

        async def fail(envelope: Envelope, tables: Tables) -> None:
            await add(envelope, tables)
            raise KeyError("a fault of the handler")

        async def hang(envelope: Envelope, tables: Tables) -> None:
            await add(envelope, tables)
            begun.set()
            await asyncio.Event().wait()

        order = Envelope(1)
        with pytest.raises(KeyError, match="a fault of the handler"):
            await session.handle(order, fail)
        task = asyncio.create_task(session.handle(order, hang))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await session.handle(order, add)  # after what the cancelled one has left
        assert inbox.tables.effects == [1]
        session.close()

    asyncio.run(work())


def test_a_call_that_is_cancelled_before_its_session_gets_to_it_calls_no_handler() -> None:
    async def work() -> None:
        inbox = MemoryInbox()
        session = aio_session(inbox.open_session("billing"))
        with inbox.lock:
            task = asyncio.create_task(session.handle(Envelope(1), add))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await session.handle(Envelope(2), add)
        assert inbox.tables.effects == [2]
        session.close()

    asyncio.run(work())


def test_a_memory_listener_of_asyncio_takes_an_inbox_of_ones_own() -> None:
    inbox = MemoryInbox()
    listener = kbatch.testing.aio.MemoryListener(add, types={"order": int}, inbox=inbox)
    order = Envelope(7, message_type="order")
    outcomes = asyncio.run(listener.send(order, order))
    assert [each.outcome for each in outcomes] == ["handled", "handled"]
    assert inbox.tables.effects == [7]
