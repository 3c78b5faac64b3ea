"""Sending one message to one connection or to many: the policy, and the only place that has one.

Invariants, on which callers rely:

- **Order.** Messages to one connection leave in the order of the calls that sent them, whichever calls these were. A
  fan-out gives the loop back between slices, so others may send meanwhile. Who sends to a connection that an earlier
  fan-out has not reached yet hands over the earlier message first (see :class:`_FanOut`).
- **Membership.** A broadcast goes to those who match at the moment of the call, less those who leave before their turn.
- **Failures are data.** What goes wrong with one connection is counted on its record and told in the result. It ends
  no fan-out and is raised only from :meth:`Delivery.send`.
- **Counting.** A message is counted as sent on the record when the library has taken it: by the adapter where that
  sees all traffic of the connection, here where it does not, never by both.

Not guaranteed: that a message arrives. Sent means handed to the kernel, queued means that it waits in this process
for a peer that reads slowly. There is no bound yet on what waits there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

from wsfast.adapters import Closed, Outgoing, adapter_for
from wsfast.errors import MessageTooBig, PeerClosed, PeerError, PeerFailed

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta, Registry
    from wsfast.adapters import Adapter

    Excluded: TypeAlias = str | ConnectionMeta | Iterable[str | ConnectionMeta] | None

__all__ = ["BroadcastResult", "Delivery", "Message"]

logger = logging.getLogger(__name__)

Message = str | bytes | bytearray | memoryview
"""``str`` is a text frame, bytes-like a binary one."""

Tag = str | tuple[str, str]
"""A tag's key, for any value, or a pair of key and value."""

# How long a fan-out holds the loop at a time. A ping or a small request waits no longer than this for it.
_SLICE_S = 0.001

# Records taken from the registry under one lock while the targets are listed.
_BATCH = 1000

# Failures told one by one; more are only counted. A result may be logged, and a fan-out may have 100,000 targets.
_MAX_FAILURES = 100

# Messages that may wait for a connection that cannot be written to directly (a fragmented message is under way, or
# the library has no way to do it). More are dropped.
_MAX_WAITING = 1000


@dataclass(frozen=True, slots=True)
class BroadcastResult:
    """What became of a broadcast. ``targets == sent + queued + dropped + failed``.

    Attributes:
        targets: connections that matched.
        sent: taken by the kernel as a whole.
        queued: accepted, but waiting in this process for the peer.
        dropped: not sent, because the connection was closing or left before its turn, or too much waited for it.
        failed: the library raised.
        seconds: from the call to the end of the fan-out.
        failures: client id and exception of the first 100 that failed.
    """

    targets: int
    sent: int
    queued: int
    dropped: int
    failed: int
    seconds: float
    failures: tuple[tuple[str, Exception], ...] = ()


class _FanOut:
    """One message and those who are still owed it.

    A fan-out that is between two slices can be asked to give up a single record out of turn, so that a later message
    to the same connection need not wait for the whole fan-out and cannot overtake it either.
    """

    __slots__ = ("_early", "_position", "_records", "dropped", "failed", "failures", "out", "queued", "sent", "started")

    def __init__(self, out: Outgoing, records: list[ConnectionMeta]) -> None:
        self.out = out
        self.started = perf_counter()
        self.sent = self.queued = self.dropped = self.failed = 0
        self.failures: list[tuple[str, Exception]] = []
        self._records = records
        self._position = 0
        # The records from the position on that were not given up; made only if somebody asks out of turn.
        self._early: dict[ConnectionMeta, bool] | None = None

    def next(self) -> ConnectionMeta | None:
        """The next record that is owed the message, or None at the end."""
        while self._position < len(self._records):
            record = self._records[self._position]
            self._position += 1
            if self._early is None or self._early.pop(record, False):
                return record
        return None

    def give_up(self, record: ConnectionMeta) -> bool:
        """Whether *record* was owed the message until now; the caller has to deliver it.

        Cost: O(1), but O(records left) for the first question.
        """
        if self._early is None:
            self._early = dict.fromkeys(self._records[self._position :], True)
        return self._early.pop(record, False)

    def result(self) -> BroadcastResult:
        return BroadcastResult(
            targets=len(self._records),
            sent=self.sent,
            queued=self.queued,
            dropped=self.dropped,
            failed=self.failed,
            seconds=perf_counter() - self.started,
            failures=tuple(self.failures),
        )


