/* WebSocket clients that only receive: receiver HOST PORT COUNT RCVBUF SESSIONS. RCVBUF: bytes, 0: as the system has it.
 * SESSIONS: whether they speak the protocol of resume (docs/resume.md); 0 or 1.
 *
 * Connects COUNT times, prints `ready`, and then obeys lines on standard input:
 *
 *   expect FRAMES BYTES   every connection that reads is to get so many frames with so many bytes of payload, and no
 *                         more; when they all have, `done NS` is printed, NS being CLOCK_MONOTONIC of the last byte
 *   numbered FRAMES BYTES the same, and each begins with its number among them, from 0 on, in 10 digits
 *   pause N               the first N connections stop reading;  `ok`
 *   resume                all read again, whatever comes;        `ok`
 *   count                 `frames N`: of all connections so far
 *   health                `health PINGS CLOSED`: pings that all have got and answered, connections that have ended
 *   cut                   all end their connections without a word;             `ok`
 *   dial                  all connect again, and say nothing;                    `ready`
 *   hello                 all begin with a session, or go on with the one that they have. `hello NS`: when the first spoke;
 *                         and, when all have been answered as they should be and have confirmed it, `welcomed NS`
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

#define DIGITS 10      /* of a number */
#define MOST_KEPT 512  /* bytes of a payload that are looked at: control frames have 125, a welcome about 250 */
#define TOGETHER 64    /* connections that are made at a time */

typedef struct {
    int fd, paused, closed;
    uint8_t header[10];
    uint32_t header_size; /* bytes of it that are there */
    uint64_t payload_left;
    uint64_t frames, bytes;
    uint8_t kept[MOST_KEPT + 1]; /* the first bytes of a payload, so far */
    uint32_t kept_size, to_keep;
    uint64_t round_frames, round_bytes; /* of the round */
    char token[64]; /* of its session; empty: it has none */
    int is_awaiting; /* the welcome comes next */
} peer;

static peer *peers;
static const char *host;
static int port, peer_count, epoll, receive_buffer, sessions, closed;
static uint64_t pings;
static uint64_t want_frames, want_bytes;
static int waiting;     /* peers that have not got all yet */
static int judged;      /* whether there is a round */
static int is_numbered; /* its messages */
static int unwelcomed;  /* peers that have said hello and have no answer */

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

static void write_all(int fd, const char *text, size_t size)
{
    while (size > 0) {
        ssize_t written = write(fd, text, size);
        if (written <= 0)
            fail("write: %s", strerror(errno));
        text += written;
        size -= (size_t)written;
    }
}

static void ask_for_upgrade(int fd)
{
    char request[512];
    int size = snprintf(request, sizeof request,
                        "GET / HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n%s"
                        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
                        host, port, sessions ? "Sec-WebSocket-Protocol: wsfast.1\r\n" : "");
    write_all(fd, request, (size_t)size);
}

static void await_upgrade(int fd)
{
    char answer[2048];
    size_t used = 0;
    for (; used < 4 || memcmp(answer + used - 4, "\r\n\r\n", 4) != 0; used++)
        if (used == sizeof answer || read(fd, answer + used, 1) != 1)
            fail("no answer to the handshake");
    if (memcmp(answer, "HTTP/1.1 101 ", 13) != 0)
        fail("%.60s", answer);
}

static int dial(int number)
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
    ask_for_upgrade(fd);
    return fd;
}

static void begin(int number)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)number};
    peer *at = &peers[number];
    await_upgrade(at->fd);
    fcntl(at->fd, F_SETFL, O_NONBLOCK);
    at->header_size = 0;
    at->payload_left = 0;
    at->closed = at->paused = 0;
    at->is_awaiting = sessions;
    epoll_ctl(epoll, EPOLL_CTL_ADD, at->fd, &event);
}

static void dial_all(void)
{
    for (int first = 0; first < peer_count; first += TOGETHER) {
        int end = first + TOGETHER < peer_count ? first + TOGETHER : peer_count;
        for (int i = first; i < end; i++)
            peers[i].fd = dial(i);
        for (int i = first; i < end; i++)
            begin(i);
    }
    closed = 0;
    printf("ready\n");
    fflush(stdout);
}

