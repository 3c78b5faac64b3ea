"""The servers that the benchmarks with sockets measure: ``python -m bench.servers KIND SETTINGS``, told what to do on
standard input; see :mod:`bench.wire`.

``wsfast``: the ``websockets`` library's server with a wsfast manager. On the same live connections it also runs the
floor, ``websockets.broadcast`` and a plain loop, so that these differ in nothing but the way of sending.
``websockets``: that library's server by itself, with its own pings. ``picows``: a server of that library.

``sessions``: as ``wsfast``, with clients that come back. ``by_hand``: the same on ``websockets`` by itself, with a list
of what it has missed for each client.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.asyncio.server import serve as library_serve
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from bench.wire import numbered
from bench.worker import run
from wsfast import Backpressure, ConnectionManager, HealthPolicy, HerdPolicy, SessionPolicy
from wsfast.adapters.websockets import serve

_LIBC = ctypes.CDLL(None)


class _Mallinfo(ctypes.Structure):
    """What the C library's heap says of itself, mallinfo2(3)."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


# In which all clients are that come back.
_GROUP = "all"


def _frame(payload: bytes) -> bytes:
    """What a server sends for a text message (RFC 6455, 5.2), as the floor sends it."""
    if len(payload) < 126:
        return bytes([0x81, len(payload)]) + payload
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


class _Server:
    """What a server is told to do with its ways to send.

    A way is a method that sends so many messages to everybody in one turn of the loop. It returns the seconds that its
    caller waits, and raises unless all connections that read have it, or will.
    """

    def __init__(self, buffer: int) -> None:
        self._buffer = buffer
        self._connections: list[Any] = []
        # The first so many connections do not read.
        self._stopped = 0

    def _add(self, connection: Any, transport: asyncio.BaseTransport) -> None:
        self._connections.append(connection)
        if self._buffer:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)

    async def _read(self, ws: ServerConnection) -> None:
        """Have a connection until it ends, and read what comes."""
        self._add(ws, ws.transport)
        try:
            with contextlib.suppress(ConnectionClosed):
                async for _ in ws:
                    pass
        finally:
            self._connections.remove(ws)

    def _in_transport(self, connection: Any) -> int:
        """Bytes that wait in the transport of a connection."""
        raise NotImplementedError

    def _kept(self) -> dict[str, int]:
        """Bytes that are kept for the connections that do not read, by where they are."""
        return {"in_transports": sum(map(self._in_transport, self._connections[: self._stopped]))}

    async def wait_for(self, connections: int) -> None:
        while len(self._connections) < connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def processor_s(self) -> float:
        """Processor time of this process so far."""
        return time.process_time()

    async def block(self, seconds: float) -> None:
        """Do nothing for so long, and let nobody else do anything."""
        time.sleep(seconds)  # noqa: ASYNC251

    async def open(self) -> int:
        """Connections that have not ended."""
        raise NotImplementedError

    async def stats(self) -> dict[str, int]:
        """What the server counts."""
        return {}

    async def rest(self) -> None:
        """Have the garbage collector off, and no memory that is free: what grows then is seen from outside."""
        gc.collect()
        gc.disable()
        if hasattr(_LIBC, "malloc_trim"):
            _LIBC.malloc_trim(0)
        await asyncio.sleep(0.02)

    async def work(self) -> None:
        """Have the garbage collector on again."""
        gc.enable()

    async def heap(self) -> int | None:
        """Bytes of the C heap that are in use; None where it does not say."""
        if not hasattr(_LIBC, "mallinfo2"):
            return None
        _LIBC.mallinfo2.restype = _Mallinfo
        found = _LIBC.mallinfo2()
        return int(found.uordblks + found.hblkhd)

    async def clocked(self, way: str, **arguments: Any) -> tuple[int, float]:
        """A way with the garbage collector off: the monotonic time of its begin, and what it returns."""
        gc.collect()
        gc.disable()
        try:
            await asyncio.sleep(0.02)  # let the machine come to rest
            begin_ns = time.monotonic_ns()
            return begin_ns, await getattr(self, way)(**arguments)
        finally:
            gc.enable()

    async def stall(self, way: str, seconds: int, **arguments: Any) -> list[float]:
        """Delays in seconds of a timer of 1 ms, while every connection gets a message each second."""
        delays = []
        loop = asyncio.get_running_loop()
        begin = loop.time()

        async def send_each_second() -> None:
            for second in range(seconds):
                await asyncio.sleep(max(0.0, begin + second - loop.time()))
                await getattr(self, way)(messages=1, **arguments)

        sender = asyncio.create_task(send_each_second())
        while not sender.done():
            due = loop.time() + 0.001
            await asyncio.sleep(0.001)
            delays.append(max(0.0, loop.time() - due))
        await sender
        return delays

    async def stream(self, way: str, messages: int, pause_s: float, stopped: int, **arguments: Any) -> dict[str, int]:
        """So many messages, one after the other, while the first connections have *stopped* reading: the monotonic
        time of the begin, and the most that was kept at any time between two of them.
        """
        self._stopped = stopped
        most = self._kept()
        begin_ns = time.monotonic_ns()
        for _ in range(messages):
            await getattr(self, way)(messages=1, **arguments)
            most = {name: max(most[name], size) for name, size in self._kept().items()}
            await asyncio.sleep(pause_s)
        return {"begin_ns": begin_ns, **most}


