# cython: autotestdict=False
"""A consumer of librdkafka on the table of functions that the producer uses, and its records as envelopes."""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport INT32_MAX, int32_t, int64_t
from libc.string cimport memcpy, strcmp, strlen

from kbatch._fastmap cimport (
    HEADER_TOO_LARGE,
    HEADERS_DAMAGED,
    KB_LOAD32,
    NO_MEMORY_FOR_HEADERS,
    RUNNING,
    VALUE_NULL,
    WIRE_OF_USER,
    Client,
    Config,
    Core,
    Dispatcher,
    Header,
    Part,
    Raw,
    Received,
    ReceivedEnvelope,
    answer_rebalance,
    begin_reader,
    deadline_after,
    drop_part,
    end_reader,
    kb_calloc,
    kb_cond_signal,
    kb_cond_wait_until,
    kb_free,
    kb_malloc,
    kb_mutex_lock,
    kb_mutex_unlock,
    kb_now_ns,
    read_irregular,
    read_regular,
    regular_envelope,
    take_spares,
    transaction_error,
    wire_number,
)
from kbatch._librdkafka cimport *

from kbatch._errors import ConfigError, ProducerClosedError
from kbatch._fastmap import received  # no-cython-lint
from kbatch._librdkafka import error_text, version_text

cdef extern from *:
    const char *PyUnicode_AsUTF8(object text) except NULL
    int PyList_Append(object items, object item) noexcept

cdef enum:
    MOST = 10_000       # records that one call takes
    MOST_NAMES = 4_096  # of topics, that are kept
    OLDEST = 0x020d02ff

cdef int64_t MS = 1_000_000
cdef int64_t LOOK_EVERY = 250 * MS
cdef int64_t SLICE = 50 * MS  # after so long in a call signals, the group and the end are looked at

BEGINNING = -2  # in place of an offset
END = -1
COMMITTED = -1000


def check_version(int version, str text) -> None:
    """Raises ConfigError unless librdkafka may be read with."""
    if version < OLDEST:
        raise ConfigError(
            f"librdkafka {text} is too old for a listener: before 2.13.2 an error of one partition may lose records of "
            "another. Install a newer one with: pip install 'confluent-kafka>=2.13.2'")


cdef void on_rebalance(rd_kafka_t *rk, int code, rd_kafka_topic_partition_list_t *partitions,
                       void *opaque) noexcept nogil:
    # On the thread that polls, or on the drainer's while it ends librdkafka.
    cdef Client *c = <Client *> opaque
    cdef rd_kafka_topic_partition_list_t *copy = NULL
    cdef rd_kafka_topic_partition_list_t *before = NULL
    kb_mutex_lock(&c.mu)
    if not c.rebalances_itself:
        copy = api.list_copy(partitions)
        before, c.rebalance, c.rebalance_code = c.rebalance, copy, code
    kb_mutex_unlock(&c.mu)
    if before != NULL:
        api.list_destroy(before)
    if copy == NULL:
        answer_rebalance(rk, code, partitions)


cdef void set_ready(Part *part) noexcept nogil:
    # Under the lock: records may have come.
    cdef Client *c = <Client *> part.client
    if part.is_ready or not part.wanted:
        return
    part.is_ready, part.next_ready = 1, NULL
    if c.ready_last == NULL:
        c.ready_first = part
    else:
        c.ready_last.next_ready = part
    c.ready_last = part


cdef void on_records(rd_kafka_t *rk, void *opaque) noexcept nogil:
    # On a thread of librdkafka, which holds the lock of the partition's queue.
    cdef Part *part = <Part *> opaque
    cdef Client *c = <Client *> part.client
    kb_mutex_lock(&c.mu)
    set_ready(part)
    kb_cond_signal(&c.data_cond)
    kb_mutex_unlock(&c.mu)


cdef void on_group(rd_kafka_t *rk, void *opaque) noexcept nogil:
    cdef Client *c = <Client *> opaque
    kb_mutex_lock(&c.mu)
    c.group_is_ready = 1
    kb_cond_signal(&c.data_cond)
    kb_mutex_unlock(&c.mu)


cdef Part *next_ready(Client *c) noexcept nogil:
    cdef Part *part
    kb_mutex_lock(&c.mu)
    part = c.ready_first
    if part != NULL:
        c.ready_first = part.next_ready
        if c.ready_first == NULL:
            c.ready_last = NULL
        part.is_ready = 0  # before its records are taken: those that come now make it ready again
    kb_mutex_unlock(&c.mu)
    return part


