cdef class Dispatcher:
    """The one thread that takes the GIL for what happened without it.

    It wakes event loops itself and hands user callbacks to the callback thread, so that a slow callback delays
    neither. ``on_*`` are called here with plain values and must not block; the Python layer turns them into the
    user's callbacks.
    """

    def __init__(self, CallbackThread callback_thread not None, other_threads=(), *, on_error=None, on_stats=None,
                 on_log=None, on_oauth=None, throttle_cb=None):
        self.callback_thread = callback_thread
        self.other_threads = other_threads
        self.on_error, self.on_stats, self.on_log, self.on_oauth = on_error, on_stats, on_log, on_oauth
        self.throttle_cb = throttle_cb
        self.events = (
            (RD_KAFKA_EVENT_ERROR if on_error is not None else 0)
            | (RD_KAFKA_EVENT_STATS if on_stats is not None else 0)
            | (RD_KAFKA_EVENT_LOG if on_log is not None else 0)
            | (RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH if on_oauth is not None else 0))

    def __dealloc__(self):
        if self.c != NULL:
            client_drop(self.c)

    def _attach(self, Core core not None) -> None:
        self.thread = threading.Thread(target=self._run, name="kbatch-dispatcher", daemon=True)
        self.c = core.c
        self.c.dispatcher_stop = 0
        KB_ADD32(&self.c.references, 1)
        try:
            self.thread.start()
        except BaseException:
            # Ctrl-C may come after the thread has begun: then it ends by _detach. If it begins after this, by _run.
            if self.thread.ident is None:
                self.thread = None
                client_drop(self.c)
                self.c = NULL
            raise

    def _detach(self) -> None:
        if self.c == NULL:
            return
        kb_mutex_lock(&self.c.mu)
        self.c.dispatcher_stop = 1
        kb_cond_signal(&self.c.dispatcher_cond)
        kb_mutex_unlock(&self.c.mu)
        try:
            self.thread.join()
        except RuntimeError:
            pass  # interrupted while it was started: `_run` sees the end
        client_drop(self.c)
        self.c = NULL

    def _join(self, timeout) -> None:
        """Waits for the thread and the callback thread to end, unless the caller comes from one of them."""
        cdef int64_t deadline = deadline_after(timeout)
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout)
        self.callback_thread.join(None if timeout is None else max(0.0, (deadline - kb_now_ns()) / 1e9))

    def _run(self) -> None:
        cdef Client *c = self.c
        cdef BatchState *batch
        cdef BatchState *answered = NULL
        cdef Notice *notice
        cdef bint stop = False
        if c == NULL or self.thread is not threading.current_thread():
            return
        while not stop:
            with nogil:
                kb_mutex_lock(&c.mu)
                while not (c.news_first != NULL or c.notice_first != NULL or c.dispatcher_nudge or c.dispatcher_stop):
                    kb_cond_wait(&c.dispatcher_cond, &c.mu)
                batch = c.news_first
                c.news_first = c.news_last = NULL
                notice = c.notice_first
                c.notice_first = c.notice_last = NULL
                stop = c.dispatcher_stop and batch == NULL and notice == NULL
                if notice != NULL:
                    c.entered += 1  # librdkafka must outlive its events
                kb_mutex_unlock(&c.mu)
                KB_ADD32(&_wanting, 1)
            KB_ADD32(&_wanting, -1)
            while batch != NULL:
                batch = self._answer(batch, &answered)
            while answered != NULL:
                # This may give back the last reference that kept the Core; the state is not touched after it.
                batch = answered
                answered = batch.next_news
                release_owner(batch)
            if notice != NULL:
                self._pass_on(notice)
                kb_mutex_lock(&c.mu)
                leave(c)
                kb_mutex_unlock(&c.mu)
            release_idle(c)
        for thread in (self.callback_thread, *self.other_threads):
            thread.stop()

    cdef BatchState *_answer(self, BatchState *state, BatchState **answered) noexcept:
        # Tells what is new about a batch; returns the next one that has news. To give a batch back takes long, so those
        # that are done are collected: nobody else looks at them any more.
        cdef Batch batch = <Batch> state.owner
        cdef BatchState *following
        cdef bint done
        kb_mutex_lock(&self.c.mu)
        following = state.next_news
        state.has_news = 0  # if it is not done yet, it will be posted again
        done = state.done
        kb_mutex_unlock(&self.c.mu)
        if batch.enqueued_waker is not None:
            waker, batch.enqueued_waker = batch.enqueued_waker, None
            self._wake(waker)
        if done:
            self._answer_done(batch)
            state.next_news = answered[0]
            answered[0] = state
        return following

    cdef void _answer_done(self, Batch batch) noexcept:
        # Loops first: they wait for a batch, callbacks are only told.
        cdef list wakers = batch.wakers
        cdef list callbacks = batch.callbacks
        batch.wakers = None
        if wakers is not None:
            batch.waited += <int> len(wakers)
            for waker in wakers:
                self._wake(waker)
        if callbacks is not None:
            for job in callbacks:  # they may grow meanwhile: who comes later must not overtake
                self.callback_thread._append_surely(job)
            batch.callbacks = None

    cdef void _wake(self, object waker) noexcept:
        while True:
            try:
                waker()
                return
            except MemoryError:  # who waits would wait for ever
                nap()
            except Exception:
                log_raised("could not wake an event loop")
                return

    cdef void _pass_on(self, Notice *notice) noexcept:
        cdef Notice *following
        while notice != NULL:
            following = notice.next
            try:
                self._pass_one(notice)
            except Exception:
                if notice.event != NULL:
                    drop_event(self.c, notice.event)
                    notice.event = NULL
                log_raised("could not pass on an event of librdkafka")
            free_notice(notice)
            notice = following

    cdef int _pass_one(self, Notice *notice) except -1:
        cdef rd_kafka_event_t *event = notice.event
        cdef const char *fac
        cdef const char *text
        cdef char errstr[512]
        cdef int kind, level, code
        if event == NULL:
            self.throttle_cb(notice.broker_name.decode("utf-8", "replace"), notice.broker_id, notice.throttle_ms)
            return 0
        kind = api.event_type(event)
        if kind == RD_KAFKA_EVENT_ERROR:
            code, text = api.event_error(event), api.event_error_string(event)
            if code == RD_KAFKA_RESP_ERR__FATAL:  # its cause, as confluent-kafka tells it
                errstr[0] = 0
                code, text = api.fatal_error(self.c.rk, errstr, sizeof(errstr)), errstr
            self.on_error(code, text.decode("utf-8", "replace"), bool(api.event_error_is_fatal(event)))
        elif kind == RD_KAFKA_EVENT_STATS:
            self.on_stats(api.event_stats(event).decode())
        elif kind == RD_KAFKA_EVENT_LOG:
            if api.event_log(event, &fac, &text, &level) == 0:
                self.on_log(level, fac.decode("utf-8", "replace"), api.name(self.c.rk).decode("utf-8", "replace"),
                            text.decode("utf-8", "replace"))
        elif kind == RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH:
            text = api.event_config_string(event)
            self.on_oauth(None if text == NULL else text.decode())  # as confluent-kafka: None without the key
        return 0
