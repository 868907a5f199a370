# A packed record: a record as bytes, to be stored and sent later. DESIGN.md, "Packed record", has the format. Unpacked
# records point into these bytes.

cdef extern from *:
    """
    /* CRC-32 as zlib's and Python's: eight bytes a step. */
    static uint32_t kb_crc_table[8][256];

    static void kb_crc_begin(void)
    {
        for (int i = 0; i < 256; i++) {
            uint32_t crc = (uint32_t) i;
            for (int bit = 0; bit < 8; bit++)
                crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
            kb_crc_table[0][i] = crc;
        }
        for (int i = 0; i < 256; i++)
            for (int k = 1; k < 8; k++)
                kb_crc_table[k][i] = kb_crc_table[0][kb_crc_table[k - 1][i] & 255] ^ kb_crc_table[k - 1][i] >> 8;
    }

    static inline uint32_t kb_load32(const unsigned char *p)
    {
        return (uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24;
    }

    static uint32_t kb_crc32(const char *bytes, size_t length)
    {
        const unsigned char *p = (const unsigned char *) bytes;
        uint32_t crc = 0xFFFFFFFFu;
        for (; length >= 8; p += 8, length -= 8) {
            uint32_t low = kb_load32(p) ^ crc, high = kb_load32(p + 4);
            crc = kb_crc_table[7][low & 255] ^ kb_crc_table[6][low >> 8 & 255] ^ kb_crc_table[5][low >> 16 & 255]
                ^ kb_crc_table[4][low >> 24] ^ kb_crc_table[3][high & 255] ^ kb_crc_table[2][high >> 8 & 255]
                ^ kb_crc_table[1][high >> 16 & 255] ^ kb_crc_table[0][high >> 24];
        }
        for (; length; p++, length--)
            crc = kb_crc_table[0][(crc ^ *p) & 255] ^ crc >> 8;
        return ~crc;
    }

    static inline void kb_store_little(char *out, uint64_t value, int bytes)
    {
        for (int i = 0; i < bytes; i++)
            out[i] = (char) (value >> 8 * i & 255);
    }

    static inline uint64_t kb_load_little(const char *p, int bytes)
    {
        uint64_t value = 0;
        for (int i = 0; i < bytes; i++)
            value |= (uint64_t) (unsigned char) p[i] << 8 * i;
        return value;
    }
    """
    void kb_crc_begin() noexcept nogil
    uint32_t kb_crc32(const char *bytes, size_t length) noexcept nogil
    void kb_store_little(char *out, uint64_t value, int bytes) noexcept nogil
    uint64_t kb_load_little(const char *p, int bytes) noexcept nogil


kb_crc_begin()

cdef enum:
    PACKED_VERSION = 1
    PACKED_FIXED = 14     # version, flags, timestamp, partition
    PACKED_CHECKSUM = 4
    SHARE_EVERY = 65536   # packed bytes between two looks at who wants the GIL

cdef enum PackedFault:
    # What is wrong with packed bytes. `unpack` finds them in this order.
    NO_FAULT = 0
    TOO_SHORT = 1
    OTHER_VERSION = 2
    DAMAGED = 3
    UNKNOWN_FLAGS = 4
    WRONG_NUMBER = 5
    NOT_UTF_8 = 6

cdef tuple PACKED_FAULTS = (
    None, "it is cut off", "its version is not 1", "it is damaged: its checksum is another", "it has unknown flags",
    "a number in it is wrong", "a name in it is not UTF-8")


cdef struct PackedRecord:
    # What `unpack` finds. All pointers are into the packed bytes; `record.topic` and `record.headers` are not set.
    Record record
    const char *topic
    int32_t topic_len
    const char *headers    # the first of record.header_count
    const char *end


cdef inline int _varint_length(uint64_t n) noexcept nogil:
    cdef int length = 1
    while n >= 128:
        n >>= 7
        length += 1
    return length


cdef inline char *_put_varint(char *out, uint64_t n) noexcept nogil:
    while n >= 128:
        out[0] = <char> (n & 127 | 128)
        out += 1
        n >>= 7
    out[0] = <char> n
    return out + 1


