/* What the other modules do to records, as _core hands it to them in a capsule: they are linked for themselves. The
 * objects are records of the native core. */
#ifndef WSF_RECORDS_H
#define WSF_RECORDS_H

#include "platform.h"

#define WSF_RECORDS_CAPSULE "wsfast._core._record_calls"

/* The metadata of a record at one moment. mapping: borrowed from the token that came with it, and never changed; NULL:
 * none. */
typedef struct {
    PyObject *mapping;
    int64_t version, nbytes; /* nbytes -1: not counted */
} wsf_metadata;

typedef struct {
    void (*sent)(PyObject *record, uint64_t messages, uint64_t bytes);
    void (*heartbeat)(PyObject *record, int64_t now_ns);
    void (*expect)(PyObject *record); /* memory that is about to be read */
    int64_t (*active_ns)(PyObject *record);
    int (*status)(PyObject *record); /* -1: detached */
    void (*set_status)(PyObject *record, int status);
    void (*set_deadline)(PyObject *record, int64_t deadline_ns);
    void (*set_quality)(PyObject *record, float latency, float jitter, float loss);
    /* New reference; NULL: absent. client_id: exact str, hashed. */
    PyObject *(*find)(PyObject *registry, PyObject *client_id);
    int (*is_home)(PyObject *registry, PyObject *record); /* -1: the record is detached */
    /* What a record has of metadata and extensions is one object that is never changed, a token: a change puts another
     * one in its place. A new reference; NULL: there is nothing. */
    PyObject *(*read_extras)(PyObject *record, wsf_metadata *metadata);
    /* A token with this metadata, a dict that is not changed any more, for records that have `token` now: one version
     * later. New reference, or NULL and an exception. */
    PyObject *(*next_extras)(PyObject *token, PyObject *mapping, int64_t nbytes);
    /* 1: replaced, *old is the caller's to release; 0: detached; -1: the record has another token than `expected`. */
    int (*replace_extras)(PyObject *record, PyObject *expected, PyObject *token, PyObject **old);
} wsf_records;

#endif
