"""The defects. Each is what somebody could have written, and would lose, repeat or change a message, or an answer."""

from typing import NamedTuple

MAP, BATCH, CLIENT, CORE, ACCUMULATOR = (
    f"native/{name}.pxi" for name in ("map", "batch", "client", "core", "accumulator")
)
AGENT, QUEUE = "_sending/_agent.py", "_sending/_queue.py"
TEXT, ENVELOPE = "native/text.pxi", "native/envelope.pxi"


class Mutant(NamedTuple):
    name: str
    file: str  # in src/kbatch
    old: str  # once in the file
    new: str
    tests: str = "tests/mock/test_send.py"  # the ones that run first; the whole suite follows


MUTANTS = (
    # -- delivery reports
    Mutant(
        "a failed delivery report counts as an acknowledgement",
        CLIENT,
        "if message.err == RD_KAFKA_RESP_ERR_NO_ERROR and outcome.persistence == RD_KAFKA_MSG_STATUS_PERSISTED:",
        "if message.err >= RD_KAFKA_RESP_ERR_NO_ERROR:",
        "tests/mock/test_contract.py",
    ),
    Mutant(
        "the first acknowledgement of an event is skipped",
        CLIENT,
        "        for i in range(n):\n            message = messages[i]",
        "        for i in range(1 if n > 1 else 0, n):\n            message = messages[i]",
    ),
    Mutant(
        "an offset is off by one",
        CLIENT,
        "outcome.offset = message.offset if",
        "outcome.offset = message.offset + 1 if",
    ),
    Mutant("the partition of a report is not kept", CLIENT, "outcome.partition = message.partition\n", "pass\n"),
    Mutant(
        "nothing was possibly persisted",
        CLIENT,
        "outcome.persistence = persistence(c, message, outcome.batch.started_ns)",
        "outcome.persistence = <uint8_t> (\n"
        "                RD_KAFKA_MSG_STATUS_NOT_PERSISTED if message.err else api.message_status(message))",
        "tests/mock/test_contract.py",
    ),
    Mutant(
        "what nobody has acknowledged counts as stored",
        CLIENT,
        "if message.err == RD_KAFKA_RESP_ERR_NO_ERROR and outcome.persistence == RD_KAFKA_MSG_STATUS_PERSISTED:",
        "if message.err == RD_KAFKA_RESP_ERR_NO_ERROR:",
    ),
    Mutant(
        "what is not yet due fails its batch for good",
        "_sender.py",
        "    if isinstance(error, SerializationError):\n        return",
        "    if not isinstance(error, (ProducerError, BatchInterrupted)):\n        return",
        "tests/unit/test_scheduled.py",
    ),
    Mutant(
        "what stands in line is not counted",
        CORE,
        "        KB_ADD64(&self.c.waiting, batch.state.count)\n",
        "        self.c.waiting = 0\n",
        "tests/mock/test_lifecycle.py",
    ),
    Mutant(
        "what is being mapped for an event loop is not waited for",
        "aio/_producer.py",
        "            self._turns.wait(last, timeout)\n            left",
        "            left",
        "tests/mock/test_aio.py",
    ),
    Mutant(
        "no acknowledgements may be configured",
        "_config.py",
        'if native.get("acks") == "0":',
        'if native.get("acks") == "00":',
        "tests/unit/test_config.py",
    ),
    Mutant(
        "what librdkafka calls not persisted is raised by a transaction of unknown end",
        CORE,
        "                if not unknown and outcome.state == FAILED:\n"
        "                    outcome.persistence = RD_KAFKA_MSG_STATUS_NOT_PERSISTED",
        "                if outcome.state == FAILED:\n                    outcome.persistence = (\n"
        "                        RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED\n"
        "                        if unknown else RD_KAFKA_MSG_STATUS_NOT_PERSISTED)",
        "tests/mock/test_transactions.py",
    ),
    Mutant(
        "librdkafka's status is believed after a former leader's answer",
        CLIENT,
        "KB_LOAD64(&c.doubt_ns) >= started_ns",
        "False",
        "tests/mock/test_lifecycle.py",
    ),
    Mutant(
        "what is under way at a fatal error is given up at once",
        CLIENT,
        "if c.life == FINISHING or now > c.fatal_since_ns + c.socket_timeout_ns + FATAL_GRACE:",
        "if True:",
        "tests/mock/test_lifecycle.py",
    ),
    Mutant(
        "a batch is done one envelope early",
        CLIENT,
        "if outcome.batch == run and own == topic:\n                run_count += 1",
        "if outcome.batch == run and own == topic:\n                run_count += 2 if run_count == 1 else 1",
    ),
    # -- headers
    Mutant(
        "a header of the encoder's goes with the next envelope, too",
        MAP,
        "        self.extra_headers = None\n",
        "        pass\n",
        "tests/mock/test_serializers.py",
    ),
    Mutant(
        "a user's header may take the name of an attribute that the format writes",
        MAP,
        "self.wire, self.reserved = WIRE_CLOUDEVENTS, CLOUDEVENTS_HEADERS",
        "self.wire, self.reserved = WIRE_CLOUDEVENTS, KBATCH_HEADERS",
        "tests/unit/test_vectors.py",
    ),
    # -- enqueueing
    Mutant(
        "a record is dropped when librdkafka's queue is full",
        CLIENT,
        "            batch.queue_full, batch.full_at = 1, seen\n",
        "            batch.queue_full, batch.full_at = 1, seen\n            i += 1\n",
        "tests/mock/test_line.py",
    ),
    Mutant(
        "detached batches of a topic do not keep their order",
        CLIENT,
        "            batch.behind += 1\n",
        "            pass\n",
        "tests/mock/test_line.py tests/mock/test_detached.py",
    ),
    Mutant(
        "back-pressure is not applied",
        CLIENT,
        "SHARE * (whole - used) - own) // (SHARE + 1), always - own)",
        "SHARE * (1000 * whole - used) - own) // (SHARE + 1), always - own)",
        "tests/mock/test_line.py tests/mock/test_lifecycle.py",
    ),
    Mutant(
        "a batch without room keeps the others from their turn",
        CLIENT,
        "    while batch != NULL and not (batch.ready and has_room(c, batch)):\n        batch = batch.next_in_line\n",
        "    if not (batch.ready and has_room(c, batch)):\n        batch = NULL\n",
        "tests/mock/test_line.py",
    ),
    Mutant(
        "a long batch keeps its turn",
        CLIENT,
        "if i != batch.next and others_stand_in_line(c) and (",
        "if i < 0 and (",
        "tests/mock/test_line.py",
    ),
    Mutant(
        "a long batch is mapped in one go",
        CORE,
        "            offer_gil(&offered_ns)\n\n    def begin_mapping",
        "            pass\n\n    def begin_mapping",
        "tests/mock/test_line.py",
    ),
    Mutant(
        "one topic takes all of the room",
        CLIENT,
        "SHARE * (whole - used) - own) // (SHARE + 1), always - own)",
        "whole - used), always - own)",
        "tests/mock/test_line.py",
    ),
    Mutant(
        "the time in line does not count in the longest time",
        "_base_producer.py",
        "2 * parsed.delivery_timeout_s",
        "parsed.delivery_timeout_s",
        "tests/unit/test_config.py tests/mock/test_line.py",
    ),
    Mutant(
        "a record's last header is dropped",
        CLIENT,
        "    while h != end:\n        if h.value_len >= VALUE_NULL:",
        "    while h + 1 < end:\n        if h.value_len >= VALUE_NULL:",
    ),
    Mutant(
        "a header of null becomes an empty one",
        CLIENT,
        "h.value, h.value_len if h.value != NULL else 0)",
        "h.value if h.value != NULL else h.name, h.value_len if h.value != NULL else 0)",
    ),
    Mutant(
        "the headers of a refused record leak",
        CLIENT,
        "                drop_headers(vus[6].u.headers)  # still ours",
        "                pass  # still ours",
        "tests/mock/test_send.py -k leak",
    ),
    Mutant(
        "an expired envelope is sent",
        CLIENT,
        "        if record.flags:\n            failed += settle_unsent(",
        "        if record.flags & RECORD_REJECTED:\n            failed += settle_unsent(",
    ),
    Mutant(
        "a rejected envelope is not counted as failed",
        CLIENT,
        "            failed += settle_unsent(&batch.outcomes[i], record, RD_KAFKA_RESP_ERR_NO_ERROR)",
        "            settle_unsent(&batch.outcomes[i], record, RD_KAFKA_RESP_ERR_NO_ERROR)",
        "tests/mock/test_rejected.py",
    ),
    Mutant(
        "a rejected envelope aborts its transaction",
        CLIENT,
        "        if refused:\n",
        "        if failed:\n",
        "tests/mock/test_rejected.py",
    ),
    Mutant(
        "a rejected envelope is told what became of the others",
        CLIENT,
        "    elif record.flags & RECORD_REJECTED:\n",
        "    elif False:\n",
        "tests/mock/test_rejected.py",
    ),
    Mutant(
        "a rejected envelope may have been stored",
        CORE,
        "                if outcome.error == RD_KAFKA_RESP_ERR__VALUE_SERIALIZATION:\n",
        "                if False:\n",
        "tests/mock/test_rejected.py",
    ),
    Mutant(
        "what a rejected envelope kept is given back while others point at it",
        MAP,
        "        self.last_type = None  # its name may be among the following\n",
        "",
        "tests/unit/test_rejected.py",
    ),
    Mutant(
        "what a rejected envelope took of the batch's memory stays",
        MAP,
        "        arena_rewind(self.client, &state.bodies, bodies, bodies_used)\n",
        "",
        "tests/unit/test_rejected.py",
    ),
    Mutant(
        "two mappings share the encoder's buffer",
        MAP,
        "        self.spare = None\n        if scratch is None:\n            return",
        "        if scratch is None:\n            self.spare = Scratch.make(self.message_max_bytes)\n"
        "            return",
        "tests/mock/test_foreign_code.py",
    ),
    Mutant(
        "the encoder's buffer is kept after a giant",
        MAP,
        "        if scratch._is_worth_keeping():\n",
        "        if True:\n",
        "tests/mock/test_foreign_code.py",
    ),
    Mutant(
        "the encoder's buffer grows with the largest message, sent or not",
        MAP,
        "        if length >= self.largest_base // 4:\n",
        "        if False:\n",
        "tests/mock/test_foreign_code.py",
    ),
    Mutant(
        "a negative length is stored",
        MAP,
        "        if length < 0:\n            raise self._error(\n",
        "        if False:\n            raise self._error(\n",
        "tests/mock/test_foreign_code.py",
    ),
    Mutant(
        "an exception that has no text is shown all the same",
        "_errors.py",
        "    except BaseException:\n        return type_name(error)\n",
        "    except ArithmeticError:\n        return type_name(error)\n",
        "tests/unit/test_foreign_errors.py",
    ),
    Mutant(
        "an odd exception of one envelope ends the whole batch",
        MAP,
        "            self.rejected.append((self.index, self._as_rejection(error)))\n",
        "            if not isinstance(error, (SerializationError, MemoryError)):\n                raise\n"
        "            self.rejected.append((self.index, self._as_rejection(error)))\n",
        "tests/unit/test_foreign_errors.py",
    ),
    Mutant(
        "what others took of the batch's memory is given back with a rejected envelope",
        BATCH,
        "        while oldest.next != block:\n            oldest = oldest.next\n        oldest.next = NULL\n",
        "        while oldest.next != NULL:\n            oldest = oldest.next\n",
        "tests/unit/test_rejected.py",
    ),
    Mutant(
        "an expired envelope stays counted as waiting",
        CLIENT,
        "RD_KAFKA_RESP_ERR_NO_ERROR)\n            KB_ADD64(&c.waiting, -1)\n",
        "RD_KAFKA_RESP_ERR_NO_ERROR)\n",
    ),
    Mutant(
        "a cancelled batch is enqueued to its end",
        CLIENT,
        "if KB_LOAD32(&c.shut) or KB_LOAD32(&batch.abandoned):",
        "if KB_LOAD32(&c.shut):",
        "tests/mock/test_aio.py",
    ),
    # -- memory
    Mutant(
        "bodies are given back when all is enqueued, not when all is reported",
        CLIENT,
        "    drop_records(batch)\n    kb_mutex_lock(&c.mu)\n    leave_line(c, batch)",
        "    drop_records(batch)\n    arena_give(c, &batch.bodies)\n    kb_mutex_lock(&c.mu)\n    leave_line(c, batch)",
    ),
    Mutant(
        "what an encoder returned is not kept",
        MAP,
        "            self.kept.append(encoded)\n            return self._borrow",
        "            return self._borrow",
    ),
    Mutant(
        "a batch forgets to give back its pin",
        CORE,
        "        KB_ADD32(&_pinned, -1)\n",
        "        pass\n",
    ),
    # -- single envelopes
    Mutant(
        "the room of an envelope is not given back",
        ACCUMULATOR,
        "        self.held -= count\n",
        "        self.held -= count - 1\n",
        "tests/mock/test_sender_leaks.py",
    ),
    Mutant(
        "who waited for room and left is taken all the same",
        ACCUMULATOR,
        "            if waiter.gone:\n",
        "            if waiter.gone and waiter.bytes < 0:\n",
        "tests/unit/test_batch_formation.py",
    ),
    Mutant(
        "the buffer has no bound",
        ACCUMULATOR,
        "        if len(self.waiters) > self.gone or not self._has_room(size):\n",
        "        if len(self.waiters) > self.gone:\n",
        "tests/mock/test_sender_leaks.py",
    ),
    Mutant(
        "the age of a batch begins with its last envelope",
        ACCUMULATOR,
        "                batch.envelopes.append(envelope)\n",
        "                batch.envelopes.append(envelope)\n"
        "                batch.due_ns = kb_now_ns() + self.timeout_ns\n",
        "tests/unit/test_sending_agent.py",
    ),
    Mutant(
        "a sender that is forgotten loses what it has just taken",
        ACCUMULATOR,
        "            self.signal.keeper = self  #",
        "            pass  #",
        "tests/unit/test_starvation.py",
    ),
    Mutant(
        "one envelope that is refused again and again opens the circuit",
        AGENT,
        "entry.setbacks == 1 or",
        "entry.setbacks >= 1 or",
        "tests/unit/test_starvation.py",
    ),
    Mutant(
        "the trial of the circuit is always what failed before",
        AGENT,
        'verdict != "succeeded" and flight.entries is not None',
        "False",
        "tests/unit/test_starvation.py",
    ),
    Mutant(
        "what may be stored is told as not stored if its last attempt failed for sure",
        QUEUE,
        "if entry.possibly_persisted and not",
        "if not entry.seq < 0 and entry.attempts < 0 and not",
        "tests/unit/test_starvation.py",
    ),
    Mutant(
        "an envelope has the age of those that came with it",
        ACCUMULATOR,
        "        return self.newest_ns / 1e9\n",
        "        return self.begun_ns / 1e9\n",
        "tests/unit/test_batch_formation.py",
    ),
    Mutant(
        "a loop that is woken resolves one of those that came",
        "native/calls.pxi",
        "            over = waker is last\n",
        "            over = True\n",
        "tests/unit/test_loop.py",
    ),
    Mutant(
        "what waits is forgotten when closing begins while the thread is at work",
        AGENT,
        "        if giving_up and not queue.in_flight:\n",
        "        if self._giving_up and not queue.in_flight:\n",
        "tests/unit/test_sending_agent.py",
    ),
    Mutant(
        "an envelope that cannot be mapped is told the batch's error",
        AGENT,
        "(index, reasons.get(index, error))",
        "(index, error)",
        "tests/mock/test_sending.py",
    ),
    Mutant(
        "an acknowledged envelope keeps its room",
        AGENT,
        "            self._buffer._give_back(done, flight.bytes - failed)\n",
        "            self._buffer._give_back(done - (done > 2), flight.bytes - failed)\n",
        "tests/mock/test_sender_leaks.py",
    ),
    Mutant(
        "the outcomes of a batch in memory are off by one partition",
        CORE,
        "outcome.partition, outcome.offset = code, persistence, partition, offset\n",
        "outcome.partition, outcome.offset = code, persistence, partition + 1, offset\n",
        "tests/mock/test_memory_producer.py",
    ),
    Mutant(
        "a batch in memory stays counted as in flight",
        CORE,
        "        KB_ADD64(&c.in_flight, -sent)\n",
        "        pass\n",
        "tests/unit/test_memory_producer.py",
    ),
    Mutant(
        "a topic without leaders can be written to",
        CORE,
        "            return what_hinders(metadata, name_p)\n",
        "            return None\n",
        "tests/mock/test_sending.py",
    ),
    # -- answers
    Mutant(
        "a callback comes twice",
        CORE,
        "                self.callback_thread._append_surely(job)\n            batch",
        "                self.callback_thread._append_surely(Job.make((<Job> job).function, (<Job> job).arguments))\n"
        "                self.callback_thread._append_surely(job)\n            batch",
        "tests/mock/test_lifecycle.py",
    ),
    Mutant(
        "the second event loop that waits for a batch is not woken",
        CORE,
        "            for waker in wakers:\n                self._wake(waker)",
        "            for waker in wakers[:1]:\n                self._wake(waker)",
        "tests/mock/test_aio.py",
    ),
    Mutant(
        "a batch whose first outcome is a success is successful",
        "_report.py",
        "        if self.ok:\n            return None\n",
        "        if self.ok or 0 not in self.errors:\n            return None\n",
        "tests/mock/test_contract.py",
    ),
    Mutant(
        "one time-out among other failures is a time-out",
        "_report.py",
        "if codes <= TIMEOUT_CODES:",
        "if codes & TIMEOUT_CODES:",
        "tests/unit/test_errors.py tests/mock/test_contract.py",
    ),
    Mutant(
        "an interrupted sender gives no callback",
        "native/answer.pxi",
        "            if left == LEFT:\n                raise\n            method",
        "            if left != SETTLED:\n                raise\n            method",
        "tests/mock/test_lifecycle.py",
    ),
    Mutant(
        "a child of a fork may use the producer",
        CORE,
        "        if self.c.pid and self.c.pid != _this_pid:\n            raise ForkError(",
        "        if self.c.pid < 0:\n            raise ForkError(",
        "tests/mock/test_lifecycle.py",
    ),
    # -- mapping
    Mutant(
        "the last envelope of a batch is not mapped when it fails",
        MAP,
        "            self._map_one(<object> PyTuple_GET_ITEM(<PyObject *> envelopes, i), &self.state.records[i])\n",
        "            try:\n"
        "                self._map_one(<object> PyTuple_GET_ITEM(<PyObject *> envelopes, i), &self.state.records[i])\n"
        "            except SerializationError:\n"
        "                if i + 1 < self.state.count or i == 0:\n"
        "                    raise\n"
        "                self.state.count -= 1\n",
    ),
    Mutant(
        "a slice of mapping begins one envelope late",
        MAP,
        "        cdef Py_ssize_t i = self.index + 1\n",
        "        cdef Py_ssize_t i = self.index + 1 + (self.index > 0)\n",
        "tests/mock/test_aio.py",
    ),
    Mutant(
        "a tombstone is an empty message",
        MAP,
        "            record.value = NULL\n            record.value_len = 0\n            return 0\n        if self.",
        "            record.value = _NOTHING\n            record.value_len = 0\n            return 0\n        if self.",
    ),
    Mutant(
        "a buffer that may change is borrowed",
        MAP,
        "            self._store(record, <const char *> view.buf, view.len)\n",
        "            record.value, record.value_len = <const char *> view.buf, view.len\n",
    ),
    Mutant(
        "a record may be one byte larger than the limit",
        MAP,
        "        if size > self.mapper.message_max_bytes or",
        "        if size > self.mapper.message_max_bytes + 1 or",
    ),
    Mutant(
        "an envelope's own time is not its record's",
        MAP,
        "e._timestamp if e._timestamp else self.now_us // 1000",
        "self.now_us // 1000",
    ),
    Mutant("an envelope's partition is not heeded", MAP, "record.partition = e._partition", "record.partition = -1"),
    Mutant(
        "a batch's topic wins over an envelope's",
        MAP,
        "        if topic is None:\n            topic = self.default_topic\n        if topic is not",
        "        if self.default_topic is not None:\n            topic = self.default_topic\n        if topic is not",
    ),
    Mutant(
        "microseconds lose a digit",
        TEXT,
        "    _write_digits(out + 20, micros, 6)",
        "    _write_digits(out + 20, micros // 10 * 10, 6)",
        "tests/unit/test_vectors.py",
    ),
    Mutant(
        "two ids of one moment are in no order",
        TEXT,
        "        stamp = _uuid_last + 1\n    if _entropy_left",
        "        stamp = _uuid_last\n    if _entropy_left",
        "tests/unit/test_envelope.py",
    ),
    # -- outcomes that are not known, and what interrupts
    Mutant(
        "no sender replaces a producer whose last transaction has no known end",
        "_errors.py",
        "return isinstance(error, (ProducerFatalError, TransactionUnknownError))",
        "return isinstance(error, ProducerFatalError)",
        "tests/mock/test_transactions.py",
    ),
    Mutant(
        "a producer whose last transaction has no known end takes a batch and refuses it",
        CORE,
        "            if refusal is not None:\n                look_for_fatal(c)\n                self._check_fatal()\n"
        "                raise refusal\n            self._take(batch, deadline_after(timeout), waker, None)\n",
        "            self._take(batch, deadline_after(timeout), waker, None)\n            if refusal is not None:\n"
        "                look_for_fatal(c)\n                self._check_fatal()\n                raise refusal\n",
        "tests/mock/test_transactions.py",
    ),
    # -- what is taken, and what it is sent as
    Mutant(
        "a half-made batch is freed as a whole one",
        CORE,
        "        if self.state.client == NULL:\n            return  # __cinit__ has refused its arguments\n",
        "",
        "tests/unit/test_half_made.py",
    ),
    Mutant(
        "a batched sender takes what bytes() makes of a body",
        ACCUMULATOR,
        "data = copied(envelope._body)",
        "data = bytes(envelope._body)",
        "tests/unit/test_taken_bodies.py",
    ),
    Mutant(
        "more headers than readers take are sent",
        MAP,
        "if count > MOST_HEADERS:",
        "if count > INT32_MAX:",
        "tests/unit/test_taken_bodies.py",
    ),
    Mutant(
        "a null value is sent on as JSON",
        MAP,
        "if envelope._kind == BODY_TOMBSTONE or envelope._kind == BODY_NULL:",
        "if envelope._kind == BODY_TOMBSTONE:",
        "tests/unit/test_taken_bodies.py",
    ),
    # -- exceptions between two lines
    Mutant(
        "a batch that Ctrl-C has left in flight has no answer",
        "native/answer.pxi",
        "                    pending._listen(None, self._give_settled)\n",
        "                    pass\n",
        "tests/mock/test_injection.py",
    ),
    Mutant(
        "a trial that was interrupted is never over",
        "native/answer.pxi",
        "        return self.current is not None and self.current() is not None\n",
        "        return self.current is not None\n",
        "tests/unit/test_circuit.py",
    ),
    Mutant(
        "a callback needs memory when its batch is done",
        CORE,
        "            dispatcher.callback_thread._start()  # now: the answer itself needs no memory\n",
        "            pass\n",
        "tests/mock/test_no_memory.py",
    ),
    Mutant(
        "a loop that could not be woken for want of memory is not woken",
        "native/calls.pxi",
        "            return False\n        except MemoryError:\n            nap()\n",
        "            return False\n        except MemoryError:\n            return True\n",
        "tests/unit/test_loop.py",
    ),
    Mutant(
        "a turn that is forgotten is not left",
        "native/calls.pxi",
        "    def __del__(self):\n        self._leave()\n",
        "",
        "tests/unit/test_loop.py",
    ),
    Mutant(
        "what expires after it may have been stored is told to nobody",
        "_sending/_agent.py",
        "        queue.settled(flight, failures + late, now, again=again)\n",
        "        late = []\n        queue.settled(flight, failures, now, again=again)\n",
        "tests/unit/test_starvation.py",
    ),
    Mutant(
        "brokers that do not answer are never told of",
        "_sending/_agent.py",
        "            due.append(stall_at - now)\n",
        "            pass\n",
        "tests/unit/test_starvation.py",
    ),
    # -- never silent
    Mutant(
        "what a sender gave up is told to nobody",
        "native/undelivered.pxi",
        "        lot.count = 1\n        self._put(lot)\n",
        "        lot.count = 1\n",
        "tests/unit/test_never_silent.py",
    ),
    Mutant(
        "a submitted batch that nobody looks at fails in silence",
        CORE,
        "        if KB_LOAD32(&self.state.failing) and not self.looked:\n",
        "        if KB_LOAD32(&self.state.failing) and not self.looked and self.waited:\n",
        "tests/unit/test_never_silent.py",
    ),
    Mutant(
        "what was raised as undelivered is raised again",
        "native/undelivered.pxi",
        "        if self.lots.pop(lot, None) is None:\n",
        "        if self.lots.get(lot) is None:\n",
        "tests/unit/test_never_silent.py",
    ),
    Mutant(
        "what was looked at is raised all the same",
        CORE,
        "                self.core.undelivered._take(lot)\n",
        "                pass\n",
        "tests/unit/test_never_silent.py",
    ),
    # -- the bytes of the buffer
    Mutant(
        "the buffer's bytes have no bound",
        ACCUMULATOR,
        "        if self.held and size > self.max_buffered_bytes - self.held_bytes:\n",
        "        if self.held < 0:\n",
        "tests/unit/test_buffered_bytes.py",
    ),
    Mutant(
        "a message counts little before the first was encoded",
        ACCUMULATOR,
        "        if self.is_guess:\n            self.message_bytes = max(seen, 1)\n",
        "        if self.is_guess:\n            seen = self.message_bytes = 256\n",
        "tests/unit/test_buffered_bytes.py",
    ),
    Mutant(
        "what is given up keeps its bytes",
        AGENT,
        "self._buffer._give_back(1, end.entry.size)",
        "self._buffer._give_back(1, 0)",
        "tests/unit/test_buffered_bytes.py",
    ),
    Mutant(
        "what expires while its batch waits for room is sent",
        CLIENT,
        "                wall_us = kb_wall_ns() // 1000\n",
        "                pass\n",
        "tests/mock/test_line.py",
    ),
    # -- the command line
    Mutant(
        "what is told as rejected is not in its file yet",
        "cli/_rejects.py",
        "                self._file.flush()\n            except",
        "                pass\n            except",
        "tests/mock/test_cli.py",
    ),
    Mutant(
        "rejects can be read by whom the input is hidden from",
        "cli/_rejects.py",
        "self._mode &= source.mode | stat.S_IWUSR",
        "self._mode &= 0o666",
        "tests/mock/test_cli.py",
    ),
    Mutant(
        "a hangup loses what was rejected",
        "cli/_interrupt.py",
        "numbers.append(signal.SIGHUP)",
        "pass",
        "tests/mock/test_cli.py",
    ),
    Mutant(
        "a line's encoding is guessed",
        "cli/_json_line.py",
        "json.loads(line.decode(), ",
        "json.loads(line, ",
        "tests/mock/test_cli.py",
    ),
    Mutant(
        "a full standard error ends the command",
        "cli/_screen.py",
        "        except OSError as error:\n            self.error = self.error or error\n",
        "        except BrokenPipeError as error:\n            self.error = self.error or error\n",
        "tests/mock/test_cli.py",
    ),
    Mutant(
        "text from outside is written as it is",
        "_text.py",
        "    if text.isprintable():",
        "    if text:",
        "tests/unit/test_text.py",
    ),
)
