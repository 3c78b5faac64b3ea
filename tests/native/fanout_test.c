/* Frames, outboxes, the fan-out over real sockets, and the pool, without an interpreter: fanout_test [MULTIPLIER] [PART]
 * [SEED]; see harness.h.
 *
 * Parts: frames; outbox (random sequences against an array, with allocations that fail); jobs (each way a plan can send);
 * controls (what may happen to a control frame, case by case); sessions (and to a client that comes back);
 * random, comings and crowd (random programs on few links, on such with sessions, and on many with a pool, against a model
 * of every link, message, report and total); pool; fork.
 *
 * The model knows, for each connection, every byte that must arrive there, and each peer compares what it reads with
 * that. What a socket takes is the kernel's choice, so the model learns it from the jobs; that they tell the truth is
 * seen in the streams.
 *
 * A client with a session goes through several connections, which are cut anywhere: it takes what it has read apart, frame
 * by frame, counts its messages, and must be given each of those that the model has as recorded for it once and in order, or
 * be told that they are not there any more. Where logs and cursors may give up early, for want of memory, the model learns it
 * from them; backlog_test has more of that.
 */
#define WSF_SHIM_IMPLEMENTATION
#include "fanout.h"
#include "harness.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- keys --------------------------------------------------------------------------------------------------------- */

enum { KEYS = 200, NO_KEY = -1 };

/* Equal texts as two objects, so that comparing objects is not enough; many have equal hashes or folds. */
static PyObject *keys[KEYS][2];

static void make_keys(void)
{
    static const uint32_t first[] = {SHIM_EQUAL_HASH, SHIM_EQUAL_FOLD, 'k', 0x3B1};
    for (uint32_t i = 0; i < KEYS; i++)
        for (int twin = 0; twin < 2; twin++) {
            const uint32_t characters[] = {first[i % LENGTH(first)], 'a' + i / 8, 'a' + i % 8};
            keys[i][twin] = shim_text_new(characters, 3, (int32_t)i);
            (void)PyObject_Hash(keys[i][twin]);
        }
}

static void free_keys(void)
{
    for (uint32_t i = 0; i < KEYS; i++)
        for (int twin = 0; twin < 2; twin++) {
            CHECK(shim_references(keys[i][twin]) == 1);
            Py_DECREF(keys[i][twin]);
        }
}

static PyObject *key_object(chance *random, int key) { return key == NO_KEY ? NULL : keys[key][below(random, 2)]; }

/* ---- frames ------------------------------------------------------------------------------------------------------- */

/* RFC 6455, 5.2, by division; returns the size. */
static size_t spell_header(uint8_t first_bits, uint64_t size, uint8_t *out)
{
    const unsigned extended = size > 65535 ? 8 : size > 125 ? 2 : 0;
    out[0] = (uint8_t)(128 + first_bits);
    out[1] = (uint8_t)(extended == 8 ? 127 : extended == 2 ? 126 : size);
    for (unsigned i = extended; i > 0; i--, size /= 256)
        out[1 + i] = (uint8_t)(size % 256);
    return 2 + extended;
}

static const uint8_t every_first_bits[] = {WSF_TEXT, WSF_BINARY, WSF_TEXT | WSF_RSV1, WSF_BINARY | WSF_RSV1, WSF_PING};

static void check_frame(uint8_t first_bits, size_t size)
{
    int64_t account = 0;
    uint8_t header[WSF_MAX_HEADER], *payload = must_alloc(size, 1);
    size_t header_size = spell_header(first_bits, size, header);
    for (size_t i = 0; i < size; i++)
        payload[i] = (uint8_t)(i * 7 + i / 256);
    for (int fault = 2; fault >= 0; fault--) {
        inject_fault(fault, false);
        wsf_message *message = wsf_message_new(&account, 5, NULL, size);
        wsf_frame *frame = message == NULL ? NULL : wsf_frame_new(message, first_bits, payload, size);
        CHECK(end_faults() == (frame == NULL) && (message == NULL) == (fault == 1));
        if (frame != NULL) {
            CHECK(frame->size == header_size + size && frame->header_size == header_size && frame->bytes == NULL);
            CHECK(memcmp(frame->data, header, header_size) == 0 &&
                  memcmp(frame->data + header_size, payload, size) == 0);
            CHECK(((uintptr_t)frame & WSF_QUEUED) == 0 && frame->message == message && message->references == 2);
            CHECK(account == (int64_t)(sizeof *message + sizeof *frame + frame->size));
            wsf_frame_release(frame);
        }
        if (message != NULL) {
            CHECK(message->references == 1 && account == sizeof *message);
            wsf_message_release(message);
        }
        CHECK(account == 0);
    }
    free(payload);
    check_nothing_lives();
}

static void test_frames(uint64_t seed)
{
    static const uint64_t sizes[] = {0,     1,     2,         124,        125,        126,         127,        255,
                                     256,   65534, 65535,     65536,      65537,      1 << 20,     UINT32_MAX, 1ULL << 32,
                                     (1ULL << 32) + 1, (1ULL << 40) + 0xABCDE, INT64_MAX};
    chance random = {seed};
    current_seed = seed;
    for (size_t bits = 0; bits < LENGTH(every_first_bits); bits++) {
        for (size_t i = 0; i < LENGTH(sizes) + 1000; i++) {
            uint8_t expected[WSF_MAX_HEADER + 1] = {0}, actual[WSF_MAX_HEADER + 1] = {0};
            uint64_t size = i < LENGTH(sizes) ? sizes[i] : draw(&random) >> (1 + below(&random, 63));
            size_t length = spell_header(every_first_bits[bits], size, expected);
            CHECK(wsf_frame_header(every_first_bits[bits], size, actual) == length);
            CHECK(memcmp(expected, actual, sizeof actual) == 0);
        }
        for (size_t i = 0; i < LENGTH(sizes) && sizes[i] <= 1 << 20; i++)
            check_frame(every_first_bits[bits], (size_t)sizes[i]);
    }
}

/* ---- outbox ------------------------------------------------------------------------------------------------------- */

enum { MOST_ENTRIES = 700 };

typedef struct {
    chance random;
    wsf_outbox outbox;
    int64_t account, frame_bytes; /* the second: what the frames that live are charged */
    struct {
        wsf_frame *frame;
        int key;
        wsf_entry queued; /* or WSF_AGAIN: those come first */
    } entries[MOST_ENTRIES];
    uint32_t count, again, most_keys;
} outbox_model;

static wsf_frame *make_frame(outbox_model *model, int key)
{
    static const uint8_t payload[300];
    size_t size = below(&model->random, sizeof payload);
    wsf_message *message = wsf_message_new(&model->account, 0, key_object(&model->random, key), size);
    wsf_frame *frame = wsf_frame_new(message, WSF_TEXT, payload, size);
    wsf_message_release(message);
    model->frame_bytes += (int64_t)(sizeof *message + sizeof *frame + frame->size);
    return frame;
}

static void drop_frame(outbox_model *model, wsf_frame *frame)
{
    model->frame_bytes -= (int64_t)(sizeof(wsf_message) + sizeof *frame + frame->size);
    CHECK(frame->references == 1);
    wsf_frame_release(frame);
}

static void check_outbox(outbox_model *model)
{
    wsf_outbox *outbox = &model->outbox;
    uint64_t bytes = 0;
    wsf_outbox_check(outbox);
    CHECK(outbox->count == model->count);
    for (uint32_t i = 0; i < model->count; i++) {
        CHECK(*wsf_outbox_at(outbox, i) == ((wsf_entry)model->entries[i].frame | model->entries[i].queued));
        bytes += model->entries[i].frame->size;
    }
    CHECK(outbox->bytes == bytes);
    CHECK(model->account == model->frame_bytes + (int64_t)(outbox->capacity * sizeof *outbox->ring +
                                                            outbox->place_capacity * sizeof *outbox->places));
    CHECK(outbox->count > 1 || outbox->ring == NULL || outbox->capacity != 0);
    CHECK(wsf_live[WSF_LIVE_FRAME] == model->count && wsf_live[WSF_LIVE_MESSAGE] == model->count);
}

static int64_t latest_of(const outbox_model *model, int key)
{
    for (uint32_t i = model->count; i-- > model->again;)
        if (model->entries[i].key == key)
            return i;
    return -1;
}

static int64_t find(outbox_model *model, int key)
{
    return wsf_outbox_find(&model->outbox, &model->account, key_object(&model->random, key));
}

static void outbox_push(outbox_model *model)
{
    int key = one_in(&model->random, 3) ? NO_KEY : (int)below(&model->random, model->most_keys);
    const bool is_again = model->again == model->count && !one_in(&model->random, 3);
    wsf_entry queued = is_again ? WSF_AGAIN : below(&model->random, 2);
    wsf_frame *frame = make_frame(model, key);
    const wsf_outbox before = model->outbox;
    const int64_t account = model->account;
    /* The first allocation is the ring's, if it grows; a table that cannot be made is done without. */
    bool grows = before.count != 0 && before.count >= before.capacity;
    inject_fault(one_in(&model->random, 3) ? 1 + below(&model->random, 2) : 0, one_in(&model->random, 2));
    bool is_first = shim_fault.countdown == 1;
    int result = wsf_outbox_push(&model->outbox, &model->account, frame, queued);
    (void)end_faults();
    CHECK(result == (grows && is_first ? WSF_NO_MEMORY : WSF_OK));
    if (result != WSF_OK) {
        CHECK(memcmp(&before, &model->outbox, sizeof before) == 0 && model->account == account);
        CHECK(wsf_outbox_push(&model->outbox, &model->account, frame, queued) == WSF_OK);
    }
    model->entries[model->count].frame = frame;
    model->entries[model->count].key = key;
    model->entries[model->count++].queued = queued;
    model->again += is_again;
}

static void outbox_pop(outbox_model *model)
{
    const bool skips = model->count > model->again && one_in(&model->random, 3);
    const uint32_t at = skips ? model->again : 0;
    wsf_entry entry = skips ? wsf_outbox_take(&model->outbox, &model->account, at)
                            : wsf_outbox_pop(&model->outbox, &model->account);
    CHECK(entry == ((wsf_entry)model->entries[at].frame | model->entries[at].queued));
    drop_frame(model, model->entries[at].frame);
    model->again -= at < model->again;
    memmove(&model->entries[at], &model->entries[at + 1], (--model->count - at) * sizeof model->entries[0]);
}

static void outbox_find(outbox_model *model)
{
    int key = (int)below(&model->random, model->most_keys);
    inject_fault(one_in(&model->random, 4), false);
    int64_t place = find(model, key);
    CHECK(!end_faults() || model->outbox.places == NULL);
    CHECK(place == latest_of(model, key));
    if (place < 0 || one_in(&model->random, 2))
        return;
    wsf_frame *frame = make_frame(model, key);
    wsf_entry queued = below(&model->random, 2);
    wsf_entry former = wsf_outbox_replace(&model->outbox, (uint32_t)place, frame, queued);
    CHECK(former == ((wsf_entry)model->entries[place].frame | model->entries[place].queued));
    drop_frame(model, wsf_entry_frame(former));
    model->entries[place].frame = frame;
    model->entries[place].queued = queued;
}

static void run_outbox(uint64_t seed, uint32_t most, uint32_t most_keys, uint32_t steps)
{
    outbox_model *model = must_alloc(1, sizeof *model);
    model->random.state = seed;
    model->most_keys = most_keys;
    model->outbox.first_number = one_in(&model->random, 2) ? UINT32_MAX - below(&model->random, 3 * most) : 0;
    current_seed = seed;
    uint32_t aim = 0;
    for (current_step = 0; current_step < steps; current_step++) {
        if (one_in(&model->random, 50))
            aim = one_in(&model->random, 3) ? 0 : below(&model->random, most);
        uint32_t what = below(&model->random, 8);
        if (what == 0)
            outbox_find(model);
        else if (model->count < most && (model->count == 0 || what % 7 < (model->count < aim ? 6U : 2U)))
            outbox_push(model);
        else
            outbox_pop(model);
        check_outbox(model);
    }
    while (model->count != 0)
        outbox_pop(model);
    CHECK(model->account == 0 && model->outbox.ring == NULL && model->outbox.places == NULL);
    free(model);
}

/* A key that comes and goes while others wait leaves nothing behind in the table. */
static void run_recurring_key(void)
{
    outbox_model *model = must_alloc(1, sizeof *model);
    uint32_t used = 0;
    for (uint32_t i = 0; i < MOST_ENTRIES; i++) {
        wsf_frame *frame = make_frame(model, NO_KEY);
        CHECK(wsf_outbox_push(&model->outbox, &model->account, frame, 0) == WSF_OK);
    }
    CHECK(find(model, 2) == -1 && model->outbox.places != NULL);
    for (uint32_t i = 0; i < 60 * MOST_ENTRIES; i++) {
        int key = find(model, 2) == -1 ? 2 : NO_KEY;
        CHECK(wsf_outbox_push(&model->outbox, &model->account, make_frame(model, key), 0) == WSF_OK);
        for (int pops = 0; pops < 2 && model->outbox.count > 20; pops++)
            drop_frame(model, wsf_entry_frame(wsf_outbox_pop(&model->outbox, &model->account)));
        used = model->outbox.place_used > used ? model->outbox.place_used : used;
        wsf_outbox_check(&model->outbox);
    }
    CHECK(used <= 2);
    while (model->outbox.count != 0)
        drop_frame(model, wsf_entry_frame(wsf_outbox_pop(&model->outbox, &model->account)));
    CHECK(model->account == 0);
    free(model);
}

static void test_outbox(uint64_t seed)
{
    make_keys();
    for (uint32_t i = 0; i < 40; i++)
        run_outbox(seed * 40 + i, 2 + 5 * (i % 8), 1 + 3 * (i % 16), 2000);
    run_outbox(seed, MOST_ENTRIES, KEYS, 4000);
    run_recurring_key();
    free_keys();
    check_nothing_lives();
}

/* ---- sockets ------------------------------------------------------------------------------------------------------ */

typedef struct {
    uint8_t *data;
    size_t size, capacity;
} bytes;

static void bytes_add(bytes *to, const void *data, size_t size)
{
    if (to->size + size > to->capacity) {
        to->capacity = 2 * (to->size + size);
        to->data = realloc(to->data, to->capacity);
        SHIM_REQUIRE(to->data != NULL);
    }
    if (size != 0)
        memcpy(to->data + to->size, data, size);
    to->size += size;
}

static void bytes_skip(bytes *from, size_t size)
{
    from->size -= size;
    if (from->size != 0)
        memmove(from->data, from->data + size, from->size);
}

/* Small buffers, so that sockets take less than they are given. Those of TCP hold several segments: with less it falls
 * back on its timers. */
static void limit_buffers(int fd, bool is_tcp)
{
    const int send_size = is_tcp ? 4096 : 1, receive_size = 16384, segment = 1000;
    SHIM_REQUIRE(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_size, sizeof send_size) == 0);
    SHIM_REQUIRE(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_size, sizeof receive_size) == 0);
    if (is_tcp)
        SHIM_REQUIRE(setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment) == 0);
}

