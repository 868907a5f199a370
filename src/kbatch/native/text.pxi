# Ids, times and numbers as the wire formats write and read them, and UUID version 7. No Python object is made here.

cdef int64_t NO_TIME = INT64_MIN
cdef int64_t _FIRST_TIME = -62135596800000000  # 0001-01-01T00:00:00Z
cdef int64_t _LAST_TIME = 253402300799999999   # 9999-12-31T23:59:59.999999Z

cdef char[512] _HEX_PAIRS


cdef void _fill_hex_pairs() noexcept nogil:
    cdef const char *digits = b"0123456789abcdef"
    cdef int i
    for i in range(256):
        _HEX_PAIRS[2 * i] = digits[i >> 4]
        _HEX_PAIRS[2 * i + 1] = digits[i & 15]


_fill_hex_pairs()


cdef inline void write_uuid(const unsigned char *id, char *out) noexcept nogil:
    cdef int i, o = 0
    for i in range(16):
        if i == 4 or i == 6 or i == 8 or i == 10:
            out[o] = c'-'
            o += 1
        memcpy(out + o, &_HEX_PAIRS[2 * <int> id[i]], 2)
        o += 2


cdef bint is_canonical_uuid(const char *text, Py_ssize_t length) noexcept nogil:
    # 8-4-4-4-12 lower-case hexadecimal digits that are not all zero.
    cdef int i
    cdef bint zero = True
    if length != UUID_TEXT:
        return False
    for i in range(UUID_TEXT):
        if i == 8 or i == 13 or i == 18 or i == 23:
            if text[i] != c'-':
                return False
        elif c'1' <= text[i] <= c'9' or c'a' <= text[i] <= c'f':
            zero = False
        elif text[i] != c'0':
            return False
    return not zero


cdef signed char[256] _hex_values  # -1 for what is no digit


cdef void _fill_hex_values() noexcept nogil:
    cdef int i
    for i in range(256):
        _hex_values[i] = -1
    for i in range(10):
        _hex_values[c'0' + i] = i
    for i in range(6):
        _hex_values[c'a' + i] = _hex_values[c'A' + i] = 10 + i

_fill_hex_values()


cdef bint parse_uuid(const char *text, Py_ssize_t length, unsigned char *out) noexcept nogil:
    # 8-4-4-4-12 hexadecimal digits, or 32 of them, in either case. `out` is written even if the text is no UUID.
    cdef const unsigned char *p = <const unsigned char *> text
    cdef int i, high, low, wrong = 0
    if length == UUID_TEXT:
        if p[8] != c'-' or p[13] != c'-' or p[18] != c'-' or p[23] != c'-':
            return False
    elif length != 32:
        return False
    for i in range(16):
        if length == UUID_TEXT and (i == 4 or i == 6 or i == 8 or i == 10):
            p += 1
        high, low = _hex_values[p[0]], _hex_values[p[1]]
        wrong |= high | low  # negative, if one of them is
        out[i] = <unsigned char> (<uint32_t> high << 4 | <uint32_t> low)
        p += 2
    return wrong >= 0


cdef inline void _write_digits(char *out, int64_t value, int width) noexcept nogil:
    cdef int i
    for i in range(width - 1, -1, -1):
        out[i] = <char> (c'0' + value % 10)
        value //= 10


