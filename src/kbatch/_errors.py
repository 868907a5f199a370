"""Every error that kbatch raises or reports, one tree::

    KbatchError
     ├─ ConfigError               a producer's configuration (also a ValueError)
     ├─ SerializationError        phase 1: an envelope cannot be mapped; nothing was sent (also a ValueError)
     ├─ NotYetDueError            phase 1: an envelope's scheduled_time is in the future; nothing was sent
     ├─ DeserializationError      a consumed record is no envelope (also a ValueError)
     ├─ DeliveryError             the outcome of one envelope that was not acknowledged
     ├─ BatchError                the failure of a batch; carries the report
     │   ├─ BatchTimeoutError         every failure is a timeout
     │   ├─ UnknownTopicError     every failure is an unknown topic or partition
     │   ├─ BatchInterruptedError      given up by Ctrl-C or another exception before anything was sent
     │   └─ UndeliveredError      envelopes were given up, and nothing else has told of them
     ├─ BatchPendingError              the wait is over, the batch goes on (also a TimeoutError)
     ├─ ProducerError             the producer cannot send
     │   ├─ ProducerClosedError   it was closed
     │   ├─ ProducerFatalError    librdkafka's idempotent producer cannot go on; make a new producer
     │   │   └─ ProducerFencedError  another producer with the same transactional.id has taken over
     │   ├─ TransactionUnknownError  its last transaction has no known end; make a new producer
     │   └─ ForkError             it was used before a fork, and this is the child
     ├─ OutboxError               an outbox cannot take rows, or its database does not answer
     │   └─ OutboxTimeoutError    the time of a DURABLE send was over (also a TimeoutError)
     ├─ InboxError                an inbox cannot be used, or its database does not answer
     ├─ ListenerError             a listener cannot go on: refused, replaced, or closed
     └─ SenderError               a sender cannot take an envelope, or did not send it
         ├─ SenderClosedError     it is closed, or was closed first
         ├─ SenderFullError       no room within the time (also a TimeoutError)
         └─ CircuitOpenError      the circuit breaker is open: nothing was sent

All of them can be pickled. Where they answer for a batch in the batch callback contract, ``report`` holds the outcome
of each envelope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbatch._codes import (
    ABORTED_CODE,
    FATAL_CODES,
    FENCED_CODES,
    OUTAGE_CODES,
    POSSIBLY_PERSISTED,
    REJECTED_CODE,
    RETRIABLE_CODES,
    WHOLE_BATCH_CODES,
    blamed,
)
from kbatch._text import printable

if TYPE_CHECKING:
    import uuid
    from collections.abc import Collection

    from kbatch._fastmap import Envelope
    from kbatch._pending import PendingBatch
    from kbatch._report import DeliveryReport

__all__ = [
    "BatchError",
    "BatchInterruptedError",
    "BatchPendingError",
    "BatchTimeoutError",
    "CircuitOpenError",
    "ConfigError",
    "DeliveryError",
    "DeserializationError",
    "ForkError",
    "InboxError",
    "KbatchError",
    "ListenerError",
    "NotYetDueError",
    "OutboxError",
    "OutboxTimeoutError",
    "ProducerClosedError",
    "ProducerError",
    "ProducerFatalError",
    "ProducerFencedError",
    "SenderClosedError",
    "SenderError",
    "SenderFullError",
    "SerializationError",
    "TransactionUnknownError",
    "UndeliveredError",
    "UnknownTopicError",
]

_name_of = type.__dict__["__name__"].__get__


def type_name(value: object) -> str:
    """The name of a value's class, without a question to its metaclass, which may raise."""
    name: str = _name_of(type(value))
    return name


def exception_text(error: BaseException) -> str:
    """What a foreign exception says; the name of its type if it says nothing, or cannot.

    Raises nothing of the exception's own but `KeyboardInterrupt` and `SystemExit`. The text is `printable`.
    """
    try:
        text = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return type_name(error)
    return printable(text) or type_name(error)


def named_exception_text(error: BaseException) -> str:
    """As `exception_text`, with the name of the type before it."""
    name, text = type_name(error), exception_text(error)
    return name if text == name else f"{name}: {text}"