static void open_tcp_pair(int *ends, bool is_small)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    SHIM_REQUIRE(listener >= 0 && bind(listener, (struct sockaddr *)&address, length) == 0);
    if (is_small)
        limit_buffers(listener, true);
    SHIM_REQUIRE(listen(listener, 1) == 0 && getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    SHIM_REQUIRE(ends[0] >= 0);
    if (is_small)
        limit_buffers(ends[0], true);
    SHIM_REQUIRE(connect(ends[0], (struct sockaddr *)&address, length) == 0);
    ends[1] = accept(listener, NULL, NULL);
    SHIM_REQUIRE(ends[1] >= 0);
    close(listener);
}

static void open_pair(int *ends, bool is_tcp, bool is_small)
{
    if (is_tcp) {
        open_tcp_pair(ends, is_small);
    } else {
        SHIM_REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        if (is_small)
            limit_buffers(ends[0], false);
    }
    for (int end = 0; end < 2; end++)
        SHIM_REQUIRE(fcntl(ends[end], F_SETFL, O_NONBLOCK) == 0);
}

/* ---- the model of a fan-out --------------------------------------------------------------------------------------- */

enum { LETTERS = 400, PINGS = 40, VARIANTS = 3, MOST_ITEMS = 1500, MOST_REPORTS = 4096 };

/* A message. It lives as long as the test holds it, or an entry has one of its frames. */
typedef struct {
    wsf_message *message;
    wsf_frame *frames[VARIANTS];
    bytes encoded[VARIANTS];
    int64_t entries[VARIANTS];
    bool is_held, is_awaited, is_greeting;
    bool is_logged;  /* is kept for those who come back */
    uint64_t number; /* in the logs, while it is */
    uint64_t hash[VARIANTS];
    wsf_tally tally;
    int key;
    int64_t created_ns;
    uint64_t payload_size;
} letter;

typedef struct {
    letter *of;
    bool queued;
    bool again; /* it is sent once more, or is a greeting: in a frame of variant 0, and no tally has it */
} item;

/* A message that was recorded for a client: it was handed to its connection, or is kept for it. */
typedef struct {
    letter *of; /* while the number is in the logs */
    uint64_t number;
    uint64_t hash[VARIANTS];
} recorded;

/* What is known of a client across its connections. */
typedef struct {
    recorded *list;
    size_t count, capacity, handed;
    size_t floor;      /* those before it have been let go */
    bool may_forget;   /* memory was lacking */
    uint64_t received; /* what the client itself has counted */
} session;

/* A control frame. It lives as long as the test holds it, or a link has it. */
typedef struct {
    wsf_frame *frame; /* NULL: there is none */
    uint8_t encoded[2 + 125];
    size_t size;
    int64_t links;
    bool is_held;
} ping;

/* A connection: the link, the model of it, a transport that writes what it has later, and the other end. */
typedef struct {
    wsf_link *link; /* NULL: there is none */
    PyObject record;
    uint32_t facts, variant;
    item items[MOST_ITEMS];
    uint32_t count, ring_capacity;
    uint64_t in_transport, shared, mark;
    letter *rest; /* of whose frame the transport has `shared` bytes that it has not copied */
    uint32_t rest_variant;
    int64_t blocked_ns;
    ping *control;
    int64_t control_left_ns;
    bool has_control_in_transport;
    bool was_held, is_news; /* whether it was held as far as the owner knows, and whether that is to be told anew */
    uint64_t peak;
    bool is_left_out, is_direct;
    int fd, far_fd; /* far_fd -1: the peer has gone */
    bytes expected, transport;
    uint64_t lost;
    session *session;       /* NULL: it has none */
    bool is_greeted;        /* or is to be, by what was handed to the fan-out */
    bool awaits_greeting;   /* the client does */
    uint64_t greeting_hash;
    bytes unread; /* by the client: a frame that is not complete */
    uint64_t counted_messages, counted_bytes, told_messages, told_bytes;
} peer;

typedef struct {
    uint32_t peers, steps;
    bool is_small; /* buffers */
    unsigned helpers;
    bool is_about_sessions;
} scale;

typedef struct {
    chance random;
    const scale *size;
    wsf_limits limits;
    wsf_fanout *fanout;
    wsf_pool *pool;
    letter letters[LETTERS];
    ping pings[PINGS];
    peer *peers, **line, **later, **order;
    uint32_t line_count, later_count, waiting_count, links;
    wsf_totals totals;
    wsf_report reports[MOST_REPORTS];
    uint32_t report_count;
    bool has_sessions;
    uint32_t lacking; /* memory lacks one time of so many where sessions are concerned */
    uint32_t sessions;
    letter *log[LETTERS]; /* what is kept, from the oldest on */
    uint32_t log_count;
    uint64_t log_first, log_bytes; /* number of the oldest; bytes of all */
    int64_t now_ns;
    bool lacks_memory; /* all allocations fail */
    bool is_round;     /* sizes, limits and times are mostly multiples of 100, so that limits are met exactly */
    uint8_t payload[1 << 17];
} world;

static uint32_t variant_of(const peer *p, const item *i) { return i->again ? 0 : p->variant; }

static const bytes *frame_of(const peer *p, const item *i) { return &i->of->encoded[variant_of(p, i)]; }

static uint64_t peer_bytes(const peer *p)
{
    uint64_t size = p->in_transport;
    for (uint32_t i = 0; i < p->count; i++)
        size += frame_of(p, &p->items[i])->size;
    return size;
}

/* What the limit of one connection is held against. */
static uint64_t judged_bytes(const world *w, const peer *p)
{
    return peer_bytes(p) - (w->limits.policy == WSF_CONFLATE ? p->in_transport : 0);
}

static uint64_t copied_bytes(const peer *p) { return p->in_transport > p->shared ? p->in_transport - p->shared : 0; }

static bool waits(const peer *p) { return (p->facts & WSF_WAITS) != 0; }

static bool frame_lives(const letter *l, uint32_t variant)
{
    return l->message != NULL && (l->is_held || l->entries[variant] != 0 || (l->is_logged && variant == 0));
}

/* Forget a letter that nobody has any more. */
static void bury(letter *l)
{
    if (l->message == NULL || l->is_held || l->is_logged)
        return;
    for (uint32_t variant = 0; variant < VARIANTS; variant++)
        if (l->entries[variant] != 0)
            return;
    l->message = NULL;
    for (uint32_t variant = 0; variant < VARIANTS; variant++)
        l->encoded[variant].size = 0;
}

static void bury_ping(ping *g)
{
    if (!g->is_held && g->links == 0)
        g->frame = NULL;
}

/* What logs and cursors take is their own affair; see backlog_test. */
static int64_t kept_account(const world *w)
{
    const wsf_backlog *backlog = &w->fanout->backlog;
    int64_t sum = (int64_t)(backlog->capacity * sizeof *backlog->order);
    for (uint32_t at = 0; at < backlog->logs.capacity; at++)
        if (backlog->logs.entries[at] != 0) {
            const wsf_log *log = wsf_entry_item(backlog->logs.entries[at]);
            sum += (int64_t)(sizeof *log + log->capacity * sizeof *log->ring);
        }
    for (uint32_t i = 0; i < w->size->peers; i++)
        if (w->peers[i].session != NULL)
            sum += (int64_t)(sizeof(wsf_cursor) + w->peers[i].link->cursor->capacity * sizeof(wsf_run));
    return sum;
}

static int64_t expected_account(const world *w)
{
    int64_t sum = kept_account(w);
    for (uint32_t i = 0; i < PINGS; i++)
        if (w->pings[i].frame != NULL)
            sum += (int64_t)(sizeof(wsf_message) + sizeof(wsf_frame) + w->pings[i].size);
    for (uint32_t i = 0; i < LETTERS; i++) {
        const letter *l = &w->letters[i];
        sum += l->message == NULL ? 0 : (int64_t)sizeof *l->message;
        for (uint32_t variant = 0; variant < VARIANTS; variant++)
            if (frame_lives(l, variant))
                sum += (int64_t)(sizeof(wsf_frame) + l->encoded[variant].size);
    }
    for (uint32_t i = 0; i < w->size->peers; i++) {
        const peer *p = &w->peers[i];
        if (p->link != NULL) /* tables of keys are the outbox's own affair */
            sum += (int64_t)(copied_bytes(p) + p->ring_capacity * sizeof(wsf_entry) +
                             p->link->outbox.place_capacity * sizeof(wsf_key_place));
    }
    return sum;
}

/* ---- what must happen --------------------------------------------------------------------------------------------- */

static void must_report(world *w, peer *p, int what, int cause, uint32_t messages, uint64_t size, int64_t since_ns)
{
    if (what != WSF_TOO_SLOW && !w->fanout->wants_reports)
        return;
    if (w->lacks_memory && w->report_count == w->fanout->report_capacity)
        return;
    SHIM_REQUIRE(w->report_count < MOST_REPORTS);
    w->reports[w->report_count++] =
        (wsf_report){p->link, (uint8_t)what, (uint8_t)cause, messages, size, (double)(w->now_ns - since_ns) / 1e9};
}

static void leave(peer **line, uint32_t *count, peer *p)
{
    for (uint32_t i = 0; i < *count; i++)
        if (line[i] == p) {
            memmove(&line[i], &line[i + 1], (--*count - i) * sizeof *line);
            return;
        }
    SHIM_REQUIRE(0);
}

static void stand_in_line(world *w, peer *p)
{
    if (!(p->facts & WSF_IN_LINE))
        w->line[w->line_count++] = p;
    p->facts |= WSF_IN_LINE;
}

static void leave_line(world *w, peer *p)
{
    if (p->facts & WSF_IN_LINE)
        leave(w->line, &w->line_count, p);
    p->facts &= ~(uint32_t)WSF_IN_LINE;
}

static bool is_held(const peer *p)
{
    return p->has_control_in_transport || (p->control != NULL && (p->facts & WSF_BLOCKED) != 0);
}

/* It is told once, however often it changes before it is asked for. */
static void must_note_held(peer *p)
{
    p->is_news = p->is_news || is_held(p) != p->was_held;
}

static void must_note_peak(peer *p)
{
    p->peak = peer_bytes(p) > p->peak ? peer_bytes(p) : p->peak;
}

static void must_have_control(peer *p, ping *g)
{
    ping *former = p->control;
    if (g != NULL)
        g->links++;
    p->control = g;
    if (former != NULL) {
        former->links--;
        bury_ping(former);
    }
}

static void must_drop_control(peer *p)
{
    must_have_control(p, NULL);
    p->has_control_in_transport = false;
    must_note_held(p);
}

static void must_let_control_leave(world *w, peer *p, bool is_in_transport)
{
    must_have_control(p, NULL);
    p->control_left_ns = w->now_ns;
    p->has_control_in_transport = is_in_transport;
    must_note_held(p);
    w->totals.controls++;
}

/* The item leaves pending or queued. */
static void take_off(item *from)
{
    if (from->queued)
        from->of->tally.queued--;
    else
        from->of->tally.pending--;
}

static void remove_item(peer *p, uint32_t at)
{
    letter *l = p->items[at].of;
    l->entries[variant_of(p, &p->items[at])]--;
    memmove(&p->items[at], &p->items[at + 1], (--p->count - at) * sizeof *p->items);
    bury(l);
    if (p->count == 0)
        p->ring_capacity = 0;
}

static uint32_t again_of(const peer *p)
{
    uint32_t again = 0;
    while (again < p->count && p->items[again].again)
        again++;
    return again;
}

/* Drop from the front what is more than most_bytes, or older. Returns how many are other messages than `cause_of_it`. */
static uint32_t must_drop(world *w, peer *p, uint64_t most_bytes, int64_t before_ns, int cause, const letter *cause_of_it)
{
    uint32_t messages = 0, others = 0;
    uint64_t size = 0;
    int64_t oldest_ns = 0;
    const uint32_t first = again_of(p);
    while (p->count > first && (judged_bytes(w, p) > most_bytes || p->items[first].of->created_ns < before_ns)) {
        letter *l = p->items[first].of;
        oldest_ns = messages++ == 0 ? l->created_ns : oldest_ns;
        others += l != cause_of_it;
        size += l->payload_size;
        p->lost += cause == WSF_BY_END ? frame_of(p, &p->items[first])->size : 0;
        take_off(&p->items[first]);
        l->tally.dropped++;
        remove_item(p, first);
    }
    w->totals.dropped[cause] += messages;
    if (messages != 0)
        must_report(w, p, WSF_DROPPED, cause, messages, size, oldest_ns);
    return others;
}

static void must_begin_waiting(world *w, peer *p)
{
    w->waiting_count++;
    leave_line(w, p);
    for (uint32_t i = again_of(p); i < p->count; i++) {
        take_off(&p->items[i]);
        p->items[i].of->tally.queued++;
        p->items[i].queued = true;
    }
    must_note_peak(p);
    must_note_held(p);
}

static void must_set(world *w, peer *p, uint32_t facts)
{
    bool before = waits(p);
    p->facts |= facts;
    if (!before && waits(p))
        must_begin_waiting(w, p);
    must_note_held(p);
}

static void must_have_in_transport(peer *p, uint64_t in_transport)
{
    p->in_transport = in_transport;
    if (p->shared > in_transport)
        p->shared = in_transport;
    if (p->shared == 0 && p->rest != NULL) {
        p->rest->entries[p->rest_variant]--;
        bury(p->rest);
        p->rest = NULL;
    }
}

static void must_clear(world *w, peer *p, uint32_t facts)
{
    bool before = waits(p);
    p->facts &= ~facts;
    if (facts & WSF_BLOCKED) {
        must_have_in_transport(p, 0);
        if (p->has_control_in_transport)
            p->control_left_ns = w->now_ns;
        p->has_control_in_transport = false;
    }
    must_note_held(p);
    if (!before || waits(p))
        return;
    w->waiting_count--;
    if (peer_bytes(p) <= w->limits.low_bytes)
        p->facts &= ~(uint32_t)WSF_SHEDDING;
    if (p->count != 0 || p->control != NULL)
        stand_in_line(w, p);
}

static void must_block(world *w, peer *p, uint64_t in_transport)
{
    if (!(p->facts & WSF_BLOCKED)) {
        p->blocked_ns = w->now_ns;
        w->totals.blocked++;
    }
    must_have_in_transport(p, in_transport);
    must_set(w, p, WSF_BLOCKED);
    must_note_peak(p);
}

/* ---- what is kept for those who come back ------------------------------------------------------------------------- */

static bool is_in_log(const world *w, uint64_t number) { return number >= w->log_first; }

/* What an entry costs; see backlog.c. */
static uint64_t log_cost(const letter *l)
{
    return sizeof(wsf_frame) + l->encoded[0].size + sizeof(wsf_message) + sizeof(wsf_frame *) + sizeof(wsf_log *);
}

