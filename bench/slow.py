"""1 % of 4,000 clients stop reading while 200 messages of 4 KiB go to everybody.

The kernel would take all of that for a connection and say nothing, so its buffers are cut to 64 KiB on both sides.

The others' *completion* is the time from the first message until the last of them has read the last one. It is
compared with the same run in which everybody reads. *Kept* is what the manager says that it keeps at the end of the
messages, *grown* what its process has grown by beyond the run without slow clients; the *bound* is what the policy
allows: so many bytes for each stalled connection, or in all. Both runs of a pair are on the same connections, one
after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.harness import Benchmark, Report, figure
from bench.wire import Receivers, Rig, Server, rss

_SIZE = 4096
_PAUSE_S = 0.002  # between two messages
_KERNEL_BYTES = 64 * 1024
_MAX_BYTES = 128 * 1024
# A policy that keeps everything is bound by the total alone.
_MAX_TOTAL_BYTES = 16 * 2**20
_POLICIES = ("keep", "drop_newest", "drop_oldest", "conflate", "disconnect")


@dataclass(frozen=True)
class _Effort:
    connections: int
    slow: int
    messages: int
    repetitions: int


_FULL = _Effort(4_000, 40, 200, repetitions=3)
_QUICK = _Effort(50, 2, 100, repetitions=1)


@dataclass(frozen=True)
class _Outcome:
    seconds: float
    grown: int  # bytes
    queued: int  # bytes that the manager keeps at the end
    stats: dict[str, Any]


def _pair(rig: Rig, effort: _Effort, policy: str) -> tuple[_Outcome, _Outcome]:
    """A run in which all read, and one in which some do not, right after it on the same connections."""
    backpressure = {"policy": policy, "max_bytes": _MAX_BYTES, "max_total_bytes": _MAX_TOTAL_BYTES}
    server, receivers = rig.start("wsfast", effort.connections, backpressure=backpressure, buffer=_KERNEL_BYTES)
    _once(server, receivers, effort.messages // 10)
    without_slow = _once(server, receivers, effort.messages)
    receivers.pause(effort.slow)
    with_slow = _once(server, receivers, effort.messages)
    receivers.close()
    server.close()
    if not (with_slow.queued or _given_up(with_slow.stats)):
        raise AssertionError("the slow clients were not slow")
    return without_slow, with_slow


def _once(server: Server, receivers: Receivers, messages: int) -> _Outcome:
    before = rss(server.pid)
    receivers.expect(messages, messages * _SIZE)
    stats = server.call("stream", size=_SIZE, messages=messages, pause_s=_PAUSE_S)
    done_ns = receivers.done_ns()
    queued = server.call("stats")["queued_bytes"]
    return _Outcome((done_ns - stats["begin_ns"]) / 1e9, rss(server.pid) - before, queued, stats)


def _given_up(stats: dict[str, Any]) -> int:
    return sum(count for name, count in stats.items() if name.startswith("too_slow_by"))


def _run(report: Report) -> None:
    effort = _QUICK if report.quick else _FULL
    found: dict[str, list[tuple[_Outcome, _Outcome]]] = {policy: [] for policy in _POLICIES}
    with Rig() as rig:
        for _ in range(effort.repetitions):
            for policy in _POLICIES:
                found[policy].append(_pair(rig, effort, policy))
    rows = []
    for policy, pairs in found.items():
        without = median(one.seconds for one, _ in pairs)
        with_slow = median(two.seconds for _, two in pairs)
        ratio = median(two.seconds / one.seconds for one, two in pairs)
        queued = max(two.queued for _, two in pairs)
        grown = max(two.grown - one.grown for one, two in pairs)
        bound = _MAX_TOTAL_BYTES if policy == "keep" else min(_MAX_TOTAL_BYTES, effort.slow * (_MAX_BYTES + _SIZE))
        stats = pairs[-1][1].stats
        dropped = sum(count for name, count in stats.items() if name.startswith("dropped_by"))
        too_slow = _given_up(stats)
        rows.append(
            [
                policy,
                *map(figure, (without, with_slow)),
                figure(ratio, "x"),
                *(figure(size / 2**20) for size in (queued, grown, bound)),
                f"{dropped:,}",
                f"{too_slow:,}",
            ]
        )
        report.row(
            policy=policy,
            without_s=without,
            with_slow_s=with_slow,
            ratio=ratio,
            queued=queued,
            grown=grown,
            bound=bound,
        )
        report.at_most(f"completion of the others, {policy}", ratio, 1.1, "x")
        report.at_most(f"memory that is kept, {policy}", queued / 2**20, bound / 2**20, "MiB")
    head = ["", "all read: s", "1 % slow: s", "ratio", "kept: MiB", "grown: MiB", "bound: MiB", "dropped", "too slow"]
    title = (
        f"{effort.messages} messages of {_SIZE} bytes to {effort.connections:,} connections; {effort.slow} stop reading"
    )
    report.table(title, head, rows)


BENCHMARKS = (Benchmark("slow", "what clients that stop reading cost the others, and memory", _run),)
