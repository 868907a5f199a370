"""Senders of both kinds against a model of their account: each envelope that was taken has one outcome, whatever fails
and however the sender ends. The producer is in memory; the threads and the clock are real."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kbatch
from kbatch import Envelope, KbatchError
from kbatch.testing import MemoryProducer
from kbatch.testing.aio import MemoryProducer as AioMemoryProducer

from ..sending import HANG_S, KINDS, Driver, check_overtaken, firsts

TOPIC = "orders"
DEAD = "dead"
KEYS = ("a", "b", None)
BODIES = ("good",) * 6 + ("unmappable", "expired", "expires soon", "callback fails")
RETRIABLE, PERMANENT, TOO_LARGE = "NOT_ENOUGH_REPLICAS", "TOPIC_AUTHORIZATION_FAILED", "MSG_SIZE_TOO_LARGE"
OUTAGE = -192  # _MSG_TIMED_OUT
SHORT_S = st.sampled_from([0.0, 0.002])
LONG_AGO = datetime(2000, 1, 1, tzinfo=timezone.utc)
SOON = timedelta(milliseconds=2)


class Senders(RuleBasedStateMachine):
    """Envelopes come one at a time, brokers fail in every way and mend, and sooner or later the sender ends."""

    kind: str
    strict: bool

    @initialize(
        batch_size=st.integers(1, 6),
        batches=st.integers(1, 4),
        linger_ms=st.sampled_from([0, 1]),
        in_flight=st.integers(1, 3),
        attempts=st.integers(1, 4),
        failures_to_open=st.integers(1, 3),
        dead_letters=st.booleans(),
        end_s=st.sampled_from([None, 0.0, 0.002]),
    )
    def start(
        self,
        batch_size: int,
        batches: int,
        linger_ms: float,
        in_flight: int,
        attempts: int,
        failures_to_open: int,
        dead_letters: bool,
        end_s: float | None,
    ) -> None:
        self.end_s = end_s  # for closing while all is as it is; None: once it is mended
        self.steps = 0
        self.window = batch_size * in_flight
        self.bound = batch_size * batches
        self.producer: Any = MemoryProducer() if self.kind == "threads" else AioMemoryProducer()
        self.driver = Driver(
            self.kind,
            self.producer,
            TOPIC,
            options={"batch_size": batch_size, "batch_timeout_ms": linger_ms, "max_buffered": self.bound},
            retry=kbatch.RetryPolicy(attempts, initial_backoff_s=0.001, max_backoff_s=0.002),
            failures_to_open=failures_to_open,
            probe_interval_s=0.001,
            max_probe_interval_s=0.002,
            max_in_flight_batches=in_flight,
            strict_order=self.strict,
            on_failed=self.on_failed,
            dead_letter_topic=DEAD if dead_letters else None,
        )
        self.pool = ThreadPoolExecutor()
        self.number = 0
        self.taken: dict[int, Envelope[Any]] = {}  # in the order of the calls
        self.waiting: list[tuple[int, Envelope[Any], concurrent.futures.Future[None]]] = []
        self.told: list[tuple[int, KbatchError]] = []
        self.raises: set[int] = set()
        self.raised: list[int] = []
        self.raised_counts = True
        self.faulty = self.begun = self.ended = False

    def on_failed(self, envelope: Envelope[Any], error: KbatchError) -> None:
        number = int(dict(envelope.headers)["number"])  # type: ignore[arg-type]
        self.told.append((number, error))
        if number in self.raises:
            raise ZeroDivisionError

    def ask(self, what: str, timeout_s: float) -> int:
        """Flushes, drains or closes; what on_failed has not taken is raised, once."""
        while True:
            try:
                return getattr(self.driver, what)(timeout_s)  # type: ignore[no-any-return]
            except kbatch.UndeliveredError as error:
                self.raised_counts &= error.count == len(error.failures) > 0
                self.raised += [number_of(envelope) for envelope, _ in error.failures]

    # -- envelopes come

    def new(self, key: str | None, body: str) -> tuple[int, Envelope[Any]]:
        number, self.number = self.number, self.number + 1
        message = {"key": key, "n": number, **({"not JSON": object()} if body == "unmappable" else {})}
        deliver_by = {"expired": LONG_AGO, "expires soon": datetime.now(timezone.utc) + SOON}.get(body)
        if body == "callback fails":
            self.raises.add(number)
        return number, Envelope(message, key=key, deliver_by=deliver_by, headers={"number": str(number)})

    @rule(key=st.sampled_from(KEYS), bodies=st.lists(st.sampled_from(BODIES), min_size=1, max_size=6), wait_s=SHORT_S)
    def some_are_sent(self, key: str | None, bodies: list[str], wait_s: float) -> None:
        self.begun = True
        for body in bodies:
            number, envelope = self.new(key, body)
            try:
                self.driver.send(envelope, timeout=wait_s)
            except kbatch.SenderFullError:
                assert not self.ended
            except kbatch.SenderClosedError:
                assert self.ended
            else:
                assert not self.ended
                self.taken[number] = envelope

    @precondition(lambda self: self.begun)  # an asyncio's sender is started on its loop
    @rule(key=st.sampled_from(KEYS), bodies=st.lists(st.sampled_from(BODIES), min_size=1, max_size=6))
    def some_are_tried(self, key: str | None, bodies: list[str]) -> None:
        for body in bodies:
            number, envelope = self.new(key, body)
            try:
                taken = self.driver.try_send(envelope)
            except kbatch.SenderClosedError:
                assert self.ended
            else:
                assert not self.ended
                if taken:
                    self.taken[number] = envelope

    @precondition(lambda self: len(self.waiting) < 4)
    @rule(body=st.sampled_from(BODIES))
    def one_waits_for_room(self, body: str) -> None:
        number, envelope = self.new(None, body)  # its place among the others is not known
        self.waiting.append((number, envelope, self.pool.submit(self.driver.send, envelope, HANG_S)))

    # -- brokers

    @rule(
        error=st.sampled_from([RETRIABLE, PERMANENT, TOO_LARGE, OUTAGE]), times=st.integers(1, 6), unsure=st.booleans()
    )
    def some_will_fail(self, error: int | str, times: int, unsure: bool) -> None:
        self.faulty = True
        self.producer.fail(error, times=times, possibly_persisted=unsure, stored=False)

    @precondition(lambda self: not self.ended)
    @rule(
        error=st.sampled_from([RETRIABLE, RETRIABLE, PERMANENT, TOO_LARGE, OUTAGE]),
        times=st.integers(1, 4),
        keys=st.lists(st.sampled_from(KEYS), min_size=2, max_size=9),
        letters=st.booleans(),
    )
    def some_fail_among_others(self, error: int | str, times: int, keys: list[str | None], letters: bool) -> None:
        """From brokers that are well, since most of what comes while nothing is answered meets a full buffer."""
        self.mend()
        assert self.ask("flush", HANG_S) == 0
        self.faulty = True
        self.producer.fail(error, times=times)
        if letters:
            self.producer.fail(PERMANENT, times=1, when=lambda envelope: envelope.topic == DEAD)
        for key in keys:
            self.some_are_sent(key, ["good"], 0.0)
        assert self.ask("flush", HANG_S) == 0
        self.check_outcomes(self.taken)
        self.check_order()

    @rule()
    def brokers_go_down(self) -> None:
        self.faulty = True
        self.producer.down(timeout=0)

    @rule()
    def brokers_come_up(self) -> None:
        self.mend()

    @rule()
    def answers_are_held_back(self) -> None:
        self.producer.hold()

    @rule(batches=st.sampled_from([None, 1]))
    def answers_come(self, batches: int | None) -> None:
        self.producer.release(batches)

    @rule()
    def the_producer_is_broken(self) -> None:
        self.faulty = True
        with contextlib.suppress(kbatch.ProducerClosedError):  # it is just being replaced
            self.driver.agent._handle.producer.fatal()

    # -- waiting and ending

    @rule(timeout_s=SHORT_S)
    def it_is_flushed(self, timeout_s: float) -> None:
        before = list(self.taken)
        left = self.ask("flush", timeout_s)
        assert 0 <= left <= self.bound
        if not left:
            self.check_outcomes(before)

    @precondition(lambda self: self.steps > 12)  # else most of what comes meets a sender that has ended
    @rule(timeout_s=SHORT_S)
    def it_is_drained(self, timeout_s: float) -> None:
        self.ended = True
        left = self.ask("drain", timeout_s)
        self.join()
        if not left:
            self.check_outcomes(self.taken)

    @precondition(lambda self: self.steps > 12)
    @rule(timeout_s=SHORT_S)
    def it_is_closed(self, timeout_s: float) -> None:
        self.ended = True
        not_sent = self.ask("close", timeout_s)
        self.join()
        self.check_account(not_sent)

    @rule()
    def all_is_mended(self) -> None:
        self.mend()
        assert self.ask("flush", HANG_S) == 0
        self.join()
        assert self.ask("flush", HANG_S) == 0
        assert len(self.driver) == 0
        self.check_outcomes(self.taken)

    @invariant()
    def the_buffer_is_bounded(self) -> None:
        if hasattr(self, "driver"):
            self.steps += 1
            assert 0 <= len(self.driver) <= self.bound

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        try:
            if self.end_s is None:
                self.mend()
                self.join()
            was_ended, self.ended = self.ended, True
            not_sent = self.ask("close", HANG_S if self.end_s is None else self.end_s)
            self.join()
            if not was_ended and self.end_s is None:  # nothing hinders it any more
                assert self.handed_back() == 0
            self.check_account(not_sent)
            self.mend()  # what was in flight may still arrive
            assert self.ask("close", HANG_S) == not_sent
            self.check_account(not_sent)
        finally:
            self.producer.release()
            self.driver.__exit__()
            self.pool.shutdown()
            self.producer._core.close(HANG_S)

    def mend(self) -> None:
        self.producer.up()
        self.producer.release()

    def join(self) -> None:
        """Waits for those that wait for room, which must not be short for ever."""
        waiting, self.waiting = self.waiting, []
        for number, envelope, call in waiting:
            try:
                call.result(HANG_S)
            except kbatch.SenderClosedError:
                assert self.ended
            else:
                self.taken[number] = envelope

    # -- the account

    def stored(self, topic: str) -> Iterator[tuple[str | None, int]]:
        for record in self.producer.records:
            if record.topic() == topic:
                body = json.loads(record.value())
                assert record.key() == (None if body["key"] is None else body["key"].encode())
                yield body["key"], body["n"]

    def check_outcomes(self, numbers: Any) -> None:
        """Each of these is stored, told, a dead letter, or was too late: one of them."""
        told = Counter(number for number, _ in self.told)
        stored = Counter(number for _, number in self.stored(TOPIC))
        letters = Counter(number for _, number in self.stored(DEAD))
        unsure = {number for number, error in self.told if is_unsure(error)}
        for number in numbers:
            outcomes = told[number] + letters[number] + stored[number]
            if not outcomes:
                assert is_over(self.taken[number]), f"envelope {number} has no outcome"
            elif outcomes > 1:  # what was in flight at the end may have arrived all the same, a dead letter, too
                assert (told[number], letters[number] + stored[number]) == (1, 1)
                assert number in unsure or (letters[number] and self.ended)

    def check_account(self, not_sent: int) -> None:
        """After the end, also of what is not there."""
        self.check_outcomes(self.taken)
        told = [number for number, _ in self.told]
        stored = {number for _, number in self.stored(TOPIC)}
        letters = {number for _, number in self.stored(DEAD)}
        assert {*told, *stored, *letters} <= self.taken.keys()
        assert self.handed_back() <= not_sent <= len(told)
        assert {number_of(envelope) for envelope, _ in self.driver.agent.recent_failures} == self.raises & set(told)
        assert self.raised_counts
        assert sorted(self.raised) == sorted(self.raises & set(told))
        stats = self.driver.stats()
        assert len(self.driver) == stats["buffered"] == stats["in_flight_batches"] == 0
        assert stats["failed"] == len(told)
        ends = ("acked", "dead_letters", "failed", "expired")
        assert stats["accepted"] == len(self.taken) == sum(stats[end] for end in ends)
        assert stats["acked"] == len(stored - set(told))
        assert stats["dead_letters"] == len(letters - set(told))
        self.check_order()

    def handed_back(self) -> int:
        return sum(isinstance(error, kbatch.SenderClosedError) for _, error in self.told)

    def check_order(self) -> None:
        seen: dict[str, list[int]] = {}
        for key, number in self.stored(TOPIC):
            if key is not None:
                seen.setdefault(key, []).append(number)
        for key, found in seen.items():
            assert found == firsts(found)
            if self.strict or not self.faulty:
                assert found == sorted(found), f"key {key}"
        if not self.strict:
            check_overtaken(seen, self.window)


def is_unsure(error: KbatchError) -> bool:
    return isinstance(error, kbatch.DeliveryError) and error.possibly_persisted


def is_over(envelope: Envelope[Any]) -> bool:
    return envelope.deliver_by is not None and envelope.deliver_by <= datetime.now(timezone.utc)


def number_of(envelope: Envelope[Any]) -> int:
    return int(dict(envelope.headers)["number"])  # type: ignore[arg-type]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_account_is_exact(kind: str, strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "kbatch")  # thousands fail, all on purpose
    machine = type("Senders", (Senders,), {"kind": kind, "strict": strict})
    few = settings(max_examples=settings().max_examples // 4, stateful_step_count=30)
    run_state_machine_as_test(machine, settings=few)
