# Envelope and Tombstone. The constructor checks what becomes a C number (times, partition, attempts, id) and the
# shape of the rest; text is checked when a batch is mapped, where the error can name the envelope's index.

cdef int64_t _whole_number(object value, str field, int64_t lowest, int64_t highest) except? -2:
    cdef int overflow = 0
    cdef int64_t number
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{field} must be an int, not {type(value).__name__}")
    number = PyLong_AsLongLongAndOverflow(value, &overflow)  # not by operators, which a subclass may override
    if overflow or number < lowest or number > highest:
        raise ValueError(f"{field} must be from {lowest} to {highest}, not {shown(value)}")
    return number


cdef tuple _header_pairs(object headers):
    # A tuple of exact 2-tuples, so that phase 1 reads them without a call.
    cdef object pair
    cdef list pairs = None
    cdef tuple given
    if headers is None:
        return _EMPTY
    if type(headers) is list or type(headers) is tuple:
        given = tuple(headers)
        for pair in given:
            if type(pair) is not tuple or PyTuple_GET_SIZE(<PyObject *> pair) != 2:
                break
        else:
            return given
    if isinstance(headers, Mapping):
        if type(headers) is dict:
            pairs = []
            for name, value in (<dict> headers).items():  # no iterator: its lack of memory crashes CPython 3.11
                pairs.append((name, value))
            return tuple(pairs)
        pairs = []
        for name, value in headers.items():
            pairs.append((name, value))
        return tuple(pairs)
    if isinstance(headers, (str, bytes)):
        raise TypeError(f"headers must be a mapping or a sequence of pairs, not {type(headers).__name__}")
    try:
        pairs = list(headers)
    except TypeError:
        raise TypeError(
            f"headers must be a mapping or a sequence of pairs, not {type(headers).__name__}") from None
    for i in range(len(pairs)):
        pair = pairs[i]
        if type(pair) is not tuple or len(<tuple> pair) != 2:
            if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"headers[{i}] must be a pair (name, value), not {type(pair).__name__}")
            pairs[i] = (pair[0], pair[1])
    return tuple(pairs)


class _NullValue:
    """What an `Envelope` takes as its message to be sent with a null value: what `read_envelope` makes of one."""

    def __reduce__(self) -> str:
        return "NULL_VALUE"

    def __repr__(self) -> str:
        return "NULL_VALUE"


NULL_VALUE = _NullValue()
cdef object _NULL_VALUE = NULL_VALUE


