"""The record of one connection: its fields, its times on a fake clock, its counters, and what is left once detached."""

from __future__ import annotations

import copy
import pickle
import struct
from collections import UserDict
from types import MappingProxyType
from typing import Any

import pytest

from tests.conftest import FakeClock, Implementation
from tests.core.state import assert_consistent, record_state
from wsfast.connection import ConnectionStatus, Quality

READ_ONLY = [
    "client_id",
    "registry",
    "attached",
    "groups",
    "created",
    "last_active",
    "last_heartbeat",
    "created_ns",
    "last_active_ns",
    "last_heartbeat_ns",
    "idle",
    "messages_in",
    "messages_out",
    "bytes_in",
    "bytes_out",
    "errors_in",
    "errors_out",
]
# Where an implementation might keep "never" or "not yet", and where arithmetic in 64 bits ends.
CORNERS_NS = [0, 1, -1, 2**31, 2**32, 2**53 + 1, -(2**62), 2**63 - 2, 2**63 - 1, -(2**63) + 1, -(2**63)]


@pytest.fixture
def record(registry: Any) -> Any:
    return registry.add("a")


def single(value: float) -> float:
    """*value* in single precision."""
    return struct.unpack("f", struct.pack("f", value))[0]


def test_record_is_made_by_a_registry_only(impl: Implementation) -> None:
    subclass = type("Record", (impl.ConnectionMeta,), {"__slots__": ()})
    for record_type in (impl.ConnectionMeta, subclass):
        with pytest.raises(TypeError):
            record_type()
        with pytest.raises(TypeError):
            record_type("a")
        with pytest.raises(TypeError):
            record_type.__new__(record_type)


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_attribute_cannot_be_assigned(record: Any, name: str) -> None:
    before = record_state(record)
    with pytest.raises(AttributeError):
        setattr(record, name, getattr(record, name))
    assert record_state(record) == before


def test_record_has_no_room_for_other_attributes(record: Any) -> None:
    with pytest.raises(AttributeError):
        record.colour = "red"
    assert not hasattr(record, "__dict__")


def test_records_compare_and_hash_by_identity(impl: Implementation) -> None:
    one, other = impl.Registry(1), impl.Registry(1)
    a, b = one.add("a"), other.add("a")
    assert a == a
    assert a != b
    assert len({a, b, one["a"]}) == 2
    before = hash(a)
    one.remove(a)
    assert hash(a) == before
    assert a != one.add("a")


@pytest.mark.parametrize("name", ["conn", "session", "device_info"])
def test_any_object_can_be_kept(record: Any, name: str) -> None:
    for value in (object(), [], {}, 0, "", None, NotImplemented, float("nan")):
        setattr(record, name, value)
        assert getattr(record, name) is value


def test_user_id_and_device_type_can_be_changed_and_unset(record: Any) -> None:
    for name in ("user_id", "device_type"):
        for value in ("one", "two", "two", None, None, "字"):
            setattr(record, name, value)
            assert getattr(record, name) == value


def test_status_takes_every_status(record: Any) -> None:
    for status in ConnectionStatus:
        record.status = status
        assert record.status is status
        assert record.attached is True


def test_permissions_are_a_frozenset_whatever_was_given(record: Any) -> None:
    for value in (["p", "q", "p"], {"q", "p"}, frozenset(("p", "q")), ("p", "q"), {"p": 1, "q": 2}, iter(["p", "q"])):
        record.permissions = value
        assert type(record.permissions) is frozenset
        assert record.permissions == {"p", "q"}
    record.permissions = []
    assert record.permissions == frozenset()


def test_equal_permissions_are_stored_once(registry: Any) -> None:
    a = registry.add("a", permissions=["read", "write"])
    b = registry.add("b", permissions={"write", "read"})
    c = registry.add("c")
    c.permissions = ("write", "read", "write")
    assert a.permissions is b.permissions is c.permissions
    registry.remove("a")
    registry.remove("b")
    assert a.permissions == b.permissions == c.permissions == {"read", "write"}


def test_permissions_do_not_follow_the_set_they_came_from(record: Any) -> None:
    given = {"p"}
    record.permissions = given
    given.add("q")
    assert record.permissions == {"p"}


