"""Sending to one and to many: frames, order, membership, failures as data, counting, and slices."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import FakeLink, RawPeer, client, received, serving, until
from wsfast import ConnectionManager, MessageTooBig, PeerClosed, PeerFailed, delivery

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


async def test_mutable_messages_are_taken_as_they_are_at_the_call(manager: ConnectionManager, fake_links: None) -> None:
    async with contextlib.AsyncExitStack() as stack:
        (record,) = await joined(stack, manager, 1)
        link = record.conn
        link.direct = False
        link.gate.clear()
        message = bytearray(b"before")
        manager.broadcast_nowait(message)
        message[:] = b"after!"
        link.gate.set()
        await until(lambda: link.got)
        assert link.got == [b"before"]
        link.direct = True
        await manager.send(record, memoryview(b"abcdef")[::2])
        assert link.got[-1] == b"ace"


@pytest.mark.parametrize("call", ["send", "broadcast", "broadcast_nowait"])
@pytest.mark.parametrize(
    ("message", "error"),
    [
        (1, TypeError),
        (None, TypeError),
        ({"a": 1}, TypeError),
        ("\ud800", UnicodeEncodeError),
        ("x" * 11, MessageTooBig),
    ],
)
async def test_what_is_no_message_is_refused_before_anything_is_sent(
    fake_links: None, call: str, message: Any, error: type[Exception]
) -> None:
    async with ConnectionManager(max_message_bytes=10) as manager, manager.attach(FakeLink(), "a") as conn:
        link = conn.conn
        with pytest.raises(error):
            if call == "send":
                await manager.send("a", message)
            elif call == "broadcast":
                await manager.broadcast(message)
            else:
                manager.broadcast_nowait(message)
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
        result = manager.broadcast_nowait("x", **filters) if nowait else await manager.broadcast("x", **filters)
        assert "".join(name for name, record in records.items() if record.conn.got) == expected
        assert (result.targets, result.sent) == (len(expected), len(expected))

    async def test_records_can_be_excluded_alone_and_mixed_with_ids(
        self, manager: ConnectionManager, records: dict[str, Any]
    ) -> None:
        await manager.broadcast("1", exclude=records["a"])
        await manager.broadcast("2", exclude={records["a"], "b"})
        assert [records[name].conn.got for name in "abcd"] == [[], ["1"], ["1", "2"], ["1", "2"]]

    async def test_send_to_user_reaches_all_connections_of_the_user(
        self, manager: ConnectionManager, records: dict[str, Any]
    ) -> None:
        assert (await manager.send_to_user("u1", "x")).sent == 2
        assert (await manager.send_to_user("nobody", "x")).targets == 0
        assert [records[name].conn.got for name in "abcd"] == [["x"], ["x"], [], []]

    @pytest.mark.parametrize(
        ("filters", "error"),
        [
            ({"group": 1}, "group name must be str, not int"),
            ({"user": 1}, "user id must be str, not int"),
            ({"tag": ["plan", "pro"]}, "tag must be a key or a"),
            ({"exclude": [1]}, "exclude must hold client ids and records, not int"),
        ],
    )
    async def test_wrong_types_are_told(self, manager: ConnectionManager, filters: Any, error: str) -> None:
        with pytest.raises(TypeError, match=error):
            await manager.broadcast("x", **filters)


async def test_the_outcome_of_every_target_is_in_the_result(manager: ConnectionManager, fake_links: None) -> None:
    async with contextlib.AsyncExitStack() as stack:
        records = await joined(stack, manager, 5)
        links = [record.conn for record in records]
        links[1].buffered = True
        links[2].open = False
        links[3].raises = failure = OSError("broken")
        links[4].direct = False
        result = await manager.broadcast("x")
        assert (result.targets, result.sent, result.queued, result.dropped, result.failed) == (5, 1, 2, 1, 1)
        assert result.failures == (("3", failure),)
        assert result.seconds > 0
        assert [record.errors_out for record in records] == [0, 0, 0, 1, 0]
        await until(lambda: links[4].got)
        await until(lambda: records[4].messages_out)
        assert [record.messages_out for record in records] == [1, 1, 0, 0, 1]


async def test_only_the_first_failures_are_listed(manager: ConnectionManager, fake_links: None) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for record in await joined(stack, manager, 130):
            record.conn.raises = OSError()
        result = await manager.broadcast("x")
        assert result.failed == 130
        assert len(result.failures) == 100


async def test_send_tells_what_is_wrong_with_the_peer(manager: ConnectionManager, fake_links: None) -> None:
    async with manager.attach(FakeLink(), "a") as conn:
        link = conn.conn
        link.raises = cause = OSError("broken")
        with pytest.raises(PeerFailed) as failed:
            await conn.send("x")
        assert failed.value.client_id == "a"
        assert failed.value.cause is cause
        assert conn.errors_out == 1
        link.open = False
        with pytest.raises(PeerClosed) as closed:
            await conn.send("x")
        assert (closed.value.client_id, closed.value.code, closed.value.reason) == ("a", 4000, "gone")


async def test_send_waits_while_the_write_buffer_is_full_and_broadcast_does_not(
    manager: ConnectionManager, fake_links: None
) -> None:
    async with manager.attach(FakeLink(), "a") as conn:
        link = conn.conn
        link.buffered = True
        link.gate.clear()
        assert (await manager.broadcast("1")).queued == 1
        sending = asyncio.create_task(conn.send("2"))
        await until(lambda: link.got == ["1", "2"])
        assert not sending.done()
        link.gate.set()
        await sending


class TestOrder:
    """Messages to one connection leave in the order of the calls."""

    @pytest.fixture
    def one_target_per_slice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks = itertools.count()
        monkeypatch.setattr(delivery, "perf_counter", lambda: next(ticks) * 0.0011)

    async def test_concurrent_fan_outs_do_not_overtake_each_other(
        self, manager: ConnectionManager, fake_links: None, one_target_per_slice: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 20)
            results = await asyncio.gather(*(manager.broadcast(str(number)) for number in range(5)))
            for record in records:
                assert record.conn.got == ["0", "1", "2", "3", "4"]
            assert [result.sent for result in results] == [20] * 5

    async def test_a_single_message_goes_behind_a_fan_out_that_is_under_way(
        self, manager: ConnectionManager, fake_links: None, one_target_per_slice: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 20)
            fan_out = asyncio.create_task(manager.broadcast("all"))
            await asyncio.sleep(0)
            assert not all(record.conn.got for record in records)
            for record in records:
                await record.send("one")
            # It did not wait for the fan-out: that is still under way.
            assert not fan_out.done()
            manager.broadcast_nowait("nowait")
            result = await fan_out
            assert result.sent == 20
            for record in records:
                assert record.conn.got == ["all", "one", "nowait"]

    async def test_the_loop_gets_its_turn_between_slices(
        self, manager: ConnectionManager, fake_links: None, one_target_per_slice: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await joined(stack, manager, 20)
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count())
            await manager.broadcast("x")
            counting.cancel()
            assert turns >= 18

    async def test_who_leaves_before_its_turn_gets_nothing_and_who_comes_later_neither(
        self, manager: ConnectionManager, fake_links: None, one_target_per_slice: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 20)
            links = [record.conn for record in records]
            fan_out = asyncio.create_task(manager.broadcast("x"))
            await asyncio.sleep(0)
            left = next(record for record in records if not record.conn.got)
            await left.close()
            late = await stack.enter_async_context(manager.attach(FakeLink(), "late"))
            result = await fan_out
            assert (result.targets, result.sent, result.dropped) == (20, 19, 1)
            assert late.conn.got == []
            assert sum(len(link.got) for link in links) == 19

    async def test_a_cancelled_fan_out_stops_and_owes_nothing(
        self, manager: ConnectionManager, fake_links: None, one_target_per_slice: None
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            records = await joined(stack, manager, 20)
            fan_out = asyncio.create_task(manager.broadcast("x"))
            await asyncio.sleep(0)
            fan_out.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fan_out
            reached = sum(len(record.conn.got) for record in records)
            manager.broadcast_nowait("y")
            assert 0 < reached < 20
            assert sum(record.conn.got == ["y"] for record in records) == 20 - reached

    async def test_messages_line_up_where_nothing_can_be_written_directly(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with manager.attach(FakeLink(), "a") as conn:
            link = conn.conn
            link.direct = False
            link.gate.clear()
            assert (await manager.broadcast("1")).queued == 1
            sending = asyncio.create_task(conn.send("2"))
            await asyncio.sleep(0)
            link.direct = True  # it could be written to again, but three messages are in line
            assert manager.broadcast_nowait("3").queued == 1
            link.gate.set()
            await sending
            await until(lambda: len(link.got) == 3)
            assert link.got == ["1", "2", "3"]
            await until(lambda: manager.broadcast_nowait("4").sent == 1)
            assert conn.messages_out == len(link.got)

    async def test_the_line_is_bounded_for_those_who_do_not_wait(
        self, manager: ConnectionManager, fake_links: None
    ) -> None:
        async with manager.attach(FakeLink(), "a") as conn:
            link = conn.conn
            link.direct = False
            link.gate.clear()
            results = [manager.broadcast_nowait(str(number)) for number in range(1005)]
            assert sum(result.dropped for result in results) == 5
            sending = asyncio.create_task(conn.send("last"))
            await asyncio.sleep(0)
            link.gate.set()
            await sending
            assert link.got == [str(number) for number in range(1000)] + ["last"]

    async def test_the_sender_in_line_is_told_of_a_failure(self, manager: ConnectionManager, fake_links: None) -> None:
        async with manager.attach(FakeLink(), "a") as conn:
            link = conn.conn
            link.direct = False
            link.gate.clear()
            manager.broadcast_nowait("lost")
            sending = asyncio.create_task(conn.send("x"))
            await asyncio.sleep(0)
            link.raises = OSError("broken")
            link.gate.set()
            with pytest.raises(PeerFailed, match="OSError: broken"):
                await sending
            assert link.got == []
            assert conn.errors_out == 2

    async def test_who_waits_in_line_when_the_manager_closes_is_not_left_waiting(self, fake_links: None) -> None:
        manager = ConnectionManager()
        async with manager:
            conn = await manager.attach(FakeLink(), "a").__aenter__()
            link = conn.conn
            link.direct = False
            link.gate.clear()
            sending = asyncio.create_task(conn.send("x"))
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await sending


async def test_a_broadcast_does_not_come_between_the_fragments_of_a_message(manager: ConnectionManager) -> None:
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


async def test_broadcasts_reach_many_real_clients_in_order(manager: ConnectionManager) -> None:
    async with serving(park, manager) as url, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client(url)) for _ in range(50)]
        await until(lambda: len(manager.registry) == 50)
        results = await asyncio.gather(*(manager.broadcast(str(number)) for number in range(20)))
        expected = [str(number) for number in range(20)]
        for ws in clients:
            assert await received(ws, 20) == expected
        assert all(result.targets == 50 == result.sent + result.queued for result in results)
        assert manager.stats()["messages_out"] == 1000
