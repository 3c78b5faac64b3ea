"""Metadata under the engine: sizes, versions, conditions, limits, validators, notifiers, changes of many at once."""

from __future__ import annotations

import array
import asyncio
import collections
import enum
import functools
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pytest

from tests.conftest import Implementation, run_threads
from tests.core.state import DEPARTURES, assert_consistent, record_state, registry_state
from wsfast.connection import MISSING, ConnectionStatus, Snapshot
from wsfast.errors import (
    DetachedRecord,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    MetadataRejected,
    Problem,
    UnknownConnection,
    VersionConflict,
)

CASCADE = "changes of metadata in answer to each other"
NO_STATS = {
    "metadata_changes": 0,
    "metadata_rejected": 0,
    "metadata_conflicts": 0,
    "metadata_notifier_errors": 0,
    "metadata_unannounced": 0,
}


@pytest.fixture
def record(registry: Any) -> Any:
    return registry.add("a")


@pytest.fixture
def engine(impl: Implementation, registry: Any) -> Any:
    return impl.Metadata(registry)


@pytest.fixture
def make(impl: Implementation, registry: Any) -> Callable[..., Any]:
    """Makes an engine with other settings."""
    return functools.partial(impl.Metadata, registry)


def problems_of(call: Callable[[], object]) -> list[tuple[str | None, str]]:
    """Why *call* was rejected."""
    with pytest.raises(MetadataRejected) as caught:
        call()
    assert all(type(problem) is Problem for problem in caught.value.problems)
    return [(problem.key, problem.reason) for problem in caught.value.problems]


def told(change: Any) -> tuple[Any, ...]:
    """A change as plain values."""
    return change.client_id, change.key, change.old, change.new, change.version


# ---- size_of


class Plain:
    """Nothing that is counted."""


@dataclass
class Point:
    x: Any
    y: Any = 0
    name: ClassVar[str] = "not a field" * 99


@dataclass(slots=True)
class Slotted:
    x: Any
    left: Any = field(init=False)


class Struct:
    """What msgspec's structures look like."""

    __struct_fields__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b, self.c = "abc", [1], "not a field"


class Pair(NamedTuple):
    first: Any
    second: Any


class Colour(enum.Enum):
    RED = "red"


