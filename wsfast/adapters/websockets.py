"""Connections of the ``websockets`` library (15 or newer, its asyncio implementation), and a ``serve`` that counts.

``websockets.serve(handler, host, port)`` becomes ``serve(handler, host, port, manager=manager)``: every connection is
registered while its handler runs and it lives, the handler finds the record as ``connection.wsfast``, and what goes
over the wire is counted on it without a line in the handler:

- *Messages and bytes*, both ways, whoever sends them and by whichever of the library's ways. Bytes are the payload of
  data messages as the application sees them: UTF-8 for text, after decompression on the way in, before compression on
  the way out. Frame headers, control frames and TLS are not counted. A message counts when its last fragment has come
  in, or has been handed to the transport; its bytes count fragment by fragment.
- *Pongs*, by which the manager knows how long its pings took. Where the manager's health is on, the library's own pings
  are off by default. (Not with ``attach=False``: who is not registered would not be pinged by anybody.)
- *Signs of life*: any byte that comes in, so also a ping, a pong, or a part of a frame.

What passes between the opening handshake and the registration is counted too, once there is a record.

A client that speaks the protocol of resume (docs/resume.md; ``wsfast.client`` and ``wsfast.js`` do) is known by the
subprotocol that it offers, which the application does not see. Its connection is given one more subclass, which counts
the messages that the application takes; and what is sent to it by the library's own ways takes the manager's way
instead, as a whole message, so that it is counted and can be sent again. Not with ``attach=False``.

A connection of the library's own ``serve`` can be attached as well. Then the messages that the manager sends are
counted, and the handler may report the others with ``conn.received`` and ``conn.sent``.

How it is done: the connection and its protocol are given subclasses that override documented methods
(``data_received``, ``connection_lost``, ``pause_writing`` and ``resume_writing`` of asyncio protocols, ``send_text``,
``send_binary``, ``send_continuation`` and ``state`` of the sans-I/O protocol), ``process_event`` and ``send_data``.
Nothing is wrapped per instance, so no reference cycle is added.

These callbacks also tell the core when it may write to the socket itself: while the connection is open, not in the
middle of a fragmented message, and nothing waits in the transport. A connection of the library's own ``serve`` gets
the same frames through its transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import inspect
import logging
import math
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from websockets.asyncio import server as _library
from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import DATA_OPCODES, CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, State
from websockets.server import ServerProtocol

from wsfast.adapters import PLAIN, Closed, Framing
from wsfast.errors import (
    BadHandshake,
    DuplicateConnection,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    ManagerClosed,
    PeerClosed,
)
from wsfast.session import (
    BAD_HANDSHAKE,
    MOST_CHARACTERS,
    SUPERSEDED,
    TOO_LATE,
    inner_offers,
    is_ready,
    read_hello,
    split_subprotocol,
    with_protocol,
)

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta
    from wsfast._fanout import Link
    from wsfast.manager import Attachment, ConnectionManager
    from wsfast.session import Hello

__all__ = ["ADAPTER", "serve", "unix_serve"]

logger = logging.getLogger(__name__)

Handler = Callable[[ServerConnection], Awaitable[None]]
_M = TypeVar("_M", bound=ServerConnection)
Keywords = Mapping[str, Any]
ProcessRequest = Callable[[ServerConnection, Request], Awaitable[Response | None] | Response | None]
Identify = Callable[[ServerConnection], Keywords | Awaitable[Keywords | None] | None]

# RFC 6455, 5.5: a control frame has at most 125 bytes, of which the code takes two.
_MAX_REASON_BYTES = 123

# Of a client that speaks the protocol of resume: hello and ready.
_HANDSHAKE_MESSAGES = 2

# RFC 7692, 7.1.2.1.
_MOST_WINDOW_BITS = 15

# What a client may have caused by what it asked for; it is told the text.
_REFUSALS = (DuplicateConnection, InvalidName, InvalidSetting, LimitExceeded)


class WebsocketsAdapter:
    """Implements ``wsfast.adapters.Adapter`` for ``websockets.asyncio.server.ServerConnection``."""

    name = "websockets"

    def recognises(self, ws: object) -> bool:
        return isinstance(ws, ServerConnection)

    def attach(self, ws: ServerConnection, link: Link, lost: Callable[[], None]) -> Callable[[], object]:
        if isinstance(ws, _ManagedMixin):
            ws.wsfast_traffic.begin(link, lost)
            if _is_plain_socket(ws) and self.framing(ws) is not None:
                link.direct(ws.transport.get_extra_info("socket").fileno())
            if ws.transport.get_write_buffer_size():
                link.wrote()
            if ws.protocol.expect_continuation_frame:
                link.fragment(True)
            return ws.wsfast_traffic.end
        # The library tells nobody else when a connection ends: a handler that does not read would never notice.
        watcher = asyncio.get_running_loop().create_task(ws.wait_closed())
        watcher.add_done_callback(lambda _: lost())
        return watcher.cancel

    def is_open(self, ws: ServerConnection) -> bool:
        return ws.protocol.state is OPEN and not ws.transport.is_closing()

    def closed(self, ws: ServerConnection) -> Closed | None:
        protocol = ws.protocol
        sent, received = protocol.close_sent, protocol.close_rcvd
        is_clean = sent is not None and received is not None
        if received is not None and (sent is None or protocol.close_rcvd_then_sent):
            return Closed(received.code, received.reason, "peer", is_clean)
        if sent is not None:
            return Closed(sent.code, sent.reason, "us", is_clean)
        return (
            None
            if self.is_open(ws)
            else Closed(1006, ws.wsfast_traffic.broken if isinstance(ws, _ManagedMixin) else "")
        )

    def remote_address(self, ws: ServerConnection) -> str:
        address = ws.remote_address
        if not isinstance(address, tuple):
            return str(address or "")
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def framing(self, ws: ServerConnection) -> Framing | None:
        extensions = ws.protocol.extensions
        if not extensions:
            return PLAIN
        if len(extensions) > 1 or type(extensions[0]) is not PerMessageDeflate:
            return None
        deflate = extensions[0]
        # Frames of their own for every window that a client may ask for would make each broadcast dearer.
        if not deflate.local_no_context_takeover or deflate.local_max_window_bits != _window_bits(ws):
            return PLAIN
        bits, settings = deflate.local_max_window_bits, deflate.compress_settings
        return Framing(
            ("permessage-deflate", bits, *sorted(settings.items())), functools.partial(_deflate, bits, settings)
        )

    def is_fragmenting(self, ws: ServerConnection) -> bool:
        return ws.protocol.expect_continuation_frame

    def buffered(self, ws: ServerConnection) -> int:
        return ws.transport.get_write_buffer_size()

    def write(self, ws: ServerConnection, data: bytes | memoryview) -> int:
        ws.transport.write(data)
        return ws.transport.get_write_buffer_size()

    def keeps_views(self, ws: ServerConnection) -> bool:
        return sys.version_info >= (3, 12) or not type(ws.transport).__module__.startswith("asyncio.")

    def when_written(self, ws: ServerConnection, link: Link) -> None:
        _await_empty_buffer(ws)
        if ws.transport.get_write_buffer_size() == 0:
            _restore_limits(ws)
            link.writable()
        elif not isinstance(ws, _ManagedMixin):
            # Kept alive by the waiter that it adds to the connection.
            asyncio.get_running_loop().create_task(_tell_when_written(ws, link))

    def fileno(self, ws: ServerConnection) -> int:
        sock = ws.transport.get_extra_info("socket") if isinstance(ws, _ManagedMixin) else None
        return -1 if sock is None else int(sock.fileno())

    def is_reading(self, ws: ServerConnection) -> bool:
        return ws.transport.is_reading()

    def sees_pongs(self, ws: ServerConnection) -> bool:
        return isinstance(ws, _ManagedMixin)

    async def ping(self, ws: ServerConnection, payload: bytes) -> None:
        await (await ws.ping(payload))

    def counts_sent(self, ws: ServerConnection) -> bool:
        return isinstance(ws, _ManagedMixin)

    async def send(self, ws: ServerConnection, message: str | bytes) -> None:
        await ws.send(message)

    async def close(self, ws: ServerConnection, code: int, reason: str) -> None:
        # The library waits for the peer to read before its own timeout begins.
        async with asyncio.timeout(ws.close_timeout):
            await ws.close(code, reason)

    def abort(self, ws: ServerConnection) -> None:
        ws.transport.abort()


ADAPTER = WebsocketsAdapter()


def _deflate(bits: int, settings: Mapping[str, Any], payload: bytes, is_text: bool) -> bytes:
    """What the library would send, by the library itself: without context takeover it depends on nothing else."""
    extension = PerMessageDeflate(True, True, bits, bits, dict(settings))
    return bytes(extension.encode(Frame(Opcode.TEXT if is_text else Opcode.BINARY, payload)).data)


def _window_bits(ws: ServerConnection) -> int:
    """The compression window that the server has chosen for itself."""
    for factory in ws.protocol.available_extensions or ():
        if isinstance(factory, ServerPerMessageDeflateFactory):
            return factory.server_max_window_bits or _MOST_WINDOW_BITS
    return _MOST_WINDOW_BITS


# ---- when a transport has written everything -------------------------------------------------------------------------


def _is_plain_socket(ws: ServerConnection) -> bool:
    """Whether what is written to the socket itself is what the peer reads, and in order."""
    transport = ws.transport
    sock = transport.get_extra_info("socket")
    return (
        sock is not None
        and transport.get_extra_info("ssl_object") is None
        and sock.type == socket.SOCK_STREAM
        and sock.fileno() >= 0
    )


def _await_empty_buffer(ws: ServerConnection) -> None:
    """Make the transport call ``pause_writing`` now, if anything is in its buffer, and ``resume_writing`` once it is
    empty.

    That is the only way to learn of it. The library's own writers wait meanwhile, as for any slow peer.
    """
    # With a high-water mark of 0, asyncio's TLS transport takes an empty buffer for a full one.
    high = 0 if ws.transport.get_extra_info("ssl_object") is None else 1
    ws.transport.set_write_buffer_limits(high=high, low=0)


def _restore_limits(ws: Any) -> None:
    """Give the transport the limits that the user has chosen."""
    limits = ws.write_limit if hasattr(ws, "write_limit") else (ws.write_limit_high, ws.write_limit_low)
    ws.transport.set_write_buffer_limits(*limits)


async def _tell_when_written(ws: ServerConnection, link: Link) -> None:
    with contextlib.suppress(Exception):  # the connection has ended: whoever attached it is told so
        while ws.transport.get_write_buffer_size():
            await (ws.drain() if ws.paused else asyncio.sleep(0.01))
        _restore_limits(ws)
    link.writable()


# ---- a server that knows its connections -----------------------------------------------------------------------------


def serve(
    handler: Handler,
    host: str | None = None,
    port: int | None = None,
    *,
    manager: ConnectionManager | None = None,
    attach: bool = True,
    identify: Identify | None = None,
    create_connection: Callable[..., ServerConnection] | None = None,
    **options: Any,
) -> Server:
    """``websockets.asyncio.server.serve`` whose connections *manager* knows and counts.

    All other arguments are the library's own and mean the same; without a *manager* this is the library's ``serve``.

    Args:
        manager: where connections are registered; started before the first of them arrives.
        attach: register each connection while its handler runs, as if the handler's body stood inside
            ``async with manager.attach(connection, **identify(connection))``. With False the handler does that itself,
            and only the counting is added. A handler that calls ``manager.attach`` although *attach* is True takes
            over: the automatic record ends with a ``ConnectionClosed``, the new one goes on with its counters.
        identify: called with the connection after the opening handshake (``connection.request`` is there); returns the
            keywords of ``manager.attach``, such as ``{"client_id": ..., "user_id": ...}``. May be asynchronous. By
            default there are none, and the client id is generated.

            If it returns None, or raises, the connection is closed with 1008 and the handler is not called. The reason
            is the text of the exception if it is one of wsfast's own about a name, a setting or a limit, which are
            fit for the client to read; the text of any other exception is logged and not shown. An id that is taken
            is refused with 1008 as well.
        create_connection: as for the library: a subclass of ``ServerConnection`` or a function that makes one. The
            connection keeps all it does, and is counted as well.
        options: the library's own. Before its ``process_request``, the manager is asked whether it lets in one more
            connection (``ConnectionManager.admit``); if not, the opening handshake is answered with 503 and
            Retry-After. Requests that are no opening handshakes go to ``process_request`` alone.

    Returns:
        The library's ``Server``, to be awaited or used in ``async with``.
    """
    if manager is None:
        return _library.serve(handler, host, port, create_connection=cast("Any", create_connection), **options)
    if attach and manager.health is not None:
        # The library's own pings would be a second opinion, and a worse one.
        options.setdefault("ping_interval", None)
    if attach:
        handler = functools.partial(_run_attached, handler, manager, identify)
    if attach and manager.sessions is not None:
        options["select_subprotocol"] = functools.partial(_select_subprotocol, options.get("select_subprotocol"))
    options["process_request"] = functools.partial(_admit, manager, options.get("process_request"))
    factory = _managed_factory(create_connection or ServerConnection)
    return _library.serve(handler, host, port, create_connection=cast("Any", factory), **options)


def unix_serve(handler: Handler, path: str | None = None, **options: Any) -> Server:
    """:func:`serve` on a Unix socket at *path*, as the library's ``unix_serve``."""
    return serve(handler, unix=True, path=path, **options)


