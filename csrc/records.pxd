# What the modules of the core have of one another, as their bindings see it: see records.h.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t


cdef extern from "records.h":
    const char *WSF_RECORDS_CAPSULE
    ctypedef struct wsf_records:
        void (*sent)(PyObject *record, uint64_t messages, uint64_t bytes) noexcept
        void (*heartbeat)(PyObject *record, int64_t now_ns) noexcept
        void (*expect)(PyObject *record) noexcept
        int64_t (*active_ns)(PyObject *record) noexcept
        int (*status)(PyObject *record) noexcept
        void (*set_status)(PyObject *record, int status) noexcept
        void (*set_deadline)(PyObject *record, int64_t deadline_ns) noexcept
        void (*set_quality)(PyObject *record, float latency, float jitter, float loss) noexcept
