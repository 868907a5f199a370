# From events to outcomes: delivery reports are counted, batches completed.

cdef enum:
    # keys of requests in Kafka's protocol
    PRODUCE = 0
    METADATA = 3

cdef enum:
    MESSAGES_AT_ONCE = 128       # messages copied out of an event at a time
    MOST_WAKING = 16             # batches that are finished under one lock


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


cdef void settle_whole(Client *c, BatchState *batch, int64_t acked, int64_t failed) noexcept nogil:
    # Every envelope of `batch`, which was never enqueued, got its outcome at once.
    kb_mutex_lock(&c.mu)
    batch.remaining = 0
    c.acked += acked
    count_failed(c, failed)
    finish(c, &batch, 1, NULL)
    kb_mutex_unlock(&c.mu)


cdef void finish(Client *c, BatchState **batches, int count, Waiter *me) noexcept nogil:
    # Under the lock: these batches are complete; wake the threads that wait for them, or for what else has changed.
    cdef int i
    for i in range(count):
        complete(c, batches[i])
    wake_satisfied(c, me)


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
    cdef BatchState *streak = NULL  # consecutive reports mostly belong to one batch
    cdef BatchState *waking[MOST_WAKING]  # batches that ran down to zero in this event
    cdef Topic *topic = NULL      # of the streak
    cdef Topic *own
    cdef int64_t streak_count = 0, streak_bytes = 0, bytes = 0, total = 0, failed = 0, list_bytes = 0
    cdef int i, n, ran_down = 0
    cdef Outcome *outcome
    cdef HeaderList *kept
    cdef HeaderList *lists = NULL  # the runs of lists of these messages
    cdef HeaderList *last = NULL
    while True:
        n = <int> api.event_message_array(event, messages, MESSAGES_AT_ONCE)
        if n == 0:
            break
        total += n
        for i in range(n):
            message = messages[i]
            outcome = <Outcome *> message._private
            if outcome.offset & 1:
                kept = <HeaderList *> <size_t> (outcome.offset - 1)
                own = kept.topic
                detach_list(message, kept)
                list_bytes += kept.shape.list_bytes
                lists = add_to_runs(lists, kept)
                if lists.next_run == NULL:
                    last = lists
            else:
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
            if outcome.batch == streak and own == topic:
                streak_count += 1
                streak_bytes += message.len
                continue
            bytes += streak_bytes
            give_room(topic, streak_count, streak_bytes)
            if streak != NULL and counts_down(streak, streak_count):
                waking[ran_down] = streak
                ran_down += 1
                if ran_down == MOST_WAKING:
                    kb_mutex_lock(&c.mu)
                    finish(c, waking, ran_down, me)
                    kb_mutex_unlock(&c.mu)
                    ran_down = 0
            streak = outcome.batch
            topic = own
            streak_count = 1
            streak_bytes = message.len
    bytes += streak_bytes
    give_room(topic, streak_count, streak_bytes)
    if streak != NULL and counts_down(streak, streak_count):
        waking[ran_down] = streak
        ran_down += 1
    api.event_destroy(event)
    if failed:
        look_for_fatal(c)
    kb_mutex_lock(&c.mu)
    if last != NULL:
        last.next_run = c.returned
        c.returned = lists
        c.returned_bytes += list_bytes
    KB_ADD64(&c.in_flight, -total)  # with the lists: without messages in flight there is no list that has no owner
    KB_ADD64(&c.bytes, -bytes)
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
