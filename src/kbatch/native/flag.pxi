# How one thread tells another that something has happened. A mutex guards it, not the GIL.

cdef class Flag:
    """What one thread waits for and others set. Setting runs no Python code: signal handlers and finalizers may."""

    def __cinit__(self):
        kb_mutex_init(&self.mu)
        kb_cond_init(&self.cond)

    def __dealloc__(self):
        kb_cond_destroy(&self.cond)
        kb_mutex_destroy(&self.mu)

    def keep(self, what) -> None:
        """Keeps something alive until another takes its place."""
        self.keeper = what

    def set(self, _=None) -> None:  # may be a weak reference's callback
        kb_mutex_lock(&self.mu)
        self.raised = True
        kb_cond_signal(&self.cond)
        kb_mutex_unlock(&self.mu)

    def wait(self, timeout=None, *, bint interruptible=True) -> bool:
        """Blocks without the GIL until it is set, and takes it back; False after `timeout` seconds.

        If `interruptible`, Ctrl-C works.
        """
        return self._wait(deadline_after(timeout), WAIT_SLICE if interruptible else INT64_MAX // 2)

    cdef bint _wait(self, int64_t deadline, int64_t slice_ns) except -1:
        cdef bint raised = False, over = False
        while not over:
            with nogil:
                kb_mutex_lock(&self.mu)
                if not self.raised:
                    kb_cond_wait_until(&self.cond, &self.mu, min(deadline, kb_now_ns() + slice_ns))
                raised = self.raised
                self.raised = False
                kb_mutex_unlock(&self.mu)
                over = raised or kb_now_ns() >= deadline
            if not over:
                PyErr_CheckSignals()
        return raised