class Lying(list[Any]):
    """A list that denies what it holds."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0


class LyingStr(str):
    __slots__ = ()

    def __len__(self) -> int:
        return 0

    def encode(self, *args: object) -> bytes:  # type: ignore[override]
        return b""


class Readings(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __getitem__(self, key: str) -> Any:
        return {"a": "xyz"}[key]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


SIZES: list[tuple[Any, int]] = [
    (None, 1),
    (True, 1),
    (False, 1),
    (0, 8),
    (-1, 8),
    (2**64 - 1, 8),
    (-(2**64) + 1, 8),
    (2**64, 9),
    (-(2**64), 9),
    (2**800, 101),
    (ConnectionStatus.ONLINE, 8),
    (0.0, 8),
    (float("nan"), 8),
    (1j, 16),
    ("", 1),
    ("abc", 3),
    ("é", 2),
    ("字", 3),
    ("😀", 4),
    ("\ud800", 3),
    ("a\ud800b", 5),
    ("a" * 1000 + "é", 1002),
    (LyingStr("abcé"), 5),
    (b"", 1),
    (b"abc", 3),
    (bytearray(5), 5),
    (memoryview(b"abcd"), 4),
    (memoryview(array.array("i", [1, 2, 3])), 12),
    ([], 8),
    ((), 8),
    (set(), 8),
    (frozenset(), 8),
    ({}, 8),
    ([1, "ab", None], 8 + 8 + 2 + 1),
    ((1.5, b"x"), 8 + 8 + 1),
    ({1, 2}, 8 + 16),
    (frozenset(["abc"]), 8 + 3),
    ({"a": "bc", "de": [1]}, 8 + 1 + 2 + 2 + 8 + 8),
    ({(1, 2): None}, 8 + 8 + 16 + 1),
    ([[], [[]]], 8 + 8 + 8 + 8),
    (Pair("ab", 1), 8 + 2 + 8),
    (Lying([1, 2]), 8 + 16),
    (collections.OrderedDict(a="b"), 8 + 1 + 1),
    (collections.defaultdict(list, a="b"), 8 + 1 + 1),
    (types.MappingProxyType({"a": "bc"}), 8 + 1 + 2),
    (Readings(), 8 + 1 + 3),
    (Point("ab"), 8 + 2 + 8),
    (Point([1], {"a": "b"}), 8 + 16 + 10),
    (Slotted("ab"), 8 + 2),
    (Struct(), 8 + 3 + 16),
]


@pytest.mark.parametrize(("value", "size"), SIZES, ids=[f"{number}" for number in range(len(SIZES))])
def test_size(impl: Implementation, value: Any, size: int) -> None:
    assert impl.size_of(value) == size
    assert impl.size_of([value]) == 8 + size
    assert impl.size_of(value, size) == size
    assert impl.size_of([value], 8 + size) == 8 + size
    if size:
        assert impl.size_of(value, size - 1) > size - 1
        assert impl.size_of([value], 7 + size) > 7 + size


@pytest.mark.parametrize(
    "value", [Plain(), object(), Plain, Point, Struct, int, Colour.RED, MISSING, range(9), print, array.array("d", [1])]
)
def test_size_of_anything_else_is_what_the_interpreter_says(impl: Implementation, value: Any) -> None:
    assert impl.size_of(value) == sys.getsizeof(value)


def test_size_that_an_object_says_of_itself_may_be_anything(impl: Implementation, engine: Any, record: Any) -> None:
    class Boaster:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

        def __sizeof__(self) -> int:
            return self.nbytes

    for less in range(0, 120, 4):
        value = [1, Boaster(2**63 - 1 - less)]
        assert impl.size_of(value, 100) > 100
        with pytest.raises(MetadataRejected):
            engine.set(record, "k", value)


def test_size_of_a_record_is_not_that_of_its_fields(impl: Implementation, engine: Any, record: Any) -> None:
    changes: list[Any] = []
    engine.add_notifier(changes.append)
    engine.set(record, "k", record)
    assert impl.size_of(record) == sys.getsizeof(record)
    assert impl.size_of(changes) == 8 + sys.getsizeof(changes[0])


def test_levels_are_counted_up_to_32(impl: Implementation) -> None:
    assert impl.size_of(nested(32)) == 32 * 8
    assert impl.size_of(nested(33)) == -1
    assert impl.size_of([nested(31), nested(31)]) == 8 + 2 * 31 * 8
    assert impl.size_of([nested(31), nested(32)]) == -1
    deep: Any = "leaf"
    for wrap in (lambda value: (value,), lambda value: {"k": value}, lambda value: Point(value, None), lambda v: [v]):
        for _ in range(8):
            deep = wrap(deep)
    assert impl.size_of(deep) > 0
    assert impl.size_of([deep]) == impl.size_of({"k": deep}) == impl.size_of(Point(deep)) == -1


def test_limit_and_depth_end_the_count_whichever_is_met_first(impl: Implementation) -> None:
    assert impl.size_of(nested(33), 32 * 8) == -1
    assert impl.size_of(nested(33), 31 * 8 - 1) > 31 * 8 - 1
    assert impl.size_of(["x" * 100, nested(40)], 50) > 50
    assert impl.size_of([nested(40), "x" * 100], 8 * 33) == -1


def test_cycles_and_shared_references_end(impl: Implementation) -> None:
    itself: list[Any] = []
    itself += [itself, itself]
    assert impl.size_of(itself) == -1
    assert impl.size_of(itself, 100) > 100
    shared: Any = ["x"] * 10
    for _ in range(20):
        shared = [shared] * 10  # 10**21 items
    assert impl.size_of(shared, 16384) > 16384
    leaf = ["abc"]
    assert impl.size_of([leaf, leaf]) == 8 + 2 * 11
    mapping: dict[str, Any] = {}
    mapping["k"] = mapping
    assert impl.size_of(mapping) == -1
    itself.clear()
    mapping.clear()


def test_count_stops_early(impl: Implementation) -> None:
    class Endless(Mapping[int, Any]):
        seen = 0

        def __getitem__(self, key: int) -> Any:
            return "x" * 100

        def __len__(self) -> int:
            return sys.maxsize

        def __iter__(self) -> Iterator[int]:
            for number in range(10_000):
                self.seen += 1
                yield number
            raise AssertionError("it went on")

    endless = Endless()
    assert impl.size_of(endless, 1000) > 1000
    assert endless.seen < 100


def test_exception_of_a_value_comes_through(impl: Implementation, registry: Any, record: Any) -> None:
    class Broken(Readings):
        def __iter__(self) -> Iterator[str]:
            raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        impl.size_of([Broken()])
    with pytest.raises(LookupError, match="broken"):
        impl.Metadata(registry).set(record, "k", Broken())
    assert (record.version, dict(record.metadata)) == (0, {})


# ---- the engine itself


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("max_key_bytes", 1),
        ("max_value_bytes", 1),
        ("max_keys", 0),
        ("max_bytes", 1),
        ("max_cascade", 0),
        ("max_queued", 1),
    ],
)
def test_settings_are_checked(make: Any, name: str, least: int) -> None:
    make(**{name: least})
    with pytest.raises(InvalidSetting) as caught:
        make(**{name: least - 1})
    assert str(caught.value) == f"{name} must be {least} or more, not {least - 1}"
    for value in ("1", 1.0, None):
        with pytest.raises(TypeError) as wrong:
            make(**{name: value})
        assert str(wrong.value) == f"{name} must be int, not {type(value).__name__}"


def test_registry_of_the_engine(impl: Implementation, registry: Any, engine: Any) -> None:
    assert engine.registry is registry
    with pytest.raises(AttributeError):
        engine.registry = registry
    with pytest.raises(TypeError):
        impl.Metadata("registry")
    with pytest.raises(TypeError):
        impl.Metadata(registry, 128)
    assert engine.stats() == NO_STATS


def test_engine_takes_subclasses_with_attributes(impl: Implementation, registry: Any, record: Any) -> None:
    class Engine(impl.Metadata):  # type: ignore[misc, name-defined]
        def __init__(self, registry: Any, colour: str) -> None:
            super().__init__(registry)
            self.colour = colour

    engine = Engine(registry, "red")
    assert engine.colour == "red"
    assert engine.set(record, "k", 1) == 1


def test_key_whose_value_is_rejected_is_left_out_of_the_sum(make: Any, record: Any) -> None:
    engine = make(max_value_bytes=80, max_bytes=100)
    engine.set(record, "a", "x" * 80)
    with pytest.raises(MetadataRejected) as caught:
        engine.update(record, {"a": "x" * 81, "b": "y" * 50})
    assert [(problem.key, problem.reason) for problem in caught.value.problems] == [
        ("a", "the value is over the limit of 80 bytes")
    ]
    with pytest.raises(MetadataRejected) as caught:
        engine.update(record, {"a": "x" * 81, "b": "y" * 50, "c": "z" * 50})
    assert [problem.reason for problem in caught.value.problems] == [
        "the value is over the limit of 80 bytes",
        "more than 100 bytes in all",
    ]


def test_numbers_beyond_64_bits_are_told(impl: Implementation, make: Any) -> None:
    with pytest.raises(OverflowError, match=r"^max_bytes does not fit 64 bits$"):
        make(max_bytes=2**63)
    with pytest.raises(OverflowError, match=r"^limit does not fit 64 bits$"):
        impl.size_of(1, 2**63)
    with pytest.raises(TypeError, match=r"^limit must be int, not str$"):
        impl.size_of(1, "1")


def test_largest_settings_are_no_limit(make: Any, registry: Any, record: Any) -> None:
    names = ("max_key_bytes", "max_value_bytes", "max_keys", "max_bytes", "max_cascade", "max_queued")
    engine = make(**dict.fromkeys(names, 2**63 - 1))
    engine.set(record, "k", "x" * 10_000)
    engine.set(record, "k", "x")
    assert engine.set(record, "k", [0] * 10_000) == record.version == 3
    assert engine.check({"k": "x" * 10_000})


def test_engine_that_was_not_initialised_raises(impl: Implementation, record: Any) -> None:
    class Engine(impl.Metadata):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            pass

    engine = Engine()
    for call in (
        lambda: engine.get("a", "k"),
        lambda: engine.snapshot(record),
        lambda: engine.set("a", "k", 1),
        lambda: engine.update_where({"k": 1}),
        lambda: engine.add_notifier(print),
    ):
        with pytest.raises((AttributeError, TypeError)):
            call()


# ---- version of a record


def test_version_counts_assignments(registry: Any) -> None:
    record = registry.add("a", metadata={"k": 1})
    assert record.version == registry.add("b").version == 0
    for version in (1, 2, 3):
        record.metadata = {"k": version}
        assert record.version == version
    record.metadata = {}
    assert record.version == 4
    with pytest.raises(TypeError):
        record.metadata = None
    assert record.version == 4
    with pytest.raises(AttributeError):
        record.version = 9


@pytest.mark.parametrize("depart", DEPARTURES.values(), ids=DEPARTURES.keys())
def test_version_of_a_detached_record_is_0(registry: Any, depart: Any) -> None:
    record = registry.add("a")
    record.metadata = {"k": 1}
    depart(registry, record)
    assert (record.version, dict(record.metadata)) == (0, {})
    with pytest.raises(DetachedRecord):
        record.metadata = {"k": 2}
    assert record.version == 0
    successor = registry.get("a")
    assert successor is None or successor.version == 0


def test_version_counts_assignments_and_changes_together(engine: Any, record: Any) -> None:
    assert engine.set(record, "a", 1) == 1
    record.metadata = {"b": 2}
    assert engine.set(record, "c", 3) == 3
    assert dict(record.metadata) == {"b": 2, "c": 3}
    assert engine.stats()["metadata_changes"] == 2


# ---- get, snapshot, set, update, replace, delete


@pytest.mark.parametrize("by", ["id", "record"])
def test_round_of_all_changes(engine: Any, record: Any, by: str) -> None:
    target = "a" if by == "id" else record
    assert engine.set(target, "k", 1) == 1
    assert engine.set(target, "k", 1) == 2, "the same value is a change"
    assert engine.update(target, {"k": 2, "l": [3]}) == 3
    assert engine.get(target, "k") == 2
    assert engine.snapshot(target) == (3, {"k": 2, "l": [3]})
    assert engine.replace(target, {"m": None}) == 4
    assert dict(record.metadata) == {"m": None}
    assert engine.get(target, "m", "default") is None
    assert engine.get(target, "k", "default") == "default"
    assert engine.get(target, "k") is None
    assert engine.delete(target, "m") == 5
    assert (record.version, dict(record.metadata)) == (5, {})
    assert engine.stats() == NO_STATS | {"metadata_changes": 5}


def test_snapshot_is_of_one_moment_and_stays(engine: Any, record: Any) -> None:
    first = engine.snapshot(record)
    assert type(first) is Snapshot
    engine.set(record, "k", 1)
    second = engine.snapshot(record)
    engine.set(record, "k", 2)
    assert (first, second) == (Snapshot(0, {}), Snapshot(1, {"k": 1}))
    assert type(second.metadata) is types.MappingProxyType
    assert type(record.metadata) is types.MappingProxyType


def test_former_mapping_is_never_changed(engine: Any, record: Any) -> None:
    record.metadata = {"k": 1}
    before = record.metadata
    engine.set(record, "l", 2)
    engine.delete(record, "k")
    assert dict(before) == {"k": 1}
    assert dict(record.metadata) == {"l": 2}


def test_values_are_kept_as_they_are(engine: Any, record: Any) -> None:
    value = [1]
    engine.set(record, "k", value)
    assert engine.get(record, "k") is value
    assert record.metadata["k"] is value


def test_missing_deletes(engine: Any, record: Any) -> None:
    engine.update(record, {"a": 1, "b": 2, "c": 3})
    assert engine.update(record, {"a": MISSING, "d": 4, "nobody": MISSING}) == 2
    assert dict(record.metadata) == {"b": 2, "c": 3, "d": 4}
    assert engine.set(record, "b", MISSING) == 3
    assert engine.replace(record, {"c": MISSING, "e": 5}) == 4
    assert dict(record.metadata) == {"e": 5}
    assert engine.get(record, "a", MISSING) is MISSING


def test_change_that_changes_nothing_is_no_version(engine: Any, record: Any) -> None:
    heard: list[Any] = []
    engine.add_notifier(heard.append)
    for change in (
        lambda: engine.update(record, {}),
        lambda: engine.update(record, {"k": MISSING}),
        lambda: engine.set(record, "k", MISSING),
        lambda: engine.delete(record, "k"),
        lambda: engine.delete(record, ""),
        lambda: engine.delete(record, "\ud800"),
        lambda: engine.delete(record, "k" * 999),
        lambda: engine.replace(record, {}),
        lambda: engine.replace(record, {"k": MISSING, "": MISSING}),
        lambda: engine.update(record, {}, if_version=0),
    ):
        assert change() == 0
    assert (record.version, heard, engine.stats()) == (0, [], NO_STATS)
    with pytest.raises(VersionConflict):
        engine.update(record, {}, if_version=1)
    with pytest.raises(VersionConflict):
        engine.delete(record, "k", if_version=1)
    assert engine.stats() == NO_STATS | {"metadata_conflicts": 2}


def test_string_that_cannot_be_a_key_is_absent(engine: Any, record: Any) -> None:
    for key in ("", "\ud800", "k" * 129):
        assert engine.get(record, key) is None
        assert engine.get(record, key, "default") == "default"


def test_key_that_others_have_put_there_can_be_read_and_deleted(engine: Any, registry: Any) -> None:
    key = "k" * 200
    record = registry.add("a", metadata={key: 1, "l": 2})
    assert engine.get(record, key) == 1
    assert problems_of(lambda: engine.set(record, key, 2)) == [
        (key, "the key is over the limit of 128 bytes in UTF-8"),
    ]
    assert engine.set(record, "l", 3) == 1
    assert engine.delete(record, key) == 2
    record.metadata = {key: 1}
    assert engine.replace(record, {"l": 2}) == 4
    assert dict(record.metadata) == {"l": 2}


class Name(str):
    """A ``str`` that lies about itself: only its characters count."""

    __slots__ = ()

    def __str__(self) -> str:
        return "a lie"

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a key was compared before it was converted")

    def __hash__(self) -> int:
        raise AssertionError("a key was hashed before it was converted")


class Given(Mapping[Any, Any]):
    """A mapping of any pairs, which may be read once."""

    def __init__(self, *pairs: tuple[Any, Any]) -> None:
        self.pairs = pairs
        self.reads = 0

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("it was read by key")

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("its keys were read alone")

    def items(self) -> Any:
        self.reads += 1
        assert self.reads == 1, "it was read twice"
        return iter(self.pairs)


def test_keys_are_kept_as_exact_str(engine: Any, record: Any) -> None:
    changes: list[Any] = []
    engine.add_notifier(changes.append, key=Name("k"))
    engine.add_validator(lambda key, value: changes.append(type(key)), prefix=Name("k"))
    engine.set(record, Name("k"), 1)
    engine.update(record, Given((Name("l"), 2)))
    assert [type(key) for key in record.metadata] == [str, str]
    assert engine.get(record, Name("l")) == 2
    engine.delete(record, Name("l"))
    assert dict(record.metadata) == {"k": 1}
    kind, change = changes
    assert (kind, type(change.key), type(change.client_id)) == (str, str, str)


def test_changes_are_read_once(engine: Any, record: Any) -> None:
    assert engine.update(record, Given(("k", 1), ("l", 2))) == 1
    assert engine.replace(record, Given(("m", 3))) == 2
    assert engine.update_where(Given(("n", 4))).changed == 1
    assert dict(record.metadata) == {"m": 3, "n": 4}
    assert engine.check(Given(("n", 4))) == {"n": 4}


def test_exception_of_a_mapping_comes_through(engine: Any, record: Any) -> None:
    class Broken(Given):
        def items(self) -> Any:
            yield "k", 1
            raise LookupError("broken")

    for call in (engine.update, engine.replace):
        with pytest.raises(LookupError, match="broken"):
            call(record, Broken())
    with pytest.raises(LookupError, match="broken"):
        engine.update_where(Broken())
    assert (record.version, dict(record.metadata)) == (0, {})


# ---- wrong calls

Call = Callable[[Any, Any], object]
TARGET = "target must be a client id or a ConnectionMeta, not int"
KEY = "metadata key must be str, not int"
VERSION = "if_version must be int or None, not str"
FROM_TARGET: dict[str, Call] = {
    "get": lambda engine, target: engine.get(target, "k"),
    "snapshot": lambda engine, target: engine.snapshot(target),
    "set": lambda engine, target: engine.set(target, "k", 1),
    "set with a version": lambda engine, target: engine.set(target, "k", 1, if_version=7),
    "set of a bad key": lambda engine, target: engine.set(target, "", 1),
    "update": lambda engine, target: engine.update(target, {"k": 1}),
    "replace": lambda engine, target: engine.replace(target, {"k": 1}),
    "delete": lambda engine, target: engine.delete(target, "k"),
}
each_call = pytest.mark.parametrize("call", FROM_TARGET.values(), ids=FROM_TARGET.keys())


@each_call
def test_target_that_is_not_there(impl: Implementation, registry: Any, engine: Any, record: Any, call: Call) -> None:
    gone = registry.add("gone")
    registry.remove(gone)
    other = impl.Registry(1)
    gone_there = other.add("gone there")
    other.clear()
    foreign = other.add("foreign")
    before = registry_state(registry)
    for target, error, text in (
        (5, TypeError, TARGET),
        (None, TypeError, TARGET.replace("int", "NoneType")),
        (b"a", TypeError, TARGET.replace("int", "bytes")),
        ("nobody", UnknownConnection, "no connection 'nobody' is registered"),
        ("", UnknownConnection, "no connection '' is registered"),
        ("\ud800", UnknownConnection, "no connection '\\ud800' is registered"),
        (gone, DetachedRecord, "the record of 'gone' was removed from its registry"),
        (gone_there, DetachedRecord, "the record of 'gone there' was removed from its registry"),
        (foreign, ForeignRecord, "the record of 'foreign' belongs to another registry"),
    ):
        with pytest.raises(error) as caught:
            call(engine, target)
        assert type(caught.value) is error
        assert str(caught.value) == text
    assert registry_state(registry) == before
    assert engine.stats() == NO_STATS


WRONG: list[tuple[Call, str]] = [
    (lambda engine, record: engine.get(record, 5), KEY),
    (lambda engine, record: engine.set(record, 5, 1), KEY),
    (lambda engine, record: engine.set(record, None, 1), KEY.replace("int", "NoneType")),
    (lambda engine, record: engine.delete(record, 5), KEY),
    (lambda engine, record: engine.update(record, {"k": 1, 5: 1}), KEY),
    (lambda engine, record: engine.replace(record, {"k": 1, 5: MISSING}), KEY),
    (lambda engine, record: engine.update_where({"k": 1, 5: 1}), KEY),
    (lambda engine, record: engine.check({"k": 1, 5: 1}), KEY),
    (lambda engine, record: engine.update(record, [("k", 1)]), "changes must be a mapping, not list"),
    (lambda engine, record: engine.update(record, None), "changes must be a mapping, not NoneType"),
    (lambda engine, record: engine.replace(record, [("k", 1)]), "metadata must be a mapping, not list"),
    (lambda engine, record: engine.update_where([("k", 1)]), "changes must be a mapping, not list"),
    (lambda engine, record: engine.check([("k", 1)]), "metadata must be a mapping, not list"),
    (lambda engine, record: engine.set(record, "k", 1, if_version="1"), VERSION),
    (lambda engine, record: engine.set(record, "k", 1, if_version=1.0), VERSION.replace("not str", "not float")),
    (lambda engine, record: engine.update(record, {}, if_version="1"), VERSION),
    (lambda engine, record: engine.replace(record, {}, if_version="1"), VERSION),
    (lambda engine, record: engine.delete(record, "k", if_version="1"), VERSION),
    # The order of the signature, and types before values.
    (lambda engine, record: engine.set(5, 5, 1, if_version="1"), TARGET),
    (lambda engine, record: engine.set(record, 5, 1, if_version="1"), KEY),
    (lambda engine, record: engine.set(record, "", 1, if_version="1"), VERSION),
    (lambda engine, record: engine.update(record, {5: 1}, if_version="1"), KEY),
    (lambda engine, record: engine.update(record, {"": 1, 5: 1}), KEY),
    (lambda engine, record: engine.delete(record, 5, if_version="1"), KEY),
    (lambda engine, record: engine.update_where({5: 1}, to=5, group=5), KEY),
    (lambda engine, record: engine.update_where({"": 1}, to=["a"], group=5), "to= cannot be combined with filters"),
    (lambda engine, record: engine.update_where({"": 1}, group=5), "group name must be str, not int"),
    (
        lambda engine, record: engine.update_where({}, group="g", not_status=1),
        "status must be a ConnectionStatus, not int",
    ),
    (lambda engine, record: engine.update_where({}, to=["a", 5]), "to must hold client ids and records, not int"),
    (lambda engine, record: engine.update_where({}, to=5), "to must hold client ids and records, not int"),
    (lambda engine, record: engine.update_where({}, to="a"), "to must hold client ids and records, not str"),
]


@pytest.mark.parametrize(("call", "text"), WRONG, ids=[f"{number}" for number in range(len(WRONG))])
def test_wrong_type_raises_its_text_and_changes_nothing(
    registry: Any, engine: Any, record: Any, call: Call, text: str
) -> None:
    asked: list[Any] = []
    engine.add_validator(lambda key, value: asked.append(key))
    engine.add_notifier(asked.append)
    before = registry_state(registry)
    with pytest.raises(TypeError) as caught:
        call(engine, record)
    assert str(caught.value) == text
    assert registry_state(registry) == before
    assert (asked, engine.stats()) == ([], NO_STATS)


# ---- if_version


def test_condition_of_a_version(engine: Any, record: Any) -> None:
    assert engine.set(record, "k", 1, if_version=0) == 1
    assert engine.update(record, {"k": 2}, if_version=1) == 2
    assert engine.replace(record, {"k": 3}, if_version=2) == 3
    assert engine.delete(record, "k", if_version=3) == 4
    assert engine.set(record, "k", 1, if_version=None) == 5
    record.metadata = {}
    assert engine.set(record, "k", 1, if_version=6) == 7
    before = record_state(record)
    for expected in (0, 6, 8, -1, 2**63, -(2**70), True):
        with pytest.raises(VersionConflict) as caught:
            engine.set(record, "k", 2, if_version=expected)
        assert (caught.value.client_id, caught.value.expected, caught.value.current) == ("a", expected, 7)
        assert type(caught.value.expected) is int
        assert str(caught.value) == f"the metadata of 'a' is at version 7, not {int(expected)}"
    assert record_state(record) == before
    assert engine.stats() == NO_STATS | {"metadata_changes": 6, "metadata_conflicts": 7}


def test_conflict_comes_before_rejection(engine: Any, record: Any) -> None:
    with pytest.raises(VersionConflict):
        engine.set(record, "", 1, if_version=1)
    with pytest.raises(MetadataRejected):
        engine.set(record, "", 1, if_version=0)
    assert engine.stats() == NO_STATS | {"metadata_rejected": 1, "metadata_conflicts": 1}


# ---- problems of keys and values


def test_problems_of_keys(make: Any, record: Any) -> None:
    engine = make(max_key_bytes=5)
    assert engine.update(record, {"abcde": 1, "éé": 1, "字": 1}) == 1
    for key, reason in (
        ("", "the key is empty"),
        ("abcdef", "the key is over the limit of 5 bytes in UTF-8"),
        ("ééé", "the key is over the limit of 5 bytes in UTF-8"),
        ("\ud800", "the key holds a lone surrogate, so it has no UTF-8 form"),
        ("\ud800" + "a" * 99, "the key holds a lone surrogate, so it has no UTF-8 form"),
    ):
        for call in (
            lambda key=key: engine.set(record, key, 1),
            lambda key=key: engine.set(record, key, MISSING),
            lambda key=key: engine.update(record, {key: 1}),
            lambda key=key: engine.replace(record, {key: 1}),
            lambda key=key: engine.update_where({key: 1}),
            lambda key=key: engine.check({key: 1}),
        ):
            assert problems_of(call) == [(key, reason)]
    assert record.version == 1
    assert engine.stats() == NO_STATS | {"metadata_changes": 1, "metadata_rejected": 30}


def test_key_limit_is_no_more_than_the_registry_holds(impl: Implementation) -> None:
    registry = impl.Registry(1, max_name_bytes=7)
    record = registry.add("a")
    engine = impl.Metadata(registry)
    assert engine.set(record, "k" * 7, 1) == 1
    assert problems_of(lambda: engine.set(record, "k" * 8, 1)) == [
        ("k" * 8, "the key is over the limit of 7 bytes in UTF-8")
    ]


def test_value_may_be_as_large_as_the_limit(make: Any, record: Any) -> None:
    engine = make(max_value_bytes=20)
    text = "the value is over the limit of 20 bytes"
    for fitting, larger in (
        ("x" * 20, "x" * 21),
        ([1, "abcd"], [1, "abcde"]),
        (2**159, 2**160),
        (b"x" * 20, b"x" * 21),
    ):
        engine.set(record, "k", fitting)
        assert problems_of(lambda larger=larger: engine.set(record, "k", larger)) == [("k", text)]
        assert record.metadata["k"] == fitting


def test_value_may_be_nested_32_levels(engine: Any, record: Any) -> None:
    assert engine.set(record, "k", nested(32)) == 1
    assert problems_of(lambda: engine.set(record, "k", nested(33))) == [
        ("k", "the value is nested more than 32 levels deep")
    ]


def test_default_limits(engine: Any, record: Any) -> None:
    engine.set(record, "k" * 128, "x" * 16384)
    assert problems_of(lambda: engine.set(record, "k", "x" * 16385)) == [
        ("k", "the value is over the limit of 16384 bytes")
    ]
    assert problems_of(lambda: engine.update(record, {f"k{number}": 1 for number in range(64)})) == [
        (None, "more than 64 keys")
    ]
    assert engine.update(record, {f"k{number}": 1 for number in range(63)}) == 2
    assert problems_of(lambda: engine.replace(record, {f"{number}": "x" * 16384 for number in range(4)})) == [
        (None, "more than 65536 bytes in all")
    ]


def test_most_keys(make: Any, record: Any) -> None:
    engine = make(max_keys=3)
    engine.update(record, {"a": 1, "b": 1, "c": 1})
    text = [(None, "more than 3 keys")]
    assert problems_of(lambda: engine.set(record, "d", 1)) == text
    assert problems_of(lambda: engine.update(record, {"a": MISSING, "d": 1, "e": 1})) == text
    assert problems_of(lambda: engine.replace(record, dict.fromkeys("wxyz", 1))) == text
    assert problems_of(lambda: engine.check(dict.fromkeys("wxyz", 1))) == text
    assert dict(record.metadata) == {"a": 1, "b": 1, "c": 1}
    assert engine.update(record, {"d": 1, "a": MISSING, "c": 2}) == 2
    assert engine.replace(record, dict.fromkeys("xyz", 1)) == 3


def test_limit_of_0_forbids_keys(make: Any, record: Any) -> None:
    engine = make(max_keys=0)
    assert problems_of(lambda: engine.set(record, "k", 1)) == [(None, "more than 0 keys")]
    assert engine.update(record, {}) == 0
    assert engine.check({}) == {}


def test_most_bytes(make: Any, record: Any) -> None:
    engine = make(max_bytes=30)
    text = [(None, "more than 30 bytes in all")]
    engine.update(record, {"a": "x" * 9, "é": 1})  # 1 + 9, 2 + 8
    assert problems_of(lambda: engine.set(record, "b", "x" * 10)) == text
    assert engine.set(record, "b", "x" * 9) == 2
    assert problems_of(lambda: engine.set(record, "a", "x" * 10)) == text
    assert engine.set(record, "a", "y" * 9) == 3
    assert problems_of(lambda: engine.update(record, {"é": MISSING, "c": "x" * 10})) == text
    assert engine.update(record, {"é": MISSING, "c": "x" * 9}) == 4
    assert problems_of(lambda: engine.replace(record, {"a": "x" * 30})) == text
    assert problems_of(lambda: engine.check({"a": "x" * 30})) == text
    assert engine.replace(record, {"a": "x" * 29}) == 5
    assert engine.delete(record, "a") == 6
    assert engine.set(record, "a", "x" * 29) == 7


def test_what_others_have_put_there_counts_but_may_stay(make: Any, registry: Any) -> None:
    engine = make(max_keys=2, max_bytes=30)
    record = registry.add("a", metadata={"a": "x" * 20, "b": "x" * 20, "c": "x" * 20})
    assert problems_of(lambda: engine.set(record, "d", 1)) == [
        (None, "more than 2 keys"),
        (None, "more than 30 bytes in all"),
    ]
    assert problems_of(lambda: engine.set(record, "a", "x" * 21)) == [(None, "more than 30 bytes in all")]
    assert engine.set(record, "a", "y" * 20) == 1
    assert engine.set(record, "a", "") == 2
    assert engine.update(record, {"b": MISSING, "d": ""}) == 3
    assert problems_of(lambda: engine.set(record, "e", "")) == [(None, "more than 2 keys")]
    assert engine.delete(record, "d") == 4
    record.metadata = {"a": "x" * 99}
    assert problems_of(lambda: engine.set(record, "b", "")) == [(None, "more than 30 bytes in all")]
    assert engine.set(record, "a", 1) == 6


def test_value_of_others_that_cannot_be_counted_counts_as_too_large(make: Any, registry: Any) -> None:
    engine = make(max_bytes=300)
    itself: list[Any] = []
    itself += [itself, itself]
    record = registry.add("a", metadata={"a": nested(33), "b": itself})
    assert problems_of(lambda: engine.set(record, "c", 1)) == [(None, "more than 300 bytes in all")]
    assert engine.delete(record, "a") == 1
    assert problems_of(lambda: engine.set(record, "c", 1)) == [(None, "more than 300 bytes in all")]
    assert engine.set(record, "b", "x" * 299) == 2
    itself.clear()


def test_all_problems_at_once_and_in_order(make: Any, record: Any) -> None:
    engine = make(max_key_bytes=5, max_value_bytes=300, max_keys=4, max_bytes=320)
    first, second = ValueError("first"), LookupError("second")
    engine.add_validator(raising(first), key="v")
    engine.add_validator(raising(second), key="v")
    engine.set(record, "old", 1)
    changes = {
        "": 1,
        "v": 1,
        "large": "x" * 301,
        "abcdef": 1,
        "deep": nested(33),
        "\ud800": 1,
        "fine": "x" * 299,
        "gone": MISSING,
    }
    with pytest.raises(MetadataRejected) as caught:
        engine.update(record, changes)
    assert caught.value.problems == (
        Problem("", "the key is empty"),
        Problem("v", "first", first),
        Problem("v", "second", second),
        Problem("large", "the value is over the limit of 300 bytes"),
        Problem("abcdef", "the key is over the limit of 5 bytes in UTF-8"),
        Problem("deep", "the value is nested more than 32 levels deep"),
        Problem("\ud800", "the key holds a lone surrogate, so it has no UTF-8 form"),
        Problem(None, "more than 4 keys"),
    )
    assert dict(record.metadata) == {"old": 1}
    # With 11 of "old", 303 of "fine" and 9 of "small", what has a problem left out.
    more = changes | {"small": 1}
    assert problems_of(lambda: engine.update(record, more))[-2:] == [
        (None, "more than 4 keys"),
        (None, "more than 320 bytes in all"),
    ]
    assert engine.stats() == NO_STATS | {"metadata_changes": 1, "metadata_rejected": 2}


def test_nothing_of_a_rejected_change_is_made(engine: Any, record: Any) -> None:
    heard: list[Any] = []
    engine.add_notifier(heard.append)
    engine.update(record, {"a": 1, "b": 2})
    heard.clear()
    before = record_state(record)
    for call in (engine.update, engine.replace):
        with pytest.raises(MetadataRejected):
            call(record, {"a": MISSING, "b": 3, "c": 4, "": 5})
    assert (record_state(record), heard) == (before, [])


# ---- check


def test_check_tells_what_metadata_becomes(engine: Any, registry: Any) -> None:
    engine.add_validator(lambda key, value: value.strip(), key="name")
    heard: list[Any] = []
    engine.add_notifier(heard.append)
    given = {"name": " ann ", "k": 1, "gone": MISSING, "": MISSING}
    checked = engine.check(given)
    assert checked == {"name": "ann", "k": 1}
    assert type(checked) is dict
    assert given["name"] == " ann "
    assert engine.check(None) is None
    assert engine.check({}) == {}
    assert registry.add("a", metadata=checked).version == 0
    assert problems_of(lambda: engine.check({"": 1})) == [("", "the key is empty")]
    assert (heard, engine.stats()) == ([], NO_STATS | {"metadata_rejected": 1})


# ---- validators


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: object) -> None:
        raise error

    return raise_it


def test_validators_are_asked_in_order_and_replace_the_value(engine: Any, record: Any) -> None:
    asked: list[Any] = []

    def note(name: str, result: Any = None) -> Callable[[str, Any], Any]:
        return lambda key, value: asked.append((name, key, value)) or result

    engine.add_validator(note("all", "A"))
    engine.add_validator(note("prefix", None), prefix="us")
    engine.add_validator(note("key", "K"), key="user")
    engine.add_validator(note("other"), key="use")
    engine.add_validator(note("all again"))
    engine.add_validator(note("long prefix"), prefix="user")
    engine.add_validator(note("longer prefix"), prefix="user.")
    engine.set(record, "user", "given")
    assert asked == [
        ("all", "user", "given"),
        ("prefix", "user", "A"),
        ("key", "user", "A"),
        ("all again", "user", "K"),
        ("long prefix", "user", "K"),
    ]
    assert engine.get(record, "user") == "K"


def test_keys_are_validated_in_the_order_of_the_changes(engine: Any, record: Any) -> None:
    asked: list[str] = []
    engine.add_validator(lambda key, value: asked.append(key))
    engine.update(record, {"c": 1, "a": 2, "gone": MISSING, "b": 3})
    engine.replace(record, {"z": 1, "y": MISSING, "x": 2})
    engine.delete(record, "z")
    engine.set(record, "x", MISSING)
    assert asked == ["c", "a", "b", "z", "x"]


def test_none_is_validated_and_leaves_none(engine: Any, record: Any) -> None:
    asked: list[Any] = []
    engine.add_validator(lambda key, value: asked.append(value))
    engine.set(record, "k", None)
    assert (asked, dict(record.metadata)) == ([None], {"k": None})


def test_size_is_that_of_what_the_validators_made_of_it(make: Any, record: Any) -> None:
    engine = make(max_value_bytes=10)
    engine.add_validator(lambda key, value: value[:10], key="cut")
    engine.add_validator(lambda key, value: value * 10, key="grown")
    assert engine.set(record, "cut", "x" * 99) == 1
    assert problems_of(lambda: engine.set(record, "grown", "xx")) == [
        ("grown", "the value is over the limit of 10 bytes")
    ]


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise LookupError


def test_validators_that_raise_are_all_reported(engine: Any, record: Any) -> None:
    asked: list[Any] = []
    errors = [ValueError("too short"), ValueError(), Unspeakable(), ValueError("no")]
    engine.add_validator(lambda key, value: value + "!")
    engine.add_validator(raising(errors[0]))
    engine.add_validator(lambda key, value: asked.append(value) or f"{value}?")
    for error in errors[1:]:
        engine.add_validator(raising(error))
    engine.add_validator(lambda key, value: asked.append(value))
    with pytest.raises(MetadataRejected) as caught:
        engine.set(record, "k", "x")
    assert [(problem.key, problem.reason) for problem in caught.value.problems] == [
        ("k", "too short"),
        ("k", "ValueError"),
        ("k", "Unspeakable"),
        ("k", "no"),
    ]
    assert [problem.error for problem in caught.value.problems] == errors
    assert asked == ["x!", "x!?"]
    assert str(caught.value).startswith("metadata rejected: 'k': too short; 'k': ValueError; ")


def test_last_word_keeps_the_others_from_being_asked(engine: Any, record: Any) -> None:
    asked: list[str] = []
    engine.add_validator(raising(ValueError("before")), key="k")
    engine.add_validator(lambda key, value: asked.append(f"early {key}"), is_last_word=True)
    engine.add_validator(raising(ValueError("last")), key="k", is_last_word=True)
    engine.add_validator(lambda key, value: asked.append(f"late {key}"))
    assert problems_of(lambda: engine.update(record, {"k": 1, "l": 2})) == [("k", "before"), ("k", "last")]
    assert asked == ["early k", "early l", "late l"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, BaseException])
def test_other_exceptions_of_a_validator_come_through_at_once(
    engine: Any, record: Any, kind: type[BaseException]
) -> None:
    error = kind("base")
    asked: list[str] = []
    engine.add_validator(raising(ValueError("first")))
    engine.add_validator(raising(error), key="k")
    engine.add_validator(lambda key, value: asked.append(key))
    with pytest.raises(kind) as caught:
        engine.update(record, {"k": 1, "l": 2})
    assert caught.value is error
    assert (asked, record.version, engine.stats()) == ([], 0, NO_STATS)


def test_validator_may_make_a_deletion_of_it(engine: Any, record: Any) -> None:
    asked: list[Any] = []
    engine.add_validator(lambda key, value: MISSING if value == "" else None)
    engine.add_validator(lambda key, value: asked.append(value))
    engine.update(record, {"a": 1, "b": 2, "c": 3})
    asked.clear()
    assert engine.set(record, "a", "") == 2
    assert engine.update(record, {"nobody": ""}) == 2
    assert dict(record.metadata) == {"b": 2, "c": 3}
    assert engine.replace(record, {"b": "", "d": 4}) == 3
    assert dict(record.metadata) == {"d": 4}
    assert engine.check({"a": "", "b": 1}) == {"b": 1}
    assert asked == [4, 1]


def test_validator_may_be_taken_out_again(engine: Any, record: Any) -> None:
    def refuse(key: str, value: Any) -> None:
        raise ValueError("no")

    removals = [engine.add_validator(refuse, key="k"), engine.add_validator(refuse, key="k")]
    assert len(problems_of(lambda: engine.set(record, "k", 1))) == 2
    assert removals[0]() is None
    removals[0]()
    assert len(problems_of(lambda: engine.set(record, "k", 1))) == 1
    removals[1]()
    assert engine.set(record, "k", 1) == 1
    engine.add_validator(refuse)
    removals[0]()
    assert len(problems_of(lambda: engine.set(record, "k", 1))) == 1


def test_what_is_there_already_is_not_validated(engine: Any, record: Any) -> None:
    engine.set(record, "k", 1)
    engine.add_validator(raising(ValueError("no")), key="k")
    assert engine.set(record, "l", 1) == 2
    assert engine.delete(record, "k") == 3


@pytest.mark.parametrize("depart", DEPARTURES.values(), ids=DEPARTURES.keys())
def test_validator_may_remove_the_connection(registry: Any, engine: Any, record: Any, depart: Any) -> None:
    engine.set(record, "k", 1)

    def remove(key: str, value: Any) -> None:
        if record.attached:
            depart(registry, record)
        raise ValueError("and reject")

    engine.add_validator(remove, key="k")
    for if_version in (None, 7):
        with pytest.raises(DetachedRecord):
            engine.set(record, "k", 2, if_version=if_version)
    assert (record.version, dict(record.metadata)) == (0, {})
    successor = registry.get("a")
    assert successor is None or (successor.version, dict(successor.metadata)) == (0, {})
    assert_consistent(registry)


def test_validator_may_write_itself(engine: Any, record: Any) -> None:
    heard: list[Any] = []
    engine.add_notifier(lambda change: heard.append(told(change)[1:]))
    engine.add_validator(lambda key, value: engine.set(record, "log", key) and None, key="k")
    assert engine.set(record, "k", 1) == 2
    assert dict(record.metadata) == {"log": "k", "k": 1}
    assert heard == [("log", MISSING, "k", 1), ("k", MISSING, 1, 2)]
    with pytest.raises(VersionConflict) as caught:
        engine.set(record, "k", 2, if_version=2)
    assert (caught.value.expected, caught.value.current) == (2, 3)
    assert engine.replace(record, {"k": 3}) == 5
    assert dict(record.metadata) == {"k": 3}, "what the validator wrote was there before"


def test_hooks_are_checked(engine: Any) -> None:
    async def later(*args: object) -> None: ...

    class Later:
        async def __call__(self, *args: object) -> None: ...

    for add, what in ((engine.add_validator, "validator"), (engine.add_notifier, "notifier")):
        for arguments, error, text in (
            (((5,), {}), TypeError, f"{what} must be callable, not int"),
            (((print,), {"key": "a", "prefix": "b"}), TypeError, "key= cannot be combined with prefix="),
            (((print,), {"key": 5}), TypeError, "metadata key must be str, not int"),
            (((print,), {"prefix": 5}), TypeError, "metadata key prefix must be str, not int"),
            (((print,), {"key": ""}), InvalidName, "metadata key is empty"),
            (((print,), {"prefix": ""}), InvalidName, "metadata key prefix is empty"),
            (
                ((print,), {"key": "k" * 129}),
                InvalidName,
                "metadata key is over the limit of 128 bytes in UTF-8",
            ),
            (
                ((print,), {"prefix": "\ud800"}),
                InvalidName,
                "metadata key prefix holds a lone surrogate, so it has no UTF-8 form",
            ),
        ):
            args, kwargs = arguments
            with pytest.raises(error) as caught:
                add(*args, **kwargs)
            assert type(caught.value) is error
            assert str(caught.value) == text
    for function in (later, Later(), functools.partial(later, 1)):
        with pytest.raises(TypeError, match=r"^validator must not be async$"):
            engine.add_validator(function)
        with pytest.raises(TypeError, match=r"^an async notifier needs an event loop$"):
            engine.add_notifier(function)


def test_more_keys_than_are_remembered(engine: Any, record: Any) -> None:
    heard: list[str] = []
    engine.add_notifier(lambda change: heard.append(change.key), prefix="k")
    engine.add_validator(lambda key, value: value + 1, prefix="k")
    for number in range(5000):
        engine.replace(record, {f"k{number}": number, f"l{number}": number})
    assert dict(record.metadata) == {"k4999": 5000, "l4999": 4999}
    assert len(heard) == 2 * 5000 - 1


# ---- notifiers


def test_change_says_what_happened(impl: Implementation, engine: Any, registry: Any, record: Any) -> None:
    heard: list[Any] = []
    engine.add_notifier(heard.append)
    engine.set(record, "k", "secret")
    engine.set(record, "k", "other")
    engine.delete("a", "k")
    assert [told(change) for change in heard] == [
        ("a", "k", MISSING, "secret", 1),
        ("a", "k", "secret", "other", 2),
        ("a", "k", "other", MISSING, 3),
    ]
    assert all(type(change) is impl.Change and change.conn is record for change in heard)
    for name in ("conn", "client_id", "key", "old", "new", "version"):
        with pytest.raises(AttributeError):
            setattr(heard[0], name, 1)
    assert "secret" not in repr(heard[1])
    engine.set(record, "k", "secret")
    assert heard[0] != heard[3]
    assert len(set(heard)) == 4
    registry.remove(record)
    assert (heard[0].client_id, heard[0].conn, heard[0].new) == ("a", record, "secret")


def test_notifiers_are_called_by_key_and_then_as_they_were_added(engine: Any, record: Any) -> None:
    heard: list[Any] = []

    def note(name: str) -> Callable[[Any], None]:
        return lambda change: heard.append((name, change.key, change.version))

    engine.add_notifier(note("all"))
    engine.add_notifier(note("key"), key="b")
    engine.add_notifier(note("prefix"), prefix="a")
    engine.add_notifier(note("last"))
    engine.update(record, {"b": 1, "aa": 2, "gone": MISSING})
    assert heard == [
        ("all", "b", 1),
        ("key", "b", 1),
        ("last", "b", 1),
        ("all", "aa", 1),
        ("prefix", "aa", 1),
        ("last", "aa", 1),
    ]


def test_replace_announces_what_it_deletes_behind_the_rest(engine: Any, record: Any) -> None:
    heard: list[Any] = []
    engine.update(record, {"x": 1, "a": 1, "y": 2, "b": 3})
    engine.add_notifier(lambda change: heard.append(told(change)[1:4]))
    engine.replace(record, {"n": 1, "y": MISSING, "a": 1})
    assert heard == [
        ("n", MISSING, 1),
        ("a", 1, 1),
        ("x", 1, MISSING),
        ("y", 2, MISSING),
        ("b", 3, MISSING),
    ]


def test_notifier_sees_the_change_made(engine: Any, record: Any) -> None:
    seen: list[Any] = []
    engine.add_notifier(lambda change: seen.append((record.version, dict(record.metadata))))
    engine.update(record, {"a": 1, "b": 2})
    assert seen == [(1, {"a": 1, "b": 2})] * 2


def test_assignments_and_additions_are_not_announced(registry: Any, engine: Any, record: Any) -> None:
    heard: list[Any] = []
    engine.add_notifier(heard.append)
    record.metadata = {"k": 1}
    registry.add("b", metadata={"k": 1})
    assert (heard, engine.stats()) == ([], NO_STATS)


def test_notifier_may_be_taken_out_again(engine: Any, record: Any) -> None:
    heard: list[Any] = []
    first = engine.add_notifier(heard.append)
    second = engine.add_notifier(heard.append, key="k")
    engine.set(record, "k", 1)
    assert len(heard) == 2
    assert first() is None
    first()
    engine.set(record, "k", 2)
    engine.set(record, "l", 2)
    assert len(heard) == 3
    second()
    engine.set(record, "k", 3)
    assert len(heard) == 3


def test_exception_of_a_notifier_concerns_nobody_else(impl: Implementation, registry: Any, record: Any) -> None:
    failures: list[Any] = []

    class Engine(impl.Metadata):  # type: ignore[misc, name-defined]
        def failed(self, notifier: Any, change: Any) -> None:
            failures.append((notifier, change.key, sys.exc_info()[1]))

    engine, heard, error = Engine(registry), [], LookupError("broken")
    broken = raising(error)
    engine.add_notifier(broken, key="k")
    engine.add_notifier(heard.append)
    assert engine.update(record, {"k": 1, "l": 2}) == 1
    assert [change.key for change in heard] == ["k", "l"]
    assert failures == [(broken, "k", error)]
    assert engine.stats() == NO_STATS | {"metadata_changes": 1, "metadata_notifier_errors": 1}
    plain = impl.Metadata(registry)
    plain.add_notifier(broken)
    assert plain.set(record, "k", 2) == 2
    assert plain.stats()["metadata_notifier_errors"] == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, BaseException])
def test_other_exceptions_of_a_notifier_come_through(engine: Any, record: Any, kind: type[BaseException]) -> None:
    error = kind("base")
    heard: list[Any] = []

    def answer(change: Any) -> None:
        if change.new == 1:
            engine.set(record, "k", 2)
            raise error

    engine.add_notifier(answer)
    engine.add_notifier(lambda change: heard.append(change.new))
    with pytest.raises(kind) as caught:
        engine.set(record, "k", 1)
    assert caught.value is error
    assert (record.version, engine.get(record, "k"), heard) == (2, 2, [])
    engine.announce()
    assert heard == [2]
    engine.announce()
    engine.set(record, "k", 3)
    assert heard == [2, 3]
    assert engine.stats()["metadata_notifier_errors"] == 0


def test_what_waits_behind_an_interruption_is_announced_with_the_next_change(engine: Any, record: Any) -> None:
    heard: list[Any] = []

    def answer(change: Any) -> None:
        if change.new == 1:
            engine.set(record, "k", 2)
            raise KeyboardInterrupt

    engine.add_notifier(answer)
    engine.add_notifier(lambda change: heard.append(change.version))
    with pytest.raises(KeyboardInterrupt):
        engine.set(record, "k", 1)
    engine.set(record, "k", 3)
    assert heard == [2, 3]


def frames() -> int:
    """How deep the stack is."""
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return depth


def test_change_inside_an_announcement_waits_for_its_turn(engine: Any, record: Any) -> None:
    heard: list[Any] = []

    def answer(change: Any) -> None:
        if change.key == "ask":
            assert engine.set(record, "answer", change.new) == change.version + 1
            assert engine.get(record, "answer") == change.new
            heard.append("answered")

    engine.add_notifier(answer)
    engine.add_notifier(lambda change: heard.append((change.key, change.version)))
    engine.set(record, "ask", 1)
    engine.update(record, {"x": 1, "ask": 2})
    assert heard == [
        "answered",
        ("ask", 1),
        ("answer", 2),
        ("x", 3),
        "answered",
        ("ask", 3),
        ("answer", 4),
    ]


@pytest.mark.parametrize("most", [0, 1, 5, 16])
def test_endless_answer_ends_and_the_stack_does_not_grow(make: Any, record: Any, most: int) -> None:
    engine = make(max_cascade=most)
    depths: list[int] = []
    raised: list[Exception] = []

    def answer(change: Any) -> None:
        depths.append(frames())
        try:
            engine.set(record, "k", change.new + 1)
        except LimitExceeded as error:
            raised.append(error)
            raise

    engine.add_notifier(answer)
    for start in (0, 1000):
        engine.set(record, "k", start)
        assert engine.get(record, "k") == start + most
    assert len(depths) == 2 * (most + 1)
    assert set(depths) == {depths[0]}
    assert [(type(error), error.what, error.limit) for error in raised] == [(LimitExceeded, CASCADE, most)] * 2
    assert str(raised[0]) == f"too many {CASCADE}: the limit is {most}"
    assert engine.stats() == NO_STATS | {"metadata_changes": 2 * (most + 1), "metadata_notifier_errors": 2}


def test_every_kind_of_change_may_be_one_too_many(make: Any, record: Any) -> None:
    engine = make(max_cascade=0)
    engine.set(record, "old", 1)
    calls = [
        lambda: engine.set(record, "l", 1),
        lambda: engine.update(record, {"l": 1}),
        lambda: engine.replace(record, {"l": 1}),
        lambda: engine.delete(record, "old"),
        lambda: engine.update_where({"l": 1}),
    ]
    refused: list[str] = []

    def answer(change: Any) -> None:
        for call in calls:
            with pytest.raises(LimitExceeded) as caught:
                call()
            refused.append(caught.value.what)
        assert engine.get(record, "k") == 1
        assert engine.snapshot(record).version == 2
        assert engine.check({"l": 1}) == {"l": 1}

    engine.add_notifier(answer)
    engine.set(record, "k", 1)
    assert refused == [CASCADE] * 5
    assert (record.version, engine.stats()["metadata_notifier_errors"]) == (2, 0)


def test_many_answers_side_by_side_are_no_cascade(make: Any, record: Any) -> None:
    engine = make(max_cascade=1)

    def answer(change: Any) -> None:
        if change.key == "ask":
            for number in range(50):
                engine.set(record, "answer", number)

    engine.add_notifier(answer)
    assert engine.set(record, "ask", 1) == 1
    assert (record.version, engine.stats()["metadata_notifier_errors"]) == (51, 0)


def test_two_engines_cannot_answer_each_other_for_ever(impl: Implementation) -> None:
    engines = [impl.Metadata(impl.Registry(1)) for _ in range(2)]
    for engine in engines:
        engine.registry.add("a")
    for engine, other in (engines, engines[::-1]):
        engine.add_notifier(lambda change, other=other: other.set("a", "k", change.new + 1))
    engines[0].set("a", "k", 0)
    assert sorted(engine.get("a", "k") for engine in engines) == [15, 16]
    assert sum(engine.stats()["metadata_notifier_errors"] for engine in engines) == 1


@pytest.mark.parametrize("depart", DEPARTURES.values(), ids=DEPARTURES.keys())
def test_notifier_may_remove_the_connection(registry: Any, engine: Any, record: Any, depart: Any) -> None:
    heard: list[Any] = []
    engine.add_notifier(lambda change: depart(registry, record) if record.attached else None)
    engine.add_notifier(lambda change: heard.append((change.key, change.conn.attached)))
    assert engine.update(record, {"k": 1, "l": 2}) == 1
    assert heard == [("k", False), ("l", False)]
    assert not record.attached
    assert engine.stats()["metadata_notifier_errors"] == 0
    assert_consistent(registry)


def test_notifier_may_add_and_remove_notifiers(engine: Any, record: Any) -> None:
    heard: list[Any] = []
    removals: list[Any] = []

    def once(change: Any) -> None:
        heard.append("once")
        removals[0]()
        engine.add_notifier(lambda change: heard.append("late"))

    removals.append(engine.add_notifier(once, key="k"))
    engine.set(record, "k", 1)
    del heard[1:]
    engine.set(record, "k", 2)
    assert heard == ["once", "late"]


def test_notifiers_are_those_at_the_time_of_the_announcement(make: Any, record: Any) -> None:
    engine = make()
    heard: list[Any] = []
    engine.run_on(threading.get_ident(), lambda: None)
    engine.add_notifier(lambda change: heard.append(("stays", change.version)))
    remove = engine.add_notifier(lambda change: heard.append(("gone", change.version)), key="k")
    run_threads(lambda: engine.set(record, "k", 1))
    remove()
    engine.add_notifier(lambda change: heard.append(("new", change.version)), prefix="k")
    engine.announce()
    assert heard == [("stays", 1), ("new", 1)]


# ---- publish and wants


def test_changes_of_a_version_are_published_together(make: Any, record: Any) -> None:
    heard: list[Any] = []
    engine = make(publish=lambda changes: heard.append([told(change)[1:] for change in changes]))
    engine.add_notifier(lambda change: heard.append(change.key))
    engine.update(record, {"b": 1, "a": 2})
    engine.delete(record, "nobody")
    engine.delete(record, "a")
    assert heard == [
        "b",
        "a",
        [("b", MISSING, 1, 1), ("a", MISSING, 2, 1)],
        "a",
        [("a", 2, MISSING, 2)],
    ]


def test_publish_gets_a_tuple_of_the_changes_that_the_notifiers_got(make: Any, record: Any) -> None:
    published: list[Any] = []
    notified: list[Any] = []
    engine = make(publish=published.append)
    engine.add_notifier(notified.append)
    engine.update(record, {"b": 1, "a": 2})
    assert type(published[0]) is tuple
    assert published == [tuple(notified)]


def test_nothing_is_published_that_nobody_wants(make: Any, record: Any) -> None:
    wanted, asked, published = [False], [], []
    engine = make(wants=lambda: asked.append(1) or wanted[0], publish=published.append)
    engine.set(record, "k", 1)
    assert (len(asked), published) == (1, [])
    wanted[0] = True
    engine.update(record, {"k": 2, "l": 3})
    assert (len(asked), len(published)) == (2, 1)
    for number in range(5):
        record.registry.add(f"c{number}")
    engine.update_where({"k": 3})
    assert (len(asked), len(published)) == (3, 7)
    make(wants=lambda: True).set(record, "k", 4)


def test_exception_of_publish_is_counted(impl: Implementation, registry: Any, record: Any) -> None:
    failures: list[Any] = []

    class Engine(impl.Metadata):  # type: ignore[misc, name-defined]
        def failed(self, notifier: Any, change: Any) -> None:
            failures.append((notifier, change.key))

    broken = raising(LookupError())
    engine = Engine(registry, publish=broken)
    assert engine.update(record, {"k": 1, "l": 2}) == 1
    assert failures == [(broken, "k")]
    assert engine.stats()["metadata_notifier_errors"] == 1


def test_change_inside_publish_is_an_answer(make: Any, record: Any) -> None:
    published: list[int] = []

    def publish(changes: Any) -> None:
        published.append(changes[0].version)
        engine.set(record, "k", 1)

    engine = make(publish=publish, max_cascade=3)
    engine.set(record, "k", 0)
    assert published == [1, 2, 3, 4]
    assert engine.stats()["metadata_notifier_errors"] == 1


# ---- async notifiers


class Loop:
    """Runs async notifiers one after the other, as a manager does."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.get_running_loop().create_task(self.work())

    def later(self, call: Any, change: Any) -> None:
        self.calls.put_nowait((call, change))

    async def work(self) -> None:
        while True:
            call, change = await self.calls.get()
            try:
                await call(change)
            finally:
                self.calls.task_done()

    async def close(self) -> None:
        await self.calls.join()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_async_notifiers_run_later_in_order(make: Any, record: Any) -> None:
    loop, heard = Loop(), []

    async def slow(change: Any) -> None:
        await asyncio.sleep(0)
        heard.append(("slow", change.version))

    class Quick:
        async def __call__(self, change: Any) -> None:
            heard.append(("quick", change.version))

    engine = make(later=loop.later)
    engine.add_notifier(slow)
    engine.add_notifier(lambda change: heard.append(("plain", change.version)))
    engine.add_notifier(Quick(), key="k")
    remove = engine.add_notifier(functools.partial(slow), key="nobody")
    remove()
    engine.set(record, "k", 1)
    engine.set(record, "k", 2)
    assert heard == [("plain", 1), ("plain", 2)]
    await loop.close()
    assert heard[2:] == [("slow", 1), ("quick", 1), ("slow", 2), ("quick", 2)]


