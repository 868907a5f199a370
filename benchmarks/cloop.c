/* The yardstick: the loop a C programmer would write by hand to get prepared messages to their
 * acknowledgements through librdkafka. It maps nothing: key, headers and body lie ready in memory.
 *
 * It loads the librdkafka it is given (the one that confluent-kafka carries, so that every side of a
 * comparison runs the same code) and declares the few functions it needs itself; neither kbatch's
 * declarations nor librdkafka's headers are used.
 *
 *   cloop LIBRARY DATA BOOTSTRAP TOPIC BATCH WINDOW HEADERS [key=value ...]
 *
 * DATA      a file written by benchmarks/data.py; its messages are sent in order, over and over
 * BATCH     messages enqueued in one go
 * WINDOW    0: one batch at a time, each awaited before the next. Otherwise batches overlap, with about
 *           WINDOW messages in flight; the count is looked at every 128 messages.
 * HEADERS   new: a header list is made for each message, as everybody does. recycled: the list that a
 *           delivery report gives back is used again, its values overwritten; all messages of DATA must
 *           have the same names and values of the same lengths.
 *
 * Each line of standard input is a number of messages: so many are sent and awaited, then a line of JSON
 * with what it took goes to standard output. Two sides can thus take turns without starting anew. Every
 * delivery report is checked; the first one with an error ends the program with status 1.
 *
 * A second number on the line is an interval in nanoseconds: a batch is due at each, one at a time, and
 * the answer names for each batch how long after that its sending began, and how long it took. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* ---- librdkafka, as far as it is called ---- */

struct rk_message {
        int err;
        void *topic;
        int32_t partition;
        void *payload;
        size_t len;
        void *key;
        size_t key_len;
        int64_t offset;
        void *opaque;
};

struct rk_argument {
        int type;
        union {
                void *pointer;
                struct {
                        const void *data;
                        size_t size;
                } memory;
                char room[64];
        } u;
};

enum { ARG_TOPIC_HANDLE = 2, ARG_VALUE = 4, ARG_KEY = 5, ARG_OPAQUE = 6, ARG_HEADERS = 10 };
enum { EVENT_DELIVERY = 0x1, EVENT_ERROR = 0x8 };
enum { ERR_ALL_BROKERS_DOWN = -187, ERR_QUEUE_FULL = -184, ERR_TRANSPORT = -195 };
enum { PRODUCER = 0, DRAIN_EVERY = 128, REPORTS_AT_ONCE = 1024 };

#define FUNCTIONS(X)                                                                                       \
        X(const char *, version_str, (void))                                                               \
        X(void *, conf_new, (void))                                                                        \
        X(int, conf_set, (void *, const char *, const char *, char *, size_t))                             \
        X(void, conf_set_events, (void *, int))                                                            \
        X(void *, new, (int, void *, char *, size_t))                                                      \
        X(void, destroy, (void *))                                                                         \
        X(void *, topic_new, (void *, const char *, void *))                                               \
        X(void, topic_destroy, (void *))                                                                   \
        X(void *, headers_new, (size_t))                                                                   \
        X(int, header_add, (void *, const char *, ssize_t, const void *, ssize_t))                         \
        X(int, header_get_all, (const void *, size_t, const char **, const void **, size_t *))             \
        X(int, message_detach_headers, (const struct rk_message *, void **))                               \
        X(void *, produceva, (void *, const struct rk_argument *, size_t))                                 \
        X(int, error_code, (const void *))                                                                 \
        X(const char *, error_string, (const void *))                                                      \
        X(void, error_destroy, (void *))                                                                   \
        X(const char *, err2str, (int))                                                                    \
        X(void *, queue_get_main, (void *))                                                                \
        X(void *, queue_poll, (void *, int))                                                               \
        X(void, queue_destroy, (void *))                                                                   \
        X(int, event_type, (const void *))                                                                 \
        X(size_t, event_message_array, (void *, const struct rk_message **, size_t))                       \
        X(int, event_error, (void *))                                                                      \
        X(const char *, event_error_string, (void *))                                                      \
        X(void, event_destroy, (void *))

#define DECLARE(result, name, arguments) static result(*rk_##name) arguments;
FUNCTIONS(DECLARE)

static void fail(const char *what, const char *why) {
        fprintf(stderr, "cloop: %s: %s\n", what, why);
        exit(1);
}

static void bind_library(const char *path) {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library)
                fail("cannot open librdkafka", dlerror());
