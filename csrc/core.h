/* The sharded registry without its Python face: shards, slots, cursor, deadlines, and the index beside them.
 *
 * Each shard has a lock, a table (id -> record) and slots: dense arrays of what a sweep reads for every connection, in
 * blocks of 64. A record keeps its slot from add to remove, so a cursor that walks the slots meets a record that stays
 * exactly once, whatever comes and goes around it. Freed slots are used again lowest first, and blocks that become
 * empty are given back. What each shard knows of statuses (how many records have one, and which blocks may hold it) lets
 * a walk pass over what it does not look for.
 *
 * The registry (the table and the slots together) owns one reference to each attached record. wsf_core_detach hands it
 * to the caller.
 *
 * Guaranteed: each function is atomic for the shard it works on. Not guaranteed: a view across shards.
 * A core lives as long as its registry or any record it ever made; they are counted by shard, so that threads do not
 * meet in one counter. It refers to no Python object but the attached
 * records, so the garbage collector sees all there is to see of a registry's cycles.
 */
#ifndef WSF_CORE_H
#define WSF_CORE_H

#include "platform.h" /* first: it brings Python.h, which decides what system headers declare */

#include "fnv.h"
#include "index.h"
#include "record.h"
#include "table.h"

#define WSF_BLOCK_SLOTS 64
#define WSF_MAX_SHARDS 65536
/* A route is remembered for about this many ids: 64 KiB, a share of the second-level cache of current machines. */
#define WSF_ROUTES 8192

typedef struct {
    wsf_record *records[WSF_BLOCK_SLOTS];
    int64_t deadline_ns[WSF_BLOCK_SLOTS];
    int64_t active_ns[WSF_BLOCK_SLOTS];
    uint8_t status[WSF_BLOCK_SLOTS];
} wsf_block;

typedef struct {
    uint64_t adds, removes, messages_in, messages_out, bytes_in, bytes_out, errors_in, errors_out;
} wsf_counters;

typedef struct wsf_shard {
    /* The first cache line is what a lookup needs; no other shard shares it. */
    _Alignas(64) wsf_lock lock;
    uint32_t number; /* of this shard in its core */
    wsf_table table;
    /* One entry for each block. A block that is NULL has no records. */
    wsf_block **blocks;
    uint64_t *occupied;   /* bit i: slot i is taken */
    int64_t *earliest_ns; /* at or before every deadline in the block; made exact when a sweep reads the block */
    /* One bit for each block. */
    uint64_t *has_room;
    uint64_t (*may_have)[WSF_STATUSES]; /* a record with this status; made exact when a walk for one reads the block */
    uint32_t block_count, block_capacity;
    uint32_t by_status[WSF_STATUSES]; /* how many records have it */
    wsf_counters counters;
    int64_t account;    /* bytes */
    int64_t references; /* of the records that were made here, plus one of the registry */
    struct wsf_core *core;
} wsf_shard;

typedef struct wsf_core {
    int64_t references; /* of shards that are referred to */
    void *memory;       /* what was allocated for the core */
    uint32_t shard_count;
    int has_native_clock; /* the clock is wsf_monotonic_ns */
    PyObject *settings;   /* borrowed from the registry; NULL once that is gone. Guarded by the index lock */
    int64_t last_ns;      /* what the registry's clocks said at its end: monotonic nanoseconds, */
    double last_wall;     /* and seconds since the epoch */
    wsf_index index;
    uint64_t routes[WSF_ROUTES]; /* id hash with the low 16 bits replaced by its shard; see wsf_core_find */
    wsf_shard shards[];
} wsf_core;

/* ---- life ---------------------------------------------------------------------------------------------------- */

/* shard_count: power of two up to WSF_MAX_SHARDS. settings: borrowed until wsf_core_orphan. NULL: no memory. */
wsf_core *wsf_core_new(uint32_t shard_count, PyObject *settings, int has_native_clock);
/* The registry gives up its reference. */
void wsf_core_release(wsf_core *core);
int wsf_core_is_shared(wsf_core *core); /* whether there are records, attached or not */
/* A record refers to its shard for life. */
static inline void wsf_shard_retain(wsf_shard *shard) { (void)WSF_ADD64(&shard->references, 1); }
void wsf_shard_release(wsf_shard *shard);
/* The registry goes away. */
void wsf_core_orphan(wsf_core *core);
/* New reference, or NULL once the registry is gone. */
PyObject *wsf_core_settings(wsf_core *core);

/* ---- routes and lookups --------------------------------------------------------------------------------------- */

/* FNV-1a 32 of the text in UTF-8, and its length there. -1 for a text that has no UTF-8 form. text: exact str. */
int wsf_text_fnv1a(PyObject *text, uint32_t *fnv1a, int64_t *utf8_bytes);
/* All lookups: client_id is borrowed, exact str, its hash computed. */
/* New reference, or NULL where absent (also for a text that has no UTF-8 form). */
PyObject *wsf_core_get(wsf_core *core, PyObject *client_id);
/* How many lookups wsf_core_get_many overlaps. */
#ifdef Py_GIL_DISABLED
#define WSF_CHUNK 1024 /* more ids for each lock that is taken */
#else
#define WSF_CHUNK 256
#endif
/* Compute the hashes of ids that are exact str; returns the position of the first object that is not, or count. */
size_t wsf_ids_prepare(PyObject *const *ids, size_t count);
/* out[i]: new reference or NULL. ids[i]: prepared, borrowed for the call. */
void wsf_core_get_many(wsf_core *core, PyObject *const *ids, PyObject **out, size_t count);
int wsf_core_contains(wsf_core *core, PyObject *client_id);

