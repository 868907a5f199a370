"""What becomes of a record whose handler raised, or that could not be read. No threads, no clocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from kbatch._checks import check_topic, is_number
from kbatch._errors import ConfigError, DeserializationError, exception_text, named_exception_text, type_name
from kbatch._fastmap import Envelope, Tombstone
from kbatch._recovery._retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kbatch._fastmap import ReceivedEnvelope

__all__ = ["FAILURE_HEADERS", "Failures", "Fate", "Origin", "attempts_header", "origin_of"]

# Wolverine has these names, as far as the second comment.
_TYPE = "exception-type"
_MESSAGE = "exception-message"
_FAILED_AT = "failed-at"  # ms since 1970
_DESTINATION = "original-destination"  # kafka://topic/NAME
_PARTITION = "original-partition"
_OFFSET = "original-offset"
# kbatch's own.
_TIMESTAMP = "original-timestamp"
_GROUP = "failed-group"
_DUE = "retry-due-at"  # ms since 1970
_ORIGIN = (_DESTINATION, _PARTITION, _OFFSET, _TIMESTAMP)
#: What a record has besides its own headers when it was sent on after a failure.
FAILURE_HEADERS = frozenset((_TYPE, _MESSAGE, _FAILED_AT, *_ORIGIN, _GROUP, _DUE))
_URI = "kafka://topic/"
_LONGEST_MESSAGE = 8192
_LONGEST_DELAY_S = 10_000_000
_MOST_HEADERS = 100_000  # that readers take

# The lane of a key waits as long as its record is tried in place, so this is short.
_IN_PLACE = RetryPolicy(max_attempts=3, initial_backoff_s=0.1, max_backoff_s=1.0)
_OUTAGE = RetryPolicy(max_attempts=None, initial_backoff_s=0.2, max_backoff_s=5.0)


class Origin(NamedTuple):
    """The record that a copy was made of at first."""

    topic: str
    partition: int | None
    offset: int | None


class Fate(NamedTuple):
    """What becomes of a record: it is tried again `after_s`, or `copy` goes to another topic, or neither: the end."""

    told: str  # for the log
    after_s: float | None = None
    copy: Envelope[Any] | None = None
    is_outage: bool = False


class Failures:
    """Decides by the record, the error and how often it has failed.

    Args:
        group: The consumer group, after which its retry topics are named.
        topics: What the listener reads, as it takes them.
        wire: By which name a record's headers count attempts.
        retry, retry_topics, dead_letter_topic, reject_on: As `Listener` takes them.

    Raises:
        ConfigError: One of the last four is wrong.
    """

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        wire: str,
        retry: RetryPolicy | None = None,
        retry_topics: Iterable[float] = (),
        dead_letter_topic: str | None = None,
        reject_on: Iterable[type[Exception]] = (),
    ) -> None:
        self._policy = _IN_PLACE if retry is None else retry
        if not isinstance(self._policy, RetryPolicy):
            raise ConfigError(f"retry must be a RetryPolicy, not {type_name(retry)}")
        if self._policy.max_age_s is not None:
            raise ConfigError("retry.max_age_s is not for a listener: give max_attempts")
        delays = _delays(retry_topics)
        rejected = (reject_on,) if isinstance(reject_on, type) else tuple(reject_on)
        if not all(isinstance(each, type) and issubclass(each, Exception) for each in rejected):
            raise ConfigError("reject_on must be classes of exceptions")
        self._rejected = (DeserializationError, *rejected)
        self._group = group
        self._attempts = attempts_header(wire)
        #: The group's own topics, which its listener reads as well: a name and seconds each.
        self.delays = {f"{group}.retry.{_seconds(delay)}": delay for delay in delays}
        for name in self.delays:
            check_topic(f"the retry topic of group.id={group!r}", name)
        self._stages = list(self.delays)
        self._dead = dead_letter_topic
        if dead_letter_topic is not None:
            check_topic("dead_letter_topic", dead_letter_topic)
        for name in (*self._stages, *([] if dead_letter_topic is None else [dead_letter_topic])):
            if name in topics or any(_matches(each, name) for each in topics):
                raise ConfigError(
                    f"topics has {name!r}, or matches it, where what fails is sent: it would be read again"
                )

    @property
    def sends(self) -> bool:
        """Whether any record may be sent on."""
        return bool(self._stages) or self._dead is not None

    def due_in_s(self, envelope: ReceivedEnvelope[Any], wall: float) -> float:
        """Seconds until a record may be handled: those of a retry topic wait."""
        delay = self.delays.get(envelope.topic)
        if delay is None:
            return 0.0
        due = _number(dict(envelope.raw_headers).get(_DUE))
        # A clock may be wrong, on this machine or on the one that has sent it.
        return 0.0 if due is None else max(0.0, min(due / 1000 - wall, delay))

    def identify(self, envelope: ReceivedEnvelope[Any]) -> None:
        """Gives a copy that has no id the one that its first record has, which is made of the place of that."""
        if envelope.topic in self.delays:
            origin = origin_of(envelope.raw_headers)
            if origin is not None and origin.partition is not None and origin.offset is not None:
                envelope._take_id_of(f"{origin.topic}/{origin.partition}/{origin.offset}")

    def judge(
        self,
        envelope: ReceivedEnvelope[Any],
        error: BaseException,
        failures: int,
        outages: int,
        wall: float,
        random: Callable[[], float],
    ) -> Fate:
        """What becomes of a record after so many failures, the last one with `error`.

        Args:
            failures: In a row and in this topic, this one included; unless it is an outage.
            outages: The same for outages, which count no attempt.
            wall: Seconds since 1970.
            random: Answers from 0 to 1.
        """
        text = named_exception_text(error)
        if not isinstance(error, Exception):
            return Fate(f"the listener ends: {text}")
        if is_outage(error):
            after_s = _OUTAGE.delay_s(outages, random)
            return Fate(f"tried again in {after_s:.1f} s, and until it succeeds: {text}", after_s, is_outage=True)
        topic = self._dead
        if not isinstance(error, self._rejected):
            in_place = self._policy.max_attempts
            if envelope.topic in self.delays:
                in_place = 1  # its delays are longer than any back-off
            if in_place is None or failures < in_place:
                after_s = self._policy.delay_s(failures, random)
                return Fate(f"attempt {failures} failed, the next one is in {after_s:.1f} s: {text}", after_s)
            topic = self._next_topic(envelope.topic)
        if topic is None or topic == envelope.topic:
            return Fate(f"the listener ends, and does not commit it: {text}")
        copy = self._copy(envelope, error, failures, topic, wall)
        if topic == self._dead:
            return Fate(f"sent to dead letter topic {topic}: {text}", copy=copy)
        return Fate(f"sent to {topic}, to be tried again in {_seconds(self.delays[topic])} s: {text}", copy=copy)

    def _next_topic(self, topic: str) -> str | None:
        stage = self._stages.index(topic) + 1 if topic in self.delays else 0
        return self._stages[stage] if stage < len(self._stages) else self._dead

    def _copy(
        self, envelope: ReceivedEnvelope[Any], error: Exception, failures: int, topic: str, wall: float
    ) -> Envelope[Any]:
        given = dict(envelope.raw_headers)
        own: dict[str, str | bytes | None] = {
            self._attempts: str((_number(given.get(self._attempts)) or 0) + failures),
            _TYPE: _full_name(type(error)),
            _MESSAGE: exception_text(error)[:_LONGEST_MESSAGE],
            _FAILED_AT: str(int(wall * 1000)),
            _GROUP: self._group,
        }
        if envelope.topic in self.delays and _DESTINATION in given:
            own.update((name, given[name]) for name in _ORIGIN if name in given)
        else:
            own[_DESTINATION] = _URI + envelope.topic
            own[_PARTITION], own[_OFFSET] = str(envelope.partition), str(envelope.offset)
            if envelope.timestamp is not None:
                own[_TIMESTAMP] = str(envelope.timestamp)
        if topic in self.delays:
            own[_DUE] = str(int((wall + self.delays[topic]) * 1000))
        headers: list[tuple[str, str | bytes | None]] = [
            pair for pair in envelope.raw_headers if pair[0] not in FAILURE_HEADERS and pair[0] != self._attempts
        ]
        headers[_MOST_HEADERS - len(own) :] = own.items()
        return raw_copy(topic, envelope.key, envelope.raw_value, headers)


def raw_copy(
    topic: str | None,
    key: str | bytes | None,
    value: bytes | None,
    headers: Iterable[tuple[str, str | bytes | None]],
) -> Envelope[Any]:
    """What the wire format "raw" writes as this record."""
    if value is not None:
        return Envelope(data=value, key=key, topic=topic, headers=list(headers))
    if key is not None:
        return Tombstone(key, topic=topic, headers=list(headers))
    return Envelope(None, topic=topic, headers=list(headers))


def origin_of(headers: Iterable[tuple[str, bytes | None]]) -> Origin | None:
    """Where a record that was sent on comes from; ``None`` if its headers do not say."""
    given = dict(headers)
    destination = given.get(_DESTINATION) or b""
    try:
        text = destination.decode()
    except UnicodeDecodeError:
        return None
    if not text.startswith(_URI) or len(text) == len(_URI):
        return None
    return Origin(text[len(_URI) :], _number(given.get(_PARTITION)), _number(given.get(_OFFSET)))


def attempts_header(wire: str) -> str:
    """The header that counts attempts."""
    return "ce_attempts" if wire == "cloudevents" else "attempts"


def is_outage(error: BaseException) -> bool:
    """Whether the database of an inbox does not answer, which is no fault of the record."""
    return getattr(error, "is_outage", False) is True


def _delays(given: Iterable[float]) -> list[float]:
    if isinstance(given, (str, bytes)):
        raise ConfigError("retry_topics must be seconds, such as [5, 60, 600]")
    delays = list(given)
    for each in delays:
        if not (is_number(each) and 0 < each <= _LONGEST_DELAY_S):
            raise ConfigError(f"retry_topics must be seconds above 0, such as [5, 60, 600], not {each!r}")
    if len(set(map(_seconds, delays))) < len(delays):
        raise ConfigError("retry_topics has the same delay twice: each has a topic of its own")
    return delays


def _seconds(delay: float) -> str:
    """As names of topics have it, which take no ``1e+06``."""
    return f"{delay:.0f}" if delay == int(delay) else f"{delay:g}"


def _matches(topic: str, name: str) -> bool:
    # librdkafka's regular expressions are POSIX's: what is none for Python is looked at when a record comes.
    try:
        return topic.startswith("^") and re.match(topic, name) is not None
    except re.error:
        return False


def _number(text: bytes | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(rb"[0-9]{1,18}", text) else None


def _full_name(kind: type) -> str:
    module = kind.__module__
    if module == "builtins":
        return kind.__qualname__
    if module.startswith("kbatch._"):
        module = "kbatch"
    return f"{module}.{kind.__qualname__}"
