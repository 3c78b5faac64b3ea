"""Who keeps whom alive: references dropped on removal, cycles, finalizers that call back, registries that go first."""

from __future__ import annotations

import gc
import sys
import sysconfig
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Implementation
from tests.core.state import DEPARTURES, assert_consistent, ids, registry_state
from wsfast.connection import ConnectionStatus, Verbs
from wsfast.errors import DetachedRecord, DuplicateConnection, WsfastError


class Thing:
    """Any object that takes weak references."""


class Caller:
    """An object whose finalizer calls *action*."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


class Exotic:
    """An object that works with nothing: no hash, no comparison, no truth, no attributes."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __bool__(self) -> bool:
        raise AssertionError("taken for a truth")

    def __len__(self) -> int:
        raise AssertionError("measured")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")

    def __repr__(self) -> str:
        raise AssertionError("shown")


each_departure = pytest.mark.parametrize("depart", DEPARTURES.values(), ids=DEPARTURES.keys())


def test_native_record_is_not_visited_by_the_garbage_collector(native: Implementation) -> None:
    registry = native.Registry(2)
    record = registry.add("a", Thing(), session=[], metadata={"k": []}, extensions={"k": []}, tags={"t": "v"})
    assert gc.is_tracked(record) is False
    with_verbs = native.Registry(2, record_type=type("Verbal", (Verbs, native.ConnectionMeta), {"__slots__": ()}))
    assert gc.is_tracked(with_verbs.add("a")) is False


def test_record_takes_weak_references(registry: Any) -> None:
    record = registry.add("a")
    reference, called = weakref.ref(record), []
    second = weakref.ref(record, called.append)
    assert reference() is second() is registry["a"]
    del record
    gc.collect()
    assert reference() is registry["a"]
    registry.remove("a")
    gc.collect()
    assert reference() is None
    assert called == [second]


def test_registry_keeps_its_records_alive(registry: Any) -> None:
    for number in range(100):
        registry.add(f"c{number}", session=Thing())
    gc.collect()
    assert len(ids(registry.values())) == 100
    assert all(type(record.session) is Thing for record in registry.values())


@each_departure
def test_departure_drops_every_object_while_the_record_is_held(registry: Any, depart: Any) -> None:
    things = {name: Thing() for name in ("conn", "session", "device_info")}
    in_metadata, in_extensions = Thing(), Thing()
    record = registry.add("a", **things, metadata={"k": in_metadata}, extensions={"k": in_extensions})
    references = [weakref.ref(thing) for thing in (*things.values(), in_metadata, in_extensions)]
    del things, in_metadata, in_extensions
    assert all(reference() is not None for reference in references)
    depart(registry, record)
    assert [reference() for reference in references] == [None] * 5
    assert record.attached is False
    assert (record.conn, record.session, record.device_info) == (None, None, None)


@pytest.mark.parametrize("name", ["conn", "session", "device_info", "metadata", "extensions"])
def test_assigning_drops_the_object_that_was_there(registry: Any, name: str) -> None:
    first = Thing()
    reference = weakref.ref(first)
    wrap = (lambda value: {"k": value}) if name in ("metadata", "extensions") else (lambda value: value)
    record = registry.add("a", **{name: wrap(first)})
    del first
    setattr(record, name, wrap(Thing()))
    assert reference() is None


@each_departure
def test_departure_leaves_the_permissions_to_the_record(registry: Any, depart: Any) -> None:
    record = registry.add("a", device_type="d", permissions=["p", "q"])
    reference = weakref.ref(record.permissions)
    depart(registry, record)
    assert (record.device_type, record.permissions) == ("d", {"p", "q"})
    del record
    gc.collect()
    assert reference() is None


def test_assigning_lets_the_permissions_go_that_were_there(registry: Any) -> None:
    record = registry.add("a", permissions=["p"])
    for permissions in (["q"], [], ["r"]):
        reference = weakref.ref(record.permissions) if record.permissions else None
        record.permissions = permissions
        gc.collect()
        assert reference is None or reference() is None


def test_equal_permissions_are_one_set_as_long_as_a_record_has_them(registry: Any) -> None:
    first = registry.add("first", permissions=["p"])
    other, leaving, gone = (registry.add(name, permissions=["p"]) for name in ("other", "leaving", "gone"))
    registry.remove("gone")
    registry.add("leaving", permissions=["p"], on_duplicate="replace")
    other.permissions = ["q"]
    other.permissions = frozenset(["p"])
    other.permissions = other.permissions
    for refused in (gone, leaving):
        with pytest.raises(DetachedRecord):
            refused.permissions = ["p"]
        with pytest.raises(DuplicateConnection):
            registry.add("other", permissions=["p"])
    assert {id(record.permissions) for record in registry.values()} == {id(first.permissions)}
    assert registry.add("new", permissions={"p"}).permissions is first.permissions


