# Phase 2, counting and waiting: everything that runs without the GIL.
#
# Lock: client.mu guards every field of Client and BatchState that is not marked atomic or const. It is never held
# while librdkafka is called, except for the yield of a queue. Nothing here touches a Python object.

cdef enum:
    # Client.life
    NEW = 0        # librdkafka not started
    RUNNING = 1
    CLOSING = 2    # no new batches; those in line are enqueued; the drainer polls
    FINISHING = 3  # the drainer destroys librdkafka once nothing is in flight
    CLOSED = 4

cdef enum:
    # Waiter.kind
    FOR_BATCH = 0   # all envelopes of a batch have an outcome
    FOR_OUTCOME = 1  # the same of a batch on hold, or one of them has failed and no more is enqueued
    FOR_SETTLED = 2  # all envelopes of a batch on hold have an outcome
    FOR_TURN = 3    # it is this batch's turn to enqueue
    FOR_LEAVING = 4  # it stands in line no more

cdef enum:
    NO_WAIT = -1  # instead of a Waiter.kind

cdef enum:
    # what enqueue_slice and wait_slice answer
    DONE = 0
    AGAIN = 1       # the slice is over, or the turn, or the room: look at signals and deadlines, then go on
    LATE = 2        # the batch's deadline for enqueueing has passed
    SHUT = 3        # the client's time to close is over, or nobody wants the rest of the batch

cdef enum:
    # keys of requests in Kafka's protocol
    PRODUCE = 0
    METADATA = 3

cdef enum:
    DRAIN_EVERY = 128            # messages between two looks at the delivery reports
    ENQUEUE_SLICE = 65536        # messages between two looks at signals
    MESSAGES_AT_ONCE = 128       # messages copied out of an event at a time
    TURN_MESSAGES = 2000         # messages of one turn while other batches stand in line
    SHARE = 4                    # a topic holds at most so many times the room that is free, but always
    ALWAYS = 64                  # one part in so many, up to DRAIN_EVERY messages

cdef int64_t MS = 1000000
cdef int64_t WAIT_SLICE = 100 * MS     # Ctrl-C is looked at this often
cdef int64_t TURN = 2 * MS             # of one turn while other batches stand in line
cdef int64_t MAP_SLICE = 2 * MS        # of phase 1 between two looks at who wants the GIL
cdef int64_t GIL_OFFER = 6 * MS        # of long work with the GIL, if nobody is known to want it
cdef int64_t MOMENT = MS // 20
cdef int64_t DRAINER_NAP = 5 * MS      # how long callers may leave the queue alone before the drainer takes over
cdef int64_t FINISH_PURGE = 100 * MS   # between two purges while finishing
cdef int64_t FATAL_PURGE = 1000 * MS   # between two purges of what is queued, after a fatal error
cdef int64_t FATAL_GRACE = 2000 * MS   # for librdkafka to see that the time of its requests is over
cdef int64_t LAST_LOOK = 50 * MS       # for the events that are on the queue when nothing is in flight any more
cdef int64_t LAST_WORDS = 1000 * MS    # for the dispatcher to pass them on; it may need the GIL, or have none any more

cdef struct Waiter:
    # On the stack of a thread that waits.
    kb_cond cond
    int kind
    BatchState *batch
    Waiter *next

cdef struct Notice:
    # An event for the dispatcher. It owns the event; throttle notices, which are no events, own their text.
    rd_kafka_event_t *event
    char *broker_name
    int32_t broker_id
    int32_t throttle_ms
    Notice *next

