"""``kbatch produce``: lines of JSON into a topic."""

import contextlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kbatch
from kbatch._checks import check_topic
from kbatch._codes import NOT_ALLOWED_CODES, WHOLE_BATCH_CODES
from kbatch._config import canonical, inherit
from kbatch._fastmap import Config, monotonic
from kbatch._text import counted
from kbatch.cli._connection import Connection
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._interrupt import Interrupt
from kbatch.cli._json_line import BadLine, key_reader
from kbatch.cli._lines import LineSource, Piece
from kbatch.cli._preflight import check_broker
from kbatch.cli._rejects import Rejects
from kbatch.cli._screen import Bar, Screen
from kbatch.cli._settings import Settings

# Lines are named one by one up to here; the rest is counted. A gigabyte of bad lines must not flood the terminal.
_LINES_NAMED = 20
_BATCH_BYTES = 1024 * 1024
_BATCHES_IN_FLIGHT = 16
_EMBEDDED_PARTITIONS = 64
_STALLED_AFTER_S = 10.0
# How much longer than its record a line can be: a byte may stand there as \u0001. With room for what else is there.
_LONGER_RECORD = 8
# What a producer takes as a Python object.
_FOR_PROGRAMS = frozenset(("logger", "on_delivery", "key.serializer", "value.serializer", "default.topic.config"))


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    input: str
    topic: str
    key_field: str | None
    #: Whether lines are records as ``kbatch consume --json`` prints them.
    records: bool
    config: Path | None
    settings: Settings
    embedded: bool
    rejects: str | None
    wire: str
    message_type: str | None
    source: str | None
    batch_size: int
    in_flight: int
    connect_timeout_s: float
    grace_s: float

    @property
    def fields(self) -> dict[str, Any]:
        """What each envelope has."""
        fields = {"content_type": "application/json", "message_type": self.message_type, "source": self.source}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class Batch:
    """Lines that go out together, and what is needed to name and keep those that do not arrive."""

    next_number: int
    end_offset: int = 0
    size: int = 0
    numbers: list[int] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    envelopes: list[kbatch.Envelope[Any]] = field(default_factory=list)
    # Told only when the batch is submitted: until then, none of its lines counts as read.
    bad: list[tuple[int, str, bytes]] = field(default_factory=list)
    blank: int = 0
    #: Whether each line is a record batch, so that the broker that refuses it means this line.
    alone: bool = False

    def __bool__(self) -> bool:
        return bool(self.envelopes or self.bad or self.blank)


@dataclass
class Tally:
    """Every line below `next_number` is exactly one of blank, bad, acknowledged and lost."""

    next_number: int = 1
    blank: int = 0
    bad: int = 0
    acknowledged: int = 0
    acknowledged_bytes: int = 0
    lost: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        return self.next_number - 1 - self.blank


