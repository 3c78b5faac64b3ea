"""Memory and garbage collection of one registry, for a fresh process: ``python -m bench.footprint NAME COUNT FILL``.

It prints JSON. Everything that belongs to the application (ids, connection objects, sessions, user ids, tag dicts)
exists before the first reading, so what is found is the registry's own. The collector runs only when asked to: left to
itself it would spend minutes on the filling of the Python generations. Nothing here makes a reference cycle.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import seconds
from bench.population import Population, make_population
from bench.stores import DICT, GENERATION_1, STORES, add_with_all_fields
from wsfast import Quality

PLAIN = "id and connection"
ALL_FIELDS = "all fields"
_MEMBERS_OF_A_GROUP = 100
# Collections for a median: the least and the most, and no more after this time.
_COLLECTIONS = (3, 101)
_COLLECTIONS_MS = 1000.0


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # good enough for what only grows
    return peak if sys.platform == "darwin" else peak * 1024


def _collection_ms() -> float:
    taken: list[float] = []
    least, most = _COLLECTIONS
    while len(taken) < least or (len(taken) < most and sum(taken) < _COLLECTIONS_MS):
        taken.append(seconds(gc.collect) * 1e3)
    return median(taken)


def _fill_all_fields(registry: Any, people: Population) -> None:
    """Everything that a connection has after some traffic and a few heartbeats."""
    add_with_all_fields(registry, people)
    quality = Quality(0.031, 0.004, 0.03125)
    deadline_ns = registry.now_ns() + 30 * 10**9
    for number, record in enumerate(registry.values()):
        record.received(300 + number % 1000)
        record.sent(500 + number % 1000, 2)
        record.heartbeat()
        record.quality = quality
        record.deadline_ns = deadline_ns + number


def _join_groups(registry: Any) -> None:
    groups = max(1, len(registry) // _MEMBERS_OF_A_GROUP)
    for number, record in enumerate(registry.values()):
        registry.join(record, f"room:{number % groups}")


def measure(name: str, count: int, fill: str) -> dict[str, float | None]:
    """Fill a registry.

    Returns:
        ``rss`` and ``sizeof``: bytes for each connection; with all fields ``rss_group`` and ``sizeof_group`` too,
        after each of them joined a group of about 100. ``collect_none_ms`` and ``collect_ms``: a full collection
        before and after. ``tracked``: how many objects more it visits.
    """
    people = make_population(count)
    store = STORES[name]()
    collect_none_ms = _collection_ms()
    tracked = len(gc.get_objects())
    before = _resident_bytes()

    def take_sizes(suffix: str) -> dict[str, float | None]:
        gc.collect()
        rss = (_resident_bytes() - before) / count
        return {f"rss{suffix}": rss, f"sizeof{suffix}": sys.getsizeof(store.held) / count}

    fillers: dict[str, Callable[[], None]] = {
        PLAIN: lambda: store.add(people.ids, people.conns),
        ALL_FIELDS: lambda: _fill_all_fields(store.held, people),
    }
    fillers[fill]()
    if len(store.held) != count:
        raise AssertionError(f"{len(store.held)} of {count} connections")
    found = take_sizes("")
    found |= {"collect_none_ms": collect_none_ms, "collect_ms": _collection_ms()}
    found["tracked"] = len(gc.get_objects()) - tracked
    if fill == ALL_FIELDS:
        _join_groups(store.held)
        found |= take_sizes("_group")
    return found


def fills(name: str) -> tuple[str, ...]:
    """What a store is filled with: a dict has no fields, and the record of both generations is the same."""
    return (PLAIN,) if name in (DICT, GENERATION_1) else (PLAIN, ALL_FIELDS)


if __name__ == "__main__":
    gc.disable()
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])), flush=True)
    os._exit(0)  # tearing down millions of Python objects takes seconds, and nobody waits for them
