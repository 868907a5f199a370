"""A broker that speaks SASL as far as to refuse every log-in, which librdkafka's mock does not."""

import contextlib
import socket
import struct
import threading
from types import TracebackType

from .throttling_proxy import read_frame, shut

API_VERSIONS, SASL_HANDSHAKE, SASL_AUTHENTICATE = 18, 17, 36
UNSUPPORTED_VERSION, SASL_AUTHENTICATION_FAILED = 35, 58


def text(value: str) -> bytes:
    return struct.pack(">h", len(value)) + value.encode()


class RefusingBroker:
    """`credentials` is what clients sent to log in."""

    def __init__(self, mechanism: str) -> None:
        self.credentials: list[bytes] = []
        self._mechanism = mechanism
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._clients: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "RefusingBroker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shut(self._listener)
        self._threads[0].join()
        for client in self._clients:
            shut(client)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._clients):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                request = read_frame(client)
                key, version, correlation, name_length = struct.unpack_from(">hhih", request)
                answer = struct.pack(">i", correlation) + self._answer(key, version, request[10 + name_length :])
                client.sendall(struct.pack(">i", len(answer)) + answer)

    def _answer(self, key: int, version: int, body: bytes) -> bytes:
        if key == API_VERSIONS:
            keys = [(0, 3, 3), (3, 0, 1), (API_VERSIONS, 0, 0), (SASL_HANDSHAKE, 0, 1), (SASL_AUTHENTICATE, 0, 0)]
            listed = b"".join(struct.pack(">hhh", *each) for each in keys)
            return struct.pack(">hi", UNSUPPORTED_VERSION if version else 0, len(keys)) + listed
        if key == SASL_HANDSHAKE:
            return struct.pack(">hi", 0, 1) + text(self._mechanism)
        assert key == SASL_AUTHENTICATE
        self.credentials.append(body[4:])
        return struct.pack(">h", SASL_AUTHENTICATION_FAILED) + text("who are you?") + struct.pack(">i", 0)