class WsfastServer(_Server):
    """``websockets`` with a manager."""

    def __init__(
        self,
        floor: str,
        backpressure: dict[str, Any] | None = None,
        health: dict[str, Any] | None = None,
        sessions: dict[str, Any] | None = None,
        herd: dict[str, Any] | None = None,
        port: int = 0,
        buffer: int = 0,
    ) -> None:
        super().__init__(buffer)
        self._port = port
        self._floor = ctypes.CDLL(floor).floor_send
        self._floor.restype = ctypes.c_long
        self._floor.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
        self._fds: Any = None
        self.manager = ConnectionManager(
            backpressure=Backpressure(**(backpressure or {})),
            health=None if health is None else HealthPolicy(**health),
            sessions=SessionPolicy(**(sessions or {})),
            herd=HerdPolicy(**(herd or {})),
        )

    async def start(self) -> int:
        await self.manager.start()
        server = await serve(
            self._handle,
            "127.0.0.1",
            self._port,
            manager=self.manager,
            compression=None,
            ping_interval=None,
            backlog=4096,
        )
        return int(next(iter(server.sockets)).getsockname()[1])

    async def _handle(self, ws: ServerConnection) -> None:
        self._add(ws, ws.transport)
        await ws.wait_closed()

    async def wait_for(self, connections: int) -> None:
        await super().wait_for(connections)
        fds = [ws.transport.get_extra_info("socket").fileno() for ws in self._connections]
        self._fds = (ctypes.c_int * len(fds))(*fds)

    def _in_transport(self, connection: ServerConnection) -> int:
        return connection.transport.get_write_buffer_size()

    def _kept(self) -> dict[str, int]:
        """The manager says what it keeps, and must not say less than what really waits in transports."""
        kept, queued = super()._kept(), self.manager.stats()["queued_bytes"]
        return kept | {"queued": queued, "kept": max(queued, kept["in_transports"])}

    async def stats(self) -> dict[str, int]:
        return self.manager.stats()

    async def open(self) -> int:
        return len(self.manager.registry)

    # ---- ways to send

    async def floor(self, size: int, messages: int, threads: int) -> float:
        data = _frame(b"x" * size) * messages
        reading = len(self._connections) - self._stopped

        def send(first: int, count: int) -> int:
            fds = ctypes.byref(self._fds, first * ctypes.sizeof(ctypes.c_int))
            return int(self._floor(fds, count, data, len(data), threads))

        def run() -> None:
            if self._stopped:
                send(0, self._stopped)  # who does not take it is passed over
            if send(self._stopped, reading) != reading:
                raise RuntimeError("a connection did not take all of it")

        return _timed(run)

    async def plain(self, size: int, messages: int) -> float:
        text = "x" * size

        def run() -> None:
            for _ in range(messages):
                for ws in self._connections:
                    ws.protocol.send_text(text.encode())
                    ws.send_data()

        return _timed(run)

    async def broadcast(self, size: int, messages: int) -> float:
        text = "x" * size

        def run() -> None:
            for _ in range(messages):
                broadcast(self._connections, text)

        return _timed(run)

    async def wsfast(self, size: int, messages: int, threads: int) -> float:
        text = "x" * size
        self.manager.threads = threads
        begin = time.perf_counter()
        for _ in range(messages - 1):
            self.manager.broadcast_nowait(text)
        result = await self.manager.broadcast(text)
        seconds = time.perf_counter() - begin
        if result.sent + result.queued < len(self._connections) - self._stopped:
            raise RuntimeError(f"{result}")
        return seconds


