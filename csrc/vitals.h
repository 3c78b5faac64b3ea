/* The health of connections: what is known of each, and what follows from it. Facts and a clock in, actions out; no socket
 * is touched here, and no Python object.
 *
 * *Signs of life* are bytes that the peer has sent, and acknowledgements of its kernel (see tcpinfo.h). A connection that
 * gives none for its interval is asked by a ping. What is asked and not answered, or sent and not acknowledged, puts the
 * path in question; a question that is not answered in time makes the connection suspect, and more questions follow.
 * Any byte ends that. The connection is dead when neither the peer nor its kernel has given a sign for `silence_ns`; or when
 * its kernel acknowledges, but its program has left a ping unanswered for `timeout_ns`.
 *
 * *The health clock* is the monotonic clock without the time that our own loop was late. It stands still from the moment a
 * tick was due until it comes, so that all deadlines move by that much, and nothing is measured across it.
 *
 * *Round trips* are smoothed as in RFC 6298: SRTT, RTTVAR. Jitter is that of RFC 3550, 6.4.1. Late answers are left out of
 * both (Karn), unless three in a row say that the path has become slower.
 *
 * *The interval* is what is left of `silence_ns` after the wait that must be allowed for an answer. How long that is,
 * connections of a class (by SRTT) teach each other: a few of them are asked more often while they are young, and their
 * waits are counted. The wait that is chosen is exceeded at most `risk_per_1000h` times in 1,000 hours of a connection;
 * that risk follows from the pings that may be spent, `pings_per_h`.
 *
 * Times are nanoseconds, on the health clock where their name ends in _h, on the monotonic one where it ends in _ns.
 * Round trips are microseconds in 32 bits, shares are in 1,000ths. All arithmetic but that of risk is in whole numbers, so
 * that the reference in Python gives the same answers to the bit.
 *
 * Threads: the event loop's only.
 */
#ifndef WSF_VITALS_H
#define WSF_VITALS_H

#include "platform.h"
#include "slab.h"
#include "table.h"
#include "tcpinfo.h"

/* Classes of connections by SRTT: less than 4 ms, 8 ms, ... 512 ms, and more; and those without a sample. */
#define WSF_CLASSES 10
#define WSF_NO_CLASS (WSF_CLASSES - 1)
#define WSF_WAIT_BINS 64
#define WSF_WAIT_BIN_NS INT64_C(500000000)
#define WSF_PINGS 4       /* that may be answered yet */
#define WSF_SWEEPS 4096   /* whose time is remembered; a power of two */
#define WSF_STALLS 64     /* delays of our own that are remembered */
#define WSF_HISTORY 32    /* pings that the share of late ones is about */

enum { WSF_GOOD, WSF_FAIR, WSF_POOR, WSF_BAD, WSF_GRADES };
enum { WSF_LATENCY, WSF_JITTER, WSF_LOSS, WSF_RETRANSMITTED, WSF_MEASURES };

typedef struct {
    int64_t silence_ns;        /* without any sign of life, after which a connection is dead */
    int64_t timeout_ns;        /* that a program may leave a ping unanswered while its kernel acknowledges */
    int64_t answer_ns;         /* however long the silence, a question gets at least this */
    int64_t write_ns;          /* for a ping to leave us */
    int64_t interval_ns;       /* longest, on good connections */
    int64_t interval_poor_ns;  /* longest, on poor ones */
    int64_t interval_min_ns;   /* shortest */
    int64_t interval_learn_ns; /* of those that teach */
    int64_t learn_ns;          /* how long they do */
    int64_t by_acks_ns;        /* longest time on acknowledgements alone */
    int64_t late_ns;           /* an answer is late after this, or SRTT + 4 RTTVAR if that is more */
    int64_t probe_ns;          /* between the probes of a suspect */
    int64_t prior_wait_ns;     /* for an answer, of a class that little is known of */
    int64_t peak_half_ns;      /* the longest wait of a connection counts half after this */
    int64_t tick_ns;
    int64_t slack_ns;          /* a tick that is later than this was late */
    uint32_t probes;
    uint32_t bad_factor;       /* what silence and timeout are multiplied by if more than `bad_loss` is late */
    uint32_t poor_latency_us, poor_loss, bad_loss;
    uint32_t limits[WSF_GRADES - 1][WSF_MEASURES]; /* above these a connection is fair, poor, bad */
    uint32_t calm;             /* looks that must be better before the grade is */
    uint32_t trace;            /* entries of the trace of a connection; 0: none is kept */
    double risk_per_1000h;     /* to begin with */
    double pings_per_h;        /* of a connection, on average over all; 0: the risk stays as it is */
} wsf_health_settings;

