/* What reading costs librdkafka's user at least: takes records off the consumer's queue, walks the headers of each and
 * gives it back. Loaded by reading.py into the process of the other sides, so that all are measured by one clock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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

struct rk_partition {
        char *topic;
        int32_t partition;
        int64_t offset;
};

enum { CONSUMER = 1, BEGINNING = -2, MOST = 10000 };

#define FUNCTIONS(X)                                                                                       \
        X(void *, conf_new, (void))                                                                        \
        X(int, conf_set, (void *, const char *, const char *, char *, size_t))                             \
        X(void *, new, (int, void *, char *, size_t))                                                      \
        X(void, destroy, (void *))                                                                         \
        X(void *, topic_partition_list_new, (int))                                                         \
        X(struct rk_partition *, topic_partition_list_add, (void *, const char *, int32_t))                \
        X(void, topic_partition_list_destroy, (void *))                                                    \
        X(int, assign, (void *, const void *))                                                             \
        X(void *, queue_get_consumer, (void *))                                                            \
        X(void, queue_destroy, (void *))                                                                   \
        X(ssize_t, consume_batch_queue, (void *, int, struct rk_message **, size_t))                       \
        X(int, message_headers, (const struct rk_message *, void **))                                      \
        X(int, header_get_all, (const void *, size_t, const char **, const void **, size_t *))             \
        X(void, message_destroy, (struct rk_message *))

#define DECLARE(result, name, arguments) static result(*rk_##name) arguments;
FUNCTIONS(DECLARE)

struct reader {
        void *rk, *queue;
};

/* NULL: a function is missing, or librdkafka refuses. `settings` are pairs of key and value, the last key NULL. */
struct reader *open_reader(const char *path, const char **settings, const char *topic, int partitions) {
        char why[512];
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL), *conf, *list;
        struct reader *reader = calloc(1, sizeof *reader);
        int i;

        if (!library || !reader)
                return NULL;
#define BIND(result, name, arguments)                                                                      \
        *(void **)&rk_##name = dlsym(library, "rd_kafka_" #name);                                          \
        if (!rk_##name)                                                                                    \
                return NULL;
        FUNCTIONS(BIND)
        conf = rk_conf_new();
        for (; *settings; settings += 2)
                if (rk_conf_set(conf, settings[0], settings[1], why, sizeof why) != 0)
                        return NULL;
        reader->rk = rk_new(CONSUMER, conf, why, sizeof why);
        if (!reader->rk)
                return NULL;
        reader->queue = rk_queue_get_consumer(reader->rk);
        list = rk_topic_partition_list_new(partitions);
        for (i = 0; i < partitions; i++)
                rk_topic_partition_list_add(list, topic, i)->offset = BEGINNING;
        rk_assign(reader->rk, list);
        rk_topic_partition_list_destroy(list);
        return reader;
}

/* Takes `count` records, at most `batch` at a time; returns the bytes of their headers, keys and values. */
int64_t read_all(struct reader *reader, long count, long batch) {
        static struct rk_message *messages[MOST];
        int64_t bytes = 0;

        while (count > 0) {
                long most = batch < MOST ? batch : MOST, i;
                long got = rk_consume_batch_queue(reader->queue, 0, messages, (size_t)(most < count ? most : count));
                if (got <= 0)
                        got = rk_consume_batch_queue(reader->queue, 1000, messages, 1);
                for (i = 0; i < got; i++) {
                        struct rk_message *message = messages[i];
                        const char *name;
                        const void *value;
                        void *headers;
                        size_t size, h = 0;

                        if (!message->err) {
                                count--;
                                bytes += (int64_t)(message->len + message->key_len);
                                if (!rk_message_headers(message, &headers))
                                        while (!rk_header_get_all(headers, h++, &name, &value, &size))
                                                bytes += (int64_t)(strlen(name) + size);
                        }
                        rk_message_destroy(message);
                }
        }
        return bytes;
}

void close_reader(struct reader *reader) {
        rk_queue_destroy(reader->queue);
        rk_destroy(reader->rk);
        free(reader);
}