async def test_exceptions_of_async_notifiers_are_counted(impl: Implementation, registry: Any, record: Any) -> None:
    failures: list[Any] = []

    class Engine(impl.Metadata):  # type: ignore[misc, name-defined]
        def failed(self, notifier: Any, change: Any) -> None:
            failures.append((notifier, change.key, sys.exc_info()[1]))

    loop, error = Loop(), LookupError("broken")

    async def broken(change: Any) -> None:
        await asyncio.sleep(0)
        raise error

    engine = Engine(registry, later=loop.later)
    engine.add_notifier(broken)
    engine.set(record, "k", 1)
    assert engine.stats()["metadata_notifier_errors"] == 0
    await loop.close()
    assert failures == [(broken, "k", error)]
    assert engine.stats()["metadata_notifier_errors"] == 1


async def test_async_notifier_that_cannot_be_handed_on_is_counted(make: Any, record: Any) -> None:
    async def notifier(change: Any) -> None: ...

    heard: list[Any] = []
    engine = make(later=raising(RuntimeError("full")))
    engine.add_notifier(notifier)
    engine.add_notifier(heard.append)
    engine.set(record, "k", 1)
    assert (len(heard), engine.stats()["metadata_notifier_errors"]) == (1, 1)


async def test_cancellation_of_an_async_notifier_comes_through(make: Any, record: Any) -> None:
    tasks: list[Any] = []

    async def wait(change: Any) -> None:
        await asyncio.Event().wait()

    engine = make(later=lambda call, change: tasks.append(asyncio.ensure_future(call(change))))
    engine.add_notifier(wait)
    engine.set(record, "k", 1)
    await asyncio.sleep(0)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert engine.stats()["metadata_notifier_errors"] == 0


