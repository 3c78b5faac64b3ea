"""The contract of the native core, ``wsfast._core``, which ``wsfast.reference`` honours too.

Words used here:

* *attached*: a record that is in a registry. A record is attached from ``Registry.add`` until it is removed,
  replaced or cleared, or its registry is destroyed; then it is *detached*, for good.
* *name*: a client id, user id, group name, device type, permission, tag key or tag value, metadata key or extension
  key. A name is an exact ``str`` (an instance of a subclass is converted) of 1 to ``max_id_bytes`` (client ids) or
  ``max_name_bytes`` (everything else) bytes in UTF-8; only a tag value may be empty. Another type is a
  ``TypeError("client id must be str, not int")``; another string is ``InvalidName(kind, problem)`` with one of the
  problems ``is empty``, ``is over the limit of 256 bytes in UTF-8``, ``holds a lone surrogate, so it has no UTF-8
  form``, tested in this order, with the length of a string that has no UTF-8 form not tested. The kinds are "client
  id", "user id", "group name", "device type", "permission", "tag key", "tag value", "metadata key", "extension key".
* *now_ns*, *deadline_ns*: integer nanoseconds of the registry's clock, which is ``time.monotonic_ns`` unless another
  one was passed.
* Times without a suffix are wall-clock seconds since the epoch, for display: ``datetime.fromtimestamp`` takes them.

Every call either does all it says or raises and changes nothing. Arguments are checked in the order of the
signature, and a mapping or iterable argument is read once, before anything changes.

Threads: every method may be called from any thread, with and without the GIL; an iterator, as everywhere in Python, is
for one thread at a time. No Python code runs under a lock.
"""

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from typing_extensions import Buffer, disjoint_base

from wsfast.connection import ConnectionStatus, Filters, Quality, ShardStats, Stats

__all__ = ["ConnectionMeta", "Registry", "fnv1_32", "fnv1a_32"]

_T = TypeVar("_T")