def shown(value: object) -> str:
    """How an error shows a value of any size. Raises as `exception_text` does."""
    try:
        text = repr(value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return f"a {type_name(value)}"
    text = printable(text)
    return text if len(text) <= 100 else text[:99] + "…"


class KbatchError(Exception):
    """The root of kbatch's errors.

    Attributes:
        report: The outcome of each envelope, where the error answers for a batch; else ``None``.
    """

    report: DeliveryReport | None = None

    def __init__(self, *args: object) -> None:  # Python shows no signature of the one that it inherits
        super().__init__(*args)

    def __str__(self) -> str:
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments of __init__ need not be Exception's args: rebuild without calling it.
        return _rebuild, (type(self), self.args, self._state())

    def _state(self) -> dict[str, Any]:
        return dict(self.__dict__)


def _rebuild(cls: type[KbatchError], args: tuple[Any, ...], state: dict[str, Any]) -> KbatchError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(KbatchError, ValueError):
    """A configuration or an option: an unknown key, a bad value, a contradiction. Values of secrets are never shown."""


class SerializationError(KbatchError, ValueError):
    """An envelope could not be mapped to a Kafka message. Nothing of its batch was sent.

    Attributes:
        reason: What is wrong, without the place.
        index: The envelope's index in its batch; ``None`` if no single envelope is to blame.
        envelope_id: Its id, if it has one.
        field: What could not be mapped: ``"message"``, ``"key"``, ``"headers['x']"``, …
    """

    def __init__(self, reason: str, *, index: int | None, envelope_id: uuid.UUID | None, field: str) -> None:
        where = (
            ""
            if index is None
            else f"envelope {index}: "
            if envelope_id is None
            else (f"envelope {index} (id {envelope_id}): ")
        )
        # Not super(): in the middle of a lack of memory CPython 3.11 loses the MemoryError of one __init__ in another.
        Exception.__init__(self, where + reason)
        self.reason = reason
        self.index = index
        self.envelope_id = envelope_id
        self.field = field


class NotYetDueError(KbatchError):
    """The ``scheduled_time`` of an envelope is in the future, by this machine's clock. Nothing of its batch was sent.

    The same envelope is accepted later. A BUFFERED sender waits until then by itself, and so do outboxes.

    Attributes:
        reason: What is wrong, without the place.
        index: The envelope's index in its batch.
        envelope_id: Its id, if it has one.
        field: ``"scheduled_time"``, as a `SerializationError` has one.
    """

    field = "scheduled_time"

    def __init__(self, reason: str, *, index: int, envelope_id: uuid.UUID | None) -> None:
        Exception.__init__(self, f"envelope {index}{'' if envelope_id is None else f' (id {envelope_id})'}: {reason}")
        self.reason = reason
        self.index = index
        self.envelope_id = envelope_id


class DeserializationError(KbatchError, ValueError):
    """A consumed record could not be read as an envelope.

    Attributes:
        reason: What is wrong, without the place.
        topic, partition, offset: Which record it is, as far as is known.
        header: The header that is wrong; ``None`` if it is something else.
    """

    def __init__(
        self, reason: str, *, topic: str | None, partition: int | None, offset: int | None, header: str | None
    ) -> None:
        super().__init__(f"record {topic} [{partition}] at offset {offset}: {reason}")
        self.reason = reason
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.header = header


class DeliveryError(KbatchError):
    """Why one envelope was not acknowledged.

    Attributes:
        code: librdkafka's error code; negative ones arose in this process, positive ones are the broker's.
        name: Its name, such as ``"_MSG_TIMED_OUT"``.
        retriable: Whether the same message may be accepted later.
        fatal: Whether the producer itself cannot go on.
        possibly_persisted: Whether the broker may have stored the message all the same: only then can sending it
            again make a duplicate.
    """

    def __init__(self, code: int, *, possibly_persisted: bool) -> None:
        from kbatch._librdkafka import error_text

        self.code = code
        self.name, text = error_text(code)
        self.retriable = code in RETRIABLE_CODES
        self.fatal = code in FATAL_CODES
        self.possibly_persisted = possibly_persisted
        super().__init__(f"{text} ({self.name})" + ("; it may be stored all the same" if possibly_persisted else ""))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeliveryError):
            return NotImplemented
        return (self.code, self.possibly_persisted) == (other.code, other.possibly_persisted)

    def __hash__(self) -> int:
        return hash((self.code, self.possibly_persisted))


