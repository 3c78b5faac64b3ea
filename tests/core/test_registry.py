"""The registry as a whole: its settings, adding and removing, looking up, the ``Mapping`` side, and the totals."""

from __future__ import annotations

import ast
import inspect
import sys
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from pathlib import Path
from typing import Any

import pytest

import wsfast.errors
from tests.conftest import FakeClock, Implementation
from tests.core.state import SHARD_COUNTERS, assert_consistent, ids, registry_state
from wsfast.connection import ConnectionStatus, Filters
from wsfast.errors import DetachedRecord, DuplicateConnection, ForeignRecord, UnknownConnection

STUB = Path(wsfast.errors.__file__).with_name("_core.pyi")


def stub_methods() -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, method) for method in node.body if isinstance(method, ast.FunctionDef))


def test_every_name_of_the_stub_is_there(impl: Implementation) -> None:
    missing = [
        f"{owner}.{method.name}"
        for owner, method in stub_methods()
        if owner in ("Registry", "ConnectionMeta") and not hasattr(getattr(impl, owner), method.name)
    ]
    assert missing == []


def test_parameters_are_those_of_the_stub(impl: Implementation) -> None:
    compared = 0
    for owner, method in stub_methods():
        if owner not in ("Registry", "ConnectionMeta") or method.name.startswith("_") or method.decorator_list:
            continue
        expected = [argument.arg for argument in (*method.args.args, *method.args.kwonlyargs)]
        if method.args.kwarg is not None:
            assert ast.unparse(method.args.kwarg) == "filters: Unpack[Filters]"
            expected += Filters.__annotations__
        signature = inspect.signature(getattr(getattr(impl, owner), method.name))
        assert list(signature.parameters) == expected, f"{owner}.{method.name}"
        compared += 1
    assert compared > 20


def test_settings_have_their_defaults(impl: Implementation) -> None:
    registry = impl.Registry()
    assert (registry.max_id_bytes, registry.max_name_bytes) == (256, 256)
    assert (registry.max_tags, registry.max_groups) == (64, 1024)
    assert registry.shards == (64 if impl.sharded else registry.stats()["shards"])
    assert registry.owner is None


def test_settings_are_told_and_fixed(impl: Implementation) -> None:
    registry = impl.Registry(16, max_id_bytes=1, max_name_bytes=2, max_tags=0, max_groups=3)
    assert (registry.max_id_bytes, registry.max_name_bytes) == (1, 2)
    assert (registry.max_tags, registry.max_groups) == (0, 3)
    for name in ("shards", "max_id_bytes", "max_name_bytes", "max_tags", "max_groups"):
        with pytest.raises(AttributeError):
            setattr(registry, name, 8)
    with pytest.raises(TypeError):
        impl.Registry(16, 256)


@pytest.mark.parametrize("shards", [1, 2, 64, 65536])
def test_number_of_shards_changes_no_result_but_the_stats(impl: Implementation, shards: int) -> None:
    registry = impl.Registry(shards)
    for number in range(200):
        registry.add(f"c{number}", groups=[f"g{number % 3}"], user_id=f"u{number % 7}")
    for number in range(0, 200, 2):
        registry.remove(f"c{number}")
    assert sorted(registry) == sorted(f"c{number}" for number in range(1, 200, 2))
    assert len(registry.shard_stats()) == registry.shards == registry.stats()["shards"]
    assert registry.shards == (shards if impl.sharded else registry.shards)
    assert_consistent(registry)


def test_owner_is_for_whoever_builds_on_the_registry(impl: Implementation) -> None:
    registry = impl.Registry(1)
    owner = object()
    registry.owner = owner
    assert registry.owner is owner
    registry.owner = None
    assert registry.owner is None


def test_clock_of_the_registry_is_the_one_passed_in(impl: Implementation, clock: FakeClock) -> None:
    registry = impl.Registry(1, clock=clock)
    assert registry.now_ns() == clock.now
    clock.advance(17)
    assert registry.now_ns() == clock.now


def test_clocks_are_those_of_the_system_by_default(impl: Implementation) -> None:
    registry = impl.Registry(1)
    before = time.monotonic_ns(), time.time()
    record = registry.add("a")
    now = registry.now_ns()
    after = time.monotonic_ns(), time.time()
    assert before[0] <= record.created_ns <= now <= after[0]
    # The wall clock may be set back and forth meanwhile; a day is no measure of speed.
    assert before[1] - 86400 < record.created < after[1] + 86400


