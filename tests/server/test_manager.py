"""The manager: registration from begin to end, whatever the end is; events; closing; misuse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import weakref
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import InvalidStatus

from tests.server.conftest import FakeAdapter, FakeLink, RawPeer, Seen, client, close_of, received, serving, until
from wsfast import (
    ConnectionClosed,
    ConnectionManager,
    ConnectionOpened,
    ConnectionStatus,
    DetachedRecord,
    DrainPolicy,
    DuplicateConnection,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    ManagerClosed,
    PeerClosed,
    Registry,
    UnknownConnection,
    WrongThread,
    reference,
)
from wsfast.manager import Connection


async def test_the_example_of_the_documentation(manager: ConnectionManager) -> None:
    async def handler(ws: ServerConnection) -> None:
        async with manager.attach(ws, user_id="u1") as conn:
            conn.join("room:1")
            async for message in ws:
                await manager.broadcast(message, group="room:1", exclude=conn)

    async with serving(handler) as url, client(url) as a, client(url) as b:
        await until(lambda: len(manager.registry.group("room:1")) == 2)
        await a.send("hello")
        assert await received(b, 1) == ["hello"]
        await b.send(b"\x00\x01")
        assert await received(a, 1) == [b"\x00\x01"]
    await until(lambda: len(manager.registry) == 0)
    assert manager.registry.groups() == {}


class TestAttach:
    async def test_the_record_has_what_was_given(self, manager: ConnectionManager, fake_links: None) -> None:
        link, session = FakeLink(), object()
        async with manager.attach(
            link,
            "a",
            user_id="u",
            device_type="ios",
            device_info={"v": 1},
            session=session,
            permissions=["read"],
            tags={"plan": "pro"},
            metadata={"k": 1},
            extensions={"e": 2},
            groups=["g"],
            status=ConnectionStatus.CONNECTING,
        ) as conn:
            assert manager.registry["a"] is conn
            assert (conn.client_id, conn.conn, conn.user_id, conn.device_type) == ("a", link, "u", "ios")
            assert (conn.device_info, conn.session, dict(conn.metadata)) == ({"v": 1}, session, {"k": 1})
            assert (conn.permissions, dict(conn.tags), conn.groups) == ({"read"}, {"plan": "pro"}, {"g"})
            assert conn.extensions == {"e": 2}
            assert conn.status is ConnectionStatus.CONNECTING
        assert not conn.attached
        assert conn.status is ConnectionStatus.OFFLINE

    async def test_generated_ids_are_url_safe_and_differ(self, manager: ConnectionManager, fake_links: None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            ids = {(await stack.enter_async_context(manager.attach(FakeLink()))).client_id for _ in range(100)}
            assert len(ids) == 100
            assert all(len(each) == 22 and each.replace("-", "").replace("_", "").isalnum() for each in ids)

    async def test_verbs(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(FakeLink(), "a") as conn:
            link = conn.conn
            assert conn.join("g") is True
            assert conn.join("g") is False
            assert manager.registry.group("g") == [conn]
            assert conn.leave("g") is True
            assert conn.leave("g") is False
            await conn.send("x")
            assert link.got == ["x"]
            await conn.close(4000, "enough")
            assert not link.open
        with pytest.raises(DetachedRecord):
            conn.join("g")
        with pytest.raises(DetachedRecord):
            conn.leave("g")
        with pytest.raises(PeerClosed):
            await conn.send("x")
        with pytest.raises(PeerClosed):
            await manager.send(conn, "x")
        await conn.close()
        await manager.disconnect(conn)

    @pytest.mark.parametrize("error", [RuntimeError("on purpose"), asyncio.CancelledError()])
    async def test_an_exception_unregisters_and_goes_on(
        self, manager: ConnectionManager, fake_links: None, error: BaseException
    ) -> None:
        closed = Seen(manager, ConnectionClosed)
        with pytest.raises(type(error)) as raised:
            async with manager.attach(FakeLink(), "a"):
                raise error
        assert raised.value is error
        assert "a" not in manager.registry
        assert [(event.code, event.by) for event in closed] == [(1011, "us")]  # type: ignore[attr-defined]

    async def test_a_cancelled_handler_is_unregistered(self, manager: ConnectionManager) -> None:
        tasks: list[asyncio.Task[Any]] = []

        async def handler(ws: ServerConnection) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            async with manager.attach(ws, "a"):
                await asyncio.Event().wait()

        async with serving(handler) as url, client(url):
            await until(lambda: "a" in manager.registry)
            tasks[0].cancel()
            await until(lambda: tasks[0].done())
            assert "a" not in manager.registry

    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"client_id": ""}, InvalidName),
            ({"client_id": 1}, TypeError),
            ({"client_id": "x" * 257}, InvalidName),
            ({"user_id": ""}, InvalidName),
            ({"tags": []}, TypeError),
            ({"on_duplicate": "ignore"}, InvalidSetting),
            ({"unknown": 1}, TypeError),
        ],
    )
    async def test_wrong_fields_register_nothing(
        self, manager: ConnectionManager, fake_links: None, fields: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            await manager.attach(FakeLink(), **fields).__aenter__()
        assert len(manager.registry) == 0
        assert manager.stats()["opened"] == 0

    async def test_an_unknown_object_is_told_what_is_known(self, manager: ConnectionManager) -> None:
        with pytest.raises(TypeError, match=r"builtins\.object.*websockets.*wsfast\.adapters\.Adapter"):
            await manager.attach(object()).__aenter__()

    async def test_a_closed_connection_is_refused(self, manager: ConnectionManager, fake_links: None) -> None:
        link = FakeLink()
        link.open = False
        with pytest.raises(PeerClosed) as error:
            await manager.attach(link, "a").__aenter__()
        assert (error.value.client_id, error.value.code) == ("a", 4000)
        assert len(manager.registry) == 0

    async def test_a_connection_cannot_be_attached_twice(self, manager: ConnectionManager, fake_links: None) -> None:
        link = FakeLink()
        async with manager.attach(link, "a") as conn:
            with pytest.raises(DuplicateConnection, match="connection 'a' is already registered"):
                await manager.attach(link, "b").__aenter__()
            assert list(manager.registry.values()) == [conn]

    async def test_an_attachment_may_be_used_again_after_its_end(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        attachment = manager.attach(FakeLink(), "a")
        for _ in range(2):
            async with attachment as conn:
                assert manager.registry["a"] is conn
            assert len(manager.registry) == 0

    async def test_an_adapter_that_fails_leaves_nothing(
        self, manager: ConnectionManager, fake_links: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(FakeAdapter, "attach", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            await manager.attach(FakeLink(), "a").__aenter__()
        assert len(manager.registry) == 0


class TestDuplicates:
    async def test_reject_is_the_default_and_changes_nothing(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with manager.attach(FakeLink(), "a") as conn:
            with pytest.raises(DuplicateConnection):
                await manager.attach(FakeLink(), "a").__aenter__()
            assert manager.registry["a"] is conn
            assert conn.conn.open

    async def test_replace_closes_the_older_connection(self, manager: ConnectionManager) -> None:
        events = Seen(manager)
        ended: list[str] = []

        async def handler(ws: ServerConnection) -> None:
            async with manager.attach(ws, "a", on_duplicate="replace", groups=["g"], session="s") as conn:
                await conn.send("hello")
                await ws.wait_closed()
            ended.append(conn.client_id)

        async with serving(handler) as url, client(url) as old:
            await received(old, 1)
            older = manager.registry["a"]
            async with client(url) as new:
                await received(new, 1)
                assert await close_of(old) == (4409, "replaced by a newer connection")
                await until(lambda: ended)
                # The late end of the older handler does not touch the newer connection.
                newer = manager.registry["a"]
                assert newer is not older
                assert newer.groups == {"g"}
                assert [type(event) for event in events] == [ConnectionOpened, ConnectionClosed, ConnectionOpened]
                closed = events[1]
                assert isinstance(closed, ConnectionClosed)
                assert closed.conn is older
                assert (closed.code, closed.by, closed.session, closed.groups) == (4409, "us", "s", {"g"})
        await until(lambda: len(ended) == 2)

    async def test_a_record_without_a_connection_can_be_replaced(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        old = manager.registry.add("a")
        async with manager.attach(FakeLink(), "a", on_duplicate="replace") as conn:
            assert not old.attached
            assert manager.registry["a"] is conn


class TestEnd:
    """How a connection ended, as its event tells it, for connections of the library's own server."""

    async def ended(self, manager: ConnectionManager, end: Any) -> ConnectionClosed:
        closed = Seen(manager, ConnectionClosed)

        async def handler(ws: ServerConnection) -> None:
            async with manager.attach(ws, "a", metadata={"k": "v"}, groups=["g"], session="s"):
                await end(ws)

        async with serving(handler) as url, client(url) as ws:
            with contextlib.suppress(Exception):
                async for _ in ws:
                    pass
        await until(lambda: closed)
        (event,) = closed
        assert isinstance(event, ConnectionClosed)
        assert (event.conn.client_id, event.session, dict(event.metadata), event.groups) == (
            "a",
            "s",
            {"k": "v"},
            {"g"},
        )
        assert event.duration_s >= 0
        assert not event.conn.attached
        return event

    async def test_the_handler_returns(self, manager: ConnectionManager) -> None:
        event = await self.ended(manager, lambda ws: asyncio.sleep(0))
        assert (event.code, event.reason, event.by) == (1000, "", "us")

    async def test_the_handler_closes(self, manager: ConnectionManager) -> None:
        event = await self.ended(manager, lambda ws: ws.close(4001, "enough"))
        assert (event.code, event.reason, event.by) == (4001, "enough", "us")

    async def test_the_manager_disconnects(self, manager: ConnectionManager) -> None:
        async def end(ws: ServerConnection) -> None:
            await manager.disconnect("a", 4002, "banned")
            # Not only begun: over.
            assert "a" not in manager.registry

        event = await self.ended(manager, end)
        assert (event.code, event.reason, event.by) == (4002, "banned", "us")

    async def test_the_transport_is_aborted(self, manager: ConnectionManager) -> None:
        async def end(ws: ServerConnection) -> None:
            ws.transport.abort()
            await ws.wait_closed()

        event = await self.ended(manager, end)
        assert (event.code, event.reason, event.by) == (1006, "", "network")

    @pytest.mark.parametrize("code", [1000, 1001, 4321])
    async def test_the_peer_closes(self, manager: ConnectionManager, code: int) -> None:
        closed = Seen(manager, ConnectionClosed)

        async def handler(ws: ServerConnection) -> None:
            async with manager.attach(ws, "a"):
                await ws.wait_closed()

        async with serving(handler) as url, client(url) as ws:
            await until(lambda: "a" in manager.registry)
            await ws.close(code, "bye")
        await until(lambda: closed)
        (event,) = closed
        assert isinstance(event, ConnectionClosed)
        assert (event.code, event.reason, event.by) == (code, "bye", "peer")

    @pytest.mark.parametrize("managed", [True, False])
    async def test_a_reset_is_noticed_though_the_handler_never_looks(
        self, manager: ConnectionManager, managed: bool
    ) -> None:
        closed = Seen(manager, ConnectionClosed)
        end = asyncio.Event()

        async def handler(ws: ServerConnection) -> None:
            if managed:
                await end.wait()
            else:
                async with manager.attach(ws):
                    await end.wait()

        async with serving(handler, manager if managed else None) as url:
            peer = await RawPeer.connect(url)
            await until(lambda: len(manager.registry) == 1)
            peer.reset()
            await until(lambda: closed)
            assert len(manager.registry) == 0
            end.set()
        (event,) = closed
        assert isinstance(event, ConnectionClosed)
        assert (event.code, event.by) == (1006, "network")

    @pytest.mark.parametrize("managed", [True, False])
    async def test_a_half_open_connection_is_found_by_the_ping_of_the_library(
        self, manager: ConnectionManager, managed: bool
    ) -> None:
        closed = Seen(manager, ConnectionClosed)

        async def handler(ws: ServerConnection) -> None:
            if managed:
                await ws.wait_closed()
            else:
                async with manager.attach(ws):
                    await ws.wait_closed()

        options = {"ping_interval": 0.02, "ping_timeout": 0.02, "close_timeout": 0.05}
        async with serving(handler, manager if managed else None, **options) as url:
            peer = await RawPeer.connect(url)
            await until(lambda: closed)
            peer.close()
        (event,) = closed
        assert isinstance(event, ConnectionClosed)
        assert (event.code, event.reason, event.by) == (1011, "keepalive ping timeout", "us")

    async def test_a_record_removed_by_hand_still_has_its_event(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        closed = Seen(manager, ConnectionClosed)
        async with manager.attach(FakeLink(), "a", session="s") as conn:
            manager.registry.remove(conn)
        assert [(event.conn, event.session) for event in closed] == [(conn, None)]  # type: ignore[attr-defined]


class TestDisconnect:
    async def test_an_unknown_id(self, manager: ConnectionManager) -> None:
        with pytest.raises(UnknownConnection):
            await manager.disconnect("nobody")
        with pytest.raises(UnknownConnection):
            await manager.send("nobody", "x")

    @pytest.mark.parametrize(
        ("code", "reason", "error"),
        [
            (999, "", "code must be"),
            (1005, "", "code must be"),
            (5000, "", "code must be"),
            (1000, "ä" * 62, "123 bytes"),
        ],
    )
    async def test_what_cannot_go_into_a_close_frame(
        self, manager: ConnectionManager, fake_links: None, code: int, reason: str, error: str
    ) -> None:
        async with manager.attach(FakeLink(), "a") as conn:
            with pytest.raises(InvalidSetting, match=error):
                await manager.disconnect(conn, code, reason)
            assert conn.attached
            assert conn.status is ConnectionStatus.ONLINE

    async def test_a_record_without_a_connection_is_removed(self, manager: ConnectionManager) -> None:
        record = manager.registry.add("a")
        await manager.disconnect("a")
        assert not record.attached

    async def test_records_of_others_and_other_things_are_refused(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with ConnectionManager() as other, other.attach(FakeLink(), "a") as conn:
            with pytest.raises(ForeignRecord):
                await manager.disconnect(conn)
            with pytest.raises(ForeignRecord):
                await manager.send(conn, "x")
        for target in (1, None, object()):
            with pytest.raises(TypeError, match="target must be a client id or a ConnectionMeta"):
                await manager.send(target, "x")  # type: ignore[arg-type]

    async def test_the_status_is_closing_meanwhile(self, manager: ConnectionManager) -> None:
        async def handler(ws: ServerConnection) -> None:
            async with manager.attach(ws, "a"):
                await ws.wait_closed()

        async with serving(handler, close_timeout=0.05) as url:
            peer = await RawPeer.connect(url)
            await until(lambda: "a" in manager.registry)
            record = manager.registry["a"]
            closing = asyncio.create_task(manager.disconnect("a"))
            await until(lambda: record.status is ConnectionStatus.CLOSING)
            # Broadcasts pass it by, and it cannot be sent to.
            assert (await manager.broadcast("x")).dropped == 1
            with pytest.raises(PeerClosed):
                await manager.send(record, "x")
            await closing
            assert not record.attached
            peer.close()


class TestClose:
    async def test_everybody_is_sent_away_with_1001(self, registry_name: Any) -> None:
        manager = ConnectionManager(registry=registry_name, drain=DrainPolicy(batch=3, pause_s=0.001))
        closed = Seen(manager, ConnectionClosed)

        async def park(ws: ServerConnection) -> None:
            await ws.wait_closed()

        async with serving(park, manager) as url, contextlib.AsyncExitStack() as stack:
            async with manager:
                clients = [await stack.enter_async_context(client(url)) for _ in range(10)]
                await until(lambda: len(manager.registry) == 10)
            assert [await close_of(ws) for ws in clients] == [(1001, "the server is going away")] * 10
            assert {(event.code, event.by) for event in closed} == {(1001, "us")}  # type: ignore[attr-defined]
            assert len(closed) == 10
            assert len(manager.registry) == 0
            assert manager.registry.owner is None
            # Who comes now is told.
            with pytest.raises(InvalidStatus) as error:
                await client(url).__aenter__()
            assert error.value.response.status_code == 503

    async def test_who_does_not_answer_is_cut_off(self, registry_name: Any, caplog: pytest.LogCaptureFixture) -> None:
        manager = ConnectionManager(registry=registry_name)
        closed = Seen(manager, ConnectionClosed)

        async def park(ws: ServerConnection) -> None:
            await ws.wait_closed()

        async with manager, serving(park, manager, close_timeout=60) as url:
            peer = await RawPeer.connect(url)
            async with client(url) as polite:
                await until(lambda: len(manager.registry) == 2)
                await manager.close(timeout_s=0.1)
                assert await close_of(polite) == (1001, "the server is going away")
            assert len(closed) == 2
            assert len(manager.registry) == 0
            peer.close()
        assert "cutting off 1 connections" in caplog.text

    async def test_no_time_at_all(self, fake_links: None) -> None:
        manager = ConnectionManager()
        async with manager:
            link = FakeLink()
            await manager.attach(link, "a").__aenter__()
            await manager.close(timeout_s=0)
            assert not link.open
            assert len(manager.registry) == 0

    async def test_closing_again_or_at_the_same_time_is_the_same_end(self, fake_links: None) -> None:
        manager = ConnectionManager()
        async with manager:
            closed = Seen(manager, ConnectionClosed)
            await manager.attach(FakeLink(), "a").__aenter__()
            await asyncio.gather(*(manager.close() for _ in range(3)))
            assert len(closed) == 1
            await manager.close()

    async def test_a_cancelled_close_goes_on(self) -> None:
        async def park(ws: ServerConnection) -> None:
            await ws.wait_closed()

        manager = ConnectionManager()
        await manager.start()
        async with serving(park, manager) as url, client(url) as ws:
            await until(lambda: len(manager.registry) == 1)
            closing = asyncio.create_task(manager.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert await close_of(ws) == (1001, "the server is going away")
            await manager.close()
            assert len(manager.registry) == 0

    async def test_handlers_may_say_goodbye_while_it_closes(self) -> None:
        manager = ConnectionManager(drain=DrainPolicy(batch=1, pause_s=0.2))
        results: list[int] = []

        async def handler(ws: ServerConnection) -> None:
            async for _ in ws:
                pass
            results.append((await manager.broadcast("somebody has left")).targets)

        async with manager, serving(handler, manager) as url, client(url), client(url):
            await until(lambda: len(manager.registry) == 2)
            await manager.close(2.0)
        assert results[0] == 1

    async def test_asynchronous_subscribers_hear_of_the_last_connection(self, fake_links: None) -> None:
        heard: list[str] = []

        async def note(event: ConnectionClosed) -> None:
            await asyncio.sleep(0)
            heard.append(event.conn.client_id)

        async with ConnectionManager() as manager:
            manager.on(ConnectionClosed, note)
            for name in "abc":
                await manager.attach(FakeLink(), name).__aenter__()
        assert sorted(heard) == ["a", "b", "c"]

    async def test_an_adapter_that_cannot_close(
        self, fake_links: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(FakeAdapter, "close", fail)
        link = FakeLink()
        async with ConnectionManager() as manager:
            await manager.attach(link, "a").__aenter__()
        assert not link.open
        assert "on purpose" in caplog.text

    async def test_nothing_of_it_is_left(self, registry_name: Any) -> None:
        async def park(ws: ServerConnection) -> None:
            await ws.wait_closed()

        async def serve_somebody() -> weakref.ref[ConnectionManager]:
            manager = ConnectionManager(registry=registry_name)
            async with manager, serving(park, manager) as url, client(url):
                await until(lambda: len(manager.registry) == 1)
            return weakref.ref(manager)

        gone = await serve_somebody()
        await until(lambda: gc.collect() is not None and gone() is None)


class TestMisuse:
    async def test_before_the_start(self, fake_links: None) -> None:
        manager = ConnectionManager()
        with pytest.raises(ManagerClosed, match="the manager is not started"):
            await manager.attach(FakeLink()).__aenter__()
        with pytest.raises(ManagerClosed, match="not started"):
            await manager.broadcast("x")
        with pytest.raises(ManagerClosed, match="not started"):
            manager.broadcast_nowait("x")
        record: Any = manager.registry.add("a")
        with pytest.raises(ManagerClosed, match="not started"):
            await record.send("x")
        await manager.close()
        with pytest.raises(ManagerClosed, match="closed"):
            await manager.start()

    async def test_after_the_end(self, fake_links: None) -> None:
        async with ConnectionManager() as manager:
            with pytest.raises(ManagerClosed, match="started already"):
                await manager.start()
        for call in (manager.send("a", "x"), manager.broadcast("x"), manager.disconnect("a")):
            with pytest.raises(ManagerClosed, match="the manager is closed"):
                await call
        with pytest.raises(ManagerClosed):
            await manager.attach(FakeLink()).__aenter__()
        with pytest.raises(ManagerClosed):
            await manager.start()

    async def test_on_another_thread(self, fake_links: None) -> None:
        raised: list[BaseException] = []

        def work() -> None:
            calls = [
                manager.attach(FakeLink()).__aenter__,
                lambda: manager.send("a", "x"),
                lambda: manager.broadcast("x"),
                lambda: manager.disconnect("a"),
                lambda: asyncio.sleep(0, manager.broadcast_nowait("x")),
                manager.close,
            ]
            for call in calls:
                try:
                    asyncio.run(_awaited(call))
                except WrongThread as error:
                    raised.append(error)

        async with ConnectionManager() as manager:
            thread = threading.Thread(target=work)
            thread.start()
            await asyncio.to_thread(thread.join)
            assert [error.call for error in raised] == [  # type: ignore[attr-defined]
                "attach",
                "send",
                "broadcast",
                "disconnect",
                "broadcast_nowait",
                "close",
            ]
            assert manager.stats()["connections"] == 0

    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"shards": 3}, "shards must be a power of two"),
            ({"max_id_bytes": 0}, "max_id_bytes must be 1 or more"),
            ({"max_message_bytes": 0}, "max_message_bytes must be 1 or more"),
            ({"max_queued_events": 0}, "max_queued must be 1 or more"),
            ({"registry": "sqlite"}, "registry must be 'native', 'reference'"),
        ],
    )
    def test_settings(self, settings: Any, error: str) -> None:
        with pytest.raises(InvalidSetting, match=error):
            ConnectionManager(**settings)

    def test_a_registry_of_another_kind(self) -> None:
        with pytest.raises(TypeError, match="registry must be a name or a Registry, not dict"):
            ConnectionManager(registry={})  # type: ignore[arg-type]

    @pytest.mark.parametrize("settings", [{"code": 1006}, {"reason": "x" * 124}, {"batch": 0}, {"pause_s": -1.0}])
    def test_drain_policies(self, settings: Any) -> None:
        with pytest.raises(InvalidSetting):
            DrainPolicy(**settings)

    async def test_a_registry_serves_one_manager_at_a_time(self, fake_links: None) -> None:
        registry = Registry(4, record_type=Connection)
        async with ConnectionManager(registry=registry) as manager:
            assert manager.registry is registry
            with pytest.raises(InvalidSetting, match="no other manager"):
                await ConnectionManager(registry=registry).start()
            async with manager.attach(FakeLink(), "a") as conn:
                await conn.send("x")
        async with ConnectionManager(registry=registry):
            pass


