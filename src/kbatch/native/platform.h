/* What C has no portable word for: locks, condition variables with a monotonic deadline, threads,
 * atomics, shared libraries, random bytes. POSIX and Windows; no logic of kbatch's own. Also the one
 * place where memory is allocated. */
#ifndef KBATCH_PLATFORM_H
#define KBATCH_PLATFORM_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef KBATCH_FAULTS
/* Debug builds: allocations are counted, and one of them can be made to fail. tests/memory calls these by ctypes. */
#define KB_EXPORTED __attribute__((visibility("default"), used))
static int64_t kb_until_failure, kb_live, kb_failures;
KB_EXPORTED void kb_fail_allocation(int64_t nth) { __atomic_store_n(&kb_until_failure, nth, __ATOMIC_SEQ_CST); }
KB_EXPORTED int64_t kb_failed_allocations(void) { return __atomic_load_n(&kb_failures, __ATOMIC_SEQ_CST); }
KB_EXPORTED int64_t kb_live_allocations(void) { return __atomic_load_n(&kb_live, __ATOMIC_SEQ_CST); }
static inline void *kb_malloc(size_t size) {
        void *p = NULL;
        if (__atomic_load_n(&kb_until_failure, __ATOMIC_SEQ_CST) > 0 &&
            __atomic_sub_fetch(&kb_until_failure, 1, __ATOMIC_SEQ_CST) == 0)
                __atomic_add_fetch(&kb_failures, 1, __ATOMIC_SEQ_CST);
        else if ((p = malloc(size)) != NULL)
                __atomic_add_fetch(&kb_live, 1, __ATOMIC_SEQ_CST);
        return p;
}
static inline void *kb_calloc(size_t count, size_t size) {
        void *p = size && count > SIZE_MAX / size ? NULL : kb_malloc(count * size);
        return p ? memset(p, 0, count * size) : NULL;
}
static inline void kb_free(void *p) {
        if (p)
                __atomic_sub_fetch(&kb_live, 1, __ATOMIC_SEQ_CST);
        free(p);
}
#else
#define kb_malloc(size) malloc(size)
#define kb_calloc(count, size) calloc((count), (size))
#define kb_free(p) free(p)
#endif

/* Memory that nobody may touch until it is unpoisoned: builds with the address sanitizer tell who does. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KB_POISONS 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(KB_POISONS)
#define KB_POISONS 1
#endif
#ifdef KB_POISONS
#include <sanitizer/asan_interface.h>
#define kb_poison(p, size) __asan_poison_memory_region((p), (size))
#define kb_unpoison(p, size) __asan_unpoison_memory_region((p), (size))
#else
#define KB_POISONS 0
#define kb_poison(p, size) ((void)(p), (void)(size))
#define kb_unpoison(p, size) ((void)(p), (void)(size))
#endif

/* Asks for memory that is about to be read; any address will do. */
static inline void kb_prefetch(const void *p, size_t size) {
#ifdef __GNUC__
        size_t at;
        for (at = 0; at < size; at += 64)
                __builtin_prefetch((const char *)p + at);
#else
        (void)p, (void)size;
#endif
}

#ifdef _WIN32

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <stdio.h>
#include <windows.h>
#include <bcrypt.h>
#pragma comment(lib, "bcrypt")

typedef SRWLOCK kb_mutex;
typedef CONDITION_VARIABLE kb_cond;

static inline void kb_mutex_init(kb_mutex *m) { InitializeSRWLock(m); }
static inline void kb_mutex_destroy(kb_mutex *m) { (void)m; }
static inline void kb_mutex_lock(kb_mutex *m) { AcquireSRWLockExclusive(m); }
static inline void kb_mutex_unlock(kb_mutex *m) { ReleaseSRWLockExclusive(m); }
static inline void kb_cond_init(kb_cond *c) { InitializeConditionVariable(c); }
static inline void kb_cond_destroy(kb_cond *c) { (void)c; }
static inline void kb_cond_signal(kb_cond *c) { WakeConditionVariable(c); }
static inline void kb_cond_broadcast(kb_cond *c) { WakeAllConditionVariable(c); }
static inline void kb_cond_wait(kb_cond *c, kb_mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }

