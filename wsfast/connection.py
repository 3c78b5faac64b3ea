"""What a connection's record is made of that is plain Python: its status, its quality, its verbs.

This file hides the difference between the two records that exist (native and reference): both store the status
as a small integer and hand out the member of :class:`ConnectionStatus`. Of wsfast it imports only the errors, so
that the core and the reference can share it without sharing code.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from wsfast.errors import DetachedRecord, ManagerClosed, PeerClosed

if TYPE_CHECKING:
    from wsfast._core import Registry
    from wsfast.delivery import Message

__all__ = ["ConnectionStatus", "Quality", "ShardStats", "Stats", "Verbs"]


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


def _registry(record: Verbs) -> Registry:
    registry = record.registry
    if registry is None:
        raise DetachedRecord(record.client_id)
    return registry


def _manager(registry: Registry) -> Any:
    if registry.owner is None:
        raise ManagerClosed("not started")
    return registry.owner
