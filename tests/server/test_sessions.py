"""Sessions on a manager, over real sockets: who comes back as whom, and what is waiting for them (docs/resume.md).

What the tokens and counts promise is tested without a network in tests/core/test_session.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import (
    DEADLINE_S,
    FakeAdapter,
    FakeLink,
    Seen,
    client,
    close_of,
    link_of,
    masked,
    received,
    serving,
    until,
)
from wsfast import (
    Backpressure,
    BroadcastResult,
    ConnectionClosed,
    ConnectionInterrupted,
    ConnectionManager,
    ConnectionOpened,
    ConnectionResumed,
    ConnectionStatus,
    ConnectionTooSlow,
    DrainPolicy,
    InvalidSetting,
    PeerError,
    SessionPolicy,
)
from wsfast.client import Connected, State, connect
from wsfast.reconnect import FullJitter, HerdPolicy, ReconnectPolicy
from wsfast.session import READY, ClientSession, Hello, Welcome, offers, read_welcome

LIFE = (ConnectionOpened, ConnectionInterrupted, ConnectionResumed, ConnectionClosed)


class Peer:
    """A client that speaks the protocol of resume and does nothing by itself."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.options = {"subprotocols": offers(), **options}
        self.session = ClientSession()
        self.ws: ClientConnection
        self.lost = self.unconfirmed = 0

    async def begin(self, hello: str | None = None) -> Welcome:
        """Connect, and say hello."""
        self.ws = await client(self.url, **self.options)
        await self.ws.send(self.session.hello() if hello is None else hello)
        async with asyncio.timeout(DEADLINE_S):
            return read_welcome(await self.ws.recv())

    async def connect(self) -> Welcome:
        """Connect, with all that belongs to it."""
        welcome = await self.begin()
        resend, self.lost, self.unconfirmed = self.session.welcomed(welcome)
        await self.ws.send(READY)
        for message in resend:
            await self.ws.send(message)
        return welcome

    async def send(self, *messages: str | bytes) -> None:
        for message in messages:
            self.session.sending(message)
            await self.ws.send(message)

    async def receive(self, count: int) -> list[str | bytes]:
        messages = await received(self.ws, count)
        for _ in messages:
            self.session.took()
        return messages

    def cut(self) -> None:
        """End the connection without a word."""
        self.ws.transport.abort()


@pytest.fixture
async def peers() -> AsyncIterator[list[Peer]]:
    """Whose connections are closed after the test."""
    peers: list[Peer] = []
    yield peers
    for peer in peers:
        await peer.ws.close()


@contextlib.asynccontextmanager
async def room(manager: ConnectionManager, **options: Any) -> AsyncIterator[tuple[str, list[str | bytes]]]:
    """A server whose clients are in one group; its address, and what their handlers are given."""
    given: list[str | bytes] = []

    async def handler(ws: ServerConnection) -> None:
        ws.wsfast.join("room")  # type: ignore[attr-defined]
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                given.append(message)

    async with serving(handler, manager, **options) as url:
        yield url, given


async def away(manager: ConnectionManager, count: int = 1) -> None:
    await until(lambda: manager.stats()["away"] == count)


