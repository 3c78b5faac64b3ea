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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta

__all__ = ["Adapter", "Closed", "Outgoing", "adapter_for", "register_adapter"]


class Closed(NamedTuple):
    """How a connection ended, or is about to."""

    code: int = 1006
    """Close code (RFC 6455, 7.4) of the side that closed; 1006 if there was no close frame."""
    reason: str = ""
    by: Literal["peer", "us", "network"] = "network"


class Outgoing:
    """One message on its way to any number of connections, encoded once.

    Attributes:
        message: as a library's ``send`` takes it: ``str`` for a text frame, ``bytes`` for a binary one.
        payload: the same as bytes; UTF-8 for text.
        is_text: which of the two it is.
    """

    __slots__ = ("is_text", "message", "payload")

    def __init__(self, message: str | bytes | bytearray | memoryview) -> None:
        """Raises ``UnicodeEncodeError`` for a text with a lone surrogate, ``TypeError`` for what is no message."""
        if isinstance(message, str):
            self.message: str | bytes = message
            self.payload = message.encode()
            self.is_text = True
        elif isinstance(message, (bytes, bytearray, memoryview)):
            # A copy of what is mutable: the caller may change it before the last connection has been written to.
            self.message = self.payload = bytes(message)
            self.is_text = False
        else:
            raise TypeError(f"message must be str or bytes-like, not {type(message).__name__}")


class Adapter(Protocol):
    """What the manager needs of the connection objects of one library; ``ws`` is always such an object.

    Threads: all methods are called on the event loop's thread.
    """

    @property
    def name(self) -> str:
        """What a user calls the library."""

    def recognises(self, ws: object) -> bool:
        """Whether *ws* is a connection of this library. Asked once for each type."""

    def attach(self, ws: Any, record: ConnectionMeta, lost: Callable[[], None]) -> Callable[[], object]:
        """Note that *ws* is registered as *record*.

        Args:
            ws: the connection, which is open.
            record: of the connection; report to it what the library shows of its traffic.
            lost: call this when the connection has ended in whatever way, soon and on the loop's thread. Calling it
                more than once, or late, is allowed.

        Returns:
            A function that undoes all this and forgets *record* and *lost*. It may be called from inside *lost*.
        """

    def counts_sent(self, ws: Any) -> bool:
        """Whether the adapter itself counts messages to this connection on its record; else the manager does."""

    def is_open(self, ws: Any) -> bool:
        """Whether a message may be sent: open, and nobody has begun to close it."""

    def closed(self, ws: Any) -> Closed | None:
        """How *ws* ended, or is ending, as far as known; None while it is open."""

    def remote_address(self, ws: Any) -> str:
        """Where the peer is, for logs: ``host:port``, or the empty string where the library does not tell."""

    def send_nowait(self, ws: Any, out: Outgoing) -> bool | None:
        """Write one message without waiting for the peer.

        Returns:
            True if nothing is left in the write buffer, False if something waits there for the peer; None if nothing
            was written, because this library, or this connection right now, can only do it with ``send``.
        """

    async def drain(self, ws: Any) -> None:
        """Wait until the write buffer, into which ``send_nowait`` wrote, has gone below the library's limit."""

    async def send(self, ws: Any, out: Outgoing) -> None:
        """Write one message in the library's own way and with its own flow control."""

    async def close(self, ws: Any, code: int, reason: str) -> None:
        """Close with a close frame, and wait until the connection has ended, for as long as the library does."""

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
