"""Two threads on one registry, with ids that the other one does not touch; against one thread that has it for itself.

Each thread has its own half of the connections, and goes through the ids of its half in random order:

* *get_many*: calls with 1,000 ids each.
* *get_many and changes*: the same, and after each call 50 of its ids are removed and added again: one change for each
  ten look-ups.
* *get*: the same ids, a call for each.

The threads start from a barrier and work until the same moment; a thread's throughput is what it did divided by the
time it took. (With a fixed amount of work for each, the wall clock would run until the slower of the two ends. On a
machine whose cores slow down by turns that tells how uneven they were, and the faster thread would run alone at the
end.) Ids are chosen before. One thread alone and two threads take turns, so a busy machine slows both. *Scaling* is
the throughput of both threads divided by that of one. *Work* is the processor time of an id with two threads divided
by the one of a thread alone: what the threads cost each other, without what other processes take from them. On two
free cores that never wait for a lock, scaling is 2 / work. *Nothing shared* is a loop over ids that looks nothing up:
its scaling is what the machine had to give. Where that is far from 2, other processes had the cores, and the rest
tells little.

Without a GIL, a thread counts references to objects that it made without atomic instructions, and all other ones with
them. So there are two ways: each thread has made its ids and added its connections itself, as in a server with an event
loop for each thread; or another thread has made everything.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import TypeAlias

from bench.harness import Benchmark, Report, Samples, figure, gil_enabled
from bench.population import SEED, make_conns, make_ids
from bench.stores import DICT, GENERATION_2, NATIVE, STORES, Store, loop_alone

_IDS_OF_A_CALL = 1_000
_CHANGES_OF_A_CALL = 50
_GET_MANY = "get_many"
_CHANGES = "get_many and changes"
_GET = "get"
_CONTROL = "nothing shared"
_ONE, _TWO = "one thread", "two threads"
_ONE_WORK, _TWO_WORK = "work of one", "work of two"


@dataclass(frozen=True)
class _Effort:
    connections: int  # of each thread
    seconds: float  # that the threads work, each time
    repetitions: int


_FULL = _Effort(50_000, 0.1, repetitions=30)
_QUICK = _Effort(2_000, 0.005, repetitions=2)
_STORES = (DICT, GENERATION_2, NATIVE)


@dataclass(frozen=True)
class _Share:
    """What one thread works with: its ids in lists for one call each, and connection objects for one list."""

    calls: list[list[str]]
    conns: tuple[object, ...]


# What a thread does with the ids of one call.
_Work: TypeAlias = Callable[[Store, list[str], Sequence[object]], None]


def _make_share(number: int, connections: int) -> _Share:
    ids = make_ids(connections, SEED + number)
    Random(SEED + number).shuffle(ids)
    calls = [ids[begin : begin + _IDS_OF_A_CALL] for begin in range(0, connections, _IDS_OF_A_CALL)]
    return _Share(calls, make_conns(_IDS_OF_A_CALL))


# ---- what a thread does ----------------------------------------------------------------------------------------------


def _get_many(store: Store, ids: list[str], _: Sequence[object]) -> None:
    store.get_many(ids)


def _get_many_and_changes(store: Store, ids: list[str], conns: Sequence[object]) -> None:
    store.get_many(ids)
    changed = ids[:_CHANGES_OF_A_CALL]
    store.remove(changed)
    store.add(changed, conns[:_CHANGES_OF_A_CALL])


def _get(store: Store, ids: list[str], _: Sequence[object]) -> None:
    store.look_up(ids)


def _loop_alone(_: Store, ids: list[str], __: Sequence[object]) -> None:
    loop_alone(ids, 10)


_WORK: dict[str, _Work] = {_GET_MANY: _get_many, _CHANGES: _get_many_and_changes, _GET: _get}


def _fill(store: Store, share: _Share) -> None:
    for ids in share.calls:
        store.add(ids, share.conns)
    for ids in share.calls:
        store.look_up(ids)  # brings generation 2 into its best state


def _work_until(end_ns: int, work: _Work, store: Store, share: _Share) -> int:
    """Go through the share's calls, again and again, until the clock says *end_ns*. How many ids were worked on."""
    calls = 0
    for ids in cycle(share.calls):
        work(store, ids, share.conns)
        calls += 1
        if time.perf_counter_ns() >= end_ns:
            break
    return calls * _IDS_OF_A_CALL


# ---- threads ---------------------------------------------------------------------------------------------------------


