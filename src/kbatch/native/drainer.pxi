# The drainer: polls when nobody else does, enqueues detached batches, and ends librdkafka.

cdef int64_t DRAINER_NAP = 5 * MS      # how long callers may leave the queue alone before the drainer takes over
cdef int64_t FINISH_PURGE = 100 * MS   # between two purges while finishing
cdef int64_t FATAL_PURGE = 1000 * MS   # between two purges of what is queued, after a fatal error
cdef int64_t FATAL_GRACE = 2000 * MS   # for librdkafka to see that the time of its requests is over
cdef int64_t LAST_LOOK = 50 * MS       # for the events that are on the queue when nothing is in flight any more
cdef int64_t LAST_WORDS = 1000 * MS    # for the dispatcher to pass them on; it may need the GIL, or have none any more


cdef struct Drainer:
    # On the drainer's stack: what it sees in a round, and what it remembers.
    int64_t now
    int64_t in_flight
    int64_t idle_ns         # how long it may sleep when there is nothing to do; 0: until it is signalled
    int64_t seen_polls      # Client.polls when it left the reports to the callers; -1: it has not
    int64_t purge_after_ns
    int64_t finished_ns     # when it looked for the last events; 0: not yet


cdef void drainer_main(void *arg) noexcept nogil:
    cdef Client *c = <Client *> arg
    cdef Drainer d
    cdef Notice *unread
    memset(&d, 0, sizeof(Drainer))
    d.seen_polls = -1
    kb_mutex_lock(&c.mu)
    while True:
        d.now = kb_now_ns()
        d.in_flight = KB_LOAD64(&c.in_flight)
        if has_finished(c, &d):
            if has_told_all(c, &d):
                break
        elif not (purge_if_due(c, &d) or serve_detached(c, &d) or drop_idle_lists(c, &d)):
            poll_or_sleep(c, &d)
    # Before the lock is given back: an event taken by the dispatcher after this would outlive librdkafka.
    unread = c.notice_first
    c.notice_first = c.notice_last = NULL
    kb_mutex_unlock(&c.mu)
    drop_notices(unread)
    end_librdkafka(c)
    client_drop(c)


# -- a round. Each function has the lock on entry and exit. Those that `drainer_main` calls in a row answer True if they
# let the lock go meanwhile: what the drainer has seen is then out of date, and it begins another round.

cdef inline bint has_finished(Client *c, Drainer *d) noexcept nogil:
    return c.life == FINISHING and d.in_flight == 0 and c.entered == 0 and nobody_in_line(c) and c.held == 0


cdef bint has_told_all(Client *c, Drainer *d) noexcept nogil:
    # Whether librdkafka may go. What happened before the end is still told.
    if d.finished_ns == 0 and c.events_expected:
        d.finished_ns = d.now
        kb_mutex_unlock(&c.mu)
        while poll_once(c, 0, NULL) and kb_now_ns() < d.finished_ns + LAST_LOOK:
            pass
        kb_mutex_lock(&c.mu)
        return False
    if c.notice_first == NULL or d.now > d.finished_ns + LAST_WORDS:
        return True
    drainer_sleep(c, FINISH_PURGE)  # until the dispatcher, which enters to pass them on, leaves
    return False


cdef bint purge_if_due(Client *c, Drainer *d) noexcept nogil:
    # Again and again: a slice of an enqueuer, or a request that failed, may bring messages back. A request under way
    # may still be appended, after what another producer sends meanwhile: it gets all of its time.
    cdef int flags = RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_NON_BLOCKING
    if d.in_flight == 0 or d.now < d.purge_after_ns or not (c.life == FINISHING or c.fatal_since_ns):
        return False
    d.purge_after_ns = d.now + (FINISH_PURGE if c.life == FINISHING else FATAL_PURGE)
    if c.life == FINISHING or d.now > c.fatal_since_ns + c.socket_timeout_ns + FATAL_GRACE:
        flags |= RD_KAFKA_PURGE_F_INFLIGHT
    kb_mutex_unlock(&c.mu)
    api.purge(c.rk, flags)
    kb_mutex_lock(&c.mu)
    return True


