# A batch: what it gives back, and when; how its end is told. Its parts stand in `_fastmap.pxd`.

cdef int32_t _pinned = 0


def pinned_buffers() -> int:
    """How many batches of this process hold memory that librdkafka may still read, or that is not yet given back."""
    return KB_LOAD32(&_pinned)


cdef bint note_topic(BatchState *batch, Topic *topic) noexcept nogil:
    # A record of `batch` goes to `topic`, as none before it. False when memory is short.
    cdef Place *place = &batch.place
    if place.topic != NULL:
        place = <Place *> kb_calloc(1, sizeof(Place))
        if place == NULL:
            return False
        place.other = batch.place.other
        batch.place.other = place
    place.topic = topic
    return True


cdef void forget_topics(BatchState *batch) noexcept nogil:
    # Of a batch that stands in no line.
    cdef Place *place = batch.place.other
    cdef Place *following
    batch.place.other = NULL
    while place != NULL:
        following = place.other
        kb_free(place)
        place = following


cdef void drop_mapped(BatchState *batch) noexcept nogil:
    # All that phase 1 has taken, once.
    if batch.pool != NULL:
        drop_records(batch)
        forget_topics(batch)
        arena_give(batch.pool, &batch.bodies)
        batch.pool = NULL


cdef void drop_records(BatchState *batch) noexcept nogil:
    kb_free(batch.deliver_by)
    batch.deliver_by = NULL
    records_give(batch.pool, &batch.records, batch.capacity)
    arena_give(batch.pool, &batch.arena)


cdef enum:
    RELEASE_SLICE = 2000  # envelopes


cdef void release_idle(Client *c, bint long_ones=True) noexcept:
    # With the GIL: gives back batches that are done and that nobody listens to. Without `long_ones` it does not take
    # long, and the dispatcher sees to those.
    cdef BatchState *batch = NULL
    cdef BatchState *following
    cdef BatchState **at
    kb_mutex_lock(&c.mu)
    if long_ones:
        batch = c.idle_done
        c.idle_done = NULL
        c.dispatcher_nudge = 0
    elif c.idle_done != NULL:
        at = &c.idle_done
        while at[0] != NULL:
            following = at[0].next_news
            if at[0].count <= RELEASE_SLICE:
                at[0].next_news = batch
                batch = at[0]
                at[0] = following
            else:
                at = &at[0].next_news
        nudge_dispatcher(c)
    kb_mutex_unlock(&c.mu)
    while batch != NULL:
        following = batch.next_news
        release_owner(batch)
        batch = following


cdef void release_owner(BatchState *state) noexcept:
    cdef Batch batch = <Batch> state.owner
    state.owner = NULL
    batch._release()
    Py_DECREF(batch)


@cython.no_gc_clear
cdef class MappedBatch:
    """What phase 1 makes of envelopes: their records, and whatever these point at."""

    def __dealloc__(self):
        drop_mapped(&self.state)

    cdef list _records(self):
        cdef Py_ssize_t i
        cdef list records = []
        for i in range(self.state.count):
            records.append(read_record(&self.state.records[i]))
        return records


