cdef class Config:
    """librdkafka's configuration being built: sets and gets single properties, checked by librdkafka itself."""

    def __cinit__(self):
        self.conf = api.conf_new()
        self.hidden = set()

    def __dealloc__(self):
        if self.conf != NULL:
            api.conf_destroy(self.conf)

    def copy(self) -> Config:
        """Another one with the same properties."""
        cdef Config made = Config()
        api.conf_destroy(made.conf)
        made.conf = api.conf_dup(self.conf)
        made.hidden |= self.hidden
        return made

    def hide(self, str name) -> None:
        """From now on no error of a start shows the value of this property."""
        self.hidden.add(name)

    def without_hidden(self, str text) -> str:
        """What librdkafka says when it refuses to start, without the values that must not be shown."""
        for name in self.hidden:
            value = self.get(name)
            if value:
                # A long one may be cut off where librdkafka's buffer ends.
                quoted = re.escape(value[:64])
                text = re.sub(rf"(?<![\w.]){quoted}{r'(?![\w.])' if len(value) <= 64 else '(?s:.*)'}", "…", text)
        return text

    def set(self, str name, str value) -> None:
        """Raises ValueError with librdkafka's reason; LookupError if there is no such property.

        None is librdkafka's NULL: the default of a text, refused for what is no text.
        """
        cdef char errstr[512]
        cdef int result
        cdef bytes name_utf8 = name.encode(), value_utf8
        cdef const char *text = NULL
        if value is not None:
            value_utf8 = value.encode()
            text = value_utf8
        errstr[0] = 0
        result = api.conf_set(self.conf, name_utf8, text, errstr, sizeof(errstr))
        if result == RD_KAFKA_CONF_OK:
            return
        reason = errstr.decode("utf-8", "replace")
        if result == RD_KAFKA_CONF_UNKNOWN:
            raise LookupError(reason)
        raise ValueError(reason)

    def get(self, str name) -> str | None:
        cdef size_t size = 0
        cdef bytes encoded = name.encode()
        cdef bytearray value
        if api.conf_get(self.conf, encoded, NULL, &size) != RD_KAFKA_CONF_OK:
            return None
        value = bytearray(size)
        api.conf_get(self.conf, encoded, value, &size)
        return value.rstrip(b"\0").decode()
