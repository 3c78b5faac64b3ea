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
from wsfast.connection import MISSING, ConnectionStatus, Quality
from wsfast.delivery import Backpressure, BroadcastResult
from wsfast.errors import (
    BadHandshake,
    ClientClosed,
    DetachedRecord,
    DuplicateConnection,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    ManagerClosed,
    MessageTooBig,
    MetadataRejected,
    PeerClosed,
    PeerError,
    PeerFailed,
    PeerTooSlow,
    PermissionDenied,
    Problem,
    QueueFull,
    UnknownConnection,
    UsageError,
    VersionConflict,
    WrongThread,
    WsfastError,
)
from wsfast.events import (
    ConnectionCleared,
    ConnectionClosed,
    ConnectionInterrupted,
    ConnectionOpened,
    ConnectionResumed,
    ConnectionSuspect,
    ConnectionTooSlow,
    Event,
    GradeChanged,
    LoopLate,
    MessageConflated,
    MessagesDropped,
    MetadataChanged,
    SendFailed,
)
from wsfast.health import Explanation, Grade, HealthPolicy
from wsfast.manager import CloseReport, ConnectionManager, DrainPolicy
from wsfast.metadata import MetadataLimits
from wsfast.reconnect import HerdPolicy
from wsfast.session import SessionPolicy

__all__ = [
    "MISSING",
    "Backpressure",
    "BadHandshake",
    "BroadcastResult",
    "ClientClosed",
    "CloseReport",
    "ConnectionCleared",
    "ConnectionClosed",
    "ConnectionInterrupted",
    "ConnectionManager",
    "ConnectionMeta",
    "ConnectionOpened",
    "ConnectionResumed",
    "ConnectionStatus",
    "ConnectionSuspect",
    "ConnectionTooSlow",
    "DetachedRecord",
    "DrainPolicy",
    "DuplicateConnection",
    "Event",
    "Explanation",
    "ForeignRecord",
    "Grade",
    "GradeChanged",
    "HealthPolicy",
    "HerdPolicy",
    "InvalidName",
    "InvalidSetting",
    "LimitExceeded",
    "LoopLate",
    "ManagerClosed",
    "MessageConflated",
    "MessageTooBig",
    "MessagesDropped",
    "MetadataChanged",
    "MetadataLimits",
    "MetadataRejected",
    "PeerClosed",
    "PeerError",
    "PeerFailed",
    "PeerTooSlow",
    "PermissionDenied",
    "Problem",
    "Quality",
    "QueueFull",
    "Registry",
    "SendFailed",
    "SessionPolicy",
    "UnknownConnection",
    "UsageError",
    "VersionConflict",
    "WrongThread",
    "WsfastError",
    "__version__",
    "events",
    "fnv1_32",
    "fnv1a_32",
]

__version__ = "0.1.0"
