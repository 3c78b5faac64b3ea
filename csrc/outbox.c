/* The queue of one connection; see outbox.h. */
#include "outbox.h"

/* ---- keys ----------------------------------------------------------------------------------------------------------- */

static void free_places(wsf_outbox *outbox, int64_t *account)
{
    if (outbox->places == NULL)
        return;
    (void)WSF_ADD64(account, -(int64_t)(outbox->place_capacity * sizeof *outbox->places));
    PyMem_RawFree(outbox->places);
    outbox->places = NULL;
    outbox->place_capacity = outbox->place_used = 0;
}

static inline PyObject *key_at(wsf_outbox *outbox, uint32_t place)
{
    wsf_entry entry = *wsf_outbox_at(outbox, place);
    return entry & WSF_AGAIN ? NULL : wsf_entry_frame(entry)->message->key;
}

/* Whether the table's entry is about a frame that still waits and has this key. */
static int is_place_of(wsf_outbox *outbox, const wsf_key_place *known, PyObject *key)
{
    uint32_t place = known->number - outbox->first_number;
    if (known->hash != wsf_text_hash(key) || place >= outbox->count)
        return 0;
    PyObject *found = key_at(outbox, place);
    return found != NULL && wsf_text_equal(found, key);
}

static inline int has_left(const wsf_outbox *outbox, const wsf_key_place *known)
{
    return known->number - outbox->first_number >= outbox->count;
}

/* The key's slot in the table, or one where it may be put: the first whose entry has left, so that a key that comes and
 * goes uses one slot again and again, or the free one at the end. */
static wsf_key_place *slot_of(wsf_outbox *outbox, PyObject *key)
{
    uint32_t mask = outbox->place_capacity - 1, at = wsf_fold_hash(wsf_text_hash(key)) & mask;
    wsf_key_place *left = NULL;
    for (; outbox->places[at].taken; at = (at + 1) & mask) {
        if (is_place_of(outbox, &outbox->places[at], key))
            return &outbox->places[at];
        if (left == NULL && has_left(outbox, &outbox->places[at]))
            left = &outbox->places[at];
    }
    return left != NULL ? left : &outbox->places[at];
}

static void note_place(wsf_outbox *outbox, PyObject *key, uint32_t number)
{
    wsf_key_place *slot = slot_of(outbox, key);
    outbox->place_used += !slot->taken;
    *slot = (wsf_key_place){wsf_text_hash(key), number, 1};
}

/* A table for what waits now, with room for as much again. Without memory there is none, and keys are looked for. */
static void build_places(wsf_outbox *outbox, int64_t *account)
{
    uint32_t capacity = 4 * WSF_KEYS_FROM;
    while (capacity < 4 * outbox->count)
        capacity *= 2;
    free_places(outbox, account);
    outbox->places = PyMem_RawMalloc(capacity * sizeof *outbox->places);
    if (outbox->places == NULL)
        return;
    memset(outbox->places, 0, capacity * sizeof *outbox->places);
    outbox->place_capacity = capacity;
    (void)WSF_ADD64(account, (int64_t)(capacity * sizeof *outbox->places));
    for (uint32_t place = 0; place < outbox->count; place++)
        if (key_at(outbox, place) != NULL)
            note_place(outbox, key_at(outbox, place), outbox->first_number + place);
}

int64_t wsf_outbox_find(wsf_outbox *outbox, int64_t *account, PyObject *key)
{
    if (outbox->count > WSF_KEYS_FROM && outbox->places == NULL)
        build_places(outbox, account);
    if (outbox->places != NULL) {
        const wsf_key_place *slot = slot_of(outbox, key);
        return slot->taken && !has_left(outbox, slot) ? (int64_t)(slot->number - outbox->first_number) : -1;
    }
    for (uint32_t place = outbox->count; place-- > 0;)
        if (key_at(outbox, place) != NULL && wsf_text_equal(key_at(outbox, place), key))
            return place;
    return -1;
}

/* ---- the ring --------------------------------------------------------------------------------------------------------- */

static int make_room(wsf_outbox *outbox, int64_t *account)
{
    uint32_t capacity = outbox->capacity == 0 ? 8 : 2 * outbox->capacity;
    wsf_entry *ring = PyMem_RawMalloc(capacity * sizeof *ring);
    if (ring == NULL)
        return WSF_NO_MEMORY;
    for (uint32_t place = 0; place < outbox->count; place++)
        ring[place] = *wsf_outbox_at(outbox, place);
    PyMem_RawFree(outbox->ring);
    (void)WSF_ADD64(account, (int64_t)((capacity - outbox->capacity) * sizeof *ring));
    outbox->ring = ring;
    outbox->head = 0;
    outbox->capacity = capacity;
    return WSF_OK;
}