@pytest.mark.parametrize("name", ["tags", "metadata", "extensions"])
def test_any_mapping_can_be_assigned(record: Any, name: str) -> None:
    for value in ({"k": "v"}, MappingProxyType({"k": "v"}), UserDict(k="v")):
        setattr(record, name, value)
        assert getattr(record, name) == {"k": "v"}
    setattr(record, name, {})
    assert getattr(record, name) == {}


@pytest.mark.parametrize("name", ["tags", "metadata"])
def test_read_only_mapping_never_changes(registry: Any, name: str) -> None:
    given = {"k": "v"}
    record = registry.add("a", **{name: given})
    first = getattr(record, name)
    assert type(first) is MappingProxyType
    given["k"] = "changed"
    assert first == getattr(record, name) == {"k": "v"}
    with pytest.raises(TypeError):
        first["k"] = "changed"
    second = {"l": "w"}
    setattr(record, name, second)
    second["l"] = "changed"
    assert getattr(record, name) == {"l": "w"}
    assert first == {"k": "v"}
    registry.remove(record)
    assert first == {"k": "v"}
    assert type(getattr(record, name)) is MappingProxyType


def test_metadata_keeps_the_objects_given(record: Any) -> None:
    value: list[int] = []
    record.metadata = {"k": value, "none": None}
    assert record.metadata["k"] is value
    assert record.metadata == {"k": [], "none": None}


def test_order_of_mappings_is_kept(record: Any) -> None:
    given = {key: key for key in ("z", "a", "m", "b")}
    record.metadata = record.extensions = given
    assert list(record.metadata) == list(record.extensions) == ["z", "a", "m", "b"]


def test_extensions_are_one_dict_that_can_be_changed(record: Any) -> None:
    extensions = record.extensions
    assert type(extensions) is dict
    extensions["k"] = 1
    assert record.extensions is extensions
    assert record.extensions == {"k": 1}
    given = {"l": 2}
    record.extensions = given
    assert record.extensions == given
    assert record.extensions is not given
    record.extensions["m"] = 3
    assert given == {"l": 2}
    assert extensions == {"k": 1}


def test_extensions_given_to_add_are_copied(registry: Any) -> None:
    given = {"k": 1}
    record = registry.add("a", extensions=given)
    record.extensions["l"] = 2
    assert given == {"k": 1}
    assert record.extensions == {"k": 1, "l": 2}


def test_extensions_of_a_detached_record_are_a_new_empty_dict_each_time(registry: Any) -> None:
    record = registry.add("a", extensions={"k": 1})
    registry.remove(record)
    record.extensions["l"] = 2
    assert record.extensions == {}
    assert type(record.extensions) is dict
    assert record.extensions is not record.extensions


def test_quality_is_kept_in_single_precision(record: Any) -> None:
    given = Quality(latency=0.1, jitter=1 / 3, loss=0.7)
    record.quality = given
    assert type(record.quality) is Quality
    assert record.quality == Quality(*map(single, given))
    assert record.quality != given
    record.quality = Quality()
    assert record.quality == (0.0, 0.0, 0.0)


def test_quality_may_be_at_the_ends_of_its_ranges(record: Any) -> None:
    for quality in (Quality(1e6, 1e6, 1.0), Quality(0.0), Quality(10**6, 0, 1), Quality(5e-324, 1e-45, 1e-45)):
        record.quality = quality
        assert record.quality == Quality(*map(single, quality))
        assert {type(value) for value in record.quality} == {float}


def test_deadline_can_be_anything_from_0_to_the_end(record: Any) -> None:
    for value in (0, 1, 2**31, 2**53 + 1, 2**63 - 2, None, None, 5):
        record.deadline_ns = value
        assert record.deadline_ns == value


def test_times_of_a_new_record_are_now(registry: Any, clock: FakeClock) -> None:
    record = registry.add("a")
    assert record.created_ns == record.last_active_ns == clock.now
    assert record.created == record.last_active == pytest.approx(clock.wall(), abs=1e-6)
    assert record.idle == 0.0
    assert {type(record.created), type(record.last_active), type(record.idle)} == {float}
    assert {type(record.created_ns), type(record.last_active_ns)} == {int}


