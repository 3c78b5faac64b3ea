"""The client that comes back: on real sockets, against servers that break, refuse, lie and say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed as LinkClosed
from websockets.exceptions import InvalidProxy, InvalidURI
from websockets.http11 import Request, Response
from websockets.protocol import CLOSING
from websockets.utils import accept_key

from tests.server.conftest import DEADLINE_S, Handler, serving, until
from wsfast import ConnectionManager
from wsfast.client import Client, Closed, Connected, Connecting, QueuePolicy, State, Waiting, connect
from wsfast.errors import ClientClosed, InvalidSetting, QueueFull
from wsfast.reconnect import FixedInterval, FullJitter, ReconnectHistory, ReconnectPolicy, RetryBudget
from wsfast.session import PROTOCOL, Session, SessionPolicy, Sessions, Welcome, is_ready, read_hello, split_subprotocol

# No test waits for long: each kind of wait is told by the state that comes before it.
SOON = replace(
    ReconnectPolicy.only(FullJitter(base_s=0.001, cap_s=0.01)),
    delay_least_s=0.011,  # longer than any wait of the strategy
    delay_most_s=0.021,
    hurry_s=0.001,
    least_told_s=0.001,
)
NEVER = ReconnectPolicy.only(FixedInterval(1e6, max_attempts=None))

Data = str | bytes
S = TypeVar("S", Connecting, Connected, Waiting, Closed)


class States(list[State]):
    """What a client told, for ``on_state``."""

    def __call__(self, state: State) -> None:
        self.append(state)

    def of(self, kind: type[S]) -> list[S]:
        return [state for state in self if isinstance(state, kind)]


def connecting(url: Any, **options: Any) -> Client:
    """A client that makes no use of the proxies of the machine that the tests run on, and comes back soon."""
    return connect(url, **({"proxy": None, "policy": SOON} | options))


async def connected(client: Client, states: States, times: int) -> None:
    """Wait until a client has been connected so often, and has nothing queued left to send."""
    await until(lambda: len(states.of(Connected)) >= times and client._open is not None)


async def taken(client: Client, count: int) -> list[Data]:
    async with asyncio.timeout(DEADLINE_S):
        return [await client.recv() for _ in range(count)]


async def rest(client: Client) -> list[Data]:
    async with asyncio.timeout(DEADLINE_S):
        return [message async for message in client]


class Door:
    """The url of a server, which a client has to wait for while the door is closed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._is_open = asyncio.Event()
        self._is_open.set()

    async def __call__(self) -> str:
        await self._is_open.wait()
        return self.url

    @contextlib.asynccontextmanager
    async def closed(self, client: Client) -> AsyncIterator[None]:
        """Cut the client off, and keep it away."""
        self._is_open.clear()
        assert client._open is not None
        client._open.transport.abort()
        await until(lambda: isinstance(client.state, Connecting))
        yield
        self._is_open.set()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """After a test, no client has a task or a socket."""
    yield
    assert not tasks_of_clients()


def tasks_of_clients() -> list[Any]:
    """Tasks of a client, and those of the library on its side. (Servers here have no keepalive.)"""
    theirs = ("wsfast/client.py", "websockets/asyncio/client.py", "websockets/asyncio/connection.py")
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    return [coro for coro in coroutines if coro.cr_code.co_filename.replace("\\", "/").endswith(theirs)]  # type: ignore[union-attr]


@contextlib.asynccontextmanager
async def plain(handler: Handler, **options: Any) -> AsyncIterator[str]:
    async with serving(handler, **({"ping_interval": None, "close_timeout": 0.2} | options)) as url:
        yield url


async def echo(ws: ServerConnection) -> None:
    async for message in ws:
        await ws.send(message)


class Peer:
    """What a server knows of one client: what it sends to it, what it was given, and where it is."""

    def __init__(self, session: Session, client_id: str) -> None:
        self.session = session
        self.client_id = client_id
        self.log: list[Data] = []
        self.got: list[Data] = []
        self.ws: ServerConnection | None = None
        self.more = asyncio.Event()

    def say(self, *messages: Data) -> None:
        self.log += messages
        self.more.set()


class Backend:
    """A server that speaks the protocol of resume, keeps everything, and breaks connections where it is told to.

    Attributes:
        at: called at each step of a connection, with "hello", "welcome", "ready" or "message".
        peers: one for each session, from the first to the last.
        spread_s: to tell.
    """

    def __init__(self) -> None:
        self.forget()
        self.peers: list[Peer] = []
        self.connections = 0
        self.spread_s: float | None = None
        self.at: Callable[[str, ServerConnection], object] = lambda step, ws: None

    def forget(self) -> None:
        """As after a restart."""
        self.sessions = Sessions(SessionPolicy(), secrets.token_bytes)

    @property
    def peer(self) -> Peer:
        return self.peers[-1]

    def cut(self, step: str, times: int = 1) -> None:
        """Cut the next connections off at a step."""

        def at(reached: str, ws: ServerConnection) -> None:
            nonlocal times
            if reached == step and times:
                times -= 1
                ws.transport.abort()

        self.at = at

    @contextlib.asynccontextmanager
    async def serving(self, names: tuple[str, ...] = (PROTOCOL,), **options: Any) -> AsyncIterator[str]:
        async with plain(self.handle, subprotocols=names, **options) as url:
            yield url

    async def handle(self, ws: ServerConnection) -> None:
        assert split_subprotocol(ws.subprotocol)[0]
        self.connections += 1
        with contextlib.suppress(LinkClosed):
            await self._handle(ws)

    async def _handle(self, ws: ServerConnection) -> None:
        hello = read_hello(await ws.recv())
        self.at("hello", ws)
        found = None if hello.token is None else self.sessions.find(hello.token, 0.0)
        if found is None:
            peer = Peer(self.sessions.begin(0.0), f"client-{len(self.peers)}")
            peer.session.owner = peer
            self.peers.append(peer)
        else:
            peer = found.owner
            self.sessions.resume(found)
        former, peer.ws = peer.ws, ws
        if former is not None:
            former.transport.abort()
        at = hello.received if found is not None else 0
        assert at <= len(peer.log)
        token, counted = peer.session.token, peer.session.received
        welcome = Welcome(peer.client_id, token, found is not None, counted, 180.0, self.spread_s)
        await ws.send(str(welcome))
        self.at("welcome", ws)
        writing = asyncio.create_task(self._write(ws, peer, at))
        try:
            assert is_ready(await ws.recv())
            peer.session.confirm()
            self.at("ready", ws)
            if ws.transport.is_closing():
                return
            async for message in ws:
                if peer.ws is not ws:
                    return
                peer.got.append(message)
                peer.session.took()
                self.at("message", ws)
                if ws.transport.is_closing():
                    return  # what the library has read is lost with the connection
            self.sessions.end(peer.session)
        finally:
            writing.cancel()
            if peer.ws is ws:
                peer.ws = None

    async def _write(self, ws: ServerConnection, peer: Peer, at: int) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                while at < len(peer.log):
                    await ws.send(peer.log[at])
                    at += 1
                peer.more.clear()
                await peer.more.wait()


