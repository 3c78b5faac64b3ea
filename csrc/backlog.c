/* Logs that many clients share, and what each has been sent of them; see backlog.h. */
#include "backlog.h"

/* What an entry costs besides its frame. */
#define ENTRY_BYTES (sizeof(wsf_message) + sizeof(wsf_frame *) + sizeof(wsf_log *))

static void charge(const wsf_backlog *backlog, int64_t bytes) { (void)WSF_ADD64(backlog->account, bytes); }

/* ---- logs --------------------------------------------------------------------------------------------------------------- */

void wsf_backlog_init(wsf_backlog *backlog, int64_t *account)
{
    memset(backlog, 0, sizeof *backlog);
    backlog->account = account;
    backlog->first_number = 1;
}

static uint32_t hash_of_key(uint64_t key) { return (uint32_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32); }

static uint32_t hash_of_log(const void *log) { return hash_of_key(((const wsf_log *)log)->key); }

static int has_key(const void *log, const void *key) { return ((const wsf_log *)log)->key == *(const uint64_t *)key; }

static wsf_log *find_or_make(wsf_backlog *backlog, uint64_t key)
{
    wsf_log *log = wsf_table_find(&backlog->logs, hash_of_key(key), &key, has_key);
    if (log != NULL)
        return log;
    log = PyMem_RawMalloc(sizeof *log);
    if (log == NULL)
        return NULL;
    memset(log, 0, sizeof *log);
    log->key = key;
    if (wsf_table_insert(&backlog->logs, &backlog->table_bytes, hash_of_key(key), log, hash_of_log) != WSF_OK) {
        PyMem_RawFree(log);
        return NULL;
    }
    charge(backlog, (int64_t)sizeof *log);
    WSF_COUNT_LIVE(WSF_LIVE_LOG, 1);
    return log;
}

/* An empty log has no ring, and exists only while there are runs of it. */
static void free_if_unused(wsf_backlog *backlog, wsf_log *log)
{
    if (log->count != 0)
        return;
    charge(backlog, -(int64_t)(log->capacity * sizeof *log->ring));
    PyMem_RawFree(log->ring);
    log->ring = NULL;
    log->head = log->capacity = 0;
    if (log->runs != 0)
        return;
    wsf_table_remove(&backlog->logs, &backlog->table_bytes, hash_of_log(log), log, hash_of_log);
    charge(backlog, -(int64_t)sizeof *log);
    PyMem_RawFree(log);
    WSF_COUNT_LIVE(WSF_LIVE_LOG, -1);
}

static inline wsf_frame **entry_at(const wsf_log *log, uint32_t at) { return &log->ring[(log->head + at) & (log->capacity - 1)]; }

/* A ring of pointers, which is full, with twice the room, beginning at 0; NULL: no memory. The former one is freed. */
static void *grown(const wsf_backlog *backlog, void *ring, uint32_t head, uint32_t *capacity, uint32_t least)
{
    const size_t size = sizeof(void *), before = *capacity, after = before == 0 ? least : 2 * before;
    char *larger = PyMem_RawMalloc(after * size);
    if (larger == NULL)
        return NULL;
    if (before != 0) {
        memcpy(larger, (char *)ring + head * size, (before - head) * size);
        memcpy(larger + (before - head) * size, ring, head * size);
    }
    charge(backlog, (int64_t)((after - before) * size));
    PyMem_RawFree(ring);
    *capacity = (uint32_t)after;
    return larger;
}

static int make_room(wsf_backlog *backlog, wsf_log *log)
{
    if (log->count < log->capacity)
        return WSF_OK;
    wsf_frame **ring = grown(backlog, log->ring, log->head, &log->capacity, 4);
    if (ring == NULL)
        return WSF_NO_MEMORY;
    log->ring = ring;
    log->head = 0;
    return WSF_OK;
}

static int make_room_in_order(wsf_backlog *backlog)
{
    if (backlog->count < backlog->capacity)
        return WSF_OK;
    wsf_log **order = grown(backlog, backlog->order, backlog->head, &backlog->capacity, 64);
    if (order == NULL)
        return WSF_NO_MEMORY;
    backlog->order = order;
    backlog->head = 0;
    return WSF_OK;
}

