"""Sessions: by what a client that comes back is known, and what each side still owes the other.

This file hides the tokens, the frames of the handshake, and who counts what. The protocol is docs/resume.md; it is
spoken by servers (``Sessions``, ``read_hello``, ``welcome``) and by clients (``ClientSession``). How messages are kept
until a client is back is csrc/backlog.h's.

What it promises:

- **Counting.** Each side counts the messages that it has been given since the session began, over all its connections.
  A client that comes back tells its count and is told the server's; each sends what the other has not got. So messages
  need no number, and go over the wire as they are.
- **Tokens** are 128 random bits behind the id of the session, and are compared in constant time. Each resume gives a
  new one; the former is spent when the client has confirmed that it has the new one. (If it were spent at once, a
  client whose connection breaks before the answer is there could never come back.) A token is worth nothing once its
  session has ended: ``grace_s`` after the connection was lost, or ``lifetime_s`` after the session began.
- **Late hellos** change nothing. What a client wrote to a connection that it has given up may arrive when it is back on
  another one. So it numbers its hellos with a token, and one that was overtaken is not answered with the session.
- **No guessing.** A session that cannot be resumed as a whole is not resumed: the client is told ``resumed: false``.

Nothing here waits, reads a clock or opens a connection: ``now_s`` is the time by any clock that does not go back, and
random bytes come from a function that is passed in. No object here may be used by two threads at once.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from wsfast.errors import BadHandshake, InvalidSetting

__all__ = [
    "BAD_HANDSHAKE",
    "MOST_CHARACTERS",
    "PROTOCOL",
    "READY",
    "SESSIONS",
    "SUPERSEDED",
    "TOO_LATE",
    "ClientSession",
    "Hello",
    "Resumed",
    "Session",
    "SessionPolicy",
    "Sessions",
    "Welcome",
    "inner_offers",
    "is_ready",
    "offers",
    "read_hello",
    "read_welcome",
    "split_subprotocol",
    "with_protocol",
]

PROTOCOL = "wsfast.1"
"""The WebSocket subprotocol by which both sides agree to count. With a subprotocol of the application's own it is
``wsfast.1+NAME``."""

READY = '{"wsfast": "ready"}'
"""The client's last frame of the handshake: it has the token."""

BAD_HANDSHAKE = 4400
"""How a server closes a connection whose handshake is none."""

TOO_LATE = 4408
"""How either side closes a connection on which the other one's part of the handshake does not come in time."""

SUPERSEDED = 4409
"""How a server closes a connection whose client, or whose client id, has a newer one."""

Data: TypeAlias = str | bytes

_SEPARATOR = "+"
_ID_BYTES = 16
_SECRET_BYTES = 16  # 128 bits: nobody guesses one

# 32 bytes in base64url, which leave the last two bits unused: they must be 0, so that each token has one spelling.
_TOKEN = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")

# Nothing in a handshake is longer, whatever a client id is made of: 256 bytes of it take at most 1,536 in JSON.
MOST_CHARACTERS = 4096

# JavaScript has no exact integers beyond this.
_MOST_COUNTED = 2**53 - 1

_LEAST_S, _MOST_S = 1e-3, 1e9


# ---- the subprotocol -------------------------------------------------------------------------------------------------


def offers(subprotocols: Iterable[str] = ()) -> list[str]:
    """What a client offers that wants one of these subprotocols and speaks this protocol: in the order of preference,
    also what a server knows that does not speak it."""
    names = list(subprotocols)
    return [*(with_protocol(name) for name in names), *names] if names else [PROTOCOL]


def with_protocol(subprotocol: str | None) -> str:
    """The name of this protocol together with a subprotocol of the application's, or with none."""
    return PROTOCOL if subprotocol is None else PROTOCOL + _SEPARATOR + subprotocol


def split_subprotocol(subprotocol: str | None) -> tuple[bool, str | None]:
    """Whether a subprotocol that was agreed on means this protocol, and which one of the application's it means."""
    if subprotocol is None or subprotocol == PROTOCOL:
        return subprotocol is not None, None
    name = subprotocol.removeprefix(PROTOCOL + _SEPARATOR)
    return name != subprotocol, name