class _Workers:
    """Threads that live through the benchmark, because an object's owner is the thread that made it."""

    def __init__(self, count: int) -> None:
        self._threads = [ThreadPoolExecutor(1, "worker") for _ in range(count)]

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown()

    def call(self, number: int, function: Callable[..., _Share | None], *args: object) -> _Share | None:
        """What *function* returns or raises in one of the threads."""
        return self._threads[number].submit(function, *args).result()

    def clock(self, work: Mapping[int, Callable[[int], int]], seconds: float) -> tuple[float, float]:
        """Run pieces of work side by side, each in the thread of that number.

        Args:
            work: functions that work until ``perf_counter_ns`` has reached what they are given, and return how many
                ids they did.
            seconds: that they have.

        Returns:
            Ids a second of all of them together, and seconds of processor time of an id.
        """
        barrier = threading.Barrier(len(work))

        def timed(function: Callable[[int], int]) -> tuple[int, int, int]:
            barrier.wait()
            begin, begin_work = time.perf_counter_ns(), time.thread_time_ns()
            done = function(begin + int(seconds * 1e9))
            return done, time.perf_counter_ns() - begin, time.thread_time_ns() - begin_work

        pending = [self._threads[number].submit(timed, function) for number, function in work.items()]
        results = [future.result() for future in pending]
        ids_per_s = sum(done / (wall_ns / 1e9) for done, wall_ns, _ in results)
        return ids_per_s, sum(work_ns for _, _, work_ns in results) / 1e9 / sum(done for done, _, _ in results)


def _take(workers: _Workers, store: Store, shares: Sequence[_Share], work: _Work, effort: _Effort) -> Samples:
    """Ids a second, and processor time of an id, of one thread (by turns this and the other one) and of all."""

    def job(number: int) -> Callable[[int], int]:
        return lambda end_ns: _work_until(end_ns, work, store, shares[number])

    samples = Samples()
    for repetition in range(effort.repetitions):
        alone = repetition % len(shares)
        for rate, cost, numbers in ((_ONE, _ONE_WORK, [alone]), (_TWO, _TWO_WORK, range(len(shares)))):
            ids_per_s, work_s = workers.clock({number: job(number) for number in numbers}, effort.seconds)
            samples.add(rate, ids_per_s)
            samples.add(cost, work_s)
    return samples


def _check(store: Store, shares: Sequence[_Share], effort: _Effort) -> None:
    for share in shares:
        for call in share.calls:
            if None in store.get_many(call):
                raise AssertionError("an id was not found")
    if len(store.held) != len(shares) * effort.connections:
        raise AssertionError(f"{len(store.held)} connections are left")


def _measure(workers: _Workers, name: str, effort: _Effort, *, own: bool) -> dict[str, Samples]:
    """Samples of each kind of work for one store."""
    store = STORES[name]()
    shares = []
    for number in range(2):
        maker = number if own else 2
        share = workers.call(maker, _make_share, number, effort.connections)
        assert share is not None
        workers.call(maker, _fill, store, share)
        shares.append(share)
    found = {}
    # Beside what is judged by it.
    works = _WORK | {_CONTROL: _loop_alone} if name == NATIVE else _WORK
    for title, work in works.items():
        found[title] = _take(workers, store, shares, work, effort)
        _check(store, shares, effort)
    store.clear()
    return found


def _report_way(report: Report, title: str, found: dict[str, dict[str, Samples]]) -> None:
    rows = []
    for name, by_work in found.items():
        for work, samples in by_work.items():
            one, two = samples.median(_ONE), samples.median(_TWO)
            scaling, extra = samples.ratio(_TWO, _ONE), samples.ratio(_TWO_WORK, _ONE_WORK)
            rows.append([f"{name}, {work}", *map(figure, (one / 1e6, two / 1e6)), *_times(scaling, extra)])
            report.row(
                made_by=title, implementation=name, what=work, one_per_s=one, two_per_s=two, scaling=scaling, work=extra
            )
    title = f"Ids and connections made by {title}: million ids a second"
    report.table(title, ["", _ONE, _TWO, "scaling", "work"], rows)


def _times(*ratios: float) -> list[str]:
    return [figure(ratio, "x") for ratio in ratios]


def run(report: Report) -> None:
    """Print a table for each of the two ways."""
    gc.disable()
    effort = _QUICK if report.quick else _FULL
    ways = {"the thread itself": True, "another thread": False}
    native: dict[str, dict[str, Samples]] = {}
    with _Workers(3) as workers:
        for title, own in ways.items():
            found = {name: _measure(workers, name, effort, own=own) for name in _STORES}
            _report_way(report, title, found)
            native[title] = found[NATIVE]
    if gil_enabled():
        report.note("The targets need a free-threaded build of Python with the GIL off; this one has it on.")
        return
    for title, by_work in native.items():
        for work, least in ((_GET_MANY, 1.8), (_CHANGES, 1.6)):
            what = f"{work}, 2 threads to one, made by {title}"
            report.at_least(what, by_work[work].ratio(_TWO, _ONE), least, "x")


BENCHMARKS = (
    Benchmark("threads", "two threads against one; without the GIL they should be nearly twice as fast", run),
)
