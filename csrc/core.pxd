# The C structures as the binding sees them: declarations only. What each promises stands in the headers.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "platform.h":
    enum:
        WSF_OK
        WSF_NO_MEMORY
        WSF_LIVE_RECORD
    ctypedef struct wsf_trash:
        pass
    void wsf_trash_init(wsf_trash *trash) noexcept
    void wsf_trash_release(wsf_trash *trash) noexcept
    int64_t wsf_monotonic_ns() noexcept
    void wsf_count_live "WSF_COUNT_LIVE"(int kind, int n) noexcept


cdef extern from "fnv.h":
    uint32_t wsf_fnv1_32(const uint8_t *data, size_t size) noexcept
    uint32_t wsf_fnv1a_32(const uint8_t *data, size_t size) noexcept
    uint32_t wsf_route(uint32_t fnv1a, uint32_t mask) noexcept


cdef extern from "record.h":
    enum:
        WSF_NO_PLACE
        WSF_STATUSES
        WSF_SESSION
        WSF_DEVICE_INFO
        WSF_EXTRAS
        WSF_PERMISSIONS
        WSF_OBJECT_FIELDS
    const int64_t WSF_NEVER
    const uint32_t WSF_ANY_STATUS
    ctypedef struct wsf_tags:
        PyObject *mapping
    ctypedef struct wsf_record:
        uint32_t place
        PyObject *client_id
        wsf_shard *shard
        PyObject *user
        wsf_tags tags
        PyObject *conn
        PyObject *objects[4]
        int64_t created_ns
        int64_t heartbeat_ns
        uint64_t messages_in
        uint64_t messages_out
        uint64_t bytes_in
        uint64_t bytes_out
        uint32_t errors_in
        uint32_t errors_out
        uint32_t has_heartbeat
        float latency
        float jitter
        float loss
        uint32_t tag_pos
    bint wsf_record_attached(const wsf_record *record) noexcept
    int wsf_record_status(const wsf_record *record) noexcept
    PyObject *wsf_record_object(const wsf_record *record) noexcept


cdef extern from "table.h":
    ctypedef struct wsf_table:
        uint32_t used


cdef extern from "index.h":
    enum:
        WSF_DETACHED
        WSF_TOO_MANY
        WSF_NEEDS_MAPPING
        WSF_IN_GROUP
        WSF_OF_USER
        WSF_HAS_TAG
        WSF_HAS_TAG_KEY
        WSF_OF_DEVICE_TYPE
    ctypedef struct wsf_index:
        wsf_table users
        wsf_table tags
    ctypedef struct wsf_tag_names:
        PyObject **keys
        PyObject **values
        uint32_t count
        PyObject *mapping
    ctypedef struct wsf_term:
        int kind
        bint negated
        PyObject *name
        PyObject *value
    int wsf_index_join(wsf_index *index, wsf_record *record, PyObject *group, uint32_t max_groups) noexcept
    int wsf_index_leave(wsf_index *index, wsf_record *record, PyObject *group, wsf_trash *trash) noexcept
    int wsf_index_set_user(wsf_index *index, wsf_record *record, PyObject *user, wsf_trash *trash) noexcept
    int wsf_index_set_tags(wsf_index *index, wsf_record *record, const wsf_tag_names *tags, wsf_trash *trash) noexcept
    int wsf_index_set_device_type(wsf_index *index, wsf_record *record, PyObject *device_type,
                                  wsf_trash *trash) noexcept
    int wsf_index_set_tags_and_device_type(wsf_index *index, wsf_record *record, const wsf_tag_names *tags,
                                           PyObject *device_type, wsf_trash *trash) noexcept
    PyObject *wsf_index_user_of(wsf_index *index, wsf_record *record) noexcept
    PyObject *wsf_index_tags_of(wsf_index *index, wsf_record *record) noexcept
    PyObject *wsf_index_device_type_of(wsf_index *index, wsf_record *record) noexcept
    int64_t wsf_index_select(wsf_index *index, const wsf_term *terms, uint32_t count, uint64_t most,
                             PyObject ***out) noexcept
    int64_t wsf_index_keep(wsf_index *index, const wsf_term *terms, uint32_t count, PyObject **objects,
                           size_t n) noexcept
    int64_t wsf_index_groups_of(wsf_index *index, wsf_record *record, PyObject ***names) noexcept
    int64_t wsf_index_groups(wsf_index *index, PyObject ***names, uint32_t **sizes) noexcept
    void wsf_index_release_tags(wsf_record *record) noexcept
    void wsf_index_sizes(wsf_index *index, uint32_t *groups, uint32_t *users, uint32_t *tags) noexcept


