"""Whether, when and how often a lost connection is tried again: facts, time and randomness in, waits out.

What decides, from what matters most to what matters least:

- **The close code.** Some forbid coming back, some ask to take time, some mean that one may hurry (``CLOSE_CODES``).
- **What the server told** (``Advice``): when this client is to come back, and over how many seconds all of them are to
  spread. Only the server knows how many there are, so only it can keep a herd apart.
- **A strategy**, where the server told nothing. By default it is chosen by the quality of the link that was lost, and
  its waits are longer or shorter by the client's level, which is learned from its history (``PolicyEngine``).
- **A budget** that all clients of one process may share (``RetryBudget``).

``Reconnector`` puts them together for one client. The server's side is here too: ``Slots`` spreads connections that
are closed, ``Admission`` lets in so many per second and tells the others when to come back, and ``Herd`` puts these
together for one server.

Invariants that others rely on:

- Every wait is random, but for those of ``FixedInterval``, which is the baseline, and for a client's turn in a budget.
- Attempts are over only when a connection has lasted for ``ReconnectPolicy.lasting_s``: one that was made and dropped
  at once is one more failure.
- Clients that were told a spread wait a random part of it first, and no less than all of it between two attempts; when
  they lose a connection that has not lasted, all of it and a random part. So the rate that is expected of all of them
  together does not rise above connections / spread, however long the outage, and however often it comes back at once.
- What a peer tells is bounded, by ``most_told_s`` and ``least_told_s``: it can neither keep a client away for good nor
  make it spin.

Times are seconds: ``now_s`` of any clock that does not go back, waits from now on. ``random`` is a function that
returns a float from 0 up to, but not including, 1, as ``random.random`` and JavaScript's ``Math.random`` do; each
formula says how often it is called. Nothing here waits, reads a clock or opens a connection. No object here may be used
by two threads at once, but for the frozen ones.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum, IntEnum
from typing import Literal, NamedTuple, Protocol

from wsfast.errors import InvalidSetting

__all__ = [
    "CLOSE_CODES",
    "HERD",
    "RECONNECT",
    "Admission",
    "Advice",
    "Aggressive",
    "CloseCodes",
    "Conservative",
    "Decision",
    "DecorrelatedJitter",
    "Default",
    "EqualJitter",
    "ExponentialBackoff",
    "FixedInterval",
    "FullJitter",
    "Herd",
    "HerdPolicy",
    "Level",
    "PolicyEngine",
    "Random",
    "ReconnectHistory",
    "ReconnectPolicy",
    "ReconnectStrategy",
    "Reconnector",
    "RetryBudget",
    "Slots",
    "TokenBucket",
    "Verdict",
    "check_close",
    "verdict_of",
]

Random = Callable[[], float]
"""Returns a float from 0 up to, but not including, 1."""

# 2**64 times the least base there may be is above every cap, and a float holds it times the largest.
_MOST_DOUBLINGS = 64

# What a wait may be set to; so that products and sums of a few stay exact enough, and far from infinity.
_LEAST_S, _MOST_S = 1e-6, 1e6

_LEAST_RATE, _MOST_RATE = 1e-6, 1e9

# Longer texts are no number of seconds that anybody means.
_MOST_CHARACTERS = 128

# RFC 6455, 5.5: a control frame has at most 125 bytes, of which the close code takes two.
_MOST_REASON_BYTES = 123

# What `_TOLD` reads at most.
_MOST_TOLD_S = 999_999_999.0


def _check(name: str, value: float, least: float, most: float, of: str = "reconnect") -> None:
    """Raise unless a number is within its bounds; NaN never is."""
    if not least <= value <= most:
        raise InvalidSetting(f"{of}.{name}", value, f"from {least:g} to {most:g}")


def _check_backoff(base_s: float, cap_s: float, max_attempts: int | None) -> None:
    _check("base_s", base_s, _LEAST_S, _MOST_S)
    _check("cap_s", cap_s, base_s, _MOST_S)
    _check_attempts(max_attempts)


def _check_attempts(max_attempts: int | None) -> None:
    if max_attempts is not None and not (isinstance(max_attempts, int) and max_attempts >= 0):
        raise InvalidSetting("reconnect.max_attempts", max_attempts, "a whole number from 0, or None")


# ---- strategies ------------------------------------------------------------------------------------------------------


class ReconnectStrategy(Protocol):
    """How one client that was told nothing tries again. It keeps no state, so that all clients can share it.

    ``attempt`` counts those that have failed since a connection last lasted: 0 before the first.
    """

    @property
    def max_attempts(self) -> int | None:
        """How many attempts it makes before it gives up; None: it never does."""

    def should_reconnect(self, attempt: int) -> bool:
        """Whether it makes one more attempt after so many that have failed."""

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        """How long to wait before the next attempt.

        Args:
            attempt: so many have failed.
            previous_s: what this returned before the last one; 0 before the first.
            random: see the module.
        """


class _Tries:
    """What all strategies here share: giving up is a matter of the number of attempts."""

    __slots__ = ()

    max_attempts: int | None

    def should_reconnect(self, attempt: int) -> bool:
        return self.max_attempts is None or attempt < self.max_attempts


def _backoff_s(base_s: float, cap_s: float, attempt: int) -> float:
    """``base * 2**attempt``, capped."""
    return min(cap_s, math.ldexp(base_s, min(attempt, _MOST_DOUBLINGS)))


@dataclass(frozen=True, slots=True)
class FixedInterval(_Tries):
    """``interval_s``, always, and gives up after three tries: what generation 1 does. The baseline, without jitter."""

    interval_s: float = 5.0
    max_attempts: int | None = 3

    def __post_init__(self) -> None:
        _check("interval_s", self.interval_s, _LEAST_S, _MOST_S)
        _check_attempts(self.max_attempts)

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return self.interval_s


@dataclass(frozen=True, slots=True)
class ExponentialBackoff(_Tries):
    """``b * (1 - jitter * random())`` with ``b = min(cap_s, base_s * 2**attempt)``.

    The share that is random is gRPC's (connection backoff), which puts it on both sides of ``b``: here a cap is a cap.
    A herd that starts together stays nearly together: prefer the strategies below. Calls ``random`` once.

    Attributes:
        base_s, cap_s: the first and the longest backoff.
        jitter: share of the backoff that is random: more than 0, up to 1, which makes it full jitter.
        max_attempts: see ``ReconnectStrategy``.
    """

    base_s: float = 1.0
    cap_s: float = 60.0
    jitter: float = 0.2
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        _check_backoff(self.base_s, self.cap_s, self.max_attempts)
        if not 0 < self.jitter <= 1:
            raise InvalidSetting("reconnect.jitter", self.jitter, "more than 0, up to 1")

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return _backoff_s(self.base_s, self.cap_s, attempt) * (1 - self.jitter * random())


@dataclass(frozen=True, slots=True)
class _Backoff(_Tries):
    """What the strategies of the article below have in common."""

    base_s: float = 1.0
    cap_s: float = 60.0
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        _check_backoff(self.base_s, self.cap_s, self.max_attempts)


@dataclass(frozen=True, slots=True)
class FullJitter(_Backoff):
    """``random() * min(cap_s, base_s * 2**attempt)``: "Full Jitter" of M. Brooker, "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015. Calls ``random`` once.
    """

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return _backoff_s(self.base_s, self.cap_s, attempt) * random()


@dataclass(frozen=True, slots=True)
class EqualJitter(_Backoff):
    """``b / 2 + random() * b / 2`` with ``b = min(cap_s, base_s * 2**attempt)``: "Equal Jitter" of the same article.
    Never soon, for a price in how well it spreads. Calls ``random`` once.
    """

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        half_s = _backoff_s(self.base_s, self.cap_s, attempt) / 2
        return half_s + half_s * random()


@dataclass(frozen=True, slots=True)
class DecorrelatedJitter(_Backoff):
    """``min(cap_s, base_s + random() * (3 * p - base_s))``, where ``p`` is the previous wait and at least ``base_s``:
    "Decorrelated Jitter" of the same article. Calls ``random`` once.

    Once waits come near the cap, most of them are the cap itself, as in the article: in long outages only the spread
    that came before is left.
    """

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        previous_s = max(self.base_s, previous_s)
        return min(self.cap_s, self.base_s + random() * (3 * previous_s - self.base_s))


@dataclass(frozen=True, slots=True)
class Default(FullJitter):
    """Full jitter that begins within 5 seconds, as RFC 6455, 7.2.3 has it, and ends within a minute."""

    base_s: float = 5.0
    cap_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Aggressive(FullJitter):
    """For links that are short and good: full jitter that begins within a second. The cap is centrifuge's."""

    base_s: float = 1.0
    cap_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Conservative(EqualJitter):
    """For links that lose much, where an attempt may fail for want of a link: never soon. The cap is gRPC's."""

    base_s: float = 5.0
    cap_s: float = 120.0


