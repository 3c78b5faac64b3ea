"""What every test may use: the implementations of the core side by side, clocks that stand still, threads that report.

A test that takes ``impl`` runs once for each implementation of the core. The native one is never skipped: where it is
not built, its tests fail, unless ``--no-native`` leaves them out by request.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No deadlines: speed belongs to bench/. "long" is for `make stress`.
settings.register_profile("quick", max_examples=400, stateful_step_count=50, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=4000, stateful_step_count=80, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

IMPLEMENTATIONS = ("native", "reference", "traditional")


@dataclass(frozen=True)
class Implementation:
    """One implementation of the core.

    Attributes:
        name: of the implementation.
        source: the import statement that gives a new interpreter its ``Registry``.
        sharded: whether ``due`` goes shard by shard. The traditional registry is one map whatever ``shards`` says.
        metadata_module: the name of the module that has the rest.
    """

    name: str
    source: str
    sharded: bool
    metadata_module: str
    Registry: Any
    ConnectionMeta: Any
    fnv1_32: Callable[..., int]
    fnv1a_32: Callable[..., int]

    @property
    def Metadata(self) -> Any:
        return importlib.import_module(self.metadata_module).Metadata

    @property
    def Change(self) -> Any:
        return importlib.import_module(self.metadata_module).Change

    @property
    def size_of(self) -> Callable[..., int]:
        function: Callable[..., int] = importlib.import_module(self.metadata_module).size_of
        return function


@functools.cache
def load_implementation(name: str) -> Implementation:
    """The implementation called *name*, one of ``IMPLEMENTATIONS``."""
    module = importlib.import_module("wsfast._core" if name == "native" else "wsfast.reference")
    registry = "TraditionalRegistry" if name == "traditional" else "Registry"
    return Implementation(
        name=name,
        source=f"from {module.__name__} import ConnectionMeta, {registry} as Registry",
        sharded=name != "traditional",
        metadata_module="wsfast._metadata" if name == "native" else "wsfast.reference",
        Registry=getattr(module, registry),
        ConnectionMeta=module.ConnectionMeta,
        fnv1_32=module.fnv1_32,
        fnv1a_32=module.fnv1a_32,
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-native", action="store_true", help="leave out the tests of the native core")
    parser.addoption("--installed", action="store_true", help="refuse to test anything but an installed wsfast")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--installed"):
        return
    found = importlib.util.find_spec("wsfast")
    origin = None if found is None else found.origin
    if origin is None or not Path(origin).is_relative_to(sysconfig.get_path("platlib")):
        raise pytest.UsageError(f"wsfast is not the installed one, but {origin}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--no-native"):
        return
    kept, left_out = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        is_native = parameters.get("impl") == "native" or "native" in getattr(item, "fixturenames", ())
        (left_out if is_native else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


# Of the session, because a test of Hypothesis takes no fixture that is made anew for each test.
@pytest.fixture(params=IMPLEMENTATIONS, scope="session")
def impl(request: pytest.FixtureRequest) -> Implementation:
    """Each implementation in turn."""
    return load_implementation(request.param)


@pytest.fixture
def native() -> Implementation:
    """The native core alone."""
    return load_implementation("native")


@pytest.fixture
def implementations(request: pytest.FixtureRequest) -> list[Implementation]:
    """All implementations at once, to be compared; without the native one under ``--no-native``."""
    no_native = request.config.getoption("--no-native")
    return [load_implementation(name) for name in IMPLEMENTATIONS if not (no_native and name == "native")]


class FakeClock:
    """A clock in nanoseconds that moves only when told to."""

    def __init__(self, now: int = 5_000_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds

    def wall(self) -> float:
        """The wall clock that keeps step with this one: seconds since the epoch."""
        return 1_700_000_000 + self.now / 1e9


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def run_threads(*callables: Callable[[], Any]) -> list[Any]:
    """Run each of *callables* on a thread of its own, all started together.

    The interpreter switches threads as often as it can meanwhile.

    Returns:
        What they returned, in order.

    Raises:
        BaseException: the first exception of a worker, after all of them ended.
    """
    barrier = threading.Barrier(len(callables))
    results: list[Any] = [None] * len(callables)
    raised: list[BaseException] = []

    def work(index: int, call: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            results[index] = call()
        except BaseException as error:
            raised.append(error)

    workers = [threading.Thread(target=work, args=each) for each in enumerate(callables)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    if raised:
        raise raised[0]
    return results
