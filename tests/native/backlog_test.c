/* Logs and cursors alone, without an interpreter: backlog_test [MULTIPLIER] [PART] [SEED]; see harness.h.
 *
 * Parts: cases (what is easily got wrong, one by one); runs (clients that get messages of too many logs);
 * random (random programs against a model, with allocations that fail).
 *
 * The model of the logs is which messages are kept; that of a client is the list of the messages that were recorded for it,
 * and how many of them were handed. So what can be sent again is known at any time: those behind the last one that is not
 * kept. A cursor may know less only after an allocation has failed, or if it has had very many runs; then it must say so.
 */
#define WSF_SHIM_IMPLEMENTATION
#include "backlog.h"
#include "harness.h"

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- the model ---------------------------------------------------------------------------------------------------- */

enum { MOST_CLIENTS = 6, MOST_PENDING = 40 };

/* What a message costs its log; see backlog.c. */
#define COSTS (sizeof(wsf_frame) + sizeof(wsf_message) + sizeof(wsf_frame *) + sizeof(wsf_log *))

typedef struct {
    wsf_frame *frame; /* NULL: nobody has it any more */
    uint64_t number;  /* in the logs, the last time that it was added; 0: it was not kept */
    int64_t created_ns;
    size_t cost;
    bool is_held; /* by the test: it may be recorded */
} message;

/* What was recorded: which message, and its number then. */
typedef struct {
    uint32_t message;
    uint64_t number;
} entry;

typedef struct {
    wsf_cursor cursor;
    entry *entries;
    uint32_t count, handed;
    uint32_t floor;    /* those before it were given up, or are not needed any more */
    bool may_forget;   /* memory was lacking, or there were very many runs */
    uint32_t pending[MOST_PENDING]; /* its outbox */
    uint32_t pending_count;
} client;

typedef struct {
    uint32_t steps, most_keys, most_messages, check_every;
} scale;

typedef struct {
    chance random;
    const scale *size;
    wsf_backlog backlog;
    int64_t account, now_ns;
    message *messages;
    uint32_t count;      /* of messages that there ever were */
    uint32_t *kept;      /* a list of them, from the oldest on; it begins at kept_first */
    uint32_t kept_first, kept_end;
    uint64_t first_number, bytes;
    client clients[MOST_CLIENTS];
    uint32_t client_count;
} world;

static bool is_kept(const world *w, uint64_t number) { return number >= w->first_number; }

static bool is_lost(const world *w, const client *c, uint32_t at)
{
    return at < c->floor || !is_kept(w, c->entries[at].number);
}

/* What can be sent again are the entries from here on. */
static uint32_t reach(const world *w, const client *c)
{
    uint32_t first = c->count;
    while (first > c->floor && !is_lost(w, c, first - 1))
        first--;
    return first;
}

static void bury(const world *w, message *m)
{
    if (m->frame != NULL && !m->is_held && !is_kept(w, m->number))
        m->frame = NULL;
}

static void must_let_go(world *w)
{
    message *m = &w->messages[w->kept[w->kept_first++]];
    w->first_number++;
    w->bytes -= m->cost;
    bury(w, m);
}

static uint32_t must_have(const world *w) { return w->kept_end - w->kept_first; }

static void must_expire(world *w, int64_t now_ns)
{
    while (must_have(w) != 0 && w->messages[w->kept[w->kept_first]].created_ns < now_ns - w->backlog.limits.max_age_ns)
        must_let_go(w);
}

static void must_add(world *w, uint32_t number, bool lacks_memory)
{
    message *m = &w->messages[number];
    const wsf_backlog_limits *limits = &w->backlog.limits;
    if (is_kept(w, m->number))
        return;
    must_expire(w, m->created_ns);
    if (m->cost > limits->max_bytes || limits->max_messages == 0)
        return;
    while (must_have(w) != 0 && (must_have(w) >= limits->max_messages || w->bytes + m->cost > limits->max_bytes))
        must_let_go(w);
    if (lacks_memory && m->frame->message->log_number < w->first_number)
        return; /* which is allowed */
    m->number = w->first_number + must_have(w);
    w->kept[w->kept_end++] = number;
    w->bytes += m->cost;
}

/* ---- comparing ---------------------------------------------------------------------------------------------------- */

