"""What a listener on an event loop does with an inbox."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from kbatch._errors import InboxError, type_name
from kbatch._inbox._session import InboxSession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from kbatch._fastmap import Envelope
    from kbatch._inbox._base import ListenerSession

    _T = TypeVar("_T")

__all__ = ["AioInboxSession"]


class AioInboxSession:
    """A session whose steps run on a thread of its own, one after the other, and whose handlers are awaited between
    them. One call at a time.

    A call that is cancelled leaves a step that runs to its end; what cleans up comes after it, before the next call.
    """

    def __init__(self, session: ListenerSession) -> None:
        if not isinstance(session, InboxSession):
            raise InboxError(
                f"a kbatch.aio.Listener takes the inboxes of kbatch alone, and this one has sessions of the type "
                f"{type_name(session)}; a kbatch.Listener takes any kbatch.stores.ListenerInbox"
            )
        session._is_shared = True
        self._session = session
        self._thread = ThreadPoolExecutor(1, "kbatch-inbox")

    async def handle(self, envelope: Envelope[Any], handler: Callable[[Any, Any], Awaitable[object]]) -> bool:
        """As `InboxSession.handle`."""
        return bool(await self._handle((envelope,), lambda new, connection: handler(new[0], connection)))

    async def handle_batch(
        self, envelopes: Sequence[Envelope[Any]], handler: Callable[[list[Any], Any], Awaitable[object]]
    ) -> int:
        """As `InboxSession.handle_batch`."""
        return await self._handle(tuple(envelopes), handler)

    def close(self) -> None:
        """Gives the connection back, and does not wait for that."""
        self._thread.submit(self._session.close)
        self._thread.shutdown(wait=False)

    async def _handle(
        self, envelopes: Sequence[Envelope[Any]], handler: Callable[[list[Any], Any], Awaitable[object]]
    ) -> int:
        session = self._session
        try:
            new = await self._step(lambda: session._prepare(envelopes))
            if new:
                await self._give(new, handler)
                await self._step(lambda: session._finish(envelopes))
        except BaseException:
            self._thread.submit(session._clean_up)
            raise
        return len(new)

    async def _give(self, new: list[Any], handler: Callable[[list[Any], Any], Awaitable[object]]) -> None:
        try:
            await handler(new, self._session._for_loop())
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            given = error  # which this block's end forgets
            told = await self._step(lambda: self._session._after(given))
            if told is not None:
                raise told from error
            raise

    async def _step(self, function: Callable[[], _T]) -> _T:
        return await asyncio.wrap_future(self._thread.submit(function))
