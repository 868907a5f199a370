"""What a listener does with a record that failed: decided without threads, clocks and brokers."""

import logging
from typing import Any
from unittest import mock

import pytest

import kbatch
from kbatch._fastmap import received
from kbatch._pending import PendingBatch
from kbatch._receiving._copies import Copies, shared_config
from kbatch._receiving._delayed import Delayed
from kbatch._receiving._failing import Failing, OvertakenError
from kbatch._receiving._failures import FAILURE_HEADERS, Failures, Origin, origin_of
from kbatch._receiving._lanes import BatchLanes, Lanes, Work
from kbatch._receiving._positions import Positions
from kbatch._receiving._transacting import Transacting
from kbatch._recovery._handle import ProducerHandle
from kbatch.testing import MemoryProducer
from tests.waiting import until

WALL = 1_700_000_000.25
ID = ("id", b"0192f0c1-2345-7abc-8def-0123456789ab")


def record(
    topic: str = "orders",
    headers: tuple[tuple[str, bytes | None], ...] = (ID, ("attempts", b"2"), ("x", b"\xff"), ("x", None)),
    value: bytes | None = b'{"n":1}',
    key: bytes | None = b"k",
    wire: str = "kbatch",
) -> kbatch.ReceivedEnvelope[Any]:
    return received(topic, 3, 17, 1_690_000_000_000, key, value, headers, wire)


def work_of(*envelopes: kbatch.ReceivedEnvelope[Any], lane: object = None) -> Work:
    positions = Positions()
    positions.give([("orders", 3)])
    places = [positions.begin(("orders", 3), n) for n in range(len(envelopes))]
    return Work(("orders", 3), envelopes, tuple(place for place in places if place is not None), 0, lane)


def failures(**options: Any) -> Failures:
    return Failures("billing", ["orders"], "kbatch", **options)


def judge(policy: Failures, envelope: kbatch.ReceivedEnvelope[Any], error: BaseException, count: int = 1) -> Any:
    return policy.judge(envelope, error, count, 1, WALL, lambda: 0.0)


class DatabaseGone(Exception):
    is_outage = True


def test_a_record_is_tried_three_times_in_place_and_then_ends_the_listener_when_nothing_else_is_said() -> None:
    policy = failures()
    assert not policy.sends
    fates = [judge(policy, record(), ValueError("no"), count) for count in (1, 2, 3)]
    assert [fate.after_s for fate in fates] == [0.1, 0.2, None]
    assert fates[2].copy is None
    assert "the listener ends, and does not commit it: ValueError: no" in fates[2].told


def test_a_record_goes_through_the_retry_topics_to_the_dead_letter_topic() -> None:
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), retry_topics=[5, 0.5], dead_letter_topic="dead")
    assert policy.delays == {"billing.retry.5": 5, "billing.retry.0.5": 0.5}
    copy = judge(policy, record(), KeyError("stock")).copy
    assert (copy.topic, copy.key, copy.data) == ("billing.retry.5", b"k", b'{"n":1}')
    origin = [
        ("original-destination", "kafka://topic/orders"),
        ("original-partition", "3"),
        ("original-offset", "17"),
        ("original-timestamp", "1690000000000"),
    ]
    why = [("exception-type", "KeyError"), ("exception-message", "'stock'"), ("failed-at", "1700000000250")]
    group = ("failed-group", "billing")
    assert list(copy.headers) == [
        ID, ("x", b"\xff"), ("x", None), ("attempts", "3"), *why, group, *origin, ("retry-due-at", "1700000005250")
    ]  # fmt: skip
    given = tuple((name, value.encode() if isinstance(value, str) else value) for name, value in copy.headers)
    copy = judge(policy, record("billing.retry.5", given), KeyError("stock")).copy
    assert copy.topic == "billing.retry.0.5"
    assert dict(copy.headers)["attempts"] == "4"
    assert origin_of(given) == Origin("orders", 3, 17)
    encoded = [(name, value.encode()) for name, value in origin]
    assert [pair for pair in copy.headers if pair[0].startswith("original-")] == encoded
    copy = judge(policy, record("billing.retry.0.5", given), KeyError("stock")).copy
    assert copy.topic == "dead"
    assert "retry-due-at" not in dict(copy.headers)
    assert set(dict(copy.headers)) - FAILURE_HEADERS == {"id", "x", "attempts"}


