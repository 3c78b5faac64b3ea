"""Sending to one and to many: frames, targets, order, slices, failures as data, counting, and waiting for room."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import FakeLink, RawPeer, Seen, client, received, serving, until
from wsfast import (
    Backpressure,
    ConnectionClosed,
    ConnectionManager,
    DuplicateConnection,
    InvalidSetting,
    MessageTooBig,
    PeerClosed,
    PeerFailed,
    PeerTooSlow,
    SendFailed,
    delivery,
)
from wsfast.adapters import Framing

SIZES = [0, 125, 126, 65535, 65536]


def frame(opcode: int, payload: bytes) -> bytes:
    """A server's frame, by the letter of RFC 6455, 5.2."""
    size = len(payload)
    if size < 126:
        return bytes([0x80 | opcode, size]) + payload
    if size < 65536:
        return bytes([0x80 | opcode, 126]) + size.to_bytes(2, "big") + payload
    return bytes([0x80 | opcode, 127]) + size.to_bytes(8, "big") + payload


async def park(ws: ServerConnection) -> None:
    await ws.wait_closed()


async def joined(stack: contextlib.AsyncExitStack, manager: ConnectionManager, count: int) -> list[Any]:
    """Records "0", "1", ... of so many fake links."""
    return [await stack.enter_async_context(manager.attach(FakeLink(), str(number))) for number in range(count)]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush sends to a few connections at a time."""
    monkeypatch.setattr(delivery, "_SLICE_NS", 1)


@pytest.fixture
async def patient(fake_links: None) -> AsyncIterator[ConnectionManager]:
    """A manager that keeps everything and has one thread."""
    async with ConnectionManager(threads=1, backpressure=Backpressure(policy="keep", max_bytes=1000)) as manager:
        yield manager


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["text", "binary"])
async def test_a_client_sees_exactly_the_frames_of_the_standard(
    manager: ConnectionManager, size: int, kind: str
) -> None:
    message: str | bytes = "ä" * (size // 2) + "x" * (size % 2) if kind == "text" else bytes(size)
    payload = message.encode() if isinstance(message, str) else message
    expected = frame(1 if kind == "text" else 2, payload)
    async with serving(park, manager, compression=None) as url:
        peer = await RawPeer.connect(url)
        await until(lambda: len(manager.registry) == 1)
        (record,) = manager.registry.values()
        for send in (
            manager.send(record, message),
            manager.broadcast(message),
            asyncio.sleep(0, manager.broadcast_nowait(message)),
        ):
            await send
            assert await peer.read(len(expected)) == expected
        assert (record.messages_out, record.bytes_out) == (3, 3 * size)
        peer.close()


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("size", SIZES)
async def test_a_real_client_receives_what_was_sent(
    manager: ConnectionManager, size: int, compression: str | None
) -> None:
    messages: list[str | bytes] = ["x" * size, bytes(range(256)) * (size // 256) + bytes(size % 256)]
    async with serving(park, manager, compression=compression) as url, client(url, compression=compression) as ws:
        await until(lambda: len(manager.registry) == 1)
        (client_id,) = manager.registry
        for message in messages:
            await manager.send(client_id, message)
            await manager.broadcast(message)
            manager.broadcast_nowait(message)
        assert await received(ws, 6) == [message for message in messages for _ in range(3)]
        # Payload bytes, whatever the compression made of them.
        assert manager.registry[client_id].bytes_out == 6 * size


@pytest.mark.parametrize("framing", [Framing("plain"), None])
async def test_mutable_messages_are_taken_as_they_are_at_the_call(
    manager: ConnectionManager, fake_links: None, framing: Framing | None
) -> None:
    link = FakeLink(framing)
    async with manager.attach(link, "a") as conn:
        link.gate.clear()
        message = bytearray(b"before")
        manager.broadcast_nowait(message)
        message[:] = b"after!"
        link.gate.set()
        await until(lambda: link.got)
        assert link.got == [b"before"]
        await conn.send(memoryview(b"abcdef")[::2])
        await until(lambda: len(link.got) == 2)
        assert link.got[1] == b"ace"


@pytest.mark.parametrize("call", ["send", "broadcast", "broadcast_nowait"])
@pytest.mark.parametrize(
    ("message", "key", "error"),
    [
        (1, None, TypeError),
        (None, None, TypeError),
        ({"a": 1}, None, TypeError),
        ("\ud800", None, UnicodeEncodeError),
        ("x" * 11, None, MessageTooBig),
        ("x", 1, TypeError),
        ("x", b"key", TypeError),
    ],
)
async def test_what_is_no_message_is_refused_before_anything_is_sent(
    fake_links: None, call: str, message: Any, key: Any, error: type[Exception]
) -> None:
    link = FakeLink()
    async with ConnectionManager(max_message_bytes=10) as manager, manager.attach(link, "a") as conn:
        with pytest.raises(error):
            if call == "send":
                await manager.send("a", message, key=key)
            elif call == "broadcast":
                await manager.broadcast(message, key=key)
            else:
                manager.broadcast_nowait(message, key=key)
        await turns(3)
        assert link.got == []
        assert conn.errors_out == 0
        await manager.send("a", "x" * 10)
        assert link.got == ["x" * 10]


async def test_the_limit_counts_bytes_and_not_characters(fake_links: None) -> None:
    async with ConnectionManager(max_message_bytes=10) as manager:
        with pytest.raises(MessageTooBig, match="a message of 12 bytes is over the limit of 10"):
            await manager.broadcast("ä" * 6)


class TestTargets:
    """Who gets a broadcast."""

    @pytest.fixture
    async def records(self, manager: ConnectionManager, fake_links: None) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            fields: dict[str, Any] = {
                "a": {"user_id": "u1", "tags": {"plan": "pro"}, "groups": ["g"]},
                "b": {"user_id": "u1", "tags": {"plan": "free"}},
                "c": {"user_id": "u2", "tags": {"plan": "pro"}, "groups": ["g", "h"]},
                "d": {},
            }
            yield {
                name: await stack.enter_async_context(manager.attach(FakeLink(), name, **each))
                for name, each in fields.items()
            }

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({}, "abcd"),
            ({"group": "g"}, "ac"),
            ({"user": "u1"}, "ab"),
            ({"tag": "plan"}, "abc"),
            ({"tag": ("plan", "pro")}, "ac"),
            ({"group": "g", "user": "u1"}, "a"),
            ({"group": "nobody"}, ""),
            ({"user": "\ud800"}, ""),
            ({"to": ["a", "d"]}, "ad"),
            ({"to": "a"}, "a"),
            ({"to": iter(["a", "unknown", "a"])}, "a"),
            ({"to": ()}, ""),
            ({"to": ["a", "b"], "exclude": "b"}, "a"),
            ({"exclude": "a"}, "bcd"),
            ({"exclude": ["a", "c", "unknown"]}, "bd"),
            ({"exclude": {"a": None}.keys(), "group": "g"}, "c"),
            ({"exclude": ()}, "abcd"),
            ({"exclude": None}, "abcd"),
        ],
    )
    @pytest.mark.parametrize("nowait", [True, False])
    async def test_filters_and_exclusions(
        self, manager: ConnectionManager, records: dict[str, Any], filters: Any, expected: str, nowait: bool
    ) -> None:
        if isinstance(filters.get("to"), type(iter([]))):
            filters = {"to": iter(["a", "unknown", "a"])}  # the parameter itself is used up by the first of the tests
        if nowait:
            result = manager.broadcast_nowait("x", **filters)
            assert (result.targets, result.sent, result.queued) == (len(expected), 0, len(expected))
            await manager.send("a", "flushed")
            records["a"].conn.got.remove("flushed")
        else:
            result = await manager.broadcast("x", **filters)
            assert (result.targets, result.sent) == (len(expected), len(expected))
        assert "".join(name for name, record in records.items() if record.conn.got) == expected
        assert all(record.conn.got in ([], ["x"]) for record in records.values())

    async def test_records_can_be_named_alone_and_mixed_with_ids(
        self, manager: ConnectionManager, records: dict[str, Any]
    ) -> None:
        await manager.broadcast("1", exclude=records["a"])
        await manager.broadcast("2", exclude={records["a"], "b"})
        await manager.broadcast("3", to=records["a"])
        await manager.broadcast("4", to=[records["a"], "a", "d"])
        assert [records[name].conn.got for name in "abcd"] == [["3", "4"], ["1"], ["1", "2"], ["1", "2", "4"]]

    async def test_records_of_another_manager_and_detached_ones_are_nobody(
        self, manager: ConnectionManager, records: dict[str, Any]
    ) -> None:
        async with ConnectionManager() as other, other.attach(FakeLink(), "a") as stranger:
            result = await manager.broadcast("1", to=[stranger, "b"])
            assert result.targets == 1
            result = await manager.broadcast("2", exclude=stranger)
            assert result.targets == 4
        await records["d"].close()
        assert (await manager.broadcast("3", to=[records["d"]])).targets == 0
        assert stranger.messages_out == 0

    async def test_send_to_user_reaches_all_connections_of_the_user(
        self, manager: ConnectionManager, records: dict[str, Any]
    ) -> None:
        assert (await manager.send_to_user("u1", "x")).sent == 2
        assert (await manager.send_to_user("nobody", "x")).targets == 0
        assert [records[name].conn.got for name in "abcd"] == [["x"], ["x"], [], []]

    async def test_targets_are_those_at_the_moment_of_the_call(
        self, manager: ConnectionManager, records: dict[str, Any]
    ) -> None:
        manager.broadcast_nowait("x", group="g")
        records["d"].join("g")
        records["a"].leave("g")
        await manager.send("b", "flushed")
        assert [records[name].conn.got for name in "acd"] == [["x"], ["x"], []]

    @pytest.mark.parametrize(
        ("filters", "error"),
        [
            ({"group": 1}, "group name must be str, not int"),
            ({"user": 1}, "user id must be str, not int"),
            ({"tag": ("plan", "pro", "x")}, "tag must be a key or a"),
            ({"exclude": [1]}, "exclude must hold client ids and records, not int"),
            ({"to": [1]}, "to must hold client ids and records, not int"),
            ({"to": ["a"], "group": "g"}, "to= cannot be combined"),
            ({"to": ["a"], "user": "u1"}, "to= cannot be combined"),
            ({"to": ["a"], "tag": "plan"}, "to= cannot be combined"),
        ],
    )
    async def test_wrong_types_are_told(
        self, manager: ConnectionManager, records: dict[str, Any], filters: Any, error: str
    ) -> None:
        with pytest.raises(TypeError, match=error):
            await manager.broadcast("x", **filters)
        await turns(3)
        assert not any(record.conn.got for record in records.values())

    @pytest.mark.parametrize("coalesce", [-1, 60_001, float("nan")])
    async def test_a_window_has_limits(self, manager: ConnectionManager, coalesce: float) -> None:
        with pytest.raises(InvalidSetting, match="coalesce must be from 0 to 60000 milliseconds"):
            manager.broadcast_nowait("x", coalesce=coalesce)


class TestMembership:
    """A broadcast to everybody is for exactly those in the registry, whoever put them there."""

    @pytest.mark.parametrize("nowait", [True, False])
    async def test_records_that_were_never_attached_are_dropped(
        self, manager: ConnectionManager, fake_links: None, nowait: bool
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await joined(stack, manager, 3)
            manager.registry.add("alone", groups=["g"])
            for filters, targets in (({}, 4), ({"group": "g"}, 1), ({"to": ["alone", "0"]}, 2)):
                result = manager.broadcast_nowait("x", **filters) if nowait else await manager.broadcast("x", **filters)
                assert (result.targets, result.dropped) == (targets, 1)
                assert result.sent + result.queued == targets - 1
            result = await manager.broadcast("x", exclude=["alone"])
            assert (result.targets, result.dropped) == (3, 0)
            manager.registry.remove("alone")
            assert (await manager.broadcast("x")).targets == 3

    async def test_a_record_removed_by_hand_is_no_target(self, manager: ConnectionManager, fake_links: None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 3)
            links = [record.conn for record in records]
            assert (await manager.broadcast("1")).targets == 3
            manager.registry.remove(records[1])
            assert (await manager.broadcast("2")).targets == 2
            await joined_again(stack, manager, "3")
            assert (await manager.broadcast("3")).targets == 3
            assert [link.got for link in links] == [["1", "2", "3"], ["1"], ["1", "2", "3"]]
        assert (await manager.broadcast("4")).targets == 0

    async def test_one_added_and_one_removed_by_hand_do_not_make_up_for_each_other(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 3)
            manager.registry.add("alone")
            manager.registry.remove(records[0])
            result = await manager.broadcast("x")
            assert (result.targets, result.sent, result.dropped) == (3, 2, 1)
            manager.registry.add("0")  # the id of the one that was removed
            result = await manager.broadcast("x")
            assert (result.targets, result.sent, result.dropped) == (4, 2, 2)
            manager.registry.remove("0")
            manager.registry.remove("alone")
            assert (await manager.broadcast("x")).targets == 2

    async def test_a_replaced_connection_gets_nothing_more(self, manager: ConnectionManager, fake_links: None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            (record, _) = await joined(stack, manager, 2)
            link, newer = record.conn, FakeLink()
            with pytest.raises(DuplicateConnection):
                await manager.attach(newer, "0").__aenter__()
            assert (await manager.broadcast("1")).targets == 2
            await stack.enter_async_context(manager.attach(newer, "0", on_duplicate="replace"))
            result = await manager.broadcast("2")
            assert (result.targets, result.sent) == (2, 2)
            assert (link.got, newer.got) == (["1"], ["2"])
            manager.registry.add("0", on_duplicate="replace")  # by hand, without a connection
            result = await manager.broadcast("3")
            assert (result.targets, result.sent, result.dropped) == (2, 1, 1)
            assert newer.got == ["2"]
            manager.registry.remove("0")

    async def test_an_adapter_that_fails_leaves_the_count_right(
        self, manager: ConnectionManager, fake_links: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("no")

        async with contextlib.AsyncExitStack() as stack:
            await joined(stack, manager, 2)
            with monkeypatch.context() as patch:
                patch.setattr("tests.server.conftest.FakeAdapter.attach", fail)
                with pytest.raises(RuntimeError):
                    await manager.attach(FakeLink(), "broken").__aenter__()
            assert (await manager.broadcast("x")).targets == 2
            await joined_again(stack, manager, "2")
            assert (await manager.broadcast("x")).targets == 3


async def joined_again(stack: contextlib.AsyncExitStack, manager: ConnectionManager, client_id: str) -> Any:
    return await stack.enter_async_context(manager.attach(FakeLink(), client_id))


class TestOutcomes:
    async def test_the_outcome_of_every_target_is_in_the_result(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        failures = Seen(manager, SendFailed)
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 4)
            links = [record.conn for record in records]
            records.append(await stack.enter_async_context(manager.attach(by_library := FakeLink(None), "4")))
            links[1].in_buffer = 7
            links[2].open = False
            links[3].raises = failure = OSError("broken")
            by_library.gate.clear()
            result = await manager.broadcast("x")
            assert (result.targets, result.sent, result.queued, result.dropped, result.failed) == (5, 1, 2, 1, 1)
            assert result.seconds > 0
            assert [record.errors_out for record in records] == [0, 0, 0, 1, 0]
            assert failures == [SendFailed(records[3], failure)]
            assert links[3].aborted
            by_library.gate.set()
            await until(lambda: by_library.got)
            assert [record.messages_out for record in records] == [1, 1, 0, 0, 1]
            assert manager.stats()["writes_failed"] == 1

    async def test_nothing_follows_a_failure(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(), "a") as conn:
            link.raises = OSError("broken")
            results = [manager.broadcast_nowait(str(number)) for number in range(3)]
            assert [result.queued for result in results] == [1, 1, 1]
            await until(lambda: link.aborted)
            assert (await manager.broadcast("x")).dropped == 1
            assert (link.got, conn.messages_out) == ([], 0)
            with pytest.raises(PeerClosed):
                await conn.send("x")

    @pytest.mark.parametrize("by_library", [True, False])
    async def test_every_message_is_counted_once(
        self, manager: ConnectionManager, fake_links: None, by_library: bool
    ) -> None:
        async with manager.attach(link := FakeLink(None if by_library else Framing("plain")), "a") as conn:
            for size in (0, 3, 70_000):
                await conn.send("x" * size)
                await manager.broadcast(bytes(size))
                manager.broadcast_nowait("y" * size)
            await until(lambda: len(link.got) == 9)
            assert (conn.messages_out, conn.bytes_out) == (9, 3 * 70_003)

    async def test_what_waits_in_the_transport_is_counted_when_it_is_handed_over(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with manager.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 5
            assert (await manager.broadcast("1")).queued == 1
            assert (await manager.broadcast("2")).queued == 1
            assert (conn.messages_out, link.got) == (1, ["1"])
            link.drain()
            await until(lambda: link.got == ["1", "2"])
            assert (conn.messages_out, conn.bytes_out) == (2, 2)

    async def test_a_subscriber_of_failures_may_send_and_close(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 3)
            manager.on(SendFailed, lambda event: manager.broadcast_nowait("it failed", exclude=event.conn))
            records[1].conn.raises = OSError("broken")
            others = [records[0].conn, records[2].conn]
            result = await manager.broadcast("x")
            assert (result.sent, result.failed) == (2, 1)
            await until(lambda: all(len(link.got) == 2 for link in others))
            assert [link.got for link in others] == [["x", "it failed"]] * 2


class TestSend:
    async def test_a_closed_connection(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(), "a") as conn:
            link.open = False
            with pytest.raises(PeerClosed) as closed:
                await conn.send("x")
            assert (closed.value.client_id, closed.value.code, closed.value.reason) == ("a", 4000, "gone")
        with pytest.raises(PeerClosed):
            await conn.send("x")
        assert (conn.messages_out, link.got) == (0, [])

    async def test_a_connection_that_breaks(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(), "a") as conn:
            link.raises = OSError("broken")
            with pytest.raises(PeerFailed, match="OSError: broken") as failed:
                await conn.send("x")
            assert failed.value.client_id == "a"
            assert failed.value.cause is link.raises
            assert (conn.errors_out, conn.messages_out, link.aborted) == (1, 0, True)

    async def test_a_connection_that_breaks_while_its_library_sends(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        failures = Seen(manager, SendFailed)
        async with manager.attach(link := FakeLink(None), "a") as conn:
            link.raises = OSError("broken")
            with pytest.raises(PeerFailed):
                await conn.send("x")
            await until(lambda: link.aborted)
            assert failures == [SendFailed(conn, link.raises)]
            assert (conn.errors_out, conn.messages_out) == (1, 0)

    @pytest.mark.parametrize("end", ["cancelled", "sent"])
    async def test_a_block_that_is_left_waits_for_the_library_but_not_for_ever(
        self, manager: ConnectionManager, fake_links: None, end: str
    ) -> None:
        closed = Seen(manager, ConnectionClosed)
        attachment = manager.attach(link := FakeLink(None), "a")
        conn = await attachment.__aenter__()
        link.gate.clear()
        manager.broadcast_nowait("1")
        manager.broadcast_nowait("2")
        leaving = asyncio.create_task(attachment.__aexit__(None, None, None))
        await turns(5)
        assert not leaving.done()
        assert conn.client_id not in manager.registry
        assert manager.broadcast_nowait("3").targets == 0  # nothing more is for it
        if end == "cancelled":
            leaving.cancel()
            await asyncio.wait([leaving])
            assert leaving.cancelled()
        else:
            link.gate.set()
            await leaving
            assert link.got == ["1", "2"]
        assert [(event.conn, event.code) for event in closed] == [(conn, 1000)]  # type: ignore[attr-defined]
        assert (manager.stats()["closed"], manager.stats()["queued_bytes"]) == (1, 0)

    async def test_a_slow_connection_that_drops_it(self, fake_links: None) -> None:
        slow = Backpressure(policy="drop_newest", max_bytes=100)
        async with ConnectionManager(backpressure=slow) as manager, manager.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 90
            manager.broadcast_nowait("1")
            await turns(2)
            with pytest.raises(PeerTooSlow) as told:
                await conn.send("x" * 20)
            assert told.value.client_id == "a"
            assert link.got == ["1"]

    async def test_a_slow_connection_that_is_given_up_for_it(self, fake_links: None) -> None:
        slow = Backpressure(policy="disconnect", max_bytes=100)
        async with ConnectionManager(backpressure=slow) as manager, manager.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 90
            manager.broadcast_nowait("1")
            await turns(2)
            with pytest.raises(PeerTooSlow):
                await conn.send("x" * 20)
            await until(lambda: not link.open)
            assert link.got == ["1"]

    async def test_it_waits_for_room_and_broadcast_does_not(self, patient: ConnectionManager) -> None:
        async with patient.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 501
            assert (await patient.broadcast("1")).queued == 1
            sending = asyncio.create_task(conn.send("2"))
            await turns(1)
            assert (await patient.broadcast("3")).queued == 1
            await turns(5)
            assert not sending.done()
            link.drain()
            await sending
            await until(lambda: link.got == ["1", "2", "3"])

    async def test_it_does_not_wait_below_the_mark(self, patient: ConnectionManager) -> None:
        async with patient.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 490
            await patient.broadcast("1")
            await conn.send("2")
            assert link.got == ["1"]

    async def test_it_goes_on_when_a_flush_has_made_the_room(self, patient: ConnectionManager) -> None:
        """The transport is empty while more than the mark still waits in the outbox, and all of that leaves at once."""
        async with patient.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 10
            await patient.broadcast("1")
            sending = asyncio.create_task(conn.send("x" * 900))
            await turns(3)
            assert not sending.done()
            link.drain()
            async with asyncio.timeout(10):
                await sending
            assert link.got == ["1", "x" * 900]

    @pytest.mark.parametrize("end", ["leave", "close", "fail"])
    async def test_who_waits_for_room_is_told_of_the_end(self, patient: ConnectionManager, end: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            conn = await stack.enter_async_context(patient.attach(link := FakeLink(), "a"))
            link.in_buffer = 900
            await patient.broadcast("1")
            sending = asyncio.create_task(conn.send("2"))
            await turns(3)
            assert not sending.done()
            if end == "leave":
                await stack.aclose()
            elif end == "close":
                link.open = False
                await conn.close()
            else:
                link.raises = OSError("broken")
                link.drain()
            async with asyncio.timeout(10):
                (outcome,) = await asyncio.gather(sending, return_exceptions=True)
            # Whoever leaves hands over what waits: it was sent.
            expected = {"leave": type(None), "close": PeerClosed, "fail": PeerFailed}[end]
            assert type(outcome) is expected

    async def test_a_cancelled_send_is_delivered_all_the_same(self, patient: ConnectionManager) -> None:
        async with patient.attach(link := FakeLink(), "a") as conn:
            link.in_buffer = 900
            await patient.broadcast("1")
            sending = [asyncio.create_task(conn.send(str(number))) for number in (2, 3)]
            await turns(3)
            sending[0].cancel()
            await turns(3)
            link.drain()
            async with asyncio.timeout(10):
                await sending[1]
            await until(lambda: link.got == ["1", "2", "3"])
            assert sending[0].cancelled()

    async def test_the_sender_in_line_is_told_of_a_failure(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(None), "a") as conn:
            link.gate.clear()
            manager.broadcast_nowait("1")
            sending = asyncio.create_task(conn.send("x" * 2**19))
            await turns(5)
            assert not sending.done()
            link.raises = OSError("broken")
            link.gate.set()
            async with asyncio.timeout(10):
                with pytest.raises(PeerFailed, match="OSError: broken"):
                    await sending
            assert (link.got, conn.errors_out) == ([], 1)

    async def test_who_waits_when_the_manager_closes_is_not_left_waiting(self, fake_links: None) -> None:
        manager = ConnectionManager(backpressure=Backpressure(policy="keep", max_bytes=10))
        await manager.start()
        link = FakeLink()
        conn = await manager.attach(link, "a").__aenter__()
        link.in_buffer = 900
        await manager.broadcast("1")
        sending = asyncio.create_task(conn.send("2"))
        await turns(3)
        await manager.close(timeout_s=0)
        async with asyncio.timeout(10):
            (outcome,) = await asyncio.gather(sending, return_exceptions=True)
        assert isinstance(outcome, PeerClosed)

    async def test_who_is_in_line_when_the_manager_closes_is_not_left_waiting(
        self, fake_links: None, short_slices: None
    ) -> None:
        manager = ConnectionManager(threads=1)
        await manager.start()
        async with contextlib.AsyncExitStack() as stack:
            await joined(stack, manager, 300)
            fan_out = asyncio.create_task(manager.broadcast("x"))
            await turns(2)
            await manager.close(timeout_s=0)
            async with asyncio.timeout(10):
                result = await fan_out
            assert result.targets == 300 == result.sent + result.dropped


class TestOrder:
    """Messages to one connection leave in the order of the calls."""

    @pytest.fixture
    async def one_thread(self, fake_links: None, short_slices: None) -> AsyncIterator[ConnectionManager]:
        async with ConnectionManager(threads=1) as manager:
            yield manager

    async def joined_of_both_kinds(
        self, stack: contextlib.AsyncExitStack, manager: ConnectionManager, count: int
    ) -> list[Any]:
        """Every third can be sent to by its library only."""
        return [
            await stack.enter_async_context(
                manager.attach(FakeLink(None if number % 3 == 0 else Framing("plain")), str(number))
            )
            for number in range(count)
        ]

    async def test_concurrent_fan_outs_do_not_overtake_each_other(self, one_thread: ConnectionManager) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await self.joined_of_both_kinds(stack, one_thread, 60)
            results = await asyncio.gather(*(one_thread.broadcast(str(number)) for number in range(5)))
            await until(lambda: all(len(record.conn.got) == 5 for record in records))
            for record in records:
                assert record.conn.got == ["0", "1", "2", "3", "4"]
            assert all(result.targets == 60 == result.sent + result.queued for result in results)

    async def test_calls_of_all_kinds_keep_their_order(self, one_thread: ConnectionManager) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await self.joined_of_both_kinds(stack, one_thread, 60)
            tasks = [asyncio.create_task(one_thread.broadcast("0"))]
            await turns(1)
            one_thread.broadcast_nowait("1", coalesce=60_000)
            tasks += [asyncio.create_task(record.send("2")) for record in records]
            await turns(1)
            one_thread.broadcast_nowait("3")
            tasks += [asyncio.create_task(one_thread.send(record, "4")) for record in records]
            tasks += [asyncio.create_task(one_thread.broadcast("5"))]
            async with asyncio.timeout(10):
                await asyncio.gather(*tasks)
            await until(lambda: all(len(record.conn.got) == 6 for record in records))
            for record in records:
                assert record.conn.got == list("012345")

    async def test_a_single_message_goes_behind_a_fan_out_that_is_under_way(
        self, one_thread: ConnectionManager
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, one_thread, 300)
            fan_out = asyncio.create_task(one_thread.broadcast("all"))
            await turns(2)
            reached = sum(len(record.conn.got) for record in records)
            assert 0 < reached < 300
            await records[-1].send("one")
            one_thread.broadcast_nowait("nowait", exclude=records[0])
            assert records[-1].conn.got == ["all", "one"]
            result = await fan_out
            assert result.sent == 300
            await until(lambda: records[-2].conn.got == ["all", "nowait"])
            assert records[-1].conn.got == ["all", "one", "nowait"]
            assert records[0].conn.got == ["all"]

    async def test_the_loop_gets_its_turn_between_slices(self, one_thread: ConnectionManager) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, one_thread, 300)
            seen = []

            async def look() -> None:
                while True:
                    seen.append(sum(len(record.conn.got) for record in records))
                    await asyncio.sleep(0)

            looking = asyncio.create_task(look())
            await one_thread.broadcast("x")
            looking.cancel()
            steps = [after - before for before, after in itertools.pairwise(seen)]
            assert sum(step > 0 for step in steps) >= 10
            assert max(steps) <= 30

    async def test_messages_of_a_turn_leave_with_one_write(self, manager: ConnectionManager, fake_links: None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 3)
            for number in range(10):
                manager.broadcast_nowait(str(number))
            await records[0].send("10")
            for record in records:
                assert (record.conn.writes, len(record.conn.got)) == (1, 11 if record is records[0] else 10)

    async def test_who_leaves_before_its_turn_still_gets_it_and_who_comes_later_does_not(
        self, one_thread: ConnectionManager
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, one_thread, 300)
            links = [record.conn for record in records]
            fan_out = asyncio.create_task(one_thread.broadcast("x"))
            await turns(2)
            left = next(record for record in reversed(records) if not record.conn.got)
            await left.close()
            late = await joined_again(stack, one_thread, "late")
            result = await fan_out
            assert (result.targets, result.sent, result.dropped) == (300, 300, 0)
            assert late.conn.got == []
            assert [len(link.got) for link in links] == [1] * 300

    async def test_who_is_gone_before_its_turn_is_dropped(self, one_thread: ConnectionManager) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, one_thread, 300)
            fan_out = asyncio.create_task(one_thread.broadcast("x"))
            await turns(2)
            gone = next(record.conn for record in reversed(records) if not record.conn.got)
            gone.open = False
            result = await fan_out
            assert (result.sent, result.dropped) == (299, 1)
            assert gone.got == []

    async def test_a_cancelled_broadcast_is_delivered_all_the_same(self, one_thread: ConnectionManager) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, one_thread, 300)
            fan_out = asyncio.create_task(one_thread.broadcast("x"))
            await turns(2)
            fan_out.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fan_out
            assert sum(len(record.conn.got) for record in records) < 300
            await one_thread.broadcast("y")
            assert all(record.conn.got == ["x", "y"] for record in records)

    async def test_messages_line_up_while_the_library_sends(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(None), "a") as conn:
            link.gate.clear()
            assert (await manager.broadcast("1")).queued == 1
            sending = asyncio.create_task(conn.send("2"))
            await turns(5)
            assert manager.broadcast_nowait("3").queued == 1
            assert not sending.done()
            link.gate.set()
            await sending
            await until(lambda: len(link.got) == 3)
            assert link.got == ["1", "2", "3"]
            await until(lambda: manager.stats()["waiting"] == 0)
            await manager.broadcast("4")
            await until(lambda: link.got[3:] == ["4"])
            assert conn.messages_out == len(link.got)

    async def test_what_a_loop_sends_without_waiting_is_flushed_before_it_fills_memory(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with manager.attach(link := FakeLink(), "a"):
            message, most = bytes(2**18), 0
            for _ in range(200):
                manager.broadcast_nowait(message)
                most = max(most, manager.stats()["queued_bytes"])
            assert 2**22 < most < 2**24
            await manager.broadcast(message)
            assert link.got == [message] * 201


class TestWindow:
    """What ``coalesce`` does."""

    async def test_messages_of_a_window_leave_together(self, manager: ConnectionManager, fake_links: None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            links = [record.conn for record in await joined(stack, manager, 3)]
            for number in range(4):
                assert manager.broadcast_nowait(str(number), coalesce=20).queued == 3
                await turns(3)
            assert all(link.got == [] for link in links)
            await until(lambda: all(link.got for link in links))
            assert [(link.got, link.writes) for link in links] == [(["0", "1", "2", "3"], 1)] * 3

    async def test_the_shortest_window_counts(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(), "a"):
            manager.broadcast_nowait("1", coalesce=60_000)
            manager.broadcast_nowait("2", coalesce=1)
            manager.broadcast_nowait("3", coalesce=60_000)
            await until(lambda: link.got == ["1", "2", "3"])

    @pytest.mark.parametrize("shortest", [0, 0.001])
    async def test_a_window_of_nothing_is_the_end_of_the_turn(
        self, manager: ConnectionManager, fake_links: None, shortest: float
    ) -> None:
        async with manager.attach(link := FakeLink(), "a"):
            for coalesce in (60_000, shortest, shortest, 60_000):
                manager.broadcast_nowait(str(coalesce), coalesce=coalesce)
            assert link.got == []
            await until(lambda: len(link.got) == 4)
            assert link.writes == 1

    @pytest.mark.parametrize("call", ["send", "broadcast", "broadcast_nowait"])
    async def test_what_is_sent_meanwhile_takes_it_along(
        self, manager: ConnectionManager, fake_links: None, call: str
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            a, b = await joined(stack, manager, 2)
            manager.broadcast_nowait("late", coalesce=60_000)
            if call == "send":
                await a.send("now")
            elif call == "broadcast":
                await manager.broadcast("now", to=[a])
            else:
                manager.broadcast_nowait("now", to=[a])
                await turns(2)
            assert a.conn.got == ["late", "now"]
            assert b.conn.got == []
            manager.broadcast_nowait("soon", coalesce=0)
            await until(lambda: b.conn.got == ["late", "soon"])
            assert a.conn.got == ["late", "now", "soon"]

    async def test_a_newer_message_of_this_turn_that_replaces_a_late_one_leaves_this_turn(
        self, fake_links: None
    ) -> None:
        conflating = Backpressure(policy="conflate")
        async with ConnectionManager(backpressure=conflating) as manager, manager.attach(FakeLink(), "a") as conn:
            result = manager.broadcast_nowait("older", key="k", coalesce=60_000)
            assert result.queued == 1
            async with asyncio.timeout(10):
                result = await manager.broadcast("newer", key="k")
            assert (result.sent, result.displaced) == (1, 1)
            assert conn.conn.got == ["newer"]

    async def test_who_leaves_within_a_window_gets_it(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(link := FakeLink(), "a"):
            manager.broadcast_nowait("x", coalesce=60_000)
        assert link.got == ["x"]

    async def test_a_closing_manager_does_not_wait_for_the_window(self, fake_links: None) -> None:
        async with ConnectionManager() as manager:
            await manager.attach(link := FakeLink(), "a").__aenter__()
            manager.broadcast_nowait("x", coalesce=60_000)
            report = await manager.close()
        assert link.got == ["x"]
        assert report.undelivered == ()


class TestTheLibrarysOwnSend:
    """What the application sends past wsfast."""

    async def test_no_message_comes_between_the_fragments_of_another(self, manager: ConnectionManager) -> None:
        gate, under_way = asyncio.Event(), asyncio.Event()

        async def handler(ws: ServerConnection) -> None:
            async def fragments() -> Any:
                yield "begin "
                under_way.set()
                await gate.wait()
                yield "end"

            await ws.send(fragments())
            await ws.wait_closed()

        async with serving(handler, manager) as url, client(url) as ws:
            await under_way.wait()
            assert (await manager.broadcast("1")).queued == 1
            assert manager.broadcast_nowait("2").queued == 1
            gate.set()
            assert await received(ws, 3) == ["begin end", "1", "2"]
            (record,) = manager.registry.values()
            assert (record.messages_out, record.bytes_out) == (3, len("begin end12"))

    async def test_nor_where_the_connection_is_the_librarys(self, manager: ConnectionManager) -> None:
        gate, under_way = asyncio.Event(), asyncio.Event()

        async def handler(ws: ServerConnection) -> None:
            async def fragments() -> Any:
                yield "begin "
                under_way.set()
                await gate.wait()
                yield "end"

            async with manager.attach(ws, "a"):
                await ws.send(fragments())
                await ws.wait_closed()

        async with serving(handler) as url, client(url) as ws:
            await under_way.wait()
            results = [await manager.broadcast(str(number)) for number in (1, 2)]
            assert [result.queued for result in results] == [1, 1]
            gate.set()
            assert await received(ws, 3) == ["begin end", "1", "2"]

    async def test_a_message_attached_in_the_middle_of_waits_for_its_end(self, manager: ConnectionManager) -> None:
        gate, under_way = asyncio.Event(), asyncio.Event()

        async def handler(ws: ServerConnection) -> None:
            async def fragments() -> Any:
                yield b"begin "
                under_way.set()
                await gate.wait()
                yield b"end"

            sending = asyncio.create_task(ws.send(fragments()))
            await under_way.wait()
            async with manager.attach(ws, "a"):
                await sending
                await ws.wait_closed()

        async with serving(handler, manager, attach=False) as url, client(url) as ws:
            await until(lambda: len(manager.registry) == 1)
            assert (await manager.broadcast("1")).queued == 1
            gate.set()
            assert await received(ws, 2) == [b"begin end", "1"]

    async def test_a_message_of_the_same_turn_leaves_first(self, manager: ConnectionManager) -> None:
        go = asyncio.Event()

        async def handler(ws: Any) -> None:
            await go.wait()
            manager.broadcast_nowait("1")
            await ws.send("2")
            await manager.broadcast("3")
            await ws.send("4")
            await ws.wait_closed()

        async with serving(handler, manager) as url, client(url) as ws:
            go.set()
            assert await received(ws, 4) == ["2", "1", "3", "4"]

    async def test_messages_of_both_reach_a_slow_peer_whole_and_each_in_order(self) -> None:
        """The library's own go to the transport, which may still have the rest of a frame of the outbox."""
        keeping = Backpressure(policy="keep")
        async with (
            ConnectionManager(backpressure=keeping) as manager,
            serving(park, manager, compression=None) as url,
            client(url, compression=None, max_queue=1) as ws,
        ):
            await until(lambda: len(manager.registry) == 1)
            (record,) = manager.registry.values()
            sending = []
            for number in range(40):
                manager.broadcast_nowait(f"m{number:03}" + "x" * 100_000)
                sending.append(asyncio.create_task(record.conn.send(f"l{number:03}" + "y" * 100_000)))
                await turns(number % 4)
            messages = [str(message) for message in await received(ws, 80)]
            for sender, filling in (("m", "x"), ("l", "y")):
                mine = [message for message in messages if message[0] == sender]
                assert mine == [f"{sender}{number:03}" + filling * 100_000 for number in range(40)]
            await asyncio.gather(*sending)


async def test_broadcasts_reach_many_real_clients_in_order(manager: ConnectionManager) -> None:
    async with serving(park, manager) as url, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client(url)) for _ in range(50)]
        await until(lambda: len(manager.registry) == 50)
        results = await asyncio.gather(*(manager.broadcast(str(number)) for number in range(20)))
        expected = [str(number) for number in range(20)]
        for ws in clients:
            assert await received(ws, 20) == expected
        assert all(result.targets == 50 == result.sent for result in results)
        assert manager.stats()["messages_out"] == 1000
        assert manager.stats()["writes"] == 50