def test_registry_is_true_also_when_it_is_empty(impl: Implementation) -> None:
    registry = impl.Registry(1)
    assert bool(registry) is True
    assert len(registry) == 0


def test_add_returns_the_record_that_is_registered(registry: Any) -> None:
    record = registry.add("a")
    assert registry["a"] is registry.get("a") is record
    assert record.attached is True
    assert record.registry is registry
    assert len(registry) == 1


def test_new_record_has_the_defaults(registry: Any, clock: FakeClock) -> None:
    record = registry.add("a")
    assert record.client_id == "a"
    assert (record.conn, record.session, record.device_info) == (None, None, None)
    assert (record.user_id, record.device_type) == (None, None)
    assert record.status is ConnectionStatus.ONLINE
    assert record.permissions == record.groups == frozenset()
    assert record.tags == record.metadata == record.extensions == {}
    assert record.quality == (0.0, 0.0, 0.0)
    assert record.deadline_ns is None
    assert record.created_ns == record.last_active_ns == clock.now
    assert record.last_heartbeat is record.last_heartbeat_ns is None
    assert [getattr(record, name) for name in SHARD_COUNTERS[3:]] == [0] * 6


def test_add_stores_every_field(registry: Any) -> None:
    conn, session, device_info, value = object(), object(), object(), object()
    record = registry.add(
        "a",
        conn,
        user_id="u",
        device_type="ios",
        device_info=device_info,
        session=session,
        permissions=["read", "write", "read"],
        tags={"plan": "pro"},
        metadata={"m": value},
        extensions={"x": value},
        groups=["g", "h", "g"],
        status=ConnectionStatus.CONNECTING,
    )
    assert record.conn is conn
    assert record.session is session
    assert record.device_info is device_info
    assert (record.user_id, record.device_type) == ("u", "ios")
    assert record.permissions == frozenset({"read", "write"})
    assert record.tags == {"plan": "pro"}
    assert record.metadata == {"m": value}
    assert record.extensions == {"x": value}
    assert record.groups == frozenset({"g", "h"})
    assert record.status is ConnectionStatus.CONNECTING
    assert registry.groups() == {"g": 1, "h": 1}
    assert_consistent(registry)


def test_add_takes_only_the_connection_by_position(registry: Any) -> None:
    with pytest.raises(TypeError):
        registry.add("a", None, "u")
    with pytest.raises(TypeError):
        registry.add()
    with pytest.raises(TypeError):
        registry.add("a", colour="red")
    assert len(registry) == 0


def test_taken_id_is_rejected_and_the_record_stays(registry: Any) -> None:
    record = registry.add("a", "first", groups=["g"])
    before = registry_state(registry)
    with pytest.raises(DuplicateConnection):
        registry.add("a", "second", groups=["h"], user_id="u")
    assert registry["a"] is record
    assert registry_state(registry) == before


def test_replace_takes_the_place_of_a_record(registry: Any, clock: FakeClock) -> None:
    old = registry.add("a", "first", user_id="u", groups=["g"], tags={"t": "v"}, metadata={"m": 1})
    old.received(9)
    clock.advance(1000)
    new = registry.add("a", "second", groups=["h"], on_duplicate="replace")
    assert new is not old
    assert registry["a"] is new
    assert (old.attached, old.registry, old.status, old.conn) == (False, None, ConnectionStatus.OFFLINE, None)
    assert (new.messages_in, new.created_ns, new.user_id, new.groups) == (0, clock.now, None, {"h"})
    assert new.metadata == new.tags == {}
    assert registry.groups() == {"h": 1}
    assert registry.by_user("u") == []
    assert len(registry) == 1
    assert_consistent(registry)


def test_replace_of_nothing_is_an_add(registry: Any) -> None:
    record = registry.add("a", on_duplicate="replace")
    assert registry["a"] is record
    assert (registry.stats()["adds"], registry.stats()["removes"]) == (1, 0)


def test_late_end_of_a_replaced_connection_cannot_remove_its_successor(registry: Any) -> None:
    old = registry.add("a")
    new = registry.add("a", on_duplicate="replace")
    assert registry.remove(old) is None
    assert registry["a"] is new
    assert registry.remove(new) is new
    assert registry.remove(new) is None
    assert "a" not in registry


