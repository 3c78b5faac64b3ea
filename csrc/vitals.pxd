# The C structures as the binding of health sees them: declarations only. What each promises stands in the headers.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "table.h":
    ctypedef struct wsf_table:
        uint64_t *entries
        uint32_t capacity
        uint32_t used
    void *wsf_entry_item(uint64_t entry) noexcept
    ctypedef uint32_t (*wsf_hash_of)(const void *item) noexcept
    int wsf_table_insert(wsf_table *table, int64_t *account, uint32_t hash, void *item, wsf_hash_of hash_of) noexcept
    void wsf_table_remove(wsf_table *table, int64_t *account, uint32_t hash, const void *item,
                          wsf_hash_of hash_of) noexcept
    void wsf_table_free(wsf_table *table, int64_t *account) noexcept


cdef extern from "tcpinfo.h":
    enum:
        WSF_HAS_TCP_INFO
    ctypedef struct wsf_tcp_facts:
        uint32_t known
        uint32_t unacked
        uint32_t retransmits
        uint32_t rtt_us
        uint32_t last_sent_ms
        uint32_t last_ack_ms
        uint64_t bytes_acked
        uint64_t bytes_sent
        uint64_t bytes_retrans
        uint32_t notsent
    void wsf_tcp_facts_read(int fd, wsf_tcp_facts *facts) noexcept nogil
    bint wsf_tcp_limit_rto(int fd, uint32_t most_ms) noexcept
    bint wsf_tcp_can_limit_rto() noexcept
    uint32_t wsf_socket_unread(int fd) noexcept


cdef extern from "vitals.h":
    enum:
        WSF_CLASSES
        WSF_MEASURES
        WSF_GRADES
        WSF_SUSPECTED
        WSF_ENDED
        WSF_DO_PING
        WSF_IS_SUSPECT
        WSF_IS_CLEARED
        WSF_IS_DEAD
        WSF_PING_FAILED
        WSF_NEW_GRADE
        WSF_WAS_LATE
        WSF_UNASKED
        WSF_BY_SILENCE
        WSF_BY_NO_PONG
        WSF_TRACE_KINDS
    ctypedef struct wsf_health_settings:
        int64_t silence_ns
        int64_t timeout_ns
        int64_t answer_ns
        int64_t write_ns
        int64_t interval_ns
        int64_t interval_poor_ns
        int64_t interval_min_ns
        int64_t interval_learn_ns
        int64_t learn_ns
        int64_t by_acks_ns
        int64_t late_ns
        int64_t probe_ns
        int64_t prior_wait_ns
        int64_t peak_half_ns
        int64_t tick_ns
        int64_t slack_ns
        uint32_t probes
        uint32_t bad_factor
        uint32_t poor_latency_us
        uint32_t poor_loss
        uint32_t bad_loss
        uint32_t limits[3][4]
        uint32_t calm
        uint32_t trace
        double risk_per_1000h
        double pings_per_h
    ctypedef struct wsf_trace_entry:
        int64_t at_ns
        uint32_t value
        uint16_t what
        uint16_t number
    ctypedef struct wsf_vitals:
        PyObject *record
        int fd
        uint8_t state
        uint8_t grade
        uint8_t former_grade
        uint8_t link_class
        uint8_t teaches
        uint8_t trusts_kernel
        uint8_t is_stuck
        uint8_t ping_count
        uint8_t cause
        uint32_t unread
        uint32_t srtt_us
        uint32_t rttvar_us
        uint32_t min_rtt_us
        uint32_t jitter_us
        uint32_t retransmitted
        int64_t born_h
        int64_t byte_h
        int64_t ack_h
        int64_t ping_h
        int64_t interval_ns
        uint32_t kernel_rtt_us
        uint32_t unacked
        uint64_t ping_total
        uint64_t late_total
        uint32_t trace_count
        wsf_trace_entry *trace
    ctypedef struct wsf_health:
        wsf_health_settings settings
        wsf_table table
        int64_t account
        int64_t credit_ns
        uint32_t stall_count
        uint32_t sweep
        double risk
        int64_t watched_ns[10]
        int64_t wait_ns[10]
    uint32_t wsf_vitals_hash(const void *vitals) noexcept
    void wsf_health_find(const wsf_health *health, PyObject **records, size_t count, wsf_vitals **found) noexcept
    void wsf_health_init(wsf_health *health, const wsf_health_settings *settings, int64_t now_ns) noexcept
    int64_t wsf_health_at(const wsf_health *health, int64_t now_ns) noexcept
    int64_t wsf_health_tick(wsf_health *health, int64_t now_ns) noexcept
    uint32_t wsf_health_begin_sweep(wsf_health *health, int64_t now_ns) noexcept
    wsf_vitals *wsf_vitals_new(wsf_health *health) noexcept
    int64_t wsf_vitals_init(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t chance) noexcept
    uint32_t wsf_vitals_look(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int64_t active_ns,
                             const wsf_tcp_facts *facts, int64_t *next_h) noexcept
    bint wsf_vitals_is_overdue(const wsf_vitals *vitals, const wsf_health *health, int64_t now_ns) noexcept
    void wsf_vitals_unread(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, uint32_t unread) noexcept
    void wsf_vitals_rest(wsf_vitals *vitals, wsf_health *health, int64_t now_ns) noexcept
    int64_t wsf_vitals_silent_ns(const wsf_vitals *vitals, const wsf_health *health, int64_t now_ns) noexcept
    uint32_t wsf_vitals_pong(wsf_vitals *vitals, wsf_health *health, uint32_t number, int64_t left_ns, int64_t now_ns,
                             int64_t *next_h) noexcept
    void wsf_vitals_stuck(wsf_vitals *vitals, wsf_health *health, int64_t now_ns, int is_stuck, uint32_t size) noexcept
    uint32_t wsf_vitals_loss(const wsf_vitals *vitals) noexcept
    void wsf_vitals_free(wsf_vitals *vitals, wsf_health *health) noexcept
