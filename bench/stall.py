"""How long the loop keeps others waiting while 15,000 connections get a message every second.

A timer of 1 ms runs on the loop of the server all the time; its delay is what any other work on that loop suffers: a
request, a ping, an answer. A *plain loop* sends to one connection after the other as a program without a manager does.
The *C floor* is run on the loop and holds it until all is sent: its delay is what a fan-out at the cost of the kernel
alone, but in one piece, would do. Delays are of the timer's wake-ups; the receivers check that everything has arrived.
"""

from __future__ import annotations

from statistics import quantiles

from bench.harness import Benchmark, Report, figure
from bench.ways import PLAIN, ROWS, SIZE, WSFAST_1, WSFAST_2, Servers
from bench.wire import Rig

_NAMES = (PLAIN, *ROWS)


def _run(report: Report) -> None:
    connections, seconds, rounds = (100, 2, 1) if report.quick else (15_000, 10, 3)
    delays: dict[str, list[float]] = {name: [] for name in _NAMES}
    with Rig() as rig:
        servers = Servers(rig, connections, _NAMES)
        for _ in range(rounds):
            for way in servers.names:
                receivers = servers.of(way)[1]
                receivers.expect(seconds, seconds * SIZE)
                delays[way] += servers.call(way, "stall", size=SIZE, seconds=seconds)
                receivers.done_ns()
    rows = []
    for way, found in delays.items():
        if not found:
            rows.append([way, *["-"] * 5])
            continue
        median, p99, p999 = (quantiles(found, n=1000, method="inclusive")[at] * 1e3 for at in (499, 989, 998))
        rows.append([way, *map(figure, (median, p99, p999, max(found) * 1e3)), f"{len(found):,}"])
        report.row(way=way, connections=connections, median_ms=median, p99_ms=p99, p999_ms=p999, samples=len(found))
        if way in (WSFAST_1, WSFAST_2):
            report.at_most(f"p99.9 of the delay, {way}", p999, 5, "ms")
    title = f"Delay of a 1 ms timer while {connections:,} connections get {SIZE} bytes every second: ms"
    report.table(title, ["", "median", "p99", "p99.9", "longest", "timers"], rows)


BENCHMARKS = (Benchmark("stall", "how long a large fan-out keeps the loop from other work", _run),)