cdef inline int64_t _counted_size(const char *p, int64_t length) noexcept nogil:
    # Of bytes and of their length before them, which is 0 for a null and else one more.
    return _varint_length(0 if p == NULL else length + 1) + (0 if p == NULL else length)


cdef inline char *_put_counted(char *out, const char *p, int64_t length) noexcept nogil:
    if p == NULL:
        return _put_varint(out, 0)
    out = _put_varint(out, length + 1)
    memcpy(out, p, length)
    return out + length


cdef int64_t packed_size(Record *record) noexcept nogil:
    cdef char text[UUID_TEXT]
    cdef Header *h = record.headers
    cdef Header *end = h + record.header_count
    cdef int64_t size = PACKED_FIXED + PACKED_CHECKSUM + _varint_length(record.header_count)
    size += _counted_size(record.topic.name, record.topic.name_len)
    size += _counted_size(record.key, record.key_len) + _counted_size(record.value, record.value_len)
    while h != end:
        size += _counted_size(h.name, h.name_len)
        if h.value_len == VALUE_NULL:
            size += 1
        elif h.value_len >= 0:
            size += _counted_size(h.value, h.value_len)
        else:
            size += _counted_size(text, write_value(h, text))
        h += 1
    return size


cdef void pack_record(Record *record, char *out) noexcept nogil:
    # Into packed_size(record) bytes.
    cdef char text[UUID_TEXT]
    cdef char *begin = out
    cdef Header *h = record.headers
    cdef Header *end = h + record.header_count
    out[0] = PACKED_VERSION
    out[1] = 0
    kb_store_little(out + 2, <uint64_t> record.timestamp, 8)
    kb_store_little(out + 10, <uint64_t> <int64_t> record.partition, 4)
    out = _put_counted(out + PACKED_FIXED, record.topic.name, record.topic.name_len)
    out = _put_counted(out, record.key, record.key_len)
    out = _put_varint(out, record.header_count)
    while h != end:
        out = _put_counted(out, h.name, h.name_len)
        if h.value_len == VALUE_NULL:
            out = _put_varint(out, 0)
        elif h.value_len >= 0:
            out = _put_counted(out, h.value, h.value_len)
        else:
            out = _put_counted(out, text, write_value(h, text))
        h += 1
    out = _put_counted(out, record.value, record.value_len)
    kb_store_little(out, kb_crc32(begin, out - begin), PACKED_CHECKSUM)


cdef inline bint _take_varint(const char **at, const char *end, int64_t *n) noexcept nogil:
    # Up to 35 bits.
    cdef int shift = 0
    cdef unsigned char byte
    n[0] = 0
    while shift < 35:
        if at[0] == end:
            return False
        byte = <unsigned char> at[0][0]
        at[0] += 1
        n[0] |= <int64_t> (byte & 127) << shift
        if byte < 128:
            return True
        shift += 7
    return False


cdef inline bint _take_counted(const char **at, const char *end, const char **p, int32_t *length) noexcept nogil:
    # The bytes that a length is before; NULL for a null. False if they would not end before `end`.
    cdef int64_t n
    if not _take_varint(at, end, &n):
        return False
    p[0], length[0] = NULL, 0
    if n == 0:
        return True
    n -= 1
    if n > end - at[0] or n > INT32_MAX:
        return False
    p[0], length[0] = at[0], <int32_t> n
    at[0] += n
    return True


cdef PackedFault unpack(const char *packed, Py_ssize_t length, PackedRecord *out) noexcept nogil:
    # Looks at all of it, so that unpack_headers cannot fail.
    cdef const char *at = packed + PACKED_FIXED
    cdef const char *end = packed + length - PACKED_CHECKSUM
    cdef Record *record = &out.record
    cdef Header header
    cdef int64_t count
    cdef int32_t i
    if length < 1:
        return TOO_SHORT
    if packed[0] != PACKED_VERSION:
        return OTHER_VERSION
    if length < PACKED_FIXED + PACKED_CHECKSUM:
        return TOO_SHORT
    if kb_crc32(packed, length - PACKED_CHECKSUM) != <uint32_t> kb_load_little(end, PACKED_CHECKSUM):
        return DAMAGED
    if packed[1] != 0:
        return UNKNOWN_FLAGS
    record.timestamp = <int64_t> kb_load_little(packed + 2, 8)
    record.partition = <int32_t> <uint32_t> kb_load_little(packed + 10, 4)
    record.flags = 0
    record.topic, record.headers = NULL, NULL
    if record.partition < -1:
        return WRONG_NUMBER
    if not _take_counted(&at, end, &out.topic, &out.topic_len) or out.topic == NULL:
        return WRONG_NUMBER
    if not _take_counted(&at, end, &record.key, &record.key_len):
        return WRONG_NUMBER
    if not _take_varint(&at, end, &count) or count > MOST_HEADERS:
        return WRONG_NUMBER
    record.header_count = <int32_t> count
    out.headers, out.end = at, end
    for i in range(record.header_count):
        if not _take_header(&at, end, &header):
            return WRONG_NUMBER
    if not _take_counted(&at, end, &record.value, &i):
        return WRONG_NUMBER
    record.value_len = i
    return NO_FAULT if at == end else WRONG_NUMBER


