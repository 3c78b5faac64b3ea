"""Many threads on the metadata of one registry: nothing is lost, announced twice, out of order, or left behind."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Implementation, run_threads
from tests.core.state import assert_consistent, ids
from wsfast.connection import MISSING, ConnectionStatus
from wsfast.errors import DetachedRecord, MetadataRejected, UnknownConnection, VersionConflict

pytestmark = pytest.mark.threads

WORKERS = 4


@pytest.fixture(params=[1, 8], ids=["1 shard", "8 shards"])
def registry(impl: Implementation, request: pytest.FixtureRequest) -> Any:
    return impl.Registry(request.param)


@pytest.fixture
def engine(impl: Implementation, registry: Any) -> Any:
    return impl.Metadata(registry)


@pytest.fixture
def load(impl: Implementation) -> int:
    """How many times the work of a test is done: the native core would be through before a second thread begins."""
    return 4 if impl.name == "native" else 1


def each_worker(work: Callable[[int], Any], workers: int = WORKERS) -> list[Any]:
    """Run ``work(number of the worker)`` on several threads at once."""
    return run_threads(*(lambda number=number: work(number) for number in range(workers)))


def gone(call: Callable[[], Any]) -> bool:
    """Make *call*; whether the connection was gone."""
    try:
        call()
    except (DetachedRecord, UnknownConnection):
        return True
    return False


def test_no_increment_is_lost(registry: Any, engine: Any, load: int) -> None:
    registry.add("a", metadata={"n": 0})

    def increment(worker: int) -> int:
        conflicts = 0
        for _ in range(150 * load):
            # Each conflict means that another thread came through, so this ends.
            for _ in range(1000 * WORKERS * load):
                version, metadata = engine.snapshot("a")
                try:
                    assert engine.set("a", "n", metadata["n"] + 1, if_version=version) == version + 1
                except VersionConflict as error:
                    assert error.current > version
                    conflicts += 1
                else:
                    break
        return conflicts

    conflicts = sum(each_worker(increment))
    total = 150 * load * WORKERS
    assert engine.snapshot("a") == (total, {"n": total})
    assert engine.stats()["metadata_changes"] == total
    assert engine.stats()["metadata_conflicts"] == conflicts


def test_version_equals_the_number_of_changes(registry: Any, engine: Any, load: int) -> None:
    record = registry.add("a")
    rounds = 200 * load

    def change(worker: int) -> list[int]:
        versions = []
        for number in range(rounds):
            if number % 2:
                versions.append(engine.set(record, f"k{worker}", number))
            else:
                versions.append(engine.update(record, {f"k{worker}": number, f"l{worker}": number}))
        return versions

    def assign(worker: int) -> list[int]:
        for _ in range(rounds):
            before = record.version
            record.metadata = {}
            assert record.version > before
        return []

    versions = each_worker(lambda worker: (assign if worker == WORKERS else change)(worker), WORKERS + 1)
    assert record.version == rounds * (WORKERS + 1)
    assert all(each == sorted(set(each)) for each in versions)
    assert len(set(itertools.chain(*versions))) == rounds * WORKERS
    assert engine.stats()["metadata_changes"] == rounds * WORKERS


def test_keys_of_all_threads_are_kept(registry: Any, engine: Any, load: int) -> None:
    record = registry.add("a")

    def change(worker: int) -> None:
        for number in range(200 * load):
            engine.update(record, {f"{worker}-{number % 10}": number, f"{worker}-{(number + 5) % 10}": MISSING})

    each_worker(change)
    last = 200 * load - 1
    for worker in range(WORKERS):
        mine = {key: value for key, value in record.metadata.items() if key.startswith(f"{worker}-")}
        assert mine == {f"{worker}-{number % 10}": number for number in range(last - 4, last + 1)}


def test_version_and_metadata_are_of_one_moment(registry: Any, engine: Any, load: int) -> None:
    record = registry.add("a", metadata={"version": 0, "copy": 0})

    def change(worker: int) -> None:
        for _ in range(200 * load):
            version = record.version
            try:
                engine.update(record, {"version": version + 1, "copy": version + 1}, if_version=version)
            except VersionConflict:
                continue

    def look(worker: int) -> None:
        latest = 0
        for _ in range(500 * load):
            version, metadata = engine.snapshot("a")
            assert dict(metadata) == {"version": version, "copy": version}
            assert version >= latest
            latest = version
            metadata = record.metadata
            assert metadata["version"] == metadata["copy"] >= latest

    each_worker(lambda worker: (look if worker % 2 else change)(worker))


@pytest.mark.parametrize("announcer", ["whoever comes", "one thread"])
def test_announcements_come_in_the_order_of_versions(registry: Any, engine: Any, load: int, announcer: str) -> None:
    records = [registry.add(f"c{number}") for number in range(5)]
    heard: list[Any] = []
    is_inside = threading.Lock()

    def note(change: Any) -> None:
        assert is_inside.acquire(blocking=False), "two threads announce at once"
        heard.append((change.conn, change.version, change.old, change.new, threading.get_ident()))
        is_inside.release()

    engine.add_notifier(note, key="k")
    if announcer == "one thread":
        engine.run_on(threading.get_ident(), None)

    def change(worker: int) -> None:
        chance = random.Random(worker)
        for number in range(200 * load):
            record = chance.choice(records)
            if number % 10:
                engine.set(record, "k", (worker, number))
            else:
                engine.update_where({"k": (worker, number)}, to=records[::2])

    each_worker(change)
    engine.announce()
    assert engine.stats()["metadata_notifier_errors"] == engine.stats()["metadata_unannounced"] == 0
    for record in records:
        mine = [(version, old, new) for conn, version, old, new, _ in heard if conn is record]
        assert [version for version, _, _ in mine] == list(range(1, record.version + 1)), "a gap, or a duplicate"
        values = [MISSING, *(new for _, _, new in mine)]
        assert [old for _, old, _ in mine] == values[:-1]
        assert record.metadata["k"] == values[-1]
    assert len(heard) == engine.stats()["metadata_changes"]
    if announcer == "one thread":
        assert {thread for *_, thread in heard} == {threading.get_ident()}


def test_nothing_is_left_unannounced_when_all_are_through(registry: Any, engine: Any, load: int) -> None:
    record = registry.add("a")
    heard: list[int] = []
    engine.add_notifier(lambda change: heard.append(change.version))
    for step in range(60 * load):
        run_threads(lambda: engine.set(record, "k", 1), lambda: engine.set(record, "l", 1))
        assert heard == list(range(1, 2 * step + 3))


def test_woken_thread_announces_everything(registry: Any, engine: Any, load: int) -> None:
    record = registry.add("a")
    heard: list[Any] = []
    waiting = threading.Semaphore(0)
    rounds = 200 * load
    engine.add_notifier(lambda change: heard.append((change.version, threading.get_ident())))
    engine.run_on(-1, waiting.release)
    started = threading.Event()

    def announce() -> int:
        engine.run_on(threading.get_ident(), waiting.release)
        started.set()
        while len(heard) < 3 * rounds:
            assert waiting.acquire(timeout=60), "nobody woke this thread"
            engine.announce()
        return threading.get_ident()

    def change() -> int:
        started.wait()
        for number in range(rounds):
            engine.set(record, "k", number)
        return 0

    ident, *_ = run_threads(announce, change, change, change)
    assert heard == [(version, ident) for version in range(1, 3 * rounds + 1)]


def test_changes_race_with_removals(registry: Any, engine: Any, load: int) -> None:
    rounds = 200 * load
    heard: list[Any] = []
    engine.add_notifier(lambda change: heard.append((change.conn, change.version)))
    for number in range(rounds):
        registry.add(f"c{number}", groups=["g"])
    records = list(registry.values())

    def change(worker: int) -> list[Any]:
        made = []
        for record in records:
            target = record if worker % 2 else record.client_id
            if not gone(lambda target=target: engine.update(target, {"k": worker, "l": worker})):
                made.append(record)
        return made

    def remove(worker: int) -> list[Any]:
        for record in records:
            registry.remove(record)
        return []

    *made, _ = each_worker(lambda worker: (remove if worker == 2 else change)(worker), 3)
    # Of each version, "k" and "l" are heard.
    assert len(heard) == 2 * sum(map(len, made)) == 2 * engine.stats()["metadata_changes"]
    assert sorted(ids(record for record, _ in heard)) == sorted(2 * ids(itertools.chain(*made)))
    assert [(record.version, dict(record.metadata)) for record in records] == [(0, {})] * rounds
    assert len(registry) == 0
    assert_consistent(registry)


def test_changes_race_with_replacements(registry: Any, engine: Any, load: int) -> None:
    registry.add("a", metadata={"life": 0})

    def replace(worker: int) -> None:
        for number in range(300 * load):
            registry.add("a", metadata={"life": number}, on_duplicate="replace")

    def change(worker: int) -> None:
        for _ in range(300 * load):
            record, found = registry["a"], []
            if not gone(lambda record=record: engine.set(record, "k", record)) and not gone(
                lambda record=record, found=found: found.append(engine.get(record, "k"))
            ):
                assert found == [record], "a change came to another connection"

    each_worker(lambda worker: (replace if worker % 2 else change)(worker))
    last = registry["a"]
    assert engine.snapshot("a").metadata.get("k", last) is last, "a change came to a successor"
    registry.clear()


def test_one_change_of_many_while_they_come_and_go(registry: Any, engine: Any, load: int) -> None:
    residents = [registry.add(f"resident-{number}", groups=["g"], device_type="d") for number in range(20)]
    rounds = 10 * load

    def churn(worker: int) -> int:
        for number in range(300 * load):
            record = registry.add(f"{worker}-{number % 20}", groups=["g"], device_type="d", on_duplicate="replace")
            record.status = ConnectionStatus.SUSPECT
            record.device_type = None
            if number % 3 == 0:
                registry.remove(record)
        return 0

    def change(worker: int) -> int:
        made = 0
        for number in range(rounds):
            report = engine.update_where({f"k{worker}": number}, group="g", not_status=ConnectionStatus.CLOSING)
            assert report.changed >= 20
            assert report.rejected == ()
            made += report.changed
        return made

    made = sum(each_worker(lambda worker: (change if worker % 2 else churn)(worker)))
    assert engine.stats()["metadata_changes"] == made
    assert {record.version for record in residents} == {2 * rounds}
    assert_consistent(registry)


def test_what_is_remembered_of_keys_is_read_while_it_is_forgotten(registry: Any, engine: Any, load: int) -> None:
    for worker in range(4):
        registry.add(str(worker))

    def change(worker: int) -> None:
        for _ in range(load):
            for number in range(1100):  # more keys than are remembered
                assert engine.delete(str(worker), f"k{(number * 7 + worker) % 1100}") == 0

    def come_and_go() -> None:
        for _ in range(300 * load):
            engine.add_validator(lambda key, value: None, prefix="k1")()

    run_threads(*[lambda worker=worker: change(worker) for worker in range(4)], come_and_go)  # type: ignore[misc]


def test_validators_and_notifiers_come_and_go(registry: Any, engine: Any, load: int) -> None:
    record = registry.add("a")
    heard: list[int] = []
    engine.add_validator(lambda key, value: value + 1)
    engine.add_notifier(lambda change: heard.append(change.version))

    def refuse(key: str, value: int) -> None:
        raise ValueError("no")

    def come_and_go(worker: int) -> int:
        for number in range(200 * load):
            removals = [
                engine.add_validator(lambda key, value: None, prefix="k"),
                engine.add_validator(refuse, key="refused"),
                engine.add_notifier(lambda change: None, key=f"k{number % 7}"),
            ]
            for remove in removals:
                remove()
                remove()
        return 0

    def change(worker: int) -> int:
        rejected = 0
        for number in range(300 * load):
            version = engine.set(record, f"k{number % 7}", number)
            assert version > 0
            try:
                engine.set(record, "refused", number)
            except MetadataRejected as error:
                rejected += 1
                assert {problem.reason for problem in error.problems} == {"no"}
        return rejected

    rejected = sum(each_worker(lambda worker: (come_and_go if worker % 2 else change)(worker)))
    changes = 2 * 2 * 300 * load - rejected
    assert record.version == changes
    assert heard == list(range(1, changes + 1))
    assert engine.stats()["metadata_rejected"] == rejected
    # All that came has gone: one validator is left, and one notifier.
    assert engine.set(record, "refused", 1) == changes + 1
    assert engine.get(record, "refused") == 2


def test_selection_while_records_move(registry: Any, load: int) -> None:
    residents = [
        registry.add(f"resident-{number}", groups=["g", "h"], device_type="d", tags={"t": "v"}) for number in range(50)
    ]
    movers = [registry.add(f"mover-{number}") for number in range(50)]

    def move(worker: int) -> None:
        chance = random.Random(worker)
        for _ in range(600 * load):
            record = chance.choice(movers)
            (registry.join if chance.random() < 0.5 else registry.leave)(record, "g")
            record.device_type = chance.choice(["d", None, "e"])
            record.tags = chance.choice([{}, {"t": "v"}, {"t": "w"}])
            record.status = chance.choice(list(ConnectionStatus))

    def look(worker: int) -> None:
        for _ in range(25 * load):
            for filters in (
                {"group": ["g", "h"], "device_type": "d"},
                {"device_type": "d", "tag": ["t", ("t", "v")], "not_group": "i"},
                {"status": ConnectionStatus.ONLINE, "not_device_type": "e"},
                {"not_status": [ConnectionStatus.OFFLINE, ConnectionStatus.CLOSING], "not_user": "u"},
            ):
                found = registry.select(**filters)
                assert len(found) == len(set(found))
                assert set(residents) <= set(found)
            assert set(registry.select(group=["g", "h"])) == set(residents)

    each_worker(lambda worker: (look if worker % 2 else move)(worker))
    assert_consistent(registry)


class Gate:
    """Where a callback stands still until it is let on."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.is_open = threading.Event()

    def __call__(self, *_: object) -> None:
        self.is_reached.set()
        assert self.is_open.wait(60), "nobody opened it"


