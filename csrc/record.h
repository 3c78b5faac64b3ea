/* The record of one connection: what ConnectionMeta holds, as C sees it.
 *
 * A record is embedded in its Python object (wsf_record_object gives it back) and lives as long as that object. It is
 * born with a reference to the owner of its core and keeps it, so `shard` stays valid memory for any holder of the
 * object, attached or not. It is attached while `place` names its slot in the shard.
 *
 * Who guards what: the shard lock guards `place` (which others may read with wsf_record_attached and wsf_record_status,
 * as a hint that only the holder of a lock can rely on), the object fields, counters, times and quality; the index lock
 * guards `user`, `tags`, `device_type`, `groups` and the positions. What a sweep reads for every connection (deadline,
 * last activity, status) is in the shard's slots. The status is here too, in bits that slots do not need: a change of it
 * must know the former one, and shall not wait for the memory of the slot. Three cache lines on a GIL build, head of the
 * object and weak references included.
 */
#ifndef WSF_RECORD_H
#define WSF_RECORD_H

#include "platform.h"

#define WSF_NO_PLACE UINT32_C(0xFFFFFFFF)
/* Of a place: the slot, so many records has a shard at most; above it the status, which is never 7. */
#define WSF_SLOT_BITS 29
/* Statuses are numbers below this, and sets of them are bits. */
#define WSF_STATUSES 6
#define WSF_ANY_STATUS ((UINT32_C(1) << WSF_STATUSES) - 1)
/* First word of a wsf_set; never a place, so what the user table points to can be told apart (index.h). */
#define WSF_SET_MARK UINT32_C(0xFFFFFFFE)
#define WSF_NEVER INT64_MAX
#define WSF_MOST_ERRORS UINT32_C(0x7FFFFFFF)

struct wsf_shard;
struct wsf_core;
struct wsf_tagset;
struct wsf_memberships;

/* Fields that hold an object, all owned, NULL for None. The first ones may hold anything, so they are dropped when the
 * record is detached, as is `conn`; the last one holds a plain value that cannot be part of a cycle, and stays. */
enum { WSF_SESSION, WSF_DEVICE_INFO, WSF_EXTRAS, WSF_PERMISSIONS, WSF_OBJECT_FIELDS,
       WSF_DROPPED_FIELDS = WSF_PERMISSIONS };

typedef struct wsf_record {
    uint32_t place;      /* in the shard, with the status; or WSF_NO_PLACE: detached */
    uint32_t user_pos;   /* in the user's set */
    PyObject *client_id; /* owned, exact str, hash computed; NULL in a record that was never added */
    struct wsf_shard *shard;
    PyObject *user; /* owned, exact str or NULL; stays when detached */
    union {
        struct wsf_tagset *set; /* attached: borrowed from the index, which it is counted in; NULL: there is none */
        PyObject *mapping;      /* forgotten: owned dict or NULL */
    } tags;
    struct wsf_memberships *groups; /* owned; NULL: in none */
    union {
        PyObject *conn;             /* attached: owned or NULL */
        int64_t detached_active_ns; /* detached: last activity, now that no slot holds it */
    };
    PyObject *objects[WSF_OBJECT_FIELDS];
    PyObject *device_type; /* forgotten: owned, exact str or NULL. Before that the tag set has it */
    int64_t created_ns, heartbeat_ns;
    uint64_t messages_in, messages_out, bytes_in, bytes_out;
    uint32_t errors_in;                            /* errors stop at WSF_MOST_ERRORS */
    uint32_t errors_out : 31, has_heartbeat : 1;
    float latency, jitter, loss;
    uint32_t tag_pos; /* in the tag set */
#ifdef Py_GIL_DISABLED
    uint32_t indexed; /* not 0: the index knows, or is about to know, this record */
#endif
} wsf_record;

static inline int wsf_record_attached(const wsf_record *record)
{
    return WSF_OBSERVE32((uint32_t *)&record->place) != WSF_NO_PLACE;
}

/* -1: detached. */
static inline int wsf_record_status(const wsf_record *record)
{
    uint32_t place = WSF_OBSERVE32((uint32_t *)&record->place);
    return place == WSF_NO_PLACE ? -1 : (int)(place >> WSF_SLOT_BITS);
}

/* Most connections of some servers have no user, tag or group, and removing them need not wait for the index lock. The
 * index announces a record before it tests whether it is attached, and a removal detaches it before it asks whether it
 * was announced, so one of the two sees the other. Without locks there is nothing to save. */
#ifdef Py_GIL_DISABLED
static inline void wsf_record_announce(wsf_record *record) { WSF_PUBLISH32(&record->indexed, 1); }
static inline int wsf_record_announced(wsf_record *record) { return WSF_OBSERVE32(&record->indexed) != 0; }
#else
static inline void wsf_record_announce(wsf_record *record) { (void)record; }
static inline int wsf_record_announced(wsf_record *record) { return record->user || record->groups || record->tags.set; }
#endif

/* The Python object that a record is embedded in; borrowed. The offset is the size of an object's head. */
static inline PyObject *wsf_record_object(const wsf_record *record)
{
    return (PyObject *)((char *)record - sizeof(PyObject));
}

/* The record in an object of its type. */
static inline wsf_record *wsf_object_record(const PyObject *object)
{
    return (wsf_record *)((char *)(uintptr_t)object + sizeof(PyObject));
}

/* Ask for the memory that taking a reference to the record will write. record: may be NULL. */
static inline void wsf_record_prefetch(const wsf_record *record)
{
    WSF_PREFETCH((uintptr_t)record - sizeof(PyObject));
}

static inline uint32_t wsf_record_hash(const void *item)
{
    return wsf_fold_hash(wsf_text_hash(((const wsf_record *)item)->client_id));
}

static inline int wsf_record_equals(const void *item, const void *client_id)
{
    return wsf_text_equal(((const wsf_record *)item)->client_id, (PyObject *)client_id);
}

#endif