def test_any_number_of_permission_sets_is_stored_once_each(registry: Any) -> None:
    sets = [frozenset([f"p{number}", f"q{number % 50}"]) for number in range(3000)]
    first = [registry.add(f"a{number}", permissions=permissions) for number, permissions in enumerate(sets)]
    second = [registry.add(f"b{number}", permissions=list(permissions)) for number, permissions in enumerate(sets)]
    assert all(one.permissions is other.permissions for one, other in zip(first, second, strict=True))
    references = [weakref.ref(record.permissions) for record in first]
    registry.clear()
    first.clear()
    second.clear()
    gc.collect()
    assert {reference() for reference in references} == {None}


@each_departure
def test_cycle_through_a_record_is_freed_once_it_left(impl: Implementation, registry: Any, depart: Any) -> None:
    record, session = registry.add("a"), Thing()
    session.record = record
    record.session = record.conn = session
    record.metadata = {"k": session}
    record.extensions["k"] = record
    references = weakref.ref(record), weakref.ref(session)
    gc.disable()
    try:
        depart(registry, record)
        del record, session
        if impl.name == "native":
            assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_detached_record_lives_as_long_as_it_is_held(registry: Any) -> None:
    record = registry.add("a", user_id="u", tags={"t": "v"}, permissions=["p"])
    registry.remove("a")
    registry.clear()
    gc.collect()
    assert (record.client_id, record.user_id, record.tags, record.permissions) == ("a", "u", {"t": "v"}, {"p"})


def test_registry_that_is_destroyed_detaches_its_records(impl: Implementation) -> None:
    registry = impl.Registry(4)
    conn = Thing()
    reference = weakref.ref(conn)
    records = [
        registry.add(f"c{number}", conn, user_id="u", tags={"t": "v"}, groups=["g"], permissions=["p"])
        for number in range(50)
    ]
    records[0].received(7)
    del registry, conn
    gc.collect()
    assert reference() is None
    assert {(record.attached, record.registry, record.conn) for record in records} == {(False, None, None)}
    assert {(record.status, record.groups, record.deadline_ns) for record in records} == {
        (ConnectionStatus.OFFLINE, frozenset(), None)
    }
    assert {record.user_id for record in records} == {"u"}
    assert records[49].tags == {"t": "v"}
    assert (records[0].bytes_in, records[49].client_id, records[49].permissions) == (7, "c49", {"p"})
    with pytest.raises(DetachedRecord):
        records[0].user_id = "w"
    records[0].touch()
    records[0].sent(3)
    assert records[0].messages_out == 0


def test_record_of_a_destroyed_registry_is_detached_for_another(impl: Implementation) -> None:
    registry, other = impl.Registry(4), impl.Registry(4)
    record = registry.add("a")
    other.add("a")
    del registry
    gc.collect()
    assert other.remove(record) is None
    for call in (other.join, other.leave):
        with pytest.raises(DetachedRecord):
            call(record, "g")
    assert len(other) == 1


def test_reading_the_registry_of_a_record_keeps_it(impl: Implementation) -> None:
    record = impl.Registry(2).add("a")
    gc.collect()
    assert record.attached is False
    registry = impl.Registry(2)
    record = registry.add("a")
    del registry
    again = record.registry
    gc.collect()
    if again is not None:
        assert record.attached is True
        assert again["a"] is record


@pytest.mark.parametrize("make", [Exotic, list, dict, lambda: 5, lambda: float("nan"), lambda: Exotic], ids=str)
def test_connection_may_be_any_object(registry: Any, make: Callable[[], Any]) -> None:
    conn = make()
    record = registry.add("a", conn, session=conn, device_info=conn, metadata={"k": conn}, extensions={"k": conn})
    assert record.conn is record.session is record.device_info is conn
    assert record.metadata["k"] is record.extensions["k"] is conn
    assert registry.remove("a") is record
    assert record.conn is None