cdef inline bint _take_header(const char **at, const char *end, Header *header) noexcept nogil:
    if not _take_counted(at, end, &header.name, &header.name_len) or header.name == NULL:
        return False
    if not _take_counted(at, end, &header.value, &header.value_len):
        return False
    if header.value == NULL:
        header.value_len = VALUE_NULL
    return True


cdef int64_t unpack_headers(PackedRecord *packed, Header *room) noexcept nogil:
    # Into room for record.header_count of them. What they take on the wire.
    cdef const char *at = packed.headers
    cdef Cursor cursor
    cdef Header *header
    cdef int32_t i
    packed.record.headers = cursor.next = room
    cursor.wire_size = 0
    for i in range(packed.record.header_count):
        header = cursor.next
        _take_header(&at, packed.end, header)
        _put(&cursor, header.name, header.name_len, header.value, header.value_len, max(header.value_len, 0))
    return cursor.wire_size


cdef object _unpacking_error(PackedFault fault, Py_ssize_t index):
    return DeserializationError(
        f"packed record {index} cannot be read: {PACKED_FAULTS[<int> fault]}", topic=None, partition=None, offset=None,
        header=None)


cdef list packed_records(MappedBatch batch):
    # None for what is not sent.
    cdef list packed = []
    cdef bytes one
    cdef Record *record
    cdef Py_ssize_t i
    cdef int64_t size, unshared = 0, offered_ns = kb_now_ns()
    for i in range(batch.state.count):
        record = &batch.state.records[i]
        if record.flags:
            packed.append(None)
            continue
        size = packed_size(record)
        one = PyBytes_FromStringAndSize(NULL, size)
        pack_record(record, PyBytes_AS_STRING(one))
        packed.append(one)
        unshared += size
        if unshared >= SHARE_EVERY:
            unshared = 0
            share_gil(&offered_ns)
    return packed


cdef class _Unpacked:
    """A packed record with room for its headers."""

    cdef bytes packed     # what all of it points into
    cdef str topic
    cdef PackedRecord found
    cdef Header *room     # owned

    @staticmethod
    cdef _Unpacked make(bytes packed):
        cdef _Unpacked self = _Unpacked.__new__(_Unpacked)
        cdef PackedFault fault = unpack(PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed), &self.found)
        if fault != NO_FAULT:
            raise _unpacking_error(fault, 0)
        self.packed = packed
        self.topic = _topic_name(&self.found, 0)
        self.room = <Header *> kb_malloc(max(self.found.record.header_count, 1) * sizeof(Header))
        if self.room == NULL:
            raise MemoryError(f"no memory for {self.found.record.header_count} headers")
        unpack_headers(&self.found, self.room)
        return self

    def __dealloc__(self):
        kb_free(self.room)


cdef str _topic_name(PackedRecord *found, Py_ssize_t index):
    try:
        return PyUnicode_DecodeUTF8(found.topic, found.topic_len, NULL)
    except UnicodeDecodeError as error:
        if not isinstance(error, UnicodeDecodeError):
            raise  # up to Python 3.11: there was no memory to make the one that was meant
        raise _unpacking_error(NOT_UTF_8, index) from None


