/* Lets a chosen allocation of Python's fail. Like _testcapi.set_nomemory, but it can choose threads, tells whether it
 * has failed one, and is disarmed before Python code runs again. */
#include <Python.h>
#include <pthread.h>

enum { NOWHERE, CALLER, OTHERS }; /* which threads it fails in */

static PyMemAllocatorEx inner[3];
static int where;
static pthread_t caller;
static int64_t left, failures;

static int fails(void) {
        int at = __atomic_load_n(&where, __ATOMIC_SEQ_CST);
        if (at == NOWHERE || (at == CALLER) != !!pthread_equal(caller, pthread_self()) ||
            __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST) != 0)
                return 0;
        __atomic_add_fetch(&failures, 1, __ATOMIC_SEQ_CST);
        return 1;
}

static void *take(void *ctx, size_t size) {
        PyMemAllocatorEx *a = ctx;
        return fails() ? NULL : a->malloc(a->ctx, size);
}
static void *take_zeroed(void *ctx, size_t count, size_t size) {
        PyMemAllocatorEx *a = ctx;
        return fails() ? NULL : a->calloc(a->ctx, count, size);
}
static void *resize(void *ctx, void *p, size_t size) {
        PyMemAllocatorEx *a = ctx;
        return fails() ? NULL : a->realloc(a->ctx, p, size);
}
static void give(void *ctx, void *p) {
        PyMemAllocatorEx *a = ctx;
        a->free(a->ctx, p);
}

void nomemory_install(void) {
        const PyMemAllocatorDomain domains[] = {PYMEM_DOMAIN_RAW, PYMEM_DOMAIN_MEM, PYMEM_DOMAIN_OBJ};
        int i;
        for (i = 0; i < 3; i++) {
                PyMemAllocatorEx hook = {&inner[i], take, take_zeroed, resize, give};
                PyMem_GetAllocator(domains[i], &inner[i]);
                PyMem_SetAllocator(domains[i], &hook);
        }
}

/* Calls `function` while the nth allocation of these threads fails. */
PyObject *nomemory_call(PyObject *function, int64_t nth, int threads) {
        PyObject *result;
        caller = pthread_self();
        __atomic_store_n(&left, nth, __ATOMIC_SEQ_CST);
        __atomic_store_n(&where, threads, __ATOMIC_SEQ_CST);
        result = PyObject_CallNoArgs(function);
        __atomic_store_n(&where, NOWHERE, __ATOMIC_SEQ_CST);
        return result;
}

int64_t nomemory_failures(void) { return __atomic_load_n(&failures, __ATOMIC_SEQ_CST); }