def test_validator_that_blocks_holds_nobody_else(registry: Any, engine: Any) -> None:
    record, other = registry.add("a", groups=["g"]), registry.add("b", groups=["g"])
    gate = Gate()
    engine.add_validator(gate, key="slow")

    def slow() -> Any:
        return engine.update(record, {"slow": 1, "k": "slow"})

    def quick() -> Any:
        gate.is_reached.wait()
        made = engine.set(record, "k", "quick"), engine.update_where({"l": 1}, group="g").changed
        assert registry.remove("b") is other
        gate.is_open.set()
        return made

    assert run_threads(slow, quick) == [3, (1, 2)]
    assert dict(record.metadata) == {"slow": 1, "k": "slow", "l": 1}


def test_connection_that_goes_while_a_validator_blocks(registry: Any, engine: Any) -> None:
    record = registry.add("a")
    heard: list[Any] = []
    gate = Gate()
    engine.add_validator(gate)
    engine.add_notifier(heard.append)

    def remove() -> None:
        gate.is_reached.wait()
        registry.remove(record)
        gate.is_open.set()

    is_gone, _ = run_threads(lambda: gone(lambda: engine.set("a", "k", 1)), remove)
    assert is_gone
    assert (dict(record.metadata), record.version, heard) == ({}, 0, [])


