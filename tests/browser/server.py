"""The server that the browser's tests cut off, kill and start again: ``python server.py PORT MAX_MESSAGES``.

It says ``listening on PORT`` when it does. It answers each message with itself, in order, but for

- ``!stream N``: sends ``s0`` to ``sN-1``, a few at a time, whether the client is there or not;
- ``!close CODE REASON``: closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from wsfast import ConnectionManager, HerdPolicy, PeerError, SessionPolicy, UnknownConnection
from wsfast.adapters.websockets import serve

SUBPROTOCOLS = ("chat.v2", "chat.v1")


def choose(_ws: ServerConnection, offered: Sequence[str]) -> str | None:
    """One that both sides know, or none: whoever knows none is served as well."""
    return next((name for name in SUBPROTOCOLS if name in offered), None)


async def stream(manager: ConnectionManager, client_id: str, count: int) -> None:
    for number in range(count):
        await manager.send(client_id, f"s{number}")
        if number % 5 == 4:
            await asyncio.sleep(0.01)  # so that some of it meets each of the cuts


async def main(port: int, max_messages: int) -> None:
    # Each test has a new page, and leaves its streams behind.
    streams: set[asyncio.Task[None]] = set()

    async def answer(ws: ServerConnection) -> None:
        client_id = ws.wsfast.client_id
        async for message in ws:
            match message.split(" ", 2) if isinstance(message, str) else []:
                case ["!stream", count]:
                    streams.add(asyncio.create_task(stream(manager, client_id, int(count))))
                case ["!close", code, reason]:
                    await manager.disconnect(client_id, int(code), reason)
                case _:
                    await manager.send(client_id, message)

    async def handle(ws: ServerConnection) -> None:
        # Connections end here in all ways there are.
        with contextlib.suppress(ConnectionClosed, PeerError, UnknownConnection):
            await answer(ws)

    # Clients are told to spread over next to no time.
    herd = HerdPolicy(accept_rate=1e6, window_s=0)
    sessions = SessionPolicy(max_messages=max_messages)
    async with (
        ConnectionManager(health=None, herd=herd, sessions=sessions) as manager,
        serve(
            handle, "127.0.0.1", port, manager=manager, select_subprotocol=choose, max_size=None, compression=None
        ) as server,
    ):
        print(f"listening on {next(iter(server.sockets)).getsockname()[1]}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