def test_each_registry_is_what_it_is_called() -> None:
    assert type(ConnectionManager().registry) is Registry
    assert type(ConnectionManager(registry="reference").registry) is reference.Registry
    assert type(ConnectionManager(registry="traditional").registry) is reference.TraditionalRegistry


async def test_the_traditional_registry_serves_too(fake_links: None) -> None:
    async with ConnectionManager(registry="traditional") as manager, manager.attach(FakeLink(), "a") as conn:
        conn.join("g")
        assert (await manager.broadcast("x", group="g")).sent == 1


async def test_the_limits_reach_the_registry() -> None:
    manager = ConnectionManager(8, max_id_bytes=10, max_name_bytes=11, max_tags=12, max_groups=13)
    registry = manager.registry
    assert registry.shards == 8
    assert (registry.max_id_bytes, registry.max_name_bytes, registry.max_tags, registry.max_groups) == (10, 11, 12, 13)


async def test_stats_count_connections_events_and_traffic(manager: ConnectionManager, fake_links: None) -> None:
    async with manager.attach(FakeLink(), "a", groups=["g"]) as conn:
        conn.received(10)
        await conn.send("four")
        stats = manager.stats()
        expected = {"connections": 1, "groups": 1, "opened": 1, "closed": 0, "messages_in": 1, "bytes_in": 10}
        assert {key: stats[key] for key in expected} == expected
        assert (stats["messages_out"], stats["bytes_out"]) == (1, 4)
    assert manager.stats()["closed"] == 1
    assert "open, 0 connections" in repr(manager)


async def test_a_subscriber_that_fails_hurts_no_connection(fake_links: None, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Any) -> None:
        raise RuntimeError("on purpose")

    async with ConnectionManager() as manager:
        manager.on(ConnectionOpened, fail)
        manager.on(ConnectionClosed, fail)
        with caplog.at_level(logging.CRITICAL):
            async with manager.attach(FakeLink(), "a") as conn:
                await conn.send("x")
        assert manager.stats()["event_errors"] == 2


async def _awaited(call: Any) -> Any:
    return await call()