cdef Py_ssize_t count_ready(Client *c) noexcept nogil:
    cdef Py_ssize_t count = 0
    cdef Part *part
    kb_mutex_lock(&c.mu)
    part = c.ready_first
    while part != NULL:
        count, part = count + 1, part.next_ready
    kb_mutex_unlock(&c.mu)
    return count


cdef Py_ssize_t take_ready(Client *c, rd_kafka_message_t **messages, Py_ssize_t most) noexcept nogil:
    # Each partition has one turn, and half of what is wanted at most: who polls looks whether one has become full.
    cdef Py_ssize_t count = 0, taken, wanted
    cdef Py_ssize_t quota = most if c.parts == NULL or c.parts.next == NULL else max(1, most // 2)
    cdef Py_ssize_t turns = count_ready(c)
    cdef Part *part
    while count < most and turns > 0:
        turns -= 1
        part = next_ready(c)
        if part == NULL:
            break
        if not part.wanted:
            continue
        wanted = min(quota, most - count)
        taken = api.consume_batch_queue(part.queue, 0, messages + count, wanted)
        if taken > 0:
            count += taken
        if taken == wanted:
            kb_mutex_lock(&c.mu)
            set_ready(part)
            kb_mutex_unlock(&c.mu)
    return count


cdef void wait_for_records(Client *c, bint for_records, int64_t deadline) noexcept nogil:
    kb_mutex_lock(&c.mu)
    if not (c.woken or c.group_is_ready or for_records and c.ready_first != NULL):
        kb_cond_wait_until(&c.data_cond, &c.mu, deadline)
    kb_mutex_unlock(&c.mu)


cdef int take_wake(Client *c) noexcept nogil:
    cdef int woken
    kb_mutex_lock(&c.mu)
    woken, c.woken = c.woken, 0
    kb_mutex_unlock(&c.mu)
    return woken


cdef void unlink_part(Client *c, Part *part) noexcept nogil:
    cdef Part **place = &c.parts
    cdef Part *before = NULL
    cdef Part *each
    while place[0] != part:
        place = &place[0].next
    place[0] = part.next
    kb_mutex_lock(&c.mu)
    part.wanted = 0  # an event that comes now does not put it into the list
    if part.is_ready:
        each = c.ready_first
        while each != part:
            before, each = each, each.next_ready
        if before == NULL:
            c.ready_first = part.next_ready
        else:
            before.next_ready = part.next_ready
        if c.ready_last == part:
            c.ready_last = before
    kb_mutex_unlock(&c.mu)


cdef rd_kafka_topic_partition_list_t *make_list(object items) except NULL:
    # Of (topic, partition) or (topic, partition, offset).
    cdef list given = list(items)
    cdef rd_kafka_topic_partition_list_t *made = api.list_new(<int> len(given))
    cdef rd_kafka_topic_partition_t *added
    cdef tuple parts
    cdef bytes topic
    cdef int32_t partition
    cdef int64_t offset = 0
    try:
        for item in given:
            parts = tuple(item)
            if not 2 <= len(parts) <= 3:  # indices are not checked
                raise ValueError(f"a partition must be (topic, number) or (topic, number, offset), not {item!r}")
            topic = (<str?> parts[0]).encode()
            if b"\0" in topic:
                raise ValueError(f"topic {parts[0]!r}: a name must not contain a NUL character")
            partition = parts[1]
            if len(parts) == 3:
                offset = parts[2]
            added = api.list_add(made, topic, partition)
            if len(parts) == 3:
                added.offset = offset
    except BaseException:
        api.list_destroy(made)
        raise
    return made


cdef list list_items(const rd_kafka_topic_partition_list_t *partitions):
    cdef list items = []
    cdef int i
    for i in range(partitions.cnt):
        items.append((partitions.elems[i].topic.decode(), partitions.elems[i].partition))
    return items


cdef list list_errors(const rd_kafka_topic_partition_list_t *partitions, int code):
    # (topic, partition, code) of those that failed, with `code` for those that do not say why.
    cdef list errors = []
    cdef int i, own
    for i in range(partitions.cnt):
        own = partitions.elems[i].err or code
        if own:
            errors.append((partitions.elems[i].topic.decode(), partitions.elems[i].partition, own))
    return errors


@cython.final
cdef class Membership:
    """A consumer's place in its group as it was at one time. A coordinator refuses offsets of one that is over."""

    cdef rd_kafka_consumer_group_metadata_t *group  # owned

    def __init__(self):
        raise TypeError("ConsumerCore.membership() makes it")

    def __dealloc__(self):
        if self.group != NULL:
            api.group_metadata_destroy(self.group)

    def send_offsets(self, Core producer not None, offsets, int timeout_ms) -> tuple | None:
        """Has the transaction of a producer commit ``(topic, partition, offset)`` each, while a batch is on hold.

        Returns what `HeldBatches.transaction_call` does. It blocks, without the GIL, and is not continued by another.
        """
        cdef rd_kafka_topic_partition_list_t *items
        cdef rd_kafka_error_t *error
        if producer.c.rk == NULL:
            raise ProducerClosedError("the producer is not started, or closed")
        items = make_list(offsets)
        with nogil:
            error = api.send_offsets(producer.c.rk, items, self.group, timeout_ms)
            api.list_destroy(items)
        return transaction_error(producer.c, error)


cdef class ConsumerCore(Core):
    """A consumer, started at its first use. One thread at a time polls it and answers its rebalances; the others may
    call the rest."""

    cdef int wire
    cdef object custom       # the wire object, for WIRE_CUSTOM
    cdef Header *headers     # owned: of the record that is being read
    cdef Py_ssize_t header_room
    cdef dict topics         # by the address of librdkafka's: its name
    cdef str topic           # of the run of records that is being given out
    cdef bint polls
    cdef bint counts         # among those for which memory is kept
    cdef dict parts          # by (topic, partition): the address of its Part
    cdef int64_t look_ns     # when their queues are asked for again
    cdef list envelopes      # what `poll` will answer
    cdef list errors
    cdef readonly int assignments  # so many rebalances were answered

    def __cinit__(self):
        self.kind, self.what = RD_KAFKA_CONSUMER, "consumer"
        self.counts = True
        begin_reader()
        self.topics = {}
        self.envelopes, self.errors = [], []
        self.parts = {}

    def __init__(self, Config config not None, Dispatcher dispatcher not None, wire="kbatch", *, on_start=None):
        cdef Client *c = self.c
        check_version(api.version(), version_text())
        if isinstance(wire, str):
            self.wire = wire_number(wire, " or an object with read()")
        elif callable(getattr(wire, "read", None)):
            self.wire, self.custom = WIRE_OF_USER, wire
        else:
            raise ConfigError(f"wire must be a name or an object with a read() method, not {type(wire).__name__}")
        Core.__init__(self, config, None, dispatcher, max_in_flight=1, queue_max_messages=1, queue_max_bytes=1,
                      delivery_timeout_s=1.0, on_start=on_start)
        c.messages = <rd_kafka_message_t **> kb_malloc(MOST * sizeof(rd_kafka_message_t *))
        c.blocks = <Received **> kb_malloc(MOST * sizeof(Received *))
        if c.messages == NULL or c.blocks == NULL:
            self.close(0)  # what is half made takes nothing
            raise MemoryError("no memory for a consumer")

    def __dealloc__(self):
        kb_free(self.headers)
        if self.counts:
            end_reader()

    cdef void _configure(self, rd_kafka_conf_t *conf) noexcept:
        api.conf_set_events(conf, self.dispatcher.events)
        api.conf_set_rebalance_cb(conf, on_rebalance)

    cdef void _begin_reading(self) noexcept:
        self.c.rebalances_itself = 0
        self.c.group_queue = api.queue_get_consumer(self.c.rk)
        self.c.commit_queue = api.queue_new(self.c.rk)
        if self.c.group_queue != NULL:
            api.queue_cb_event_enable(self.c.group_queue, on_group, self.c)

    # -- the group

    def subscribe(self, topics, from_beginning=()) -> None:
        """Joins the group for these topics; a name that begins with ``^`` is a pattern. Those of `from_beginning` are
        read from there while the group has committed nothing, whatever ``auto.offset.reset`` says."""
        cdef list names = []
        cdef rd_kafka_topic_partition_list_t *wanted
        cdef int code
        for topic in topics:
            names.append((topic, -1))
        self._enter()
        try:
            for topic in from_beginning:
                self._begin_at_beginning((<str?> topic).encode())
            wanted = make_list(names)
            with nogil:
                code = api.subscribe(self.c.rk, wanted)
                api.list_destroy(wanted)
        finally:
            self._leave()
        self._check(code)

    cdef int _begin_at_beginning(self, bytes topic) except -1:
        # librdkafka keeps a topic, and what it was made with, until its own end; so it must not know it before.
        cdef const char *name = topic
        cdef rd_kafka_topic_t *handle
        cdef void *conf
        cdef char text[256]
        cdef int code = 0
        with nogil:
            conf = api.default_topic_conf_dup(self.c.rk)
            api.topic_conf_set(conf, "auto.offset.reset", "earliest", text, sizeof(text))
            handle = api.topic_new(self.c.rk, name, conf)  # which takes the configuration
            if handle == NULL:
                code = api.last_error()
            else:
                api.topic_destroy(handle)
        return self._check(code)

    def unsubscribe(self) -> None:
        """Leaves the group. Its partitions are taken by a rebalance, as others are."""
        cdef int code
        self._enter()
        with nogil:
            code = api.unsubscribe(self.c.rk)
            self._leave()
        self._check(code)

    def rebalance(self) -> tuple | None:
        """What the group wants and nobody has answered yet: ``(gives, partitions)`` of pairs (topic, partition). For
        the thread that polls."""
        cdef Client *c = self.c
        self._enter()
        try:
            # Entered, so only this thread changes it: by its polls, and by its answer.
            if c.rebalance == NULL:
                return None
            return c.rebalance_code == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, list_items(c.rebalance)
        finally:
            self._leave()

    def assignment_lost(self) -> bool:
        """Whether the partitions that are taken belong to others already."""
        self._enter()
        lost = bool(api.assignment_lost(self.c.rk))
        self._leave()
        return lost

    def member_id(self) -> str:
        """By which the group knows it; empty before it has joined."""
        cdef char *text
        self._enter()
        try:
            text = api.memberid(self.c.rk)
            if text == NULL:
                return ""
            try:
                return text.decode("utf-8", "replace")
            finally:
                api.mem_free(self.c.rk, text)
        finally:
            self._leave()

    def membership(self) -> Membership:
        """Its place in the group as it is now. For any thread."""
        cdef Membership found = Membership.__new__(Membership)
        self._enter()
        with nogil:
            found.group = api.group_metadata(self.c.rk)
            self._leave()
        if found.group == NULL:
            raise ProducerClosedError("the consumer is in no group")
        return found

    def answer(self) -> None:
        """Agrees to the rebalance. Records of partitions that were given come from the next polls on. For the thread
        that polls."""
        cdef Client *c = self.c
        cdef rd_kafka_topic_partition_list_t *partitions
        cdef list items
        cdef int code
        self._enter()
        try:
            # Entered, so only this thread changes it. It is taken when nothing can raise any more: what raises before
            # leaves it to the next call, or to the end.
            if c.rebalance != NULL:
                code = c.rebalance_code
                items = list_items(c.rebalance)
                if code == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
                    for item in items:
                        self._take_part(item)
                kb_mutex_lock(&c.mu)
                partitions, c.rebalance = c.rebalance, NULL
                kb_mutex_unlock(&c.mu)
                try:
                    with nogil:
                        answer_rebalance(c.rk, code, partitions)
                    if code != RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
                        for item in items:
                            self._drop_part(item)
                finally:
                    api.list_destroy(partitions)
                self.assignments += 1
        finally:
            self._leave()

    cdef int _take_part(self, tuple item) except -1:
        # Its queue is asked for each time: librdkafka may have made another for it.
        cdef Client *c = self.c
        cdef bytes topic = (<str?> item[0]).encode()
        cdef object address = self.parts.get(item)
        cdef Part *part = NULL
        cdef rd_kafka_queue_t *before
        cdef rd_kafka_queue_t *queue = api.queue_get_partition(c.rk, topic, item[1])
        if queue == NULL:
            return 0  # its records come by the group's queue
        if address is not None:
            part = <Part *> <size_t> address
            before, part.queue = part.queue, queue
            api.queue_cb_event_enable(before, NULL, NULL)
            api.queue_destroy(before)
        else:
            part = <Part *> kb_calloc(1, sizeof(Part))
            if part == NULL:
                api.queue_destroy(queue)
                raise MemoryError()
            part.client, part.queue, part.next = c, queue, c.parts
            c.parts = part
            self.parts[item] = <size_t> part
        api.queue_forward(queue, NULL)
        api.queue_cb_event_enable(queue, on_records, part)
        kb_mutex_lock(&c.mu)
        part.wanted = 1
        set_ready(part)
        kb_mutex_unlock(&c.mu)
        return 0

    cdef int _drop_part(self, tuple item) except -1:
        cdef Part *part
        cdef object address = self.parts.pop(item, None)
        if address is not None:
            part = <Part *> <size_t> address
            unlink_part(self.c, part)
            drop_part(part)
        return 0

    # -- which partitions, without a group

    def assign(self, partitions) -> None:
        """Reads these ``(topic, partition, offset)`` and no others, without joining a group. In place of an offset may
        stand `BEGINNING`, `END`, or `COMMITTED`, by the group's name; after that ``auto.offset.reset`` decides. For the
        thread that polls."""
        cdef rd_kafka_topic_partition_list_t *items
        cdef int code
        self._enter()
        try:
            items = make_list(partitions)
            try:
                given = list_items(items)
                for item in given:
                    self._take_part(item)
                with nogil:
                    code = api.assign(self.c.rk, items)
                for item in set(self.parts).difference(given):
                    self._drop_part(item)
            finally:
                api.list_destroy(items)
        finally:
            self._leave()
        self._check(code)

    def read(self, partitions, bint wanted=True) -> None:
        """Reads these of its partitions, or leaves what is fetched of them where it is until they are wanted again. For
        the thread that polls."""
        cdef rd_kafka_topic_partition_list_t *items
        self._enter()
        try:
            items = make_list(partitions)
            try:
                given = list_items(items)
            finally:
                api.list_destroy(items)
            for item in given:
                if item not in self.parts:
                    continue
                if wanted:
                    self._take_part(item)
                else:
                    kb_mutex_lock(&self.c.mu)
                    (<Part *> <size_t> self.parts[item]).wanted = 0
                    kb_mutex_unlock(&self.c.mu)
        finally:
            self._leave()

    cdef int _look_for_queues(self) except -1:
        # When a partition comes back soon after it was taken, librdkafka may have made another queue for it.
        cdef int64_t now = kb_now_ns()
        if now < self.look_ns:
            return 0
        self.look_ns = now + LOOK_EVERY
        for item, address in self.parts.items():
            if (<Part *> <size_t> address).wanted:
                self._take_part(item)
        return 0

    def pause(self, partitions) -> list:
        """Fetches no more of these, and drops what was fetched of them: it is fetched again after `resume`. What is
        paused remains so over rebalances in which it is kept. Returns what cannot be, as ``(topic, partition, code)``.
        """
        return self._pause(partitions, True)

    def resume(self, partitions) -> list:
        """Fetches these again, from where `poll` has come to. Returns as `pause`."""
        return self._pause(partitions, False)

    cdef list _pause(self, object partitions, bint paused):
        cdef rd_kafka_topic_partition_list_t *items
        cdef int code
        self._enter()
        try:
            items = make_list(partitions)
            with nogil:
                if paused:
                    code = api.pause_partitions(self.c.rk, items)
                else:
                    code = api.resume_partitions(self.c.rk, items)
            try:
                return list_errors(items, code)
            finally:
                api.list_destroy(items)
        finally:
            self._leave()

    def seek(self, partitions, double timeout) -> list:
        """Goes on from these ``(topic, partition, offset)``, which must be assigned, for the next polls. Blocks until
        it is so. Returns what cannot be, as ``(topic, partition, code)``. For the thread that polls."""
        cdef rd_kafka_topic_partition_list_t *items
        cdef rd_kafka_error_t *error
        cdef int code = 0, timeout_ms = as_ms(timeout)
        self._enter()
        try:
            items = make_list(partitions)
            with nogil:
                error = api.seek_partitions(self.c.rk, items, timeout_ms)
                if error != NULL:
                    code = api.error_code(error)
                    api.error_destroy(error)
            try:
                return list_errors(items, code)
            finally:
                api.list_destroy(items)
        finally:
            self._leave()

    def partitions(self, str topic not None, double timeout) -> list:
        """The numbers of a topic's partitions. Raises `ConsumerCallError`, also if there is no such topic."""
        cdef const rd_kafka_metadata_t *metadata = NULL
        cdef rd_kafka_topic_t *handle
        cdef bytes name = topic.encode()
        cdef const char *name_p = name
        cdef int code, i, timeout_ms = as_ms(timeout)
        cdef list found = []
        self._enter()
        try:
            with nogil:
                handle = api.topic_new(self.c.rk, name_p, NULL)
                code = api.last_error() if handle == NULL else api.metadata(
                    self.c.rk, 0, handle, &metadata, timeout_ms)
                if handle != NULL:
                    api.topic_destroy(handle)
        finally:
            self._leave()
        self._check(code)
        try:
            if metadata.topic_cnt:
                code = metadata.topics[0].err
                for i in range(metadata.topics[0].partition_cnt):
                    found.append(metadata.topics[0].partitions[i].id)
        finally:
            api.metadata_destroy(metadata)
        self._check(code)
        found.sort()
        return found

    def watermarks(self, str topic not None, int32_t partition, double timeout) -> tuple:
        """The offsets of a partition's first record and of the one that comes next, as its leader tells them. Raises as
        `subscribe`."""
        cdef bytes name = topic.encode()
        cdef const char *name_p = name
        cdef int64_t low = 0, high = 0
        cdef int code, timeout_ms = as_ms(timeout)
        self._enter()
        with nogil:
            code = api.query_watermark_offsets(self.c.rk, name_p, partition, &low, &high, timeout_ms)
            self._leave()
        self._check(code)
        return low, high

    def offsets_for_times(self, times, double timeout) -> dict:
        """Of each ``(topic, partition, ms)`` the offset of the first record that is not older than that, by its
        timestamp in ms since 1970; `END` if there is none. What fails is left out. Raises as `subscribe`."""
        cdef rd_kafka_topic_partition_list_t *items
        cdef int code, i, timeout_ms = as_ms(timeout)
        cdef dict found = {}
        self._enter()
        try:
            items = make_list(times)
            with nogil:
                code = api.offsets_for_times(self.c.rk, items, timeout_ms)
            try:
                for i in range(items.cnt):
                    if not items.elems[i].err:
                        found[items.elems[i].topic.decode(), items.elems[i].partition] = items.elems[i].offset
            finally:
                api.list_destroy(items)
        finally:
            self._leave()
        self._check(code)
        return found

    def wake(self) -> None:
        """Has `poll` return soon, the next one if none waits. For any thread, and for a signal handler."""
        kb_mutex_lock(&self.c.mu)
        self.c.woken = 1
        kb_cond_signal(&self.c.data_cond)
        kb_mutex_unlock(&self.c.mu)

    # -- records

    def poll(self, int most, double timeout) -> tuple:
        """Up to `most` records, as soon as there is one, else none after `timeout` seconds: ``(envelopes, errors)``.

        With `most` 0 it waits for none, but is told of rebalances and errors; it also returns when there is a
        rebalance. An error is ``(code, text, topic, partition, offset)``; the end of a partition is one, with
        ``enable.partition.eof``. A record that cannot be read is an envelope of the format "raw" with its ``error``.

        What it raises (MemoryError, Ctrl-C, what a wire object lets out that is no `Exception`) loses no record: the
        next call begins with those that were taken.
        """
        cdef Client *c = self.c
        cdef int64_t deadline = deadline_after(timeout)
        cdef int64_t now
        self._check_fork()  # before what a thread of the parent may have set
        if self.polls:
            raise RuntimeError("one thread at a time polls a consumer")
        self.polls = True
        try:
            self._enter()
            try:
                while True:
                    self._look_for_queues()
                    take_spares(&c.spare)
                    with nogil:
                        now = kb_now_ns()
                        self._fetch(min(most, MOST), max(0, min(deadline - now, SLICE)))
                    if (c.taken or c.rebalance != NULL or take_wake(c) or kb_now_ns() >= deadline
                            or KB_LOAD32(&c.life) != RUNNING):
                        break
                    PyErr_CheckSignals()
                self._give_out()
            finally:
                with nogil:
                    if c.given_out == c.taken:
                        self._drop_messages()
                    self._leave()
            envelopes, errors = self.envelopes, self.errors
            self.envelopes, self.errors = [], []
        finally:
            self.polls = False
        return envelopes, errors

    cdef void _fetch(self, int most, int64_t ns) noexcept nogil:
        # First what its group has for it, which may be records, too. What was left comes before all.
        cdef Client *c = self.c
        cdef Py_ssize_t count
        cdef int64_t deadline = kb_now_ns() + ns
        if c.taken:
            return
        count = self._fetch_now(most)
        if c.rebalance == NULL and not count and ns:
            wait_for_records(c, most > 0, deadline)
            count = self._fetch_now(most)
        self._copy(count)

    cdef Py_ssize_t _fetch_now(self, int most) noexcept nogil:
        cdef Client *c = self.c
        cdef Py_ssize_t count
        kb_mutex_lock(&c.mu)
        c.group_is_ready = 0  # before the queue is looked at: what comes now sets it again
        kb_mutex_unlock(&c.mu)
        count = max(0, api.consume_batch_queue(c.group_queue, 0, c.messages, max(most, 1)))
        if c.rebalance == NULL and count < most:
            count += take_ready(c, c.messages + count, most - count)
        return count

    cdef void _copy(self, Py_ssize_t count) noexcept nogil:
        # All that need not be a Python object. A message that nothing more is wanted of is given back at once.
        cdef Client *c = self.c
        cdef rd_kafka_message_t *message
        cdef rd_kafka_topic_t *topic = NULL
        cdef Raw raw
        cdef Py_ssize_t i
        for i in range(count):
            message = c.messages[i]
            c.blocks[i] = NULL
            if message.err:
                continue
            if self.wire != WIRE_OF_USER and self._begin_raw(message, &raw):
                c.blocks[i] = read_regular(&raw, self.wire, &c.spare)
            # The first of each run of a topic keeps its name; a longer value is copied from its message.
            if c.blocks[i] != NULL and message.rkt == topic and (
                    c.blocks[i].value.chars != NULL or message.payload == NULL):
                api.message_destroy(message)
                c.messages[i] = NULL
            topic = message.rkt if c.messages[i] != NULL else topic
        c.given_out, c.taken = 0, count

    cdef int _give_out(self) except -1:
        # From where the last call was interrupted.
        cdef Client *c = self.c
        cdef rd_kafka_message_t *message
        cdef Received *block
        cdef Raw raw
        cdef ReceivedEnvelope envelope
        while c.given_out < c.taken:
            message, block = c.messages[c.given_out], c.blocks[c.given_out]
            if message != NULL and message.err:
                self.errors.append(self._error(message))
                c.given_out += 1
                continue
            if message != NULL:
                self.topic = self._topic(message)
            if block != NULL:
                envelope = regular_envelope(
                    block, self.topic, <const char *> message.payload if message != NULL else NULL)
                c.blocks[c.given_out] = NULL
            else:
                if not self._begin_raw(message, &raw) and raw.count == NO_MEMORY_FOR_HEADERS:
                    raise MemoryError("no memory for the headers of a record")
                envelope = read_irregular(&raw, self.topic, self.wire, self.custom)
            if PyList_Append(self.envelopes, envelope) < 0:  # an exception is set
                envelope._block, c.blocks[c.given_out] = NULL, block
                return -1
            c.given_out += 1
        return 0

    cdef void _drop_messages(self) noexcept nogil:
        cdef Client *c = self.c
        cdef Py_ssize_t i
        for i in range(c.taken):
            if c.messages[i] != NULL:
                api.message_destroy(c.messages[i])
        c.taken = c.given_out = 0

    cdef tuple _error(self, rd_kafka_message_t *message):
        cdef bytes text = PyBytes_FromStringAndSize(<const char *> message.payload, message.len)
        return (message.err, text.decode("utf-8", "replace"), self._topic(message) if message.rkt != NULL else None,
                message.partition, message.offset)

    cdef str _topic(self, rd_kafka_message_t *message):
        cdef object key = <size_t> message.rkt
        cdef object name = self.topics.get(key)
        cdef const char *text = api.topic_name(message.rkt)
        # librdkafka may drop a topic and make another at the same address.
        if name is None or strcmp(PyUnicode_AsUTF8(name), text) != 0:
            if len(self.topics) >= MOST_NAMES:
                self.topics.clear()
            name = self.topics[key] = text.decode()
        return name

    cdef bint _begin_raw(self, rd_kafka_message_t *message, Raw *out) noexcept nogil:
        # False: `count` says why its headers cannot be had.
        cdef int kind = 0
        out.offset, out.partition = message.offset, message.partition
        out.timestamp = max(0, api.message_timestamp(message, &kind))
        out.key.chars, out.key.length = <const char *> message.key, message.key_len
        out.value.chars, out.value.length = <const char *> message.payload, message.len
        out.count = self._read_headers(message)
        out.headers = self.headers
        return out.count >= 0

    cdef Py_ssize_t _read_headers(self, rd_kafka_message_t *message) noexcept nogil:
        # Or why they cannot be had.
        cdef rd_kafka_headers_t *given = NULL
        cdef const char *name
        cdef const void *value
        cdef size_t size
        cdef Py_ssize_t count = 0
        cdef int code = api.message_headers(message, &given)
        if code != 0:
            return 0 if code == RD_KAFKA_RESP_ERR__NOENT else HEADERS_DAMAGED
        while api.header_get_all(given, count, &name, &value, &size) == 0:
            if size > INT32_MAX:
                return HEADER_TOO_LARGE
            if count == self.header_room and not self._grow():
                return NO_MEMORY_FOR_HEADERS
            self.headers[count].name = name
            self.headers[count].name_len = <int32_t> strlen(name)
            self.headers[count].value = <const char *> value
            self.headers[count].value_len = VALUE_NULL if value == NULL else <int32_t> size
            count += 1
        return count

    cdef bint _grow(self) noexcept nogil:
        cdef Py_ssize_t room = 2 * self.header_room + 16
        cdef Header *larger = <Header *> kb_malloc(room * sizeof(Header))
        if larger == NULL:
            return False
        if self.header_room:
            memcpy(larger, self.headers, self.header_room * sizeof(Header))
        kb_free(self.headers)
        self.headers, self.header_room = larger, room
        return True

    # -- offsets

    def commit(self, offsets, timeout=None) -> None | list:
        """Commits ``(topic, partition, offset)`` each. Without `timeout` nobody waits, and nobody hears of failures.

        With it returns what was not committed, as ``(topic, partition, code)``; after `timeout` seconds all of it, with
        ``_TIMED_OUT``. For any thread.
        """
        cdef rd_kafka_topic_partition_list_t *items
        cdef rd_kafka_queue_t *answers = NULL
        cdef rd_kafka_event_t *event = NULL
        cdef int64_t deadline = deadline_after(timeout)
        cdef int code
        if not offsets:
            return []
        self._enter()
        try:
            items = make_list(offsets)
            try:
                if timeout is None:
                    with nogil:
                        code = api.commit(self.c.rk, items, 1)
                    return None
                answers = api.queue_new(self.c.rk)
                with nogil:
                    code = api.commit_queue(self.c.rk, items, answers, NULL, NULL)
                if code:
                    return list_errors(items, code)
                while True:
                    with nogil:
                        event = api.queue_poll(answers, as_wait(deadline))
                    if event != NULL or kb_now_ns() >= deadline:
                        break
                    PyErr_CheckSignals()
                if event == NULL:
                    return list_errors(items, RD_KAFKA_RESP_ERR__TIMED_OUT)
                if api.event_list(event) == NULL:
                    return list_errors(items, api.event_error(event))
                return list_errors(api.event_list(event), api.event_error(event))
            finally:
                if event != NULL:
                    api.event_destroy(event)
                if answers != NULL:
                    api.queue_destroy(answers)
                api.list_destroy(items)
        finally:
            self._leave()

    def committed(self, partitions, double timeout) -> dict:
        """The offsets that the group has committed; those without one are left out. Raises as `subscribe`."""
        cdef rd_kafka_topic_partition_list_t *items
        cdef int code, i, timeout_ms = as_ms(timeout)
        found = {}
        self._enter()
        try:
            items = make_list(partitions)
            with nogil:
                code = api.committed(self.c.rk, items, timeout_ms)
            try:
                for i in range(items.cnt):
                    if items.elems[i].offset >= 0:
                        found[items.elems[i].topic.decode(), items.elems[i].partition] = items.elems[i].offset
            finally:
                api.list_destroy(items)
        finally:
            self._leave()
        self._check(code)
        return found

    def begin_commit(self, offsets) -> int:
        """Commits ``(topic, partition, offset)`` each, and waits for nothing: `commit_answer` tells what came of it.

        Returns a code of librdkafka: unless it is 0, nothing was begun.
        """
        cdef rd_kafka_topic_partition_list_t *items
        cdef int code
        self._enter()
        try:
            items = make_list(offsets)
            with nogil:
                code = api.commit_queue(self.c.rk, items, self.c.commit_queue, NULL, NULL)
                api.list_destroy(items)
        finally:
            self._leave()
        return code

    def commit_answer(self, offsets) -> list | None:
        """What was not committed of `offsets`, with which the last commit was begun, as ``(topic, partition, code)``;
        None: there is no answer yet."""
        cdef rd_kafka_event_t *event
        cdef int code
        cdef list failed = []
        self._enter()
        try:
            event = api.queue_poll(self.c.commit_queue, 0)
            if event == NULL:
                return None
            try:
                # The code of the whole is 0 unless all partitions have failed.
                code = api.event_error(event)
                if api.event_list(event) != NULL:
                    return list_errors(api.event_list(event), code)
                if code:
                    for item in offsets:
                        failed.append((item[0], item[1], code))
                return failed
            finally:
                api.event_destroy(event)
        finally:
            self._leave()

    def ends(self, partitions) -> dict:
        """Of partitions that are read, the offset behind their last record, as the last answer of a broker told."""
        cdef int64_t low, high
        cdef bytes topic
        found = {}
        self._enter()
        try:
            for item in partitions:
                low, high, topic = -1, -1, (<str?> item[0]).encode()
                if api.get_watermark_offsets(self.c.rk, topic, item[1], &low, &high) == 0 and high >= 0:
                    found[item] = high
        finally:
            self._leave()
        return found

    cdef int _check(self, int code) except -1:
        if code:
            raise ConsumerCallError(code, *error_text(code))
        return 0


cdef int as_wait(int64_t deadline) noexcept nogil:
    # ms of a slice.
    return <int> ((max(0, min(deadline - kb_now_ns(), SLICE)) + MS - 1) // MS)


cdef int as_ms(double seconds) noexcept:
    return <int> (max(0.0, min(seconds, 2e6)) * 1000)


class ConsumerCallError(Exception):
    """librdkafka has refused a call: its code, name and description."""
