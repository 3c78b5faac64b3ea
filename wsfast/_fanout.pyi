"""The outboxes of one manager's connections and their way into the sockets, ``wsfast._fanout``.

It is what ``wsfast.delivery`` stands on, and adapters tell a :class:`Link` what happens to their connection.
Applications use neither. How it works is in csrc/fanout.h.

Numbers of bytes are of whole frames, but for counters of what was sent, which are of payloads. Times are nanoseconds of
``time.monotonic_ns``, and are passed in; what adapters tell has happened when they tell it. ``flush`` reads that clock
itself, to know when its slice ends.

Threads: the event loop's only. While ``flush`` has given up the GIL, a change from another thread is ``WrongThread``.
"""

from builtins import bytes as _bytes
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, Protocol, Self, final, type_check_only

from wsfast._core import ConnectionMeta

__all__ = ["CAUSES", "HAS_SOCKETS", "MAX_HELPERS", "MAX_VARIANTS", "POLICIES", "Fanout", "Link", "Message"]

HAS_SOCKETS: Final[bool]
"""Whether the direct path is compiled in. Without it, everything goes through transports."""
MAX_HELPERS: Final[int]
MAX_VARIANTS: Final[int]
POLICIES: Final[Mapping[str, int]]
CAUSES: Final[Mapping[Literal["bytes", "age", "budget", "closed"], int]]
DROPPED: Final[int]
CONFLATED: Final[int]
TOO_SLOW: Final[int]
THROUGH: Final[int]
REST: Final[int]
FAILED: Final[int]

@type_check_only
class _Future(Protocol):
    def done(self) -> bool: ...
    def set_result(self, result: None, /) -> None: ...