static void must_let_go(world *w)
{
    letter *l = w->log[0];
    w->log_bytes -= log_cost(l);
    w->log_first++;
    l->is_logged = false;
    memmove(&w->log[0], &w->log[1], --w->log_count * sizeof *w->log);
    bury(l);
}

static void must_expire_log(world *w, int64_t now_ns)
{
    while (w->log_count != 0 && w->log[0]->created_ns < now_ns - w->fanout->backlog.limits.max_age_ns)
        must_let_go(w);
}

static void must_log(world *w, letter *l)
{
    const wsf_backlog_limits *limits = &w->fanout->backlog.limits;
    if (l->is_logged)
        return;
    must_expire_log(w, l->created_ns);
    if (log_cost(l) > limits->max_bytes)
        return;
    while (w->log_count != 0 && (w->log_count >= limits->max_messages || w->log_bytes + log_cost(l) > limits->max_bytes))
        must_let_go(w);
    if (w->lacks_memory && l->message->log_number < w->log_first)
        return; /* which is allowed */
    l->is_logged = true;
    l->number = w->log_first + w->log_count;
    w->log[w->log_count++] = l;
    w->log_bytes += log_cost(l);
}

static void must_record(world *w, peer *p, letter *l, bool is_handed)
{
    session *s = p->session;
    if (s->count == s->capacity) {
        s->capacity = 2 * s->capacity + 64;
        s->list = realloc(s->list, s->capacity * sizeof *s->list);
        SHIM_REQUIRE(s->list != NULL);
    }
    CHECK(!is_handed || s->handed == s->count);
    recorded *r = &s->list[s->count++];
    *r = (recorded){.of = l, .number = l->is_logged ? l->number : 0};
    memcpy(r->hash, l->hash, sizeof r->hash);
    s->handed += is_handed;
    s->may_forget = s->may_forget || w->lacks_memory;
}

/* The first from which on everything can be sent again. */
static size_t reach_of(const world *w, const session *s)
{
    size_t first = s->count;
    while (first > s->floor && is_in_log(w, s->list[first - 1].number))
        first--;
    return first;
}

/* What the cursor itself has; it may be less where memory was lacking. */
static uint64_t cursor_reach(const wsf_cursor *cursor)
{
    uint64_t kept = 0;
    for (uint32_t i = 0; i < cursor->count; i++)
        kept += cursor->runs[i].count;
    return cursor->recorded - kept;
}

static bool must_append(world *w, peer *p, letter *l, bool is_again);
static void must_give_up(world *w, peer *p, int cause);

/* The next of what is kept gets into the outbox, up to what is written at once. */
static void must_refill(world *w, peer *p)
{
    session *s = p->session;
    if (!(p->facts & WSF_BEHIND))
        return;
    const wsf_cursor *cursor = p->link->cursor;
    bool is_broken = cursor->is_broken || (s->may_forget && cursor_reach(cursor) > s->handed);
    CHECK(!is_broken || s->may_forget || reach_of(w, s) > s->handed);
    while (s->handed < s->count && !is_broken) {
        const recorded *r = &s->list[s->handed];
        is_broken = !is_in_log(w, r->number);
        if (is_broken)
            break;
        if (p->count == 256 || (p->count != 0 && peer_bytes(p) - p->in_transport + r->of->encoded[0].size > WSF_JOIN_BYTES))
            return;
        if (!must_append(w, p, r->of, true))
            return;
        s->handed++;
    }
    if (is_broken)
        must_give_up(w, p, WSF_BY_BYTES);
    else
        p->facts &= ~(uint32_t)WSF_BEHIND;
}

/* ---- the end, and who is too slow --------------------------------------------------------------------------------- */

static void must_close(world *w, peer *p, int cause)
{
    p->facts &= ~(uint32_t)(WSF_OPEN | WSF_DIRECT | WSF_BEHIND);
    must_drop_control(p);
    if (p->session == NULL) {
        (void)must_drop(w, p, 0, INT64_MAX, cause, NULL);
        return;
    }
    p->facts |= WSF_AWAY;
    while (p->count != 0) {
        letter *l = p->items[0].of;
        p->lost += frame_of(p, &p->items[0])->size;
        if (!p->items[0].again) {
            must_record(w, p, l, false);
            take_off(&p->items[0]);
            l->tally.away++;
        }
        remove_item(p, 0);
    }
}

/* Since when something waits for a peer that waits; INT64_MAX: nobody can say. */
static int64_t since_ns(const peer *p)
{
    int64_t blocked_ns = (p->facts & WSF_BLOCKED) ? p->blocked_ns : INT64_MAX;
    bool is_known = p->count != 0 && !p->items[0].again;
    return is_known && p->items[0].of->created_ns < blocked_ns ? p->items[0].of->created_ns : blocked_ns;
}

static void must_give_up(world *w, peer *p, int cause)
{
    const int64_t since = since_ns(p);
    must_report(w, p, WSF_TOO_SLOW, cause, p->count, peer_bytes(p), since == INT64_MAX ? w->now_ns : since);
    w->totals.too_slow[cause]++;
    must_close(w, p, cause);
}

/* Whether a peer that waits may take this letter, by the policy. */
static bool must_accept(world *w, peer *p, letter *l)
{
    const wsf_limits *limits = &w->limits;
    const uint64_t size = l->encoded[p->variant].size;
    if ((p->facts & WSF_SHEDDING) && judged_bytes(w, p) <= limits->low_bytes)
        p->facts &= ~(uint32_t)WSF_SHEDDING;
    if (limits->policy == WSF_KEEP || judged_bytes(w, p) == 0)
        return true;
    if (!(p->facts & WSF_SHEDDING) && judged_bytes(w, p) + size <= limits->max_bytes)
        return true;
    switch (limits->policy) {
    case WSF_DISCONNECT:
        must_give_up(w, p, WSF_BY_BYTES);
        l->tally.disconnected++;
        return false;
    case WSF_DROP_NEWEST:
        p->facts |= WSF_SHEDDING;
        break;
    default:
        l->tally.displaced += must_drop(w, p, limits->low_bytes > size ? limits->low_bytes - size : 0, INT64_MIN,
                                        WSF_BY_BYTES, l);
        if (p->count == again_of(p) || judged_bytes(w, p) + size <= limits->max_bytes)
            return true;
    }
    w->totals.dropped[WSF_BY_BYTES]++;
    must_report(w, p, WSF_DROPPED, WSF_BY_BYTES, 1, l->payload_size, w->now_ns);
    return false;
}

/* Whether it took the place of an older one with its key. */
static bool must_replace(world *w, peer *p, letter *l)
{
    uint32_t at = again_of(p);
    while (at < p->count && p->items[at].of->key != l->key)
        at++;
    if (at == p->count)
        return false;
    letter *older = p->items[at].of;
    take_off(&p->items[at]);
    older->tally.dropped++;
    w->totals.conflated++;
    must_report(w, p, WSF_CONFLATED, WSF_BY_BYTES, 1, older->payload_size, older->created_ns);
    older->entries[p->variant]--;
    p->items[at].of = l;
    l->entries[p->variant]++;
    bury(older);
    l->tally.targets++;
    l->tally.displaced++;
    *(p->items[at].queued ? &l->tally.queued : &l->tally.pending) += 1;
    if (waits(p) && p->count > 1 && judged_bytes(w, p) > w->limits.max_bytes)
        l->tally.displaced += must_drop(w, p, w->limits.max_bytes, INT64_MIN, WSF_BY_BYTES, l);
    if (waits(p))
        must_note_peak(p);
    return true;
}

static void must_stand(world *w, peer *p, bool is_late)
{
    if (!is_late) {
        stand_in_line(w, p);
    } else if (!(p->facts & WSF_LATER)) {
        p->facts |= WSF_LATER;
        w->later[w->later_count++] = p;
    }
}

static bool must_append(world *w, peer *p, letter *l, bool is_again)
{
    bool grows = p->count != 0 && p->count >= p->ring_capacity;
    if (grows && w->lacks_memory)
        return false;
    if (grows)
        p->ring_capacity = p->ring_capacity == 0 ? 8 : 2 * p->ring_capacity;
    SHIM_REQUIRE(p->count < MOST_ITEMS);
    p->items[p->count] = (item){l, waits(p) && !is_again, is_again};
    l->entries[variant_of(p, &p->items[p->count++])]++;
    return true;
}

static void must_keep(world *w, peer *p, letter *l)
{
    must_record(w, p, l, false);
    l->tally.targets++;
    l->tally.away++;
}

static void must_take(world *w, peer *p, letter *l, bool is_late)
{
    const uint64_t before = judged_bytes(w, p);
    if (p->facts & WSF_KEEPS) {
        must_keep(w, p, l);
        return;
    }
    if ((p->facts & WSF_OPEN) && w->limits.policy == WSF_CONFLATE && l->key != NO_KEY && must_replace(w, p, l)) {
        if (!waits(p))
            must_stand(w, p, is_late);
        return;
    }
    if (!(p->facts & WSF_OPEN) || (waits(p) && !must_accept(w, p, l)) || !must_append(w, p, l, false)) {
        if (p->facts & WSF_AWAY) {
            must_keep(w, p, l);
            return;
        }
        l->tally.targets++;
        l->tally.dropped++;
        return;
    }
    l->tally.targets++;
    if (waits(p)) {
        l->tally.queued++;
        must_note_peak(p);
        CHECK(w->limits.policy == WSF_KEEP || judged_bytes(w, p) <= w->limits.max_bytes ||
              judged_bytes(w, p) <= before || p->count == 1 + again_of(p));
    } else {
        l->tally.pending++;
        must_stand(w, p, is_late);
    }
}

/* ---- comparing ---------------------------------------------------------------------------------------------------- */

static void check_letter(const world *w, const letter *l)
{
    const wsf_tally *tally = &l->message->tally;
    int64_t references = l->is_held;
    CHECK(memcmp(tally, &l->tally, sizeof *tally) == 0);
    CHECK(tally->targets ==
          tally->pending + tally->sent + tally->queued + tally->dropped + tally->failed + tally->away);
    CHECK(l->message->log_number == (l->is_logged ? l->number : 0) || !is_in_log(w, l->message->log_number));
    for (uint32_t variant = 0; variant < VARIANTS; variant++)
        if (frame_lives(l, variant)) {
            CHECK(l->frames[variant]->references == l->entries[variant] + l->is_held + (l->is_logged && variant == 0));
            references++;
        }
    CHECK(l->message->references == references);
}

static void check_session(const world *w, const peer *p)
{
    const session *s = p->session;
    const wsf_cursor *cursor = p->link->cursor;
    CHECK(cursor->recorded == s->count && cursor->handed == s->handed && s->received <= s->handed);
    CHECK(s->may_forget || !cursor->is_broken || reach_of(w, s) > s->handed);
    CHECK(!(p->facts & WSF_BEHIND) || p->count != 0 || !p->is_greeted);
    CHECK((p->facts & WSF_KEEPS) || s->handed == s->count);
}

static void check_log(const world *w)
{
    const wsf_backlog *backlog = &w->fanout->backlog;
    CHECK(w->fanout->sessions == w->sessions && wsf_live[WSF_LIVE_LOG] == backlog->logs.used);
    CHECK(backlog->count == w->log_count && backlog->first_number == w->log_first && backlog->bytes == w->log_bytes);
    for (uint32_t i = 0; i < w->log_count; i++)
        CHECK(w->log[i]->is_logged && w->log[i]->message->log_number == w->log_first + i);
}

static void check_peer(const world *w, const peer *p)
{
    wsf_link *link = p->link;
    bool must_be_in_line = p->count != 0 && !waits(p);
    bool may_not_be_late = p->control != NULL && !waits(p);
    CHECK(link->facts == p->facts && link->outbox.count == p->count && link->in_transport == p->in_transport);
    CHECK(wsf_link_bytes(link) == peer_bytes(p) && link->outbox.capacity == p->ring_capacity);
    CHECK(!(p->facts & WSF_BLOCKED) || link->blocked_ns == p->blocked_ns);
    CHECK(!must_be_in_line || (p->facts & (WSF_IN_LINE | WSF_LATER)));
    CHECK(!may_not_be_late || (p->facts & WSF_IN_LINE));
    CHECK(link->control == (p->control == NULL ? NULL : p->control->frame));
    CHECK(link->control_left_ns == p->control_left_ns);
    CHECK(link->peak_bytes == p->peak);
    CHECK(link->is_held == is_held(p) && link->was_held == p->was_held);
    CHECK(link->is_holding == p->is_news);
    CHECK(p->told_messages == p->counted_messages && p->told_bytes == p->counted_bytes);
    for (uint32_t i = 0; i < p->count; i++) {
        wsf_entry entry = *wsf_outbox_at(&link->outbox, i);
        CHECK(wsf_entry_frame(entry) == p->items[i].of->frames[variant_of(p, &p->items[i])]);
        CHECK((entry & WSF_QUEUED) == (wsf_entry)p->items[i].queued);
        CHECK(((entry & WSF_AGAIN) != 0) == p->items[i].again);
    }
    CHECK(link->lost_bytes == p->lost && (link->cursor != NULL) == (p->session != NULL));
    if (p->session != NULL)
        check_session(w, p);
    CHECK(wsf_fanout_find(w->fanout, &p->record) == link);
}

static void check_order(const wsf_line *line, peer *const *expected, uint32_t count)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < line->count; i++) {
        const wsf_link *link = line->links[(line->head + i) & (line->capacity - 1)];
        if (link == NULL)
            continue;
        CHECK(found < count && expected[found]->link == link);
        found++;
    }
    CHECK(found == count);
}

static void check_reports(const world *w)
{
    CHECK(w->fanout->report_count == w->report_count);
    for (uint32_t i = 0; i < w->report_count; i++) {
        const wsf_report *actual = &w->fanout->reports[i], *wanted = &w->reports[i];
        CHECK(actual->link == wanted->link && actual->what == wanted->what && actual->cause == wanted->cause);
        CHECK(actual->messages == wanted->messages && actual->bytes == wanted->bytes);
        CHECK(actual->age_s - wanted->age_s == 0);
    }
}

/* Those who wait are told as soon as what they wait for has come. Of room they may be told in vain. */
static void check_told(world *w)
{
    for (wsf_message *message; (message = wsf_fanout_take_decided(w->fanout)) != NULL;) {
        letter *l = (letter *)(void *)message->waiter;
        CHECK(l->is_awaited && l->tally.pending == 0);
        l->is_awaited = false;
        message->waiter = NULL;
        wsf_message_release(message);
    }
    for (uint32_t i = 0; i < LETTERS; i++)
        CHECK(!w->letters[i].is_awaited || w->letters[i].tally.pending != 0);
    for (wsf_link *link; (link = wsf_fanout_take_roomy(w->fanout)) != NULL;) {
        peer *p = (peer *)(void *)link->handle;
        CHECK(p->mark != WSF_NO_MARK && p->link == link);
        p->mark = WSF_NO_MARK;
    }
    for (uint32_t i = 0; i < w->size->peers; i++) {
        const peer *p = &w->peers[i];
        CHECK(p->link == NULL || p->mark == WSF_NO_MARK || ((p->facts & WSF_OPEN) && peer_bytes(p) > p->mark));
    }
}

