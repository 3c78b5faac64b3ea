"""wsfast.js in Chromium, against servers that are cut off, killed, started again, or that talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from tests.browser.conftest import MODULE, ServerProcess
from tests.browser.devtools import DEADLINE_S, Page
from tests.browser.proxy import Cut, Proxy
from wsfast.session import Welcome, is_ready, read_hello


def url_of(link: Proxy) -> str:
    return f"ws://127.0.0.1:{link.port}/"


async def connected(page: Page, url: str, options: str = "{}") -> dict[str, Any]:
    """Make ``client``, and wait until it is connected. Returns that state."""
    state: dict[str, Any] = await page.run(
        f"globalThis.client = watch(url, {options}); return await client.is('connected')", url=url
    )
    return state


async def resumable(page: Page, url: str, options: str = "{}") -> dict[str, Any]:
    """The same, and wait until the server knows that the client has its token: before that, nobody is waited for."""
    state = await connected(page, url, options)
    await page.run("client.send('hi'); await client.until(() => client.messages.length); client.messages.length = 0")
    return state


class Raw:
    """A server in this process, that says only what a test wants it to.

    Attributes:
        url: its address.
        hellos: what clients said first, as far as they said something.
        codes: with which connections were closed.
    """

    def __init__(self) -> None:
        self.url = ""
        self.hellos: list[str | bytes] = []
        self.codes: asyncio.Queue[int | None] = asyncio.Queue()

    async def next_code(self) -> int | None:
        async with asyncio.timeout(DEADLINE_S):
            return await self.codes.get()


@contextlib.asynccontextmanager
async def raw_server(
    say: Callable[[ServerConnection, Raw], Awaitable[None]], subprotocols: list[Any] | None = None, **options: Any
) -> AsyncIterator[Raw]:
    """A server that does *say* with each connection, and then waits until it is closed."""
    raw = Raw()

    async def handle(ws: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await say(ws, raw)
            async for _ in ws:
                pass
        await ws.wait_closed()
        raw.codes.put_nowait(ws.close_code)

    options = {"ping_interval": None, "compression": None, "close_timeout": 1, **options}
    async with serve(handle, "127.0.0.1", 0, subprotocols=subprotocols, **options) as server:
        raw.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/"
        yield raw


# ---- one connection --------------------------------------------------------------------------------------------------


async def test_messages_of_each_kind_go_both_ways(page: Page, server: ServerProcess) -> None:
    state = await connected(page, server.url)
    assert len(state.pop("clientId")) == 22
    assert state == {
        "kind": "connected", "subprotocol": "", "resumed": False, "resent": 0, "lost": 0, "unconfirmed": 0,
    }  # fmt: skip
    seen = await page.run("""
        const numbers = new Uint16Array([1, 2, 3, 65535]);
        const buffer = new Uint8Array([9, 8, 7]).buffer;
        const texts = ["text", "", "\\u00e4\\u20ac\\u{1F600}"];
        const binaries = [buffer, numbers.subarray(1, 3), new DataView(buffer, 1)];
        for (const message of [...texts, ...binaries]) client.send(message);
        numbers.fill(0);
        await client.until(() => client.messages.length === 6);
        return client.messages.map((message) => typeof message === "string" ? message : [...new Uint8Array(message)]);
    """)
    assert seen == ["text", "", "\u00e4\u20ac\U0001f600", [9, 8, 7], [2, 0, 3, 0], [8, 7]]


async def test_what_cannot_be_kept_is_no_message(page: Page, server: ServerProcess) -> None:
    await connected(page, server.url)
    names = await page.run("""
        return [undefined, null, 1, {}, ["a"], new Blob(["a"])].map((message) => {
          try { client.send(message); } catch (error) { return error.name; }
        });
    """)
    assert names == ["TypeError"] * 6


async def test_large_messages(page: Page, link: Proxy) -> None:
    await connected(page, url_of(link))
    assert await page.run("""
        const bytes = new Uint8Array(5_000_000).map((_, at) => at % 251);
        const text = "0123456789".repeat(200_000);
        client.send(bytes); client.send(text); client.send("end");
        await client.until(() => client.messages.length === 3);
        const [back, textBack] = client.messages;
        const same = new Uint8Array(back).every((byte, at) => byte === at % 251);
        return textBack === text && back.byteLength === 5_000_000 && same;
    """)


async def test_the_subprotocol_of_the_application_is_agreed_on_together(page: Page, server: ServerProcess) -> None:
    state = await connected(page, server.url, "{subprotocols: ['chat.v9', 'chat.v1', 'chat.v2']}")
    # The server's preference counts.
    assert (state["subprotocol"], state["resumed"]) == ("chat.v2", False)
    state = await connected(page, server.url, "{subprotocols: 'chat.v1'}")
    assert (state["subprotocol"], state["resumed"]) == ("chat.v1", False)
    state = await connected(page, server.url, "{subprotocols: 'chat.v1', resume: false}")
    assert (state["subprotocol"], state["resumed"]) == ("chat.v1", None)


async def test_a_server_that_does_not_speak_the_protocol_is_served_as_ever(page: Page) -> None:
    async def echo(ws: ServerConnection, raw: Raw) -> None:
        async for message in ws:
            await ws.send(message)

    async with raw_server(echo, ["chat.v1"]) as raw:
        state = await connected(page, raw.url, "{subprotocols: ['chat.v2', 'chat.v1']}")
        assert (state["subprotocol"], state["resumed"], state["clientId"]) == ("chat.v1", None, None)
        await page.run("client.send('a'); await client.until(() => client.messages.length === 1); client.close()")
        assert await raw.next_code() == 1000


async def test_a_server_without_subprotocols_is_told_so(page: Page) -> None:
    async def greet(ws: ServerConnection, raw: Raw) -> None:
        await ws.send("welcome")

    async with raw_server(greet) as raw:
        # What is offered must be answered, so says the standard to browsers.
        state = await page.run(
            "globalThis.client = watch(url, {policy: late}); return await client.is('waiting')", url=raw.url
        )
        assert (state["code"], state["because"]) == (1006, "strategy")
        await page.run("client.close()")
        state = await connected(page, raw.url, "{resume: false}")
        assert state["resumed"] is None
        assert await page.run("await client.until(() => client.messages.length); return client.messages") == ["welcome"]


async def test_messages_can_be_iterated_over(page: Page, server: ServerProcess) -> None:
    await connected(page, server.url)
    taken = await page.run("""
        const taken = [];
        for (const message of range(5, "m")) client.send(message);
        for await (const message of client) {
          taken.push(message);
          if (taken.length === 3) break;
        }
        await client.until(() => client.messages.length === 5);
        client.send("last");
        for await (const message of client) {
          taken.push(message);
          client.close();
        }
        for await (const message of client) taken.push(message);
        return taken;
    """)
    assert taken == ["m0", "m1", "m2", "last"]


# ---- cut off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_cut_anywhere_messages_come_once_and_in_order_both_ways(page: Page, link: Proxy, seed: int) -> None:
    """The server answers each message with itself, so what comes back is what it was given."""
    rng = random.Random(seed)
    await resumable(page, url_of(link))
    for _ in range(16):
        # In the opening handshake, of some 500 bytes up and 150 down, in that of resume, or among the messages.
        at = rng.choice([rng.randint(0, 300), rng.randint(100, 900), rng.randint(300, 1500)])
        reset = rng.random() < 0.5
        link.cuts.append(Cut(up=at + 300, reset=reset) if rng.random() < 0.5 else Cut(down=at, reset=reset))

    link.cut()
    messages, states = await page.run(
        """
        const decoder = new TextDecoder();
        const given = [], streamed = [];
        // Of any length up to a hundred bytes, and every third is a binary one.
        const sent = range(500, "m").map((text, number) => text.padEnd(number % 100, "."));
        const texts = sent.map((text, number) => (number % 3 ? text : new TextEncoder().encode(text))).values();
        const sendNext = () => {
          const { value, done } = texts.next();
          if (!done) client.send(value);
        };
        client.addEventListener("message", ({data}) => {
          const text = typeof data === "string" ? data : decoder.decode(data);
          (text[0] === "m" ? given : streamed).push(text);
          // A new one for each answer, so that some are always on their way.
          if (text[0] === "m") sendNext();
        });
        client.send("!stream 500");
        for (let count = 0; count < 20; count++) sendNext();
        await client.until(() => given.length === sent.length && streamed.length === 500);
        return [[given.map((text) => text.replace(/[.]/g, "")), streamed], client.states];
        """
    )

    assert messages == [[f"{kind}{number}" for number in range(500)] for kind in "ms"]
    came = [state for state in states if state["kind"] == "connected"]
    assert [state["resumed"] for state in came] == [False] + [True] * (len(came) - 1)
    assert len({state["clientId"] for state in came}) == 1
    assert {(state["lost"], state["unconfirmed"]) for state in came} == {(0, 0)}
    assert link.cuts == []
    assert len(came) > 5


async def test_a_welcome_that_is_lost_costs_nothing(page: Page, link: Proxy) -> None:
    first = await resumable(page, url_of(link))
    link.cut_at = b'"welcome"'
    link.cut()
    state = await page.run("""
        await client.until(() => client.all("connected").length === 2);
        client.send("a"); await client.until(() => client.messages.length === 1);
        return client.state;
    """)
    assert (state["resumed"], state["clientId"]) == (True, first["clientId"])
    assert link.cut_at is None
    assert link.made == 3


async def test_what_was_on_its_way_is_sent_again_as_far_as_it_was_kept(page: Page, link: Proxy) -> None:
    await resumable(page, url_of(link), "{kept: {maxMessages: 2}}")
    await page.run("client.send('a'); await client.until(() => client.messages.length === 1)")
    link.stalled = True
    assert await page.run("range(5, 'm').forEach((message) => client.send(message)); return client.queued") == 0
    link.stalled = False
    link.cut()
    state = await page.run("""
        await client.until(() => client.all("connected").length === 2);
        await client.until(() => client.messages.length === 3);
        return client.state;
    """)
    assert (state["resumed"], state["resent"], state["lost"]) == (True, 2, 3)
    # What was lost is not counted on either side: the next time, all is well.
    link.cut()
    state = await page.run("""
        await client.until(() => client.all("connected").length === 3);
        client.send("b"); await client.until(() => client.messages.length === 4);
        return client.state;
    """)
    assert (state["resumed"], state["resent"], state["lost"]) == (True, 0, 0)
    assert await page.run("return client.messages") == ["a", "m3", "m4", "b"]


async def test_bytes_bound_what_is_kept(page: Page, link: Proxy) -> None:
    await resumable(page, url_of(link), "{kept: {maxBytes: 10}}")
    link.stalled = True
    await page.run("client.send('12345678'); client.send('\\u20ac\\u20ac'); client.send(new Uint8Array(4))")
    link.stalled = False
    link.cut()
    state = await page.run("await client.until(() => client.all('connected').length === 2); return client.state")
    assert (state["resent"], state["lost"]) == (2, 1)


async def test_who_takes_over_closes_the_connection_that_looked_alive(page: Page, link: Proxy) -> None:
    first = await resumable(page, url_of(link))
    link.cut_pages()
    state = await page.run("await client.until(() => client.all('connected').length === 2); return client.state")
    assert (state["resumed"], state["clientId"]) == (True, first["clientId"])
    async with asyncio.timeout(DEADLINE_S):
        # The close frame for the former connection, which the proxy still reads.
        while re.search(rb"\x88.\x11\x39", link.sent_down[0], re.DOTALL) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_log_that_does_not_reach_back_is_a_clean_start(page: Page, forgetful: ServerProcess) -> None:
    async with Proxy.to(forgetful.port) as link:
        first = await resumable(page, url_of(link))
        link.mode = "refuse"
        await page.run("client.send('!stream 100'); await client.until(() => client.messages.length > 1)")
        link.cut()
        # Whoever gets all of a stream that began later knows that the first one has ended, too.
        await page.run(
            """const other = watch(url);
               other.send("!stream 100");
               await other.until(() => other.messages.length === 100);
               other.close()""",
            url=forgetful.url,
        )
        link.mode = "pass"
        state = await page.run("await client.until(() => client.all('connected').length === 2); return client.state")
    assert state["resumed"] is False
    assert state["clientId"] != first["clientId"]
    assert state["unconfirmed"] == 2


# ---- killed, and started again ---------------------------------------------------------------------------------------


async def test_a_server_that_is_killed_and_started_again_is_found_again(page: Page, server: ServerProcess) -> None:
    first = await connected(page, server.url)
    await page.run("client.send('before'); await client.until(() => client.messages.length === 1)")
    for round_ in (2, 3):
        server.kill()
        await page.run("await client.is('waiting'); client.send('away'); client.send('too')")
        server.start()
        state = await page.run(
            "await client.until(() => client.all('connected').length === round); return client.state", round=round_
        )
        assert state["resumed"] is False
        assert state["clientId"] != first["clientId"]
        # Of one message before, or two, nobody knows: the server that could tell is gone.
        assert (state["unconfirmed"], state["resent"], state["lost"]) == (round_ - 1, 0, 0)
        await page.run("await client.until(() => client.messages.length === count)", count=2 * round_ - 1)
    assert await page.run("return client.messages") == ["before", "away", "too", "away", "too"]


async def test_a_connection_that_drops_at_once_still_backs_off(page: Page) -> None:
    async def drop(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        await ws.send(str(Welcome("c", "t")))
        await ws.close(1011)

    async with raw_server(drop, ["wsfast.1"]) as raw:
        states = await page.run(
            """const policy = ReconnectPolicy.only(new EqualJitter({baseS: 0.01, maxAttempts: 5}));
               globalThis.client = watch(url, {policy, random: () => 0.5});
               await client.is("closed");
               return client.states""",
            url=raw.url,
        )
        assert len(raw.hellos) == 6
    waiting = [state for state in states if state["kind"] == "waiting"]
    assert [state["attempt"] for state in waiting] == [0, 1, 2, 3, 4]
    assert [state["waitS"] for state in waiting] == pytest.approx([0.0075, 0.015, 0.03, 0.06, 0.12])
    assert states[-1] == {"kind": "closed", "because": "given up", "code": 1011, "reason": "", "unsent": 0}
    assert [state["kind"] for state in states] == ["connecting", "connected", "waiting"] * 5 + [
        "connecting", "connected", "closed",
    ]  # fmt: skip


# ---- what the server tells -------------------------------------------------------------------------------------------


async def test_4409_ends_it(page: Page, server: ServerProcess) -> None:
    await connected(page, server.url)
    state = await page.run("client.send('!close 4409 taken over'); return await client.is('closed')")
    assert state == {"kind": "closed", "because": "forbidden", "code": 4409, "reason": "taken over", "unsent": 0}
    thrown = await page.run("try { client.send('x') } catch (error) { return {name: error.name, ...error} }")
    assert thrown == {"name": "ClientClosed", "because": "forbidden", "code": 4409, "reason": "taken over"}


async def test_the_reason_tells_when(page: Page, server: ServerProcess) -> None:
    await connected(page, server.url)
    waiting = "return await client.until(() => client.state.kind === 'waiting')"
    state = await page.run(f"client.send('!close 1012 restart; retry-after=0.050'); {waiting}")
    assert (state["because"], state["code"], state["attempt"]) == ("told", 1012, 0)
    assert state["waitS"] == 0.05
    assert (await page.run("return await client.is('connected')"))["resumed"] is False

    # A spread is as good as told, and stays so; the code asks for 5 seconds on top. The network does not shorten them.
    state = await page.run(f"client.send('!close 1013 spread=0.010'); {waiting}")
    assert (state["because"], state["code"]) == ("spread", 1013)
    assert 5 <= state["waitS"] < 6
    assert await page.run("dispatchEvent(new Event('online')); return client.state") == state
    await page.run("client.close()")


@pytest.mark.parametrize(
    ("code", "reason", "kind", "because"),
    [(4401, "who are you", "closed", "forbidden"), (1013, "busy; retry-after=100", "waiting", "told")],
)
async def test_a_server_may_close_in_place_of_a_welcome(
    page: Page, code: int, reason: str, kind: str, because: str
) -> None:
    async def refuse(ws: ServerConnection, raw: Raw) -> None:
        await ws.close(code, reason)

    async with raw_server(refuse, ["wsfast.1"]) as raw:
        state = await page.run(
            "const client = watch(url); const state = await client.is(kind); client.close(); return state",
            url=raw.url,
            kind=kind,
        )
    assert (state["because"], state["code"], state["reason"]) == (because, code, reason)


async def test_what_the_welcome_tells_is_known_when_the_server_dies_without_a_word(page: Page) -> None:
    async def die(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        await ws.send(str(Welcome("c", "t", spread_s=1000.0)))
        assert is_ready(await ws.recv())
        ws.transport.abort()

    async with raw_server(die, ["wsfast.1"]) as raw:
        state = await page.run(
            "globalThis.client = watch(url, {random: () => 0.25}); return await client.is('waiting')", url=raw.url
        )
        # No more than the policy's mostToldS is believed.
        assert (state["because"], state["waitS"]) == ("spread", 225)
        await page.run("client.close()")


async def test_each_failure_is_weighed_by_what_it_was(page: Page) -> None:
    """A connection that is lost, one that cannot be made, and one that ends before the welcome."""

    async def die(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        if len(raw.hellos) == 1:
            await ws.send(str(Welcome("c", "t", spread_s=0.02)))
            assert is_ready(await ws.recv())
        ws.transport.abort()

    def refuse(ws: ServerConnection, _request: Request) -> Response | None:
        asked.append(ws)
        return ws.respond(503, "not now") if len(asked) == 2 else None

    asked: list[ServerConnection] = []
    async with raw_server(die, ["wsfast.1"], process_request=refuse) as raw:
        waiting = await page.run(
            """let ticks = 0;  // each look at the clock takes longer than a connection must last
               const client = watch(url, {random: () => 0.5, now: () => (ticks += 50)});
               await client.until(() => client.all("waiting").length === 3);
               client.close();
               return client.all("waiting")""",
            url=raw.url,
        )
    # A part of the spread; all of it and up to a tenth; all of it and up to as much again.
    assert [state["waitS"] for state in waiting] == pytest.approx([0.01, 0.021, 0.03])
    # Only the first had lasted.
    assert [state["attempt"] for state in waiting] == [0, 1, 2]


# ---- what waits ------------------------------------------------------------------------------------------------------


async def test_what_is_sent_while_away_waits_in_order(page: Page, link: Proxy) -> None:
    await resumable(page, url_of(link))
    link.mode = "refuse"
    link.cut()
    before = await page.run("""
        await client.is("waiting");
        for (const message of range(5, "m")) client.send(message);
        const bytes = new Uint8Array([1]);
        client.send(bytes);
        client.send(bytes.buffer);
        bytes[0] = 2;
        return [client.queued, client.bufferedAmount, client.dropped];
    """)
    assert before == [7, 12, 0]
    link.mode = "pass"
    messages = await page.run("""
        await client.until(() => client.messages.length === 7);
        const [one, two] = client.messages.slice(5).map((message) => [...new Uint8Array(message)]);
        return [...client.messages.slice(0, 5), one, two, client.queued];
    """)
    assert messages == ["m0", "m1", "m2", "m3", "m4", [1], [1], 0]


async def test_what_a_closing_socket_would_swallow_waits(page: Page) -> None:
    async def echo(ws: ServerConnection, raw: Raw) -> None:
        async for message in ws:
            await ws.send(message)

    async with raw_server(echo) as raw:
        queued = await page.run(
            """globalThis.isClosing = false;
               class Closing extends WebSocket {
                 get readyState() { return isClosing ? WebSocket.CLOSING : super.readyState; }
               }
               globalThis.client = watch(url, {resume: false, WebSocket: Closing});
               await client.is("connected");
               isClosing = true;
               client.send("a");
               return client.queued""",
            url=raw.url,
        )
        assert queued == 1


@pytest.mark.parametrize(
    ("queue", "kept", "dropped"),
    [
        ("{maxMessages: 3}", ["m2", "m3", "m4"], 2),
        ("{maxMessages: 3, whenFull: 'drop_newest'}", ["m0", "m1", "m2"], 2),
        ("{maxMessages: 3, whenFull: 'throw'}", ["m0", "m1", "m2", "QueueFull 3 6", "QueueFull 3 6"], 0),
        ("{maxBytes: 5}", ["m3", "m4"], 3),
        ("{maxBytes: 1}", [], 5),
        ("{maxMessages: 0}", [], 5),
    ],
)
async def test_what_waits_is_bounded(
    page: Page, server: ServerProcess, queue: str, kept: list[str], dropped: int
) -> None:
    """Also before the first connection."""
    found = await page.run(
        f"""
        const client = watch(url, {{queue: {queue}}});
        const thrown = [];
        for (const message of range(5, "m")) {{
          try {{
            client.send(message);
          }} catch (error) {{
            thrown.push([error.name, error.messages, error.bytes].join(" "));
          }}
        }}
        const {{dropped}} = client;
        await client.is("connected");
        client.send("end");
        await client.until(() => client.messages.at(-1) === "end");
        return [[...client.messages.slice(0, -1), ...thrown], dropped];
        """,
        url=server.url,
    )
    assert found == [kept, dropped]


# ---- closing ---------------------------------------------------------------------------------------------------------


async def test_close_ends_the_session_at_once(page: Page) -> None:
    async def greet(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        await ws.send(str(Welcome("c", "t")))

    async with raw_server(greet, ["wsfast.1"]) as raw:
        await connected(page, raw.url)
        states = await page.run("client.close(); client.close(4000, 'again'); return client.states.slice(2)")
        assert states == [{"kind": "closed", "because": "closed", "code": 1000, "reason": "", "unsent": 0}]
        assert await raw.next_code() == 1000
        await connected(page, raw.url)
        await page.run("client.close(4000, 'why not')")
        assert await raw.next_code() == 4000


async def test_close_while_waiting_ends_it_at_once(page: Page, nowhere: str) -> None:
    states = await page.run(
        """const client = watch(url, {policy: late});
           await client.is("waiting");
           client.send("a");
           client.close(4001, "enough");
           dispatchEvent(new Event("online"));
           dispatchEvent(new PageTransitionEvent("pageshow", {persisted: true}));
           return client.states""",
        url=nowhere,
    )
    assert [state["kind"] for state in states] == ["connecting", "waiting", "closed"]
    assert states[-1] == {"kind": "closed", "because": "closed", "code": 4001, "reason": "enough", "unsent": 1}


async def test_close_while_connecting_ends_it_at_once(page: Page, link: Proxy) -> None:
    link.mode = "hole"
    states = await page.run("const client = watch(url); client.close(); return client.states", url=url_of(link))
    assert [state["kind"] for state in states] == ["connecting", "closed"]


async def test_a_listener_may_close(page: Page, server: ServerProcess, nowhere: str) -> None:
    """At each change of state: nothing comes after it."""
    states = await page.run(
        """const seen = [];
           for (const [where, kind] of [[server, "connecting"], [server, "connected"], [nowhere, "waiting"]]) {
             const client = watch(() => where);
             if (kind === "connecting") client.close();
             client.addEventListener("state", ({detail}) => detail.kind === kind && client.close());
             await client.is("closed");
             seen.push(client.states.map(({kind}) => kind));
           }
           // An address is not asked for any more either.
           let asked = 0;
           const client = watch(() => (asked++, nowhere));
           client.addEventListener("state", ({detail}) => detail.kind === "connecting" && client.close());
           await client.is("closed");
           seen.push([...client.states.map(({kind}) => kind), asked]);
           return seen""",
        server=server.url,
        nowhere=nowhere,
    )
    assert states == [
        ["connecting", "closed"],
        ["connecting", "connected", "closed"],
        ["connecting", "waiting", "closed"],
        ["connecting", "waiting", "connecting", "closed", 1],
    ]


async def test_close_takes_what_a_websocket_takes(page: Page, nowhere: str) -> None:
    thrown = await page.run(
        """const client = watch(url, {policy: late});
           return [[1001], [2999], [5000], [3000.5], ["1000"], [1000, "\\u20ac".repeat(42)]].map((how) => {
             try { client.close(...how); } catch (error) { return error.name; }
           })""",
        url=nowhere,
    )
    assert thrown == ["RangeError"] * 6
    assert (
        await page.run("const c = watch(url); c.close(1000, '\\u20ac'.repeat(41)); return c.state.kind", url=nowhere)
        == "closed"
    )


# ---- addresses -------------------------------------------------------------------------------------------------------


async def test_a_function_is_asked_for_the_address_of_each_attempt(page: Page, server: ServerProcess) -> None:
    states = await page.run(
        """let asked = 0;
           const client = watch(async () => {
             asked += 1;
             if (asked === 1) throw new Error("no token today");
             if (asked === 2) return "no:address";
             return `${url}?ticket=${asked}`;
           });
           await client.is("connected");
           return client.states""",
        url=server.url,
    )
    assert [state["kind"] for state in states] == ["connecting", "waiting"] * 2 + ["connecting", "connected"]
    assert states[1]["reason"] == "Error: no token today"
    assert states[3]["reason"].startswith("SyntaxError")


async def test_an_address_that_comes_too_late_is_not_used(page: Page, link: Proxy) -> None:
    states, asked = await page.run(
        """let asked = 0, answerFirst;
           const client = watch(() => {
             asked += 1;
             if (asked === 1) return new Promise((resolve) => (answerFirst = resolve));
             if (asked > 2) return url;
             answerFirst(url);
             return new Promise(() => {});
           }, {connectTimeoutS: 0.3});
           await client.is("connected");
           return [client.states, asked]""",
        url=url_of(link),
    )
    assert [state["kind"] for state in states[:5]] == ["connecting", "waiting"] * 2 + ["connecting"]
    assert 1 <= link.made <= asked - 2


# ---- servers that talk nonsense, or not at all -----------------------------------------------------------------------


async def test_an_attempt_takes_only_so_long(page: Page, link: Proxy) -> None:
    link.mode = "hole"
    state = await page.run(
        "globalThis.client = watch(url, {connectTimeoutS: 0.5}); return await client.is('waiting')", url=url_of(link)
    )
    assert (state["code"], state["reason"], state["because"]) == (1006, "no connection in time", "strategy")
    link.mode = "pass"
    await page.run("await client.is('connected')")


async def test_a_welcome_takes_only_so_long(page: Page) -> None:
    async def hesitate(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        if len(raw.hellos) == 1:
            await ws.send(str(Welcome("c", "t")))
            assert is_ready(await ws.recv())
            ws.transport.abort()

    async with raw_server(hesitate, ["wsfast.1"]) as raw:
        # On a busy machine, the connection may take as long: then it is tried again.
        state = await page.run(
            """const client = watch(url, {connectTimeoutS: 0.3});
               const late = () => client.all("waiting").filter(({reason}) => reason === "no welcome in time");
               await client.until(() => late().length === 2);
               client.close();
               return late()[0]""",
            url=raw.url,
        )
        assert (state["code"], state["because"]) == (1006, "strategy")
        while await raw.next_code() != 4408:
            pass
    # The session is not given up: the welcome that did not come may have begun to go on with it.
    hellos = [read_hello(hello) for hello in raw.hellos]
    assert [hello.token for hello in hellos] == [None, *["t"] * (len(hellos) - 1)]
    assert [hello.attempt for hello in hellos] == list(range(len(hellos)))


async def test_what_came_in_time_is_not_too_late_later(page: Page, server: ServerProcess) -> None:
    states = await page.run(
        """const client = watch(url, {connectTimeoutS: 0.3});
           await client.is("connected");
           const { length } = client.states;
           // A timer that was set before would ring before this one.
           await new Promise((resolve) => setTimeout(resolve, 400));
           return client.states.length - length""",
        url=server.url,
    )
    assert states == 0


NONSENSE: list[str | bytes] = [
    b'{"wsfast": "welcome"}',
    "",
    "[]",
    "hello",
    '{"wsfast": "welcome"}',
    json.dumps({"wsfast": "welcome", "client_id": "c", "token": "t", "resumed": True, "received": 2**60}),
    str(Welcome("c", "t", True)),
    str(Welcome("c", "t", received=-1)),
    str(Welcome("c" * 5000, "t")),
]


async def test_nonsense_ends_the_session_and_is_tried_again_in_time(page: Page) -> None:
    said = iter(NONSENSE)

    async def talk(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        await ws.send(next(said))

    # Between attempts, 5 seconds and more would pass.
    options = "{policy: {delayLeastS: 0.01, delayMostS: 0.02, default: new FullJitter({baseS: 1e-6, capS: 1e-6})}}"
    async with raw_server(talk, ["wsfast.1"]) as raw:
        waiting = await page.run(
            f"""const client = watch(url, {options});
                await client.until(() => client.all("waiting").length === count);
                client.close();
                return client.all("waiting")""",
            url=raw.url,
            count=len(NONSENSE),
        )
        assert [await raw.next_code() for _ in NONSENSE] == [4400] * len(NONSENSE)
        assert {read_hello(hello).token for hello in raw.hellos} == {None}
    assert {(state["code"], state["because"]) for state in waiting} == {(4400, "delay")}
    assert len({state["reason"] for state in waiting}) > 4


async def test_counts_that_cannot_be_end_the_session(page: Page) -> None:
    """First a good welcome; then one that says that more was received than was sent."""

    async def talk(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        turn = len(raw.hellos)
        await ws.send(str(Welcome("c", f"t{turn}", resumed=turn == 2, received=3 * (turn == 2))))
        if turn == 1:
            assert is_ready(await ws.recv())
            assert [await ws.recv(), await ws.recv()] == ["a", "b"]
            ws.transport.abort()

    async with raw_server(talk, ["wsfast.1"]) as raw:
        states = await page.run(
            """const policy = {delayLeastS: 0.01, delayMostS: 0.01, default: new FullJitter({baseS: 0.01})};
               const client = watch(url, {policy});
               client.send("a"); client.send("b");
               await client.until(() => client.all("connected").length === 2);
               return client.states""",
            url=raw.url,
        )
        assert [read_hello(hello).token for hello in raw.hellos] == [None, "t1", None]
    assert [state["kind"] for state in states] == [
        "connecting", "connected", "waiting", "connecting", "waiting", "connecting", "connected",
    ]  # fmt: skip
    assert (states[4]["code"], states[4]["reason"]) == (4400, "the server resumes what there was not")
    # The fate of both is still told when there is a session again.
    assert (states[-1]["resumed"], states[-1]["unconfirmed"]) == (False, 2)


async def test_a_server_may_have_no_sessions(page: Page) -> None:
    async def talk(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        await ws.send(str(Welcome("c", None)))
        assert is_ready(await ws.recv())
        assert await ws.recv() == "a"
        ws.transport.abort()

    async with raw_server(talk, ["wsfast.1"]) as raw:
        states = await page.run(
            """const client = watch(url);
               client.send("a");
               await client.until(() => client.all("connected").length === 1);
               await client.until(() => client.all("waiting").length === 1);
               client.send("a");
               await client.until(() => client.all("waiting").length === 2);
               client.close();
               return client.all("connected")""",
            url=raw.url,
        )
        assert {read_hello(hello) for hello in raw.hellos[:2]} == {read_hello('{"wsfast": "hello"}')}
    # Of what was sent, nobody knows anything.
    assert [(state["resumed"], state["unconfirmed"]) for state in states] == [(None, 0), (None, 1)]
    assert {state["clientId"] for state in states} == {"c"}


# ---- what the browser knows ------------------------------------------------------------------------------------------


async def breakable(ws: ServerConnection, raw: Raw) -> None:
    """Cuts off the connection when it is asked to; tells nothing about when to come back, or to spread over 1000 s."""
    if ws.subprotocol is not None:
        raw.hellos.append(await ws.recv())
        times, spread_s = len(raw.hellos), 1000.0 if "spread" in ws.request.path else None
        await ws.send(str(Welcome("c", f"t{times}", times > 1, times - 1, spread_s=spread_s)))
        assert is_ready(await ws.recv())
    assert await ws.recv() == "cut"
    ws.transport.abort()


@pytest.mark.parametrize(("path", "because"), [("", "strategy"), ("spread", "spread")])
async def test_who_is_online_again_does_not_wait_any_longer(page: Page, path: str, because: str) -> None:
    async with raw_server(breakable, ["wsfast.1"]) as raw:
        await connected(page, raw.url + path, "{policy: late}")
        state = await page.run("client.send('cut'); return await client.is('waiting')")
        assert (state["because"], state["waitS"] > 1) == (because, True)
        await page.call("Network.enable")
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await page.call("Network.emulateNetworkConditions", offline=True, **conditions)
        assert await page.run("return [navigator.onLine, client.state.kind]") == [False, "waiting"]
        await page.call("Network.emulateNetworkConditions", offline=False, **conditions)
        states = await page.run("await client.is('connected'); return client.states.slice(-3)")
    assert [state["kind"] for state in states] == ["waiting", "connecting", "connected"]
    assert states[0]["because"] == "hurry"
    assert states[0]["waitS"] <= 1
    assert states[2]["resumed"] is True


async def test_a_loss_that_is_noticed_after_the_network_is_back_is_made_up_for_once(page: Page) -> None:
    async with raw_server(breakable, ["wsfast.1"]) as raw:
        # A machine may be so busy that a second passes before the cut is noticed.
        options = "{policy: {hurryS: 60, default: new FullJitter({baseS: 1e6, capS: 1e6})}, random: () => 1e-4}"
        await connected(page, raw.url, options)
        states = await page.run("""
            dispatchEvent(new Event("online"));
            client.send("cut");
            await client.until(() => client.all("connected").length === 2);
            return client.states.slice(-4);
        """)
        assert [state["kind"] for state in states] == ["waiting", "waiting", "connecting", "connected"]
        assert [state["because"] for state in states[:2]] == ["strategy", "hurry"]
        assert states[-1]["resumed"] is True
        state = await page.run("client.send('cut'); return await client.is('waiting')")
        assert (state["because"], state["waitS"]) == ("strategy", 100)


async def test_what_is_sooner_than_in_a_hurry_stays(page: Page, nowhere: str) -> None:
    states = await page.run(
        """const policy = ReconnectPolicy.only(new FullJitter({baseS: 0.5, maxAttempts: 1}));
           const client = watch(url, {policy, random: () => 0.9});
           await client.is("waiting");
           dispatchEvent(new Event("online"));
           await client.is("closed");
           return client.all("waiting")""",
        url=nowhere,
    )
    assert [state["waitS"] for state in states] == [0.45]


async def test_a_page_out_of_the_cache_comes_back_as_the_same_client(page: Page, site: str) -> None:
    """Left with a link, and come back to with the browser's button. The browser's own close would end the session."""

    async def greet(ws: ServerConnection, raw: Raw) -> None:
        raw.hellos.append(await ws.recv())
        await ws.send(str(Welcome("c", f"t{len(raw.hellos)}", resumed=len(raw.hellos) > 1)))

    async with raw_server(greet, ["wsfast.1"]) as raw:
        await connected(page, raw.url, "{policy: late}")
        await page.go(site.replace("127.0.0.1", "localhost"))
        assert await page.run("return typeof client") == "undefined"
        await page.go_back()
        states = await page.run(
            "await client.until(() => client.all('connected').length === 2); return client.states.slice(2)"
        )
        assert await raw.next_code() == 4408
        assert read_hello(raw.hellos[1]).token == "t1"
    assert [state["kind"] for state in states] == ["waiting", "waiting", "connecting", "connected"]
    assert [state["because"] for state in states[:2]] == ["strategy", "hurry"]
    assert states[-1]["resumed"] is True


async def test_a_page_that_was_in_no_cache_is_left_alone(page: Page, link: Proxy) -> None:
    await connected(page, url_of(link))
    states = await page.run("""
        dispatchEvent(new PageTransitionEvent("pageshow", {persisted: false}));
        client.send("a");
        await client.until(() => client.messages.length === 1);
        return client.states.length;
    """)
    assert (states, link.made) == (2, 1)


async def test_the_quality_of_the_link_chooses_the_strategy_if_it_is_told(page: Page) -> None:
    waits = []
    async with raw_server(breakable) as raw:
        for told in ("", "client.latencyS = 0.01", "client.loss = 0.5"):
            await connected(page, raw.url, "{policy: {}, resume: false, random: () => 0.5}")
            state = await page.run(
                f"{told}; client.send('cut'); const state = await client.is('waiting'); client.close(); return state"
            )
            waits.append(state["waitS"])
    assert waits == [2.5, 0.5, 3.75]


async def test_nothing_is_left_when_a_client_is_closed(page: Page, server: ServerProcess) -> None:
    """No listener on the window, which would keep it alive."""
    collected = await page.run(
        """const listening = new Set();
           globalThis.addEventListener = (type, listener) => listening.add(listener);
           globalThis.removeEventListener = (type, listener) => listening.delete(listener);
           const client = connect(url);
           const during = listening.size;
           await new Promise((resolve) => client.addEventListener("state", resolve, {once: true}));
           client.close();
           return [during, listening.size]""",
        url=server.url,
    )
    assert collected == [2, 0]


# ---- the document ----------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "reconnect.md").read_text(encoding="utf-8")


async def test_the_example_of_the_document_runs_as_it_stands(page: Page, site: str, server: ServerProcess) -> None:
    (program,) = re.findall(r"```js\n(.*?)```", DOCUMENT, re.DOTALL)
    for theirs, ours in (("/static/wsfast.js", f"{site}wsfast.js"), ("ws://localhost:8765/", server.url)):
        assert program.count(theirs) == 1
        program = program.replace(theirs, ours)
    said = await page.run(
        """const said = [];
           const heard = new Promise((resolve) => {
             console.log = (text) => said.push(text) === 2 && resolve();
           });
           await import(`data:text/javascript,${encodeURIComponent(program)}`);
           await heard;
           return said""",
        program=program,
    )
    # What was sent before there was a connection goes first.
    assert said == ["hello", "subscribe prices"]


def test_the_module_is_found_as_the_document_says() -> None:
    programs = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    program = next(program for program in programs if 'files("wsfast")' in program)
    found: dict[str, Any] = {}
    exec(program, found)
    assert b"export function connect(" in found["module"]
    assert {path.name for path in found["static"].iterdir()} == {"wsfast.js", "wsfast.d.ts"}


async def test_the_types_name_what_the_module_has(page: Page) -> None:
    """What it exports for its tests alone is left out."""
    types = (Path(str(MODULE)).with_suffix(".d.ts")).read_text(encoding="utf-8")
    named = set(re.findall(r"^export (?:class|function|const) (\w+)", types, re.MULTILINE))
    exported = set(await page.run("return Object.keys(wsfast)"))
    assert named <= exported
    assert exported - named == {
        "BadHandshake", "CLOSE_CODES", "ClientSession", "Level", "ReconnectHistory", "Reconnector",
        "adviceFromReason", "offers", "readWelcome", "verdictOf",
    }  # fmt: skip
    # The members of a client, and the settings of a policy, are typed as they are there.
    members = await page.run("""
        const client = connect("ws://127.0.0.1:1/");
        client.close();
        const own = Object.getOwnPropertyNames(Client.prototype).filter((name) => name !== "constructor");
        return [[...own, ...Object.keys(client)], Object.keys(new ReconnectPolicy())];
    """)
    for name in itertools.chain(*members):
        assert re.search(rf"\b{name}\b", types), name
