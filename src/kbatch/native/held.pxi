# A batch on hold: `Transactions` holds it, and says when it is done, and how.

cdef enum:
    # HeldBatches.transaction_call
    INIT_TRANSACTIONS = 0
    BEGIN_TRANSACTION = 1
    COMMIT_TRANSACTION = 2
    ABORT_TRANSACTION = 3

# for `Transactions`
TRANSACTION_CALLS = (INIT_TRANSACTIONS, BEGIN_TRANSACTION, COMMIT_TRANSACTION, ABORT_TRANSACTION)


cdef object transaction_error(Client *c, rd_kafka_error_t *error):
    # What a call about a transaction was answered with, as `HeldBatches.transaction_call` returns it. Takes the error.
    if error == NULL:
        return None
    try:
        if api.error_is_fatal(error):
            look_for_fatal(c)
        return (
            KB_LOAD32(&c.fatal) or api.error_code(error), api.error_string(error).decode("utf-8", "replace"),
            bool(api.error_is_fatal(error)), bool(api.error_is_retriable(error)),
            bool(api.error_txn_requires_abort(error)))
    finally:
        api.error_destroy(error)


cdef class HeldBatches:
    """The batches of a Core that are one transaction each.

    In this order: `hold`; `enqueue_held` and `wait_for_decision`, or `give_up_held`; `conclude`.
    """

    cdef Core core

    __signature__ = _ConstructorSignature(("core", inspect.Parameter.empty))

    def __cinit__(self, Core core not None):
        self.core = core

    def hold(self, Batch batch not None, timeout=None, *, waker=None, refusal=None) -> None:
        """Takes a batch whose answer `conclude` gives: from here on it must come. Refusals are as in `send`.

        `waker` is as in `send_detached`. A `refusal` is an error that it raises, unless `send` would raise another:
        what is on hold has an answer, so a batch must be refused before.

        Until then librdkafka lives, also while the producer is being closed.
        """
        cdef Client *c = self.core.c
        cdef BatchState *state = &batch.state
        self.core._enter()
        try:
            if refusal is not None:
                look_for_fatal(c)
                self.core._check_fatal()
                raise refusal
            self.core._accept(batch, deadline_after(timeout), waker, None)
            state.remaining += 1
            state.detached = 1  # who waits for it must not enqueue it
            kb_mutex_lock(&c.mu)
            state.hold = 1
            KB_STORE32(&c.held, c.held + 1)
            c.undecided += state.count
            kb_mutex_unlock(&c.mu)
        finally:
            self.core._leave()

    def claim_held(self, Batch batch not None) -> bool:
        """Whether the answer of a batch on hold is now the caller's business: true once."""
        if not batch.state.hold or batch.state.claimed:
            return False
        batch.state.claimed = 1
        return True

    def refuse_held(self, Batch batch not None, int code) -> None:
        """`give_up_held` and `conclude`, in one so that no signal comes between, unless another has claimed it."""
        if self.claim_held(batch):
            self.give_up_held(batch, code)
            self.conclude(batch, code)

    def end_held(self, Batch batch not None) -> None:
        """The answer of a batch on hold whose transaction was left in the middle, unless it has one.

        Waits for what is in flight of it, and Ctrl-C does not end that.
        """
        cdef Client *c = self.core.c
        cdef BatchState *state = &batch.state
        cdef bint fresh
        if not state.hold:
            return
        kb_mutex_lock(&c.mu)
        fresh = not state.is_enqueuing and KB_LOAD64(&state.remaining) == state.count + 2  # not yet enqueued
        kb_mutex_unlock(&c.mu)
        if fresh:
            self.give_up_held(batch, RD_KAFKA_RESP_ERR__PURGE_QUEUE)
        KB_STORE32(&state.abandoned, 1)
        with nogil:
            while advance(c, state, INT64_MAX, FOR_SETTLED) == AGAIN:
                pass
        self.conclude(batch, RD_KAFKA_RESP_ERR__PURGE_INFLIGHT, unknown=not fresh)

    def refusal(self, Batch batch not None) -> int:
        """0, or librdkafka's code of why a batch on hold is not to be enqueued any more."""
        if KB_LOAD32(&batch.state.abandoned) or KB_LOAD32(&self.core.c.shut):
            return RD_KAFKA_RESP_ERR__PURGE_QUEUE
        return RD_KAFKA_RESP_ERR__TIMED_OUT_QUEUE if kb_now_ns() >= batch.state.deadline_ns else 0

    def is_finishing(self) -> bool:
        """Whether the producer's time to close is over."""
        return KB_LOAD32(&self.core.c.life) >= FINISHING

    def enqueue_held(self, Batch batch not None) -> None:
        """Phase 2 of a batch on hold, on the drainer's thread."""
        cdef Client *c = self.core.c
        kb_mutex_lock(&c.mu)
        join_line(c, &batch.state)
        kb_mutex_unlock(&c.mu)

    def wait_for_decision(self, Batch batch not None) -> bool:
        """Waits until nothing more of a batch on hold is enqueued, and all have an outcome or one has failed.

        False if one has failed.
        """
        self.core._drive(batch, INT64_MAX, FOR_DECISION)
        return not KB_LOAD32(&batch.state.failing)

    def wait_until_settled(self, Batch batch not None) -> None:
        """Waits until every envelope of a batch on hold has an outcome."""
        self.core._drive(batch, INT64_MAX, FOR_SETTLED)

    def give_up_held(self, Batch batch not None, int code) -> None:
        """Instead of `enqueue_held`: nothing of the batch was sent, for a reason that is librdkafka's `code`."""
        cdef BatchState *state = &batch.state
        give_up_rest(self.core.c, state, code)
        drop_records(state)
        settle(self.core.c, state, 1)

    def conclude(self, Batch batch not None, int code=0, *, bint unknown=False) -> None:
        """The answer of a batch on hold, all of whose envelopes have an outcome.

        With a `code` of librdkafka nothing of it counts as acknowledged; it is the code of those that were, or that
        were purged when the transaction was aborted. If `unknown`, what was acknowledged may be stored.
        """
        cdef Client *c = self.core.c
        cdef BatchState *state = &batch.state
        cdef Outcome *outcome
        cdef Py_ssize_t i
        cdef int64_t overturned = 0
        if code:
            for i in range(state.count):
                outcome = &batch.outcomes._items[i]
                if outcome.state == ACKED:
                    outcome.state, outcome.error, outcome.offset = FAILED, <int16_t> code, -1
                    outcome.persistence = RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED
                    overturned += 1
                elif outcome.state == FAILED and (
                        outcome.error == RD_KAFKA_RESP_ERR__PURGE_QUEUE
                        or outcome.error == RD_KAFKA_RESP_ERR__PURGE_INFLIGHT):
                    outcome.error = <int16_t> code
                if not unknown and outcome.state == FAILED:
                    outcome.persistence = RD_KAFKA_MSG_STATUS_NOT_PERSISTED  # whatever was stored is aborted
                if outcome.state == FAILED:
                    KB_STORE32(&state.failing, 1)
        kb_mutex_lock(&c.mu)
        c.acked -= overturned
        count_failed(c, overturned)
        KB_STORE32(&c.held, c.held - 1)
        c.undecided -= state.count
        state.hold = 0
        KB_ADD64(&state.remaining, -1)
        finish(c, &state, 1, NULL)
        kb_cond_broadcast(&c.life_cond)
        kb_cond_signal(&c.drainer_cond)
        kb_mutex_unlock(&c.mu)

    def transaction_call(self, int call, int timeout_ms) -> tuple | None:
        """One of librdkafka's calls about transactions, in the order init, begin, commit, abort; for a batch on hold.

        Returns None, or ``(code, text, fatal, retriable, requires abort)``. It blocks for as long as it takes.
        """
        cdef Client *c = self.core.c
        cdef rd_kafka_error_t *error
        if c.rk == NULL:
            raise ProducerClosedError("the producer is not started, or closed")
        kb_mutex_lock(&c.mu)
        c.eager += 1  # an abort waits for reports, and somebody must take them
        nudge_drainer(c)
        kb_mutex_unlock(&c.mu)
        with nogil:
            if call == INIT_TRANSACTIONS:
                error = api.init_transactions(c.rk, timeout_ms)
            elif call == BEGIN_TRANSACTION:
                error = api.begin_transaction(c.rk)
            elif call == COMMIT_TRANSACTION:
                error = api.commit_transaction(c.rk, timeout_ms)
            else:
                error = api.abort_transaction(c.rk, timeout_ms)
            kb_mutex_lock(&c.mu)
            c.eager -= 1
            kb_mutex_unlock(&c.mu)
        return transaction_error(c, error)
