# Phase 2: batches take turns, and their topics share the room.

cdef enum:
    SHARE = 4                    # a topic holds at most so many times the room that is free, but always
    ALWAYS = 64                  # one part in so many, up to DRAIN_EVERY messages


cdef void push(Line *line, BatchState *batch) noexcept nogil:
    batch.line = line
    batch.next_in_line = NULL
    batch.previous_in_line = line.last
    if line.last == NULL:
        line.first = batch
    else:
        line.last.next_in_line = batch
    line.last = batch


cdef void take_out(BatchState *batch) noexcept nogil:
    if batch.previous_in_line == NULL:
        batch.line.first = batch.next_in_line
    else:
        batch.previous_in_line.next_in_line = batch.next_in_line
    if batch.next_in_line == NULL:
        batch.line.last = batch.previous_in_line
    else:
        batch.next_in_line.previous_in_line = batch.previous_in_line
    batch.line = NULL


cdef void stand_in_line(Client *c, BatchState *batch) noexcept nogil:
    KB_STORE32(&c.standing, c.standing + 1)
    push(&c.line, batch)


cdef void join_line(Client *c, BatchState *batch) noexcept nogil:
    # Under the lock. A thread has one batch in line, so batches of threads have no order. Detached batches have one
    # for each of their topics.
    cdef Place *place = &batch.place
    batch.is_enqueuing = 1
    if not batch.detached:
        stand_in_line(c, batch)
        return
    batch.ready = 1
    batch.behind = 0
    c.detached += 1
    c.look_ns = min(c.look_ns, batch.deadline_ns)
    while place != NULL and place.topic != NULL:
        place.batch = batch
        place.behind = NULL
        place.ahead = place.topic.last
        if place.ahead == NULL:
            place.topic.first = place
        else:
            place.ahead.behind = place
            batch.behind += 1
        place.topic.last = place
        place = place.other
    if batch.behind:
        push(&c.behind, batch)
    else:
        stand_in_line(c, batch)
        pass_turn(c, NULL)


cdef void leave_places(Client *c, BatchState *batch) noexcept nogil:
    # Who comes to be the first of all its topics stands in line. What a thread has handed over has no places.
    cdef Place *place = &batch.place
    cdef Place *follower
    while place != NULL and place.batch != NULL:
        follower = place.behind
        if follower == NULL:
            place.topic.last = place.ahead
        else:
            follower.ahead = place.ahead
        if place.ahead != NULL:
            place.ahead.behind = follower
        else:
            place.topic.first = follower
            if follower != NULL:
                follower.batch.behind -= 1
                if follower.batch.behind == 0:
                    take_out(follower.batch)
                    stand_in_line(c, follower.batch)
        place = place.other


cdef void leave_line(Client *c, BatchState *batch) noexcept nogil:
    # Under the lock, from any place in the line.
    if batch.line == &c.line:
        KB_STORE32(&c.standing, c.standing - 1)
    take_out(batch)
    want(c, batch, 0)
    batch.is_enqueuing = 0
    if batch.detached:
        c.detached -= 1
        leave_places(c, batch)
    if c.turn == batch:
        c.turn = NULL
    pass_turn(c, NULL)
    if nobody_in_line(c):
        kb_cond_broadcast(&c.life_cond)
        if c.life >= CLOSING:
            kb_cond_signal(&c.drainer_cond)


cdef inline bint nobody_in_line(Client *c) noexcept nogil:
    return c.standing == 0 and c.detached == 0


cdef inline bint is_detached(BatchState *batch) noexcept nogil:
    return batch != NULL and batch.detached


cdef inline bint others_stand_in_line(Client *c) noexcept nogil:
    # For the batch that has the turn.
    return KB_LOAD32(&c.standing) > 1


cdef void pass_turn(Client *c, Waiter *me) noexcept nogil:
    # Under the lock: if nobody enqueues, the first in line that has room does. A thread that does something else, such
    # as running a signal handler, gets no turn. `me` needs no waking.
    cdef BatchState *batch = c.line.first
    if c.turn != NULL or batch == NULL or c.shut:
        return
    while batch != NULL and not (batch.ready and has_room(c, batch)):
        batch = batch.next_in_line
    if batch == NULL:
        if c.leader == NULL:
            nudge_successor(c)
        return
    c.turn = batch
    if batch.detached:
        nudge_drainer(c)
    elif batch.waiter != me:
        wake(c, batch.waiter)


cdef void end_turn(Client *c, BatchState *batch, Waiter *me) noexcept nogil:
    # Under the lock: it has more to enqueue, and the others come first.
    c.turn = NULL
    if batch.next_in_line != NULL:
        take_out(batch)
        push(&c.line, batch)
    pass_turn(c, me)


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