async def test_endless_answer_of_an_async_notifier_ends(make: Any, record: Any) -> None:
    loop = Loop()

    async def answer(change: Any) -> None:
        await asyncio.sleep(0)
        engine.set(record, "k", change.new + 1)

    engine = make(later=loop.later, max_cascade=5)
    engine.add_notifier(answer)
    for start in (0, 100):
        engine.set(record, "k", start)
        await loop.calls.join()
        assert engine.get(record, "k") == start + 5
    await loop.close()
    assert engine.stats()["metadata_notifier_errors"] == 2


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_endless_answer_by_tasks_ends(make: Any, record: Any, is_async: bool) -> None:
    loop, tasks = Loop(), []

    async def change_again(new: int) -> None:
        await asyncio.sleep(0)
        engine.set(record, "k", new)

    def start(change: Any) -> None:
        tasks.append(asyncio.ensure_future(change_again(change.new + 1)))

    async def start_later(change: Any) -> None:
        start(change)

    engine = make(later=loop.later, max_cascade=4)
    engine.add_notifier(start_later if is_async else start)
    engine.set(record, "k", 0)
    raised = []
    for _ in range(9):
        await loop.calls.join()
        while tasks:
            raised += [error for error in await asyncio.gather(tasks.pop(), return_exceptions=True) if error]
    await loop.close()
    assert engine.get(record, "k") == 4
    assert [(type(error), error.what) for error in raised] == [(LimitExceeded, CASCADE)]


