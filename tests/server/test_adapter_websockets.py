"""The adapter of ``websockets``, and its ``serve``: nothing is lost of the library, and everything is counted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import re
import ssl
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.server import ServerConnection, broadcast

from tests.server.conftest import RawPeer, Seen, client, close_of, masked, received, serving, until
from wsfast import (
    Backpressure,
    ConnectionClosed,
    ConnectionManager,
    ConnectionOpened,
    InvalidSetting,
)
from wsfast.adapters import Closed, adapter_for, register_adapter
from wsfast.adapters.websockets import ADAPTER, serve, unix_serve
from wsfast.manager import REPLACED

SIZES = [0, 1, 125, 126, 65535, 65536, 200_000]


async def echo(ws: ServerConnection) -> None:
    async for message in ws:
        await ws.send(message)


async def park(ws: ServerConnection) -> None:
    await ws.wait_closed()


async def only_record(manager: ConnectionManager) -> Any:
    await until(lambda: len(manager.registry) == 1)
    (record,) = manager.registry.values()
    return record


class TestCounting:
    @pytest.mark.parametrize("compression", [None, "deflate"])
    async def test_messages_and_bytes_in_both_directions(
        self, manager: ConnectionManager, compression: str | None
    ) -> None:
        messages: list[str | bytes] = ["x" * size for size in SIZES] + [bytes(size) for size in SIZES] + ["äöü"]
        async with (
            serving(echo, manager, compression=compression, max_size=None) as url,
            client(url, compression=compression) as ws,
        ):
            for message in messages:
                await ws.send(message)
            assert await received(ws, len(messages)) == messages
            record = await only_record(manager)
            total = 2 * sum(SIZES) + len("äöü".encode())
            assert (record.messages_in, record.bytes_in) == (len(messages), total)
            assert (record.messages_out, record.bytes_out) == (len(messages), total)
        stats = manager.stats()
        assert (stats["messages_in"], stats["messages_out"]) == (len(messages), len(messages))
        assert (stats["bytes_in"], stats["bytes_out"]) == (total, total)

    async def test_every_way_to_send_is_counted_once(self, manager: ConnectionManager) -> None:
        async def asynchronous() -> Any:
            for part in ("in ", "two"):
                yield part

        async def handler(ws: Any) -> None:
            await ws.send("text")
            await ws.send(b"binary")
            await ws.send("as binary", text=False)
            await ws.send(bytearray(b"array"))
            await ws.send(memoryview(b"view"))
            await ws.send(["frag", "men", "ts"])
            await ws.send(asynchronous())
            broadcast([ws], "library broadcast")
            await ws.wsfast.send("verb")
            await manager.send(ws.wsfast.client_id, "manager")
            await manager.broadcast("broadcast")
            manager.broadcast_nowait(b"nowait")
            await ws.ping()
            await ws.pong()
            await ws.wait_closed()

        async with serving(handler, manager) as url, client(url) as ws:
            messages = await received(ws, 12)
            record = await only_record(manager)
            assert record.messages_out == 12
            assert record.bytes_out == sum(len(message) for message in messages)

    async def test_fragments_count_as_one_message_when_the_last_has_come(self, manager: ConnectionManager) -> None:
        async with serving(park, manager) as url:
            peer = await RawPeer.connect(url)
            record = await only_record(manager)
            await peer.send(masked(1, b"abc", fin=False))
            await until(lambda: record.bytes_in == 3)
            assert record.messages_in == 0
            await peer.send(masked(9, b"ping in between") + masked(0, b"de", fin=False) + masked(0, b"f"))
            await until(lambda: record.messages_in == 1)
            assert record.bytes_in == 6
            peer.close()

    @pytest.mark.parametrize(
        "data",
        [masked(9, b"ping"), masked(10, b"unsolicited pong"), masked(2, b"x" * 1000)[:5], masked(1, b"", fin=False)],
        ids=["ping", "pong", "part of a header", "empty fragment"],
    )
    async def test_any_byte_is_a_sign_of_life(self, manager: ConnectionManager, data: bytes) -> None:
        async with serving(park, manager) as url:
            peer = await RawPeer.connect(url)
            record = await only_record(manager)
            before = record.last_active_ns
            await peer.send(data)
            await until(lambda: record.last_active_ns > before)
            assert (record.messages_in, record.bytes_in) == (0, 0)
            peer.close()

    async def test_the_answer_to_a_ping_of_ours_is_a_sign_of_life(self, manager: ConnectionManager) -> None:
        async with serving(park, manager, ping_interval=0.01) as url, client(url, ping_interval=None):
            record = await only_record(manager)
            before = record.last_active_ns
            await until(lambda: record.last_active_ns > before)
            assert record.messages_in == 0

    async def test_sending_is_no_sign_of_life(self, manager: ConnectionManager) -> None:
        async with serving(park, manager) as url, client(url, ping_interval=None) as ws:
            record = await only_record(manager)
            before = record.last_active_ns
            await record.send("x")
            await received(ws, 1)
            assert record.last_active_ns == before

    async def test_what_comes_before_the_registration_is_counted_at_it(self, manager: ConnectionManager) -> None:
        identified = asyncio.Event()

        async def identify(ws: ServerConnection) -> dict[str, Any]:
            await ws.send("who are you?")
            await identified.wait()
            return {"client_id": await ws.recv(decode=True)}

        async with serving(echo, manager, identify=identify) as url, client(url) as ws:
            await ws.send("me")
            await ws.send("early")
            assert await received(ws, 1) == ["who are you?"]
            assert len(manager.registry) == 0
            identified.set()
            assert await received(ws, 1) == ["early"]
            record = manager.registry["me"]
            assert (record.messages_in, record.bytes_in) == (2, len("meearly"))
            assert (record.messages_out, record.bytes_out) == (2, len("who are you?early"))

    async def test_a_connection_of_the_library_counts_what_the_manager_sends(self, manager: ConnectionManager) -> None:
        async def handler(ws: ServerConnection) -> None:
            async with manager.attach(ws) as conn:
                await conn.send("one")
                await manager.broadcast("two")
                await ws.send("not seen")
                conn.received(5)
                await ws.wait_closed()

        async with serving(handler) as url, client(url) as ws:
            await received(ws, 3)
            record = await only_record(manager)
            assert (record.messages_out, record.bytes_out) == (2, 6)
            assert (record.messages_in, record.bytes_in) == (1, 5)

    async def test_a_failing_send_is_not_counted(self, manager: ConnectionManager) -> None:
        async def handler(ws: Any) -> None:
            conn = ws.wsfast
            await ws.close()
            with contextlib.suppress(websockets.ConnectionClosed):
                await ws.send("too late")
            assert conn.messages_out == 0
            done.set()

        done = asyncio.Event()
        async with serving(handler, manager) as url, client(url):
            await done.wait()


class TestServe:
    async def test_without_a_manager_it_is_the_library(self) -> None:
        async def handler(ws: ServerConnection) -> None:
            assert type(ws) is ServerConnection
            await echo(ws)

        async with serving(handler) as url, client(url) as ws:
            await ws.send("x")
            assert await received(ws, 1) == ["x"]

    async def test_the_handler_finds_the_record_on_its_connection(self, manager: ConnectionManager) -> None:
        connections: list[Any] = []

        async def handler(ws: Any) -> None:
            connections.append(ws)
            assert isinstance(ws, ServerConnection)
            assert manager.registry[ws.wsfast.client_id] is ws.wsfast
            ws.wsfast.join("g")
            await ws.wait_closed()

        async with serving(handler, manager) as url, client(url):
            await until(lambda: manager.registry.group("g"))
        await until(lambda: len(manager.registry) == 0)
        assert not connections[0].wsfast.attached

    @pytest.mark.parametrize("asynchronous", [True, False])
    async def test_identify_gives_the_fields(self, manager: ConnectionManager, asynchronous: bool) -> None:
        def identify(ws: ServerConnection) -> dict[str, Any]:
            assert ws.request is not None
            return {"client_id": ws.request.path[1:], "user_id": "u", "groups": ["g"]}

        async def identify_later(ws: ServerConnection) -> dict[str, Any]:
            await asyncio.sleep(0)
            return identify(ws)

        chosen = identify_later if asynchronous else identify
        async with serving(park, manager, identify=chosen) as url, client(f"{url}/me"):
            record = await only_record(manager)
            assert (record.client_id, record.user_id, record.groups) == ("me", "u", {"g"})

    @pytest.mark.parametrize(
        ("identify", "reason"),
        [
            (lambda ws: None, "identification failed"),
            (lambda ws: 1 / 0, "identification failed"),
            (lambda ws: {"nonsense": 1}, "identification failed"),
            (lambda ws: {"client_id": ""}, "client id is empty"),
            (lambda ws: {"client_id": "taken"}, "connection 'taken' is already registered"),
        ],
    )
    async def test_who_is_not_identified_is_closed_with_1008(
        self, manager: ConnectionManager, identify: Any, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        called = False

        async def handler(ws: ServerConnection) -> None:
            nonlocal called
            called = True

        manager.registry.add("taken")
        async with serving(handler, manager, identify=identify) as url, client(url) as ws:
            assert await close_of(ws) == (1008, reason)
        assert not called
        assert len(manager.registry) == 1
        manager.registry.clear()

    async def test_a_long_reason_is_cut_where_a_character_ends(self, manager: ConnectionManager) -> None:
        def refuse(ws: ServerConnection) -> dict[str, Any]:
            raise InvalidSetting("token", 0, "ä" * 100)

        async with serving(park, manager, identify=refuse) as url, client(url) as ws:
            code, reason = await close_of(ws)
            assert code == 1008
            assert reason is not None
            assert len(reason.encode()) == 122
            assert reason.endswith("ä")

    async def test_who_goes_before_it_is_identified_never_reaches_the_handler(self, manager: ConnectionManager) -> None:
        called = False
        gate, ended = asyncio.Event(), asyncio.Event()

        async def identify(ws: ServerConnection) -> dict[str, Any]:
            await gate.wait()
            await ws.wait_closed()
            ended.set()
            return {}

        async def handler(ws: ServerConnection) -> None:
            nonlocal called
            called = True

        async with serving(handler, manager, identify=identify) as url:
            async with client(url):
                pass
            gate.set()
            await ended.wait()
        assert not called
        assert manager.stats()["opened"] == 0

    async def test_a_handler_that_attaches_too_takes_over(self, manager: ConnectionManager) -> None:
        events = Seen(manager)

        async def handler(ws: Any) -> None:
            automatic = ws.wsfast
            assert await ws.recv() == "1"
            await ws.send("22")
            async with manager.attach(ws, "mine", user_id="u") as conn:
                assert ws.wsfast is conn
                assert not automatic.attached
                assert list(manager.registry) == ["mine"]
                assert (conn.messages_in, conn.bytes_in, conn.messages_out, conn.bytes_out) == (1, 1, 1, 2)
                await echo(ws)

        async with serving(handler, manager) as url, client(url) as ws:
            await ws.send("1")
            assert await received(ws, 1) == ["22"]
            await until(lambda: "mine" in manager.registry)
            await ws.send("333")
            assert await received(ws, 1) == ["333"]
            record = manager.registry["mine"]
            assert (record.messages_in, record.bytes_in, record.messages_out, record.bytes_out) == (2, 4, 2, 5)
        await until(lambda: len(manager.registry) == 0)
        assert [type(event) for event in events] == [
            ConnectionOpened,
            ConnectionClosed,
            ConnectionOpened,
            ConnectionClosed,
        ]
        taken_over, ended = events[1], events[3]
        assert isinstance(taken_over, ConnectionClosed)
        assert isinstance(ended, ConnectionClosed)
        assert (taken_over.code, taken_over.reason, taken_over.by) == (1000, "attached anew", "us")
        assert (ended.conn.client_id, ended.code, ended.by) == ("mine", 1000, "peer")

    async def test_a_handler_may_attach_under_the_id_that_identify_gave(self, manager: ConnectionManager) -> None:
        async def handler(ws: Any) -> None:
            async with manager.attach(ws, "me", user_id="u"):
                await echo(ws)

        async with serving(handler, manager, identify=lambda ws: {"client_id": "me"}) as url, client(url) as ws:
            await ws.send("x")
            assert await received(ws, 1) == ["x"]
            assert manager.registry["me"].user_id == "u"

    async def test_a_handler_that_takes_over_may_replace_another(self, manager: ConnectionManager) -> None:
        closed = Seen(manager, ConnectionClosed)

        async def handler(ws: Any) -> None:
            async with manager.attach(ws, "me", on_duplicate="replace"):
                await ws.send("hello")
                await ws.wait_closed()

        async with serving(handler, manager) as url, client(url) as old:
            await received(old, 1)
            async with client(url) as new:
                await received(new, 1)
                assert await close_of(old) == (REPLACED.code, REPLACED.reason)
                assert [event.code for event in closed] == [1000, 4409, 1000]  # type: ignore[attr-defined]

    async def test_attach_false_leaves_it_to_the_handler(self, manager: ConnectionManager) -> None:
        async def handler(ws: Any) -> None:
            assert ws.wsfast is None
            await ws.send("before")
            async with manager.attach(ws, "a") as conn:
                assert ws.wsfast is conn
                await echo(ws)

        async with serving(handler, manager, attach=False) as url, client(url) as ws:
            await ws.send("x")
            assert await received(ws, 2) == ["before", "x"]
            record = manager.registry["a"]
            assert (record.messages_in, record.messages_out, record.bytes_out) == (1, 2, 7)

    @pytest.mark.parametrize("kind", ["class", "function"])
    async def test_a_connection_class_of_the_user_keeps_what_it_does(
        self, manager: ConnectionManager, kind: str
    ) -> None:
        class Own(ServerConnection):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.packets = 0

            def data_received(self, data: bytes) -> None:
                self.packets += 1
                super().data_received(data)

            def hello(self) -> str:
                return "hello"

        async def handler(ws: Any) -> None:
            assert isinstance(ws, Own)
            assert ws.packets >= 1
            assert ws.wsfast is not None
            await ws.send(ws.hello())
            await echo(ws)

        create: Any = Own if kind == "class" else functools.partial(lambda *args, **kwargs: Own(*args, **kwargs))
        async with serving(handler, manager, create_connection=create) as url:
            for _ in range(2):
                async with client(url) as ws:
                    await ws.send("x")
                    assert await received(ws, 2) == ["hello", "x"]
                    record = await only_record(manager)
                    assert (record.messages_in, record.messages_out) == (1, 2)
                await until(lambda: len(manager.registry) == 0)

    async def test_options_reach_the_library(self, manager: ConnectionManager) -> None:
        def refuse(ws: ServerConnection, request: Any) -> Any:
            return ws.respond(418, "teapot\n") if request.path == "/tea" else None

        async with serving(park, manager, process_request=refuse, subprotocols=["v1"]) as url:
            with pytest.raises(websockets.InvalidStatus, match="418"):
                await client(f"{url}/tea").__aenter__()
            async with client(url, subprotocols=["v1"]) as ws:
                assert ws.subprotocol == "v1"
                await only_record(manager)

    async def test_unix_sockets(self, manager: ConnectionManager, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        async with unix_serve(echo, path, manager=manager), websockets.unix_connect(path) as ws:
            await ws.send("x")
            assert await received(ws, 1) == ["x"]
            record = await only_record(manager)
            assert (record.messages_in, record.messages_out) == (1, 1)
            assert ADAPTER.remote_address(record.conn) == ""

    async def test_tls(self, manager: ConnectionManager, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
        server_side, client_side = tls
        async with (
            serving(echo, manager, ssl=server_side) as url,
            client(url.replace("ws://", "wss://"), ssl=client_side) as ws,
        ):
            await ws.send("x" * 100_000)
            assert await received(ws, 1) == ["x" * 100_000]
            record = await only_record(manager)
            assert (record.bytes_in, record.bytes_out) == (100_000, 100_000)
            await manager.broadcast("y")
            assert await received(ws, 1) == ["y"]

    async def test_protocol_errors_are_the_librarys_and_told(self, manager: ConnectionManager) -> None:
        closed = Seen(manager, ConnectionClosed)
        async with serving(park, manager, max_size=1000) as url:
            for data, code in ((masked(3, b""), 1002), (masked(2, bytes(1001)), 1009)):
                peer = await RawPeer.connect(url)
                await only_record(manager)
                await peer.send(data)
                await until(lambda code=code: closed and closed[-1].code == code)  # type: ignore[attr-defined, misc]
                peer.close()
        assert {event.by for event in closed} == {"us"}  # type: ignore[attr-defined]


class TestAdapter:
    async def test_remote_addresses(self, manager: ConnectionManager) -> None:
        async with serve(park, "::1", 0, manager=manager) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            async with client(f"ws://[::1]:{port}"):
                record = await only_record(manager)
                assert re.fullmatch(r"\[::1\]:\d+", ADAPTER.remote_address(record.conn))
        async with serving(park, manager) as url, client(url):
            record = await only_record(manager)
            assert re.fullmatch(r"127\.0\.0\.1:\d+", ADAPTER.remote_address(record.conn))

    async def test_closed_tells_what_is_known_so_far(self, manager: ConnectionManager) -> None:
        async with serving(park, manager, close_timeout=0.05) as url:
            peer = await RawPeer.connect(url)
            ws = (await only_record(manager)).conn
            assert ADAPTER.is_open(ws)
            assert ADAPTER.closed(ws) is None
            closing = asyncio.create_task(ws.close(4000, "so long"))
            await until(lambda: not ADAPTER.is_open(ws))
            assert ADAPTER.closed(ws) == Closed(4000, "so long", "us")
            await closing
            assert ADAPTER.closed(ws) == Closed(4000, "so long", "us")
            peer.close()

    async def test_a_close_without_a_code_is_1005_by_the_peer(self, manager: ConnectionManager) -> None:
        closed = Seen(manager, ConnectionClosed)
        async with serving(park, manager) as url:
            peer = await RawPeer.connect(url)
            await only_record(manager)
            await peer.send(masked(8, b""))
            await until(lambda: closed)
            peer.close()
        assert [(event.code, event.by) for event in closed] == [(1005, "peer")]  # type: ignore[attr-defined]

    @pytest.mark.parametrize("managed", [True, False])
    async def test_a_record_does_not_outlive_its_connection(self, manager: ConnectionManager, managed: bool) -> None:
        seen: list[weakref.ref[Any]] = []

        async def handler(ws: Any) -> None:
            if managed:
                seen.extend((weakref.ref(ws), weakref.ref(ws.wsfast)))
                await echo(ws)
            else:
                async with manager.attach(ws) as conn:
                    seen.extend((weakref.ref(ws), weakref.ref(conn)))
                    await echo(ws)

        gc.disable()
        try:
            async with serving(handler, manager if managed else None) as url, client(url) as ws:
                await ws.send("x")
                await received(ws, 1)
            # Older versions of the library leave the connection itself to the garbage collector.
            if seen[0]() is not None:
                gc.collect()
            await until(lambda: seen[1]() is None)
            assert seen[0]() is None
        finally:
            gc.enable()

    async def test_a_slow_reader_is_queued_for_and_holds_back_who_sends_to_it(self, registry_name: Any) -> None:
        patient = Backpressure(policy="keep", max_bytes=1 << 20)
        manager = ConnectionManager(registry=registry_name, backpressure=patient)
        async with manager, serving(park, manager, close_timeout=0.05) as url:
            peer = await RawPeer.connect(url)
            record = await only_record(manager)
            big = bytes(1 << 20)
            results = [manager.broadcast_nowait(big) for _ in range(32)]
            assert results[-1].queued == 1
            sending = asyncio.create_task(record.send("x"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not sending.done()
            for _ in range(32):
                await peer.read(10 + len(big))
            assert await peer.read(3) == b"\x81\x01x"
            await sending
            peer.close()

    async def test_a_lost_peer_ends_who_waits_to_send_to_it(self, manager: ConnectionManager) -> None:
        async with serving(park, manager) as url:
            peer = await RawPeer.connect(url)
            record = await only_record(manager)
            for _ in range(32):
                manager.broadcast_nowait(bytes(1 << 20))
            sending = asyncio.create_task(record.send("x"))
            await asyncio.sleep(0)
            peer.reset()
            await asyncio.wait([sending])
            assert type(sending.exception()).__name__ in ("PeerClosed", "PeerFailed", "PeerTooSlow")


def test_an_unknown_object_is_a_type_error_that_helps() -> None:
    with pytest.raises(TypeError, match=r"tests\.server.*Stranger; it knows those of websockets; .*register_adapter"):

        class Stranger:
            pass

        adapter_for(Stranger())


async def test_an_adapter_of_the_user_comes_first(manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsfast.adapters._registered", [])
    monkeypatch.setattr("wsfast.adapters._by_type", {})
    asked: list[object] = []

    class Own(type(ADAPTER)):  # type: ignore[misc]
        def recognises(self, ws: object) -> bool:
            asked.append(ws)
            return isinstance(ws, ServerConnection)

    own = Own()
    register_adapter(own)
    async with serving(park, manager) as url, client(url):
        ws = (await only_record(manager)).conn
        assert adapter_for(ws) is own
        assert adapter_for(ws) is own
    assert asked == [ws]


def test_an_adapter_is_imported_only_with_its_library() -> None:
    code = """
import sys
from wsfast.adapters import adapter_for
try:
    adapter_for(object())
except TypeError:
    pass
assert "websockets" not in sys.modules and "wsfast.adapters.websockets" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