/* Those whose control frame is held now or not any more, each once, and nobody else. */
static void check_holding(world *w)
{
    for (wsf_link *link; (link = wsf_fanout_take_holding(w->fanout)) != NULL;) {
        peer *p = (peer *)(void *)link->handle;
        CHECK(p->link == link && p->is_news && link->is_held == is_held(p));
        p->is_news = false;
        p->was_held = is_held(p);
    }
    for (uint32_t i = 0; i < w->size->peers; i++)
        CHECK(!w->peers[i].is_news);
}

static void check_ping(const ping *g)
{
    static const wsf_tally nothing;
    CHECK(g->frame->size == g->size && memcmp(g->frame->data, g->encoded, g->size) == 0);
    CHECK(g->frame->references == g->links + g->is_held && g->frame->message->references == 1);
    CHECK(memcmp(&g->frame->message->tally, &nothing, sizeof nothing) == 0);
}

static void check_world(world *w)
{
    int64_t messages = 0, frames = 0;
    check_told(w);
    if (one_in(&w->random, 3))
        check_holding(w);
    wsf_fanout_check(w->fanout);
    check_log(w);
    for (uint32_t i = 0; i < w->size->peers; i++)
        if (w->peers[i].link != NULL)
            check_peer(w, &w->peers[i]);
    for (uint32_t i = 0; i < LETTERS; i++) {
        if (w->letters[i].message == NULL)
            continue;
        messages++;
        check_letter(w, &w->letters[i]);
        for (uint32_t variant = 0; variant < VARIANTS; variant++)
            frames += frame_lives(&w->letters[i], variant);
    }
    for (uint32_t i = 0; i < PINGS; i++) {
        if (w->pings[i].frame == NULL)
            continue;
        messages++;
        frames++;
        check_ping(&w->pings[i]);
    }
    CHECK(wsf_live[WSF_LIVE_MESSAGE] == messages && wsf_live[WSF_LIVE_FRAME] == frames);
    CHECK(wsf_live[WSF_LIVE_LINK] == w->links && w->fanout->links.used == w->links);
    CHECK(w->fanout->account == expected_account(w));
    CHECK(wsf_fanout_is_over(w->fanout) ==
          ((int64_t)w->limits.max_total_bytes < w->fanout->account - (int64_t)w->log_bytes));
    CHECK(w->fanout->waiting_count == w->waiting_count);
    CHECK(memcmp(&w->fanout->totals, &w->totals, sizeof w->totals) == 0);
    check_order(&w->fanout->line, w->line, w->line_count);
    check_order(&w->fanout->later, w->later, w->later_count);
    check_reports(w);
}

/* ---- both ends of a connection ------------------------------------------------------------------------------------ */

static peer *peer_of(const wsf_link *link) { return (peer *)(void *)link->handle; }

static peer *some_peer(world *w)
{
    for (uint32_t tries = 0; tries < 8; tries++) {
        peer *p = &w->peers[below(&w->random, w->size->peers)];
        if (p->link != NULL)
            return p;
    }
    return NULL;
}

static uint64_t hash_of(const uint8_t *data, size_t size)
{
    uint64_t hash = UINT64_C(0xCBF29CE484222325); /* FNV-1a */
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ data[i]) * UINT64_C(0x100000001B3);
    return hash;
}

/* The size of the frame that these bytes begin with; 0: they are too few. */
static size_t size_of_frame(const uint8_t *data, size_t size)
{
    static const size_t extended[128] = {[126] = 2, [127] = 8};
    if (size < 2 || size < 2 + extended[data[1]])
        return 0;
    uint64_t length = extended[data[1]] == 0 ? data[1] : 0;
    for (size_t i = 0; i < extended[data[1]]; i++)
        length = 256 * length + data[2 + i];
    length += 2 + extended[data[1]];
    return length <= size ? (size_t)length : 0;
}

/* A client with a session counts the messages that have come whole. Each must be the next one. */
static void count_received(peer *p, const uint8_t *data, size_t size)
{
    session *s = p->session;
    size_t used = 0, frame;
    bytes_add(&p->unread, data, size);
    for (; (frame = size_of_frame(p->unread.data + used, p->unread.size - used)) != 0; used += frame) {
        const uint64_t hash = hash_of(p->unread.data + used, frame);
        if (p->unread.data[used] & 0x08) /* a control frame */
            continue;
        if (p->awaits_greeting) {
            CHECK(hash == p->greeting_hash);
            p->awaits_greeting = false;
            continue;
        }
        CHECK(s->received < s->handed);
        const recorded *next = &s->list[s->received++];
        CHECK(hash == next->hash[0] || hash == next->hash[p->variant]);
    }
    bytes_skip(&p->unread, used);
}

/* The far end reads at most so much, and finds what it expects. Returns false at the end of the stream. */
static bool far_read(world *w, peer *p, size_t most)
{
    while (p->far_fd >= 0 && most > 0) {
        uint8_t buffer[8192];
        size_t size = most < sizeof buffer ? most : sizeof buffer;
        ssize_t result = recv(p->far_fd, buffer, size, 0);
        if (result == 0)
            return false;
        if (result < 0 && errno == EINTR)
            continue;
        if (result < 0) {
            CHECK(errno == EAGAIN);
            return true;
        }
        CHECK((size_t)result <= p->expected.size);
        CHECK(memcmp(buffer, p->expected.data, (size_t)result) == 0);
        bytes_skip(&p->expected, (size_t)result);
        if (p->session != NULL)
            count_received(p, buffer, (size_t)result);
        most -= (size_t)result;
    }
    (void)w;
    return true;
}

static void end_link(world *w, peer *p)
{
    w->lacks_memory = p->session != NULL && one_in(&w->random, w->lacking);
    must_close(w, p, WSF_BY_END);
    inject_fault(w->lacks_memory, true);
    wsf_link_close(w->fanout, p->link, WSF_BY_END);
    (void)end_faults();
    w->lacks_memory = false;
}

static void lose(world *w, peer *p)
{
    CHECK(p->far_fd < 0); /* sockets do not break by themselves */
    p->transport.size = 0;
    end_link(w, p);
}

/* The transport writes what it can. Returns whether the connection is still there. */
static bool transport_write(world *w, peer *p)
{
    while (p->transport.size != 0) {
        ssize_t result = send(p->fd, p->transport.data, p->transport.size, MSG_NOSIGNAL);
        if (result < 0 && errno == EINTR)
            continue;
        if (result < 0 && errno != EAGAIN) {
            lose(w, p);
            return false;
        }
        if (result < 0)
            break;
        bytes_skip(&p->transport, (size_t)result);
    }
    return true;
}

/* The library writes something by itself. */
static bool library_write(world *w, peer *p, const void *data, size_t size)
{
    bytes_add(&p->expected, data, size);
    bytes_add(&p->transport, data, size);
    if (!transport_write(w, p))
        return false;
    if (p->transport.size != 0) {
        p->link->facts |= WSF_UNSURE;
        p->facts |= WSF_UNSURE;
    }
    return true;
}

static void block(world *w, peer *p, uint64_t in_transport)
{
    must_block(w, p, in_transport);
    wsf_link_block(w->fanout, p->link, in_transport);
}

/* The transport has got rid of everything. */
static void unblock(world *w, peer *p)
{
    wsf_link_clear(w->fanout, p->link, WSF_BLOCKED | WSF_UNSURE);
    must_clear(w, p, WSF_BLOCKED | WSF_UNSURE);
}

static void count(wsf_link *link, uint64_t messages, uint64_t size)
{
    peer_of(link)->told_messages += messages;
    peer_of(link)->told_bytes += size;
}

/* The first is handed over; is_whole: all of it has been taken. */
static void must_hand(world *w, peer *p, bool is_whole)
{
    letter *l = p->items[0].of;
    if (!l->is_greeting) {
        p->counted_messages++;
        p->counted_bytes += l->payload_size;
        w->totals.messages++;
        w->totals.bytes += l->payload_size;
    }
    if (!p->items[0].again) {
        if (p->session != NULL)
            must_record(w, p, l, true);
        take_off(&p->items[0]);
        *(is_whole ? &l->tally.sent : &l->tally.queued) += 1;
    }
    remove_item(p, 0);
}

/* ---- operations --------------------------------------------------------------------------------------------------- */

static wsf_link *make_link(void)
{
    wsf_link *link = aligned_alloc(64, sizeof *link);
    SHIM_REQUIRE(link != NULL);
    memset(link, 0, sizeof *link);
    return link;
}

/* A connection for a link that the fan-out does not know yet. */
static void connect_link(world *w, peer *p, wsf_link *link)
{
    chance *random = &w->random;
    int ends[2];
    open_pair(ends, one_in(random, 6), w->size->is_small);
    p->facts = link->facts;
    p->peak = p->lost = 0;
    p->is_greeted = false;
    p->control_left_ns = 0;
    p->was_held = p->is_news = false;
    p->variant = w->is_round ? 0 : below(random, VARIANTS);
    p->mark = WSF_NO_MARK;
    p->is_direct = !one_in(random, 5);
    p->fd = link->fd = ends[0];
    p->far_fd = ends[1];
    link->variant = p->variant;
    link->keeps_views = one_in(random, 2);
    link->record = &p->record;
    link->handle = (PyObject *)(void *)p;
    link->outbox.first_number = one_in(random, 2) ? UINT32_MAX - below(random, 40) : 0;
}

static void open_link(world *w, peer *p, wsf_link *link)
{
    p->link = link;
    link->facts |= WSF_OPEN;
    p->facts |= WSF_OPEN;
    if (p->is_direct) {
        wsf_link_set(w->fanout, link, WSF_DIRECT);
        p->facts |= WSF_DIRECT;
    }
}

static void must_begin_session(world *w, peer *p)
{
    p->session = must_alloc(1, sizeof *p->session);
    p->facts |= WSF_BEHIND;
    p->awaits_greeting = true;
    w->sessions++;
}

static void begin_session(world *w, peer *p)
{
    inject_fault(one_in(&w->random, 4), false);
    int outcome = wsf_link_begin_session(w->fanout, p->link);
    CHECK(end_faults() == (outcome == WSF_NO_MEMORY));
    if (outcome == WSF_OK)
        must_begin_session(w, p);
}

static void admit(world *w, peer *p)
{
    wsf_link *link = make_link();
    connect_link(w, p, link);
    int outcome = WSF_NO_MEMORY;
    for (int64_t fault = below(&w->random, 2); outcome != WSF_OK; fault = fault == 0 ? 0 : fault + 1) {
        inject_fault(fault, false);
        outcome = wsf_fanout_admit(w->fanout, link);
        CHECK(end_faults() == (outcome != WSF_OK));
        w->links += outcome == WSF_OK;
        check_world(w);
        CHECK((wsf_fanout_find(w->fanout, &p->record) == link) == (outcome == WSF_OK));
    }
    open_link(w, p, link);
    if (w->has_sessions && (w->size->is_about_sessions || !one_in(&w->random, 3)))
        begin_session(w, p);
}

static void take_reports(world *w)
{
    w->fanout->report_count = w->report_count = 0;
}

static void close_ends(peer *p)
{
    close(p->fd);
    if (p->far_fd >= 0)
        close(p->far_fd);
    p->fd = p->far_fd = -1;
    p->expected.size = p->transport.size = 0;
}

/* The stream ends, and all has arrived that was handed to the socket. */
static void end_stream(world *w, peer *p)
{
    if (p->fd < 0)
        return; /* it was cut */
    p->expected.size -= p->transport.size;
    (void)shutdown(p->fd, SHUT_WR); /* closed, the kernel may lose patience and reset it */
    while (p->far_fd >= 0 && far_read(w, p, SIZE_MAX)) {
        struct pollfd wanted = {p->far_fd, POLLIN, 0};
        CHECK(poll(&wanted, 1, 20000) == 1);
    }
    CHECK(p->far_fd < 0 || p->expected.size == 0);
    close_ends(p);
}

static void must_end_session(world *w, peer *p)
{
    session *s = p->session;
    w->totals.dropped[WSF_BY_END] += s->count - s->handed;
    p->facts &= ~(uint32_t)WSF_KEEPS;
    w->sessions--;
    while (w->sessions == 0 && w->log_count != 0)
        must_let_go(w);
}

/* The link goes; a session that it has still has been counted as ended. */
static void forget_link(world *w, peer *p)
{
    check_reports(w);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < w->report_count; i++)
        if (w->reports[i].link != p->link)
            w->reports[kept++] = w->reports[i];
    w->report_count = kept;
    wsf_fanout_forget(w->fanout, p->link);
    must_clear(w, p, WSF_WAITS);
    leave_line(w, p);
    if (p->facts & WSF_LATER)
        leave(w->later, &w->later_count, p);
    must_have_in_transport(p, 0);
    p->was_held = p->is_news = false;
    w->links--;
    free(p->link);
    p->link = NULL;
    p->counted_messages = p->counted_bytes = p->told_messages = p->told_bytes = 0;
}

static void forget(world *w, peer *p)
{
    end_link(w, p);
    if (p->transport.size != 0 && p->far_fd >= 0)
        CHECK((p->facts & (WSF_UNSURE | WSF_BLOCKED)) != 0);
    if (p->session != NULL)
        must_end_session(w, p);
    forget_link(w, p);
    end_stream(w, p);
    if (p->session != NULL) {
        free(p->session->list);
        free(p->session);
    }
    p->session = NULL;
    p->unread.size = 0;
}

static size_t some_size(chance *random)
{
    switch (below(random, 16)) {
    case 0: return 0;
    case 1: return 124 + below(random, 4);
    case 2: return below(random, 70000);
    case 3: return below(random, 20000);
    case 4:
    case 5:
    case 6: return below(random, 3000);
    default: return below(random, 300);
    }
}

static letter *new_letter(world *w, uint64_t size, int key)
{
    letter *l = NULL;
    chance *random = &w->random;
    for (uint32_t tries = 0; tries < LETTERS && (l == NULL || l->message != NULL); tries++)
        l = &w->letters[below(random, LETTERS)];
    if (l->message != NULL)
        return NULL;
    const bool is_text = one_in(random, 2);
    l->payload_size = size;
    memset(&l->tally, 0, sizeof l->tally);
    l->key = key;
    l->created_ns = w->now_ns;
    l->is_held = true;
    l->is_greeting = false;
    l->message = wsf_message_new(&w->fanout->account, w->now_ns, key_object(random, l->key), l->payload_size);
    for (uint32_t variant = 0; variant < VARIANTS; variant++) {
        uint8_t header[WSF_MAX_HEADER], first = (uint8_t)((is_text ? 1 : 2) | (variant == 0 ? 0 : 0x40));
        size_t length = (size_t)size / (variant + 1) + variant; /* as if it were compressed */
        const uint8_t *payload = w->payload + below(random, 4096);
        l->frames[variant] = wsf_frame_new(l->message, first, payload, length);
        bytes_add(&l->encoded[variant], header, spell_header(first, length, header));
        bytes_add(&l->encoded[variant], payload, length);
        l->hash[variant] = hash_of(l->encoded[variant].data, l->encoded[variant].size);
    }
    return l;
}

