/* Makes the way to a broker longer: passes bytes on between clients and the broker, those of the broker so many
 * microseconds after they came. It delays and does nothing else: as much as comes may be on its way at the same time.
 *
 *   delay BROKER_HOST BROKER_PORT LISTEN_PORT
 *
 * LISTEN_PORT 0 chooses one; a line of JSON on standard output names it. Each line of standard input is the delay in
 * microseconds from now on, answered by a line. It ends with its standard input.
 *
 * Two threads for each direction of a connection: one reads and notes the time, the other waits until a chunk is due and
 * writes it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 256 * 1024 };

struct chunk {
        struct chunk *next;
        int64_t due_ns;
        size_t size;
        char data[];
};

struct pipe {
        int from, to;
        pthread_mutex_t mutex;
        pthread_cond_t filled;
        struct chunk *first, **last;
        int ended;
};

static _Atomic int64_t delay_ns;
static struct sockaddr_in broker;

static void fail(const char *what) {
        perror(what);
        exit(1);
}

static int64_t now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int write_all(int to, const char *data, size_t size) {
        while (size) {
                ssize_t n = write(to, data, size);
                if (n <= 0)
                        return 0;
                data += n;
                size -= (size_t)n;
        }
        return 1;
}

/* What need not wait takes no detour through the queue. */
static void *pass(void *argument) {
        struct pipe *p = argument;
        char *buffer = malloc(CHUNK);
        ssize_t n;

        while (buffer && (n = read(p->from, buffer, CHUNK)) > 0)
                if (!write_all(p->to, buffer, (size_t)n))
                        break;
        shutdown(p->to, SHUT_WR);
        shutdown(p->from, SHUT_RD);
        return NULL;
}

static void *take_in(void *argument) {
        struct pipe *p = argument;
        char *buffer = malloc(CHUNK);
        ssize_t n;

        while (buffer && (n = read(p->from, buffer, CHUNK)) > 0) {
                struct chunk *c = malloc(sizeof *c + (size_t)n);
                if (!c)
                        break;
                c->next = NULL;
                c->due_ns = now_ns() + atomic_load(&delay_ns);
                c->size = (size_t)n;
                memcpy(c->data, buffer, (size_t)n);
                pthread_mutex_lock(&p->mutex);
                *p->last = c;
                p->last = &c->next;
                pthread_cond_signal(&p->filled);
                pthread_mutex_unlock(&p->mutex);
        }
        pthread_mutex_lock(&p->mutex);
        p->ended = 1;
        pthread_cond_signal(&p->filled);
        pthread_mutex_unlock(&p->mutex);
        return NULL;
}

static void *give_out(void *argument) {
        struct pipe *p = argument;
        struct chunk *c;
        int open = 1;

        prctl(PR_SET_TIMERSLACK, 1000UL); /* a sleep ends when it should, not up to 50 µs later */
        for (;;) {
                struct timespec due;
                pthread_mutex_lock(&p->mutex);
                while (!(c = p->first) && !p->ended)
                        pthread_cond_wait(&p->filled, &p->mutex);
                if (c && !(p->first = c->next))
                        p->last = &p->first;
                pthread_mutex_unlock(&p->mutex);
                if (!c)
                        break;
                due.tv_sec = c->due_ns / 1000000000;
                due.tv_nsec = c->due_ns % 1000000000;
                if (c->due_ns > now_ns())
                        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
                open = open && write_all(p->to, c->data, c->size);
                free(c);
        }
        shutdown(p->to, SHUT_WR);
        shutdown(p->from, SHUT_RD);
        return NULL;
}

static void start(void *(*run)(void *), struct pipe *p) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, p))
                fail("thread");
        pthread_detach(thread);
}

/* Connections are few and live as long as the program, or nearly, so what belongs to them is never given back. */
static struct pipe *connect_pipe(int from, int to) {
        struct pipe *p = calloc(1, sizeof *p);
        if (!p)
                fail("memory");
        p->from = from;
        p->to = to;
        pthread_mutex_init(&p->mutex, NULL);
        pthread_cond_init(&p->filled, NULL);
        p->last = &p->first;
        return p;
}

static void *listen_for_clients(void *argument) {
        int listener = *(int *)argument, on = 1;

        for (;;) {
                int client = accept(listener, NULL, NULL), there = socket(AF_INET, SOCK_STREAM, 0);
                struct pipe *back;
                if (client < 0 || there < 0)
                        fail("accept");
                if (connect(there, (struct sockaddr *)&broker, sizeof broker)) {
                        close(client);
                        close(there);
                        continue;
                }
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                setsockopt(there, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                start(pass, connect_pipe(client, there));
                back = connect_pipe(there, client);
                start(take_in, back);
                start(give_out, back);
        }
        return NULL;
}

int main(int argc, char **argv) {
        struct sockaddr_in here = {.sin_family = AF_INET};
        socklen_t size = sizeof here;
        pthread_t thread;
        char line[64];
        int listener, on = 1;

        if (argc != 4) {
                fprintf(stderr, "usage: delay BROKER_HOST BROKER_PORT LISTEN_PORT\n");
                return 1;
        }
        signal(SIGPIPE, SIG_IGN);
        broker.sin_family = AF_INET;
        broker.sin_port = htons((uint16_t)atoi(argv[2]));
        if (inet_pton(AF_INET, argv[1], &broker.sin_addr) != 1)
                fail(argv[1]);
        here.sin_port = htons((uint16_t)atoi(argv[3]));
        here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        listener = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (listener < 0 || bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 64) ||
            getsockname(listener, (struct sockaddr *)&here, &size))
                fail("listen");
        if (pthread_create(&thread, NULL, listen_for_clients, &listener))
                fail("thread");
        printf("{\"port\": %d}\n", ntohs(here.sin_port));
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
                atomic_store(&delay_ns, atoll(line) * 1000);
                printf("{\"delay_us\": %lld}\n", atoll(line));
                fflush(stdout);
        }
        return 0;
}