static inline int64_t kb_now_ns(void) {
        static LARGE_INTEGER freq;
        LARGE_INTEGER t;
        if (!freq.QuadPart)
                QueryPerformanceFrequency(&freq);
        QueryPerformanceCounter(&t);
        return (int64_t)((double)t.QuadPart * 1e9 / (double)freq.QuadPart);
}
static inline int64_t kb_wall_ns(void) {
        FILETIME ft;
        GetSystemTimePreciseAsFileTime(&ft);
        return ((((int64_t)ft.dwHighDateTime << 32) | ft.dwLowDateTime) - 116444736000000000LL) * 100;
}
static inline void kb_cond_wait_until(kb_cond *c, kb_mutex *m, int64_t deadline_ns) {
        int64_t left_ms = (deadline_ns - kb_now_ns()) / 1000000 + 1;
        if (left_ms < 0)
                left_ms = 0;
        if (left_ms > 3600000) /* who waits looks at the clock again */
                left_ms = 3600000;
        SleepConditionVariableSRW(c, m, (DWORD)left_ms, 0);
}

typedef void (*kb_thread_main)(void *);
typedef struct { kb_thread_main main; void *arg; } kb_thread_start_arg;
static DWORD WINAPI kb_thread_trampoline(LPVOID p) {
        kb_thread_start_arg a = *(kb_thread_start_arg *)p;
        kb_free(p);
        a.main(a.arg);
        return 0;
}
static inline int kb_thread_start(kb_thread_main main, void *arg) {
        HANDLE h;
        kb_thread_start_arg *a = (kb_thread_start_arg *)kb_malloc(sizeof *a);
        if (!a)
                return -1;
        a->main = main;
        a->arg = arg;
        h = CreateThread(NULL, 0, kb_thread_trampoline, a, 0, NULL);
        if (!h) {
                kb_free(a);
                return -1;
        }
        CloseHandle(h);
        return 0;
}
static inline int kb_pid(void) { return (int)GetCurrentProcessId(); }
static inline int kb_random(void *p, size_t n) {
        return BCryptGenRandom(NULL, (PUCHAR)p, (ULONG)n, BCRYPT_USE_SYSTEM_PREFERRED_RNG) == 0 ? 0 : -1;
}
/* What the library needs itself is looked for in its own folder, too, and in those of os.add_dll_directory. */
static inline void *kb_dl_open(const char *path) {
        wchar_t wide[4096];
        if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, sizeof wide / sizeof *wide))
                return NULL;
        return (void *)LoadLibraryExW(wide, NULL, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR);
}
static inline void *kb_dl_symbol(void *lib, const char *name) { return (void *)GetProcAddress((HMODULE)lib, name); }
static inline const char *kb_dl_error(void) {
        static char text[64];
        snprintf(text, sizeof text, "Windows error %lu", (unsigned long)GetLastError());
        return text;
}
static inline void kb_on_fork_child(void (*fn)(void)) { (void)fn; }

#define KB_FORKS 0
struct addrinfo;
static inline void kb_on_fork(void (*before)(void), void (*parent)(void), void (*child)(void)) {
        (void)before, (void)parent, (void)child;
}
static inline int kb_resolve(const char *node, const char *service, const struct addrinfo *hints,
                             struct addrinfo **found) {
        (void)node, (void)service, (void)hints, (void)found;
        return -1;
}
static inline void kb_resolved_free(struct addrinfo *found) { (void)found; }

#define KB_ADD32(p, v) ((int32_t)InterlockedExchangeAdd((volatile LONG *)(p), (v)) + (v))
#define KB_ADD64(p, v) ((int64_t)InterlockedExchangeAdd64((volatile LONG64 *)(p), (v)) + (v))
#define KB_LOAD32(p) ((int32_t)InterlockedOr((volatile LONG *)(p), 0))
#define KB_LOAD64(p) ((int64_t)InterlockedOr64((volatile LONG64 *)(p), 0))
#define KB_STORE64(p, v) ((void)InterlockedExchange64((volatile LONG64 *)(p), (v)))
#define KB_STORE32(p, v) ((void)InterlockedExchange((volatile LONG *)(p), (v)))

#else /* POSIX */

#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#include <fcntl.h>

typedef pthread_mutex_t kb_mutex;
typedef pthread_cond_t kb_cond;

