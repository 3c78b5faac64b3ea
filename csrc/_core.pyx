# cython: language_level=3, freethreading_compatible=True
"""The native core of wsfast: the binding between the C structures of this folder and Python.

It checks arguments, owns the Python side of references and raises exceptions; every algorithm is in C. The contract,
method by method, is in wsfast/_core.pyi. Ownership words: *owned*, *borrowed*, *stolen*, as in the headers.
"""

cimport cython
from cpython.list cimport PyList_New
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject, PyObject_Hash
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from arguments cimport exact_int64, exact_text, wrong_type
from core cimport *
from records cimport WSF_RECORDS_CAPSULE, wsf_metadata, wsf_records

from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from time import monotonic_ns, time
from types import MappingProxyType
from weakref import ref

from wsfast.connection import ConnectionStatus, Quality
from wsfast.errors import (
    DetachedRecord,
    DuplicateConnection,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    UnknownConnection,
)

cdef extern from "Python.h":
    bint PyUnicode_CheckExact(object value)
    bint PyUnicode_Check(object value)
    bint PyLong_Check(object value)
    bint PyList_CheckExact(object value)
    bint PyTuple_CheckExact(object value)
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1
    ctypedef object (*newfunc)(PyTypeObject *kind, PyObject *args, PyObject *kwargs)
    ctypedef struct PyTypeObject:
        newfunc tp_new
        void *tp_vectorcall
        unsigned long tp_flags
    unsigned long Py_TPFLAGS_HAVE_GC
    void PyObject_GC_UnTrack(PyObject *object) noexcept
    PyObject *Py_None
    PyObject **PySequence_Fast_ITEMS(object sequence)
    void PyList_SET_ITEM(object sequence, Py_ssize_t at, PyObject *item) noexcept

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define WSF_FREE_THREADED 1
    #else
    #define WSF_FREE_THREADED 0
    #endif
    static inline PyObject *wsf_object(PyObject *owned) { return owned != NULL ? owned : Py_NewRef(Py_None); }
    """
    const bint WSF_FREE_THREADED
    object wsf_object(PyObject *owned)  # the reference is stolen; None for NULL

__all__ = ["ConnectionMeta", "Registry", "fnv1_32", "fnv1a_32"]

cdef tuple _STATUSES = tuple(ConnectionStatus)
cdef int _ONLINE_STATE = <int>ConnectionStatus.ONLINE
cdef tuple _NO_ARGUMENTS = ()
cdef object _EMPTY_MAPPING = MappingProxyType({})
cdef frozenset _NO_PERMISSIONS = frozenset()

if [int(_status) for _status in ConnectionStatus] != list(range(WSF_STATUSES)):
    raise ImportError("wsfast.connection does not match this build of wsfast._core")


# ---- arguments ---------------------------------------------------------------------------------------------------------


cdef str _name_hashed(object value, str kind, int64_t limit, uint32_t *fnv1a, bint may_be_empty=False):
    """The value as a name (see _core.pyi), and its FNV-1a hash."""
    cdef str text = exact_text(value, kind)
    cdef int64_t utf8_bytes = 0
    if not text and not may_be_empty:
        raise InvalidName(kind, "is empty")
    if wsf_text_fnv1a(<PyObject *>text, fnv1a, &utf8_bytes) != 0:
        raise InvalidName(kind, "holds a lone surrogate, so it has no UTF-8 form")
    if utf8_bytes > limit:
        raise InvalidName(kind, f"is over the limit of {limit} bytes in UTF-8")
    return text


cdef inline str _name(object value, str kind, int64_t limit, bint may_be_empty=False):
    cdef uint32_t fnv1a
    return _name_hashed(value, kind, limit, &fnv1a, may_be_empty)


cdef inline int64_t _int64(object value, str name, str wanted="int") except? -1:
    return exact_int64(value, name, wanted)


cdef int64_t _at_least(object value, str name, int64_t least) except -1:
    cdef int64_t number = _int64(value, name)
    if number < least:
        raise InvalidSetting(name, value, f"{least} or more")
    return number


cdef int _status(object value) except -1:
    if not isinstance(value, ConnectionStatus):
        raise TypeError(wrong_type("status", "a ConnectionStatus", value))
    return <int>value


cdef list _names(object values, str argument, str kind, int64_t limit):
    """Distinct names of an iterable that is not a str, in order."""
    cdef dict names = {}
    if isinstance(values, str):
        raise TypeError(wrong_type(argument, "an iterable of str", values))
    try:
        iterator = iter(values)
    except TypeError:
        raise TypeError(wrong_type(argument, "an iterable of str", values)) from None
    for value in iterator:
        names[_name(value, kind, limit)] = None
    return list(names)


cdef int _check_mapping(object values, str argument) except -1:
    # Asking the abstract class takes longer than all the rest for the small dict that this nearly always is.
    if type(values) is not dict and not isinstance(values, Mapping):
        raise TypeError(wrong_type(argument, "a mapping", values))
    return 0


cdef dict _mapping(object values, str argument, str kind, int64_t limit):
    """A copy of a mapping of names to objects."""
    _check_mapping(values, argument)
    return {_name(key, kind, limit): value for key, value in values.items()}


cdef bint _all_exact_str(frozenset values) except -1:
    for value in values:
        if not PyUnicode_CheckExact(value):
            return False
    return True


# ---- settings ----------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc
cdef class _Shared:
    """A permission set that is stored once, and how many attached records use it."""

    cdef object value
    cdef Py_ssize_t uses


cdef inline _Shared _make_shared(object value):
    cdef _Shared shared = _Shared.__new__(_Shared)
    shared.value = value
    return shared


@cython.final
cdef class _Settings:
    """What the records of a registry need to know of it: limits, clocks, shared values."""

    cdef readonly int64_t max_id_bytes, max_name_bytes, max_tags, max_groups
    cdef int64_t last_ns  # what the clock said last
    cdef object clock
    cdef object wall_clock
    cdef object registry  # weak reference
    # Each shared value to its _Shared; None where no registry is. Looked up in critical sections only, where the keys,
    # sets of exact strings, run no Python code: nothing lets another thread in halfway.
    cdef dict values
    cdef type record_type

    cdef _Shared known(self, object value):
        with cython.critical_section(self):
            return None if self.values is None else <_Shared>self.values.get(value)

    cdef object use(self, object value):
        """The stored value that equals this one, with one more use, which ends with `give_back`."""
        cdef _Shared shared
        with cython.critical_section(self):
            if self.values is None:
                return value
            shared = <_Shared>self.values.get(value)
            if shared is None:
                shared = _make_shared(value)
                self.values[value] = shared
            shared.uses += 1
        return shared.value

    cdef void give_back(self, object value) noexcept:
        """End a use of a stored value. The caller keeps a reference, so that nothing is destroyed in here."""
        cdef _Shared shared
        with cython.critical_section(self):
            shared = None if self.values is None else <_Shared>self.values.get(value)
            if shared is not None:
                shared.uses -= 1
                if shared.uses == 0:
                    del self.values[value]

    cdef Py_ssize_t values_bytes(self) except -1:
        cdef Py_ssize_t entry_bytes = _Shared.__basicsize__
        return self.values.__sizeof__() + len(self.values) * entry_bytes

    cdef object permission_set(self, object values):
        """The permissions as a frozenset of exact strings, or None for none."""
        cdef _Shared known = None
        cdef list names
        if type(values) is frozenset and _all_exact_str(values):
            known = self.known(values)
        if known is not None:
            return known.value
        names = _names(values, "permissions", "permission", self.max_name_bytes)
        return frozenset(names) if names else None

    cdef dict tags(self, object values):
        cdef dict tags = {}
        _check_mapping(values, "tags")
        for key, value in values.items():
            key = _name(key, "tag key", self.max_name_bytes)
            tags[key] = _name(value, "tag value", self.max_name_bytes, True)
        if len(tags) > self.max_tags:
            raise LimitExceeded("tags of one connection", self.max_tags)
        return tags

    cdef int64_t now(self) except? -1:
        if self.clock is None:
            return monotonic_ns()
        self.last_ns = _int64(self.clock(), "clock()")
        return self.last_ns

    cdef int remember_the_end(self, wsf_core *core) except -1:
        """Ask the clocks for the last time, for the records that outlive the registry."""
        try:
            core.last_ns = _clock_of(core)
        except Exception:
            core.last_ns = self.last_ns  # a destructor has nobody to report to; earlier callers had the exception
        core.last_wall = self.wall_clock()
        return 0


cdef _Settings _default_settings():
    cdef _Settings settings = _Settings.__new__(_Settings)
    settings.max_id_bytes = settings.max_name_bytes = 256
    settings.max_tags = 64
    settings.max_groups = 1024
    settings.wall_clock = time
    return settings


# What the records of a registry that is gone go by. Their attributes can only be read, so the limits hardly matter.
cdef _Settings _ORPHANS = _default_settings()


cdef inline _Settings _settings_of(ConnectionMeta meta):
    cdef PyObject *settings = wsf_core_settings(meta.r.shard.core)
    return _ORPHANS if settings == NULL else <_Settings>wsf_object(settings)


cdef int64_t _clock_of(wsf_core *core) except? -1:
    cdef int64_t now_ns
    cdef PyObject *settings
    if core.has_native_clock:
        now_ns = wsf_monotonic_ns()
        if now_ns >= 0:
            return now_ns
    settings = wsf_core_settings(core)
    if settings == NULL:
        return _ORPHANS.now() if core.has_native_clock else core.last_ns
    return (<_Settings>wsf_object(settings)).now()


cdef inline int64_t _now_of(ConnectionMeta meta, object now_ns) except? -1:
    if now_ns is None:
        return _clock_of(meta.r.shard.core)
    return _int64(now_ns, "now_ns", "int or None")


cdef object _wall_time(ConnectionMeta meta, object at_ns):
    """When the clock said `at_ns`, in seconds since the epoch."""
    cdef wsf_core *core = meta.r.shard.core
    cdef PyObject *settings = wsf_core_settings(core)
    cdef object now_ns = core.last_ns if settings == NULL else _clock_of(core)
    wall = core.last_wall if settings == NULL else (<_Settings>wsf_object(settings)).wall_clock()
    return wall - (now_ns - at_ns) / 1e9


# ---- records -----------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc
cdef class _Extras:
    """What few records have. Never changed: a change puts another one in its place."""

    cdef dict metadata
    cdef dict extensions
    cdef int64_t version  # of the metadata
    cdef int64_t nbytes  # of the metadata, as _metadata counts; -1: not counted


cdef inline _Extras _make_extras(dict metadata, dict extensions, int64_t version=0, int64_t nbytes=-1):
    cdef _Extras extras = _Extras.__new__(_Extras)
    extras.metadata = metadata
    extras.extensions = extensions
    extras.version = version
    extras.nbytes = nbytes
    return extras


cdef class ConnectionMeta:
    cdef wsf_record r
    cdef object __weakref__

    def __cinit__(self):
        # Registry.add, the only one who can get here, fills in the id and the shard at once.
        self.r.place = WSF_NO_PLACE
        wsf_count_live(WSF_LIVE_RECORD, 1)

    def __dealloc__(self):
        cdef int i
        wsf_count_live(WSF_LIVE_RECORD, -1)
        for i in range(WSF_OBJECT_FIELDS):
            Py_XDECREF(self.r.objects[i])
        Py_XDECREF(self.r.user)
        Py_XDECREF(self.r.client_id)
        wsf_index_release_tags(&self.r)
        wsf_shard_release(self.r.shard)

    def __reduce__(self):
        raise TypeError("a ConnectionMeta cannot be copied or pickled")

    def __repr__(self):
        return f"<{type(self).__name__} {self.client_id!r} {self.status.name}>"

    @property
    def client_id(self):
        return <str>self.r.client_id

    @property
    def registry(self):
        if not wsf_record_attached(&self.r):
            return None
        weak = _settings_of(self).registry  # None if the registry has gone since
        return None if weak is None else weak()

    @property
    def attached(self):
        return wsf_record_attached(&self.r)

    # ---- objects of the application

    @property
    def conn(self):
        return wsf_object(wsf_record_read_conn(&self.r))

    @conn.setter
    def conn(self, value):
        _assign(self, &self.r.conn, value)

    @property
    def session(self):
        return wsf_object(wsf_record_read(&self.r, &self.r.objects[WSF_SESSION]))

    @session.setter
    def session(self, value):
        _assign(self, &self.r.objects[WSF_SESSION], value)

    @property
    def device_info(self):
        return wsf_object(wsf_record_read(&self.r, &self.r.objects[WSF_DEVICE_INFO]))

    @device_info.setter
    def device_info(self, value):
        _assign(self, &self.r.objects[WSF_DEVICE_INFO], value)

    @property
    def metadata(self):
        cdef _Extras extras = _extras_of(self)
        return _EMPTY_MAPPING if extras is None or extras.metadata is None else MappingProxyType(extras.metadata)

    @metadata.setter
    def metadata(self, value):
        cdef dict metadata = _mapping(value, "metadata", "metadata key", _settings_of(self).max_name_bytes)
        _update_extras(self, metadata, None)

    @property
    def version(self):
        cdef _Extras extras = _extras_of(self)
        return 0 if extras is None else extras.version

    @property
    def extensions(self):
        cdef _Extras extras = _extras_of(self)
        if extras is None or extras.extensions is None:
            if not wsf_record_attached(&self.r):
                return {}
            _update_extras(self, None, {}, keep=True)
            extras = _extras_of(self)
        return {} if extras is None else extras.extensions

    @extensions.setter
    def extensions(self, value):
        cdef dict extensions = _mapping(value, "extensions", "extension key", _settings_of(self).max_name_bytes)
        _update_extras(self, None, extensions)

    # ---- plain values

    @property
    def user_id(self):
        return wsf_object(wsf_index_user_of(&self.r.shard.core.index, &self.r))

    @user_id.setter
    def user_id(self, value):
        cdef str name = None if value is None else _name(value, "user id", _settings_of(self).max_name_bytes)
        _set_user(self, name)

    @property
    def device_type(self):
        return wsf_object(wsf_index_device_type_of(&self.r.shard.core.index, &self.r))

    @device_type.setter
    def device_type(self, value):
        cdef str name = None if value is None else _name(value, "device type", _settings_of(self).max_name_bytes)
        _set_device_type(self, name)

    @property
    def permissions(self):
        cdef PyObject *value = wsf_record_read(&self.r, &self.r.objects[WSF_PERMISSIONS])
        return _NO_PERMISSIONS if value == NULL else wsf_object(value)

    @permissions.setter
    def permissions(self, value):
        cdef _Settings settings = _settings_of(self)
        _assign_permissions(self, settings, settings.permission_set(value))

    @property
    def tags(self):
        cdef PyObject *mapping = wsf_index_tags_of(&self.r.shard.core.index, &self.r)
        return _EMPTY_MAPPING if mapping == NULL else MappingProxyType(wsf_object(mapping))

    @tags.setter
    def tags(self, value):
        _set_tags(self, _settings_of(self).tags(value), None)

    @property
    def status(self):
        cdef int status = wsf_record_status(&self.r)
        return ConnectionStatus.OFFLINE if status < 0 else _STATUSES[status]

    @status.setter
    def status(self, value):
        if not wsf_record_set_status(&self.r, <uint8_t>_status(value)):
            raise DetachedRecord(self.client_id)

    @property
    def quality(self):
        cdef wsf_record copy
        wsf_record_snapshot(&self.r, &copy)
        return Quality(copy.latency, copy.jitter, copy.loss)

    @quality.setter
    def quality(self, value):
        if not isinstance(value, Quality):
            raise TypeError(wrong_type("quality", "a Quality", value))
        latency, jitter, loss = value
        for name, number in (("latency", latency), ("jitter", jitter)):
            if not 0 <= number <= 1_000_000:
                raise InvalidSetting(f"quality.{name}", number, "from 0 to 1000000")
        if not 0 <= loss <= 1:
            raise InvalidSetting("quality.loss", loss, "from 0 to 1")
        if not wsf_record_set_quality(&self.r, latency, jitter, loss):
            raise DetachedRecord(self.client_id)

    @property
    def groups(self):
        cdef PyObject **names = NULL
        cdef int64_t i, count = wsf_index_groups_of(&self.r.shard.core.index, &self.r, &names)
        if count < 0:
            raise MemoryError
        return frozenset(_take_list(names, count))

    # ---- times

    @property
    def deadline_ns(self):
        cdef int64_t deadline_ns = wsf_record_deadline(&self.r)
        return None if deadline_ns == WSF_NEVER else deadline_ns

    @deadline_ns.setter
    def deadline_ns(self, value):
        cdef int64_t deadline_ns = WSF_NEVER
        cdef int overflow = 0
        if value is not None:
            if not PyLong_Check(value):
                raise TypeError(wrong_type("deadline_ns", "int or None", value))
            deadline_ns = PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow or deadline_ns < 0 or deadline_ns == WSF_NEVER:
                raise InvalidSetting("deadline_ns", value, "from 0 to 2**63 - 2")
        if not wsf_record_set_deadline(&self.r, deadline_ns):
            raise DetachedRecord(self.client_id)

    @property
    def created_ns(self):
        return self.r.created_ns

    @property
    def last_active_ns(self):
        return wsf_record_active(&self.r)

    @property
    def last_heartbeat_ns(self):
        cdef wsf_record copy
        wsf_record_snapshot(&self.r, &copy)
        return copy.heartbeat_ns if copy.has_heartbeat else None

    @property
    def created(self):
        return _wall_time(self, self.r.created_ns)

    @property
    def last_active(self):
        return _wall_time(self, wsf_record_active(&self.r))

    @property
    def last_heartbeat(self):
        heartbeat_ns = self.last_heartbeat_ns
        return None if heartbeat_ns is None else _wall_time(self, heartbeat_ns)

    @property
    def idle(self):
        # In objects, because the times may be as far apart as 64 bits reach.
        cdef object now_ns = _now_of(self, None)
        return max(0, now_ns - self.last_active_ns) / 1e9

    # ---- counters

    @property
    def messages_in(self):
        return self.r.messages_in

    @property
    def messages_out(self):
        return self.r.messages_out

    @property
    def bytes_in(self):
        return self.r.bytes_in

    @property
    def bytes_out(self):
        return self.r.bytes_out

    @property
    def errors_in(self):
        return self.r.errors_in

    @property
    def errors_out(self):
        return self.r.errors_out

    def touch(self, now_ns=None):
        wsf_record_touch(&self.r, _now_of(self, now_ns), False)

    def heartbeat(self, now_ns=None):
        wsf_record_touch(&self.r, _now_of(self, now_ns), True)

    def received(self, nbytes, messages=1):
        cdef int64_t size = _at_least(nbytes, "nbytes", 0)
        cdef int64_t count = _at_least(messages, "messages", 0)
        wsf_record_received(&self.r, _now_of(self, None), <uint64_t>count, <uint64_t>size)

    def sent(self, nbytes, messages=1):
        cdef int64_t size = _at_least(nbytes, "nbytes", 0)
        cdef int64_t count = _at_least(messages, "messages", 0)
        wsf_record_sent(&self.r, <uint64_t>count, <uint64_t>size)

    def failed(self, direction):
        if direction != "in" and direction != "out":
            raise InvalidSetting("direction", direction, "'in' or 'out'")
        wsf_record_failed(&self.r, direction == "in")


cdef void _sent(PyObject *meta, uint64_t messages, uint64_t bytes) noexcept:
    wsf_record_sent(&(<ConnectionMeta>meta).r, messages, bytes)


cdef void _heartbeat(PyObject *meta, int64_t now_ns) noexcept:
    wsf_record_touch(&(<ConnectionMeta>meta).r, now_ns, True)


cdef void _expect(PyObject *meta) noexcept:
    wsf_record_expect(&(<ConnectionMeta>meta).r)


cdef int64_t _active_ns(PyObject *meta) noexcept:
    return wsf_record_active(&(<ConnectionMeta>meta).r)


cdef int _status_of(PyObject *meta) noexcept:
    return wsf_record_status(&(<ConnectionMeta>meta).r)


cdef void _set_status(PyObject *meta, int status) noexcept:
    wsf_record_set_status(&(<ConnectionMeta>meta).r, <uint8_t>status)


cdef void _set_deadline(PyObject *meta, int64_t deadline_ns) noexcept:
    wsf_record_set_deadline(&(<ConnectionMeta>meta).r, deadline_ns)


cdef void _set_quality(PyObject *meta, float latency, float jitter, float loss) noexcept:
    wsf_record_set_quality(&(<ConnectionMeta>meta).r, latency, jitter, loss)


cdef PyObject *_find(PyObject *registry, PyObject *client_id) noexcept:
    return wsf_core_get((<Registry>registry).core, client_id)


cdef int _is_home(PyObject *registry, PyObject *meta) noexcept:
    if not wsf_record_attached(&(<ConnectionMeta>meta).r):
        return -1
    return (<ConnectionMeta>meta).r.shard.core == (<Registry>registry).core


cdef PyObject *_read_extras(PyObject *meta, wsf_metadata *metadata) noexcept:
    cdef PyObject *token = wsf_record_read(&(<ConnectionMeta>meta).r, &(<ConnectionMeta>meta).r.objects[WSF_EXTRAS])
    metadata.mapping = NULL
    metadata.version = metadata.nbytes = 0
    if token != NULL:
        metadata.version = (<_Extras>token).version
        if (<_Extras>token).metadata is not None:
            metadata.mapping = <PyObject *>(<_Extras>token).metadata
            metadata.nbytes = (<_Extras>token).nbytes
    return token


cdef object _next_extras(PyObject *token, object mapping, int64_t nbytes):
    if token == NULL:
        return _make_extras(<dict>mapping, None, 1, nbytes)
    return _make_extras(<dict>mapping, (<_Extras>token).extensions, (<_Extras>token).version + 1, nbytes)


cdef int _replace_extras(PyObject *meta, PyObject *expected, PyObject *token, PyObject **old) noexcept:
    cdef wsf_record *record = &(<ConnectionMeta>meta).r
    Py_INCREF(<object>token)  # for the field
    cdef int outcome = wsf_record_replace(record, &record.objects[WSF_EXTRAS], expected, token, old)
    if outcome != 1:
        Py_DECREF(<object>token)
    return outcome


# For the other modules of the core, which do this for thousands of records at a time.
cdef wsf_records _calls
_calls.sent = _sent
_calls.heartbeat = _heartbeat
_calls.expect = _expect
_calls.active_ns = _active_ns
_calls.status = _status_of
_calls.set_status = _set_status
_calls.set_deadline = _set_deadline
_calls.set_quality = _set_quality
_calls.find = _find
_calls.is_home = _is_home
_calls.read_extras = _read_extras
_calls.next_extras = _next_extras
_calls.replace_extras = _replace_extras
_record_calls = PyCapsule_New(&_calls, WSF_RECORDS_CAPSULE, NULL)


cdef object _refuse_record(PyTypeObject *kind, PyObject *args, PyObject *kwargs):
    raise TypeError("records are made by Registry.add")


# The constructor is for Registry.add alone. Subclasses inherit the refusal, and keep it unless they define __new__.
cdef newfunc _make_record = (<PyTypeObject *>ConnectionMeta).tp_new
(<PyTypeObject *>ConnectionMeta).tp_new = _refuse_record
(<PyTypeObject *>ConnectionMeta).tp_vectorcall = NULL  # which Cython may fill in to spare calls through tp_new


cdef list _take_list(PyObject **objects, int64_t count):
    """A list of `count` objects whose references are stolen, as is the memory of the array."""
    cdef int64_t i
    cdef list taken = []
    try:
        taken = PyList_New(count)
        for i in range(count):
            PyList_SET_ITEM(taken, i, objects[i])
        count = 0
    finally:
        for i in range(count):
            Py_DECREF(<object>objects[i])
        PyMem_Free(objects)
    return taken


cdef int _assign(ConnectionMeta meta, PyObject **field, object value) except -1:
    """Store an object, None as NULL, in a field of an attached record."""
    cdef PyObject *old = NULL
    cdef PyObject *stored = NULL if value is None else <PyObject *>value
    if stored != NULL:
        Py_INCREF(value)  # for the field; given back below if the record is detached
    if not wsf_record_swap(&meta.r, field, stored, &old):
        Py_XDECREF(stored)
        raise DetachedRecord(meta.client_id)
    Py_XDECREF(old)
    return 0


cdef int _assign_permissions(ConnectionMeta meta, _Settings settings, object value) except -1:
    """Give an attached record a permission set, or None."""
    cdef PyObject *old = NULL
    cdef PyObject *stored = NULL
    if value is not None:
        value = settings.use(value)
        Py_INCREF(value)  # for the field; given back below if the record is detached
        stored = <PyObject *>value
    if not wsf_record_swap(&meta.r, &meta.r.objects[WSF_PERMISSIONS], stored, &old):
        if stored != NULL:
            settings.give_back(value)
            Py_DECREF(value)
        raise DetachedRecord(meta.client_id)
    if old != NULL:
        settings.give_back(<object>old)
        Py_DECREF(<object>old)
    return 0


cdef inline void _give_back_shared(wsf_record *record) noexcept:
    """End the use of a permission set by a record that is detached or was never attached. It keeps the set."""
    if record.objects[WSF_PERMISSIONS] != NULL:
        _give_back_permissions(record)


cdef void _give_back_permissions(wsf_record *record) noexcept:
    cdef _Settings settings = _settings_of(<ConnectionMeta>wsf_record_object(record))
    settings.give_back(<object>record.objects[WSF_PERMISSIONS])


cdef inline _Extras _extras_of(ConnectionMeta meta):
    return <_Extras>wsf_object(wsf_record_read(&meta.r, &meta.r.objects[WSF_EXTRAS]))


cdef int _update_extras(ConnectionMeta meta, dict metadata, dict extensions, bint keep=False) except -1:
    """Put metadata or extensions (the one that is not None) in the place of the former ones, or with `keep` only where
    there were none. A detached record is an error unless `keep` is set."""
    cdef _Extras former, extras
    cdef PyObject *old = NULL
    cdef PyObject *expected
    cdef int outcome = -1
    while outcome < 0:  # until no other thread changed them in between
        former = _extras_of(meta)
        expected = NULL if former is None else <PyObject *>former
        if keep and former is not None and former.extensions is not None:
            return 0
        if metadata is not None:
            extras = _next_extras(expected, metadata, -1)
        elif former is None:
            extras = _make_extras(None, extensions)
        else:
            extras = _make_extras(former.metadata, extensions, former.version, former.nbytes)
        outcome = _replace_extras(<PyObject *>meta, expected, <PyObject *>extras, &old)
    if outcome == 0 and not keep:
        raise DetachedRecord(meta.client_id)
    Py_XDECREF(old)
    return 0


cdef int _check_outcome(ConnectionMeta meta, int outcome) except -1:
    """Raise what a call of the index reports."""
    if outcome == WSF_NO_MEMORY:
        raise MemoryError
    if outcome == WSF_DETACHED:
        raise DetachedRecord(meta.client_id)
    if outcome == WSF_TOO_MANY:
        raise LimitExceeded("groups of one connection", _settings_of(meta).max_groups)
    return 0


ctypedef int (*_name_setter)(wsf_index *, wsf_record *, PyObject *, wsf_trash *) noexcept


cdef inline int _set_name(ConnectionMeta meta, _name_setter setter, str name) except -1:
    cdef wsf_trash trash
    wsf_trash_init(&trash)
    cdef int outcome = setter(
        &meta.r.shard.core.index, &meta.r, NULL if name is None else <PyObject *>name, &trash
    )
    wsf_trash_release(&trash)
    return _check_outcome(meta, outcome)


cdef int _set_user(ConnectionMeta meta, str name) except -1:
    return _set_name(meta, wsf_index_set_user, name)


cdef int _set_device_type(ConnectionMeta meta, str name) except -1:
    return _set_name(meta, wsf_index_set_device_type, name)


cdef int _set_tags(ConnectionMeta meta, dict tags, str device_type) except -1:
    """Give a record these tags, which are checked and not changed any more, and a device type unless it is None."""
    cdef wsf_trash trash
    cdef list keys = list(tags)
    cdef list values = list(tags.values())
    cdef wsf_tag_names names
    cdef int outcome
    names.keys = PySequence_Fast_ITEMS(keys)
    names.values = PySequence_Fast_ITEMS(values)
    names.count = <uint32_t>len(keys)
    names.mapping = NULL
    wsf_trash_init(&trash)
    outcome = _set_tag_names(&meta.r, &names, device_type, &trash)
    if outcome == WSF_NEEDS_MAPPING:
        names.mapping = <PyObject *>tags
        outcome = _set_tag_names(&meta.r, &names, device_type, &trash)
    wsf_trash_release(&trash)
    return _check_outcome(meta, outcome)


cdef inline int _set_tag_names(wsf_record *record, wsf_tag_names *names, str device_type, wsf_trash *trash) noexcept:
    cdef wsf_index *index = &record.shard.core.index
    if device_type is None:
        return wsf_index_set_tags(index, record, names, trash)
    return wsf_index_set_tags_and_device_type(index, record, names, <PyObject *>device_type, trash)


cdef inline void _set_field(PyObject **field, object value) noexcept:
    """Fill an object field of a record that no other thread knows yet; None is NULL."""
    if value is not None:
        Py_INCREF(value)  # for the record
        field[0] = <PyObject *>value


cdef inline bint _has_turn(ConnectionMeta meta, uint32_t statuses) noexcept:
    """Whether a walk may yield a record that it has collected before."""
    cdef int status = wsf_record_status(&meta.r)
    return status >= 0 and (statuses >> status & 1) != 0


cdef inline ConnectionMeta _record_of(object meta):
    if not isinstance(meta, ConnectionMeta):
        raise TypeError(wrong_type("meta", "a ConnectionMeta", meta))
    return <ConnectionMeta>meta


# ---- the registry ------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear  # the core borrows the settings
cdef class _Core:
    """Owns the core for the registry, so that it goes after the last method that could use it."""

    cdef wsf_core *core
    cdef _Settings settings

    def __dealloc__(self):
        if self.core != NULL:
            wsf_core_orphan(self.core)
            wsf_core_release(self.core)


cdef object _finish(wsf_record *record, wsf_trash *trash):
    """The second half of a removal. Returns the detached record; the registry's reference to it is stolen."""
    wsf_core_forget(record, trash)
    _give_back_shared(record)
    wsf_trash_release(trash)
    return wsf_object(wsf_record_object(record))


