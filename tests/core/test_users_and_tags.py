"""The indexes by user and by tag: assigning moves a record, sharing, many distinct names, and a run against a model."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conftest import Implementation
from tests.core.state import assert_consistent, ids, walk
from wsfast.errors import LimitExceeded


def test_user_has_all_connections_with_the_id(registry: Any) -> None:
    records = [registry.add(f"c{number}", user_id="u") for number in range(5)]
    registry.add("other", user_id="w")
    registry.add("anonymous")
    found = registry.by_user("u")
    assert type(found) is list
    assert ids(found) == ids(records)
    assert registry.by_user("nobody") == []
    assert registry.stats()["users"] == 2


def test_assigning_a_user_id_moves_the_record(registry: Any) -> None:
    record = registry.add("a", user_id="u")
    record.user_id = "w"
    assert (registry.by_user("u"), registry.by_user("w")) == ([], [record])
    record.user_id = "w"
    assert registry.by_user("w") == [record]
    record.user_id = None
    assert (registry.by_user("w"), registry.stats()["users"]) == ([], 0)
    record.user_id = "u"
    assert registry.by_user("u") == walk(registry, user="u") == [record]
    registry.remove(record)
    assert (registry.by_user("u"), record.user_id) == ([], "u")


def test_tag_finds_its_value_or_any(registry: Any) -> None:
    a = registry.add("a", tags={"plan": "pro", "lang": "de"})
    b = registry.add("b", tags={"plan": "free"})
    registry.add("c", tags={"plans": "pro"})
    assert walk(registry, tag=("plan", "pro")) == [a]
    assert walk(registry, tag=("plan", "free")) == [b]
    assert ids(walk(registry, tag="plan")) == ["a", "b"]
    assert walk(registry, tag=("plan", "de")) == walk(registry, tag="pro") == []
    assert registry.stats()["tags"] == 4


def test_assigning_tags_moves_the_record(registry: Any) -> None:
    record = registry.add("a", tags={"plan": "pro", "lang": "de"})
    record.tags = {"plan": "free", "beta": ""}
    assert walk(registry, tag=("plan", "pro")) == walk(registry, tag="lang") == []
    for tag in ("plan", "beta", ("plan", "free"), ("beta", "")):
        assert walk(registry, tag=tag) == [record]
    assert registry.stats()["tags"] == 2
    record.tags = {"beta": "", "plan": "free"}
    assert walk(registry, tag="plan") == [record]
    record.tags = {}
    assert walk(registry, tag="plan") == walk(registry, tag=("beta", "")) == []
    assert registry.stats()["tags"] == 0
    assert_consistent(registry)


@pytest.mark.parametrize("how", ["remove", "replace", "clear"])
def test_leaving_the_registry_leaves_the_indexes(registry: Any, how: str) -> None:
    record = registry.add("a", user_id="u", tags={"t": "v"})
    shared = registry.add("b", user_id="u", tags={"t": "v"}) if how != "clear" else None
    if how == "remove":
        registry.remove(record)
    elif how == "replace":
        registry.add("a", on_duplicate="replace")
    else:
        registry.clear()
    left = [shared] if shared else []
    assert registry.by_user("u") == walk(registry, tag="t") == walk(registry, tag=("t", "v")) == left
    assert (record.user_id, record.tags) == ("u", {"t": "v"})
    assert_consistent(registry)


def test_connection_may_have_as_many_tags_as_the_limit(impl: Implementation) -> None:
    registry = impl.Registry(2, max_tags=3)
    record = registry.add("a", tags={"k0": "", "k1": "", "k2": ""})
    with pytest.raises(LimitExceeded):
        record.tags = {"k0": "", "k1": "", "k2": "", "k3": ""}
    assert set(record.tags) == {"k0", "k1", "k2"}
    with pytest.raises(LimitExceeded):
        registry.add("b", tags={"k0": "", "k1": "", "k2": "", "k3": ""})
    assert "b" not in registry
    assert walk(registry, tag="k3") == []
    record.tags = {"k3": "", "k4": "", "k5": ""}
    assert_consistent(registry)


def test_limit_of_0_forbids_tags(impl: Implementation) -> None:
    registry = impl.Registry(2, max_tags=0)
    record = registry.add("a", tags={})
    with pytest.raises(LimitExceeded) as caught:
        record.tags = {"t": "v"}
    assert (caught.value.what, caught.value.limit) == ("tags of one connection", 0)
    assert record.tags == {}


def test_default_limit_is_64_tags(impl: Implementation) -> None:
    registry = impl.Registry(2)
    record = registry.add("a", tags={f"k{number}": "v" for number in range(64)})
    with pytest.raises(LimitExceeded):
        record.tags = {f"k{number}": "v" for number in range(65)}
    assert len(record.tags) == 64
    assert all(walk(registry, tag=(f"k{number}", "v")) == [record] for number in range(64))


def test_many_connections_share_one_tag_set(registry: Any) -> None:
    tags = {"plan": "pro", "lang": "de"}
    records = [registry.add(f"c{number}", tags=tags) for number in range(1000)]
    assert registry.stats()["tags"] == 2
    for record in records[::2]:
        record.tags = {"plan": "free"}
    assert ids(walk(registry, tag=("plan", "pro"))) == ids(walk(registry, tag="lang")) == ids(records[1::2])
    assert ids(walk(registry, tag=("plan", "free"))) == ids(records[::2])
    assert len(walk(registry, tag="plan")) == 1000
    registry.clear()
    assert registry.stats()["tags"] == 0
    assert {record.tags["plan"] for record in records} == {"pro", "free"}


def test_tags_given_in_another_order_are_the_same(registry: Any) -> None:
    a = registry.add("a", tags={"k": "v", "l": "w"})
    b = registry.add("b", tags={"l": "w", "k": "v"})
    assert a.tags == b.tags
    assert registry.stats()["tags"] == 2
    assert ids(walk(registry, tag=("l", "w"))) == ["a", "b"]


def test_many_distinct_users_and_tags(registry: Any) -> None:
    records = [
        registry.add(f"c{number}", user_id=f"u{number}", tags={"seat": str(number), f"k{number}": "v"})
        for number in range(2000)
    ]
    stats = registry.stats()
    assert (stats["users"], stats["tags"]) == (2000, 4000)
    assert len(walk(registry, tag="seat")) == 2000
    for number in (0, 1, 999, 1999):
        expected = [records[number]]
        assert registry.by_user(f"u{number}") == walk(registry, tag=("seat", str(number))) == expected
        assert walk(registry, tag=f"k{number}") == expected
    for record in records[:1990]:
        registry.remove(record)
    stats = registry.stats()
    assert (stats["users"], stats["tags"]) == (10, 20)
    assert_consistent(registry)


def test_pairs_are_not_mixed_up_by_where_key_and_value_meet(registry: Any) -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("a", "b\0c"), ("a\0b", "c"), ("a=b", "c"), ("a", "b=c")]
    records = {pair: registry.add(f"c{number}", tags=dict([pair])) for number, pair in enumerate(pairs)}
    for pair, record in records.items():
        assert walk(registry, tag=pair) == [record]
    assert len(walk(registry, tag="a")) == 3
    assert registry.stats()["tags"] == len(pairs)


@pytest.mark.parametrize("seed", range(4))
def test_long_run_of_reassignments_agrees_with_a_model(impl: Implementation, seed: int) -> None:
    chance = random.Random(seed)
    registry = impl.Registry(4)
    records = [registry.add(f"c{number}") for number in range(60)]
    for step in range(3000):
        record = chance.choice(records)
        user = chance.choice([None, "u0", "u1", "u2", f"u{step}"])
        tags = {f"k{chance.randrange(5)}": f"v{chance.randrange(4)}" for _ in range(chance.randrange(5))}
        record.user_id, record.tags = user, tags
        assert (record.user_id, record.tags) == (user, tags)
        if step % 250 == 0:
            assert_consistent(registry)
    for record in records[::2]:
        registry.remove(record)
    assert_consistent(registry)
