"""The README keeps its word: its example runs as it stands, and what it names is there."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = "8765"


def free_port() -> str:
    with socket.create_server(("localhost", 0)) as listening:
        return str(listening.getsockname()[1])


def example() -> str:
    """The first complete program of the README."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if "asyncio.run" in block)


async def chat(url: str) -> list[str | bytes]:
    """What two other clients get of a message, once all three are in the lobby."""
    # As long as the server needs to come up, and each client to be let in: a refused connection is tried again.
    async with asyncio.timeout(30):
        while True:
            try:
                first = await connect(url)
                break
            except OSError:
                await asyncio.sleep(0.05)
        async with first, connect(url) as second, connect(url) as third:
            # Handlers begin at their own pace: say it until both others were there to hear it.
            heard: list[str | bytes] = []
            for peer in (second, third):
                while True:
                    await first.send("hello")
                    try:
                        heard.append(await asyncio.wait_for(peer.recv(), 0.5))
                        break
                    except TimeoutError:
                        continue
            return heard


def test_example_runs_as_it_stands() -> None:
    port = free_port()
    program = example()
    assert PORT in program
    server = subprocess.Popen(
        [sys.executable, "-c", program.replace(PORT, port)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert server.stderr is not None
    log = ""
    try:
        assert asyncio.run(chat(f"ws://localhost:{port}")) == ["hello", "hello"]
        # The last connection is closed for its client a moment before the server says so.
        while len(re.findall(r"INFO:root:\S+: 1000$", log, re.MULTILINE)) < 3:
            line = server.stderr.readline()
            assert line, f"the server has ended: {log}"
            log += line
    finally:
        server.terminate()
        log += server.communicate(timeout=30)[1]
    assert "Traceback" not in log


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
