# Every allocation of kbatch's own goes through here, so that a debug build can fail each of them in turn
# (librdkafka aborts when malloc fails, so the system's malloc cannot be made to).

cdef extern from * nogil:
    """
    #ifdef KBATCH_FAIL_ALLOCATIONS
    static long kb_fail_at = 0; /* the n-th allocation from now fails; 0: none */
    static int kb_allocation_fails(void) { return kb_fail_at > 0 && --kb_fail_at == 0; }
    #else
    static long kb_fail_at = 0;
    #define kb_allocation_fails() 0
    #endif
    static inline void *kb_malloc(size_t n) { (void)kb_fail_at; return kb_allocation_fails() ? NULL : malloc(n); }
    static inline void *kb_calloc(size_t n, size_t size) { return kb_allocation_fails() ? NULL : calloc(n, size); }
    """
    void *kb_malloc(size_t n) noexcept
    void *kb_calloc(size_t n, size_t size) noexcept
    long kb_fail_at
