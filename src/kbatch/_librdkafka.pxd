# librdkafka's types and the table of its functions that kbatch calls. No logic.
#
# librdkafka is neither linked nor are its headers needed: these declarations repeat the public,
# stable part of rdkafka.h (1.9 to 2.16), and `api` is filled once, when the module is imported, from
# the library that confluent-kafka carries. Every function here may be called without the GIL.

from libc.stdint cimport int16_t, int32_t, int64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <stddef.h>
    #ifndef KBATCH_RDKAFKA_TYPES
    #define KBATCH_RDKAFKA_TYPES
    struct addrinfo;
    typedef struct rd_kafka_s rd_kafka_t;
    typedef struct rd_kafka_conf_s rd_kafka_conf_t;
    typedef struct rd_kafka_topic_s rd_kafka_topic_t;
    typedef struct rd_kafka_queue_s rd_kafka_queue_t;
    typedef struct rd_kafka_op_s rd_kafka_event_t;
    typedef struct rd_kafka_headers_s rd_kafka_headers_t;
    typedef struct rd_kafka_error_s rd_kafka_error_t;
    typedef struct rd_kafka_metadata_broker {
        int32_t id;
        char *host;
        int port;
    } rd_kafka_metadata_broker_t;
    typedef struct rd_kafka_metadata_partition {
        int32_t id;
        int err;
        int32_t leader;
        int replica_cnt;
        int32_t *replicas;
        int isr_cnt;
        int32_t *isrs;
    } rd_kafka_metadata_partition_t;
    typedef struct rd_kafka_metadata_topic {
        char *topic;
        int partition_cnt;
        rd_kafka_metadata_partition_t *partitions;
        int err;
    } rd_kafka_metadata_topic_t;
    typedef struct rd_kafka_metadata {
        int broker_cnt;
        rd_kafka_metadata_broker_t *brokers;
        int topic_cnt;
        rd_kafka_metadata_topic_t *topics;
        int32_t orig_broker_id;
        char *orig_broker_name;
    } rd_kafka_metadata_t;
    typedef struct rd_kafka_message_s {
        int err;
        rd_kafka_topic_t *rkt;
        int32_t partition;
        void *payload;
        size_t len;
        void *key;
        size_t key_len;
        int64_t offset;
        void *_private;
    } rd_kafka_message_t;
    typedef struct rd_kafka_topic_partition_s {
        char *topic;
        int32_t partition;
        int64_t offset;
        void *metadata;
        size_t metadata_size;
        void *opaque;
        int err;
        void *_private;
    } rd_kafka_topic_partition_t;
    typedef struct rd_kafka_topic_partition_list_s {
        int cnt;
        int size;
        rd_kafka_topic_partition_t *elems;
    } rd_kafka_topic_partition_list_t;
    typedef struct rd_kafka_consumer_group_metadata_s rd_kafka_consumer_group_metadata_t;
    typedef struct rd_kafka_vu_s {
        int vtype;
        union {
            rd_kafka_topic_t *rkt;
            int i;
            int32_t i32;
            int64_t i64;
            struct { const void *ptr; size_t size; } mem;
            rd_kafka_headers_t *headers;
            void *ptr;
            char _pad[64];
        } u;
    } rd_kafka_vu_t;
    #endif
    """
    ctypedef struct addrinfo "struct addrinfo":
        pass
    ctypedef struct rd_kafka_t:
        pass
    ctypedef struct rd_kafka_conf_t:
        pass
    ctypedef struct rd_kafka_topic_t:
        pass
    ctypedef struct rd_kafka_queue_t:
        pass
    ctypedef struct rd_kafka_event_t:
        pass
    ctypedef struct rd_kafka_headers_t:
        pass
    ctypedef struct rd_kafka_error_t:
        pass
    ctypedef struct rd_kafka_metadata_broker_t:
        int32_t id
    ctypedef struct rd_kafka_metadata_partition_t:
        int32_t id
        int32_t leader  # -1: none
    ctypedef struct rd_kafka_metadata_topic_t:
        char *topic
        int partition_cnt
        rd_kafka_metadata_partition_t *partitions
        int err
    ctypedef struct rd_kafka_metadata_t:
        int broker_cnt
        rd_kafka_metadata_broker_t *brokers
        int topic_cnt
        rd_kafka_metadata_topic_t *topics
    ctypedef struct rd_kafka_topic_partition_t:
        char *topic
        int32_t partition
        int64_t offset
        int err
    ctypedef struct rd_kafka_topic_partition_list_t:
        int cnt
        rd_kafka_topic_partition_t *elems
    ctypedef struct rd_kafka_consumer_group_metadata_t:
        pass
    ctypedef struct rd_kafka_message_t:
        int err
        rd_kafka_topic_t *rkt
        int32_t partition
        void *payload  # the value; of a consumer's error its text
        size_t len     # of the value
        void *key
        size_t key_len
        int64_t offset
        void *_private  # the opaque of the produce call
    ctypedef struct _vu_mem "struct { const void *ptr; size_t size; }":
        const void *ptr
        size_t size
    ctypedef struct _vu_value "union rd_kafka_vu_u":
        rd_kafka_topic_t *rkt
        int i
        int32_t i32
        int64_t i64
        _vu_mem mem
        rd_kafka_headers_t *headers
        void *ptr
    ctypedef struct rd_kafka_vu_t:
        int vtype
        _vu_value u

cdef enum:
    RD_KAFKA_PRODUCER = 0
    RD_KAFKA_CONSUMER = 1

    RD_KAFKA_CONF_OK = 0
    RD_KAFKA_CONF_UNKNOWN = -2

    RD_KAFKA_VTYPE_RKT = 2
    RD_KAFKA_VTYPE_PARTITION = 3
    RD_KAFKA_VTYPE_VALUE = 4
    RD_KAFKA_VTYPE_KEY = 5
    RD_KAFKA_VTYPE_OPAQUE = 6
    RD_KAFKA_VTYPE_TIMESTAMP = 8
    RD_KAFKA_VTYPE_HEADERS = 10

    RD_KAFKA_PURGE_F_QUEUE = 0x1
    RD_KAFKA_PURGE_F_INFLIGHT = 0x2
    RD_KAFKA_PURGE_F_NON_BLOCKING = 0x4

    RD_KAFKA_EVENT_DR = 0x1
    RD_KAFKA_EVENT_LOG = 0x4
    RD_KAFKA_EVENT_ERROR = 0x8
    RD_KAFKA_EVENT_OFFSET_COMMIT = 0x20
    RD_KAFKA_EVENT_STATS = 0x40
    RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH = 0x100

    RD_KAFKA_MSG_STATUS_NOT_PERSISTED = 0
    RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED = 1
    RD_KAFKA_MSG_STATUS_PERSISTED = 2

    RD_KAFKA_RESP_ERR__PARTITION_EOF = -191
    RD_KAFKA_RESP_ERR__QUEUE_FULL = -184
    RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS = -175
    RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS = -174
    RD_KAFKA_RESP_ERR__NO_OFFSET = -168
    RD_KAFKA_RESP_ERR__TIMED_OUT = -185
    RD_KAFKA_RESP_ERR__TIMED_OUT_QUEUE = -166
    RD_KAFKA_RESP_ERR__VALUE_SERIALIZATION = -161
    RD_KAFKA_RESP_ERR__NOENT = -156
    RD_KAFKA_RESP_ERR__PURGE_QUEUE = -152
    RD_KAFKA_RESP_ERR__PURGE_INFLIGHT = -151
    RD_KAFKA_RESP_ERR__FATAL = -150
    RD_KAFKA_RESP_ERR_NO_ERROR = 0
    RD_KAFKA_RESP_ERR_UNKNOWN = -1

ctypedef void (*throttle_cb_t)(rd_kafka_t *rk, const char *broker_name, int32_t broker_id,
                               int throttle_time_ms, void *opaque) noexcept nogil

ctypedef int (*resolve_cb_t)(const char *node, const char *service, const addrinfo *hints, addrinfo **found,
                             void *opaque) noexcept nogil

ctypedef int (*request_sent_t)(rd_kafka_t *rk, int sockfd, const char *broker_name, int32_t broker_id,
                               int16_t api_key, int16_t api_version, int32_t correlation_id, size_t size,
                               void *opaque) noexcept nogil

ctypedef void (*queue_event_cb_t)(rd_kafka_t *rk, void *opaque) noexcept nogil
ctypedef void (*rebalance_cb_t)(rd_kafka_t *rk, int err, rd_kafka_topic_partition_list_t *partitions,
                                void *opaque) noexcept nogil

ctypedef int (*on_new_t)(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque,
                         char *errstr, size_t errstr_size) noexcept nogil

cdef struct Api:
    # library
    int (*version)() noexcept nogil
    const char *(*version_str)() noexcept nogil
    const char *(*err2str)(int err) noexcept nogil
    const char *(*err2name)(int err) noexcept nogil
    int (*last_error)() noexcept nogil
    # errors as objects: the caller destroys what a call returned
    int (*error_code)(const rd_kafka_error_t *error) noexcept nogil
    const char *(*error_string)(const rd_kafka_error_t *error) noexcept nogil
    int (*error_is_fatal)(const rd_kafka_error_t *error) noexcept nogil
    int (*error_is_retriable)(const rd_kafka_error_t *error) noexcept nogil
    int (*error_txn_requires_abort)(const rd_kafka_error_t *error) noexcept nogil
    void (*error_destroy)(rd_kafka_error_t *error) noexcept nogil
    # configuration; `new` takes ownership of the conf, only if it succeeds
    rd_kafka_conf_t *(*conf_new)() noexcept nogil
    rd_kafka_conf_t *(*conf_dup)(const rd_kafka_conf_t *conf) noexcept nogil
    void (*conf_destroy)(rd_kafka_conf_t *conf) noexcept nogil
    int (*conf_set)(rd_kafka_conf_t *conf, const char *name, const char *value,
                    char *errstr, size_t errstr_size) noexcept nogil
    int (*conf_get)(const rd_kafka_conf_t *conf, const char *name, char *dest, size_t *dest_size) noexcept nogil
    void (*conf_set_events)(rd_kafka_conf_t *conf, int events) noexcept nogil
    void (*conf_set_opaque)(rd_kafka_conf_t *conf, void *opaque) noexcept nogil
    void (*conf_set_throttle_cb)(rd_kafka_conf_t *conf, throttle_cb_t cb) noexcept nogil
    void (*conf_set_resolve_cb)(rd_kafka_conf_t *conf, resolve_cb_t cb) noexcept nogil
    int (*conf_on_new)(rd_kafka_conf_t *conf, const char *name, on_new_t on_new, void *opaque) noexcept nogil
    int (*on_request_sent)(rd_kafka_t *rk, const char *name, request_sent_t sent, void *opaque) noexcept nogil
    # the instance
    rd_kafka_t *(*new)(int type, rd_kafka_conf_t *conf, char *errstr, size_t errstr_size) noexcept nogil
    void (*destroy)(rd_kafka_t *rk) noexcept nogil
    const char *(*name)(const rd_kafka_t *rk) noexcept nogil
    int (*flush)(rd_kafka_t *rk, int timeout_ms) noexcept nogil
    int (*purge)(rd_kafka_t *rk, int flags) noexcept nogil
    int (*fatal_error)(rd_kafka_t *rk, char *errstr, size_t errstr_size) noexcept nogil
    int (*test_fatal_error)(rd_kafka_t *rk, int err, const char *reason) noexcept nogil
    int (*set_log_queue)(rd_kafka_t *rk, rd_kafka_queue_t *queue) noexcept nogil
    int (*metadata)(rd_kafka_t *rk, int all_topics, rd_kafka_topic_t *topic, const rd_kafka_metadata_t **metadata,
                    int timeout_ms) noexcept nogil
    void (*metadata_destroy)(const rd_kafka_metadata_t *metadata) noexcept nogil
    rd_kafka_error_t *(*sasl_background_callbacks_enable)(rd_kafka_t *rk) noexcept nogil
    int (*oauthbearer_set_token)(rd_kafka_t *rk, const char *token, int64_t lifetime_ms, const char *principal,
                                 const char **extensions, size_t extension_size,
                                 char *errstr, size_t errstr_size) noexcept nogil
    int (*oauthbearer_set_token_failure)(rd_kafka_t *rk, const char *errstr) noexcept nogil
    # topic handles, reference counted
    rd_kafka_topic_t *(*topic_new)(rd_kafka_t *rk, const char *topic, void *conf) noexcept nogil
    void (*topic_destroy)(rd_kafka_topic_t *topic) noexcept nogil
    void *(*default_topic_conf_dup)(rd_kafka_t *rk) noexcept nogil
    int (*topic_conf_set)(void *conf, const char *name, const char *value,
                          char *errstr, size_t errstr_size) noexcept nogil
    # producing; on an error of produceva the headers stay the caller's
    rd_kafka_headers_t *(*headers_new)(size_t initial_count) noexcept nogil
    void (*headers_destroy)(rd_kafka_headers_t *headers) noexcept nogil
    int (*header_add)(rd_kafka_headers_t *headers, const char *name, ssize_t name_size,
                      const void *value, ssize_t value_size) noexcept nogil
    int (*header_get_all)(const rd_kafka_headers_t *headers, size_t index, const char **name,
                          const void **value, size_t *size) noexcept nogil
    # the list is the caller's then
    int (*message_detach_headers)(rd_kafka_message_t *message, rd_kafka_headers_t **headers) noexcept nogil
    rd_kafka_error_t *(*produceva)(rd_kafka_t *rk, const rd_kafka_vu_t *vus, size_t count) noexcept nogil
    # transactions: one call at a time; they block
    rd_kafka_error_t *(*init_transactions)(rd_kafka_t *rk, int timeout_ms) noexcept nogil
    rd_kafka_error_t *(*begin_transaction)(rd_kafka_t *rk) noexcept nogil
    rd_kafka_error_t *(*commit_transaction)(rd_kafka_t *rk, int timeout_ms) noexcept nogil
    rd_kafka_error_t *(*abort_transaction)(rd_kafka_t *rk, int timeout_ms) noexcept nogil
    # queues and events; the caller destroys both
    rd_kafka_queue_t *(*queue_get_main)(rd_kafka_t *rk) noexcept nogil
    void (*queue_destroy)(rd_kafka_queue_t *queue) noexcept nogil
    void (*queue_yield)(rd_kafka_queue_t *queue) noexcept nogil
    rd_kafka_event_t *(*queue_poll)(rd_kafka_queue_t *queue, int timeout_ms) noexcept nogil
    int (*event_type)(const rd_kafka_event_t *event) noexcept nogil
    void (*event_destroy)(rd_kafka_event_t *event) noexcept nogil
    size_t (*event_message_array)(rd_kafka_event_t *event, const rd_kafka_message_t **messages,
                                  size_t size) noexcept nogil
    int (*message_status)(const rd_kafka_message_t *message) noexcept nogil
    int (*event_error)(rd_kafka_event_t *event) noexcept nogil
    const char *(*event_error_string)(rd_kafka_event_t *event) noexcept nogil
    int (*event_error_is_fatal)(rd_kafka_event_t *event) noexcept nogil
    int (*event_log)(rd_kafka_event_t *event, const char **fac, const char **text, int *level) noexcept nogil
    const char *(*event_stats)(rd_kafka_event_t *event) noexcept nogil
    const char *(*event_config_string)(rd_kafka_event_t *event) noexcept nogil
    const rd_kafka_topic_partition_list_t *(*event_list)(rd_kafka_event_t *event) noexcept nogil  # the event's
    # consuming; lists are the caller's, but for those that a callback is given
    void (*conf_set_rebalance_cb)(rd_kafka_conf_t *conf, rebalance_cb_t cb) noexcept nogil
    rd_kafka_topic_partition_list_t *(*list_new)(int size) noexcept nogil
    void (*list_destroy)(rd_kafka_topic_partition_list_t *list) noexcept nogil
    rd_kafka_topic_partition_list_t *(*list_copy)(const rd_kafka_topic_partition_list_t *list) noexcept nogil
    rd_kafka_topic_partition_t *(*list_add)(rd_kafka_topic_partition_list_t *list, const char *topic,
                                            int32_t partition) noexcept nogil
    int (*subscribe)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *topics) noexcept nogil
    int (*unsubscribe)(rd_kafka_t *rk) noexcept nogil
    int (*assign)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *partitions) noexcept nogil
    rd_kafka_error_t *(*incremental_assign)(rd_kafka_t *rk,
                                            const rd_kafka_topic_partition_list_t *partitions) noexcept nogil
    rd_kafka_error_t *(*incremental_unassign)(rd_kafka_t *rk,
                                              const rd_kafka_topic_partition_list_t *partitions) noexcept nogil
    const char *(*rebalance_protocol)(rd_kafka_t *rk) noexcept nogil
    int (*assignment_lost)(rd_kafka_t *rk) noexcept nogil
    int (*commit)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *offsets, int is_async) noexcept nogil
    int (*commit_queue)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *offsets, rd_kafka_queue_t *queue,
                        void *callback, void *opaque) noexcept nogil
    int (*committed)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *partitions, int timeout_ms) noexcept nogil
    rd_kafka_error_t *(*seek_partitions)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *partitions,
                                         int timeout_ms) noexcept nogil
    int (*pause_partitions)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *partitions) noexcept nogil
    int (*resume_partitions)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *partitions) noexcept nogil
    int (*query_watermark_offsets)(rd_kafka_t *rk, const char *topic, int32_t partition, int64_t *low, int64_t *high,
                                   int timeout_ms) noexcept nogil
    # as the last answers told; nothing is asked
    int (*get_watermark_offsets)(rd_kafka_t *rk, const char *topic, int32_t partition, int64_t *low,
                                 int64_t *high) noexcept nogil
    int (*offsets_for_times)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *offsets, int timeout_ms) noexcept nogil
    char *(*memberid)(const rd_kafka_t *rk) noexcept nogil
    void (*mem_free)(rd_kafka_t *rk, void *memory) noexcept nogil
    rd_kafka_consumer_group_metadata_t *(*group_metadata)(rd_kafka_t *rk) noexcept nogil
    void (*group_metadata_destroy)(rd_kafka_consumer_group_metadata_t *group) noexcept nogil
    rd_kafka_error_t *(*send_offsets)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *offsets,
                                      const rd_kafka_consumer_group_metadata_t *group, int timeout_ms) noexcept nogil
    rd_kafka_queue_t *(*queue_new)(rd_kafka_t *rk) noexcept nogil
    rd_kafka_queue_t *(*queue_get_consumer)(rd_kafka_t *rk) noexcept nogil
    rd_kafka_queue_t *(*queue_get_partition)(rd_kafka_t *rk, const char *topic, int32_t partition) noexcept nogil
    void (*queue_forward)(rd_kafka_queue_t *source, rd_kafka_queue_t *target) noexcept nogil
    # called when something comes to an empty queue, under the queue's lock; not any more once this has set another
    void (*queue_cb_event_enable)(rd_kafka_queue_t *queue, queue_event_cb_t cb, void *opaque) noexcept nogil
    ssize_t (*consume_batch_queue)(rd_kafka_queue_t *queue, int timeout_ms, rd_kafka_message_t **messages,
                                   size_t size) noexcept nogil
    void (*message_destroy)(rd_kafka_message_t *message) noexcept nogil
    int (*message_headers)(const rd_kafka_message_t *message, rd_kafka_headers_t **headers) noexcept nogil
    int64_t (*message_timestamp)(const rd_kafka_message_t *message, int *kind) noexcept nogil
    const char *(*topic_name)(const rd_kafka_topic_t *topic) noexcept nogil

# Filled at import; constant from then on.
cdef Api api

# The address of one more function of the same library, or an ImportError that names it.
cdef void *symbol(str name) except NULL
