"""A TCP proxy before a broker, with faults to order: delay, cut, drop one direction, refuse."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

Result = TypeVar("Result")


class Direction(Enum):
    TO_BROKER = "to_broker"
    TO_CLIENT = "to_client"


class _Loop:
    """One event loop in a thread, for all proxies of a process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fault proxies", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Result]) -> Result:
        async def run() -> Result:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)


_shared: _Loop | None = None
_shared_lock = threading.Lock()


def _the_loop() -> _Loop:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = _Loop()
        return _shared


class FaultProxy:
    """Forwards a port of this machine to `target`. Methods may be called from any thread; faults last until `heal`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._delay_s = 0.0
        self._dropped: frozenset[Direction] = frozenset()
        self._refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self.forwarded = dict.fromkeys(Direction, 0)  # bytes
        self.dropped = dict.fromkeys(Direction, 0)
        self._on = _the_loop()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._on.loop
        ).result(30)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def delay(self, one_way_s: float) -> None:
        """Every byte arrives that much later, in both directions; how much can be under way is not limited."""
        self._on.call(lambda: setattr(self, "_delay_s", one_way_s))

    def drop(self, *directions: Direction) -> None:
        """What goes there is read and thrown away. The connections are of no use any more: `heal` cuts them."""
        self._on.call(lambda: setattr(self, "_dropped", frozenset(directions)))

    def cut(self) -> None:
        """Resets every connection; new ones may come."""
        self._on.call(self._cut)

    def refuse(self) -> None:
        """Resets every connection and each new one."""

        def refuse() -> None:
            self._refusing = True
            self._cut()

        self._on.call(refuse)

    def heal(self) -> None:
        """No faults from here on."""

        def heal() -> None:
            if self._dropped:
                self._cut()
            self._dropped, self._delay_s, self._refusing = frozenset(), 0.0, False

        self._on.call(heal)

    def close(self) -> None:
        def close() -> None:
            self._server.close()
            self._cut()

        self._on.call(close)

    def _cut(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(back)
        try:
            await asyncio.gather(
                self._pump(reader, back, Direction.TO_BROKER), self._pump(there, writer, Direction.TO_CLIENT)
            )
        finally:
            for each in (writer, back):
                self._writers.discard(each)
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                if (wait_s := due - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                if not data:
                    break
                self.forwarded[direction] += len(data)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

        delivery = asyncio.create_task(deliver())
        try:
            data = b"-"
            while data:
                data = await reader.read(1 << 18)
                if direction in self._dropped:
                    self.dropped[direction] += len(data)
                    if data:
                        continue
                under_way.put_nowait((loop.time() + self._delay_s, data))
            await delivery
        except OSError:
            writer.transport.abort()
        finally:
            delivery.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await delivery


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST instead of FIN."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