class Wire:
    """A TCP proxy. Its connections are cut off when so many bytes have passed, both ways together."""

    def __init__(self, url: str, most_bytes: Callable[[], int] | None) -> None:
        self.port = int(url.rsplit(":", 1)[1])
        self.most_bytes = most_bytes
        self.cuts = 0

    @contextlib.asynccontextmanager
    async def spanned(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        try:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.most_bytes() if self.most_bytes is not None else 2**62
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal left
            while left > 0 and (data := await source.read(2**16)):
                data, left = data[:left], left - len(data)
                sink.write(data)
                await sink.drain()

        pumps = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self.cuts += left <= 0
        for end in (writer, far_writer):
            # With what has passed, or without some of it: both happen.
            end.close() if left % 2 else end.transport.abort()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


# ---- servers that know nothing of it ---------------------------------------------------------------------------------


async def test_a_plain_server_is_served_as_ever() -> None:
    states = States()
    async with plain(echo) as url, connecting(url, on_state=states) as client:
        assert client.state == Connected(None, None)
        await client.send("text")
        with pytest.raises(UnicodeEncodeError):
            await client.send("\ud800")
        await client.send(b"binary")
        assert await taken(client, 2) == ["text", b"binary"]
        assert (client.client_id, client.subprotocol, client.queued) == (None, None, 0)
    assert states == [Connecting(0), Connected(None, None), Closed("closed", 1000, "")]
    assert await rest(client) == []


async def test_a_plain_server_that_breaks_is_found_again() -> None:
    async def once(ws: ServerConnection) -> None:
        await ws.send(await ws.recv())
        ws.transport.abort()

    states = States()
    async with plain(once) as url, connecting(url, on_state=states) as client:
        for number in range(5):
            await client.send(f"{number}")
            assert await taken(client, 1) == [f"{number}"]
            # What is sent into a connection that is breaking is gone: wait for the next.
            await connected(client, states, number + 2)
    assert set(states.of(Connected)) == {Connected(None, None)}
    assert {state.code for state in states.of(Waiting)} == {1006}


@pytest.mark.parametrize(
    ("known", "resume", "chosen", "speaks"),
    [
        (("wsfast.1+chat", "chat"), True, "chat", True),
        (("other", "chat"), True, "chat", False),
        (("wsfast.1+chat", "chat"), False, "chat", False),
        (None, True, None, False),
    ],
)
async def test_the_subprotocol_of_the_application(
    known: tuple[str, ...] | None, resume: bool, chosen: str | None, speaks: bool
) -> None:
    backend, offered = Backend(), []

    async def handle(ws: ServerConnection) -> None:
        offered.append(ws.request.headers.get_all("Sec-WebSocket-Protocol"))
        await (backend.handle(ws) if speaks else echo(ws))

    async with (
        plain(handle, subprotocols=known) as url,
        connecting(url, subprotocols=["chat", "talk"], resume=resume) as client,
    ):
        assert client.subprotocol == chosen
        assert client.client_id == ("client-0" if speaks else None)
    assert offered == [["wsfast.1+chat, wsfast.1+talk, chat, talk" if resume else "chat, talk"]]


async def test_a_server_that_is_not_up_yet_is_waited_for() -> None:
    port, states = free_port(), States()
    client = connecting(f"ws://127.0.0.1:{port}", on_state=states)
    starting = asyncio.create_task(client.start())
    await until(lambda: len(states.of(Waiting)) > 2)
    assert {(state.code, state.because) for state in states.of(Waiting)} == {(1006, "strategy")}
    assert not starting.done()
    async with asyncio.timeout(DEADLINE_S), _serving_at(port, echo):
        assert await starting is client
        await client.send("at last")
        assert await client.recv() == "at last"
        await client.close()
    assert [type(state) for state in states[:4]] == [Connecting, Waiting, Connecting, Waiting]


@contextlib.asynccontextmanager
async def _serving_at(port: int, handler: Handler, **options: Any) -> AsyncIterator[None]:
    async with serve(handler, "127.0.0.1", port, ping_interval=None, **options):
        yield


async def test_to_begin_without_waiting() -> None:
    port = free_port()
    async with connecting(f"ws://127.0.0.1:{port}", wait_connected=False) as client:
        await client.send("early")
        assert client.queued == 1
        backend = Backend()
        async with _serving_at(port, backend.handle, subprotocols=[PROTOCOL]):
            await until(lambda: backend.peers and backend.peer.got == ["early"])
            await client.close()
    assert client.state == Closed("closed", 1000, "")


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["hello", "welcome", "ready", "message"])
@pytest.mark.parametrize("times", [1, 3])
async def test_cut_at_each_step_nothing_is_missed_or_doubled(step: str, times: int) -> None:
    backend, states = Backend(), States()
    async with backend.serving() as url, connecting(url, on_state=states) as client:
        backend.peer.say("s0", "s1")
        await client.send("c0")
        assert await taken(client, 2) == ["s0", "s1"]
        await until(lambda: backend.peer.got == ["c0"])

        backend.cut(step, times)
        if step != "message":
            assert backend.peer.ws is not None
            backend.peer.ws.transport.abort()
        for number in range(1, 6):
            await client.send(f"c{number}")
            backend.peer.say(f"s{number + 1}")
        assert await taken(client, 5) == [f"s{number}" for number in range(2, 7)]
        await until(lambda: len(backend.peer.got) >= 6)
        assert backend.peer.got == [f"c{number}" for number in range(6)]
        assert backend.peer.session.token == client._session.token
    first, *others = states.of(Connected)
    assert first == Connected("client-0", None)
    # A connection that is cut before the welcome is no connection.
    assert len(others) == (1 if step == "hello" else times + (step != "message"))
    assert {(state.client_id, state.resumed, state.lost, state.unconfirmed) for state in others} == {
        ("client-0", True, 0, 0)
    }
    assert len(backend.peers) == 1
    assert len(backend.sessions) == 0  # 1000 has ended it


async def test_the_first_welcome_is_lost() -> None:
    backend, states = Backend(), States()
    backend.cut("hello", 2)
    async with backend.serving() as url, connecting(url, on_state=states) as client:
        # Nobody knew of the first sessions: they are none of the application's.
        assert client.state == Connected("client-2", None)
    assert len(states.of(Waiting)) == 2


async def test_a_welcome_that_is_lost_leaves_the_old_token_good() -> None:
    backend = Backend()
    async with backend.serving() as url, connecting(url) as client:
        tokens = [client._session.token]
        backend.cut("hello")
        assert backend.peer.ws is not None
        backend.peer.ws.transport.abort()
        await until(lambda: backend.connections == 3 and client._open is not None)
        tokens.append(client._session.token)
        assert None not in tokens and len(set(tokens)) == 2
        assert backend.peer.client_id == client.client_id == "client-0"


