# From kbatch's threads to user code: callback threads and event loops. What tells an answer allocates nothing: a `Job`
# and a `LoopWaker` are made when the answer is asked for. The GIL guards all of it but Signal.

cdef class Signal:
    """What one thread waits for and others set. Setting runs no Python code: signal handlers and finalizers may."""

    cdef kb_mutex mu
    cdef kb_cond cond
    cdef bint raised    # under `mu`
    cdef object keeper  # what must not be forgotten before it is taken back

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


cdef object _calls = contextvars.ContextVar("kbatch_calls", default=())
# To be copied. CPython 3.11 crashes when it makes a new one and finds no memory for its contents.
cdef object _no_context = contextvars.Context()


@cython.final
cdef class Call:
    """A call of foreign code. A context is copied into the tasks that it makes, by `asyncio.to_thread` into threads,
    so what would wait for its end sees that it comes from it."""

    cdef object caller  # None: of interest is the call itself
    cdef bint over

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


@cython.final
@cython.trashcan(True)
cdef class Job:
    """A call to be made on a thread for callbacks, once, in a context of its own."""

    cdef Call call
    cdef object run       # of that context
    cdef tuple arguments  # the function, and what it is called with
    cdef Job next

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
            try:  # a logging filter that raises must not end the thread
                _logger.exception("a callback failed: %s", callback_name(self.arguments[0]))
            except BaseException:
                pass
        self.call._end()


@cython.final
cdef class Jobs:
    """Those that wait for their turn, in order."""

    cdef Job first
    cdef Job last

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
    """Runs what it is given, in order, one at a time, on a thread that starts when there is something to run."""

    cdef object __weakref__
    cdef str name
    cdef Jobs jobs
    cdef Signal changed
    cdef object lock           # of the start; re-entrant: a signal handler or a finalizer may come here from within
    cdef object thread
    cdef object token          # of the thread that runs jobs: one whose start was interrupted ends by itself
    cdef bint has_begun        # that thread has
    cdef Signal begun
    cdef bint stopping
    cdef int promised          # jobs that come for certain, or calls that will say that they do not

    def __cinit__(self, str name):
        self.name = name
        self.jobs = Jobs.__new__(Jobs)
        self.changed, self.begun = Signal(), Signal()
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
                _logger.exception("no thread for callbacks")
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
                if not self.has_begun and (not thread.is_alive() or kb_now_ns() > deadline):
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


cdef void nap() noexcept:
    # Until others may have given memory back.
    with nogil:
        pause(10 * MS)


# -- event loops

def running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop of asyncio. Raises RuntimeError where there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "kbatch.aio needs a running event loop of asyncio, and there is none here; under trio, have a thread use "
            "kbatch.Producer, as trio.to_thread.run_sync does") from None


def call_on_loop(loop, function) -> bool:
    """Has `loop` call the function soon, whatever the lack of memory; false if it is closed and so never will."""
    while True:
        try:
            loop.call_soon_threadsafe(function)
            return True
        except RuntimeError:
            if not loop.is_closed():
                raise
            return False
        except MemoryError:
            nap()


@cython.final
cdef class TaskStarter:
    """Starts a coroutine as a task of the running event loop, once, when it is called from whatever thread."""

    cdef readonly object loop
    cdef object context
    cdef object make      # makes the coroutine
    cdef object started   # a set that has this from here to the task's end: a loop itself keeps weak references
    cdef object lost      # called if the loop is closed
    cdef object dropped   # called if the task was cancelled
    cdef object coroutine
    cdef readonly Call call  # what the task comes from
    cdef readonly object task

    def __cinit__(self, make, started, lost=None, dropped=None):
        self.loop = running_loop()
        self.context = contextvars.copy_context()
        self.make, self.started, self.lost, self.dropped = make, started, lost, dropped
        self.call = Call()

    def __call__(self) -> None:
        if not call_on_loop(self.loop, self._start):
            _logger.error("a callback was not called: the event loop on which its batch was sent is closed")
            if self.lost is not None:
                self.lost()

    def _start(self) -> None:  # may come twice, if who asked for it was interrupted
        while True:
            try:
                if self.task is None:
                    if self.coroutine is None:
                        self.coroutine = self.make()  # one: it runs once, however often a task of it is made
                    self.started.add(self)  # first: an eager task runs within the call that makes it
                    self.task = self.context.run(self._create)
                    self.coroutine = None
                    self.task.add_done_callback(self._end)
                return
            except MemoryError:  # who waits for the callback would wait for ever
                nap()
            except BaseException:  # Ctrl-C within asyncio's own code
                self.loop.call_soon(self._start)
                raise

    def _create(self):
        self.call.__enter__()
        return self.loop.create_task(self.coroutine)

    def _end(self, task) -> None:
        self.call._end()
        self.started.discard(self)
        if self.dropped is not None and task.cancelled():
            self.dropped()


