import contextlib
import gc
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

import kbatch.testing
import kbatch.testing._mock  # the suite needs the compiled extension
from kbatch.testing import ApiKey, MockCluster, MockClusterError, Request

from ..waiting import until
from .clients import produce, read, read_back, read_committed

since_2_15 = pytest.mark.skipif(
    kbatch.librdkafka_version < "2.15", reason="platform: librdkafka older than 2.15 lacks the functions"
)


@pytest.fixture(params=[False, True], ids=["threads", "process"])
def cluster(request):
    with MockCluster(process=request.param) as cluster:
        yield cluster


def metadata(cluster, topic=None):
    return AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}).list_topics(topic, timeout=10)


@contextlib.contextmanager
def consumer_of(cluster, group="tests", **config):
    settings = {"bootstrap.servers": cluster.bootstrap_servers, "group.id": group, "log_level": 0}
    consumer = Consumer({**settings, "fetch.wait.max.ms": 10, "enable.auto.commit": False, **config})
    try:
        yield consumer
    finally:
        consumer.close()


def messages(count, **fields):
    return [{"key": f"k{i % 7}", "value": f"value {i}".encode(), **fields} for i in range(count)]


def test_public_names():
    assert kbatch.testing.__all__ == sorted(kbatch.testing.__all__)
    assert all(hasattr(kbatch.testing, name) for name in kbatch.testing.__all__)


def test_round_trip_by_content(cluster):
    cluster.create_topic("orders", partitions=6)
    assert len(metadata(cluster, "orders").topics["orders"].partitions) == 6
    sent = [
        {
            "key": f"customer-{i % 11}",
            "value": json.dumps({"order": i}).encode(),
            "headers": [("id", str(i)), ("id", b"\x00twice"), ("none", None)],
            "partition": i % 6,
        }
        for i in range(500)
    ]
    assert produce(cluster.bootstrap_servers, "orders", sent) == [None] * 500
    got = read(cluster.bootstrap_servers, "orders", 500)
    assert sorted(got) == list(range(6))
    for partition, records in got.items():
        expected = [m for m in sent if m["partition"] == partition]
        assert [r.offset for r in records] == list(range(len(expected)))
        assert [r.key for r in records] == [m["key"].encode() for m in expected]
        assert [r.value for r in records] == [m["value"] for m in expected]
        assert [r.headers for r in records] == [
            [(n, v.encode() if isinstance(v, str) else v) for n, v in m["headers"]] for m in expected
        ]


def test_topics_appear_on_first_use_with_four_partitions(cluster):
    assert produce(cluster.bootstrap_servers, "unheard-of", messages(1)) == [None]
    assert len(metadata(cluster, "unheard-of").topics["unheard-of"].partitions) == 4


def test_it_tells_the_process_of_its_brokers():
    with MockCluster() as here, MockCluster(process=True) as elsewhere:
        assert here.pid == os.getpid()
        assert elsewhere.pid != os.getpid()
        assert psutil.Process(elsewhere.pid).is_running()


def test_request_tracking(cluster):
    cluster.create_topic("t")
    assert produce(cluster.bootstrap_servers, "t", messages(5)) == [None] * 5
    assert cluster.requests() == []
    cluster.start_request_tracking()
    config = {"linger.ms": 0, "enable.idempotence": True}
    for message in messages(3):
        produce(cluster.bootstrap_servers, "t", [message], **config)
    requests = cluster.requests()
    assert all(type(r) is Request and r.broker_id == 1 for r in requests)
    assert [r.timestamp_us for r in requests] == sorted(r.timestamp_us for r in requests)
    assert cluster.produce_requests() == 3 == sum(r.api_key == ApiKey.PRODUCE for r in requests)
    assert sum(r.api_key == ApiKey.INIT_PRODUCER_ID for r in requests) == 3
    cluster.clear_requests()
    assert cluster.produce_requests() == 0
    # Requests are counted, not messages. Flush ends the linger: messages that were queued before the leader was known,
    # and move to their partition only then, go in several requests, the more the slower the machine is.
    produce(cluster.bootstrap_servers, "t", messages(1_000, partition=0), **{"linger.ms": 30_000})
    assert 1 <= cluster.produce_requests() == sum(r.api_key == ApiKey.PRODUCE for r in cluster.requests()) < 1_000
    cluster.stop_request_tracking()
    assert cluster.requests() == []