cdef int64_t _clear(wsf_core *core) except -1:
    """Remove what a walk meets. What a destructor adds meanwhile takes a freed slot, which the walk has passed."""
    cdef wsf_cursor cursor
    cdef int64_t removed = 0
    cdef list batch
    cursor.shard = cursor.slot = 0
    while batch := _collect(core, &cursor, WSF_ANY_STATUS, NULL, 0, 100):
        for meta in batch:
            removed += _detach(<ConnectionMeta>meta)
    return removed


cdef bint _detach(ConnectionMeta meta) except -1:
    """Remove a record from its registry, unless it has left already."""
    cdef wsf_trash trash
    cdef wsf_record *record
    wsf_trash_init(&trash)
    record = wsf_core_detach_record(&meta.r, &trash)
    if record == NULL:
        return False
    _finish(record, &trash)
    return True


@cython.final
@cython.no_gc
cdef class _Filter:
    """Filters, checked (`Filters` in wsfast/connection.py). A name that nobody can have is like one that nobody has."""

    cdef wsf_term few[4]
    cdef wsf_term *terms  # those that are not negated come first; the names are owned
    cdef uint32_t count, capacity, positive
    cdef uint32_t statuses  # bits

    def __cinit__(self):
        self.terms = self.few
        self.capacity = sizeof(self.few) // sizeof(wsf_term)
        self.statuses = WSF_ANY_STATUS

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.count):
            Py_XDECREF(self.terms[i].name)
            Py_XDECREF(self.terms[i].value)
        if self.terms != self.few:
            PyMem_Free(self.terms)

    cdef int reserve(self) except -1:
        cdef wsf_term *larger
        if self.count < self.capacity:
            return 0
        larger = <wsf_term *>PyMem_Malloc(2 * self.capacity * sizeof(wsf_term))
        if larger == NULL:
            raise MemoryError
        memcpy(larger, self.terms, self.count * sizeof(wsf_term))
        if self.terms != self.few:
            PyMem_Free(self.terms)
        self.terms = larger
        self.capacity *= 2
        return 0

    cdef int add(self, int kind, bint negated, str name, str value=None) except -1:
        cdef wsf_term *term
        self.reserve()
        term = &self.terms[self.count]
        term.kind = kind
        term.negated = negated
        Py_INCREF(name)  # for the term, as is the value
        term.name = <PyObject *>name
        term.value = NULL
        if value is not None:
            Py_INCREF(value)
            term.value = <PyObject *>value
        self.count += 1
        if not negated:
            self.positive = self.count
        return 0

    cdef int add_names(self, int kind, bint negated, object names, str what) except -1:
        """One name or several."""
        if not _is_several(names):
            return self.add(kind, negated, exact_text(names, what))
        for name in names:
            self.add(kind, negated, exact_text(name, what))
        return 0

    cdef int add_tags(self, bint negated, object tags) except -1:
        if not _is_several(tags):
            return self.add_tag(negated, tags)
        for tag in tags:
            self.add_tag(negated, tag)
        return 0

    cdef int add_tag(self, bint negated, object tag) except -1:
        if PyUnicode_Check(tag):
            return self.add(WSF_HAS_TAG_KEY, negated, exact_text(tag, "tag key"))
        if not isinstance(tag, tuple) or len(<tuple>tag) != 2:
            raise TypeError(wrong_type("tag", "a key or a (key, value) pair", tag))
        key, value = <tuple>tag
        return self.add(WSF_HAS_TAG, negated, exact_text(key, "tag key"), exact_text(value, "tag value"))

    cdef int exclude_statuses(self, object statuses) except -1:
        for status in statuses if _is_several(statuses) else (statuses,):
            self.statuses &= ~(<uint32_t>1 << _status(status))
        return 0