class BatchError(KbatchError):
    """Not every envelope of a batch was acknowledged; ``report`` says which."""

    def __init__(self, message: str, report: DeliveryReport | None = None) -> None:
        super().__init__(message)
        self.report = report


class BatchTimeoutError(BatchError):
    """Every envelope that failed timed out."""


class UnknownTopicError(BatchError):
    """Every envelope that failed went to a topic or partition that the cluster does not know."""


class BatchInterruptedError(BatchError):
    """The batch was given up before anything of it was sent; an exception such as Ctrl-C is on its way."""


class UndeliveredError(BatchError):
    """Envelopes were given up, and nothing else has told of them: no ``on_failed``, no callback, no look at the batch.

    ``flush``, ``drain``, ``close`` and the end of a ``with`` block raise it, once for each envelope.

    Attributes:
        count: How many.
        failures: The first 1,000 of them, each with the reason: pairs of `Envelope` and `KbatchError`. Fewer if
            they hold more than 16 MiB, or if more is not known.
    """

    def __init__(
        self, message: str, *, count: int, failures: tuple[tuple[Envelope[Any], KbatchError], ...] = ()
    ) -> None:
        super().__init__(message)
        self.count = count
        self.failures = failures


def undelivered_error(
    what: str, raw: list[tuple[Envelope[Any], KbatchError | int, int]], count: int
) -> UndeliveredError:
    """The error for failures as the native core keeps them: the reason, or librdkafka's code and persistence."""
    made: dict[tuple[int, int], DeliveryError] = {}
    failures: list[tuple[Envelope[Any], KbatchError]] = []
    for envelope, reason, persistence in raw:
        error = reason
        if isinstance(error, int):
            known = made.get((error, persistence))
            if known is None:
                known = made[error, persistence] = DeliveryError(
                    error, possibly_persisted=persistence == POSSIBLY_PERSISTED
                )
            error = known
        failures.append((envelope, error))
    text = f"{count} {what if count > 1 else what.replace('s were ', ' was ')}"
    if failures:
        first = failures[0][1]
        # Without the place in a batch, of which a caller that sends single envelopes knows nothing.
        text += f"; the first: {first.reason if isinstance(first, SerializationError) else first}"
    return UndeliveredError(text, count=count, failures=tuple(failures))


class BatchPendingError(KbatchError, TimeoutError):
    """The time to wait is over. The batch goes on and answers once.

    Attributes:
        pending: The batch, to be waited for again; ``None`` after pickling.
    """

    def __init__(self, message: str, pending: PendingBatch | None) -> None:
        super().__init__(message)
        self.pending = pending

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "pending": None}


class ProducerError(KbatchError):
    """The producer cannot send."""


class ProducerClosedError(ProducerError):
    """The producer is closed."""


class ProducerFatalError(ProducerError):
    """librdkafka's idempotent producer met an error after which it can never send again. Make a new producer.

    Attributes:
        code: librdkafka's error code.
        name: Its name.
    """

    _text = "the producer is in its fatal state: {reason} ({name}); make a new one"

    def __init__(self, reason: str, *, code: int) -> None:
        from kbatch._librdkafka import error_text

        self.code = code
        self.name, text = error_text(code)
        super().__init__(self._text.format(reason=reason or text, name=self.name))


class ProducerFencedError(ProducerFatalError):
    """Another producer with the same ``transactional.id`` has started, and the brokers listen to that one alone.

    A program that makes a new producer with this ``transactional.id`` fences the other in turn.
    """

    _text = "another producer with the same transactional.id has taken over: {reason} ({name})"


class TransactionUnknownError(ProducerError):
    """The producer's last transaction was neither committed nor aborted, as far as it knows. Make a new producer.

    The envelopes of that transaction are told as ``possibly_persisted``. A new producer with the same
    ``transactional.id`` ends the transaction first.
    """


def can_be_replaced(error: BaseException | None) -> bool:
    """Whether a producer that refused with this error may be replaced by a new one with the same settings."""
    if isinstance(error, ProducerFencedError):
        return False  # the new one would fence the other in turn
    return isinstance(error, (ProducerFatalError, TransactionUnknownError))


