# What another compiled module of kbatch can use: batches and what they are made of. The functions are in ``native/``,
# each beside those of its noun.

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t

from kbatch._librdkafka cimport (
    addrinfo,
    rd_kafka_conf_t,
    rd_kafka_error_t,
    rd_kafka_event_t,
    rd_kafka_headers_t,
    rd_kafka_message_t,
    rd_kafka_queue_t,
    rd_kafka_t,
    rd_kafka_topic_partition_list_t,
    rd_kafka_topic_t,
)

include "native/platform.pxi"

# -- an envelope

cdef enum BodyKind:
    BODY_NONE = 0       # no constructor has run to its end
    BODY_MESSAGE = 1    # `_body` is encoded by the producer's encoder
    BODY_DATA = 2       # `_body` is the encoded body
    BODY_TOMBSTONE = 3  # a null value
    BODY_BUILDING = 4   # a constructor runs, or has failed
    BODY_NULL = 5       # a null value that is no tombstone: `_body` is None
    BODY_UNREAD = 6     # of a ReceivedEnvelope: objects are made of its `_block` when they are asked for


cdef class Envelope:
    cdef object _body
    cdef object _key
    cdef object _topic
    cdef object _message_type  # this and the next seven in the order of `wire.pxi`
    cdef object _content_type
    cdef object _source
    cdef object _correlation_id
    cdef object _conversation_id
    cdef object _parent_id
    cdef object _tenant_id
    cdef object _user_name
    cdef tuple _headers
    cdef int64_t _timestamp   # ms; 0: the batch's time
    cdef int64_t _sent_at     # µs, as the next two; NO_TIME: unset
    cdef int64_t _scheduled_time
    cdef int64_t _deliver_by
    cdef int32_t _partition   # -1: the partitioner's choice
    cdef int32_t _attempts
    cdef int _kind            # BodyKind; the last that a constructor sets, and after that `fill` alone
    cdef unsigned char[16] _id
    cdef int _check_new(self) except -1
    cdef int _set_common(self, object key, object topic, object partition, object timestamp, object headers, object id,
                         object sent_at) except -1
    cdef dict _arguments(self)


cdef enum:
    # Header.value_len when the value is made while the header is added, from the field that `value` points at
    VALUE_NULL = -1
    VALUE_UUID = -2
    VALUE_TIME_KBATCH = -3
    VALUE_TIME_WOLVERINE = -4
    VALUE_INT32 = -5


cdef struct Header:
    const char *name    # static, or the UTF-8 of a str that the batch's envelopes keep alive
    const char *value   # the same, or a field of the envelope (see VALUE_…)
    int32_t name_len
    int32_t value_len


cdef enum:
    RECEIVED_TEXTS = 8  # as many as are declared as one in `wire.pxi`


cdef struct Text:
    const char *chars   # NULL: none
    Py_ssize_t length


cdef struct Received:
    # A record that was read without the GIL: one allocation, with all that the pointers point at behind it. Nothing
    # of librdkafka's is left in it.
    int64_t offset
    int64_t timestamp     # ms; 0: none
    int64_t sent_at       # µs, as the next two; or NO_TIME
    int64_t scheduled_time
    int64_t deliver_by
    int32_t partition
    int32_t attempts
    int kind              # BodyKind
    int seen              # bits of the fields that headers have given
    int makes_id          # of topic, partition and offset, when it is asked for
    int is_event          # of CloudEvents
    unsigned char[16] id
    Text[RECEIVED_TEXTS] texts
    Text key
    Text value            # without `chars`, of BODY_DATA: it is the envelope's `_body` from the first
    Header *headers       # all, as on the wire. Of those that are not the user's the length of the name is inverted
    Py_ssize_t count      # of these
    Py_ssize_t users      # of the user's
    int size_kind         # of the allocation, by which it is kept; 0: of one that is not
    Received *next        # of those that are kept


cdef enum:
    BLOCK_KINDS = 17