cdef struct Client:
    int pid                 # const once started; 0 before
    int32_t references      # atomic: the Core, the dispatcher, the drainer
    int64_t in_flight       # atomic: messages given to librdkafka (or about to be) without an outcome
    int64_t bytes           # atomic: their values
    int64_t waiting         # atomic: accepted envelopes that are not among them yet and have no outcome
    int64_t room            # const: how many messages may be in flight
    int64_t byte_room       # const: how many bytes
    int64_t queue_messages  # const: what librdkafka's queue takes
    int64_t queue_bytes     # const
    int64_t wanted          # atomic: bytes of a message for which librdkafka's queue had no room, and others keep free
    int64_t unpolled        # messages offered since the last look at the reports; of whoever has the turn
    int64_t socket_timeout_ns  # const: how long a request may be under way
    kb_mutex mu
    kb_cond drainer_cond
    kb_cond dispatcher_cond
    kb_cond life_cond       # life or entered changed
    int32_t life            # written under `mu`; atomic, where it is read without
    int32_t shut            # atomic: life >= FINISHING
    int entered             # threads that may call librdkafka, apart from the drainer: it must live
    rd_kafka_t *rk          # owned; destroyed by the drainer. NULL before start
    rd_kafka_queue_t *queue  # the same
    Topic *topics           # owned; handles destroyed with rk, the rest with the client
    Waiter *waiters
    Waiter *leader          # the one waiter that polls
    int32_t leader_is_due   # atomic: the leader should leave its poll, its wait is over
    Line line               # batches that may enqueue when they have room
    Line behind             # detached batches behind others of the same topics
    BatchState *turn        # the batch that enqueues now, one of `line`; NULL: none has room, or none is there
    int32_t standing        # batches in `line`; written under `mu`; atomic
    int detached            # detached batches in both
    int64_t look_ns         # when the drainer looks for detached batches whose time is over
    int callers             # threads that enqueue
    int64_t polls           # polls by callers, so that the drainer sees that they care
    int eager               # unfinished batches with listeners, flushes: reasons to poll at once
    int events              # const: the types of librdkafka's events, besides delivery reports, that somebody wants
    int events_expected     # const: callbacks are configured
    int drainer_parked      # waits without a time limit
    int drainer_asleep      # waits with one
    int drainer_polls       # sits in librdkafka's poll
    int32_t drainer_is_due  # atomic: the drainer should leave its poll, there is something to enqueue
    Waiter drainer_self     # marks its polls; never linked
    int64_t request_ns      # atomic: when the last produce request was sent
    int64_t doubt_ns        # atomic: when the last one was that a leader may have denied
    int64_t reports         # atomic: delivery report events handled
    int64_t fatal_since_ns  # 0: no fatal error
    int32_t fatal           # atomic: librdkafka's code of the fatal error
    int64_t lost            # messages that ended without acknowledgement while closing
    int32_t held            # batches on hold; written under `mu`; atomic
    int64_t undecided       # their envelopes
    BatchState *news_first  # batches for the dispatcher: done, or enqueued if that is to be told
    BatchState *news_last
    BatchState *idle_done   # batches nobody listens to; released by whoever holds the GIL next
    Notice *notice_first
    Notice *notice_last
    int dispatcher_stop
    int dispatcher_nudge    # release idle_done
    ArenaBlock *spare_blocks
    int spare_block_count
    Record *spare_records
    Py_ssize_t spare_records_capacity
    # counters for stats()
    int64_t acked
    int64_t failed
    int64_t enqueue_ns


cdef Client *client_make() noexcept nogil:
    cdef Client *c = <Client *> kb_calloc(1, sizeof(Client))
    if c == NULL:
        return NULL
    c.references = 1
    kb_mutex_init(&c.mu)
    kb_cond_init(&c.drainer_cond)
    kb_cond_init(&c.dispatcher_cond)
    kb_cond_init(&c.life_cond)
    return c


cdef void client_drop(Client *c) noexcept nogil:
    # Gives back one reference; the last one frees.
    cdef Topic *topic
    cdef ArenaBlock *block
    if KB_ADD32(&c.references, -1) != 0:
        return
    while c.topics != NULL:
        topic = c.topics
        c.topics = topic.next
        kb_free(topic.name)
        kb_free(topic)
    while c.spare_blocks != NULL:
        block = c.spare_blocks
        c.spare_blocks = block.next
        kb_free(block)
    kb_free(c.spare_records)
    drop_notices(c.notice_first)
    kb_cond_destroy(&c.drainer_cond)
    kb_cond_destroy(&c.dispatcher_cond)
    kb_cond_destroy(&c.life_cond)
    kb_mutex_destroy(&c.mu)
    kb_free(c)


cdef Topic *make_topic(Client *c, const char *name, Py_ssize_t length) noexcept nogil:
    # NULL when memory is short. Who makes it sees to it that there is one of a name.
    cdef Topic *topic = <Topic *> kb_calloc(1, sizeof(Topic))
    if topic == NULL:
        return NULL
    topic.name = <char *> kb_malloc(length + 1)
    if topic.name == NULL:
        kb_free(topic)
        return NULL
    memcpy(topic.name, name, length + 1)
    kb_mutex_lock(&c.mu)
    topic.next = c.topics
    c.topics = topic
    kb_mutex_unlock(&c.mu)
    return topic


# -- notices: events for the dispatcher