@pytest.mark.parametrize("seed", range(6))
async def test_cut_anywhere_each_message_comes_once(seed: int) -> None:
    rng, count, states = Random(seed), 300, States()
    backend = Backend()

    def answer(step: str, ws: ServerConnection) -> None:
        if step == "message":
            backend.peer.say(*(f"s{len(backend.peer.log) + more}" for more in range(rng.choice([0, 0, 1, 3]))))

    backend.at = answer
    async with backend.serving() as url:
        wire = Wire(url, lambda: rng.randrange(2500))
        async with wire.spanned() as broken, connecting(broken, on_state=states) as client:
            # The welcome may have been lost a few times: then there are sessions before this one.
            assert client.client_id == backend.peer.client_id
            backend.peer.say("s0")
            for number in range(count):
                await client.send(f"c{number}" * rng.choice([1, 1, 20]))
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            await until(lambda: len(backend.peer.got) >= count, "all have come")
            wire.most_bytes = None
            backend.peer.say("the end")
            come = await taken(client, len(backend.peer.log))
        assert come == backend.peer.log
        assert [str(message).split("c")[1] for message in backend.peer.got] == [str(number) for number in range(count)]
    assert wire.cuts > 3
    assert {(state.resumed, state.lost, state.unconfirmed) for state in states.of(Connected)[1:]} <= {(True, 0, 0)}


@pytest.mark.parametrize("seed", range(4))
async def test_cut_anywhere_a_server_of_wsfast_and_its_client_miss_nothing(seed: int) -> None:
    rng, count, states = Random(seed), 300, States()
    given: list[Data] = []

    async def handle(ws: Any) -> None:
        conn = ws.wsfast
        async for message in ws:
            given.append(message)
            manager.broadcast_nowait(f"re: {message}", to=conn)

    async with ConnectionManager(health=None) as manager, serving(handle, manager) as url:
        # More passes than three of its connections let through.
        wire = Wire(url, lambda: rng.randrange(1800))
        async with wire.spanned() as broken, connecting(broken, on_state=states) as client:
            for number in range(count):
                await client.send(f"{number}")
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            # Whether the close frame gets through such a wire, nobody knows.
            answers = await taken(client, count)
    assert given == [f"{number}" for number in range(count)]
    assert answers == [f"re: {number}" for number in range(count)]
    assert wire.cuts > 1
    assert {(state.resumed, state.lost, state.unconfirmed) for state in states.of(Connected)[1:]} == {(True, 0, 0)}


async def test_a_server_that_has_forgotten_says_so() -> None:
    backend, states = Backend(), States()
    async with backend.serving() as url, connecting(door := Door(url), on_state=states) as client:
        await client.send("may have come")
        backend.peer.say("old")
        await taken(client, 1)
        (old,) = backend.peers
        async with door.closed(client):
            backend.forget()
            await client.send("never sent")
        await until(lambda: len(backend.peers) > 1 and backend.peer.got == ["never sent"])
        backend.peer.say("new")
        assert await taken(client, 1) == ["new"]
        assert client.client_id == backend.peer.client_id != old.client_id
    assert states.of(Connected)[1:] == [Connected(backend.peer.client_id, False, 0, 0, unconfirmed=1)]


async def test_a_server_that_does_not_speak_it_any_more() -> None:
    backend, states = Backend(), States()
    speaks = True

    async def handle(ws: ServerConnection) -> None:
        await (backend.handle(ws) if speaks else echo(ws))

    def choose(ws: ServerConnection, names: Any) -> Any:
        return PROTOCOL if speaks else None

    async with plain(handle, select_subprotocol=choose) as url, connecting(url, on_state=states) as client:
        await client.send("may have come")
        await until(lambda: backend.peer.got)
        for times, speaks in enumerate((False, False, True), 2):  # noqa: B007 - the server looks at it
            assert client._open is not None
            client._open.transport.abort()
            await connected(client, states, times)
    assert [(state.resumed, state.unconfirmed) for state in states.of(Connected)] == [
        (None, 0),
        (False, 1),
        (None, 0),
        (None, 0),
    ]


async def test_a_connection_without_a_session_is_not_counted() -> None:
    states = States()

    async def handle(ws: ServerConnection) -> None:
        assert read_hello(await ws.recv()).token is None
        await ws.send(str(Welcome("nobody", None)))
        assert is_ready(await ws.recv())
        await ws.send(await ws.recv())
        ws.transport.abort()

    async with plain(handle, subprotocols=[PROTOCOL]) as url, connecting(url, on_state=states) as client:
        for times, message in enumerate(("a", "b"), 2):
            await client.send(message)
            assert await taken(client, 1) == [message]
            await connected(client, states, times)
        assert (client._session.sent, client._session.received) == (0, 0)
    assert set(states.of(Connected)) == {Connected("nobody", None)}


async def test_what_is_kept_is_bounded_and_what_is_lost_is_told() -> None:
    backend, states = Backend(), States()
    queue = QueuePolicy(max_kept=2)
    async with backend.serving() as url, connecting(url, queue=queue, on_state=states) as client:
        backend.cut("message")
        for number in range(6):
            await client.send(f"{number}")
        await until(lambda: len(backend.peer.got) == 3)
        # One was counted before the cut, two are kept.
        assert backend.peer.got == ["0", "4", "5"]
        await client.send("6")
        await until(lambda: backend.peer.got[-1] == "6")
    assert states.of(Connected)[1:] == [Connected("client-0", True, resent=2, lost=3)]


async def test_a_message_that_cannot_be_taken_does_not_come_again_for_ever() -> None:
    backend, states = Backend(), States()
    async with backend.serving() as url, connecting(url, max_size=2000, on_state=states) as client:
        backend.peer.say("x" * 3000)
        await until(lambda: len(states.of(Connected)) > 1)
        backend.peer.say("y")
        assert await taken(client, 1) == ["y"]
    assert [(state.code, state.because) for state in states.of(Waiting)] == [(1009, "delay")]
    assert states.of(Connected)[1:] == [Connected("client-1", False)]


# ---- when to come back -----------------------------------------------------------------------------------------------


def answering(*statuses: int, **headers: str) -> Callable[[ServerConnection, Request], Response | None]:
    """Answer the first opening handshakes like that, and let the others in."""
    left = list(statuses)

    def process_request(ws: ServerConnection, request: Request) -> Response | None:
        if not left:
            return None
        response = ws.respond(left.pop(0), "no\n")
        for name, value in headers.items():
            response.headers[name.replace("_", "-")] = value
        return response

    return process_request


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 405, 410, 426])
async def test_a_status_that_forbids(status: int) -> None:
    async with plain(echo, process_request=answering(status)) as url:
        states = States()
        client = connecting(url, on_state=states)
        with pytest.raises(ClientClosed) as caught:
            await client
        assert (caught.value.because, caught.value.code) == ("forbidden", status)
        assert f"HTTP {status}" in caught.value.reason
        assert states == [Connecting(0), Closed("forbidden", status, caught.value.reason)]
        with pytest.raises(ClientClosed):
            await client.send("x")
        with pytest.raises(ClientClosed):
            await rest(client)
        await client.close()


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_a_status_that_does_not(status: int) -> None:
    states = States()
    async with plain(echo, process_request=answering(status, status)) as url, connecting(url, on_state=states):
        pass
    assert [(state.code, state.because) for state in states.of(Waiting)] == [(status, "strategy")] * 2


