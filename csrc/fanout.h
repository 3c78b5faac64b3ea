/* The outboxes of all connections of one manager, and their way into the sockets.
 *
 * A *link* is what is known here of one connection: its outbox, and facts that its protocol's callbacks keep up to date,
 * so that a flush need not ask any Python object whether it may write to the socket itself. A link that has something
 * to send stands in a line; a flush walks along it and sends all that each has pending with one system call.
 *
 *   push    append a frame to the outboxes of many links (no system call; one call is one moment)
 *   plan    list the next links in line with what is to be sent to each
 *   send    send it: no Python object is touched and the GIL is not needed; helpers share the work
 *   settle  take what was sent out of the outboxes, note what became of it
 *
 * Nothing else may happen to links, outboxes and sockets between plan and settle: the event loop's thread waits in send.
 *
 * What a socket did not take makes the link *blocked*. The rest of the frame that was begun goes to the transport, which
 * tells when it has got rid of it; whole frames stay in the outbox, where they are shared and can still be replaced or
 * dropped. Limits are judged where frames are appended to a blocked link, and by wsf_fanout_expire and wsf_fanout_shed.
 *
 * A link may have one control frame besides, a ping, which leaves before all that waits in the outbox; a newer one takes its
 * place. It counts for no limit. While it cannot leave, and while it is in a transport that is not empty, it is *held*.
 *
 * A link with a *session* has a cursor besides (backlog.h): what is sent to it can be sent again. When it is closed, what waits
 * for it is kept, and so is what is pushed to it afterwards: it is *away*. When its client is back, its cursor goes over to the
 * link of the new connection, which is *behind* until all that was kept has been sent to it: what is pushed to it meanwhile is
 * kept as well, and comes after that.
 *
 * Guaranteed: frames leave a link in the order in which they were pushed (a replaced one in its place).
 * Threads: the event loop's only, except send.
 */
#ifndef WSF_FANOUT_H
#define WSF_FANOUT_H

#include "backlog.h"
#include "outbox.h"
#include "pool.h"
#include "table.h"

#if defined(_WIN32)
#define WSF_HAS_SOCKETS 0
#else
#define WSF_HAS_SOCKETS 1
#endif

/* ---- links ------------------------------------------------------------------------------------------------------------ */

enum {
    WSF_OPEN = 1,      /* data messages may be sent */
    WSF_DIRECT = 2,    /* fd is a plain stream socket that nothing else is written to behind our back */
    WSF_UNSURE = 4,    /* the library has written by itself: ask the transport before writing to the socket */
    WSF_BLOCKED = 8,   /* something waits in the transport; it will tell when that is gone */
    WSF_FRAGMENT = 16, /* a fragmented message of the application is under way */
    WSF_IN_LINE = 32,  /* to be flushed */
    WSF_LATER = 64,    /* to be flushed when the window of a coalesced broadcast ends */
    WSF_SHEDDING = 128, /* over the limit, and not yet below the mark where dropping ends */
    WSF_AWAY = 256,     /* closed, and its client may come back */
    WSF_BEHIND = 512    /* open, and not all that was kept for it has been sent */
};
#define WSF_KEEPS (WSF_AWAY | WSF_BEHIND)
#define WSF_WAITS (WSF_BLOCKED | WSF_FRAGMENT)
#define WSF_NO_MARK UINT64_MAX

