"""Wrong calls: each with its type and exact text, the order in which they are found, and that they change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import FakeClock, Implementation
from tests.core.state import assert_consistent, record_state, registry_state
from wsfast.connection import ConnectionStatus, Filters, Quality
from wsfast.errors import (
    DetachedRecord,
    DuplicateConnection,
    ForeignRecord,
    InvalidName,
    InvalidSetting,
    LimitExceeded,
    UnknownConnection,
)

NO_ID = "client id must be str, not "
NO_TAG = "tag must be a key or a (key, value) pair, not "
NO_RECORD = "meta must be a ConnectionMeta, not "
FOREIGN = "the record of 'foreign' belongs to another registry"
RECORD_TYPE = "record_type must be a subclass of ConnectionMeta with empty __slots__"
SHARDS = "shards must be a power of two from 1 to 65536, not "


@pytest.fixture
def world(impl: Implementation, clock: FakeClock) -> SimpleNamespace:
    """A small registry, a record in it, one detached from it, and one of another registry."""
    registry = impl.Registry(4, clock=clock, wall_clock=clock.wall, max_tags=2, max_groups=2)
    record = registry.add(
        "a", conn="conn", user_id="u", permissions=["p"], tags={"t": "v"}, metadata={"m": 1}, groups=["g"]
    )
    record.deadline_ns = 7
    gone = registry.add("gone")
    registry.remove(gone)
    other = impl.Registry(4, clock=clock, wall_clock=clock.wall)
    return SimpleNamespace(
        impl=impl, registry=registry, record=record, gone=gone, other=other, foreign=other.add("foreign"), clock=clock
    )


def assign(attribute: str, value: Any) -> Callable[[SimpleNamespace], None]:
    return lambda world: setattr(world.record, attribute, value)


def made(**settings: Any) -> Callable[[SimpleNamespace], object]:
    return lambda world: world.impl.Registry(**settings)


def added(client_id: Any = "new", **fields: Any) -> Callable[[SimpleNamespace], object]:
    return lambda world: world.registry.add(client_id, **fields)


def calling(method: str, *args: Any, **kwargs: Any) -> Callable[[SimpleNamespace], object]:
    """Call a method of the registry."""
    return lambda world: getattr(world.registry, method)(*args, **kwargs)


def telling(method: str, *args: Any, **kwargs: Any) -> Callable[[SimpleNamespace], object]:
    """Call a method of the record."""
    return lambda world: getattr(world.record, method)(*args, **kwargs)


def passing(method: str, which: str, *args: Any) -> Callable[[SimpleNamespace], object]:
    """Call a method of the registry with one of the world's records."""
    return lambda world: getattr(world.registry, method)(getattr(world, which), *args)


class WithDict:
    """No ``__slots__``: a record with it would have a ``__dict__``."""


def record_type(**body: Any) -> Callable[[SimpleNamespace], object]:
    return lambda world: world.impl.Registry(record_type=type("Record", (world.impl.ConnectionMeta,), body))


def with_dict_mixin(world: SimpleNamespace) -> object:
    mixed = type("Record", (WithDict, world.impl.ConnectionMeta), {"__slots__": ()})
    return world.impl.Registry(record_type=mixed)


def many(count: int) -> dict[str, str]:
    return {f"k{number}": "v" for number in range(count)}


NAN = float("nan")
Call = Callable[[SimpleNamespace], object]

