cdef class Outcomes:
    """What became of each envelope of a batch, kept as C records until it is asked for."""

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

    def expired_indices(self) -> list:
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