/* ---- one connection ---------------------------------------------------------------------------------------------------- */

enum { WSF_QUIET, WSF_ASKED, WSF_SUSPECTED, WSF_ENDED };

/* What a trace tells. `value`: see there. */
enum {
    WSF_TRACE_NOTHING,
    WSF_TRACE_PING,      /* not answered yet */
    WSF_TRACE_PONG,      /* the same, answered: microseconds */
    WSF_TRACE_LATE,      /* the same, answered late: microseconds */
    WSF_TRACE_SUSPECT,   /* milliseconds since the last sign of life */
    WSF_TRACE_CLEARED,   /* as before */
    WSF_TRACE_LAG,       /* our own loop was late: milliseconds */
    WSF_TRACE_STUCK,     /* a ping could not leave us: bytes that were before it */
    WSF_TRACE_LEFT,      /* it has left: milliseconds later */
    WSF_TRACE_UNREAD,    /* something has come that we have not read, so it is alive: bytes */
    WSF_TRACE_GRADE,     /* the new grade */
    WSF_TRACE_DEAD,      /* cause */
    WSF_TRACE_KINDS
};

typedef struct {
    int64_t at_ns;
    uint32_t value;
    uint16_t what, number; /* number: low bits of the ping's sweep */
} wsf_trace_entry;

typedef struct wsf_vitals {
    PyObject *record; /* its address is what it is found by */
    int fd;           /* -1: the kernel is not asked */
    uint8_t state, grade, former_grade, link_class, calm;
    uint8_t teaches, trusts_kernel, probes, ping_count; /* probes: sent since it is suspect */
    uint8_t is_stuck, has_reported_stuck, late_in_a_row;
    uint8_t counted; /* a bit for each of `pings`: `history` has it already, or is not to have it */
    uint8_t cause;   /* once it has ended */
    uint32_t history; /* a bit for each ping, the newest is the lowest: 1, it was not answered in time */
    uint32_t srtt_us, rttvar_us, min_rtt_us, jitter_us, last_rtt_us;
    uint32_t retransmitted; /* share of the bytes sent, smoothed */
    uint32_t unread, stuck_bytes;
    int64_t born_h, byte_h, ack_h;
    int64_t first_h;    /* the first ping, if nothing has come before it */
    int64_t ping_h;     /* the first ping since the last byte; 0: none */
    int64_t asked_h;    /* the last ping or probe */
    int64_t stuck_h;    /* since when a ping waits to leave us, and the peer takes nothing */
    int64_t unacked_h;  /* since when something is not acknowledged; 0: nothing is */
    int64_t doubted_h;  /* when the kernel was last trusted no longer */
    int64_t behind_h;   /* when something last waited in our kernel and moved: a ping may be among it */
    int64_t learned_h, peak_h, peak_ns;
    int64_t interval_ns;
    int64_t credit_ns;  /* of the health clock when this was last looked at */
    uint32_t pings[WSF_PINGS]; /* numbers of the sweeps whose pings may be answered yet, in order */
    uint64_t bytes_sent, bytes_retrans, bytes_acked;
    uint64_t seen_acked; /* bytes_acked at the last look */
    uint32_t kernel_rtt_us, unacked, trace_count;
    uint64_t ping_total, late_total;
    wsf_trace_entry *trace; /* a ring; NULL until there is something to tell */
} wsf_vitals;

/* ---- all of them --------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t begin_ns, end_ns, credit_ns; /* credit: of all up to its end */
} wsf_stall;