def test_pushed_request_errors_are_met_once_each(cluster):
    cluster.create_topic("t")
    # None of them is retried by librdkafka; 10 is MSG_SIZE_TOO_LARGE.
    cluster.push_request_errors(
        ApiKey.PRODUCE, ["INVALID_REQUIRED_ACKS", "RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED", 10]
    )
    errors = [produce(cluster.bootstrap_servers, "t", messages(1))[0] for _ in range(4)]
    assert [error and error.name() for error in errors] == [
        "INVALID_REQUIRED_ACKS",
        "TOPIC_AUTHORIZATION_FAILED",
        "MSG_SIZE_TOO_LARGE",
        None,
    ]
    cluster.push_request_errors(0, [10] * 5)
    cluster.clear_request_errors(0)
    assert produce(cluster.bootstrap_servers, "t", messages(1)) == [None]
    cluster.push_request_errors(0, [])
    assert len(read(cluster.bootstrap_servers, "t", 2)[0]) == 2


def test_pushed_broker_errors_and_their_count(cluster):
    cluster.create_topic("t")
    assert cluster.broker_error_stack_count(1, 0) == 0
    cluster.push_broker_errors(1, 0, [("_TRANSPORT", 0), (0, 300), ("TOPIC_AUTHORIZATION_FAILED", 0)])
    assert cluster.broker_error_stack_count(1, 0) == 3
    began = time.monotonic()
    assert produce(cluster.bootstrap_servers, "t", messages(1)) == [None]  # the disconnected request is sent again
    assert time.monotonic() - began >= 0.3
    assert cluster.broker_error_stack_count(1, 0) == 1
    (error,) = produce(cluster.bootstrap_servers, "t", messages(1))
    assert error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert cluster.broker_error_stack_count(1, 0) == 0
    assert len(read(cluster.bootstrap_servers, "t", 1)[0]) == 1


def test_round_trip_time(cluster):
    cluster.create_topic("t")
    cluster.set_rtt(-1, 200)
    began = time.monotonic()
    produce(cluster.bootstrap_servers, "t", messages(1))
    assert time.monotonic() - began >= 0.2
    cluster.set_rtt(1, 0)


@pytest.mark.parametrize("broker_id", [1, -1])
def test_broker_down_and_up(cluster, broker_id):
    cluster.create_topic("t")
    produce(cluster.bootstrap_servers, "t", messages(2))
    cluster.set_broker_down(broker_id)
    (error,) = produce(cluster.bootstrap_servers, "t", messages(1), **{"message.timeout.ms": 500})
    assert error.code() == KafkaError._MSG_TIMED_OUT
    cluster.set_broker_up(broker_id)
    assert produce(cluster.bootstrap_servers, "t", messages(1)) == [None]
    assert len(read(cluster.bootstrap_servers, "t", 3)[0]) == 3


def test_leaders_are_spread_and_one_that_is_down_stays_leader(cluster):
    with MockCluster(2, process=cluster.pid != os.getpid()) as cluster:
        cluster.create_topic("t", 4)

        def leaders():
            return [partition.leader for _, partition in sorted(metadata(cluster, "t").topics["t"].partitions.items())]

        before = leaders()
        assert set(before) == {1, 2}
        cluster.set_broker_down(2)
        assert leaders() == before


def test_topic_error(cluster):
    cluster.set_topic_error("forbidden", "TOPIC_AUTHORIZATION_FAILED")
    assert metadata(cluster, "forbidden").topics["forbidden"].error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    cluster.set_topic_error("forbidden", 0)
    assert metadata(cluster, "forbidden").topics["forbidden"].error is None


@since_2_15
def test_delete_topic(cluster):
    cluster.create_topic("t")
    produce(cluster.bootstrap_servers, "t", messages(3))
    cluster.delete_topic("t")
    with pytest.raises(MockClusterError, match="'t'") as raised:
        cluster.delete_topic("t")
    assert (raised.value.code, raised.value.name) == (3, "UNKNOWN_TOPIC_OR_PART")
    cluster.create_topic("t", 2)
    assert read(cluster.bootstrap_servers, "t", 0) == {}


