"""Both generations of the registry in plain Python: the baseline of the benchmarks and the oracle of the tests.

The contract of every public name is in ``wsfast/_core.pyi``; this file holds it without a line of the native core.
It hides how the records are stored and found:

* :class:`Registry`, generation 2: shards chosen by folded FNV-1a, each one a map in the manner of Go's ``sync.Map``.
* :class:`TraditionalRegistry`, generation 1: one dict under one lock.

All the rest (checks, the record, the indexes, walks) is common to both.

Invariants:

* A record is attached while its ``_attached`` is set. The flag changes under the lock of the record's shard, together
  with the map of the shard; with it go the values that may hold arbitrary objects.
* The indexes have one lock of their own. No thread holds it together with the lock of a shard, nor two of the latter.
* A record enters an index only while it is attached, which is tested under the lock of the indexes. A removal
  clears the flag first and cleans the indexes next, so whoever came in between is cleaned away with the rest.
* Whoever waits for a lock holds a reference to the registry, so that no registry is destroyed under its own locks.
* Objects of the application are dropped after the lock is released: their destructors may use the registry.

Not guaranteed: between the two steps of a removal other threads may count a detached record in ``groups()`` and
``stats()``. The locks are not reentrant, so what the interpreter runs between any two instructions (a signal handler,
a destructor started by the garbage collector) must not call into a registry that its thread is at work in.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, TypeVar, cast, overload

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

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["ConnectionMeta", "Registry", "TraditionalRegistry", "fnv1_32", "fnv1a_32"]

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")
_Tag: TypeAlias = str | tuple[str, str]
# An ordered set of records, and an index of such sets; no set in an index is empty.
_Members: TypeAlias = "dict[ConnectionMeta, None]"
_Index: TypeAlias = dict[_K, _Members]

# RFC 9923, section 2.2.
_FNV_PRIME = 0x01000193
_FNV_OFFSET_BASIS = 0x811C9DC5
_32_BITS = 0xFFFFFFFF

_INT64_MIN = -(2**63)
_INT64_MAX = 2**63 - 1
_LAST_DEADLINE_NS = 2**63 - 2
_MAX_SHARDS = 65536
_MAX_SECONDS = 1_000_000

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_NO_PERMISSIONS: frozenset[str] = frozenset()
_NOT_MEASURED = Quality()


# ---- FNV -------------------------------------------------------------------------------------------------------------


def fnv1_32(data: ReadableBuffer, /) -> int:
    """FNV-1, 32 bits; see ``_core.pyi``."""
    value = _FNV_OFFSET_BASIS
    for byte in _octets(data):
        value = value * _FNV_PRIME & _32_BITS ^ byte
    return value


def fnv1a_32(data: ReadableBuffer, /) -> int:
    """FNV-1a, 32 bits; see ``_core.pyi``."""
    return _fnv1a(_octets(data))


def _fnv1a(data: bytes) -> int:
    value = _FNV_OFFSET_BASIS
    for byte in data:
        value = (value ^ byte) * _FNV_PRIME & _32_BITS
    return value


def _octets(data: ReadableBuffer) -> bytes:
    with memoryview(data) as view:
        return view.tobytes()


# ---- arguments -------------------------------------------------------------------------------------------------------


def _wrong_type(name: str, wanted: str, value: object) -> TypeError:
    return TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def _text(kind: str, value: str) -> str:
    """*value* as an exact ``str``, whatever a subclass says of itself."""
    if type(value) is str:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    raise _wrong_type(kind, "str", value)


def _name(kind: str, value: str, max_bytes: int, *, may_be_empty: bool = False) -> str:
    name = _text(kind, value)
    if not name and not may_be_empty:
        raise InvalidName(kind, "is empty")
    try:
        size = len(name) if name.isascii() else len(name.encode())
    except UnicodeEncodeError:
        raise InvalidName(kind, "holds a lone surrogate, so it has no UTF-8 form") from None
    if size > max_bytes:
        raise InvalidName(kind, f"is over the limit of {max_bytes} bytes in UTF-8")
    return name


def _optional_name(kind: str, value: str | None, max_bytes: int) -> str | None:
    return None if value is None else _name(kind, value, max_bytes)


def _names(argument: str, kind: str, values: Iterable[str], max_bytes: int) -> set[str]:
    if isinstance(values, str):
        raise _wrong_type(argument, "an iterable of str", values)
    try:
        iterator = iter(values)
    except TypeError:
        raise _wrong_type(argument, "an iterable of str", values) from None
    return {_name(kind, value, max_bytes) for value in iterator}


def _mapping(argument: str, kind: str, values: Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
    """A copy of a mapping of names to objects."""
    if not isinstance(values, Mapping):
        raise _wrong_type(argument, "a mapping", values)
    return {_name(kind, key, max_bytes): value for key, value in values.items()}


def _tags(values: Mapping[str, str], max_bytes: int, max_tags: int) -> Mapping[str, str]:
    if not isinstance(values, Mapping):
        raise _wrong_type("tags", "a mapping", values)
    tags = {
        _name("tag key", key, max_bytes): _name("tag value", value, max_bytes, may_be_empty=True)
        for key, value in values.items()
    }
    if len(tags) > max_tags:
        raise LimitExceeded("tags of one connection", max_tags)
    return _read_only(tags)


def _read_only(values: dict[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(values) if values else _NOTHING


def _int64(name: str, value: int, wanted: str = "int") -> int:
    """*value* as an exact ``int``."""
    if not isinstance(value, int):
        raise _wrong_type(name, wanted, value)
    number = int.__index__(value)
    if not _INT64_MIN <= number <= _INT64_MAX:
        raise OverflowError(f"{name} does not fit 64 bits")
    return number


def _at_least(name: str, value: int, least: int) -> int:
    number = _int64(name, value)
    if number < least:
        raise InvalidSetting(name, value, f"{least} or more")
    return number


def _deadline(value: int | None) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int):
        raise _wrong_type("deadline_ns", "int or None", value)
    number = int.__index__(value)
    if not 0 <= number <= _LAST_DEADLINE_NS:
        raise InvalidSetting("deadline_ns", value, "from 0 to 2**63 - 2")
    return number


def _status(value: ConnectionStatus) -> ConnectionStatus:
    if not isinstance(value, ConnectionStatus):
        raise _wrong_type("status", "a ConnectionStatus", value)
    return value


def _quality(value: Quality) -> Quality:
    """*value* in single precision."""
    if not isinstance(value, Quality):
        raise _wrong_type("quality", "a Quality", value)
    latency, jitter, loss = value
    for name, number, most in (("latency", latency, _MAX_SECONDS), ("jitter", jitter, _MAX_SECONDS), ("loss", loss, 1)):
        if not 0 <= number <= most:  # nor does a NaN pass
            raise InvalidSetting(f"quality.{name}", number, f"from 0 to {most}")
    return Quality(*array("f", (latency, jitter, loss)))


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a record needs to know of its registry, also after the registry is gone."""

    max_id_bytes: int
    max_name_bytes: int
    max_tags: int
    max_groups: int
    clock: Callable[[], int]
    wall_clock: Callable[[], float]

    def now_ns(self) -> int:
        return _int64("clock()", self.clock())


