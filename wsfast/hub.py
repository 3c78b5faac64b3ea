"""The ready-made hub server: groups, direct messages, and who is here, over small JSON text messages.

It hides the protocol between the hub and its clients. A client connects to ``ws://host:port/?client_id=...&user_id=...``
(both optional: without a client id it gets a random one) and is greeted::

    {"type": "welcome", "client_id": "...", "user_id": null, "max_message_bytes": 65536}

Requests are JSON objects. Each gets exactly one answer, in order. An optional ``ref`` (a string of at most 128
characters, or an integer) is repeated in the answer, so that a client can tell its requests apart; without one,
answers have no ``ref``. Fields that are not listed are ignored.

====================================================  ===============================================================
request                                               answer
====================================================  ===============================================================
``{"type": "join", "group": "room:1"}``               ``{"type": "joined", "group": "room:1"}``
``{"type": "leave", "group": "room:1"}``              ``{"type": "left", "group": "room:1"}``
``{"type": "publish", "group": "room:1",              ``{"type": "published", "group": "room:1", "receivers": 2}``;
"data": <any JSON>}``                                 the other members get ``{"type": "message", "group": "room:1",
                                                      "from": "<client id>", "data": ...}``
``{"type": "send", "client_id": "c2", "data": ...}``  ``{"type": "sent", "receivers": 1}``; the receivers get
or with ``"user_id"`` in place of ``"client_id"``     ``{"type": "direct", "from": "<client id>", "data": ...}``
``{"type": "who", "group": "room:1", "limit": 100,    ``{"type": "members", "group": "room:1", "total": 250,
"after": "c100"}`` (limit and after are optional)     "members": [{"client_id": ..., "user_id": ...}, ...],
                                                      "next": "c200"}``: in the order of their ids; ``next`` is the
                                                      ``after`` of the next page, or null at the end
====================================================  ===============================================================

``publish`` and ``who`` are for members of the group only: otherwise anybody who guesses a group's name could write to
it and list it.

What cannot be done is answered by ``{"type": "error", "code": ..., "reason": ...}``; the connection stays. The codes:
``not_text`` (a binary message), ``too_big``, ``bad_json`` (also: nested too deeply, a key twice, NaN, text without
a UTF-8 form), ``not_an_object``, ``missing_field``, ``wrong_type``, ``bad_value``, ``unknown_type``, ``bad_name``,
``too_many_groups``, ``not_a_member``, ``not_connected``.

Close codes: 1001 when the server ends, 1012 when it restarts; 1013 for a client that reads too slowly; 4408 for one
that gave no sign of life; 1008 with the reason if the ids of the URL cannot be used or the client id is taken; 1009 for
a message of more than four times the limit, which is not even read; 4409 for a client whose id was taken over
(``on_duplicate="replace"``). With 1012 and 1013, the reason tells when to come back. While the server ends, and while
more come than are let in (``accept_rate``), the opening handshake is answered with 503 and Retry-After.

Not done here: authentication. The ids of the URL are taken on trust.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast
from urllib.parse import parse_qsl, urlsplit

from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import ConnectionClosed as LinkClosed
from websockets.http11 import Request, Response
from websockets.typing import Origin

from wsfast.adapters import adapter_for
from wsfast.adapters.websockets import serve
from wsfast.delivery import Backpressure
from wsfast.errors import (
    DetachedRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    PeerError,
    UnknownConnection,
    WsfastError,
)
from wsfast.events import ConnectionClosed, ConnectionOpened
from wsfast.health import HealthPolicy
from wsfast.manager import Connection, ConnectionManager
from wsfast.reconnect import HerdPolicy
from wsfast.session import SESSIONS, SessionPolicy

__all__ = ["CannotListen", "Hub", "HubSettings", "Refused", "parse"]

logger = logging.getLogger(__name__)

# The transport gives up on a message only above this many times the limit, so that most that are too long can be
# answered instead of ending the connection.
_HARD_LIMIT_FACTOR = 4

# Deeper than any sensible message, and far from where a JSON library of a receiver would give up.
_MAX_DEPTH = 32

# Length of the ids that ``attach`` makes for clients that bring none; the limit must have room for them.
_GENERATED_ID_BYTES = 22

_MAX_REF_CHARACTERS = 128

# JavaScript has no exact integers beyond this, so a larger reference would not come back as it was sent.
_MAX_REF = 2**53 - 1

_DEFAULT_PAGE = 100
_MAX_PAGE = 1000

# Connections that have not finished their opening handshake when the server ends are not waited for longer.
_HANDSHAKE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class HubSettings:
    """What can be set of a hub.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        path: the only path of the URL that is served; None: any.
        shards, max_id_bytes, max_groups: of the registry; ``max_group_bytes`` holds for user ids as well.
        max_message_bytes: longest request that is read.
        ping_interval_s: seconds without a sign of life before a client is sent a ping; one that gives none for about
            half as long again is closed. All other times are in proportion: see ``HealthPolicy.every``. None: no pings.
        origins: the origins that browsers may come from; empty: any. Clients without an origin, which are no
            browsers, are always let in.
        on_duplicate: what becomes of a client whose id is taken: "reject" it, or "replace" the older connection.
        compression: whether permessage-deflate is offered. It costs memory and time for each connection.
        slow_clients, max_queued_bytes, max_queued_s: what becomes of a client that reads too slowly, and how slow that
            is: ``policy``, ``max_bytes`` and ``max_age_s`` of ``Backpressure``.
        accept_rate: new connections per second that are let in; what comes beyond gets 503. None: all are let in.
        away_s: how long the server is expected to be away when it restarts. See ``HerdPolicy`` for both.
        grace_s: how long clients are waited for that speak the protocol of resume (docs/resume.md); None: they are not.
        threads: that write to sockets; None: as many as there are cores, but no more than 4.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    path: str | None = None
    shards: int = 64
    max_message_bytes: int = 65_536
    max_id_bytes: int = 256
    max_group_bytes: int = 256
    max_groups: int = 100
    ping_interval_s: float | None = 16.0
    origins: tuple[str, ...] = ()
    on_duplicate: Literal["reject", "replace"] = "reject"
    compression: bool = False
    slow_clients: Literal["disconnect", "drop_newest", "drop_oldest", "keep"] = "disconnect"
    max_queued_bytes: int = 2**20
    max_queued_s: float = 30.0
    accept_rate: float | None = None
    away_s: float = 5.0
    grace_s: float | None = SESSIONS.grace_s
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_message_bytes < 1:
            raise InvalidSetting("max_message_bytes", self.max_message_bytes, "1 or more")
        if self.max_id_bytes < _GENERATED_ID_BYTES:
            raise InvalidSetting("max_id_bytes", self.max_id_bytes, f"{_GENERATED_ID_BYTES} or more")
        if self.ping_interval_s is not None and not self.ping_interval_s > 0:
            raise InvalidSetting("ping_interval_s", self.ping_interval_s, "more than 0, or None")


