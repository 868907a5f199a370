# Clocks and deadlines.

# What decides when something is sent, given up or waited for asks these, and not `time`: a test that freezes its clock
# (freezegun, time-machine) must not stop the threads of kbatch.

def monotonic() -> float:
    """Seconds of the machine's monotonic clock, that of every deadline in kbatch."""
    return kb_now_ns() / 1e9


def wall_time() -> float:
    """Seconds since 1970 by the machine's clock, with which `deliver_by` and `scheduled_time` are compared."""
    return kb_wall_ns() / 1e9


cdef int64_t MS = 1000000  # in the unit of these clocks


cdef int64_t deadline_after(object timeout) except? -2:
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    seconds = timeout
    if not seconds < 9e9:
        return INT64_MAX
    return kb_now_ns() + <int64_t> (max(seconds, 0.0) * 1e9)