# ---- close codes -----------------------------------------------------------------------------------------------------


class Verdict(Enum):
    """What the end of a connection means for coming back."""

    FORBID = "forbid"
    """Do not: it would end in the same way, or somebody has decided so."""
    DELAY = "delay"
    """Take time: at least ``ReconnectPolicy.delay_least_s``."""
    NORMAL = "normal"
    HURRY = "hurry"
    """At once, as far as jitter allows: only this connection was at fault."""


class CloseCodes(NamedTuple):
    """A row of :data:`CLOSE_CODES`."""

    first: int
    last: int
    verdict: Verdict
    why: str


_F, _D, _N, _H = Verdict.FORBID, Verdict.DELAY, Verdict.NORMAL, Verdict.HURRY

CLOSE_CODES: tuple[CloseCodes, ...] = (
    # RFC 6455, 7.4.1, and the registry of IANA.
    CloseCodes(1000, 1000, _F, "done: what the connection was for has been fulfilled"),
    CloseCodes(1001, 1001, _N, "the server goes away"),
    CloseCodes(1002, 1003, _D, "we sent what the peer cannot take; it may be sent again"),
    CloseCodes(1004, 1004, _N, "reserved"),
    CloseCodes(1005, 1006, _N, "no code: the network, or a peer that gave none"),
    CloseCodes(1007, 1007, _D, "we sent a text that was not UTF-8; it may be sent again"),
    CloseCodes(1008, 1008, _F, "against the peer's policy: not allowed, or the id is taken"),
    CloseCodes(1009, 1009, _D, "we sent a message that is too big; it may be sent again"),
    CloseCodes(1010, 1010, _F, "the server lacks an extension that we need"),
    CloseCodes(1011, 1011, _N, "the peer failed; also what libraries say whose ping was not answered"),
    CloseCodes(1012, 1012, _D, "the service restarts: a random delay of 5 to 30 s is asked for (IANA)"),
    CloseCodes(1013, 1013, _D, "overloaded, or we are too slow: try again later"),
    CloseCodes(1014, 1014, _N, "a gateway got no answer"),
    CloseCodes(1015, 1015, _D, "TLS failed, which seldom heals at once"),
    CloseCodes(1016, 2999, _N, "reserved for the protocol and its extensions"),
    # For libraries, first come, first served: where the registry is silent, centrifuge's ranges.
    CloseCodes(3000, 3000, _F, "unauthorized (IANA)"),
    CloseCodes(3001, 3002, _N, "of a library"),
    CloseCodes(3003, 3003, _F, "forbidden (IANA)"),
    CloseCodes(3004, 3499, _N, "of a library, which may be tried again; 3008 is a timeout (IANA)"),
    CloseCodes(3500, 3999, _F, "of a library, terminal (centrifuge)"),
    # Private: what wsfast sends, after HTTP's 400 to 499; else centrifuge's ranges.
    CloseCodes(4000, 4399, _N, "of an application, which may be tried again"),
    CloseCodes(4400, 4401, _F, "a bad request; unauthorized"),
    CloseCodes(4402, 4402, _N, "of an application, which may be tried again"),
    CloseCodes(4403, 4404, _F, "forbidden; not found"),
    CloseCodes(4405, 4407, _N, "of an application, which may be tried again"),
    CloseCodes(4408, 4408, _H, "the server saw no sign of life"),
    CloseCodes(4409, 4409, _F, "a newer connection has taken the place"),
    CloseCodes(4410, 4410, _F, "gone for good"),
    CloseCodes(4411, 4428, _N, "of an application, which may be tried again"),
    CloseCodes(4429, 4429, _D, "too many requests"),
    CloseCodes(4430, 4499, _N, "of an application, which may be tried again"),
    CloseCodes(4500, 4999, _F, "of an application, terminal (centrifuge)"),
)
"""What each close code from 1000 to 4999 means for coming back: in order, without gaps."""

