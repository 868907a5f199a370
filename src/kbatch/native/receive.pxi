# Records of librdkafka become envelopes. One that is as it should be is read and copied without the GIL, and its
# objects are made when they are asked for. For the others there is `_Reading`, which tells what is wrong with them.

cdef extern from *:
    """
    /* Takes over a reference to a text of an envelope. */
    static inline void kb_take_text(PyObject **slot, PyObject *text) {
        PyObject *before = *slot;
        Py_INCREF(text);
        *slot = text;
        Py_XDECREF(before);
    }
    #define kb_set_text(envelope, field, text) kb_take_text(&kb_text_field(envelope, field), text)
    """
    void set_text "kb_set_text"(Envelope envelope, int field, PyObject *text) noexcept

cdef enum:
    # A longer value is copied once, by the thread that polls; a shorter one twice if it is asked for, and not at all if
    # it is not. So what is kept twice of an envelope is no more than this.
    LONGEST_IN_BLOCK = 2048


cdef bint _take_own(Received *out, const OwnHeader *own, const char *p, Py_ssize_t length) noexcept nogil:
    # As `_Reading._set`; False for what is to be looked at there.
    out.seen |= 1 << own.field
    if own.rules & KB_EVENT_ID:
        return is_canonical_uuid(p, length) and parse_uuid(p, length, out.id)
    if own.field <= KB_LAST_TEXT:
        if not is_ascii(p, length):
            return False
        out.texts[own.field].chars = p
        if length == 0 and own.rules & KB_NOT_EMPTY:
            out.texts[own.field].chars = NULL
        out.texts[own.field].length = length
        return True
    if own.field == KB_ID:
        return parse_uuid(p, length, out.id)
    if own.field == KB_SENT_AT:
        return parse_time(p, length, &out.sent_at)
    if own.field == KB_SCHEDULED_TIME:
        return parse_time(p, length, &out.scheduled_time)
    if own.field == KB_DELIVER_BY:
        return parse_time(p, length, &out.deliver_by)
    if own.field == KB_ATTEMPTS:
        return parse_count(p, length, &out.attempts)
    if own.rules & KB_REQUIRED:
        return length == 3 and memcmp(p, b"1.0", 3) == 0
    return is_ascii(p, length)


cdef bint _is_regular_event(const Received *out, bint has_value) noexcept nogil:
    # Of CloudEvents, in binary mode.
    cdef const Text *content_type = &out.texts[KB_CONTENT_TYPE]
    cdef const char *structured = b"application/cloudevents"
    cdef int i
    if not has_value and not out.seen & 1 << KB_MESSAGE_TYPE:
        return True
    if has_value and content_type.chars != NULL and content_type.length >= 23:
        for i in range(23):
            if _lower(content_type.chars[i]) != structured[i]:
                break
        else:
            return False
    return (out.seen & 1 << KB_VERSION and out.seen & 1 << KB_ID and out.texts[KB_SOURCE].chars != NULL
            and out.texts[KB_MESSAGE_TYPE].chars != NULL)


cdef inline const char *_copied_text(char **at, const char *chars, Py_ssize_t length) noexcept nogil:
    cdef char *copy = at[0]
    memcpy(copy, chars, length)
    at[0] += length
    return copy


cdef inline void _give_header(const Header *header, Given *out) noexcept nogil:
    out.pair = out.value = NULL
    out.name, out.name_len = header.name, header.name_len
    out.bytes = header.value if header.value_len != VALUE_NULL else NULL
    out.length = header.value_len


