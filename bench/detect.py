"""How soon dead links are found, and at what price: wsfast's monitor against the fixed policies of others.

The links are simulated (``bench.links``), the same for all, from fixed seeds. wsfast's rows run the code that is
shipped: ``wsfast._health.Health`` with the numbers of a ``HealthPolicy``, on a made-up clock and kernel.
(``HealthMonitor`` around it has the payloads of pings, counters and reports, and decides nothing.) A server's
connections come one after the other here, each where the one before has ended: so they share one health clock, all of
whose ticks come, and what was learned.

- *p50*, *p99*: from the death of a peer until its connection was given up.
- *killed*: connections that were given up while the peer lived, in 1,000 hours of a connection.
- *pings*: in an hour of a connection.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from bench.fixed import FIXED, WEBSOCKETS, Outcome, Player
from bench.harness import Benchmark, Report, figure
from bench.links import KINDS, NEVER, PROFILES, Run, Trace, traces
from wsfast import ConnectionMeta, Registry
from wsfast._health import DEAD, Health
from wsfast.health import HealthPolicy

_SEEDS = (1, 2, 3)
# Of each kind of link and each profile, for each seed; 10,000 hours even for those that kill the most.
_CONNECTIONS = 80
_FROZEN_CONNECTIONS = 20

# tcpinfo.h: what is told of the kernel; of the rest nothing follows for detection.
_KNOWS_BASE = 1
# Linux before 6.15 has no TCP_RTO_MAX_MS.
_LINUX_MOST_RTO_S = 120.0


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


class _Ticks:
    """The loop of a server: its ticks, which come late where a trace has it blocked.

    Attributes:
        due_ns: when the next tick is due.
        credit_ns: by how much they were late so far, as the health clock has it.
    """

    def __init__(self, health: Health, tick_ns: int) -> None:
        self._health, self._tick_ns = health, tick_ns
        self.due_ns = tick_ns
        self.credit_ns = 0
        self._stalls: deque[tuple[int, int]] = deque()

    def begin(self, trace: Trace) -> int:
        """A trace begins with the last tick that has come. Returns when that was."""
        origin_ns = self.due_ns - self._tick_ns
        self._stalls = deque((origin_ns + _ns(begin), origin_ns + _ns(end)) for begin, end in trace.stalls)
        return origin_ns

    def next_for(self, deadline_h: int) -> tuple[int, int]:
        """When the next tick comes that is late, or finds that this time on the health clock has passed, and when that
        tick is due.
        """
        tick_ns = self._tick_ns
        wanted_ns = self.due_ns + max(0, -(-(deadline_h + self.credit_ns - self.due_ns) // tick_ns)) * tick_ns
        while self._stalls and self._stalls[0][0] < wanted_ns:
            begin_ns, end_ns = self._stalls[0]
            late_ns = self.due_ns + max(0, (begin_ns - self.due_ns) // tick_ns + 1) * tick_ns
            if late_ns < end_ns:
                return end_ns, late_ns
            self._stalls.popleft()
        return wanted_ns, wanted_ns

    def run_until(self, now_ns: int) -> None:
        """All ticks that are due before this time come in time."""
        ticks = range(self.due_ns, now_ns, self._tick_ns)
        deque(map(self._health.tick, ticks), maxlen=0)
        self.due_ns += len(ticks) * self._tick_ns

    def come(self, now_ns: int) -> None:
        """The next tick comes now."""
        self.credit_ns += self._health.tick(now_ns)
        self.due_ns = now_ns + self._tick_ns


class Monitored:
    """wsfast's monitor as a policy.

    Args:
        name: in the tables.
        policy: its numbers.
    """

    def __init__(self, name: str, policy: HealthPolicy) -> None:
        self.name = name
        self.policy = replace(policy, explain=0)
        self._most_rto_s = policy.retransmit_s or _LINUX_MOST_RTO_S
        self.begin()

    def begin(self) -> None:
        settings = self.policy.settings()
        self._random = Random(0)
        self._now_ns = 0
        self._registry = Registry(1, clock=lambda: self._now_ns)
        self._health = Health(settings, 0)
        self._ticks = _Ticks(self._health, settings["tick_ns"])

    def play(self, trace: Trace) -> Outcome:
        run = Run(trace, self._most_rto_s)
        origin_ns = self._now_ns = self._ticks.begin(trace)
        self._record = self._registry.add("client")
        self._health.add(self._record, origin_ns, self._random.getrandbits(16))
        closed = self._watch(run, origin_ns)
        self._health.remove(self._record)
        self._registry.remove(self._record)
        return Outcome(closed, run.pings)

    def _watch(self, run: Run, origin_ns: int) -> float | None:
        """Until it is given up, or the trace ends: when it was given up."""
        trace, health, ticks, record = run.trace, self._health, self._ticks, self._record
        ends_ns = origin_ns + _ns(trace.end) if not trace.ends_dead else math.inf
        pongs: deque[tuple[int, int, int]] = deque()  # when it is read; number of its ping, and when that left
        while True:
            deadline_h = record.deadline_ns
            assert deadline_h is not None
            tick_ns, due_ns = ticks.next_for(deadline_h)
            now_ns = min(tick_ns, pongs[0][0]) if pongs else tick_ns
            if now_ns >= ends_ns:
                return None
            ticks.run_until(min(now_ns, due_ns))
            if pongs and pongs[0][0] == now_ns:
                _, number, left_ns = pongs.popleft()
                health.pong(record, number, left_ns, now_ns)
                continue
            ticks.come(now_ns)
            if health.at(now_ns) < deadline_h:
                continue
            now = (now_ns - origin_ns) / 1e9
            number = health.begin_sweep(now_ns)
            pings, found = self._look(run, now, now_ns, origin_ns)
            if any(what & DEAD for _, what in found):
                return now
            if pings and (pong := run.ping(now)) < NEVER:
                pongs.append((origin_ns + _ns(trace.served(pong)), number, now_ns))

    def _look(
        self, run: Run, now: float, now_ns: int, origin_ns: int
    ) -> tuple[list[ConnectionMeta], list[tuple[ConnectionMeta, int]]]:
        heard_ns = origin_ns + _ns(run.last_read(now))
        if heard_ns > self._record.last_active_ns:
            self._record.touch(heard_ns)
        return self._health.look([self._record], now_ns, [self._facts(run, now) if self.policy.kernel else None])

    def _facts(self, run: Run, now: float) -> tuple[int, int, int, int, int, int, int, int, int, int, int]:
        kernel = run.kernel(now)
        return (
            _KNOWS_BASE,
            kernel.unacked,
            kernel.retransmits,
            round(run.trace.round_trip_s(now) * 1e6),
            int((now - kernel.last_sent) * 1e3),
            int((now - kernel.last_ack) * 1e3),
            0,  # bytes: not told
            0,
            0,
            0,
            0,  # waits to be read: nothing, all that has come is read before a tick
        )


# ---- figures ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a policy did on some connections."""

    hours: float = 0.0
    pings: int = 0
    killed: int = 0
    detections_s: list[float] = field(default_factory=list)

    def add(self, trace: Trace, outcome: Outcome) -> None:
        closed = trace.end if outcome.closed is None else outcome.closed
        self.hours += min(closed, trace.end) / 3600
        self.pings += outcome.pings
        if outcome.closed is None:
            return
        if closed >= trace.death:
            self.detections_s.append(closed - trace.death)
        else:
            self.killed += 1

    def quantile_s(self, share: float) -> float:
        """The least time within which this share of the dead was found."""
        found = sorted(self.detections_s)
        return found[max(0, math.ceil(share * len(found)) - 1)] if found else math.nan

    @property
    def p50_s(self) -> float:
        return self.quantile_s(0.5)

    @property
    def p99_s(self) -> float:
        return self.quantile_s(0.99)

    @property
    def killed_per_1000h(self) -> float:
        return 1000 * self.killed / self.hours

    @property
    def pings_per_h(self) -> float:
        return self.pings / self.hours

    def is_better_than(self, other: Tally) -> bool:
        """In all three figures that are targets."""
        return (
            self.p99_s < other.p99_s
            and self.killed_per_1000h < other.killed_per_1000h
            and self.pings_per_h < other.pings_per_h
        )


