"""A process that sends envelopes at a rate: `python -m benchmarks.pacer OPTIONS`, as JSON.

For each line, seconds, it sends for so long, a batch each 10 ms. Then it says when it called for each batch, on the
machine's monotonic clock, and how many envelopes it had sent with it.
"""

import sys
import time
import uuid

import msgspec

import kbatch
from benchmarks.data import kbatch_envelopes
from benchmarks.sides.base import say

INTERVAL_S = 0.01
POOL = 5_000


class Options(msgspec.Struct, frozen=True):
    bootstrap_servers: str
    topic: str
    rate: float


class Sent(msgspec.Struct, frozen=True):
    times: list[float]
    numbers: list[int]


def main() -> None:
    options = msgspec.json.decode(sys.argv[1], type=Options)
    bare = kbatch_envelopes(POOL)
    with kbatch.Producer({"bootstrap.servers": options.bootstrap_servers}) as producer:
        for line in sys.stdin:
            times: list[float] = []
            numbers: list[int] = []
            number = 0
            began = time.monotonic()
            while (now := time.monotonic()) < began + float(line):
                due = int((now - began + INTERVAL_S) * options.rate)
                if due > number:
                    # each with an id of its own: an inbox would leave copies out
                    batch = [bare[n % POOL].replace(id=uuid.uuid4()) for n in range(number, due)]
                    times.append(time.monotonic())
                    number = due
                    numbers.append(number)
                    producer.submit(options.topic, batch)
                time.sleep(max(0.0, now + INTERVAL_S - time.monotonic()))
            producer.flush()
            say(Sent(times, numbers))


if __name__ == "__main__":
    main()
