# The calls of many senders, on few threads. The GIL guards all of it.

@cython.final
cdef class CallQueue:
    """The calls of one sender: made by `SharedThreads`, in order, one at a time."""

    cdef object __weakref__
    cdef SharedThreads threads
    cdef Jobs jobs
    cdef CallQueue next      # of those that are ready
    cdef bint busy           # it is ready, or a call of it is being made
    cdef bint counted        # it keeps a thread
    cdef bint stopped
    cdef int64_t generation
    cdef Flag idle           # set when it is not busy any more

    def __cinit__(self, SharedThreads threads not None):
        self.threads, self.jobs, self.idle = threads, Jobs.__new__(Jobs), Flag()
        self.generation = threads.generation

    def __del__(self):
        self._uncount()

    def put(self, function, *arguments) -> None:
        """Calls ``function(*arguments)`` soon; an exception from it is logged. If this raises, nothing is called."""
        cdef Job job = Job.make(self, function, arguments)
        cdef SharedThreads threads = self.threads
        cdef bint has_thread = False
        self._begin_anew()
        while True:
            if not (self.counted or self.stopped):
                self.counted = True
                threads.counted += 1
            threads.promised += 1
            try:
                has_thread = threads._has_thread_for(self)
            except BaseException:
                if not self._begin_anew():
                    threads.promised -= 1
                    threads._wake()
                raise
            if not self._begin_anew():
                break
        threads.promised -= 1
        self.jobs.append(job)
        if not self.busy:
            self.busy = True
            threads.busy += 1
            threads._append(self)
        if not has_thread:
            threads._call_all()

    cdef bint _begin_anew(self) except -1:
        # In a forked child; whether it was. A signal handler may fork at any moment, but in C.
        if self.generation == self.threads.generation:
            return False
        self.jobs = Jobs.__new__(Jobs)  # what it had is called in the parent
        self.generation, self.busy, self.counted = self.threads.generation, False, False
        return True

    def put_surely(self, function, *arguments) -> None:
        """As `put`, for what must be told: without memory it tries again until there is some."""
        while True:
            try:
                self.put(function, *arguments)
                return
            except MemoryError:
                nap()

    def stop(self) -> None:
        """Keeps no thread any more once all that was put was called; nor does a later `put`."""
        self.stopped = True
        self._uncount()

    def join(self, timeout) -> None:
        """As `stop`, and waits for the end of the calls, unless the caller comes from one."""
        cdef int64_t deadline = deadline_after(timeout)
        self.stop()
        if comes_from(self):
            return
        while self.busy and self.generation == self.threads.generation and kb_now_ns() < deadline:
            self.idle._wait(deadline, WAIT_SLICE)
        self.idle.set()  # for others that wait
        self.threads._await_end(deadline)

    cdef void _uncount(self) noexcept:
        if self.counted and self.generation == self.threads.generation:
            self.threads.counted -= 1
            self.threads._wake()
        self.counted = False


