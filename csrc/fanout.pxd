# The C structures as the binding of the fan-out sees them: declarations only. What each promises stands in the headers.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t


cdef extern from "platform.h":
    enum:
        WSF_OK
        WSF_LIVE_MESSAGE
        WSF_LIVE_FRAME
        WSF_LIVE_LINK
        WSF_LIVE_LOG
        WSF_LIVE_KINDS
    int64_t wsf_monotonic_ns() noexcept nogil


cdef extern from "frame.h":
    enum:
        WSF_TEXT
        WSF_BINARY
        WSF_PING
        WSF_RSV1
    ctypedef struct wsf_tally:
        uint32_t targets
        uint32_t pending
        uint32_t sent
        uint32_t queued
        uint32_t dropped
        uint32_t failed
        uint32_t displaced
        uint32_t disconnected
        uint32_t away
    ctypedef struct wsf_message:
        int64_t created_ns
        uint64_t payload_size
        wsf_tally tally
        PyObject *waiter
    ctypedef struct wsf_frame:
        PyObject *bytes
        size_t size
        uint32_t header_size
        uint8_t *data
    wsf_message *wsf_message_new(int64_t *account, int64_t created_ns, PyObject *key, uint64_t payload_size) noexcept
    void wsf_message_release(wsf_message *message) noexcept
    wsf_frame *wsf_frame_new(wsf_message *message, uint8_t first_bits, const void *payload, size_t size) noexcept
    void wsf_frame_release(wsf_frame *frame) noexcept
    void wsf_frame_keep(wsf_frame *frame, PyObject *bytes) noexcept


cdef extern from "outbox.h":
    ctypedef uintptr_t wsf_entry
    ctypedef struct wsf_outbox:
        uint32_t count
        uint64_t bytes
    wsf_entry *wsf_outbox_at(wsf_outbox *outbox, uint32_t place) noexcept
    wsf_frame *wsf_entry_frame(wsf_entry entry) noexcept


cdef extern from "table.h":
    ctypedef struct wsf_table:
        uint32_t used


cdef extern from "backlog.h":
    ctypedef struct wsf_backlog_limits:
        uint64_t max_messages
        uint64_t max_bytes
        int64_t max_age_ns
    ctypedef struct wsf_backlog:
        wsf_backlog_limits limits
        uint32_t count
        uint64_t bytes
    ctypedef struct wsf_cursor:
        uint64_t recorded
        uint64_t handed
    void wsf_backlog_note_object(wsf_backlog *backlog, const wsf_frame *frame) noexcept
    void wsf_backlog_expire(wsf_backlog *backlog, int64_t now_ns) noexcept


cdef extern from "pool.h":
    enum:
        WSF_MAX_HELPERS
    ctypedef struct wsf_pool:
        pass
    wsf_pool *wsf_pool_new(unsigned helpers) noexcept
    unsigned wsf_pool_helpers(const wsf_pool *pool) noexcept
    void wsf_pool_free(wsf_pool *pool) noexcept nogil