cdef struct Blocks:
    # Spare memory for received envelopes, by size.
    Received *first[BLOCK_KINDS]
    Py_ssize_t[BLOCK_KINDS] count
    size_t bytes


cdef class ReceivedEnvelope(Envelope):
    cdef Received *_block         # owned, to the end: another thread may read it while `fill` runs. NULL: none
    cdef object _decoded          # what `message` shows; UNSET: nobody has decoded it
    cdef int64_t _offset
    cdef object _error            # why it could not be read, or None
    cdef object _given_value      # without a block, the value of the record
    cdef tuple _given_headers     # and all its headers
    cdef object _text(self, int field)
    cdef int _fill(self) except -1
    cdef int _make_id(self) except -1
    cdef Envelope _plain(self)


# -- a record: what phase 1 makes of an envelope, and what becomes of it

cdef enum:
    # Outcome.state
    PENDING = 0
    ACKED = 1
    FAILED = 2
    EXPIRED = 3   # deliver_by had passed; never sent, not a failure


cdef enum:
    # Record.flags: what is not sent. Of such a record only `flags` and `partition` are set.
    RECORD_EXPIRED = 1
    RECORD_REJECTED = 2  # it could not be mapped, and the batch goes on without it


cdef struct Outcome:
    # One per envelope, the opaque of its produce call. Written by the thread that polls its delivery report, or by
    # phase 2 when it is not sent; read after the batch is done.
    BatchState *batch
    int64_t offset       # until it is known the address of its HeaderList, plus 1, or of its Topic
    int32_t partition
    int16_t error
    uint8_t state
    uint8_t persistence  # rd_kafka_message_status: not, possibly, persisted


cdef struct Consumed:
    # A record to read. All of it is borrowed, and stays where it is for as long as it is read.
    PyObject *topic       # as errors name it and ids are made of it, and so the next two
    PyObject *partition
    PyObject *offset
    PyObject *key         # None, bytes or str
    PyObject *value       # None or a buffer
    int64_t timestamp     # ms; 0: none
    PyObject *pairs       # a tuple of pairs (name, value): the headers; or NULL
    const Header *headers  # or these, with their values as they are on the wire
    Py_ssize_t count      # of headers


cdef struct Raw:
    # A record as librdkafka has it. All of it is borrowed.
    int64_t offset
    int64_t timestamp     # ms; 0: none
    int32_t partition
    Text key
    Text value
    Header *headers       # with their values as they are on the wire
    Py_ssize_t count      # of headers, or why they cannot be had


cdef enum:
    HEADER_TOO_LARGE = -1  # than 2 GiB
    NO_MEMORY_FOR_HEADERS = -2
    HEADERS_DAMAGED = -3   # or more than librdkafka reads


cdef struct Topic:
    # One of each name in a pool, from where it is first mapped to until the pool's end.
    char *name                # owned
    Py_ssize_t name_len
    uint32_t hash             # of the name
    rd_kafka_topic_t *handle  # owned; made when a batch first enqueues to it
    int64_t in_flight         # atomic: its part of Client.in_flight
    int64_t bytes             # atomic: its part of Client.bytes
    Place *first              # detached batches that write to it, in the order in which they came; only the first one
    Place *last               # may. Under the client's lock
    Topic *next               # of the pool's
    Topic *next_in_bucket


cdef struct Record:
    # What phase 1 writes and phase 2 reads. Pointers are borrowed: from the envelopes (or packed bytes) and the objects
    # that the Batch keeps until it is done, from `bodies` as long, from the arena until phase 2 ends.
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


# -- a pool: what batches take memory from, again and again

cdef struct ArenaBlock:
    ArenaBlock *next
    size_t used
    size_t size  # bytes after this struct


