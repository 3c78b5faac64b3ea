/* Lines, limits, and the way into the sockets; see fanout.h. */
#include "fanout.h"

#include <errno.h>
#include <stdlib.h>

#if WSF_HAS_SOCKETS
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#endif

#define ARENA_BYTES (64 * WSF_JOIN_BYTES)
/* What a thread takes at a time, in jobs and in bytes: some 30 microseconds of work. */
#define CHUNK 8
#define CHUNK_BYTES 65536
/* How many links ahead a walk asks for memory. */
#define AHEAD 8
/* Frames in one call for the kernel, which allows 1,024; they lie on the stack. */
#define MAX_PIECES 256
/* Frames that are put into an outbox at a time of those that were kept. With WSF_JOIN_BYTES, so much that links which get the
 * same share one piece, and a client that is slow again has not made us keep its messages twice. */
#define MAX_AGAIN 256

/* ---- life --------------------------------------------------------------------------------------------------------- */

wsf_fanout *wsf_fanout_new(const wsf_limits *limits)
{
    wsf_fanout *fanout = PyMem_RawMalloc(sizeof *fanout);
    if (fanout == NULL)
        return NULL;
    memset(fanout, 0, sizeof *fanout);
    fanout->limits = *limits;
    wsf_backlog_init(&fanout->backlog, &fanout->account);
    return fanout;
}

void wsf_fanout_free(wsf_fanout *fanout)
{
    WSF_ASSERT(fanout->links.used == 0 && fanout->waiting_count == 0 && fanout->decided == NULL && fanout->sessions == 0);
    wsf_backlog_clear(&fanout->backlog);
    wsf_table_free(&fanout->links, &fanout->table_bytes);
    PyMem_RawFree(fanout->line.links);
    PyMem_RawFree(fanout->later.links);
    PyMem_RawFree(fanout->waiting);
    PyMem_RawFree(fanout->all);
    PyMem_RawFree(fanout->reports);
    PyMem_RawFree(fanout->arena);
    PyMem_RawFree(fanout);
}

/* ---- lines ---------------------------------------------------------------------------------------------------------- */

static inline uint32_t *place_in(wsf_fanout *fanout, wsf_line *line, wsf_link *link)
{
    return line == &fanout->line ? &link->line_at : &link->later_at;
}

/* Room for `count` links, and for as many gaps. */
static int reserve_line(wsf_fanout *fanout, wsf_line *line, uint32_t count)
{
    if (2 * (uint64_t)count <= line->capacity)
        return WSF_OK;
    uint32_t capacity = line->capacity == 0 ? 64 : 2 * line->capacity, kept = 0;
    wsf_link **links = PyMem_RawMalloc(capacity * sizeof *links);
    if (links == NULL)
        return WSF_NO_MEMORY;
    for (uint32_t i = 0; i < line->count; i++) {
        wsf_link *link = line->links[(line->head + i) & (line->capacity - 1)];
        if (link != NULL) {
            *place_in(fanout, line, link) = kept;
            links[kept++] = link;
        }
    }
    PyMem_RawFree(line->links);
    line->links = links;
    line->head = 0;
    line->count = kept;
    line->capacity = capacity;
    return WSF_OK;
}

static void line_pop(wsf_line *line)
{
    line->head = (line->head + 1) & (line->capacity - 1);
    line->count--;
}

static void close_gaps(wsf_fanout *fanout, wsf_line *line)
{
    uint32_t kept = 0, mask = line->capacity - 1;
    for (uint32_t i = 0; i < line->count; i++) {
        wsf_link *link = line->links[(line->head + i) & mask];
        if (link != NULL) {
            *place_in(fanout, line, link) = (line->head + kept) & mask;
            line->links[(line->head + kept++) & mask] = link;
        }
    }
    line->count = kept;
}

static void line_push(wsf_fanout *fanout, wsf_line *line, wsf_link *link, uint32_t fact)
{
    if (link->facts & fact)
        return;
    if (line->count == line->capacity)
        close_gaps(fanout, line);
    uint32_t at = (line->head + line->count++) & (line->capacity - 1);
    line->links[at] = link;
    *place_in(fanout, line, link) = at;
    link->facts |= fact;
}

static void line_leave(wsf_fanout *fanout, wsf_line *line, wsf_link *link, uint32_t fact)
{
    if (link->facts & fact)
        line->links[*place_in(fanout, line, link)] = NULL;
    link->facts &= ~fact;
}

void wsf_fanout_end_window(wsf_fanout *fanout)
{
    for (; fanout->later.count != 0; line_pop(&fanout->later)) {
        wsf_link *link = fanout->later.links[fanout->later.head];
        if (link == NULL)
            continue;
        link->facts &= ~(uint32_t)WSF_LATER;
        if (link->outbox.count != 0 && !(link->facts & WSF_WAITS))
            line_push(fanout, &fanout->line, link, WSF_IN_LINE);
    }
}

static int reserve(wsf_link ***links, uint32_t *capacity, uint32_t count)
{
    if (count <= *capacity)
        return WSF_OK;
    uint32_t more = *capacity == 0 ? 64 : 2 * *capacity;
    wsf_link **moved = PyMem_RawRealloc(*links, more * sizeof *moved);
    if (moved == NULL)
        return WSF_NO_MEMORY;
    *links = moved;
    *capacity = more;
    return WSF_OK;
}

int wsf_fanout_admit(wsf_fanout *fanout, wsf_link *link)
{
    uint32_t count = fanout->links.used + 1;
    if (reserve_line(fanout, &fanout->line, count) != WSF_OK || reserve_line(fanout, &fanout->later, count) != WSF_OK ||
        reserve(&fanout->waiting, &fanout->waiting_capacity, count) != WSF_OK ||
        reserve(&fanout->all, &fanout->all_capacity, count) != WSF_OK)
        return WSF_NO_MEMORY;
    if (wsf_table_insert(&fanout->links, &fanout->table_bytes, wsf_link_hash(link), link, wsf_link_hash) != WSF_OK)
        return WSF_NO_MEMORY;
    link->all_at = count - 1;
    link->room_mark = WSF_NO_MARK;
    fanout->all[link->all_at] = link;
    WSF_COUNT_LIVE(WSF_LIVE_LINK, 1);
    return WSF_OK;
}

static int is_of_record(const void *item, const void *record) { return ((const wsf_link *)item)->record == record; }

wsf_link *wsf_fanout_find(const wsf_fanout *fanout, const PyObject *record)
{
    return wsf_table_find(&fanout->links, wsf_pointer_hash(record), record, is_of_record);
}

/* ---- reports ---------------------------------------------------------------------------------------------------------- */

