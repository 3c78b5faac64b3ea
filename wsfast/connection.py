"""What a connection's record is made of that is plain Python: its status, its quality, its verbs.

This file hides the difference between the two records that exist (native and reference): both store the status
as a small integer and hand out the member of :class:`ConnectionStatus`. Of wsfast it imports only the errors, so
that the core and the reference can share it without sharing code.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypedDict

from wsfast.errors import DetachedRecord, ManagerClosed, MetadataRejected, PeerClosed, PermissionDenied

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta, Registry
    from wsfast.delivery import Message

__all__ = [
    "MISSING",
    "ConnectionStatus",
    "Filters",
    "Missing",
    "Quality",
    "ShardStats",
    "Snapshot",
    "Stats",
    "Tag",
    "UpdateReport",
    "Verbs",
]

Tag: TypeAlias = str | tuple[str, str]
"""What a filter may ask of the tags: ``("plan", "pro")``, or ``"plan"`` for any value."""


class ConnectionStatus(IntEnum):
    """Where a connection is in its life. The numbers are stored in the core and stay as they are."""

    CONNECTING = 0
    """Registered, but the opening handshake (or the application's own greeting) is not over."""
    ONLINE = 1
    """Open, and nothing speaks against it."""
    SUSPECT = 2
    """Open, but overdue: a deadline passed without a sign of life."""
    RECONNECTING = 3
    """The link broke; the record waits for its client to come back."""
    CLOSING = 4
    """A close frame is on its way."""
    OFFLINE = 5
    """Gone: the record is no longer in a registry."""


class Quality(NamedTuple):
    """How good a link is. The zeros of a new record mean "not measured yet"."""

    latency: float = 0.0
    """Smoothed round-trip time, in seconds."""
    jitter: float = 0.0
    """Mean deviation of the round-trip time, in seconds."""
    loss: float = 0.0
    """Share of recent pings that were not answered in time, 0 to 1. On TCP a ping is late, never lost."""


class Filters(TypedDict, total=False):
    """Which connections are meant: those for which all of these hold, and none of the ``not_`` ones. None: no matter.

    Those that take several take them in a ``list``, ``set`` or ``frozenset``, never in a ``tuple``; an empty one
    restricts nothing. A name that nobody can have, or nobody has, is no error: nobody matches it.

    Other types are a ``TypeError``: ``"group name must be str, not int"``, and so on for "user id", "device type", "tag
    key" and "tag value"; ``"tag must be a key or a (key, value) pair, not int"``; ``"status must be a ConnectionStatus,
    not int"``. Filters are checked in this order.
    """

    group: str | list[str] | set[str] | frozenset[str] | None
    """Several: all of them."""
    user: str | None
    tag: Tag | list[Tag] | set[Tag] | frozenset[Tag] | None
    """Several: all of them."""
    status: ConnectionStatus | None
    device_type: str | None
    not_group: str | list[str] | set[str] | frozenset[str] | None
    not_user: str | list[str] | set[str] | frozenset[str] | None
    not_tag: Tag | list[Tag] | set[Tag] | frozenset[Tag] | None
    not_status: ConnectionStatus | list[ConnectionStatus] | set[ConnectionStatus] | frozenset[ConnectionStatus] | None
    not_device_type: str | list[str] | set[str] | frozenset[str] | None


class Missing(Enum):
    """The type of :data:`MISSING`."""

    MISSING = "missing"

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing.MISSING
"""No value: what a metadata key has that is not there. As a new value, it deletes the key."""


class Snapshot(NamedTuple):
    """The metadata of a connection at one moment."""

    version: int
    """To be passed as ``if_version``."""
    metadata: Mapping[str, Any]
    """A read-only mapping that never changes."""


class UpdateReport(NamedTuple):
    """What became of a change for many connections."""

    changed: int
    """How many have it."""
    rejected: tuple[tuple[ConnectionMeta, MetadataRejected], ...]
    """Those that have not, because a limit of theirs would be passed, and which."""


class ShardStats(TypedDict):
    """Counters of one shard since its registry was made."""

    connections: int
    """Attached now."""
    adds: int
    """A replacement counts as one add and one remove."""
    removes: int
    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int
    errors_in: int
    errors_out: int
    longest_probe: int
    """Most table entries that a lookup of a present id has to pass now; 0 in the reference."""


class Stats(ShardStats):
    """The sums over all shards (``longest_probe``: the maximum), and the sizes of the indexes."""

    shards: int
    groups: int
    users: int
    tags: int
    """Distinct (key, value) pairs in use."""


class Verbs:
    """What an application does with a connection it holds; mixed into the records that a manager makes.

    The class adds no field, so a record stays invisible to the garbage collector. A record finds its manager
    through its registry.

    A connection may end at any moment, also between two lines of its own handler. Its record is detached then, and
    ``send`` says what has happened: ``PeerClosed``. ``join`` and ``leave`` raise ``DetachedRecord``; ``close`` has
    nothing left to do.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def client_id(self) -> str: ...
        @property
        def registry(self) -> Registry | None: ...

    def join(self, group: str) -> bool:
        """Join *group*; False if the connection was in it already. See ``Registry.join``."""
        return _registry(self).join(self, group)  # type: ignore[arg-type]

    def leave(self, group: str) -> bool:
        """Leave *group*; False if the connection was not in it. See ``Registry.leave``."""
        return _registry(self).leave(self, group)  # type: ignore[arg-type]

    def allows(self, permission: str) -> bool:
        """Whether *permission* is one of ``permissions``."""
        return permission in _permissions(self)

    def require(self, *permissions: str) -> None:
        """Raise ``PermissionDenied``, with all that are missing, unless the connection has all these permissions."""
        held = _permissions(self)
        missing = tuple(each for each in permissions if each not in held)
        if missing:
            raise PermissionDenied(self.client_id, missing)

    async def send(self, message: Message, *, key: str | None = None) -> None:
        """Send one message to this connection. See ``ConnectionManager.send``."""
        registry = self.registry
        if registry is None:
            raise PeerClosed(self.client_id)
        await _manager(registry).send(self, message, key=key)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close this connection with *code* and *reason*. See ``ConnectionManager.disconnect``."""
        registry = self.registry
        if registry is not None:
            await _manager(registry).disconnect(self, code, reason)


def _permissions(record: Any) -> frozenset[str]:
    return record.permissions  # type: ignore[no-any-return]


def _registry(record: Verbs) -> Registry:
    registry = record.registry
    if registry is None:
        raise DetachedRecord(record.client_id)
    return registry


def _manager(registry: Registry) -> Any:
    if registry.owner is None:
        raise ManagerClosed("not started")
    return registry.owner
