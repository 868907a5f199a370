/* C11's threads by pthread's, put before glibc's own: librdkafka uses the former, and ThreadSanitizer of gcc knows the
 * latter only. It would crash in the threads that it has not seen begin, and see races where there are locks. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <threads.h>

#define ANSWER(call) ((call) == 0 ? thrd_success : thrd_error)
#define MUTEX(m) ((pthread_mutex_t *)(m))
#define COND(c) ((pthread_cond_t *)(c))

_Static_assert(sizeof(mtx_t) >= sizeof(pthread_mutex_t), "a mtx_t has room for a mutex");
_Static_assert(sizeof(cnd_t) >= sizeof(pthread_cond_t), "a cnd_t has room for a condition");

int mtx_init(mtx_t *m, int type) {
        pthread_mutexattr_t a;
        int r;
        pthread_mutexattr_init(&a);
        pthread_mutexattr_settype(&a, type & mtx_recursive ? PTHREAD_MUTEX_RECURSIVE : PTHREAD_MUTEX_NORMAL);
        r = ANSWER(pthread_mutex_init(MUTEX(m), &a));
        pthread_mutexattr_destroy(&a);
        return r;
}
void mtx_destroy(mtx_t *m) { pthread_mutex_destroy(MUTEX(m)); }
int mtx_lock(mtx_t *m) { return ANSWER(pthread_mutex_lock(MUTEX(m))); }
int mtx_unlock(mtx_t *m) { return ANSWER(pthread_mutex_unlock(MUTEX(m))); }
int cnd_init(cnd_t *c) { return ANSWER(pthread_cond_init(COND(c), NULL)); }
void cnd_destroy(cnd_t *c) { pthread_cond_destroy(COND(c)); }
int cnd_signal(cnd_t *c) { return ANSWER(pthread_cond_signal(COND(c))); }
int cnd_broadcast(cnd_t *c) { return ANSWER(pthread_cond_broadcast(COND(c))); }
int cnd_wait(cnd_t *c, mtx_t *m) { return ANSWER(pthread_cond_wait(COND(c), MUTEX(m))); }
int cnd_timedwait(cnd_t *restrict c, mtx_t *restrict m, const struct timespec *restrict until) {
        int r = pthread_cond_timedwait(COND(c), MUTEX(m), until);
        return r == ETIMEDOUT ? thrd_timedout : ANSWER(r);
}

struct start {
        thrd_start_t main;
        void *arg;
};

static void *begin(void *p) {
        struct start start = *(struct start *)p;
        free(p);
        return (void *)(intptr_t)start.main(start.arg);
}

int thrd_create(thrd_t *t, thrd_start_t main, void *arg) {
        struct start *start = malloc(sizeof *start);
        if (!start)
                return thrd_nomem;
        start->main = main;
        start->arg = arg;
        return ANSWER(pthread_create((pthread_t *)t, NULL, begin, start));
}
int thrd_join(thrd_t t, int *result) {
        void *returned = NULL;
        int r = ANSWER(pthread_join((pthread_t)t, &returned));
        if (result)
                *result = (int)(intptr_t)returned;
        return r;
}