cdef struct Pool:
    # Of a client, or of a RecordPool. What is taken from it is given back to it.
    kb_mutex mu             # guards the rest; never held while another lock is taken
    ArenaBlock *spare_blocks
    int spare_block_count
    Record *spare_records
    Py_ssize_t spare_records_capacity
    Topic *topics           # owned; each is there until the end
    Topic **buckets         # owned; the same by their names
    size_t bucket_count     # a power of two, or 0
    size_t topic_count


@cython.final
cdef class RecordPool:
    cdef Pool pool  # used under the GIL alone: so no fork finds it locked


# -- a batch, and who owns each part of it until when

cdef enum:
    UUID_TEXT = 36          # 8-4-4-4-12 hexadecimal digits, lower case
    TIME_TEXT_KBATCH = 27   # 2026-11-23T09:16:45.123456Z
    TIME_TEXT_WOLVERINE = 28  # 2026-11-23 09:16:45:123456 Z


cdef struct Place:
    # One topic of a batch, and the batch's place among those that wait to write to it.
    Topic *topic
    BatchState *batch
    Place *other      # owned: the batch's next topic
    Place *ahead
    Place *behind


cdef struct Line:
    # Batches that wait, in order. A batch stands in one at most.
    BatchState *first
    BatchState *last


cdef struct BatchState:
    # Lives inside its Python object: a Batch is kept alive by the client (`owner`) while anything is in flight.
    Pool *pool            # what it is mapped with, and gives back; kept by the MappedBatch. NULL: nothing to give back
    Client *client        # kept by the Batch's Core; NULL if it is only mapped
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
    int32_t claimed       # of a batch on hold: somebody sees to its answer; under the GIL
    int32_t failing       # atomic: an envelope has failed that could be mapped
    int32_t abandoned     # atomic: nobody wants what is not enqueued yet
    int32_t detached      # 1: the drainer enqueues it. Set before the line, or there by `hand_over_own`
    int32_t is_enqueuing  # phase 2 is not over; its thread's own, or, if detached, under the client's lock
    unsigned long thread  # const in line: whose it is; 0 if it was detached from the first
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
    int32_t starved       # it had no room, and waits for enough of it; of the batch with the turn, or under the lock
    int32_t queue_full    # librdkafka's queue had no room when so many reports had come; the same
    int64_t full_at
    int64_t wants         # its part of Client.wanted


cdef class MappedBatch:
    cdef BatchState state
    cdef object keeper    # of the pool
    cdef tuple envelopes  # or the packed bytes that its records point into
    cdef list kept        # objects whose memory records point at, besides the envelopes
    cdef char[TIME_TEXT_WOLVERINE] sent_at
    cdef list _records(self)


cdef class Batch(MappedBatch):
    cdef readonly Core core
    cdef readonly Outcomes outcomes
    cdef list wakers      # called by the dispatcher itself: wake-ups of event loops
    cdef object enqueued_waker  # the same, at the end of phase 2
    cdef list callbacks   # Jobs: called with this batch on the callback thread, in this order
    cdef bint looked      # somebody is told of its failures, or was
    cdef int waited       # so many wait for it, or have waited and not looked yet
    cdef _Lot lot         # its failures, once it is released, if nobody is told of them yet
    cdef void _mark_looked(self) noexcept
    cdef void _wait_on(self) noexcept
    cdef void _keep_failures(self) noexcept
    cdef void _release(self) noexcept
    cdef void _forget_in_slices(self) noexcept
    cdef int _listen(self, object waker, object callback) except -1


cdef class Outcomes:
    cdef Outcome *_items   # owned
    cdef readonly Py_ssize_t count

    @staticmethod
    cdef Outcomes make(Py_ssize_t count)

    cdef Py_ssize_t _state_count(self, int state) noexcept


# -- a client: what one producer has in C

cdef enum:
    # Client.life
    NEW = 0        # librdkafka not started
    RUNNING = 1
    CLOSING = 2    # no new batches; those in line are enqueued; the drainer polls
    FINISHING = 3  # the drainer destroys librdkafka once nothing is in flight
    CLOSED = 4


