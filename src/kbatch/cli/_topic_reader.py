"""Reads a topic without a group: from where to where, which keys, how many."""

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from kbatch._fastmap import monotonic, wall_time
from kbatch.cli._connection import Connection
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._preflight import check_broker
from kbatch.cli._settings import Settings

_POLL_S = 0.2
_ASK_S = 30.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Range:
    """Which records of a topic the command line means."""

    topic: str
    begin: str = "beginning"
    end: str = "end"
    partition: int | None = None
    key: str | None = None
    count: int | None = None
    follow: bool = False


def _point(option: str, text: str, *names: str) -> tuple[str, int]:
    """What ``--from`` and ``--until`` take: its kind, and an offset or milliseconds since 1970."""
    if text in names:
        return text, 0
    if re.fullmatch("[0-9]{1,18}", text):
        return "offset", int(text)
    age = re.fullmatch("([0-9]{1,9})([smhd])", text)
    if age is not None:
        return "time", max(0, int((wall_time() - int(age[1]) * _UNITS[age[2]]) * 1000))
    with contextlib.suppress(ValueError):
        at = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
        if at.tzinfo is None:
            at = at.replace(tzinfo=datetime.timezone.utc)
        return "time", max(0, int(at.timestamp() * 1000))
    raise Failure(
        f"{option} takes {', '.join(names)}, an offset, an age (90s, 15m, 2h, 7d) or a time (2026-11-30T08:00:00Z)",
        USAGE,
    )


