# Where Python meets the client: Batch, Core, Dispatcher. Each long wait is cut into slices, so that Ctrl-C works.

cdef class Config:
    """librdkafka's configuration being built: sets and gets single properties, checked by librdkafka itself."""

    cdef rd_kafka_conf_t *conf  # owned until a Core hands it to rd_kafka_new
    cdef set hidden             # properties whose values no error shows

    def __cinit__(self):
        self.conf = api.conf_new()
        self.hidden = set()

    def __dealloc__(self):
        if self.conf != NULL:
            api.conf_destroy(self.conf)

    def copy(self) -> Config:
        """Another one with the same properties."""
        cdef Config made = Config()
        api.conf_destroy(made.conf)
        made.conf = api.conf_dup(self.conf)
        made.hidden |= self.hidden
        return made

    def hide(self, str name) -> None:
        """From now on no error of a start shows the value of this property."""
        self.hidden.add(name)

    def without_hidden(self, str text) -> str:
        """What librdkafka says when it refuses to start, without the values that must not be shown."""
        for name in self.hidden:
            value = self.get(name)
            if value:
                # A long one may be cut off where librdkafka's buffer ends.
                quoted = re.escape(value[:64])
                text = re.sub(rf"(?<![\w.]){quoted}{r'(?![\w.])' if len(value) <= 64 else '(?s:.*)'}", "…", text)
        return text

    def set(self, str name, str value) -> None:
        """Raises ValueError with librdkafka's reason; LookupError if there is no such property.

        None is librdkafka's NULL: the default of a text, refused for what is no text.
        """
        cdef char errstr[512]
        cdef int result
        cdef bytes name_utf8 = name.encode(), value_utf8
        cdef const char *text = NULL
        if value is not None:
            value_utf8 = value.encode()
            text = value_utf8
        errstr[0] = 0
        result = api.conf_set(self.conf, name_utf8, text, errstr, sizeof(errstr))
        if result == RD_KAFKA_CONF_OK:
            return
        reason = errstr.decode("utf-8", "replace")
        if result == RD_KAFKA_CONF_UNKNOWN:
            raise LookupError(reason)
        raise ValueError(reason)

    def get(self, str name) -> str | None:
        cdef size_t size = 0
        cdef bytes encoded = name.encode()
        cdef bytearray value
        if api.conf_get(self.conf, encoded, NULL, &size) != RD_KAFKA_CONF_OK:
            return None
        value = bytearray(size)
        api.conf_get(self.conf, encoded, value, &size)
        return value.rstrip(b"\0").decode()


@cython.no_gc_clear
cdef class Batch:
    """One batch from phase 1 to its last outcome. `PendingBatch` is its public face."""

    cdef BatchState state
    cdef readonly Core core
    cdef tuple envelopes
    cdef readonly Outcomes outcomes
    cdef list kept
    cdef list wakers      # called by the dispatcher itself: wake-ups of event loops
    cdef object enqueued_waker  # the same, at the end of phase 2
    cdef list callbacks   # Jobs: called with this batch on the callback thread, in this order
    cdef bint looked      # somebody is told of its failures, or was
    cdef int waited       # so many wait for it, or have waited and not looked yet
    cdef _Lot lot         # its failures, once it is released, if nobody is told of them yet
    cdef char[TIME_TEXT_WOLVERINE] sent_at

    __signature__ = _ConstructorSignature(("core", inspect.Parameter.empty))

    def __cinit__(self, Core core not None):
        self.core = core
        self.state.client = core.c

    def __dealloc__(self):
        # Records and arena are still here if phase 1 failed. The client lives: `core` holds it.
        if self.state.client == NULL:
            return  # __cinit__ has refused its arguments
        if self.state.client.pid and self.state.client.pid != _this_pid:
            return  # in a forked child: a thread of the parent may have held the lock
        drop_records(&self.state)
        forget_topics(&self.state)
        arena_give(self.state.client, &self.state.bodies)
        if self.lot is not None:
            self.lot.held, self.lot.waited = False, 0  # nobody will look: the producer tells

    def __len__(self) -> int:
        return self.state.count

    def done(self) -> bool:
        """Whether every envelope has its outcome."""
        return KB_LOAD32(&self.state.done) != 0

    @property
    def begun(self) -> bool:
        """Whether enqueueing has begun, so that an answer will come."""
        return self.state.started_ns != 0

    @property
    def encoded_messages(self) -> tuple:
        """Of a batch that is mapped and not yet sent: ``(bytes, count)`` of the messages that were encoded."""
        cdef int64_t total = 0, count = 0
        cdef Py_ssize_t i
        if self.state.records != NULL:
            for i in range(self.state.count):
                if (not self.state.records[i].flags
                        and (<Envelope> PyTuple_GET_ITEM(<PyObject *> self.envelopes, i))._kind == BODY_MESSAGE):
                    total += self.state.records[i].value_len
                    count += 1
        return total, count

    @property
    def latency_s(self) -> float:
        """Seconds from the start of enqueueing to the last outcome; ``nan`` before."""
        if not KB_LOAD32(&self.state.done):
            return NAN
        return (self.state.done_ns - self.state.started_ns) / 1e9

    def _look(self, report=None):
        """Somebody is told of what fails, so the producer does not. Returns the argument: nothing comes in between."""
        self._leave()
        return report

    def _unlook(self) -> None:
        """Who was to be told of what fails cannot be told, so the producer does. Before the batch is given back."""
        self.looked = False

    cdef void _leave(self) noexcept:
        cdef _Lot lot = self.lot
        self.looked = True
        self.lot = None
        if lot is not None:
            try:
                self.core.undelivered._take(lot)
            except BaseException:
                _logger.exception("could not note that a failure was seen")

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
            lot.held, lot.waited, lot.count = True, self.waited, count
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
            if not self.looked:  # a finalizer may have come in between
                undelivered._put(lot)
                self.lot = lot
        except BaseException:  # no memory
            undelivered.rest += count

    cdef void _release(self) noexcept:
        # With the GIL, once done: what librdkafka could read is given back.
        if KB_LOAD32(&self.state.failing) and not self.looked:
            self._keep_failures()
        self.core.unreleased -= 1
        with nogil:
            arena_give(self.state.client, &self.state.bodies)
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
            self._leave()
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


cdef object what_hinders(const rd_kafka_metadata_t *metadata, const char *name):
    # What, by this answer, hinders writing to a topic: None if one of its partitions has a leader among the brokers.
    cdef rd_kafka_metadata_topic_t *topic
    cdef int i, j
    for i in range(metadata.topic_cnt):
        if strcmp(metadata.topics[i].topic, name) == 0:
            break
    else:
        return None
    topic = &metadata.topics[i]
    if topic.err:
        return f"the topic: {error_text(topic.err)[1]}"
    for i in range(topic.partition_cnt):
        for j in range(metadata.broker_cnt):
            if metadata.brokers[j].id == topic.partitions[i].leader:
                return None
    return f"none of the topic's {topic.partition_cnt} partitions has a leader"