def inner_offers(offered: Sequence[str]) -> list[str] | None:
    """The subprotocols of the application's that a client offers together with this one; None: it does not speak it."""
    spoken = [name for speaks, name in map(split_subprotocol, offered) if speaks]
    return [name for name in spoken if name is not None] if spoken else None


# ---- frames ----------------------------------------------------------------------------------------------------------


class Hello(NamedTuple):
    """A client's first frame."""

    token: str | None = None
    """Of the session that it wants to go on with; None: a new one."""
    received: int = 0
    """How many messages it has been given in that session."""
    attempt: int = 0
    """Which of its hellos with this token this is, from 1; 0: it does not tell."""

    def __str__(self) -> str:
        return _encode("hello") if self.token is None else _encode("hello", **self._asdict())


class Welcome(NamedTuple):
    """A server's first frame."""

    client_id: str
    token: str | None
    """For the next time; None: this connection has no session, and nothing is counted."""
    resumed: bool = False
    """Whether the client is who it was, and what it missed follows. If not, all counts begin anew."""
    received: int = 0
    """How many messages the server's application has been given in this session."""
    grace_s: float = 0.0
    """How long a lost client is waited for."""
    spread_s: float | None = None
    """See ``Reconnector.told``."""

    def __str__(self) -> str:
        return _encode("welcome", **self._asdict())


def _encode(kind: str, **fields: Any) -> str:
    return json.dumps({"wsfast": kind, **fields})


def _decode(message: Data, kind: str) -> dict[str, Any]:
    """The fields of a frame of the handshake."""
    if not isinstance(message, str):
        raise BadHandshake(f"a text message with {kind!r} must come first, not a binary one")
    if len(message) > MOST_CHARACTERS:
        raise BadHandshake(f"{kind!r} is longer than {MOST_CHARACTERS} characters")
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        raise BadHandshake(f"{kind!r} must come first, as JSON") from None
    if not isinstance(fields, dict) or fields.get("wsfast") != kind:
        raise BadHandshake(f'{{"wsfast": "{kind}"}} must come first')
    return fields


def _count(fields: dict[str, Any], name: str) -> int:
    count = fields.get(name, 0)
    if type(count) is not int or not 0 <= count <= _MOST_COUNTED:
        raise BadHandshake(f"{name} must be a whole number from 0 to 2**53 - 1")
    return count


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= _MOST_S:
        raise BadHandshake(f"{name} must be a number of seconds, or null")
    return float(value)


def _token(fields: dict[str, Any]) -> str | None:
    token = fields.get("token")
    if token is not None and not isinstance(token, str):
        raise BadHandshake("token must be a string, or null")
    return token


def read_hello(message: Data) -> Hello:
    """What a client's first message says. Raises BadHandshake, with a text that is fit for the client to read."""
    fields = _decode(message, "hello")
    return Hello(_token(fields), _count(fields, "received"), _count(fields, "attempt"))


def read_welcome(message: Data) -> Welcome:
    """What a server's first message says. Raises BadHandshake."""
    fields = _decode(message, "welcome")
    client_id, resumed = fields.get("client_id"), fields.get("resumed")
    if not isinstance(client_id, str) or not isinstance(resumed, bool):
        raise BadHandshake("client_id must be a string, and resumed true or false")
    token = _token(fields)
    if resumed and token is None:
        raise BadHandshake("a session that is resumed must have a token")
    return Welcome(
        client_id,
        token,
        resumed,
        _count(fields, "received"),
        _seconds(fields, "grace_s") or 0.0,
        _seconds(fields, "spread_s"),
    )


def is_ready(message: Data) -> bool:
    """Whether this is the client's last frame of the handshake."""
    try:
        _decode(message, "ready")
    except BadHandshake:
        return False
    return True


