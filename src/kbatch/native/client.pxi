# What one producer has in C. What works on it without the GIL: reports, waiting, line, enqueue, drainer.
#
# Lock: client.mu guards every field of Client and BatchState that is not marked atomic or const. It is never held
# while librdkafka is called, except for the yield of a queue. Nothing in these files touches a Python object.

cdef enum:
    # Client.life
    NEW = 0        # librdkafka not started
    RUNNING = 1
    CLOSING = 2    # no new batches; those in line are enqueued; the drainer polls
    FINISHING = 3  # the drainer destroys librdkafka once nothing is in flight
    CLOSED = 4


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
    Pool pool               # with a lock of its own; handles of its topics are destroyed with rk
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
    pool_begin(&c.pool)
    kb_cond_init(&c.drainer_cond)
    kb_cond_init(&c.dispatcher_cond)
    kb_cond_init(&c.life_cond)
    return c


cdef void client_drop(Client *c) noexcept nogil:
    # Gives back one reference; the last one frees.
    if KB_ADD32(&c.references, -1) != 0:
        return
    pool_end(&c.pool)
    drop_notices(c.notice_first)
    kb_cond_destroy(&c.drainer_cond)
    kb_cond_destroy(&c.dispatcher_cond)
    kb_cond_destroy(&c.life_cond)
    kb_mutex_destroy(&c.mu)
    kb_free(c)


cdef void leave(Client *c) noexcept nogil:
    # Under the lock: a thread that had entered lets librdkafka go.
    c.entered -= 1
    if c.life >= CLOSING and c.entered == 0:
        kb_cond_broadcast(&c.life_cond)
        kb_cond_signal(&c.drainer_cond)


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


cdef void drop_event(Client *c, rd_kafka_event_t *event) noexcept nogil:
    # librdkafka asks for a token once, and again only after it was told of a failure.
    if api.event_type(event) == RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH:
        api.oauthbearer_set_token_failure(c.rk, b"no memory to pass on that a token is wanted")
    api.event_destroy(event)
