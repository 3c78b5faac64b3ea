"""Clients that come back and keep book of what they get: ``python -m bench.clients KIND SETTINGS``, told what to do on
standard input; see :mod:`bench.wire`.

``wsfast``: ``wsfast.client.connect``. ``websockets``: ``async for ws in connect(...)`` of that library.

They read what ``SessionsServer`` publishes. Each message has the server's name and its number there, so that a client
sees for itself what it has lost, and what it has got twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Generator
from typing import Any

import websockets
from websockets.asyncio.client import connect as library_connect
from websockets.client import backoff

from bench.worker import run
from wsfast.client import Connected, Connecting, State, connect
from wsfast.reconnect import RECONNECT, FullJitter, ReconnectPolicy


class _Client:
    """One client.

    Attributes:
        server, number: of the last message that it has got.
        lost, doubled: messages of one server that did not come, and that came again.
        resumed, not_resumed: how often it was told that it was back as the one it was, and that it was not.
        untold: how often another server's messages came without that.
        attempts_ns, back_ns: when it has tried to connect, and when it was connected last.
        was_connected: is set with the first connection.
    """

    def __init__(self) -> None:
        self.server = ""
        self.number = self.lost = self.doubled = self.resumed = self.not_resumed = self.untold = 0
        self.attempts_ns: list[int] = []
        self.back_ns = 0
        self.is_connected = False
        self.was_connected = asyncio.Event()
        self._may_be_another = True

    async def live(self, url: str, is_quick: bool) -> None:
        """Connect, again and again, and read."""
        raise NotImplementedError

    def tries(self) -> None:
        self.attempts_ns.append(time.monotonic_ns())

    def connected(self) -> None:
        self.back_ns = time.monotonic_ns()
        self.is_connected = True
        self.was_connected.set()

    def told(self, resumed: bool) -> None:
        """Whether what comes now goes on from what came before."""
        self._may_be_another = not resumed
        if resumed:
            self.resumed += 1
        else:
            self.not_resumed += 1

    def take(self, message: Any) -> None:
        server, number, _ = message.split(" ", 2)
        number = int(number)
        if server != self.server:
            self.untold += not self._may_be_another
            self.server = server
        elif number <= self.number:
            self.doubled += 1
            return
        else:
            self.lost += number - self.number - 1
        self._may_be_another = False
        self.number = number


class _WsfastClient(_Client):
    async def live(self, url: str, is_quick: bool) -> None:
        options = {"policy": _in_a_hurry()} if is_quick else {}
        async with connect(url, proxy=None, on_state=self._on_state, **options) as client:
            async for message in client:
                self.take(message)

    def _on_state(self, state: State) -> None:
        self.is_connected = False
        if isinstance(state, Connecting):
            self.tries()
        elif isinstance(state, Connected):
            if state.resumed is not None:
                self.told(state.resumed)
            self.connected()


class _WebsocketsClient(_Client):
    async def live(self, url: str, is_quick: bool) -> None:
        options = {"reconnect_delays": _soon} if is_quick else {}
        async for ws in _Noting(self, url, proxy=None, **options):
            self.connected()
            with contextlib.suppress(websockets.ConnectionClosed):
                async for message in ws:
                    self.take(message)
            self.is_connected = False


class _Noting(library_connect):
    """Notes when it tries."""

    def __init__(self, client: _Client, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._client = client

    def __await__(self) -> Generator[Any, None, Any]:
        self._client.tries()
        return super().__await__()


def _in_a_hurry() -> ReconnectPolicy:
    """The default policy with waits of less than a second, whatever the server tells."""
    quick = ReconnectPolicy.only(FullJitter(0.1, cap_s=0.5))
    return dataclasses.replace(quick, most_told_s=0.5, lasting_s=RECONNECT.lasting_s)


def _soon() -> Generator[float]:
    """The library's delays with the same."""
    return backoff(0.1, 0.1, 0.5)


class _Clients:
    """So many clients in this process.

    Args:
        kind: of client.
        url: of the server.
        count: of clients.
        at_once: that make their first connection at the same time.
        is_quick: they wait for less than a second between attempts.
    """

    def __init__(self, kind: type[_Client], url: str, count: int, at_once: int, is_quick: bool) -> None:
        self._clients = [kind() for _ in range(count)]
        self._url = url
        self._at_once = at_once
        self._is_quick = is_quick
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Nothing is connected yet."""

    async def connect(self) -> float:
        """All connect for the first time. How many seconds that took."""
        begin_s = time.monotonic()
        places = asyncio.Semaphore(self._at_once)

        async def begin(client: _Client) -> None:
            async with places:
                self._tasks.append(asyncio.create_task(client.live(self._url, self._is_quick)))
                await client.was_connected.wait()

        await asyncio.gather(*map(begin, self._clients))
        return time.monotonic() - begin_s

    async def forget(self) -> None:
        """The attempts so far."""
        for client in self._clients:
            client.attempts_ns.clear()

    async def back(self, since_ns: int, timeout_s: float) -> None:
        """Wait until all have been connected anew since then, or for so long."""
        await self._until(lambda client: client.is_connected and client.back_ns > since_ns, timeout_s)

    async def reached(self, server: str, number: int, timeout_s: float) -> None:
        """Wait until all have a message of this server with this number, or for so long."""
        await self._until(lambda client: client.server == server and client.number >= number, timeout_s)

    async def _until(self, condition: Any, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(map(condition, self._clients)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        for task in self._tasks:
            if task.done():
                task.result()
                raise RuntimeError("a client has ended by itself")

    async def book(self, server: str, number: int) -> dict[str, Any]:
        """What there is to tell of all, in sums. number: of the last message of a server. What clients lack up to there
        that have got any of that server's is ``missing``.
        """
        clients = self._clients
        names = ("lost", "doubled", "resumed", "not_resumed", "untold")
        return {
            **{name: sum(getattr(client, name) for client in clients) for name in names},
            "missing": sum(number - client.number for client in clients if client.server == server),
            "back_ns": [client.back_ns for client in clients if client.is_connected],
            "attempts_ns": [ns for client in clients for ns in client.attempts_ns],
        }


def _clients_of(kind: type[_Client]) -> Any:
    return lambda **settings: _Clients(kind, **settings)


if __name__ == "__main__":
    run({"wsfast": _clients_of(_WsfastClient), "websockets": _clients_of(_WebsocketsClient)})