static wsf_log *oldest_log(const wsf_backlog *backlog) { return backlog->order[backlog->head]; }

static size_t entry_bytes(const wsf_frame *frame)
{
    return sizeof *frame + (frame->bytes == NULL ? 1 : 2) * frame->size + ENTRY_BYTES;
}

static void let_go_of_oldest(wsf_backlog *backlog)
{
    wsf_log *log = oldest_log(backlog);
    wsf_frame *frame = *entry_at(log, 0);
    log->head = (log->head + 1) & (log->capacity - 1);
    log->count--;
    log->first++;
    backlog->head = (backlog->head + 1) & (backlog->capacity - 1);
    backlog->count--;
    backlog->first_number++;
    backlog->bytes -= entry_bytes(frame);
    wsf_frame_release(frame);
    free_if_unused(backlog, log);
}

void wsf_backlog_clear(wsf_backlog *backlog)
{
    while (backlog->count != 0)
        let_go_of_oldest(backlog);
    charge(backlog, -(int64_t)(backlog->capacity * sizeof *backlog->order));
    PyMem_RawFree(backlog->order);
    backlog->order = NULL;
    backlog->head = backlog->capacity = 0;
    if (backlog->logs.used == 0)
        wsf_table_free(&backlog->logs, &backlog->table_bytes);
}

void wsf_backlog_expire(wsf_backlog *backlog, int64_t now_ns)
{
    int64_t before_ns = now_ns - backlog->limits.max_age_ns;
    while (backlog->count != 0 && (*entry_at(oldest_log(backlog), 0))->message->created_ns < before_ns)
        let_go_of_oldest(backlog);
}

static int is_kept(const wsf_backlog *backlog, const wsf_message *message)
{
    return message->log_number >= backlog->first_number; /* 0: was never kept */
}

void wsf_backlog_add(wsf_backlog *backlog, uint64_t key, wsf_frame *frame)
{
    wsf_message *message = frame->message;
    const wsf_backlog_limits *limits = &backlog->limits;
    size_t size = entry_bytes(frame);
    if (is_kept(backlog, message))
        return;
    wsf_backlog_expire(backlog, message->created_ns);
    if (size > limits->max_bytes || limits->max_messages == 0)
        return;
    while (backlog->count != 0 && (backlog->count >= limits->max_messages || backlog->bytes + size > limits->max_bytes))
        let_go_of_oldest(backlog);
    wsf_log *log = make_room_in_order(backlog) == WSF_OK ? find_or_make(backlog, key) : NULL;
    if (log == NULL)
        return;
    if (make_room(backlog, log) != WSF_OK) {
        free_if_unused(backlog, log);
        return;
    }
    message->log = log;
    message->log_place = log->first + log->count;
    message->log_number = backlog->first_number + backlog->count;
    wsf_frame_retain(frame, 1);
    *entry_at(log, log->count++) = frame;
    backlog->order[(backlog->head + backlog->count++) & (backlog->capacity - 1)] = log;
    backlog->bytes += size;
}

void wsf_backlog_note_object(wsf_backlog *backlog, const wsf_frame *frame)
{
    const wsf_message *message = frame->message;
    if (is_kept(backlog, message) && *entry_at(message->log, (uint32_t)(message->log_place - message->log->first)) == frame)
        backlog->bytes += frame->size;
}

/* ---- runs --------------------------------------------------------------------------------------------------------------- */

static void give_up_run(wsf_backlog *backlog, wsf_run *run)
{
    run->log->runs--;
    free_if_unused(backlog, run->log);
}

static uint32_t gone_of(const wsf_run *run)
{
    uint64_t gone = run->log->first > run->first ? run->log->first - run->first : 0;
    return gone < run->count ? (uint32_t)gone : run->count;
}