static double age_s(const wsf_fanout *fanout, int64_t since_ns) { return (double)(fanout->now_ns - since_ns) / 1e9; }

/* Without memory for it, what happened is in the totals only. */
static void report(wsf_fanout *fanout, wsf_report entry)
{
    if (entry.what != WSF_TOO_SLOW && !fanout->wants_reports)
        return;
    if (fanout->report_count == fanout->report_capacity) {
        uint32_t capacity = fanout->report_capacity == 0 ? 32 : 2 * fanout->report_capacity;
        wsf_report *reports = PyMem_RawRealloc(fanout->reports, capacity * sizeof *reports);
        if (reports == NULL)
            return;
        fanout->reports = reports;
        fanout->report_capacity = capacity;
    }
    fanout->reports[fanout->report_count++] = entry;
}

/* Nobody can be told about a link that is gone. */
static void withdraw_reports(wsf_fanout *fanout, const wsf_link *link)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < fanout->report_count; i++)
        if (fanout->reports[i].link != link)
            fanout->reports[kept++] = fanout->reports[i];
    fanout->report_count = kept;
}

/* ---- what becomes of an entry -------------------------------------------------------------------------------------------- */

static void resolve(wsf_fanout *fanout, wsf_entry entry, uint32_t *outcome)
{
    wsf_message *message = wsf_entry_frame(entry)->message;
    if (entry & WSF_AGAIN)
        return;
    ++*outcome;
    if (entry & WSF_QUEUED) {
        message->tally.queued--;
    } else if (--message->tally.pending == 0 && message->waiter != NULL) {
        message->next = fanout->decided;
        fanout->decided = wsf_message_retain(message);
    }
}

wsf_message *wsf_fanout_take_decided(wsf_fanout *fanout)
{
    wsf_message *message = fanout->decided;
    if (message != NULL)
        fanout->decided = message->next;
    return message;
}

static void note_room(wsf_fanout *fanout, wsf_link *link)
{
    if (link->is_roomy || link->room_mark == WSF_NO_MARK ||
        (wsf_link_bytes(link) > link->room_mark && (link->facts & WSF_OPEN)))
        return;
    link->room_mark = WSF_NO_MARK;
    link->is_roomy = 1;
    link->next_roomy = fanout->roomy;
    fanout->roomy = link;
}

wsf_link *wsf_fanout_take_roomy(wsf_fanout *fanout)
{
    wsf_link *link = fanout->roomy;
    if (link != NULL) {
        fanout->roomy = link->next_roomy;
        link->is_roomy = 0;
    }
    return link;
}

/* ---- control frames ------------------------------------------------------------------------------------------------------ */

/* The owner is to know whether it is held. */
static void note_held(wsf_fanout *fanout, wsf_link *link)
{
    link->is_held = link->has_control_in_transport || (link->control != NULL && (link->facts & WSF_BLOCKED));
    if (link->is_holding || link->is_held == link->was_held)
        return;
    link->is_holding = 1;
    link->next_holding = fanout->holding;
    fanout->holding = link;
}

wsf_link *wsf_fanout_take_holding(wsf_fanout *fanout)
{
    wsf_link *link = fanout->holding;
    if (link != NULL) {
        fanout->holding = link->next_holding;
        link->is_holding = 0;
        link->was_held = link->is_held;
    }
    return link;
}

static void end_control(wsf_fanout *fanout, wsf_link *link, int is_in_transport)
{
    if (link->control != NULL)
        wsf_frame_release(link->control);
    link->control = NULL;
    link->has_control_in_transport = (uint8_t)is_in_transport;
    note_held(fanout, link);
}

/* It has been handed to the kernel, or to a transport. */
static void control_left(wsf_fanout *fanout, wsf_link *link, int is_in_transport)
{
    fanout->totals.controls++;
    link->control_left_ns = fanout->now_ns;
    end_control(fanout, link, is_in_transport);
}

void wsf_link_take_control(wsf_fanout *fanout, wsf_link *link)
{
    if (link->control != NULL)
        control_left(fanout, link, link->has_control_in_transport); /* an older one may be there still */
}

void wsf_link_watch(wsf_fanout *fanout, wsf_link *link, uint64_t bytes)
{
    if (link->room_mark == WSF_NO_MARK || link->room_mark < bytes)
        link->room_mark = bytes;
    note_room(fanout, link);
}

static inline wsf_tally *tally_of(wsf_entry entry) { return &wsf_entry_frame(entry)->message->tally; }

/* What is judged against max_bytes. Where the latest of each key is to be kept, what has been handed to the transport counts
 * for nothing: it cannot give way for them, however long it is. */
static uint64_t judged_bytes(const wsf_fanout *fanout, const wsf_link *link)
{
    return fanout->limits.policy == WSF_CONFLATE ? link->outbox.bytes : wsf_link_bytes(link);
}

/* What is sent once more stands before everything else. There is no more of it than fits one write. */
static uint32_t count_again(wsf_link *link)
{
    uint32_t again = 0;
    while (again < link->outbox.count && (*wsf_outbox_at(&link->outbox, again) & WSF_AGAIN))
        again++;
    return again;
}

/* Drop from the front as long as there is something and more than `keep_bytes` is judged, or it is from before `before_ns`;
 * but not what is sent once more, which its client counts on. Returns how many, and reports them. */
static uint32_t drop_front(wsf_fanout *fanout, wsf_link *link, uint64_t keep_bytes, int64_t before_ns, int cause)
{
    wsf_report dropped = {.link = link, .what = WSF_DROPPED, .cause = (uint8_t)cause};
    const uint32_t again = count_again(link);
    while (link->outbox.count > again) {
        const wsf_message *first = wsf_entry_frame(*wsf_outbox_at(&link->outbox, again))->message;
        if (judged_bytes(fanout, link) <= keep_bytes && first->created_ns >= before_ns)
            break;
        if (dropped.messages++ == 0)
            dropped.age_s = age_s(fanout, first->created_ns);
        wsf_entry entry = wsf_outbox_take(&link->outbox, &fanout->account, again);
        dropped.bytes += first->payload_size;
        if (cause == WSF_BY_END)
            link->lost_bytes += wsf_entry_frame(entry)->size;
        resolve(fanout, entry, &tally_of(entry)->dropped);
        wsf_frame_release(wsf_entry_frame(entry));
    }
    fanout->totals.dropped[cause] += dropped.messages;
    if (dropped.messages != 0)
        report(fanout, dropped);
    note_room(fanout, link);
    return dropped.messages;
}

#define OF_ANY_AGE INT64_MIN

