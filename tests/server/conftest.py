"""What the tests of the server share: both event loops, both registries, servers and peers on real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import os
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, ClassVar, cast

import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection

from wsfast import ConnectionManager, Event, adapters
from wsfast.adapters import PLAIN, Closed, Framing
from wsfast.adapters.websockets import serve

DEADLINE_S = 10.0

# Whether the tests that find more the longer they run take their time: minutes instead of seconds.
SOAK = os.environ.get("WSFAST_SOAK", "0") != "0"

Handler = Callable[[ServerConnection], Awaitable[None]]


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every asynchronous test here runs on each loop there is."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if importlib.util.find_spec("uvloop") is not None:
        factories["uvloop"] = importlib.import_module("uvloop").new_event_loop
    return factories


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until *condition* holds; fail after a deadline that only a hang can reach."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            # What is waited for happens in a library or in another process: nothing there sets an event.
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"still not true after {DEADLINE_S} s: {what or condition}")


@pytest.fixture(autouse=True)
def no_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are not about health count the frames that come: no pings, unless a manager is told otherwise."""
    monkeypatch.setitem(cast("Any", ConnectionManager.__init__).__kwdefaults__, "health", None)


@pytest.fixture(params=["native", "reference"])
def registry_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def manager(registry_name: str) -> AsyncIterator[ConnectionManager]:
    """A started manager, with each registry in turn. At the end of a test nothing may be left in it."""
    manager = ConnectionManager(registry=registry_name)  # type: ignore[arg-type]
    async with manager:
        yield manager
    assert len(manager.registry) == 0
    stats = manager.stats()
    assert stats["opened"] == stats["closed"]
    assert stats["event_errors"] == 0


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """How the two sides of a connection meet under TLS, with a certificate that signs itself."""
    directory = tmp_path_factory.mktemp("certificate")
    key, cert = directory / "key.pem", directory / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    client_side = ssl.create_default_context(cafile=str(cert))
    client_side.check_hostname = False
    return server_side, client_side


class Seen(list[Event]):
    """The events that a manager published, of some types."""

    def __init__(self, manager: ConnectionManager, *types: type[Event]) -> None:
        super().__init__()
        for event_type in types or (Event,):
            manager.on(event_type, self.append)


@contextlib.asynccontextmanager
async def serving(handler: Handler, manager: ConnectionManager | None = None, **options: Any) -> AsyncIterator[str]:
    """The address of a server on a free port: the library's own, or wsfast's if there is a manager."""
    if manager is not None:
        options["manager"] = manager
    async with serve(handler, "127.0.0.1", 0, **options) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


def client(url: str, **options: Any) -> Any:
    """A connection of the ``websockets`` library, whose limits do not matter here."""
    options.setdefault("proxy", None)
    return websockets.connect(url, max_size=None, **options)


async def received(ws: ClientConnection, count: int) -> list[str | bytes]:
    async with asyncio.timeout(DEADLINE_S):
        return [await ws.recv() for _ in range(count)]


async def close_of(ws: ClientConnection) -> tuple[int | None, str | None]:
    """Wait until *ws* is closed by the other side, and tell how."""
    async with asyncio.timeout(DEADLINE_S):
        await ws.wait_closed()
    return ws.close_code, ws.close_reason


