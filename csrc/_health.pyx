# cython: language_level=3, freethreading_compatible=True
"""The health of the connections of one manager: the binding between the C structures and Python.

It owns the Python side of references and asks the kernel; every algorithm is in C. The contract is in
wsfast/_health.pyi.
"""

cimport cython
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_Import
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint32_t

from vitals cimport *
from records cimport WSF_RECORDS_CAPSULE, wsf_records

from wsfast._core import ConnectionMeta
from wsfast.connection import ConnectionStatus

__all__ = ["CAN_LIMIT_RTO", "HAS_TCP_INFO", "Health"]

cdef extern from "Python.h":
    PyObject **PySequence_Fast_ITEMS(object sequence)

HAS_TCP_INFO = bool(WSF_HAS_TCP_INFO)
CAN_LIMIT_RTO = bool(wsf_tcp_can_limit_rto())

# What a look or a pong has found.
SUSPECT = WSF_IS_SUSPECT
CLEARED = WSF_IS_CLEARED
DEAD = WSF_IS_DEAD
PING_FAILED = WSF_PING_FAILED
NEW_GRADE = WSF_NEW_GRADE
LATE = WSF_WAS_LATE
UNASKED = WSF_UNASKED

# Why a connection is dead.
BY_SILENCE = WSF_BY_SILENCE
BY_NO_PONG = WSF_BY_NO_PONG

TRACE = (
    "nothing", "ping", "pong", "late", "suspect", "cleared", "lag", "stuck", "left", "unread", "grade", "dead",
)
assert len(TRACE) == WSF_TRACE_KINDS

cdef wsf_records *_records = <wsf_records *>PyCapsule_Import(WSF_RECORDS_CAPSULE, 0)

cdef int _ONLINE = ConnectionStatus.ONLINE
cdef int _SUSPECT = ConnectionStatus.SUSPECT
# Whose health is not our affair any more, or not for now.
cdef int _LAST_ALIVE = ConnectionStatus.SUSPECT
# How many records ahead a sweep asks for memory.
cdef Py_ssize_t _AHEAD = 8

# What is known of a connection in place of what the kernel says.
cdef Py_ssize_t _FACTS = 11

cdef int64_t _NEVER = 0x7FFFFFFFFFFFFFFF


cdef int _check_record(object record) except -1:
    if not isinstance(record, ConnectionMeta):
        raise TypeError(f"record must be a ConnectionMeta of the core, not {type(record).__name__}")
    return 0