@since_2_15
def test_delete_records(cluster):
    cluster.create_topic("t")
    for message in messages(4):
        produce(cluster.bootstrap_servers, "t", [message])
    cluster.delete_records("t", 0, 3)
    with pytest.raises(MockClusterError) as raised:
        cluster.delete_records("t", 0, 5)
    assert raised.value.name == "OFFSET_OUT_OF_RANGE"
    with pytest.raises(MockClusterError):
        cluster.delete_records("t", 1, 0)
    with consumer_of(cluster) as consumer:
        assert consumer.get_watermark_offsets(TopicPartition("t", 0), timeout=10) == (3, 4)


@since_2_15
def test_partition_errors_strike_one_partition(cluster):
    cluster.create_topic("t", 2)
    cluster.push_partition_errors("t", 1, 0, ["INVALID_REQUIRED_ACKS"])
    errors = produce(cluster.bootstrap_servers, "t", [{"value": b"a", "partition": 0}, {"value": b"b", "partition": 1}])
    assert errors[0] is None
    assert errors[1].code() == KafkaError.INVALID_REQUIRED_ACKS


def test_a_broker_that_has_errors_of_its_own_meets_the_clusters_no_more(cluster):
    cluster.create_topic("t")
    cluster.push_request_errors(0, ["MSG_SIZE_TOO_LARGE"])
    cluster.push_broker_errors(1, 0, [("TOPIC_AUTHORIZATION_FAILED", 0)])
    met = [produce(cluster.bootstrap_servers, "t", messages(1))[0] for _ in range(3)]
    assert [error and error.name() for error in met] == ["TOPIC_AUTHORIZATION_FAILED", None, None]
    assert cluster.broker_error_stack_count(1, 0) == 0


@since_2_15
@pytest.mark.parametrize("whose", ["the cluster's", "the broker's"])
def test_errors_of_partitions_come_last(cluster, whose):
    cluster.create_topic("t")
    cluster.push_partition_errors("t", 0, 0, ["INVALID_REQUIRED_ACKS"])
    if whose == "the cluster's":
        cluster.push_request_errors(0, ["MSG_SIZE_TOO_LARGE"])
    else:
        cluster.push_broker_errors(1, 0, [("MSG_SIZE_TOO_LARGE", 0)])
    met = [produce(cluster.bootstrap_servers, "t", messages(1, partition=0))[0] for _ in range(3)]
    assert [error and error.name() for error in met] == ["MSG_SIZE_TOO_LARGE", "INVALID_REQUIRED_ACKS", None]


def test_a_replication_factor_is_lowered_to_the_number_of_brokers(cluster):
    cluster.create_topic("t", 1, replication_factor=5)
    assert metadata(cluster, "t").topics["t"].partitions[0].replicas == [1]


def test_leaders(cluster):
    with MockCluster(3, process=cluster.pid != os.getpid()) as cluster:
        assert len(cluster.bootstrap_servers.split(",")) == 3
        cluster.create_topic("t", 3, replication_factor=3)
        cluster.set_partition_leader("t", 0, 2)
        cluster.set_partition_leader("t", 1, -1)
        cluster.set_partition_follower("t", 0, 3)
        cluster.set_partition_follower_watermarks("t", 0, 0, -1)
        partitions = metadata(cluster, "t").topics["t"].partitions
        assert (partitions[0].leader, partitions[1].leader) == (2, -1)
        assert sorted(partitions[2].replicas) == [1, 2, 3]
        cluster.set_partition_leader("t", 2, 3)
        cluster.push_partition_leader("t", 2, 1, 77)
        request = struct.pack(">ih1s?", 1, 1, b"t", False)
        leaders = [
            struct.pack(">hiii", 0, 2, *leader) in answer_of(cluster, ApiKey.METADATA, 7, request)
            for leader in [(1, 77), (1, 77)]
        ]
        assert leaders == [True, False]  # once
        assert metadata(cluster, "t").topics["t"].partitions[2].leader == 3
        with pytest.raises(MockClusterError, match="leader 9"):
            cluster.set_partition_leader("t", 0, 9)


def values_of(consumer, count):
    """What the next `count` messages of a consumer hold."""
    got = []

    def has_come():
        message = consumer.poll(0.1)
        if message is not None:
            assert message.error() is None, message.error()
            got.append(message.value())
        return len(got) == count

    until(has_come, f"{count} messages")
    return got