static void release_letter(const world *w, letter *l)
{
    check_letter(w, l);
    l->is_held = false;
    wsf_message *message = l->message;
    for (uint32_t variant = 0; variant < VARIANTS; variant++)
        wsf_frame_release(l->frames[variant]);
    bury(l);
    wsf_message_release(message);
}

static void push(world *w, letter *l, uint32_t targets, bool is_late)
{
    wsf_link **links = must_alloc(targets, sizeof *links);
    chance *random = &w->random;
    uint32_t used = 0, first = below(random, w->size->peers);
    bool is_logged = false;
    for (uint32_t i = 0; i < w->size->peers && used < targets; i++) {
        peer *p = &w->peers[(first + i) % w->size->peers];
        if (p->link == NULL || p->count + 1 >= MOST_ITEMS)
            continue;
        links[used++] = p->link;
        p->is_left_out = one_in(random, 10);
        if (p->is_left_out)
            p->link->left_out_of = w->fanout->pushes + 1;
        else
            is_logged = is_logged || p->session != NULL;
    }
    w->lacks_memory = one_in(random, w->sessions == 0 ? 8 : w->lacking);
    inject_fault(w->lacks_memory, true);
    wsf_fanout_push(w->fanout, links, used, l->frames, is_late, below(random, 4));
    (void)end_faults();
    if (is_logged)
        must_log(w, l);
    for (uint32_t i = 0; i < used; i++)
        if (!peer_of(links[i])->is_left_out)
            must_take(w, peer_of(links[i]), l, is_late);
    w->lacks_memory = false;
    free(links);
}

static ping *new_ping(world *w, size_t size)
{
    for (uint32_t i = 0; i < PINGS; i++) {
        ping *g = &w->pings[i];
        if (g->frame != NULL)
            continue;
        const uint8_t *payload = w->payload + below(&w->random, 4096);
        wsf_message *message = wsf_message_new(&w->fanout->account, w->now_ns, NULL, size);
        g->frame = wsf_frame_new(message, WSF_PING, payload, size);
        wsf_message_release(message);
        g->is_held = true;
        g->size = spell_header(9, size, g->encoded) + size;
        memcpy(g->encoded + 2, payload, size);
        return g;
    }
    return NULL;
}

static void release_ping(ping *g)
{
    wsf_frame *frame = g->frame;
    g->is_held = false;
    bury_ping(g);
    wsf_frame_release(frame);
}

static void push_ping(world *w, wsf_link *const *links, uint32_t count, ping *g)
{
    for (uint32_t i = 0; i < count; i++) {
        peer *p = peer_of(links[i]);
        if (!(p->facts & WSF_OPEN))
            continue;
        must_have_control(p, g);
        if (!waits(p))
            stand_in_line(w, p);
        must_note_held(p);
    }
    inject_fault(1, true); /* it needs no memory */
    wsf_fanout_push_control(w->fanout, links, count, g->frame);
    CHECK(!end_faults());
    CHECK(w->fanout->now_ns == g->frame->message->created_ns);
    w->fanout->now_ns = w->now_ns;
}

static void some_ping(world *w)
{
    chance *random = &w->random;
    ping *g = one_in(random, 4) ? &w->pings[below(random, PINGS)] : NULL;
    if (g == NULL || g->frame == NULL || !g->is_held)
        g = new_ping(w, one_in(random, 8) ? 125 * below(random, 2) : below(random, 126));
    if (g == NULL)
        return;
    wsf_link **links = must_alloc(w->size->peers, sizeof *links);
    uint32_t most = one_in(random, 2) ? 1 : 1 + below(random, w->size->peers), used = 0;
    uint32_t first = below(random, w->size->peers);
    for (uint32_t i = 0; i < w->size->peers && used < most; i++) {
        const peer *p = &w->peers[(first + i) % w->size->peers];
        if (p->link != NULL)
            links[used++] = p->link;
    }
    push_ping(w, links, used, g);
    free(links);
    if (!one_in(random, 3))
        release_ping(g);
}

/* The control frame is written by the application's library, at once. */
static void take_ping(world *w, peer *p)
{
    uint8_t encoded[sizeof p->control->encoded];
    const size_t size = p->control == NULL ? 0 : p->control->size;
    if (size != 0) {
        memcpy(encoded, p->control->encoded, size);
        must_let_control_leave(w, p, p->has_control_in_transport);
    }
    wsf_link_take_control(w->fanout, p->link);
    if (size != 0)
        (void)library_write(w, p, encoded, size);
}

static void some_push(world *w)
{
    chance *random = &w->random;
    const uint64_t size = w->is_round && !one_in(random, 4) ? one_in(random, 3) ? 296 : 98 : some_size(random);
    letter *l = new_letter(w, size, one_in(random, 2) ? NO_KEY : (int)below(random, 12));
    if (l == NULL)
        return;
    push(w, l, one_in(random, 3) ? 1 : 1 + below(random, w->size->peers), one_in(random, 4));
    if (l->tally.pending != 0 && one_in(random, 2)) {
        l->message->waiter = (PyObject *)(void *)l;
        l->is_awaited = true;
    }
    if (one_in(random, 2))
        release_letter(w, l);
}

/* They could not be written: a control frame is none of them, and goes with the link. */
static void must_fail(world *w, peer *p, uint32_t frames)
{
    w->totals.failed++;
    must_drop_control(p);
    for (; frames > 0 && p->session == NULL; frames--) {
        take_off(&p->items[0]);
        p->items[0].of->tally.failed++;
        remove_item(p, 0);
    }
    must_close(w, p, WSF_BY_END);
}

/* The transport is given so many frames, the control frame first if there is one. */
static void write_frames(world *w, peer *p, uint32_t frames)
{
    const uint32_t controls = p->control != NULL;
    if (controls != 0) {
        bytes_add(&p->expected, p->control->encoded, p->control->size);
        bytes_add(&p->transport, p->control->encoded, p->control->size);
    }
    for (uint32_t i = 0; i < frames - controls; i++) {
        const bytes *data = frame_of(p, &p->items[i]);
        bytes_add(&p->expected, data->data, data->size);
        bytes_add(&p->transport, data->data, data->size);
    }
    if (!transport_write(w, p))
        return;
    const size_t left = p->transport.size;
    if (controls != 0)
        must_let_control_leave(w, p, left != 0);
    w->lacks_memory = p->session != NULL && one_in(&w->random, w->lacking);
    for (uint32_t i = 0; i < frames - controls; i++)
        must_hand(w, p, left == 0);
    if (left != 0)
        must_block(w, p, left);
    if (frames != controls && p->count == 0)
        must_refill(w, p);
    if ((p->count != 0 || p->control != NULL) && !waits(p))
        stand_in_line(w, p);
    inject_fault(w->lacks_memory, true);
    wsf_link_commit(w->fanout, p->link, frames, left, count);
    (void)end_faults();
    w->lacks_memory = false;
}

/* What an adapter does with what goes through it. */
static void write_through(world *w, peer *p)
{
    const uint32_t controls = p->control != NULL;
    if (!(p->facts & WSF_OPEN) || p->count + controls == 0)
        return;
    if (p->transport.size != 0) {
        block(w, p, p->transport.size);
        return;
    }
    p->link->facts &= ~(uint32_t)WSF_UNSURE;
    p->facts &= ~(uint32_t)WSF_UNSURE;
    uint32_t frames = 1 + below(&w->random, p->count + controls);
    if (p->far_fd < 0 && one_in(&w->random, 2)) {
        must_fail(w, p, frames - controls);
        wsf_link_fail(w->fanout, p->link, frames);
        return;
    }
    write_frames(w, p, frames);
}

/* A connection is to end: its transport is given what waits, however much that has. */
static void finish(world *w, peer *p)
{
    const uint32_t all = p->count + (p->control != NULL);
    if ((p->facts & (WSF_OPEN | WSF_FRAGMENT)) == WSF_OPEN && all != 0)
        write_frames(w, p, one_in(&w->random, 2) ? all : 1 + below(&w->random, all));
}

/* What becomes of a job, by what the socket took. Returns what is left to do. */
static int must_settle(world *w, const wsf_job *job, size_t *offset)
{
    peer *p = peer_of(job->link);
    uint64_t left = job->sent < 0 ? 0 : (uint64_t)job->sent;
    const uint64_t control_size = p->control == NULL ? 0 : p->control->size;
    const uint32_t frames = p->count;
    if (!(p->facts & WSF_OPEN) || (p->count == 0 && p->control == NULL))
        return WSF_DONE;
    CHECK(job->frames == p->count && job->size == peer_bytes(p) + control_size && left <= job->size);
    CHECK(job->control == (p->control == NULL ? NULL : p->control->frame));
    CHECK(job->direct == ((p->facts & (WSF_DIRECT | WSF_UNSURE)) == WSF_DIRECT));
    if (!job->direct) {
        w->totals.through++;
        return WSF_THROUGH;
    }
    CHECK(p->transport.size == 0);
    w->totals.writes++;
    if (job->sent < 0) {
        CHECK(p->far_fd < 0);
        must_fail(w, p, p->count);
        return WSF_FAILED;
    }
    if (p->control != NULL) {
        bytes_add(&p->expected, p->control->encoded, p->control->size);
        if (left < control_size) {
            *offset = (size_t)left;
            bytes_add(&p->transport, p->control->encoded + left, (size_t)(control_size - left));
            must_let_control_leave(w, p, true);
            must_block(w, p, control_size - left);
            return WSF_REST;
        }
        left -= control_size;
        must_let_control_leave(w, p, false);
    }
    while (p->count != 0 && frame_of(p, &p->items[0])->size <= left) {
        const bytes *data = frame_of(p, &p->items[0]);
        bytes_add(&p->expected, data->data, data->size);
        left -= data->size; /* while it lives */
        must_hand(w, p, true);
    }
    if (p->count == 0) {
        p->facts &= ~(uint32_t)WSF_SHEDDING;
        if (frames != 0)
            must_refill(w, p);
        if (p->count != 0)
            stand_in_line(w, p);
        return WSF_DONE;
    }
    letter *l = p->items[0].of;
    const uint32_t variant = variant_of(p, &p->items[0]);
    const bytes *data = &l->encoded[variant];
    const size_t rest = data->size - (size_t)left;
    *offset = (size_t)left;
    bytes_add(&p->expected, data->data, data->size);
    bytes_add(&p->transport, data->data + left, rest);
    if (job->link->keeps_views && l->entries[variant] + l->is_held + (l->is_logged && variant == 0) > 1) {
        l->entries[variant]++;
        p->rest = l;
        p->rest_variant = variant;
        p->shared = rest;
    }
    must_hand(w, p, false);
    must_block(w, p, rest);
    if (p->count == 0)
        must_refill(w, p);
    return WSF_REST;
}

/* The jobs are of those who stand first in line, in that order. */
static void check_plan(const world *w)
{
    uint32_t at = 0;
    for (uint32_t i = 0; i < w->fanout->job_count; i++)
        if (w->fanout->jobs[i].link != NULL)
            CHECK(at < w->line_count && w->fanout->jobs[i].link == w->line[at++]->link);
    CHECK(at == w->line_count || w->fanout->job_count == WSF_BATCH);
}

static void settle(world *w, int64_t carried_out)
{
    static peer *through[WSF_BATCH];
    uint32_t through_count = 0;
    wsf_remainder remainder;
    w->lacks_memory = w->sessions != 0 && one_in(&w->random, w->lacking);
    inject_fault(w->lacks_memory, true);
    for (int64_t i = 0; i < carried_out; i++) {
        const wsf_job job = w->fanout->jobs[i];
        size_t offset = 0;
        if (job.link == NULL)
            continue;
        peer *p = peer_of(job.link);
        const bool has_something = p->count != 0 || p->control != NULL;
        leave_line(w, p);
        int what = must_settle(w, &job, &offset);
        if (what == WSF_DONE)
            continue;
        CHECK(wsf_fanout_settle(w->fanout, count, &remainder) == what);
        CHECK(remainder.link == job.link && remainder.what == what);
        if (what == WSF_THROUGH)
            through[through_count++] = p;
        if (what == WSF_FAILED)
            CHECK(remainder.error == -job.sent);
        if (what == WSF_REST) {
            size_t size = remainder.frame->size - remainder.offset;
            CHECK(remainder.offset == offset && size == p->transport.size && has_something);
            CHECK(memcmp(p->transport.data, remainder.frame->data + offset, size) == 0);
            CHECK(remainder.is_shared == (p->rest != NULL));
            wsf_frame_release(remainder.frame);
        }
    }
    CHECK(wsf_fanout_settle(w->fanout, count, &remainder) == WSF_DONE);
    (void)end_faults();
    w->lacks_memory = false;
    for (uint32_t i = 0; i < through_count; i++)
        write_through(w, through[i]);
}

static uint32_t plan(world *w)
{
    uint32_t jobs = wsf_fanout_plan(w->fanout);
    CHECK(jobs == w->fanout->job_count && jobs <= WSF_BATCH && (jobs != 0) == (w->fanout->line.count != 0));
    check_plan(w);
    return jobs;
}

static void carry_out(world *w, uint32_t jobs, int64_t deadline_ns)
{
    wsf_fanout_send(w->fanout, w->pool, deadline_ns);
    int64_t carried_out = w->fanout->taken < (int64_t)jobs ? w->fanout->taken : (int64_t)jobs;
    const bool is_alone = w->pool == NULL || jobs < 64;
    uint64_t longest = 1;
    for (uint32_t i = 0; i < jobs; i++)
        longest = w->fanout->jobs[i].size > longest ? w->fanout->jobs[i].size : longest;
    const uint64_t fit = 65536 / longest, chunk = fit > 8 ? 8 : fit == 0 ? 1 : fit;
    if (deadline_ns != 0)
        CHECK(carried_out == jobs);
    else if (is_alone)
        CHECK(carried_out == (int64_t)(jobs < chunk ? jobs : chunk));
    else
        CHECK(carried_out >= (int64_t)chunk); /* each thread has one */
    settle(w, carried_out);
}

static void flush(world *w, int64_t deadline_ns)
{
    inject_fault(one_in(&w->random, 6), true);
    uint32_t jobs = plan(w);
    (void)end_faults();
    if (jobs != 0)
        carry_out(w, jobs, deadline_ns);
}

/* The transport goes on, and tells once all has left. */
static void transport_step(world *w, peer *p)
{
    if (!transport_write(w, p))
        return;
    if (p->transport.size == 0)
        unblock(w, p);
    else if ((p->facts & WSF_BLOCKED) && one_in(&w->random, 3))
        block(w, p, p->transport.size);
}