@final
class Message:
    """One message to any number of connections, encoded once for each variant; and the tally of what became of it:
    ``targets == pending + sent + queued + dropped + failed + away``. Made by ``Fanout.message``."""

    @property
    def targets(self) -> int: ...
    @property
    def pending(self) -> int:
        """Connections that keep up, and get it at the next flush."""
    @property
    def sent(self) -> int: ...
    @property
    def queued(self) -> int:
        """Connections for which it waits."""
    @property
    def dropped(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def displaced(self) -> int:
        """Older messages that were dropped or replaced because of it."""
    @property
    def disconnected(self) -> int:
        """Connections that were given up because of it."""
    @property
    def away(self) -> int:
        """Connections with a session for which it is kept: they are not there, or have not caught up."""
    def tell(self, future: _Future) -> None:
        """Set the result of *future* once nothing is pending; at once if nothing is. One future can be told."""
    def miss(self, count: int) -> None:
        """Count targets that have no link, as dropped."""

@final
class Link:
    """One connection. Made by ``Fanout.admit``; once it is forgotten, all methods do nothing.

    It keeps its record and its connection object alive until it is forgotten, and is not seen by the garbage collector.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Raises TypeError: only ``Fanout.admit`` makes links."""
    @property
    def record(self) -> Any: ...
    @property
    def ws(self) -> Any: ...
    @property
    def is_native(self) -> bool: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def is_waiting(self) -> bool:
        """Whether it is blocked, or in the middle of a fragmented message: nothing is sent to it."""
    @property
    def is_blocked(self) -> bool: ...
    @property
    def is_between_fragments(self) -> bool:
        """Whether nothing but a fragmented message of the application keeps messages from being sent."""
    @property
    def is_direct(self) -> bool:
        """Whether a flush now would write to the socket itself."""
    @property
    def has_session(self) -> bool: ...
    @property
    def is_away(self) -> bool:
        """Whether it is closed and its client may come back: what is pushed to it is kept."""
    @property
    def is_behind(self) -> bool:
        """Whether it is open and something that was kept has not been sent: what is pushed to it is kept."""
    @property
    def owed(self) -> int:
        """Messages of its session that are kept for it, and were neither handed to its connection nor put into its
        outbox to be so."""
    def leave(self) -> None:
        """It is closed, and its transport goes: let go of the connection object, and of what the transport has."""
    def end_session(self) -> None:
        """Nobody will come back to it: what is kept for it is dropped, and nothing more is kept."""
    def pass_on(self, payload: _bytes, is_text: bool) -> None:
        """The library was told to send this by itself. Where there is a session, that is our business: a message that
        does not pass through here could not be counted, nor sent again."""
    @property
    def messages(self) -> int:
        """In its outbox."""
    @property
    def bytes(self) -> int:
        """In its outbox and in its transport."""
    def sizes(self) -> list[int]:
        """The sizes of the frames in its outbox."""
    @property
    def in_transport(self) -> int:
        """Bytes in its transport when that was last asked."""
    @property
    def lost_bytes(self) -> int:
        """Of the frames that were dropped because it was closed."""
    @property
    def peak_bytes(self) -> int:
        """Most that ever waited in its outbox, while it was blocked, and in its transport."""
    @property
    def pinged_ns(self) -> int:
        """When the last ping was handed to the kernel; 0: none was."""
    @property
    def holds_ping(self) -> bool:
        """Whether a ping cannot leave: it waits behind what is in the transport."""
    def take_ping(self) -> _bytes:
        """The frame of the ping that waits, to be written by the caller; empty: there is none."""
    def ask(self) -> None:
        """Ask its transport how much it has, if it is blocked."""
    def watch(self, bytes: int) -> None:
        """Call ``has_room`` once, when no more than so many bytes wait for it, or it is closed; at once if so."""
    # ---- facts, told by the adapter
    def direct(self, fd: int) -> None:
        """The core may write to this descriptor: a plain, non-blocking stream socket. The adapter must tell all that
        follows, and ``close`` before the descriptor is closed."""
    def wrote(self) -> None:
        """The library has written by itself, and the transport may not have got rid of it yet."""
    def is_sure(self) -> None:
        """It has."""
    def fragment(self, under_way: bool) -> None:
        """A fragmented message of the application begins or ends."""
    def block(self, in_transport: int) -> None:
        """So many bytes wait in the transport. ``writable`` must follow."""
    def writable(self) -> None:
        """The transport's write buffer is empty."""
    def finish(self) -> None:
        """The connection is about to be closed from here: what waits is handed to the transport, before the close frame
        is."""
    def close(self) -> None:
        """No data message may be sent any more; what waits is dropped."""
    def pong(self, payload: _bytes) -> None:
        """A pong has come."""
    # ---- what goes through the adapter
    def peek(self, max_bytes: int) -> tuple[_bytes, int]:
        """The first frames in one piece, a ping before all others, at least one and no more than fit *max_bytes*; and
        how many they are."""
    def peek_message(self) -> str | _bytes | None:
        """The first message as a library's ``send`` takes it; None: there is none."""
    def commit(self, frames: int, in_transport: int) -> None:
        """So many of the first frames were handed over, and the transport still has so many bytes."""
    def take_message(self, in_transport: int) -> None:
        """The first message is handed to the library, which has so many bytes then. It is not counted on the record."""
    def fail(self, frames: int) -> None:
        """So many of the first frames could not be written: the connection is broken."""

@final
class Fanout:
    """All links of a manager.

    Args:
        wake_up: called with a link that need not wait any longer, and may have something in line.
        hand_over: called with a link all of whose outbox must go to its transport now.
        has_room: called with a link that is watched.
        buffered: called with a link before a policy is applied to it; returns how many bytes its transport has.
        held: called with a link whose ping cannot leave, or no longer cannot; see ``Link.holds_ping``.
        ponged: called with a link and the payload of a pong.
        passed_on: called with a link, and the payload of a message that is passed on and whether it is text.
        policy: one of ``POLICIES``.
        max_bytes, low_bytes: of one connection: the most that may wait, and where dropping ends.
        max_age_ns: how long it may wait.
        max_total_bytes: of everything that is kept, but for what has the next three limits.
        kept_messages, kept_bytes, kept_age_ns: of what is kept for links with a session.
        helpers: threads that help to send; they start with the first flush of 64 connections or more.
        clock: for what adapters tell; None for the system's.
    """

    def __new__(
        cls,
        *,
        wake_up: Callable[[Link], object],
        hand_over: Callable[[Link], object],
        has_room: Callable[[Link], object],
        buffered: Callable[[Link], int],
        held: Callable[[Link], object],
        ponged: Callable[[Link, bytes], object],
        passed_on: Callable[[Link, bytes, bool], object],
        policy: int,
        max_bytes: int,
        low_bytes: int,
        max_age_ns: int,
        max_total_bytes: int,
        kept_messages: int = 0,
        kept_bytes: int = 0,
        kept_age_ns: int = 0,
        helpers: int = 0,
        clock: Callable[[], int] | None = None,
    ) -> Self: ...
    def __len__(self) -> int: ...
    def add_variant(self, encode: Callable[[bytes, bool], bytes]) -> int:
        """The number of a kind of frames that are made from the payload, and whether it is text, by *encode*, and that
        have RSV1 set. 0 are plain frames."""
    def admit(self, record: ConnectionMeta, ws: Any, variant: int = 0, keeps_views: bool = False) -> Link:
        """A link for a record that has none; it is open. *keeps_views*: its transport copies nothing."""
    def forget(self, link: Link) -> None:
        """Close it, and give up its record and its connection."""
    def begin_session(self, link: Link) -> None:
        """What is sent to this link from now on can be sent again. It is behind until it is greeted. ValueError if it
        has a session, is closed, or something waits for it."""
    def resume(self, link: Link, ws: Any, variant: int, keeps_views: bool, received: int) -> Link | None:
        """The client of a link, which is closed if it is not, is back, and has been given so many messages since its
        session began. Returns its link, which is behind until it is greeted; None if there is a gap: then nothing has
        changed, but for what was let go. ValueError if the link has no session."""
    def greet(self, link: Link, payload: bytes, now_ns: int) -> None:
        """Send this text to a new link, before anything else, and counted nowhere; then what was kept. One that is
        closed is not sent it. ValueError if it has a session and has been greeted."""
    def expire_kept(self, now_ns: int) -> None:
        """Let go of what is kept for too long. (``push`` does so as well.)"""
    @property
    def sessions(self) -> int:
        """Links that have one."""
    def get(self, record: ConnectionMeta) -> Link | None: ...
    def links(self) -> list[Link]: ...
    @property
    def has_waiting(self) -> bool: ...
    def waiting(self) -> list[Link]:
        """Links that are waiting."""
    def message(self, payload: bytes | bytearray, is_text: bool, now_ns: int, key: str | None = None) -> Message: ...
    def push(
        self,
        message: Message,
        records: list[ConnectionMeta] | None,
        left_out: Iterable[ConnectionMeta] = (),
        is_late: bool = False,
        log: int = 0,
    ) -> list[ConnectionMeta]:
        """Append to the outbox of each record, or of all links; to be flushed, if *is_late*, after ``end_window``.

        *log* says how they are addressed: messages with the same number (of 64 bits) are kept together. 0: it is found
        out from who they are.

        Returns:
            The records that have no link.
        """
    def ping(
        self, payload: bytes, records: list[ConnectionMeta], now_ns: int
    ) -> tuple[list[Link], list[ConnectionMeta]]:
        """Send a ping to each record that has a link, before all that waits, and in the place of one that still waits.

        Returns:
            Those in the middle of a fragmented message, for which ``Link.take_ping`` can be written to the transport;
            and those that have no link, or whose link is closed.
        """
    @property
    def in_line(self) -> int:
        """Links that the next flush begins with."""
    @property
    def queued_bytes(self) -> int:
        """What is kept: messages, frames (each once), outboxes, and what transports have of blocked links."""
    @property
    def is_over(self) -> bool:
        """Whether that is more than allowed."""
    def end_window(self) -> None: ...
    def flush(self, now_ns: int, slice_ns: int) -> list[tuple[Link, int, Any]]:
        """Send to those in line until the slice has passed, at least to some.

        Returns:
            What is left to do: ``(link, THROUGH, None)``: write what it has through its adapter; ``(link, REST,
            data)``: the link is blocked, and *data*, bytes or a view, must go to its transport before anything else
            does; ``(link, FAILED, errno)``: it is closed.
        """
    @property
    def helpers(self) -> int: ...
    @helpers.setter
    def helpers(self, value: int) -> None: ...
    @property
    def wants_reports(self) -> bool: ...
    @wants_reports.setter
    def wants_reports(self, value: bool) -> None: ...
    def expire(self, now_ns: int) -> None:
        """Judge the waiting links by age."""
    def shed(self, now_ns: int) -> None:
        """If too much is kept, take it from those for whom most waits."""
    @property
    def has_reports(self) -> bool: ...
    def take_reports(self) -> list[tuple[Link, int, int, int, int, float]]:
        """What has happened since: ``(link, what, cause, messages, bytes, age_s)``. *what* is ``DROPPED`` or
        ``CONFLATED`` (both only if they are wanted), or ``TOO_SLOW``: given up. *cause* is one of ``CAUSES``."""
    def stats(self) -> dict[str, Any]: ...
    def _check(self) -> None:
        """In a debug build, abort if an invariant of the structures is broken."""
    def close(self) -> None:
        """End the helpers. What has links still works, on one thread."""

def _live() -> dict[str, int] | None: ...