BAD_CALLS: list[tuple[Call, type[Exception], str]] = [
    # Registry(...)
    (made(shards="8"), TypeError, "shards must be int, not str"),
    (made(shards=8.0), TypeError, "shards must be int, not float"),
    (made(shards=None), TypeError, "shards must be int, not NoneType"),
    *((made(shards=value), InvalidSetting, f"{SHARDS}{value}") for value in (0, -1, -8, 3, 6, 65535, 131072, 2**40)),
    (made(shards=2**63), OverflowError, "shards does not fit 64 bits"),
    (made(shards=-(2**63) - 1), OverflowError, "shards does not fit 64 bits"),
    (made(shards=False), InvalidSetting, f"{SHARDS}False"),
    *(
        (made(**{name: value}), InvalidSetting, f"{name} must be 1 or more, not {value}")
        for name, value in itertools.product(("max_id_bytes", "max_name_bytes"), (0, -1))
    ),
    *((made(**{name: -1}), InvalidSetting, f"{name} must be 0 or more, not -1") for name in ("max_tags", "max_groups")),
    *(
        (made(**{name: value}), error, text)
        for name in ("max_id_bytes", "max_name_bytes", "max_tags", "max_groups")
        for value, error, text in (
            ("9", TypeError, f"{name} must be int, not str"),
            (1.0, TypeError, f"{name} must be int, not float"),
            (2**63, OverflowError, f"{name} does not fit 64 bits"),
        )
    ),
    (made(record_type=int), TypeError, RECORD_TYPE),
    (made(record_type=5), TypeError, RECORD_TYPE),
    (made(record_type="ConnectionMeta"), TypeError, RECORD_TYPE),
    (lambda world: world.impl.Registry(record_type=world.record), TypeError, RECORD_TYPE),
    (record_type(), TypeError, RECORD_TYPE),
    (record_type(__slots__=("field",)), TypeError, RECORD_TYPE),
    (record_type(__slots__=("__dict__",)), TypeError, RECORD_TYPE),
    (with_dict_mixin, TypeError, RECORD_TYPE),
    # add: what the names must be is in test_names.py
    (added(permissions="read"), TypeError, "permissions must be an iterable of str, not str"),
    (added(permissions=5), TypeError, "permissions must be an iterable of str, not int"),
    (added(permissions=None), TypeError, "permissions must be an iterable of str, not NoneType"),
    (added(permissions=["p", 5]), TypeError, "permission must be str, not int"),
    (added(permissions=b"ab"), TypeError, "permission must be str, not int"),
    (added(groups="lobby"), TypeError, "groups must be an iterable of str, not str"),
    (added(groups=5), TypeError, "groups must be an iterable of str, not int"),
    (added(groups=None), TypeError, "groups must be an iterable of str, not NoneType"),
    (added(groups=["x", None]), TypeError, "group name must be str, not NoneType"),
    (added(groups=["x", "y", "z"]), LimitExceeded, "too many groups of one connection: the limit is 2"),
    (added(tags=[("k", "v")]), TypeError, "tags must be a mapping, not list"),
    (added(tags="k"), TypeError, "tags must be a mapping, not str"),
    (added(tags=many(3)), LimitExceeded, "too many tags of one connection: the limit is 2"),
    (added(metadata=[("k", "v")]), TypeError, "metadata must be a mapping, not list"),
    (added(extensions=5), TypeError, "extensions must be a mapping, not int"),
    (added(status=1), TypeError, "status must be a ConnectionStatus, not int"),
    (added(status="ONLINE"), TypeError, "status must be a ConnectionStatus, not str"),
    (added(status=None), TypeError, "status must be a ConnectionStatus, not NoneType"),
    *(
        (added(on_duplicate=value), InvalidSetting, f"on_duplicate must be 'reject' or 'replace', not {value!r}")
        for value in ("keep", "", "Reject", None, 5, True)
    ),
    (added("a"), DuplicateConnection, "connection 'a' is already registered"),
    (added("a", user_id=5), TypeError, "user id must be str, not int"),
    (added("a", on_duplicate="replace", groups=["x", ""]), InvalidName, "group name is empty"),
    (added("a", on_duplicate="replace", status=1), TypeError, "status must be a ConnectionStatus, not int"),
    # Lookups
    (lambda world: world.registry["b"], UnknownConnection, "no connection 'b' is registered"),
    (lambda world: world.registry["b" * 99], UnknownConnection, f"no connection '{'b' * 64}'... is registered"),
    (lambda world: world.registry[5], TypeError, f"{NO_ID}int"),
    (lambda world: 5 in world.registry, TypeError, f"{NO_ID}int"),
    (lambda world: None in world.registry, TypeError, f"{NO_ID}NoneType"),
    (lambda world: [] in world.registry, TypeError, f"{NO_ID}list"),
    (calling("get", b"a"), TypeError, f"{NO_ID}bytes"),
    (calling("get", 5, "default"), TypeError, f"{NO_ID}int"),
    (calling("get_many", ["a", 5]), TypeError, f"{NO_ID}int"),
    (calling("shard_of", 5), TypeError, f"{NO_ID}int"),
    (calling("remove", 5), TypeError, f"{NO_ID}int"),
    (calling("remove", None), TypeError, f"{NO_ID}NoneType"),
    (passing("remove", "foreign"), ForeignRecord, FOREIGN),
    (calling("group", 5), TypeError, "group name must be str, not int"),
    (calling("by_user", None), TypeError, "user id must be str, not NoneType"),
    # batches, for_each, select
    *(
        (calling("batches", value), error, text)
        for value, error, text in (
            (0, InvalidSetting, "size must be 1 or more, not 0"),
            (-3, InvalidSetting, "size must be 1 or more, not -3"),
            (False, InvalidSetting, "size must be 1 or more, not False"),
            ("9", TypeError, "size must be int, not str"),
            (1.0, TypeError, "size must be int, not float"),
            (None, TypeError, "size must be int, not NoneType"),
            (2**63, OverflowError, "size does not fit 64 bits"),
        )
    ),
    *(
        (call(**filters), TypeError, text)
        for call in (
            lambda **filters: calling("batches", **filters),
            lambda **filters: calling("for_each", print, **filters),
            lambda **filters: calling("select", **filters),
        )
        for filters, text in (
            ({"group": 5}, "group name must be str, not int"),
            ({"user": b"u"}, "user id must be str, not bytes"),
            ({"tag": 5}, f"{NO_TAG}int"),
            ({"tag": [["k", "v"]]}, f"{NO_TAG}list"),
            ({"tag": {"k": "v"}}, f"{NO_TAG}dict"),
            ({"tag": ()}, f"{NO_TAG}tuple"),
            ({"tag": ("k",)}, f"{NO_TAG}tuple"),
            ({"tag": ("k", "v", "w")}, f"{NO_TAG}tuple"),
            ({"tag": (5, "v")}, "tag key must be str, not int"),
            ({"tag": ("k", None)}, "tag value must be str, not NoneType"),
            ({"status": 1}, "status must be a ConnectionStatus, not int"),
            ({"status": "ONLINE"}, "status must be a ConnectionStatus, not str"),
            ({"status": [ConnectionStatus.ONLINE]}, "status must be a ConnectionStatus, not list"),
            ({"group": ("g", "h")}, "group name must be str, not tuple"),
            ({"group": range(2)}, "group name must be str, not range"),
            ({"group": ["g", 5]}, "group name must be str, not int"),
            ({"group": [None]}, "group name must be str, not NoneType"),
            ({"user": ["u"]}, "user id must be str, not list"),
            ({"tag": ["k", ("k",)]}, f"{NO_TAG}tuple"),
            ({"tag": [("k", 5)]}, "tag value must be str, not int"),
            ({"tag": {("k", "v"), (5, "v")}}, "tag key must be str, not int"),
            ({"tag": [None]}, f"{NO_TAG}NoneType"),
            ({"device_type": 5}, "device type must be str, not int"),
            ({"device_type": ["d"]}, "device type must be str, not list"),
            ({"not_group": 5}, "group name must be str, not int"),
            ({"not_group": ("g",)}, "group name must be str, not tuple"),
            ({"not_group": {"g", 5}}, "group name must be str, not int"),
            ({"not_user": 5}, "user id must be str, not int"),
            ({"not_user": frozenset([5])}, "user id must be str, not int"),
            ({"not_tag": 5}, f"{NO_TAG}int"),
            ({"not_tag": [("k", "v", "w")]}, f"{NO_TAG}tuple"),
            ({"not_tag": ("k", 5)}, "tag value must be str, not int"),
            ({"not_status": 1}, "status must be a ConnectionStatus, not int"),
            ({"not_status": (ConnectionStatus.ONLINE,)}, "status must be a ConnectionStatus, not tuple"),
            ({"not_status": [ConnectionStatus.ONLINE, 1]}, "status must be a ConnectionStatus, not int"),
            ({"not_device_type": 5}, "device type must be str, not int"),
            ({"not_device_type": [b"d"]}, "device type must be str, not bytes"),
        )
    ),
    # join, leave
    *(
        (call, error, text)
        for method in ("join", "leave")
        for call, error, text in (
            (calling(method, "a", "g"), TypeError, f"{NO_RECORD}str"),
            (calling(method, None, "g"), TypeError, f"{NO_RECORD}NoneType"),
            (passing(method, "record", 5), TypeError, "group name must be str, not int"),
            (passing(method, "record", None), TypeError, "group name must be str, not NoneType"),
            (passing(method, "gone", "g"), DetachedRecord, "the record of 'gone' was removed from its registry"),
            (passing(method, "foreign", "g"), ForeignRecord, FOREIGN),
        )
    ),
    (passing("join", "record", ""), InvalidName, "group name is empty"),
    # due
    *(
        (calling("due", value), error, text)
        for value, error, text in (
            (1.0, TypeError, "now must be int, not float"),
            ("9", TypeError, "now must be int, not str"),
            (None, TypeError, "now must be int, not NoneType"),
            (2**63, OverflowError, "now does not fit 64 bits"),
            (-(2**63) - 1, OverflowError, "now does not fit 64 bits"),
        )
    ),
    *(
        (calling("due", 9, value), error, text)
        for value, error, text in (
            (0, InvalidSetting, "limit must be 1 or more, not 0"),
            (-1, InvalidSetting, "limit must be 1 or more, not -1"),
            (1.0, TypeError, "limit must be int, not float"),
            (None, TypeError, "limit must be int, not NoneType"),
            (2**63, OverflowError, "limit does not fit 64 bits"),
        )
    ),
    # Attributes of a record
    (assign("status", 1), TypeError, "status must be a ConnectionStatus, not int"),
    (assign("status", None), TypeError, "status must be a ConnectionStatus, not NoneType"),
    (assign("permissions", "read"), TypeError, "permissions must be an iterable of str, not str"),
    (assign("permissions", None), TypeError, "permissions must be an iterable of str, not NoneType"),
    (assign("permissions", ["p", b"q"]), TypeError, "permission must be str, not bytes"),
    (assign("tags", None), TypeError, "tags must be a mapping, not NoneType"),
    (assign("tags", ["k"]), TypeError, "tags must be a mapping, not list"),
    (assign("tags", {"k": 5, 5: "v"}), TypeError, "tag value must be str, not int"),
    (assign("tags", {5: "", "": 5}), TypeError, "tag key must be str, not int"),
    (assign("tags", many(3)), LimitExceeded, "too many tags of one connection: the limit is 2"),
    (assign("metadata", None), TypeError, "metadata must be a mapping, not NoneType"),
    (assign("metadata", {"k": 1, 5: 1}), TypeError, "metadata key must be str, not int"),
    (assign("extensions", None), TypeError, "extensions must be a mapping, not NoneType"),
    (assign("extensions", {5: 1}), TypeError, "extension key must be str, not int"),
    (assign("quality", (0.0, 0.0, 0.0)), TypeError, "quality must be a Quality, not tuple"),
    (assign("quality", None), TypeError, "quality must be a Quality, not NoneType"),
    *(
        (assign("quality", quality), InvalidSetting, text)
        for quality, text in (
            (Quality(latency=-0.5), "quality.latency must be from 0 to 1000000, not -0.5"),
            (Quality(latency=1000000.01), "quality.latency must be from 0 to 1000000, not 1000000.01"),
            (Quality(latency=NAN), "quality.latency must be from 0 to 1000000, not nan"),
            (Quality(latency=-1.0, jitter=-2.0, loss=-3.0), "quality.latency must be from 0 to 1000000, not -1.0"),
            (Quality(jitter=-2.0, loss=-3.0), "quality.jitter must be from 0 to 1000000, not -2.0"),
            (Quality(jitter=float("inf")), "quality.jitter must be from 0 to 1000000, not inf"),
            (Quality(loss=-0.001), "quality.loss must be from 0 to 1, not -0.001"),
            (Quality(loss=1.0000000001), "quality.loss must be from 0 to 1, not 1.0000000001"),
            (Quality(loss=NAN), "quality.loss must be from 0 to 1, not nan"),
        )
    ),
    *(
        (assign("deadline_ns", value), InvalidSetting, f"deadline_ns must be from 0 to 2**63 - 2, not {value}")
        for value in (-1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30)
    ),
    (assign("deadline_ns", 1.0), TypeError, "deadline_ns must be int or None, not float"),
    (assign("deadline_ns", "9"), TypeError, "deadline_ns must be int or None, not str"),
    # Methods of a record
    *(
        (telling(method, value), error, text)
        for method in ("touch", "heartbeat")
        for value, error, text in (
            (1.0, TypeError, "now_ns must be int or None, not float"),
            ("9", TypeError, "now_ns must be int or None, not str"),
            (2**63, OverflowError, "now_ns does not fit 64 bits"),
            (-(2**63) - 1, OverflowError, "now_ns does not fit 64 bits"),
        )
    ),
    *(
        (telling(method, *args), error, text)
        for method in ("received", "sent")
        for args, error, text in (
            ((1.0,), TypeError, "nbytes must be int, not float"),
            ((None,), TypeError, "nbytes must be int, not NoneType"),
            ((-1,), InvalidSetting, "nbytes must be 0 or more, not -1"),
            ((2**63,), OverflowError, "nbytes does not fit 64 bits"),
            ((1, "1"), TypeError, "messages must be int, not str"),
            ((1, -2), InvalidSetting, "messages must be 0 or more, not -2"),
            ((1, 2**63), OverflowError, "messages does not fit 64 bits"),
            ((-1, "1"), InvalidSetting, "nbytes must be 0 or more, not -1"),
            (("1", -1), TypeError, "nbytes must be int, not str"),
        )
    ),
    *(
        (telling("failed", value), InvalidSetting, f"direction must be 'in' or 'out', not {value!r}")
        for value in ("sideways", "", "IN", "inn", None, 5)
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS, ids=[f"{number}" for number in range(len(BAD_CALLS))])
def test_wrong_call_raises_its_text_and_changes_nothing(
    world: SimpleNamespace, call: Call, error: type[Exception], text: str
) -> None:
    before = registry_state(world.registry), registry_state(world.other), record_state(world.gone)
    with pytest.raises(error) as caught:
        call(world)
    assert type(caught.value) is error
    assert str(caught.value) == text
    assert (registry_state(world.registry), registry_state(world.other), record_state(world.gone)) == before
    assert world.registry["a"] is world.record
    assert_consistent(world.registry)


def test_errors_carry_their_facts_as_fields(world: SimpleNamespace) -> None:
    with pytest.raises(InvalidSetting) as setting:
        world.registry.due(9, limit=-7)
    assert (setting.value.name, setting.value.value, setting.value.requirement) == ("limit", -7, "1 or more")
    with pytest.raises(LimitExceeded) as limit:
        world.record.tags = many(3)
    assert (limit.value.what, limit.value.limit) == ("tags of one connection", 2)
    with pytest.raises(LimitExceeded) as limit:
        world.registry.add("new", groups=many(3))
    assert (limit.value.what, limit.value.limit) == ("groups of one connection", 2)
    with pytest.raises(UnknownConnection) as unknown:
        world.registry["b"]
    assert unknown.value.client_id == "b"
    with pytest.raises(DuplicateConnection) as duplicate:
        world.registry.add("a")
    assert duplicate.value.client_id == "a"
    with pytest.raises(ForeignRecord) as foreign:
        world.registry.remove(world.foreign)
    assert foreign.value.client_id == "foreign"
    with pytest.raises(DetachedRecord) as detached:
        world.gone.conn = None
    assert detached.value.client_id == "gone"


# One wrong value for each argument of add that is checked, in the order of its signature.
WRONG_FIELDS: dict[str, tuple[Any, str]] = {
    "client_id": ("", "client id is empty"),
    "user_id": ("", "user id is empty"),
    "device_type": ("", "device type is empty"),
    "permissions": ("p", "permissions must be an iterable of str, not str"),
    "tags": ({"": ""}, "tag key is empty"),
    "metadata": ({"": ""}, "metadata key is empty"),
    "extensions": ({"": ""}, "extension key is empty"),
    "groups": ([""], "group name is empty"),
    "status": (1, "status must be a ConnectionStatus, not int"),
    "on_duplicate": ("keep", "on_duplicate must be 'reject' or 'replace', not 'keep'"),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(WRONG_FIELDS, 2)))
