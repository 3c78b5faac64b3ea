"""Metadata and ``select``, one operation at a time: native against generation 2, and facts that are kept by hand.

Each round is 1,000 operations on a registry of 10,000 connections; ``python -m bench metadata`` has the larger ones,
and the targets.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.metadata import GENERATION_2, HAND, KEY, NATIVE, make_stores
from bench.population import SEED

_CONNECTIONS, _MEMBERS, _TARGETS, _ROUNDS = 10_000, 500, 1_000, 30


@pytest.fixture(scope="module")
def stores() -> dict[str, Any]:
    return make_stores(_CONNECTIONS, _MEMBERS)


every_store = pytest.mark.parametrize("name", [HAND, GENERATION_2, NATIVE])
every_registry = pytest.mark.parametrize("name", [GENERATION_2, NATIVE])


def _run(benchmark: BenchmarkFixture, function: Any, *args: object) -> Any:
    pedantic: Any = benchmark.pedantic
    return pedantic(function, args=args, rounds=_ROUNDS, warmup_rounds=2)


@every_store
@pytest.mark.benchmark(group="set: 1,000 changes")
def test_set(benchmark: BenchmarkFixture, stores: dict[str, Any], name: str) -> None:
    store = stores[name]
    targets = Random(SEED).sample(store.records, _TARGETS)

    def change() -> None:
        for value, target in enumerate(targets):
            store.metadata.set(target, KEY, value)

    before = store.notified.count
    _run(benchmark, change)
    assert store.notified.count - before == _TARGETS * (_ROUNDS + 2)


@every_registry
@pytest.mark.benchmark(group="snapshot: 1,000 connections")
def test_snapshot(benchmark: BenchmarkFixture, stores: dict[str, Any], name: str) -> None:
    store = stores[name]
    targets = Random(SEED).sample(store.records, _TARGETS)
    _run(benchmark, lambda: [store.metadata.snapshot(target) for target in targets])


@every_registry
@pytest.mark.benchmark(group="select: 500 of 10,000")
def test_select(benchmark: BenchmarkFixture, stores: dict[str, Any], name: str) -> None:
    registry = stores[name].metadata.registry
    assert len(_run(benchmark, lambda: registry.select(group="g"))) == _MEMBERS