#define BIND(result, name, arguments)                                                                      \
        *(void **)&rk_##name = dlsym(library, "rd_kafka_" #name);                                          \
        if (!rk_##name)                                                                                    \
                fail("missing function", "rd_kafka_" #name);
        FUNCTIONS(BIND)
}

/* ---- the prepared messages ---- */

struct span {
        const char *data;
        uint32_t size;
};

struct header {
        struct span name, value;
};

struct message {
        struct span key, value;
        struct header *headers;
};

static struct message *messages;
static uint32_t message_count, header_count;

static uint32_t read_u32(const char **at) {
        uint32_t n;
        memcpy(&n, *at, sizeof n);
        *at += sizeof n;
        return n;
}

static struct span read_span(const char **at) {
        struct span s;
        s.size = read_u32(at);
        s.data = *at;
        *at += s.size;
        return s;
}

/* DATA: "KBM1", message count, headers per message; then for each message key, value, and name and value
 * of each header. Each is a 32-bit length in the machine's byte order and its bytes. */
static void load(const char *path) {
        FILE *file = fopen(path, "rb");
        long size;
        char *bytes;
        const char *at;
        uint32_t i, h;

        if (!file || fseek(file, 0, SEEK_END) || (size = ftell(file)) < 12 || fseek(file, 0, SEEK_SET))
                fail(path, strerror(errno));
        bytes = malloc((size_t)size);
        if (!bytes || fread(bytes, 1, (size_t)size, file) != (size_t)size || memcmp(bytes, "KBM1", 4))
                fail(path, "not a file of prepared messages");
        fclose(file);
        at = bytes + 4;
        message_count = read_u32(&at);
        header_count = read_u32(&at);
        messages = malloc(message_count * sizeof *messages);
        if (!messages)
                fail(path, "out of memory");
        for (i = 0; i < message_count; i++) {
                messages[i].key = read_span(&at);
                messages[i].value = read_span(&at);
                messages[i].headers = malloc((header_count ? header_count : 1) * sizeof(struct header));
                if (!messages[i].headers)
                        fail(path, "out of memory");
                for (h = 0; h < header_count; h++) {
                        messages[i].headers[h].name = read_span(&at);
                        messages[i].headers[h].value = read_span(&at);
                }
        }
        if (at != bytes + size)
                fail(path, "length does not match its content");
}

/* ---- sending ---- */

static void *producer, *topic, *reports;
static long acknowledged, enqueued;

/* A header list that is used again; which message has it stands in the message's opaque. */
struct list {
        void *headers;
        struct list *next;
        char *values[];
};

static int recycles;
static struct list *lists; /* those that no message has */

static void *new_headers(const struct message *m) {
        void *headers = rk_headers_new(header_count);
        uint32_t h;

        for (h = 0; h < header_count; h++)
                rk_header_add(headers, m->headers[h].name.data, m->headers[h].name.size, m->headers[h].value.data,
                              m->headers[h].value.size);
        return headers;
}

static struct list *take_list(const struct message *m) {
        struct list *list = lists;
        const char *name;
        size_t size;
        uint32_t h;

        if (list) {
                lists = list->next;
                for (h = 0; h < header_count; h++)
                        memcpy(list->values[h], m->headers[h].value.data, m->headers[h].value.size);
                return list;
        }
        list = malloc(sizeof *list + header_count * sizeof *list->values);
        if (!list)
                fail("header lists", "out of memory");
        list->headers = new_headers(m);
        for (h = 0; h < header_count; h++)
                if (rk_header_get_all(list->headers, h, &name, (const void **)&list->values[h], &size))
                        fail("header lists", "a header is missing");
        return list;
}

static void give_back(const struct rk_message *delivered) {
        struct list *list = delivered->opaque;
        void *headers = NULL;

        if (rk_message_detach_headers(delivered, &headers) || headers != list->headers)
                fail("header lists", "a report does not have its message's list");
        list->next = lists;
        lists = list;
}

static void check_shape(void) {
        uint32_t i, h;

        for (i = 1; i < message_count; i++)
                for (h = 0; h < header_count; h++)
                        if (messages[i].headers[h].value.size != messages[0].headers[h].value.size ||
                            messages[i].headers[h].name.size != messages[0].headers[h].name.size ||
                            memcmp(messages[i].headers[h].name.data, messages[0].headers[h].name.data,
                                   messages[0].headers[h].name.size))
                                fail("header lists", "the messages are not of one shape");
}

/* Takes one event if there is one within the timeout. Destroying it at once is what gives queue room back. */
static int take_event(int timeout_ms) {
        const struct rk_message *delivered[REPORTS_AT_ONCE];
        void *event = rk_queue_poll(reports, timeout_ms);
        size_t got, i;

        if (!event)
                return 0;
        if (rk_event_type(event) == EVENT_DELIVERY) {
                while ((got = rk_event_message_array(event, delivered, REPORTS_AT_ONCE)) > 0) {
                        for (i = 0; i < got; i++) {
                                if (delivered[i]->err)
                                        fail("a message was not delivered", rk_err2str(delivered[i]->err));
                                if (recycles)
                                        give_back(delivered[i]);
                        }
                        acknowledged += (long)got;
                }
        } else if (rk_event_type(event) == EVENT_ERROR && rk_event_error(event) != ERR_TRANSPORT &&
                   rk_event_error(event) != ERR_ALL_BROKERS_DOWN) /* a connection comes back by itself */
                fprintf(stderr, "cloop: %s\n", rk_event_error_string(event));
        rk_event_destroy(event);
        return 1;
}

static void wait_until_in_flight(long most) {
        while (enqueued - acknowledged > most)
                take_event(1000);
}

static void enqueue(const struct message *m) {
        struct rk_argument arguments[5];
        struct list *list = NULL;
        void *error;
        size_t n = 0;

        arguments[n].type = ARG_TOPIC_HANDLE;
        arguments[n++].u.pointer = topic;
        arguments[n].type = ARG_VALUE;
        arguments[n].u.memory.data = m->value.data;
        arguments[n++].u.memory.size = m->value.size;
        if (m->key.size) {
                arguments[n].type = ARG_KEY;
                arguments[n].u.memory.data = m->key.data;
                arguments[n++].u.memory.size = m->key.size;
        }
        if (header_count) {
                if (recycles)
                        list = take_list(m);
                arguments[n].type = ARG_HEADERS;
                arguments[n++].u.pointer = list ? list->headers : new_headers(m);
        }
        arguments[n].type = ARG_OPAQUE;
        arguments[n++].u.pointer = list ? (void *)list : (void *)m;
        while ((error = rk_produceva(producer, arguments, n)) != NULL) {
                if (rk_error_code(error) != ERR_QUEUE_FULL)
                        fail("produce failed", rk_error_string(error));
                rk_error_destroy(error);
                take_event(100);
        }
        enqueued++;
}

static void send_all(long count, long batch, long window) {
        static uint32_t next; /* goes on where the last call ended */
        long sent = 0, i;

        while (sent < count) {
                for (i = 0; i < batch; i++) {
                        if (enqueued % DRAIN_EVERY == 0) {
                                while (take_event(0))
                                        ;
                                if (window)
                                        wait_until_in_flight(window);
                        }
                        enqueue(&messages[next]);
                        if (++next == message_count)
                                next = 0;
                }
                sent += batch;
                if (!window)
                        wait_until_in_flight(0);
        }
        wait_until_in_flight(0);
}

/* ---- measuring ---- */

static int64_t now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* What benchmarks/sides/base.py does for the other sides: the schedule is fixed ahead, and the processor is
 * kept busy until a batch is due. */
static struct paced {
        int64_t start, *waited, *served;
        long batches;
} paced;

static void send_paced(long count, long batch, int64_t interval) {
        long i;

        paced.batches = count / batch;
        paced.waited = realloc(paced.waited, (size_t)paced.batches * sizeof *paced.waited);
        paced.served = realloc(paced.served, (size_t)paced.batches * sizeof *paced.served);
        if (!paced.waited || !paced.served)
                fail("latencies", "out of memory");
        paced.start = now_ns();
        for (i = 0; i < paced.batches; i++) {
                int64_t due = paced.start + i * interval, called;
                while ((called = now_ns()) < due)
                        ;
                send_all(batch, batch, 0);
                paced.waited[i] = called - due;
                paced.served[i] = now_ns() - called;
        }
}

static void print_all(const char *name, const int64_t *values, long count) {
        long i;

        printf(", \"%s\": [", name);
        for (i = 0; i < count; i++)
                printf(i ? ",%" PRId64 : "%" PRId64, values[i]);
        printf("]");
}

struct clocks {
        double wall, thread, user, system;
};

static double seconds(clockid_t clock) {
        struct timespec t;
        clock_gettime(clock, &t);
        return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static struct clocks clocks_now(void) {
        struct clocks c;
        struct rusage usage;

        getrusage(RUSAGE_SELF, &usage);
        c.user = (double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec * 1e-6;
        c.system = (double)usage.ru_stime.tv_sec + (double)usage.ru_stime.tv_usec * 1e-6;
        c.thread = seconds(CLOCK_THREAD_CPUTIME_ID);
        c.wall = seconds(CLOCK_MONOTONIC);
        return c;
}

static long resident_bytes(void) {
        long pages = 0;
        FILE *file = fopen("/proc/self/statm", "r");
        if (file) {
                if (fscanf(file, "%*d %ld", &pages) != 1)
                        pages = 0;
                fclose(file);
        }
        return pages * sysconf(_SC_PAGESIZE);
}

/* The most memory that was ever resident: ru_maxrss begins with what the parent held when it forked. */
static long peak_bytes(void) {
        struct rusage usage;
        char line[256];
        long kilobytes = 0;
        FILE *file = fopen("/proc/self/status", "r");

        while (file && fgets(line, sizeof line, file))
                if (sscanf(line, "VmHWM: %ld", &kilobytes) == 1)
                        break;
        if (file)
                fclose(file);
        if (kilobytes)
                return kilobytes * 1024;
        getrusage(RUSAGE_SELF, &usage);
        return usage.ru_maxrss * 1024L;
}

static void set(void *conf, const char *key, const char *value) {
        char why[512];
        if (rk_conf_set(conf, key, value, why, sizeof why) != 0)
                fail("configuration", why);
}

static void run(long count, long batch, long window, int64_t interval) {
        struct clocks start, end;
        long resident = resident_bytes(), before = acknowledged;

        start = clocks_now();
        if (interval)
                send_paced(count, batch, interval);
        else
                send_all(count, batch, window);
        end = clocks_now();
        printf("{\"messages\": %ld, \"acknowledged\": %ld, \"seconds\": %.9f, \"cpu_user\": %.6f, \"cpu_system\": %.6f, "
               "\"cpu_thread\": %.9f, \"rss_start\": %ld, \"rss_end\": %ld, \"rss_peak\": %ld",
               count, acknowledged - before, end.wall - start.wall, end.user - start.user, end.system - start.system,
               end.thread - start.thread, resident, resident_bytes(), peak_bytes());
        if (interval) {
                printf(", \"start_ns\": %" PRId64, paced.start);
                print_all("waited_ns", paced.waited, paced.batches);
                print_all("served_ns", paced.served, paced.batches);
        }
        puts("}");
        fflush(stdout);
}

int main(int argc, char **argv) {
        char why[512], line[64];
        int64_t interval;
        void *conf;
        long batch, window, count;
        int i;

        if (argc < 8)
                fail("usage", "cloop LIBRARY DATA BOOTSTRAP TOPIC BATCH WINDOW HEADERS [key=value ...]");
        bind_library(argv[1]);
        load(argv[2]);
        batch = atol(argv[5]);
        window = atol(argv[6]);
        if (batch < 1 || window < 0)
                fail("usage", "BATCH must be positive, WINDOW not negative");
        recycles = header_count && !strcmp(argv[7], "recycled");
        if (recycles)
                check_shape();
        else if (strcmp(argv[7], "new") && strcmp(argv[7], "recycled"))
                fail("usage", "HEADERS must be new or recycled");

        conf = rk_conf_new();
        set(conf, "bootstrap.servers", argv[3]);
        set(conf, "acks", "all");
        set(conf, "enable.idempotence", "true");
        set(conf, "linger.ms", "0");
        for (i = 8; i < argc; i++) {
                char *value = strchr(argv[i], '=');
                if (!value)
                        fail(argv[i], "not of the form key=value");
                *value = '\0';
                set(conf, argv[i], value + 1);
        }
        rk_conf_set_events(conf, EVENT_DELIVERY | EVENT_ERROR);
        producer = rk_new(PRODUCER, conf, why, sizeof why);
        if (!producer)
                fail("cannot create the producer", why);
        reports = rk_queue_get_main(producer);
        topic = rk_topic_new(producer, argv[4], NULL);
        if (!topic)
                fail(argv[4], "no topic handle");

        printf("{\"ready\": \"librdkafka %s\", \"resident\": %ld}\n", rk_version_str(), resident_bytes());
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
                interval = 0;
                if (sscanf(line, "%ld %" SCNd64, &count, &interval) < 1 || count < 1 || count % batch || interval < 0)
                        fail("standard input", "not a multiple of the batch size");
                run(count, batch, window, interval);
        }
        printf("{\"closed\": true}\n");

        rk_topic_destroy(topic);
        rk_queue_destroy(reports);
        rk_destroy(producer);
        return 0;
}
