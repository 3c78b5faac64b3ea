"""A server and clients that speak docs/resume.md, as one would write them by that page, and a network between them.

The network is a byte stream each way: any number of bytes may arrive at a time, both ways can be cut after any byte,
and what was written to a connection that its client has given up may arrive whenever it likes.

Who is to be given what, and which token is good, is known here without wsfast.session (``Life``). The server compares
at each hello; ``World.check`` compares the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple, Protocol, TypeAlias

from wsfast.errors import BadHandshake
from wsfast.session import (
    BAD_HANDSHAKE,
    READY,
    ClientSession,
    Hello,
    Session,
    SessionPolicy,
    Sessions,
    Welcome,
    is_ready,
    read_hello,
    read_welcome,
)

TAKEN_OVER = 4409


# ---- the network -----------------------------------------------------------------------------------------------------


class Close(NamedTuple):
    """A close frame."""

    code: int


Frame: TypeAlias = str | bytes | Close
_KINDS: tuple[type, ...] = (str, bytes, Close)


def packed(frame: Frame) -> bytes:
    """Kind, length, payload."""
    match frame:
        case Close(code):
            payload = code.to_bytes(2)
        case str():
            payload = frame.encode()
        case _:
            payload = frame
    return bytes([_KINDS.index(type(frame))]) + len(payload).to_bytes(2) + payload


def _unpacked(kind: int, payload: bytes) -> Frame:
    if _KINDS[kind] is Close:
        return Close(int.from_bytes(payload))
    return payload.decode() if _KINDS[kind] is str else payload


class Pipe:
    """One way of a connection: frames are written, bytes arrive, and what has arrived as a whole is a frame.

    Attributes:
        ends: after how many bytes each frame ends.
    """

    def __init__(self) -> None:
        self.ends: list[int] = []
        self._under_way = bytearray()
        self._arrived = bytearray()
        self._is_cut = False

    def __len__(self) -> int:
        """How many bytes may still arrive."""
        return len(self._under_way)

    def write(self, frame: Frame) -> None:
        if not self._is_cut:
            self._under_way += packed(frame)
            self.ends.append(len(packed(frame)) + (self.ends[-1] if self.ends else 0))

    def cut(self, nbytes: int = 0) -> None:
        """Only so many bytes of what is under way will arrive, and nothing that is written from now on."""
        self._is_cut = True
        del self._under_way[nbytes:]

    def arrive(self, nbytes: int) -> list[Frame]:
        self._arrived += self._under_way[:nbytes]
        del self._under_way[:nbytes]
        frames = []
        while len(self._arrived) >= 3 and len(self._arrived) >= (end := 3 + int.from_bytes(self._arrived[1:3])):
            frames.append(_unpacked(self._arrived[0], bytes(self._arrived[3:end])))
            del self._arrived[:end]
        return frames


class Peer(Protocol):
    """Whoever opens connections."""

    wire: Wire | None

    def takes(self, wire: Wire, frame: Frame) -> None:
        """A frame has arrived."""


class Wire:
    """One connection.

    Attributes:
        is_honest: whether its hello presents what the client was last told to present.
        is_open: for the server.
    """

    def __init__(self, peer: Peer, server: Server, is_honest: bool) -> None:
        self.peer = peer
        self.server = server
        self.is_honest = is_honest
        self.is_open = True
        self.up = Pipe()
        self.down = Pipe()

    @property
    def is_present(self) -> bool:
        """Whether the peer has not given it up."""
        return self.peer.wire is self

    def arrive_up(self, nbytes: int) -> None:
        for frame in self.up.arrive(nbytes):
            self.server.takes(self, frame)

    def arrive_down(self, nbytes: int) -> None:
        for frame in self.down.arrive(nbytes):
            self.peer.takes(self, frame)

    def settle(self) -> None:
        """Let everything arrive, and whatever is written thereupon."""
        while self.up or self.down:
            self.arrive_up(len(self.up))
            self.arrive_down(len(self.down))

    def cut(self, up: int = 0, down: int = 0) -> None:
        self.up.cut(up)
        self.down.cut(down)


# ---- the truth -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Life:
    """One session as it really is.

    Attributes:
        sent: by the server, in its order.
        kept_from: how many of those the server has let go of.
        given: to the server's application.
        former, latest: tokens; no others are good.
        attempt: the last that was answered with the former.
        wire: the connection; None: its client is away.
        due_s: when it is given up.
        ended: why it is over; empty: it is not.
        is_touched: whether a good token was presented by somebody who should not.
        is_stolen: whether a thief has confirmed one.
    """

    client_id: str
    began_s: float
    latest: str
    former: str = ""
    attempt: int = 0
    sent: list[str] = field(default_factory=list)
    kept_from: int = 0
    given: list[str] = field(default_factory=list)
    wire: Wire | None = None
    due_s: float | None = None
    ended: str = ""
    is_touched: bool = False
    is_stolen: bool = False

    def is_good(self, token: str, attempt: int, now_s: float, policy: SessionPolicy) -> bool:
        is_over = self.ended or (self.due_s is not None and self.due_s <= now_s)
        is_late = token == self.former and 0 < attempt <= self.attempt
        is_right = token in (self.former or self.latest, self.latest)
        return is_right and not (is_late or is_over or now_s - self.began_s > policy.lifetime_s)


# ---- the server ------------------------------------------------------------------------------------------------------


class Server:
    """What docs/resume.md asks of a server.

    Args:
        retention: messages that are kept of each session.
    """

    def __init__(self, world: World, policy: SessionPolicy, retention: int, random: Random) -> None:
        self.world = world
        self.retention = retention
        self.is_dead = False
        self.sessions = Sessions(policy, random.randbytes)
        self.lives: list[Life] = []
        self._sessions: dict[Life, Session] = {}
        self._lives: dict[Wire, Life] = {}
        self._ready: set[Wire] = set()

    # -- frames of clients

    def takes(self, wire: Wire, frame: Frame) -> None:
        if self.is_dead or not wire.is_open:
            return
        if isinstance(frame, Close):
            self.loses(wire, frame.code)
        elif wire not in self._lives:
            self._begin(wire, frame)
        elif wire in self._ready:
            self._sessions[self._lives[wire]].took()
            self._lives[wire].given.append(str(frame))
        elif is_ready(frame):
            self._confirm(wire)
        else:
            self._refuses(wire)

    def _begin(self, wire: Wire, frame: str | bytes) -> None:
        try:
            hello = read_hello(frame)
        except BadHandshake:
            self._refuses(wire)
            return
        found = self._find(hello)
        is_thief = isinstance(wire.peer, Thief) and wire.peer.is_known
        session = None if found is None or is_thief else self._resumed(found, hello, wire)
        is_resumed = session is not None
        if session is None:
            if hello.token is not None and wire.is_present and wire.is_honest:
                self._has_reason_to_refuse(self.world.tokens[hello.token])
            session = self._new()
        life = self._lives[wire] = session.owner
        life.wire, life.due_s = wire, None
        self.world.issue(session.token, life)
        wire.down.write(str(Welcome(life.client_id, session.token, is_resumed, session.received, 180.0)))
        for message in life.sent[hello.received :] if is_resumed else []:
            wire.down.write(message)

    def _find(self, hello: Hello) -> Session | None:
        if hello.token is None:
            return None
        session = self.sessions.find(hello.token, self.world.now_s, hello.attempt)
        life = self.world.tokens.get(hello.token)
        is_good = life in self.lives and life.is_good(
            hello.token, hello.attempt, self.world.now_s, self.sessions.policy
        )
        assert (session is not None) == is_good
        assert session is None or session.owner is life
        return session

    def _resumed(self, session: Session, hello: Hello, wire: Wire) -> Session | None:
        """The former connection is over. None: what the client has not got is not kept any more."""
        life: Life = session.owner
        if life.wire is not None:
            self._close(life.wire, TAKEN_OVER)
        life.is_touched |= not wire.is_honest
        if not life.kept_from <= hello.received <= len(life.sent):
            assert life.is_touched or hello.received < len(life.sent) - self.retention
            self._end(life, "overflow")
            return None
        self.sessions.resume(session)
        life.former, life.latest, life.attempt = str(hello.token), session.token, hello.attempt
        # Nobody will ask for those again: all hellos with one token tell the same count.
        life.kept_from = hello.received
        return session

    def _new(self) -> Session:
        session = self.sessions.begin(self.world.now_s)
        life = session.owner = Life(f"client-{len(self.world.lives)}", self.world.now_s, session.token)
        self.lives.append(life)
        self.world.lives.append(life)
        self._sessions[life] = session
        return session

    def _has_reason_to_refuse(self, life: Life) -> None:
        """That an honest client is refused has a reason of which its user can be told."""
        now_s = self.world.now_s
        is_due = life.due_s is not None and life.due_s <= now_s
        is_old = now_s - life.began_s > self.sessions.policy.lifetime_s
        assert life.ended or is_due or is_old or life.is_touched

    def _confirm(self, wire: Wire) -> None:
        life = self._lives[wire]
        self._ready.add(wire)
        self._sessions[life].confirm()
        life.former, life.attempt = life.latest, 0
        life.is_stolen |= not isinstance(wire.peer, Client)

    # -- ends

    def _refuses(self, wire: Wire) -> None:
        wire.down.write(Close(BAD_HANDSHAKE))
        self.loses(wire)

    def loses(self, wire: Wire, code: int = 1006) -> None:
        """The server finds out that a connection is no more."""
        if self.is_dead or not wire.is_open:
            return
        wire.is_open = False
        life = self._lives.get(wire)
        if life is None:
            return
        life.wire = None
        if code in (1000, 1001):
            self._end(life, "closed by the client")
            return
        life.due_s = self.world.now_s + self.sessions.policy.grace_s
        if given_up := self.sessions.leave(self._sessions[life], self.world.now_s):
            assert given_up.owner.due_s == min(each.due_s for each in self.away())
            self._end(given_up.owner, "evicted")

    def closes(self, life: Life, code: int) -> None:
        """The application closes a connection."""
        assert life.wire is not None
        self._close(life.wire, code)
        self._end(life, "closed by the server")

    def tick(self) -> None:
        due = [session.owner for session in self.sessions.due(self.world.now_s)]
        assert len(due) == len(set(due))
        assert set(due) == {life for life in self.away() if life.due_s <= self.world.now_s}
        for life in due:
            self._end(life, "expired")

    def dies(self) -> None:
        self.is_dead = True
        for life in self.lives:
            life.ended = life.ended or "restart"

    def _close(self, wire: Wire, code: int) -> None:
        wire.down.write(Close(code))
        wire.is_open = False
        if wire in self._lives:
            self._lives[wire].wire = None

    def _end(self, life: Life, why: str) -> None:
        assert not life.ended
        life.ended = why
        self.sessions.end(self._sessions[life])
        self.lives.remove(life)

    # -- messages

    def sends(self, life: Life, message: str) -> None:
        life.sent.append(message)
        life.kept_from = max(life.kept_from, len(life.sent) - self.retention)
        if life.wire is not None:
            life.wire.down.write(message)

    # -- what is so at any time

    def away(self) -> list[Life]:
        return [life for life in self.lives if life.due_s is not None]

    def check(self) -> None:
        away = self.away()
        assert len(self.sessions) == len(self.lives)
        assert self.sessions.away == len(away) <= self.sessions.policy.max_away
        assert self.sessions.next_due_s == min((life.due_s for life in away), default=None)
        for life in self.lives:
            assert (life.wire is None) == (life.due_s is not None)
            assert self._sessions[life].received == len(life.given)


# ---- clients ---------------------------------------------------------------------------------------------------------


class Client:
    """What docs/resume.md asks of a client.

    Attributes:
        queue: was never sent, as there was no connection.
        life: the session as it really is; None before the first welcome.
        given: to the application, in this session.
        owed: what was sent in this session, without what the client was told is lost.
        told: how many of those the server is known to have.
        fresh, lost, resumed: how often the application was told that there is a new session, how many messages were
            lost, and how often a session went on.
        old_tokens: all that it was given in this session.
    """

    def __init__(self, world: World, name: str, max_kept: int) -> None:
        self.world = world
        self.name = name
        self.max_kept = max_kept
        self.session = ClientSession(max_kept)
        self.wire: Wire | None = None
        self.is_welcome = False
        self.queue: list[str] = []
        self.life: Life | None = None
        self.given: list[str] = []
        self.owed: list[str] = []
        self.told = 0
        self.fresh = self.lost = self.resumed = 0
        self.old_tokens: list[str] = []

    def connect(self, hello: Hello | None = None) -> Wire:
        """Open a connection; the former one is over. With a hello that is not its own, a client is not honest."""
        self.wire = self.world.wire(self, is_honest=hello is None)
        self.is_welcome = False
        self.wire.up.write(self.session.hello() if hello is None else str(hello))
        return self.wire

    def sends(self, message: str) -> None:
        self.queue.append(message)
        self._flush()

    def loses(self) -> None:
        """The client finds out that its connection is no more."""
        self.wire = None
        self.is_welcome = False

    def closes(self) -> None:
        """The application has no more use for the session."""
        if self.wire is not None:
            self.wire.up.write(Close(1000))
        self.loses()
        assert self.session.forget() == len(self.owed) - self.told
        self._starts_anew(None)

    def takes(self, wire: Wire, frame: Frame) -> None:
        if wire is not self.wire:
            return
        if isinstance(frame, Close):
            self._is_closed(frame.code)
        elif not self.is_welcome:
            self._is_welcomed(wire, read_welcome(frame))
        else:
            self.session.took()
            self.given.append(str(frame))

    def _is_closed(self, code: int) -> None:
        assert code != BAD_HANDSHAKE
        # Nobody but somebody else can take over: what a client has given up never does.
        assert code != TAKEN_OVER or (self.life is not None and self.life.is_touched)
        self.loses()

    def _is_welcomed(self, wire: Wire, welcome: Welcome) -> None:
        answer = self.session.welcomed(welcome)
        assert welcome.token is not None
        life = self.world.tokens[welcome.token]
        self.is_welcome = True
        wire.up.write(READY)
        if welcome.resumed:
            assert life is self.life
            assert not life.is_stolen
            self._goes_on(welcome.received, answer.lost, answer.resend)
            for message in answer.resend:
                wire.up.write(message)
        else:
            assert (answer.resend, answer.lost, answer.unconfirmed) == ([], 0, len(self.owed) - self.told)
            self.fresh += 1
            self._starts_anew(life)
        self.old_tokens.append(welcome.token)
        self._flush()

    def _goes_on(self, received: int, lost: int, resend: object) -> None:
        assert lost == max(0, len(self.owed) - received - self.max_kept)
        del self.owed[received : received + lost]
        assert resend == self.owed[received:]
        self.told = received
        self.lost += lost
        self.resumed += 1

    def _starts_anew(self, life: Life | None) -> None:
        # The queue was never sent.
        self.life, self.given, self.owed, self.told, self.old_tokens = life, [], [], 0, []

    def _flush(self) -> None:
        while self.is_welcome and self.queue:
            assert self.wire is not None
            message = self.queue.pop(0)
            self.session.sending(message)
            self.owed.append(message)
            self.wire.up.write(message)

    def check(self) -> None:
        """Each side was given what the other sent, once, in order, and from the first on."""
        assert (self.session.received, self.session.sent) == (len(self.given), len(self.owed))
        assert self.session.kept <= self.max_kept
        if self.life is not None:
            assert self.given == self.life.sent[: len(self.given)]
            assert self.life.is_stolen or self.life.given == self.owed[: len(self.life.given)]


class Thief:
    """Somebody who has got hold of a token, and goes as far as he likes with it.

    Args:
        is_known: whether the server knows by other means that this is not whose token it is.
        then: is sent as soon as there is a welcome.
    """

    def __init__(self, world: World, is_known: bool, hello: Hello, then: list[str]) -> None:
        self.is_known = is_known
        self._then = then
        self.wire: Wire | None = world.wire(self, is_honest=False)
        self.wire.up.write(str(hello))

    def takes(self, wire: Wire, frame: Frame) -> None:
        for each in self._then:
            wire.up.write(each)
        self._then = []


# ---- the world -------------------------------------------------------------------------------------------------------


class World:
    """One server at a time, which may restart, and its clients.

    Attributes:
        wires: on which something may still arrive, or that are open for somebody.
        tokens: all that were ever issued, and the session of each.
        lives: all sessions that there ever were.
    """

    def __init__(
        self, policy: SessionPolicy, *, retention: int = 1000, max_kept: tuple[int, ...] = (1000,), seed: int = 0
    ) -> None:
        self._new_server: Callable[[], Server] = lambda: Server(self, policy, retention, self._random)
        self._random = Random(seed)
        self._sent = 0
        self.now_s = 1000.0
        self.wires: list[Wire] = []
        self.tokens: dict[str, Life] = {}
        self.lives: list[Life] = []
        self.server = self._new_server()
        self.clients = [Client(self, f"c{number}", kept) for number, kept in enumerate(max_kept)]

    def message(self, sender: str) -> str:
        """One that there was not yet."""
        self._sent += 1
        return f"{sender}:{self._sent}"

    def wire(self, peer: Peer, is_honest: bool) -> Wire:
        self.wires = [wire for wire in self.wires if wire.up or wire.down or wire.is_present or wire.is_open]
        wire = Wire(peer, self.server, is_honest)
        self.wires.append(wire)
        return wire

    def issue(self, token: str, life: Life) -> None:
        assert token not in self.tokens
        self.tokens[token] = life

    def restart(self) -> None:
        """The server is killed, and another one takes its place."""
        self.server.dies()
        for wire in self.wires:
            wire.cut(down=len(wire.down))
        self.server = self._new_server()

    def settle(self) -> None:
        """Nothing breaks any more: all clients come back, and what was left under way arrives after that."""
        for wire in self.wires:
            if not wire.is_honest:
                wire.settle()
        late = list(self.wires)
        wires = [client.connect() for client in self.clients]
        for wire in wires:
            wire.settle()
        for wire in late:
            wire.settle()
            self.server.loses(wire)
        for client, wire in zip(self.clients, wires, strict=True):
            wire.settle()
            assert client.wire is wire
            assert client.is_welcome
            assert not client.queue
            assert client.life is not None
            assert client.given == client.life.sent
            assert client.life.given == client.owed

    def check(self) -> None:
        self.server.check()
        for client in self.clients:
            client.check()