_FIRST_CODES = [row.first for row in CLOSE_CODES]


def verdict_of(code: int) -> Verdict:
    """What a close code means for coming back. One that is none, below 1000 or above 4999, is as good as 1006."""
    at = bisect_right(_FIRST_CODES, code) - 1
    if at < 0 or code > CLOSE_CODES[at].last:
        return Verdict.NORMAL
    return CLOSE_CODES[at].verdict


def check_close(code: int, reason: str) -> None:
    """Raise InvalidSetting unless an endpoint may send this in a close frame (RFC 6455, 7.4; the registry of IANA up to
    1014)."""
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise InvalidSetting("code", code, "1000 to 1003, 1007 to 1014, or 3000 to 4999")
    if len(reason.encode()) > _MOST_REASON_BYTES:
        raise InvalidSetting("reason", reason, f"at most {_MOST_REASON_BYTES} bytes in UTF-8")


# ---- what the server tells -------------------------------------------------------------------------------------------

_DELAY_SECONDS = re.compile(r"[0-9]+")
# A number of seconds as we write it: nothing that is negative, infinite, or no number can be told in a text.
_TOLD = re.compile(r"(?:^|;)\s*(retry-after|spread)=([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(?=;|$)", re.ASCII)


class Advice(NamedTuple):
    """What a server has told about coming back. Fields that make no sense, negative or NaN, count as not told."""

    after_s: float | None = None
    """From when it was told; None: the client may choose."""
    within_s: float = 0.0
    """At a random time within so many seconds after that. 0: the time is this client's own, and random already."""
    spread_s: float | None = None
    """Over which all clients of this server spread when they lose it; it stays valid until told otherwise."""

    @classmethod
    def from_retry_after(cls, text: str, wall_s: float | None = None) -> Advice | None:
        """Of the header ``Retry-After`` (RFC 9110, 10.2.3); None if it is malformed.

        It tells whole seconds, often the same to everybody: so a random time within a second, or within a tenth of
        what is told if that is more, goes on top.

        Args:
            text: the value of the header.
            wall_s: epoch seconds; without them, a date is as good as malformed.
        """
        text = text.strip()
        if len(text) > _MOST_CHARACTERS:
            return None
        if _DELAY_SECONDS.fullmatch(text):
            after_s = float(text)
        elif wall_s is None:
            return None
        else:
            try:
                date = parsedate_to_datetime(text)
                # A date of HTTP is in GMT, whatever it says or leaves out.
                after_s = max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - wall_s)
            except (ValueError, OverflowError):
                return None
        return cls(after_s, max(1.0, after_s / 10))

    @classmethod
    def from_reason(cls, reason: str) -> Advice | None:
        """Of the reason of a close frame: the first ``retry-after=SECONDS`` and the first ``spread=SECONDS``, which
        stand between semicolons; None if it has neither.
        """
        told: dict[str, float] = {}
        for name, seconds in _TOLD.findall(reason):
            told.setdefault(name, float(seconds))
        return cls(told.get("retry-after"), 0.0, told.get("spread")) if told else None

    def as_reason(self, text: str = "") -> str:
        """What :meth:`from_reason` reads, after a text for people, which is cut to what the reason of a close frame has
        room for: 123 bytes, of which times take up to 49. A time of 10**9 or more is told as one that is a little less.
        """
        parts = [
            f"{name}={min(seconds, _MOST_TOLD_S):.3f}"
            for name, seconds in (("retry-after", self.after_s), ("spread", self.spread_s))
            if seconds is not None
        ]
        room = _MOST_REASON_BYTES - sum(len(part) + 2 for part in parts)
        text = text.encode()[:room].decode(errors="ignore")
        return "; ".join([text, *parts] if text else parts)