def test_a_consumer_fetches_from_the_follower_that_was_named(cluster):
    with MockCluster(3, process=cluster.pid != os.getpid()) as cluster:
        cluster.create_topic("t", 1, replication_factor=3)
        cluster.set_partition_leader("t", 0, 1)
        for message in messages(6):  # each in a batch of its own
            produce(cluster.bootstrap_servers, "t", [message])
        for follower, brokers in ((3, {1, 3}), (-1, {1})):
            cluster.set_partition_follower("t", 0, follower)
            cluster.start_request_tracking()
            with consumer_of(cluster, **{"client.rack": "anywhere", "auto.offset.reset": "earliest"}) as consumer:
                consumer.assign([TopicPartition("t", 0, 0)])
                assert values_of(consumer, 6) == [message["value"] for message in messages(6)]
            fetches = [request.broker_id for request in cluster.requests() if request.api_key == ApiKey.FETCH]
            assert (set(fetches), fetches[0]) == (brokers, 1)


def test_a_follower_has_what_is_between_its_watermarks(cluster):
    with MockCluster(3, process=cluster.pid != os.getpid()) as cluster:
        cluster.create_topic("t", 1, replication_factor=3)
        cluster.set_partition_leader("t", 0, 1)
        for message in messages(6):
            produce(cluster.bootstrap_servers, "t", [message])
        cluster.set_partition_follower("t", 0, 3)
        cluster.set_partition_follower_watermarks("t", 0, 0, 2)
        with consumer_of(cluster, **{"client.rack": "anywhere", "auto.offset.reset": "error"}) as consumer:
            consumer.assign([TopicPartition("t", 0, 0)])
            assert values_of(consumer, 3) == [message["value"] for message in messages(3)]
            assert consumer.poll(1) is None
            cluster.set_partition_follower_watermarks("t", 0, 0, -1)
            assert values_of(consumer, 3) == [message["value"] for message in messages(6)[3:]]


@since_2_15
def test_brokers_come_and_go(cluster):
    with pytest.raises(ValueError, match="last one"):
        cluster.remove_broker(1)
    cluster.create_topic("t", 2)
    produce(cluster.bootstrap_servers, "t", messages(4))
    cluster.add_broker(7)
    assert set(metadata(cluster).brokers) == {1, 7}
    assert {partition.leader for partition in metadata(cluster, "t").topics["t"].partitions.values()} == {1, 7}
    assert sum(map(len, read(cluster.bootstrap_servers, "t", 4).values())) == 4
    with pytest.raises(MockClusterError):
        cluster.add_broker(7)
    cluster.hide_broker(7)
    assert set(metadata(cluster).brokers) == {1}
    assert {partition.leader for partition in metadata(cluster, "t").topics["t"].partitions.values()} == {1}
    cluster.add_broker(8)
    cluster.remove_broker(7)
    cluster.set_broker_rack(8, "rack-8")
    cluster.set_broker_address(8, "127.0.0.2", 9999)
    broker = metadata(cluster).brokers[8]
    assert (broker.host, broker.port) == ("127.0.0.2", 9999)
    with pytest.raises(ValueError, match=r"no broker 7, only \[1, 8\]"):
        cluster.set_broker_down(7)


def test_groups_and_api_versions(cluster):
    cluster.set_group_rebalance_delay(0)
    cluster.set_coordinator("group", "g", 1)
    with pytest.raises(ValueError, match="kind"):
        cluster.set_coordinator("topic", "g", 1)
    cluster.set_api_version(ApiKey.INIT_PRODUCER_ID, -1, -1)
    with pytest.raises(MockClusterError):
        cluster.set_api_version(9_999, 0, 0)


def test_a_new_group_waits_for_more_members_as_long_as_was_set(cluster):
    cluster.create_topic("t")
    cluster.set_group_rebalance_delay(600_000)
    cluster.start_request_tracking()
    with consumer_of(cluster, "waits") as waits, consumer_of(cluster, "waits not") as waits_not:
        waits.subscribe(["t"])

        def has_joined():
            waits.poll(0.1)
            return any(request.api_key == ApiKey.JOIN_GROUP for request in cluster.requests())

        until(has_joined, "the request to join")
        cluster.set_group_rebalance_delay(0)
        waits_not.subscribe(["t"])
        until(lambda: waits_not.poll(0.1) or waits_not.assignment(), "the assignment")
        assert waits.poll(0.1) is None
        assert waits.assignment() == []