static void some_library_write(world *w, peer *p)
{
    uint8_t ping[2 + 125] = {0x89};
    ping[1] = (uint8_t)below(&w->random, 126);
    if (!(p->facts & WSF_OPEN) || !library_write(w, p, ping, 2 + (size_t)ping[1]))
        return;
    if (p->transport.size != 0 && one_in(&w->random, 2))
        block(w, p, p->transport.size);
}

static void some_fragment(world *w, peer *p)
{
    const uint8_t fragments[2][4] = {{0x01, 2, 'a', 'b'}, {0x80, 2, 'c', 'd'}};
    const bool under_way = (p->facts & WSF_FRAGMENT) != 0;
    /* What the library is told to send where there is a session is a push. */
    if (!(p->facts & WSF_OPEN) || (p->session == NULL && !library_write(w, p, fragments[under_way], 4)))
        return;
    if (under_way) {
        wsf_link_clear(w->fanout, p->link, WSF_FRAGMENT);
        must_clear(w, p, WSF_FRAGMENT);
    } else {
        wsf_link_set(w->fanout, p->link, WSF_FRAGMENT);
        must_set(w, p, WSF_FRAGMENT);
    }
}

static void expire(world *w)
{
    const int64_t before_ns = w->now_ns - w->limits.max_age_ns;
    for (uint32_t i = 0; i < w->fanout->waiting_count; i++)
        w->order[i] = peer_of(w->fanout->waiting[i]);
    for (uint32_t i = 0; i < w->waiting_count; i++) {
        peer *p = w->order[i];
        if (w->limits.policy == WSF_KEEP || !(p->facts & WSF_OPEN))
            continue;
        if (w->limits.policy != WSF_DISCONNECT)
            (void)must_drop(w, p, UINT64_MAX, before_ns, WSF_BY_AGE, NULL);
        else if ((p->facts & WSF_BLOCKED) && since_ns(p) < before_ns)
            must_give_up(w, p, WSF_BY_AGE);
    }
    wsf_fanout_expire(w->fanout);
}

/* To keep what waits takes memory of logs and cursors, so how many had to give is learned: first some lose what waits, and if
 * that was all of them, some are given up. */
static void must_shed_as_found(world *w, uint32_t waiting, bool drops, uint32_t reports)
{
    bool is_enough = false;
    for (uint32_t i = 0; i < waiting && drops; i++) {
        peer *p = w->order[i];
        if (p->count == again_of(p))
            continue;
        if (p->link->outbox.count == p->count)
            is_enough = true;
        else
            CHECK(!is_enough);
        if (!is_enough)
            (void)must_drop(w, p, 0, INT64_MAX, WSF_BY_BUDGET, NULL);
    }
    for (uint32_t i = 0; i < waiting; i++) {
        peer *p = w->order[i];
        for (uint32_t at = reports; at < w->fanout->report_count; at++) {
            const wsf_report *r = &w->fanout->reports[at];
            if (r->link != p->link || r->what != WSF_TOO_SLOW)
                continue;
            CHECK(!is_enough && r->cause == WSF_BY_BUDGET && peer_bytes(p) != 0);
            must_give_up(w, p, WSF_BY_BUDGET);
            break;
        }
    }
}

static void shed(world *w)
{
    const uint64_t most = w->limits.max_total_bytes, enough = most - most / 8;
    const bool drops = w->limits.policy != WSF_KEEP && w->limits.policy != WSF_DISCONNECT;
    const uint32_t reports = w->report_count;
    uint32_t waiting = w->waiting_count;
    bool is_over = wsf_fanout_is_over(w->fanout);
    CHECK(is_over == (expected_account(w) - (int64_t)w->log_bytes > (int64_t)most));
    wsf_fanout_shed(w->fanout);
    if (!is_over)
        return;
    /* Equals may stand in any order. */
    for (uint32_t i = 0; i < waiting; i++) {
        w->order[i] = peer_of(w->fanout->waiting[i]);
        CHECK(waits(w->order[i]) && (i == 0 || peer_bytes(w->order[i - 1]) >= peer_bytes(w->order[i])));
    }
    if (w->sessions != 0) {
        must_shed_as_found(w, waiting, drops, reports);
        return;
    }
    uint64_t leaving = 0;
    /* A table of keys goes with the last entry, as the account of the model sees in the outbox: take it as it is now. */
    int64_t account = 0;
    for (uint32_t i = 0; i < waiting && drops; i++) {
        if ((uint64_t)(account = expected_account(w)) <= enough)
            break;
        (void)must_drop(w, w->order[i], 0, INT64_MAX, WSF_BY_BUDGET, NULL);
    }
    for (uint32_t i = 0; i < waiting; i++) {
        if ((account = expected_account(w)) - (int64_t)leaving <= (int64_t)enough)
            break;
        if (peer_bytes(w->order[i]) == 0)
            continue;
        must_give_up(w, w->order[i], WSF_BY_BUDGET);
        leaving += copied_bytes(w->order[i]);
    }
    (void)account;
}

static void end_window(world *w)
{
    wsf_fanout_end_window(w->fanout);
    for (uint32_t i = 0; i < w->later_count; i++) {
        peer *p = w->later[i];
        p->facts &= ~(uint32_t)WSF_LATER;
        if (p->count != 0 && !waits(p))
            stand_in_line(w, p);
    }
    w->later_count = 0;
}

static void hang_up(world *w, peer *p)
{
    if (p->far_fd < 0)
        return;
    if (one_in(&w->random, 2))
        (void)far_read(w, p, SIZE_MAX); /* what is left unread makes a reset of the end */
    close(p->far_fd);
    p->far_fd = -1;
}

/* Greet a client; what is kept for it follows. */
static void greet(world *w, peer *p)
{
    letter *l = new_letter(w, below(&w->random, 200), NO_KEY);
    if (l == NULL)
        return;
    l->is_greeting = true;
    w->lacks_memory = one_in(&w->random, w->lacking);
    if (p->facts & WSF_OPEN) {
        p->is_greeted = true;
        p->greeting_hash = l->hash[0];
        CHECK(must_append(w, p, l, true));
        must_refill(w, p);
        if (!waits(p) && p->count != 0)
            stand_in_line(w, p);
    }
    wsf_frame_retain(l->frames[0], 1);
    inject_fault(w->lacks_memory, true);
    CHECK(wsf_link_greet(w->fanout, p->link, l->frames[0]) == WSF_OK);
    (void)end_faults();
    w->lacks_memory = false;
    release_letter(w, l);
}

/* The connection breaks, and some of what was under way is lost. */
static void cut(world *w, peer *p)
{
    end_link(w, p);
    wsf_link_clear(w->fanout, p->link, WSF_WAITS);
    must_clear(w, p, WSF_WAITS);
    if (p->fd < 0)
        return;
    if (one_in(&w->random, 2))
        (void)far_read(w, p, one_in(&w->random, 2) ? SIZE_MAX : below(&w->random, 5000));
    close_ends(p);
    p->unread.size = 0;
}

/* Nearly always the client says what is true. */
static uint64_t some_received(world *w, const session *s)
{
    switch (below(&w->random, 12)) {
    case 0: return below(&w->random, (uint32_t)s->received + 1);
    case 1: return s->handed + 1 + below(&w->random, 3);
    case 2: return s->handed;
    case 3: return reach_of(w, s) - (reach_of(w, s) != 0);
    default: return s->received;
    }
}

/* The client is back on another connection. */
static void come_back(world *w, peer *p)
{
    session *s = p->session;
    cut(w, p);
    const uint64_t received = some_received(w, s);
    must_expire_log(w, w->now_ns);
    const bool is_there = received >= reach_of(w, s) && received <= s->handed;
    const bool goes = wsf_link_rewind(w->fanout, p->link, received);
    CHECK(s->may_forget ? !goes || is_there : goes == is_there);
    if (!goes) {
        forget(w, p);
        return;
    }
    s->handed = s->floor = (size_t)received;
    s->received = received;
    check_world(w);
    wsf_link *newer = make_link();
    wsf_link_take_session(w->fanout, newer, p->link);
    p->facts &= ~(uint32_t)WSF_KEEPS;
    forget_link(w, p);
    connect_link(w, p, newer);
    p->awaits_greeting = true;
    while (wsf_fanout_admit(w->fanout, newer) != WSF_OK)
        ;
    w->links++;
    open_link(w, p, newer);
}

static void some_session(world *w, peer *p)
{
    if (p->session == NULL)
        return;
    if (!p->is_greeted)
        greet(w, p);
    else if (!(p->facts & WSF_OPEN) || one_in(&w->random, 4))
        come_back(w, p);
    else if (one_in(&w->random, 2))
        cut(w, p);
}

static void some_operation_on(world *w, peer *p)
{
    chance *random = &w->random;
    switch (below(random, w->has_sessions ? 15 : 13)) {
    case 0:
    case 1:
    case 2: (void)far_read(w, p, one_in(random, 4) ? SIZE_MAX : below(random, 5000)); return;
    case 3:
    case 4:
    case 5: transport_step(w, p); return;
    case 6: some_library_write(w, p); return;
    case 7: some_fragment(w, p); return;
    case 8:
        if (one_in(random, 4))
            hang_up(w, p);
        return;
    case 9:
        p->mark = p->mark == WSF_NO_MARK ? 0 : p->mark;
        p->mark += below(random, 2000);
        wsf_link_watch(w->fanout, p->link, p->mark);
        return;
    case 10: take_ping(w, p); return;
    case 11:
        if (one_in(random, 4))
            finish(w, p);
        return;
    case 12:
        if (one_in(random, w->has_sessions ? 12 : 6)) {
            forget(w, p);
        } else if (one_in(random, 8)) {
            end_link(w, p);
        }
        return;
    case 13:
    case 14: some_session(w, p);
    }
}

/* What makes clients come back with much to be sent: short messages that arrive, and now and then a connection that breaks. */
static void some_life_of_sessions(world *w, peer *p)
{
    chance *random = &w->random;
    if (p->link == NULL) {
        admit(w, p);
    } else if (p->session != NULL && !p->is_greeted && !one_in(random, 4)) {
        greet(w, p);
    } else if (p->session != NULL && (one_in(random, 20) || (!(p->facts & WSF_OPEN) && one_in(random, 8)))) {
        come_back(w, p);
    } else if (p->session != NULL && one_in(random, 30)) {
        cut(w, p);
    } else if (one_in(random, 2)) {
        letter *l = new_letter(w, below(random, one_in(random, 10) ? 6000 : 120), one_in(random, 3) ? (int)below(random, 3) : NO_KEY);
        if (l == NULL)
            return;
        push(w, l, 1 + below(random, w->size->peers), one_in(random, 8));
        release_letter(w, l);
    } else {
        flush(w, INT64_MAX);
        (void)far_read(w, p, one_in(random, 3) ? below(random, 3000) : SIZE_MAX);
        if (p->fd >= 0)
            transport_step(w, p);
    }
}

static void some_operation(world *w)
{
    chance *random = &w->random;
    peer *p = &w->peers[below(random, w->size->peers)];
    w->now_ns += w->is_round ? 100 * below(random, 2) : below(random, 100);
    w->fanout->now_ns = w->now_ns;
    if (w->size->is_about_sessions && !one_in(random, 4)) {
        some_life_of_sessions(w, p);
        return;
    }
    switch (below(random, 18)) {
    case 0:
    case 1:
    case 2:
    case 3: some_push(w); return;
    case 16: some_ping(w); return;
    case 17: {
        ping *g = &w->pings[below(random, PINGS)];
        if (g->frame != NULL && g->is_held)
            release_ping(g);
        return;
    }
    case 4:
    case 5:
    case 6: flush(w, one_in(random, 3) ? 0 : INT64_MAX); return;
    case 7:
        if (p->link == NULL)
            admit(w, p);
        return;
    case 8: end_window(w); return;
    case 9:
        expire(w);
        if (one_in(random, 3)) {
            must_expire_log(w, w->now_ns);
            wsf_backlog_expire(&w->fanout->backlog, w->now_ns);
        }
        return;
    case 10:
        if (one_in(random, 2))
            shed(w);
        return;
    case 11: {
        letter *l = &w->letters[below(random, LETTERS)];
        if (l->message != NULL && l->is_held)
            release_letter(w, l);
        return;
    }
    case 12:
        if (w->report_count > MOST_REPORTS / 8 || one_in(random, 4))
            take_reports(w);
        w->fanout->wants_reports = !one_in(random, 4);
        return;
    default:
        p = some_peer(w);
        if (p != NULL)
            some_operation_on(w, p);
    }
}

/* ---- random programs ---------------------------------------------------------------------------------------------- */

static world *open_world(uint64_t seed, const scale *size)
{
    world *w = must_alloc(1, sizeof *w);
    chance *random = &w->random;
    w->random.state = seed;
    w->size = size;
    w->peers = must_alloc(size->peers, sizeof *w->peers);
    w->line = must_alloc(size->peers, sizeof *w->line);
    w->later = must_alloc(size->peers, sizeof *w->later);
    w->order = must_alloc(size->peers, sizeof *w->order);
    w->now_ns = 1000000;
    for (size_t i = 0; i < sizeof w->payload; i++)
        w->payload[i] = (uint8_t)draw(random);
    w->limits.policy = (uint32_t)(seed % WSF_POLICIES);
    w->limits.max_bytes = 1 + below(random, one_in(random, 3) ? 400 : 40000);
    w->limits.low_bytes = w->limits.max_bytes * below(random, 5) / 4;
    w->limits.max_age_ns = 1 + below(random, 5000);
    w->limits.max_total_bytes = one_in(random, 3) ? 1 + below(random, 300000) : 1 << 24;
    if (size->is_about_sessions && one_in(random, 2))
        w->limits.max_total_bytes = 1 << 24;
    w->is_round = one_in(random, 3);
    if (w->is_round) {
        w->limits.max_bytes = 100 * (1 + below(random, 30));
        w->limits.low_bytes = 100 * below(random, 1 + (uint32_t)w->limits.max_bytes / 100);
        w->limits.max_age_ns = 100 * (1 + below(random, 20));
    }
    w->fanout = wsf_fanout_new(&w->limits);
    SHIM_REQUIRE(w->fanout != NULL);
    w->fanout->now_ns = w->now_ns;
    w->fanout->pushes = UINT32_MAX - below(random, 20);
    w->log_first = 1;
    w->has_sessions = size->is_about_sessions || one_in(random, 2);
    w->lacking = one_in(random, 3) ? 8 : 500;
    w->fanout->backlog.limits = (wsf_backlog_limits){
        one_in(random, 3) ? 1 + below(random, 30) : LETTERS - 60,
        one_in(random, 6) ? 1 + below(random, 20000) : UINT32_MAX,
        one_in(random, 6) ? 1 + below(random, 20000) : INT64_MAX / 2,
    };
    if (size->helpers != 0)
        w->pool = wsf_pool_new(size->helpers);
    for (uint32_t i = 0; i < size->peers; i++)
        w->peers[i].fd = w->peers[i].far_fd = -1;
    return w;
}