def _told_s(seconds: float | None, most_s: float) -> float | None:
    """What a peer has told, bounded; None if it makes no sense."""
    return None if seconds is None or not seconds >= 0 else min(seconds, most_s)


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReconnectPolicy:
    """How clients come back. Times are seconds, shares are from 0 to 1.

    Attributes:
        default, conservative, aggressive: the strategies to choose from.
        conservative_loss: above this share of late pings, the conservative strategy is chosen.
        aggressive_latency_s: below this round-trip time, where it is known, the aggressive one is.
        lasting_s: a connection that ends sooner is one more attempt that has failed.
        least_told_s: however soon a server says, a further attempt waits for so long.
        most_told_s: whatever a server says, no time and no spread is taken for longer than this.
        spread_jitter: by which share of itself, at most and at random, a spread is longer after an attempt that failed.
            Those come spread already; whoever loses a connection loses it together with others, and gets a whole one.
        delay_least_s, delay_most_s: a code that asks to take time means a random time between these, if the server did
            not tell one. 5 and 30 are IANA's for 1012.
        hurry_s: a code that lets hurry means a random time within this.
        half_life_s: after which what is known of a client's past counts half.
        remembered: durations and close codes of a client that are kept.
        judged_from: attempts of which something must be known before there is a level other than ``NORMAL``.
        low_below, high_from: the level is ``LOW`` below the one success rate, ``HIGH`` from the other.
        low_pace, high_pace: what a strategy's waits are multiplied by at these levels.
    """

    default: ReconnectStrategy = Default()
    conservative: ReconnectStrategy = Conservative()
    aggressive: ReconnectStrategy = Aggressive()
    conservative_loss: float = 0.3
    aggressive_latency_s: float = 0.05
    lasting_s: float = 30.0
    least_told_s: float = 0.5
    most_told_s: float = 900.0
    spread_jitter: float = 0.1
    delay_least_s: float = 5.0
    delay_most_s: float = 30.0
    hurry_s: float = 1.0
    half_life_s: float = 600.0
    remembered: int = 8
    judged_from: int = 4
    low_below: float = 0.3
    high_from: float = 0.9
    low_pace: float = 2.0
    high_pace: float = 0.5

    @classmethod
    def only(cls, strategy: ReconnectStrategy) -> ReconnectPolicy:
        """One strategy, whatever the link was like and whatever is known of the past."""
        return cls(strategy, strategy, strategy, low_pace=1.0, high_pace=1.0)

    def __post_init__(self) -> None:
        for name in ("conservative_loss", "spread_jitter", "low_below", "high_from"):
            _check(name, getattr(self, name), 0, 1)
        for name in (
            "aggressive_latency_s",
            "lasting_s",
            "least_told_s",
            "most_told_s",
            "delay_least_s",
            "delay_most_s",
        ):
            _check(name, getattr(self, name), 0, _MOST_S)
        for name in ("hurry_s", "half_life_s"):
            _check(name, getattr(self, name), _LEAST_S, _MOST_S)
        for name in ("low_pace", "high_pace"):
            _check(name, getattr(self, name), 1e-3, 1e3)
        for name, least in (("remembered", 0), ("judged_from", 1)):
            if not (isinstance(getattr(self, name), int) and least <= getattr(self, name) <= 10_000):
                raise InvalidSetting(f"reconnect.{name}", getattr(self, name), f"a whole number from {least} to 10000")
        for low, high in _ORDERED:
            if getattr(self, low) > getattr(self, high):
                raise InvalidSetting(f"reconnect.{low}", getattr(self, low), f"no more than {high}")


_ORDERED = (("least_told_s", "most_told_s"), ("delay_least_s", "delay_most_s"), ("low_below", "high_from"))

RECONNECT = ReconnectPolicy()
"""The default."""


# ---- learning --------------------------------------------------------------------------------------------------------