def test_a_transaction_commits_no_offsets_and_hides_nothing(cluster):
    cluster.create_topic("t")
    producer = Producer({"bootstrap.servers": cluster.bootstrap_servers, "transactional.id": "one", "log_level": 0})
    producer.init_transactions(30)
    with consumer_of(cluster) as consumer:
        consumer.subscribe(["t"])
        until(lambda: consumer.poll(0.1) or consumer.assignment(), "the assignment")
        for end in (producer.commit_transaction, producer.abort_transaction):
            producer.begin_transaction()
            producer.produce("t", end.__name__)
            producer.flush(30)
            offsets = [TopicPartition("t", 0, 1)]
            producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata(), 30)
            end(30)
        assert consumer.committed([TopicPartition("t", 0)], timeout=10)[0].offset < 0
    found = [record.value for record in read_committed(cluster.bootstrap_servers, "t")]
    assert found == [b"commit_transaction", b"abort_transaction"]


_MEMBER = """
import sys
from confluent_kafka import Consumer
consumer = Consumer({"bootstrap.servers": sys.argv[1], "group.id": "tests", "group.protocol": "consumer"})
consumer.subscribe(["t"])
while not consumer.assignment():
    consumer.poll(0.1)
print(flush=True)
consumer.poll(60)
"""


def test_of_the_new_protocol_a_member_is_missed_and_others_learn_of_it_as_soon_as_was_set(cluster):
    cluster.create_topic("t", partitions=4)
    cluster.set_group_session(timeout_ms=600, heartbeat_interval_ms=50)
    command = [sys.executable, "-c", _MEMBER, cluster.bootstrap_servers]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as lost:
        lost.stdout.readline()  # it has all partitions
        with consumer_of(cluster, **{"group.protocol": "consumer"}) as stays:
            stays.subscribe(["t"])
            until(lambda: stays.poll(0.01) or len(stays.assignment()) == 2, "its partitions")
            lost.kill()
            until(
                lambda: stays.poll(0.01) or len(stays.assignment()) == 4, "those of the other, not in half a minute", 20
            )
    for timeout_ms, interval_ms in ((0, 1), (1, 0), (2**31, 1)):
        with pytest.raises(ValueError, match=r"timeout_ms|heartbeat_interval_ms"):
            cluster.set_group_session(timeout_ms, interval_ms)


# -- its limits; one that is gone with a newer librdkafka can be taken out of the docstring


def readable(cluster, start):
    """Whether there is something at this offset or after it, and the sizes of what there is."""
    with consumer_of(cluster, **{"enable.partition.eof": True, "auto.offset.reset": "earliest"}) as consumer:
        consumer.assign([TopicPartition("t", 0, start)])
        sizes = []
        while True:
            message = consumer.poll(30)
            assert message is not None, "neither a message nor the end"
            if message.error() is not None:
                assert message.error().code() == KafkaError._PARTITION_EOF
                return sizes
            sizes.append(len(message.value()))


def produce_sizes(cluster, *sizes):
    for size in sizes:  # each in a batch of its own
        assert produce(
            cluster.bootstrap_servers, "t", [{"value": b"x" * size}], **{"message.max.bytes": 8_000_000}
        ) == [None]


def test_a_partition_keeps_5_mib():
    with MockCluster() as cluster:
        cluster.create_topic("t")
        produce_sizes(cluster, 2_000_000, 2_000_000, 1_000_000)
        assert readable(cluster, 0) == [2_000_000, 2_000_000, 1_000_000]
        produce_sizes(cluster, 1_000_000)
        assert readable(cluster, 0) == [2_000_000, 1_000_000, 1_000_000]


@pytest.mark.parametrize("before", [(), (1, 2)])
def test_a_larger_batch_is_acknowledged_and_lost_and_so_is_the_next(before):
    with MockCluster() as cluster:
        cluster.create_topic("t")
        produce_sizes(cluster, *before, 6_000_000)
        assert readable(cluster, 0) == ([] if before else [6_000_000])
        produce_sizes(cluster, 3)
        assert readable(cluster, 0) == []
        produce_sizes(cluster, 4)
        assert readable(cluster, 0) == [4]