static uint32_t number_of(const wsf_frame *frame)
{
    uint32_t number;
    memcpy(&number, frame->data + frame->header_size, sizeof number);
    return number;
}

static int64_t expected_account(const world *w)
{
    int64_t sum = (int64_t)(w->backlog.capacity * sizeof *w->backlog.order);
    for (uint32_t at = 0; at < w->backlog.logs.capacity; at++)
        if (w->backlog.logs.entries[at] != 0) {
            const wsf_log *log = wsf_entry_item(w->backlog.logs.entries[at]);
            sum += (int64_t)(sizeof *log + log->capacity * sizeof *log->ring);
        }
    for (uint32_t i = 0; i < w->client_count; i++)
        sum += (int64_t)(w->clients[i].cursor.capacity * sizeof(wsf_run));
    for (uint32_t i = 0; i < w->count; i++)
        if (w->messages[i].frame != NULL)
            sum += (int64_t)(w->messages[i].cost - COSTS + sizeof(wsf_message) + sizeof(wsf_frame));
    return sum;
}

static void check_logs(const world *w)
{
    const wsf_backlog *backlog = &w->backlog;
    uint32_t live = 0, runs = 0, log_runs = 0;
    wsf_backlog_check(backlog);
    CHECK(backlog->count == must_have(w) && backlog->first_number == w->first_number && backlog->bytes == w->bytes);
    for (uint32_t i = 0; i < must_have(w); i++) {
        const message *m = &w->messages[w->kept[w->kept_first + i]];
        CHECK(m->number == w->first_number + i && m->frame->message->log_number == m->number);
    }
    for (uint32_t i = 0; i < w->count; i++) {
        const message *m = &w->messages[i];
        if (m->frame == NULL)
            continue;
        live++;
        CHECK(m->frame->references == m->is_held + is_kept(w, m->number));
    }
    for (uint32_t i = 0; i < w->client_count; i++)
        runs += w->clients[i].cursor.count;
    for (uint32_t at = 0; at < backlog->logs.capacity; at++)
        if (backlog->logs.entries[at] != 0) {
            const wsf_log *log = wsf_entry_item(backlog->logs.entries[at]);
            CHECK(log->count != 0 || log->runs != 0);
            CHECK(log->count != 0 || log->ring == NULL);
            log_runs += log->runs;
        }
    CHECK(log_runs == runs);
    CHECK(wsf_live[WSF_LIVE_FRAME] == live && wsf_live[WSF_LIVE_MESSAGE] == live);
    CHECK(wsf_live[WSF_LIVE_LOG] == backlog->logs.used);
    CHECK(w->account == expected_account(w));
}

static void check_client(const world *w, const client *c)
{
    wsf_cursor_check(&w->backlog, &c->cursor);
    CHECK(c->cursor.recorded == c->count && c->cursor.handed == c->handed);
    if (!c->may_forget && c->cursor.is_broken)
        CHECK(reach(w, c) > c->handed);
}

static void check_world(const world *w)
{
    check_logs(w);
    for (uint32_t i = 0; i < w->client_count; i++)
        check_client(w, &w->clients[i]);
}

/* ---- objects of frames -------------------------------------------------------------------------------------------- */

static void free_object(PyObject *of) { (void)of; }

static const shim_type object_type = {"bytes", 1, free_object};
static PyObject object; /* all frames have the same */

/* ---- operations --------------------------------------------------------------------------------------------------- */

static uint32_t make_message(world *w, size_t size)
{
    static const uint8_t padding[4096];
    uint8_t payload[sizeof padding];
    message *m = &w->messages[w->count];
    size = size < sizeof w->count ? sizeof w->count : size;
    memcpy(payload, padding, size);
    memcpy(payload, &w->count, sizeof w->count);
    wsf_message *of = wsf_message_new(&w->account, w->now_ns, NULL, size);
    m->frame = wsf_frame_new(of, WSF_BINARY, payload, size);
    wsf_message_release(of);
    m->created_ns = w->now_ns;
    m->cost = COSTS + m->frame->size;
    m->is_held = true;
    return w->count++;
}

static void release_message(world *w, uint32_t number)
{
    message *m = &w->messages[number];
    wsf_frame *frame = m->frame;
    m->is_held = false;
    bury(w, m);
    wsf_frame_release(frame);
}

