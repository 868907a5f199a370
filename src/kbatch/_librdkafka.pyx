"""Binds librdkafka at run time: the one that the installed confluent-kafka carries.

So a process holds one librdkafka, and its security fixes come with confluent-kafka. Importing this module opens
the library; it raises `ImportError` when confluent-kafka is missing, its librdkafka is older than 2.12.0 or
lacks a function. The handle is never closed: threads of librdkafka may outlive every Python object.
"""

import importlib.machinery
import importlib.util
import os
import sys

cdef extern from "platform.h" nogil:
    void *kb_dl_open(const char *path)
    void *kb_dl_symbol(void *library, const char *name)
    const char *kb_dl_error()

cdef int _MINIMUM_VERSION = 0x020c0000

cdef void *_library = NULL

#: The file whose librdkafka is bound.
path: str
#: librdkafka's version, for example ``"2.12.0"``.
version: str


def _candidates() -> list:
    """The files to try, best first: confluent-kafka's extension, which pulls in its librdkafka; on Windows the DLL."""
    spec = importlib.util.find_spec("confluent_kafka")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "kbatch needs confluent-kafka, whose librdkafka it uses, but no package named 'confluent_kafka' is "
            f"installed for {sys.executable}; install it with: pip install 'confluent-kafka>=2.12'"
        )
    found = []
    for folder in spec.submodule_search_locations:
        if sys.platform == "win32":
            libs = os.path.join(os.path.dirname(folder), "confluent_kafka.libs")
            if os.path.isdir(libs):
                os.add_dll_directory(libs)
                for name in sorted(os.listdir(libs)):
                    if name.startswith("librdkafka") and not name.startswith("librdkafkacpp"):
                        found.append(os.path.join(libs, name))
        else:
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                found.append(os.path.join(folder, "cimpl" + suffix))
    return found


def _tried(list tried) -> str:
    return "; tried:\n  " + "\n  ".join(tried) if tried else ""


cdef void _open() except *:
    global _library, path
    tried = []
    for candidate in _candidates():
        if not os.path.exists(candidate):
            tried.append(f"{candidate}: no such file")
            continue
        encoded = os.fsencode(candidate)
        _library = kb_dl_open(encoded)
        if _library != NULL:
            path = candidate
            return
        tried.append(f"{candidate}: {kb_dl_error().decode(errors='replace')}")
    raise ImportError("kbatch found confluent-kafka but could not open its librdkafka" + _tried(tried))


cdef void *symbol(str name) except NULL:
    cdef bytes encoded = name.encode()
    cdef void *address = kb_dl_symbol(_library, encoded)
    if address == NULL:
        raise ImportError(f"librdkafka {version_text()} of {path} has no function {name}; kbatch needs 2.12.0 or newer")
    return address


def version_text() -> str:
    """The bound library's version as it calls itself, or ``"of unknown version"``."""
    return api.version_str().decode() if api.version_str != NULL else "of unknown version"


