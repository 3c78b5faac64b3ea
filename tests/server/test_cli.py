"""The ``wsfast`` command as a user meets it: in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import wsfast
from wsfast.reconnect import Advice

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "wsfast", *arguments]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False, **options
    )


class Running:
    """A server in a process of its own."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        self.lines: list[str] = []

    def line(self, pattern: str) -> re.Match[str]:
        """Read standard error up to the first line that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"no line like {pattern!r} in {self.lines}")

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Send a signal and wait: exit status, standard output, standard error."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out, "".join(self.lines) + err


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Iterator[Running]:
    process = Running(*arguments, **options)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.process.communicate(timeout=DEADLINE_S)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[Running, str]]:
    with running("serve", "--port", "0", *arguments) as server:
        yield server, server.line(r"listening on (ws://\S+)")[1]


def test_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"wsfast, version {wsfast.__version__}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == wsfast.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["serve", "--help"], ["demo", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: wsfast")
    assert "demo-clients" not in result.stdout


def test_the_help_of_serve_explains_what_a_stranger_needs() -> None:
    text = run("serve", "--help").stdout
    for word in ("--host", "--port", "--max-message-bytes", "client_id=", '"type": "join"', "no authentication"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["serve", "--port", "65536"], 2, "65536 is not in the range"),
        (["serve", "--port", "http"], 2, "not a valid int"),
        (["serve", "--nonsense"], 2, "No such option"),
        (["serve", "--shards", "3"], 1, "Error: shards must be a power of two from 1 to 65536, not 3"),
        (["serve", "--max-id-bytes", "10"], 1, "Error: max_id_bytes must be 22 or more, not 10"),
        (["serve", "--on-duplicate", "ignore"], 2, "not one of"),
        (["serve", "--accept-rate", "0"], 2, "0 is not in the range"),
        (
            ["serve", "--accept-rate", "1e10"],
            1,
            "Error: herd.accept_rate must be from 1e-06 to 1e+09, not 10000000000.0",
        ),
        (["serve", "--on-term", "reload"], 2, "not one of"),
        (["serve", "--host", "256.0.0.1", "--port", "0"], 1, "Error: cannot listen on 256.0.0.1:0: "),
        (["demo", "--clients", "0"], 2, "0 is not in the range"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_options_are_told_without_a_traceback(arguments: list[str], status: int, message: str) -> None:
    result = run(*arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if status == 1:
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
@pytest.mark.parametrize("name", ["serve", "demo"])
def test_a_port_in_use_is_one_line(name: str, loop: str) -> None:
    if loop == "--uvloop":
        pytest.importorskip("uvloop")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(name, "--port", str(port), loop)
    assert result.returncode == 1
    assert result.stderr == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ends_with_0(number: int, loop: str) -> None:
    if loop == "--uvloop":
        pytest.importorskip("uvloop")
    with serving(loop) as (server, url), connect(f"{url}/?client_id=me", proxy=None) as ws:
        assert json.loads(ws.recv(timeout=DEADLINE_S))["client_id"] == "me"
        server.line("connected 'me', user None, from 127.0.0.1:")
        server.process.send_signal(number)
        with pytest.raises(Exception, match="1001"):
            ws.recv(timeout=DEADLINE_S)
        status, out, err = server.end()
    assert (status, out) == (0, "")
    assert "Traceback" not in err
    lines = err.splitlines()
    assert "draining 1 connections" in lines[-3]
    assert "disconnected 'me'" in lines[-2]
    assert lines[-1].endswith("ended")


@contextlib.contextmanager
def silent_peer(url: str) -> Iterator[None]:
    """A client that connects, and then never says anything."""
    host, port = url.removeprefix("ws://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        yield


def test_a_second_signal_ends_at_once() -> None:
    with serving("--drain-timeout", "1000") as (server, url), silent_peer(url):
        server.line("connected")
        server.process.send_signal(signal.SIGINT)
        server.line("draining")
        status, _, err = server.end(signal.SIGINT)
    assert status == 130
    assert "wsfast: ended at once" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("number", "arguments", "code"),
    [
        (signal.SIGHUP, [], 1012),
        (signal.SIGHUP, ["--no-uvloop"], 1012),
        (signal.SIGTERM, ["--on-term", "restart"], 1012),
        (signal.SIGINT, ["--on-term", "restart"], 1001),
    ],
)
def test_a_restart_tells_clients_when_to_come_back(number: int, arguments: list[str], code: int) -> None:
    with serving("--away", "100", *arguments) as (server, url), connect(f"{url}/?client_id=me", proxy=None) as ws:
        assert json.loads(ws.recv(timeout=DEADLINE_S))["client_id"] == "me"
        server.process.send_signal(number)
        with pytest.raises(ConnectionClosed) as error:
            ws.recv(timeout=DEADLINE_S)
        status, out, err = server.end()
    assert (status, out) == (0, "")
    assert "Traceback" not in err
    assert error.value.rcvd is not None
    assert error.value.rcvd.code == code
    advice = Advice.from_reason(error.value.rcvd.reason)
    if code == 1012:
        assert "draining 1 connections for a restart; once more to end at once" in err
        assert advice is not None and advice.after_s is not None
        assert 100 - DEADLINE_S < advice.after_s <= 105.1
    else:
        assert "draining 1 connections for a shutdown; once more to end at once" in err
        assert advice is None


@pytest.fixture(autouse=True)
def _hangups_are_as_by_default() -> Iterator[None]:
    """Whoever runs the tests may ignore them, and what is started here inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_hangup_does_not_end_a_drain() -> None:
    with serving("--drain-timeout", "2") as (server, url), silent_peer(url):
        server.line("connected")
        server.process.send_signal(signal.SIGTERM)
        server.line("draining 1 connections for a shutdown")
        status, _, err = server.end(signal.SIGHUP)
    assert status == 0
    assert "cutting off 1 connections" in err
    assert "ended at once" not in err