class Sender:
    """Turns lines into batches, keeps several in flight, and accounts for every line."""

    def __init__(
        self,
        job: Job,
        read: Callable[[bytes], kbatch.Envelope[Any]],
        producer: kbatch.Producer,
        solo: kbatch.Producer,
        rejects: Rejects,
        connection: Connection,
        screen: Screen,
        bar: Bar,
        interrupt: Interrupt,
    ) -> None:
        self.tally = Tally()
        #: Why the broker or the producer takes no more; None while all is well.
        self.stopped: str | None = None
        #: Why the input or the file of rejects ended the work; None while all is well.
        self.failure: Failure | None = None
        #: Whether every line of the input was taken.
        self.at_end = False
        self._job = job
        # A batch is in flight as a whole.
        self._batch_size = min(job.batch_size, job.in_flight)
        self._producer = producer
        self._solo = solo
        self._rejects = rejects
        self._screen = screen
        self._bar = bar
        self._interrupt = interrupt
        self._read = read
        self._connection = connection
        self._flights: deque[tuple[kbatch.PendingBatch, Batch]] = deque()
        self._in_flight = 0
        self._waits_since = 0.0
        self._end_offset = 0
        self._named = 0
        self._oversized = 0

    def run(self, source: LineSource) -> None:
        """Sends until the input ends, the user stops it, or no more can be sent; then settles what is in flight."""
        try:
            self._send_all(source)
        except Failure as failure:
            self.failure = failure
        if self._oversized:  # ended in the middle of a line
            self._keep(b"\n")
        if self._interrupt.requested and self._flights:
            self._screen.tell(
                f"stopping: waiting up to {self._job.grace_s:g} s for {counted(self._in_flight, 'line')} in flight; "
                "Ctrl-C again gives them up"
            )
        while self._flights:
            self._wait_for_oldest(0.1)
        try:
            if self.tally.next_number == 1 and not self._oversized and not self.at_end:
                self._rejects.discard()  # nothing was taken, so the last run's are still what is to be mended
            else:
                self._rejects.finish()
        except Failure as failure:
            self.failure = self.failure or failure
        self._show()

    def _send_all(self, source: LineSource) -> None:
        batch = Batch(1)
        items = source.items()
        end = 1  # the number after the last line that was read
        for item in items:
            if item is not None:
                end = item.next_number
            if item is None:
                if not self._oversized:
                    self._settle_done()
                self._show()
            elif isinstance(item, Piece):
                # Not in the middle of such a line: what fails now would end up within it in the file of rejects.
                if not self._oversized:
                    batch = self._submit(batch)
                if not self._over:
                    self._reject_oversized(item)
                    batch = Batch(self.tally.next_number)
            else:
                for line in item.lines:
                    self._add(batch, line)
                    batch.end_offset = item.end_offset
                    if len(batch.envelopes) + len(batch.bad) >= self._batch_size or batch.size >= _BATCH_BYTES:
                        batch = self._submit(batch)
                        if self._over:
                            break
                if not item.more and not self._over:
                    batch = self._submit(batch)
            if self._over:
                # It may have been the end.
                self.at_end = self.tally.next_number == end and not self._oversized and next(items, source) is source
                return
        self.at_end = not self._submit(batch)

    @property
    def _over(self) -> bool:
        return self.stopped is not None or self.failure is not None or self._interrupt.requested

    def _add(self, batch: Batch, line: bytes) -> None:
        number = batch.next_number
        batch.next_number += 1
        batch.size += len(line)
        try:
            envelope = self._read(line)
        except BadLine as bad:
            if not line.strip():
                batch.blank += 1
            else:
                batch.bad.append((number, str(bad), line))
            return
        batch.numbers.append(number)
        batch.lines.append(line)
        batch.envelopes.append(envelope)

    def _reject_oversized(self, piece: Piece) -> None:
        self._oversized += len(piece.data)
        if not piece.last:
            self._keep(piece.data)
            return
        self._keep(piece.data, b"\n")
        self._flush_rejects()
        self.tally.next_number = piece.number + 1
        self._count_bad(piece.number, f"{self._oversized:,} bytes are more than message.max.bytes allows")
        self._oversized = 0

    def _submit(self, batch: Batch) -> Batch:
        """Sends a batch once there is room for it, and returns the next, empty one.

        If the user stops it while it waits, nothing of the batch was sent and none of its lines counts as read.
        """
        self._settle_done()
        while self._flights and (
            self._in_flight + len(batch.envelopes) > self._job.in_flight or len(self._flights) >= _BATCHES_IN_FLIGHT
        ):
            if self._over:
                return batch
            self._wait_for_oldest(0.1)
        if self._over or not batch:
            return batch
        while batch.envelopes:
            try:
                pending = self._producer.submit(self._job.topic, batch.envelopes)
            except (kbatch.SerializationError, kbatch.NotYetDueError) as error:
                if error.index is None:
                    raise
                number = batch.numbers.pop(error.index)
                batch.bad.append((number, error.reason, batch.lines.pop(error.index)))
                del batch.envelopes[error.index]
            except kbatch.ProducerError as error:
                if not self._interrupt.requested:
                    self.stopped = _why_no_more(error)
                return batch
            else:
                batch.envelopes.clear()  # the pending batch holds what it needs
                if not self._flights:
                    self._waits_since = monotonic()
                self._flights.append((pending, batch))
                self._in_flight += len(batch.lines)
                break
        for _, _, line in batch.bad:
            self._keep(line, b"\n")
        self._flush_rejects()
        for number, reason, _ in batch.bad:
            self._count_bad(number, reason)
        batch.bad.clear()
        self.tally.blank += batch.blank
        self.tally.next_number = batch.next_number
        self._show()
        return Batch(batch.next_number)

    def _settle_done(self) -> None:
        while self._flights and self._flights[0][0].done():
            self._wait_for_oldest()

    def _wait_for_oldest(self, timeout_s: float | None = None) -> None:
        pending, batch = self._flights[0]
        try:
            report = pending.wait(timeout_s)
        except kbatch.BatchPendingError:
            self._show()
            return
        self._flights.popleft()
        self._waits_since = monotonic()
        self._in_flight -= len(batch.lines)
        tally = self.tally
        tally.acknowledged += report.acked
        tally.acknowledged_bytes += sum(map(len, batch.lines))
        self._end_offset = max(self._end_offset, batch.end_offset)
        if report.acked:
            self._connection.answered(all_is_well=not self._flights)
        if report.ok:
            return
        errors = report.errors
        if not tally.acknowledged and all(error.code in NOT_ALLOWED_CODES for error in errors.values()):
            self.stopped = f"not allowed to write to topic {self._job.topic!r}: {next(iter(errors.values()))}"
        tally.acknowledged_bytes -= sum(len(batch.lines[index]) for index in errors)
        again = self._send_alone(batch, errors)
        errors = {index: error for index, error in errors.items() if index not in again}
        for index in errors:
            self._keep(batch.lines[index], b"\n")
        self._flush_rejects()
        for index, error in errors.items():
            tally.lost += 1
            if self.stopped is None:
                self._name(batch.numbers[index], str(error))
            tally.reasons[str(error)] += 1

    def _send_alone(self, batch: Batch, errors: Mapping[int, kbatch.DeliveryError]) -> Set[int]:
        """Sends again, each by itself, the lines that were refused with their record batch; returns their indexes."""
        again = [
            index
            for index, error in errors.items()
            if error.code in WHOLE_BATCH_CODES and not error.possibly_persisted and not batch.alone and not self._over
        ]
        if not again:
            return set()
        lines = [batch.lines[index] for index in again]
        numbers = [batch.numbers[index] for index in again]
        alone = Batch(batch.next_number, batch.end_offset, numbers=numbers, lines=lines, alone=True)
        try:
            pending = self._solo.submit(self._job.topic, [self._read(line) for line in lines])
        except kbatch.ProducerError:
            return set()
        self._flights.append((pending, alone))
        self._in_flight += len(lines)
        return set(again)

    def _keep(self, *pieces: bytes) -> None:
        try:
            self._rejects.write(*pieces)
        except Failure as failure:
            self.failure = self.failure or failure

    def _flush_rejects(self) -> None:
        # Before a line is told: its reader may look there.
        try:
            self._rejects.flush()
        except Failure as failure:
            self.failure = self.failure or failure

    def _count_bad(self, number: int, reason: str) -> None:
        self.tally.bad += 1
        self._name(number, reason)

    def _name(self, number: int, reason: str) -> None:
        self._named += 1
        if self._named <= _LINES_NAMED:
            self._screen.tell(f"line {number}: {reason}")
        elif self._named == _LINES_NAMED + 1:
            self._screen.tell("more lines fail; they are counted, and named no longer")

    def _show(self) -> None:
        self._connection.look("nothing was acknowledged" if self._flights else "", self._waits_since, _STALLED_AFTER_S)
        note = f"{self.tally.acknowledged:,} acknowledged"
        if self.tally.bad or self.tally.lost:
            note += f", {self.tally.bad + self.tally.lost:,} not"
        if self._interrupt.requested and self._in_flight:
            note += f"; stopping, {self._in_flight:,} in flight"
        self._bar.show(self._end_offset, note)


