# cython: autotestdict=False
"""librdkafka's mock cluster, bound call by call; `kbatch.testing.MockCluster` is what users see.

librdkafka does not promise that these functions stay, so they are bound apart from the main table and only when this
module is imported. Those that came after 2.12.0 are optional: without them the call that needs one raises
`MockClusterError`.

Arguments are checked by the caller. librdkafka asserts, that is ends the process, on some that are out of range, so
nobody but `MockCluster` and its server should call `Cluster`.
"""

cimport cython
from libc.stdint cimport int16_t, int32_t, int64_t

from kbatch._librdkafka cimport RD_KAFKA_PRODUCER, api, rd_kafka_conf_t, rd_kafka_t, symbol

from kbatch._codes import codes_by_name
from kbatch._librdkafka import version as _version

from kbatch.testing._errors import MockClusterError

cdef extern from "platform.h" nogil:
    void *kb_malloc(size_t size)
    void kb_free(void *p)
    int kb_pid()
    int64_t kb_now_ns()

cdef extern from * nogil:
    """
    typedef int (*kbatch_push_rtts_fn)(void *cluster, int32_t broker_id, int16_t api_key, size_t count, ...);
    typedef int (*kbatch_push_partition_fn)(void *cluster, const char *topic, int32_t partition, int16_t api_key,
                                            size_t count, ...);
    /* One pair a call: C cannot build the argument list of a variadic function at run time, and the function must be
     * called as a variadic one, since some ABIs pass such arguments elsewhere. */
    static int kbatch_push_rtt(void *fn, void *cluster, int32_t broker_id, int16_t api_key, int error, int rtt_ms) {
            return ((kbatch_push_rtts_fn)fn)(cluster, broker_id, api_key, (size_t)1, error, rtt_ms);
    }
    static int kbatch_push_partition_error(void *fn, void *cluster, const char *topic, int32_t partition,
                                           int16_t api_key, int error) {
            return ((kbatch_push_partition_fn)fn)(cluster, topic, partition, api_key, (size_t)1, error);
    }
    static void kbatch_sleep_us(int us) {
    #ifdef _WIN32
            Sleep((us + 999) / 1000);
    #else
            struct timespec t = {0, us * 1000L};
            nanosleep(&t, NULL);
    #endif
    }
    """
    int kbatch_push_rtt(void *fn, void *cluster, int32_t broker_id, int16_t api_key, int error, int rtt_ms)
    int kbatch_push_partition_error(void *fn, void *cluster, const char *topic, int32_t partition, int16_t api_key,
                                    int error)
    void kbatch_sleep_us(int us)

