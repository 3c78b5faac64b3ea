"""The hub: its protocol word by word, and that nothing a client sends does harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection

from tests.server.conftest import DEADLINE_S, RawPeer, client, close_of, until
from wsfast import InvalidSetting
from wsfast.client import connect
from wsfast.hub import CannotListen, Hub, HubSettings, Refused, parse
from wsfast.reconnect import FullJitter, ReconnectPolicy


class HubClient:
    """A client that speaks JSON and insists on the answer."""

    def __init__(self, ws: ClientConnection, welcome: dict[str, Any]) -> None:
        self.ws = ws
        self.welcome = welcome

    async def next(self) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return json.loads(await self.ws.recv())

    async def ask(self, **request: Any) -> Any:
        await self.ws.send(json.dumps(request))
        return await self.next()

    async def send(self, data: str | bytes) -> Any:
        await self.ws.send(data)
        return await self.next()


@contextlib.asynccontextmanager
async def connected(hub: Hub, query: str = "", **options: Any) -> AsyncIterator[HubClient]:
    async with client(f"{hub.url}/?{query}", **options) as ws:
        yield HubClient(ws, json.loads(await ws.recv()))


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with Hub(
        HubSettings(port=0, max_message_bytes=1000, max_id_bytes=30, max_group_bytes=20, max_groups=3)
    ) as hub:
        yield hub
    assert len(hub.manager.registry) == 0


def error(code: str, reason: str, **rest: Any) -> dict[str, Any]:
    return {"type": "error", "code": code, "reason": reason, **rest}


class TestIds:
    async def test_ids_come_from_the_url(self, hub: Hub) -> None:
        async with connected(hub, "client_id=me&user_id=%C3%A4") as me:
            assert me.welcome == {"type": "welcome", "client_id": "me", "user_id": "ä", "max_message_bytes": 1000}
            assert hub.manager.registry["me"].user_id == "ä"

    async def test_without_ids_one_is_made(self, hub: Hub) -> None:
        async with connected(hub) as me:
            assert len(me.welcome["client_id"]) == 22
            assert me.welcome["user_id"] is None

    @pytest.mark.parametrize(
        ("query", "reason"),
        [
            ("client_id=", "client id is empty"),
            ("client_id=" + "x" * 31, "client id is over the limit of 30 bytes in UTF-8"),
            ("user_id=", "user id is empty"),
            ("user_id=" + "x" * 21, "user id is over the limit of 20 bytes in UTF-8"),
            ("client_id=a&client_id=b", "client id is given twice"),
            ("client_id=%ff", "query has more than 16 fields, or is not in UTF-8"),
            (
                "&".join(f"a{i}=1" for i in range(17)),
                "query has more than 16 fields, or is not in UTF-8",
            ),
        ],
    )
    async def test_bad_ids_are_refused_with_the_reason(self, hub: Hub, query: str, reason: str) -> None:
        async with client(f"{hub.url}/?{query}") as ws:
            assert await close_of(ws) == (1008, reason)

    async def test_a_taken_id_is_refused_by_default(self, hub: Hub) -> None:
        async with connected(hub, "client_id=me") as me:
            async with client(f"{hub.url}/?client_id=me") as ws:
                assert await close_of(ws) == (1008, "connection 'me' is already registered")
            assert (await me.ask(type="join", group="g"))["type"] == "joined"

    async def test_or_replaces_the_older_connection(self) -> None:
        async with (
            Hub(HubSettings(port=0, on_duplicate="replace")) as hub,
            connected(hub, "client_id=me") as old,
            connected(hub, "client_id=me") as new,
        ):
            assert await close_of(old.ws) == (4409, "replaced by a newer connection")
            assert (await new.ask(type="join", group="g"))["type"] == "joined"


class TestRequests:
    async def test_publish_reaches_the_other_members(self, hub: Hub) -> None:
        async with connected(hub, "client_id=a") as a, connected(hub, "client_id=b") as b, connected(hub) as c:
            for each in (a, b):
                assert await each.ask(type="join", group="g") == {"type": "joined", "group": "g"}
            data = {"any": ["JSON", 1, 1.5, None, True, "ä\u2028\U0001f600"]}
            answer = await a.ask(type="publish", group="g", data=data, ref=7)
            assert answer == {"type": "published", "group": "g", "receivers": 1, "ref": 7}
            assert await b.next() == {"type": "message", "group": "g", "from": "a", "data": data}
            # Who is no member hears nothing: the next thing that comes is the answer to its own request.
            assert (await c.ask(type="who", group="g"))["code"] == "not_a_member"

    async def test_only_members_publish_and_list(self, hub: Hub) -> None:
        async with connected(hub) as a, connected(hub) as b:
            await b.ask(type="join", group="g")
            for request in ({"type": "publish", "data": 1}, {"type": "who"}):
                assert await a.ask(**request, group="g") == error("not_a_member", "join the group first")
            assert await a.ask(type="leave", group="g") == error("not_a_member", "you are not in this group")
            await b.ask(type="leave", group="g")
            assert (await b.ask(type="publish", group="g", data=1))["code"] == "not_a_member"

    async def test_joining_twice_is_no_fault(self, hub: Hub) -> None:
        async with connected(hub) as a:
            for _ in range(2):
                assert await a.ask(type="join", group="g") == {"type": "joined", "group": "g"}
            assert await a.ask(type="leave", group="g") == {"type": "left", "group": "g"}
            assert hub.manager.registry.groups() == {}

    async def test_direct_messages(self, hub: Hub) -> None:
        async with (
            connected(hub, "client_id=a") as a,
            connected(hub, "client_id=b&user_id=u") as b,
            connected(hub, "client_id=c&user_id=u") as c,
        ):
            assert await a.ask(type="send", client_id="b", data=[1]) == {"type": "sent", "receivers": 1}
            assert await b.next() == {"type": "direct", "from": "a", "data": [1]}
            assert await a.ask(type="send", user_id="u", data=None, ref="r") == {
                "type": "sent",
                "receivers": 2,
                "ref": "r",
            }
            for each in (b, c):
                assert await each.next() == {"type": "direct", "from": "a", "data": None}
            await a.ws.send(json.dumps({"type": "send", "client_id": "a", "data": "myself"}))
            assert await a.next() == {"type": "direct", "from": "a", "data": "myself"}
            assert await a.next() == {"type": "sent", "receivers": 1}

    async def test_direct_messages_to_nobody(self, hub: Hub) -> None:
        async with connected(hub) as a:
            assert await a.ask(type="send", client_id="x", data=1) == error(
                "not_connected", "no connection 'x' is registered"
            )
            assert await a.ask(type="send", user_id="x", data=1) == error("not_connected", "the user has no connection")
            for ids in ({}, {"client_id": "x", "user_id": "y"}):
                assert await a.ask(type="send", data=1, **ids) == error(
                    "missing_field", "either client_id or user_id is needed"
                )

    async def test_who_lists_page_by_page(self, hub: Hub) -> None:
        async with contextlib.AsyncExitStack() as stack:
            members = [
                await stack.enter_async_context(connected(hub, f"client_id=c{number}&user_id=u{number}"))
                for number in range(5)
            ]
            for each in members:
                await each.ask(type="join", group="g")
            everybody = [{"client_id": f"c{number}", "user_id": f"u{number}"} for number in range(5)]
            asking = members[0]
            assert await asking.ask(type="who", group="g") == {
                "type": "members",
                "group": "g",
                "total": 5,
                "members": everybody,
                "next": None,
            }
            pages, after = [], ""
            while after is not None:
                page = await asking.ask(type="who", group="g", limit=2, after=after)
                pages.append(page["members"])
                after = page["next"]
            assert pages == [everybody[:2], everybody[2:4], everybody[4:]]
            page = await asking.ask(type="who", group="g", limit=5)
            assert page["next"] is None

    @pytest.mark.parametrize(
        ("rest", "code"),
        [
            ({"limit": 0}, "bad_value"),
            ({"limit": 1001}, "bad_value"),
            ({"limit": 10**30}, "bad_value"),
            ({"limit": True}, "wrong_type"),
            ({"limit": "2"}, "wrong_type"),
            ({"after": 1}, "wrong_type"),
            ({"after": None}, "wrong_type"),
        ],
    )
    async def test_bad_pages(self, hub: Hub, rest: Any, code: str) -> None:
        async with connected(hub) as a:
            await a.ask(type="join", group="g")
            assert (await a.ask(type="who", group="g", **rest))["code"] == code

    @pytest.mark.parametrize("ref", ["r", "", "x" * 128, 0, -5, 2**53 - 1])
    async def test_a_ref_comes_back_with_answers_and_errors(self, hub: Hub, ref: Any) -> None:
        async with connected(hub) as a:
            assert (await a.ask(type="join", group="g", ref=ref))["ref"] == ref
            assert (await a.ask(type="nonsense", ref=ref))["ref"] == ref

    @pytest.mark.parametrize("ref", ["x" * 129, 1.5, True, [], {}, 2**53])
    async def test_a_bad_ref_is_told(self, hub: Hub, ref: Any) -> None:
        async with connected(hub) as a:
            answer = await a.ask(type="join", group="g", ref=ref)
            assert answer == error("wrong_type", "ref must be a string of at most 128 characters or an integer")
            assert hub.manager.registry.groups() == {}

    async def test_answers_come_in_the_order_of_the_requests(self, hub: Hub) -> None:
        async with connected(hub) as a:
            for number in range(100):
                await a.ws.send(json.dumps({"type": "join", "group": "g", "ref": number}))
            assert [(await a.next())["ref"] for _ in range(100)] == list(range(100))


DEEP = "[" * 33 + "]" * 33
BAD = [
    ("", "bad_json", "Expecting value at character 0"),
    ("hello", "bad_json", "Expecting value at character 0"),
    ('{"type": "join"', "bad_json", "Expecting ',' delimiter at character 15"),
    ("[]", "not_an_object", "a message must be a JSON object"),
    ("null", "not_an_object", None),
    ('"join"', "not_an_object", None),
    ("[" * 3000, "too_big", "a message of 3000 bytes is over the limit of 1000"),
    ("[" * 900, "bad_json", None),
    (DEEP, "bad_json", "nested more than 32 levels deep"),
    ('{"a":' * 150 + "1" + "}" * 150, "bad_json", "nested more than 32 levels deep"),
    (f'{{"type": "join", "group": "g", "x": {DEEP}}}', "bad_json", "nested more than 32 levels deep"),
    ('{"type": "join", "type": "leave", "group": "g"}', "bad_json", "an object has a key twice"),
    ('{"type": "join", "group": "g", "x": {"a": 1, "a": 1}}', "bad_json", "an object has a key twice"),
    ('{"type": "publish", "data": NaN}', "bad_json", "NaN is not JSON"),
    ('{"type": "publish", "data": -Infinity}', "bad_json", "-Infinity is not JSON"),
    ('{"type": "join", "group": "\\ud800"}', "bad_json", "a text holds a lone surrogate, so it has no UTF-8 form"),
    (
        '{"type": "join", "group": "g", "\\udfff": 1}',
        "bad_json",
        "a text holds a lone surrogate, so it has no UTF-8 form",
    ),
    ("{}", "missing_field", "type is missing"),
    ('{"type": null}', "wrong_type", "type must be a string"),
    ('{"type": ["join"]}', "wrong_type", "type must be a string"),
    ('{"type": "nonsense"}', "unknown_type", "type must be one of join, leave, publish, send, who"),
    ('{"type": "_join"}', "unknown_type", None),
    ('{"type": "join"}', "missing_field", "group is missing"),
    ('{"type": "join", "group": 1}', "wrong_type", "group must be a string"),
    ('{"type": "join", "group": ""}', "bad_name", "group name is empty"),
    (json.dumps({"type": "join", "group": "ä" * 11}), "bad_name", "group name is over the limit of 20 bytes in UTF-8"),
    ('{"type": "leave"}', "missing_field", "group is missing"),
    ('{"type": "publish", "group": "in"}', "missing_field", "data is missing"),
    ('{"type": "publish", "group": {}, "data": 1}', "wrong_type", "group must be a string"),
    ('{"type": "publish", "group": "in", "data": 1e999}', "bad_json", "a number is too large"),
    ('{"type": "send", "client_id": "in"}', "missing_field", "data is missing"),
    ('{"type": "send", "client_id": 1, "data": 1}', "wrong_type", "client_id must be a string"),
    ('{"type": "send", "user_id": [], "data": 1}', "wrong_type", "user_id must be a string"),
    ('{"type": "join", "group": "' + "x" * 1000 + '"}', "too_big", None),
    (b'{"type": "join", "group": "g"}', "not_text", "send JSON in text messages, not in binary ones"),
    (b"\xff\x00", "not_text", None),
]


@pytest.mark.parametrize(("message", "code", "reason"), BAD)
async def test_bad_input_is_answered_and_keeps_the_connection(
    message: str | bytes, code: str, reason: str | None
) -> None:
    settings = HubSettings(port=0, max_message_bytes=1000, max_group_bytes=20)
    async with Hub(settings) as hub, connected(hub, "client_id=in") as a:
        await a.ask(type="join", group="in")
        answer = await a.send(message)
        assert (answer["type"], answer["code"]) == ("error", code)
        if reason is not None:
            assert answer["reason"] == reason
        assert hub.manager.registry["in"].errors_in == 1
        assert await a.ask(type="join", group="in", ref=1) == {"type": "joined", "group": "in", "ref": 1}


def test_numbers_with_too_many_digits_are_told() -> None:
    with pytest.raises(Refused) as refused:
        parse('{"a": ' + "1" * 5000 + "}", 10_000)
    assert (refused.value.code, refused.value.reason) == ("bad_json", "a number has too many digits")


async def test_too_many_groups(hub: Hub) -> None:
    async with connected(hub) as a:
        for number in range(3):
            await a.ask(type="join", group=str(number))
        assert await a.ask(type="join", group="x") == error(
            "too_many_groups", "too many groups of one connection: the limit is 3"
        )


async def test_the_size_limit_counts_bytes_and_only_above(hub: Hub) -> None:
    async with connected(hub) as a:
        text = '{"type": "join", "group": "g", "x": "' + "ä" * 481 + '"}'
        assert len(text.encode()) == 1001
        assert (await a.send(text))["code"] == "too_big"
        assert (await a.send(text.replace(": ", ":", 1)))["type"] == "joined"


async def test_beyond_the_hard_limit_the_connection_is_closed_and_told_why(hub: Hub) -> None:
    async with connected(hub) as a:
        assert (await a.send("x" * 4000))["code"] == "too_big"
        await a.ws.send("x" * 4001)
        code, reason = await close_of(a.ws)
        assert code == 1009
        assert reason is not None
        assert "4001" in reason
        assert "4000" in reason


class TestServer:
    async def test_a_path(self) -> None:
        async with Hub(HubSettings(port=0, path="/ws")) as hub:
            async with client(f"{hub.url}/ws?client_id=a"):
                await until(lambda: "a" in hub.manager.registry)
            for path in ("/", "/ws/", "/wsx", ""):
                with pytest.raises(websockets.InvalidStatus, match="404"):
                    await client(f"{hub.url}{path}").__aenter__()

    async def test_origins(self) -> None:
        async with Hub(HubSettings(port=0, origins=("https://good.example",))) as hub:
            for origin in (None, "https://good.example"):
                async with client(f"{hub.url}/", origin=origin):
                    pass
            with pytest.raises(websockets.InvalidStatus, match="403"):
                await client(f"{hub.url}/", origin="https://bad.example").__aenter__()

    @pytest.mark.parametrize("offered", [True, False])
    async def test_compression(self, offered: bool) -> None:
        async with Hub(HubSettings(port=0, compression=offered)) as hub, connected(hub) as a:
            assert bool(a.ws.protocol.extensions) is offered
            await a.ask(type="join", group="g")

    async def test_a_silent_client_is_closed(self) -> None:
        async with Hub(HubSettings(port=0, ping_interval_s=0.02)) as hub:
            peer = await RawPeer.connect(hub.url)
            await until(lambda: len(hub.manager.registry) == 1)
            await until(lambda: len(hub.manager.registry) == 0)
            peer.close()

    async def test_stopping_sends_everybody_away(self, caplog: pytest.LogCaptureFixture) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with Hub(HubSettings(port=0)) as hub:
                clients = [await stack.enter_async_context(connected(hub)) for _ in range(5)]
            assert [await close_of(each.ws) for each in clients] == [(1001, "the server is going away")] * 5
            await hub.stop()

    async def test_stopping_does_not_wait_for_those_who_have_not_even_begun(self) -> None:
        hub = Hub(HubSettings(port=0))
        await hub.start()
        host, port = hub.url.removeprefix("ws://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(5):
            await hub.stop()
        writer.close()

    async def test_a_port_in_use_is_an_error_and_leaves_nothing(self, hub: Hub) -> None:
        port = int(hub.url.rsplit(":", 1)[1])
        other = Hub(HubSettings(port=port))
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await other.start()
        await other.stop()

    async def test_one_log_line_for_each_begin_and_end(self, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "wsfast"):
            async with connected(hub, "client_id=a%0Ab&user_id=u") as a:
                await a.ask(type="join", group="g")
            await until(lambda: len(hub.manager.registry) == 0)
        lines = [record.getMessage() for record in caplog.records if record.name == "wsfast.hub"]
        assert len(lines) == 2
        # An id with a line break does not make a line of its own.
        assert re.fullmatch(r"connected 'a\\nb', user 'u', from 127\.0\.0\.1:\d+", lines[0])
        assert re.fullmatch(
            r"disconnected 'a\\nb' after \d+\.\d s: 1000 '' by peer; "
            r"in: 1 messages, 30 bytes; out: 2 messages, \d+ bytes",
            lines[1],
        )

    @pytest.mark.parametrize(
        "settings", [{"max_message_bytes": 0}, {"ping_interval_s": 0}, {"ping_interval_s": -1}, {"max_id_bytes": 21}]
    )
    def test_settings(self, settings: Any) -> None:
        with pytest.raises(InvalidSetting):
            HubSettings(**settings)

    async def test_a_flood_in_one_packet_lets_others_in_between(self, hub: Hub) -> None:
        async with connected(hub, "client_id=a") as a:
            (record,) = hub.manager.registry.values()
            ws = record.conn
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            # Put into the library's queue at once, as one big packet would.
            request = json.dumps({"type": "join", "group": "g"}).encode()
            for _ in range(1000):
                ws.recv_messages.put(websockets.frames.Frame(websockets.frames.Opcode.TEXT, request))
            counting = asyncio.create_task(count())
            for _ in range(1000):
                await a.next()
            counting.cancel()
            assert turns > 50


# Text that looks like the protocol, so that it gets past the first checks.
words = st.sampled_from(
    [
        "join",
        "leave",
        "publish",
        "send",
        "who",
        "g",
        "in",
        "type",
        "group",
        "data",
        "ref",
        "client_id",
        "user_id",
        "limit",
    ]
)
texts = words | st.text(st.characters(), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)
requests = st.builds(
    lambda known, rest: {**rest, **known},
    st.fixed_dictionaries(
        {"type": words | values},
        optional={
            "group": words | values,
            "data": values,
            "ref": values,
            "client_id": words | values,
            "user_id": words | values,
            "limit": st.integers(-1, 2000) | values,
            "after": words | values,
        },
    ),
    st.dictionaries(texts, values, max_size=3),
)
json_like = st.one_of(
    requests.map(json.dumps),
    requests.map(lambda request: json.dumps(request)[:-2]),
    values.map(json.dumps),
    st.text('[]{}",:0123456789.eE+-\\utrnfalsNI d8', max_size=60),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
)


async def test_a_client_that_can_resume_misses_nothing(hub: Hub) -> None:
    policy = ReconnectPolicy.only(FullJitter(0.001, 0.01))
    async with connected(hub) as other, connect(f"{hub.url}/?client_id=me", policy=policy) as client:
        assert json.loads(await client.recv())["type"] == "welcome"
        await client.send('{"type": "join", "group": "g"}')
        assert json.loads(await client.recv())["type"] == "joined"
        await other.ask(type="join", group="g")
        hub.manager.registry["me"].conn.transport.abort()
        await until(lambda: hub.manager.stats()["interrupted"] == 1)
        assert (await other.ask(type="publish", group="g", data="hello"))["receivers"] == 1
        assert json.loads(await client.recv())["data"] == "hello"
        assert json.loads(await client.recv())["type"] == "welcome"


async def test_a_hub_need_not_wait_for_anybody() -> None:
    async with Hub(HubSettings(port=0, grace_s=None)) as hub, connect(hub.url) as client:
        assert json.loads(await client.recv())["type"] == "welcome"
        assert client.client_id is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(json_like | st.binary(max_size=20), max_size=12))
@example(['{"type":"send","client_id":"in","data":{}}', '{"type":"who","group":"in"}'])
@example(['{"type":"send","user_id":"\\ud83d\\ude00","data":"\\ud83d\\ude00"}'])
def test_no_text_kills_the_connection_or_the_server(messages: list[str | bytes]) -> None:
    asyncio.run(fuzz(messages))


async def fuzz(messages: list[str | bytes]) -> None:
    async with Hub(HubSettings(port=0, max_message_bytes=1000)) as hub:
        async with connected(hub, "client_id=in&user_id=in") as a, connected(hub, "client_id=g") as other:
            assert (await other.ask(type="join", group="g"))["type"] == "joined"
            for message in messages:
                await a.ws.send(message)
            await a.ws.send('{"type": "nonsense", "ref": "the end of the test"}')
            answers = []
            while not answers or answers[-1].get("ref") != "the end of the test":
                answers.append(await a.next())
            # Each message has one answer; what the client sent to itself comes on top.
            assert len([answer for answer in answers if answer["type"] != "direct"]) == len(messages) + 1
            await other.ws.send('{"type": "nonsense", "ref": "the end of the test"}')
            while (await other.next()).get("ref") != "the end of the test":
                pass
        assert hub.manager.stats()["event_errors"] == 0


@given(st.text(max_size=200))
def test_parse_gives_an_object_or_refuses(text: str) -> None:
    try:
        request = parse(text, 1000)
    except Refused as refused:
        assert refused.code in {"bad_json", "not_an_object", "too_big"}
        refused.reason.encode()
    else:
        assert isinstance(request, dict)
        json.dumps(request, ensure_ascii=False).encode()


@given(requests)
def test_what_parse_lets_through_comes_out_as_it_went_in(request: dict[str, Any]) -> None:
    text = json.dumps(request)
    try:
        parsed = parse(text, 10_000)
    except Refused:
        return
    assert parsed == json.loads(text)