static void add(world *w, uint64_t key, uint32_t number, int64_t fault, bool goes_on)
{
    inject_fault(fault, goes_on);
    wsf_backlog_add(&w->backlog, key, w->messages[number].frame);
    bool lacked = end_faults();
    must_add(w, number, lacked);
}

static void record(world *w, client *c, uint32_t number, bool is_handed, bool fault)
{
    const message *m = &w->messages[number];
    inject_fault(fault, true);
    wsf_cursor_add(&w->backlog, &c->cursor, m->frame->message, is_handed);
    bool lacked = end_faults();
    c->entries[c->count++] = (entry){number, m->number};
    c->handed += is_handed;
    c->may_forget = c->may_forget || lacked || c->cursor.count > WSF_MAX_RUNS / 2;
}

/* Returns whether there was one more. */
static bool take_next(const world *w, client *c)
{
    wsf_frame *frame = wsf_cursor_peek(&w->backlog, &c->cursor);
    CHECK(wsf_cursor_peek(&w->backlog, &c->cursor) == frame);
    if (frame == NULL) {
        CHECK(c->handed == c->count || (c->cursor.is_broken && (c->may_forget || reach(w, c) > c->handed)));
        return false;
    }
    CHECK(c->handed < c->count && !is_lost(w, c, c->handed) && number_of(frame) == c->entries[c->handed].message);
    wsf_cursor_take(&c->cursor);
    c->handed++;
    return true;
}

static bool rewind_to(world *w, client *c, uint64_t received)
{
    bool is_there = received >= reach(w, c) && received <= c->handed;
    bool goes = wsf_cursor_rewind(&w->backlog, &c->cursor, received);
    CHECK(c->may_forget ? !goes || is_there : goes == is_there);
    if (goes)
        c->handed = c->floor = (uint32_t)received; /* those before are let go */
    return goes;
}

static void give_up(world *w, client *c)
{
    wsf_cursor_clear(&w->backlog, &c->cursor);
    c->floor = c->count;
}

static void begin_anew(world *w, client *c)
{
    give_up(w, c);
    CHECK(c->cursor.capacity == 0 && c->cursor.runs == NULL);
    memset(&c->cursor, 0, sizeof c->cursor);
    c->count = c->handed = c->floor = 0;
    c->may_forget = false;
}

static world *open_world(uint64_t seed, const scale *size, uint32_t clients)
{
    world *w = must_alloc(1, sizeof *w);
    current_seed = seed;
    w->random.state = seed;
    w->size = size;
    w->messages = must_alloc(size->steps + 1, sizeof *w->messages);
    w->kept = must_alloc(2 * size->steps + 1, sizeof *w->kept);
    w->client_count = clients;
    for (uint32_t i = 0; i < clients; i++)
        w->clients[i].entries = must_alloc(MOST_PENDING * (size->steps + 1), sizeof(entry));
    w->now_ns = 1000000;
    wsf_backlog_init(&w->backlog, &w->account);
    w->backlog.limits = (wsf_backlog_limits){size->most_messages, UINT32_MAX, INT64_MAX / 2};
    w->first_number = 1;
    return w;
}

static void close_world(world *w)
{
    for (uint32_t i = 0; i < w->client_count; i++)
        begin_anew(w, &w->clients[i]);
    for (uint32_t i = 0; i < w->count; i++)
        if (w->messages[i].is_held)
            release_message(w, i);
    check_world(w);
    wsf_backlog_clear(&w->backlog);
    CHECK(w->account == 0 && w->backlog.order == NULL && w->backlog.logs.entries == NULL && w->backlog.table_bytes == 0);
    for (uint32_t i = 0; i < w->client_count; i++)
        free(w->clients[i].entries);
    free(w->messages);
    free(w->kept);
    free(w);
    check_nothing_lives();
}

/* ---- random programs ---------------------------------------------------------------------------------------------- */

