"""The bounds of what is kept, on real sockets: of time for peers that never read, of memory for what transports hold,
of work for many who send at once; and keys that are no plain strings.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import gc
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import DEADLINE_S, FakeLink, RawPeer, Seen, link_of, serving, until
from wsfast import Backpressure, ConnectionClosed, ConnectionManager, ConnectionTooSlow, PeerTooSlow, delivery
from wsfast.adapters.websockets import ADAPTER, WebsocketsAdapter

KEEP = Backpressure(policy="keep")
OPTIONS: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": 0.2}


async def park(ws: ServerConnection) -> None:
    await ws.wait_closed()


async def park_shrunk(ws: ServerConnection) -> None:
    """Let the kernel keep as little as it can."""
    ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await ws.wait_closed()


@contextlib.asynccontextmanager
async def connected(
    manager: ConnectionManager, count: int = 1, *, managed: bool = True, **options: Any
) -> AsyncIterator[list[tuple[RawPeer, Any]]]:
    """A server with so many peers that do not read, whose kernels keep as little as they can, and their records."""

    async def attaching(ws: ServerConnection) -> None:
        async with manager.attach(ws):
            await park_shrunk(ws)

    handler, of = (park_shrunk, manager) if managed else (attaching, None)
    async with serving(handler, of, **(OPTIONS | options)) as url:
        peers = [await RawPeer.connect(url, receive_buffer=4096) for _ in range(count)]
        try:
            await until(lambda: len(manager.registry) == count)
            records = {conn.conn.remote_address: conn for conn in manager.registry.values()}
            yield [(peer, records[peer.sock.getsockname()]) for peer in peers]
        finally:  # the server waits for them
            for peer in peers:
                if peer.sock.fileno() >= 0:
                    peer.reset()


def in_transports(manager: ConnectionManager) -> int:
    """Bytes in the transports of all who are registered."""
    conns: list[Any] = list(manager.registry.values())
    return sum(conn.conn.transport.get_write_buffer_size() for conn in conns)


# ---- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "the library's own"])
class TestPeersThatNeverRead:
    """Whoever is closed is gone within the library's close timeout, though its close frame can never leave. Nothing
    else ends it: no ping is sent here."""

    @pytest.mark.parametrize("big", [False, True])
    async def test_who_is_too_slow_is_gone_soon_and_charged_until_then(self, managed: bool, big: bool) -> None:
        manager = ConnectionManager(backpressure=Backpressure(max_bytes=2**16, policy="disconnect"))
        closed, slow = Seen(manager, ConnectionClosed), Seen(manager, ConnectionTooSlow)
        async with manager, connected(manager, managed=managed) as ((_, conn),):
            ws = conn.conn
            if big:
                await manager.broadcast(bytes(2_000_000))
                manager.broadcast_nowait("x")
            else:
                while not slow:
                    manager.broadcast_nowait(bytes(4096))
                    await asyncio.sleep(0)
            assert len(slow) == 1
            async with asyncio.timeout(DEADLINE_S):
                while not closed:
                    # What the transport holds is charged as long as it holds it; 200 are more than a close frame has.
                    assert manager.stats()["queued_bytes"] >= ws.transport.get_write_buffer_size() - 200
                    await asyncio.sleep(0.002)
            assert [(event.code, event.by) for event in closed] == [(1013, "us")]  # type: ignore[attr-defined]
            assert len(manager.registry) == 0
            await until(lambda: ws.transport.get_write_buffer_size() == 0)
            stats = manager.stats()
            assert (stats["queued_bytes"], stats["waiting"]) == (0, 0)

    @pytest.mark.parametrize("messages", [1, 50])
    async def test_disconnect_ends(self, managed: bool, messages: int) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        closed = Seen(manager, ConnectionClosed)
        async with manager, connected(manager, managed=managed) as ((_, conn),):
            ws = conn.conn
            for _ in range(messages):
                await manager.broadcast(bytes(3_000_000 // messages))
            disconnecting = asyncio.create_task(manager.disconnect(conn, 4000, "enough"))
            await asyncio.sleep(0)
            async with asyncio.timeout(DEADLINE_S):
                while not disconnecting.done():
                    assert manager.stats()["queued_bytes"] >= ws.transport.get_write_buffer_size() - 200
                    await asyncio.sleep(0.002)
                await disconnecting
            assert [(event.code, event.reason) for event in closed] == [(4000, "enough")]  # type: ignore[attr-defined]
            assert len(manager.registry) == 0
            assert manager.stats()["queued_bytes"] == 0

    async def test_disconnect_ends_while_the_application_waits_for_the_peer(self, managed: bool) -> None:
        manager = ConnectionManager(backpressure=KEEP)
        async with manager, connected(manager, managed=managed) as ((_, conn),):
            sending = asyncio.create_task(conn.conn.send(bytes(1_000_000)))
            await until(lambda: in_transports(manager))
            async with asyncio.timeout(DEADLINE_S):
                await manager.disconnect(conn)
                await asyncio.gather(sending, return_exceptions=True)
            assert len(manager.registry) == 0
            assert manager.stats()["queued_bytes"] == 0


class TestAge:
    """Time counts for all that waits, whoever has filled the transport."""

    @pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "conflate"])
    async def test_what_waits_behind_the_applications_own_message_grows_old(self, policy: str) -> None:
        settings = Backpressure(policy=policy, max_age_s=0.2)  # type: ignore[arg-type]
        async with ConnectionManager(backpressure=settings) as manager, connected(manager) as ((_, conn),):
            sending = asyncio.create_task(conn.conn.send(bytes(300_000)))
            await until(lambda: manager.stats()["waiting"] == 1)
            manager.broadcast_nowait("a")
            manager.broadcast_nowait("b")
            await until(lambda: manager.stats()["dropped_by_age"] == 2)
            assert manager.registry
            sending.cancel()

    async def test_who_lets_it_wait_is_disconnected(self) -> None:
        settings = Backpressure(policy="disconnect", max_age_s=0.2)
        async with ConnectionManager(backpressure=settings) as manager, connected(manager) as ((_, conn),):
            slow = Seen(manager, ConnectionTooSlow)
            sending = asyncio.create_task(conn.conn.send(bytes(300_000)))
            await until(lambda: manager.stats()["waiting"] == 1)
            manager.broadcast_nowait("a")
            await until(lambda: slow)
            assert (slow[0].conn, slow[0].cause) == (conn, "age")  # type: ignore[attr-defined]
            await until(lambda: len(manager.registry) == 0)
            await asyncio.gather(sending, return_exceptions=True)


# ---- memory --------------------------------------------------------------------------------------------------------


class TestMemory:
    COUNT = 12
    BUDGET = 2**21

    @pytest.mark.parametrize("policy", ["keep", "drop_newest", "drop_oldest", "conflate", "disconnect"])
    async def test_the_budget_holds_after_a_flush_too(self, policy: str) -> None:
        """One message to many who do not read. Some transports make a copy of the rest. That is charged, and no further
        message is needed to make the worst give up what it takes."""
        settings = Backpressure(policy=policy, max_total_bytes=self.BUDGET)  # type: ignore[arg-type]
        async with ConnectionManager(backpressure=settings) as manager, connected(manager, self.COUNT) as peers:
            message = bytes(range(250)) * 4000
            shares = ADAPTER.keeps_views(peers[0][1].conn)
            await manager.broadcast(message)
            await until(lambda: manager.stats()["queued_bytes"] <= self.BUDGET)
            left = list(manager.registry.values())
            if shares:
                assert len(left) == self.COUNT
            else:
                assert in_transports(manager) <= manager.stats()["queued_bytes"]
            assert manager.stats()["too_slow_by_budget"] == self.COUNT - len(left)
            # Whoever is left gets all of it.
            for peer, conn in peers:
                if conn in left:
                    come = await peer.messages(lambda come: len(come) == 1)
                    assert come == [(2, message)]
            await until(lambda: manager.stats()["waiting"] == 0)
            assert manager.stats()["queued_bytes"] < 2**16

    async def test_who_reads_is_not_the_one_to_give(self) -> None:
        settings = Backpressure(policy="keep", max_total_bytes=self.BUDGET)
        async with ConnectionManager(backpressure=settings) as manager, connected(manager, self.COUNT) as peers:
            healthy, its = peers[0]
            reading = asyncio.create_task(healthy.messages(lambda come: come and come[-1][1] == b"end"))
            for number in range(10):
                await its.send(str(number))
                await manager.broadcast(bytes(300_000), exclude=its)
            await its.send("end")
            assert [payload for _, payload in await reading] == [*(b"%d" % number for number in range(10)), b"end"]
            await until(lambda: manager.stats()["queued_bytes"] <= self.BUDGET)
            assert its.client_id in manager.registry

    @pytest.mark.parametrize("policy", ["disconnect", "drop_newest", "drop_oldest", "conflate", "keep"])
    async def test_who_has_caught_up_is_not_judged_by_what_its_transport_once_held(self, policy: str) -> None:
        """A transport tells when it is empty, not when it is emptier. So it is asked before anybody is judged."""
        manager = ConnectionManager(backpressure=Backpressure(policy=policy, max_bytes=2**20))  # type: ignore[arg-type]
        async with manager, connected(manager) as ((peer, conn),):
            loop, size, got = asyncio.get_running_loop(), 2_000_000, 0
            assert (await manager.broadcast(bytes(size))).queued == 1
            async with asyncio.timeout(DEADLINE_S):
                while got < size - 250_000:
                    got += len(await loop.sock_recv(peer.sock, min(2**16, size - 200_000 - got)))
            waiting = in_transports(manager)
            assert 0 < waiting <= 250_000
            result = manager.broadcast_nowait(b"tick")
            assert (result.queued, result.dropped, result.displaced, result.disconnected) == (1, 0, 0, 0)
            if policy not in ("keep", "conflate"):  # they do not judge by it
                assert link_of(manager, conn).bytes <= waiting + 6
            rest = size + 10 - got  # with the head of the frame
            assert await peer.read(rest + 6) == bytes(rest) + b"\x82\x04tick"

    async def test_a_transport_that_had_room_by_then_keeps_its_own_limits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the kernel did not take goes to the transport. If the kernel takes it then, nobody waits for anything,
        and the library's own flow control is as it was."""
        write = WebsocketsAdapter.write
        left_at_once = 0

        async with ConnectionManager(backpressure=KEEP, threads=1) as manager, connected(manager) as ((peer, conn),):

            def read_and_write(self: WebsocketsAdapter, ws: ServerConnection, data: bytes) -> int:
                nonlocal left_at_once
                with contextlib.suppress(BlockingIOError):
                    while peer.sock.recv(2**18):
                        pass
                in_buffer = write(self, ws, data)
                left_at_once += in_buffer == 0
                return in_buffer

            monkeypatch.setattr(WebsocketsAdapter, "write", read_and_write)
            transport = conn.conn.transport
            limits = transport.get_write_buffer_limits()
            assert limits[1] > 0
            link = link_of(manager, conn)
            for size in range(2000, 400_000, 2000):
                await until(lambda: link.is_direct and not in_transports(manager))
                message = manager._delivery._broadcast(bytes(size))
                manager._delivery._flush(is_whole=True)
                assert message.failed == 0
                if left_at_once:
                    break
                if link.is_blocked:
                    reading = asyncio.get_running_loop().sock_recv(peer.sock, 2**18)
                    while link.is_blocked:
                        await reading
                        await asyncio.sleep(0)
                        with contextlib.suppress(BlockingIOError):
                            while peer.sock.recv(2**18):
                                pass
                        reading = asyncio.sleep(0, b"")
                with contextlib.suppress(BlockingIOError):
                    while peer.sock.recv(2**18):
                        pass
            assert left_at_once
            assert manager.stats()["waiting"] == 0
            assert transport.get_write_buffer_limits() == limits