class Level(IntEnum):
    """How eager a client may be, from what is known of its past."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


class ReconnectHistory:
    """What is known of one client's attempts. Bounded, and forgotten by halves.

    Args:
        half_life_s: after which attempts and successes count half.
        remembered: durations and codes that are kept.

    Attributes:
        durations_s: of the last connections, from the oldest to the newest.
        codes: with which the last connections were closed, likewise.
    """

    __slots__ = ("_at_s", "_attempts", "_half_life_s", "_remembered", "_successes", "codes", "durations_s")

    def __init__(self, half_life_s: float = RECONNECT.half_life_s, remembered: int = RECONNECT.remembered) -> None:
        self._half_life_s = half_life_s
        self._remembered = remembered
        self._attempts = self._successes = 0.0
        self._at_s = 0.0
        self.durations_s: tuple[float, ...] = ()
        self.codes: tuple[int, ...] = ()

    def failed(self, now_s: float) -> None:
        """An attempt led to no connection."""
        self._count(now_s, 0.0)

    def ended(self, now_s: float, lasted_s: float, code: int, *, succeeded: bool) -> None:
        """An attempt led to a connection, which has ended.

        Args:
            now_s: the time.
            lasted_s: how long it lasted.
            code: with which it was closed.
            succeeded: whether that was long enough.
        """
        self._count(now_s, float(succeeded))
        if self._remembered:
            self.durations_s = (*self.durations_s, lasted_s)[-self._remembered :]
            self.codes = (*self.codes, code)[-self._remembered :]

    def attempts(self, now_s: float) -> float:
        """How many, the older ones counting less."""
        return self._attempts * self._left(now_s)

    def successes(self, now_s: float) -> float:
        """How many of them led to a connection that lasted, the older ones counting less."""
        return self._successes * self._left(now_s)

    def success_rate(self) -> float | None:
        """Share of the attempts that led to a connection that lasted; None: there were none. It does not change while
        nothing happens: only how much it counts does.
        """
        return self._successes / self._attempts if self._attempts > 0 else None

    def _count(self, now_s: float, success: float) -> None:
        left = self._left(now_s)
        self._attempts = self._attempts * left + 1.0
        self._successes = self._successes * left + success
        self._at_s = now_s

    def _left(self, now_s: float) -> float:
        """What is left of one that counted 1."""
        return math.exp2(-max(0.0, now_s - self._at_s) / self._half_life_s)


class PolicyEngine:
    """Chooses by the numbers of a policy. It keeps no state: all clients can share it.

    Args:
        policy: the numbers.
    """

    def __init__(self, policy: ReconnectPolicy = RECONNECT) -> None:
        self.policy = policy

    def level(self, history: ReconnectHistory, now_s: float) -> Level:
        """How eager a client with this past may be."""
        rate = history.success_rate()
        if rate is None or history.attempts(now_s) < self.policy.judged_from:
            return Level.NORMAL
        if rate < self.policy.low_below:
            return Level.LOW
        return Level.HIGH if rate >= self.policy.high_from else Level.NORMAL

    def pace(self, level: Level) -> float:
        """What a strategy's waits are multiplied by."""
        if level is Level.NORMAL:
            return 1.0
        return self.policy.low_pace if level is Level.LOW else self.policy.high_pace

    def strategy(self, loss: float, latency_s: float) -> ReconnectStrategy:
        """The strategy for a link.

        Args:
            loss: share of its pings that were answered late or not at all.
            latency_s: its round-trip time; 0: not known.
        """
        if loss > self.policy.conservative_loss:
            return self.policy.conservative
        return self.policy.aggressive if 0 < latency_s < self.policy.aggressive_latency_s else self.policy.default


# ---- budgets ---------------------------------------------------------------------------------------------------------


class TokenBucket:
    """Tokens that come at a rate, up to a number that is kept.

    Args:
        rate_per_s: at which they come.
        burst: that are kept at most, and there at the beginning; at least 1.
        now_s: when it begins.
    """

    __slots__ = ("_at_s", "_tokens", "burst", "rate_per_s")

    def __init__(self, rate_per_s: float, burst: float, now_s: float = 0.0) -> None:
        _check("rate_per_s", rate_per_s, _LEAST_RATE, _MOST_RATE)
        _check("burst", burst, 1, 1e9)
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._tokens = float(burst)
        self._at_s = now_s

    def tokens(self, now_s: float) -> float:
        """How many there are; below 0: so many are owed."""
        # A clock that has gone back adds none, and takes none.
        self._tokens = min(self.burst, self._tokens + max(0.0, now_s - self._at_s) * self.rate_per_s)
        self._at_s = max(self._at_s, now_s)
        return self._tokens

    def take(self, now_s: float) -> bool:
        """Take one, if there is one."""
        if self.tokens(now_s) < 1:
            return False
        self._tokens -= 1
        return True

    def reserve(self, now_s: float) -> float:
        """Take one in any case. Returns seconds until it is there."""
        left = self.tokens(now_s) - 1
        self._tokens = left
        return max(0.0, -left / self.rate_per_s)

    def add(self, count: float) -> None:
        """Put some in, as many as there is room for."""
        self._tokens = min(self.burst, self._tokens + count)


class RetryBudget:
    """How many attempts all clients of one process may make together: so many per second, and a share of the
    connections that have lasted on top. Attempts beyond it are not refused, but wait for their turn. So when a process
    loses n connections at once, no more than burst + n * per_success + t * per_s attempts are made within t seconds.

    The numbers are Finagle's ("Retry Budgets", 2016): a fifth, and 10 per second, which are kept for 10 seconds.

    Args:
        per_s: attempts that may be made in any case. With thousands of clients in a process, set it to what one server
            may get from that process: the last of n clients waits for n / per_s.
        per_success: for each connection that has lasted.
        burst: that may be made at once.
        now_s: when it begins.
    """

    __slots__ = ("_bucket", "_per_success")

    def __init__(
        self, per_s: float = 10.0, *, per_success: float = 0.2, burst: float = 100.0, now_s: float = 0.0
    ) -> None:
        _check("per_success", per_success, 0, 1)
        self._bucket = TokenBucket(per_s, burst, now_s)
        self._per_success = per_success

    def succeeded(self) -> None:
        """A connection has lasted."""
        self._bucket.add(self._per_success)

    def wait_s(self, now_s: float) -> float:
        """Spend one attempt. Returns how long it must wait at least."""
        return self._bucket.reserve(now_s)


# ---- one client ------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What a client is to do next."""

    wait_s: float | None
    """Seconds until the next attempt; None: there is none."""
    attempt: int
    """So many have failed since a connection last lasted."""
    because: Literal["forbidden", "given up", "told", "spread", "delay", "hurry", "strategy", "budget"]
    """What decided it."""


