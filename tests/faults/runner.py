"""Carries out a plan against the mock cluster and writes down its history."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import gc
import itertools
import json
import queue
import sys
import threading
import time
import traceback
import uuid
import weakref
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import msgspec

import kbatch
from kbatch import aio
from kbatch._fastmap import pinned_buffers
from kbatch.testing import ApiKey, MockCluster
from tests.faults.checker import Violation, check
from tests.faults.history import (
    ACKED,
    CALLBACK,
    CONTRACT,
    EXPIRED,
    FAILED,
    RETURN,
    Answer,
    History,
    Message,
    Outcome,
    Read,
    Sent,
    Stream,
    seen,
)
from tests.faults.kinds import BESIDE
from tests.faults.plan import ONE_AT_A_TIME, Fault, Plan, Send
from tests.injection import Injected, Injector
from tests.loops import beside
from tests.mock.clients import read_back

BROKERS = 3
_MESSAGE_MAX_BYTES = 4_000
# Batches that are no steps of the plan: the one before them, and those after them.
_FIRST, _PROBES, _BESIDE = 900, 1_000, 2_000
# Undelivered envelopes that are named; of the others there is a count.
_KEPT = 1_000
# A broker takes an hour (log.message.timestamp.after.max.ms).
_TOO_LATE_MS = 864_000_000
_LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)

_QUICK = {
    "reconnect.backoff.ms": 10,
    "reconnect.backoff.max.ms": 50,
    "retry.backoff.ms": 10,
    "retry.backoff.max.ms": 50,
    "topic.metadata.refresh.fast.interval.ms": 10,
    "log_level": 0,
}

_topic_numbers = itertools.count()


class NoMemory:
    """A message that cannot be encoded for lack of memory."""


class Hooked:
    """A message whose hook gives up the GIL, so that other threads map in the middle of it."""

    def __init__(self, fields: dict[str, str], pause_s: float) -> None:
        self.fields = fields
        self.pause_s = pause_s


def _encode_rest(value: object) -> object:
    if isinstance(value, Hooked):
        time.sleep(value.pause_s)
        return value.fields
    if isinstance(value, NoMemory):
        raise MemoryError("of a test")
    raise NotImplementedError(f"a {type(value).__name__} has no JSON")


#: Of what the bodies of a plan are.
ENCODER = msgspec.json.Encoder(enc_hook=_encode_rest)


def run_plan(cluster: MockCluster, plan: Plan) -> tuple[list[Violation], Counter[str]]:
    """What the plan's run has violated, and what it met. The cluster is left as it was."""
    history = Run(cluster, plan).carry_out()
    return check(history), seen(history)


class _Job:
    """A send on its way through its sender."""

    def __init__(self, index: int, step: Send) -> None:
        self.index = index
        self.step = step
        self.entered = False
        self.over = threading.Event()
        self.sent: Sent | None = None
        self.pending: kbatch.PendingBatch | None = None

    def settled(self) -> bool:
        return self.over.is_set() and (self.pending is None or self.pending.done())

    def under_way(self, producer: kbatch.Producer) -> bool:
        return self.over.is_set() or (self.entered and len(producer) > 0)


class _Active:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.left = fault.span
        self.jobs: list[_Job] = []


