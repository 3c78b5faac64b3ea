"""The registry against ``dict`` and both generations in pure Python, at 1,000, 100,000 and 1,000,000 connections.

How each column is taken:

* *get*: each id once, in random order, new for each repetition. The loop's own cost, measured over ids that are in the
  caches, is taken off; waiting for the memory of the id is not. *get, new str*: the same with equal strings that were
  made a moment ago and have no hash yet, like an id that came over the wire.
* *get_many*: 10,000 random ids, new for each repetition, as one call; of a dict as a list comprehension over ``get``.
* *add*: fill an empty registry, its growth included. *re-add*: into a full one, what *remove* has taken out at random.
* *batches*, *due*: the whole registry; every record has a deadline far ahead.

At 1,000 connections everything is in the caches, which a first round sees to. At more, the caches are filled with
something else before each figure, so nobody profits from what was loaded by another one or by drawing the ids.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any, TypeAlias

from bench import footprint
from bench.harness import Benchmark, Report, Samples, evict_caches, figure, in_fresh_process, interleave, seconds
from bench.population import (
    SEED,
    copies,
    make_conns,
    make_ids,
    random_ids_like,
    same_hash_ids,
    same_shard_ids,
)
from bench.stores import DICT, GENERATION_2, NATIVE, STORES, Store, loop_alone

_Figures: TypeAlias = dict[str, Samples]
_Footprints: TypeAlias = dict[str, dict[str, dict[str, Any]]]

# What fits into the second-level cache with all that belongs to it.
_HOT_CONNECTIONS = 1_000
_BATCH = 100
_MANY = 10_000
_FAR_NS = 3600 * 10**9


@dataclass(frozen=True)
class _Size:
    """How much to do at a size."""

    connections: int
    lookups: int
    changes: int
    repetitions: int
    fills: int

    @property
    def is_hot(self) -> bool:
        return self.connections <= _HOT_CONNECTIONS


_SIZES = (
    _Size(1_000, lookups=50_000, changes=1_000, repetitions=15, fills=15),
    _Size(100_000, lookups=100_000, changes=20_000, repetitions=9, fills=3),
    _Size(1_000_000, lookups=50_000, changes=20_000, repetitions=7, fills=1),
)
_QUICK_SIZES = (
    _Size(1_000, lookups=2_000, changes=1_000, repetitions=2, fills=2),
    _Size(5_000, lookups=5_000, changes=1_000, repetitions=2, fills=1),
)
_COLLIDING = 100_000
_QUICK_COLLIDING = 2_000
_COLLIDING_LOOKUPS = 20_000


@dataclass
class _Trial:
    """The stores at one size, and what they hold."""

    size: _Size
    ids: list[str]
    absent: list[str]
    conns: tuple[object, ...]
    stores: dict[str, Store]

    def every(self, take: Callable[[Store, Any], float], draw: Callable[[int], Any], repetitions: int = 0) -> Samples:
        """Interleaved figures of all stores: `take` gets a store and what `draw` made for the repetition."""
        cases = {name: partial(take, store) for name, store in self.stores.items()}
        return interleave(cases, repetitions or self.size.repetitions, draw)

    def settle(self) -> None:
        """What precedes each figure."""
        if not self.size.is_hot:
            evict_caches()

    def sample(self, ids: Sequence[str], repetition: int) -> list[str]:
        """Ids in an order that is new for each repetition."""
        count = min(len(ids), self.size.lookups)
        return Random(SEED + repetition).sample(ids, count)


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"wrong result: {what}")


# ---- figures ---------------------------------------------------------------------------------------------------------


def _fill(trial: _Trial) -> Samples:
    """Nanoseconds for each connection to fill an empty store; the last ones stay."""

    def take(name: str, _: None) -> float:
        former = trial.stores.pop(name, None)
        if former is not None:
            former.clear()
        store = trial.stores[name] = STORES[name]()
        taken = seconds(store.add, trial.ids, trial.conns)
        _must(len(store.held) == len(trial.ids), f"{name} has {len(store.held)} connections")
        return taken / len(trial.ids) * 1e9

    samples = interleave({name: partial(take, name) for name in STORES}, trial.size.fills, lambda _: None)
    trial.stores = {name: trial.stores[name] for name in STORES}
    return samples


def _loop_s(trial: _Trial) -> float:
    """Seconds for each turn of the loop around a look-up."""
    hot = trial.ids[:_HOT_CONNECTIONS]
    return median(seconds(loop_alone, hot, 50) for _ in range(15)) / (50 * len(hot))


def _get(trial: _Trial, ids: Sequence[str], *, present: bool = True) -> Samples:
    """Nanoseconds for each look-up."""
    rounds = max(1, trial.size.lookups // len(ids))
    loop_s = _loop_s(trial)

    def take(store: Store, keys: list[str]) -> float:
        store.look_up(keys[:_HOT_CONNECTIONS])
        trial.settle()
        taken = seconds(store.look_up, keys, rounds)
        found = len(keys) - store.get_many(keys).count(None)
        _must(found == (len(keys) if present else 0), f"{found} of {len(keys)} ids found")
        return (taken / (len(keys) * rounds) - loop_s) * 1e9

    return trial.every(take, lambda repetition: trial.sample(ids, repetition))


def _get_new(trial: _Trial) -> Samples:
    """The same for strings that are new, which is so only once."""
    count = min(trial.size.lookups, 20 * len(trial.ids))
    loop_s = _loop_s(trial)

    def take(store: Store, keys: list[str]) -> float:
        fresh = copies(keys)
        trial.settle()
        taken = seconds(store.look_up, fresh)
        _must(None not in store.get_many(keys), "an id was not found")
        return (taken / len(fresh) - loop_s) * 1e9

    return trial.every(take, lambda repetition: Random(SEED + repetition).choices(trial.ids, k=count))


def _get_many(trial: _Trial) -> Samples:
    """Nanoseconds for each id of one call for many."""

    def take(store: Store, keys: list[str]) -> float:
        results: list[list[Any]] = []
        trial.settle()
        taken = seconds(lambda: results.append(store.get_many(keys)))
        expected = [store.held.get(key) for key in keys]
        _must(None not in expected and results[0] == expected, "get_many differs from get")
        return taken / len(keys) * 1e9

    return trial.every(take, lambda repetition: Random(SEED + repetition).choices(trial.ids, k=_MANY))


def _batches(trial: _Trial) -> Samples:
    """Nanoseconds for each connection of a walk in batches."""

    def take(store: Store, _: None) -> float:
        seen: list[int] = []
        trial.settle()
        taken = seconds(lambda: seen.append(store.count_in_batches(_BATCH)))
        _must(seen == [len(trial.ids)], f"a walk over {seen[0]} of {len(trial.ids)} connections")
        return taken / len(trial.ids) * 1e9

    return trial.every(take, lambda _: None)


def _due(trial: _Trial) -> Samples:
    """Milliseconds to find that nobody of all is due."""
    now_ns = 10**9
    for store in trial.stores.values():
        store.set_deadlines(trial.ids, now_ns + _FAR_NS)
        store.set_deadlines(trial.ids[:1], now_ns)
        _must(len(store.due(now_ns)) == 1, "the one that is due was not reported alone")
        store.set_deadlines(trial.ids[:1], now_ns + _FAR_NS)

    def take(store: Store, _: None) -> float:
        found: list[list[Any]] = []
        trial.settle()
        taken = seconds(lambda: found.append(store.due(now_ns)))
        _must(found == [[]], "somebody is due")
        return taken * 1e3

    return trial.every(take, lambda _: None)


def _change(trial: _Trial) -> tuple[Samples, Samples]:
    """Nanoseconds for each connection that is removed from a full store, and for adding it again."""
    re_add = Samples()
    numbers = range(len(trial.ids))

    def take(name: str, chosen: list[int]) -> float:
        store = trial.stores[name]
        keys = [trial.ids[number] for number in chosen]
        conns = [trial.conns[number] for number in chosen]
        trial.settle()
        removing = seconds(store.remove, keys)
        _must(len(store.held) == len(trial.ids) - len(keys), "not all were removed")
        trial.settle()
        re_add.add(name, seconds(store.add, keys, conns) / len(keys) * 1e9)
        _must(len(store.held) == len(trial.ids), "not all came back")
        return removing / len(keys) * 1e9

    cases = {name: partial(take, name) for name in trial.stores}
    remove = interleave(
        cases, trial.size.repetitions, lambda repetition: Random(SEED + repetition).sample(numbers, trial.size.changes)
    )
    return remove, re_add


def _promote(trial: _Trial) -> None:
    """Bring generation 2 into its best state: every shard read without its lock, as after some time of look-ups."""
    trial.stores[GENERATION_2].look_up(trial.ids)


def _figures(size: _Size) -> _Figures:
    ids = make_ids(2 * size.connections)
    trial = _Trial(size, ids[: size.connections], ids[size.connections :], make_conns(size.connections), {})
    set(trial.absent)  # computes their hashes, as `add` does with the others
    figures = {"add": _fill(trial)}
    _promote(trial)
    figures["get"] = _get(trial, trial.ids)
    figures["get, new str"] = _get_new(trial)
    figures["get, absent"] = _get(trial, trial.absent, present=False)
    figures["get_many"] = _get_many(trial)
    figures["batches"] = _batches(trial)
    figures["due"] = _due(trial)
    figures["remove"], figures["re-add"] = _change(trial)
    for store in trial.stores.values():
        store.clear()
    return figures


def _footprints(size: _Size) -> _Footprints:
    return {
        name: {
            fill: in_fresh_process("bench.footprint", name, size.connections, fill) for fill in footprint.fills(name)
        }
        for name in STORES
    }


# ---- attacks ---------------------------------------------------------------------------------------------------------


def _colliding(count: int, repetitions: int) -> dict[str, Samples]:
    """Nanoseconds of ``get`` for colliding ids and for random ids of the same form, by store."""
    same_shard, same_hash = same_shard_ids(count), same_hash_ids(count)
    layouts = {
        "random": make_ids(count, SEED + 1),
        "one shard": copies(same_shard),
        "random, 68 characters": random_ids_like(same_hash),
        "one FNV-1a hash": copies(same_hash),
    }
    conns = make_conns(count)
    return {name: _layouts(name, layouts, conns, repetitions) for name in (DICT, GENERATION_2, NATIVE)}


def _layouts(name: str, layouts: dict[str, list[str]], conns: Sequence[object], repetitions: int) -> Samples:
    stores: dict[str, Store] = {}
    for layout, ids in layouts.items():
        stores[layout] = STORES[name]()
        stores[layout].add(ids, conns)
        stores[layout].look_up(ids)  # see _promote

    def take(layout: str, order: list[int]) -> float:
        keys = [layouts[layout][number] for number in order]
        evict_caches()
        taken = seconds(stores[layout].look_up, keys)
        _must(None not in stores[layout].get_many(keys), "an id was not found")
        return taken / len(keys) * 1e9

    cases = {layout: partial(take, layout) for layout in layouts}
    numbers = range(len(conns))
    count = min(len(conns), _COLLIDING_LOOKUPS)
    return interleave(cases, repetitions, lambda repetition: Random(SEED + repetition).sample(numbers, count))


# ---- the report ------------------------------------------------------------------------------------------------------

_COLUMNS = ("get", "get, new str", "get, absent", "get_many", "batches", "add", "re-add", "remove", "due")
_IN_MILLISECONDS = "due"


def _report_size(report: Report, size: _Size, figures: _Figures) -> None:
    head = ["", *(f"{column} ms" if column == _IN_MILLISECONDS else column for column in _COLUMNS)]
    rows = [[name, *(figure(figures[column].median(name)) for column in _COLUMNS)] for name in STORES]
    for base in (DICT, GENERATION_2):
        ratios = [figures[column].ratio(base, NATIVE) for column in _COLUMNS]
        rows.append([f"{base} / native", *(figure(ratio, "x") for ratio in ratios)])
    report.table(f"{size.connections:,} connections: ns each, but due", head, rows)
    for name in STORES:
        measured = {_key(column): figures[column].median(name) for column in _COLUMNS}
        report.row(connections=size.connections, implementation=name, **measured)


def _key(column: str) -> str:
    unit = "ms" if column == _IN_MILLISECONDS else "ns"
    return f"{column.replace(', ', '_').replace(' ', '_').replace('-', '_')}_{unit}"


def _report_footprints(report: Report, size: _Size, footprints: _Footprints) -> None:
    rows = []
    for name, fills in footprints.items():
        for fill, found in fills.items():
            more = found["collect_ms"] - found["collect_none_ms"]
            rows.append([
                f"{name}, {fill}",
                *(figure(found.get(key)) for key in ("rss", "sizeof", "rss_group", "sizeof_group")),
                *(figure(value) for value in (found["collect_none_ms"], found["collect_ms"], more)),
                f"{found['tracked']:,}",
            ])  # fmt: skip
            report.row(connections=size.connections, implementation=name, fill=fill, **found)
    report.table(
        f"{size.connections:,} connections: bytes each, and gc.collect()",
        [
            "",
            "RSS",
            "getsizeof",
            "RSS, in a group",
            "getsizeof, in a group",
            "none: ms",
            "all: ms",
            "more: ms",
            "more objects",
        ],
        rows,
    )


def _report_colliding(report: Report, count: int, colliding: dict[str, Samples]) -> None:
    rows = []
    for name, samples in colliding.items():
        one_shard = samples.ratio("one shard", "random")
        one_hash = samples.ratio("one FNV-1a hash", "random, 68 characters")
        rows.append([
            name,
            figure(samples.median("random")), figure(samples.median("one shard")), figure(one_shard, "x"),
            figure(samples.median("random, 68 characters")), figure(samples.median("one FNV-1a hash")),
            figure(one_hash, "x"),
        ])  # fmt: skip
        report.row(colliding=count, implementation=name, one_shard_ratio=one_shard, one_hash_ratio=one_hash)
    report.table(
        f"get, ns, of {count:,} ids that an attacker made to collide",
        ["", "random", "one shard", "ratio", "random, 68 chars", "one FNV-1a hash", "ratio"],
        rows,
    )


def _targets(report: Report, by_size: dict[int, tuple[_Figures, _Footprints]], colliding: Samples) -> None:
    small, large = by_size[1_000][0], by_size[1_000_000]
    million, footprints = large
    get = "get, times as fast as generation 2, at"
    report.at_least(f"{get} 1,000", small["get"].ratio(GENERATION_2, NATIVE), 20, "x")
    report.at_least(f"{get} 1,000,000", million["get"].ratio(GENERATION_2, NATIVE), 7, "x")
    report.at_most("get, time of dict.get, at 1,000", small["get"].ratio(NATIVE, DICT), 4, "x")
    report.at_most("get, time of dict.get, at 1,000,000", million["get"].ratio(NATIVE, DICT), 1.2, "x")
    many = "get_many, 10,000 of 1,000,000, time of a loop of dict.get"
    report.at_most(many, million["get_many"].ratio(NATIVE, DICT), 0.5, "x")
    for column in ("add", "re-add", "remove"):
        worst = min(figures[column].ratio(GENERATION_2, NATIVE) for figures, _ in by_size.values())
        report.at_least(f"{column}, times as fast as generation 2, the worst size", worst, 5, "x")
    report.at_most("batches(100) over 1,000,000, each", million["batches"].median(NATIVE), 40, "ns")
    report.at_most("due over 1,000,000 idle connections", million["due"].median(NATIVE), 2, "ms")
    full = footprints[NATIVE][footprint.ALL_FIELDS]
    report.at_most("memory of a record, all fields, RSS or getsizeof", max(full["rss"], full["sizeof"]), 256, "bytes")
    more = max(found["collect_ms"] - found["collect_none_ms"] for found in footprints[NATIVE].values())
    report.at_most("gc.collect() with 1,000,000, more than with none", more, 5, "ms")
    report.at_most("get of ids in one shard, time of random ids", colliding.ratio("one shard", "random"), 1.3, "x")
    same_hash = colliding.ratio("one FNV-1a hash", "random, 68 characters")
    report.at_most("get of ids with one FNV-1a hash, time of random ids", same_hash, 1.3, "x")


def run(report: Report) -> None:
    """Print a table for each size, one of memory for each, and one of attacks."""
    gc.disable()  # also between the clocks: collections over millions of Python records would take minutes
    by_size: dict[int, tuple[_Figures, _Footprints]] = {}
    for size in _QUICK_SIZES if report.quick else _SIZES:
        figures = _figures(size)
        _report_size(report, size, figures)
        gc.collect()
        footprints: _Footprints = {}
        if not size.is_hot:  # less than what the system gives at a time tells nothing
            footprints = _footprints(size)
            _report_footprints(report, size, footprints)
        by_size[size.connections] = figures, footprints
    count = _QUICK_COLLIDING if report.quick else _COLLIDING
    colliding = _colliding(count, 2 if report.quick else 9)
    _report_colliding(report, count, colliding)
    report.note("The peer is the builtin dict: no third-party library for Python offers a registry of connections.")
    if not report.quick:
        _targets(report, by_size, colliding[NATIVE])


BENCHMARKS = (
    Benchmark("registry", "look-ups, changes, walks, memory of the registry, against dict and pure Python", run),
)
