"""``metadata``: what checked, versioned and announced facts cost, and how soon connections are found by facts.

*set*: one key of one of 10,000 connections gets a value, through one validator and one notifier; by client id, by
record, and on condition of a version. The validator and the notifier are the same Python functions for all, and do
next to nothing. By id, the pure-Python generation 2 pays for its look-up as well, so the target is judged by record.

*update_where*: one key of all 10,000 connections of a group, with the same validator and notifier, in a registry of
100,000.

*select*: who is in a group and has a tag, of 1,000,000 connections, of which each has two groups, two tags and a
device type. Three cases with 1,000 matches: the group has 1,000 members, or 10,000, or the tag is the smaller set.
*Warm*: again and again. *Cold*: the caches are filled with something else before each, so that every record that is
looked at waits for memory.

*By hand* is the floor, and what people write: a dict of dicts, without versions, limits, isolation or thread safety;
a list comprehension over all connections. No library for Python has facts that are checked and announced, so there is
no peer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from bench.harness import Benchmark, Report, Samples, evict_caches, figure, interleave, own_code, seconds
from bench.population import SEED, make_ids
from wsfast import ConnectionStatus, Registry, reference
from wsfast._metadata import Metadata

NATIVE, GENERATION_2, HAND = "native", "generation 2", "by hand"
KEY = "seats"


# ---- set and update_where --------------------------------------------------------------------------------------------


class _Notified:
    """What one store's notifier has seen."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _change: object) -> None:
        self.count += 1


def _validate(_key: str, value: int) -> int:
    if value < 0:
        raise ValueError("must be 0 or more")
    return value


class _ByHand:
    """Facts as they are written without a library."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.facts: dict[str, dict[str, Any]] = {client_id: {} for client_id in ids}
        self.validators: dict[str, list[Callable[[str, Any], Any]]] = {}
        self.notifiers: dict[str, list[Callable[[Any], None]]] = {}

    def set(self, client_id: str, key: str, value: Any) -> None:
        for validate in self.validators.get(key, ()):
            value = validate(key, value)
        facts = self.facts[client_id]
        old = facts.get(key)
        facts[key] = value
        for notify in self.notifiers.get(key, ()):
            notify((client_id, key, old, value))

    def update_all(self, ids: Iterable[str], key: str, value: Any) -> None:
        for client_id in ids:
            self.set(client_id, key, value)


@dataclass
class _Store:
    """One alternative with its connections."""

    metadata: Any
    records: list[Any]
    notified: _Notified


def make_stores(count: int, members: int) -> dict[str, _Store]:
    """Alternatives with a validator and a notifier for one key; `members` of the connections are in a group."""
    ids = make_ids(count)
    stores = {}
    for name, registry, engine in (
        (NATIVE, Registry(64), Metadata),
        (GENERATION_2, reference.Registry(64), reference.Metadata),
    ):
        metadata: Any = engine(registry)
        notified = _Notified()
        metadata.add_validator(_validate, key=KEY)
        metadata.add_notifier(notified, key=KEY)
        facts = {"plan": "pro", "locale": "en", "version": "5.1"}
        records = [registry.add(each, metadata=facts, groups=["g"] * (at < members)) for at, each in enumerate(ids)]
        stores[name] = _Store(metadata, records, notified)
    by_hand, notified = _ByHand(ids), _Notified()
    by_hand.validators[KEY], by_hand.notifiers[KEY] = [_validate], [notified]
    stores[HAND] = _Store(by_hand, ids, notified)
    return stores


def _set_all(metadata: Any, targets: list[Any]) -> None:
    change = metadata.set
    for value, target in enumerate(targets):
        change(target, KEY, value)


def _set_all_at_version(metadata: Any, targets: list[Any]) -> None:
    change, snapshot = metadata.set, metadata.snapshot
    for value, target in enumerate(targets):
        change(target, KEY, value, if_version=snapshot(target).version)


def _take(loop: Callable[..., None], store: _Store, targets: list[Any]) -> float:
    """Nanoseconds for each change."""
    before = store.notified.count
    taken = seconds(loop, store.metadata, targets)
    if store.notified.count - before != len(targets):
        raise AssertionError(f"{store.notified.count - before} of {len(targets)} changes were announced")
    return taken / len(targets) * 1e9


def _report_set(report: Report) -> None:
    count, repetitions = (500, 3) if report.quick else (10_000, 15)
    stores = make_stores(count, 0)
    columns: dict[str, Samples] = {}
    for column, by_id, loop in (
        ("by id: ns", True, _set_all),
        ("by record: ns", False, _set_all),
        ("at a version: ns", False, _set_all_at_version),
    ):
        cases = {
            name: partial(_take_shuffled, own_code(loop), store, by_id)
            for name, store in stores.items()
            if name != HAND or loop is _set_all
        }
        columns[column] = interleave(cases, repetitions, lambda repetition: repetition)
    title = f"set with one validator and one notifier, {count:,} connections"
    _report_changes(report, title, columns)
    report.at_least(
        "set by record: generation 2 to native", columns["by record: ns"].ratio(GENERATION_2, NATIVE), 3, "x"
    )


def _take_shuffled(loop: Callable[..., None], store: _Store, by_id: bool, repetition: int) -> float:
    records = Random(SEED + repetition).sample(store.records, len(store.records))
    is_hand = isinstance(store.metadata, _ByHand)
    return _take(loop, store, records if is_hand or not by_id else [record.client_id for record in records])


def _update_group(metadata: Any, members: list[Any], value: int) -> None:
    if isinstance(metadata, _ByHand):
        metadata.update_all(members, KEY, value)
    elif metadata.update_where({KEY: value}, group="g").changed != len(members):
        raise AssertionError("not all members have changed")


def _report_update_where(report: Report) -> None:
    count, members, repetitions = (2_000, 500, 2) if report.quick else (100_000, 10_000, 15)
    stores = make_stores(count, members)

    def take(store: _Store, value: int) -> float:
        before = store.notified.count
        taken = seconds(_update_group, store.metadata, store.records[:members], value)
        if store.notified.count - before != members:
            raise AssertionError("not all changes were announced")
        return taken / members * 1e9

    cases = {name: partial(take, store) for name, store in stores.items()}
    samples = interleave(cases, repetitions, lambda value: value)
    _report_changes(report, f"update_where over a group of {members:,}, {count:,} connections", {"each: ns": samples})
    report.at_least("update_where: generation 2 to native", samples.ratio(GENERATION_2, NATIVE), 5, "x")


def _report_changes(report: Report, title: str, columns: dict[str, Samples]) -> None:
    rows = []
    for name in (HAND, GENERATION_2, NATIVE):
        rows.append([name, *(figure(s.median(name)) if name in s else "-" for s in columns.values())])
        report.row(what=title, way=name, **{column: s.median(name) for column, s in columns.items() if name in s})
    for name in (HAND, GENERATION_2):
        ratios = [figure(s.ratio(name, NATIVE), "x") if name in s else "-" for s in columns.values()]
        rows.append([f"{name} / native", *ratios])
    report.table(title, ["", *columns], rows)


# ---- select ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One question with `matches` answers."""

    name: str
    filters: dict[str, Any]
    by_hand: Callable[[Any], bool]


