"""The ``wsfast`` command: option parsing, signals, and how failures look to a user.

Whatever can go wrong for a reason that a user can do something about is one line on standard error and exit status 1;
a wrong option is 2, as click does it. The first SIGINT or SIGTERM drains and ends with 0, the second one ends at once
with 130. SIGHUP, where there is one, drains ``serve`` for a restart: its clients are told when to come back. The
libraries of the extra ``serve`` are imported only by the commands that need them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from wsfast import __version__
from wsfast.errors import WsfastError

if TYPE_CHECKING:
    from wsfast.hub import Hub

__all__ = ["main"]

logger = logging.getLogger("wsfast")

Reason: TypeAlias = Literal["shutdown", "restart"]

# Windows has none.
_HANGUP: int | None = getattr(signal, "SIGHUP", None)

# As a shell reports a process that SIGINT ended.
_FORCED_EXIT = 130

_POSITIVE = click.IntRange(min=1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="wsfast")
def main() -> None:
    """wsfast manages WebSocket connections: groups, broadcasts, direct messages."""


def _uvloop_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--uvloop/--no-uvloop", "use_uvloop", default=None, help="Use uvloop.  [default: if it is installed]"
    )(command)


@main.command(context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all of IPv4, :: for IPv6.")
@click.option("--port", default=8765, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option("--path", help="Serve only this path of the URL, such as /ws.  [default: any]")
@click.option("--origin", "origins", multiple=True, help="Let browsers in from this origin only; may be repeated.")
@click.option(
    "--on-duplicate",
    type=click.Choice(["reject", "replace"]),
    default="reject",
    help="What to do about a client whose id is taken: reject it, or close the older connection.",
)
@click.option("--shards", default=64, type=_POSITIVE, help="Shards of the registry, a power of two.")
@click.option("--max-message-bytes", default=65_536, type=_POSITIVE, help="Longest message from a client.")
@click.option("--max-id-bytes", default=256, type=_POSITIVE, help="Longest client id.")
@click.option("--max-group-bytes", default=256, type=_POSITIVE, help="Longest group name and user id.")
@click.option("--max-groups", default=100, type=_POSITIVE, help="Most groups of one connection.")
@click.option(
    "--ping-interval",
    default=16.0,
    type=click.FloatRange(min=0),
    help="Seconds of silence before a client is pinged; it is closed after about half as long again. 0: no pings.",
)
@click.option("--compression/--no-compression", default=False, help="Offer permessage-deflate.")
@click.option(
    "--slow-clients",
    type=click.Choice(["disconnect", "drop_newest", "drop_oldest", "keep"]),
    default="disconnect",
    help="What becomes of a client for which too much waits; disconnected with 1013, it is told when to come back.",
)
@click.option("--max-queued-bytes", default=2**20, type=_POSITIVE, help="Most that may wait for one client.")
@click.option(
    "--max-queued-s",
    default=30.0,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds that it may wait.",
)
@click.option(
    "--accept-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="New connections per second to let in; others get 503 with Retry-After.  [default: all are let in]",
)
@click.option(
    "--away",
    "away_s",
    default=5.0,
    type=click.FloatRange(min=0),
    help="Seconds from the signal until a server that restarts is expected to be back.",
)
@click.option(
    "--grace",
    default=180.0,
    type=click.FloatRange(min=0),
    help="Seconds to wait for a client that was cut off and can resume; 0: none.",
)
@click.option(
    "--on-term",
    type=click.Choice(["shutdown", "restart"]),
    default="shutdown",
    help="What clients are told on SIGTERM: that the server ends, or, as on SIGHUP, when to come back.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 16),
    show_default="one for each core, at most 4",
    help="Threads that write to sockets.",
)
@click.option(
    "--drain-timeout",
    default=10.0,
    type=click.FloatRange(min=0),
    help="Seconds that connections have to close when the server ends.",
)
@click.option(
    "--stats-interval",
    default=60.0,
    type=click.FloatRange(min=0),
    help="Seconds between log lines with totals; 0: none.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="What goes to standard error.",
)
@_uvloop_option
def serve(
    *,
    ping_interval: float,
    grace: float,
    drain_timeout: float,
    on_term: Reason,
    stats_interval: float,
    log_level: str,
    use_uvloop: bool | None,
    **options: Any,
) -> None:
    """Run a hub server, to which clients speak small JSON messages.

    Connect to ws://HOST:PORT/?client_id=ID&user_id=ID (both optional), then send for example

    \b
      {"type": "join", "group": "room:1"}
      {"type": "publish", "group": "room:1", "data": "hello"}
      {"type": "send", "client_id": "c2", "data": {"any": "JSON"}}
      {"type": "who", "group": "room:1"}
      {"type": "leave", "group": "room:1"}

    Every message is answered; add "ref" to find the answer that belongs to it. "python -m pydoc wsfast.hub" has the
    whole protocol.

    There is no authentication: ids are taken from the URL as they come. Listen where only trusted clients can reach, or
    behind a proxy that checks them.
    """
    _configure_logging(log_level)
    hub_module = _import_extra("wsfast.hub")

    async def run() -> None:
        settings = hub_module.HubSettings(ping_interval_s=ping_interval or None, grace_s=grace or None, **options)
        await _serve(hub_module.Hub(settings), drain_timeout, stats_interval, on_term)

    _run(run, use_uvloop)


async def _serve(hub: Hub, drain_timeout_s: float, stats_interval_s: float, on_term: Reason) -> None:
    stop = asyncio.Event()
    reasons: dict[int, Reason] = {signal.SIGINT: "shutdown", signal.SIGTERM: on_term}
    first = _set_on_signal(stop, hangup=True)
    await hub.start()
    logger.info("listening on %s", hub.url)
    statistics = asyncio.create_task(_log_stats(hub, stats_interval_s))
    reason: Reason = "shutdown"
    try:
        await stop.wait()
        reason = reasons.get(first[0], "restart")
        logger.info("draining %d connections for a %s; once more to end at once", len(hub.manager.registry), reason)
    finally:
        statistics.cancel()
        await hub.stop(drain_timeout_s, reason=reason)
    logger.info("ended")


async def _log_stats(hub: Hub, interval_s: float) -> None:
    before = hub.manager.stats()
    while interval_s:
        await asyncio.sleep(interval_s)
        now = hub.manager.stats()
        logger.info(
            "%d connections, %d groups; in the last %g s: %d opened, %d closed, %d messages in, %d out",
            now["connections"],
            now["groups"],
            interval_s,
            *(now[key] - before[key] for key in ("opened", "closed", "messages_in", "messages_out")),
        )
        before = now


@main.command(context_settings={"show_default": True})
@click.option("--clients", default=200, type=_POSITIVE, help="Simulated clients.")
@click.option(
    "--rate", default=2.0, type=click.FloatRange(min=0, min_open=True), help="Messages per second and client."
)
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port of the hub; 0 takes a free one.")
@click.option("--duration", default=0.0, type=click.FloatRange(min=0), help="Seconds to run; 0: until Ctrl-C.")
@_uvloop_option
def demo(*, clients: int, rate: float, port: int, duration: float, use_uvloop: bool | None) -> None:
    """Run a hub with simulated clients in a second process, and show what passes between them."""
    _configure_logging("warning")
    module = _import_extra("wsfast.demo")
    live = _import_extra("rich.live").Live(auto_refresh=False) if sys.stdout.isatty() else None

    async def run() -> None:
        stop = asyncio.Event()
        _set_on_signal(stop)
        with live or contextlib.nullcontext():
            if duration:
                asyncio.get_running_loop().call_later(duration, stop.set)
            await module.run_demo(clients=clients, rate=rate, port=port, stop=stop, show=module.make_show(live=live))

    _run(run, use_uvloop)


@main.command(hidden=True)
@click.option("--url", required=True)
@click.option("--clients", required=True, type=int)
@click.option("--rate", required=True, type=float)
def demo_clients(*, url: str, clients: int, rate: float) -> None:
    """The second process of the demo."""
    module = _import_extra("wsfast.demo")
    _run(lambda: module.run_clients(url, clients, rate), None)


def _import_extra(name: str) -> Any:
    """Import a module that needs the libraries of the extra ``serve``, or tell how to get them."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("websockets", "rich"):
            raise
        raise click.ClickException(f"{library} is not installed; try: pip install 'wsfast[serve]'") from None


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if level != "debug":
        # It reports every scanner that opens a port without a handshake, with a traceback.
        logging.getLogger("websockets").setLevel(logging.CRITICAL)


