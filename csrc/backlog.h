/* What clients that may come back have been sent, or should have been: kept once, however many they are.
 *
 * A message that is for such a client is appended to a *log*. Messages that are addressed in the same way share one, so that
 * what one client gets of a log is nearly always all of it, from some entry on. A *cursor* is what one client has been sent:
 * *runs* of entries of logs, in the order in which it was sent them. So a message costs a log one pointer; and a client costs
 * one run for each log that it gets messages of, and one more each time that it does not get an entry in between.
 *
 * Entries have numbers, which count all logs together. Within one *era* of a cursor its messages are in the order of these
 * numbers, so that the order among its runs need not be kept: reading merges them. (A message that took the place of an older
 * one in an outbox comes before others that are older: then a new era begins.)
 *
 * Entries are let go from the oldest one on, whatever log they are in. Cursors are not told: they notice when they are used. A
 * run keeps its log, empty as it may be. A cursor that was not handed something that is gone is *broken*, and has no runs after
 * that.
 *
 * A cursor's messages are divided in two: those that were *handed* to the connection come first, and what is kept for later
 * follows. To *rewind* moves the border back to where the client says it is.
 *
 * Not guaranteed: that a cursor reaches back. What it does reach back to is without a gap.
 * Threads: the event loop's only.
 */
#ifndef WSF_BACKLOG_H
#define WSF_BACKLOG_H

#include "frame.h"
#include "table.h"

/* A run is 48 bytes. A client with more of them gets messages of too many logs, or misses too many, to be kept up with. */
#define WSF_MAX_RUNS 1024

typedef struct wsf_log {
    uint64_t key; /* by which it is found */
    wsf_frame **ring; /* owned, plain */
    uint32_t head, count, capacity;
    uint32_t runs; /* that refer to it */
    uint64_t first; /* the place of the entry at the head, counted from the log's first ever */
} wsf_log;

typedef struct {
    uint64_t max_messages, max_bytes; /* of memory */
    int64_t max_age_ns;
} wsf_backlog_limits;

typedef struct {
    int64_t *account;
    wsf_backlog_limits limits;
    wsf_table logs; /* by key */
    int64_t table_bytes;
    wsf_log **order; /* ring: the log of each entry, from the oldest on */
    uint32_t head, count, capacity;
    uint64_t first_number; /* of the oldest entry; they are counted from 1 */
    uint64_t bytes;
} wsf_backlog;

typedef struct {
    wsf_log *log;
    uint64_t first;       /* place in the log */
    uint64_t from_number; /* that the first had once: none of the run's is smaller */
    uint64_t next_number; /* of the first that was not handed, if there is one */
    uint32_t count;
    uint32_t taken; /* of them, that were handed */
    uint32_t era;
    uint32_t before; /* of them, that have numbers before some other; while they are counted */
} wsf_run;

typedef struct {
    wsf_run *runs; /* in the order of (era, from_number) */
    uint32_t count, capacity;
    uint32_t last; /* was extended last; may be out of range */
    uint32_t low;  /* nothing is left in the runs before */
    uint32_t era;
    int is_broken; /* something that was not handed is not there any more */
    uint64_t last_number;
    uint64_t recorded, handed; /* messages since the beginning */
} wsf_cursor;

/* account: is charged for all memory but that of frames, which is charged already. */
void wsf_backlog_init(wsf_backlog *backlog, int64_t *account);
/* Let go of all entries. Afterwards only cursors have memory here. */
void wsf_backlog_clear(wsf_backlog *backlog);
/* Append to the log with this key. Its message is told where it is, unless it is too large or there is no memory: then it is
 * as one that was let go. One that is kept already stays where it is. frame: a reference is taken. */
void wsf_backlog_add(wsf_backlog *backlog, uint64_t key, wsf_frame *frame);
/* This frame has been given its object (wsf_frame_keep). If it is kept, the next one that is added makes up for it. */
void wsf_backlog_note_object(wsf_backlog *backlog, const wsf_frame *frame);
/* Let go of what is older than the limit. */
void wsf_backlog_expire(wsf_backlog *backlog, int64_t now_ns);

/* Note that this message, the next one, was handed to the connection, or is kept for later. */
void wsf_cursor_add(wsf_backlog *backlog, wsf_cursor *cursor, const wsf_message *message, int is_handed);
/* The next one that was not handed, borrowed; NULL if there is none, or if the cursor is broken. */
wsf_frame *wsf_cursor_peek(const wsf_backlog *backlog, wsf_cursor *cursor);
/* That one is handed. Nothing else has happened to the cursor since. */
void wsf_cursor_take(wsf_cursor *cursor);
/* The client has been given so many messages since the beginning: these are let go, and those that follow are not handed.
 * Returns 0 if there is a gap; then the cursor is of no use any more. */
int wsf_cursor_rewind(wsf_backlog *backlog, wsf_cursor *cursor, uint64_t received);
void wsf_cursor_clear(wsf_backlog *backlog, wsf_cursor *cursor);

/* Debug build: abort with a message if an invariant is broken. Otherwise they do nothing. */
void wsf_backlog_check(const wsf_backlog *backlog);
void wsf_cursor_check(const wsf_backlog *backlog, const wsf_cursor *cursor);

#endif