/* With a reset, so that the system keeps nothing of it. */
static void cut_all(void)
{
    struct linger at_once = {.l_onoff = 1};
    for (int i = 0; i < peer_count; i++) {
        setsockopt(peers[i].fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        close(peers[i].fd);
        peers[i].closed = 1;
    }
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
    if (is_control(at) && size > 125)
        fail("a control frame of %llu bytes", (unsigned long long)size);
    at->payload_left = size;
    at->kept_size = 0;
    at->to_keep = is_control(at) ? 125 : at->is_awaiting ? MOST_KEPT : is_numbered ? DIGITS : 0;
}

static void keep(peer *at, const uint8_t *data, size_t size)
{
    size_t part = at->to_keep - at->kept_size;
    part = size < part ? size : part;
    memcpy(at->kept + at->kept_size, data, part);
    at->kept_size += (uint32_t)part;
}

/* A frame with no more than 125 bytes, masked with zeros. */
static int say(const peer *at, uint8_t opcode, const void *payload, size_t size)
{
    uint8_t frame[6 + 125] = {0x80 | opcode, (uint8_t)(0x80 | size)};
    memcpy(frame + 6, payload, size);
    return send(at->fd, frame, 6 + size, MSG_NOSIGNAL) == (ssize_t)(6 + size);
}

static void answer_ping(peer *at)
{
    if (!say(at, 0xA, at->kept, at->kept_size) && judged)
        fail("cannot answer a ping: %s", strerror(errno));
    pings++;
}

/* ---- sessions -------------------------------------------------------------------------------------------------------- */

static void say_hello(const peer *at)
{
    char hello[126];
    int size = at->token[0] == 0 ? snprintf(hello, sizeof hello, "{\"wsfast\": \"hello\"}")
                                 : snprintf(hello, sizeof hello, "{\"wsfast\": \"hello\", \"token\": \"%s\", \"received\": %llu}",
                                            at->token, (unsigned long long)at->frames);
    if (size >= (int)sizeof hello || !say(at, 0x1, hello, (size_t)size))
        fail("cannot say hello: %s", strerror(errno));
}

static void read_welcome(peer *at)
{
    static const char ready[] = "{\"wsfast\": \"ready\"}";
    const char *welcome = (const char *)at->kept, *token = strstr(welcome, "\"token\": \"");
    int is_resumed = strstr(welcome, "\"resumed\": true") != NULL;
    if (token == NULL || is_resumed != (at->token[0] != 0) || sscanf(token + 10, "%63[^\"]", at->token) != 1)
        fail("welcomed with %s", welcome);
    if (!say(at, 0x1, ready, sizeof ready - 1))
        fail("cannot say that it is ready: %s", strerror(errno));
    at->is_awaiting = 0;
    unwelcomed--;
}

static int64_t hello_all(void)
{
    int64_t first_ns = now_ns();
    unwelcomed = peer_count;
    for (int i = 0; i < peer_count; i++)
        say_hello(&peers[i]);
    return first_ns;
}

/* ---- what comes ------------------------------------------------------------------------------------------------------ */

static void end_frame(peer *at)
{
    at->header_size = 0;
    at->kept[at->kept_size] = 0;
    if (at->header[0] == 0x89)
        answer_ping(at);
    if (is_control(at))
        return;
    if (at->is_awaiting) {
        read_welcome(at);
        return;
    }
    if (judged && is_numbered && strtoull((const char *)at->kept, NULL, 10) != at->round_frames)
        fail("message %s instead of %llu", at->kept, (unsigned long long)at->round_frames);
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
            if (at->kept_size < at->to_keep)
                keep(at, data, part);
            if (!is_control(at) && !at->is_awaiting) {
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
    if (at->closed)
        return;
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

static void expect(uint64_t frames, uint64_t bytes, int with_numbers)
{
    is_numbered = with_numbers;
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
        expect(frames, bytes, 0);
    } else if (sscanf(line, "numbered %llu %llu", &frames, &bytes) == 2) {
        expect(frames, bytes, 1);
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
    } else if (strncmp(line, "cut", 3) == 0) {
        cut_all();
    } else if (strncmp(line, "dial", 4) == 0) {
        dial_all();
        return;
    } else if (strncmp(line, "hello", 5) == 0) {
        printf("hello %lld\n", (long long)hello_all());
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
    if (argc != 6)
        fail("usage: receiver HOST PORT COUNT RCVBUF SESSIONS");
    host = argv[1];
    port = atoi(argv[2]);
    receive_buffer = atoi(argv[4]);
    sessions = atoi(argv[5]);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    peer_count = atoi(argv[3]);
    peers = calloc((size_t)peer_count, sizeof *peers);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    dial_all();
    for (;;) {
        struct epoll_event events[512];
        int count = epoll_wait(epoll, events, 512, -1), before = unwelcomed;
        for (int i = 0; i < count; i++)
            if (events[i].data.u32 == UINT32_MAX)
                read_commands();
            else
                read_from((int)events[i].data.u32);
        if (before != 0 && unwelcomed == 0) {
            printf("welcomed %lld\n", (long long)now_ns());
            fflush(stdout);
        }
        if (judged && waiting == 0 && count > 0 && want_frames > 0) {
            printf("done %lld\n", (long long)now_ns());
            fflush(stdout);
            want_frames = 0;
            judged = 0;
        }
    }
}
