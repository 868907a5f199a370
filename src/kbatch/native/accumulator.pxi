# Envelopes one at a time become batches. The GIL guards all of it but Flag: nothing between a look at the state and
# its change may run Python code, and so none may allocate what the garbage collector tracks.

@cython.final
cdef class Sizes:
    """What each envelope of a batch was counted as."""

    cdef int64_t *_items   # owned
    cdef Py_ssize_t count
    cdef Py_ssize_t capacity
    cdef readonly int64_t total

    def __dealloc__(self):
        kb_free(self._items)

    cdef inline int reserve(self) except -1:
        # Room for one more.
        cdef int64_t *items
        cdef Py_ssize_t capacity
        if self.count == self.capacity:
            capacity = max(16, 2 * self.capacity)
            items = <int64_t *> kb_malloc(<size_t> capacity * sizeof(int64_t))
            if items == NULL:
                raise MemoryError("no memory for the size of an envelope")
            if self.count:
                memcpy(items, self._items, <size_t> self.count * sizeof(int64_t))
            kb_free(self._items)
            self._items, self.capacity = items, capacity
        return 0

    cdef inline void append(self, int64_t size) noexcept:
        self._items[self.count] = size
        self.count += 1
        self.total += size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, Py_ssize_t index) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self._items[index]


@cython.final
cdef class FormedBatch:
    """Envelopes that go out together, in the order in which they came."""

    cdef readonly list envelopes
    cdef readonly int64_t first_seq   # of the first; the others follow one by one
    cdef readonly Sizes sizes         # of keys, headers and bodies, as `Accumulator` counts them
    cdef int64_t begun_ns             # when the first came
    cdef int64_t due_ns               # when it may go out, full or not
    cdef int64_t closed_ns            # 0 until it is closed
    cdef readonly bint scheduled      # one of them has a scheduled_time

    @property
    def accepted_at(self) -> float:
        """When it was closed, so never before its last envelope came, by `monotonic`."""
        return self.closed_ns / 1e9


@cython.final
cdef class RoomWaiter:
    """An envelope that waits for room."""

    cdef Envelope envelope
    cdef int64_t bytes
    cdef object wake          # a Flag, or a callable that must not block
    cdef readonly bint taken  # the envelope has its place
    cdef bint in_line
    cdef bint gone            # it stands in line, but waits no longer


cdef inline int64_t text_bytes(object text) noexcept:
    return 0 if text is None else max(0, kb_leaf_bytes(<PyObject *> text))


cdef inline int64_t texts_bytes(Envelope envelope) noexcept:
    return (text_bytes(envelope._message_type) + text_bytes(envelope._content_type) + text_bytes(envelope._source)
            + text_bytes(envelope._correlation_id) + text_bytes(envelope._conversation_id)
            + text_bytes(envelope._parent_id) + text_bytes(envelope._tenant_id) + text_bytes(envelope._user_name))


cdef Envelope own_data(Envelope envelope):
    # A body that may change under us while it waits is copied.
    if envelope._kind != BODY_DATA or type(envelope._body) is bytes:
        return envelope
    # Envelope's own: a subclass may have another, which answers with anything.
    try:
        data = copied(envelope._body)
    except (BufferError, TypeError, ValueError):
        return envelope  # phase 1 refuses it, and says why
    return Envelope.replace(envelope, data=data)


cdef enum:
    # Accumulator.stage
    UNUSED = 0     # the next envelope starts the sender
    ACCEPTING = 1
    REFUSING = 2


cdef enum:
    PAUSE_EVERY = 1000  # envelopes, after which a task that does nothing but send lets others run

cdef enum:
    LOOKS = 256           # objects of a message that are looked at
    DEEPEST = 8           # containers within each other
    SHALLOW_LOOKS = 64    # the same where the mean is known, of the outermost container
    LOOK_DEEP_EVERY = 8   # messages
    SUSPICIOUS = 64       # messages, after one that is larger than it should be

cdef enum:
    # what _send_on_loop answers
    FULL = 0
    TAKEN = 1
    TAKEN_PAUSE = 2
    NOT_STARTED = 3

