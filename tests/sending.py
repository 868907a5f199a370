"""Senders of both kinds behind one interface, and loads for them whose order a reader can check."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import kbatch
from kbatch import aio
from tests.loops import beside

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS = ("threads", "asyncio")
HANG_S = 30.0  # a guard; nothing takes it


class Stored(Protocol):
    @property
    def partition(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class Driver:
    """A batched sender and its agent; one for asyncio runs on a loop of its own, and is waited for from here."""

    def __init__(
        self,
        kind: str,
        producer: kbatch.Producer | aio.Producer,
        topic: str | None,
        *,
        options: dict[str, Any],
        **agent_options: Any,
    ) -> None:
        self.given_up: list[tuple[kbatch.Envelope[Any], kbatch.KbatchError]] = []
        self.states: list[str] = ["closed"]
        agent_options = {"on_failed": self._on_failed, "on_state_change": self._on_state_change, **agent_options}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.agent: kbatch.SendingAgent | aio.SendingAgent
        self.sender: Any
        if kind == "threads":
            self.agent = kbatch.SendingAgent(producer, topic, **agent_options)
            self.sender = kbatch.BatchedSender(self.agent, **options)
        else:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever)
            self._thread.start()
            own = producer if isinstance(producer, aio.Producer) else beside(producer)
            self.agent = aio.SendingAgent(own, topic, **agent_options)
            self.sender = aio.BatchedSender(self.agent, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close(5)
        finally:
            self._end_loop()

    def forget(self) -> None:
        """Lets the sender go as it is."""
        self._end_loop()
        del self.agent, self.sender

    def _end_loop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(HANG_S)
            self._loop.close()

    def __len__(self) -> int:
        return len(self.sender)

    def send(self, envelope: kbatch.Envelope[Any], timeout: float | None = None) -> None:
        self._do(self.sender.send(envelope, timeout=timeout))

    def send_all(self, envelopes: Iterable[kbatch.Envelope[Any]]) -> None:
        if self._loop is None:
            for envelope in envelopes:
                self.sender.send(envelope)
            return

        async def send() -> None:
            for envelope in envelopes:
                await self.sender.send(envelope)

        self._do(send())

    def try_send(self, envelope: kbatch.Envelope[Any]) -> bool:
        return bool(self.sender.try_send(envelope))

    def flush(self, timeout: float | None = HANG_S) -> int:
        return int(self._do(self.sender.flush(timeout)))

    def drain(self, timeout: float | None = HANG_S) -> int:
        return int(self._do(self.sender.drain(timeout)))

    def close(self, timeout: float | None = HANG_S) -> int:
        return int(self._do(self.sender.close(timeout)))

    def stats(self) -> dict[str, int]:
        return dict(self.sender.stats())

    @property
    def reasons(self) -> list[str]:
        """Why each was given up: librdkafka's name, or the type of what is none of its errors."""
        return [error.name if isinstance(error, kbatch.DeliveryError) else type(error).__name__
                for _, error in self.given_up]  # fmt: skip

    def _do(self, result: Any) -> Any:
        if not isinstance(result, Coroutine):
            return result
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(result, self._loop).result(HANG_S)

    def _on_failed(self, envelope: kbatch.Envelope[Any], error: kbatch.KbatchError) -> None:
        self.given_up.append((envelope, error))

    def _on_state_change(self, _: kbatch.CircuitState, new: kbatch.CircuitState) -> None:
        self.states.append(new.value)


class Load:
    """Threads or tasks that send without an end; each has keys of its own, and numbers what it sends of each."""

    def __init__(self, driver: Driver, *, lanes: int = 3, keys: int = 4, partitions: int | None = None) -> None:
        self.sent: dict[str, int] = defaultdict(int)  # of each key, how many were taken
        self.most = 0
        self.refused = 0  # because it was full
        self._driver = driver
        self._keys = keys
        self._partitions = partitions
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(lane,)) for lane in range(lanes)]
        self._threads.append(threading.Thread(target=self._watch))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(HANG_S)
        assert not any(thread.is_alive() for thread in self._threads), "a thread that sends hangs"
        assert not self._errors, self._errors

    @property
    def count(self) -> int:
        return sum(self.sent.values())

    def _run(self, lane: int) -> None:
        try:
            for i in itertools.count():
                key = f"{lane}-{i % self._keys}"
                number = self.sent[key]
                envelope = kbatch.Envelope({"key": key, "n": number}, key=key)
                while not self._stop.is_set():
                    try:
                        self._driver.send(envelope, timeout=0.05)
                        self.sent[key] = number + 1
                        break
                    except kbatch.SenderFullError:
                        self.refused += 1
                if self._stop.wait(0.002 if i % 10 == 0 else 0):
                    return
        except BaseException as error:
            self._errors.append(error)

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, len(self._driver))


def numbers(records: Iterable[Stored]) -> dict[str, list[int]]:
    """Of each key, what a reader sees, in its order."""
    seen: dict[str, list[int]] = defaultdict(list)
    for record in records:
        assert record.value is not None
        body = json.loads(record.value)
        assert record.key == body["key"].encode()
        seen[body["key"]].append(body["n"])
    return seen


def check_nothing_lost(load: Load, seen: dict[str, list[int]], *, copies: bool) -> None:
    """Each that was taken is there; once, unless copies are excused."""
    assert {key: set(found) for key, found in seen.items()} == {key: set(range(n)) for key, n in load.sent.items()}
    if not copies:
        assert {key: len(found) for key, found in seen.items()} == load.sent


def firsts(found: list[int]) -> list[int]:
    """Without what was there before."""
    return list(dict.fromkeys(found))


def check_strict_order(seen: dict[str, list[int]]) -> None:
    """None is overtaken by a later one of its key, and a copy comes right after the first."""
    for key, found in seen.items():
        assert [number for number, _ in itertools.groupby(found)] == list(range(max(found) + 1)), (key, found)


def check_overtaken(seen: dict[str, list[int]], at_most: int) -> None:
    """None is overtaken by more than could be in flight with it."""
    for key, found in seen.items():
        order = firsts(found)
        place = {number: i for i, number in enumerate(order)}
        for number in order:
            ahead = sum(1 for later in order[: place[number]] if later > number)
            assert ahead <= at_most, f"{number} of {key} was overtaken by {ahead}"