cdef void _fill() except *:
    api.version_str = <const char *(*)() noexcept nogil> symbol("rd_kafka_version_str")
    api.version = <int (*)() noexcept nogil> symbol("rd_kafka_version")
    if api.version() < _MINIMUM_VERSION:
        raise ImportError(
            f"kbatch needs librdkafka 2.12.0 or newer, but {path} carries {version_text()}; "
            "install it with: pip install 'confluent-kafka>=2.12'"
        )
    api.err2str = <const char *(*)(int) noexcept nogil> symbol("rd_kafka_err2str")
    api.err2name = <const char *(*)(int) noexcept nogil> symbol("rd_kafka_err2name")
    api.last_error = <int (*)() noexcept nogil> symbol("rd_kafka_last_error")
    api.error_code = <int (*)(const rd_kafka_error_t *) noexcept nogil> symbol("rd_kafka_error_code")
    api.error_string = <const char *(*)(const rd_kafka_error_t *) noexcept nogil> symbol("rd_kafka_error_string")
    api.error_is_fatal = <int (*)(const rd_kafka_error_t *) noexcept nogil> symbol("rd_kafka_error_is_fatal")
    api.error_is_retriable = <int (*)(const rd_kafka_error_t *) noexcept nogil> symbol("rd_kafka_error_is_retriable")
    api.error_txn_requires_abort = <int (*)(const rd_kafka_error_t *) noexcept nogil> symbol(
        "rd_kafka_error_txn_requires_abort")
    api.error_destroy = <void (*)(rd_kafka_error_t *) noexcept nogil> symbol("rd_kafka_error_destroy")
    api.conf_new = <rd_kafka_conf_t *(*)() noexcept nogil> symbol("rd_kafka_conf_new")
    api.conf_dup = <rd_kafka_conf_t *(*)(const rd_kafka_conf_t *) noexcept nogil> symbol("rd_kafka_conf_dup")
    api.conf_destroy = <void (*)(rd_kafka_conf_t *) noexcept nogil> symbol("rd_kafka_conf_destroy")
    api.conf_set = <int (*)(rd_kafka_conf_t *, const char *, const char *, char *, size_t) noexcept nogil> symbol(
        "rd_kafka_conf_set")
    api.conf_get = <int (*)(const rd_kafka_conf_t *, const char *, char *, size_t *) noexcept nogil> symbol(
        "rd_kafka_conf_get")
    api.conf_set_events = <void (*)(rd_kafka_conf_t *, int) noexcept nogil> symbol("rd_kafka_conf_set_events")
    api.conf_set_opaque = <void (*)(rd_kafka_conf_t *, void *) noexcept nogil> symbol("rd_kafka_conf_set_opaque")
    api.conf_set_throttle_cb = <void (*)(rd_kafka_conf_t *, throttle_cb_t) noexcept nogil> symbol(
        "rd_kafka_conf_set_throttle_cb")
    api.conf_set_resolve_cb = <void (*)(rd_kafka_conf_t *, resolve_cb_t) noexcept nogil> symbol(
        "rd_kafka_conf_set_resolve_cb")
    api.conf_on_new = <int (*)(rd_kafka_conf_t *, const char *, on_new_t, void *) noexcept nogil> symbol(
        "rd_kafka_conf_interceptor_add_on_new")
    api.on_request_sent = <int (*)(rd_kafka_t *, const char *, request_sent_t, void *) noexcept nogil> symbol(
        "rd_kafka_interceptor_add_on_request_sent")
    api.new = <rd_kafka_t *(*)(int, rd_kafka_conf_t *, char *, size_t) noexcept nogil> symbol("rd_kafka_new")
    api.destroy = <void (*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_destroy")
    api.name = <const char *(*)(const rd_kafka_t *) noexcept nogil> symbol("rd_kafka_name")
    api.flush = <int (*)(rd_kafka_t *, int) noexcept nogil> symbol("rd_kafka_flush")
    api.purge = <int (*)(rd_kafka_t *, int) noexcept nogil> symbol("rd_kafka_purge")
    api.fatal_error = <int (*)(rd_kafka_t *, char *, size_t) noexcept nogil> symbol("rd_kafka_fatal_error")
    api.test_fatal_error = <int (*)(rd_kafka_t *, int, const char *) noexcept nogil> symbol("rd_kafka_test_fatal_error")
    api.metadata = <int (*)(rd_kafka_t *, int, rd_kafka_topic_t *, const rd_kafka_metadata_t **,
                            int) noexcept nogil> symbol("rd_kafka_metadata")
    api.metadata_destroy = <void (*)(const rd_kafka_metadata_t *) noexcept nogil> symbol("rd_kafka_metadata_destroy")
    api.set_log_queue = <int (*)(rd_kafka_t *, rd_kafka_queue_t *) noexcept nogil> symbol("rd_kafka_set_log_queue")
    api.sasl_background_callbacks_enable = <rd_kafka_error_t *(*)(rd_kafka_t *) noexcept nogil> symbol(
        "rd_kafka_sasl_background_callbacks_enable")
    api.oauthbearer_set_token = <int (*)(rd_kafka_t *, const char *, int64_t, const char *, const char **, size_t,
                                         char *, size_t) noexcept nogil> symbol("rd_kafka_oauthbearer_set_token")
    api.oauthbearer_set_token_failure = <int (*)(rd_kafka_t *, const char *) noexcept nogil> symbol(
        "rd_kafka_oauthbearer_set_token_failure")
    api.topic_new = <rd_kafka_topic_t *(*)(rd_kafka_t *, const char *, void *) noexcept nogil> symbol(
        "rd_kafka_topic_new")
    api.topic_destroy = <void (*)(rd_kafka_topic_t *) noexcept nogil> symbol("rd_kafka_topic_destroy")
    api.default_topic_conf_dup = <void *(*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_default_topic_conf_dup")
    api.topic_conf_set = <int (*)(void *, const char *, const char *, char *, size_t) noexcept nogil> symbol(
        "rd_kafka_topic_conf_set")
    api.headers_new = <rd_kafka_headers_t *(*)(size_t) noexcept nogil> symbol("rd_kafka_headers_new")
    api.headers_destroy = <void (*)(rd_kafka_headers_t *) noexcept nogil> symbol("rd_kafka_headers_destroy")
    api.header_add = <int (*)(rd_kafka_headers_t *, const char *, ssize_t, const void *,
                              ssize_t) noexcept nogil> symbol(
        "rd_kafka_header_add")
    api.header_get_all = <int (*)(const rd_kafka_headers_t *, size_t, const char **, const void **,
                                  size_t *) noexcept nogil> symbol(
        "rd_kafka_header_get_all")
    api.message_detach_headers = <int (*)(rd_kafka_message_t *, rd_kafka_headers_t **) noexcept nogil> symbol(
        "rd_kafka_message_detach_headers")
    api.produceva = <rd_kafka_error_t *(*)(rd_kafka_t *, const rd_kafka_vu_t *, size_t) noexcept nogil> symbol(
        "rd_kafka_produceva")
    api.init_transactions = <rd_kafka_error_t *(*)(rd_kafka_t *, int) noexcept nogil> symbol(
        "rd_kafka_init_transactions")
    api.begin_transaction = <rd_kafka_error_t *(*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_begin_transaction")
    api.commit_transaction = <rd_kafka_error_t *(*)(rd_kafka_t *, int) noexcept nogil> symbol(
        "rd_kafka_commit_transaction")
    api.abort_transaction = <rd_kafka_error_t *(*)(rd_kafka_t *, int) noexcept nogil> symbol(
        "rd_kafka_abort_transaction")
    api.queue_get_main = <rd_kafka_queue_t *(*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_queue_get_main")
    api.queue_destroy = <void (*)(rd_kafka_queue_t *) noexcept nogil> symbol("rd_kafka_queue_destroy")
    api.queue_yield = <void (*)(rd_kafka_queue_t *) noexcept nogil> symbol("rd_kafka_queue_yield")
    api.queue_poll = <rd_kafka_event_t *(*)(rd_kafka_queue_t *, int) noexcept nogil> symbol("rd_kafka_queue_poll")
    api.event_type = <int (*)(const rd_kafka_event_t *) noexcept nogil> symbol("rd_kafka_event_type")
    api.event_destroy = <void (*)(rd_kafka_event_t *) noexcept nogil> symbol("rd_kafka_event_destroy")
    api.event_message_array = <size_t (*)(rd_kafka_event_t *, const rd_kafka_message_t **,
                                          size_t) noexcept nogil> symbol(
        "rd_kafka_event_message_array")
    api.message_status = <int (*)(const rd_kafka_message_t *) noexcept nogil> symbol("rd_kafka_message_status")
    api.event_error = <int (*)(rd_kafka_event_t *) noexcept nogil> symbol("rd_kafka_event_error")
    api.event_error_string = <const char *(*)(rd_kafka_event_t *) noexcept nogil> symbol("rd_kafka_event_error_string")
    api.event_error_is_fatal = <int (*)(rd_kafka_event_t *) noexcept nogil> symbol("rd_kafka_event_error_is_fatal")
    api.event_log = <int (*)(rd_kafka_event_t *, const char **, const char **, int *) noexcept nogil> symbol(
        "rd_kafka_event_log")
    api.event_stats = <const char *(*)(rd_kafka_event_t *) noexcept nogil> symbol("rd_kafka_event_stats")
    api.event_config_string = <const char *(*)(rd_kafka_event_t *) noexcept nogil> symbol(
        "rd_kafka_event_config_string")
    api.event_list = <const rd_kafka_topic_partition_list_t *(*)(rd_kafka_event_t *) noexcept nogil> symbol(
        "rd_kafka_event_topic_partition_list")
    api.conf_set_rebalance_cb = <void (*)(rd_kafka_conf_t *, rebalance_cb_t) noexcept nogil> symbol(
        "rd_kafka_conf_set_rebalance_cb")
    api.list_new = <rd_kafka_topic_partition_list_t *(*)(int) noexcept nogil> symbol(
        "rd_kafka_topic_partition_list_new")
    api.list_destroy = <void (*)(rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_topic_partition_list_destroy")
    api.list_copy = <rd_kafka_topic_partition_list_t *(*)(
        const rd_kafka_topic_partition_list_t *) noexcept nogil> symbol("rd_kafka_topic_partition_list_copy")
    api.list_add = <rd_kafka_topic_partition_t *(*)(rd_kafka_topic_partition_list_t *, const char *,
                                                    int32_t) noexcept nogil> symbol(
        "rd_kafka_topic_partition_list_add")
    api.subscribe = <int (*)(rd_kafka_t *, const rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_subscribe")
    api.unsubscribe = <int (*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_unsubscribe")
    api.assign = <int (*)(rd_kafka_t *, const rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_assign")
    api.incremental_assign = <rd_kafka_error_t *(*)(rd_kafka_t *,
                                                    const rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_incremental_assign")
    api.incremental_unassign = <rd_kafka_error_t *(*)(rd_kafka_t *,
                                                      const rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_incremental_unassign")
    api.rebalance_protocol = <const char *(*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_rebalance_protocol")
    api.assignment_lost = <int (*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_assignment_lost")
    api.commit = <int (*)(rd_kafka_t *, const rd_kafka_topic_partition_list_t *, int) noexcept nogil> symbol(
        "rd_kafka_commit")
    api.commit_queue = <int (*)(rd_kafka_t *, const rd_kafka_topic_partition_list_t *, rd_kafka_queue_t *, void *,
                                void *) noexcept nogil> symbol("rd_kafka_commit_queue")
    api.committed = <int (*)(rd_kafka_t *, rd_kafka_topic_partition_list_t *, int) noexcept nogil> symbol(
        "rd_kafka_committed")
    api.seek_partitions = <rd_kafka_error_t *(*)(rd_kafka_t *, rd_kafka_topic_partition_list_t *,
                                                 int) noexcept nogil> symbol(
        "rd_kafka_seek_partitions")
    api.pause_partitions = <int (*)(rd_kafka_t *, rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_pause_partitions")
    api.resume_partitions = <int (*)(rd_kafka_t *, rd_kafka_topic_partition_list_t *) noexcept nogil> symbol(
        "rd_kafka_resume_partitions")
    api.query_watermark_offsets = <int (*)(rd_kafka_t *, const char *, int32_t, int64_t *, int64_t *,
                                           int) noexcept nogil> symbol(
        "rd_kafka_query_watermark_offsets")
    api.get_watermark_offsets = <int (*)(rd_kafka_t *, const char *, int32_t, int64_t *,
                                         int64_t *) noexcept nogil> symbol(
        "rd_kafka_get_watermark_offsets")
    api.offsets_for_times = <int (*)(rd_kafka_t *, rd_kafka_topic_partition_list_t *, int) noexcept nogil> symbol(
        "rd_kafka_offsets_for_times")
    api.memberid = <char *(*)(const rd_kafka_t *) noexcept nogil> symbol("rd_kafka_memberid")
    api.mem_free = <void (*)(rd_kafka_t *, void *) noexcept nogil> symbol("rd_kafka_mem_free")
    api.group_metadata = <rd_kafka_consumer_group_metadata_t *(*)(rd_kafka_t *) noexcept nogil> symbol(
        "rd_kafka_consumer_group_metadata")
    api.group_metadata_destroy = <void (*)(rd_kafka_consumer_group_metadata_t *) noexcept nogil> symbol(
        "rd_kafka_consumer_group_metadata_destroy")
    api.send_offsets = <rd_kafka_error_t *(*)(rd_kafka_t *, const rd_kafka_topic_partition_list_t *,
                                              const rd_kafka_consumer_group_metadata_t *, int) noexcept nogil> symbol(
        "rd_kafka_send_offsets_to_transaction")
    api.queue_new = <rd_kafka_queue_t *(*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_queue_new")
    api.queue_get_consumer = <rd_kafka_queue_t *(*)(rd_kafka_t *) noexcept nogil> symbol("rd_kafka_queue_get_consumer")
    api.queue_get_partition = <rd_kafka_queue_t *(*)(rd_kafka_t *, const char *, int32_t) noexcept nogil> symbol(
        "rd_kafka_queue_get_partition")
    api.queue_forward = <void (*)(rd_kafka_queue_t *, rd_kafka_queue_t *) noexcept nogil> symbol(
        "rd_kafka_queue_forward")
    api.queue_cb_event_enable = <void (*)(rd_kafka_queue_t *, queue_event_cb_t, void *) noexcept nogil> symbol(
        "rd_kafka_queue_cb_event_enable")
    api.consume_batch_queue = <ssize_t (*)(rd_kafka_queue_t *, int, rd_kafka_message_t **,
                                           size_t) noexcept nogil> symbol(
        "rd_kafka_consume_batch_queue")
    api.message_destroy = <void (*)(rd_kafka_message_t *) noexcept nogil> symbol("rd_kafka_message_destroy")
    api.message_headers = <int (*)(const rd_kafka_message_t *, rd_kafka_headers_t **) noexcept nogil> symbol(
        "rd_kafka_message_headers")
    api.message_timestamp = <int64_t (*)(const rd_kafka_message_t *, int *) noexcept nogil> symbol(
        "rd_kafka_message_timestamp")
    api.topic_name = <const char *(*)(const rd_kafka_topic_t *) noexcept nogil> symbol("rd_kafka_topic_name")


_open()
_fill()
version = version_text()


def error_text(int code) -> tuple:
    """librdkafka's name and description of an error code, as in ``("_MSG_TIMED_OUT", "Local: Message timed out")``."""
    return api.err2name(code).decode(), api.err2str(code).decode()