/* Keep what waits for a link whose client may come back. */
static void keep_all(wsf_fanout *fanout, wsf_link *link)
{
    while (link->outbox.count != 0) {
        wsf_entry entry = wsf_outbox_pop(&link->outbox, &fanout->account);
        wsf_frame *frame = wsf_entry_frame(entry);
        link->lost_bytes += frame->size;
        if (!(entry & WSF_AGAIN)) {
            wsf_cursor_add(&fanout->backlog, link->cursor, frame->message, 0);
            resolve(fanout, entry, &frame->message->tally.away);
        }
        wsf_frame_release(frame);
    }
    note_room(fanout, link);
}

static uint32_t drop_all(wsf_fanout *fanout, wsf_link *link, int cause)
{
    return drop_front(fanout, link, 0, INT64_MAX, cause);
}

static void note_peak(wsf_link *link)
{
    uint64_t bytes = wsf_link_bytes(link);
    link->peak_bytes = bytes > link->peak_bytes ? bytes : link->peak_bytes;
}

/* ---- facts --------------------------------------------------------------------------------------------------------------- */

static void begin_waiting(wsf_fanout *fanout, wsf_link *link)
{
    link->waiting_at = fanout->waiting_count;
    fanout->waiting[fanout->waiting_count++] = link;
    line_leave(fanout, &fanout->line, link, WSF_IN_LINE);
    for (uint32_t place = 0; place < link->outbox.count; place++) {
        wsf_entry *entry = wsf_outbox_at(&link->outbox, place);
        if (!(*entry & (WSF_QUEUED | WSF_AGAIN))) {
            resolve(fanout, *entry, &tally_of(*entry)->queued);
            *entry |= WSF_QUEUED;
        }
    }
    note_peak(link);
}

static int has_something(const wsf_link *link) { return link->outbox.count != 0 || link->control != NULL; }

static void give_up(wsf_fanout *fanout, wsf_link *link, int cause);

/* Put the next of what is kept into the outbox of a link that has nothing there, but for a greeting. When nothing is left, it
 * has caught up. */
static void refill(wsf_fanout *fanout, wsf_link *link)
{
    wsf_outbox *outbox = &link->outbox;
    wsf_frame *frame;
    if (!(link->facts & WSF_BEHIND))
        return;
    while ((frame = wsf_cursor_peek(&fanout->backlog, link->cursor)) != NULL) {
        if (outbox->count == MAX_AGAIN || (outbox->count != 0 && outbox->bytes + frame->size > WSF_JOIN_BYTES))
            return;
        if (wsf_outbox_push(outbox, &fanout->account, frame, WSF_AGAIN) != WSF_OK)
            return; /* when this has been sent, there may be memory; the first needs none */
        wsf_frame_retain(frame, 1);
        wsf_cursor_take(link->cursor);
    }
    if (link->cursor->is_broken)
        give_up(fanout, link, WSF_BY_BYTES); /* it came too late for what the log had */
    else
        link->facts &= ~(uint32_t)WSF_BEHIND;
}

static void end_waiting(wsf_fanout *fanout, wsf_link *link)
{
    wsf_link *last = fanout->waiting[--fanout->waiting_count];
    fanout->waiting[link->waiting_at] = last;
    last->waiting_at = link->waiting_at;
    if (wsf_link_bytes(link) <= fanout->limits.low_bytes)
        link->facts &= ~(uint32_t)WSF_SHEDDING;
    if (has_something(link))
        line_push(fanout, &fanout->line, link, WSF_IN_LINE);
}

void wsf_link_set(wsf_fanout *fanout, wsf_link *link, uint32_t facts)
{
    uint32_t before = link->facts;
    link->facts |= facts;
    if (!(before & WSF_WAITS) && (facts & WSF_WAITS))
        begin_waiting(fanout, link);
    note_held(fanout, link);
}

/* Bytes that the transport has copied. What it has not is the first that it writes, and charged as a frame. */
static int64_t copied_bytes(const wsf_link *link)
{
    return link->in_transport > link->shared ? (int64_t)(link->in_transport - link->shared) : 0;
}

static void set_in_transport(wsf_fanout *fanout, wsf_link *link, uint64_t in_transport)
{
    int64_t before = copied_bytes(link);
    link->in_transport = in_transport;
    if (in_transport < link->shared)
        link->shared = in_transport;
    if (link->shared == 0 && link->rest != NULL) {
        wsf_frame_release(link->rest);
        link->rest = NULL;
    }
    (void)WSF_ADD64(&fanout->account, copied_bytes(link) - before);
    link->asked_ns = fanout->now_ns;
    note_room(fanout, link);
}

void wsf_link_clear(wsf_fanout *fanout, wsf_link *link, uint32_t facts)
{
    uint32_t before = link->facts;
    if (facts & WSF_BLOCKED) {
        set_in_transport(fanout, link, 0);
        if (link->has_control_in_transport)
            link->control_left_ns = fanout->now_ns;
        link->has_control_in_transport = 0;
    }
    link->facts &= ~facts;
    note_held(fanout, link);
    if ((before & WSF_WAITS) && !(link->facts & WSF_WAITS))
        end_waiting(fanout, link);
}

void wsf_link_block(wsf_fanout *fanout, wsf_link *link, uint64_t in_transport)
{
    if (!(link->facts & WSF_BLOCKED)) {
        link->blocked_ns = fanout->now_ns;
        fanout->totals.blocked++;
    }
    set_in_transport(fanout, link, in_transport);
    wsf_link_set(fanout, link, WSF_BLOCKED);
    note_peak(link);
}

void wsf_link_close(wsf_fanout *fanout, wsf_link *link, int cause)
{
    link->facts &= ~(uint32_t)(WSF_OPEN | WSF_DIRECT | WSF_BEHIND);
    end_control(fanout, link, 0);
    if (link->cursor != NULL) {
        link->facts |= WSF_AWAY;
        keep_all(fanout, link);
        return;
    }
    (void)drop_all(fanout, link, cause);
    while (link->outbox.count != 0) /* a greeting, which is no message; or what a session had that has ended */
        wsf_frame_release(wsf_entry_frame(wsf_outbox_pop(&link->outbox, &fanout->account)));
}

/* ---- sessions ------------------------------------------------------------------------------------------------------------ */

int wsf_link_begin_session(wsf_fanout *fanout, wsf_link *link)
{
    link->cursor = PyMem_RawMalloc(sizeof *link->cursor);
    if (link->cursor == NULL)
        return WSF_NO_MEMORY;
    memset(link->cursor, 0, sizeof *link->cursor);
    (void)WSF_ADD64(&fanout->account, (int64_t)sizeof *link->cursor);
    link->facts |= WSF_BEHIND;
    fanout->sessions++;
    return WSF_OK;
}