cdef bint serve_detached(Client *c, Drainer *d) noexcept nogil:
    # Ends a batch whose time is over, or enqueues the one that has the turn.
    cdef BatchState *over = NULL
    cdef int answer
    if c.detached and (d.now >= c.look_ns or c.shut):
        over = next_over(c, d.now)
    if over != NULL:
        over.ready = 0
        answer = SHUT if c.shut or KB_LOAD32(&over.abandoned) else LATE
        kb_mutex_unlock(&c.mu)
        end_enqueueing(c, over, answer)
        kb_mutex_lock(&c.mu)
        return True
    if is_detached(c.turn):
        nudge_dispatcher(c)
        enqueue_detached(c)
        return True
    return False


cdef bint drop_idle_lists(Client *c, Drainer *d) noexcept nogil:
    # Or says how long the drainer may sleep until then. Nobody wakes it when the last caller has left.
    d.idle_ns = WAIT_SLICE if c.detached else 0
    if c.lists == NULL:
        return False
    if d.in_flight or c.callers or not nobody_in_line(c):
        if d.idle_ns == 0:
            d.idle_ns = LISTS_IDLE
        return False
    d.idle_ns = c.lists_used_ns + LISTS_IDLE - d.now
    if d.idle_ns > 0:
        return False
    drop_lists(c)
    return True


cdef void poll_or_sleep(Client *c, Drainer *d) noexcept nogil:
    cdef int64_t nap_ns = DRAINER_NAP if c.idle_done != NULL else d.idle_ns
    if (c.leader != NULL or c.callers) and c.life == RUNNING:
        d.seen_polls = -1
        drainer_sleep(c, DRAINER_NAP if d.in_flight else nap_ns)
    elif c.eager or c.events_expected or c.life >= CLOSING or c.fatal_since_ns:
        if d.in_flight == 0 and not c.events_expected and c.life == RUNNING:
            drainer_sleep(c, nap_ns)
            nudge_dispatcher(c)
        else:
            drainer_poll(c, d)
    elif d.in_flight == 0 and c.idle_done == NULL:
        drainer_sleep(c, d.idle_ns)
    elif d.seen_polls != c.polls:
        # A caller was here a moment ago and may come back: taking its reports away would only cost.
        d.seen_polls = c.polls
        drainer_sleep(c, DRAINER_NAP)
    elif d.in_flight == 0:
        nudge_dispatcher(c)
        drainer_sleep(c, DRAINER_NAP)
    else:
        drainer_poll(c, d)


