"""Random interleavings of everything that sends, over real connections, against a model of what each peer must see.

The model of a connection is two lists: what wsfast was told to send to it, and what the library was. What a strict peer
sees must be an interleaving of the two, each in its order: all of it where nothing is dropped; where messages are, what
is left out must be in the counters, and what is replaced is replaced by a newer message with its key, in its place.

Groups are joined and left, and connections end in the middle, from either side, and others take their places. What a
peer sees of a connection that has ended is the beginning of what it would have seen; and where the server's side ended
it in order, and nothing is dropped, all that was sent before that.
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
from websockets.protocol import OPEN

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
    st.tuples(st.sampled_from(["join", "leave"]), peers, st.sampled_from(["g", "h"])),
    st.tuples(st.sampled_from(["disconnect", "return", "peer closes", "peer resets"]), peers),
    st.tuples(st.just("connect"), peers),
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
    groups: set[str] = field(default_factory=set)
    # How it was ended before everybody was, if it was; and how much of ours must have come nevertheless.
    ended: str | None = None
    due: int = 0
    handler_may_return: asyncio.Event = field(default_factory=asyncio.Event)
    reader: asyncio.Task[None] | None = None

    @property
    def is_registered(self) -> bool:
        return self.conn.registry is not None

    def note_due(self) -> None:
        """What has been sent until now leaves before the close frame. The library closes in a message's middle, so
        then it does not."""
        if not self.ws.protocol.expect_continuation_frame and self.ws.protocol.state is OPEN:
            self.due = len(self.ours)

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
                if self.ended != "peer closes":
                    await loop.sock_sendall(self.peer.sock, masked(8, self.come[-1][1][:2]))
                self.peer.sock.shutdown(socket.SHUT_WR)
                return


class World:
    """A server, its manager, and three peers that are told what to do."""

    def __init__(self, manager: ConnectionManager, policy: str) -> None:
        self.manager = manager
        self.policy = policy
        self.url = ""
        # Those who are in the places now, and all there have been, by client id.
        self.sides: list[Side] = []
        self.all: dict[str, Side] = {}
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
            "join": lambda side, group: self.join(self.sides[side], group),
            "leave": lambda side, group: self.leave(self.sides[side], group),
            "disconnect": self.disconnect,
            "return": self.let_handler_return,
            "peer closes": self.peer_closes,
            "peer resets": self.peer_resets,
            "stop reading": lambda side: self.sides[side].is_reading.clear(),
            "read": lambda side: self.sides[side].is_reading.set(),
        }
        if kind == "turns":
            for _ in range(arguments[0]):
                await asyncio.sleep(0)
        elif kind == "connect":
            if self.sides[arguments[0]].ended is not None:
                await self.connect(arguments[0])
        else:
            method[kind](*arguments)

    async def connect(self, number: int) -> None:
        """Another peer takes this place."""
        client_id = f"{number}.{len(self.all)}"
        peer = await RawPeer.connect(self.url, "/" + client_id, receive_buffer=4096)
        await until(lambda: client_id in self.manager.registry)
        conn: Any = self.manager.registry[client_id]
        side = Side(peer, conn, conn.conn, groups=set(GROUPS[number]))
        side.is_reading.set()
        side.reader = asyncio.create_task(side.read())
        self.all[client_id] = side
        self.sides[number : number + 1] = [side]

    def join(self, side: Side, group: str) -> None:
        if side.is_registered:
            side.conn.join(group)
            side.groups.add(group)

    def leave(self, side: Side, group: str) -> None:
        if side.is_registered:
            side.conn.leave(group)
            side.groups.discard(group)

    # ---- ends

    def disconnect(self, number: int) -> None:
        async def disconnect() -> None:
            if side.is_registered:
                side.note_due()
                await self.manager.disconnect(side.conn, 4000)

        side = self.sides[number]
        if side.ended is None:
            side.ended = "disconnect"
            self.start(disconnect())

    def let_handler_return(self, number: int) -> None:
        side = self.sides[number]
        if side.ended is None:
            side.ended = "return"
            side.handler_may_return.set()

    def peer_closes(self, number: int) -> None:
        side = self.sides[number]
        if side.ended is None:
            side.ended = "peer closes"
            self.start(side.peer.send(masked(8, (4001).to_bytes(2, "big"))))

    def peer_resets(self, number: int) -> None:
        async def reset() -> None:
            assert side.reader is not None
            side.reader.cancel()
            await asyncio.gather(side.reader, return_exceptions=True)
            side.peer.reset()

        side = self.sides[number]
        if side.ended is None:
            side.ended = "peer resets"
            self.start(reset())

    def to(self, message: bytes, key: str | None, sides: list[Side]) -> None:
        for side in sides:
            side.ours.append((message, key))

    # A coroutine that is not awaited begins with the loop's next turn: what it sends is noted when it does.

    def send(self, number: int, size: int, key: str | None) -> None:
        async def send() -> None:
            side, message = self.sides[number], self.message(size)
            if side.is_registered:
                self.to(message, key, [side])
            await self.manager.send(side.conn, message, key=key)

        self.start(send())

    def send_by_verb(self, number: int, size: int, key: str | None) -> None:
        async def send() -> None:
            side, message = self.sides[number], self.message(size)
            if side.is_registered:
                self.to(message, key, [side])
            await side.conn.send(message, key=key)

        self.start(send())

    def targets(self, group: str | None, excluded: int | None) -> list[Side]:
        but = None if excluded is None else self.sides[excluded]
        return [
            side
            for side in self.all.values()
            if side is not but and side.is_registered and (group is None or group in side.groups)
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
        assert result.targets == targets
        if self.policy != "disconnect" and not self.anybody_ended:
            assert result.failed == 0

    @property
    def anybody_ended(self) -> bool:
        return any(side.ended for side in self.all.values())

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
        for side in self.all.values():
            side.is_reading.set()
        async with asyncio.timeout(DEADLINE_S):
            outcomes = await asyncio.gather(*self.tasks, return_exceptions=True)
        allowed = {
            "keep": (),
            "disconnect": (PeerTooSlow, PeerClosed, PeerFailed),
        }.get(self.policy, (PeerTooSlow,))
        if self.anybody_ended:
            allowed = (*allowed, PeerClosed, PeerFailed)
        may_end = self.policy == "disconnect" or self.anybody_ended
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, allowed):
                # The library's own send may find its connection closed as well, and so may a peer.
                name = type(outcome).__name__
                assert may_end and name.startswith(("ConnectionClosed", "ConnectionReset", "BrokenPipe")), outcome

    def check(self) -> list[str]:
        """Check what everybody has seen; what of it is worth being counted."""
        stats = self.manager.stats()
        missing = sum(self.check_side(side) for side in self.all.values() if side.ended is None)
        for side in self.all.values():
            if side.ended is not None:
                self.check_ended(side)
        if self.policy == "keep":
            assert missing == 0
        elif self.policy != "disconnect":
            dropped = stats["conflated"] + stats["dropped_by_bytes"]
            assert missing <= dropped if self.anybody_ended else missing == dropped
        return [f"{'some' if missing else 'none'} missing", *(side.ended for side in self.all.values() if side.ended)]

    def check_ended(self, side: Side) -> None:
        """Check what has come on a connection that was ended in the middle."""
        data = [payload for opcode, payload in side.come if opcode < 8]
        assert all(opcode in (2, 8) for opcode, _ in side.come)
        mine = [payload for payload in data if not payload.startswith(b"own ")]
        own = [payload for payload in data if payload.startswith(b"own ")]
        assert len(set(own)) == len(own) and set(own) <= set(side.own)
        if self.policy in ("keep", "disconnect"):
            assert mine == [message for message, _ in side.ours][: len(mine)]
        else:
            self.check_subsequence(side, mine)
        if self.policy == "keep":
            assert len(mine) >= side.due, (side.ended, len(mine), side.due)

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
        assert set(mine) <= {message for message, _ in side.ours}
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


async def run_program(policy: str, program: list[Any]) -> list[str]:
    backpressure = Backpressure(policy=policy, max_bytes=100_000)  # type: ignore[arg-type]

    async def handler(ws: ServerConnection) -> None:
        assert ws.request is not None
        ws.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client_id = ws.request.path[1:]
        async with manager.attach(ws, client_id, groups=GROUPS[int(client_id[0])]):
            closed = asyncio.ensure_future(ws.wait_closed())
            await until(lambda: client_id in world.all)
            side = world.all[client_id]
            returning = asyncio.ensure_future(side.handler_may_return.wait())
            await asyncio.wait((closed, returning), return_when=asyncio.FIRST_COMPLETED)
            if side.ended == "return":
                side.note_due()  # and nothing comes between this and the end of the block
        closed.cancel()
        returning.cancel()

    manager = ConnectionManager(backpressure=backpressure, threads=2)
    world = World(manager, policy)
    options: dict[str, Any] = {"compression": None, "ping_interval": None, "close_timeout": DEADLINE_S}
    async with serving(handler, manager, attach=False, **options) as url:
        await manager.start()
        world.url = url
        for number in range(COUNT):
            await world.connect(number)
        try:
            for operation in program:
                await world.run(operation)
                manager._delivery._fanout._check()
            await world.settle()
            report = await manager.close(timeout_s=DEADLINE_S)
            assert report.undelivered == ()
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(*(side.reader for side in world.all.values() if side.ended != "peer resets"))
        finally:
            await manager.close(timeout_s=0)
            for side in world.all.values():
                assert side.reader is not None
                side.reader.cancel()
                await asyncio.gather(side.reader, return_exceptions=True)
                side.peer.close()
        return world.check()


@pytest.mark.parametrize("policy", ["keep", "drop_newest", "drop_oldest", "conflate", "disconnect"])
@pytest.mark.parametrize("loop", LOOPS)
@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck), max_examples=settings.default.max_examples // 16)
def test_every_peer_sees_what_the_model_says(loop: str, policy: str, data: st.DataObject) -> None:
    program = data.draw(programs)
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        for seen in runner.run(run_program(policy, program)):
            event(f"{policy}: {seen}")


@pytest.mark.parametrize("policy", ["keep", "conflate", "disconnect"])
@pytest.mark.parametrize("end", ["disconnect", "return", "peer closes", "peer resets"])
@pytest.mark.parametrize("is_slow", [True, False], ids=["slow", "keeping up"])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_way_to_end_with_messages_on_their_way(loop: str, is_slow: bool, end: str, policy: str) -> None:
    """What the random programs do rarely: an end that finds messages in the outbox, and more that come after it."""
    push = ("broadcast_nowait", None, None, 30_000, None, None)
    window = ("broadcast_nowait", None, None, 10, None, 60_000)
    program: list[Any] = [
        *([("stop reading", 0)] if is_slow else []),
        *[push, push, ("turns", 3), push, ("own send", 0, 10), window, ("broadcast", "g", None, 10, "a", None)],
        *[(end, 0), push, ("turns", 1), push, ("conn.send", 0, 10, None), ("leave", 1, "g"), ("turns", 3)],
        *[("read", 0), push, ("turns", 20), ("connect", 0), push, ("join", 0, "h"), ("leave", 0, "g")],
        *[("broadcast", "h", 1, 10, None, None), ("broadcast", "g", None, 10, None, None), ("turns", 3)],
    ]
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run_program(policy, program))