cdef inline bint _is_several(object value) noexcept:
    return isinstance(value, (list, set, frozenset))


cdef _Filter _make_filter(
    object group, object user, object tag, object status, object device_type, object not_group, object not_user,
    object not_tag, object not_status, object not_device_type
):
    cdef _Filter wanted = _Filter.__new__(_Filter)
    if group is not None:
        wanted.add_names(WSF_IN_GROUP, False, group, "group name")
    if user is not None:
        wanted.add(WSF_OF_USER, False, exact_text(user, "user id"))
    if tag is not None:
        wanted.add_tags(False, tag)
    if status is not None:
        wanted.statuses = <uint32_t>1 << _status(status)
    if device_type is not None:
        wanted.add(WSF_OF_DEVICE_TYPE, False, exact_text(device_type, "device type"))
    if not_group is not None:
        wanted.add_names(WSF_IN_GROUP, True, not_group, "group name")
    if not_user is not None:
        wanted.add_names(WSF_OF_USER, True, not_user, "user id")
    if not_tag is not None:
        wanted.add_tags(True, not_tag)
    if not_status is not None:
        wanted.exclude_statuses(not_status)
    if not_device_type is not None:
        wanted.add_names(WSF_OF_DEVICE_TYPE, True, not_device_type, "device type")
    return wanted