# ---- episodes of slowness ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_links")
class TestEpisodes:
    @staticmethod
    @contextlib.asynccontextmanager
    async def blocked(policy: str, in_buffer: int, **settings: Any) -> AsyncIterator[tuple[ConnectionManager, Any]]:
        backpressure = Backpressure(policy=policy, max_bytes=1000, **settings)  # type: ignore[arg-type]
        async with ConnectionManager(backpressure=backpressure) as manager, manager.attach(FakeLink(), "a") as conn:
            conn.conn.in_buffer = in_buffer
            manager.broadcast_nowait("first")
            await until(lambda: conn.conn.waiting)
            yield manager, conn

    async def test_dropping_ends_when_everything_has_left(self) -> None:
        """Though what waits the next time is more than ``resume_below`` from the start."""
        async with self.blocked("drop_newest", 900) as (manager, conn):
            assert manager.broadcast_nowait(bytes(400)).dropped == 1
            conn.conn.drain()
            await asyncio.sleep(0)
            assert manager.stats()["waiting"] == 0
            conn.conn.in_buffer = 600
            assert (await manager.broadcast("second")).queued == 1
            assert manager.broadcast_nowait(bytes(100)).queued == 1
            conn.conn.drain()
            await until(lambda: len(conn.conn.got) == 3)
            assert manager.stats()["dropped_by_bytes"] == 1

    async def test_the_latest_of_each_key_is_kept_though_the_transport_alone_is_over_the_limit(self) -> None:
        """What is in the transport is past taking back. A client that gets the latest price late is what the policy is
        for; one that keeps the one before it is not. Old ones with other keys, or none, may go."""
        async with self.blocked("conflate", 1500) as (manager, conn):
            for number in range(3):
                for key in ("a", "b"):
                    result = manager.broadcast_nowait(f"{key}{number}", key=key)
                    assert result.queued == 1
            conn.conn.drain()
            await until(lambda: len(conn.conn.got) >= 3)
            assert conn.conn.got == ["first", "a2", "b2"]

    async def test_senders_that_are_cancelled_leave_nothing_behind(self) -> None:
        """What they have queued is sent all the same, but nobody waits any more."""

        def futures() -> int:
            gc.collect()
            return sum(isinstance(each, asyncio.Future) for each in gc.get_objects())

        async def send_in_vain(count: int) -> None:
            senders = [asyncio.create_task(manager.send("a", str(number))) for number in range(count)]
            for _ in range(3):
                await asyncio.sleep(0)
            for sender in senders:
                assert not sender.done()
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)

        async with self.blocked("keep", 100, resume_below=0) as (manager, conn):
            await send_in_vain(50)
            before = futures()
            for _ in range(10):
                await send_in_vain(50)
            assert futures() <= before + 10
            conn.conn.drain()
            expected = ["first", *list(map(str, range(50))) * 11]
            await until(lambda: len(conn.conn.got) == len(expected))
            assert conn.conn.got == expected

    async def test_who_sends_with_a_key_and_is_cancelled_leaves_nothing_behind_either(self) -> None:
        async with self.blocked("conflate", 100, resume_below=0) as (manager, conn):
            for number in range(100):
                with contextlib.suppress(TimeoutError, PeerTooSlow):
                    async with asyncio.timeout(0):
                        await manager.send("a", str(number), key="k")
            gc.collect()
            before = sum(isinstance(each, asyncio.Future) for each in gc.get_objects())
            for number in range(100, 300):
                with contextlib.suppress(TimeoutError, PeerTooSlow):
                    async with asyncio.timeout(0):
                        await manager.send("a", str(number), key="k")
            gc.collect()
            assert sum(isinstance(each, asyncio.Future) for each in gc.get_objects()) <= before + 10
            conn.conn.drain()
            await until(lambda: len(conn.conn.got) == 2)
            assert conn.conn.got == ["first", "299"]