def produce(job: Job, screen: Screen) -> int:
    """Runs the job and returns the exit status: 0 only if every line was acknowledged."""
    _check_options(job)
    with contextlib.ExitStack() as stack:
        source = LineSource(job.input, _max_line(job.settings) * (_LONGER_RECORD if job.records else 1))
        stack.callback(source.close)
        rejects = Rejects(job.rejects, source, job.config)
        stack.callback(rejects.finish)
        screen.output_is_taken = rejects.is_output
        connection = Connection(screen)
        config = _config(job, stack)
        producer = _producer(job, config, connection, screen)
        solo = producer._twin(solo=True)
        stack.callback(_close, producer, solo)
        check_broker(config, job.topic, job.connect_timeout_s, connection)
        if job.embedded and not screen.quiet:
            screen.tell(f"an embedded broker at {config['bootstrap.servers']}; it ends with this command")
        interrupt = stack.enter_context(Interrupt(lambda: _close(producer, solo), job.grace_s))
        rejects.begin()
        source.start()
        began = monotonic()
        with screen.bar(job.topic, source.size, of_bytes=True) as bar:
            sender = Sender(job, _reader(job), producer, solo, rejects, connection, screen, bar, interrupt)
            sender.run(source)
        if sender.failure is not None and sender.failure.status == USAGE:
            raise sender.failure
        for line in _summary(job, sender, rejects, interrupt, monotonic() - began, connection):
            screen.say(line)
        if sender.failure is not None:
            raise sender.failure
        if interrupt.requested:
            return interrupt.status
        return 0 if sender.stopped is None and not sender.tally.bad and not sender.tally.lost else 1