@cython.final
cdef class SharedThreads:
    """Threads that make the calls of any number of queues: one, as long as no call takes longer than `slow_s`.

    The active thread makes the calls, of one queue after another. When others wait during a call, a second thread
    stands by, and becomes the active one when that call has taken `slow_s`. The thread whose place was taken ends
    after its call, or stands by. So a call that does not end delays those of other queues once, by `slow_s`. There are
    two threads more than calls that are slow, at most. All end when no queue needs them.
    """

    cdef str name
    cdef int64_t slow_ns
    cdef object lock             # of a start; re-entrant, as that of `CallbackThread`
    cdef CallbackThread active
    cdef CallbackThread standby
    cdef list threads            # all that may be alive
    cdef CallQueue first         # of the queues that are ready
    cdef CallQueue last
    cdef CallQueue current       # whose call the active thread makes
    cdef int64_t began_ns        # when it began; 0: it makes none
    cdef int64_t counted         # queues that keep a thread
    cdef int64_t busy            # queues
    cdef int64_t promised        # calls that come for certain, or that will say that they do not
    cdef int64_t generation      # how many forks lie behind

    def __cinit__(self, str name not None, double slow_s):
        self.name, self.slow_ns = name, <int64_t> (slow_s * 1e9)
        self.lock = threading.RLock()
        self.threads = []

    def forget(self) -> None:
        """To be called in a forked child, where none of the threads is."""
        self.generation += 1
        self.active = self.standby = None
        while self._pop() is not None:
            pass
        self.current = None
        self.began_ns = self.counted = self.busy = self.promised = 0
        self.lock, self.threads = threading.RLock(), []

    # -- for queues

    cdef bint _has_thread_for(self, CallQueue queue) except -1:
        # Whether there is a thread for a call of the queue. If not, there is none to be had. It looks again after each
        # start: the thread may have taken a call of another queue meanwhile.
        cdef int64_t generation = self.generation
        while self.generation == generation:
            if not self._has_active():
                if not self._ensure(True):
                    return False
            elif not self.began_ns or self.current is queue or self._has_standby():
                return True
            elif not self._ensure(False):
                return False
        return True  # in a forked child, where `put` begins anew

    cdef bint _ensure(self, bint active) except -1:
        # Whether there is the active thread, or the one that stands by. If not, there is no thread to be had.
        if self._has(active):
            return True
        with self.lock:
            return self._has(active) or self._begin(active)

    cdef bint _has(self, bint active) noexcept:
        return self._has_active() if active else self._has_standby()

    cdef bint _has_active(self) noexcept:
        return self.active is not None and self.active.has_begun

    cdef bint _has_standby(self) noexcept:
        return self.standby is not None and self.standby.has_begun

    cdef bint _begin(self, bint active) except -1:
        cdef CallbackThread thread = CallbackThread(self.name)
        cdef Job job = Job.make(thread, self._run, (thread,))
        cdef bint has_thread
        cdef CallbackThread each
        for each in list(self.threads):
            if not each.thread.is_alive() and each in self.threads:  # a start in between may have taken it out
                self.threads.remove(each)
        thread.stopping = True  # once that has run
        thread.jobs.append(job)
        if self._has(active):
            return True  # a signal handler has begun one in between
        if active:
            self.active, self.current, self.began_ns = thread, None, 0
        else:
            self.standby = thread
        try:
            has_thread = thread._start()
            if has_thread:
                self.threads.append(thread)
        except BaseException:
            self._leave(thread)
            raise
        if not has_thread:
            self._leave(thread)
        return has_thread

    cdef void _append(self, CallQueue queue) noexcept:
        if self.last is None:
            self.first = queue
        else:
            self.last.next = queue
        self.last = queue
        self._wake()

    cdef CallQueue _pop(self):
        cdef CallQueue queue = self.first
        if queue is not None:
            self.first, queue.next = queue.next, None
            if self.first is None:
                self.last = None
        return queue

    cdef void _wake(self) noexcept:
        if self.active is not None:
            self.active.changed.set()
        if self.standby is not None:
            self.standby.changed.set()

    cdef int _await_end(self, int64_t deadline) except -1:
        cdef CallbackThread thread
        cdef int64_t now
        for thread in list(self.threads):
            if thread.thread is threading.current_thread():
                continue
            # Another queue may begin to need them.
            while not (self.counted or self.busy) and thread.thread.is_alive() and (now := kb_now_ns()) < deadline:
                thread.thread.join(min(deadline - now, 50 * MS) / 1e9)
        return 0

    # -- the threads

    def _run(self, CallbackThread thread not None) -> None:
        cdef int64_t generation = self.generation
        cdef bint goes_on = True
        while goes_on and self.generation == generation:
            goes_on = self._work(thread) if self.active is thread else self._stand_by(thread)
        self._leave(thread)

    cdef void _leave(self, CallbackThread thread) noexcept:
        if self.active is thread:
            self.active = None
        if self.standby is thread:
            self.standby = None
        thread.changed.set()  # a thread whose start was interrupted may have begun

    cdef bint _work(self, CallbackThread thread) noexcept:
        # Makes one call, or waits for one. Whether there may be more.
        cdef CallQueue queue = self._pop()
        if queue is None:
            if not (self.counted or self.promised):
                return False
            thread.changed._wait(INT64_MAX, INT64_MAX // 2)
            return True
        self.current, self.began_ns = queue, kb_now_ns()
        while self.first is not None and self.active is thread:  # they must not wait for the end of this call
            try:
                self._ensure(False)
                break
            except MemoryError:
                nap()
            except BaseException:  # the calls come first
                break
        self._call(queue)
        if self.active is thread:
            self.current, self.began_ns = None, 0
        return True

    cdef bint _stand_by(self, CallbackThread thread) noexcept:
        # Waits until the active thread is slow, and takes its place then. Whether it is still needed.
        cdef int64_t now = kb_now_ns()
        cdef int64_t deadline = now + IDLE
        if self.standby is not thread:
            if self.standby is not None:
                return False
            self.standby = thread
        if self.first is None:
            if not self.counted:
                return False
            # A queue may have become ready between the end of the wait and the GIL, or be about to.
            return thread.changed._wait(deadline, INT64_MAX // 2) or self.first is not None or self.promised > 0
        deadline = (self.began_ns or now) + self.slow_ns
        if self.active is None or (self.began_ns and now >= deadline):
            self.standby, self.active = None, thread
            self.current, self.began_ns = None, 0
        else:
            thread.changed._wait(deadline, INT64_MAX // 2)
        return True

    cdef void _call(self, CallQueue queue) noexcept:
        cdef int64_t generation = self.generation
        cdef Job job = queue.jobs.pop()
        if job is not None:
            job._run()
            job = None  # what it held may put something
        if self.generation != generation:
            return  # in a child that the call has forked
        if queue.jobs.first is not None:
            self._append(queue)
        else:
            queue.busy = False
            self.busy -= 1
            queue.idle.set()

    cdef void _call_all(self) noexcept:
        # In a thread of somebody else.
        cdef CallQueue queue = self._pop()
        while queue is not None:
            self._call(queue)
            queue = self._pop()


cdef int64_t IDLE = 1000 * MS