class Delivery:
    """Sends messages to the connections of one registry.

    Args:
        registry: of the connections.
        max_message_bytes: longest message, in bytes of payload.

    Threads: the event loop's only.
    """

    def __init__(self, registry: Registry, *, max_message_bytes: int) -> None:
        self._registry = registry
        self._max_message_bytes = max_message_bytes
        # Fan-outs between two slices, oldest first.
        self._unfinished: list[_FanOut] = []
        # Messages for connections that cannot be written to directly, each list with the task that works it off.
        self._waiting: dict[ConnectionMeta, _Waiting] = {}

    async def send(self, record: ConnectionMeta, message: Message) -> None:
        """Send to one connection, and wait while more than the library's limit waits for the peer.

        Raises:
            PeerClosed: the connection is closed, or is closing.
            PeerFailed: the library raised something else.
            MessageTooBig, TypeError, UnicodeEncodeError: the message cannot be sent to anybody.
        """
        out = self._outgoing(message)
        self._settle(record)
        ws = record.conn
        if ws is None:
            raise PeerClosed(record.client_id)
        adapter = adapter_for(ws)
        if not adapter.is_open(ws):
            raise PeerClosed(record.client_id, *_code_and_reason(adapter, ws))
        try:
            in_buffer = self._write(record, adapter, ws, out)
            if in_buffer is None:
                await self._wait_in_line(record, out, done=asyncio.get_running_loop().create_future())
            elif in_buffer:
                await adapter.drain(ws)
        except Exception as error:
            record.failed("out")
            raise _peer_error(record, adapter, ws, error) from error

    async def broadcast(
        self,
        message: Message,
        *,
        group: str | None = None,
        user: str | None = None,
        tag: Tag | None = None,
        exclude: Excluded = None,
    ) -> BroadcastResult:
        """Send to all who match, a slice at a time. If it is cancelled, those it has not reached get nothing.

        No peer is waited for: what a slow one does not take is queued.
        """
        fan_out = self._begin(message, group, user, tag, exclude)
        if self._advance(fan_out, perf_counter() + _SLICE_S):
            return fan_out.result()
        self._unfinished.append(fan_out)
        try:
            while True:
                await asyncio.sleep(0)
                if self._advance(fan_out, perf_counter() + _SLICE_S):
                    return fan_out.result()
        finally:
            self._unfinished.remove(fan_out)

    def broadcast_nowait(
        self,
        message: Message,
        *,
        group: str | None = None,
        user: str | None = None,
        tag: Tag | None = None,
        exclude: Excluded = None,
    ) -> BroadcastResult:
        """Send to all who match before returning, however long that holds the loop."""
        fan_out = self._begin(message, group, user, tag, exclude)
        self._advance(fan_out, float("inf"))
        return fan_out.result()

    def close(self) -> None:
        """Drop what waits for connections that could not be written to directly."""
        for waiting in list(self._waiting.values()):
            waiting.task.cancel()

    def _outgoing(self, message: Message) -> Outgoing:
        out = Outgoing(message)
        if len(out.payload) > self._max_message_bytes:
            raise MessageTooBig(len(out.payload), self._max_message_bytes)
        return out

    def _begin(
        self, message: Message, group: str | None, user: str | None, tag: Tag | None, exclude: Excluded
    ) -> _FanOut:
        out = self._outgoing(message)
        records = [
            record for batch in self._registry.batches(_BATCH, group=group, user=user, tag=tag) for record in batch
        ]
        ids, excluded = _sorted_out(exclude)
        if excluded:
            records = [record for record in records if record not in excluded]
        if ids:
            records = [record for record in records if record.client_id not in ids]
        return _FanOut(out, records)

    def _advance(self, fan_out: _FanOut, until: float) -> bool:
        """Deliver until the end, which gives True, or until the clock says *until*."""
        while (record := fan_out.next()) is not None:
            if self._unfinished:
                self._settle(record, before=fan_out)
            self._deliver(fan_out, record)
            if perf_counter() >= until:
                return False
        return True

    def _settle(self, record: ConnectionMeta, before: _FanOut | None = None) -> None:
        """Hand over what unfinished fan-outs, those older than *before*, still owe *record*."""
        for fan_out in self._unfinished:
            if fan_out is before:
                return
            if fan_out.give_up(record):
                self._deliver(fan_out, record)

    def _deliver(self, fan_out: _FanOut, record: ConnectionMeta) -> None:
        """Hand the message of *fan_out* to one connection, and note in it how that went."""
        ws = record.conn
        if ws is None:
            fan_out.dropped += 1
            return
        try:
            adapter = adapter_for(ws)
            if not adapter.is_open(ws):
                fan_out.dropped += 1
                return
            in_buffer = self._write(record, adapter, ws, fan_out.out)
            if in_buffer is False:
                fan_out.sent += 1
            elif in_buffer or self._join_line(record, fan_out.out):
                fan_out.queued += 1
            else:
                fan_out.dropped += 1
        except Exception as error:
            record.failed("out")
            fan_out.failed += 1
            if len(fan_out.failures) < _MAX_FAILURES:
                fan_out.failures.append((record.client_id, error))

    def _write(self, record: ConnectionMeta, adapter: Adapter, ws: object, out: Outgoing) -> bool | None:
        """Write at once: whether something waits in the buffer now, or None if the message has to wait in line."""
        if record in self._waiting:
            return None
        written = adapter.send_nowait(ws, out)
        if written is None:
            return None
        if not adapter.counts_sent(ws):
            record.sent(len(out.payload))
        return not written

    def _join_line(self, record: ConnectionMeta, out: Outgoing, done: asyncio.Future[None] | None = None) -> bool:
        """Let *out* wait for its turn at *record*; False if too much waits there."""
        waiting = self._waiting.get(record)
        if waiting is None:
            waiting = self._waiting[record] = _Waiting()
            waiting.task = asyncio.get_running_loop().create_task(self._work_off(record, waiting))
        elif len(waiting.messages) >= _MAX_WAITING and done is None:
            return False
        waiting.messages.append((out, done))
        return True

    async def _wait_in_line(self, record: ConnectionMeta, out: Outgoing, done: asyncio.Future[None]) -> None:
        # The sender waits, and holds itself back by that: its message is not dropped for want of room.
        self._join_line(record, out, done)
        await done

    async def _work_off(self, record: ConnectionMeta, waiting: _Waiting) -> None:
        try:
            while waiting.messages:
                # It stays in line until it is sent: if this task is cancelled, its sender has to be told, too.
                await self._send_in_turn(record, *waiting.messages[0])
                waiting.messages.popleft()
        finally:
            del self._waiting[record]
            for _, done in waiting.messages:
                if done is not None:
                    done.cancel()

    async def _send_in_turn(self, record: ConnectionMeta, out: Outgoing, done: asyncio.Future[None] | None) -> None:
        ws = record.conn
        try:
            if ws is None:
                raise PeerClosed(record.client_id)
            adapter = adapter_for(ws)
            await adapter.send(ws, out)
            if not adapter.counts_sent(ws):
                record.sent(len(out.payload))
        except Exception as error:
            if done is not None and not done.done():
                done.set_exception(error)
            if done is None:
                record.failed("out")
                logger.debug("a message that waited for %r was lost: %r", record.client_id, error)
        else:
            if done is not None and not done.done():
                done.set_result(None)


