from typing import NamedTuple


class Request(NamedTuple):
    """A request that a broker of the mock cluster has received while requests were tracked.

    Attributes:
        broker_id: The broker.
        api_key: Kafka's request type: 0 is Produce; see `kbatch.testing.ApiKey`.
        timestamp_us: When it came, in microseconds of the machine's monotonic clock; only differences mean something.
    """

    broker_id: int
    api_key: int
    timestamp_us: int