cdef list _members(wsf_core *core, const wsf_term *terms, uint32_t count):
    """The records for which all terms hold now. One of them at least is not negated."""
    cdef PyObject **found = NULL
    cdef int64_t selected = wsf_index_select(&core.index, terms, count, UINT64_MAX, &found)
    if selected < 0:
        raise MemoryError
    return _take_list(found, selected)


cdef list _members_of(wsf_core *core, int kind, str name):
    cdef wsf_term term
    term.kind = kind
    term.negated = False
    term.name = <PyObject *>name
    term.value = NULL
    return _members(core, &term, 1)


cdef int64_t _keep(wsf_core *core, const wsf_term *terms, uint32_t count, PyObject **some, size_t found) except -1:
    """Keep those of `found` objects of records for which all terms hold; the references to the others are given up."""
    cdef int64_t kept = <int64_t>found
    cdef size_t i
    if count != 0 and found != 0:
        kept = wsf_index_keep(&core.index, terms, count, some, found)
        for i in range(0 if kept < 0 else <size_t>kept, found):
            Py_DECREF(<object>some[i])
    if kept < 0:
        raise MemoryError
    return kept


cdef list _collect(
    wsf_core *core, wsf_cursor *cursor, uint32_t statuses, const wsf_term *terms, uint32_t count, int64_t size
):
    """The next `size` records of a walk over the slots that have one of the statuses, and for which all terms hold;
    fewer at the end, none after it."""
    cdef PyObject *some[128]
    cdef list batch = None
    cdef int64_t i, kept
    cdef size_t room, found
    while size > 0:
        room = <size_t>min(size, 128)
        found = wsf_core_collect(core, cursor, statuses, some, room)
        kept = _keep(core, terms, count, some, found)
        if batch is None:
            batch = PyList_New(<Py_ssize_t>kept)
            for i in range(kept):
                PyList_SET_ITEM(batch, <Py_ssize_t>i, some[i])
        else:
            for i in range(kept):
                batch.append(wsf_object(some[i]))
        size -= kept
        if found < room:
            break
    return batch


