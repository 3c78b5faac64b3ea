"""The contract of ``wsfast._health``: what is known of the health of connections, and what follows from it.

``wsfast.reference.Health`` honours it too, for any record. What each number means stands in csrc/vitals.h, and in
``wsfast.health.HealthPolicy``, which makes the settings. Times are integer nanoseconds of ``time.monotonic_ns``, or of
the health clock where the name ends in ``_h``.

Threads: the event loop's only.
"""

from typing import Any, Final, Self, TypeAlias, final

from wsfast._core import ConnectionMeta

__all__ = ["CAN_LIMIT_RTO", "HAS_TCP_INFO", "Health"]

HAS_TCP_INFO: Final[bool]
CAN_LIMIT_RTO: Final[bool]
"""Whether the kernel of this machine can be asked for a shortest pause between retransmissions."""

SUSPECT: Final[int]
CLEARED: Final[int]
DEAD: Final[int]
PING_FAILED: Final[int]
NEW_GRADE: Final[int]
LATE: Final[int]
UNASKED: Final[int]

BY_SILENCE: Final[int]
BY_NO_PONG: Final[int]

TRACE: Final[tuple[str, ...]]
"""What the entries of a trace tell, by number."""

_Facts: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int]

@final
class Health:
    """The health of the connections of one registry.

    Args:
        settings: the fields of ``wsf_health_settings`` by name.
        now_ns: the time.
    """

    def __new__(cls, settings: dict[str, Any], now_ns: int) -> Self: ...
    def __len__(self) -> int: ...
    def __contains__(self, record: object, /) -> bool: ...
    def add(self, record: ConnectionMeta, now_ns: int, chance: int = 0, fd: int = -1, most_rto_ms: int = 0) -> None:
        """Begin with a connection.

        Args:
            chance: 0 to 65535, when in its interval the first ping comes.
            fd: its socket, whose kernel is asked; -1: none.
            most_rto_ms: longest pause between two retransmissions that the kernel is asked for; 0: as it is.

        Raises:
            TypeError: the record is not one of the core.
            ValueError: it is known already.
        """
    def remove(self, record: ConnectionMeta) -> bool:
        """End with a connection; False if it was not known."""
    def spare(self, record: ConnectionMeta, now_ns: int) -> None:
        """Forget all that speaks against a connection, as if something had come just now."""
    def at(self, now_ns: int) -> int:
        """The time on the health clock."""
    def tick(self, now_ns: int) -> int:
        """A tick has come; returns by how many nanoseconds it was late, which are credited."""
    def begin_sweep(self, now_ns: int) -> int:
        """The number of the sweep that begins, by which its pongs are known."""
    def look(
        self, records: list[ConnectionMeta], now_ns: int, facts: list[_Facts | None] | None = None
    ) -> tuple[list[ConnectionMeta], list[tuple[ConnectionMeta, int]]]:
        """Look at records that are due; each gets a new deadline.

        Args:
            facts: for each record what the kernel would say, ``(known, unacked, retransmits, rtt_us, last_sent_ms,
                last_ack_ms, bytes_acked, bytes_sent, bytes_retrans, notsent, unread)``, or None; in place of asking it.
                For tests and simulations.

        Returns:
            The records to ping, and what else was found: bits of ``SUSPECT``, ``CLEARED``, ``DEAD``, ``PING_FAILED``
            and ``NEW_GRADE``. Records that are not known, or whose status is after ``SUSPECT``, are left alone.

        Raises:
            TypeError: a record is not one of the core.
            ValueError: there are not as many *facts* as *records*.
        """
    def pong(self, record: ConnectionMeta, number: int, left_ns: int, now_ns: int) -> int:
        """A pong has come.

        Args:
            number: of the sweep that it answers; 0: of none.
            left_ns: when the last ping to this connection left; 0: with its sweep.

        Returns:
            Bits of ``CLEARED``, ``NEW_GRADE``, ``LATE`` and ``UNASKED``.
        """
    def stuck(self, record: ConnectionMeta, now_ns: int, is_stuck: bool, size: int = 0) -> None:
        """The last ping cannot leave, or can now. *size*: bytes before it."""
    def figures(self, record: ConnectionMeta, now_ns: int) -> dict[str, int]:
        """What is known. KeyError: nothing is."""
    def trace(self, record: ConnectionMeta) -> list[tuple[int, int, int]]:
        """The last entries: time, what (see ``TRACE``), value. KeyError: nothing is known."""
    def totals(self) -> dict[str, Any]: ...
