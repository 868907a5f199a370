"""Listeners without Kafka, for the unit tests of handlers."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from kbatch._fastmap import Mapper, RecordPool, received, unpack_record, wall_time
from kbatch._producer import Producer
from kbatch._receiving._delayed import Delayed
from kbatch._receiving._failing import Failing
from kbatch._receiving._lanes import Lanes, Work
from kbatch._receiving._listener import Listener
from kbatch._receiving._transacting import Transacting
from kbatch.testing._memory_broker import MemoryRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kbatch._errors import KbatchError
    from kbatch._fastmap import Envelope, ReceivedEnvelope
    from kbatch._inbox._base import ListenerInbox
    from kbatch._receiving._base import BaseListener
    from kbatch._receiving._failing import Steps
    from kbatch._recovery._retry import RetryPolicy

__all__ = ["BaseMemoryListener", "MemoryListener", "MemoryOutcome"]

_LARGEST = 1_000_000_000
_ENOUGH = 1_000  # times that one record is tried


@dataclass
class MemoryOutcome:
    """What became of an envelope that a `MemoryListener` was given.

    Attributes:
        envelope: As the handler saw it last.
        outcome: ``"handled"``; ``"dead"``, sent to the dead letter topic; ``"failed"``, a listener would have ended;
            ``"waiting"``, not tried because the one before has failed, or tried 1,000 times in vain, or its inbox does
            not answer.
        errors: What the handler has raised, and why it could not be read, in this order.
        topics: Where it was tried, once for each attempt.
        dead_letter: The record in the dead letter topic.
    """

    envelope: ReceivedEnvelope[Any]
    outcome: Literal["handled", "dead", "failed", "waiting"] = "waiting"
    errors: list[Exception] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    dead_letter: MemoryRecord | None = None

    @property
    def attempts(self) -> int:
        """How often it was tried."""
        return len(self.topics)


class _Noting(Failing):
    """Notes what failed, in the outcome of the envelope."""

    memory: _Memory

    def failed(self, steps: Steps, work: Work, error: BaseException) -> bool:
        assert self.memory.at is not None
        if isinstance(error, Exception):
            self.memory.at.errors.append(error)
        return super().failed(steps, work, error)


class _MemoryTransacting(Transacting):
    """Commits to a log in memory what the real one would send to brokers. No commit fails."""

    memory: _Memory

    def commit(self, reading: Any, work: Work, packed: list[bytes]) -> None:
        self.memory.sent += [self.memory.keep(unpack_record(each)) for each in packed]


class _Memory:
    """A log, lanes and a clock that leaps: what a `Failing` works on in place of a broker and threads."""

    def __init__(
        self, listener: BaseListener, wire: str, source: str | None, transacting: _MemoryTransacting | None
    ) -> None:
        encoder = msgspec.json.Encoder()
        self._mapper = Mapper(wire, encoder, source, None, _LARGEST, _LARGEST, carry_scheduled_time=True)
        self._raw = Mapper("raw", encoder, None, None, _LARGEST, _LARGEST)
        self._wire = wire
        self._failures = listener._failures
        self.failing = _Noting(self._failures, self, lambda: self._now, self._wall, listener._deaths)
        self.failing.memory = self
        listener._failing = self.failing
        self._lane = listener._lane
        if transacting is not None:
            transacting.memory = self
            listener._transacting = transacting
        self.dead: list[MemoryRecord] = []
        self.sent: list[MemoryRecord] = []  # in transactions
        self._now = 0.0  # seconds that back-offs would have taken
        self._offsets: defaultdict[str, int] = defaultdict(int)
        self._clear()

    def _clear(self) -> None:
        self._lanes, self._delayed = Lanes(), Delayed()
        self._outcomes: dict[tuple[str, int], MemoryOutcome] = {}  # by topic and offset
        self.at: MemoryOutcome | None = None  # whose work was taken
        self._is_moved = False  # it goes on as another record
        self._has_ended = False

    def _wall(self) -> float:
        return wall_time() + self._now

    def take_in(self, envelopes: Iterable[Envelope[Any]], topic: str) -> list[MemoryOutcome]:
        self._clear()  # a listener that has ended begins again
        pool = RecordPool()
        outcomes = []
        for record in pool.records(pool.map(self._mapper, topic, list(envelopes))):
            if record is not None:  # its deliver_by has not passed
                envelope = self._store(record)
                outcomes.append(MemoryOutcome(envelope))
                self._read(envelope, outcomes[-1])
        return outcomes

    def _store(self, record: Any) -> ReceivedEnvelope[Any]:
        topic, partition, timestamp, key, value, headers = record
        offset = self._offsets[topic]
        self._offsets[topic] = offset + 1
        timestamp = timestamp or int(self._wall() * 1000)
        return received(topic, max(partition, 0), offset, timestamp, key, value, headers, self._wire)

    def keep(self, record: Any) -> MemoryRecord:
        """Stores what nobody reads here."""
        envelope = self._store(record)
        assert envelope.timestamp is not None
        place = (envelope.topic, envelope.partition, envelope.offset, envelope.timestamp)
        return MemoryRecord(*place, record[3], record[4], tuple(record[5]))

    def _read(self, envelope: ReceivedEnvelope[Any], outcome: MemoryOutcome) -> None:
        self._failures.identify(envelope)
        self._outcomes[envelope.topic, envelope.offset] = outcome
        left_s = self._failures.due_in_s(envelope, self._wall())
        partition = (envelope.topic, envelope.partition)
        if left_s or partition in self._delayed:
            self._delayed.add(partition, envelope, self._now + left_s)
        else:
            self._add(envelope)

    def _add(self, envelope: ReceivedEnvelope[Any]) -> None:
        partition = (envelope.topic, envelope.partition)
        self._lanes.add(Work(partition, (envelope,), (), 0, self._lane(envelope)), self._now)

    def works(self) -> Iterator[Work]:
        """What is to be handled next, until nothing is left."""
        while not self._has_ended:
            for envelope in self._delayed.take_due(self._now, sys.maxsize):
                self._add(envelope)
            self._delayed.take_empty()
            next_due = self._lanes.ripen(self._now)
            work = self._lanes.take(self._now)
            if work is None:
                dues = [due for due in (next_due, self._delayed.next_due()) if due is not None]
                if not dues:
                    return
                self._now = max(self._now, min(dues))
                continue
            outcome = self.at = self._outcomes[work.envelope.topic, work.envelope.offset]
            outcome.envelope = work.envelope
            outcome.topics.append(work.envelope.topic)
            yield work

    # -- as `Steps`

    def done(self, work: Work) -> None:
        assert self.at is not None
        if not self._is_moved:
            self.at.outcome = "handled"
        self._is_moved = False
        self._lanes.end(work, self._now)

    def fail(self, work: Work, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error  # to the test
        assert self.at is not None
        self.at.outcome = "failed"
        self._has_ended = True

    def abandon(self, work: Work) -> None:
        """Its inbox does not answer."""
        self._has_ended = True

    def is_given_up(self, work: Work) -> bool:
        """Nobody waits for an inbox."""
        return True

    def holds(self, work: Work) -> bool:
        """No partition is taken."""
        return True

    def put_off(self, work: Work, due: float) -> None:
        assert self.at is not None
        if self.at.attempts < _ENOUGH:
            self._lanes.put_off(work, due)

    # -- as `CopyTaker`

    def send(self, work: Work, answer: Callable[[KbatchError | None], object]) -> None:
        assert self.at is not None
        assert work.copy is not None
        pool = RecordPool()
        (record,) = pool.records(pool.map(self._raw, None, [work.copy]))
        self._is_moved = True
        if work.copy.topic in self._failures.delays:
            self._read(self._store(record), self.at)
        else:
            self.at.outcome = "dead"
            self.at.dead_letter = self.keep(record)
            self.dead.append(self.at.dead_letter)
        answer(None)


class BaseMemoryListener:
    """What the listeners in memory have in common."""

    _listener_type: ClassVar[type[Any]] = Listener

    def __init__(
        self,
        handler: Callable[..., Any],
        *,
        topics: Iterable[str] = ("test",),
        group: str = "test",
        types: Mapping[str, Any] | None = None,
        wire: str = "kbatch",
        source: str | None = None,
        concurrency: int = 1,
        retry: RetryPolicy | None = None,
        retry_topics: Iterable[float] = (),
        dead_letter_topic: str | None = None,
        reject_on: Iterable[type[Exception]] = (),
        inbox: ListenerInbox | None = None,
        transactional_id: str | None = None,
        on_dead: Callable[[ReceivedEnvelope[Any], Exception], object] | None = None,
    ) -> None:
        names = topics if isinstance(topics, str) else list(topics)
        config = {"bootstrap.servers": "in-memory:9092", "group.id": group}
        options: dict[str, Any] = {}
        transacting: _MemoryTransacting | None = None
        if inbox is not None:
            options["inbox"] = inbox
        if transactional_id is not None:
            sends = {"bootstrap.servers": config["bootstrap.servers"], "transactional.id": transactional_id}
            producer = Producer(sends, wire=wire, source=source)
            transacting = _MemoryTransacting(config, transactional_id, wire, producer)
            options.update(transactional_id=transactional_id, producer=producer)
        # It is never run: it checks the options, decodes, and decides what becomes of failures.
        self._listener = self._listener_type(
            config,
            names,
            handler,
            types=types,
            wire=wire,
            concurrency=concurrency,
            retry=retry,
            retry_topics=retry_topics,
            dead_letter_topic=dead_letter_topic,
            reject_on=reject_on,
            on_dead=on_dead,
            **options,
        )
        self._inbox, self._group = inbox, group
        self._topic = names[0]
        self._memory = _Memory(self._listener, wire, source, transacting)

    @property
    def dead_letters(self) -> tuple[MemoryRecord, ...]:
        """What was sent to the dead letter topic, as a consumer would see it."""
        return tuple(self._memory.dead)

    @property
    def sent(self) -> tuple[MemoryRecord, ...]:
        """What handlers have sent in transactions that were committed, in this order, as a consumer with
        ``isolation.level=read_committed`` would see it."""
        return tuple(self._memory.sent)

    def stats(self) -> dict[str, int]:
        """``attempts_failed``, ``to_retry`` and ``dead``, as of `kbatch.Listener.stats`."""
        return self._memory.failing.stats()


class MemoryListener(BaseMemoryListener):
    """Hands envelopes to a handler as a `kbatch.Listener` does, and tells what became of them.

    No broker, no threads, and no time: what a listener waits for comes at once, in the same order. One call of the
    handler comes after the other. It takes no ``batch_size``: handlers of batches are not for it. Envelopes are
    written in the wire format and read again, so that the handler sees what it would see of a record. The same code as
    a listener's decides what is tried again, and where it goes then.

    Args:
        handler, types, wire, retry, retry_topics, dead_letter_topic, reject_on, inbox: As `kbatch.Listener` takes them.
        concurrency: As `kbatch.Listener` takes it. While a record waits for its next attempt, all behind it wait with
            1, which is the default; with more only those of its key do.
        topics: What it reads; envelopes without a topic are in the first.
        group: Its ``group.id``.
        source: As `kbatch.Producer` takes it.
        on_dead: As `kbatch.Listener` takes it, and on the same threads, or loop; `send` waits for its calls.
        transactional_id: As `kbatch.Listener` takes it. What a handler sends is in `sent` once it has returned, and
            nowhere if it has raised. Each commit is made at once: nothing is refused, aborted or fenced, and all that
            has no partition of its own is in partition 0.

    Raises:
        ConfigError: A wrong option.
    """

    def send(self, *envelopes: Envelope[Any], topic: str | None = None) -> list[MemoryOutcome]:
        """Has them handled, as records of one partition, and returns the outcome of each.

        An envelope whose ``deliver_by`` has passed is not sent, and has no outcome.

        Raises:
            SerializationError: An envelope could not be written.
            BaseException: What a handler raises that is no `Exception`, such as ``pytest.fail``.
        """
        memory, listener = self._memory, self._listener
        outcomes = memory.take_in(envelopes, topic or self._topic)
        session = None if self._inbox is None else self._inbox.open_session(self._group)
        listener._of_thread.session, listener._of_thread.reading = session, memory
        try:
            for work in memory.works():
                listener._attempt(memory, work)
        finally:
            if session is not None:
                session.close()
        if listener._deaths is not None:
            listener._deaths.join(None)
        return outcomes
