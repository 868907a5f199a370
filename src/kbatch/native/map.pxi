# Phase 1: envelopes become records. The GIL is held; nothing is on the wire. Each function that can fail raises
# and leaves the batch to be dropped as a whole; what it took is released with the Batch. Who asks for it
# (`rejected`) gets a batch without the envelopes that cannot be mapped.

cdef enum:
    MESSAGE_OVERHEAD = 36  # RD_KAFKAP_MESSAGE_V2_MAX_OVERHEAD of librdkafka
    OWN_HEADERS = 16       # the most that a wire format writes itself
    MOST_HEADERS = 100000  # librdkafka's consumers refuse a record with more
    SIGNALS_EVERY = 4095   # Ctrl-C is looked at every 4,096 envelopes
    ENVELOPE_BYTES = 192   # some three cache lines; that it is about right is enough
    MOST_UNTIMED = 64      # envelopes between two looks at the clock, if they are quick: a look costs as much as one
    SMALLEST_BASE = 32768  # of a Scratch


cdef extern from *:
    """
    /* A str's UTF-8: in place for ASCII, else made once and kept by the str. NULL with an exception for a lone
       surrogate. */
    static inline const char *kb_utf8(PyObject *s, Py_ssize_t *n) {
        if (PyUnicode_IS_COMPACT_ASCII(s)) {
            *n = PyUnicode_GET_LENGTH(s);
            return (const char *)PyUnicode_DATA(s);
        }
        return PyUnicode_AsUTF8AndSize(s, n);
    }
    /* Of ASCII that is no subclass's. */
    static inline int kb_is_plain(PyObject *s) {
        return PyUnicode_CheckExact(s) && PyUnicode_IS_COMPACT_ASCII(s) && PyUnicode_GET_LENGTH(s) <= INT32_MAX;
    }
    static inline const char *kb_plain_text(PyObject *s) { return (const char *)PyUnicode_DATA(s); }
    static inline Py_ssize_t kb_plain_length(PyObject *s) { return PyUnicode_GET_LENGTH(s); }
    /* The length of a value's zig-zag varint, for n >= 0. */
    static inline int kb_varint_length(int64_t n) {
        return n < 64 ? 1 : n < 8192 ? 2 : n < 1048576 ? 3 : n < 134217728 ? 4 : 5;
    }
    /* What a bytearray holds of memory, however little of it is in use. */
    static inline Py_ssize_t kb_allocated(PyObject *bytes) { return ((PyByteArrayObject *)bytes)->ob_alloc; }
    """
    const char *kb_utf8(PyObject *s, Py_ssize_t *n) noexcept
    bint kb_is_plain(PyObject *s) noexcept
    const char *kb_plain_text(PyObject *s) noexcept
    Py_ssize_t kb_plain_length(PyObject *s) noexcept
    Py_ssize_t kb_allocated(PyObject *bytes) noexcept
    int kb_varint_length(int64_t n) noexcept nogil


cdef struct Cursor:
    # The headers being written of one envelope.
    Header *next
    int64_t wire_size  # serialised size so far


cdef Py_ssize_t _count_of(tuple pairs, const char *name) noexcept:
    # How many of the headers have this name.
    cdef object pair, given
    cdef Py_ssize_t n = 0
    for pair in pairs:
        given = <object> PyTuple_GET_ITEM(<PyObject *> pair, 0)
        if isinstance(given, str) and PyUnicode_CompareWithASCIIString(given, name) == 0:
            n += 1
    return n


cdef inline void _put(Cursor *at, const char *name, int32_t name_len, const char *value, int32_t code,
                      int64_t value_len) noexcept nogil:
    # `code` is what goes into the header, `value_len` the length the value will have on the wire.
    at.next.name = name
    at.next.name_len = name_len
    at.next.value = value
    at.next.value_len = code
    at.next += 1
    at.wire_size += name_len + value_len + kb_varint_length(name_len) + kb_varint_length(value_len)


cdef bint _is_attribute(const char *name, Py_ssize_t length) noexcept nogil:
    # Whether a reader of CloudEvents takes a header for an attribute. Some ignore the case of names.
    cdef const char *content_type = b"content-type"
    cdef Py_ssize_t i
    if length >= 3 and (name[0] | 32) == c'c' and (name[1] | 32) == c'e' and name[2] == c'_':
        return True
    if length != 12:
        return False
    for i in range(12):
        if name[i] != content_type[i] and (i == 7 or (name[i] | 32) != content_type[i]):  # 7: the dash
            return False
    return True


cdef bint _is_attribute_name(const char *name, Py_ssize_t length) noexcept nogil:
    # ce_ and what CloudEvents allows in the name of an attribute.
    cdef Py_ssize_t i
    if length < 4 or name[0] != c'c' or name[1] != c'e' or name[2] != c'_':
        return False
    for i in range(3, length):
        if not (c'a' <= name[i] <= c'z' or c'0' <= name[i] <= c'9'):
            return False
    return True


