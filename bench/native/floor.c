/* The floor of a fan-out: nothing but the system calls. Built as a shared library and called without the GIL. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

typedef struct {
    const int *fds;
    long count;
    const uint8_t *data;
    size_t size;
    long sent; /* connections that took all of it */
} part;

static void *send_part(void *argument)
{
    part *mine = argument;
    mine->sent = 0;
    for (long i = 0; i < mine->count; i++)
        mine->sent += send(mine->fds[i], mine->data, mine->size, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)mine->size;
    return NULL;
}

/* Send data to each descriptor, on this thread or on it and another one; how many took it all. */
long floor_send(const int *fds, long count, const uint8_t *data, size_t size, int threads)
{
    part first = {fds, threads > 1 ? count / 2 : count, data, size, 0};
    part second = {fds + first.count, count - first.count, data, size, 0};
    pthread_t helper;
    if (threads > 1 && pthread_create(&helper, NULL, send_part, &second) != 0)
        return -1;
    send_part(&first);
    if (threads > 1)
        pthread_join(helper, NULL);
    return first.sent + second.sent;
}
