"""Links to play failure detectors on: what they do to segments, when they pause, how TCP answers, when they die.

A :class:`Trace` is one connection from its accept to its silent death: outages of its link, stalls of the server's
loop, and the messages of the application with the times when they arrive and are acknowledged. Every policy is played
on the same traces; a :class:`Run` is what one policy sends of its own.

All numbers were chosen before any detector was played on them, with one exception: the breath between two stalls.

- One-way delays are lognormal about half the round trip. 3G is a congested cell, whose queues come and go within
  minutes (``drift_s``).
- Pauses come at random (Poisson) and are exponential, cut at the longest; those of 20 s on 3G are the hardest case that
  the target of the project names. A train is handed over every 90 s or so, which takes 0.2 to 2 s.
- An outage *holds* what is sent in it, as the buffer of a base station does, or *drops* it, by a share of the kind.
- A server stalls in trains of blocking calls, with breaths of 0.1 s between. How long a breath is decides how many
  the websockets library kills there: three times as many with breaths of 2 ms, a quarter with 0.02 to 0.5 s.
- TCP is in order. What was dropped is sent again after the retransmission time-out (RFC 6298, with the 200 ms minimum
  of Linux), doubled each time; what follows it waits behind it. Acknowledgements are delayed by up to 40 ms.

Not modelled: selective acknowledgements and tail loss probes, congestion windows (a question is one segment), proxies,
translated addresses that change, and clients that close by themselves.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

__all__ = ["KINDS", "NEVER", "PROFILES", "Kernel", "Kind", "Profile", "Run", "Trace", "traces"]

NEVER = math.inf

_MEAN_LIFE_S = 7200.0  # exponential
_HORIZON_S = 6 * 3600.0  # a connection that lives longer is watched no further
# Outages are drawn, and the application goes on sending, for so long after a death.
_AFTERMATH_S = 300.0
_LAST_PUSHES_S = 120.0
_DELAYED_ACK_S = 0.04
_RTO_MIN_S, _RTO_MAX_S = 0.2, 120.0  # Linux
_DRIFT_PERIOD_S = 97.0

_STALLS_PER_H = 1.5
_STALL_MEAN_S, _STALL_LONGEST_S = 8.0, 60.0
_BREATH_MEAN_S = 0.1
_LAST_STALL = 0.25  # the chance of each to be the last of its train


class Pauses(NamedTuple):
    per_h: float
    mean_s: float
    longest_s: float


class Handovers(NamedTuple):
    every_s: float  # give or take half of it
    shortest_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of link.

    Attributes:
        round_trip_s: median.
        spread: sigma of the lognormal one-way delay.
        pauses: of the link.
        drops: share of the pauses that drop what is sent in them.
        drift_s: what queues add to the round trip at most.
        stalls: whether the server stalls.
        handovers: outages that drop.
    """

    name: str
    round_trip_s: float
    spread: float
    pauses: Pauses
    drops: float = 0.5
    drift_s: float = 0.0
    stalls: bool = False
    handovers: Handovers | None = None


KINDS = (
    Kind("LAN", 0.001, 0.3, Pauses(0.05, 1.0, 3.0)),
    Kind("Wi-Fi", 0.012, 0.6, Pauses(4, 1.5, 10.0)),
    Kind("LTE", 0.055, 0.35, Pauses(4, 2.0, 15.0)),
    Kind("3G", 0.35, 0.5, Pauses(10, 4.0, 20.0), drops=0.3, drift_s=1.0),
    Kind("train", 0.09, 0.5, Pauses(4, 5.0, 15.0), handovers=Handovers(90, 0.2, 2.0)),
    Kind("stalls", 0.03, 0.5, Pauses(2, 1.5, 10.0), stalls=True),
)


@dataclass(frozen=True, slots=True)
class Profile:
    """What the application sends: mean seconds between two messages of the client, and of the server; None: nothing."""

    name: str
    client_every_s: float | None
    server_every_s: float | None


PROFILES = (Profile("idle", None, None), Profile("chat", 30, 20), Profile("feed", None, 5), Profile("busy", 3, 3))


class Outage(NamedTuple):
    begin: float
    end: float
    drops: bool