@cython.final
@cython.no_gc
cdef class _Walk:
    """The records that filters ask for, batch by batch. Whoever walks keeps the registry, and so the core."""

    cdef wsf_core *core
    cdef _Filter wanted
    cdef wsf_cursor cursor  # without a term that names members
    cdef list members  # with one: those at the first batch
    cdef Py_ssize_t position

    cdef list next_batch(self, int64_t size):
        """The next `size` records; fewer at the end, none after it."""
        cdef _Filter wanted = self.wanted
        if wanted.positive == 0:
            return _collect(self.core, &self.cursor, wanted.statuses, wanted.terms, wanted.count, size)
        if self.members is None:
            self.members = _members(self.core, wanted.terms, wanted.positive)
        return self.next_members(size)

    cdef list next_members(self, int64_t size):
        cdef PyObject *some[128]
        cdef _Filter wanted = self.wanted
        cdef list batch = []
        cdef int64_t i, kept
        cdef size_t room, found
        cdef ConnectionMeta meta
        while len(batch) < size and self.position < len(self.members):
            room = <size_t>min(size - len(batch), 128)
            found = 0
            while found < room and self.position < len(self.members):
                meta = <ConnectionMeta>self.members[self.position]
                self.position += 1
                if _has_turn(meta, wanted.statuses):
                    Py_INCREF(meta)  # for the batch
                    some[found] = <PyObject *>meta
                    found += 1
            kept = _keep(self.core, wanted.terms + wanted.positive, wanted.count - wanted.positive, some, found)
            for i in range(kept):
                batch.append(wsf_object(some[i]))
        return batch


