"""Servers and receivers of the benchmarks that need sockets, each in a process of its own.

It hides how processes are started, told what to do, and asked what came of it. A server is a Python process that runs
one of :mod:`bench.servers`; the receivers are one C program (native/receiver.c), which the benchmark compiles: it
reads as fast as the kernel lets it, checks every frame's header, and says on the machine's monotonic clock when the
last byte of the last connection was there. Both are told what to do by lines on their standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_NATIVE = Path(__file__).resolve().parent / "native"


class Broken(RuntimeError):
    """A server or the receivers did not do what they were told."""


@contextmanager
def compiled() -> Iterator[tuple[Path, Path]]:
    """The receivers' program and the floor's library, compiled for this run."""
    compiler = os.environ.get("CC", "cc").split()
    with tempfile.TemporaryDirectory(prefix="wsfast-bench-") as folder:
        receiver, floor = Path(folder, "receiver"), Path(folder, "floor.so")
        common = [*compiler, "-O2", "-pthread"]
        subprocess.run([*common, "-o", str(receiver), str(_NATIVE / "receiver.c")], check=True)
        subprocess.run([*common, "-shared", "-fPIC", "-o", str(floor), str(_NATIVE / "floor.c")], check=True)
        yield receiver, floor


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
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()


class Receivers(_Process):
    """So many connections that read."""

    def __init__(self, program: Path, port: int, count: int, buffer: int) -> None:
        super().__init__([str(program), "127.0.0.1", str(port), str(count), str(buffer)])
        self.count = count
        self._read("ready")

    def expect(self, frames: int, payload_bytes: int) -> None:
        """From now on, every connection that reads has to get exactly this."""
        self.write(f"expect {frames} {payload_bytes}")
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

    def _read(self, word: str) -> str:
        while not (line := self.read()).startswith(word):
            if not line.startswith("closed"):
                raise Broken(f"receivers said {line!r} instead of {word!r}")
        return line


class Server(_Process):
    """A server of :mod:`bench.servers`. ``call`` has one of its methods called there."""

    def __init__(self, kind: str, **settings: Any) -> None:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "bench.servers", kind, json.dumps(settings)]
        super().__init__(command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": path})
        self.port: int = self.answer()

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
            raise Broken(f"server: {answer['error']}")
        return answer["value"]


class Rig:
    """Servers with their receivers; all of it ends with the ``with`` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Rig:
        self._receiver, self.floor = self._stack.enter_context(compiled())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, kind: str, connections: int, *, buffer: int = 0, **settings: Any) -> tuple[Server, Receivers]:
        """A server of this kind, and so many connections to it, all accepted; *buffer*: bytes that the kernel may
        keep for each on either side, 0 for as many as it likes.
        """
        if buffer:
            settings["buffer"] = buffer
        server = Server(kind, floor=str(self.floor), **settings)
        self._stack.callback(server.close)
        receivers = Receivers(self._receiver, server.port, connections, buffer)
        self._stack.callback(receivers.close)
        server.call("wait_for", connections=connections)
        return server, receivers


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
