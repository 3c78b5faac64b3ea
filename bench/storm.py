"""A simulated restart: what the clients of one server do while it is away and when it is back.

The world, which was written down before any policy was run in it:

- 100,000 clients are connected to a server that can bear 2,000 new connections per second. It ends for all of them at
  once, at 0, and is back after 5, 60 or 600 s. It takes 50 s at the least until all are in.
- *The way* from a client to the server takes a time of the client's own, which does not change: log-normal, median
  40 ms, 5 to 500 ms. The client learns of the end after one way, whether the server was killed (its kernel closes the
  connections) or has sent a close frame; a death that must be found by pings would spread clients by itself. An attempt
  arrives after one way, and its outcome is known after another one; that TCP and TLS take more of them is left out.
- *While the server is away*, its machine is there: an attempt is refused at once. It costs nobody anything here, but
  counts, since in the open it meets a load balancer, or the server's neighbour.
- *Once it is back*, a token bucket lets in 2,000 per second, and up to 200 at once. Whoever finds it empty is refused
  with 503 and Retry-After in whole seconds. This costs the server nothing here; in the open, TLS and the handshake
  are most of the cost of a connection, so policies that are refused much are flattered. Nobody waits in a queue.
- Whoever is in stays in. Clients have no other reason to go or to come, and clocks that are exact.
- Whoever is not in half an hour after the server is back is counted as not back.

wsfast's rows run the shipped ``Reconnector``, ``Slots``, ``Admission`` and ``Advice``, with the texts that are sent:

- *told at close*: the server is stopped, not killed. It has told each client its slot and the spread in the close
  frame (1012). It expected to be away for 5 s, however long it then was.
- *killed, told before*: it is killed without a word (1006). When the connections were made, it had told the spread.
- *killed, told nothing*: no word at all. What is left is the strategy that each client chooses, and 503.

The table shows the first seed; wsfast's rows that were told are judged by the worst of three.

The others (``bench.backoffs``) are in the same world with the same ways, and it is the same to them whether the server
is stopped or killed.

- *peak*: most attempts that arrive within 100 ms, ever; *peak, back*: once the server is back.
- *99 %*: seconds from the server's return until 99 % of all clients are in.
- *gave up*: clients that will not try again; *not back*: these, and those that were not in after half an hour.
- *attempts*, *wasted*: attempts, and those that were refused, per client.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from random import Random
from typing import Protocol

from bench.backoffs import OTHERS
from bench.harness import Benchmark, Report, figure
from wsfast.reconnect import (
    Admission,
    Advice,
    PolicyEngine,
    Reconnector,
    ReconnectStrategy,
    Slots,
)

_SEEDS = (1, 2, 3)
_OUTAGES_S = (5.0, 60.0, 600.0)
_PATIENCE_S = 1800.0
_BINS_PER_S = 10
_BURST_S = 0.1
_EXPECTED_AWAY_S = 5.0
_WINDOW_S = 5.0
# Before the server ended, each connection had lasted for an hour.
_LASTED_S = 3600.0


@dataclass(frozen=True)
class World:
    """Who is there, see above.

    Attributes:
        accept_rate: new connections per second.
        ways_s: of each client.
        seed: of all that is random.
    """

    accept_rate: float
    ways_s: list[float]
    seed: int

    @classmethod
    def of(cls, clients: int, accept_rate: float, seed: int) -> World:
        random = Random(f"ways {seed}")
        ways_s = [min(max(random.lognormvariate(math.log(0.04), 0.6), 0.005), 0.5) for _ in range(clients)]
        return cls(accept_rate, ways_s, seed)

    @property
    def slots(self) -> Slots:
        return Slots(len(self.ways_s), self.accept_rate, _WINDOW_S, _EXPECTED_AWAY_S)


class Player(Protocol):
    """A policy that is played by all clients. What it returns is how long a client waits; None: it gives up."""

    def begin(self, world: World) -> None: ...

    def lost(self, client: int, now_s: float) -> float | None: ...

    def failed(self, client: int, now_s: float, retry_after: str | None) -> float | None: ...


class Untold:
    """A strategy whose clients are told nothing."""

    def __init__(self, strategy: ReconnectStrategy) -> None:
        self._strategy = strategy

    def begin(self, world: World) -> None:
        self._random = Random(f"waits {world.seed}").random
        self._attempts = [0] * len(world.ways_s)
        self._previous_s = [0.0] * len(world.ways_s)

    def lost(self, client: int, now_s: float) -> float | None:
        return self.failed(client, now_s, None)

    def failed(self, client: int, now_s: float, retry_after: str | None) -> float | None:
        attempt = self._attempts[client]
        if not self._strategy.should_reconnect(attempt):
            return None
        self._attempts[client] = attempt + 1
        wait_s = self._previous_s[client] = self._strategy.wait_s(attempt, self._previous_s[client], self._random)
        return wait_s


class Wsfast:
    """The shipped client.

    Args:
        at_close: each is told its slot with the close frame.
        before: each was told the spread when it connected.
    """

    def __init__(self, *, at_close: bool = False, before: bool = False) -> None:
        self._at_close, self._before = at_close, before

    def begin(self, world: World) -> None:
        self._world = world
        self._random = Random(f"waits {world.seed}").random
        engine = PolicyEngine()
        self._clients = [Reconnector(engine, self._random) for _ in world.ways_s]
        if self._before:
            for client in self._clients:
                client.told(world.slots.spread_s)

    def lost(self, client: int, now_s: float) -> float | None:
        code, advice = 1006, None
        if self._at_close:
            slots = self._world.slots
            reason = Advice(slots.wait_s(client, self._random), 0.0, slots.spread_s).as_reason("the server restarts")
            code, advice = 1012, Advice.from_reason(reason)
        latency_s = 2 * self._world.ways_s[client]
        return self._clients[client].lost(now_s, _LASTED_S, code, advice=advice, latency_s=latency_s).wait_s

    def failed(self, client: int, now_s: float, retry_after: str | None) -> float | None:
        advice = None if retry_after is None else Advice.from_retry_after(retry_after)
        return self._clients[client].failed(now_s, advice=advice).wait_s


AT_CLOSE, BEFORE, NOTHING = "wsfast, told at close", "wsfast, killed, told before", "wsfast, killed, told nothing"
_TOLD = (AT_CLOSE, BEFORE)


def _players() -> Iterator[tuple[str, Player]]:
    for name, strategy in OTHERS.items():
        yield name, Untold(strategy)
    yield NOTHING, Wsfast()
    yield BEFORE, Wsfast(before=True)
    yield AT_CLOSE, Wsfast(at_close=True)


# ---- the storm -------------------------------------------------------------------------------------------------------


class Storm:
    """What a policy did in one outage.

    Attributes:
        attempts, back: how many attempts there were, and when clients came in, in order.
        gave_up: how many clients did.
    """

    def __init__(self, player: Player, world: World, outage_s: float) -> None:
        self._world, self._outage_s = world, outage_s
        self.attempts = 0
        self.gave_up = 0
        self.back: list[float] = []
        self._bins = [0] * (math.ceil((outage_s + _PATIENCE_S) * _BINS_PER_S) + 1)
        player.begin(world)
        self._while_back(player, self._while_away(player))
        self.attempts = sum(self._bins)

    def _while_away(self, player: Player) -> list[tuple[float, int]]:
        """Clients do not meet while all are refused. Returns when each arrives for the first time after the return."""
        arrivals = []
        for client, way_s in enumerate(self._world.ways_s):
            now_s = way_s
            wait_s = player.lost(client, now_s)
            while wait_s is not None:
                arrival_s = now_s + wait_s + way_s
                if arrival_s >= self._outage_s:
                    arrivals.append((arrival_s, client))
                    break
                self._bins[int(arrival_s * _BINS_PER_S)] += 1
                now_s = arrival_s + way_s
                wait_s = player.failed(client, now_s, None)
            else:
                self.gave_up += 1
        return arrivals

    def _while_back(self, player: Player, arrivals: list[tuple[float, int]]) -> None:
        ways_s, bins = self._world.ways_s, self._bins
        random = Random(f"admission {self._world.seed}").random
        admission = Admission(self._world.accept_rate, random, burst_s=_BURST_S, now_s=self._outage_s)
        heapify(arrivals)
        while arrivals and arrivals[0][0] < self._outage_s + _PATIENCE_S:
            arrival_s, client = arrivals[0]
            bins[int(arrival_s * _BINS_PER_S)] += 1
            told_s = admission.ask(arrival_s)
            if told_s == 0:
                self.back.append(arrival_s)
                heappop(arrivals)
                continue
            now_s = arrival_s + ways_s[client]
            wait_s = player.failed(client, now_s, str(math.ceil(told_s)))
            if wait_s is None:
                self.gave_up += 1
                heappop(arrivals)
            else:
                heapreplace(arrivals, (now_s + wait_s + ways_s[client], client))

    @property
    def seed(self) -> int:
        return self._world.seed

    @property
    def clients(self) -> int:
        return len(self._world.ways_s)

    @property
    def peak(self) -> int:
        return max(self._bins)

    @property
    def peak_back(self) -> int:
        return max(self._bins[int(self._outage_s * _BINS_PER_S) :])

    @property
    def not_back(self) -> int:
        return self.clients - len(self.back)

    @property
    def back_99_s(self) -> float | None:
        """None: they never were."""
        needed = math.ceil(0.99 * self.clients)
        return self.back[needed - 1] - self._outage_s if len(self.back) >= needed else None

    @property
    def wasted_per_client(self) -> float:
        return (self.attempts - len(self.back)) / self.clients


# ---- the benchmark ---------------------------------------------------------------------------------------------------

_HEAD = ["", "peak / 100 ms", "peak, back", "99 % (s)", "gave up", "not back", "attempts", "wasted"]


def _note(report: Report, outage_s: float, name: str, storm: Storm) -> list[str]:
    """A row of the file, and of the table."""
    attempts = storm.attempts / storm.clients
    report.row(
        outage_s=outage_s,
        seed=storm.seed,
        name=name,
        peak=storm.peak,
        peak_back=storm.peak_back,
        back_99_s=storm.back_99_s,
        gave_up=storm.gave_up,
        not_back=storm.not_back,
        attempts_per_client=attempts,
        wasted_per_client=storm.wasted_per_client,
    )
    return [
        name,
        f"{storm.peak:,}",
        f"{storm.peak_back:,}",
        "-" if storm.back_99_s is None else f"{storm.back_99_s:,.1f}",
        f"{storm.gave_up:,}",
        f"{storm.not_back:,}",
        f"{attempts:.2f}",
        f"{storm.wasted_per_client:.2f}",
    ]


def _judge(report: Report, world: World, outage_s: float, storms: dict[str, list[Storm]]) -> None:
    """The targets, by the worst seed. Who has not brought its clients back wastes nothing any more, and is no rival in
    that.
    """
    rivals = [storm for name in OTHERS for storm in storms[name] if storm.back_99_s is not None]
    fewest = min((storm.wasted_per_client for storm in rivals), default=math.inf)
    least_s = len(world.ways_s) / world.accept_rate
    for name in _TOLD:
        what = f"{outage_s:.0f} s, {name}"
        peak = max(storm.peak for storm in storms[name]) / (world.accept_rate / _BINS_PER_S)
        report.at_most(f"{what}: peak, of the accept rate", peak, 1.5, "x")
        back_s = max(math.inf if storm.back_99_s is None else storm.back_99_s for storm in storms[name])
        report.at_most(f"{what}: 99 % back", back_s, 1.3 * least_s + _WINDOW_S, "s")
        wasted = max(storm.wasted_per_client for storm in storms[name])
        report.at_most(f"{what}: wasted, of the best other that brings 99 % back", wasted / fewest, 1, "x")


def _run(report: Report) -> None:
    clients, accept_rate = (2_000, 40.0) if report.quick else (100_000, 2_000.0)
    worlds = [World.of(clients, accept_rate, seed) for seed in (_SEEDS[:1] if report.quick else _SEEDS)]
    report.note(
        f"{figure(clients)} clients, {figure(accept_rate)} new connections per second, "
        f"{figure(accept_rate / _BINS_PER_S)} per 100 ms"
    )
    for outage_s in _OUTAGES_S[:2] if report.quick else _OUTAGES_S:
        storms: dict[str, list[Storm]] = {}
        rows = []
        for name, player in _players():
            # The others miss the targets by far, so for them one seed will do.
            own = worlds if name in _TOLD else worlds[:1]
            storms[name] = [Storm(player, world, outage_s) for world in own]
            noted = [_note(report, outage_s, name, storm) for storm in storms[name]]
            rows.append(noted[0])
        report.table(f"Away for {outage_s:.0f} s", _HEAD, rows)
        _judge(report, worlds[0], outage_s, storms)


BENCHMARKS = (Benchmark("storm", "how the clients of a server that restarts come back, simulated", _run),)
