# Which process this is: what was made before a fork sees it by the process id.

cdef int _this_pid = kb_pid()  # at hand without a system call


cdef void _in_forked_child() noexcept nogil:
    global _this_pid, _pinned, _wanting
    _this_pid = kb_pid()
    _wanting = 0
    _pinned = 0  # those batches are the parent's, and never given back here


kb_on_fork_child(_in_forked_child)
