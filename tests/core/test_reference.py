"""Two locks of the reference that threads hardly ever need: each test lets another thread in where it would do harm."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest

from tests.conftest import Implementation, load_implementation
from tests.core.state import assert_consistent
from wsfast import reference

pytestmark = pytest.mark.threads


class Meanwhile:
    """Another thread with something to do, which is let in once, when the instance is called.

    The call returns when that thread is through, or has to wait for a lock that `lock` made.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action
        self.is_armed = False
        self.result: Any = None
        self.reports: SimpleQueue[str] = SimpleQueue()
        self.thread = threading.Thread(target=self._run)

    def __call__(self) -> None:
        if self.is_armed:
            self.is_armed = False
            self.thread.start()
            self.reports.get()

    def _run(self) -> None:
        try:
            self.result = self.action()
        finally:
            self.reports.put("through")

    def lock(self) -> Any:
        return ReportingLock(self.reports)

    def during(self, call: Callable[[], Any]) -> Any:
        """What *call* returns, with the other thread let in where it comes to; both are through then."""
        self.is_armed = True
        returned = call()
        assert not self.is_armed, "the call never came to the place"
        self.thread.join()
        return returned


class ReportingLock:
    """A lock that reports whoever has to wait for it."""

    def __init__(self, reports: SimpleQueue[str]) -> None:
        self.inner = threading.Lock()
        self.reports = reports

    def __enter__(self) -> None:
        if not self.inner.acquire(blocking=False):
            self.reports.put("waits")
            self.inner.acquire()

    def __exit__(self, *raised: object) -> None:
        self.inner.release()


@pytest.fixture(params=["reference", "traditional"])
def plain(request: pytest.FixtureRequest) -> Implementation:
    return load_implementation(request.param)


def registry_that_lets_in(plain: Implementation, meanwhile: Meanwhile) -> Any:
    """A registry with one record, which calls *meanwhile* before its extensions are written."""
    slot: Any = reference.ConnectionMeta.__dict__["_extensions"]

    class Record(reference.ConnectionMeta):
        __slots__ = ()

        @property
        def _extensions(self) -> Any:
            return slot.__get__(self)

        @_extensions.setter
        def _extensions(self, value: Any) -> None:
            meanwhile()
            slot.__set__(self, value)

    registry = plain.Registry(1, record_type=Record)
    registry._shards[0].lock = meanwhile.lock()
    registry.add("a")
    return registry


def test_extensions_are_made_once_for_all_threads(plain: Implementation) -> None:
    meanwhile = Meanwhile(lambda: record.extensions)
    registry = registry_that_lets_in(plain, meanwhile)
    record = registry["a"]
    made = meanwhile.during(lambda: record.extensions)
    assert made is meanwhile.result
    assert made is record.extensions


def test_extensions_that_are_made_during_a_removal_go_with_it(plain: Implementation) -> None:
    meanwhile = Meanwhile(lambda: registry.remove("a"))
    registry = registry_that_lets_in(plain, meanwhile)
    record = registry["a"]
    meanwhile.during(lambda: record.extensions)
    assert meanwhile.result is record
    assert record.extensions is not record.extensions, "a detached record kept a dict"
    assert_consistent(registry)


def test_connection_that_is_added_while_a_map_is_promoted_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    slot: Any = reference._SyncMap.__dict__["dirty"]

    class Shard(reference._SyncMap):
        __slots__ = ()

        @property
        def dirty(self) -> Any:
            return slot.__get__(self)

        @dirty.setter
        def dirty(self, value: Any) -> None:
            if value is None:
                meanwhile()
            slot.__set__(self, value)

    def promote_and_add() -> Any:
        assert registry.get("absent") is None  # one more miss, which is enough to promote a map of one record
        return registry.add("b")

    meanwhile = Meanwhile(promote_and_add)
    monkeypatch.setattr(reference, "_SyncMap", Shard)
    registry: Any = reference.Registry(1)
    registry._shards[0].lock = meanwhile.lock()
    record = registry.add("a")
    assert meanwhile.during(lambda: registry.get("a")) is record
    assert registry.get("b") is meanwhile.result, "the added connection was lost"
    assert_consistent(registry)