static inline void kb_mutex_init(kb_mutex *m) { pthread_mutex_init(m, NULL); }
static inline void kb_mutex_destroy(kb_mutex *m) { pthread_mutex_destroy(m); }
static inline void kb_mutex_lock(kb_mutex *m) { pthread_mutex_lock(m); }
static inline void kb_mutex_unlock(kb_mutex *m) { pthread_mutex_unlock(m); }
static inline void kb_cond_init(kb_cond *c) {
#ifdef __APPLE__
        pthread_cond_init(c, NULL);
#else
        pthread_condattr_t a;
        pthread_condattr_init(&a);
        pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
        pthread_cond_init(c, &a);
        pthread_condattr_destroy(&a);
#endif
}
static inline void kb_cond_destroy(kb_cond *c) { pthread_cond_destroy(c); }
static inline void kb_cond_signal(kb_cond *c) { pthread_cond_signal(c); }
static inline void kb_cond_broadcast(kb_cond *c) { pthread_cond_broadcast(c); }
static inline void kb_cond_wait(kb_cond *c, kb_mutex *m) { pthread_cond_wait(c, m); }

static inline int64_t kb_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static inline int64_t kb_wall_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static inline void kb_cond_wait_until(kb_cond *c, kb_mutex *m, int64_t deadline_ns) {
        struct timespec t;
#ifdef __APPLE__
        int64_t left = deadline_ns - kb_now_ns();
        if (left < 0)
                left = 0;
        t.tv_sec = (time_t)(left / 1000000000);
        t.tv_nsec = (long)(left % 1000000000);
        pthread_cond_timedwait_relative_np(c, m, &t);
#else
        t.tv_sec = (time_t)(deadline_ns / 1000000000);
        t.tv_nsec = (long)(deadline_ns % 1000000000);
        pthread_cond_timedwait(c, m, &t);
#endif
}

typedef void (*kb_thread_main)(void *);
typedef struct { kb_thread_main main; void *arg; } kb_thread_start_arg;
static void *kb_thread_trampoline(void *p) {
        kb_thread_start_arg a = *(kb_thread_start_arg *)p;
        kb_free(p);
        a.main(a.arg);
        return NULL;
}
/* A detached thread that receives no signal: signals belong to the application's own threads. */
static inline int kb_thread_start(kb_thread_main main, void *arg) {
        pthread_t t;
        sigset_t all, old;
        int r;
        kb_thread_start_arg *a = (kb_thread_start_arg *)kb_malloc(sizeof *a);
        if (!a)
                return -1;
        a->main = main;
        a->arg = arg;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        r = pthread_create(&t, NULL, kb_thread_trampoline, a);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        if (r) {
                kb_free(a);
                return -1;
        }
        pthread_detach(t);
        return 0;
}
static inline int kb_pid(void) { return (int)getpid(); }
static inline int kb_random(void *p, size_t n) {
        char *out = (char *)p;
        int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return -1;
        while (n) {
                ssize_t r = read(fd, out, n);
                if (r < 0 && errno == EINTR)
                        continue;
                if (r <= 0) {
                        close(fd);
                        return -1;
                }
                out += r;
                n -= (size_t)r;
        }
        close(fd);
        return 0;
}
static inline void *kb_dl_open(const char *path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }
static inline void *kb_dl_symbol(void *lib, const char *name) { return dlsym(lib, name); }
static inline const char *kb_dl_error(void) {
        const char *e = dlerror();
        return e ? e : "unknown error";
}
static inline void kb_on_fork_child(void (*fn)(void)) { pthread_atfork(NULL, NULL, fn); }

#define KB_FORKS 1
static inline void kb_on_fork(void (*before)(void), void (*parent)(void), void (*child)(void)) {
        pthread_atfork(before, parent, child);
}
static inline int kb_resolve(const char *node, const char *service, const struct addrinfo *hints,
                             struct addrinfo **found) {
        return getaddrinfo(node, service, hints, found);
}
static inline void kb_resolved_free(struct addrinfo *found) { freeaddrinfo(found); }

/* Each returns the new value; loads acquire, stores release. */
#define KB_ADD32(p, v) __atomic_add_fetch((p), (v), __ATOMIC_ACQ_REL)
#define KB_ADD64(p, v) __atomic_add_fetch((p), (v), __ATOMIC_ACQ_REL)
#define KB_LOAD32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define KB_LOAD64(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define KB_STORE32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define KB_STORE64(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

#endif
#endif