def test_times_follow_the_clock(registry: Any, clock: FakeClock) -> None:
    created_ns, created = clock.now, clock.wall()
    record = registry.add("a")
    clock.advance(2_500_000_000)
    assert record.idle == pytest.approx(2.5)
    assert record.last_active_ns == created_ns
    record.touch()
    active_ns, active = clock.now, clock.wall()
    clock.advance(500_000_000)
    record.heartbeat()
    heartbeat_ns, heartbeat = clock.now, clock.wall()
    assert (record.last_active_ns, record.last_heartbeat_ns) == (heartbeat_ns, heartbeat_ns)
    record.touch(active_ns)
    clock.advance(1_000_000_000)
    assert (record.created_ns, record.last_active_ns, record.last_heartbeat_ns) == (created_ns, active_ns, heartbeat_ns)
    assert record.created == pytest.approx(created, abs=1e-6)
    assert record.last_active == pytest.approx(active, abs=1e-6)
    assert record.last_heartbeat == pytest.approx(heartbeat, abs=1e-6)
    assert record.idle == pytest.approx(1.5)


def test_last_touch_counts_also_if_it_goes_back(record: Any, clock: FakeClock) -> None:
    record.touch(clock.now + 10)
    record.touch(clock.now - 10)
    assert record.last_active_ns == clock.now - 10
    record.heartbeat(clock.now + 20)
    record.heartbeat(clock.now - 20)
    assert record.last_heartbeat_ns == record.last_active_ns == clock.now - 20


def test_idle_is_never_negative(record: Any, clock: FakeClock) -> None:
    record.touch(clock.now + 3_000_000_000)
    assert record.idle == 0.0
    clock.advance(4_000_000_000)
    assert record.idle == pytest.approx(1.0)


@pytest.mark.parametrize("now_ns", CORNERS_NS)
def test_any_time_of_64_bits_is_kept(record: Any, clock: FakeClock, now_ns: int) -> None:
    record.touch(now_ns)
    assert record.last_active_ns == now_ns
    assert record.last_heartbeat_ns is None
    assert record.last_active == pytest.approx(clock.wall() + (now_ns - clock.now) / 1e9)
    assert record.idle == pytest.approx(max(0, clock.now - now_ns) / 1e9)
    record.heartbeat(now_ns)
    assert (record.last_active_ns, record.last_heartbeat_ns) == (now_ns, now_ns)
    assert record.last_heartbeat == pytest.approx(clock.wall() + (now_ns - clock.now) / 1e9)


@pytest.mark.parametrize("start", [0, 1, 2**62, 2**63 - 10])
def test_clock_may_start_anywhere(impl: Implementation, start: int) -> None:
    clock = FakeClock(start)
    registry = impl.Registry(2, clock=clock, wall_clock=lambda: 0.0)
    record = registry.add("a")
    assert record.created_ns == record.last_active_ns == registry.now_ns() == start
    assert (record.created, record.idle) == (0.0, 0.0)
    clock.advance(5)
    record.heartbeat()
    assert record.last_heartbeat_ns == record.last_active_ns == start + 5


def test_traffic_from_the_peer_is_counted_and_a_sign_of_life(record: Any, clock: FakeClock) -> None:
    clock.advance(7)
    record.received(10)
    record.received(0)
    record.received(5, 3)
    record.received(0, 0)
    assert (record.messages_in, record.bytes_in) == (5, 15)
    assert record.last_active_ns == clock.now
    assert record.last_heartbeat_ns is None
    assert (record.messages_out, record.bytes_out) == (0, 0)


def test_traffic_to_the_peer_is_counted_and_no_sign_of_life(record: Any, clock: FakeClock) -> None:
    clock.advance(7)
    record.sent(10)
    record.sent(5, 3)
    assert (record.messages_out, record.bytes_out) == (4, 15)
    assert record.last_active_ns == record.created_ns != clock.now
    assert (record.messages_in, record.bytes_in) == (0, 0)


