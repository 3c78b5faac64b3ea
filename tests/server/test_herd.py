"""Clients that come to a server together, or are sent away together: what they are told, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from tests.conftest import FakeClock
from tests.server.conftest import (
    DEADLINE_S,
    FakeAdapter,
    FakeLink,
    RawPeer,
    Seen,
    client,
    close_of,
    serving,
    until,
)
from wsfast import (
    Backpressure,
    ConnectionClosed,
    ConnectionManager,
    DrainPolicy,
    HerdPolicy,
    InvalidSetting,
)
from wsfast.hub import Hub, HubSettings
from wsfast.manager import _REGISTRIES
from wsfast.reconnect import Advice

ROOT = Path(__file__).parents[2]
SECOND = 10**9
AWAY = HerdPolicy(accept_rate=50.0, window_s=5.0, away_s=3.0)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsfast.manager.random", Random(1).random)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def make_manager(clock: FakeClock, registry_name: str = "native", **settings: Any) -> ConnectionManager:
    """A manager whose time stands still."""
    implementation, record_type = _REGISTRIES[registry_name]
    return ConnectionManager(registry=implementation(8, clock=clock, record_type=record_type), **settings)


async def park(ws: ServerConnection) -> None:
    await ws.wait_closed()


@contextlib.asynccontextmanager
async def clients_of(url: str, manager: ConnectionManager, count: int) -> AsyncIterator[list[ClientConnection]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(client(url)) for _ in range(count)]


async def refused(url: str, **options: Any) -> Response:
    """The answer to a client that is not let in."""
    with pytest.raises(websockets.InvalidStatus) as error:
        async with asyncio.timeout(DEADLINE_S):
            await client(url, **options).__aenter__()
    return error.value.response


def advice_of(close: tuple[int | None, str | None]) -> Advice:
    advice = Advice.from_reason(close[1] or "")
    assert advice is not None, close
    return advice


def after_of(close: tuple[int | None, str | None]) -> float:
    after_s = advice_of(close).after_s
    assert after_s is not None
    return after_s


# ---- a restart -------------------------------------------------------------------------------------------------------


class TestRestart:
    async def test_each_client_is_told_a_slot_of_its_own(self, registry_name: str, clock: FakeClock) -> None:
        manager = make_manager(clock, registry_name, herd=AWAY, drain=DrainPolicy(batch=10, pause_s=0.001))
        closed = Seen(manager, ConnectionClosed)
        async with manager, serving(park, manager) as url, clients_of(url, manager, 100) as clients:
            await until(lambda: len(manager.registry) == 100)
            assert manager.reconnect.spread_s(100) == 4.0
            report = await manager.close(reason="restart")
            closes = [await close_of(ws) for ws in clients]
        assert (report.connections, report.cut_off) == (100, 0)
        assert {code for code, _ in closes} == {1012}
        assert {advice_of(close).spread_s for close in closes} == {7.0}
        assert all(str(close[1]).startswith("the server is going away; retry-after=") for close in closes)
        told = [after_of(close) for close in closes]
        # A slot is 0.07 s long; what is told is rounded to a thousandth.
        for number, after_s in enumerate(sorted(told)):
            assert 3.0 + 0.07 * number - 0.001 <= after_s <= 3.0 + 0.07 * (number + 1) + 0.001
        assert told != sorted(told)
        assert {(event.code, event.by) for event in closed} == {(1012, "us")}  # type: ignore[attr-defined]

    @pytest.mark.usefixtures("fake_links")
    async def test_the_time_that_has_passed_is_subtracted(
        self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
    ) -> None:
        told: list[tuple[int, str]] = []

        async def close(_: Any, ws: FakeLink, code: int, reason: str) -> None:
            ws.open = False
            told.append((code, reason))

        monkeypatch.setattr(FakeAdapter, "close", close)
        policy = HerdPolicy(accept_rate=2.0, window_s=0.0, away_s=10.0)
        manager = make_manager(clock, herd=policy, backpressure=Backpressure(policy="keep"))
        await manager.start()
        slow, quick = FakeLink(), FakeLink()
        await manager.attach(slow, "slow").__aenter__()
        await manager.attach(quick, "quick").__aenter__()
        slow.in_buffer = 3
        manager.broadcast_nowait("x", to="slow")
        await until(lambda: slow.waiting)
        closing = asyncio.create_task(manager.close(timeout_s=600, reason="restart"))
        await until(lambda: len(told) == 1)
        clock.advance(4 * SECOND)
        slow.drain()
        async with asyncio.timeout(DEADLINE_S):
            await closing
        assert [code for code, _ in told] == [1012, 1012]
        first, second = (after_of(close) for close in told)
        # Each has one of two slots, of half a second each.
        slots = sorted(int((after_s - 10.0) / 0.5) for after_s in (first, second + 4.0))
        assert slots == [0, 1]

    async def test_it_is_no_failure_of_the_handlers(self, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
        """A server that restarts must not log a traceback for each of a hundred thousand connections."""
        ended: list[str] = []

        async def handler(ws: ServerConnection) -> None:
            try:
                async for message in ws:
                    await ws.send(message)
            finally:
                ended.append("")

        manager = make_manager(clock, herd=AWAY)
        async with manager, serving(handler, manager) as url, clients_of(url, manager, 3):
            await until(lambda: len(manager.registry) == 3)
            await manager.close(reason="restart")
            await until(lambda: len(ended) == 3)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    async def test_that_another_server_restarts_is_a_failure(
        self, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        upstream, proxy = make_manager(clock, herd=AWAY), ConnectionManager()

        async def handler(ws: ServerConnection) -> None:
            async with client(url) as other:
                await ws.send("ready")
                await other.recv()

        async with upstream, proxy, serving(park, upstream) as url, serving(handler, proxy) as own, client(own) as ws:
            assert await ws.recv() == "ready"
            await until(lambda: len(upstream.registry) == 1)
            await upstream.close(reason="restart")
            assert (await close_of(ws))[0] == 1011
        assert "connection handler failed" in caplog.text

    async def test_a_long_reason_is_cut_and_what_is_told_is_not(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=AWAY, drain=DrainPolicy(reason="ä" * 61))
        async with manager, serving(park, manager) as url, clients_of(url, manager, 1) as (ws,):
            await until(lambda: len(manager.registry) == 1)
            await manager.close(reason="restart")
            code, reason = await close_of(ws)
        assert reason is not None
        assert code == 1012
        assert len(reason.encode()) <= 123
        assert reason.startswith("ä" * 40)
        assert 3.0 <= after_of((code, reason)) <= 3.0 + 5.02

    async def test_a_shutdown_tells_no_time(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=AWAY, drain=DrainPolicy(code=4000, reason="gone"))
        async with manager, serving(park, manager) as url, clients_of(url, manager, 1) as (ws,):
            await until(lambda: len(manager.registry) == 1)
            await manager.close(reason="shutdown")
            assert await close_of(ws) == (4000, "gone")

    async def test_the_first_reason_counts(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=AWAY)
        async with manager, serving(park, manager) as url, clients_of(url, manager, 1) as (ws,):
            await until(lambda: len(manager.registry) == 1)
            await asyncio.gather(manager.close(reason="restart"), manager.close(reason="shutdown"))
            assert (await close_of(ws))[0] == 1012

    async def test_other_reasons_are_refused(self, clock: FakeClock) -> None:
        async with make_manager(clock) as manager:
            with pytest.raises(InvalidSetting, match="reason must be 'shutdown' or 'restart', not 'reload'"):
                await manager.close(reason="reload")  # type: ignore[arg-type]
            assert manager.admit() == 0.0

    async def test_who_does_not_answer_is_cut_off_with_the_code_of_a_restart(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=AWAY)
        closed = Seen(manager, ConnectionClosed)
        async with manager, serving(park, manager, close_timeout=60) as url:
            peer = await RawPeer.connect(url)
            await until(lambda: len(manager.registry) == 1)
            report = await manager.close(timeout_s=0.1, reason="restart")
            peer.close()
        assert (report.connections, report.cut_off) == (1, 1)
        assert [event.code for event in closed] == [1012]  # type: ignore[attr-defined]


# ---- who comes while it closes ---------------------------------------------------------------------------------------


class TestClosing:
    @pytest.mark.parametrize("attach", [True, False])
    async def test_the_handshake_is_refused(self, attach: bool, clock: FakeClock) -> None:
        called: list[ServerConnection] = []

        async def handler(ws: ServerConnection) -> None:
            called.append(ws)

        manager = make_manager(clock, herd=AWAY)
        async with manager, serving(handler, manager, attach=attach) as url:
            await manager.close(reason="restart")
            response = await refused(url)
            assert response.status_code == 503
            assert 3 <= int(response.headers["Retry-After"]) <= 8
        assert not called
        assert manager.stats()["turned_away"] == 1

    async def test_also_by_a_manager_that_never_began(self) -> None:
        manager = ConnectionManager()
        await manager.close()
        async with serving(park, manager) as url:
            response = await refused(url)
        assert (response.status_code, int(response.headers["Retry-After"])) == (503, 2)

    @pytest.mark.parametrize("reason", ["shutdown", "restart"])
    async def test_who_is_identified_too_late_is_told_by_a_close_frame(self, reason: Any, clock: FakeClock) -> None:
        entered, gate = asyncio.Event(), asyncio.Event()

        async def identify(_: ServerConnection) -> dict[str, Any]:
            entered.set()
            await gate.wait()
            return {}

        manager = make_manager(clock, herd=AWAY)
        async with manager, serving(park, manager, identify=identify) as url, client(url) as ws:
            await entered.wait()
            await manager.close(reason=reason)
            gate.set()
            close = await close_of(ws)
        if reason == "shutdown":
            assert close == (1001, "the server is going away")
        else:
            assert close[0] == 1012
            assert advice_of(close).spread_s == 5.0
            assert 3.0 <= after_of(close) <= 8.0
        assert (manager.reconnect.admitted, manager.stats()["turned_away"]) == (1, 1)


# ---- admission -------------------------------------------------------------------------------------------------------


class TestAdmission:
    THREE = HerdPolicy(accept_rate=1.0, burst_s=3.0, admission=True)

    async def test_a_burst_comes_in_and_the_others_are_told_when(
        self, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = make_manager(clock, herd=self.THREE)
        async with manager, serving(park, manager) as url, clients_of(url, manager, 3):
            with caplog.at_level(logging.DEBUG, "wsfast"):
                for told in (2, 3, 4):  # slots after 1, 2 and 3 s, and up to 1 s of chance
                    response = await refused(url)
                    assert response.status_code == 503
                    assert int(response.headers["Retry-After"]) == told
                    assert response.body is not None and response.body.count(b"\n") == 1
            assert not [record for record in caplog.records if record.name.startswith("wsfast")]
            assert (manager.stats()["turned_away"], manager.reconnect.admitted) == (3, 3)
            clock.advance(SECOND)
            async with client(url):
                await until(lambda: len(manager.registry) == 4)
            assert (await refused(url)).status_code == 503

    async def test_all_come_in_when_they_come_back_as_they_were_told(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=self.THREE)
        due = [0.0] * 12
        attempts = 0
        async with manager, serving(park, manager) as url, contextlib.AsyncExitStack() as stack:
            began_ns = clock.now
            while due:
                attempts += 1
                assert attempts < 50
                due.sort()
                clock.now = began_ns + int(due[0] * SECOND)
                try:
                    await stack.enter_async_context(client(url))
                except websockets.InvalidStatus as error:
                    due[0] += int(error.response.headers["Retry-After"])
                else:
                    due.pop(0)
            await until(lambda: len(manager.registry) == 12)
            assert manager.stats()["turned_away"] == attempts - 12

    async def test_everybody_is_let_in_by_default(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=HerdPolicy(accept_rate=1.0))
        async with manager, serving(park, manager) as url, clients_of(url, manager, 10):
            await until(lambda: len(manager.registry) == 10)
            assert (manager.stats()["turned_away"], manager.reconnect.admitted) == (0, 10)

    async def test_also_where_the_handler_attaches(self, clock: FakeClock) -> None:
        manager = make_manager(clock, herd=self.THREE)

        async def handler(ws: ServerConnection) -> None:
            async with manager.attach(ws):
                await ws.wait_closed()

        async with manager, serving(handler, manager, attach=False) as url, clients_of(url, manager, 3):
            assert (await refused(url)).status_code == 503

    @pytest.mark.parametrize("is_async", [True, False])
    async def test_the_users_process_request_comes_behind(self, is_async: bool, clock: FakeClock) -> None:
        asked: list[str] = []

        def answer(ws: ServerConnection, request: Request) -> Response | None:
            asked.append(request.path)
            return ws.respond(404, "no\n") if request.path == "/no" else None

        async def answer_later(ws: ServerConnection, request: Request) -> Response | None:
            await asyncio.sleep(0)
            return answer(ws, request)

        manager = make_manager(clock, herd=self.THREE)
        process_request = answer_later if is_async else answer
        async with manager, serving(park, manager, process_request=process_request) as url, client(f"{url}/yes"):
            assert (await refused(f"{url}/no")).status_code == 404
            async with client(f"{url}/yes"):
                assert (await refused(f"{url}/late")).status_code == 503
        assert asked == ["/yes", "/no", "/yes"]

    async def test_a_process_request_that_fails_is_the_librarys_affair(self, clock: FakeClock) -> None:
        def fail(ws: ServerConnection, request: Request) -> None:
            raise ValueError("no")

        manager = make_manager(clock, herd=self.THREE)
        async with manager, serving(park, manager, process_request=fail) as url:
            assert (await refused(url)).status_code == 500

    async def test_a_request_that_is_no_handshake_is_not_counted(self, clock: FakeClock) -> None:
        """A load balancer that asks whether the server is well must not hear that too many come."""

        def answer(ws: ServerConnection, request: Request) -> Response | None:
            return ws.respond(200, "well\n") if request.path == "/health" else None

        async def health(url: str) -> bytes:
            host, port = url.removeprefix("ws://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(DEADLINE_S):
                status = await reader.readline()
            writer.close()
            return status

        manager = make_manager(clock, herd=self.THREE)
        async with manager, serving(park, manager, process_request=answer) as url, clients_of(url, manager, 3):
            assert (await refused(f"{url}/health")).status_code == 503
            assert await health(url) == b"HTTP/1.1 200 OK\r\n"
            await manager.close()
            assert await health(url) == b"HTTP/1.1 200 OK\r\n"
        assert (manager.reconnect.admitted, manager.reconnect.turned_away) == (3, 1)


# ---- overload --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_links")
class TestOverload:
    @contextlib.asynccontextmanager
    async def given_up(
        self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock, backpressure: Backpressure, count: int
    ) -> AsyncIterator[list[tuple[int, str]]]:
        """How connections are closed for which too much waits."""
        closes: list[tuple[int, str]] = []

        async def close(_: Any, ws: FakeLink, code: int, reason: str) -> None:
            closes.append((code, reason))
            ws.open = False

        monkeypatch.setattr(FakeAdapter, "close", close)
        herd = HerdPolicy(accept_rate=2.0, delay_least_s=5.0, delay_most_s=6.0)
        manager = make_manager(clock, herd=herd, backpressure=backpressure)
        async with manager, contextlib.AsyncExitStack() as stack:
            links = [FakeLink() for _ in range(count)]
            for number, link in enumerate(links):
                await stack.enter_async_context(manager.attach(link, str(number)))
                link.in_buffer = 1
            manager.broadcast_nowait("x")
            await until(lambda: all(link.waiting for link in links))
            while len(closes) + sum(link.aborted for link in links) < count:
                manager.broadcast_nowait("x" * 100)
                await asyncio.sleep(0)
            yield closes

    async def test_those_who_are_too_slow_are_told_times_of_their_own(
        self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
    ) -> None:
        async with self.given_up(monkeypatch, clock, Backpressure(max_bytes=1000), 20) as closes:
            assert {code for code, _ in closes} == {1013}
            told = sorted(after_of(close) for close in closes)
            assert len(set(told)) == 20
            assert 6.0 <= told[0] <= 7.5
            assert all(6.0 + number / 2 - 1 <= after_s <= 7.0 + number / 2 + 1 for number, after_s in enumerate(told))
            assert all(reason.startswith(Backpressure().reason) for _, reason in closes)
            assert all(advice_of(close).spread_s is None for close in closes)

    async def test_a_code_that_forbids_to_come_back_tells_no_time(
        self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
    ) -> None:
        settings = Backpressure(max_bytes=1000, code=1008, reason="too slow")
        async with self.given_up(monkeypatch, clock, settings, 1) as closes:
            assert closes == [(1008, "too slow")]

    async def test_the_budget_cuts_off_so_there_is_nothing_to_tell(
        self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
    ) -> None:
        settings = Backpressure(policy="keep", max_total_bytes=2**16)
        async with self.given_up(monkeypatch, clock, settings, 1) as closes:
            assert closes == []


# ---- the documents ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
async def test_the_example_restarts_as_it_stands() -> None:
    text = (ROOT / "docs" / "reconnect.md").read_text(encoding="utf-8").partition("## The server: herds")[2]
    program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    with socket.create_server(("localhost", 0)) as listening:
        port = str(listening.getsockname()[1])
    assert program.count("8765") == 1
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program.replace("8765", port), stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        async with asyncio.timeout(3 * DEADLINE_S), contextlib.AsyncExitStack() as stack:
            clients: list[ClientConnection] = []
            while len(clients) < 5:
                try:
                    clients.append(await stack.enter_async_context(client(f"ws://localhost:{port}")))
                except OSError:  # it does not listen yet
                    await asyncio.sleep(0.05)
            # Once all have heard something, all are registered.
            for ws in clients[1:]:
                heard = asyncio.create_task(ws.recv())
                while not heard.done():
                    await clients[0].send("hello")
                    await asyncio.wait([heard], timeout=0.1)
            server.send_signal(signal.SIGHUP)
            closes = [await close_of(ws) for ws in clients]
            _, log = await server.communicate()
    finally:
        if server.returncode is None:
            server.kill()
            await server.communicate()
    assert (server.returncode, log) == (0, b"")
    assert {code for code, _ in closes} == {1012}
    assert all(advice_of(close).spread_s == pytest.approx(5.01) for close in closes)
    assert len({after_of(close) for close in closes}) == 5


# ---- the hub ---------------------------------------------------------------------------------------------------------


class TestHub:
    async def test_it_restarts(self) -> None:
        hub = Hub(HubSettings(port=0, away_s=20.0))
        await hub.start()
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client(hub.url)) for _ in range(5)]
            await until(lambda: len(hub.manager.registry) == 5)
            await hub.stop(reason="restart")
            closes = [await close_of(ws) for ws in clients]
        assert {code for code, _ in closes} == {1012}
        # However long that took: less than the ten seconds that it is given.
        assert all(10.0 < after_of(close) <= 20.0 + 5.005 for close in closes)

    async def test_it_lets_in_so_many(self) -> None:
        async with Hub(HubSettings(port=0, accept_rate=0.001)) as hub, client(hub.url):
            response = await refused(hub.url)
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1

    @pytest.mark.parametrize("settings", [{"accept_rate": 0.0}, {"away_s": -1.0}])
    def test_bad_settings_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InvalidSetting, match=r"herd\."):
            Hub(HubSettings(**settings))
