# Consumed records become envelopes, by the tables that phase 1 writes by. The fields of an envelope are filled as C
# values: objects for its id and times are made when they are asked for.

cdef bytes _IDS = uuid.UUID("7d6a7a3c-0b1e-5d43-9a55-6b62617463a8").bytes  # of ids that are made from something else


cdef struct Given:
    # One header of a record.
    const char *name      # NULL: it has none in UTF-8
    Py_ssize_t name_len
    PyObject *pair        # as a consumer gave it, or NULL
    PyObject *value       # of the pair
    const char *bytes     # the value, without a pair; NULL: null
    Py_ssize_t length


cdef inline int given_header(const Consumed *record, Py_ssize_t i, Given *out) except -1:
    cdef PyObject *name
    if record.pairs == NULL:
        out.pair = out.value = NULL
        out.name = record.headers[i].name
        out.name_len = record.headers[i].name_len
        out.bytes = record.headers[i].value if record.headers[i].value_len != VALUE_NULL else NULL
        out.length = record.headers[i].value_len
        return 0
    out.pair = PyTuple_GET_ITEM(record.pairs, i)
    name = PyTuple_GET_ITEM(out.pair, 0)
    out.value = PyTuple_GET_ITEM(out.pair, 1)
    out.name = NULL
    if isinstance(<object> name, str):
        out.name = utf8_or_null(name, &out.name_len)
    return 0


cdef const char *utf8_or_null(PyObject *text, Py_ssize_t *length) except? NULL:
    # NULL without an exception for text that has no UTF-8.
    cdef const char *p = kb_utf8(text, length)
    if p == NULL:
        try:
            raise_pending()
        except UnicodeEncodeError as error:
            if not isinstance(error, UnicodeEncodeError):
                raise  # as in `_text`
    return p


cdef inline bint is_null(const Given *given) noexcept:
    return given.bytes == NULL if given.pair == NULL else given.value == <PyObject *> None


cdef object name_object(const Given *given):
    if given.pair != NULL:
        return <object> PyTuple_GET_ITEM(given.pair, 0)
    return PyUnicode_DecodeUTF8(given.name, given.name_len, NULL)


cdef object value_object(const Given *given):
    if given.pair != NULL:
        return <object> given.value
    return None if given.bytes == NULL else PyBytes_FromStringAndSize(given.bytes, given.length)


cdef object text_object(const Given *given):
    # A subclass of str is what it was given as.
    if given.pair == NULL:
        return PyUnicode_DecodeUTF8(given.bytes, given.length, NULL)
    if isinstance(<object> given.value, str):
        return <object> given.value
    return PyUnicode_DecodeUTF8(PyBytes_AS_STRING(<object> given.value), PyBytes_GET_SIZE(<object> given.value), NULL)


cdef inline char _lower(char c) noexcept nogil:
    return c + 32 if c'A' <= c <= c'Z' else c


cdef inline bint is_named(const Given *given, const OwnHeader *own, bint any_case) noexcept nogil:
    cdef Py_ssize_t i
    if given.name_len != own.name_len:
        return False
    if not any_case:
        return memcmp(given.name, own.name, own.name_len) == 0
    for i in range(own.name_len):
        if _lower(given.name[i]) != own.name[i]:
            return False
    return True


cdef bint is_read_as_attribute(const Given *given) noexcept nogil:
    # ce_ and what CloudEvents allows in the name of an attribute, in any case; or content-type.
    cdef Py_ssize_t i
    cdef char c
    if given.name == NULL or not _is_attribute(given.name, given.name_len):
        return False
    if _lower(given.name[0]) == c'c' and given.name[2] == c'_':
        for i in range(3, given.name_len):
            c = _lower(given.name[i])
            if not (c'a' <= c <= c'z' or c'0' <= c <= c'9'):
                return False
    return given.name_len > 3


