"""How messages get to connections: the one module through which everything that wsfast sends goes.

What it promises:

- **Order.** Messages to one connection leave in the order of the calls, whether ``send``, ``broadcast`` or
  ``broadcast_nowait``: each connection has one outbox, and a call appends to the outboxes of all its targets at once,
  before anything else can happen on the loop. What the application sends by itself, with the library's own ``send``,
  leaves when it calls that: before what waits in the outbox, and never inside a message.
- **One write.** Outboxes are flushed at the end of the loop's turn; all that a connection has pending leaves with one
  system call. A fan-out holds the loop for about a millisecond at a time. Until the rest has left, messages that are
  sent meanwhile queue up behind it.
- **Targets** are those who match at the moment of the call.
- **Slow peers** are waited for by nobody but ``send``. What a socket does not take is queued here, up to the limits of
  :class:`Backpressure`.
- **Sessions.** What is sent to a connection that has one is kept as well, once for all of them, so that it can be sent
  again when its client comes back; what is for a client that is away waits there. How: csrc/backlog.h.
- **Failures are data.** What goes wrong with one connection is counted on its record, told in the result of a broadcast
  and published as an event. It is raised only from :meth:`Delivery.send`.
- **Counting.** A message is counted as sent on the record when the kernel or the transport has taken it.

Not guaranteed: that a message arrives. Sent means handed to the kernel.

How: encoding, outboxes, limits and sockets are the core's (``wsfast._fanout``, csrc/fanout.h). Here is what touches a
loop: when to flush, what goes through a transport instead, who waits for what.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from time import monotonic_ns, perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from wsfast._fanout import (
    CAUSES,
    CONFLATED,
    DROPPED,
    FAILED,
    MAX_HELPERS,
    MAX_VARIANTS,
    POLICIES,
    REST,
    THROUGH,
    Fanout,
    Link,
)
from wsfast._fanout import Message as Encoded
from wsfast.adapters import Closed, adapter_for
from wsfast.errors import InvalidSetting, MessageTooBig, PeerClosed, PeerError, PeerFailed, PeerTooSlow
from wsfast.events import ConnectionTooSlow, MessageConflated, MessagesDropped, SendFailed

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta, Registry
    from wsfast.adapters import Adapter, Framing
    from wsfast.connection import Filters
    from wsfast.events import Cause, EventBus
    from wsfast.session import SessionPolicy

    Excluded: TypeAlias = str | ConnectionMeta | Iterable[str | ConnectionMeta] | None

__all__ = ["BACKPRESSURE", "TOO_SLOW", "Backpressure", "BroadcastResult", "Delivery", "Message", "Undelivered"]

logger = logging.getLogger(__name__)

Message = str | bytes | bytearray | memoryview
"""``str`` is a text frame, bytes-like a binary one."""

Policy = Literal["keep", "drop_newest", "drop_oldest", "conflate", "disconnect"]

TOO_SLOW = Closed(1013, "too slow: too much waited to be sent", "us")
"""How a connection is closed that does not keep up. 1013 is "try again later": a client takes its time."""

# How long a flush holds the loop at a time. A ping or a small request waits no longer than this for it.
_SLICE_NS = 1_000_000
_FOREVER_NS = 10**15

# What may pile up before the loop's turn is over. Beyond it, each push is followed by a slice of flushing: a loop that
# sends without ever waiting fills no memory.
_TURN_BYTES = 8 * 2**20

# Bytes given to a transport at a time.
_WRITE_BYTES = 256 * 1024

# Waiting connections are looked at this many times within the age they may reach, but not more often than the second.
_LOOKS_PER_AGE = 8
_SHORTEST_LOOK_S = 0.05

_CAUSES: dict[int, Cause] = {number: cause for cause, number in CAUSES.items()}


@dataclass(frozen=True, slots=True)
class Backpressure:
    """What happens to a connection whose peer reads more slowly than messages to it arrive.

    The limits are judged only while something waits for the peer: a burst to connections that keep up passes no limit.

    Attributes:
        max_bytes: of frames that may wait for one connection, in its outbox and in its transport together. Let it be
            more than the longest message.
        max_age_s: how long they may wait.
        policy: what to do beyond that.

            ``disconnect``
                Close the connection with ``code`` and ``reason``. What waited is dropped.
            ``drop_newest``
                Drop new messages until what waits has sunk to ``resume_below``. Beyond the age, drop what is too old.
            ``drop_oldest``
                Drop the oldest until what waits, with the new message, has sunk to ``resume_below``; and what is too
                old.
            ``conflate``
                A message with a ``key`` replaces one with the same key that has not left yet, in its place. For the
                rest, as ``drop_oldest``, but what has been handed to the transport does not count.
            ``keep``
                Drop nothing for one connection's limits: only ``max_total_bytes`` holds.
        resume_below: where dropping ends, and where a ``send`` that waits goes on: a number of bytes, or, as a float, a
            share of ``max_bytes``.
        max_total_bytes: that all connections of the manager may make it keep: frames, each counted once however many
            outboxes it is in; the outboxes; and what transports have copied. Beyond it, those for whom most waits lose
            what waits, or are disconnected if the policy drops nothing or if that is not enough. What is kept for
            clients that may come back has limits of its own (``SessionPolicy``) and is not counted here.
        code, reason: of the close frame. 1013 is "try again later". When that is, stands behind the reason, if the code
            is one after which clients come back; see ``HerdPolicy``.

    A frame on its way is never cut off in the middle. With ``drop_oldest`` and ``conflate`` the newest message always
    has its place, however long it is.
    """

    max_bytes: int = 2**20
    max_age_s: float = 30.0
    policy: Policy = "disconnect"
    resume_below: int | float = 0.5
    max_total_bytes: int = 256 * 2**20
    code: int = TOO_SLOW.code
    reason: str = TOO_SLOW.reason

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InvalidSetting("backpressure.policy", self.policy, ", ".join(map(repr, POLICIES)))
        if not self.max_bytes >= 1:
            raise InvalidSetting("backpressure.max_bytes", self.max_bytes, "1 or more")
        if not 0 < self.max_age_s < 1e9:
            raise InvalidSetting("backpressure.max_age_s", self.max_age_s, "more than 0, and less than 10**9")
        if not 0 <= self.resume_below_bytes <= self.max_bytes:
            raise InvalidSetting(
                "backpressure.resume_below", self.resume_below, "from 0 to max_bytes, or as a float from 0 to 1"
            )
        if not self.max_total_bytes >= 1:
            raise InvalidSetting("backpressure.max_total_bytes", self.max_total_bytes, "1 or more")

    @property
    def resume_below_bytes(self) -> int:
        """``resume_below`` in bytes."""
        share = self.resume_below
        return share if isinstance(share, int) else int(share * self.max_bytes)


BACKPRESSURE = Backpressure()
"""The default."""


@dataclass(frozen=True, slots=True)
class BroadcastResult:
    """What has become of a broadcast so far. ``targets == sent + queued + dropped + failed``.

    Attributes:
        targets: connections that matched.
        sent: taken by the kernel as a whole.
        queued: accepted, but waiting: for the peer, for a client that is away, or, with ``broadcast_nowait``, for the
            end of the loop's turn.
        dropped: not sent, because the connection is closing, was never attached, left meanwhile, or is too slow.
        failed: the socket refused it; the connection is broken.
        seconds: from the call to its end.
        displaced: older messages that were dropped, or replaced, to make room for this one.
        disconnected: connections that were given up as too slow when this message came. They are among *dropped*, or,
            if their clients may come back for it, among *away*.
        away: of *queued*, those who may come back for it, or are back and have not caught up.
    """

    targets: int
    sent: int
    queued: int
    dropped: int
    failed: int
    seconds: float
    displaced: int = 0
    disconnected: int = 0
    away: int = 0


@dataclass(frozen=True, slots=True)
class Undelivered:
    """What waited for a connection and could not be delivered: messages, and bytes of frames."""

    client_id: str
    messages: int
    nbytes: int


class _Sending:
    """The calls of ``send`` to one connection that are under way, and what broke it meanwhile."""

    __slots__ = ("count", "error")

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None


class Delivery:
    """Sends messages to the connections of one registry.

    Args:
        registry: of the connections.
        events: where drops and failures are published.
        max_message_bytes: longest message, in bytes of payload.
        backpressure: what happens to slow connections.
        threads: that write to sockets, the loop's own included.
        give_up: called with the record of a connection that is too slow, to disconnect it.
        held: called with a link whose ping cannot leave, or no longer cannot.
        ponged: called with a link and the payload of a pong.
        sessions: what may be kept for clients that come back; None: nothing.

    Threads: the event loop's only.
    """

    def __init__(
        self,
        registry: Registry,
        events: EventBus,
        *,
        max_message_bytes: int,
        backpressure: Backpressure,
        threads: int,
        give_up: Callable[[ConnectionMeta, bool], object],
        held: Callable[[Link], object],
        ponged: Callable[[Link, bytes], object],
        sessions: SessionPolicy | None,
    ) -> None:
        self._registry = registry
        self._events = events
        self._max_message_bytes = max_message_bytes
        self._low_bytes = backpressure.resume_below_bytes
        self._max_bytes = backpressure.max_bytes
        self._policy = backpressure.policy
        self._look_s = max(_SHORTEST_LOOK_S, backpressure.max_age_s / _LOOKS_PER_AGE)
        self._give_up = give_up
        self._fanout = Fanout(
            wake_up=self._writable,
            hand_over=self.finish,
            has_room=self._tell_room,
            buffered=self._buffered,
            held=held,
            ponged=ponged,
            passed_on=self._pass_on,
            policy=POLICIES[backpressure.policy],
            max_bytes=backpressure.max_bytes,
            low_bytes=self._low_bytes,
            max_age_ns=int(backpressure.max_age_s * 1e9),
            max_total_bytes=backpressure.max_total_bytes,
            kept_messages=0 if sessions is None else sessions.max_messages,
            kept_bytes=0 if sessions is None else sessions.max_bytes,
            kept_age_ns=0 if sessions is None else int(sessions.max_age_s * 1e9),
            clock=_now_ns,
        )
        self.threads = threads
        # How many connections the manager has added to the registry and removed from it, after those before its time.
        self._admitted, self._forgotten = (0, 0) if len(registry) else registry.changes()
        self._variants: dict[Hashable, int] = {}
        # Links to which only the library can send, and those to which it is sending.
        self._by_library: set[Link] = set()
        self._worked_off: set[Link] = set()
        self._flush_handle: asyncio.Handle | None = None
        self._window: asyncio.Handle | None = None
        self._window_until = 0.0
        self._look: asyncio.TimerHandle | None = None
        self._is_flushing = self._is_shedding = False
        # What was kept when nothing was in line.
        self._kept_bytes = 0
        # Calls of send that are under way.
        self._sending: dict[Link, _Sending] = {}
        # Who waits until no more than so many bytes wait for a link.
        self._room: dict[Link, dict[asyncio.Future[None], int]] = {}
        # Tasks that send by the library, which has its own flow control.
        self._senders: set[asyncio.Task[None]] = set()

    @property
    def threads(self) -> int:
        return self._fanout.helpers + 1

    @threads.setter
    def threads(self, value: int) -> None:
        if not 1 <= value <= MAX_HELPERS + 1:
            raise InvalidSetting("threads", value, f"from 1 to {MAX_HELPERS + 1}")
        self._fanout.helpers = value - 1

    # ---- connections

    def admit(self, record: ConnectionMeta, ws: object, adapter: Adapter) -> Link:
        """Begin with a connection: from now on, what is sent to *record* goes to *ws*."""
        self._admitted += 1
        try:
            framing = adapter.framing(ws)
            link = self._fanout.admit(record, ws, self._variant(framing), adapter.keeps_views(ws))
        except BaseException:
            self._forgotten += 1  # its record will be removed
            raise
        if framing is None:
            self._by_library.add(link)
        return link

    def finish(self, link: Link) -> None:
        """Hand all that waits for a connection to its transport, which ends it after that."""
        ws: Any = link.ws
        if ws is None:
            return
        adapter = adapter_for(ws)
        try:
            while link.is_open and link.messages and adapter.is_open(ws):
                if link in self._by_library or adapter.is_fragmenting(ws):
                    return
                if link.is_behind and link.in_transport > self._max_bytes:
                    break  # what is kept may be far more; a peer that is so slow does not get all of it
                data, frames = link.peek(_WRITE_BYTES)
                link.commit(frames, adapter.write(ws, data))
        except Exception as error:
            self._fail(link, error)
        if self._fanout.has_reports:
            self._schedule()

    def forget(self, link: Link) -> None:
        """End with a connection. What waits for it is dropped."""
        self._by_library.discard(link)
        link.close()
        self._publish()
        self._fanout.forget(link)
        self._forgotten += 1

    # ---- sessions

    def begin_session(self, link: Link) -> bool:
        """Keep what is sent from now on. False: that cannot be done, as only the library can send to it."""
        if link in self._by_library:
            return False
        self._fanout.begin_session(link)
        return True

    def resume(self, link: Link, ws: object, adapter: Adapter, received: int) -> Link | None:
        """The client of *link* is back on *ws*, and has been given so many messages of its session. Returns its link;
        None if what it has missed is not there any more."""
        framing = adapter.framing(ws)
        if framing is None:
            return None
        return self._fanout.resume(link, ws, self._variant(framing), adapter.keeps_views(ws), received)

    def greet(self, link: Link, text: str) -> None:
        """Send the first text of all to a connection that has a session, and then what is kept for it."""
        self._fanout.greet(link, text.encode(), monotonic_ns())
        if self._fanout.in_line or self._fanout.has_reports:
            self._schedule()

    def expire_kept(self) -> bool:
        """Let go of what has been kept for too long. Returns whether there are sessions, for which more may come."""
        self._fanout.expire_kept(monotonic_ns())
        return self._fanout.sessions != 0

    def _pass_on(self, link: Link, payload: bytes, is_text: bool) -> None:
        """What the library was told to send to a connection with a session leaves in line with everything else. It is
        the library's to limit: an exception within it would end the connection."""
        record = link.record
        if record is not None:
            self._push(self._fanout.message(payload, is_text, monotonic_ns(), None), [record], ())

    def _variant(self, framing: Framing | None) -> int:
        """The number of the frames that this framing needs."""
        if framing is None or framing.encode is None:
            return 0
        number = self._variants.get(framing.key)
        if number is None:
            if len(self._variants) + 1 >= MAX_VARIANTS:
                return 0  # frames that are not compressed, which are always allowed
            number = self._variants[framing.key] = self._fanout.add_variant(framing.encode)
        return number

    # ---- sending

    async def send(self, record: ConnectionMeta, message: Message, key: str | None = None) -> None:
        """Send to one connection. Returns when the kernel has the message, or, if the peer is slow, when no more than
        ``resume_below`` waits for it; at once, if it is kept for a client that is away or has not caught up.

        Raises:
            PeerClosed: the connection is closed, or is closing.
            PeerTooSlow: the message was dropped.
            PeerFailed: the socket refused it.
            MessageTooBig, TypeError, UnicodeEncodeError: the message cannot be sent to anybody.
        """
        encoded = self._encode(message, key)
        link = self._fanout.get(record)
        if link is None or not (link.is_open or link.is_away):
            raise _closed_error(record)
        sending = self._sending.setdefault(link, _Sending())
        sending.count += 1
        try:
            await self._send(link, encoded, record)
        finally:
            sending.count -= 1
            if sending.count == 0:
                del self._sending[link]
        if encoded.away:
            return
        if sending.error is not None and not encoded.sent:
            raise PeerFailed(record.client_id, sending.error)
        if encoded.sent or encoded.queued:
            return
        if encoded.disconnected:
            raise PeerTooSlow(record.client_id)
        raise _lost_error(record, link)

    async def _send(self, link: Link, encoded: Encoded, record: ConnectionMeta) -> None:
        """Push a message to one connection, and wait until it has left or there is room again."""
        self._push(encoded, [record], ())
        await self._decided(encoded)
        if encoded.queued:
            # The library has its own flow control, and is done with a message when it is.
            await self._wait_for_room(link, 0 if link in self._by_library else self._low_bytes)

    async def _decided(self, encoded: Encoded) -> None:
        """Wait until nothing of a message is pending."""
        if encoded.pending:
            future = asyncio.get_running_loop().create_future()
            encoded.tell(future)
            await future

    async def broadcast(
        self,
        message: Message,
        to: Iterable[str | ConnectionMeta] | None,
        exclude: Excluded,
        key: str | None,
        filters: Filters,
    ) -> BroadcastResult:
        """Send to all who match, and wait until it has left for all who keep up."""
        started = perf_counter()
        encoded = self._broadcast(message, to, exclude, key, filters, None)
        await self._decided(encoded)
        return _result(encoded, started)

    def broadcast_nowait(
        self,
        message: Message,
        to: Iterable[str | ConnectionMeta] | None,
        exclude: Excluded,
        key: str | None,
        filters: Filters,
        coalesce_ms: float | None = None,
    ) -> BroadcastResult:
        """Append to the outboxes of all who match; they are flushed at the end of the loop's turn, or of the window."""
        started = perf_counter()
        return _result(self._broadcast(message, to, exclude, key, filters, coalesce_ms), started)

    def _broadcast(
        self,
        message: Message,
        to: Iterable[str | ConnectionMeta] | None = None,
        exclude: Excluded = None,
        key: str | None = None,
        filters: Filters | None = None,
        coalesce_ms: float | None = None,
    ) -> Encoded:
        encoded = self._encode(message, key)
        excluded = self._records(exclude, "exclude")
        records: list[ConnectionMeta] | None
        if to is not None:
            if filters is not None and not _is_everybody(filters):
                raise TypeError("to= cannot be combined with filters")
            records = self._records(to, "to")
        else:
            records = self._matching(filters or {})
        if coalesce_ms is not None and not 0 <= coalesce_ms <= 60_000:
            raise InvalidSetting("coalesce", coalesce_ms, "from 0 to 60000 milliseconds")
        log = _log_of(filters or {}) if to is None and self._fanout.sessions else 0
        self._push(encoded, records, excluded, coalesce_ms, log)
        return encoded

    def _matching(self, filters: Filters) -> list[ConnectionMeta] | None:
        """The records that match; None for those of all links, which is the same as everybody if nobody but the manager
        has added and removed."""
        if _is_everybody(filters):
            adds, removes = self._registry.changes()
            if adds == self._admitted and removes == self._forgotten:
                return None
        return self._registry.select(**filters)

    def _encode(self, message: Message, key: str | None) -> Encoded:
        # Not message.encode(): a subclass may have one of its own.
        if isinstance(message, str):
            payload: bytes | bytearray = str.encode(message)
        elif isinstance(message, (bytes, bytearray)):
            payload = message
        elif isinstance(message, memoryview):
            payload = message.tobytes()
        else:
            raise TypeError(f"message must be str or bytes-like, not {type(message).__name__}")
        if len(payload) > self._max_message_bytes:
            raise MessageTooBig(len(payload), self._max_message_bytes)
        if key is not None and type(key) is not str:
            if not isinstance(key, str):
                raise TypeError(f"key must be str or None, not {type(key).__name__}")
            key = str.__str__(key)
        return self._fanout.message(payload, isinstance(message, str), monotonic_ns(), key)

    def _records(self, wanted: Excluded, argument: str) -> list[ConnectionMeta]:
        """The attached records in *wanted*, each once; ids that nobody has are left out."""
        if wanted is None:
            return []
        items: Iterable[Any] = (wanted,) if isinstance(wanted, str) or hasattr(wanted, "client_id") else wanted
        records: dict[ConnectionMeta, None] = {}
        for item in items:
            record = self._registry.get(item) if isinstance(item, str) else item
            if record is not None and not hasattr(record, "client_id"):
                raise TypeError(f"{argument} must hold client ids and records, not {type(record).__name__}")
            if record is not None and record.registry is self._registry:
                records[record] = None
        return list(records)

    def _push(
        self,
        encoded: Encoded,
        records: list[ConnectionMeta] | None,
        excluded: Iterable[ConnectionMeta],
        coalesce_ms: float | None = None,
        log: int = 0,
    ) -> None:
        """Append to all outboxes, and see to it that they will be flushed."""
        fanout = self._fanout
        fanout.wants_reports = self._events.wants(MessagesDropped) or self._events.wants(MessageConflated)
        strangers = fanout.push(encoded, records, excluded, coalesce_ms is not None, log)
        if strangers:
            encoded.miss(len(strangers if not excluded else set(strangers).difference(excluded)))
        if coalesce_ms is not None:
            self._open_window(coalesce_ms / 1000)
        if fanout.in_line:
            self._schedule()
        if fanout.has_reports:
            self._publish()
        if fanout.has_waiting:
            self._begin_to_look()
        if not self._is_flushing and (fanout.is_over or fanout.queued_bytes - self._kept_bytes > _TURN_BYTES):
            self._make_room()

    def _make_room(self) -> None:
        """Much is kept. Perhaps it only waits for the end of the turn; if not, those who are slow must give."""
        fanout = self._fanout
        fanout.end_window()
        self._flush()
        while fanout.is_over and fanout.in_line:
            self._flush(is_whole=True)
        if fanout.is_over:
            self._shed()

    def _shed(self) -> None:
        """Take from those for whom most waits."""
        if self._is_shedding:  # what subscribers send because of it waits for the next time
            return
        self._is_shedding = True
        try:
            self._fanout.shed(monotonic_ns())
            self._publish()
        finally:
            self._is_shedding = False

    def ping(self, payload: bytes, records: list[ConnectionMeta]) -> list[ConnectionMeta]:
        """Send a ping to each of these, before what waits for them. It leaves at the end of the loop's turn.

        Returns:
            Those that are closed or closing.
        """
        between, closed = self._fanout.ping(payload, records, monotonic_ns())
        for link in between:
            self._ping_between_fragments(link)
        if self._fanout.in_line:
            self._schedule()
        return closed

    def _ping_between_fragments(self, link: Link) -> None:
        """A control frame may stand between the fragments of a message (RFC 6455, 5.4)."""
        ws: Any = link.ws
        data = link.take_ping()
        if ws is None or not data:
            return
        try:
            adapter = adapter_for(ws)
            in_buffer = adapter.write(ws, data)
            if in_buffer:
                self._wait_for_transport(link, ws, adapter, in_buffer)
        except Exception as error:
            self._fail(link, error)

    # ---- flushing

    def _schedule(self) -> None:
        if self._flush_handle is None:
            self._flush_handle = asyncio.get_running_loop().call_soon(self._flush)

    def _open_window(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        if self._window is not None and self._window_until > until:
            self._window.cancel()
            self._window = None
        if self._window is None:
            self._window = loop.call_at(until, self._end_window)
            self._window_until = until  # what uvloop gives for a moment that has come does not know when that was

    def _end_window(self) -> None:
        self._window = None
        self._fanout.end_window()
        self._flush()

    def _writable(self, link: Link) -> None:
        """The core's message that a link that waited need not wait any longer."""
        if link.is_between_fragments:
            self._ping_between_fragments(link)
        if self._fanout.in_line:
            self._schedule()

    def _buffered(self, link: Link) -> int:
        """The core's question how many bytes a transport has."""
        if link in self._worked_off or link.ws is None:
            return link.in_transport
        try:
            return adapter_for(link.ws).buffered(link.ws)
        except Exception as error:
            logger.debug("cannot tell what the transport of %r has: %r", link.record, error)
            return link.in_transport

    def _flush(self, is_whole: bool = False) -> None:
        """Send what is in line, for a slice of time or all of it."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        fanout, self._is_flushing = self._fanout, True
        try:
            left = fanout.flush(monotonic_ns(), _FOREVER_NS if is_whole else _SLICE_NS)
            # First of all what a frame that was begun lacks: whatever else is written now must not come in between.
            errors = [
                (link, error)
                for link, what, data in left
                if what == REST and (error := self._hand_to_transport(link, data)) is not None
            ]
            for link, what, detail in left:
                if what == FAILED:
                    errors.append((link, OSError(detail, os.strerror(detail))))
                elif what == THROUGH and (error := self._write_through(link)) is not None:
                    errors.append((link, error))
            for link, error in errors:
                self._fail(link, error)
        finally:
            self._is_flushing = False
            if fanout.in_line:
                self._schedule()
            else:
                self._kept_bytes = fanout.queued_bytes
        if fanout.has_reports:
            self._publish()
        if fanout.has_waiting:
            self._begin_to_look()
            if fanout.is_over and not fanout.in_line:
                self._shed()

    def _hand_to_transport(self, link: Link, data: bytes | memoryview) -> Exception | None:
        """Give the rest of a frame to the transport. Returns what went wrong."""
        ws: Any = link.ws
        try:
            adapter = adapter_for(ws)
            self._wait_for_transport(link, ws, adapter, adapter.write(ws, data))
        except Exception as error:
            return error
        return None

    def _write_through(self, link: Link) -> Exception | None:
        """Write what waits for a connection to its transport. Returns what went wrong."""
        ws = link.ws
        if ws is None:
            return None
        try:
            self._write(link, ws, adapter_for(ws))
        except Exception as error:
            return error
        return None

    def _write(self, link: Link, ws: object, adapter: Adapter) -> None:
        if not adapter.is_open(ws):
            link.close()
            return
        if link in self._by_library or adapter.is_fragmenting(ws):
            self._ping_between_fragments(link)
            if link.messages and not link.is_blocked:
                self._send_by_library(link, ws, adapter)
            return
        in_buffer = adapter.buffered(ws)
        if in_buffer:
            self._wait_for_transport(link, ws, adapter, in_buffer)
            return
        link.is_sure()
        data, frames = link.peek(_WRITE_BYTES)
        try:
            in_buffer = adapter.write(ws, data)
        except Exception:
            link.fail(frames)
            raise
        link.commit(frames, in_buffer)
        if in_buffer:
            adapter.when_written(ws, link)

    def _wait_for_transport(self, link: Link, ws: object, adapter: Adapter, in_buffer: int) -> None:
        link.block(in_buffer)
        adapter.when_written(ws, link)

    def _send_by_library(self, link: Link, ws: object, adapter: Adapter) -> None:
        link.block(1)  # it waits for the library, however much that has
        self._worked_off.add(link)
        task = asyncio.get_running_loop().create_task(self._work_off(link, ws, adapter))
        self._senders.add(task)
        task.add_done_callback(self._senders.discard)

    async def _work_off(self, link: Link, ws: Any, adapter: Adapter) -> None:
        """Send what waits for a connection in the library's own way."""
        record: Any = link.record
        is_counted = adapter.counts_sent(ws)
        try:
            while (message := link.peek_message()) is not None:
                nbytes = len(message.encode() if isinstance(message, str) else message)
                # Taken before it is sent, since what waits may be dropped or replaced meanwhile.
                link.take_message(nbytes)
                await adapter.send(ws, message)
                if not is_counted:
                    record.sent(nbytes)
        except Exception as error:
            self._fail(link, error)
        finally:
            self._worked_off.discard(link)
        link.writable()

    def _fail(self, link: Link, error: Exception) -> None:
        """The connection is broken."""
        record, ws = link.record, link.ws
        link.close()
        if link in self._sending:
            self._sending[link].error = error
        if record is None:
            return
        record.failed("out")
        logger.debug("sending to %r failed: %r", record.client_id, error)
        if self._events.wants(SendFailed):
            self._events.publish(SendFailed(record, error))
        try:
            adapter_for(ws).abort(ws)
        except Exception:
            logger.exception("cannot cut off %r", record.client_id)

    # ---- slow connections

    def _begin_to_look(self) -> None:
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(self._look_s, self._look_at_waiting)

    def _look_at_waiting(self) -> None:
        self._look = None
        fanout = self._fanout
        fanout.wants_reports = self._events.wants(MessagesDropped)
        fanout.expire(monotonic_ns())
        self._publish()
        if fanout.has_waiting:
            self._begin_to_look()

    def _publish(self) -> None:
        """Tell what the core has dropped, and disconnect whom it has given up."""
        events = self._events
        # Subscribers may end connections, and those that are given up at once have no link after that.
        reports = [(link.record, *report) for link, *report in self._fanout.take_reports()]
        given_up = []
        for record, what, cause, messages, nbytes, age_s in reports:
            if what == CONFLATED:
                events.publish(MessageConflated(record, nbytes, age_s))
            elif what == DROPPED:
                events.publish(MessagesDropped(record, _CAUSES[cause], messages, nbytes, age_s))
            else:
                logger.info("%r is too slow: %d bytes waited for %.1f s", record.client_id, nbytes, age_s)
                if events.wants(ConnectionTooSlow):
                    events.publish(ConnectionTooSlow(record, _CAUSES[cause], messages, nbytes, age_s))
                given_up.append((record, _CAUSES[cause] == "budget"))
        for record, at_once in given_up:
            self._give_up(record, at_once)

    async def _wait_for_room(self, link: Link, most: int) -> None:
        """Wait until no more than *most* bytes wait for a connection, or it is closed."""
        if not link.is_open or link.bytes <= most:
            return
        future = asyncio.get_running_loop().create_future()
        waiters = self._room.setdefault(link, {})
        waiters[future] = most
        link.watch(most)
        try:
            await future
        finally:
            waiters.pop(future, None)
            if not waiters and self._room.get(link) is waiters:
                del self._room[link]

    def _tell_room(self, link: Link) -> None:
        """The core's message that there is room: wake up those who wait for it."""
        waiters = self._room.get(link, {})
        left = [most for most in waiters.values() if link.is_open and link.bytes > most]
        for future, most in waiters.items():
            if not (future.done() or (link.is_open and link.bytes > most)):
                future.set_result(None)
        if left:
            link.watch(max(left))

    # ---- the end

    def is_by_library(self, link: Link) -> bool:
        """Whether only the library can send to a connection, so that :meth:`finish` can do nothing."""
        return link in self._by_library

    async def drained(self, link: Link, timeout_s: float) -> None:
        """Wait until nothing waits for a connection, it is closed, or *timeout_s* has passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while link.is_open and link.bytes:
                    if not link.is_waiting:  # it may be for the end of a window
                        self._fanout.end_window()
                        self._schedule()
                    await self._wait_for_room(link, 0)

    def unsent(self, link: Link) -> list[int]:
        """The sizes of the frames that wait for a connection, in their order; what its transport has is one."""
        in_transport = self._buffered(link) if link.is_blocked else 0
        return [in_transport, *link.sizes()] if in_transport else link.sizes()

    def stats(self) -> dict[str, int]:
        """Totals, see ``ConnectionManager.stats``."""
        stats = self._fanout.stats()
        dropped, too_slow = stats.pop("dropped"), stats.pop("too_slow")
        return {
            "writes": stats["writes"],
            "writes_through": stats["through"],
            "writes_blocked": stats["blocked"],
            "writes_failed": stats["failed"],
            "pings": stats["pings"],
            "waiting": stats["waiting"],
            "queued_bytes": stats["queued_bytes"],
            "conflated": stats["conflated"],
            "kept_messages": stats["kept_messages"],
            "kept_bytes": stats["kept_bytes"],
            **{f"dropped_by_{cause}": dropped[number] for cause, number in CAUSES.items()},
            **{f"too_slow_by_{cause}": too_slow[number] for cause, number in CAUSES.items() if cause != "closed"},
        }

    def close(self) -> None:
        """End all background work. The connections have been forgotten."""
        for handle in (self._flush_handle, self._window, self._look):
            if handle is not None:
                handle.cancel()
        for task in self._senders:
            task.cancel()
        self._fanout.close()


def _is_everybody(filters: Filters) -> bool:
    return not filters or all(value is None for value in filters.values())


def _log_of(filters: Filters) -> int:
    """A number for this way to address: messages that are addressed alike have nearly always the same targets."""
    wanted = (
        (name, frozenset(value) if isinstance(value, (list, set)) else value)
        for name, value in sorted(filters.items())
        if value is not None
    )
    return hash(tuple(wanted)) & 0xFFFF_FFFF_FFFF_FFFF or 1


def _now_ns() -> int:
    return monotonic_ns()


def _result(encoded: Encoded, started: float) -> BroadcastResult:
    return BroadcastResult(
        targets=encoded.targets,
        sent=encoded.sent,
        queued=encoded.queued + encoded.pending + encoded.away,
        dropped=encoded.dropped,
        failed=encoded.failed,
        seconds=perf_counter() - started,
        displaced=encoded.displaced,
        disconnected=encoded.disconnected,
        away=encoded.away,
    )


def _lost_error(record: ConnectionMeta, link: Link) -> PeerError:
    """Why a message was dropped."""
    return PeerTooSlow(record.client_id) if link.is_open else _closed_error(record, link.ws)


def _closed_error(record: ConnectionMeta, ws: object = None) -> PeerError:
    """Why nothing can be sent to *record* any more."""
    ws = record.conn if ws is None else ws
    if ws is None:
        return PeerClosed(record.client_id)
    closed = adapter_for(ws).closed(ws)
    if closed is None:
        return PeerTooSlow(record.client_id)  # it was given up, and is about to be closed
    return PeerClosed(record.client_id, closed.code, closed.reason)
