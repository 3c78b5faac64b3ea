"""What the tests of the browser's helper share: one Chromium, a page for each test, a server that can be killed.

They need Chromium: without it they are skipped, but where ``CI`` or ``WSFAST_EXPECT_CHROMIUM`` is set, they fail.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.devtools import DEADLINE_S, Browser, Page, find_chromium
from tests.browser.proxy import Proxy

HERE = Path(__file__).parent
MODULE = importlib.resources.files("wsfast") / "static" / "wsfast.js"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        missing = "needs chromium on the PATH, or named by WSFAST_CHROMIUM"
        if os.environ.get("CI") or os.environ.get("WSFAST_EXPECT_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


class _Site(SimpleHTTPRequestHandler):
    """An empty page, and the modules."""

    def do_GET(self) -> None:
        files = {
            "/": ("text/html", b"<!doctype html><title>a page</title>"),
            "/wsfast.js": ("text/javascript", MODULE.read_bytes()),
            "/page.js": ("text/javascript", (HERE / "page.js").read_bytes()),
        }
        content_type, body = files.get(self.path, ("text/plain", b""))
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """Where the pages come from."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.05), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
async def page(browser: Browser, site: str) -> AsyncIterator[Page]:
    """A page that has what page.js defines."""
    async with browser.page(site) as page:
        await page.run("await import('/page.js')")
        yield page


class ServerProcess:
    """server.py in a process of its own, on one port however often it is started.

    Args:
        max_messages: that it keeps for a client.

    Attributes:
        port: where it listens.
    """

    def __init__(self, max_messages: int = 100_000) -> None:
        self._max_messages = max_messages
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(self.port), str(self._max_messages)],
            cwd=HERE.parent.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said.startswith("listening on "), f"the server does not come up: {said!r}"
        self.port = int(said.split()[-1])

    def kill(self) -> None:
        """SIGKILL, so that it can say nothing more."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait(DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def server_process() -> Iterator[ServerProcess]:
    server = ServerProcess()
    yield server
    server.kill()


@pytest.fixture
def server(server_process: ServerProcess) -> ServerProcess:
    """A server that runs, whatever a test before has done to it."""
    server_process.start()
    return server_process


@pytest.fixture
def forgetful() -> Iterator[ServerProcess]:
    """A server that keeps next to nothing for who is away."""
    server = ServerProcess(max_messages=20)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def link(server: ServerProcess) -> AsyncIterator[Proxy]:
    """A link to the server that can be cut."""
    async with Proxy.to(server.port) as proxy:
        yield proxy


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"ws://127.0.0.1:{bound.getsockname()[1]}/"