_DEVICES = ("ios", "android", "web", "desktop")


def _fill(registry: Any, ids: list[str], matches: int) -> None:
    """Of each thousandth part: `few` are in the group "small" and tagged; `many`, ten times as many, in "large"."""
    random = Random(SEED)
    places = random.sample(range(len(ids)), 10 * matches)
    large, small = set(places), set(places[:matches])
    for at, client_id in enumerate(ids):
        groups = [f"room:{at // 100}", "large" if at in large else f"team:{at // 10}"]
        if at in small:
            groups.append("small")
        is_pro = at in small or (at not in large and at % 10 == 0)
        tags = {"plan": "pro" if is_pro else "free", "version": f"5.{at % 50}"}
        if at in small:
            tags["beta"] = "1"
        registry.add(client_id, groups=groups, tags=tags, device_type=_DEVICES[at % 4])


_CASES = (
    _Case(
        "group of 1,000, tag of 100,000",
        {"group": "small", "tag": ("plan", "pro")},
        lambda record: "small" in record.groups and record.tags.get("plan") == "pro",
    ),
    _Case(
        "group of 10,000, tag of 100,000",
        {"group": "large", "tag": ("plan", "pro")},
        lambda record: "large" in record.groups and record.tags.get("plan") == "pro",
    ),
    _Case(
        "group of 10,000, tag of 1,000",
        {"group": "large", "tag": "beta"},
        lambda record: "large" in record.groups and "beta" in record.tags,
    ),
    _Case(
        "group of 10,000 without tag",
        {"group": "large", "not_tag": ("plan", "free")},
        lambda record: "large" in record.groups and record.tags.get("plan") != "free",
    ),
    _Case(
        "status of 1,000",
        {"status": ConnectionStatus.SUSPECT},
        lambda record: record.status is ConnectionStatus.SUSPECT,
    ),
)


def _scan(registry: Any, matches: Callable[[Any], bool]) -> list[Any]:
    return [record for record in registry.values() if matches(record)]


def _report_select(report: Report) -> None:
    count, matches, repetitions = (20_000, 20, 2) if report.quick else (1_000_000, 1_000, 9)
    ids = make_ids(count)
    registries: dict[str, Any] = {NATIVE: Registry(64), GENERATION_2: reference.Registry(64)}
    for registry in registries.values():
        _fill(registry, ids, matches)
        for record in registry.select(group="small"):
            record.status = ConnectionStatus.SUSPECT
    gc.freeze()
    rows = []
    for case in _CASES:
        warm, cold = Samples(), Samples()
        for name, registry in registries.items():
            for _ in range(repetitions):
                cold.add(name, _time_select(registry, case, matches, is_cold=True))
            for _ in range(repetitions * 5):
                warm.add(name, _time_select(registry, case, matches, is_cold=False))
        scan_us = seconds(_scan, registries[NATIVE], case.by_hand) * 1e6
        medians = [samples.median(name) for samples in (warm, cold) for name in (GENERATION_2, NATIVE)]
        report.row(what="select", case=case.name, scan_us=scan_us, medians_us=medians)
        rows.append([case.name, *map(figure, (scan_us, *medians))])
        if "tag" in case.filters:
            report.at_most(f"select, {case.name}, warm: us", warm.median(NATIVE), 300, "us")
    gc.unfreeze()
    head = ["", "scan by hand", "generation 2, warm", "native, warm", "generation 2, cold", "native, cold"]
    report.table(f"select over {count:,} connections, {matches:,} matches: microseconds", head, rows)


def _time_select(registry: Any, case: _Case, matches: int, *, is_cold: bool) -> float:
    """Microseconds."""
    found: list[Any] = []

    def select() -> None:
        found.extend(registry.select(**case.filters))

    if is_cold:
        evict_caches()
    taken = seconds(select)
    if len(found) != matches:
        raise AssertionError(f"{case.name}: {len(found)} found")
    return taken * 1e6


def _run(report: Report) -> None:
    _report_set(report)
    _report_update_where(report)
    _report_select(report)


BENCHMARKS = [
    Benchmark("metadata", "set and update_where with a validator and a notifier; select by facts, 1,000,000", _run)
]