def test_condition_is_tested_after_a_validator_that_blocks(registry: Any, engine: Any) -> None:
    record = registry.add("a")
    gate = Gate()
    engine.add_validator(gate, key="slow")

    def slow() -> Any:
        with pytest.raises(VersionConflict) as caught:
            engine.set(record, "slow", 1, if_version=0)
        return caught.value.current

    def quick() -> None:
        gate.is_reached.wait()
        engine.set(record, "k", 1)
        gate.is_open.set()

    assert run_threads(slow, quick) == [1, None]
    assert dict(record.metadata) == {"k": 1}


def test_notifier_that_blocks_delays_announcements_and_no_change(registry: Any, engine: Any) -> None:
    registry.add("a")
    registry.add("b")
    heard: list[tuple[str, int]] = []
    gate = Gate()
    engine.add_notifier(gate, key="slow")
    engine.add_notifier(lambda change: heard.append((change.client_id, change.version)))

    def quick() -> None:
        gate.is_reached.wait()
        assert [engine.set("a", "k", 1), engine.set("b", "k", 1), engine.delete("a", "k")] == [2, 1, 3]
        assert heard == []
        gate.is_open.set()

    run_threads(lambda: engine.set("a", "slow", 1), quick)
    assert heard == [("a", 1), ("a", 2), ("b", 1), ("a", 3)]
