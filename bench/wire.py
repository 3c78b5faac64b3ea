"""Servers and receivers of the benchmarks that need sockets, each in a process of its own.

It hides how processes are started, told what to do, and asked what came of it. A server is a Python process that runs
one of :mod:`bench.servers`; real clients are one of :mod:`bench.clients`. The receivers are one C program
(native/receiver.c), which the benchmark compiles: it reads as fast as the kernel lets it, checks every frame's header,
and says on the machine's monotonic clock when the last byte of the last connection was there. All of them are told what
to do by lines on their standard input.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_NATIVE = Path(__file__).resolve().parent / "native"


class Broken(RuntimeError):
    """A server or the receivers did not do what they were told."""


@contextmanager
def compiled() -> Iterator[Path]:
    """A folder with the programs ``receiver`` and ``proxy`` and the library ``floor.so``, compiled for this run."""
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory(prefix="wsfast-bench-") as folder:
        for name, options in (("receiver", []), ("proxy", []), ("floor.so", ["-shared", "-fPIC"])):
            source = (_NATIVE / name).with_suffix(".c")
            subprocess.run(
                [*compiler, "-O2", "-pthread", *options, "-o", str(Path(folder, name)), str(source)], check=True
            )
        yield Path(folder)


def free_port() -> int:
    """A port of the loopback address that is free, and no client's connection is given by itself, however many try to
    reach it while nobody listens there.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        port = random.randrange(first // 2, first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise Broken("no port is free")


class _Process:
    """A process that answers lines with lines."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **options
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def read(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline().rstrip("\n")
        if not line or line.startswith("error"):
            raise Broken(line or f"process {self._process.args!r} ended: {self._process.wait()}")
        return line

    def close(self) -> None:
        """Kill it (SIGKILL)."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


class Receivers(_Process):
    """So many connections that read. With *resume*, they speak the protocol of resume, and first say hello."""

    def __init__(self, program: Path, port: int, count: int, buffer: int, resume: bool = False) -> None:
        super().__init__([str(program), "127.0.0.1", *map(str, (port, count, buffer, int(resume)))])
        self.count = count
        self._read("ready")
        if resume:
            self.hello()
            self.welcomed_ns()

    def expect(self, frames: int, payload_bytes: int, *, numbered: bool = False) -> None:
        """From now on, every connection that reads has to get exactly this; *numbered*: see :func:`numbered`."""
        self.write(f"{'numbered' if numbered else 'expect'} {frames} {payload_bytes}")
        self._read("ok")

    def done_ns(self) -> int:
        """When they all had it, on the monotonic clock. Waits for it."""
        return int(self._read("done").split()[1])

    def pause(self, count: int) -> None:
        """The first *count* connections stop reading."""
        self.write(f"pause {count}")
        self._read("ok")

    def resume(self) -> None:
        """All read again; what they get is not judged."""
        self.write("resume")
        self._read("ok")

    def frames(self) -> int:
        """Frames of all connections so far."""
        self.write("count")
        return int(self._read("frames").split()[1])

    def health(self) -> tuple[int, int]:
        """Pings that all connections have answered so far, and how many connections have ended."""
        self.write("health")
        _, pings, closed = self._read("health").split()
        return int(pings), int(closed)

    def cut(self) -> None:
        """All end their connections without a word."""
        self.write("cut")
        self._read("ok")

    def dial(self) -> None:
        """All connect again, up to the opening handshake."""
        self.write("dial")
        self._read("ready")

    def hello(self) -> int:
        """All begin with a session, or go on with theirs. When the first of them spoke."""
        self.write("hello")
        return int(self._read("hello").split()[1])

    def welcomed_ns(self) -> int:
        """When the last of them had its answer. It was refused to none."""
        return int(self._read("welcomed").split()[1])

    def _read(self, word: str) -> str:
        while not (line := self.read()).startswith(word):
            if not line.startswith("closed"):
                raise Broken(f"receivers said {line!r} instead of {word!r}")
        return line


class Worker(_Process):
    """An object in a process of its own: one of a *kind* that a package has. ``call`` calls one of its methods.

    Attributes:
        started: what its ``start`` has returned.
    """

    def __init__(self, package: str, kind: str, **settings: Any) -> None:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", package, kind, json.dumps(settings)]
        super().__init__(command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": path})
        self.started = self.answer()

    def call(self, method: str, **arguments: Any) -> Any:
        self.begin(method, **arguments)
        return self.answer()

    def begin(self, method: str, **arguments: Any) -> None:
        """Have a method called; ``answer`` waits for what it returns."""
        self.write(json.dumps([method, arguments]))

    def answer(self) -> Any:
        """What the last line that was written is answered with."""
        answer = json.loads(self.read())
        if "error" in answer:
            raise Broken(f"process {self._process.args!r}: {answer['error']}")
        return answer["value"]


class Server(Worker):
    """A server of :mod:`bench.servers`."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__("bench.servers", kind, **settings)

    @property
    def port(self) -> int:
        return int(self.started)


class Clients(Worker):
    """Clients of :mod:`bench.clients`."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__("bench.clients", kind, **settings)


class Proxy(_Process):
    """Stands before a server, on a port of its own."""

    def __init__(self, program: Path, port: int, to: int) -> None:
        super().__init__([str(program), str(port), str(to)])
        self.port = port
        self.read()


class Rig:
    """Servers with their receivers; all of it ends with the ``with`` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Rig:
        self._programs = self._stack.enter_context(compiled())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(
        self, kind: str, connections: int, *, buffer: int = 0, resume: bool = False, **settings: Any
    ) -> tuple[Server, Receivers]:
        """A server of this kind, and so many connections to it, all accepted; *buffer*: bytes that the kernel may
        keep for each on either side, 0 for as many as it likes; *resume*: see :class:`Receivers`.
        """
        if buffer:
            settings["buffer"] = buffer
        server = self.serve(kind, **settings)
        receivers = self.receive(server, connections, buffer=buffer, resume=resume)
        server.call("wait_for", connections=connections)
        return server, receivers

    def serve(self, kind: str, **settings: Any) -> Server:
        """A server of this kind."""
        server = Server(kind, floor=str(self._programs / "floor.so"), **settings)
        self._stack.callback(server.close)
        return server

    def connect(self, kind: str, **settings: Any) -> Clients:
        """Clients of this kind."""
        clients = Clients(kind, **settings)
        self._stack.callback(clients.close)
        return clients

    def proxy(self, port: int, to: int) -> Proxy:
        proxy = Proxy(self._programs / "proxy", port, to)
        self._stack.callback(proxy.close)
        return proxy

    def receive(self, server: Server, connections: int, *, buffer: int = 0, resume: bool = False) -> Receivers:
        """So many more connections to it."""
        receivers = Receivers(self._programs / "receiver", server.port, connections, buffer, resume)
        self._stack.callback(receivers.close)
        return receivers


def numbered(number: int, size: int) -> str:
    """A text of so many bytes by which receivers see that nothing is missing, doubled or out of order."""
    return f"{number:010} ".ljust(size, "x")


def rss(pid: int) -> int:
    """Bytes of memory of a process, now."""
    return _memory(pid, "VmRSS")


def peak_rss(pid: int) -> int:
    """The most bytes of memory that a process had since :func:`forget_peak`."""
    return _memory(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """From now on, the peak counts (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _memory(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise Broken(f"process {pid} has ended")
