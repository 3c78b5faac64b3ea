"""Deadlines: which records are due, in which order, and what a limit cuts off."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conftest import Implementation
from tests.core.state import ids

END = 2**63 - 1


def order(impl: Implementation, registry: Any, records: list[Any]) -> list[tuple[int, int]]:
    """Where each of *records* stands in the order of ``due``: by shard, and by deadline in a shard."""
    return [(registry.shard_of(each.client_id) if impl.sharded else 0, each.deadline_ns) for each in records]


def add_due(registry: Any, client_id: str, deadline_ns: int | None) -> Any:
    record = registry.add(client_id)
    record.deadline_ns = deadline_ns
    return record


def test_nobody_is_due_in_an_empty_registry(registry: Any) -> None:
    assert registry.due(END) == []


def test_new_record_is_never_due(registry: Any) -> None:
    registry.add("a")
    assert registry.due(END) == []


def test_record_is_due_from_its_deadline_on(registry: Any) -> None:
    record = add_due(registry, "a", 100)
    assert registry.due(99) == []
    assert registry.due(100) == registry.due(101) == registry.due(END) == [record]


@pytest.mark.parametrize("deadline_ns", [0, 1, 2**31, 2**32 + 1, 2**53 + 1, END - 1])
def test_deadlines_are_exact_in_64_bits(registry: Any, deadline_ns: int) -> None:
    record = add_due(registry, "a", deadline_ns)
    add_due(registry, "never", None)
    assert registry.due(deadline_ns - 1) == []
    assert registry.due(deadline_ns) == [record]


def test_nobody_is_due_before_0(registry: Any) -> None:
    add_due(registry, "a", 0)
    assert registry.due(-1) == registry.due(-(2**63)) == []


def test_due_changes_no_deadline(registry: Any) -> None:
    record = add_due(registry, "a", 5)
    assert registry.due(9) == registry.due(9) == [record]
    assert record.deadline_ns == 5


def test_deadline_can_be_moved_and_taken_back(registry: Any) -> None:
    record = add_due(registry, "a", 5)
    record.deadline_ns = 50
    assert registry.due(49) == []
    record.deadline_ns = 3
    assert registry.due(3) == [record]
    record.deadline_ns = None
    assert registry.due(END) == []
    record.deadline_ns = 7
    assert registry.due(7) == [record]


@pytest.mark.parametrize("how", ["remove", "replace", "clear"])
def test_record_that_left_is_not_due(registry: Any, how: str) -> None:
    record = add_due(registry, "a", 5)
    if how == "remove":
        registry.remove(record)
    elif how == "replace":
        registry.add("a", on_duplicate="replace")
    else:
        registry.clear()
    assert registry.due(END) == []
    assert record.deadline_ns is None


def test_limit_is_1000_by_default(registry: Any) -> None:
    for number in range(1200):
        add_due(registry, f"c{number}", number)
    assert len(registry.due(END)) == 1000
    assert len(registry.due(END, 2**62)) == len(registry.due(END, END)) == 1200
    assert len(registry.due(500)) == 501


@pytest.mark.parametrize("shards", [1, 2, 8, 64])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 500])
def test_due_goes_shard_by_shard_in_deadline_order(impl: Implementation, shards: int, count: int) -> None:
    registry = impl.Registry(shards)
    chance = random.Random(shards * count)
    deadlines = [chance.choice([None, chance.randrange(1000), chance.randrange(2**62)]) for _ in range(count)]
    records = [add_due(registry, f"c{number}", deadline) for number, deadline in enumerate(deadlines)]
    for now in (0, 500, 999, 2**61, END):
        all_due = [record for record in records if record.deadline_ns is not None and record.deadline_ns <= now]
        expected = sorted(order(impl, registry, all_due))
        for limit in (1, 2, 10, 63, 64, 65, 1000):
            due = registry.due(now, limit)
            assert order(impl, registry, due) == expected[:limit]
            assert len(due) == len(set(due))


def test_equal_deadlines_are_all_due(registry: Any) -> None:
    records = [add_due(registry, f"c{number}", 5) for number in range(300)]
    assert ids(registry.due(5)) == ids(records)
    assert len(set(registry.due(5, 100))) == 100


def test_giving_new_deadlines_and_calling_again_reaches_everyone_once(registry: Any) -> None:
    for number in range(537):
        add_due(registry, f"c{number}", number % 50)
    seen = []
    while due := registry.due(60, 100):
        for record in due:
            record.deadline_ns = 1000 if len(seen) % 2 else None
        seen += due
    assert sorted(record.client_id for record in seen) == sorted(registry)


def test_removing_the_due_and_calling_again_reaches_everyone_once(registry: Any) -> None:
    for number in range(537):
        add_due(registry, f"c{number}", number % 50)
    seen = []
    while due := registry.due(60, 100):
        assert all(registry.remove(record) is record for record in due)
        seen += due
    assert len(seen) == len(set(seen)) == 537
    assert len(registry) == 0


@pytest.mark.parametrize("seed", range(4))
def test_long_run_agrees_with_a_scan_of_all_records(impl: Implementation, seed: int) -> None:
    chance = random.Random(seed)
    registry = impl.Registry(4)
    for step in range(1500):
        client_id = f"c{chance.randrange(200)}"
        action = chance.random()
        if action < 0.4:
            record = registry.get(client_id) or registry.add(client_id)
            record.deadline_ns = chance.choice([None, chance.randrange(100)])
        elif action < 0.6:
            registry.remove(client_id)
        elif action < 0.7:
            add_due(registry, f"x{step}", chance.randrange(100))
        elif action < 0.8:
            for record in registry.due(chance.randrange(100), 5):
                record.deadline_ns = chance.choice([None, record.deadline_ns + 50])
        now, limit = chance.randrange(-1, 200), chance.choice([1, 3, 1000])
        all_due = [each for each in registry.values() if each.deadline_ns is not None and each.deadline_ns <= now]
        assert order(impl, registry, registry.due(now, limit)) == sorted(order(impl, registry, all_due))[:limit]