cdef enum:
    RELEASE_SLICE = 2000  # envelopes

cdef enum:
    # Core.transaction_call
    INIT_TRANSACTIONS = 0
    BEGIN_TRANSACTION = 1
    COMMIT_TRANSACTION = 2
    ABORT_TRANSACTION = 3


cdef inline bint something_left(Client *c) noexcept nogil:
    # What stands in line and the batches on hold, too: their answer is still to come.
    # An envelope may come back from in flight to waiting between two looks.
    return (KB_LOAD64(&c.waiting) > 0 or KB_LOAD64(&c.in_flight) > 0 or KB_LOAD64(&c.waiting) > 0
            or KB_LOAD32(&c.held) > 0)


cdef inline int64_t count_left(Client *c) noexcept nogil:
    # Under the lock. What is undecided may be in flight as well.
    cdef int64_t waiting = KB_LOAD64(&c.waiting)
    cdef int64_t in_flight = KB_LOAD64(&c.in_flight)
    return max(c.undecided, max(waiting, KB_LOAD64(&c.waiting)) + in_flight)


cdef void hand_over_own(Client *c) noexcept:
    # Who waits for the line in a signal handler may have interrupted its own batch there: the drainer enqueues that.
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef BatchState *batch
    kb_mutex_lock(&c.mu)
    batch = c.line.first
    while batch != NULL:
        if batch.thread == me and not batch.detached:
            batch.detached = batch.ready = 1
            c.detached += 1
            c.look_ns = 0
        batch = batch.next_in_line
    pass_turn(c, NULL)
    nudge_drainer(c)
    kb_mutex_unlock(&c.mu)