@cython.final
cdef class Arrivals:
    """The wakers of one loop that were called. The loop is woken once for all that come before it has looked."""

    cdef LoopWaker first
    cdef LoopWaker last
    cdef bint is_woken

    cdef void _append(self, LoopWaker waker) noexcept:
        if not waker.has_come:
            waker.has_come = True
            if self.last is None:
                self.first = waker
            else:
                self.last.next = waker
            self.last = waker

    cdef void _clear(self) noexcept:
        cdef LoopWaker waker
        while self.first is not None:  # one by one: freed together, a long chain takes a deep stack
            waker = self.first
            self.first, waker.next = waker.next, None
        self.last = None

    def resolve(self) -> None:
        """Resolves the futures of those that have come. A waker is taken out when its future is done, not before."""
        cdef LoopWaker last = self.last  # who comes later wakes the loop again
        cdef LoopWaker waker
        cdef bint over = last is None
        self.is_woken = False
        while not over and self.first is not None:
            waker = self.first
            try:
                if not waker.future.done():
                    waker.future.set_result(None)
            except MemoryError:
                nap()
                continue
            except BaseException:  # Ctrl-C within asyncio's own code
                asyncio.get_running_loop().call_soon(self.resolve)
                raise
            over = waker is last
            if self.first is waker:
                self.first, waker.next = waker.next, None
                if self.first is None:
                    self.last = None


cdef object _arrivals = weakref.WeakKeyDictionary()  # of each loop


cdef Arrivals begin_arrivals(object loop):
    cdef Arrivals arrivals
    for reference in _arrivals.keyrefs():
        other = reference()
        arrivals = None if other is None or not other.is_closed() else _arrivals.get(other)
        if arrivals is not None:
            arrivals._clear()  # they would keep their loop from being forgotten
    arrivals = Arrivals()
    _arrivals[loop] = arrivals
    return arrivals


@cython.final
@cython.trashcan(True)
cdef class LoopWaker:
    """Resolves a future of the running event loop when it is called, from whatever thread."""

    cdef readonly object loop
    cdef readonly object future
    cdef Arrivals arrivals
    cdef LoopWaker next
    cdef bint has_come

    def __cinit__(self):
        self.loop = running_loop()
        self.future = self.loop.create_future()
        self.arrivals = _arrivals.get(self.loop) or begin_arrivals(self.loop)
        if self.arrivals.is_woken:
            self.arrivals.resolve()  # what was to do it may have been lost by Ctrl-C

    def __call__(self) -> None:
        cdef Arrivals arrivals = self.arrivals
        arrivals._append(self)
        if not arrivals.is_woken:
            arrivals.is_woken = True
            try:
                if not call_on_loop(self.loop, arrivals.resolve):
                    arrivals._clear()
            except BaseException:  # Ctrl-C
                arrivals.is_woken = False
                raise

    def resolve(self) -> None:
        """The same on the loop itself, as a timer does it."""
        if not self.future.done():
            self.future.set_result(None)


@cython.final
cdef class TurnLine:
    """Who waits for a turn on one loop."""

    cdef object loop
    cdef PyObject *first  # borrowed Turns: one that is forgotten leaves
    cdef PyObject *last


