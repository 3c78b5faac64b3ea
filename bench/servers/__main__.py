"""The servers that the benchmarks with sockets measure: ``python -m bench.servers KIND SETTINGS``, told what to do on
standard input; see :mod:`bench.wire`.

``wsfast``: the ``websockets`` library's server with a wsfast manager. On the same live connections it also runs the
floor and ``websockets.broadcast``, so that these differ in nothing but the way of sending. ``picows``: a server of
that library.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import json
import logging
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection, broadcast

from wsfast import Backpressure, ConnectionManager
from wsfast.adapters.websockets import serve


def _frame(payload: bytes) -> bytes:
    """What a server sends for a text message (RFC 6455, 5.2), as the floor sends it."""
    if len(payload) < 126:
        return bytes([0x81, len(payload)]) + payload
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


class WsfastServer:
    """``websockets`` with a manager."""

    def __init__(
        self, floor: str, threads: int = 2, backpressure: dict[str, Any] | None = None, buffer: int = 0
    ) -> None:
        self._buffer = buffer
        self._floor = ctypes.CDLL(floor).floor_send
        self._floor.restype = ctypes.c_long
        self._floor.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
        self.manager = ConnectionManager(threads=threads, backpressure=Backpressure(**(backpressure or {})))
        self._connections: list[ServerConnection] = []
        self._fds: Any = None

    async def start(self) -> int:
        await self.manager.start()
        server = await serve(
            self._handle, "127.0.0.1", 0, manager=self.manager, compression=None, ping_interval=None, backlog=4096
        )
        return int(next(iter(server.sockets)).getsockname()[1])

    async def _handle(self, ws: ServerConnection) -> None:
        self._connections.append(ws)
        if self._buffer:
            sock = ws.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)
        await ws.wait_closed()

    async def wait_for(self, connections: int) -> None:
        while len(self._connections) < connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        fds = [ws.transport.get_extra_info("socket").fileno() for ws in self._connections]
        self._fds = (ctypes.c_int * len(fds))(*fds)

    # ---- one fan-out each; seconds that the caller of it waits

    async def floor(self, size: int, messages: int, threads: int) -> float:
        data = _frame(b"x" * size) * messages
        count = len(self._connections)

        def run() -> None:
            if self._floor(self._fds, count, data, len(data), threads) != count:
                raise RuntimeError("a connection did not take all of it")

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
        if result.sent != len(self._connections):
            raise RuntimeError(f"{result}")
        return seconds

    # ---- the loop's delay

    async def stall(self, size: int, seconds: float, how: str, threads: int) -> list[float]:
        """Delays in seconds of a timer of 1 ms, while every connection gets a message each second."""
        text, delays = "x" * size, []
        self.manager.threads = threads
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds

        async def send_each_second() -> None:
            for second in range(int(seconds)):
                await asyncio.sleep(max(0.0, end - seconds + second - loop.time()))
                if how == "wsfast":
                    await self.manager.broadcast(text)
                else:
                    for ws in self._connections:
                        ws.protocol.send_text(text.encode())
                        ws.send_data()

        sender = asyncio.create_task(send_each_second())
        while not sender.done():
            due = loop.time() + 0.001
            await asyncio.sleep(0.001)
            delays.append(max(0.0, loop.time() - due))
        await sender
        return delays

    # ---- slow clients

    async def stream(self, size: int, messages: int, pause_s: float) -> dict[str, Any]:
        """So many broadcasts, one after the other; the monotonic time of the start, and what was dropped."""
        text = "x" * size
        begin_ns = time.monotonic_ns()
        for _ in range(messages):
            await self.manager.broadcast(text)
            await asyncio.sleep(pause_s)
        return {"begin_ns": begin_ns, **self.manager.stats()}

    async def stats(self) -> dict[str, int]:
        return self.manager.stats()


class PicowsServer:
    """``picows`` with a loop over its transports, as in its own example."""

    def __init__(self, floor: str) -> None:
        self._transports: list[Any] = []

    async def start(self) -> int:
        import picows  # noqa: PLC0415 - this process may be another server

        self._text = picows.WSMsgType.TEXT
        transports = self._transports

        class Listener(picows.WSListener):  # type: ignore[misc]
            def on_ws_connected(self, transport: Any) -> None:
                transports.append(transport)

        server = await picows.ws_create_server(lambda _: Listener(), "127.0.0.1", 0, backlog=4096)
        return int(server.sockets[0].getsockname()[1])

    async def wait_for(self, connections: int) -> None:
        while len(self._transports) < connections:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def picows(self, size: int, messages: int) -> float:
        message = b"x" * size

        def run() -> None:
            for _ in range(messages):
                for transport in self._transports:
                    transport.send(self._text, message)

        return _timed(run)


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


_KINDS: dict[str, Any] = {"wsfast": WsfastServer, "picows": PicowsServer}


async def _obey(kind: str, settings: dict[str, Any]) -> None:
    server = _KINDS[kind](**settings)
    _say(value=await server.start())
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(functools.partial(asyncio.StreamReaderProtocol, reader), sys.stdin)
    while line := await reader.readline():
        method, arguments = json.loads(line)
        try:
            value = await _call(server, method, arguments)
        except Exception as error:
            _say(error=repr(error))
        else:
            _say(value=value)


async def _call(server: Any, method: str, arguments: dict[str, Any]) -> Any:
    """``clocked`` calls another method with the garbage collector off, and adds the monotonic time of its begin."""
    if method != "clocked":
        return await getattr(server, method)(**arguments)
    gc.collect()
    gc.disable()
    try:
        await asyncio.sleep(0.02)  # let the machine come to rest
        begin_ns = time.monotonic_ns()
        return begin_ns, await getattr(server, arguments.pop("way"))(**arguments)
    finally:
        gc.enable()


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    logging.disable(logging.ERROR)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    loop = settings.pop("loop", "asyncio")
    factory = None
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 - only where it is asked for

        factory = uvloop.new_event_loop
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_obey(kind, settings))


if __name__ == "__main__":
    main()