async def test_announcement_leaves_the_context_as_it_was(make: Any, record: Any) -> None:
    loop = Loop()

    async def notifier(change: Any) -> None: ...

    engine = make(later=loop.later, max_cascade=1)
    engine.add_notifier(notifier)
    engine.add_notifier(lambda change: None)
    engine.add_notifier(raising(LookupError()))
    for number in range(30):
        engine.set(record, "k", number)
        await loop.calls.join()
    await loop.close()
    assert record.version == 30


# ---- threads and the queue


@pytest.mark.threads
def test_announcing_may_be_the_task_of_one_thread(make: Any, record: Any) -> None:
    heard: list[Any] = []
    woken: list[int] = []
    engine = make(max_cascade=0)
    engine.add_notifier(lambda change: heard.append((change.version, threading.get_ident())))
    here = threading.get_ident()
    engine.run_on(here, lambda: woken.append(threading.get_ident()))
    engine.set(record, "k", 0)
    assert (heard, woken) == ([(1, here)], [])

    def elsewhere() -> int:
        engine.set(record, "k", 1)
        engine.update(record, {"k": 2, "l": 2})
        engine.announce()
        assert len(heard) == 1, "it was announced on another thread"
        return threading.get_ident()

    (there,) = run_threads(elsewhere)
    assert woken == [there]
    engine.announce()
    assert heard[1:] == [(2, here), (3, here), (3, here)]
    engine.announce()
    assert len(heard) == 4
    (there,) = run_threads(lambda: engine.delete(record, "l") and threading.get_ident())
    assert woken[1:] == [there]
    engine.set(record, "k", 2)  # announces the other too
    assert heard[4:] == [(4, here), (5, here)]
    run_threads(lambda: engine.set(record, "k", 2))
    assert len(woken) == 3
    engine.announce()
    del heard[4:]
    engine.run_on(None, None)
    (there,) = run_threads(lambda: engine.set(record, "k", 3) and threading.get_ident())
    assert heard[4:] == [(7, there)]


