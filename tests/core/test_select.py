"""Who matches: every filter alone, together and excluding, after every change, and against a plain scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Implementation
from tests.core.state import DEPARTURES, assert_consistent, ids, walk
from wsfast.connection import ConnectionStatus

ONLINE, SUSPECT, CLOSING, OFFLINE = (
    ConnectionStatus.ONLINE,
    ConnectionStatus.SUSPECT,
    ConnectionStatus.CLOSING,
    ConnectionStatus.OFFLINE,
)

PEOPLE: dict[str, dict[str, Any]] = {
    "ann": {"groups": ["g", "h"], "user_id": "u", "device_type": "ios", "tags": {"plan": "pro", "lang": "de"}},
    "bob": {"groups": ["g"], "user_id": "u", "device_type": "web", "tags": {"plan": "free"}},
    "cid": {"groups": ["h"], "user_id": "w", "device_type": "ios", "tags": {"lang": ""}, "status": SUSPECT},
    "dan": {"tags": {"plan": "pro"}, "status": CLOSING},
    "eve": {},
}
EVERYBODY = sorted(PEOPLE)


@pytest.fixture
def people(registry: Any) -> Any:
    for name, fields in PEOPLE.items():
        registry.add(name, **fields)
    return registry


def matches(registry: Any, **filters: Any) -> list[str]:
    """Whom ``select``, ``batches`` and ``for_each`` find, which must be the same."""
    found = registry.select(**filters)
    assert type(found) is list
    assert ids(walk(registry, 2, **filters)) == ids(found)
    visited: list[Any] = []
    assert registry.for_each(visited.append, **filters) == len(found)
    assert ids(visited) == ids(found)
    return ids(found)


FOUND: list[tuple[dict[str, Any], str]] = [
    ({}, "ann bob cid dan eve"),
    ({"group": "g"}, "ann bob"),
    ({"group": ["g"]}, "ann bob"),
    ({"group": ["g", "h"]}, "ann"),
    ({"group": ["g", "g"]}, "ann bob"),
    ({"group": {"g", "h"}}, "ann"),
    ({"group": frozenset(["h"])}, "ann cid"),
    ({"group": ["g", "nobody"]}, ""),
    ({"group": "nobody"}, ""),
    ({"user": "u"}, "ann bob"),
    ({"user": "nobody"}, ""),
    ({"tag": "plan"}, "ann bob dan"),
    ({"tag": ("plan", "pro")}, "ann dan"),
    ({"tag": ["plan", "lang"]}, "ann"),
    ({"tag": ["plan", ("plan", "pro")]}, "ann dan"),
    ({"tag": [("plan", "pro"), ("plan", "free")]}, ""),
    ({"tag": {("plan", "pro"), "lang"}}, "ann"),
    ({"tag": ("lang", "")}, "cid"),
    ({"tag": "pro"}, ""),
    ({"status": ONLINE}, "ann bob eve"),
    ({"status": SUSPECT}, "cid"),
    ({"status": OFFLINE}, ""),
    ({"device_type": "ios"}, "ann cid"),
    ({"device_type": "nobody"}, ""),
    ({"not_group": "g"}, "cid dan eve"),
    ({"not_group": ["g", "h"]}, "dan eve"),
    ({"not_group": "nobody"}, "ann bob cid dan eve"),
    ({"not_user": "u"}, "cid dan eve"),
    ({"not_user": {"u", "w"}}, "dan eve"),
    ({"not_tag": "plan"}, "cid eve"),
    ({"not_tag": ("plan", "pro")}, "bob cid eve"),
    ({"not_tag": [("plan", "free"), "lang"]}, "dan eve"),
    ({"not_tag": ("lang", "nobody")}, "ann bob cid dan eve"),
    ({"not_status": ONLINE}, "cid dan"),
    ({"not_status": [ONLINE, CLOSING]}, "cid"),
    ({"not_status": frozenset(ConnectionStatus)}, ""),
    ({"not_device_type": "ios"}, "bob dan eve"),
    ({"not_device_type": ["ios", "web"]}, "dan eve"),
    ({"group": "g", "user": "u", "device_type": "web"}, "bob"),
    ({"group": "h", "tag": "lang", "status": ONLINE}, "ann"),
    ({"group": "h", "not_group": "g"}, "cid"),
    ({"group": "g", "not_group": "g"}, ""),
    ({"user": "u", "not_user": "u"}, ""),
    ({"user": "u", "not_tag": ("plan", "free")}, "ann"),
    ({"tag": "plan", "not_status": CLOSING}, "ann bob"),
    ({"status": ONLINE, "not_status": ONLINE}, ""),
    ({"status": ONLINE, "not_status": SUSPECT, "not_user": "u"}, "eve"),
    ({"device_type": "ios", "user": "w", "group": "h", "tag": "lang", "status": SUSPECT}, "cid"),
    ({"device_type": "ios", "user": "w", "group": "h", "tag": "plan", "status": SUSPECT}, ""),
]


@pytest.mark.parametrize(("filters", "names"), FOUND, ids=[str(filters) for filters, _ in FOUND])
def test_who_matches(people: Any, filters: dict[str, Any], names: str) -> None:
    assert matches(people, **filters) == names.split()


@pytest.mark.parametrize("name", ["group", "user", "tag", "device_type"])
@pytest.mark.parametrize("value", ["", "\ud800", "a" * 257, "字" * 86], ids=["empty", "surrogate", "long", "wide"])
def test_string_that_cannot_be_a_name_matches_nobody_and_excludes_nobody(people: Any, name: str, value: str) -> None:
    assert matches(people, **{name: value}) == []
    assert matches(people, **{f"not_{name}": value}) == EVERYBODY
    assert matches(people, **{f"not_{name}": [value]}) == EVERYBODY
    if name == "tag":
        assert matches(people, tag=(value, "")) == matches(people, tag=["plan", (value, "")]) == []
        assert matches(people, tag=("plan", value)) == []
        assert matches(people, not_tag=[("plan", value)]) == EVERYBODY
    if name == "group":
        assert matches(people, group=["g", value]) == []


@pytest.mark.parametrize("empty", [[], set(), frozenset()], ids=str)
@pytest.mark.parametrize("name", ["group", "tag", "not_group", "not_user", "not_tag", "not_status", "not_device_type"])
def test_empty_collection_restricts_nothing(people: Any, name: str, empty: Any) -> None:
    assert matches(people, **{name: empty}) == EVERYBODY
    assert matches(people, user="u", **{name: empty}) == ["ann", "bob"]


def test_subclasses_of_the_collections_are_taken(people: Any) -> None:
    class Names(list[Any]):
        pass

    assert matches(people, group=Names(["g", "h"])) == ["ann"]
    assert matches(people, not_tag=Names([("plan", "pro"), "lang"])) == ["bob", "eve"]


def test_select_of_an_empty_registry_is_empty(registry: Any) -> None:
    assert registry.select() == registry.select(group="g") == registry.select(not_group="g") == []
    assert registry.select(status=ONLINE) == registry.select(device_type="ios") == []


def test_answer_belongs_to_the_caller(people: Any) -> None:
    for filters in ({}, {"group": "g"}, {"status": ONLINE}, {"not_user": "u"}):
        found = people.select(**filters)
        before = list(found)
        found.clear()
        assert ids(people.select(**filters)) == ids(before)


def test_filters_take_no_positional_argument_and_no_other_name(people: Any) -> None:
    with pytest.raises(TypeError):
        people.select("g")
    for call in (people.select, people.batches, lambda **filters: people.for_each(print, **filters)):
        with pytest.raises(TypeError):
            call(colour="red")


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Any], object], Callable[[Any], object]]] = {
    "group": ({"group": "x"}, lambda r: r.registry.join(r, "x"), lambda r: r.registry.leave(r, "x")),
    "user": ({"user": "x"}, lambda r: setattr(r, "user_id", "x"), lambda r: setattr(r, "user_id", "y")),
    "no user": ({"user": "x"}, lambda r: setattr(r, "user_id", "x"), lambda r: setattr(r, "user_id", None)),
    "tag": ({"tag": "x"}, lambda r: setattr(r, "tags", {"x": "1"}), lambda r: setattr(r, "tags", {"y": "1"})),
    "tag value": (
        {"tag": ("x", "1")},
        lambda r: setattr(r, "tags", {"x": "1"}),
        lambda r: setattr(r, "tags", {"x": ""}),
    ),
    "device": (
        {"device_type": "x"},
        lambda r: setattr(r, "device_type", "x"),
        lambda r: setattr(r, "device_type", "y"),
    ),
    "no device": (
        {"device_type": "x"},
        lambda r: setattr(r, "device_type", "x"),
        lambda r: setattr(r, "device_type", None),
    ),
    "status": ({"status": CLOSING}, lambda r: setattr(r, "status", CLOSING), lambda r: setattr(r, "status", SUSPECT)),
}
each_change = pytest.mark.parametrize(("filters", "enter", "leave"), CHANGES.values(), ids=CHANGES.keys())


@each_change
def test_filters_follow_every_change(registry: Any, filters: dict[str, Any], enter: Any, leave: Any) -> None:
    records = [registry.add(f"c{number}") for number in range(9)]
    inverse = {f"not_{name}": value for name, value in filters.items()}
    for round_ in range(3):
        for record in records[round_::3]:
            enter(record)
            enter(record)
        assert matches(registry, **filters) == ids(records[round_::3])
        assert matches(registry, **inverse) == ids(set(records) - set(records[round_::3]))
        assert_consistent(registry)
        for record in records[round_::3]:
            leave(record)
        assert matches(registry, **filters) == []
        assert matches(registry, **inverse) == ids(records)
    assert_consistent(registry)


@each_change
@pytest.mark.parametrize("depart", DEPARTURES.values(), ids=DEPARTURES.keys())
def test_detached_record_matches_nothing(
    registry: Any, filters: dict[str, Any], enter: Any, leave: Any, depart: Callable[[Any, Any], object]
) -> None:
    record, other = registry.add("a"), registry.add("b")
    enter(record)
    enter(other)
    depart(registry, record)
    left = ["b"] if other.attached else []
    assert matches(registry, **filters) == left
    assert record not in registry.select()
    assert_consistent(registry)


@each_change
def test_successor_of_a_replaced_connection_stands_for_itself(
    registry: Any, filters: dict[str, Any], enter: Any, leave: Any
) -> None:
    enter(registry.add("a"))
    successor = registry.add("a", on_duplicate="replace")
    assert matches(registry, **filters) == []
    enter(successor)
    assert registry.select(**filters) == [successor]


def test_device_type_is_indexed_from_the_start(registry: Any) -> None:
    records = [registry.add(f"c{number}", device_type=f"d{number % 3}") for number in range(30)]
    assert matches(registry, device_type="d1") == ids(records[1::3])
    for record in records[1::3]:
        registry.remove(record)
        assert record.device_type == "d1"
    assert matches(registry, device_type="d1") == []
    assert matches(registry, not_device_type="d0") == ids(records[2::3])
    registry.clear()
    assert matches(registry, device_type="d0") == []


def test_status_offline_may_be_assigned_and_found(registry: Any) -> None:
    record = registry.add("a")
    record.status = OFFLINE
    assert matches(registry, status=OFFLINE) == ["a"]
    assert record.attached


NOT_FILTERS: list[tuple[dict[str, Any], Callable[[Any], object], Callable[[Any], object]]] = [
    ({f"not_{name}": value for name, value in filters.items()}, enter, leave)
    for filters, enter, leave in CHANGES.values()
]


@pytest.mark.parametrize(("exclusion", "enter", "leave"), NOT_FILTERS, ids=CHANGES.keys())
@pytest.mark.parametrize("filters", [{}, {"group": "all"}], ids=["everybody", "group"])
def test_exclusion_is_looked_at_when_the_batch_is_formed(
    registry: Any, filters: dict[str, Any], exclusion: dict[str, Any], enter: Any, leave: Any
) -> None:
    records = [registry.add(f"c{number}", groups=["all"]) for number in range(20)]
    for record in records[:10]:
        enter(record)
    batches = registry.batches(1, **filters, **exclusion)
    (first,) = next(batches)
    assert first in records[10:]
    for record in records[:5]:
        leave(record)
    for record in records[10:15]:
        enter(record)
    left = {*records[:5], *records[15:]} - {first}
    seen = [record for batch in batches for record in batch]
    # Whose turn had passed by before they matched is open.
    assert set(records[15:]) - {first} <= set(seen) <= left
    assert len(seen) == len(set(seen))


def test_members_of_all_sets_are_those_at_the_first_next(registry: Any) -> None:
    records = [registry.add(f"c{number}", groups=["g", "h"], device_type="d", tags={"t": "v"}) for number in range(12)]
    filters = {"group": ["g", "h"], "device_type": "d", "tag": ["t", ("t", "v")]}
    batches = registry.batches(2, **filters)
    registry.leave(records[0], "g")
    first = next(batches)
    late = registry.add("late", groups=["g", "h"], device_type="d", tags={"t": "v"})
    for record in records[1:]:
        registry.leave(record, "h")
        record.device_type, record.tags = None, {}
    seen = first + [record for batch in batches for record in batch]
    assert ids(seen) == ids(records[1:])
    assert registry.select(**filters) == [late]


def test_removal_inside_a_filtered_walk_leaves_the_rest(registry: Any) -> None:
    records = [registry.add(f"c{number}", device_type="d") for number in range(30)]
    seen = []
    for (record,) in registry.batches(1, device_type="d", not_group="g"):
        seen.append(record)
        registry.remove(records[(records.index(record) + 7) % 30])
    assert len(seen) == len(set(seen))
    assert {record for record in records if record.attached} <= set(seen)


# ---- against a scan

names = st.sampled_from(["a", "b", "c", "é"])
tag_values = st.sampled_from(["", "v", "w"])
statuses = st.sampled_from(ConnectionStatus)
people_fields = st.fixed_dictionaries(
    {
        "groups": st.sets(names, max_size=3),
        "user_id": st.none() | names,
        "device_type": st.none() | names,
        "tags": st.dictionaries(names, tag_values, max_size=3),
        "status": statuses,
    }
)
asked_names = names | st.sampled_from(["nobody", ""])
asked_tags = asked_names | st.tuples(asked_names, tag_values)


def several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return values | st.lists(values, max_size=3) | st.sets(values, max_size=2) | st.frozensets(values, max_size=2)


asked = st.fixed_dictionaries(
    {},
    optional={
        "group": st.none() | several(asked_names),
        "user": st.none() | asked_names,
        "tag": st.none() | several(asked_tags),
        "status": st.none() | statuses,
        "device_type": st.none() | asked_names,
        "not_group": st.none() | several(asked_names),
        "not_user": several(asked_names),
        "not_tag": several(asked_tags),
        "not_status": several(statuses),
        "not_device_type": several(asked_names),
    },
)


def as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | set | frozenset) else [value]


def has_tag(record: Any, tag: Any) -> bool:
    return tag in record.tags if isinstance(tag, str) else tag in record.tags.items()


HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "group": lambda record, value: value in record.groups,
    "user": lambda record, value: record.user_id == value,
    "tag": has_tag,
    "status": lambda record, value: record.status is value,
    "device_type": lambda record, value: record.device_type == value,
}


def is_meant(record: Any, filters: dict[str, Any]) -> bool:
    return all(
        not holds(record, value) if name.startswith("not_") else holds(record, value)
        for name, values in filters.items()
        for holds in [HOLDS[name.removeprefix("not_")]]
        for value in as_list(values)
    )


@given(
    fields=st.lists(people_fields, max_size=12),
    changes=st.lists(st.tuples(st.integers(0, 11), people_fields), max_size=6),
    filters=st.lists(asked, min_size=1, max_size=5),
)
def test_filters_agree_with_a_scan(
    impl: Implementation, fields: list[Any], changes: list[tuple[int, Any]], filters: list[dict[str, Any]]
) -> None:
    registry = impl.Registry(4)
    records = [registry.add(f"c{number}", **each) for number, each in enumerate(fields)]
    for number, new in changes:
        if number < len(records):
            record = records[number]
            for group in {*record.groups, *new["groups"]}:
                (registry.join if group in new["groups"] else registry.leave)(record, group)
            for name in ("user_id", "device_type", "tags", "status"):
                setattr(record, name, new[name])
    for each in filters:
        assert matches(registry, **each) == ids(record for record in records if is_meant(record, each))
