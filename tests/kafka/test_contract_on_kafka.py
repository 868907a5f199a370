"""The batch callback contract, row by row, against a real broker, by every way to send."""

import asyncio
import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

import kbatch
from kbatch import Envelope, aio
from tests.kafka.cluster import ExternalCluster, KafkaCluster
from tests.mock.clients import end_offsets, read_back
from tests.waiting import until

Report = kbatch.DeliveryReport


class Case(NamedTuple):
    """What is sent, and what the answer is to be."""

    envelopes: Callable[[str], list[Any]]  # given the topic that there is
    method: str
    error: type[kbatch.KbatchError] | None
    codes: dict[int, set[str]]
    stored: list[bytes]
    config: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it


def good(*values: int, **fields: Any) -> list[Envelope]:
    return [Envelope(value, **fields) for value in values]


UNKNOWN_TOPIC = {"_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART"}
UNKNOWN_PARTITION = {"_UNKNOWN_PARTITION"}
# A topic that librdkafka is told not to exist is given up after this.
QUICK = {"topic.metadata.refresh.fast.interval.ms": 10, "topic.metadata.propagation.max.ms": 200}

CASES = {
    "successful": Case(lambda topic: good(*range(100)), "mark_successful", None, {}, [b"%d" % i for i in range(100)]),
    "empty": Case(lambda topic: [], "mark_successful", None, {}, []),
    "serialization": Case(
        lambda topic: [*good(0, 1), Envelope(object()), *good(3)],
        "mark_serialization_failure",
        kbatch.SerializationError,
        {0: {"_PURGE_QUEUE"}, 1: {"_PURGE_QUEUE"}, 2: {"_VALUE_SERIALIZATION"}, 3: {"_PURGE_QUEUE"}},
        [],
    ),
    "too large for the client": Case(
        lambda topic: [*good(0), Envelope(data=b"x" * 2_000_000), *good(2)],
        "mark_serialization_failure",
        kbatch.SerializationError,
        {0: {"_PURGE_QUEUE"}, 1: {"_VALUE_SERIALIZATION"}, 2: {"_PURGE_QUEUE"}},
        [],
    ),
    "no topic": Case(
        lambda topic: good(0, 1, topic=f"no-{topic}"),
        "mark_topic_does_not_exist",
        kbatch.UnknownTopicError,
        dict.fromkeys(range(2), UNKNOWN_TOPIC),
        [],
        QUICK,
    ),
    "no partition": Case(
        lambda topic: good(0, 1, partition=9),
        "mark_topic_does_not_exist",
        kbatch.UnknownTopicError,
        dict.fromkeys(range(2), UNKNOWN_PARTITION),
        [],
    ),
    "some to no topic": Case(
        lambda topic: [*good(0), *good(1, topic=f"no-{topic}"), *good(2, partition=9), *good(3)],
        "mark_topic_does_not_exist",
        kbatch.UnknownTopicError,
        {1: UNKNOWN_TOPIC, 2: UNKNOWN_PARTITION},
        [b"0", b"3"],
        QUICK,
    ),
    "mixed": Case(
        lambda topic: [*good(0, 3, partition=0), Envelope("x" * 50_000, partition=1), *good(2, partition=9)],
        "mark_processing_failure",
        kbatch.BatchError,
        {2: {"MSG_SIZE_TOO_LARGE"}, 3: UNKNOWN_PARTITION},
        [b"0", b"3"],
    ),
}


class Answer(NamedTuple):
    """One answer; without a method it came as a report, or was raised."""

    method: str
    outcome: Any

    @property
    def report(self) -> Report:
        return self.outcome if isinstance(self.outcome, Report) else self.outcome.report


class Recorder(kbatch.SenderCallback):
    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("mark_"):
            return super().__getattribute__(name)
        return lambda batch, outcome: self.answers.append(Answer(name, outcome))


class AsyncRecorder(Recorder, aio.SenderCallback):
    def __getattribute__(self, name: str) -> Any:
        record = super().__getattribute__(name)
        if not name.startswith("mark_"):
            return record

        async def awaited(batch: kbatch.OutgoingBatch, outcome: Any) -> None:
            await asyncio.sleep(0)
            record(batch, outcome)

        return awaited


Way = Callable[[dict[str, Any], str, Sequence[Any]], list[Answer]]


def _send_batch(config: dict[str, Any], topic: str, envelopes: Sequence[Any]) -> list[Answer]:
    with kbatch.Producer(config) as producer:
        return [Answer("", producer.send_batch(topic, envelopes))]


def _submit(config: dict[str, Any], topic: str, envelopes: Sequence[Any]) -> list[Answer]:
    called: list[Answer] = []
    with kbatch.Producer(config) as producer:
        pending = producer.submit(topic, envelopes, callback=lambda report: called.append(Answer("", report)))
        answers = [Answer("", pending.wait(60))]
        until(lambda: called, "the callback")
    assert len(called) == 1
    return answers + called