class RawPeer:
    """A WebSocket client that does only what it is told to: no pong, no closing handshake, no reading.

    Its socket is closed after the test if the test does not do so.
    """

    sockets: ClassVar[list[socket.socket]] = []

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    async def connect(
        cls, url: str, path: str = "/", *, extensions: str | None = None, receive_buffer: int | None = None
    ) -> RawPeer:
        """Connect, and do the opening handshake.

        Args:
            url: of the server.
            path: to ask for.
            extensions: to offer.
            receive_buffer: bytes that the kernel keeps for this peer; the kernel's choice by default.
        """
        host, port = url.removeprefix("ws://").rsplit(":", 1)
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        cls.sockets.append(sock)
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await loop.sock_connect(sock, (host, int(port)))
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
        )
        request += "\r\n" if extensions is None else f"Sec-WebSocket-Extensions: {extensions}\r\n\r\n"
        await loop.sock_sendall(sock, request.encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += await loop.sock_recv(sock, 1)
            with contextlib.suppress(BlockingIOError):
                # What follows the handshake stays in the socket.
                come = sock.recv(2**12, socket.MSG_PEEK)
                answer += sock.recv(max(0, (answer + come).find(b"\r\n\r\n") + 4 - len(answer)))
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        return cls(sock)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self, count: int) -> bytes:
        data = b""
        async with asyncio.timeout(DEADLINE_S):
            while len(data) < count:
                more = await asyncio.get_running_loop().sock_recv(self.sock, count - len(data))
                assert more, f"closed after {data!r}"
                data += more
        return data

    async def messages(self, until: Callable[[list[tuple[int, bytes]]], object]) -> list[tuple[int, bytes]]:
        """Opcode and payload of everything that comes, until that is enough or the server ends the connection."""
        parser, come = StrictParser(), []
        async with asyncio.timeout(DEADLINE_S):
            while not until(come):
                data = await asyncio.get_running_loop().sock_recv(self.sock, 2**18)
                if not data:
                    break
                come += parser.feed(data)
        return come

    def reset(self) -> None:
        """Close with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.sock.close()
        with contextlib.suppress(ValueError):
            self.sockets.remove(self.sock)


@pytest.fixture(autouse=True)
def _close_raw_peers() -> Iterator[None]:
    yield
    while RawPeer.sockets:
        RawPeer.sockets.pop().close()


class StrictParser:
    """The receiving half of a client without extensions that forgives nothing (RFC 6455, 5.2 to 5.5)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.fragments: list[bytes] = []
        self.opcode = 0
        self.closed = False

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Opcode and payload of the messages and control frames that are complete now."""
        self.data += data
        messages, at = [], 0
        while (frame := self._frame(at)) is not None:
            fin, opcode, payload, at = frame
            message = self._take(fin, opcode, payload)
            if message is not None:
                messages.append(message)
        del self.data[:at]
        return messages

    def _frame(self, at: int) -> tuple[bool, int, bytes, int] | None:
        data = self.data
        if len(data) < at + 2:
            return None
        first, size, head = data[at], data[at + 1], 2
        assert first & 0x70 == 0, f"reserved bits in {first:#x}"
        assert size < 128, "a server's frame is masked"
        if size >= 126:
            extended = 2 if size == 126 else 8
            head += extended
            if len(data) < at + head:
                return None
            size = int.from_bytes(data[at + 2 : at + head], "big")
            assert size > (125 if extended == 2 else 65535), f"{size} is encoded in {extended} bytes"
        if len(data) < at + head + size:
            return None
        end = at + head + size
        return bool(first & 0x80), first & 15, bytes(data[at + head : end]), end

    def _take(self, fin: bool, opcode: int, payload: bytes) -> tuple[int, bytes] | None:
        assert not self.closed, "a frame after the close frame"
        if opcode >= 8:
            assert fin and len(payload) < 126 and opcode in (8, 9, 10), f"no control frame: {opcode}"
            self.closed = opcode == 8
            return opcode, payload
        if opcode:
            assert opcode < 3, f"unknown opcode {opcode}"
            assert not self.opcode, "a message within a fragmented one"
            self.opcode = opcode
        else:
            assert self.opcode, "a continuation of nothing"
        self.fragments.append(payload)
        if not fin:
            return None
        message = self.opcode, b"".join(self.fragments)
        self.fragments, self.opcode = [], 0
        if message[0] == 1:
            message[1].decode()
        return message


def masked(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    """A client's frame (RFC 6455, 5.2), masked with zeros."""
    first = (0x80 if fin else 0) | opcode
    if len(payload) < 126:
        head = struct.pack("!BB", first, 0x80 | len(payload))
    elif len(payload) < 65536:
        head = struct.pack("!BBH", first, 0x80 | 126, len(payload))
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, len(payload))
    return head + bytes(4) + payload


