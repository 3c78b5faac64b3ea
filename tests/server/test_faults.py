"""What breaks at one connection concerns that connection alone: adapters that raise, transports that end in the middle
of a turn, peers that close half of their connection, subscribers that write in the middle of a flush.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory

from tests.server.conftest import (
    DEADLINE_S,
    FakeAdapter,
    FakeLink,
    RawPeer,
    Seen,
    client,
    link_of,
    received,
    serving,
    until,
)
from wsfast import Backpressure, ConnectionClosed, ConnectionManager, SendFailed, adapters
from wsfast.adapters import PLAIN, Framing

KEEP = Backpressure(policy="keep")


@pytest.fixture
async def manager() -> AsyncIterator[ConnectionManager]:
    """What is tested here is the same with every registry."""
    async with ConnectionManager() as manager:
        yield manager
    assert manager.stats()["event_errors"] == 0


class Broken(Exception):
    """What a broken adapter raises."""


class BrokenLink(FakeLink):
    """A connection for which some methods of its adapter raise."""

    def __init__(self, *methods: str, framing: Framing | None = PLAIN) -> None:
        super().__init__(framing)
        self.methods = methods


class BreakingAdapter(FakeAdapter):
    """Raises where a :class:`BrokenLink` says so."""

    @staticmethod
    def check(ws: FakeLink, method: str) -> None:
        if method in getattr(ws, "methods", ()):
            raise Broken(method)

    def framing(self, ws: FakeLink) -> Framing | None:
        self.check(ws, "framing")
        return super().framing(ws)

    def is_open(self, ws: FakeLink) -> bool:
        self.check(ws, "is_open")
        return super().is_open(ws)

    def buffered(self, ws: FakeLink) -> int:
        self.check(ws, "buffered")
        return super().buffered(ws)

    def write(self, ws: FakeLink, data: bytes) -> int:
        self.check(ws, "write")
        return super().write(ws, data)

    def when_written(self, ws: FakeLink, link: Any) -> None:
        self.check(ws, "when_written")
        super().when_written(ws, link)

    async def send(self, ws: FakeLink, message: str | bytes) -> None:
        self.check(ws, "send")
        await super().send(ws, message)

    async def close(self, ws: FakeLink, code: int, reason: str) -> None:
        self.check(ws, "close")
        await super().close(ws, code, reason)

    def abort(self, ws: FakeLink) -> None:
        self.check(ws, "abort")
        super().abort(ws)


@pytest.fixture
def breaking_links(fake_links: None) -> None:
    adapters.register_adapter(BreakingAdapter())


@pytest.fixture
def uncaught() -> Callable[[], list[Any]]:
    """What nobody has caught on the running loop since the first call of this."""
    seen: list[Any] = []

    def watch() -> list[Any]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
        return seen

    return watch


# ---- adapters that raise -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("breaking_links")
class TestAdapters:
    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize(
        "methods",
        [
            ("write",),
            ("buffered",),
            ("is_open",),
            ("when_written",),
            ("send",),
            ("write", "abort"),
            ("when_written", "abort"),
            ("send", "abort"),
        ],
        ids="+".join,
    )
    async def test_what_an_adapter_raises_for_one_stops_nothing_for_the_others(
        self, methods: tuple[str, ...], place: int, uncaught: Callable[[], list[Any]]
    ) -> None:
        """Failures are data: counted, published, and never an exception from the middle of a fan-out. An adapter that
        cannot even abort is no reason to strand those who come after it in the same flush."""
        errors = uncaught()
        async with ConnectionManager(threads=1, backpressure=KEEP) as manager, contextlib.AsyncExitStack() as stack:
            failures = Seen(manager, SendFailed)
            links = [FakeLink(), FakeLink()]
            broken = BrokenLink(framing=None if "send" in methods else PLAIN)
            links.insert(place, broken)
            records = [
                await stack.enter_async_context(manager.attach(link, str(number))) for number, link in enumerate(links)
            ]
            if "when_written" in methods:
                broken.in_buffer = 5
            broken.methods = methods
            async with asyncio.timeout(DEADLINE_S):
                result = await manager.broadcast("1", to=["0", "1", "2"])
            assert result.targets == 3 == result.sent + result.queued + result.dropped + result.failed
            await until(lambda: failures)
            assert [type(event.error) for event in failures] == [Broken]  # type: ignore[attr-defined]
            assert failures[0].conn is records[place]  # type: ignore[attr-defined]
            assert records[place].errors_out == 1
            broken.methods = ()
            async with asyncio.timeout(DEADLINE_S):
                await manager.broadcast("2")
            others = [link for link in links if link is not broken]
            assert [link.got for link in others] == [["1", "2"]] * 2
            assert "2" not in broken.got
            assert broken.aborted or "abort" in methods
        assert errors == []

    async def test_all_of_a_large_fan_out_but_the_broken_get_it(self, uncaught: Callable[[], list[Any]]) -> None:
        errors = uncaught()
        async with ConnectionManager(threads=1) as manager, contextlib.AsyncExitStack() as stack:
            links = [BrokenLink() if number % 7 == 0 else FakeLink() for number in range(300)]
            for link in links:
                await stack.enter_async_context(manager.attach(link))
            broken = [link for link in links if isinstance(link, BrokenLink)]
            for link in broken:
                link.methods = ("write", "abort")
            async with asyncio.timeout(DEADLINE_S):
                result = await manager.broadcast("x")
            assert (result.sent, result.failed) == (300 - len(broken), len(broken))
            assert all(link.got == ["x"] for link in links if link not in broken)
            for link in broken:
                link.methods = ()
        assert errors == []

    @pytest.mark.parametrize("methods", [("abort",), ("close", "abort")], ids="+".join)
    async def test_a_manager_ends_though_its_adapter_can_end_nothing(self, methods: tuple[str, ...]) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        closed = Seen(manager, ConnectionClosed)
        await manager.start()
        links = [FakeLink(), BrokenLink(), FakeLink()]
        for link in links:
            await manager.attach(link).__aenter__()
            link.in_buffer = 1
        manager.broadcast_nowait("x")
        await until(lambda: manager.stats()["waiting"] == 3)
        links[1].methods = methods  # type: ignore[attr-defined]
        async with asyncio.timeout(DEADLINE_S):
            report = await manager.close(timeout_s=0)
        assert report.connections == 3
        assert len(closed) == 3
        assert len(manager.registry) == 0
        assert not links[0].open and not links[2].open

    async def test_a_connection_that_could_not_be_attached_leaves_everybody_exact(self) -> None:
        """Nobody is missed and nobody is counted twice; and a broadcast to everybody need not ask the registry for
        each of them from then on."""
        async with ConnectionManager() as manager, contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(manager.attach(FakeLink(), "first"))
            assert manager._delivery._matching({}) is None
            with pytest.raises(Broken):
                await manager.attach(BrokenLink("framing"), "broken").__aenter__()
            assert list(manager.registry) == ["first"]
            assert manager._delivery._matching({}) is None
            second = await stack.enter_async_context(manager.attach(FakeLink(), "second"))
            result = await manager.broadcast("x")
            assert (result.targets, result.sent) == (2, 2)
            manager.registry.add("without a connection")
            result = await manager.broadcast("y")
            assert (result.targets, result.sent, result.dropped) == (3, 2, 1)
            manager.registry.remove("without a connection")
            assert [conn.conn.got for conn in (first, second)] == [["x", "y"]] * 2

    async def test_the_id_of_a_connection_that_could_not_be_attached_is_free(self) -> None:
        async with ConnectionManager() as manager:
            link = BrokenLink("framing")
            with pytest.raises(Broken):
                await manager.attach(link, "a").__aenter__()
            link.methods = ()
            async with manager.attach(link, "a") as conn:
                await conn.send("x")
            assert link.got == ["x"]


# ---- connections to which only the library can send ----------------------------------------------------------------


class OwnDeflate(PerMessageDeflate):
    """An extension that wsfast does not know."""


class OwnFactory(ServerPerMessageDeflateFactory):
    def process_request_params(self, *args: Any) -> Any:
        params, extension = super().process_request_params(*args)
        extension.__class__ = OwnDeflate
        return params, extension


@pytest.mark.parametrize("how", ["send", "broadcast", "broadcast_nowait"])
@pytest.mark.parametrize("known", [True, False], ids=["plain", "by the library"])
async def test_the_last_words_of_a_handler_arrive(manager: ConnectionManager, known: bool, how: str) -> None:
    """What was sent before the handler returned leaves before the close frame, whoever puts it into frames."""

    async def handler(ws: Any) -> None:
        for word in ("hello", "and", "bye"):
            if how == "send":
                await ws.wsfast.send(word)
            elif how == "broadcast":
                await manager.broadcast(word)
            else:
                manager.broadcast_nowait(word)

    options: dict[str, Any] = {} if known else {"extensions": [OwnFactory()]}
    async with serving(handler, manager, compression=None, **options) as url, client(url) as ws:
        assert await received(ws, 3) == ["hello", "and", "bye"]
        async with asyncio.timeout(DEADLINE_S):
            await ws.wait_closed()
        assert ws.close_code == 1000


# ---- transports that end in the middle of a turn -------------------------------------------------------------------


async def park(ws: ServerConnection) -> None:
    await ws.wait_closed()


async def park_shrunk(ws: ServerConnection) -> None:
    """Let the kernel keep as little as it can."""
    ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await ws.wait_closed()


@pytest.mark.parametrize("order", ["push first", "end first"])
@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("managed", [True, False], ids=["managed", "the library's own"])
async def test_nothing_is_sent_into_a_transport_that_was_ended_in_the_same_turn(
    manager: ConnectionManager, managed: bool, end: str, order: str
) -> None:
    """The direct path holds only while the transport is open. If somebody ends a transport behind its library's back,
    that is known when the transport tells, in the next turn: until then the descriptor is the connection's."""
    closed = Seen(manager, ConnectionClosed)

    async def attaching(ws: ServerConnection) -> None:
        async with manager.attach(ws):
            await park(ws)

    async with serving(park if managed else attaching, manager if managed else None, compression=None) as url:
        peer, other = await RawPeer.connect(url), await RawPeer.connect(url)
        await until(lambda: len(manager.registry) == 2)
        names = {conn.conn.remote_address: conn for conn in manager.registry.values()}
        conn: Any = names[peer.sock.getsockname()]
        if managed:
            await until(lambda: link_of(manager, conn).is_direct)
        transport = conn.conn.transport
        if order == "end first":
            getattr(transport, end)()
        message = manager._delivery._broadcast("late")
        if order == "push first":
            getattr(transport, end)()
        await until(lambda message=message: message.pending == 0)  # type: ignore[misc]
        too_early = managed and order == "push first"
        assert (message.targets, message.sent, message.queued) == (2, 1 + too_early, 0)
        assert message.dropped + message.failed == 1 - too_early
        del message  # which is kept as long as somebody asks for its outcome
        assert conn.messages_out == too_early
        assert await peer.messages(lambda come: come and come[-1][0] > 7) == [(1, b"late")] * too_early
        assert await other.read(6) == b"\x81\x04late"
        await until(lambda: len(manager.registry) == 1)
        assert [(event.conn, event.code) for event in closed] == [(conn, 1006)]  # type: ignore[attr-defined]
        assert (await manager.broadcast("next")).targets == 1
        other.reset()
        await until(lambda: len(manager.registry) == 0)
        assert manager.stats()["queued_bytes"] == 0