class Reconnector:
    """Decides for one client what comes after each connection that was lost and each attempt that failed.

    Args:
        engine: with the policy.
        random: see the module.
        history: of this client; by default a new one.
        budget: that it shares with others.

    Attributes:
        attempt: so many have failed since a connection last lasted.
        history: what is known of this client.
        level: judged when a connection is lost, and kept until the next one is. So one long outage, where each attempt
            fails whoever makes it, does not count against a client while it lasts: the backoff is the answer to that.
        spread_s: what the server told of it; None: nothing. It is kept through failures, and replaced by what is told
            later.
    """

    __slots__ = (
        "_budget",
        "_previous_s",
        "_random",
        "_strategy",
        "attempt",
        "engine",
        "history",
        "level",
        "spread_s",
    )

    def __init__(
        self,
        engine: PolicyEngine,
        random: Random,
        *,
        history: ReconnectHistory | None = None,
        budget: RetryBudget | None = None,
    ) -> None:
        self.engine = engine
        if history is None:
            history = ReconnectHistory(engine.policy.half_life_s, engine.policy.remembered)
        self.history = history
        self.attempt = 0
        self.level = Level.NORMAL
        self.spread_s: float | None = None
        self._random = random
        self._budget = budget
        self._previous_s = 0.0
        self._strategy = engine.policy.default

    def told(self, spread_s: float | None) -> None:
        """The server has told over how many seconds its clients are to spread, should they lose it: when the connection
        was made, so that it is known when the server dies without a word. None: forget it, and so does what makes no
        sense, negative or NaN.
        """
        self.spread_s = _told_s(spread_s, self.engine.policy.most_told_s)

    def lost(
        self,
        now_s: float,
        lasted_s: float,
        code: int = 1006,
        *,
        advice: Advice | None = None,
        loss: float = 0.0,
        latency_s: float = 0.0,
    ) -> Decision:
        """A connection has ended, and the client wants another one.

        Args:
            now_s: the time.
            lasted_s: how long the connection lasted.
            code: with which it was closed.
            advice: that came with it.
            loss, latency_s: quality of the link: it chooses the strategy until the next connection ends, see
                ``PolicyEngine.strategy``.
        """
        lasted = lasted_s >= self.engine.policy.lasting_s
        self.history.ended(now_s, lasted_s, code, succeeded=lasted)
        self.level = self.engine.level(self.history, now_s)
        self._strategy = self.engine.strategy(loss, latency_s)
        if lasted:
            self.attempt = 0
            self._previous_s = 0.0
            if self._budget is not None:
                self._budget.succeeded()
        return self._decide(now_s, verdict_of(code), advice, 1.0)

    def failed(self, now_s: float, *, verdict: Verdict = Verdict.NORMAL, advice: Advice | None = None) -> Decision:
        """An attempt led to no connection.

        Args:
            now_s: the time.
            verdict: what the failure means: ``FORBID`` for what will fail again, such as 401.
            advice: that came with it.
        """
        self.history.failed(now_s)
        return self._decide(now_s, verdict, advice, self.engine.policy.spread_jitter)

    def _decide(self, now_s: float, verdict: Verdict, advice: Advice | None, spread_jitter: float) -> Decision:
        attempt = self.attempt
        if advice is not None and _told_s(advice.spread_s, self.engine.policy.most_told_s) is not None:
            self.told(advice.spread_s)
        if verdict is Verdict.FORBID:
            return Decision(None, attempt, "forbidden")
        if not self._strategy.should_reconnect(attempt):
            return Decision(None, attempt, "given up")
        decision = self._told_to(advice) or self._by_itself(verdict, spread_jitter)
        self.attempt += 1
        if self._budget is None:
            return decision
        turn_s = self._budget.wait_s(now_s)
        return decision if turn_s <= (decision.wait_s or 0.0) else Decision(turn_s, attempt, "budget")

    def _told_to(self, advice: Advice | None) -> Decision | None:
        """By what the server told about this client; calls ``random`` once if it did."""
        policy = self.engine.policy
        after_s = None if advice is None else _told_s(advice.after_s, policy.most_told_s)
        if advice is None or after_s is None:
            return None
        if self.attempt:
            after_s = max(after_s, policy.least_told_s)
        within_s = _told_s(advice.within_s, policy.most_told_s) or 0.0
        return Decision(after_s + within_s * self._random(), self.attempt, "told")

    def _by_itself(self, verdict: Verdict, spread_jitter: float) -> Decision:
        """Without being told when. The strategy is asked unless one may hurry or this is the first part of a spread;
        for what comes on top, ``random`` is called once more.
        """
        policy, attempt = self.engine.policy, self.attempt
        if verdict is Verdict.HURRY and attempt == 0:
            return Decision(policy.hurry_s * self._random(), attempt, "hurry")
        delay_s = policy.delay_least_s if verdict is Verdict.DELAY else 0.0
        if self.spread_s is not None and attempt == 0:
            # The delay is added, and no maximum taken, as that would pile up those below it.
            return Decision(delay_s + self.spread_s * self._random(), attempt, "spread")

        wait_s = self._previous_s = self._strategy.wait_s(attempt, self._previous_s, self._random)
        if self.spread_s is not None:
            # Whether the server is there is no matter of this client's past: the level stays out of it.
            spread_s = delay_s + self.spread_s * (1 + spread_jitter * self._random())
            return Decision(max(wait_s, spread_s), attempt, "strategy" if wait_s > spread_s else "spread")
        wait_s *= self.engine.pace(self.level)
        if verdict is Verdict.DELAY:
            delay_s += (policy.delay_most_s - policy.delay_least_s) * self._random()
        return Decision(max(wait_s, delay_s), attempt, "strategy" if wait_s >= delay_s else "delay")