void wsf_link_end_session(wsf_fanout *fanout, wsf_link *link)
{
    if (link->cursor == NULL)
        return;
    fanout->totals.dropped[WSF_BY_END] += link->cursor->recorded - link->cursor->handed;
    wsf_cursor_clear(&fanout->backlog, link->cursor);
    (void)WSF_ADD64(&fanout->account, -(int64_t)sizeof *link->cursor);
    PyMem_RawFree(link->cursor);
    link->cursor = NULL;
    link->facts &= ~(uint32_t)WSF_KEEPS;
    if (--fanout->sessions == 0)
        wsf_backlog_clear(&fanout->backlog); /* for nobody */
}

int wsf_link_rewind(wsf_fanout *fanout, wsf_link *link, uint64_t received)
{
    wsf_backlog_expire(&fanout->backlog, fanout->now_ns);
    return link->cursor != NULL && wsf_cursor_rewind(&fanout->backlog, link->cursor, received);
}

void wsf_link_take_session(wsf_fanout *fanout, wsf_link *link, wsf_link *other)
{
    (void)fanout;
    link->cursor = other->cursor;
    link->facts |= WSF_BEHIND;
    other->cursor = NULL;
    other->facts &= ~(uint32_t)WSF_KEEPS;
}

int wsf_link_greet(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame)
{
    if (!(link->facts & WSF_OPEN)) {
        wsf_frame_release(frame);
        return WSF_OK;
    }
    int outcome = wsf_outbox_push(&link->outbox, &fanout->account, frame, WSF_AGAIN);
    if (outcome != WSF_OK)
        return outcome;
    refill(fanout, link);
    if (!(link->facts & WSF_WAITS) && has_something(link))
        line_push(fanout, &fanout->line, link, WSF_IN_LINE);
    return WSF_OK;
}

void wsf_fanout_forget(wsf_fanout *fanout, wsf_link *link)
{
    WSF_ASSERT(!(link->facts & WSF_OPEN) && link->outbox.count == 0 && link->control == NULL);
    for (wsf_link **at = &fanout->roomy; link->is_roomy; at = &(*at)->next_roomy)
        if (*at == link) {
            *at = link->next_roomy;
            link->is_roomy = 0;
            break;
        }
    wsf_link_clear(fanout, link, WSF_WAITS);
    for (wsf_link **at = &fanout->holding; link->is_holding; at = &(*at)->next_holding)
        if (*at == link) {
            *at = link->next_holding;
            link->is_holding = 0;
            break;
        }
    line_leave(fanout, &fanout->line, link, WSF_IN_LINE);
    line_leave(fanout, &fanout->later, link, WSF_LATER);
    withdraw_reports(fanout, link);
    wsf_link_end_session(fanout, link);
    wsf_link *last = fanout->all[fanout->links.used - 1];
    fanout->all[link->all_at] = last;
    last->all_at = link->all_at;
    wsf_table_remove(&fanout->links, &fanout->table_bytes, wsf_link_hash(link), link, wsf_link_hash);
    WSF_COUNT_LIVE(WSF_LIVE_LINK, -1);
}

/* ---- limits ------------------------------------------------------------------------------------------------------------- */

/* Since when something waits for a link that waits; INT64_MAX: that cannot be said. A peer that takes a little now and then is
 * blocked anew each time. */
static int64_t waits_since_ns(wsf_link *link)
{
    int64_t since_ns = (link->facts & WSF_BLOCKED) ? link->blocked_ns : INT64_MAX;
    if (link->outbox.count != 0 && !(*wsf_outbox_at(&link->outbox, 0) & WSF_AGAIN)) {
        int64_t created_ns = wsf_entry_frame(*wsf_outbox_at(&link->outbox, 0))->message->created_ns;
        since_ns = created_ns < since_ns ? created_ns : since_ns;
    }
    return since_ns;
}

static void give_up(wsf_fanout *fanout, wsf_link *link, int cause)
{
    int64_t since_ns = waits_since_ns(link);
    report(fanout, (wsf_report){link, WSF_TOO_SLOW, (uint8_t)cause, link->outbox.count, wsf_link_bytes(link),
                                since_ns == INT64_MAX ? 0 : age_s(fanout, since_ns)});
    fanout->totals.too_slow[cause]++;
    wsf_link_close(fanout, link, cause);
}

/* Whether a frame may be appended to a link that waits, after what the policy does for it. */
static int make_way(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame)
{
    const wsf_limits *limits = &fanout->limits;
    wsf_message *message = frame->message;
    uint64_t waits = judged_bytes(fanout, link);
    if ((link->facts & WSF_SHEDDING) && waits <= limits->low_bytes)
        link->facts &= ~(uint32_t)WSF_SHEDDING;
    if (limits->policy == WSF_KEEP || waits == 0)
        return 1;
    if (!(link->facts & WSF_SHEDDING) && waits + frame->size <= limits->max_bytes)
        return 1;
    if (limits->policy == WSF_DISCONNECT) {
        give_up(fanout, link, WSF_BY_BYTES);
        message->tally.disconnected++;
        return 0;
    }
    if (limits->policy != WSF_DROP_NEWEST) {
        uint64_t keep_bytes = limits->low_bytes > frame->size ? limits->low_bytes - frame->size : 0;
        message->tally.displaced += drop_front(fanout, link, keep_bytes, OF_ANY_AGE, WSF_BY_BYTES);
        return 1;
    }
    link->facts |= WSF_SHEDDING;
    fanout->totals.dropped[WSF_BY_BYTES]++;
    report(fanout, (wsf_report){link, WSF_DROPPED, WSF_BY_BYTES, 1, message->payload_size, 0});
    return 0;
}

void wsf_fanout_expire(wsf_fanout *fanout)
{
    int64_t before_ns = fanout->now_ns - fanout->limits.max_age_ns;
    if (fanout->limits.policy == WSF_KEEP)
        return;
    for (uint32_t i = 0; i < fanout->waiting_count; i++) {
        wsf_link *link = fanout->waiting[i];
        if (!(link->facts & WSF_OPEN))
            continue;
        if (fanout->limits.policy != WSF_DISCONNECT)
            (void)drop_front(fanout, link, UINT64_MAX, before_ns, WSF_BY_AGE);
        else if ((link->facts & WSF_BLOCKED) && waits_since_ns(link) < before_ns)
            give_up(fanout, link, WSF_BY_AGE);
    }
}

static int by_bytes_down(const void *left, const void *right)
{
    uint64_t a = wsf_link_bytes(*(wsf_link *const *)left), b = wsf_link_bytes(*(wsf_link *const *)right);
    return (a < b) - (a > b);
}