cdef inline const OwnHeader *find_own(const OwnHeader *own, int count, bint any_case, int *next_own,
                                      const Given *given) noexcept nogil:
    # The format's header of this name, or NULL. Headers mostly come in the order in which they are written.
    cdef int i, at = next_own[0]
    if given.name == NULL:
        return NULL
    for i in range(count):
        if at == count:
            at = 0
        if is_named(given, own + at, any_case):
            next_own[0] = at + 1
            if own[at].rules & KB_ALIAS:
                return own + at - 1
            return own + at if own[at].field != KB_RESERVED else NULL
        at += 1
    return NULL


@cython.final
@cython.freelist(8)
cdef class _Reading:
    """One record on its way to be an envelope."""

    cdef Consumed record
    cdef int wire
    cdef const OwnHeader *own
    cdef int own_count
    cdef int next_own
    cdef int seen             # bits of the fields that headers have given
    cdef Envelope envelope
    cdef object event_id      # text of CloudEvents
    cdef object data          # the value, or what a structured event has in it
    cdef tuple pairs          # of a structured event
    cdef list users

    # -- errors

    cdef object _error(self, str reason, object header):
        return DeserializationError(
            reason, topic=<object> self.record.topic, partition=<object> self.record.partition,
            offset=<object> self.record.offset, header=header)

    cdef object _header_error(self, const OwnHeader *own, const Given *given, str reason):
        cdef object value = value_object(given)
        cdef str name = own.name[:own.name_len].decode()
        if not isinstance(value, (str, bytes)):
            return self._error(f"header {name!r} must be text or bytes, not {type(value).__name__}", name)
        return self._error(f"header {name!r} {reason}, not {_shown_value(value)}", name)

    # -- headers

    cdef inline const OwnHeader *_find(self, const Given *given) noexcept:
        return find_own(self.own, self.own_count, self.wire == WIRE_CLOUDEVENTS, &self.next_own, given)

    cdef int _read_headers(self) except -1:
        cdef Given given
        cdef const OwnHeader *own
        cdef Py_ssize_t i
        for i in range(self.record.count):
            given_header(&self.record, i, &given)
            own = self._find(&given)
            if own == NULL:
                self._keep(&given)
            elif not is_null(&given):
                self._set(own, &given)
        return 0

    cdef tuple _pair(self, const Given *given):
        # As it stays in the envelope's headers.
        if given.pair != NULL:
            return <tuple> given.pair
        try:
            return name_object(given), value_object(given)
        except UnicodeDecodeError as error:
            if not isinstance(error, UnicodeDecodeError):
                raise  # as in `_text`
            raise self._error("the name of one of its headers is not UTF-8", None) from error

    cdef int _keep(self, const Given *given) except -1:
        # The user's.
        if self.users is None:
            self.users = []
        if self.wire == WIRE_CLOUDEVENTS and is_read_as_attribute(given):
            if not is_null(given):
                self.users.append((name_object(given).lower(), value_object(given)))
        else:
            self.users.append(self._pair(given))
        return 0

    cdef int _set(self, const OwnHeader *own, const Given *given) except -1:
        cdef Envelope e = self.envelope
        cdef object text
        cdef const char *p
        cdef Py_ssize_t length
        self.seen |= 1 << own.field
        if own.field <= KB_LAST_TEXT or own.rules & KB_EVENT_ID:
            text = self._text(own, given)
            if own.rules & KB_NOT_EMPTY and not text:
                text = None
            if own.rules & KB_EVENT_ID:
                self.event_id = text
            elif own.field == KB_MESSAGE_TYPE:
                e._message_type = text
            elif own.field == KB_CONTENT_TYPE:
                e._content_type = text
            elif own.field == KB_SOURCE:
                e._source = text
            elif own.field == KB_CORRELATION_ID:
                e._correlation_id = text
            elif own.field == KB_CONVERSATION_ID:
                e._conversation_id = text
            elif own.field == KB_PARENT_ID:
                e._parent_id = text
            elif own.field == KB_TENANT_ID:
                e._tenant_id = text
            else:
                e._user_name = text
            return 0
        p = self._characters(given, &length)
        if own.field == KB_ID:
            if p == NULL or not parse_uuid(p, length, e._id):
                self._refuse(own, given, "must be a UUID")
        elif own.field == KB_SENT_AT:
            self._set_time(own, given, p, length, &e._sent_at)
        elif own.field == KB_SCHEDULED_TIME:
            self._set_time(own, given, p, length, &e._scheduled_time)
        elif own.field == KB_DELIVER_BY:
            self._set_time(own, given, p, length, &e._deliver_by)
        elif own.field == KB_ATTEMPTS:
            if p == NULL or not parse_count(p, length, &e._attempts):
                self._refuse(own, given, "must be a whole number from 0 to 2147483647")
        elif own.rules & KB_REQUIRED:
            if p == NULL or length != 3 or memcmp(p, b"1.0", 3) != 0:
                self._refuse(own, given, "must be 1.0, the only version of CloudEvents that is read")
        else:
            self._text(own, given)
        return 0

    cdef int _set_time(self, const OwnHeader *own, const Given *given, const char *p, Py_ssize_t length,
                       int64_t *us) except -1:
        if p == NULL or not parse_time(p, length, us):
            self._refuse(own, given, "must be a time of RFC 3339, such as 2026-11-23T09:16:45.123456Z")
        return 0

    cdef object _text(self, const OwnHeader *own, const Given *given):
        cdef Py_ssize_t length
        if given.pair != NULL:
            if not isinstance(<object> given.value, (str, bytes)):
                raise self._header_error(own, given, "")
            if isinstance(<object> given.value, str) and utf8_or_null(given.value, &length) == NULL:
                raise self._header_error(own, given, "must be UTF-8")
        try:
            return text_object(given)
        except UnicodeDecodeError as error:
            if not isinstance(error, UnicodeDecodeError):
                raise  # up to Python 3.11: there was no memory to make the one that was meant
            raise self._header_error(own, given, "must be UTF-8") from None

    cdef const char *_characters(self, const Given *given, Py_ssize_t *length) except? NULL:
        # Of a value that is a number, an id or a time; NULL for what is none.
        cdef object value
        if given.pair == NULL:
            length[0] = given.length
            return given.bytes
        value = <object> given.value
        if isinstance(value, bytes):
            length[0] = PyBytes_GET_SIZE(value)
            return PyBytes_AS_STRING(value)
        return utf8_or_null(given.value, length) if isinstance(value, str) else NULL

    cdef int _refuse(self, const OwnHeader *own, const Given *given, str reason) except -1:
        self._text(own, given)  # what is no text is refused as that
        raise self._header_error(own, given, reason)

    # -- ids

    cdef int _make_id(self) except -1:
        # Of what has none, the same each time that it is read; and of an event's that is no UUID.
        cdef Envelope e = self.envelope
        cdef object text = self.event_id
        cdef const char *p
        cdef Py_ssize_t length
        if text is not None:
            p = utf8_or_null(<PyObject *> text, &length)
            if p == NULL or not parse_uuid(p, length, e._id):
                # Source and id together are unique.
                set_made_id(e, f"{'' if e._source is None else e._source}\n{text}")
            if text and text != str(uuid_object(e._id)):
                if self.users is None:
                    self.users = []
                self.users.insert(0, ("ce_id", text.encode()))
        elif not self.seen & 1 << KB_ID:
            offset = <object> self.record.offset
            if offset is not None and offset >= 0:
                set_made_id(e, f"{<object> self.record.topic}/{<object> self.record.partition}/{offset}")
            elif make_uuid7(e._id) < 0:
                raise OSError("the system gave no random bytes for an id")
        return 0

    # -- CloudEvents

    cdef object _last(self, const OwnHeader *own):
        # The value of the last header that is `own`, or None.
        cdef Given given
        cdef object found = None
        cdef Py_ssize_t i
        for i in range(self.record.count):
            given_header(&self.record, i, &given)
            if self._find(&given) == own and not is_null(&given):
                found = value_object(&given)
        return found

    cdef const OwnHeader *_own_of(self, int field) noexcept:
        cdef int i
        for i in range(self.own_count):
            if self.own[i].field == field:
                return self.own + i
        return NULL

    cdef int _check_required(self) except -1:
        cdef int i
        for i in range(self.own_count):
            if self.own[i].rules & KB_REQUIRED and not self._last(self.own + i):
                name = self.own[i].name[:self.own[i].name_len].decode()
                raise self._error(f"it is no CloudEvent: header {name!r} is missing or empty", name)
        return 0

    cdef int _open_structured(self) except -1:
        # An event that is all in the value becomes the headers and the value of binary mode.
        cdef object declared = self._last(self._own_of(KB_CONTENT_TYPE)) or b""
        cdef object content_type = declared.encode(errors="surrogatepass") if isinstance(declared, str) else declared
        cdef Given given
        cdef Py_ssize_t i
        cdef list pairs
        if not isinstance(content_type, bytes):
            return 0  # reading the headers refuses it
        if content_type[:23].lower() != b"application/cloudevents":
            return 0
        if content_type.partition(b";")[0].strip().lower() != b"application/cloudevents+json":
            raise self._error(
                f"of structured CloudEvents only JSON is read, not {_shown_value(declared)}", "content-type")
        try:
            pairs, self.data = _structured_event(self.data)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its value is no CloudEvent in JSON: {error}", None) from None
        for i in range(self.record.count):
            given_header(&self.record, i, &given)
            # The same attributes may stand in the headers as well.
            if not is_read_as_attribute(&given) and not (
                    given.name != NULL and given.name_len >= 3 and memcmp(given.name, b"ce_", 3) == 0):
                pairs.append(self._pair(&given))
        self.pairs = tuple(pairs)
        self.record.pairs = <PyObject *> self.pairs
        self.record.count = len(self.pairs)
        return 0

    # -- all of it

    cdef Envelope _read(self):
        cdef Envelope e = self.envelope
        cdef object key = <object> self.record.key
        cdef bint has_value = self.record.value != <PyObject *> None
        self.data = <object> self.record.value
        if self.wire == WIRE_CLOUDEVENTS:
            if has_value:
                self._open_structured()
            if has_value or self._last(self._own_of(KB_MESSAGE_TYPE)) is not None:
                self._check_required()
        self._read_headers()
        self._make_id()
        cdef bint is_tombstone = not has_value and key is not None and not self.seen & 1 << KB_MESSAGE_TYPE
        if is_tombstone and type(e) is Envelope:
            e = Tombstone.__new__(Tombstone)
            e._kind = BODY_BUILDING
            memcpy(e._id, self.envelope._id, 16)
            e._sent_at = self.envelope._sent_at
        if self.users:
            e._headers = tuple(self.users)
        e._key = key
        e._topic = <object> self.record.topic
        e._partition = partition_of(<object> self.record.partition)
        e._timestamp = self.record.timestamp
        if is_tombstone:
            e._kind = BODY_TOMBSTONE
        elif self.data is None:
            e._kind = BODY_NULL
        else:
            e._body = self.data
            e._kind = BODY_DATA
        return e