class Pushes:
    """The application's messages to the client: when they were sent, have arrived, and were acknowledged."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}
        self.sent: list[float] = []
        self.arrived: list[float] = []
        self.acked: list[float] = []


class Trace:
    """One connection. All times are seconds since its accept.

    Args:
        kind: of the link.
        profile: of the application.
        seed: everything follows from it.
        frozen: share of the connections whose peer does not vanish: its program stops, its kernel goes on.

    Attributes:
        death: when the peer vanishes, or its program stops.
        end: the same, or when it is watched no further.
        ends_dead: whether it dies before that.
        stalls: begin and end of each time that the server's loop was blocked.
        came: when the client's messages arrive at the server's kernel.
    """

    def __init__(self, kind: Kind, profile: Profile, seed: int, frozen: float = 0.0) -> None:
        self.kind, self.profile, self.seed = kind, profile, seed
        self.random = random = Random(seed)
        self.death = random.expovariate(1 / _MEAN_LIFE_S)
        is_frozen = random.random() < frozen
        self._link_death = NEVER if is_frozen else self.death
        self.end = min(self.death, _HORIZON_S)
        self.ends_dead = self.death <= _HORIZON_S
        outages = _outages(kind, random, self.end + _AFTERMATH_S)
        self._begins = [outage.begin for outage in outages]
        self._ends = [outage.end for outage in outages]
        self._drops = [outage.drops for outage in outages]
        self.stalls = _stalls(random, self.end + _AFTERMATH_S) if kind.stalls else []
        self._stall_begins = [begin for begin, _ in self.stalls]
        self._phase = random.random() * 600
        # Of each outage the first segment of the application that was sent in it: what follows waits behind it.
        self.first_up: dict[int, float] = {}
        self.client_sent: list[float] = []
        self.came: list[float] = []
        if profile.client_every_s:
            self._talk(profile.client_every_s)
        self._pushes: dict[float, Pushes] = {}

    def pushes(self, most_rto_s: float) -> Pushes:
        """What the server's application sends, whose kernel waits at most so long before it sends again."""
        pushes = self._pushes.get(most_rto_s)
        if pushes is None:
            pushes = self._pushes[most_rto_s] = Pushes()
            if self.profile.server_every_s:
                self.random.seed(self.seed ^ 77)
                self._push(self.profile.server_every_s, pushes, most_rto_s)
        return pushes

    def _talk(self, mean_s: float) -> None:
        now = latest = 0.0
        until = min(self._last_message(), self.death)
        while True:
            now += self.random.expovariate(1 / mean_s)
            if now > until:
                return
            latest = max(latest, self.arrival(now, self.first_up, None, _RTO_MAX_S))
            self.client_sent.append(now)
            self.came.append(latest)

    def _push(self, mean_s: float, pushes: Pushes, most_rto_s: float) -> None:
        now = latest = latest_ack = 0.0
        until = self._last_message()
        while True:
            now += self.random.expovariate(1 / mean_s)
            if now > until:
                return
            sent = self.served(now)
            latest = max(latest, self.arrival(sent, pushes.first, None, most_rto_s))
            ack = NEVER if latest == NEVER else self.ack(sent, latest + _DELAYED_ACK_S, most_rto_s)
            latest_ack = max(latest_ack, ack)
            pushes.sent.append(sent)
            pushes.arrived.append(latest)
            pushes.acked.append(latest_ack)

    def _last_message(self) -> float:
        return self.end + (_LAST_PUSHES_S if self.ends_dead else 0)

    # ---- the link

    def _queued_s(self, now: float) -> float:
        if not self.kind.drift_s:
            return 0.0
        return self.kind.drift_s * max(0.0, math.sin((now + self._phase) / _DRIFT_PERIOD_S)) ** 2

    def _one_way_s(self, now: float) -> float:
        kind = self.kind
        delay_s = 0.5 * kind.round_trip_s * math.exp(self.random.gauss(0, kind.spread))
        return delay_s + 0.5 * self._queued_s(now) if kind.drift_s else delay_s

    def round_trip_s(self, now: float) -> float:
        """What a kernel that smooths its round trips takes them for."""
        return self.kind.round_trip_s + self._queued_s(now)

    def rto_s(self, now: float) -> float:
        """Retransmission time-out."""
        return self.round_trip_s(now) + max(_RTO_MIN_S, 4 * 0.5 * self.kind.round_trip_s * self.kind.spread)

    def arrival(self, sent: float, first: dict[int, float], own: dict[int, float] | None, most_rto_s: float) -> float:
        """When a segment arrives, regardless of order.

        Args:
            sent: when it is sent.
            first: of each outage, the first segment of the application in this direction.
            own: the same of the policy's segments; None: this one is the application's.
            most_rto_s: longest pause between two retransmissions.
        """
        begins, ends = self._begins, self._ends
        arrives = sent + self._one_way_s(sent)
        while True:
            outage = bisect_right(begins, arrives) - 1
            if outage < 0 or ends[outage] <= sent:
                break
            if self._drops[outage]:
                lost = min(first.get(outage, sent), sent)
                if own is None:
                    first.setdefault(outage, sent)
                else:
                    lost = min(lost, own.setdefault(outage, sent))
                step_s = min(self.rto_s(lost), most_rto_s)
                again = lost + step_s
                while again < ends[outage] or again < sent:
                    step_s = min(2 * step_s, most_rto_s)
                    again += step_s
                sent = again
            else:
                sent = ends[outage]
            arrives = sent + self._one_way_s(sent)
            if bisect_right(begins, arrives) - 1 == outage:
                break
        return arrives if arrives < self._link_death else NEVER

    def ack(self, sent: float, acked: float, most_rto_s: float) -> float:
        """When the acknowledgement that the peer's kernel gives at *acked* of a segment sent at *sent* is here."""
        arrives = acked + self._one_way_s(acked)
        outage = bisect_right(self._begins, arrives) - 1
        if outage >= 0 and self._ends[outage] > acked:
            end = self._ends[outage]
            if self._drops[outage]:
                step_s = self.rto_s(sent)
                again = sent + step_s
                while again < end:
                    step_s = min(2 * step_s, most_rto_s)
                    again += step_s
                arrives = again + 2 * self._one_way_s(again)
            else:
                arrives = end + self._one_way_s(end)
        return arrives if arrives < self._link_death else NEVER

    # ---- the server's loop

    def served(self, now: float) -> float:
        """When the loop gets to what happens now."""
        at = bisect_right(self._stall_begins, now) - 1
        return max(now, self.stalls[at][1]) if at >= 0 else now


