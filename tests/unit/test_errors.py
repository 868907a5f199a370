"""The tree of errors: as drawn, exported, and whole after a pickle."""

import copy
import inspect
import pickle
import re
import traceback
from typing import Any

import pytest
from confluent_kafka import KafkaError

import kbatch
from kbatch import _errors
from kbatch._fastmap import Outcomes
from tests.naming import shown

ID = kbatch.uuid7()


def tree(root: type) -> dict[str, Any]:
    # By kbatch._errors only: other parts may have errors of their own under the root.
    below = [cls for cls in root.__subclasses__() if cls.__module__ == _errors.__name__]
    return {cls.__name__: tree(cls) for cls in below}


def drawn_tree() -> dict[str, Any]:
    lines = re.findall(r"^ {4}( *(?:│ +)*(?:[├└]─ )?)(\w+)", inspect.getdoc(_errors) or "", re.MULTILINE)
    drawn: dict[str, Any] = {}
    path: list[dict[str, Any]] = [drawn]
    for prefix, name in lines:
        depth = len(prefix) // 4
        del path[depth + 1 :]
        path[depth][name] = {}
        path.append(path[depth][name])
    return drawn


def test_the_tree_is_as_drawn() -> None:
    assert drawn_tree() == {"KbatchError": tree(kbatch.KbatchError)}


def test_each_error_is_exported_and_no_other() -> None:
    classes = {
        name for name, value in vars(_errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(_errors.__all__) == classes
    assert {name for name in kbatch.__all__ if isinstance(getattr(kbatch, name), type)} >= classes
    exported = {name for name in kbatch.__all__ if inspect.isclass(getattr(kbatch, name))}
    assert {name for name in exported if issubclass(getattr(kbatch, name), BaseException)} == classes


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (kbatch.ConfigError, ValueError),
        (kbatch.SerializationError, ValueError),
        (kbatch.DeserializationError, ValueError),
        (kbatch.BatchPendingError, TimeoutError),
        (kbatch.SenderFullError, TimeoutError),
    ],
)
def test_errors_that_are_builtin_ones_too(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)


def report() -> kbatch.DeliveryReport:
    """Three envelopes that failed, the second for a reason of its own."""
    producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"})
    batch = kbatch.PendingBatch(producer._core)
    producer._core.fail(batch, (1, 2, 3), 1, -161, -152)
    return batch.report


def with_report(error: kbatch.KbatchError) -> kbatch.KbatchError:
    error.report = report()
    return error


ERRORS = [
    kbatch.KbatchError("a"),
    kbatch.ConfigError("linger.ms: bad"),
    kbatch.SerializationError("x", index=3, envelope_id=ID, field="key"),
    kbatch.NotYetDueError("x", index=3, envelope_id=ID),
    kbatch.SerializationError("x", index=None, envelope_id=None, field="header_hook"),
    kbatch.DeserializationError("x", topic="orders", partition=3, offset=17, header="id"),
    with_report(kbatch.SerializationError("x", index=1, envelope_id=ID, field="headers['x']")),
    kbatch.DeliveryError(-192, possibly_persisted=True),
    kbatch.DeliveryError(45, possibly_persisted=False),
    kbatch.BatchError("a", report()),
    kbatch.BatchTimeoutError("a", report()),
    kbatch.UnknownTopicError("a", report()),
    kbatch.BatchInterruptedError("a"),
    kbatch.UndeliveredError("a", count=4),
    kbatch.BatchPendingError("a", None),
    kbatch.ProducerFencedError("a newer instance", code=-144),
    kbatch.ProducerError("a"),
    kbatch.ProducerClosedError("a"),
    with_report(kbatch.ProducerFatalError("made up", code=45)),
    kbatch.TransactionUnknownError("a"),
    kbatch.ForkError("a"),
    kbatch.OutboxError("a"),
    kbatch.OutboxTimeoutError("a", possibly_persisted=True),
    kbatch.InboxError("a", is_outage=True),
    kbatch.ListenerError("a", code=30),
    kbatch.SenderError("a"),
    kbatch.SenderClosedError("a"),
    kbatch.SenderFullError("a"),
    kbatch.CircuitOpenError("a"),
]


def test_every_error_is_looked_at() -> None:
    assert {type(error).__name__ for error in ERRORS} == set(_errors.__all__)