cdef void drainer_poll(Client *c, Drainer *d) noexcept nogil:
    cdef int slice_ms = 10 if c.life == FINISHING else 100
    nudge_dispatcher(c)
    if c.detached:
        slice_ms = <int> min(slice_ms, (c.look_ns - d.now + MS - 1) // MS)
    c.drainer_polls = 1
    kb_mutex_unlock(&c.mu)
    if not poll_once(c, slice_ms, &c.drainer_self):
        look_for_fatal(c)
    kb_mutex_lock(&c.mu)
    c.drainer_polls = 0
    KB_STORE32(&c.drainer_is_due, 0)


# -- detached batches

cdef BatchState *first_over(Client *c, BatchState *batch, int64_t now) noexcept nogil:
    # From `batch` on: a detached one whose time is over, or that nobody wants.
    while batch != NULL:
        if batch.detached:
            if c.shut or KB_LOAD32(&batch.abandoned) or now >= batch.deadline_ns:
                return batch
            c.look_ns = min(c.look_ns, batch.deadline_ns)
        batch = batch.next_in_line
    return NULL


cdef BatchState *next_over(Client *c, int64_t now) noexcept nogil:
    # Under the lock: a detached batch to end before it is its turn. Without one, the next look is later.
    cdef BatchState *over
    c.look_ns = now + WAIT_SLICE
    over = first_over(c, c.line.first, now)
    if over == NULL:
        over = first_over(c, c.behind.first, now)
    if over != NULL:
        c.look_ns = now
    return over


cdef void enqueue_detached(Client *c) noexcept nogil:
    # Under the lock on entry and exit: one turn of a batch which no thread of its own enqueues.
    cdef BatchState *batch = c.turn
    cdef int answer
    kb_mutex_unlock(&c.mu)
    answer = enqueue_slice(c, batch, kb_now_ns() + WAIT_SLICE)
    if answer != AGAIN:
        end_enqueueing(c, batch, answer)
    kb_mutex_lock(&c.mu)
    if answer == AGAIN:
        end_turn(c, batch, NULL)


# -- its sleep

cdef void nudge_drainer(Client *c) noexcept nogil:
    # Under the lock. A napping drainer looks by itself soon; only eagerness makes it look now.
    if c.drainer_parked:
        if KB_LOAD64(&c.in_flight) > 0 or c.eager or c.events_expected or is_detached(c.turn):
            kb_cond_signal(&c.drainer_cond)
    elif c.drainer_asleep:
        if c.eager or is_detached(c.turn):
            kb_cond_signal(&c.drainer_cond)
    elif c.drainer_polls and is_detached(c.turn):
        KB_STORE32(&c.drainer_is_due, 1)
        api.queue_yield(c.queue)


cdef void nudge_dispatcher(Client *c) noexcept nogil:
    # Under the lock: nobody who holds the GIL has given these batches back yet.
    if c.idle_done != NULL and not c.dispatcher_nudge:
        c.dispatcher_nudge = 1
        kb_cond_signal(&c.dispatcher_cond)


cdef void drainer_sleep(Client *c, int64_t ns) noexcept nogil:
    # Under the lock. `ns` of 0: until signalled. What comes meanwhile ends a sleep that is longer than a nap.
    if ns > DRAINER_NAP:
        c.drainer_parked = 1
        kb_cond_wait_until(&c.drainer_cond, &c.mu, kb_now_ns() + ns)
        c.drainer_parked = 0
    elif ns:
        c.drainer_asleep = 1
        kb_cond_wait_until(&c.drainer_cond, &c.mu, kb_now_ns() + ns)
        c.drainer_asleep = 0
    else:
        c.drainer_parked = 1
        kb_cond_wait(&c.drainer_cond, &c.mu)
        c.drainer_parked = 0


# -- the end

cdef void end_librdkafka(Client *c) noexcept nogil:
    # Nothing is in flight and no thread is inside a call. Events that nobody took go first: they hold references.
    cdef Topic *topic
    cdef rd_kafka_event_t *event
    while True:
        event = api.queue_poll(c.queue, 0)
        if event == NULL:
            break
        api.event_destroy(event)
    kb_mutex_lock(&c.pool.mu)
    topic = c.pool.topics  # what is mapped meanwhile has no handle
    kb_mutex_unlock(&c.pool.mu)
    while topic != NULL:
        if topic.handle != NULL:
            api.topic_destroy(topic.handle)
            topic.handle = NULL
        topic = topic.next
    drop_queues(c)
    api.destroy(c.rk)
    kb_mutex_lock(&c.mu)
    drop_lists(c)
    c.rk = NULL
    KB_STORE32(&c.life, CLOSED)
    c.dispatcher_stop = 1  # only now: until here batches may still become done
    kb_cond_signal(&c.dispatcher_cond)
    kb_cond_broadcast(&c.life_cond)
    kb_mutex_unlock(&c.mu)


cdef void begin_closing(Client *c) noexcept nogil:
    # Under the lock: new batches are refused; those who lead leave; the drainer takes over.
    c.life = CLOSING
    wake_all(c)


cdef void begin_finishing(Client *c) noexcept nogil:
    # Under the lock: those who enqueue leave, and the drainer purges what is left.
    c.life = FINISHING
    KB_STORE32(&c.shut, 1)
    wake_all(c)


cdef void wake_all(Client *c) noexcept nogil:
    cdef Waiter *w = c.waiters
    while w != NULL:
        kb_cond_signal(&w.cond)
        w = w.next
    if c.leader != NULL:
        KB_STORE32(&c.leader_is_due, 1)
    if c.drainer_polls:
        KB_STORE32(&c.drainer_is_due, 1)
    api.queue_yield(c.queue)
    kb_cond_signal(&c.drainer_cond)
