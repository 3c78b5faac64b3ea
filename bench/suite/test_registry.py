"""One operation at a time, native against the sync.Map-like path in pure Python, generation 1 and ``dict``.

Run by ``python -m pytest bench --benchmark-only``. Each round is 1,000 operations on a registry of 10,000 connections,
which is small enough for the caches; ``python -m bench registry`` has the larger ones, and the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.population import SEED, make_conns, make_ids
from bench.stores import DICT, STORES, Store, loop_alone

_CONNECTIONS = 10_000
_IDS = 1_000
_ROUNDS = 50
_GROUP = "room:1"
_REGISTRIES = [name for name in STORES if name != DICT]


@pytest.fixture(scope="module")
def ids() -> list[str]:
    return make_ids(_CONNECTIONS)


@pytest.fixture(scope="module")
def some(ids: list[str]) -> list[str]:
    return Random(SEED).sample(ids, _IDS)


@pytest.fixture
def fill(ids: list[str]) -> Iterator[Callable[[str], Store]]:
    """Makes full stores by name."""
    made: list[Store] = []

    def make(name: str) -> Store:
        store = STORES[name]()
        store.add(ids, make_conns(_CONNECTIONS))
        store.look_up(ids)  # brings generation 2 into its best state: every shard is read without its lock
        made.append(store)
        return store

    yield make
    for store in made:
        store.clear()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, fill: Callable[[str], Store]) -> Store:
    return fill(request.param)


@pytest.fixture(params=_REGISTRIES)
def registry(request: pytest.FixtureRequest, fill: Callable[[str], Store]) -> Any:
    return fill(request.param).held


def _run(benchmark: BenchmarkFixture, function: Callable[..., Any], *args: object) -> Any:
    pedantic: Callable[..., Any] = benchmark.pedantic
    return pedantic(function, args=args, rounds=_ROUNDS, warmup_rounds=3)


@pytest.mark.benchmark(group="get: 1,000 ids")
def test_get(benchmark: BenchmarkFixture, store: Store, some: list[str]) -> None:
    _run(benchmark, store.look_up, some)
    assert None not in map(store.held.get, some)


@pytest.mark.benchmark(group="get: 1,000 ids")
def test_loop_alone(benchmark: BenchmarkFixture, some: list[str]) -> None:
    _run(benchmark, loop_alone, some, 1)


@pytest.mark.benchmark(group="get_many: 1,000 ids")
def test_get_many(benchmark: BenchmarkFixture, store: Store, some: list[str]) -> None:
    assert _run(benchmark, store.get_many, some) == [store.held[client_id] for client_id in some]


@pytest.mark.benchmark(group="add and remove: 1,000 connections")
def test_add_and_remove(benchmark: BenchmarkFixture, store: Store) -> None:
    ids = make_ids(_IDS, SEED + 1)
    conns = make_conns(_IDS)

    def add_and_remove() -> None:
        store.add(ids, conns)
        store.remove(ids)

    _run(benchmark, add_and_remove)
    assert len(store.held) == _CONNECTIONS


@pytest.mark.benchmark(group="batches(100): 10,000 connections")
def test_batches(benchmark: BenchmarkFixture, store: Store) -> None:
    assert _run(benchmark, store.count_in_batches, 100) == _CONNECTIONS


@pytest.mark.benchmark(group="join and leave: 1,000 connections")
def test_join_and_leave(benchmark: BenchmarkFixture, registry: Any, some: list[str]) -> None:
    records = registry.get_many(some)

    def join_and_leave() -> None:
        for record in records:
            registry.join(record, _GROUP)
        for record in records:
            registry.leave(record, _GROUP)

    _run(benchmark, join_and_leave)
    assert registry.groups() == {}


@pytest.mark.benchmark(group="received: 1,000 messages")
def test_received(benchmark: BenchmarkFixture, registry: Any, some: list[str]) -> None:
    records = registry.get_many(some)

    def receive() -> None:
        for record in records:
            record.received(128)

    _run(benchmark, receive)
    assert registry.stats()["bytes_in"] == 128 * registry.stats()["messages_in"] > 0