@pytest.mark.threads
def test_nobody_is_woken_for_what_nobody_hears(make: Any, record: Any) -> None:
    woken: list[int] = []
    engine = make()
    engine.add_notifier(print, key="other")
    engine.run_on(threading.get_ident(), lambda: woken.append(1))
    run_threads(lambda: engine.set(record, "k", 1))
    assert woken == []


@pytest.mark.threads
def test_what_was_queued_for_a_thread_keeps_the_order_of_versions(make: Any, record: Any) -> None:
    heard: list[int] = []
    engine = make()
    engine.add_notifier(lambda change: heard.append(change.version))
    engine.run_on(threading.get_ident(), None)
    run_threads(lambda: engine.set(record, "k", 1))
    engine.set(record, "k", 2)
    assert heard == [1, 2]


@pytest.mark.threads
def test_change_from_another_thread_during_an_announcement_is_announced_here(make: Any, record: Any) -> None:
    heard: list[Any] = []

    def meanwhile(change: Any) -> None:
        heard.append((change.version, threading.get_ident()))
        if change.version == 1:
            run_threads(lambda: engine.set(record, "k", 2))
            assert len(heard) == 1

    engine = make()
    engine.add_notifier(meanwhile)
    engine.set(record, "k", 1)
    assert heard == [(1, threading.get_ident()), (2, threading.get_ident())]


