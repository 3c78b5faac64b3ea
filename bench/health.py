"""What health costs, and what it spares: ``health-live``, ``health-tick`` and ``block``.

``health-live``: the processor time of servers whose only work is to ping 15,000 live connections every 20 seconds: that
of ``websockets`` with its own keep-alive, one task and one future at a time for each connection, and that of wsfast.
They run at the same time. The *floor* is a server that pings nobody; it is taken off both, and what is left is divided
by the pings that the clients have counted.

``health-tick``: one tick over 1,000,000 connections of which none, 1 % and 5 % are due, without sockets: who is due,
what is to be done, and a new deadline for each. All that are due are to be pinged; the pings themselves are not sent.
*One ticker* is what is written by hand: a walk over a dict of the times of the last sign.

``block``: the loops of two servers with 5,000 live connections each stand still for 60 seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

from bench.harness import Benchmark, Report, Samples, figure, seconds
from bench.population import make_ids
from bench.wire import Receivers, Rig, Server
from wsfast import HealthPolicy, Registry, reference
from wsfast._health import Health

LIBRARY, WSFAST, FLOOR = "websockets", "wsfast", "floor: no pings"
GENERATION_2, TICKER = "generation 2", "one ticker over a dict"

# Everybody once in 20 s, whatever the quality of the link.
EVERY_20_S = {
    "ping_interval_s": 20.0,
    "poor_interval_s": 20.0,
    "shortest_interval_s": 20.0,
    "learning_interval_s": 20.0,
    "silence_s": 40.0,
    "timeout_s": 40.0,
    "pings_per_h": None,
}
_S = 10**9


# ---- health-live -----------------------------------------------------------------------------------------------------


def _live(report: Report) -> None:
    connections, window_s, windows = (200, 1.0, 2) if report.quick else (15_000, 20.0, 6)
    health = dict(EVERY_20_S)
    keepalive = {"ping_interval": 20.0, "ping_timeout": 20.0}
    if report.quick:
        health = {name: value and value / 20 for name, value in health.items()} | {"answer_s": 0.1}
        keepalive = {"ping_interval": 1.0, "ping_timeout": 20.0}
    with Rig() as rig:
        servers: dict[str, tuple[Server, Receivers]] = {
            LIBRARY: rig.start("websockets", connections, keepalive=keepalive),
            WSFAST: rig.start("wsfast", connections, health=health),
            FLOOR: rig.start("websockets", connections, keepalive={"ping_interval": None}),
        }
        time.sleep(window_s)  # the first pings
        used, sent = Samples(), Samples()
        for _ in range(windows):
            before = {name: _reading(*each) for name, each in servers.items()}
            time.sleep(window_s)
            for name, each in servers.items():
                processor_s, pings = _reading(*each)
                used.add(name, processor_s - before[name][0])
                sent.add(name, pings - before[name][1])
        for name, (server, _) in servers.items():
            if server.call("open") != connections:
                lost = connections - server.call("open")
                raise AssertionError(f"{name} has lost {lost} connections: {server.call('stats')}")
    _report_live(report, used, sent, connections, window_s)


def _reading(server: Server, receivers: Receivers) -> tuple[float, int]:
    """Processor time of the server, and pings that its clients have answered."""
    return server.call("processor_s"), receivers.health()[0]


def _report_live(report: Report, used: Samples, sent: Samples, connections: int, window_s: float) -> None:
    rows = []
    floor_s = used.median(FLOOR)
    cost = {name: (used.median(name) - floor_s) / max(1.0, sent.median(name)) for name in (LIBRARY, WSFAST)}
    for name in (LIBRARY, WSFAST, FLOOR):
        per_ping = figure(cost[name] * 1e6) if name in cost else "-"
        ratio = figure(cost[name] / cost[LIBRARY], "x") if name in cost else "-"
        share = used.median(name) / window_s
        rows.append([name, figure(share * 100), f"{sent.median(name):,.0f}", per_ping, ratio])
        report.row(way=name, connections=connections, processor=share, pings=sent.median(name), ping_s=cost.get(name))
    title = f"{connections:,} live connections, pinged every {window_s:.0f} s; medians of so long"
    report.table(title, ["", "processor: %", "pings", "a ping: us", "to websockets"], rows)
    report.at_most("processor time to that of the keep-alive of websockets", used.ratio(WSFAST, LIBRARY), 0.5, "x")
    report.at_most("the same, for each ping and without the floor", cost[WSFAST] / cost[LIBRARY], 0.5, "x")


# ---- health-tick -----------------------------------------------------------------------------------------------------


class _Population:
    """So many connections in a registry that nobody has touched for long.

    Attributes:
        pinged: how many the last tick wants to ping.
    """

    pinged = 0

    def __init__(self, count: int, make_registry: Callable[[int], Any], make_health: Callable[..., Any]) -> None:
        self.now_ns = time.monotonic_ns()
        self.registry = make_registry(64)
        self.health = make_health(HealthPolicy(explain=0).settings(), self.now_ns)
        self.records = [self.registry.add(client_id) for client_id in make_ids(count)]
        for record in self.records:
            self.health.add(record, self.now_ns)
        self.asked: list[Any] = []
        self.sweep = 0

    def make_due(self, some: list[int]) -> None:
        for record in self.asked:
            self.health.pong(record, self.sweep, 0, self.now_ns)
        # Time goes by in ticks, so that no lateness is found.
        for _ in range(80):
            self.now_ns += 250_000_000
            self.health.tick(self.now_ns)
        self.health_ns = self.health.at(self.now_ns)
        for record in self.records:
            record.deadline_ns = self.health_ns + 1000 * _S
        if self.registry.due(self.health_ns):  # as the tick before has left it, the registry knows who is the next
            raise AssertionError("somebody is due")
        for number in some:
            self.records[number].deadline_ns = self.health_ns - number % _S

    def run(self) -> None:
        """A tick in batches, as a manager has it."""
        registry, health, now_ns, health_ns = self.registry, self.health, self.now_ns, self.health_ns
        self.sweep = health.begin_sweep(now_ns)
        self.asked = asked = []
        while due := registry.due(health_ns, 1000):
            asked += health.look(due, now_ns)[0]
            if len(due) < 1000:
                break
        self.pinged = len(asked)


class _Ticker:
    """Generation 1: a dict of the last signs of life, all of which are looked at."""

    pinged = 0

    def __init__(self, count: int) -> None:
        self.last = dict.fromkeys(make_ids(count), 0.0)
        self._ids = list(self.last)

    def make_due(self, some: list[int]) -> None:
        for client_id in self._ids:
            self.last[client_id] = 1000.0
        for number in some:
            self.last[self._ids[number]] = 0.0

    def run(self) -> None:
        pings = []
        for client_id, last in self.last.items():
            if last < 500.0:
                pings.append(client_id)
        for client_id in pings:
            self.last[client_id] = 1000.0
        self.pinged = len(pings)


def _tick(report: Report) -> None:
    count, repetitions = (2_000, 2) if report.quick else (1_000_000, 9)
    # Generation 2 takes seconds for each tick, and minutes to be filled.
    fewer = count // 10
    makers: dict[str, tuple[int, Callable[[int], Any]]] = {
        WSFAST: (count, lambda count: _Population(count, Registry, Health)),
        TICKER: (count, _Ticker),
        GENERATION_2: (fewer, lambda count: _Population(count, reference.Registry, reference.Health)),
    }
    shares = (0.0, 0.01, 0.05)
    taken = {share: Samples() for share in shares}
    # One after the other: together they would not find room in any cache, nor in most machines.
    for name, (count, make) in makers.items():
        population = make(count)
        for repetition in range(repetitions):
            for share in shares:
                some = Random(repetition).sample(range(count), int(count * share))
                population.make_due(some)
                taken[share].add(name, seconds(population.run))
                if population.pinged != len(some):
                    raise AssertionError(f"{name}: {population.pinged} of {len(some)} are pinged")
        del population
    rows = []
    for name, (count, _) in makers.items():
        cells = [name, f"{count:,}"]
        for share in shares:
            whole_s = taken[share].median(name)
            cells.append(figure(whole_s * 1e3))
            if share:
                cells.append(figure(whole_s / (count * share) * 1e6))
            report.row(way=name, connections=count, due=share, tick_s=whole_s)
        rows.append(cells)
    count = makers[WSFAST][0]
    head = ["", "connections", "none: ms", "1 %: ms", "each: us", "5 %: ms", "each: us"]
    report.table(f"A tick over connections of which so many are due; medians of {repetitions}", head, rows)
    report.at_most("a tick of which none is due", taken[0.0].median(WSFAST) * 1e3, 2, "ms")
    for share in shares[1:]:
        each_us = taken[share].median(WSFAST) / (count * share) * 1e6
        report.at_most(f"each of {share:.0%} that are due", each_us, 1, "us")


# ---- block -----------------------------------------------------------------------------------------------------------


def _block(report: Report) -> None:
    connections, block_s, after_s = (100, 2.0, 3.0) if report.quick else (5_000, 60.0, 60.0)
    with Rig() as rig:
        servers = {
            LIBRARY: rig.start("websockets", connections),
            WSFAST: rig.start("wsfast", connections, health={}),
        }
        # Long enough that some pings are under way when the block begins.
        time.sleep(1.0 if report.quick else 25.0)
        for server, _ in servers.values():
            server.begin("block", seconds=block_s)
        for server, _ in servers.values():
            server.answer()
        time.sleep(after_s)
        rows = []
        for name, (server, receivers) in servers.items():
            pings, closed = receivers.health()
            lost = connections - server.call("open")
            rows.append([name, f"{connections:,}", f"{lost:,}", f"{closed:,}", f"{pings:,}"])
            report.row(way=name, connections=connections, lost=lost, closed=closed, pings=pings)
            if name == WSFAST:
                report.at_most("connections that were closed", max(lost, closed), 0, "")
    title = f"The loop is blocked for {block_s:.0f} s, and is left alone for {after_s:.0f} s after that"
    report.table(title, ["", "connections", "closed by the server", "ended at the client", "pings"], rows)


BENCHMARKS = (
    Benchmark("health-live", "processor time of pinging 15,000 live connections every 20 s", _live),
    Benchmark("health-tick", "one tick over 1,000,000 connections of which few are due", _tick),
    Benchmark("block", "who is closed when the loop was blocked for 60 s", _block),
)