cdef struct MockApi:
    void *(*cluster_new)(rd_kafka_t *rk, int brokers) noexcept nogil
    void (*initial_rebalance_delay_ms)(void *cluster, int32_t delay_ms) noexcept nogil
    void (*cluster_destroy)(void *cluster) noexcept nogil
    const char *(*cluster_bootstraps)(void *cluster) noexcept nogil
    # topics and partitions
    int (*topic_create)(void *cluster, const char *topic, int partitions, int replication_factor) noexcept nogil
    void (*topic_set_error)(void *cluster, const char *topic, int error) noexcept nogil
    int (*partition_set_leader)(void *cluster, const char *topic, int32_t partition, int32_t broker_id) noexcept nogil
    int (*partition_set_follower)(void *cluster, const char *topic, int32_t partition,
                                  int32_t broker_id) noexcept nogil
    int (*partition_set_follower_wmarks)(void *cluster, const char *topic, int32_t partition, int64_t low,
                                         int64_t high) noexcept nogil
    int (*partition_push_leader_response)(void *cluster, const char *topic, int partition, int32_t leader_id,
                                          int32_t leader_epoch) noexcept nogil
    # errors
    void (*clear_request_errors)(void *cluster, int16_t api_key) noexcept nogil
    void (*push_request_errors_array)(void *cluster, int16_t api_key, size_t count, const int *errors) noexcept nogil
    void *broker_push_request_error_rtts
    int (*broker_error_stack_cnt)(void *cluster, int32_t broker_id, int16_t api_key, size_t *count) noexcept nogil
    # brokers
    int (*broker_set_down)(void *cluster, int32_t broker_id) noexcept nogil
    int (*broker_set_up)(void *cluster, int32_t broker_id) noexcept nogil
    int (*broker_set_rtt)(void *cluster, int32_t broker_id, int rtt_ms) noexcept nogil
    int (*broker_set_rack)(void *cluster, int32_t broker_id, const char *rack) noexcept nogil
    void (*broker_set_host_port)(void *cluster, int32_t broker_id, const char *host, int port) noexcept nogil
    int (*broker_add)(void *cluster, int32_t broker_id) noexcept nogil
    int (*broker_decommission)(void *cluster, int32_t broker_id) noexcept nogil
    int (*coordinator_set)(void *cluster, const char *kind, const char *key, int32_t broker_id) noexcept nogil
    int (*set_apiversion)(void *cluster, int16_t api_key, int16_t minimum, int16_t maximum) noexcept nogil
    void (*set_group_consumer_session_timeout_ms)(void *cluster, int timeout_ms) noexcept nogil
    void (*set_group_consumer_heartbeat_interval_ms)(void *cluster, int interval_ms) noexcept nogil
    # request tracking
    void (*start_request_tracking)(void *cluster) noexcept nogil
    void (*stop_request_tracking)(void *cluster) noexcept nogil
    void (*clear_requests)(void *cluster) noexcept nogil
    void **(*get_requests)(void *cluster, size_t *count) noexcept nogil
    void (*request_destroy_array)(void **requests, size_t count) noexcept nogil
    int32_t (*request_id)(void *request) noexcept nogil
    int16_t (*request_api_key)(void *request) noexcept nogil
    int64_t (*request_timestamp)(void *request) noexcept nogil
    # NULL when the library is too old
    int (*topic_delete)(void *cluster, const char *topic) noexcept nogil
    int (*partition_delete_records)(void *cluster, const char *topic, int32_t partition,
                                    int64_t before_offset) noexcept nogil
    void *partition_push_request_errors
    int (*broker_remove_from_metadata)(void *cluster, int32_t broker_id) noexcept nogil

cdef MockApi mock

# The mock cluster's thread answers a call before it empties the pipe that woke it. A call that comes in between loses
# its own wake-up and waits for the thread's next round, up to a second later; so calls keep this far apart.
cdef int64_t _CALL_GAP_US = 500


cdef void *optional(str name) except? NULL:
    try:
        return symbol(name)
    except ImportError:
        return NULL