class Kernel(NamedTuple):
    """What the server's kernel knows: segments on their way, time-outs in a row, when it last sent and heard."""

    unacked: int
    retransmits: int
    last_sent: float
    last_ack: float


class Run:
    """What a policy sends on a trace of its own.

    Args:
        trace: that it is played on.
        most_rto_s: longest pause between two retransmissions of the server's kernel.

    Attributes:
        pings: how many were sent.
    """

    def __init__(self, trace: Trace, most_rto_s: float = _RTO_MAX_S) -> None:
        self.trace = trace
        self.pings = 0
        self.pushes = trace.pushes(most_rto_s)
        self._most_rto_s = most_rto_s
        self._first_down: dict[int, float] = {}
        self._first_up: dict[int, float] = {}
        self._latest_down = self._latest_up = 0.0
        self._sent: list[float] = []
        self._acked: list[float] = []
        trace.random.seed(trace.seed ^ 0x5BD1E995)

    def ping(self, now: float) -> float:
        """Send a ping; when its pong arrives at the server's kernel."""
        trace = self.trace
        self.pings += 1
        arrives = trace.arrival(now, self.pushes.first, self._first_down, self._most_rto_s)
        arrives = max(arrives, self._latest_down, _latest(self.pushes.sent, self.pushes.arrived, now))
        self._latest_down = arrives
        pong = acked = NEVER
        if arrives < trace.death:
            pong = acked = self.answer(arrives)
        elif arrives < NEVER:  # its program has stopped, its kernel has not
            acked = trace.ack(now, arrives + _DELAYED_ACK_S, self._most_rto_s)
        self._sent.append(now)
        self._acked.append(acked)
        return pong

    def answer(self, now: float) -> float:
        """The client sends a segment; when it arrives at the server's kernel."""
        trace = self.trace
        arrives = trace.arrival(now, trace.first_up, self._first_up, _RTO_MAX_S)
        self._latest_up = max(arrives, self._latest_up, _latest(trace.client_sent, trace.came, now))
        return self._latest_up

    def last_read(self, now: float) -> float:
        """When the server has read the last message of the client that has come; 0: none has."""
        return self.trace.served(_before(self.trace.came, bisect_right(self.trace.came, now)))

    def kernel(self, now: float) -> Kernel:
        """What the server's kernel knows at this time."""
        pushes = self.pushes
        acked, acked_pings = bisect_right(pushes.acked, now), bisect_right(self._acked, now)
        sent, sent_pings = bisect_right(pushes.sent, now), len(self._sent)
        came = bisect_right(self.trace.came, now)
        last_ack = max(_before(pushes.acked, acked), _before(self._acked, acked_pings), _before(self.trace.came, came))
        last_sent = max(_before(pushes.sent, sent), _before(self._sent, sent_pings))
        unacked = sent - acked + sent_pings - acked_pings
        retransmits = 0
        if unacked:
            oldest = min(*pushes.sent[acked : min(acked + 1, sent)], *self._sent[acked_pings : acked_pings + 1], NEVER)
            step_s = min(self.trace.rto_s(oldest), self._most_rto_s)
            again = oldest + step_s
            while again <= now:
                retransmits += 1
                last_sent = again  # what is new waits until the oldest is acknowledged
                step_s = min(2 * step_s, self._most_rto_s)
                again += step_s
        return Kernel(unacked, retransmits, last_sent, last_ack)