class SessionsServer(WsfastServer):
    """``websockets`` with a manager and clients that come back, all of them in one group.

    What it publishes there while it runs are its own name and the number of the message, from 1 on.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._name = secrets.token_hex(4)
        self._published = 0
        self._publishing: asyncio.Task[None] | None = None

    async def _handle(self, ws: ServerConnection) -> None:
        ws.wsfast.join(_GROUP)  # type: ignore[attr-defined]
        await self._read(ws)

    async def wait_for_absence(self, clients: int) -> None:
        """Until so many are away."""
        while self.manager.stats()["away"] < clients:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def miss(self, messages: int, size: int) -> None:
        """So many numbered messages to the group, of which all are away."""
        for number in range(messages):
            result = self.manager.broadcast_nowait(numbered(number, size), group=_GROUP)
            if result.away != len(self.manager.registry):
                raise RuntimeError(f"{result}")
            if number % 100 == 0:
                await asyncio.sleep(0)

    async def threads(self, threads: int) -> None:
        self.manager.threads = threads

    async def publish(self, every_s: float, size: int) -> str:
        """From now on, a message to the group so often. Returns the name."""

        async def publish() -> None:
            while True:
                self._published += 1
                self.manager.broadcast_nowait(f"{self._name} {self._published} ".ljust(size, "x"), group=_GROUP)
                await asyncio.sleep(every_s)

        self._publishing = asyncio.create_task(publish())
        return self._name

    async def published(self) -> int:
        """Publish nothing more; how many messages there were."""
        if self._publishing is not None:
            self._publishing.cancel()
        return self._published


class WebsocketsServer(_Server):
    """``websockets`` by itself."""

    def __init__(self, floor: str, keepalive: dict[str, Any] | None = None, buffer: int = 0) -> None:
        super().__init__(buffer)
        self._keepalive = keepalive or {}

    async def start(self) -> int:
        server = await library_serve(self._handle, "127.0.0.1", 0, compression=None, backlog=4096, **self._keepalive)
        return int(next(iter(server.sockets)).getsockname()[1])

    async def _handle(self, ws: ServerConnection) -> None:
        self._add(ws, ws.transport)
        try:
            await ws.wait_closed()
        finally:
            self._connections.remove(ws)

    async def open(self) -> int:
        return sum(ws.state is State.OPEN for ws in self._connections)


class ByHandServer(WebsocketsServer):
    """``websockets`` with clients that come back, as it is done by hand: no count, so what was on its way is lost."""

    def __init__(self, floor: str) -> None:
        super().__init__(floor, {"ping_interval": None})
        # What each client has missed that is away, by its token.
        self._missed: dict[str, list[str]] = {}

    async def _handle(self, ws: ServerConnection) -> None:
        missed = self._missed.pop(json.loads(await ws.recv()).get("token"), None)
        token = secrets.token_urlsafe(32)
        await ws.send(json.dumps({"wsfast": "welcome", "token": token, "resumed": missed is not None}))
        for message in missed or ():
            await ws.send(message)
        try:
            await self._read(ws)
        finally:
            self._missed[token] = []

    async def wait_for_absence(self, clients: int) -> None:
        while len(self._missed) < clients:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def miss(self, messages: int, size: int) -> None:
        for number in range(messages):
            message = numbered(number, size)
            for missed in self._missed.values():
                missed.append(message)


class PicowsServer(_Server):
    """``picows`` with a loop over its transports, as in its own example."""

    def __init__(self, floor: str, buffer: int = 0) -> None:
        super().__init__(buffer)

    async def start(self) -> int:
        import picows  # noqa: PLC0415 - this process may be another server

        self._text = picows.WSMsgType.TEXT
        add = self._add

        class Listener(picows.WSListener):  # type: ignore[misc]
            def on_ws_connected(self, transport: Any) -> None:
                add(transport, transport.underlying_transport)

        server = await picows.ws_create_server(lambda _: Listener(), "127.0.0.1", 0, backlog=4096)
        return int(server.sockets[0].getsockname()[1])

    def _in_transport(self, connection: Any) -> int:
        return int(connection.underlying_transport.get_write_buffer_size())

    async def picows(self, size: int, messages: int) -> float:
        message = b"x" * size

        def run() -> None:
            for _ in range(messages):
                for transport in self._connections:
                    transport.send(self._text, message)

        return _timed(run)


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


_KINDS: dict[str, Any] = {
    "wsfast": WsfastServer,
    "sessions": SessionsServer,
    "websockets": WebsocketsServer,
    "by_hand": ByHandServer,
    "picows": PicowsServer,
}


if __name__ == "__main__":
    run(_KINDS)
