"""Chromium, headless, by the DevTools protocol over ``websockets``: a process, and its pages.

Only what the tests need: open a page, run a function in it and get what it returns. What a page threw and nobody caught
fails the test when the page is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websocket

__all__ = ["DEADLINE_S", "Browser", "Page", "find_chromium"]

# What only a hang can reach, on a machine that has much else to do.
DEADLINE_S = 30.0

_SWITCHES = (
    "--headless=new",
    # As root, and in containers, there is no sandbox to be had; only pages of these tests are opened.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    # No page here is in the foreground, and their timers are to be none the slower for it.
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """The program: the one that ``WSFAST_CHROMIUM`` names, or one on the PATH; None if there is none."""
    named = os.environ.get("WSFAST_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if (found := shutil.which(name)) is not None), None)


class Browser:
    """A process of Chromium with a profile of its own, and one tab.

    Attributes:
        url: where it speaks the DevTools protocol.
    """

    _tab: str | None = None

    def __init__(self, program: str, directory: Path) -> None:
        self._log = directory / "chromium.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, *_SWITCHES, f"--user-data-dir={directory / 'profile'}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own, so that all its processes can be ended together.
                start_new_session=True,
            )
        try:
            port, path = self._address(directory / "profile" / "DevToolsActivePort")
        except BaseException:
            self.close()
            raise
        self.url = f"ws://127.0.0.1:{port}{path}"

    def _address(self, file: Path) -> tuple[str, str]:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and self._process.poll() is None:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return lines[0], lines[1]
            time.sleep(0.02)
        raise RuntimeError(f"chromium does not come up:\n{self._log.read_text(errors='replace')[-4000:]}")

    def close(self) -> None:
        """End the process, and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(DEADLINE_S)

    @contextlib.asynccontextmanager
    async def page(self, url: str) -> AsyncIterator[Page]:
        """A new page with this address, loaded. One at a time: it is in the tab where the former one was."""
        async with websocket(self.url, max_size=None, ping_interval=None, compression=None, proxy=None) as link:
            page = Page(link)
            if self._tab is None:
                self._tab = (await page.call("Target.createTarget", url="about:blank"))["targetId"]
            await page.open(self._tab, url)
            try:
                yield page
            finally:
                await page.close()
        assert not page.errors, "\n".join(page.errors)


class Page:
    """One page. Made by :meth:`Browser.page`.

    Attributes:
        errors: that were thrown in it, and that nobody has caught.
    """

    def __init__(self, link: ClientConnection) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self._session: str | None = None
        self._listening = asyncio.create_task(self._listen())
        self.errors: list[str] = []

    async def open(self, tab: str, url: str) -> None:
        self._session = (await self.call("Target.attachToTarget", targetId=tab, flatten=True))["sessionId"]
        await self.call("Runtime.enable")
        await self.call("Page.enable")
        await self.go(url)

    async def go(self, url: str) -> None:
        """Go to another address."""
        await self._change("Page.navigate", url=url)

    async def go_back(self) -> None:
        """Go back to the page before, which the browser may have kept."""
        history = await self.call("Page.getNavigationHistory")
        before = history["entries"][history["currentIndex"] - 1]
        await self._change("Page.navigateToHistoryEntry", entryId=before["id"])

    async def _change(self, method: str, **parameters: Any) -> None:
        self._loaded.clear()
        await self.call(method, **parameters)
        async with asyncio.timeout(DEADLINE_S):
            await self._loaded.wait()

    async def close(self) -> None:
        # What still runs in it must not meet the next test.
        await self.go("about:blank")
        self._listening.cancel()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol. Returns its result."""
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        command: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        await self._link.send(json.dumps(command))
        async with asyncio.timeout(DEADLINE_S):
            return await answer

    async def run(self, body: str, **arguments: Any) -> Any:
        """Run the body of an asynchronous function, whose parameters have these names. Returns what it returns, as far
        as JSON can say it.
        """
        expression = f"(async ({{{', '.join(arguments)}}}) => {{{body}\n}})({json.dumps(arguments)})"
        result = await self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            allowUnsafeEvalBlockedByCSP=True,
        )
        assert "exceptionDetails" not in result, _text(result["exceptionDetails"])
        return result["result"].get("value")

    async def _listen(self) -> None:
        async for message in self._link:
            said = json.loads(message)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if answer.done():
                    continue
                if "error" in said:
                    answer.set_exception(RuntimeError(said["error"]["message"]))
                else:
                    answer.set_result(said["result"])
            elif said["method"] == "Page.loadEventFired" or said["params"].get("type") == "BackForwardCacheRestore":
                self._loaded.set()
            elif said["method"] == "Runtime.exceptionThrown":
                self.errors.append(_text(said["params"]["exceptionDetails"]))


def _text(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details["text"])