typedef struct {
    wsf_health_settings settings;
    wsf_table table; /* by record */
    wsf_slab slab; /* has the wsf_vitals */
    int64_t account;
    /* the clock */
    int64_t until_ns;  /* when the next tick is due */
    int64_t credit_ns; /* time that the loop was late */
    wsf_stall stalls[WSF_STALLS];
    uint32_t stall_count;
    uint32_t sweep; /* number of the last; 0: there was none */
    int64_t sweep_ns[WSF_SWEEPS];
    /* what the classes have taught */
    int64_t watched_ns[WSF_CLASSES];
    uint32_t waits[WSF_CLASSES][WSF_WAIT_BINS];
    int64_t wait_ns[WSF_CLASSES]; /* what follows from it; -1: to be found */
    uint32_t lessons, newcomers;
    double risk;
    int64_t spent, spent_ns; /* pings, and time of connections, since the risk was last looked at */
    int64_t counted_h;
} wsf_health;

uint32_t wsf_vitals_hash(const void *vitals); /* of its record */

/* What is known of each of these records, NULL where nothing is. The cache misses overlap. */
void wsf_health_find(const wsf_health *health, PyObject *const *records, size_t count, wsf_vitals **found);

void wsf_health_init(wsf_health *health, const wsf_health_settings *settings, int64_t now_ns);
/* The time on the health clock. */
int64_t wsf_health_at(const wsf_health *health, int64_t now_ns);
/* A tick has come. Returns by how much it was late, which is credited. */
int64_t wsf_health_tick(wsf_health *health, int64_t now_ns);
/* The next sweep begins; its number, which is never 0. */
uint32_t wsf_health_begin_sweep(wsf_health *health, int64_t now_ns);

/* Memory for what is known of a connection, all zero; NULL: there is none. It is given back with all that belongs to it. */
wsf_vitals *wsf_vitals_new(wsf_health *health);
/* Begin with a connection, which has just given a sign of life. chance: 0 to 65535, when in its interval the first ping
 * comes. Returns when to look at it. */
int64_t wsf_vitals_init(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t chance);

/* What to do. Several at once are possible. */
enum {
    WSF_DO_PING = 1,
    WSF_IS_SUSPECT = 2,  /* since now */
    WSF_IS_CLEARED = 4,  /* it was suspect, and is not any more */
    WSF_IS_DEAD = 8,
    WSF_PING_FAILED = 16, /* a ping could not leave us in time */
    WSF_NEW_GRADE = 32,
    WSF_WAS_LATE = 64,    /* a pong */
    WSF_UNASKED = 128     /* a pong that answers nothing */
};
enum { WSF_BY_SILENCE = 1, WSF_BY_NO_PONG };

/* Look at a connection. active_ns: when it was last active. facts: known is 0 where the kernel is not asked. next_h: when to
 * look again. Where wsf_vitals_is_overdue, see first what has come and was not read: wsf_vitals_unread. */
uint32_t wsf_vitals_look(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int64_t active_ns,
                         const wsf_tcp_facts *facts, int64_t *next_h);
/* Something else decides of it for now: no question is open. */
void wsf_vitals_rest(wsf_vitals *vitals, wsf_health *health, int64_t now_ns);
int wsf_vitals_is_overdue(const wsf_vitals *vitals, const wsf_health *health, int64_t now_ns);
/* So many bytes have come and wait to be read. If they are not those of last time, they are a sign of life; and as long as
 * there are some, a pong may be among them, or behind what has no room: it is not missed. */
void wsf_vitals_unread(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t unread);
/* How long there was no sign of life. */
int64_t wsf_vitals_silent_ns(const wsf_vitals *vitals, const wsf_health *health, int64_t now_ns);

/* A pong has come. number: of the sweep that its payload names; 0: none. left_ns: when the last ping left us; 0: with its
 * sweep. Returns what it means; next_h as above. */
uint32_t wsf_vitals_pong(wsf_vitals *vitals, wsf_health *health, uint32_t number, int64_t left_ns, int64_t now_ns,
                         int64_t *next_h);
/* The last ping cannot leave us, or can now. bytes: that are before it. Say so again now and then: when they become fewer,
 * the peer takes something. */
void wsf_vitals_stuck(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int is_stuck, uint32_t bytes);

/* Share of the last WSF_HISTORY pings that were not answered in time; those that there were not yet, were. */
uint32_t wsf_vitals_loss(const wsf_vitals *vitals);
void wsf_vitals_free(wsf_vitals *vitals, wsf_health *health);

#endif