static void some_message(world *w)
{
    chance *random = &w->random;
    const bool is_again = w->count != 0 && one_in(random, 40);
    size_t size = one_in(random, 8) ? below(random, 3000) : below(random, 100);
    uint32_t number = is_again ? below(random, w->count) : w->count;
    if (is_again && !w->messages[number].is_held)
        return;
    if (!is_again)
        (void)make_message(w, size);
    if (!one_in(random, 20))
        add(w, 1 + below(random, w->size->most_keys), number, one_in(random, 10) ? 1 + below(random, 4) : 0,
            one_in(random, 2));
    for (uint32_t i = 0; i < w->client_count; i++) {
        client *c = &w->clients[i];
        if (one_in(random, 5))
            continue;
        if (c->pending_count != 0 && one_in(random, 12)) /* in the place of an older one */
            c->pending[below(random, c->pending_count)] = number;
        else if (c->pending_count < MOST_PENDING)
            c->pending[c->pending_count++] = number;
    }
}

/* Somebody needs all of a frame as an object. */
static void give_object(world *w, message *m)
{
    if (m->frame == NULL || m->frame->bytes != NULL)
        return;
    wsf_frame_keep(m->frame, &object);
    wsf_backlog_note_object(&w->backlog, m->frame);
    m->cost += m->frame->size;
    w->bytes += is_kept(w, m->number) ? m->frame->size : 0;
}

/* What waits for a client is handed to its connection, or it has none and it is kept. */
static void flush(world *w, client *c)
{
    chance *random = &w->random;
    uint32_t count = c->pending_count == 0 ? 0 : 1 + below(random, c->pending_count);
    for (uint32_t i = 0; i < count; i++)
        if (w->messages[c->pending[i]].is_held)
            record(w, c, c->pending[i], c->handed == c->count && !one_in(random, 30), one_in(random, 60));
    memmove(c->pending, c->pending + count, (c->pending_count -= count) * sizeof *c->pending);
}

static uint64_t some_received(world *w, const client *c)
{
    chance *random = &w->random;
    const uint32_t first = reach(w, c);
    switch (below(random, 8)) {
    case 0: return below(random, c->count + 2);
    case 1: return c->handed + 1 + below(random, 3);
    case 2: return first - (first != 0);
    case 3: return first;
    default: return c->handed - (first < c->handed ? below(random, 1 + c->handed - first) : 0);
    }
}

static void come_back(world *w, client *c)
{
    (void)rewind_to(w, c, some_received(w, c));
    for (uint32_t most = one_in(&w->random, 3) ? below(&w->random, 20) : UINT32_MAX; most > 0 && take_next(w, c); most--)
        ;
}

static void some_operation(world *w)
{
    chance *random = &w->random;
    client *c = &w->clients[below(random, w->client_count)];
    w->now_ns += below(random, 100);
    switch (below(random, 16)) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4: some_message(w); return;
    case 5:
    case 6:
    case 7:
    case 8: flush(w, c); return;
    case 9:
    case 10: come_back(w, c); return;
    case 11: (void)take_next(w, c); return;
    case 12:
        if (w->count != 0) {
            uint32_t number = below(random, w->count);
            if (w->messages[number].is_held)
                release_message(w, number);
        }
        return;
    case 13:
        if (w->count != 0 && one_in(random, 3))
            give_object(w, &w->messages[below(random, w->count)]);
        if (one_in(random, 10)) {
            wsf_backlog_expire(&w->backlog, w->now_ns);
            must_expire(w, w->now_ns);
        }
        return;
    case 14:
        if (one_in(random, 20))
            begin_anew(w, c);
        else if (one_in(random, 20))
            give_up(w, c);
        return;
    default:
        if (one_in(random, 100)) {
            wsf_backlog_clear(&w->backlog);
            while (must_have(w) != 0)
                must_let_go(w);
        }
    }
}

static void run_world(uint64_t seed, const scale *size)
{
    world *w = open_world(seed, size, 1 + (uint32_t)(seed % MOST_CLIENTS));
    chance *random = &w->random;
    wsf_backlog_limits *limits = &w->backlog.limits;
    if (one_in(random, 3))
        limits->max_messages = below(random, 20);
    if (one_in(random, 3))
        limits->max_bytes = below(random, 30000);
    if (one_in(random, 3))
        limits->max_age_ns = below(random, 50000);
    if (one_in(random, 3)) /* far into a session */
        w->backlog.first_number = w->first_number = UINT32_MAX - below(random, 200);
    for (current_step = 0; current_step < size->steps; current_step++) {
        some_operation(w);
        if (current_step % size->check_every == 0)
            check_world(w);
    }
    for (uint32_t i = 0; i < w->client_count; i++) {
        client *c = &w->clients[i];
        if (rewind_to(w, c, reach(w, c) < c->handed ? reach(w, c) : c->handed))
            while (take_next(w, c))
                ;
    }
    close_world(w);
}

