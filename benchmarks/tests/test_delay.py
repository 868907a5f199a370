"""The proxy that makes the way to a broker longer: `make bench-test`."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.real import DelayProxy

DATA = bytes(range(256)) * 40_000


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that says what it is told."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    while data := connection.recv(1 << 16):
                        connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def proxy(echo: int) -> Iterator[DelayProxy]:
    proxy = DelayProxy(echo)
    yield proxy
    proxy.close()


def read_all(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += client.recv(1 << 16)
    return data


def test_bytes_pass_unchanged_and_late(proxy: DelayProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        for delay_ms in (0, 50):
            proxy.delay_ms(delay_ms)
            began = time.monotonic()
            sender = threading.Thread(target=client.sendall, args=(DATA,))
            sender.start()
            assert client.recv(1) == DATA[:1]
            assert time.monotonic() - began >= delay_ms / 1000
            assert read_all(client, len(DATA) - 1) == DATA[1:]
            sender.join()


def test_what_is_said_meanwhile_does_not_wait_for_what_was_said_before(proxy: DelayProxy) -> None:
    proxy.delay_ms(2_000)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        for _ in range(100):  # one after the other they would take longer than a test may
            client.sendall(b"x")
            time.sleep(0.001)
        assert read_all(client, 100) == b"x" * 100


def test_the_end_of_a_connection_is_passed_on(proxy: DelayProxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client, 10) == b"last words"
        assert client.recv(1) == b""
