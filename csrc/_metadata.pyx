# cython: language_level=3, freethreading_compatible=True
"""The metadata of the connections of one registry: checked, versioned, announced. The contract is in
wsfast/_metadata.pyi.

It hides how a change is made in one step against other threads, and announced in order. What a record has of metadata
is one token that is never changed (records.h): a change makes the next one and puts it in the place of the one it was
made from, or begins again. Where it is to be announced, that and its place in the queue are one step, under the lock of
the queue; it is the one lock under which another, that of a shard, is taken. Everything that could run Python code is
made before.

A token that was made for one record serves each record that has the same former one: a change for ten thousand
connections without metadata makes one dict.
"""

cimport cython
from cpython.contextvars cimport PyContextVar_Reset, PyContextVar_Set, get_value
from cpython.dict cimport PyDict_Copy
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_Import
from cpython.ref cimport Py_XDECREF
from libc.stdint cimport int64_t

from arguments cimport exact_int64, exact_text, wrong_type
from records cimport WSF_RECORDS_CAPSULE, wsf_metadata, wsf_records

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from inspect import iscoroutinefunction
from itertools import chain
from sys import getsizeof
from types import MappingProxyType

from wsfast._core import ConnectionMeta, Registry
from wsfast.connection import MISSING, Snapshot, UpdateReport
from wsfast.errors import (
    DetachedRecord,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    MetadataRejected,
    Problem,
    UnknownConnection,
    VersionConflict,
)