def _before(times: list[float], at: int) -> float:
    return times[at - 1] if at else 0.0


def _latest(sent: list[float], arrived: list[float], now: float) -> float:
    """When the last of what was sent until now arrives: nothing overtakes it."""
    return _before(arrived, bisect_right(sent, now))


def _truncated(random: Random, mean_s: float, longest_s: float) -> float:
    """Exponential, but no longer than that."""
    return min(longest_s, -mean_s * math.log(1 - random.random() * (1 - math.exp(-longest_s / mean_s))))


def _outages(kind: Kind, random: Random, until: float) -> list[Outage]:
    """In order, and none within another."""
    found = []
    now = 0.0
    while (now := now + random.expovariate(kind.pauses.per_h / 3600)) <= until:
        end = now + _truncated(random, kind.pauses.mean_s, kind.pauses.longest_s)
        found.append(Outage(now, end, random.random() < kind.drops))
    if kind.handovers:
        every_s, shortest_s, longest_s = kind.handovers
        now = 0.0
        while (now := now + random.uniform(0.5 * every_s, 1.5 * every_s)) <= until:
            found.append(Outage(now, now + random.uniform(shortest_s, longest_s), True))
    merged: list[Outage] = []
    for outage in sorted(found):
        if merged and outage.begin <= merged[-1].end:
            last = merged.pop()
            outage = Outage(last.begin, max(last.end, outage.end), last.drops or outage.drops)
        merged.append(outage)
    return merged


def _stalls(random: Random, until: float) -> list[tuple[float, float]]:
    """Trains of them, with breaths between."""
    stalls: list[tuple[float, float]] = []
    now = 0.0
    while True:
        now += random.expovariate(_STALLS_PER_H / 3600)
        if now > until:
            return stalls
        while True:
            end = now + _truncated(random, _STALL_MEAN_S, _STALL_LONGEST_S)
            stalls.append((now, end))
            now = end + random.expovariate(1 / _BREATH_MEAN_S)
            if random.random() < _LAST_STALL:
                break


def traces(seed: int, count: int, frozen: float = 0.0) -> Iterator[Trace]:
    """So many connections of each kind and profile, interleaved, so that their hours are learned from in turn."""
    for number in range(count):
        for kind_at, kind in enumerate(KINDS):
            for profile_at, profile in enumerate(PROFILES):
                own = (seed * 1_000_003 + number * 101 + kind_at * 11 + profile_at) * 2_654_435_761 % (1 << 61)
                yield Trace(kind, profile, own, frozen)
