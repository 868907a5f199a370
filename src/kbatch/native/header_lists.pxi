# Header lists of librdkafka, reused: to allocate and to free one costs more than all else that a message costs.
#
# The delivery report gives the list of its message back. Then nothing else refers to it: librdkafka has copied the
# headers into the request. A value of the same length is written in place, so a list serves any record of the same
# shape: the same names in the same order, the same lengths of values, the same nulls. The batch whose turn it is owns
# the shapes and the lists without a message; reports give lists back through `Client.returned`.

cdef enum:
    MOST_SHAPES = 1024
    MOST_LISTED = 64        # headers of a list that is kept
    LARGEST_LISTED = 4096   # bytes of its names and values
    HEADER_BYTES = 64       # about what librdkafka allocates for a header besides
    VARIES = 16             # changes after which a value is written each time

cdef int64_t MOST_POOLED_LISTS = 64 * 1024 * 1024  # bytes of lists without a message, for each client
cdef int64_t LISTS_IDLE = 1000 * MS                # after this a client without messages gives its lists back

cdef bint _lists_are_recycled = False  # whether they are as this file takes them to be


cdef inline char **values_of(HeaderList *kept) noexcept nogil:
    return <char **> (kept + 1)


cdef inline int32_t wire_length(Header *h) noexcept nogil:
    # Of its value; -1: null.
    if h.value == NULL:
        return -1
    if h.value_len >= 0:
        return h.value_len
    if h.value_len == VALUE_UUID:
        return UUID_TEXT
    if h.value_len == VALUE_TIME_KBATCH:
        return TIME_TEXT_KBATCH
    if h.value_len == VALUE_TIME_WOLVERINE:
        return TIME_TEXT_WOLVERINE
    return decimal_length((<int32_t *> h.value)[0])


cdef inline bint is_same_name(ShapeHeader *own, Header *h, bint seen) noexcept nogil:
    # An address is that of the same text within a slice only: its batch keeps what it points at.
    if own.name_len != h.name_len:
        return False
    if seen and own.seen == h.name:
        return True
    if memcmp(own.name, h.name, h.name_len) != 0:
        return False
    own.seen = h.name
    return True


cdef inline void note_value(ShapeHeader *own, Header *h, int64_t takes) noexcept nogil:
    # What is written now, so that lists that hold it already are left as they are: to touch a header costs more.
    if own.changed == INT64_MAX or own.value_len <= 0:
        return
    if h.value_len >= 0:
        if memcmp(own.last, h.value, own.value_len) == 0:
            if own.changes:
                own.changes -= 1
            return
        own.changes += 1
        if own.changes < VARIES:
            memcpy(own.last, h.value, own.value_len)
            own.changed = takes
            return
    own.changed = INT64_MAX


cdef inline void write_in_place(Header *h, char *value) noexcept nogil:
    # A value of the length that stands there.
    cdef char text[UUID_TEXT]
    cdef int32_t length
    if h.value == NULL:
        return
    if h.value_len >= 0:
        memcpy(value, h.value, h.value_len)
    else:
        length = write_value(h, text)
        memcpy(value, text, length)


cdef bint fits(ListPool *pool, Shape *shape, Record *record) noexcept nogil:
    # Whether the record has this shape.
    cdef bint seen = shape.slice == pool.slice
    cdef Header *h = record.headers
    cdef ShapeHeader *own = shape.headers
    cdef int32_t i
    if shape.count != record.header_count:
        return False
    shape.slice = 0  # no address counts before all of them do
    for i in range(shape.count):
        if own[i].value_len != wire_length(&h[i]) or not is_same_name(&own[i], &h[i], seen):
            return False
    shape.slice = pool.slice
    return True