/* What a push and a plan touch is the first cache line. */
typedef struct wsf_link {
    _Alignas(64) uint32_t facts;
    uint32_t variant; /* of the frames it gets */
    int fd;
    uint32_t line_at;     /* place in the line, while it is there */
    uint64_t left_out_of; /* number of the push that does not mean it; they are counted from 1, and do not come round */
    wsf_outbox outbox;    /* its keys are on the second cache line */
    uint32_t later_at, waiting_at, all_at; /* places, as line_at */
    uint64_t in_transport; /* bytes, while it is blocked: as many as there were when the transport was last asked */
    uint64_t shared;       /* of them: bytes of `rest`, which the transport has not copied */
    wsf_frame *rest;       /* owned, while `shared` is not 0 */
    int keeps_views;       /* the transport does not copy what it is given */
    int64_t blocked_ns;    /* since when it is blocked */
    int64_t asked_ns;      /* when its transport was asked */
    uint64_t room_mark;    /* somebody waits until no more bytes than this wait for it, or it is closed; see WSF_NO_MARK */
    struct wsf_link *next_roomy;
    int is_roomy; /* it is in `roomy` */
    uint64_t lost_bytes; /* of the frames that its end has dropped */
    uint64_t peak_bytes; /* most that ever waited for it */
    wsf_frame *control;      /* owned; NULL: there is none */
    int64_t control_left_ns; /* when the last one left us */
    uint8_t has_control_in_transport, is_held, was_held; /* was: when the owner took it from `holding` */
    uint8_t is_holding; /* it is in `holding` */
    struct wsf_link *next_holding;
    wsf_cursor *cursor;    /* owned; NULL: it has no session */
    PyObject *record;      /* borrowed; its address is what a link is found by */
    PyObject *handle;      /* borrowed: what the owner of the fan-out knows the link by */
} wsf_link;

static inline uint32_t wsf_link_hash(const void *link) { return wsf_pointer_hash(((const wsf_link *)link)->record); }

static inline uint64_t wsf_link_bytes(const wsf_link *link) { return link->outbox.bytes + link->in_transport; }

#define WSF_MAX_VARIANTS 16

/* ---- reports ---------------------------------------------------------------------------------------------------------- */

enum { WSF_KEEP, WSF_DROP_NEWEST, WSF_DROP_OLDEST, WSF_CONFLATE, WSF_DISCONNECT, WSF_POLICIES };
enum { WSF_BY_BYTES, WSF_BY_AGE, WSF_BY_BUDGET, WSF_BY_END, WSF_CAUSES };
enum { WSF_DROPPED, WSF_CONFLATED, WSF_TOO_SLOW, WSF_REPORTS };

typedef struct {
    wsf_link *link;
    uint8_t what, cause;
    uint32_t messages;
    uint64_t bytes; /* WSF_TOO_SLOW: that waited; else of the messages */
    double age_s;   /* of the oldest of them */
} wsf_report;

/* ---- the fan-out ------------------------------------------------------------------------------------------------------ */

typedef struct {
    uint32_t policy;
    uint64_t max_bytes, low_bytes; /* of one link */
    int64_t max_age_ns;
    uint64_t max_total_bytes; /* of `account`, but for what logs keep, which has limits of its own */
} wsf_limits;

typedef struct {
    uint64_t messages, bytes; /* taken by the kernel or a transport; payload */
    uint64_t writes;          /* system calls of the direct path */
    uint64_t through;         /* flushes of one link through its adapter */
    uint64_t blocked;         /* times that a socket or transport did not take all */
    uint64_t failed;          /* writes */
    uint64_t controls;        /* control frames, which are no messages */
    uint64_t dropped[WSF_CAUSES], conflated, too_slow[WSF_CAUSES];
} wsf_totals;

/* A ring of links; gaps are NULL. The lines and `waiting` have room for every link there is, so that no push fails for
 * want of it. */
typedef struct {
    wsf_link **links;
    uint32_t head, count, capacity;
} wsf_line;

typedef struct {
    wsf_link *link;
    const uint8_t *data; /* what to send, in one piece; NULL: the frames in the outbox; and see `direct` */
    size_t size;
    uint32_t frames; /* of the outbox that this is about */
    wsf_frame *control; /* borrowed from the link; before them */
    int direct;      /* 0: to be sent through the adapter */
    int64_t sent;    /* bytes, or -errno */
} wsf_job;

#define WSF_BATCH 256
#define WSF_PARALLEL_FROM 64 /* fewer sends are done sooner than a helper wakes up */
#define WSF_JOIN_BYTES 16384 /* frames are joined by copying up to here, and listed for the kernel beyond */

