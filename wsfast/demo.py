"""``wsfast demo``: a hub in this process, simulated clients in a second one, and what passes between them, live.

The clients are a process of their own (``python -m wsfast demo-clients``) so that they do not share a processor core
and an event loop with the server they measure. Each joins a group of twenty and publishes into it at a steady rate;
each message carries the time it was sent, and since senders and receivers live in the same process, its age on arrival
is an honest latency: through two sockets, the hub, and the clients' own loop.

The two talk over pipes: the clients report one line of JSON per second, and end when their input ends. So they end
also if this process is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from wsfast.errors import WsfastError
from wsfast.hub import Hub, HubSettings

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DemoError", "Figures", "run_clients", "run_demo"]

_GROUP_SIZE = 20
_PAYLOAD = "x" * 64
_REPORT_EVERY_S = 1.0

# A burst of handshakes beyond this would only measure the listen queue.
_CONNECTING_AT_ONCE = 50

# What the clients may take to close their connections before they are killed.
_CLIENTS_GRACE_S = 5.0


class DemoError(WsfastError):
    """The demo cannot go on, with what to tell the user."""


@dataclass
class Figures:
    """What is shown: one second of the hub and of its clients. Rates are per second."""

    connections: int = 0
    messages_in: float = 0.0
    messages_out: float = 0.0
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    delivered: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    server_rss_mib: float = 0.0
    clients_rss_mib: float = 0.0

    def rows(self) -> Iterator[tuple[str, str]]:
        yield "connections", f"{self.connections:,}"
        yield "messages in", f"{self.messages_in:,.0f} /s"
        yield "messages out", f"{self.messages_out:,.0f} /s"
        yield "bytes in", f"{self.bytes_in / 1024:,.0f} KiB/s"
        yield "bytes out", f"{self.bytes_out / 1024:,.0f} KiB/s"
        yield "delivered to clients", f"{self.delivered:,.0f} /s"
        yield "latency p50", f"{self.p50_ms:.2f} ms"
        yield "latency p99", f"{self.p99_ms:.2f} ms"
        yield "memory of the server", f"{self.server_rss_mib:.0f} MiB"
        yield "memory of the clients", f"{self.clients_rss_mib:.0f} MiB"

    def line(self) -> str:
        return "  ".join(f"{name}: {value}" for name, value in self.rows())


async def run_demo(
    *, clients: int, rate: float, port: int, stop: asyncio.Event, show: Callable[[Figures], None]
) -> None:
    """Run hub and clients until *stop* is set, calling *show* every second.

    Raises:
        CannotListen: on this port.
        DemoError: the clients ended by themselves.
    """
    async with Hub(HubSettings(port=port)) as hub, _client_process(hub.url, clients, rate) as process:
        reports = asyncio.create_task(_reports(process, hub, show))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([reports, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not reports.done():
            reports.cancel()
        elif not stop.is_set():
            reports.result()
            raise DemoError("the simulated clients ended unexpectedly")


@contextlib.asynccontextmanager
async def _client_process(url: str, clients: int, rate: float) -> AsyncIterator[asyncio.subprocess.Process]:
    arguments = ["-m", "wsfast", "demo-clients", "--url", url, "--clients", str(clients), "--rate", str(rate)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Out of reach of the terminal's Ctrl-C: it is this process that tells the clients when to end.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.communicate(), _CLIENTS_GRACE_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _reports(process: asyncio.subprocess.Process, hub: Hub, show: Callable[[Figures], None]) -> None:
    """Show figures at every report of the clients, until they send no more."""
    assert process.stdout is not None
    before, before_at = hub.manager.stats(), time.perf_counter()
    while line := await process.stdout.readline():
        now, now_at = hub.manager.stats(), time.perf_counter()
        rates = {
            key: (now[key] - before[key]) / (now_at - before_at)
            for key in ("messages_in", "messages_out", "bytes_in", "bytes_out")
        }
        show(Figures(connections=now["connections"], server_rss_mib=_rss_mib(), **rates, **json.loads(line)))
        before, before_at = now, now_at


def table(figures: Figures) -> Table:
    """The figures as a table for a terminal. Needs rich."""
    from rich.table import Table  # noqa: PLC0415 (the rest of the demo does without rich)

    shown = Table(title="wsfast demo (Ctrl-C ends it)", show_header=False)
    shown.add_column()
    shown.add_column(justify="right", min_width=16)
    for name, value in figures.rows():
        shown.add_row(name, value)
    return shown


@dataclass
class _Crowd:
    """The simulated clients."""

    url: str
    size: int
    rate: float
    connected: list[ClientConnection] = field(default_factory=list)
    delivered: int = 0
    latencies_ns: list[int] = field(default_factory=list)

    async def run(self) -> None:
        gate = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.size):
                tasks.create_task(self._client(number, gate))
            tasks.create_task(self._report())

    async def _client(self, number: int, gate: asyncio.Semaphore) -> None:
        group = f"room:{number // _GROUP_SIZE}"
        async with contextlib.AsyncExitStack() as stack:
            async with gate:
                ws = await stack.enter_async_context(
                    connect(f"{self.url}/?client_id=client-{number}", compression=None, proxy=None)
                )
            await ws.send(json.dumps({"type": "join", "group": group}))
            publisher = asyncio.create_task(self._publish(ws, group, number))
            stack.callback(publisher.cancel)
            await self._receive(ws)

    async def _receive(self, ws: ClientConnection) -> None:
        try:
            async for text in ws:
                message = json.loads(text)
                if message["type"] == "message":
                    self.delivered += 1
                    self.latencies_ns.append(time.monotonic_ns() - message["data"]["sent_ns"])
                elif message["type"] == "error":
                    raise DemoError(message["reason"])
        except ConnectionClosed as closed:
            raise DemoError(f"the hub closed a connection: {closed}") from None

    async def _publish(self, ws: ClientConnection, group: str, number: int) -> None:
        # The clients take turns, so that the load is even and not a burst per second.
        await asyncio.sleep(number / self.size / self.rate)
        with contextlib.suppress(ConnectionClosed):
            while True:
                data = {"sent_ns": time.monotonic_ns(), "text": _PAYLOAD}
                await ws.send(json.dumps({"type": "publish", "group": group, "data": data}))
                await asyncio.sleep(1 / self.rate)

    async def _report(self) -> None:
        started = time.perf_counter()
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            now = time.perf_counter()
            latencies, self.latencies_ns = sorted(self.latencies_ns), []
            delivered, self.delivered = self.delivered, 0
            report = {
                "delivered": delivered / (now - started),
                "p50_ms": _quantile(latencies, 0.50) / 1e6,
                "p99_ms": _quantile(latencies, 0.99) / 1e6,
                "clients_rss_mib": _rss_mib(),
            }
            started = now
            print(json.dumps(report), flush=True)


async def run_clients(url: str, clients: int, rate: float) -> None:
    """Be the simulated clients until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop = asyncio.get_running_loop()
    crowd = asyncio.create_task(_Crowd(url, clients, rate).run())
    # A thread, because not every standard input can be watched by every event loop.
    ended = loop.run_in_executor(None, sys.stdin.read)
    await asyncio.wait([crowd, ended], return_when=asyncio.FIRST_COMPLETED)
    if crowd.done():
        try:
            crowd.result()
        except* (DemoError, OSError) as errors:
            print(f"wsfast demo: {errors.exceptions[0]}", file=sys.stderr)
        # The thread that reads the standard input cannot be stopped, and the interpreter would wait for it.
        os._exit(1)
    crowd.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await crowd


def _quantile(ordered: list[int], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def _rss_mib() -> float:
    """Memory of this process in RAM now; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_show(*, live: Any | None) -> Callable[[Figures], None]:
    """How to show figures: in the given ``rich.live.Live``, or line by line."""
    if live is not None:
        return lambda figures: live.update(table(figures), refresh=True)
    return lambda figures: print(figures.line(), flush=True)