def unpack_record(bytes packed not None) -> tuple:
    """``(topic, partition, timestamp, key, value, headers)`` of a packed record."""
    cdef _Unpacked unpacked = _Unpacked.make(packed)
    cdef Topic topic
    topic.name = _NOTHING
    unpacked.found.record.topic = &topic
    try:
        return unpacked.topic, *read_record(&unpacked.found.record)[1:]
    except UnicodeDecodeError as error:
        if not isinstance(error, UnicodeDecodeError):
            raise  # as in _topic_name
        raise _unpacking_error(NOT_UTF_8, 0) from None


def read_packed(bytes packed not None, *, str wire="kbatch") -> Envelope:
    """The envelope that a packed record is, as `read_envelope` makes it of a record without an offset."""
    cdef _Unpacked unpacked = _Unpacked.make(packed)
    cdef Record *record = &unpacked.found.record
    cdef Consumed consumed
    cdef object partition = None if record.partition < 0 else record.partition
    cdef object key = None if record.key == NULL else record.key[:record.key_len]
    cdef object value = None if record.value == NULL else record.value[:record.value_len]
    consumed.topic, consumed.partition = <PyObject *> unpacked.topic, <PyObject *> partition
    consumed.offset = <PyObject *> None
    consumed.key, consumed.value = <PyObject *> key, <PyObject *> value
    consumed.timestamp = max(record.timestamp, 0)
    consumed.pairs, consumed.headers, consumed.count = NULL, record.headers, record.header_count
    return envelope_of(&consumed, wire_number(wire, ""), Envelope.__new__(Envelope))


cdef int map_packed(Mapper mapper, MappedBatch batch, object packed, list rejected, object deliver_by) except -1:
    """In place of phase 1: the records of `batch` are those that were packed, and point into these bytes."""
    cdef _Mapping mapping = new_mapping(mapper, batch, None, packed, rejected is not None)
    cdef list times = None if deliver_by is None else list(deliver_by)
    cdef Py_ssize_t i
    cdef int64_t unshared = 0, offered_ns = kb_now_ns()
    cdef object at
    if times is not None and len(times) != batch.state.count:
        raise ValueError(f"{len(times)} times for {batch.state.count} packed records")
    for i in range(batch.state.count):
        mapping.index = i
        if rejected is None:
            unshared += _map_packed_one(mapping, i)
        else:
            unshared += _map_packed_or_reject(mapping, i)
        if times is not None:
            at = times[i]
            if at is not None and batch.state.records[i].flags == 0:
                if at <= mapping.now_us:
                    batch.state.records[i].flags = RECORD_EXPIRED
                else:
                    mapping._note_deliver_by(at)
        if unshared >= SHARE_EVERY:
            unshared = 0
            share_gil(&offered_ns)
    if rejected is not None:
        rejected.extend(mapping.rejected)
    return 0


cdef Py_ssize_t _map_packed_one(_Mapping mapping, Py_ssize_t i) except -1:
    # How many bytes it has.
    cdef object item = mapping.batch.envelopes[i]
    cdef PackedRecord found
    cdef PackedFault fault
    cdef Topic *topic = mapping.last_topic_entry
    cdef int64_t headers_size
    if type(item) is not bytes:
        raise TypeError(f"packed record {i} must be bytes, not {type(item).__name__}")
    fault = unpack(PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item), &found)
    if fault != NO_FAULT:
        raise _unpacking_error(fault, i)
    if topic == NULL or topic.name_len != found.topic_len or memcmp(topic.name, found.topic, found.topic_len) != 0:
        topic = mapping.last_topic_entry = mapping._find_topic(_topic_name(&found, i))
    headers_size = unpack_headers(&found, mapping._room_for(found.record.header_count))
    mapping._check_size(&found.record, headers_size)
    found.record.topic = topic
    mapping.state.records[i] = found.record
    return PyBytes_GET_SIZE(item)


cdef Py_ssize_t _map_packed_or_reject(_Mapping mapping, Py_ssize_t i) except -1:
    cdef Record *record = &mapping.state.records[i]
    try:
        return _map_packed_one(mapping, i)
    except (DeserializationError, SerializationError, TypeError) as error:
        mapping.rejected.append((i, mapping._as_rejection(error) if isinstance(error, TypeError) else error))
    record.flags = RECORD_REJECTED
    record.topic, record.headers, record.key, record.value = NULL, NULL, NULL, NULL
    record.partition = -1
    record.header_count = record.key_len = 0
    record.value_len = record.timestamp = 0
    return 0