def _reader(job: Job) -> Callable[[bytes], kbatch.Envelope[Any]]:
    """Makes an envelope of a line, or raises `BadLine`."""
    if job.records:
        from kbatch.cli._record_text import read_record

        return read_record
    key_of, fields = key_reader(job.key_field), job.fields
    return lambda line: kbatch.Envelope(data=line, key=key_of(line), **fields)


def _check_options(job: Job) -> None:
    try:
        check_topic("--topic", job.topic)
    except kbatch.ConfigError as error:
        raise Failure(str(error), USAGE) from None
    if job.records:
        given = {"--key": job.key_field, "--message-type": job.message_type, "--source": job.source}
        for option, value in given.items():
            if value is not None:
                raise Failure(f"--records sends keys and headers as they are: leave out {option}", USAGE)
    if job.wire == "cloudevents" and not job.source:
        raise Failure("--wire cloudevents needs --source", USAGE)
    if job.wire == "raw":
        for option, value in (("--message-type", job.message_type), ("--source", job.source)):
            if value is not None:
                raise Failure(f"--wire raw has no headers: leave out {option}", USAGE)
    for key in job.settings.values:
        if key.endswith("_cb") or key in _FOR_PROGRAMS:
            reason = "is for programs; a command line has no place for it"
        elif key == "transactional.id":
            reason = "is for programs: this command sends many batches at a time, and a transaction is one batch"
        else:
            continue
        raise Failure(job.settings.explain(f"{key} {reason}"), USAGE)


def _close(*producers: kbatch.Producer) -> None:
    for producer in producers:
        # Each line that was lost is told by its batch.
        with contextlib.suppress(kbatch.UndeliveredError):
            producer.close(0)