def attributes(error: BaseException) -> dict[str, Any]:
    values = {name: value for name, value in vars(error).items() if not isinstance(value, kbatch.DeliveryReport)}
    made: kbatch.DeliveryReport | None = error.report
    if made is not None:
        values["report"] = (len(made), made.failed, dict(made.errors), made.partitions, made.offsets, made.latency_s)
    return values


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "duplicate", [*(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6)), copy.copy, copy.deepcopy]
)
def test_errors_are_whole_after_a_pickle(error: kbatch.KbatchError, duplicate: Any) -> None:
    made = duplicate(error)
    assert type(made) is type(error)
    assert made.args == error.args
    assert str(made) == str(error)
    assert attributes(made) == attributes(error)


def test_a_subclass_of_the_users_is_whole_too() -> None:
    error = Mine(7)
    error.add_note("a note") if hasattr(error, "add_note") else None
    made = pickle.loads(pickle.dumps(error))
    assert (type(made), str(made), vars(made)) == (Mine, "7 is mine", vars(error))


class Mine(kbatch.BatchError):
    def __init__(self, number: int) -> None:
        super().__init__(f"{number} is mine")
        self.number = number


def test_a_pending_batch_stays_out_of_the_pickle() -> None:
    producer = kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"})
    pending = kbatch.PendingBatch(producer._core)
    error = kbatch.BatchPendingError("no answer yet", pending)
    assert error.pending is pending
    assert pickle.loads(pickle.dumps(error)).pending is None


def test_errors_without_a_batch_have_no_report() -> None:
    assert kbatch.ConfigError("x").report is None
    assert kbatch.KbatchError.report is None


@pytest.mark.parametrize(
    ("index", "id", "where"),
    [(None, None, ""), (17, None, "envelope 17: "), (17, ID, f"envelope 17 (id {ID}): ")],
    ids=shown,
)
def test_serialization_errors_say_where(index: Any, id: Any, where: str) -> None:
    error = kbatch.SerializationError("key must be str", index=index, envelope_id=id, field="key")
    assert str(error) == f"{where}key must be str"
    assert (error.reason, error.index, error.envelope_id, error.field) == ("key must be str", index, id, "key")


# -- delivery errors


def test_delivery_errors_are_librdkafkas() -> None:
    for code in (KafkaError._MSG_TIMED_OUT, KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.MSG_SIZE_TOO_LARGE):
        error = kbatch.DeliveryError(code, possibly_persisted=False)
        assert (error.code, error.name) == (code, KafkaError(code).name())
        assert str(error) == f"{KafkaError(code).str()} ({error.name})"
        assert str(kbatch.DeliveryError(code, possibly_persisted=True)).endswith("it may be stored all the same")


def test_delivery_errors_are_equal_by_code_and_persistence() -> None:
    error = kbatch.DeliveryError(-192, possibly_persisted=True)
    assert error == kbatch.DeliveryError(-192, possibly_persisted=True)
    assert hash(error) == hash(kbatch.DeliveryError(-192, possibly_persisted=True))
    assert error != kbatch.DeliveryError(-192, possibly_persisted=False)
    assert error != kbatch.DeliveryError(-185, possibly_persisted=True)
    assert error != -192


@pytest.mark.parametrize(
    ("name", "retriable", "fatal"),
    [
        # The broker or the network may do better next time.
        ("_MSG_TIMED_OUT", True, False),
        ("_TIMED_OUT", True, False),
        ("_TRANSPORT", True, False),
        ("_DESTROY", True, False),
        ("_QUEUE_FULL", True, False),
        ("_PURGE_QUEUE", True, False),
        ("_PURGE_INFLIGHT", True, False),
        ("LEADER_NOT_AVAILABLE", True, False),
        ("NOT_ENOUGH_REPLICAS", True, False),
        ("NOT_ENOUGH_REPLICAS_AFTER_APPEND", True, False),
        ("REQUEST_TIMED_OUT", True, False),
        ("UNKNOWN_TOPIC_OR_PART", True, False),  # as Kafka's protocol has it: it may be about to be created
        # The same message will be refused again.
        ("MSG_SIZE_TOO_LARGE", False, False),
        ("TOPIC_AUTHORIZATION_FAILED", False, False),
        ("CLUSTER_AUTHORIZATION_FAILED", False, False),
        ("INVALID_RECORD", False, False),
        ("TOPIC_EXCEPTION", False, False),
        ("UNSUPPORTED_COMPRESSION_TYPE", False, False),
        ("POLICY_VIOLATION", False, False),
        ("_VALUE_SERIALIZATION", False, False),
        # The producer is lost.
        ("_FATAL", False, True),
        ("_FENCED", False, True),
        ("OUT_OF_ORDER_SEQUENCE_NUMBER", False, True),
        ("INVALID_PRODUCER_EPOCH", False, True),
        ("PRODUCER_FENCED", False, True),
        ("UNKNOWN_PRODUCER_ID", False, True),
    ],
)
def test_what_is_retriable_and_what_is_fatal(name: str, retriable: bool, fatal: bool) -> None:
    code = getattr(KafkaError, name, None)
    if code is None:
        pytest.skip(f"platform: confluent-kafka does not name {name}")
    error = kbatch.DeliveryError(code, possibly_persisted=False)
    assert (error.name, error.retriable, error.fatal) == (name, retriable, fatal)


