# Declarations of platform.h: memory, locks, conditions, threads, clocks, atomics.

cdef extern from "platform.h" nogil:
    void *kb_malloc(size_t size) noexcept
    int KB_POISONS
    void kb_poison(void *p, size_t size) noexcept
    void kb_unpoison(void *p, size_t size) noexcept
    void *kb_calloc(size_t count, size_t size) noexcept
    void kb_free(void *p) noexcept
    void kb_prefetch(const void *p, size_t size) noexcept
    ctypedef struct kb_mutex:
        pass
    ctypedef struct kb_cond:
        pass
    void kb_mutex_init(kb_mutex *m) noexcept
    void kb_mutex_destroy(kb_mutex *m) noexcept
    void kb_mutex_lock(kb_mutex *m) noexcept
    void kb_mutex_unlock(kb_mutex *m) noexcept
    void kb_cond_init(kb_cond *c) noexcept
    void kb_cond_destroy(kb_cond *c) noexcept
    void kb_cond_signal(kb_cond *c) noexcept
    void kb_cond_broadcast(kb_cond *c) noexcept
    void kb_cond_wait(kb_cond *c, kb_mutex *m) noexcept
    void kb_cond_wait_until(kb_cond *c, kb_mutex *m, int64_t deadline_ns) noexcept
    int64_t kb_now_ns() noexcept   # monotonic
    int64_t kb_wall_ns() noexcept  # since 1970
    ctypedef void (*kb_thread_main)(void *) noexcept nogil
    int kb_thread_start(kb_thread_main main, void *arg) noexcept
    int kb_pid() noexcept
    int kb_random(void *p, size_t n) noexcept
    void kb_on_fork_child(void (*fn)() noexcept nogil) noexcept
    bint KB_FORKS
    void kb_on_fork(void (*before)() noexcept nogil, void (*parent)() noexcept nogil,
                    void (*child)() noexcept nogil) noexcept
    int kb_resolve(const char *node, const char *service, const addrinfo *hints, addrinfo **found) noexcept
    void kb_resolved_free(addrinfo *found) noexcept
    int32_t KB_ADD32(int32_t *p, int32_t v) noexcept  # returns the new value, as KB_ADD64
    int64_t KB_ADD64(int64_t *p, int64_t v) noexcept
    int32_t KB_LOAD32(int32_t *p) noexcept
    int64_t KB_LOAD64(int64_t *p) noexcept
    void KB_STORE32(int32_t *p, int32_t v) noexcept
    void KB_STORE64(int64_t *p, int64_t v) noexcept