# How a topic gets its share of the room, as a port gets its share of a switch's buffer: it may hold SHARE times what
# is free, so that one alone gets four fifths. What is stuck does not shrink, and each that gets stuck takes four fifths
# of the rest; so a topic may always hold a little, even if the bound is exceeded by it.

cdef inline int64_t share_left(int64_t whole, int64_t used, int64_t own, int64_t always) noexcept nogil:
    # How much more one that holds `own` may take.
    return max(max(0, SHARE * (whole - used) - own) // (SHARE + 1), always - own)


cdef inline int64_t always_left(int64_t whole, int64_t queue, int64_t used, int64_t most) noexcept nogil:
    # It is less, the less librdkafka's queue has left: many stuck topics must not fill it.
    return max(1, min(min(whole, queue - used) // ALWAYS, most))


cdef inline int64_t room_left(Client *c, Topic *topic) noexcept nogil:
    # How many messages `topic` may take.
    cdef int64_t used = KB_LOAD64(&c.in_flight)
    return share_left(c.room, used, KB_LOAD64(&topic.in_flight),
                      always_left(c.room, c.queue_messages, used, DRAIN_EVERY))


cdef inline int64_t bytes_left(Client *c, BatchState *batch, Topic *topic) noexcept nogil:
    cdef int64_t used = KB_LOAD64(&c.bytes) + KB_LOAD64(&c.wanted) - batch.wants
    return share_left(c.byte_room, used, KB_LOAD64(&topic.bytes),
                      always_left(c.byte_room, c.queue_bytes, used, INT64_MAX))


cdef inline void want(Client *c, BatchState *batch, int64_t bytes) noexcept nogil:
    # A large message would wait for ever while small ones take what comes free. One waits so at a time.
    if batch.wants:
        KB_STORE64(&c.wanted, 0)
        batch.wants = 0
    if bytes and KB_LOAD64(&c.wanted) == 0:
        KB_STORE64(&c.wanted, bytes)
        batch.wants = bytes


cdef inline bint is_enough(int64_t left, int64_t own) noexcept nogil:
    # For who has waited: a quarter of what it may hold, so that it is not woken for each report.
    return left > 0 and left >= (own + left) // 4


cdef bint has_room(Client *c, BatchState *batch) noexcept nogil:
    # Under the lock: whether a batch that nobody enqueues now could offer its next record.
    cdef Topic *topic
    cdef int64_t own, bytes
    if batch.queue_full and KB_LOAD64(&c.reports) == batch.full_at:
        return False
    if not batch.starved:
        return True
    topic = batch.records[batch.next].topic
    own, bytes = KB_LOAD64(&topic.in_flight), KB_LOAD64(&topic.bytes)
    return (is_enough(room_left(c, topic), own)
            and is_enough(bytes_left(c, batch, topic), bytes))


cdef inline void count_offered(Client *c, int64_t count) noexcept nogil:
    # `count` envelopes go from the line to librdkafka, or come back if it is negative. Their sum never misses one.
    if count > 0:
        KB_ADD64(&c.in_flight, count)
        KB_ADD64(&c.waiting, -count)
    else:
        KB_ADD64(&c.waiting, -count)
        KB_ADD64(&c.in_flight, count)


cdef struct Reservation:
    # Room for messages of one topic: they count as in flight before they are offered.
    Topic *topic        # NULL: nothing was reserved yet
    int64_t count       # messages that are not offered yet
    int64_t room_bytes  # for so many bytes of values there was room
    int64_t bytes       # of values that were offered


cdef void take_room(Client *c, BatchState *batch, Py_ssize_t i, Py_ssize_t stop, Reservation *own) noexcept nogil:
    # For records from `i` on, all of one topic, before they are offered. Without room for one `own.count` is 0.
    cdef Topic *topic = batch.records[i].topic
    cdef int64_t count = min(stop - i, DRAIN_EVERY)
    cdef int64_t n = 1
    count = min(count, room_left(c, topic))
    own.topic, own.count, own.bytes = topic, 0, 0
    own.room_bytes = bytes_left(c, batch, topic)
    if count <= 0 or own.room_bytes <= 0:
        return
    if batch.place.other != NULL:
        while n < count and not batch.records[i + n].flags and batch.records[i + n].topic == topic:
            n += 1
        count = n
    count_offered(c, count)
    KB_ADD64(&topic.in_flight, count)
    own.count = count


cdef inline void unreserve(Client *c, Reservation *own) noexcept nogil:
    # Ends a reservation: `count` were not offered, `bytes` were.
    if own.topic != NULL:
        count_offered(c, -own.count)
        KB_ADD64(&c.bytes, own.bytes)
        give_room(own.topic, own.count, 0)
        KB_ADD64(&own.topic.bytes, own.bytes)


cdef inline void give_room(Topic *topic, int64_t count, int64_t bytes) noexcept nogil:
    if count:
        KB_ADD64(&topic.in_flight, -count)
        KB_ADD64(&topic.bytes, -bytes)
