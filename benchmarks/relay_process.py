"""A relay in a process of its own: `python -m benchmarks.relay_process OPTIONS`, as JSON.

For each line of standard input it says how many records were acknowledged, and how many buckets it has. At the end of
its input it stops.
"""

import sys
import threading
from typing import Any

import msgspec

import kbatch
from benchmarks.database import Database
from benchmarks.sides.base import say


class Options(msgspec.Struct, frozen=True):
    database: Database
    bootstrap_servers: str
    #: of `kbatch.Relay`
    relay: dict[str, Any] = {}


class Count(msgspec.Struct, frozen=True):
    acked: int
    buckets: int


def main() -> None:
    options = msgspec.json.decode(sys.argv[1], type=Options)
    config = {"bootstrap.servers": options.bootstrap_servers}
    with kbatch.Relay(options.database.outbox(), config, **options.relay) as relay:
        thread = threading.Thread(target=relay.run)
        thread.start()
        try:
            for _ in sys.stdin:
                stats = relay.stats()
                say(Count(stats["acked"], stats["buckets"]))
        finally:
            relay.stop()
            thread.join()


if __name__ == "__main__":
    main()