# for kbatch.aio
SEND_TAKEN, SEND_TAKEN_PAUSE, SEND_NOT_STARTED = TAKEN, TAKEN_PAUSE, NOT_STARTED


cdef class Accumulator:
    """Takes envelopes one at a time, from any thread, and forms batches of them.

    A batch is closed when it has `batch_size` envelopes, when the next one would make its keys, headers and bodies more
    than `batch_bytes`, or when its first is `batch_timeout_s` old. The size of a body that is not encoded yet is what
    those before it took on average, or what its texts, bytes and numbers take if it is the first or looks larger. At
    most `max_buffered` envelopes and `max_buffered_bytes` are here from `send` to `_give_back`, but always one.
    """

    cdef readonly Flag flag           # set when there is something to do or to plan
    cdef FormedBatch filling
    cdef FormedBatch spare            # the next one to be filled, made before it is needed: the collector may run then
    cdef object formed                # a deque of those that are closed
    cdef object waiters               # a deque of RoomWaiter, in the order of their calls
    cdef Py_ssize_t gone              # of these, those that wait no longer
    cdef int64_t line_changes         # of `waiters`, ever
    cdef int stage
    cdef readonly Turns _starting     # calls on event loops that wait for the start
    cdef int pid                      # at the start
    cdef readonly int64_t batch_size
    cdef readonly int64_t batch_bytes
    cdef readonly int64_t max_buffered
    cdef readonly int64_t max_buffered_bytes
    cdef int64_t timeout_ns
    cdef int64_t buffered_bytes       # what these were counted as
    cdef int64_t buffered             # accepted, not given back
    cdef readonly int64_t accepted    # ever: the number that the next one gets
    cdef int64_t message_bytes        # what a message is thought to take when it is encoded: the mean of late ones,
    cdef double encoded_bytes         # of these bytes
    cdef double encoded               # and so many messages
    cdef bint is_guess                # by what one takes that is not encoded; 0 before
    cdef int shallow_looks            # so many messages are not looked at closely
    cdef int deep_looks               # so many are, because one before them was large

    def __init__(self, int64_t batch_size, int64_t batch_bytes, double batch_timeout_s, int64_t max_buffered,
                 int64_t max_buffered_bytes=INT64_MAX):
        self.flag = Flag()
        self.formed = collections.deque()
        self.waiters = collections.deque()
        self._starting = Turns()
        self.batch_size, self.batch_bytes, self.max_buffered = batch_size, batch_bytes, max_buffered
        self.timeout_ns = <int64_t> (batch_timeout_s * 1e9)
        self.max_buffered_bytes = max_buffered_bytes
        self.is_guess = True

    # -- envelopes come

    def send(self, envelope, *, timeout=None):
        """Takes an envelope; it goes out with others, in the order of the calls. Waits while the buffer is full.

        Any number of threads may call it, and Ctrl-C ends the wait.

        Args:
            envelope: A `kbatch.Envelope`. What cannot be mapped is told to ``on_failed``, not here. Its message is
                encoded later, and again for each retry, so it must not change; ``data`` that is no ``bytes`` is copied.
            timeout: Seconds to wait for room; ``None`` waits as long as it takes.

        Raises:
            SenderFullError: `timeout` has passed; the envelope was not taken.
            SenderClosedError: The sender is closed.
            ForkError: It was used before a fork, and this is the child.
            ConfigError: librdkafka refuses the configuration, which shows at the first use.
        """
        if timeout is not None:
            check_timeout(timeout)
        if not self._offer(envelope):
            self._wait_for_room(envelope, timeout)

    def try_send(self, envelope):
        """As `send`, but never waits: false if there is no room, and then the envelope was not taken."""
        return self._offer(envelope)

    def _send_on_loop(self, envelope) -> int:
        """`try_send` for event loops, whose caller may have to wait: for room, its turn at the start, or others."""
        if self.stage == UNUSED or self._starting.standing:
            return NOT_STARTED
        if not self._offer(envelope):
            return FULL
        return TAKEN if self.accepted % PAUSE_EVERY else TAKEN_PAUSE

    cdef bint _offer(self, object item) except -1:
        cdef Envelope envelope
        cdef int64_t size
        if type(item) is not Envelope and not isinstance(item, Envelope):
            raise TypeError(f"expected a kbatch.Envelope, not {type(item).__name__}")
        envelope = own_data(<Envelope> item)
        size = self._measure(envelope)
        while True:
            self._prepare(size)
            if self.stage == ACCEPTING and self.pid == _this_pid:
                break
            self._look()
        if len(self.waiters) > self.gone or not self._has_room(size):
            return False
        self._append(envelope, size)
        return True

    cdef int _look(self) except -1:
        # Not accepting as far as one sees: starts, or raises.
        if self.stage == UNUSED:
            self._start()
        else:
            self._check_fork()
        if self.stage != ACCEPTING:
            self._refuse()
        return 0

    cdef inline bint _has_room(self, int64_t size) noexcept:
        if self.buffered >= self.max_buffered:
            return False
        if self.buffered and size > self.max_buffered_bytes - self.buffered_bytes:
            if self.filling is not None and self.filling.due_ns:
                self.filling.due_ns = 0  # it may never be full, and only its end makes room
                self.flag.set()
            return False
        return True

    cdef int64_t _measure(self, Envelope envelope) noexcept:
        # Runs no Python code.
        cdef int64_t size = 0, seen
        if envelope._kind == BODY_UNREAD:
            return received_bytes(<ReceivedEnvelope> envelope)
        if envelope._key is not None:
            size = max(0, kb_leaf_bytes(<PyObject *> envelope._key))
        if envelope._headers is not _EMPTY:
            size += kb_pairs_bytes(<PyObject *> envelope._headers)
        size += texts_bytes(envelope)
        if envelope._kind != BODY_MESSAGE:
            return size if envelope._body is None else size + max(0, kb_leaf_bytes(<PyObject *> envelope._body))
        if self.shallow_looks:
            seen = kb_outer_bytes(<PyObject *> envelope._body, SHALLOW_LOOKS)
            if seen <= 2 * self.message_bytes:
                self.shallow_looks -= 1
                return size + (max(seen, self.message_bytes) if self.is_guess else self.message_bytes)
        seen = max(kb_content_bytes(<PyObject *> envelope._body, LOOKS, DEEPEST),
                   kb_outer_bytes(<PyObject *> envelope._body, SHALLOW_LOOKS))
        if self.message_bytes and seen > 2 * self.message_bytes:
            self.deep_looks, self.shallow_looks = SUSPICIOUS, 0
        elif self.deep_looks:
            self.deep_looks -= 1
        else:
            self.shallow_looks = LOOK_DEEP_EVERY - 1
        if self.is_guess:
            self.message_bytes = max(seen, 1)
        elif seen <= 2 * self.message_bytes:
            seen = self.message_bytes if 4 * seen > self.message_bytes else max(seen, self.message_bytes // 4)
        return size + seen

    def _check_wait(self) -> None:
        """Raises if the caller must not wait for room."""

    cdef inline bint _needs_batch(self, int64_t size) noexcept:
        return self.filling is None or size > self.batch_bytes - self.filling.sizes.total

    cdef int _prepare(self, int64_t size) except -1:
        # So that `_append` makes nothing that the garbage collector tracks: a finalizer may send, close or wait.
        cdef FormedBatch batch
        while self.spare is None and self._needs_batch(size):
            batch = FormedBatch.__new__(FormedBatch)
            batch.envelopes = []
            batch.sizes = Sizes.__new__(Sizes)
            self.spare = batch
        return 0

    cdef int _append(self, Envelope envelope, int64_t size) except -1:
        # Prepared. Runs no Python code. If it raises, the envelope is not taken.
        cdef FormedBatch batch = self.spare if self._needs_batch(size) else self.filling
        batch.sizes.reserve()
        if batch is self.spare:
            if self.filling is not None:
                self._close_batch()
            batch.envelopes.append(envelope)
            batch.first_seq = self.accepted
            batch.begun_ns = kb_now_ns()
            batch.due_ns = batch.begun_ns + self.timeout_ns
            self.filling, self.spare = batch, None
            self.flag.set()
        else:
            batch.envelopes.append(envelope)
        batch.sizes.append(size)
        batch.scheduled |= envelope._scheduled_time != NO_TIME
        if self.buffered == 0:
            self.flag.keeper = self  # the thread may keep it weakly, and has not seen this yet
        self.buffered += 1
        self.buffered_bytes += size
        self.accepted += 1
        if len(batch.envelopes) >= self.batch_size or batch.sizes.total >= self.batch_bytes:
            try:
                self._close_batch()
            except MemoryError:
                pass  # the envelope is taken; the next one closes the batch, or its age
        return 0

    cdef int _close_batch(self) except -1:
        self.filling.closed_ns = kb_now_ns()
        self.formed.append(self.filling)
        self.filling = None
        self.flag.set()
        return 0

    # -- waiting for room

    cdef int _wait_for_room(self, object envelope, object timeout) except -1:
        cdef Flag flag = Flag()
        cdef int64_t deadline = deadline_after(timeout)
        cdef RoomWaiter waiter
        self._check_wait()
        waiter = self._line_up(envelope, flag)
        try:
            while not waiter.taken:
                if self.stage != ACCEPTING or self.pid != _this_pid:
                    self._look()
                if not flag.wait(None if deadline == INT64_MAX else (deadline - kb_now_ns()) / 1e9):
                    self._leave_line(waiter)  # first: while an error is made, another thread may make room
                    if not waiter.taken:
                        raise SenderFullError(
                            f"no room for the envelope within {timeout} s: {self.buffered} have no outcome yet, "
                            f"{self.buffered_bytes} bytes")
        finally:
            self._leave_line(waiter)
        return 0

    def _line_up(self, Envelope envelope not None, wake) -> RoomWaiter:
        """For an envelope that found no room. It is taken in its turn; `wake` is then set or called.

        If the sender refuses by then, it is woken as well, and `taken` is false.
        """
        cdef RoomWaiter waiter = RoomWaiter.__new__(RoomWaiter)
        waiter.envelope = own_data(envelope)
        waiter.bytes = self._measure(waiter.envelope)
        waiter.wake = wake
        self.waiters.append(waiter)
        waiter.in_line = True
        self.line_changes += 1
        self._make_room()
        if self.stage != ACCEPTING and waiter.in_line:
            self._leave_line(waiter)  # nobody comes to wake it any more
            self._wake(waiter)
        return waiter

    def _leave_line(self, RoomWaiter waiter not None) -> None:
        if waiter.in_line and not waiter.gone:
            waiter.gone = True
            waiter.envelope = None
            self.gone += 1
            if 2 * self.gone > len(self.waiters):
                try:
                    self._close_ranks()
                except MemoryError:
                    pass  # the next one tries again
            self._make_room()

    cdef int _close_ranks(self) except -1:
        # Takes out those that are gone: not each by itself, since there may be many, in any order.
        cdef RoomWaiter waiter
        cdef int64_t changes = self.line_changes
        rest = collections.deque()
        for waiter in list(self.waiters):
            if not waiter.gone:
                rest.append(waiter)
        if self.line_changes == changes:  # else a finalizer has sent something, or given room back
            self.gone -= len(self.waiters) - len(rest)
            self.waiters = rest
        return 0

    cdef RoomWaiter _look_at_first(self):
        cdef RoomWaiter waiter
        while self.waiters:
            waiter = self.waiters[0]
            if not waiter.gone:
                return waiter
            self.waiters.popleft()
            waiter.in_line = False
            self.line_changes += 1
            self.gone -= 1
        return None

    cdef RoomWaiter _first_in_line(self):
        # Takes out the first that waits; None if there is none.
        cdef RoomWaiter waiter = self._look_at_first()
        if waiter is not None:
            self.waiters.popleft()
            waiter.in_line = False
            self.line_changes += 1
        return waiter

    cdef int _make_room(self) except -1:
        cdef RoomWaiter waiter
        while self.stage == ACCEPTING:
            waiter = self._look_at_first()
            if waiter is None or not self._has_room(waiter.bytes):
                return 0
            try:
                self._prepare(waiter.bytes)
                if self.stage != ACCEPTING or self._look_at_first() is not waiter or not self._has_room(waiter.bytes):
                    continue  # a finalizer has come in between
                self._append(waiter.envelope, waiter.bytes)
            except MemoryError:
                return 0  # the next thread that gives room back tries again
            waiter.taken = True
            self._first_in_line()
            self._wake(waiter)
        return 0

    cdef int _wake(self, RoomWaiter waiter) except -1:
        if type(waiter.wake) is Flag:
            (<Flag> waiter.wake).set()
            return 0
        try:
            waiter.wake()
        except Exception:
            log_raised("could not wake an event loop")
        return 0

    # -- for the thread that sends

    def _accept(self) -> None:
        self.pid = _this_pid
        if self.stage == UNUSED:
            self.stage = ACCEPTING

    def _stop_accepting(self) -> None:
        """Refuses every envelope from here on, also those that wait for room."""
        cdef RoomWaiter waiter
        if self.stage == UNUSED:
            self.pid = _this_pid
        self.stage = REFUSING
        while True:
            waiter = self._first_in_line()
            if waiter is None:
                break
            self._wake(waiter)
        self._close_filling()

    def _close_filling(self) -> None:
        """Closes the batch that is being filled."""
        if self.filling is not None:
            self._close_batch()

    def _hasten_filling(self) -> int:
        """Has the batch that is being filled go out with the next slot. Returns the number of the next envelope."""
        if self.filling is not None:
            self.filling.due_ns = 0
        return self.accepted

    def _close_older(self, double seconds) -> None:
        """Closes the batch that is being filled if it could have gone out, and its first envelope is older."""
        cdef int64_t now = kb_now_ns()
        if self.filling is None or now < self.filling.due_ns:
            return
        if (now - self.filling.begun_ns) / 1e9 >= seconds:
            self._close_batch()

    def _pop_older(self, double seconds) -> FormedBatch | None:
        """The oldest batch that is closed, if all in it are older."""
        cdef FormedBatch batch
        if not self.formed:
            return None
        batch = self.formed[0]
        if (kb_now_ns() - batch.closed_ns) / 1e9 < seconds:
            return None
        return self.formed.popleft()

    def _next_batch(self) -> FormedBatch | None:
        """The oldest batch that is closed, or whose first envelope is old enough."""
        if not self.formed:
            if self.filling is None or kb_now_ns() < self.filling.due_ns:
                return None
            self._close_batch()
        return self.formed.popleft()

    def _due_in(self) -> float | None:
        """Seconds until `_next_batch` has one; None if there is nothing."""
        if self.formed:
            return 0.0
        if self.filling is None:
            return None
        return max(0.0, (self.filling.due_ns - kb_now_ns()) / 1e9)

    def _first_seq(self) -> int | None:
        """The number of the oldest envelope here."""
        cdef FormedBatch batch = self.formed[0] if self.formed else self.filling
        return None if batch is None else batch.first_seq

    def _give_back(self, int64_t count, int64_t size) -> None:
        """So many envelopes have their outcome, which were counted as `size` bytes."""
        self.buffered -= count
        self.buffered_bytes -= size
        self._make_room()

    @property
    def _buffered_bytes(self) -> int:
        return self.buffered_bytes

    def _learn_message_bytes(self, int64_t total, int64_t count) -> None:
        """So many messages were encoded, into so many bytes."""
        if count:
            self.encoded_bytes = self.encoded_bytes * 0.9 + total
            self.encoded = self.encoded * 0.9 + count
            self.message_bytes, self.is_guess = max(1, <int64_t> (self.encoded_bytes / self.encoded + 0.5)), False

    @property
    def _is_used(self) -> bool:
        return self.stage != UNUSED

    @property
    def _is_refusing(self) -> bool:
        return self.stage == REFUSING

    @property
    def _is_forked(self) -> bool:
        return self.stage != UNUSED and self.pid != _this_pid

    def _check_fork(self) -> None:
        if self._is_forked:
            raise ForkError(
                "this sender was used before the fork and its threads are not in this process; make a new one here, "
                "for example in gunicorn's post_fork or Celery's worker_process_init")

    def __len__(self) -> int:
        """How many envelopes were taken and have no outcome yet."""
        return self.buffered

    def __bool__(self) -> bool:
        return True
