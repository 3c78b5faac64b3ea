"""What wsfast needs to know of a server library's connection object, and who knows it.

An adapter hides one library: how to send, how to close, how a connection ended. The adapter of a supported library is
imported when a connection of that library is first seen, and only if the program itself has imported the library, so
wsfast never pulls one in. For any other library, implement :class:`Adapter` and pass it to :func:`register_adapter`.

Adapters keep no table of connections: what an adapter must remember of one, it remembers on the connection itself or
in the function that :meth:`Adapter.attach` returns.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from wsfast._fanout import Link

__all__ = ["PLAIN", "Adapter", "Closed", "Framing", "adapter_for", "register_adapter"]


class Closed(NamedTuple):
    """How a connection ended, or is about to."""

    code: int = 1006
    """Close code (RFC 6455, 7.4) of the side that closed; 1006 if there was no close frame."""
    reason: str = ""
    by: Literal["peer", "us", "network"] = "network"
    is_clean: bool = False
    """Whether both sides have sent a close frame (RFC 6455, 7.1.4): nothing that was sent before ours is on its way."""


class Framing(NamedTuple):
    """How data messages to a connection are put into frames.

    Connections whose framings have equal keys get the same bytes, so a message is encoded once for all of them.
    """

    key: Hashable
    encode: Callable[[bytes, bool], bytes] | None = None
    """Compresses a payload, given whether it is text, for a frame with RSV1 set (RFC 7692, 6.1); None: not
    compressed.
    """


PLAIN = Framing("plain")
"""One frame, as RFC 6455, 5.2 has it. Allowed also for a connection that negotiated permessage-deflate: RSV1=0 says
that a message is not compressed (RFC 7692, 6), and the compression of others is as if it had not been there.
"""


class Adapter(Protocol):
    """What the manager needs of the connection objects of one library; ``ws`` is always such an object.

    What is sent goes one of three ways. *Direct*: if the adapter has told the link a descriptor, and keeps the link's
    facts, the core writes to the socket. *Through*: ``write`` is given whole frames. *By the library*: where
    ``framing`` is None, ``send`` is given messages. The first needs ``write`` too, for what the socket did not take.

    Threads: all methods are called on the event loop's thread.
    """

    @property
    def name(self) -> str:
        """What a user calls the library."""

    def recognises(self, ws: object) -> bool:
        """Whether *ws* is a connection of this library. Asked once for each type."""

    def attach(self, ws: Any, link: Link, lost: Callable[[], None]) -> Callable[[], object]:
        """Note that *ws* is registered as ``link.record``.

        Args:
            ws: the connection, which is open.
            link: where to tell what happens to the connection. Its record is where to report what the library shows
                of the traffic, but for what is written directly or by ``write``, which is counted already.
            lost: call this when the connection has ended in whatever way, soon and on the loop's thread. Calling it
                more than once, or late, is allowed.

        Returns:
            A function that undoes all this and forgets *link* and *lost*. It may be called from inside *lost*.
        """

    def is_open(self, ws: Any) -> bool:
        """Whether a message may be sent: open, and nobody has begun to close it."""

    def closed(self, ws: Any) -> Closed | None:
        """How *ws* ended, or is ending, as far as known; None while it is open."""

    def remote_address(self, ws: Any) -> str:
        """Where the peer is, for logs: ``host:port``, or the empty string where the library does not tell."""

    def framing(self, ws: Any) -> Framing | None:
        """How data messages are framed; None: only the library can do it. Asked once for each connection."""

    def is_fragmenting(self, ws: Any) -> bool:
        """Whether a fragmented message is under way, so that no frame of another may be written."""

    def buffered(self, ws: Any) -> int:
        """Bytes in the transport's write buffer."""

    def write(self, ws: Any, data: bytes | memoryview) -> int:
        """Hand bytes of frames to the transport without waiting; returns how many bytes are then in its buffer."""

    def keeps_views(self, ws: Any) -> bool:
        """Whether the transport keeps what ``write`` is given, rather than a copy. Asked once for each connection."""

    def when_written(self, ws: Any, link: Link) -> None:
        """Call ``link.writable()`` on the loop's thread once the transport's write buffer is empty; at once if it
        is.
        """

    def fileno(self, ws: Any) -> int:
        """The descriptor of the socket, also below TLS, for the kernel to be asked about it; -1: unknown. Only if
        ``lost`` is called before it is closed. Asked once for each connection.
        """

    def is_reading(self, ws: Any) -> bool:
        """Whether what comes is read. While it is not, nobody is blamed for an answer that is missing."""

    def sees_pongs(self, ws: Any) -> bool:
        """Whether ``link.pong`` is called with the payload of each pong. Asked once for each connection."""

    async def ping(self, ws: Any, payload: bytes) -> None:
        """Ping in the library's own way, and wait for the pong. Asked for if ``sees_pongs`` or ``framing`` says no."""

    def counts_sent(self, ws: Any) -> bool:
        """Whether the adapter itself counts the messages that go through ``send`` on the record."""

    async def send(self, ws: Any, message: str | bytes) -> None:
        """Send one message in the library's own way and with its own flow control."""

    async def close(self, ws: Any, code: int, reason: str) -> None:
        """Close with a close frame, and wait until the connection has ended.

        Raises:
            TimeoutError: the peer has not answered, or not even read, in the time that the library's settings give
                it. The caller cuts it off.
        """

    def abort(self, ws: Any) -> None:
        """End the connection at once, without a close frame."""


# Library as in sys.modules -> module with its adapter, as ``ADAPTER``.
_SUPPORTED = {"websockets": "wsfast.adapters.websockets"}

_registered: list[Adapter] = []

# Every type seen so far. It grows with the number of connection classes of a program, not of connections.
_by_type: dict[type, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Make wsfast accept the connection objects that *adapter* recognises, in preference to its own adapters."""
    _registered.append(adapter)
    _by_type.clear()


def adapter_for(ws: object) -> Adapter:
    """The adapter that knows *ws*.

    Raises:
        TypeError: none does; the text names the supported libraries and what to implement for another one.

    Cost: one dictionary lookup after the first connection of a type.
    """
    adapter = _by_type.get(type(ws))
    return _find(ws) if adapter is None else adapter


def _find(ws: object) -> Adapter:
    loaded = [
        importlib.import_module(module).ADAPTER for library, module in _SUPPORTED.items() if library in sys.modules
    ]
    for adapter in [*reversed(_registered), *loaded]:
        if adapter.recognises(ws):
            _by_type[type(ws)] = adapter
            return adapter  # type: ignore[no-any-return]
    raise TypeError(
        f"wsfast does not know connections of type {type(ws).__module__}.{type(ws).__qualname__}; it knows those of "
        f"{', '.join(_SUPPORTED)}; for another library implement wsfast.adapters.Adapter and pass it to "
        "wsfast.adapters.register_adapter"
    )