def test_remove_by_id_returns_the_detached_record(registry: Any) -> None:
    record = registry.add("a")
    assert registry.remove("a") is record
    assert record.attached is False
    assert registry.remove("a") is None
    assert registry.get("a") is None
    assert len(registry) == 0


def test_remove_by_record_returns_it_detached(registry: Any) -> None:
    record = registry.add("a")
    assert registry.remove(record) is record
    assert (record.attached, record.registry) == (False, None)
    assert "a" not in registry


def test_removed_id_can_be_added_again(registry: Any) -> None:
    old = registry.add("a")
    registry.remove("a")
    new = registry.add("a")
    assert new is not old
    assert (old.attached, new.attached) == (False, True)
    assert registry["a"] is new


def test_record_of_another_registry_is_foreign_until_it_is_detached(impl: Implementation) -> None:
    registry, other = impl.Registry(8), impl.Registry(8)
    mine, foreign = registry.add("a"), other.add("a")
    with pytest.raises(ForeignRecord):
        registry.remove(foreign)
    for call in (registry.join, registry.leave):
        with pytest.raises(ForeignRecord):
            call(foreign, "g")
    assert (mine.attached, foreign.attached) == (True, True)
    other.remove(foreign)
    assert registry.remove(foreign) is None
    for call in (registry.join, registry.leave):
        with pytest.raises(DetachedRecord):
            call(foreign, "g")
    assert registry["a"] is mine
    assert_consistent(registry)


def test_clear_removes_all_and_tells_how_many(registry: Any) -> None:
    records = [registry.add(f"c{number}", groups=["g"], user_id="u", tags={"t": "v"}) for number in range(100)]
    assert registry.clear() == 100
    assert registry.clear() == 0
    assert list(registry) == []
    assert not any(record.attached for record in records)
    assert {record.status for record in records} == {ConnectionStatus.OFFLINE}
    assert registry.groups() == {}
    assert (registry.stats()["adds"], registry.stats()["removes"]) == (100, 100)
    registry.add("c1")
    assert_consistent(registry)


def test_lookup_of_an_absent_id(registry: Any) -> None:
    default = object()
    assert registry.get("a") is None
    assert registry.get("a", default) is default
    assert "a" not in registry
    with pytest.raises(UnknownConnection) as caught:
        registry["a"]
    assert isinstance(caught.value, KeyError)


def test_get_many_keeps_the_order_and_gives_none_where_absent(registry: Any) -> None:
    records = {f"c{number}": registry.add(f"c{number}") for number in range(500)}
    asked = [f"c{number * 7 % 600}" for number in range(1000)]
    assert registry.get_many(asked) == [records.get(client_id) for client_id in asked]
    assert registry.get_many(tuple(asked[:3])) == registry.get_many(iter(asked[:3]))
    assert registry.get_many({"c1": None}) == [records["c1"]]
    assert registry.get_many([]) == []
    assert registry.get_many(registry) == list(registry.values())


def test_get_many_reads_all_ids_before_it_looks_any_up(registry: Any) -> None:
    registry.add("a")

    def ids_that_change_the_registry() -> Iterator[str]:
        yield "a"
        registry.remove("a")
        yield "b"
        registry.add("b")

    assert registry.get_many(ids_that_change_the_registry()) == [None, registry["b"]]


def test_ids_whose_route_collides_are_told_apart(registry: Any) -> None:
    # English words whose FNV-1a, 32 bits, is the same.
    for one, other in (("costarring", "liquid"), ("declinate", "macallums"), ("altarage", "zinke")):
        first, second = registry.add(one), registry.add(other)
        assert registry.shard_of(one) == registry.shard_of(other)
        assert (registry[one], registry[other]) == (first, second)
        registry.remove(one)
        assert registry.get(one) is None
        assert registry[other] is second
    assert_consistent(registry)