void wsf_fanout_shed(wsf_fanout *fanout)
{
    const int64_t enough = (int64_t)(fanout->limits.max_total_bytes - fanout->limits.max_total_bytes / 8);
    int drops = fanout->limits.policy != WSF_KEEP && fanout->limits.policy != WSF_DISCONNECT;
    uint32_t count = fanout->waiting_count;
    int64_t leaving = 0; /* bytes in the transports of those who are given up: they are charged until they are forgotten */
    if (!wsf_fanout_is_over(fanout) || count == 0)
        return;
    /* The order of `waiting` itself means nothing. */
    qsort(fanout->waiting, count, sizeof *fanout->waiting, by_bytes_down);
    for (uint32_t i = 0; i < count; i++)
        fanout->waiting[i]->waiting_at = i;
    for (uint32_t i = 0; drops && i < count && wsf_fanout_judged(fanout) > enough; i++)
        (void)drop_all(fanout, fanout->waiting[i], WSF_BY_BUDGET);
    for (uint32_t i = 0; i < count && wsf_fanout_judged(fanout) - leaving > enough; i++) {
        wsf_link *link = fanout->waiting[i];
        if (wsf_link_bytes(link) == 0)
            continue;
        give_up(fanout, link, WSF_BY_BUDGET); /* also who is closing: that it has what it has is no excuse */
        leaving += copied_bytes(link);
    }
}

/* ---- push ------------------------------------------------------------------------------------------------------------------ */

/* Put the frame in the place of an older one with its key, if one waits. */
static int replace(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame)
{
    wsf_tally *tally = &frame->message->tally;
    int64_t place = wsf_outbox_find(&link->outbox, &fanout->account, frame->message->key);
    if (place < 0)
        return 0;
    wsf_entry queued = *wsf_outbox_at(&link->outbox, (uint32_t)place) & WSF_QUEUED;
    wsf_entry former = wsf_outbox_replace(&link->outbox, (uint32_t)place, frame, queued);
    const wsf_message *older = wsf_entry_frame(former)->message;
    tally->targets++;
    tally->displaced++;
    if (queued)
        tally->queued++;
    else
        tally->pending++;
    resolve(fanout, former, &tally_of(former)->dropped);
    fanout->totals.conflated++;
    report(fanout, (wsf_report){link, WSF_CONFLATED, WSF_BY_BYTES, 1, older->payload_size,
                                age_s(fanout, older->created_ns)});
    wsf_frame_release(wsf_entry_frame(former));
    if ((link->facts & WSF_WAITS) && judged_bytes(fanout, link) > fanout->limits.max_bytes && link->outbox.count > 1) {
        uint32_t dropped = tally->dropped; /* it may be among them, and has not displaced itself */
        tally->displaced += drop_front(fanout, link, fanout->limits.max_bytes, OF_ANY_AGE, WSF_BY_BYTES);
        tally->displaced -= tally->dropped - dropped;
    }
    if (link->facts & WSF_WAITS)
        note_peak(link);
    note_room(fanout, link);
    return 1;
}

static void get_in_line(wsf_fanout *fanout, wsf_link *link, int is_late)
{
    if (is_late)
        line_push(fanout, &fanout->later, link, WSF_LATER);
    else
        line_push(fanout, &fanout->line, link, WSF_IN_LINE);
}

/* The frame is for later: the log has it. */
static int keep(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame)
{
    wsf_cursor_add(&fanout->backlog, link->cursor, frame->message, 0);
    frame->message->tally.targets++;
    frame->message->tally.away++;
    return 0;
}

/* Whether the link has taken the frame, and the reference to it. The message's tally has it in any case. */
static int append(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame, int is_late)
{
    wsf_tally *tally = &frame->message->tally;
    int waits = (link->facts & WSF_WAITS) != 0;
    if (link->facts & WSF_KEEPS)
        return keep(fanout, link, frame);
    if ((link->facts & WSF_OPEN) && fanout->limits.policy == WSF_CONFLATE && frame->message->key != NULL &&
        link->outbox.count != 0 && replace(fanout, link, frame)) {
        if (!waits)
            get_in_line(fanout, link, is_late); /* the older one may have been for the end of the window */
        return 1;
    }
    if (!(link->facts & WSF_OPEN) || (waits && !make_way(fanout, link, frame)) ||
        wsf_outbox_push(&link->outbox, &fanout->account, frame, waits ? WSF_QUEUED : 0) != WSF_OK) {
        if (link->facts & WSF_AWAY) /* it was given up just now */
            return keep(fanout, link, frame);
        tally->targets++;
        tally->dropped++;
        return 0;
    }
    tally->targets++;
    if (waits) {
        tally->queued++;
        note_peak(link);
    } else {
        tally->pending++;
        get_in_line(fanout, link, is_late);
    }
    return 1;
}

/* One atomic instruction for each frame, instead of one for each link. */
static void retain_for_all(wsf_link *const *links, uint32_t count, wsf_frame *const *frames)
{
    int64_t uses[WSF_MAX_VARIANTS] = {0};
    for (uint32_t i = 0; i < count; i++) {
        if (i + AHEAD < count)
            WSF_PREFETCH(links[i + AHEAD]);
        uses[links[i]->variant]++;
    }
    for (uint32_t variant = 0; variant < WSF_MAX_VARIANTS; variant++)
        if (uses[variant] != 0)
            wsf_frame_retain(frames[variant], uses[variant]);
}

/* A key for those who are always sent to together: it does not depend on their order. */
static uint64_t key_of(wsf_link *const *links, uint32_t count)
{
    uint64_t key = count;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t mixed = (uint64_t)(uintptr_t)links[i]->record * UINT64_C(0x9E3779B97F4A7C15);
        key += mixed ^ (mixed >> 32);
    }
    return key;
}

/* Keep the message if it is for anybody who may come back. */
static void log_message(wsf_fanout *fanout, wsf_link *const *links, uint32_t count, wsf_frame *frame, uint64_t log)
{
    for (uint32_t i = 0; i < count; i++)
        if (links[i]->cursor != NULL && links[i]->left_out_of != fanout->pushes) {
            wsf_backlog_add(&fanout->backlog, log != 0 ? log : key_of(links, count), frame);
            return;
        }
}