def spares_brokers(error: KbatchError) -> bool:
    """Whether an envelope failed for a reason of its own or of its topic, which says nothing about the brokers."""
    if isinstance(error, DeliveryError):
        return blamed(error.code) in ("envelope", "topic")
    return isinstance(error, (SerializationError, DeserializationError))


def is_for_whole_batch(error: KbatchError) -> bool:
    """Whether an envelope may have been refused for another one that was in its record batch."""
    return isinstance(error, DeliveryError) and error.code in WHOLE_BATCH_CODES


def is_abort(error: KbatchError) -> bool:
    """Whether an envelope failed with its transaction, and not by itself."""
    return isinstance(error, DeliveryError) and error.code == ABORTED_CODE


def aborts(error: KbatchError) -> bool:
    """Whether the failure of an envelope aborts its transaction."""
    return isinstance(error, DeliveryError) and error.code not in (ABORTED_CODE, REJECTED_CODE)


def has_culprit(errors: Collection[KbatchError]) -> bool:
    """Whether a transaction was aborted for some of its envelopes, so that the others are innocent."""
    return any(map(is_abort, errors)) and any(map(aborts, errors))


def spare_brokers(errors: Collection[KbatchError]) -> bool:
    """Whether the failures of a batch say nothing about the brokers: the rest of a transaction is no witness."""
    guilt = has_culprit(errors)
    return all(spares_brokers(error) or (guilt and is_abort(error)) for error in errors)


def is_outage(error: KbatchError) -> bool:
    """Whether an envelope failed because no broker answered, or because its producer or transaction was given up."""
    if isinstance(error, DeliveryError):
        return error.code in OUTAGE_CODES
    return isinstance(error, ProducerError)


def fatal_error(reason: str, code: int) -> ProducerFatalError:
    """The error for a producer in its fatal state, by librdkafka's code."""
    return (ProducerFencedError if code in FENCED_CODES else ProducerFatalError)(printable(reason), code=code)


class ForkError(ProducerError):
    """A producer that was used before a fork was used again in the child."""


class OutboxError(KbatchError):
    """An outbox cannot take envelopes by this connection, its tables are not there or another version's, or its
    database does not answer. What the database said is the ``__cause__``.

    Attributes:
        possibly_persisted: Of the `send` of a DURABLE sender: whether the envelope may be in the outbox all the same,
            since the error came when its transaction was being committed. Sent again it may then arrive twice. Of what
            changes dead letters and what waits: whether it may be done all the same.
    """

    possibly_persisted: bool = False

    def __init__(self, *args: object, possibly_persisted: bool = False) -> None:
        super().__init__(*args)
        if possibly_persisted:
            self.possibly_persisted = True


class OutboxTimeoutError(OutboxError, TimeoutError):
    """The envelope was not committed to the outbox within the time of its `send`. Unless it is ``possibly_persisted``,
    it will not be."""


class InboxError(KbatchError):
    """An inbox cannot be used by this connection, its tables are not there or another version's, its database does not
    answer, or a handler has ended the transaction that it was called in. What the database said is the ``__cause__``.

    Attributes:
        is_outage: The database takes nothing now, and may do so later: a listener waits for it.
    """

    is_outage: bool = False

    def __init__(self, *args: object, is_outage: bool = False) -> None:
        super().__init__(*args)
        if is_outage:
            self.is_outage = True


class ListenerError(KbatchError):
    """A listener cannot go on: its group or a topic is refused to it, another has taken its place, it was closed.

    Attributes:
        code: librdkafka's error code, or ``None``.
    """

    def __init__(self, *args: object, code: int | None = None) -> None:
        super().__init__(*args)
        self.code = code


class SenderError(KbatchError):
    """A sender cannot take an envelope, or did not send it."""


class SenderClosedError(SenderError):
    """The sender is closed, or was closed before the envelope was sent."""


class SenderFullError(SenderError, TimeoutError):
    """The sender's buffer had no room for the envelope within the time; it was not taken."""


class CircuitOpenError(SenderError):
    """The circuit breaker is open, after too many batches had failed one after the other. Nothing was sent.

    It is the answer, too, while a producer in its fatal state waits to be replaced.
    """
