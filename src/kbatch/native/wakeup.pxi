# Event loops: waking one from another thread, turns among its coroutines.

def running_loop():
    """The running event loop of asyncio. Raises RuntimeError where there is none."""
    loop = current_loop()
    if loop is None:
        raise RuntimeError(
            "kbatch.aio needs a running event loop of asyncio, and there is none here; under trio, have a thread use "
            "kbatch.Producer, as trio.to_thread.run_sync does")
    return loop


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
            if self.lost is not None:
                self.lost()
            _logger.error("a callback was not called: the event loop on which its batch was sent is closed")

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
            except Exception:  # a task factory of the application: the next time it would raise as well
                self._give_up()
                log_raised("a callback was not called: no task could be made for it")
                return
            except BaseException:  # Ctrl-C within asyncio's own code
                self.loop.call_soon(self._start)
                raise

    cdef int _give_up(self) except -1:
        coroutine, self.coroutine = self.coroutine, None
        self.call._end()
        self.started.discard(self)
        if coroutine is not None:
            coroutine.close()
        return 0

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
                running_loop().call_soon(self.resolve)
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
    cdef list watchers           # flags of those that wait for others to leave
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
        return running_loop() in self.lines

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
        cdef Flag flag = Flag()
        self.watchers.append(flag)
        try:
            while self._look(upto, &total) and kb_now_ns() < deadline:
                flag._wait(min(deadline, kb_now_ns() + WAIT_SLICE), WAIT_SLICE)  # a loop may be closed meanwhile
        finally:
            self.watchers.remove(flag)

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
        cdef Flag flag
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
        for flag in turns.watchers:
            flag.set()
        if line.first == NULL:
            if turns.lines.get(line.loop) is line and line.first == NULL:
                del turns.lines[line.loop]
        elif (<Turn> line.first).called is not None:
            self._call((<Turn> line.first).called, line.loop)
        return 0

    cdef int _call(self, object called, object loop) except -1:
        if current_loop() is loop:
            if not called.done():
                called.set_result(None)
        elif not loop.is_closed():  # forgotten elsewhere, by a garbage collection
            call_on_loop(loop, functools.partial(_resolve, called))
        return 0


cpdef _resolve(future):
    if not future.done():
        future.set_result(None)
