"""What happens to connections, as typed events, and the bus that hands them to subscribers.

The bus hides who listens. A publisher pays one dictionary lookup where nobody does, so events that cost something
to build are built only if :meth:`EventBus.wants` says so.

Promises:

- Subscribers of an event are called in the order in which they subscribed, whether they subscribed to its type or
  to a base of it.
- A plain callback runs inside ``publish``. An ``async def`` callback runs later, in one task, one at a time, in the
  order of the events; a slow one therefore delays the asynchronous callbacks behind it, and nothing else. Its
  context is that in which the bus was made, whoever publishes.
- What waits for that task is bounded. When the queue is full, the newest call is dropped, counted in
  :attr:`EventBus.dropped`, and logged once until the queue has been empty again.
- An exception of a subscriber reaches neither the publisher nor other subscribers. It is counted in
  :attr:`EventBus.errors` and logged with its traceback.

Not promised: that an asynchronous callback still finds the world as its event describes it.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from wsfast.errors import InvalidSetting

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta
    from wsfast._metadata import Change

__all__ = [
    "ConnectionCleared",
    "ConnectionClosed",
    "ConnectionInterrupted",
    "ConnectionOpened",
    "ConnectionResumed",
    "ConnectionSuspect",
    "ConnectionTooSlow",
    "Event",
    "EventBus",
    "GradeChanged",
    "LoopLate",
    "MessageConflated",
    "MessagesDropped",
    "MetadataChanged",
    "SendFailed",
]

logger = logging.getLogger(__name__)

_E = TypeVar("_E", bound="Event")
_Callback = Callable[[Any], object]
_Route = tuple[tuple[_Callback, bool], ...]

# Calls that do not wait for anything follow each other without a turn of the loop, but no more than these.
_CALLS_IN_A_TURN = 100


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. Subscribe to it to receive every one; it is never published itself."""


@dataclass(frozen=True, slots=True)
class ConnectionOpened(Event):
    """A connection was registered. Its record is complete; nothing was sent to it yet."""

    conn: ConnectionMeta


@dataclass(frozen=True, slots=True)
class ConnectionClosed(Event):
    """A connection ended and is no longer registered.

    The record is detached: it still tells ids, tags, times and counters. What a detached record drops was read
    before, and is in the event.

    Attributes:
        conn: the detached record.
        code: close code (RFC 6455, 7.4): the peer's if the peer closed, ours if we did, 1006 if the link broke.
        reason: the text that came with the code; may be empty.
        by: who ended it. "network" means that no close frame was seen in either direction.
        duration_s: seconds from registration to now.
        session, metadata, groups: of the record, as they were just before.
    """

    conn: ConnectionMeta
    code: int
    reason: str
    by: Literal["peer", "us", "network"]
    duration_s: float
    # These belong to the application and may hold secrets: they stay out of the repr, and so out of logs.
    session: Any = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    groups: frozenset[str]


@dataclass(frozen=True, slots=True)
class ConnectionInterrupted(Event):
    """The link of a client that may come back is lost. Its record stays: ``ConnectionResumed`` or ``ConnectionClosed``
    follows.

    Attributes:
        conn: the record, whose status is RECONNECTING. It has no connection object, and keeps everything else.
        code, reason, by: how the link ended, as in ``ConnectionClosed``.
    """

    conn: ConnectionMeta
    code: int
    reason: str
    by: Literal["peer", "us", "network"]


@dataclass(frozen=True, slots=True)
class ConnectionResumed(Event):
    """A client has come back on a new connection, and goes on where it was.

    Attributes:
        conn: the record, whose connection object is the new one. The client's status is ONLINE again.
        away_s: seconds that it was away; 0 if its former link still looked alive.
        missed: messages that are sent to it now: those that it was not given.
    """

    conn: ConnectionMeta
    away_s: float
    missed: int


Cause = Literal["bytes", "age", "budget", "closed"]
"""Why something that waited for a connection was given up: too many bytes wait for it, the oldest has waited too
long, all connections together have too many, or the connection has ended.
"""