def _sender(config: dict[str, Any], topic: str, envelopes: Sequence[Any]) -> list[Answer]:
    callback = Recorder()
    with kbatch.Producer(config) as producer:
        kbatch.KafkaSender(producer, topic).send_batch(callback, kbatch.OutgoingBatch(envelopes))
        assert len(callback.answers) == 1  # before it returns
    return callback.answers


def _aio_send_batch(config: dict[str, Any], topic: str, envelopes: Sequence[Any]) -> list[Answer]:
    async def main() -> list[Answer]:
        async with aio.Producer(config) as producer:
            return [Answer("", await producer.send_batch(topic, envelopes))]

    return asyncio.run(main())


def _aio_submit(config: dict[str, Any], topic: str, envelopes: Sequence[Any]) -> list[Answer]:
    async def main() -> list[Answer]:
        told = asyncio.Queue[Report]()
        async with aio.Producer(config) as producer:
            pending = await producer.submit(topic, envelopes, callback=told.put)
            answers = [Answer("", await pending), Answer("", await told.get())]
        assert told.empty()
        return answers

    return asyncio.run(main())


def _aio_sender(callback: Recorder) -> Way:
    def send(config: dict[str, Any], topic: str, envelopes: Sequence[Any]) -> list[Answer]:
        async def main() -> None:
            async with aio.Producer(config) as producer:
                await aio.KafkaSender(producer, topic).send_batch(callback, kbatch.OutgoingBatch(envelopes))
                assert len(callback.answers) == 1

        callback.answers.clear()
        asyncio.run(main())
        return callback.answers

    return send


WAYS: dict[str, Way] = {
    "send_batch": _send_batch,
    "submit": _submit,
    "sender": _sender,
    "aio send_batch": _aio_send_batch,
    "aio submit": _aio_submit,
    "aio sender": _aio_sender(AsyncRecorder()),
    "aio sender, plain callback": _aio_sender(Recorder()),
}
every_way = pytest.mark.parametrize("way", WAYS)


def check(report: Report, count: int, codes: dict[int, set[str]]) -> None:
    """Each envelope has one outcome, and it is the one that is due."""
    assert len(report) == count
    assert report.acked + report.failed + report.expired == count
    assert report.errors.keys() == codes.keys()
    for index, error in report.errors.items():
        assert error.name in codes[index]
        assert not error.possibly_persisted


@every_way
@pytest.mark.parametrize("name", CASES)
def test_each_row(kafka: ExternalCluster, name: str, way: str) -> None:
    case = CASES[name]
    topic = kafka.create_topic(partitions=2, config={"max.message.bytes": "20000"})
    envelopes = case.envelopes(topic)
    config = {"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0, "enable.idempotence": False, **case.config}
    if case.error is kbatch.SerializationError and "sender" not in way:
        with pytest.raises(kbatch.SerializationError) as caught:
            WAYS[way](config, topic, envelopes)
        (to_blame,) = (index for index, names in case.codes.items() if names == {"_VALUE_SERIALIZATION"})
        assert caught.value.index == to_blame
    else:
        for answer in WAYS[way](config, topic, envelopes):
            check(answer.report, len(envelopes), case.codes)
            if "sender" in way:
                assert answer.method == case.method
                assert type(answer.outcome) is (case.error or Report)
            elif case.error is None:
                assert answer.report.raise_for_errors() is answer.report
            else:
                assert type(answer.report.exception()) is case.error
    stored = read_back(kafka.bootstrap_servers, topic)
    assert collections.Counter(record.value for record in stored) == collections.Counter(case.stored)


@every_way
def test_every_failure_is_a_timeout_and_the_batch_may_be_sent_again(one_broker: KafkaCluster, way: str) -> None:
    topic = one_broker.create_topic(partitions=1)
    batch = good(0, 1, 2)
    config = {"bootstrap.servers": one_broker.proxied_servers, "log_level": 0, "error_cb": lambda error: None}
    one_broker.brokers[0].proxy.refuse()
    for answer in WAYS[way]({**config, "message.timeout.ms": 300}, topic, batch):
        check(answer.report, 3, {index: {"_MSG_TIMED_OUT"} for index in range(3)})
        assert all(error.retriable for error in answer.report.errors.values())
        assert type(answer.report.exception()) is kbatch.BatchTimeoutError
        assert answer.method in ("", "mark_timed_out")
    assert end_offsets(one_broker.bootstrap_servers, topic) == {0: 0}
    one_broker.heal()
    for answer in WAYS[way](config, topic, batch):
        check(answer.report, 3, {})
    stored = read_back(one_broker.bootstrap_servers, topic)
    assert [(record.value, dict(record.headers)["id"]) for record in stored] == [
        (b"%d" % i, str(envelope.id).encode()) for i, envelope in enumerate(batch)
    ]