# ---- the record ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, weakref_slot=True, eq=False, init=False, repr=False, match_args=False)
class ConnectionMeta:
    """The record of one connection; see ``_core.pyi``.

    Reading takes no lock, as each attribute but ``groups`` is one slot. Writing takes the lock of the shard, or that of
    the indexes for what is indexed.
    """

    _client_id: str
    _registry: weakref.ref[_AnyRegistry]
    _settings: _Settings
    _shard: _Shard
    _attached: bool
    _conn: Any
    _session: Any
    _device_info: Any
    _metadata: Mapping[str, Any]
    _extensions: dict[str, Any] | None
    _user_id: str | None
    _device_type: str | None
    _status: ConnectionStatus
    _permissions: frozenset[str]
    _tags: Mapping[str, str]
    _groups: set[str] | None
    _quality: Quality
    _deadline_ns: int | None
    _created: float
    _created_ns: int
    _last_active_ns: int
    _last_heartbeat_ns: int | None
    _messages_in: int
    _messages_out: int
    _bytes_in: int
    _bytes_out: int
    _errors_in: int
    _errors_out: int

    def __new__(cls, *args: object, **kwargs: object) -> ConnectionMeta:
        raise TypeError("records are made by Registry.add")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ConnectionMeta cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._client_id!r} {self.status.name}>"

    @property
    def client_id(self) -> str:
        return self._client_id

    @property
    def registry(self) -> Any:
        """A ``Registry`` or a ``TraditionalRegistry``; ``Any``, because callers are typed for the native one."""
        return self._owner()

    @property
    def attached(self) -> bool:
        return self._owner() is not None

    def _owner(self) -> _AnyRegistry | None:
        return self._registry() if self._attached else None

    def _home(self) -> _AnyRegistry:
        """The registry; ``DetachedRecord`` where there is none."""
        registry = self._owner()
        if registry is None:
            raise DetachedRecord(self._client_id)
        return registry

    # ---- objects of the application

    @property
    def conn(self) -> Any:
        return self._conn

    @conn.setter
    def conn(self, value: Any) -> None:
        self._swap("_conn", value)

    @property
    def session(self) -> Any:
        return self._session

    @session.setter
    def session(self, value: Any) -> None:
        self._swap("_session", value)

    @property
    def device_info(self) -> Any:
        return self._device_info

    @device_info.setter
    def device_info(self, value: Any) -> None:
        self._swap("_device_info", value)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    @metadata.setter
    def metadata(self, value: Mapping[str, Any]) -> None:
        self._swap("_metadata", _read_only(_mapping("metadata", "metadata key", value, self._settings.max_name_bytes)))

    @property
    def extensions(self) -> dict[str, Any]:
        extensions = self._extensions
        return self._make_extensions() if extensions is None else extensions

    @extensions.setter
    def extensions(self, value: Mapping[str, Any]) -> None:
        self._swap("_extensions", _mapping("extensions", "extension key", value, self._settings.max_name_bytes))

    def _make_extensions(self) -> dict[str, Any]:
        registry = self._owner()
        if registry is not None:
            with self._shard.lock:
                if self._attached:
                    if self._extensions is None:
                        self._extensions = {}
                    return self._extensions
        return {}

    def _swap(self, slot: str, value: Any) -> Any:
        """Store *value*. Returns what was there before, which the caller drops without a lock."""
        registry = self._owner()
        if registry is not None:
            with self._shard.lock:
                if self._attached:
                    before = getattr(self, slot)
                    setattr(self, slot, value)
                    return before
        raise DetachedRecord(self._client_id)

    # ---- plain values

    @property
    def user_id(self) -> str | None:
        return self._user_id

    @user_id.setter
    def user_id(self, value: str | None) -> None:
        name = _optional_name("user id", value, self._settings.max_name_bytes)
        registry = self._home()
        registry._indexes.move_user(self, name)

    @property
    def device_type(self) -> str | None:
        return self._device_type

    @device_type.setter
    def device_type(self, value: str | None) -> None:
        self._swap("_device_type", _optional_name("device type", value, self._settings.max_name_bytes))

    @property
    def status(self) -> ConnectionStatus:
        return self._status

    @status.setter
    def status(self, value: ConnectionStatus) -> None:
        self._swap("_status", _status(value))

    @property
    def permissions(self) -> frozenset[str]:
        return self._permissions

    @permissions.setter
    def permissions(self, value: Iterable[str]) -> None:
        names = _names("permissions", "permission", value, self._settings.max_name_bytes)
        registry = self._home()
        self._swap("_permissions", registry._indexes.shared(names))

    @property
    def tags(self) -> Mapping[str, str]:
        return self._tags

    @tags.setter
    def tags(self, value: Mapping[str, str]) -> None:
        tags = _tags(value, self._settings.max_name_bytes, self._settings.max_tags)
        registry = self._home()
        registry._indexes.move_tags(self, tags)

    @property
    def groups(self) -> frozenset[str]:
        registry = self._owner()
        return frozenset() if registry is None else registry._indexes.groups_of(self)

    @property
    def quality(self) -> Quality:
        return self._quality

    @quality.setter
    def quality(self, value: Quality) -> None:
        self._swap("_quality", _quality(value))

    # ---- times

    @property
    def deadline_ns(self) -> int | None:
        return self._deadline_ns

    @deadline_ns.setter
    def deadline_ns(self, value: int | None) -> None:
        self._swap("_deadline_ns", _deadline(value))

    @property
    def created(self) -> float:
        return self._created

    @property
    def last_active(self) -> float:
        return self._wall_time(self._last_active_ns)

    @property
    def last_heartbeat(self) -> float | None:
        at_ns = self._last_heartbeat_ns
        return None if at_ns is None else self._wall_time(at_ns)

    @property
    def created_ns(self) -> int:
        return self._created_ns

    @property
    def last_active_ns(self) -> int:
        return self._last_active_ns

    @property
    def last_heartbeat_ns(self) -> int | None:
        return self._last_heartbeat_ns

    @property
    def idle(self) -> float:
        return max(0.0, (self._settings.now_ns() - self._last_active_ns) / 1e9)

    def _wall_time(self, at_ns: int) -> float:
        return self._created + (at_ns - self._created_ns) / 1e9

    # ---- counters

    @property
    def messages_in(self) -> int:
        return self._messages_in

    @property
    def messages_out(self) -> int:
        return self._messages_out

    @property
    def bytes_in(self) -> int:
        return self._bytes_in

    @property
    def bytes_out(self) -> int:
        return self._bytes_out

    @property
    def errors_in(self) -> int:
        return self._errors_in

    @property
    def errors_out(self) -> int:
        return self._errors_out

    # ---- what happens on the connection

    def touch(self, now_ns: int | None = None) -> None:
        given = None if now_ns is None else _int64("now_ns", now_ns, "int or None")
        registry = self._owner()
        if registry is None:
            return
        at_ns = registry.now_ns() if given is None else given
        with self._shard.lock:
            if self._attached:
                self._last_active_ns = at_ns

    def heartbeat(self, now_ns: int | None = None) -> None:
        given = None if now_ns is None else _int64("now_ns", now_ns, "int or None")
        registry = self._owner()
        if registry is None:
            return
        at_ns = registry.now_ns() if given is None else given
        with self._shard.lock:
            if self._attached:
                self._last_active_ns = self._last_heartbeat_ns = at_ns

    def received(self, nbytes: int, messages: int = 1) -> None:
        size = _at_least("nbytes", nbytes, 0)
        count = _at_least("messages", messages, 0)
        registry = self._owner()
        if registry is None:
            return
        now_ns = registry.now_ns()
        shard = self._shard
        with shard.lock:
            if self._attached:
                self._last_active_ns = now_ns
                self._messages_in += count
                self._bytes_in += size
                shard.messages_in += count
                shard.bytes_in += size

    def sent(self, nbytes: int, messages: int = 1) -> None:
        size = _at_least("nbytes", nbytes, 0)
        count = _at_least("messages", messages, 0)
        registry = self._owner()
        if registry is None:
            return
        shard = self._shard
        with shard.lock:
            if self._attached:
                self._messages_out += count
                self._bytes_out += size
                shard.messages_out += count
                shard.bytes_out += size

    def failed(self, direction: Literal["in", "out"]) -> None:
        if direction not in ("in", "out"):
            raise InvalidSetting("direction", direction, "'in' or 'out'")
        registry = self._owner()
        if registry is None:
            return
        shard = self._shard
        with shard.lock:
            if not self._attached:
                return
            if direction == "in":
                self._errors_in += 1
                shard.errors_in += 1
            else:
                self._errors_out += 1
                shard.errors_out += 1

    def _detach(self) -> tuple[object, ...]:
        """Clear the flag; the lock of the shard is held.

        Returns what may hold arbitrary objects, for the caller to drop without the lock.
        """
        dropped = (self._conn, self._session, self._device_info, self._metadata, self._extensions)
        self._attached = False
        self._conn = self._session = self._device_info = self._extensions = None
        self._metadata = _NOTHING
        self._status = ConnectionStatus.OFFLINE
        self._deadline_ns = None
        return dropped