cdef Shape *make_shape(ListPool *pool, Record *record, uint32_t mark, int64_t size) noexcept nogil:
    # NULL when memory is short. `size`: of names and values, which are copied.
    cdef int32_t count = record.header_count
    cdef Header *h = record.headers
    cdef int32_t i, length
    cdef Shape *shape
    cdef char *text
    shape = <Shape *> kb_calloc(1, sizeof(Shape) + count * sizeof(ShapeHeader) + size)
    if shape == NULL:
        return NULL
    shape.headers = <ShapeHeader *> (shape + 1)
    shape.mark = mark
    shape.count = count
    shape.list_bytes = size + count * HEADER_BYTES + <int64_t> (sizeof(HeaderList) + count * sizeof(char *))
    text = <char *> (shape.headers + count)
    for i in range(count):
        memcpy(text, h[i].name, h[i].name_len)
        shape.headers[i].name = text
        shape.headers[i].name_len = h[i].name_len
        text += h[i].name_len
        length = shape.headers[i].value_len = wire_length(&h[i])
        shape.headers[i].last = text
        if h[i].value_len < 0:
            shape.headers[i].changed = INT64_MAX  # its text is made each time
        elif length > 0:
            memcpy(text, h[i].value, length)
        text += max(0, length)
    shape.next = pool.buckets[mark % SHAPE_BUCKETS]
    pool.buckets[mark % SHAPE_BUCKETS] = shape
    pool.shapes += 1
    return shape


cdef HeaderList *make_list(Shape *shape, Record *record) noexcept nogil:
    # With the record's headers; NULL when memory is short, or the list is not what it should be.
    cdef HeaderList *kept = <HeaderList *> kb_malloc(sizeof(HeaderList) + shape.count * sizeof(char *))
    cdef const char *name
    cdef const void *value
    cdef size_t size
    cdef int32_t i
    if kept == NULL:
        return NULL
    kept.headers = build_headers(record)
    kept.shape = shape
    kept.next = NULL
    kept.written = shape.takes
    shape.lists += 1
    for i in range(shape.count):
        if api.header_get_all(kept.headers, i, &name, &value, &size) or <int64_t> size != max(
                0, shape.headers[i].value_len):
            free_list(kept)
            return NULL
        values_of(kept)[i] = <char *> value
        note_value(&shape.headers[i], &record.headers[i], shape.takes)
    return kept


cdef inline void guard(HeaderList *kept, bint guarded) noexcept nogil:
    # A list that no message has is touched by nobody: the address sanitizer sees to it.
    cdef int32_t i, size
    if not KB_POISONS:
        return
    for i in range(kept.shape.count):
        size = max(0, kept.shape.headers[i].value_len)
        if guarded:
            kb_poison(values_of(kept)[i], size)
        else:
            kb_unpoison(values_of(kept)[i], size)


cdef void free_list(HeaderList *kept) noexcept nogil:
    # One that no message has.
    cdef Shape *shape = kept.shape
    drop_headers(kept.headers)
    kb_free(kept)
    shape.lists -= 1
    if shape.is_dropped and shape.lists == 0:
        kb_free(shape)


cdef void free_lists(ListPool *pool, Shape *shape) noexcept nogil:
    # Its lists that no message has, but not the shape.
    cdef HeaderList *kept = shape.free
    cdef HeaderList *following
    shape.free = NULL
    while kept != NULL:
        following = kept.next
        KB_ADD64(&pool.pooled_bytes, -shape.list_bytes)
        guard(kept, False)
        free_list(kept)
        kept = following


cdef void drop_shape(ListPool *pool, Shape **place) noexcept nogil:
    # Takes the shape at `place` out of its bucket.
    cdef Shape *shape = place[0]
    place[0] = shape.next
    pool.shapes -= 1
    free_lists(pool, shape)
    if shape.lists == 0:
        kb_free(shape)
    else:
        shape.is_dropped = 1


cdef void drop_one_shape(ListPool *pool) noexcept nogil:
    # One that was not used for a while: the hand goes round once, and each bucket that it passes starts anew.
    cdef int turns
    cdef Shape **place
    for turns in range(2 * SHAPE_BUCKETS):
        pool.hand = (pool.hand + 1) % SHAPE_BUCKETS
        place = &pool.buckets[pool.hand]
        while place[0] != NULL:
            if not place[0].is_used:
                drop_shape(pool, place)
                return
            place[0].is_used = 0
            place = &place[0].next