static void test_random(uint64_t seed)
{
    static const scale one = {.steps = 2500, .most_keys = 1, .most_messages = 60, .check_every = 1},
                       few = {.steps = 2500, .most_keys = 4, .most_messages = 60, .check_every = 1},
                       more = {.steps = 2500, .most_keys = 40, .most_messages = 200, .check_every = 1},
                       many = {.steps = 8000, .most_keys = 2000, .most_messages = 3000, .check_every = 100};
    static const scale *const scales[] = {&one, &few, &few, &more, &more, &many};
    for (uint64_t i = 0; i < 24; i++)
        run_world(seed * 24 + i, scales[below(&(chance){seed * 24 + i}, LENGTH(scales))]);
}

/* ---- very many runs ----------------------------------------------------------------------------------------------- */

static const scale roomy = {.steps = 8000, .most_messages = 8000};

/* A message of a log of its own for each. */
static uint32_t add_alone(world *w)
{
    uint32_t number = make_message(w, 4);
    add(w, 1000 + number, number, 0, false);
    return number;
}

static uint64_t can_be_sent(const client *c)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < c->cursor.count; i++)
        sum += c->cursor.runs[i].count;
    return sum;
}

/* A client that has all of it remembers the latest; one that is away is lost when it is too much. */
static void test_runs(uint64_t seed)
{
    world *w = open_world(seed, &roomy, 3);
    client *present = &w->clients[0], *away = &w->clients[1], *long_one = &w->clients[2];
    for (uint32_t i = 0; i < 2000; i++) {
        uint32_t number = make_message(w, 4);
        add(w, 1, number, 0, false);
        record(w, long_one, number, true, false);
    }
    for (uint32_t i = 0; i < 4000; i++) {
        uint32_t number = add_alone(w);
        record(w, present, number, true, false);
        record(w, long_one, number, true, false);
        record(w, away, number, false, false);
        CHECK(away->cursor.is_broken == (i >= WSF_MAX_RUNS));
        CHECK(can_be_sent(present) >= (i < WSF_MAX_RUNS / 3 ? i : WSF_MAX_RUNS / 3));
        CHECK(can_be_sent(long_one) >= (i < WSF_MAX_RUNS / 3 ? i : WSF_MAX_RUNS / 3));
        if (i % 100 == 0)
            check_world(w);
        if (i + 1 == WSF_MAX_RUNS) { /* until then, nothing is lost */
            CHECK(rewind_to(w, away, 0));
            while (take_next(w, away))
                ;
            CHECK(away->handed == away->count && rewind_to(w, away, 0));
        }
    }
    CHECK(away->cursor.capacity == 0 && !rewind_to(w, away, 0));
    for (client *c = present; c != NULL; c = c == present ? long_one : NULL) {
        CHECK(c->cursor.count <= WSF_MAX_RUNS && !rewind_to(w, c, 0));
        CHECK(rewind_to(w, c, c->count - WSF_MAX_RUNS / 4));
        while (take_next(w, c))
            ;
        CHECK(c->handed == c->count);
    }
    close_world(w);
}

/* ---- cases -------------------------------------------------------------------------------------------------------- */

/* There is no memory for more runs, but some that lie in the way are of no use any more. */
static void run_room_without_memory(uint64_t seed)
{
    static const scale size = {.steps = 100, .most_messages = 4};
    world *w = open_world(seed, &size, 1);
    client *c = w->clients;
    for (uint32_t i = 0; i < 4; i++)
        record(w, c, add_alone(w), true, false);
    CHECK(c->cursor.count == 4 && c->cursor.capacity == 4); /* of which one is let go */
    record(w, c, add_alone(w), true, true);
    check_world(w);
    CHECK(rewind_to(w, c, 1));
    for (uint32_t i = 1; i < 5; i++)
        CHECK(take_next(w, c));
    close_world(w);
}

