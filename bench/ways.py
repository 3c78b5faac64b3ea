"""The ways to send that the benchmarks with sockets compare, and the servers that they need.

A benchmark asks for a way by the name that its row has. It hides on which server that runs, how that is told to use it,
and what is installed: a way that is not has no name in :attr:`Servers.names`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.wire import Receivers, Rig, Server

FLOOR_1, FLOOR_2 = "C floor, 1 thread", "C floor, 2 threads"
WSFAST_1, WSFAST_2 = "wsfast, 1 thread", "wsfast, 2 threads"
BROADCAST, PICOWS, PLAIN = "websockets.broadcast", "picows in a loop", "plain loop of sends"
SIZE = 128


@dataclass(frozen=True)
class _Way:
    """Which server it is asked of, and how."""

    server: str
    method: str
    arguments: dict[str, int] = field(default_factory=dict)


_WAYS = {
    FLOOR_1: _Way("wsfast", "floor", {"threads": 1}),
    FLOOR_2: _Way("wsfast", "floor", {"threads": 2}),
    PLAIN: _Way("wsfast", "plain"),
    BROADCAST: _Way("wsfast", "broadcast"),
    PICOWS: _Way("picows", "picows"),
    WSFAST_1: _Way("wsfast", "wsfast", {"threads": 1}),
    WSFAST_2: _Way("wsfast", "wsfast", {"threads": 2}),
}
# A plain loop differs from websockets.broadcast only in encoding the message for each connection.
ROWS = tuple(name for name in _WAYS if name != PLAIN)


class Servers:
    """For each library that is asked for and installed a server with so many connections.

    Args:
        names: of the ways that will be used.
        settings: see :meth:`Rig.start`.
    """

    def __init__(self, rig: Rig, connections: int, names: Sequence[str] = ROWS, **settings: Any) -> None:
        self._connections = connections
        kinds = dict.fromkeys(_WAYS[name].server for name in names)
        self._of = {kind: rig.start(kind, connections, **settings) for kind in kinds if _is_installed(kind)}
        self.names = [name for name in names if _WAYS[name].server in self._of]

    def of(self, name: str) -> tuple[Server, Receivers]:
        """On whom this way is used."""
        return self._of[_WAYS[name].server]

    def call(self, name: str, method: str, **arguments: Any) -> Any:
        """A method of the server that uses a way to send."""
        way = _WAYS[name]
        return self.of(name)[0].call(method, way=way.method, **way.arguments, **arguments)

    def clocked(self, name: str, messages: int) -> tuple[float, float]:
        """Messages of :data:`SIZE` in one turn to everybody: microseconds of a connection until the last of them has
        read all, and until the caller could go on.
        """
        receivers = self.of(name)[1]
        receivers.expect(messages, messages * SIZE)
        begin_ns, call_s = self.call(name, "clocked", size=SIZE, messages=messages)
        return (receivers.done_ns() - begin_ns) / 1e3 / self._connections, call_s * 1e6 / self._connections

    def close(self) -> None:
        for server, receivers in self._of.values():
            receivers.close()
            server.close()


def _is_installed(kind: str) -> bool:
    return importlib.util.find_spec(kind) is not None
