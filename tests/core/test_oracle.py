"""The implementations against each other: the same random operations, the same results, the same state after each.

Alphabets are small, so that ids, names and limits collide. The promise of walks, which is the same for all but leaves
their order open, is checked for each implementation by itself: walks stay open while the other operations go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import FakeClock, Implementation
from tests.core.state import SHARD_COUNTERS, assert_consistent, record_state, registry_state
from wsfast.connection import MISSING, ConnectionStatus, Quality, Snapshot, UpdateReport
from wsfast.errors import InvalidSetting

FOREIGN = -1
"""The handle of a record of another registry."""
STEP_NS = 100_000_000


def mostly(good: st.SearchStrategy[Any], bad: list[Any]) -> st.SearchStrategy[Any]:
    """Values of *good*, and one of *bad* now and then."""
    return st.integers(0, 11).flatmap(lambda chance: st.sampled_from(bad) if chance == 11 else good)


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


good_ids = st.sampled_from(["a", "b", "c", "dd", "é", "字", "😀", "a" * 16])
ids = mostly(good_ids, ["", "a" * 17, "é" * 9, "\ud800", 5, None, b"a"])
good_names = st.sampled_from(["g", "h", "é", "字😀", "g" * 12])
names = mostly(good_names, ["", "g" * 13, "字" * 5, "g\udfff", 5, b"g"])
user_ids = st.none() | names
tag_values = mostly(st.sampled_from(["", "v", "w", "é"]), ["v" * 13, "\ud800", 5, None])
tags = mostly(st.dictionaries(names, tag_values, max_size=3), [[("g", "v")], 5, "g"])
objects = mostly(st.dictionaries(names, st.integers(0, 3), max_size=2), [["g"], 5])
name_lists = mostly(st.lists(names, max_size=3), ["g", 5])
statuses = mostly(st.sampled_from(ConnectionStatus), [1, "ONLINE"])
numbers = st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 0.5])
qualities = mostly(
    st.builds(Quality, numbers, numbers, numbers),
    [
        Quality(-1.0),
        Quality(2e6, -1.0),
        Quality(0.0, 2e6),
        Quality(loss=1.5),
        Quality(loss=float("nan")),
        (0.0, 0.0, 0.0),
    ],
)
times_ns = st.integers(8, 14).map(lambda steps: steps * STEP_NS)
deadlines = mostly(st.none() | times_ns | st.just(2**63 - 2), [-1, 2**63 - 1, 2**70, 1.5, "1"])
moments = mostly(st.none() | times_ns | st.sampled_from([0, -1, 2**63 - 1, -(2**63)]), [2**63, 1.5, "1"])
counts = mostly(st.integers(0, 9), [-1, 2**63, 1.5, None])
sizes = mostly(st.sampled_from([1, 2, 3, 100]), [0, -1, 2**63, "1", 1.5])
tag_filters = mostly(
    good_names | st.tuples(good_names, st.sampled_from(["", "v", "w"])), ["", ("g",), ("g", 5), ["g", "v"]]
)
filters = st.fixed_dictionaries({}, optional={"group": names, "user": names, "tag": tag_filters, "status": statuses})


def several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of *values*, or some of them, in all ways that filters allow and in one that they do not."""
    some = st.lists(values, max_size=2)
    return mostly(st.none() | values | some | some.map(_hashed), [(), ("g", "v", "w"), {"g": "v"}])


def _hashed(values: list[Any]) -> Any:
    """A set, unless there is something in it that is equal to something else of another type, or cannot be hashed."""
    return frozenset(values) if all(isinstance(each, str | ConnectionStatus) for each in values) else values


