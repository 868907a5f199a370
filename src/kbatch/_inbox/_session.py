"""What a listener's worker does with an inbox: the handler's work and its mark are one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._errors import InboxError
from kbatch._inbox._base import check_group, partitions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import Partition

__all__ = ["InboxSession", "ended_by_handler"]


class InboxSession:
    """A connection to an inbox of its own, made when it is needed, for one thread.

    A database that is away, locked or full raises an `InboxError` whose ``is_outage`` is true: nothing was committed,
    or all of it was, and the same call may be made again.
    """

    def __init__(self, group: str) -> None:
        self.group = check_group(group)
        self._connection: Any = None
        self._is_shared = False  # with an event loop, whose tasks use the connection between two steps
        self._known: set[Partition] = set()  # that the inbox knows that this group handles

    def handle(self, envelope: Envelope[Any], handler: Callable[[Any, Any], object]) -> bool:
        """Calls ``handler(envelope, connection)`` and commits what it has written together with the mark that this id
        was handled. If the group has handled it, returns False and calls nothing.

        What the handler raises rolls all of it back, and is passed on.

        Raises:
            InboxError: The database does not answer, or the handler has ended the transaction.
        """
        return bool(self._handle((envelope,), lambda new, connection: handler(new[0], connection)))

    def handle_batch(self, envelopes: Iterable[Envelope[Any]], handler: Callable[[list[Any], Any], object]) -> int:
        """As `handle`, with ``handler(envelopes, connection)`` for those that the group has not handled, each once, in
        one transaction; if there are none, it is not called. Returns how many they were."""
        return self._handle(tuple(envelopes), handler)

    def close(self) -> None:
        """Gives the connection back. The next call makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._close(connection)

    def _handle(self, envelopes: Sequence[Envelope[Any]], handler: Callable[[list[Any], Any], object]) -> int:
        try:
            new = self._prepare(envelopes)
            if new:
                self._give(new, handler)
                self._finish(envelopes)
        except BaseException:
            self._clean_up()
            raise
        return len(new)

    def _prepare(self, envelopes: Sequence[Envelope[Any]]) -> list[Envelope[Any]]:
        """Those that are new, and for them a transaction that is open."""
        if not envelopes:
            return []
        if self._connection is None:
            self._connection = self._open()
        marks = self._begin(envelopes, sorted(partitions_of(envelopes) - self._known))
        new = [envelope for envelope, is_new in zip(envelopes, marks, strict=True) if is_new]
        if not new:
            self._roll_back()
        return new

    def _finish(self, envelopes: Sequence[Envelope[Any]]) -> None:
        self._commit()
        self._known |= partitions_of(envelopes)

    def _give(self, new: list[Envelope[Any]], handler: Callable[[list[Any], Any], object]) -> None:
        try:
            handler(new, self._connection)
        except BaseException as error:
            told = self._after(error)
            if told is not None:
                raise told from error
            raise

    def _clean_up(self) -> None:
        """Has nothing open after an exception at any line: a connection on which that is in doubt is closed."""
        if self._connection is not None:
            try:
                self._roll_back()
            except BaseException:
                self.close()

    # -- of each kind of database

    def _open(self) -> Any:
        raise NotImplementedError

    def _close(self, connection: Any) -> None:
        raise NotImplementedError

    def _for_loop(self) -> Any:
        """What a handler on an event loop gets as its connection. Called there."""
        return self._connection

    def _begin(self, envelopes: Sequence[Envelope[Any]], partitions: Sequence[Partition]) -> Sequence[bool]:
        """Begins the transaction and marks the ids of envelopes; which of them are new."""
        raise NotImplementedError

    def _commit(self) -> None:
        """Raises what the database says of the handler's work, or an `InboxError`."""
        raise NotImplementedError

    def _roll_back(self) -> None:
        """Ends the transaction, if there is one."""
        raise NotImplementedError

    def _after(self, error: BaseException) -> InboxError | None:
        """What is to be told in place of a handler's exception, if the database is away or the transaction ended."""
        raise NotImplementedError


def ended_by_handler() -> InboxError:
    """The handler has committed, rolled back or closed what is not its own."""
    return InboxError(
        "the handler has ended the transaction in which it was called, or closed the connection: its work and the mark "
        "that the message was handled would not be committed together; leave both to the listener"
    )
