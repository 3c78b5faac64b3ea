"""Health over real sockets: pings and pongs, peers that are stopped or cut off, a blocked loop, hostile pongs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed as LinkClosed

from tests.conftest import FakeClock
from tests.server.conftest import (
    FakeAdapter,
    FakeLink,
    RawPeer,
    Seen,
    StrictParser,
    client,
    close_of,
    masked,
    serving,
    until,
)
from wsfast import (
    Backpressure,
    ConnectionCleared,
    ConnectionClosed,
    ConnectionManager,
    ConnectionStatus,
    ConnectionSuspect,
    Event,
    GradeChanged,
    HealthPolicy,
    InvalidSetting,
    LoopLate,
    Registry,
    UnknownConnection,
)
from wsfast.adapters.websockets import serve
from wsfast.manager import Connection

PING, PONG, TEXT = 9, 10, 1

# A ping after 0.2 s of silence, death after 0.3: for tests in which it is to come.
SOON = HealthPolicy.every(0.2)

# Death after 2.9 s without a sign of life: for those in which it must not, on machines that are busy with other things.
PATIENT = HealthPolicy.every(2.0, shortest_interval_s=0.1, learning_interval_s=0.1, tick_s=0.02, late_s=0.5)


async def park(ws: ServerConnection) -> None:
    await ws.wait_closed()


async def read_all(ws: ServerConnection) -> None:
    with contextlib.suppress(LinkClosed):
        async for _ in ws:
            pass


def identify(ws: ServerConnection) -> dict[str, str]:
    return {"client_id": ws.request.path.lstrip("/") if ws.request else ""}


def named(url: str, name: str) -> str:
    return f"{url}/{name}"


async def raw_peer(url: str, name: str = "a") -> RawPeer:
    return await RawPeer.connect(url, f"/{name}")


class Peer:
    """A raw peer that reads frame by frame."""

    def __init__(self, raw: RawPeer) -> None:
        self.raw = raw
        self._parser = StrictParser()
        self._come: list[tuple[int, bytes]] = []

    async def next(self, wanted: int = PING) -> bytes:
        """The payload of the next frame with this opcode; others are passed over."""
        async with asyncio.timeout(10):
            while True:
                while self._come:
                    opcode, payload = self._come.pop(0)
                    if opcode == wanted:
                        return payload
                data = await asyncio.get_running_loop().sock_recv(self.raw.sock, 2**16)
                assert data, "closed"
                self._come += self._parser.feed(data)

    async def send(self, opcode: int, payload: bytes = b"") -> None:
        await self.raw.send(masked(opcode, payload))


# A client that answers pings and closes as it should, in a process of its own. It ends when its input does.
CLIENT = """
import asyncio, sys, websockets
async def main():
    async with websockets.connect(sys.argv[1], ping_interval=None, proxy=None) as ws:
        print("connected", flush=True)
        try:
            async for _ in ws:
                pass
        except websockets.ConnectionClosed:
            pass
        print(ws.close_code, ws.close_reason, flush=True)
