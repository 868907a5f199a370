"""What every inbox promises to listeners.

The names are those of Wolverine's suites for message stores, as far as an inbox has what they test: that a group has
handled a message. Left out, with the reasons:

- Store incoming that is not handled, fetch by owner, load incoming counts, recovery of dormant messages: an inbox
  stores no messages. What is not handled stays in Kafka, and is read again.
- Increment attempts: the listener counts them.
- ``accept``, for a transaction of one's own: it is no part of what a listener asks.
- Outages, and a handler that ends the transaction: they depend on the database, and need tests of the store's author.
"""

import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import kbatch
from kbatch.stores import ListenerInbox, ListenerSession

__all__ = ["InboxCompliance"]

_GROUP = "billing"
_DAY_S = 86_400.0


def _orders(numbers: Iterable[int], partition: int = 0) -> list[kbatch.Envelope[Any]]:
    """As a listener reads them: the body is the number, and the offset."""
    return [kbatch.Envelope(data=b"%d" % n, topic="orders", partition=partition, id=uuid.uuid4()) for n in numbers]


class InboxCompliance:
    """What a `kbatch.Listener` needs of an inbox. A subclass has the fixture ``inbox``, with a ``retention_s`` of 7
    days, and `write`, `written` and `let_time_pass`."""

    @pytest.fixture
    def inbox(self) -> Any:
        """An empty inbox whose tables are there."""
        raise NotImplementedError("a subclass of InboxCompliance has a fixture `inbox`")

    def write(self, inbox: Any, connection: Any, number: int) -> None:
        """What a handler writes by its connection."""
        raise NotImplementedError("a subclass of InboxCompliance has write")

    def written(self, inbox: Any) -> list[int]:
        """What handlers have written and others can see, in this order."""
        raise NotImplementedError("a subclass of InboxCompliance has written")

    def let_time_pass(self, inbox: Any, seconds: float) -> None:
        """Puts the inbox's clock ahead, also by a negative time; or moves all times that are stored the other way."""
        raise NotImplementedError("a subclass of InboxCompliance has let_time_pass")

    def _writes(self, inbox: Any) -> Callable[[Any, Any], None]:
        def handle(envelope: Any, connection: Any) -> None:
            self.write(inbox, connection, int(envelope.data))

        return handle

    def _handle(self, inbox: ListenerInbox, *envelopes: Any, group: str = _GROUP) -> list[bool]:
        session = inbox.open_session(group)
        try:
            return [session.handle(envelope, lambda *_: None) for envelope in envelopes]
        finally:
            session.close()

    def _note(self, inbox: ListenerInbox, committed: int, end: int, partition: int = 0, group: str = _GROUP) -> None:
        inbox.note_offsets(group, inbox.clock_us(), {("orders", partition): (committed, end)})

    # -- handling

    def test_store_one_that_is_handled_with_what_its_handler_has_written(self, inbox: ListenerInbox) -> None:
        inbox.check()
        session = inbox.open_session(_GROUP)
        seen: list[list[int]] = []

        def handle(envelope: Any, connection: Any) -> None:
            self._writes(inbox)(envelope, connection)
            seen.append(self.written(inbox))  # as others see it

        orders = _orders(range(3))
        assert [session.handle(order, handle) for order in orders] == [True] * 3
        session.close()
        assert (seen, self.written(inbox)) == ([[], [0], [0, 1]], [0, 1, 2])

    def test_store_one_that_is_a_duplicate(self, inbox: ListenerInbox) -> None:
        session = inbox.open_session(_GROUP)
        (order,) = _orders([7])
        assert [session.handle(order, self._writes(inbox)) for _ in range(3)] == [True, False, False]
        session.close()
        assert self._handle(inbox, order) == [False]  # also for another session
        assert self.written(inbox) == [7]

    def test_incoming_exists_for_its_group_alone(self, inbox: ListenerInbox) -> None:
        orders = _orders(range(3))
        for group in ("billing", "shipping", 'it\'s "ours" $3 {x} %s ü'):
            assert self._handle(inbox, *orders, group=group) == [True] * 3
            assert self._handle(inbox, *orders, group=group) == [False] * 3

    def test_what_a_handler_raises_rolls_both_back_and_passes_on(self, inbox: ListenerInbox) -> None:
        session = inbox.open_session(_GROUP)
        (order,) = _orders([7])

        def fail(envelope: Any, connection: Any) -> None:
            self._writes(inbox)(envelope, connection)
            raise KeyError("a fault of its own")

        for _ in range(2):
            with pytest.raises(KeyError, match="a fault of its own"):
                session.handle(order, fail)
            assert self.written(inbox) == []
        assert session.handle(order, self._writes(inbox))
        session.close()
        assert self.written(inbox) == [7]

    def test_a_bulk_with_duplicates_inside_reports_only_those(self, inbox: ListenerInbox) -> None:
        session = inbox.open_session(_GROUP)
        orders = _orders(range(10))
        calls: list[list[int]] = []

        def handle(envelopes: list[Any], connection: Any) -> None:
            calls.append([int(envelope.data) for envelope in envelopes])
            for number in calls[-1]:
                self.write(inbox, connection, number)

        assert session.handle_batch([orders[2], orders[1], orders[2]], handle) == 2
        assert session.handle_batch(orders, handle) == 8
        assert session.handle_batch(orders, handle) == session.handle_batch([], handle) == 0
        session.close()
        assert calls == [[2, 1], [0, 3, 4, 5, 6, 7, 8, 9]]
        assert self.written(inbox) == [2, 1, 0, 3, 4, 5, 6, 7, 8, 9]

    def test_a_batch_whose_handler_raises_marks_none(self, inbox: ListenerInbox) -> None:
        session = inbox.open_session(_GROUP)
        orders = _orders(range(5))

        def fail(envelopes: list[Any], connection: Any) -> None:
            self.write(inbox, connection, 0)
            raise KeyError

        with pytest.raises(KeyError):
            session.handle_batch(orders, fail)
        session.close()
        assert self.written(inbox) == []
        assert self._handle(inbox, *orders) == [True] * 5

    def test_a_tombstone_is_handled_once(self, inbox: ListenerInbox) -> None:
        gone: Any = kbatch.Tombstone("k", topic="orders", partition=0)
        assert self._handle(inbox, gone, gone) == [True, False]

    def test_a_session_that_was_closed_makes_another_connection(self, inbox: ListenerInbox) -> None:
        session = inbox.open_session(_GROUP)
        for order in _orders(range(3)):
            assert session.handle(order, self._writes(inbox))
            session.close()
            session.close()
        assert self.written(inbox) == [0, 1, 2]

    def test_sessions_that_handle_the_same_messages_do_so_once(self, inbox: ListenerInbox) -> None:
        orders = _orders(range(20))
        handled: list[bool] = []
        failed: list[BaseException] = []

        def work() -> None:
            session: ListenerSession = inbox.open_session(_GROUP)
            try:
                handled.extend(session.handle(order, self._writes(inbox)) for order in orders)
            except BaseException as error:
                failed.append(error)
            finally:
                session.close()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        assert (len(handled), sum(handled), sorted(self.written(inbox))) == (80, 20, list(range(20)))

    def test_a_listener_leaves_out_what_was_handled(self, inbox: ListenerInbox) -> None:
        from kbatch.testing import MemoryListener

        def handle(envelope: Any, connection: Any) -> None:
            self.write(inbox, connection, envelope.message["n"])

        listener = MemoryListener(handle, types={"order": dict}, inbox=inbox)
        orders = [kbatch.Envelope({"n": n}, key="k", message_type="order") for n in range(3)]
        for _ in range(2):
            assert [each.outcome for each in listener.send(*orders)] == ["handled"] * 3
        assert self.written(inbox) == [0, 1, 2]

    # -- retention

    def test_deleting_old_records_of_an_empty_table_does_not_fail(self, inbox: ListenerInbox) -> None:
        assert inbox.purge_old() == 0
        self._note(inbox, 1, 1)  # of a partition of which nothing was handled
        assert inbox.purge_old() == 0

    def test_what_is_old_and_committed_is_purged(self, inbox: ListenerInbox) -> None:
        orders = _orders(range(10))
        self._handle(inbox, *orders)
        self.let_time_pass(inbox, 1.0)
        self._note(inbox, 3, 10)
        self.let_time_pass(inbox, 20 * _DAY_S)
        assert inbox.purge_old() == 0
        self._note(inbox, 9, 50)
        assert inbox.purge_old() == 0  # the last of them is not committed
        assert self._handle(inbox, *orders) == [False] * 10
        self._note(inbox, 10, 60)
        assert inbox.purge_old() == 10
        assert self._handle(inbox, *orders) == [True] * 10

    def test_what_is_young_stays(self, inbox: ListenerInbox) -> None:
        orders = _orders(range(3))
        self._handle(inbox, *orders)
        self.let_time_pass(inbox, 5 * _DAY_S)
        for _ in range(2):
            self._note(inbox, 3, 3)
            self.let_time_pass(inbox, 1.0)
        assert inbox.purge_old() == 0
        assert self._handle(inbox, *orders) == [False] * 3

    def test_what_was_handled_after_a_long_stop_stays(self, inbox: ListenerInbox) -> None:
        # Its age counts from when it was handled, not from when it was sent.
        old = _orders(range(2))
        self._handle(inbox, *old)
        self.let_time_pass(inbox, 9 * _DAY_S)
        late = _orders(range(2, 4))
        self._handle(inbox, *late)
        for _ in range(2):
            self.let_time_pass(inbox, 1.0)
            self._note(inbox, 4, 4)
        assert inbox.purge_old() == 2
        assert self._handle(inbox, *late) == [False] * 2

    def test_a_partition_that_is_behind_keeps_what_its_group_has_handled(self, inbox: ListenerInbox) -> None:
        orders = [*_orders(range(2)), *_orders(range(2), partition=1)]
        self._handle(inbox, *orders)
        self._handle(inbox, *orders[:2], group="another")
        self.let_time_pass(inbox, 1.0)
        for _ in range(2):
            self._note(inbox, 2, 2)
            self._note(inbox, 1, 2, partition=1)
            self._note(inbox, 2, 2, group="another")
            self.let_time_pass(inbox, 10 * _DAY_S)
        assert inbox.purge_old() == 2  # the other group's
        assert self._handle(inbox, *orders) == [False] * 4
        self._note(inbox, 2, 2, partition=1)
        assert inbox.purge_old() == 4

    def test_nothing_is_purged_of_a_group_of_which_nothing_is_known(self, inbox: ListenerInbox) -> None:
        self._handle(inbox, *_orders(range(3)))
        self.let_time_pass(inbox, 100 * _DAY_S)
        assert inbox.purge_old() == 0

    def test_a_topic_that_was_made_anew_does_not_wait_for_the_end_of_the_old_one(self, inbox: ListenerInbox) -> None:
        self._handle(inbox, *_orders(range(3)))
        self.let_time_pass(inbox, 1.0)
        self._note(inbox, 0, 1000)
        self.let_time_pass(inbox, 20 * _DAY_S)
        self._note(inbox, 1000, 3)  # what was committed is of the old one
        assert inbox.purge_old() == 0
        self.let_time_pass(inbox, _DAY_S)
        self._note(inbox, 3, 3)
        assert inbox.purge_old() == 3

    def test_after_the_clock_was_set_back_nothing_is_purged_until_it_is_known_anew(self, inbox: ListenerInbox) -> None:
        first = _orders(range(5))
        self._handle(inbox, *first)
        for _ in range(2):
            self.let_time_pass(inbox, 60.0)
            self._note(inbox, 5, 5)
        self.let_time_pass(inbox, -(10 * _DAY_S))
        late = _orders(range(5, 8))  # they seem to have been handled before what was known to be safe
        self._handle(inbox, *late)
        self.let_time_pass(inbox, 60.0)
        self._note(inbox, 5, 8)
        self.let_time_pass(inbox, 8 * _DAY_S)
        assert inbox.purge_old() == 0
        self._note(inbox, 7, 8)
        assert inbox.purge_old() == 0
        assert self._handle(inbox, *late) == [False] * 3