typedef struct wsf_fanout {
    int64_t account; /* bytes of messages, frames, rings, and what transports have copied; atomic */
    wsf_limits limits;
    wsf_totals totals;
    wsf_line line, later;
    wsf_link **waiting; /* links that are blocked or in the middle of a fragmented message */
    uint32_t waiting_count, waiting_capacity;
    wsf_table links; /* by record */
    int64_t table_bytes;
    wsf_link **all; /* the same links, in no order */
    uint32_t all_capacity;
    uint64_t pushes;
    int wants_reports; /* of drops and conflations; WSF_TOO_SLOW is always reported */
    wsf_report *reports;
    uint32_t report_count, report_capacity;
    int64_t now_ns; /* of the call under way */
    /* For those who wait, to be taken by the owner: messages of which nothing is pending any more, each with a reference;
     * and links that have as much room as somebody waits for. */
    wsf_backlog backlog;
    uint32_t sessions; /* links that have one */
    wsf_message *decided;
    wsf_link *roomy;
    wsf_link *holding; /* links whose control frame is held since they were taken off, or not any more */
    /* the plan */
    wsf_job jobs[WSF_BATCH];
    uint32_t job_count, settled;
    int64_t taken; /* jobs; atomic while they are being sent */
    int64_t chunk; /* jobs that a thread takes at a time */
    int64_t deadline_ns;
    uint8_t *arena;
    size_t arena_used;
} wsf_fanout;

wsf_fanout *wsf_fanout_new(const wsf_limits *limits); /* NULL: no memory */
void wsf_fanout_free(wsf_fanout *fanout);             /* it has forgotten all its links */

/* Begin with a link, which has no facts yet. WSF_OK or WSF_NO_MEMORY. link: borrowed until it is forgotten. */
int wsf_fanout_admit(wsf_fanout *fanout, wsf_link *link);
/* The link of a record, or NULL. */
wsf_link *wsf_fanout_find(const wsf_fanout *fanout, const PyObject *record);
/* Forget a link, what is reported about it, and its session. Close it before. */
void wsf_fanout_forget(wsf_fanout *fanout, wsf_link *link);

/* Facts. What they say about `line` is kept in step. */
void wsf_link_set(wsf_fanout *fanout, wsf_link *link, uint32_t facts);
void wsf_link_clear(wsf_fanout *fanout, wsf_link *link, uint32_t facts);
/* The transport did not take all: `in_transport` bytes wait there. */
void wsf_link_block(wsf_fanout *fanout, wsf_link *link, uint64_t in_transport);
/* Note in `roomy` when no more than so many bytes wait for it; at once, if that is so or it is closed. */
void wsf_link_watch(wsf_fanout *fanout, wsf_link *link, uint64_t bytes);
/* Take one off, or NULL. */
wsf_link *wsf_fanout_take_roomy(wsf_fanout *fanout);
wsf_message *wsf_fanout_take_decided(wsf_fanout *fanout);
wsf_link *wsf_fanout_take_holding(wsf_fanout *fanout);
/* Whether the transport should be asked how much it has before a frame of this size is pushed: what is known may be old,
 * and would make the policy act. */
static inline int wsf_link_is_doubtful(const wsf_fanout *fanout, const wsf_link *link, uint64_t size, int64_t now_ns)
{
    /* It may be over its limit for long: a millisecond is not old. */
    return (link->facts & (WSF_BLOCKED | WSF_OPEN)) == (WSF_BLOCKED | WSF_OPEN) && link->in_transport != 0 &&
           ((link->facts & WSF_SHEDDING) || wsf_link_bytes(link) + size > fanout->limits.max_bytes) &&
           now_ns - link->asked_ns > 1000000;
}
/* Close it for good. Everything in its outbox is dropped, and reported with this cause. */
void wsf_link_close(wsf_fanout *fanout, wsf_link *link, int cause);

/* Append a message to the outbox of each of these links, but for those whose `left_out_of` is the number of this push
 * (`pushes` + 1): the frame that is frames[variant of the link]. is_late: to be sent at the end of the window rather than
 * of the turn. A link refuses it, and the message's tally has it as dropped, if the link is closed, the policy says so, or
 * there is no memory. log: the key of the log that keeps it for links with a session; 0: one that only pushes to the same
 * links use. */
void wsf_fanout_push(wsf_fanout *fanout, wsf_link *const *links, uint32_t count, wsf_frame *const *frames, int is_late,
                     uint64_t log);

