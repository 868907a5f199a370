# What one producer has in C: `Client` in `_fastmap.pxd`. What works on it without the GIL: reports, waiting, line,
# header_lists, enqueue, queues, drainer.
#
# Lock: client.mu guards every field of Client and BatchState that is not marked atomic or const. It is never held
# while librdkafka is called, except for the yield of the main queue: events of a consumer's other queues take it under
# librdkafka's lock of the queue. Nothing in these files touches a Python object.

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
    kb_cond_init(&c.data_cond)
    return c


cdef void client_drop(Client *c) noexcept nogil:
    # Gives back one reference; the last one frees.
    if KB_ADD32(&c.references, -1) != 0:
        return
    pool_end(&c.pool)
    kb_free(c.messages)
    kb_free(c.blocks)
    drop_blocks(&c.spare)
    drop_notices(c.notice_first)
    kb_cond_destroy(&c.drainer_cond)
    kb_cond_destroy(&c.dispatcher_cond)
    kb_cond_destroy(&c.life_cond)
    kb_cond_destroy(&c.data_cond)
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
