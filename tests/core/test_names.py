"""What may be an id or another name, how a wrong one is refused, and that a name is kept as an exact ``str``."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import FakeClock, Implementation
from tests.core.state import assert_consistent, registry_state
from wsfast.errors import InvalidName

EMPTY = "is empty"
SURROGATE = "holds a lone surrogate, so it has no UTF-8 form"

Entrance = Callable[[Any, Any, Any], object]


def _assign(attribute: str) -> Callable[[Any, Any], None]:
    return lambda record, value: setattr(record, attribute, value)


# Every way a name gets into a registry: (kind, how) -> the call with (registry, an attached record, the name).
ENTRANCES: dict[tuple[str, str], Entrance] = {
    ("client id", "add"): lambda registry, record, name: registry.add(name),
    ("user id", "add"): lambda registry, record, name: registry.add("new", user_id=name),
    ("user id", "assign"): lambda registry, record, name: _assign("user_id")(record, name),
    ("device type", "add"): lambda registry, record, name: registry.add("new", device_type=name),
    ("device type", "assign"): lambda registry, record, name: _assign("device_type")(record, name),
    ("permission", "add"): lambda registry, record, name: registry.add("new", permissions=["read", name]),
    ("permission", "assign"): lambda registry, record, name: _assign("permissions")(record, ["read", name]),
    ("tag key", "add"): lambda registry, record, name: registry.add("new", tags={"plan": "pro", name: ""}),
    ("tag key", "assign"): lambda registry, record, name: _assign("tags")(record, {"plan": "pro", name: ""}),
    ("tag value", "add"): lambda registry, record, name: registry.add("new", tags={"plan": "pro", "k": name}),
    ("tag value", "assign"): lambda registry, record, name: _assign("tags")(record, {"plan": "pro", "k": name}),
    ("metadata key", "add"): lambda registry, record, name: registry.add("new", metadata={"k": 1, name: 2}),
    ("metadata key", "assign"): lambda registry, record, name: _assign("metadata")(record, {"k": 1, name: 2}),
    ("extension key", "add"): lambda registry, record, name: registry.add("new", extensions={"k": 1, name: 2}),
    ("extension key", "assign"): lambda registry, record, name: _assign("extensions")(record, {"k": 1, name: 2}),
    ("group name", "add"): lambda registry, record, name: registry.add("new", groups=["lobby", name]),
    ("group name", "join"): lambda registry, record, name: registry.join(record, name),
}
each_entrance = pytest.mark.parametrize(
    ("kind", "enter"),
    [pytest.param(kind, enter, id=f"{kind}-{how}") for (kind, how), enter in ENTRANCES.items()],
)


class Name(str):
    """A ``str`` that lies about itself: only its characters count."""

    __slots__ = ()

    def __str__(self) -> str:
        return "a lie"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        raise AssertionError("an id was compared before it was converted")

    def __hash__(self) -> int:
        raise AssertionError("an id was hashed before it was converted")

    def __len__(self) -> int:
        return 0

    def encode(self, *args: object) -> bytes:  # type: ignore[override]
        return b"a lie"


class Room(str, enum.Enum):  # noqa: UP042 (its str() is not its value, which is the point)
    LOBBY = "lobby"


# The length limit of each kind of name in a registry made by ``short_names``.
LIMITS = {kind: 9 if kind == "client id" else 7 for kind, _ in ENTRANCES}


def short_names(impl: Implementation) -> Any:
    clock = FakeClock()
    return impl.Registry(8, max_id_bytes=9, max_name_bytes=7, clock=clock, wall_clock=clock.wall)


def assert_refused(impl: Implementation, enter: Entrance, name: Any, kind: str, problem: str) -> None:
    registry = short_names(impl)
    record = registry.add("here", user_id="u", groups=["g"], tags={"t": "v"}, permissions=["p"])
    before = registry_state(registry)
    with pytest.raises(InvalidName) as caught:
        enter(registry, record, name)
    assert (caught.value.kind, caught.value.problem) == (kind, problem)
    assert str(caught.value) == f"{kind} {problem}"
    assert registry_state(registry) == before
    assert_consistent(registry)


@each_entrance
def test_name_of_another_type_is_a_type_error(impl: Implementation, kind: str, enter: Entrance) -> None:
    registry = short_names(impl)
    record = registry.add("here")
    before = registry_state(registry)
    for value, type_name in ((5, "int"), (b"ab", "bytes"), (("a",), "tuple"), (1.5, "float")):
        with pytest.raises(TypeError) as caught:
            enter(registry, record, value)
        assert str(caught.value) == f"{kind} must be str, not {type_name}"
    assert registry_state(registry) == before


@each_entrance
def test_none_is_no_name_where_a_name_is_required(impl: Implementation, kind: str, enter: Entrance) -> None:
    registry = short_names(impl)
    record = registry.add("here", user_id="u", device_type="d")
    if kind in ("user id", "device type"):
        enter(registry, record, None)
        assert None in (registry.get("new", record).user_id, registry.get("new", record).device_type)
        return
    with pytest.raises(TypeError) as caught:
        enter(registry, record, None)
    assert str(caught.value) == f"{kind} must be str, not NoneType"


@each_entrance
def test_empty_name_is_refused_except_as_a_tag_value(impl: Implementation, kind: str, enter: Entrance) -> None:
    if kind == "tag value":
        registry = short_names(impl)
        enter(registry, registry.add("here"), "")
        assert {"plan": "pro", "k": ""} in [record.tags for record in registry.values()]
        assert_consistent(registry)
    else:
        assert_refused(impl, enter, "", kind, EMPTY)


@each_entrance
@pytest.mark.parametrize("unit", ["a", "\x7f"])
def test_name_may_be_as_long_as_the_limit(impl: Implementation, kind: str, enter: Entrance, unit: str) -> None:
    limit = LIMITS[kind]
    registry = short_names(impl)
    enter(registry, registry.add("here"), unit * limit)
    assert_consistent(registry)
    assert_refused(impl, enter, unit * (limit + 1), kind, f"is over the limit of {limit} bytes in UTF-8")


@each_entrance
@pytest.mark.parametrize("unit", ["é", "字", "😀"], ids=["2 bytes", "3 bytes", "4 bytes"])
def test_length_counts_bytes_of_utf8(impl: Implementation, kind: str, enter: Entrance, unit: str) -> None:
    limit = LIMITS[kind]
    units, rest = divmod(limit, len(unit.encode()))
    registry = short_names(impl)
    enter(registry, registry.add("here"), unit * units + "a" * rest)
    assert_consistent(registry)
    problem = f"is over the limit of {limit} bytes in UTF-8"
    assert_refused(impl, enter, unit * units + "a" * (rest + 1), kind, problem)
    assert_refused(impl, enter, unit * (units + 1), kind, problem)


@each_entrance
@pytest.mark.parametrize("name", ["\ud800", "a\udfff", "\udc80b", "\ud83d\ude00"], ids=ascii)
def test_lone_surrogate_is_refused(impl: Implementation, kind: str, enter: Entrance, name: str) -> None:
    assert_refused(impl, enter, name, kind, SURROGATE)


@each_entrance
def test_length_of_a_name_without_utf8_form_is_not_tested(impl: Implementation, kind: str, enter: Entrance) -> None:
    assert_refused(impl, enter, "a" * 300 + "\ud800", kind, SURROGATE)
    assert_refused(impl, enter, "\ud800" + "字" * 300, kind, SURROGATE)


@pytest.mark.parametrize("character", ["a", "é", "字", "😀"])
def test_default_limit_is_256_bytes(impl: Implementation, character: str) -> None:
    registry = impl.Registry()
    width = len(character.encode())
    longest = character * (256 // width) + "a" * (256 % width)
    assert len(longest.encode()) == 256
    record = registry.add(longest, user_id=longest, groups=[longest], tags={longest: longest})
    assert registry[longest] is record
    assert registry.group(longest) == registry.by_user(longest) == [record]
    with pytest.raises(InvalidName) as caught:
        registry.add(longest + "a")
    assert str(caught.value) == "client id is over the limit of 256 bytes in UTF-8"
    with pytest.raises(InvalidName) as caught:
        registry.join(record, longest + "a")
    assert str(caught.value) == "group name is over the limit of 256 bytes in UTF-8"
    assert longest + "a" not in registry
    assert_consistent(registry)


def test_limits_may_be_far_above_the_default(impl: Implementation) -> None:
    registry = impl.Registry(8, max_id_bytes=2**40, max_name_bytes=2**63 - 1)
    name = "字" * 100_000
    record = registry.add(name, groups=[name])
    assert registry[name] is record
    assert registry.groups() == {name: 1}


def test_names_may_hold_any_character_with_a_utf8_form(impl: Implementation) -> None:
    registry = impl.Registry(8)
    names = ["\0", "a\0b", "a\0", "\n", " ", "\x7f", "\x80", "\u200b", "\ufeff", "\ufffe", "\U0010ffff", "%s{0}"]
    for name in names:
        registry.add(name, user_id=name, groups=[name], tags={name: name})
    assert sorted(registry) == sorted(names)
    assert registry.groups() == dict.fromkeys(names, 1)
    assert all(registry[name].tags == {name: name} for name in names)
    assert_consistent(registry)


def test_names_are_not_normalised(impl: Implementation) -> None:
    registry = impl.Registry(8)
    composed, decomposed = "\u00e9", "e\u0301"
    registry.add(composed)
    assert decomposed not in registry
    registry.add(decomposed)
    assert len(registry) == 2


def test_instances_of_str_subclasses_are_kept_as_exact_str(impl: Implementation) -> None:
    registry = impl.Registry(8)
    record = registry.add(
        Name("id"),
        user_id=Name("user"),
        device_type=Name("device"),
        permissions=[Name("read")],
        groups=[Name("lobby")],
    )
    registry.join(record, Name("attic"))
    names = [record.client_id, record.user_id, record.device_type, *record.permissions, *record.groups, *registry]
    assert {type(name) for name in [*names, *registry.groups()]} == {str}
    assert sorted(names) == sorted(["id", "user", "device", "read", "lobby", "attic", "id"])
    record.user_id, record.device_type, record.permissions = Name("u2"), Name("d2"), [Name("write")]
    assert (record.user_id, record.device_type, record.permissions) == ("u2", "d2", {"write"})
    assert {type(record.user_id), type(record.device_type), *map(type, record.permissions)} == {str}


def test_keys_and_values_of_mappings_are_kept_as_exact_str(impl: Implementation) -> None:
    registry = impl.Registry(8)
    name = Room.LOBBY
    record = registry.add("id", tags={name: name}, metadata={name: name}, extensions={name: name})
    for mapping in (record.tags, record.metadata, record.extensions):
        assert [type(key) for key in mapping] == [str]
        assert list(mapping) == ["lobby"]
    assert type(record.tags["lobby"]) is str
    assert record.metadata["lobby"] is name
    assert record.extensions["lobby"] is name
    record.tags = {Room.LOBBY: Name("value")}
    assert [type(value) for value in record.tags.values()] == [str]
    assert record.tags == {"lobby": "value"}
    assert_consistent(registry)


def test_instances_of_str_subclasses_are_found_by_their_characters(impl: Implementation) -> None:
    registry = impl.Registry(8)
    record = registry.add("id", user_id="user", groups=["lobby"], tags={"plan": "pro"})
    assert registry[Name("id")] is record
    assert registry.get(Name("id")) is record
    assert registry.get_many([Name("id"), Name("no")]) == [record, None]
    assert Name("id") in registry
    assert registry.shard_of(Name("id")) == registry.shard_of("id")
    assert registry.group(Name("lobby")) == registry.by_user(Name("user")) == [record]
    assert list(registry.batches(group=Name("lobby"))) == [[record]]
    assert list(registry.batches(user=Name("user"))) == [[record]]
    assert list(registry.batches(tag=Name("plan"))) == [[record]]
    assert list(registry.batches(tag=(Name("plan"), Name("pro")))) == [[record]]
    assert registry.leave(record, Name("lobby")) is True
    assert registry.remove(Name("id")) is record


def test_str_of_an_enum_is_not_taken_for_its_value(impl: Implementation) -> None:
    registry = impl.Registry(8)
    record = registry.add(Room.LOBBY, groups=[Room.LOBBY])
    assert record.client_id == "lobby"
    assert type(record.client_id) is str
    assert registry.groups() == {"lobby": 1}


@pytest.mark.parametrize("client_id", ["", "\ud800", "a" * 257, "字" * 86], ids=["empty", "surrogate", "long", "wide"])
def test_string_that_cannot_be_an_id_is_absent(impl: Implementation, client_id: str) -> None:
    registry = impl.Registry(8)
    registry.add("here")
    default = object()
    assert client_id not in registry
    assert registry.get(client_id) is None
    assert registry.get(client_id, default) is default
    assert registry.get_many([client_id, "here"]) == [None, registry["here"]]
    assert registry.remove(client_id) is None
    with pytest.raises(KeyError) as caught:
        registry[client_id]
    assert caught.value.client_id == client_id
    with pytest.raises(InvalidName):
        registry.shard_of(client_id)


@pytest.mark.parametrize("name", ["", "\ud800", "a" * 257], ids=["empty", "surrogate", "long"])
def test_string_that_cannot_be_a_name_matches_nobody(impl: Implementation, name: str) -> None:
    registry = impl.Registry(8)
    record = registry.add("here", user_id="u", groups=["g"], tags={"t": ""})
    assert registry.group(name) == registry.by_user(name) == []
    assert registry.leave(record, name) is False
    for filters in ({"group": name}, {"user": name}, {"tag": name}, {"tag": (name, "")}):
        assert list(registry.batches(**filters)) == []
        assert registry.for_each(lambda record: None, **filters) == 0
    if name:
        assert list(registry.batches(tag=("t", name))) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [("", EMPTY), ("a" * 257, "is over the limit of 256 bytes in UTF-8"), ("\ud800", SURROGATE)],
    ids=["empty", "long", "surrogate"],
)
def test_shard_of_a_string_that_cannot_be_an_id_is_an_error(impl: Implementation, name: str, problem: str) -> None:
    with pytest.raises(InvalidName) as caught:
        impl.Registry(8).shard_of(name)
    assert (caught.value.kind, caught.value.problem) == ("client id", problem)
