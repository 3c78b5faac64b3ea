"""Walks over a registry: batches, filters, callbacks, and the promise of exactly once while the registry changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Implementation
from tests.core.state import assert_consistent, ids, walk
from wsfast.connection import ConnectionStatus

ONLINE, SUSPECT = ConnectionStatus.ONLINE, ConnectionStatus.SUSPECT


@pytest.fixture(params=[1, 8], ids=["1 shard", "8 shards"])
def registry(impl: Implementation, request: pytest.FixtureRequest) -> Any:
    return impl.Registry(request.param)


def fill(registry: Any, count: int, **fields: Any) -> list[Any]:
    return [registry.add(f"c{number}", **fields) for number in range(count)]


# Every way to walk, as a callable that gives an iterator of ids.
WALKS: dict[str, Callable[[Any], Iterator[str]]] = {
    "ids": iter,
    "keys": lambda registry: iter(registry.keys()),
    "values": lambda registry: (record.client_id for record in registry.values()),
    "items": lambda registry: (client_id for client_id, _ in registry.items()),
    "batches of 1": lambda registry: (record.client_id for [record] in registry.batches(1)),
    "batches of 7": lambda registry: (record.client_id for batch in registry.batches(7) for record in batch),
    "batches": lambda registry: (record.client_id for batch in registry.batches() for record in batch),
    "group": lambda registry: (record.client_id for batch in registry.batches(3, group="g") for record in batch),
    "user": lambda registry: (record.client_id for batch in registry.batches(3, user="u") for record in batch),
    "tag": lambda registry: (record.client_id for batch in registry.batches(3, tag="t") for record in batch),
    "tag value": lambda registry: (
        record.client_id for batch in registry.batches(3, tag=("t", "v")) for record in batch
    ),
    "status": lambda registry: (record.client_id for batch in registry.batches(3, status=ONLINE) for record in batch),
}
# Those that look at one connection at a time.
STEP_BY_STEP = ["ids", "keys", "values", "items", "batches of 1"]
each_walk = pytest.mark.parametrize("start", WALKS.values(), ids=WALKS.keys())
MEMBER = {"groups": ["g"], "user_id": "u", "tags": {"t": "v"}}


@each_walk
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 100, 257])
def test_walk_yields_each_connection_once(registry: Any, start: Any, count: int) -> None:
    fill(registry, count, **MEMBER)
    assert sorted(start(registry)) == sorted(f"c{number}" for number in range(count))


@each_walk
def test_two_walks_do_not_disturb_each_other(registry: Any, start: Any) -> None:
    fill(registry, 50, **MEMBER)
    pairs = list(itertools.zip_longest(start(registry), start(registry)))
    assert sorted(one for one, _ in pairs) == sorted(other for _, other in pairs) == sorted(registry)
    nested = [(one, other) for one in start(registry) for other in start(registry)]
    assert len(nested) == len(set(nested)) == 2500


@each_walk
def test_walk_that_is_left_early_leaves_nothing_behind(registry: Any, start: Any) -> None:
    fill(registry, 50, **MEMBER)
    walks = [start(registry) for _ in range(20)]
    assert {next(each) for each in walks} <= set(registry)
    del walks
    assert registry.clear() == 50
    assert list(start(registry)) == []


@each_walk
def test_removing_the_current_one_from_inside_the_loop(registry: Any, start: Any) -> None:
    fill(registry, 300, **MEMBER)
    seen = []
    for client_id in start(registry):
        registry.remove(client_id)
        seen.append(client_id)
    assert sorted(seen) == sorted(f"c{number}" for number in range(300))
    assert len(registry) == 0


@each_walk
def test_survivors_of_removals_inside_the_loop_are_yielded_once(registry: Any, start: Any) -> None:
    fill(registry, 300, **MEMBER)
    seen = []
    for step, client_id in enumerate(start(registry)):
        seen.append(client_id)
        for number in range(step * 10, step * 10 + 5):
            registry.remove(f"c{number}")
    assert len(seen) == len(set(seen))
    assert set(registry) <= set(seen)
    assert_consistent(registry)


@each_walk
def test_residents_are_yielded_once_while_the_loop_adds(registry: Any, start: Any) -> None:
    residents = {record.client_id for record in fill(registry, 100, **MEMBER)}
    seen = []
    for step, client_id in enumerate(start(registry)):
        seen.append(client_id)
        if step < 100:
            for number in range(20):
                registry.add(f"new-{step}-{number}", **MEMBER)
    assert len(seen) == len(set(seen))
    assert residents <= set(seen) <= set(registry)
    assert len(registry) == 2100


@each_walk
def test_residents_are_yielded_once_while_the_loop_adds_and_removes(registry: Any, start: Any) -> None:
    residents = {registry.add(f"resident-{number}", **MEMBER).client_id for number in range(64)}
    fill(registry, 500, **MEMBER)
    seen = []
    for step, client_id in enumerate(start(registry)):
        seen.append(client_id)
        for number in range(step * 8, step * 8 + 8):
            registry.remove(f"c{number}")
            if step < 64:
                registry.add(f"new-{number}", **MEMBER)
    assert [seen.count(client_id) for client_id in residents] == [1] * 64
    assert len(seen) == len(set(seen))
    assert_consistent(registry)


@each_walk
def test_clear_from_inside_the_loop_ends_it(registry: Any, start: Any) -> None:
    fill(registry, 300, **MEMBER)
    seen = []
    for client_id in start(registry):
        seen.append(client_id)
        registry.clear()
    assert len(seen) == len(set(seen))
    assert seen != []
    assert len(registry) == 0


@pytest.mark.parametrize("start", [WALKS[name] for name in STEP_BY_STEP], ids=STEP_BY_STEP)
def test_walk_step_by_step_leaves_out_who_was_removed_before_the_turn(registry: Any, start: Any) -> None:
    fill(registry, 300)
    steps = 0
    for client_id in start(registry):
        assert client_id in registry
        steps += 1
        for number in range(steps * 7):
            registry.remove(f"c{number}")
    assert 1 < steps < 300
    registry.clear()
    fill(registry, 300)
    for step, _ in enumerate(start(registry)):
        assert step == 0
        registry.clear()
    assert len(registry) == 0


def test_record_replaced_inside_the_loop_is_yielded_once_for_each_life(registry: Any) -> None:
    fill(registry, 100)
    seen = []
    for (record,) in registry.batches(1):
        assert record.attached
        seen.append(record)
        if len(seen) <= 100:
            for number in range(0, 100, 10):
                registry.add(f"c{number}", on_duplicate="replace")
    assert len(set(seen)) == len(seen)
    assert {f"c{number}" for number in range(100) if number % 10} <= {record.client_id for record in seen}


@pytest.mark.parametrize("filters", [{}, {"group": "g"}, {"user": "u"}, {"tag": "t"}, {"status": ONLINE}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 99, 100, 101, 1000, 2**31, 2**62, 2**63 - 1])
def test_batches_have_their_size_and_only_the_last_is_shorter(registry: Any, size: int, filters: Any) -> None:
    fill(registry, 100, **MEMBER)
    lengths = [len(batch) for batch in registry.batches(size, **filters)]
    full, rest = divmod(100, size)
    assert lengths == [size] * full + [rest] * bool(rest)


def test_batches_are_lists_of_100_by_default(registry: Any) -> None:
    fill(registry, 250)
    batches = list(registry.batches())
    assert [type(batch) for batch in batches] == [list] * 3
    assert [len(batch) for batch in batches] == [100, 100, 50]
    batches[0].clear()
    assert len(registry) == 250


def test_batches_is_an_iterator_that_stays_at_its_end(registry: Any) -> None:
    registry.add("a")
    batches = registry.batches()
    assert iter(batches) is batches
    assert len(next(batches)) == 1
    for client_id in ("b", "c"):
        registry.add(client_id)
        assert next(batches, None) is None


def test_iteration_of_ids_stays_at_its_end(registry: Any) -> None:
    registry.add("a")
    walk_of_ids = iter(registry)
    assert iter(walk_of_ids) is walk_of_ids
    assert list(walk_of_ids) == ["a"]
    registry.add("b")
    assert next(walk_of_ids, None) is None


def test_batches_of_an_empty_registry_are_none(registry: Any) -> None:
    assert list(registry.batches()) == []
    assert list(registry.batches(group="g")) == []


def test_batches_of_a_small_size_hold_no_detached_record(registry: Any) -> None:
    fill(registry, 200)
    kept = 0
    for batch in registry.batches(3):
        assert all(record.attached for record in batch)
        kept += len(batch)
        for number in range(kept * 4):
            registry.remove(f"c{number}")
    assert kept < 200


@pytest.fixture
def mixed(registry: Any) -> Any:
    """60 connections in all combinations of group, user, tag and status."""
    combinations = itertools.product(
        ((), ("g",), ("g", "h")), (None, "u", "w"), ({}, {"plan": "pro"}, {"plan": "free", "x": ""}), (ONLINE, SUSPECT)
    )
    for number, (groups, user, tags, status) in enumerate(combinations):
        registry.add(f"c{number}", groups=groups, user_id=user, tags=tags, status=status)
    return registry


FILTERS: dict[str, list[tuple[Any, Callable[[Any], bool]]]] = {
    "group": [
        (None, lambda record: True),
        ("g", lambda record: "g" in record.groups),
        ("h", lambda record: "h" in record.groups),
        ("nobody", lambda record: False),
    ],
    "user": [
        (None, lambda record: True),
        ("u", lambda record: record.user_id == "u"),
        ("nobody", lambda record: False),
    ],
    "tag": [
        (None, lambda record: True),
        ("plan", lambda record: "plan" in record.tags),
        ("x", lambda record: "x" in record.tags),
        (("plan", "pro"), lambda record: record.tags.get("plan") == "pro"),
        (("x", ""), lambda record: record.tags.get("x") == ""),
        (("plan", "nobody"), lambda record: False),
        (("nobody", "pro"), lambda record: False),
        ("pro", lambda record: False),
    ],
    "status": [
        (None, lambda record: True),
        (ONLINE, lambda record: record.status is ONLINE),
        (ConnectionStatus.CLOSING, lambda record: False),
    ],
}


def test_filters_alone_and_combined(mixed: Any) -> None:
    records = list(mixed.values())
    matched = 0
    for chosen in itertools.product(*FILTERS.values()):
        filters = {name: value for name, (value, _) in zip(FILTERS, chosen, strict=True)}
        expected = ids(record for record in records if all(test(record) for _, test in chosen))
        assert ids(walk(mixed, 4, **filters)) == expected
        visited: list[Any] = []
        assert mixed.for_each(visited.append, **filters) == len(expected)
        assert ids(visited) == expected
        matched += bool(expected)
    assert matched > 20


def test_filters_follow_every_change(mixed: Any) -> None:
    record = mixed["c0"]
    mixed.join(record, "new")
    record.user_id, record.tags, record.status = "new", {"new": "yes"}, ConnectionStatus.CLOSING
    filters = {"group": "new", "user": "new", "tag": ("new", "yes"), "status": ConnectionStatus.CLOSING}
    assert walk(mixed, **filters) == [record]
    mixed.leave(record, "new")
    assert walk(mixed, **filters) == []
    mixed.join(record, "new")
    record.tags = {"new": "no"}
    assert walk(mixed, **filters) == []
    assert walk(mixed, **(filters | {"tag": "new"})) == [record]


@pytest.mark.parametrize(
    ("filters", "enter", "leave"),
    [
        ({"group": "x"}, lambda record: record.registry.join(record, "x"), lambda r: r.registry.leave(r, "x")),
        ({"user": "x"}, lambda r: setattr(r, "user_id", "x"), lambda r: setattr(r, "user_id", None)),
        ({"tag": "x"}, lambda r: setattr(r, "tags", {"x": "1"}), lambda r: setattr(r, "tags", {})),
        ({"tag": ("x", "1")}, lambda r: setattr(r, "tags", {"x": "1"}), lambda r: setattr(r, "tags", {"x": "2"})),
    ],
    ids=["group", "user", "tag", "tag value"],
)
def test_members_are_those_at_the_time_of_the_first_next(registry: Any, filters: Any, enter: Any, leave: Any) -> None:
    records = fill(registry, 20)
    for record in records[:5]:
        enter(record)
    batches = registry.batches(2, **filters)
    for record in records[5:10]:
        enter(record)
    leave(records[0])
    seen = list(next(batches))
    for record in records[10:]:
        enter(record)
    for record in records[1:10]:
        leave(record)
    seen += [record for batch in batches for record in batch]
    assert ids(seen) == ids(records[1:10])


@pytest.mark.parametrize("filters", [{"group": "g"}, {"user": "u"}, {"tag": "t"}, {"tag": ("t", "v")}, {}], ids=str)
def test_member_detached_before_its_turn_is_left_out(registry: Any, filters: Any) -> None:
    records = fill(registry, 30, **MEMBER)
    batches = registry.batches(4, **filters)
    first = next(batches)
    gone = [record for record in records if record not in first][::2]
    for record in gone[::2]:
        registry.remove(record)
    for record in gone[1::2]:
        registry.add(record.client_id, on_duplicate="replace")
    rest = [record for batch in batches for record in batch]
    assert set(rest).isdisjoint(gone)
    assert set(records) - set(first) - set(gone) <= set(rest)
    assert len(rest) == len(set(rest))


@pytest.mark.parametrize("filters", [{}, {"group": "g"}, {"user": "u"}, {"tag": "t"}], ids=str)
def test_status_is_looked_at_when_the_turn_comes(registry: Any, filters: Any) -> None:
    records = fill(registry, 30, status=SUSPECT, **MEMBER)
    batches = registry.batches(1, status=SUSPECT, **filters)
    (first,) = next(batches)
    others = [record for record in records if record is not first]
    for record in others[:20]:
        record.status = ONLINE
    for record in others[:10]:
        record.status = SUSPECT
    assert ids(record for batch in batches for record in batch) == ids(others[:10] + others[20:])


def test_for_each_counts_its_calls(registry: Any) -> None:
    fill(registry, 250)
    visited: list[Any] = []
    assert registry.for_each(visited.append) == 250
    assert ids(visited) == sorted(registry)
    assert registry.for_each(lambda record: None, group="nobody") == 0


def test_for_each_stops_at_false_itself(registry: Any) -> None:
    fill(registry, 150)
    for falsy in (None, 0, 0.0, "", [], True):
        assert registry.for_each(lambda record, falsy=falsy: falsy) == 150
    assert registry.for_each(lambda record: False) == 1
    calls = itertools.count(1)
    assert registry.for_each(lambda record: next(calls) < 120) == 120


def test_exception_of_the_callback_ends_the_walk_and_comes_through(registry: Any) -> None:
    fill(registry, 150)
    error = LookupError("enough")
    calls = []

    def fail(record: Any) -> None:
        calls.append(record)
        if len(calls) == 70:
            raise error

    with pytest.raises(LookupError) as caught:
        registry.for_each(fail)
    assert caught.value is error
    assert len(calls) == 70
    assert_consistent(registry)


def test_for_each_calls_back_for_no_detached_record(registry: Any) -> None:
    records = fill(registry, 300)
    seen = []

    def remove_half(record: Any) -> None:
        assert record.attached
        seen.append(record)
        for number in range(len(seen) * 5, len(seen) * 5 + 3):
            registry.remove(f"c{number}")

    assert registry.for_each(remove_half) == len(seen) == len(set(seen))
    assert {record for record in records if record.attached} <= set(seen)
    assert registry.for_each(lambda record: registry.clear() and None) == 1


def test_for_each_looks_at_the_status_when_the_turn_comes(registry: Any) -> None:
    records = fill(registry, 50)
    seen = []

    def suspect_all(record: Any) -> None:
        seen.append(record)
        for each in records:
            each.status = SUSPECT

    assert registry.for_each(suspect_all, status=ONLINE) == len(seen) == 1


def test_walk_may_outlive_its_registry_variable(impl: Implementation) -> None:
    registry = impl.Registry(2)
    records = fill(registry, 10)
    batches, walk_of_ids, values = registry.batches(3), iter(registry), registry.values()
    del registry
    assert ids(record for batch in batches for record in batch) == ids(records)
    assert sorted(walk_of_ids) == ids(records) == ids(values)


def test_walk_may_be_nested_with_a_walk_that_removes(registry: Any) -> None:
    fill(registry, 60)
    outer = []
    for record in (record for batch in registry.batches(1) for record in batch):
        outer.append(record)
        if len(outer) == 10:
            assert registry.for_each(registry.remove) == 60
    assert len(outer) == 10
    assert len(registry) == 0
