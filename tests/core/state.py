"""Everything that can be seen of a registry, as plain values: what "changes nothing" and "the same" mean in the tests.

Records stand as their ids, so that the states of two implementations compare. Times in seconds are rounded to a
millisecond, since the contract does not say in which order they are summed up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wsfast.connection import ConnectionStatus

EXACT = (
    "client_id",
    "attached",
    "conn",
    "session",
    "device_info",
    "user_id",
    "device_type",
    "status",
    "permissions",
    "quality",
    "deadline_ns",
    "groups",
    "version",
    "created_ns",
    "last_active_ns",
    "last_heartbeat_ns",
    "messages_in",
    "messages_out",
    "bytes_in",
    "bytes_out",
    "errors_in",
    "errors_out",
)
SECONDS = ("created", "last_active", "last_heartbeat", "idle")
MAPPINGS = ("tags", "metadata", "extensions")
SHARD_COUNTERS = (
    "connections",
    "adds",
    "removes",
    "messages_in",
    "messages_out",
    "bytes_in",
    "bytes_out",
    "errors_in",
    "errors_out",
)

# How a record may leave its registry.
DEPARTURES: dict[str, Callable[[Any, Any], object]] = {
    "remove by id": lambda registry, record: registry.remove(record.client_id),
    "remove by record": lambda registry, record: registry.remove(record),
    "replace": lambda registry, record: registry.add(record.client_id, on_duplicate="replace"),
    "clear": lambda registry, record: registry.clear(),
}


def record_state(record: Any) -> dict[str, Any]:
    """Every attribute of *record* but its registry."""
    state = {name: getattr(record, name) for name in EXACT}
    state |= {name: dict(getattr(record, name)) for name in MAPPINGS}
    for name in SECONDS:
        seconds = getattr(record, name)
        state[name] = None if seconds is None else round(seconds, 3)
    return state


def index_state(registry: Any) -> dict[str, Any]:
    """What the indexes answer, for all names that the records hold."""
    records = list(registry.values())
    users = {record.user_id for record in records} - {None}
    kinds = {record.device_type for record in records} - {None}
    tags = {pair for record in records for pair in record.tags.items()}
    return {
        "groups": registry.groups(),
        "members": {group: ids(registry.group(group)) for group in registry.groups()},
        "users": {user: ids(registry.by_user(user)) for user in users},
        "tag values": {tag: ids(walk(registry, tag=tag)) for tag in tags},
        "tag keys": {key: ids(walk(registry, tag=key)) for key, _ in tags},
        "device types": {kind: ids(registry.select(device_type=kind)) for kind in kinds},
        "statuses": {status.name: ids(registry.select(status=status)) for status in ConnectionStatus},
    }


def registry_state(registry: Any) -> dict[str, Any]:
    """The state of *registry*, its records and its indexes. ``longest_probe`` and ``shards`` are left out."""
    totals = registry.stats()
    return {
        "ids": sorted(registry),
        "records": {record.client_id: record_state(record) for record in registry.values()},
        "indexes": index_state(registry),
        "stats": {name: totals[name] for name in (*SHARD_COUNTERS, "groups", "users", "tags")},
    }


def assert_consistent(registry: Any) -> None:
    """The ways to look at *registry* agree with each other, each record standing exactly where it says it is."""
    records = list(registry.values())
    assert sorted(record.client_id for record in records) == sorted(registry)
    assert len(records) == len(registry) == len({id(record) for record in records})
    assert all(record.attached and record.registry is registry for record in records)
    assert all(registry[record.client_id] is record for record in records)
    groups: dict[str, list[str]] = {}
    users: dict[str, list[str]] = {}
    tags: dict[tuple[str, str], list[str]] = {}
    kinds: dict[str, list[str]] = {}
    statuses: dict[ConnectionStatus, list[str]] = {}
    for record in records:
        statuses.setdefault(record.status, []).append(record.client_id)
        if record.device_type is not None:
            kinds.setdefault(record.device_type, []).append(record.client_id)
        for group in record.groups:
            groups.setdefault(group, []).append(record.client_id)
        for tag in record.tags.items():
            tags.setdefault(tag, []).append(record.client_id)
        if record.user_id is not None:
            users.setdefault(record.user_id, []).append(record.client_id)
    assert registry.groups() == {group: len(members) for group, members in groups.items()}
    assert {group: ids(registry.group(group)) for group in groups} == _sorted(groups)
    assert {user: ids(registry.by_user(user)) for user in users} == _sorted(users)
    assert {tag: ids(walk(registry, tag=tag)) for tag in tags} == _sorted(tags)
    assert {kind: ids(registry.select(device_type=kind)) for kind in kinds} == _sorted(kinds)
    assert {status: ids(registry.select(status=status)) for status in statuses} == _sorted(statuses)
    assert ids(registry.select()) == ids(records)
    totals = registry.stats()
    assert (totals["groups"], totals["users"], totals["tags"]) == (len(groups), len(users), len(tags))
    assert totals["connections"] == totals["adds"] - totals["removes"] == len(records)
    shards = registry.shard_stats()
    assert {name: totals[name] for name in SHARD_COUNTERS} == {
        name: sum(shard[name] for shard in shards) for name in SHARD_COUNTERS
    }


def walk(registry: Any, size: int = 100, **filters: Any) -> list[Any]:
    """All records that ``batches`` gives, in one list."""
    return [record for batch in registry.batches(size, **filters) for record in batch]


def ids(records: Any) -> list[str]:
    """The ids of *records*, sorted; a record that is there twice shows twice."""
    return sorted(record.client_id for record in records)


def _sorted(names: dict[Any, list[str]]) -> dict[Any, list[str]]:
    return {name: sorted(members) for name, members in names.items()}