cdef extern from "fanout.h":
    enum:
        WSF_HAS_SOCKETS
        WSF_MAX_VARIANTS
        WSF_OPEN
        WSF_DIRECT
        WSF_UNSURE
        WSF_BLOCKED
        WSF_FRAGMENT
        WSF_AWAY
        WSF_BEHIND
        WSF_WAITS
        WSF_PARALLEL_FROM
        WSF_KEEP
        WSF_DROP_NEWEST
        WSF_DROP_OLDEST
        WSF_CONFLATE
        WSF_DISCONNECT
        WSF_POLICIES
        WSF_BY_BYTES
        WSF_BY_AGE
        WSF_BY_BUDGET
        WSF_BY_END
        WSF_CAUSES
        WSF_DROPPED
        WSF_CONFLATED
        WSF_TOO_SLOW
        WSF_DONE
        WSF_THROUGH
        WSF_REST
        WSF_FAILED
    ctypedef struct wsf_link:
        PyObject *record
        PyObject *handle
        uint32_t facts
        int fd
        wsf_outbox outbox
        uint64_t in_transport
        int keeps_views
        uint64_t lost_bytes
        uint64_t peak_bytes
        wsf_frame *control
        int64_t control_left_ns
        unsigned char is_held
        uint32_t variant
        uint64_t left_out_of
        wsf_cursor *cursor
    ctypedef struct wsf_report:
        wsf_link *link
        uint8_t what
        uint8_t cause
        uint32_t messages
        uint64_t bytes
        double age_s
    ctypedef struct wsf_limits:
        uint32_t policy
        uint64_t max_bytes
        uint64_t low_bytes
        int64_t max_age_ns
        uint64_t max_total_bytes
    ctypedef struct wsf_totals:
        uint64_t messages
        uint64_t bytes
        uint64_t writes
        uint64_t through
        uint64_t blocked
        uint64_t failed
        uint64_t controls
        uint64_t dropped[4]
        uint64_t conflated
        uint64_t too_slow[4]
    ctypedef struct wsf_line:
        uint32_t count
    ctypedef struct wsf_fanout:
        int64_t account
        wsf_limits limits
        wsf_totals totals
        wsf_line line
        wsf_line later
        wsf_link **waiting
        uint32_t waiting_count
        wsf_table links
        wsf_link **all
        uint64_t pushes
        int wants_reports
        wsf_report *reports
        uint32_t report_count
        uint32_t report_capacity
        wsf_backlog backlog
        uint32_t sessions
        wsf_message *decided
        wsf_link *roomy
        wsf_link *holding
        int64_t now_ns
        uint32_t job_count
    ctypedef struct wsf_remainder:
        wsf_link *link
        wsf_frame *frame
        size_t offset
        int is_shared
        int error
    ctypedef void (*wsf_count)(wsf_link *link, uint64_t messages, uint64_t bytes) noexcept
    void wsf_link_watch(wsf_fanout *fanout, wsf_link *link, uint64_t bytes) noexcept
    wsf_link *wsf_fanout_take_roomy(wsf_fanout *fanout) noexcept
    wsf_message *wsf_fanout_take_decided(wsf_fanout *fanout) noexcept
    wsf_link *wsf_fanout_take_holding(wsf_fanout *fanout) noexcept
    void wsf_fanout_push_control(wsf_fanout *fanout, wsf_link **links, uint32_t count, wsf_frame *frame) noexcept
    void wsf_link_take_control(wsf_fanout *fanout, wsf_link *link) noexcept
    bint wsf_link_is_doubtful(const wsf_fanout *fanout, const wsf_link *link, uint64_t size, int64_t now_ns) noexcept
    uint64_t wsf_link_bytes(const wsf_link *link) noexcept
    wsf_fanout *wsf_fanout_new(const wsf_limits *limits) noexcept
    void wsf_fanout_free(wsf_fanout *fanout) noexcept
    int wsf_fanout_admit(wsf_fanout *fanout, wsf_link *link) noexcept
    wsf_link *wsf_fanout_find(const wsf_fanout *fanout, const PyObject *record) noexcept
    void wsf_fanout_forget(wsf_fanout *fanout, wsf_link *link) noexcept
    void wsf_link_set(wsf_fanout *fanout, wsf_link *link, uint32_t facts) noexcept
    void wsf_link_clear(wsf_fanout *fanout, wsf_link *link, uint32_t facts) noexcept
    void wsf_link_block(wsf_fanout *fanout, wsf_link *link, uint64_t in_transport) noexcept
    void wsf_link_close(wsf_fanout *fanout, wsf_link *link, int cause) noexcept
    void wsf_fanout_push(wsf_fanout *fanout, wsf_link **links, uint32_t count, wsf_frame **frames,
                         int is_late, uint64_t log) noexcept
    int wsf_link_begin_session(wsf_fanout *fanout, wsf_link *link) noexcept
    int wsf_link_rewind(wsf_fanout *fanout, wsf_link *link, uint64_t received) noexcept
    void wsf_link_take_session(wsf_fanout *fanout, wsf_link *link, wsf_link *other) noexcept
    void wsf_link_end_session(wsf_fanout *fanout, wsf_link *link) noexcept
    int wsf_link_greet(wsf_fanout *fanout, wsf_link *link, wsf_frame *frame) noexcept
    void wsf_fanout_end_window(wsf_fanout *fanout) noexcept
    uint32_t wsf_fanout_plan(wsf_fanout *fanout) noexcept
    void wsf_fanout_send(wsf_fanout *fanout, wsf_pool *pool, int64_t deadline_ns) noexcept nogil
    int wsf_fanout_settle(wsf_fanout *fanout, wsf_count count, wsf_remainder *remainder) noexcept
    void wsf_link_commit(wsf_fanout *fanout, wsf_link *link, uint32_t frames, uint64_t in_transport,
                         wsf_count count) noexcept
    void wsf_link_commit_messages(wsf_fanout *fanout, wsf_link *link, uint32_t frames, uint64_t in_transport,
                                  wsf_count count) noexcept
    void wsf_link_fail(wsf_fanout *fanout, wsf_link *link, uint32_t frames) noexcept
    void wsf_fanout_expire(wsf_fanout *fanout) noexcept
    void wsf_fanout_shed(wsf_fanout *fanout) noexcept
    bint wsf_fanout_is_over(wsf_fanout *fanout) noexcept
    void wsf_fanout_check(wsf_fanout *fanout) noexcept