# ---- the server's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slots:
    """When each of the connections that are closed together is to come back.

    They spread evenly over ``spread_s = connections / accept_rate + window_s``: each has a slot of its own, of
    ``spread_s / connections``, and comes at a random time within it. So any span of time has room for no more of them
    than it has slots, wholly or in part; and since a slot is longer than ``1 / accept_rate``, there is air for others.

    Attributes:
        connections: how many there are.
        accept_rate: new connections per second that the server can bear.
        window_s: by which the time is longer than it must be.
        away_s: before the first slot: how long the server is expected to be away.
    """

    connections: int
    accept_rate: float
    window_s: float = 5.0
    away_s: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.connections, int) and self.connections >= 0):
            raise InvalidSetting("reconnect.connections", self.connections, "a whole number from 0")
        _check("accept_rate", self.accept_rate, _LEAST_RATE, _MOST_RATE)
        _check("window_s", self.window_s, 0, _MOST_S)
        _check("away_s", self.away_s, 0, _MOST_S)

    @property
    def spread_s(self) -> float:
        """Over how many seconds they spread; also what to tell clients in advance, see ``Reconnector.told``."""
        return self.connections / self.accept_rate + self.window_s

    def wait_s(self, number: int, random: Random) -> float:
        """Seconds from now until one of them is to come back. Calls ``random`` once.

        Args:
            number: from 0 to connections - 1, each once: the order in which they come back.
            random: see the module.
        """
        if not 0 <= number < self.connections:
            raise InvalidSetting("number", number, f"from 0 to {self.connections - 1}")
        return self.away_s + self.spread_s * (number + random()) / self.connections


class Admission:
    """Who may come in now, and when the others are to try again.

    A token bucket lets in up to ``accept_rate`` per second, and what has come together within ``burst_s``. Who finds it
    empty is turned away with a slot of its own, behind those that were given before, so that those who wait come back
    at ``accept_rate`` and no two at once. Slots are no reservations: who comes back finds the bucket as it is.

    Args:
        accept_rate: new connections per second that the server can bear.
        random: see the module; called once for each that is turned away.
        burst_s: so many seconds' worth of them may come at once.
        least_s: nobody is told to come back sooner.
        longest_s: nobody is told to come back later. Beyond it there is no slot left, and a random time within the
            second half of it is told: strangers who are turned away again and again can keep others away no longer.
        now_s: when it begins.
    """

    __slots__ = ("_accept_rate", "_bucket", "_least_s", "_longest_s", "_next_s", "_random")

    def __init__(
        self,
        accept_rate: float,
        random: Random,
        *,
        burst_s: float = 0.1,
        least_s: float = 1.0,
        longest_s: float = 300.0,
        now_s: float = 0.0,
    ) -> None:
        _check("accept_rate", accept_rate, _LEAST_RATE, _MOST_RATE)
        _check("burst_s", burst_s, 0, _MOST_S)
        _check("least_s", least_s, _LEAST_S, _MOST_S)
        _check("longest_s", longest_s, least_s, _MOST_S)
        self._bucket = TokenBucket(accept_rate, max(1.0, min(accept_rate * burst_s, 1e9)), now_s)
        self._accept_rate = accept_rate
        self._random = random
        self._least_s, self._longest_s = least_s, longest_s
        self._next_s = now_s

    def ask(self, now_s: float) -> float:
        """Somebody has come. Returns 0 if it may come in, else seconds until it is to try again."""
        return 0.0 if self._bucket.take(now_s) else self.turn_away(now_s)

    def turn_away(self, now_s: float) -> float:
        """Somebody must not come in, whatever the bucket says. Returns seconds until it is to try again."""
        slot_s = max(self._next_s, now_s + self._least_s)
        wait_s = slot_s - now_s + self._random() / self._accept_rate
        if wait_s > self._longest_s:
            return self._longest_s * (1 - self._random() / 2)
        self._next_s = slot_s + 1 / self._accept_rate
        return wait_s


@dataclass(frozen=True, slots=True)
class HerdPolicy:
    """How a server keeps those apart who would come to it together. Times are seconds.

    Attributes:
        accept_rate: new connections per second that the server can bear. ``websockets`` takes 1,300 to 1,700 without
            TLS, on one core of the machine that this project's figures are from; 1,000 leaves some of that to those who
            are connected. Where more than the handshake is to be done, such as looking up a user, it is less.
        window_s: by which the time is longer over which connections are spread than ``connections / accept_rate``. It
            is the room for those who come for other reasons.
        away_s: how long a server that restarts is expected to be away, from the moment when it begins to close.
        expected: connections that there usually are. Who comes early after a start is told a spread for no fewer, since
            it will not be told again when the others have come.
        admission: whether the handshake lets in no more than ``accept_rate`` per second. Otherwise everybody is let in.
        burst_s, least_s, longest_s: see ``Admission``. As Retry-After tells whole seconds, plain clients that came
            together come back together, so many each second: with a ``burst_s`` of less than one, most of them would be
            turned away again, and again.
        delay_least_s, delay_most_s: who is given up as too slow is told a random time between these, which is what
            clients choose by themselves that are told nothing, and what ``Admission`` tells on top.
    """

    accept_rate: float = 1000.0
    window_s: float = 5.0
    away_s: float = 5.0
    expected: int = 0
    admission: bool = False
    burst_s: float = 1.0
    least_s: float = 1.0
    longest_s: float = 300.0
    delay_least_s: float = RECONNECT.delay_least_s
    delay_most_s: float = RECONNECT.delay_most_s

    def __post_init__(self) -> None:
        _check("accept_rate", self.accept_rate, _LEAST_RATE, _MOST_RATE, "herd")
        for name in ("window_s", "away_s", "burst_s", "delay_least_s"):
            _check(name, getattr(self, name), 0, _MOST_S, "herd")
        _check("least_s", self.least_s, _LEAST_S, _MOST_S, "herd")
        _check("longest_s", self.longest_s, self.least_s, _MOST_S, "herd")
        _check("delay_most_s", self.delay_most_s, self.delay_least_s, _MOST_S, "herd")
        if not (isinstance(self.expected, int) and self.expected >= 0):
            raise InvalidSetting("herd.expected", self.expected, "a whole number from 0")


