# Where Python meets the client. Each long wait is cut into slices, so that Ctrl-C works.

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


cdef bint _map_slice(Core core, _Mapping mapping, int64_t end_ns) except -1:
    cdef int64_t start = kb_now_ns()
    if mapping.batch is None:
        raise TypeError("this mapping was not begun")
    cdef bint finished = mapping._run(end_ns)
    if finished:
        if mapping.rejected:
            mapping.rejected_out.extend(mapping.rejected)
        core.mapped += mapping.state.count
    core.map_ns += kb_now_ns() - start
    return finished


# A fork waits for this. In a child that is forked while librdkafka initialises OpenSSL, exit() hangs in OpenSSL's own
# exit handler. Re-entrant: a signal handler may fork.
cdef object _starting = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


cdef class Core:
    """One producer's client, started at its first use."""

    def __cinit__(self):
        self.undelivered = Undelivered("messages were not acknowledged")
        self.kind, self.what = RD_KAFKA_PRODUCER, "producer"
        self.c = client_make()
        if self.c == NULL:
            raise MemoryError("no memory for a client")
        self.c.life = CLOSED  # without __init__ it takes nothing

    def __init__(self, Config config not None, Mapper mapper, Dispatcher dispatcher not None, *,
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
            c.dispatcher_stop = 1  # that of a core in memory, which no drainer ends
            kb_cond_signal(&c.dispatcher_cond)
        kb_cond_signal(&c.drainer_cond)
        kb_mutex_unlock(&c.mu)
        client_drop(c)

    # -- life

    cdef void _configure(self, rd_kafka_conf_t *conf) noexcept:
        api.conf_set_events(conf, RD_KAFKA_EVENT_DR | self.dispatcher.events)
        api.conf_on_new(conf, b"kbatch", watch_requests, self.c)

    cdef void _begin_reading(self) noexcept:
        pass  # producers do not

    cdef int _start(self) except -1:
        cdef Client *c = self.c
        cdef char errstr[512]
        cdef rd_kafka_conf_t *conf
        cdef rd_kafka_t *rk
        cdef bint failed, recycles, renews
        cdef int kind = self.kind
        with self.start_lock:
            if KB_LOAD32(&c.life) != NEW:
                return 0
            if self.is_starting:
                raise RuntimeError(
                    f"reentrant use: a signal handler or a finalizer uses the {self.what} while the thread that it has "
                    "interrupted starts it")
            self.is_starting = True
            c.pid = _this_pid  # from here on a forked child must not use it, not even to start it
            try:
                if self.on_start is not None:
                    self.on_start()
                self.dispatcher._attach(self)
                # A plugin may change the headers of a message.
                recycles = _lists_are_recycled and not self.config.get("plugin.library.paths")
                renews = self.config.get("enable_sasl_queue") == "true"
                conf = api.conf_dup(self.config.conf)
                api.conf_set_opaque(conf, c)
                self._configure(conf)
                if KB_FORKS:
                    api.conf_set_resolve_cb(conf, resolve)
                if self.dispatcher.throttle_cb is not None:
                    api.conf_set_throttle_cb(conf, on_throttle)
                c.events = self.dispatcher.events
                c.events_expected = c.events != 0 or self.dispatcher.throttle_cb is not None
                with _starting, nogil:
                    rk = api.new(kind, conf, errstr, sizeof(errstr))
                if rk == NULL:
                    api.conf_destroy(conf)
                    reason = self.config.without_hidden(errstr.decode("utf-8", "replace"))
                    raise ConfigError(f"librdkafka refused to start: {reason}")
                # From here on nothing raises that would leave an instance of librdkafka behind.
                c.rk = rk
                c.recycles = recycles
                c.queue = api.queue_get_main(rk)
                self._begin_reading()
                if self.dispatcher.events & RD_KAFKA_EVENT_LOG:
                    api.set_log_queue(rk, NULL)
                failed = c.life != NEW  # a signal handler has closed it meanwhile
                if not failed:
                    c.life = RUNNING
                    KB_ADD32(&c.references, 1)
                    failed = renews and not renew_tokens(rk) or kb_thread_start(drainer_main, c) < 0
                    if failed:
                        KB_ADD32(&c.references, -1)
                        c.life = NEW
                if failed:
                    drop_queues(c)
                    with nogil:
                        api.destroy(rk)
                    c.rk = NULL
                    if c.life == CLOSED:
                        raise ProducerClosedError(f"the {self.what} is closed")
                    raise RuntimeError(f"the system gave no thread for the {self.what}")
            except BaseException:
                c.pid = 0
                self.dispatcher._detach()
                raise
            finally:
                self.is_starting = False
        return 0

    cdef int _check_fork(self) except -1:
        if self.c.pid and self.c.pid != _this_pid:
            raise ForkError(
                f"this {self.what} was used before the fork and its threads are not in this process; make a new one "
                "here, for example in os.register_at_fork(after_in_child=…), gunicorn's post_fork or Celery's "
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
            raise ProducerClosedError(f"the {self.what} is closed")
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
        aborts no transaction. An envelope for which there was no memory, or for which foreign code raised any other
        exception, is appended in the same way; the exception, which may be a BaseException, is then the error's cause.
        Errors of no single envelope are raised all the same, and then nothing is appended.
        """
        cdef _Mapping mapping = self.begin_mapping(batch, topic, envelopes, rejected)
        cdef int64_t offered_ns = kb_now_ns()
        while not _map_slice(self, mapping, kb_now_ns() + MAP_SLICE):
            offer_gil(&offered_ns)

    def begin_mapping(self, Batch batch not None, topic, envelopes, list rejected=None) -> _Mapping:
        """Phase 1 in slices: call `map_slice` with the answer until it is true. `rejected` is as for `map`."""
        cdef int64_t start = kb_now_ns()
        cdef _Mapping mapping
        self._check_fork()  # before a lock that a thread of the parent may have held
        mapping = begin_mapping(self.mapper, batch, topic, envelopes, rejected is not None)
        batch.outcomes = Outcomes.make(batch.state.count)
        batch.state.outcomes = batch.outcomes._items
        mapping.rejected_out = rejected
        self.map_ns += kb_now_ns() - start
        return mapping

    def map_slice(self, _Mapping mapping not None, double seconds) -> bool:
        """Maps for about so many seconds. True when `Batch` is ready to be sent; raises as `map` does."""
        self._check_fork()
        return _map_slice(self, mapping, kb_now_ns() + <int64_t> (seconds * 1e9))

    def records(self, Batch batch not None) -> list:
        """What phase 1 made: ``(topic, partition, timestamp, key, value, headers)`` each; None where it is not sent."""
        return batch._records()

    def map_packed(self, Batch batch not None, packed, list rejected=None, *, deliver_by=None) -> None:
        """In place of phase 1: what was packed is ready for `send`. The batch keeps the bytes until it is done.

        `rejected` is as for `map`, for what is damaged, too large or not bytes; other exceptions are raised.
        `deliver_by` has of each record the microseconds since 1970 after which it is not sent, or None.
        """
        self._check_fork()
        batch.looked = True  # who sends them looks at their outcomes: there are no envelopes to tell of
        map_packed(self.mapper, batch, packed, rejected, deliver_by)
        batch.outcomes = Outcomes.make(batch.state.count)
        batch.state.outcomes = batch.outcomes._items

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
        """Phase 2, all of it on the drainer's thread: returns at once.

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
            self._accept(batch, deadline, waker, callback)
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

    cdef int _accept(self, Batch batch, int64_t deadline, object waker, object callback) except -1:
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
            if not state.detached and state.is_enqueuing:
                end_enqueueing(c, state, SHUT)
            kb_mutex_lock(&c.mu)
            if state.thread and state.is_enqueuing:  # a signal handler has flushed, so the drainer enqueues it
                KB_STORE32(&state.abandoned, 1)
                c.look_ns = 0
            nudge_drainer(c)
            kb_mutex_unlock(&c.mu)
            raise
        if wait_for == FOR_BATCH and answer != DONE:
            batch._wait_no_longer()
        release_idle(c, state.count > RELEASE_SLICE)
        return answer == DONE

    # -- the producer as a whole

    def without_outcome(self) -> int:
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
        cdef int64_t acked, failed, enqueue_ns, pooled, lists
        self._check_fork()
        kb_mutex_lock(&c.mu)
        acked, failed, enqueue_ns = c.acked, c.failed, c.enqueue_ns
        lists = c.returned_bytes
        if c.lists != NULL:
            lists += <int64_t> sizeof(ListPool) + KB_LOAD64(&c.lists.pooled_bytes)
        kb_mutex_unlock(&c.mu)
        pooled = pool_bytes(&c.pool) + lists
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
