/* What the other modules do to records, as _core hands it to them in a capsule: they are linked for themselves. The objects
 * are records of the native core. */
#ifndef WSF_RECORDS_H
#define WSF_RECORDS_H

#include "platform.h"

#define WSF_RECORDS_CAPSULE "wsfast._core._record_calls"

typedef struct {
    void (*sent)(PyObject *record, uint64_t messages, uint64_t bytes);
    void (*heartbeat)(PyObject *record, int64_t now_ns);
    void (*expect)(PyObject *record); /* memory that is about to be read */
    int64_t (*active_ns)(PyObject *record);
    int (*status)(PyObject *record); /* -1: detached */
    void (*set_status)(PyObject *record, int status);
    void (*set_deadline)(PyObject *record, int64_t deadline_ns);
    void (*set_quality)(PyObject *record, float latency, float jitter, float loss);
} wsf_records;

#endif