def test_a_hangup_is_ignored_where_the_parent_wants_it_so() -> None:
    """As under nohup."""
    ignoring = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with serving() as (server, url), connect(f"{url}/?client_id=me", proxy=None) as ws:
            server.process.send_signal(signal.SIGHUP)
            assert json.loads(ws.recv(timeout=DEADLINE_S))["client_id"] == "me"
            ws.send('{"type": "join", "group": "g"}')
            assert json.loads(ws.recv(timeout=DEADLINE_S))["type"] == "joined"
            assert "shutdown" in server.end(signal.SIGTERM)[2]
    finally:
        signal.signal(signal.SIGHUP, ignoring)


def test_the_accept_rate_holds() -> None:
    with serving("--accept-rate", "0.001") as (server, url), connect(url, proxy=None) as ws:
        assert json.loads(ws.recv(timeout=DEADLINE_S))["type"] == "welcome"
        with pytest.raises(InvalidStatus) as error:
            connect(url, proxy=None)
        assert error.value.response.status_code == 503
        assert int(error.value.response.headers["Retry-After"]) >= 1
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            ws.recv(timeout=DEADLINE_S)
        assert server.end()[0] == 0


def test_options_reach_the_hub() -> None:
    arguments = ["--max-message-bytes", "100", "--path", "/ws", "--max-groups", "1", "--stats-interval", "0.05"]
    with serving(*arguments) as (server, url), connect(f"{url}/ws", proxy=None) as ws:
        assert json.loads(ws.recv())["max_message_bytes"] == 100
        ws.send("x" * 101)
        assert json.loads(ws.recv())["code"] == "too_big"
        for group, answer in (("a", "joined"), ("b", "error")):
            ws.send(json.dumps({"type": "join", "group": group}))
            assert json.loads(ws.recv())["type"] == answer
        server.line("1 connections, 1 groups; in the last 0.05 s")
        ws.close()
        assert server.end(signal.SIGTERM)[0] == 0