cdef Envelope envelope_of(const Consumed *record, int wire, Envelope empty):
    """The envelope that a record is, by one of the wire formats that kbatch knows: `empty`, or a tombstone."""
    cdef _Reading reading = _Reading.__new__(_Reading)
    reading.record = record[0]
    reading.wire = wire
    reading.own = own_headers(wire, &reading.own_count)
    reading.envelope = empty
    reading.envelope._kind = BODY_BUILDING
    return reading._read()


cdef int32_t partition_of(object partition) except? -2:
    if partition is None or partition < 0:
        return -1
    return <int32_t> _whole_number(partition, "partition", 0, INT32_MAX)


cdef int set_made_id(Envelope e, str name) except -1:
    # UUID version 5, as `uuid.uuid5` makes it.
    cdef bytes digest = hashlib.sha1(_IDS + name.encode(), usedforsecurity=False).digest()
    memcpy(e._id, PyBytes_AS_STRING(digest), 16)
    e._id[6] = (e._id[6] & 0x0F) | 0x50
    e._id[8] = (e._id[8] & 0x3F) | 0x80
    return 0


cdef str _shown_value(object value):
    cdef str text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


# --- structured CloudEvents

cdef object _JSON_TYPE = re.compile(r"[^/]+/(?:[^;]+\+)?json *(?:;.*)?", re.IGNORECASE).fullmatch
cdef object _RAW_MEMBERS = dict[str, msgspec.Raw]
cdef object _BYTES_OR_NONE = typing.Optional[bytes]


