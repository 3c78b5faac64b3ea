"""10,000 clients are away while 1,000 messages go to a group of all: what is kept for them, and how soon they have it.

Clients are brought away as in the open: they connect, begin a session, and their connections are cut with a reset.
Messages have 128 bytes, and each begins with its number: the receivers, in another process, fail unless each client is
welcomed as the one it was and then gets all that it has missed, once and in order.

Two tables. *Memory*, of a server process for each number of clients:

- *account* is what the manager says that it keeps (``queued_bytes``); *before* is the same before the messages;
- *heap* is by how much more of the C heap is in use with the messages than before (``mallinfo2``);
- *RSS* is by how much the process has grown with them. It is less, although what is free is given back to the system
  before both readings: between what is in use of a page, the connections have left room.
- *A further client* is the difference to the row before, divided by the clients between them.

*Replay*: first all connect, up to and with the opening handshake, which costs ``websockets`` about a millisecond each
and is the same whether anything was missed or not; it is printed beside. Then all say hello at once. Time runs from the
first hello until the last byte of the last client's missed messages has been read.

- *all* is that time. It has the greeting of each client (hello, welcome, ready), which is a task, three messages and
  three times JSON in Python, and costs the same for one message missed as for 1,000.
- *greetings* is the time of the same with nothing missed, and *replay* the difference, as a burst greets nobody. Both
  are judged. Greetings hide nothing of the replay: the loop comes to write when it has read all hellos.
- It is compared with *burst*, as ``bench burst`` measures it: 20 messages in one turn of the loop, to as many live
  connections of plain clients; with one thread and with two. Times are divided by clients, and are for 20 messages.
- *Sessions*: the burst to the very clients that come back, for whom it is logged as well.
- *By hand* is what is written without wsfast: a list of what it has missed for each client, and ``await ws.send`` for
  each of them. It is played with 250 clients, as it takes minutes otherwise.

Alternatives take turns; ratios are formed within a turn. The garbage collector is off while a clock runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.harness import Benchmark, Report, Samples, figure
from bench.ways import BROADCAST, FLOOR_1, FLOOR_2, SIZE, WSFAST_1, WSFAST_2, Servers
from bench.wire import Receivers, Rig, Server, rss

_BURST = 20
_BURSTS = (FLOOR_1, FLOOR_2, BROADCAST, WSFAST_1, WSFAST_2)
_BY_HAND = "by hand"
_THREADS = {WSFAST_1: 1, WSFAST_2: 2}
# Which of wsfast's own bursts others are compared with: that with as many threads.
_BASES = {FLOOR_2: WSFAST_2, WSFAST_2: WSFAST_2}
# Parts of a replay.
_GREETINGS, _ONLY = ": greetings", ": replay"
_KINDS = {"wsfast": "sessions", _BY_HAND: "by_hand"}
# A server's limits are those of the benchmark's patience: all are connected before the first says hello.
_SESSIONS = {"hello_timeout_s": 600.0, "grace_s": 600.0, "max_age_s": 600.0}


@dataclass(frozen=True)
class _Effort:
    """How many clients there are.

    Attributes:
        away: for each row of the table of memory.
        lot: of them, that are connected at once.
        replayed: that come back.
        by_hand: the same, by hand.
        messages: that each misses.
        repetitions: turns.
        bursts: of each kind, in each turn.
    """

    away: dict[str, tuple[int, ...]]
    lot: int
    replayed: int
    by_hand: int
    messages: int
    repetitions: int
    bursts: int


_FULL = _Effort(
    away={"wsfast": (1_000, 10_000, 20_000), _BY_HAND: (1_000, 10_000)},
    lot=10_000,
    replayed=10_000,
    by_hand=250,
    messages=1_000,
    repetitions=3,
    bursts=3,
)
_QUICK = _Effort(
    away={"wsfast": (50, 100), _BY_HAND: (50, 100)},
    lot=50,
    replayed=50,
    by_hand=20,
    messages=200,
    repetitions=1,
    bursts=1,
)


def _settings(kind: str) -> dict[str, Any]:
    return {"sessions": _SESSIONS} if kind == "sessions" else {}


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """Bytes of a server process when messages are kept for its clients.

    Attributes:
        before: what it says that it keeps before there are messages; None: it does not say.
        account: the same with them.
        heap, rss: what is more with them.
    """

    clients: int
    before: int | None
    account: int | None
    heap: int | None
    rss: int

    def of_further(self, former: _Kept) -> list[float | None]:
        """Account, heap and RSS of one client more than there were."""
        clients = self.clients - former.clients
        pairs = ((self.account, former.account), (self.heap, former.heap), (self.rss, former.rss))
        return [None if now is None or then is None else (now - then) / clients for now, then in pairs]


def _kept(rig: Rig, effort: _Effort, kind: str, clients: int) -> _Kept:
    server = rig.serve(kind, **_settings(kind))
    for first in range(0, clients, effort.lot):
        receivers = rig.receive(server, min(effort.lot, clients - first), resume=True)
        server.call("wait_for", connections=receivers.count)
        receivers.cut()
        server.call("wait_for_absence", clients=first + receivers.count)
        receivers.close()
    before = _reading(server)
    server.call("miss", messages=effort.messages, size=SIZE)
    account, heap, size = _reading(server)
    server.close()
    return _Kept(clients, before[0], account, heap if heap is None else heap - before[1], size - before[2])


def _reading(server: Server) -> tuple[Any, Any, int]:
    server.call("rest")
    return server.call("stats").get("queued_bytes"), server.call("heap"), rss(server.pid)


def _report_memory(report: Report, effort: _Effort, name: str, found: list[_Kept]) -> list[list[str]]:
    """Rows of the table, and what wsfast's are judged by."""
    rows = []
    for former, kept in zip([None, *found], found, strict=False):
        further = [None, None, None] if former is None else kept.of_further(former)
        sizes = (each if each is None else each / 1024 for each in (kept.before, kept.account, kept.heap, kept.rss))
        rows.append([name, f"{kept.clients:,}", *map(figure, (*sizes, *further))])
        report.row(what="memory", way=name, messages=effort.messages, further=further, **vars(kept))
    if name == _BY_HAND:
        return rows
    further = found[-1].of_further(found[0])
    for what, size in zip(("as accounted", "of the heap", "of RSS"), further, strict=True):
        if size is not None:
            report.at_most(f"one more client that is away, {what}", size, 512, "bytes")
    a_message = (found[0].account - further[0] * found[0].clients) / effort.messages
    report.note(f"{name}: a message of {SIZE} bytes is kept once, and takes {a_message:.0f} bytes.")
    report.row(what="message", way=name, account=a_message)
    return rows


