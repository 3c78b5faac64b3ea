/* The floor of a fan-out: nothing but the system calls. Built as a shared library and called without the GIL. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* Connections that a thread takes at a time. With halves, the slower core would decide. */
#define CHUNK 16

typedef struct {
    const int *fds;
    long count;
    const uint8_t *data;
    size_t size;
    atomic_long next; /* the first connection that no thread has taken */
    atomic_long sent; /* connections that took all of the data */
} fan_out;

static void *send_chunks(void *argument)
{
    fan_out *all = argument;
    long sent = 0, first;
    while ((first = atomic_fetch_add(&all->next, CHUNK)) < all->count)
        for (long i = first; i < first + CHUNK && i < all->count; i++)
            sent += send(all->fds[i], all->data, all->size, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)all->size;
    atomic_fetch_add(&all->sent, sent);
    return NULL;
}

/* Send data to each descriptor, on this thread or on it and another one; how many took it all. */
long floor_send(const int *fds, long count, const uint8_t *data, size_t size, int threads)
{
    fan_out all = {.fds = fds, .count = count, .data = data, .size = size};
    pthread_t helper;
    if (threads > 1 && pthread_create(&helper, NULL, send_chunks, &all) != 0)
        return -1;
    send_chunks(&all);
    if (threads > 1)
        pthread_join(helper, NULL);
    return atomic_load(&all.sent);
}
