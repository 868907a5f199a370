# What batches take memory from, again and again: arenas, record arrays, topics.

cdef enum:
    ARENA_BLOCK = 65536
    POOLED_BLOCKS = 256        # 16 MiB of arena kept for reuse per pool
    POOLED_RECORDS = 65536     # the largest record array kept for reuse
    FEWEST_BUCKETS = 16

cdef Py_ssize_t LONGEST_TAKEN = PY_SSIZE_T_MAX - ARENA_BLOCK


cdef void pool_begin(Pool *pool) noexcept nogil:
    # `pool` is all zeros.
    kb_mutex_init(&pool.mu)


cdef void pool_end(Pool *pool) noexcept nogil:
    # Nothing of it is in use.
    cdef Topic *topic
    cdef ArenaBlock *block
    while pool.topics != NULL:
        topic = pool.topics
        pool.topics = topic.next
        kb_free(topic.name)
        kb_free(topic)
    kb_free(pool.buckets)
    while pool.spare_blocks != NULL:
        block = pool.spare_blocks
        pool.spare_blocks = block.next
        kb_free(block)
    kb_free(pool.spare_records)
    kb_mutex_destroy(&pool.mu)


cdef int64_t pool_bytes(Pool *pool) noexcept nogil:
    # What is kept for reuse.
    cdef int64_t bytes
    kb_mutex_lock(&pool.mu)
    bytes = pool.spare_block_count * <int64_t> ARENA_BLOCK
    if pool.spare_records != NULL:
        bytes += pool.spare_records_capacity * <int64_t> sizeof(Record)
    kb_mutex_unlock(&pool.mu)
    return bytes


cdef inline size_t _block_room(ArenaBlock *block) noexcept nogil:
    return block.size - block.used if block != NULL else 0


cdef char *arena_take(Pool *pool, ArenaBlock **arena, Py_ssize_t length) noexcept nogil:
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
            kb_mutex_lock(&pool.mu)
            block = pool.spare_blocks
            if block != NULL:
                pool.spare_blocks = block.next
                pool.spare_block_count -= 1
            kb_mutex_unlock(&pool.mu)
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


cdef void arena_give(Pool *pool, ArenaBlock **arena) noexcept nogil:
    cdef ArenaBlock *block = arena[0]
    cdef ArenaBlock *rest = NULL
    cdef ArenaBlock *following
    arena[0] = NULL
    if block == NULL:
        return
    kb_mutex_lock(&pool.mu)
    while block != NULL:
        following = block.next
        if block.size == ARENA_BLOCK - sizeof(ArenaBlock) and pool.spare_block_count < POOLED_BLOCKS:
            block.next = pool.spare_blocks
            pool.spare_blocks = block
            pool.spare_block_count += 1
        else:
            block.next = rest
            rest = block
        block = following
    kb_mutex_unlock(&pool.mu)
    while rest != NULL:
        following = rest.next
        kb_free(rest)
        rest = following


cdef void arena_rewind(Pool *pool, ArenaBlock **arena, ArenaBlock *block, size_t used) noexcept nogil:
    # Gives back what was taken since `block` was the last one and had `used` bytes in use.
    cdef ArenaBlock *newer = arena[0]
    cdef ArenaBlock *oldest = newer
    if newer != block:
        while oldest.next != block:
            oldest = oldest.next
        oldest.next = NULL
        arena[0] = block
        arena_give(pool, &newer)
    if block != NULL:
        block.used = used


cdef Record *records_take(Pool *pool, Py_ssize_t count, Py_ssize_t *capacity) noexcept nogil:
    cdef Record *records = NULL
    kb_mutex_lock(&pool.mu)
    if pool.spare_records != NULL and pool.spare_records_capacity >= count:
        records = pool.spare_records
        capacity[0] = pool.spare_records_capacity
        pool.spare_records = NULL
    kb_mutex_unlock(&pool.mu)
    if records == NULL:
        records = <Record *> kb_malloc(<size_t> count * sizeof(Record))
        capacity[0] = count
    return records


cdef void records_give(Pool *pool, Record **records, Py_ssize_t capacity) noexcept nogil:
    # The larger one of two stays, up to a bound.
    cdef Record *drop = records[0]
    records[0] = NULL
    if drop == NULL:
        return
    if capacity <= POOLED_RECORDS:
        kb_mutex_lock(&pool.mu)
        if pool.spare_records == NULL or pool.spare_records_capacity < capacity:
            drop, pool.spare_records = pool.spare_records, drop
            pool.spare_records_capacity = capacity
        kb_mutex_unlock(&pool.mu)
    kb_free(drop)


cdef uint32_t _topic_hash(const char *name, Py_ssize_t length) noexcept nogil:
    # FNV-1a.
    cdef uint32_t hash = 2166136261
    cdef Py_ssize_t i
    for i in range(length):
        hash = (hash ^ <uint8_t> name[i]) * <uint32_t> 16777619
    return hash