class Run:
    """One run of a plan. What faults may use: `cluster`, `plan`, `topic`, `producer`, `history`, `at_end`."""

    brokers = BROKERS
    # A message's time where a timeout is no part of the plan, and when a batch without an answer counts as a hang.
    message_timeout_ms = 10_000
    hang_s = 20.0
    patience_s = 2.5
    # A sender's: longer than a fault that waits for its end, and than a message's time after it.
    close_timeout_s = 15.0

    def __init__(self, cluster: Any, plan: Plan) -> None:
        self.cluster = cluster
        self.plan = plan
        self.topic = f"seed-{plan.seed}-{next(_topic_numbers)}"
        names = ("unknown", "doomed", "beside")
        self.topics = {"main": self.topic, **{name: f"{self.topic}-{name}" for name in names}}
        self.history = History(plan.rules())
        self.at_end: list[Callable[[], None]] = []
        self.instance = 0
        self._events = itertools.count()
        self._probes = itertools.count(_PROBES)
        self._jobs: dict[int, _Job] = {}
        self._beside: dict[Fault, tuple[threading.Thread, set[int]]] = {}
        self._batches: list[weakref.ref[kbatch.PendingBatch]] = []
        # Batches that nobody looks at, and what flush and close have raised, unless it was too much to be named.
        self._forgotten: list[tuple[Sent, list[kbatch.Envelope[Any]]]] = []
        self._reasons: dict[str, kbatch.DeliveryError] = {}
        self._are_all_known = True
        self._buffers = pinned_buffers()
        self._threads = set(threading.enumerate())
        self.producer = self._make_producer()

    # -- what faults do to the producer

    def start_producer(self) -> None:
        with contextlib.suppress(kbatch.ProducerError):
            self.producer.send_batch(self.topic, [])

    def begin_beside(self, fault: Fault) -> None:
        """More than all of the room is asked for by a topic that has no leader, unless it takes too long to read."""
        number = len(self._beside)
        topic = self.topics["beside"]
        if not number:
            self.cluster.create_topic(topic, 1)
        self.cluster.set_partition_leader(topic, 0, -1)
        messages, envelopes = [], []
        for i in range(min(self.plan.max_in_flight, 2_000) + 50):
            token = f"{self.plan.seed}.beside{number}.{i}"
            envelope = kbatch.Envelope(data=token.encode(), headers=(("token", token),))
            envelopes.append(envelope)
            messages.append(Message(token, str(envelope.id), self._key(envelope), token.encode()))
        sent = Sent(_BESIDE + number, topic, tuple(messages), frozenset((RETURN,)), self.instance, next(self._events))
        self.history.sends.append(sent)
        producer = self.producer

        def send() -> None:
            try:
                self._answer(sent, RETURN, producer.send_batch(topic, envelopes))
            except kbatch.ProducerError as error:
                sent.answers.append(Answer(RETURN, None, refusal=type(error).__name__))
            sent.handed_in = next(self._events)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        self._beside[fault] = thread, set(self._jobs)

    def end_beside(self, fault: Fault) -> None:
        """What goes to the main topic must not wait for that."""
        thread, before = self._beside[fault]
        jobs = [job for index, job in self._jobs.items() if index not in before]
        if len(self.plan.kinds) == 1 and not self._until(lambda: all(job.settled() for job in jobs), self.patience_s):
            self.history.findings.append("a topic without a leader holds up another one")
        self.cluster.set_partition_leader(self.topics["beside"], 0, 1)
        thread.join(self.hang_s)

    def renew_producer(self, close_timeout_s: float) -> None:
        began = time.monotonic()
        self._ask(self.producer, lambda: self.producer.close(close_timeout_s))
        if time.monotonic() - began < close_timeout_s + 0.9:  # it was not cut short: no answer may be missing
            for job in self._jobs.values():
                if job.pending is not None and job.sent is not None and job.sent.instance == self.instance:
                    called = job.step.way != "callback" or any(a.channel == CALLBACK for a in job.sent.answers)
                    if not (job.pending.done() and called):
                        self.history.findings.append(f"close returned before batch {job.index} was answered")
        with self._swap:
            self.producer = self._make_producer()
            self.instance += 1

    _swap = threading.Lock()

    def _make_producer(self) -> kbatch.Producer:
        config = {
            "bootstrap.servers": self.bootstrap_servers,
            "enable.idempotence": self.plan.idempotent,
            "acks": "all",
            "max.in.flight": self.plan.in_flight,
            "message.timeout.ms": self.message_timeout_ms,
            **_QUICK,
            **dict(self.plan.config),
        }
        return kbatch.Producer(
            config,
            wire=self.plan.wire,
            encoder=ENCODER,
            max_in_flight=self.plan.max_in_flight,
        )

    # -- the run

    def carry_out(self) -> History:
        try:
            self._prepare()
            if self.plan.warm:
                self._send(_Job(_FIRST, Send(0, self.plan.partitions, body="bytes")))
            if self._play():
                self._conclude()
        finally:
            self._leave()
        return self.history

    def _conclude(self) -> None:
        self._probe()
        self._ask(self.producer, lambda: self.producer.close(self.hang_s))
        self._answer_forgotten()
        self._leave_nothing()
        self._heal()
        self._read()

    def _leave(self) -> None:
        self._heal()
        with contextlib.suppress(kbatch.UndeliveredError):
            self.producer.close(0)
        self._drop_topics()

    @property
    def bootstrap_servers(self) -> str:
        return str(self.cluster.bootstrap_servers)

    def _prepare(self) -> None:
        self.cluster.create_topic(self.topic, self.plan.partitions)
        if {"no leader", BESIDE} & set(self.plan.kinds):
            # With version 10 the mock cluster looks up the address of the leader that is not there, and crashes.
            self.cluster.set_api_version(ApiKey.PRODUCE, 0, 9)

    def _drop_topics(self) -> None:
        for topic in self.topics.values():
            with contextlib.suppress(kbatch.KbatchError):
                self.cluster.delete_topic(topic)

    def _heal(self) -> None:
        self.cluster.set_api_version(ApiKey.PRODUCE, 0, 10)
        self.cluster.set_broker_up()
        self.cluster.set_rtt(-1, 0)
        for api_key in (ApiKey.PRODUCE, ApiKey.INIT_PRODUCER_ID):
            self.cluster.clear_request_errors(api_key)
        while self.at_end:
            self.at_end.pop()()

    def _play(self) -> bool:
        """The steps, until every batch has its answer; False if something hangs."""
        queues: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue() for _ in range(self.plan.senders)]
        threads = [threading.Thread(target=self._sender, args=(jobs,), daemon=True) for jobs in queues]
        for thread in threads:
            thread.start()
        active: list[_Active] = []
        for index, step in self.plan.taken:
            if isinstance(step, Fault):
                self.plan.kind(step.kind).begin(self, step)
                active.append(_Active(step))
                continue
            job = self._jobs[index] = _Job(index, step)
            queues[step.sender].put(job)
            for one in active:
                one.jobs.append(job)
                one.left -= 1
            for one in [one for one in active if one.left == 0]:
                active.remove(one)
                self._end(one)
        while active:
            self._end(active.pop(0))
        for jobs in queues:
            jobs.put(None)
        return self._join(threads)

    def _end(self, one: _Active) -> None:
        kind = self.plan.kind(one.fault.kind)
        if kind.until_settled:
            self._until(lambda: all(job.settled() for job in one.jobs), self.patience_s)
        else:
            self._until(lambda: all(job.under_way(self.producer) for job in one.jobs), 0.2)
            time.sleep(one.fault.hold_ms / 1000)
        kind.end(self, one.fault)

    def _until(self, condition: Callable[[], bool], patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _join(self, threads: list[threading.Thread]) -> bool:
        deadline = time.monotonic() + self.hang_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [job for job in self._jobs.values() if not job.over.is_set()]
        if stuck:
            faulthandler.dump_traceback(sys.__stderr__)
            self.history.findings.append(f"a sender hangs in step {stuck[0].index}: {stuck[0].step}")
            return False
        for job in self._jobs.values():
            if job.pending is not None and job.sent is not None:
                with contextlib.suppress(kbatch.BatchPendingError):  # no answer: the checker will say so
                    self._answer(job.sent, RETURN, job.pending.wait(max(0.0, deadline - time.monotonic())))
                job.pending = None
        return True

    def _probe(self) -> None:
        """All faults are over: a batch must go through."""
        for _ in range(30):
            job = _Job(next(self._probes), Send(0, 3, "send_batch", "bytes"))
            self._send(job)
            assert job.sent is not None
            job.sent.probe = True
            if all(o.state == ACKED for answer in job.sent.answers for o in answer.outcomes or (Outcome(FAILED),)):
                return
            time.sleep(0.1)

    def _leave_nothing(self) -> None:
        def batches() -> int:
            return sum(batch() is not None for batch in self._batches)

        def threads() -> tuple[str, ...]:
            return tuple(
                thread.name
                for thread in threading.enumerate()
                if thread not in self._threads and thread.name.startswith("kbatch")
            )

        history = self.history
        if not self._until(lambda: pinned_buffers() == self._buffers and not batches() and not threads(), 0.05):
            gc.collect()
            self._until(lambda: pinned_buffers() == self._buffers and not batches() and not threads(), self.patience_s)
        history.pinned_buffers = pinned_buffers() - self._buffers
        history.live_batches, history.live_threads = batches(), threads()

    def _read(self) -> None:
        for topic in sorted({sent.topic for sent in (*self.history.sends, *self.history.streams)}):
            records = []
            for record in read_back(self.cluster.bootstrap_servers, topic):
                headers = {name: (value or b"").decode() for name, value in record.headers}
                records.append(
                    Read(
                        record.partition,
                        record.offset,
                        headers.get("token", "none"),
                        headers.get("id"),
                        record.key,
                        record.value,
                    )
                )
            self.history.logs[topic] = records

    # -- a batch

    def _sender(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            try:
                self._send(job)
            except BaseException:
                self.history.findings.append(f"step {job.index}, {job.step}, raised\n{traceback.format_exc()}")
            finally:
                job.over.set()

    def _send(self, job: _Job) -> None:
        step = job.step
        if step.way in ONE_AT_A_TIME:
            self._stream(job)
            return
        messages, envelopes, buffers = self._again(job) if step.again is not None else self._fresh(job)
        if step.again is not None and not messages:
            return
        with self._swap:
            producer, instance = self.producer, self.instance
        channels = _CHANNELS.get(step.way, {RETURN})
        sent = job.sent = Sent(
            number=job.index,
            topic=self.topics[step.topic],
            messages=tuple(messages),
            channels=frozenset(channels),
            instance=instance,
            spoilt=_refusal_due(step) if messages else "",
            untold=step.way in _UNTOLD,
        )
        self.history.sends.append(sent)
        sent.began = next(self._events)
        job.entered = True
        try:
            WAYS[step.way](self, job, sent, producer, envelopes)
        except (kbatch.SerializationError, kbatch.ProducerError, MemoryError) as error:
            sent.answers.append(Answer(RETURN, None, refusal=type(error).__name__))
        if sent.handed_in is None:
            sent.handed_in = next(self._events)
        for buffer in buffers:
            buffer[:] = b"!" * len(buffer)

    def _stream(self, job: _Job) -> None:
        step = job.step
        if step.spoil == "no memory":  # which is tried again for ever
            step = job.step = step._replace(spoil="")
        messages, envelopes, buffers = self._fresh(job)
        with self._swap:
            producer = self.producer
        number = self.plan.seed + job.index
        stream = Stream(job.index, self.topics[step.topic], strict=number % 2 == 0, silent=number // 2 % 2 == 0)
        stream.hopeless = step.topic != "main"
        for message, envelope in zip(messages, envelopes, strict=True):
            group = envelope.key if envelope.key is not None else envelope.partition
            if group is not None:
                stream.groups[message.token] = repr(group)
            if envelope.deliver_by is not None:
                stream.expired.add(message.token)
        if step.spoil in ("too large", "unserialisable") and messages:
            stream.unmappable.add(messages[len(messages) // 2].token)
        if step.spoil == "bad timestamp":
            stream.guilty.add(messages[len(messages) // 2].token)
        self.history.streams.append(stream)
        job.entered = True
        (_batched if step.way == "batched" else _aio_batched)(self, job, stream, producer, messages, envelopes)
        for buffer in buffers:
            buffer[:] = b"!" * len(buffer)

    def stream_options(self, job: _Job, stream: Stream) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the agent, and of the sender."""
        number = self.plan.seed + job.index

        def on_state_change(before: kbatch.CircuitState, after: kbatch.CircuitState) -> None:
            stream.opened += after is kbatch.CircuitState.OPEN

        agent = {
            "retry": kbatch.RetryPolicy(_ATTEMPTS, initial_backoff_s=0.01, max_backoff_s=0.1),
            "probe_interval_s": 0.02,
            "max_probe_interval_s": 0.2,
            "max_in_flight_batches": (1, 2, 5)[number % 3],
            "strict_order": stream.strict,
            "on_failed": None if stream.silent else functools.partial(_tell, stream),
            "on_state_change": on_state_change,
        }
        size = (1, 7, 50)[number // 3 % 3]
        stream.bound = size * (1, 3)[number // 9 % 2]
        sender = {"batch_size": size, "batch_timeout_ms": (0, 1, 5)[number % 3], "max_buffered": stream.bound}
        return agent, sender

    def told_by(self, stream: Stream, error: kbatch.UndeliveredError) -> None:
        """What flush or close of a sender without `on_failed` has raised."""
        if not stream.silent or len(error.failures) != min(error.count, _KEPT):
            self.history.findings.append(f"the sender of step {stream.number} raised {error!r}")
        for envelope, reason in error.failures:
            _tell(stream, envelope, reason)

    def end_stream(self, stream: Stream, sender: Any, not_sent: int) -> None:
        stream.not_sent = not_sent
        stream.left = len(sender)
        stream.death = stream.death or ("" if sender.agent._gate.death is None else repr(sender.agent._gate.death))
        stream.stats = {**sender.stats(), "max_attempts": _ATTEMPTS}

    def _ask(self, producer: kbatch.Producer, call: Callable[[], object]) -> None:
        """Flushes or closes; what it raises as undelivered is written down."""
        try:
            call()
        except kbatch.UndeliveredError as error:
            for envelope, reason in error.failures:
                token = _token(envelope)
                self.history.raised[token] += 1
                assert isinstance(reason, kbatch.DeliveryError)
                self._reasons[token] = reason
            if error.count != len(error.failures):
                self._are_all_known = False
                if len(error.failures) < _KEPT:
                    self.history.findings.append(f"{error.count} envelopes were lost, with {len(error.failures)} names")

    def _answer_forgotten(self) -> None:
        for sent, envelopes in self._forgotten:
            outcomes = []
            for envelope in envelopes:
                reason = self._reasons.get(_token(envelope))
                if reason is not None:
                    outcomes.append(Outcome(FAILED, reason.code, reason.possibly_persisted, reason.retriable))
                else:
                    outcomes.append(Outcome(ACKED if envelope.deliver_by is None else EXPIRED))
            sent.answers.append(Answer(RETURN, tuple(outcomes) if self._are_all_known else None))

    def _pending(self, job: _Job, sent: Sent, pending: kbatch.PendingBatch) -> None:
        sent.handed_in = next(self._events)
        job.pending = pending
        self._batches.append(weakref.ref(pending))

    def _answer(self, sent: Sent, channel: str, report: kbatch.DeliveryReport) -> None:
        sent.answers.append(Answer(channel, self._outcomes(sent, report)))

    def _outcomes(self, sent: Sent | Stream, report: kbatch.DeliveryReport) -> tuple[Outcome, ...]:
        expired, errors = set(report.expired_indices), report.errors
        outcomes = []
        for i in range(len(report)):
            place = {"partition": report.partitions[i], "offset": report.offsets[i]}
            error = errors.get(i)
            if error is not None:
                state = "both failed and expired" if i in expired else FAILED
                outcomes.append(Outcome(state, error.code, error.possibly_persisted, error.retriable, **place))
            else:
                outcomes.append(Outcome(EXPIRED if i in expired else ACKED, **place))
        counts = Counter(outcome.state for outcome in outcomes)
        told = {ACKED: report.acked, FAILED: report.failed, EXPIRED: report.expired}
        if +counts != +Counter(told):
            self.history.findings.append(f"batch {sent.number}: the report counts {told}, its envelopes are {counts}")
        return tuple(outcomes)

    def _fresh(self, job: _Job) -> tuple[list[Message], list[kbatch.Envelope[Any]], list[bytearray]]:
        step = job.step
        count = max(1, step.count) if step.spoil else step.count
        made = [self._envelope(job, i, i == count // 2) for i in range(count)]
        return [message for message, _, _ in made], [e for _, e, _ in made], [b for _, _, b in made if b is not None]

    def _envelope(self, job: _Job, i: int, middle: bool) -> tuple[Message, kbatch.Envelope[Any], bytearray | None]:
        step = job.step
        token = f"{self.plan.seed}.{job.index}.{i}"
        headers = (("token", token),)
        key = f"key-{i % 7}" if (self.plan.seed + job.index) % 3 else None
        pad = "x" * (i % 50)
        options: dict[str, Any] = {"key": key, "headers": headers}
        if step.spoil == "expired" and i % 4 == 0:
            options["deliver_by"] = _LONG_AGO
        if job.index == _FIRST:
            options["partition"] = i  # the connection to each leader
        if step.spoil == "unknown partition" and middle:
            options["partition"] = 77
        if step.spoil == "bad timestamp" and middle:
            options["timestamp"] = time.time_ns() // 1_000_000 + _TOO_LATE_MS
        buffer: bytearray | None = None
        value: bytes | None
        envelope: kbatch.Envelope[Any]
        if step.spoil in _SPOILERS and middle:
            value = None
            envelope = _SPOILERS[step.spoil](options)
        elif step.body == "json":
            value = json.dumps({"token": token, "pad": pad}, separators=(",", ":")).encode()
            envelope = kbatch.Envelope({"token": token, "pad": pad}, **options)
        elif step.body == "hooked":
            fields = {"token": token, "pad": pad if "message.max.bytes" in dict(self.plan.config) else pad * _sizes(i)}
            value = json.dumps(fields, separators=(",", ":")).encode()
            envelope = kbatch.Envelope(Hooked(fields, 0.0002 * (i % 3 == 0)), **options)
        elif step.body == "tombstone" and i % 3 == 0 and "deliver_by" not in options:
            value, key = None, key or "key"
            envelope = kbatch.Tombstone(key, headers=headers, partition=options.get("partition"))
        else:
            value = f"{token} {pad}".encode()
            data: Any = value
            if step.body in ("bytearray", "memoryview"):
                data = buffer = bytearray(value)
            if step.body == "memoryview":
                data = memoryview(buffer).toreadonly() if i % 2 else memoryview(buffer)
            envelope = kbatch.Envelope(data=data, **options)
        return Message(token, str(envelope.id), self._key(envelope), value), envelope, buffer

    def _key(self, envelope: kbatch.Envelope[Any]) -> bytes | None:
        if envelope.key is not None:
            return envelope.key.encode() if isinstance(envelope.key, str) else envelope.key
        return str(envelope.id).encode() if self.plan.wire == "wolverine" else None

    def _again(self, job: _Job) -> tuple[list[Message], list[kbatch.Envelope[Any]], list[bytearray]]:
        earlier = self._jobs.get(job.step.again if job.step.again is not None else -1)
        if earlier is None or earlier.sent is None or not self._until(earlier.settled, self.patience_s):
            return [], [], []
        if earlier.pending is not None:
            outcomes = self._outcomes(earlier.sent, earlier.pending.report)
        else:
            outcomes = next((a.outcomes for a in earlier.sent.answers if a.outcomes), ())
        messages, envelopes = [], []
        for message, outcome in zip(earlier.sent.messages, outcomes, strict=False):
            if outcome.state != FAILED:
                continue
            token = f"{self.plan.seed}.{job.index}.{len(messages)}"
            value = f"{token} again".encode()
            id = uuid.UUID(message.id)
            envelope: kbatch.Envelope[Any] = kbatch.Envelope(
                data=value, key=message.key, headers=(("token", token),), id=id
            )
            messages.append(Message(token, message.id, message.key, value))
            envelopes.append(envelope)
        return messages, envelopes, []


# -- envelopes that spoil a batch

_SPOILERS: dict[str, Callable[[dict[str, Any]], kbatch.Envelope[Any]]] = {
    "too large": lambda options: kbatch.Envelope(data=b"x" * (_MESSAGE_MAX_BYTES + 1), **options),
    "unserialisable": lambda options: kbatch.Envelope(object(), **options),
    "no memory": lambda options: kbatch.Envelope(NoMemory(), **options),
}


def _sizes(i: int) -> int:
    # Now and then a body that the mapper's buffer has to grow for; not so many that the mock cluster, which keeps 5 MB
    # of a partition, forgets the first.
    return i * 40 if i % 16 == 5 and i < 150 else 1


def _refusal_due(step: Send) -> str:
    if step.again is not None or step.spoil not in _SPOILERS:
        return ""
    if step.spoil == "no memory":
        return "ProducerError" if CONTRACT in _CHANNELS.get(step.way, ()) else "MemoryError"
    return "SerializationError"


# -- ways to send


def _send_batch(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    run._answer(sent, RETURN, producer.send_batch(sent.topic, envelopes))


def _timed(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    try:
        report = producer.send_batch(sent.topic, envelopes, timeout=0.003)
    except kbatch.BatchPendingError as error:
        if error.pending is not None:
            run._pending(job, sent, error.pending)
    else:
        run._answer(sent, RETURN, report)


def _wait(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    run._pending(job, sent, producer.submit(sent.topic, envelopes))


def _forgotten(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    run._batches.append(weakref.ref(producer.submit(sent.topic, envelopes)))
    run._forgotten.append((sent, envelopes))
    if (run.plan.seed + job.index) % 2:
        with contextlib.suppress(kbatch.ProducerClosedError):
            run._ask(producer, lambda: producer.flush(0.002))


def _callback(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    def answer(report: kbatch.DeliveryReport) -> None:
        run._answer(sent, CALLBACK, report)

    run._pending(job, sent, producer.submit(sent.topic, envelopes, callback=answer))


def _await(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    async def main() -> kbatch.DeliveryReport:
        pending = producer.submit(sent.topic, envelopes)
        sent.handed_in = next(run._events)
        return await pending

    run._answer(sent, RETURN, asyncio.run(main()))


async def _wait_for(pending: kbatch.PendingBatch) -> kbatch.DeliveryReport:
    return await pending


async def _cancel(pending: kbatch.PendingBatch) -> None:
    task = asyncio.ensure_future(_wait_for(pending))
    await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _cancelled(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    async def main() -> kbatch.DeliveryReport:
        pending = producer.submit(sent.topic, envelopes)
        sent.handed_in = next(run._events)
        await _cancel(pending)
        return await pending  # the cancelled one was a wait, not the batch

    run._answer(sent, RETURN, asyncio.run(main()))


def _loop_closed(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    pending = producer.submit(sent.topic, envelopes)
    run._pending(job, sent, pending)
    asyncio.run(_cancel(pending))  # the batch will wake a loop that is closed


class _Recorder(kbatch.SenderCallback):
    def __init__(self, run: Run, sent: Sent) -> None:
        self.run = run
        self.sent = sent

    def _record(self, method: str, outcome: kbatch.KbatchError | kbatch.DeliveryReport) -> None:
        report = outcome if isinstance(outcome, kbatch.DeliveryReport) else outcome.report
        refused = not isinstance(outcome, (kbatch.DeliveryReport, kbatch.BatchError))
        refused |= isinstance(outcome, kbatch.BatchInterruptedError) and not self.sent.messages  # no envelope tells
        before = sys.gettrace()
        sys.settrace(None)  # what interrupts kbatch must not interrupt this
        try:
            outcomes = None if report is None else self.run._outcomes(self.sent, report)
        finally:
            sys.settrace(before)
        self.sent.answers.append(Answer(CONTRACT, outcomes, method, type(outcome).__name__ if refused else ""))

    def mark_successful(self, batch: kbatch.OutgoingBatch, report: kbatch.DeliveryReport) -> None:
        self._record("mark_successful", report)

    def mark_processing_failure(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        self._record("mark_processing_failure", error)

    def mark_serialization_failure(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        self._record("mark_serialization_failure", error)

    def mark_timed_out(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        self._record("mark_timed_out", error)

    def mark_topic_does_not_exist(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        self._record("mark_topic_does_not_exist", error)

    def mark_circuit_open(self, batch: kbatch.OutgoingBatch, error: kbatch.KbatchError) -> None:
        self._record("mark_circuit_open", error)


def _sender(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    kbatch.KafkaSender(producer, sent.topic).send_batch(_Recorder(run, sent), kbatch.OutgoingBatch(envelopes))


# Event loops beside the threads, on one and the same core.


def _aio(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    run._answer(sent, RETURN, asyncio.run(beside(producer).send_batch(sent.topic, envelopes)))


def _aio_callback(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    async def main() -> kbatch.DeliveryReport:
        told = asyncio.Event()

        async def answer(report: kbatch.DeliveryReport) -> None:
            await asyncio.sleep(0)
            run._answer(sent, CALLBACK, report)
            told.set()

        pending = await beside(producer).submit(sent.topic, envelopes, callback=answer)
        run._batches.append(weakref.ref(pending))
        sent.handed_in = next(run._events)
        await told.wait()
        return await pending

    run._answer(sent, RETURN, asyncio.run(main()))


def _interrupted(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    injector = Injector(1 + (run.plan.seed * 31 + job.index * 7) % 90)
    sender, recorder, batch = (
        kbatch.KafkaSender(producer, sent.topic),
        _Recorder(run, sent),
        kbatch.OutgoingBatch(envelopes),
    )
    raised = injector.run(lambda: sender.send_batch(recorder, batch))
    if raised is not None and not isinstance(raised, Injected):
        raise raised
    run._until(lambda: bool(sent.answers), run.hang_s)


def _aio_sender(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    sender = aio.KafkaSender(beside(producer), sent.topic)
    asyncio.run(sender.send_batch(_Recorder(run, sent), kbatch.OutgoingBatch(envelopes)))


def _aio_cancelled(run: Run, job: _Job, sent: Sent, producer: kbatch.Producer, envelopes: list[Any]) -> None:
    async def main() -> None:
        sender = aio.KafkaSender(beside(producer), sent.topic)
        task = asyncio.create_task(sender.send_batch(_Recorder(run, sent), kbatch.OutgoingBatch(envelopes)))
        await asyncio.sleep(0.0005 * (job.index % 3))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        while not sent.answers:
            await asyncio.sleep(0.001)

    asyncio.run(main())


# One at a time, by senders that send again.

_ATTEMPTS = 6  # that are counted; an outage's are not


def _close_timeout_s(run: Run, stream: Stream) -> float:
    return 1.5 if stream.hopeless else run.close_timeout_s


def _send_timeout_s(stream: Stream) -> float | None:
    # While the circuit is open nothing leaves a full buffer, and without the topic it stays open.
    return 1.0 if stream.hopeless else None


def _tell(stream: Stream, envelope: kbatch.Envelope[Any], error: kbatch.KbatchError) -> None:
    reason = error.code if isinstance(error, kbatch.DeliveryError) else type(error).__name__
    stream.told.append((_token(envelope), reason))


def _token(envelope: kbatch.Envelope[Any]) -> str:
    return str(dict(envelope.headers).get("token", "none"))


class _Watched:
    """An agent that writes down the outcome of each batch."""

    run: Run
    stream: Stream

    def _make_send_loop(self) -> Any:
        loop = super()._make_send_loop()  # type: ignore[misc]
        flights, settle = loop.flights, loop.flights._settle

        def watched(flight: Any, pending: kbatch.PendingBatch, rejected: Any) -> None:
            if flight not in flights._answered_already:
                outcomes = self.run._outcomes(self.stream, pending.report)
                for envelope, outcome in zip(flight.envelopes, outcomes, strict=True):
                    self.stream.attempts.setdefault(_token(envelope), []).append(outcome)
            settle(flight, pending, rejected)

        flights._settle = watched
        return loop


class _Agent(_Watched, kbatch.SendingAgent):
    pass


class _AioAgent(_Watched, aio.SendingAgent):
    pass


def _batched(
    run: Run, job: _Job, stream: Stream, producer: kbatch.Producer, messages: list[Message], envelopes: list[Any]
) -> None:
    agent_options, sender_options = run.stream_options(job, stream)
    agent = _Agent(producer, stream.topic, **agent_options)
    agent.run, agent.stream = run, stream
    sender = kbatch.BatchedSender(agent, **sender_options)
    try:
        for message, envelope in zip(messages, envelopes, strict=True):
            sender.send(envelope, timeout=_send_timeout_s(stream))
            stream.taken.append(message)
            stream.most = max(stream.most, len(sender))
        if stream.silent:
            sender.flush(0.002)
    except kbatch.UndeliveredError as error:
        run.told_by(stream, error)
    except kbatch.SenderFullError:
        if not stream.hopeless:
            raise
    except (kbatch.SenderClosedError, kbatch.ProducerError) as error:
        stream.death = repr(error)
    finally:
        try:
            not_sent = sender.close(_close_timeout_s(run, stream))
        except kbatch.UndeliveredError as error:
            run.told_by(stream, error)
            not_sent = sender.close(0)
        run.end_stream(stream, sender, not_sent)


def _aio_batched(
    run: Run, job: _Job, stream: Stream, producer: kbatch.Producer, messages: list[Message], envelopes: list[Any]
) -> None:
    async def main() -> None:
        agent_options, sender_options = run.stream_options(job, stream)
        agent = _AioAgent(beside(producer), stream.topic, **agent_options)
        agent.run, agent.stream = run, stream
        sender = aio.BatchedSender(agent, **sender_options)
        try:
            for message, envelope in zip(messages, envelopes, strict=True):
                await sender.send(envelope, timeout=_send_timeout_s(stream))
                stream.taken.append(message)
                stream.most = max(stream.most, len(sender))
            if stream.silent:
                await sender.flush(0.002)
        except kbatch.UndeliveredError as error:
            run.told_by(stream, error)
        except kbatch.SenderFullError:
            if not stream.hopeless:
                raise
        except (kbatch.SenderClosedError, kbatch.ProducerError) as error:
            stream.death = repr(error)
        finally:
            try:
                not_sent = await sender.close(_close_timeout_s(run, stream))
            except kbatch.UndeliveredError as error:
                run.told_by(stream, error)
                not_sent = await sender.close(0)
            run.end_stream(stream, sender, not_sent)

    asyncio.run(main())


# While nobody has looked a producer may be closed, or flushed.
_UNTOLD = ("timed", "wait", "forgotten", "await", "cancelled", "loop closed")
_CHANNELS = {
    "callback": {RETURN, CALLBACK},
    "aio callback": {RETURN, CALLBACK},
    "sender": {CONTRACT},
    "aio sender": {CONTRACT},
    "aio cancelled": {CONTRACT},
    "interrupted": {CONTRACT},
}
WAYS: dict[str, Callable[[Run, _Job, Sent, kbatch.Producer, list[Any]], None]] = {
    "send_batch": _send_batch,
    "timed": _timed,
    "wait": _wait,
    "forgotten": _forgotten,
    "callback": _callback,
    "await": _await,
    "cancelled": _cancelled,
    "loop closed": _loop_closed,
    "sender": _sender,
    "aio": _aio,
    "aio callback": _aio_callback,
    "aio sender": _aio_sender,
    "aio cancelled": _aio_cancelled,
    "interrupted": _interrupted,
}