cdef tuple _structured_event(object value):
    # Headers of binary mode, and the data.
    cdef dict attributes = {}
    cdef list pairs = []
    cdef object data = None
    event = msgspec.json.decode(value, type=_RAW_MEMBERS)
    for name, raw in event.items():
        if name != "data" and name != "data_base64":
            attributes[name] = _attribute_text(name, raw)
    if "data_base64" in event:
        data = msgspec.json.decode(event["data_base64"], type=_BYTES_OR_NONE)
    elif "data" in event:
        data = _event_data(event["data"], attributes.get("datacontenttype"))
    for name, text in attributes.items():
        if text is not None:
            pairs.append(("content-type" if name == "datacontenttype" else f"ce_{name}", text.encode()))
    return pairs, data


cdef object _attribute_text(str name, object raw):
    # Text, a number or a truth value as the text that it is in binary mode.
    value = msgspec.json.decode(raw)
    if isinstance(value, (dict, list, float)):
        raise ValueError(f"the attribute {name!r} must be text, a whole number, true or false")
    return value if value is None or isinstance(value, str) else copied(raw).decode()


cdef object _event_data(object raw, object content_type):
    # Data in JSON as they are; text of another content type is that text.
    if content_type is None or _JSON_TYPE(content_type):
        return copied(raw)
    data = msgspec.json.decode(raw)
    if isinstance(data, str):
        return data.encode()
    return None if data is None else copied(raw)


