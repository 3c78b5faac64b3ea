"""The ticks of a manager: when the health of connections is looked at, how pings go out, what follows from it all.

What it promises:

- One timer for all connections; no task for a connection or a ping, but where only the library can send one.
- After a delay of the loop, what sockets have received meanwhile is served before anybody is judged: the sweep comes
  two turns of the loop later, with a look at every socket between them.
- A sweep holds the loop for about a millisecond at a time.
- Dead connections are unregistered at once. Their close frame is sent, for what it is worth, and a moment later they
  are cut off.

Everything that is decided is decided by ``wsfast.health``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from wsfast._health import CLEARED, DEAD, NEW_GRADE, PING_FAILED, SUSPECT
from wsfast.adapters import Closed, adapter_for
from wsfast.events import ConnectionCleared, ConnectionSuspect, GradeChanged, LoopLate

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta, Registry
    from wsfast._fanout import Link
    from wsfast.adapters import Adapter
    from wsfast.delivery import Delivery
    from wsfast.events import EventBus
    from wsfast.health import HealthMonitor

__all__ = ["Heartbeat"]

logger = logging.getLogger(__name__)

# Connections looked at before other work of the loop has its turn: about a millisecond of work.
_BATCH = 1000

# Turns of the loop after a delay until all sockets that were readable have been served. What is called in one turn may
# have been lined up before the sockets were looked at; in the next it was not.
_TURNS = 2


class Heartbeat:
    """Drives a health monitor on the running loop.

    Args:
        monitor: to be driven.
        registry: of the connections.
        delivery: by which pings go out.
        events: where findings are published.
        end: called with a record that is dead, and how it is to be closed.

    Threads: the event loop's only.
    """

    def __init__(
        self,
        monitor: HealthMonitor,
        registry: Registry,
        delivery: Delivery,
        events: EventBus,
        end: Callable[[ConnectionMeta, Closed], object],
    ) -> None:
        self._monitor = monitor
        self._registry = registry
        self._delivery = delivery
        self._events = events
        self._end = end
        self._loop = asyncio.get_running_loop()
        # Who can be pinged by the library only, and the pings that are under way.
        self._by_library: dict[ConnectionMeta, tuple[Any, Adapter]] = {}
        self._pinging: dict[ConnectionMeta, asyncio.Task[None]] = {}
        # Whose ping cannot leave.
        self._stuck: set[Link] = set()
        self._tick_ns = round(monitor.policy.tick_s * 1e9)
        self._due_ns = 0
        self._handle: asyncio.Handle
        self.pings_by_library = 0
        monitor.start(monotonic_ns())
        self._wait(monotonic_ns())

    # ---- connections

    def admit(self, record: ConnectionMeta, link: Link, ws: Any, adapter: Adapter) -> None:
        """Begin with a connection."""
        fd, by_library = adapter.fileno(ws), not adapter.sees_pongs(ws) or self._delivery.is_by_library(link)
        self._monitor.admit(record, monotonic_ns(), fd)
        if by_library:
            self._by_library[record] = (ws, adapter)

    def forget(self, record: ConnectionMeta, link: Link, closed: Closed) -> None:
        """End with a connection."""
        self._by_library.pop(record, None)
        task = self._pinging.pop(record, None)
        if task is not None:
            task.cancel()
        self._stuck.discard(link)
        self._monitor.forget(record, monotonic_ns(), closed, link.peak_bytes)

    def close(self) -> None:
        """End. All connections have been forgotten."""
        self._handle.cancel()

    # ---- what comes back

    def ponged(self, link: Link, payload: bytes) -> None:
        """A pong has come."""
        self._pong(link.record, payload, link.pinged_ns)

    def held(self, link: Link) -> None:
        """A ping cannot leave, or can again."""
        if link.holds_ping:
            self._stuck.add(link)
        else:
            self._stuck.discard(link)
        self._monitor.stuck(link.record, monotonic_ns(), link.holds_ping, link.in_transport)

    def _look_at_stuck(self) -> None:
        """Tell the monitor how much is before the pings that cannot leave: if it becomes less, the peer is at work."""
        for link in list(self._stuck):
            link.ask()
            self._monitor.stuck(link.record, monotonic_ns(), link.holds_ping, link.in_transport)

    def _pong(self, record: ConnectionMeta, payload: bytes, left_ns: int) -> None:
        found = self._monitor.pong(record, payload, left_ns, monotonic_ns())
        if found & (CLEARED | NEW_GRADE):
            self._tell(record, found)

    # ---- ticks

    def _wait(self, begun_ns: int) -> None:
        """Wait for the tick after the one that has begun then."""
        self._due_ns = begun_ns + self._tick_ns
        self._handle = self._loop.call_later(max(0, self._due_ns - monotonic_ns()) / 1e9, self._tick)

    def _tick(self) -> None:
        if monotonic_ns() - self._due_ns > self._monitor.policy.lateness_s * 1e9:
            self._handle = self._loop.call_soon(self._after_turns, _TURNS)
        else:
            self._begin()

    def _after_turns(self, turns: int) -> None:
        if turns > 1:
            self._handle = self._loop.call_soon(self._after_turns, turns - 1)
        else:
            self._begin()

    def _begin(self) -> None:
        now_ns = monotonic_ns()
        late_s = self._monitor.tick(now_ns)
        if late_s:
            logger.info("the event loop was late by %.3f s", late_s)
            if self._events.wants(LoopLate):
                self._events.publish(LoopLate(late_s))
        self._look_at_stuck()
        self._sweep(self._monitor.begin_sweep(now_ns), now_ns, len(self._registry))

    def _sweep(self, payload: bytes, begun_ns: int, left: int) -> None:
        """Look at those who are due, a batch at a time, and at no more than there are: then comes the next tick."""
        now_ns = monotonic_ns()
        due = self._registry.due(self._monitor.at(now_ns), _BATCH)
        if len(due) == _BATCH and left > _BATCH:
            self._handle = self._loop.call_soon(self._sweep, payload, begun_ns, left - _BATCH)
        else:
            self._wait(begun_ns)
        if due:
            look = self._monitor.look(due, now_ns)
            self._ping(payload, look.pings)
            for record, found in look.verdicts:
                self._tell(record, found)

    def _ping(self, payload: bytes, records: list[ConnectionMeta]) -> None:
        if self._by_library:
            for record in records:
                if record in self._by_library:
                    self._ping_by_library(record, payload)
            records = [record for record in records if record not in self._by_library]
        for record in self._delivery.ping(payload, records) if records else ():
            self._monitor.spare(record, monotonic_ns())  # it is being closed: the ping has not left

    def _ping_by_library(self, record: ConnectionMeta, payload: bytes) -> None:
        """Send a ping in a task, unless one waits for its pong: it answers this one too. No task waits for ever."""
        if record not in self._pinging:
            self.pings_by_library += 1
            task = self._loop.create_task(self._ping_and_wait(record, payload, *self._by_library[record]))
            self._pinging[record] = task

    async def _ping_and_wait(self, record: ConnectionMeta, payload: bytes, ws: Any, adapter: Adapter) -> None:
        try:
            async with asyncio.timeout(self._monitor.policy.silence_s):
                await adapter.ping(ws, payload)
        except Exception as error:
            logger.debug("cannot ping %r: %r", record.client_id, error)
        else:
            if not adapter.sees_pongs(ws):
                self._pong(record, payload, 0)
        finally:
            if self._pinging.get(record) is asyncio.current_task():
                del self._pinging[record]

    # ---- findings

    def _tell(self, record: ConnectionMeta, found: int) -> None:
        """Publish what was found, and end who is dead. One that makes trouble hurts no other."""
        try:
            self._publish(record, found)
            if found & DEAD and record.conn is not None:
                self._end_or_spare(record)
        except Exception:
            logger.exception("cannot act on the health of %r", record.client_id)

    def _publish(self, record: ConnectionMeta, found: int) -> None:
        events, monitor = self._events, self._monitor
        # A subscriber may end the connection.
        if found & CLEARED and events.wants(ConnectionCleared) and record.conn is not None:
            events.publish(ConnectionCleared(record))
        if found & SUSPECT and events.wants(ConnectionSuspect) and record.conn is not None:
            silent_s = monitor.silent_s(record, monotonic_ns())
            events.publish(ConnectionSuspect(record, "ping_failed" if found & PING_FAILED else "silent", silent_s))
        if found & NEW_GRADE and events.wants(GradeChanged) and record.conn is not None:
            events.publish(GradeChanged(record, *monitor.grades(record)))

    def _end_or_spare(self, record: ConnectionMeta) -> None:
        ws: Any = record.conn
        if not adapter_for(ws).is_reading(ws):
            # What the peer has sent may wait in a buffer of the transport, which cannot be looked into.
            self._monitor.spare(record, monotonic_ns())
            self._publish(record, CLEARED)
            return
        reason = self._monitor.why_dead(record, monotonic_ns())
        logger.info("%r is dead: %s", record.client_id, reason)
        self._end(record, Closed(self._monitor.policy.code, reason, "us"))