cdef inline _Walk _make_walk(wsf_core *core, _Filter wanted):
    cdef _Walk walk = _Walk.__new__(_Walk)
    walk.core = core
    walk.wanted = wanted
    return walk


cdef list _prepared_ids(object client_ids):
    """A list of exact str, all hashed, that no other code holds."""
    return [exact_text(client_id, "client id") for client_id in client_ids]


class _Keys(KeysView):
    __slots__ = ()

    def __iter__(self):
        return iter(self._mapping)


class _Values(ValuesView):
    __slots__ = ()

    def __iter__(self):
        return _records(self._mapping)

    def __contains__(self, value):
        return isinstance(value, ConnectionMeta) and value.registry is self._mapping


class _Items(ItemsView):
    __slots__ = ()

    def __iter__(self):
        for meta in _records(self._mapping):
            yield (<ConnectionMeta>meta).client_id, meta


def _records(Registry registry):
    """Each record of the registry that is attached when its turn comes."""
    cdef wsf_cursor cursor
    cdef list batch
    cursor.shard = cursor.slot = 0
    while True:
        batch = _collect(registry.core, &cursor, WSF_ANY_STATUS, NULL, 0, 100)
        if not batch:
            return
        for meta in batch:
            if wsf_record_attached(&(<ConnectionMeta>meta).r):
                yield meta


cdef type _record_type(object kind):
    """The class of the records. It may add no field: records drop all that could be part of a cycle when they are removed,
    and the collector does not see them."""
    if kind is None:
        return ConnectionMeta
    if not isinstance(kind, type) or not issubclass(kind, ConnectionMeta) or (
        kind.__basicsize__ != ConnectionMeta.__basicsize__ or kind.__dictoffset__ != 0
    ):
        raise TypeError("record_type must be a subclass of ConnectionMeta with empty __slots__")
    return kind