# ---- the server's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    """How long, and with how much, clients that were lost are waited for.

    Attributes:
        grace_s: after a connection was lost, its record, its groups and its metadata stay for so long. After a restart
            of a proxy all clients come back together: let it be more than twice the time over which they spread
            (``HerdPolicy``).
        lifetime_s: a session that began longer ago is not resumed.
        max_away: clients that may be waited for. Beyond it, those that have been away for longest are given up.
        max_messages, max_bytes, max_age_s: of what is kept for clients that may come back: each message is kept once,
            however many it is for. Beyond one of them the oldest are let go, and a client that would need one of those
            is told ``resumed: false``. What is needed is what was sent while a client was away, and what was sent
            before the loss was noticed, as nobody knows how much of that arrived.
        hello_timeout_s: a client that has agreed to this protocol, and then does not begin, is closed after so long.
    """

    grace_s: float = 180.0
    lifetime_s: float = 86_400.0
    max_away: int = 100_000
    max_messages: int = 100_000
    max_bytes: int = 64 * 2**20
    max_age_s: float = 240.0
    hello_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("grace_s", "lifetime_s", "max_age_s", "hello_timeout_s"):
            if not _LEAST_S <= getattr(self, name) <= _MOST_S:
                raise InvalidSetting(f"sessions.{name}", getattr(self, name), f"from {_LEAST_S:g} to {_MOST_S:g}")
        for name in ("max_away", "max_messages", "max_bytes"):
            if not (isinstance(getattr(self, name), int) and 1 <= getattr(self, name) < 2**63):
                raise InvalidSetting(f"sessions.{name}", getattr(self, name), "a whole number from 1")


SESSIONS = SessionPolicy()
"""The default."""


class Session:
    """What a server knows of one client across its connections. Made by :meth:`Sessions.begin`.

    Attributes:
        key: the half of the token that is no secret.
        began_s: when.
        received: messages of the client that the application has been given.
        resumes: how often the client has come back.
        is_known: whether the client is known to have had a token: it can come back.
        owner: whatever the caller wants to find by the session.
    """

    __slots__ = (
        "_attempt",
        "_former",
        "_presented",
        "_secret",
        "_spent",
        "began_s",
        "is_known",
        "key",
        "owner",
        "received",
        "resumes",
    )

    def __init__(self, key: bytes, secret: bytes, began_s: float) -> None:
        self.key = key
        self.began_s = began_s
        self.received = 0
        self.resumes = 0
        self.is_known = False
        self.owner: Any = None
        # The former token is the one that the client is known to have; without a new one it is the present one too.
        self._secret = self._former = secret
        # Of the former token: the last attempt that was answered.
        self._attempt = 0
        # The one before the former, and the last attempt with it.
        self._spent = b"", 0
        self._presented = secret, 0

    @property
    def token(self) -> str:
        """What the client is to come back with."""
        return base64.urlsafe_b64encode(self.key + self._secret).decode().rstrip("=")

    def took(self) -> None:
        """The application has been given one more message."""
        self.received += 1

    def confirm(self) -> None:
        """The client has the token: the former one is spent."""
        self._go_on_from(self._secret, 0)
        self.is_known = True

    def _go_on_from(self, secret: bytes, attempt: int) -> None:
        """The client has this token."""
        if secret != self._former:
            self._spent = self._former, self._attempt
        self._former, self._attempt = secret, attempt

    def presented(self, secret: bytes, attempt: int = 0) -> bool:
        """Whether this is the secret of a token that is good, and the attempt is later than those that were answered.

        No token is spent before :meth:`renew`.
        """
        is_present, is_former = self._is_present_or_former(secret)
        is_late = is_former and 0 < attempt <= self._attempt
        if not (is_present or is_former) or is_late:
            return False
        self._presented = secret, attempt
        self.is_known = True
        return True

    def renew(self, secret: bytes) -> None:
        """There is a new token. The one that was presented last stays good until the client confirms."""
        self._go_on_from(*self._presented)
        self._secret = secret

    def _is_present_or_former(self, secret: bytes) -> tuple[bool, bool]:
        return hmac.compare_digest(self._secret, secret), hmac.compare_digest(self._former, secret)

    def knows(self, secret: bytes) -> bool:
        """Whether this is the secret of a token that is good as long as its session is."""
        return any(self._is_present_or_former(secret))

    def was_overtaken(self, secret: bytes, attempt: int) -> bool:
        """Whether this is a hello of a connection that the client had given up when it sent another one, which was
        answered."""
        return any(
            hmac.compare_digest(known, secret) and 0 < attempt <= last
            for known, last in ((self._former, self._attempt), self._spent)
        )


class Sessions:
    """All sessions of one server: those with a connection, and those whose client is away.

    Args:
        policy: how long and how many.
        random_bytes: returns so many random bytes, such as ``secrets.token_bytes``.
    """

    def __init__(self, policy: SessionPolicy, random_bytes: Callable[[int], bytes]) -> None:
        self.policy = policy
        self._random_bytes = random_bytes
        self._sessions: dict[bytes, Session] = {}
        # Session -> when it is given up; the first to be given up comes first, as all are waited for equally long.
        self._away: OrderedDict[Session, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def away(self) -> int:
        """How many clients are waited for."""
        return len(self._away)

    @property
    def next_due_s(self) -> float | None:
        """When the next one is to be given up; None: nobody is waited for."""
        return next(iter(self._away.values()), None)

    def begin(self, now_s: float) -> Session:
        """A new session, of a client that is connected."""
        key = self._random_bytes(_ID_BYTES)
        session = self._sessions[key] = Session(key, self._random_bytes(_SECRET_BYTES), now_s)
        return session

    def find(self, token: str, now_s: float, attempt: int = 0) -> Session | None:
        """The session that a token is good for; None: for none, whatever is wrong with it, or the attempt is late.

        Nothing has changed then: the caller may still refuse. :meth:`resume` must follow before anything else is looked
        for, as it goes on from the token that was found last.
        """
        session, secret = self._of(token)
        if session is None or not session.presented(secret, attempt):
            return None
        return session if self._lives(session, now_s) else None

    def _lives(self, session: Session, now_s: float) -> bool:
        is_due = session in self._away and self._away[session] <= now_s
        return not is_due and now_s - session.began_s <= self.policy.lifetime_s

    def overtaken(self, token: str, attempt: int) -> Session | None:
        """The session for which a hello with this token came too late, see ``Session.was_overtaken``; None: there is
        none."""
        session, secret = self._of(token)
        return session if session is not None and session.was_overtaken(secret, attempt) else None

    def outlived(self, token: str, now_s: float) -> Session | None:
        """The session to which a token would be good, had it not lasted for too long; None: there is none."""
        session, secret = self._of(token)
        if session is None or not session.knows(secret) or self._lives(session, now_s):
            return None
        return session

    def _of(self, token: str) -> tuple[Session | None, bytes]:
        """The session that a token names, and the secret that is to prove the right to it."""
        if not _TOKEN.fullmatch(token):
            return None, b""
        key_and_secret = base64.urlsafe_b64decode(token + "=")
        return self._sessions.get(key_and_secret[:_ID_BYTES]), key_and_secret[_ID_BYTES:]

    def resume(self, session: Session) -> None:
        """Its client is back with the token that was found, and is to be given a new one."""
        self._away.pop(session, None)
        session.resumes += 1
        session.renew(self._random_bytes(_SECRET_BYTES))

    def leave(self, session: Session, now_s: float) -> Session | None:
        """Its client is away. Returns one that is to be given up in its place, if too many are.

        For one that has ended, or that is away already, nothing changes.
        """
        if session.key in self._sessions:
            self._away.setdefault(session, now_s + self.policy.grace_s)
        return next(iter(self._away)) if len(self._away) > self.policy.max_away else None

    def end(self, session: Session) -> None:
        """Nobody comes back to it any more. Ending one again does nothing."""
        self._away.pop(session, None)
        self._sessions.pop(session.key, None)

    def due(self, now_s: float) -> list[Session]:
        """Those that are to be given up by now."""
        due: list[Session] = []
        for session, due_s in self._away.items():
            if due_s > now_s:
                break
            due.append(session)
        return due


# ---- the client's side -----------------------------------------------------------------------------------------------


class Resumed(NamedTuple):
    """What a client does after a welcome."""

    resend: list[Data]
    """Messages that the server has not been given, in their order; they are counted as sent."""
    lost: int
    """Messages before those that the server has not been given either, and that are not kept any more."""
    unconfirmed: int
    """Messages of the session before, kept or not, of which nobody knows whether the server was given them. Only if the
    session was not resumed."""


class ClientSession:
    """What a client knows of its session, and what it has sent that the server may not have been given.

    Args:
        max_kept, max_kept_bytes: messages that are kept for the case that the connection is lost. Beyond it the oldest
            are let go. With ``max_kept`` 0 none is, and none is without a session.

    Raises:
        InvalidSetting: one of them is negative, or no whole number.

    Attributes:
        client_id: as the server told; None before the first welcome.
        token: for the next time; None: there is no session.
        received: messages that the application has been given in this session.
        sent: messages that were sent in this session.
    """

    def __init__(self, max_kept: int = 1000, max_kept_bytes: int = 2**20) -> None:
        for name, value in (("max_kept", max_kept), ("max_kept_bytes", max_kept_bytes)):
            if not (isinstance(value, int) and value >= 0):
                raise InvalidSetting(name, value, "a whole number from 0")
        self._max_kept = max_kept
        self._max_kept_bytes = max_kept_bytes
        self._kept: deque[tuple[Data, int]] = deque()
        self._kept_bytes = 0
        self.client_id: str | None = None
        self.token: str | None = None
        self.received = 0
        self.sent = 0
        # Of those, how many the server is known to have been given.
        self._confirmed = 0
        self._attempt = 0

    @property
    def kept(self) -> int:
        """How many messages are kept."""
        return len(self._kept)

    def hello(self) -> str:
        """The first frame on a new connection, and for each a new one."""
        self._attempt += 1
        return str(Hello(self.token, self.received, self._attempt))

    def welcomed(self, welcome: Welcome) -> Resumed:
        """The server has answered. ``READY`` is to be sent next, then ``resend``, then what is new.

        Raises:
            BadHandshake: it says that it was given more than was sent, or less than it said before.
        """
        resumed = self._go_on(welcome.received) if welcome.resumed else Resumed([], 0, self.forget())
        self.client_id, self.token, self._attempt = welcome.client_id, welcome.token, 0
        return resumed

    def _go_on(self, received: int) -> Resumed:
        if self.token is None or not self._confirmed <= received <= self.sent:
            raise BadHandshake("the server resumes what there was not")
        first = self.sent - len(self._kept)
        for _ in range(received - first):
            self._drop()
        lost = max(0, first - received)
        # What was lost is not counted by the server, and never will be.
        self.sent -= lost
        self._confirmed = received
        return Resumed([message for message, _ in self._kept], lost, 0)

    def forget(self) -> int:
        """There is no session any more. Returns of how many messages nobody knows whether the server was given them."""
        unconfirmed = self.sent - self._confirmed
        self._kept.clear()
        self._kept_bytes = self.received = self.sent = self._confirmed = 0
        self.token = None
        return unconfirmed

    def took(self) -> None:
        """The application has been given one more message."""
        self.received += 1

    def sending(self, message: Data) -> None:
        """One more message is sent on the present connection."""
        nbytes = len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())
        self.sent += 1
        if self.token is None:
            return
        self._kept.append((message, nbytes))
        self._kept_bytes += nbytes
        while len(self._kept) > self._max_kept or self._kept_bytes > self._max_kept_bytes:
            self._drop()

    def _drop(self) -> None:
        self._kept_bytes -= self._kept.popleft()[1]
