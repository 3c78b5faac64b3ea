"""Random interleavings of everything that sends, over real connections, against a model of what each peer must see.

The model of a connection is two lists: what wsfast was told to send to it, and what the library was. What a strict peer
sees must be an interleaving of the two, each in its order: all of it where nothing is dropped; where messages are, what
is left out must be in the counters, and what is replaced is replaced by a newer message with its key, in its place.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import DEADLINE_S, RawPeer, StrictParser, masked, serving, until
from wsfast import Backpressure, ConnectionManager, PeerClosed, PeerFailed, PeerTooSlow

COUNT = 3
GROUPS = {0: ["all", "g"], 1: ["all", "g", "h"], 2: ["all", "h"]}
SIZES = [0, 10, 125, 126, 3000, 30_000, 70_000]
KEYS = [None, "a", "b"]

LOOPS = {"asyncio": asyncio.new_event_loop}
if importlib.util.find_spec("uvloop") is not None:
    LOOPS["uvloop"] = importlib.import_module("uvloop").new_event_loop

peers = st.integers(0, COUNT - 1)
sizes = st.sampled_from(SIZES)
keys = st.sampled_from(KEYS)

operations = st.one_of(
    st.tuples(st.just("manager.send"), peers, sizes, keys),
    st.tuples(st.just("conn.send"), peers, sizes, keys),
    st.tuples(
        st.sampled_from(["broadcast", "broadcast_nowait"]),
        st.sampled_from([None, "g", "h"]),
        st.none() | peers,
        sizes,
        keys,
        st.sampled_from([None, None, 0, 1, 60_000]),
    ),
    st.tuples(st.just("own send"), peers, sizes),
    st.tuples(st.just("own fragments"), peers, st.integers(1, 4)),
    st.tuples(st.just("stop reading"), peers),
    st.tuples(st.just("read"), peers),
    st.tuples(st.just("turns"), st.integers(1, 20)),
    st.tuples(st.just("turns"), st.integers(1, 3)),
)
programs = st.lists(operations, min_size=1, max_size=40)


@dataclass
class Side:
    """One connection, both ends of it, and what it must see."""

    peer: RawPeer
    conn: Any
    ws: Any
    ours: list[tuple[bytes, str | None]] = field(default_factory=list)
    own: list[bytes] = field(default_factory=list)
    come: list[tuple[int, bytes]] = field(default_factory=list)
    is_reading: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        """Read as long as it is allowed to; end with the connection."""
        parser, loop = StrictParser(), asyncio.get_running_loop()
        while True:
            await self.is_reading.wait()
            data = await loop.sock_recv(self.peer.sock, 2**16)
            if not data:
                return
            self.come += parser.feed(data)
            if parser.closed:
                await loop.sock_sendall(self.peer.sock, masked(8, self.come[-1][1][:2]))
                return


class World:
    """A server, its manager, and three peers that are told what to do."""

    def __init__(self, manager: ConnectionManager, policy: str) -> None:
        self.manager = manager
        self.policy = policy
        self.sides: list[Side] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.number = 0

    def message(self, size: int) -> bytes:
        self.number += 1
        return self.number.to_bytes(4, "big") + bytes(size)

    def start(self, coroutine: Any) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    async def run(self, operation: Any) -> None:
        kind, *arguments = operation
        method = {
            "manager.send": self.send,
            "conn.send": self.send_by_verb,
            "broadcast": self.broadcast,
            "broadcast_nowait": self.broadcast_nowait,
            "own send": self.own_send,
            "own fragments": self.own_fragments,
            "stop reading": lambda side: self.sides[side].is_reading.clear(),
            "read": lambda side: self.sides[side].is_reading.set(),
        }
        if kind == "turns":
            for _ in range(arguments[0]):
                await asyncio.sleep(0)
        else:
            method[kind](*arguments)

    def to(self, message: bytes, key: str | None, sides: list[Side]) -> None:
        for side in sides:
            side.ours.append((message, key))

    # A coroutine that is not awaited begins with the loop's next turn: what it sends is noted when it does.

    def send(self, number: int, size: int, key: str | None) -> None:
        async def send() -> None:
            side, message = self.sides[number], self.message(size)
            self.to(message, key, [side])
            await self.manager.send(side.conn, message, key=key)

        self.start(send())

    def send_by_verb(self, number: int, size: int, key: str | None) -> None:
        async def send() -> None:
            side, message = self.sides[number], self.message(size)
            self.to(message, key, [side])
            await side.conn.send(message, key=key)

        self.start(send())

    def targets(self, group: str | None, excluded: int | None) -> list[Side]:
        return [
            side
            for number, side in enumerate(self.sides)
            if number != excluded and (group is None or group in GROUPS[number])
        ]

    def broadcast(
        self, group: str | None, excluded: int | None, size: int, key: str | None, _coalesce: float | None
    ) -> None:
        async def broadcast() -> None:
            message, targets = self.message(size), self.targets(group, excluded)
            self.to(message, key, targets)
            exclude = None if excluded is None else self.sides[excluded].conn
            result = await self.manager.broadcast(message, group=group, exclude=exclude, key=key)
            self.check_result(result, len(targets))

        self.start(broadcast())

    def broadcast_nowait(
        self, group: str | None, excluded: int | None, size: int, key: str | None, coalesce: float | None
    ) -> None:
        message, targets = self.message(size), self.targets(group, excluded)
        self.to(message, key, targets)
        exclude = None if excluded is None else self.sides[excluded].conn
        result = self.manager.broadcast_nowait(message, group=group, exclude=exclude, key=key, coalesce=coalesce)
        self.check_result(result, len(targets))

    def check_result(self, result: Any, targets: int) -> None:
        assert result.sent + result.queued + result.dropped + result.failed == result.targets
        if self.policy != "disconnect":
            assert result.targets == targets
            assert result.failed == 0

    def own_send(self, number: int, size: int) -> None:
        async def send() -> None:
            side = self.sides[number]
            # The library lines its own senders up behind a fragmented message; its order is its own business.
            message = b"own " + self.message(size)
            side.own.append(message)
            await side.ws.send(message)

        self.start(send())

    def own_fragments(self, number: int, count: int) -> None:
        async def send() -> None:
            side = self.sides[number]
            parts = [b"own " + self.message(5000), *(bytes(each * 900) for each in range(count))]
            side.own.append(b"".join(parts))

            async def fragments() -> AsyncIterator[bytes]:
                for part in parts:
                    yield part
                    await asyncio.sleep(0)

            await side.ws.send(fragments())

        self.start(send())

    # ---- the end

    async def settle(self) -> None:
        """Let everybody read, and wait until nothing is under way."""
        for side in self.sides:
            side.is_reading.set()
        async with asyncio.timeout(DEADLINE_S):
            outcomes = await asyncio.gather(*self.tasks, return_exceptions=True)
        allowed = {
            "keep": (),
            "disconnect": (PeerTooSlow, PeerClosed, PeerFailed),
        }.get(self.policy, (PeerTooSlow,))
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, allowed):
                # The library's own send may find its connection closed as well.
                assert self.policy == "disconnect" and type(outcome).__name__.startswith("ConnectionClosed"), outcome

    def check(self) -> None:
        stats = self.manager.stats()
        missing = sum(self.check_side(side) for side in self.sides)
        if self.policy == "keep":
            assert missing == 0
        elif self.policy != "disconnect":
            assert missing == stats["conflated"] + stats["dropped_by_bytes"]
        event(f"{self.policy}: {'some' if missing else 'none'} missing")

    def check_side(self, side: Side) -> int:
        """Check what has come against what was sent; how many messages of ours are missing."""
        data = [payload for opcode, payload in side.come if opcode < 8]
        assert all(opcode in (2, 8) for opcode, _ in side.come)
        mine = [payload for payload in data if not payload.startswith(b"own ")]
        own = [payload for payload in data if payload.startswith(b"own ")]
        was_closed = any(opcode == 8 for opcode, _ in side.come)
        if was_closed:
            assert self.policy == "disconnect" or side.come[-1] == (8, b"\x03\xe9the server is going away")
        if self.policy == "disconnect":
            assert mine == [message for message, _ in side.ours][: len(mine)]
            assert set(own) <= set(side.own)
            return 0
        assert sorted(own) == sorted(side.own)
        self.check_subsequence(side, mine)
        return len(side.ours) - len(mine)

    def check_subsequence(self, side: Side, mine: list[bytes]) -> None:
        if self.policy == "keep":
            assert mine == [message for message, _ in side.ours]
            return
        places = {message: place for place, (message, _) in enumerate(side.ours)}
        seen = [places[message] for message in mine]
        assert len(set(seen)) == len(seen), "a message came twice"
        if self.policy != "conflate":
            assert seen == sorted(seen)
            return
        # What has no key is in order, and so is what has the same one. A message may come before older ones only in the
        # place of an older one with its key, which then did not come.
        for key in KEYS:
            with_key = [place for place in seen if side.ours[place][1] == key]
            assert with_key == sorted(with_key)
        for at, place in enumerate(seen):
            overtaken = [other for other in seen[at + 1 :] if other < place]
            if overtaken:
                key = side.ours[place][1]
                older = [each for each in range(min(overtaken)) if side.ours[each][1] == key]
                assert key is not None and set(older) - set(seen), (at, seen)


async def run_program(policy: str, program: list[Any]) -> None:
    backpressure = Backpressure(policy=policy, max_bytes=100_000)  # type: ignore[arg-type]

    async def handler(ws: ServerConnection) -> None:
        assert ws.request is not None
        ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        number = int(ws.request.path[1:])
        async with manager.attach(ws, str(number), groups=GROUPS[number]):
            await ws.wait_closed()

    manager = ConnectionManager(backpressure=backpressure, threads=2)
    options: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": 0.1}
    async with serving(handler, manager, attach=False, **options) as url:
        await manager.start()
        world = World(manager, policy)
        readers = []
        for number in range(COUNT):
            peer = await RawPeer.connect(url, f"/{number}", receive_buffer=4096)
            await until(lambda number=number: str(number) in manager.registry)  # type: ignore[misc]
            conn = manager.registry[str(number)]
            side = Side(peer, conn, conn.conn)
            side.is_reading.set()
            world.sides.append(side)
            readers.append(asyncio.create_task(side.read()))
        try:
            for operation in program:
                await world.run(operation)
                manager._delivery._fanout._check()
            await world.settle()
            report = await manager.close(timeout_s=DEADLINE_S)
            assert report.undelivered == ()
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*readers)
        finally:
            await manager.close(timeout_s=0)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            for side in world.sides:
                side.peer.close()
        world.check()


@pytest.mark.parametrize("policy", ["keep", "drop_newest", "drop_oldest", "conflate", "disconnect"])
@pytest.mark.parametrize("loop", LOOPS)
@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck), max_examples=settings.default.max_examples // 16)
def test_every_peer_sees_what_the_model_says(loop: str, policy: str, data: st.DataObject) -> None:
    program = data.draw(programs)
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run_program(policy, program))
