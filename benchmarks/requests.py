"""Into how many requests librdkafka cuts a batch, and how long one takes then, by `linger.ms`. On the mock cluster,
which counts requests; how many there are depends little on what else the machine does."""

import time
from dataclasses import dataclass

import kbatch
from benchmarks.broker import MockBroker
from benchmarks.data import kbatch_envelopes

WARM_UP_BATCHES = 5
#: messages, and batches at most
MESSAGES, BATCHES = 40_000, 60


@dataclass(frozen=True)
class Batches:
    #: produce requests per batch, and for each batch the milliseconds from its call to its answer
    requests: float
    milliseconds: list[float]


def send_batches(batch: int, linger_ms: float, rtt_ms: int) -> Batches:
    """One batch after the other, to four partitions."""
    envelopes = kbatch_envelopes(batch)
    with MockBroker() as broker:
        topic = broker.new_topic("requests", 4)
        config = {"bootstrap.servers": broker.bootstrap_servers, "linger.ms": str(linger_ms)}
        with kbatch.Producer(config) as producer:
            for _ in range(WARM_UP_BATCHES):
                producer.send_batch(topic, envelopes).raise_for_errors()
            broker.set_delay(rtt_ms)
            broker.start_request_tracking()
            taken: list[float] = []
            for _ in range(min(BATCHES, MESSAGES // batch)):
                start = time.perf_counter()
                producer.send_batch(topic, envelopes).raise_for_errors()
                taken.append((time.perf_counter() - start) * 1000)
            return Batches(broker.produce_requests() / len(taken), taken)
