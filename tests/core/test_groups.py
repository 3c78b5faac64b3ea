"""Groups: joining, leaving, ending with the last member, limits, and a long run against a dict of sets."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conftest import Implementation
from tests.core.state import assert_consistent, ids, walk
from wsfast.errors import DetachedRecord, LimitExceeded


def test_join_and_leave_tell_whether_anything_changed(registry: Any) -> None:
    record = registry.add("a")
    assert registry.join(record, "g") is True
    assert registry.join(record, "g") is False
    assert record.groups == {"g"}
    assert registry.leave(record, "g") is True
    assert registry.leave(record, "g") is False
    assert registry.leave(record, "never") is False
    assert record.groups == frozenset()


def test_group_lives_from_its_first_member_to_its_last(registry: Any) -> None:
    a, b = registry.add("a", groups=["g"]), registry.add("b")
    assert registry.groups() == {"g": 1}
    registry.join(b, "g")
    assert registry.groups() == {"g": 2}
    registry.leave(a, "g")
    assert registry.groups() == {"g": 1}
    registry.remove(b)
    assert registry.groups() == {}
    assert registry.group("g") == []
    assert registry.stats()["groups"] == 0


def test_group_lists_its_members_now(registry: Any) -> None:
    records = [registry.add(f"c{number}", groups=["g"]) for number in range(5)]
    members = registry.group("g")
    assert type(members) is list
    assert ids(members) == ids(records)
    members.clear()
    registry.remove(records[0])
    assert ids(registry.group("g")) == ids(records[1:])
    assert registry.group("nobody") == []


def test_groups_and_the_groups_of_a_record_are_snapshots(registry: Any) -> None:
    record = registry.add("a", groups=["g"])
    groups, of_record = registry.groups(), record.groups
    registry.join(record, "h")
    assert (groups, of_record) == ({"g": 1}, frozenset({"g"}))
    assert type(of_record) is frozenset
    groups["x"] = 1
    assert registry.groups() == {"g": 1, "h": 1}


@pytest.mark.parametrize("how", ["remove", "replace", "clear"])
def test_leaving_the_registry_leaves_all_groups(registry: Any, how: str) -> None:
    record = registry.add("a", groups=[f"g{number}" for number in range(100)])
    if how == "remove":
        registry.remove("a")
    elif how == "replace":
        registry.add("a", on_duplicate="replace")
    else:
        registry.clear()
    assert record.groups == frozenset()
    assert registry.groups() == {}
    assert registry.group("g7") == walk(registry, group="g7") == []
    for call in (registry.join, registry.leave):
        with pytest.raises(DetachedRecord):
            call(record, "g7")
    assert registry.groups() == {}


def test_connection_may_be_in_as_many_groups_as_the_limit(impl: Implementation) -> None:
    registry = impl.Registry(2, max_groups=3)
    record = registry.add("a", groups=["g0", "g1", "g2", "g1", "g0"])
    with pytest.raises(LimitExceeded) as caught:
        registry.join(record, "g3")
    assert str(caught.value) == "too many groups of one connection: the limit is 3"
    assert registry.join(record, "g1") is False
    assert record.groups == {"g0", "g1", "g2"}
    assert registry.groups() == {"g0": 1, "g1": 1, "g2": 1}
    registry.leave(record, "g0")
    assert registry.join(record, "g3") is True
    assert record.groups == {"g1", "g2", "g3"}
    with pytest.raises(LimitExceeded):
        registry.add("b", groups=["g0", "g1", "g2", "g3"])
    assert_consistent(registry)


def test_limit_of_0_forbids_groups(impl: Implementation) -> None:
    registry = impl.Registry(2, max_groups=0)
    record = registry.add("a")
    with pytest.raises(LimitExceeded):
        registry.join(record, "g")
    with pytest.raises(LimitExceeded):
        registry.add("b", groups=["g"])
    assert registry.groups() == {}
    assert "b" not in registry


def test_default_limit_is_1024_groups(impl: Implementation) -> None:
    registry = impl.Registry(2)
    record = registry.add("a", groups=[f"g{number}" for number in range(1024)])
    assert len(record.groups) == 1024
    with pytest.raises(LimitExceeded) as caught:
        registry.join(record, "g1024")
    assert (caught.value.what, caught.value.limit) == ("groups of one connection", 1024)
    assert_consistent(registry)


def test_limit_of_one_connection_is_none_of_the_registry(impl: Implementation) -> None:
    registry = impl.Registry(2, max_groups=1)
    for number in range(300):
        registry.add(f"c{number}", groups=[f"g{number}"])
    assert len(registry.groups()) == 300


def test_one_connection_in_thousands_of_groups(impl: Implementation) -> None:
    registry = impl.Registry(4, max_groups=5000)
    record, other = registry.add("a"), registry.add("b")
    names = [f"g{number}" for number in range(5000)]
    assert all(registry.join(record, name) for name in names)
    assert all(registry.join(other, name) for name in names[::2])
    assert record.groups == set(names)
    with pytest.raises(LimitExceeded):
        registry.join(record, "one more")
    shuffled = random.Random(5).sample(names, 4000)
    assert all(registry.leave(record, name) for name in shuffled)
    assert record.groups == set(names) - set(shuffled)
    assert_consistent(registry)
    assert registry.remove(record) is record
    assert registry.groups() == dict.fromkeys(names[::2], 1)


def test_one_group_of_thousands_of_connections(impl: Implementation) -> None:
    registry = impl.Registry(4)
    records = [registry.add(f"c{number}", groups=["g"]) for number in range(5000)]
    assert registry.groups() == {"g": 5000}
    chance = random.Random(6)
    chance.shuffle(records)
    for record in records[:2000]:
        assert registry.leave(record, "g")
    for record in records[2000:3000]:
        registry.remove(record)
    assert ids(registry.group("g")) == ids(records[3000:])
    for record in records[:2000]:
        assert registry.join(record, "g")
    assert_consistent(registry)


@pytest.mark.parametrize("seed", range(4))
def test_long_run_of_joins_and_leaves_agrees_with_a_dict_of_sets(impl: Implementation, seed: int) -> None:
    chance = random.Random(seed)
    registry = impl.Registry(4, max_groups=10_000)
    names = [f"g{number}" for number in range(40)]
    records = {f"c{number}": registry.add(f"c{number}") for number in range(40)}
    model: dict[str, set[str]] = {client_id: set() for client_id in records}
    for step in range(6000):
        client_id, name = chance.choice(list(model)), chance.choice(names)
        action = chance.random()
        if action < 0.55:
            assert registry.join(records[client_id], name) is (name not in model[client_id])
            model[client_id].add(name)
        elif action < 0.98:
            assert registry.leave(records[client_id], name) is (name in model[client_id])
            model[client_id].discard(name)
        else:
            initial = chance.sample(names, chance.randrange(20))
            records[client_id] = registry.add(client_id, groups=initial, on_duplicate="replace")
            model[client_id] = set(initial)
        assert records[client_id].groups == model[client_id]
        if step % 500 == 0:
            assert_consistent(registry)
    assert {client_id: set(registry[client_id].groups) for client_id in model} == model
    assert_consistent(registry)


def test_groups_of_the_same_name_in_two_registries_are_apart(impl: Implementation) -> None:
    one, other = impl.Registry(2), impl.Registry(2)
    a = one.add("a", groups=["g"], user_id="u", tags={"t": "v"})
    assert other.group("g") == other.by_user("u") == walk(other, tag="t") == []
    b = other.add("b", groups=["g"], user_id="u", tags={"t": "v"})
    assert one.group("g") == one.by_user("u") == walk(one, tag="t") == [a]
    one.clear()
    assert other.group("g") == other.by_user("u") == walk(other, tag=("t", "v")) == [b]


def test_names_of_group_user_and_tag_do_not_mix(registry: Any) -> None:
    record = registry.add("x", groups=["x"])
    assert registry.by_user("x") == walk(registry, tag="x") == []
    record.user_id = "x"
    registry.leave(record, "x")
    assert registry.group("x") == walk(registry, tag=("x", "x")) == []
    record.tags = {"x": "x"}
    record.user_id = None
    assert registry.group("x") == registry.by_user("x") == []
    assert walk(registry, tag=("x", "x")) == walk(registry, tag="x") == [record]