# ---- peers that close half of their connection ---------------------------------------------------------------------


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "the library's own"])
class TestHalfClosed:
    """A WebSocket has no half-closed state (RFC 6455, 7.1.1): who will say nothing more is gone."""

    @staticmethod
    @contextlib.asynccontextmanager
    async def two(manager: ConnectionManager, managed: bool) -> AsyncIterator[tuple[RawPeer, Any, RawPeer]]:
        """A peer with small buffers and its record, and one without."""

        async def attaching(ws: ServerConnection) -> None:
            async with manager.attach(ws):
                await park_shrunk(ws)

        options: dict[str, Any] = {"compression": None, "close_timeout": 0.2, "ping_interval": None}
        handler, of = (park_shrunk, manager) if managed else (attaching, None)
        async with serving(handler, of, **options) as url:
            half = await RawPeer.connect(url, receive_buffer=4096)
            await until(lambda: len(manager.registry) == 1)
            (conn,) = manager.registry.values()
            other = await RawPeer.connect(url)
            await until(lambda: len(manager.registry) == 2)
            try:
                yield half, conn, other
            finally:  # the server waits for both
                half.reset()
                other.reset()
            await until(lambda: len(manager.registry) == 0)
            assert manager.stats()["queued_bytes"] == 0

    async def test_who_will_say_nothing_more_is_gone(self, manager: ConnectionManager, managed: bool) -> None:
        closed = Seen(manager, ConnectionClosed)
        async with self.two(manager, managed) as (half, conn, other):
            half.sock.shutdown(socket.SHUT_WR)
            await until(lambda: closed)
            assert closed[0].conn is conn  # type: ignore[attr-defined]
            assert (closed[0].code, closed[0].by) == (1006, "network")  # type: ignore[attr-defined]
            assert (await manager.broadcast("x")).targets == 1
            assert await other.read(3) == b"\x81\x01x"
            assert await half.messages(lambda _: False) == []

    async def test_in_the_middle_of_messages_that_it_reads(self, manager: ConnectionManager, managed: bool) -> None:
        """It gets whole frames and the end, or all and the end: never half a frame and another."""
        async with self.two(manager, managed) as (half, _, other):
            sent = [(2, bytes([number]) * 3000) for number in range(20)]
            for number, (_, message) in enumerate(sent):
                manager.broadcast_nowait(message)
                if number == 10:
                    half.sock.shutdown(socket.SHUT_WR)
                await asyncio.sleep(0)
            come = await half.messages(lambda _: False)
            assert come == sent[: len(come)]
            assert await other.messages(lambda come: len(come) == 20) == sent

    async def test_before_the_loop_has_seen_it(self, manager: ConnectionManager, managed: bool) -> None:
        async with self.two(manager, managed) as (half, _, other):
            half.sock.shutdown(socket.SHUT_WR)
            message = manager._delivery._broadcast("x")
            manager._delivery._flush(is_whole=True)
            assert (message.targets, message.sent) == (2, 2)
            del message  # which is kept as long as somebody asks for its outcome
            assert await half.messages(lambda _: False) == [(1, b"x")]
            assert await other.read(3) == b"\x81\x01x"

    async def test_one_that_does_not_read_either_is_forgotten(self, managed: bool) -> None:
        """What its transport has will never leave; asyncio waits for that before it says that the connection is lost,
        and the library waits for asyncio. It must not stay for ever: at the latest, what waits for it is too old."""
        manager = ConnectionManager(backpressure=Backpressure(max_age_s=0.3))
        closed = Seen(manager, ConnectionClosed)
        async with manager, self.two(manager, managed) as (half, conn, other):
            manager.broadcast_nowait(bytes(500_000), to=[conn])
            await until(lambda: conn.conn.transport.get_write_buffer_size())
            half.sock.shutdown(socket.SHUT_WR)
            await until(lambda: closed)
            assert closed[0].conn is conn  # type: ignore[attr-defined]
            await until(lambda: manager.stats()["queued_bytes"] == 0)
            assert (await manager.broadcast("x")).targets == 1
            assert await other.read(3) == b"\x81\x01x"

    async def test_one_that_will_read_nothing_more_is_a_slow_one(self, managed: bool) -> None:
        """Linux goes on to take what fits into the buffer of a peer that has shut down its reading side."""
        manager = ConnectionManager(backpressure=Backpressure(max_bytes=2**16, policy="disconnect"))
        closed = Seen(manager, ConnectionClosed)
        async with manager, self.two(manager, managed) as (half, conn, other):
            half.sock.shutdown(socket.SHUT_RD)
            reading = asyncio.create_task(other.messages(lambda come: come and come[-1][0] == 1))
            for number in range(100):
                manager.broadcast_nowait(number.to_bytes(1, "big") * 4096)
                await until(lambda: not manager._delivery._fanout.in_line)
            manager.broadcast_nowait("end")
            come = await reading
            assert come == [*((2, number.to_bytes(1, "big") * 4096) for number in range(100)), (1, b"end")]
            await until(lambda: closed)
            assert closed[0].conn is conn  # type: ignore[attr-defined]