@cython.final
cdef class Scratch:
    """Where a mapping has its messages encoded, one after the other. One mapping has it at a time."""

    # msgspec grows the bytearray that it encodes into to 1.5 times what it needs, and CPython gives memory back
    # when one shrinks below half of it. A message that starts at `base`, the middle of the memory, and is no longer
    # than a third of that, therefore moves nothing. This matters to speed only.

    @staticmethod
    cdef Scratch make(int64_t message_max_bytes):
        cdef Scratch self = Scratch.__new__(Scratch)
        self.largest_base = max(<Py_ssize_t> (message_max_bytes // 2), SMALLEST_BASE)
        self._remake(SMALLEST_BASE)
        return self

    cdef int _remake(self, Py_ssize_t base) except -1:
        # Not bytearray(n), which writes to all of it; nor made with its size: CPython frees one that has found no
        # memory before it has set its count of exports.
        cdef bytearray memory = PyByteArray_FromStringAndSize(NULL, 0)
        self.memory = None
        PyByteArray_Resize(memory, 2 * base)
        self.memory = memory
        self.base = base
        return 0

    cdef int _begin(self) except -1:
        # Empties it for a message.
        if self.memory is None:
            self._remake(self.base)
        try:
            PyByteArray_Resize(self.memory, self.base)
        except BufferError:  # an encoder of the user's holds on to it
            self._remake(self.base)
            PyByteArray_Resize(self.memory, self.base)
        return 0

    cdef int _end(self, Py_ssize_t length) except -1:
        # After a message of `length` bytes. One that was moved left memory of another size.
        if length > self.longest:
            self.longest = length
        if length > self.base // 3:
            self._remake(self._base_for(length))
        return 0

    cdef Py_ssize_t _base_for(self, Py_ssize_t length) noexcept:
        # The check comes first: four times a length may be no number.
        if length >= self.largest_base // 4:
            return self.largest_base
        return max(4 * length, self.base)

    cdef bint _is_worth_keeping(self) noexcept:
        # Not what a message that could not be sent, or a rare giant, has left.
        return (self.memory is not None
                and kb_allocated(<PyObject *> self.memory) <= 2 * self.largest_base + 1
                and (self.base == SMALLEST_BASE or self.base // 32 <= self.longest))


cdef class Mapper:
    """How envelopes become records: wire format, encoder and defaults of one producer."""

    def __init__(self, wire, encoder, source, header_hook, message_max_bytes, queue_max_bytes, *,
                 carry_scheduled_time=False):
        if isinstance(wire, str):
            self.wire = wire_number(wire, " or an object with write()")
        else:
            self.wire, self.custom = WIRE_CUSTOM, wire
        self.reserved = reserved_headers(self.wire)
        self.own = own_headers(self.wire, &self.own_count)
        self.encoded_content_type = "application/octet-stream"
        if isinstance(encoder, msgspec.json.Encoder):
            self.encode_into = encoder.encode_into
            self.encoded_content_type = "application/json"
        elif isinstance(encoder, msgspec.msgpack.Encoder):
            self.encode_into = encoder.encode_into
            self.encoded_content_type = "application/msgpack"
        else:
            self.encoder = encoder
        self.source = source
        self.header_hook = header_hook
        self.message_max_bytes = message_max_bytes
        self.queue_max_bytes = queue_max_bytes
        self.carry_scheduled_time = carry_scheduled_time

    cdef Scratch _take_scratch(self):
        cdef Scratch scratch = self.spare
        self.spare = None
        if scratch is None:
            return Scratch.make(self.message_max_bytes)
        scratch.longest = 0
        return scratch

    cdef int _give_scratch(self, Scratch scratch) except -1:
        if scratch._is_worth_keeping():
            self.spare = scratch
        return 0

    cdef int64_t _pooled(self) noexcept:
        return 0 if self.spare is None else kb_allocated(<PyObject *> self.spare.memory)


@cython.final
cdef class _Mapping:
    """One batch on its way through phase 1."""

    cdef Mapper mapper
    cdef MappedBatch batch
    cdef Pool *pool
    cdef BatchState *state
    cdef Py_ssize_t index        # the envelope being mapped
    cdef Envelope envelope       # the same; None if it is no Envelope
    cdef bint hears_signals      # and maps nothing meanwhile
    # Its own while it runs, not shared: encoders and hooks are foreign code, which may give up the GIL or map another
    # batch of the same producer. No number and no pointer of a mapping is the mapper's.
    cdef Scratch scratch
    cdef list kept               # objects whose memory records point at, besides the envelopes
    cdef int64_t now_us
    cdef object default_topic
    cdef object last_topic
    cdef Topic *last_topic_entry
    cdef dict topics             # of each name, an exact str, the address of its Topic: those of the batch
    cdef object last_type
    cdef object last_type_name
    cdef tuple hook_headers
    cdef tuple extra_headers     # what the encoder added for this envelope; None or pairs
    cdef list rejected           # (index, error) of those that cannot be mapped; None: the first ends the batch
    cdef list rejected_out       # the caller's list, extended when all is mapped

    # -- errors

    cdef object _error(self, str field, str reason):
        cdef object id = None if self.envelope is None else uuid_object(self.envelope._id)
        return SerializationError(reason, index=self.index, envelope_id=id, field=field)

    # -- the batch as a whole

    cdef int _call_hook(self) except -1:
        cdef object hook
        if self.mapper.header_hook is None or not self.state.count:
            return 0
        try:
            hook = self.mapper.header_hook()
            self.hook_headers = _header_pairs(hook) if hook is not None else ()
        except MemoryError:
            raise
        except (Exception, cancelled_error()) as error:
            raise SerializationError(
                f"header_hook failed: {exception_text(error)}", index=None, envelope_id=None, field="header_hook"
            ) from error
        self.kept.append(self.hook_headers)
        return 0

    # -- text

    cdef const char *_text(self, object value, str field, Py_ssize_t *length) except NULL:
        cdef const char *p
        if type(value) is not str and not isinstance(value, str):
            raise self._error(field, f"{field} must be str, not {type_name(value)}")
        p = kb_utf8(<PyObject *> value, length)
        if p == NULL:
            self._not_utf8(field)
        if length[0] > INT32_MAX:
            raise self._error(field, f"{field} is larger than 2 GiB")
        return p

    cdef int _not_utf8(self, str field) except -1:
        try:
            raise_pending()
        except UnicodeEncodeError as error:
            if not isinstance(error, UnicodeEncodeError):
                raise  # up to Python 3.11: there was no memory to make the one that was meant
            shown = field if len(field) <= 120 else field[:119] + "…"
            raise self._error(field, f"{shown} cannot be encoded as UTF-8: {error.reason}") from error
        return 0

    cdef int _check_attribute(self, str where, object name, const char *name_p, Py_ssize_t name_len,
                              object value) except -1:
        # A user's header that readers of CloudEvents take for an attribute.
        cdef str field = f"{where}[{name!r}]"
        if not _is_attribute_name(name_p, name_len):
            raise self._error(
                field,
                f"header {shown(name)} is not an attribute of CloudEvents: it must be ce_ and then a-z and 0-9 only")
        if value is None:
            raise self._error(field, f"header {name!r} is an attribute of CloudEvents: it must be text, not None")
        if isinstance(value, bytes):
            try:
                (<bytes> value).decode()
            except UnicodeDecodeError as error:
                if not isinstance(error, UnicodeDecodeError):
                    raise  # as in _not_utf8
                raise self._error(
                    field, f"header {name!r} is an attribute of CloudEvents: its bytes must be UTF-8") from error
        return 0

    cdef int _check_event_id(self, str where, object value) except -1:
        # An envelope's own header that is the id of its event: `_put_own` writes none then.
        cdef str field = f"{where}['ce_id']"
        if where != "headers":
            raise self._error(field, "header 'ce_id' is reserved: it is the envelope's")
        if (PyBytes_GET_SIZE(value) == 0 if isinstance(value, bytes)
                else isinstance(value, str) and PyUnicode_CompareWithASCIIString(value, b"") == 0):
            raise self._error(field, "header 'ce_id' is empty, which the cloudevents format does not allow")
        if _count_of(self.envelope._headers, b"ce_id") > 1:
            raise self._error(field, "header 'ce_id' stands there more than once: an event has one id")
        return 0

    cdef int _put_headers(self, Cursor *at, tuple pairs, str where) except -1:
        cdef object name, value, pair
        cdef Py_ssize_t name_len, value_len
        cdef const char *name_p
        cdef const char *value_p
        for pair in pairs:
            name = <object> PyTuple_GET_ITEM(<PyObject *> pair, 0)
            value = <object> PyTuple_GET_ITEM(<PyObject *> pair, 1)
            if type(name) is not str and not isinstance(name, str):
                raise self._error(
                    where, f"{where}: a header's name must be str, not {type_name(name)} ({shown(name)})")
            name_p = kb_utf8(<PyObject *> name, &name_len)
            # Pointers are into what the envelope holds; what a subclass of str overrides is not asked.
            if type(name) is not str:
                name = PyUnicode_FromObject(name)
            if name_p == NULL:
                self._not_utf8(f"{where}[{name!r}]")
            if name_len == 0 and self.mapper.wire != WIRE_RAW:  # which carries what others have stored
                raise self._error(where, f"{where}: a header's name must not be empty")
            if memchr(name_p, 0, name_len) != NULL:
                raise self._error(
                    f"{where}[{name!r}]", f"header {shown(name)}: a name must not contain a NUL character")
            if self.mapper.reserved and name in self.mapper.reserved:
                raise self._error(
                    f"{where}[{name!r}]", f"header {name!r} is reserved: the wire format writes it itself")
            if self.mapper.wire == WIRE_CLOUDEVENTS and _is_attribute(name_p, name_len):
                self._check_attribute(where, name, name_p, name_len, value)
                if name_len == 5 and memcmp(name_p, b"ce_id", 5) == 0:
                    self._check_event_id(where, value)
            if type(value) is bytes or isinstance(value, bytes):
                value_p = PyBytes_AS_STRING(value)
                value_len = PyBytes_GET_SIZE(value)
            elif isinstance(value, str):
                value_p = kb_utf8(<PyObject *> value, &value_len)
                if value_p == NULL:
                    self._not_utf8(f"{where}[{name!r}]")
            elif value is None:
                _put(at, name_p, <int32_t> name_len, NULL, VALUE_NULL, 0)
                continue
            else:
                raise self._error(
                    f"{where}[{name!r}]",
                    f"header {shown(name)} must be str, bytes or None, not {type_name(value)}")
            if value_len > INT32_MAX or name_len > INT32_MAX:
                raise self._error(f"{where}[{name!r}]", f"header {shown(name)} is larger than 2 GiB")
            _put(at, name_p, <int32_t> name_len, value_p, <int32_t> value_len, value_len)
        return 0

    # -- the parts of a record

    cdef int _map_topic(self, Record *record) except -1:
        cdef object topic = self.envelope._topic
        if topic is None:
            topic = self.default_topic
        if topic is not self.last_topic or self.last_topic_entry == NULL:
            self.last_topic_entry = self._find_topic(topic)
            self.last_topic = topic
        record.topic = self.last_topic_entry
        return 0

    cdef Topic *_find_topic(self, object topic) except NULL:
        # The entry of this name, which is among the topics of the batch from here on.
        cdef Topic *entry
        cdef Py_ssize_t length
        cdef const char *p
        if topic is None:
            raise self._error("topic", "the envelope has no topic and the batch has none either")
        p = self._text(topic, "topic", &length)
        if type(topic) is not str:
            topic = PyUnicode_FromObject(topic)  # which has the hash and the equality that are its own
        address = self.topics.get(topic)
        if address is not None:
            return <Topic *> <size_t> address
        entry = find_topic(self.pool, p, length)
        if entry == NULL:
            if not _LEGAL_TOPIC(topic):
                raise self._error(
                    "topic",
                    f"topic {shown(topic)} is not a Kafka topic name: 1 to 249 of the characters a-z A-Z 0-9 . _ -")
            entry = make_topic(self.pool, p, length)
            if entry == NULL:
                raise MemoryError("no memory for a topic")
        self.topics[topic] = <size_t> entry
        if not note_topic(self.state, entry):
            del self.topics[topic]
            raise MemoryError("no memory for a topic")
        return entry

    cdef int _map_key(self, Record *record) except -1:
        cdef object key = self.envelope._key
        cdef Py_ssize_t length
        if key is None:
            record.key = NULL
            record.key_len = 0
            return 0
        if type(key) is bytes or isinstance(key, bytes):
            length = PyBytes_GET_SIZE(key)
            record.key = PyBytes_AS_STRING(key)
        elif isinstance(key, str):
            record.key = self._text(key, "key", &length)
        else:
            raise self._error("key", f"key must be str, bytes or None, not {type_name(key)}")
        if length > INT32_MAX:
            raise self._error("key", "key is larger than 2 GiB")
        record.key_len = <int32_t> length
        return 0

    cdef int _borrow(self, Record *record, bytes data) noexcept:
        record.value = PyBytes_AS_STRING(data)
        record.value_len = PyBytes_GET_SIZE(data)
        return 0

    cdef int _append(self, Record *record, object data) except -1:
        # A copy, for memory that may change under us.
        cdef Py_buffer view
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except MemoryError:
            raise
        except Exception as error:  # ValueError: a released memoryview, a closed mmap; anything from a __buffer__
            raise self._error("data", f"data is not one contiguous buffer: {exception_text(error)}") from error
        try:
            self._store(record, <const char *> view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        return 0

    cdef int _store(self, Record *record, const char *data, Py_ssize_t length) except -1:
        # Copies a body to where it stays until its delivery report.
        cdef char *body = _NOTHING  # an empty value is not a null value
        if length < 0:
            raise self._error(
                "data" if self.envelope._kind == BODY_DATA else "message", f"the body has a negative length, {length}")
        if 0 < length <= self.mapper.message_max_bytes:  # else _check_size refuses it, and no copy is needed
            body = arena_take(self.pool, &self.state.bodies, length)
            if body == NULL:
                raise MemoryError(f"no memory for a body of {length} bytes")
            memcpy(body, data, length)
        record.value = body
        record.value_len = length
        return 0

    cdef int _map_body(self, Record *record) except -1:
        cdef Envelope envelope = self.envelope
        cdef object body = envelope._body
        cdef Scratch scratch
        cdef bytearray memory
        cdef Py_ssize_t base, length
        cdef PyObject *args[4]
        if envelope._kind == BODY_DATA:
            if type(body) is bytes:
                return self._borrow(record, <bytes> body)
            return self._append(record, body)
        if envelope._kind == BODY_TOMBSTONE or envelope._kind == BODY_NULL:
            record.value = NULL
            record.value_len = 0
            return 0
        if self.mapper.encode_into is not None:
            scratch = self.scratch
            scratch._begin()
            memory, base = scratch.memory, scratch.base
            args[0] = NULL
            args[1] = <PyObject *> body
            args[2] = <PyObject *> memory
            args[3] = <PyObject *> _MINUS_ONE
            try:
                PyObject_Vectorcall(self.mapper.encode_into, args + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
            except MemoryError:
                raise
            except Exception as error:
                raise self._error("message", _encoding_error(error)) from error
            length = PyByteArray_GET_SIZE(memory) - base
            self._store(record, PyByteArray_AS_STRING(memory) + base, length)
            scratch._end(length)
            return 0
        return self._call_encoder(record, body)

    cdef int _call_encoder(self, Record *record, object body) except -1:
        cdef object context, encoded
        topic = self.envelope._topic if self.envelope._topic is not None else self.default_topic
        context = SerializationContext(topic, [])
        try:
            encoded = self.mapper.encoder(body, context)
        except MemoryError:
            raise
        except Exception as error:
            raise self._error("message", f"message cannot be encoded: {exception_text(error)}") from error
        if context.headers:
            try:
                self.extra_headers = _header_pairs(context.headers)
            except MemoryError:
                raise
            except Exception as error:
                raise self._error("message", f"the encoder's {exception_text(error)}") from error
            self.kept.append(self.extra_headers)
        if type(encoded) is bytes:
            self.kept.append(encoded)
            return self._borrow(record, <bytes> encoded)
        if encoded is None:
            record.value = NULL
            record.value_len = 0
            return 0
        if hasattr(type(encoded), "__await__"):
            if hasattr(encoded, "close"):
                encoded.close()  # else Python warns of a coroutine that was never awaited
            raise self._error(
                "message", "the encoder is asynchronous, and mapping awaits nothing: use one that returns bytes")
        if not PyObject_CheckBuffer(encoded):
            raise self._error("message", f"the encoder must return bytes, not {type_name(encoded)}")
        return self._append(record, encoded)

    cdef object _type_name(self):
        cdef object cls
        if self.envelope._message_type is not None or self.envelope._kind == BODY_NULL:
            return self.envelope._message_type
        if self.envelope._kind == BODY_DATA:
            return "bytes"
        cls = type(self.envelope._body)
        if cls is not self.last_type:
            self.last_type_name = message_type_of(cls)
            self.last_type = cls
            self.kept.append(self.last_type_name)  # the cache may drop it while records point at it
        return self.last_type_name

    cdef object _content_type(self):
        if self.envelope._content_type is not None or self.envelope._kind == BODY_NULL:
            return self.envelope._content_type
        return "application/octet-stream" if self.envelope._kind == BODY_DATA else self.mapper.encoded_content_type

    cdef void _put_time(self, Cursor *at, const OwnHeader *own, int64_t *us) noexcept:
        if us[0] != NO_TIME:
            if self.mapper.wire == WIRE_WOLVERINE:
                _put(at, own.name, own.name_len, <const char *> us, VALUE_TIME_WOLVERINE, TIME_TEXT_WOLVERINE)
            else:
                _put(at, own.name, own.name_len, <const char *> us, VALUE_TIME_KBATCH, TIME_TEXT_KBATCH)

    cdef inline void _put_sent_at(self, Cursor *at, const OwnHeader *own) noexcept:
        # The batch's own time is written once per batch.
        if self.envelope._sent_at != NO_TIME:
            self._put_time(at, own, &self.envelope._sent_at)
        elif self.mapper.wire == WIRE_WOLVERINE:
            _put(at, own.name, own.name_len, self.batch.sent_at, TIME_TEXT_WOLVERINE, TIME_TEXT_WOLVERINE)
        else:
            _put(at, own.name, own.name_len, self.batch.sent_at, TIME_TEXT_KBATCH, TIME_TEXT_KBATCH)

    # -- the wire format's own headers

    cdef int _put_own(self, Cursor *at) except -1:
        cdef Envelope e = self.envelope
        cdef const OwnHeader *own = <const OwnHeader *> self.mapper.own
        cdef const OwnHeader *end = own + self.mapper.own_count
        cdef bint tombstone = e._kind == BODY_TOMBSTONE
        cdef PyObject *value
        while own != end:
            if own.rules & KB_ALIAS or (tombstone and not own.rules & KB_OF_TOMBSTONE):
                pass
            elif own.field <= KB_LAST_TEXT:
                value = text_field(e, own.field)
                if value == <PyObject *> None and own.field <= KB_SOURCE:
                    value = self._default(own.field)
                if value == <PyObject *> None:
                    if own.rules & KB_REQUIRED:
                        self._refuse_without(own.field)
                elif kb_is_plain(value) and (
                        not own.rules or (kb_plain_length(value) and not own.rules & KB_GUID)):
                    _put(at, own.name, own.name_len, kb_plain_text(value), <int32_t> kb_plain_length(value),
                         kb_plain_length(value))
                else:
                    self._put_rare(at, own, value)
            elif own.field == KB_ID:
                if self._is_id_written(own, e):
                    _put(at, own.name, own.name_len, <const char *> e._id, VALUE_UUID, UUID_TEXT)
            elif own.field == KB_SENT_AT:
                self._put_sent_at(at, own)
            elif own.field == KB_SCHEDULED_TIME:
                self._put_time(at, own, &e._scheduled_time)
            elif own.field == KB_DELIVER_BY:
                self._put_time(at, own, &e._deliver_by)
            elif own.field == KB_ATTEMPTS:
                if e._attempts > 0 or own.rules & KB_ALWAYS:
                    _put(at, own.name, own.name_len, <const char *> &e._attempts, VALUE_INT32,
                         decimal_length(e._attempts))
            elif own.field == KB_VERSION:
                _put(at, own.name, own.name_len, b"1.0", 3, 3)
            own += 1
        return 0

    cdef bint _is_id_written(self, const OwnHeader *own, Envelope e) noexcept:
        if own.rules & KB_NOT_ZERO and _all_zero(e._id):
            return False
        return not own.rules & KB_EVENT_ID or not e._headers or not _count_of(e._headers, own.name)

    cdef inline PyObject *_default(self, int field) except NULL:
        # The text that is sent for a field that the envelope has not; borrowed from what the batch keeps.
        cdef object text = None
        if field == KB_MESSAGE_TYPE:
            text = self._type_name()
        elif field == KB_CONTENT_TYPE:
            text = self._content_type()
        elif field == KB_SOURCE:
            text = self.mapper.source
        return <PyObject *> text

    cdef int _refuse_without(self, int field) except -1:
        # Of what is required only a source can be missing.
        raise self._error(
            TEXT_FIELDS[field],
            f"the cloudevents format needs a {TEXT_FIELDS[field]}: give one to the envelope or to the producer "
            f"({TEXT_FIELDS[field]}=…)")

    cdef int _put_rare(self, Cursor *at, const OwnHeader *own, PyObject *value) except -1:
        # Text that is not plain, or for which there are rules.
        cdef Py_ssize_t length
        cdef const char *p = self._text(<object> value, <str> TEXT_FIELDS[own.field], &length)
        if length == 0 and own.rules & KB_NOT_EMPTY:
            field = TEXT_FIELDS[own.field]
            raise self._error(field, f"{field} is empty, which the cloudevents format does not allow")
        if own.rules & KB_GUID and not is_canonical_uuid(p, length):
            return self._put_guid(at, own, <object> value, p, length)
        _put(at, own.name, own.name_len, p, <int32_t> length, length)
        return 0

    cdef int _put_guid(self, Cursor *at, const OwnHeader *own, object text, const char *p, Py_ssize_t length) except -1:
        # A GUID in another form becomes canonical, and one that is all zero is absent, as .NET has it.
        cdef unsigned char[16] raw
        cdef bytes kept
        if not parse_uuid(p, length, raw):
            raise self._error(
                "conversation_id", f"conversation_id must be a UUID in the wolverine format, not {shown(text)}")
        if not _all_zero(raw):
            kept = PyBytes_FromStringAndSize(<const char *> raw, 16)
            self.kept.append(kept)
            _put(at, own.name, own.name_len, PyBytes_AS_STRING(kept), VALUE_UUID, UUID_TEXT)
        return 0

    cdef int _wolverine_key(self, Record *record) except -1:
        # As the original: an empty key is none, but the key of a null value is as it was given.
        cdef char *text
        if record.key_len == 0 and self.envelope._kind != BODY_TOMBSTONE and self.envelope._kind != BODY_NULL:
            text = arena_take(self.pool, &self.state.arena, UUID_TEXT)
            if text == NULL:
                raise MemoryError("no memory for a record key")
            write_uuid(self.envelope._id, text)
            record.key = text
            record.key_len = UUID_TEXT
        return 0

    cdef Header *_room_for(self, Py_ssize_t count) except? NULL:
        # Never nothing: the arena's last block is looked at afterwards, so there must be one.
        cdef Header *headers = <Header *> arena_take(
            self.pool, &self.state.arena, max(count, 1) * <Py_ssize_t> sizeof(Header))
        if headers == NULL:
            raise MemoryError(f"no memory for {count} headers")
        return headers

    cdef int _map_headers(self, Record *record) except -1:
        cdef Cursor at
        cdef Envelope e = self.envelope
        cdef Py_ssize_t most = len(e._headers) + len(self.hook_headers) + OWN_HEADERS
        if self.extra_headers is not None:
            most += len(self.extra_headers)
        record.headers = at.next = self._room_for(most)
        at.wire_size = 0
        if self.mapper.wire != WIRE_WOLVERINE and not (self.mapper.wire == WIRE_CLOUDEVENTS and _is_no_event(e)):
            self._put_own(&at)
        if self.extra_headers is not None:
            self._put_headers(&at, self.extra_headers, "encoder headers")
        if self.hook_headers:
            self._put_headers(&at, self.hook_headers, "header_hook")
        if e._headers:
            self._put_headers(&at, e._headers, "headers")
        if self.mapper.wire == WIRE_WOLVERINE:
            self._put_own(&at)
        return self._end_headers(record, &at, most)

    cdef int _end_headers(self, Record *record, Cursor *at, Py_ssize_t most) except -1:
        cdef Py_ssize_t count = at.next - record.headers
        if count > MOST_HEADERS:
            raise self._error(
                "headers", f"the record would have {count} headers; readers refuse more than {<int> MOST_HEADERS}")
        record.header_count = <int32_t> count
        # Room that was not used goes back: the headers were the last that was taken.
        self.state.arena.used -= <size_t> (most - count) * sizeof(Header)
        return self._check_size(record, at.wire_size)

    cdef int _check_size(self, Record *record, int64_t headers_size) except -1:
        cdef int64_t size = MESSAGE_OVERHEAD + record.key_len + record.value_len + headers_size
        cdef str field
        if size > self.mapper.message_max_bytes or record.value_len > self.mapper.queue_max_bytes:
            field = "message"
            if self.envelope is None:
                pass  # a packed record
            elif self.envelope._kind == BODY_DATA:
                field = "data"
            elif self.envelope._kind == BODY_TOMBSTONE:
                field = "key"  # all it has
            if size > self.mapper.message_max_bytes:
                raise self._error(
                    field,
                    f"the record would take {size} bytes (body {record.value_len}, key {record.key_len}, headers "
                    f"{headers_size}), more than message.max.bytes={self.mapper.message_max_bytes}")
            raise self._error(
                field, f"the body of {record.value_len} bytes can never fit into "
                f"queue.buffering.max.kbytes={self.mapper.queue_max_bytes // 1024}")
        return 0

    cdef int _map_custom(self, Record *record) except -1:
        # The user's wire object answers with (key, value, headers) at Python speed.
        cdef Cursor at
        cdef object answer, key, value, headers
        cdef tuple pairs
        cdef Py_ssize_t most, length
        try:
            answer = self.mapper.custom.write(self.envelope)
            key, value, headers = answer
            pairs = _header_pairs(headers) if headers is not None else ()
        except MemoryError:
            raise
        except Exception as error:
            raise self._error(
                "wire", f"the wire format could not write the envelope: {exception_text(error)}") from error
        self.kept.append((key, pairs))
        if key is None:
            record.key, record.key_len = NULL, 0
        elif isinstance(key, bytes):
            record.key, length = PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key)
            record.key_len = <int32_t> min(length, INT32_MAX)
        elif isinstance(key, str):
            record.key = self._text(key, "key", &length)
            record.key_len = <int32_t> length
        else:
            raise self._error("key", f"the wire format's key must be str, bytes or None, not {type_name(key)}")
        if value is None:
            record.value, record.value_len = NULL, 0
        elif type(value) is bytes:
            self.kept.append(value)
            self._borrow(record, <bytes> value)
        elif PyObject_CheckBuffer(value):
            self._append(record, value)
        else:
            raise self._error("wire", f"the wire format's value must be bytes or None, not {type_name(value)}")
        most = len(pairs) + len(self.hook_headers)
        record.headers = at.next = self._room_for(most)
        at.wire_size = 0
        self._put_headers(&at, self.hook_headers, "header_hook")
        self._put_headers(&at, pairs, "headers")
        return self._end_headers(record, &at, most)

    cdef int _refuse_scheduled(self) except -1:
        carry = ""
        if self.mapper.wire != WIRE_RAW:
            carry = ", or make the producer with carry_scheduled_time=True, so that its reader waits"
        raise NotYetDueError(
            f"scheduled_time {time_object(self.envelope._scheduled_time).isoformat()} is in the future, and a producer "
            f"sends at once: give the envelope to a BUFFERED sender or an outbox, which wait until then{carry}",
            index=self.index, envelope_id=self.envelope.id)

    cdef int _note_deliver_by(self, int64_t at) except -1:
        # Phase 2 looks again: a batch may wait for room.
        cdef BatchState *state = self.state
        if state.deliver_by == NULL:
            state.deliver_by = <int64_t *> kb_calloc(<size_t> state.count, sizeof(int64_t))
            if state.deliver_by == NULL:
                raise MemoryError("no memory for the times of a batch")
        state.deliver_by[self.index] = max(at, 1)
        return 0

    cdef int _map_one(self, object item, Record *record) except -1:
        cdef Envelope e
        if not isinstance(item, Envelope):
            self.envelope = None
            raise self._error("envelope", f"expected a kbatch.Envelope, not {type_name(item)}")
        self.envelope = e = <Envelope> item
        if e._kind == BODY_NONE or e._kind == BODY_BUILDING or e._kind == BODY_UNREAD:
            if e._kind != BODY_UNREAD:
                raise self._error("envelope", f"{type_name(item)} was made without Envelope.__init__")
            fill(e)
        record.flags = 0
        record.partition = e._partition
        record.timestamp = e._timestamp if e._timestamp else self.now_us // 1000
        self._map_topic(record)
        if e._deliver_by != NO_TIME and e._deliver_by <= self.now_us:
            record.flags = RECORD_EXPIRED
            return 0
        if e._deliver_by != NO_TIME:
            self._note_deliver_by(e._deliver_by)
        if e._scheduled_time > self.now_us and not self.mapper.carry_scheduled_time:
            self._refuse_scheduled()
        if self.mapper.wire == WIRE_CUSTOM:
            return self._map_custom(record)
        self._map_key(record)
        if self.mapper.wire == WIRE_WOLVERINE:
            self._wolverine_key(record)
        self.extra_headers = None
        self._map_body(record)
        return self._map_headers(record)

    cdef object _as_rejection(self, object error):
        # What an envelope is told of an exception that mapping it ended with. One of a subclass is foreign.
        if (type(error) is SerializationError or type(error) is NotYetDueError) and error.index == self.index:
            return error
        reason = self._error("message", f"the envelope cannot be mapped: {named_exception_text(error)}")
        reason.__cause__ = error
        return reason

    cdef int _map_or_reject(self, object item, Record *record) except -1:
        cdef BatchState *state = self.state
        cdef ArenaBlock *arena = state.arena
        cdef ArenaBlock *bodies = state.bodies
        cdef size_t arena_used = arena.used if arena != NULL else 0
        cdef size_t bodies_used = bodies.used if bodies != NULL else 0
        cdef Py_ssize_t kept = len(self.kept)
        try:
            return self._map_one(item, record)
        except BaseException as error:
            # Whatever it is: the others must not pay for a lack of memory, or a sys.exit() in an encoder.
            self.rejected.append((self.index, self._as_rejection(error)))
        record.flags = RECORD_REJECTED
        record.partition = -1 if self.envelope is None else self.envelope._partition
        # Nothing points at what it took: a large one must not lie here until the batch is done.
        arena_rewind(self.pool, &state.arena, arena, arena_used)
        arena_rewind(self.pool, &state.bodies, bodies, bodies_used)
        self.last_type = None  # its name may be among the following
        del self.kept[kept:]
        return 0

    cdef bint _run(self, int64_t end_ns) except -1:
        # True when all are mapped; False when `end_ns` has passed, to be called again.
        self.scratch = self.mapper._take_scratch()
        try:
            return self._map_until(end_ns)
        except MemoryError:
            raise
        except (Exception, cancelled_error()) as error:  # nothing is awaited here: nobody has cancelled the caller
            if self.hears_signals:
                raise  # a signal handler's
            raise self._as_rejection(error)
        finally:
            self.mapper._give_scratch(self.scratch)
            self.scratch = None

    cdef bint _map_until(self, int64_t end_ns) except -1:
        cdef Py_ssize_t i = self.index + 1
        cdef Py_ssize_t untimed = 1
        cdef Py_ssize_t look_at = self.state.count if end_ns == INT64_MAX else i + untimed
        cdef int64_t now, looked_ns = 0 if end_ns == INT64_MAX else kb_now_ns()
        cdef tuple envelopes = self.batch.envelopes
        cdef PyObject *ahead
        while i < self.state.count:
            if i & SIGNALS_EVERY == SIGNALS_EVERY:
                self.hears_signals = True
                PyErr_CheckSignals()
                self.hears_signals = False
            if i + 8 < self.state.count:
                # Between two batches librdkafka has driven the envelopes out of the processor's caches.
                kb_prefetch(PyTuple_GET_ITEM(<PyObject *> envelopes, i + 8), ENVELOPE_BYTES)
                ahead = PyTuple_GET_ITEM(<PyObject *> envelopes, i + 4)
                if type(<object> ahead) is Envelope:
                    kb_prefetch(<PyObject *> (<Envelope> ahead)._body, 1)
                    kb_prefetch(<PyObject *> (<Envelope> ahead)._key, 1)
            self.index = i
            if self.rejected is None:
                self._map_one(<object> PyTuple_GET_ITEM(<PyObject *> envelopes, i), &self.state.records[i])
            else:
                self._map_or_reject(<object> PyTuple_GET_ITEM(<PyObject *> envelopes, i), &self.state.records[i])
            i += 1
            if i == look_at and end_ns != INT64_MAX:
                now = kb_now_ns()
                if now >= end_ns:
                    break
                # Twice as many, unless these took so long that the end would be missed.
                untimed = min(2 * untimed, MOST_UNTIMED) if 4 * (now - looked_ns) < end_ns - now else 1
                look_at, looked_ns = i + untimed, now
        return i == self.state.count


cdef str _encoding_error(error):
    # What msgspec's encoders do not know is their users' business.
    cdef str text = f"message cannot be encoded: {exception_text(error)}"
    if isinstance(error, TypeError) and text.endswith(" is unsupported"):
        text += (": give the producer an encoder that knows how, such as msgspec.json.Encoder(enc_hook=…), "
                 "or a callable (message, context) -> bytes")
    return text


cdef char *_NOTHING = b""
cdef object _MINUS_ONE = -1
cdef object _LEGAL_TOPIC = re.compile(r"(?!\.{1,2}\Z)[a-zA-Z0-9._-]{1,249}\Z").match


cdef bint _is_no_event(Envelope e) noexcept:
    # Of CloudEvents: a null value without a type.
    return e._kind == BODY_TOMBSTONE or (e._kind == BODY_NULL and e._message_type is None)


cdef bint _all_zero(const unsigned char *id) noexcept nogil:
    cdef int i
    for i in range(16):
        if id[i]:
            return False
    return True


cdef _Mapping begin_mapping(Mapper mapper, MappedBatch batch, object topic, object envelopes, bint reject):
    """What `_Mapping._run` then maps into `batch`: all or nothing, or with `reject` all that can be mapped."""
    cdef _Mapping mapping = new_mapping(mapper, batch, topic, envelopes, reject)
    mapping._call_hook()
    return mapping


cdef _Mapping new_mapping(Mapper mapper, MappedBatch batch, object topic, object envelopes, bint reject):
    cdef _Mapping mapping = _Mapping.__new__(_Mapping)
    cdef BatchState *state = &batch.state
    if mapper is None:
        raise TypeError("this Core was made without __init__")
    # Each check on its own: in a tuple of classes Cython does not see that a check has raised.
    if type(envelopes) is not list and (
            isinstance(envelopes, (Envelope, str, bytes)) or isinstance(envelopes, Mapping)):
        raise TypeError(f"envelopes must be an iterable of kbatch.Envelope, not {type_name(envelopes)}")
    # A tuple of our own: a list may be changed by another thread, or by an encoder, while it is mapped.
    batch.envelopes = tuple(envelopes)
    state.count = len(batch.envelopes)
    state.records = records_take(state.pool, state.count, &state.capacity)
    if state.records == NULL and state.count:
        raise MemoryError(f"no memory for {state.count} records")
    mapping.mapper, mapping.batch = mapper, batch
    mapping.pool, mapping.state = state.pool, state
    mapping.kept = batch.kept = []
    mapping.topics = {}
    mapping.index = -1
    if reject:
        mapping.rejected = []
    mapping.default_topic = topic
    mapping.now_us = kb_wall_ns() // 1000
    mapping.hook_headers = ()
    write_time(mapping.now_us, mapper.wire == WIRE_WOLVERINE, batch.sent_at)
    return mapping