def test_a_request_that_is_sent_again_is_written_again():
    with MockCluster() as cluster:
        cluster.create_topic("t")
        config = {"bootstrap.servers": cluster.bootstrap_servers, "enable.idempotence": True, "log_level": 0}
        producer = Producer({**config, "reconnect.backoff.max.ms": 100})
        producer.produce("t", b"first")
        assert producer.flush(30) == 0
        cluster.start_request_tracking()
        cluster.set_rtt(1, 600_000)  # written, and no answer
        outcomes = []
        producer.produce("t", b"second", on_delivery=lambda error, _: outcomes.append(error))
        until(cluster.produce_requests, "the request")
        cluster.set_broker_down(1)
        cluster.set_rtt(1, 0)
        cluster.set_broker_up(1)
        assert producer.flush(30) == 0
        assert outcomes == [None]
        values = [record.value for record in read_back(cluster.bootstrap_servers, "t")]
    assert values == [b"first", b"second", b"second"]


def answer_of(cluster, api_key, version, body=b""):
    """What the first broker answers to a request, as it stands on the wire."""
    request = struct.pack(">hhih", api_key, version, 1, -1) + body
    host, port = cluster.bootstrap_servers.split(",")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection, connection.makefile("rb") as stream:
        connection.sendall(struct.pack(">i", len(request)) + request)
        size, correlation_id = struct.unpack(">ii", stream.read(8))
        assert correlation_id == 1
        return stream.read(size - 4)


def announced_versions(cluster):
    answer = answer_of(cluster, ApiKey.API_VERSIONS, 0)
    return {key: (least, most) for key, least, most in struct.iter_unpack(">hhh", answer[6:])}


def test_versions_are_announced_as_set(cluster):
    before = announced_versions(cluster)
    cluster.set_api_version(ApiKey.PRODUCE, 2, 5)
    cluster.set_api_version(ApiKey.INIT_PRODUCER_ID, -1, -1)
    after = {key: versions for key, versions in before.items() if key != ApiKey.INIT_PRODUCER_ID}
    assert announced_versions(cluster) == {**after, ApiKey.PRODUCE: (2, 5)}


def test_no_request_creates_a_topic(cluster):
    create_topics, create_partitions = 19, 37
    assert announced_versions(cluster).keys() & {create_topics, create_partitions} == set()


@pytest.mark.parametrize("is_limited", [False, True])
def test_a_produce_request_of_version_10_for_a_partition_without_a_leader(is_limited):
    # No transaction; acks, time-out; one topic "t", its partition 0 with a record batch whose count alone counts.
    records = bytes(57) + struct.pack(">i", 1) + bytes(39)
    body = b"\0" + struct.pack(">hi", 1, 1_000) + b"\2\2t\2" + struct.pack(">i", 0) + b"\x65" + records + bytes(3)
    with MockCluster(process=True) as cluster:
        cluster.create_topic("t")
        cluster.set_partition_leader("t", 0, -1)
        if is_limited:
            cluster.set_api_version(ApiKey.PRODUCE, 0, 9)
            assert b"\2t" in answer_of(cluster, ApiKey.PRODUCE, 9, b"\0" + body)
        with pytest.raises((struct.error, OSError)):  # it closes the connection
            answer_of(cluster, ApiKey.PRODUCE, 10, b"\0" + body)
        if is_limited:
            cluster.create_topic("u")
        else:
            wait_until_gone(cluster.pid)
            with pytest.raises(MockClusterError, match="has ended with exit status"):
                cluster.create_topic("u")


@pytest.mark.parametrize(("kind", "number"), [("group", 0), ("transaction", 1)])
def test_a_coordinator_is_the_one_that_was_set(cluster, kind, number):
    with MockCluster(3, process=cluster.pid != os.getpid()) as cluster:
        for broker_id in (1, 2, 3):
            cluster.set_coordinator(kind, "mine", broker_id)
            answer = answer_of(cluster, ApiKey.FIND_COORDINATOR, 1, struct.pack(">h4sb", 4, b"mine", number))
            _, error, length = struct.unpack(">ihh", answer[:8])
            assert error == 0
            assert struct.unpack(">i", answer[8 + max(0, length) :][:4]) == (broker_id,)