static void close_world(world *w)
{
    for (uint32_t i = 0; i < w->size->peers; i++) {
        if (w->peers[i].link != NULL)
            forget(w, &w->peers[i]);
        free(w->peers[i].expected.data);
        free(w->peers[i].transport.data);
        free(w->peers[i].unread.data);
    }
    check_world(w);
    for (uint32_t i = 0; i < PINGS; i++)
        if (w->pings[i].frame != NULL)
            release_ping(&w->pings[i]);
    for (uint32_t i = 0; i < LETTERS; i++) {
        if (w->letters[i].message != NULL)
            release_letter(w, &w->letters[i]);
        for (uint32_t variant = 0; variant < VARIANTS; variant++)
            free(w->letters[i].encoded[variant].data);
    }
    CHECK(w->fanout->account == 0);
    if (w->pool != NULL)
        wsf_pool_free(w->pool);
    wsf_fanout_free(w->fanout);
    free(w->peers);
    free(w->line);
    free(w->later);
    free(w->order);
    free(w);
}

/* ---- each way a plan can send ------------------------------------------------------------------------------------- */

/* A world that keeps everything, and that writes to all its peers itself, in frames of variant 0. */
static world *open_plain_world(const scale *size)
{
    world *w = open_world(0, size);
    w->has_sessions = false;
    w->lacking = UINT32_MAX;
    w->limits.max_total_bytes = w->fanout->limits.max_total_bytes = UINT64_MAX / 2;
    for (uint32_t i = 0; i < size->peers; i++) {
        peer *p = &w->peers[i];
        admit(w, p);
        wsf_link_set(w->fanout, p->link, WSF_DIRECT);
        p->facts |= WSF_DIRECT;
        p->variant = p->link->variant = 0;
    }
    return w;
}

static void push_to(world *w, peer *p, letter *l)
{
    must_take(w, p, l, false);
    wsf_fanout_push(w->fanout, &p->link, 1, l->frames, 0, 0);
}

static void push_many(world *w, peer *p, letter *l, uint32_t times)
{
    for (; times > 0; times--)
        push_to(w, p, l);
}

/* All that is under way arrives. */
static void drain(world *w)
{
    for (bool is_idle = false; !is_idle;) {
        is_idle = true;
        flush(w, INT64_MAX);
        for (uint32_t i = 0; i < w->size->peers; i++) {
            peer *p = &w->peers[i];
            CHECK(far_read(w, p, SIZE_MAX));
            if (p->facts & WSF_BLOCKED)
                transport_step(w, p);
            is_idle = is_idle && p->expected.size == 0 && p->count == 0;
        }
    }
    check_world(w);
}

static void run_joined(const scale *size)
{
    world *w = open_plain_world(size);
    peer *p = w->peers;
    letter *a = new_letter(w, 10, NO_KEY), *b = new_letter(w, 200, NO_KEY), *c = new_letter(w, WSF_JOIN_BYTES, NO_KEY);
    for (uint32_t i = 0; i < 4; i++) {
        push_to(w, &p[i], i == 3 ? b : a);
        push_to(w, &p[i], i == 3 ? a : b);
    }
    push_to(w, &p[4], a); /* one frame: as it is */
    push_to(w, &p[5], a);
    push_to(w, &p[5], c); /* too much to copy */
    push_to(w, &p[6], b); /* after one that is listed */
    push_to(w, &p[6], a);
    uint32_t jobs = plan(w);
    const wsf_job *job = w->fanout->jobs;
    CHECK(jobs == 7 && job[0].data == w->fanout->arena && job[1].data == job[0].data && job[2].data == job[0].data);
    CHECK(job[3].data == job[0].data + job[0].size && job[3].size == job[0].size);
    CHECK(job[4].data == a->frames[0]->data && job[5].data == NULL && job[6].data == job[3].data + job[3].size);
    carry_out(w, jobs, INT64_MAX);
    CHECK(w->totals.writes == 7 && w->totals.blocked == 0 && w->fanout->arena_used == 0);
    check_world(w);
    drain(w);
    close_world(w);
}

/* More frames than one call may list, and more than a socket takes. */
static void run_listed(const scale *size)
{
    world *w = open_plain_world(size);
    letter *l = new_letter(w, 58, NO_KEY), *long_one = new_letter(w, 290, NO_KEY);
    push_many(w, &w->peers[0], l, 256);
    push_many(w, &w->peers[1], l, 273);
    push_many(w, &w->peers[2], l, 274); /* more than WSF_JOIN_BYTES */
    push_many(w, &w->peers[3], l, 700);
    push_many(w, &w->peers[4], l, 1024);
    push_many(w, &w->peers[5], long_one, MOST_ITEMS - 1);
    push_many(w, &w->peers[6], long_one, MOST_ITEMS - 1);
    uint32_t jobs = plan(w);
    CHECK(jobs == 7);
    for (uint32_t i = 0; i < jobs; i++)
        CHECK((w->fanout->jobs[i].data == NULL) == (i >= 2));
    carry_out(w, jobs, INT64_MAX);
    CHECK(w->totals.writes == 7 && w->peers[3].count == 0 && w->peers[4].count == 0);
    CHECK(w->totals.blocked != 0);
    check_world(w);
    drain(w);
    close_world(w);
}

typedef struct {
    int fd;
    uint32_t ends; /* atomic */
    bytes got;
} reader;

static void *read_along(void *argument)
{
    reader *r = argument;
    for (;;) {
        uint8_t buffer[3000];
        bool ends = WSF_LOAD32(&r->ends);
        ssize_t result = recv(r->fd, buffer, sizeof buffer, 0);
        if (result > 0)
            bytes_add(&r->got, buffer, (size_t)result);
        else if (ends)
            return NULL;
    }
}

/* The peer reads while the kernel is given one list after the other, so there is room again after one that was cut. */
static void run_listed_while_read(const scale *size)
{
    world *w = open_plain_world(size);
    letter *letters[LETTERS / 2];
    peer *p = w->peers;
    reader r = {.fd = p->far_fd};
    pthread_t thread;
    for (size_t i = 0; i < LENGTH(letters); i++)
        letters[i] = new_letter(w, 180 + i, NO_KEY);
    SHIM_REQUIRE(pthread_create(&thread, NULL, read_along, &r) == 0);
    for (uint32_t round = 0; round < 8; round++) {
        for (uint32_t i = 0; i < MOST_ITEMS - 1; i++)
            push_to(w, p, letters[below(&w->random, LENGTH(letters))]);
        while (p->count != 0 || p->transport.size != 0) {
            flush(w, INT64_MAX);
            if (p->facts & WSF_BLOCKED)
                transport_step(w, p);
        }
    }
    WSF_STORE32(&r.ends, 1);
    pthread_join(thread, NULL);
    CHECK(r.got.size <= p->expected.size && memcmp(r.got.data, p->expected.data, r.got.size) == 0);
    bytes_skip(&p->expected, r.got.size);
    free(r.got.data);
    drain(w);
    close_world(w);
}

/* The arena is full before all have had a place in it. */
static void run_full_arena(const scale *size)
{
    world *w = open_plain_world(size);
    letter *letters[LETTERS / 2];
    uint32_t joined = 0, jobs;
    for (size_t i = 0; i < LENGTH(letters); i++)
        letters[i] = new_letter(w, 8000, NO_KEY);
    for (uint32_t i = 0; i < size->peers; i++) {
        push_to(w, &w->peers[i], letters[i % LENGTH(letters)]);
        push_to(w, &w->peers[i], letters[(i + 1 + i / LENGTH(letters)) % LENGTH(letters)]);
    }
    jobs = plan(w);
    for (uint32_t i = 0; i < jobs; i++)
        joined += w->fanout->jobs[i].data != NULL;
    CHECK(joined == 65); /* of the 1 MiB */
    carry_out(w, jobs, INT64_MAX);
    check_world(w);
    drain(w);
    close_world(w);
}

/* Links step out of the line and in again until it is all gaps, and others come and go. */
static void run_gaps(const scale *size)
{
    world *w = open_plain_world(size);
    letter *l = new_letter(w, 5, NO_KEY);
    for (uint32_t i = 0; i < 2000; i++) {
        peer *p = &w->peers[below(&w->random, size->peers)];
        if (p->link == NULL) {
            admit(w, p);
        } else if (one_in(&w->random, 8)) {
            forget(w, p);
        } else {
            push_to(w, p, l);
            wsf_link_set(w->fanout, p->link, WSF_FRAGMENT);
            must_set(w, p, WSF_FRAGMENT);
            wsf_link_clear(w->fanout, p->link, WSF_FRAGMENT);
            must_clear(w, p, WSF_FRAGMENT);
        }
        if (one_in(&w->random, 300))
            flush(w, 0);
        check_world(w);
    }
    close_world(w);
}

static void ping_one(world *w, peer *p, ping *g) { push_ping(w, &p->link, 1, g); }

/* A control frame alone, with frames, shared with others, and before more than one call may list. */
static void run_control_jobs(const scale *size)
{
    world *w = open_plain_world(size);
    peer *p = w->peers;
    letter *a = new_letter(w, 10, NO_KEY), *c = new_letter(w, WSF_JOIN_BYTES, NO_KEY), *l = new_letter(w, 58, NO_KEY);
    ping *g = new_ping(w, 125), *other = new_ping(w, 0);
    ping_one(w, &p[0], g);
    for (uint32_t i = 1; i < 4; i++) {
        push_to(w, &p[i], a);
        ping_one(w, &p[i], i == 3 ? other : g);
    }
    push_to(w, &p[4], c);
    ping_one(w, &p[4], g);
    push_many(w, &p[5], l, 275);
    ping_one(w, &p[5], g);
    push_many(w, &p[6], l, 600);
    ping_one(w, &p[6], other);
    ping_one(w, &p[6], g); /* in the place of the one before */
    uint32_t jobs = plan(w);
    const wsf_job *job = w->fanout->jobs;
    CHECK(jobs == 7 && job[0].data == g->frame->data && job[1].data == w->fanout->arena && job[2].data == job[1].data);
    CHECK(job[3].data == job[1].data + job[1].size && job[3].size == 2 + 12);
    for (uint32_t i = 4; i < 7; i++)
        CHECK(job[i].data == NULL && job[i].control == g->frame);
    carry_out(w, jobs, INT64_MAX);
    CHECK(w->totals.controls == 7 && other->links == 0);
    CHECK(w->totals.blocked == 0 && p[6].expected.size == 127 + 600 * 60);
    check_world(w);
    drain(w);
    close_world(w);
}

/* Sockets that take less each time: at last one takes only some of a control frame, or none of it. */
static void run_cut_controls(const scale *size)
{
    world *w = open_plain_world(size);
    uint32_t in_control = 0;
    for (uint32_t round = 0; round < 4000 && in_control < 20; round++) {
        peer *p = &w->peers[below(&w->random, size->peers)];
        ping *g = new_ping(w, below(&w->random, 126));
        ping_one(w, p, g);
        release_ping(g);
        flush(w, INT64_MAX);
        in_control += p->has_control_in_transport;
        if (p->facts & WSF_BLOCKED) {
            ping *next = new_ping(w, 7);
            ping_one(w, p, next);
            CHECK(is_held(p) && p->control == next);
            take_ping(w, p);
            CHECK(is_held(p)); /* the older one has not left */
            release_ping(next);
            check_world(w);
            (void)far_read(w, p, SIZE_MAX);
            transport_step(w, p);
        }
        check_world(w);
    }
    CHECK(in_control == 20);
    drain(w);
    close_world(w);
}

/* Some of what waits could not be written, the control frame first. */
static void run_failed_control(const scale *size)
{
    world *w = open_plain_world(size);
    letter *l = new_letter(w, 58, NO_KEY);
    ping *g = new_ping(w, 4);
    for (uint32_t frames = 1; frames <= 4; frames++) {
        peer *p = &w->peers[frames];
        push_many(w, p, l, 3);
        ping_one(w, p, g);
        wsf_link_fail(w->fanout, p->link, frames);
        must_fail(w, p, frames - 1);
        check_world(w);
    }
    CHECK(l->tally.failed == 6 && l->tally.dropped == 6 && w->totals.controls == 0 && g->links == 0);
    close_world(w);
}

static void test_controls(uint64_t seed)
{
    static const scale few = {.peers = 7}, small = {.peers = 7, .is_small = true};
    current_seed = seed;
    make_keys();
    run_control_jobs(&few);
    run_cut_controls(&small);
    run_failed_control(&few);
    free_keys();
    check_nothing_lives();
}

/* ---- clients that come back, case by case ------------------------------------------------------------------------- */

static world *open_world_of_sessions(const scale *size, uint32_t policy, uint64_t max_bytes)
{
    world *w = open_plain_world(size);
    w->limits.policy = w->fanout->limits.policy = policy;
    w->limits.max_bytes = w->fanout->limits.max_bytes = max_bytes;
    w->limits.low_bytes = w->fanout->limits.low_bytes = max_bytes / 2;
    w->fanout->backlog.limits = (wsf_backlog_limits){LETTERS, UINT32_MAX, INT64_MAX / 2};
    for (uint32_t i = 0; i < size->peers; i++)
        begin_session(w, &w->peers[i]);
    return w;
}

/* A message to the first `count` of them. */
static letter *push_new(world *w, uint32_t count, size_t size)
{
    letter *l = new_letter(w, size, NO_KEY);
    wsf_link *links[8];
    for (uint32_t i = 0; i < count; i++)
        links[i] = w->peers[i].link;
    wsf_fanout_push(w->fanout, links, count, l->frames, 0, 1);
    must_log(w, l);
    for (uint32_t i = 0; i < count; i++)
        must_take(w, &w->peers[i], l, false);
    release_letter(w, l);
    return l;
}

static void come_back_from(world *w, peer *p, uint64_t received)
{
    cut(w, p);
    CHECK(wsf_link_rewind(w->fanout, p->link, received));
    p->session->handed = p->session->floor = (size_t)received;
    p->session->received = received;
    wsf_link *newer = make_link();
    wsf_link_take_session(w->fanout, newer, p->link);
    p->facts &= ~(uint32_t)WSF_KEEPS;
    forget_link(w, p);
    connect_link(w, p, newer);
    p->awaits_greeting = true;
    p->variant = newer->variant = 0;
    CHECK(wsf_fanout_admit(w->fanout, newer) == WSF_OK);
    w->links++;
    p->is_direct = true;
    open_link(w, p, newer);
}

