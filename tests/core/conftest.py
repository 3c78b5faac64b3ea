"""What the tests of the core share: a registry on a fake clock, and the balance of live objects around every test."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import FakeClock, Implementation

_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[_failed] = report.failed
    return report


def live_objects() -> dict[str, int] | None:
    """The counters of live native objects; None where the core is not built, or built without them."""
    if importlib.util.find_spec("wsfast._core") is None:
        return None
    return importlib.import_module("wsfast._core")._live()


@pytest.fixture(scope="session")
def counting(request: pytest.FixtureRequest) -> bool:
    """Whether live objects are counted."""
    # The tests collect garbage hundreds of times; what was there before them would make up nearly all of the work.
    gc.collect()
    gc.freeze()
    return not request.config.getoption("--no-native") and live_objects() is not None


@pytest.fixture(autouse=True)
def live_objects_return_to_their_start(request: pytest.FixtureRequest, counting: bool) -> Iterator[None]:
    """In a build that counts its objects, no test leaves more of them than it found."""
    before = live_objects() if counting else None
    yield
    # A failed test is alive in its traceback, which may end in the middle of the next test.
    if before is None or request.node.stash.get(_failed, True):
        return
    # pytest itself holds the arguments of a test until after its teardown.
    request.node.funcargs.clear()
    gc.collect()
    after = live_objects()
    assert after is not None
    assert {name: max(count, before[name]) for name, count in after.items()} == before


@pytest.fixture
def registry(impl: Implementation, clock: FakeClock) -> Any:
    """An empty registry of 8 shards on the fake clock."""
    return impl.Registry(8, clock=clock, wall_clock=clock.wall)
