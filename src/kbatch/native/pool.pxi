# What batches take memory from, again and again: arenas, record arrays, topics.

cdef struct ArenaBlock:
    ArenaBlock *next
    size_t used
    size_t size  # bytes after this struct


cdef enum:
    ARENA_BLOCK = 65536
    POOLED_BLOCKS = 256        # 16 MiB of arena kept for reuse per client
    POOLED_RECORDS = 65536     # the largest record array kept for reuse

cdef Py_ssize_t LONGEST_TAKEN = PY_SSIZE_T_MAX - ARENA_BLOCK


cdef inline size_t _block_room(ArenaBlock *block) noexcept nogil:
    return block.size - block.used if block != NULL else 0


cdef char *arena_take(Client *client, ArenaBlock **arena, Py_ssize_t length) noexcept nogil:
    # `length` bytes, aligned to 8, that do not move until arena_give; NULL when memory is short, or for a length that
    # is negative or so large that it is none when it is rounded up.
    cdef ArenaBlock *block = arena[0]
    cdef char *p
    cdef size_t want, size
    if not 0 <= length <= LONGEST_TAKEN:
        return NULL
    size = (<size_t> length + 7) & ~<size_t> 7
    if size > _block_room(block):
        block = NULL
        want = ARENA_BLOCK - sizeof(ArenaBlock)
        if size <= want:
            kb_mutex_lock(&client.mu)
            block = client.spare_blocks
            if block != NULL:
                client.spare_blocks = block.next
                client.spare_block_count -= 1
            kb_mutex_unlock(&client.mu)
        else:
            want = size
        if block == NULL:
            block = <ArenaBlock *> kb_malloc(sizeof(ArenaBlock) + want)
            if block == NULL:
                return NULL
            block.size = want
        block.used = 0
        block.next = arena[0]
        arena[0] = block
    p = <char *> (block + 1) + block.used
    block.used += size
    return p


cdef void arena_give(Client *client, ArenaBlock **arena) noexcept nogil:
    cdef ArenaBlock *block = arena[0]
    cdef ArenaBlock *rest = NULL
    cdef ArenaBlock *following
    arena[0] = NULL
    if block == NULL:
        return
    kb_mutex_lock(&client.mu)
    while block != NULL:
        following = block.next
        if block.size == ARENA_BLOCK - sizeof(ArenaBlock) and client.spare_block_count < POOLED_BLOCKS:
            block.next = client.spare_blocks
            client.spare_blocks = block
            client.spare_block_count += 1
        else:
            block.next = rest
            rest = block
        block = following
    kb_mutex_unlock(&client.mu)
    while rest != NULL:
        following = rest.next
        kb_free(rest)
        rest = following


cdef void arena_rewind(Client *client, ArenaBlock **arena, ArenaBlock *block, size_t used) noexcept nogil:
    # Gives back what was taken since `block` was the last one and had `used` bytes in use.
    cdef ArenaBlock *newer = arena[0]
    cdef ArenaBlock *oldest = newer
    if newer != block:
        while oldest.next != block:
            oldest = oldest.next
        oldest.next = NULL
        arena[0] = block
        arena_give(client, &newer)
    if block != NULL:
        block.used = used


cdef Record *records_take(Client *client, Py_ssize_t count, Py_ssize_t *capacity) noexcept nogil:
    cdef Record *records = NULL
    kb_mutex_lock(&client.mu)
    if client.spare_records != NULL and client.spare_records_capacity >= count:
        records = client.spare_records
        capacity[0] = client.spare_records_capacity
        client.spare_records = NULL
    kb_mutex_unlock(&client.mu)
    if records == NULL:
        records = <Record *> kb_malloc(<size_t> count * sizeof(Record))
        capacity[0] = count
    return records


cdef void records_give(Client *client, Record **records, Py_ssize_t capacity) noexcept nogil:
    # The larger one of two stays, up to a bound.
    cdef Record *drop = records[0]
    records[0] = NULL
    if drop == NULL:
        return
    if capacity <= POOLED_RECORDS:
        kb_mutex_lock(&client.mu)
        if client.spare_records == NULL or client.spare_records_capacity < capacity:
            drop, client.spare_records = client.spare_records, drop
            client.spare_records_capacity = capacity
        kb_mutex_unlock(&client.mu)
    kb_free(drop)


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