/* Ask for the shard's lock and counters, which another thread may have written last. Worth it where some work comes
 * before the lock is taken; without locks there is nothing to wait for. */
static inline void wsf_shard_expect(wsf_shard *shard)
{
#ifdef Py_GIL_DISABLED
    WSF_PREFETCH_WRITE(shard);
    WSF_PREFETCH_WRITE(&shard->counters);
#else
    (void)shard;
#endif
}

/* ---- changes --------------------------------------------------------------------------------------------------- */

enum { WSF_DUPLICATE = -2 };
/* Attach a record that has client_id, shard and created_ns. *object of record*: a reference is taken. When `replace` is
 * set and the id is taken, the old record is detached first, in the same critical section, and *replaced gets the
 * reference that the registry had; the caller goes on with wsf_core_forget. */
int wsf_core_attach(wsf_record *record, uint8_t status, int replace, wsf_record **replaced, wsf_trash *trash);
/* Detach the record of this id, or `record` itself if it is still attached; NULL if there is none. The reference that
 * the registry had goes to the caller, who goes on with wsf_core_forget. What may not outlive it goes to `trash`. */
wsf_record *wsf_core_detach_id(wsf_core *core, PyObject *client_id, wsf_trash *trash);
wsf_record *wsf_core_detach_record(wsf_record *record, wsf_trash *trash);
/* Second half of a removal: take a detached record out of the index. */
void wsf_core_forget(wsf_record *record, wsf_trash *trash);

/* ---- slots, counters and fields of one record -------------------------------------------------------------------- */

int wsf_record_set_deadline(wsf_record *record, int64_t deadline_ns); /* 0: detached */
int64_t wsf_record_deadline(wsf_record *record);                     /* WSF_NEVER once detached */
int wsf_record_set_status(wsf_record *record, uint8_t status);       /* 0: detached. status: below WSF_STATUSES */
int64_t wsf_record_active(wsf_record *record);
/* Ask for the memory that a sweep will read of it. */
void wsf_record_expect(wsf_record *record);
void wsf_record_touch(wsf_record *record, int64_t now_ns, int is_heartbeat);
void wsf_record_received(wsf_record *record, int64_t now_ns, uint64_t messages, uint64_t bytes);
void wsf_record_sent(wsf_record *record, uint64_t messages, uint64_t bytes);
void wsf_record_failed(wsf_record *record, int is_inbound);
int wsf_record_set_quality(wsf_record *record, float latency, float jitter, float loss); /* 0: detached */
/* A consistent copy of the plain numbers of a record. The pointers in it are not for use. */
void wsf_record_snapshot(wsf_record *record, wsf_record *copy);
/* Swap an object field for `value` (stolen on success, may be NULL); *old gets the former one. 0: detached. */
int wsf_record_swap(wsf_record *record, PyObject **field, PyObject *value, PyObject **old);
/* The same if the field still is `expected`; *old gets it. 0: detached; -1: it is another one by now. */
int wsf_record_replace(wsf_record *record, PyObject **field, PyObject *expected, PyObject *value, PyObject **old);
/* New reference to an object field, or NULL. field is guarded by the record's shard. */
PyObject *wsf_record_read(wsf_record *record, PyObject **field);
PyObject *wsf_record_read_conn(wsf_record *record);

/* ---- walks ------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t shard, slot; /* where to go on */
} wsf_cursor;

/* Up to `room` new references to attached records with one of these statuses; 0 at the end. A record whose status
 * changes meanwhile may be met or not. Costs O(1) for each record met and each change of a status since the last walk,
 * and O(slots / 4096) for each shard; for WSF_ANY_STATUS, O(slots / 64). */
size_t wsf_core_collect(wsf_core *core, wsf_cursor *cursor, uint32_t statuses, PyObject **out, size_t room);
/* All attached records with one of these statuses for which all terms hold: new references in malloc'd memory, as of
 * wsf_index_select, or WSF_NO_MEMORY. Walks the smallest of the sets that the terms name, or the slots if fewer records
 * have the statuses. Hold no lock. */
int64_t wsf_core_select(wsf_core *core, const wsf_term *terms, uint32_t count, uint32_t statuses, PyObject ***out);

typedef struct {
    int64_t deadline_ns;
    PyObject *object;
} wsf_due_entry;
/* The up to `room` earliest records of one shard whose deadline is at or before now_ns, in order; new references. */
size_t wsf_shard_due(wsf_shard *shard, int64_t now_ns, wsf_due_entry *out, size_t room);

/* ---- figures ----------------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t connections, longest_probe;
    wsf_counters counters;
} wsf_shard_figures;

void wsf_shard_measure(wsf_shard *shard, wsf_shard_figures *figures);
/* Connections attached; shards are read one after the other. */
uint64_t wsf_core_size(wsf_core *core);
/* What the core holds, besides records. */
int64_t wsf_core_bytes(wsf_core *core);
/* Debug build: abort with a message if any invariant of the shards or the index is broken, while no other thread is at
 * work. Otherwise it does nothing. */
void wsf_core_check(wsf_core *core);
/* Debug build: WSF_LIVE_KINDS counters. Otherwise NULL. */
int64_t *wsf_live_counters(void);

#endif
