"""A link that can be cut: a proxy for TCP between a page and its server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, Self

__all__ = ["Cut", "Proxy"]


@dataclass(frozen=True)
class Cut:
    """Where a connection ends: after so many bytes in one direction.

    Attributes:
        up, down: bytes to the server, and to the page, that still arrive.
        reset: whether it ends with a reset, which may take with it what has just arrived, or in order.
    """

    up: int | None = None
    down: int | None = None
    reset: bool = False


@dataclass(eq=False)
class _Pair:
    """The two connections of one through the proxy."""

    page: asyncio.StreamWriter
    server: asyncio.StreamWriter
    cut: Cut
    sent_down: bytearray = field(default_factory=bytearray)

    def end(self, *, reset: bool) -> None:
        for writer in (self.page, self.server):
            if reset:
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Listens on a port of its own, and passes on what comes, until told otherwise.

    Attributes:
        port: where it listens.
        target: the port of the server.
        mode: what becomes of new connections: they are passed on, closed at once, or get no answer at all.
        cuts: where the next connections end; those after them do not.
        cut_at: bytes for the page in front of which a connection ends, once.
        stalled: whether nothing is passed on to the server any more.
        made: how many connections there were.
        sent_down: what servers sent on the connections that there were, in their order.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.mode: Literal["pass", "refuse", "hole"] = "pass"
        self.cuts: list[Cut] = []
        self.cut_at: bytes | None = None
        self.stalled = False
        self.made = 0
        self.sent_down: list[bytearray] = []
        self._pairs: set[_Pair] = set()
        self._unanswered: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, target: int) -> AsyncIterator[Self]:
        """A proxy that listens."""
        self = cls(target)
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        """End all connections with a reset."""
        for pair in self._pairs:
            pair.end(reset=True)
        for writer in self._unanswered:
            writer.transport.abort()

    def cut_pages(self) -> None:
        """End all connections for the page; to the server they look alive."""
        for pair in self._pairs:
            pair.page.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.made += 1
        try:
            if self.mode == "hole":
                self._unanswered.add(writer)
                await reader.read(-1)
            elif self.mode == "pass":
                await self._pass(reader, writer)
        except OSError:
            return  # a link that is cut is what this is for
        finally:
            self._unanswered.discard(writer)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        cut = self.cuts.pop(0) if self.cuts else Cut()
        pair = _Pair(writer, server_writer, cut)
        self._pairs.add(pair)
        self.sent_down.append(pair.sent_down)
        try:
            await asyncio.gather(
                self._pump(pair, reader, server_writer, cut.up, lambda data: not self.stalled),
                self._pump(pair, server_reader, writer, cut.down, lambda data: self._look(pair, data)),
            )
        finally:
            self._pairs.discard(pair)
            server_writer.transport.abort()

    def _look(self, pair: _Pair, data: bytes) -> bool:
        pair.sent_down += data
        if self.cut_at is None or self.cut_at not in data:
            return True
        self.cut_at = None
        pair.end(reset=True)
        return False

    async def _pump(
        self,
        pair: _Pair,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: int | None,
        passes: Callable[[bytes], bool],
    ) -> None:
        while data := await reader.read(2**16):
            if not passes(data):
                continue
            if left is not None and len(data) >= left:
                writer.write(data[:left])
                with contextlib.suppress(OSError):
                    await writer.drain()
                pair.end(reset=pair.cut.reset)
                return
            if left is not None:
                left -= len(data)
            writer.write(data)
            await writer.drain()
        # If only the page was cut off, the server is not to notice.
        if not pair.page.transport.is_closing():
            writer.close()
