# What a batch is made of in C, and who owns each part until when.

cdef enum:
    # Outcome.state
    PENDING = 0
    ACKED = 1
    FAILED = 2
    EXPIRED = 3   # deliver_by had passed; never sent, not a failure

cdef enum:
    # Header.value_len when the value is made while the header is added, from the field that `value` points at
    VALUE_NULL = -1
    VALUE_UUID = -2
    VALUE_TIME_KBATCH = -3
    VALUE_TIME_WOLVERINE = -4
    VALUE_INT32 = -5

cdef enum:
    # Record.flags: what is not sent. Of such a record only `flags` and `partition` are set.
    RECORD_EXPIRED = 1
    RECORD_REJECTED = 2  # it could not be mapped, and the batch goes on without it


cdef struct Outcome:
    # One per envelope, the opaque of its produce call. Written by whoever polls its delivery report, or by phase 2
    # when it is not sent; read after the batch is done.
    BatchState *batch
    int64_t offset       # the address of its Topic, until it is known
    int32_t partition
    int16_t error
    uint8_t state
    uint8_t persistence  # rd_kafka_message_status: not, possibly, persisted


cdef struct Header:
    const char *name    # static, or the UTF-8 of a str that the batch's envelopes keep alive
    const char *value   # the same, or a field of the envelope (see VALUE_…)
    int32_t name_len
    int32_t value_len


cdef struct Topic:
    # Made once per name and client (`Core.topics`), freed with the client.
    char *name                # owned
    rd_kafka_topic_t *handle  # owned; made when a batch first enqueues to it
    int64_t in_flight         # atomic: its part of Client.in_flight
    int64_t bytes             # atomic: its part of Client.bytes
    Place *first              # detached batches that write to it, in the order in which they came; only the first one
    Place *last               # may. Under the client's lock
    Topic *next


cdef struct Place:
    # One topic of a batch, and the batch's place among those that wait to write to it.
    Topic *topic
    BatchState *batch
    Place *other      # owned: the batch's next topic
    Place *ahead
    Place *behind


cdef struct Record:
    # What phase 1 writes and phase 2 reads. Pointers are borrowed: from the envelopes and the objects that the Batch
    # keeps until it is done, from `bodies` as long, from the arena until phase 2 ends.
    const char *key      # NULL: no key
    const char *value    # NULL: a tombstone
    Header *headers      # in the arena
    Topic *topic
    int64_t timestamp    # ms
    int64_t value_len
    int32_t key_len
    int32_t header_count
    int32_t partition
    int32_t flags


cdef struct ArenaBlock:
    ArenaBlock *next
    size_t used
    size_t size  # bytes after this struct


cdef enum:
    ARENA_BLOCK = 65536
    POOLED_BLOCKS = 256        # 16 MiB of arena kept for reuse per client
    POOLED_RECORDS = 65536     # the largest record array kept for reuse


cdef Py_ssize_t LONGEST_TAKEN = PY_SSIZE_T_MAX - ARENA_BLOCK


cdef struct Line:
    # Batches that wait, in order. A batch stands in one at most.
    BatchState *first
    BatchState *last


cdef struct BatchState:
    # Lives inside its Python Batch, which the client keeps alive (`owner`) while anything is in flight.
    Client *client        # kept by the Batch's Core
    PyObject *owner       # a reference, taken when phase 2 starts, given back when the batch is released
    Outcome *outcomes     # owned by the Batch's Outcomes
    Record *records       # owned until phase 2 ends
    ArenaBlock *arena     # the same
    ArenaBlock *bodies    # owned until the batch is released: librdkafka reads them until their reports
    Py_ssize_t capacity   # of `records`
    int64_t *deliver_by   # owned until phase 2 ends: of each record, µs since 1970, 0 without; NULL: of none
    Py_ssize_t count
    Py_ssize_t next       # the first record not yet offered
    Place place           # its topics, from phase 1 on
    int64_t remaining     # envelopes without an outcome, 1 while phase 2 runs, and `hold`; atomic
    int64_t hold          # 1: a transaction decides when the batch is done; then 0. Under the client's lock
    int32_t done          # atomic; written under the client's lock
    int32_t settled       # of a batch on hold: every envelope has an outcome; written under the client's lock
    int32_t taken         # of a batch on hold: somebody sees to its answer; under the GIL
    int32_t failing       # atomic: an envelope has failed that could be mapped
    int32_t abandoned     # atomic: nobody wants what is not enqueued yet
    int32_t detached      # the drainer enqueues it, not the thread that sends it, which alone may set it in line
    int32_t in_line       # phase 2 is not over; its thread's own, of a detached batch under the client's lock
    unsigned long thread  # const in line: that enqueues it, unless it is detached
    int32_t listeners     # wants the dispatcher; under the client's lock, as all below
    int32_t tell_enqueued  # wants the dispatcher at the end of phase 2, too
    int32_t has_news      # waits for the dispatcher
    int64_t started_ns
    int64_t done_ns
    int64_t deadline_ns   # no enqueueing after this
    BatchState *next_news     # of those for the dispatcher, or of those that are done and nobody listens to
    Line *line            # where it stands; under the client's lock, as the next five
    BatchState *next_in_line
    BatchState *previous_in_line
    int behind            # in how many of its topics it is not the first
    int ready             # it may get the turn: its thread waits for it, or it is detached and its time is not over
    Waiter *waiter        # of its thread, while that waits for its turn
    int32_t starved       # it had no room, and waits for enough of it; of whoever has the turn, or under the lock
    int32_t queue_full    # librdkafka's queue had no room when so many reports had come; the same
    int64_t full_at
    int64_t wants         # its part of Client.wanted


