"""How the clients of others come back: the documented defaults of each, read from its source.

Each is a ``wsfast.reconnect.ReconnectStrategy``; ``attempt`` 0 is the first after a connection that was well. All are
told nothing: a browser shows a script neither the status nor the headers of a handshake that failed, so what runs in
one cannot read ``Retry-After``, and websockets and SignalR's other clients do not.
"""

from __future__ import annotations

import math

from wsfast.reconnect import DecorrelatedJitter, FixedInterval, FullJitter, Random, ReconnectStrategy

__all__ = ["OTHERS"]

_BASE_S, _CAP_S = 1.0, 60.0


class _Tireless:
    """Never gives up."""

    max_attempts: int | None = None

    def should_reconnect(self, attempt: int) -> bool:
        return True


class Exponential(_Tireless):
    """``base * 2**attempt``, capped, without jitter."""

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return min(_CAP_S, math.ldexp(_BASE_S, min(attempt, 10)))


class Websockets(_Tireless):
    """websockets 17, ``async for connection in connect(...)`` with ``client.backoff``: at once after a connection that
    was made, then within 5 s, then from 3.1 s by 1.618 up to 90 s. 503 is retried, ``Retry-After`` is not read.
    """

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        if attempt == 0:
            return 0.0
        return 5.0 * random() if attempt == 1 else min(90.0, 3.1 * 1.618 ** min(attempt - 2, 10))


class SocketIO(_Tireless):
    """socket.io-client 4, ``manager.ts`` and ``contrib/backo2.ts``: ``reconnectionDelay`` 1 s, ``reconnectionDelayMax``
    5 s, ``randomizationFactor`` 0.5, which is applied before the cap; one random number is both the size and, by its
    first digit, the sign.
    """

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        milliseconds = 1000 << min(attempt, 20)
        chance = random()
        deviation = int(chance * 0.5 * milliseconds)
        return min(milliseconds - deviation if int(chance * 10) % 2 == 0 else milliseconds + deviation, 5000) / 1000


class SignalR:
    """``withAutomaticReconnect()``, ``DefaultReconnectPolicy.ts``: 0, 2, 10 and 30 s, then it gives up."""

    max_attempts: int | None = 4

    def should_reconnect(self, attempt: int) -> bool:
        return attempt < 4

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return (0.0, 2.0, 10.0, 30.0)[attempt]


class Phoenix(_Tireless):
    """phoenix.js, ``reconnectAfterMs`` of ``socket.js``."""

    _STEPS_S = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1.0, 2.0)

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return self._STEPS_S[attempt] if attempt < len(self._STEPS_S) else 5.0


class Centrifuge(_Tireless):
    """centrifuge-js, ``backoff`` of ``utils.ts``: ``minReconnectDelay`` 0.5 s, ``maxReconnectDelay`` 20 s, full jitter
    on top of the least.
    """

    def wait_s(self, attempt: int, previous_s: float, random: Random) -> float:
        return min(20.0, 0.5 + random() * min(20.0, math.ldexp(0.5, min(attempt, 31))))


OTHERS: dict[str, ReconnectStrategy] = {
    "generation 1: 3 x 5 s": FixedInterval(),
    "exponential, no jitter": Exponential(),
    "full jitter": FullJitter(_BASE_S, _CAP_S),
    "decorrelated jitter": DecorrelatedJitter(_BASE_S, _CAP_S),
    "websockets": Websockets(),
    "Socket.IO": SocketIO(),
    "SignalR": SignalR(),
    "Phoenix": Phoenix(),
    "centrifuge": Centrifuge(),
}
"""By name. What the first four have no default for is what wsfast's strategies have: base 1 s, cap 60 s."""