@pytest.mark.parametrize("told", ["0", "Thu, 01 Jan 1970 00:00:00 GMT"])
async def test_retry_after(told: str) -> None:
    states = States()
    async with (
        plain(echo, process_request=answering(503, Retry_After=told)) as url,
        connecting(url, on_state=states, random=lambda: 0.01),
    ):
        pass
    assert states[1] == Waiting(0.01, 0, "told", 503, "server rejected WebSocket connection: HTTP 503")


async def test_a_redirect_is_followed_and_not_remembered() -> None:
    paths = []

    def process_request(ws: ServerConnection, request: Request) -> Response | None:
        paths.append(request.path)
        if request.path != "/":
            return None
        response = ws.respond(302, "")
        response.headers["Location"] = "/there"
        return response

    async def once(ws: ServerConnection) -> None:
        await ws.send("x")
        ws.transport.abort()

    async with plain(once, process_request=process_request) as url, connecting(url) as client:
        assert await taken(client, 2) == ["x", "x"]
    assert paths[:4] == ["/", "/there"] * 2


@pytest.mark.parametrize("code", [1008, 3000, 4400, 4409, 4500])
async def test_a_code_that_forbids(code: int) -> None:
    backend, states = Backend(), States()
    async with backend.serving() as url, connecting(url, on_state=states) as client:
        backend.peer.say("last", "words")
        await until(lambda: client._session.received == 2)
        assert backend.peer.ws is not None
        await backend.peer.ws.close(code, "so it is")
        await until(lambda: isinstance(client.state, Closed))
        with pytest.raises(ClientClosed, match=f"forbidden.*{code} 'so it is'"):
            await client.send("x")
        # What came before is not lost for it.
        assert await client.recv() == "last"
        come = []
        with pytest.raises(ClientClosed, match="forbidden"):
            async for message in client:
                come.append(message)
        assert come == ["words"]
    assert states[-1] == Closed("forbidden", code, "so it is")
    assert backend.connections == 1


async def test_words_and_a_close_frame_in_one_piece() -> None:
    """What the library has read of a connection that ends is taken in, if nothing of it comes again."""

    async def handle(ws: ServerConnection) -> None:
        for number in range(50):
            await ws.send(f"{number}")
        await ws.close(1000)

    queue = QueuePolicy(max_unread=10)
    async with plain(handle) as url, connecting(url, queue=queue, max_queue=None) as client:
        await until(lambda: isinstance(client.state, Closed))
        assert await rest(client) == [f"{number}" for number in range(50)]
        with pytest.raises(ClientClosed, match=r"forbidden.*1000"):
            await client.recv()


@pytest.mark.parametrize(
    ("code", "reason", "because", "wait_s"),
    [
        (1012, "restart; retry-after=0.010", "told", 0.01),
        (1013, "", "delay", 0.016),
        (1001, "spread=0.020", "spread", 0.01),
        (4408, "", "hurry", 0.0005),
        (1011, "", "strategy", 0.0005),
    ],
)
async def test_a_code_that_does_not(code: int, reason: str, because: str, wait_s: float) -> None:
    backend, states = Backend(), States()
    async with backend.serving() as url, connecting(url, on_state=states, random=lambda: 0.5):
        assert backend.peer.ws is not None
        await backend.peer.ws.close(code, reason)
        await until(lambda: len(states.of(Connected)) > 1)
    (waiting,) = states.of(Waiting)
    assert waiting == Waiting(pytest.approx(wait_s), 0, because, code, reason)


async def test_the_spread_of_the_welcome() -> None:
    backend, states = Backend(), States()
    backend.spread_s = 0.02
    async with backend.serving() as url, connecting(url, on_state=states, random=lambda: 0.25):
        assert backend.peer.ws is not None
        backend.peer.ws.transport.abort()
        await until(lambda: len(states.of(Connected)) > 1)
    (waiting,) = states.of(Waiting)
    assert (waiting.because, waiting.wait_s) == ("spread", 0.005)


@pytest.mark.parametrize("resume", [True, False])
async def test_connections_that_drop_at_once_back_off(resume: bool) -> None:
    backend, states = Backend(), States()

    async def handle(ws: ServerConnection) -> None:
        if resume:
            await backend.handle(ws)
        ws.transport.abort()

    backend.cut("ready", 1000)
    async with plain(handle, subprotocols=[PROTOCOL] if resume else None) as url:
        client = connecting(url, resume=resume, on_state=states, random=lambda: 0.999, wait_connected=False)
        async with client:
            await until(lambda: len(states.of(Waiting)) > 5)
    waits = states.of(Waiting)[:6]
    assert [state.attempt for state in waits] == [0, 1, 2, 3, 4, 5]
    assert [round(state.wait_s * 1000) for state in waits] == [1, 2, 4, 8, 10, 10]
    assert len(states.of(Connected)) >= 5


async def test_a_connection_that_lasted_begins_anew() -> None:
    backend, states = Backend(), States()
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += SOON.lasting_s
        return now_s

    backend.cut("ready", 3)
    async with backend.serving() as url, connecting(url, on_state=states, clock=clock):
        await until(lambda: len(states.of(Waiting)) == 3)
    assert [state.attempt for state in states.of(Waiting)] == [0, 0, 0]


async def test_the_link_that_was_lost_chooses_the_strategy() -> None:
    states = States()
    policy = replace(SOON, aggressive=FixedInterval(0.002), default=FixedInterval(0.001))
    async with plain(echo) as url, connecting(url, policy=policy, on_state=states) as client:
        for times, latency_s in ((2, 0.0), (3, 0.01), (4, 0.1)):
            assert client._open is not None
            client._open.latency = latency_s
            client._open.transport.abort()
            await connected(client, states, times)
    assert [state.wait_s for state in states.of(Waiting)] == [0.001, 0.002, 0.001]


async def test_history_and_budget_are_those_of_the_caller() -> None:
    states, history = States(), ReconnectHistory()
    budget = RetryBudget(per_s=50.0, burst=1)
    url = f"ws://127.0.0.1:{free_port()}"
    async with connecting(
        url,
        wait_connected=False,
        on_state=states,
        history=history,
        budget=budget,
        clock=lambda: 0.0,
        random=lambda: 0.1,
    ):
        await until(lambda: len(states.of(Waiting)) == 2)
    assert [(state.because, state.wait_s) for state in states.of(Waiting)] == [("strategy", 0.0001), ("budget", 0.02)]
    assert history.attempts(0.0) == 2


async def test_to_give_up() -> None:
    states = States()
    policy = ReconnectPolicy.only(FixedInterval(0.001, max_attempts=3))
    client = connecting(f"ws://127.0.0.1:{free_port()}", policy=policy, on_state=states)
    with pytest.raises(ClientClosed) as caught:
        async with client:
            pytest.fail("there is nobody")
    assert (caught.value.because, caught.value.code) == ("given up", 1006)
    assert len(states.of(Connecting)) == 4


async def test_no_http_at_all() -> None:
    answers = iter([b"", b"SSH-2.0-OpenSSH_9.2\r\n"])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(next(answers, b"HTTP/1.1 101 Switching Protocols\r\n\r\n"))
        writer.close()

    states = States()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(ClientClosed, match=r"forbidden.*(Upgrade|Connection)"):
            await connecting(url, on_state=states)
    # An end, which may be that of a server; something else, which takes time; and a refusal to speak our protocol.
    assert [state.because for state in states.of(Waiting)] == ["strategy", "delay"]