cdef Received *read_regular(const Raw *raw, int wire, Blocks *spare) noexcept nogil:
    """A record that can be read without a word, copied; the caller's. NULL: it is to be read by `read_irregular`."""
    cdef Received *block
    cdef Given given
    cdef Header *header
    cdef const OwnHeader *own
    cdef int own_count, size_kind, next_own = 0
    cdef bint is_event = wire == WIRE_CLOUDEVENTS
    cdef bint has_value = raw.value.chars != NULL
    cdef const OwnHeader *table = own_headers(wire, &own_count)
    cdef Py_ssize_t i
    cdef size_t size = sizeof(Received)
    cdef char *at
    if wire == WIRE_CUSTOM or raw.count < 0:
        return NULL
    # Names of the format's are not copied, and find room all the same: their number is known only later.
    for i in range(raw.count):
        size += sizeof(Header) + raw.headers[i].name_len + max(0, raw.headers[i].value_len)
    if raw.value.chars != NULL and raw.value.length <= LONGEST_IN_BLOCK:
        size += raw.value.length
    if raw.key.chars != NULL:
        size += raw.key.length
    block = new_block(spare, size)
    if block == NULL:
        return NULL
    size_kind = block.size_kind
    memset(block, 0, sizeof(Received))
    block.size_kind = size_kind
    block.sent_at = block.scheduled_time = block.deliver_by = NO_TIME
    block.offset, block.timestamp, block.partition = raw.offset, raw.timestamp, raw.partition
    block.count, block.is_event = raw.count, is_event
    block.headers = <Header *> (block + 1)
    at = <char *> (block.headers + raw.count)
    for i in range(raw.count):
        header = block.headers + i
        header[0] = raw.headers[i]
        if header.value_len != VALUE_NULL:
            header.value = _copied_text(&at, header.value, header.value_len)
        _give_header(header, &given)
        own = find_own(table, own_count, is_event, &next_own, &given)
        if own == NULL:
            if not is_ascii(given.name, given.name_len):
                keep_block(spare, block)
                return NULL
            header.name = _copied_text(&at, given.name, given.name_len)
            if is_event and given.bytes == NULL and is_read_as_attribute(&given):
                header.name_len = ~header.name_len
            else:
                block.users += 1
            continue
        if given.bytes != NULL and not _take_own(block, own, given.bytes, given.length):
            keep_block(spare, block)
            return NULL
        # The names of an event's attributes may be written in any case.
        header.name = _copied_text(&at, given.name, given.name_len) if is_event else own.name
        header.name_len = ~header.name_len
    if is_event and not _is_regular_event(block, has_value):
        keep_block(spare, block)
        return NULL
    block.makes_id = not block.seen & 1 << KB_ID
    if has_value:
        block.kind = BODY_DATA
    elif raw.key.chars != NULL and not block.seen & 1 << KB_MESSAGE_TYPE:
        block.kind = BODY_TOMBSTONE
    else:
        block.kind = BODY_NULL
    block.key, block.value = raw.key, raw.value
    if block.key.chars != NULL:
        block.key.chars = _copied_text(&at, raw.key.chars, raw.key.length)
    if block.value.length > LONGEST_IN_BLOCK:
        block.value.chars = NULL
    if block.value.chars != NULL:
        block.value.chars = _copied_text(&at, raw.value.chars, raw.value.length)
    return block


cdef inline Py_ssize_t true_length(const Header *header) noexcept nogil:
    # Of the name. It is inverted of what is no header of the user's.
    return header.name_len if header.name_len >= 0 else ~header.name_len


cdef tuple block_headers(const Received *block, bint all_of_them):
    cdef const Header *header
    cdef Given given
    cdef list pairs = []
    cdef Py_ssize_t i
    for i in range(block.count):
        header = block.headers + i
        if header.name_len < 0 and not all_of_them:
            continue
        _give_header(header, &given)
        given.name_len = true_length(header)
        name = name_object(&given)
        if block.is_event and not all_of_them and is_read_as_attribute(&given):
            name = name.lower()
        pairs.append((name, value_object(&given)))
    return tuple(pairs)


cdef ReceivedEnvelope regular_envelope(Received *block, object topic, const char *value):
    """The envelope of what was read, which takes `block` over unless it raises. `value` is one that is not in it."""
    cdef ReceivedEnvelope e = ReceivedEnvelope.__new__(ReceivedEnvelope)
    if block.value.chars == NULL and block.kind == BODY_DATA:
        e._body = PyBytes_FromStringAndSize(value, block.value.length)
    e._topic = topic
    e._partition, e._offset, e._timestamp = block.partition, block.offset, block.timestamp
    e._sent_at, e._scheduled_time, e._deliver_by = block.sent_at, block.scheduled_time, block.deliver_by
    e._attempts = block.attempts
    memcpy(e._id, block.id, 16)
    e._block = block
    e._kind = BODY_UNREAD
    PyObject_GC_UnTrack(e)  # nothing that it holds can lead back to it, until it is decoded
    return e