cdef struct Waiter:
    # On the stack of a thread that waits.
    kb_cond cond
    int kind
    BatchState *batch
    Waiter *next


cdef struct Notice:
    # An event for the dispatcher. It owns the event; throttle notices, which are no events, own their text.
    rd_kafka_event_t *event
    char *broker_name
    int32_t broker_id
    int32_t throttle_ms
    Notice *next


# -- header lists of librdkafka, used again

cdef enum:
    SHAPE_BUCKETS = 512
    SHAPES_SEEN = 4096      # hashes: a shape is kept from its second sighting on


cdef struct ShapeHeader:
    const char *name    # in the shape
    const char *seen    # where the same name stood last, in the slice `Shape.slice`
    char *last          # in the shape: the value that was written last
    int64_t changed     # when it became that one (`Shape.takes`); INT64_MAX: it varies, and `last` is not looked at
    int32_t name_len
    int32_t value_len   # on the wire; -1: null
    int32_t changes     # less the times that it was the same


cdef struct Shape:
    Shape *next             # of its bucket
    HeaderList *free        # its lists without a message
    ShapeHeader *headers    # behind this struct, as names and values are
    int64_t slice
    int64_t takes           # how many of its lists were taken
    int64_t list_bytes      # about what one of its lists takes
    uint32_t mark
    int32_t count
    int32_t lists           # all of its lists
    int32_t is_used         # since the last look for one to drop
    int32_t is_dropped      # in no bucket: it goes with its last list


cdef struct HeaderList:
    rd_kafka_headers_t *headers  # owned; while a message has it, librdkafka's
    Shape *shape
    Topic *topic                 # of the message
    HeaderList *next             # of its run, or of its shape's
    int64_t written              # when (`Shape.takes`)
    HeaderList *last             # of the first of a run: the lists of one shape that reports have given back, in a row
    HeaderList *next_run         # likewise
    int64_t in_run               # likewise: how many
    # behind this struct: where each value stands in `headers`


cdef struct ListPool:
    Shape *buckets[SHAPE_BUCKETS]
    uint32_t seen[SHAPES_SEEN]
    int64_t slice          # the number of the slice that is being enqueued
    int64_t pooled_bytes   # atomic
    int32_t shapes
    int32_t hand           # the bucket in which the next shape to drop is looked for


cdef struct Part:
    # A partition that a consumer reads. librdkafka keeps its records apart, so one that is full holds up no other.
    void *client
    rd_kafka_queue_t *queue  # owned; destroyed when the partition is taken, or before librdkafka is
    Part *next
    Part *next_ready
    int is_ready
    int wanted

