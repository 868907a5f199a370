# Phase 2: records become messages of librdkafka.

cdef enum:
    # what enqueue_slice, take_turn and advance answer
    DONE = 0
    AGAIN = 1       # the slice is over, or the turn, or the room: look at signals and deadlines, then go on
    LATE = 2        # the batch's deadline for enqueueing has passed; of `advance`: the caller's for the wait
    SHUT = 3        # the client's time to close is over, or nobody wants the rest of the batch; not of `advance`

cdef enum:
    DRAIN_EVERY = 128            # messages between two looks at the delivery reports
    ENQUEUE_SLICE = 65536        # messages between two looks at signals
    TURN_MESSAGES = 2000         # messages of one turn while other batches stand in line

cdef int64_t TURN = 2 * MS             # of one turn while other batches stand in line


cdef void poll_ready(Client *c, int64_t turn_end) noexcept nogil:
    # What is on the queue now, without waiting; an event may be of 10,000 reports.
    while poll_once(c, 0, NULL) and not (others_stand_in_line(c) and kb_now_ns() >= turn_end):
        pass


cdef inline void drop_headers(rd_kafka_headers_t *headers) noexcept nogil:
    if headers != NULL:
        api.headers_destroy(headers)


cdef rd_kafka_headers_t *build_headers(Record *record) noexcept nogil:
    cdef rd_kafka_headers_t *headers = api.headers_new(record.header_count)
    cdef Header *h = record.headers
    cdef Header *end = h + record.header_count
    cdef char text[UUID_TEXT]
    while h != end:
        if h.value_len >= VALUE_NULL:
            api.header_add(headers, h.name, h.name_len, h.value, h.value_len if h.value != NULL else 0)
        else:
            api.header_add(headers, h.name, h.name_len, text, write_value(h, text))
        h += 1
    return headers


cdef int produce_error(Client *c, rd_kafka_error_t *error) noexcept nogil:
    # The code of what produceva said, for a fatal state the code of its cause; destroys `error`.
    cdef int code = api.error_code(error)
    api.error_destroy(error)
    if code == RD_KAFKA_RESP_ERR__FATAL:
        look_for_fatal(c)
        code = KB_LOAD32(&c.fatal) or code
    return code


cdef rd_kafka_topic_t *topic_handle(Client *c, Topic *topic) noexcept nogil:
    # Only the batch whose turn it is comes here.
    if topic.handle == NULL:
        topic.handle = api.topic_new(c.rk, topic.name, NULL)
    return topic.handle


cdef struct Slice:
    # On the stack of the thread that offers a batch's records, from `batch.next` on.
    Py_ssize_t stop      # behind the last
    int64_t end_ns
    int64_t turn_end_ns  # while other batches stand in line
    int64_t wall_us      # what is to be delivered by then has expired; 0: nothing has
    Reservation reserved
    int64_t settled      # envelopes that got their outcome here
    int64_t failed       # of these
    int64_t refused      # of these, other than in phase 1: a transaction fails with them
    int64_t seen         # Client.reports before the last offer
    rd_kafka_vu_t vus[7]


cdef void begin_slice(Client *c, BatchState *batch, Slice *s, int64_t end_ns) noexcept nogil:
    memset(s, 0, sizeof(Slice))
    s.stop = min(batch.count, batch.next + ENQUEUE_SLICE)
    s.end_ns = end_ns
    s.turn_end_ns = kb_now_ns() + TURN
    s.vus[0].vtype = RD_KAFKA_VTYPE_RKT
    s.vus[1].vtype = RD_KAFKA_VTYPE_PARTITION
    s.vus[2].vtype = RD_KAFKA_VTYPE_VALUE
    s.vus[3].vtype = RD_KAFKA_VTYPE_KEY
    s.vus[4].vtype = RD_KAFKA_VTYPE_OPAQUE
    s.vus[5].vtype = RD_KAFKA_VTYPE_TIMESTAMP
    s.vus[6].vtype = RD_KAFKA_VTYPE_HEADERS
    if c.lists != NULL:
        c.lists.slice += 1


cdef int look_around(Client *c, BatchState *batch, Slice *s, Py_ssize_t i) noexcept nogil:
    # At the reports, deadlines and the line. DONE: record `i` may be offered; any other answer ends the slice.
    cdef int64_t now
    if i != batch.next or c.unpolled >= DRAIN_EVERY or not others_stand_in_line(c):
        poll_ready(c, s.turn_end_ns)  # a short one leaves that to the others
        c.unpolled = 0
    now = kb_now_ns()
    if c.lists != NULL:
        collect_lists(c, now)
    if batch.deliver_by != NULL:
        s.wall_us = kb_wall_ns() // 1000
    if KB_LOAD32(&c.shut) or KB_LOAD32(&batch.abandoned):
        return SHUT
    if now >= batch.deadline_ns:
        return LATE
    if i != batch.next and others_stand_in_line(c) and (
            now >= s.turn_end_ns or i - batch.next >= TURN_MESSAGES):
        return AGAIN
    return AGAIN if now >= s.end_ns else DONE