cdef int _this_pid = kb_pid()  # of this process, at hand without a system call
cdef int32_t _pinned = 0
cdef int32_t _wanting = 0  # atomic: threads of producers that want the GIL back, and may have to wait for it


cdef void _in_forked_child() noexcept nogil:
    global _this_pid, _pinned, _wanting
    _this_pid = kb_pid()
    _wanting = 0
    _pinned = 0  # those batches are the parent's, and never given back here


kb_on_fork_child(_in_forked_child)


def pinned_buffers() -> int:
    """How many batches of this process hold memory that librdkafka may still read, or that is not yet given back."""
    return KB_LOAD32(&_pinned)


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


cdef bint note_topic(BatchState *batch, Topic *topic) noexcept nogil:
    # A record of `batch` goes to `topic`, as none before it. False when memory is short.
    cdef Place *place = &batch.place
    if place.topic != NULL:
        place = <Place *> kb_calloc(1, sizeof(Place))
        if place == NULL:
            return False
        place.other = batch.place.other
        batch.place.other = place
    place.topic = topic
    return True


cdef void forget_topics(BatchState *batch) noexcept nogil:
    # Of a batch that stands in no line.
    cdef Place *place = batch.place.other
    cdef Place *following
    batch.place.other = NULL
    while place != NULL:
        following = place.other
        kb_free(place)
        place = following


cdef void drop_records(BatchState *batch) noexcept nogil:
    kb_free(batch.deliver_by)
    batch.deliver_by = NULL
    records_give(batch.client, &batch.records, batch.capacity)
    arena_give(batch.client, &batch.arena)


cdef void pause(int64_t ns) noexcept nogil:
    cdef kb_mutex mu
    cdef kb_cond cond
    kb_mutex_init(&mu)
    kb_cond_init(&cond)
    kb_mutex_lock(&mu)
    kb_cond_wait_until(&cond, &mu, kb_now_ns() + ns)
    kb_mutex_unlock(&mu)
    kb_cond_destroy(&cond)
    kb_mutex_destroy(&mu)


cdef void offer_gil(int64_t *offered_ns) noexcept:
    # For long work, often. Who gives the GIL up and takes it back at once is first, and CPython's
    # threads only insist on it when nobody has given it up for 5 ms: so not more often, unless it is known as wanted.
    cdef int64_t now = kb_now_ns()
    if KB_LOAD32(&_wanting):
        with nogil:
            pause(MOMENT)
    elif now < offered_ns[0] + GIL_OFFER:
        return
    else:
        with nogil:
            pass
    offered_ns[0] = kb_now_ns()


# No list comprehensions in Cython code: when such a list cannot grow, Cython 3.3.1 gives the new item back twice.

cdef class Outcomes:
    """What became of each envelope of a batch, kept as C records until it is asked for."""

    cdef Outcome *_items   # owned
    cdef readonly Py_ssize_t count

    def __dealloc__(self):
        kb_free(self._items)

    @staticmethod
    cdef Outcomes make(Py_ssize_t count):
        cdef Outcomes self = Outcomes.__new__(Outcomes)
        # One more than asked for: an empty batch has an address too.
        self._items = <Outcome *> kb_calloc(<size_t> count + 1, sizeof(Outcome))
        if self._items == NULL:
            raise MemoryError(f"no memory for the outcomes of {count} envelopes")
        self.count = count
        return self

    def __len__(self) -> int:
        return self.count

    cdef Py_ssize_t _state_count(self, int state) noexcept:
        cdef Py_ssize_t i, n = 0
        for i in range(self.count):
            n += self._items[i].state == state
        return n

    def acked(self) -> int:
        return self._state_count(ACKED)

    def failed(self) -> int:
        return self._state_count(FAILED)

    def expired(self) -> list:
        """The indices of the envelopes whose deliver_by had passed."""
        cdef Py_ssize_t i
        cdef list found = []
        for i in range(self.count):
            if self._items[i].state == EXPIRED:
                found.append(i)
        return found

    def failures(self) -> list:
        """``(index, error code, persistence)`` of each failed envelope."""
        cdef Py_ssize_t i
        cdef list found = []
        for i in range(self.count):
            if self._items[i].state == FAILED:
                found.append((i, self._items[i].error, self._items[i].persistence))
        return found

    def partitions(self) -> tuple:
        cdef Py_ssize_t i
        cdef list partitions = []
        for i in range(self.count):
            partitions.append(self._items[i].partition)
        return tuple(partitions)

    def offsets(self) -> tuple:
        cdef Py_ssize_t i
        cdef list offsets = []
        for i in range(self.count):
            offsets.append(self._items[i].offset)
        return tuple(offsets)

    def __reduce__(self):
        cdef Py_ssize_t i
        cdef list items = []
        for i in range(self.count):
            items.append((self._items[i].state, self._items[i].error, self._items[i].persistence,
                          self._items[i].partition, self._items[i].offset))
        return _rebuild_outcomes, (items,)


def _rebuild_outcomes(list items):
    cdef Outcomes self = Outcomes.make(len(items))
    for i in range(len(items)):
        (self._items[i].state, self._items[i].error, self._items[i].persistence,
         self._items[i].partition, self._items[i].offset) = items[i]
    return self
