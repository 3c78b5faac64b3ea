"""References given back: the balance of every name, object and callback, errors included, and a quiet end.

No test here judges the size of the process. In a build that counts its live objects, the fixture of this directory
adds its own balance to every test.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wsfast.errors
from tests.conftest import Implementation
from tests.core.conftest import live_objects
from tests.core.state import DEPARTURES, assert_consistent, walk
from wsfast.connection import MISSING, ConnectionStatus

PROJECT = str(Path(wsfast.errors.__file__).parents[1])
# Without the GIL a reference count is split between threads, and what getrefcount tells is no balance.
needs_exact_counts = pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="reference counts are exact with the GIL only"
)


each_departure = pytest.mark.parametrize("depart", DEPARTURES.values(), ids=DEPARTURES.keys())


def fresh(text: str) -> str:
    """A new ``str`` object, interned nowhere."""
    return "".join(list(text))


class Objects:
    """Objects whose reference counts are watched: one for each role in a call."""

    def __init__(self) -> None:
        self.watched: dict[str, Any] = {
            name: fresh(f"{name} of this test")
            for name in ("client_id", "user_id", "device_type", "permission", "group", "tag_key", "tag_value", "key")
        } | {name: [name] for name in ("conn", "session", "device_info", "value")}

    def __getattr__(self, name: str) -> Any:
        return self.watched[name]

    def counts(self) -> dict[str, int]:
        gc.collect()
        return {name: sys.getrefcount(thing) for name, thing in self.watched.items()}

    def fields(self) -> dict[str, Any]:
        """Arguments of ``add`` that use every object but the client id."""
        return {
            "conn": self.conn,
            "user_id": self.user_id,
            "device_type": self.device_type,
            "device_info": self.device_info,
            "session": self.session,
            "permissions": [self.permission],
            "tags": {self.tag_key: self.tag_value},
            "metadata": {self.key: self.value},
            "extensions": {self.key: self.value},
            "groups": [self.group],
        }


def use_all(registry: Any, objects: Objects) -> None:
    """Pass every object through every call that takes one."""
    record = registry.add(objects.client_id, **objects.fields())
    for name, value in objects.fields().items():
        if name != "groups":
            setattr(record, name, value)
    registry.join(record, objects.tag_key)
    registry.leave(record, objects.tag_key)
    registry.join(record, objects.user_id)
    tag = objects.tag_key, objects.tag_value
    assert registry[objects.client_id] is registry.get(objects.client_id) is record
    assert objects.client_id in registry
    assert registry.get(objects.group, objects.value) is objects.value
    assert registry.get_many([objects.client_id, objects.group]) == [record, None]
    assert registry.group(objects.group) == registry.by_user(objects.user_id) == [record]
    assert walk(registry, group=objects.group, user=objects.user_id, tag=tag) == [record]
    assert walk(registry, tag=objects.tag_key) == [record]
    assert registry.select(group=[objects.group], tag=[tag, objects.tag_key], device_type=objects.device_type) == [
        record
    ]
    assert registry.select(not_group={objects.group}, not_tag=tag, not_user=[objects.user_id]) == []
    assert walk(registry, group=objects.value[0]) == []
    assert (registry.shard_of(objects.client_id), registry.shard_of(objects.value[0])) >= (0, 0)
    assert (record.client_id, record.user_id, record.device_type) == (
        objects.client_id,
        objects.user_id,
        objects.device_type,
    )
    assert list(registry.items()) == [(objects.client_id, record)]
    assert registry.groups() == {objects.group: 1, objects.user_id: 1}


def assert_balanced(impl: Implementation, use: Callable[[Any, Objects], object]) -> None:
    """``use(registry, objects)`` keeps no reference, the first time and later."""
    registry, objects = impl.Registry(4), Objects()
    start = objects.counts()
    use(registry, objects)
    assert objects.counts() == start
    for _ in range(10):
        use(registry, objects)
    assert objects.counts() == start
    del registry
    assert objects.counts() == start


@needs_exact_counts
@each_departure
def test_every_reference_is_given_back(impl: Implementation, depart: Callable[[Any, Any], object]) -> None:
    def use(registry: Any, objects: Objects) -> None:
        use_all(registry, objects)
        depart(registry, registry[objects.client_id])
        registry.clear()

    assert_balanced(impl, use)


@needs_exact_counts
def test_registry_gives_every_reference_back_at_its_end(impl: Implementation) -> None:
    objects = Objects()
    before = objects.counts()
    for _ in range(5):
        use_all(impl.Registry(4), objects)
    assert objects.counts() == before


@needs_exact_counts
def test_detached_record_gives_its_references_back_when_it_dies(impl: Implementation) -> None:
    def use(registry: Any, objects: Objects) -> None:
        before = objects.counts()
        record = registry.add(objects.client_id, **objects.fields())
        registry.remove(record)
        held = objects.counts()
        dropped = ("conn", "session", "device_info", "value", "key", "group")
        assert {name: held[name] for name in dropped} == {name: before[name] for name in dropped}

    assert_balanced(impl, use)


@needs_exact_counts
def test_replacing_gives_back_what_the_old_record_held(registry: Any) -> None:
    objects = Objects()
    registry.add("a", **objects.fields())
    before = objects.counts()
    for _ in range(20):
        registry.add("a", **objects.fields(), on_duplicate="replace")
    assert objects.counts() == before


@needs_exact_counts
def test_reassigning_gives_back_what_was_there(impl: Implementation) -> None:
    others: dict[str, Any] = dict.fromkeys(Objects().fields()) | {
        "permissions": [],
        "tags": {},
        "metadata": {},
        "extensions": {},
    }

    def use(registry: Any, objects: Objects) -> None:
        record = registry.add("a")
        for _ in range(3):
            for name, value in objects.fields().items():
                if name == "groups":
                    registry.join(record, objects.group)
                    registry.leave(record, objects.group)
                else:
                    setattr(record, name, value)
                    setattr(record, name, value)
                    setattr(record, name, others[name])
        registry.remove(record)

    assert_balanced(impl, use)


@needs_exact_counts
def test_values_that_records_share_are_kept_for_the_last_of_them_alone(registry: Any) -> None:
    objects = Objects()
    before = objects.counts()
    registry.add("other", device_type="other", permissions=["other"])
    for number in range(3):
        registry.add(f"c{number}", device_type=objects.device_type, permissions=[objects.permission])
    held = objects.counts()
    registry.remove("c0")
    registry["c1"].device_type = None
    registry["c1"].permissions = ["other"]
    assert {held[name] > before[name] for name in ("device_type", "permission")} == {True}
    registry.add("c2", on_duplicate="replace")
    assert objects.counts() == before


FAILING: dict[str, dict[str, Any]] = {
    "user": {"user_id": ""},
    "permission": {"permissions": [fresh("fine"), ""]},
    "tags": {"tags": {"k": "v", "": ""}},
    "too many tags": {"tags": {f"k{number}": "v" for number in range(65)}},
    "metadata": {"metadata": {"k": "v", "": ""}},
    "extensions": {"extensions": {"k": "v", "": ""}},
    "groups": {"groups": ["g", 5]},
    "too many groups": {"groups": [f"g{number}" for number in range(1025)]},
    "status": {"status": 1},
    "on_duplicate": {"on_duplicate": "keep"},
    "duplicate": {},
}


@needs_exact_counts
@pytest.mark.parametrize("wrong", FAILING.values(), ids=FAILING.keys())
def test_failed_add_gives_every_reference_back(impl: Implementation, wrong: dict[str, Any]) -> None:
    def use(registry: Any, objects: Objects) -> None:
        registry.add("taken", on_duplicate="replace")
        for client_id in ("taken", objects.client_id):
            if wrong or client_id == "taken":
                with pytest.raises((TypeError, ValueError)):
                    registry.add(client_id, **(objects.fields() | wrong))

    assert_balanced(impl, use)


def failing_calls(registry: Any, objects: Objects) -> list[Callable[[], object]]:
    """Calls that raise, each with watched objects."""
    record, gone = registry.add("a", on_duplicate="replace"), registry.add("gone")
    registry.remove(gone)
    return [
        lambda: registry[objects.client_id],
        lambda: registry.get_many([objects.client_id, objects.conn]),
        lambda: registry.get(objects.conn, objects.value),
        lambda: objects.conn in registry,
        lambda: registry.remove(objects.conn),
        lambda: registry.join(record, objects.conn),
        lambda: registry.join(objects.conn, objects.group),
        lambda: registry.join(gone, objects.group),
        lambda: registry.leave(gone, objects.group),
        lambda: registry.batches(group=objects.group, user=objects.user_id, tag=[objects.tag_key, objects.conn]),
        lambda: registry.batches(group=objects.group, user=objects.user_id, tag=[objects.conn]),
        lambda: registry.select(group=[objects.group, objects.conn]),
        lambda: registry.select(tag={objects.tag_key}, not_tag=[(objects.tag_key, objects.tag_value), objects.conn]),
        lambda: registry.select(device_type=objects.device_type, not_device_type=[objects.device_type, 5]),
        lambda: registry.batches(tag=(objects.tag_key, objects.conn)),
        lambda: registry.for_each(objects.conn, status=objects.value),
        lambda: registry.due(objects.conn),
        lambda: record.failed(objects.key),
        lambda: record.received(objects.conn),
        *(lambda name=name: setattr(gone, name, objects.conn) for name in ("conn", "session", "device_info")),
        *(lambda name=name: setattr(gone, name, objects.watched[name]) for name in ("user_id", "device_type")),
        lambda: setattr(gone, "permissions", [objects.permission]),
        lambda: setattr(record, "permissions", [objects.permission, objects.conn]),
        *(
            lambda record=each, name=name: setattr(record, name, {objects.key: objects.value, 5: 5})
            for each in (record, gone)
            for name in ("tags", "metadata", "extensions")
        ),
        lambda: setattr(gone, "tags", {objects.tag_key: objects.tag_value}),
        lambda: setattr(gone, "metadata", {objects.key: objects.value}),
        lambda: setattr(record, "status", objects.conn),
        lambda: setattr(record, "quality", objects.conn),
        lambda: setattr(record, "deadline_ns", objects.conn),
    ]


@needs_exact_counts
def test_failed_calls_give_every_reference_back(impl: Implementation) -> None:
    def use(registry: Any, objects: Objects) -> None:
        for call in failing_calls(registry, objects):
            with pytest.raises((TypeError, ValueError, KeyError, RuntimeError)):
                call()

    assert_balanced(impl, use)


REFUSED = object()
"""A value that no validator here lets through."""


class Listening:
    """An engine with a validator and a notifier for every key, which see watched objects and keep none."""

    def __init__(self, impl: Implementation, registry: Any) -> None:
        self.answers = 0
        self.engine = impl.Metadata(registry, max_keys=2, max_queued=2, publish=self.publish)
        self.engine.add_validator(self.validate)
        self.engine.add_notifier(self.notify)

    def validate(self, key: str, value: Any) -> Any:
        if value is REFUSED:
            raise ValueError(key)
        return value

    def notify(self, change: Any) -> None:
        if self.answers:
            self.answers -= 1
            self.engine.set(change.conn, change.key, change.old)
            raise LookupError(change)

    def publish(self, changes: Any) -> None:
        raise LookupError(changes)


@needs_exact_counts
@each_departure
def test_changes_of_metadata_give_every_reference_back(
    impl: Implementation, depart: Callable[[Any, Any], object]
) -> None:
    def use(registry: Any, objects: Objects) -> None:
        listening = Listening(impl, registry)
        engine = listening.engine
        record = registry.add(objects.client_id, groups=["g"])
        others = [registry.add(f"other {number}", groups=["g"]) for number in range(3)]
        engine.set(objects.client_id, objects.key, objects.value)
        listening.answers = 3
        engine.update(record, {objects.key: objects.session, objects.group: objects.value, fresh("no such"): MISSING})
        engine.replace(record, {objects.group: objects.device_info}, if_version=record.version)
        assert engine.get(record, objects.group, objects.conn) is engine.snapshot(record).metadata[objects.group]
        assert engine.check({objects.key: objects.value}) == {objects.key: objects.value}
        assert engine.update_where({objects.key: objects.value}, group="g").changed == 4
        engine.delete(record, objects.key)
        assert engine.update_where({objects.key: objects.value}, to=[record, *others, "nobody"]).changed == 4
        engine.run_on(-1, None)
        for value in (objects.value, objects.conn, objects.session):
            engine.set(record, objects.key, value)  # which stay in the queue, or find no room there
        depart(registry, record)
        registry.clear()

    assert_balanced(impl, use)


@needs_exact_counts
def test_rejected_changes_of_metadata_give_every_reference_back(impl: Implementation) -> None:
    def use(registry: Any, objects: Objects) -> None:
        engine = Listening(impl, registry).engine
        record, gone = registry.add(objects.client_id), registry.add("gone")
        registry.remove(gone)
        for call in (
            lambda: engine.set("nobody", objects.key, objects.value),
            lambda: engine.set(gone, objects.key, objects.value),
            lambda: engine.set(objects.conn, objects.key, objects.value),
            lambda: engine.set(record, objects.conn, objects.value),
            lambda: engine.set(record, objects.key, objects.value, if_version=5),
            lambda: engine.set(record, objects.key, objects.value, if_version=objects.conn),
            lambda: engine.update(record, {objects.key: objects.value, objects.group: REFUSED}),
            lambda: engine.update(record, {objects.key: objects.value, "": objects.session}),
            lambda: engine.replace(record, dict.fromkeys((objects.key, objects.group, objects.user_id), objects.value)),
            lambda: engine.check({objects.key: objects.value, objects.group: [objects.session] * 100_000}),
            lambda: engine.update_where({objects.key: objects.value}, to=[objects.conn]),
            lambda: engine.update_where({objects.key: REFUSED}),
            lambda: engine.add_validator(objects.conn),
            lambda: engine.add_notifier(print, key=objects.key, prefix=objects.group),
        ):
            with pytest.raises((TypeError, ValueError, KeyError, RuntimeError)):
                call()
        registry.clear()

    assert_balanced(impl, use)


@needs_exact_counts
def test_callbacks_are_given_back(registry: Any) -> None:
    for number in range(300):
        registry.add(f"c{number}", groups=["g"])

    def count(record: Any) -> None:
        counted.append(record)

    def stop(record: Any) -> bool:
        return False

    def fail(record: Any) -> None:
        raise LookupError

    counted: list[Any] = []
    before = [sys.getrefcount(callback) for callback in (count, stop, fail)]
    for filters in ({}, {"group": "g"}, {"status": ConnectionStatus.ONLINE}):
        assert registry.for_each(count, **filters) == 300
        assert registry.for_each(stop, **filters) == 1
        with pytest.raises(LookupError):
            registry.for_each(fail, **filters)
    counted.clear()
    gc.collect()
    assert [sys.getrefcount(callback) for callback in (count, stop, fail)] == before


@needs_exact_counts
def test_abandoned_walks_give_their_records_back(registry: Any) -> None:
    records = [
        registry.add(f"c{number}", groups=["g"], user_id="u", tags={"t": "v"}, session=[number]) for number in range(50)
    ]
    before = [sys.getrefcount(record) for record in records]
    for filters in ({}, {"group": "g"}, {"user": "u"}, {"tag": "t"}, {"status": ConnectionStatus.ONLINE}):
        for size in (1, 7, 100):
            unstarted, started = registry.batches(size, **filters), registry.batches(size, **filters)
            assert len(next(started)) == min(size, 50)
            del unstarted, started
    walks = [iter(registry), iter(registry.values()), iter(registry.items())]
    assert all(next(each) for each in walks)
    del walks
    gc.collect()
    assert [sys.getrefcount(record) for record in records] == before


@needs_exact_counts
def test_lookups_give_their_records_back(registry: Any) -> None:
    record = registry.add("a", groups=["g"], user_id="u", tags={"t": "v"})
    record.deadline_ns = 1
    before = sys.getrefcount(record)
    for _ in range(100):
        registry.get("a")
        registry["a"].touch()
        registry.get_many(["a", "b", "a"])
        registry.group("g")
        registry.by_user("u")
        registry.due(5)
        walk(registry, tag="t")
        assert "a" in registry
        registry.remove("b")
    assert sys.getrefcount(record) == before


def test_cycles_of_use_leave_a_consistent_empty_registry(registry: Any) -> None:
    for turn in range(30):
        for number in range(100):
            record = registry.add(
                f"c{number}",
                object(),
                user_id=f"u{number % 7}",
                groups=[f"g{number % 5}", f"turn-{turn}"],
                tags={"plan": str(number % 3), f"turn-{turn}": ""},
                permissions=[f"p{number % 4}", f"turn-{turn}"],
                metadata={"k": turn},
            )
            record.extensions["record"] = record
            registry.join(record, "lobby")
            record.tags = {"plan": "other"}
            record.user_id = f"turn-{turn}"
            record.deadline_ns = number
        for number in range(0, 100, 2):
            registry.remove(f"c{number}")
        for number in range(1, 100, 4):
            registry.add(f"c{number}", on_duplicate="replace")
        assert registry.clear() == 50
    del record
    assert registry.groups() == {}
    assert (registry.stats()["users"], registry.stats()["tags"]) == (0, 0)
    assert_consistent(registry)


def test_live_objects_are_counted_where_the_build_counts_them(native: Implementation) -> None:
    before = live_objects()
    registry = native.Registry(2)
    record = registry.add("a", groups=["g"], tags={"t": "v"}, permissions=["p"])
    during = live_objects()
    assert (before is None) is (during is None)
    if before is not None and during is not None:
        assert during["records"] == before["records"] + 1
        assert all(during[name] >= count for name, count in before.items())
    del registry, record
    gc.collect()
    assert live_objects() == before


AT_EXIT = """
import sys, threading