@each_departure
def test_finalizer_may_use_the_registry(registry: Any, depart: Any) -> None:
    seen = []

    def use_everything() -> None:
        seen.append(("a" in registry, registry.get("a") is record))
        registry.remove("bystander")
        added = registry.add("added", groups=["g"], user_id="u", tags={"t": "v"}, on_duplicate="replace")
        registry.join(added, "h")
        added.user_id, added.tags = "w", {"t": "w"}
        seen.append(sum(len(batch) for batch in registry.batches(2)) == len(list(registry)))
        seen.append(registry.for_each(lambda each: each.touch()) > 0)
        registry.due(9)
        registry.stats()

    for number in range(20):
        registry.add(f"c{number}", groups=["g"], user_id="u")
    registry.add("bystander", groups=["g"])
    record = registry.add("a", Caller(use_everything), groups=["g"], user_id="u", tags={"t": "v"})
    depart(registry, record)
    assert seen == [(depart is DEPARTURES["replace"], False), True, True]
    assert record.attached is False
    assert "bystander" not in registry
    assert_consistent(registry)
    registry.clear()


@each_departure
def test_finalizer_may_remove_or_replace_or_clear_in_turn(registry: Any, depart: Any) -> None:
    actions = [
        lambda: registry.remove("a"),
        lambda: registry.add("a", on_duplicate="replace"),
        registry.clear,
        lambda: registry.add("a", Caller(lambda: registry.remove("a")), on_duplicate="replace"),
    ]
    for action in actions:
        record = registry.add("a", Caller(action), on_duplicate="replace")
        for number in range(30):
            registry.add(f"c{number}", session=Caller(action), groups=["g"], on_duplicate="replace")
        depart(registry, record)
        assert record.attached is False
        assert_consistent(registry)
        while registry.clear():
            assert_consistent(registry)


def test_clear_ends_when_finalizers_add(registry: Any) -> None:
    added = []

    def add_another() -> None:
        added.append(registry.add(f"added-{len(added)}"))

    for number in range(200):
        registry.add(f"c{number}", Caller(add_another))
    assert registry.clear() >= 200
    assert len(added) == 200
    assert set(registry) <= {record.client_id for record in added}
    assert_consistent(registry)


@pytest.mark.parametrize("name", ["conn", "session", "device_info", "metadata", "extensions"])
def test_finalizer_of_an_assigned_object_may_assign_and_remove(registry: Any, name: str) -> None:
    wrap = (lambda value: {"k": value}) if name in ("metadata", "extensions") else (lambda value: value)
    record = registry.add("a")
    setattr(record, name, wrap(Caller(lambda: setattr(record, name, wrap("inner")))))
    setattr(record, name, wrap("outer"))
    assert getattr(record, name) in (wrap("inner"), wrap("outer"))
    setattr(record, name, wrap(Caller(lambda: registry.remove("a"))))
    setattr(record, name, wrap("last"))
    assert record.attached is False
    assert getattr(record, name) in (None, {})
    assert_consistent(registry)


def test_finalizers_at_the_end_of_a_registry_may_use_its_records(impl: Implementation) -> None:
    registry = impl.Registry(4)
    records: list[Any] = []
    seen: list[Any] = []

    def look_around() -> None:
        for record in records:
            seen.append((record.registry is None, record.client_id[0], record.groups))
            record.touch()
            record.received(3)
            try:
                record.user_id = "w"
            except WsfastError as error:
                seen.append(type(error))

    records += [
        registry.add(f"c{number}", session=Caller(look_around), groups=["g"], user_id="u") for number in range(10)
    ]
    del registry
    gc.collect()
    assert len(seen) >= 100
    assert [record.attached for record in records] == [False] * 10
    assert {record.user_id for record in records} <= {"u", "w"}
    records.clear()


def test_finalizer_at_the_end_of_a_registry_cannot_bring_it_back(impl: Implementation) -> None:
    registry = impl.Registry(4)
    record = registry.add("a")
    kept: list[Any] = []
    record.session = Caller(lambda: kept.append(record.registry))
    del registry
    gc.collect()
    assert kept == [None]
    assert record.attached is False


def test_walk_over_members_that_finalizers_remove(registry: Any) -> None:
    for number in range(50):
        registry.add(f"c{number}", Caller(lambda number=number: registry.remove(f"c{number + 1}")), groups=["g"])
    seen = []
    for batch in registry.batches(4, group="g"):
        for record in batch:
            seen.append(record)
            registry.remove(record)
        del batch, record
    assert len(seen) == len(set(seen))
    assert len(registry) == 0
    assert registry.groups() == {}


def test_iterators_and_views_give_their_registry_back(registry: Any) -> None:
    conn = Thing()
    reference = weakref.ref(conn)
    registry.add("a", conn, groups=["g"], user_id="u", tags={"t": "v"})
    del conn
    walks = [iter(registry), registry.batches(1), registry.batches(1, group="g"), registry.batches(1, tag="t")]
    assert all(len(next(each)) == 1 for each in walks)
    registry.remove("a")
    assert reference() is None
    assert [next(each, None) for each in walks] == [None] * 4