cdef extern from "core.h":
    enum:
        WSF_DUPLICATE
        WSF_MAX_SHARDS
        WSF_CHUNK
    ctypedef struct wsf_counters:
        uint64_t adds
        uint64_t removes
        uint64_t messages_in
        uint64_t messages_out
        uint64_t bytes_in
        uint64_t bytes_out
        uint64_t errors_in
        uint64_t errors_out
    ctypedef struct wsf_shard:
        uint32_t number
        wsf_counters counters
        wsf_core *core
    ctypedef struct wsf_core:
        uint32_t shard_count
        bint has_native_clock
        int64_t last_ns
        double last_wall
        wsf_index index
        wsf_shard *shards
    ctypedef struct wsf_cursor:
        uint32_t shard
        uint32_t slot
    ctypedef struct wsf_due_entry:
        int64_t deadline_ns
        PyObject *object
    ctypedef struct wsf_shard_figures:
        uint32_t connections
        uint32_t longest_probe
        wsf_counters counters

    wsf_core *wsf_core_new(uint32_t shard_count, PyObject *settings, bint has_native_clock) noexcept
    void wsf_shard_expect(wsf_shard *shard) noexcept
    void wsf_shard_retain(wsf_shard *shard) noexcept
    void wsf_shard_release(wsf_shard *shard) noexcept
    void wsf_core_release(wsf_core *core) noexcept
    bint wsf_core_is_shared(wsf_core *core) noexcept
    void wsf_core_orphan(wsf_core *core) noexcept
    PyObject *wsf_core_settings(wsf_core *core) noexcept
    int wsf_text_fnv1a(PyObject *text, uint32_t *fnv1a, int64_t *utf8_bytes) noexcept
    PyObject *wsf_core_get(wsf_core *core, PyObject *client_id) noexcept
    size_t wsf_ids_prepare(PyObject **ids, size_t count) noexcept
    void wsf_core_get_many(wsf_core *core, PyObject **ids, PyObject **out, size_t count) noexcept
    bint wsf_core_contains(wsf_core *core, PyObject *client_id) noexcept
    int wsf_core_attach(wsf_record *record, uint8_t status, bint replace, wsf_record **replaced,
                        wsf_trash *trash) noexcept
    wsf_record *wsf_core_detach_id(wsf_core *core, PyObject *client_id, wsf_trash *trash) noexcept
    wsf_record *wsf_core_detach_record(wsf_record *record, wsf_trash *trash) noexcept
    void wsf_core_forget(wsf_record *record, wsf_trash *trash) noexcept
    bint wsf_record_set_deadline(wsf_record *record, int64_t deadline_ns) noexcept
    int64_t wsf_record_deadline(wsf_record *record) noexcept
    bint wsf_record_set_status(wsf_record *record, uint8_t status) noexcept
    int64_t wsf_record_active(wsf_record *record) noexcept
    void wsf_record_expect(wsf_record *record) noexcept
    void wsf_record_touch(wsf_record *record, int64_t now_ns, bint is_heartbeat) noexcept
    void wsf_record_received(wsf_record *record, int64_t now_ns, uint64_t messages, uint64_t bytes) noexcept
    void wsf_record_sent(wsf_record *record, uint64_t messages, uint64_t bytes) noexcept
    void wsf_record_failed(wsf_record *record, bint is_inbound) noexcept
    bint wsf_record_set_quality(wsf_record *record, float latency, float jitter, float loss) noexcept
    void wsf_record_snapshot(wsf_record *record, wsf_record *copy) noexcept
    bint wsf_record_swap(wsf_record *record, PyObject **field, PyObject *value, PyObject **old) noexcept
    int wsf_record_replace(wsf_record *record, PyObject **field, PyObject *expected, PyObject *value,
                           PyObject **old) noexcept
    PyObject *wsf_record_read(wsf_record *record, PyObject **field) noexcept
    PyObject *wsf_record_read_conn(wsf_record *record) noexcept
    size_t wsf_core_collect(wsf_core *core, wsf_cursor *cursor, uint32_t statuses, PyObject **out, size_t room) noexcept
    int64_t wsf_core_select(wsf_core *core, const wsf_term *terms, uint32_t count, uint32_t statuses,
                            PyObject ***out) noexcept
    size_t wsf_shard_due(wsf_shard *shard, int64_t now_ns, wsf_due_entry *out, size_t room) noexcept
    uint64_t wsf_core_size(wsf_core *core) noexcept
    int64_t wsf_core_bytes(wsf_core *core) noexcept
    void wsf_shard_measure(wsf_shard *shard, wsf_shard_figures *figures) noexcept
    void wsf_core_check(wsf_core *core) noexcept
    int64_t *wsf_live_counters() noexcept