HERD = HerdPolicy()
"""The default."""


class Herd:
    """All who are connected to one server, or want to be: who may come in now, and what the others are told.

    Whoever is turned away, for whatever reason, has a slot of its own among all of them, so that they come back at no
    more than ``accept_rate``; and those who are connected when a server restarts have the ``Slots`` of that.

    Args:
        policy: the numbers.
        random: see the module.
        now_s: when it begins.

    Attributes:
        policy: the numbers.
        admitted, turned_away: how many there were.
    """

    __slots__ = (
        "_admission",
        "_began_s",
        "_is_closing",
        "_numbers",
        "_random",
        "_room",
        "_slots",
        "admitted",
        "policy",
        "turned_away",
    )

    def __init__(self, policy: HerdPolicy, random: Random, now_s: float = 0.0) -> None:
        self.policy = policy
        self.admitted = self.turned_away = 0
        self._random = random
        self._admission = self._make_admission(now_s, policy.longest_s)
        self._is_closing = False
        # Of a restart: when it began, its slots, which of them nobody has drawn yet, and for how many others they leave
        # room.
        self._began_s = now_s
        self._slots: Slots | None = None
        self._numbers: list[int] = []
        self._room = 0

    def _make_admission(self, now_s: float, longest_s: float) -> Admission:
        policy = self.policy
        return Admission(
            policy.accept_rate,
            self._random,
            burst_s=policy.burst_s,
            least_s=policy.least_s,
            longest_s=longest_s,
            now_s=now_s,
        )

    def slots(self, connections: int) -> Slots:
        """Of so many connections, should the server restart now."""
        policy = self.policy
        return Slots(connections, policy.accept_rate, policy.window_s, policy.away_s)

    def spread_s(self, connections: int) -> float:
        """Over how many seconds so many clients are to spread, should they lose the server: what to tell them in
        advance, as a server that is killed tells nothing. See ``Reconnector.told``.

        Most clients that are lost are lost alone, and cannot know it. So a server with few of them leaves no more room
        for others than these need themselves: they come back soon.
        """
        needed_s = max(connections, self.policy.expected) / self.policy.accept_rate
        return needed_s + min(needed_s, self.policy.window_s)

    def admit(self, now_s: float) -> float:
        """Somebody has come. Returns 0 if it may come in, else seconds until it is to try again."""
        if self._is_closing:
            return self._turn_away(now_s)
        wait_s = self._admission.ask(now_s) if self.policy.admission else 0.0
        if wait_s:
            self.turned_away += 1
        else:
            self.admitted += 1
        return wait_s

    def overload(self, now_s: float) -> Advice:
        """What one of those who are connected is told that is given up as too slow. Calls ``random`` at least twice."""
        least_s, most_s = self.policy.delay_least_s, self.policy.delay_most_s
        return Advice(least_s + (most_s - least_s) * self._random() + self._admission.turn_away(now_s))

    def close(self, connections: int, now_s: float, *, restarts: bool) -> None:
        """The server begins to end: from now on, everybody who comes is turned away.

        Args:
            connections: so many there are.
            now_s: the time.
            restarts: whether it will be back, in ``away_s`` from now.
        """
        self._is_closing = True
        if not restarts:
            return
        self._began_s = now_s
        self._slots = slots = self.slots(connections)
        self._numbers = list(range(connections))
        self._room = int(slots.accept_rate * slots.window_s)
        # Who finds no place among these comes behind them.
        end_s = slots.away_s + slots.spread_s
        self._admission = self._make_admission(now_s + end_s, min(end_s + self.policy.longest_s, _MOST_S))

    def farewell(self, now_s: float) -> Advice | None:
        """What one of those who are connected is told that is closed now because the server ends; None: nothing.

        Each draws one of the slots, so it does not matter who is closed first. A slot counts from when the server began
        to end. If it has passed already, because what waited for the client had to be delivered first, the client comes
        behind all others. Calls ``random`` up to four times.

        Cost: O(1).
        """
        slots, numbers = self._slots, self._numbers
        if slots is None:
            return None
        after_s = -1.0
        if numbers:
            at = int(self._random() * len(numbers))
            numbers[at], numbers[-1] = numbers[-1], numbers[at]
            after_s = self._began_s + slots.wait_s(numbers.pop(), self._random) - now_s
        if after_s < 0:
            after_s = self._admission.turn_away(now_s)
        return Advice(after_s, 0.0, slots.spread_s)

    def refusal(self, now_s: float) -> Advice | None:
        """What one is told that was let in, but too late to be connected, because the server ends; None: nothing."""
        wait_s = self._turn_away(now_s)
        return None if self._slots is None else Advice(wait_s, 0.0, self._slots.spread_s)

    def _turn_away(self, now_s: float) -> float:
        """Somebody comes to a server that ends. Among the slots of a restart is room for some, see ``window_s``."""
        self.turned_away += 1
        if self._slots is None or not self._room:
            return self._admission.turn_away(now_s)
        self._room -= 1
        away_s = self._began_s + self._slots.away_s - now_s
        return max(self.policy.least_s, away_s) + self._slots.spread_s * self._random()