def test_a_retry_topic_gives_one_attempt_each() -> None:
    policy = failures(retry_topics=[5], dead_letter_topic="dead")
    assert judge(policy, record(), ValueError()).after_s is not None
    assert judge(policy, record("billing.retry.5"), ValueError()).copy.topic == "dead"


@pytest.mark.parametrize("error", [ValueError("never"), UnicodeError("a subclass")])
def test_what_is_rejected_goes_to_the_dead_letters_at_once(error: Exception) -> None:
    policy = failures(retry_topics=[5], dead_letter_topic="dead", reject_on=(ValueError,))
    assert judge(policy, record(), error).copy.topic == "dead"
    assert judge(policy, record(), TypeError()).copy is None


def test_what_cannot_be_read_goes_to_the_dead_letters_at_once_as_it_came() -> None:
    headers = (("id", b"none"), ("deliver-by", b"1999-01-01T00:00:00Z"), ("y", b"1"))
    envelope = record(headers=headers)
    assert isinstance(envelope.error, kbatch.DeserializationError)
    policy = failures(retry_topics=[5], dead_letter_topic="dead")
    copy = judge(policy, envelope, envelope.error).copy
    assert copy.topic == "dead"
    assert copy.headers[:3] == headers
    assert dict(copy.headers)["exception-type"] == "kbatch.DeserializationError"


def test_a_tombstone_and_a_null_value_travel_as_what_they_are() -> None:
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), dead_letter_topic="dead")
    assert isinstance(judge(policy, record(value=None), ValueError()).copy, kbatch.Tombstone)
    copy = judge(policy, record(value=None, key=None), ValueError()).copy
    assert (copy.message, copy.key) == (None, None)


def test_an_outage_is_waited_for_however_often_it_comes() -> None:
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), retry_topics=[5], dead_letter_topic="dead")
    for outages in (1, 10, 10_000):
        fate = policy.judge(record(), DatabaseGone(), 3, outages, WALL, lambda: 0.0)
        assert fate.copy is None
        assert fate.after_s <= 5.0


def test_what_is_no_exception_of_a_program_ends_the_listener() -> None:
    policy = failures(retry_topics=[5], dead_letter_topic="dead")
    for error in (KeyboardInterrupt(), SystemExit(1)):
        assert judge(policy, record(), error)[1:3] == (None, None)


def test_a_dead_letter_never_goes_to_the_topic_that_it_is_read_from() -> None:
    for topics in (["orders", "dead"], ["^de"], ["^.*"]):
        with pytest.raises(kbatch.ConfigError, match="it would be read again"):
            Failures("billing", topics, "kbatch", dead_letter_topic="dead")
    # A pattern of librdkafka's that Python has another mind of.
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), dead_letter_topic="dead")
    assert judge(policy, record("dead"), ValueError()).copy is None


