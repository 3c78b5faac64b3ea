/* Reading TCP_INFO; see tcpinfo.h. */
#include "tcpinfo.h"

#include <string.h>

#if WSF_HAS_TCP_INFO
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#endif

/* Where fields lie in the kernel's structure, and where the groups that came later end. */
enum {
    AT_RETRANSMITS = 2,
    AT_RTO = 8,
    AT_UNACKED = 24,
    AT_LAST_ACK_RECV = 56,
    AT_RTT = 68,
    AT_RTTVAR = 72,
    AFTER_BASE = 104,
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
    facts->last_ack_ms = word_at(info, AT_LAST_ACK_RECV);
    facts->rtt_us = word_at(info, AT_RTT);
    facts->rttvar_us = word_at(info, AT_RTTVAR);
    if (size < AFTER_MIN_RTT)
        return;
    facts->known |= WSF_KNOWS_MIN_RTT;
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