@pytest.mark.threads
def test_change_of_another_thread_is_no_answer(make: Any, record: Any) -> None:
    engine = make(max_cascade=0)
    engine.add_notifier(lambda change: run_threads(lambda: engine.set(record, "k", 2)) if change.new == 1 else None)
    engine.set(record, "k", 1)
    if not getattr(sys.flags, "thread_inherit_context", 0):
        assert (record.version, engine.stats()["metadata_notifier_errors"]) == (2, 0)


@pytest.mark.threads
def test_queue_is_bounded(make: Any, record: Any) -> None:
    heard: list[int] = []
    engine = make(max_queued=3)
    engine.add_notifier(lambda change: heard.append(change.version))
    engine.run_on(threading.get_ident(), None)
    run_threads(lambda: [engine.update(record, {"k": number, "l": number}) for number in range(5)])
    assert engine.stats() == NO_STATS | {"metadata_changes": 5, "metadata_unannounced": 2}
    engine.announce()
    assert heard == [1, 1, 2, 2, 3, 3]
    engine.set(record, "m", 1)
    assert heard[6:] == [6]


def test_queue_bounds_answers_too(make: Any, record: Any) -> None:
    heard: list[Any] = []

    def answer(change: Any) -> None:
        heard.append(change.new)
        if change.key == "ask":
            for number in range(4):
                engine.set(record, "answer", number)

    engine = make(max_queued=2)
    engine.add_notifier(answer)
    engine.set(record, "ask", "asked")
    assert heard == ["asked", 0, 1]
    assert engine.get(record, "answer") == 3
    assert engine.stats()["metadata_unannounced"] == 2