cdef HeaderList *take_list(Client *c, Record *record) noexcept nogil:
    # A list with the record's headers; NULL: build one that is not kept.
    cdef ListPool *pool = c.lists
    cdef Header *h = record.headers
    cdef int32_t count = record.header_count
    cdef uint32_t mark = <uint32_t> count
    cdef int64_t size = 0
    cdef int32_t i, length
    cdef Shape *shape
    cdef HeaderList *kept
    cdef HeaderList *following
    if not c.recycles or count > MOST_LISTED:
        return NULL
    if pool == NULL:
        pool = <ListPool *> kb_calloc(1, sizeof(ListPool))
        if pool == NULL:
            return NULL
        pool.slice = 1
        c.lists_used_ns = kb_now_ns()
        kb_mutex_lock(&c.mu)
        c.lists = pool
        kb_cond_signal(&c.drainer_cond)  # it may sleep until it is signalled, and has these to give back now
        kb_mutex_unlock(&c.mu)
    for i in range(count):
        length = wire_length(&h[i])
        size += h[i].name_len + max(0, length)
        mark = (mark ^ (<uint32_t> length * <uint32_t> 31 + <uint32_t> h[i].name_len)) * <uint32_t> 16777619
    if size > LARGEST_LISTED:
        return NULL
    mark ^= mark >> 15
    shape = pool.buckets[mark % SHAPE_BUCKETS]
    while shape != NULL and not (shape.mark == mark and fits(pool, shape, record)):
        shape = shape.next
    if shape == NULL:
        if pool.seen[mark % SHAPES_SEEN] != mark:
            pool.seen[mark % SHAPES_SEEN] = mark
            return NULL
        if pool.shapes >= MOST_SHAPES:
            drop_one_shape(pool)
        shape = make_shape(pool, record, mark, size)
        if shape == NULL:
            return NULL
    shape.is_used = 1
    shape.takes += 1
    kept = shape.free
    if kept == NULL:
        return make_list(shape, record)
    following = kept.next
    shape.free = following
    if following != NULL:
        kb_prefetch(following.next, sizeof(HeaderList) + count * sizeof(char *))
    guard(kept, False)
    KB_ADD64(&pool.pooled_bytes, -shape.list_bytes)
    for i in range(count):
        note_value(&shape.headers[i], &h[i], shape.takes)
        if kept.written < shape.headers[i].changed:
            write_in_place(&h[i], values_of(kept)[i])
            if following != NULL:
                kb_prefetch(values_of(following)[i], 1)
    kept.written = shape.takes
    return kept


cdef void keep_list(ListPool *pool, HeaderList *kept) noexcept nogil:
    # For the next record of its shape, unless there are enough, or librdkafka has not given it back.
    cdef Shape *shape = kept.shape
    if kept.headers == NULL or shape.is_dropped or KB_LOAD64(&pool.pooled_bytes) >= MOST_POOLED_LISTS:
        free_list(kept)
        return
    KB_ADD64(&pool.pooled_bytes, shape.list_bytes)
    guard(kept, True)
    kept.next = shape.free
    shape.free = kept


cdef void keep_run(ListPool *pool, HeaderList *first) noexcept nogil:
    # All of its lists at once: to look at each costs a miss of the caches, of which a large batch has many.
    cdef Shape *shape = first.shape
    cdef HeaderList *kept = first
    cdef HeaderList *following
    cdef int64_t size = first.in_run * shape.list_bytes
    if first.headers == NULL or shape.is_dropped or KB_LOAD64(&pool.pooled_bytes) + size > MOST_POOLED_LISTS:
        while kept != NULL:
            following = kept.next
            keep_list(pool, kept)
            kept = following
        return
    while KB_POISONS and kept != NULL:
        guard(kept, True)
        kept = kept.next
    KB_ADD64(&pool.pooled_bytes, size)
    first.last.next = shape.free
    shape.free = first


