"""The registry in both generations, its metadata and its health in plain Python: a baseline of benchmarks, the oracle
of the tests.

The contract of every public name is in ``wsfast/_core.pyi``, ``wsfast/_metadata.pyi`` and ``wsfast/_health.pyi``; this
file holds it without a line of the native core. It hides how the records are stored and found:

* :class:`Registry`, generation 2: shards chosen by folded FNV-1a, each one a map in the manner of Go's ``sync.Map``.
* :class:`TraditionalRegistry`, generation 1: one dict under one lock.

All the rest (checks, the record, the indexes, walks, :class:`Metadata`) is common to both. :class:`Health` knows no
more of a record than its attributes.

Invariants:

* A record is attached while its ``_attached`` is set. The flag changes under the lock of the record's shard, together
  with the map of the shard; with it go the values that may hold arbitrary objects.
* The indexes have one lock of their own. No thread holds it together with the lock of a shard, nor two of the latter.
* A :class:`Metadata` has one lock of its own. The lock of a shard may be taken under it, never the other way round.
* A record enters an index only while it is attached, which is tested under the lock of the indexes. A removal
  clears the flag first and cleans the indexes next, so whoever came in between is cleaned away with the rest.
* Whoever waits for a lock holds a reference to the registry, so that no registry is destroyed under its own locks.
* Objects of the application are dropped after the lock is released: their destructors may use the registry.

Not guaranteed: between the two steps of a removal other threads may count a detached record in ``groups()`` and
``stats()``. The locks are not reentrant, so what the interpreter runs between any two instructions (a signal handler,
a destructor started by the garbage collector) must not call into a registry that its thread is at work in.
"""

from __future__ import annotations

import inspect
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import (
    Awaitable,
    Callable,
    Hashable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeAlias,
    TypeVar,
    Unpack,
    cast,
    final,
    overload,
)

from wsfast.connection import MISSING, ConnectionStatus, Filters, Quality, Snapshot, Tag, UpdateReport
from wsfast.errors import (
    DetachedRecord,
    DuplicateConnection,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    MetadataRejected,
    Problem,
    UnknownConnection,
    VersionConflict,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "Change",
    "ConnectionMeta",
    "Health",
    "Metadata",
    "Registry",
    "TraditionalRegistry",
    "fnv1_32",
    "fnv1a_32",
    "size_of",
]

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")
# What a filter takes where it takes several.
_Names: TypeAlias = str | list[str] | set[str] | frozenset[str] | None
_Tags: TypeAlias = Tag | list[Tag] | set[Tag] | frozenset[Tag] | None
_Statuses: TypeAlias = (
    ConnectionStatus | list[ConnectionStatus] | set[ConnectionStatus] | frozenset[ConnectionStatus] | None
)
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
_NO_NAMES: frozenset[str] = frozenset()
_NOT_MEASURED = Quality()
_ALL_STATUSES = tuple(ConnectionStatus)


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


class _MetadataState(NamedTuple):
    """Metadata and their version in one object, so that one slot of the record holds both."""

    version: int
    metadata: Mapping[str, Any]
    # How many bytes, and the limit with which they were counted; None if nobody has counted them.
    counted: tuple[int, int] | None = None

    def followed_by(self, metadata: Mapping[str, Any], counted: tuple[int, int] | None = None) -> _MetadataState:
        return _MetadataState(self.version + 1, metadata, counted)


_NO_METADATA = _MetadataState(0, _NOTHING)


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
    _metadata: _MetadataState
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
        return self._metadata.metadata

    @metadata.setter
    def metadata(self, value: Mapping[str, Any]) -> None:
        metadata = _read_only(_mapping("metadata", "metadata key", value, self._settings.max_name_bytes))
        while not self._exchange_metadata(state := self._metadata_now(), state.followed_by(metadata)):
            pass

    @property
    def version(self) -> int:
        return self._metadata.version

    def _metadata_now(self) -> _MetadataState:
        """The state of the metadata of an attached record."""
        registry = self._owner()
        if registry is not None:
            with self._shard.lock:
                if self._attached:
                    return self._metadata
        raise DetachedRecord(self._client_id)

    def _exchange_metadata(self, before: _MetadataState, after: _MetadataState) -> bool:
        """Store *after* if the state is still *before*, which the caller drops without a lock; whether it was."""
        registry = self._owner()
        if registry is not None:
            with self._shard.lock:
                if self._attached:
                    if self._metadata is not before:
                        return False
                    self._metadata = after
                    return True
        raise DetachedRecord(self._client_id)

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
        name = _optional_name("device type", value, self._settings.max_name_bytes)
        registry = self._home()
        registry._indexes.move_device_type(self, name)

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
        self._metadata = _NO_METADATA
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


def _several(check: Callable[[Any], _T], asked: Any) -> tuple[_T, ...]:
    """What a filter asks for, each of it checked. A tuple never means several, because a tag is one."""
    if asked is None:
        return ()
    if isinstance(asked, list | set | frozenset):
        return tuple([check(each) for each in asked])
    return (check(asked),)


def _tag(value: Tag) -> Tag:
    if isinstance(value, str):
        return _text("tag key", value)
    if isinstance(value, tuple) and len(value) == 2:
        return _text("tag key", value[0]), _text("tag value", value[1])
    raise _wrong_type("tag", "a key or a (key, value) pair", value)


_group_name = partial(_text, "group name")
_user_id = partial(_text, "user id")
_device_type = partial(_text, "device type")


@dataclass(frozen=True, slots=True)
class _Filter:
    """Which records are meant, the types checked. What is empty or None restricts nothing."""

    groups: tuple[str, ...] = ()
    user_id: str | None = None
    tags: tuple[Tag, ...] = ()
    statuses: tuple[ConnectionStatus, ...] = _ALL_STATUSES
    device_type: str | None = None
    not_groups: tuple[str, ...] = ()
    not_user_ids: tuple[str, ...] = ()
    not_tags: tuple[Tag, ...] = ()
    not_device_types: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        group: _Names = None,
        user: str | None = None,
        tag: _Tags = None,
        status: ConnectionStatus | None = None,
        device_type: str | None = None,
        not_group: _Names = None,
        not_user: _Names = None,
        not_tag: _Tags = None,
        not_status: _Statuses = None,
        not_device_type: _Names = None,
    ) -> _Filter:
        groups = _several(_group_name, group)
        user_id = None if user is None else _user_id(user)
        tags = _several(_tag, tag)
        statuses = _ALL_STATUSES if status is None else (_status(status),)
        device = None if device_type is None else _device_type(device_type)
        not_groups = _several(_group_name, not_group)
        not_user_ids = _several(_user_id, not_user)
        not_tags = _several(_tag, not_tag)
        not_statuses = _several(_status, not_status)
        not_device_types = _several(_device_type, not_device_type)
        if not_statuses:
            statuses = tuple([each for each in statuses if each not in not_statuses])
        return cls(groups, user_id, tags, statuses, device, not_groups, not_user_ids, not_tags, not_device_types)

    @property
    def by_index(self) -> bool:
        """Whether it names a set of records that is indexed."""
        return bool(self.groups or self.tags) or self.user_id is not None or self.device_type is not None

    @property
    def is_excluding(self) -> bool:
        return bool(self.not_groups or self.not_user_ids or self.not_tags or self.not_device_types)

    def includes(self, record: ConnectionMeta) -> bool:
        """Whether *record* has the groups, the user, the tags and the device type. The lock of the indexes is held."""
        if self.groups and not (record._groups or _NO_NAMES).issuperset(self.groups):
            return False
        if self.user_id is not None and record._user_id != self.user_id:
            return False
        if self.device_type is not None and record._device_type != self.device_type:
            return False
        return not self.tags or all(_has_tag(record, tag) for tag in self.tags)

    def excludes(self, record: ConnectionMeta) -> bool:
        """Whether *record* has a group, a user, a tag or a device type that it must not. The same lock is held."""
        if self.not_groups and not (record._groups or _NO_NAMES).isdisjoint(self.not_groups):
            return True
        if record._user_id in self.not_user_ids or record._device_type in self.not_device_types:
            return True
        return bool(self.not_tags) and any(_has_tag(record, tag) for tag in self.not_tags)


def _has_tag(record: ConnectionMeta, tag: Tag) -> bool:
    if isinstance(tag, str):
        return tag in record._tags
    key, value = tag
    return record._tags.get(key) == value


# ---- indexes ---------------------------------------------------------------------------------------------------------


_NOBODY: _Members = {}


def _insert(index: _Index[_K], name: _K, record: ConnectionMeta) -> None:
    index.setdefault(name, {})[record] = None


def _discard(index: _Index[_K], name: _K, record: ConnectionMeta) -> None:
    members = index.get(name)
    if members is not None:
        members.pop(record, None)
        if not members:
            del index[name]