# ---- subscribers that write in the middle of a flush ---------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("failing", [1, 70])
async def test_what_a_subscriber_writes_by_the_library_lands_inside_no_frame(threads: int, failing: int) -> None:
    """A subscriber of SendFailed may write to any other connection, by the library's own means and at once. If that
    connection has sent a part of a frame, the rest goes first."""
    async with (
        ConnectionManager(threads=threads, backpressure=KEEP) as manager,
        serving(park_shrunk, manager, compression=None, ping_interval=None, close_timeout=0.2) as url,
    ):
        gone = [await RawPeer.connect(url) for _ in range(failing)]
        slow = [await RawPeer.connect(url, receive_buffer=4096) for _ in range(3)]
        await until(lambda: len(manager.registry) == failing + 3)
        by_name = {conn.conn.remote_address: conn for conn in manager.registry.values()}
        conns: list[Any] = [by_name[peer.sock.getsockname()] for peer in [*gone, *slow]]
        for conn in conns:
            await until(lambda conn=conn: link_of(manager, conn).is_direct)  # type: ignore[misc]
        others = [conn.conn for conn in conns[failing:]]
        told = 0

        def tell(_: SendFailed) -> None:
            nonlocal told
            told += 1
            broadcast(others, b"other")

        manager.on(SendFailed, tell)
        for peer in gone:
            peer.reset()
        try:
            message = bytes(200_000)
            manager.broadcast_nowait(message, to=conns)
            manager._delivery._flush(is_whole=True)  # before the loop sees that they are gone
            await until(lambda: told == failing)
            for peer in slow:
                come = await peer.messages(lambda come: len(come) == failing + 1)
                assert sorted(come, key=lambda each: len(each[1])) == [(2, b"other")] * failing + [(2, message)]
        finally:
            for peer in slow:  # the server waits for them
                peer.reset()
