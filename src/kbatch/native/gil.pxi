# The GIL is shared: long work with it lets those have it in between who want it.

cdef int64_t GIL_OFFER = 6 * MS        # of long work with the GIL, if nobody is known to want it
cdef int64_t MOMENT = MS // 20
cdef int64_t MAP_SLICE = 2 * MS        # of phase 1 between two looks at who wants the GIL

cdef int32_t _wanting = 0  # atomic: threads of producers that want the GIL back, and may have to wait for it


cdef void pause(int64_t ns) noexcept nogil:
    cdef kb_mutex mu
    cdef kb_cond cond
    kb_mutex_init(&mu)
    kb_cond_init(&cond)
    kb_mutex_lock(&mu)
    kb_cond_wait_until(&cond, &mu, kb_now_ns() + ns)
    kb_mutex_unlock(&mu)
    kb_cond_destroy(&cond)
    kb_mutex_destroy(&mu)


cdef void offer_gil(int64_t *offered_ns) noexcept:
    # For long work, often. Who gives the GIL up and takes it back at once is first, and CPython's
    # threads only insist on it when nobody has given it up for 5 ms: so not more often, unless it is known as wanted.
    cdef int64_t now = kb_now_ns()
    if KB_LOAD32(&_wanting):
        with nogil:
            pause(MOMENT)
    elif now < offered_ns[0] + GIL_OFFER:
        return
    else:
        with nogil:
            pass
    offered_ns[0] = kb_now_ns()


cdef int share_gil(int64_t *offered_ns) except -1:
    # The same, and Ctrl-C is looked at.
    offer_gil(offered_ns)
    return PyErr_CheckSignals()


cdef void log_raised(str text, tuple arguments=()) noexcept:
    """Logs what was raised, with its traceback. What a handler or a filter of logs raises is dropped."""
    try:
        _logger.exception(text, *arguments)
    except BaseException:
        pass


cdef void nap() noexcept:
    # Until others may have given memory back.
    with nogil:
        pause(10 * MS)
