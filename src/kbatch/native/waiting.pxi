# Waiting: one leader polls, the others sleep.

cdef enum:
    # Waiter.kind; in order: those from FOR_TURN on are pointless once the client finishes
    FOR_BATCH = 0   # all envelopes of a batch have an outcome
    FOR_DECISION = 1  # of a batch on hold: all have an outcome, or one has failed and no more is enqueued
    FOR_SETTLED = 2  # all envelopes of a batch on hold have an outcome
    FOR_TURN = 3    # it is this batch's turn to enqueue
    FOR_LEAVING = 4  # it stands in line no more

cdef enum:
    NO_WAIT = -1  # instead of a Waiter.kind

cdef int64_t WAIT_SLICE = 100 * MS     # Ctrl-C is looked at this often


cdef inline bint satisfied(Client *c, Waiter *w) noexcept nogil:
    if w.kind == FOR_BATCH:
        return w.batch.done
    if w.kind == FOR_DECISION:
        return w.batch.settled or (KB_LOAD32(&w.batch.failing) and not w.batch.is_enqueuing)
    if w.kind == FOR_SETTLED:
        return w.batch.settled
    if w.kind == FOR_LEAVING:
        return not w.batch.is_enqueuing
    return c.turn == w.batch


cdef void wake(Client *c, Waiter *w) noexcept nogil:
    # Under the lock. The leader sits in librdkafka's poll, where only a yield reaches it.
    if w == c.leader:
        KB_STORE32(&c.leader_is_due, 1)
        api.queue_yield(c.queue)
    else:
        kb_cond_signal(&w.cond)


cdef void wake_satisfied(Client *c, Waiter *me) noexcept nogil:
    # Under the lock.
    cdef Waiter *w = c.waiters
    while w != NULL:
        if w != me and satisfied(c, w):
            wake(c, w)
        w = w.next


cdef void link(Client *c, Waiter *w) noexcept nogil:
    w.next = c.waiters
    c.waiters = w


cdef void unlink(Client *c, Waiter *w) noexcept nogil:
    cdef Waiter **at = &c.waiters
    while at[0] != w:
        at = &at[0].next
    at[0] = w.next


cdef inline bint may_lead(Client *c, Waiter *w) noexcept nogil:
    # Not who waits for the turn of another: that one polls itself.
    return c.leader == NULL and c.life == RUNNING and (w.kind != FOR_TURN or c.turn == NULL)


cdef void nudge_successor(Client *c) noexcept nogil:
    # Under the lock, with no leader: another waiter should lead; without one the drainer may have to poll.
    cdef Waiter *w = c.waiters
    while w != NULL:
        if may_lead(c, w):
            kb_cond_signal(&w.cond)
            return
        w = w.next
    nudge_drainer(c)


cdef bint wait_slice(Client *c, Waiter *w, int64_t deadline) noexcept nogil:
    # Under the lock on entry and exit. True once `w` is satisfied, False at the deadline, or when a client that
    # closes has made the wait pointless.
    cdef int64_t now
    cdef bint done = satisfied(c, w)
    if done:
        return True
    kb_cond_init(&w.cond)
    link(c, w)
    while True:
        now = kb_now_ns()
        if now >= deadline or (c.life >= FINISHING and w.kind > FOR_SETTLED):
            break
        if may_lead(c, w):
            c.leader = w
            c.polls += 1
            kb_mutex_unlock(&c.mu)
            poll_once(c, <int> ((deadline - now + MS - 1) // MS), w)
            kb_mutex_lock(&c.mu)
            c.leader = NULL
            KB_STORE32(&c.leader_is_due, 0)
        else:
            kb_cond_wait_until(&w.cond, &c.mu, deadline)
        done = satisfied(c, w)
        if done:
            break
    unlink(c, w)
    kb_cond_destroy(&w.cond)
    if c.leader == NULL and c.life == RUNNING:
        nudge_successor(c)
    return done