cdef void _fill() except *:
    mock.cluster_new = <void *(*)(rd_kafka_t *, int) noexcept nogil> symbol("rd_kafka_mock_cluster_new")
    mock.initial_rebalance_delay_ms = <void (*)(void *, int32_t) noexcept nogil> symbol(
        "rd_kafka_mock_group_initial_rebalance_delay_ms")
    mock.cluster_destroy = <void (*)(void *) noexcept nogil> symbol("rd_kafka_mock_cluster_destroy")
    mock.cluster_bootstraps = <const char *(*)(void *) noexcept nogil> symbol("rd_kafka_mock_cluster_bootstraps")
    mock.topic_create = <int (*)(void *, const char *, int, int) noexcept nogil> symbol("rd_kafka_mock_topic_create")
    mock.topic_set_error = <void (*)(void *, const char *, int) noexcept nogil> symbol("rd_kafka_mock_topic_set_error")
    mock.partition_set_leader = <int (*)(void *, const char *, int32_t, int32_t) noexcept nogil> symbol(
        "rd_kafka_mock_partition_set_leader")
    mock.partition_set_follower = <int (*)(void *, const char *, int32_t, int32_t) noexcept nogil> symbol(
        "rd_kafka_mock_partition_set_follower")
    mock.partition_set_follower_wmarks = <int (*)(
        void *, const char *, int32_t, int64_t, int64_t) noexcept nogil> symbol(
        "rd_kafka_mock_partition_set_follower_wmarks")
    mock.partition_push_leader_response = <int (*)(
        void *, const char *, int, int32_t, int32_t) noexcept nogil> symbol(
        "rd_kafka_mock_partition_push_leader_response")
    mock.clear_request_errors = <void (*)(void *, int16_t) noexcept nogil> symbol("rd_kafka_mock_clear_request_errors")
    mock.push_request_errors_array = <void (*)(void *, int16_t, size_t, const int *) noexcept nogil> symbol(
        "rd_kafka_mock_push_request_errors_array")
    mock.broker_push_request_error_rtts = symbol("rd_kafka_mock_broker_push_request_error_rtts")
    mock.broker_error_stack_cnt = <int (*)(void *, int32_t, int16_t, size_t *) noexcept nogil> symbol(
        "rd_kafka_mock_broker_error_stack_cnt")
    mock.broker_set_down = <int (*)(void *, int32_t) noexcept nogil> symbol("rd_kafka_mock_broker_set_down")
    mock.broker_set_up = <int (*)(void *, int32_t) noexcept nogil> symbol("rd_kafka_mock_broker_set_up")
    mock.broker_set_rtt = <int (*)(void *, int32_t, int) noexcept nogil> symbol("rd_kafka_mock_broker_set_rtt")
    mock.broker_set_rack = <int (*)(void *, int32_t, const char *) noexcept nogil> symbol(
        "rd_kafka_mock_broker_set_rack")
    mock.broker_set_host_port = <void (*)(void *, int32_t, const char *, int) noexcept nogil> symbol(
        "rd_kafka_mock_broker_set_host_port")
    mock.broker_add = <int (*)(void *, int32_t) noexcept nogil> symbol("rd_kafka_mock_broker_add")
    mock.broker_decommission = <int (*)(void *, int32_t) noexcept nogil> symbol("rd_kafka_mock_broker_decommission")
    mock.coordinator_set = <int (*)(void *, const char *, const char *, int32_t) noexcept nogil> symbol(
        "rd_kafka_mock_coordinator_set")
    mock.set_apiversion = <int (*)(void *, int16_t, int16_t, int16_t) noexcept nogil> symbol(
        "rd_kafka_mock_set_apiversion")
    mock.set_group_consumer_session_timeout_ms = <void (*)(void *, int) noexcept nogil> symbol(
        "rd_kafka_mock_set_group_consumer_session_timeout_ms")
    mock.set_group_consumer_heartbeat_interval_ms = <void (*)(void *, int) noexcept nogil> symbol(
        "rd_kafka_mock_set_group_consumer_heartbeat_interval_ms")
    mock.start_request_tracking = <void (*)(void *) noexcept nogil> symbol("rd_kafka_mock_start_request_tracking")
    mock.stop_request_tracking = <void (*)(void *) noexcept nogil> symbol("rd_kafka_mock_stop_request_tracking")
    mock.clear_requests = <void (*)(void *) noexcept nogil> symbol("rd_kafka_mock_clear_requests")
    mock.get_requests = <void **(*)(void *, size_t *) noexcept nogil> symbol("rd_kafka_mock_get_requests")
    mock.request_destroy_array = <void (*)(void **, size_t) noexcept nogil> symbol(
        "rd_kafka_mock_request_destroy_array")
    mock.request_id = <int32_t (*)(void *) noexcept nogil> symbol("rd_kafka_mock_request_id")
    mock.request_api_key = <int16_t (*)(void *) noexcept nogil> symbol("rd_kafka_mock_request_api_key")
    mock.request_timestamp = <int64_t (*)(void *) noexcept nogil> symbol("rd_kafka_mock_request_timestamp")
    mock.topic_delete = <int (*)(void *, const char *) noexcept nogil> optional("rd_kafka_mock_topic_delete")
    mock.partition_delete_records = <int (*)(void *, const char *, int32_t, int64_t) noexcept nogil> optional(
        "rd_kafka_mock_partition_delete_records")
    mock.partition_push_request_errors = optional("rd_kafka_mock_partition_push_request_errors")
    mock.broker_remove_from_metadata = <int (*)(void *, int32_t) noexcept nogil> optional(
        "rd_kafka_mock_broker_remove_from_metadata")