class CannotListen(WsfastError, OSError):
    """The address cannot be listened on. Attributes: ``host``, ``port``, ``why``."""

    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(host, port, why)
        self.host = host
        self.port = port
        self.why = why

    def __str__(self) -> str:
        return f"cannot listen on {self.host}:{self.port}: {self.why}"


class Refused(Exception):
    """A request that cannot be served. ``code`` and ``reason`` go to the client."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Hub:
    """One hub server. ``async with Hub(settings) as hub`` listens; leaving the block drains."""

    def __init__(self, settings: HubSettings | None = None) -> None:
        self.settings = settings = settings or HubSettings()
        self.manager = ConnectionManager(
            settings.shards,
            max_id_bytes=settings.max_id_bytes,
            max_name_bytes=settings.max_group_bytes,
            max_groups=settings.max_groups,
            # What goes out is what came in, in an envelope, with numbers perhaps written differently.
            max_message_bytes=2**20 + 16 * settings.max_message_bytes,
            backpressure=Backpressure(
                policy=settings.slow_clients, max_bytes=settings.max_queued_bytes, max_age_s=settings.max_queued_s
            ),
            health=None if settings.ping_interval_s is None else HealthPolicy.every(settings.ping_interval_s),
            herd=_herd_policy(settings),
            sessions=None if settings.grace_s is None else SessionPolicy(grace_s=settings.grace_s),
            threads=settings.threads,
        )
        self.manager.on(ConnectionOpened, _log_opened)
        self.manager.on(ConnectionClosed, _log_closed)
        self._server: Server | None = None
        self._requests: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "join": self._join,
            "leave": self._leave,
            "publish": self._publish,
            "send": self._send,
            "who": self._who,
        }

    async def __aenter__(self) -> Hub:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen.

        Raises:
            CannotListen: somebody else does already, or there is no such address.
        """
        settings = self.settings
        await self.manager.start()
        try:
            self._server = await serve(
                self._handle,
                settings.host,
                settings.port,
                manager=self.manager,
                identify=self._identify,
                process_request=self._check_path,
                origins=[*map(Origin, settings.origins), None] if settings.origins else None,
                max_size=_HARD_LIMIT_FACTOR * settings.max_message_bytes,
                ping_interval=None,
                compression="deflate" if settings.compression else None,
            )
        except BaseException as error:
            await self.manager.close()
            if isinstance(error, OSError):
                # Of a port in use the event loops say it in words of their own; of a name that cannot be resolved the
                # number is not one of errno.
                why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
                raise CannotListen(settings.host, settings.port, why) from error
            raise

    async def stop(self, timeout_s: float = 10.0, *, reason: Literal["shutdown", "restart"] = "shutdown") -> None:
        """Stop listening, and drain: see ``ConnectionManager.close``."""
        server, self._server = self._server, None
        if server is not None:
            server.close(close_connections=False)
        await self.manager.close(timeout_s, reason=reason)
        if server is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.wait_closed(), _HANDSHAKE_GRACE_S)

    @property
    def url(self) -> str:
        """Where clients connect. Only while it listens."""
        assert self._server is not None, "the hub does not listen"
        host, port = next(iter(self._server.sockets)).getsockname()[:2]
        return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"

    def _check_path(self, ws: ServerConnection, request: Request) -> Response | None:
        if self.settings.path is None or urlsplit(request.path).path == self.settings.path:
            return None
        return ws.respond(404, "There is nothing here.\n")

    def _identify(self, ws: ServerConnection) -> dict[str, Any]:
        """The ids of the URL, as keywords of ``attach``, which checks their lengths."""
        assert ws.request is not None
        try:
            query = parse_qsl(
                urlsplit(ws.request.path).query, keep_blank_values=True, errors="strict", max_num_fields=16
            )
        except ValueError:
            raise InvalidName("query", "has more than 16 fields, or is not in UTF-8") from None
        ids: dict[str, Any] = {}
        for name, value in query:
            if name in ("client_id", "user_id"):
                if name in ids:
                    raise InvalidName(name.replace("_", " "), "is given twice")
                ids[name] = value
        return {**ids, "on_duplicate": self.settings.on_duplicate}

    async def _handle(self, ws: ServerConnection) -> None:
        conn = cast("Connection", ws.wsfast)  # type: ignore[attr-defined]
        try:
            await conn.send(
                _encode(
                    {
                        "type": "welcome",
                        "client_id": conn.client_id,
                        "user_id": conn.user_id,
                        "max_message_bytes": self.settings.max_message_bytes,
                    }
                )
            )
            async for message in ws:
                await conn.send(await self._answer(conn, message))
        except (PeerError, DetachedRecord, LinkClosed):
            return  # the connection has ended, which _log_closed tells
        except Exception:
            logger.exception("serving %r failed", conn.client_id)
            raise

    async def _answer(self, conn: Connection, message: str | bytes) -> str:
        """What to answer to one message; never raises for what is in it."""
        ref: str | int | None = None
        try:
            request = parse(message, self.settings.max_message_bytes)
            ref = _ref(request)
            answer = await self._request(request)(conn, request)
        except Refused as refused:
            answer = {"type": "error", "code": refused.code, "reason": refused.reason}
            conn.failed("in")
        if ref is not None:
            answer["ref"] = ref
        return _encode(answer)

    def _request(self, request: dict[str, Any]) -> Callable[[Connection, dict[str, Any]], Awaitable[dict[str, Any]]]:
        name = _text(request, "type")
        try:
            return self._requests[name]
        except KeyError:
            raise Refused("unknown_type", f"type must be one of {', '.join(self._requests)}") from None

    async def _join(self, conn: Connection, request: dict[str, Any]) -> dict[str, Any]:
        group = _text(request, "group")
        try:
            conn.join(group)
        except InvalidName as error:
            raise Refused("bad_name", str(error)) from None
        except LimitExceeded as error:
            raise Refused("too_many_groups", str(error)) from None
        return {"type": "joined", "group": group}

    async def _leave(self, conn: Connection, request: dict[str, Any]) -> dict[str, Any]:
        group = _text(request, "group")
        if not conn.leave(group):
            raise Refused("not_a_member", "you are not in this group")
        return {"type": "left", "group": group}

    async def _publish(self, conn: Connection, request: dict[str, Any]) -> dict[str, Any]:
        group, data = _membership(conn, request), _field(request, "data")
        message = _encode({"type": "message", "group": group, "from": conn.client_id, "data": data})
        result = await self.manager.broadcast(message, group=group, exclude=conn)
        return {"type": "published", "group": group, "receivers": result.sent + result.queued}

    async def _send(self, conn: Connection, request: dict[str, Any]) -> dict[str, Any]:
        if ("client_id" in request) == ("user_id" in request):
            raise Refused("missing_field", "either client_id or user_id is needed")
        message = _encode({"type": "direct", "from": conn.client_id, "data": _field(request, "data")})
        # Not `send`, which waits for a peer that is slow: the client that asks has nothing to do with that.
        if "client_id" in request:
            client_id = _text(request, "client_id")
            result = await self.manager.broadcast(message, to=[client_id])
            why = str(UnknownConnection(client_id)) if not result.targets else "the client is going, or too slow"
        else:
            result = await self.manager.send_to_user(_text(request, "user_id"), message)
            why = "the user has no connection"
        if not result.sent + result.queued:
            raise Refused("not_connected", why)
        return {"type": "sent", "receivers": result.sent + result.queued}

    async def _who(self, conn: Connection, request: dict[str, Any]) -> dict[str, Any]:
        group = _membership(conn, request)
        limit, after = request.get("limit", _DEFAULT_PAGE), request.get("after", "")
        if type(limit) is not int or not isinstance(after, str):
            raise Refused("wrong_type", "limit must be an integer, and after a string")
        if not 1 <= limit <= _MAX_PAGE:
            raise Refused("bad_value", f"limit must be from 1 to {_MAX_PAGE}")
        members = self.manager.registry.group(group)
        # One more than asked for tells whether there is another page.
        page = heapq.nsmallest(
            limit + 1, ((record.client_id, record.user_id) for record in members if record.client_id > after)
        )
        return {
            "type": "members",
            "group": group,
            "total": len(members),
            "members": [{"client_id": client_id, "user_id": user_id} for client_id, user_id in page[:limit]],
            "next": page[limit - 1][0] if len(page) > limit else None,
        }