cdef int64_t received_bytes(ReceivedEnvelope envelope) noexcept:
    # What it holds in memory, about.
    cdef Received *block = envelope._block
    cdef int64_t size = sizeof(Received) + block.count * sizeof(Header) + block.value.length + block.key.length
    cdef Py_ssize_t i
    for i in range(block.count):
        size += true_length(block.headers + i) + max(0, block.headers[i].value_len)
    return size


cdef inline int fill(Envelope envelope) except -1:
    """Before the C fields of an envelope are read, its properties apart: an envelope that was received has none yet."""
    if envelope._kind == BODY_UNREAD:
        (<ReceivedEnvelope> envelope)._fill()
    return 0


# -- what is not as it should be, and wire formats of users

@cython.final
cdef class ReceivedRecord:
    """A consumed record, by the methods of confluent-kafka's, for a wire format's ``read``."""

    cdef object _topic
    cdef object _key
    cdef object _value
    cdef list _headers
    cdef int64_t _offset
    cdef int64_t _timestamp
    cdef int32_t _partition

    def topic(self):
        return self._topic

    def partition(self):
        return self._partition

    def offset(self):
        return self._offset

    def timestamp(self):
        return 1 if self._timestamp else 0, self._timestamp or -1

    def key(self):
        return self._key

    def value(self):
        return self._value

    def headers(self):
        return self._headers

    def error(self):
        return None


cdef object _bytes_of(const Text *text):
    return None if text.chars == NULL else PyBytes_FromStringAndSize(text.chars, text.length)


cdef int _begin_consumed(Consumed *out, const Raw *raw, object topic, object partition, object offset, object key,
                         object value) except -1:
    out.topic, out.partition, out.offset = <PyObject *> topic, <PyObject *> partition, <PyObject *> offset
    out.key, out.value, out.timestamp = <PyObject *> key, <PyObject *> value, raw.timestamp
    out.pairs, out.headers, out.count = NULL, raw.headers, max(raw.count, 0)
    return 0


cdef ReceivedEnvelope _received_copy(Envelope given, object topic, const Raw *raw):
    # Of what a wire format of a user has made: where it was read is the record's, the rest the format's.
    cdef ReceivedEnvelope e = ReceivedEnvelope.__new__(ReceivedEnvelope)
    cdef int field
    fill(given)
    e._body, e._key, e._headers = given._body, given._key, given._headers
    for field in range(RECEIVED_TEXTS):
        set_text(e, field, text_field(given, field))
    e._sent_at, e._scheduled_time, e._deliver_by = given._sent_at, given._scheduled_time, given._deliver_by
    e._attempts = given._attempts
    memcpy(e._id, given._id, 16)
    e._topic, e._partition, e._timestamp, e._offset = topic, raw.partition, raw.timestamp, raw.offset
    if given._kind == BODY_MESSAGE:
        e._decoded = given._body
    e._kind = given._kind
    return e


cdef ReceivedEnvelope _read_by_user(const Raw *raw, object topic, object custom):
    cdef ReceivedRecord record = ReceivedRecord.__new__(ReceivedRecord)
    cdef Given given
    cdef Py_ssize_t i
    cdef Envelope envelope
    record._topic, record._partition, record._offset, record._timestamp = (
        topic, raw.partition, raw.offset, raw.timestamp)
    record._key, record._value, record._headers = _bytes_of(&raw.key), _bytes_of(&raw.value), []
    for i in range(max(raw.count, 0)):
        _give_header(raw.headers + i, &given)
        try:
            record._headers.append((name_object(&given), value_object(&given)))
        except UnicodeDecodeError as error:
            if not isinstance(error, UnicodeDecodeError):
                raise  # as in `_text`
            raise _record_error(record, "the name of one of its headers is not UTF-8") from error
    envelope = _read_custom(record, custom)
    if envelope._kind == BODY_NONE or envelope._kind == BODY_BUILDING:
        raise _record_error(record, f"the wire format gave a {type_name(envelope)} made without Envelope.__init__")
    return _received_copy(envelope, topic, raw)


cdef Py_ssize_t _with_names(Header *headers, Py_ssize_t count) except -1:
    # Keeps the headers whose names are text.
    cdef Py_ssize_t i, kept = 0
    for i in range(count):
        try:
            PyUnicode_DecodeUTF8(headers[i].name, headers[i].name_len, NULL)
        except UnicodeDecodeError as error:
            if not isinstance(error, UnicodeDecodeError):
                raise  # as in `_text`
            continue
        headers[kept] = headers[i]
        kept += 1
    return kept