@dataclass(frozen=True, slots=True)
class MessagesDropped(Event):
    """Messages that waited for a slow connection, or would have had to, were dropped.

    Attributes:
        conn: the connection.
        cause: of the drop.
        messages, nbytes: how many, and how long their payloads are together.
        age_s: how many seconds the oldest of them has waited.
    """

    conn: ConnectionMeta
    cause: Cause
    messages: int
    nbytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class MessageConflated(Event):
    """A message that waited for a connection was replaced by a newer one with the same key.

    Attributes:
        conn: the connection.
        nbytes: length of the payload that will not be sent.
        age_s: how many seconds it has waited.
    """

    conn: ConnectionMeta
    nbytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class ConnectionTooSlow(Event):
    """A connection is being disconnected because it does not keep up. ``ConnectionClosed`` follows.

    Attributes:
        conn: the connection.
        cause: which limit was passed.
        messages, nbytes: what waited for it, in messages, and in bytes of frames and of what its transport had.
        age_s: how many seconds the oldest of it has waited.
    """

    conn: ConnectionMeta
    cause: Cause
    messages: int
    nbytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class SendFailed(Event):
    """Writing to a connection failed; it is being cut off. ``ConnectionClosed`` follows."""

    conn: ConnectionMeta
    error: Exception


@dataclass(frozen=True, slots=True)
class ConnectionSuspect(Event):
    """There is reason to think that a connection is dead. Any byte that comes clears it: ``ConnectionCleared``.

    Attributes:
        conn: the connection, whose status is SUSPECT if it was ONLINE.
        reason: "silent" if it does not answer in time, "ping_failed" if a ping could not leave for it in time.
        silent_s: seconds since the last sign of life.
    """

    conn: ConnectionMeta
    reason: Literal["silent", "ping_failed"]
    silent_s: float


@dataclass(frozen=True, slots=True)
class ConnectionCleared(Event):
    """A connection that was suspect has given a sign of life."""

    conn: ConnectionMeta


@dataclass(frozen=True, slots=True)
class GradeChanged(Event):
    """A connection has become better or worse.

    Attributes:
        conn: the connection; ``conn.quality`` tells some of the measures.
        grade: a ``wsfast.Grade``: 0 good, 1 fair, 2 poor, 3 bad.
        before: the former one.
    """

    conn: ConnectionMeta
    grade: int
    before: int


@dataclass(frozen=True, slots=True)
class LoopLate(Event):
    """The event loop did nothing for a while; no connection is blamed for it.

    Attributes:
        late_s: seconds by which a tick was late.
    """

    late_s: float


@dataclass(frozen=True, slots=True)
class MetadataChanged(Event):
    """The metadata of a connection has changed; published after the notifiers for its keys.

    Attributes:
        conn: the connection; it may have ended since.
        version: of the metadata since then.
        changes: what has changed, at least one key, in the order in which it was given.
    """

    conn: ConnectionMeta
    version: int
    # The values belong to the application: they stay out of the repr, and so out of logs.
    changes: tuple[Change, ...] = field(repr=False)


