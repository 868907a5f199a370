"""A broker that throttles, which librdkafka's mock cannot: a proxy that writes the time into what it answers."""

import contextlib
import socket
import struct
import threading
from types import TracebackType

PRODUCE, METADATA = 0, 3
FLEXIBLE_PRODUCE = 9  # from this version on, tagged fields follow the throttle time


class ThrottlingProxy:
    """Stands before a mock cluster of one broker. `throttle_ms` goes into each answer to a produce request."""

    def __init__(self, bootstrap_servers: str, throttle_ms: int) -> None:
        host, port = bootstrap_servers.rsplit(":", 1)
        self.throttle_ms = throttle_ms
        self.throttled = 0
        self._broker = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "ThrottlingProxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shut(self._listener)
        self._threads[0].join()
        self.disconnect()
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def disconnect(self) -> None:
        for each in list(self._sockets):
            shut(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                broker = socket.create_connection(self._broker)
                self._sockets += [client, broker]
                asked: dict[int, tuple[int, int]] = {}  # correlation id: the request's key and version
                for pump in (self._requests, self._responses):
                    thread = threading.Thread(target=pump, args=(client, broker, asked))
                    self._threads.append(thread)
                    thread.start()

    def _requests(self, client: socket.socket, broker: socket.socket, asked: dict[int, tuple[int, int]]) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame = read_frame(client)
                key, version, correlation = struct.unpack_from(">hhi", frame)
                asked[correlation] = key, version
                broker.sendall(struct.pack(">i", len(frame)) + frame)
        shut(broker)

    def _responses(self, client: socket.socket, broker: socket.socket, asked: dict[int, tuple[int, int]]) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame = read_frame(broker)
                key, version = asked.pop(struct.unpack_from(">i", frame)[0])
                if key == METADATA:  # the client shall come back here
                    host = self._broker[0].encode()
                    there = host + struct.pack(">i", self._broker[1])
                    here = host + struct.pack(">i", self._listener.getsockname()[1])
                    frame = frame.replace(there, here)
                elif key == PRODUCE:
                    at = len(frame) - (5 if version >= FLEXIBLE_PRODUCE else 4)
                    assert frame[at : at + 4] == b"\0\0\0\0"  # the mock does not throttle
                    frame = frame[:at] + struct.pack(">i", self.throttle_ms) + frame[at + 4 :]
                    self.throttled += 1
                client.sendall(struct.pack(">i", len(frame)) + frame)
        shut(client)


def read_frame(source: socket.socket) -> bytes:
    return read_exactly(source, struct.unpack(">i", read_exactly(source, 4))[0])


def read_exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