cdef void free_notice(Notice *notice) noexcept nogil:
    if notice.event != NULL:
        api.event_destroy(notice.event)
    kb_free(notice.broker_name)
    kb_free(notice)


cdef void drop_notices(Notice *notice) noexcept nogil:
    cdef Notice *following
    while notice != NULL:
        following = notice.next
        free_notice(notice)
        notice = following


cdef void post_notice(Client *c, Notice *notice) noexcept nogil:
    notice.next = NULL
    kb_mutex_lock(&c.mu)
    if c.notice_last == NULL:
        c.notice_first = notice
    else:
        c.notice_last.next = notice
    c.notice_last = notice
    kb_cond_signal(&c.dispatcher_cond)
    kb_mutex_unlock(&c.mu)


cdef void on_throttle(rd_kafka_t *rk, const char *broker_name, int32_t broker_id, int throttle_ms,
                      void *opaque) noexcept nogil:
    # On whichever thread polls: copy and leave.
    cdef Client *c = <Client *> opaque
    cdef Notice *notice = <Notice *> kb_calloc(1, sizeof(Notice))
    if notice == NULL:
        return
    notice.broker_name = <char *> kb_malloc(strlen(broker_name) + 1)
    if notice.broker_name == NULL:
        kb_free(notice)
        return
    strcpy(notice.broker_name, broker_name)
    notice.broker_id = broker_id
    notice.throttle_ms = throttle_ms
    post_notice(c, notice)


cdef int watch_requests(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque,
                        char *errstr, size_t errstr_size) noexcept nogil:
    return api.on_request_sent(rk, b"kbatch", note_request, opaque)


cdef int note_request(rd_kafka_t *rk, int sockfd, const char *broker_name, int32_t broker_id, int16_t api_key,
                      int16_t api_version, int32_t correlation_id, size_t size, void *opaque) noexcept nogil:
    # On a thread of librdkafka's, after each request.
    cdef Client *c = <Client *> opaque
    if api_key == PRODUCE:
        KB_STORE64(&c.request_ns, kb_now_ns())
    elif api_key == METADATA:  # librdkafka asks so who the leader is, when one has answered that it is none
        KB_STORE64(&c.doubt_ns, KB_LOAD64(&c.request_ns))
    return RD_KAFKA_RESP_ERR_NO_ERROR


cdef inline uint8_t persistence(Client *c, const rd_kafka_message_t *message, int64_t started_ns) noexcept nogil:
    # librdkafka's status, unless it may be wrong: it takes NOT_LEADER_OR_FOLLOWER, with which a leader that is deposed
    # after it has appended answers, for "not persisted", and then ends the message by itself.
    cdef uint8_t status = <uint8_t> api.message_status(message)
    if (status == RD_KAFKA_MSG_STATUS_NOT_PERSISTED and message.err < 0
            and KB_LOAD64(&c.doubt_ns) >= started_ns):
        status = RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED
    return status


cdef bint renew_tokens(rd_kafka_t *rk) noexcept nogil:
    # The tokens that librdkafka makes itself, on a thread of its own. False if there is none.
    cdef rd_kafka_error_t *error = api.sasl_background_callbacks_enable(rk)
    if error == NULL:
        return True
    api.error_destroy(error)
    return False


cdef void drop_event(Client *c, rd_kafka_event_t *event) noexcept nogil:
    # librdkafka asks for a token once, and again only after it was told of a failure.
    if api.event_type(event) == RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH:
        api.oauthbearer_set_token_failure(c.rk, b"no memory to pass on that a token is wanted")
    api.event_destroy(event)


# -- completion

cdef inline bint satisfied(Client *c, Waiter *w) noexcept nogil:
    if w.kind == FOR_BATCH:
        return w.batch.done
    if w.kind == FOR_OUTCOME:
        return w.batch.settled or (KB_LOAD32(&w.batch.failing) and not w.batch.in_line)
    if w.kind == FOR_SETTLED:
        return w.batch.settled
    if w.kind == FOR_LEAVING:
        return not w.batch.in_line
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


cdef void post_news(Client *c, BatchState *batch) noexcept nogil:
    # Under the lock: the dispatcher should look at `batch`.
    if batch.has_news:
        return
    batch.has_news = 1
    batch.next_news = NULL
    if c.news_last == NULL:
        c.news_first = batch
    else:
        c.news_last.next_news = batch
    c.news_last = batch
    kb_cond_signal(&c.dispatcher_cond)