/* Whatever happens to a link before it is greeted, the client is sent no message. */
static void run_greeting_comes_first(const scale *size)
{
    world *w = open_world_of_sessions(size, WSF_KEEP, 1000);
    peer *p = w->peers;
    ping *g = new_ping(w, 5);
    push_new(w, 1, 10);
    ping_one(w, p, g);
    flush(w, INT64_MAX);
    CHECK(w->totals.controls == 1 && p->count == 0 && (p->facts & WSF_BEHIND));
    block(w, p, 3);
    push_new(w, 1, 10);
    unblock(w, p);
    wsf_link_set(w->fanout, p->link, WSF_FRAGMENT);
    must_set(w, p, WSF_FRAGMENT);
    wsf_link_clear(w->fanout, p->link, WSF_FRAGMENT);
    must_clear(w, p, WSF_FRAGMENT);
    flush(w, INT64_MAX);
    check_world(w);
    CHECK(w->totals.messages == 0);
    greet(w, p);
    check_world(w);
    drain(w);
    CHECK(p->session->received == 2 && !p->awaits_greeting && w->totals.messages == 2);
    close_world(w);
}

/* A connection that ends before it is greeted: the next one is. */
static void run_closed_before_greeting(const scale *size)
{
    world *w = open_world_of_sessions(size, WSF_KEEP, 1000);
    peer *p = w->peers;
    push_new(w, 1, 10);
    end_link(w, p);
    greet(w, p);
    check_world(w);
    CHECK(p->count == 0 && p->awaits_greeting);
    come_back_from(w, p, 0);
    greet(w, p);
    drain(w);
    CHECK(p->session->received == 1);
    close_world(w);
}

/* More short messages than are put into an outbox at once, and some that are longer than that may be. */
static void run_long_absence(const scale *size)
{
    world *w = open_world_of_sessions(size, WSF_DISCONNECT, 1000);
    peer *p = w->peers;
    for (uint32_t i = 0; i < 2; i++)
        greet(w, &p[i]);
    drain(w);
    cut(w, p);
    for (uint32_t i = 0; i < 300; i++)
        push_new(w, 2, i % 100 == 99 ? WSF_JOIN_BYTES : 20);
    come_back_from(w, p, 0);
    greet(w, p);
    CHECK(p->count == 1 + 99 && (p->facts & WSF_BEHIND));
    push_new(w, 2, 7); /* that comes behind */
    drain(w);
    CHECK(p->session->received == 301 && p->session->handed == 301 && !(p->facts & WSF_KEEPS));
    for (uint32_t i = 0; i < 70; i++)
        push_new(w, 2, 1);
    drain(w);
    for (uint32_t i = 0; i < 3; i++)
        come_back_from(w, p, 300); /* and breaks before it is greeted, but for the last time */
    greet(w, p);
    CHECK(p->count == 1 + 71 && !(p->facts & WSF_BEHIND));
    drain(w);
    CHECK(p->session->received == 371 && p[1].session->received == 371);
    close_world(w);
}

/* 256 at once. */
static void run_many_short_ones(const scale *size)
{
    world *w = open_world_of_sessions(size, WSF_DISCONNECT, 1000);
    peer *p = w->peers;
    for (uint32_t i = 0; i < LETTERS - 10; i++)
        push_new(w, 1, 0);
    greet(w, p);
    CHECK(p->count == 256 && (p->facts & WSF_BEHIND));
    flush(w, INT64_MAX);
    CHECK(p->count == LETTERS - 10 - 255 && !(p->facts & WSF_BEHIND));
    drain(w);
    CHECK(p->session->received == LETTERS - 10);
    close_world(w);
}

/* A client comes back and reads nothing. What is sent once more is not dropped; what comes behind it has its limits. */
static void run_slow_when_back(const scale *size, uint32_t policy)
{
    const uint64_t most = 2000;
    world *w = open_world_of_sessions(size, policy, most);
    peer *p = w->peers;
    for (uint32_t i = 0; i < 5; i++)
        push_new(w, 1, 100);
    block(w, p, 1);
    greet(w, p);
    check_world(w);
    const uint64_t again = peer_bytes(p);
    for (uint32_t i = 0; i < 200; i++) {
        push_new(w, 1, 100);
        CHECK(peer_bytes(p) <= (again > most ? again : most) + 110);
    }
    check_world(w);
    CHECK((p->facts & WSF_OPEN) != 0 && p->count > 6 && again_of(p) == 6);
    unblock(w, p);
    drain(w);
    CHECK(p->session->received >= 6 && p->session->received == p->session->handed && w->totals.dropped[WSF_BY_BYTES] > 100);
    CHECK(p->session->received + w->totals.dropped[WSF_BY_BYTES] == 205);
    close_world(w);
}

/* Who is closed while it is behind and its socket takes nothing has something to hand over, until it has had everything. */
static void run_finished_while_behind(const scale *size)
{
    world *w = open_world_of_sessions(size, WSF_DISCONNECT, 100000);
    peer *p = w->peers;
    for (uint32_t i = 0; i < 40; i++)
        push_new(w, 1, 5000);
    greet(w, p);
    for (uint32_t i = 0; i < 20 && !(p->facts & WSF_BLOCKED); i++)
        flush(w, INT64_MAX);
    CHECK((p->facts & WSF_BLOCKED) && (p->facts & WSF_BEHIND) && p->count != 0);
    while (p->count != 0)
        write_frames(w, p, p->count);
    CHECK(!(p->facts & WSF_BEHIND) && p->session->handed == 40);
    check_world(w);
    while (p->transport.size != 0) {
        (void)far_read(w, p, SIZE_MAX);
        transport_step(w, p);
    }
    drain(w);
    CHECK(p->session->received == 40);
    close_world(w);
}

/* What a client that is back needs is let go before it has been sent: it is given up, and nothing can be said about how long it
 * has waited. */
static void run_log_is_too_short(const scale *size)
{
    world *w = open_world_of_sessions(size, WSF_KEEP, 1000);
    peer *p = w->peers;
    w->fanout->backlog.limits.max_messages = 10;
    for (uint32_t i = 0; i < 10; i++)
        push_new(w, 1, 10000);
    greet(w, p);
    for (uint32_t i = 0; i < 10; i++)
        push_new(w, 1, 10000);
    flush(w, INT64_MAX); /* of the greeting, and of the first; then the next is not there */
    check_world(w);
    CHECK((p->facts & WSF_AWAY) && w->report_count == 1 && w->reports[0].what == WSF_TOO_SLOW && w->reports[0].age_s == 0);
    CHECK(!wsf_link_rewind(w->fanout, p->link, p->session->received));
    close_world(w);
}

static void test_sessions(uint64_t seed)
{
    static const scale one = {.peers = 1}, two = {.peers = 2}, small = {.peers = 1, .is_small = true};
    current_seed = seed;
    make_keys();
    run_greeting_comes_first(&one);
    run_closed_before_greeting(&one);
    run_long_absence(&two);
    run_many_short_ones(&one);
    run_slow_when_back(&one, WSF_DROP_OLDEST);
    run_slow_when_back(&one, WSF_CONFLATE);
    run_finished_while_behind(&small);
    run_log_is_too_short(&one);
    free_keys();
    check_nothing_lives();
}

static void test_jobs(uint64_t seed)
{
    static const scale few = {.peers = 7}, more = {.peers = 80}, crowd = {.peers = 33}, one = {.peers = 1},
                       small_one = {.peers = 1, .is_small = true};
    current_seed = seed;
    make_keys();
    run_joined(&few);
    run_listed(&few);
    run_listed_while_read(&one);
    run_listed_while_read(&small_one);
    run_full_arena(&more);
    run_gaps(&few);
    run_gaps(&crowd);
    free_keys();
    check_nothing_lives();
}

/* ---- random programs, run ----------------------------------------------------------------------------------------- */

static void run_world(uint64_t seed, const scale *size)
{
    current_seed = seed;
    make_keys();
    world *w = open_world(seed, size);
    for (uint32_t i = 0; i < size->peers; i++)
        if (size->helpers != 0 || one_in(&w->random, 3))
            admit(w, &w->peers[i]);
    for (current_step = 0; current_step < size->steps; current_step++) {
        some_operation(w);
        check_world(w);
    }
    close_world(w);
    free_keys();
    check_nothing_lives();
}

static void test_random(uint64_t seed)
{
    static const scale few = {.peers = 14, .steps = 1500, .is_small = true}, more = {.peers = 70, .steps = 800, .is_small = true};
    for (uint64_t i = 0; i < 2 * WSF_POLICIES; i++)
        run_world(seed * 2 * WSF_POLICIES + i, i < WSF_POLICIES ? &few : &more);
}

static void test_comings(uint64_t seed)
{
    static const scale few = {.peers = 3, .steps = 3000, .is_small = true, .is_about_sessions = true},
                       fast = {.peers = 3, .steps = 3000, .is_about_sessions = true},
                       more = {.peers = 20, .steps = 1500, .is_small = true, .is_about_sessions = true};
    static const scale *const scales[] = {&few, &fast, &more};
    for (uint64_t i = 0; i < 3 * WSF_POLICIES; i++)
        run_world(seed * 3 * WSF_POLICIES + i, scales[i / WSF_POLICIES]);
}

static void test_crowd(uint64_t seed)
{
    static const scale many = {.peers = 400, .steps = 120, .is_small = true, .helpers = 3},
                       fast = {.peers = 400, .steps = 120, .helpers = 2};
    struct rlimit files;
    SHIM_REQUIRE(getrlimit(RLIMIT_NOFILE, &files) == 0);
    files.rlim_cur = files.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &files);
    for (uint64_t i = 0; i < WSF_POLICIES; i++)
        run_world(seed * WSF_POLICIES + i, one_in(&(chance){seed + i}, 3) ? &fast : &many);
}

/* ---- pool --------------------------------------------------------------------------------------------------------- */

enum { MOST_PIECES = 512 };

/* A piece of work. It lies on the stack of a round, and is overwritten after it: whoever comes late would be seen. */
typedef struct {
    int64_t entered, inside, taken;
    uint32_t pieces, delay, done[MOST_PIECES];
    pthread_t caller;
    bool forks;
    pid_t child;
    wsf_pool *pool;
    uint64_t magic;
} job_of_pool;

#define MAGIC UINT64_C(0x4F6E652062792031)

static uint32_t spin(uint32_t times)
{
    volatile uint32_t sum = 0;
    for (uint32_t i = 0; i < times; i++)
        sum = sum + i;
    return sum;
}

static bool blocks_all_signals(void)
{
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    return sigismember(&mask, SIGTERM) && sigismember(&mask, SIGPIPE) && sigismember(&mask, SIGALRM);
}

/* What a forked child may do: work alone, and free the pool. */
static _Noreturn void be_child(wsf_pool *pool);

static void work_off(void *argument)
{
    job_of_pool *job = argument;
    SHIM_REQUIRE(job->magic == MAGIC);
    SHIM_REQUIRE(pthread_equal(job->caller, pthread_self()) || blocks_all_signals());
    (void)WSF_ADD64(&job->entered, 1);
    (void)WSF_ADD64(&job->inside, 1);
    if (job->forks && pthread_equal(job->caller, pthread_self())) {
        job->child = fork();
        if (job->child == 0)
            be_child(job->pool);
    }
    for (int64_t piece; (piece = WSF_ADD64(&job->taken, 1) - 1) < job->pieces;) {
        (void)spin(job->delay);
        job->done[piece]++; /* not atomic: each is one thread's, and the caller's after the round */
    }
    (void)WSF_ADD64(&job->inside, -1);
}

static void run_round(chance *random, wsf_pool *pool, bool forks)
{
    job_of_pool job;
    memset(&job, 0, sizeof job);
    job.magic = MAGIC;
    job.caller = pthread_self();
    job.pool = pool;
    job.forks = forks;
    /* Often less than it takes to wake up. */
    job.pieces = one_in(random, 2) ? below(random, 4) : below(random, MOST_PIECES);
    job.delay = one_in(random, 2) ? 0 : below(random, 300);
    wsf_pool_run(pool, work_off, &job);
    SHIM_REQUIRE(job.inside == 0 && job.entered >= 1 && job.entered <= 1 + (int64_t)wsf_pool_helpers(pool));
    SHIM_REQUIRE(job.taken == job.entered + (int64_t)job.pieces);
    for (uint32_t i = 0; i < MOST_PIECES; i++)
        SHIM_REQUIRE(job.done[i] == (i < job.pieces));
    if (forks) {
        int status;
        SHIM_REQUIRE(job.child > 0 && waitpid(job.child, &status, 0) == job.child && status == 0);
    }
    memset(&job, 0xAA, sizeof job);
}

static _Noreturn void be_child(wsf_pool *pool)
{
    chance random = {7};
    SHIM_REQUIRE(wsf_pool_helpers(pool) == 0);
    for (int round = 0; round < 3; round++)
        run_round(&random, pool, false);
    wsf_pool_free(pool);
    wsf_pool *own = wsf_pool_new(0);
    run_round(&random, own, false);
    wsf_pool_free(own);
    _exit(0);
}

static void test_pool(uint64_t seed)
{
    chance random = {seed};
    current_seed = seed;
    sigset_t before, after;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    inject_fault(1, false);
    CHECK(wsf_pool_new(3) == NULL);
    (void)end_faults();
    for (unsigned helpers = 0; helpers <= WSF_MAX_HELPERS + 2; helpers++) {
        wsf_pool *pool = wsf_pool_new(helpers);
        CHECK(wsf_pool_helpers(pool) == (helpers < WSF_MAX_HELPERS ? helpers : WSF_MAX_HELPERS));
        for (uint32_t round = 0; round < 200; round++)
            run_round(&random, pool, false);
        wsf_pool_free(pool); /* some may not have seen the last round yet */
        wsf_pool_free(wsf_pool_new(helpers));
        for (uint32_t round = 0; round < 5; round++) {
            pool = wsf_pool_new(helpers);
            run_round(&random, pool, false);
            wsf_pool_free(pool);
        }
    }
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (int number = 1; number < 32; number++)
        CHECK(sigismember(&before, number) == sigismember(&after, number));
    check_nothing_lives();
}

/* fork() between rounds and in the middle of one; nothing of the child is the parent's. */
static void test_fork(uint64_t seed)
{
    chance random = {seed};
    current_seed = seed;
    for (unsigned helpers = 0; helpers <= 6; helpers += 2) {
        wsf_pool *pool = wsf_pool_new(helpers);
        for (uint32_t round = 0; round < 12; round++) {
            run_round(&random, pool, round % 2 == 0);
            pid_t child = fork();
            int status;
            CHECK(child >= 0);
            if (child == 0)
                be_child(pool);
            run_round(&random, pool, false);
            CHECK(waitpid(child, &status, 0) == child && status == 0);
        }
        wsf_pool_free(pool);
    }
    check_nothing_lives();
}

/* ---- main ------------------------------------------------------------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    static const test_part parts[] = {
        {"frames", test_frames, 1},
        {"outbox", test_outbox, 2},
        {"jobs", test_jobs, 1},
        {"controls", test_controls, 1},
        {"sessions", test_sessions, 1},
        {"random", test_random, 2},
        {"comings", test_comings, 2},
        {"crowd", test_crowd, 2},
        {"pool", test_pool, 1},
        {"fork", test_fork, 2},
    };
    return run_parts(parts, LENGTH(parts), argc, argv);
}
