"""Which connections are good, bad or dead: facts and a clock in, actions out.

What the monitor of a manager does with a connection:

- **A sign of life** is any byte that came, and, where the kernel tells (Linux) and is the peer's own rather than a
  proxy's, any acknowledgement. A connection that gives none for its interval is sent a ping.
- **Suspect** it becomes when the answer is late, or when what was sent is not acknowledged in time. Up to
  ``HealthPolicy.probes`` more pings follow quickly. Any byte clears it.
- **Dead** it is when there was no sign of life at all for ``silence_s``, or when the peer's kernel answers, but its
  program has left a ping unanswered for ``timeout_s``. What has come and only was not read yet counts as a sign.
- **Our own lateness** is never held against it. All times are told by a clock that stands still from the moment when
  a tick of the loop was due until it came; round trips measured across such a delay are thrown away.
- **How often it is asked** depends on it, and on what connections like it have shown: one whose answers may take long
  must be asked sooner, to be found dead in the same time.

Round trips are smoothed as in RFC 6298; jitter is that of RFC 3550, 6.4.1. On TCP a ping is never lost, only late:
*loss* is the share of the last 32 pings that were not answered in time.

The arithmetic is the core's (csrc/vitals.h), or that of ``wsfast.reference`` for registries in pure Python. Nothing
here waits or knows a loop: ``wsfast.heartbeat`` does.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from wsfast._health import (
    BY_NO_PONG,
    CAN_LIMIT_RTO,
    DEAD,
    LATE,
    PING_FAILED,
    SUSPECT,
    TRACE,
    UNASKED,
    Health,
)
from wsfast.errors import InvalidSetting, UnknownConnection

if TYPE_CHECKING:
    from wsfast._core import ConnectionMeta
    from wsfast.adapters import Closed

__all__ = ["HEALTH", "Entry", "Explanation", "Grade", "HealthMonitor", "HealthPolicy", "Look", "Thresholds", "Verdict"]

# Eight bytes that nobody guesses, so that a pong tells which ping it answers, and cannot be sent in advance.
_PAYLOAD_BYTES = 8

# Sweeps whose pongs are recognised; the core remembers as many.
_SWEEPS = 4096

_MOST_RTO_S = 120.0


class Grade(IntEnum):
    """How good a connection is, from the best to the worst."""

    GOOD = 0
    FAIR = 1
    POOR = 2
    BAD = 3


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Above any of these, a connection has the grade that they are of, or a worse one.

    Attributes:
        latency_s: smoothed round-trip time.
        jitter_s: of the round-trip time.
        loss: share of the last pings that were answered late or not at all.
        retransmitted: share of the bytes that the kernel has sent more than once.
    """

    latency_s: float
    jitter_s: float
    loss: float
    retransmitted: float


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """When a connection is asked, suspected and given up. Times are seconds, shares are from 0 to 1.

    Attributes:
        ping_interval_s: longest time without a sign of life, on a good connection, after which it is sent a ping.
        poor_interval_s: the same on a poor one: latency above ``poor_latency_s``, or loss above ``poor_loss``.
        shortest_interval_s: it is never asked more often than this, unless it is suspect.
        silence_s: without any sign of life, after which a connection is dead. By default 23, or 28 where the kernel
            cannot be asked for ``retransmit_s``: it takes longer there to notice that a link is back.
        timeout_s: that a peer whose kernel answers may leave a ping unanswered.
        bad_factor: by which ``silence_s`` and ``timeout_s`` are longer if loss is above ``bad_loss``.
        answer_s: a question is given at least this, whatever the silence before it was.
        late_s: an answer is late after this, or after what the round trips so far make likely, if that is longer.
        probes, probe_interval_s: how many more pings follow when an answer is late, and how quickly.
        ping_deadline_s: for a ping to leave for the kernel. Beyond it the connection is suspect with the reason
            ``ping_failed``. Whether it is too slow is a matter of ``Backpressure``.
        acks_s: longest time without a byte during which acknowledgements are enough.
        kernel: whether the kernel is asked (``TCP_INFO``). Without it, bytes are the only signs of life.
        retransmit_s: longest pause between two retransmissions that the kernel is asked for (``TCP_RTO_MAX_MS``, from
            1 s; Linux 6.15). By itself it doubles them up to two minutes, and notices as late as that that a link is
            back. As it gives a connection up after some 14 of them, it is asked for no less than a twelfth of
            ``silence_s``. None: leave it alone.
        pings_per_h: of a connection, on average over all, that may be spent; None: as many as the risk asks for.
        waits_per_1000h: the risk to begin with: how often in 1,000 hours an answer may take longer than it is allowed.
            What may be spent decides later.
        expected_wait_s: how long an answer may take on connections of which little is known.
        learning_interval_s, learning_s: how often, and for how long, some young connections are asked to find that out.
        peak_half_life_s: after which the longest wait of a connection counts half.
        fair, poor, bad: what makes the grade.
        calm: times in a row that a connection must have been better before its grade is.
        tick_s: how often the manager looks who is due; what is late is found up to this much later.
        lateness_s: a tick later than this was late.
        explain: events that are remembered of each connection, 16 bytes each; 0: none, which costs nothing.
        explain_closed: closed connections of which they are kept.
        code, reason: of the close frame to a dead connection, in case it can still be read. 4408, after the 408 of
            HTTP: a client that is told this may come back at once.
    """

    ping_interval_s: float = 16.0
    poor_interval_s: float = 8.0
    shortest_interval_s: float = 2.0
    silence_s: float = 23.0 if CAN_LIMIT_RTO else 28.0
    timeout_s: float = 30.0
    bad_factor: int = 2
    poor_latency_s: float = 0.1
    poor_loss: float = 0.1
    bad_loss: float = 0.2
    answer_s: float = 3.0
    late_s: float = 1.0
    probes: int = 2
    probe_interval_s: float = 2.0
    ping_deadline_s: float = 5.0
    acks_s: float = 30.0
    kernel: bool = True
    retransmit_s: float | None = 2.0
    pings_per_h: float | None = 177.0
    waits_per_1000h: float = 60.0
    expected_wait_s: float = 10.0
    learning_interval_s: float = 5.0
    learning_s: float = 600.0
    peak_half_life_s: float = 300.0
    fair: Thresholds = Thresholds(0.05, 0.03, 0.03, 0.02)
    poor: Thresholds = Thresholds(0.1, 0.1, 0.1, 0.05)
    bad: Thresholds = Thresholds(1.0, 0.5, 0.2, 0.2)
    calm: int = 4
    tick_s: float = 0.25
    lateness_s: float = 0.05
    explain: int = 16
    explain_closed: int = 1000
    code: int = 4408
    reason: str = "no sign of life"

    @classmethod
    def lan(cls) -> HealthPolicy:
        """For links inside one building: a dead one is found after 6 seconds, for four times as many pings."""
        return cls.every(4.0)

    @classmethod
    def internet(cls) -> HealthPolicy:
        """The default."""
        return cls()

    @classmethod
    def mobile(cls) -> HealthPolicy:
        """For telephones, whose batteries pings cost: half as many as by default, and found dead twice as late."""
        return cls.every(32.0)

    @classmethod
    def every(cls, seconds: float, /, **settings: Any) -> HealthPolicy:
        """The default with another ``ping_interval_s``, other times of a connection in proportion, and *settings*."""
        default = cls()
        if not 0 < seconds < 1e6:
            raise InvalidSetting("health.ping_interval_s", seconds, "more than 0, and less than 10**6")
        ratio = seconds / default.ping_interval_s
        scaled = {name: getattr(default, name) * ratio for name in _PROPORTIONAL}
        return cls(
            **{
                **scaled,
                "ping_interval_s": seconds,
                "pings_per_h": (default.pings_per_h or 0) / ratio or None,
                "retransmit_s": min(max(2.0 * ratio, 1.0), _MOST_RTO_S),
                "late_s": min(default.late_s, default.late_s * ratio * 2),
                "tick_s": min(default.tick_s, seconds / 16),
                "ping_deadline_s": min(default.ping_deadline_s, default.ping_deadline_s * ratio),
                "lateness_s": min(default.lateness_s, scaled["silence_s"] / 20),
                **settings,
            }
        )

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not 1e-6 <= getattr(self, name) < 1e6:
                raise InvalidSetting(f"health.{name}", getattr(self, name), "from 10**-6 to less than 10**6")
        for name in ("poor_loss", "bad_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidSetting(f"health.{name}", getattr(self, name), "from 0 to 1")
        for name, least, most in _WHOLE:
            if not (isinstance(getattr(self, name), int) and least <= getattr(self, name) <= most):
                raise InvalidSetting(f"health.{name}", getattr(self, name), f"a whole number from {least} to {most}")
        if not self.silence_s > self.shortest_interval_s + self.answer_s:
            raise InvalidSetting(
                "health.silence_s", self.silence_s, "more than shortest_interval_s and answer_s together"
            )
        if self.shortest_interval_s > min(self.ping_interval_s, self.poor_interval_s, self.learning_interval_s):
            raise InvalidSetting(
                "health.shortest_interval_s", self.shortest_interval_s, "no more than the other intervals"
            )
        if self.retransmit_s is not None and not 1 <= self.retransmit_s <= _MOST_RTO_S:
            raise InvalidSetting("health.retransmit_s", self.retransmit_s, "from 1 to 120, or None")
        if self.pings_per_h is not None and not self.pings_per_h > 0:
            raise InvalidSetting("health.pings_per_h", self.pings_per_h, "more than 0, or None")

        limits = [astuple(each) for each in (self.fair, self.poor, self.bad)]
        for better, worse in pairwise([(0.0,) * 4, *limits]):
            if not all(0 <= low <= high < 4000 for low, high in zip(better, worse, strict=True)):
                raise InvalidSetting(
                    "health.fair, poor, bad", worse, "from 0 to 4000, and no lower than the better grade's"
                )

    def settings(self) -> dict[str, Any]:
        """The same as the core takes it."""
        return {
            "silence_ns": _ns(self.silence_s),
            "timeout_ns": _ns(self.timeout_s),
            "answer_ns": _ns(self.answer_s),
            "write_ns": _ns(self.ping_deadline_s),
            "interval_ns": _ns(self.ping_interval_s),
            "interval_poor_ns": _ns(self.poor_interval_s),
            "interval_min_ns": _ns(self.shortest_interval_s),
            "interval_learn_ns": _ns(self.learning_interval_s),
            "learn_ns": _ns(self.learning_s),
            "by_acks_ns": _ns(self.acks_s),
            "late_ns": _ns(self.late_s),
            "probe_ns": _ns(self.probe_interval_s),
            "prior_wait_ns": _ns(self.expected_wait_s),
            "peak_half_ns": _ns(self.peak_half_life_s),
            "tick_ns": _ns(self.tick_s),
            "slack_ns": _ns(self.lateness_s),
            "probes": self.probes,
            "bad_factor": self.bad_factor,
            "poor_latency_us": _us(self.poor_latency_s),
            "poor_loss": _thousandths(self.poor_loss),
            "bad_loss": _thousandths(self.bad_loss),
            "limits": [
                [_us(each.latency_s), _us(each.jitter_s), _thousandths(each.loss), _thousandths(each.retransmitted)]
                for each in (self.fair, self.poor, self.bad)
            ],
            "calm": self.calm,
            "trace": self.explain,
            "risk_per_1000h": float(self.waits_per_1000h),
            "pings_per_h": float(self.pings_per_h or 0),
        }


# Times of a connection, which go with its interval.
_PROPORTIONAL = (
    "poor_interval_s",
    "shortest_interval_s",
    "silence_s",
    "timeout_s",
    "answer_s",
    "probe_interval_s",
    "acks_s",
    "expected_wait_s",
    "learning_interval_s",
)
_POSITIVE = (
    *_PROPORTIONAL,
    "ping_interval_s",
    "late_s",
    "ping_deadline_s",
    "learning_s",
    "peak_half_life_s",
    "tick_s",
    "lateness_s",
    "waits_per_1000h",
    "poor_latency_s",
)
_WHOLE = (
    ("probes", 0, 100),
    ("bad_factor", 1, 100),
    ("calm", 1, 255),
    ("explain", 0, 10_000),
    ("explain_closed", 0, 10**9),
)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _us(seconds: float) -> int:
    return min(round(seconds * 1e6), 2**32 - 1)


def _thousandths(share: float) -> int:
    return round(share * 1000)


HEALTH = HealthPolicy()
"""The default."""


class Verdict(NamedTuple):
    """What a look at a connection has found: bits of ``SUSPECT``, ``CLEARED``, ``DEAD``, ``PING_FAILED`` and
    ``NEW_GRADE`` of ``wsfast._health``.
    """

    record: ConnectionMeta
    found: int


class Look(NamedTuple):
    """What is to be done after a look at connections that were due."""

    pings: list[ConnectionMeta]
    verdicts: list[Verdict]


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that happened to a connection.

    Attributes:
        at_s: seconds since it was opened.
        what: "ping" (not answered), "pong" and "late" (answered, at the time of the ping), "suspect", "cleared", "lag"
            (of our own loop), "stuck" and "left" (a ping that could not leave us, and when it did), "unread" (something
            had come that we had not read), "grade", "dead".
        value: of "pong" and "late": the round trip in seconds; of "suspect": the silence before it in seconds; of "lag"
            and "left": seconds; of "stuck" and "unread": bytes; of "grade": the ``Grade``; otherwise 0.
    """

    at_s: float
    what: str
    value: float

    def __str__(self) -> str:
        return f"{self.at_s:10.3f} s  {_TOLD[self.what](self.value)}"


_TOLD: dict[str, Callable[[float], str]] = {
    "ping": lambda value: "ping, not answered",
    "pong": lambda value: f"ping, answered after {value * 1000:.1f} ms",
    "late": lambda value: f"ping, answered late, after {value:.3f} s",
    "suspect": lambda value: f"suspect: no sign of life for {value:.3f} s",
    "cleared": lambda value: "no longer suspect",
    "lag": lambda value: f"our own loop was late by {value:.3f} s, which is credited",
    "stuck": lambda value: f"a ping cannot leave, {value:.0f} bytes are before it",
    "left": lambda value: f"the ping has left after {value:.3f} s",
    "unread": lambda value: f"alive: {value:.0f} bytes have come that we have not read",
    "grade": lambda value: f"now {Grade(int(value)).name.lower()}",
    "dead": lambda value: "dead",
}
_UNITS = {"pong": 1e6, "late": 1e6, "suspect": 1e3, "lag": 1e3, "left": 1e3}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of the health of a connection, now or at its end, and what happened last. As ``str``, a report.

    Attributes:
        client_id: of the connection.
        grade: of the connection.
        age_s: seconds since it was opened; until its end, if it has ended.
        silence_s: seconds since the last sign of life.
        interval_s: of silence, after which it is asked.
        latency_s, latency_variation_s, shortest_latency_s, jitter_s: SRTT, RTTVAR and minimum of its round trips, and
            their jitter; 0: not measured.
        loss, retransmitted: shares, see ``Thresholds``.
        kernel_latency_s: what the kernel takes for the round-trip time; 0: it does not tell.
        unacknowledged: segments that were not acknowledged when the kernel was asked last.
        pings, late: how many it was sent, and how many of them were not answered in time.
        queue_peak_bytes: most that ever waited for it.
        entries: what happened, the oldest first. As many as ``HealthPolicy.explain`` says.
        closed: code, reason, and who has closed it; None: it is open.
        previous: of the connection that had this id before, if that is remembered.
    """

    client_id: str
    grade: Grade
    age_s: float
    silence_s: float
    interval_s: float
    latency_s: float
    latency_variation_s: float
    shortest_latency_s: float
    jitter_s: float
    loss: float
    retransmitted: float
    kernel_latency_s: float
    unacknowledged: int
    pings: int
    late: int
    queue_peak_bytes: int
    entries: tuple[Entry, ...]
    closed: tuple[int, str, str] | None = None
    previous: Explanation | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if self.closed is None:
            fate = f"open for {self.age_s:.3f} s"
        else:
            code, reason, by = self.closed
            fate = f"closed by {by} after {self.age_s:.3f} s: {code} {reason}".rstrip()
        lines = [
            f"{self.client_id}: {fate}",
            f"  {self.grade.name.lower()}; last sign of life {self.silence_s:.3f} s ago; "
            f"asked after {self.interval_s:.3f} s",
            f"  latency {self.latency_s * 1000:.1f} ms, at best {self.shortest_latency_s * 1000:.1f}, variation "
            f"{self.latency_variation_s * 1000:.1f}, jitter {self.jitter_s * 1000:.1f}; the kernel's "
            f"{self.kernel_latency_s * 1000:.1f}",
            f"  {self.late} of {self.pings} pings late, {self.loss:.1%} of the last; {self.retransmitted:.1%} "
            f"retransmitted, {self.unacknowledged} segments not acknowledged; at most {self.queue_peak_bytes} bytes "
            "waited",
        ]
        return "\n".join([*lines, *map(str, self.entries)])


class _Story(NamedTuple):
    """What an explanation is made from when somebody asks."""

    figures: dict[str, int]
    trace: list[tuple[int, int, int]]
    created_ns: int
    ended_ns: int
    queue_peak_bytes: int
    closed: Closed | None  # None: it is open


class HealthMonitor:
    """The health of a manager's connections, sans I/O: time, kernel and randomness are passed in.

    Args:
        policy: the numbers.
        now_ns: the time.
        health: the implementation: of the core, or ``wsfast.reference.Health``.
        random: like ``os.urandom``.

    Attributes:
        policy: as given.
        pongs, late_pongs, unasked_pongs: how many have come.
        suspects, deaths, failed_pings: how often a connection has become suspect, was given up, and could not be pinged
            in time.
        late_s: how long the loop was late, in all.

    Threads: the event loop's only.
    """

    def __init__(
        self,
        policy: HealthPolicy = HEALTH,
        *,
        now_ns: int,
        health: Callable[[dict[str, Any], int], Any] = Health,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.policy = policy
        self.pongs = self.late_pongs = self.unasked_pongs = 0
        self.suspects = self.deaths = self.failed_pings = 0
        self.late_s = 0.0
        self._health = health(policy.settings(), now_ns)
        self._random = random
        self._most_rto_ms = 0
        if policy.retransmit_s is not None:
            self._most_rto_ms = round(min(max(policy.retransmit_s, policy.silence_s / 12), _MOST_RTO_S) * 1000)
        self._numbers: dict[bytes, int] = {}
        self._payloads: deque[bytes] = deque()
        self._ended: OrderedDict[str, _Story] = OrderedDict()

    def __len__(self) -> int:
        return len(self._health)

    # ---- connections

    def admit(self, record: ConnectionMeta, now_ns: int, fd: int = -1) -> None:
        """Begin with a connection, whose first ping comes at a random time within its interval.

        Args:
            record: of the connection. Its deadline, status and quality are the monitor's from now on.
            now_ns: the time.
            fd: its socket, for the kernel to be asked; -1: none.
        """
        chance = int.from_bytes(self._random(2), "big")
        self._health.add(record, now_ns, chance, fd if self.policy.kernel else -1, self._most_rto_ms)

    def forget(self, record: ConnectionMeta, now_ns: int, closed: Closed, queue_peak_bytes: int) -> None:
        """End with a connection, and remember why it ended."""
        if record not in self._health:
            return
        if self.policy.explain and self.policy.explain_closed:
            self._ended.pop(record.client_id, None)
            self._ended[record.client_id] = _Story(
                self._health.figures(record, now_ns),
                self._health.trace(record),
                record.created_ns,
                now_ns,
                queue_peak_bytes,
                closed,
            )
            if len(self._ended) > self.policy.explain_closed:
                self._ended.popitem(last=False)
        self._health.remove(record)

    # ---- time

    def at(self, now_ns: int) -> int:
        """The time on the health clock, which is that of the deadlines of records."""
        return self._health.at(now_ns)  # type: ignore[no-any-return]

    def start(self, now_ns: int) -> None:
        """The ticks begin: what has passed up to now was no lateness."""
        self._health.tick(now_ns)

    def tick(self, now_ns: int) -> float:
        """A tick of the loop has come. It must do so every ``tick_s``; by how much it was late is credited to all.

        Returns:
            The lateness, in seconds.
        """
        late_s: float = self._health.tick(now_ns) / 1e9
        self.late_s += late_s
        return late_s

    # ---- sweeps

    def begin_sweep(self, now_ns: int) -> bytes:
        """Returns the payload of the pings of the sweep that begins."""
        number = self._health.begin_sweep(now_ns)
        payload = self._random(_PAYLOAD_BYTES)
        self._numbers[payload] = number
        self._payloads.append(payload)
        if len(self._payloads) > _SWEEPS:
            self._numbers.pop(self._payloads.popleft(), None)
        return payload

    def look(self, records: list[ConnectionMeta], now_ns: int, facts: list[Any] | None = None) -> Look:
        """Look at connections that are due (``Registry.due`` by the health clock). Each gets a new deadline.

        Args:
            records: of the connections.
            now_ns: the time.
            facts: in place of what the kernel would say; see ``wsfast._health.Health.look``.
        """
        pings, found = self._health.look(records, now_ns, facts)
        for _, what in found:
            self.suspects += bool(what & SUSPECT)
            self.deaths += bool(what & DEAD)
            self.failed_pings += bool(what & PING_FAILED)
        return Look(pings, [Verdict(*each) for each in found])

    def pong(self, record: ConnectionMeta, payload: bytes, left_ns: int, now_ns: int) -> int:
        """A pong has come.

        Args:
            record: from whom.
            payload: of any kind: what answers no ping of ours to this connection is a sign of life and nothing else.
            left_ns: when the last ping left for the kernel; 0: with its sweep.
            now_ns: the time.

        Returns:
            Bits of ``CLEARED``, ``NEW_GRADE``, ``LATE`` and ``UNASKED`` of ``wsfast._health``.
        """
        found: int = self._health.pong(record, self._numbers.get(payload, 0), left_ns, now_ns)
        self.pongs += 1
        if found & (LATE | UNASKED):
            self.late_pongs += bool(found & LATE)
            self.unasked_pongs += bool(found & UNASKED)
        return found

    def stuck(self, record: ConnectionMeta, now_ns: int, is_stuck: bool, nbytes: int) -> None:
        """The last ping cannot leave for the kernel, behind so many bytes, or now it can."""
        self._health.stuck(record, now_ns, is_stuck, nbytes)

    def spare(self, record: ConnectionMeta, now_ns: int) -> None:
        """Forget all that speaks against a connection: there is a reason that the monitor cannot see."""
        self._health.spare(record, now_ns)

    # ---- what is known

    def grade(self, record: ConnectionMeta) -> Grade:
        """The grade of a connection; KeyError: it is not known."""
        return self.grades(record)[0]

    def grades(self, record: ConnectionMeta) -> tuple[Grade, Grade]:
        """The grade of a connection, and the one before; KeyError: it is not known."""
        figures = self._health.figures(record, 0)
        return Grade(figures["grade"]), Grade(figures["former_grade"])

    def why_dead(self, record: ConnectionMeta, now_ns: int) -> str:
        """The reason for closing a connection that was found dead."""
        figures = self._health.figures(record, now_ns)
        if figures["cause"] == BY_NO_PONG:
            return f"{self.policy.reason}: a ping was not answered in time"
        return f"{self.policy.reason} for {figures['silent_ns'] / 1e9:.1f} s"

    def silent_s(self, record: ConnectionMeta, now_ns: int) -> float:
        """Seconds since the last sign of life."""
        return float(self._health.figures(record, now_ns)["silent_ns"]) / 1e9

    def explain(self, client_id: str, record: ConnectionMeta | None, now_ns: int, queue_peak_bytes: int) -> Explanation:
        """What has happened to a connection.

        Args:
            client_id: its id.
            record: of the connection that has this id now; None: there is none.
            now_ns: the time.
            queue_peak_bytes: of that connection.

        Raises:
            UnknownConnection: there is none, and none that has ended is remembered.
        """
        ended = self._ended.get(client_id)
        previous = None if ended is None else _explanation(client_id, ended)
        if record is None or record not in self._health:
            if previous is None:
                raise UnknownConnection(client_id)
            return previous
        figures, trace = self._health.figures(record, now_ns), self._health.trace(record)
        story = _Story(figures, trace, record.created_ns, now_ns, queue_peak_bytes, None)
        return _explanation(client_id, story, previous)

    def stats(self) -> dict[str, int]:
        """Totals, see ``ConnectionManager.stats``."""
        return {
            "pongs": self.pongs,
            "late_pongs": self.late_pongs,
            "unasked_pongs": self.unasked_pongs,
            "suspects": self.suspects,
            "deaths": self.deaths,
            "failed_pings": self.failed_pings,
            "late_ms": round(self.late_s * 1000),
        }


def _explanation(client_id: str, ended: _Story, previous: Explanation | None = None) -> Explanation:
    figures = ended.figures
    return Explanation(
        client_id=client_id,
        grade=Grade(figures["grade"]),
        age_s=(ended.ended_ns - ended.created_ns) / 1e9,
        silence_s=figures["silent_ns"] / 1e9,
        interval_s=figures["interval_ns"] / 1e9,
        latency_s=figures["srtt_us"] / 1e6,
        latency_variation_s=figures["rttvar_us"] / 1e6,
        shortest_latency_s=figures["min_rtt_us"] / 1e6,
        jitter_s=figures["jitter_us"] / 1e6,
        loss=figures["loss"] / 1e3,
        retransmitted=figures["retransmitted"] / 1e3,
        kernel_latency_s=figures["kernel_rtt_us"] / 1e6,
        unacknowledged=figures["unacked"],
        pings=figures["pings"],
        late=figures["late"],
        queue_peak_bytes=ended.queue_peak_bytes,
        entries=tuple(
            Entry((at_ns - ended.created_ns) / 1e9, TRACE[what], value / _UNITS.get(TRACE[what], 1))
            for at_ns, what, value in ended.trace
        ),
        closed=None if ended.closed is None else ended.closed[:3],
        previous=previous,
    )