# ---- work ----------------------------------------------------------------------------------------------------------


class Counted(Coroutine[Any, Any, Any]):
    """A coroutine that counts how often it is resumed."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.coroutine = coroutine
        self.steps = 0

    def __await__(self) -> Any:
        return self.coroutine.__await__()

    def send(self, value: Any) -> Any:
        self.steps += 1
        return self.coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self.steps += 1
        return self.coroutine.throw(*error)

    def close(self) -> None:
        self.coroutine.close()


@pytest.mark.usefixtures("fake_links")
@pytest.mark.parametrize("count", [100, 1000])
async def test_who_sends_is_woken_a_few_times_however_many_send(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush of many connections is cut into many slices. Who waits for one of them is not woken by each."""
    monkeypatch.setattr(delivery, "_SLICE_NS", 1)
    async with ConnectionManager(threads=1) as manager, contextlib.AsyncExitStack() as stack:
        conns = [await stack.enter_async_context(manager.attach(FakeLink(), str(each))) for each in range(count)]
        sends = [Counted(conn.send("x")) for conn in conns]
        await asyncio.gather(*map(asyncio.create_task, sends))
        assert all(conn.conn.got == ["x"] for conn in conns)
        assert max(send.steps for send in sends) <= 8
        assert sum(send.steps for send in sends) <= 4 * count