def _memory(report: Report, rig: Rig, effort: _Effort) -> None:
    rows = []
    for name, numbers in effort.away.items():
        found = [_kept(rig, effort, _KINDS[name], clients) for clients in numbers]
        rows += _report_memory(report, effort, name, found)
    report.table(
        f"{effort.messages:,} messages of {SIZE} bytes for clients that are away: KiB; a further client: bytes",
        ["", "away", "before", "account", "heap", "RSS", "further: account", "further: heap", "further: RSS"],
        rows,
    )


# ---- replay ----------------------------------------------------------------------------------------------------------


class _Returns:
    """Clients of one server that are cut off again and again, and come back.

    Attributes:
        dialled_s: how long all opening handshakes took each time.
    """

    def __init__(self, rig: Rig, kind: str, clients: int) -> None:
        self.clients = clients
        self.dialled_s: list[float] = []
        self._server: Server
        self._receivers: Receivers
        self._server, self._receivers = rig.start(kind, clients, resume=True, **_settings(kind))

    def replay(self, messages: int) -> float:
        """So many messages are missed by each: seconds from the first hello until all have them."""
        server, receivers = self._server, self._receivers
        receivers.cut()
        server.call("wait_for_absence", clients=self.clients)
        server.call("miss", messages=messages, size=SIZE)
        begin_s = time.monotonic()
        receivers.dial()
        self.dialled_s.append(time.monotonic() - begin_s)
        if messages:
            receivers.expect(messages, messages * SIZE, numbered=True)
        server.call("rest")
        begin_ns = receivers.hello()
        end_ns = receivers.welcomed_ns()
        if messages:
            end_ns = receivers.done_ns()
        server.call("work")
        server.call("wait_for", connections=self.clients)
        return (end_ns - begin_ns) / 1e9

    def burst(self, threads: int) -> float:
        """Seconds of a burst to all of them."""
        self._receivers.expect(_BURST, _BURST * SIZE)
        begin_ns, _ = self._server.call("clocked", way="wsfast", size=SIZE, messages=_BURST, threads=threads)
        return (self._receivers.done_ns() - begin_ns) / 1e9

    def threads(self, threads: int) -> None:
        self._server.call("threads", threads=threads)


