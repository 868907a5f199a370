# Tokens for SASL OAUTHBEARER.

cdef bint renew_tokens(rd_kafka_t *rk) noexcept nogil:
    # The tokens that librdkafka makes itself, on a thread of its own. False if there is none.
    cdef rd_kafka_error_t *error = api.sasl_background_callbacks_enable(rk)
    if error == NULL:
        return True
    api.error_destroy(error)
    return False


def set_oauth_token(Core core not None, answer) -> None:
    """Hands over what an ``oauth_cb`` returned, in the forms that confluent-kafka takes.

    ``(token, expiry in seconds since 1970[, principal[, extensions]])``. Raises what is wrong with it, without
    showing it.
    """
    cdef char errstr[512]
    cdef const char **pointers
    cdef int code
    cdef int64_t lifetime_ms
    if not isinstance(answer, tuple) or not 2 <= len(answer) <= 4:
        found = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type_name(answer)
        raise TypeError(
            f"oauth_cb must return (token, expiry in seconds since 1970[, principal[, extensions]]), not {found}")
    cdef bytes token = oauth_text("token", answer[0])
    cdef double expiry = answer[1]
    cdef bytes principal = oauth_text("principal", answer[2]) if len(answer) > 2 else b""
    extensions = answer[3] if len(answer) > 3 else {}
    if not isinstance(extensions, dict):
        raise TypeError(f"oauth_cb's extensions must be a dict, not {type_name(extensions)}")
    cdef list flat = []
    for name, value in extensions.items():
        flat.append(oauth_text("extension", name))
        flat.append(oauth_text("extension", value))
    if not 0 <= expiry < 1e12:  # what is no number of milliseconds must not be cast to one
        raise ValueError(f"oauth_cb's expiry must be seconds since 1970, not {expiry}")
    lifetime_ms = <int64_t> (expiry * 1000)
    pointers = <const char **> kb_malloc((len(flat) + 1) * sizeof(char *))
    if pointers == NULL:
        raise MemoryError()
    try:
        for i in range(len(flat)):
            pointers[i] = flat[i]
        core._enter(FINISHING)  # what is flushed while closing may need a token
        code = api.oauthbearer_set_token(core.c.rk, token, lifetime_ms, principal,
                                         pointers, len(flat), errstr, sizeof(errstr))
        core._leave()
    finally:
        kb_free(pointers)
    if code:
        reason = errstr.decode("utf-8", "replace")
        # librdkafka quotes an extension at the end.
        raise ValueError(reason.partition(": ")[0] if flat else reason)


cdef int set_oauth_failure(Core core, str reason) except -1:
    cdef bytes text = reason.encode()
    core._enter(FINISHING)
    api.oauthbearer_set_token_failure(core.c.rk, text)
    core._leave()
    return 0


cdef bytes oauth_text(str what, text):
    cdef bytes encoded
    if not isinstance(text, str):
        raise TypeError(f"oauth_cb's {what} must be str, not {type_name(text)}")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = None
    # Outside of the handler: its error holds the text.
    if encoded is None or b"\0" in encoded:
        raise ValueError(f"oauth_cb's {what} is not UTF-8 text without a NUL character")
    return encoded


cdef class TokenRefresh:
    """A call of ``oauth_cb`` whose token goes to librdkafka.

    Here rather than in Python: a traceback with local variables must show neither the token nor the configuration.
    """

    cdef readonly object user_callback
    cdef object find_core
    cdef str config

    def __init__(self, oauth_cb, str config, find_core):
        self.user_callback, self.config, self.find_core = oauth_cb, config, find_core

    def __call__(self) -> None:
        cdef Core core = self.find_core()
        if core is None:
            return
        try:
            set_oauth_token(core, self.user_callback(self.config))
        except ProducerClosedError:
            return  # nobody needs it any more
        except BaseException as error:
            # Also for SystemExit: librdkafka does not ask again before it has an answer.
            try:
                set_oauth_failure(core, f"oauth_cb failed: {type_name(error)}")
            except ProducerClosedError:
                pass
            raise