# ---- keys ----------------------------------------------------------------------------------------------------------


class Topic(str, enum.Enum):  # noqa: UP042  # as programs have it that are older than StrEnum
    PRICE = "price"


class StrTopic(enum.StrEnum):
    PRICE = "price"


class Hashed(str):
    """Says that it is like no other."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 5

    def __eq__(self, other: object) -> bool:
        return False


class Raising(str):
    __slots__ = ()

    def __hash__(self) -> int:
        raise RuntimeError("hashed")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")


CRASH = """
import asyncio, gc
from tests.server.conftest import FakeAdapter, FakeLink
from wsfast import Backpressure, ConnectionManager, adapters

class Key(str):
    def __del__(self):
        records = list(manager.registry.values())
        for count in (len(records), *range(1, 51)):
            manager.broadcast_nowait(f"of {count}", to=records[:count])
            gc.collect(0)

async def main():
    for link in links:
        await manager.attach(link).__aenter__()
    records = list(manager.registry.values())
    manager.broadcast_nowait("x", key=Key("k"), to=records[:1])
    manager.broadcast_nowait("y", key=Key("k"), to=records[:60])
    await asyncio.sleep(0)
    await manager.broadcast("end", key=Key("k"))
    assert all(link.got[-1] == "end" or "end" in link.got for link in links)
    print("survived")

