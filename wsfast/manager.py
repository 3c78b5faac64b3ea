"""The connection manager: the one class users meet.

It hides how a registry, the library's connection objects, delivery and events are kept in step:

- A connection is registered from the start of ``async with manager.attach(...)`` until it ends, for whatever reason
  that comes first: the block is left (also by an exception or a cancellation), the peer goes, the link breaks, somebody
  calls :meth:`ConnectionManager.disconnect`, a newer connection takes over its id, or the manager closes.
- ``ConnectionOpened`` and ``ConnectionClosed`` are published once each, and in this order, for every registration.
- A client that speaks the protocol of resume (docs/resume.md) stays registered while it is away, for a limited time:
  its record has the status RECONNECTING and no connection object. In between there may be any number of
  ``ConnectionInterrupted`` and ``ConnectionResumed``.
- Leaving the block unregisters, but does not close: the server library does that when its handler returns.

Not guaranteed: that a handler ends when its connection does. It notices at its next use of the connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from random import random
from time import monotonic_ns, perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack, cast

from wsfast import reference
from wsfast._core import ConnectionMeta, Registry
from wsfast._health import Health
from wsfast._metadata import Change
from wsfast.adapters import Closed, adapter_for
from wsfast.connection import ConnectionStatus, Filters, Verbs
from wsfast.delivery import BACKPRESSURE, Backpressure, BroadcastResult, Delivery, Message, Undelivered
from wsfast.errors import (
    DuplicateConnection,
    ForeignRecord,
    InvalidSetting,
    ManagerClosed,
    PeerClosed,
    PeerFailed,
    UnknownConnection,
    WrongThread,
)
from wsfast.events import (
    ConnectionClosed,
    ConnectionInterrupted,
    ConnectionOpened,
    ConnectionResumed,
    Event,
    EventBus,
    MetadataChanged,
)
from wsfast.health import HEALTH, Explanation, HealthMonitor, HealthPolicy
from wsfast.heartbeat import Heartbeat
from wsfast.metadata import METADATA, Declarations, MetadataLimits, MetadataManager
from wsfast.reconnect import HERD, Advice, Herd, HerdPolicy, Verdict, check_close, verdict_of
from wsfast.session import (
    BAD_HANDSHAKE,
    SESSIONS,
    SUPERSEDED,
    TOO_LATE,
    Hello,
    Session,
    SessionPolicy,
    Sessions,
    Welcome,
)

if TYPE_CHECKING:
    from wsfast._fanout import Link
    from wsfast.adapters import Adapter
    from wsfast.delivery import Excluded

__all__ = ["REPLACED", "Attachment", "CloseReport", "Connection", "ConnectionManager", "DrainPolicy", "RecordFields"]

logger = logging.getLogger(__name__)

_E = TypeVar("_E", bound=Event)
_T = TypeVar("_T")

REPLACED = Closed(SUPERSEDED, "replaced by a newer connection", "us")
"""How a connection is closed whose id a newer one took with ``on_duplicate="replace"``. A client that is told this
must not connect again by itself, or the two would push each other out for ever."""

TAKEN_OVER = Closed(SUPERSEDED, "its client goes on with another connection", "us")
"""How the former connection of a session is closed that looks alive when its client comes back."""
# "Service restart", of the registry of IANA.
_RESTART = 1012

# 128 bits: nobody guesses a client id that the manager made.
_GENERATED_ID_BYTES = 16

# How long a handler that has returned waits for its library to send what was queued before.
_LAST_WORDS_S = 10.0

# What asynchronous subscribers may take for their last events after the connections are closed.
_EVENTS_GRACE_S = 1.0

# Close codes by which somebody ends a connection for good, all codes of applications among them. What has another one
# was lost; and so was what ends for a handshake that is none, or that did not come in time.
_DELIBERATE = frozenset({1000, 1001, 1005, 1008, 1010, *range(3000, 5000)}) - {BAD_HANDSHAKE, TOO_LATE}

# What is kept for clients that come back is looked through at least so often within the age that it may reach.
_LOOKS_PER_KEPT_AGE = 4

# Reading a clock twice takes less than this.
_CLOCKS_APART_NS = 10**9

# More threads than this gain little: the kernel's own work for the receivers takes the other cores.
_MOST_DEFAULT_THREADS = 4


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _through_the_manager(metadata: Any) -> Any:
    """The attribute ``metadata`` of a record, with assignment as a change like any other: checked and announced."""

    def replace(record: Any, value: Mapping[str, Any]) -> None:
        registry = record.registry
        owner = None if registry is None else registry.owner
        if owner is None:
            metadata.__set__(record, value)
        else:
            owner.metadata.replace(record, value)

    return property(metadata.__get__, replace)


class Connection(Verbs, ConnectionMeta):
    """A record of the native registry with verbs. Pass it as ``record_type`` to a registry of your own."""

    __slots__ = ()

    if not TYPE_CHECKING:
        metadata = _through_the_manager(ConnectionMeta.metadata)


class _ReferenceConnection(Verbs, reference.ConnectionMeta):
    __slots__ = ()

    if not TYPE_CHECKING:
        metadata = _through_the_manager(reference.ConnectionMeta.metadata)


class _ReferenceMetadata(Declarations, reference.Metadata):  # type: ignore[misc]  # each has a Change of its own
    pass


_REGISTRIES: dict[str, tuple[Any, type]] = {
    "native": (Registry, Connection),
    "reference": (reference.Registry, _ReferenceConnection),
    "traditional": (reference.TraditionalRegistry, _ReferenceConnection),
}


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """How a manager that closes sends its connections away.

    Attributes:
        code, reason: of the close frames. A server that restarts closes with 1012, and with what it tells its clients
            behind the reason, which is cut where that leaves it no room.
        batch: connections whose close begins together.
        pause_s: between two batches. It is cut where the batches would take more than half of the time there is.
    """

    code: int = 1001
    reason: str = "the server is going away"
    batch: int = 100
    pause_s: float = 0.01

    def __post_init__(self) -> None:
        check_close(self.code, self.reason)
        if self.batch < 1:
            raise InvalidSetting("drain.batch", self.batch, "1 or more")
        if not self.pause_s >= 0:
            raise InvalidSetting("drain.pause_s", self.pause_s, "0 or more")


@dataclass(frozen=True, slots=True)
class CloseReport:
    """How a manager's end went.

    Attributes:
        connections: that were there when it began.
        cut_off: of them, those that had not ended in time.
        undelivered: what waited for some of them and was still there when they were cut off.
        seconds: from the call to the end.
        away: clients that were waited for, and are not any more.
    """

    connections: int = 0
    cut_off: int = 0
    undelivered: tuple[Undelivered, ...] = ()
    seconds: float = 0.0
    away: int = 0


class RecordFields(TypedDict, total=False):
    """The keywords of ``Registry.add``, with their meaning there."""

    user_id: str | None
    device_type: str | None
    device_info: Any
    session: Any
    permissions: Iterable[str]
    tags: Mapping[str, str] | None
    metadata: Mapping[str, Any] | None
    extensions: Mapping[str, Any] | None
    groups: Iterable[str]
    status: ConnectionStatus
    on_duplicate: Literal["reject", "replace"]


class ConnectionManager:
    """Who is connected, and one way to reach each, some, or all of them.

    Use it as ``async with manager:``; leaving the block closes it, see :meth:`close`. It serves once: a manager that
    is closed stays closed.

    Args:
        shards, max_id_bytes, max_name_bytes, max_tags, max_groups: of the registry; see ``Registry``.
        registry: which implementation to use: "native"; "reference" (pure Python) or "traditional" (one map, one
            lock), which are there for comparison; or a registry of your own, made with ``record_type=Connection`` so
            that its records have verbs, and used by no other manager. With a registry of your own, its settings hold
            and the arguments before this one mean nothing.
        max_message_bytes: longest message that may be sent, in bytes of payload. It guards a fan-out against a
            payload that no client would take (most refuse more than a few MiB) times the number of targets.
        max_queued_events: calls of asynchronous subscribers that may wait; see ``EventBus``.
        drain: how connections are sent away by :meth:`close`.
        backpressure: what happens to connections whose peers do not keep up.
        health: when connections are pinged, suspected and given up. None: never, and deadlines of records are the
            application's own.
        metadata: how much of it there may be.
        sessions: how clients are waited for that speak the protocol of resume, and what is kept for them; None: they
            are not, and that protocol is not spoken. Other clients are not concerned.
        herd: how clients are kept apart that would come together: how many the server can bear, and what those are told
            that are turned away, given up, or closed because it restarts.
        threads: how many threads write to sockets, the event loop's own included: at most 16. By default one for each
            core that the process may use, but no more than 4. The others start with the first large fan-out, hold no
            GIL, and end with the manager.

    Raises:
        InvalidSetting, TypeError: a setting is not what it must be.

    Threads: the event loop's only; another one gets ``WrongThread``. ``registry``, ``stats`` and ``on`` (before the
    start) may be used from any thread.
    """

    def __init__(
        self,
        shards: int = 64,
        *,
        registry: Literal["native", "reference", "traditional"] | Registry = "native",
        max_id_bytes: int = 256,
        max_name_bytes: int = 256,
        max_tags: int = 64,
        max_groups: int = 1024,
        max_message_bytes: int = 16 * 2**20,
        max_queued_events: int = 10_000,
        drain: DrainPolicy = DrainPolicy(),
        backpressure: Backpressure = BACKPRESSURE,
        health: HealthPolicy | None = HEALTH,
        metadata: MetadataLimits = METADATA,
        sessions: SessionPolicy | None = SESSIONS,
        herd: HerdPolicy = HERD,
        threads: int | None = None,
    ) -> None:
        if max_message_bytes < 1:
            raise InvalidSetting("max_message_bytes", max_message_bytes, "1 or more")
        check_close(backpressure.code, backpressure.reason)
        if health is not None:
            check_close(health.code, health.reason)
        if isinstance(registry, str):
            registry = _make_registry(
                registry,
                shards,
                max_id_bytes=max_id_bytes,
                max_name_bytes=max_name_bytes,
                max_tags=max_tags,
                max_groups=max_groups,
            )
        elif not hasattr(registry, "batches"):
            raise TypeError(f"registry must be a name or a Registry, not {type(registry).__name__}")
        self._registry: Registry = registry
        self._events = EventBus(max_queued=max_queued_events)
        self._delivery = Delivery(
            registry,
            self._events,
            max_message_bytes=max_message_bytes,
            backpressure=backpressure,
            threads=min(_cores(), _MOST_DEFAULT_THREADS) if threads is None else threads,
            give_up=self._give_up,
            held=self._held,
            ponged=self._ponged,
            sessions=sessions,
        )
        self._sessions = None if sessions is None else Sessions(sessions, secrets.token_bytes)
        # The sessions of clients that are away, by their records.
        self._away: dict[ConnectionMeta, Session] = {}
        self._session_timer: asyncio.TimerHandle | None = None
        self._interrupted = self._resumed = self._not_resumed = 0
        self._health = None if health is None else _make_monitor(health, registry)
        self._metadata = self._make_metadata(metadata)
        self._heartbeat: Heartbeat | None = None
        self._herd = Herd(herd, random, self._now_s())
        self._too_slow = Closed(backpressure.code, backpressure.reason, "us")
        # What we close with where the client may well come back.
        self._deliberate = _DELIBERATE - {backpressure.code, HEALTH.code if health is None else health.code}
        self._drain = drain
        self._going_away = Closed(drain.code, drain.reason, "us")
        self._state = "not started"
        self._thread = 0
        # By the identity of the library's object, which an attachment keeps alive.
        self._attachments: dict[int, Attachment] = {}
        self._opened = 0
        self._closed = 0
        self._empty = asyncio.Event()
        self._closing: asyncio.Task[CloseReport] | None = None
        # asyncio itself keeps only weak references to tasks.
        self._farewells: set[asyncio.Task[object]] = set()

    @property
    def registry(self) -> Registry:
        """Who is connected. Read what you like; to end a connection use :meth:`disconnect`."""
        return self._registry

    @property
    def threads(self) -> int:
        """How many threads write to sockets. May be changed between two fan-outs."""
        return self._delivery.threads

    @threads.setter
    def threads(self, value: int) -> None:
        self._delivery.threads = value

    @property
    def health(self) -> HealthMonitor | None:
        """What is known of the health of connections; None: nothing is, and none is pinged."""
        return self._health

    @property
    def metadata(self) -> MetadataManager:
        """Business facts on connections: checked, versioned, announced."""
        return self._metadata

    @property
    def reconnect(self) -> Herd:
        """What clients are told about coming back. Its times are seconds of the registry's clock."""
        return self._herd

    @property
    def events(self) -> EventBus:
        """The bus behind :meth:`on`."""
        return self._events

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state}, {len(self._attachments)} connections>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to accept connections, on the running loop. ``async with`` does this.

        Raises:
            ManagerClosed: it was closed, or is started already.
            InvalidSetting: its registry belongs to another manager.
        """
        if self._state != "not started":
            raise ManagerClosed("started already" if self._state == "open" else self._state)
        if self._registry.owner is not None:
            raise InvalidSetting("registry", self._registry, "one that no other manager uses")
        if self._health is not None and abs(self._registry.now_ns() - monotonic_ns()) > _CLOCKS_APART_NS:
            raise InvalidSetting("registry", self._registry, "one with the system's clock, where there is health")
        self._registry.owner = self
        self._thread = threading.get_ident()
        if self._health is not None:
            self._heartbeat = Heartbeat(self._health, self._registry, self._delivery, self._events, self._end_dead)
        self._metadata.run_on(self._thread, partial(self._wake_to_announce, asyncio.get_running_loop()))
        self._state = "open"

    async def close(
        self, timeout_s: float = 10.0, *, reason: Literal["shutdown", "restart"] = "shutdown"
    ) -> CloseReport:
        """Stop accepting, deliver what waits, close every connection, and end. Calling it again waits for the same end.

        Each connection gets what waits for it, for up to half of *timeout_s* seconds, and is then closed, behind what
        still waits; with the code and at the pace of the ``DrainPolicy``. Those that have not ended after *timeout_s*
        seconds are cut off. Then every record is detached, with its ``ConnectionClosed``, and asynchronous subscribers
        have one more second for what waits for them.

        With the *reason* "restart" connections are closed with 1012, and each is told when to come back: in random
        order, over what ``HerdPolicy`` says, beginning ``away_s`` after this call.

        It ends also if the caller is cancelled, but then nobody waits for it.

        Returns:
            How that went, and what could not be delivered. The latter is logged as well.

        Raises:
            InvalidSetting: *reason* is neither.
            WrongThread.
        """
        if reason not in ("shutdown", "restart"):
            raise InvalidSetting("reason", reason, "'shutdown' or 'restart'")
        if self._state == "not started":
            self._begin_to_leave(reason)
            self._state = "closed"
        if self._closing is None:
            if self._state == "closed":
                return CloseReport()
            self._check("close")
            self._begin_to_leave(reason)
            self._state = "closing"
            self._closing = asyncio.get_running_loop().create_task(self._close(timeout_s))
        return await asyncio.shield(self._closing)

    @property
    def sessions(self) -> SessionPolicy | None:
        """How clients that speak the protocol of resume are waited for; None: they are not."""
        return None if self._sessions is None else self._sessions.policy

    def admit(self) -> float:
        """Ask whether one more connection may come in. For adapters, and for servers that have none: before the opening
        handshake is answered.

        Returns:
            0 if it may, else seconds until it is to try again, for the header ``Retry-After`` of an answer 503.
            ``HerdPolicy.admission`` decides; while and after the manager closes, nobody may come in.
        """
        return self._herd.admit(self._now_s())

    def refusal(self) -> Closed:
        """How to close a connection that cannot be attached any more, because the manager closes: ``ManagerClosed``."""
        return _told(self._going_away, self._herd.refusal(self._now_s()))

    def attach(
        self, ws: Any, client_id: str | None = None, *, hello: Hello | None = None, **fields: Unpack[RecordFields]
    ) -> Attachment:
        """Register a connection for the time of an ``async with`` block, which yields its record.

        Args:
            ws: an open connection of a supported library.
            client_id: its id; by default a random one of 22 characters is made (``max_id_bytes`` must allow it).
            hello: what a client has sent first that speaks the protocol of resume (docs/resume.md), for adapters:
                ``serve`` does this by itself. The client is welcomed. If it goes on with its session, the block yields
                the record that it had, *fields* mean nothing, and what it has missed is sent first. If *client_id* or
                ``user_id`` is given and is not that of the session, it does not go on with it.
            fields: the keywords of ``Registry.add``. With ``on_duplicate="replace"`` an older connection with this id
                is closed with ``REPLACED``.

        Raises (on entering the block; nothing is registered then):
            TypeError: no adapter knows *ws*; or as for ``Registry.add``.
            PeerClosed: it is closed already, or closing.
            DuplicateConnection: the id is taken, or *ws* itself is attached already.
            InvalidName, LimitExceeded, InvalidSetting: as for ``Registry.add``.
            MetadataRejected: *metadata* is not acceptable. What is, is there from the start, at version 0, unannounced.
            ManagerClosed, WrongThread.
        """
        return Attachment(self, ws, client_id, fields, hello)

    async def send(self, target: str | ConnectionMeta, message: Message, *, key: str | None = None) -> None:
        """Send a message to one connection.

        It leaves at the end of the loop's turn, behind all that was sent before. If the peer keeps up, this returns
        when the kernel has the message. If not, it returns when what waits has sunk to ``Backpressure.resume_below``,
        so that whoever sends in a loop is held back.

        Args:
            target: a client id or a record.
            message: ``str`` for a text frame, bytes-like for a binary one.
            key: of the message, for the policy "conflate".

        Raises:
            UnknownConnection: no connection has this id.
            PeerClosed, PeerFailed: the connection is at fault.
            PeerTooSlow: the message was dropped, because too much waits for the peer.
            MessageTooBig, TypeError, UnicodeEncodeError: the message is.
            ForeignRecord, ManagerClosed, WrongThread.
        """
        self._check("send")
        await self._delivery.send(self._resolve(target), message, key)

    async def send_to_user(self, user_id: str, message: Message, *, key: str | None = None) -> BroadcastResult:
        """Send a message to all connections of a user, which may be none. See :meth:`broadcast`."""
        return await self.broadcast(message, user=user_id, key=key)

    async def broadcast(
        self,
        message: Message,
        *,
        to: Iterable[str | ConnectionMeta] | None = None,
        exclude: Excluded = None,
        key: str | None = None,
        **filters: Unpack[Filters],
    ) -> BroadcastResult:
        """Send a message to everybody, or to those who match all the filters.

        The targets are those who match when the call begins to run. The loop gets its turn about every millisecond
        meanwhile. Slow peers are not waited for. Messages to one connection stay in the order of the calls. If it is
        cancelled, the message is delivered all the same.

        Args:
            message: ``str`` for a text frame, bytes-like for a binary one; encoded once.
            filters: ``group=``, ``user=``, ``tag=``, ``status=``, ``device_type=``, and the same with ``not_``
                before: those of ``Registry.select``; see ``wsfast.connection.Filters``. A name that nobody has gives
                no targets.
            to: client ids and records, instead of filters. Ids that nobody has give no target.
            exclude: a record, a client id, or an iterable of either.
            key: of the message, for the policy "conflate".

        Returns:
            How many it reached, and what went wrong with the others: that raises nothing.

        Raises:
            MessageTooBig, TypeError, UnicodeEncodeError: before anything was sent.
            ManagerClosed, WrongThread.

        Cost: some 100 ns for each target, and what the kernel takes for it.
        """
        self._check("broadcast")
        return await self._delivery.broadcast(message, to, exclude, key, filters)

    def broadcast_nowait(
        self,
        message: Message,
        *,
        to: Iterable[str | ConnectionMeta] | None = None,
        exclude: Excluded = None,
        key: str | None = None,
        coalesce: float | None = None,
        **filters: Unpack[Filters],
    ) -> BroadcastResult:
        """:meth:`broadcast` without ``await``: the message is queued, and leaves at the end of the loop's turn.

        All messages of a turn to one connection leave together, with one system call: many small broadcasts cost little
        more than one.

        Args:
            coalesce: milliseconds to wait for more, instead of to the end of the turn. Whatever is sent to a connection
                meanwhile takes what waits for it along.

        Returns:
            What was queued and dropped; nothing is sent yet.

        Raises: as for :meth:`broadcast`, and
            InvalidSetting: *coalesce* is not from 0 to 60,000.
        """
        self._check("broadcast_nowait")
        return self._delivery.broadcast_nowait(message, to, exclude, key, filters, coalesce)

    async def disconnect(self, target: str | ConnectionMeta, code: int = 1000, reason: str = "") -> None:
        """Close a connection with a close frame, and wait until it has ended and is unregistered.

        A peer that does not answer, or does not even read, is waited for as long as the library's close timeout says,
        and then cut off. A record that is detached already needs nothing done.

        Raises:
            InvalidSetting: *code* or *reason* cannot go into a close frame.
            UnknownConnection: no connection has this id.
            PeerFailed: the library raised. The connection is unregistered nevertheless.
            ForeignRecord, ManagerClosed, WrongThread.
        """
        self._check("disconnect")
        check_close(code, reason)
        record = self._resolve(target)
        if record in self._away:
            self._end_away(self._away[record], Closed(code, reason, "us"))
            return
        attachment = self._attachments.get(id(record.conn))
        if attachment is None:  # it has ended, or it was put into the registry without a connection
            self._registry.remove(record)
            return
        attachment.is_final = True
        record.status = ConnectionStatus.CLOSING
        try:
            await attachment.close(code, reason)
        except Exception as error:
            raise PeerFailed(record.client_id, error) from error
        finally:
            attachment.end(Closed(code, reason, "us"))

    def on(self, event_type: type[_E], callback: Callable[[_E], object]) -> Callable[[], None]:
        """Call *callback*, plain or ``async def``, with every event of a type or of its subtypes.

        Returns a function that ends the subscription. See ``EventBus`` for order, limits and errors."""
        return self._events.on(event_type, callback)

    def stats(self) -> dict[str, int]:
        """The registry's totals (see ``Registry.stats``), and:

        ``opened`` and ``closed``: connections so far. ``turned_away``: those that were not let in, see :meth:`admit`.
        ``event_errors`` and ``events_dropped``: see ``EventBus``.

        ``interrupted``, ``resumed`` and ``not_resumed``: how often a client with a session was lost, came back to it,
        and came back in vain; ``away``: such clients that are waited for now; ``kept_messages`` and ``kept_bytes``:
        what is kept for them, and for those who may be lost.

        ``writes``: system calls to sockets; ``writes_through``: flushes of a connection through its transport;
        ``writes_blocked`` and ``writes_failed``: of both, those that were not taken as a whole, and those refused.
        ``waiting``: connections that are waited for now; ``queued_bytes``: what is kept for all connections now.
        ``conflated``, ``dropped_by_bytes``, ``dropped_by_age``, ``dropped_by_budget``, ``dropped_by_closed``: messages
        that were not sent, by cause. ``too_slow_by_bytes``, ``too_slow_by_age``, ``too_slow_by_budget``: connections
        that were given up.

        ``pings``: that were sent; and, unless there is no health: ``pongs``, of which ``late_pongs`` and
        ``unasked_pongs``; ``suspects``, ``deaths``, ``failed_pings``: how often a connection became suspect, was found
        dead, and could not be pinged in time; ``late_ms``: how long the loop was late, in all.

        ``metadata_changes``, ``metadata_rejected``, ``metadata_conflicts``, ``metadata_notifier_errors``,
        ``metadata_unannounced``: see ``wsfast._metadata``.
        """
        delivery = self._delivery.stats()
        return {
            **cast("dict[str, int]", self._registry.stats()),
            "opened": self._opened,
            "closed": self._closed,
            "interrupted": self._interrupted,
            "resumed": self._resumed,
            "not_resumed": self._not_resumed,
            "away": len(self._away),
            "turned_away": self._herd.turned_away,
            "event_errors": self._events.errors,
            "events_dropped": self._events.dropped,
            **delivery,
            **({} if self._health is None else self._health.stats()),
            "pings": delivery["pings"] + (self._heartbeat.pings_by_library if self._heartbeat else 0),
            **self._metadata.stats(),
        }

    def explain(self, client_id: str) -> Explanation:
        """What has happened to the connection with this id lately, or to the last one that had it.

        Raises:
            UnknownConnection: there is none, and none that has ended is remembered: see ``HealthPolicy.explain`` and
                ``explain_closed``; or there is no health.
        """
        if self._health is None:
            raise UnknownConnection(client_id)
        record = self._registry.get(client_id)
        attachment = None if record is None else self._attachments.get(id(record.conn))
        peak_bytes = 0 if attachment is None else attachment.link.peak_bytes
        return self._health.explain(client_id, record, self._registry.now_ns(), peak_bytes)

    def _check(self, call: str) -> None:
        """Raise unless *call* may be made now and on this thread. Who is still connected may be sent to to the end."""
        if self._state != "open" and (self._state != "closing" or call == "attach"):
            raise ManagerClosed(self._state)
        if threading.get_ident() != self._thread:
            raise WrongThread(call)

    def _resolve(self, target: str | ConnectionMeta) -> ConnectionMeta:
        if isinstance(target, str):
            return self._registry[target]
        if not hasattr(target, "client_id"):
            raise TypeError(f"target must be a client id or a ConnectionMeta, not {type(target).__name__}")
        if target.registry is not None and target.registry is not self._registry:
            raise ForeignRecord(target.client_id)
        return target

    def _admit(self, attachment: Attachment) -> Connection:
        """Register the connection of *attachment*: all of it, or nothing."""
        self._check("attach")
        ws, fields = attachment.ws, attachment.fields
        attachment.adapter = adapter = adapter_for(ws)
        client_id = secrets.token_urlsafe(_GENERATED_ID_BYTES) if attachment.client_id is None else attachment.client_id
        if not adapter.is_open(ws):
            raise PeerClosed(client_id, *(adapter.closed(ws) or Closed())[:2])
        current = self._attachments.get(id(ws))
        if current is not None:
            if not current.gives_way:
                raise DuplicateConnection(current.record.client_id)
            if current.record.client_id == client_id:
                fields = {**fields, "on_duplicate": "replace"}
        elif self._resume(attachment):
            return cast("Connection", attachment.record)
        if fields.get("metadata") is not None:
            fields = {**fields, "metadata": self._metadata.check(fields["metadata"])}
        older = self._registry.get(client_id)
        replaced = None if older is None else self._attachments.get(id(older.conn))
        if replaced is current:
            replaced = None
        away = None if older is None else self._away.get(older)
        if away is not None:  # nobody is there whom this could push out
            fields = {**fields, "on_duplicate": "replace"}
        # Read before the registry detaches the records: afterwards they do not tell this any more.
        last_words = {each: _last_words(each.record) for each in (current, replaced) if each is not None}
        away_words = None if older is None or away is None else _last_words(older)
        record = self._registry.add(client_id, ws, **fields)
        if away is not None:
            self._end_away(away, REPLACED, away_words)
        if replaced is not None:
            replaced.is_final = True
            replaced.end(REPLACED, last_words[replaced])
            self._say_farewell(replaced, REPLACED)
        if current is not None:
            current.is_final = True
            current.end(Closed(1000, "attached anew", "us"), last_words[current])
            record.received(current.record.bytes_in, current.record.messages_in)
            record.sent(current.record.bytes_out, current.record.messages_out)
        self._begin(attachment, record)
        return cast("Connection", record)

    def _begin(self, attachment: Attachment, record: ConnectionMeta) -> None:
        attachment.record = record
        try:
            attachment.link = self._delivery.admit(record, attachment.ws, attachment.adapter)
        except BaseException:
            self._registry.remove(record)
            raise
        try:
            if attachment.hello is not None:
                self._begin_session(attachment)
            self._connect(attachment)
        except BaseException:
            self._end_session(attachment)
            self._registry.remove(record)
            self._delivery.forget(attachment.link)
            raise
        self._opened += 1
        if self._events.wants(ConnectionOpened):
            self._events.publish(ConnectionOpened(record))

    def _connect(self, attachment: Attachment) -> None:
        """Let the connection and its link know of each other, and begin to watch it. If that fails, they do not."""
        attachment.detach = _nothing
        try:
            attachment.detach = attachment.adapter.attach(attachment.ws, attachment.link, attachment.lost)
            if self._heartbeat is not None:
                self._heartbeat.admit(attachment.record, attachment.link, attachment.ws, attachment.adapter)
            if attachment.welcome is not None:
                self._delivery.greet(attachment.link, str(attachment.welcome))
        except BaseException:
            attachment.detach()
            raise
        attachment.ended = False
        self._attachments[id(attachment.ws)] = attachment

    # ---- sessions

    def _begin_session(self, attachment: Attachment) -> None:
        """Give the connection a session, if it can have one. It is told at once, before anybody can send to it."""
        token, grace_s = None, 0.0
        if self._sessions is not None and self._delivery.begin_session(attachment.link):
            session = attachment.session = self._sessions.begin(self._now_s())
            session.owner = attachment
            token, grace_s = session.token, self._sessions.policy.grace_s
            self._arm_session_timer()
        attachment.welcome = Welcome(attachment.record.client_id, token, grace_s=grace_s, spread_s=self._spread_s())

    def _end_session(self, attachment: Attachment) -> None:
        if self._sessions is not None and attachment.session is not None:
            self._sessions.end(attachment.session)

    def _resume(self, attachment: Attachment) -> bool:
        """Go on with the session that the client asks for. False: it gets a new one."""
        hello = attachment.hello
        if self._sessions is None or hello is None or hello.token is None:
            return False
        sessions, token, now_s = self._sessions, hello.token, self._now_s()
        session = sessions.find(token, now_s, hello.attempt)
        overtaken = sessions.overtaken(token, hello.attempt) if session is None else None
        if overtaken is not None:  # nobody is there any more whom a session of its own would be for
            raise DuplicateConnection(overtaken.owner.record.client_id)
        its = session or sessions.outlived(token, now_s)
        if its is None or not attachment.may_be(its.owner.record):
            self._not_resumed += 1
            return False
        if isinstance(its.owner, Attachment):  # its connection looks alive
            former = its.owner
            former.end(TAKEN_OVER)
            self._say_farewell(former, TAKEN_OVER)
        away, link = its.owner, None
        if session is not None and isinstance(away, _Away) and away.record.registry is self._registry:
            link = self._delivery.resume(away.link, attachment.ws, attachment.adapter, hello.received)
        if link is None:
            self._not_resumed += 1
            if isinstance(away, _Away):
                self._end_away(its, away.closed)
            return False
        self._go_on(attachment, its, away, link, now_s)
        return True

    def _go_on(self, attachment: Attachment, session: Session, away: _Away, link: Link, now_s: float) -> None:
        """The client of *session* is back, with a link that has all that it missed."""
        assert self._sessions is not None
        self._sessions.resume(session)
        away.link = link
        attachment.record, attachment.link = away.record, link
        attachment.session, attachment.resumes = session, session.resumes
        attachment.welcome = Welcome(
            away.record.client_id,
            session.token,
            True,
            session.received,
            self._sessions.policy.grace_s,
            self._spread_s(),
        )
        missed = link.owed
        away.record.conn = attachment.ws
        try:
            self._connect(attachment)
        except BaseException:
            link.close()
            link.leave()
            away.record.conn = None
            self._sessions.leave(session, now_s)
            raise
        del self._away[away.record]
        session.owner = attachment
        away.record.status = ConnectionStatus.ONLINE
        away.record.touch()
        self._resumed += 1
        if self._events.wants(ConnectionResumed):
            self._events.publish(ConnectionResumed(away.record, now_s - away.since_s, missed))

    def _spread_s(self) -> float:
        """Over how many seconds those who are here are to spread, should they lose us all at once."""
        return self._herd.spread_s(len(self._attachments) + len(self._away))

    def _interrupt(self, attachment: Attachment, closed: Closed) -> None:
        """The connection of a session has ended, but its client may come back."""
        assert self._sessions is not None and attachment.session is not None
        record, link, session, now_s = attachment.record, attachment.link, attachment.session, self._now_s()
        link.close()
        link.leave()
        record.conn = None
        if self._heartbeat is not None:
            record.deadline_ns = None
        record.status = ConnectionStatus.RECONNECTING
        session.owner = _Away(record, link, closed, now_s)
        self._away[record] = session
        self._interrupted += 1
        if self._events.wants(ConnectionInterrupted):
            self._events.publish(ConnectionInterrupted(record, *closed[:3]))
        if record not in self._away:  # a subscriber has ended it
            return
        given_up = self._sessions.leave(session, now_s)
        if given_up is not None:
            self._end_away(given_up, given_up.owner.closed)
        self._arm_session_timer()

    def _end_away(self, session: Session, closed: Closed, last_words: _LastWords | None = None) -> None:
        """A client is waited for no longer. Subscribers may have ended it already."""
        away = session.owner
        assert self._sessions is not None and isinstance(away, _Away)
        if self._away.pop(away.record, None) is None:
            return
        self._sessions.end(session)
        words = _last_words(away.record) if last_words is None else last_words
        self._registry.remove(away.record)
        self._delivery.forget(away.link)
        self._closed += 1
        self._publish_closed(away.record, closed, words)

    def _arm_session_timer(self) -> None:
        """Look at sessions when the next client is to be given up, or something may have been kept for too long."""
        assert self._sessions is not None
        loop, wait_s = asyncio.get_running_loop(), self._sessions.policy.max_age_s / _LOOKS_PER_KEPT_AGE
        if self._sessions.next_due_s is not None:
            wait_s = min(wait_s, self._sessions.next_due_s - self._now_s())
        at = loop.time() + max(0.0, wait_s)
        if self._session_timer is not None:
            if self._session_timer.when() <= at:
                return
            self._session_timer.cancel()
        self._session_timer = loop.call_at(at, self._look_at_sessions)

    def _look_at_sessions(self) -> None:
        self._session_timer = None
        assert self._sessions is not None
        for session in self._sessions.due(self._now_s()):
            self._end_away(session, session.owner.closed)
        if self._delivery.expire_kept():
            self._arm_session_timer()

    def _publish_closed(self, record: ConnectionMeta, closed: Closed, last_words: _LastWords) -> None:
        if self._events.wants(ConnectionClosed):
            duration_s = (self._registry.now_ns() - record.created_ns) / 1e9
            self._events.publish(ConnectionClosed(record, *closed[:3], duration_s, **last_words))

    # ---- ends

    def _say_farewell(self, attachment: Attachment, closed: Closed) -> None:
        """Close the connection in the background."""
        self._run_farewell(_close_quietly(attachment, closed))

    def _run_farewell(self, farewell: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(farewell)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    def _give_up(self, record: ConnectionMeta, at_once: bool) -> None:
        """Disconnect a connection that is too slow; at once where its memory is needed."""
        attachment = self._attachments.get(id(record.conn))
        if attachment is None:
            return
        record.status = ConnectionStatus.CLOSING
        if at_once:
            attachment.end(self._too_slow)  # after the next line, the library would not say why
            attachment.adapter.abort(attachment.ws)
        elif verdict_of(self._too_slow.code) is Verdict.FORBID:
            self._say_farewell(attachment, self._too_slow)
        else:
            self._say_farewell(attachment, _told(self._too_slow, self._herd.overload(self._now_s())))

    def _end_dead(self, record: ConnectionMeta, closed: Closed) -> None:
        """Unregister a dead connection, and close it in case it can still read why."""
        attachment = self._attachments.get(id(record.conn))
        if attachment is None or self._health is None:
            return
        attachment.end(closed)
        self._run_farewell(_close_soon(attachment, closed, self._health.policy.ping_deadline_s))

    def _make_metadata(self, limits: MetadataLimits) -> MetadataManager:
        kind: Any = MetadataManager if isinstance(self._registry, Registry) else _ReferenceMetadata
        metadata = kind(
            self._registry,
            **limits.settings(),
            later=self._events.enqueue,
            wants=lambda: self._events.wants(MetadataChanged),
            publish=self._publish_metadata,
        )
        return cast("MetadataManager", metadata)

    def _publish_metadata(self, changes: tuple[Change, ...]) -> None:
        last = changes[-1]
        self._events.publish(MetadataChanged(last.conn, last.version, changes))

    def _wake_to_announce(self, loop: asyncio.AbstractEventLoop) -> None:
        """Another thread has changed metadata."""
        try:
            loop.call_soon_threadsafe(self._metadata.announce)
        except RuntimeError:
            logger.warning("the loop is closed: changes of metadata are not announced")

    def _held(self, link: Link) -> None:
        if self._heartbeat is not None:
            self._heartbeat.held(link)

    def _ponged(self, link: Link, payload: bytes) -> None:
        if self._heartbeat is not None:
            self._heartbeat.ponged(link, payload)

    def _now_s(self) -> float:
        """The time of herds and sessions."""
        return self._registry.now_ns() / 1e9

    def _begin_to_leave(self, reason: str) -> None:
        """From now on, nobody is let in."""
        self._herd.close(len(self._attachments) + len(self._away), self._now_s(), restarts=reason == "restart")
        if reason == "restart":
            self._going_away = self._going_away._replace(code=_RESTART)

    async def _close(self, timeout_s: float) -> CloseReport:
        started, connections, away = perf_counter(), len(self._attachments), len(self._away)
        undelivered: list[Undelivered] = []
        for session in list(self._away.values()):  # nobody can come back any more
            self._end_away(session, session.owner.closed)
        try:
            async with asyncio.timeout(timeout_s):
                await self._send_all_away(timeout_s, undelivered)
        except TimeoutError:
            logger.warning("cutting off %d connections that did not close in time", len(self._attachments))
        finally:
            cut_off = self._cut_off(undelivered)
        if self._farewells:
            await asyncio.wait(self._farewells)
        await self._events.close(_EVENTS_GRACE_S)
        if undelivered:
            logger.warning(
                "closed with %d messages undelivered to %d slow connections",
                sum(each.messages for each in undelivered),
                len(undelivered),
            )
        return CloseReport(connections, cut_off, tuple(undelivered), perf_counter() - started, away)

    async def _send_all_away(self, timeout_s: float, undelivered: list[Undelivered]) -> None:
        """Close everybody, each when nothing waits for it any more or half of the time is over, at the drain's pace."""
        drain, attachments = self._drain, list(self._attachments.values())
        until = asyncio.get_running_loop().time() + timeout_s / 2
        ready: asyncio.Queue[Attachment] = asyncio.Queue()
        for attachment in attachments:
            if attachment.link.bytes:
                self._run_farewell(self._wait_until_drained(attachment, until, ready))
            else:
                ready.put_nowait(attachment)
        pause_s = min(drain.pause_s, timeout_s / 4 / max(1, ceil(len(attachments) / drain.batch)))
        left = len(attachments)
        while left:
            batch = [await ready.get()]
            while len(batch) < drain.batch and not ready.empty():
                batch.append(ready.get_nowait())
            for attachment in batch:
                if not attachment.ended:
                    self._run_farewell(self._close_and_report(attachment, undelivered))
            left -= len(batch)
            await asyncio.sleep(pause_s * len(batch) / drain.batch)
        if self._attachments:
            self._empty.clear()
            await self._empty.wait()
        if self._farewells:
            await asyncio.wait(self._farewells)

    async def _wait_until_drained(self, attachment: Attachment, until: float, ready: asyncio.Queue[Attachment]) -> None:
        await self._delivery.drained(attachment.link, max(0.0, until - asyncio.get_running_loop().time()))
        ready.put_nowait(attachment)

    async def _close_and_report(self, attachment: Attachment, undelivered: list[Undelivered]) -> None:
        attachment.unsent = self._delivery.unsent(attachment.link)
        attachment.is_final = True
        await _close_quietly(attachment, _told(self._going_away, self._herd.farewell(self._now_s())))
        undelivered += attachment.undelivered()

    def _cut_off(self, undelivered: list[Undelivered]) -> int:
        """End at once what is left, and let go of everything. Returns how many were left."""
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self._session_timer is not None:
            self._session_timer.cancel()
        left = list(self._attachments.values())
        for attachment in left:
            if attachment.unsent is None:  # its close has not begun
                attachment.unsent = self._delivery.unsent(attachment.link)
            attachment.cut_off()
            attachment.end(self._going_away)
            undelivered += attachment.undelivered()
        for task in self._farewells:
            task.cancel()
        self._delivery.close()
        self._registry.clear()
        self._registry.owner = None
        self._metadata.announce()
        self._metadata.run_on(None, None)
        self._state = "closed"
        return len(left)


class _LastWords(TypedDict):
    """What only an attached record tells."""

    session: Any
    metadata: Mapping[str, Any]
    groups: frozenset[str]


class Attachment:
    """One registration of one connection: what :meth:`ConnectionManager.attach` returns, to be used once.

    Attributes:
        gives_way: whether an ``attach`` of the same connection ends this one, instead of being refused. An adapter
            that attaches by itself sets it, so that a handler that attaches as well is right.
        is_final: whether its end is one that nobody comes back from.
        record: of the connection, from the start of the block.
        session: of its client; None: it has none.
        resumes: how often the client had come back when this connection began.
        welcome: what the client was told first; None: nothing.
        ended: whether it is unregistered, or its client is waited for.
        unsent: the sizes of the frames that waited for it when its manager began to close it; None before.
        left_bytes: in its transport at its end.
    """

    __slots__ = (
        "adapter",
        "client_id",
        "detach",
        "ended",
        "fields",
        "gives_way",
        "hello",
        "is_final",
        "left_bytes",
        "link",
        "manager",
        "record",
        "resumes",
        "session",
        "unsent",
        "welcome",
        "ws",
    )

    adapter: Adapter
    link: Link
    detach: Callable[[], object]
    record: ConnectionMeta

    def __init__(
        self, manager: ConnectionManager, ws: Any, client_id: str | None, fields: RecordFields, hello: Hello | None
    ) -> None:
        self.manager = manager
        self.ws = ws
        self.client_id = client_id
        self.fields = fields
        self.hello = hello
        self.gives_way = False
        self.is_final = False
        self.session: Session | None = None
        self.resumes = 0
        self.welcome: Welcome | None = None
        self.ended = False
        self.unsent: list[int] | None = None
        self.left_bytes = 0

    async def __aenter__(self) -> Connection:
        return self.manager._admit(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # If nobody has closed it yet, this is what the library is about to do.
        closed = Closed(1000 if error is None else 1011, "", "us")
        delivery = self.manager._delivery
        if error is None and not self.ended and delivery.is_by_library(self.link):
            last_words = _last_words(self.record)
            self.manager._registry.remove(self.record)  # nothing more is for it
            try:
                await delivery.drained(self.link, _LAST_WORDS_S)
            finally:
                self.end(closed, last_words)
        self.end(closed)

    def lost(self) -> None:
        """The adapter's message that the connection has ended."""
        self.end(Closed())

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, behind what waits for it. Raises what its library does."""
        self.manager._delivery.finish(self.link)
        if self.is_final:
            self.link.end_session()  # what is sent from now on is for nobody
        try:
            await self.adapter.close(self.ws, code, reason)
        except TimeoutError:
            self.cut_off()

    def cut_off(self) -> None:
        """End the connection at once."""
        self.link.ask()  # afterwards, its transport does not know any more what it had
        try:
            self.adapter.abort(self.ws)
        except Exception:
            logger.exception("cannot cut off %r", self.record.client_id)

    def undelivered(self) -> list[Undelivered]:
        """What was not delivered of `unsent`, now that it has ended: nothing, or one entry."""
        unsent = self.unsent or []
        nbytes = left = min(sum(unsent), self.left_bytes + self.link.lost_bytes)
        messages = 0
        while left > 0:
            messages += 1
            left -= unsent[-messages]
        return [Undelivered(self.record.client_id, messages, nbytes)] if messages else []

    # ---- sessions, for the adapter of a library

    def took(self) -> bool:
        """Count a message that the application is about to be given. False: it must not be given this one, as its
        client has come back on another connection, and sends it again."""
        if self.session is not None and self.is_current:
            self.session.took()
        return self.is_current

    @property
    def is_current(self) -> bool:
        """Whether the client has not come back on another connection."""
        return self.session is None or self.session.resumes == self.resumes

    def confirm(self) -> None:
        """The client has said that it is ready."""
        if self.session is not None and self.is_current:
            self.session.confirm()

    def refuse(self, code: int, reason: str) -> None:
        """The client does not keep to the protocol of resume: close its connection, which to its session is lost."""
        self.manager._say_farewell(self, Closed(code, reason, "us"))

    def may_be(self, record: ConnectionMeta) -> bool:
        """Whether the connection may be that of this record, by what else is known of who it is."""
        user_id = self.fields.get("user_id")
        return self.client_id in (None, record.client_id) and user_id in (None, record.user_id)

    def _comes_back(self, closed: Closed) -> bool:
        """Whether the client may come back after this end."""
        return (
            self.session is not None
            and self.session.is_known
            and not self.is_final
            and self.manager._state == "open"
            and self.record.registry is self.manager._registry
            and (closed.code not in self.manager._deliberate or closed is TAKEN_OVER)
        )

    def _ask(self, what: Callable[..., _T], *arguments: Any) -> _T | None:
        """Ask the adapter: whatever it raises must not keep an end from coming to its end."""
        try:
            return what(*arguments)
        except Exception:
            logger.exception("the adapter of %r fails", self.record.client_id)
            return None

    def end(self, otherwise: Closed, last_words: _LastWords | None = None) -> None:
        """Unregister the connection, once, or begin to wait for its client; later calls do nothing.

        Args:
            otherwise: how it ended, if the library does not say.
            last_words: of a record that is detached already.
        """
        if self.ended:
            return
        self.ended = True
        manager, record = self.manager, self.record
        # If the connection lives on for a moment, it gets what waits for it before it is closed.
        manager._delivery.finish(self.link)
        closed = self._ask(self.adapter.closed, self.ws) or otherwise
        if not closed.is_clean:
            # What is behind the close frame was not to be delivered. Before one is written, there is nothing.
            close_frame = 4 + len(closed.reason.encode()) if closed.by == "us" else 0
            self.left_bytes = max(0, self.link.in_transport - close_frame)
        del manager._attachments[id(self.ws)]
        if not manager._attachments:
            manager._empty.set()
        if self._comes_back(closed):
            self._let_go(closed)
            manager._interrupt(self, closed)
            return
        if last_words is None:
            last_words = _last_words(record)
        manager._end_session(self)
        manager._registry.remove(record)
        manager._closed += 1
        self._let_go(closed)
        manager._delivery.forget(self.link)
        manager._publish_closed(record, closed, last_words)

    def _let_go(self, closed: Closed) -> None:
        self._ask(self.detach)
        if self.manager._heartbeat is not None:
            self.manager._heartbeat.forget(self.record, self.link, closed)


class _Away:
    """A client that is waited for: its record and its link, and how and when its connection ended."""

    __slots__ = ("closed", "link", "record", "since_s")

    def __init__(self, record: ConnectionMeta, link: Link, closed: Closed, since_s: float) -> None:
        self.record = record
        self.link = link
        self.closed = closed
        self.since_s = since_s


def _last_words(record: ConnectionMeta) -> _LastWords:
    return {"session": record.session, "metadata": record.metadata, "groups": record.groups}


def _nothing() -> None:
    """There is nothing to undo."""


def _told(closed: Closed, advice: Advice | None) -> Closed:
    """The same end, with what the client is told about coming back."""
    return closed if advice is None else closed._replace(reason=advice.as_reason(closed.reason))


async def _close_quietly(attachment: Attachment, closed: Closed) -> None:
    try:
        await attachment.close(closed.code, closed.reason)
    except asyncio.CancelledError:
        attachment.cut_off()
        raise
    except Exception as error:
        logger.warning("cannot close %r, cutting it off: %r", attachment.record.client_id, error)
        attachment.cut_off()
    attachment.end(closed)


async def _close_soon(attachment: Attachment, closed: Closed, timeout_s: float) -> None:
    """Close a connection that is dead in all likelihood: its answer is not waited for as long as usual."""
    try:
        async with asyncio.timeout(timeout_s):
            await attachment.close(closed.code, closed.reason)
    except Exception as error:
        logger.debug("no answer to the close frame of %r: %r", attachment.record.client_id, error)
    finally:
        attachment.cut_off()


def _make_monitor(policy: HealthPolicy, registry: Registry) -> HealthMonitor:
    health = Health if isinstance(registry, Registry) else reference.Health
    return HealthMonitor(policy, now_ns=registry.now_ns(), health=health)


def _make_registry(name: str, shards: int, **limits: int) -> Registry:
    if name not in _REGISTRIES:
        raise InvalidSetting("registry", name, "'native', 'reference', 'traditional' or a Registry")
    implementation, record_type = _REGISTRIES[name]
    return cast("Registry", implementation(shards, record_type=record_type, **limits))
