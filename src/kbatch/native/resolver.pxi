# What looks up the brokers' names for librdkafka. getaddrinfo of glibc takes a lock that nobody gives back in a child
# that is forked meanwhile: there each later look-up, by any code, would hang. So a fork waits until no name is being
# looked up; but not for long, where name servers do not answer.

cdef enum:
    FORK_WAITS_NS = 1000000000

cdef kb_mutex _resolver_mu
cdef kb_cond _resolver_cond
cdef int32_t _resolving = 0
cdef int32_t _forking = 0


cdef int resolve(const char *node, const char *service, const addrinfo *hints, addrinfo **found,
                 void *opaque) noexcept nogil:
    """librdkafka's `resolve_cb`; without a name it gives back what an earlier call has found."""
    global _resolving
    cdef int error
    if node == NULL and service == NULL:
        kb_resolved_free(found[0])
        return 0
    kb_mutex_lock(&_resolver_mu)
    while _forking:
        kb_cond_wait(&_resolver_cond, &_resolver_mu)
    _resolving += 1
    kb_mutex_unlock(&_resolver_mu)
    error = kb_resolve(node, service, hints, found)
    kb_mutex_lock(&_resolver_mu)
    _resolving -= 1
    kb_cond_broadcast(&_resolver_cond)
    kb_mutex_unlock(&_resolver_mu)
    return error


cdef void _before_fork() noexcept nogil:
    global _forking
    cdef int64_t end = kb_now_ns() + FORK_WAITS_NS
    kb_mutex_lock(&_resolver_mu)  # until the fork is over
    _forking += 1
    while _resolving and kb_now_ns() < end:
        kb_cond_wait_until(&_resolver_cond, &_resolver_mu, end)


cdef void _after_fork_in_parent() noexcept nogil:
    global _forking
    _forking -= 1
    kb_cond_broadcast(&_resolver_cond)
    kb_mutex_unlock(&_resolver_mu)


cdef void _after_fork_in_child() noexcept nogil:
    global _forking, _resolving
    _forking = _resolving = 0
    kb_mutex_init(&_resolver_mu)
    kb_cond_init(&_resolver_cond)


kb_mutex_init(&_resolver_mu)
kb_cond_init(&_resolver_cond)
kb_on_fork(_before_fork, _after_fork_in_parent, _after_fork_in_child)