def test_a_rack_is_named_in_metadata(cluster):
    cluster.set_broker_rack(-1, "rack-1")
    assert b"\0\6rack-1" in answer_of(cluster, ApiKey.METADATA, 1, struct.pack(">i", -1))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.create_topic("", 1), ValueError),
        (lambda c: c.create_topic("a\0b", 1), ValueError),
        (lambda c: c.create_topic("\ud800", 1), ValueError),
        (lambda c: c.create_topic(b"t", 1), TypeError),
        (lambda c: c.create_topic("t", 0), ValueError),
        (lambda c: c.create_topic("t", "4"), TypeError),
        (lambda c: c.create_topic("t", 1, 0), ValueError),
        (lambda c: c.push_request_errors(0, ["NO_SUCH_ERROR"]), ValueError),
        (lambda c: c.push_request_errors(0, "_TRANSPORT"), TypeError),
        (lambda c: c.push_request_errors(0, [1.5]), TypeError),
        (lambda c: c.push_request_errors(2**15, []), ValueError),
        (lambda c: c.push_broker_errors(1, 0, [(0, -1)]), ValueError),
        (lambda c: c.push_broker_errors(2, 0, [(0, 0)]), ValueError),
        (lambda c: c.set_rtt(1, -5), ValueError),
        (lambda c: c.set_partition_leader("t", -1, 1), ValueError),
        (lambda c: c.set_api_version(0, -2, 0), ValueError),
        (lambda c: c.set_broker_address(1, "host", 0), ValueError),
    ],
)
def test_bad_arguments(cluster, call, error):
    with pytest.raises(error):
        call(cluster)
    cluster.create_topic("still-alive")


def test_errors_name_librdkafka_and_pickle(cluster):
    cluster.create_topic("t")
    with pytest.raises(MockClusterError, match="topic 't': Broker: Topic already exists") as raised:
        cluster.create_topic("t")
    error = pickle.loads(pickle.dumps(raised.value))
    assert (str(error), error.code, error.name) == (str(raised.value), 36, "TOPIC_ALREADY_EXISTS")


@pytest.mark.parametrize("brokers", [0, -1, 1.0, True, "1"])
def test_bad_number_of_brokers(brokers):
    with pytest.raises((ValueError, TypeError)):
        MockCluster(brokers)


def test_every_call_of_the_binding_is_offered():
    offered = {name for name in dir(MockCluster) if not name.startswith("_")}
    bound = {name for name in dir(kbatch.testing._mock.Cluster) if not name.startswith("_")}
    assert offered == bound | {"pid", "produce_requests"}


@pytest.mark.skipif(kbatch.librdkafka_version >= "2.15", reason="platform: librdkafka has the functions")
def test_a_library_too_old_for_a_call_is_named(cluster):
    for call in (
        lambda: cluster.delete_topic("t"),
        lambda: cluster.delete_records("t", 0, 0),
        lambda: cluster.push_partition_errors("t", 0, 0, [1]),
        lambda: cluster.hide_broker(1),
    ):
        with pytest.raises(MockClusterError, match=r"is not in librdkafka 2\.1[234]\..*needs confluent-kafka 2\.15"):
            call()


def test_closed_cluster(cluster):
    assert cluster.bootstrap_servers in repr(cluster)
    cluster.close()
    cluster.close()
    assert "closed" in repr(cluster)
    with pytest.raises(MockClusterError, match="closed"):
        cluster.create_topic("t")
    with pytest.raises(KafkaException):
        metadata_of(cluster.bootstrap_servers)


def metadata_of(bootstrap_servers):
    return AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0}).list_topics(timeout=0.5)


def test_several_threads_share_a_cluster(cluster):
    failures = []

    def work(n):
        try:
            for i in range(20):
                cluster.create_topic(f"t-{n}-{i}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(name.startswith("t-") for name in metadata(cluster).topics) == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="platform: no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_destroys_nothing(cluster):
    cluster.create_topic("t")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with contextlib.suppress(MockClusterError):
                cluster.create_topic("u")
                os._exit(2)
            cluster.close()
            cluster._backend.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert set(metadata(cluster).topics) == {"t"}
    cluster.create_topic("u")


@pytest.mark.skipif(sys.platform != "linux", reason="platform: /proc")
@pytest.mark.parametrize("process", [False, True], ids=["threads", "process"])
def test_nothing_is_left_after_close(process):
    me = psutil.Process()

    def round_trip():
        with MockCluster(2, process=process) as cluster:
            cluster.create_topic("t")
            produce(cluster.bootstrap_servers, "t", messages(10))

    round_trip()
    gc.collect()
    before = (me.num_fds(), me.num_threads(), len(me.children()))
    for _ in range(5):
        round_trip()
    gc.collect()
    # What an earlier test has left may be gone by now.
    left = (me.num_fds(), me.num_threads(), len(me.children()))
    assert all(now <= then for now, then in zip(left, before, strict=True)), (left, before)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="platform: resident size")