def test_codes_that_librdkafka_does_not_know() -> None:
    error = kbatch.DeliveryError(9_999, possibly_persisted=False)
    assert (error.retriable, error.fatal) == (False, False)
    assert "9999" in str(error)


# -- the batch's error, by the codes of its envelopes


def outcomes(*items: tuple[int, int, int, int, int]) -> Outcomes:
    """Of ``(state, error, persistence, partition, offset)`` each; state 1 is acknowledged, 2 failed, 3 expired."""
    rebuild = Outcomes.__reduce__(report()._outcomes)[0]
    return rebuild(list(items))


def failed_with(*codes: int) -> kbatch.DeliveryReport:
    return kbatch.DeliveryReport(outcomes((1, 0, 2, 0, 0), *((2, code, 0, -1, -1) for code in codes)), 0.5)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([-192], kbatch.BatchTimeoutError),
        ([-192, -185, -166, 7], kbatch.BatchTimeoutError),
        ([3], kbatch.UnknownTopicError),
        ([-190, -188, 3, 100], kbatch.UnknownTopicError),
        ([-192, 3], kbatch.BatchError),
        ([10], kbatch.BatchError),
        ([-192, 10], kbatch.BatchError),
        ([-195], kbatch.BatchError),
    ],
)
def test_the_kind_of_a_batchs_failure(codes: list[int], expected: type[Exception]) -> None:
    made = failed_with(*codes)
    error = made.exception()
    assert type(error) is expected
    assert error.report is made
    first = kbatch.DeliveryError(codes[0], possibly_persisted=False)
    assert str(error) == f"{len(codes)} of {len(codes) + 1} envelopes failed; the first is envelope 1: {first}"
    with pytest.raises(expected) as caught:
        made.raise_for_errors()
    assert caught.value.report is made


def test_a_batch_without_a_failure_has_no_exception() -> None:
    made = kbatch.DeliveryReport(outcomes((1, 0, 2, 0, 7), (3, 0, 0, -1, -1)), 0.25)
    assert made.exception() is None
    assert made.raise_for_errors() is made
    assert (made.ok, bool(made), made.acked, made.failed, made.expired) == (True, True, 1, 0, 1)
    assert made.expired_indices == (1,)
    assert (made.partitions, made.offsets, dict(made.errors), made.latency_s) == ((0, -1), (7, -1), {}, 0.25)
    assert repr(made) == "<DeliveryReport 2 envelopes: acked=1 failed=0 expired=1 in 250.0 ms>"


def test_only_possibly_persisted_is_told_as_that() -> None:
    made = kbatch.DeliveryReport(outcomes(*((2, -192, persistence, 0, -1) for persistence in (0, 1, 2))), 0.0)
    assert [error.possibly_persisted for error in made.errors.values()] == [False, True, False]


def test_an_empty_report_is_true() -> None:
    made = kbatch.DeliveryReport(outcomes(), 0.0)
    assert (len(made), made.ok, bool(made), made.acked, made.errors) == (0, True, True, 0, {})


def test_a_traceback_of_a_chained_error_shows_its_cause() -> None:
    with kbatch.Producer({"bootstrap.servers": "127.0.0.1:1"}) as producer:
        with pytest.raises(kbatch.SerializationError) as caught:
            producer.send_batch("orders", [kbatch.Envelope(object())])
        text = "".join(traceback.format_exception(caught.value))
    assert "The above exception was the direct cause" in text