many_filters = st.fixed_dictionaries(
    {},
    optional={
        "group": several(names),
        "user": user_ids,
        "tag": several(tag_filters),
        "status": st.none() | statuses,
        "device_type": user_ids,
        "not_group": several(names),
        "not_user": several(names),
        "not_tag": several(tag_filters),
        "not_status": several(statuses),
        "not_device_type": several(names),
    },
)
metadata_keys = mostly(
    st.sampled_from(["k", "l", "é", "v.odd", "v.even", "k" * 8]), ["", "k" * 9, "é" * 5, "k" * 12, "\ud800", 5, None]
)
metadata_values = mostly(
    st.integers(0, 5) | st.sampled_from(["", "x" * 8, "x" * 20, [1, "x"], None]),
    ["x" * 21, [["x"] * 20], MISSING, _nested(33), {"k": 2**160}],
)
metadata_changes = mostly(
    st.dictionaries(metadata_keys, metadata_values | st.just(MISSING), max_size=3), [[("k", 1)], 5]
)
good_changes = st.dictionaries(
    st.sampled_from(["k", "l", "é", "v.odd", "v.even"]),
    st.integers(1, 5) | st.just("x" * 8) | st.just(MISSING),
    max_size=3,
)
conditions = mostly(st.none() | st.integers(0, 4), [-1, True, 2**70, "0", 1.0])
records = mostly(st.integers(0, 4), [FOREIGN])

OPTIONAL_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "conn": st.sampled_from(["conn", None]),
    "user_id": user_ids,
    "device_type": user_ids,
    "device_info": st.sampled_from(["info", None]),
    "session": st.sampled_from(["session", None]),
    "permissions": name_lists,
    "tags": tags,
    "metadata": objects,
    "extensions": objects,
    "groups": name_lists,
    "status": statuses,
    "on_duplicate": mostly(st.sampled_from(["reject", "replace"]), ["keep", None]),
}
ASSIGNED: dict[str, st.SearchStrategy[Any]] = {
    name: values for name, values in OPTIONAL_FIELDS.items() if name not in ("groups", "on_duplicate")
} | {"quality": qualities, "deadline_ns": deadlines}
assignments = st.sampled_from(list(ASSIGNED)).flatmap(lambda name: st.tuples(st.just(name), ASSIGNED[name]))


def _be_odd(key: str, value: Any) -> None:
    if value % 2 == 0:  # which is a TypeError for some
        raise ValueError(f"{value!r} is even")


def _halve(key: str, value: Any) -> Any:
    return value // 2


def _refuse_zero(key: str, value: Any) -> Any:
    if value == 0:
        raise ValueError
    return MISSING if value == "" else None


class Side:
    """One implementation with its registry. Records are told apart by handles, which are the same on all sides."""

    def __init__(self, impl: Implementation, shards: int, clock: FakeClock) -> None:
        self.impl = impl
        settings = {"clock": clock, "wall_clock": clock.wall, "max_id_bytes": 16, "max_name_bytes": 12}
        self.registry = impl.Registry(shards, **settings, max_tags=2, max_groups=2)
        self.other = impl.Registry(1, **settings)
        self.records: dict[int, Any] = {FOREIGN: self.other.add("foreign")}
        self.handles: dict[Any, int] = {self.records[FOREIGN]: FOREIGN}
        self.heard: list[Any] = []
        self.metadata = impl.Metadata(
            self.registry,
            max_key_bytes=8,
            max_value_bytes=20,
            max_keys=3,
            max_bytes=60,
            max_cascade=2,
            publish=self.hear_many,
        )
        self.metadata.add_validator(_be_odd, key="v.odd")
        self.metadata.add_validator(_halve, prefix="v.", is_last_word=True)
        self.metadata.add_validator(_refuse_zero)
        self.metadata.add_notifier(self.hear)

    def keep(self, record: Any) -> Any:
        """Give a new record the next handle."""
        handle = len(self.records) - 1
        self.records[handle] = record
        self.handles[record] = handle
        return record

    def hear(self, change: Any) -> None:
        """Note what is announced; odd values are answered, also answers."""
        self.heard.append(
            (self.handles[change.conn], change.client_id, change.key, change.old, change.new, change.version)
        )
        if change.new in (1, 3, 5):
            self.metadata.set(change.conn, "l", change.new)

    def hear_many(self, changes: Any) -> None:
        self.heard.append((self.handles[changes[0].conn], [(change.key, change.version) for change in changes]))

    def plain(self, value: Any) -> Any:
        """*value* with its records as handles."""
        if isinstance(value, UpdateReport):
            rejected = [(self.handles[record], error.problems) for record, error in value.rejected]
            return value.changed, sorted(rejected)
        if isinstance(value, Snapshot):
            return value.version, dict(value.metadata)
        if isinstance(value, list):
            return [self.plain(each) for each in value]
        return f"record {self.handles[value]}" if isinstance(value, self.impl.ConnectionMeta) else value

    def outcome(self, call: Callable[[Side], Any]) -> tuple[Any, ...]:
        try:
            return "returned", self.plain(call(self))
        except Exception as error:
            value = error.value if isinstance(error, InvalidSetting) else None
            return "raised", type(error), str(error), [repr(each) for each in error.args], type(value)

    def news(self) -> list[Any]:
        """What was announced since the last time, connection by connection: which of them comes first is open."""
        heard, self.heard = self.heard, []
        return sorted(heard, key=lambda each: each[0])

    def attached(self) -> set[int]:
        return {self.handles[record] for record in self.registry.values()}

    def shard_of(self, record: Any) -> int:
        return self.registry.shard_of(record.client_id) if self.impl.sharded else 0