cdef inline void mark_expired(BatchState *batch, Py_ssize_t i, int64_t wall_us) noexcept nogil:
    if wall_us and 0 < batch.deliver_by[i] <= wall_us and not batch.records[i].flags:
        batch.records[i].flags = RECORD_EXPIRED


cdef inline void pass_over(Client *c, BatchState *batch, Slice *s, Py_ssize_t i) noexcept nogil:
    # It has expired, or phase 1 has rejected it.
    s.failed += settle_unsent(&batch.outcomes[i], &batch.records[i], RD_KAFKA_RESP_ERR_NO_ERROR)
    KB_ADD64(&c.waiting, -1)
    s.settled += 1


cdef inline bint reserve(Client *c, BatchState *batch, Slice *s, Py_ssize_t i) noexcept nogil:
    # Whether record `i` has room.
    cdef Reservation *own = &s.reserved
    if own.count == 0 or batch.records[i].topic != own.topic or own.bytes >= own.room_bytes:
        unreserve(c, own)
        take_room(c, batch, i, s.stop, own)
        batch.starved = own.count == 0
    return own.count != 0


cdef inline int produce(Client *c, BatchState *batch, Slice *s, Py_ssize_t i) noexcept nogil:
    # Record `i` becomes a message. The code with which librdkafka refuses it, 0 if it does not.
    cdef Record *record = &batch.records[i]
    cdef Outcome *outcome = &batch.outcomes[i]
    cdef rd_kafka_vu_t *vus = s.vus
    cdef rd_kafka_topic_t *topic = topic_handle(c, record.topic)
    cdef rd_kafka_error_t *error
    cdef HeaderList *kept = NULL
    if topic == NULL:
        return api.last_error()
    vus[0].u.rkt = topic
    vus[1].u.i32 = record.partition
    vus[2].u.mem.ptr = record.value
    vus[2].u.mem.size = record.value_len
    vus[3].u.mem.ptr = record.key
    vus[3].u.mem.size = record.key_len
    outcome.batch = batch
    outcome.offset = <int64_t> <size_t> record.topic
    vus[4].u.ptr = outcome
    vus[5].u.i64 = record.timestamp
    vus[6].u.headers = NULL
    if record.header_count:
        kept = take_list(c, record)
        if kept == NULL:
            vus[6].u.headers = build_headers(record)
        else:
            kept.topic = record.topic
            vus[6].u.headers = kept.headers
            outcome.offset = <int64_t> <size_t> kept | 1
    s.seen = KB_LOAD64(&c.reports)
    error = api.produceva(c.rk, vus, 7)
    if error == NULL:
        return RD_KAFKA_RESP_ERR_NO_ERROR
    # The headers are still ours: the message was not taken.
    if kept != NULL:
        keep_list(c.lists, kept)
    else:
        drop_headers(vus[6].u.headers)
    return produce_error(c, error)


cdef inline bint offer(Client *c, BatchState *batch, Slice *s, Py_ssize_t i) noexcept nogil:
    # Whether record `i` was taken or refused. If not, librdkafka's queue is full, and it is offered again.
    cdef int code = produce(c, batch, s, i)
    if code == RD_KAFKA_RESP_ERR__QUEUE_FULL:
        batch.queue_full, batch.full_at = 1, s.seen
        want(c, batch, batch.records[i].value_len)
        return False
    batch.queue_full = 0
    if batch.wants:
        want(c, batch, 0)
    s.reserved.count -= 1
    if code:
        settle_unsent(&batch.outcomes[i], &batch.records[i], code)
        KB_ADD64(&c.in_flight, -1)
        give_room(s.reserved.topic, 1, 0)
        s.settled += 1
        s.failed += 1
        s.refused += 1
    else:
        s.reserved.bytes += batch.records[i].value_len
    return True


cdef int end_slice(Client *c, BatchState *batch, Slice *s, Py_ssize_t i, int answer) noexcept nogil:
    # Record `i` is the first that was not offered.
    c.unpolled += i - batch.next
    batch.next = i
    unreserve(c, &s.reserved)
    if s.settled:
        kb_mutex_lock(&c.mu)
        count_failed(c, s.failed)
        kb_mutex_unlock(&c.mu)
        if s.refused:
            KB_STORE32(&batch.failing, 1)
        settle(c, batch, s.settled)
    if answer == DONE and i < batch.count:
        answer = AGAIN
    if answer == AGAIN and kb_now_ns() >= batch.deadline_ns:
        answer = LATE
    return answer


cdef int enqueue_slice(Client *c, BatchState *batch, int64_t end_ns) noexcept nogil:
    """Offers the records of `batch` to librdkafka from where the last slice ended; it is the batch's turn."""
    cdef Slice s
    cdef Py_ssize_t i = batch.next
    cdef int answer = DONE
    begin_slice(c, batch, &s, end_ns)
    while i < s.stop:
        if (i - batch.next) % DRAIN_EVERY == 0:
            answer = look_around(c, batch, &s, i)
            if answer != DONE:
                break
        mark_expired(batch, i, s.wall_us)
        if batch.records[i].flags:
            pass_over(c, batch, &s, i)
        elif not (reserve(c, batch, &s, i) and offer(c, batch, &s, i)):
            answer = AGAIN
            break
        i += 1
    return end_slice(c, batch, &s, i, answer)


