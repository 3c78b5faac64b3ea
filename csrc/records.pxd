# What the modules of the core have of one another, as their bindings see it: see records.h.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t


cdef extern from "records.h":
    const char *WSF_RECORDS_CAPSULE
    ctypedef struct wsf_metadata:
        PyObject *mapping
        int64_t version
        int64_t nbytes
    ctypedef struct wsf_records:
        void (*sent)(PyObject *record, uint64_t messages, uint64_t bytes) noexcept
        void (*heartbeat)(PyObject *record, int64_t now_ns) noexcept
        void (*expect)(PyObject *record) noexcept
        int64_t (*active_ns)(PyObject *record) noexcept
        int (*status)(PyObject *record) noexcept
        void (*set_status)(PyObject *record, int status) noexcept
        void (*set_deadline)(PyObject *record, int64_t deadline_ns) noexcept
        void (*set_quality)(PyObject *record, float latency, float jitter, float loss) noexcept
        PyObject *(*find)(PyObject *registry, PyObject *client_id) noexcept
        int (*is_home)(PyObject *registry, PyObject *record) noexcept
        PyObject *(*read_extras)(PyObject *record, wsf_metadata *metadata) noexcept
        object (*next_extras)(PyObject *token, object mapping, int64_t nbytes)
        int (*replace_extras)(PyObject *record, PyObject *expected, PyObject *token, PyObject **old) noexcept