def _record_type(kind: type[ConnectionMeta] | None) -> type[ConnectionMeta]:
    if kind is None:
        return ConnectionMeta
    if (
        not isinstance(kind, type)
        or not issubclass(kind, ConnectionMeta)
        or kind.__basicsize__ != ConnectionMeta.__basicsize__
        or kind.__dictoffset__
    ):
        raise TypeError("record_type must be a subclass of ConnectionMeta with empty __slots__")
    return kind


# ---- shards ----------------------------------------------------------------------------------------------------------


class _Shard(ABC):
    """Records by id, the lock that their changes take, and counters.

    ``find``, ``snapshot``, ``stats`` and ``size`` take the lock where they need it; all else is called with it held.
    """

    __slots__ = (
        "adds",
        "bytes_in",
        "bytes_out",
        "connections",
        "errors_in",
        "errors_out",
        "lock",
        "messages_in",
        "messages_out",
        "removes",
    )

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connections = self.adds = self.removes = 0
        self.messages_in = self.messages_out = self.bytes_in = self.bytes_out = self.errors_in = self.errors_out = 0

    @abstractmethod
    def find(self, client_id: str) -> ConnectionMeta | None: ...

    @abstractmethod
    def peek(self, client_id: str) -> ConnectionMeta | None:
        """What ``find`` does, with the lock held."""

    @abstractmethod
    def put(self, client_id: str, record: ConnectionMeta) -> None: ...

    @abstractmethod
    def drop(self, client_id: str) -> None:
        """Forget a record that is there."""

    @abstractmethod
    def drop_all(self) -> None: ...

    @abstractmethod
    def records(self) -> list[ConnectionMeta]: ...

    @abstractmethod
    def containers(self) -> Sequence[object]: ...

    def snapshot(self) -> list[ConnectionMeta]:
        with self.lock:
            return self.records()

    def stats(self) -> dict[str, int]:
        with self.lock:
            return {
                "connections": self.connections,
                "adds": self.adds,
                "removes": self.removes,
                "messages_in": self.messages_in,
                "messages_out": self.messages_out,
                "bytes_in": self.bytes_in,
                "bytes_out": self.bytes_out,
                "errors_in": self.errors_in,
                "errors_out": self.errors_out,
                "longest_probe": 0,
            }

    def size(self) -> int:
        """Bytes of the containers."""
        with self.lock:
            return sum(sys.getsizeof(container) for container in self.containers())


