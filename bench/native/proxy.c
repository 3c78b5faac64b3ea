/* Carries TCP connections until it is killed: proxy PORT TO, ports of 127.0.0.1. Prints `ready` when it listens.
 *
 * A link has two ends. What one end has not taken yet is kept, and the other one is not read meanwhile. When either is closed,
 * both are. Being killed closes all links at once, and tells nobody anything else.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct end {
    int fd;
    int is_connecting;
    struct end *other;
    uint8_t *left; /* owned: what it has not taken yet; NULL: nothing */
    size_t left_size;
    struct end *next_dead;
} end;

static int epoll, listener;
static struct sockaddr_in to = {.sin_family = AF_INET};
static end *dead; /* to be freed after the events that may still mean them */

static void die(const char *what)
{
    printf("error %s: %s\n", what, strerror(errno));
    exit(1);
}

static void watch(end *at, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = at};
    if (epoll_ctl(epoll, operation, at->fd, &event) != 0)
        die("epoll_ctl");
}

/* What is waited for at an end: room, where it has not taken all, and data, where the other one has. */
static void watch_what_matters(end *at)
{
    uint32_t reads = at->is_connecting || at->other->is_connecting || at->other->left != NULL ? 0 : EPOLLIN;
    watch(at, EPOLL_CTL_MOD, reads | (at->is_connecting || at->left != NULL ? EPOLLOUT : 0));
}

static void close_link(end *at)
{
    end *ends[] = {at, at->other};
    for (int i = 0; i < 2; i++) {
        close(ends[i]->fd);
        ends[i]->fd = -1;
        ends[i]->next_dead = dead;
        dead = ends[i];
    }
}

static void free_the_dead(void)
{
    while (dead != NULL) {
        end *at = dead;
        dead = at->next_dead;
        free(at->left);
        free(at);
    }
}

static void write_to(end *at, const uint8_t *data, size_t size)
{
    ssize_t written = send(at->fd, data, size, MSG_NOSIGNAL);
    if (written < 0 && errno != EAGAIN) {
        close_link(at);
        return;
    }
    size_t taken = written < 0 ? 0 : (size_t)written;
    if (taken == size)
        return;
    at->left = malloc(size - taken);
    if (at->left == NULL)
        die("malloc");
    memcpy(at->left, data + taken, size - taken);
    at->left_size = size - taken;
    watch_what_matters(at);
    watch_what_matters(at->other);
}

static void read_from(end *at)
{
    static uint8_t buffer[1 << 16];
    ssize_t size = recv(at->fd, buffer, sizeof buffer, 0);
    if (size > 0)
        write_to(at->other, buffer, (size_t)size);
    else if (size == 0 || errno != EAGAIN)
        close_link(at);
}

static void connected(end *at)
{
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(at->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
        close_link(at);
        return;
    }
    at->is_connecting = 0;
    watch_what_matters(at);
    watch_what_matters(at->other);
}

static void write_the_rest(end *at)
{
    uint8_t *left = at->left;
    at->left = NULL;
    write_to(at, left, at->left_size);
    free(left);
    if (at->fd >= 0 && at->left == NULL) {
        watch_what_matters(at);
        watch_what_matters(at->other);
    }
}

static end *make_end(int fd)
{
    int one = 1;
    end *at = calloc(1, sizeof *at);
    if (at == NULL || fd < 0)
        die("an end of a link");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    at->fd = fd;
    watch(at, EPOLL_CTL_ADD, 0);
    return at;
}

static void accept_all(void)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        end *client = make_end(fd), *server = make_end(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
        client->other = server;
        server->other = client;
        server->is_connecting = 1;
        if (connect(server->fd, (struct sockaddr *)&to, sizeof to) == 0)
            connected(server);
        else if (errno != EINPROGRESS)
            close_link(server);
        else
            watch_what_matters(server);
    }
}

static void handle(end *at, uint32_t events)
{
    if (at->fd < 0)
        return;
    if (at->is_connecting)
        connected(at);
    else if ((events & EPOLLOUT) && at->left != NULL)
        write_the_rest(at);
    else if (events & (EPOLLERR | EPOLLHUP))
        close_link(at);
    else if ((events & EPOLLIN) && at->other->left == NULL && !at->other->is_connecting)
        read_from(at);
}

int main(int argc, char **argv)
{
    struct sockaddr_in from = {.sin_family = AF_INET};
    struct epoll_event events[512], accepting = {.events = EPOLLIN};
    struct rlimit files;
    int one = 1;
    if (argc != 3)
        die("usage: proxy PORT TO");
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    inet_pton(AF_INET, "127.0.0.1", &from.sin_addr);
    to.sin_addr = from.sin_addr;
    from.sin_port = htons((uint16_t)atoi(argv[1]));
    to.sin_port = htons((uint16_t)atoi(argv[2]));
    epoll = epoll_create1(EPOLL_CLOEXEC);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&from, sizeof from) != 0 || listen(listener, 4096) != 0)
        die("cannot listen");
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &accepting);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(epoll, events, 512, -1);
        for (int i = 0; i < count; i++)
            if (events[i].data.ptr == NULL)
                accept_all();
            else
                handle(events[i].data.ptr, events[i].events);
        free_the_dead();
    }
}
