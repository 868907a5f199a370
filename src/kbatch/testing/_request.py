from typing import NamedTuple


class Request(NamedTuple):
    """A request that a broker of the mock cluster has received while requests were tracked."""

    broker_id: int
    #: Kafka's request type: 0 is Produce; see `kbatch.testing.ApiKey`.
    api_key: int
    #: When it came, in microseconds of the machine's monotonic clock; only differences mean something.
    timestamp_us: int
