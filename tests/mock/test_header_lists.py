"""Header lists of librdkafka are used again: each message has its own headers all the same."""

import asyncio
import itertools
import os
import random
import shutil
import subprocess
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import kbatch
from kbatch import Envelope, aio
from kbatch._fastmap import lists_are_as_expected, recycle_lists
from kbatch.testing import ApiKey, MockCluster
from tests.waiting import until

from .clients import Record, read
from .processes import needs_fork

MOMENT = datetime(2026, 11, 29, 12, 30, 1, 987654, tzinfo=timezone.utc)


@pytest.fixture
def cluster(kafka_cluster: MockCluster) -> MockCluster:
    for topic in ("recycled", "built"):
        kafka_cluster.create_topic(topic, partitions=1)
    return kafka_cluster


@pytest.fixture
def config(cluster: MockCluster) -> dict[str, Any]:
    return {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}


def mixed(count: int, seed: int, **fields: Any) -> list[Envelope[Any]]:
    """Envelopes whose headers differ in names, order, lengths, nulls, and in nothing but their values."""
    choose = random.Random(seed)
    made = []
    for n in range(count):
        headers: list[tuple[str, Any]] = [("n", f"{n:06}"), ("null", choose.choice([None, "x", "", b"y"]))]
        headers += [(choose.choice("abc"), "z" * choose.choice([0, 1, 2, 300])) for _ in range(choose.randrange(4))]
        headers += [("dup", "1"), ("dup", f"{choose.randrange(10)}"), ("größe", f"{choose.random():.3f}")]
        choose.shuffle(headers)
        made.append(
            Envelope(
                n,
                key=str(n),
                headers=headers,
                correlation_id=choose.choice([None, "c", f"c-{n}"]),
                message_type=choose.choice(["order", "refund", "orders"]),
                sent_at=MOMENT + timedelta(microseconds=n),
                source="shop",
                attempts=choose.choice([1, 9, 10, 12345]),
                **fields,
            )
        )
    return made


def contents(cluster: MockCluster, topic: str, count: int) -> list[tuple[Any, ...]]:
    records = read(cluster.bootstrap_servers, topic, count)
    return [(r.key, r.value, r.headers) for p in sorted(records) for r in records[p]]


def own_headers(record: Record) -> dict[str, bytes | None]:
    return dict(record.headers)


@pytest.mark.parametrize("wire", ["kbatch", "wolverine", "cloudevents", "raw"])
def test_records_are_those_of_lists_that_are_built(cluster: MockCluster, config: dict[str, Any], wire: Any) -> None:
    batches = [mixed(300, seed) for seed in range(8)]
    before = recycle_lists(False)
    with kbatch.Producer(config, wire=wire) as producer:
        for batch in batches:
            assert producer.send_batch("built", batch).ok
        built_bytes = producer.stats()["pooled_bytes"]
    recycle_lists(before)
    with kbatch.Producer(config, wire=wire) as producer:
        for batch in batches:
            assert producer.send_batch("recycled", batch).ok
        assert producer.stats()["pooled_bytes"] > built_bytes + 10_000
    assert contents(cluster, "recycled", 2_400) == contents(cluster, "built", 2_400)


def test_a_value_of_the_message_before_never_stays(cluster: MockCluster, config: dict[str, Any]) -> None:
    # One shape: nothing but the values differs.
    with kbatch.Producer(config, wire="raw") as producer:
        for first in range(0, 5_000, 50):
            batch = [Envelope(b"", headers=[("n", f"{n:06}"), ("same", "s")]) for n in range(first, first + 50)]
            assert producer.send_batch("recycled", batch).ok
    (records,) = read(cluster.bootstrap_servers, "recycled", 5_000).values()
    assert [record.headers for record in records] == [[("n", f"{n:06}".encode()), ("same", b"s")] for n in range(5_000)]


