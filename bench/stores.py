"""The alternatives that the registry benchmarks compare, behind one face: builtin ``dict``, both generations, native.

Each method of a store is what a clock is held against, and does many operations in the plainest loop that does them;
the loops of all stores look alike. None of them checks a result: the benchmark does, when the clock stands.

A dict from id to connection is the floor and the peer: no library for Python has a registry of connections to compare
with, so people use a dict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import wsfast
from bench.harness import own_code
from bench.population import Population
from wsfast import reference

DICT = "builtin dict"
GENERATION_1 = "generation 1"
GENERATION_2 = "generation 2"
NATIVE = "native"


class Store(ABC):
    """Connections by id, empty at first."""

    held: Any
    """The dict or the registry itself."""

    def __init__(self) -> None:
        self._look_up = own_code(_look_up)

    def look_up(self, ids: Sequence[str], rounds: int = 1) -> None:
        """Ask for each id once in each round; the answers are dropped."""
        self._look_up(self.held.get, ids, rounds)

    @abstractmethod
    def get_many(self, ids: list[str]) -> list[Any]: ...

    @abstractmethod
    def add(self, ids: Sequence[str], conns: Sequence[object]) -> None: ...

    @abstractmethod
    def remove(self, ids: Sequence[str]) -> None:
        """Remove ids that are there."""

    @abstractmethod
    def count_in_batches(self, size: int) -> int:
        """Walk over all connections in batches; returns how many there were."""

    @abstractmethod
    def set_deadlines(self, ids: Sequence[str], deadline_ns: int) -> None: ...

    @abstractmethod
    def due(self, now_ns: int) -> list[Any]: ...

    @abstractmethod
    def clear(self) -> None: ...


class DictStore(Store):
    """A dict of connections, with a dict of deadlines beside it."""

    held: dict[str, object]

    def __init__(self) -> None:
        super().__init__()
        self.held = {}
        self._deadlines: dict[str, int] = {}

    def get_many(self, ids: list[str]) -> list[Any]:
        get = self.held.get
        return [get(client_id) for client_id in ids]

    def add(self, ids: Sequence[str], conns: Sequence[object]) -> None:
        held = self.held
        for client_id, conn in zip(ids, conns, strict=True):
            held[client_id] = conn

    def remove(self, ids: Sequence[str]) -> None:
        held = self.held
        for client_id in ids:
            del held[client_id]

    def count_in_batches(self, size: int) -> int:
        seen = 0
        values = iter(self.held.values())
        while batch := list(islice(values, size)):
            seen += len(batch)
        return seen

    def set_deadlines(self, ids: Sequence[str], deadline_ns: int) -> None:
        self._deadlines.update(dict.fromkeys(ids, deadline_ns))

    def due(self, now_ns: int) -> list[Any]:
        return [client_id for client_id, deadline_ns in self._deadlines.items() if deadline_ns <= now_ns]

    def clear(self) -> None:
        self.held.clear()
        self._deadlines.clear()


class RegistryStore(Store):
    """A registry, of either implementation."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.held = make()
        self._add = own_code(_add)
        self._remove = own_code(_remove)
        self._count_in_batches = own_code(_count_in_batches)

    def get_many(self, ids: list[str]) -> list[Any]:
        found: list[Any] = self.held.get_many(ids)
        return found

    def add(self, ids: Sequence[str], conns: Sequence[object]) -> None:
        self._add(self.held.add, ids, conns)

    def remove(self, ids: Sequence[str]) -> None:
        self._remove(self.held.remove, ids)

    def count_in_batches(self, size: int) -> int:
        return self._count_in_batches(self.held.batches(size))

    def set_deadlines(self, ids: Sequence[str], deadline_ns: int) -> None:
        for record in self.held.get_many(ids):
            record.deadline_ns = deadline_ns

    def due(self, now_ns: int) -> list[Any]:
        found: list[Any] = self.held.due(now_ns)
        return found

    def clear(self) -> None:
        self.held.clear()


def add_with_all_fields(registry: Any, people: Population) -> None:
    """Add everybody with each field that ``Registry.add`` takes but metadata, extensions and groups."""
    add = registry.add
    rows = zip(
        people.ids, people.conns, people.user_ids, people.device_types, people.device_infos, people.sessions,
        people.permissions, people.tags, strict=True,
    )  # fmt: skip
    for client_id, conn, user_id, device_type, device_info, session, permissions, tags in rows:
        add(
            client_id,
            conn,
            user_id=user_id,
            device_type=device_type,
            device_info=device_info,
            session=session,
            permissions=permissions,
            tags=tags,
            status=wsfast.ConnectionStatus.ONLINE,
        )


def _look_up(get: Callable[[str], object], ids: Sequence[str], rounds: int) -> None:
    for _ in range(rounds):
        for client_id in ids:
            get(client_id)


def _add(add: Callable[[str, object], object], ids: Sequence[str], conns: Sequence[object]) -> None:
    for client_id, conn in zip(ids, conns, strict=True):
        add(client_id, conn)


def _remove(remove: Callable[[str], object], ids: Sequence[str]) -> None:
    for client_id in ids:
        remove(client_id)


def _count_in_batches(batches: Iterable[list[Any]]) -> int:
    seen = 0
    for batch in batches:
        seen += len(batch)
    return seen


def loop_alone(ids: Sequence[str], rounds: int) -> None:
    """The loop of :meth:`Store.look_up` without the look-up."""
    for _ in range(rounds):
        for _client_id in ids:
            pass


STORES: dict[str, Callable[[], Store]] = {
    DICT: DictStore,
    GENERATION_1: lambda: RegistryStore(reference.TraditionalRegistry),
    GENERATION_2: lambda: RegistryStore(reference.Registry),
    NATIVE: lambda: RegistryStore(wsfast.Registry),
}