cdef struct Client:
    int pid                 # const once started; 0 before
    int32_t references      # atomic: the Core, the dispatcher, the drainer
    int64_t in_flight       # atomic: messages given to librdkafka (or about to be) without an outcome
    int64_t bytes           # atomic: their values
    int64_t waiting         # atomic: accepted envelopes that are not among them yet and have no outcome
    int64_t room            # const: how many messages may be in flight
    int64_t byte_room       # const: how many bytes
    int64_t queue_messages  # const: what librdkafka's queue takes
    int64_t queue_bytes     # const
    int64_t wanted          # atomic: bytes of a message for which librdkafka's queue had no room, and others keep free
    int64_t unpolled        # messages offered since the last look at the reports; of the batch that has the turn
    int64_t socket_timeout_ns  # const: how long a request may be under way
    kb_mutex mu
    kb_cond drainer_cond
    kb_cond dispatcher_cond
    kb_cond life_cond       # life, entered or the line changed, or a batch on hold was released; others nap on it
    int32_t life            # written under `mu`; atomic, where it is read without
    int32_t shut            # atomic: life >= FINISHING
    int entered             # threads that may call librdkafka, apart from the drainer: it must live
    rd_kafka_t *rk          # owned; destroyed by the drainer. NULL before start
    rd_kafka_queue_t *queue  # the same
    Waiter *waiters
    Waiter *leader          # the one waiter that polls
    int32_t leader_is_due   # atomic: the leader should leave its poll, its wait is over
    Line line               # batches that may enqueue when they have room
    Line behind             # detached batches behind others of the same topics
    BatchState *turn        # the batch that enqueues now, one of `line`; NULL: none has room, or none is there
    int32_t standing        # batches in `line`; written under `mu`; atomic
    int detached            # detached batches in both
    int64_t look_ns         # when the drainer looks for detached batches whose time is over
    int callers             # threads that enqueue
    int64_t polls           # polls by callers, so that the drainer sees that they care
    int eager               # unfinished batches with listeners, flushes: reasons to poll at once
    int events              # const: the types of librdkafka's events, besides delivery reports, that somebody wants
    int events_expected     # const: callbacks are configured
    int drainer_parked      # waits without a limit, or for longer than a nap: work that comes wakes it
    int drainer_asleep      # naps: only eagerness and the turn of a detached batch wake it
    int drainer_polls       # sits in librdkafka's poll
    int32_t drainer_is_due  # atomic: the drainer should leave its poll, there is something to enqueue
    Waiter drainer_self     # marks its polls; never linked
    int64_t request_ns      # atomic: when the last produce request was sent
    int64_t doubt_ns        # atomic: when the last one was that a leader may have denied
    int64_t reports         # atomic: delivery report events handled
    int64_t fatal_since_ns  # 0: no fatal error
    int32_t fatal           # atomic: librdkafka's code of the fatal error
    int64_t lost            # messages that ended without acknowledgement while closing
    int32_t held            # batches on hold; written under `mu`; atomic
    int64_t undecided       # their envelopes
    BatchState *news_first  # batches for the dispatcher: done, or enqueued if that is to be told
    BatchState *news_last
    BatchState *idle_done   # batches nobody listens to; released by a thread that holds the GIL next
    Notice *notice_first
    Notice *notice_last
    int dispatcher_stop
    int dispatcher_nudge    # release idle_done
    Pool pool               # with a lock of its own; handles of its topics are destroyed with rk
    int recycles            # const: header lists are used again
    ListPool *lists         # owned; of the batch that has the turn, set under `mu`; of the drainer when nobody enqueues
    HeaderList *returned    # owned; the first of the runs of lists that reports have given back
    int64_t returned_bytes
    int64_t lists_used_ns   # when the last one was taken; of the batch that has the turn
    # of a consumer; its main queue is `queue`
    rd_kafka_queue_t *group_queue  # owned: what its group tells it, and errors
    rd_kafka_queue_t *commit_queue  # owned: answers to commits that nobody waits for
    Part *parts             # owned; those of the partitions that it was given, of the thread that polls
    Part *ready_first       # of those the ones that may have records
    Part *ready_last
    kb_cond data_cond       # one is ready, `group_is_ready` or `woken`
    int group_is_ready
    int woken               # who polls is to return
    rd_kafka_topic_partition_list_t *rebalance  # owned: partitions that are given or taken, until it is answered
    int rebalance_code
    int rebalances_itself   # nobody is left who would answer
    rd_kafka_message_t **messages  # owned; what a poll has taken and has not given out yet. Of the thread that polls,
    Received **blocks              # of the drainer when nobody is left. Owned, as each; or NULL: of a message
    Py_ssize_t taken        # so many
    Py_ssize_t given_out    # of these
    Blocks spare            # for the records of a poll, of whose thread it is
    # counters for stats()
    int64_t acked
    int64_t failed
    int64_t enqueue_ns


# -- where Python meets the client