cdef void give_up_rest(Client *c, BatchState *batch, int error) noexcept nogil:
    # What was not offered yet is settled as failed and not persisted.
    cdef Py_ssize_t i
    cdef int64_t rest = batch.count - batch.next
    cdef int64_t failed = 0
    cdef bint given_up = False
    cdef int64_t wall_us = 0 if batch.deliver_by == NULL else kb_wall_ns() // 1000
    for i in range(batch.next, batch.count):
        mark_expired(batch, i, wall_us)
        failed += settle_unsent(&batch.outcomes[i], &batch.records[i], error)
        given_up |= batch.records[i].flags == 0
    batch.next = batch.count
    kb_mutex_lock(&c.mu)
    count_failed(c, failed)
    kb_mutex_unlock(&c.mu)
    KB_ADD64(&c.waiting, -rest)
    if given_up:
        KB_STORE32(&batch.failing, 1)
    if rest:
        settle(c, batch, rest)


cdef int take_turn(Client *c, BatchState *batch) noexcept nogil:
    # One slice of a batch that stands in line: wait for its turn, enqueue, and again.
    cdef Waiter w
    cdef int answer = AGAIN
    cdef int64_t slice_end = kb_now_ns() + WAIT_SLICE
    w.kind = FOR_TURN
    w.batch = batch
    kb_mutex_lock(&c.mu)
    batch.waiter = &w
    batch.ready = 1
    while answer == AGAIN and kb_now_ns() < slice_end:
        pass_turn(c, &w)
        if not wait_slice(c, &w, min(slice_end, batch.deadline_ns)):
            if KB_LOAD32(&c.shut):
                answer = SHUT
            elif kb_now_ns() >= batch.deadline_ns:
                answer = LATE
            break
        c.callers += 1
        c.polls += 1
        kb_mutex_unlock(&c.mu)
        answer = enqueue_slice(c, batch, slice_end)
        kb_mutex_lock(&c.mu)
        c.callers -= 1
        if answer == AGAIN:
            end_turn(c, batch, &w)
    # No turn while the thread does something else, which may be a signal handler that sends.
    batch.ready = 0
    if answer == AGAIN and c.turn == batch:
        end_turn(c, batch, NULL)
    kb_mutex_unlock(&c.mu)
    if answer == AGAIN:
        look_for_fatal(c)  # nobody else may be there to see it
    return answer


cdef void end_enqueueing(Client *c, BatchState *batch, int answer) noexcept nogil:
    # What was not offered fails as `answer` says; the next batch may enqueue; from now on only reports are missing.
    give_up_rest(
        c, batch, RD_KAFKA_RESP_ERR__TIMED_OUT_QUEUE if answer == LATE else RD_KAFKA_RESP_ERR__PURGE_QUEUE)
    drop_records(batch)
    kb_mutex_lock(&c.mu)
    leave_line(c, batch)
    c.enqueue_ns += kb_now_ns() - batch.started_ns
    if batch.tell_enqueued:
        post_news(c, batch)
    # Not after the lock: nothing else keeps librdkafka and the dispatcher until the last answer is on its way.
    if counts_down(batch, 1):
        finish(c, &batch, 1, NULL)
    elif batch.hold or (batch.detached and batch.thread):
        wake_satisfied(c, NULL)  # a transaction that fails need not wait for the rest; nor who has handed it over
    kb_mutex_unlock(&c.mu)


cdef int advance(Client *c, BatchState *batch, int64_t deadline, int wait_for) noexcept nogil:
    """One slice of a batch's way, without the GIL: enqueue what is not enqueued, then wait if asked to.

    `wait_for` is NO_WAIT or a Waiter.kind up to FOR_SETTLED.
    """
    cdef Waiter w
    cdef int answer
    cdef int64_t now
    cdef bint done
    if not batch.detached and batch.is_enqueuing:
        answer = take_turn(c, batch)
        if answer == AGAIN:
            return AGAIN
        end_enqueueing(c, batch, answer)
    now = kb_now_ns()
    w.kind = wait_for
    w.batch = batch
    kb_mutex_lock(&c.mu)
    if wait_for != NO_WAIT:
        c.entered += 1
        done = wait_slice(c, &w, min(deadline, now + WAIT_SLICE))
        if not done and c.life == RUNNING:
            kb_mutex_unlock(&c.mu)
            look_for_fatal(c)
            kb_mutex_lock(&c.mu)
        leave(c)
    elif batch.is_enqueuing:  # handed over: what its thread sends next must not pass it
        c.entered += 1
        w.kind = FOR_LEAVING
        done = wait_slice(c, &w, min(deadline, now + WAIT_SLICE)) or c.life >= FINISHING
        leave(c)
    else:
        done = True
        nudge_drainer(c)
    kb_mutex_unlock(&c.mu)
    if done:
        return DONE
    return AGAIN if kb_now_ns() < deadline else LATE