def test_errors_are_counted_by_direction(record: Any, clock: FakeClock) -> None:
    clock.advance(7)
    record.failed("in")
    record.failed("out")
    record.failed("out")
    assert (record.errors_in, record.errors_out) == (1, 2)
    assert record.last_active_ns == record.created_ns


def test_counters_hold_more_than_32_bits(record: Any, registry: Any) -> None:
    for _ in range(3):
        record.received(2**40, 2**33)
        record.sent(2**41, 2**34)
    assert (record.bytes_in, record.messages_in) == (3 * 2**40, 3 * 2**33)
    assert (record.bytes_out, record.messages_out) == (3 * 2**41, 3 * 2**34)
    stats = registry.stats()
    assert (stats["bytes_in"], stats["messages_out"]) == (3 * 2**40, 3 * 2**34)


def test_methods_of_a_record_return_none(record: Any) -> None:
    results = [record.touch(), record.heartbeat(), record.received(1), record.sent(1), record.failed("in")]
    assert results == [None] * 5


@pytest.fixture
def full(registry: Any, clock: FakeClock) -> Any:
    """A record with something in every field."""
    record = registry.add(
        "a",
        object(),
        user_id="u",
        device_type="ios",
        device_info=object(),
        session=object(),
        permissions=["p"],
        tags={"t": "v"},
        metadata={"m": 1},
        extensions={"x": 1},
        groups=["g"],
        status=ConnectionStatus.SUSPECT,
    )
    clock.advance(100_000_000)
    record.received(5, 2)
    record.sent(7, 3)
    record.failed("in")
    record.failed("out")
    record.heartbeat()
    record.quality = Quality(0.5, 0.25, 0.125)
    record.deadline_ns = 9
    return record


KEPT = [
    *(set(READ_ONLY) - {"registry", "attached", "groups", "idle"}),
    "user_id",
    "device_type",
    "permissions",
    "tags",
    "quality",
]
DROPPED = {
    "registry": None,
    "attached": False,
    "conn": None,
    "device_info": None,
    "session": None,
    "metadata": {},
    "extensions": {},
    "groups": frozenset(),
    "status": ConnectionStatus.OFFLINE,
    "deadline_ns": None,
}


@pytest.mark.parametrize("how", ["id", "record", "replace", "clear"])
def test_detached_record_tells_what_it_may(registry: Any, full: Any, clock: FakeClock, how: str) -> None:
    kept = {name: getattr(full, name) for name in KEPT}
    if how == "replace":
        registry.add("a", on_duplicate="replace")
    elif how == "clear":
        registry.clear()
    else:
        registry.remove("a" if how == "id" else full)
    assert {name: getattr(full, name) for name in KEPT} == kept
    assert {name: getattr(full, name) for name in DROPPED} == DROPPED
    clock.advance(2_000_000_000)
    assert full.idle == pytest.approx(2.0)
    assert_consistent(registry)


def test_late_signs_of_life_of_a_detached_record_do_nothing(registry: Any, full: Any, clock: FakeClock) -> None:
    registry.remove(full)
    before, stats = record_state(full), registry.stats()
    for call in (
        full.touch,
        lambda: full.touch(3),
        full.heartbeat,
        lambda: full.heartbeat(3),
        lambda: full.received(5),
        lambda: full.sent(5, 2),
        lambda: full.failed("in"),
        lambda: full.failed("out"),
    ):
        assert call() is None
    assert record_state(full) == before
    assert registry.stats() == stats


def test_late_signs_of_life_after_the_end_of_the_registry_do_nothing(impl: Implementation) -> None:
    registry = impl.Registry(1)
    record = registry.add("a")
    registry.remove("a")
    del registry
    record.touch()
    record.received(1)
    record.heartbeat()
    assert (record.messages_in, record.last_heartbeat_ns) == (0, None)


@pytest.mark.parametrize("attached", [True, False])
def test_record_can_be_neither_copied_nor_pickled(registry: Any, full: Any, attached: bool) -> None:
    if not attached:
        registry.remove(full)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(full, protocol)
    with pytest.raises(TypeError):
        copy.copy(full)
    with pytest.raises(TypeError):
        copy.deepcopy(full)
    assert full.attached is attached
