"""The fixed policies that others have, played on simulated links.

All get the best reading of their rules on one event loop: what can be read is read before the check runs. The exception
is the websockets library: after the loop was blocked, its timer wins over a pong that has come meanwhile, since both
are ready in one turn and the timer's future was there first.

Intervals and time-outs, in seconds, are the documented defaults of each.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple, Protocol

from bench.links import NEVER, Run, Trace

__all__ = ["FIXED", "WEBSOCKETS", "Outcome", "Player"]


class Outcome(NamedTuple):
    """When a policy gave a connection up; None: it did not until the end of the trace. And what it has sent."""

    closed: float | None
    pings: int


class Player(Protocol):
    """A policy that is played on traces."""

    name: str

    def begin(self) -> None:
        """A server starts: what was learned by another is not known to it."""

    def play(self, trace: Trace) -> Outcome: ...


class PingPong:
    """Ping every interval; close when the pong has not come within the time-out.

    Args:
        timer_wins: over a pong that was not read yet when the loop was blocked.
    """

    def __init__(self, name: str, interval_s: float, timeout_s: float, *, timer_wins: bool = False) -> None:
        self.name = name
        self._interval_s, self._timeout_s, self._timer_wins = interval_s, timeout_s, timer_wins

    def begin(self) -> None:
        pass

    def play(self, trace: Trace) -> Outcome:
        run = Run(trace)
        now = trace.served(self._interval_s)
        while trace.ends_dead or now < trace.end:
            pong = run.ping(now)
            deadline = now + self._timeout_s
            checked = trace.served(deadline)
            if not self._is_answered(trace, pong, deadline, checked):
                return Outcome(checked if trace.ends_dead or checked < trace.end else None, run.pings)
            now = trace.served(max(trace.served(pong), now + self._interval_s))
        return Outcome(None, run.pings)

    def _is_answered(self, trace: Trace, pong: float, deadline: float, checked: float) -> bool:
        if not self._timer_wins:
            return pong <= checked
        return (trace.served(pong) if checked > deadline and pong < NEVER else pong) < checked


class Silence:
    """Ping every interval; close when nothing has come for the time-out, which is checked once a second.

    Args:
        by_client: the client sends the pings.
    """

    _CHECK_S = 1.0

    def __init__(self, name: str, interval_s: float, timeout_s: float, *, by_client: bool = False) -> None:
        self.name = name
        self._interval_s, self._timeout_s, self._by_client = interval_s, timeout_s, by_client

    def begin(self) -> None:
        pass

    def play(self, trace: Trace) -> Outcome:
        run = Run(trace)
        pongs: list[float] = []
        ping_at = self._interval_s if self._by_client else trace.served(self._interval_s)
        heard = 0.0
        while True:
            deadline = heard + self._timeout_s
            if ping_at < deadline:
                if not trace.ends_dead and ping_at >= trace.end:
                    return Outcome(None, run.pings)
                pongs.append(self._ping(run, ping_at))
                ping_at += self._interval_s
                if not self._by_client:
                    ping_at = trace.served(ping_at)
                continue
            now = trace.served(deadline)
            heard = max(heard, _last_read(trace, trace.came, now), _last_read(trace, pongs, now))
            if heard + self._timeout_s <= now:
                return Outcome(now + self._CHECK_S / 2 if trace.ends_dead or now < trace.end else None, run.pings)

    def _ping(self, run: Run, now: float) -> float:
        if not self._by_client:
            return run.ping(now)
        if now >= run.trace.death:
            return NEVER
        run.pings += 1
        return run.answer(now)


def _last_read(trace: Trace, came: list[float], now: float) -> float:
    """When the last of what has come until now is read."""
    at = bisect_right(came, now)
    return trace.served(came[at - 1]) if at else 0.0


WEBSOCKETS = PingPong("websockets 20/20", 20, 20, timer_wins=True)
FIXED: tuple[Player, ...] = (
    WEBSOCKETS,
    PingPong("Socket.IO 25/20", 25, 20),
    Silence("SignalR 15/30", 15, 30),
    Silence("Phoenix 30/60", 30, 60, by_client=True),
    PingPong("centrifuge 25/10", 25, 10),
)