class Walk:
    """An open walk on one side, with what the promise asks of it."""

    def __init__(self, side: Side, size: int, filters: dict[str, Any]) -> None:
        self.side, self.size, self.filters = side, size, filters
        self.batches = side.registry.batches(size, **filters)
        self.seen: list[int] = []
        self.owed: set[int] | None = None
        self.allowed: set[int] | None = None
        self.was_short = self.ended = False

    def begin(self) -> None:
        """What holds from the first ``next`` on."""
        members = [record for batch in self.side.registry.batches(1, **self.filters) for (record,) in [batch]]
        self.owed = {self.side.handles[record] for record in members}
        self.allowed = set(self.owed) if self.filters else None

    def forget_the_detached(self) -> None:
        if self.owed is not None:
            self.owed &= self.side.attached()

    def advance(self) -> None:
        if self.owed is None:
            self.begin()
        batch = next(self.batches, None)
        if batch is None:
            self.ended = True
            assert self.owed is not None
            assert self.owed <= set(self.seen), f"{self.side.impl.name} left some out"
            return
        assert not self.was_short, f"{self.side.impl.name} gave a batch after a short one"
        assert 0 < len(batch) <= self.size
        self.was_short = len(batch) < self.size
        assert all(record.attached for record in batch)
        self.seen += [self.side.handles[record] for record in batch]
        assert len(self.seen) == len(set(self.seen)), f"{self.side.impl.name} yielded one twice"
        assert self.allowed is None or set(self.seen) <= self.allowed