class _SyncMap(_Shard):
    """A map in the manner of Go's ``sync.Map``: made for many lookups of few new ids.

    ``read`` is looked up without the lock. ``dirty`` is None or has all records of the shard; new ids enter it alone.
    Where it is None, ``read`` has all records; where it is not, ``read`` has some of them, the same ones under the same
    ids. After as many lookups that missed ``read`` as ``dirty`` has entries, ``dirty`` takes the place of ``read``.

    In Go both maps point to shared entries, which a deletion only marks, because a map of Go cannot be written while it
    is read. A dict can: ids that ``read`` has are replaced and deleted in place, under the lock. So nothing refers to a
    removed record or to its id.
    """

    __slots__ = ("dirty", "misses", "read")

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, ConnectionMeta] = {}
        self.dirty: dict[str, ConnectionMeta] | None = None
        self.misses = 0

    def find(self, client_id: str) -> ConnectionMeta | None:
        record = self.read.get(client_id)
        return self._find_slowly(client_id) if record is None else record

    def _find_slowly(self, client_id: str) -> ConnectionMeta | None:
        if self.dirty is None:
            # It may have been promoted since `read` was looked up, so that is looked up again: a record that is
            # here all the time is in every `read` from now on.
            return self.read.get(client_id)
        with self.lock:
            if self.dirty is not None:
                self.misses += 1
                if self.misses >= len(self.dirty):
                    # In this order: whoever sees no `dirty` relies on a complete `read`.
                    self.read, self.misses = self.dirty, 0
                    self.dirty = None
            return self.peek(client_id)

    def peek(self, client_id: str) -> ConnectionMeta | None:
        return self._all().get(client_id)

    def put(self, client_id: str, record: ConnectionMeta) -> None:
        if client_id in self.read:
            self.read[client_id] = record
        elif self.dirty is None:
            self.dirty = self.read.copy()
        if self.dirty is not None:
            self.dirty[client_id] = record

    def drop(self, client_id: str) -> None:
        self.read.pop(client_id, None)
        if self.dirty is not None:
            del self.dirty[client_id]

    def drop_all(self) -> None:
        self.read = {}
        self.dirty = None
        self.misses = 0

    def records(self) -> list[ConnectionMeta]:
        return list(self._all().values())

    def _all(self) -> dict[str, ConnectionMeta]:
        return self.read if self.dirty is None else self.dirty

    def containers(self) -> Sequence[object]:
        return (self, self.read, self.dirty)