def unframed(data: bytes) -> list[tuple[int, bytes]]:
    """Opcode and payload of each frame in *data*, which holds whole server frames and nothing else."""
    frames = []
    while data:
        opcode, size, head = data[0], data[1], 2
        assert size < 128, "a server's frame is masked"
        if size == 126:
            size, head = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, head = int.from_bytes(data[2:10], "big"), 10
        assert len(data) >= head + size, "half a frame"
        frames.append((opcode, data[head : head + size]))
        data = data[head + size :]
    return frames


def link_of(manager: ConnectionManager, conn: Any) -> Any:
    """What the core knows of a connection."""
    return manager._delivery._fanout.get(conn)


class FakeLink:
    """A connection of a library that exists only here, to bring about what a real one does rarely.

    Attributes:
        got: messages that it was given, in order.
        in_buffer: bytes that its transport claims to have after a write.
        framing: of its messages; None: only its library can send.
        gate: what the library's own ``send`` waits for.
        sees_pongs: whether its adapter claims to.
        is_reading: whether its transport reads.
        pings: payloads of the pings that its library was asked to send.
        answers: what the library's own ``ping`` waits for.
    """

    def __init__(self, framing: Framing | None = PLAIN) -> None:
        self.got: list[str | bytes] = []
        self.writes = 0
        self.open = True
        self.framing = framing
        self.raises: Exception | None = None
        self.in_buffer = 0
        self.waiting: Any = None
        self.aborted = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.sees_pongs = self.is_reading = True
        self.pings: list[bytes] = []
        self.answers = asyncio.Event()
        self.answers.set()

    def drain(self) -> None:
        """The transport has written everything."""
        self.in_buffer = 0
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.writable()


class FakeAdapter:
    """The adapter of :class:`FakeLink`; implements ``wsfast.adapters.Adapter``."""

    name = "fakes"

    def recognises(self, ws: object) -> bool:
        return isinstance(ws, FakeLink)

    def attach(self, ws: FakeLink, link: Any, lost: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def fileno(self, ws: FakeLink) -> int:
        return -1

    def is_reading(self, ws: FakeLink) -> bool:
        return ws.is_reading

    def sees_pongs(self, ws: FakeLink) -> bool:
        return ws.sees_pongs

    async def ping(self, ws: FakeLink, payload: bytes) -> None:
        ws.pings.append(payload)
        await ws.answers.wait()

    def counts_sent(self, ws: FakeLink) -> bool:
        return False

    def is_open(self, ws: FakeLink) -> bool:
        return ws.open

    def closed(self, ws: FakeLink) -> Closed | None:
        return None if ws.open else Closed(4000, "gone", "peer")

    def remote_address(self, ws: FakeLink) -> str:
        return ""

    def framing(self, ws: FakeLink) -> Framing | None:
        return ws.framing

    def is_fragmenting(self, ws: FakeLink) -> bool:
        return False

    def buffered(self, ws: FakeLink) -> int:
        return ws.in_buffer if ws.waiting is not None else 0

    def keeps_views(self, ws: FakeLink) -> bool:
        return False

    def write(self, ws: FakeLink, data: bytes | memoryview) -> int:
        if ws.raises is not None:
            raise ws.raises
        ws.writes += 1
        for opcode, payload in unframed(data):
            ws.got.append(payload.decode() if opcode & 15 == 1 else payload)
        return ws.in_buffer

    def when_written(self, ws: FakeLink, link: Any) -> None:
        ws.waiting = link

    async def send(self, ws: FakeLink, message: str | bytes) -> None:
        await ws.gate.wait()
        if ws.raises is not None:
            raise ws.raises
        ws.got.append(message)

    async def close(self, ws: FakeLink, code: int, reason: str) -> None:
        ws.open = False
        if ws.waiting is not None:
            raise TimeoutError  # the peer does not read

    def abort(self, ws: FakeLink) -> None:
        ws.open = False
        ws.aborted = True


@pytest.fixture
def fake_links(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make managers accept :class:`FakeLink` for the time of a test."""
    monkeypatch.setattr(adapters, "_registered", [])
    monkeypatch.setattr(adapters, "_by_type", {})
    adapters.register_adapter(FakeAdapter())
    yield