cdef bytes copied(object data):
    # The bytes of any buffer. Not bytes(data), which prefers __bytes__ and __index__ to the buffer: phase 1 does not.
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return PyBytes_FromStringAndSize(<const char *> view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


# What phase 1 reads from an envelope's C fields: a subclass's property of one of these names would not be seen.
cdef frozenset _FIELDS = frozenset((
    "message", "data", "key", "topic", "partition", "timestamp", "headers", "id", "message_type", "content_type",
    "source", "correlation_id", "conversation_id", "parent_id", "tenant_id", "user_name", "sent_at", "scheduled_time",
    "deliver_by", "attempts", "__getattribute__"))


cdef dict _checked_classes = {}  # by id, which an entry keeps


cdef int _check_class(object cls) except -1:
    # Once per class.
    cdef object key = <Py_ssize_t> <PyObject *> cls
    cdef object base, name
    if key in _checked_classes:
        return 0
    for base in type.__dict__["__mro__"].__get__(cls):
        if base is Envelope or base is Tombstone or base is ReceivedEnvelope:
            break
        for name in _FIELDS:
            if name in type.__dict__["__dict__"].__get__(base):
                raise TypeError(
                    f"{type.__dict__['__qualname__'].__get__(cls)} overrides Envelope.{name}, but what is sent is what "
                    "the constructor was given; give it there")
    if len(_checked_classes) >= 4096:
        _checked_classes.clear()
    _checked_classes[key] = cls
    return 0


cdef tuple _EMPTY = ()
cdef object _ZERO = 0


class _ConstructorSignature:
    """What `inspect.signature` and `help` show of a class whose constructor is C's."""

    def __init__(self, *positional, **keyword_only):
        parameter = inspect.Parameter
        cdef list parameters = []
        for name, default in positional:
            parameters.append(parameter(name, parameter.POSITIONAL_OR_KEYWORD, default=default))
        for name, default in keyword_only.items():
            parameters.append(parameter(name, parameter.KEYWORD_ONLY, default=default))
        self.signature = inspect.Signature(parameters)

    def __get__(self, instance, cls):
        # A subclass inherits it, but not if its constructor is its own.
        for base in cls.__mro__ if instance is None else ():
            names = base.__dict__
            if names.get("__signature__") is self:
                return self.signature
            if "__init__" in names or "__new__" in names:
                break
        raise AttributeError("__signature__")


@cython.freelist(1024)
cdef class Envelope:
    """One message and what travels with it. Immutable.

    Args:
        message: The body as an object, encoded by the producer's encoder; ``None`` is JSON's ``null``. For a null
            value see `Tombstone`.
        data: The body as a buffer that is already encoded. Give exactly one of ``message`` and ``data``.
            ``bytes`` are sent without a copy; any other buffer is copied when the batch is mapped.
        key: The record key. Text is sent as UTF-8.
        topic: Where it goes; wins over the topic of the batch.
        partition: The partition, or ``None`` to let the partitioner choose.
        timestamp: The record's time in milliseconds since 1970 (above 0); by default the time of the batch.
        headers: A mapping or a sequence of pairs; names ``str``, values ``str``, ``bytes`` or ``None``. Order and
            duplicates are kept. ``None`` is no headers. The names that the wire format writes are refused, but for
            ``ce_id`` with CloudEvents, which is then the event's id.
        id: By default a new UUID version 7.
        message_type: By default the message class's ``__message_type__``, else its qualified name; ``bytes`` with
            ``data``.
        content_type: By default what the producer's encoder writes. One of msgspec writes ``application/json`` or
            ``application/msgpack``; another one, and ``data``, have ``application/octet-stream``.
        source: By default the producer's.
        correlation_id, conversation_id, parent_id, tenant_id, user_name: Text that travels as headers;
            ``conversation_id`` may be a ``uuid.UUID``.
        sent_at, scheduled_time, deliver_by: Timezone-aware, kept in UTC. ``sent_at`` is by default the time of the
            batch. An
            envelope whose ``deliver_by`` has passed when it would be handed to librdkafka is not sent; its outcome is
            *expired*. Later it may be stored, up to ``delivery.timeout.ms`` late: its receiver looks again.
        attempts: How often it was tried before.

    A subclass may add attributes, and must not override one of these: what is sent is what the constructor was given.

    Raises:
        TypeError, ValueError: A wrong type, a naive time, a number out of range, both or neither of ``message`` and
            ``data``. Text (key, topic, headers, …) is checked when a batch is mapped: see `SerializationError`.
    """

    __signature__ = _ConstructorSignature(
        ("message", UNSET), data=None, key=None, topic=None, partition=None, timestamp=None, headers=(), id=None,
        message_type=None, content_type=None, source=None, correlation_id=None, conversation_id=None, parent_id=None,
        tenant_id=None, user_name=None, sent_at=None, scheduled_time=None, deliver_by=None, attempts=0)

    def __cinit__(self):
        # What holds even if a subclass does not call __init__.
        self._headers = _EMPTY
        self._partition = -1
        self._sent_at = self._scheduled_time = self._deliver_by = NO_TIME

    def __init__(self, message=UNSET, *, data=None, key=None, topic=None, partition=None, timestamp=None, headers=(),
                 id=None, message_type=None, content_type=None, source=None, correlation_id=None,
                 conversation_id=None, parent_id=None, tenant_id=None, user_name=None, sent_at=None,
                 scheduled_time=None, deliver_by=None, attempts=0):
        cdef int kind = BODY_MESSAGE
        self._check_new()
        if data is None:
            if message is UNSET:
                raise TypeError("an Envelope needs either message or data; for a null value use Tombstone(key)")
            if message is _NULL_VALUE:
                kind = BODY_NULL
            else:
                self._body = message
        else:
            if message is not UNSET:
                raise TypeError("an Envelope takes message or data, not both")
            if type(data) is not bytes and not PyObject_CheckBuffer(data):
                raise TypeError(f"data must be bytes or another buffer, not {type(data).__name__}")
            self._body = data
            kind = BODY_DATA
        self._set_common(key, topic, partition, timestamp, headers, id, sent_at)
        self._message_type = message_type
        self._content_type = content_type
        self._source = source
        self._correlation_id = correlation_id
        self._conversation_id = (
            str(conversation_id) if conversation_id is not None and isinstance(conversation_id, uuid.UUID)
            else conversation_id)
        self._parent_id = parent_id
        self._tenant_id = tenant_id
        self._user_name = user_name
        self._scheduled_time = time_us(scheduled_time, "scheduled_time")
        self._deliver_by = time_us(deliver_by, "deliver_by")
        if attempts is not _ZERO:
            self._attempts = <int32_t> _whole_number(attempts, "attempts", 0, INT32_MAX)
        self._kind = kind

    cdef int _check_new(self) except -1:
        # A batch in flight points into an envelope: it must never change.
        if self._kind != BODY_NONE:
            raise TypeError(f"{type(self).__name__} is immutable, and its __init__ has run before; use replace()")
        if type(self) is not Envelope and type(self) is not Tombstone:
            _check_class(type(self))
        self._kind = BODY_BUILDING
        return 0

    cdef int _set_common(self, object key, object topic, object partition, object timestamp, object headers, object id,
                         object sent_at) except -1:
        self._key = key
        self._topic = topic
        if partition is not None:
            self._partition = <int32_t> _whole_number(partition, "partition", 0, INT32_MAX)
        if timestamp is not None:
            self._timestamp = _whole_number(timestamp, "timestamp", 1, INT64_MAX)
        self._sent_at = time_us(sent_at, "sent_at")
        if headers is not _EMPTY:
            self._headers = _header_pairs(headers)
        if id is None:
            if make_uuid7(self._id) < 0:
                raise OSError("the system gave no random bytes for an id")
        else:
            # What passes for a UUID, as a mock does, need not have 16 bytes to copy.
            raw = id.bytes if isinstance(id, uuid.UUID) else None
            if type(raw) is not bytes or PyBytes_GET_SIZE(raw) != 16:
                raise TypeError(f"id must be a uuid.UUID, not {type(id).__name__}")
            memcpy(self._id, PyBytes_AS_STRING(raw), 16)
        return 0

    @classmethod
    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    @property
    def message(self):
        """The body as an object; ``msgspec.UNSET`` when the envelope has ``data`` or is a tombstone.

        ``None`` of an envelope that was read from a record with a null value is that null value.
        """
        return self._body if self._kind == BODY_MESSAGE or self._kind == BODY_NULL else UNSET

    @property
    def data(self):
        """The encoded body that was given, or ``None``."""
        return self._body if self._kind == BODY_DATA else None

    @property
    def key(self):
        """The record key as it was given, or ``None``."""
        return self._key

    @property
    def topic(self):
        """The topic, or ``None`` for that of the batch."""
        return self._topic

    @property
    def partition(self):
        """The partition, or ``None`` for the partitioner's choice."""
        return None if self._partition < 0 else self._partition

    @property
    def timestamp(self):
        """The record's time in milliseconds since 1970, or ``None`` for the time of the batch."""
        return self._timestamp or None

    @property
    def headers(self):
        """Pairs of name and value, in order."""
        return self._headers

    @property
    def id(self):
        """The id, a ``uuid.UUID``."""
        return uuid_object(self._id)

    @property
    def message_type(self):
        """The type that is sent: the one given, else the message class's; ``None`` for a tombstone."""
        if self._message_type is not None or self._kind == BODY_TOMBSTONE or self._kind == BODY_NULL:
            return self._message_type
        return "bytes" if self._kind == BODY_DATA else message_type_of(type(self._body))

    @property
    def content_type(self):
        """The type of the body that was given, or ``None`` for that of the encoder."""
        return self._content_type

    @property
    def source(self):
        """The source that was given, or ``None`` for the producer's."""
        return self._source

    @property
    def correlation_id(self):
        """The correlation id as text, or ``None``."""
        return self._correlation_id

    @property
    def conversation_id(self):
        """The conversation id as text, or ``None``."""
        return self._conversation_id

    @property
    def parent_id(self):
        """The id of the parent as text, or ``None``."""
        return self._parent_id

    @property
    def tenant_id(self):
        """The id of the tenant as text, or ``None``."""
        return self._tenant_id

    @property
    def user_name(self):
        """The name of the user, or ``None``."""
        return self._user_name

    @property
    def sent_at(self):
        """The time that is sent as its own, in UTC, or ``None`` for the time of the batch."""
        return time_object(self._sent_at)

    @property
    def scheduled_time(self):
        """The time before which it is not to be sent, in UTC, or ``None``."""
        return time_object(self._scheduled_time)

    @property
    def deliver_by(self):
        """The time after which it is not to be sent, in UTC, or ``None``."""
        return time_object(self._deliver_by)

    @property
    def attempts(self):
        """How often it was tried before."""
        return self._attempts

    cdef dict _arguments(self):
        # What the constructor takes to make an equal envelope; only what differs from its defaults.
        cdef dict arguments = {}
        if self._kind == BODY_MESSAGE:
            arguments["message"] = self._body
        elif self._kind == BODY_NULL:
            arguments["message"] = _NULL_VALUE
        elif self._kind == BODY_DATA:
            arguments["data"] = self._body
        for name, value, default in (
            ("key", self._key, None),
            ("topic", self._topic, None),
            ("partition", self.partition, None),
            ("timestamp", self.timestamp, None),
            ("headers", self._headers, ()),
            ("message_type", self._message_type, None),
            ("content_type", self._content_type, None),
            ("source", self._source, None),
            ("correlation_id", self._correlation_id, None),
            ("conversation_id", self._conversation_id, None),
            ("parent_id", self._parent_id, None),
            ("tenant_id", self._tenant_id, None),
            ("user_name", self._user_name, None),
            ("sent_at", self.sent_at, None),
            ("scheduled_time", self.scheduled_time, None),
            ("deliver_by", self.deliver_by, None),
            ("attempts", self._attempts, 0),
        ):
            if value is not default and value != default:
                arguments[name] = value
        arguments["id"] = self.id
        return arguments

    def replace(self, **changes):
        """A copy with these fields changed; giving ``message`` drops ``data``, and the other way round.

        The id stays; pass ``id=None`` for a new one. What `message` and `data` show may be given back and changes
        nothing: ``message=None`` leaves a null value one. A subclass's own attributes are copied, and its ``__init__``
        is not called.

        Raises:
            TypeError, ValueError: As the constructor.
        """
        cdef dict arguments = self._arguments()
        if self._kind != BODY_DATA and "data" in changes and changes["data"] is None:
            del changes["data"]
        if self.message is UNSET and changes.get("message") is UNSET:
            del changes["message"]
        if "message" in changes:
            if self._kind == BODY_NULL and changes["message"] is None:
                changes["message"] = _NULL_VALUE
            arguments.pop("data", None)
        elif changes.get("data") is not None:
            arguments.pop("message", None)
        arguments.update(changes)
        return _rebuild_envelope(type(self), arguments, getattr(self, "__dict__", None))

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return self._arguments() == (<Envelope> other)._arguments()

    def __hash__(self):
        fill(self)
        return hash(PyBytes_FromStringAndSize(<const char *> self._id, 16))

    def __repr__(self):
        cdef dict arguments = self._arguments()
        parts = [repr(arguments.pop("message"))] if "message" in arguments else []
        for name, value in arguments.items():
            parts.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __reduce__(self):
        cdef dict arguments = self._arguments()
        if isinstance(arguments.get("data"), memoryview):
            arguments["data"] = copied(arguments["data"])
        return _rebuild_envelope, (type(self), arguments, getattr(self, "__dict__", None))


cdef class Tombstone(Envelope):
    """An envelope with a null value: it deletes its key from a compacted topic.

    Args:
        key: The record key to delete.
        topic, partition, timestamp, headers, id, sent_at: As in `Envelope`. Only the wire format ``"kbatch"`` writes
            ``id`` and ``sent_at``.

    Raises:
        TypeError, ValueError: As in `Envelope`, or no key.
    """

    __signature__ = _ConstructorSignature(
        ("key", inspect.Parameter.empty), topic=None, partition=None, timestamp=None, headers=(), id=None, sent_at=None)

    def __init__(self, key, *, topic=None, partition=None, timestamp=None, headers=(), id=None, sent_at=None):
        if key is None:
            raise TypeError("a Tombstone needs a key: it deletes the records of that key")
        self._check_new()
        self._set_common(key, topic, partition, timestamp, headers, id, sent_at)
        self._kind = BODY_TOMBSTONE


# Of each text field the one that was made last: types and sources are few.
cdef list _last_texts = [""] * RECEIVED_TEXTS


cdef class ReceivedEnvelope(Envelope):
    """An envelope that a `Listener` or a consumer has read. Nobody else makes one.

    It is a copy of the record: nothing that librdkafka has fetched is kept for it. Its objects are made when they are
    asked for. `data` is the value of the record; `message` what the listener has decoded it to. Sent on, it is written
    with its data. `replace` gives an ordinary envelope.
    """

    __signature__ = _ConstructorSignature()

    def __init__(self, *_, **__):
        raise TypeError("a ReceivedEnvelope is what a listener hands out; make an Envelope")

    def __cinit__(self):
        self._decoded = UNSET
        self._offset = -1

    def __dealloc__(self):
        free_block(self._block)

    cdef object _text(self, int field):
        # Made anew, unless it is that of the last envelope that was asked.
        cdef const Text *text
        cdef object last
        if self._block == NULL or self._block.texts[field].chars == NULL:
            return None
        text = &self._block.texts[field]
        last = _last_texts[field]
        if kb_plain_length(<PyObject *> last) == text.length and memcmp(
                kb_plain_text(<PyObject *> last), text.chars, text.length) == 0:
            return last
        last = PyUnicode_DecodeUTF8(text.chars, text.length, NULL)
        _last_texts[field] = last
        return last

    cdef int _fill(self) except -1:
        # All that is made when it is asked for. The same objects whoever comes first.
        cdef object _
        self._make_id()
        for _ in (self.data, self.key, self.headers, self.message_type, self.content_type, self.source,
                  self.correlation_id, self.conversation_id, self.parent_id, self.tenant_id, self.user_name):
            pass
        self._kind = self._block.kind
        return 0

    cdef int _make_id(self) except -1:
        if self._block != NULL and self._block.makes_id:
            set_made_id(self, f"{self._topic}/{self._partition}/{self._offset}")
            self._block.makes_id = 0
        return 0

    def _take_id_of(self, str place not None) -> None:
        # Of a copy, if its record has no id: that of the record that it is a copy of, ``topic/partition/offset``.
        cdef char[16] own
        self._make_id()
        memcpy(own, self._id, 16)
        set_made_id(self, f"{self._topic}/{self._partition}/{self._offset}")
        if memcmp(own, self._id, 16) == 0:
            set_made_id(self, place)
        else:
            memcpy(self._id, own, 16)

    @property
    def message(self):
        """What the listener has decoded the data to; ``None`` without a value, ``msgspec.UNSET`` if it does not."""
        cdef int kind = self._block.kind if self._kind == BODY_UNREAD else self._kind
        return None if kind == BODY_TOMBSTONE or kind == BODY_NULL else self._decoded

    @property
    def data(self):
        """The value of the record, or ``None``."""
        if self._kind != BODY_UNREAD:
            return self._body if self._kind == BODY_DATA else None
        if self._body is None and self._block.value.chars != NULL:
            self._body = PyBytes_FromStringAndSize(self._block.value.chars, self._block.value.length)
        return self._body

    @property
    def key(self):
        """The key of the record, as bytes, or ``None``."""
        if self._key is None and self._block != NULL and self._block.key.chars != NULL:
            self._key = PyBytes_FromStringAndSize(self._block.key.chars, self._block.key.length)
        return self._key

    @property
    def headers(self):
        """Pairs of name and value, in order: those that are no fields of the envelope."""
        cdef tuple pairs
        if self._headers is _EMPTY and self._block != NULL and self._block.users:
            pairs = block_headers(self._block, False)
            if self._headers is _EMPTY:  # another thread may have come first
                self._headers = pairs
        return self._headers

    @property
    def id(self):
        """The id, a ``uuid.UUID``: the record's, or made of its topic, partition and offset."""
        self._make_id()
        return uuid_object(self._id)

    @property
    def message_type(self):
        """The type that the record names; ``bytes`` if it names none and has a value."""
        cdef int kind
        if self._message_type is None:
            self._message_type = self._text(KB_MESSAGE_TYPE)
            if self._message_type is None:
                kind = self._block.kind if self._kind == BODY_UNREAD else self._kind
                if kind == BODY_DATA:
                    return "bytes"
                return message_type_of(type(self._body)) if kind == BODY_MESSAGE else None
        return self._message_type

    @property
    def content_type(self):
        """The type of the data that the record names, or ``None``."""
        if self._content_type is None:
            self._content_type = self._text(KB_CONTENT_TYPE)
        return self._content_type

    @property
    def source(self):
        """The source that the record names, or ``None``."""
        if self._source is None:
            self._source = self._text(KB_SOURCE)
        return self._source

    @property
    def correlation_id(self):
        """The correlation id as text, or ``None``."""
        if self._correlation_id is None:
            self._correlation_id = self._text(KB_CORRELATION_ID)
        return self._correlation_id

    @property
    def conversation_id(self):
        """The conversation id as text, or ``None``."""
        if self._conversation_id is None:
            self._conversation_id = self._text(KB_CONVERSATION_ID)
        return self._conversation_id

    @property
    def parent_id(self):
        """The id of the parent as text, or ``None``."""
        if self._parent_id is None:
            self._parent_id = self._text(KB_PARENT_ID)
        return self._parent_id

    @property
    def tenant_id(self):
        """The id of the tenant as text, or ``None``."""
        if self._tenant_id is None:
            self._tenant_id = self._text(KB_TENANT_ID)
        return self._tenant_id

    @property
    def user_name(self):
        """The name of the user, or ``None``."""
        if self._user_name is None:
            self._user_name = self._text(KB_USER_NAME)
        return self._user_name

    @property
    def offset(self):
        """The record's offset in its partition."""
        return self._offset

    @property
    def raw_value(self):
        """The value of the record as it came: `data`, unless the record is a structured CloudEvent."""
        return self._given_value if self._block == NULL else self.data

    @property
    def raw_headers(self):
        """All headers of the record as they came, those of the wire format among them: pairs of name and value."""
        if self._block == NULL:
            return _EMPTY if self._given_headers is None else self._given_headers
        return block_headers(self._block, True)

    @property
    def error(self):
        """The `DeserializationError` that says why the record could not be read, or ``None``."""
        return self._error

    def decode(self, decoder) -> None:
        """Lets `message` show what `decoder` makes of the data."""
        decoded = decoder(self.data)
        # Only now it may be part of a cycle.
        if not PyObject_GC_IsTracked(self):
            PyObject_GC_Track(self)
        self._decoded = decoded

    @property
    def is_tombstone(self):
        """Whether it deletes its key from a compacted topic."""
        return (self._block.kind if self._kind == BODY_UNREAD else self._kind) == BODY_TOMBSTONE

    def replace(self, **changes):
        """An ordinary `Envelope`, or `Tombstone`, with these fields changed."""
        return self._plain().replace(**changes)

    cdef dict _arguments(self):
        fill(self)
        return Envelope._arguments(self)

    cdef Envelope _plain(self):
        cdef dict arguments = self._arguments()
        if self._kind != BODY_TOMBSTONE:
            return Envelope(**arguments)
        for name in set(arguments) - {"key", "topic", "partition", "timestamp", "headers", "id", "sent_at"}:
            del arguments[name]
        return Tombstone(**arguments)

    def __reduce__(self):
        return self._plain().__reduce__()


def _rebuild_envelope(cls, arguments, attributes):
    # Not by calling cls: a subclass's constructor may take something else.
    cdef object base = Tombstone if issubclass(cls, Tombstone) else Envelope
    cdef object envelope = base.__new__(cls)
    base.__init__(envelope, **arguments)
    if attributes:
        envelope.__dict__.update(attributes)
    return envelope


cdef dict _message_types = {}


cdef object message_type_of(object cls):
    # Cached per class; a class is asked for __message_type__ once.
    # By identity: a metaclass may make classes equal, or unhashable. The entry keeps the class, and so its id.
    cdef object key = <Py_ssize_t> <PyObject *> cls
    cdef object entry = _message_types.get(key)
    cdef object name = None if entry is None else (<tuple> entry)[1]
    if entry is None:
        name = getattr(cls, "__message_type__", None)
        if not isinstance(name, str):
            name = cls.__qualname__
        if len(_message_types) >= 4096:  # classes made at run time must not pile up here
            _message_types.clear()
        _message_types[key] = (cls, name)
    return name