@pytest.mark.allocator
def test_calls_do_not_leak():
    me = psutil.Process()
    with MockCluster() as cluster:
        cluster.create_topic("t")

        def calls(count):
            for _ in range(count):
                cluster.start_request_tracking()
                cluster.push_request_errors(0, [1, "_TRANSPORT"] * 50)
                cluster.clear_request_errors(0)
                cluster.requests()
                with contextlib.suppress(MockClusterError):
                    cluster.create_topic("t")

        calls(1_000)
        before = me.memory_info().rss
        calls(4_000)
        assert me.memory_info().rss - before < 2_000_000


def test_dropping_the_last_reference_closes(cluster):
    another = MockCluster(process=cluster.pid != os.getpid())
    servers = another.bootstrap_servers
    metadata_of(servers)
    del another
    gc.collect()
    with pytest.raises(KafkaException):
        metadata_of(servers)


SCRIPT = """
import sys, time
from kbatch.testing import MockCluster
cluster = MockCluster(process={process})
cluster.create_topic("t")
print(cluster.pid, flush=True)
{rest}
"""


def wait_until_gone(pid, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


@pytest.mark.parametrize("process", [False, True], ids=["threads", "process"])
def test_interpreter_exit_closes_open_clusters(process):
    code = SCRIPT.format(process=process, rest="")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    wait_until_gone(int(done.stdout))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="platform: no SIGKILL")
def test_a_killed_parent_leaves_no_orphan():
    code = SCRIPT.format(process=True, rest="time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    wait_until_gone(child)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="platform: no process groups")
def test_ctrl_c_on_the_terminal_spares_the_cluster():
    rest = (
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        "    cluster.create_topic('u')\n    print('alive', flush=True)"
    )
    code = SCRIPT.format(process=True, rest=rest)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with parent:
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.readline() == "alive\n"
        assert parent.wait(10) == 0
    wait_until_gone(child)


def test_a_dead_process_is_named():
    with MockCluster(process=True) as cluster:
        os.kill(cluster.pid, signal.SIGTERM)
        wait_until_gone(cluster.pid)
        for _ in range(2):
            with pytest.raises(MockClusterError, match=f"process .{cluster.pid}. has ended with exit status -15"):
                cluster.create_topic("t")


def test_a_call_cut_short_does_not_shift_the_replies():
    with MockCluster(process=True) as cluster:
        backend = cluster._backend
        backend._last_id += 1
        backend._requests.write(json.dumps({"id": backend._last_id, "call": "requests", "args": []}).encode() + b"\n")
        assert cluster.broker_error_stack_count(1, 0) == 0


def test_the_process_does_not_import_confluent_kafka():
    code = (
        "import sys, kbatch.testing._server, kbatch.testing._mock\n"
        "sys.exit([m for m in sys.modules if m.startswith('confluent_kafka')] or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_produced_batch_survives_a_stopped_client(kafka_cluster):
    """The fixture itself: a cluster with one broker, usable as it is."""
    assert isinstance(kafka_cluster, MockCluster)
    producer = Producer({"bootstrap.servers": kafka_cluster.bootstrap_servers})
    producer.produce("t", b"x")
    assert producer.flush(10) == 0


def test_plugin_fixture(pytester):
    pytester.makepyfile(
        """
        seen = []

        def test_fresh(kafka_cluster):
            kafka_cluster.create_topic("t")
            seen.append(kafka_cluster)

        def test_again(kafka_cluster):
            kafka_cluster.create_topic("t")
            assert "closed" in repr(seen[0])
            assert len(kafka_cluster.bootstrap_servers.split(",")) == 1
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)