/* Take runs out that have nothing. The others keep their order. */
static void close_gaps(wsf_backlog *backlog, wsf_cursor *cursor)
{
    uint32_t kept = 0, last = UINT32_MAX;
    for (uint32_t i = 0; i < cursor->count; i++) {
        if (cursor->runs[i].count == 0) {
            give_up_run(backlog, &cursor->runs[i]);
            continue;
        }
        last = i == cursor->last ? kept : last;
        cursor->runs[kept++] = cursor->runs[i];
    }
    cursor->count = kept;
    cursor->last = last;
    cursor->low = 0;
}

static uint64_t kept_by(const wsf_cursor *cursor)
{
    uint64_t kept = 0;
    for (uint32_t i = 0; i < cursor->count; i++)
        kept += cursor->runs[i].count;
    return kept;
}

/* What was let go of: entries from the front of runs. What comes before any of them is of no use either, which is all of the
 * eras before; within an era the oldest are the first. */
static void prune(wsf_backlog *backlog, wsf_cursor *cursor)
{
    uint32_t useful_from = 0;
    for (uint32_t i = 0; i < cursor->count; i++)
        if (gone_of(&cursor->runs[i]) != 0)
            useful_from = i; /* at least */
    uint32_t era = cursor->count == 0 ? 0 : cursor->runs[useful_from].era;
    for (uint32_t i = 0; i < cursor->count; i++) {
        wsf_run *run = &cursor->runs[i];
        uint32_t gone = run->era < era ? run->count : gone_of(run);
        cursor->is_broken |= gone > run->taken;
        run->first += gone;
        run->count -= gone;
        run->taken = gone < run->taken ? run->taken - gone : 0; /* what is next stays so, unless it is broken */
    }
    close_gaps(backlog, cursor);
}

void wsf_cursor_clear(wsf_backlog *backlog, wsf_cursor *cursor)
{
    for (uint32_t i = 0; i < cursor->count; i++)
        give_up_run(backlog, &cursor->runs[i]);
    charge(backlog, -(int64_t)(cursor->capacity * sizeof *cursor->runs));
    PyMem_RawFree(cursor->runs);
    cursor->runs = NULL;
    cursor->count = cursor->capacity = cursor->low = 0;
    cursor->is_broken |= cursor->handed != cursor->recorded;
}

/* ---- reading ------------------------------------------------------------------------------------------------------------ */

static uint64_t number_at(const wsf_run *run, uint32_t at)
{
    return (*entry_at(run->log, (uint32_t)(run->first - run->log->first) + at))->message->log_number;
}

static void note_next(wsf_run *run)
{
    if (run->taken < run->count)
        run->next_number = number_at(run, run->taken);
}

/* The run with the next message that was not handed; NULL if there is none, or it was let go. */
static wsf_run *next_run(const wsf_backlog *backlog, wsf_cursor *cursor)
{
    wsf_run *next = NULL;
    while (cursor->low < cursor->count && cursor->runs[cursor->low].taken == cursor->runs[cursor->low].count)
        cursor->low++;
    if (cursor->low == cursor->count || cursor->is_broken)
        return NULL;
    uint32_t era = cursor->runs[cursor->low].era;
    for (uint32_t i = cursor->low; i < cursor->count && cursor->runs[i].era == era; i++) {
        wsf_run *run = &cursor->runs[i];
        if (next != NULL && run->from_number > next->next_number) /* and so have all that follow */
            break;
        if (run->taken != run->count && (next == NULL || run->next_number < next->next_number))
            next = run;
    }
    if (next->next_number >= backlog->first_number)
        return next;
    cursor->is_broken = 1;
    return NULL;
}

wsf_frame *wsf_cursor_peek(const wsf_backlog *backlog, wsf_cursor *cursor)
{
    wsf_run *run = next_run(backlog, cursor);
    if (run == NULL)
        return NULL;
    cursor->last = (uint32_t)(run - cursor->runs);
    return *entry_at(run->log, (uint32_t)(run->first - run->log->first) + run->taken);
}

void wsf_cursor_take(wsf_cursor *cursor)
{
    wsf_run *run = &cursor->runs[cursor->last];
    run->taken++;
    note_next(run);
    cursor->handed++;
}

