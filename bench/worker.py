"""The inside of a process that a benchmark has started and tells what to do: see ``bench.wire.Worker``.

It hides the lines. The first answers what ``start`` returns; then each line names a method and its arguments, and is
answered with what that returns, or with how it failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import resource
import sys
from collections.abc import Mapping
from typing import Any


def run(kinds: Mapping[str, Any]) -> None:
    """Make one of these with the settings of the command line, and do with it what standard input says.

    With the setting ``loop``, on that one.
    """
    logging.disable(logging.ERROR)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    loop = settings.pop("loop", "asyncio")
    factory = None
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 - only where it is asked for

        factory = uvloop.new_event_loop
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_obey(kinds[kind], settings))


async def _obey(make: Any, settings: dict[str, Any]) -> None:
    worker = make(**settings)
    _say(value=await worker.start())
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(functools.partial(asyncio.StreamReaderProtocol, reader), sys.stdin)
    while line := await reader.readline():
        method, arguments = json.loads(line)
        try:
            value = await getattr(worker, method)(**arguments)
        except Exception as error:
            _say(error=repr(error))
        else:
            _say(value=value)


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)