/* Begin a session: the link is behind until it is greeted. WSF_OK or WSF_NO_MEMORY. It is open and has none, and nothing waits
 * for it. */
int wsf_link_begin_session(wsf_fanout *fanout, wsf_link *link);
/* The session of a link that is closed is to go on from where the client says it is. 0: it cannot. */
int wsf_link_rewind(wsf_fanout *fanout, wsf_link *link, uint64_t received);
/* Give a link the session of another one, which is closed and no session is left to. The link is behind until it is greeted. */
void wsf_link_take_session(wsf_fanout *fanout, wsf_link *link, wsf_link *other);
void wsf_link_end_session(wsf_fanout *fanout, wsf_link *link);
/* Send this frame, which is counted nowhere, to a link that was not sent anything, and then what is kept for it. One that is
 * closed is not sent it. The reference to the frame is stolen. WSF_NO_MEMORY changes nothing. */
int wsf_link_greet(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame);
/* Give each of these links a control frame. Those that are closed are left out. */
void wsf_fanout_push_control(wsf_fanout *fanout, wsf_link *const *links, uint32_t count, wsf_frame *frame);
/* The control frame is written elsewhere. An older one that waits in the transport is held still. */
void wsf_link_take_control(wsf_fanout *fanout, wsf_link *link);
/* The window of coalesced broadcasts ends. */
void wsf_fanout_end_window(wsf_fanout *fanout);

/* Plan for the next links in line; how many. */
uint32_t wsf_fanout_plan(wsf_fanout *fanout);
/* Send by plan until the clock says deadline_ns. Without the GIL. pool: may be NULL. */
void wsf_fanout_send(wsf_fanout *fanout, wsf_pool *pool, int64_t deadline_ns);
typedef void (*wsf_count)(wsf_link *link, uint64_t messages, uint64_t bytes);

/* What is left to do for a link after its job. The rest is to be written to its transport; the link is blocked until
 * wsf_link_block or wsf_link_clear says otherwise. */
enum { WSF_DONE, WSF_THROUGH, WSF_REST, WSF_FAILED };
typedef struct {
    wsf_link *link;
    wsf_frame *frame; /* WSF_REST: owned by the caller; what is left of it begins at `offset` */
    size_t offset;
    int is_shared; /* WSF_REST: it is charged once for all who have it: the transport must be given a view of it */
    int what, error; /* WSF_FAILED: errno; the link is closed */
} wsf_remainder;

/* Settle the jobs that were carried out, up to the first that leaves a remainder; WSF_DONE after the last. count: is told
 * what was sent. */
int wsf_fanout_settle(wsf_fanout *fanout, wsf_count count, wsf_remainder *remainder);

/* The control frame, if there is one, and the first frames of the outbox have been handed to the transport, which still has
 * in_transport bytes of them. */
void wsf_link_commit(wsf_fanout *fanout, wsf_link *link, uint32_t frames, uint64_t in_transport, wsf_count count);
/* The same for frames of the outbox alone. */
void wsf_link_commit_messages(wsf_fanout *fanout, wsf_link *link, uint32_t frames, uint64_t in_transport, wsf_count count);
/* The same could not be written: the frames of the outbox among them have failed, unless they are kept, and the link is
 * closed. */
void wsf_link_fail(wsf_fanout *fanout, wsf_link *link, uint32_t frames);

/* Judge the links that wait by age. */
void wsf_fanout_expire(wsf_fanout *fanout);
/* Make all outboxes together fit max_total_bytes, worst first. */
void wsf_fanout_shed(wsf_fanout *fanout);
static inline int64_t wsf_fanout_judged(wsf_fanout *fanout)
{
    return WSF_ADD64(&fanout->account, 0) - (int64_t)fanout->backlog.bytes;
}
static inline int wsf_fanout_is_over(wsf_fanout *fanout)
{
    return wsf_fanout_judged(fanout) > (int64_t)fanout->limits.max_total_bytes;
}

/* Debug build: abort with a message if an invariant of the lines, the links or their outboxes is broken; not between plan
 * and settle. Otherwise it does nothing. */
void wsf_fanout_check(wsf_fanout *fanout);

#endif