cdef void write_time(int64_t us, bint wolverine, char *out) noexcept nogil:
    # Days to civil date: the era arithmetic of the proleptic Gregorian calendar, years 1 to 9999.
    cdef int64_t seconds = us // 1000000, micros = us % 1000000
    cdef int64_t days, z, era, doe, yoe, doy, mp, year, month, day
    if micros < 0:  # cdivision: C truncates towards zero
        micros += 1000000
        seconds -= 1
    days = seconds // 86400
    seconds = seconds % 86400
    if seconds < 0:
        seconds += 86400
        days -= 1
    z = days + 719468
    era = (z if z >= 0 else z - 146096) // 146097
    doe = z - era * 146097
    yoe = (doe - doe // 1460 + doe // 36524 - doe // 146096) // 365
    doy = doe - (365 * yoe + yoe // 4 - yoe // 100)
    mp = (5 * doy + 2) // 153
    day = doy - (153 * mp + 2) // 5 + 1
    month = mp + 3 if mp < 10 else mp - 9
    year = yoe + era * 400 + (1 if month <= 2 else 0)
    _write_digits(out, year, 4)
    out[4] = c'-'
    _write_digits(out + 5, month, 2)
    out[7] = c'-'
    _write_digits(out + 8, day, 2)
    out[10] = c' ' if wolverine else c'T'
    _write_digits(out + 11, seconds // 3600, 2)
    out[13] = c':'
    _write_digits(out + 14, seconds // 60 % 60, 2)
    out[16] = c':'
    _write_digits(out + 17, seconds % 60, 2)
    out[19] = c':' if wolverine else c'.'
    _write_digits(out + 20, micros, 6)
    if wolverine:
        out[26] = c' '
        out[27] = c'Z'
    else:
        out[26] = c'Z'


cdef inline int _read_digits(const char *text, int width) noexcept nogil:
    # -1 if they are not all digits.
    cdef int i, value = 0
    for i in range(width):
        if not c'0' <= text[i] <= c'9':
            return -1
        value = value * 10 + (text[i] - c'0')
    return value


cdef inline int64_t _days_before(int year, int month) noexcept nogil:
    # From 1970-01-01 to the first of a month: the era arithmetic of `write_time`, the other way round.
    cdef int y = year - 1 if month <= 2 else year
    cdef int era = y // 400
    cdef int yoe = y - era * 400
    cdef int doy = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5
    return <int64_t> era * 146097 + yoe * 365 + yoe // 4 - yoe // 100 + doy - 719468


cdef inline int _days_in(int year, int month) noexcept nogil:
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28
    return 30 if month == 4 or month == 6 or month == 9 or month == 11 else 31


cdef bint parse_time(const char *text, Py_ssize_t length, int64_t *us) noexcept nogil:
    # RFC 3339, rounded to microseconds; a space instead of the T and an offset without a colon, as ISO 8601 has it; and
    # the wolverine format's own. False if it is no time, or if in UTC its year is not from 1 to 9999.
    cdef const char *end = text + length
    cdef int year, month, day, hour, minute, second, digit, places, offset_hours, offset_minutes
    cdef int64_t time, micros = 0, offset = 0
    cdef bint rounded_up = False
    if length < 20 or text[4] != c'-' or text[7] != c'-' or text[13] != c':' or text[16] != c':':
        return False
    if text[10] != c'T' and text[10] != c't' and text[10] != c' ':
        return False
    year, month, day = _read_digits(text, 4), _read_digits(text + 5, 2), _read_digits(text + 8, 2)
    hour, minute, second = _read_digits(text + 11, 2), _read_digits(text + 14, 2), _read_digits(text + 17, 2)
    if year < 1 or not 1 <= month <= 12 or not 1 <= day <= _days_in(year, month):
        return False
    if not 0 <= hour <= 23 or not 0 <= minute <= 59 or not 0 <= second <= 59:
        return False
    if length == TIME_TEXT_WOLVERINE and text[10] == c' ' and text[19] == c':' and text[26] == c' ':
        micros = _read_digits(text + 20, 6)
        if micros < 0 or text[27] != c'Z':
            return False
        text = end
    else:
        text += 19
        if text[0] == c'.':
            text += 1
            places = 0
            while text < end and c'0' <= text[0] <= c'9':
                digit = text[0] - c'0'
                if places < 6:
                    micros = micros * 10 + digit
                elif places == 6:
                    rounded_up = digit >= 5
                places = min(places + 1, 7)
                text += 1
            if places == 0:
                return False
            while places < 6:
                micros *= 10
                places += 1
        if text == end:
            return False
        if text[0] == c'Z' or text[0] == c'z':
            text += 1
        elif (text[0] == c'+' or text[0] == c'-') and end - text >= 5:
            offset_hours = _read_digits(text + 1, 2)
            offset_minutes = _read_digits(end - 2, 2)
            if end - text != (6 if text[3] == c':' else 5):
                return False
            if not 0 <= offset_hours <= 23 or not 0 <= offset_minutes <= 59:
                return False
            offset = (offset_hours * 60 + offset_minutes) * <int64_t> 60000000
            if text[0] == c'-':
                offset = -offset
            text = end
        if text != end:
            return False
    time = _days_before(year, month) + day - 1
    time = ((time * 24 + hour) * 60 + minute) * 60 + second
    time = time * 1000000 + micros + rounded_up
    us[0] = time - offset
    return time <= _LAST_TIME and _FIRST_TIME <= us[0] <= _LAST_TIME


cdef inline bint parse_count(const char *text, Py_ssize_t length, int32_t *out) noexcept nogil:
    # A whole number from 0 to 2147483647, of 10 digits at most.
    cdef int64_t value = 0
    cdef Py_ssize_t i
    if not 1 <= length <= 10:
        return False
    for i in range(length):
        if not c'0' <= text[i] <= c'9':
            return False
        value = value * 10 + (text[i] - c'0')
    out[0] = <int32_t> value
    return value <= INT32_MAX


cdef inline int32_t decimal_length(int32_t value) noexcept nogil:
    cdef int32_t n = 1
    while value >= 10:
        value //= 10
        n += 1
    return n


cdef enum:
    ENTROPY_SIZE = 4096

# UUID version 7 (RFC 9562, section 5.7, method 3 of 6.2): 48 bits of Unix milliseconds, 12 bits of the
# millisecond's fraction, 62 random bits. Ids made by one process rise strictly. All of it is guarded by `_uuid_mu`.
cdef kb_mutex _uuid_mu
cdef unsigned char[ENTROPY_SIZE] _entropy
cdef int _entropy_left = 0
cdef int64_t _uuid_last = 0


cdef void _forget_entropy() noexcept nogil:
    # In a forked child the pool would repeat the parent's ids; the lock may have been held by a thread that is gone.
    global _entropy_left
    kb_mutex_init(&_uuid_mu)
    _entropy_left = 0


kb_mutex_init(&_uuid_mu)
kb_on_fork_child(_forget_entropy)


cdef int make_uuid7(unsigned char *out) noexcept nogil:
    # 0, or -1 if the system gave no random bytes.
    global _entropy_left, _uuid_last
    cdef int64_t ns = kb_wall_ns()
    cdef int64_t stamp = ((ns // 1000000) << 12) | (((ns % 1000000) << 12) // 1000000)
    kb_mutex_lock(&_uuid_mu)
    if stamp <= _uuid_last:
        stamp = _uuid_last + 1
    if _entropy_left < 8:
        if kb_random(_entropy, ENTROPY_SIZE) < 0:
            kb_mutex_unlock(&_uuid_mu)
            return -1
        _entropy_left = ENTROPY_SIZE
    _uuid_last = stamp
    _entropy_left -= 8
    memcpy(out + 8, _entropy + _entropy_left, 8)
    kb_mutex_unlock(&_uuid_mu)
    out[0] = <unsigned char> (stamp >> 52)
    out[1] = <unsigned char> (stamp >> 44)
    out[2] = <unsigned char> (stamp >> 36)
    out[3] = <unsigned char> (stamp >> 28)
    out[4] = <unsigned char> (stamp >> 20)
    out[5] = <unsigned char> (stamp >> 12)
    out[6] = <unsigned char> (0x70 | ((stamp >> 8) & 0x0F))
    out[7] = <unsigned char> stamp
    out[8] = (out[8] & 0x3F) | 0x80
    return 0


def uuid7() -> uuid.UUID:
    """A UUID version 7 as envelopes get it by default: time-ordered, strictly rising within one process."""
    cdef unsigned char[16] raw
    if make_uuid7(raw) < 0:
        raise OSError("the system gave no random bytes")
    return uuid_object(raw)


cdef extern from *:
    """
    #include <structmember.h>
    /* Where a class keeps what its __slots__ name; -1: not as it was. */
    static Py_ssize_t kb_slot_offset(PyObject *member) {
        PyMemberDef *found;
        if (!Py_IS_TYPE(member, &PyMemberDescr_Type))
            return -1;
        found = ((PyMemberDescrObject *)member)->d_member;
        return found->type == T_OBJECT_EX ? found->offset : -1;
    }
    /* Of an object that was just made. */
    static inline void kb_set_slot(PyObject *o, Py_ssize_t offset, PyObject *value) {
        Py_INCREF(value);
        *(PyObject **)((char *)o + offset) = value;
    }
    """
    Py_ssize_t kb_slot_offset(object member) noexcept
    void kb_set_slot(object o, Py_ssize_t offset, object value) noexcept
    object _PyLong_FromByteArray(const unsigned char *bytes, size_t n, int little_endian, int is_signed)


cdef object _UUID = uuid.UUID
cdef object _UNKNOWN = uuid.SafeUUID.unknown
cdef Py_ssize_t _uuid_int = -1      # where a UUID has its number; -1: not known
cdef Py_ssize_t _uuid_is_safe = -1


cdef object quick_uuid(const unsigned char *raw):
    # What UUID.__init__ does in 1 µs of Python.
    cdef object number = _PyLong_FromByteArray(raw, 16, 0, 0)
    cdef object made = (<type> _UUID).__new__(_UUID)
    kb_set_slot(made, _uuid_int, number)
    kb_set_slot(made, _uuid_is_safe, _UNKNOWN)
    return made


cdef int _learn_uuids() except -1:
    # Only if a UUID that is made so is one like any other.
    global _uuid_int, _uuid_is_safe
    cdef bytes raw = bytes(range(0xF0, 0x100))
    expected = uuid.UUID(bytes=raw)
    _uuid_int = kb_slot_offset(getattr(_UUID, "int", None))
    _uuid_is_safe = kb_slot_offset(getattr(_UUID, "is_safe", None))
    if _uuid_int > 0 and _uuid_is_safe > 0:
        made = quick_uuid(<const unsigned char *> PyBytes_AS_STRING(raw))
        if made == expected and str(made) == str(expected) and made.is_safe is expected.is_safe:
            return 0
    _uuid_int = -1
    return 0

_learn_uuids()


cdef object uuid_object(const unsigned char *raw):
    if _uuid_int > 0 and uuid.UUID is _UUID:
        return quick_uuid(raw)
    return uuid.UUID(bytes=PyBytes_FromStringAndSize(<const char *> raw, 16))


cdef bint is_ascii(const char *text, Py_ssize_t length) noexcept nogil:
    cdef uint64_t word, all = 0
    cdef Py_ssize_t i = 0
    while length - i >= 8:
        memcpy(&word, text + i, 8)
        all |= word
        i += 8
    if all & <uint64_t> 0x8080808080808080:
        return False
    while i < length:
        if text[i] & 0x80:
            return False
        i += 1
    return True


# C's own classes and their methods: a test's clock may have replaced `datetime.datetime`, and the arithmetic of a
# subclass (pendulum, pandas) may give anything.
import_datetime()
cdef object _DATETIME = <object> PyDateTimeAPI.DateTimeType
cdef object _MICROSECOND = (<object> PyDateTimeAPI.DeltaType)(microseconds=1)
cdef object _EPOCH = _DATETIME(1970, 1, 1, tzinfo=datetime.timezone.utc)
cdef object _difference = _DATETIME.__sub__
cdef object _utc_offset = _DATETIME.utcoffset


cdef int64_t time_us(object value, str field) except? -2:
    # Microseconds since 1970 of an aware datetime; NO_TIME for None.
    cdef int64_t us
    if value is None:
        return NO_TIME
    if not PyDateTime_Check(value):
        raise TypeError(f"{field} must be a timezone-aware datetime or None, not {type(value).__name__}")
    if _utc_offset(value) is None:
        raise ValueError(f"{field} must be timezone-aware; {value!r} is naive")
    us = _difference(value, _EPOCH) // _MICROSECOND
    if us < _FIRST_TIME or us > _LAST_TIME:
        raise ValueError(f"{field} is in UTC not in the years 1 to 9999: {value!r}")
    return us


cdef object time_object(int64_t us):
    return None if us == NO_TIME else _EPOCH + us * _MICROSECOND