/* How many entries of a run have numbers before this one. Those that are taken do. */
static uint32_t count_before(const wsf_run *run, uint64_t number)
{
    uint32_t low = run->taken, high = run->from_number < number ? run->count : low;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (number_at(run, middle) < number)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Take the first so many entries, which is not all, of runs of one era. They may be very many, and the loop waits: it does not
 * go through them one by one. */
static void take_first(const wsf_backlog *backlog, wsf_run *runs, uint32_t count, uint64_t messages)
{
    /* No more than that have numbers before `low`, and more than that before `high`. */
    uint64_t low = backlog->first_number, high = low + backlog->count;
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2, before = 0;
        for (uint32_t i = 0; i < count; i++)
            before += runs[i].before = count_before(&runs[i], middle);
        if (before > messages) {
            high = middle;
            continue;
        }
        low = middle;
        for (uint32_t i = 0; i < count; i++)
            runs[i].taken = runs[i].before;
    }
}

/* Of what is kept, let go of the first so many. They are there. */
static void let_go_of_first(wsf_backlog *backlog, wsf_cursor *cursor, uint64_t messages)
{
    wsf_run *runs = cursor->runs;
    for (uint32_t i = 0; i < cursor->count; i++)
        runs[i].taken = 0;
    for (uint32_t i = 0, end; i < cursor->count && messages != 0; i = end) {
        uint64_t kept = 0;
        for (end = i; end < cursor->count && runs[end].era == runs[i].era; end++)
            kept += runs[end].count;
        if (messages < kept) {
            take_first(backlog, &runs[i], end - i, messages);
            break;
        }
        messages -= kept;
        for (; i < end; i++)
            runs[i].taken = runs[i].count;
    }
    for (uint32_t i = 0; i < cursor->count; i++) {
        runs[i].first += runs[i].taken;
        runs[i].count -= runs[i].taken;
        runs[i].taken = 0;
        note_next(&runs[i]);
    }
    close_gaps(backlog, cursor);
}

/* ---- adding --------------------------------------------------------------------------------------------------------------- */

static int make_room_for_run(wsf_backlog *backlog, wsf_cursor *cursor)
{
    if (cursor->count < cursor->capacity)
        return WSF_OK;
    prune(backlog, cursor);
    while (cursor->count > WSF_MAX_RUNS * 3 / 4 && cursor->handed == cursor->recorded) {
        let_go_of_first(backlog, cursor, (kept_by(cursor) + 1) / 2);
        for (uint32_t i = 0; i < cursor->count; i++)
            cursor->runs[i].taken = cursor->runs[i].count;
    }
    if (cursor->count <= cursor->capacity / 2 && cursor->count < cursor->capacity)
        return WSF_OK;
    uint32_t capacity = cursor->capacity == 0 ? 2 : 2 * cursor->capacity;
    wsf_run *runs = capacity > WSF_MAX_RUNS ? NULL : PyMem_RawRealloc(cursor->runs, capacity * sizeof *runs);
    if (runs == NULL)
        return cursor->count < cursor->capacity ? WSF_OK : WSF_NO_MEMORY;
    charge(backlog, (int64_t)((capacity - cursor->capacity) * sizeof *runs));
    cursor->runs = runs;
    cursor->capacity = capacity;
    return WSF_OK;
}

static inline int continues(const wsf_cursor *cursor, const wsf_run *run, const wsf_message *message)
{
    return run->log == message->log && run->era == cursor->era && run->first + run->count == message->log_place &&
           run->count != UINT32_MAX;
}

#define NO_RUN UINT32_MAX

/* The run that the message continues. */
static uint32_t find_run(const wsf_cursor *cursor, const wsf_message *message)
{
    if (cursor->last < cursor->count && continues(cursor, &cursor->runs[cursor->last], message))
        return cursor->last;
    if (message->log_place == 0) /* of a new log */
        return NO_RUN;
    for (uint32_t i = cursor->count; i-- > 0 && cursor->runs[i].era == cursor->era;)
        if (cursor->runs[i].log == message->log)
            return continues(cursor, &cursor->runs[i], message) ? i : NO_RUN;
    return NO_RUN;
}