cdef void complete(Client *c, BatchState *batch) noexcept nogil:
    # Under the lock: the last outcome of `batch` is known. From `done` on the batch may vanish.
    if batch.hold:
        batch.settled = 1
        return
    batch.done_ns = kb_now_ns()
    if batch.listeners:
        c.eager -= 1
        post_news(c, batch)
    else:
        batch.next_news = c.idle_done
        c.idle_done = batch
    KB_STORE32(&batch.done, 1)


cdef inline void count_failed(Client *c, int64_t count) noexcept nogil:
    # Under the lock.
    c.failed += count
    if c.life >= CLOSING:
        c.lost += count


cdef inline bint counts_down(BatchState *batch, int64_t count) noexcept nogil:
    # `count` envelopes of `batch` got their outcome: whether they were the last. If not, it may vanish at once.
    cdef int64_t hold = batch.hold
    return KB_ADD64(&batch.remaining, -count) == hold


cdef void settle(Client *c, BatchState *batch, int64_t count) noexcept nogil:
    # `count` envelopes of `batch` got their outcome.
    if counts_down(batch, count):
        kb_mutex_lock(&c.mu)
        finish(c, &batch, 1, NULL)
        kb_mutex_unlock(&c.mu)


cdef void finish(Client *c, BatchState **batches, int count, Waiter *me) noexcept nogil:
    # Under the lock: these batches are complete; wake whoever has waited for them, or for what else has changed.
    cdef int i
    for i in range(count):
        complete(c, batches[i])
    wake_satisfied(c, me)


# -- counting: from events to outcomes

cdef void look_for_fatal(Client *c) noexcept nogil:
    # A fatal error of the idempotent producer shows in no delivery report of its own.
    cdef int code
    if KB_LOAD32(&c.fatal):
        return
    code = api.fatal_error(c.rk, NULL, 0)
    if code:
        KB_STORE32(&c.fatal, code)
        kb_mutex_lock(&c.mu)
        c.fatal_since_ns = kb_now_ns()
        kb_cond_signal(&c.drainer_cond)
        kb_mutex_unlock(&c.mu)


cdef void handle_reports(Client *c, rd_kafka_event_t *event, Waiter *me) noexcept nogil:
    # Copy out, give the event back (only then has the queue room again), count down, wake.
    cdef const rd_kafka_message_t *messages[MESSAGES_AT_ONCE]
    cdef const rd_kafka_message_t *message
    cdef BatchState *run = NULL   # consecutive reports mostly belong to one batch
    cdef BatchState *waking[16]   # batches that ran down to zero in this event
    cdef Topic *topic = NULL      # of the run
    cdef Topic *own
    cdef int64_t run_count = 0, run_bytes = 0, bytes = 0, total = 0, failed = 0
    cdef int i, n, ran_down = 0
    cdef Outcome *outcome
    while True:
        n = <int> api.event_message_array(event, messages, MESSAGES_AT_ONCE)
        if n == 0:
            break
        total += n
        for i in range(n):
            message = messages[i]
            outcome = <Outcome *> message._private
            own = <Topic *> <size_t> outcome.offset
            outcome.partition = message.partition
            outcome.error = <int16_t> message.err
            outcome.persistence = persistence(c, message, outcome.batch.started_ns)
            if message.err == RD_KAFKA_RESP_ERR_NO_ERROR and outcome.persistence == RD_KAFKA_MSG_STATUS_PERSISTED:
                outcome.state = ACKED
                outcome.offset = message.offset if message.offset >= 0 else -1
            else:
                # "No error" without "persisted" is no acknowledgement: nobody has answered (acks=0).
                outcome.state = FAILED
                if message.err == RD_KAFKA_RESP_ERR_NO_ERROR:
                    outcome.error = RD_KAFKA_RESP_ERR_UNKNOWN
                outcome.offset = -1
                failed += 1
                KB_STORE32(&outcome.batch.failing, 1)
            if outcome.batch == run and own == topic:
                run_count += 1
                run_bytes += message.len
                continue
            bytes += run_bytes
            give_room(topic, run_count, run_bytes)
            if run != NULL and counts_down(run, run_count):
                waking[ran_down] = run
                ran_down += 1
                if ran_down == 16:
                    kb_mutex_lock(&c.mu)
                    finish(c, waking, ran_down, me)
                    kb_mutex_unlock(&c.mu)
                    ran_down = 0
            run = outcome.batch
            topic = own
            run_count = 1
            run_bytes = message.len
    bytes += run_bytes
    give_room(topic, run_count, run_bytes)
    if run != NULL and counts_down(run, run_count):
        waking[ran_down] = run
        ran_down += 1
    api.event_destroy(event)
    KB_ADD64(&c.in_flight, -total)
    KB_ADD64(&c.bytes, -bytes)
    if failed:
        look_for_fatal(c)
    kb_mutex_lock(&c.mu)
    KB_ADD64(&c.reports, 1)
    c.acked += total - failed
    count_failed(c, failed)
    finish(c, waking, ran_down, me)
    pass_turn(c, me)
    kb_mutex_unlock(&c.mu)


