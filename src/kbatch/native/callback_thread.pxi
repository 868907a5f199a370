# From kbatch's threads to user code. What tells an answer allocates nothing: a `Job`, or a `LoopWaker`
# (`wakeup.pxi`), is made when the answer is asked for. The GIL guards all of it.

@cython.final
@cython.trashcan(True)
cdef class Job:
    """A call to be made on a thread for callbacks, once, in a context of its own."""

    @staticmethod
    cdef Job make(object caller, object function, tuple arguments):
        cdef Job job = Job.__new__(Job)
        job.call = Call(caller)
        job.run = _no_context.copy().run
        job.run(_calls.set, (job.call,))
        job.arguments = (function, *arguments)
        return job

    cdef void _run(self) noexcept:
        try:
            refuse_coroutine(self.run(*self.arguments))
        except BaseException:
            try:
                log_raised("a callback failed: %s", (callback_name(self.arguments[0]),))
            except BaseException:  # no memory for the name
                pass
        self.call._end()


@cython.final
cdef class Jobs:
    """Those that wait for their turn, in order."""

    cdef void append(self, Job job) noexcept:
        if self.last is None:
            self.first = job
        else:
            self.last.next = job
        self.last = job

    cdef Job pop(self):
        # The first; None: there is none.
        cdef Job job = self.first
        if job is not None:
            self.first, job.next = job.next, None
            if self.first is None:
                self.last = None
        return job


@cython.final
cdef class CallbackThread:
    """Runs what it is given, in order, one at a time, on a thread that starts when there is something to run.

    Attributes:
        waiting: How many calls have not begun.
    """

    def __cinit__(self, str name):
        self.name = name
        self.jobs = Jobs.__new__(Jobs)
        self.changed, self.begun = Flag(), Flag()
        self.lock = threading.RLock()

    def put(self, function, *arguments) -> None:
        """Runs ``function(*arguments)`` soon; an exception from it is logged. If this raises, nothing will run."""
        cdef Job job = Job.make(self, function, arguments)
        cdef bint has_thread
        self.promised += 1
        try:
            has_thread = self._start()
        except BaseException:
            self.promised -= 1
            self.changed.set()
            raise
        self.promised -= 1
        self._append(job)
        if not has_thread:
            self._work(None)

    def put_surely(self, function, *arguments) -> None:
        """As `put`, for what must be told: without memory it tries again until there is some."""
        while True:
            try:
                self.put(function, *arguments)
                return
            except MemoryError:
                nap()

    cdef void _append(self, Job job) noexcept:
        self.jobs.append(job)
        self.waiting += 1
        self.changed.set()

    cdef void _append_surely(self, Job job) noexcept:
        # For what was reserved. If the thread has ended since, another starts.
        self._append(job)
        while True:
            try:
                if not self._start():
                    self._work(None)
                return
            except MemoryError:
                nap()
            except BaseException:
                log_raised("no thread for callbacks")
                return

    cdef bint _start(self) except -1:
        # Whether there is a thread for the jobs.
        cdef int64_t deadline
        if self.token is not None and self.has_begun:
            return True
        with self.lock:
            if self.token is not None and self.has_begun:
                return True
            token = object()
            thread = threading.Thread(target=self._run, args=(token,), name=self.name, daemon=True)
            if self.token is not None and self.has_begun:  # one that was being started here has begun meanwhile
                return True
            self.token, self.thread, self.has_begun = token, thread, False
            try:
                thread.start()
            except RuntimeError:  # no thread to be had, or (3.12 on) the interpreter is ending
                return False
            deadline = kb_now_ns() + MOST_TO_BEGIN
            while self.token is token and not self.has_begun:  # threading's own code before it may lack memory
                is_late = not thread.is_alive() or kb_now_ns() > deadline
                if is_late and not self.has_begun:  # looked at last: it may begin, and end, in between
                    raise MemoryError("the thread for callbacks could not begin")
                self.begun._wait(kb_now_ns() + 10 * MS, WAIT_SLICE)
        return True

    def stop(self) -> None:
        """Ends the thread once all that was put has run; a later `put` starts another, which ends in the same way."""
        self.stopping = True
        self.changed.set()

    def join(self, timeout) -> None:
        """As `stop`, and waits for the end, unless the caller comes from what it runs."""
        self.stop()
        thread = self.thread
        if thread is not None and thread.ident is not None and not comes_from(self):
            thread.join(timeout)

    def _run(self, token) -> None:
        if token is not None and self.token is token:
            self.has_begun = True
            self.begun.set()
            self._work(token)

    cdef int _work(self, object token) except -1:
        # Runs jobs as long as the thread of `token` is the one to do so; without one, those that are there.
        cdef Job job
        while self.token is token or token is None:
            job = self.jobs.pop()
            if job is not None:
                self.waiting -= 1
                job._run()
                job = None
            elif token is None:
                return 0
            elif self.stopping and not self.promised:
                self.token = None
                return 0
            else:
                self.changed._wait(INT64_MAX, INT64_MAX // 2)
        return 0


cdef int64_t MOST_TO_BEGIN = 30000 * MS