class EventBus:
    """Hands published events to subscribers; see the module's docstring for what it promises.

    Args:
        max_queued: most calls of asynchronous callbacks that may wait.

    Threads: the event loop's only, but for :meth:`wants`. Subscribing is also allowed before the loop runs.
    """

    def __init__(self, *, max_queued: int = 10_000) -> None:
        if max_queued < 1:
            raise InvalidSetting("max_queued", max_queued, "1 or more")
        self.errors = 0
        self.dropped = 0
        self._max_queued = max_queued
        self._subscriptions: list[tuple[type[Event], _Callback]] = []
        # Event type -> its callbacks, and whether each is asynchronous. Filled on demand, and another dict after every
        # change: a thread that asks meanwhile fills the former one.
        self._routes: dict[type[Event], _Route] = {}
        # What the callbacks run in: not the context of the publisher whose event happened to start the task.
        self._context = contextvars.copy_context()
        self._queue: deque[tuple[Callable[[Any], Awaitable[object]], object]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._overflowing = False

    def on(self, event_type: type[_E], callback: Callable[[_E], object]) -> Callable[[], None]:
        """Call *callback* with every event of *event_type* or of a subclass of it.

        Returns:
            A function that ends the subscription. Calling it again does nothing. Calls that wait already are made.

        Raises:
            TypeError: *event_type* is not a subclass of ``Event``, or *callback* cannot be called.
        """
        if not (isinstance(event_type, type) and issubclass(event_type, Event)):
            raise TypeError(f"event_type must be a subclass of Event, not {event_type!r}")
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        # A tuple of its own for each call, so that the same callback subscribed twice is ended one at a time.
        subscription: tuple[type[Event], _Callback] = (event_type, callback)
        self._subscriptions.append(subscription)
        self._routes = {}

        def unsubscribe() -> None:
            for index, known in enumerate(self._subscriptions):
                if known is subscription:
                    del self._subscriptions[index]
                    self._routes = {}
                    return

        return unsubscribe

    def wants(self, event_type: type[Event]) -> bool:
        """Whether anybody would receive an event of this type. Cost: one dictionary lookup. Threads: any."""
        route = self._routes.get(event_type)
        return bool(self._route(event_type) if route is None else route)

    def publish(self, event: Event) -> None:
        """Hand *event* to its subscribers. Never raises what a subscriber raised.

        Cost: one dictionary lookup without subscribers; with them, their plain callbacks.
        """
        event_type = type(event)
        route = self._routes.get(event_type)
        if route is None:
            route = self._route(event_type)
        for callback, is_async in route:
            if is_async:
                self.enqueue(cast("Callable[[Any], Awaitable[object]]", callback), event)
                continue
            try:
                callback(event)
            except Exception:
                self._failed(callback, event)

    def enqueue(self, callback: Callable[[Any], Awaitable[object]], argument: object) -> None:
        """Have *callback* called with *argument* behind the asynchronous calls that wait already; within the same
        limit."""
        if len(self._queue) >= self._max_queued:
            self.dropped += 1
            if not self._overflowing:
                self._overflowing = True
                logger.warning("%d calls wait for asynchronous subscribers; dropping new ones", self._max_queued)
            return
        is_idle = self._task is None or self._task.done()
        loop = asyncio.get_running_loop() if is_idle else None  # or raise, before anything waits
        self._queue.append((callback, argument))
        if loop is not None:
            self._task = loop.create_task(self._work_off(), context=self._context.copy())

    async def join(self) -> None:
        """Wait until every asynchronous call that waits now, or is added meanwhile, was made."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    async def close(self, timeout_s: float) -> None:
        """Give the waiting calls *timeout_s* seconds, then drop and count what is left."""
        if self._task is None or self._task.done():
            return
        await asyncio.wait([self._task], timeout=timeout_s)
        if not self._task.done():
            left = len(self._queue)
            self._queue.clear()
            self.dropped += left
            self._task.cancel()
            logger.warning("closed while a subscriber was still running; %d calls behind it were dropped", left)

    def _route(self, event_type: type[Event]) -> _Route:
        routes = self._routes
        route = tuple(
            (callback, _is_async(callback))
            for wanted, callback in tuple(self._subscriptions)
            if issubclass(event_type, wanted)
        )
        routes[event_type] = route
        return route

    async def _work_off(self) -> None:
        """Make the queued calls until none is left. The task lives no longer than that, so an idle bus has none."""
        calls = 0
        while self._queue:
            callback, argument = self._queue.popleft()
            try:
                await callback(argument)
            except Exception:
                self._failed(callback, argument)
            calls += 1
            if calls % _CALLS_IN_A_TURN == 0:
                await asyncio.sleep(0)
        self._overflowing = False

    def _failed(self, callback: _Callback, argument: object) -> None:
        self.errors += 1
        logger.exception("subscriber %r failed on %s", callback, type(argument).__name__)


def _is_async(callback: _Callback) -> bool:
    return inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__)
