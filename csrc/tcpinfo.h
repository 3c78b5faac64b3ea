/* What the kernel knows of a TCP connection (Linux: TCP_INFO, tcp(7) and linux/tcp.h).
 *
 * The kernel hands out as much of its structure as it has and the caller has room for, and newer kernels have more. The
 * layout never changes, so fields are read at their places, and only those that lie within the length that came back:
 * neither the headers of the machine that compiled this nor the kernel that runs it need to know the others.
 *
 * Everywhere else than on Linux, nothing is known.
 */
#ifndef WSF_TCPINFO_H
#define WSF_TCPINFO_H

#include <stddef.h>
#include <stdint.h>

#if defined(__linux__)
#define WSF_HAS_TCP_INFO 1
#else
#define WSF_HAS_TCP_INFO 0
#endif

/* What is known: a group of fields that came together with a version of Linux. */
enum {
    WSF_KNOWS_BASE = 1,    /* all but the following; 2.4 */
    WSF_KNOWS_ACKED = 2,   /* bytes_acked; 4.1 */
    WSF_KNOWS_MIN_RTT = 4, /* and notsent; 4.6 */
    WSF_KNOWS_BYTES = 8    /* bytes_sent and bytes_retrans; 4.19 */
};

typedef struct {
    uint32_t known;
    uint32_t unacked;           /* segments on their way */
    uint32_t retransmits;       /* time-outs in a row without an answer */
    uint32_t rto_us;            /* time until the next, doubled by each of them */
    uint32_t rtt_us, rttvar_us; /* smoothed */
    uint32_t min_rtt_us;
    uint32_t notsent; /* bytes that wait in the kernel for the peer to have room */
    uint32_t last_sent_ms;      /* since data was sent, for the first time or again */
    uint32_t last_ack_ms;       /* since the peer's kernel said anything */
    uint64_t bytes_acked;       /* it grows while the peer takes data */
    uint64_t bytes_sent;        /* retransmitted ones included */
    uint64_t bytes_retrans;
} wsf_tcp_facts;

/* Read `size` bytes of the kernel's structure. */
void wsf_tcp_facts_parse(const uint8_t *info, size_t size, wsf_tcp_facts *facts);
/* Ask the kernel about a socket. known is 0 if it is no TCP socket, or cannot be asked. Needs no GIL. */
void wsf_tcp_facts_read(int fd, wsf_tcp_facts *facts);
/* Ask the kernel not to wait longer than this between two retransmissions (TCP_RTO_MAX_MS, Linux 6.15; 1 to 120 s). Whether
 * it will. Without it the pauses double up to two minutes, and a link that is back is noticed as late as that. */
int wsf_tcp_limit_rto(int fd, uint32_t most_ms);
/* Whether it does so at all. */
int wsf_tcp_can_limit_rto(void);
/* Bytes that have come and nobody has read yet; 0 if that cannot be told. */
uint32_t wsf_socket_unread(int fd);

#endif
