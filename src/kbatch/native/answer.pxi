# One answer for each batch, whatever comes. Python code may be left between any two of its lines: by Ctrl-C, or when
# memory is short. C code may not. So what must be done together is done here.

@cython.final
cdef class Trial:
    """The one batch by which a half-open circuit breaker is tried. When it ends, however that is, another may begin."""

    cdef object __weakref__


@cython.final
cdef class Trials:
    """Which `Trial` is under way. It is held weakly: nobody has to give it back."""

    cdef object current             # a weak reference, or None
    cdef public Flag flag           # set when one has ended

    def __init__(self, Flag flag=None):
        self.flag = flag

    def begin(self) -> Trial:
        cdef Trial trial = Trial.__new__(Trial)
        self.current = weakref.ref(trial, None if self.flag is None else self.flag.set)
        return trial

    def is_taken(self) -> bool:
        return self.current is not None and self.current() is not None

    def end(self, trial) -> bool:
        """Whether `trial` is the one under way, which it is no longer."""
        if trial is None or self.current is None or self.current() is not trial:
            return False
        self.current = None
        return True


cdef enum:
    MOST_TRIES = 20  # to have the answer told later
    TRIES = 2  # to say what is to be told: an interruption of the last one leads to less detail
    # what becomes of the answer of a batch whose sending ended with an error
    UNSENT = 0
    LEFT = 1     # it comes when the batch is settled
    SETTLED = 2


@cython.final
cdef class Answer:
    """The one call of a batch's callback."""

    cdef readonly object callback
    cdef readonly object batch
    cdef object sender
    cdef public Batch pending    # on its way; None before
    cdef public bint mapping     # an error now is the envelopes' own
    cdef public object later     # on an event loop: calls `give_later` there, from any thread
    cdef public Trial trial      # of the circuit breaker
    cdef public object then      # called with this after the callback
    cdef readonly bint given
    cdef readonly str method     # what was told
    cdef readonly object argument

    @staticmethod
    cdef Answer make(object sender, object callback, object batch):
        cdef Answer answer = Answer.__new__(Answer)
        answer.sender, answer.callback, answer.batch = sender, callback, batch
        return answer

    cdef object _call(self, str method, argument):
        # Between the look and the call there is no Python code.
        self.given, self.method, self.argument = True, method, argument
        return getattr(self.callback, method)(self.batch, argument)

    cdef void _log(self) noexcept:
        log_raised("a sender callback failed: %s.%s; it was told: %r",
                   (callback_name(type(self.callback)), self.method, self.argument))

    cdef int _end(self) except -1:
        then, self.then = self.then, None
        try:
            if then is not None:
                then(self)
        finally:
            self.trial = None
            self.argument = self.later = None  # both lead back here: an error by its traceback
        return 0

    cdef int _give(self, str method, argument) except -1:
        if self.given:
            return 0
        try:
            refuse_coroutine(self._call(method, argument))
        except (Exception, cancelled_error()):  # nobody cancels who waits here: it is the callback's own
            self._log()
        finally:
            self._end()
        return 0

    cdef tuple _told(self):
        # What is to be told of a batch that is settled.
        cdef int tries = 0
        while True:
            try:
                return self.sender._tell(self.pending.report)
            except BaseException as error:
                tries += 1
                if tries == TRIES:
                    return "mark_processing_failure", BatchError.__new__(
                        BatchError, f"the batch is settled, but its report could not be made: {type(error).__name__}")

    cdef tuple _refused(self, error):
        # The same of a batch of which nothing was sent.
        cdef int tries = 0
        while True:
            try:
                return self.sender._refuse_answered(self, error)
            except BaseException:
                tries += 1
                if tries == TRIES:
                    return "mark_processing_failure", BatchInterruptedError.__new__(
                        BatchInterruptedError, f"given up before anything was sent: {type(error).__name__}")

    def _give_settled(self, _) -> None:
        method, argument = self._told()
        self._give(method, argument)

    cdef int _fate(self) except -1:
        # What becomes of the answer.
        cdef Batch pending = self.pending
        cdef int tries = 0
        if pending is None or not pending.begun:
            return UNSENT
        while not pending.done():
            try:
                if self.later is None:
                    pending._listen(None, self._give_settled)
                else:
                    pending.core.abandon(pending)
                    pending._listen(self.later, None)
                return LEFT
            except MemoryError:
                nap()
            except BaseException:  # Ctrl-C once more, while a callback thread is started
                tries += 1
                if tries == MOST_TRIES and not pending.done():
                    raise
        return SETTLED

    def give_later(self) -> AnsweringCoroutine:
        """For a task of its own: awaits the callback, once the batch is settled."""
        cdef AnsweringCoroutine coroutine = AnsweringCoroutine.__new__(AnsweringCoroutine)
        coroutine.answer = self
        return coroutine


cdef class AnsweringSender:
    """Sends a batch and answers it by exactly one method of a callback, whatever comes at whatever line.

    A subclass has ``_send_answered(answer)``, which sends and returns what is to be told: the method's name and its
    argument; ``_refuse_answered(answer, error)``, the same if nothing was sent; ``_tell(report)``, the same of a batch
    that is settled.
    """

    def send_batch(self, callback, batch) -> None:
        """Blocks until each envelope has its outcome, then calls exactly one method of `callback`, in this thread.

        An exception from `callback` is logged. On Ctrl-C it raises at once; if something of the batch is in flight,
        the one callback then comes on the producer's callback thread when it is settled.

        Raises:
            TypeError: A method of `callback` is a coroutine function. Nothing was sent.
        """
        cdef Answer answer = Answer.make(self, callback, batch)
        cdef int left
        cdef bint is_refused = False
        try:
            is_refused = has_coroutine_methods(callback)
            if is_refused:
                raise TypeError(
                    f"{type_name(callback)} has coroutine methods, which nothing awaits here; use kbatch.aio, or a "
                    "kbatch.SenderCallback")
            method, argument = self._send_answered(answer)
        except BaseException as error:
            if is_refused:
                raise
            left = answer._fate()
            if left == LEFT:
                raise
            method, argument = answer._told() if left == SETTLED else answer._refused(error)
            answer._give(method, argument)
            if not isinstance(error, Exception):
                raise
        else:
            answer._give(method, argument)