class Connection:
    def __init__(self, registry, client_id):
        self.registry, self.client_id = registry, client_id
    def __del__(self):
        if self.registry is not None:
            self.registry.remove(self.client_id)

registry = Registry(8)
records = []
for number in range(300):
    record = registry.add(f"c{number}", user_id="u", groups=["g", f"g{number}"], tags={"t": "v"}, permissions=["p"],
                          metadata={"k": []}, session=Connection(None, ""))
    record.deadline_ns = number
    record.extensions["self"] = record
    records.append(record)
registry.owner = registry
cyclic = Registry(2)
holder = Connection(cyclic, "a")
cyclic.add("a", holder, session=cyclic)
walks = [iter(registry), registry.batches(7), registry.batches(7, group="g"), iter(registry.items())]
for walk in walks:
    next(walk)
registry.remove("c3")
gone = registry["c4"]
registry.remove(gone)
second = Registry(1)
second.add("a", "conn", user_id="u")
del records[100:]
print(len(registry), len(second), len(cyclic))
"""


@pytest.mark.parametrize("options", [[], ["-X", "dev"]], ids=["plain", "dev"])
def test_interpreter_ends_quietly_with_records_alive(impl: Implementation, options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *options, "-W", "error", "-c", impl.source + AT_EXIT],
        env=os.environ | {"PYTHONPATH": PROJECT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", "298 1 1")
