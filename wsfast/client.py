"""The client that comes back: one conversation with a server, over as many connections as it takes.

It hides that connections of the ``websockets`` library break: when a new one is made, what is sent on it first, and
what becomes of what the last one left. When to come back is decided by ``wsfast.reconnect``, and what each side still
owes the other by ``wsfast.session``; what they say to each other is docs/resume.md.

What it promises:

- **Order.** Messages leave in the order of the calls of ``send``, and come in the order in which the server sent them,
  over all connections. States are told in the order in which they come about, ``Connected`` before anything that is
  received on that connection.
- **Exactly once, or told.** With a server that speaks the protocol of resume, each message arrives once, in both
  directions; where that cannot be kept, ``Connected`` says so, with numbers. With any other server, messages that are
  under way when a connection breaks are gone, and nobody knows how many.
- **Bounds.** What waits to be sent, what is kept for a resume and what the application has not taken yet are bounded by
  ``QueuePolicy``. While the application does not take, nothing is read: the server notices.
- **An end at once.** Whoever is cancelled while waiting, connecting or sending waits for nothing more; leaving
  ``async with`` leaves no task and no socket behind, and waits no longer than ``close_timeout`` for the other side.

Invariants: one task, the supervisor, owns the connection, and only its end makes a client ``Closed``. A message is
counted as sent in the same step in which it is handed to the connection, and as received in the same step in which it
is put into the queue that outlives connections. ``_open`` is set only while nothing queued comes before a new message.

Not promised: that a message has arrived when ``send`` returns. Threads: the event loop's only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random as _random
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as _connect
from websockets.datastructures import HeadersLike
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidProxyStatus,
    InvalidStatus,
    ProxyError,
)
from websockets.frames import Close
from websockets.protocol import CLOSED, CLOSING, OPEN
from websockets.typing import Subprotocol

from wsfast.errors import BadHandshake, ClientClosed, InvalidSetting, QueueFull
from wsfast.reconnect import (
    RECONNECT,
    Advice,
    Decision,
    PolicyEngine,
    Random,
    ReconnectHistory,
    Reconnector,
    ReconnectPolicy,
    RetryBudget,
    Verdict,
    check_close,
    verdict_of,
)
from wsfast.session import BAD_HANDSHAKE, READY, TOO_LATE, ClientSession, offers, read_welcome, split_subprotocol

__all__ = [
    "Client",
    "Closed",
    "Connected",
    "Connecting",
    "QueuePolicy",
    "State",
    "Waiting",
    "connect",
]

logger = logging.getLogger(__name__)

Data: TypeAlias = str | bytes
DataLike: TypeAlias = str | bytes | bytearray | memoryview

# The library's own defaults: this client waits as long as it does for what stands beside its handshakes.
_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 10.0

# Closing codes of our own (RFC 6455, 7.4.1). A client that closes with 1000 or 1001 gives its session up.
_NORMAL, _GOING_AWAY = 1000, 1001
_BROKEN, _NO_TLS = 1006, 1015
# With these we refuse a message. On a connection that resumes, the same message would come again, for ever.
_REFUSALS = {1007, 1009}

# Statuses below 500 that say nothing against trying again (RFC 9110, 15.5.9; RFC 8470, 5.2; RFC 6585, 4).
_TRANSIENT = {408, 425, 429}

# States that wait for an asynchronous callback; it misses the oldest beyond that. An attempt makes three.
_MOST_STATES = 1000

# Nobody looks more often whether a connection is closing.
_LEAST_LOOK_S = 0.1

# What is shown of a text that a server may have made.
_SHOWN_CHARACTERS = 200


# ---- states ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connecting:
    """An attempt is under way.

    Attributes:
        attempt: so many have failed since a connection last lasted.
    """

    attempt: int


@dataclass(frozen=True, slots=True)
class Connected:
    """There is a connection. What waited for it is sent next, before anything newer.

    Attributes:
        client_id: who this is to the server; None if it does not speak the protocol of resume.
        resumed: whether the session goes on, so that nothing was missed. False: it does not, and the application must
            fetch its state anew. None: there was none before.
        resent: messages that are sent again, as the server has not been given them.
        lost: messages that the server has not been given, and that are not kept any more.
        unconfirmed: messages of the session before, of which nobody knows whether the server was given them. They are
            not sent again.
    """

    client_id: str | None
    resumed: bool | None
    resent: int = 0
    lost: int = 0
    unconfirmed: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """There is no connection, and an attempt comes later.

    Attributes:
        wait_s: until then.
        attempt, because: see ``wsfast.reconnect.Decision``.
        code: with which the connection was closed; 1006 if it broke, or if there was none; 1015 if TLS failed; or the
            status that the opening handshake got (HTTP).
        reason: what came with it, or why there was no connection, in words.
    """

    wait_s: float
    attempt: int
    because: str
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """There is no connection, and there will be none.

    Attributes:
        because, code, reason: see ``wsfast.errors.ClientClosed``.
    """

    because: str
    code: int = _BROKEN
    reason: str = ""


State: TypeAlias = Connecting | Connected | Waiting | Closed


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How much a client keeps in memory. Sizes are those of payloads, of text in UTF-8.

    Attributes:
        max_messages, max_bytes: that wait to be sent, while there is no connection.
        when_full: what ``send`` does beyond that: "wait" for room or for a connection, "raise" ``QueueFull``, drop the
            messages that have waited longest ("drop_oldest"), or the one that is to be sent ("drop_newest").
            ``Client.dropped`` counts both.
        max_kept, max_kept_bytes: that were sent, and are kept in case the connection is lost: let it be more than what
            is sent in the time it takes to notice that. Beyond it the oldest are let go; if one of them is missed,
            ``Connected.lost`` counts it.
        max_unread, max_unread_bytes: that were received, and the application has not taken. Beyond it nothing is read;
            the last message that was may exceed the bytes.
    """

    max_messages: int = 1000
    max_bytes: int = 2**20
    when_full: Literal["wait", "raise", "drop_oldest", "drop_newest"] = "wait"
    max_kept: int = 1000
    max_kept_bytes: int = 2**20
    max_unread: int = 1000
    max_unread_bytes: int = 2**20

    def __post_init__(self) -> None:
        for name in ("max_messages", "max_bytes", "max_kept", "max_kept_bytes", "max_unread", "max_unread_bytes"):
            least = 1 if "unread" in name else 0
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= least):
                raise InvalidSetting(f"queue.{name}", getattr(self, name), f"a whole number from {least}")
        if self.when_full not in ("wait", "raise", "drop_oldest", "drop_newest"):
            raise InvalidSetting("queue.when_full", self.when_full, "wait, raise, drop_oldest or drop_newest")