cdef class Mapper:
    cdef int wire
    cdef object custom                # the wire object, for WIRE_CUSTOM
    cdef const void *own              # the format's own headers (OwnHeader), in order
    cdef int own_count
    cdef object encode_into           # msgspec's bound method, or None
    cdef object encoder               # the callable, or None
    cdef object encoded_content_type  # content type of what the encoder makes
    cdef object source
    cdef object header_hook
    cdef frozenset reserved
    cdef int64_t message_max_bytes
    cdef int64_t queue_max_bytes
    cdef bint carry_scheduled_time    # a time in the future is the reader's business
    cdef Scratch spare                # for the next mapping; nothing else here changes after __init__
    cdef Scratch _take_scratch(self)
    cdef int _give_scratch(self, Scratch scratch) except -1
    cdef int64_t _pooled(self) noexcept


@cython.final
cdef class Scratch:
    cdef bytearray memory         # None when there was no memory for another
    cdef Py_ssize_t base
    cdef Py_ssize_t largest_base  # so that the memory is never larger than a message may be
    cdef Py_ssize_t longest       # of the messages since it was taken

    @staticmethod
    cdef Scratch make(int64_t message_max_bytes)

    cdef int _remake(self, Py_ssize_t base) except -1
    cdef int _begin(self) except -1
    cdef int _end(self, Py_ssize_t length) except -1
    cdef Py_ssize_t _base_for(self, Py_ssize_t length) noexcept
    cdef bint _is_worth_keeping(self) noexcept


cdef class Config:
    cdef rd_kafka_conf_t *conf  # owned until a Core hands it to rd_kafka_new
    cdef set hidden             # properties whose values no error shows


cdef class Core:
    cdef Client *c
    cdef object __weakref__
    cdef Config config
    cdef Mapper mapper
    cdef readonly Dispatcher dispatcher
    cdef object start_lock
    cdef bint is_starting             # by the thread that has it
    cdef object on_start
    cdef int64_t delivery_timeout_ns
    cdef int64_t batches
    cdef int64_t mapped
    cdef int64_t map_ns
    cdef int64_t unreleased           # batches that were taken and not given back yet
    cdef readonly Undelivered undelivered  # failures that nobody was told of
    cdef int kind                     # RD_KAFKA_PRODUCER or RD_KAFKA_CONSUMER
    cdef str what                     # it is called
    cdef void _configure(self, rd_kafka_conf_t *conf) noexcept
    cdef void _begin_reading(self) noexcept
    cdef int _start(self) except -1
    cdef int _check_fork(self) except -1
    cdef int _enter(self, int refused_from=*) except -1
    cdef void _leave(self) noexcept nogil
    cdef int _check_fatal(self) except -1
    cdef int _begin(self, Batch batch, int64_t deadline, object waker, object callback, bint detached) except -1
    cdef int _accept(self, Batch batch, int64_t deadline, object waker, object callback) except -1
    cdef int _adopt(self, Batch batch, int64_t deadline, object waker, object callback) except -1
    cdef bint _wait_for(self, Batch batch, int64_t deadline) except -1
    cdef bint _drive(self, Batch batch, int64_t deadline, int wait_for) except -1
    cdef int _await_release(self, int64_t deadline) except -1
    cdef int _wait_until_closed(self, int64_t deadline) except -1


# -- who is told of what

cdef class Dispatcher:
    cdef Client *c                   # a reference, while the thread runs
    cdef readonly int events         # event types to ask librdkafka for, besides delivery reports
    cdef readonly object throttle_cb
    cdef CallbackThread callback_thread
    cdef tuple other_threads         # more of them, that end with the producer
    cdef object on_error
    cdef object on_stats
    cdef object on_log
    cdef object on_oauth
    cdef object thread
    cdef BatchState *_answer(self, BatchState *state, BatchState **answered) noexcept
    cdef void _answer_done(self, Batch batch) noexcept
    cdef void _wake(self, object waker) noexcept
    cdef void _pass_on(self, Notice *notice) noexcept
    cdef int _pass_one(self, Notice *notice) except -1


