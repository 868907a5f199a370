# librdkafka's queues are given back before it is destroyed. A consumer has several: what a poll has taken from them and
# not given out goes first, and its last rebalance is answered.

cdef void drop_taken(Client *c) noexcept nogil:
    # What a poll has taken and not given out.
    cdef Py_ssize_t i
    for i in range(c.taken):
        if c.messages[i] != NULL:
            api.message_destroy(c.messages[i])
        kb_free(c.blocks[i])
    c.taken = c.given_out = 0


cdef void drop_queue(rd_kafka_queue_t **queue) noexcept nogil:
    if queue[0] != NULL:
        api.queue_destroy(queue[0])
    queue[0] = NULL


cdef void drop_part(Part *part) noexcept nogil:
    api.queue_cb_event_enable(part.queue, NULL, NULL)
    api.queue_destroy(part.queue)
    kb_free(part)


cdef void answer_rebalance(rd_kafka_t *rk, int code, const rd_kafka_topic_partition_list_t *partitions) noexcept nogil:
    # Takes what is given, gives back what is taken; each way of a group to share partitions has its own calls. One that
    # has left its group has none, and takes nothing.
    cdef const char *protocol = api.rebalance_protocol(rk)
    cdef rd_kafka_error_t *error = NULL
    cdef bint cooperative = protocol != NULL and protocol[0] == c'C'
    if protocol != NULL and code == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
        if cooperative:
            error = api.incremental_assign(rk, partitions)
        else:
            api.assign(rk, partitions)
    elif cooperative and partitions.cnt and code == RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS:
        error = api.incremental_unassign(rk, partitions)
    else:
        api.assign(rk, NULL)
    if error != NULL:
        api.error_destroy(error)


cdef void drop_queues(Client *c) noexcept nogil:
    # Before librdkafka is destroyed, which waits for its messages and for the answer to a rebalance. A consumer leaves
    # its group meanwhile.
    cdef rd_kafka_topic_partition_list_t *unanswered
    cdef Part *part
    kb_mutex_lock(&c.mu)
    c.rebalances_itself = 1
    unanswered, c.rebalance = c.rebalance, NULL
    kb_mutex_unlock(&c.mu)
    if unanswered != NULL:
        answer_rebalance(c.rk, c.rebalance_code, unanswered)
        api.list_destroy(unanswered)
    drop_taken(c)
    while c.parts != NULL:
        part = c.parts
        c.parts = part.next
        drop_part(part)
    c.ready_first = c.ready_last = NULL
    drop_queue(&c.queue)
    if c.group_queue != NULL:
        api.queue_cb_event_enable(c.group_queue, NULL, NULL)
    drop_queue(&c.group_queue)
    drop_queue(&c.commit_queue)
