# Envelopes that were given up, until somebody is told. The GIL guards it all; only a failure costs something.

cdef enum:
    KEPT_FAILURES = 1000  # with their envelopes; of the others there is a count
    MOST_KEPT_BYTES = 16777216  # of these envelopes

KEPT_COUNT = KEPT_FAILURES
KEPT_BYTES = MOST_KEPT_BYTES


def envelope_bytes(Envelope envelope not None) -> int:
    """What an envelope holds in memory, about."""
    if envelope._kind == BODY_UNREAD:
        return received_bytes(<ReceivedEnvelope> envelope)
    cdef int64_t size = kb_pairs_bytes(<PyObject *> envelope._headers) + text_bytes(envelope._key)
    if envelope._body is None:
        return size
    return size + max(kb_content_bytes(<PyObject *> envelope._body, LOOKS, DEEPEST),
                      kb_outer_bytes(<PyObject *> envelope._body, SHALLOW_LOOKS))


@cython.final
cdef class _Lot:
    """The failures of one batch, or one of a sender's."""


@cython.final
cdef class Undelivered:
    """What was given up by a sender or a producer and told to nobody yet: the first 1,000, and how many there are.

    The call that takes it tells it, so that each failure is told once. What is left at the end is logged.
    """

    def __init__(self, str what not None):
        self.lots = {}
        self.pid = _this_pid
        self.what = what

    cdef void _own(self) noexcept:
        # What a fork has copied is the parent's to tell.
        if self.pid != _this_pid:
            self.pid = _this_pid
            self.lots = {}
            self.kept = self.rest = self.bytes = 0

    def add(self, envelope, error) -> None:
        """One envelope, and the `KbatchError` that says why it was given up."""
        cdef _Lot lot
        self._own()
        cdef int64_t size = envelope_bytes(envelope)
        if not self._has_room(self.kept, self.bytes + size):
            self.rest += 1
            return
        lot = _Lot.__new__(_Lot)
        lot.bytes = size
        lot.failures = [(envelope, error, 0)]
        lot.count = 1
        self._put(lot)

    def count_one(self) -> None:
        """One of which nothing can be kept, for want of memory."""
        self._own()
        self.rest += 1

    cdef int _put(self, _Lot lot) except -1:
        if len(self.lots) >= self.many:
            self._sweep()
        self.lots[lot] = lot
        self.kept += len(lot.failures)
        self.bytes += lot.bytes
        return 0

    cdef bint _has_room(self, int64_t kept, int64_t size) noexcept:
        return kept < KEPT_FAILURES and (kept == 0 or size <= MOST_KEPT_BYTES)

    cdef int _sweep(self) except -1:
        # Of batches that nobody will look at any more, and that have no envelopes here, the count is enough.
        cdef _Lot lot
        for each in list(self.lots):
            lot = each
            if not lot.reachable and not lot.failures and self._take(lot):
                self.rest += lot.count
        self.many = 2 * len(self.lots) + 2 * KEPT_FAILURES
        return 0

    cdef bint _take(self, _Lot lot) except -1:
        # False if another was faster.
        if self.lots.pop(lot, None) is None:
            return False
        self.kept -= len(lot.failures)
        self.bytes -= lot.bytes
        return True

    cdef list _take_all(self, bint reachable, bint waited, int64_t *count):
        # All that may be, or nothing is taken.
        cdef list taken = []
        cdef _Lot lot
        self._own()
        try:
            for each in list(self.lots):
                lot = each
                if not lot.reachable or reachable and (waited or not lot.waited):
                    taken.append(lot)  # first: without memory it stays
                    if self._take(lot):
                        count[0] += lot.count
                    else:
                        taken.pop()
        except BaseException:
            self._put_back(taken, count[0])
            raise
        count[0] += self.rest
        self.rest = 0
        return taken

    def raise_all(self, *, bint reachable=False) -> None:
        """Raises `UndeliveredError` for what nobody was told of; with `reachable` also of batches that somebody may
        still look at."""
        # Raised from here: no signal handler can come between the taking and the raising, and lose it.
        cdef int64_t count = 0
        cdef list taken = self._take_all(reachable, False, &count)
        if not count:
            return
        try:
            error = self._error(taken, count)
        except BaseException:
            self._put_back(taken, count)
            raise
        raise error

    def raise_beside(self, error, *, bint reachable=False) -> None:
        """As `raise_all` at the end of a block. If `error` ends it, that comes first: what nobody was told of is
        logged, and noted with `error` where exceptions have notes."""
        if error is None:
            self.raise_all(reachable=reachable)
            return
        try:
            self._log(reachable, False, error)
        except Exception:
            pass  # a logging filter's: the block's own error comes first, and what was not noted is told later

    def log_all(self, *, bint reachable=False) -> None:
        """As `raise_all`, but logs: there is nobody to whom it could be raised. With `reachable` it is the end: also
        of batches that somebody waits for."""
        self._log(reachable, True, None)

    cdef int _log(self, bint reachable, bint waited, object error) except -1:
        # Noted with `error` or logged, or it is here as before.
        cdef int64_t count = 0
        cdef list taken = self._take_all(reachable, waited, &count)
        cdef bint noted = False
        if not count:
            return 0
        try:
            text = f"nobody was told: {self._error(taken, count)}"
            try:
                error.add_note(text)
                noted = True
            except Exception:
                pass  # it has no notes, or is frozen
            _logger.error("%s", text)
        except BaseException:
            if not noted:
                self._put_back(taken, count)
            raise
        return 0

    cdef object _error(self, list taken, int64_t count):
        cdef list failures = []
        cdef _Lot lot
        for each in taken:
            lot = each
            failures.extend(lot.failures)
        return undelivered_error(self.what, failures, count)

    cdef int _put_back(self, list taken, int64_t count) except -1:
        cdef _Lot lot
        for each in taken:
            lot = each
            try:
                self._put(lot)
            except MemoryError:
                continue  # there is still the count
            count -= lot.count
        self.rest += count
        return 0

    def __len__(self) -> int:
        """How many there are, those of batches that somebody may still look at included."""
        cdef int64_t count = self.rest
        cdef _Lot lot
        if self.pid != _this_pid:
            return 0
        for each in list(self.lots):
            lot = each
            count += lot.count
        return count

    def __del__(self):
        if self.pid == _this_pid and self.lots is not None and (self.lots or self.rest):
            self.log_all(reachable=True)