def _config(job: Job, stack: contextlib.ExitStack) -> dict[str, Any]:
    # librdkafka's own log lines only where they were asked for: what matters of them comes as errors.
    config: dict[str, Any] = {"log_level": "0", **job.settings.values}
    if not job.embedded:
        return config
    brokers = job.settings.find("bootstrap.servers")
    if brokers is not None and brokers.origin == "-X":
        raise Failure(f"--embedded brings its own broker: leave out -X {brokers.key}", USAGE)
    from kbatch.testing import MockCluster

    # What tells how to reach and log in to another broker does not hold for this one.
    foreign = ("bootstrap.", "security.", "sasl.", "ssl.")
    config = {key: value for key, value in config.items() if not canonical(key).startswith(foreign)}
    cluster = stack.enter_context(MockCluster(process=True))
    cluster.create_topic(job.topic, _EMBEDDED_PARTITIONS)
    return inherit(config, {"bootstrap.servers": cluster.bootstrap_servers})


def _producer(job: Job, config: dict[str, Any], connection: Connection, screen: Screen) -> kbatch.Producer:
    if not job.embedded and job.settings.find("bootstrap.servers") is None:
        raise Failure(
            "no broker is named: give -X bootstrap.servers=HOST:PORT, KBATCH_BOOTSTRAP_SERVERS, --config FILE "
            "or --embedded",
            USAGE,
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            producer = kbatch.Producer(
                {**config, "error_cb": connection}, wire=job.wire, max_in_flight=max(job.in_flight, 20_000)
            )
        except kbatch.ConfigError as error:
            raise Failure(job.settings.explain(str(error)), USAGE) from None
    try:
        # What is wrong with this one is wrong with the options, not with the lines.
        producer._map(job.topic, [kbatch.Envelope(data=b"0", **job.fields)])
        # What librdkafka sees only when it starts: settings that do not go together, a certificate that is not there.
        producer._core.probe(job.topic, 0)
    except kbatch.SerializationError as error:
        raise Failure(error.reason, USAGE) from None
    except kbatch.ConfigError as error:
        raise Failure(str(error), USAGE) from None
    for warning in caught:
        screen.tell(f"warning: {warning.message}")
    return producer


def _max_line(settings: Settings) -> int:
    most = settings.find("message.max.bytes")
    native = Config()
    if most is not None:
        with contextlib.suppress(ValueError):  # the producer tells
            native.set("message.max.bytes", most.value)
    return int(native.get("message.max.bytes") or 1_000_000)


def _why_no_more(error: kbatch.ProducerError) -> str:
    if isinstance(error, kbatch.ProducerFatalError):  # its own text has advice for programs
        return f"nothing more can be sent in this run: {kbatch.DeliveryError(error.code, possibly_persisted=False)}"
    return str(error)


def _summary(
    job: Job, sender: Sender, rejects: Rejects, interrupt: Interrupt, elapsed_s: float, connection: Connection
) -> Iterator[str]:
    tally = sender.tally
    speed = f"{tally.acknowledged / elapsed_s:,.0f} lines/s, {tally.acknowledged_bytes / elapsed_s / 1e6:,.1f} MB/s"
    yield (
        f"{tally.acknowledged:,} of {counted(tally.read, 'line')} acknowledged in topic {job.topic!r} "
        f"in {elapsed_s:.1f} s ({speed})"
    )
    if tally.blank:
        yield f"{counted(tally.blank, 'blank line')} skipped"
    if tally.bad:
        yield f"{counted(tally.bad, 'bad line')} not sent"
    if tally.lost:
        yield f"{counted(tally.lost, 'line')} not acknowledged:"
        for reason, count in tally.reasons.most_common(5):
            yield f"  {counted(count, 'line')}: {reason}"
        if connection.last_error:
            yield f"  the last error of the connection: {connection.last_error}"
    if (tally.bad or tally.lost) and rejects.shown and sender.failure is None:
        yield f"they are in {rejects.shown}"
    if sender.stopped is not None:
        yield f"stopped: {sender.stopped}"
    if interrupt.requested:
        yield "interrupted" + (", and what was in flight given up" if interrupt.aborted else "")
    if sender.stopped is not None or sender.failure is not None or interrupt.requested:
        if sender.at_end:
            yield "every line of the input was taken"
        else:
            yield f"line {tally.next_number} and those after it were not sent"
