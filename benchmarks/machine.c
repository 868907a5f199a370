/* Prints how long a cache line takes from one processor to another and back, in nanoseconds: the best of several
 * trials. librdkafka hands every message from the sending thread to its broker thread and back, so this one number of
 * the machine moves all figures; on rented machines it changes with where the two virtual processors happen to run. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

enum { TRIALS = 7, ROUNDS = 20000 };

static _Atomic long line __attribute__((aligned(128)));

static double now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void stay_on(int processor) {
#ifdef __linux__
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(processor, &set);
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
        (void)processor;
#endif
}

static void *answer(void *unused) {
        long i;
        stay_on(1);
        for (i = 0; i < TRIALS * (long)ROUNDS; i++) {
                while (atomic_load(&line) != 2 * i + 1)
                        ;
                atomic_store(&line, 2 * i + 2);
        }
        return unused;
}

int main(void) {
        pthread_t other;
        double best = 0, start, spent;
        long i = 0, trial, end;

        stay_on(0);
        if (pthread_create(&other, NULL, answer, NULL))
                return 1;
        for (trial = 0; trial < TRIALS; trial++) {
                start = now_ns();
                for (end = i + ROUNDS; i < end; i++) {
                        atomic_store(&line, 2 * i + 1);
                        while (atomic_load(&line) != 2 * i + 2)
                                ;
                }
                spent = (now_ns() - start) / ROUNDS;
                if (trial == 0 || spent < best)
                        best = spent;
        }
        pthread_join(other, NULL);
        printf("%.0f\n", best);
        return 0;
}