def connect(
    url: str | Callable[[], str | Awaitable[str]],
    *,
    subprotocols: Iterable[str] | None = None,
    additional_headers: HeadersLike | Callable[[], HeadersLike | Awaitable[HeadersLike]] | None = None,
    policy: ReconnectPolicy = RECONNECT,
    resume: bool = True,
    queue: QueuePolicy = QueuePolicy(),
    on_state: Callable[[State], object] | None = None,
    wait_connected: bool = True,
    budget: RetryBudget | None = None,
    history: ReconnectHistory | None = None,
    random: Random = _random.random,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> Client:
    """A client that comes back, for ``async with connect(...) as client`` or ``client = await connect(...)``.

    Args:
        url: of the server. A function, plain or async, is asked before each attempt, so that what it contains can be
            fresh. If it raises, that is an attempt that failed; if it raises ``ClientClosed``, the last one.
        subprotocols: of the application's, in the order of preference.
        additional_headers: of the opening handshake; may be a function as well.
        policy: when to come back. The first connection is tried again like any other.
        resume: whether to offer the protocol of resume.
        queue: how much is kept in memory.
        on_state: called with every ``State``. A plain function is called as it comes about; an ``async def`` one in a
            task of its own, one call after the other; at the end, that task has ``close_timeout`` left. What a callback
            raises is logged and counted.
        wait_connected: whether to begin with a connection, however long that takes, or at once.
        budget, history: see ``wsfast.reconnect``; a budget may be shared with other clients.
        random, clock: what decides about waits; the clock returns seconds and does not go back.
        options: for ``websockets.asyncio.client.connect``, unchanged: ``proxy``, ``ssl``, ``origin``, ``compression``,
            ``max_size``, ``ping_interval`` and others. ``open_timeout`` also bounds the wait for the server's welcome,
            ``close_timeout`` all of the closing. Those about its own reconnecting have no effect.
    """
    dialer = _Dialer(url, additional_headers, list(subprotocols or ()), resume, options)
    reconnector = Reconnector(PolicyEngine(policy), random, history=history, budget=budget)
    return Client(dialer, reconnector, queue, on_state, wait_connected, clock)


# ---- one connection --------------------------------------------------------------------------------------------------


class _NotReady(Exception):
    """What the application is asked before an attempt could not be answered."""


class _Dialer:
    """How one connection is made."""

    def __init__(
        self, url: object, headers: object, subprotocols: list[str], resume: bool, options: dict[str, Any]
    ) -> None:
        if options.get("sock") is not None:
            raise TypeError("sock is good for one connection only: pass host and port, or a url")
        self._url = url
        self._headers = headers
        self._offered = cast("list[Subprotocol]", offers(subprotocols) if resume else subprotocols)
        self._resume = resume
        self._options = options
        self.open_timeout_s: float | None = options.get("open_timeout", _OPEN_TIMEOUT_S)
        self.close_timeout_s: float | None = options.get("close_timeout", _CLOSE_TIMEOUT_S)

    async def dial(self) -> ClientConnection:
        try:
            url, headers = await _answer(self._url), await _answer(self._headers)
        except ClientClosed:
            raise
        except Exception as error:
            logger.warning("cannot tell url and headers of the next connection", exc_info=True)
            raise _NotReady(f"cannot tell url and headers: {error!r}") from error
        return await _connect(url, subprotocols=self._offered or None, additional_headers=headers, **self._options)

    def agreed(self, ws: ClientConnection) -> tuple[bool, str | None]:
        """Whether the server speaks the protocol of resume, and the subprotocol of the application's."""
        return split_subprotocol(ws.subprotocol) if self._resume else (False, ws.subprotocol)


async def _answer(question: Any) -> Any:
    if not callable(question):
        return question
    answer = question()
    return await answer if inspect.isawaitable(answer) else answer


class _Failure(NamedTuple):
    """What it means that an attempt led to no connection."""

    verdict: Verdict
    code: int
    reason: str
    advice: Advice | None = None


def _failure(error: Exception) -> _Failure | None:
    """None: it is no matter of the network or the server, and the next attempt would do no better."""
    code, reason = _BROKEN, str(error)[:_SHOWN_CHARACTERS]
    match error:
        case InvalidStatus() | InvalidProxyStatus():
            code = error.response.status_code
            verdict = Verdict.NORMAL if code >= 500 or code in _TRANSIENT else Verdict.FORBID
            # A header may be there twice, which ``get`` would not forgive.
            told = error.response.headers.get_all("Retry-After")
            return _Failure(verdict, code, reason, Advice.from_retry_after(told[0], time.time()) if told else None)
        case ConnectionClosed():
            code, reason = _end(error.rcvd, error.sent)
            return _Failure(verdict_of(code), code, reason, Advice.from_reason(reason))
        case BadHandshake():
            return _Failure(Verdict.DELAY, code, reason)
        case ssl.SSLEOFError():
            return _Failure(Verdict.NORMAL, code, reason)
        case ssl.SSLError():
            return _Failure(Verdict.DELAY, _NO_TLS, reason)
        case InvalidMessage() | ProxyError():
            # No HTTP at all: the end of a server that was about to answer, or something else behind the port.
            verdict = Verdict.NORMAL if isinstance(error.__cause__, EOFError) else Verdict.DELAY
            return _Failure(verdict, code, reason)
        case InvalidHandshake():
            return _Failure(Verdict.FORBID, code, reason)
        case OSError() | EOFError() | _NotReady():
            return _Failure(Verdict.NORMAL, code, reason)
    return None


def _end(received: Close | None, sent: Close | None) -> tuple[int, str]:
    """Code and reason of the end of a connection: the server's, else those with which we have failed it."""
    close = received or sent
    return (_BROKEN, "") if close is None else (int(close.code), close.reason)


async def _closed(ws: ClientConnection, close_timeout_s: float | None) -> None:
    """Wait until a connection is closed. If it is closing for longer than that, cut it off: the library would not do so
    before its next ping."""
    look_s = None if close_timeout_s is None else max(close_timeout_s, _LEAST_LOOK_S)
    was_closing = False
    while True:
        try:
            async with asyncio.timeout(look_s):
                return await ws.wait_closed()
        except TimeoutError:
            if was_closing:
                ws.transport.abort()
            was_closing = ws.state is CLOSING


async def _leave(ws: ClientConnection, code: int, reason: str, within_s: float | None) -> None:
    """Close a connection, and wait for the other side's answer for so long. With 0, the close frame is sent for what it
    is worth. The socket is closed in any case."""
    try:
        if ws.state is not CLOSED:
            async with asyncio.timeout(within_s), asyncio.TaskGroup() as tasks:
                # The answer may stand behind messages, and the library stops reading when nobody takes them.
                tasks.create_task(_discard(ws))
                await ws.close(code, reason)
    except TimeoutError:
        logger.debug("the server did not answer the closing handshake in time")
    finally:
        ws.transport.abort()
        await ws.wait_closed()


async def _discard(ws: ClientConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await ws.recv()


# ---- queues ----------------------------------------------------------------------------------------------------------


class _Queue:
    """Messages in their order, and what they take together. Whoever adds looks whether they fit."""

    __slots__ = ("_max_bytes", "_max_messages", "_messages", "nbytes")

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._messages: deque[tuple[Data, int]] = deque()
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def fits(self, nbytes: int) -> bool:
        return len(self._messages) < self._max_messages and self.nbytes + nbytes <= self._max_bytes

    def could_fit(self, nbytes: int) -> bool:
        """Whether it would if there were nothing else."""
        return self._max_messages > 0 and nbytes <= self._max_bytes

    def add(self, message: Data, nbytes: int) -> None:
        self._messages.append((message, nbytes))
        self.nbytes += nbytes

    def take(self) -> Data:
        message, nbytes = self._messages.popleft()
        self.nbytes -= nbytes
        return message


def _nbytes(message: Data) -> int:
    """Raises UnicodeEncodeError for a text that cannot be sent."""
    return len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())


def _copied(message: DataLike) -> Data:
    """What the caller cannot change any more."""
    if isinstance(message, (str, bytes)):
        return message
    if isinstance(message, (bytearray, memoryview)):
        return bytes(message)
    raise TypeError(f"a message must be str or bytes-like, not {type(message).__name__}")


# ---- the client ------------------------------------------------------------------------------------------------------


class _Parting(NamedTuple):
    """How the present connection is left when the client ends."""

    code: int = _GOING_AWAY
    reason: str = ""
    within_s: float | None = 0.0


class _Outcome(NamedTuple):
    """What has become of an attempt."""

    decision: Decision
    code: int
    reason: str


class Client:
    """A connection that comes back. Made by :func:`connect`.

    ``async for message in client`` ends when the application closes the client, or the server does with 1000; in all
    other cases it raises ``ClientClosed`` at the end. Before either, it yields what was received.

    Attributes:
        state: what was told last. Before the start: ``Closed("not started")``.
        client_id: who this is to the server; None if it was not told on the present or the last connection.
        subprotocol: of the application's, that the server chose for that connection.
        dropped: messages that were given up for want of room.
        callback_errors: calls of ``on_state`` that raised.
    """

    def __init__(
        self,
        dialer: _Dialer,
        reconnector: Reconnector,
        queue: QueuePolicy,
        on_state: Callable[[State], object] | None,
        wait_connected: bool,
        clock: Callable[[], float],
    ) -> None:
        self.state: State = Closed("not started")
        self.client_id: str | None = None
        self.subprotocol: str | None = None
        self.dropped = 0
        self.callback_errors = 0

        self._dialer = dialer
        self._reconnector = reconnector
        self._wait_connected = wait_connected
        self._clock = clock
        self._session = ClientSession(queue.max_kept, queue.max_kept_bytes)
        # Whether the application was told of a session, and of its unconfirmed messages which it was not told of yet.
        self._had_session = False
        self._unconfirmed = 0

        self._when_full = queue.when_full
        self._outbox = _Queue(queue.max_messages, queue.max_bytes)
        self._inbox = _Queue(queue.max_unread, queue.max_unread_bytes)
        # Held by whoever waits for room, or for the network: nobody overtakes.
        self._turn = asyncio.Lock()
        self._open: ClientConnection | None = None
        # Of the outbox: room or a connection. Of the inbox: a message, room. Set also at the end of the client.
        self._can_send, self._has_come, self._was_taken = asyncio.Event(), asyncio.Event(), asyncio.Event()

        self._supervisor: asyncio.Task[Closed] | None = None
        self._parting: _Parting | None = None
        self._was_connected = False
        self._begun = asyncio.Event()
        self._error: BaseException | None = None

        self._on_state = on_state
        self._is_async = on_state is not None and (
            inspect.iscoroutinefunction(on_state) or inspect.iscoroutinefunction(type(on_state).__call__)
        )
        self._states: deque[State] = deque(maxlen=_MOST_STATES)
        self._has_states = asyncio.Event()
        self._notifier: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """How many messages wait to be sent. They are given up when the client ends."""
        return len(self._outbox)

    # ---- life

    async def start(self) -> Self:
        """Begin; see ``wait_connected`` of :func:`connect`. ``async with`` and ``await connect(...)`` do it.

        Raises:
            ClientClosed: there is no connection, and there will be none.
            Exception: what ``websockets`` raises for arguments that cannot be right, such as ``InvalidURI``.
        """
        if self._supervisor is not None:
            raise RuntimeError("a client can be started only once")
        self.state = Connecting(0)
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._ended)
        if self._is_async:
            self._notifier = asyncio.create_task(self._notify())
        if self._wait_connected:
            try:
                await self._begun.wait()
            except asyncio.CancelledError:
                await self._stop(_Parting())
                raise
            if not self._was_connected:
                if self._error is not None:
                    raise self._error
                self._check()
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.start().__await__()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            await self.close()
        elif issubclass(exc_type, asyncio.CancelledError):
            await self._stop(_Parting())
        else:
            await self.close(_GOING_AWAY)

    async def close(self, code: int = _NORMAL, reason: str = "") -> None:
        """End, and wait for it: at once while there is no connection, else for the server's answer, for no longer than
        ``close_timeout``. What was received can still be taken; what is queued is given up. Closing again does nothing.

        If cancelled, the client has ended all the same.

        Raises:
            InvalidSetting: *code* or *reason* cannot go into a close frame.
        """
        check_close(code, reason)
        await self._stop(_Parting(code, reason, self._dialer.close_timeout_s))

    async def _stop(self, parting: _Parting) -> None:
        supervisor, notifier = self._supervisor, self._notifier
        if supervisor is None:
            return
        if self._parting is None or parting.within_s == 0:
            self._part(supervisor, parting)
        try:
            await asyncio.wait([supervisor])
            if notifier is not None and notifier is not asyncio.current_task():
                # It ends by itself when it has told that this is the end, unless a callback hangs.
                await asyncio.wait([notifier], timeout=parting.within_s)
        except asyncio.CancelledError:
            self._part(supervisor, _Parting())
            await asyncio.wait([supervisor])
            raise
        finally:
            if notifier is not None and notifier is not asyncio.current_task():
                notifier.cancel()

    def _part(self, supervisor: asyncio.Task[Closed], parting: _Parting) -> None:
        # What a supervisor was told first stays, but for how long it may take: to be cancelled twice may come to the
        # same as once.
        self._parting = (self._parting or parting)._replace(within_s=parting.within_s)
        supervisor.cancel()

    # ---- messages

    async def send(self, message: DataLike) -> None:
        """Send a message: text if it is a ``str``, else binary. What can be changed is copied.

        It returns when the message has been handed to the connection, and the connection has room for more. While
        there is none, or what was queued meanwhile is still on its way, it returns when the message is queued; if there
        is no room for it, what happens is up to ``QueuePolicy.when_full``. If cancelled while it waits for room or for
        its turn, the message is not sent; if cancelled while it waits for the network, it is.

        Raises:
            ClientClosed: there is no connection, and there will be none.
            QueueFull: there is no room, and the policy says so.
            TypeError: it is neither text nor bytes-like. UnicodeEncodeError: a text has no UTF-8 form.
        """
        data = _copied(message)
        nbytes = _nbytes(data)
        async with self._turn:
            while True:
                self._check()
                ws = self._open
                if ws is not None and ws.state is OPEN:
                    return await self._hand_over(ws, data)
                if self._outbox.fits(nbytes):
                    return self._outbox.add(data, nbytes)
                if self._when_full != "wait":
                    return self._overflow(data, nbytes)
                self._can_send.clear()
                await self._can_send.wait()

    def _overflow(self, data: Data, nbytes: int) -> None:
        if self._when_full == "raise":
            raise QueueFull(len(self._outbox), self._outbox.nbytes)
        if self._when_full == "drop_newest" or not self._outbox.could_fit(nbytes):
            self.dropped += 1
            return
        while not self._outbox.fits(nbytes):
            self._outbox.take()
            self.dropped += 1
        self._outbox.add(data, nbytes)

    async def _hand_over(self, ws: ClientConnection, data: Data) -> None:
        """The connection is open, and the library writes before it waits for the first time: what is counted as sent
        was handed over. If the connection breaks meanwhile, the message is kept; without a session, nobody knows."""
        if self._counts:
            self._session.sending(data)
        with contextlib.suppress(ConnectionClosed):
            await ws.send(data)

    async def recv(self) -> Data:
        """The next message. Several tasks may wait for one each. If cancelled, none is lost.

        Raises:
            ClientClosed: there will be none.
        """
        while not self._inbox:
            self._check()
            self._has_come.clear()
            await self._has_come.wait()
        message = self._inbox.take()
        self._was_taken.set()
        return message

    async def __aiter__(self) -> AsyncIterator[Data]:
        try:
            while True:
                yield await self.recv()
        except ClientClosed as error:
            if error.because != "closed" and error.code != _NORMAL:
                raise

    def _check(self) -> None:
        if isinstance(self.state, Closed):
            raise ClientClosed(self.state.because, self.state.code, self.state.reason) from self._error

    @property
    def _counts(self) -> bool:
        """Whether the present connection has a session."""
        return self._session.token is not None

    # ---- the supervisor

    async def _supervise(self) -> Closed:
        """Connect, again and again."""
        while True:
            self._tell(Connecting(self._reconnector.attempt))
            decision, code, reason = await self._attempt()
            if decision.wait_s is None:
                return Closed(decision.because, code, reason)
            logger.info("no connection (%d, %r): the next attempt is in %.3f s", code, reason, decision.wait_s)
            self._tell(Waiting(decision.wait_s, decision.attempt, decision.because, code, reason))
            await asyncio.sleep(decision.wait_s)
            if not self._counts:
                # What had come on the last connection was taken in, whether there was room or not.
                await self._room_in_inbox()

    async def _attempt(self) -> _Outcome:
        """Make a connection, and stay with it until it ends."""
        try:
            ws = await self._dialer.dial()
        except Exception as error:
            return self._failed(error)
        try:
            try:
                first = await self._greet(ws)
            except (BadHandshake, ConnectionClosed) as error:
                code = TOO_LATE if isinstance(error.__cause__, TimeoutError) else BAD_HANDSHAKE
                await _leave(ws, code, str(error) if isinstance(error, BadHandshake) else "", 0.0)
                return self._failed(error)
            return await self._stay(ws, first)
        finally:
            await _leave(ws, *(self._parting or _Parting()))

    def _failed(self, error: Exception) -> _Outcome:
        failure = _failure(error)
        if failure is None:
            raise error
        decision = self._reconnector.failed(self._clock(), verdict=failure.verdict, advice=failure.advice)
        return _Outcome(decision, failure.code, failure.reason)

    async def _greet(self, ws: ClientConnection) -> list[Data]:
        """Agree with the server on what goes on. Returns what is to be sent first, and is counted already."""
        speaks, self.subprotocol = self._dialer.agreed(ws)
        if not speaks:
            self._unconfirmed += self._session.forget()
            self._connected(None, False)
            return []
        try:
            async with asyncio.timeout(self._dialer.open_timeout_s):
                await ws.send(self._session.hello())
                welcome = read_welcome(await ws.recv())
        except TimeoutError as error:
            raise BadHandshake("no welcome came in time") from error
        try:
            resend, lost, unconfirmed = self._session.welcomed(welcome)
        except BadHandshake:
            self._unconfirmed += self._session.forget()
            raise
        self._unconfirmed += unconfirmed
        self._reconnector.told(welcome.spread_s)
        # Nothing may be waited for between the welcome and this: what it says would be lost with the connection.
        self._connected(welcome.client_id, welcome.resumed, len(resend), lost)
        return [READY, *resend]

    def _connected(self, client_id: str | None, resumed: bool, resent: int = 0, lost: int = 0) -> None:
        self.client_id = client_id
        self._was_connected = True
        state = Connected(client_id, resumed if self._had_session else None, resent, lost, self._unconfirmed)
        self._had_session, self._unconfirmed = self._counts, 0
        self._tell(state)

    async def _stay(self, ws: ClientConnection, first: list[Data]) -> _Outcome:
        """Read and write until the connection ends."""
        since_s = self._clock()
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._read(ws)), tasks.create_task(self._write(ws, first))
                await _closed(ws, self._dialer.close_timeout_s)
                for task in work:
                    task.cancel()
        finally:
            self._open = None
            self._begun.set()
        code, reason = _end(ws.protocol.close_rcvd, ws.protocol.close_sent)
        now_s = self._clock()
        decision = self._reconnector.lost(
            now_s, now_s - since_s, code, advice=Advice.from_reason(reason), latency_s=ws.latency
        )
        await self._take_the_rest(ws, comes_again=self._counts and decision.wait_s is not None)
        if ws.protocol.close_sent is not None and ws.protocol.close_sent.code in _REFUSALS:
            self._unconfirmed += self._session.forget()
        return _Outcome(decision, code, reason)

    async def _read(self, ws: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._room_in_inbox()
                self._take(await ws.recv())

    async def _take_the_rest(self, ws: ClientConnection, comes_again: bool) -> None:
        """Take in what the library has read of a connection that is closed: as much as there is room for, and the rest
        too unless it comes again."""
        with contextlib.suppress(ConnectionClosed):
            while self._inbox.fits(1) or not comes_again:
                self._take(await ws.recv())

    def _take(self, message: Data) -> None:
        self._inbox.add(message, _nbytes(message))
        if self._counts:
            self._session.took()
        self._has_come.set()

    async def _room_in_inbox(self) -> None:
        while not self._inbox.fits(1):
            self._was_taken.clear()
            await self._was_taken.wait()

    async def _write(self, ws: ClientConnection, first: list[Data]) -> None:
        """Write what comes before all that is new. From then on, ``send`` writes by itself."""
        with contextlib.suppress(ConnectionClosed):
            for message in first:
                await ws.send(message)
        while self._outbox and ws.state is OPEN:
            data = self._outbox.take()
            self._can_send.set()
            await self._hand_over(ws, data)
        if ws.state is OPEN:
            self._open = ws
            self._can_send.set()
            self._begun.set()

    # ---- states

    def _ended(self, supervisor: asyncio.Task[Closed]) -> None:
        """The supervisor has ended, and with it the client."""
        if supervisor.cancelled():
            code, reason, _ = self._parting or _Parting()
            state = Closed("closed", code, reason)
        elif (error := supervisor.exception()) is None:
            state = supervisor.result()
        elif isinstance(error, ClientClosed):
            state = Closed(error.because, error.code, error.reason)
        else:
            self._error = error
            state = Closed("failed", _BROKEN, repr(error)[:_SHOWN_CHARACTERS])
        logger.info("the client has ended (%s): %d, %r", state.because, state.code, state.reason)
        self._tell(state)
        for event in (self._can_send, self._has_come, self._begun):
            event.set()

    def _tell(self, state: State) -> None:
        self.state = state
        if self._on_state is None:
            return
        if self._is_async:
            self._states.append(state)
            self._has_states.set()
            return
        try:
            self._on_state(state)
        except Exception:
            self._callback_failed(state)

    async def _notify(self) -> None:
        """Tell an asynchronous callback, in a task of its own: it may send, receive and close."""
        callback = cast("Callable[[State], Awaitable[object]]", self._on_state)
        while True:
            await self._has_states.wait()
            self._has_states.clear()
            while self._states:
                state = self._states.popleft()
                try:
                    await callback(state)
                except Exception:
                    self._callback_failed(state)
                if isinstance(state, Closed):
                    return

    def _callback_failed(self, state: State) -> None:
        self.callback_errors += 1
        logger.exception("on_state failed on %s", type(state).__name__)
