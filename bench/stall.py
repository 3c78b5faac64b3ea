"""How long the loop keeps others waiting while 15,000 connections get a message every second.

A timer of 1 ms runs on the loop of the server all the time; its delay is what any other work on that loop suffers: a
request, a ping, an answer. A *plain loop* sends to one connection after the other as a program without a manager does.
Delays are of the timer's wake-ups; the receivers check that everything has arrived.
"""

from __future__ import annotations

from statistics import quantiles

from bench.harness import Benchmark, Report, figure
from bench.wire import Rig

_SIZE = 128
_PLAIN, _WSFAST_1, _WSFAST_2 = "plain loop of sends", "wsfast, 1 thread", "wsfast, 2 threads"
_WAYS = {_PLAIN: ("plain", 1), _WSFAST_1: ("wsfast", 1), _WSFAST_2: ("wsfast", 2)}


def _run(report: Report) -> None:
    connections, seconds, rounds = (100, 2, 1) if report.quick else (15_000, 10, 3)
    delays: dict[str, list[float]] = {way: [] for way in _WAYS}
    with Rig() as rig:
        server, receivers = rig.start("wsfast", connections)
        for _ in range(rounds):
            for way, (how, threads) in _WAYS.items():
                receivers.expect(seconds, seconds * _SIZE)
                delays[way] += server.call("stall", size=_SIZE, seconds=seconds, how=how, threads=threads)
                receivers.done_ns()
    rows = []
    for way, found in delays.items():
        median, p99, p999 = (quantiles(found, n=1000, method="inclusive")[at] * 1e3 for at in (499, 989, 998))
        rows.append([way, *map(figure, (median, p99, p999, max(found) * 1e3)), f"{len(found):,}"])
        report.row(way=way, connections=connections, median_ms=median, p99_ms=p99, p999_ms=p999, samples=len(found))
        if way != _PLAIN:
            report.at_most(f"p99.9 of the delay, {way}", p999, 5, "ms")
    title = f"Delay of a 1 ms timer while {connections:,} connections get {_SIZE} bytes every second: ms"
    report.table(title, ["", "median", "p99", "p99.9", "longest", "timers"], rows)


BENCHMARKS = (Benchmark("stall", "how long a large fan-out keeps the loop from other work", _run),)