class _LockedDict(_Shard):
    """One dict, always under the lock."""

    __slots__ = ("by_id",)

    def __init__(self) -> None:
        super().__init__()
        self.by_id: dict[str, ConnectionMeta] = {}

    def find(self, client_id: str) -> ConnectionMeta | None:
        with self.lock:
            return self.by_id.get(client_id)

    def peek(self, client_id: str) -> ConnectionMeta | None:
        return self.by_id.get(client_id)

    def put(self, client_id: str, record: ConnectionMeta) -> None:
        self.by_id[client_id] = record

    def drop(self, client_id: str) -> None:
        del self.by_id[client_id]

    def drop_all(self) -> None:
        self.by_id = {}

    def records(self) -> list[ConnectionMeta]:
        return list(self.by_id.values())

    def containers(self) -> Sequence[object]:
        return (self, self.by_id)


# ---- filters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Filter:
    """What a walk shall yield, its types checked. None: anything."""

    group: str | None
    user_id: str | None
    tag_key: str | None
    tag_value: str | None
    status: ConnectionStatus | None

    @classmethod
    def of(cls, group: str | None, user: str | None, tag: _Tag | None, status: ConnectionStatus | None) -> _Filter:
        return cls(
            None if group is None else _text("group name", group),
            None if user is None else _text("user id", user),
            *_tag_texts(tag),
            None if status is None else _status(status),
        )

    @property
    def by_index(self) -> bool:
        return self.group is not None or self.user_id is not None or self.tag_key is not None

    def matches(self, record: ConnectionMeta) -> bool:
        """Whether *record* has the group, the user and the tag. The lock of the indexes is held."""
        if self.group is not None and self.group not in (record._groups or ()):
            return False
        if self.user_id is not None and self.user_id != record._user_id:
            return False
        if self.tag_key is None:
            return True
        value = record._tags.get(self.tag_key)
        return value is not None if self.tag_value is None else value == self.tag_value


def _tag_texts(tag: _Tag | None) -> tuple[str | None, str | None]:
    """Key and value that a filter asks for."""
    if tag is None:
        return None, None
    if isinstance(tag, str):
        return _text("tag key", tag), None
    if isinstance(tag, tuple) and len(tag) == 2:
        return _text("tag key", tag[0]), _text("tag value", tag[1])
    raise _wrong_type("tag", "a key or a (key, value) pair", tag)


# ---- indexes ---------------------------------------------------------------------------------------------------------


def _insert(index: _Index[_K], name: _K, record: ConnectionMeta) -> None:
    index.setdefault(name, {})[record] = None


def _discard(index: _Index[_K], name: _K, record: ConnectionMeta) -> None:
    members = index.get(name)
    if members is not None:
        members.pop(record, None)
        if not members:
            del index[name]


class _Indexes:
    """Who is in a group, who has a user id, who has a tag; and the permission sets, each stored once.

    Every method takes the lock. One that changes a record's place tests first whether the record is attached, and
    raises ``DetachedRecord`` otherwise; ``forget`` follows the end of the attachment, so it has the last word.
    """

    __slots__ = ("_groups", "_lock", "_permissions", "_tags", "_users")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: _Index[str] = {}
        self._users: _Index[str] = {}
        self._tags: dict[str, _Index[str]] = {}  # key, value
        self._permissions: weakref.WeakValueDictionary[tuple[str, ...], frozenset[str]] = weakref.WeakValueDictionary()

    def shared(self, permissions: set[str]) -> frozenset[str]:
        if not permissions:
            return _NO_PERMISSIONS
        key = tuple(sorted(permissions))
        with self._lock:
            return self._permissions.setdefault(key, frozenset(permissions))

    # ---- changes

    def enter(self, record: ConnectionMeta) -> None:
        """Index what a new record was made with; nothing if another thread has removed it by now."""
        with self._lock:
            if not record._attached:
                return
            for group in record._groups or ():
                _insert(self._groups, group, record)
            if record._user_id is not None:
                _insert(self._users, record._user_id, record)
            self._insert_tags(record)

    def forget(self, records: Iterable[ConnectionMeta]) -> None:
        """Take detached records out of all indexes."""
        with self._lock:
            for record in records:
                for group in record._groups or ():
                    _discard(self._groups, group, record)
                record._groups = None
                if record._user_id is not None:
                    _discard(self._users, record._user_id, record)
                self._discard_tags(record)

    def join(self, record: ConnectionMeta, group: str, max_groups: int) -> bool:
        with self._lock:
            groups = self._joined(record)
            if group in groups:
                return False
            if len(groups) >= max_groups:
                raise LimitExceeded("groups of one connection", max_groups)
            record._groups = groups
            groups.add(group)
            _insert(self._groups, group, record)
            return True

    def leave(self, record: ConnectionMeta, group: str) -> bool:
        with self._lock:
            groups = self._joined(record)
            if group not in groups:
                return False
            groups.remove(group)
            _discard(self._groups, group, record)
            return True

    def move_user(self, record: ConnectionMeta, user_id: str | None) -> None:
        with self._lock:
            self._check_attached(record)
            if record._user_id is not None:
                _discard(self._users, record._user_id, record)
            record._user_id = user_id
            if user_id is not None:
                _insert(self._users, user_id, record)

    def move_tags(self, record: ConnectionMeta, tags: Mapping[str, str]) -> None:
        with self._lock:
            self._check_attached(record)
            self._discard_tags(record)
            record._tags = tags
            self._insert_tags(record)

    def _insert_tags(self, record: ConnectionMeta) -> None:
        for key, value in record._tags.items():
            _insert(self._tags.setdefault(key, {}), value, record)

    def _discard_tags(self, record: ConnectionMeta) -> None:
        for key, value in record._tags.items():
            values = self._tags.get(key)
            if values is not None:
                _discard(values, value, record)
                if not values:
                    del self._tags[key]

    def _joined(self, record: ConnectionMeta) -> set[str]:
        self._check_attached(record)
        return set() if record._groups is None else record._groups

    def _check_attached(self, record: ConnectionMeta) -> None:
        if not record._attached:
            raise DetachedRecord(record._client_id)

    # ---- questions

    def groups_of(self, record: ConnectionMeta) -> frozenset[str]:
        with self._lock:
            return frozenset(record._groups or ()) if record._attached else frozenset()

    def group_sizes(self) -> dict[str, int]:
        with self._lock:
            return {group: len(members) for group, members in self._groups.items()}

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {
                "groups": len(self._groups),
                "users": len(self._users),
                "tags": sum(len(values) for values in self._tags.values()),
            }

    def select(self, wanted: _Filter) -> list[ConnectionMeta]:
        """The attached records that match group, user and tag of a filter, of which one at least is given."""
        with self._lock:
            return [record for record in self._candidates(wanted) if record._attached and wanted.matches(record)]

    def _candidates(self, wanted: _Filter) -> Iterable[ConnectionMeta]:
        if wanted.user_id is not None:  # first, because a user has few connections
            return self._users.get(wanted.user_id, ())
        if wanted.group is not None:
            return self._groups.get(wanted.group, ())
        values = self._tags.get(wanted.tag_key or "", {})
        if wanted.tag_value is not None:
            return values.get(wanted.tag_value, ())
        return chain.from_iterable(values.values())

    def size(self) -> int:
        """Bytes of the containers."""
        with self._lock:
            tables = [self._groups, self._users, *self._tags.values()]
            sets = [members for table in tables for members in table.values()]
            return sum(sys.getsizeof(container) for container in (self, self._tags, *tables, *sets))