@cython.final
@cython.no_gc
cdef class Health:
    cdef wsf_health *health
    cdef wsf_tcp_facts *facts  # for those looked at together
    cdef wsf_vitals **looked
    cdef Py_ssize_t room

    def __cinit__(self, dict settings, now_ns):
        cdef wsf_health_settings numbers
        cdef int grade, measure
        numbers.silence_ns = settings["silence_ns"]
        numbers.timeout_ns = settings["timeout_ns"]
        numbers.answer_ns = settings["answer_ns"]
        numbers.write_ns = settings["write_ns"]
        numbers.interval_ns = settings["interval_ns"]
        numbers.interval_poor_ns = settings["interval_poor_ns"]
        numbers.interval_min_ns = settings["interval_min_ns"]
        numbers.interval_learn_ns = settings["interval_learn_ns"]
        numbers.learn_ns = settings["learn_ns"]
        numbers.by_acks_ns = settings["by_acks_ns"]
        numbers.late_ns = settings["late_ns"]
        numbers.probe_ns = settings["probe_ns"]
        numbers.prior_wait_ns = settings["prior_wait_ns"]
        numbers.peak_half_ns = settings["peak_half_ns"]
        numbers.tick_ns = settings["tick_ns"]
        numbers.slack_ns = settings["slack_ns"]
        numbers.probes = settings["probes"]
        numbers.bad_factor = settings["bad_factor"]
        numbers.poor_latency_us = settings["poor_latency_us"]
        numbers.poor_loss = settings["poor_loss"]
        numbers.bad_loss = settings["bad_loss"]
        numbers.calm = settings["calm"]
        numbers.trace = settings["trace"]
        numbers.risk_per_1000h = settings["risk_per_1000h"]
        numbers.pings_per_h = settings["pings_per_h"]
        for grade in range(WSF_GRADES - 1):
            for measure in range(WSF_MEASURES):
                numbers.limits[grade][measure] = settings["limits"][grade][measure]
        self.health = <wsf_health *>PyMem_RawMalloc(sizeof(wsf_health))
        if self.health == NULL:
            raise MemoryError
        wsf_health_init(self.health, &numbers, now_ns)

    def __dealloc__(self):
        cdef wsf_vitals *vitals
        cdef uint32_t at
        PyMem_RawFree(self.facts)
        PyMem_RawFree(self.looked)
        if self.health == NULL:
            return
        for at in range(self.health.table.capacity):
            if self.health.table.entries[at] != 0:
                vitals = <wsf_vitals *>wsf_entry_item(self.health.table.entries[at])
                Py_DECREF(<object>vitals.record)
                wsf_vitals_free(vitals, self.health)
        wsf_table_free(&self.health.table, &self.health.account)
        PyMem_RawFree(self.health)

    def __len__(self):
        return self.health.table.used

    def __contains__(self, record):
        return self._find(record) != NULL

    cdef wsf_vitals *_find(self, object record) noexcept:
        cdef PyObject *wanted = <PyObject *>record
        cdef wsf_vitals *found
        wsf_health_find(self.health, &wanted, 1, &found)
        return found

    cdef wsf_vitals *_get(self, object record) except NULL:
        cdef wsf_vitals *vitals = self._find(record)
        if vitals == NULL:
            raise KeyError(record)
        return vitals

    # ---- connections

    def add(self, record, now_ns, chance=0, fd=-1, most_rto_ms=0):
        cdef wsf_vitals *vitals
        _check_record(record)
        if self._find(record) != NULL:
            raise ValueError(f"{record!r} is known already")
        vitals = wsf_vitals_new(self.health)
        if vitals == NULL:
            raise MemoryError
        vitals.record = <PyObject *>record
        vitals.fd = fd
        if wsf_table_insert(&self.health.table, &self.health.account, wsf_vitals_hash(vitals), vitals,
                            wsf_vitals_hash) != 0:
            wsf_vitals_free(vitals, self.health)
            raise MemoryError
        Py_INCREF(record)
        if vitals.fd >= 0 and most_rto_ms:
            wsf_tcp_limit_rto(vitals.fd, most_rto_ms)
        _records.set_deadline(vitals.record, wsf_vitals_init(vitals, self.health, now_ns, chance))

    def remove(self, record):
        cdef wsf_vitals *vitals = self._find(record)
        if vitals == NULL:
            return False
        wsf_table_remove(&self.health.table, &self.health.account, wsf_vitals_hash(vitals), vitals, wsf_vitals_hash)
        wsf_vitals_free(vitals, self.health)
        Py_DECREF(record)
        return True

    def spare(self, record, now_ns):
        cdef wsf_vitals *vitals = self._find(record)
        if vitals != NULL:
            self._rest(vitals, now_ns)
            self._note_status(vitals)

    # ---- the clock

    def at(self, now_ns):
        return wsf_health_at(self.health, now_ns)

    def tick(self, now_ns):
        return wsf_health_tick(self.health, now_ns)

    def begin_sweep(self, now_ns):
        return wsf_health_begin_sweep(self.health, now_ns)

    # ---- looking

    def look(self, list records, now_ns, list facts=None):
        cdef Py_ssize_t i, count = len(records)
        cdef int64_t time_ns = now_ns, next_h
        cdef list pings = [], found = []
        cdef wsf_vitals *vitals
        cdef uint32_t what
        cdef int status
        cdef PyObject **items = PySequence_Fast_ITEMS(records)
        if facts is not None and len(facts) != count:
            raise ValueError(f"{len(facts)} facts for {count} records")
        self._make_room(count)
        wsf_health_find(self.health, items, count, self.looked)
        for i in range(count):
            self.facts[i].known = 0
        if facts is None:
            with nogil:
                self._ask_kernel(count)
        else:
            self._take_facts(facts, count)
        for i in range(count):
            if i + _AHEAD < count and self.looked[i + _AHEAD] != NULL:
                _records.expect(items[i + _AHEAD])
            vitals = self.looked[i]
            if vitals == NULL:  # it was put into the registry by somebody else: it would be due for ever
                _check_record(records[i])
                _records.set_deadline(<PyObject *>records[i], _NEVER)
                continue
            status = _records.status(vitals.record)
            if status < 0 or status > _LAST_ALIVE:
                self._rest(vitals, time_ns)
                continue
            if wsf_vitals_is_overdue(vitals, self.health, time_ns):
                wsf_vitals_unread(vitals, self.health, time_ns, self._unread(vitals, facts, i))
            what = wsf_vitals_look(vitals, self.health, time_ns, _records.active_ns(vitals.record), &self.facts[i],
                                   &next_h)
            _records.set_deadline(vitals.record, next_h)
            if what & WSF_DO_PING:
                vitals.unread = self._unread(vitals, facts, i)  # what has come up to now does not answer it
                pings.append(records[i])
            if what & ~<uint32_t>WSF_DO_PING:
                self._note_status(vitals)
                found.append((records[i], what & ~<uint32_t>WSF_DO_PING))
        return pings, found

    cdef uint32_t _unread(self, wsf_vitals *vitals, list facts, Py_ssize_t at) except? 0xFFFFFFFF:
        if facts is not None:
            return 0 if facts[at] is None else facts[at][10]
        return wsf_socket_unread(vitals.fd) if vitals.fd >= 0 else 0

    cdef void _rest(self, wsf_vitals *vitals, int64_t now_ns) noexcept:
        wsf_vitals_rest(vitals, self.health, now_ns)
        _records.set_deadline(vitals.record, wsf_health_at(self.health, now_ns) + self.health.settings.interval_ns)

    cdef int _make_room(self, Py_ssize_t count) except -1:
        if count <= self.room:
            return 0
        PyMem_RawFree(self.facts)
        PyMem_RawFree(self.looked)
        self.room = 0
        self.facts = <wsf_tcp_facts *>PyMem_RawMalloc(count * sizeof(wsf_tcp_facts))
        self.looked = <wsf_vitals **>PyMem_RawMalloc(count * sizeof(wsf_vitals *))
        if self.facts == NULL or self.looked == NULL:
            raise MemoryError
        self.room = count
        return 0

    cdef void _ask_kernel(self, Py_ssize_t count) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(count):
            if self.looked[i] != NULL and self.looked[i].fd >= 0:
                wsf_tcp_facts_read(self.looked[i].fd, &self.facts[i])

    cdef int _take_facts(self, list facts, Py_ssize_t count) except -1:
        cdef Py_ssize_t i
        cdef wsf_tcp_facts *taken
        for i in range(count):
            if facts[i] is None:
                continue
            if len(facts[i]) != _FACTS:
                raise ValueError(f"{len(facts[i])} facts in place of {_FACTS}")
            taken = &self.facts[i]
            (taken.known, taken.unacked, taken.retransmits, taken.rtt_us, taken.last_sent_ms, taken.last_ack_ms,
             taken.bytes_acked, taken.bytes_sent, taken.bytes_retrans, taken.notsent) = facts[i][:10]
        return 0

    cdef void _note_status(self, wsf_vitals *vitals) noexcept:
        cdef int status = _records.status(vitals.record)
        if vitals.state == WSF_SUSPECTED or vitals.state == WSF_ENDED:
            if status == _ONLINE:
                _records.set_status(vitals.record, _SUSPECT)
        elif status == _SUSPECT:
            _records.set_status(vitals.record, _ONLINE)

    # ---- what comes back

    def pong(self, record, number, left_ns, now_ns):
        cdef wsf_vitals *vitals = self._find(record)
        cdef int64_t next_h
        cdef uint32_t what
        if vitals == NULL:
            return 0
        what = wsf_vitals_pong(vitals, self.health, number, left_ns, now_ns, &next_h)
        _records.heartbeat(vitals.record, now_ns)
        _records.set_deadline(vitals.record, next_h)
        _records.set_quality(vitals.record, <float>(vitals.srtt_us / 1e6), <float>(vitals.jitter_us / 1e6),
                             <float>(wsf_vitals_loss(vitals) / 1e3))
        if what & WSF_IS_CLEARED:
            self._note_status(vitals)
        return what

    def stuck(self, record, now_ns, is_stuck, size=0):
        cdef wsf_vitals *vitals = self._find(record)
        if vitals != NULL:
            wsf_vitals_stuck(vitals, self.health, now_ns, bool(is_stuck), min(size, 0xFFFFFFFF))

    # ---- figures

    def figures(self, record, now_ns):
        cdef wsf_vitals *vitals = self._get(record)
        return {
            "state": vitals.state,
            "grade": vitals.grade,
            "former_grade": vitals.former_grade,
            "cause": vitals.cause,
            "silent_ns": wsf_vitals_silent_ns(vitals, self.health, now_ns),
            "interval_ns": vitals.interval_ns,
            "srtt_us": vitals.srtt_us,
            "rttvar_us": vitals.rttvar_us,
            "min_rtt_us": vitals.min_rtt_us,
            "jitter_us": vitals.jitter_us,
            "loss": wsf_vitals_loss(vitals),
            "retransmitted": vitals.retransmitted,
            "kernel_rtt_us": vitals.kernel_rtt_us,
            "unacked": vitals.unacked,
            "trusts_kernel": vitals.trusts_kernel,
            "is_stuck": vitals.is_stuck,
            "pings": vitals.ping_total,
            "late": vitals.late_total,
        }

    def trace(self, record):
        cdef wsf_vitals *vitals = self._get(record)
        cdef uint32_t room = self.health.settings.trace, first, i
        cdef list told = []
        if vitals.trace == NULL:
            return told
        first = vitals.trace_count - room if vitals.trace_count > room else 0
        for i in range(first, vitals.trace_count):
            told.append((vitals.trace[i % room].at_ns, vitals.trace[i % room].what, vitals.trace[i % room].value))
        return told

    def totals(self):
        return {
            "credit_ns": self.health.credit_ns,
            "stalls": self.health.stall_count,
            "risk": self.health.risk,
            "wait_ns": tuple([self.health.wait_ns[i] for i in range(WSF_CLASSES)]),
            "watched_ns": tuple([self.health.watched_ns[i] for i in range(WSF_CLASSES)]),
        }

    def __sizeof__(self):
        return sizeof(wsf_health) + self.health.account