cdef Topic *_topic_in(Pool *pool, const char *name, Py_ssize_t length, uint32_t hash) noexcept nogil:
    # Under the lock.
    cdef Topic *topic = NULL
    if pool.bucket_count:
        topic = pool.buckets[hash & (pool.bucket_count - 1)]
    while topic != NULL and not (
            topic.hash == hash and topic.name_len == length and memcmp(topic.name, name, length) == 0):
        topic = topic.next_in_bucket
    return topic


cdef void _file_topic(Pool *pool, Topic *topic) noexcept nogil:
    cdef Topic **bucket = &pool.buckets[topic.hash & (pool.bucket_count - 1)]
    topic.next_in_bucket = bucket[0]
    bucket[0] = topic


cdef bint _grow_topics(Pool *pool) noexcept nogil:
    # Under the lock. False if there are no buckets at all: with too few it takes longer, that is all.
    cdef size_t count = 2 * pool.bucket_count if pool.bucket_count else FEWEST_BUCKETS
    cdef Topic **buckets = <Topic **> kb_calloc(count, sizeof(Topic *))
    cdef Topic *topic = pool.topics
    if buckets == NULL:
        return pool.bucket_count != 0
    kb_free(pool.buckets)
    pool.buckets, pool.bucket_count = buckets, count
    while topic != NULL:
        _file_topic(pool, topic)
        topic = topic.next
    return True


cdef Topic *find_topic(Pool *pool, const char *name, Py_ssize_t length) noexcept nogil:
    # NULL if there is none of this name yet.
    cdef Topic *topic
    cdef uint32_t hash = _topic_hash(name, length)
    kb_mutex_lock(&pool.mu)
    topic = _topic_in(pool, name, length, hash)
    kb_mutex_unlock(&pool.mu)
    return topic


cdef Topic *make_topic(Pool *pool, const char *name, Py_ssize_t length) noexcept nogil:
    # The one of this name, new unless another has made it meanwhile. NULL when memory is short.
    cdef uint32_t hash = _topic_hash(name, length)
    cdef Topic *known
    cdef Topic *topic = <Topic *> kb_calloc(1, sizeof(Topic))
    if topic == NULL:
        return NULL
    topic.name = <char *> kb_malloc(length + 1)
    if topic.name == NULL:
        kb_free(topic)
        return NULL
    memcpy(topic.name, name, length)
    topic.name[length] = 0
    topic.name_len, topic.hash = length, hash
    kb_mutex_lock(&pool.mu)
    known = _topic_in(pool, name, length, hash)
    if known == NULL and (pool.topic_count < pool.bucket_count or _grow_topics(pool)):
        pool.topic_count += 1
        topic.next = pool.topics
        pool.topics = known = topic
        _file_topic(pool, topic)
    kb_mutex_unlock(&pool.mu)
    if known != topic:
        kb_free(topic.name)
        kb_free(topic)
    return known


@cython.final
cdef class RecordPool:
    """A pool of its own, for envelopes that are mapped and not sent by a producer."""

    def __cinit__(self):
        pool_begin(&self.pool)

    def __dealloc__(self):
        pool_end(&self.pool)

    def map(self, Mapper mapper not None, topic, envelopes) -> MappedBatch:
        """Phase 1: all of the envelopes, or it raises as a producer does."""
        cdef MappedBatch batch = MappedBatch.__new__(MappedBatch)
        cdef _Mapping mapping
        cdef int64_t offered_ns
        batch.state.pool, batch.keeper = &self.pool, self
        mapping = begin_mapping(mapper, batch, topic, envelopes, False)
        if batch.state.count == 1:  # without a look at the clock
            mapping._run(INT64_MAX)
            return batch
        offered_ns = kb_now_ns()
        while not mapping._run(kb_now_ns() + MAP_SLICE):
            offer_gil(&offered_ns)
        return batch

    def records(self, MappedBatch batch not None) -> list:
        """As `Core.records`."""
        return batch._records()

    def pack(self, MappedBatch batch not None) -> list:
        """Its records, packed; None for an envelope whose ``deliver_by`` has passed."""
        return packed_records(batch)

    def count(self, MappedBatch batch not None) -> int:
        """How many rows it has."""
        cdef Py_ssize_t i, count = 0
        for i in range(batch.state.count):
            count += batch.state.records[i].flags == 0
        return count

    def rows(self, batches, int64_t first_seq, int buckets, list scheduled=None, *, created_us=None) -> list:
        """The records of batches as rows of an outbox: ``(bucket, seq, id, packed, created_us, deliver_by_us or
        None)``.

        Numbers count from `first_seq`. An envelope whose ``deliver_by`` has passed has no row. Those whose
        ``scheduled_time`` is later than `created_us`, by default now, go to the list `scheduled`, if there is one, with
        that time in milliseconds at the end.
        """
        return stored_rows(
            batches, first_seq, buckets, scheduled, kb_wall_ns() // 1000 if created_us is None else created_us)