cdef bint poll_once(Client *c, int timeout_ms, Waiter *me) noexcept nogil:
    # Handles one event; False when there was none. `me` is the polling waiter, which needs no waking.
    cdef rd_kafka_event_t *event = api.queue_poll(c.queue, timeout_ms)
    cdef Notice *notice
    cdef int kind
    if event == NULL:
        # A yield meant for the leader or the drainer may have ended this poll instead: pass it on.
        if ((me == NULL or me == &c.drainer_self) and KB_LOAD32(&c.leader_is_due)
                or me != &c.drainer_self and KB_LOAD32(&c.drainer_is_due)):
            api.queue_yield(c.queue)
        return False
    kind = api.event_type(event)
    if kind == RD_KAFKA_EVENT_DR:
        handle_reports(c, event, me)
        return True
    if not kind & c.events:  # librdkafka makes some of them without being asked to
        api.event_destroy(event)
        return True
    notice = <Notice *> kb_calloc(1, sizeof(Notice))
    if notice == NULL:
        drop_event(c, event)  # no memory to pass it on
    else:
        notice.event = event
        post_notice(c, notice)
    return True


# -- waiting: one leader polls, the others sleep

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


cdef inline bint is_detached(BatchState *batch) noexcept nogil:
    return batch != NULL and batch.detached


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


# -- phase 2: batches take turns

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
    batch.in_line = 1
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
    batch.in_line = 0
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


cdef int64_t take_room(Client *c, BatchState *batch, Py_ssize_t i, Py_ssize_t stop, int64_t *bytes) noexcept nogil:
    # Counts records from `i` on as in flight, all of one topic, before they are offered. Returns how many; `bytes` of
    # values have room.
    cdef Topic *topic = batch.records[i].topic
    cdef int64_t count = min(stop - i, DRAIN_EVERY)
    cdef int64_t n = 1
    count = min(count, room_left(c, topic))
    bytes[0] = bytes_left(c, batch, topic)
    if count <= 0 or bytes[0] <= 0:
        return 0
    if batch.place.other != NULL:
        while n < count and not batch.records[i + n].flags and batch.records[i + n].topic == topic:
            n += 1
        count = n
    count_offered(c, count)
    KB_ADD64(&topic.in_flight, count)
    return count


cdef inline void unreserve(Client *c, Topic *topic, int64_t count, int64_t bytes) noexcept nogil:
    # Ends a reservation: `count` were not offered, `bytes` were.
    if topic != NULL:
        count_offered(c, -count)
        KB_ADD64(&c.bytes, bytes)
        give_room(topic, count, 0)
        KB_ADD64(&topic.bytes, bytes)


cdef inline void give_room(Topic *topic, int64_t count, int64_t bytes) noexcept nogil:
    if count:
        KB_ADD64(&topic.in_flight, -count)
        KB_ADD64(&topic.bytes, -bytes)


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


cdef void leave(Client *c) noexcept nogil:
    # Under the lock: a thread that had entered lets librdkafka go.
    c.entered -= 1
    if c.life >= CLOSING and c.entered == 0:
        kb_cond_broadcast(&c.life_cond)
        kb_cond_signal(&c.drainer_cond)


cdef inline bint others_stand_in_line(Client *c) noexcept nogil:
    # For whoever has the turn.
    return KB_LOAD32(&c.standing) > 1


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


cdef int32_t write_value(Header *h, char *text) noexcept nogil:
    # The text of a value that is made here rather than borrowed; at most UUID_TEXT bytes.
    cdef int32_t length, value
    if h.value_len == VALUE_UUID:
        write_uuid(<const unsigned char *> h.value, text)
        return UUID_TEXT
    if h.value_len == VALUE_TIME_KBATCH:
        write_time((<int64_t *> h.value)[0], False, text)
        return TIME_TEXT_KBATCH
    if h.value_len == VALUE_TIME_WOLVERINE:
        write_time((<int64_t *> h.value)[0], True, text)
        return TIME_TEXT_WOLVERINE
    value = (<int32_t *> h.value)[0]
    length = decimal_length(value)
    _write_digits(text, value, length)
    return length