# -- rows of an outbox. DESIGN.md, "Outbox", has the hash, which is stored: it must never change.

cdef inline uint64_t _hash_bytes(uint64_t hash, const char *p, Py_ssize_t length) noexcept nogil:
    # FNV-1a.
    cdef Py_ssize_t i
    for i in range(length):
        hash = (hash ^ <uint8_t> p[i]) * <uint64_t> 1099511628211
    return hash


cdef inline uint64_t _mixed(uint64_t hash) noexcept nogil:
    # The end of MurmurHash3: each bit of FNV-1a depends only on those below it.
    hash = (hash ^ (hash >> 33)) * <uint64_t> 0xFF51AFD7ED558CCD
    hash = (hash ^ (hash >> 33)) * <uint64_t> 0xC4CEB9FE1A85EC53
    return hash ^ (hash >> 33)


cdef uint64_t _order_hash(const char *topic, Py_ssize_t topic_len, Record *record, const char *id) noexcept nogil:
    # Of what has an order: a topic and key, or a topic and partition. Of a record that has none, of its id.
    cdef uint64_t hash = _hash_bytes(<uint64_t> 14695981039346656037, topic, topic_len)
    cdef char mark[5]
    mark[0] = 0
    if record.key != NULL:
        return _mixed(_hash_bytes(_hash_bytes(hash, mark, 1), record.key, record.key_len))
    mark[0] = 1
    if record.partition >= 0:
        kb_store_little(mark + 1, <uint64_t> record.partition, 4)
        return _mixed(_hash_bytes(hash, mark, 5))
    mark[0] = 2
    return _mixed(_hash_bytes(_hash_bytes(hash, mark, 1), id, 16))


cdef list stored_rows(object batches, int64_t first_seq, int buckets, list scheduled, int64_t created_us):
    # What has expired has no row.
    cdef list rows = []
    cdef bytes one
    cdef const char *id
    cdef MappedBatch batch
    cdef Envelope envelope
    cdef bint is_later
    cdef Record *record
    cdef Py_ssize_t i
    cdef int64_t size, bucket, unshared = 0, offered_ns = kb_now_ns()
    cdef object deliver_by, row
    if buckets < 1:
        raise ValueError(f"buckets must be 1 or more, not {buckets}")
    for batch in batches:
        if batch is None:
            raise TypeError("batches must be MappedBatch, not None")
        for i in range(batch.state.count):
            record = &batch.state.records[i]
            if record.flags:
                continue
            envelope = <Envelope> batch.envelopes[i]
            is_later = scheduled is not None and envelope._scheduled_time > created_us
            if is_later and not envelope._timestamp:
                # A topic keeps records by their timestamp: with that of now it might delete what has just been sent.
                record.timestamp = envelope._scheduled_time // 1000
            size = packed_size(record)
            one = PyBytes_FromStringAndSize(NULL, size)
            pack_record(record, PyBytes_AS_STRING(one))
            id = <const char *> envelope._id
            deliver_by = None
            if batch.state.deliver_by != NULL and batch.state.deliver_by[i]:
                deliver_by = batch.state.deliver_by[i]
            bucket = <int64_t> (_order_hash(record.topic.name, record.topic.name_len, record, id) % <uint64_t> buckets)
            row = (bucket, first_seq, PyBytes_FromStringAndSize(id, 16), one, created_us, deliver_by)
            if is_later:
                scheduled.append((*row, (envelope._scheduled_time + 999) // 1000))
            else:
                rows.append(row)
            first_seq += 1
            unshared += size
            if unshared >= SHARE_EVERY:
                unshared = 0
                share_gil(&offered_ns)
    return rows


def packed_key_hash(bytes packed not None) -> object:
    """The number of the topic and key, or topic and partition, that a packed record has its order in; None without.

    Other keys may have the same number. It has 64 bits, signed.
    """
    cdef PackedRecord found
    cdef PackedFault fault = unpack(PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed), &found)
    if fault != NO_FAULT:
        raise _unpacking_error(fault, 0)
    if found.record.key == NULL and found.record.partition < 0:
        return None
    return <int64_t> _order_hash(found.topic, found.topic_len, &found.record, NULL)
