"""1 % of 4,000 clients stop reading while 200 messages of 4 KiB go to everybody.

The kernel would take all of that for a connection and say nothing, so its buffers are cut to 64 KiB on both sides.

The others' *completion* is the time from the first message until the last of them has read the last one. It is
compared with the same run in which everybody reads, on the same connections right before. The floor passes over who
does not take a message. Threads have no part in what a policy does, so one thread is measured with the default alone.

Memory is the most that there was at any time during the messages, looked at after each of them:

- *queued* is what the manager says that it keeps (``queued_bytes`` of its ``stats``);
- *in transports* is what really waits there for those who do not read;
- *kept* is what is judged: the greater of the two. Without a manager it is what waits in transports;
- *grown* is what the process has grown by, at its peak, beyond the run in which everybody reads;
- the *bound* is what the settings allow: so many bytes for each stalled connection, and in all. As a message is kept
  once for all connections, the bound in all is less than the messages together, so that *keep* comes up against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench.harness import Benchmark, Report, figure
from bench.ways import BROADCAST, FLOOR_1, FLOOR_2, PICOWS, WSFAST_1, WSFAST_2, Servers
from bench.wire import Rig, forget_peak, peak_rss, rss

_SIZE = 4096
_PAUSE_S = 0.002  # between two messages
_KERNEL_BYTES = 64 * 1024
_MAX_BYTES = 128 * 1024
_MAX_TOTAL_BYTES = 512 * 1024
_POLICIES = ("keep", "drop_newest", "drop_oldest", "conflate", "disconnect")
# The ways, and the policy of those that have one.
_ROWS = (
    *((way, "") for way in (FLOOR_1, FLOOR_2, BROADCAST, PICOWS)),
    (WSFAST_1, "disconnect"),
    *((WSFAST_2, policy) for policy in _POLICIES),
)
_MEMORY = ("queued", "in transports", "kept", "grown", "bound")
_HEAD = ("", "all read: s", "1 % slow: s", "ratio", *_MEMORY, "dropped", "too slow")


@dataclass(frozen=True)
class _Effort:
    connections: int
    slow: int
    messages: int
    repetitions: int


_FULL = _Effort(4_000, 40, 200, repetitions=5)
_QUICK = _Effort(50, 2, 200, repetitions=1)


@dataclass(frozen=True)
class _Outcome:
    seconds: float
    grown: int  # bytes
    most: dict[str, int]  # bytes by what they are: see the top of the file


@dataclass(frozen=True)
class _Pair:
    """A run in which all read, and one in which some do not, right after it on the same connections."""

    without: _Outcome
    with_slow: _Outcome
    dropped: int  # messages
    too_slow: int  # connections


def _pair(rig: Rig, effort: _Effort, way: str, policy: str) -> _Pair | None:
    settings = {}
    if policy:
        settings["backpressure"] = {"policy": policy, "max_bytes": _MAX_BYTES, "max_total_bytes": _MAX_TOTAL_BYTES}
    servers = Servers(rig, effort.connections, [way], buffer=_KERNEL_BYTES, **settings)
    if not servers.names:
        return None
    server, receivers = servers.of(way)
    _once(servers, way, effort.messages // 10)
    without = _once(servers, way, effort.messages)
    receivers.pause(effort.slow)
    with_slow = _once(servers, way, effort.messages, effort.slow)
    stats = server.call("stats") if policy else {}
    servers.close()
    if not (any(with_slow.most.values()) or way in (FLOOR_1, FLOOR_2)):
        raise AssertionError("the slow clients were not slow")
    return _Pair(without, with_slow, _sum(stats, "dropped_by"), _sum(stats, "too_slow_by"))


def _once(servers: Servers, way: str, messages: int, slow: int = 0) -> _Outcome:
    server, receivers = servers.of(way)
    before = rss(server.pid)
    forget_peak(server.pid)
    receivers.expect(messages, messages * _SIZE)
    most = servers.call(way, "stream", size=_SIZE, messages=messages, pause_s=_PAUSE_S, stopped=slow)
    seconds = (receivers.done_ns() - most.pop("begin_ns")) / 1e9
    return _Outcome(seconds, peak_rss(server.pid) - before, most)


def _sum(stats: dict[str, int], prefix: str) -> int:
    return sum(count for name, count in stats.items() if name.startswith(prefix))


def _show(report: Report, effort: _Effort, way: str, policy: str, pairs: list[_Pair]) -> list[str]:
    """A row of the table."""
    name = f"{way}, {policy}" if policy else way
    if not pairs:
        return [name, *["-"] * (len(_HEAD) - 1)]
    without = median(pair.without.seconds for pair in pairs)
    with_slow = median(pair.with_slow.seconds for pair in pairs)
    ratio = median(pair.with_slow.seconds / pair.without.seconds for pair in pairs)
    most = {what: max(pair.with_slow.most[what] for pair in pairs) for what in pairs[0].with_slow.most}
    grown = max(pair.with_slow.grown - pair.without.grown for pair in pairs)
    queued = bound = None
    kept = most["in_transports"]
    if policy:
        queued, kept = most["queued"], most["kept"]
        bound = _MAX_TOTAL_BYTES if policy == "keep" else min(_MAX_TOTAL_BYTES, effort.slow * (_MAX_BYTES + _SIZE))
        report.at_most(f"completion of the others, {name}", ratio, 1.1, "x")
        report.at_most(f"memory that is kept, {name}", kept / 2**20, bound / 2**20, "MiB")
    memory = {"queued": queued, "in_transports": most["in_transports"], "kept": kept, "grown": grown, "bound": bound}
    report.row(way=way, policy=policy, without_s=without, with_slow_s=with_slow, ratio=ratio, **memory)
    return [
        name,
        *map(figure, (without, with_slow)),
        figure(ratio, "x"),
        *(figure(None if size is None else size / 2**20) for size in memory.values()),
        *(f"{count:,}" if policy else "-" for count in (pairs[-1].dropped, pairs[-1].too_slow)),
    ]


def _run(report: Report) -> None:
    effort = _QUICK if report.quick else _FULL
    found: dict[tuple[str, str], list[_Pair]] = {row: [] for row in _ROWS}
    with Rig() as rig:
        for _ in range(effort.repetitions):
            for row, pairs in found.items():
                pair = _pair(rig, effort, *row)
                if pair is not None:
                    pairs.append(pair)
    what = f"{effort.messages} messages of {_SIZE} bytes to {effort.connections:,} connections"
    rows = [_show(report, effort, *row, pairs) for row, pairs in found.items()]
    report.table(f"{what}; {effort.slow} stop reading; memory in MiB", _HEAD, rows)


BENCHMARKS = (Benchmark("slow", "what clients that stop reading cost the others, and memory", _run),)
