# Who was called by whom: what runs, and the calls of foreign code that it comes from. The GIL guards it.

cdef object _calls = contextvars.ContextVar("kbatch_calls", default=())
# To be copied. CPython 3.11 crashes when it makes a new one and finds no memory for its contents.
cdef object _no_context = contextvars.Context()


@cython.final
cdef class Call:
    """A call of foreign code. A context is copied into the tasks that it makes, by `asyncio.to_thread` into threads,
    so what would wait for its end sees that it comes from it."""

    def __init__(self, caller=None):
        self.caller = caller

    cdef tuple _chain(self):
        # This call and those that it comes from. What is over is left out: calls that make calls have no end.
        cdef Call each
        cdef list chain = [self]
        for each in <tuple> _calls.get():
            if not each.over and each is not self:
                chain.append(each)
        return tuple(chain)

    cdef void _end(self) noexcept:
        self.over, self.caller = True, None

    def __enter__(self) -> Call:
        """The rest of this task or thread comes from this call."""
        _calls.set(self._chain())
        return self

    def __exit__(self, *_) -> None:
        self._end()


def comes_from(what not None) -> bool:
    """Whether the caller comes from `what`, a `Call` that is not over, or from such a call by `what`."""
    cdef Call each
    for each in <tuple> _calls.get():
        if not each.over and (each is what or each.caller is what):
            return True
    return False