cdef void collect_lists(Client *c, int64_t now) noexcept nogil:
    # What reports have given back. The batch whose turn it is calls it.
    cdef HeaderList *run
    cdef HeaderList *following
    kb_mutex_lock(&c.mu)
    run = c.returned
    c.returned = NULL
    c.returned_bytes = 0
    kb_mutex_unlock(&c.mu)
    c.lists_used_ns = now
    while run != NULL:
        following = run.next_run
        keep_run(c.lists, run)
        run = following


cdef inline void detach_list(const rd_kafka_message_t *message, HeaderList *kept) noexcept nogil:
    # The message of a delivery report gives its list back.
    cdef rd_kafka_headers_t *headers = NULL
    if api.message_detach_headers(<rd_kafka_message_t *> message, &headers) or headers != kept.headers:
        drop_headers(headers)
        kept.headers = NULL


cdef inline HeaderList *add_to_runs(HeaderList *runs, HeaderList *kept) noexcept nogil:
    # The runs with one more list. The latest is the first of all, so what is warm is taken again first. A list that
    # librdkafka has not given back is a run of its own.
    kept.next = NULL
    kept.last = kept
    kept.next_run = runs
    kept.in_run = 1
    if runs != NULL and runs.shape == kept.shape and runs.headers != NULL and kept.headers != NULL:
        kept.next = runs
        kept.last = runs.last
        kept.next_run = runs.next_run
        kept.in_run = runs.in_run + 1
    return kept


cdef void free_pool(ListPool *pool, HeaderList *returned) noexcept nogil:
    # No message has a list of it any more.
    cdef int i
    cdef HeaderList *following
    cdef HeaderList *next_run
    while returned != NULL:
        next_run = returned.next_run
        while returned != NULL:
            following = returned.next
            free_list(returned)
            returned = following
        returned = next_run
    if pool != NULL:
        for i in range(SHAPE_BUCKETS):
            while pool.buckets[i] != NULL:
                drop_shape(pool, &pool.buckets[i])
        kb_free(pool)


cdef void drop_lists(Client *c) noexcept nogil:
    # Under the lock on entry and exit, with nothing in flight and nobody in line: all of them.
    cdef ListPool *pool = c.lists
    cdef HeaderList *returned = c.returned
    c.lists = NULL  # first: `counters` looks at it
    c.returned = NULL
    c.returned_bytes = 0
    kb_mutex_unlock(&c.mu)
    free_pool(pool, returned)
    kb_mutex_lock(&c.mu)


def lists_are_as_expected() -> bool:
    """Whether a value can be overwritten in a header list of librdkafka's, which its API does not promise."""
    cdef rd_kafka_headers_t *headers = api.headers_new(3)
    cdef const char *name
    cdef const void *value
    cdef size_t size
    cdef bint good = False
    if headers == NULL:
        return False
    api.header_add(headers, b"first", 5, b"12345", 5)
    api.header_add(headers, b"null", 4, NULL, 0)
    api.header_add(headers, b"empty", 5, b"", 0)
    if api.header_get_all(headers, 0, &name, &value, &size) == 0 and size == 5 and memcmp(value, b"12345", 5) == 0:
        memcpy(<char *> value, b"abcde", 5)
        good = (
            api.header_get_all(headers, 0, &name, &value, &size) == 0 and size == 5
            and memcmp(value, b"abcde", 5) == 0 and memcmp(name, b"first", 6) == 0
            and api.header_get_all(headers, 1, &name, &value, &size) == 0 and value == NULL
            and api.header_get_all(headers, 2, &name, &value, &size) == 0 and value != NULL and size == 0
            and api.header_get_all(headers, 3, &name, &value, &size) != 0)
    api.headers_destroy(headers)
    return good


def recycle_lists(bint recycled) -> bool:
    """Switches it for producers that start from now on; what it was before."""
    global _lists_are_recycled
    before, _lists_are_recycled = _lists_are_recycled, recycled
    return before


_lists_are_recycled = lists_are_as_expected()
