"""What kbatch.stores gives to whoever writes a store, and who takes it."""

import pytest

from kbatch import Envelope, InboxError, SerializationError
from kbatch.aio._inbox_session import AioInboxSession
from tests.memory_inbox import MemoryInbox
from tests.memory_outbox import MemoryOutbox


def test_an_outbox_maps_all_or_none() -> None:
    outbox = MemoryOutbox()
    with outbox.transaction() as tables:
        with pytest.raises(SerializationError):
            outbox.add(tables, [Envelope(1), Envelope(object())], topic="orders")
        assert outbox.add(tables, [Envelope(1), Envelope(2)], topic="orders") == 2
    assert (len(outbox.tables.outbox), outbox.tables.last_number) == (2, 2)


def test_a_listener_of_asyncio_refuses_an_inbox_of_ones_own() -> None:
    with pytest.raises(InboxError, match=r"takes the inboxes of kbatch alone.* of the type MemorySession"):
        AioInboxSession(MemoryInbox().open_session("billing"))