@cython.final
cdef class CallbackThread:
    cdef object __weakref__
    cdef str name
    cdef Jobs jobs
    cdef Flag changed
    cdef object lock           # of the start; re-entrant: a signal handler or a finalizer may come here from within
    cdef object thread
    cdef object token          # of the thread that runs jobs: one whose start was interrupted ends by itself
    cdef bint has_begun        # that thread has
    cdef Flag begun
    cdef bint stopping
    cdef int promised          # jobs that come for certain, or calls that will say that they do not
    cdef readonly int waiting  # jobs
    cdef void _append(self, Job job) noexcept
    cdef void _append_surely(self, Job job) noexcept
    cdef bint _start(self) except -1
    cdef int _work(self, object token) except -1


@cython.final
cdef class Jobs:
    cdef Job first
    cdef Job last
    cdef void append(self, Job job) noexcept
    cdef Job pop(self)


@cython.final
cdef class Job:
    cdef Call call
    cdef object run       # of that context
    cdef tuple arguments  # the function, and what it is called with
    cdef Job next

    @staticmethod
    cdef Job make(object caller, object function, tuple arguments)

    cdef void _run(self) noexcept


@cython.final
cdef class Call:
    cdef object caller  # None: of interest is the call itself
    cdef bint over
    cdef tuple _chain(self)
    cdef void _end(self) noexcept


cdef class Flag:
    cdef kb_mutex mu
    cdef kb_cond cond
    cdef bint raised    # under `mu`
    cdef object keeper  # what must not be forgotten before it is taken back
    cdef bint _wait(self, int64_t deadline, int64_t slice_ns) except -1


@cython.final
cdef class Undelivered:
    cdef dict lots      # each by itself, in the order of failing
    cdef int64_t kept   # failures with their envelopes
    cdef int64_t bytes  # of these envelopes
    cdef Py_ssize_t many  # so many lots, and those without envelopes are looked through
    cdef int64_t rest   # failures without
    cdef int pid
    cdef str what       # they are called
    cdef void _own(self) noexcept
    cdef int _put(self, _Lot lot) except -1
    cdef bint _has_room(self, int64_t kept, int64_t size) noexcept
    cdef int _sweep(self) except -1
    cdef bint _take(self, _Lot lot) except -1
    cdef list _take_all(self, bint reachable, bint waited, int64_t *count)
    cdef int _log(self, bint reachable, bint waited, object error) except -1
    cdef object _error(self, list taken, int64_t count)
    cdef int _put_back(self, list taken, int64_t count) except -1


@cython.final
cdef class _Lot:
    cdef list failures   # (envelope, KbatchError or error code, persistence): the first
    cdef int64_t count   # of all
    cdef int64_t bytes   # of these envelopes
    cdef bint reachable  # its batch lives, and may be looked at
    cdef int waited      # so many are about to look at its batch


# -- functions

cdef bint settle_unsent(Outcome *outcome, Record *record, int error) noexcept nogil
cdef void settle_whole(Client *c, BatchState *batch, int64_t acked, int64_t failed) noexcept nogil
cdef void drop_records(BatchState *batch) noexcept nogil
cdef void drop_part(Part *part) noexcept nogil
cdef void release_idle(Client *c, bint long_ones=*) noexcept
cdef enum:
    WIRE_OF_USER = 4  # WIRE_CUSTOM of `wire.pxi`


cdef int64_t deadline_after(object timeout) except? -2
cdef void take_spares(Blocks *own) noexcept
cdef void begin_reader() noexcept
cdef void end_reader() noexcept
cdef Received *read_regular(const Raw *raw, int wire, Blocks *spare) noexcept nogil
cdef ReceivedEnvelope regular_envelope(Received *block, object topic, const char *value)
cdef ReceivedEnvelope read_irregular(Raw *raw, object topic, int wire, object custom)
cdef void answer_rebalance(rd_kafka_t *rk, int code, const rd_kafka_topic_partition_list_t *partitions) noexcept nogil
cdef int wire_number(str name, str others) except -1
cdef object transaction_error(Client *c, rd_kafka_error_t *error)
