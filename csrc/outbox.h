/* What waits to be sent to one connection: a queue of frames, in the order in which they will leave.
 *
 * It is a ring of pointers that exists only while more than one frame waits; a single one has its place in the outbox
 * itself, so a broadcast to connections that keep up allocates nothing. Frames can be taken from the front, and one can
 * be replaced in its place by a newer one with the same key.
 *
 * An entry is a frame, of which the outbox owns a reference, and two bits: whether the message's tally has it as queued
 * (told that the peer is slow) or as pending; and whether no tally has it, because it is sent once more. The latter cannot be
 * replaced: its key does not count.
 *
 * Finding a key is O(1): up to WSF_KEYS_FROM entries are looked through, more have a table from key to place. Its
 * entries are hints that are checked, so taking frames from the front does not touch it.
 *
 * Threads: the event loop's only, but while frames are being sent other threads may read.
 */
#ifndef WSF_OUTBOX_H
#define WSF_OUTBOX_H

#include "frame.h"

#define WSF_KEYS_FROM 16

typedef uintptr_t wsf_entry;
#define WSF_QUEUED ((wsf_entry)1)
#define WSF_AGAIN ((wsf_entry)2)

static inline wsf_frame *wsf_entry_frame(wsf_entry entry) { return (wsf_frame *)(entry & ~(WSF_QUEUED | WSF_AGAIN)); }

typedef struct {
    uint64_t hash;
    uint32_t number; /* of the entry, counted from the outbox's first ever */
    uint32_t taken;
} wsf_key_place;

typedef struct {
    wsf_entry *ring; /* NULL: `only` is the entry, if there is one */
    wsf_entry only;
    uint64_t bytes; /* of all frames */
    uint32_t head, count, capacity;
    uint32_t first_number; /* of the entry at the front */
    wsf_key_place *places;
    uint32_t place_capacity, place_used;
} wsf_outbox;

/* The entry at this place, 0 being the front. */
static inline wsf_entry *wsf_outbox_at(wsf_outbox *outbox, uint32_t place)
{
    return outbox->ring == NULL ? &outbox->only : &outbox->ring[(outbox->head + place) & (outbox->capacity - 1)];
}

/* Append a frame. The reference to it is stolen; WSF_NO_MEMORY changes nothing. */
int wsf_outbox_push(wsf_outbox *outbox, int64_t *account, wsf_frame *frame, wsf_entry bits);
/* Take the front, and the reference with it. The outbox is not empty. */
wsf_entry wsf_outbox_pop(wsf_outbox *outbox, int64_t *account);
/* The same for an entry behind some that are sent once more. */
wsf_entry wsf_outbox_take(wsf_outbox *outbox, int64_t *account, uint32_t place);
/* The place of the entry with this key (exact str, hash computed), or -1. */
int64_t wsf_outbox_find(wsf_outbox *outbox, int64_t *account, PyObject *key);
/* Put a frame, the reference to which is stolen, in the place of another. Returns the former entry with its reference. */
wsf_entry wsf_outbox_replace(wsf_outbox *outbox, uint32_t place, wsf_frame *frame, wsf_entry queued);
/* Debug build: abort with a message if an invariant is broken. Otherwise it does nothing. */
void wsf_outbox_check(wsf_outbox *outbox);

#endif