class _Turns:
    """All figures of the second table, in microseconds of a client for a burst's messages."""

    def __init__(self, rig: Rig, effort: _Effort) -> None:
        self._effort = effort
        self._plain = Servers(rig, effort.replayed, _BURSTS)
        self._ours = _Returns(rig, "sessions", effort.replayed)
        self._by_hand = _Returns(rig, "by_hand", effort.by_hand)
        self.samples = Samples()
        self.took_s: dict[str, list[float]] = {}

    def take(self) -> None:
        effort = self._effort
        for way in _BURSTS:
            bursts = 1 if way == BROADCAST else effort.bursts  # it takes a hundred times as long
            microseconds = median(self._plain.clocked(way, _BURST)[0] for _ in range(bursts))
            self.samples.add(_burst(way), microseconds)
        for way, threads in _THREADS.items():
            seconds = median(self._ours.burst(threads) for _ in range(effort.bursts))
            self.samples.add(_burst(way, "sessions"), seconds * 1e6 / effort.replayed)
        greetings_s = self._ours.replay(0)
        for way, threads in _THREADS.items():
            self._ours.threads(threads)
            self._replay(way, self._ours, greetings_s)
        self._replay(_BY_HAND, self._by_hand, self._by_hand.replay(0))

    def _replay(self, way: str, returns: _Returns, greetings_s: float) -> None:
        seconds = returns.replay(self._effort.messages)
        self.took_s.setdefault(way, []).append(seconds)
        for part, part_s in (("", seconds), (_GREETINGS, greetings_s), (_ONLY, seconds - greetings_s)):
            self.samples.add(_replay(way) + part, part_s * 1e6 / returns.clients * _BURST / self._effort.messages)

    def dialled_us(self) -> float:
        """Of one opening handshake, with others beside it."""
        return median(self._ours.dialled_s) * 1e6 / self._ours.clients


def _burst(way: str, more: str = "") -> str:
    return f"burst, {way}, {more}" if more else f"burst, {way}"


def _replay(way: str) -> str:
    return f"replay, {way}"


def _row(report: Report, samples: Samples, name: str, base: str, clients: int, messages: int) -> list[str]:
    """A row of the table, compared with a burst."""
    is_replay = name + _ONLY in samples
    greetings, only = (samples.median(name + part) if is_replay else None for part in (_GREETINGS, _ONLY))
    whole, to_burst = samples.median(name), samples.ratio(name, base)
    only_to_burst = samples.ratio(name + _ONLY, base) if is_replay else None
    report.row(
        what=name,
        clients=clients,
        messages=messages,
        all_us=whole,
        greetings_us=greetings,
        replay_us=only,
        to_burst=to_burst,
        replay_to_burst=only_to_burst,
    )
    sizes = map(figure, (whole, greetings, only))
    return [name, f"{clients:,}", f"{messages:,}", *sizes, *(_ratio(each) for each in (to_burst, only_to_burst))]


def _ratio(value: float | None) -> str:
    return figure(value, "" if value is None else "x")


def _report_replay(report: Report, effort: _Effort, turns: _Turns) -> None:
    samples, many = turns.samples, effort.replayed
    rows = [_row(report, samples, _burst(way), _burst(_BASES.get(way, WSFAST_1)), many, _BURST) for way in _BURSTS]
    rows += [_row(report, samples, _burst(way, "sessions"), _burst(way), many, _BURST) for way in _THREADS]
    rows += [_row(report, samples, _replay(way), _burst(way), many, effort.messages) for way in _THREADS]
    rows.append(_row(report, samples, _replay(_BY_HAND), _burst(WSFAST_1), effort.by_hand, effort.messages))
    report.table(
        f"{_BURST} messages of {SIZE} bytes to a client: us",
        ["", "clients", "messages", "all", "greetings", "replay", "all to burst", "replay to burst"],
        rows,
    )
    for way in _THREADS:
        for what, part in (("greetings and replay", ""), ("replay", _ONLY)):
            ratio = samples.ratio(_replay(way) + part, _burst(way))
            report.at_most(f"{what} to the burst, {way}", ratio, 1.0, "x")
    took = ", ".join(f"{way} {figure(median(seconds))} s" for way, seconds in turns.took_s.items())
    report.note(
        f"From the first hello until all had read all {effort.messages:,} messages: {took}. The opening handshakes "
        f"before that took {turns.dialled_us():,.0f} us each. The receivers have checked every message: once, in order."
    )


def _run(report: Report) -> None:
    effort = _QUICK if report.quick else _FULL
    with Rig() as rig:
        _memory(report, rig, effort)
        turns = _Turns(rig, effort)
        for _ in range(effort.repetitions):
            turns.take()
    _report_replay(report, effort, turns)


BENCHMARKS = (Benchmark("resume", "what is kept for 10,000 clients that are away, and how soon they have it", _run),)