cdef class AioAnsweringSender:
    """As `AnsweringSender`, for event loops: ``_send_answered`` is a coroutine function, and sets ``answer.later``."""

    def send_batch(self, callback, batch) -> AnsweringCoroutine:
        """Waits until each envelope has its outcome, then awaits exactly one method of `callback`, in this task.

        An exception from `callback` is logged. If the task is cancelled while something of the batch is in flight, it
        ends at once, and the one callback then comes in a task of its own when the batch is settled. If it is cancelled
        when nothing is in flight, even before its first step, `callback` is awaited first. If it is cancelled while a
        method of `callback` runs, the method is cancelled, and that was the one call. If the loop is closed by then
        nothing can be awaited on it, and an error is logged instead.
        """
        cdef AnsweringCoroutine coroutine = AnsweringCoroutine.__new__(AnsweringCoroutine)
        coroutine.answer = Answer.make(self, callback, batch)
        coroutine.inner = self._send_answered(coroutine.answer)
        return coroutine


cdef object cancels_of_task():
    asyncio = imported_asyncio()
    try:
        task = None if asyncio is None else asyncio.current_task()
        return None if task is None else task.cancelling()
    except Exception:  # Python 3.10, or a loop's own kind of task
        return None


@cython.final
cdef class AnsweringCoroutine:
    """Sends, then awaits the callback. A coroutine to its task, also one that is cancelled before it began."""

    cdef object __weakref__
    cdef Answer answer
    cdef object inner    # what runs: the sending, None if that is over at first; then the callback
    cdef object error    # raised at the end
    cdef object thrown   # the last that was thrown in while the callback ran
    cdef object cancels  # how often the task had been cancelled by then; None before Python 3.11
    cdef bint begun
    cdef bint telling
    cdef bint over

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        if self.over:
            raise RuntimeError("cannot reuse already awaited coroutine")
        if self.answer is None:
            raise TypeError("made by send_batch only")
        self.begun = True
        if self.inner is None:
            return self._tell(self.answer._told())
        try:
            return self.inner.send(value)
        except BaseException as error:
            return self._go_on(error)

    def throw(self, kind, value=None, traceback=None):
        if self.over:
            raise RuntimeError("cannot reuse already awaited coroutine")
        if self.answer is None:
            raise TypeError("made by send_batch only")
        error = kind if isinstance(kind, BaseException) else value if isinstance(value, BaseException) else kind()
        if not self.begun and self.inner is not None:
            self.begun = True
            self.inner.close()
            return self._go_on(error)
        self.begun = True
        if self.inner is None:
            self.error = error
            return self._tell(self.answer._told())
        if self.telling:
            self.thrown = error
        try:
            return self.inner.throw(error)
        except BaseException as raised:
            return self._go_on(raised)

    def close(self):
        if not self.begun or self.over:
            self.over = True
            if self.inner is not None:
                self.inner.close()
            return
        try:
            self.throw(GeneratorExit())
        except (GeneratorExit, StopIteration):
            return
        raise RuntimeError("coroutine ignored GeneratorExit")

    def __del__(self):
        if self.begun and not self.over:
            self.close()

    cdef object _go_on(self, error):
        # `inner` ended with this: a StopIteration if nothing went wrong.
        cdef int left
        if self.telling:
            return self._finish(error)
        if isinstance(error, StopIteration):
            return self._tell(error.value)
        left = self.answer._fate()
        if left == LEFT:
            self.over = True
            raise error
        if isinstance(error, GeneratorExit):  # nothing can be awaited any more
            self.over = True
            _logger.error("%r has no answer: its event loop is closed", self.answer.batch)
            raise error
        if not isinstance(error, Exception):
            self.error = error
        return self._tell(self.answer._told() if left == SETTLED else self.answer._refused(error))

    cdef object _tell(self, tuple told):
        if self.answer.given:
            return self._finish(None)
        self.telling = True
        self.cancels = cancels_of_task()
        try:
            answer = self.answer._call(told[0], told[1])
            if not hasattr(answer, "__await__"):
                return self._finish(None)
            self.inner = answer.__await__()
            return next(self.inner)
        except BaseException as error:
            if self.over:
                raise
            return self._finish(error)

    cdef object _finish(self, error):
        self.over = True
        if error is not None and not isinstance(error, StopIteration):
            if isinstance(error, Exception) or self._is_own_cancellation(error):
                self.answer._log()
            else:
                self.error = error
        self.answer._end()
        self.inner = self.thrown = None
        if self.error is not None:
            error, self.error = self.error, None  # else the error would have itself in its traceback
            raise error
        raise StopIteration

    cdef bint _is_own_cancellation(self, error) except -1:
        # Whether the callback ended with it though nobody has cancelled the task.
        if not isinstance(error, cancelled_error()):
            return False
        if self.cancels is None or self.thrown is None:
            return self.thrown is None
        return cancels_of_task() == self.cancels