@disjoint_base
class ConnectionMeta:
    """Everything known about one connection. Made by ``Registry.add``, never directly (``TypeError``).

    Records compare and hash by identity, take weak references, and are not visited by the garbage collector.

    A detached record still tells its ``client_id``, ``user_id``, ``device_type``, ``permissions``, ``tags``, times,
    counters and quality. What may hold arbitrary objects (``conn``, ``device_info``, ``session``, ``metadata``,
    ``extensions``) was dropped, so that no reference cycle through a record can outlive it: reading them gives
    ``None`` or an empty mapping. It has no ``groups``, and its ``status`` is ``OFFLINE``. Assigning to an attribute
    of a detached record raises ``DetachedRecord``; ``touch``, ``received``, ``sent``, ``failed`` and ``heartbeat`` on
    it do nothing, because late bytes of a closed connection are no fault.

    Cost: reading an attribute is O(1). ``groups`` is O(groups).
    """

    @property
    def client_id(self) -> str: ...
    @property
    def registry(self) -> Registry | None:
        """The registry it is attached to; None once it is detached."""
    @property
    def attached(self) -> bool: ...
    conn: Any
    """The server library's connection object, or None."""
    session: Any
    """Any object of the application; opaque."""
    device_info: Any
    """Any object of the application that describes the device; opaque."""
    @property
    def user_id(self) -> str | None:
        """Assigning a name or None moves the record in the user index."""
    @user_id.setter
    def user_id(self, value: str | None) -> None: ...
    @property
    def device_type(self) -> str | None:
        """Assigning a name or None moves the record in the index of device types."""
    @device_type.setter
    def device_type(self, value: str | None) -> None: ...
    @property
    def status(self) -> ConnectionStatus:
        """Assigning takes a ``ConnectionStatus`` (else ``TypeError("status must be a ConnectionStatus, not int")``)."""
    @status.setter
    def status(self, value: ConnectionStatus) -> None: ...
    @property
    def permissions(self) -> frozenset[str]:
        """Equal sets of attached records are one object. Assigning takes an iterable of names, but no ``str``: that is a
        ``TypeError("permissions must be an iterable of str, not str")``, as is what cannot be iterated over."""
    @permissions.setter
    def permissions(self, value: Iterable[str]) -> None: ...
    @property
    def tags(self) -> Mapping[str, str]:
        """A read-only mapping (``types.MappingProxyType``) that never changes. Assigning a mapping (else
        ``TypeError("tags must be a mapping, not list")``) moves the record in the tag index. More than ``max_tags``
        of them is ``LimitExceeded("tags of one connection", max_tags)``. Keys and values are checked pair by pair."""
    @tags.setter
    def tags(self, value: Mapping[str, str]) -> None: ...
    @property
    def metadata(self) -> Mapping[str, Any]:
        """A read-only mapping (``types.MappingProxyType``) that never changes: assigning a mapping of names to
        objects (else ``TypeError("metadata must be a mapping, not list")``) stores a copy of it as a whole. Nobody
        validates or announces that: see ``wsfast._metadata``."""
    @metadata.setter
    def metadata(self, value: Mapping[str, Any]) -> None: ...
    @property
    def version(self) -> int:
        """How often the metadata was changed: 0 for a new record, whatever it was made with, and one more with each
        assignment to ``metadata`` and each change of ``wsfast._metadata.Metadata``. 0 once detached."""
    @property
    def extensions(self) -> dict[str, Any]:
        """A mutable dict for code that extends the server, made when first read. Of a detached record: a new empty
        dict each time. Assigning works as for ``metadata``."""
    @extensions.setter
    def extensions(self, value: Mapping[str, Any]) -> None: ...
    @property
    def quality(self) -> Quality:
        """Kept in single precision. Assigning takes a ``Quality`` (else ``TypeError("quality must be a Quality, not
        tuple")``) with latency and jitter from 0 to 1e6 and loss from 0 to 1; otherwise
        ``InvalidSetting("quality.latency", value, "from 0 to 1000000")`` or ``InvalidSetting("quality.loss", value,
        "from 0 to 1")``, latency before jitter before loss."""
    @quality.setter
    def quality(self, value: Quality) -> None: ...
    @property
    def deadline_ns(self) -> int | None:
        """When ``Registry.due`` shall report this record; None: never, as for a new record. Assigning takes an int
        from 0 to 2**63 - 2, or None; otherwise ``InvalidSetting("deadline_ns", value, "from 0 to 2**63 - 2")``; what is
        neither int nor None is a ``TypeError("deadline_ns must be int or None, not float")``. None once detached."""
    @deadline_ns.setter
    def deadline_ns(self, value: int | None) -> None: ...
    @property
    def groups(self) -> frozenset[str]:
        """A snapshot of the groups it is in."""
    @property
    def created(self) -> float: ...
    @property
    def last_active(self) -> float: ...
    @property
    def last_heartbeat(self) -> float | None:
        """None before the first ``heartbeat``."""
    @property
    def created_ns(self) -> int: ...
    @property
    def last_active_ns(self) -> int:
        """Time of the last sign of life; ``created_ns`` before the first."""
    @property
    def last_heartbeat_ns(self) -> int | None: ...
    @property
    def idle(self) -> float:
        """Seconds since ``last_active_ns``, never negative."""
    @property
    def messages_in(self) -> int: ...
    @property
    def messages_out(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def errors_in(self) -> int: ...
    @property
    def errors_out(self) -> int: ...
    def touch(self, now_ns: int | None = None) -> None:
        """Note a sign of life at *now_ns* (default: the clock). The last call counts, also if it goes back."""
    def heartbeat(self, now_ns: int | None = None) -> None:
        """Note an answered heartbeat, which is a sign of life too."""
    def received(self, nbytes: int, messages: int = 1) -> None:
        """Count *messages* with *nbytes* of payload from the peer, and note a sign of life.

        A negative number is ``InvalidSetting("nbytes", value, "0 or more")`` (or ``"messages"``)."""
    def sent(self, nbytes: int, messages: int = 1) -> None:
        """Count messages to the peer; no sign of life. Errors as for ``received``."""
    def failed(self, direction: Literal["in", "out"]) -> None:
        """Count an error. Another direction is ``InvalidSetting("direction", value, "'in' or 'out'")``."""

@disjoint_base
class Registry:
    """Who is connected. A ``Mapping[str, ConnectionMeta]`` with indexes by group, user and tag.

    Args:
        shards: number of shards, a power of two from 1 to 65536 (``InvalidSetting("shards", value, "a power of two
            from 1 to 65536")``; not an int: ``TypeError("shards must be int, not str")``; the same text for the limits
            below). It changes no result but ``shard_of`` and the stats.
        max_id_bytes, max_name_bytes: longest client id and longest other name, in bytes of UTF-8; 1 or more
            (``InvalidSetting("max_id_bytes", value, "1 or more")``).
        max_tags, max_groups: most tags and groups of one connection; 0 or more (``..., "0 or more"``).
        clock: returns monotonic nanoseconds, ``time.monotonic_ns`` by default.
        wall_clock: returns seconds since the epoch, ``time.time`` by default.
        record_type: class of the records: ``ConnectionMeta`` or a subclass that adds no field and no ``__dict__``
            (``TypeError("record_type must be a subclass of ConnectionMeta with empty __slots__")``).

    The clocks are called without a lock held. A registry that still holds connections when it becomes part of a
    reference cycle is not collected: ``clear`` it first (a ``ConnectionManager`` does so when it closes).
    """

    owner: Any
    """For whoever builds on the registry (the manager puts itself here); None at first."""

    def __new__(
        cls,
        shards: int = 64,
        *,
        max_id_bytes: int = 256,
        max_name_bytes: int = 256,
        max_tags: int = 64,
        max_groups: int = 1024,
        clock: Callable[[], int] | None = None,
        wall_clock: Callable[[], float] | None = None,
        record_type: type[ConnectionMeta] | None = None,
    ) -> Self: ...
    @property
    def shards(self) -> int: ...
    @property
    def max_id_bytes(self) -> int: ...
    @property
    def max_name_bytes(self) -> int: ...
    @property
    def max_tags(self) -> int: ...
    @property
    def max_groups(self) -> int: ...
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
        status: ConnectionStatus = ...,  # ONLINE
        on_duplicate: Literal["reject", "replace"] = "reject",
    ) -> ConnectionMeta:
        """Register a connection and return its record.

        With ``on_duplicate="replace"`` a record of the same id leaves first, as if by ``remove``; no other thread
        sees the id absent in between. Counters, groups and metadata of the old record are not taken over.

        Raises:
            InvalidName, LimitExceeded, TypeError: see the attributes of ``ConnectionMeta``. *groups* follows the rules
                of *permissions* (``TypeError("groups must be an iterable of str, not str")``), with
                ``LimitExceeded("groups of one connection", max_groups)``.
            InvalidSetting: *on_duplicate* is neither (``"on_duplicate"``, value, ``"'reject' or 'replace'"``).
            DuplicateConnection: the id is taken, and ``on_duplicate="reject"``; found after all other errors.

        Cost: O(1) amortised, plus O(1) for each group and tag. Threads: any.
        """
    def remove(self, client_id: str | ConnectionMeta) -> ConnectionMeta | None:
        """Take a connection out and return its record, now detached; None if it was not there.

        Passing the record itself removes it only if it is still the one registered, so that the late end of a
        replaced connection cannot remove its successor; a detached record gives None, one of another registry
        ``ForeignRecord``. Another type is ``TypeError("client id must be str, not int")``.

        Cost: O(1), plus O(1) for each group and tag. Threads: any.
        """
    def clear(self) -> int:
        """Remove every connection that is there when the call comes to its shard; returns how many."""
    def __getitem__(self, client_id: str, /) -> ConnectionMeta:
        """Raises ``UnknownConnection`` (a ``KeyError``) where absent."""
    @overload
    def get(self, client_id: str) -> ConnectionMeta | None: ...
    @overload
    def get(self, client_id: str, default: _T) -> ConnectionMeta | _T:
        """The record, or *default*. Any ``str`` may be asked for; one that cannot be an id is absent. Another type is
        ``TypeError("client id must be str, not int")``, here and in ``in``, ``[]``, ``get_many`` and ``shard_of``."""
    def get_many(self, client_ids: Iterable[str]) -> list[ConnectionMeta | None]:
        """The records in the order of *client_ids*, None where absent.

        Cost: O(ids); the lookups overlap their waits for memory, so one call for many ids is several times
        faster than as many calls of ``get`` where the registry is larger than the caches.
        """
    def __contains__(self, client_id: object, /) -> bool: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> Literal[True]:
        """A registry is true, also when it is empty, so that ``registry or default`` cannot lose one."""
    def __iter__(self) -> Iterator[str]:
        """Ids, with the guarantee of ``batches``."""
    def keys(self) -> KeysView[str]: ...
    def values(self) -> ValuesView[ConnectionMeta]: ...
    def items(self) -> ItemsView[str, ConnectionMeta]: ...
    def shard_of(self, client_id: str) -> int:
        """``(h ^ (h >> 16)) & (shards - 1)`` of ``h = fnv1a_32(client_id in UTF-8)``: the same on every machine.

        Raises ``InvalidName`` for a string that cannot be an id."""
    def batches(self, size: int = 100, **filters: Unpack[Filters]) -> Iterator[list[ConnectionMeta]]:
        """Lists of *size* records (the last one shorter, none empty), of those that match all the filters given.

        With a ``group``, ``user``, ``tag`` or ``device_type``, the members are those at the time of the first ``next``;
        ``status`` and ``not_status`` are looked at when the record's turn comes, the other ``not_`` filters when its
        batch is formed. A record that is detached by then is left out.

        Promise: what is read of one shard for one batch is consistent; the whole iteration is no snapshot. A
        connection that is attached (and matches) from start to end is yielded exactly once, whatever is added or
        removed meanwhile, also from inside the loop. The order is not specified.

        Raises (from the call itself, not from the first ``next``):
            InvalidSetting: *size* is less than 1 (``"size"``, value, ``"1 or more"``).
            TypeError: ``"size must be int, not str"``; and for the filters, see ``Filters``.

        Cost: O(1) for each record passed over or yielded; one shard lock at a time, for one batch at most.
        """
    def for_each(self, fn: Callable[[ConnectionMeta], object], **filters: Unpack[Filters]) -> int:
        """Call *fn* with each record, under the promise of ``batches``, until it returns ``False`` itself.

        Returns the number of calls made. An exception of *fn* ends the walk and comes through unchanged."""
    def select(self, **filters: Unpack[Filters]) -> list[ConnectionMeta]:
        """All records that match all the filters now, in no order; without filters, everybody.

        Raises: as ``batches``.

        Cost: O(members of the smallest of the sets that ``group``, ``user``, ``tag``, ``device_type`` and ``status`` name),
        whatever the size of the registry; O(1) for each filter and member. With none but ``not_`` filters: O(records).
        Threads: any. On a free-threaded build the answer is put together from each index at a moment of its own.
        """
    def join(self, meta: ConnectionMeta, group: str) -> bool:
        """Put a connection into a group, which begins to exist with its first member; False if it was in it.

        Raises:
            TypeError: *meta* is no record (``"meta must be a ConnectionMeta, not str"``), or *group* is no ``str``.
            InvalidName, LimitExceeded: as for ``add``.
            ForeignRecord, DetachedRecord: *meta* belongs to another registry, or to none any more. A record that was
                detached from another registry is ``DetachedRecord`` too.

        Cost: O(1) amortised. Threads: any.
        """
    def leave(self, meta: ConnectionMeta, group: str) -> bool:
        """Take a connection out of a group, which ends with its last member; False if it was not in it.

        Errors of *meta* and the type of *group* as for ``join``; a string that cannot be a name gives False.
        Cost: O(1). Threads: any."""
    def group(self, name: str) -> list[ConnectionMeta]:
        """The members now, in no order; empty for a group that does not exist. ``TypeError`` for a non-``str``."""
    def groups(self) -> dict[str, int]:
        """All groups that have members, with how many."""
    def by_user(self, user_id: str) -> list[ConnectionMeta]:
        """The user's connections now; empty for an unknown user. ``TypeError("user id must be str, not int")``."""
    def due(self, now: int, limit: int = 1000) -> list[ConnectionMeta]:
        """Records whose deadline is at or before *now* (nanoseconds of the clock), at most *limit* of them.

        Shard by shard, in deadline order within each shard. It changes no deadline: give each record a new one, or
        None, and call again while the list is as long as *limit*.

        Raises: ``TypeError("now must be int, not float")`` and the same for *limit*;
        ``InvalidSetting("limit", value, "1 or more")``.

        Cost: O(blocks of 64 records) where none is due, which is microseconds for a million connections.
        """
    def now_ns(self) -> int:
        """What the registry's clock says."""
    def stats(self) -> Stats: ...
    def changes(self) -> tuple[int, int]:
        """How many connections were added and removed so far, replacing counted as both. Cost: O(shards)."""
    def shard_stats(self) -> list[ShardStats]:
        """One entry for each shard, in order. Cost: O(table entries), for ``longest_probe``."""
    def __sizeof__(self) -> int:
        """Bytes that the registry holds, its tables, indexes and records included; not the ids and other objects
        that callers made. In the reference: of the containers only."""

def fnv1_32(data: Buffer, /) -> int:
    """FNV-1, 32 bits (RFC 9923): multiply, then xor. The hash of Go's ``fnv.New32``. Cost: O(bytes)."""

def fnv1a_32(data: Buffer, /) -> int:
    """FNV-1a, 32 bits (RFC 9923): xor, then multiply. The hash that the shard router folds. Cost: O(bytes)."""
