/* WebSocket clients that only receive: receiver HOST PORT COUNT RCVBUF (bytes; 0: as the system has it).
 *
 * Connects COUNT times, prints `ready`, and then obeys lines on standard input:
 *
 *   expect FRAMES BYTES   every connection that reads is to get so many frames with so many bytes of payload, and no
 *                         more; when they all have, `done NS` is printed, NS being CLOCK_MONOTONIC of the last byte
 *   pause N               the first N connections stop reading;  `ok`
 *   resume                all read again, whatever comes;        `ok`
 *   count                 `frames N`: of all connections so far
 *   health                `health PINGS CLOSED`: pings that all have got and answered, connections that have ended
 *
 * Pings are answered. Anything else that is not an unmasked text, binary or close frame, and anything more than expected,
 * is `error TEXT`, and the end. A connection that the server closes is printed as `closed N CODE` once it is not expected to read.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int fd, paused, closed;
    uint8_t header[10];
    uint32_t header_size; /* bytes of it that are there */
    uint64_t payload_left;
    uint64_t frames, bytes;
    uint8_t control[125]; /* payload of a control frame, so far */
    uint32_t control_size;
    uint64_t round_frames, round_bytes; /* of the round */
} peer;

static peer *peers;
static int peer_count, epoll, receive_buffer, closed;
static uint64_t pings;
static uint64_t want_frames, want_bytes;
static int waiting; /* peers that have not got all yet */
static int judged;  /* whether there is a round */

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("error ");
    vprintf(format, arguments);
    printf("\n");
    fflush(stdout);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- connect --------------------------------------------------------------------------------------------------------- */

static void write_all(int fd, const char *text)
{
    size_t size = strlen(text);
    while (size > 0) {
        ssize_t written = write(fd, text, size);
        if (written <= 0)
            fail("write: %s", strerror(errno));
        text += written;
        size -= (size_t)written;
    }
}

static void shake_hands(int fd, const char *host, int port)
{
    char request[512], answer[2048];
    size_t used = 0;
    snprintf(request, sizeof request,
             "GET / HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
             "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
             host, port);
    write_all(fd, request);
    for (; used < 4 || memcmp(answer + used - 4, "\r\n\r\n", 4) != 0; used++)
        if (used == sizeof answer || read(fd, answer + used, 1) != 1)
            fail("no answer to the handshake");
    if (memcmp(answer, "HTTP/1.1 101 ", 13) != 0)
        fail("%.60s", answer);
}

static int dial(const char *host, int port, int number)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    /* Many connections need more source addresses than one has ports: each server's clients have some of their own. */
    uint32_t source = 0x7F010000u + (uint32_t)port * 4 + (uint32_t)number / 20000;
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(source)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    inet_pton(AF_INET, host, &to.sin_addr);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (receive_buffer != 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    if (fd < 0 || bind(fd, (struct sockaddr *)&from, sizeof from) != 0 ||
        connect(fd, (struct sockaddr *)&to, sizeof to) != 0)
        fail("connection %d: %s", number, strerror(errno));
    shake_hands(fd, host, port);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void watch(int number, int reads)
{
    struct epoll_event event = {.events = reads ? EPOLLIN : 0, .data.u32 = (uint32_t)number};
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, peers[number].fd, &event) != 0)
        fail("epoll_ctl: %s", strerror(errno));
}

/* ---- frames ---------------------------------------------------------------------------------------------------------- */

static uint32_t header_length(const peer *at)
{
    if (at->header_size < 2)
        return 2;
    return at->header[1] < 126 ? 2 : at->header[1] == 126 ? 4 : 10;
}

static int is_control(const peer *at) { return at->header[0] & 0x08; }

static void begin_frame(peer *at)
{
    uint64_t size = at->header[1];
    if (size >= 126) {
        uint32_t length = header_length(at);
        size = 0;
        for (uint32_t i = 2; i < length; i++)
            size = size << 8 | at->header[i];
    }
    if (at->header[0] != 0x81 && at->header[0] != 0x82 && at->header[0] != 0x88 && at->header[0] != 0x89)
        fail("frame begins with 0x%02x", at->header[0]);
    if (is_control(at) && size > sizeof at->control)
        fail("a control frame of %llu bytes", (unsigned long long)size);
    at->payload_left = size;
    at->control_size = 0;
}

/* Masked with zeros. */
static void answer_ping(peer *at)
{
    uint8_t pong[6 + sizeof at->control] = {0x8A, (uint8_t)(0x80 | at->control_size)};
    memcpy(pong + 6, at->control, at->control_size);
    if (send(at->fd, pong, 6 + at->control_size, MSG_NOSIGNAL) != (ssize_t)(6 + at->control_size) && judged)
        fail("cannot answer a ping: %s", strerror(errno));
    pings++;
}