def test_the_log_level_holds() -> None:
    with running("serve", "--port", "0", "--log-level", "warning") as server:
        # There is no line to wait for, so wait for the signal handler, which is there before the port is.
        deadline = time.monotonic() + DEADLINE_S
        while not _listens(server.process.pid):
            assert time.monotonic() < deadline
        assert server.end(signal.SIGINT) == (0, "", "")


@pytest.mark.parametrize(("library", "name"), [("websockets", "serve"), ("websockets", "demo"), ("rich", "demo")])
def test_a_missing_library_is_one_line(tmp_path: Path, library: str, name: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules['{library}'] = None")
    if library == "rich":
        # It is needed on a terminal only.
        with (tmp_path / "sitecustomize.py").open("a") as file:
            file.write("; sys.stdout.isatty = lambda: True")
    result = run(name, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr == f"Error: {library} is not installed; try: pip install 'wsfast[serve]'\n"


class TestDemo:
    @pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
    def test_it_shows_figures(self, loop: str) -> None:
        if loop == "--uvloop":
            pytest.importorskip("uvloop")
        with running("demo", "--clients", "40", "--rate", "20", loop) as demo:
            assert demo.process.stdout is not None
            for line in demo.process.stdout:
                figures = dict(figure.split(": ") for figure in line.strip().split("  "))
                if figures["connections"] == "40" and figures["delivered to clients"] != "0 /s":
                    break
            p50, p99 = (float(figures[f"latency {name}"].removesuffix(" ms")) for name in ("p50", "p99"))
            assert p99 >= p50 > 0
            assert figures["messages in"] != "0 /s"
            assert demo.end(signal.SIGINT)[::2] == (0, "")

    def test_it_ends_by_itself_after_its_duration(self) -> None:
        result = run("demo", "--clients", "5", "--duration", "0.5")
        assert (result.returncode, result.stderr) == (0, "")

    def test_ctrl_c_ends_it_and_leaves_no_process(self) -> None:
        # A group of its own, to which the signal goes as a terminal would send it.
        with running("demo", "--clients", "20", start_new_session=True) as demo:
            assert demo.process.stdout is not None
            while "connections: 20 " not in demo.process.stdout.readline():
                assert demo.process.poll() is None
            children = _children(demo.process.pid)
            assert children
            os.killpg(demo.process.pid, signal.SIGINT)
            status, _, err = demo.end()
        assert (status, err) == (0, "")
        _wait_until_gone(children)

    def test_the_clients_do_not_outlive_a_killed_demo(self) -> None:
        with running("demo", "--clients", "20") as demo:
            assert demo.process.stdout is not None
            demo.process.stdout.readline()
            children = _children(demo.process.pid)
            demo.process.kill()
            demo.process.wait()
            _wait_until_gone(children)

    def test_clients_that_die_are_told(self) -> None:
        with running("demo", "--clients", "20") as demo:
            assert demo.process.stdout is not None
            demo.process.stdout.readline()
            for child in _children(demo.process.pid):
                os.kill(child, signal.SIGKILL)
            status, _, err = demo.end()
        assert status == 1
        assert err == "Error: the simulated clients ended unexpectedly\n"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _listens(pid: int) -> bool:
    """Whether the process has a listening TCP socket."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(link))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[3] == "0A" and f"socket:[{row[9]}]" in inodes for row in rows)


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    for pid in pids:
        while (stat := Path(f"/proc/{pid}/stat")).exists():
            with contextlib.suppress(OSError):
                if stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    break  # it has ended; whoever adopted it has not asked yet
            assert time.monotonic() < deadline, f"{pid} is still there"


if sys.platform != "linux":
    pytestmark = pytest.mark.skip(reason="looks at processes through /proc")