cdef bint settle_unsent(Outcome *outcome, Record *record, int error) noexcept nogil:
    # Not sent, no report will come. Whether it failed; what has expired did not.
    outcome.state = FAILED
    if record.flags & RECORD_EXPIRED:
        outcome.state = EXPIRED
    elif record.flags & RECORD_REJECTED:
        error = RD_KAFKA_RESP_ERR__VALUE_SERIALIZATION  # whatever became of the others
    outcome.persistence = RD_KAFKA_MSG_STATUS_NOT_PERSISTED
    outcome.error = <int16_t> error
    outcome.partition = record.partition
    outcome.offset = -1
    return outcome.state == FAILED


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


cdef int enqueue_slice(Client *c, BatchState *batch, int64_t slice_end) noexcept nogil:
    """Offers the records of `batch` to librdkafka from where the last slice ended; it is the batch's turn."""
    cdef rd_kafka_vu_t vus[7]
    cdef Py_ssize_t i = batch.next
    cdef Py_ssize_t stop = min(batch.count, i + ENQUEUE_SLICE)
    cdef Py_ssize_t look_at = i   # when to look at reports, deadlines and the line
    cdef Topic *room = NULL       # where there is room for
    cdef int64_t reserved = 0     # messages, counted as in flight, not yet offered, and
    cdef int64_t room_bytes = 0   # bytes, of which
    cdef int64_t bytes = 0        # were taken
    cdef int64_t turn_end = 0
    cdef int64_t wall_us = 0      # what is to be delivered by then has expired
    cdef int64_t now
    cdef int64_t settled = 0    # got their outcome here
    cdef int64_t failed = 0
    cdef int64_t refused = 0    # of these, other than in phase 1: a transaction fails with them
    cdef int answer = DONE
    cdef int code
    cdef int64_t seen = 0
    cdef Record *record
    cdef rd_kafka_topic_t *topic
    cdef rd_kafka_error_t *error
    vus[0].vtype = RD_KAFKA_VTYPE_RKT
    vus[1].vtype = RD_KAFKA_VTYPE_PARTITION
    vus[2].vtype = RD_KAFKA_VTYPE_VALUE
    vus[3].vtype = RD_KAFKA_VTYPE_KEY
    vus[4].vtype = RD_KAFKA_VTYPE_OPAQUE
    vus[5].vtype = RD_KAFKA_VTYPE_TIMESTAMP
    vus[6].vtype = RD_KAFKA_VTYPE_HEADERS
    while i < stop:
        if i == look_at:
            look_at = i + DRAIN_EVERY
            if turn_end == 0:
                turn_end = kb_now_ns() + TURN
            if i != batch.next or c.unpolled >= DRAIN_EVERY or not others_stand_in_line(c):
                poll_ready(c, turn_end)  # a short one leaves that to the others
                c.unpolled = 0
            now = kb_now_ns()
            if batch.deliver_by != NULL:
                wall_us = kb_wall_ns() // 1000
            if KB_LOAD32(&c.shut) or KB_LOAD32(&batch.abandoned):
                answer = SHUT
                break
            if now >= batch.deadline_ns:
                answer = LATE
                break
            if i != batch.next and others_stand_in_line(c) and (
                    now >= turn_end or i - batch.next >= TURN_MESSAGES):
                answer = AGAIN
                break
            if now >= slice_end:
                answer = AGAIN
                break
        record = &batch.records[i]
        if wall_us and 0 < batch.deliver_by[i] <= wall_us and not record.flags:
            record.flags = RECORD_EXPIRED
        if record.flags:
            failed += settle_unsent(&batch.outcomes[i], record, RD_KAFKA_RESP_ERR_NO_ERROR)
            KB_ADD64(&c.waiting, -1)
            settled += 1
            i += 1
            continue
        if reserved == 0 or record.topic != room or bytes >= room_bytes:
            unreserve(c, room, reserved, bytes)
            bytes = 0
            room = record.topic
            reserved = take_room(c, batch, i, stop, &room_bytes)
            if reserved == 0:
                batch.starved = 1
                answer = AGAIN
                break
            batch.starved = 0
        topic = topic_handle(c, record.topic)
        code = RD_KAFKA_RESP_ERR_NO_ERROR
        if topic == NULL:
            code = api.last_error()
        else:
            vus[0].u.rkt = topic
            vus[1].u.i32 = record.partition
            vus[2].u.mem.ptr = record.value
            vus[2].u.mem.size = record.value_len
            vus[3].u.mem.ptr = record.key
            vus[3].u.mem.size = record.key_len
            batch.outcomes[i].batch = batch
            batch.outcomes[i].offset = <int64_t> <size_t> record.topic
            vus[4].u.ptr = &batch.outcomes[i]
            vus[5].u.i64 = record.timestamp
            vus[6].u.headers = build_headers(record) if record.header_count else NULL
            seen = KB_LOAD64(&c.reports)
            error = api.produceva(c.rk, vus, 7)
            if error != NULL:
                drop_headers(vus[6].u.headers)  # still ours: the message was not taken
                code = produce_error(c, error)
        if code == RD_KAFKA_RESP_ERR__QUEUE_FULL:
            batch.queue_full, batch.full_at = 1, seen
            want(c, batch, record.value_len)
            answer = AGAIN
            break
        batch.queue_full = 0
        if batch.wants:
            want(c, batch, 0)
        reserved -= 1
        if code:
            settle_unsent(&batch.outcomes[i], record, code)
            KB_ADD64(&c.in_flight, -1)
            give_room(room, 1, 0)
            settled += 1
            failed += 1
            refused += 1
        else:
            bytes += record.value_len
        i += 1
    c.unpolled += i - batch.next
    batch.next = i
    unreserve(c, room, reserved, bytes)
    if settled:
        kb_mutex_lock(&c.mu)
        count_failed(c, failed)
        kb_mutex_unlock(&c.mu)
        if refused:
            KB_STORE32(&batch.failing, 1)
        settle(c, batch, settled)
    if answer == DONE and i < batch.count:
        answer = AGAIN
    if answer == AGAIN and kb_now_ns() >= batch.deadline_ns:
        answer = LATE
    return answer


