"""Many threads on one registry: what stays true whoever comes first, with the GIL and without it.

Each test makes its choices before the threads start, and says at the end what must hold in every interleaving. The
loops are bounded, so that a failing thread cannot make another one wait.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wsfast.errors
from tests.conftest import Implementation, run_threads
from tests.core.state import assert_consistent, ids, walk
from wsfast.connection import ConnectionStatus, Quality
from wsfast.errors import DetachedRecord, DuplicateConnection

pytestmark = pytest.mark.threads

PROJECT = str(Path(wsfast.errors.__file__).parents[1])
END = 2**63 - 1
WORKERS = 4


@pytest.fixture(params=[1, 8], ids=["1 shard", "8 shards"])
def registry(impl: Implementation, request: pytest.FixtureRequest) -> Any:
    return impl.Registry(request.param)


@pytest.fixture
def load(impl: Implementation) -> int:
    """How many times the work of a test is done: the native core would be through before a second thread begins."""
    return 4 if impl.name == "native" else 1


def each_worker(work: Callable[[int], Any], workers: int = WORKERS) -> list[Any]:
    """Run ``work(number of the worker)`` on several threads at once."""
    return run_threads(*(lambda number=number: work(number) for number in range(workers)))


def unless_detached(call: Callable[[], Any]) -> bool:
    """Make *call*; whether the record was still attached."""
    try:
        call()
    except DetachedRecord:
        return False
    return True


def test_exception_of_a_worker_is_raised_here() -> None:
    def fail() -> None:
        raise LookupError("from a worker")

    with pytest.raises(LookupError, match="from a worker"):
        run_threads(fail, lambda: None)
    assert run_threads(lambda: 1, lambda: 2) == [1, 2]


def test_no_id_is_lost_when_all_add(registry: Any) -> None:
    def add(worker: int) -> list[Any]:
        return [registry.add(f"{worker}-{number}", groups=["all", f"g{worker}"]) for number in range(400)]

    added = list(itertools.chain(*each_worker(add)))
    assert len(registry) == 400 * WORKERS
    assert all(registry[record.client_id] is record for record in added)
    assert registry.groups() == {"all": 400 * WORKERS} | {f"g{worker}": 400 for worker in range(WORKERS)}
    assert_consistent(registry)


def test_one_of_many_adds_of_one_id_wins(registry: Any) -> None:
    def add(worker: int) -> list[Any]:
        won = []
        for number in range(300):
            try:
                won.append(registry.add(f"c{number}", groups=[f"g{worker}"], user_id=f"u{worker}", tags={"t": "v"}))
            except DuplicateConnection:
                assert f"c{number}" in registry
        return won

    winners = list(itertools.chain(*each_worker(add)))
    assert ids(winners) == sorted(f"c{number}" for number in range(300))
    assert all(registry[record.client_id] is record for record in winners)
    assert_consistent(registry)


def test_one_of_many_removals_gets_the_record(registry: Any) -> None:
    records = [registry.add(f"c{number}", groups=["g"], user_id="u") for number in range(600)]

    def remove(worker: int) -> list[Any]:
        how = [record if (worker + number) % 2 else record.client_id for number, record in enumerate(records)]
        return [record for record in map(registry.remove, how) if record is not None]

    removed = list(itertools.chain(*each_worker(remove)))
    assert ids(removed) == ids(records)
    assert registry.stats()["removes"] == 600
    assert registry.groups() == {}
    assert_consistent(registry)


def test_replace_races_leave_exactly_one(registry: Any, load: int) -> None:
    registry.add("a")

    def replace(worker: int) -> list[Any]:
        return [
            registry.add("a", groups=["g", f"g{worker}"], user_id="u", tags={"t": "v"}, on_duplicate="replace")
            for _ in range(300 * load)
        ]

    def look(worker: int) -> None:
        for _ in range(600 * load):
            assert "a" in registry, "the id was absent while it was replaced"
            assert registry["a"].client_id == "a"
            assert registry.get_many(["a"]) != [None]
            assert len(registry) == 1

    *results, _ = each_worker(lambda worker: (look if worker == WORKERS else replace)(worker), WORKERS + 1)
    made = list(itertools.chain(*results))
    assert [record for record in made if record.attached] == [registry["a"]]
    assert registry.group("g") == registry.by_user("u") == walk(registry, tag="t") == [registry["a"]]
    stats = registry.stats()
    assert (stats["adds"], stats["removes"]) == (len(made) + 1, len(made))
    assert_consistent(registry)


def test_replace_races_with_removals_and_adds(registry: Any, load: int) -> None:
    def churn(worker: int) -> None:
        for number in range(300 * load):
            client_id = f"c{number % 3}"
            if worker % 2:
                registry.add(client_id, groups=["g"], user_id="u", on_duplicate="replace")
            else:
                record = registry.get(client_id)
                if record is not None:
                    assert registry.remove(record) in (record, None)
                    assert not record.attached

    each_worker(churn)
    assert set(registry) <= {"c0", "c1", "c2"}
    assert_consistent(registry)


def test_late_end_of_a_replaced_connection_never_removes_its_successor(registry: Any, load: int) -> None:
    rounds = 800 * load

    def replace() -> None:
        for _ in range(rounds):
            registry.add("a", on_duplicate="replace")

    def end() -> int:
        removed = 0
        for _ in range(rounds):
            record = registry.get("a")
            if record is not None:
                found = registry.remove(record)
                assert found is None or found is record, "another connection was removed"
                removed += found is record
        return removed

    _, *removed, _ = run_threads(replace, end, end, replace)
    assert registry.stats()["removes"] == registry.stats()["adds"] - len(registry) >= sum(removed)
    assert_consistent(registry)


WALKS: dict[str, Callable[[Any], list[Any]]] = {
    "batches": lambda registry: walk(registry, 16),
    "batches of 1": lambda registry: walk(registry, 1),
    "values": lambda registry: list(registry.values()),
    "group": lambda registry: walk(registry, 16, group="g"),
    "user": lambda registry: walk(registry, 16, user="u"),
    "tag": lambda registry: walk(registry, 16, tag="t"),
    "status": lambda registry: walk(registry, 16, status=ConnectionStatus.ONLINE),
    "list of the group": lambda registry: registry.group("g"),
    "list of the user": lambda registry: registry.by_user("u"),
    "for_each": lambda registry: visited(registry),
}


def visited(registry: Any) -> list[Any]:
    found: list[Any] = []
    assert registry.for_each(found.append) == len(found)
    return found


@pytest.mark.parametrize("look", WALKS.values(), ids=WALKS.keys())
def test_walk_yields_residents_once_and_nobody_twice(registry: Any, look: Any, load: int) -> None:
    fields = {"groups": ["g"], "user_id": "u", "tags": {"t": "v"}}
    residents = [registry.add(f"resident-{number}", **fields) for number in range(200)]

    def churn(worker: int) -> None:
        for number in range(1000 * load):
            registry.add(f"{worker}-{number % 150}", **fields, on_duplicate="replace")
            if number % 3 == 0:
                registry.remove(f"{worker}-{number * 7 % 150}")

    def observe(worker: int) -> None:
        for _ in range(12 * load):
            seen = Counter(look(registry))
            assert set(seen.values()) == {1}, "yielded twice"
            assert seen.keys() >= set(residents), "left a resident out"

    each_worker(lambda worker: (observe if worker % 2 else churn)(worker))
    assert all(record.attached for record in residents)
    assert_consistent(registry)


def test_ids_of_residents_are_yielded_once(registry: Any, load: int) -> None:
    residents = {registry.add(f"resident-{number}").client_id for number in range(200)}

    def churn(worker: int) -> None:
        for number in range(1500 * load):
            registry.add(f"{worker}-{number % 300}", on_duplicate="replace")
            registry.remove(f"{worker}-{number * 7 % 300}")

    def observe(worker: int) -> None:
        for _ in range(15 * load):
            seen = Counter(iter(registry))
            assert {seen[client_id] for client_id in residents} == {1}
            assert all(record is None or record.client_id == key for key, record in _found(registry, seen))

    each_worker(lambda worker: (observe if worker % 2 else churn)(worker))
    assert_consistent(registry)


def _found(registry: Any, client_ids: Any) -> Any:
    asked = list(client_ids)
    return zip(asked, registry.get_many(asked), strict=True)


def test_iteration_while_others_clear(registry: Any, load: int) -> None:
    def add(worker: int) -> int:
        for number in range(600 * load):
            registry.add(f"{worker}-{number}", groups=["g"], tags={"t": "v"})
        return 0

    def clear(worker: int) -> int:
        return sum(registry.clear() for _ in range(60))

    def observe(worker: int) -> int:
        for _ in range(30):
            for found in (walk(registry, 8), walk(registry, 8, group="g"), list(registry.values())):
                assert len(found) == len(set(found))
            assert len(registry.groups()) <= 1
        return 0

    cleared = run_threads(
        lambda: add(0), lambda: add(1), lambda: clear(2), lambda: observe(3), lambda: observe(4), lambda: clear(5)
    )
    assert sum(cleared) + len(registry) == 1200 * load
    assert_consistent(registry)


def test_groups_agree_with_their_members_after_joins_and_leaves(registry: Any, load: int) -> None:
    records = [registry.add(f"c{number}") for number in range(30)]
    names = [f"g{number}" for number in range(8)]

    def move(worker: int) -> list[int]:
        chance, joined = random.Random(worker), 0
        for _ in range(1500 * load):
            record, name = chance.choice(records), chance.choice(names)
            if chance.random() < 0.5:
                joined += registry.join(record, name)
            else:
                joined -= registry.leave(record, name)
        return [joined]

    total = sum(itertools.chain(*each_worker(move)))
    assert total == sum(registry.groups().values()) == sum(len(record.groups) for record in records)
    assert_consistent(registry)


def test_join_and_leave_of_one_membership_take_turns(registry: Any, load: int) -> None:
    record = registry.add("a")

    def join(worker: int) -> int:
        return sum(registry.join(record, "g") for _ in range(1500 * load))

    def leave(worker: int) -> int:
        return -sum(registry.leave(record, "g") for _ in range(1500 * load))

    balance = sum(each_worker(lambda worker: (join if worker % 2 else leave)(worker)))
    assert balance == ("g" in record.groups) == len(registry.group("g"))
    assert_consistent(registry)


def test_group_limit_is_kept_by_all_together(impl: Implementation, load: int) -> None:
    registry = impl.Registry(4, max_groups=5)
    record = registry.add("a")

    def join(worker: int) -> None:
        for number in range(400 * load):
            try:
                registry.join(record, f"g{worker}-{number % 9}")
            except ValueError:
                registry.leave(record, f"g{worker}-{(number + 4) % 9}")
            assert len(record.groups) <= 5

    each_worker(join)
    assert_consistent(registry)


def test_removed_record_haunts_no_group(registry: Any) -> None:
    records = [registry.add(f"c{number}", groups=["g"]) for number in range(800)]

    def join(worker: int) -> None:
        for record in records:
            unless_detached(lambda record=record: registry.join(record, f"h{worker}"))
            unless_detached(lambda record=record: registry.join(record, "i"))

    def leave(worker: int) -> None:
        for record in records:
            unless_detached(lambda record=record: registry.leave(record, "g"))

    def remove(worker: int) -> None:
        for record in records:
            registry.remove(record)

    run_threads(lambda: join(0), lambda: leave(1), lambda: join(2), lambda: remove(3))
    assert (registry.groups(), registry.stats()["groups"], len(registry)) == ({}, 0, 0)
    assert [name for name in ("g", "h0", "h2", "i") if registry.group(name)] == []
    assert all(record.groups == frozenset() for record in records)
    assert_consistent(registry)


def test_removed_record_haunts_no_user_and_no_tag(registry: Any) -> None:
    records = [registry.add(f"c{number}", user_id="u", tags={"t": "v"}) for number in range(600)]

    def reassign(worker: int) -> None:
        for number, record in enumerate(records):
            unless_detached(lambda record=record, number=number: setattr(record, "user_id", f"u{worker}{number % 3}"))
            unless_detached(lambda record=record, number=number: setattr(record, "tags", {"t": f"v{number % 3}"}))

    def remove(worker: int) -> None:
        for record in records:
            registry.remove(record)

    run_threads(lambda: reassign(0), lambda: reassign(1), lambda: remove(2))
    stats = registry.stats()
    assert (stats["users"], stats["tags"], len(registry)) == (0, 0, 0)
    assert walk(registry, tag="t") == registry.by_user("u") == []
    assert_consistent(registry)


def test_users_and_tags_agree_with_the_records_after_reassignments(registry: Any, load: int) -> None:
    records = [registry.add(f"c{number}") for number in range(20)]

    def reassign(worker: int) -> None:
        chance = random.Random(worker)
        for _ in range(700 * load):
            record = chance.choice(records)
            record.user_id = chance.choice([None, "u0", "u1", f"u-{worker}"])
            record.tags = {f"k{chance.randrange(3)}": f"v{chance.randrange(3)}" for _ in range(chance.randrange(3))}
            record.permissions = chance.sample(["p", "q", "r", f"p{worker}"], 2)
            assert len(record.permissions) == 2
            assert record.tags.keys() <= {"k0", "k1", "k2"}
            assert record.user_id in {None, "u0", "u1", *(f"u-{worker}" for worker in range(WORKERS))}

    each_worker(reassign)
    assert_consistent(registry)


def test_permission_sets_go_with_the_last_record_whoever_removes_it(registry: Any, load: int) -> None:
    sets = [["p"], ["q"], ["p", "q"]]
    resident = registry.add("resident", device_type="p", permissions=sets[0])

    def churn(worker: int) -> list[weakref.ref[frozenset[str]]]:
        chance, seen = random.Random(worker), []
        for number in range(400 * load):
            permissions = chance.choice(sets)
            record = registry.add(f"c{number % 3}", device_type="p", permissions=permissions, on_duplicate="replace")
            other = registry.get(f"c{(number + 1) % 3}")
            if other is not None:
                unless_detached(lambda other=other: setattr(other, "permissions", chance.choice(sets)))
                unless_detached(lambda other=other: setattr(other, "device_type", chance.choice("pq")))
            if number % 4 == 0:
                registry.remove(record)
            if number % 50 == 0:
                seen.append(weakref.ref(record.permissions))
        return seen

    references = list(itertools.chain(*each_worker(churn)))
    assert registry.add("late", permissions=sets[0]).permissions is resident.permissions
    registry.clear()
    del resident
    gc.collect()
    assert {reference() for reference in references} == {None}


def test_get_many_gives_the_record_asked_for_or_none(registry: Any, load: int) -> None:
    asked = [f"c{number}" for number in range(300)]
    resident = registry.add("resident", user_id="u")

    def churn(worker: int) -> None:
        for number in range(1500 * load):
            registry.add(asked[number * 7 % 300], on_duplicate="replace")
            registry.remove(asked[number * 11 % 300])

    def look(worker: int) -> None:
        for _ in range(40 * load):
            found = registry.get_many([*asked, "resident"])
            assert found.pop() is resident
            assert all(record is None or record.client_id == key for key, record in zip(asked, found, strict=True))
            assert all(record is None or record.attached in (True, False) for record in map(registry.get, asked[:50]))

    each_worker(lambda worker: (look if worker % 2 else churn)(worker))
    assert registry["resident"] is resident
    assert_consistent(registry)


def test_tables_grow_and_shrink_under_lookups(impl: Implementation, load: int) -> None:
    registry = impl.Registry(1)
    residents = [registry.add(f"resident-{number}") for number in range(50)]

    def breathe(worker: int) -> None:
        for _ in range(3):
            for number in range(600 * load):
                registry.add(f"{worker}-{number}")
            for number in range(600 * load):
                assert registry.remove(f"{worker}-{number}") is not None

    def look(worker: int) -> None:
        for _ in range(60 * load):
            for record in residents:
                assert registry[record.client_id] is record
            assert len(registry) >= 50

    each_worker(lambda worker: (look if worker % 2 else breathe)(worker))
    assert ids(registry.values()) == ids(residents)
    assert_consistent(registry)


def test_counters_are_exact_in_total(registry: Any, load: int) -> None:
    records = [registry.add(f"c{number}") for number in range(5)]

    def count(worker: int) -> None:
        for number in range(1500 * load):
            record = records[number % 5]
            record.received(3)
            record.sent(5, 2)
            record.failed("in" if number % 2 else "out")
            record.touch()

    each_worker(count)
    calls = 1500 * load * WORKERS
    stats = registry.stats()
    assert (stats["messages_in"], stats["bytes_in"]) == (calls, 3 * calls)
    assert (stats["messages_out"], stats["bytes_out"]) == (2 * calls, 5 * calls)
    assert stats["errors_in"] + stats["errors_out"] == calls
    assert sum(record.messages_in for record in records) == calls
    assert sum(record.bytes_out for record in records) == 5 * calls
    assert sum(record.errors_in + record.errors_out for record in records) == calls


def test_traffic_is_counted_before_the_removal_or_not_at_all(registry: Any) -> None:
    records = [registry.add(f"c{number}") for number in range(600)]

    def count(worker: int) -> None:
        for record in records:
            for _ in range(3):
                record.received(7)
                record.sent(2)

    def remove(worker: int) -> None:
        for record in records:
            registry.remove(record)

    run_threads(lambda: count(0), lambda: count(1), lambda: remove(2))
    stats = registry.stats()
    assert stats["messages_in"] == sum(record.messages_in for record in records)
    assert stats["bytes_in"] == 7 * stats["messages_in"]
    assert stats["messages_out"] == sum(record.messages_out for record in records)
    assert stats["bytes_out"] == 2 * stats["messages_out"]


def test_adds_and_removes_are_counted_exactly(registry: Any, load: int) -> None:
    adds = 500 * load

    def churn(worker: int) -> int:
        removed = 0
        for number in range(adds):
            registry.add(f"{worker}-{number}")
            if number % 3 == 0:
                removed += registry.remove(f"{worker}-{number}") is not None
        return removed

    removed = sum(each_worker(churn))
    stats = registry.stats()
    assert (stats["adds"], stats["removes"]) == (adds * WORKERS, removed)
    assert stats["connections"] == len(registry) == adds * WORKERS - removed
    assert_consistent(registry)


def test_due_while_deadlines_change(registry: Any, load: int) -> None:
    records = [registry.add(f"c{number}") for number in range(300)]
    waiting = [registry.add(f"waiting-{number}") for number in range(20)]
    for record in waiting:
        record.deadline_ns = 50

    def change(worker: int) -> None:
        chance = random.Random(worker)
        for _ in range(1500 * load):
            chance.choice(records).deadline_ns = chance.choice([None, chance.randrange(100), 2**62])

    def churn(worker: int) -> None:
        for number in range(400 * load):
            record = registry.add(f"{worker}-{number}")
            record.deadline_ns = number % 100
            registry.remove(record)

    def observe(worker: int) -> None:
        for limit in (5, 10_000) * 40:
            due = registry.due(60, limit)
            assert len(due) == len(set(due)) <= limit
            if limit > 5:
                assert set(waiting) <= set(due)

    run_threads(lambda: change(0), lambda: change(1), lambda: churn(2), lambda: observe(3))
    for now in (60, 99, END):
        expected = [each for each in registry.values() if each.deadline_ns is not None and each.deadline_ns <= now]
        assert ids(registry.due(now, 10_000)) == ids(expected)


def test_one_due_record_is_claimed_by_deadline_changes_without_loss(registry: Any, load: int) -> None:
    for number in range(400 * load):
        registry.add(f"c{number}").deadline_ns = number % 20

    def work_off(worker: int) -> int:
        handled = 0
        while due := registry.due(30, 25):
            for record in due:
                record.deadline_ns = None
                handled += 1
        return handled

    assert sum(each_worker(work_off)) >= 400
    assert registry.due(END) == []


def test_fields_are_read_while_others_assign(registry: Any, load: int) -> None:
    record = registry.add("a")

    def assign(worker: int) -> None:
        for number in range(1200 * load):
            value = [worker, number]
            record.conn = record.session = record.device_info = value
            record.metadata = {"k": value, "l": value}
            record.device_type = f"d{number % 5}"
            record.status = ConnectionStatus(number % 5)
            record.quality = Quality(float(number), float(number), 0.5)
            record.deadline_ns = number

    def read(worker: int) -> None:
        for _ in range(1200 * load):
            for value in (record.conn, record.session, record.device_info, record.metadata.get("k")):
                assert value is None or len(value) == 2
            assert record.metadata.get("k") is None or len(record.metadata) == 2
            assert record.device_type in (None, "d0", "d1", "d2", "d3", "d4")
            assert record.status in ConnectionStatus
            latency, jitter, loss = record.quality
            assert (latency, loss) in ((jitter, 0.5), (0.0, 0.0))

    each_worker(lambda worker: (read if worker % 2 else assign)(worker))
    assert record.metadata["k"] is record.metadata["l"]


def test_extensions_first_read_by_many_are_one_dict(registry: Any) -> None:
    records = [registry.add(f"c{number}") for number in range(400)]

    def read(worker: int) -> list[Any]:
        found = []
        for record in records:
            record.extensions[worker] = worker
            found.append(record.extensions)
        return found

    results = each_worker(read)
    for record, *dicts in zip(records, *results, strict=True):
        assert all(each is record.extensions for each in dicts)
        assert record.extensions == {worker: worker for worker in range(WORKERS)}


def test_fields_are_dropped_while_others_read_them(registry: Any) -> None:
    records = [
        registry.add(f"c{number}", [number], session=[number], metadata={"k": [number]}) for number in range(600)
    ]

    def read(worker: int) -> None:
        for record in records:
            for _ in range(3):
                assert record.conn is None or len(record.conn or [0]) == 1
                assert len(record.metadata) in (0, 1)
                assert record.groups == frozenset()
                assert record.registry in (None, registry)
                record.extensions["k"] = record
                unless_detached(lambda record=record: setattr(record, "session", [1]))

    def remove(worker: int) -> None:
        for record in records:
            registry.remove(record)

    run_threads(lambda: read(0), lambda: read(1), lambda: remove(2))
    assert {(record.conn, record.session, len(record.metadata), len(record.extensions)) for record in records} == {
        (None, None, 0, 0)
    }


def test_registry_may_end_while_threads_use_its_records(impl: Implementation) -> None:
    for _ in range(15):
        box = [impl.Registry(4)]
        records = [box[0].add(f"c{number}", [number], groups=["g"], user_id="u") for number in range(60)]

        def end(box: list[Any] = box) -> None:
            box.clear()

        def use(records: list[Any] = records) -> None:
            for record in records:
                record.touch()
                record.received(1)
                unless_detached(lambda record=record: setattr(record, "user_id", "w"))
                assert record.groups in (frozenset(), {"g"})
                registry = record.registry
                if registry is not None:
                    unless_detached(lambda registry=registry, record=record: registry.join(record, "g"))
                    assert registry.remove(record) in (record, None)
                del registry

        run_threads(use, end, use)
        gc.collect()
        assert {(record.attached, record.registry, record.conn) for record in records} == {(False, None, None)}


def test_threads_walk_a_registry_that_its_maker_forgot(impl: Implementation) -> None:
    box = [impl.Registry(4)]
    records = [box[0].add(f"c{number}") for number in range(300)]
    walks = [box[0].batches(7) for _ in range(WORKERS)]

    def exhaust(worker: int) -> list[Any]:
        box.clear()
        found = [record for batch in walks[worker] for record in batch]
        walks[worker] = None
        return found

    assert all(ids(found) == ids(records) for found in each_worker(exhaust))


def test_everything_at_once(registry: Any, load: int) -> None:
    client_ids = [f"c{number}" for number in range(60)]

    def act(worker: int) -> None:
        chance = random.Random(worker)
        for number in range(500 * load):
            client_id = chance.choice(client_ids)
            record = registry.get(client_id)
            action = chance.randrange(12)
            if record is None or action == 0:
                registry.add(
                    client_id,
                    [number],
                    user_id=chance.choice([None, "u", "w"]),
                    groups=chance.sample(["g", "h", "i"], 2),
                    tags={"t": chance.choice("vw")},
                    permissions=chance.sample("pqrs", 2),
                    on_duplicate="replace",
                )
            elif action == 1:
                registry.remove(chance.choice([record, client_id]))
            elif action == 2:
                registry.for_each(lambda record: record.touch(), group="g")
            elif action == 3:
                registry.stats()
                registry.shard_stats()
                registry.groups()
                sys.getsizeof(registry)
            elif action == 4:
                assert all(each.client_id in client_ids for each in registry.due(number, 10))
            elif action == 5:
                found = walk(registry, 5, tag="t", status=ConnectionStatus.ONLINE)
                assert len(found) == len(set(found))
            else:
                change: Callable[[], Any] = [
                    lambda record=record: registry.join(record, chance.choice("ghi")),
                    lambda record=record: registry.leave(record, chance.choice("ghi")),
                    lambda record=record, number=number: setattr(record, "user_id", f"u{number % 4}"),
                    lambda record=record, number=number: setattr(record, "tags", {"t": f"v{number % 4}"}),
                    lambda record=record, number=number: setattr(record, "deadline_ns", number),
                    lambda record=record: setattr(record, "session", record),
                ][action - 6]
                unless_detached(change)

    each_worker(act)
    assert_consistent(registry)
    registry.clear()
    assert (registry.groups(), registry.stats()["users"], registry.stats()["tags"]) == ({}, 0, 0)


def test_free_threaded_interpreter_stays_without_the_gil(native: Implementation) -> None:
    script = "import sys, wsfast._core; print(getattr(sys, '_is_gil_enabled', lambda: True)())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"PYTHONPATH": PROJECT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ("True", "False")
    if os.environ.get("WSFAST_EXPECT_NO_GIL") == "1":
        assert native.name == "native"
        assert sys._is_gil_enabled() is False
        assert done.stdout.strip() == "False"