@cython.no_gc_clear
cdef class Batch(MappedBatch):
    """One batch from phase 1 to its last outcome. `PendingBatch` is its public face."""

    __signature__ = _ConstructorSignature(("core", inspect.Parameter.empty))

    def __cinit__(self, Core core not None):
        self.core = core
        self.state.client = core.c
        self.state.pool = &core.c.pool

    def __dealloc__(self):
        # Records and arena are still here if phase 1 failed. The client lives: `core` holds it.
        if self.state.client == NULL:
            return  # __cinit__ has refused its arguments
        if self.state.client.pid and self.state.client.pid != _this_pid:
            self.state.pool = NULL  # in a forked child: a thread of the parent may have held the lock
            return
        drop_mapped(&self.state)
        if self.lot is not None:
            self.lot.reachable, self.lot.waited = False, 0  # nobody will look: the producer tells

    def __len__(self) -> int:
        return self.state.count

    def done(self) -> bool:
        """Whether every envelope has its outcome."""
        return KB_LOAD32(&self.state.done) != 0

    @property
    def begun(self) -> bool:
        """Whether a producer has taken it, so that an answer will come."""
        return self.state.started_ns != 0

    @property
    def encoded_messages(self) -> tuple:
        """Of a batch that is mapped and not yet sent: ``(bytes, count)`` of the messages that were encoded."""
        cdef int64_t total = 0, count = 0
        cdef Py_ssize_t i
        if self.state.records != NULL:
            for i in range(self.state.count):
                item = self.envelopes[i]
                if (not self.state.records[i].flags and isinstance(item, Envelope)
                        and (<Envelope> item)._kind == BODY_MESSAGE):
                    total += self.state.records[i].value_len
                    count += 1
        return total, count

    @property
    def latency_s(self) -> float:
        """Seconds from when the producer took the batch to its answer, the wait for room included; ``nan`` before."""
        if not KB_LOAD32(&self.state.done):
            return NAN
        return (self.state.done_ns - self.state.started_ns) / 1e9

    def _look(self, report=None):
        """Somebody is told of what fails, so the producer does not. Returns the argument: nothing comes in between."""
        self._mark_looked()
        return report

    def _unlook(self) -> None:
        """Who was to be told of what fails cannot be told, so the producer does. Before the batch is given back."""
        self.looked = False

    cdef void _mark_looked(self) noexcept:
        cdef _Lot lot = self.lot
        self.looked = True
        self.lot = None
        if lot is not None:
            try:
                self.core.undelivered._take(lot)
            except BaseException:
                log_raised("could not note that a failure was seen")

    cdef void _wait_on(self) noexcept:
        # Until it looks, or waits no longer: only then others may be told instead.
        self.waited += 1
        if self.lot is not None:
            self.lot.waited += 1

    def _wait_no_longer(self) -> None:
        """Who was woken, or has waited, will not look."""
        if self.waited:
            self.waited -= 1
            if self.lot is not None:
                self.lot.waited -= 1

    cdef void _keep_failures(self) noexcept:
        # The producer tells of them, unless somebody looks at this batch before.
        cdef Undelivered undelivered = self.core.undelivered
        cdef _Lot lot
        cdef Py_ssize_t i
        cdef int64_t count = self.outcomes._state_count(FAILED)
        cdef int64_t size
        try:
            undelivered._own()
            lot = _Lot.__new__(_Lot)
            lot.reachable, lot.waited, lot.count = True, self.waited, count
            lot.failures = []
            for i in range(self.state.count):
                if self.outcomes._items[i].state == FAILED:
                    size = envelope_bytes(self.envelopes[i])
                    if not undelivered._has_room(
                            undelivered.kept + len(lot.failures), undelivered.bytes + lot.bytes + size):
                        break
                    lot.bytes += size
                    lot.failures.append(
                        (self.envelopes[i], self.outcomes._items[i].error, self.outcomes._items[i].persistence))
            undelivered._put(lot)
            if self.looked:  # a finalizer has come in between
                undelivered._take(lot)
            else:
                self.lot = lot
        except BaseException:  # no memory
            if not self.looked:
                undelivered.rest += count

    cdef void _release(self) noexcept:
        # With the GIL, once done: what librdkafka could read is given back.
        if KB_LOAD32(&self.state.failing) and not self.looked:
            self._keep_failures()
        self.core.unreleased -= 1
        with nogil:
            arena_give(self.state.pool, &self.state.bodies)
        if len(self.envelopes) > RELEASE_SLICE:
            self._forget_in_slices()
        self.envelopes = None
        self.kept = None
        KB_ADD32(&_pinned, -1)

    cdef void _forget_in_slices(self) noexcept:
        # To free many objects takes long, and event loops and other threads must come in between.
        cdef list rest = self.kept
        cdef int64_t offered_ns = kb_now_ns()
        try:
            rest.extend(self.envelopes)
        except MemoryError:
            return
        self.envelopes = self.kept = None
        while rest:
            del rest[-RELEASE_SLICE:]
            offer_gil(&offered_ns)

    cdef int _listen(self, object waker, object callback) except -1:
        # Registers before completion, or answers at once after it. Nothing may let go of the GIL between the look at
        # `done` and the registration; a new list could, through a garbage collection.
        cdef Client *c = self.state.client
        cdef Dispatcher dispatcher = self.core.dispatcher
        cdef Job job = Job.make(dispatcher.callback_thread, callback, (self,))
        cdef list fresh = [job if waker is None else waker]
        cdef bint done
        self.core._check_fork()
        if waker is None:
            dispatcher.callback_thread._start()  # now: the answer itself needs no memory
        if callback is not None:
            self._mark_looked()
        kb_mutex_lock(&c.mu)
        done = self.state.done
        if not done and not self.state.listeners:
            self.state.listeners = 1
            c.eager += 1
            nudge_drainer(c)
        kb_mutex_unlock(&c.mu)
        if waker is not None:
            if done:
                self._wait_on()
                waker()
            elif self.wakers is None:
                self.wakers = fresh
            else:
                self.wakers.append(waker)
        else:
            if done and self.callbacks is None:
                dispatcher.callback_thread._append_surely(job)
            elif self.callbacks is None:
                self.callbacks = fresh
            else:
                self.callbacks.append(job)
        return 0

    def add_done_callback(self, callback) -> None:
        """Calls ``callback(self)`` on the producer's callback thread once every envelope has its outcome.

        An exception from it is logged.
        """
        self._listen(None, callback)

    def _add_waker(self, waker) -> None:
        # `waker` must not block: it runs on the thread that wakes every event loop.
        self._listen(waker, None)

    def _remove_waker(self, waker) -> bool:
        """Takes back what `_add_waker` was given; false if it was called."""
        if self.wakers is not None:
            try:
                self.wakers.remove(waker)
                return True
            except ValueError:
                pass
        return False

    def _wait(self, timeout=None) -> bool:
        """Blocks until done; False after `timeout` seconds. Ctrl-C raises; the batch goes on."""
        return self.core._wait_for(self, deadline_after(timeout))