# --- records of consumers

class _OfFields:
    """A record with attributes, as those of aiokafka and kafka-python, by the methods that confluent-kafka's has."""

    __slots__ = ("_fields",)

    def __init__(self, fields):
        self._fields = fields

    def topic(self):
        return self._fields.topic

    def partition(self):
        return self._fields.partition

    def offset(self):
        return self._fields.offset

    def timestamp(self):
        milliseconds = self._fields.timestamp
        if milliseconds is None:
            return 0, 0
        return (2 if getattr(self._fields, "timestamp_type", None) == 1 else 1), milliseconds

    def key(self):
        return self._fields.key

    def value(self):
        return self._fields.value

    def headers(self):
        return self._fields.headers


cdef object _by_methods(object record):
    if callable(getattr(record, "topic", None)):
        return record
    for name in ("topic", "partition", "offset", "timestamp", "key", "value", "headers"):
        if not hasattr(record, name):
            given = "None: the consumer had no record" if record is None else type(record).__name__
            raise TypeError(
                "record must be a confluent_kafka.Message, or a ConsumerRecord of aiokafka or kafka-python, or have "
                f"their methods or attributes, not {given}")
    return _OfFields(record)


cdef object _record_error(object record, str reason):
    return DeserializationError(
        reason, topic=record.topic(), partition=record.partition(), offset=record.offset(), header=None)


cdef object _read_custom(object record, object wire):
    if not callable(getattr(wire, "read", None)):
        raise ConfigError(f"wire must be a name or an object with a read() method, not {type(wire).__name__}")
    try:
        envelope = wire.read(record)
    except (MemoryError, DeserializationError):
        raise
    except Exception as error:
        raise _record_error(record, f"the wire format could not read it: {error}") from error
    if not isinstance(envelope, Envelope):
        raise _record_error(record, f"the wire format gave no kbatch.Envelope but {type(envelope).__name__}")
    return envelope


cdef tuple _headers_of(object record):
    cdef object headers
    cdef tuple pairs
    cdef Py_ssize_t i
    try:
        headers = record.headers()
    except (SystemError, UnicodeDecodeError) as error:  # confluent-kafka raises the first, from the second
        raise _record_error(record, "the name of one of its headers is not UTF-8") from error
    pairs = _header_pairs(headers) if headers else _EMPTY
    for i in range(len(pairs)):
        # Asked a second time, confluent-kafka gives its pairs, of which that name is missing: whoever looks crashes.
        if PyTuple_GET_ITEM(PyTuple_GET_ITEM(<PyObject *> pairs, i), 0) == NULL:
            raise _record_error(record, "the name of one of its headers is not UTF-8")
    return pairs