cdef void give_up_rest(Client *c, BatchState *batch, int error) noexcept nogil:
    # What was not offered yet is settled as failed and not persisted.
    cdef Py_ssize_t i
    cdef int64_t rest = batch.count - batch.next
    cdef int64_t failed = 0
    cdef bint given_up = False
    cdef int64_t wall_us = 0 if batch.deliver_by == NULL else kb_wall_ns() // 1000
    for i in range(batch.next, batch.count):
        if wall_us and 0 < batch.deliver_by[i] <= wall_us and not batch.records[i].flags:
            batch.records[i].flags = RECORD_EXPIRED
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
    if not batch.detached and batch.in_line:
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
    elif batch.in_line:  # handed over: what its thread sends next must not pass it
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


# -- the drainer: polls when nobody else does, and ends librdkafka

cdef void drainer_main(void *arg) noexcept nogil:
    cdef Client *c = <Client *> arg
    cdef int64_t in_flight, seen_polls = -1, now, purge_after_ns = 0, finished_ns = 0, idle_ns
    cdef BatchState *over
    cdef bint urgent
    cdef int flags, slice_ms, answer
    cdef Notice *unread
    kb_mutex_lock(&c.mu)
    while True:
        in_flight = KB_LOAD64(&c.in_flight)
        now = kb_now_ns()
        if c.life == FINISHING and in_flight == 0 and c.entered == 0 and nobody_in_line(c) and c.held == 0:
            # What happened before the end is still told.
            if finished_ns == 0 and c.events_expected:
                finished_ns = now
                kb_mutex_unlock(&c.mu)
                while poll_once(c, 0, NULL) and kb_now_ns() < finished_ns + LAST_LOOK:
                    pass
                kb_mutex_lock(&c.mu)
                continue
            if c.notice_first == NULL or now > finished_ns + LAST_WORDS:
                break
            drainer_sleep(c, FINISH_PURGE)  # until the dispatcher, which enters to pass them on, leaves
            continue
        if in_flight and now >= purge_after_ns and (c.life == FINISHING or c.fatal_since_ns):
            # Again and again: a slice of an enqueuer, or a request that failed, may bring messages back. A request
            # under way may still be appended, after what another producer sends meanwhile: it gets all of its time.
            purge_after_ns = now + (FINISH_PURGE if c.life == FINISHING else FATAL_PURGE)
            flags = RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_NON_BLOCKING
            if c.life == FINISHING or now > c.fatal_since_ns + c.socket_timeout_ns + FATAL_GRACE:
                flags |= RD_KAFKA_PURGE_F_INFLIGHT
            kb_mutex_unlock(&c.mu)
            api.purge(c.rk, flags)
            kb_mutex_lock(&c.mu)
            continue
        if c.detached:
            if now >= c.look_ns or c.shut:
                over = next_over(c, now)
                if over != NULL:
                    over.ready = 0
                    answer = SHUT if c.shut or KB_LOAD32(&over.abandoned) else LATE
                    kb_mutex_unlock(&c.mu)
                    end_enqueueing(c, over, answer)
                    kb_mutex_lock(&c.mu)
                    continue
            if is_detached(c.turn):
                nudge_dispatcher(c)
                enqueue_detached(c)
                continue
        idle_ns = WAIT_SLICE if c.detached else 0  # 0: nothing to look for
        urgent = c.eager or c.events_expected or c.life >= CLOSING or c.fatal_since_ns
        if (c.leader != NULL or c.callers) and c.life == RUNNING:
            seen_polls = -1
            drainer_sleep(c, DRAINER_NAP if in_flight or c.idle_done != NULL else idle_ns)
            continue
        if not urgent:
            if in_flight == 0 and c.idle_done == NULL:
                drainer_sleep(c, idle_ns)
                continue
            if seen_polls != c.polls:
                # A caller was here a moment ago and may come back: taking its reports away would only cost.
                seen_polls = c.polls
                drainer_sleep(c, DRAINER_NAP)
                continue
            nudge_dispatcher(c)
            if in_flight == 0:
                drainer_sleep(c, DRAINER_NAP)
                continue
        elif in_flight == 0 and not c.events_expected and c.life == RUNNING:
            drainer_sleep(c, DRAINER_NAP if c.idle_done != NULL else idle_ns)
            nudge_dispatcher(c)
            continue
        nudge_dispatcher(c)
        slice_ms = 10 if c.life == FINISHING else 100
        if c.detached:
            slice_ms = <int> min(slice_ms, (c.look_ns - now + MS - 1) // MS)
        c.drainer_polls = 1
        kb_mutex_unlock(&c.mu)
        if not poll_once(c, slice_ms, &c.drainer_self):
            look_for_fatal(c)
        kb_mutex_lock(&c.mu)
        c.drainer_polls = 0
        KB_STORE32(&c.drainer_is_due, 0)
    # Before the lock is given back: an event taken by the dispatcher after this would outlive librdkafka.
    unread = c.notice_first
    c.notice_first = c.notice_last = NULL
    kb_mutex_unlock(&c.mu)
    drop_notices(unread)
    end_librdkafka(c)
    client_drop(c)


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


cdef void nudge_dispatcher(Client *c) noexcept nogil:
    # Under the lock: nobody who holds the GIL has given these batches back yet.
    if c.idle_done != NULL and not c.dispatcher_nudge:
        c.dispatcher_nudge = 1
        kb_cond_signal(&c.dispatcher_cond)


cdef void drainer_sleep(Client *c, int64_t ns) noexcept nogil:
    # Under the lock. `ns` of 0: until signalled.
    if ns:
        c.drainer_asleep = 1
        kb_cond_wait_until(&c.drainer_cond, &c.mu, kb_now_ns() + ns)
        c.drainer_asleep = 0
    else:
        c.drainer_parked = 1
        kb_cond_wait(&c.drainer_cond, &c.mu)
        c.drainer_parked = 0


cdef void end_librdkafka(Client *c) noexcept nogil:
    # Nothing is in flight and no thread is inside a call. Events that nobody took go first: they hold references.
    cdef Topic *topic
    cdef rd_kafka_event_t *event
    while True:
        event = api.queue_poll(c.queue, 0)
        if event == NULL:
            break
        api.event_destroy(event)
    kb_mutex_lock(&c.mu)
    topic = c.topics  # what is mapped meanwhile has no handle
    kb_mutex_unlock(&c.mu)
    while topic != NULL:
        if topic.handle != NULL:
            api.topic_destroy(topic.handle)
            topic.handle = NULL
        topic = topic.next
    api.queue_destroy(c.queue)
    api.destroy(c.rk)
    kb_mutex_lock(&c.mu)
    c.rk = NULL
    c.queue = NULL
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
