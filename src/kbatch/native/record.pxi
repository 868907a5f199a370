# What phase 1 makes of an envelope, and what becomes of it: a Record with its Headers, for a Topic, with an Outcome.

cdef enum:
    # Outcome.state
    PENDING = 0
    ACKED = 1
    FAILED = 2
    EXPIRED = 3   # deliver_by had passed; never sent, not a failure

cdef enum:
    # Header.value_len when the value is made while the header is added, from the field that `value` points at
    VALUE_NULL = -1
    VALUE_UUID = -2
    VALUE_TIME_KBATCH = -3
    VALUE_TIME_WOLVERINE = -4
    VALUE_INT32 = -5

cdef enum:
    # Record.flags: what is not sent. Of such a record only `flags` and `partition` are set.
    RECORD_EXPIRED = 1
    RECORD_REJECTED = 2  # it could not be mapped, and the batch goes on without it


cdef struct Outcome:
    # One per envelope, the opaque of its produce call. Written by whoever polls its delivery report, or by phase 2
    # when it is not sent; read after the batch is done.
    BatchState *batch
    int64_t offset       # the address of its Topic, until it is known
    int32_t partition
    int16_t error
    uint8_t state
    uint8_t persistence  # rd_kafka_message_status: not, possibly, persisted


cdef struct Header:
    const char *name    # static, or the UTF-8 of a str that the batch's envelopes keep alive
    const char *value   # the same, or a field of the envelope (see VALUE_…)
    int32_t name_len
    int32_t value_len


cdef struct Topic:
    # One of each name in a pool, from where it is first mapped to until the pool's end.
    char *name                # owned
    Py_ssize_t name_len
    uint32_t hash             # of the name
    rd_kafka_topic_t *handle  # owned; made when a batch first enqueues to it
    int64_t in_flight         # atomic: its part of Client.in_flight
    int64_t bytes             # atomic: its part of Client.bytes
    Place *first              # detached batches that write to it, in the order in which they came; only the first one
    Place *last               # may. Under the client's lock
    Topic *next               # of the pool's
    Topic *next_in_bucket


cdef struct Record:
    # What phase 1 writes and phase 2 reads. Pointers are borrowed: from the envelopes and the objects that the Batch
    # keeps until it is done, from `bodies` as long, from the arena until phase 2 ends.
    const char *key      # NULL: no key
    const char *value    # NULL: a tombstone
    Header *headers      # in the arena
    Topic *topic
    int64_t timestamp    # ms
    int64_t value_len
    int32_t key_len
    int32_t header_count
    int32_t partition
    int32_t flags


cdef int32_t write_value(Header *h, char *text) noexcept nogil:
    # The text of a value that is made here rather than borrowed; at most UUID_TEXT bytes.
    cdef int32_t length, value
    if h.value_len == VALUE_UUID:
        write_uuid(<const unsigned char *> h.value, text)
        return UUID_TEXT
    if h.value_len == VALUE_TIME_KBATCH:
        write_time((<int64_t *> h.value)[0], False, text)
        return TIME_TEXT_KBATCH
    if h.value_len == VALUE_TIME_WOLVERINE:
        write_time((<int64_t *> h.value)[0], True, text)
        return TIME_TEXT_WOLVERINE
    value = (<int32_t *> h.value)[0]
    length = decimal_length(value)
    _write_digits(text, value, length)
    return length


cdef bint settle_unsent(Outcome *outcome, Record *record, int error) noexcept nogil:
    # Not sent, no report will come. Whether it failed; what has expired did not.
    outcome.state = FAILED
    if record.flags & RECORD_EXPIRED:
        outcome.state = EXPIRED
    elif record.flags & RECORD_REJECTED:
        error = RD_KAFKA_RESP_ERR__VALUE_SERIALIZATION  # whatever became of the others
    outcome.persistence = RD_KAFKA_MSG_STATUS_NOT_PERSISTED
    outcome.error = <int16_t> error
    outcome.partition = record.partition
    outcome.offset = -1
    return outcome.state == FAILED


cdef tuple read_record(Record *record):
    cdef char text[UUID_TEXT]
    cdef list headers = []
    cdef Header *h
    cdef int i
    if record.flags:
        return None
    for i in range(record.header_count):
        h = &record.headers[i]
        name = h.name[:h.name_len].decode()
        if h.value_len == VALUE_NULL:
            headers.append((name, None))
        elif h.value_len < 0:
            headers.append((name, text[:write_value(h, text)]))
        else:
            headers.append((name, h.value[:h.value_len]))
    return (record.topic.name.decode(), record.partition, record.timestamp,
            None if record.key == NULL else record.key[:record.key_len],
            None if record.value == NULL else record.value[:record.value_len], headers)
