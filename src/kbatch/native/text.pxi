# Ids and times as the wire formats write them, and UUID version 7. No Python object is made here.

cdef int64_t NO_TIME = INT64_MIN

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


cdef object uuid_object(const unsigned char *raw):
    return uuid.UUID(bytes=PyBytes_FromStringAndSize(<const char *> raw, 16))


# C's own classes and their methods: a test's clock may have replaced `datetime.datetime`, and the arithmetic of a
# subclass (pendulum, pandas) may give anything.
import_datetime()
cdef object _DATETIME = <object> PyDateTimeAPI.DateTimeType
cdef object _MICROSECOND = (<object> PyDateTimeAPI.DeltaType)(microseconds=1)
cdef object _EPOCH = _DATETIME(1970, 1, 1, tzinfo=datetime.timezone.utc)
cdef object _difference = _DATETIME.__sub__
cdef object _utc_offset = _DATETIME.utcoffset
cdef int64_t _FIRST_TIME = -62135596800000000  # 0001-01-01T00:00:00Z
cdef int64_t _LAST_TIME = 253402300799999999   # 9999-12-31T23:59:59.999999Z


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