class TopicReader:
    """A consumer that is no member of a group and commits nothing unless `commit` is called.

    Raises:
        Failure: No broker answers, the topic is not there, or a setting is wrong.
    """

    def __init__(
        self, settings: Settings, wanted: Range, connection: Connection, timeout_s: float, group: str | None = None
    ) -> None:
        if settings.find("bootstrap.servers") is None:
            raise Failure(
                "no broker is named: give -X bootstrap.servers=HOST:PORT, KBATCH_BOOTSTRAP_SERVERS, or "
                "bootstrap.servers in a --config FILE",
                USAGE,
            )
        self._wanted, self._connection = wanted, connection
        if wanted.begin == "committed" and group is None:
            raise Failure("--from committed needs --group, which consume has", USAGE)
        self._begin = _point("--from", wanted.begin, "beginning", "end", *([] if group is None else ["committed"]))
        self._until = _point("--until", wanted.end, "end")
        config: Any = {
            "log_level": "0",
            **settings.values,
            "error_cb": connection,
            "group.id": group or "kbatch-reader",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": False,
        }
        try:
            self._consumer = Consumer(config)
        except (KafkaException, TypeError, ValueError):
            raise Failure(settings.explain(_why(settings)), USAGE) from None
        try:
            check_broker({"log_level": "0", **settings.values}, wanted.topic, timeout_s, connection)
            self._offsets = self._plan()
        except BaseException:
            self._consumer.close()
            raise

    def __enter__(self) -> "TopicReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def _plan(self) -> dict[int, tuple[int, int]]:
        """Of each partition the first offset to read and the first not to read."""
        topic = self._wanted.topic
        found = self._ask(lambda: self._consumer.list_topics(topic, timeout=_ASK_S)).topics[topic].partitions
        numbers = sorted(found)
        if self._wanted.partition is not None:
            if self._wanted.partition not in found:
                raise Failure(f"topic {topic!r} has {len(numbers)} partitions, and none is {self._wanted.partition}")
            numbers = [self._wanted.partition]
        marks = {
            number: self._ask(lambda number=number: self._consumer.get_watermark_offsets(  # type: ignore[misc]
                TopicPartition(topic, number), timeout=_ASK_S)) for number in numbers
        }  # fmt: skip
        begins, ends = self._offsets_of(self._begin, marks), self._offsets_of(self._until, marks)
        return {number: (begins[number], ends[number]) for number in numbers}

    def _offsets_of(self, point: tuple[str, int], marks: dict[int, tuple[int, int]]) -> dict[int, int]:
        kind, value = point
        topic = self._wanted.topic
        if kind == "beginning":
            return {number: low for number, (low, _) in marks.items()}
        if kind == "end":
            return {number: high for number, (_, high) in marks.items()}
        if kind == "offset":
            return {number: min(max(value, low), high) for number, (low, high) in marks.items()}
        if kind == "committed":
            asked = [TopicPartition(topic, number) for number in marks]
            found = self._ask(lambda: self._consumer.committed(asked, timeout=_ASK_S))
        else:
            asked = [TopicPartition(topic, number, value) for number in marks]
            found = self._ask(lambda: self._consumer.offsets_for_times(asked, timeout=_ASK_S))
        default = 0 if kind == "committed" else 1
        return {each.partition: each.offset if each.offset >= 0 else marks[each.partition][default] for each in found}

    def _ask(self, question: Callable[[], Any]) -> Any:
        end = monotonic() + _ASK_S
        while True:
            try:
                return question()
            except KafkaException as error:
                reason = error.args[0]
                # Of a topic that is new the broker may not know yet that it leads it.
                if (not reason.retriable() and reason.code() not in _NOT_YET) or monotonic() > end:
                    raise Failure(f"the broker did not answer: {reason.str()}") from None

    def messages(self, is_over: Callable[[], bool]) -> Iterator[Message | None]:
        """The records that are meant, by partition in order; ``None`` now and then while there is none.

        They are the same each time, whatever came since, and however long ago an age of ``--from`` began.
        """
        wanted = self._wanted
        key = None if wanted.key is None else wanted.key.encode()
        ends = {number: end for number, (begin, end) in self._offsets.items() if wanted.follow or begin < end}
        if not ends:
            return
        self._consumer.assign([TopicPartition(wanted.topic, number, self._offsets[number][0]) for number in ends])
        given = 0
        while ends and not is_over():
            message = self._consumer.poll(_POLL_S)
            self._connection.look()
            if message is None:
                if not wanted.follow:
                    self._drop_read(ends)
                yield None
                continue
            error = message.error()
            if error is not None:
                if error.fatal() or not (error.retriable() or error.code() in _NOT_YET):
                    raise Failure(f"cannot read {wanted.topic}: {error.str()}")
                continue
            self._connection.answered(all_is_well=True)
            number, offset = message.partition() or 0, message.offset() or 0
            if not wanted.follow:
                end = ends.get(number)
                if end is None or offset >= end:
                    ends.pop(number, None)
                    continue
                if offset + 1 >= end:
                    del ends[number]
            if key is not None and message.key() != key:
                continue
            yield message
            given += 1
            if given == wanted.count:
                return

    def _drop_read(self, ends: dict[int, int]) -> None:
        # Transactions' control records, and what compaction has left out, have offsets and do not come.
        for place in self._consumer.position([TopicPartition(self._wanted.topic, number) for number in ends]):
            if place.offset >= ends[place.partition]:
                del ends[place.partition]

    def commit(self, offsets: dict[int, int]) -> None:
        """Commits for the group: of each partition the next offset to read."""
        places = [TopicPartition(self._wanted.topic, number, offset) for number, offset in offsets.items()]
        try:
            self._consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as error:
            raise Failure(f"not committed: {error.args[0].str()}") from None


_NOT_YET = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._TIMED_OUT,
    KafkaError._RESOLVE,
)


def _why(settings: Settings) -> str:
    """Why librdkafka takes no such settings, as kbatch says it: without values that may be secrets."""
    from kbatch._errors import ConfigError
    from kbatch._receiving._config import ConsumerConfig

    try:
        ConsumerConfig.parse(settings.values, needs_group=False)
    except ConfigError as error:
        return str(error)
    return "librdkafka does not take these settings together"