static void end_frame(peer *at)
{
    at->header_size = 0;
    if (at->header[0] == 0x89)
        answer_ping(at);
    if (is_control(at))
        return;
    at->frames++;
    at->round_frames++;
    if (judged && at->round_frames > want_frames)
        fail("more frames than expected");
    if (judged && at->round_frames == want_frames) {
        if (at->round_bytes != want_bytes)
            fail("%llu bytes instead of %llu", (unsigned long long)at->round_bytes, (unsigned long long)want_bytes);
        waiting--;
    }
}

static void take(peer *at, const uint8_t *data, size_t size)
{
    while (size > 0) {
        if (at->header_size < header_length(at)) {
            at->header[at->header_size++] = *data++;
            size--;
            if (at->header_size < 2 || at->header_size < header_length(at))
                continue;
            begin_frame(at);
        } else {
            size_t part = size < at->payload_left ? size : (size_t)at->payload_left;
            at->payload_left -= part;
            if (is_control(at)) {
                memcpy(at->control + at->control_size, data, part);
                at->control_size += (uint32_t)part;
            } else {
                at->bytes += part;
                at->round_bytes += part;
            }
            data += part;
            size -= part;
        }
        if (at->payload_left == 0)
            end_frame(at);
    }
}

static void read_from(int number)
{
    static uint8_t buffer[1 << 18];
    peer *at = &peers[number];
    ssize_t size = recv(at->fd, buffer, sizeof buffer, 0);
    if (size > 0) {
        take(at, buffer, (size_t)size);
    } else if (size == 0 || (errno != EAGAIN && errno != EINTR)) {
        if (judged && at->round_frames < want_frames)
            fail("connection %d ended: %s", number, size == 0 ? "closed" : strerror(errno));
        epoll_ctl(epoll, EPOLL_CTL_DEL, at->fd, NULL);
        at->closed = 1;
        closed++;
        printf("closed %d\n", number);
        fflush(stdout);
    }
}

/* ---- commands -------------------------------------------------------------------------------------------------------- */

static void expect(uint64_t frames, uint64_t bytes)
{
    want_frames = frames;
    want_bytes = bytes;
    waiting = 0;
    judged = 1;
    for (int i = 0; i < peer_count; i++) {
        peers[i].round_frames = peers[i].round_bytes = 0;
        waiting += !peers[i].paused && !peers[i].closed;
    }
}

static void obey(const char *line)
{
    unsigned long long frames, bytes;
    int count;
    if (sscanf(line, "expect %llu %llu", &frames, &bytes) == 2) {
        expect(frames, bytes);
    } else if (sscanf(line, "pause %d", &count) == 1) {
        for (int i = 0; i < count; i++) {
            peers[i].paused = 1;
            watch(i, 0);
        }
    } else if (strncmp(line, "resume", 6) == 0) {
        judged = 0;
        for (int i = 0; i < peer_count; i++)
            if (peers[i].paused && !peers[i].closed) {
                peers[i].paused = 0;
                watch(i, 1);
            }
    } else if (strncmp(line, "count", 5) == 0) {
        unsigned long long total = 0;
        for (int i = 0; i < peer_count; i++)
            total += peers[i].frames;
        printf("frames %llu\n", total);
        fflush(stdout);
        return;
    } else if (strncmp(line, "health", 6) == 0) {
        printf("health %llu %d\n", (unsigned long long)pings, closed);
        fflush(stdout);
        return;
    } else {
        fail("unknown command");
    }
    printf("ok\n");
    fflush(stdout);
}

static void read_commands(void)
{
    static char line[256];
    static size_t used;
    ssize_t size = read(0, line + used, sizeof line - 1 - used);
    if (size <= 0)
        exit(0);
    used += (size_t)size;
    line[used] = 0;
    for (char *end; (end = strchr(line, '\n')) != NULL;) {
        *end = 0;
        obey(line);
        used -= (size_t)(end + 1 - line);
        memmove(line, end + 1, used + 1);
    }
}

int main(int argc, char **argv)
{
    struct rlimit files;
    if (argc != 5)
        fail("usage: receiver HOST PORT COUNT RCVBUF");
    receive_buffer = atoi(argv[4]);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    peer_count = atoi(argv[3]);
    peers = calloc((size_t)peer_count, sizeof *peers);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    for (int i = 0; i < peer_count; i++) {
        peers[i].fd = dial(argv[1], atoi(argv[2]), i);
        event.data.u32 = (uint32_t)i;
        epoll_ctl(epoll, EPOLL_CTL_ADD, peers[i].fd, &event);
    }
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[512];
        int count = epoll_wait(epoll, events, 512, -1);
        for (int i = 0; i < count; i++)
            if (events[i].data.u32 == UINT32_MAX)
                read_commands();
            else
                read_from((int)events[i].data.u32);
        if (judged && waiting == 0 && count > 0 && want_frames > 0) {
            printf("done %lld\n", (long long)now_ns());
            fflush(stdout);
            want_frames = 0;
            judged = 0;
        }
    }
}
