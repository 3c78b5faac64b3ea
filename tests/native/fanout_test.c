/* Frames, outboxes, the fan-out over real sockets, and the pool, without an interpreter: fanout_test [MULTIPLIER] [PART]
 * [SEED]; see harness.h.
 *
 * Parts: frames; outbox (random sequences against an array, with allocations that fail); jobs (each way a plan can send);
 * random and crowd (random programs on few links and on many with a pool, against a model of every link, message, report
 * and total); pool; fork.
 *
 * The model knows, for each connection, every byte that must arrive there, and each peer compares what it reads with
 * that. What a socket takes is the kernel's choice, so the model learns it from the jobs; that they tell the truth is
 * seen in the streams.
 */
#define WSF_SHIM_IMPLEMENTATION
#include "fanout.h"
#include "harness.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* ---- keys --------------------------------------------------------------------------------------------------------- */

enum { KEYS = 48, NO_KEY = -1 };

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

static const uint8_t every_first_bits[] = {WSF_TEXT, WSF_BINARY, WSF_TEXT | WSF_RSV1, WSF_BINARY | WSF_RSV1};

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
        wsf_entry queued;
    } entries[MOST_ENTRIES];
    uint32_t count, most_keys;
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
    for (uint32_t i = model->count; i-- > 0;)
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
    wsf_entry queued = below(&model->random, 2);
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
}

static void outbox_pop(outbox_model *model)
{
    wsf_entry entry = wsf_outbox_pop(&model->outbox, &model->account);
    CHECK(wsf_entry_frame(entry) == model->entries[0].frame && (entry & WSF_QUEUED) == model->entries[0].queued);
    drop_frame(model, model->entries[0].frame);
    memmove(&model->entries[0], &model->entries[1], --model->count * sizeof model->entries[0]);
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

/* ---- main ------------------------------------------------------------------------------------------------------------------------ */

int main(int argc, char **argv)
{
    static const test_part parts[] = {
        {"frames", test_frames, 1}, {"outbox", test_outbox, 2},
    };
    return run_parts(parts, sizeof parts / sizeof *parts, argc, argv);
}