# ---- servers that lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "no JSON",
        b'{"wsfast": "welcome"}',
        "[]",
        '{"wsfast": "hello"}',
        '{"wsfast": "welcome", "client_id": 7, "resumed": false}',
        str(Welcome("a", "b", False, -1)),
        str(Welcome("a", "b", False, 0, float("nan"))),
        str(Welcome("a", "b", False, 0, 0.0, float("inf"))),
        str(Welcome("a" * 5000, "b")),
        "[" * 4000,
        str(Welcome("a" * 2**16, "b")),
        b"\xff",
        None,
    ],
    ids=range(13),
)
async def test_a_welcome_that_is_none(answer: Data | None) -> None:
    backend, states, liars = Backend(), States(), 2
    ends = []

    async def handle(ws: ServerConnection) -> None:
        nonlocal liars
        if not liars:
            await backend.handle(ws)
            return
        liars -= 1
        await ws.recv()
        if answer == b"\xff":
            await ws.send(answer, text=True)
        elif answer is not None:
            await ws.send(answer)
        await ws.wait_closed()
        ends.append(ws.close_code)

    async with plain(handle, subprotocols=[PROTOCOL]) as url:
        timeout_s = 0.05 if answer is None else 10
        async with connecting(url, on_state=states, max_size=2**15, open_timeout=timeout_s) as client:
            assert client.state == Connected("client-0", None)
        await until(lambda: len(ends) == 2)
    assert {state.because for state in states.of(Waiting)} == {"delay"}
    assert [state.attempt for state in states.of(Waiting)] == [0, 1]
    assert set(ends) <= ({4408} if answer is None else {1007, 1009, 4400})


@pytest.mark.parametrize("nonsense", ["counts", "token", "session"])
async def test_a_server_that_resumes_what_there_was_not(nonsense: str) -> None:
    backend, states, lies = Backend(), States(), 0

    async def handle(ws: ServerConnection) -> None:
        nonlocal lies
        if lies != 1:
            await backend.handle(ws)
            return
        lies += 1
        await ws.recv()
        await ws.send(str(Welcome("a", None if nonsense == "token" else "b", True, 7 if nonsense == "counts" else 0)))
        await ws.wait_closed()

    lies = int(nonsense == "session")
    async with plain(handle, subprotocols=[PROTOCOL]) as url, connecting(url, on_state=states) as client:
        if nonsense != "session":
            await client.send("x")
            await until(lambda: backend.peer.got)
            assert backend.peer.ws is not None
            lies = 1
            backend.peer.ws.transport.abort()
        await until(lambda: lies == 2 and client._open is not None)
    assert [state.because for state in states.of(Waiting)][-1] == "delay"
    assert (
        states.of(Connected)[-1]
        == {
            "counts": Connected("client-1", False, unconfirmed=1),  # one of them is wrong, and nobody knows which
            "token": Connected("client-0", True),  # that was no welcome, and says nothing about the session
            "session": Connected("client-0", None),  # that there never was
        }[nonsense]
    )