class Comparison(RuleBasedStateMachine):
    """The same operations on all implementations."""

    def __init__(self, implementations: list[Implementation]) -> None:
        super().__init__()
        self.implementations = implementations
        self.clock = FakeClock(10 * STEP_NS)
        self.sides: list[Side] = []
        self.walks: list[list[Walk]] = []

    @initialize(shards=st.sampled_from([1, 2, 8]))
    def start(self, shards: int) -> None:
        self.sides = [Side(impl, shards, self.clock) for impl in self.implementations]

    def same(self, call: Callable[[Side], Any]) -> Any:
        """Make *call* on all sides; the outcome, which must be the same."""
        outcomes = [side.outcome(call) for side in self.sides]
        for side, outcome in zip(self.sides, outcomes, strict=True):
            assert outcome == outcomes[-1], f"{side.impl.name} differs from {self.sides[-1].impl.name}"
        note(f"-> {outcomes[-1]}")
        return outcomes[-1]

    def handle(self, pick: int) -> int:
        """The handle of one of the latest records, attached or not; the foreign one if there is none yet."""
        known = len(self.sides[0].records) - 1
        return FOREIGN if pick == FOREIGN or known == 0 else known - 1 - pick % known

    @rule(client_id=ids, fields=st.fixed_dictionaries({}, optional=OPTIONAL_FIELDS))
    def add(self, client_id: Any, fields: dict[str, Any]) -> None:
        self.same(lambda side: side.keep(side.registry.add(client_id, **fields)))

    @rule(client_id=good_ids, groups=st.lists(good_names, max_size=2), user_id=good_names)
    def add_or_replace(self, client_id: str, groups: list[str], user_id: str) -> None:
        self.same(
            lambda side: side.keep(
                side.registry.add(client_id, groups=groups, user_id=user_id, tags={"g": "v"}, on_duplicate="replace")
            )
        )

    @rule(client_id=ids)
    def remove_by_id(self, client_id: Any) -> None:
        self.same(lambda side: side.registry.remove(client_id))

    @rule(pick=records)
    def remove_by_record(self, pick: int) -> None:
        handle = self.handle(pick)
        self.same(lambda side: side.registry.remove(side.records[handle]))

    @rule(sure=st.integers(0, 3))
    def clear(self, sure: int) -> None:
        if not sure:
            self.same(lambda side: side.registry.clear())

    @rule(client_ids=mostly(st.lists(ids, max_size=12), [5]))
    def look_up_many(self, client_ids: Any) -> None:
        self.same(lambda side: side.registry.get_many(client_ids))

    @rule(client_id=ids)
    def look_up(self, client_id: Any) -> None:
        self.same(lambda side: side.registry.get(client_id, "default"))
        self.same(lambda side: client_id in side.registry)
        self.same(lambda side: side.registry[client_id])
        self.same(lambda side: side.registry.shard_of(client_id) in range(side.registry.shards))

    @rule(pick=records, group=names)
    def join(self, pick: int, group: Any) -> None:
        handle = self.handle(pick)
        self.same(lambda side: side.registry.join(side.records[handle], group))

    @rule(pick=records, group=names)
    def leave(self, pick: int, group: Any) -> None:
        handle = self.handle(pick)
        self.same(lambda side: side.registry.leave(side.records[handle], group))

    @rule(name=names)
    def look_up_names(self, name: Any) -> None:
        self.same(lambda side: sorted(map(side.plain, side.registry.group(name))))
        self.same(lambda side: sorted(map(side.plain, side.registry.by_user(name))))

    @rule(pick=records, assignment=assignments)
    def assign(self, pick: int, assignment: tuple[str, Any]) -> None:
        handle, (name, value) = self.handle(pick), assignment
        self.same(lambda side: setattr(side.records[handle], name, value))

    @rule(pick=records, steps=st.integers(-2, 3))
    def set_deadline_around_now(self, pick: int, steps: int) -> None:
        handle = self.handle(pick)
        self.same(lambda side: setattr(side.records[handle], "deadline_ns", self.clock.now + steps * STEP_NS))

    @rule(pick=records, method=st.sampled_from(["touch", "heartbeat"]), now_ns=moments)
    def live(self, pick: int, method: str, now_ns: Any) -> None:
        handle = self.handle(pick)
        self.same(lambda side: getattr(side.records[handle], method)(now_ns))

    @rule(pick=records, method=st.sampled_from(["received", "sent"]), nbytes=counts, messages=counts)
    def count(self, pick: int, method: str, nbytes: Any, messages: Any) -> None:
        handle = self.handle(pick)
        self.same(lambda side: getattr(side.records[handle], method)(nbytes, messages))

    @rule(pick=records, direction=mostly(st.sampled_from(["in", "out"]), ["up", "", None]))
    def fail(self, pick: int, direction: Any) -> None:
        handle = self.handle(pick)
        self.same(lambda side: side.records[handle].failed(direction))

    @rule(steps=st.integers(0, 2))
    def pass_time(self, steps: int) -> None:
        self.clock.advance(steps * STEP_NS)

    @rule(steps=st.integers(-2, 3), limit=sizes)
    def ask_who_is_due_around_now(self, steps: int, limit: Any) -> None:
        self.ask_who_is_due(self.clock.now + steps * STEP_NS, limit)

    @rule(now=st.sampled_from([0, -1, 2**63 - 2, 2**63 - 1, 1.5, None, 2**63]), limit=sizes)
    def ask_who_is_due_at_the_ends(self, now: Any, limit: Any) -> None:
        self.ask_who_is_due(now, limit)

    def ask_who_is_due(self, now: Any, limit: Any) -> None:
        def summary(side: Side) -> Any:
            due = side.registry.due(now, limit)
            assert len(due) == len(set(due))
            found = [(side.shard_of(record), record.deadline_ns) for record in due]
            waiting = [record for record in side.registry.values() if record.deadline_ns is not None]
            expected = sorted((side.shard_of(each), each.deadline_ns) for each in waiting if each.deadline_ns <= now)
            assert found == expected[:limit], f"{side.impl.name} has another order"
            # Which of two records with one deadline a limit leaves out is open, and so is the shard it stops in.
            return sorted(map(side.plain, due)) if len(expected) <= limit else len(due)

        self.same(summary)

    @rule(size=sizes, filters=filters)
    def walk_at_once(self, size: Any, filters: dict[str, Any]) -> None:
        def summary(side: Side) -> Any:
            batches = list(side.registry.batches(size, **filters))
            found = sorted(side.plain(record) for batch in batches for record in batch)
            assert len(found) == len(set(found))
            return [len(batch) for batch in batches], found

        self.same(summary)

    @rule(filters=filters, calls=st.integers(1, 5))
    def call_for_each(self, filters: dict[str, Any], calls: int) -> None:
        def limited(side: Side) -> Any:
            seen: list[Any] = []
            made = side.registry.for_each(lambda record: seen.append(record) or len(seen) < calls, **filters)
            assert made == len(seen) == len(set(seen))
            return made

        self.same(limited)

    @rule(filters=many_filters)
    def select(self, filters: dict[str, Any]) -> None:
        def summary(side: Side) -> Any:
            found = sorted(side.plain(side.registry.select(**filters)))
            walked = [record for batch in side.registry.batches(2, **filters) for record in batch]
            assert sorted(side.plain(walked)) == found
            return found

        self.same(summary)

    def same_of_metadata(self, call: Callable[[Side], Any]) -> None:
        """The same outcome and the same announcements, which are over when the call is."""
        outcome = self.same(call)
        news = [side.news() for side in self.sides]
        stats = [side.metadata.stats() for side in self.sides]
        for side, each, counts in zip(self.sides, news, stats, strict=True):
            assert each == news[-1], f"{side.impl.name} announced something else"
            assert counts == stats[-1], f"{side.impl.name} counted something else"
        assert outcome[0] == "returned" or news[-1] == []

    def named(self, side: Side, whom: Any) -> Any:
        """A record for the pick of one; anything else as it is."""
        return side.records[self.handle(whom)] if isinstance(whom, int) else whom

    @rule(whom=records | good_ids, key=metadata_keys)
    def look_up_metadata(self, whom: Any, key: Any) -> None:
        self.same(lambda side: side.metadata.get(self.named(side, whom), key, "default"))
        self.same(lambda side: side.metadata.snapshot(self.named(side, whom)))

    @rule(whom=records | ids, key=metadata_keys, value=metadata_values, if_version=conditions)
    def set_metadata(self, whom: Any, key: Any, value: Any, if_version: Any) -> None:
        self.same_of_metadata(lambda side: side.metadata.set(self.named(side, whom), key, value, if_version=if_version))

    @rule(
        whom=records | good_ids,
        method=st.sampled_from(["update", "replace"]),
        changes=metadata_changes,
        if_version=conditions,
    )
    def change_metadata(self, whom: Any, method: str, changes: Any, if_version: Any) -> None:
        self.same_of_metadata(
            lambda side: getattr(side.metadata, method)(self.named(side, whom), changes, if_version=if_version)
        )

    @precondition(lambda self: self.sides and len(self.sides[0].registry))
    @rule(
        pick=st.integers(0, 7),
        method=st.sampled_from(["update", "update", "replace"]),
        changes=good_changes,
        behind=st.sampled_from([None, None, 0, 1]),
    )
    def change_metadata_of_one_that_is_there(self, pick: int, method: str, changes: Any, behind: int | None) -> None:
        present = sorted(self.sides[0].registry)
        whom = present[pick % len(present)]
        if_version = None if behind is None else self.sides[0].registry[whom].version - behind
        self.same_of_metadata(lambda side: getattr(side.metadata, method)(whom, changes, if_version=if_version))

    @rule(whom=records | good_ids, key=metadata_keys, if_version=conditions)
    def delete_metadata(self, whom: Any, key: Any, if_version: Any) -> None:
        self.same_of_metadata(lambda side: side.metadata.delete(self.named(side, whom), key, if_version=if_version))

    @rule(changes=metadata_changes, filters=many_filters)
    def change_metadata_of_all(self, changes: Any, filters: dict[str, Any]) -> None:
        self.same_of_metadata(lambda side: side.metadata.update_where(changes, **filters))

    @rule(changes=metadata_changes, whom=mostly(st.lists(records | ids, max_size=4), ["a", 5, [1.5]]))
    def change_metadata_of_some(self, changes: Any, whom: Any) -> None:
        def change(side: Side) -> Any:
            to = [self.named(side, each) for each in whom] if isinstance(whom, list) else whom
            return side.metadata.update_where(changes, to=to)

        self.same_of_metadata(change)

    @rule(metadata=st.none() | metadata_changes)
    def check_metadata(self, metadata: Any) -> None:
        self.same_of_metadata(lambda side: side.metadata.check(metadata))

    @precondition(lambda self: len(self.walks) < 3)
    @rule(
        size=st.sampled_from([1, 2, 3]),
        filters=st.fixed_dictionaries({})
        | st.fixed_dictionaries({"group": good_names})
        | st.fixed_dictionaries({"user": good_names})
        | st.fixed_dictionaries({"tag": good_names}),
    )
    def open_walk(self, size: int, filters: dict[str, Any]) -> None:
        self.walks.append([Walk(side, size, filters) for side in self.sides])

    @precondition(lambda self: self.walks)
    @rule(which=st.integers(0, 2))
    def advance_walk(self, which: int) -> None:
        walks = self.walks[which % len(self.walks)]
        for walk in walks:
            if not walk.ended:
                walk.advance()
        if all(walk.ended for walk in walks):
            self.walks.remove(walks)

    @invariant()
    def states_are_the_same(self) -> None:
        if not self.sides:
            return
        expected = registry_state(self.sides[-1].registry)
        handles = list(self.sides[-1].records)[-6:]
        records = [record_state(self.sides[-1].records[handle]) for handle in handles]
        for side in self.sides:
            assert registry_state(side.registry) == expected, side.impl.name
            assert [record_state(side.records[handle]) for handle in handles] == records, side.impl.name
            assert_consistent(side.registry)
        sharded = [side.registry.shard_stats() for side in self.sides if side.impl.sharded]
        for shards in sharded:
            for one, other in zip(shards, sharded[0], strict=True):
                assert {name: one[name] for name in SHARD_COUNTERS} == {name: other[name] for name in SHARD_COUNTERS}
        for walk in (walk for walks in self.walks for walk in walks):
            walk.forget_the_detached()


def test_implementations_agree_on_every_step(implementations: list[Implementation]) -> None:
    assert len(implementations) > 1
    run_state_machine_as_test(lambda: Comparison(implementations))