cdef void flush_slice(Client *c, int64_t ns) noexcept nogil:
    if KB_LOAD64(&c.in_flight) > 0:
        api.flush(c.rk, <int> ((ns + MS - 1) // MS))
        return
    kb_mutex_lock(&c.mu)
    if KB_LOAD64(&c.waiting) > 0:
        kb_cond_wait_until(&c.life_cond, &c.mu, kb_now_ns() + min(ns, WAIT_SLICE // 10))  # it is in flight soon
    elif KB_LOAD32(&c.held) > 0:
        kb_cond_wait_until(&c.life_cond, &c.mu, kb_now_ns() + ns)
    kb_mutex_unlock(&c.mu)


cdef int64_t deadline_after(object timeout) except? -2:
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    seconds = timeout
    if not seconds < 9e9:
        return INT64_MAX
    return kb_now_ns() + <int64_t> (max(seconds, 0.0) * 1e9)


# A fork waits for this. In a child that is forked while librdkafka initialises OpenSSL, exit() hangs in OpenSSL's own
# exit handler. Re-entrant: a signal handler may fork.
cdef object _starting = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


cdef class Core:
    """One producer's client, started at its first use."""

    cdef Client *c
    cdef object __weakref__
    cdef Config config
    cdef Mapper mapper
    cdef readonly Dispatcher dispatcher
    cdef object start_lock
    cdef object on_start
    cdef int64_t delivery_timeout_ns
    cdef int64_t batches
    cdef int64_t mapped
    cdef int64_t map_ns
    cdef int64_t unreleased           # batches that were taken and not given back yet
    cdef dict topics                  # of each name, an exact str, the address of its Topic
    cdef readonly Undelivered undelivered  # failures that nobody was told of

    def __cinit__(self):
        self.undelivered = Undelivered("messages were not acknowledged")
        self.c = client_make()
        if self.c == NULL:
            raise MemoryError("no memory for a client")
        self.c.life = CLOSED  # without __init__ it takes nothing
        self.topics = {}

    def __init__(self, Config config not None, Mapper mapper not None, Dispatcher dispatcher not None, *,
                 int64_t max_in_flight, int64_t queue_max_messages, int64_t queue_max_bytes, double delivery_timeout_s,
                 on_start=None, Undelivered undelivered=None):
        if self.config is not None:
            raise TypeError("a Core is made once")
        if undelivered is not None:
            self.undelivered = undelivered
        # One topic alone gets four fifths, which is `max_in_flight`. Stuck topics exceed the room, within the queue's.
        self.c.room = max(1, min(max_in_flight + (max_in_flight + SHARE - 1) // SHARE, queue_max_messages * 4 // 5))
        self.c.byte_room = max(1, queue_max_bytes * 4 // 5)
        self.c.queue_messages, self.c.queue_bytes = queue_max_messages, queue_max_bytes
        self.c.life = NEW
        self.config = config
        self.mapper = mapper
        self.dispatcher = dispatcher
        self.start_lock = threading.RLock()
        self.on_start = on_start
        self.c.socket_timeout_ns = int(config.get("socket.timeout.ms") or 60_000) * MS
        self.delivery_timeout_ns = <int64_t> (delivery_timeout_s * 1e9)

    def __dealloc__(self):
        cdef Client *c = self.c
        if c == NULL:
            return
        if c.pid and c.pid != _this_pid:
            return  # a forked child owns none of it
        # Nothing is in flight: a batch in flight keeps its Core. The drainer ends librdkafka by itself.
        kb_mutex_lock(&c.mu)
        if c.life == RUNNING or c.life == CLOSING:
            begin_finishing(c)
        elif c.life == NEW:
            c.dispatcher_stop = 1  # that of `start_in_memory`, which no drainer ends
            kb_cond_signal(&c.dispatcher_cond)
        kb_cond_signal(&c.drainer_cond)
        kb_mutex_unlock(&c.mu)
        client_drop(c)

    # -- life

    cdef int _start(self) except -1:
        cdef Client *c = self.c
        cdef char errstr[512]
        cdef rd_kafka_conf_t *conf
        cdef rd_kafka_t *rk
        cdef bint failed
        with self.start_lock:
            if KB_LOAD32(&c.life) != NEW:
                return 0
            c.pid = _this_pid  # from here on a forked child must not use it, not even to start it
            try:
                if self.on_start is not None:
                    self.on_start()
                self.dispatcher._attach(self)
                conf = api.conf_dup(self.config.conf)
                api.conf_set_events(conf, RD_KAFKA_EVENT_DR | <int> self.dispatcher.events)
                api.conf_set_opaque(conf, c)
                api.conf_on_new(conf, b"kbatch", watch_requests, c)
                if KB_FORKS:
                    api.conf_set_resolve_cb(conf, resolve)
                if self.dispatcher.throttle_cb is not None:
                    api.conf_set_throttle_cb(conf, on_throttle)
                c.events = self.dispatcher.events
                c.events_expected = c.events != 0 or self.dispatcher.throttle_cb is not None
                with _starting, nogil:
                    rk = api.new(RD_KAFKA_PRODUCER, conf, errstr, sizeof(errstr))
                if rk == NULL:
                    api.conf_destroy(conf)
                    reason = self.config.without_hidden(errstr.decode("utf-8", "replace"))
                    raise ConfigError(f"librdkafka refused to start: {reason}")
                c.rk = rk
                c.queue = api.queue_get_main(rk)
                if self.dispatcher.events & RD_KAFKA_EVENT_LOG:
                    api.set_log_queue(rk, NULL)
                failed = c.life != NEW  # a signal handler has closed it meanwhile
                if not failed:
                    c.life = RUNNING
                    KB_ADD32(&c.references, 1)
                    failed = (self.config.get("enable_sasl_queue") == "true" and not renew_tokens(rk)
                              or kb_thread_start(drainer_main, c) < 0)
                    if failed:
                        KB_ADD32(&c.references, -1)
                        c.life = NEW
                if failed:
                    api.queue_destroy(c.queue)
                    with nogil:
                        api.destroy(rk)
                    c.rk = NULL
                    c.queue = NULL
                    if c.life == CLOSED:
                        raise ProducerClosedError("the producer is closed")
                    raise RuntimeError("the system gave no thread for the producer")
            except BaseException:
                c.pid = 0
                self.dispatcher._detach()
                raise
        return 0

    cdef int _check_fork(self) except -1:
        if self.c.pid and self.c.pid != _this_pid:
            raise ForkError(
                "this producer was used before the fork and its threads are not in this process; make a new one here, "
                "for example in os.register_at_fork(after_in_child=…), gunicorn's post_fork or Celery's "
                "worker_process_init")
        return 0

    cdef int _enter(self, int refused_from=CLOSING) except -1:
        # librdkafka lives between _enter and _leave, and while a batch stands in line.
        cdef Client *c = self.c
        cdef bint closed
        self._check_fork()
        if KB_LOAD32(&c.life) == NEW:
            self._start()
        kb_mutex_lock(&c.mu)
        closed = c.life >= refused_from
        if not closed:
            c.entered += 1
        kb_mutex_unlock(&c.mu)
        if closed:
            raise ProducerClosedError("the producer is closed")
        return 0

    cdef void _leave(self) noexcept nogil:
        kb_mutex_lock(&self.c.mu)
        leave(self.c)
        kb_mutex_unlock(&self.c.mu)

    cdef int _check_fatal(self) except -1:
        cdef char errstr[512]
        cdef int code = KB_LOAD32(&self.c.fatal)
        if code:
            errstr[0] = 0
            if self.c.rk != NULL:
                api.fatal_error(self.c.rk, errstr, sizeof(errstr))
            raise fatal_error(errstr.decode("utf-8", "replace"), code)
        return 0

    def start(self) -> None:
        """Starts librdkafka, unless it is started: some 10 ms, more with TLS. Raises as sending does."""
        self._enter()
        self._leave()

    def started(self) -> bool:
        return KB_LOAD32(&self.c.life) != NEW

    # -- a batch

    def map(self, Batch batch not None, topic, envelopes, list rejected=None) -> None:
        """Phase 1. Raises and leaves nothing behind, or `batch` is ready for `send`.

        With a list `rejected`, an envelope that cannot be mapped does not raise: it is appended as ``(index,
        SerializationError)`` and not sent, and its outcome is a failure with the code ``_VALUE_SERIALIZATION``. It
        aborts no transaction. So is one for which there was no memory, or that ended with any other exception of
        foreign code, a BaseException too, which is then the error's cause. Errors of no single envelope are raised all
        the same, and then nothing is appended.
        """
        cdef _Mapping mapping = self.begin_mapping(batch, topic, envelopes, rejected)
        cdef int64_t offered_ns = kb_now_ns()
        while not self._map_slice(mapping, kb_now_ns() + MAP_SLICE):
            offer_gil(&offered_ns)

    def begin_mapping(self, Batch batch not None, topic, envelopes, list rejected=None) -> _Mapping:
        """Phase 1 for event loops: call `map_slice` with the answer until it is true. `rejected` is as for `map`."""
        cdef int64_t start = kb_now_ns()
        cdef _Mapping mapping
        self._check_fork()  # before a lock that a thread of the parent may have held
        mapping = begin_mapping(self.mapper, self.c, batch, topic, envelopes, rejected is not None)
        mapping.rejected_out = rejected
        self.map_ns += kb_now_ns() - start
        return mapping

    def map_slice(self, _Mapping mapping not None, double seconds) -> bool:
        """Maps for about so many seconds. True when `Batch` is ready to be sent; raises as `map` does."""
        self._check_fork()
        return self._map_slice(mapping, kb_now_ns() + <int64_t> (seconds * 1e9))

    cdef bint _map_slice(self, _Mapping mapping, int64_t end_ns) except -1:
        cdef int64_t start = kb_now_ns()
        if mapping.batch is None:
            raise TypeError("this mapping was not begun")
        cdef bint finished = mapping._run(end_ns)
        if finished:
            if mapping.rejected:
                mapping.rejected_out.extend(mapping.rejected)
            self.mapped += mapping.state.count
        self.map_ns += kb_now_ns() - start
        return finished

    def records(self, Batch batch not None) -> list:
        """What phase 1 made: ``(topic, partition, timestamp, key, value, headers)`` each; None where it is not sent."""
        cdef list records = []
        for i in range(batch.state.count):
            records.append(read_record(&batch.state.records[i]))
        return records

    def fail(self, Batch batch not None, envelopes, int index, int code, int rest_code) -> None:
        """Gives each envelope of a batch that is not enqueued a failed outcome: `code` at `index`, else `rest_code`."""
        cdef Py_ssize_t i
        drop_records(&batch.state)
        batch.state.count = len(envelopes)
        batch.outcomes = Outcomes.make(batch.state.count)
        for i in range(batch.state.count):
            batch.outcomes._items[i].state = FAILED
            batch.outcomes._items[i].error = <int16_t> (code if i == index else rest_code)
            batch.outcomes._items[i].partition = batch.outcomes._items[i].offset = -1
        batch.state.started_ns = batch.state.done_ns = kb_now_ns()
        KB_STORE32(&batch.state.done, 1)

    def send(self, Batch batch not None, timeout=None, *, bint wait, callback=None) -> bool:
        """Phase 2, and with `wait` the wait for the outcomes. False if `timeout` seconds have passed first.

        What is not enqueued by then, or by ``delivery.timeout.ms``, is settled as not sent; so is it when a signal
        handler raises, whose exception is passed on. `callback` is as in `Batch.add_done_callback`; if the producer
        refuses the batch, it is not called.
        """
        cdef int64_t deadline = deadline_after(timeout)
        self._begin(batch, deadline, None, callback, False)
        return self._drive(batch, deadline, FOR_BATCH if wait else NO_WAIT)

    def send_detached(self, Batch batch not None, timeout=None, *, enqueued=None, waker=None) -> None:
        """Phase 2, all of it on the drainer's thread: returns at once, for event loops.

        `enqueued` is called once nothing more of the batch will be handed to librdkafka, `waker` when it is done, both
        on the thread that wakes every event loop, so they must not block. `timeout` and refusals are as in `send`.
        """
        if enqueued is not None:
            batch.enqueued_waker = enqueued
            batch.state.tell_enqueued = 1
        self._begin(batch, deadline_after(timeout), waker, None, True)

    def abandon(self, Batch batch not None) -> None:
        """What of a detached batch is not enqueued yet is settled as not sent."""
        KB_STORE32(&batch.state.abandoned, 1)

    cdef int _begin(self, Batch batch, int64_t deadline, object waker, object callback, bint detached) except -1:
        # From here on there will be an answer, unless it raises.
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        self._enter()
        try:
            self._take(batch, deadline, waker, callback)
            state.detached = detached
            kb_mutex_lock(&c.mu)
            state.thread = 0 if detached else PyThread_get_thread_ident()
            join_line(c, state)  # from here on it keeps librdkafka alive, like `entered`
            if detached:
                if state.tell_enqueued and not state.listeners:
                    state.listeners = 1
                    c.eager += 1
                nudge_drainer(c)
            kb_mutex_unlock(&c.mu)
        finally:
            self._leave()
        return 0

    cdef int _take(self, Batch batch, int64_t deadline, object waker, object callback) except -1:
        # Entered. Raises, or the batch is the client's until its answer.
        look_for_fatal(self.c)
        self._check_fatal()
        self._adopt(batch, deadline, waker, callback)
        KB_ADD64(&self.c.waiting, batch.state.count)
        return 0

    cdef int _adopt(self, Batch batch, int64_t deadline, object waker, object callback) except -1:
        cdef BatchState *state = &batch.state
        if waker is not None or callback is not None:
            batch._listen(waker, callback)
        state.started_ns = kb_now_ns()
        state.deadline_ns = min(deadline, state.started_ns + self.delivery_timeout_ns)
        state.remaining = state.count + 1
        state.owner = <PyObject *> batch
        Py_INCREF(batch)
        KB_ADD32(&_pinned, 1)
        self.unreleased += 1
        self.batches += 1
        return 0

    # -- a batch that is one transaction: hold; enqueue_held, wait_for_outcome or give_up_held; conclude

    def hold(self, Batch batch not None, timeout=None, *, waker=None, refusal=None) -> None:
        """Takes a batch whose answer `conclude` gives: from here on it must come. Refusals are as in `send`.

        `waker` is as in `send_detached`. A `refusal` is an error that it raises, unless `send` would raise another:
        what is on hold has an answer, so a batch must be refused before.

        Until then librdkafka lives, also while the producer is being closed.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        self._enter()
        try:
            if refusal is not None:
                look_for_fatal(c)
                self._check_fatal()
                raise refusal
            self._take(batch, deadline_after(timeout), waker, None)
            state.remaining += 1
            state.detached = 1  # who waits for it must not enqueue it
            kb_mutex_lock(&c.mu)
            state.hold = 1
            KB_STORE32(&c.held, c.held + 1)
            c.undecided += state.count
            kb_mutex_unlock(&c.mu)
        finally:
            self._leave()

    def take_held(self, Batch batch not None) -> bool:
        """Whether the answer of a batch on hold is now the caller's business: true once."""
        if not batch.state.hold or batch.state.taken:
            return False
        batch.state.taken = 1
        return True

    def refuse_held(self, Batch batch not None, int code) -> None:
        """`give_up_held` and `conclude`, in one so that no signal comes between, unless another has taken the batch."""
        if self.take_held(batch):
            self.give_up_held(batch, code)
            self.conclude(batch, code)

    def end_held(self, Batch batch not None) -> None:
        """The answer of a batch on hold whose transaction was left in the middle, unless it has one.

        Waits for what is in flight of it, and Ctrl-C does not end that.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef bint fresh
        if not state.hold:
            return
        kb_mutex_lock(&c.mu)
        fresh = not state.in_line and KB_LOAD64(&state.remaining) == state.count + 2  # not yet enqueued
        kb_mutex_unlock(&c.mu)
        if fresh:
            self.give_up_held(batch, RD_KAFKA_RESP_ERR__PURGE_QUEUE)
        KB_STORE32(&state.abandoned, 1)
        with nogil:
            while advance(c, state, INT64_MAX, FOR_SETTLED) == AGAIN:
                pass
        self.conclude(batch, RD_KAFKA_RESP_ERR__PURGE_INFLIGHT, unknown=not fresh)

    def refusal(self, Batch batch not None) -> int:
        """0, or librdkafka's code of why a batch on hold is not to be enqueued any more."""
        if KB_LOAD32(&batch.state.abandoned) or KB_LOAD32(&self.c.shut):
            return RD_KAFKA_RESP_ERR__PURGE_QUEUE
        return RD_KAFKA_RESP_ERR__TIMED_OUT_QUEUE if kb_now_ns() >= batch.state.deadline_ns else 0

    def is_finishing(self) -> bool:
        """Whether the producer's time to close is over."""
        return KB_LOAD32(&self.c.life) >= FINISHING

    def enqueue_held(self, Batch batch not None) -> None:
        """Phase 2 of a batch on hold, on the drainer's thread."""
        cdef Client *c = self.c
        kb_mutex_lock(&c.mu)
        join_line(c, &batch.state)
        kb_mutex_unlock(&c.mu)

    def wait_for_outcome(self, Batch batch not None) -> bool:
        """Waits until nothing more of a batch on hold is enqueued, and all have an outcome or one has failed.

        False if one has failed.
        """
        self._drive(batch, INT64_MAX, FOR_OUTCOME)
        return not KB_LOAD32(&batch.state.failing)

    def wait_until_settled(self, Batch batch not None) -> None:
        """Waits until every envelope of a batch on hold has an outcome."""
        self._drive(batch, INT64_MAX, FOR_SETTLED)

    def give_up_held(self, Batch batch not None, int code) -> None:
        """Instead of `enqueue_held`: nothing of the batch was sent, for a reason that is librdkafka's `code`."""
        cdef BatchState *state = &batch.state
        give_up_rest(self.c, state, code)
        drop_records(state)
        settle(self.c, state, 1)

    def conclude(self, Batch batch not None, int code=0, *, bint unknown=False) -> None:
        """The answer of a batch on hold, all of whose envelopes have an outcome.

        With a `code` of librdkafka nothing of it counts as acknowledged; it is the code of those that were, or that
        were purged when the transaction was aborted. If `unknown`, what was acknowledged may be stored.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef Outcome *outcome
        cdef Py_ssize_t i
        cdef int64_t overturned = 0
        if code:
            for i in range(state.count):
                outcome = &batch.outcomes._items[i]
                if outcome.error == RD_KAFKA_RESP_ERR__VALUE_SERIALIZATION:
                    continue  # never sent, so never stored
                if outcome.state == ACKED:
                    outcome.state, outcome.error, outcome.offset = FAILED, <int16_t> code, -1
                    outcome.persistence = RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED
                    overturned += 1
                elif outcome.state == FAILED and (
                        outcome.error == RD_KAFKA_RESP_ERR__PURGE_QUEUE
                        or outcome.error == RD_KAFKA_RESP_ERR__PURGE_INFLIGHT):
                    outcome.error = <int16_t> code
                if not unknown and outcome.state == FAILED:
                    outcome.persistence = RD_KAFKA_MSG_STATUS_NOT_PERSISTED  # whatever was stored is aborted
                if outcome.state == FAILED:
                    KB_STORE32(&state.failing, 1)
        kb_mutex_lock(&c.mu)
        c.acked -= overturned
        count_failed(c, overturned)
        KB_STORE32(&c.held, c.held - 1)
        c.undecided -= state.count
        state.hold = 0
        KB_ADD64(&state.remaining, -1)
        finish(c, &state, 1, NULL)
        kb_cond_broadcast(&c.life_cond)
        kb_cond_signal(&c.drainer_cond)
        kb_mutex_unlock(&c.mu)

    def transaction_call(self, int call, int timeout_ms) -> tuple | None:
        """One of librdkafka's calls about transactions, in the order init, begin, commit, abort; for a batch on hold.

        Returns None, or ``(code, text, fatal, retriable, requires abort)``. It blocks for as long as it takes.
        """
        cdef Client *c = self.c
        cdef rd_kafka_error_t *error
        if c.rk == NULL:
            raise ProducerClosedError("the producer is not started, or closed")
        kb_mutex_lock(&c.mu)
        c.eager += 1  # an abort waits for reports, and somebody must take them
        nudge_drainer(c)
        kb_mutex_unlock(&c.mu)
        with nogil:
            if call == INIT_TRANSACTIONS:
                error = api.init_transactions(c.rk, timeout_ms)
            elif call == BEGIN_TRANSACTION:
                error = api.begin_transaction(c.rk)
            elif call == COMMIT_TRANSACTION:
                error = api.commit_transaction(c.rk, timeout_ms)
            else:
                error = api.abort_transaction(c.rk, timeout_ms)
            kb_mutex_lock(&c.mu)
            c.eager -= 1
            kb_mutex_unlock(&c.mu)
        if error == NULL:
            return None
        try:
            if api.error_is_fatal(error):
                look_for_fatal(c)
            return (
                KB_LOAD32(&c.fatal) or api.error_code(error), api.error_string(error).decode("utf-8", "replace"),
                bool(api.error_is_fatal(error)), bool(api.error_is_retriable(error)),
                bool(api.error_txn_requires_abort(error)))
        finally:
            api.error_destroy(error)

    # -- without librdkafka, for `kbatch.testing`, which overrides whatever would start it: NEW until it is CLOSED

    def start_in_memory(self) -> None:
        """Starts the dispatcher alone. Raises as `start` does."""
        cdef Client *c = self.c
        self._check_fork()
        with self.start_lock:
            if c.life == NEW and c.pid == 0:
                c.pid = _this_pid
                try:
                    self.dispatcher._attach(self)
                except BaseException:
                    c.pid = 0
                    self.dispatcher._detach()
                    raise
        if KB_LOAD32(&c.life) != NEW:
            raise ProducerClosedError("the producer is closed")

    def take_in_memory(self, Batch batch not None, *, waker=None, callback=None) -> tuple:
        """Takes a batch whose outcomes `settle_in_memory` gives. Returns its envelopes and what `records` does.

        `waker`, `callback` and refusals are as in `send` and `send_detached`, but for a fatal error.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef list records
        cdef int64_t sent = 0
        cdef Py_ssize_t i
        self.start_in_memory()
        records = self.records(batch)
        answer = batch.envelopes, records
        self._adopt(batch, INT64_MAX, waker, callback)
        for i in range(state.count):
            sent += state.records[i].flags == 0
        KB_ADD64(&c.in_flight, sent)
        return answer

    def settle_in_memory(self, Batch batch not None, list outcomes not None) -> None:
        """The answer of a batch that was taken: ``(code, persistence, partition, offset)`` of each envelope.

        Those that phase 1 has settled need none.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef Outcome *outcome
        cdef Record *record
        cdef Py_ssize_t i
        cdef int64_t offset, acked = 0, failed = 0, sent = 0
        cdef int16_t code
        cdef uint8_t persistence
        cdef int32_t partition
        if batch.core is not self or state.owner == NULL or state.records == NULL and state.count or state.done:
            raise ValueError("this batch waits for no outcomes")
        if len(outcomes) != state.count:
            raise ValueError(f"{len(outcomes)} outcomes for a batch of {state.count} envelopes")
        for i in range(state.count):
            outcome = &batch.outcomes._items[i]
            record = &state.records[i]
            if record.flags:
                failed += settle_unsent(outcome, record, RD_KAFKA_RESP_ERR_NO_ERROR)
                continue
            code, persistence, partition, offset = <tuple?> outcomes[i]
            if state.done:
                raise ValueError("this batch waits for no outcomes")  # a number's __int__ has given them
            outcome.state = FAILED if code else ACKED
            outcome.error, outcome.persistence, outcome.partition, outcome.offset = code, persistence, partition, offset
            sent += 1
            acked += not code
            failed += code != 0
        if failed:
            KB_STORE32(&state.failing, 1)
        drop_records(state)
        KB_ADD64(&c.in_flight, -sent)
        kb_mutex_lock(&c.mu)
        state.remaining = 0
        c.acked += acked
        count_failed(c, failed)
        finish(c, &state, 1, NULL)
        kb_mutex_unlock(&c.mu)
        release_idle(c)

    def shut_in_memory(self) -> None:
        """Refuses new batches. `end_in_memory` follows when each has its answer, then `close`."""
        with self.start_lock:
            KB_STORE32(&self.c.life, CLOSED)
            KB_STORE32(&self.c.shut, 1)

    def end_in_memory(self) -> None:
        """Lets the dispatcher end when all is told."""
        cdef Client *c = self.c
        kb_mutex_lock(&c.mu)
        c.dispatcher_stop = 1
        kb_cond_signal(&c.dispatcher_cond)
        kb_mutex_unlock(&c.mu)

    cdef bint _wait_for(self, Batch batch, int64_t deadline) except -1:
        if not KB_LOAD32(&batch.state.done):
            self._check_fork()
            return self._drive(batch, deadline, FOR_BATCH)
        batch._wait_on()
        if self.c.pid == _this_pid:
            release_idle(self.c, batch.state.count > RELEASE_SLICE)
        return True

    cdef bint _drive(self, Batch batch, int64_t deadline, int wait_for) except -1:
        # In slices, so that signals are seen. Usually the first does it all: the GIL is given up once per batch.
        # Between slices nothing is held that closing waits for: a signal handler may close the producer.
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef int answer
        if wait_for == FOR_BATCH:
            batch._wait_on()
        try:
            while True:
                with nogil:
                    answer = advance(c, state, deadline, wait_for)
                    KB_ADD32(&_wanting, 1)
                KB_ADD32(&_wanting, -1)
                if answer != AGAIN:
                    break
                PyErr_CheckSignals()
        except BaseException:
            if wait_for == FOR_BATCH:
                batch._wait_no_longer()
            if not state.detached and state.in_line:
                end_enqueueing(c, state, SHUT)
            kb_mutex_lock(&c.mu)
            nudge_drainer(c)
            kb_mutex_unlock(&c.mu)
            raise
        if wait_for == FOR_BATCH and answer != DONE:
            batch._wait_no_longer()
        release_idle(c, state.count > RELEASE_SLICE)
        return answer == DONE

    # -- the producer as a whole

    def in_flight(self) -> int:
        """How many accepted envelopes have no outcome, those in line included."""
        return KB_LOAD64(&self.c.waiting) + KB_LOAD64(&self.c.in_flight)

    def flush(self, timeout=None) -> int:
        cdef Client *c = self.c
        cdef int64_t deadline = deadline_after(timeout)
        cdef int64_t now, left
        if KB_LOAD32(&c.life) == NEW:
            return 0
        self._enter()
        hand_over_own(c)
        kb_mutex_lock(&c.mu)
        c.eager += 1
        nudge_drainer(c)
        kb_mutex_unlock(&c.mu)
        try:
            while something_left(c) or self.unreleased:
                with nogil:
                    now = kb_now_ns()
                    if now < deadline:
                        flush_slice(c, min(deadline - now, WAIT_SLICE))
                PyErr_CheckSignals()
                if now >= deadline or KB_LOAD32(&c.life) != RUNNING:
                    break
                if not something_left(c):
                    self._await_release(min(deadline, now + WAIT_SLICE))
        finally:
            kb_mutex_lock(&c.mu)
            c.eager -= 1
            kb_mutex_unlock(&c.mu)
            self._leave()
        release_idle(c)
        kb_mutex_lock(&c.mu)
        left = count_left(c)
        kb_mutex_unlock(&c.mu)
        return left

    cdef int _await_release(self, int64_t deadline) except -1:
        # Until all that is done was given back, and so its failures are known.
        release_idle(self.c)
        while self.unreleased and kb_now_ns() < deadline:
            with nogil:
                kb_mutex_lock(&self.c.mu)
                kb_cond_wait_until(&self.c.life_cond, &self.c.mu, kb_now_ns() + MS // 5)
                kb_mutex_unlock(&self.c.mu)
            PyErr_CheckSignals()
            release_idle(self.c)
        return 0

    def has_unreleased(self) -> bool:
        """Whether a batch was taken that has no outcome yet, or was not given back."""
        return self.unreleased != 0

    def await_release(self, double seconds) -> None:
        """Waits until every batch that is done was given back, and so its failures are known."""
        self._await_release(kb_now_ns() + <int64_t> (seconds * 1e9))

    def probe(self, str topic, double timeout_s) -> str | None:
        """Asks the brokers for metadata, which writes nothing. None if they answer, and the topic can be written to as
        far as they tell; else the reason. Blocks without the GIL.

        It asks for the topics that librdkafka knows and asks for by itself, so that no topic is made by it. What was
        never sent to by this producer is not among them; then it is the answer that counts.
        """
        cdef const rd_kafka_metadata_t *metadata = NULL
        cdef bytes name = topic.encode()
        cdef const char *name_p = name
        cdef int code, timeout_ms = <int> (timeout_s * 1000)
        self._enter()
        with nogil:
            code = api.metadata(self.c.rk, 0, NULL, &metadata, timeout_ms)
            self._leave()
        if code:
            return f"no broker answers: {error_text(code)[1]}"
        try:
            return what_hinders(metadata, name_p)
        finally:
            api.metadata_destroy(metadata)

    def purge(self) -> None:
        cdef Client *c = self.c
        if KB_LOAD32(&c.life) == NEW:
            return
        self._enter()
        with nogil:
            api.purge(c.rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT | RD_KAFKA_PURGE_F_NON_BLOCKING)
        self._leave()

    def close(self, timeout=None) -> int:
        """Refuses new batches, flushes until the deadline, purges what is left, ends librdkafka.

        Returns how many messages ended without acknowledgement. May be called again, from any thread.
        """
        cdef Client *c = self.c
        cdef int64_t deadline = deadline_after(timeout)
        cdef int64_t now, lost
        cdef bint mine
        if c.pid and c.pid != _this_pid:
            return 0
        if KB_LOAD32(&c.life) == NEW:
            with self.start_lock:  # a thread may be in the middle of starting it
                if c.life == NEW:
                    c.life = CLOSED
                    return 0
        if c.pid == 0:
            return 0  # never started
        kb_mutex_lock(&c.mu)
        mine = c.life == RUNNING
        if mine:
            begin_closing(c)
        kb_mutex_unlock(&c.mu)
        interrupted = None
        try:
            if mine:
                hand_over_own(c)
                while something_left(c):
                    with nogil:
                        now = kb_now_ns()
                        if now < deadline:
                            flush_slice(c, min(deadline - now, WAIT_SLICE))
                    if now >= deadline or KB_LOAD32(&c.fatal):
                        break
                    PyErr_CheckSignals()
        except BaseException as error:
            interrupted = error
        if mine:
            kb_mutex_lock(&c.mu)
            begin_finishing(c)
            kb_mutex_unlock(&c.mu)
            deadline = max(deadline, kb_now_ns() + 1000 * MS)  # what was purged reports within this
        self._wait_until_closed(deadline)
        release_idle(c)
        self.dispatcher._join(max(0.0, (deadline - kb_now_ns()) / 1e9) if deadline != INT64_MAX else None)
        if interrupted is not None:
            raise interrupted
        kb_mutex_lock(&c.mu)
        lost = c.lost + count_left(c)  # at the deadline the drainer may still count
        kb_mutex_unlock(&c.mu)
        return lost

    cdef int _wait_until_closed(self, int64_t deadline) except -1:
        cdef Client *c = self.c
        cdef bint over = False
        while not over:
            with nogil:
                kb_mutex_lock(&c.mu)
                over = c.life >= CLOSED
                if not over:
                    kb_cond_wait_until(&c.life_cond, &c.mu, min(deadline, kb_now_ns() + WAIT_SLICE // 10))
                    over = c.life >= CLOSED
                kb_mutex_unlock(&c.mu)
                over = over or kb_now_ns() >= deadline
            if not over:
                PyErr_CheckSignals()
        return 0

    def closed(self) -> bool:
        return KB_LOAD32(&self.c.life) >= CLOSING

    def name(self) -> str | None:
        """librdkafka's name of the instance; None before the first use and after close."""
        cdef str name = None
        if KB_LOAD32(&self.c.life) == RUNNING and self.c.pid == _this_pid:
            name = api.name(self.c.rk).decode()
        return name

    def counters(self) -> dict:
        cdef Client *c = self.c
        cdef int64_t acked, failed, enqueue_ns, pooled
        self._check_fork()
        kb_mutex_lock(&c.mu)
        acked, failed, enqueue_ns = c.acked, c.failed, c.enqueue_ns
        pooled = c.spare_block_count * <int64_t> ARENA_BLOCK
        if c.spare_records != NULL:
            pooled += c.spare_records_capacity * <int64_t> sizeof(Record)
        kb_mutex_unlock(&c.mu)
        if self.mapper is not None:
            pooled += self.mapper._pooled()
        return {
            "batches": self.batches,
            "envelopes": self.mapped,
            "acked": acked,
            "failed": failed,
            "in_flight": KB_LOAD64(&c.in_flight),
            "map_ns": self.map_ns,
            "enqueue_ns": enqueue_ns,
            "pooled_bytes": pooled,
            "pinned_buffers": KB_LOAD32(&_pinned),
        }

    def inject_fatal_error(self, int code, str reason) -> None:
        """Puts librdkafka's idempotent producer into its fatal state, for tests."""
        cdef bytes text = reason.encode()
        self._enter()
        api.test_fatal_error(self.c.rk, code, text)
        self._leave()

    def set_oauth_token(self, answer) -> None:
        """Hands over what an ``oauth_cb`` returned, in the forms that confluent-kafka takes.

        ``(token, expiry in seconds since 1970[, principal[, extensions]])``. Raises what is wrong with it, without
        showing it.
        """
        cdef char errstr[512]
        cdef const char **pointers
        cdef int code
        cdef int64_t lifetime_ms
        if not isinstance(answer, tuple) or not 2 <= len(answer) <= 4:
            found = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type_name(answer)
            raise TypeError(
                f"oauth_cb must return (token, expiry in seconds since 1970[, principal[, extensions]]), not {found}")
        cdef bytes token = oauth_text("token", answer[0])
        cdef double expiry = answer[1]
        cdef bytes principal = oauth_text("principal", answer[2]) if len(answer) > 2 else b""
        extensions = answer[3] if len(answer) > 3 else {}
        if not isinstance(extensions, dict):
            raise TypeError(f"oauth_cb's extensions must be a dict, not {type_name(extensions)}")
        cdef list flat = []
        for name, value in extensions.items():
            flat.append(oauth_text("extension", name))
            flat.append(oauth_text("extension", value))
        if not 0 <= expiry < 1e12:  # what is no number of milliseconds must not be cast to one
            raise ValueError(f"oauth_cb's expiry must be seconds since 1970, not {expiry}")
        lifetime_ms = <int64_t> (expiry * 1000)
        pointers = <const char **> kb_malloc((len(flat) + 1) * sizeof(char *))
        if pointers == NULL:
            raise MemoryError()
        try:
            for i in range(len(flat)):
                pointers[i] = flat[i]
            self._enter(FINISHING)  # what is flushed while closing may need a token
            code = api.oauthbearer_set_token(self.c.rk, token, lifetime_ms, principal,
                                             pointers, len(flat), errstr, sizeof(errstr))
            self._leave()
        finally:
            kb_free(pointers)
        if code:
            reason = errstr.decode("utf-8", "replace")
            # librdkafka quotes an extension at the end.
            raise ValueError(reason.partition(": ")[0] if flat else reason)

    def set_oauth_failure(self, str reason) -> None:
        cdef bytes text = reason.encode()
        self._enter(FINISHING)
        api.oauthbearer_set_token_failure(self.c.rk, text)
        self._leave()


cdef bytes oauth_text(str what, text):
    cdef bytes encoded
    if not isinstance(text, str):
        raise TypeError(f"oauth_cb's {what} must be str, not {type_name(text)}")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = None
    # Outside of the handler: its error holds the text.
    if encoded is None or b"\0" in encoded:
        raise ValueError(f"oauth_cb's {what} is not UTF-8 text without a NUL character")
    return encoded


cdef class TokenRefresh:
    """A call of ``oauth_cb`` whose token goes to librdkafka.

    Here rather than in Python: a traceback with local variables must show neither the token nor the configuration.
    """

    cdef readonly object user_callback
    cdef object find_core
    cdef str config

    def __init__(self, oauth_cb, str config, find_core):
        self.user_callback, self.config, self.find_core = oauth_cb, config, find_core

    def __call__(self) -> None:
        cdef Core core = self.find_core()
        if core is None:
            return
        try:
            core.set_oauth_token(self.user_callback(self.config))
        except ProducerClosedError:
            return  # nobody needs it any more
        except BaseException as error:
            # Also for SystemExit: librdkafka does not ask again before it has an answer.
            try:
                core.set_oauth_failure(f"oauth_cb failed: {type_name(error)}")
            except ProducerClosedError:
                pass
            raise


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


cdef tuple read_record(Record *record):
    cdef char text[UUID_TEXT]
    cdef list headers = []
    cdef Header *h
    cdef int i
    if record.flags:
        return None
    for i in range(record.header_count):
        h = &record.headers[i]
        name = h.name[:h.name_len].decode()
        if h.value_len == VALUE_NULL:
            headers.append((name, None))
        elif h.value_len < 0:
            headers.append((name, text[:write_value(h, text)]))
        else:
            headers.append((name, h.value[:h.value_len]))
    return (record.topic.name.decode(), record.partition, record.timestamp,
            None if record.key == NULL else record.key[:record.key_len],
            None if record.value == NULL else record.value[:record.value_len], headers)


cdef class Dispatcher:
    """The one thread that takes the GIL for what happened without it.

    It wakes event loops itself and hands user callbacks to the callback thread, so that a slow callback delays
    neither. ``on_*`` are called here with plain values and must not block; the Python layer turns them into the
    user's callbacks.
    """

    cdef Client *c                   # a reference, while the thread runs
    cdef readonly int events         # event types to ask librdkafka for, besides delivery reports
    cdef readonly object throttle_cb
    cdef CallbackThread callback_thread
    cdef tuple other_threads         # more of them, that end with the producer
    cdef object on_error
    cdef object on_stats
    cdef object on_log
    cdef object on_oauth
    cdef object thread

    def __init__(self, CallbackThread callback_thread not None, other_threads=(), *, on_error=None, on_stats=None,
                 on_log=None, on_oauth=None, throttle_cb=None):
        self.callback_thread = callback_thread
        self.other_threads = other_threads
        self.on_error, self.on_stats, self.on_log, self.on_oauth = on_error, on_stats, on_log, on_oauth
        self.throttle_cb = throttle_cb
        self.events = (
            (RD_KAFKA_EVENT_ERROR if on_error is not None else 0)
            | (RD_KAFKA_EVENT_STATS if on_stats is not None else 0)
            | (RD_KAFKA_EVENT_LOG if on_log is not None else 0)
            | (RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH if on_oauth is not None else 0))

    def __dealloc__(self):
        if self.c != NULL:
            client_drop(self.c)

    def _attach(self, Core core not None) -> None:
        self.thread = threading.Thread(target=self._run, name="kbatch-dispatcher", daemon=True)
        self.c = core.c
        self.c.dispatcher_stop = 0
        KB_ADD32(&self.c.references, 1)
        try:
            self.thread.start()
        except BaseException:
            # Ctrl-C may come after the thread has begun: then it ends by _detach. If it begins after this, by _run.
            if self.thread.ident is None:
                self.thread = None
                client_drop(self.c)
                self.c = NULL
            raise

    def _detach(self) -> None:
        if self.c == NULL:
            return
        kb_mutex_lock(&self.c.mu)
        self.c.dispatcher_stop = 1
        kb_cond_signal(&self.c.dispatcher_cond)
        kb_mutex_unlock(&self.c.mu)
        try:
            self.thread.join()
        except RuntimeError:
            pass  # interrupted while it was started: `_run` sees the end
        client_drop(self.c)
        self.c = NULL

    def _join(self, timeout) -> None:
        """Waits for the thread and the callback thread to end, unless the caller comes from one of them."""
        cdef int64_t deadline = deadline_after(timeout)
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout)
        self.callback_thread.join(None if timeout is None else max(0.0, (deadline - kb_now_ns()) / 1e9))

    def _run(self) -> None:
        cdef Client *c = self.c
        cdef BatchState *batch
        cdef BatchState *answered = NULL
        cdef Notice *notice
        cdef bint stop = False
        if c == NULL or self.thread is not threading.current_thread():
            return
        while not stop:
            with nogil:
                kb_mutex_lock(&c.mu)
                while not (c.news_first != NULL or c.notice_first != NULL or c.dispatcher_nudge or c.dispatcher_stop):
                    kb_cond_wait(&c.dispatcher_cond, &c.mu)
                batch = c.news_first
                c.news_first = c.news_last = NULL
                notice = c.notice_first
                c.notice_first = c.notice_last = NULL
                stop = c.dispatcher_stop and batch == NULL and notice == NULL
                if notice != NULL:
                    c.entered += 1  # librdkafka must outlive its events
                kb_mutex_unlock(&c.mu)
                KB_ADD32(&_wanting, 1)
            KB_ADD32(&_wanting, -1)
            while batch != NULL:
                batch = self._answer(batch, &answered)
            while answered != NULL:
                # This may give back the last reference that kept the Core; the state is not touched after it.
                batch = answered
                answered = batch.next_news
                release_owner(batch)
            if notice != NULL:
                self._pass_on(notice)
                kb_mutex_lock(&c.mu)
                leave(c)
                kb_mutex_unlock(&c.mu)
            release_idle(c)
        for thread in (self.callback_thread, *self.other_threads):
            thread.stop()

    cdef BatchState *_answer(self, BatchState *state, BatchState **answered) noexcept:
        # Tells what is new about a batch; returns the next one that has news. To give a batch back takes long, so those
        # that are done are collected: nobody else looks at them any more.
        cdef Batch batch = <Batch> state.owner
        cdef BatchState *following
        cdef bint done
        kb_mutex_lock(&self.c.mu)
        following = state.next_news
        state.has_news = 0  # if it is not done yet, it will be posted again
        done = state.done
        kb_mutex_unlock(&self.c.mu)
        if batch.enqueued_waker is not None:
            waker, batch.enqueued_waker = batch.enqueued_waker, None
            self._wake(waker)
        if done:
            self._answer_done(batch)
            state.next_news = answered[0]
            answered[0] = state
        return following

    cdef void _answer_done(self, Batch batch) noexcept:
        # Loops first: they wait for a batch, callbacks are only told.
        cdef list wakers = batch.wakers
        cdef list callbacks = batch.callbacks
        batch.wakers = None
        if wakers is not None:
            batch.waited += <int> len(wakers)
            for waker in wakers:
                self._wake(waker)
        if callbacks is not None:
            for job in callbacks:  # they may grow meanwhile: who comes later must not overtake
                self.callback_thread._append_surely(job)
            batch.callbacks = None

    cdef void _wake(self, object waker) noexcept:
        while True:
            try:
                waker()
                return
            except MemoryError:  # who waits would wait for ever
                nap()
            except Exception:
                _logger.exception("could not wake an event loop")
                return

    cdef void _pass_on(self, Notice *notice) noexcept:
        cdef Notice *following
        while notice != NULL:
            following = notice.next
            try:
                self._pass_one(notice)
            except Exception:
                if notice.event != NULL:
                    drop_event(self.c, notice.event)
                    notice.event = NULL
                _logger.exception("could not pass on an event of librdkafka")
            free_notice(notice)
            notice = following

    cdef int _pass_one(self, Notice *notice) except -1:
        cdef rd_kafka_event_t *event = notice.event
        cdef const char *fac
        cdef const char *text
        cdef char errstr[512]
        cdef int kind, level, code
        if event == NULL:
            self.throttle_cb(notice.broker_name.decode("utf-8", "replace"), notice.broker_id, notice.throttle_ms)
            return 0
        kind = api.event_type(event)
        if kind == RD_KAFKA_EVENT_ERROR:
            code, text = api.event_error(event), api.event_error_string(event)
            if code == RD_KAFKA_RESP_ERR__FATAL:  # its cause, as confluent-kafka tells it
                errstr[0] = 0
                code, text = api.fatal_error(self.c.rk, errstr, sizeof(errstr)), errstr
            self.on_error(code, text.decode("utf-8", "replace"), bool(api.event_error_is_fatal(event)))
        elif kind == RD_KAFKA_EVENT_STATS:
            self.on_stats(api.event_stats(event).decode())
        elif kind == RD_KAFKA_EVENT_LOG:
            if api.event_log(event, &fac, &text, &level) == 0:
                self.on_log(level, fac.decode("utf-8", "replace"), api.name(self.c.rk).decode("utf-8", "replace"),
                            text.decode("utf-8", "replace"))
        elif kind == RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH:
            text = api.event_config_string(event)
            self.on_oauth(None if text == NULL else text.decode())  # as confluent-kafka: None without the key
        return 0
