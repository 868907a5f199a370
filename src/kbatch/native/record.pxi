# What phase 1 makes of an envelope, and what becomes of it: a Record with its Headers, for a Topic, with an Outcome.

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