adapters.register_adapter(FakeAdapter())
manager = ConnectionManager(backpressure=Backpressure(policy="conflate"))

async def run():
    global links
    links = [FakeLink() for _ in range(1000)]
    async with manager:
        await main()

asyncio.run(run())
"""


class TestKeys:
    """A key is its characters."""

    @pytest.mark.usefixtures("fake_links")
    @pytest.mark.parametrize("key_type", [Topic, StrTopic, Hashed, Raising])
    @pytest.mark.parametrize("others", [0, 40])
    async def test_a_key_of_another_class_is_the_same_as_an_equal_string(
        self, key_type: type[str], others: int
    ) -> None:
        key = key_type("".join(["pr", "ice"]))  # not the literal, whose hash is known
        settings = Backpressure(policy="conflate")
        async with ConnectionManager(backpressure=settings) as manager, manager.attach(FakeLink(), "a") as conn:
            for number in range(others):
                manager.broadcast_nowait(f"other {number}", key=f"key {number}")
            displaced = [
                manager.broadcast_nowait(str(number), key=each).displaced
                for number, each in enumerate(["price", key, key, "".join(["pr", "ice"]), key])
            ]
            assert displaced == [0, 1, 1, 1, 1]
            await until(lambda: conn.conn.got)
            assert conn.conn.got == [*(f"other {number}" for number in range(others)), "4"]

    def test_a_key_that_sends_when_it_dies_harms_nothing(self) -> None:
        """In a process of its own: what it guards against is a crash."""
        command = [sys.executable, "-X", "faulthandler", "-c", CRASH]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr
