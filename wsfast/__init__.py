"""wsfast: a WebSocket connection manager for Python servers, with a native core.

::

    from wsfast import ConnectionManager

    manager = ConnectionManager()

    async with manager:
        async with manager.attach(ws, user_id="u1") as conn:
            conn.join("room:1")
            async for message in ws:
                await manager.broadcast(message, group="room:1", exclude=conn)

The core is compiled. There is no fallback for it: where it is missing or broken, ``import wsfast`` is an
``ImportError``, because a server that is silently many times slower is worse than one that does not start. The same
contract in pure Python is ``wsfast.reference``.
"""

from wsfast import events
from wsfast._core import ConnectionMeta, Registry, fnv1_32, fnv1a_32
from wsfast.connection import ConnectionStatus, Quality
from wsfast.delivery import Backpressure, BroadcastResult
from wsfast.errors import (
    DetachedRecord,
    DuplicateConnection,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    ManagerClosed,
    MessageTooBig,
    PeerClosed,
    PeerError,
    PeerFailed,
    PeerTooSlow,
    UnknownConnection,
    UsageError,
    WrongThread,
    WsfastError,
)
from wsfast.events import (
    ConnectionClosed,
    ConnectionOpened,
    ConnectionTooSlow,
    Event,
    MessageConflated,
    MessagesDropped,
    SendFailed,
)
from wsfast.manager import CloseReport, ConnectionManager, DrainPolicy

__all__ = [
    "Backpressure",
    "BroadcastResult",
    "CloseReport",
    "ConnectionClosed",
    "ConnectionManager",
    "ConnectionMeta",
    "ConnectionOpened",
    "ConnectionStatus",
    "ConnectionTooSlow",
    "DetachedRecord",
    "DrainPolicy",
    "DuplicateConnection",
    "Event",
    "ForeignRecord",
    "InvalidName",
    "InvalidSetting",
    "LimitExceeded",
    "ManagerClosed",
    "MessageConflated",
    "MessageTooBig",
    "MessagesDropped",
    "PeerClosed",
    "PeerError",
    "PeerFailed",
    "PeerTooSlow",
    "Quality",
    "Registry",
    "SendFailed",
    "UnknownConnection",
    "UsageError",
    "WrongThread",
    "WsfastError",
    "__version__",
    "events",
    "fnv1_32",
    "fnv1a_32",
]

__version__ = "0.1.0"
