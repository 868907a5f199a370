# Each wire format's own headers, once: phase 1 writes them by these tables, and `read_envelope` reads by the same.
# DESIGN.md, "Wire formats", says what they mean.

cdef extern from *:
    """
    enum { WIRE_KBATCH, WIRE_WOLVERINE, WIRE_CLOUDEVENTS, WIRE_RAW, WIRE_CUSTOM };

    /* Which field of an envelope a header is. Those up to KB_LAST_TEXT are text. */
    enum {
        KB_MESSAGE_TYPE, KB_CONTENT_TYPE, KB_SOURCE, KB_CORRELATION_ID, KB_CONVERSATION_ID, KB_PARENT_ID, KB_TENANT_ID,
        KB_USER_NAME, KB_LAST_TEXT = KB_USER_NAME,
        KB_ID, KB_SENT_AT, KB_SCHEDULED_TIME, KB_DELIVER_BY, KB_ATTEMPTS,
        KB_VERSION,   /* none: the format's own, "1.0" */
        KB_RESERVED   /* none: users may not write it, and reading leaves it to them */
    };

    enum {
        KB_OF_TOMBSTONE = 1,  /* a tombstone has it, too */
        KB_ALWAYS = 2,        /* written even if it is 0 */
        KB_NOT_ZERO = 4,      /* left out if all its bytes are 0 */
        KB_GUID = 8,          /* text, written as .NET writes a GUID */
        KB_REQUIRED = 16,
        KB_NOT_EMPTY = 32,    /* written empty it is an error, read empty it is none */
        KB_EVENT_ID = 64,     /* any text when it is read; left out if the envelope has its own */
        KB_ALIAS = 128        /* another name of the header before it; read only */
    };

    typedef struct {
        const char *name;
        int name_len;
        int field;
        int rules;
    } kb_own_header;

    #define KB_OWN(name, field, rules) {name, sizeof(name) - 1, field, rules}

    /* In the order in which they are written. */
    static const kb_own_header kb_kbatch_headers[] = {
        KB_OWN("id", KB_ID, KB_OF_TOMBSTONE),
        KB_OWN("message-type", KB_MESSAGE_TYPE, 0),
        KB_OWN("content-type", KB_CONTENT_TYPE, 0),
        KB_OWN("sent-at", KB_SENT_AT, KB_OF_TOMBSTONE),
        KB_OWN("correlation-id", KB_CORRELATION_ID, 0),
        KB_OWN("conversation-id", KB_CONVERSATION_ID, 0),
        KB_OWN("parent-id", KB_PARENT_ID, 0),
        KB_OWN("source", KB_SOURCE, 0),
        KB_OWN("tenant-id", KB_TENANT_ID, 0),
        KB_OWN("user-name", KB_USER_NAME, 0),
        KB_OWN("time-to-send", KB_SCHEDULED_TIME, 0),
        KB_OWN("deliver-by", KB_DELIVER_BY, 0),
        KB_OWN("attempts", KB_ATTEMPTS, 0),
    };
    static const kb_own_header kb_wolverine_headers[] = {
        KB_OWN("correlation-id", KB_CORRELATION_ID, 0),
        KB_OWN("id", KB_ID, KB_NOT_ZERO),
        KB_OWN("conversation-id", KB_CONVERSATION_ID, KB_GUID),
        KB_OWN("parent-id", KB_PARENT_ID, 0),
        KB_OWN("content-type", KB_CONTENT_TYPE, 0),
        KB_OWN("source", KB_SOURCE, 0),
        KB_OWN("time-to-send", KB_SCHEDULED_TIME, 0),
        KB_OWN("sent-at", KB_SENT_AT, 0),
        KB_OWN("message-type", KB_MESSAGE_TYPE, 0),
        KB_OWN("tenant-id", KB_TENANT_ID, 0),
        KB_OWN("user-name", KB_USER_NAME, 0),
        KB_OWN("deliver-by", KB_DELIVER_BY, 0),
        KB_OWN("attempts", KB_ATTEMPTS, KB_ALWAYS),
        KB_OWN("wolverine-protocol-version", KB_VERSION, 0),
    };
    /* ce_data and ce_datacontenttype have another place in Kafka: the value, and content-type. */
    static const kb_own_header kb_cloudevents_headers[] = {
        KB_OWN("ce_specversion", KB_VERSION, KB_REQUIRED),
        KB_OWN("ce_id", KB_ID, KB_REQUIRED | KB_EVENT_ID),
        KB_OWN("ce_source", KB_SOURCE, KB_REQUIRED | KB_NOT_EMPTY),
        KB_OWN("ce_type", KB_MESSAGE_TYPE, KB_REQUIRED | KB_NOT_EMPTY),
        KB_OWN("ce_time", KB_SENT_AT, 0),
        KB_OWN("content-type", KB_CONTENT_TYPE, KB_NOT_EMPTY),
        KB_OWN("ce_datacontenttype", KB_CONTENT_TYPE, KB_ALIAS | KB_NOT_EMPTY),
        KB_OWN("ce_correlationid", KB_CORRELATION_ID, KB_NOT_EMPTY),
        KB_OWN("ce_conversationid", KB_CONVERSATION_ID, 0),
        KB_OWN("ce_parentid", KB_PARENT_ID, 0),
        KB_OWN("ce_tenantid", KB_TENANT_ID, 0),
        KB_OWN("ce_username", KB_USER_NAME, 0),
        KB_OWN("ce_scheduledtime", KB_SCHEDULED_TIME, 0),
        KB_OWN("ce_expirytime", KB_DELIVER_BY, 0),
        KB_OWN("ce_attempts", KB_ATTEMPTS, 0),
        KB_OWN("ce_data", KB_RESERVED, 0),
    };

    /* A text of an envelope, borrowed: the first fields are there in this order (`Envelope` in `_fastmap.pxd`). */
    #define kb_text_field(envelope, field) (((PyObject **) &(envelope)->_message_type)[field])

    #define KB_COUNT(array) (int) (sizeof(array) / sizeof(array[0]))

    static inline const kb_own_header *kb_own_headers(int wire, int *count)
    {
        switch (wire) {
        case WIRE_KBATCH: *count = KB_COUNT(kb_kbatch_headers); return kb_kbatch_headers;
        case WIRE_WOLVERINE: *count = KB_COUNT(kb_wolverine_headers); return kb_wolverine_headers;
        case WIRE_CLOUDEVENTS: *count = KB_COUNT(kb_cloudevents_headers); return kb_cloudevents_headers;
        default: *count = 0; return NULL;
        }
    }
    """
    enum:
        WIRE_KBATCH
        WIRE_WOLVERINE
        WIRE_CLOUDEVENTS
        WIRE_RAW
        WIRE_CUSTOM
        KB_MESSAGE_TYPE
        KB_CONTENT_TYPE
        KB_SOURCE
        KB_CORRELATION_ID
        KB_CONVERSATION_ID
        KB_PARENT_ID
        KB_TENANT_ID
        KB_USER_NAME
        KB_LAST_TEXT
        KB_ID
        KB_SENT_AT
        KB_SCHEDULED_TIME
        KB_DELIVER_BY
        KB_ATTEMPTS
        KB_VERSION
        KB_RESERVED
        KB_OF_TOMBSTONE
        KB_ALWAYS
        KB_NOT_ZERO
        KB_GUID
        KB_REQUIRED
        KB_NOT_EMPTY
        KB_EVENT_ID
        KB_ALIAS
    ctypedef struct OwnHeader "kb_own_header":
        const char *name
        int name_len
        int field
        int rules
    PyObject *text_field "kb_text_field"(Envelope envelope, int field) noexcept
    const OwnHeader *own_headers "kb_own_headers"(int wire, int *count) noexcept nogil


# The arguments of Envelope that the first fields are, for errors.
cdef tuple TEXT_FIELDS = (
    "message_type", "content_type", "source", "correlation_id", "conversation_id", "parent_id", "tenant_id",
    "user_name")
cdef dict WIRES = {"kbatch": WIRE_KBATCH, "wolverine": WIRE_WOLVERINE, "cloudevents": WIRE_CLOUDEVENTS, "raw": WIRE_RAW}
WIRE_NAMES = tuple(WIRES)


cdef int wire_number(str name, str others) except -1:
    # Of the format that has this name. `others`: what is possible besides names, for the error.
    number = WIRES.get(name)
    if number is None:
        raise ConfigError(f"wire must be one of {', '.join(WIRE_NAMES)}{others}, not {name!r}")
    return number


cdef frozenset reserved_headers(int wire):
    # What users may not write. Not an event's id: an envelope that was read and whose id is no UUID has one of its own.
    cdef int count, i
    cdef const OwnHeader *own = own_headers(wire, &count)
    cdef set names = set()
    for i in range(count):
        if not own[i].rules & KB_EVENT_ID:
            names.add(own[i].name[:own[i].name_len].decode())
    return frozenset(names)