cdef tuple raw_pairs(const Raw *raw):
    # As they came, but for names that are no text.
    cdef list pairs = []
    cdef Given given
    cdef Py_ssize_t i
    for i in range(max(raw.count, 0)):
        _give_header(raw.headers + i, &given)
        pairs.append((PyUnicode_DecodeUTF8(given.name, given.name_len, "replace"), value_object(&given)))
    return tuple(pairs)


cdef ReceivedEnvelope read_irregular(Raw *raw, object topic, int wire, object custom):
    """The envelope of any record. What cannot be read is one of the format "raw" with its ``error``."""
    cdef Consumed record
    cdef ReceivedEnvelope e
    cdef object partition = raw.partition, offset = raw.offset
    cdef tuple given = raw_pairs(raw)
    cdef object key = _bytes_of(&raw.key), value = _bytes_of(&raw.value)
    _begin_consumed(&record, raw, topic, partition, offset, key, value)
    try:
        if raw.count < 0:
            raise DeserializationError(
                "one of its headers is larger than 2 GiB" if raw.count == HEADER_TOO_LARGE else
                "its headers are damaged, or more than 100,000",
                topic=topic, partition=partition, offset=offset, header=None)
        if wire == WIRE_CUSTOM:
            e = _read_by_user(raw, topic, custom)
        else:
            e = <ReceivedEnvelope> envelope_of(&record, wire, ReceivedEnvelope.__new__(ReceivedEnvelope))
    except DeserializationError as error:
        if not str(error):
            raise MemoryError("no memory to say what is wrong with a record") from None
        record.count = _with_names(raw.headers, record.count)
        e = <ReceivedEnvelope> envelope_of(&record, WIRE_RAW, ReceivedEnvelope.__new__(ReceivedEnvelope))
        e._error = error
    e._offset, e._given_value, e._given_headers = raw.offset, value, given
    return e


def received(str topic not None, int partition, int64_t offset, int64_t timestamp, bytes key, bytes value, headers not
             None, wire="kbatch", *, regular=None):
    """The envelope that a consumer would make of such a record, without one. Names of headers may be bytes.

    For tests: with `regular` true None for what is not read without the GIL, with false read with it all the same.
    """
    cdef Raw raw
    cdef Received *block = NULL
    cdef list kept = []
    cdef Header *given
    cdef Py_ssize_t i
    cdef int number = wire_number(wire, " or an object with read()") if isinstance(wire, str) else WIRE_CUSTOM
    cdef Blocks spare
    raw.partition, raw.offset, raw.timestamp = partition, offset, max(0, timestamp)
    raw.key.chars, raw.key.length = NULL, 0
    if key is not None:
        raw.key.chars, raw.key.length = PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key)
    raw.value.chars, raw.value.length = NULL, 0
    if value is not None:
        raw.value.chars, raw.value.length = PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value)
    for name, content in headers:
        kept.append((name.encode() if isinstance(name, str) else bytes(name),
                     content.encode() if isinstance(content, str) else content))
    given = <Header *> kb_malloc((len(kept) + 1) * sizeof(Header))
    if given == NULL:
        raise MemoryError()
    try:
        raw.headers, raw.count = given, len(kept)
        for i in range(raw.count):
            name, content = kept[i]
            given[i].name, given[i].name_len = PyBytes_AS_STRING(<bytes?> name), <int32_t> PyBytes_GET_SIZE(name)
            given[i].value, given[i].value_len = NULL, VALUE_NULL
            if content is not None:
                given[i].value = PyBytes_AS_STRING(<bytes?> content)
                given[i].value_len = <int32_t> PyBytes_GET_SIZE(content)
        if regular is None or regular:
            memset(&spare, 0, sizeof(spare))
            take_spares(&spare)
            block = read_regular(&raw, number, &spare)
            drop_blocks(&spare)
            if block != NULL:
                try:
                    return regular_envelope(block, topic, raw.value.chars)
                except BaseException:
                    free_block(block)
                    raise
            if regular:
                return None
        return read_irregular(&raw, topic, number, wire)
    finally:
        kb_free(given)