@contextlib.asynccontextmanager
async def closing(at_once: bool = True) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that sends a close frame together with its handshake, or when it has received something, and never comes
    to an end; and the requests."""
    requests: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", requests[-1])
        assert key is not None
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept_key(key[1].decode()).encode() + b"\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            if not at_once:
                await reader.read(100)
            writer.write(b"\x88\x02\x03\xe9")
            while await reader.read(100):
                pass
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


async def test_a_server_that_begins_to_close_and_never_ends() -> None:
    async with closing() as (url, requests):
        async with connecting(url, wait_connected=False, close_timeout=0.1, ping_interval=None) as client:
            await until(lambda: len(requests) > 1)
        assert client.state == Closed("closed", 1000, "")


# ---- what is sent while away -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def away(
    **settings: Any,
) -> AsyncIterator[tuple[Client, Callable[[], contextlib.AbstractAsyncContextManager[Backend]]]]:
    """A client whose server is not there, and how to have it there."""
    port = free_port()

    @contextlib.asynccontextmanager
    async def back() -> AsyncIterator[Backend]:
        backend = Backend()
        async with _serving_at(port, backend.handle, subprotocols=[PROTOCOL]):
            yield backend

    url = f"ws://127.0.0.1:{port}"
    async with connecting(url, wait_connected=False, queue=QueuePolicy(**settings)) as client:
        yield client, back


async def test_when_full_wait() -> None:
    async with away(max_messages=2) as (client, back):
        sending = [asyncio.create_task(client.send(f"{number}")) for number in range(6)]
        await until(lambda: client.queued == 2)
        assert [task.done() for task in sending] == [True, True, False, False, False, False]
        sending[3].cancel()  # waits for its turn
        await asyncio.wait([sending[3]])
        sending[2].cancel()  # waits for room
        await asyncio.wait([sending[2]])
        async with back() as backend:
            await asyncio.gather(sending[4], sending[5])
            await client.send("6")
            await until(lambda: len(backend.peer.got) == 5)
            assert backend.peer.got == ["0", "1", "4", "5", "6"]
            await client.close()


async def test_when_full_raise() -> None:
    async with away(max_messages=2, max_bytes=5, when_full="raise") as (client, back):
        await client.send("1")
        await client.send("22")
        with pytest.raises(QueueFull) as caught:
            await client.send("3")
        assert (caught.value.messages, caught.value.nbytes) == (2, 3)
        async with back() as backend:
            await until(lambda: client._open is not None)
            await client.send("larger than the queue")
            await until(lambda: len(backend.peer.got) == 3)
            assert backend.peer.got == ["1", "22", "larger than the queue"]
            await client.close()


@pytest.mark.parametrize(
    ("when_full", "sent", "kept"),
    [
        ("drop_oldest", ["1", "22", "333"], ["22", "333"]),
        ("drop_oldest", ["1", "22", "4444"], ["4444"]),
        ("drop_oldest", ["1", "666666"], ["1"]),
        ("drop_oldest", ["éé", "22"], ["22"]),  # in UTF-8: 4 bytes
        ("drop_newest", ["1", "22", "333"], ["1", "22"]),
        ("drop_newest", ["1", "55555", "22"], ["1", "22"]),
    ],
)
async def test_when_full_drop(when_full: str, sent: list[str], kept: list[str]) -> None:
    async with away(max_messages=2, max_bytes=5, when_full=when_full) as (client, back):
        for message in sent:
            await client.send(message)
        assert (client.queued, client.dropped) == (len(kept), len(sent) - len(kept))
        async with back() as backend:
            await until(lambda: backend.peers and len(backend.peer.got) == len(kept))
            assert backend.peer.got == kept
            await client.close()


async def test_a_message_larger_than_the_queue_waits_for_a_connection() -> None:
    async with away(max_messages=0, max_bytes=0) as (client, back):
        sending = asyncio.create_task(client.send("x"))
        await until(lambda: client._turn.locked())
        async with back() as backend:
            await sending
            await until(lambda: backend.peer.got == ["x"])
            await client.close()


async def test_the_order_of_sending_is_kept() -> None:
    """Whatever is queued, waits for room, is sent again or is new when connections come and go."""
    backend, count = Backend(), 400
    async with backend.serving() as url:
        queue = QueuePolicy(max_messages=5)
        async with connecting(url, queue=queue) as client:

            def cut(step: str, ws: ServerConnection) -> None:
                if step == "message" and len(backend.peer.got) % 37 == 0:
                    ws.transport.abort()

            backend.at = cut
            async with asyncio.TaskGroup() as tasks:
                for number in range(count):
                    tasks.create_task(client.send(f"{number}"))
            await until(lambda: len(backend.peer.got) == count)
            assert backend.peer.got == [f"{number}" for number in range(count)]
        assert backend.connections > 10


@pytest.mark.parametrize("resumed", [True, False])
async def test_cancelled_while_it_waits_for_the_network_a_message_is_sent(resumed: bool) -> None:
    backend, states, count = Backend(), States(), 0

    def stop(step: str, ws: ServerConnection) -> None:
        if step == "ready" and backend.connections == 1:
            ws.transport.pause_reading()

    backend.at = stop
    queue = QueuePolicy(max_kept_bytes=2**30)
    async with (
        backend.serving(compression=None) as url,
        connecting(url, compression=None, queue=queue, on_state=states) as client,
    ):

        async def flood() -> None:
            nonlocal count
            while True:
                count += 1
                await client.send(f"{count}".ljust(2**18))

        await until(
            lambda: backend.peers and backend.peer.ws is not None and not backend.peer.ws.transport.is_reading()
        )
        task = asyncio.create_task(flood())
        await until(lambda: client._open is not None and client._open.paused)
        task.cancel()
        await asyncio.wait([task])
        assert client._session.sent == count
        if not resumed:
            backend.forget()
        assert backend.peer.ws is not None
        backend.peer.ws.transport.abort()
        await connected(client, states, 2)
        await client.send("last")
        await until(lambda: backend.peer.got and backend.peer.got[-1] == "last")
        if resumed:
            assert [int(message) for message in backend.peer.got[:-1]] == list(range(1, count + 1))
    (again,) = states.of(Connected)[1:]
    assert (again.resumed, again.unconfirmed) == ((True, 0) if resumed else (False, count))


@pytest.mark.parametrize("at_once", [True, False])
async def test_what_was_never_sent_is_not_sent_into_a_connection_that_is_closing(at_once: bool) -> None:
    async with plain(echo) as url, closing(at_once) as (closing_url, requests):
        urls = iter([closing_url])
        client = connecting(lambda: next(urls, url), wait_connected=not at_once, close_timeout=0.1)
        async with client:
            if not at_once:
                ws = client._open
                assert ws is not None
                await client.send("gone")
                await until(lambda: ws.state is CLOSING)
            await client.send("never sent before")
            assert client.queued == 1
            assert await taken(client, 1) == ["never sent before"]
        assert len(requests) == 1


async def test_what_is_sent() -> None:
    backend = Backend()
    async with backend.serving() as url, connecting(door := Door(url)) as client:
        buffer = bytearray(b"before")
        await client.send(buffer)
        await client.send(memoryview(buffer)[::2])
        await client.send("ünï")
        async with door.closed(client):
            await client.send(buffer)
            buffer[:] = b"behind"
        await until(lambda: len(backend.peer.got) == 4)
        assert backend.peer.got == [b"before", b"bfr", "ünï", b"before"]
        nothing_sent: list[Any] = [1, None, ["a"], {"a": 1}, object()]
        for wrong in nothing_sent:
            with pytest.raises(TypeError, match=type(wrong).__name__):
                await client.send(wrong)
        with pytest.raises(UnicodeEncodeError):
            await client.send("\ud800")
        await client.send("still there")
        await until(lambda: backend.peer.got[-1] == "still there")


# ---- back-pressure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_unread": 5}, {"max_unread_bytes": 5000}])
async def test_while_nobody_takes_nothing_is_read(settings: dict[str, int]) -> None:
    backend, states = Backend(), States()
    queue = QueuePolicy(**settings)
    async with (
        backend.serving(compression=None) as url,
        connecting(url, queue=queue, max_queue=1, on_state=states) as client,
    ):
        messages = [f"{number:06}" * 200_00 for number in range(200)]
        backend.peer.say(*messages)
        most = settings.get("max_unread", 1)
        await until(lambda: client._session.received == most)
        ws = backend.peer.ws
        assert ws is not None
        await until(lambda: ws.transport.get_write_buffer_size())  # the server notices
        # A cut loses nothing of it: what did not fit comes again.
        for times in range(2, 5):
            assert client._open is not None
            client._open.transport.abort()
            await connected(client, states, times)
            assert len(client._inbox) == client._session.received == most
        assert await taken(client, 200) == messages


async def test_what_was_read_of_a_plain_connection_is_kept() -> None:
    connections = 0

    async def handle(ws: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        for number in range(20):
            await ws.send(f"{connections}.{number}")
        await ws.close(1012)

    queue = QueuePolicy(max_unread=3)
    async with plain(handle) as url, connecting(url, queue=queue, max_queue=None) as client:
        await until(lambda: isinstance(client.state, Waiting))
        # It does not come back for more before there is room.
        await until(lambda: "_room_in_inbox" in _steps(client._supervisor))
        assert await taken(client, 17) == [f"1.{number}" for number in range(17)]
        assert connections == 1
        assert await taken(client, 23) == [
            *(f"1.{number}" for number in range(17, 20)),
            *(f"2.{number}" for number in range(20)),
        ]


def _steps(task: asyncio.Task[Any] | None) -> list[str]:
    """The coroutines that a task is in, from the outermost."""
    assert task is not None
    steps, step = [], task.get_coro()
    while hasattr(step, "cr_await"):
        steps.append(step.__name__)
        step = step.cr_await
    return steps


async def test_several_may_receive_and_be_cancelled() -> None:
    backend = Backend()
    async with backend.serving() as url, connecting(url) as client:
        receiving = [asyncio.create_task(client.recv()) for _ in range(4)]
        await asyncio.sleep(0)
        receiving[1].cancel()
        backend.peer.say("a", "b", "c", "d")
        come = await asyncio.gather(*receiving, return_exceptions=True)
        assert [type(each) for each in come] == [str, asyncio.CancelledError, str, str]
        assert sorted(str(each) for each in come if isinstance(each, str)) == ["a", "b", "c"]
        assert await taken(client, 1) == ["d"]


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_closing_tells_the_server_why() -> None:
    backend, ends = Backend(), []

    async def handle(ws: ServerConnection) -> None:
        await backend.handle(ws)
        ends.append((ws.close_code, ws.close_reason))

    async with plain(handle, subprotocols=[PROTOCOL]) as url:
        async with connecting(url) as client:
            backend.peer.say("unread")
            await until(lambda: client._session.received)
            for code, reason in ((1005, ""), (999, ""), (5000, ""), (1000, "é" * 62)):
                with pytest.raises(InvalidSetting):
                    await client.close(code, reason)
            await client.send("before")
            await client.close(4123, "bye")
            await client.close()
            with pytest.raises(ClientClosed, match=r"closed.*4123 'bye'"):
                await client.send("behind")
            assert await rest(client) == ["unread"]
        assert backend.peer.got == ["before"]
        with pytest.raises(ZeroDivisionError):
            async with connecting(url):
                raise ZeroDivisionError
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), connecting(url) as client:
                    await client.recv()
        async with connecting(url):
            pass
        await until(lambda: len(ends) == 4)
    assert ends == [(4123, "bye"), (1001, ""), (1001, ""), (1000, "")]


async def test_closing_while_away_is_at_once() -> None:
    states = States()
    client = connecting(f"ws://127.0.0.1:{free_port()}", policy=NEVER, wait_connected=False, on_state=states)
    async with client:
        await until(lambda: isinstance(client.state, Waiting))
        await client.send("for nobody")
        waiting = [asyncio.create_task(client.recv()), asyncio.create_task(rest(client))]
        await asyncio.sleep(0)
        await asyncio.gather(client.close(4000), client.close())
        assert await waiting[1] == []
        with pytest.raises(ClientClosed):
            await waiting[0]
    assert states[-1] == Closed("closed", 4000, "")
    assert len(states.of(Closed)) == 1


async def test_closing_before_the_first_step() -> None:
    client = connecting("ws://127.0.0.1:1", wait_connected=False)
    await client.start()
    await client.close()
    assert client.state == Closed("closed", 1000, "")


async def test_a_server_that_does_not_answer_a_close_is_waited_for_no_longer_than_that() -> None:
    async def deaf(ws: ServerConnection) -> None:
        ws.transport.pause_reading()
        await ws.wait_closed()

    async with plain(deaf) as url, connecting(url, close_timeout=0.05) as client:
        await client.send("x")
    assert client.state == Closed("closed", 1000, "")


async def test_a_server_that_goes_on_talking_is_closed_all_the_same() -> None:
    async def talk(ws: ServerConnection) -> None:
        with contextlib.suppress(LinkClosed):
            while True:
                await ws.send("x" * 1000)

    queue = QueuePolicy(max_unread=1)
    async with plain(talk, compression=None) as url, connecting(url, queue=queue, max_queue=1) as client:
        await taken(client, 3)
        assert client._open is not None
        ws = client._open
        await client.close()
    assert (ws.close_code, await rest(client)) == (1000, ["x" * 1000])


class Deaf:
    """A server that stops at some phase of a connection, and sees when its client is gone."""

    def __init__(self) -> None:
        self.reached, self.hears, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def at(self, phase: str) -> AsyncIterator[str]:
        if phase == "waiting":
            yield f"ws://127.0.0.1:{free_port()}"
        elif phase == "connecting":
            async with await asyncio.start_server(self._tcp, "127.0.0.1", 0) as server:
                yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        else:
            async with plain(self._websocket, subprotocols=[PROTOCOL] if phase == "greeting" else None) as url:
                yield url

    async def _tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reached.set()
        with contextlib.suppress(ConnectionError):
            while await reader.read(2**16):
                pass
        self.gone.set()
        writer.close()

    async def _websocket(self, ws: ServerConnection) -> None:
        ws.transport.pause_reading()
        self.reached.set()
        await self.hears.wait()
        ws.transport.resume_reading()
        with contextlib.suppress(LinkClosed):
            while True:
                await ws.recv()
        self.gone.set()


@pytest.mark.parametrize(
    ("phase", "wait_connected"),
    [
        ("waiting", True),
        ("waiting", False),
        ("connecting", True),
        ("connecting", False),
        ("greeting", True),
        ("greeting", False),
        ("receiving", True),
        ("sending", True),
        ("closing", True),
    ],
)
async def test_whoever_is_cancelled_waits_for_nothing_more(phase: str, wait_connected: bool) -> None:
    deaf, states = Deaf(), States()

    async with deaf.at(phase) as url:
        # Whatever is waited for would take for ever.
        for_ever: dict[str, Any] = {"policy": NEVER, "open_timeout": None, "close_timeout": None}
        client = connecting(url, on_state=states, wait_connected=wait_connected, compression=None, **for_ever)

        async def use() -> None:
            async with client:
                if phase == "closing":
                    await client.close()
                while phase == "sending":
                    await client.send(bytes(2**16))
                await client.recv()

        task = asyncio.create_task(use())
        if phase == "waiting":
            await until(lambda: states.of(Waiting))
        else:
            await until(deaf.reached.is_set)
        if phase == "sending":
            await until(lambda: client._open is not None and client._open.paused)
        if phase == "closing":
            await until(lambda: client._parting is not None)
        task.cancel()
        await until(task.done)
        assert task.cancelled()
        assert isinstance(states[-1], Closed)
        assert not tasks_of_clients()
        deaf.hears.set()
        if phase != "waiting":
            await until(deaf.gone.is_set)


@pytest.mark.parametrize("turns", range(10))
async def test_the_wait_for_the_other_side_can_be_cancelled_at_any_step(turns: int) -> None:
    deaf = Deaf()
    async with deaf.at("closing") as url:
        client = await connecting(url, close_timeout=None)
        closing = asyncio.create_task(client.close(1000, "will you?"))
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await until(closing.done)
        # It may not have begun yet.
        assert client.state in (Connected(None, None), Closed("closed", 1000, "will you?"))
        if isinstance(client.state, Closed):
            assert not tasks_of_clients()
        deaf.hears.set()
        await client.close()
        await until(deaf.gone.is_set)


# ---- states ----------------------------------------------------------------------------------------------------------


async def test_an_asynchronous_callback_is_called_in_order_and_may_do_anything() -> None:
    backend, told = Backend(), []

    async def on_state(state: State) -> None:
        told.append(state)
        if isinstance(state, Connected):
            await client.send(f"hello from {state.client_id}")
            if len(told) > 4:
                await client.close()
        await asyncio.sleep(0.001)

    async with backend.serving() as url:
        client = connecting(url, on_state=on_state)
        async with client:
            await until(lambda: backend.peer.got)
            assert backend.peer.ws is not None
            backend.peer.ws.transport.abort()
            assert await rest(client) == []
    assert [type(state) for state in told] == [Connecting, Connected, Waiting, Connecting, Connected, Closed]
    assert client.callback_errors == 0


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_callback_that_fails_stops_nothing(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    def fail(state: State) -> None:
        raise ZeroDivisionError(type(state).__name__)

    class FailLater:
        async def __call__(self, state: State) -> None:
            fail(state)

    async with plain(echo) as url, connecting(url, on_state=FailLater() if is_async else fail) as client:
        await client.send("x")
        assert await client.recv() == "x"
    assert client.callback_errors == 3
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        f"on_state failed on {name}" for name in ("Connecting", "Connected", "Closed")
    ]


async def test_a_callback_that_hangs_holds_nobody_up() -> None:
    async def hang(state: State) -> None:
        await asyncio.Event().wait()

    async with plain(echo) as url, connecting(url, on_state=hang, close_timeout=0.05) as client:
        await client.send("x")
        assert await client.recv() == "x"
    await asyncio.sleep(0)


async def test_a_client_that_was_not_started_says_so() -> None:
    client = connecting("ws://127.0.0.1:1")
    assert client.state == Closed("not started")
    for call in (client.send("x"), client.recv(), rest(client)):
        with pytest.raises(ClientClosed, match="not started"):
            await call
    await client.close()
    assert client.state == Closed("not started")


async def test_a_client_starts_once() -> None:
    async with plain(echo) as url:
        client = connecting(url)
        async with client:
            with pytest.raises(RuntimeError, match="once"):
                await client
        with pytest.raises(RuntimeError, match="once"):
            await client.start()


# ---- what goes to the library ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options", "error"),
    [
        ("http://127.0.0.1", {}, InvalidURI),
        ("ws://127.0.0.1:1", {"proxy": "ftp://127.0.0.1"}, InvalidProxy),
        ("ws://127.0.0.1:1", {"nonsense": 1}, TypeError),
        ("ws://127.0.0.1:1", {"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}, ValueError),
    ],
)
async def test_arguments_that_cannot_be_right(url: str, options: dict[str, Any], error: type[Exception]) -> None:
    client = connecting(url, **options)
    with pytest.raises(error):
        await client
    assert isinstance(client.state, Closed) and client.state.because == "failed"
    with pytest.raises(ClientClosed) as caught:
        await client.send("x")
    assert isinstance(caught.value.__cause__, error)


def test_a_socket_cannot_be_used_again() -> None:
    with socket.socket() as sock, pytest.raises(TypeError, match="sock"):
        connect("ws://127.0.0.1:1", sock=sock)


@pytest.mark.parametrize(
    "settings",
    [{"max_messages": -1}, {"max_bytes": 0.5}, {"max_unread": 0}, {"when_full": "panic"}, {"max_kept": None}],
)
def test_settings_that_cannot_be_right(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(settings))):
        QueuePolicy(**settings)


@pytest.mark.parametrize("is_async", [False, True])
async def test_url_and_headers_may_be_fresh_each_time(is_async: bool) -> None:
    asked = []

    async def once(ws: ServerConnection) -> None:
        asked.append((ws.request.path, ws.request.headers["Authorization"], ws.request.headers["Origin"]))
        await ws.send("x")
        ws.transport.abort()

    count = 0

    def fresh(text: str) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise ZeroDivisionError
        if count == 8:
            raise ClientClosed("forbidden", 401, "the login has expired")
        if not is_async:
            return text.format(count)

        async def later() -> str:
            return text.format(count)

        return later()

    def headers() -> Any:
        answer = fresh("Bearer {}")
        if isinstance(answer, str):
            return {"Authorization": answer}

        async def later() -> dict[str, str]:
            return {"Authorization": await answer}

        return later()

    states = States()
    async with plain(once) as url:
        client = connecting(
            lambda: fresh(url + "/{}"), additional_headers=headers, on_state=states, origin="https://a.example"
        )
        with pytest.raises(ClientClosed, match=r"forbidden.*401 'the login has expired'"):
            async with client:
                assert await taken(client, 2) == ["x", "x"]
                await rest(client)
    assert asked == [("/3", "Bearer 4", "https://a.example"), ("/5", "Bearer 6", "https://a.example")]
    assert "ZeroDivisionError" in states.of(Waiting)[0].reason


async def test_tls(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server_side, client_side = tls
    backend, states = Backend(), States()
    async with backend.serving(ssl=server_side) as url:
        url = url.replace("ws:", "wss:")
        async with connecting(url, ssl=client_side, on_state=states) as client:
            for times in range(2, 5):
                await client.send(f"{times}")
                assert client._open is not None
                client._open.transport.abort()
                await connected(client, states, times)
            await until(lambda: backend.peer.got == ["2", "3", "4"])
        assert len(backend.peers) == 1

        states.clear()
        async with connecting(url, on_state=states, wait_connected=False):
            await until(lambda: len(states.of(Waiting)) > 1)
        assert {(state.code, state.because) for state in states.of(Waiting)} == {(1015, "delay")}
        assert "certificate" in states.of(Waiting)[0].reason


@pytest.mark.parametrize("status", [200, 407, 502])
async def test_through_a_proxy(status: int) -> None:
    backend, states, targets = Backend(), States(), []
    refusals = 0 if status == 200 else 1

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refusals
        request = await reader.readuntil(b"\r\n\r\n")
        targets.append(request.split(b"\r\n")[0].decode())
        if refusals:
            refusals -= 1
            writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await Wire(url, None)._connected(reader, writer)

    async with backend.serving() as url, await asyncio.start_server(tunnel, "127.0.0.1", 0) as proxy:
        address = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        client = connecting(url, proxy=address, on_state=states)
        if status == 407:
            with pytest.raises(ClientClosed, match=r"forbidden.*407 '.*proxy"):
                await client
            return
        async with client:
            await client.send("through")
            await until(lambda: backend.peer.got == ["through"])
            assert backend.peer.ws is not None
            backend.peer.ws.transport.abort()
            await connected(client, states, 2)
    assert set(targets) == {f"CONNECT {url.removeprefix('ws://')} HTTP/1.1"}
    assert [state.code for state in states.of(Waiting)] == [1006] if status == 200 else [502, 1006]


# ---- the page about it -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent.parent / "docs" / "reconnect.md").read_text(encoding="utf-8")


def examples() -> Iterator[str]:
    section = PAGE.split("## The Python client")[1].split("\n## ")[0]
    yield from re.findall(r"```python\n(.*?)```", section, re.DOTALL)


async def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    backend = Backend()
    program = next(example for example in examples() if "async def main" in example)
    async with backend.serving() as url:
        names: dict[str, Any] = {"SOON": SOON}
        for words, instead in (
            ('"wss://example.org/feed", ', f'"{url}", proxy=None, policy=SOON, '),
            ("asyncio.run(main())", ""),
        ):
            assert words in program
            program = program.replace(words, instead)
        exec(program, names)
        running = asyncio.create_task(names["main"]())
        await until(lambda: backend.peers and backend.peer.got)
        assert backend.peer.ws is not None
        backend.peer.ws.transport.abort()
        backend.peer.say("news")
        printed = io.StringIO()
        await until(lambda: printed.write(capsys.readouterr().out) or "news" in printed.getvalue())
        assert backend.connections == 2
        assert backend.peer.ws is not None
        await backend.peer.ws.close(1000)
        async with asyncio.timeout(DEADLINE_S):
            await running


def test_the_names_of_the_page_are_there() -> None:
    for example in examples():
        compile(example, "reconnect.md", "exec", flags=0x2000)  # ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    rows = re.findall(r"^\| `(\w+)(?:\((.*?)\))?`", PAGE.split("## The Python client")[1], re.MULTILINE)
    fields = {
        name: {word.strip() for word in words.split(",")}
        for name, words in rows
        if name in ("Connecting", "Connected", "Waiting", "Closed")
    }
    assert fields == {kind.__name__: set(kind.__slots__) for kind in (Connecting, Connected, Waiting, Closed)}