@pytest.mark.allocator
def test_names_of_one_length_are_told_apart(cluster: MockCluster, config: dict[str, Any]) -> None:
    # A name is made anew for each batch and forgotten with it: one of the next stands at its address.
    random_ = random.Random(1)  # names in turn may each find their own address again
    sent = [(random_.choice(("aaaa", "aaab", "baaa", "abaa")), f"{n:06}") for n in range(400)]
    places: set[tuple[int, str]] = set()
    with kbatch.Producer(config, wire="raw") as producer:
        for letters, value in sent:
            name = "".join(list(letters))
            places.add((id(name), letters))
            batch = [Envelope(b"", headers=[(name, value)])]
            assert producer.send_batch("recycled", batch).ok
            del batch, name
    (records,) = read(cluster.bootstrap_servers, "recycled", 400).values()
    assert [record.headers for record in records] == [[(k, v.encode())] for k, v in sent]
    assert len({address for address, _ in places}) < len(places)


def test_threads_loops_and_producers(cluster: MockCluster, config: dict[str, Any]) -> None:
    cluster.create_topic("many", partitions=1)
    per_sender = 3_000

    def envelopes(sender: int) -> list[list[Envelope[int]]]:
        all_of_it = [
            Envelope(
                n,
                key=f"{sender}",
                headers=[("sender", str(sender)), ("n", str(n)), ("x" * (n % 3), "é" * (n % 5))][: 2 + bool(n % 3)],
            )
            for n in range(per_sender)
        ]
        return [all_of_it[i : i + 100] for i in range(0, per_sender, 100)]

    def by_thread(producer: kbatch.Producer, sender: int) -> None:
        for batch in envelopes(sender):
            assert producer.send_batch("many", batch).ok

    async def by_loop(sender: int) -> None:
        async with aio.Producer(config) as producer:
            for report in await asyncio.gather(*(producer.send_batch("many", batch) for batch in envelopes(sender))):
                assert report.ok

    with kbatch.Producer(config) as shared:
        threads = [threading.Thread(target=by_thread, args=(shared, n)) for n in range(3)]
        threads.append(threading.Thread(target=lambda: asyncio.run(by_loop(3))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    (records,) = read(cluster.bootstrap_servers, "many", 4 * per_sender).values()
    seen: dict[str, list[int]] = {}
    for record in records:
        n = int(record.value or b"")
        headers = [(k, v) for k, v in record.headers if k in ("sender", "n", "x", "xx")]
        expected = [("sender", record.key), ("n", str(n).encode())]
        if n % 3:
            expected.append(("x" * (n % 3), ("é" * (n % 5)).encode()))
        assert headers == expected
        seen.setdefault(str(record.key), []).append(n)
    assert list(seen.values()) == [list(range(per_sender))] * 4


def test_what_fails_gives_its_lists_back(cluster: MockCluster, config: dict[str, Any]) -> None:
    with kbatch.Producer(config | {"enable.idempotence": False, "retries": 0}, wire="raw") as producer:
        small = [Envelope(b"", headers=[("n", f"{n:04}")]) for n in range(100)]
        for _ in range(3):
            assert producer.send_batch("recycled", small).ok
        pooled = producer.stats()["pooled_bytes"]
        for _ in range(3):  # refused
            cluster.push_request_errors(ApiKey.PRODUCE, ["INVALID_RECORD"])
            assert producer.send_batch("recycled", small).failed
        cluster.set_rtt(1, 2_000)
        late = producer.submit("recycled", small)  # purged
        with pytest.raises(kbatch.UndeliveredError):
            producer.close(0.1)
        assert late.report.failed == 100
    with kbatch.Producer(config, wire="raw") as producer:
        cluster.set_rtt(1, 0)
        for _ in range(3):
            assert producer.send_batch("built", small).ok
        assert producer.stats()["pooled_bytes"] == pooled
    (records,) = read(cluster.bootstrap_servers, "built", 300).values()
    assert [record.headers for record in records] == [[("n", f"{n:04}".encode())] for n in range(100)] * 3


def test_lists_in_a_timed_out_outage_are_used_again(cluster: MockCluster, config: dict[str, Any]) -> None:
    envelopes = [Envelope(n, headers=[("n", f"{n:04}")]) for n in range(500)]
    with kbatch.Producer(config | {"delivery.timeout.ms": 3_000}) as producer:
        for _ in range(2):
            assert producer.send_batch("recycled", envelopes).ok
        cluster.set_broker_down(1)
        report = producer.send_batch("recycled", envelopes)
        assert report.failed == 500
        cluster.set_broker_up(1)
        until(lambda: producer.send_batch("recycled", envelopes[:1]).ok, "the broker")
        assert producer.send_batch("built", envelopes).ok
    (records,) = read(cluster.bootstrap_servers, "built", 500).values()
    assert [own_headers(record)["n"] for record in records] == [f"{n:04}".encode() for n in range(500)]


@pytest.mark.long
def test_nothing_grows_with_shapes(cluster: MockCluster, config: dict[str, Any]) -> None:
    def batch(first: int) -> list[Envelope[int]]:
        return [
            Envelope(n, headers=[(f"h{n % 12_000}", "v"), ("n", "é" * (n % 7))]) for n in range(first, first + 2_000)
        ]

    with kbatch.Producer(config, wire="raw") as producer:
        for first in range(0, 72_000, 2_000):
            assert producer.send_batch("recycled", batch(first)).ok
        assert producer.stats()["pooled_bytes"] < 16_000_000
    (records,) = read(cluster.bootstrap_servers, "recycled", 72_000).values()
    for n, record in enumerate(records):
        assert record.headers == [(f"h{n % 12_000}", b"v"), ("n", ("é" * (n % 7)).encode())]


def test_an_idle_producer_gives_them_back(cluster: MockCluster, config: dict[str, Any]) -> None:
    envelopes = [Envelope(b"", headers=[("n", f"{n:04}")]) for n in range(1_000)]
    with kbatch.Producer(config, wire="raw") as producer:
        for _ in range(2):
            assert producer.send_batch("recycled", envelopes).ok
        used = producer.stats()["pooled_bytes"]
        until(lambda: producer.stats()["pooled_bytes"] < used - 100_000, "lists that are given back")
        for _ in range(2):
            assert producer.send_batch("recycled", envelopes).ok
    (records,) = read(cluster.bootstrap_servers, "recycled", 4_000).values()
    assert [record.headers for record in records] == [[("n", f"{n:04}".encode())] for n in range(1_000)] * 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_idle_producer_gives_back_those_of_one_short_batch(config: dict[str, Any], count: int) -> None:
    envelopes = [Envelope(b"", headers=[(f"h{n}", "v") for n in range(12)])] * count
    with kbatch.Producer(config, wire="raw") as producer:
        assert producer.send_batch("recycled", [Envelope(b"")]).ok
        most = producer.stats()["pooled_bytes"] + 10_000
        for _ in range(2):  # the second time the drainer sleeps, and has none to give back
            assert producer.send_batch("recycled", envelopes).ok
            assert producer.stats()["pooled_bytes"] > most
            until(lambda: producer.stats()["pooled_bytes"] < most, "lists that are given back")


def test_lists_are_kept_between_short_batches(cluster: MockCluster, config: dict[str, Any]) -> None:
    envelopes = [Envelope(b"", headers=[("n", f"{n:04}")]) for n in range(100)]  # one look at the reports
    with kbatch.Producer(config, wire="raw") as producer:
        assert producer.send_batch("built", [Envelope(b"")]).ok
        built = producer.stats()["pooled_bytes"]
        assert producer.send_batch("recycled", envelopes).ok
        kept = producer.stats()["pooled_bytes"]
        assert kept > built + 10_000
        assert producer.flush() == 0  # the drainer looks
        time.sleep(0.1)  # a tenth of the time after which it gives them back
        assert producer.stats()["pooled_bytes"] == kept


def test_after_the_end_none_is_counted(cluster: MockCluster, config: dict[str, Any]) -> None:
    envelopes = [Envelope(b"", headers=[("n", f"{n:04}")]) for n in range(100)]
    with kbatch.Producer(config, wire="raw") as producer:
        assert producer.send_batch("built", [Envelope(b"")] * 100).ok
        built = producer.stats()["pooled_bytes"]
        assert producer.send_batch("recycled", envelopes).ok
        assert producer.stats()["pooled_bytes"] > built + 10_000
    assert producer.stats()["pooled_bytes"] < built + 10_000


def test_large_lists_and_values_are_not_kept(cluster: MockCluster, config: dict[str, Any]) -> None:
    many = Envelope(b"", headers=[(f"h{n}", f"{n}") for n in range(20_000)])
    large = Envelope(b"", headers=[("large", "x" * 100_000)])
    with kbatch.Producer(config, wire="raw") as producer:
        assert producer.send_batch("built", [Envelope(b"")]).ok
        before = producer.stats()["pooled_bytes"]
        for _ in range(4):
            assert producer.send_batch("recycled", [large]).ok
            assert producer.send_batch("recycled", [many]).ok
        assert producer.stats()["pooled_bytes"] - before < 2_000_000  # the arena of 20,000 headers
    (records,) = read(cluster.bootstrap_servers, "recycled", 8).values()
    for record, envelope in zip(records, itertools.cycle([large, many])):
        assert record.headers == [(k, str(v).encode() if isinstance(v, str) else v) for k, v in envelope.headers]


@needs_fork[0]
@needs_fork[1]
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_them_alone(cluster: MockCluster, config: dict[str, Any]) -> None:
    envelopes = [Envelope(b"", headers=[("n", f"{n:04}")]) for n in range(200)]
    producer: kbatch.Producer | None = kbatch.Producer(config, wire="raw")
    assert producer is not None
    assert producer.send_batch("recycled", envelopes).ok
    assert producer.send_batch("recycled", envelopes).ok
    child = os.fork()
    if child == 0:
        status = 1
        try:
            producer = None
            with kbatch.Producer(config, wire="raw") as own:
                status = 0 if own.send_batch("built", envelopes).ok else 2
        finally:
            os._exit(status)
    assert producer.send_batch("recycled", envelopes).ok
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    producer.close()
    expected = [[("n", f"{n:04}".encode())] for n in range(200)]
    for topic, times in [("recycled", 3), ("built", 1)]:
        (records,) = read(cluster.bootstrap_servers, topic, 200 * times).values()
        assert [record.headers for record in records] == expected * times


def pooled_after(config: dict[str, Any], topic: str) -> int:
    """The bytes that a producer keeps that has sent the same three times."""
    with kbatch.Producer(config) as producer:
        for _ in range(3):
            assert producer.send_batch(topic, mixed(500, 1, id=kbatch.uuid7())).ok
        return producer.stats()["pooled_bytes"]


def test_where_they_are_not_as_expected_lists_are_built(cluster: MockCluster, config: dict[str, Any]) -> None:
    recycled = pooled_after(config, "recycled")
    before = recycle_lists(False)
    built = pooled_after(config, "built")
    recycle_lists(before)
    assert built < recycled - 50_000


def test_this_librdkafka_has_them() -> None:
    assert lists_are_as_expected()
    before = recycle_lists(True)
    recycle_lists(before)
    assert before


PLUGIN = """
#include <stddef.h>
int conf_init(void *conf, void **opaque, char *errstr, size_t size) { return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="platform: no compiler for a plugin")
def test_a_plugin_ends_it(cluster: MockCluster, config: dict[str, Any], tmp_path: Path) -> None:
    source, library = tmp_path / "plugin.c", tmp_path / "plugin.so"
    source.write_text(PLUGIN)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    assert (
        pooled_after(config | {"plugin.library.paths": str(library)}, "built")
        < pooled_after(config, "recycled") - 50_000
    )