def _admit(
    manager: ConnectionManager, process_request: ProcessRequest | None, ws: ServerConnection, request: Request
) -> Awaitable[Response | None] | Response | None:
    """The library's ``process_request``: the manager decides before the user's does, which may be dear."""
    if "Upgrade" in request.headers and (wait_s := manager.admit()):
        response = ws.respond(503, "The server takes no more connections now. Try again later.\n")
        response.headers["Retry-After"] = str(math.ceil(wait_s))
        return response
    return None if process_request is None else process_request(ws, request)


async def _run_attached(
    handler: Handler, manager: ConnectionManager, identify: Identify | None, ws: ServerConnection
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        try:
            keywords = await _identified(ws, identify)
            if keywords is None:
                await ws.close(1008, "identification failed")
                return
            hello = await _hello(ws, manager)
            attachment = manager.attach(ws, hello=hello, **keywords)
            attachment.gives_way = True
            await stack.enter_async_context(attachment)
            if hello is not None:
                _expect_ready(ws, attachment)
        except (PeerClosed, ConnectionClosed):
            return  # it went away before it was identified; there is nobody to serve
        except BadHandshake as error:
            await ws.close(BAD_HANDSHAKE, _reason(error))
            return
        except ManagerClosed:
            closed = manager.refusal()
            await ws.close(closed.code, closed.reason)
            return
        except _REFUSALS as error:
            await ws.close(1008, _reason(error))
            return
        except Exception:
            logger.exception("cannot identify the connection from %s", ADAPTER.remote_address(ws))
            await ws.close(1008, "identification failed")
            return
        await _handle(handler, ws)


async def _handle(handler: Handler, ws: ServerConnection) -> None:
    """Run the handler. That a restart ends it, or that its client has come back on another connection, is no failure,
    although the library, which takes only 1000 and 1001 for ends in good order, would log a traceback for each.
    """
    try:
        await handler(ws)
    except ConnectionClosed as error:
        sent = ws.protocol.close_sent
        # It may be of another connection, to which the handler is a client.
        if sent is None or error.sent is not sent or sent.code not in (CloseCode.SERVICE_RESTART, SUPERSEDED):
            raise


async def _hello(ws: ServerConnection, manager: ConnectionManager) -> Hello | None:
    """What a client begins with that speaks the protocol of resume; None: it does not."""
    speaks, name = split_subprotocol(ws.subprotocol)
    if not speaks or manager.sessions is None:
        return None
    ws.protocol.subprotocol = cast("Any", name)  # the one that means something to the application
    try:
        async with asyncio.timeout(manager.sessions.hello_timeout_s):
            return read_hello(await ws.recv())
    except TimeoutError:
        await ws.close(TOO_LATE, "hello has not come in time")
        raise PeerClosed("") from None


def _select_subprotocol(
    select: Callable[[ServerConnection, Sequence[Any]], Any] | None, ws: ServerConnection, offered: Sequence[str]
) -> str | None:
    """Choose as the application does, or the library by default, and say in the answer that we speak of resume."""
    choose = select or _default_subprotocol
    inner = inner_offers(offered)
    if inner is None:
        return cast("str | None", choose(ws, offered))
    chosen = cast("str | None", choose(ws, inner))
    if with_protocol(chosen) not in offered:
        return chosen  # a browser does not accept what it has not offered
    cast("_ManagedMixin", ws).wsfast_traffic.uncounted = _HANDSHAKE_MESSAGES
    return with_protocol(chosen)


def _default_subprotocol(ws: ServerConnection, offered: Sequence[Any]) -> str | None:
    return ServerProtocol.select_subprotocol(ws.protocol, offered)


async def _identified(ws: ServerConnection, identify: Identify | None) -> Keywords | None:
    if identify is None:
        return {}
    keywords = identify(ws)
    return await keywords if inspect.isawaitable(keywords) else keywords


def _reason(error: Exception) -> str:
    """The text of *error*, cut to what fits a close frame."""
    return str(error).encode(errors="replace")[:_MAX_REASON_BYTES].decode(errors="ignore")


class _Traffic:
    """What a connection and its protocol share: where their traffic is counted, and who wants to know of the end.

    Traffic is counted on the record, or here until there is one.
    """

    __slots__ = (
        "attachment",
        "broken",
        "bytes_in",
        "bytes_out",
        "is_refused",
        "link",
        "lost",
        "messages_in",
        "messages_out",
        "parts",
        "record",
        "second",
        "uncounted",
    )

    def __init__(self) -> None:
        self.broken = ""  # how, once it is
        self.uncounted = 0  # messages that are still to come and belong to a handshake
        self.parts: list[Any] = []  # of a message that is passed on
        self.attachment: Attachment | None = None  # of a client that speaks the protocol of resume
        self.second: bytearray | None = None  # what has come of its second message, until that is complete
        self.is_refused = False  # as that is none
        self.record: ConnectionMeta | None = None
        self.link: Link | None = None
        self.lost: Callable[[], None] | None = None
        self.messages_in = self.bytes_in = self.messages_out = self.bytes_out = 0

    def received(self, nbytes: int, messages: int) -> None:
        if self.uncounted:
            self.uncounted -= messages
        elif self.link is not None:
            self.link.record.received(nbytes, messages)
        else:
            self.bytes_in += nbytes
            self.messages_in += messages

    def sent(self, nbytes: int, fin: bool) -> None:
        if self.link is not None:
            self.link.record.sent(nbytes, int(fin))
        else:
            self.bytes_out += nbytes
            self.messages_out += fin

    def begin(self, link: Link, lost: Callable[[], None]) -> None:
        self.link = link
        self.record = record = link.record
        self.lost = lost
        if self.messages_in or self.bytes_in:
            record.received(self.bytes_in, self.messages_in)
        record.sent(self.bytes_out, self.messages_out)
        self.messages_in = self.bytes_in = self.messages_out = self.bytes_out = 0

    def take_second(self, frame: Frame) -> None:
        """Of the second message of a client that speaks the protocol of resume. The application does not see it, and
        need not read for it: one that only sends never does. Where it is not what it must be, nothing more is taken."""
        assert self.second is not None and self.attachment is not None
        if self.is_refused:
            return
        self.second += frame.data
        self.is_refused = frame.opcode is Opcode.BINARY or len(self.second) > MOST_CHARACTERS
        if frame.fin and not self.is_refused and is_ready(self.second.decode(errors="replace")):
            self.second = None
            self.attachment.confirm()
        elif frame.fin or self.is_refused:
            self.is_refused = True
            self.attachment.refuse(BAD_HANDSHAKE, "ready must come second")

    def end(self) -> None:
        # The record stays, so that a handler that goes on a little longer than its connection is told so by the record
        # itself. It may be that of a client that is away, or back by now: what still comes here is not its traffic.
        self.lost = self.link = None


class _CountingProtocol(ServerProtocol):
    """A ``ServerProtocol`` that counts the messages it is told to send (all of the library's pass through here), and
    tells the link what the direct path must know: whether the connection is open, and whether a message is in
    fragments.
    """

    wsfast_traffic: _Traffic

    @ServerProtocol.state.setter  # type: ignore[attr-defined, untyped-decorator]
    def state(self, state: State) -> None:
        ServerProtocol.state.fset(self, state)  # type: ignore[attr-defined]
        link = self.wsfast_traffic.link
        if link is not None and state is not OPEN:
            link.close()

    def send_text(self, data: Any, fin: bool = True) -> None:
        if self._passes_on(data, fin, True):
            return
        super().send_text(data, fin)
        self._sent(data, fin)

    def send_binary(self, data: Any, fin: bool = True) -> None:
        if self._passes_on(data, fin, False):
            return
        super().send_binary(data, fin)
        self._sent(data, fin)

    def send_continuation(self, data: Any, fin: bool) -> None:
        if self._passes_on(data, fin):
            return
        super().send_continuation(data, fin)
        self._sent(data, fin)
        if fin and self.wsfast_traffic.link is not None:
            self.wsfast_traffic.link.fragment(False)

    def _passes_on(self, data: Any, fin: bool, is_text: bool | None = None) -> bool:
        """Whether this is the manager's to send, as a whole message. is_text: None: of the message that was begun."""
        link, parts = self.wsfast_traffic.link, self.wsfast_traffic.parts
        if link is None or not link.has_session:
            return False
        if is_text is not None:
            parts[:] = [is_text]
        parts.append(data)
        if fin:
            is_text, *pieces = parts
            parts.clear()
            link.pass_on(b"".join(pieces), bool(is_text))
        return True

    def send_close(self, *args: Any, **options: Any) -> None:
        # What was sent before leaves before: the close frame is not in the transport yet.
        if self.wsfast_traffic.link is not None:
            self.wsfast_traffic.link.finish()
        super().send_close(*args, **options)

    def _sent(self, data: Any, fin: bool) -> None:
        self.wsfast_traffic.sent(_size(data), fin)
        if not fin and self.wsfast_traffic.link is not None:
            self.wsfast_traffic.link.fragment(True)

    def fail(self, code: Any, reason: str = "") -> None:
        # A ping was not answered, or the peer broke the protocol. The library waits for the peer to end the TCP
        # connection even so, ten seconds by default; nothing will be delivered any more.
        super().fail(code, reason)
        if self.wsfast_traffic.lost is not None:
            asyncio.get_running_loop().call_soon(self.wsfast_traffic.lost)


class _ManagedMixin(ServerConnection):
    """What is put before the class of a connection that ``serve(manager=...)`` makes."""

    wsfast_traffic: _Traffic

    @property
    def wsfast(self) -> ConnectionMeta | None:
        """The record of this connection; None before it is registered, detached after it has ended."""
        return self.wsfast_traffic.record

    def data_received(self, data: bytes) -> None:
        link = self.wsfast_traffic.link
        if link is not None:
            link.record.touch()
        super().data_received(data)
        # Once the peer's close frame is here, nothing will be delivered any more, although the library leaves it to the
        # peer to end the TCP connection.
        lost = self.wsfast_traffic.lost
        if lost is not None and self.protocol.close_expected():
            lost()

    def send_data(self) -> None:
        super().send_data()
        link = self.wsfast_traffic.link
        if link is not None and self.transport.get_write_buffer_size():
            link.wrote()

    def pause_writing(self) -> None:
        super().pause_writing()
        link = self.wsfast_traffic.link
        if link is not None:
            link.block(self.transport.get_write_buffer_size())
            _await_empty_buffer(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport.get_write_buffer_size():
            return  # of the library's own low-water mark; nobody has asked for more
        _restore_limits(self)
        if self.wsfast_traffic.link is not None:
            self.wsfast_traffic.link.writable()

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
            self.wsfast_traffic.received(_size(event.data), int(event.fin))
            if self.wsfast_traffic.second is not None:
                self.wsfast_traffic.take_second(event)
                return
        elif isinstance(event, Frame) and event.opcode is Opcode.PONG and self.wsfast_traffic.link is not None:
            self.wsfast_traffic.link.pong(bytes(event.data))
        super().process_event(event)

    def eof_received(self) -> None:
        self.wsfast_traffic.broken = _why_broken(None)
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        # First of all: after this call the descriptor may be another connection's.
        if self.wsfast_traffic.link is not None:
            self.wsfast_traffic.link.close()
        self.wsfast_traffic.broken = _why_broken(exc)
        super().connection_lost(exc)
        if self.wsfast_traffic.lost is not None:
            self.wsfast_traffic.lost()
        # The library's protocol and its parser refer to each other, so both wait for the garbage collector. The record
        # must not wait with them.
        cast("_CountingProtocol", self.protocol).wsfast_traffic = _Traffic()


class _SessionMixin(_ManagedMixin):
    """What is put before the class of a connection whose client speaks the protocol of resume.

    A message is counted when the application takes it. What it has not taken when its client is back on another
    connection is thrown away: it comes again there.
    """

    async def recv(self, decode: bool | None = None) -> Any:
        while True:
            message = await super().recv(decode)
            if self.wsfast_attachment.took():
                return message

    async def recv_streaming(self, decode: bool | None = None) -> AsyncIterator[Any]:
        if not self.wsfast_attachment.is_current:
            await self.recv()  # which raises that the connection is closed, when it is
        async for part in super().recv_streaming(decode):
            yield part
        self.wsfast_attachment.took()

    @property
    def wsfast_attachment(self) -> Attachment:
        attachment = self.wsfast_traffic.attachment
        assert attachment is not None
        return attachment


def _expect_ready(ws: ServerConnection, attachment: Attachment) -> None:
    """The client has been welcomed. From now on, the messages of the session that the application takes are counted."""
    session_ws = cast("_SessionMixin", ws)
    session_ws.wsfast_traffic.attachment = attachment
    session_ws.wsfast_traffic.second = bytearray()
    session_ws.__class__ = _with_mixin(_SessionMixin, type(ws))


def _why_broken(error: Exception | None) -> str:
    """How a connection ended without a close frame, in the words of a close reason."""
    if error is None:
        return "end of stream"
    if isinstance(error, OSError) and error.errno in _BREAKS:
        return _BREAKS[error.errno]
    return str(error) or type(error).__name__


_BREAKS = {
    errno.ECONNRESET: "reset by the peer",
    errno.EPIPE: "reset by the peer",
    errno.ETIMEDOUT: "not acknowledged in time",
    errno.EHOSTUNREACH: "host unreachable",
    errno.ENETUNREACH: "network unreachable",
}


def _size(data: Any) -> int:
    return data.nbytes if isinstance(data, memoryview) else len(data)


# A mixin and the class of a connection -> the same class with the mixin before it. A few entries for each class that a
# program serves.
_mixed_classes: dict[tuple[type, type], type] = {}


def _with_mixin(mixin: type[_M], cls: type[ServerConnection]) -> type[_M]:
    mixed = _mixed_classes.get((mixin, cls))
    if mixed is None:
        bases = (mixin,) if cls is ServerConnection else (mixin, cls)
        mixed = type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})
        _mixed_classes[mixin, cls] = mixed
    return cast("type[_M]", mixed)


def _managed_factory(create: Callable[..., ServerConnection]) -> Callable[..., ServerConnection]:
    """Something to pass as ``create_connection`` that makes what *create* makes, with counting."""

    def create_managed(protocol: ServerProtocol, server: Server, **options: Any) -> ServerConnection:
        made = _with_mixin(_ManagedMixin, create) if isinstance(create, type) else create
        connection = made(protocol, server, **options)
        if not isinstance(connection, _ManagedMixin):
            # A function made it, so its class was not known before. The mixin adds no state that __init__ would set.
            connection.__class__ = _with_mixin(_ManagedMixin, type(connection))
        # The library holds on to the protocol it made, so it cannot be replaced by another object.
        protocol.__class__ = _CountingProtocol
        protocol.wsfast_traffic = connection.wsfast_traffic = _Traffic()  # type: ignore[attr-defined]
        return connection

    return create_managed
