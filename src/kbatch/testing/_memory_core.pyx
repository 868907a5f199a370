# cython: autotestdict=False
"""What the producers in memory need of a Core in C: batches are taken and answered without librdkafka."""

from libc.stdint cimport INT64_MAX, int16_t, int32_t, int64_t, uint8_t

from kbatch._fastmap cimport (
    ACKED,
    CLOSED,
    FAILED,
    KB_ADD64,
    KB_LOAD32,
    KB_STORE32,
    NEW,
    Batch,
    BatchState,
    Client,
    Core,
    Outcome,
    Record,
    drop_records,
    kb_cond_signal,
    kb_mutex_lock,
    kb_mutex_unlock,
    kb_pid,
    release_idle,
    settle_unsent,
    settle_whole,
)

from kbatch._errors import ProducerClosedError


cdef class NativeMemoryCore(Core):
    """A Core whose `Client.life` is NEW until it is CLOSED: a subclass overrides whatever would start librdkafka."""

    def start_in_memory(self) -> None:
        """Starts the dispatcher alone. Raises as `start` does."""
        cdef Client *c = self.c
        self._check_fork()
        with self.start_lock:
            if c.life == NEW and c.pid == 0:
                c.pid = kb_pid()
                try:
                    self.dispatcher._attach(self)
                except BaseException:
                    c.pid = 0
                    self.dispatcher._detach()
                    raise
        if KB_LOAD32(&c.life) != NEW:
            raise ProducerClosedError("the producer is closed")

    def take_in_memory(self, Batch batch not None, *, waker=None, callback=None) -> tuple:
        """Takes a batch whose outcomes `settle_in_memory` gives. Returns its envelopes and what `Core.records` does.

        `waker`, `callback` and refusals are as in `send` and `send_detached`, but for a fatal error.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef list records
        cdef int64_t sent = 0
        cdef Py_ssize_t i
        self.start_in_memory()
        records = self.records(batch)
        answer = batch.envelopes, records
        self._adopt(batch, INT64_MAX, waker, callback)
        for i in range(state.count):
            sent += state.records[i].flags == 0
        KB_ADD64(&c.in_flight, sent)
        return answer

    def settle_in_memory(self, Batch batch not None, list outcomes not None) -> None:
        """The answer of a batch that was taken: ``(code, persistence, partition, offset)`` of each envelope.

        Those that phase 1 has settled need none.
        """
        cdef Client *c = self.c
        cdef BatchState *state = &batch.state
        cdef Outcome *outcome
        cdef Record *record
        cdef tuple given = tuple(outcomes)  # of our own: a number's __int__ may change the list
        cdef Py_ssize_t i
        cdef int64_t offset, acked = 0, failed = 0, sent = 0
        cdef int16_t code
        cdef uint8_t persistence
        cdef int32_t partition
        if batch.core is not self or state.owner == NULL or state.records == NULL and state.count or state.done:
            raise ValueError("this batch waits for no outcomes")
        if len(given) != state.count:
            raise ValueError(f"{len(given)} outcomes for a batch of {state.count} envelopes")
        for i in range(state.count):
            outcome = &batch.outcomes._items[i]
            record = &state.records[i]
            if record.flags:
                failed += settle_unsent(outcome, record, 0)
                continue
            code, persistence, partition, offset = <tuple?> given[i]
            if state.done:
                raise ValueError("this batch waits for no outcomes")  # a number's __int__ has given them
            outcome.state = FAILED if code else ACKED
            outcome.error, outcome.persistence, outcome.partition, outcome.offset = code, persistence, partition, offset
            sent += 1
            acked += not code
            failed += code != 0
        if failed:
            KB_STORE32(&state.failing, 1)
        drop_records(state)
        KB_ADD64(&c.in_flight, -sent)
        settle_whole(c, state, acked, failed)
        release_idle(c)

    def shut_in_memory(self) -> None:
        """Refuses new batches. `end_in_memory` follows when each has its answer, then `close`."""
        with self.start_lock:
            KB_STORE32(&self.c.life, CLOSED)
            KB_STORE32(&self.c.shut, 1)

    def end_in_memory(self) -> None:
        """Lets the dispatcher end when all is told."""
        cdef Client *c = self.c
        kb_mutex_lock(&c.mu)
        c.dispatcher_stop = 1
        kb_cond_signal(&c.dispatcher_cond)
        kb_mutex_unlock(&c.mu)