# ---- views -----------------------------------------------------------------------------------------------------------


class _Keys(KeysView[str]):
    __slots__ = ()
    _mapping: _AnyRegistry

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)


class _Values(ValuesView[ConnectionMeta]):
    __slots__ = ()
    _mapping: _AnyRegistry

    def __iter__(self) -> Iterator[ConnectionMeta]:
        return self._mapping._records()

    def __contains__(self, value: object) -> bool:
        return isinstance(value, ConnectionMeta) and value._owner() is self._mapping


class _Items(ItemsView[str, ConnectionMeta]):
    __slots__ = ()
    _mapping: _AnyRegistry

    def __iter__(self) -> Iterator[tuple[str, ConnectionMeta]]:
        return ((record._client_id, record) for record in self._mapping._records())


# ---- registries ------------------------------------------------------------------------------------------------------


@Mapping.register
class _AnyRegistry(ABC):
    """What both registries share: all but the choice of the shard and what a shard is."""

    # For an instance whose constructor raised: its destructor finds nothing to clear.
    _shards: Sequence[_Shard] = ()

    def __init__(
        self,
        shards: int = 64,
        *,
        max_id_bytes: int = 256,
        max_name_bytes: int = 256,
        max_tags: int = 64,
        max_groups: int = 1024,
        clock: Callable[[], int] | None = None,
        wall_clock: Callable[[], float] | None = None,
        record_type: type[ConnectionMeta] | None = None,
    ) -> None:
        count = _int64("shards", shards)
        if not 1 <= count <= _MAX_SHARDS or count & (count - 1):
            raise InvalidSetting("shards", shards, f"a power of two from 1 to {_MAX_SHARDS}")
        self._settings = _Settings(
            max_id_bytes=_at_least("max_id_bytes", max_id_bytes, 1),
            max_name_bytes=_at_least("max_name_bytes", max_name_bytes, 1),
            max_tags=_at_least("max_tags", max_tags, 0),
            max_groups=_at_least("max_groups", max_groups, 0),
            clock=time.monotonic_ns if clock is None else clock,
            wall_clock=time.time if wall_clock is None else wall_clock,
        )
        self._record_type = _record_type(record_type)
        self._weak_self = weakref.ref(self)
        self._indexes = _Indexes()
        self._shards = self._make_shards(count)
        self.owner: Any = None

    @abstractmethod
    def _make_shards(self, count: int) -> Sequence[_Shard]: ...

    @abstractmethod
    def _route(self, client_id: str) -> int:
        """The number of the shard of an id. Any string has one: what cannot be an id is just not found there."""

    def __del__(self) -> None:
        self.clear()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Registry cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with {len(self)} connections in {self.shards} shards>"

    @property
    def shards(self) -> int:
        return len(self._shards)

    @property
    def max_id_bytes(self) -> int:
        return self._settings.max_id_bytes

    @property
    def max_name_bytes(self) -> int:
        return self._settings.max_name_bytes

    @property
    def max_tags(self) -> int:
        return self._settings.max_tags

    @property
    def max_groups(self) -> int:
        return self._settings.max_groups

    # ---- changes

    def add(
        self,
        client_id: str,
        conn: Any = None,
        *,
        user_id: str | None = None,
        device_type: str | None = None,
        device_info: Any = None,
        session: Any = None,
        permissions: Iterable[str] = (),
        tags: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        extensions: Mapping[str, Any] | None = None,
        groups: Iterable[str] = (),
        status: ConnectionStatus = ConnectionStatus.ONLINE,
        on_duplicate: Literal["reject", "replace"] = "reject",
    ) -> ConnectionMeta:
        max_bytes = self._settings.max_name_bytes
        record = self._new_record(_name("client id", client_id, self._settings.max_id_bytes))
        record._conn = conn
        record._user_id = _optional_name("user id", user_id, max_bytes)
        record._device_type = _optional_name("device type", device_type, max_bytes)
        record._device_info = device_info
        record._session = session
        record._permissions = self._indexes.shared(_names("permissions", "permission", permissions, max_bytes))
        record._tags = _NOTHING if tags is None else _tags(tags, max_bytes, self._settings.max_tags)
        record._metadata = (
            _NOTHING if metadata is None else _read_only(_mapping("metadata", "metadata key", metadata, max_bytes))
        )
        record._extensions = (
            None if extensions is None else _mapping("extensions", "extension key", extensions, max_bytes)
        )
        record._groups = self._initial_groups(groups)
        record._status = _status(status)
        if on_duplicate not in ("reject", "replace"):
            raise InvalidSetting("on_duplicate", on_duplicate, "'reject' or 'replace'")
        record._created_ns = record._last_active_ns = self.now_ns()
        record._created = float(self._settings.wall_clock())
        self._attach(record, replace=on_duplicate == "replace")
        return record

    def _new_record(self, client_id: str) -> ConnectionMeta:
        """A detached record, but for the arguments of ``add`` and the times."""
        record = object.__new__(self._record_type)
        record._attached = False
        record._client_id = client_id
        record._registry = self._weak_self
        record._settings = self._settings
        record._shard = self._shards[self._route(client_id)]
        record._quality = _NOT_MEASURED
        record._deadline_ns = record._last_heartbeat_ns = None
        record._messages_in = record._messages_out = record._bytes_in = record._bytes_out = 0
        record._errors_in = record._errors_out = 0
        return record

    def _initial_groups(self, groups: Iterable[str]) -> set[str] | None:
        names = _names("groups", "group name", groups, self._settings.max_name_bytes)
        if len(names) > self._settings.max_groups:
            raise LimitExceeded("groups of one connection", self._settings.max_groups)
        return names or None

    def _attach(self, record: ConnectionMeta, *, replace: bool) -> None:
        client_id, shard = record._client_id, record._shard
        with shard.lock:
            former = shard.peek(client_id)
            if former is None:
                shard.connections += 1
            elif replace:
                shard.removes += 1
                _dropped = former._detach()  # held until the lock is released
            else:
                raise DuplicateConnection(client_id)
            record._attached = True
            shard.put(client_id, record)
            shard.adds += 1
        if former is not None:
            self._indexes.forget([former])
        self._indexes.enter(record)

    def remove(self, client_id: str | ConnectionMeta) -> ConnectionMeta | None:
        if isinstance(client_id, ConnectionMeta):
            return self._remove_record(client_id)
        name = _text("client id", client_id)
        return self._take(self._shards[self._route(name)], name, None)

    def _remove_record(self, record: ConnectionMeta) -> ConnectionMeta | None:
        registry = record._owner()
        if registry is None:
            return None
        if registry is not self:
            raise ForeignRecord(record._client_id)
        return self._take(record._shard, record._client_id, record)

    def _take(self, shard: _Shard, client_id: str, only: ConnectionMeta | None) -> ConnectionMeta | None:
        """Remove the record of an id, but none other than *only* if that is given."""
        with shard.lock:
            record = shard.peek(client_id)
            if record is None or (only is not None and record is not only):
                return None
            shard.drop(client_id)
            shard.connections -= 1
            shard.removes += 1
            _dropped = record._detach()  # held until the lock is released
        self._indexes.forget([record])
        return record

    def clear(self) -> int:
        return sum(self._clear_shard(shard) for shard in self._shards)

    def _clear_shard(self, shard: _Shard) -> int:
        with shard.lock:
            records = shard.records()
            shard.drop_all()
            shard.connections = 0
            shard.removes += len(records)
            _dropped = [record._detach() for record in records]  # held until the lock is released
        self._indexes.forget(records)
        return len(records)

    # ---- lookups

    def _find(self, client_id: str) -> ConnectionMeta | None:
        name = client_id if type(client_id) is str else _text("client id", client_id)
        return self._shards[self._route(name)].find(name)

    def __getitem__(self, client_id: str) -> ConnectionMeta:
        record = self._find(client_id)
        if record is None:
            raise UnknownConnection(_text("client id", client_id))
        return record

    @overload
    def get(self, client_id: str) -> ConnectionMeta | None: ...
    @overload
    def get(self, client_id: str, default: _T) -> ConnectionMeta | _T: ...
    def get(self, client_id: str, default: _T | None = None) -> ConnectionMeta | _T | None:
        record = self._find(client_id)
        return default if record is None else record

    def get_many(self, client_ids: Iterable[str]) -> list[ConnectionMeta | None]:
        return [self._find(client_id) for client_id in list(client_ids)]

    def __contains__(self, client_id: object) -> bool:
        return self._find(cast("str", client_id)) is not None

    def __len__(self) -> int:
        return sum(shard.connections for shard in self._shards)

    def __bool__(self) -> Literal[True]:
        return True

    def __iter__(self) -> Iterator[str]:
        return (record._client_id for record in self._records())

    def keys(self) -> KeysView[str]:
        return _Keys(cast("Mapping[str, ConnectionMeta]", self))

    def values(self) -> ValuesView[ConnectionMeta]:
        return _Values(cast("Mapping[str, ConnectionMeta]", self))

    def items(self) -> ItemsView[str, ConnectionMeta]:
        return _Items(cast("Mapping[str, ConnectionMeta]", self))

    def shard_of(self, client_id: str) -> int:
        return self._route(_name("client id", client_id, self._settings.max_id_bytes))

    # ---- walks

    def batches(
        self,
        size: int = 100,
        *,
        group: str | None = None,
        user: str | None = None,
        tag: _Tag | None = None,
        status: ConnectionStatus | None = None,
    ) -> Iterator[list[ConnectionMeta]]:
        most = _at_least("size", size, 1)
        return _batched(self._matching(_Filter.of(group, user, tag, status)), most)

    def for_each(
        self,
        fn: Callable[[ConnectionMeta], object],
        *,
        group: str | None = None,
        user: str | None = None,
        tag: _Tag | None = None,
        status: ConnectionStatus | None = None,
    ) -> int:
        calls = 0
        for record in self._matching(_Filter.of(group, user, tag, status)):
            calls += 1
            if fn(record) is False:
                break
        return calls

    def _matching(self, wanted: _Filter) -> Iterator[ConnectionMeta]:
        records = self._indexes.select(wanted) if wanted.by_index else self._records()
        for record in records:
            if record._attached and (wanted.status is None or record._status is wanted.status):
                yield record

    def _records(self) -> Iterator[ConnectionMeta]:
        """Every record that is attached when its turn comes; each shard is as it was when its first turn came."""
        for shard in self._shards:
            for record in shard.snapshot():
                if record._attached:
                    yield record

    # ---- indexes

    def join(self, meta: ConnectionMeta, group: str) -> bool:
        _check_record(meta)
        name = _name("group name", group, self._settings.max_name_bytes)
        self._check_home(meta)
        return self._indexes.join(meta, name, self._settings.max_groups)

    def leave(self, meta: ConnectionMeta, group: str) -> bool:
        _check_record(meta)
        name = _text("group name", group)
        self._check_home(meta)
        return self._indexes.leave(meta, name)

    def _check_home(self, record: ConnectionMeta) -> None:
        if record._home() is not self:
            raise ForeignRecord(record._client_id)

    def group(self, name: str) -> list[ConnectionMeta]:
        return self._indexes.select(_Filter.of(_text("group name", name), None, None, None))

    def groups(self) -> dict[str, int]:
        return self._indexes.group_sizes()

    def by_user(self, user_id: str) -> list[ConnectionMeta]:
        return self._indexes.select(_Filter.of(None, _text("user id", user_id), None, None))

    def due(self, now: int, limit: int = 1000) -> list[ConnectionMeta]:
        now_ns = _int64("now", now)
        most = _at_least("limit", limit, 1)
        found: list[ConnectionMeta] = []
        for shard in self._shards:
            deadlines = [(record._deadline_ns, record) for record in shard.snapshot()]
            due = [(at_ns, record) for at_ns, record in deadlines if at_ns is not None and at_ns <= now_ns]
            due.sort(key=itemgetter(0))
            found += [record for _, record in due[: most - len(found)]]
            if len(found) == most:
                break
        return found

    # ---- figures

    def now_ns(self) -> int:
        return self._settings.now_ns()

    def stats(self) -> dict[str, int]:
        shards = self.shard_stats()
        totals = {name: sum(shard[name] for shard in shards) for name in shards[0]}
        return totals | {"shards": self.shards} | self._indexes.counts()

    def changes(self) -> tuple[int, int]:
        stats = self.shard_stats()
        return sum(shard["adds"] for shard in stats), sum(shard["removes"] for shard in stats)

    def shard_stats(self) -> list[dict[str, int]]:
        return [shard.stats() for shard in self._shards]

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self._indexes.size() + sum(shard.size() for shard in self._shards)


def _batched(records: Iterator[ConnectionMeta], size: int) -> Iterator[list[ConnectionMeta]]:
    while batch := list(islice(records, min(size, sys.maxsize))):  # no more can be asked of islice
        yield batch


def _check_record(meta: object) -> None:
    if not isinstance(meta, ConnectionMeta):
        raise _wrong_type("meta", "a ConnectionMeta", meta)


class Registry(_AnyRegistry):
    """Generation 2: many shards, each looked up without its lock most of the time. See ``_core.pyi``."""

    def _make_shards(self, count: int) -> Sequence[_Shard]:
        return [_SyncMap() for _ in range(count)]

    def _route(self, client_id: str) -> int:
        # Cut, because the string of a lookup may be megabytes long; an id is never that long.
        utf8 = client_id.encode("utf-8", "surrogatepass")[: self._settings.max_id_bytes]
        value = _fnv1a(utf8)
        return (value ^ value >> 16) & (len(self._shards) - 1)


class TraditionalRegistry(_AnyRegistry):
    """Generation 1: one map and one lock, whatever *shards* says. See ``_core.pyi``."""

    def _make_shards(self, count: int) -> Sequence[_Shard]:
        return [_LockedDict()]

    def _route(self, client_id: str) -> int:
        return 0