asyncio.run(main())
"""


class Process:
    """A client in a process of its own."""

    def __init__(self, url: str, *prefix: str) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", CLIENT, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    async def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.asynccontextmanager
async def managed(health: HealthPolicy | None, **options: Any) -> AsyncIterator[tuple[ConnectionManager, str]]:
    """A manager with this policy, and the address of a server of its connections, whose path is their id."""
    serving_options = {name: options.pop(name) for name in ("handler", "compression", "ssl") if name in options}
    manager = ConnectionManager(health=health, **options)
    handler = serving_options.pop("handler", park)
    serving_options["close_timeout"] = 0.3  # many peers here do not answer a close frame
    async with manager, serving(handler, manager, identify=identify, **serving_options) as url:
        yield manager, url


async def connection(manager: ConnectionManager, client_id: str = "a") -> Connection:
    await until(lambda: client_id in manager.registry)
    record = manager.registry[client_id]
    assert isinstance(record, Connection)
    return record


class TestPings:
    async def test_a_quiet_connection_is_pinged_and_its_quality_is_known(self) -> None:
        async with managed(SOON) as (manager, url), client(named(url, "a"), ping_interval=None):
            conn = await connection(manager)
            await until(lambda: manager.stats()["pongs"] >= 10)
            assert 0 < conn.quality.latency < 0.5
            assert conn.last_heartbeat is not None
            assert conn.status is ConnectionStatus.ONLINE
            told = manager.explain("a")
            assert told.pings >= 10
            assert 0 < told.shortest_latency_s <= told.latency_s
            assert {entry.what for entry in told.entries} <= {
                "ping",
                "pong",
                "late",
                "lag",
                "grade",
                "suspect",
                "cleared",
            }

    async def test_pings_of_a_sweep_share_one_payload_which_the_next_has_not(self) -> None:
        async with managed(SOON) as (manager, url):
            peers = [Peer(await raw_peer(url, str(number))) for number in range(20)]
            seen: list[set[bytes]] = []
            for peer in peers:
                payloads = [await peer.next() for _ in range(2)]
                await peer.send(PONG, payloads[1])
                seen.append(set(payloads))
            assert all(len(payloads) == 2 for payloads in seen)
            assert all(len(payload) <= 125 for payloads in seen for payload in payloads)
            assert manager.stats()["pings"] >= 40

    async def test_traffic_of_any_kind_spares_the_pings(self) -> None:
        policy = HealthPolicy.every(2.0)
        async with managed(policy, handler=read_all) as (manager, url):
            peer = await raw_peer(url)
            await connection(manager)
            parts = [masked(TEXT, b"whole"), masked(PONG, b""), masked(2, bytes(30))]
            for number in range(100):  # for longer than the interval
                data = parts[number % 3]
                await peer.send(data[:1])
                await asyncio.sleep(0.02)
                await peer.send(data[1:])
                await asyncio.sleep(0.01)
            # The first comes at a random time within the interval, unless something came before.
            assert manager.stats()["pings"] == 0

    async def test_a_ping_goes_before_what_waits_and_between_fragments(self) -> None:
        async def fragmenting(ws: ServerConnection) -> None:
            async def parts() -> AsyncIterator[str]:
                while True:
                    yield "part"
                    await asyncio.sleep(0.01)

            with contextlib.suppress(Exception):
                await ws.send(parts())

        async with managed(SOON, handler=fragmenting) as (manager, url):
            peer = Peer(await raw_peer(url))
            conn = await connection(manager)
            manager.broadcast_nowait("this waits for the end of the fragmented message")
            for _ in range(3):
                await peer.send(PONG, await peer.next())
            await until(lambda: manager.stats()["pongs"] >= 3)
            assert conn.status is ConnectionStatus.ONLINE

    async def test_over_tls_and_with_compression(self, tls: tuple[Any, Any]) -> None:
        server_context, client_context = tls
        async with (
            managed(SOON, ssl=server_context, compression="deflate") as (manager, url),
            client(named(url.replace("ws:", "wss:"), "a"), ping_interval=None, ssl=client_context),
        ):
            conn = await connection(manager)
            await until(lambda: manager.stats()["pongs"] >= 5)
            assert conn.quality.latency > 0
            assert manager.explain("a").kernel_latency_s > 0 or not sys.platform.startswith("linux")

    async def test_a_connection_of_the_librarys_own_serve_is_pinged_by_the_library(self) -> None:
        manager = ConnectionManager(health=SOON)

        async def attaching(ws: ServerConnection) -> None:
            async with manager.attach(ws, "a"):
                await ws.wait_closed()

        async with manager, serving(attaching, ping_interval=None) as url:
            async with client(url, ping_interval=None):
                conn = await connection(manager)
                await until(lambda: manager.stats()["pongs"] >= 5)
                assert conn.quality.latency > 0
            await until(lambda: len(manager.registry) == 0)
            seen = Seen(manager, ConnectionClosed)
            silent = await RawPeer.connect(url)
            await until(lambda: seen)
            assert seen[0].code == 4408  # type: ignore[attr-defined]
            silent.close()

    async def test_the_librarys_own_pings_are_off_unless_they_are_asked_for(self) -> None:
        for health, options, interval in (
            (SOON, {}, None),
            (SOON, {"ping_interval": 7.0}, 7.0),
            (None, {}, 20),
        ):
            manager = ConnectionManager(health=health)
            seen: list[Any] = []

            async def noting(ws: ServerConnection, seen: list[Any] = seen) -> None:
                seen.append(ws.ping_interval)

            async with manager, serving(noting, manager, **options) as url, client(url):
                await until(lambda seen=seen: seen)
            assert seen == [interval]

    async def test_without_health_there_are_none(self) -> None:
        async with managed(None, handler=park) as (manager, url), client(named(url, "a"), ping_interval=None):
            conn = await connection(manager)
            assert manager.health is None
            assert conn.deadline_ns is None
            assert "pongs" not in manager.stats()
            with pytest.raises(UnknownConnection):
                manager.explain("a")


class TestDeath:
    async def test_a_stopped_process_is_suspected_probed_and_closed(self) -> None:
        async with managed(HealthPolicy.every(0.5)) as (manager, url):
            seen = Seen(manager, ConnectionSuspect, ConnectionClosed)
            with Process(named(url, "a")) as peer:
                assert await peer.line() == "connected"
                await until(lambda: manager.stats()["pongs"] >= 3)
                seen.clear()
                peer.process.send_signal(signal.SIGSTOP)
                await until(lambda: any(isinstance(event, ConnectionClosed) for event in seen))
                suspect, closed = seen
                assert isinstance(suspect, ConnectionSuspect)
                assert isinstance(closed, ConnectionClosed)
                assert suspect.reason == "silent"
                assert (closed.code, closed.by) == (4408, "us")
                # Its kernel has acknowledged everything, so it is the program that did not answer.
                assert closed.reason == "no sign of life: a ping was not answered in time"
                assert "a" not in manager.registry
                told = manager.explain("a")
                assert told.closed == (4408, closed.reason, "us")
                whats = [entry.what for entry in told.entries]
                assert whats[-1] == "dead"
                assert whats.index("suspect") < len(whats) - 1
                assert whats.count("ping") == 1 + SOON.probes
                # A dead one that was not: it is told what has happened.
                peer.process.send_signal(signal.SIGCONT)
                assert await peer.line() == f"4408 {closed.reason}"

    async def test_a_peer_that_stops_for_a_moment_is_cleared(self) -> None:
        policy = HealthPolicy.every(4.0, ping_interval_s=0.2, poor_interval_s=0.2, shortest_interval_s=0.1, late_s=0.1,
                                    learning_interval_s=0.1, tick_s=0.02)  # fmt: skip
        async with managed(policy) as (manager, url):
            seen = Seen(manager, ConnectionSuspect, ConnectionCleared, ConnectionClosed)
            with Process(named(url, "a")) as peer:
                assert await peer.line() == "connected"
                conn = await connection(manager)
                await until(lambda: manager.stats()["pongs"] >= 3)
                seen.clear()
                peer.process.send_signal(signal.SIGSTOP)
                await until(lambda: seen)
                assert conn.status is ConnectionStatus.SUSPECT
                peer.process.send_signal(signal.SIGCONT)
                await until(lambda: len(seen) > 1)
                assert [type(event) for event in seen[:2]] == [ConnectionSuspect, ConnectionCleared]
                assert conn.status is ConnectionStatus.ONLINE
                assert conn.registry is manager.registry
                # Its answers were late, not lost.
                await until(lambda: manager.stats()["late_pongs"] >= 1)

    async def test_a_peer_whose_link_is_taken_down(self, far: Far) -> None:
        manager = ConnectionManager(health=HealthPolicy.every(1.0))
        seen = Seen(manager, ConnectionClosed)
        async with manager, serve(park, far.address, 0, manager=manager, identify=identify) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            with Process(f"ws://{far.address}:{port}/a", *far.prefix) as peer:
                assert await peer.line() == "connected"
                await until(lambda: manager.stats()["pongs"] >= 3)
                far.cut()
                await until(lambda: seen)
                closed = seen[0]
                assert isinstance(closed, ConnectionClosed)
                assert (closed.code, closed.by) == (4408, "us")
                assert closed.reason.startswith("no sign of life for 1.")
                assert manager.explain("a").closed is not None

    async def test_a_link_that_is_back_in_time_is_spared(self, far: Far) -> None:
        policy = HealthPolicy.every(8.0, shortest_interval_s=0.2, learning_interval_s=0.2, tick_s=0.05, late_s=0.3)
        manager = ConnectionManager(health=policy)
        seen = Seen(manager, ConnectionSuspect, ConnectionCleared, ConnectionClosed)
        async with manager, serve(park, far.address, 0, manager=manager, identify=identify) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            with Process(f"ws://{far.address}:{port}/a", *far.prefix) as peer:
                assert await peer.line() == "connected"
                await until(lambda: manager.stats()["pongs"] >= 3)
                far.cut()
                await until(lambda: seen)
                far.mend()
                await until(lambda: len(seen) > 1)
                assert [type(event) for event in seen[:2]] == [ConnectionSuspect, ConnectionCleared]
                assert "a" in manager.registry

    async def test_what_nobody_answers_is_found_also_by_the_library_alone(self, fake_links: None) -> None:
        async with ConnectionManager(health=SOON) as manager:
            seen = Seen(manager, ConnectionClosed)
            alive, dead = FakeLink(), FakeLink()
            alive.sees_pongs = dead.sees_pongs = False
            dead.answers.clear()
            async with manager.attach(alive, "alive"), manager.attach(dead, "dead"):
                await until(lambda: seen)
                assert [event.conn.client_id for event in seen] == ["dead"]  # type: ignore[attr-defined]
                assert alive.open
                await until(lambda: len(alive.pings) > 1)
                assert len(dead.pings) == 1, "a second one while the library waits for the first"
                await until(lambda: dead.aborted or not dead.open)

    async def test_one_whose_adapter_fails_hurts_no_other(
        self, fake_links: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(self: FakeAdapter, ws: FakeLink) -> None:
            raise RuntimeError("the library is at odds with itself")

        monkeypatch.setattr(FakeAdapter, "closed", fail)
        async with ConnectionManager(health=SOON) as manager, contextlib.AsyncExitStack() as stack:
            seen = Seen(manager, ConnectionClosed)
            for number in range(4):
                await stack.enter_async_context(manager.attach(FakeLink(), str(number)))
            await until(lambda: len(seen) == 4)
            assert len(manager.registry) == 0
            late = manager.attach(FakeLink(), "late")
            await stack.enter_async_context(late)
            await until(lambda: len(seen) == 5)
        assert "the library is at odds with itself" in caplog.text

    async def test_while_we_do_not_read_nobody_is_blamed(self, fake_links: None) -> None:
        async with ConnectionManager(health=SOON) as manager:
            seen = Seen(manager, ConnectionClosed, ConnectionSuspect, ConnectionCleared)
            link = FakeLink()
            link.is_reading = False
            async with manager.attach(link, "a") as conn:
                await until(lambda: sum(isinstance(event, ConnectionCleared) for event in seen) >= 3)
                assert conn.registry is manager.registry
                link.is_reading = True
                await until(lambda: conn.registry is None)
                assert isinstance(seen[-1], ConnectionClosed)

    async def test_a_dead_connection_makes_way_at_once_for_its_client(self) -> None:
        async with managed(SOON) as (manager, url):
            silent = await raw_peer(url)
            old = await connection(manager)
            seen = Seen(manager, ConnectionClosed)
            await until(lambda: seen)
            async with client(named(url, "a"), ping_interval=None):
                assert await connection(manager) is not old
                told = manager.explain("a")
                assert told.closed is None
                assert told.previous is not None
                assert told.previous.closed is not None
                silent.close()


class TestNeverKillsAHealthyOne:
    async def test_a_blocked_loop(self) -> None:
        async with managed(PATIENT) as (manager, url):
            seen = Seen(manager, LoopLate, ConnectionClosed, ConnectionSuspect)
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(Process(named(url, str(number)))) for number in range(3)]
                for peer in peers:
                    assert await peer.line() == "connected"
                await until(lambda: manager.stats()["pongs"] >= 6)
                seen.clear()
                time.sleep(2 * PATIENT.timeout_s)  # noqa: ASYNC251 - that is the point
                before = manager.stats()["pongs"]
                await until(lambda: manager.stats()["pongs"] >= before + 6)
                late = [event for event in seen if isinstance(event, LoopLate)]
                assert 2 * PATIENT.timeout_s - 1 < sum(event.late_s for event in late) < 2 * PATIENT.timeout_s + 2
                assert [event for event in seen if not isinstance(event, LoopLate)] == []
                assert len(manager.registry) == 3
                # Nothing was measured across it.
                assert all(record.quality.latency < 1 for record in manager.registry.values())

    async def test_a_handler_that_does_not_read(self) -> None:
        """The library stops reading when some messages wait for a handler, and does not see the pongs behind them."""
        async with managed(PATIENT) as (manager, url):
            seen = Seen(manager, ConnectionClosed)
            peer = Peer(await raw_peer(url))
            await connection(manager)
            for _ in range(40):
                await peer.send(TEXT, b"nobody reads this")
            end = asyncio.get_running_loop().time() + 2 * PATIENT.timeout_s
            while asyncio.get_running_loop().time() < end:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await peer.send(PONG, await peer.next())
            assert not seen
            assert manager.stats()["pings"] > 0
            assert any(entry.what == "unread" for entry in manager.explain("a").entries)

    async def test_a_slow_reader_is_no_dead_one(self) -> None:
        """A ping cannot leave behind what the peer is slow to take. That is told, and not held against its life."""
        policy = HealthPolicy.every(1.0, ping_deadline_s=0.3, tick_s=0.02)

        async def narrow(ws: ServerConnection) -> None:
            ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            await ws.wait_closed()

        keep = Backpressure(policy="keep")
        async with managed(policy, handler=narrow, backpressure=keep, compression=None) as (manager, url):
            seen = Seen(manager, ConnectionSuspect, ConnectionClosed)
            peer = await RawPeer.connect(url, "/a", receive_buffer=4096)
            conn = await connection(manager)
            manager.broadcast_nowait(bytes(500_000))
            parser, come = StrictParser(), list[tuple[int, bytes]]()
            end = asyncio.get_running_loop().time() + 2 * policy.timeout_s
            while asyncio.get_running_loop().time() < end:
                come += parser.feed(await peer.read(4096))
                await asyncio.sleep(0.05)
            assert [type(event) for event in seen] == [ConnectionSuspect]
            assert seen[0].reason == "ping_failed"  # type: ignore[attr-defined]
            assert conn.registry is manager.registry
            stuck = [entry for entry in manager.explain("a").entries if entry.what == "stuck"]
            assert stuck
            assert stuck[0].value > 0
            assert manager.explain("a").queue_peak_bytes > 100_000
            # It takes the rest, with the ping behind it, and is a good one again.
            while not any(opcode == PING for opcode, _ in come):
                come += parser.feed(await asyncio.get_running_loop().sock_recv(peer.sock, 2**16))
            await peer.send(masked(PONG, come[-1][1]))
            await until(lambda: conn.status is ConnectionStatus.ONLINE)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells nothing")
    async def test_one_that_takes_nothing_at_all_is(self) -> None:
        policy = HealthPolicy.every(0.5, ping_deadline_s=0.3, tick_s=0.02)
        keep = Backpressure(policy="keep")
        async with managed(policy, backpressure=keep, compression=None) as (manager, url):
            seen = Seen(manager, ConnectionSuspect, ConnectionClosed)
            await RawPeer.connect(url, "/a", receive_buffer=4096)
            await connection(manager)
            manager.broadcast_nowait(bytes(16_000_000))
            await until(lambda: any(isinstance(event, ConnectionClosed) for event in seen))
            assert seen[-1].code == 4408  # type: ignore[attr-defined]

    async def test_a_handler_that_does_not_read_over_tls(self, tls: tuple[Any, Any]) -> None:
        """Then the pongs lie in a buffer of the transport, where no kernel tells of them."""
        server_side, client_side = tls
        policy = HealthPolicy.every(0.5)
        async with managed(policy, ssl=server_side) as (manager, url):
            seen = Seen(manager, ConnectionClosed)
            async with client(named(url.replace("ws:", "wss:"), "a"), ping_interval=None, ssl=client_side) as ws:
                await connection(manager)
                for _ in range(40):
                    await ws.send("nobody reads this")
                await asyncio.sleep(3 * policy.timeout_s)
                assert not seen
                assert manager.stats()["pings"] > 3

    async def test_a_ping_that_was_held_while_a_message_in_fragments_was_slow(self) -> None:
        """It leaves when there is room, although the message is not over yet."""
        policy = HealthPolicy.every(0.4, timeout_s=5.0, silence_s=5.0)
        going_on = asyncio.Event()

        async def fragmenting(ws: ServerConnection) -> None:
            ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)

            async def parts() -> AsyncIterator[bytes]:
                yield bytes(300_000)
                await going_on.wait()
                yield b"the end"

            with contextlib.suppress(Exception):
                await ws.send(parts())

        async with managed(policy, handler=fragmenting, compression=None) as (manager, url):
            raw = await RawPeer.connect(url, "/a", receive_buffer=4096)
            peer = Peer(raw)
            await connection(manager)
            await asyncio.sleep(2 * policy.ping_interval_s)  # now a ping is held behind what the peer has not read
            await peer.send(PONG, await peer.next())
            await until(lambda: manager.stats()["pongs"] >= 1)
            assert not going_on.is_set()
            going_on.set()


class TestHostilePongs:
    @pytest.mark.parametrize("payload", [b"", b"x" * 8, b"y" * 125], ids=["empty", "as long as ours", "125 bytes"])
    async def test_what_answers_nothing_is_a_sign_of_life_and_no_more(self, payload: bytes) -> None:
        async with managed(PATIENT) as (manager, url):
            peer = Peer(await raw_peer(url))
            conn = await connection(manager)
            for _ in range(30):
                await peer.send(PONG, payload)
            await until(lambda: manager.stats()["unasked_pongs"] >= 30)
            assert conn.quality == (0, 0, 0)
            assert manager.stats()["pongs"] == 30

    async def test_a_pong_twice(self) -> None:
        async with managed(PATIENT) as (manager, url):
            peer = Peer(await raw_peer(url))
            await connection(manager)
            payload = await peer.next()
            await peer.send(PONG, payload)
            await peer.send(PONG, payload)
            await until(lambda: manager.stats()["pongs"] == 2)
            assert manager.stats()["unasked_pongs"] == 1

    async def test_a_late_pong_of_an_older_ping_is_late_and_not_lost(self) -> None:
        policy = HealthPolicy.every(4.0, shortest_interval_s=0.1, learning_interval_s=0.1, late_s=0.1,
                                    probe_interval_s=0.05, tick_s=0.02)  # fmt: skip
        async with managed(policy) as (manager, url):
            peer = Peer(await raw_peer(url))
            conn = await connection(manager)
            older, newer = await peer.next(), await peer.next()
            assert older != newer
            await peer.send(PONG, older)
            await until(lambda: manager.stats()["late_pongs"] == 1)
            await peer.send(PONG, newer)
            await until(lambda: manager.stats()["pongs"] == 2)
            assert manager.stats()["unasked_pongs"] == 0
            assert conn.quality.loss > 0

    async def test_a_flood_harms_nobody_else(self) -> None:
        async with managed(PATIENT) as (manager, url):
            seen = Seen(manager, ConnectionClosed, ConnectionSuspect)
            flooder = await raw_peer(url, "flooder")
            async with client(named(url, "b"), ping_interval=None):
                good = await connection(manager, "b")
                await until(lambda: manager.stats()["pongs"] >= 1)
                flood = masked(PONG, b"z" * 125) * 200
                for _ in range(100):
                    await flooder.send(flood)
                await until(lambda: manager.stats()["unasked_pongs"] >= 20_000)
                before = manager.stats()["pongs"]
                await until(lambda: manager.stats()["pongs"] >= before + 2)
                assert good.status is ConnectionStatus.ONLINE
                # The flooder answers no ping, so it is suspect when its flood is over.
                assert [event for event in seen if event.conn is good] == []  # type: ignore[attr-defined]
                assert manager.stats()["event_errors"] == 0

    async def test_pings_of_the_client_with_125_bytes_are_answered(self) -> None:
        async with managed(SOON) as (manager, url):
            peer = Peer(await raw_peer(url))
            await connection(manager)
            await peer.send(PING, b"q" * 125)
            assert await peer.next(PONG) == b"q" * 125


class TestEvents:
    async def test_the_grade_falls_at_once_and_rises_by_and_by(self) -> None:
        policy = HealthPolicy.every(4.0, ping_interval_s=0.1, poor_interval_s=0.1, shortest_interval_s=0.05,
                                    learning_interval_s=0.05, late_s=0.4, calm=2, tick_s=0.02)  # fmt: skip
        async with managed(policy) as (manager, url):
            seen = Seen(manager, GradeChanged)
            peer = Peer(await raw_peer(url))
            conn = await connection(manager)
            while not seen:
                payload = await peer.next()
                await asyncio.sleep(0.2)
                await peer.send(PONG, payload)
                assert manager.stats()["pongs"] < 50
            assert isinstance(seen[0], GradeChanged)
            assert seen[0].grade > seen[0].before
            assert manager.health is not None
            assert manager.health.grade(conn) == seen[-1].grade  # type: ignore[attr-defined]
            seen.clear()
            while not seen:
                await peer.send(PONG, await peer.next())
                assert manager.stats()["pongs"] < 200
            assert seen[0].grade == seen[0].before - 1  # type: ignore[attr-defined]

    async def test_a_subscriber_that_ends_the_connection_and_one_that_fails(self) -> None:
        async with managed(SOON) as (manager, url):
            seen = Seen(manager, ConnectionClosed)

            def failing(event: Event) -> None:
                raise RuntimeError

            async def ending(event: ConnectionSuspect) -> None:
                await event.conn.close(4000, "out")

            manager.on(ConnectionSuspect, failing)
            manager.on(ConnectionSuspect, ending)
            await raw_peer(url)
            await until(lambda: seen)
            await until(lambda: manager.stats()["event_errors"] == 1)
            assert len(seen) == 1

    @pytest.mark.parametrize(
        ("way", "reason"), [("reset", "reset by the peer"), ("close", "end of stream")], ids=["reset", "end of stream"]
    )
    async def test_how_a_link_broke_is_told(self, way: str, reason: str) -> None:
        async with managed(SOON) as (manager, url):
            seen = Seen(manager, ConnectionClosed)
            peer = await raw_peer(url)
            await connection(manager)
            getattr(peer, way)()
            await until(lambda: seen)
            closed = seen[0]
            assert isinstance(closed, ConnectionClosed)
            assert (closed.code, closed.reason, closed.by) == (1006, reason, "network")
            assert manager.explain("a").closed == (1006, reason, "network")


class TestManager:
    async def test_a_registry_with_another_clock_is_refused(self) -> None:
        registry = Registry(8, clock=FakeClock(), record_type=Connection)
        with pytest.raises(InvalidSetting):
            await ConnectionManager(registry=registry, health=SOON).start()
        assert registry.owner is None
        async with ConnectionManager(registry=registry, health=None):
            pass

    def test_the_close_code_is_checked(self) -> None:
        with pytest.raises(InvalidSetting):
            ConnectionManager(health=HealthPolicy(code=1005))

    async def test_the_reference_has_health_too(self) -> None:
        async with managed(SOON, registry="reference") as (manager, url):
            seen = Seen(manager, ConnectionClosed)
            async with client(named(url, "b"), ping_interval=None):
                await until(lambda: manager.stats()["pongs"] >= 5)
                await raw_peer(url)
                await until(lambda: seen)
                assert manager.registry["b"].status is ConnectionStatus.ONLINE
            assert manager.explain("a").closed is not None

    async def test_closing_the_manager_ends_the_ticks(self) -> None:
        async with managed(SOON) as (manager, url), client(named(url, "a"), ping_interval=None) as ws:
            await until(lambda: manager.stats()["pongs"] >= 1)
            await manager.close()
            before = manager.stats()["pings"]
            assert (await close_of(ws))[0] == 1001
            await asyncio.sleep(0.3)
            assert manager.stats()["pings"] == before
            assert len(manager.health or ()) == 0


# ---- a peer at the far end of a link that can be taken down ----------------------------------------------------------


class Far:
    """A network namespace behind a pair of virtual interfaces.

    Attributes:
        address: of the near end, where a server listens.
        prefix: of a command that is to run at the far end.
    """

    def __init__(self) -> None:
        tag = f"{os.getpid() % 2**16:04x}"
        self.name, self.near, self.off = f"wsfast-{tag}", f"wsfn{tag}", f"wsff{tag}"
        net = f"10.{os.getpid() % 251 + 2}.{os.getpid() // 251 % 256}"
        self.address = f"{net}.1"
        self.prefix = ("ip", "netns", "exec", self.name)
        self._run("netns", "add", self.name)
        self._run("link", "add", self.near, "type", "veth", "peer", "name", self.off, "netns", self.name)
        self._run("addr", "add", f"{net}.1/30", "dev", self.near)
        self._run("link", "set", self.near, "up")
        self._run("-n", self.name, "addr", "add", f"{net}.2/30", "dev", self.off)
        self._run("-n", self.name, "link", "set", self.off, "up")

    def _run(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)

    def cut(self) -> None:
        self._run("-n", self.name, "link", "set", self.off, "down")

    def mend(self) -> None:
        self._run("-n", self.name, "link", "set", self.off, "up")

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("link", "del", self.near)
        self._run("netns", "del", self.name)


@pytest.fixture
def far() -> Iterator[Far]:
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs Linux, root and the ip command, to make a network namespace")
    try:
        made = Far()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    yield made
    made.remove()