class _Indexes:
    """Who is in a group, who has a user id, a device type, a tag; and the permission sets, each stored once.

    Every method takes the lock. One that changes a record's place tests first whether the record is attached, and
    raises ``DetachedRecord`` otherwise; ``forget`` follows the end of the attachment, so it has the last word.
    """

    __slots__ = ("_device_types", "_groups", "_lock", "_permissions", "_tag_keys", "_tags", "_users")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: _Index[str] = {}
        self._users: _Index[str] = {}
        self._device_types: _Index[str] = {}
        self._tag_keys: _Index[str] = {}
        self._tags: _Index[tuple[str, str]] = {}
        self._permissions: weakref.WeakValueDictionary[tuple[str, ...], frozenset[str]] = weakref.WeakValueDictionary()

    def shared(self, permissions: set[str]) -> frozenset[str]:
        if not permissions:
            return _NO_NAMES
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
            if record._device_type is not None:
                _insert(self._device_types, record._device_type, record)
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
                if record._device_type is not None:
                    _discard(self._device_types, record._device_type, record)
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
        self._move(record, "_user_id", self._users, user_id)

    def move_device_type(self, record: ConnectionMeta, device_type: str | None) -> None:
        self._move(record, "_device_type", self._device_types, device_type)

    def _move(self, record: ConnectionMeta, slot: str, index: _Index[str], name: str | None) -> None:
        with self._lock:
            self._check_attached(record)
            before = getattr(record, slot)
            if before is not None:
                _discard(index, before, record)
            setattr(record, slot, name)
            if name is not None:
                _insert(index, name, record)

    def move_tags(self, record: ConnectionMeta, tags: Mapping[str, str]) -> None:
        with self._lock:
            self._check_attached(record)
            self._discard_tags(record)
            record._tags = tags
            self._insert_tags(record)

    def _insert_tags(self, record: ConnectionMeta) -> None:
        for tag in record._tags.items():
            _insert(self._tag_keys, tag[0], record)
            _insert(self._tags, tag, record)

    def _discard_tags(self, record: ConnectionMeta) -> None:
        for tag in record._tags.items():
            _discard(self._tag_keys, tag[0], record)
            _discard(self._tags, tag, record)

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
            return {"groups": len(self._groups), "users": len(self._users), "tags": len(self._tags)}

    def members(self, wanted: _Filter) -> list[ConnectionMeta]:
        """The attached records that are in all the sets that a filter names, of which there is one at least."""
        with self._lock:
            return [record for record in self._fewest(wanted) if record._attached and wanted.includes(record)]

    def excludes(self, wanted: _Filter, record: ConnectionMeta) -> bool:
        with self._lock:
            return wanted.excludes(record)

    def select(self, wanted: _Filter, records: Iterable[ConnectionMeta] | None = None) -> list[ConnectionMeta]:
        """The attached ones of *records* that match a filter. None: of those in the sets that it names."""
        with self._lock:
            return [
                record
                for record in (self._fewest(wanted) if records is None else records)
                if record._attached
                and record._status in wanted.statuses
                and wanted.includes(record)
                and not wanted.excludes(record)
            ]

    def _fewest(self, wanted: _Filter) -> _Members:
        """The smallest of the sets that a filter names."""
        sets = [self._groups.get(group, _NOBODY) for group in wanted.groups]
        for tag in wanted.tags:
            sets.append(self._tag_keys.get(tag, _NOBODY) if isinstance(tag, str) else self._tags.get(tag, _NOBODY))
        if wanted.user_id is not None:
            sets.append(self._users.get(wanted.user_id, _NOBODY))
        if wanted.device_type is not None:
            sets.append(self._device_types.get(wanted.device_type, _NOBODY))
        return min(sets, key=len)

    def size(self) -> int:
        """Bytes of the containers."""
        with self._lock:
            tables: list[_Index[Any]] = [self._groups, self._users, self._device_types, self._tag_keys, self._tags]
            sets = [members for table in tables for members in table.values()]
            return sum(sys.getsizeof(container) for container in (self, *tables, *sets))


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
            _NO_METADATA
            if metadata is None
            else _MetadataState(0, _read_only(_mapping("metadata", "metadata key", metadata, max_bytes)))
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
        group: _Names = None,
        user: str | None = None,
        tag: _Tags = None,
        status: ConnectionStatus | None = None,
        device_type: str | None = None,
        not_group: _Names = None,
        not_user: _Names = None,
        not_tag: _Tags = None,
        not_status: _Statuses = None,
        not_device_type: _Names = None,
    ) -> Iterator[list[ConnectionMeta]]:
        most = _at_least("size", size, 1)
        wanted = _Filter.of(
            group, user, tag, status, device_type, not_group, not_user, not_tag, not_status, not_device_type
        )
        return _batched(self._matching(wanted), most)

    def for_each(
        self,
        fn: Callable[[ConnectionMeta], object],
        *,
        group: _Names = None,
        user: str | None = None,
        tag: _Tags = None,
        status: ConnectionStatus | None = None,
        device_type: str | None = None,
        not_group: _Names = None,
        not_user: _Names = None,
        not_tag: _Tags = None,
        not_status: _Statuses = None,
        not_device_type: _Names = None,
    ) -> int:
        wanted = _Filter.of(
            group, user, tag, status, device_type, not_group, not_user, not_tag, not_status, not_device_type
        )
        calls = 0
        for record in self._matching(wanted):
            calls += 1
            if fn(record) is False:
                break
        return calls

    def select(
        self,
        *,
        group: _Names = None,
        user: str | None = None,
        tag: _Tags = None,
        status: ConnectionStatus | None = None,
        device_type: str | None = None,
        not_group: _Names = None,
        not_user: _Names = None,
        not_tag: _Tags = None,
        not_status: _Statuses = None,
        not_device_type: _Names = None,
    ) -> list[ConnectionMeta]:
        wanted = _Filter.of(
            group, user, tag, status, device_type, not_group, not_user, not_tag, not_status, not_device_type
        )
        return self._selected(wanted)

    def _selected(self, wanted: _Filter) -> list[ConnectionMeta]:
        if wanted.by_index:
            return self._indexes.select(wanted)
        return [record for shard in self._shards for record in self._indexes.select(wanted, shard.snapshot())]

    def _matching(self, wanted: _Filter) -> Iterator[ConnectionMeta]:
        """Who was in the sets of a filter at the first ``next``, and matches the rest of it when its turn comes."""
        records = self._indexes.members(wanted) if wanted.by_index else self._records()
        statuses, is_excluding = wanted.statuses, wanted.is_excluding
        for record in records:
            if (
                record._attached
                and record._status in statuses
                and not (is_excluding and self._indexes.excludes(wanted, record))
            ):
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
        return self._indexes.select(_Filter(groups=(_group_name(name),)))

    def groups(self) -> dict[str, int]:
        return self._indexes.group_sizes()

    def by_user(self, user_id: str) -> list[ConnectionMeta]:
        return self._indexes.select(_Filter(user_id=_user_id(user_id)))

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


# ---- metadata --------------------------------------------------------------------------------------------------------

_MAX_LEVELS = 32
# Of how many keys an engine remembers which validators or notifiers they have.
_MAX_REMEMBERED_KEYS = 1024
_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset)
_UNSET = object()

# How many changes, each in answer to the one before, have led to what runs now. It is in the context so that it reaches
# the tasks that a notifier starts; one for all engines, so that two of them cannot answer each other for ever.
_cascade: ContextVar[int] = ContextVar("wsfast.reference.cascade", default=0)


def size_of(value: Any, limit: int = _INT64_MAX, /) -> int:
    """How large a value is; see ``_metadata.pyi``."""
    most = _int64("limit", limit)
    found = _measure(value)
    if isinstance(found, int):
        return found
    total = 8
    levels = [found]  # what is left to count on each level of containers
    while levels and total <= most:
        for item in levels[-1]:
            found = _measure(item)
            if isinstance(found, int):
                total += found
                if total > most:
                    break
            elif len(levels) == _MAX_LEVELS:
                return -1
            else:
                total += 8
                levels.append(found)
                break
        else:
            levels.pop()
    return total