int wsf_outbox_push(wsf_outbox *outbox, int64_t *account, wsf_frame *frame, wsf_entry bits)
{
    if (outbox->count != 0 && outbox->count >= outbox->capacity && make_room(outbox, account) != WSF_OK)
        return WSF_NO_MEMORY;
    outbox->count++;
    outbox->bytes += frame->size;
    *wsf_outbox_at(outbox, outbox->count - 1) = (wsf_entry)frame | bits;
    PyObject *key = outbox->places == NULL ? NULL : key_at(outbox, outbox->count - 1);
    if (key != NULL) {
        if (4 * (outbox->place_used + 1) > 3 * outbox->place_capacity)
            build_places(outbox, account);
        else
            note_place(outbox, key, outbox->first_number + outbox->count - 1);
    }
    return WSF_OK;
}

wsf_entry wsf_outbox_pop(wsf_outbox *outbox, int64_t *account)
{
    wsf_entry entry = *wsf_outbox_at(outbox, 0);
    outbox->bytes -= wsf_entry_frame(entry)->size;
    outbox->count--;
    outbox->first_number++;
    if (outbox->ring != NULL)
        outbox->head = (outbox->head + 1) & (outbox->capacity - 1);
    if (outbox->count == 0) {
        free_places(outbox, account);
        (void)WSF_ADD64(account, -(int64_t)(outbox->capacity * sizeof *outbox->ring));
        PyMem_RawFree(outbox->ring);
        outbox->ring = NULL;
        outbox->head = outbox->capacity = 0;
    }
    return entry;
}

wsf_entry wsf_outbox_take(wsf_outbox *outbox, int64_t *account, uint32_t place)
{
    wsf_entry taken = *wsf_outbox_at(outbox, place);
    for (; place > 0; place--) /* they are few, and nobody looks for them by key */
        *wsf_outbox_at(outbox, place) = *wsf_outbox_at(outbox, place - 1);
    *wsf_outbox_at(outbox, 0) = taken;
    return wsf_outbox_pop(outbox, account);
}

wsf_entry wsf_outbox_replace(wsf_outbox *outbox, uint32_t place, wsf_frame *frame, wsf_entry queued)
{
    wsf_entry *at = wsf_outbox_at(outbox, place), former = *at;
    *at = (wsf_entry)frame | queued;
    outbox->bytes += frame->size;
    outbox->bytes -= wsf_entry_frame(former)->size; /* the difference may not fit a size_t of 32 bits */
    return former;
}

/* ---- debug build ------------------------------------------------------------------------------------------------------ */

#ifdef WSF_DEBUG
/* A key that waits is found, at one of its places. */
static void check_places(wsf_outbox *outbox)
{
    uint32_t used = 0;
    for (uint32_t at = 0; at < outbox->place_capacity; at++)
        used += outbox->places[at].taken;
    WSF_ASSERT(used == outbox->place_used && 4 * used <= 3 * outbox->place_capacity);
    for (uint32_t place = 0; place < outbox->count; place++) {
        PyObject *key = key_at(outbox, place);
        WSF_ASSERT(key == NULL || is_place_of(outbox, slot_of(outbox, key), key));
    }
}

void wsf_outbox_check(wsf_outbox *outbox)
{
    uint64_t bytes = 0;
    WSF_ASSERT((outbox->ring == NULL) == (outbox->capacity == 0));
    WSF_ASSERT(outbox->count <= (outbox->ring == NULL ? 1 : outbox->capacity));
    WSF_ASSERT(outbox->count != 0 || (outbox->ring == NULL && outbox->places == NULL));
    WSF_ASSERT(outbox->ring == NULL || outbox->head < outbox->capacity);
    for (uint32_t place = 0; place < outbox->count; place++) {
        const wsf_frame *frame = wsf_entry_frame(*wsf_outbox_at(outbox, place));
        WSF_ASSERT(frame->references > 0 && frame->message->references > 0);
        bytes += frame->size;
    }
    WSF_ASSERT(bytes == outbox->bytes);
    if (outbox->places != NULL)
        check_places(outbox);
}
#else
void wsf_outbox_check(wsf_outbox *outbox) { (void)outbox; }
#endif