def _set_on_signal(stop: asyncio.Event, *, hangup: bool = False) -> list[int]:
    """Have the first signal set *stop*, and the second one end the process.

    Args:
        stop: the event.
        hangup: whether SIGHUP is one of them, where there is one. It ends nothing at once, as shells and service
            managers send it behind others.

    Returns:
        A list that has the first signal in it once *stop* is set by one.
    """
    loop = asyncio.get_running_loop()
    first: list[int] = []

    def received(number: int) -> None:
        if stop.is_set():
            if number == _HANGUP:
                return
            click.echo("wsfast: ended at once", err=True)
            logging.shutdown()
            os._exit(_FORCED_EXIT)
        first.append(number)
        stop.set()

    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    # Whoever started this with nohup wants it to be ignored.
    if hangup and _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
        numbers.append(_HANGUP)
    for number in numbers:
        try:
            loop.add_signal_handler(number, received, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(received, number))
    return first


def _run(command: Callable[[], Coroutine[Any, Any, None]], use_uvloop: bool | None) -> None:
    with asyncio.Runner(loop_factory=_loop_factory(use_uvloop)) as runner:
        try:
            runner.run(command())
        except WsfastError as error:  # a setting, an address: what the user can change
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:  # before there was a handler, or after
            raise SystemExit(_FORCED_EXIT) from None


def _loop_factory(use_uvloop: Literal[True, False, None]) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if use_uvloop is False:
        return None
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    except ModuleNotFoundError:
        if use_uvloop:
            raise click.ClickException("uvloop is not installed; try: pip install uvloop") from None
        return None
    return factory