def test_ids_of_one_shard_are_all_kept(impl: Implementation) -> None:
    registry = impl.Registry(64)
    shard = registry.shard_of("c0")
    crowd = [f"c{number}" for number in range(40_000) if registry.shard_of(f"c{number}") == shard]
    for client_id in crowd:
        registry.add(client_id)
    assert registry.shard_stats()[shard]["connections"] == len(crowd) > 300
    assert sorted(registry) == sorted(crowd)
    for client_id in crowd[::2]:
        registry.remove(client_id)
    assert all((client_id in registry) == bool(number % 2) for number, client_id in enumerate(crowd))
    assert_consistent(registry)


def test_tables_grow_and_shrink_without_losing_anyone(impl: Implementation) -> None:
    registry = impl.Registry(2)
    for size in (3000, 10, 2000, 0, 500):
        for number in range(size):
            registry.add(f"c{number}", on_duplicate="replace")
        for number in range(size, 3000):
            registry.remove(f"c{number}")
        assert len(registry) == size
        assert sorted(registry) == sorted(f"c{number}" for number in range(size))
        assert all(registry[f"c{number}"].client_id == f"c{number}" for number in range(size))
    assert_consistent(registry)


def test_registry_is_a_mapping(impl: Implementation, registry: Any) -> None:
    record = registry.add("a")
    assert isinstance(registry, Mapping)
    assert issubclass(impl.Registry, Mapping)
    assert dict(registry) == {"a": record}
    assert {**registry} == {"a": record}
    match registry:
        case {"a": found}:
            assert found is record
        case _:
            pytest.fail("a mapping pattern does not match a registry")


def test_views_are_live_views_of_a_mapping(registry: Any) -> None:
    keys, values, items = registry.keys(), registry.values(), registry.items()
    assert isinstance(keys, KeysView)
    assert isinstance(values, ValuesView)
    assert isinstance(items, ItemsView)
    assert (len(keys), list(values), list(items)) == (0, [], [])
    a, b = registry.add("a"), registry.add("b")
    assert (len(keys), len(values), len(items)) == (2, 2, 2)
    assert sorted(keys) == ["a", "b"]
    assert ids(values) == ["a", "b"]
    assert dict(items) == {"a": a, "b": b}
    assert "a" in keys
    assert a in values
    assert ("a", a) in items
    assert ("a", b) not in items
    assert ("c", a) not in items
    assert keys & {"a", "c"} == {"a"}
    assert keys | {"c"} == {"a", "b", "c"}
    assert items - {("a", a)} == {("b", b)}
    registry.remove("a")
    assert list(keys) == ["b"]
    assert a not in values


def test_counters_add_up_over_shards_and_survive_removal(impl: Implementation) -> None:
    registry = impl.Registry(4)
    records = [registry.add(f"c{number}") for number in range(40)]
    for number, record in enumerate(records):
        record.received(number)
        record.received(0, 3)
        record.sent(2 * number, 2)
        record.failed("in")
        record.failed("out")
        record.failed("out")
    before = registry.stats()
    expected = {
        "connections": 40,
        "adds": 40,
        "removes": 0,
        "messages_in": 160,
        "messages_out": 80,
        "bytes_in": 780,
        "bytes_out": 1560,
        "errors_in": 40,
        "errors_out": 80,
    }
    assert {name: before[name] for name in SHARD_COUNTERS} == expected
    for record in records:
        registry.remove(record)
        record.received(1000)
        record.sent(1000)
        record.failed("in")
    after = registry.stats()
    assert {name: after[name] for name in SHARD_COUNTERS} == expected | {"connections": 0, "removes": 40}
    assert_consistent(registry)


def test_each_shard_counts_its_own_connections(impl: Implementation) -> None:
    registry = impl.Registry(8)
    records = [registry.add(f"c{number}") for number in range(50)]
    for number, record in enumerate(records):
        record.received(number)
    for record in records[::3]:
        registry.remove(record)
    expected = [
        dict.fromkeys(("adds", "removes", "connections", "messages_in", "bytes_in"), 0) for _ in range(registry.shards)
    ]
    for number, record in enumerate(records):
        shard = expected[registry.shard_of(record.client_id)]
        shard["adds"] += 1
        shard["removes"] += number % 3 == 0
        shard["connections"] += number % 3 != 0
        shard["messages_in"] += 1
        shard["bytes_in"] += number
    counted = registry.shard_stats()
    assert [{name: shard[name] for name in row} for shard, row in zip(counted, expected, strict=True)] == expected