def test_a_record_waits_for_its_time_and_no_longer_than_its_topic_says() -> None:
    policy = failures(retry_topics=[5])
    for header, left in ((b"1700000003250", 3.0), (b"1900000000000", 5.0), (b"1600000000000", 0.0), (b"soon", 0.0)):
        assert policy.due_in_s(record("billing.retry.5", (("retry-due-at", header),)), WALL) == left
    assert policy.due_in_s(record("orders", (("retry-due-at", b"1900000000000"),)), WALL) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retry": 3}, "retry must be a RetryPolicy, not int"),
        ({"retry": kbatch.RetryPolicy(max_age_s=1.0)}, "max_age_s is not for a listener"),
        ({"retry_topics": "5"}, "retry_topics must be seconds"),
        ({"retry_topics": [0]}, "seconds above 0"),
        ({"retry_topics": [5, 5.0]}, "the same delay twice"),
        ({"dead_letter_topic": "a b"}, "dead_letter_topic must be 1 to 249 letters"),
        ({"reject_on": [KeyboardInterrupt]}, "reject_on must be classes of exceptions"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(kbatch.ConfigError, match=message):
        failures(**options)


def test_each_delay_in_whole_seconds_makes_the_name_of_a_topic() -> None:
    policy = failures(retry_topics=[0.25, 5.0, 999_999, 1_000_000, 1_000_001.0, 10_000_000])
    group = next(iter(policy.delays)).partition(".retry.")[0]
    seconds = ("0.25", "5", "999999", "1000000", "1000001", "10000000")
    assert list(policy.delays) == [f"{group}.retry.{each}" for each in seconds]


def test_a_group_whose_name_is_none_of_a_topic_has_no_retry_topics() -> None:
    with pytest.raises(kbatch.ConfigError, match=r"retry topic of group\.id='a b'"):
        Failures("a b", ["orders"], "kbatch", retry_topics=[5])


def test_what_waits_behind_a_record_that_is_not_due_waits_with_it() -> None:
    delayed = Delayed()
    first, second, other = record("r"), record("r"), record("s")
    assert delayed.add(("r", 0), first, 10.0)
    assert not delayed.add(("r", 0), second, 5.0)
    assert delayed.add(("s", 0), other, 7.0)
    assert delayed.take_due(9.0, 10) == [other]
    assert delayed.take_empty() == [("s", 0)]
    assert delayed.take_due(10.0, 1) == [first]
    assert delayed.take_empty() == []
    assert delayed.take_due(10.0, 1) == [second]


def test_the_lane_of_what_is_put_off_waits_and_others_do_not() -> None:
    lanes = Lanes()
    works = {name: work_of(record(), lane=name[0]) for name in ("a1", "a2", "b1")}
    for work in works.values():
        lanes.add(work, 0.0)
    assert lanes.take(0.0) is works["a1"]
    lanes.put_off(works["a1"], 5.0)
    assert lanes.take(1.0) is works["b1"]
    assert (lanes.ripen(1.0), lanes.take(1.0)) == (5.0, None)
    assert (lanes.ripen(5.0), len(lanes), lanes.take(5.0)) == (None, 1, works["a1"])
    lanes.end(works["a1"], 5.0)
    assert lanes.take(5.0) is works["a2"]


@pytest.mark.parametrize("is_due", [False, True])
def test_what_was_put_off_of_a_partition_that_is_taken_is_dropped_with_what_is_behind_it(is_due: bool) -> None:
    for lanes in (Lanes(), BatchLanes(1, 0.0)):
        first, second = work_of(record(), lane="a"), work_of(record(), lane="a")
        lanes.add(first, 0.0)
        lanes.add(second, 0.0)
        begun = lanes.take(0.0)
        assert begun is not None
        lanes.put_off(begun, 5.0)
        lanes.ripen(9.0 if is_due else 1.0)
        assert lanes.drop([("other", 0)]) == []
        assert len(lanes.drop([("orders", 3)])) == 2
        assert (lanes.ripen(9.0), len(lanes), lanes.take(9.0)) == (None, 0, None)
        lanes.add(work_of(record(), lane="a"), 9.0)
        assert lanes.take(9.0) is not None


def test_the_next_batch_of_a_partition_waits_for_one_that_was_put_off() -> None:
    lanes = BatchLanes(2, 0.0)
    for _ in range(4):
        lanes.add(work_of(record()), 0.0)
    batch = lanes.take(0.0)
    assert batch is not None
    lanes.put_off(batch, 5.0)
    assert (lanes.ripen(1.0), lanes.take(1.0)) == (5.0, None)
    lanes.ripen(5.0)
    assert lanes.take(5.0) is batch
    lanes.end(batch, 5.0)
    assert lanes.take(5.0) is not None


def test_a_consumers_own_keys_are_none_of_its_producers(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "bootstrap.servers": "localhost:1", "group.id": "g", "max.partition.fetch.bytes": 1000,
        "session.timeout.ms": 1500, "allow.auto.create.topics": True,
        "sasl.username": "u", "security.protocol": "plaintext",
    }  # fmt: skip
    shared = shared_config(config)
    assert set(shared) == {"bootstrap.servers", "sasl.username", "security.protocol", "message.max.bytes"}
    with caplog.at_level(logging.WARNING):
        kbatch.Producer(shared).close()
    assert not caplog.records


class Recorder:
    """Steps and copies of a `Failing`, which are all at once."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def done(self, work: Work) -> None:
        self.told.append("done")

    def fail(self, work: Work, error: BaseException) -> None:
        self.told.append("fail")

    def put_off(self, work: Work, due: float) -> None:
        self.told.append(("again", work.part))

    def send(self, work: Any, answer: Any) -> None:
        self.told.append(("copy", dict(work.copy.headers)["original-offset"]))
        answer(None)


def test_of_a_batch_that_fails_only_the_record_that_is_to_blame_is_dead() -> None:
    recorder = Recorder()
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=2), dead_letter_topic="dead")
    failing = Failing(policy, recorder, lambda: 0.0, lambda: WALL)
    work = work_of(*(received("orders", 3, n, 0, b"k", b"{}", ()) for n in range(3)))
    for _ in range(2):  # as one
        failing.failed(recorder, work, ValueError("which?"))
    assert recorder.told == [("again", None), ("again", 0)]
    assert work.envelope.offset == 0
    failing.handled(recorder, work)
    assert work.envelope.offset == 1
    assert not failing.failed(recorder, work, ValueError("this one"))
    assert failing.failed(recorder, work, ValueError("this one"))
    assert work.copy is not None
    assert dict(work.copy.headers)["attempts"] == "2"  # those of the batch do not count
    failing.send_on(recorder, work)
    failing.handled(recorder, work)
    assert recorder.told[2:] == [("again", 1), ("again", 1), ("copy", "1"), ("again", 2), "done"]
    assert failing.stats() == {"attempts_failed": 4, "to_retry": 0, "dead": 1}


def test_a_copy_that_is_not_stored_is_sent_again_and_counts_no_attempt() -> None:
    answers: list[Any] = [kbatch.DeliveryError(-192, possibly_persisted=False), kbatch.ProducerError("down"), None]
    sent: list[Any] = []

    class Slow(Recorder):
        def send(self, work: Any, answer: Any) -> None:
            sent.append(work.copy)
            answer(answers[len(sent) - 1])

    recorder = Slow()
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), dead_letter_topic="dead")
    failing = Failing(policy, recorder, lambda: 0.0, lambda: WALL)
    work = work_of(record())
    assert failing.failed(recorder, work, ValueError())
    for _ in range(3):
        failing.send_on(recorder, work)
    assert recorder.told == [("again", None), ("again", None), "done"]
    assert sent == [sent[0]] * 3
    assert failing.stats() == {"attempts_failed": 1, "to_retry": 0, "dead": 1}


def test_a_copy_that_its_topic_never_takes_ends_the_listener() -> None:
    refusal = kbatch.DeliveryError(29, possibly_persisted=False)

    class Refusing(Recorder):
        def send(self, work: Any, answer: Any) -> None:
            answer(refusal)

    recorder = Refusing()
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), dead_letter_topic="dead")
    failing, work = Failing(policy, recorder), work_of(record())
    assert failing.failed(recorder, work, ValueError())
    failing.send_on(recorder, work)
    assert recorder.told == ["fail"]


def test_of_a_copy_whose_record_is_anothers_nothing_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    transacting: Any = Transacting({"bootstrap.servers": "localhost:1", "group.id": "g"}, "one", "kbatch", None)
    transacting._reading = mock.Mock()  # of the run
    monkeypatch.setattr(transacting, "commit", mock.Mock(side_effect=OvertakenError))
    recorder = Recorder()
    policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), dead_letter_topic="dead")
    failing, work = Failing(policy, transacting), work_of(record())
    assert failing.failed(recorder, work, ValueError())
    caplog.clear()
    failing.send_on(recorder, work)
    assert (recorder.told, caplog.text) == ([("again", None)], "")
    failing.sent_on(recorder, work, kbatch.ProducerError("down"))
    assert "sent again until it is: down" in caplog.text


@pytest.mark.parametrize("headers", [(), (("traceparent", b"\xff"), ("h\xe9", None))], ids=["regular", "irregular"])
@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "raw"])
def test_a_copy_of_a_record_without_an_id_has_the_id_of_the_first(wire: str, headers: Any) -> None:
    policy = Failures(
        "billing",
        ["orders"],
        wire,
        retry=kbatch.RetryPolicy(max_attempts=1),
        retry_topics=[5, 50],
        dead_letter_topic="d",
    )
    first = record(headers=headers, wire=wire)
    envelope, ids = first, {first.id}
    for offset in (4, 40):
        copy = judge(policy, envelope, ValueError()).copy
        given = [(name, value.encode() if isinstance(value, str) else value) for name, value in copy.headers]
        envelope = received(copy.topic, 1, offset, 1, copy.key, copy.data, given, wire)
        policy.identify(envelope)
        ids.add(envelope.id)
    assert ids == {first.id}
    # Of a record with an id of its own, and in any other topic, it stays as it is.
    if wire != "raw":
        own = received("billing.retry.5", 1, 4, 1, b"k", b"", [*given, ID], wire)
        policy.identify(own)
        assert str(own.id) == (ID[1] or b"").decode()
    other = received("others", 1, 4, 1, b"k", b"", given, wire)
    before = received("others", 1, 4, 1, b"k", b"", given, wire).id
    policy.identify(other)
    assert other.id == before != first.id


def test_a_copy_has_no_more_headers_than_readers_take() -> None:
    policy = failures(dead_letter_topic="dead")
    given = tuple((f"h{n}", b"") for n in range(100_000))
    copy = judge(policy, record(headers=given), ValueError(), 3).copy
    assert len(copy.headers) == 100_000
    assert list(copy.headers[:1000]) == list(given[:1000])
    assert dict(copy.headers)["original-offset"] == "17"


def test_a_copy_that_no_producer_will_send_is_not_sent_again_and_again(tmp_path: Any) -> None:
    refused = {"bootstrap.servers": "localhost:1", "security.protocol": "ssl", "ssl.ca.location": str(tmp_path / "no")}
    closed = MemoryProducer()
    closed.close()
    for copies, expected in (
        (Copies({}, closed), kbatch.ProducerClosedError),
        (Copies({**refused, "group.id": "g"}, None), kbatch.ConfigError),
    ):
        recorder = Recorder()
        policy = failures(retry=kbatch.RetryPolicy(max_attempts=1), dead_letter_topic="dead")
        failing, work = Failing(policy, copies), work_of(record())
        assert failing.failed(recorder, work, ValueError())
        copies.open()
        with pytest.raises(expected):  # who has called it ends the listener
            failing.send_on(recorder, work)
        assert recorder.told == []
        copies.close(1.0)


@pytest.mark.parametrize("lacks", ["thread", "memory"])
def test_a_copy_that_cannot_be_sent_alone_is_answered_and_sent_again(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = []
    batches: list[Any] = []

    def no_thread(handle: ProducerHandle) -> None:
        raise RuntimeError("can't start new thread")

    def no_memory(core: Any) -> PendingBatch:
        batches.append(core)
        if len(batches) == 2:
            raise MemoryError
        return PendingBatch(core)

    with MemoryProducer() as producer:
        producer.fail("MSG_SIZE_TOO_LARGE", times=2)
        copies, work = Copies({}, producer), work_of(record())
        work.copy = kbatch.Envelope(data=b"1", topic="dead")
        copies.open()
        with monkeypatch.context() as patched:
            if lacks == "thread":
                patched.setattr(ProducerHandle, "solo", no_thread)
            else:
                patched.setattr("kbatch._receiving._copies.PendingBatch", no_memory)
            copies.send(work, answers.append)
            until(lambda: answers, "an answer", 20)
        assert type(answers[0]) is kbatch.ProducerError
        copies.send(work, answers.append)
        until(lambda: len(answers) == 2, "an answer", 20)
        assert answers[1] is None
        copies.close(1.0)
        assert [each.topic() for each in producer.records] == ["dead"]
