"""Peers that read too slowly: every policy, its bounds, its events and counters; by bytes, by age and by budget."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from tests.conftest import FakeClock
from tests.server.conftest import FakeLink, RawPeer, Seen, link_of, serving, until
from wsfast import (
    Backpressure,
    ConnectionClosed,
    ConnectionManager,
    ConnectionTooSlow,
    InvalidSetting,
    MessageConflated,
    MessagesDropped,
    PeerClosed,
    PeerTooSlow,
    delivery,
)

POLICIES = ["keep", "drop_newest", "drop_oldest", "conflate", "disconnect"]
DROPPING = ["drop_newest", "drop_oldest", "conflate"]

MAX_BYTES = 1000


def text(number: int) -> str:
    """A message whose frame has 100 bytes."""
    return f"{number:098}"


def numbers(messages: list[Any]) -> list[int]:
    return [int(message) for message in messages]


class Stalled:
    """A manager with one connection that is blocked: the frame of message 0 waits in its transport."""

    def __init__(self, manager: ConnectionManager, conn: Any) -> None:
        self.manager = manager
        self.conn = conn
        self.ws: FakeLink = conn.conn

    @property
    def waits(self) -> tuple[int, int]:
        """Messages in the outbox, and bytes in it and in the transport."""
        link = self.link
        return link.messages, link.bytes

    @property
    def link(self) -> Any:
        return link_of(self.manager, self.conn)

    @property
    def stats(self) -> dict[str, int]:
        """The counters of what was not sent, but for those that are 0."""
        return {
            name: count
            for name, count in self.manager.stats().items()
            if count and (name.startswith(("dropped_by", "too_slow_by")) or name == "conflated")
        }

    def push(self, *messages: int, key: str | None = None) -> list[Any]:
        return [self.manager.broadcast_nowait(text(number), key=key) for number in messages]

    async def block(self) -> None:
        self.ws.in_buffer = 100
        self.push(0)
        await until(lambda: self.ws.waiting)

    async def drain(self, still: int = 0) -> None:
        """What is in the transport is gone, and *still* bytes of what is written next stay there."""
        self.ws.drain()
        self.ws.in_buffer = still
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def stalled(policy: str, **settings: Any) -> AsyncIterator[Stalled]:
    settings.setdefault("max_bytes", MAX_BYTES)
    backpressure = Backpressure(policy=policy, **settings)  # type: ignore[arg-type]
    async with ConnectionManager(backpressure=backpressure) as manager, manager.attach(FakeLink(), "a") as conn:
        peer = Stalled(manager, conn)
        await peer.block()
        yield peer


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"policy": "drop"},
            "backpressure.policy must be 'keep', 'drop_newest', 'drop_oldest', 'conflate', 'disconnect', not 'drop'",
        ),
        ({"max_bytes": 0}, "backpressure.max_bytes must be 1 or more, not 0"),
        ({"max_bytes": float("nan")}, "backpressure.max_bytes must be 1 or more, not nan"),
        ({"max_age_s": 0}, r"backpressure.max_age_s must be more than 0, and less than 10\*\*9, not 0"),
        ({"max_age_s": 1e9}, "backpressure.max_age_s must be more than 0"),
        ({"max_age_s": float("nan")}, "backpressure.max_age_s must be more than 0"),
        (
            {"resume_below": -0.1},
            "backpressure.resume_below must be from 0 to max_bytes, or as a float from 0 to 1, not -0.1",
        ),
        (
            {"resume_below": 1.1},
            "backpressure.resume_below must be from 0 to max_bytes, or as a float from 0 to 1, not 1.1",
        ),
        ({"max_total_bytes": 0}, "backpressure.max_total_bytes must be 1 or more, not 0"),
        ({"code": 1006}, "code must be 1000 to 1003, 1007 to 1014, or 3000 to 4999, not 1006"),
        ({"reason": "ä" * 62}, "reason must be at most 123 bytes in UTF-8"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, error: str) -> None:
    with pytest.raises(InvalidSetting, match=error):
        ConnectionManager(backpressure=Backpressure(**settings))


@pytest.mark.usefixtures("fake_links")
class TestBytes:
    """What happens beyond ``max_bytes``, to the byte."""

    async def test_keep_keeps(self) -> None:
        async with stalled("keep") as peer:
            results = peer.push(*range(1, 51))
            assert peer.waits == (50, 5100)
            assert all((result.queued, result.displaced) == (1, 0) for result in results)
            await peer.drain()
            assert numbers(peer.ws.got) == list(range(51))
            assert peer.stats == {}

    async def test_drop_newest_drops_until_what_waits_has_sunk_to_the_mark(self) -> None:
        async with stalled("drop_newest") as peer:
            dropped = Seen(peer.manager, MessagesDropped)
            assert [result.queued for result in peer.push(*range(1, 10))] == [1] * 9
            assert peer.waits == (9, 1000)
            assert [(result.queued, result.dropped) for result in peer.push(10, 11)] == [(0, 1)] * 2
            assert dropped == [MessagesDropped(peer.conn, "bytes", 1, 98, 0.0)] * 2
            await peer.drain(still=100)
            assert peer.waits == (0, 100)
            peer.link.block(501)
            assert peer.push(12)[0].dropped == 1
            peer.link.block(500)
            assert [result.queued for result in peer.push(*range(12, 17))] == [1] * 5
            assert peer.waits == (5, 1000)
            assert peer.push(17)[0].dropped == 1
            assert peer.stats == {"dropped_by_bytes": 4}
            await peer.drain()
            assert numbers(peer.ws.got) == [*range(10), *range(12, 17)]

    async def test_a_mark_of_nothing_drops_until_all_has_left(self) -> None:
        async with stalled("drop_newest", resume_below=0) as peer:
            peer.push(*range(1, 11))
            peer.link.block(1)
            await peer.drain(still=1)
            assert peer.push(11)[0].dropped == 1
            await peer.drain()
            assert peer.push(12)[0].queued == 1
            await peer.drain()
            assert numbers(peer.ws.got) == [*range(10), 12]

    async def test_drop_oldest_makes_room_down_to_the_mark(self) -> None:
        async with stalled("drop_oldest") as peer:
            dropped = Seen(peer.manager, MessagesDropped)
            results = peer.push(*range(1, 11))
            assert [result.displaced for result in results] == [0] * 9 + [6]
            assert all(result.queued == 1 for result in results)
            assert peer.waits == (4, 500)
            assert [(event.cause, event.messages, event.nbytes) for event in dropped] == [("bytes", 6, 6 * 98)]
            assert [result.displaced for result in peer.push(*range(11, 17))] == [0] * 5 + [6]
            await peer.drain()
            assert numbers(peer.ws.got) == [0, *range(13, 17)]
            assert peer.stats == {"dropped_by_bytes": 12}

    async def test_the_result_of_a_broadcast_that_waits_follows_its_message(self) -> None:
        async with stalled("drop_oldest") as peer:
            encoded = peer.manager._delivery._broadcast(text(1))
            assert (encoded.queued, encoded.dropped) == (1, 0)
            peer.push(*range(2, 11))
            assert (encoded.queued, encoded.dropped, encoded.targets) == (0, 1, 1)

    async def test_the_newest_has_its_place_however_long_it_is(self) -> None:
        async with stalled("drop_oldest") as peer:
            peer.push(1, 2)
            result = peer.manager.broadcast_nowait("x" * 950)
            assert (result.queued, result.dropped, result.displaced) == (1, 0, 2)
            assert peer.waits == (1, 100 + 954)
            assert peer.push(3)[0].displaced == 1
            assert peer.stats == {"dropped_by_bytes": 3}
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 3]

    async def test_a_single_message_always_fits_an_empty_outbox(self) -> None:
        for policy in POLICIES:
            settings = Backpressure(policy=policy, max_bytes=10)  # type: ignore[arg-type]
            async with ConnectionManager(backpressure=settings) as manager, manager.attach(FakeLink(), "a") as conn:
                assert (await manager.broadcast("x" * 10_000)).sent == 1
                for _ in range(3):  # nor does a burst to a peer that keeps up pass any limit
                    manager.broadcast_nowait("y" * 100)
                await conn.send("z")
                assert len(conn.conn.got) == 5

    async def test_disconnect_gives_up(self) -> None:
        async with stalled("disconnect") as peer:
            events = Seen(peer.manager)
            peer.push(*range(1, 10))
            assert peer.waits == (9, 1000)
            assert events == []
            (result,) = peer.push(10)
            assert (result.targets, result.queued, result.dropped, result.disconnected) == (1, 0, 1, 1)
            assert peer.waits == (0, 100)  # its transport holds on to that until it has gone
            await until(lambda: not peer.ws.open)
            await until(lambda: len(events) == 3)
            slow = next(event for event in events if isinstance(event, ConnectionTooSlow))
            assert (slow.conn, slow.cause, slow.messages, slow.nbytes) == (peer.conn, "bytes", 9, 1000)
            lost = next(event for event in events if isinstance(event, MessagesDropped))
            assert (lost.conn, lost.cause, lost.messages, lost.nbytes) == (peer.conn, "bytes", 9, 9 * 98)
            assert isinstance(events[-1], ConnectionClosed)
            assert peer.stats == {"too_slow_by_bytes": 1, "dropped_by_bytes": 9}
            assert numbers(peer.ws.got) == [0]

    async def test_who_is_given_up_gets_nothing_more(self) -> None:
        async with stalled("disconnect") as peer:
            peer.push(*range(1, 11))
            (result,) = peer.push(11)
            assert (result.dropped, result.disconnected) == (1, 0)
            with pytest.raises((PeerTooSlow, PeerClosed)):
                await peer.conn.send("x")
            await until(lambda: len(peer.manager.registry) == 0)
            assert peer.push(12)[0].targets == 0
            assert peer.stats["too_slow_by_bytes"] == 1

    @pytest.mark.parametrize("policy", DROPPING)
    async def test_what_waits_is_bounded_whatever_comes(self, policy: str) -> None:
        """At most max_bytes, or one message; and what the transport has, where that must leave room for the newest."""
        chance = random.Random(policy)
        async with stalled(policy) as peer:
            for number in range(2000):
                size = chance.choice((1, 50, 200, 900, 2000))
                key = chance.choice((None, "a", "b", "c"))
                peer.manager.broadcast_nowait(bytes(size), key=key)
                frame = size + (2 if size < 126 else 4)
                if policy == "drop_newest":
                    assert peer.waits[1] <= MAX_BYTES
                elif policy == "drop_oldest":
                    assert peer.waits[1] <= MAX_BYTES or peer.waits[1] <= 400 + frame
                else:
                    assert sum(peer.link.sizes()) <= max(MAX_BYTES, frame)
                if number % 37 == 0:
                    await peer.drain(still=chance.randrange(1, 400))
                    if not peer.link.is_blocked:
                        await peer.block()
            assert peer.stats["dropped_by_bytes"] > 100


@pytest.mark.usefixtures("fake_links")
class TestConflation:
    """A message with a key replaces one with the same key, in its place."""

    async def test_in_its_place(self) -> None:
        async with stalled("conflate") as peer:
            seen = Seen(peer.manager, MessageConflated)
            for number, key in enumerate(("a", "b", "c", None, "d"), 1):
                peer.push(number, key=key)
            assert [result.displaced for result in peer.push(12, key="b")] == [1]
            assert [result.displaced for result in peer.push(15, key="d")] == [1]
            assert [result.displaced for result in peer.push(22, key="b")] == [1]
            assert [result.displaced for result in peer.push(6)] == [0]
            assert peer.waits == (6, 700)
            assert [(event.conn, event.nbytes) for event in seen] == [(peer.conn, 98)] * 3
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 1, 22, 3, 4, 15, 6]
            assert peer.stats == {"conflated": 3}

    async def test_what_has_not_left_yet_is_replaced_though_nobody_is_slow(self) -> None:
        settings = Backpressure(policy="conflate")
        async with ConnectionManager(backpressure=settings) as manager, manager.attach(FakeLink(), "a") as conn:
            results = [manager.broadcast_nowait(str(number), key="k") for number in range(5)]
            assert [result.displaced for result in results] == [0, 1, 1, 1, 1]
            assert (await manager.broadcast("5", key="k")).displaced == 1
            assert conn.conn.got == ["5"]
            assert manager.stats()["conflated"] == 5

    async def test_what_is_in_the_transport_is_not_replaced(self) -> None:
        async with stalled("conflate") as peer:
            peer.ws.drain()
            peer.ws.in_buffer = 100
            peer.push(1, key="k")
            await until(lambda: len(peer.ws.got) == 2)
            assert peer.push(2, key="k")[0].displaced == 0
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 1, 2]

    async def test_keys_mean_nothing_to_the_other_policies(self) -> None:
        async with stalled("drop_oldest") as peer:
            peer.push(1, 2, key="k")
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 1, 2]

    async def test_beyond_the_limit_the_oldest_are_dropped(self) -> None:
        async with stalled("conflate") as peer:
            for number in range(1, 11):
                assert peer.push(number, key=f"key {number}")[0].displaced == 0
            assert peer.push(11, key="key 11")[0].displaced == 6
            assert peer.push(20, key="key 10")[0].displaced == 1
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 7, 8, 9, 20, 11]
            assert peer.stats == {"dropped_by_bytes": 6, "conflated": 1}

    async def test_a_longer_replacement_makes_its_own_room(self) -> None:
        async with stalled("conflate") as peer:
            for number in range(1, 11):
                peer.push(number, key=f"key {number}")
            result = peer.manager.broadcast_nowait(f"{99:0296}", key="key 10")  # a frame of 300 bytes
            assert (result.queued, result.displaced) == (1, 3)
            assert peer.waits == (8, 100 + 1000)
            await peer.drain()
            assert numbers(peer.ws.got) == [0, *range(3, 10), 99]

    async def test_a_frame_that_was_begun_takes_no_room_from_the_latest_of_each_key(self) -> None:
        async with stalled("conflate") as peer:
            await peer.drain(still=5 * MAX_BYTES)
            peer.push(1)
            await until(lambda: peer.link.is_blocked)
            for number in range(2, 8):
                peer.push(number, key="ab"[number % 2])
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 1, 6, 7]

    @pytest.mark.parametrize("keys", [3, 16, 17, 40, 200])
    async def test_any_number_of_keys_with_departures_in_between(
        self, keys: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(delivery, "_WRITE_BYTES", 300)
        chance = random.Random(keys)
        waiting: list[tuple[str | None, int]] = []
        left: list[int] = []
        async with stalled("conflate", max_bytes=2**20) as peer:
            for number in range(1, 3000):
                key = chance.choice((None, *(f"key {chance.randrange(keys)}" for _ in range(8))))
                places = [place for place, (other, _) in enumerate(waiting) if other == key and key is not None]
                (result,) = peer.push(number, key=key)
                assert result.displaced == len(places)
                if places:
                    waiting[places[0]] = (key, number)
                else:
                    waiting.append((key, number))
                assert peer.waits == (len(waiting), 100 * len(waiting) + 100)
                if chance.random() < 0.25:
                    await peer.drain(still=100)
                    left += [each for _, each in waiting[:3]]
                    del waiting[:3]
                    if not peer.link.is_blocked:  # there was nothing to be written
                        peer.ws.in_buffer = 100
                        peer.push(number)
                        await until(lambda: peer.link.is_blocked)
                        left.append(number)
            assert numbers(peer.ws.got) == [0, *left]


@pytest.mark.usefixtures("fake_links")
class TestAge:
    """What happens beyond ``max_age_s``."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        clock = FakeClock()
        monkeypatch.setattr(delivery, "monotonic_ns", clock)
        return clock

    @staticmethod
    def pass_time(peer: Stalled, clock: FakeClock, seconds: float) -> None:
        clock.advance(int(seconds * 1e9))
        peer.manager._delivery._look_at_waiting()

    @pytest.mark.parametrize("policy", DROPPING)
    async def test_what_is_too_old_is_dropped(self, policy: str, clock: FakeClock) -> None:
        async with stalled(policy, max_age_s=10) as peer:
            dropped = Seen(peer.manager, MessagesDropped)
            peer.push(1, 2)
            clock.advance(6_000_000_000)
            peer.push(3)
            self.pass_time(peer, clock, 4)
            assert peer.waits == (3, 400)
            self.pass_time(peer, clock, 0.5)
            assert peer.waits == (1, 200)
            assert dropped == [MessagesDropped(peer.conn, "age", 2, 2 * 98, 10.5)]
            self.pass_time(peer, clock, 100)
            assert peer.waits == (0, 100)
            assert peer.stats == {"dropped_by_age": 3}
            peer.push(4)
            await peer.drain()
            assert numbers(peer.ws.got) == [0, 4]

    async def test_a_frame_on_its_way_is_not_dropped(self, clock: FakeClock) -> None:
        async with stalled("drop_oldest", max_age_s=10) as peer:
            self.pass_time(peer, clock, 1000)
            assert peer.waits == (0, 100)
            assert peer.stats == {}

    async def test_who_takes_nothing_for_so_long_is_disconnected(self, clock: FakeClock) -> None:
        async with stalled("disconnect", max_age_s=10) as peer:
            slow = Seen(peer.manager, ConnectionTooSlow)
            peer.push(1)
            self.pass_time(peer, clock, 9.5)
            assert slow == []
            self.pass_time(peer, clock, 1)
            assert slow == [ConnectionTooSlow(peer.conn, "age", 1, 200, 10.5)]
            await until(lambda: not peer.ws.open)
            assert peer.stats == {"too_slow_by_age": 1, "dropped_by_age": 1}

    async def test_who_takes_a_little_now_and_then_is_disconnected_for_what_waits_too_long(
        self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(delivery, "_WRITE_BYTES", 1)
        async with stalled("disconnect", max_age_s=10) as peer:
            slow = Seen(peer.manager, ConnectionTooSlow)
            peer.push(*range(1, 9))
            for _ in range(2):
                self.pass_time(peer, clock, 4)
                await peer.drain(still=100)
            assert slow == []
            self.pass_time(peer, clock, 4)
            assert slow == [ConnectionTooSlow(peer.conn, "age", 6, 700, 12.0)]

    async def test_keep_keeps(self, clock: FakeClock) -> None:
        async with stalled("keep", max_age_s=10) as peer:
            peer.push(1)
            self.pass_time(peer, clock, 1000)
            assert peer.waits == (1, 200)
            assert peer.stats == {}

    @pytest.mark.parametrize("policy", ["disconnect", "drop_oldest"])
    async def test_time_counts_from_when_it_began_to_wait_and_not_from_the_last_message(
        self, policy: str, clock: FakeClock
    ) -> None:
        """The library itself fills the transport after a long silence."""
        async with stalled(policy, max_age_s=10) as peer:
            await peer.drain()
            clock.advance(60_000_000_000)
            peer.link.block(100)
            peer.ws.waiting = peer.link
            self.pass_time(peer, clock, 1)
            assert peer.stats == {}
            assert peer.ws.open
            peer.push(1)
            self.pass_time(peer, clock, 9.5)
            expected = {"too_slow_by_age": 1, "dropped_by_age": 1} if policy == "disconnect" else {}
            assert peer.stats == expected

    async def test_somebody_looks_while_something_waits(self) -> None:
        async with stalled("drop_oldest", max_age_s=0.2) as peer:
            peer.push(1)
            await until(lambda: peer.waits[0] == 0)
            assert peer.stats == {"dropped_by_age": 1}
            await peer.drain()
            assert peer.manager.stats()["waiting"] == 0
            await until(lambda: peer.manager._delivery._look is None)
            await peer.block()
            peer.push(2)
            await until(lambda: peer.waits[0] == 0)

    async def test_who_sends_is_told_that_it_was_too_old(self, clock: FakeClock) -> None:
        async with stalled("drop_oldest", max_age_s=10) as peer:
            peer.push(*range(1, 5))
            sending = asyncio.create_task(peer.conn.send(text(5)))
            await asyncio.sleep(0)
            assert not sending.done()
            self.pass_time(peer, clock, 11)
            async with asyncio.timeout(10):
                with pytest.raises(PeerTooSlow):
                    await sending


@pytest.mark.usefixtures("fake_links")
class TestBudget:
    """What all connections of a manager may make it keep."""

    @staticmethod
    @contextlib.asynccontextmanager
    async def two(policy: str, max_total_bytes: int) -> AsyncIterator[tuple[Stalled, Stalled]]:
        """Two connections that are blocked, with one message each waiting."""
        settings = Backpressure(policy=policy, max_bytes=2**20, max_total_bytes=max_total_bytes)  # type: ignore[arg-type]
        async with (
            ConnectionManager(backpressure=settings) as manager,
            manager.attach(FakeLink(), "a") as a,
            manager.attach(FakeLink(), "b") as b,
        ):
            peers = Stalled(manager, a), Stalled(manager, b)
            for peer in peers:
                peer.ws.in_buffer = 100
            manager.broadcast_nowait(text(0))
            await until(lambda: all(peer.ws.waiting for peer in peers))
            manager.broadcast_nowait(text(1))
            yield peers

    @pytest.mark.parametrize("policy", DROPPING)
    async def test_the_worst_lose_what_waits_and_the_others_nothing(self, policy: str) -> None:
        async with self.two(policy, 2**16) as (worst, other):
            dropped = Seen(worst.manager, MessagesDropped)
            sent = 0
            while not dropped:
                worst.manager.broadcast_nowait(text(2 + sent), to=[worst.conn])
                sent += 1
                assert worst.manager.stats()["queued_bytes"] <= 2**16 + 500
                assert sent < 2**16 // 100
            assert [(event.conn, event.cause, event.messages) for event in dropped] == [
                (worst.conn, "budget", sent + 1)
            ]
            assert (worst.waits, other.waits) == ((0, 100), (1, 200))
            assert worst.stats == {"dropped_by_budget": sent + 1}
            assert worst.ws.open and other.ws.open
            await worst.drain()
            await other.drain()
            assert numbers(other.ws.got) == [0, 1]
            assert numbers(worst.ws.got) == [0]
            assert worst.manager.stats()["queued_bytes"] < 2**12

    @pytest.mark.parametrize("policy", ["keep", "disconnect"])
    async def test_where_nothing_is_dropped_the_worst_are_disconnected(self, policy: str) -> None:
        async with self.two(policy, 2**16) as (worst, other):
            events = Seen(worst.manager)
            sent = 0
            while not events:
                worst.manager.broadcast_nowait(text(2 + sent), to=[worst.conn])
                sent += 1
                assert sent < 2**16 // 100
            assert worst.ws.aborted
            assert other.ws.open
            assert other.waits == (1, 200)
            assert len(worst.manager.registry) == 1
            assert {type(event) for event in events} == {ConnectionTooSlow, MessagesDropped, ConnectionClosed}
            assert all(event.conn is worst.conn for event in events)  # type: ignore[attr-defined]
            assert isinstance(events[-1], ConnectionClosed)
            assert (events[-1].code, events[-1].by) == (1013, "us")
            slow = next(event for event in events if isinstance(event, ConnectionTooSlow))
            assert (slow.cause, slow.messages, slow.nbytes) == ("budget", sent + 1, 100 * (sent + 2))
            assert worst.stats == {"too_slow_by_budget": 1, "dropped_by_budget": sent + 1}
            assert worst.manager.stats()["queued_bytes"] < 2**13

    async def test_a_burst_to_those_who_keep_up_is_flushed_and_costs_nobody(self) -> None:
        settings = Backpressure(policy="drop_oldest", max_total_bytes=2**16)
        async with ConnectionManager(backpressure=settings) as manager, manager.attach(FakeLink(), "a") as conn:
            for _ in range(1000):
                manager.broadcast_nowait("x" * 1000)
                assert manager.stats()["queued_bytes"] <= 2**16 + 2000
            await conn.send("end")
            assert len(conn.conn.got) == 1001

    async def test_frames_that_many_wait_for_count_once(self) -> None:
        settings = Backpressure(policy="drop_oldest", max_total_bytes=2**20)
        async with ConnectionManager(backpressure=settings) as manager, contextlib.AsyncExitStack() as stack:
            conns = [await stack.enter_async_context(manager.attach(FakeLink(), str(each))) for each in range(50)]
            for conn in conns:
                conn.conn.in_buffer = 1
            manager.broadcast_nowait("x")
            await until(lambda: manager.stats()["waiting"] == 50)
            for _ in range(50):
                manager.broadcast_nowait("x" * 10_000)
            stats = manager.stats()
            assert 500_000 < stats["queued_bytes"] < 600_000
            assert stats["dropped_by_budget"] == 0

    async def test_a_subscriber_may_end_the_connection_it_is_told_of(self) -> None:
        async with self.two("keep", 2**16) as (worst, _):
            attachment = worst.manager._attachments[id(worst.ws)]
            seen = Seen(worst.manager)
            worst.manager.on(MessagesDropped, lambda _: attachment.lost())
            while not seen:
                worst.manager.broadcast_nowait(text(2), to=[worst.conn])
            assert {type(event) for event in seen} == {ConnectionTooSlow, MessagesDropped, ConnectionClosed}
            assert all(event.conn is worst.conn for event in seen)  # type: ignore[attr-defined]
            assert worst.manager.stats()["event_errors"] == 0


# ---- real sockets --------------------------------------------------------------------------------------------------


async def park_with_small_buffers(ws: ServerConnection) -> None:
    """The kernel keeps as little as it can."""
    ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await ws.wait_closed()


LAST = b"last"


async def everything(peer: RawPeer) -> list[bytes]:
    """What comes until the last message or the end, as payloads."""
    come = await peer.messages(lambda come: come and (come[-1][1] == LAST or come[-1][0] == 8))
    return [payload for _, payload in come]


class TestRealSockets:
    SIZE = 4096
    COUNT = 400

    @pytest.fixture(params=POLICIES)
    def policy(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.mark.parametrize("managed", [True, False], ids=["managed", "the library's own"])
    async def test_a_peer_that_stalls_and_reads_again(self, policy: str, managed: bool) -> None:
        settings = Backpressure(policy=policy, max_bytes=2**16)  # type: ignore[arg-type]
        manager = ConnectionManager(backpressure=settings)

        async def attaching(ws: ServerConnection) -> None:
            async with manager.attach(ws, "slow"):
                await park_with_small_buffers(ws)

        options: dict[str, Any] = {"compression": None, "close_timeout": 0.5}
        if managed:
            options |= {"manager": manager, "attach": False}
        async with manager, serving(attaching, **options) as url:
            closed = Seen(manager, ConnectionClosed)
            peer = await RawPeer.connect(url, receive_buffer=4096)
            await until(lambda: len(manager.registry) == 1)
            conn: Any = manager.registry["slow"]
            most = 0
            for number in range(self.COUNT):
                manager.broadcast_nowait(number.to_bytes(4, "big") + bytes(self.SIZE - 4), key=f"key {number % 8}")
                await asyncio.sleep(0)
                most = max(most, link_of(manager, conn).bytes)
            reading = asyncio.create_task(everything(peer))
            if policy != "disconnect":
                if policy == "drop_newest":
                    await until(lambda: manager.stats()["waiting"] == 0)
                await conn.send(LAST)
            payloads = await reading
            sent = [int.from_bytes(payload[:4], "big") for payload in payloads[:-1]]
            assert all(len(payload) == self.SIZE for payload in payloads[:-1])
            stats = manager.stats()
            if policy == "keep":
                assert sent == list(range(self.COUNT))
                assert most > 2**17
                return
            assert 2**15 < most <= 2**16 + self.SIZE + 4
            assert len(sent) < self.COUNT
            if policy == "disconnect":
                assert sent == list(range(len(sent)))
                assert payloads[-1].startswith((1013).to_bytes(2, "big") + Backpressure().reason.encode())
                assert stats["too_slow_by_bytes"] == 1
                await until(lambda: closed)
                assert (closed[0].code, closed[0].by) == (1013, "us")  # type: ignore[attr-defined]
                return
            assert payloads[-1] == LAST
            if policy == "conflate":
                for key in range(8):
                    mine = [number for number in sent if number % 8 == key]
                    assert mine == sorted(set(mine))
                    assert mine[-1] == self.COUNT - 8 + key
                assert len(sent) + stats["conflated"] + stats["dropped_by_bytes"] == self.COUNT
                return
            assert sent == sorted(set(sent))
            assert len(sent) + stats["dropped_by_bytes"] == self.COUNT
            if policy == "drop_oldest":
                assert sent[-1] == self.COUNT - 1
            else:
                assert sent[:8] == list(range(8))

    async def test_the_others_get_everything(self, policy: str) -> None:
        settings = Backpressure(policy=policy, max_bytes=2**16)  # type: ignore[arg-type]
        async with (
            ConnectionManager(backpressure=settings) as manager,
            serving(park_with_small_buffers, manager, compression=None, close_timeout=0.5) as url,
        ):
            stalling = [await RawPeer.connect(url, receive_buffer=4096) for _ in range(2)]
            others = [await RawPeer.connect(url) for _ in range(3)]
            await until(lambda: len(manager.registry) == 5)
            reading = [asyncio.create_task(everything(peer)) for peer in others]
            for number in range(300):
                result = await manager.broadcast(number.to_bytes(4, "big") + bytes(2000))
                assert result.targets == result.sent + result.queued + result.dropped
                await until(lambda: not any(link.messages for link in self.links(manager, others)))
            await manager.broadcast(LAST)
            for payloads in await asyncio.gather(*reading):
                assert [int.from_bytes(payload[:4], "big") for payload in payloads[:-1]] == list(range(300))
            for peer in stalling:
                peer.reset()
            await until(lambda: len(manager.registry) <= 3)

    @staticmethod
    def links(manager: ConnectionManager, peers: list[RawPeer]) -> list[Any]:
        names = {peer.sock.getsockname() for peer in peers}
        return [link for link in manager._delivery._fanout.links() if link.ws.remote_address in names]

    async def test_the_applications_own_sends_are_part_of_what_waits(self) -> None:
        settings = Backpressure(policy="drop_newest", max_bytes=2**16)
        async with (
            ConnectionManager(backpressure=settings) as manager,
            serving(park_with_small_buffers, manager, compression=None, close_timeout=0.5) as url,
        ):
            peer = await RawPeer.connect(url, receive_buffer=4096)
            await until(lambda: len(manager.registry) == 1)
            (conn,) = manager.registry.values()
            own = asyncio.create_task(conn.conn.send(bytes(2**20)))
            await until(lambda: manager.stats()["waiting"] == 1)
            assert link_of(manager, conn).bytes > 2**19
            assert manager.broadcast_nowait("x").dropped == 1
            reading = asyncio.create_task(everything(peer))
            await own
            await until(lambda: manager.stats()["waiting"] == 0)
            manager.broadcast_nowait(LAST)
            assert await reading == [bytes(2**20), LAST]