def _measure(value: Any) -> int | Iterator[Any]:
    """The bytes of a value; of a container, what it holds. A subclass cannot say otherwise than its builtin base."""
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, str):
        return max(1, len(str.encode(value, "utf-8", "surrogatepass")))
    if isinstance(value, int):
        return max(8, (int.bit_length(value) + 7) // 8)
    if isinstance(value, float):
        return 8
    if isinstance(value, complex):
        return 16
    if isinstance(value, bytes):
        return max(1, bytes.__len__(value))
    if isinstance(value, bytearray):
        return max(1, bytearray.__len__(value))
    if isinstance(value, memoryview):
        return max(1, value.nbytes)
    for container in _CONTAINERS:
        if isinstance(value, container):
            items: Iterator[Any] = container.__iter__(value)
            return items
    if isinstance(value, dict):
        return chain.from_iterable(dict.items(value))
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    kind = type(value)
    # That our record is a dataclass is nobody's business.
    if is_dataclass(kind) and not issubclass(kind, ConnectionMeta):
        return _fields_of(value, [field.name for field in fields(kind)])
    names = getattr(kind, "__struct_fields__", None)
    return max(1, sys.getsizeof(value)) if names is None else _fields_of(value, names)


def _fields_of(value: object, names: Iterable[str]) -> Iterator[Any]:
    """The fields that have a value: a slot may have none."""
    return (field for name in names if (field := getattr(value, name, _UNSET)) is not _UNSET)


@final
class Change:
    """What happened to one key of one connection; see ``_metadata.pyi``."""

    __slots__ = ("_cascade", "_conn", "_key", "_new", "_old", "_version")

    def __init__(self, conn: ConnectionMeta, key: str, old: Any, new: Any, version: int, cascade: int) -> None:
        self._conn = conn
        self._key = key
        self._old = old
        self._new = new
        self._version = version
        # How many changes led to this one, each in answer to the one before.
        self._cascade = cascade

    @property
    def conn(self) -> ConnectionMeta:
        return self._conn

    @property
    def client_id(self) -> str:
        return self._conn._client_id

    @property
    def key(self) -> str:
        return self._key

    @property
    def old(self) -> Any:
        return self._old

    @property
    def new(self) -> Any:
        return self._new

    @property
    def version(self) -> int:
        return self._version

    def __repr__(self) -> str:
        # Values belong to the application and may hold secrets: they stay out of logs.
        return f"<Change of {self.key!r} of {self.client_id!r}, version {self.version}>"


@dataclass(frozen=True, slots=True, eq=False)
class _Hook:
    """A validator or a notifier, with the keys that it is for."""

    given: Callable[..., object]
    call: Callable[..., Any]
    key: str | None
    prefix: str | None
    is_last_word: bool = False

    def is_for(self, key: str) -> bool:
        if self.key is not None:
            return key == self.key
        return self.prefix is None or key.startswith(self.prefix)


class _Hooks:
    """All validators, or all notifiers, in the order in which they were added.

    It stays as it is; adding one makes another of these. So what it remembers of a key is never out of date.
    """

    __slots__ = ("_by_key", "hooks")

    def __init__(self, hooks: tuple[_Hook, ...] = ()) -> None:
        self.hooks = hooks
        self._by_key: dict[str, tuple[_Hook, ...]] = {}

    def of(self, key: str) -> tuple[_Hook, ...]:
        found = self._by_key.get(key)
        if found is None:
            found = tuple([hook for hook in self.hooks if hook.is_for(key)])
            if len(self._by_key) < _MAX_REMEMBERED_KEYS:
                self._by_key[key] = found
        return found

    def with_added(self, hook: _Hook) -> _Hooks:
        return _Hooks((*self.hooks, hook))

    def without(self, hook: _Hook) -> _Hooks:
        return _Hooks(tuple([each for each in self.hooks if each is not hook]))


@dataclass(slots=True)
class _Wish:
    """A change as the validators have left it, to be made for one record or many.

    Attributes:
        values: the new value of each key, or MISSING.
        sizes: bytes of each key and its value.
        flawed: keys that could be keys, but for a problem of their values. They are in neither of the above.
        problems: what speaks against the change, whatever it is made for.
        is_whole: whether all other keys are to be deleted.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    flawed: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    is_whole: bool = False

    def made(self, metadata: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """What it does to *metadata*: key, old value, new value."""
        made = [
            (key, metadata.get(key, MISSING), value)
            for key, value in self.values.items()
            if value is not MISSING or key in metadata
        ]
        if self.is_whole:
            made += [(key, value, MISSING) for key, value in metadata.items() if key not in self.values]
        return made

    def applied(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What becomes of *metadata*."""
        after = {} if self.is_whole else dict(metadata)
        for key, value in self.values.items():
            if value is MISSING:
                after.pop(key, None)
            else:
                after[key] = value
        return after


class Metadata:
    """The metadata of the connections of a registry; see ``_metadata.pyi``.

    One lock guards its queue, its hooks and its counters. A record's metadata is exchanged under it, so that changes
    enter the queue in the order of their versions. Code of the application runs without it.
    """

    def __init__(
        self,
        registry: Any,
        *,
        max_key_bytes: int = 128,
        max_value_bytes: int = 16384,
        max_keys: int = 64,
        max_bytes: int = 65536,
        max_cascade: int = 16,
        max_queued: int = 100_000,
        later: Callable[[Callable[[Any], Awaitable[object]], Any], object] | None = None,
        wants: Callable[[], bool] | None = None,
        publish: Callable[[tuple[Change, ...]], object] | None = None,
    ) -> None:
        if not isinstance(registry, _AnyRegistry):
            raise _wrong_type("registry", "a Registry", registry)
        self._registry = registry
        # A longer name cannot be stored.
        self._max_key_bytes = min(_at_least("max_key_bytes", max_key_bytes, 1), registry.max_name_bytes)
        self._max_value_bytes = _at_least("max_value_bytes", max_value_bytes, 1)
        self._max_keys = _at_least("max_keys", max_keys, 0)
        self._max_bytes = _at_least("max_bytes", max_bytes, 1)
        self._max_cascade = _at_least("max_cascade", max_cascade, 0)
        self._max_queued = _at_least("max_queued", max_queued, 1)
        self._later, self._wants, self._publish = later, wants, publish
        self._lock = threading.Lock()
        self._validators = _Hooks()
        self._notifiers = _Hooks()
        self._queue: deque[tuple[tuple[Change, ...], bool]] = deque()
        self._is_announcing = False
        self._announcer: tuple[int | None, Callable[[], object] | None] = (None, None)
        self._is_woken = False
        self._counts = dict.fromkeys(("changes", "rejected", "conflicts", "notifier_errors", "unannounced"), 0)

    @property
    def registry(self) -> Any:
        return self._registry

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {f"metadata_{name}": count for name, count in self._counts.items()}

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    # ---- reading

    def get(self, target: str | ConnectionMeta, key: str, default: Any = None) -> Any:
        record = self._record(target)
        name = _text("metadata key", key)
        return record._metadata_now().metadata.get(name, default)

    def snapshot(self, target: str | ConnectionMeta) -> Snapshot:
        state = self._record(target)._metadata_now()
        return Snapshot(state.version, state.metadata)

    def _record(self, target: str | ConnectionMeta) -> ConnectionMeta:
        if isinstance(target, ConnectionMeta):
            self._registry._check_home(target)
            return target
        if isinstance(target, str):
            return self._registry[target]
        raise _wrong_type("target", "a client id or a ConnectionMeta", target)

    # ---- changing

    def set(self, target: str | ConnectionMeta, key: str, value: Any, *, if_version: int | None = None) -> int:
        record = self._record(target)
        return self._change(record, {_text("metadata key", key): value}, if_version)

    def update(self, target: str | ConnectionMeta, changes: Mapping[str, Any], *, if_version: int | None = None) -> int:
        record = self._record(target)
        return self._change(record, _by_key("changes", changes), if_version)

    def replace(
        self, target: str | ConnectionMeta, metadata: Mapping[str, Any], *, if_version: int | None = None
    ) -> int:
        record = self._record(target)
        return self._change(record, _by_key("metadata", metadata), if_version, is_whole=True)

    def delete(self, target: str | ConnectionMeta, key: str, *, if_version: int | None = None) -> int:
        record = self._record(target)
        # No problem is looked for: what is there may go, also a key that is too long for this engine.
        wish = _Wish({_text("metadata key", key): MISSING})
        version = _version(if_version)
        return self._make_for_one(record, wish, version, self._cascade_of_next())

    def update_where(
        self,
        changes: Mapping[str, Any],
        *,
        to: Iterable[str | ConnectionMeta] | None = None,
        **filters: Unpack[Filters],
    ) -> UpdateReport:
        values = _by_key("changes", changes)
        if to is not None and any(asked is not None for asked in filters.values()):
            raise TypeError("to= cannot be combined with filters")
        targets = None if to is None else _targets(to)
        wanted = _Filter.of(**filters)
        cascade = self._cascade_of_next()
        wish = self._validated(values)
        if wish.problems:
            raise self._rejection(wish.problems)
        is_published = self._is_published()
        records = self._registry._selected(wanted) if targets is None else self._present(targets)
        changed = 0
        rejected: list[tuple[Any, MetadataRejected]] = []
        try:
            for record in records:
                try:
                    self._make(record, wish, None, cascade, is_published)
                except MetadataRejected as error:
                    rejected.append((record, error))
                except DetachedRecord:
                    pass  # removed meanwhile, which the report leaves out
                else:
                    changed += 1
        finally:
            self._tell()
        return UpdateReport(changed, tuple(rejected))

    def _present(self, targets: list[str | ConnectionMeta]) -> list[ConnectionMeta]:
        """The records of the registry among *targets*, each once."""
        found: dict[ConnectionMeta, None] = {}
        for target in targets:
            record = target if isinstance(target, ConnectionMeta) else self._registry._find(target)
            if record is not None and record._owner() is self._registry:
                found[record] = None
        return list(found)

    def check(self, metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if metadata is None:
            return None
        wish = self._validated(_by_key("metadata", metadata), is_whole=True)
        self._check_as_a_whole(wish, _NO_METADATA, wish.values, sum(wish.sizes.values()))
        return wish.values

    def _change(
        self, record: ConnectionMeta, values: dict[str, Any], if_version: int | None, *, is_whole: bool = False
    ) -> int:
        version = _version(if_version)
        cascade = self._cascade_of_next()
        return self._make_for_one(record, self._validated(values, is_whole=is_whole), version, cascade)

    def _cascade_of_next(self) -> int:
        """How many changes the next one is in answer to, one after the other."""
        cascade = _cascade.get()
        if cascade > self._max_cascade:
            raise LimitExceeded("changes of metadata in answer to each other", self._max_cascade)
        return cascade

    def _is_published(self) -> bool:
        return self._publish is not None and (self._wants is None or bool(self._wants()))

    def _rejection(self, problems: list[Problem]) -> MetadataRejected:
        self._count("rejected")
        return MetadataRejected(tuple(problems))

    # ---- checking

    def _validated(self, values: dict[str, Any], *, is_whole: bool = False) -> _Wish:
        wish = _Wish(is_whole=is_whole)
        for key, value in values.items():
            if value is MISSING and is_whole:
                continue
            problem = self._problem_of_key(key)
            if problem is not None:
                wish.problems.append(problem)
                continue
            accepted, problems = self._ask_validators(key, value)
            size = 0 if accepted is MISSING or problems else size_of(accepted, self._max_value_bytes)
            if size < 0:
                problems = [Problem(key, f"the value is nested more than {_MAX_LEVELS} levels deep")]
            elif size > self._max_value_bytes:
                problems = [Problem(key, f"the value is over the limit of {self._max_value_bytes} bytes")]
            if problems:
                wish.flawed.add(key)
                wish.problems += problems
            elif accepted is not MISSING:
                wish.values[key] = accepted
                wish.sizes[key] = len(key.encode()) + min(size, self._max_bytes + 1)
            elif not is_whole:
                wish.values[key] = MISSING
        return wish

    def _problem_of_key(self, key: str) -> Problem | None:
        try:
            _name("metadata key", key, self._max_key_bytes)
        except InvalidName as error:
            return Problem(key, f"the key {error.problem}")
        return None

    def _ask_validators(self, key: str, value: Any) -> tuple[Any, list[Problem]]:
        """What the validators make of a value, and what they have against it."""
        problems: list[Problem] = []
        for hook in self._validators.of(key):
            if value is MISSING:
                break
            try:
                returned = hook.call(key, value)
            except Exception as error:
                problems.append(Problem(key, _text_of(error), error))
                if hook.is_last_word:
                    break
            else:
                value = value if returned is None else returned
        return value, problems

    def _check_as_a_whole(self, wish: _Wish, before: _MetadataState, metadata: Mapping[str, Any], nbytes: int) -> None:
        """Raise everything that speaks against the change and against *metadata* of *nbytes*, which it would lead to.

        What is over a limit already may stay so, but not grow.
        """
        problems = list(wish.problems)
        keys = len(metadata.keys() | wish.flawed) if wish.flawed else len(metadata)
        if keys > self._max_keys and keys > len(before.metadata):
            problems.append(Problem(None, f"more than {self._max_keys} keys"))
        if nbytes > self._max_bytes and nbytes > self._bytes_of(before):
            problems.append(Problem(None, f"more than {self._max_bytes} bytes in all"))
        if problems:
            raise self._rejection(problems)

    def _bytes_after(self, wish: _Wish, before: _MetadataState) -> int:
        """Bytes of the metadata as they would become, without the values that have a problem."""
        nbytes = sum(wish.sizes.values())
        if wish.is_whole:
            return nbytes
        nbytes += self._bytes_of(before)
        for key in (*wish.values, *wish.flawed):
            if key in before.metadata:
                nbytes -= self._bytes_of_entry(key, before.metadata[key])
        return nbytes

    def _bytes_of(self, state: _MetadataState) -> int:
        if state.counted is not None:
            nbytes, limit = state.counted
            if limit == self._max_bytes:
                return nbytes
        return sum(self._bytes_of_entry(key, value) for key, value in state.metadata.items())

    def _bytes_of_entry(self, key: str, value: Any) -> int:
        """Bytes of a key and its value, of which those that others have put there may be too large to be counted."""
        size = size_of(value, self._max_bytes)
        return len(key.encode()) + (size if 0 <= size <= self._max_bytes else self._max_bytes + 1)

    # ---- making

    def _make_for_one(self, record: ConnectionMeta, wish: _Wish, if_version: int | None, cascade: int) -> int:
        version = self._make(record, wish, if_version, cascade, self._is_published())
        self._tell()
        return version

    def _make(
        self, record: ConnectionMeta, wish: _Wish, if_version: int | None, cascade: int, is_published: bool
    ) -> int:
        """Make a change and queue it; the version since then. Nothing is changed by a change that changes nothing."""
        while True:
            before = record._metadata_now()
            if if_version is not None and before.version != if_version:
                self._count("conflicts")
                raise VersionConflict(record._client_id, if_version, before.version)
            metadata, nbytes = wish.applied(before.metadata), self._bytes_after(wish, before)
            self._check_as_a_whole(wish, before, metadata, nbytes)
            made = wish.made(before.metadata)
            if not made:
                return before.version
            after = before.followed_by(_read_only(metadata), (nbytes, self._max_bytes))
            changes = tuple([Change(record, key, old, new, after.version, cascade) for key, old, new in made])
            if self._exchange(record, before, after, changes, is_published):
                return after.version

    def _exchange(
        self,
        record: ConnectionMeta,
        before: _MetadataState,
        after: _MetadataState,
        changes: tuple[Change, ...],
        is_published: bool,
    ) -> bool:
        """Put one state in the place of another and queue what is announced of it; False if another was faster."""
        is_heard = is_published or any(self._notifiers.of(change._key) for change in changes)
        with self._lock:
            if not record._exchange_metadata(before, after):
                return False
            self._counts["changes"] += 1
            if is_heard and len(self._queue) < self._max_queued:
                self._queue.append((changes, is_published))
            elif is_heard:
                self._counts["unannounced"] += 1
            return True

    # ---- announcing

    def run_on(self, thread: int | None, wake: Callable[[], object] | None) -> None:
        with self._lock:
            self._announcer = (thread, wake)
            self._is_woken = False

    def _tell(self) -> None:
        """Have announced what is queued."""
        if not self._queue:
            return
        thread, wake = self._announcer
        if thread is None or thread == threading.get_ident():
            self.announce()
        elif wake is not None and self._is_first_to_wake():
            wake()

    def _is_first_to_wake(self) -> bool:
        """Whether the thread that announces was not woken since it has announced."""
        with self._lock:
            was_woken, self._is_woken = self._is_woken, True
            return not was_woken

    def announce(self) -> None:
        thread, _ = self._announcer
        if thread is not None and thread != threading.get_ident():
            return
        with self._lock:
            self._is_woken = False
            if self._is_announcing:
                return
            self._is_announcing = True
        try:
            while (waiting := self._next_in_queue()) is not None:
                self._announce(*waiting)
        except BaseException:
            with self._lock:
                self._is_announcing = False
            raise

    def _next_in_queue(self) -> tuple[tuple[Change, ...], bool] | None:
        """Take the next. An empty queue ends the announcing in the same step, so that nothing is left lying."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._is_announcing = False
            return None

    def _announce(self, changes: tuple[Change, ...], is_published: bool) -> None:
        token = _cascade.set(changes[0]._cascade + 1)
        try:
            for change in changes:
                for hook in self._notifiers.of(change._key):
                    self._notify(hook.given, change, partial(hook.call, change))
            if is_published and self._publish is not None:
                self._notify(self._publish, changes[0], partial(self._publish, changes))
        finally:
            _cascade.reset(token)

    def _notify(self, notifier: Callable[..., object], change: Change, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            self._count("notifier_errors")
            self.failed(notifier, change)

    def failed(self, notifier: Callable[..., object], change: Change) -> None:
        """For subclasses."""

    # ---- validators and notifiers

    def add_validator(
        self,
        validator: Callable[[str, Any], Any],
        *,
        key: str | None = None,
        prefix: str | None = None,
        is_last_word: bool = False,
    ) -> Callable[[], None]:
        names = self._names_of_hook("validator", validator, key, prefix)
        if _is_async(validator):
            raise TypeError("validator must not be async")
        return self._add("_validators", _Hook(validator, validator, *names, is_last_word=bool(is_last_word)))

    def add_notifier(
        self, notifier: Callable[[Change], object], *, key: str | None = None, prefix: str | None = None
    ) -> Callable[[], None]:
        names = self._names_of_hook("notifier", notifier, key, prefix)
        call = self._called_later(notifier) if _is_async(notifier) else notifier
        return self._add("_notifiers", _Hook(notifier, call, *names))

    def _called_later(self, notifier: Callable[[Change], Any]) -> Callable[[Change], object]:
        if self._later is None:
            raise TypeError("an async notifier needs an event loop")

        async def call(change: Change) -> None:
            token = _cascade.set(change._cascade + 1)
            try:
                await notifier(change)
            except Exception:
                self._count("notifier_errors")
                self.failed(notifier, change)
            finally:
                _cascade.reset(token)

        return partial(self._later, call)

    def _names_of_hook(
        self, what: str, given: object, key: str | None, prefix: str | None
    ) -> tuple[str | None, str | None]:
        if not callable(given):
            raise _wrong_type(what, "callable", given)
        if key is not None and prefix is not None:
            raise TypeError("key= cannot be combined with prefix=")
        most = self._max_key_bytes
        return _optional_name("metadata key", key, most), _optional_name("metadata key prefix", prefix, most)

    def _add(self, kind: Literal["_validators", "_notifiers"], hook: _Hook) -> Callable[[], None]:
        def remove() -> None:
            with self._lock:
                setattr(self, kind, getattr(self, kind).without(hook))

        with self._lock:
            setattr(self, kind, getattr(self, kind).with_added(hook))
        return remove


def _by_key(argument: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a mapping whose keys are any strings."""
    if not isinstance(values, Mapping):
        raise _wrong_type(argument, "a mapping", values)
    return {_text("metadata key", key): value for key, value in values.items()}


def _version(value: int | None) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int):
        raise _wrong_type("if_version", "int or None", value)
    return int.__index__(value)


def _targets(to: Iterable[str | ConnectionMeta]) -> list[str | ConnectionMeta]:
    if isinstance(to, str):
        raise _no_target(to)
    try:
        iterator = iter(to)
    except TypeError:
        raise _no_target(to) from None
    targets = list(iterator)
    for target in targets:
        if not isinstance(target, str | ConnectionMeta):
            raise _no_target(target)
    return targets


def _no_target(value: object) -> TypeError:
    return TypeError(f"to must hold client ids and records, not {type(value).__name__}")


def _text_of(error: Exception) -> str:
    """What an exception says, or its type where it says nothing."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return text or type(error).__name__


def _is_async(call: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


# ---- health ----------------------------------------------------------------------------------------------------------

# What a look or a pong has found: bits, as in ``_health.pyi``.
_SUSPECT = 2
_CLEARED = 4
_DEAD = 8
_PING_FAILED = 16
_NEW_GRADE = 32
_LATE = 64
_UNASKED = 128
# A look also says whether to ping.
_PING = 1

_BY_SILENCE, _BY_NO_PONG = 1, 2
_QUIET, _ASKED, _SUSPECTED, _ENDED = range(4)
_GOOD, _FAIR, _POOR, _BAD = range(4)

# What the entries of a trace tell; 0 is nothing.
(
    _TRACE_PING,
    _TRACE_PONG,
    _TRACE_LATE,
    _TRACE_SUSPECT,
    _TRACE_CLEARED,
    _TRACE_LAG,
    _TRACE_STUCK,
    _TRACE_LEFT,
    _TRACE_UNREAD,
    _TRACE_GRADE,
    _TRACE_DEAD,
) = range(1, 12)

_MS = 1_000_000
_HOUR_NS = 3600 * 10**9

# Classes of connections by SRTT: less than 4 ms, 8 ms, ... 512 ms, and more; and those without a sample.
_CLASS_LIMITS_US = tuple(4000 << exponent for exponent in range(8))
_NO_CLASS = 9
_CLASSES = 10
_WAIT_BINS = 64
_WAIT_BIN_NS = 500 * _MS

_MAX_STALLS = 64
_MAX_SWEEPS = 4096
_MAX_PINGS = 4
_MAX_HISTORY = 32

# Groups of facts that a kernel knows.
_KNOWS_BASE, _KNOWS_ACKED, _KNOWS_NOTSENT, _KNOWS_BYTES = 1, 2, 4, 8


class _Facts(NamedTuple):
    """What a kernel says of a connection."""

    known: int = 0
    unacked: int = 0
    retransmits: int = 0
    rtt_us: int = 0
    last_sent_ms: int = 0
    last_ack_ms: int = 0
    bytes_acked: int = 0
    bytes_sent: int = 0
    bytes_retrans: int = 0
    notsent: int = 0
    unread: int = 0


_NO_FACTS = _Facts()


@dataclass(frozen=True, slots=True)
class _HealthSettings:
    """What each one means stands in ``wsfast.health.HealthPolicy``."""

    silence_ns: int
    timeout_ns: int
    answer_ns: int
    write_ns: int
    interval_ns: int
    interval_poor_ns: int
    interval_min_ns: int
    interval_learn_ns: int
    learn_ns: int
    by_acks_ns: int
    late_ns: int
    probe_ns: int
    prior_wait_ns: int
    peak_half_ns: int
    tick_ns: int
    slack_ns: int
    probes: int
    bad_factor: int
    poor_latency_us: int
    poor_loss: int
    bad_loss: int
    calm: int
    trace: int
    limits: Sequence[Sequence[int]]
    risk_per_1000h: float
    pings_per_h: float


class _Stall(NamedTuple):
    """A time that the loop was late for, with the credit of all such times up to its end."""

    begin_ns: int
    end_ns: int
    credit_ns: int


class _HealthClock:
    """The monotonic clock without the time that the loop was late: it stands still while a tick is overdue."""

    __slots__ = ("_slack_ns", "_stalls", "_tick_ns", "_until_ns", "credit_ns", "stall_count")

    def __init__(self, now_ns: int, tick_ns: int, slack_ns: int) -> None:
        self._tick_ns = tick_ns
        self._slack_ns = slack_ns
        self._until_ns = now_ns + tick_ns
        self._stalls: deque[_Stall] = deque(maxlen=_MAX_STALLS)
        self.credit_ns = self.stall_count = 0

    def at(self, now_ns: int) -> int:
        now_ns = min(now_ns, self._until_ns)
        for stall in reversed(self._stalls):
            if now_ns >= stall.end_ns:
                return now_ns - stall.credit_ns
            if now_ns > stall.begin_ns:
                return stall.end_ns - stall.credit_ns
        if not self._stalls:
            return now_ns
        oldest = self._stalls[0]
        return now_ns - (oldest.credit_ns - (oldest.end_ns - oldest.begin_ns))

    def tick(self, now_ns: int) -> int:
        late_ns = now_ns - self._until_ns
        if late_ns <= self._slack_ns:
            late_ns = 0
        else:
            self.credit_ns += late_ns
            self.stall_count += 1
            self._stalls.append(_Stall(self._until_ns, now_ns, self.credit_ns))
        self._until_ns = max(self._until_ns, now_ns + self._tick_ns)
        return late_ns


class _Lessons:
    """How long answers take, by class of connection, and what waits follow from it at the risk that is taken."""

    __slots__ = (
        "_late_ns",
        "_lessons",
        "_newcomers",
        "_pings_per_h",
        "_prior_wait_ns",
        "_spent_ns",
        "_waits",
        "risk",
        "spent",
        "wait_ns",
        "watched_ns",
    )

    def __init__(self, settings: _HealthSettings) -> None:
        self._late_ns = settings.late_ns
        self._prior_wait_ns = settings.prior_wait_ns
        self._pings_per_h = settings.pings_per_h
        self._waits = [[0] * _WAIT_BINS for _ in range(_CLASSES)]
        self._lessons = self._newcomers = self._spent_ns = 0
        self.risk = float(settings.risk_per_1000h)
        self.spent = 0
        self.watched_ns = [0] * _CLASSES
        self.wait_ns: list[int | None] = [None] * _CLASSES

    def learn(self, link_class: int, wait_ns: int, watched_ns: int) -> None:
        self.watched_ns[link_class] += watched_ns
        if wait_ns >= self._late_ns:
            self._waits[link_class][min(wait_ns // _WAIT_BIN_NS, _WAIT_BINS - 1)] += 1
        self._lessons += 1
        if self._lessons % 64 == 0 or wait_ns > 2000 * _MS:
            self._forget_half(link_class)
            self.wait_ns[link_class] = None

    def _forget_half(self, link_class: int) -> None:
        if self.watched_ns[link_class] >= 400 * _HOUR_NS:
            self.watched_ns[link_class] //= 2
            self._waits[link_class] = [count // 2 for count in self._waits[link_class]]

    def wait_of(self, link_class: int) -> int:
        """How long an answer may take in this class."""
        if link_class == _NO_CLASS or self.watched_ns[link_class] < 2 * _HOUR_NS:
            return self._prior_wait_ns
        wait_ns = self.wait_ns[link_class]
        if wait_ns is None:
            wait_ns = self.wait_ns[link_class] = self._find_wait(link_class)
        return wait_ns

    def _find_wait(self, link_class: int) -> int:
        """The shortest that was exceeded no more often than the risk allows."""
        left = self.risk / 1000 * (float(self.watched_ns[link_class]) / _HOUR_NS)
        for longer in range(_WAIT_BINS, 0, -1):
            left -= self._waits[link_class][longer - 1]
            if left < 0:
                return longer * _WAIT_BIN_NS
        return 0

    def takes_teacher(self, link_class: int) -> bool:
        """Whether the next newcomer teaches: all do while little is known of its class, later some."""
        hours = self.watched_ns[link_class] // _HOUR_NS
        every = 1 if hours < 20 else 4 if hours < 200 else 16
        self._newcomers += 1
        return (self._newcomers - 1) % every == 0

    def watch(self, connections_ns: int) -> None:
        """So much time of connections has passed. Every 100 hours the risk moves towards what the pings allow."""
        self._spent_ns += connections_ns
        hours = float(self._spent_ns) / _HOUR_NS
        if hours < 100:
            return
        if self._pings_per_h > 0:
            self.risk *= 1.4 if self.spent > self._pings_per_h * hours else 0.8
            self.risk = min(max(self.risk, 1.0), 1000.0)
        self.wait_ns = [None] * _CLASSES
        self.spent = self._spent_ns = 0


class _Sweeps:
    """When the last sweeps began, by number. Numbers have 32 bits, and 0 is none of them."""

    __slots__ = ("_begun_ns", "last")

    def __init__(self) -> None:
        self._begun_ns = [0] * _MAX_SWEEPS
        self.last = 0

    def begin(self, now_ns: int) -> int:
        self.last = self.last + 1 & _32_BITS or 1
        self._begun_ns[self.last % _MAX_SWEEPS] = now_ns
        return self.last

    def remembers(self, number: int) -> bool:
        return number != 0 and self.last - number & _32_BITS < _MAX_SWEEPS

    def begun_ns(self, number: int) -> int:
        return self._begun_ns[number % _MAX_SWEEPS]


class _RoundTrips:
    """Round trips of one connection, smoothed as in RFC 6298, 2.2 and 2.3; jitter as in RFC 3550, 6.4.1."""

    __slots__ = ("jitter_us", "last_us", "least_us", "smoothed_us", "variation_us")

    def __init__(self) -> None:
        self.smoothed_us = self.variation_us = self.least_us = self.jitter_us = self.last_us = 0

    def add(self, rtt_us: int) -> None:
        rtt_us = max(rtt_us, 1)
        if self.smoothed_us == 0:
            self.smoothed_us = self.least_us = rtt_us
            self.variation_us = rtt_us // 2
        else:
            self.variation_us = (3 * self.variation_us + abs(self.smoothed_us - rtt_us)) // 4
            self.smoothed_us = max((7 * self.smoothed_us + rtt_us) // 8, 1)
            self.jitter_us = (15 * self.jitter_us + abs(self.last_us - rtt_us)) // 16
            self.least_us = min(self.least_us, rtt_us)
        self.last_us = rtt_us

    @property
    def are_known(self) -> bool:
        return self.smoothed_us != 0

    @property
    def expected_ns(self) -> int:
        return (self.smoothed_us + 4 * self.variation_us) * 1000

    @property
    def link_class(self) -> int:
        return bisect_right(_CLASS_LIMITS_US, self.smoothed_us) if self.are_known else _NO_CLASS


@dataclass(slots=True)
class _Ping:
    """A ping that may be answered yet, and whether it is counted as late or in time, or is not to be."""

    number: int
    is_counted: bool


@dataclass(slots=True)
class _TraceEntry:
    at_ns: int
    what: int
    value: int
    number: int


@dataclass(frozen=True, slots=True)
class _Ward:
    """What the connections of one ``Health`` have in common."""

    settings: _HealthSettings
    clock: _HealthClock
    lessons: _Lessons
    sweeps: _Sweeps


class _Vitals:
    """What is known of one connection.

    Names end as in ``_health.pyi``. None stands for a time at which nothing has happened.
    """

    __slots__ = (
        "_acknowledged_bytes",
        "_clock",
        "_lessons",
        "_retransmitted_bytes",
        "_seen_acked",
        "_sent_bytes",
        "_settings",
        "_sweeps",
        "ack_h",
        "asked_h",
        "behind_h",
        "born_h",
        "byte_h",
        "calm",
        "cause",
        "credit_ns",
        "doubted_h",
        "first_h",
        "former_grade",
        "grade",
        "has_reported_stuck",
        "history",
        "interval_ns",
        "is_stuck",
        "kernel_rtt_us",
        "late_in_a_row",
        "late_total",
        "learned_h",
        "peak_h",
        "peak_ns",
        "ping_h",
        "ping_total",
        "pings",
        "probes",
        "retransmitted",
        "state",
        "stuck_bytes",
        "stuck_h",
        "teaches",
        "trace",
        "trips",
        "trusts_kernel",
        "unacked",
        "unacked_h",
        "unread",
    )

    def __init__(self, ward: _Ward, now_ns: int, chance: int) -> None:
        self._settings = ward.settings
        self._clock = ward.clock
        self._lessons = ward.lessons
        self._sweeps = ward.sweeps
        now_h = ward.clock.at(now_ns)
        self.born_h = self.byte_h = self.ack_h = self.asked_h = self.learned_h = self.peak_h = self.stuck_h = now_h
        self.ping_h: int | None = None  # the first one since the last byte
        self.unacked_h: int | None = None
        self.doubted_h: int | None = None  # when the kernel was last trusted no longer
        self.behind_h: int | None = None  # when something last waited in our kernel: a ping may be among it
        self.state, self.grade, self.former_grade, self.calm, self.probes = _QUIET, _GOOD, _GOOD, 0, 0
        self.cause = 0  # once it has ended
        self.teaches = self.trusts_kernel = self.is_stuck = self.has_reported_stuck = False
        self.late_in_a_row = self.peak_ns = self.unread = self.stuck_bytes = 0
        self._sent_bytes = self._retransmitted_bytes = self._acknowledged_bytes = self._seen_acked = 0
        self.retransmitted = self.kernel_rtt_us = self.unacked = 0
        self.pings: list[_Ping] = []  # that may be answered yet, in order
        self.history: deque[bool] = deque(maxlen=_MAX_HISTORY)  # whether each of the last pings was late
        self.ping_total = self.late_total = 0
        self.trips = _RoundTrips()
        self.trace: deque[_TraceEntry] = deque(maxlen=ward.settings.trace)
        self.credit_ns = ward.clock.credit_ns
        self.interval_ns = self._planned_interval_ns(now_h)
        self.first_h = now_h + self.interval_ns // 65536 * chance  # the first ping, if nothing has come before it

    # ---- what is known

    @property
    def loss(self) -> int:
        """Share of the last 32 pings that were not answered in time; those that there were not yet, were."""
        return sum(self.history) * 1000 // _MAX_HISTORY

    @property
    def _late_after_ns(self) -> int:
        return max(self.trips.expected_ns, self._settings.late_ns)

    @property
    def _last_sign_h(self) -> int:
        return max(self.byte_h, self.ack_h) if self.trusts_kernel else self.byte_h

    def silent_ns(self, now_ns: int) -> int:
        return self._clock.at(now_ns) - self._last_sign_h

    def _is_acknowledged(self, since_h: int) -> bool:
        """Whether the path has carried something since then."""
        return self.trusts_kernel and self.ack_h >= since_h

    def is_overdue(self, now_ns: int) -> bool:
        if self.state == _SUSPECTED or self.is_stuck or (self.trusts_kernel and self.unacked_h is not None):
            return True
        return self.ping_h is not None and self._clock.at(now_ns) - self.ping_h >= self._late_after_ns

    def note(self, now_ns: int, what: int, value: int = 0, number: int = 0) -> None:
        if what == _TRACE_LAG and self.trace and self.trace[-1].what == _TRACE_LAG:
            self.trace[-1].value += value
            self.trace[-1].at_ns = now_ns
        else:
            self.trace.append(_TraceEntry(now_ns, what, value, number))

    # ---- grades

    def _grade_by(self, tenths: int) -> int:
        """The worst grade whose limits, of which *tenths* are used, a measure is above."""
        if self.state == _SUSPECTED:
            return _BAD
        measures = (self.trips.smoothed_us, self.trips.jitter_us, self.loss, self.retransmitted)
        for grade in (_BAD, _POOR, _FAIR):
            limits = self._settings.limits[grade - 1]
            if any(measure * 10 > limit * tenths for measure, limit in zip(measures, limits, strict=True)):
                return grade
        return _GOOD

    def _judge(self, now_ns: int) -> int:
        """Worse at once; better by one, when all measures have been well below the limits for a while."""
        before, worst = self.grade, self._grade_by(10)
        is_better = worst <= before and self._grade_by(8) < before
        self.calm = self.calm + 1 if is_better else 0
        if worst > before:
            self.grade = worst
        elif is_better and self.calm >= self._settings.calm:
            self.grade -= 1
            self.calm = 0
        if self.grade == before:
            return 0
        self.former_grade = before
        self.note(now_ns, _TRACE_GRADE, self.grade)
        return _NEW_GRADE

    # ---- the plan

    def _decayed_peak_ns(self, now_h: int) -> int:
        """Its own longest wait, which counts half after each half-life."""
        halves = (now_h - self.peak_h) // self._settings.peak_half_ns
        self.peak_ns >>= halves
        self.peak_h += halves * self._settings.peak_half_ns
        return self.peak_ns

    def _planned_interval_ns(self, now_h: int) -> int:
        settings = self._settings
        wait_ns = max(
            self._decayed_peak_ns(now_h) * 3 // 2 + self.trips.expected_ns,
            self._lessons.wait_of(self.trips.link_class),
        )
        longest_ns = settings.interval_ns
        if self.loss > settings.poor_loss or self.trips.smoothed_us > settings.poor_latency_us:
            longest_ns = min(longest_ns, settings.interval_poor_ns)
        if self.teaches and now_h - self.born_h < settings.learn_ns:
            longest_ns = min(longest_ns, settings.interval_learn_ns)
        return max(min(settings.silence_ns - wait_ns, longest_ns), settings.interval_min_ns)

    # ---- signs of life

    def _take_byte(self, at_h: int) -> None:
        self.byte_h = max(self.byte_h, at_h)
        if self.ping_h is not None and self.byte_h >= self.ping_h:
            self.ping_h = None

    def take_unread(self, now_ns: int, unread: int) -> None:
        """So many bytes have come and wait to be read."""
        before, self.unread = self.unread, unread
        if unread not in (0, before):
            self.note(now_ns, _TRACE_UNREAD, unread)
            self._take_byte(self._clock.at(now_ns))

    def _clear(self, now_ns: int) -> int:
        """It is neither in doubt nor dead."""
        was_suspect = self.state == _SUSPECTED
        self.state = _QUIET if self.ping_h is None else _ASKED
        self.probes = 0
        if not was_suspect:
            return 0
        self.note(now_ns, _TRACE_CLEARED)
        return _CLEARED | self._judge(now_ns)

    def _read_kernel(self, now_ns: int, facts: _Facts) -> None:
        trusted, self.trusts_kernel = self.trusts_kernel, self._is_believable(facts)
        if trusted and not self.trusts_kernel:
            self.doubted_h = self._clock.at(now_ns)
        if not facts.known & _KNOWS_BASE:
            return
        self.kernel_rtt_us = facts.rtt_us
        self.unacked = facts.unacked
        if facts.known & _KNOWS_NOTSENT and facts.notsent != 0 and facts.bytes_acked != self._seen_acked:
            self.behind_h = self._clock.at(now_ns)
        self._seen_acked = facts.bytes_acked
        if facts.known & _KNOWS_BYTES:
            self._count_retransmitted(facts)
        if not self.trusts_kernel:
            return
        self.ack_h = max(self.ack_h, self._clock.at(now_ns - facts.last_ack_ms * _MS))
        if facts.unacked == 0:
            self.unacked_h = None
        elif self.unacked_h is None or self.ack_h > self.unacked_h:
            self.unacked_h = self._clock.at(now_ns - facts.last_sent_ms * _MS)

    def _is_believable(self, facts: _Facts) -> bool:
        """A proxy's kernel answers sooner than the peer itself: then it tells nothing of the peer's life."""
        factor = 8 if self.trusts_kernel else 4
        is_known = bool(facts.known & _KNOWS_BASE) and self.trips.are_known
        return is_known and self.trips.least_us <= factor * (facts.rtt_us + 5000)

    def _count_retransmitted(self, facts: _Facts) -> None:
        sent = facts.bytes_sent - self._sent_bytes
        again = facts.bytes_retrans - self._retransmitted_bytes
        if sent > 0:
            share = again * 1000 // sent if 0 <= again < sent else 1000
            self.retransmitted = (7 * self.retransmitted + share) // 8
        self._sent_bytes = facts.bytes_sent
        self._retransmitted_bytes = facts.bytes_retrans

    # ---- looking

    def look(self, now_ns: int, active_ns: int, facts: _Facts) -> tuple[int, int]:
        """What was found, and when on the health clock to look again."""
        settings, now_h = self._settings, self._clock.at(now_ns)
        factor = settings.bad_factor if self.loss > settings.bad_loss else 1
        next_h = now_h + settings.silence_ns
        found = 0
        if self.state == _ENDED:
            return 0, next_h
        self._note_lag(now_ns)
        self._read_kernel(now_ns, facts)
        active_h = self._clock.at(active_ns)
        if active_h > self.byte_h:
            self._take_byte(active_h)
            if not self._is_unacknowledged(now_h, facts):  # or it would be suspect again at once
                found = self._clear(now_ns)
        if self.is_stuck:
            news, next_h = self._look_at_stuck(now_ns, facts, factor * settings.timeout_ns)
            found |= news
            if self.state == _ENDED:
                return found, next_h
        since_h = self._in_question_since_h(now_h, facts)
        if since_h is not None:
            dead_h = max(self._last_sign_h + factor * settings.silence_ns, since_h + settings.answer_ns)
            news, again_h = self._doubt(now_ns, since_h, dead_h, _BY_SILENCE)
        elif self.ping_h is not None:
            since_h = self.ping_h if self.behind_h is None else max(self.ping_h, self.behind_h)
            dead_h = since_h + factor * settings.timeout_ns
            news, again_h = self._doubt(now_ns, since_h, dead_h, _BY_NO_PONG)
        elif self.is_stuck:
            return found, next_h
        else:
            return self._look_at_quiet(now_ns, found)
        return found | news, min(next_h, again_h)

    def rest(self, now_ns: int) -> None:
        """Something else decides of it for now: no question is open."""
        self.byte_h = max(self.byte_h, self._clock.at(now_ns))
        self.ping_h = None
        self.state = _QUIET
        self.pings.clear()

    def _note_lag(self, now_ns: int) -> None:
        lag_ns = self._clock.credit_ns - self.credit_ns
        if lag_ns != 0:
            self.note(now_ns, _TRACE_LAG, lag_ns // _MS)
            self.credit_ns = self._clock.credit_ns

    def _is_unacknowledged(self, now_h: int, facts: _Facts) -> bool:
        """Whether something of ours is not acknowledged in time."""
        if not self.trusts_kernel or self.unacked_h is None:
            return False
        return facts.retransmits >= 2 or now_h - self.unacked_h > self._late_after_ns

    def _in_question_since_h(self, now_h: int, facts: _Facts) -> int | None:
        """Since when the path is in question; None: it is not."""
        since_h = self.unacked_h if self._is_unacknowledged(now_h, facts) else None
        if self.ping_h is not None and not self._is_acknowledged(self.ping_h):
            asked_h = max(self.ping_h, self.doubted_h or self.ping_h, self.behind_h or self.ping_h)
            since_h = asked_h if since_h is None else min(since_h, asked_h)
        return since_h

    def _doubt(self, now_ns: int, since_h: int, dead_h: int, cause: int) -> tuple[int, int]:
        """In doubt since *since_h*: dead at *dead_h*, suspect as soon as an answer is late, and asked again then.

        What is missed may lie among what we have not read: then it is not dead.
        """
        settings, now_h = self._settings, self._clock.at(now_ns)
        late_h = since_h + self._late_after_ns
        is_to_blame = self.unread == 0 or (self.trusts_kernel and since_h == self.unacked_h)
        if not is_to_blame:
            dead_h = max(dead_h, now_h + 1)
        if now_h >= dead_h:
            return self._end(now_ns, cause), now_h + settings.silence_ns
        if now_h < late_h:
            if self.state != _SUSPECTED:
                self.state = _ASKED
            return 0, min(late_h, dead_h)
        found = self._suspect(now_ns)
        is_time = found != 0 or now_h - self.asked_h >= settings.probe_ns
        if is_time and self.probes < settings.probes and not self.is_stuck:
            self.probes += 1
            found |= self._ask(now_ns, now_h, is_probe=True)
        again_h = now_h + settings.probe_ns
        return found, min(dead_h, again_h) if is_to_blame else again_h

    def _look_at_stuck(self, now_ns: int, facts: _Facts, timeout_ns: int) -> tuple[int, int]:
        """A ping waits to leave: it ends the connection only if the peer takes nothing at all."""
        settings, now_h = self._settings, self._clock.at(now_ns)
        silence_h = now_h + settings.silence_ns
        if facts.known & _KNOWS_ACKED:
            if facts.bytes_acked != self._acknowledged_bytes:
                self.stuck_h = now_h
            self._acknowledged_bytes = facts.bytes_acked
        dead_h = max(self.stuck_h, self.byte_h) + timeout_ns
        found = 0
        if not self.has_reported_stuck and now_h - self.asked_h >= settings.write_ns:
            self.has_reported_stuck = True
            found = _PING_FAILED | self._suspect(now_ns)
        if self.unread == 0 and now_h >= dead_h:
            return found | self._end(now_ns, _BY_NO_PONG), silence_h
        again_h = (now_h if self.has_reported_stuck else self.asked_h) + settings.write_ns
        # While we do not read, each may wait for the other to read.
        return found, min(silence_h, again_h, dead_h) if self.unread == 0 else min(silence_h, again_h)

    def _look_at_quiet(self, now_ns: int, found: int) -> tuple[int, int]:
        """Nothing is in question; ask, if that is due."""
        now_h = self._clock.at(now_ns)
        found |= self._clear(now_ns)
        by_acks_ns = max(self._settings.by_acks_ns, self.interval_ns)
        due_h = min(self._last_sign_h + self.interval_ns, self.byte_h + by_acks_ns)
        if self.ping_total == 0 and self.byte_h == self.born_h:
            due_h = self.first_h
        if now_h < due_h:
            return found if found & _CLEARED else found | self._judge(now_ns), due_h
        found |= self._ask(now_ns, now_h, is_probe=False)
        self.state = _ASKED
        return found, now_h + self._late_after_ns

    def _ask(self, now_ns: int, now_h: int, *, is_probe: bool) -> int:
        """A ping goes out with the sweep that has begun."""
        if len(self.pings) == _MAX_PINGS:  # the oldest will not be answered any more
            self._count(self.pings.pop(0), is_late=True)
        # Of one slow spell, the probes do not count as late pings again.
        self.pings.append(_Ping(self._sweeps.last, is_counted=is_probe))
        self.asked_h = now_h
        if self.ping_h is None:
            self.ping_h = now_h
        self.ping_total += 1
        self._lessons.spent += 1
        self.note(now_ns, _TRACE_PING, number=self._sweeps.last)
        return _PING

    def _suspect(self, now_ns: int) -> int:
        if self.state == _SUSPECTED:
            return 0
        self.state = _SUSPECTED
        self.probes = 0
        for ping in self.pings:
            self._count(ping, is_late=True)
        self.note(now_ns, _TRACE_SUSPECT, self.silent_ns(now_ns) // _MS)
        return _SUSPECT | self._judge(now_ns)

    def _end(self, now_ns: int, cause: int) -> int:
        found = self._suspect(now_ns)
        self.state = _ENDED
        self.cause = cause
        self.note(now_ns, _TRACE_DEAD, cause)
        return found | _DEAD

    # ---- what comes back

    def pong(self, number: int, left_ns: int, now_ns: int) -> tuple[int, int]:
        """What it means, and when on the health clock to look again."""
        now_h, heard_h = self._clock.at(now_ns), self.byte_h
        self._take_byte(now_h)
        places = [place for place, ping in enumerate(self.pings) if ping.number == number]
        if not places or not self._sweeps.remembers(number):
            found = 0 if self.state == _ENDED else self._clear(now_ns)
            return found | _UNASKED, self._next_after_pong_h(now_h)
        begun_ns = self._sweeps.begun_ns(number)
        place = places[0]
        if place == len(self.pings) - 1:
            begun_ns = max(begun_ns, min(left_ns, now_ns))
        wait_h = max(now_h - self._clock.at(begun_ns), 0)  # less, where the clock has gone back
        is_late = wait_h > self._late_after_ns
        self._settle(place, now_h, is_late)
        self._answer_in_trace(number, is_late, wait_h // 1000)
        # Of several late answers that come together, the first has said it.
        is_news = not is_late or self._clock.at(begun_ns) > heard_h
        if is_news:
            self._measure(wait_h, is_late, loop_was_late=wait_h != now_ns - begun_ns)
        if is_late:
            self.peak_ns = max(wait_h, self._decayed_peak_ns(now_h))
            self.peak_h = now_h
        if self.teaches and is_news and self.interval_ns <= self._settings.interval_learn_ns:
            watched_ns = min(now_h - self.learned_h, 4 * self.interval_ns)
            self._lessons.learn(self.trips.link_class, wait_h, watched_ns)
        self.learned_h = now_h
        found = 0 if self.state == _ENDED else self._clear(now_ns)
        self.interval_ns = self._planned_interval_ns(now_h)
        if is_news and not found & _CLEARED:  # by which it has been judged
            found |= self._judge(now_ns)
        return found | (_LATE if is_late else 0), self._next_after_pong_h(now_h)

    def _next_after_pong_h(self, now_h: int) -> int:
        """A newer ping may still be waiting to leave."""
        next_h = now_h + self.interval_ns
        if not self.is_stuck:
            return next_h
        return max(now_h + 1, min(next_h, self.asked_h + self._settings.write_ns))

    def _settle(self, place: int, now_h: int, is_late: bool) -> None:
        """A pong answers its ping and all before it (RFC 6455, 5.5.3)."""
        for ping in self.pings[:place]:
            waited_ns = now_h - self._clock.at(self._sweeps.begun_ns(ping.number))
            was_late = waited_ns > self._late_after_ns or not self._sweeps.remembers(ping.number)
            self._count(ping, is_late=was_late)
        self._count(self.pings[place], is_late=is_late)
        del self.pings[: place + 1]

    def _count(self, ping: _Ping, *, is_late: bool) -> None:
        if not ping.is_counted:
            ping.is_counted = True
            self.history.append(is_late)
            self.late_total += is_late

    def _answer_in_trace(self, number: int, is_late: bool, rtt_us: int) -> None:
        for entry in reversed(self.trace):
            if entry.what == _TRACE_PING and entry.number == number:
                entry.what = _TRACE_LATE if is_late else _TRACE_PONG
                entry.value = min(rtt_us, _32_BITS)
                return

    def _measure(self, wait_h: int, is_late: bool, *, loop_was_late: bool) -> None:
        """Late answers are no measure (Karn), unless three in a row say that the path has become slower."""
        self.late_in_a_row = self.late_in_a_row + 1 if is_late else 0
        if loop_was_late or 0 < self.late_in_a_row < 3:
            return
        is_first = not self.trips.are_known
        self.trips.add(min(wait_h // 1000, _32_BITS))
        if is_first:
            self.teaches = self._lessons.takes_teacher(self.trips.link_class)

    def set_stuck(self, now_ns: int, is_stuck: bool, size: int) -> None:
        now_h = self._clock.at(now_ns)
        size = min(size, _32_BITS)
        if is_stuck and size < self.stuck_bytes:
            self.stuck_h = now_h
        self.stuck_bytes = size
        if self.is_stuck == is_stuck:
            return
        self.is_stuck = is_stuck
        self.has_reported_stuck = False
        if is_stuck:
            self.stuck_h = now_h
            self.ping_h = None
            self.note(now_ns, _TRACE_STUCK, size)
        else:
            self.ping_h = now_h
            self.note(now_ns, _TRACE_LEFT, (now_h - self.asked_h) // _MS)

    # ---- figures

    def figures(self, now_ns: int) -> dict[str, int]:
        return {
            "state": self.state,
            "grade": self.grade,
            "former_grade": self.former_grade,
            "cause": self.cause,
            "silent_ns": self.silent_ns(now_ns),
            "interval_ns": self.interval_ns,
            "srtt_us": self.trips.smoothed_us,
            "rttvar_us": self.trips.variation_us,
            "min_rtt_us": self.trips.least_us,
            "jitter_us": self.trips.jitter_us,
            "loss": self.loss,
            "retransmitted": self.retransmitted,
            "kernel_rtt_us": self.kernel_rtt_us,
            "unacked": self.unacked,
            "trusts_kernel": int(self.trusts_kernel),
            "is_stuck": int(self.is_stuck),
            "pings": self.ping_total,
            "late": self.late_total,
        }

    @property
    def quality(self) -> Quality:
        return Quality(self.trips.smoothed_us / 1e6, self.trips.jitter_us / 1e6, self.loss / 1e3)


class Health:
    """The health of the connections of one registry; see ``_health.pyi``.

    Any object serves as a record that has the attributes ``deadline_ns``, ``status``, ``quality`` and
    ``last_active_ns``, the method ``heartbeat`` and a hash. Without the core nothing asks a kernel: what is known is
    what the connections themselves show, and what ``look`` is given. *fd* and *most_rto_ms* are taken and ignored.
    """

    def __init__(self, settings: dict[str, Any], now_ns: int) -> None:
        given = _HealthSettings(**{field.name: settings[field.name] for field in fields(_HealthSettings)})
        self._ward = _Ward(given, _HealthClock(now_ns, given.tick_ns, given.slack_ns), _Lessons(given), _Sweeps())
        self._counted_h = now_ns
        self._vitals: dict[ConnectionMeta, _Vitals] = {}

    def __len__(self) -> int:
        return len(self._vitals)

    def __contains__(self, record: object) -> bool:
        return record in self._vitals

    def add(self, record: ConnectionMeta, now_ns: int, chance: int = 0, fd: int = -1, most_rto_ms: int = 0) -> None:
        if record in self._vitals:
            raise ValueError(f"{record!r} is known already")
        vitals = self._vitals[record] = _Vitals(self._ward, now_ns, chance)
        _assign(record, "deadline_ns", vitals.first_h)

    def remove(self, record: ConnectionMeta) -> bool:
        return self._vitals.pop(record, None) is not None

    def spare(self, record: ConnectionMeta, now_ns: int) -> None:
        vitals = self._vitals.get(record)
        if vitals is not None:
            vitals.rest(now_ns)
            _assign(record, "deadline_ns", self.at(now_ns) + self._ward.settings.interval_ns)
            self._show_status(record, vitals)

    # ---- the clock

    def at(self, now_ns: int) -> int:
        return self._ward.clock.at(now_ns)

    def tick(self, now_ns: int) -> int:
        return self._ward.clock.tick(now_ns)

    def begin_sweep(self, now_ns: int) -> int:
        now_h = self.at(now_ns)
        self._ward.lessons.watch(len(self._vitals) * (now_h - self._counted_h))
        self._counted_h = now_h
        return self._ward.sweeps.begin(now_ns)

    # ---- looking

    def look(
        self, records: list[ConnectionMeta], now_ns: int, facts: list[Any] | None = None
    ) -> tuple[list[ConnectionMeta], list[tuple[ConnectionMeta, int]]]:
        pings: list[ConnectionMeta] = []
        others: list[tuple[ConnectionMeta, int]] = []
        for record, fact in zip(records, [None] * len(records) if facts is None else facts, strict=True):
            found = self._look_at(record, now_ns, _NO_FACTS if fact is None else _Facts(*fact))
            if found & _PING:
                pings.append(record)
            if found & ~_PING:
                others.append((record, found & ~_PING))
        return pings, others

    def _look_at(self, record: ConnectionMeta, now_ns: int, facts: _Facts) -> int:
        vitals = self._vitals.get(record)
        if vitals is None:  # somebody else gave it a deadline: it would be due for ever
            _assign(record, "deadline_ns", None)
            return 0
        if record.status > ConnectionStatus.SUSPECT:
            vitals.rest(now_ns)
            _assign(record, "deadline_ns", self.at(now_ns) + self._ward.settings.interval_ns)
            return 0
        if vitals.is_overdue(now_ns):
            vitals.take_unread(now_ns, facts.unread)
        found, next_h = vitals.look(now_ns, record.last_active_ns, facts)
        _assign(record, "deadline_ns", next_h)
        if found & _PING:
            vitals.unread = facts.unread  # what has come up to now does not answer it
        if found & ~_PING:
            self._show_status(record, vitals)
        return found

    def _show_status(self, record: ConnectionMeta, vitals: _Vitals) -> None:
        if vitals.state in (_SUSPECTED, _ENDED):
            if record.status == ConnectionStatus.ONLINE:
                _assign(record, "status", ConnectionStatus.SUSPECT)
        elif record.status == ConnectionStatus.SUSPECT:
            _assign(record, "status", ConnectionStatus.ONLINE)

    # ---- what comes back

    def pong(self, record: ConnectionMeta, number: int, left_ns: int, now_ns: int) -> int:
        vitals = self._vitals.get(record)
        if vitals is None:
            return 0
        found, next_h = vitals.pong(number, left_ns, now_ns)
        record.heartbeat(now_ns)
        _assign(record, "deadline_ns", next_h)
        _assign(record, "quality", vitals.quality)
        if found & _CLEARED:
            self._show_status(record, vitals)
        return found

    def stuck(self, record: ConnectionMeta, now_ns: int, is_stuck: bool, size: int = 0) -> None:
        vitals = self._vitals.get(record)
        if vitals is not None:
            vitals.set_stuck(now_ns, bool(is_stuck), size)

    # ---- figures

    def figures(self, record: ConnectionMeta, now_ns: int) -> dict[str, int]:
        return self._vitals[record].figures(now_ns)

    def trace(self, record: ConnectionMeta) -> list[tuple[int, int, int]]:
        return [(entry.at_ns, entry.what, entry.value) for entry in self._vitals[record].trace]

    def totals(self) -> dict[str, Any]:
        clock, lessons = self._ward.clock, self._ward.lessons
        return {
            "credit_ns": clock.credit_ns,
            "stalls": clock.stall_count,
            "risk": lessons.risk,
            "wait_ns": tuple([-1 if wait_ns is None else wait_ns for wait_ns in lessons.wait_ns]),
            "watched_ns": tuple(lessons.watched_ns),
        }


def _assign(record: ConnectionMeta, name: str, value: object) -> None:
    """Set an attribute, unless the record has left its registry meanwhile."""
    with suppress(DetachedRecord):
        setattr(record, name, value)