/* The run that the message continues, or a new one. */
static uint32_t run_for(wsf_backlog *backlog, wsf_cursor *cursor, const wsf_message *message)
{
    cursor->era += message->log_number <= cursor->last_number;
    cursor->last_number = message->log_number;
    uint32_t at = find_run(cursor, message);
    if (at != NO_RUN || make_room_for_run(backlog, cursor) != WSF_OK)
        return at;
    at = cursor->count++;
    cursor->runs[at] = (wsf_run){
        .log = message->log, .first = message->log_place, .from_number = message->log_number, .era = cursor->era};
    message->log->runs++;
    return at;
}

void wsf_cursor_add(wsf_backlog *backlog, wsf_cursor *cursor, const wsf_message *message, int is_handed)
{
    uint32_t at = is_kept(backlog, message) && !cursor->is_broken ? run_for(backlog, cursor, message) : NO_RUN;
    cursor->recorded++;
    cursor->handed += is_handed != 0;
    if (at == NO_RUN) { /* nobody can be sent it again, nor what was before it */
        wsf_cursor_clear(backlog, cursor);
        return;
    }
    wsf_run *run = &cursor->runs[at];
    if (run->taken == run->count)
        run->next_number = message->log_number;
    run->count++;
    run->taken += is_handed != 0;
    cursor->last = at;
    cursor->low = at < cursor->low ? at : cursor->low;
}

int wsf_cursor_rewind(wsf_backlog *backlog, wsf_cursor *cursor, uint64_t received)
{
    prune(backlog, cursor);
    uint64_t kept = kept_by(cursor), first = cursor->recorded - kept;
    if (cursor->is_broken || received < first || received > cursor->handed)
        return 0;
    let_go_of_first(backlog, cursor, received - first);
    cursor->handed = received;
    return 1;
}

/* ---- debug build ---------------------------------------------------------------------------------------------------------- */

#ifdef WSF_DEBUG
void wsf_backlog_check(const wsf_backlog *backlog)
{
    uint64_t bytes = 0;
    WSF_ASSERT(backlog->count <= backlog->capacity);
    for (uint32_t i = 0; i < backlog->count; i++) {
        const wsf_log *log = backlog->order[(backlog->head + i) & (backlog->capacity - 1)];
        int is_found = 0;
        for (uint32_t at = 0; at < log->count; at++) {
            const wsf_frame *frame = *entry_at(log, at);
            if (frame->message->log_number != backlog->first_number + i)
                continue;
            WSF_ASSERT(frame->references > 0 && frame->message->log == log && frame->message->log_place == log->first + at);
            bytes += entry_bytes(frame);
            is_found = 1;
        }
        WSF_ASSERT(is_found);
    }
    WSF_ASSERT(bytes == backlog->bytes);
}

void wsf_cursor_check(const wsf_backlog *backlog, const wsf_cursor *cursor)
{
    uint64_t taken = 0, kept = 0;
    WSF_ASSERT(cursor->count <= cursor->capacity && cursor->handed <= cursor->recorded);
    for (uint32_t i = 0; i < cursor->count; i++) {
        const wsf_run *run = &cursor->runs[i], *before = i == 0 ? NULL : run - 1;
        WSF_ASSERT(run->count != 0 && run->taken <= run->count && run->era <= cursor->era && run->log->runs != 0);
        WSF_ASSERT(run->first + run->count <= run->log->first + run->log->count);
        WSF_ASSERT(before == NULL || before->era < run->era || before->from_number < run->from_number);
        WSF_ASSERT(i >= cursor->low || run->taken == run->count);
        WSF_ASSERT(run->taken == run->count || run->next_number < backlog->first_number ||
                   run->next_number == number_at(run, run->taken));
        taken += run->taken;
        kept += run->count;
    }
    WSF_ASSERT(kept <= cursor->recorded && taken <= cursor->handed);
    WSF_ASSERT(cursor->is_broken || kept - taken == cursor->recorded - cursor->handed);
}
#else
void wsf_backlog_check(const wsf_backlog *backlog) { (void)backlog; }
void wsf_cursor_check(const wsf_backlog *backlog, const wsf_cursor *cursor)
{
    (void)backlog;
    (void)cursor;
}
#endif