def test_arguments_of_add_are_checked_in_the_order_of_the_signature(
    world: SimpleNamespace, first: str, second: str
) -> None:
    fields = {"client_id": "a"} | {name: WRONG_FIELDS[name][0] for name in (second, first)}
    with pytest.raises((TypeError, ValueError)) as caught:
        world.registry.add(**fields)
    assert str(caught.value) == WRONG_FIELDS[first][1]


WRONG_SETTINGS: dict[str, tuple[Any, str]] = {
    "shards": (3, f"{SHARDS}3"),
    "max_id_bytes": (0, "max_id_bytes must be 1 or more, not 0"),
    "max_name_bytes": (0, "max_name_bytes must be 1 or more, not 0"),
    "max_tags": (-1, "max_tags must be 0 or more, not -1"),
    "max_groups": (-1, "max_groups must be 0 or more, not -1"),
    "record_type": (int, RECORD_TYPE),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(WRONG_SETTINGS, 2)))
def test_settings_of_a_registry_are_checked_in_the_order_of_the_signature(
    impl: Implementation, first: str, second: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        impl.Registry(**{name: WRONG_SETTINGS[name][0] for name in (second, first)})
    assert str(caught.value) == WRONG_SETTINGS[first][1]


WRONG_FILTERS: dict[str, tuple[Any, str]] = {
    "size": (0, "size must be 1 or more, not 0"),
    "group": (5, "group name must be str, not int"),
    "user": (5, "user id must be str, not int"),
    "tag": (5, f"{NO_TAG}int"),
    "status": (5, "status must be a ConnectionStatus, not int"),
    "device_type": (5, "device type must be str, not int"),
    "not_group": ([0.5], "group name must be str, not float"),
    "not_user": ([0.5], "user id must be str, not float"),
    "not_tag": ([0.5], f"{NO_TAG}float"),
    "not_status": ([0.5], "status must be a ConnectionStatus, not float"),
    "not_device_type": ([0.5], "device type must be str, not float"),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(WRONG_FILTERS, 2)))
