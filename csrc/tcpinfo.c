/* Reading TCP_INFO; see tcpinfo.h. */
#if defined(__linux__)
#define _GNU_SOURCE /* SOCK_CLOEXEC */
#endif

#include "tcpinfo.h"

#include <string.h>

#if WSF_HAS_TCP_INFO
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>
#ifndef TCP_RTO_MAX_MS
#define TCP_RTO_MAX_MS 44
#endif
#endif
#if !defined(_WIN32)
#include <sys/ioctl.h>
#endif

/* Where fields lie in the kernel's structure, and where the groups that came later end. */
enum {
    AT_RETRANSMITS = 2,
    AT_RTO = 8,
    AT_UNACKED = 24,
    AT_LAST_DATA_SENT = 44,
    AT_LAST_ACK_RECV = 56,
    AT_RTT = 68,
    AT_RTTVAR = 72,
    AFTER_BASE = 104,
    AT_BYTES_ACKED = 120,
    AFTER_ACKED = 128,
    AT_NOTSENT = 144,
    AT_MIN_RTT = 148,
    AFTER_MIN_RTT = 152,
    AT_BYTES_SENT = 200,
    AT_BYTES_RETRANS = 208,
    AFTER_BYTES = 216
};

static uint32_t word_at(const uint8_t *info, size_t at)
{
    uint32_t word;
    memcpy(&word, info + at, sizeof word);
    return word;
}

static uint64_t long_at(const uint8_t *info, size_t at)
{
    uint64_t value;
    memcpy(&value, info + at, sizeof value);
    return value;
}

void wsf_tcp_facts_parse(const uint8_t *info, size_t size, wsf_tcp_facts *facts)
{
    memset(facts, 0, sizeof *facts);
    if (size < AFTER_BASE)
        return;
    facts->known = WSF_KNOWS_BASE;
    facts->retransmits = info[AT_RETRANSMITS];
    facts->rto_us = word_at(info, AT_RTO);
    facts->unacked = word_at(info, AT_UNACKED);
    facts->last_sent_ms = word_at(info, AT_LAST_DATA_SENT);
    facts->last_ack_ms = word_at(info, AT_LAST_ACK_RECV);
    facts->rtt_us = word_at(info, AT_RTT);
    facts->rttvar_us = word_at(info, AT_RTTVAR);
    if (size < AFTER_ACKED)
        return;
    facts->known |= WSF_KNOWS_ACKED;
    facts->bytes_acked = long_at(info, AT_BYTES_ACKED);
    if (size < AFTER_MIN_RTT)
        return;
    facts->known |= WSF_KNOWS_MIN_RTT;
    facts->notsent = word_at(info, AT_NOTSENT);
    facts->min_rtt_us = word_at(info, AT_MIN_RTT);
    if (size < AFTER_BYTES)
        return;
    facts->known |= WSF_KNOWS_BYTES;
    facts->bytes_sent = long_at(info, AT_BYTES_SENT);
    facts->bytes_retrans = long_at(info, AT_BYTES_RETRANS);
}

void wsf_tcp_facts_read(int fd, wsf_tcp_facts *facts)
{
    uint8_t info[512];
    size_t size = 0;
#if WSF_HAS_TCP_INFO
    socklen_t length = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &length) == 0)
        size = length;
#else
    (void)fd;
#endif
    wsf_tcp_facts_parse(info, size, facts);
}

int wsf_tcp_limit_rto(int fd, uint32_t most_ms)
{
#if WSF_HAS_TCP_INFO
    int value = (int)most_ms;
    return setsockopt(fd, IPPROTO_TCP, TCP_RTO_MAX_MS, &value, sizeof value) == 0;
#else
    (void)fd, (void)most_ms;
    return 0;
#endif
}

int wsf_tcp_can_limit_rto(void)
{
#if WSF_HAS_TCP_INFO
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int can = fd >= 0 && wsf_tcp_limit_rto(fd, 2000);
    if (fd >= 0)
        (void)close(fd);
    return can;
#else
    return 0;
#endif
}

uint32_t wsf_socket_unread(int fd)
{
#if !defined(_WIN32) && defined(FIONREAD)
    int unread = 0;
    return ioctl(fd, FIONREAD, &unread) == 0 && unread > 0 ? (uint32_t)unread : 0;
#else
    (void)fd;
    return 0;
#endif
}