/* A message is pushed once more: it stays where it is, and each time counts. */
static void run_pushed_again(uint64_t seed)
{
    world *w = open_world(seed, &roomy, 1);
    client *c = w->clients;
    uint32_t first = make_message(w, 4), second = make_message(w, 4);
    const uint32_t order[] = {first, first, second, first, second, second};
    for (size_t i = 0; i < LENGTH(order); i++) {
        add(w, 7, order[i], 0, false);
        record(w, c, order[i], true, false);
        check_world(w);
    }
    CHECK(w->backlog.count == 2);
    for (uint32_t received = 0; received <= LENGTH(order); received++) {
        CHECK(rewind_to(w, c, 0) == (received == 0));
        if (received != 0)
            break;
        for (uint32_t i = 0; i < LENGTH(order); i++)
            CHECK(take_next(w, c));
        CHECK(rewind_to(w, c, LENGTH(order) / 2));
        while (take_next(w, c))
            ;
        CHECK(c->handed == LENGTH(order));
    }
    close_world(w);
}

/* What nobody can be sent any more costs nothing: neither the places of a log that is empty, nor those of a client that
 * has a gap. */
static void run_costs_nothing(uint64_t seed)
{
    static const scale size = {.steps = 8000, .most_messages = 1000};
    world *w = open_world(seed, &size, 2);
    client *gone = &w->clients[0], *broken = &w->clients[1];
    const uint32_t first = make_message(w, 4), never_kept = make_message(w, 4);
    add(w, 1, first, 0, false);
    record(w, gone, first, false, false);
    record(w, broken, never_kept, false, false);
    for (uint32_t i = 0; i < 1000; i++)
        add(w, 1, make_message(w, 4), 0, false);
    for (uint32_t i = 0; i < 1000; i++) {
        uint32_t number = make_message(w, 4);
        add(w, 2 + i % 50, number, 0, false);
        record(w, broken, number, false, false);
    }
    check_world(w); /* the log of `gone` has no entry, and no ring */
    CHECK(broken->cursor.is_broken && broken->cursor.runs == NULL);
    CHECK(!rewind_to(w, broken, 0) && !rewind_to(w, broken, 1) && !take_next(w, broken));
    CHECK(!rewind_to(w, gone, 0) && !rewind_to(w, gone, 1) && !take_next(w, gone));
    close_world(w);
}

/* Limits of nothing: nothing is kept, and the client is told. */
static void run_nothing_is_kept(uint64_t seed)
{
    world *w = open_world(seed, &roomy, 1);
    client *c = w->clients;
    for (uint32_t i = 0; i < 2; i++) {
        w->backlog.limits = (wsf_backlog_limits){i == 0 ? 0 : 10, i == 0 ? 1000 : 0, 1000};
        record(w, c, add_alone(w), true, false);
        check_world(w);
        CHECK(w->backlog.count == 0 && !rewind_to(w, c, c->count - 1) && rewind_to(w, c, c->count));
    }
    close_world(w);
}

/* Messages of many logs in turn: one run for each log, however long it goes on. */
static void run_many_logs(uint64_t seed)
{
    enum { KEYS = 300 };
    world *w = open_world(seed, &roomy, 2);
    client *present = &w->clients[0], *away = &w->clients[1];
    for (uint32_t i = 0; i < 7000; i++) {
        uint32_t number = make_message(w, 4);
        add(w, 1 + (i < KEYS ? i : below(&w->random, KEYS)), number, 0, false);
        record(w, present, number, true, false);
        record(w, away, number, false, false);
    }
    CHECK(present->cursor.count == KEYS && away->cursor.count == KEYS);
    for (uint32_t received = 0; received <= 7000; received += 70) {
        CHECK(rewind_to(w, present, received));
        for (uint32_t i = 0; i < 100 && take_next(w, present); i++)
            ;
        wsf_cursor_check(&w->backlog, &present->cursor);
    }
    while (take_next(w, away))
        ;
    CHECK(away->handed == 7000 && present->handed == 7000);
    check_world(w);
    close_world(w);
}

static void test_cases(uint64_t seed)
{
    run_room_without_memory(seed);
    run_pushed_again(seed);
    run_many_logs(seed);
    run_costs_nothing(seed);
    run_nothing_is_kept(seed);
}

int main(int argc, char **argv)
{
    object = (PyObject){.references = 1, .type = &object_type};
    static const test_part parts[] = {
        {"cases", test_cases, 1},
        {"runs", test_runs, 1},
        {"random", test_random, 4},
    };
    return run_parts(parts, LENGTH(parts), argc, argv);
}