def record_headers(record) -> tuple:
    """The headers of a record as it gives them, any number of times.

    Raises:
        DeserializationError: The name of one is not UTF-8.
    """
    return _headers_of(record)


cdef int _check_encoded(object record, object key, object value) except -1:
    if type(value) is not bytes and value is not None:
        try:
            memoryview(value).release()
        except TypeError:
            raise _record_error(
                record, f"its value must be bytes, not {type(value).__name__}: use a consumer that does not deserialize"
            ) from None
    if key is not None and not isinstance(key, (str, bytes)):
        raise _record_error(
            record, f"its key must be bytes or text, not {type(key).__name__}: use a consumer that does not deserialize"
        )
    return 0


def read_envelope(record, *, wire="kbatch"):
    """The envelope that a consumed record is: what a producer with this `wire` wrote, or a program like it.

    The value is the envelope's ``data``, not decoded. Headers of the format are its fields (of several with one name
    the last, as Kafka has it), all others its ``headers``, as bytes, in order. A header whose name is empty, or has a
    NUL character, is read, and refused when the envelope is sent on; ``raw`` sends an empty one. Topic, partition and
    timestamp are the record's: to send it somewhere else, change them with `Envelope.replace`. A record without an id
    gets one made of its topic, partition and offset, the same each time that it is read.

    A null value is a `Tombstone`, with the id, ``sent-at`` and timestamp of the record; if the record names a message
    type, or has no key to delete, it is an envelope whose message is ``None``, and which is sent on with a null value.

    CloudEvents are read in binary and in structured JSON mode. Their ids may be any text: one that is no UUID, or not
    written as Python writes it, stays in ``headers`` as ``ce_id``. A producer with the same `wire` sends it on as the
    event's id, so take it out to give the event a new one. The envelope's id is the UUID, or made of the text and of
    the source. Names of attributes are read in any case. What CloudEvents does not allow as an attribute (``ce_a-b``)
    stays in ``headers``, and must be taken out before the event is sent on as one.

    Args:
        record: What a consumer gave: a ``confluent_kafka.Message``, or a ``ConsumerRecord`` of aiokafka or
            kafka-python. Its value is bytes, so the consumer must not deserialize.
        wire: ``"kbatch"``, ``"wolverine"``, ``"cloudevents"``, ``"raw"``, or an object with
            ``read(record) -> Envelope``. The first two read each other's headers, and both formats' times.

    Raises:
        TypeError: `record` is no record; ``None``, for instance, when the consumer had none.
        DeserializationError: A header of the format that is not what it should be, or an event of CloudEvents without
            one that is required.
        ConfigError: There is no such `wire`.
    """
    cdef Consumed consumed
    cdef tuple pairs
    cdef object topic, partition, offset, key, value, error, kind, milliseconds
    cdef int format
    record = _by_methods(record)
    if not isinstance(wire, str):
        return _read_custom(record, wire)
    format = wire_number(wire, " or an object with read()")
    # A consumer tells its own errors by records, too.
    error = getattr(record, "error", None)
    if error is not None:
        error = error()
        if error is not None:
            raise _record_error(record, f"it is an error of the consumer: {error}")
    pairs = _headers_of(record)
    key, value = record.key(), record.value()
    _check_encoded(record, key, value)
    kind, milliseconds = record.timestamp()
    topic, partition, offset = record.topic(), record.partition(), record.offset()
    consumed.topic, consumed.partition = <PyObject *> topic, <PyObject *> partition
    consumed.offset = <PyObject *> offset
    consumed.key, consumed.value = <PyObject *> key, <PyObject *> value
    consumed.timestamp = 0
    if kind and milliseconds > 0:
        consumed.timestamp = _whole_number(milliseconds, "timestamp", 1, INT64_MAX)
    consumed.pairs, consumed.headers, consumed.count = <PyObject *> pairs, NULL, len(pairs)
    return envelope_of(&consumed, format, Envelope.__new__(Envelope))