def test_replacement_counts_as_one_add_and_one_remove(registry: Any) -> None:
    registry.add("a").received(5)
    registry.add("a", on_duplicate="replace").received(6)
    stats = registry.stats()
    assert (stats["adds"], stats["removes"], stats["connections"]) == (2, 1, 1)
    assert (stats["messages_in"], stats["bytes_in"]) == (2, 11)


def test_refused_adds_are_not_counted(registry: Any) -> None:
    registry.add("a")
    with pytest.raises(DuplicateConnection):
        registry.add("a")
    with pytest.raises(ValueError, match="group name is empty"):
        registry.add("b", groups=[""])
    registry.remove("absent")
    stats = registry.stats()
    assert (stats["adds"], stats["removes"]) == (1, 0)


def test_stats_have_their_keys_and_are_integers(registry: Any) -> None:
    registry.add("a", groups=["g", "h"], user_id="u", tags={"t": "v", "s": "v"})
    registry.add("b", groups=["g"], user_id="u", tags={"t": "v"})
    stats, shards = registry.stats(), registry.shard_stats()
    assert set(stats) == {*SHARD_COUNTERS, "longest_probe", "shards", "groups", "users", "tags"}
    assert all(set(shard) == {*SHARD_COUNTERS, "longest_probe"} for shard in shards)
    assert {type(value) for row in (stats, *shards) for value in row.values()} == {int}
    assert (stats["groups"], stats["users"], stats["tags"]) == (2, 1, 2)
    assert stats["longest_probe"] == max(shard["longest_probe"] for shard in shards) >= 0


def test_stats_are_snapshots(registry: Any) -> None:
    stats, shards = registry.stats(), registry.shard_stats()
    registry.add("a")
    stats["adds"] = 77
    shards[0]["adds"] = 77
    assert registry.stats()["adds"] == sum(shard["adds"] for shard in registry.shard_stats()) == 1


def test_size_grows_with_what_the_registry_holds(registry: Any) -> None:
    empty = sys.getsizeof(registry)
    for number in range(5000):
        registry.add(f"c{number}", groups=[f"g{number % 100}"])
    assert 0 < empty < sys.getsizeof(registry)


def test_clock_may_use_the_registry(impl: Implementation) -> None:
    seen = []

    def clock() -> int:
        seen.append((len(registry), registry.get("a"), registry.groups(), ids(registry.values())))
        return len(seen)

    registry = impl.Registry(2, clock=clock, wall_clock=lambda: float(len(registry)))
    record = registry.add("a", groups=["g"])
    for use in (record.touch, record.heartbeat, registry.now_ns, lambda: record.received(1)):
        calls = len(seen)
        use()
        assert len(seen) > calls
    assert seen[0] == (0, None, {}, [])
    assert seen[-1] == (1, record, {"g": 1}, ["a"])
    registry.clear()  # its clock refers to it


def test_clock_that_adds_the_same_id_wins(impl: Implementation) -> None:
    entered = []

    def clock() -> int:
        if not entered:
            entered.append(True)
            entered.append(registry.add("a", user_id="inner"))
        return 1

    registry = impl.Registry(2, clock=clock)
    with pytest.raises(DuplicateConnection):
        registry.add("a", user_id="outer")
    assert registry["a"] is entered[1]
    assert registry.by_user("outer") == []
    assert_consistent(registry)
    registry.clear()  # its clock refers to it


def test_exception_of_the_clock_comes_through_and_nothing_changes(impl: Implementation) -> None:
    broken = []

    def tick() -> int:
        if broken:
            raise LookupError("the clock stopped")
        return 1

    registry = impl.Registry(2, clock=tick)
    record = registry.add("a", groups=["g"])
    before = (sorted(registry), registry.groups(), registry.stats())
    broken.append(True)
    with pytest.raises(LookupError, match="the clock stopped"):
        registry.add("b", groups=["h"])
    with pytest.raises(LookupError, match="the clock stopped"):
        registry.add("a", on_duplicate="replace")
    for use in (record.touch, record.heartbeat, lambda: record.received(5), registry.now_ns):
        with pytest.raises(LookupError, match="the clock stopped"):
            use()
    assert (sorted(registry), registry.groups(), registry.stats()) == before
    assert registry["a"] is record
    assert (record.messages_in, record.last_heartbeat_ns) == (0, None)