_fill()


cdef int _code(object error) except? -9999:
    """An error given by code or by name; an unknown number is passed on as it is, for newer brokers' codes."""
    if isinstance(error, str):
        code = codes_by_name().get(error.removeprefix("RD_KAFKA_RESP_ERR_"))
        if code is None:
            raise ValueError(f"librdkafka {_version} knows no error named {error!r}")
        return code
    return error


cdef list _codes(errors):
    cdef list codes = []
    for error in errors:
        codes.append(_code(error))
    return codes


cdef int _present(void *function, str name) except -1:
    if function == NULL:
        raise MockClusterError(f"{name} is not in librdkafka {_version}; it needs confluent-kafka 2.15 or newer")
    return 0


@cython.auto_pickle(False)
@cython.final
cdef class Cluster:
    """A mock cluster in this process, with the client instance that it needs for its books.

    A forked child has the memory but not the threads: there every call raises, and nothing is destroyed.
    """

    cdef rd_kafka_t *_rk  # owned; destroyed by close, after the cluster
    cdef void *_cluster  # owned; destroyed by close
    cdef int _pid
    cdef int64_t _last_call_ns

    def __cinit__(self, int brokers):
        cdef rd_kafka_conf_t *conf
        cdef char error[512]
        error[0] = 0
        self._pid = kb_pid()
        conf = api.conf_new()
        # Errors only: else the instance logs that it has no bootstrap servers, which is how it is meant to be.
        api.conf_set(conf, b"log_level", b"3", error, sizeof(error))
        with nogil:
            self._rk = api.new(RD_KAFKA_PRODUCER, conf, error, sizeof(error))
            if self._rk != NULL:
                self._cluster = mock.cluster_new(self._rk, brokers)
        if self._rk == NULL:
            api.conf_destroy(conf)
            raise MockClusterError(f"the mock cluster's client: {error.decode(errors='replace')}")
        if self._cluster == NULL:
            self.close()
            raise MockClusterError(f"librdkafka could not start {brokers} brokers on free loopback ports")
        # Who joins a group does not wait for others: by default it would be 3 seconds.
        mock.initial_rebalance_delay_ms(self._cluster, 0)

    def __dealloc__(self):
        self._destroy()

    cdef void _destroy(self) noexcept:
        cdef void *cluster = self._cluster
        cdef rd_kafka_t *rk = self._rk
        self._cluster = NULL
        self._rk = NULL
        if kb_pid() != self._pid:
            return
        self._keep_apart()
        with nogil:
            if cluster != NULL:
                mock.cluster_destroy(cluster)
            if rk != NULL:
                api.destroy(rk)

    cdef void *_open(self) except NULL:
        if self._cluster == NULL:
            raise MockClusterError("the mock cluster is closed")
        if kb_pid() != self._pid:
            raise MockClusterError("the mock cluster was started before a fork; it lives in the parent process only")
        self._keep_apart()
        return self._cluster

    cdef void _keep_apart(self) noexcept:
        cdef int64_t wait_us = _CALL_GAP_US - (kb_now_ns() - self._last_call_ns) // 1000
        if wait_us > 0:
            with nogil:
                kbatch_sleep_us(<int> wait_us)

    cdef int _check(self, int error, str what) except -1:
        """Ends a call: the one place where an error code of the mock cluster becomes an exception."""
        self._last_call_ns = kb_now_ns()
        if error:
            code = error
            raise MockClusterError(
                f"{what}: {api.err2str(error).decode()}", code=code, name=api.err2name(error).decode())
        return 0

    def close(self) -> None:
        self._destroy()

    def bootstrap_servers(self) -> str:
        return mock.cluster_bootstraps(self._open()).decode()

    def create_topic(self, str name, int partitions, int replication_factor) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = name.encode()
        cdef const char *c_name = encoded
        cdef int error
        with nogil:
            error = mock.topic_create(cluster, c_name, partitions, replication_factor)
        self._check(error, f"topic {name!r}")

    def delete_topic(self, str name) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = name.encode()
        cdef const char *c_name = encoded
        cdef int error
        _present(<void *> mock.topic_delete, "delete_topic")
        with nogil:
            error = mock.topic_delete(cluster, c_name)
        self._check(error, f"topic {name!r}")

    def delete_records(self, str topic, int32_t partition, int64_t before_offset) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int error
        _present(<void *> mock.partition_delete_records, "delete_records")
        with nogil:
            error = mock.partition_delete_records(cluster, c_topic, partition, before_offset)
        self._check(error, f"topic {topic!r}, partition {partition}")

    def set_topic_error(self, str topic, error) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int code = _code(error)
        with nogil:
            mock.topic_set_error(cluster, c_topic, code)
        self._check(0, "")

    def set_partition_leader(self, str topic, int32_t partition, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int error
        with nogil:
            error = mock.partition_set_leader(cluster, c_topic, partition, broker_id)
        self._check(error, f"topic {topic!r}, partition {partition}, leader {broker_id}")

    def set_partition_follower(self, str topic, int32_t partition, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int error
        with nogil:
            error = mock.partition_set_follower(cluster, c_topic, partition, broker_id)
        self._check(error, f"topic {topic!r}, partition {partition}, follower {broker_id}")

    def set_partition_follower_watermarks(self, str topic, int32_t partition, int64_t low, int64_t high) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int error
        with nogil:
            error = mock.partition_set_follower_wmarks(cluster, c_topic, partition, low, high)
        self._check(error, f"topic {topic!r}, partition {partition}")

    def push_partition_leader(self, str topic, int32_t partition, int32_t leader_id, int32_t leader_epoch) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int error
        with nogil:
            error = mock.partition_push_leader_response(cluster, c_topic, partition, leader_id, leader_epoch)
        self._check(error, f"topic {topic!r}, partition {partition}")

    def push_partition_errors(self, str topic, int32_t partition, int16_t api_key, errors) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = topic.encode()
        cdef const char *c_topic = encoded
        cdef int code, error
        _present(mock.partition_push_request_errors, "push_partition_errors")
        for code in _codes(errors):
            self._keep_apart()
            with nogil:
                error = kbatch_push_partition_error(
                    mock.partition_push_request_errors, cluster, c_topic, partition, api_key, code)
            self._check(error, f"topic {topic!r}, partition {partition}")

    def push_request_errors(self, int16_t api_key, errors) -> None:
        cdef void *cluster = self._open()
        cdef list codes = _codes(errors)
        cdef size_t i, count = len(codes)
        cdef int *array
        if not count:
            return
        array = <int *> kb_malloc(count * sizeof(int))
        if array == NULL:
            raise MemoryError
        for i in range(count):
            array[i] = codes[i]
        with nogil:
            mock.push_request_errors_array(cluster, api_key, count, array)
        kb_free(array)

    def clear_request_errors(self, int16_t api_key) -> None:
        cdef void *cluster = self._open()
        with nogil:
            mock.clear_request_errors(cluster, api_key)

    def push_broker_errors(self, int32_t broker_id, int16_t api_key, errors) -> None:
        cdef void *cluster = self._open()
        cdef int code, rtt_ms, error
        cdef list codes = []
        for each, rtt_ms in errors:
            codes.append((_code(each), rtt_ms))
        for code, rtt_ms in codes:
            with nogil:
                error = kbatch_push_rtt(
                    mock.broker_push_request_error_rtts, cluster, broker_id, api_key, code, rtt_ms)
            self._check(error, f"broker {broker_id}")

    def broker_error_stack_count(self, int32_t broker_id, int16_t api_key) -> int:
        cdef void *cluster = self._open()
        cdef size_t count = 0  # untouched by the call when nothing was ever pushed
        cdef int error
        with nogil:
            error = mock.broker_error_stack_cnt(cluster, broker_id, api_key, &count)
        self._check(error, f"broker {broker_id}")
        return count

    def set_broker_down(self, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef int error
        with nogil:
            error = mock.broker_set_down(cluster, broker_id)
        self._check(error, f"broker {broker_id}")

    def set_broker_up(self, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef int error
        with nogil:
            error = mock.broker_set_up(cluster, broker_id)
        self._check(error, f"broker {broker_id}")

    def set_rtt(self, int32_t broker_id, int rtt_ms) -> None:
        cdef void *cluster = self._open()
        cdef int error
        with nogil:
            error = mock.broker_set_rtt(cluster, broker_id, rtt_ms)
        self._check(error, f"broker {broker_id}")

    def set_broker_rack(self, int32_t broker_id, str rack) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = rack.encode()
        cdef const char *c_rack = encoded
        cdef int error
        with nogil:
            error = mock.broker_set_rack(cluster, broker_id, c_rack)
        self._check(error, f"broker {broker_id}")

    def set_broker_address(self, int32_t broker_id, str host, int port) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded = host.encode()
        cdef const char *c_host = encoded
        with nogil:
            mock.broker_set_host_port(cluster, broker_id, c_host, port)

    def add_broker(self, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef int error
        with nogil:
            error = mock.broker_add(cluster, broker_id)
        self._check(error, f"broker {broker_id}")

    def remove_broker(self, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef int error
        with nogil:
            error = mock.broker_decommission(cluster, broker_id)
        self._check(error, f"broker {broker_id}")

    def hide_broker(self, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef int error
        _present(<void *> mock.broker_remove_from_metadata, "hide_broker")
        with nogil:
            error = mock.broker_remove_from_metadata(cluster, broker_id)
        self._check(error, f"broker {broker_id}")

    def set_coordinator(self, str kind, str key, int32_t broker_id) -> None:
        cdef void *cluster = self._open()
        cdef bytes encoded_kind = kind.encode()
        cdef bytes encoded_key = key.encode()
        cdef const char *c_kind = encoded_kind
        cdef const char *c_key = encoded_key
        cdef int error
        with nogil:
            error = mock.coordinator_set(cluster, c_kind, c_key, broker_id)
        self._check(error, f"coordinator of {kind} {key!r}")

    def set_api_version(self, int16_t api_key, int16_t minimum, int16_t maximum) -> None:
        cdef void *cluster = self._open()
        cdef int error
        with nogil:
            error = mock.set_apiversion(cluster, api_key, minimum, maximum)
        self._check(error, f"ApiKey {api_key}")

    def set_group_rebalance_delay(self, int32_t delay_ms) -> None:
        cdef void *cluster = self._open()
        with nogil:
            mock.initial_rebalance_delay_ms(cluster, delay_ms)

    def set_group_session(self, int timeout_ms, int heartbeat_interval_ms) -> None:
        cdef void *cluster = self._open()
        with nogil:
            mock.set_group_consumer_session_timeout_ms(cluster, timeout_ms)
            mock.set_group_consumer_heartbeat_interval_ms(cluster, heartbeat_interval_ms)

    def start_request_tracking(self) -> None:
        cdef void *cluster = self._open()
        with nogil:
            mock.start_request_tracking(cluster)

    def stop_request_tracking(self) -> None:
        cdef void *cluster = self._open()
        with nogil:
            mock.stop_request_tracking(cluster)

    def clear_requests(self) -> None:
        cdef void *cluster = self._open()
        with nogil:
            mock.clear_requests(cluster)

    def requests(self) -> list:
        """(broker id, ApiKey, timestamp in µs) of each tracked request."""
        cdef void *cluster = self._open()
        cdef size_t i, count = 0
        cdef list requests = []
        cdef void **tracked
        with nogil:
            tracked = mock.get_requests(cluster, &count)
        if tracked == NULL:
            return requests
        try:
            for i in range(count):
                requests.append((
                    mock.request_id(tracked[i]), mock.request_api_key(tracked[i]), mock.request_timestamp(tracked[i])))
            return requests
        finally:
            with nogil:
                mock.request_destroy_array(tracked, count)