async def test_a_client_that_was_cut_off_is_the_same_and_gets_what_it_missed(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    seen = Seen(manager, *LIFE)
    async with room(manager) as (url, given):
        peers.append(peer := Peer(url))
        welcome = await peer.connect()
        assert welcome.token is not None and not welcome.resumed and welcome.grace_s == 180
        (conn,) = manager.registry.values()
        assert conn.client_id == welcome.client_id
        conn.metadata = {"name": "ann"}
        await peer.send("one")
        await until(lambda: given == ["one"] and conn.groups == {"room"})
        await manager.broadcast("first", group="room")
        assert await peer.receive(1) == ["first"]
        peer.cut()
        await away(manager)

        assert list(manager.registry.values()) == [conn] and conn.status is ConnectionStatus.RECONNECTING
        assert conn.conn is None and conn.groups == {"room"} and conn.metadata == {"name": "ann"}
        result = await manager.broadcast("second", group="room")
        assert (result.targets, result.queued, result.away, result.sent) == (1, 1, 1, 0)
        await manager.send(conn, b"third")
        conn.join("late")
        assert (await manager.broadcast("fourth", group="late")).away == 1
        assert (await manager.broadcast("not for the absent", status=ConnectionStatus.ONLINE)).targets == 0
        assert (await manager.broadcast("not for this one", exclude=conn)).targets == 0

        again = await peer.connect()
        assert again.resumed and again.client_id == welcome.client_id and again.received == 1
        assert again.token not in (None, welcome.token)
        assert conn.status is ConnectionStatus.ONLINE and conn.conn is not None
        await manager.broadcast("fifth")
        assert await peer.receive(4) == ["second", b"third", "fourth", "fifth"]
        await peer.send("two")
        await until(lambda: given == ["one", "two"])
        stats = manager.stats()
        assert (stats["interrupted"], stats["resumed"], stats["not_resumed"], stats["opened"]) == (1, 1, 0, 1)
        await peer.ws.close()
        await until(lambda: len(manager.registry) == 0)
    assert [type(event) for event in seen] == list(LIFE)
    interrupted, resumed, closed = seen[1:]
    assert isinstance(interrupted, ConnectionInterrupted) and interrupted.code == 1006
    assert isinstance(resumed, ConnectionResumed) and resumed.missed == 3 and resumed.away_s > 0
    assert isinstance(closed, ConnectionClosed) and closed.code == 1000 and closed.groups == {"room", "late"}
    assert conn.messages_in == 2 and conn.messages_out == 5


async def test_what_was_sent_but_did_not_arrive_is_sent_again(manager: ConnectionManager, peers: list[Peer]) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        for number in range(20):
            await manager.broadcast(str(number))
        assert await peer.receive(7) == [str(number) for number in range(7)]
        peer.cut()
        await away(manager)
        await manager.broadcast("20")
        assert (await peer.connect()).resumed
        assert await peer.receive(14) == [str(number) for number in range(7, 21)]


async def test_messages_that_the_application_did_not_take_come_again(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    taken: list[str | bytes] = []
    go_on = asyncio.Event()

    async def handler(ws: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                taken.append(message)
                await go_on.wait()

    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        await peer.send("a", "b", "c")
        await until(lambda: taken == ["a"])
        peer.cut()
        await away(manager)
        assert (await peer.connect()).received == 1
        go_on.set()  # the first handler finds that the rest is no longer its own
        await until(lambda: len(taken) >= 3)
        await peer.send("d")
        await until(lambda: taken == ["a", "b", "c", "d"])


async def test_what_the_handler_sends_by_itself_is_kept_as_well(manager: ConnectionManager, peers: list[Peer]) -> None:
    async def handler(ws: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                await ws.send(f"text {message!r}")
                await ws.send(b"binary")
                await ws.send(["in ", "parts"])
                websockets.broadcast([ws], "by the library")
                await manager.broadcast("by the manager")

    expected = ["text 'go'", b"binary", "in parts", "by the library", "by the manager"]
    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        await peer.send("go")
        assert await peer.receive(2) == expected[:2]
        await received(peer.ws, 3)  # of which the application is not given anything
        peer.cut()
        await away(manager)
        assert (await peer.connect()).resumed
        assert await peer.receive(3) == expected[2:]


async def test_what_the_handler_sends_by_itself_has_the_limits_of_its_library(peers: list[Peer]) -> None:
    async def handler(ws: ServerConnection) -> None:
        await ws.send("x" * 1000)
        await ws.wait_closed()

    async with ConnectionManager(max_message_bytes=100) as manager, serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        assert await peer.receive(1) == ["x" * 1000]


async def test_a_handler_may_read_in_pieces(manager: ConnectionManager, peers: list[Peer]) -> None:
    given: list[str] = []

    async def handler(ws: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                given.append("".join([part async for part in ws.recv_streaming()]))  # type: ignore[arg-type]

    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        await peer.send("whole")
        await peer.ws.send(["in ", "pieces"])
        await until(lambda: given == ["whole", "in pieces"])
        peer.cut()
        await away(manager)
        peer.session.sending("in pieces")
        assert (await peer.connect()).received == 2


@pytest.mark.parametrize(
    ("offered", "chosen", "seen"),
    [
        (["wsfast.1"], "wsfast.1", None),
        (["wsfast.1+chat", "chat"], "wsfast.1+chat", "chat"),
        (["wsfast.1+news", "wsfast.1+chat", "news", "chat"], "wsfast.1+chat", "chat"),
        (["chat"], "chat", "chat"),
        (["wsfast.2", "chat"], "chat", "chat"),
    ],
)
async def test_the_subprotocol_of_the_application_is_chosen_as_ever(
    manager: ConnectionManager, peers: list[Peer], offered: list[str], chosen: str, seen: str | None
) -> None:
    subprotocols: list[str | None] = []

    async def handler(ws: ServerConnection) -> None:
        subprotocols.append(ws.subprotocol)
        await ws.wait_closed()

    options = {} if seen is None else {"subprotocols": ["chat", "other"]}
    async with serving(handler, manager, **options) as url, client(url, subprotocols=offered) as ws:
        assert ws.subprotocol == chosen
        if chosen != seen:
            await ws.send(str(Hello()))
        await until(lambda: subprotocols == [seen])


async def test_where_nothing_is_agreed_on_every_message_counts(manager: ConnectionManager) -> None:
    async with (
        room(manager, select_subprotocol=lambda ws, offered: None) as (url, given),
        client(url, subprotocols=["wsfast.1+chat", "chat"]) as ws,
    ):
        assert ws.subprotocol is None
        (conn,) = manager.registry.values()
        await ws.send("one")
        await until(lambda: given == ["one"])
        assert conn.messages_in == 1


async def test_the_application_may_choose_the_subprotocol_itself(manager: ConnectionManager) -> None:
    def choose(ws: ServerConnection, offered: Any) -> Any:
        assert list(offered) == ["a", "b"]
        return "b"

    async def handler(ws: ServerConnection) -> None:
        await ws.wait_closed()

    async with serving(handler, manager, select_subprotocol=choose) as url:
        for offered, chosen in ((["a", "b"], "b"), (["wsfast.1+a", "wsfast.1+b", "a", "b"], "wsfast.1+b")):
            async with client(url, subprotocols=offered) as ws:
                assert ws.subprotocol == chosen


async def test_a_subprotocol_that_the_application_lacks_is_refused_as_ever(manager: ConnectionManager) -> None:
    async def handler(ws: ServerConnection) -> None:
        raise AssertionError("nobody gets here")

    async with serving(handler, manager, subprotocols=["chat"]) as url:
        for offered in (["news"], ["wsfast.1+news", "news"], ["wsfast.1"], None):
            with pytest.raises(websockets.InvalidStatus):
                await client(url, subprotocols=offered)


async def test_where_there_are_no_sessions_the_protocol_is_not_spoken(peers: list[Peer]) -> None:
    async def handler(ws: ServerConnection) -> None:
        await ws.send("plain")
        await ws.wait_closed()

    async with ConnectionManager(sessions=None) as manager, serving(handler, manager) as url:
        assert manager.sessions is None
        async with client(url, subprotocols=offers()) as ws:
            assert ws.subprotocol is None and await ws.recv() == "plain"


async def test_a_plain_client_costs_nothing_and_is_not_waited_for(manager: ConnectionManager) -> None:
    async with room(manager) as (url, _), client(url) as ws:
        await until(lambda: len(manager.registry) == 1)
        (conn,) = manager.registry.values()
        assert not link_of(manager, conn).has_session
        await manager.broadcast("x")
        assert manager.stats()["kept_messages"] == 0
        ws.transport.abort()
        await until(lambda: len(manager.registry) == 0)
    assert manager.stats()["interrupted"] == 0


@pytest.mark.usefixtures("fake_links")
async def test_a_connection_that_only_its_library_can_send_to_gets_no_session(manager: ConnectionManager) -> None:
    async with manager.attach(FakeLink(framing=None), hello=Hello()) as conn:
        assert not link_of(manager, conn).has_session


# ---- tokens ----------------------------------------------------------------------------------------------------------


async def test_a_token_is_good_until_its_successor_has_arrived(manager: ConnectionManager, peers: list[Peer]) -> None:
    async with room(manager) as (url, given):
        peers.append(peer := Peer(url))
        await peer.connect()
        for number in range(3):  # the welcome is lost each time
            peer.cut()
            await away(manager)
            await manager.broadcast(str(number))
            assert (await peer.begin()).resumed
        peer.cut()
        await away(manager)
        token = peer.session.token
        assert (await peer.connect()).resumed
        assert await peer.receive(3) == ["0", "1", "2"]
        await peer.send("so it is ready")
        await until(lambda: given)
        assert peer.session.token != token
        peers.append(thief := Peer(url))
        stolen = await thief.begin(str(Hello(token, 0)))
        assert not stolen.resumed and stolen.client_id != peer.session.client_id
        await manager.broadcast("for both")
        assert await peer.receive(1) == ["for both"]
        assert manager.stats()["not_resumed"] == 1


async def test_a_handler_need_not_read_for_a_token_to_be_spent(manager: ConnectionManager, peers: list[Peer]) -> None:
    async def handler(ws: ServerConnection) -> None:
        await ws.wait_closed()

    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        token = peer.session.token
        peer.cut()
        await away(manager)
        await peer.connect()
        await (await peer.ws.ping())  # ready is there
        peers.append(thief := Peer(url))
        assert not (await thief.begin(str(Hello(token, 0)))).resumed


async def test_whoever_never_had_a_token_is_not_waited_for(manager: ConnectionManager, peers: list[Peer]) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.begin()
        peer.cut()
        await until(lambda: len(manager.registry) == 0)
        assert manager.stats()["interrupted"] == 0


@pytest.mark.parametrize("in_pieces", [False, True])
async def test_ready_may_come_in_pieces(manager: ConnectionManager, peers: list[Peer], in_pieces: bool) -> None:
    async with room(manager) as (url, given):
        peers.append(peer := Peer(url))
        peer.session.welcomed(await peer.begin())
        await peer.ws.send([READY[:5], READY[5:]] if in_pieces else f"{READY}   ")
        await peer.send("x")
        await until(lambda: given == ["x"])


async def test_a_client_takes_over_from_a_connection_that_looks_alive(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    async with room(manager) as (url, given):
        peers.append(peer := Peer(url))
        await peer.connect()
        former = peer.ws
        await manager.broadcast("lost with the former one")
        assert (await peer.connect()).resumed
        assert await close_of(former) == (4409, "its client goes on with another connection")
        await manager.broadcast("news")
        assert await peer.receive(2) == ["lost with the former one", "news"]
        await peer.send("x")
        await until(lambda: given == ["x"])
        assert len(manager.registry) == 1


async def test_a_hello_that_was_overtaken_takes_nothing_from_anybody(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    def identify(_: ServerConnection) -> dict[str, Any]:
        return {"client_id": "ann", "on_duplicate": "replace"}

    async with room(manager, identify=identify) as (url, given):
        peers.append(peer := Peer(url))
        await peer.connect()
        peer.cut()
        await until(lambda: len(manager.registry) == 0 or manager.stats()["away"] == 1)
        late = peer.session.hello()  # to a connection that is given up then
        assert (await peer.connect()).resumed
        for is_ready in (False, True):
            if is_ready:
                await peer.send("ready")
                await until(lambda: given == ["ready"])
            ws = await client(url, subprotocols=offers())
            await ws.send(late)
            assert (await close_of(ws))[0] == 1008
        await manager.send("ann", "still here")
        assert await peer.receive(1) == ["still here"]


async def test_two_that_have_the_same_token_do_not_both_get_the_session(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        peer.cut()
        await away(manager)
        twins = [Peer(url) for _ in range(4)]
        peers += twins
        welcomes = await asyncio.gather(*(twin.begin(peer.session.hello()) for twin in twins))
        assert all(each.resumed for each in welcomes)  # one after the other, as none was confirmed
        assert len({each.token for each in welcomes}) == 4
        await until(lambda: sum(twin.ws.close_code == 4409 for twin in twins) == 3)
        assert len(manager.registry) == 1


@pytest.mark.parametrize("token", ["", "x", "a" * 43, "é" * 43, "a" * 1000])
async def test_a_token_that_is_none_begins_a_new_session(
    manager: ConnectionManager, peers: list[Peer], token: str
) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        welcome = await peer.begin(str(Hello(token, 3)))
        assert not welcome.resumed and welcome.received == 0 and welcome.token


async def test_a_count_that_cannot_be_begins_a_new_session(manager: ConnectionManager, peers: list[Peer]) -> None:
    seen = Seen(manager, ConnectionClosed)
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        await manager.broadcast("one")
        peer.cut()
        await away(manager)
        welcome = await peer.begin(str(Hello(peer.session.token, 2)))
        assert not welcome.resumed
        assert [event.conn.client_id for event in seen] == [peer.session.client_id]  # type: ignore[attr-defined]


async def test_nobody_resumes_the_session_of_somebody_else(manager: ConnectionManager, peers: list[Peer]) -> None:
    def identify(ws: ServerConnection) -> dict[str, Any]:
        assert ws.request is not None
        user = ws.request.path.removeprefix("/")
        return {"user_id": user} if user else {}

    async with room(manager, identify=identify) as (url, _):
        peers.append(peer := Peer(f"{url}/ann"))
        await peer.connect()
        peer.cut()
        await away(manager)
        peers.append(other := Peer(f"{url}/bob"))
        other.session = peer.session
        assert not (await other.begin()).resumed
        assert manager.stats()["away"] == 1, "the session is not harmed"
        assert (await peer.connect()).resumed


async def test_who_is_not_let_in_any_more_does_not_resume(manager: ConnectionManager, peers: list[Peer]) -> None:
    is_banned = False

    async def identify(ws: ServerConnection) -> dict[str, Any] | None:
        return None if is_banned else {}

    async with room(manager, identify=identify) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        peer.cut()
        await away(manager)
        is_banned = True
        ws = await client(url, subprotocols=offers())
        assert (await close_of(ws))[0] == 1008
        assert manager.stats()["away"] == 1


# ---- the ends of a session -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4000, None])
async def test_a_client_that_closes_is_not_waited_for(
    manager: ConnectionManager, peers: list[Peer], code: int | None
) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        if code is None:  # a close frame without a code
            peer.ws.transport.write(masked(8, b""))
        else:
            await peer.ws.close(code)
        await until(lambda: len(manager.registry) == 0)
        assert not (await peer.begin()).resumed


async def test_whom_the_application_disconnects_is_not_waited_for(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    async with room(manager) as (url, _):
        for code in (1000, 1011, 4408):
            peers.append(peer := Peer(url))
            welcome = await peer.connect()
            await manager.disconnect(welcome.client_id, code)
            assert len(manager.registry) == 0
            assert not (await peer.begin()).resumed
            await peer.ws.close()
            await until(lambda: len(manager.registry) == 0)


@pytest.mark.usefixtures("fake_links")
async def test_nothing_is_kept_for_a_client_that_is_being_closed(
    manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[BroadcastResult] = []

    async def close(adapter: object, ws: FakeLink, code: int, reason: str) -> None:
        link_of(manager, conn).close()  # as a library does when its close frame is written
        with pytest.raises(PeerError):
            await manager.send(conn, "too late")
        late.append(await manager.broadcast("too late"))

    monkeypatch.setattr(FakeAdapter, "close", close)
    async with manager.attach(FakeLink(), hello=Hello()) as conn:
        await manager.disconnect(conn, 4001)
    assert [(result.dropped, result.away) for result in late] == [(1, 0)]


@pytest.mark.usefixtures("fake_links")
async def test_a_greeting_that_could_not_be_sent_is_let_go(manager: ConnectionManager) -> None:
    link = FakeLink(framing=None)
    link.gate.clear()
    async with manager.attach(link, hello=Hello()) as conn:
        assert link_of(manager, conn).messages == 1
        link_of(manager, conn).close()
        assert link_of(manager, conn).messages == 0
    assert manager.stats()["queued_bytes"] == 0


async def test_a_client_that_is_away_can_be_disconnected(manager: ConnectionManager, peers: list[Peer]) -> None:
    seen = Seen(manager, ConnectionClosed)
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        welcome = await peer.connect()
        peer.cut()
        await away(manager)
        await manager.disconnect(welcome.client_id, 4001, "enough")
        assert len(manager.registry) == 0
        assert [(event.code, event.reason, event.by) for event in seen] == [  # type: ignore[attr-defined]
            (4001, "enough", "us")
        ]
        assert not (await peer.begin()).resumed


async def test_a_handler_that_returns_has_finished_and_one_that_fails_has_not(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    async def handler(ws: ServerConnection) -> None:
        if await ws.recv() == "fail":
            raise RuntimeError("a bug")

    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        await peer.send("fail")
        assert (await close_of(peer.ws))[0] == 1011
        await away(manager)
        assert (await peer.connect()).received == 1, "the message that made it fail is not sent again"
        await peer.send("return")
        assert (await close_of(peer.ws))[0] == 1000
        await until(lambda: len(manager.registry) == 0)


@pytest.mark.parametrize("what", ["grace", "too many", "lifetime"])
async def test_a_client_is_waited_for_no_longer_than_the_policy_says(what: str, peers: list[Peer]) -> None:
    policy = {
        "grace": SessionPolicy(grace_s=0.05),
        "too many": SessionPolicy(max_away=1),
        "lifetime": SessionPolicy(lifetime_s=0.001),
    }[what]
    async with ConnectionManager(sessions=policy) as manager, room(manager) as (url, _):
        seen = Seen(manager, ConnectionClosed)
        peers.append(peer := Peer(url))
        await peer.connect()
        peer.cut()
        if what == "too many":
            await away(manager)
            peers.append(other := Peer(url))
            await other.connect()
            other.cut()
        if what == "lifetime":
            await away(manager)
        else:
            await until(lambda: seen)
            assert seen[0].code == 1006  # type: ignore[attr-defined]
            assert seen[0].conn.client_id == peer.session.client_id  # type: ignore[attr-defined]
        assert not (await peer.begin()).resumed


async def test_a_session_that_has_lasted_for_too_long_gives_way_to_its_own_client(peers: list[Peer]) -> None:
    policy = SessionPolicy(lifetime_s=0.001)
    async with (
        ConnectionManager(sessions=policy) as manager,
        room(manager, identify=lambda _: {"client_id": "ann"}) as (url, _),
    ):
        seen = Seen(manager, *LIFE)
        peers.append(peer := Peer(url))
        await peer.connect()
        former = peer.ws
        await (await former.ping())  # ready is there
        welcome = await peer.connect()
        assert not welcome.resumed and welcome.client_id == "ann"
        assert (await close_of(former))[0] == 4409
        assert [type(event) for event in seen] == [*LIFE[:2], ConnectionClosed, ConnectionOpened]


async def test_a_subscriber_may_end_whoever_it_is_told_of(manager: ConnectionManager, peers: list[Peer]) -> None:
    seen = Seen(manager, *LIFE)

    def end(event: ConnectionInterrupted) -> None:
        with contextlib.suppress(StopIteration):
            manager.disconnect(event.conn, 4001).send(None)

    manager.on(ConnectionInterrupted, end)
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        await peer.connect()  # takes over from the former one, which the subscriber ends
        await until(lambda: len(seen) == 4)
        assert [type(event) for event in seen] == [*LIFE[:2], ConnectionClosed, ConnectionOpened]
        assert manager.stats()["closed"] == 1 and manager.stats()["away"] == 0


async def test_a_client_is_interrupted_before_it_is_given_up(peers: list[Peer]) -> None:
    async with ConnectionManager(sessions=SessionPolicy(max_away=1)) as manager, room(manager) as (url, given):
        seen = Seen(manager, ConnectionInterrupted, ConnectionClosed)
        for number in range(3):
            peers.append(peer := Peer(url))
            await peer.connect()
            await peer.send(str(number))
            await until(lambda: len(given) == number + 1)  # noqa: B023
            peer.cut()
            await until(lambda: manager.stats()["interrupted"] == number + 1)  # noqa: B023
        ids = [peer.session.client_id for peer in peers]
        assert [(type(event), event.conn.client_id) for event in seen] == [  # type: ignore[attr-defined]
            (ConnectionInterrupted, ids[0]),
            (ConnectionInterrupted, ids[1]),
            (ConnectionClosed, ids[0]),
            (ConnectionInterrupted, ids[2]),
            (ConnectionClosed, ids[1]),
        ]


async def test_a_newcomer_with_the_id_of_a_client_that_is_away_takes_its_place(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    seen = Seen(manager, *LIFE)
    async with room(manager, identify=lambda _: {"client_id": "ann"}) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        (former,) = manager.registry.values()
        peer.cut()
        await away(manager)
        async with client(url):
            await until(lambda: len(seen) == 4)
            assert [type(event) for event in seen] == [*LIFE[:2], ConnectionClosed, ConnectionOpened]
            assert seen[2].conn is former and seen[2].code == 4409  # type: ignore[attr-defined]
            assert seen[2].groups == {"room"}  # type: ignore[attr-defined]
            (conn,) = manager.registry.values()
            assert conn is not former and manager.stats()["away"] == 0
        await until(lambda: len(manager.registry) == 0)
        assert not (await peer.begin()).resumed


async def test_a_record_that_was_taken_out_of_the_registry_is_not_resumed(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        welcome = await peer.connect()
        peer.cut()
        await away(manager)
        manager.registry.remove(welcome.client_id)
        assert not (await peer.begin()).resumed
        await until(lambda: manager.stats()["away"] == 0)
    assert manager.stats()["closed"] == 2 or await peer.ws.close() is None


async def test_a_handler_that_attaches_by_itself_ends_the_session(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    async def handler(ws: ServerConnection) -> None:
        async with manager.attach(ws, "mine"):
            await ws.send("hello")
            await ws.wait_closed()

    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        assert await received(peer.ws, 1) == ["hello"]
        peer.cut()
        await until(lambda: len(manager.registry) == 0)
        assert not (await peer.begin()).resumed


async def test_a_manager_that_closes_waits_for_nobody(peers: list[Peer]) -> None:
    async with ConnectionManager(drain=DrainPolicy(1012)) as manager:
        seen = Seen(manager, ConnectionClosed)
        async with room(manager) as (url, _):
            for _ in range(3):
                peers.append(Peer(url))
                await peers[-1].connect()
            peers[0].cut()
            await away(manager)
            report = await manager.close()
            assert (report.connections, report.away, report.cut_off) == (2, 1, 0)
            assert sorted(event.code for event in seen) == [1006, 1012, 1012]  # type: ignore[attr-defined]
    stats = manager.stats()
    assert stats["away"] == stats["kept_messages"] == stats["queued_bytes"] == 0 and stats["opened"] == stats["closed"]


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [SessionPolicy(max_messages=10), SessionPolicy(max_bytes=4096), SessionPolicy(max_age_s=0.02)],
    ids=["messages", "bytes", "age"],
)
async def test_who_was_away_for_too_much_is_told_so_and_starts_clean(policy: SessionPolicy, peers: list[Peer]) -> None:
    async with ConnectionManager(sessions=policy) as manager, room(manager) as (url, _):
        seen = Seen(manager, *LIFE)
        peers.append(peer := Peer(url))
        await peer.connect()
        (former,) = manager.registry.values()
        peer.cut()
        await away(manager)
        for number in range(11):
            await manager.broadcast(f"{number} {'x' * 500}")
        if policy.max_age_s < 1:
            await until(lambda: manager.stats()["kept_messages"] == 0)
        welcome = await peer.connect()
        assert not welcome.resumed and welcome.received == 0
        assert former.status is ConnectionStatus.OFFLINE
        (conn,) = manager.registry.values()
        assert conn is not former
        await manager.broadcast("news")
        assert await peer.receive(1) == ["news"]
        assert [type(event) for event in seen][1:] == [ConnectionInterrupted, ConnectionClosed, ConnectionOpened]


async def test_what_is_kept_is_let_go_with_the_last_session(manager: ConnectionManager, peers: list[Peer]) -> None:
    async with room(manager) as (url, _):
        peers.append(peer := Peer(url))
        await peer.connect()
        for number in range(100):
            await manager.broadcast(str(number))
        assert manager.stats()["kept_messages"] == 100
        await peer.receive(100)
        await peer.ws.close()
        await until(lambda: len(manager.registry) == 0)
        assert manager.stats()["kept_messages"] == manager.stats()["queued_bytes"] == 0


async def test_a_client_that_is_away_keeps_nothing_of_its_connection_alive(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    sockets: list[weakref.ref[ServerConnection]] = []

    async def handler(ws: ServerConnection) -> None:
        sockets.append(weakref.ref(ws))
        with contextlib.suppress(websockets.ConnectionClosed):
            await ws.recv()

    async with serving(handler, manager) as url:
        peers.append(peer := Peer(url))
        await peer.connect()
        peer.cut()
        await away(manager)

        def is_gone() -> bool:
            gc.collect()
            return sockets[0]() is None

        await until(is_gone)
        assert (await peer.connect()).resumed


@pytest.mark.parametrize("policy", ["disconnect", "drop_oldest", "keep"])
async def test_a_client_that_catches_up_slowly_gets_everything_in_order(policy: Any, peers: list[Peer]) -> None:
    backpressure = Backpressure(max_bytes=100_000, policy=policy)
    async with (
        ConnectionManager(backpressure=backpressure) as manager,
        room(manager, compression=None) as (url, _),
    ):
        peers.append(peer := Peer(url, compression=None))
        await peer.connect()
        peer.cut()
        await away(manager)
        for number in range(2000):
            manager.broadcast_nowait(f"{number} {'x' * 10_000}")
        assert (await peer.connect()).resumed
        (conn,) = manager.registry.values()
        await until(lambda: link_of(manager, conn).is_waiting)
        for number in range(2000, 2500):  # a hundred times the limit is ahead of these
            result = await manager.broadcast(f"{number} {'x' * 10_000}")
            assert result.away == 1
        messages = await peer.receive(2500)
        assert [str(message).split()[0] for message in messages] == [str(number) for number in range(2500)]
        assert not link_of(manager, conn).is_behind
        await manager.broadcast("live")
        assert await peer.receive(1) == ["live"]
        stats = manager.stats()
        assert stats["too_slow_by_bytes"] == stats["dropped_by_bytes"] == stats["away"] == 0


@pytest.mark.parametrize("count", [80, 800])
async def test_what_was_missed_leaves_before_the_close_of_a_handler_that_returns(count: int, peers: list[Peer]) -> None:
    backpressure = Backpressure(max_bytes=1_000_000)
    links: list[Any] = []

    async def handler(ws: ServerConnection) -> None:
        links.append(link_of(manager, ws.wsfast))  # type: ignore[attr-defined]
        if len(links) == 1:
            await ws.wait_closed()

    async with (
        ConnectionManager(backpressure=backpressure) as manager,
        serving(handler, manager, compression=None) as url,
    ):
        peers.append(peer := Peer(url, compression=None))
        await peer.connect()
        peer.cut()
        await away(manager)
        for number in range(count):
            await manager.broadcast(f"{number} {'x' * 10_000}")
        assert (await peer.connect()).resumed
        messages = [message async for message in peer.ws]
        assert peer.ws.close_code == 1000
        assert [str(message).split()[0] for message in messages] == [str(number) for number in range(len(messages))]
        # A transport is not given more than may wait for a connection, and one write.
        assert len(messages) == count if count * 10_010 < backpressure.max_bytes else 100 < len(messages) < count
        assert links[1].peak_bytes < 1_400_000
        await until(lambda: len(manager.registry) == 0)
        # One may have been in its outbox to be the next.
        assert count - len(messages) - 1 <= manager.stats()["dropped_by_closed"] <= count - len(messages)
        assert manager.stats()["queued_bytes"] == 0


async def test_what_is_kept_for_clients_that_are_away_is_not_held_against_those_who_are_slow(peers: list[Peer]) -> None:
    backpressure = Backpressure(max_total_bytes=2_000_000)
    async with (
        ConnectionManager(backpressure=backpressure) as manager,
        room(manager, compression=None) as (url, _),
        client(url, compression=None) as slow,
    ):
        (record,) = manager.registry.values()
        peers.append(peer := Peer(url, compression=None))
        welcome = await peer.connect()
        peer.cut()
        await away(manager)
        slow.transport.pause_reading()
        async with asyncio.timeout(DEADLINE_S):
            while not link_of(manager, record).is_waiting:
                await manager.broadcast("x" * 10_000, to=[record])
        for number in range(300):
            await manager.broadcast(f"{number} {'x' * 10_000}", to=[welcome.client_id])
        stats = manager.stats()
        assert stats["kept_bytes"] > 3_000_000 and stats["too_slow_by_budget"] == 0
        assert link_of(manager, record).is_open
        slow.transport.abort()
        assert (await peer.connect()).resumed
        assert len(await peer.receive(300)) == 300


async def test_what_the_transport_of_a_client_that_is_away_had_is_not_held_against_anybody(peers: list[Peer]) -> None:
    async with ConnectionManager() as manager, room(manager, compression=None) as (url, _):
        peers.append(peer := Peer(url, compression=None))
        await peer.connect()
        (conn,) = manager.registry.values()
        peer.ws.transport.pause_reading()
        async with asyncio.timeout(DEADLINE_S):
            while not link_of(manager, conn).is_waiting:
                await manager.broadcast("x" * 100_000)
        peer.cut()
        await away(manager)
        stats = manager.stats()
        assert stats["waiting"] == 0 and stats["kept_bytes"] <= stats["queued_bytes"] < stats["kept_bytes"] + 10_000


async def test_a_client_that_was_too_slow_comes_back_and_misses_nothing(peers: list[Peer]) -> None:
    backpressure = Backpressure(max_bytes=100_000)
    async with (
        ConnectionManager(backpressure=backpressure) as manager,
        room(manager, compression=None) as (url, _),
    ):
        seen = Seen(manager, ConnectionTooSlow)
        peers.append(peer := Peer(url, compression=None))
        await peer.connect()
        (conn,) = manager.registry.values()
        peer.ws.transport.pause_reading()
        sent = 0
        async with asyncio.timeout(DEADLINE_S):
            while not seen:
                await manager.broadcast(f"{sent} {'x' * 50_000}")
                sent += 1
        peer.cut()
        await away(manager)
        assert list(manager.registry.values()) == [conn]
        assert (await peer.connect()).resumed
        messages = await peer.receive(sent)
        assert [str(message).split()[0] for message in messages] == [str(number) for number in range(sent)]


async def test_messages_of_many_groups_come_in_the_order_in_which_they_were_sent(
    manager: ConnectionManager, peers: list[Peer]
) -> None:
    chance = random.Random(6)
    async with room(manager) as (url, _):
        for _ in range(5):
            peers.append(Peer(url))
            await peers[-1].connect()
        conns = [manager.registry[str(peer.session.client_id)] for peer in peers]
        groups = [f"group {number}" for number in range(8)]
        expected: list[list[str]] = [[] for _ in peers]
        for peer in peers[1:]:
            peer.cut()
        await away(manager, 4)
        for number in range(3000):
            kind, member, group, text = chance.random(), chance.randrange(5), chance.choice(groups), str(number)
            if kind < 0.1:
                conns[member].join(group)
            elif kind < 0.15:
                conns[member].leave(group)
            else:
                excluded = chance.random() < 0.3
                targets = [each for each, conn in enumerate(conns) if group in conn.groups]
                if kind < 0.2:
                    targets, excluded = [member], False
                    manager.broadcast_nowait(text, to=[conns[member]])
                elif kind < 0.3:
                    targets = [each for each in range(5) if chance.random() < 0.5]
                    manager.broadcast_nowait(text, to=[conns[each] for each in targets], exclude=conns[member])
                    excluded = True
                elif excluded:
                    manager.broadcast_nowait(text, group=group, exclude=conns[member])
                else:
                    manager.broadcast_nowait(text, group=group)
                for each in targets:
                    if not (excluded and each == member):
                        expected[each].append(text)
            if chance.random() < 0.01:
                await asyncio.sleep(0)
        for peer in peers[1:]:
            assert (await peer.connect()).resumed
        for peer, texts in zip(peers, expected, strict=True):
            assert await peer.receive(len(texts)) == texts


# ---- hostile clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hello",
    [b"{}", "", "nonsense", "[]", '{"wsfast": "ready"}', '{"wsfast": "hello", "received": -1}', "[" * 4000, "x" * 5000],
)
async def test_a_client_that_does_not_say_hello_is_told_why(manager: ConnectionManager, hello: str | bytes) -> None:
    async with room(manager) as (url, _):
        ws = await client(url, subprotocols=offers())
        await ws.send(hello)
        code, reason = await close_of(ws)
        assert code == 4400 and reason is not None and ("hello" in reason or "received" in reason)
        assert len(manager.registry) == 0


async def test_a_client_that_says_nothing_is_not_waited_for_long() -> None:
    async with ConnectionManager(sessions=SessionPolicy(hello_timeout_s=0.02)) as manager, room(manager) as (url, _):
        ws = await client(url, subprotocols=offers())
        assert await close_of(ws) == (4408, "hello has not come in time")


async def test_a_client_that_goes_before_it_says_hello_is_none(manager: ConnectionManager) -> None:
    seen = Seen(manager)
    async with room(manager) as (url, _):
        ws = await client(url, subprotocols=offers())
        await ws.close()
    assert not seen


@pytest.mark.parametrize("second", ["too early", READY.encode(), ["x" * 3000, "x" * 3000, "x" * 3000]])
async def test_a_client_that_is_not_ready_is_told_so(
    manager: ConnectionManager, peers: list[Peer], second: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with room(manager) as (url, given):
        peers.append(peer := Peer(url))
        await peer.begin()
        with contextlib.suppress(websockets.ConnectionClosed):
            await peer.ws.send(second)
            await peer.ws.send("more")
        assert await close_of(peer.ws) == (4400, "ready must come second")
        assert given == []
    assert not [record for record in caplog.records if record.exc_info]


async def test_settings_of_sessions_are_checked() -> None:
    for setting in ({"grace_s": 0}, {"max_messages": 0}, {"max_bytes": 1.5}, {"max_age_s": float("nan")}):
        with pytest.raises(InvalidSetting, match=f"sessions.{next(iter(setting))} must be"):
            SessionPolicy(**setting)  # type: ignore[arg-type]


# ---- everything at once ----------------------------------------------------------------------------------------------


class Weather:
    """What a link is like: after how many bytes, in each direction, the next ones break. None: they do not."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.is_bad = True
        self.links: set[asyncio.StreamWriter] = set()

    def bytes_left(self) -> int:
        return self.chance.choice((200, 700, 2_000, 20_000)) + self.chance.randrange(300) if self.is_bad else 2**40

    def strike(self) -> None:
        """Break all links there are."""
        for writer in list(self.links):
            writer.transport.abort()

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: asyncio.StreamWriter) -> None:
        left = self.bytes_left()
        with contextlib.suppress(ConnectionError):
            while data := await source.read(min(2**16, left)):
                left -= len(data)
                sink.write(data)
                await sink.drain()
                if left == 0:
                    break
        sink.transport.abort()
        back.transport.abort()


@contextlib.asynccontextmanager
async def through(weather: Weather, url: str) -> AsyncIterator[str]:
    """The address of a proxy before a server."""
    host, port = url.removeprefix("ws://").split(":")

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        ends = {writer, back}
        weather.links |= ends
        await asyncio.gather(weather.carry(reader, back, writer), weather.carry(there, writer, back))
        weather.links -= ends

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Restless(Peer):
    """A client that comes back whenever it is cut off, and sends what is in its queue."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.got: list[str | bytes] = []
        self.said: list[str | bytes] = []
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.is_known = False  # to the server, for sure

    async def live(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, websockets.WebSocketException, TimeoutError):
                welcome = await self.connect()
                assert welcome.resumed or not self.is_known, "only a session that the server knows us to have is kept"
                assert self.lost == 0
                self.is_known |= welcome.resumed
                if not welcome.resumed:
                    self.got.clear()
                    self.said.clear()
                speaking = asyncio.create_task(self.speak())
                try:
                    while True:
                        self.got.append(await self.ws.recv())
                        self.session.took()
                finally:
                    speaking.cancel()
                    await asyncio.gather(speaking, return_exceptions=True)

    async def speak(self) -> None:
        while True:
            message = await self.queue.get()
            self.said.append(message)
            await self.send(message)


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_or_doubled_however_often_links_break(seed: int) -> None:
    """Links that break at any byte, each way by itself: before and after each part of the handshake."""
    weather = Weather(random.Random(seed))
    chance, given = weather.chance, dict[str, list[str | bytes]]()

    async def handler(ws: ServerConnection) -> None:
        conn = ws.wsfast  # type: ignore[attr-defined]
        conn.join("all")
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                given.setdefault(conn.client_id, []).append(message)

    async with ConnectionManager() as manager, serving(handler, manager) as server, through(weather, server) as url:
        clients = [Restless(url) for _ in range(4)]
        tasks = [asyncio.create_task(each.live()) for each in clients]
        await until(lambda: all(str(each.session.client_id) in manager.registry for each in clients))
        await until(lambda: len(manager.registry.group("all")) >= 3)
        sent = []
        for number in range(400):
            sent.append(f"{number} {'x' * chance.choice((1, 100, 5000))}")
            manager.broadcast_nowait(sent[-1], group="all")
            for each in clients:
                if chance.random() < 0.3:
                    each.queue.put_nowait(str(number))
            if chance.random() < 0.05:
                weather.strike()
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
        weather.is_bad = False
        weather.strike()
        for each in clients:
            await until(lambda: each.got[-1:] == sent[-1:] and each.queue.empty())  # noqa: B023
            assert each.got == sent[-len(each.got) :], "all since it began, once and in order"
            await until(lambda: given[str(each.session.client_id)] == each.said)  # noqa: B023
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome
        for each in clients:
            await each.ws.close()
        assert manager.stats()["resumed"] > 10 and manager.stats()["not_resumed"] == 0


@pytest.mark.parametrize("seed", range(2))
async def test_the_client_of_the_package_misses_nothing(seed: int) -> None:
    weather = Weather(random.Random(seed))
    given: list[str | bytes] = []
    states: list[State] = []

    async def handler(ws: ServerConnection) -> None:
        ws.wsfast.join("all")  # type: ignore[attr-defined]
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in ws:
                given.append(message)

    at_once = ReconnectPolicy.only(FullJitter(0.001, 0.01))
    herd = HerdPolicy(accept_rate=1e6, window_s=0)
    async with ConnectionManager(herd=herd) as manager, serving(handler, manager) as server:
        async with through(weather, server) as url, connect(url, policy=at_once, on_state=states.append) as client:
            # So far, the server cannot know that the client has its token.
            await client.send("known")
            await until(lambda: given == ["known"])
            given.clear()
            sent = [f"{number} {'x' * weather.chance.choice((1, 100, 5000))}" for number in range(300)]
            got: list[str | bytes] = []
            for number, message in enumerate(sent):
                manager.broadcast_nowait(message, group="all")
                await client.send(str(number))
                if number % 30 == 0:
                    weather.strike()
                    times = len(states)
                    await until(lambda: isinstance(states[-1], Connected) and len(states) > times)  # noqa: B023
            weather.is_bad = False
            async with asyncio.timeout(DEADLINE_S):
                while len(got) < len(sent):
                    got.append(await client.recv())
            await until(lambda: len(given) == len(sent))
        assert got == sent and given == [str(number) for number in range(300)]
        connected = [state for state in states if isinstance(state, Connected)]
        assert len(connected) > 5 and all(state.lost == 0 for state in connected)
        await until(lambda: len(manager.registry) == 0)