class Results:
    """What policies did, by kind of link and profile."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str, str], Tally] = {}

    def add(self, player: str, trace: Trace, outcome: Outcome) -> None:
        key = player, trace.kind.name, trace.profile.name
        self._tallies.setdefault(key, Tally()).add(trace, outcome)

    def of(self, player: str, *, kind: str | None = None, profile: str | None = None) -> Tally:
        """Together where kind or profile is left out."""
        total = Tally()
        for (name, its_kind, its_profile), tally in self._tallies.items():
            if name == player and kind in (None, its_kind) and profile in (None, its_profile):
                total.hours += tally.hours
                total.pings += tally.pings
                total.killed += tally.killed
                total.detections_s += tally.detections_s
        return total


def play(
    players: Sequence[Player], seeds: Iterable[int], count: int, *, frozen: float = 0.0, kinds: Sequence[str] = ()
) -> Results:
    """Play all on the same traces: so many of each kind of link and profile, for each seed.

    Args:
        frozen: share of the peers whose program stops while their kernel goes on.
        kinds: of links; none: all.
    """
    results = Results()
    for seed in seeds:
        for player in players:
            player.begin()
        for trace in traces(seed, count, frozen):
            if kinds and trace.kind.name not in kinds:
                continue
            for player in players:
                results.add(player.name, trace, player.play(trace))
    return results


# ---- the benchmark ---------------------------------------------------------------------------------------------------

DEFAULT = "wsfast"
_HALF = replace(HealthPolicy(), silence_s=19.5)
_OLD_KERNEL = replace(HealthPolicy(), retransmit_s=None)
_NO_KERNEL = replace(HealthPolicy(), retransmit_s=None, kernel=False)
_HEAD = ["", "p50 (s)", "p99 (s)", "killed / 1,000 h", "pings / h", "hours"]


def _cells(tally: Tally) -> list[str]:
    return [
        f"{tally.p50_s:.1f}",
        f"{tally.p99_s:.1f}",
        f"{tally.killed_per_1000h:.1f}",
        f"{tally.pings_per_h:.0f}",
        figure(tally.hours),
    ]


def _note(report: Report, table: str, name: str, tally: Tally) -> list[str]:
    """A row of the file, and of the table."""
    report.row(
        table=table,
        name=name,
        p50_s=tally.p50_s,
        p99_s=tally.p99_s,
        killed_per_1000h=tally.killed_per_1000h,
        pings_per_h=tally.pings_per_h,
        hours=tally.hours,
        deaths=len(tally.detections_s),
        killed=tally.killed,
    )
    return [name, *_cells(tally)]


def _against_others(report: Report, seeds: Sequence[int], count: int) -> None:
    players: list[Player] = [
        *FIXED,
        Monitored(DEFAULT, HealthPolicy()),
        Monitored("wsfast, 19.5 s", _HALF),
        Monitored("wsfast, kernel before 6.15", _OLD_KERNEL),
        Monitored("wsfast, no kernel", _NO_KERNEL),
    ]
    results = play(players, seeds, count)
    rows = [_note(report, "policies", player.name, results.of(player.name)) for player in players]
    report.table("All links", _HEAD, rows)
    for name in (WEBSOCKETS.name, DEFAULT):
        rows = [_note(report, name, kind.name, results.of(name, kind=kind.name)) for kind in KINDS]
        rows += [_note(report, name, profile.name, results.of(name, profile=profile.name)) for profile in PROFILES]
        report.table(f"By kind of link and by profile: {name}", _HEAD, rows)
    ours, theirs = results.of(DEFAULT), results.of(WEBSOCKETS.name)
    better = sum(results.of(player.name).is_better_than(ours) for player in FIXED)
    report.at_most("fixed policies that are better in p99, kills and pings", better, 0, "")
    report.at_most("p99 of the time to find the dead, of that of websockets 20/20", ours.p99_s / theirs.p99_s, 0.5, "")
    report.at_most("healthy links killed in 1,000 h", ours.killed_per_1000h, theirs.killed_per_1000h, "")
    report.at_most("pings in an hour", ours.pings_per_h, theirs.pings_per_h, "")


def _presets(report: Report, seeds: Sequence[int], count: int) -> None:
    rows = []
    for name, policy, kinds in (
        ("HealthPolicy.lan()", HealthPolicy.lan(), ("LAN",)),
        ("HealthPolicy.mobile()", HealthPolicy.mobile(), ("LTE", "3G", "train")),
    ):
        results = play([Monitored(name, policy)], seeds, count, kinds=kinds)
        rows.append([*_note(report, "presets", name, results.of(name)), ", ".join(kinds)])
    report.table("Presets, on the links that they are for", [*_HEAD, "links"], rows)


def _frozen(report: Report, seeds: Sequence[int], count: int) -> None:
    players: list[Player] = [WEBSOCKETS, Monitored(DEFAULT, HealthPolicy())]
    results = play(players, seeds, count, frozen=1.0)
    rows = []
    for profile in PROFILES:
        tallies = [results.of(player.name, profile=profile.name) for player in players]
        for player, tally in zip(players, tallies, strict=True):
            _note(report, f"frozen, {profile.name}", player.name, tally)
        cells = [f"{seconds:.1f}" for tally in tallies for seconds in (tally.p50_s, tally.p99_s)]
        rows.append([profile.name, *cells])
    head = ["", *(f"{player.name}: {what} (s)" for player in players for what in ("p50", "p99"))]
    report.table("Peers whose program has stopped while their kernel goes on", head, rows)


def _run(report: Report) -> None:
    seeds, count, frozen_count = ((1,), 1, 1) if report.quick else (_SEEDS, _CONNECTIONS, _FROZEN_CONNECTIONS)
    _against_others(report, seeds, count)
    _presets(report, seeds, count)
    _frozen(report, seeds, frozen_count)


BENCHMARKS = (Benchmark("detect", "how soon dead links are found, and how many healthy ones are killed", _run),)
