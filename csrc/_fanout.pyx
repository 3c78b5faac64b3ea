# cython: language_level=3, freethreading_compatible=True
"""The outboxes of one manager and their way into the sockets: the binding between the C structures and Python.

It owns the Python side of references; every algorithm is in C. The contract is in wsfast/_fanout.pyi.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc, PyMem_RawRealloc
from cpython.object cimport PyObject, PyObject_Hash
from cpython.pycapsule cimport PyCapsule_Import
from cpython.ref cimport Py_CLEAR, Py_DECREF, Py_INCREF
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from fanout cimport *
from records cimport WSF_RECORDS_CAPSULE, wsf_records

from time import monotonic_ns

from wsfast._core import ConnectionMeta
from wsfast.errors import InvalidSetting, LimitExceeded, WrongThread

cdef extern from *:
    """
    /* Since 3.12 the collector comes only between two instructions of Python code. */
    #if PY_VERSION_HEX < 0x030C0000
    #define WSF_HOLD_COLLECTOR() PyGC_Disable()
    #define WSF_LET_COLLECTOR(was_enabled) ((void)((was_enabled) && PyGC_Enable()))
    #else
    #define WSF_HOLD_COLLECTOR() 0
    #define WSF_LET_COLLECTOR(was_enabled) ((void)(was_enabled))
    #endif
    """
    int WSF_HOLD_COLLECTOR()
    void WSF_LET_COLLECTOR(int was_enabled)

cdef extern from *:
    """
    #ifdef WSF_DEBUG
    #define WSF_LIVE_COUNTERS wsf_live
    #else
    #define WSF_LIVE_COUNTERS NULL
    #endif
    """
    int64_t *WSF_LIVE_COUNTERS

__all__ = ["CAUSES", "HAS_SOCKETS", "MAX_HELPERS", "MAX_VARIANTS", "POLICIES", "Fanout", "Link", "Message"]

HAS_SOCKETS = bool(WSF_HAS_SOCKETS)
MAX_HELPERS = WSF_MAX_HELPERS
MAX_VARIANTS = WSF_MAX_VARIANTS

POLICIES = {
    "keep": WSF_KEEP,
    "drop_newest": WSF_DROP_NEWEST,
    "drop_oldest": WSF_DROP_OLDEST,
    "conflate": WSF_CONFLATE,
    "disconnect": WSF_DISCONNECT,
}
CAUSES = {"bytes": WSF_BY_BYTES, "age": WSF_BY_AGE, "budget": WSF_BY_BUDGET, "closed": WSF_BY_END}

# What is reported.
DROPPED = WSF_DROPPED
CONFLATED = WSF_CONFLATED
TOO_SLOW = WSF_TOO_SLOW

# What is left over of a flush for one link.
THROUGH = WSF_THROUGH
REST = WSF_REST
FAILED = WSF_FAILED

cdef wsf_records *_records = <wsf_records *>PyCapsule_Import(WSF_RECORDS_CAPSULE, 0)


cdef void _count(wsf_link *link, uint64_t messages, uint64_t bytes) noexcept:
    cdef Link handle = <Link>link.handle
    if handle.is_native:
        _records.sent(link.record, messages, bytes)
    else:  # its record is counted on by Python code, which must not run in the middle of this: see Fanout.tell
        if handle.sent_messages == 0:
            (<Fanout>handle.fanout).uncounted.append(handle)
        handle.sent_messages += messages
        handle.sent_bytes += bytes


cdef void _count_nothing(wsf_link *link, uint64_t messages, uint64_t bytes) noexcept:
    pass


# ---- messages ----------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear  # the frames are charged to the account of the fan-out
cdef class Message:
    cdef wsf_message *message
    cdef wsf_frame *frames[WSF_MAX_VARIANTS]
    cdef Fanout fanout  # has the account

    def __dealloc__(self):
        cdef int i
        for i in range(WSF_MAX_VARIANTS):
            if self.frames[i] != NULL:
                wsf_frame_release(self.frames[i])
        if self.message != NULL:
            wsf_message_release(self.message)

    def tell(self, future):
        """Once nothing is pending any more, set the result of *future*; at most one can be told."""
        if self.message.tally.pending == 0:
            future.set_result(None)
            return
        if self.message.waiter != NULL:
            raise ValueError("somebody waits for this message already")
        Py_INCREF(future)
        self.message.waiter = <PyObject *>future

    @property
    def targets(self):
        return self.message.tally.targets

    @property
    def pending(self):
        return self.message.tally.pending

    @property
    def sent(self):
        return self.message.tally.sent

    @property
    def queued(self):
        return self.message.tally.queued

    @property
    def dropped(self):
        return self.message.tally.dropped

    @property
    def failed(self):
        return self.message.tally.failed

    @property
    def displaced(self):
        return self.message.tally.displaced

    @property
    def disconnected(self):
        return self.message.tally.disconnected

    @property
    def away(self):
        return self.message.tally.away

    def miss(self, count):
        self.message.tally.targets += <uint32_t>count
        self.message.tally.dropped += <uint32_t>count

    cdef int encode(self, uint32_t variant, uint8_t first_bits, object payload) except -1:
        cdef Py_buffer view
        PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
        self.frames[variant] = wsf_frame_new(self.message, first_bits, view.buf, <size_t>view.len)
        PyBuffer_Release(&view)
        if self.frames[variant] == NULL:
            raise MemoryError
        return 0


cdef uint32_t _lacking(Message message, wsf_link **links, uint32_t count) noexcept:
    """One bit for each variant that a link needs and the message does not have yet."""
    cdef uint32_t lacking = 0
    cdef uint32_t i
    for i in range(count):
        if message.frames[links[i].variant] == NULL:
            lacking |= <uint32_t>1 << links[i].variant
    return lacking


# ---- links -------------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc
cdef class Link:
    cdef wsf_link *link  # aligned to a cache line within `memory`
    cdef void *memory
    cdef PyObject *fanout  # borrowed until it is forgotten; then NULL
    cdef PyObject *held_record  # owned until it is forgotten
    cdef PyObject *held_ws
    cdef readonly bint is_native
    cdef uint64_t sent_messages, sent_bytes  # not counted on the record yet

    def __init__(self, *args, **kwargs):
        raise TypeError("links are made by Fanout.admit")

    def __dealloc__(self):
        PyMem_RawFree(self.memory)

    def __repr__(self):
        return f"<Link of {self.record!r}, {self.messages} messages wait>"

    cdef void let_go(self) noexcept:
        Py_CLEAR(self.held_ws)
        Py_CLEAR(self.held_record)

    cdef Fanout of(self):
        """The fan-out, or None once it has forgotten this link."""
        if self.fanout == NULL:
            return None
        if (<Fanout>self.fanout).is_sending:
            raise WrongThread("a change of a link")
        return <Fanout>self.fanout

    @property
    def record(self):
        return None if self.held_record == NULL else <object>self.held_record

    @property
    def ws(self):
        return None if self.held_ws == NULL else <object>self.held_ws

    @property
    def is_open(self):
        return self.link.facts & WSF_OPEN != 0

    @property
    def is_waiting(self):
        return self.link.facts & WSF_WAITS != 0

    @property
    def is_blocked(self):
        return self.link.facts & WSF_BLOCKED != 0

    @property
    def is_between_fragments(self):
        return self.link.facts & WSF_WAITS == WSF_FRAGMENT

    @property
    def is_direct(self):
        return self.link.facts & (WSF_OPEN | WSF_DIRECT | WSF_UNSURE | WSF_WAITS) == WSF_OPEN | WSF_DIRECT

    @property
    def is_away(self):
        return self.link.facts & WSF_AWAY != 0

    @property
    def is_behind(self):
        return self.link.facts & WSF_BEHIND != 0

    @property
    def has_session(self):
        return self.link.cursor != NULL

    @property
    def owed(self):
        return 0 if self.link.cursor == NULL else self.link.cursor.recorded - self.link.cursor.handed

    @property
    def messages(self):
        return self.link.outbox.count

    @property
    def bytes(self):
        return wsf_link_bytes(self.link)

    def sizes(self):
        return [wsf_entry_frame(wsf_outbox_at(&self.link.outbox, i)[0]).size for i in range(self.link.outbox.count)]

    @property
    def in_transport(self):
        return self.link.in_transport

    @property
    def lost_bytes(self):
        return self.link.lost_bytes

    @property
    def peak_bytes(self):
        return self.link.peak_bytes

    @property
    def pinged_ns(self):
        return self.link.control_left_ns

    @property
    def holds_ping(self):
        return self.link.is_held != 0

    def take_ping(self):
        cdef Fanout owner = self.of()
        cdef bytes data
        if owner is None or self.link.control == NULL:
            return b""
        data = PyBytes_FromStringAndSize(<char *>self.link.control.data, <Py_ssize_t>self.link.control.size)
        owner.look_at_clock()
        wsf_link_take_control(owner.fanout, self.link)
        owner.tell()
        return data

    def pong(self, payload):
        cdef Fanout owner = self.of()
        if owner is not None:
            owner.ponged(self, payload)

    def pass_on(self, payload, is_text):
        cdef Fanout owner = self.of()
        if owner is not None:
            owner.passed_on(self, payload, is_text)

    def leave(self):
        cdef Fanout owner = self.of()
        if owner is None or self.link.facts & WSF_OPEN:
            return
        wsf_link_clear(owner.fanout, self.link, WSF_WAITS)  # its transport goes, with all that it has
        owner.tell()
        Py_CLEAR(self.held_ws)

    def end_session(self):
        cdef Fanout owner = self.of()
        if owner is not None:
            wsf_link_end_session(owner.fanout, self.link)

    def direct(self, fd):
        cdef int number = fd
        cdef Fanout owner = self.of()
        if number < 0:
            raise InvalidSetting("fd", fd, "an open file descriptor")
        if owner is not None and WSF_HAS_SOCKETS:
            self.link.fd = number
            wsf_link_set(owner.fanout, self.link, WSF_DIRECT)

    def wrote(self):
        if self.of() is not None:
            self.link.facts |= WSF_UNSURE

    def is_sure(self):
        if self.of() is not None:
            self.link.facts &= ~<uint32_t>WSF_UNSURE

    def fragment(self, under_way):
        cdef Fanout owner = self.of()
        if owner is None:
            return
        if under_way:
            wsf_link_set(owner.fanout, self.link, WSF_FRAGMENT)
        else:
            wsf_link_clear(owner.fanout, self.link, WSF_FRAGMENT)
            owner.wake_up(self)
        owner.tell()

    def block(self, in_transport):
        cdef Fanout owner = self.of()
        if owner is not None:
            owner.look_at_clock()
            wsf_link_block(owner.fanout, self.link, <uint64_t>in_transport)
            owner.tell()

    def writable(self):
        cdef Fanout owner = self.of()
        if owner is not None:
            wsf_link_clear(owner.fanout, self.link, WSF_BLOCKED | WSF_UNSURE)
            owner.wake_up(self)  # first: who is told of the room finds it used
            owner.tell()

    def ask(self):
        cdef Fanout owner = self.of()
        if owner is not None:
            owner.look_at_clock()
            owner.ask(self, owner.fanout.now_ns)
            owner.tell()

    def watch(self, bytes):
        cdef Fanout owner = self.of()
        if owner is not None:
            wsf_link_watch(owner.fanout, self.link, <uint64_t>bytes)
            owner.tell()

    def finish(self):
        cdef Fanout owner = self.of()
        if owner is not None and self.link.facts & WSF_OPEN and self.link.outbox.count != 0:
            owner.hand_over(self)

    def close(self):
        cdef Fanout owner = self.of()
        if owner is not None:
            owner.look_at_clock()
            wsf_link_close(owner.fanout, self.link, WSF_BY_END)
            owner.tell()

    # ---- the way through the adapter

    def peek(self, max_bytes):
        cdef wsf_outbox *outbox = &self.link.outbox
        cdef wsf_frame *control = self.link.control
        cdef uint64_t size = 0 if control == NULL else control.size
        cdef uint64_t most = <uint64_t>max_bytes
        cdef uint32_t frames = 0, place
        cdef wsf_frame *frame
        cdef bytes data
        cdef char *end
        while frames < outbox.count:
            frame = wsf_entry_frame(wsf_outbox_at(outbox, frames)[0])
            if size > 0 and size + frame.size > most:
                break
            size += frame.size
            frames += 1
        if frames == 1 and control == NULL:
            return (<Fanout>self.fanout).bytes_of(wsf_entry_frame(wsf_outbox_at(outbox, 0)[0])), 1
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        end = PyBytes_AS_STRING(data)
        if control != NULL:
            memcpy(end, control.data, control.size)
            end += control.size
        for place in range(frames):
            frame = wsf_entry_frame(wsf_outbox_at(outbox, place)[0])
            memcpy(end, frame.data, frame.size)
            end += frame.size
        return data, frames + (control != NULL)

    def peek_message(self):
        cdef wsf_frame *frame
        cdef bytes payload
        if self.link.outbox.count == 0:
            return None
        frame = wsf_entry_frame(wsf_outbox_at(&self.link.outbox, 0)[0])
        payload = PyBytes_FromStringAndSize(<char *>frame.data + frame.header_size,
                                            <Py_ssize_t>(frame.size - frame.header_size))
        return payload.decode() if frame.data[0] & 0x0F == WSF_TEXT else payload

    def commit(self, frames, in_transport):
        cdef Fanout owner = self.of()
        if owner is not None:
            wsf_link_commit(owner.fanout, self.link, <uint32_t>frames, <uint64_t>in_transport, _count)
            owner.tell()

    def take_message(self, in_transport):
        cdef Fanout owner = self.of()
        if owner is not None:
            wsf_link_commit_messages(owner.fanout, self.link, 1, <uint64_t>in_transport, _count_nothing)
            owner.tell()

    def fail(self, frames):
        cdef Fanout owner = self.of()
        if owner is not None:
            wsf_link_fail(owner.fanout, self.link, <uint32_t>frames)
            owner.tell()


cdef inline int64_t _clock_ns() except? -1:
    """The clock of slices, which are short."""
    cdef int64_t now_ns = wsf_monotonic_ns()
    return <int64_t>monotonic_ns() if now_ns < 0 else now_ns


# ---- the fan-out ---------------------------------------------------------------------------------------------------------


cdef uint64_t _whole(object value, str name, int64_t least) except? 0:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be int, not {type(value).__name__}")
    if value < least or value > 0x7FFFFFFFFFFFFFFF:
        raise InvalidSetting(name, value, f"{least} or more")
    return <uint64_t>value


@cython.final
cdef class Fanout:
    cdef wsf_fanout *fanout
    cdef wsf_pool *pool
    cdef unsigned wanted_helpers
    cdef bint is_sending
    cdef unsigned helper_count  # running
    # Called with a link ...
    cdef object wake_up  # that waited and can be flushed
    cdef object hand_over  # all of which must go to its transport
    cdef object has_room  # that was watched, when there is room
    cdef object buffered  # returns how many bytes its transport has
    cdef object held  # whose ping cannot leave, or can again
    cdef object ponged  # and with the payload of a pong that has come
    cdef object passed_on  # and with a message of the library's own
    cdef object clock  # None: the system's
    cdef list encoders  # of the variants from 1
    cdef list uncounted  # links of records that are not the core's, for which something was sent
    cdef wsf_link **targets
    cdef size_t target_capacity

    def __cinit__(
        self, *, wake_up, hand_over, has_room, buffered, held, ponged, passed_on, policy, max_bytes, low_bytes, max_age_ns,
        max_total_bytes, kept_messages=0, kept_bytes=0, kept_age_ns=0, helpers=0, clock=None
    ):
        cdef wsf_limits limits
        memset(&limits, 0, sizeof(limits))
        limits.policy = <uint32_t>_whole(policy, "policy", 0)
        limits.max_bytes = _whole(max_bytes, "max_bytes", 1)
        limits.low_bytes = _whole(low_bytes, "low_bytes", 0)
        limits.max_age_ns = <int64_t>_whole(max_age_ns, "max_age_ns", 1)
        limits.max_total_bytes = _whole(max_total_bytes, "max_total_bytes", 1)
        if limits.policy >= WSF_POLICIES:
            raise InvalidSetting("policy", policy, "the number of a policy")
        self.wanted_helpers = <unsigned>min(_whole(helpers, "helpers", 0), <uint64_t>WSF_MAX_HELPERS)
        self.wake_up = wake_up
        self.hand_over = hand_over
        self.has_room = has_room
        self.held = held
        self.ponged = ponged
        self.passed_on = passed_on
        self.buffered = buffered
        self.clock = clock
        self.encoders = []
        self.uncounted = []
        self.fanout = wsf_fanout_new(&limits)
        if self.fanout == NULL:
            raise MemoryError
        self.fanout.backlog.limits.max_messages = _whole(kept_messages, "kept_messages", 0)
        self.fanout.backlog.limits.max_bytes = _whole(kept_bytes, "kept_bytes", 0)
        self.fanout.backlog.limits.max_age_ns = <int64_t>_whole(kept_age_ns, "kept_age_ns", 0)

    def __dealloc__(self):
        cdef wsf_message *message
        if self.pool != NULL:
            with nogil:
                wsf_pool_free(self.pool)
        if self.fanout != NULL:
            while self.fanout.decided != NULL:
                message = wsf_fanout_take_decided(self.fanout)
                Py_CLEAR(message.waiter)
                wsf_message_release(message)
            wsf_fanout_free(self.fanout)  # __del__ has forgotten the links
        PyMem_RawFree(self.targets)

    def __repr__(self):
        return f"<Fanout with {len(self)} links, {self.fanout.line.count} in line>"

    def __del__(self):
        if self.fanout == NULL:
            return
        for link in self.links():
            self.forget(link)

    cdef int look_at_clock(self) except -1:
        """Between the calls that are told the time, things happen too."""
        self.fanout.now_ns = _clock_ns() if self.clock is None else self.clock()
        return 0

    cdef void tell(self) noexcept:
        """Tell those who wait for something that has come. It runs Python code: do it last. What that raises is printed."""
        while self.uncounted:
            self.tell_record(self.uncounted.pop())
        while self.fanout.decided != NULL:
            self.tell_waiter(wsf_fanout_take_decided(self.fanout))
        while self.fanout.roomy != NULL:
            self.tell_room(<object>wsf_fanout_take_roomy(self.fanout).handle)
        while self.fanout.holding != NULL:
            self.tell_held(<object>wsf_fanout_take_holding(self.fanout).handle)

    cdef void tell_record(self, Link link) noexcept:
        messages, nbytes = link.sent_messages, link.sent_bytes
        link.sent_messages = link.sent_bytes = 0
        link.record.sent(nbytes, messages)

    cdef void tell_waiter(self, wsf_message *message) noexcept:
        future = <object>message.waiter
        Py_CLEAR(message.waiter)
        wsf_message_release(message)
        if not future.done():
            future.set_result(None)

    cdef void tell_room(self, Link link) noexcept:
        self.has_room(link)

    cdef void tell_held(self, Link link) noexcept:
        self.held(link)

    cdef list doubtful(self, wsf_link **links, uint32_t count, Message message):
        """Those of them whom the policy would do something to, by figures that are old."""
        cdef list found = []
        cdef uint32_t i, policy = self.fanout.limits.policy
        if self.fanout.waiting_count == 0 or policy == WSF_KEEP or policy == WSF_CONFLATE:
            return found
        for i in range(count):
            if wsf_link_is_doubtful(self.fanout, links[i], message.frames[0].size, message.message.created_ns):
                found.append(<object>links[i].handle)
        return found

    cdef int ask(self, Link link, int64_t now_ns) except -1:
        """Ask a transport how much it has."""
        in_transport = self.buffered(link)
        if link.fanout != NULL and link.link.facts & WSF_BLOCKED:
            self.fanout.now_ns = now_ns
            wsf_link_block(self.fanout, link.link, <uint64_t>in_transport)
        return 0

    cdef int check(self) except -1:
        if self.is_sending:
            raise WrongThread("a fan-out")
        return 0

    # ---- connections

    def __len__(self):
        return self.fanout.links.used

    def add_variant(self, encode):
        if len(self.encoders) + 1 >= WSF_MAX_VARIANTS:
            raise LimitExceeded("variants of a frame", WSF_MAX_VARIANTS)
        self.encoders.append(encode)
        return len(self.encoders)

    def admit(self, record, ws, variant=0, keeps_views=False):
        cdef Link link = self._new_link(record, variant, keeps_views)
        if wsf_fanout_find(self.fanout, <PyObject *>record) != NULL:
            raise ValueError(f"{record!r} has a link already")
        self._admit(link, record, ws)
        return link

    cdef Link _new_link(self, record, variant, keeps_views):
        cdef uint32_t number = <uint32_t>_whole(variant, "variant", 0)
        cdef Link link
        self.check()
        if number > len(self.encoders):
            raise InvalidSetting("variant", variant, "0, or a number that add_variant gave")
        link = Link.__new__(Link)
        link.memory = PyMem_RawMalloc(sizeof(wsf_link) + 63)
        if link.memory == NULL:
            raise MemoryError
        link.link = <wsf_link *>((<uintptr_t>link.memory + 63) & ~<uintptr_t>63)
        memset(link.link, 0, sizeof(wsf_link))
        link.is_native = isinstance(record, ConnectionMeta)
        link.link.record = <PyObject *>record
        link.link.handle = <PyObject *>link
        link.link.variant = number
        link.link.fd = -1
        link.link.keeps_views = bool(keeps_views)
        return link

    cdef int _admit(self, Link link, record, ws) except -1:
        if wsf_fanout_admit(self.fanout, link.link) != WSF_OK:
            raise MemoryError
        link.link.facts |= WSF_OPEN
        Py_INCREF(link)  # for the table
        Py_INCREF(record)
        Py_INCREF(ws)
        link.held_record = <PyObject *>record
        link.held_ws = <PyObject *>ws
        link.fanout = <PyObject *>self
        return 0

    def forget(self, Link link not None):
        cdef Fanout owner = link.of()
        if owner is None:
            return
        if owner is not self:
            raise ValueError(f"{link!r} belongs to another fan-out")
        wsf_link_close(self.fanout, link.link, WSF_BY_END)
        self.tell()
        if link.fanout == NULL:  # by whom that told
            return
        self._forget(link)
        link.let_go()

    cdef void _forget(self, Link link) noexcept:
        """The link is closed. No Python code runs."""
        wsf_fanout_forget(self.fanout, link.link)
        link.fanout = NULL
        link.link.record = NULL
        Py_DECREF(link)  # the table's; the caller has another one

    # ---- sessions

    def begin_session(self, Link link not None):
        self._own(link)
        if link.link.cursor != NULL:
            raise ValueError(f"{link!r} has a session already")
        if not link.link.facts & WSF_OPEN or link.link.outbox.count != 0:
            raise ValueError(f"{link!r} is closed, or has been sent something")
        if wsf_link_begin_session(self.fanout, link.link) != WSF_OK:
            raise MemoryError

    def resume(self, Link link not None, ws, variant, keeps_views, received):
        cdef uint64_t count = _whole(received, "received", 0)
        cdef Link newer
        self._own(link)
        if link.link.cursor == NULL:
            raise ValueError(f"{link!r} has no session")
        record = link.record
        newer = self._new_link(record, variant, keeps_views)
        link.close()
        if link.fanout == NULL or not wsf_link_rewind(self.fanout, link.link, count):
            return None
        # From here to the end of _admit no Python code runs: nothing can be sent to the record while it has no link.
        wsf_link_take_session(self.fanout, newer.link, link.link)
        self._forget(link)
        try:
            self._admit(newer, record, ws)
        except MemoryError:
            wsf_link_end_session(self.fanout, newer.link)
            raise
        finally:
            link.let_go()
        return newer

    def greet(self, Link link not None, payload, now_ns):
        cdef Message message = self._message(payload, WSF_TEXT, now_ns, None)
        cdef wsf_frame *frame = message.frames[0]
        self._own(link)
        if link.link.cursor != NULL and link.link.facts & WSF_OPEN and \
                (not link.link.facts & WSF_BEHIND or link.link.outbox.count != 0):
            raise ValueError(f"{link!r} has been greeted already")
        self.fanout.now_ns = message.message.created_ns
        message.frames[0] = NULL  # stolen
        if wsf_link_greet(self.fanout, link.link, frame) != WSF_OK:
            message.frames[0] = frame
            raise MemoryError
        self.tell()

    def expire_kept(self, now_ns):
        self.check()
        wsf_backlog_expire(&self.fanout.backlog, now_ns)

    @property
    def sessions(self):
        return self.fanout.sessions

    cdef int _own(self, Link link) except -1:
        self.check()
        if link.fanout != <PyObject *>self:
            raise ValueError(f"{link!r} belongs to another fan-out")
        return 0

    def get(self, record):
        cdef wsf_link *link = wsf_fanout_find(self.fanout, <PyObject *>record)
        return None if link == NULL else <object>link.handle

    def links(self):
        return [<object>self.fanout.all[i].handle for i in range(self.fanout.links.used)]

    @property
    def has_waiting(self):
        return self.fanout.waiting_count != 0

    def waiting(self):
        return [<object>self.fanout.waiting[i].handle for i in range(self.fanout.waiting_count)]

    # ---- messages

    def message(self, payload, is_text, now_ns, key=None):
        return self._message(payload, WSF_TEXT if is_text else WSF_BINARY, now_ns, key)

    cdef Message _message(self, payload, uint8_t opcode, now_ns, key):
        cdef Message message = Message.__new__(Message)
        cdef int64_t created_ns = now_ns
        if key is not None:
            if type(key) is not str:
                raise TypeError(f"key must be exactly str, not {type(key).__name__}")
            PyObject_Hash(key)
        message.fanout = self
        message.message = wsf_message_new(
            &self.fanout.account, created_ns, NULL if key is None else <PyObject *>key, <uint64_t>len(payload)
        )
        if message.message == NULL:
            raise MemoryError
        message.encode(0, opcode, payload)
        return message

    def push(self, Message message not None, list records, left_out=(), is_late=False, log=0):
        cdef uint64_t key = <uint64_t>log
        cdef list doubtful, strangers = []
        cdef list excluded = list(left_out)
        cdef wsf_link **links
        cdef uint32_t count, lacking
        self.check()
        if message.fanout is not self:
            raise ValueError("the message is of another fan-out")
        while True:
            strangers.clear()
            count = self.fanout.links.used if records is None else self._find(records, strangers)
            links = self.fanout.all if records is None else self.targets
            lacking = _lacking(message, links, count) if self.encoders else 0
            if records is None:  # fewer wait than there are
                doubtful = self.doubtful(self.fanout.waiting, self.fanout.waiting_count, message)
            else:
                doubtful = self.doubtful(links, count, message)
            if lacking == 0 and not doubtful:
                break
            for link in doubtful:
                self.ask(link, message.message.created_ns)
            # This runs Python code: links may come and go meanwhile.
            for variant in range(1, WSF_MAX_VARIANTS):
                if lacking >> variant & 1:
                    self._encode(message, variant)
        self._leave_out(excluded)
        wsf_fanout_push(self.fanout, links, count, message.frames, is_late, key)
        self.tell()
        return strangers

    def ping(self, payload, list records, now_ns):
        cdef Message message = self._message(payload, WSF_PING, now_ns, None)
        cdef uint32_t count, i
        self.check()
        closed = []
        count = self._find(records, closed)
        wsf_fanout_push_control(self.fanout, self.targets, count, message.frames[0])
        between = []
        for i in range(count):
            if not self.targets[i].facts & WSF_OPEN:
                closed.append(<object>self.targets[i].record)
            elif self.targets[i].facts & WSF_WAITS == WSF_FRAGMENT:
                between.append(<object>self.targets[i].handle)
        self.tell()
        return between, closed

    cdef int _leave_out(self, list records) except -1:
        """Marks that hold for the next push, whichever it is: nothing may come in between."""
        cdef wsf_link *link
        for record in records:
            link = wsf_fanout_find(self.fanout, <PyObject *>record)
            if link != NULL:
                link.left_out_of = self.fanout.pushes + 1
        return 0

    cdef uint32_t _find(self, list records, list strangers) except? 0:
        """The links of those records into `targets`."""
        cdef uint32_t count = 0
        cdef size_t room = <size_t>len(records)
        cdef wsf_link *link
        if room > self.target_capacity:
            PyMem_RawFree(self.targets)
            self.target_capacity = 0
            self.targets = <wsf_link **>PyMem_RawMalloc(room * sizeof(wsf_link *))
            if self.targets == NULL:
                raise MemoryError
            self.target_capacity = room
        for record in records:
            link = wsf_fanout_find(self.fanout, <PyObject *>record)
            if link == NULL:
                strangers.append(record)
            else:
                self.targets[count] = link
                count += 1
        return count

    cdef int _encode(self, Message message, uint32_t variant) except -1:
        cdef wsf_frame *plain = message.frames[0]
        cdef bytes payload = PyBytes_FromStringAndSize(<char *>plain.data + plain.header_size,
                                                       <Py_ssize_t>(plain.size - plain.header_size))
        cdef bint is_text = plain.data[0] & 0x0F == WSF_TEXT
        deflated = self.encoders[variant - 1](payload, is_text)
        if message.frames[variant] == NULL:
            message.encode(variant, (WSF_TEXT if is_text else WSF_BINARY) | WSF_RSV1, deflated)
        return 0

    # ---- flush

    @property
    def in_line(self):
        return self.fanout.line.count

    @property
    def queued_bytes(self):
        return self.fanout.account

    @property
    def is_over(self):
        return wsf_fanout_is_over(self.fanout)

    def end_window(self):
        self.check()
        wsf_fanout_end_window(self.fanout)

    def flush(self, now_ns, slice_ns):
        cdef int64_t until_ns = _clock_ns() + <int64_t>slice_ns
        cdef list left = []
        self.check()
        self.fanout.now_ns = now_ns
        while wsf_fanout_plan(self.fanout) != 0:
            self._start_helpers()
            self.is_sending = True
            with nogil:
                wsf_fanout_send(self.fanout, self.pool, until_ns)
            self.is_sending = False
            self._settle(left)
            if _clock_ns() >= until_ns:
                break
        self.tell()
        return left

    cdef bytes bytes_of(self, wsf_frame *frame):
        """The whole frame as an object, made once."""
        cdef bytes data
        if frame.bytes == NULL:
            data = PyBytes_FromStringAndSize(<char *>frame.data, <Py_ssize_t>frame.size)
            wsf_frame_keep(frame, <PyObject *>data)
            wsf_backlog_note_object(&self.fanout.backlog, frame)
        return <bytes>frame.bytes

    cdef object rest_of(self, wsf_remainder *rest):
        """What of a frame is to be sent still."""
        cdef wsf_frame *frame = rest.frame
        if rest.is_shared:
            return PyMemoryView_FromObject(self.bytes_of(frame))[rest.offset:]
        return PyBytes_FromStringAndSize(<char *>frame.data + rest.offset, <Py_ssize_t>(frame.size - rest.offset))

    cdef int _start_helpers(self) except -1:
        if self.pool == NULL and self.wanted_helpers != 0 and self.fanout.job_count >= WSF_PARALLEL_FROM:
            self.pool = wsf_pool_new(self.wanted_helpers)  # NULL: it goes without
            self.helper_count = 0 if self.pool == NULL else wsf_pool_helpers(self.pool)
        return 0

    cdef int _settle(self, list left) except -1:
        """What the plan leaves to do. No Python code runs meanwhile, so the collector must not come either."""
        cdef int collects = WSF_HOLD_COLLECTOR()
        try:
            self._settle_all(left)
        finally:
            WSF_LET_COLLECTOR(collects)
        return 0

    cdef int _settle_all(self, list left) except -1:
        cdef wsf_remainder rest
        cdef int what
        while True:
            what = wsf_fanout_settle(self.fanout, _count, &rest)
            if what == WSF_DONE:
                return 0
            if what == WSF_REST:
                try:
                    data = self.rest_of(&rest)
                except MemoryError:  # half a frame is on its way, and there is no rest
                    wsf_link_fail(self.fanout, rest.link, 0)
                    left.append((<object>rest.link.handle, WSF_FAILED, ENOMEM))
                else:
                    left.append((<object>rest.link.handle, what, data))
                finally:
                    wsf_frame_release(rest.frame)
            else:
                left.append((<object>rest.link.handle, what, rest.error if what == WSF_FAILED else None))

    @property
    def helpers(self):
        return self.wanted_helpers

    @helpers.setter
    def helpers(self, value):
        cdef unsigned number = <unsigned>min(_whole(value, "helpers", 0), <uint64_t>WSF_MAX_HELPERS)
        self.check()
        if number != self.wanted_helpers:
            self.close()
        self.wanted_helpers = number

    # ---- limits

    @property
    def wants_reports(self):
        return self.fanout.wants_reports != 0

    @wants_reports.setter
    def wants_reports(self, value):
        self.fanout.wants_reports = bool(value)

    def expire(self, now_ns):
        self.check()
        self.fanout.now_ns = now_ns
        wsf_fanout_expire(self.fanout)
        self.tell()

    def shed(self, now_ns):
        self.check()
        for link in self.waiting():
            self.ask(link, now_ns)
        self.fanout.now_ns = now_ns
        wsf_fanout_shed(self.fanout)
        self.tell()

    @property
    def has_reports(self):
        return self.fanout.report_count != 0

    def take_reports(self):
        cdef list links = [None] * self.fanout.report_count  # this may run finalisers, and links be forgotten
        cdef uint32_t i, count = self.fanout.report_count
        cdef wsf_report *reports = self.fanout.reports
        self.fanout.reports = NULL
        self.fanout.report_count = self.fanout.report_capacity = 0
        try:
            for i in range(count):
                links[i] = <object>reports[i].link.handle
            return [
                (links[i], reports[i].what, reports[i].cause, reports[i].messages, reports[i].bytes, reports[i].age_s)
                for i in range(count)
            ]
        finally:
            PyMem_RawFree(reports)

    def stats(self):
        cdef wsf_totals *totals = &self.fanout.totals
        return {
            "messages": totals.messages,
            "bytes": totals.bytes,
            "writes": totals.writes,
            "through": totals.through,
            "blocked": totals.blocked,
            "failed": totals.failed,
            "pings": totals.controls,
            "conflated": totals.conflated,
            "dropped": tuple([totals.dropped[i] for i in range(WSF_CAUSES)]),
            "too_slow": tuple([totals.too_slow[i] for i in range(WSF_CAUSES)]),
            "links": self.fanout.links.used,
            "waiting": self.fanout.waiting_count,
            "queued_bytes": self.fanout.account,
            "sessions": self.fanout.sessions,
            "kept_messages": self.fanout.backlog.count,
            "kept_bytes": self.fanout.backlog.bytes,
            "helpers": self.helper_count,
        }

    def _check(self):
        """Abort if an invariant is broken; does something in a debug build only."""
        self.check()
        wsf_fanout_check(self.fanout)

    def close(self):
        """Forget nothing, but end the helpers."""
        cdef wsf_pool *pool = self.pool
        self.check()
        self.pool = NULL
        self.wanted_helpers = self.helper_count = 0
        if pool != NULL:
            with nogil:
                wsf_pool_free(pool)


def _live():
    """Live objects by kind in a debug build; None otherwise."""
    cdef int64_t *counters = WSF_LIVE_COUNTERS
    if counters == NULL:
        return None
    return {
        "messages": counters[WSF_LIVE_MESSAGE],
        "frames": counters[WSF_LIVE_FRAME],
        "links": counters[WSF_LIVE_LINK],
        "logs": counters[WSF_LIVE_LOG],
    }