class _Waiting:
    """Messages in line for one connection, with the future of the sender that waits for each, if any."""

    __slots__ = ("messages", "task")

    def __init__(self) -> None:
        self.messages: deque[tuple[Outgoing, asyncio.Future[None] | None]] = deque()
        self.task: asyncio.Task[None]


def _sorted_out(exclude: Excluded) -> tuple[set[str], set[ConnectionMeta]]:
    """The ids and the records in *exclude*."""
    ids: set[str] = set()
    records: set[ConnectionMeta] = set()
    if exclude is None:
        return ids, records
    items: Iterable[Any] = (exclude,) if isinstance(exclude, str) or hasattr(exclude, "client_id") else exclude
    for item in items:
        if isinstance(item, str):
            ids.add(item)
        elif hasattr(item, "client_id"):
            records.add(item)
        else:
            raise TypeError(f"exclude must hold client ids and records, not {type(item).__name__}")
    return ids, records


def _code_and_reason(adapter: Adapter, ws: object) -> tuple[int, str]:
    code, reason, _ = adapter.closed(ws) or Closed()
    return code, reason


def _peer_error(record: ConnectionMeta, adapter: Adapter, ws: object, error: Exception) -> PeerError:
    """*error* of the library below in wsfast's terms."""
    if isinstance(error, PeerError):
        return error
    closed = adapter.closed(ws)
    if closed is not None:
        return PeerClosed(record.client_id, closed.code, closed.reason)
    return PeerFailed(record.client_id, error)