def test_filters_are_checked_in_the_order_of_the_signature(impl: Implementation, first: str, second: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        impl.Registry().batches(**{name: WRONG_FILTERS[name][0] for name in (second, first)})
    assert str(caught.value) == WRONG_FILTERS[first][1]
    if first != "size":
        with pytest.raises(TypeError) as caught:
            impl.Registry().select(**{name: WRONG_FILTERS[name][0] for name in (second, first)})
        assert str(caught.value) == WRONG_FILTERS[first][1]


def test_bool_is_taken_as_an_int(impl: Implementation, clock: FakeClock) -> None:
    registry = impl.Registry(True, max_id_bytes=True, max_tags=False, clock=clock)
    assert (registry.shards, registry.max_id_bytes, registry.max_tags) == (1, 1, 0)
    record = registry.add("a")
    record.received(True, True)
    record.touch(True)
    record.deadline_ns = True
    assert (record.bytes_in, record.messages_in, record.last_active_ns, record.deadline_ns) == (1, 1, 1, 1)
    assert registry.due(True, True) == [record]
    assert list(registry.batches(True)) == [[record]]


def test_every_argument_can_be_given_by_its_name(impl: Implementation) -> None:
    registry = impl.Registry(shards=8)
    record = registry.add(client_id="a", conn="conn")
    assert registry.get(client_id="b", default="none") == "none"
    assert registry.get_many(client_ids=["a"]) == [record]
    assert registry.shard_of(client_id="a") == registry.shard_of("a")
    assert registry.join(meta=record, group="g") is True
    assert registry.group(name="g") == [record]
    assert registry.leave(meta=record, group="g") is True
    assert registry.by_user(user_id="u") == []
    filters = dict.fromkeys(Filters.__annotations__)
    assert list(registry.batches(size=1, **filters)) == [[record]]
    assert registry.for_each(fn=lambda record: None, **filters) == 1
    assert registry.select(**filters) == [record]
    record.touch(now_ns=3)
    record.heartbeat(now_ns=4)
    record.received(nbytes=5, messages=1)
    record.sent(nbytes=6, messages=1)
    record.failed(direction="in")
    record.deadline_ns = 5
    assert registry.due(now=5, limit=1) == [record]
    assert (record.last_heartbeat_ns, record.bytes_in, record.bytes_out, record.errors_in) == (4, 5, 6, 1)
    assert registry.remove(client_id="a") is record


VALID_VALUES: dict[str, Any] = {
    "conn": "other",
    "session": "other",
    "device_info": "other",
    "user_id": "other",
    "device_type": "other",
    "status": ConnectionStatus.ONLINE,
    "permissions": ["other"],
    "tags": {"other": ""},
    "metadata": {"other": 1},
    "extensions": {"other": 1},
    "quality": Quality(1.0, 1.0, 1.0),
    "deadline_ns": 9,
}
INVALID_VALUES: dict[str, Any] = {
    "user_id": "",
    "device_type": 5,
    "status": 1,
    "permissions": "other",
    "tags": {"": ""},
    "metadata": None,
    "extensions": {"": 1},
    "quality": Quality(loss=2.0),
    "deadline_ns": -1,
}


@pytest.mark.parametrize("attribute", VALID_VALUES)
def test_assigning_to_a_detached_record_is_an_error(world: SimpleNamespace, attribute: str) -> None:
    before = record_state(world.gone)
    with pytest.raises(DetachedRecord) as caught:
        setattr(world.gone, attribute, VALID_VALUES[attribute])
    assert str(caught.value) == "the record of 'gone' was removed from its registry"
    assert record_state(world.gone) == before
    assert_consistent(world.registry)


@pytest.mark.parametrize("attribute", INVALID_VALUES)
def test_value_is_checked_before_attachment(world: SimpleNamespace, attribute: str) -> None:
    before = record_state(world.gone)
    with pytest.raises((TypeError, ValueError)) as caught:
        setattr(world.gone, attribute, INVALID_VALUES[attribute])
    with pytest.raises(type(caught.value)) as attached:
        setattr(world.record, attribute, INVALID_VALUES[attribute])
    assert str(caught.value) == str(attached.value)
    assert record_state(world.gone) == before


class Broken(Mapping[str, str]):
    """A mapping that gives one pair and then fails."""

    def __getitem__(self, key: str) -> str:
        return "v"

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[str]:
        yield "k"
        raise LookupError("broken")


def broken() -> Iterator[str]:
    yield "k"
    raise LookupError("broken")


@pytest.mark.parametrize(
    "fields",
    [
        lambda: {"permissions": broken()},
        lambda: {"tags": Broken()},
        lambda: {"metadata": Broken()},
        lambda: {"extensions": Broken()},
        lambda: {"groups": broken()},
    ],
    ids=["permissions", "tags", "metadata", "extensions", "groups"],
)
@pytest.mark.parametrize("client_id", ["new", "a"])
def test_exception_of_an_argument_comes_through_and_nothing_changes(
    world: SimpleNamespace, fields: Callable[[], dict[str, Any]], client_id: str
) -> None:
    before = registry_state(world.registry)
    with pytest.raises(LookupError, match="broken"):
        world.registry.add(client_id, on_duplicate="replace", **fields())
    assert registry_state(world.registry) == before
    attribute, value = next(iter(fields().items()))
    if attribute != "groups":
        with pytest.raises(LookupError, match="broken"):
            setattr(world.record, attribute, value)
    assert registry_state(world.registry) == before
    assert_consistent(world.registry)


def test_exception_while_ids_are_read_comes_through(world: SimpleNamespace) -> None:
    with pytest.raises(LookupError, match="broken"):
        world.registry.get_many(broken())
    with pytest.raises(TypeError):
        world.registry.get_many(5)
    assert world.registry.get_many(["a"]) == [world.record]


class Once(Mapping[str, str]):
    """A mapping whose values change each time they are read."""

    def __init__(self) -> None:
        self.reads = 0

    def __getitem__(self, key: str) -> str:
        if key != "k":
            raise KeyError(key)
        self.reads += 1
        return f"read {self.reads}"

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(("k",))


def test_arguments_are_read_once(impl: Implementation) -> None:
    registry = impl.Registry(8)
    record = registry.add(
        "a", permissions=iter(["p", "q"]), groups=iter(["g", "h"]), tags=Once(), metadata=Once(), extensions=Once()
    )
    assert record.permissions == {"p", "q"}
    assert record.groups == {"g", "h"}
    assert record.tags == record.metadata == record.extensions == {"k": "read 1"}
    assert list(registry.batches(tag=("k", "read 1"))) == [[record]]
    record.tags = Once()
    assert list(registry.batches(tag=("k", "read 1"))) == [[record]]
    assert registry.get_many(iter(["a", "b", "a"])) == [record, None, record]
    assert_consistent(registry)


def test_duplicate_is_found_after_the_arguments_were_read(impl: Implementation) -> None:
    registry = impl.Registry(8)

    def permissions() -> Iterator[str]:
        registry.add("a", user_id="inner")
        yield "p"

    with pytest.raises(DuplicateConnection):
        registry.add("a", user_id="outer", permissions=permissions())
    assert registry["a"].user_id == "inner"
    assert registry.by_user("outer") == []
    assert_consistent(registry)


def test_record_removed_while_its_new_value_is_read_is_detached(impl: Implementation) -> None:
    registry = impl.Registry(8)
    record = registry.add("a", permissions=["p"])

    def permissions() -> Iterator[str]:
        registry.remove("a")
        yield "q"

    with pytest.raises(DetachedRecord):
        record.permissions = permissions()
    assert record.permissions == {"p"}
    assert_consistent(registry)


def test_permissions_are_checked_whatever_they_are_equal_to(registry: Any) -> None:
    class Alike:
        """Equal to a permission, and none."""

        def __hash__(self) -> int:
            return hash("p")

        def __eq__(self, other: object) -> bool:
            return other == "p"

    record = registry.add("a", permissions=["p"])
    assert frozenset([Alike()]) == record.permissions
    with pytest.raises(TypeError, match="permission must be str, not Alike"):
        registry.add("b", permissions=frozenset([Alike()]))
    with pytest.raises(TypeError, match="permission must be str, not Alike"):
        record.permissions = frozenset([Alike()])
