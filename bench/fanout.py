"""One message to 4,000 live connections, and 20 messages in one turn of the loop.

Each figure is taken with everything on: the connections are those of a ``websockets`` server whose manager knows them,
and the receivers read in another process. Time passes from the first call until the last byte of the last connection
has been read there; *call* is the part of it until the sender could go on. Alternatives take turns on the same
connections (picows: on as many of its own); ratios are formed within a turn, and medians are shown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from bench.harness import Benchmark, Report, Samples, figure
from bench.ways import BROADCAST, FLOOR_1, FLOOR_2, ROWS, SIZE, WSFAST_1, WSFAST_2, Servers
from bench.wire import Rig


def measure(
    rig: Rig, connections: int, messages: int, repetitions: int, loop: str = "asyncio"
) -> tuple[Samples, Samples]:
    """Microseconds of a connection in all, and of the call alone, of each way."""
    servers = Servers(rig, connections, loop=loop)
    whole, call = Samples(), Samples()
    names = servers.names
    for repetition in range(-1, repetitions):  # the first one is not counted
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            whole_us, call_us = servers.clocked(name, messages)
            if repetition >= 0:
                whole.add(name, whole_us)
                call.add(name, call_us)
    servers.close()
    return whole, call


def show(report: Report, title: str, whole: Samples, call: Samples, connections: int, messages: int) -> None:
    rows = []
    for name in ROWS:
        if name not in whole:
            rows.append([name, *["-"] * 4])
            continue
        floor = FLOOR_2 if name == WSFAST_2 else FLOOR_1
        ratios = (whole.ratio(name, floor), whole.ratio(BROADCAST, name))
        rows.append(
            [name, *map(figure, (whole.median(name), call.median(name))), *(figure(ratio, "x") for ratio in ratios)]
        )
        report.row(
            title=title,
            way=name,
            connections=connections,
            messages=messages,
            us=whole.median(name),
            call_us=call.median(name),
            to_floor=ratios[0],
            broadcast_to_it=ratios[1],
        )
    report.table(title, ["", "all: us", "call: us", "to its floor", "broadcast to it"], rows)


def _title(connections: int, messages: int, loop: str) -> str:
    what = "one message" if messages == 1 else f"{messages} messages in one turn"
    return f"{what} of {SIZE} bytes to {connections:,} connections, {loop}: microseconds of a connection"


def _run(report: Report, messages: int, judge: Callable[[Report, Samples], None]) -> None:
    connections, repetitions = (50, 2) if report.quick else (4_000, 15)
    with Rig() as rig:
        for loop in ("asyncio", "uvloop"):
            if importlib.util.find_spec(loop) is None:
                continue
            whole, call = measure(rig, connections, messages, repetitions, loop)
            show(report, _title(connections, messages, loop), whole, call, connections, messages)
            if loop == "asyncio":
                judge(report, whole)
    report.note(
        f"Every frame of every connection was counted and its length checked by the receivers: {messages} x "
        f"{connections:,} for each figure, and nothing else came."
    )


def _judge_one(report: Report, whole: Samples) -> None:
    report.at_most("two threads to the C floor with two", whole.ratio(WSFAST_2, FLOOR_2), 1.25, "x")
    report.at_most("one thread to the C floor with one", whole.ratio(WSFAST_1, FLOOR_1), 1.25, "x")
    report.at_least("websockets.broadcast to two threads", whole.ratio(BROADCAST, WSFAST_2), 2.5, "x")


def _judge_burst(report: Report, whole: Samples) -> None:
    report.at_most("two threads to the C floor with two, joined", whole.ratio(WSFAST_2, FLOOR_2), 1.3, "x")
    report.at_most("one thread to the C floor with one, joined", whole.ratio(WSFAST_1, FLOOR_1), 1.3, "x")
    report.at_least("websockets.broadcast to two threads", whole.ratio(BROADCAST, WSFAST_2), 25, "x")


BENCHMARKS = (
    Benchmark("fanout", "one message to 4,000 live connections", lambda report: _run(report, 1, _judge_one)),
    Benchmark(
        "burst",
        "20 messages in one turn of the loop to 4,000 live connections",
        lambda report: _run(report, 20, _judge_burst),
    ),
)
