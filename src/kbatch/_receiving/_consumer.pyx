# cython: autotestdict=False
"""A consumer of librdkafka on the table of functions that the producer uses, and its records as envelopes."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport PyObject
from libc.stdint cimport INT32_MAX, int32_t, int64_t

from kbatch._fastmap cimport (
    VALUE_NULL,
    Client,
    Config,
    Consumed,
    Core,
    Dispatcher,
    Header,
    ReceivedEnvelope,
    envelope_of,
    kb_mutex_lock,
    kb_mutex_unlock,
    keep_headers,
    wire_number,
)
from kbatch._librdkafka cimport *

from kbatch._errors import DeserializationError
from kbatch._librdkafka import error_text

cdef enum:
    MOST = 10_000  # records that one call takes


cdef void answer_rebalance(rd_kafka_t *rk, int code, const rd_kafka_topic_partition_list_t *partitions) noexcept nogil:
    # Takes what is given, gives back what is taken; each way of a group to share partitions has its own calls.
    cdef const char *protocol = api.rebalance_protocol(rk)
    cdef rd_kafka_error_t *error = NULL
    cdef bint cooperative = protocol[0] == c'C'
    if code == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
        if cooperative:
            error = api.incremental_assign(rk, partitions)
        else:
            api.assign(rk, partitions)
    elif cooperative and partitions.cnt and code == RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS:
        error = api.incremental_unassign(rk, partitions)
    else:
        api.assign(rk, NULL)
    if error != NULL:
        api.error_destroy(error)


cdef void on_rebalance(rd_kafka_t *rk, int code, rd_kafka_topic_partition_list_t *partitions,
                       void *opaque) noexcept nogil:
    # On the thread that polls, or on the drainer's while it ends librdkafka.
    cdef Client *c = <Client *> opaque
    cdef rd_kafka_topic_partition_list_t *copy = NULL
    cdef rd_kafka_topic_partition_list_t *before = NULL
    kb_mutex_lock(&c.mu)
    if not c.rebalances_itself:
        copy = api.list_copy(partitions)
        before, c.rebalance, c.rebalance_code = c.rebalance, copy, code
    kb_mutex_unlock(&c.mu)
    if before != NULL:
        api.list_destroy(before)
    if copy == NULL:
        answer_rebalance(rk, code, partitions)


cdef void forward_partition(rd_kafka_t *rk, const char *topic, int32_t partition,
                            rd_kafka_queue_t *target) noexcept nogil:
    cdef rd_kafka_queue_t *queue = api.queue_get_partition(rk, topic, partition)
    if queue != NULL:
        api.queue_forward(queue, target)
        api.queue_destroy(queue)


cdef rd_kafka_topic_partition_list_t *make_list(object items) except NULL:
    # Of (topic, partition) or (topic, partition, offset).
    cdef rd_kafka_topic_partition_list_t *made = api.list_new(<int> len(items))
    cdef rd_kafka_topic_partition_t *added
    try:
        for item in items:
            added = api.list_add(made, (<str?> item[0]).encode(), item[1])
            if len(item) > 2:
                added.offset = item[2]
    except BaseException:
        api.list_destroy(made)
        raise
    return made


cdef list list_items(const rd_kafka_topic_partition_list_t *partitions):
    cdef list items = []
    cdef int i
    for i in range(partitions.cnt):
        items.append((partitions.elems[i].topic.decode(), partitions.elems[i].partition))
    return items


cdef class ConsumerCore(Core):
    """A consumer, started at its first use. One thread polls it; the others may call what says so."""

    cdef int wire
    cdef rd_kafka_message_t **messages
    cdef Header *headers
    cdef Py_ssize_t header_room
    cdef dict topics         # by the address of librdkafka's: its name, and the object that holds it
    cdef readonly int assignments  # so many rebalances were answered

    def __cinit__(self):
        self.kind, self.what = RD_KAFKA_CONSUMER, "consumer"
        self.topics = {}

    def __init__(self, Config config not None, Dispatcher dispatcher not None, str wire not None, *, on_start=None):
        Core.__init__(self, config, None, dispatcher, max_in_flight=1, queue_max_messages=1, queue_max_bytes=1,
                      delivery_timeout_s=1.0, on_start=on_start)
        self.wire = wire_number(wire, "")
        self.messages = <rd_kafka_message_t **> PyMem_Realloc(NULL, MOST * sizeof(rd_kafka_message_t *))
        if self.messages == NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_Free(self.messages)
        PyMem_Free(self.headers)

    cdef void _configure(self, rd_kafka_conf_t *conf) noexcept:
        api.conf_set_events(conf, self.dispatcher.events)
        api.conf_set_rebalance_cb(conf, on_rebalance)

    cdef void _begin_reading(self) noexcept:
        self.c.rebalances_itself = 0
        self.c.group_queue = api.queue_get_consumer(self.c.rk)
        self.c.data_queue = api.queue_new(self.c.rk)

    # -- the group

    def subscribe(self, topics) -> None:
        """Joins the group for these topics; a name that begins with ``^`` is a pattern."""
        cdef rd_kafka_topic_partition_list_t *wanted
        cdef int code
        self._enter()
        try:
            wanted = make_list([(topic, -1) for topic in topics])
            code = api.subscribe(self.c.rk, wanted)
            api.list_destroy(wanted)
        finally:
            self._leave()
        self._check(code)

    def rebalance(self) -> tuple | None:
        """What the group wants and nobody has answered yet: ``(gives, partitions)`` of pairs (topic, partition)."""
        cdef Client *c = self.c
        cdef list partitions
        cdef bint gives
        if c.rebalance == NULL:  # set by this thread's polls alone
            return None
        kb_mutex_lock(&c.mu)
        try:
            if c.rebalance == NULL:
                return None
            partitions = list_items(c.rebalance)
            gives = c.rebalance_code == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS
        finally:
            kb_mutex_unlock(&c.mu)
        return gives, partitions

    def assignment_lost(self) -> bool:
        """Whether the partitions that are taken belong to others already."""
        self._enter()
        lost = bool(api.assignment_lost(self.c.rk))
        self._leave()
        return lost

    def answer(self) -> None:
        """Agrees to the rebalance. Records of partitions that were given come from the next polls on."""
        cdef Client *c = self.c
        cdef rd_kafka_topic_partition_list_t *partitions
        cdef int code, i
        self._enter()
        try:
            kb_mutex_lock(&c.mu)
            partitions, c.rebalance = c.rebalance, NULL
            code = c.rebalance_code
            kb_mutex_unlock(&c.mu)
            if partitions != NULL:
                with nogil:
                    if code == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
                        for i in range(partitions.cnt):
                            forward_partition(c.rk, partitions.elems[i].topic, partitions.elems[i].partition,
                                              c.data_queue)
                    answer_rebalance(c.rk, code, partitions)
                    api.list_destroy(partitions)
                self.assignments += 1
        finally:
            self._leave()

    def read(self, partitions, bint wanted=True) -> None:
        """Reads these partitions, or leaves what is fetched of them where it is until they are wanted again.

        To be called now and then for those that are wanted: when a partition comes back soon after it was taken,
        librdkafka may forget where its records go.
        """
        cdef bytes topic
        self._enter()
        try:
            for name, partition in partitions:
                topic = (<str?> name).encode()
                forward_partition(self.c.rk, topic, partition, self.c.data_queue if wanted else NULL)
        finally:
            self._leave()

    # -- records

    def poll(self, int most, double timeout) -> tuple:
        """Up to `most` records, as soon as there is one, else none after `timeout` seconds: ``(envelopes, errors)``.

        With `most` 0 it takes none, but is told of rebalances and errors. An error is ``(code, text, topic, partition,
        offset)``. A record that cannot be read is an envelope of the format "raw" with its ``error``.
        """
        cdef Client *c = self.c
        cdef Py_ssize_t i, count = 0, more
        cdef int timeout_ms = <int> (timeout * 1000)
        cdef list envelopes = [], errors = []
        most = min(most, MOST - 1)
        self._enter()
        try:
            with nogil:
                count = max(0, api.consume_batch_queue(c.group_queue, 0, self.messages, max(most, 1)))
                if c.rebalance == NULL and count < most:
                    more = api.consume_batch_queue(c.data_queue, timeout_ms, self.messages + count, 1)
                    if more > 0:
                        count += more
                        if count < most:
                            # With a time-out it would wait until all are there.
                            count += max(0, api.consume_batch_queue(
                                c.data_queue, 0, self.messages + count, most - count))
            for i in range(count):
                if self.messages[i].err:
                    errors.append(self._error(self.messages[i]))
                else:
                    envelopes.append(self._envelope(self.messages[i]))
        finally:
            with nogil:
                for i in range(count):
                    api.message_destroy(self.messages[i])
                self._leave()
        return envelopes, errors

    cdef tuple _error(self, rd_kafka_message_t *message):
        cdef bytes text = PyBytes_FromStringAndSize(<const char *> message.payload, message.len)
        return (message.err, text.decode("utf-8", "replace"), self._topic(message) if message.rkt != NULL else None,
                message.partition, message.offset)

    cdef str _topic(self, rd_kafka_message_t *message):
        cdef object key = <size_t> message.rkt
        cdef object name = self.topics.get(key)
        cdef const char *text = api.topic_name(message.rkt)
        # librdkafka may drop a topic and make another at the same address.
        if name is None or name.encode() != text:
            name = self.topics[key] = text.decode()
        return name

    cdef ReceivedEnvelope _envelope(self, rd_kafka_message_t *message):
        cdef Consumed record
        cdef ReceivedEnvelope envelope
        cdef object topic = self._topic(message), partition = message.partition, offset = message.offset
        cdef object key = None, value = None
        cdef int kind = 0
        cdef bytes given
        if message.key != NULL:
            key = PyBytes_FromStringAndSize(<const char *> message.key, message.key_len)
        if message.payload != NULL:
            value = PyBytes_FromStringAndSize(<const char *> message.payload, message.len)
        record.topic, record.partition = <PyObject *> topic, <PyObject *> partition
        record.offset = <PyObject *> offset
        record.key, record.value = <PyObject *> key, <PyObject *> value
        record.timestamp = max(0, api.message_timestamp(message, &kind))
        record.pairs = NULL
        record.count = self._read_headers(message)
        record.headers = self.headers
        given = keep_headers(&record)
        envelope = ReceivedEnvelope.__new__(ReceivedEnvelope)
        try:
            envelope_of(&record, self.wire, envelope)
        except DeserializationError as error:
            envelope = self._unreadable(&record, error)
        envelope._offset = message.offset
        envelope._given_value, envelope._given_headers = value, given
        return envelope

    cdef ReceivedEnvelope _unreadable(self, Consumed *record, object error):
        # As what it is; of its headers those whose names are text.
        cdef ReceivedEnvelope envelope = ReceivedEnvelope.__new__(ReceivedEnvelope)
        cdef Py_ssize_t i, count = 0
        for i in range(record.count):
            try:
                record.headers[i].name[:record.headers[i].name_len].decode()
            except UnicodeDecodeError:
                continue
            self.headers[count] = self.headers[i]
            count += 1
        record.count = count
        envelope_of(record, wire_number("raw", ""), envelope)
        envelope.error = error
        return envelope

    cdef Py_ssize_t _read_headers(self, rd_kafka_message_t *message) except -1:
        cdef rd_kafka_headers_t *given = NULL
        cdef Header *larger
        cdef const char *name
        cdef const void *value
        cdef size_t size
        cdef Py_ssize_t count = 0
        if api.message_headers(message, &given) != 0:
            return 0
        while api.header_get_all(given, count, &name, &value, &size) == 0:
            if count == self.header_room:
                larger = <Header *> PyMem_Realloc(self.headers, (2 * count + 16) * sizeof(Header))
                if larger == NULL:
                    raise MemoryError()
                self.headers, self.header_room = larger, 2 * count + 16
            self.headers[count].name = name
            self.headers[count].name_len = <int32_t> length_of(name)
            self.headers[count].value = <const char *> value
            self.headers[count].value_len = VALUE_NULL if value == NULL else <int32_t> min(size, <size_t> INT32_MAX)
            count += 1
        return count

    # -- offsets

    def commit(self, offsets, timeout=None) -> None | list:
        """Commits ``(topic, partition, offset)`` each. Without `timeout` nobody waits, and nobody hears of failures.

        With it returns what was not committed, as ``(topic, partition, code)``; after `timeout` seconds all of it, with
        ``_TIMED_OUT``. For any thread.
        """
        cdef rd_kafka_topic_partition_list_t *items
        cdef rd_kafka_queue_t *answers = NULL
        cdef rd_kafka_event_t *event = NULL
        cdef int code, timeout_ms
        if not offsets:
            return []
        self._enter()
        try:
            items = make_list(offsets)
            if timeout is None:
                code = api.commit(self.c.rk, items, 1)
                api.list_destroy(items)
                return None
            timeout_ms = <int> (1000 * <double> timeout)
            answers = api.queue_new(self.c.rk)
            with nogil:
                code = api.commit_queue(self.c.rk, items, answers, NULL, NULL)
                if code == 0:
                    event = api.queue_poll(answers, timeout_ms)
                    code = RD_KAFKA_RESP_ERR__TIMED_OUT if event == NULL else api.event_error(event)
                    if event != NULL:
                        api.event_destroy(event)
                api.queue_destroy(answers)
                api.list_destroy(items)
        finally:
            self._leave()
        return [] if code == 0 else [(topic, partition, code) for topic, partition, _ in offsets]

    def committed(self, partitions, double timeout) -> dict:
        """The offsets that the group has committed; those without one are left out. Raises as `subscribe`."""
        cdef rd_kafka_topic_partition_list_t *items
        cdef int code, i, timeout_ms = <int> (timeout * 1000)
        found = {}
        self._enter()
        try:
            items = make_list(partitions)
            with nogil:
                code = api.committed(self.c.rk, items, timeout_ms)
            for i in range(items.cnt):
                if items.elems[i].offset >= 0:
                    found[items.elems[i].topic.decode(), items.elems[i].partition] = items.elems[i].offset
            api.list_destroy(items)
        finally:
            self._leave()
        self._check(code)
        return found

    cdef int _check(self, int code) except -1:
        if code:
            raise ConsumerCallError(code, *error_text(code))
        return 0


def received(str topic not None, int partition, int64_t offset, int64_t timestamp, bytes key, bytes value,
             tuple headers not None, str wire not None) -> ReceivedEnvelope:
    """The envelope that a consumer would make of such a record, without one."""
    cdef Consumed record
    cdef object number = partition, place = offset
    cdef ReceivedEnvelope envelope = ReceivedEnvelope.__new__(ReceivedEnvelope)
    record.topic, record.partition, record.offset = <PyObject *> topic, <PyObject *> number, <PyObject *> place
    record.key, record.value = <PyObject *> key, <PyObject *> value
    record.timestamp = max(0, timestamp)
    record.pairs, record.headers, record.count = <PyObject *> headers, NULL, len(headers)
    try:
        envelope_of(&record, wire_number(wire, ""), envelope)
    except DeserializationError as error:
        envelope = ReceivedEnvelope.__new__(ReceivedEnvelope)
        envelope_of(&record, wire_number("raw", ""), envelope)
        envelope.error = error
    envelope._offset = offset
    envelope._given_value, envelope._given_headers = value, headers
    return envelope


class ConsumerCallError(Exception):
    """librdkafka has refused a call: its code, name and description."""


cdef extern from "string.h" nogil:
    size_t length_of "strlen"(const char *text)