def _herd_policy(settings: HubSettings) -> HerdPolicy:
    if settings.accept_rate is None:
        return HerdPolicy(away_s=settings.away_s)
    return HerdPolicy(accept_rate=settings.accept_rate, away_s=settings.away_s, admission=True)


def parse(message: str | bytes, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a message of a client.

    It may be passed on to others, so it has to be JSON that every receiver reads in the same way: no NaN, no key twice,
    no text without a UTF-8 form, no depth that some parser would choke on.

    Raises:
        Refused: it is anything else.
    """
    if isinstance(message, bytes):
        raise Refused("not_text", "send JSON in text messages, not in binary ones")
    size = len(message) if message.isascii() else len(message.encode())
    if size > max_bytes:
        raise Refused("too_big", f"a message of {size} bytes is over the limit of {max_bytes}")
    try:
        request = json.loads(message, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise Refused("bad_json", f"{error.msg} at character {error.pos}") from None
    except ValueError:  # the interpreter's limit for the digits of an integer
        raise Refused("bad_json", "a number has too many digits") from None
    # Counting brackets is quick and decides nearly always: what has few of them cannot be deep.
    if message.count("[") + message.count("{") > _MAX_DEPTH and _is_deeper_than(request, _MAX_DEPTH):
        raise _too_deep()
    if not isinstance(request, dict):
        raise Refused("not_an_object", "a message must be a JSON object")
    # A text frame is valid UTF-8, so only an escape can smuggle in half of a surrogate pair.
    if "\\u" in message:
        _encode(request)
    return request


def _encode(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise Refused("bad_json", "a number is too large") from None
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("bad_json", "a text holds a lone surrogate, so it has no UTF-8 form") from None
    return text


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Refused("bad_json", "an object has a key twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise Refused("bad_json", f"{name} is not JSON")


def _too_deep() -> Refused:
    return Refused("bad_json", f"nested more than {_MAX_DEPTH} levels deep")


def _is_deeper_than(value: Any, limit: int) -> bool:
    """Whether objects and arrays of *value* are nested in more than *limit* levels, *value* being the first one."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


def _ref(request: dict[str, Any]) -> str | int | None:
    ref = request.get("ref")
    if ref is None or (isinstance(ref, str) and len(ref) <= _MAX_REF_CHARACTERS):
        return ref
    if type(ref) is int and abs(ref) <= _MAX_REF:
        return ref
    raise Refused("wrong_type", f"ref must be a string of at most {_MAX_REF_CHARACTERS} characters or an integer")


def _field(request: dict[str, Any], name: str) -> Any:
    try:
        return request[name]
    except KeyError:
        raise Refused("missing_field", f"{name} is missing") from None


def _text(request: dict[str, Any], name: str) -> str:
    value = _field(request, name)
    if not isinstance(value, str):
        raise Refused("wrong_type", f"{name} must be a string")
    return value


def _membership(conn: Connection, request: dict[str, Any]) -> str:
    """The group of *request*, of which *conn* is a member."""
    group = _text(request, "group")
    if group not in conn.groups:
        raise Refused("not_a_member", "join the group first")
    return group


def _log_opened(event: ConnectionOpened) -> None:
    conn = event.conn
    address = adapter_for(conn.conn).remote_address(conn.conn)
    logger.info("connected %r, user %r, from %s", conn.client_id, conn.user_id, address)


def _log_closed(event: ConnectionClosed) -> None:
    conn = event.conn
    logger.info(
        "disconnected %r after %.1f s: %d %r by %s; in: %d messages, %d bytes; out: %d messages, %d bytes",
        conn.client_id,
        event.duration_s,
        event.code,
        event.reason,
        event.by,
        conn.messages_in,
        conn.bytes_in,
        conn.messages_out,
        conn.bytes_out,
    )
