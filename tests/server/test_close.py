"""The end of a manager: what waits is delivered first, what cannot be is reported, and no peer holds it up for long."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import (
    FakeAdapter,
    FakeLink,
    RawPeer,
    Seen,
    client,
    close_of,
    link_of,
    masked,
    received,
    serving,
    until,
)
from wsfast import Backpressure, ConnectionClosed, ConnectionManager, DrainPolicy
from wsfast.delivery import Undelivered

GOING_AWAY = (8, (1001).to_bytes(2, "big") + b"the server is going away")
KEEP = Backpressure(policy="keep")


async def park(ws: ServerConnection) -> None:
    ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    await ws.wait_closed()


async def slow_peer(url: str, manager: ConnectionManager) -> tuple[RawPeer, Any]:
    peer = await RawPeer.connect(url, receive_buffer=8192)
    await until(lambda: len(manager.registry) == 1)
    return peer, next(iter(manager.registry.values()))


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "the library's own"])
async def test_a_slow_reader_that_begins_late_gets_everything_and_then_1001(managed: bool) -> None:
    manager = ConnectionManager(backpressure=KEEP)
    closed = Seen(manager, ConnectionClosed)

    async def attaching(ws: ServerConnection) -> None:
        async with manager.attach(ws):
            await park(ws)

    options: dict[str, Any] = {"compression": None, "close_timeout": 0.5}
    async with manager, serving(park if managed else attaching, manager if managed else None, **options) as url:
        peer, _ = await slow_peer(url, manager)
        messages = [number.to_bytes(4, "big") * 20_000 for number in range(20)]
        for message in messages:
            manager.broadcast_nowait(message)
        closing = asyncio.create_task(manager.close(timeout_s=60))
        await until(lambda: manager.stats()["waiting"] == 1)
        assert not closing.done()
        come = await peer.messages(lambda come: come and come[-1][0] == 8)
        assert come == [*((2, message) for message in messages), GOING_AWAY]
        await peer.send(masked(8, (1001).to_bytes(2, "big")))
        report = await closing
        assert (report.connections, report.cut_off, report.undelivered) == (1, 0, ())
        assert report.seconds > 0
        assert [(event.code, event.by) for event in closed] == [(1001, "us")]  # type: ignore[attr-defined]


async def test_what_a_peer_never_reads_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        ConnectionManager(backpressure=KEEP) as manager,
        serving(park, manager, close_timeout=60, compression=None) as url,
    ):
        peer, conn = await slow_peer(url, manager)
        async with client(url) as polite:
            await until(lambda: len(manager.registry) == 2)
            for _ in range(30):
                await manager.broadcast(bytes(100_000))
            assert len(await received(polite, 30)) == 30
            waits = link_of(manager, conn).messages
            with caplog.at_level(logging.WARNING):
                report = await manager.close(timeout_s=0.4)
            assert await close_of(polite) == (1001, "the server is going away")
        assert (report.connections, report.cut_off) == (2, 1)
        (undelivered,) = report.undelivered
        assert undelivered.client_id == conn.client_id
        assert undelivered.messages == waits + 1 > 20  # the one that was begun is not delivered either
        assert undelivered.nbytes > 100_000 * waits
        assert f"{undelivered.messages} messages undelivered to 1 slow connections" in caplog.text
        peer.close()


@pytest.mark.usefixtures("fake_links")
class TestFakes:
    async def test_what_waits_without_time_is_reported(self) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        await manager.attach(link := FakeLink(), "a").__aenter__()
        await manager.attach(FakeLink(), "b").__aenter__()
        link.in_buffer = 3
        manager.broadcast_nowait("1")
        await until(lambda: link.waiting)
        manager.broadcast_nowait("22", to="a")
        manager.broadcast_nowait("333", to="a")
        report = await manager.close(timeout_s=0)
        assert (report.connections, report.cut_off) == (2, 1)
        assert report.undelivered == (Undelivered("a", 3, 3 + 4 + 5),)

    async def test_the_rest_of_one_frame_is_one_message(self) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        await manager.attach(link := FakeLink(), "a").__aenter__()
        link.in_buffer = 3
        manager.broadcast_nowait("1")
        await until(lambda: link.waiting)
        report = await manager.close(timeout_s=0.1)
        assert report.undelivered == (Undelivered("a", 1, 3),)

    async def test_what_leaves_at_once_when_the_transport_is_empty_is_all_that_is_waited_for(self) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        await manager.attach(link := FakeLink(), "a").__aenter__()
        link.in_buffer = 3
        manager.broadcast_nowait("1")
        await until(lambda: link.waiting)
        manager.broadcast_nowait("2")
        closing = asyncio.create_task(manager.close(timeout_s=600))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        link.drain()
        async with asyncio.timeout(10):
            report = await closing
        assert link.got == ["1", "2"]
        assert (report.cut_off, report.undelivered) == (0, ())

    async def test_what_only_the_library_can_send_is_delivered_too(self) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        await manager.attach(link := FakeLink(None), "a").__aenter__()
        link.gate.clear()
        for number in range(3):
            manager.broadcast_nowait(str(number))
        closing = asyncio.create_task(manager.close(timeout_s=600))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        link.gate.set()
        async with asyncio.timeout(10):
            report = await closing
        assert link.got == ["0", "1", "2"]
        assert (report.cut_off, report.undelivered) == (0, ())

    async def test_what_only_the_library_can_send_and_does_not_is_reported(self) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        await manager.attach(link := FakeLink(None), "a").__aenter__()
        link.gate.clear()
        manager.broadcast_nowait("0")
        await until(lambda: link_of(manager, manager.registry["a"]).is_blocked)
        for _ in range(3):
            manager.broadcast_nowait("123")  # frames of 5 bytes
        report = await manager.close(timeout_s=0.1)
        (undelivered,) = report.undelivered
        assert undelivered.client_id == "a"
        assert undelivered.messages >= 3
        assert undelivered.nbytes >= 15

    async def test_nobody_is_sent_to_after_its_close_has_begun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = asyncio.Event()

        async def close(_: Any, ws: FakeLink, code: int, reason: str) -> None:
            ws.open = False
            await gate.wait()

        monkeypatch.setattr(FakeAdapter, "close", close)
        manager = ConnectionManager()
        await manager.start()
        await manager.attach(link := FakeLink(), "a").__aenter__()
        closing = asyncio.create_task(manager.close())
        await until(lambda: not link.open)
        assert (await manager.broadcast("late")).dropped == 1
        gate.set()
        assert (await closing).undelivered == ()
        assert link.got == []

    @pytest.mark.parametrize(("timeout_s", "pause_s"), [(60, 0.01), (0.2, 0.005)])
    async def test_closes_begin_at_a_bounded_pace(
        self, monkeypatch: pytest.MonkeyPatch, timeout_s: float, pause_s: float
    ) -> None:
        pauses: list[tuple[float, int]] = []
        begun = 0

        class Paused:
            """asyncio, but a pause is as long as it takes for what has begun."""

            def __getattr__(self, name: str) -> Any:
                return getattr(asyncio, name)

            async def sleep(self, seconds: float) -> None:
                for _ in range(5):
                    await asyncio.sleep(0)
                pauses.append((seconds, begun))

        async def close(_: Any, ws: FakeLink, code: int, reason: str) -> None:
            nonlocal begun
            begun += 1
            ws.open = False

        monkeypatch.setattr(FakeAdapter, "close", close)
        manager = ConnectionManager(drain=DrainPolicy(batch=10, pause_s=0.01))
        await manager.start()
        for number in range(95):
            await manager.attach(FakeLink(), str(number)).__aenter__()
        monkeypatch.setattr("wsfast.manager.asyncio", Paused())
        report = await manager.close(timeout_s)
        monkeypatch.undo()
        assert [count for _, count in pauses] == [*range(10, 91, 10), 95]
        assert [pause for pause, _ in pauses] == pytest.approx([*[pause_s] * 9, pause_s / 2])
        assert (report.connections, report.cut_off) == (95, 0)

    async def test_closing_what_was_never_started_or_is_closed_reports_nothing(self) -> None:
        manager = ConnectionManager()
        report = await manager.close()
        assert (report.connections, report.cut_off, report.undelivered) == (0, 0, ())


class TestSlow:
    """Those for whom something waits when the manager closes."""

    @pytest.mark.usefixtures("fake_links")
    async def test_their_closes_too_begin_at_a_bounded_pace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The time to drain ends for all of them at once. Their clients come back at the pace of the closes, wherever
        they connect to then. A slow machine only makes the pace slower."""
        drain = DrainPolicy(batch=10, pause_s=0.05)
        begun: list[float] = []

        async def close(_: Any, ws: FakeLink, code: int, reason: str) -> None:
            begun.append(asyncio.get_running_loop().time())
            ws.open = False
            raise TimeoutError

        monkeypatch.setattr(FakeAdapter, "close", close)
        manager = ConnectionManager(drain=drain, backpressure=KEEP)
        await manager.start()
        for number in range(50):
            link = FakeLink()
            link.in_buffer = 10
            await manager.attach(link, str(number)).__aenter__()
        await manager.broadcast("x")
        closing = asyncio.create_task(manager.close(timeout_s=1.6))  # of which a half is for what waits
        counts = [0]
        while not closing.done():
            await asyncio.sleep(0)
            counts.append(len(begun))
        report = await closing
        assert (report.connections, report.cut_off, len(begun)) == (50, 0, 50)
        assert len(report.undelivered) == 50
        assert max(after - before for before, after in itertools.pairwise(counts)) <= drain.batch
        # Four pauses; three, since the first may have begun long before what it follows.
        assert begun[-1] - begun[0] >= 3 * drain.pause_s

    @pytest.mark.parametrize("managed", [True, False], ids=["managed", "the library's own"])
    async def test_what_is_delivered_after_the_close_has_begun_is_not_reported(self, managed: bool) -> None:
        """What waits when the time to drain is over goes to the transport, before the close frame. A peer that reads
        on in the other half of the time gets it."""
        manager = ConnectionManager(backpressure=KEEP)

        async def attaching(ws: ServerConnection) -> None:
            async with manager.attach(ws):
                await park(ws)

        await manager.start()
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": 5}
        async with serving(park if managed else attaching, manager if managed else None, **options) as url:
            peer, conn = await slow_peer(url, manager)
            ws = conn.conn
            for number in range(40):
                manager.broadcast_nowait(number.to_bytes(1, "big") * 4096)
                await asyncio.sleep(0)
            closing = asyncio.create_task(manager.close(timeout_s=2))
            try:
                await until(lambda: ws.protocol.close_sent is not None)
                assert not closing.done()
                come = await peer.messages(lambda come: come and come[-1][0] == 8)
                assert come == [*((2, number.to_bytes(1, "big") * 4096) for number in range(40)), GOING_AWAY]
                await peer.send(masked(8, (1001).to_bytes(2, "big")))
                peer.sock.shutdown(socket.SHUT_WR)
                report = await closing
                assert (report.connections, report.cut_off, report.undelivered) == (1, 0, ())
            finally:
                peer.reset()

    async def test_who_resets_the_connection_has_not_got_it(self) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        async with serving(park, manager, compression=None, ping_interval=None, close_timeout=5) as url:
            peer, conn = await slow_peer(url, manager)
            ws = conn.conn
            for _ in range(5):
                manager.broadcast_nowait(bytes(100_000))
                await asyncio.sleep(0)
            closing = asyncio.create_task(manager.close(timeout_s=1.6))
            await until(lambda: ws.protocol.close_sent is not None)
            peer.reset()
            report = await closing
            (undelivered,) = report.undelivered
            assert undelivered.messages == 5
            assert 400_000 < undelivered.nbytes < 5 * 100_010

    async def test_what_is_delivered_in_part_is_reported_in_part(self) -> None:
        """A peer may read some of it after its close has begun, and then no more. What its transport has let go of has
        left, and is not among the bytes. How many messages that is, transports do not tell: only that some are left."""
        manager = ConnectionManager(backpressure=KEEP)
        await manager.start()
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": 5}
        async with serving(park, manager, **options) as url:
            peer, conn = await slow_peer(url, manager)
            ws = conn.conn
            for number in range(50):
                manager.broadcast_nowait(number.to_bytes(1, "big") * 20_000)
                await asyncio.sleep(0)
            closing = asyncio.create_task(manager.close(timeout_s=1.6))
            try:
                await until(lambda: ws.protocol.close_sent is not None)
                come = await peer.messages(lambda come: len(come) >= 30)
                left = len(come)
                (undelivered,) = (await closing).undelivered
                assert undelivered.client_id == conn.client_id
                assert undelivered.messages > 0
                assert 0 < undelivered.nbytes <= 20_004 * (50 - left) + len(GOING_AWAY[1]) + 2
            finally:
                peer.reset()