def test_results_hold_no_more_than_their_records(registry: Any) -> None:
    record = registry.add("a", groups=["g"], user_id="u", tags={"t": "v"})
    record.deadline_ns = 1
    reference = weakref.ref(record)
    results = [registry.group("g"), registry.by_user("u"), registry.due(1), registry.get_many(["a"])]
    registry.remove("a")
    del record
    assert all(each == [reference()] for each in results)
    results.clear()
    gc.collect()
    assert reference() is None


def test_record_type_gives_the_records_their_class(impl: Implementation) -> None:
    class Connection(Verbs, impl.ConnectionMeta):
        __slots__ = ()

        @property
        def label(self) -> str:
            return f"<{self.client_id}>"

    registry = impl.Registry(4, record_type=Connection)
    record = registry.add("a", groups=["g"])
    assert type(record) is Connection
    assert isinstance(record, impl.ConnectionMeta)
    assert record.label == "<a>"
    assert record.join("h") is True
    assert record.join("h") is False
    assert registry.groups() == {"g": 1, "h": 1}
    assert record.leave("g") is True
    assert record.leave("g") is False
    assert not hasattr(record, "__dict__")
    with pytest.raises(AttributeError):
        record.colour = "red"
    registry.remove(record)
    for verb in (record.join, record.leave):
        with pytest.raises(DetachedRecord):
            verb("g")
    assert type(registry.add("a")) is Connection
    assert_consistent(registry)


def test_record_type_may_be_the_class_itself_or_a_grandchild(impl: Implementation) -> None:
    assert type(impl.Registry(1, record_type=impl.ConnectionMeta).add("a")) is impl.ConnectionMeta
    assert type(impl.Registry(1, record_type=None).add("a")) is impl.ConnectionMeta
    child = type("Child", (impl.ConnectionMeta,), {"__slots__": ()})
    grandchild = type("Grandchild", (Verbs, child), {"__slots__": ()})
    registry = impl.Registry(1, record_type=grandchild)
    assert type(registry.add("a")) is grandchild
    del registry
    gc.collect()


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="without the GIL, classes may be made immortal by CPython"
)
def test_record_type_is_let_go_with_its_records(impl: Implementation) -> None:
    record_type = type("Record", (impl.ConnectionMeta,), {"__slots__": ()})
    reference = weakref.ref(record_type)
    registry = impl.Registry(1, record_type=record_type)
    for number in range(10):
        registry.add(f"c{number}")
    registry.clear()
    del registry, record_type
    gc.collect()
    assert reference() is None


def test_failed_add_keeps_nothing(registry: Any) -> None:
    registry.add("a")
    before = registry_state(registry)
    thing = Thing()
    reference = weakref.ref(thing)
    fields = {"conn": thing, "session": thing, "metadata": {"k": thing}, "extensions": {"k": thing}}
    for client_id, wrong in (("a", {}), ("b", {"groups": ["g", ""]}), ("b", {"status": 1}), ("a", {"tags": {"": ""}})):
        with pytest.raises((TypeError, ValueError)):
            registry.add(client_id, **fields, **wrong)
    del thing, fields
    gc.collect()
    assert reference() is None
    assert registry_state(registry) == before


def test_clocks_and_owner_are_let_go_with_the_registry(impl: Implementation) -> None:
    class Clock(Thing):
        def __call__(self) -> int:
            return 1

    clock, wall_clock, owner = Clock(), Clock(), Thing()
    references = [weakref.ref(thing) for thing in (clock, wall_clock, owner)]
    registry = impl.Registry(1, clock=clock, wall_clock=wall_clock)
    registry.owner = owner
    record = registry.add("a")
    del clock, wall_clock, owner
    gc.collect()
    assert all(reference() is not None for reference in references)
    del registry
    gc.collect()
    assert references[2]() is None
    assert record.attached is False
    del record
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_empty_registry_in_a_cycle_is_collected(impl: Implementation) -> None:
    registry, owner = impl.Registry(2), Thing()
    registry.owner, owner.registry = owner, registry
    record = registry.add("a", session=owner)
    registry.clear()
    reference = weakref.ref(owner)
    del registry, owner
    gc.collect()
    assert reference() is None
    assert record.attached is False


def test_equal_names_of_records_are_not_needed_to_be_one_object(registry: Any) -> None:
    key = "".join(["client", "-", "1"])
    record = registry.add(key)
    other = "".join(["client", "-", "1"])
    assert key is not other
    assert registry[other] is record
    assert sys.intern(other) in registry
