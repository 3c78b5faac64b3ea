"""What a connection costs in a fan-out as there are more of them: 1,000, 4,000 and 15,000.

As in ``fanout``; each size has servers and receivers of its own, and all of them take turns. The growth of the floor
is what the kernel's own memory does to its caches."""

from __future__ import annotations

from bench.harness import Benchmark, Report, Samples, figure
from bench.ways import ROWS, SIZE, WSFAST_1, WSFAST_2, Servers
from bench.wire import Rig


def _run(report: Report) -> None:
    sizes, repetitions = ((20, 50), 2) if report.quick else ((1_000, 4_000, 15_000), 11)
    whole = {size: Samples() for size in sizes}
    with Rig() as rig:
        servers = {size: Servers(rig, size) for size in sizes}
        for repetition in range(-1, repetitions):
            for size in sizes:
                for name in servers[size].names:
                    us, _ = servers[size].clocked(name, messages=1)
                    if repetition >= 0:
                        whole[size].add(name, us)
    smallest, largest = sizes[0], sizes[-1]
    rows = []
    for name in ROWS:
        if name not in whole[smallest]:
            rows.append([name, *["-"] * (len(sizes) + 1)])
            continue
        medians = [whole[size].median(name) for size in sizes]
        growth = whole[largest].ratio_to(whole[smallest], name)
        rows.append([name, *map(figure, medians), figure(growth, "x")])
        report.row(way=name, sizes=sizes, us=medians, growth=growth)
        if name in (WSFAST_1, WSFAST_2):
            report.at_most(f"{largest:,} to {smallest:,} connections, {name}", growth, 1.5, "x")
    head = ["", *(f"{size:,}" for size in sizes), "growth"]
    report.table(f"One message of {SIZE} bytes: microseconds of a connection", head, rows)


BENCHMARKS = (Benchmark("growth", "the cost of a connection with 1,000 to 15,000 of them", _run),)
