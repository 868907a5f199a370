"""A relay beside one that awaits each message, as relays are where nobody thinks of batches.

The yardstick has every advantage: it reads 100 rows at a time, nothing is decoded, since the messages lie ready, and it
keeps no leases and looks after no failures. But each message waits for its acknowledgement, and each row is deleted by
a statement that is committed alone.
"""

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, TypeAlias

import kbatch
from benchmarks.broker import Broker, OpenBroker
from benchmarks.data import kbatch_envelopes
from benchmarks.database import Database, New, databases
from benchmarks.figures import Figure, Section, figure
from benchmarks.outbox_postgres import _relay_all

ROWS = 50_000  # in the outbox when a relay begins
SECONDS = 2.0  # of the relay that awaits each message
DISTINCT = 5_000  # envelopes; each is in the outbox several times
PAGE = 100
PARTITIONS = 32
ROUND_TRIPS_MS = (0, 1)
TARGET = 100.0  # with a round trip of 1 ms

Messages: TypeAlias = Mapping[uuid.UUID, "kbatch.Envelope[Any]"]


def relay_each(
    database: Database, producer: kbatch.Producer, topic: str, messages: Messages, seconds: float = float("inf")
) -> int:
    """How many messages were sent until the outbox was empty or the time over."""
    mark, table = database.mark, f"{database.prefix}outbox"
    select = (
        f"SELECT bucket, seq, id, packed FROM {table} WHERE (bucket, seq) > ({mark}, {mark}) "
        f"ORDER BY bucket, seq LIMIT {PAGE}"
    )
    delete = f"DELETE FROM {table} WHERE bucket = {mark} AND seq = {mark}"
    place = (-1, -1)
    sent = 0
    end = time.perf_counter() + seconds
    with closing(database.connect()) as connection:
        while rows := connection.execute(select, place).fetchall():
            for bucket, seq, id_, _ in rows:
                message = messages[id_ if isinstance(id_, uuid.UUID) else uuid.UUID(bytes=id_)]
                producer.send_batch(topic, [message]).raise_for_errors()
                connection.execute(delete, (bucket, seq))
                sent += 1
                if time.perf_counter() >= end:
                    return sent
            place = rows[-1][:2]
    return sent


def awaitings(turns: int, open_broker: OpenBroker) -> Iterator[Section]:
    """Both relays in turn, in each database and at each round trip."""
    section = Section(
        f"Outbox: a relay in this process with {ROWS:,} rows, and one that awaits each message", "outbox-awaiting"
    )
    with databases() as news, open_broker() as broker:
        for new in news:
            for rtt_ms in ROUND_TRIPS_MS:
                broker.set_delay(rtt_ms)
                section.figures += _compared(turns, new, rtt_ms, broker)
    yield section


def _compared(turns: int, new: New, rtt_ms: int, broker: Broker) -> list[Figure]:
    envelopes = kbatch_envelopes(DISTINCT)
    rates: list[float] = []
    awaiting: list[float] = []
    for _ in range(turns):
        topic = broker.new_topic("outbox", PARTITIONS)
        rates.append(ROWS / _relay_all(_filled(new, envelopes, topic).outbox(), broker, topic, ROWS))
        awaiting.append(_rate_of_each(_filled(new, envelopes, topic), broker, topic, envelopes))
    name = f"{new().name}, round trip {rtt_ms} ms" if rtt_ms else new().name
    ratios = [one / other for one, other in zip(rates, awaiting, strict=True)]
    return [
        figure(f"{name}: relay, rows/s", rates, digits=0),
        figure(f"{name}: one that awaits each message, rows/s", awaiting, digits=0),
        figure(f"{name}: relay / one that awaits each message", ratios, target=TARGET if rtt_ms else None, digits=0),
    ]


def _filled(new: New, envelopes: list["kbatch.Envelope[Any]"], topic: str) -> Database:
    """An outbox with rows."""
    database = new()
    outbox = database.outbox()
    outbox.create()
    with closing(database.connect()) as connection:
        for _ in range(ROWS // len(envelopes)):
            connection.execute(database.begin)
            outbox.add(connection, envelopes, topic=topic)
            connection.execute("COMMIT")
    return database


def _rate_of_each(database: Database, broker: Broker, topic: str, envelopes: list["kbatch.Envelope[Any]"]) -> float:
    messages = {envelope.id: envelope for envelope in envelopes}
    with kbatch.Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        producer.send_batch(topic, [kbatch.Envelope(data=b"0")]).raise_for_errors()
        began = time.perf_counter()
        sent = relay_each(database, producer, topic, messages, SECONDS)
        return sent / (time.perf_counter() - began)