cdef extern from "platform.h":
    ctypedef struct wsf_lock:
        pass
    void WSF_LOCK(wsf_lock *lock) noexcept
    void WSF_UNLOCK(wsf_lock *lock) noexcept
    int64_t WSF_ADD64(int64_t *number, int64_t n) noexcept

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept
    unsigned long PyLong_AsUnsignedLongMask(object value) except? <unsigned long>-1
    bint PyUnicode_Check(object value)
    bint PyUnicode_IS_ASCII(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    int PyUnicode_KIND(object text)
    const void *PyUnicode_DATA(object text)
    Py_UCS4 PyUnicode_READ(int kind, const void *data, Py_ssize_t at)
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

__all__ = ["Change", "Metadata", "size_of"]

cdef wsf_records *_records = <wsf_records *>PyCapsule_Import(WSF_RECORDS_CAPSULE, 0)

cdef object _NOTHING = MappingProxyType({})
cdef object _UNSET = object()
cdef int64_t _NO_LIMIT = 0x7FFFFFFFFFFFFFFF
# No setting is larger: more than an address space holds, and sums of many such still fit.
cdef int64_t _MOST = 1 << 48
cdef int64_t _TOO_DEEP = -1
cdef int _MOST_LEVELS = 32
# Of a container, for what it is itself.
cdef int64_t _CONTAINER_BYTES = 8
# Connections that are changed together before that is announced: few enough to be in the caches still.
cdef Py_ssize_t _UNANNOUNCED = 256
# Keys whose rules are remembered. Keys are the program's own words, unless it lets strangers choose them.
cdef Py_ssize_t _MOST_PLANS = 1024

# How many changes have led to the one that is being announced, in the contexts that come from that.
cdef object _depth = ContextVar("wsfast_metadata_depth", default=0)


# ---- arguments -------------------------------------------------------------------------------------------------------


cdef int64_t _setting(object value, str name, int64_t least) except -1:
    cdef int64_t number = exact_int64(value, name, "int")
    if number < least:
        raise InvalidSetting(name, value, f"{least} or more")
    return min(number, _MOST)


cdef object _condition(object if_version):
    """An exact int, or None."""
    if if_version is None:
        return None
    if not isinstance(if_version, int):
        raise TypeError(wrong_type("if_version", "int or None", if_version))
    return int.__index__(if_version)


cdef str _text_of(object error):
    """What an exception says, or its type where it says nothing."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return text or type(error).__name__


cdef dict _by_key(object values, str argument):
    """A copy of a mapping whose keys are any strings."""
    if type(values) is not dict and not isinstance(values, Mapping):
        raise TypeError(wrong_type(argument, "a mapping", values))
    return {exact_text(key, "metadata key"): value for key, value in values.items()}


cdef list _targets(object to):
    """Client ids and records, from what was passed as *to*."""
    cdef list targets = None
    if not PyUnicode_Check(to):
        try:
            targets = list(to)
        except TypeError:
            pass
    if targets is None:
        raise TypeError(f"to must hold client ids and records, not {type(to).__name__}")
    for target in targets:
        if not isinstance(target, (str, ConnectionMeta)):
            raise TypeError(f"to must hold client ids and records, not {type(target).__name__}")
    return targets


cdef bint _is_async(object function) except -1:
    return iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)


# ---- sizes -----------------------------------------------------------------------------------------------------------


cdef int64_t _utf8_bytes(object text) noexcept:
    cdef Py_ssize_t i, length = PyUnicode_GET_LENGTH(text)
    cdef int kind = PyUnicode_KIND(text)
    cdef const void *data = PyUnicode_DATA(text)
    cdef int64_t nbytes = length
    cdef Py_UCS4 point
    if PyUnicode_IS_ASCII(text):
        return nbytes
    for i in range(length):
        point = PyUnicode_READ(kind, data, i)
        nbytes += (point > 0x7F) + (point > 0x7FF) + (point > 0xFFFF)
    return nbytes


cdef bint _has_surrogate(object text) noexcept:
    cdef Py_ssize_t i
    cdef int kind = PyUnicode_KIND(text)
    cdef Py_UCS4 point
    if kind == 1:
        return False
    for i in range(PyUnicode_GET_LENGTH(text)):
        point = PyUnicode_READ(kind, PyUnicode_DATA(text), i)
        if 0xD800 <= point <= 0xDFFF:
            return True
    return False


cdef int64_t _items_size(object items, int64_t limit, int level) except? -2:
    """Of a container with these items."""
    cdef int64_t part, total = _CONTAINER_BYTES
    if level == _MOST_LEVELS:
        return _TOO_DEEP
    if total > limit:
        return total
    for item in items:
        part = _size(item, limit - total, level + 1)
        if part < 0:
            return part
        if part > _NO_LIMIT - total:  # what an object says of itself may be anything
            return _NO_LIMIT
        total += part
        if total > limit:
            break
    return total


def _fields_of(object value, object names):
    """The fields that have a value: a slot may have none."""
    for name in names:
        field = getattr(value, name, _UNSET)
        if field is not _UNSET:
            yield field


cdef object _items_of(object value):
    """What a container holds; None: it is none. A subclass cannot say otherwise than its built-in base."""
    cdef object kind = type(value)
    if isinstance(value, dict):
        return chain.from_iterable(dict.items(value))
    for base in (list, tuple, set, frozenset):
        if isinstance(value, base):
            return base.__iter__(value)
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if is_dataclass(kind):
        return _fields_of(value, [field.name for field in fields(kind)])
    names = getattr(kind, "__struct_fields__", None)
    return None if names is None else _fields_of(value, names)


cdef int64_t _plain_size(object value) except? -2:
    """Of what holds nothing else; -1: it may."""
    cdef int overflow = 0
    if isinstance(value, str):
        return _utf8_bytes(value)
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, int):
        PyLong_AsLongLongAndOverflow(value, &overflow)
        return (int.bit_length(value) + 7) // 8 if overflow else 8
    if isinstance(value, float):
        return 8
    if isinstance(value, bytes):
        return bytes.__len__(value)
    if isinstance(value, bytearray):
        return bytearray.__len__(value)
    if isinstance(value, complex):
        return 16
    if isinstance(value, memoryview):
        return value.nbytes
    return -1


cdef int64_t _size(object value, int64_t limit, int level) except? -2:
    """See size_of; counting begins at this level of containers."""
    cdef int64_t nbytes = _plain_size(value)
    if nbytes < 0 and (type(value) is list or type(value) is tuple):
        return _items_size(value, limit, level)
    if nbytes < 0:
        items = _items_of(value)
        if items is not None:
            return _items_size(items, limit, level)
        nbytes = min(getsizeof(value), _NO_LIMIT)
    return max(1, nbytes)


def size_of(value, limit=_NO_LIMIT, /):
    return _size(value, exact_int64(limit, "limit", "int"), 0)


# ---- rules -----------------------------------------------------------------------------------------------------------


@cython.final
cdef class _Rule:
    """A validator or a notifier, and the keys that it is for."""

    cdef object function
    cdef str key
    cdef str prefix
    cdef bint is_last_word, is_async

    cdef bint is_for(self, str key) except -1:
        if self.key is not None:
            return self.key == key
        return self.prefix is None or key.startswith(self.prefix)


@cython.final
cdef class _Plan:
    """All that is to be known of a key."""

    cdef str key
    cdef str problem  # why it cannot be one; None if it can
    cdef int64_t nbytes
    cdef tuple validators
    cdef tuple notifiers


cdef tuple _rules_for(tuple rules, str key):
    return tuple([rule for rule in rules if (<_Rule>rule).is_for(key)])


@cython.final
@cython.freelist(16)
cdef class _Item:
    """One key of a change."""

    cdef _Plan plan
    cdef object value  # what the validators made of it; MISSING: to be deleted
    cdef int64_t nbytes  # of the key and the value
    cdef bint is_bad


@cython.final
@cython.freelist(8)
cdef class _Edit:
    """A change that was asked for, checked."""

    cdef list items
    cdef list problems  # None for none
    cdef object condition  # the version that it is for, or None for any
    cdef bint is_whole  # the items are all the metadata there shall be
    cdef int depth  # how many changes in a row have led to it
    cdef bint is_wanted  # to be published

    cdef _Item add(self, _Plan plan, object value):
        cdef _Item item = _Item.__new__(_Item)
        item.plan = plan
        item.value = value
        self.items.append(item)
        return item

    cdef int object_to(self, str key, str reason, object error) except -1:
        if self.problems is None:
            self.problems = []
        self.problems.append(Problem(key, reason, error))
        return 0


cdef inline _Edit _new_edit(object condition, bint is_whole):
    cdef _Edit edit = _Edit.__new__(_Edit)
    edit.items = []
    edit.condition = condition
    edit.is_whole = is_whole
    return edit


# ---- changes ---------------------------------------------------------------------------------------------------------


@cython.final
@cython.freelist(32)
cdef class Change:
    cdef readonly object conn
    cdef readonly str key
    cdef readonly object old
    cdef readonly object new
    cdef readonly int64_t version

    def __init__(self, *_args, **_kwargs):
        raise TypeError("changes are made by Metadata")

    def __reduce__(self):
        raise TypeError("a Change cannot be copied or pickled")

    @property
    def client_id(self):
        return self.conn.client_id

    def __repr__(self):
        return f"<Change of {self.key!r} of {self.client_id!r}, version {self.version}>"


cdef inline Change _make_change(object conn, str key, object old, object new, int64_t version):
    cdef Change change = Change.__new__(Change)
    change.conn = conn
    change.key = key
    change.old = old
    change.new = new
    change.version = version
    return change


@cython.final
@cython.freelist(8)
cdef class _Step:
    """What a change makes of some metadata: right for every record that has the same token."""

    cdef object former  # token, or None
    cdef object token  # the next one; None: nothing changes
    cdef dict mapping
    cdef int64_t version, nbytes
    cdef object record  # for which it was made, or None
    cdef list changes
    cdef bint has_notifiers

    cdef int note(self, _Plan plan, object old, object new) except -1:
        self.has_notifiers = self.has_notifiers or len(plan.notifiers) != 0
        self.changes.append(_make_change(self.record, plan.key, old, new, self.version + 1))
        return 0

    cdef list changes_of(self, object record):
        cdef Change each
        if record is self.record:
            return self.changes
        return [_make_change(record, each.key, each.old, each.new, each.version) for each in self.changes]


@cython.final
@cython.trashcan(True)  # a queue that is dropped may be long
cdef class _Announcement:
    """A change that is to be announced, in the queue."""

    cdef _Announcement next
    cdef list changes
    cdef int depth
    cdef bint is_wanted


def _after(Metadata metadata, object notifier, int depth):
    """What calls an async notifier later, with the depth that it would have had at once."""

    async def call(change):
        token = PyContextVar_Set(_depth, depth)
        try:
            await notifier(change)
        except Exception:
            metadata._notifier_failed(notifier, change)
        finally:
            PyContextVar_Reset(_depth, token)

    return call


# ---- metadata --------------------------------------------------------------------------------------------------------


@cython.no_gc_clear  # the registry must be there as long as a method can be called
cdef class Metadata:
    cdef object _registry
    cdef int64_t max_key_bytes, max_value_bytes, max_keys, max_bytes, max_cascade, max_queued
    cdef object later
    cdef object wants
    cdef object publish
    # Replaced as a whole, in critical sections.
    cdef tuple validators
    cdef tuple notifiers
    cdef dict plans
    cdef object wake
    cdef unsigned long home  # the thread that announces,
    cdef bint has_home  # or any
    # The queue. The lock guards all of it.
    cdef wsf_lock lock
    cdef _Announcement first
    cdef _Announcement last
    cdef int64_t queued
    cdef bint is_announcing, is_woken
    cdef int64_t change_total, rejected_total, conflict_total, error_total, unannounced_total

    def __init__(
        self, registry, *, max_key_bytes=128, max_value_bytes=16384, max_keys=64, max_bytes=65536, max_cascade=16,
        max_queued=100_000, later=None, wants=None, publish=None
    ):
        if not isinstance(registry, Registry):
            raise TypeError(wrong_type("registry", "a Registry", registry))
        self._registry = registry
        self.max_key_bytes = min(_setting(max_key_bytes, "max_key_bytes", 1), <int64_t>registry.max_name_bytes)
        self.max_value_bytes = _setting(max_value_bytes, "max_value_bytes", 1)
        self.max_keys = _setting(max_keys, "max_keys", 0)
        self.max_bytes = _setting(max_bytes, "max_bytes", 1)
        self.max_cascade = _setting(max_cascade, "max_cascade", 0)
        self.max_queued = _setting(max_queued, "max_queued", 1)
        self.later = later
        self.wants = wants
        self.publish = publish
        self.validators = self.notifiers = ()
        self.plans = {}

    def __reduce__(self):
        raise TypeError("a Metadata cannot be copied or pickled")

    @property
    def registry(self):
        return self._registry

    # ---- looking

    cdef object resolve(self, object target):
        """The attached record that is meant."""
        cdef PyObject *found
        cdef object record
        cdef int is_home
        if self._registry is None:
            raise TypeError("Metadata.__init__ was not called")
        if PyUnicode_Check(target):
            target = exact_text(target, "target")
            found = _records.find(<PyObject *>self._registry, <PyObject *>target)
            if found == NULL:
                raise UnknownConnection(target)
            record = <object>found
            Py_XDECREF(found)
            return record
        if not isinstance(target, ConnectionMeta):
            raise TypeError(wrong_type("target", "a client id or a ConnectionMeta", target))
        is_home = _records.is_home(<PyObject *>self._registry, <PyObject *>target)
        if is_home != 1:
            raise (DetachedRecord if is_home < 0 else ForeignRecord)(target.client_id)
        return target

    cdef PyObject *read(self, object record, wsf_metadata *metadata) except? NULL:
        """The token of a record, which was attached a moment ago."""
        cdef PyObject *token = _records.read_extras(<PyObject *>record, metadata)
        if token == NULL and _records.is_home(<PyObject *>self._registry, <PyObject *>record) != 1:
            raise DetachedRecord(record.client_id)  # it may have had one until then
        return token

    def get(self, target, key, default=None):
        cdef wsf_metadata metadata
        cdef object record = self.resolve(target)
        cdef str name = exact_text(key, "metadata key")
        cdef PyObject *token = self.read(record, &metadata)
        try:
            return default if metadata.mapping == NULL else (<dict>metadata.mapping).get(name, default)
        finally:
            Py_XDECREF(token)

    def snapshot(self, target):
        cdef wsf_metadata metadata
        cdef object record = self.resolve(target)
        cdef PyObject *token = self.read(record, &metadata)
        try:
            mapping = _NOTHING if metadata.mapping == NULL else MappingProxyType(<object>metadata.mapping)
            return Snapshot(metadata.version, mapping)
        finally:
            Py_XDECREF(token)

    # ---- changing

    def set(self, target, key, value, *, if_version=None):
        cdef object record = self.resolve(target)
        cdef str name = exact_text(key, "metadata key")
        cdef _Edit edit = self.edit(if_version, False)
        self.take(edit, name, value)
        return self.change(record, edit)

    def update(self, target, changes, *, if_version=None):
        return self.change_keys(target, changes, "changes", if_version, False)

    def replace(self, target, metadata, *, if_version=None):
        return self.change_keys(target, metadata, "metadata", if_version, True)

    cdef object change_keys(self, object target, object given, str argument, object if_version, bint is_whole):
        cdef object record = self.resolve(target)
        cdef dict values = _by_key(given, argument)
        cdef _Edit edit = self.edit(if_version, is_whole)
        self.take_all(edit, values)
        return self.change(record, edit)

    def delete(self, target, key, *, if_version=None):
        cdef object record = self.resolve(target)
        cdef str name = exact_text(key, "metadata key")
        cdef _Edit edit = self.edit(if_version, False)
        edit.add(self.plan_of(name), MISSING)  # what is there may go, also if it could not be set
        return self.change(record, edit)

    def check(self, metadata):
        cdef wsf_metadata nothing
        cdef _Edit edit
        if metadata is None:
            return None
        edit = _new_edit(None, True)
        self.take_all(edit, _by_key(metadata, "metadata"))
        nothing.mapping = NULL
        nothing.version = nothing.nbytes = 0
        return self.step(None, NULL, nothing, edit).mapping

    def update_where(
        self, changes, *, to=None, group=None, user=None, tag=None, status=None, device_type=None, not_group=None,
        not_user=None, not_tag=None, not_status=None, not_device_type=None
    ):
        cdef dict values = _by_key(changes, "changes")
        cdef dict filters = {
            "group": group, "user": user, "tag": tag, "status": status, "device_type": device_type,
            "not_group": not_group, "not_user": not_user, "not_tag": not_tag, "not_status": not_status,
            "not_device_type": not_device_type,
        }
        if to is not None and any([each is not None for each in filters.values()]):
            raise TypeError("to= cannot be combined with filters")
        cdef list targets = None if to is None else _targets(to)
        self._registry.batches(**filters)  # which raises if something is wrong with them, and does nothing else yet
        cdef _Edit edit = self.edit(None, False)
        self.take_all(edit, values)
        if edit.problems is not None:
            self.reject(edit.problems)
        edit.is_wanted = self.is_wanted()
        records = self._registry.select(**filters) if targets is None else self.present(targets)
        try:
            return self.change_all(records, edit)
        finally:
            self.announce_queued()

    cdef object change_all(self, list records, _Edit edit):
        cdef int64_t changed = 0
        cdef list rejected = []
        cdef _Step step = None
        for place, record in enumerate(records, 1):
            if place % _UNANNOUNCED == 0:
                self.announce_queued()
            try:
                step = self.make(record, edit, step)
                changed += 1
            except MetadataRejected as error:
                rejected.append((record, error))
                step = None
            except DetachedRecord:  # removed meanwhile, which the report leaves out
                step = None
        return UpdateReport(changed, tuple(rejected))

    cdef list present(self, list targets):
        """The records of the registry among the targets, each once."""
        cdef dict records = {}
        for target in targets:
            record = self._registry.get(target) if PyUnicode_Check(target) else target
            if record is not None and _records.is_home(<PyObject *>self._registry, <PyObject *>record) == 1:
                records[record] = None
        return list(records)

    # ---- checking

    cdef _Edit edit(self, object if_version, bint is_whole):
        cdef _Edit edit = _new_edit(_condition(if_version), is_whole)
        edit.depth = <int>get_value(_depth)
        if edit.depth > self.max_cascade:
            raise LimitExceeded("changes of metadata in answer to each other", self.max_cascade)
        return edit

    cdef bint is_wanted(self) except -1:
        return self.publish is not None and (self.wants is None or bool(self.wants()))

    cdef int take_all(self, _Edit edit, dict values) except -1:
        for key, value in values.items():
            self.take(edit, <str>key, value)
        return 0

    cdef int take(self, _Edit edit, str key, object value) except -1:
        """Check one key and its value. What cannot be a key is a problem, and no item."""
        cdef _Plan plan
        cdef _Item item
        if value is MISSING and edit.is_whole:
            return 0
        plan = self.plan_of(key)
        if plan.problem is not None:
            return edit.object_to(key, plan.problem, None)
        item = edit.add(plan, value)
        if value is not MISSING:
            self.validate(edit, item)
        return 0

    cdef int validate(self, _Edit edit, _Item item) except -1:
        cdef _Rule rule
        cdef str key = item.plan.key
        for each in item.plan.validators:
            rule = <_Rule>each
            try:
                made = rule.function(key, item.value)
            except Exception as error:
                edit.object_to(key, _text_of(error), error)
                item.is_bad = True
                if rule.is_last_word:
                    break
            else:
                if made is not None:
                    item.value = made
                if made is MISSING:
                    break
        return 0 if item.is_bad or item.value is MISSING else self.measure(edit, item)

    cdef int measure(self, _Edit edit, _Item item) except -1:
        cdef int64_t nbytes = _size(item.value, self.max_value_bytes, 0)
        item.is_bad = nbytes == _TOO_DEEP or nbytes > self.max_value_bytes
        if nbytes == _TOO_DEEP:
            return edit.object_to(item.plan.key, f"the value is nested more than {_MOST_LEVELS} levels deep", None)
        if item.is_bad:
            return edit.object_to(item.plan.key, f"the value is over the limit of {self.max_value_bytes} bytes", None)
        item.nbytes = item.plan.nbytes + min(nbytes, self.max_bytes + 1)
        return 0

    # ---- making

    cdef object change(self, object record, _Edit edit):
        """Make a change, or raise. Returns the version since then."""
        edit.is_wanted = self.is_wanted()
        cdef _Step step = self.make(record, edit, None)
        self.announce_queued()
        return step.version

    cdef _Step make(self, object record, _Edit edit, _Step step):
        """Make a change and queue it. *step* is what it has made of another record, or None."""
        cdef wsf_metadata metadata
        cdef PyObject *token
        cdef int outcome = -1
        while outcome < 0:
            token = self.read(record, &metadata)
            try:
                self.check_condition(record, edit, metadata.version)
                if step is None or token != (NULL if step.former is None else <PyObject *>step.former):
                    step = self.step(record, token, metadata, edit)
                if step.token is None:
                    return step
                outcome = self.commit(record, edit, step, token)
            finally:
                Py_XDECREF(token)
            if outcome == 0:
                raise DetachedRecord(record.client_id)
        return step

    cdef int check_condition(self, object record, _Edit edit, int64_t version) except -1:
        if edit.condition is not None and edit.condition != version:
            WSF_ADD64(&self.conflict_total, 1)
            raise VersionConflict(record.client_id, edit.condition, version)
        return 0

    cdef _Step step(self, object record, PyObject *token, wsf_metadata former, _Edit edit):
        """What a change makes of the metadata of a token; raises what speaks against it."""
        cdef _Step step = _Step.__new__(_Step)
        cdef dict mapping = {} if former.mapping == NULL else <dict>former.mapping
        cdef int64_t former_bytes = former.nbytes if former.nbytes >= 0 else self.total_bytes(mapping)
        step.record = record
        step.former = None if token == NULL else <object>token
        step.version = former.version
        step.mapping = {} if edit.is_whole else PyDict_Copy(mapping)
        step.nbytes = 0 if edit.is_whole else former_bytes
        step.changes = []
        cdef int64_t keys = self.fill(step, mapping, edit.items)
        if edit.is_whole:
            for key, value in mapping.items():
                if key not in step.mapping:
                    step.note(self.plan_of(key), value, MISSING)
        self.check_limits(edit, step, keys, len(mapping), former_bytes)
        if step.changes:
            step.version += 1
            step.token = _records.next_extras(token, step.mapping, step.nbytes)
        return step

    cdef int64_t fill(self, _Step step, dict former, list items) except -1:
        """Put the items into the new metadata. Returns how many keys it would have with those that were rejected."""
        cdef Py_ssize_t more = 0
        cdef _Item item
        cdef str key
        for each in items:
            item = <_Item>each
            key = item.plan.key
            before = step.mapping.get(key, MISSING)
            if before is not MISSING:
                step.nbytes -= self.entry_bytes(key, before)
            if item.is_bad:
                more += before is MISSING
                continue
            if item.value is not MISSING:
                step.mapping[key] = item.value
                step.nbytes += item.nbytes
            elif before is MISSING:
                continue
            else:
                del step.mapping[key]
            step.note(item.plan, former.get(key, MISSING), item.value)
        return len(step.mapping) + more

    cdef int check_limits(
        self, _Edit edit, _Step step, int64_t keys, int64_t former_keys, int64_t former_bytes
    ) except -1:
        cdef list problems = edit.problems
        if keys > self.max_keys and keys > former_keys:
            problems = [*(problems or ()), Problem(None, f"more than {self.max_keys} keys")]
        if step.nbytes > self.max_bytes and step.nbytes > former_bytes:
            # A value that somebody has changed in its place makes the sum wrong.
            step.nbytes = self.total_bytes(step.mapping)
            if step.nbytes > self.max_bytes and step.nbytes > former_bytes:
                problems = [*(problems or ()), Problem(None, f"more than {self.max_bytes} bytes in all")]
        if problems is not None:
            self.reject(problems)
        return 0

    cdef int64_t entry_bytes(self, str key, object value) except -1:
        """Of what is there; if it was put there unchecked, it may be too large to be counted."""
        cdef int64_t nbytes = _size(value, self.max_bytes, 0)
        return _utf8_bytes(key) + (nbytes if 0 <= nbytes <= self.max_bytes else self.max_bytes + 1)

    cdef int64_t total_bytes(self, dict metadata) except -1:
        cdef int64_t total = 0
        for key, value in metadata.items():
            total += self.entry_bytes(<str>key, value)
        return total

    cdef int reject(self, list problems) except -1:
        WSF_ADD64(&self.rejected_total, 1)
        raise MetadataRejected(tuple(problems))

    cdef int commit(self, object record, _Edit edit, _Step step, PyObject *expected) except -2:
        """1: the change is made, and queued; 0: the record is detached; -1: it has another token by now."""
        cdef PyObject *former = NULL
        cdef _Announcement announcement = None
        cdef int outcome
        if edit.is_wanted or step.has_notifiers:
            announcement = _new_announcement(step.changes_of(record), edit)
        WSF_LOCK(&self.lock)
        outcome = _records.replace_extras(<PyObject *>record, expected, <PyObject *>step.token, &former)
        if outcome == 1:
            self.change_total += 1
            if announcement is not None and self.queued >= self.max_queued:
                self.unannounced_total += 1
            elif announcement is not None:
                self.append(announcement)
        WSF_UNLOCK(&self.lock)
        Py_XDECREF(former)
        return outcome

    # ---- announcing

    cdef void append(self, _Announcement announcement) noexcept:
        """With the lock held, under which nothing is destroyed: what loses a reference, here and below, has another."""
        if self.first is None:
            self.first = announcement
        else:
            self.last.next = announcement
        self.last = announcement
        self.queued += 1

    cdef _Announcement take_first(self):
        """The next announcement; None at the end of the queue, where announcing ends."""
        cdef _Announcement first
        WSF_LOCK(&self.lock)
        first = self.first
        if first is None:
            self.is_announcing = False
        else:
            self.first = first.next
            first.next = None
            self.queued -= 1
        if self.first is None:
            self.last = None
        WSF_UNLOCK(&self.lock)
        return first

    cdef int announce_queued(self) except -1:
        cdef bint is_home, is_to_wake, is_to_announce
        cdef _Announcement announcement
        WSF_LOCK(&self.lock)
        is_home = not self.has_home or self.home == PyThread_get_thread_ident()
        is_to_wake = self.first is not None and not is_home and not self.is_woken
        is_to_announce = self.first is not None and is_home and not self.is_announcing
        self.is_woken = not is_home and (self.is_woken or is_to_wake)
        self.is_announcing = self.is_announcing or is_to_announce
        WSF_UNLOCK(&self.lock)
        if is_to_wake:
            self.call_wake()
        if not is_to_announce:
            return 0
        try:
            while (announcement := self.take_first()) is not None:
                self.deliver(announcement)
        except BaseException:
            WSF_LOCK(&self.lock)
            self.is_announcing = False
            WSF_UNLOCK(&self.lock)
            raise
        return 0

    cdef int call_wake(self) except -1:
        cdef object wake
        with cython.critical_section(self):
            wake = self.wake
        if wake is not None:
            wake()
        return 0

    cdef int deliver(self, _Announcement announcement) except -1:
        cdef Change change
        token = PyContextVar_Set(_depth, announcement.depth + 1)
        try:
            for each in announcement.changes:
                change = <Change>each
                for rule in self.plan_of(change.key).notifiers:  # others, perhaps, than when it was made
                    self.notify(<_Rule>rule, change, announcement.depth + 1)
            if announcement.is_wanted:
                self.call(self.publish, tuple(announcement.changes), announcement.changes[0])
        finally:
            PyContextVar_Reset(_depth, token)
        return 0

    cdef int notify(self, _Rule rule, object change, int depth) except -1:
        if not rule.is_async:
            return self.call(rule.function, change, change)
        try:
            self.later(_after(self, rule.function, depth), change)
        except Exception:
            self._notifier_failed(rule.function, change)
        return 0

    cdef int call(self, object function, object argument, object change) except -1:
        try:
            function(argument)
        except Exception:
            self._notifier_failed(function, change)
        return 0

    def _notifier_failed(self, notifier, change):
        WSF_ADD64(&self.error_total, 1)
        self.failed(notifier, change)

    def failed(self, notifier, change):
        pass

    def run_on(self, thread, wake):
        cdef bint is_home = thread is not None
        cdef unsigned long home = PyLong_AsUnsignedLongMask(thread) if is_home else 0
        with cython.critical_section(self):
            self.wake = wake
        WSF_LOCK(&self.lock)
        self.has_home = is_home
        self.home = home
        self.is_woken = False
        WSF_UNLOCK(&self.lock)

    def announce(self):
        self.announce_queued()

    # ---- rules

    def add_validator(self, validator, *, key=None, prefix=None, is_last_word=False):
        cdef _Rule rule = self.rule(validator, "validator", key, prefix)
        if rule.is_async:
            raise TypeError("validator must not be async")
        rule.is_last_word = bool(is_last_word)
        self.change_rules(rule, True, True)
        return _remover(self, rule, True)

    def add_notifier(self, notifier, *, key=None, prefix=None):
        cdef _Rule rule = self.rule(notifier, "notifier", key, prefix)
        if rule.is_async and self.later is None:
            raise TypeError("an async notifier needs an event loop")
        self.change_rules(rule, False, True)
        return _remover(self, rule, False)

    cdef _Rule rule(self, object function, str argument, object key, object prefix):
        cdef _Rule rule = _Rule.__new__(_Rule)
        if not callable(function):
            raise TypeError(wrong_type(argument, "callable", function))
        if key is not None and prefix is not None:
            raise TypeError("key= cannot be combined with prefix=")
        rule.function = function
        rule.key = None if key is None else self.name(key, "metadata key")
        rule.prefix = None if prefix is None else self.name(prefix, "metadata key prefix")
        rule.is_async = _is_async(function)
        return rule

    cdef str name(self, object value, str kind):
        cdef str text = exact_text(value, kind)
        cdef str problem = self.problem_of(text)
        if problem is not None:
            raise InvalidName(kind, problem)
        return text

    cdef str problem_of(self, str key):
        """Why a text cannot be a key, as the rest of a sentence; None if it can."""
        if not key:
            return "is empty"
        if _has_surrogate(key):
            return "holds a lone surrogate, so it has no UTF-8 form"
        if _utf8_bytes(key) > self.max_key_bytes:
            return f"is over the limit of {self.max_key_bytes} bytes in UTF-8"
        return None

    cdef int change_rules(self, _Rule rule, bint is_validator, bint is_new) except -1:
        """Add a rule, or take it out. Plans that are being made meanwhile are not remembered."""
        cdef tuple rules
        with cython.critical_section(self):
            rules = self.validators if is_validator else self.notifiers
            rules = (*rules, rule) if is_new else tuple([each for each in rules if each is not rule])
            if is_validator:
                self.validators = rules
            else:
                self.notifiers = rules
            self.plans = {}
        return 0

    cdef _Plan plan_of(self, str key):
        cdef dict plans
        with cython.critical_section(self):  # also against what takes a plan out, which may have the last reference
            plans = self.plans
            found = plans.get(key)
        return self.make_plan(plans, key) if found is None else <_Plan>found

    cdef _Plan make_plan(self, dict plans, str key):
        cdef _Plan plan = _Plan.__new__(_Plan)
        cdef tuple validators, notifiers
        cdef str problem = self.problem_of(key)
        with cython.critical_section(self):
            validators = self.validators
            notifiers = self.notifiers
        plan.key = key
        plan.problem = None if problem is None else f"the key {problem}"
        plan.nbytes = _utf8_bytes(key)
        plan.validators = _rules_for(validators, key)
        plan.notifiers = _rules_for(notifiers, key)
        if problem is None:
            self.remember(plans, plan)
        return plan

    cdef int remember(self, dict plans, _Plan plan) except -1:
        """Put a plan into the dict that was there when its making began: if that is not there any more, it may be
        out of date."""
        with cython.critical_section(self):
            if plans is not self.plans:
                return 0
            if len(plans) >= _MOST_PLANS:
                self.plans = plans = {}
            plans[plan.key] = plan
        return 0

    # ---- figures

    def stats(self):
        return {
            "metadata_changes": self.change_total,
            "metadata_rejected": self.rejected_total,
            "metadata_conflicts": self.conflict_total,
            "metadata_notifier_errors": self.error_total,
            "metadata_unannounced": self.unannounced_total,
        }


cdef _Announcement _new_announcement(list changes, _Edit edit):
    cdef _Announcement announcement = _Announcement.__new__(_Announcement)
    announcement.changes = changes
    announcement.depth = edit.depth
    announcement.is_wanted = edit.is_wanted
    return announcement


def _remover(Metadata metadata, _Rule rule, bint is_validator):
    def remove():
        metadata.change_rules(rule, is_validator, False)

    return remove