@cython.final
cdef class Turns:
    """First come, first served among the coroutines of each loop, whatever they do before their turn."""

    cdef dict lines              # of the loops on which somebody stands in line
    cdef list watchers           # signals of those that wait for others to leave
    cdef readonly int64_t last   # the number of the one that joined last
    cdef readonly int64_t standing

    def __cinit__(self):
        self.lines = {}
        self.watchers = []

    def turn(self) -> Turn:
        """One that stands in no line yet."""
        cdef Turn turn = Turn.__new__(Turn)
        turn.turns = self
        return turn

    def are_taken(self) -> bool:
        """Whether somebody stands in the line of the running loop."""
        if not self.lines:
            return False
        self.forget_closed_loops()
        return asyncio.get_running_loop() in self.lines

    def forget_closed_loops(self) -> None:
        """Lets go of loops that were closed while somebody stood in their line."""
        if self.lines:
            for loop in list(self.lines):
                if loop.is_closed():  # whatever stands in its line will not come any more
                    self.lines.pop(loop, None)

    def count(self, int64_t upto=INT64_MAX) -> int:
        """Envelopes of those that stand in line, and joined no later than the one with this number."""
        cdef int64_t total = 0
        self._look(upto, &total)
        return total

    def wait(self, int64_t upto, timeout) -> None:
        """Blocks until nobody stands in line any more that joined no later than `upto`, or `timeout` seconds."""
        cdef int64_t deadline = deadline_after(timeout)
        cdef int64_t total = 0
        cdef Signal signal = Signal()
        self.watchers.append(signal)
        try:
            while self._look(upto, &total) and kb_now_ns() < deadline:
                signal._wait(min(deadline, kb_now_ns() + WAIT_SLICE), WAIT_SLICE)  # a loop may be closed meanwhile
        finally:
            self.watchers.remove(signal)

    cdef bint _look(self, int64_t upto, int64_t *total) except -1:
        # Whether somebody is there, and of how many envelopes.
        cdef TurnLine line
        cdef PyObject *turn
        cdef bint found = False
        self.forget_closed_loops()
        for line in list(self.lines.values()):
            turn = line.first
            while turn != NULL:
                if (<Turn> turn).number <= upto:
                    found = True
                    total[0] += (<Turn> turn).count
                turn = (<Turn> turn).behind
        return found


@cython.final
cdef class Turn:
    """A place in a line, from `join` to the end of a ``with`` block, or until it is forgotten."""

    cdef Turns turns
    cdef TurnLine line         # None: it stands in none
    cdef PyObject *ahead       # borrowed, as the next
    cdef PyObject *behind
    cdef object called         # a future, if its turn was not come when it looked
    cdef int64_t number
    cdef public Py_ssize_t count  # its envelopes, as far as is known

    def join(self) -> None:
        """Takes a place at the end of the running loop's line."""
        cdef Turns turns = self.turns
        cdef TurnLine line
        if turns is None:
            raise TypeError("made by Turns only")
        loop = running_loop()
        turns.forget_closed_loops()
        line = TurnLine.__new__(TurnLine)
        line.loop = loop
        line = turns.lines.setdefault(loop, line)
        if self.line is not None:
            return
        self.line = line
        self.ahead = line.last
        if self.ahead == NULL:
            line.first = <PyObject *> self
        else:
            (<Turn> self.ahead).behind = <PyObject *> self
        line.last = <PyObject *> self
        turns.last += 1
        turns.standing += 1
        self.number = turns.last

    def come(self):
        """What to await: the end of all that joined before. None: it is this one's turn."""
        if self.line is not None and self.line.first != <PyObject *> self:
            self.called = self.line.loop.create_future()
        if self.line is None or self.line.first == <PyObject *> self:  # not before: a future may be Python
            return None
        return self.called

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_) -> None:
        self._leave()

    def __del__(self):
        self._leave()

    cdef int _leave(self) except -1:
        cdef TurnLine line = self.line
        cdef Turns turns = self.turns
        cdef Signal signal
        if line is None:
            return 0
        self.line = None
        if self.ahead == NULL:
            line.first = self.behind
        else:
            (<Turn> self.ahead).behind = self.behind
        if self.behind == NULL:
            line.last = self.ahead
        else:
            (<Turn> self.behind).ahead = self.ahead
        self.ahead = self.behind = NULL
        turns.standing -= 1
        for signal in turns.watchers:
            signal.set()
        if line.first == NULL:
            if turns.lines.get(line.loop) is line and line.first == NULL:
                del turns.lines[line.loop]
        elif (<Turn> line.first).called is not None:
            self._call((<Turn> line.first).called, line.loop)
        return 0

    cdef int _call(self, object called, object loop) except -1:
        if asyncio._get_running_loop() is loop:
            if not called.done():
                called.set_result(None)
        elif not loop.is_closed():  # forgotten elsewhere, by a garbage collection
            call_on_loop(loop, functools.partial(_resolve, called))
        return 0


cpdef _resolve(future):
    if not future.done():
        future.set_result(None)
