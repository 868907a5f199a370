import os
import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from kbatch.testing._api_key import ApiKey
from kbatch.testing._backend import Backend
from kbatch.testing._errors import MockClusterError
from kbatch.testing._request import Request

_INT16 = (-(2**15), 2**15 - 1)
_INT32 = (-(2**31), 2**31 - 1)
_INT64 = (-(2**63), 2**63 - 1)
_MAX_BROKERS = 1_000
_MAX_PARTITIONS = 100_000


class MockCluster:
    """librdkafka's mock cluster: Kafka brokers on the loopback address, in memory, with faults to order.

    A Kafka client on this machine can use it through `bootstrap_servers`, if it speaks the request versions that
    librdkafka's mock cluster answers: kafka-python needs ``api_version=(2, 0)``. A context manager; leaving it,
    `close`, the garbage collector and the interpreter's exit stop the brokers. Methods may be called from several
    threads.

    Args:
        brokers: how many brokers; their ids are 1 up to and including this number.
        process: run the brokers in a process of their own instead of threads of this one, so that they take neither
            its GIL nor its processor time in measurements. It ends with this process,
            however that ends. All methods work the same.

    Limits, which are the mock cluster's own:

    - A partition keeps 5 MiB or 100,000 produce batches; beyond either the oldest are dropped without a word. A larger
      single batch is acknowledged and lost, at the latest when the next one comes, which is lost with it. Spread larger
      data over more partitions.
    - It does not deduplicate: a retried idempotent produce request whose first copy was written is written twice.
    - Of a transaction it takes the offsets and does not commit them, and it shows each reader what was aborted.
    - A topic that does not exist is created with 4 partitions when a client first asks for it. There is no request that
      creates one (CreateTopics, the AdminClient): use `create_topic`.
    - No TLS, SASL or ACLs, no quotas, no compaction, no retention by time. Brokers do not fail over by themselves:
      a broker that goes down stays leader of its partitions.
    - Pushed errors together with several requests in flight can give false acknowledgements to an idempotent producer;
      use ``max.in.flight=1`` there.
    - A produce request of version 10 for a partition without a leader crashes it, and with it this process. Call
      ``set_api_version(ApiKey.PRODUCE, 0, 9)`` before clients connect, or run it with ``process=True``.

    Errors: `ValueError` or `TypeError` for arguments out of range; `MockClusterError`, with librdkafka's code, when the
    cluster refuses a call, is closed, is used in a forked child process, or when the installed librdkafka is too old
    for the call.
    """

    def __init__(self, brokers: int = 1, *, process: bool = False) -> None:
        _integer("brokers", brokers, 1, _MAX_BROKERS)
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._broker_ids = set(range(1, brokers + 1))
        self._backend = _backend(brokers, process)
        # Not a bound method: the finalizer must not keep this object alive. It runs at exit, too.
        self._close = weakref.finalize(self, self._backend.close)
        self._bootstrap_servers = str(self._call("bootstrap_servers"))

    def __enter__(self) -> "MockCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"bootstrap_servers={self._bootstrap_servers!r}" if self._close.alive else "closed"
        return f"<MockCluster {state}>"

    @property
    def bootstrap_servers(self) -> str:
        """The addresses of the first brokers, for a client's ``bootstrap.servers``: ``127.0.0.1:34567,…``."""
        return self._bootstrap_servers

    @property
    def pid(self) -> int:
        """The id of the process in which the brokers run: this one's, unless the cluster was made with process=True."""
        return int(getattr(self._backend, "pid", self._owner_pid))

    def close(self) -> None:
        """Stops the brokers and frees what they hold. May be called twice; does nothing in a forked child process."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._close()

    # Topics

    def create_topic(self, name: str, partitions: int = 1, replication_factor: int = 1) -> None:
        """Creates a topic; `MockClusterError` (TOPIC_ALREADY_EXISTS) if it is there.

        A replication factor above the number of brokers is lowered to it. Leaders are spread over the brokers.
        """
        _text("name", name)
        _integer("partitions", partitions, 1, _MAX_PARTITIONS)
        _integer("replication_factor", replication_factor, 1, _MAX_BROKERS)
        self._call("create_topic", name, partitions, replication_factor)

    def delete_topic(self, name: str) -> None:
        """Deletes a topic with its records; a client that asks for it again makes a new, empty one. librdkafka 2.15.

        `MockClusterError` (UNKNOWN_TOPIC_OR_PART) if there is none.
        """
        self._call("delete_topic", _text("name", name))

    def delete_records(self, topic: str, partition: int, before_offset: int) -> None:
        """Moves the start of a partition to an offset and drops the batches wholly before it. librdkafka 2.15."""
        _integer("before_offset", before_offset, 0, _INT64[1])
        self._call("delete_records", *_partition(topic, partition), before_offset)

    def set_topic_error(self, topic: str, error: int | str) -> None:
        """Puts an error on a topic in metadata (and AddPartitionsToTxn) responses, until it is set to 0.

        Creates the topic if there is none. Clients learn of it when they next ask for metadata.
        """
        self._call("set_topic_error", _text("topic", topic), _error(error))

    def set_partition_leader(self, topic: str, partition: int, broker_id: int) -> None:
        """Makes a broker the leader of a partition; -1 leaves it without one. Creates the topic if there is none."""
        _integer("broker_id", broker_id, -1, _INT32[1])
        self._call("set_partition_leader", *_partition(topic, partition), broker_id)

    def set_partition_follower(self, topic: str, partition: int, broker_id: int) -> None:
        """Names the replica from which consumers are told to fetch; -1 for the leader. Creates the topic if needed."""
        _integer("broker_id", broker_id, *_INT32)
        self._call("set_partition_follower", *_partition(topic, partition), broker_id)

    def set_partition_follower_watermarks(self, topic: str, partition: int, low: int, high: int) -> None:
        """Sets the offsets between which the preferred follower has records; -1 follows the leader's."""
        _integer("low", low, -1, _INT64[1])
        _integer("high", high, -1, _INT64[1])
        self._call("set_partition_follower_watermarks", *_partition(topic, partition), low, high)

    def push_partition_leader(self, topic: str, partition: int, leader_id: int, leader_epoch: int) -> None:
        """Makes the next metadata response name this leader and epoch for the partition, once per push."""
        _integer("leader_id", leader_id, *_INT32)
        _integer("leader_epoch", leader_epoch, *_INT32)
        self._call("push_partition_leader", *_partition(topic, partition), leader_id, leader_epoch)

    # Errors. Each is librdkafka's code, or its name with or without "RD_KAFKA_RESP_ERR_".

    def push_request_errors(self, api_key: int, errors: Iterable[int | str]) -> None:
        """Makes the next requests of a type fail, one per error, in this order, whichever broker they reach.

        An error is librdkafka's code or its name, such as ``"NOT_ENOUGH_REPLICAS"``. ``"_TRANSPORT"`` closes the
        client's connection without an answer. A request that fails so is not carried out.
        """
        self._call("push_request_errors", _api_key(api_key), _errors(errors))

    def clear_request_errors(self, api_key: int) -> None:
        """Forgets the errors of `push_request_errors` that no request has met yet."""
        self._call("clear_request_errors", _api_key(api_key))

    def push_broker_errors(self, broker_id: int, api_key: int, errors: Iterable[tuple[int | str, int]]) -> None:
        """As `push_request_errors`, on one broker, each error with a delay of its response in milliseconds.

        Error 0 delays the answer and no more. They cannot be cleared. A broker to which errors were pushed meets those
        of `push_request_errors` for this type of request no more, also when it has met all of its own.
        """
        pairs = [(_error(error), _integer("rtt_ms", rtt_ms, 0, _INT32[1])) for error, rtt_ms in errors]
        self._call("push_broker_errors", self._broker(broker_id), _api_key(api_key), pairs)

    def broker_error_stack_count(self, broker_id: int, api_key: int) -> int:
        """How many errors of `push_broker_errors` no request has met yet."""
        return int(self._call("broker_error_stack_count", self._broker(broker_id), _api_key(api_key)))

    def push_partition_errors(self, topic: str, partition: int, api_key: int, errors: Iterable[int | str]) -> None:
        """As `push_request_errors`, as the error of one partition in requests that name it. librdkafka 2.15.

        Other partitions of such a request are served. Errors of the cluster and of the broker come first.
        """
        self._call("push_partition_errors", *_partition(topic, partition), _api_key(api_key), _errors(errors))

    # Brokers

    def set_broker_down(self, broker_id: int = -1) -> None:
        """Closes a broker's connections and refuses new ones; -1 for all brokers. Its partitions keep it as leader."""
        self._call("set_broker_down", self._broker_or_all(broker_id))

    def set_broker_up(self, broker_id: int = -1) -> None:
        """Lets a broker that is down accept connections again, on the same port, with its records; -1 for all."""
        self._call("set_broker_up", self._broker_or_all(broker_id))

    def set_rtt(self, broker_id: int, rtt_ms: int) -> None:
        """Delays every response of a broker by so many milliseconds; -1 for all brokers, 0 ends it."""
        self._call("set_rtt", self._broker_or_all(broker_id), _integer("rtt_ms", rtt_ms, 0, _INT32[1]))

    def set_broker_rack(self, broker_id: int, rack: str) -> None:
        """Sets the rack that metadata responses name for a broker; -1 for all brokers."""
        self._call("set_broker_rack", self._broker_or_all(broker_id), _text("rack", rack))

    def set_broker_address(self, broker_id: int, host: str, port: int) -> None:
        """Sets the address that metadata responses name for a broker; it goes on listening where it was."""
        self._call("set_broker_address", self._broker(broker_id), _text("host", host), _integer("port", port, 1, 65535))

    def add_broker(self, broker_id: int) -> None:
        """Starts one more broker and assigns the partitions anew; records stay. `bootstrap_servers` does not change."""
        self._call("add_broker", _integer("broker_id", broker_id, 1, _INT32[1]))
        self._broker_ids.add(broker_id)

    def remove_broker(self, broker_id: int) -> None:
        """Closes a broker for good and assigns its partitions to the others; the last one cannot be removed."""
        if self._broker_ids == {self._broker(broker_id)}:
            raise ValueError(f"broker {broker_id} is the last one; close the cluster instead")
        self._call("remove_broker", broker_id)
        self._broker_ids.discard(broker_id)

    def hide_broker(self, broker_id: int) -> None:
        """Takes a broker out of metadata responses and gives its partitions to the others, but keeps its connections.

        librdkafka 2.15.
        """
        self._call("hide_broker", self._broker(broker_id))

    def set_coordinator(self, kind: str, key: str, broker_id: int) -> None:
        """Makes a broker the coordinator of a ``"group"`` (key: group.id) or ``"transaction"`` (transactional.id)."""
        if kind not in ("group", "transaction"):
            raise ValueError(f"kind must be 'group' or 'transaction', not {kind!r}")
        self._call("set_coordinator", kind, _text("key", key), _integer("broker_id", broker_id, *_INT32))

    def set_api_version(self, api_key: int, minimum: int, maximum: int) -> None:
        """Limits the versions of a request that brokers announce and take; -1 and -1 switch the request off.

        The maximum must not be above what the mock cluster implements. Clients learn of it when they next connect.
        """
        _integer("minimum", minimum, -1, _INT16[1])
        _integer("maximum", maximum, -1, _INT16[1])
        self._call("set_api_version", _api_key(api_key), minimum, maximum)

    def set_group_rebalance_delay(self, delay_ms: int) -> None:
        """Sets how long a new consumer group waits for more members before its first assignment: 0 ms at first."""
        self._call("set_group_rebalance_delay", _integer("delay_ms", delay_ms, 0, _INT32[1]))

    def set_group_session(self, timeout_ms: int, heartbeat_interval_ms: int) -> None:
        """Sets what brokers tell members of groups with ``group.protocol=consumer``.

        Args:
            timeout_ms: After so long the partitions of a member that has not been heard of are given away; 30,000 at
                first.
            heartbeat_interval_ms: How often a member is heard of, and learns of its partitions; 3,000 at first.
        """
        timeout_ms = _integer("timeout_ms", timeout_ms, 1, _INT32[1])
        interval_ms = _integer("heartbeat_interval_ms", heartbeat_interval_ms, 1, _INT32[1])
        self._call("set_group_session", timeout_ms, interval_ms)

    # Request tracking

    def start_request_tracking(self) -> None:
        """Forgets the requests tracked so far and tracks those that come from now on. Memory grows with each."""
        self._call("start_request_tracking")

    def stop_request_tracking(self) -> None:
        """Tracks no more requests and forgets those tracked: call `requests` before."""
        self._call("stop_request_tracking")

    def clear_requests(self) -> None:
        """Forgets the requests tracked so far; tracking goes on."""
        self._call("clear_requests")

    def requests(self) -> list[Request]:
        """The requests tracked so far, in the order in which they came, over all brokers."""
        return [Request(*row) for row in self._call("requests")]

    def produce_requests(self) -> int:
        """How many produce requests were tracked so far: what batching is meant to keep low."""
        return sum(request.api_key == ApiKey.PRODUCE for request in self.requests())

    def _call(self, method: str, *args: Any) -> Any:
        # Before the lock: a fork may have copied it while another thread held it.
        if os.getpid() != self._owner_pid:
            raise MockClusterError("the mock cluster belongs to the process that made it, not to a forked child")
        with self._lock:
            return self._backend.call(method, *args)

    def _broker(self, broker_id: int) -> int:
        _integer("broker_id", broker_id, *_INT32)
        if broker_id not in self._broker_ids:
            raise ValueError(f"there is no broker {broker_id}, only {sorted(self._broker_ids)}")
        return broker_id

    def _broker_or_all(self, broker_id: int) -> int:
        return broker_id if broker_id == -1 else self._broker(broker_id)


def _backend(brokers: int, process: bool) -> Backend:
    # Here, not at the top: importing the pytest plugin, which pytest does at every start, loads no compiled module.
    if process:
        from kbatch.testing._process import ProcessBackend

        return ProcessBackend(brokers)
    from kbatch.testing._local import LocalBackend

    return LocalBackend(brokers)


def _integer(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")
    return value


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if not value or "\0" in value:
        raise ValueError(f"{name} must not be empty or contain NUL, as {value!r} does")
    return value


def _partition(topic: str, partition: int) -> tuple[str, int]:
    return _text("topic", topic), _integer("partition", partition, 0, _INT32[1])


def _api_key(api_key: int) -> int:
    return _integer("api_key", api_key, 0, _INT16[1])


def _error(error: int | str) -> int | str:
    return error if isinstance(error, str) else _integer("error", error, *_INT16)


def _errors(errors: Iterable[int | str]) -> list[int | str]:
    if isinstance(errors, (str, int)):
        raise TypeError(f"errors must be several, such as [{errors!r}]")
    return [_error(error) for error in errors]