# ---- update_where


@pytest.fixture
def many(registry: Any) -> list[Any]:
    return [
        registry.add(f"c{number}", groups=["g"] * (number % 2), user_id=f"u{number % 3}", metadata={"n": number})
        for number in range(12)
    ]


def changed(records: list[Any]) -> list[int]:
    """The numbers of those that have "k"."""
    return [number for number, record in enumerate(records) if "k" in record.metadata]


def test_change_of_all_that_match(engine: Any, many: list[Any]) -> None:
    report = engine.update_where({"k": 1, "n": MISSING}, group="g", not_user="u1")
    assert report == (4, ())
    assert changed(many) == [3, 5, 9, 11]
    assert all(dict(many[number].metadata) == {"k": 1} and many[number].version == 1 for number in (3, 5, 9, 11))
    assert all(record.version == 0 for record in many if "k" not in record.metadata)
    assert engine.update_where({"l": 1}).changed == 12
    assert engine.update_where({"l": 2}, group="nobody") == (0, ())
    assert engine.stats() == NO_STATS | {"metadata_changes": 16}


def test_change_of_given_targets(impl: Implementation, registry: Any, engine: Any, many: list[Any]) -> None:
    gone = registry.add("gone")
    registry.remove(gone)
    other = impl.Registry(1)
    foreign = other.add("c5")
    targets = iter(["c1", many[2], "c2", many[1], "nobody", "", gone, foreign, "c3", "c3"])
    assert engine.update_where({"k": 1}, to=targets).changed == 3
    assert changed(many) == [1, 2, 3]
    assert [record.version for record in many[1:4]] == [1, 1, 1]
    assert engine.update_where({"k": 1}, to=[]) == (0, ())
    assert engine.update_where({"k": 1}, to={many[0]}, group=None).changed == 1
    assert foreign.version == 0


def test_change_of_many_is_checked_once(engine: Any, many: list[Any]) -> None:
    asked: list[Any] = []
    engine.add_validator(lambda key, value: asked.append(value) or value + 1)
    assert engine.update_where({"k": 1}).changed == 12
    assert asked == [1]
    assert {record.metadata["k"] for record in many} == {2}


def test_rejected_change_is_made_for_nobody(engine: Any, many: list[Any]) -> None:
    engine.add_validator(raising(ValueError("no")), key="k")
    for to in (None, ["c1"], []):
        assert problems_of(lambda to=to: engine.update_where({"l": 1, "k": 1, "": 2}, to=to)) == [
            ("k", "no"),
            ("", "the key is empty"),
        ]
    assert {record.version for record in many} == {0}
    assert engine.stats() == NO_STATS | {"metadata_rejected": 3}


def test_those_whose_limits_would_be_passed_are_reported(make: Any, registry: Any) -> None:
    engine = make(max_keys=2, max_bytes=30)
    full = registry.add("full", metadata={"a": 1, "b": 1})
    large = registry.add("large", metadata={"a": "x" * 25})
    fine = registry.add("fine", metadata={"k": "x" * 28})
    report = engine.update_where({"k": 1})
    assert report.changed == 1
    assert {record: error.problems for record, error in report.rejected} == {
        full: (Problem(None, "more than 2 keys"),),
        large: (Problem(None, "more than 30 bytes in all"),),
    }
    assert all(type(error) is MetadataRejected for _, error in report.rejected)
    assert (fine.version, full.version, large.version) == (1, 0, 0)
    assert engine.stats() == NO_STATS | {"metadata_changes": 1, "metadata_rejected": 2}


def test_one_for_which_it_changes_nothing_has_no_version(engine: Any, many: list[Any]) -> None:
    heard: list[Any] = []
    engine.add_notifier(heard.append)
    many[3].metadata = {}
    assert engine.update_where({"n": MISSING}).changed == 12
    assert [record.version for record in many] == [1] * 12
    assert len(heard) == 11
    assert engine.update_where({}).changed == 12
    assert [record.version for record in many] == [1] * 12


def test_announcements_follow_after_the_last_change(engine: Any, many: list[Any]) -> None:
    heard: list[Any] = []
    engine.add_notifier(lambda change: heard.append((change.client_id, changed(many))))
    engine.update_where({"k": 1}, to=["c5", "c3", many[4]])
    assert heard == [("c5", [3, 4, 5]), ("c3", [3, 4, 5]), ("c4", [3, 4, 5])]


def test_validator_may_remove_those_that_match(registry: Any, engine: Any, many: list[Any]) -> None:
    engine.add_validator(lambda key, value: registry.remove("c1") and None)
    assert engine.update_where({"k": 1}, group="g").changed == 5
    assert engine.update_where({"k": 1}, to=["c1", many[1], "c3"]).changed == 1
    assert changed(many) == [3, 5, 7, 9, 11]


# ---- lifetime


def test_engine_is_given_back(impl: Implementation) -> None:
    registry = impl.Registry(1)
    record = registry.add("a")
    engine = impl.Metadata(registry)

    class Value(list[int]):
        __slots__ = ("__weakref__",)

    def notify(change: Any) -> None: ...

    def validate(key: str, value: Any) -> None: ...

    remove = engine.add_notifier(notify)
    engine.add_validator(validate)
    first, second = Value([1]), Value([2])
    engine.set(record, "k", first)
    engine.set(record, "k", second)
    references = [weakref.ref(each) for each in (first, second, notify, validate)]
    del first
    gc.collect()
    assert references[0]() is None, "a value that was replaced is still held"
    del second
    registry.remove(record)
    gc.collect()
    assert references[1]() is None, "the value of a removed connection is still held"
    remove()
    del notify, validate, remove, engine
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_destructor_of_a_replaced_value_may_use_the_engine(engine: Any, registry: Any, record: Any) -> None:
    class Reader:
        def __del__(self) -> None:
            seen.append((engine.get("a", "k"), engine.set("b", "k", 1)))

    seen: list[Any] = []
    registry.add("b")
    engine.set(record, "k", Reader())
    engine.set(record, "k", "next")
    gc.collect()
    assert seen == [("next", 1)]