void wsf_fanout_push(wsf_fanout *fanout, wsf_link *const *links, uint32_t count, wsf_frame *const *frames, int is_late,
                     uint64_t log)
{
    uint64_t number = ++fanout->pushes;
    fanout->now_ns = frames[0]->message->created_ns;
    if (fanout->sessions != 0)
        log_message(fanout, links, count, frames[0], log);
    retain_for_all(links, count, frames);
    for (uint32_t i = 0; i < count; i++) {
        wsf_link *link = links[i];
        if (i + AHEAD < count) {
            WSF_PREFETCH_WRITE(links[i + AHEAD]);
            WSF_PREFETCH_WRITE(links[i + AHEAD / 2]->outbox.ring);
        }
        if (link->left_out_of == number || !append(fanout, link, frames[link->variant], is_late))
            wsf_frame_release(frames[link->variant]);
    }
}

void wsf_fanout_push_control(wsf_fanout *fanout, wsf_link *const *links, uint32_t count, wsf_frame *frame)
{
    fanout->now_ns = frame->message->created_ns;
    for (uint32_t i = 0; i < count; i++) {
        wsf_link *link = links[i];
        if (i + AHEAD < count)
            WSF_PREFETCH_WRITE(links[i + AHEAD]);
        if (!(link->facts & WSF_OPEN))
            continue;
        wsf_frame_retain(frame, 1);
        if (link->control != NULL)
            wsf_frame_release(link->control);
        link->control = frame;
        if (!(link->facts & WSF_WAITS))
            get_in_line(fanout, link, 0);
        note_held(fanout, link);
    }
}

/* ---- plan --------------------------------------------------------------------------------------------------------------------- */

static int same_frames(wsf_outbox *a, wsf_outbox *b)
{
    if (a->count != b->count || a->bytes != b->bytes)
        return 0;
    for (uint32_t place = 0; place < a->count; place++)
        if (wsf_entry_frame(*wsf_outbox_at(a, place)) != wsf_entry_frame(*wsf_outbox_at(b, place)))
            return 0;
    return 1;
}

static uint8_t *add_piece(uint8_t *end, const wsf_frame *frame)
{
    memcpy(end, frame->data, frame->size);
    return end + frame->size;
}

/* All that a job has to send in one piece of the arena; NULL: there is no room. */
static const uint8_t *join(wsf_fanout *fanout, const wsf_job *job)
{
    wsf_outbox *outbox = &job->link->outbox;
    if (fanout->arena == NULL)
        fanout->arena = PyMem_RawMalloc(ARENA_BYTES);
    if (fanout->arena == NULL || ARENA_BYTES - fanout->arena_used < job->size)
        return NULL;
    uint8_t *data = fanout->arena + fanout->arena_used, *end = data;
    if (job->control != NULL)
        end = add_piece(end, job->control);
    for (uint32_t place = 0; place < outbox->count; place++)
        end = add_piece(end, wsf_entry_frame(*wsf_outbox_at(outbox, place)));
    fanout->arena_used += job->size;
    return data;
}

static void plan_job(wsf_fanout *fanout, wsf_job *job, wsf_link *link)
{
    *job = (wsf_job){.link = link};
    if (link == NULL || !(link->facts & WSF_OPEN))
        return;
    wsf_outbox *outbox = &link->outbox;
    job->frames = outbox->count;
    job->control = link->control;
    job->size = outbox->bytes + (job->control == NULL ? 0 : job->control->size);
    job->direct = (link->facts & (WSF_DIRECT | WSF_UNSURE)) == WSF_DIRECT;
    if (!job->direct || job->size == 0)
        return;
    const wsf_job *before = job == fanout->jobs ? NULL : job - 1;
    if (outbox->count == 0)
        job->data = job->control->data;
    else if (outbox->count == 1 && job->control == NULL)
        job->data = wsf_entry_frame(*wsf_outbox_at(outbox, 0))->data;
    else if (before != NULL && before->data != NULL && before->direct && before->control == job->control &&
             same_frames(outbox, &before->link->outbox))
        job->data = before->data;
    else if (job->size <= WSF_JOIN_BYTES)
        job->data = join(fanout, job);
}

uint32_t wsf_fanout_plan(wsf_fanout *fanout)
{
    const wsf_line *line = &fanout->line;
    uint32_t count = line->count < WSF_BATCH ? line->count : WSF_BATCH;
    uint64_t longest = 1;
    for (uint32_t i = 0; i < count; i++) {
        WSF_PREFETCH(line->links[(line->head + i + AHEAD) & (line->capacity - 1)]);
        plan_job(fanout, &fanout->jobs[i], line->links[(line->head + i) & (line->capacity - 1)]);
        longest = fanout->jobs[i].size > longest ? fanout->jobs[i].size : longest;
    }
    fanout->chunk = longest * CHUNK <= CHUNK_BYTES ? CHUNK : longest < CHUNK_BYTES ? (int64_t)(CHUNK_BYTES / longest) : 1;
    fanout->job_count = count;
    fanout->settled = 0;
    fanout->taken = 0;
    return count;
}

/* ---- send --------------------------------------------------------------------------------------------------------------------- */

#if WSF_HAS_SOCKETS

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* the interpreter ignores SIGPIPE */
#endif

/* What a call has sent: bytes, 0 if the socket takes nothing now, or -errno. */
static int64_t outcome(ssize_t result)
{
    if (result >= 0)
        return result;
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS || errno == ENOMEM ? 0 : -(int64_t)errno;
}

static int64_t send_piece(int fd, const uint8_t *data, size_t size)
{
    ssize_t result;
    do
        result = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (result < 0 && errno == EINTR);
    return outcome(result);
}

/* The frames from `place` on, behind `control`, as many as fit one call. Returns how many bytes they are. */
static size_t list_pieces(wsf_outbox *outbox, wsf_frame *control, uint32_t *place, struct msghdr *header)
{
    size_t size = 0, count = 0;
    if (control != NULL) {
        header->msg_iov[count++] = (struct iovec){control->data, control->size};
        size = control->size;
    }
    for (; *place < outbox->count && count < MAX_PIECES; ++*place, count++) {
        wsf_frame *frame = wsf_entry_frame(*wsf_outbox_at(outbox, *place));
        header->msg_iov[count] = (struct iovec){frame->data, frame->size};
        size += frame->size;
    }
    header->msg_iovlen = count;
    return size;
}

