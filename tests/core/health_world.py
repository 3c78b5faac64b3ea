"""A small world for health monitors: a clock that is told to move, peers that answer as they are told.

Times of the world are seconds since its begin. A tick comes every ``tick_s``, so what is promised for a time is found
at the first tick at or after it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conftest import FakeClock, Implementation
from wsfast import _health, reference
from wsfast._health import DEAD
from wsfast.connection import ConnectionStatus
from wsfast.health import Explanation, HealthMonitor, HealthPolicy

SECOND = 10**9
# Groups of facts that a kernel knows, as in csrc/tcpinfo.h.
BASE, ACKED, NOTSENT, BYTES = 1, 2, 4, 8
# The default, whatever the kernel of this machine can do.
DEFAULT = HealthPolicy(silence_s=23.0)
# Nobody is asked more often for being young: the interval is silence_s - expected_wait_s, which is 13 s.
SETTLED = replace(DEFAULT, learning_s=0.001)
INTERVAL_S = 13.0


def ns(seconds: float) -> int:
    return round(seconds * SECOND)


class Kernel:
    """The kernel's side of a connection: what is sent is acknowledged after *rtt_s*, unless the link is cut."""

    def __init__(self, now_ns: int, rtt_s: float = 0.001) -> None:
        self.rtt_s = rtt_s
        self.is_cut = False
        self.retransmits = 0
        self.sent_ns = self.ack_ns = now_ns
        self.bytes_acked = self.bytes_sent = self.bytes_retrans = 0
        self._flying: deque[tuple[float, int]] = deque()

    def send(self, now_ns: int, nbytes: int = 10) -> None:
        self.sent_ns = now_ns
        self.bytes_sent += nbytes
        self._flying.append((math.inf if self.is_cut else now_ns + ns(self.rtt_s), nbytes))

    def facts(self, now_ns: int) -> tuple[int, ...]:
        while self._flying and self._flying[0][0] <= now_ns:
            ack_ns, nbytes = self._flying.popleft()
            self.ack_ns, self.bytes_acked = int(ack_ns), self.bytes_acked + nbytes
        since_sent_ms, since_ack_ms = ((now_ns - at_ns) // 10**6 for at_ns in (self.sent_ns, self.ack_ns))
        return (
            BASE | ACKED | BYTES, len(self._flying), self.retransmits, ns(self.rtt_s) // 1000, since_sent_ms,
            since_ack_ms, self.bytes_acked, self.bytes_sent, self.bytes_retrans, 0, 0,
        )  # fmt: skip


class Peer:
    """The other side of a connection, and what the monitor has done with it.

    Attributes:
        answer: how many seconds after a ping its pong comes, None: never; called with the number of the ping, from 0.
        kernel: of which facts are told; None: it is not asked.
        facts: in place of the kernel's, called with the time.
        is_blocked: whether pings cannot leave for it.
        pings: when it was sent each, and with which payload.
        found: what was found by looks, and when.
        ponged: what was found by pongs.
        why_dead: the reason for its end.
    """

    def __init__(self, record: Any, answer: Callable[[int], float | None]) -> None:
        self.record = record
        self.answer = answer
        self.kernel: Kernel | None = None
        self.facts: Callable[[int], tuple[int, ...]] | None = None
        self.is_blocked = False
        self.pings: list[tuple[float, bytes]] = []
        self.found: list[tuple[float, int]] = []
        self.ponged: list[int] = []
        self.why_dead: str | None = None

    @property
    def pinged_s(self) -> list[float]:
        return [at_s for at_s, _ in self.pings]

    def found_s(self, what: int) -> list[float]:
        """When *what* was found."""
        return [at_s for at_s, found in self.found if found & what]


class World:
    """A monitor, its registry and their clock.

    Args:
        core: the implementation of the registry and of the health of its connections.
        policy: of the monitor.
        chance: by which the first ping of a connection is delayed, of 65536; None: by chance.
    """

    def __init__(self, core: Implementation, policy: HealthPolicy = SETTLED, chance: int | None = 65535) -> None:
        self.policy = policy
        self.clock = FakeClock(1000 * SECOND)
        self.registry = core.Registry(8, clock=self.clock, wall_clock=self.clock.wall)
        self._chance = chance
        self._dice = random.Random(7)
        health = _health.Health if core.name == "native" else reference.Health
        self.monitor = HealthMonitor(policy, now_ns=self.clock.now, health=health, random=self._random)
        self.peers: dict[str, Peer] = {}
        self.tick_is_late_s = 0.0
        self._begin_ns = self.clock.now
        self._due_ns = self.clock.now + ns(policy.tick_s)
        self._planned: list[tuple[int, int, Callable[[], object]]] = []
        self._count = itertools.count()

    def _random(self, size: int) -> bytes:
        if size == 2 and self._chance is not None:
            return self._chance.to_bytes(2, "big")
        return self._dice.randbytes(size)

    @property
    def now_s(self) -> float:
        return (self.clock.now - self._begin_ns) / SECOND

    # ---- what happens

    def connect(self, answer: float | Callable[[int], float | None] | None = 0.01, *, kernel: bool = False) -> Peer:
        """A new connection.

        Args:
            answer: seconds after which pings are answered, see ``Peer``.
            kernel: whether its kernel tells something.
        """
        record = self.registry.add(f"c{len(self.peers)}")
        record.status = ConnectionStatus.ONLINE
        peer = Peer(record, answer if callable(answer) else lambda number: answer)
        if kernel:
            peer.kernel = Kernel(self.clock.now)
            peer.facts = peer.kernel.facts
        self.peers[record.client_id] = peer
        self.monitor.admit(record, self.clock.now)
        return peer

    def plan(self, at_s: float, call: Callable[[], object]) -> None:
        """Call *call* at that time, or as soon as the loop runs again."""
        heapq.heappush(self._planned, (self._begin_ns + ns(at_s), next(self._count), call))

    def repeat(self, every_s: float, call: Callable[[], object], until_s: float) -> None:
        for number in range(1, int(until_s / every_s) + 1):
            self.plan(number * every_s, call)

    def push(self, peer: Peer) -> None:
        """The application sends something to a peer with a kernel."""
        assert peer.kernel is not None
        peer.kernel.send(self.clock.now)

    def run(self, until_s: float) -> None:
        """Let the time go on, tick by tick, until that of the last tick before *until_s*, or at it."""
        while self._due_ns + ns(self.tick_is_late_s) <= self._begin_ns + ns(until_s):
            self._run_planned(self._due_ns)
            self.clock.now = self._due_ns + ns(self.tick_is_late_s)
            self._tick()

    def run_to_pong(self, peer: Peer, count: int) -> None:
        """Let the time go on until so many pongs have come from a peer, tick by tick, but for no more than a day."""
        while len(peer.ponged) < count and self.now_s < 86400:
            self.run(self.now_s + self.policy.tick_s)
        assert len(peer.ponged) == count

    def freeze(self, seconds: float) -> None:
        """The next tick comes that much too late, and what has come meanwhile is seen just before it."""
        self._run_planned(self._due_ns)
        self.clock.now = self._due_ns + ns(seconds)
        self._tick()

    def step_back(self, seconds: float) -> None:
        """Set the clock back."""
        self.clock.now -= ns(seconds)
        self._due_ns -= ns(seconds)

    def _run_planned(self, until_ns: int) -> None:
        while self._planned and self._planned[0][0] <= until_ns:
            at_ns, _, call = heapq.heappop(self._planned)
            self.clock.now = max(self.clock.now, at_ns)
            call()

    def _tick(self) -> None:
        now_ns = self.clock.now
        self._run_planned(now_ns)
        self.monitor.tick(now_ns)
        payload = self.monitor.begin_sweep(now_ns)
        due = self.registry.due(self.monitor.at(now_ns), 100_000)
        told = [self.peers[record.client_id].facts for record in due]
        look = self.monitor.look(due, now_ns, [facts and facts(now_ns) for facts in told])
        for record in look.pings:
            self._deliver(self.peers[record.client_id], payload)
        for record, found in look.verdicts:
            peer = self.peers[record.client_id]
            peer.found.append((self.now_s, found))
            if found & DEAD:
                peer.why_dead = self.monitor.why_dead(record, now_ns)
        self._due_ns = now_ns + ns(self.policy.tick_s)

    def _deliver(self, peer: Peer, payload: bytes) -> None:
        answer_s = peer.answer(len(peer.pings))
        peer.pings.append((self.now_s, payload))
        if peer.is_blocked:
            self.monitor.stuck(peer.record, self.clock.now, True, 5000)
            return
        if peer.kernel is not None:
            peer.kernel.send(self.clock.now)
        if answer_s is not None:
            self.plan(self.now_s + answer_s, lambda: self.pong(peer, payload))

    def pong(self, peer: Peer, payload: bytes, left_ns: int = 0) -> int:
        found = self.monitor.pong(peer.record, payload, left_ns, self.clock.now)
        peer.ponged.append(found)
        return found

    # ---- what is known

    def explain(self, peer: Peer) -> Explanation:
        return self.monitor.explain(peer.record.client_id, peer.record, self.clock.now, 0)

    def nobody_was_blamed(self) -> bool:
        return self.monitor.suspects == self.monitor.deaths == 0


def first(count: int, answer_s: float | None, then_s: float | None) -> Callable[[int], float | None]:
    """Answers the first *count* pings after *answer_s*, the others after *then_s*."""
    return lambda number: answer_s if number < count else then_s
