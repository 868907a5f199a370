# Memory of envelopes that were received is used again by the consumers' next polls. It saves the thread that polls some
# 0.05 µs a record: an allocator keeps few blocks of a size at hand, and a poll takes a thousand.
#
# `_spare` is guarded by the GIL. A poll takes what it may need out of it before it gives the GIL up.

cdef enum:
    BLOCK_STEP = 256
    SPARE_BYTES = 2 * 1024 * 1024  # of the process, and of each consumer

cdef Blocks _spare
cdef Py_ssize_t _readers = 0  # consumers


cdef Received *new_block(Blocks *spare, size_t size) noexcept nogil:
    """So many bytes: of those at hand, or new ones. NULL: no memory."""
    cdef size_t kind = (size + BLOCK_STEP - 1) // BLOCK_STEP
    cdef Received *block
    if kind >= BLOCK_KINDS:
        kind = 0
    elif spare.first[kind] != NULL:
        block = spare.first[kind]
        kb_unpoison(block, kind * BLOCK_STEP)
        spare.first[kind] = block.next
        spare.count[kind] -= 1
        spare.bytes -= kind * BLOCK_STEP
        return block
    block = <Received *> kb_malloc(kind * BLOCK_STEP if kind else size)
    if block != NULL:
        block.size_kind = kind
    return block


cdef void keep_block(Blocks *spare, Received *block) noexcept nogil:
    """Gives a block back to those at hand; frees one of a size that is not kept."""
    cdef int kind = block.size_kind
    if kind == 0:
        kb_free(block)
        return
    block.next = spare.first[kind]
    spare.first[kind] = block
    spare.count[kind] += 1
    spare.bytes += kind * BLOCK_STEP
    kb_poison(block + 1, kind * BLOCK_STEP - sizeof(Received))


cdef void drop_blocks(Blocks *spare) noexcept nogil:
    """Frees all of them."""
    cdef Received *block
    cdef int kind
    for kind in range(1, BLOCK_KINDS):
        while spare.first[kind] != NULL:
            block = spare.first[kind]
            spare.first[kind] = block.next
            kb_unpoison(block, kind * BLOCK_STEP)
            kb_free(block)
        spare.count[kind] = 0
    spare.bytes = 0


cdef void free_block(Received *block) noexcept:
    """Frees it, or keeps it for a poll of any consumer. With the GIL."""
    if block == NULL:
        return
    if _readers and _spare.bytes < SPARE_BYTES:
        keep_block(&_spare, block)
    else:
        kb_free(block)


cdef void take_spares(Blocks *own) noexcept:
    """For a poll: those of each kind that it has none of. With the GIL."""
    cdef int kind
    cdef size_t size
    for kind in range(1, BLOCK_KINDS):
        if _spare.count[kind] == 0 or own.count[kind]:
            continue
        size = _spare.count[kind] * kind * BLOCK_STEP
        if own.bytes + size > SPARE_BYTES:
            drop_blocks(own)  # of sizes that do not come any more
        own.first[kind], own.count[kind] = _spare.first[kind], _spare.count[kind]
        _spare.first[kind], _spare.count[kind] = NULL, 0
        own.bytes += size
        _spare.bytes -= size


cdef void begin_reader() noexcept:
    """A consumer begins: what is freed is kept while there is one. With the GIL."""
    global _readers
    _readers += 1


cdef void end_reader() noexcept:
    global _readers
    _readers -= 1
    if _readers == 0:
        drop_blocks(&_spare)
