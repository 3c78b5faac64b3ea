"""5,000 real clients lose their server, or what stands before it, at once: who is back when, and what got lost.

Everything is a process of its own: a server with a manager, clients in four processes, and a proxy in C that carries
their connections. The server publishes numbered messages to the group that all clients are in, before, while, and
after they are away, so each client sees what it loses and what comes twice.

- *The server is killed* (SIGKILL) and started again on the same port. What it kept is gone with it: each client must be
  told ``resumed: false``, once.
- *The proxy is killed* and started again. The server, and what it keeps, survives: each client must be told
  ``resumed: true``, once, and get every message once.

*wsfast* are clients of ``wsfast.client`` with the default policy. *websockets* are those of that library's own
iterator, ``async for ws in connect(...)``, with the same server; it knows nothing of sessions, so what is published
while a client is away is lost to it.

- *99 %*, *all*: seconds from when the server, or the proxy, listened again until so many were connected.
- *attempts*: connections that a client has tried to make. *peak*: most attempts that all have begun within 100 ms, once
  it listened again, to what the server can bear in that time. It is no target here: ``storm`` judges it.
- *lost*, *doubled*: messages of one server, summed over all clients.
- *told*: clients that were told that their session goes on, and that it does not.

All run on the same two cores, and a connection costs its client more than its server. So what the server is told that
it can bear (``HerdPolicy.accept_rate``) is measured first: three quarters of the rate at which half of the clients
connect when they take turns. From that, and from how many clients it usually has, it tells each in its welcome over how
many seconds to spread.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from bench.harness import Benchmark, Report, figure
from bench.ways import SIZE
from bench.wire import Clients, Rig, free_port

_SERVER, _PROXY = "server", "proxy"
_WSFAST, _WEBSOCKETS = "wsfast", "websockets"
_BIN_NS = 100_000_000
_BINS_PER_S = 10
# Of what could be connected per second: the rest is for what the end of a connection costs, and for messages.
_SHARE = 0.75
# Connections that are made at the same time in each process where nothing has happened yet.
_AT_ONCE = 25
_CASES = ((_WSFAST, _SERVER), (_WSFAST, _PROXY), (_WEBSOCKETS, _PROXY))


@dataclass(frozen=True)
class _Effort:
    """How much.

    Attributes:
        clients, processes: of clients.
        publish_every_s: between two messages to everybody.
        settle_s: for how long all are connected, before anything happens and after they are back.
        away_s: between the kill and the start.
        patience_s: who is not back after so long, and twice the time that it takes to let all in, is not waited for.
    """

    clients: int
    processes: int
    publish_every_s: float
    settle_s: float
    away_s: float
    patience_s: float


_FULL = _Effort(5_000, 4, 1.0, settle_s=3.0, away_s=3.0, patience_s=30.0)
_QUICK = _Effort(40, 2, 0.02, settle_s=0.2, away_s=0.3, patience_s=20.0)


@dataclass(frozen=True)
class _Outcome:
    """What became of it.

    Attributes:
        connected_s: how long all took to connect for the first time.
        back_s: of those who are back, seconds since the return, in order.
        attempts: in all.
        peak: most within 100 ms, since the return.
        book: sums over all clients: see ``bench.clients``.
    """

    connected_s: float
    back_s: list[float]
    attempts: int
    peak: int
    book: Counter[str]

    def until_s(self, count: int) -> float | None:
        """When so many were back; None: never."""
        return self.back_s[count - 1] if len(self.back_s) >= count else None


def _accept_rate(rig: Rig, effort: _Effort) -> float:
    """Connections per second that are to be made, here and now."""
    server = rig.serve("sessions", health={})
    clients = effort.clients // 2
    herds = _connect(rig, effort, _WSFAST, server.port, clients, is_quick=False)
    connected_s = max(_all(herds, "connect"))
    for process in (*herds, server):
        process.close()
    return clients / connected_s * _SHARE


def _connect(rig: Rig, effort: _Effort, kind: str, port: int, clients: int, is_quick: bool) -> list[Clients]:
    settings = {"url": f"ws://127.0.0.1:{port}", "count": clients // effort.processes, "is_quick": is_quick}
    return [rig.connect(kind, at_once=_AT_ONCE, **settings) for _ in range(effort.processes)]


def _play(rig: Rig, effort: _Effort, accept_rate: float, kind: str, killed: str, is_quick: bool) -> _Outcome:
    port = free_port()
    settings = {"port": port, "health": {}, "herd": {"accept_rate": accept_rate, "expected": effort.clients}}
    server = rig.serve("sessions", **settings)
    proxy = rig.proxy(free_port(), port) if killed == _PROXY else None
    herds = _connect(rig, effort, kind, port if proxy is None else proxy.port, effort.clients, is_quick)
    connected_s = max(_all(herds, "connect"))
    server.call("wait_for", connections=effort.clients)
    name = server.call("publish", every_s=effort.publish_every_s, size=SIZE)
    time.sleep(effort.settle_s)
    _all(herds, "reached", server=name, number=1, timeout_s=effort.patience_s)
    _all(herds, "forget")

    killed_ns = time.monotonic_ns()
    if proxy is None:
        server.close()
        time.sleep(effort.away_s)
        server = rig.serve("sessions", **settings)
        name = server.call("publish", every_s=effort.publish_every_s, size=SIZE)
    else:
        proxy.close()
        time.sleep(effort.away_s)
        proxy = rig.proxy(proxy.port, port)
    returned_ns = time.monotonic_ns()

    spread_s = effort.clients / accept_rate
    _all(herds, "back", since_ns=killed_ns, timeout_s=effort.patience_s + 2 * spread_s)
    time.sleep(effort.settle_s)
    last = {"server": name, "number": server.call("published")}
    _all(herds, "reached", **last, timeout_s=effort.patience_s / 4)
    books = _all(herds, "book", **last)
    for process in (*herds, server, *([] if proxy is None else [proxy])):
        process.close()
    return _outcome(connected_s, books, killed_ns, returned_ns)


def _all(herds: list[Clients], method: str, **arguments: Any) -> list[Any]:
    """Have all of them do it at the same time."""
    for herd in herds:
        herd.begin(method, **arguments)
    return [herd.answer() for herd in herds]


def _outcome(connected_s: float, books: list[dict[str, Any]], killed_ns: int, returned_ns: int) -> _Outcome:
    back_ns = sorted(ns for book in books for ns in book.pop("back_ns") if ns > killed_ns)
    attempts_ns = [ns for book in books for ns in book.pop("attempts_ns")]
    bins = Counter((ns - returned_ns) // _BIN_NS for ns in attempts_ns if ns >= returned_ns)
    book = sum(map(Counter, books), Counter())
    return _Outcome(
        connected_s,
        [(ns - returned_ns) / 1e9 for ns in back_ns],
        len(attempts_ns),
        max(bins.values(), default=0),
        book,
    )


def _show(report: Report, effort: _Effort, accept_rate: float, kind: str, killed: str, outcome: _Outcome) -> list[str]:
    """A row of the table, and what wsfast's are judged by."""
    clients, book, back = effort.clients, outcome.book, len(outcome.back_s)
    lost = book["lost"] + book["missing"]
    most_s, all_s = outcome.until_s(clients * 99 // 100), outcome.until_s(clients)
    name = f"{kind}, {killed} killed"
    if kind == _WSFAST:
        told = book["resumed"] if killed == _PROXY else book["not_resumed"]
        what = "true" if killed == _PROXY else "false"
        judged = [
            ("back", back, clients),
            (f"told resumed: {what}", told, clients),
            ("told anything else, or nothing", book["resumed"] + book["not_resumed"] - told + book["untold"], 0),
            ("messages lost", lost, 0),
            ("messages doubled", book["doubled"], 0),
        ]
        for what, value, target in judged:
            (report.at_least if target else report.at_most)(f"{killed} killed: {what}", value, target, "")
        if report.quick and any(value != target for _, value, target in judged):
            raise AssertionError(f"{name}: {judged}")
    report.row(
        kind=kind,
        killed=killed,
        clients=clients,
        back=back,
        connected_s=outcome.connected_s,
        most_s=most_s,
        all_s=all_s,
        attempts=outcome.attempts,
        peak=outcome.peak,
        accept_rate=accept_rate,
        lost=lost,
        **{each: book[each] for each in ("doubled", "resumed", "not_resumed", "untold")},
    )
    told = (f"{book['resumed']:,}", f"{book['not_resumed']:,}") if kind == _WSFAST else ("-", "-")
    return [
        name,
        *(f"{count:,}" for count in (clients, back)),
        *map(figure, (most_s, all_s, outcome.attempts / clients)),
        figure(outcome.peak * _BINS_PER_S / accept_rate, "x"),
        *(f"{count:,}" for count in (lost, book["doubled"])),
        *told,
    ]


def _run(report: Report) -> None:
    effort = _QUICK if report.quick else _FULL
    with Rig() as rig:
        accept_rate = _accept_rate(rig, effort)
        outcomes = {case: _play(rig, effort, accept_rate, *case, report.quick) for case in _CASES}
    rows = [_show(report, effort, accept_rate, *case, outcome) for case, outcome in outcomes.items()]
    report.table(
        f"{effort.clients:,} clients lose their connections at once; {effort.away_s:g} s later they can have new ones",
        ["", "clients", "back", "99 %: s", "all: s", "attempts", "peak", "lost", "doubled", "told true", "told false"],
        rows,
    )
    first = ", ".join(f"{outcome.connected_s:.1f} s" for outcome in outcomes.values())
    report.note(
        f"The server was told that it can bear {accept_rate:,.0f} new connections per second. It took {first} until "
        "all were connected for the first time."
    )


BENCHMARKS = (Benchmark("storm-live", "5,000 real clients whose server, or proxy, is killed and comes back", _run),)