@cython.collection_type("mapping")
@cython.no_gc_clear  # the core must be there as long as a method can be called
cdef class Registry:
    cdef wsf_core *core  # of `holder`
    cdef _Core holder
    cdef _Settings settings
    cdef object __weakref__
    cdef public object owner

    def __cinit__(
        self, shards=64, *, max_id_bytes=256, max_name_bytes=256, max_tags=64, max_groups=1024, clock=None,
        wall_clock=None, record_type=None
    ):
        cdef int64_t count = _int64(shards, "shards")
        cdef _Settings settings = _Settings.__new__(_Settings)
        if not 1 <= count <= WSF_MAX_SHARDS or count & (count - 1):
            raise InvalidSetting("shards", shards, f"a power of two from 1 to {WSF_MAX_SHARDS}")
        settings.max_id_bytes = _at_least(max_id_bytes, "max_id_bytes", 1)
        settings.max_name_bytes = _at_least(max_name_bytes, "max_name_bytes", 1)
        settings.max_tags = _at_least(max_tags, "max_tags", 0)
        settings.max_groups = _at_least(max_groups, "max_groups", 0)
        settings.clock = None if clock is monotonic_ns else clock
        settings.wall_clock = time if wall_clock is None else wall_clock
        settings.record_type = _record_type(record_type)
        settings.registry = ref(self)
        settings.values = {}
        self.settings = settings
        self.holder = _Core.__new__(_Core)
        self.holder.settings = settings
        self.holder.core = wsf_core_new(<uint32_t>count, <PyObject *>settings, settings.clock is None)
        if self.holder.core == NULL:
            raise MemoryError
        self.core = self.holder.core

    def __del__(self):
        # Not in the destructor: dropping records runs code of the application, which may take references to this object.
        if self.core != NULL:
            _clear(self.core)
        if self.core != NULL and wsf_core_is_shared(self.core):  # there are records that outlive it
            self.settings.remember_the_end(self.core)

    def __reduce__(self):
        raise TypeError("a Registry cannot be copied or pickled")

    def __repr__(self):
        return f"<{type(self).__name__} with {len(self)} connections in {self.core.shard_count} shards>"

    @property
    def shards(self):
        return self.core.shard_count

    @property
    def max_id_bytes(self):
        return self.settings.max_id_bytes

    @property
    def max_name_bytes(self):
        return self.settings.max_name_bytes

    @property
    def max_tags(self):
        return self.settings.max_tags

    @property
    def max_groups(self):
        return self.settings.max_groups

    # ---- changes

    def add(
        self, client_id, conn=None, *, user_id=None, device_type=None, device_info=None, session=None, permissions=(),
        tags=None, metadata=None, extensions=None, groups=(), status=..., on_duplicate="reject"
    ):
        # Nothing that other threads use too is referred to by a variable of its own, nor is it the default of an argument:
        # without the GIL, counting the references to one object is what threads would meet in.
        cdef int64_t limit = self.settings.max_name_bytes
        cdef uint32_t fnv1a = 0
        cdef str key = _name_hashed(client_id, "client id", self.settings.max_id_bytes, &fnv1a)
        wsf_shard_expect(&self.core.shards[wsf_route(fnv1a, self.core.shard_count - 1)])
        cdef str user = None if user_id is None else _name(user_id, "user id", limit)
        cdef dict tag_values, metadata_values, extension_values
        cdef list group_names
        cdef str device = None if device_type is None else _name(device_type, "device type", limit)
        allowed = None if permissions is () else self.settings.permission_set(permissions)
        tag_values = None if tags is None else self.settings.tags(tags)
        metadata_values = None if metadata is None else _mapping(metadata, "metadata", "metadata key", limit)
        extension_values = None if extensions is None else _mapping(extensions, "extensions", "extension key", limit)
        group_names = None if groups is () else _names(groups, "groups", "group name", limit)
        if group_names is not None and len(group_names) > self.settings.max_groups:
            raise LimitExceeded("groups of one connection", self.settings.max_groups)
        cdef int state = _ONLINE_STATE if status is ... else _status(status)
        if on_duplicate != "reject" and on_duplicate != "replace":
            raise InvalidSetting("on_duplicate", on_duplicate, "'reject' or 'replace'")

        cdef ConnectionMeta meta = self._new_record(key, fnv1a)
        _set_field(&meta.r.objects[WSF_SESSION], session)
        _set_field(&meta.r.objects[WSF_DEVICE_INFO], device_info)
        if metadata_values or extension_values:
            _set_field(&meta.r.objects[WSF_EXTRAS], _make_extras(metadata_values, extension_values))
        if allowed is not None:
            _set_field(&meta.r.objects[WSF_PERMISSIONS], self.settings.use(allowed))
        self._attach(meta, conn, state, on_duplicate == "replace")
        try:
            self._index(meta, user, device, tag_values, group_names)
        except BaseException:
            self.remove(meta)
            raise
        return meta

    cdef ConnectionMeta _new_record(self, str key, uint32_t fnv1a):
        cdef PyTypeObject *kind = <PyTypeObject *>self.settings.record_type
        cdef int64_t now_ns = _clock_of(self.core)
        cdef ConnectionMeta meta = <ConnectionMeta>_make_record(kind, <PyObject *>_NO_ARGUMENTS, NULL)
        if kind.tp_flags & Py_TPFLAGS_HAVE_GC:
            PyObject_GC_UnTrack(<PyObject *>meta)  # as every subclass written in Python
        Py_INCREF(key)  # for the record
        meta.r.client_id = <PyObject *>key
        meta.r.shard = &self.core.shards[wsf_route(fnv1a, self.core.shard_count - 1)]
        meta.r.created_ns = now_ns
        wsf_shard_retain(meta.r.shard)
        return meta

    cdef int _attach(self, ConnectionMeta meta, object conn, int status, bint replace) except -1:
        cdef wsf_trash trash
        cdef wsf_record *replaced = NULL
        cdef int outcome
        _set_field(&meta.r.conn, conn)
        wsf_trash_init(&trash)
        outcome = wsf_core_attach(&meta.r, <uint8_t>status, replace, &replaced, &trash)
        if outcome != WSF_OK:
            Py_XDECREF(meta.r.conn)
            meta.r.conn = NULL
            _give_back_shared(&meta.r)
            if outcome == WSF_NO_MEMORY:
                raise MemoryError
            raise DuplicateConnection(meta.client_id)
        if replaced != NULL:
            _finish(replaced, &trash)
        return 0

    cdef int _index(self, ConnectionMeta meta, str user, str device_type, dict tags, list groups) except -1:
        """Put a record that was just attached into the indexes. Another thread may have removed it by now."""
        cdef str group
        try:
            if user is not None:
                _set_user(meta, user)
            if tags:
                _set_tags(meta, tags, device_type)
            elif device_type is not None:
                _set_device_type(meta, device_type)
            if groups is not None:
                for group in groups:
                    self._join(meta, group)
        except DetachedRecord:
            pass  # then it is in no index, and its remover has it
        return 0

    def remove(self, client_id):
        cdef wsf_trash trash
        cdef wsf_record *record
        cdef str key
        if isinstance(client_id, ConnectionMeta):
            return self._remove_record(<ConnectionMeta>client_id)
        key = exact_text(client_id, "client id")
        wsf_trash_init(&trash)
        record = wsf_core_detach_id(self.core, <PyObject *>key, &trash)
        return None if record == NULL else _finish(record, &trash)

    cdef object _remove_record(self, ConnectionMeta meta):
        if not wsf_record_attached(&meta.r):
            return None
        if meta.r.shard.core != self.core:
            raise ForeignRecord(meta.client_id)
        return meta if _detach(meta) else None

    def clear(self):
        return _clear(self.core)

    # ---- lookups

    def __getitem__(self, client_id):
        cdef str key = exact_text(client_id, "client id")
        cdef PyObject *found = wsf_core_get(self.core, <PyObject *>key)
        if found == NULL:
            raise UnknownConnection(key)
        return wsf_object(found)

    def get(self, client_id, default=None):
        cdef PyObject *found
        if PyUnicode_CheckExact(client_id):
            PyObject_Hash(client_id)
            found = wsf_core_get(self.core, <PyObject *>client_id)
        else:
            client_id = exact_text(client_id, "client id")
            found = wsf_core_get(self.core, <PyObject *>client_id)
        return default if found == NULL else wsf_object(found)

    def get_many(self, client_ids):
        cdef list found
        cdef object ids = client_ids
        cdef PyObject **items
        cdef PyObject **out
        cdef Py_ssize_t count, begin, chunk, i
        if WSF_FREE_THREADED or not (PyList_CheckExact(ids) or PyTuple_CheckExact(ids)):
            ids = tuple(ids)  # borrowing from a list that another thread may change is not safe
        found = PyList_New(len(ids))  # may run the collector: `ids` is looked at after this
        count = len(found)
        if len(ids) != count:
            return self.get_many(tuple(ids))
        items = PySequence_Fast_ITEMS(ids)
        out = PySequence_Fast_ITEMS(found)
        for begin in range(0, count, WSF_CHUNK):
            chunk = min(count - begin, WSF_CHUNK)
            if wsf_ids_prepare(items + begin, <size_t>chunk) != <size_t>chunk:
                ids = _prepared_ids(ids)  # raises, or there are subclasses of str
                items = PySequence_Fast_ITEMS(ids)
            wsf_core_get_many(self.core, items + begin, out + begin, <size_t>chunk)
            for i in range(begin, begin + chunk):
                if out[i] == NULL:
                    Py_INCREF(None)
                    out[i] = Py_None
        return found

    def __contains__(self, client_id):
        cdef str key = exact_text(client_id, "client id")
        return wsf_core_contains(self.core, <PyObject *>key)

    def __len__(self):
        return <Py_ssize_t>wsf_core_size(self.core)

    def __bool__(self):
        return True

    def __iter__(self):
        for meta in _records(self):
            yield (<ConnectionMeta>meta).client_id

    def keys(self):
        return _Keys(self)

    def values(self):
        return _Values(self)

    def items(self):
        return _Items(self)

    def shard_of(self, client_id):
        cdef uint32_t fnv1a = 0
        _name_hashed(client_id, "client id", self.settings.max_id_bytes, &fnv1a)
        return wsf_route(fnv1a, self.core.shard_count - 1)

    # ---- walks

    def batches(
        self, size=100, *, group=None, user=None, tag=None, status=None, device_type=None, not_group=None,
        not_user=None, not_tag=None, not_status=None, not_device_type=None
    ):
        cdef int64_t most = _at_least(size, "size", 1)
        cdef _Filter wanted = _make_filter(
            group, user, tag, status, device_type, not_group, not_user, not_tag, not_status, not_device_type
        )
        return self._batches(most, wanted)

    def _batches(self, int64_t size, _Filter wanted):
        cdef _Walk walk = _make_walk(self.core, wanted)
        cdef list batch
        while batch := walk.next_batch(size):
            yield batch

    def for_each(
        self, fn, *, group=None, user=None, tag=None, status=None, device_type=None, not_group=None, not_user=None,
        not_tag=None, not_status=None, not_device_type=None
    ):
        cdef _Filter wanted = _make_filter(
            group, user, tag, status, device_type, not_group, not_user, not_tag, not_status, not_device_type
        )
        cdef _Walk walk = _make_walk(self.core, wanted)
        cdef int64_t calls = 0
        cdef list batch
        cdef ConnectionMeta meta
        while batch := walk.next_batch(100):
            for meta in batch:
                if _has_turn(meta, wanted.statuses):
                    calls += 1
                    if fn(meta) is False:
                        return calls
        return calls

    def select(
        self, *, group=None, user=None, tag=None, status=None, device_type=None, not_group=None, not_user=None,
        not_tag=None, not_status=None, not_device_type=None
    ):
        cdef PyObject **found = NULL
        cdef _Filter wanted = _make_filter(
            group, user, tag, status, device_type, not_group, not_user, not_tag, not_status, not_device_type
        )
        cdef int64_t selected = wsf_core_select(self.core, wanted.terms, wanted.count, wanted.statuses, &found)
        if selected < 0:
            raise MemoryError
        return _take_list(found, selected)

    # ---- indexes

    def join(self, meta, group):
        cdef ConnectionMeta record = _record_of(meta)
        cdef str name = _name(group, "group name", self.settings.max_name_bytes)
        self._check_home(record)
        return self._join(record, name)

    cdef bint _join(self, ConnectionMeta meta, str group) except -1:
        cdef uint32_t most = <uint32_t>min(self.settings.max_groups, 0xFFFFFFFF)
        cdef int outcome = wsf_index_join(&self.core.index, &meta.r, <PyObject *>group, most)
        _check_outcome(meta, outcome)
        return outcome

    def leave(self, meta, group):
        cdef ConnectionMeta record = _record_of(meta)
        cdef str name = exact_text(group, "group name")
        cdef wsf_trash trash
        cdef int outcome
        self._check_home(record)
        wsf_trash_init(&trash)
        outcome = wsf_index_leave(&self.core.index, &record.r, <PyObject *>name, &trash)
        wsf_trash_release(&trash)
        _check_outcome(record, outcome)
        return outcome == 1

    cdef int _check_home(self, ConnectionMeta meta) except -1:
        if not wsf_record_attached(&meta.r):
            raise DetachedRecord(meta.client_id)
        if meta.r.shard.core != self.core:
            raise ForeignRecord(meta.client_id)
        return 0

    def group(self, name):
        return _members_of(self.core, WSF_IN_GROUP, exact_text(name, "group name"))

    def by_user(self, user_id):
        return _members_of(self.core, WSF_OF_USER, exact_text(user_id, "user id"))

    def groups(self):
        cdef PyObject **names = NULL
        cdef uint32_t *sizes = NULL
        cdef int64_t count = wsf_index_groups(&self.core.index, &names, &sizes)
        if count < 0:
            PyMem_Free(names)
            PyMem_Free(sizes)
            raise MemoryError
        try:
            return {name: sizes[i] for i, name in enumerate(_take_list(names, count))}
        finally:
            PyMem_Free(sizes)

    def due(self, now, limit=1000):
        cdef int64_t now_ns = _int64(now, "now")
        cdef int64_t most = min(_at_least(limit, "limit", 1), <int64_t>wsf_core_size(self.core))
        cdef wsf_due_entry *entries
        cdef list found = []
        cdef size_t i, some
        cdef uint32_t shard
        if most == 0:
            return found
        entries = <wsf_due_entry *>PyMem_Malloc(<size_t>most * sizeof(wsf_due_entry))
        if entries == NULL:
            raise MemoryError
        try:
            for shard in range(self.core.shard_count):
                some = wsf_shard_due(&self.core.shards[shard], now_ns, entries, <size_t>most)
                for i in range(some):
                    found.append(wsf_object(entries[i].object))
                most -= <int64_t>some
                if most == 0:
                    break
        finally:
            PyMem_Free(entries)
        return found

    # ---- figures

    def now_ns(self):
        return _clock_of(self.core)

    def changes(self):
        cdef uint64_t adds = 0, removes = 0
        cdef uint32_t shard
        for shard in range(self.core.shard_count):
            adds += self.core.shards[shard].counters.adds
            removes += self.core.shards[shard].counters.removes
        return adds, removes

    def shard_stats(self):
        cdef wsf_shard_figures figures
        cdef uint32_t shard
        cdef list stats = []
        for shard in range(self.core.shard_count):
            wsf_shard_measure(&self.core.shards[shard], &figures)
            stats.append({
                "connections": figures.connections,
                "adds": figures.counters.adds,
                "removes": figures.counters.removes,
                "messages_in": figures.counters.messages_in,
                "messages_out": figures.counters.messages_out,
                "bytes_in": figures.counters.bytes_in,
                "bytes_out": figures.counters.bytes_out,
                "errors_in": figures.counters.errors_in,
                "errors_out": figures.counters.errors_out,
                "longest_probe": figures.longest_probe,
            })
        return stats

    def stats(self):
        cdef uint32_t groups = 0, users = 0, tags = 0
        cdef dict total = {}
        for shard in self.shard_stats():
            for name, value in shard.items():
                total[name] = max(total.get(name, 0), value) if name == "longest_probe" else total.get(name, 0) + value
        wsf_index_sizes(&self.core.index, &groups, &users, &tags)
        total["shards"] = self.core.shard_count
        total["groups"] = groups
        total["users"] = users
        total["tags"] = tags
        return total

    def __sizeof__(self):
        cdef Py_ssize_t record_size = ConnectionMeta.__basicsize__
        cdef Py_ssize_t core_bytes = <Py_ssize_t>wsf_core_bytes(self.core) + self.settings.values_bytes()
        return core_bytes + len(self) * record_size + object.__sizeof__(self)

    def _check(self):
        """Abort if an invariant is broken; does something in a debug build only, with no other thread at work."""
        wsf_core_check(self.core)


Mapping.register(Registry)


# ---- functions ---------------------------------------------------------------------------------------------------------


cdef bytes _bytes_of(object data):
    return <bytes>data if type(data) is bytes else memoryview(data).tobytes()


def fnv1_32(data, /):
    cdef bytes octets = _bytes_of(data)
    return wsf_fnv1_32(<const uint8_t *><const char *>octets, <size_t>len(octets))


def fnv1a_32(data, /):
    cdef bytes octets = _bytes_of(data)
    return wsf_fnv1a_32(<const uint8_t *><const char *>octets, <size_t>len(octets))


def _live():
    """Live objects of the core by kind in a debug build; None otherwise."""
    cdef int64_t *counters = wsf_live_counters()
    if counters == NULL:
        return None
    kinds = ("records", "registries", "blocks", "sets", "tagsets", "allocations")
    return {kind: counters[i] for i, kind in enumerate(kinds)}