static int64_t send_frames(int fd, wsf_outbox *outbox, wsf_frame *control)
{
    struct iovec pieces[MAX_PIECES];
    struct msghdr header = {.msg_iov = pieces};
    int64_t sent = 0;
    for (uint32_t place = 0; place < outbox->count;) {
        size_t size = list_pieces(outbox, control, &place, &header);
        ssize_t result;
        control = NULL;
        do
            result = sendmsg(fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (result < 0 && errno == EINTR);
        int64_t now = outcome(result);
        if (now < 0)
            return sent != 0 ? sent : now; /* the transport, which gets the rest, will meet the error */
        sent += now;
        if ((size_t)now < size)
            break;
    }
    return sent;
}

static void carry_out(void *argument)
{
    wsf_fanout *fanout = argument;
    int64_t count = fanout->job_count, chunk = fanout->chunk, end;
    do {
        end = WSF_ADD64(&fanout->taken, chunk);
        for (int64_t i = end - chunk; i < end && i < count; i++) {
            wsf_job *job = &fanout->jobs[i];
            if (!job->direct || job->size == 0)
                continue;
            job->sent = job->data != NULL ? send_piece(job->link->fd, job->data, job->size)
                                          : send_frames(job->link->fd, &job->link->outbox, job->control);
        }
    } while (end < count && wsf_monotonic_ns() < fanout->deadline_ns);
}

#else

static void carry_out(void *argument)
{
    wsf_fanout *fanout = argument;
    fanout->taken = fanout->job_count;
}

#endif

void wsf_fanout_send(wsf_fanout *fanout, wsf_pool *pool, int64_t deadline_ns)
{
    fanout->deadline_ns = deadline_ns;
    if (pool != NULL && fanout->job_count >= WSF_PARALLEL_FROM)
        wsf_pool_run(pool, carry_out, fanout);
    else
        carry_out(fanout);
}

/* ---- settle ------------------------------------------------------------------------------------------------------------------- */

/* Frames that were handed over; messages among them, and the bytes of their payloads. */
typedef struct {
    uint64_t frames, messages, bytes;
} handed_sum;

/* The front of the outbox, which was handed over, with the reference to it. A greeting is no message. */
static wsf_frame *take_handed(wsf_fanout *fanout, wsf_link *link, int is_queued, handed_sum *sum)
{
    wsf_entry entry = wsf_outbox_pop(&link->outbox, &fanout->account);
    wsf_frame *frame = wsf_entry_frame(entry);
    wsf_message *message = frame->message;
    sum->frames++;
    if (!(entry & WSF_AGAIN) || message->log_number != 0) {
        sum->messages++;
        sum->bytes += message->payload_size;
    }
    if (!(entry & WSF_AGAIN) && link->cursor != NULL)
        wsf_cursor_add(&fanout->backlog, link->cursor, message, 1);
    resolve(fanout, entry, is_queued ? &message->tally.queued : &message->tally.sent);
    return frame;
}

/* Take frames out of the outbox: those that lie within the first `sent` bytes have been sent. */
static void take_sent(wsf_fanout *fanout, wsf_link *link, uint64_t sent, handed_sum *sum)
{
    uint64_t bytes = 0;
    while (link->outbox.count != 0) {
        bytes += wsf_entry_frame(*wsf_outbox_at(&link->outbox, 0))->size;
        if (bytes > sent)
            break;
        wsf_frame_release(take_handed(fanout, link, 0, sum));
    }
}

/* So much of the outbox was handed over. A link that is behind has something there until it has caught up, even while it is
 * blocked: who closes it hands over what is there. */
static void handed_over(wsf_fanout *fanout, wsf_link *link, const handed_sum *sum, wsf_count count)
{
    fanout->totals.messages += sum->messages;
    fanout->totals.bytes += sum->bytes;
    if (sum->messages != 0)
        count(link, sum->messages, sum->bytes);
    if (sum->frames != 0 && link->outbox.count == 0)
        refill(fanout, link);
}

static void go_on(wsf_fanout *fanout, wsf_link *link)
{
    if (has_something(link) && !(link->facts & WSF_WAITS))
        line_push(fanout, &fanout->line, link, WSF_IN_LINE);
}

void wsf_link_fail(wsf_fanout *fanout, wsf_link *link, uint32_t frames)
{
    fanout->totals.failed++;
    if (link->control != NULL && frames != 0)
        frames--;
    for (; link->cursor == NULL && frames != 0 && link->outbox.count != 0; frames--) {
        wsf_entry entry = wsf_outbox_pop(&link->outbox, &fanout->account);
        resolve(fanout, entry, &tally_of(entry)->failed);
        wsf_frame_release(wsf_entry_frame(entry));
    }
    wsf_link_close(fanout, link, WSF_BY_END);
}

/* The socket did not take all of the control frame, which goes to the transport. */
static void cut_control(wsf_fanout *fanout, wsf_link *link, uint64_t sent, wsf_remainder *remainder)
{
    remainder->frame = link->control;
    remainder->offset = (size_t)sent;
    remainder->is_shared = 0;
    wsf_frame_retain(remainder->frame, 1);
    control_left(fanout, link, 1);
    wsf_link_block(fanout, link, remainder->frame->size - remainder->offset);
}

/* The same for the frame of the outbox that was begun, or the next one. */
static void cut_short(wsf_fanout *fanout, wsf_link *link, uint64_t sent, wsf_remainder *remainder, wsf_count count)
{
    uint64_t before = link->outbox.bytes;
    handed_sum sum = {0};
    take_sent(fanout, link, sent, &sum);
    remainder->offset = (size_t)(sent - (before - link->outbox.bytes));
    wsf_frame *frame = take_handed(fanout, link, 1, &sum);
    remainder->frame = frame;
    remainder->is_shared = link->keeps_views && frame->references > 1;
    if (remainder->is_shared) {
        wsf_frame_retain(frame, 1);
        link->rest = frame;
        link->shared = frame->size - remainder->offset;
    }
    wsf_link_block(fanout, link, frame->size - remainder->offset);
    handed_over(fanout, link, &sum, count);
}

static int settle_job(wsf_fanout *fanout, const wsf_job *job, wsf_count count, wsf_remainder *remainder)
{
    wsf_link *link = job->link;
    handed_sum sum = {0};
    remainder->link = link;
    if (!job->direct) {
        fanout->totals.through++;
        return WSF_THROUGH;
    }
    fanout->totals.writes++;
    if (job->sent < 0) {
        remainder->error = (int)-job->sent;
        wsf_link_fail(fanout, link, job->frames + (job->control != NULL));
        return WSF_FAILED;
    }
    uint64_t sent = (uint64_t)job->sent;
    if (job->control != NULL) {
        if (sent < job->control->size) {
            cut_control(fanout, link, sent, remainder);
            return WSF_REST;
        }
        sent -= job->control->size;
        control_left(fanout, link, 0);
    }
    if (sent < link->outbox.bytes) {
        cut_short(fanout, link, sent, remainder, count);
        return WSF_REST;
    }
    take_sent(fanout, link, sent, &sum);
    link->facts &= ~(uint32_t)WSF_SHEDDING;
    note_room(fanout, link);
    handed_over(fanout, link, &sum, count);
    go_on(fanout, link);
    return WSF_DONE;
}

int wsf_fanout_settle(wsf_fanout *fanout, wsf_count count, wsf_remainder *remainder)
{
    int64_t carried_out = fanout->taken < (int64_t)fanout->job_count ? fanout->taken : (int64_t)fanout->job_count;
    /* All at once: those that have more to send get in line again while the others are settled. */
    for (int64_t i = 0; fanout->settled == 0 && i < carried_out; i++) {
        line_pop(&fanout->line);
        if (fanout->jobs[i].link != NULL)
            fanout->jobs[i].link->facts &= ~(uint32_t)WSF_IN_LINE;
    }
    while (fanout->settled < carried_out) {
        const wsf_job *job = &fanout->jobs[fanout->settled++];
        if (job->link == NULL || job->size == 0)
            continue;
        remainder->what = settle_job(fanout, job, count, remainder);
        if (remainder->what != WSF_DONE)
            return remainder->what;
    }
    fanout->job_count = fanout->settled = 0;
    fanout->taken = 0;
    fanout->arena_used = 0;
    return WSF_DONE;
}

void wsf_link_commit(wsf_fanout *fanout, wsf_link *link, uint32_t frames, uint64_t in_transport, wsf_count count)
{
    if (link->control != NULL && frames != 0) {
        control_left(fanout, link, in_transport != 0);
        frames--;
    }
    wsf_link_commit_messages(fanout, link, frames, in_transport, count);
}

void wsf_link_commit_messages(wsf_fanout *fanout, wsf_link *link, uint32_t frames, uint64_t in_transport, wsf_count count)
{
    handed_sum sum = {0};
    for (; frames != 0 && link->outbox.count != 0; frames--)
        wsf_frame_release(take_handed(fanout, link, in_transport != 0, &sum));
    if (in_transport != 0)
        wsf_link_block(fanout, link, in_transport);
    else
        note_room(fanout, link);
    handed_over(fanout, link, &sum, count);
    go_on(fanout, link);
}

/* ---- debug build ------------------------------------------------------------------------------------------------------------ */

#ifdef WSF_DEBUG
/* Each link that has the fact stands in the line once, at the place that it names, and nobody else does. */
static void check_line(wsf_fanout *fanout, wsf_line *line, uint32_t fact)
{
    uint32_t standing = 0, expected = 0;
    WSF_ASSERT(line->count <= line->capacity && 2 * (uint64_t)fanout->links.used <= line->capacity);
    for (uint32_t i = 0; i < line->count; i++) {
        uint32_t at = (line->head + i) & (line->capacity - 1);
        wsf_link *link = line->links[at];
        if (link == NULL)
            continue;
        WSF_ASSERT((link->facts & fact) && *place_in(fanout, line, link) == at);
        standing++;
    }
    for (uint32_t i = 0; i < fanout->links.used; i++)
        expected += (fanout->all[i]->facts & fact) != 0;
    WSF_ASSERT(standing == expected);
}

static void check_link(wsf_fanout *fanout, wsf_link *link)
{
    wsf_outbox *outbox = &link->outbox;
    int waits = (link->facts & WSF_WAITS) != 0;
    WSF_ASSERT(wsf_fanout_find(fanout, link->record) == link);
    WSF_ASSERT(!waits || fanout->waiting[link->waiting_at] == link);
    WSF_ASSERT(!waits || !(link->facts & WSF_IN_LINE));
    WSF_ASSERT(link->in_transport == 0 || (link->facts & WSF_BLOCKED));
    WSF_ASSERT((link->facts & WSF_OPEN) || (outbox->count == 0 && link->control == NULL && !(link->facts & WSF_DIRECT)));
    WSF_ASSERT(!link->has_control_in_transport || (link->facts & WSF_BLOCKED));
    WSF_ASSERT(link->control == NULL || (link->facts & (WSF_WAITS | WSF_IN_LINE)));
    WSF_ASSERT(link->is_held == (link->has_control_in_transport || (link->control != NULL && (link->facts & WSF_BLOCKED))));
    WSF_ASSERT(link->is_holding || link->is_held == link->was_held);
    wsf_outbox_check(outbox);
    for (uint32_t place = 0; place < outbox->count; place++) {
        wsf_entry entry = *wsf_outbox_at(outbox, place);
        const wsf_tally *tally = tally_of(entry);
        if (entry & WSF_AGAIN)
            continue;
        WSF_ASSERT(!waits || (entry & WSF_QUEUED));
        WSF_ASSERT((entry & WSF_QUEUED ? tally->queued : tally->pending) != 0);
        WSF_ASSERT(tally->targets ==
                   tally->pending + tally->sent + tally->queued + tally->dropped + tally->failed + tally->away);
    }
    WSF_ASSERT(!(link->facts & WSF_AWAY) || !(link->facts & WSF_OPEN));
    WSF_ASSERT(!(link->facts & WSF_BEHIND) || (link->facts & WSF_OPEN));
    WSF_ASSERT(!(link->facts & WSF_KEEPS) || link->cursor != NULL);
    if (link->cursor != NULL)
        wsf_cursor_check(&fanout->backlog, link->cursor);
}

/* Messages and frames come on top: others than the links keep them too. */
static void check_account(wsf_fanout *fanout)
{
    int64_t least = 0;
    for (uint32_t i = 0; i < fanout->links.used; i++) {
        const wsf_link *link = fanout->all[i];
        least += (int64_t)(link->outbox.capacity * sizeof *link->outbox.ring);
        least += (int64_t)(link->outbox.place_capacity * sizeof *link->outbox.places);
        least += copied_bytes(link);
    }
    WSF_ASSERT(WSF_ADD64(&fanout->account, 0) >= least);
}

void wsf_fanout_check(wsf_fanout *fanout)
{
    uint32_t waiting = 0;
    WSF_ASSERT(fanout->job_count == 0);
    for (uint32_t i = 0; i < fanout->links.used; i++) {
        WSF_ASSERT(fanout->all[i]->all_at == i);
        check_link(fanout, fanout->all[i]);
        waiting += (fanout->all[i]->facts & WSF_WAITS) != 0;
    }
    WSF_ASSERT(waiting == fanout->waiting_count);
    wsf_backlog_check(&fanout->backlog);
    check_line(fanout, &fanout->line, WSF_IN_LINE);
    check_line(fanout, &fanout->later, WSF_LATER);
    check_account(fanout);
    for (uint32_t i = 0; i < fanout->report_count; i++)
        WSF_ASSERT(fanout->reports[i].link->all_at < fanout->links.used);
}
#else
void wsf_fanout_check(wsf_fanout *fanout) { (void)fanout; }
#endif
