"""Health: both implementations step by step against each other, and the outcomes that must be reached, on each of them.

Time stands still between the steps. What a kernel would say is given to ``look`` in place of asking one, so the machine
may claim what no kernel ever says: the two must agree on that as well.
"""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import FakeClock, Implementation, load_implementation
from wsfast.connection import ConnectionStatus

SUSPECT, CLEARED, DEAD, PING_FAILED, NEW_GRADE, LATE, UNASKED = 2, 4, 8, 16, 32, 64, 128
NAMES = {
    SUSPECT: "suspect",
    CLEARED: "cleared",
    DEAD: "dead",
    PING_FAILED: "ping failed",
    NEW_GRADE: "new grade",
    LATE: "late",
    UNASKED: "unasked",
}
ENDED = 3
BY_SILENCE, BY_NO_PONG = 1, 2
BASE, ACKED, BYTES = 1, 2, 8
MS = 1_000_000
SECOND = 1000 * MS
HOUR = 3600 * SECOND

# So far from 0 that no time that anything is said to have happened at comes near it: there, 0 stands for "never".
START_NS = 10**17


TRACE = ("nothing", "ping", "pong", "late", "suspect", "cleared", "lag", "stuck", "left", "unread", "grade", "dead")


def health_of(impl: Implementation) -> Any:
    return importlib.import_module("wsfast._health" if impl.name == "native" else "wsfast.reference").Health


# ---- step by step ----------------------------------------------------------------------------------------------------

CONNECTIONS = 3
# Seconds teach nothing to the classes, which are counted in hours.
units = st.sampled_from([SECOND, SECOND, 5 * 60 * SECOND, 2 * HOUR])
picks = st.integers(0, CONNECTIONS - 1)
few = st.integers(0, 3)


def times(least: int, most: int) -> st.SearchStrategy[int]:
    """Tenths of the unit that is drawn with the settings."""
    return st.integers(least, most)


TIMES: dict[str, st.SearchStrategy[int]] = {
    "silence_ns": times(20, 200),
    "timeout_ns": times(10, 100),
    "answer_ns": times(1, 40),
    "write_ns": times(1, 30),
    "interval_ns": times(10, 100),
    "interval_poor_ns": times(5, 50),
    "interval_min_ns": times(2, 20),
    "interval_learn_ns": times(5, 60),
    "learn_ns": times(0, 500),
    "by_acks_ns": times(10, 200),
    "late_ns": times(1, 20),
    "probe_ns": times(1, 20),
    "prior_wait_ns": times(1, 60),
    "peak_half_ns": times(1, 200),
    "tick_ns": times(4, 40),
    "slack_ns": times(0, 20),
}
OTHERS: dict[str, st.SearchStrategy[Any]] = {
    "probes": st.integers(0, 6),
    "bad_factor": st.integers(1, 3),
    "poor_latency_us": st.sampled_from([1, 5000, 200_000, 2**32 - 1]),
    "poor_loss": st.sampled_from([0, 100, 300, 1000]),
    "bad_loss": st.sampled_from([0, 200, 1000]),
    "limits": st.lists(
        st.tuples(*[st.sampled_from([0, 100, 300, 3000, 100_000, 2**32 - 1])] * 4), min_size=3, max_size=3
    ),
    "calm": st.integers(0, 3),
    "trace": st.integers(0, 8),
    "risk_per_1000h": st.sampled_from([0.5, 1.0, 10.0, 999.9]),
    "pings_per_h": st.sampled_from([0.0, 0.01, 3.0, 200.0]),
}

# What a kernel says; its times are in tenths of the unit.
kernels = st.none() | st.tuples(
    st.sampled_from([0, BASE, BASE | ACKED, BASE | ACKED | BYTES, 15, BASE | BYTES]),
    st.sampled_from([0, 0, 0, 1, 9]),
    st.sampled_from([0, 0, 1, 2, 7]),
    st.sampled_from([0, 300, 5_000, 80_000, 900_000, 2**32 - 1]),
    times(0, 60),
    times(0, 60),
    few,
    st.integers(0, 6),
    few,
    st.sampled_from([0, 0, 0, 5]),
    st.sampled_from([0, 0, 1, 2, 2**32 - 1]),
)
# One that has nothing to complain about.
content = st.builds(
    lambda rtt_us, ago: (BASE | ACKED | BYTES, 0, 0, rtt_us, ago, ago, 1, ago, 0, 0, 0),
    st.sampled_from([5_000, 900_000]),
    times(0, 3),
)
kernels_of_all = st.none() | st.lists(content | kernels, min_size=CONNECTIONS, max_size=CONNECTIONS)

delays_ns = st.sampled_from([0, 1000, 2 * MS, 6 * MS, 50 * MS, 300 * MS, 1500 * MS, 40 * SECOND])
# Hypothesis likes to draw the first of what there is.
mostly_delays_ns = st.sampled_from([300 * MS, 50 * MS, 6 * MS, 2 * MS, 1000, 0, 1500 * MS, 40 * SECOND, None])
answers = st.lists(mostly_delays_ns, min_size=CONNECTIONS, max_size=CONNECTIONS)


class Side:
    """One implementation with its registry, whose records are told apart by their number."""

    def __init__(self, impl: Implementation, given: dict[str, Any], clock: FakeClock) -> None:
        self.name = impl.name
        self.registry = impl.Registry(1, clock=clock, wall_clock=clock.wall)
        self.health = health_of(impl)(given, clock.now)
        self.records = [self.registry.add(str(number)) for number in range(CONNECTIONS)]

    def outcome(self, call: Callable[[Side], Any]) -> tuple[Any, ...]:
        try:
            return "returned", call(self)
        except (KeyError, ValueError) as error:
            return "raised", type(error)

    def number(self, record: Any) -> int:
        return self.records.index(record)

    def look(self, numbers: list[int], now_ns: int, facts: list[Any] | None) -> Any:
        pings, others = self.health.look([self.records[number] for number in numbers], now_ns, facts)
        return [self.number(record) for record in pings], [(self.number(record), found) for record, found in others]

    def state(self, now_ns: int) -> Any:
        """All that can be seen."""
        known = [record for record in self.records if record in self.health]
        return {
            "records": [
                (each.deadline_ns, each.status, each.quality, each.last_active_ns, each.last_heartbeat_ns)
                for each in self.records
            ],
            "known": [self.number(record) for record in known],
            "len": len(self.health),
            "figures": [self.health.figures(record, now_ns) for record in known],
            "traces": [self.health.trace(record) for record in known],
            "totals": self.health.totals(),
            "at": [self.health.at(now_ns - tenths * SECOND) for tenths in range(0, 4000, 400)],
        }


class Comparison(RuleBasedStateMachine):
    """The same events for all implementations."""

    def __init__(self, implementations: list[Implementation]) -> None:
        super().__init__()
        self.implementations = implementations
        self.clock = FakeClock(START_NS)
        self.sides: list[Side] = []
        self.sweep = 0
        self.asked: list[list[int]] = [[] for _ in range(CONNECTIONS)]

    @initialize(unit=units, times=st.fixed_dictionaries(TIMES), others=st.fixed_dictionaries(OTHERS))
    def start(self, unit: int, times: dict[str, int], others: dict[str, Any]) -> None:
        self.tenth = unit // 10
        self.tick_ns = times["tick_ns"] * self.tenth
        self.settings = {name: tenths * self.tenth for name, tenths in times.items()} | others
        self.due_ns = self.clock.now + self.tick_ns
        self.sides = [Side(impl, self.settings, self.clock) for impl in self.implementations]
        for pick in range(CONNECTIONS - 1):
            self.add(pick, 65535 * pick)

    def same(self, call: Callable[[Side], Any]) -> Any:
        """Make *call* on all sides; what it returns, which must be the same, or None."""
        outcomes = [side.outcome(call) for side in self.sides]
        for side, outcome in zip(self.sides, outcomes, strict=True):
            assert outcome == outcomes[-1], f"{side.name} differs from {self.sides[-1].name}"
        note(f"-> {outcomes[-1]}")
        return outcomes[-1][1] if outcomes[-1][0] == "returned" else None

    def count(self, found: int) -> None:
        for bit, name in NAMES.items():
            if found & bit:
                event(name)

    # ---- connections

    @rule(pick=picks, chance=st.sampled_from([0, 1, 40_000, 65_535]))
    def add(self, pick: int, chance: int) -> None:
        """Of a connection that is known nothing comes but an error, unless it is dead: then it begins anew."""
        side = self.sides[-1]
        record = side.records[pick]
        if record in side.health and side.health.figures(record, self.clock.now)["state"] == ENDED:
            self.remove(pick, 0)
        self.same(lambda side: side.health.add(side.records[pick], self.clock.now, chance))

    @rule(pick=picks, sure=few)
    def remove(self, pick: int, sure: int) -> None:
        if not sure:
            self.same(lambda side: side.health.remove(side.records[pick]))
            self.asked[pick].clear()

    @rule(pick=picks, sure=few)
    def leave_the_registry(self, pick: int, sure: int) -> None:
        """The connection comes back with a new record, while that of before is known on until it is removed."""
        if sure:
            return
        for side in self.sides:
            side.registry.remove(side.records[pick])
        self.same(lambda side: side.look([pick], self.clock.now, None))
        self.same(lambda side: side.health.remove(side.records[pick]))
        self.asked[pick].clear()
        for side in self.sides:
            side.records[pick] = side.registry.add(str(pick))

    @rule(
        pick=picks,
        status=st.sampled_from([ConnectionStatus.ONLINE] * 6 + list(ConnectionStatus)),
    )
    def change_status(self, pick: int, status: ConnectionStatus) -> None:
        for side in self.sides:
            side.records[pick].status = status

    # ---- time

    @rule(tenths=times(0, 30))
    def pass_time(self, tenths: int) -> None:
        self.clock.advance(tenths * self.tenth)

    @rule(tenths=st.sampled_from([-1, 0, 0, 0, 1, 3, 10, 30]))
    def tick(self, tenths: int) -> None:
        """A tick comes so long after it was due, or now if that is over."""
        self.clock.now = max(self.clock.now, self.due_ns + tenths * self.tenth)
        self.same(lambda side: side.health.tick(self.clock.now))
        self.due_ns = max(self.due_ns, self.clock.now + self.tick_ns)

    @rule()
    def begin_sweep(self) -> None:
        self.sweep = self.same(lambda side: side.health.begin_sweep(self.clock.now))

    # ---- looking

    def given(self, kernels: list[Any] | None) -> list[Any] | None:
        if kernels is None:
            return None
        tenth_ms = self.tenth // MS
        return [each and (*each[:4], each[4] * tenth_ms, each[5] * tenth_ms, *each[6:]) for each in kernels]

    def look(self, numbers: list[int], kernels: list[Any] | None) -> None:
        given = self.given(kernels)
        facts = None if given is None else [given[number] for number in numbers]
        pings, others = self.same(lambda side: side.look(numbers, self.clock.now, facts))
        for number in pings:
            self.asked[number].append(self.sweep)
            event("ping")
        for _, found in others:
            self.count(found)

    @rule(kernels=kernels_of_all)
    def look_at_those_who_are_due(self, kernels: list[Any] | None) -> None:
        numbers = self.same(lambda side: sorted(map(side.number, side.registry.due(side.health.at(self.clock.now)))))
        self.look(numbers, kernels)

    @rule(sweeps=st.integers(1, 25), late=st.sampled_from([0, 0, 0, 0, 5]), kernels=kernels_of_all, answers=answers)
    def live_on(self, sweeps: int, late: int, kernels: list[Any] | None, answers: list[int | None]) -> None:
        """Sweep after sweep; whoever answers does so after its time."""
        for _ in range(sweeps):
            self.tick(late)
            self.begin_sweep()
            self.look_at_those_who_are_due(kernels)
            for pick, after_ns in enumerate(answers):
                if after_ns is not None and self.asked[pick] and self.asked[pick][-1] == self.sweep:
                    self.answer(pick, 1, after_ns, None)

    @rule(numbers=st.lists(picks, max_size=12), kernels=kernels_of_all)
    def look_at_any(self, numbers: list[int], kernels: list[Any] | None) -> None:
        self.look(numbers, kernels)

    # ---- what comes back

    @rule(pick=picks, tenths=times(0, 5))
    def receive(self, pick: int, tenths: int) -> None:
        self.clock.advance(tenths * self.tenth)
        for side in self.sides:
            side.records[pick].touch(self.clock.now)

    @rule(
        pick=picks,
        back=st.sampled_from([1, 1, 1, 1, 2, 3, 5]),
        after_ns=delays_ns,
        left_ns=st.sampled_from([None, 0, 1000, MS, 100 * MS]),
    )
    def answer(self, pick: int, back: int, after_ns: int, left_ns: int | None) -> None:
        """A pong comes for one of the last pings, or once more for it."""
        self.clock.advance(after_ns)
        number = self.asked[pick][-back] if back <= len(self.asked[pick]) else 0
        left = 0 if left_ns is None else self.clock.now - left_ns
        self.count(self.same(lambda side: side.health.pong(side.records[pick], number, left, self.clock.now)))

    @rule(pick=picks, number=st.sampled_from([0, 1, 2, 5000, 2**32 - 1]))
    def answer_what_nobody_asked(self, pick: int, number: int) -> None:
        self.same(lambda side: side.health.pong(side.records[pick], number, 0, self.clock.now))

    @rule(pick=picks, is_stuck=st.booleans(), size=st.sampled_from([0, 1, 2**32 - 1, 2**40]))
    def be_stuck(self, pick: int, is_stuck: bool, size: int) -> None:
        self.same(lambda side: side.health.stuck(side.records[pick], self.clock.now, is_stuck, size))

    @invariant()
    def states_are_the_same(self) -> None:
        if not self.sides:
            return
        expected = self.sides[-1].state(self.clock.now)
        for side in self.sides:
            assert side.state(self.clock.now) == expected, side.name


def test_implementations_agree_on_every_step(native: Implementation) -> None:
    implementations = [native, load_implementation("reference")]
    # Its steps are many sweeps each, so an eighth of the examples takes as long as others do.
    few_examples = settings(max_examples=settings().max_examples // 8)
    run_state_machine_as_test(lambda: Comparison(implementations), settings=few_examples)


# ---- what must be found ----------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "silence_ns": 30 * SECOND,
    "timeout_ns": 60 * SECOND,
    "answer_ns": 5 * SECOND,
    "write_ns": 10 * SECOND,
    "interval_ns": 20 * SECOND,
    "interval_poor_ns": 15 * SECOND,
    "interval_min_ns": 5 * SECOND,
    "interval_learn_ns": 10 * SECOND,
    "learn_ns": 0,
    "by_acks_ns": 100 * SECOND,
    "late_ns": SECOND,
    "probe_ns": 2 * SECOND,
    "prior_wait_ns": 5 * SECOND,
    "peak_half_ns": 600 * SECOND,
    "tick_ns": SECOND,
    "slack_ns": SECOND // 4,
    "probes": 3,
    "bad_factor": 2,
    "poor_latency_us": 400_000,
    "poor_loss": 200,
    "bad_loss": 500,
    "limits": ((100_000, 50_000, 50, 20), (200_000, 100_000, 200, 50), (400_000, 200_000, 400, 100)),
    "calm": 2,
    "trace": 8,
    "risk_per_1000h": 10.0,
    "pings_per_h": 0.0,
}


class Ward:
    """One connection, and a loop that ticks."""

    def __init__(self, impl: Implementation, **others: Any) -> None:
        self.clock = FakeClock(START_NS)
        self.registry = impl.Registry(1, clock=self.clock, wall_clock=self.clock.wall)
        self.health = health_of(impl)(SETTINGS | others, self.clock.now)
        self.record = self.registry.add("a")
        self.health.add(self.record, self.clock.now)
        self.tick_ns = (SETTINGS | others)["tick_ns"]
        self.sweep = 0
        self.asked: list[int] = []

    def tick(self, facts: tuple[int, ...] | None = None, *, late_ns: int = 0) -> int:
        """The next tick, with what it has found."""
        self.clock.advance(self.tick_ns + late_ns)
        self.health.tick(self.clock.now)
        self.sweep = self.health.begin_sweep(self.clock.now)
        due = self.registry.due(self.health.at(self.clock.now))
        pings, others = self.health.look(due, self.clock.now, [facts] * len(due))
        self.asked += [self.sweep] * len(pings)
        return dict(others).get(self.record, 0)

    def wait(self, seconds: int, facts: tuple[int, ...] | None = None) -> int:
        """All that the ticks of so many seconds find."""
        found = 0
        for _ in range(seconds):
            found |= self.tick(facts)
        return found

    def wait_for_ping(self, facts: tuple[int, ...] | None = None) -> int:
        before, found = len(self.asked), 0
        for _ in range(200):
            found |= self.tick(facts)
            if len(self.asked) > before:
                return found
        raise AssertionError("no ping")

    def answer(self, after_ns: int = 10 * MS) -> int:
        """The last ping is answered so long after it left."""
        self.clock.advance(after_ns)
        return self.health.pong(self.record, self.asked[-1], 0, self.clock.now)

    def figure(self, name: str) -> int:
        return self.health.figures(self.record, self.clock.now)[name]

    def traced(self) -> list[str]:
        return [TRACE[what] for _, what, _ in self.health.trace(self.record)]


def kernel(
    *,
    known: int = BASE | ACKED,
    unacked: int = 0,
    retransmits: int = 0,
    rtt_us: int = 10_000,
    last_sent_ms: int = 0,
    last_ack_ms: int = 0,
    bytes_acked: int = 0,
    bytes_sent: int = 0,
    bytes_retrans: int = 0,
    notsent: int = 0,
    unread: int = 0,
) -> tuple[int, ...]:
    times_ms = (last_sent_ms, last_ack_ms)
    return known, unacked, retransmits, rtt_us, *times_ms, bytes_acked, bytes_sent, bytes_retrans, notsent, unread


@pytest.fixture
def ward(impl: Implementation) -> Ward:
    return Ward(impl)


def test_who_answers_is_never_suspected(ward: Ward) -> None:
    for _ in range(20):
        assert ward.wait_for_ping() == 0
        assert ward.answer() == 0
    assert ward.figure("srtt_us") == 10_000
    assert ward.record.quality.latency == pytest.approx(0.01)
    assert ward.record.status is ConnectionStatus.ONLINE


def test_who_sends_is_not_asked(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.answer()
    for _ in range(100):
        ward.record.touch(ward.clock.now)
        assert ward.tick() == 0
    assert len(ward.asked) == 1


def test_silence_makes_suspect_and_then_dead(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.answer()
    ward.wait_for_ping()
    last_sign_ns = ward.record.last_active_ns
    assert ward.tick() == SUSPECT | NEW_GRADE
    assert ward.record.status is ConnectionStatus.SUSPECT
    found = 0
    while not found & DEAD:
        found = ward.tick()
    assert ward.figure("cause") == BY_SILENCE
    assert 30 * SECOND <= ward.clock.now - last_sign_ns <= 32 * SECOND
    assert ward.wait(100) == 0


def test_any_byte_clears_a_suspect(ward: Ward) -> None:
    ward.wait_for_ping()
    assert ward.wait(3) & SUSPECT
    ward.record.touch(ward.clock.now)
    assert ward.wait(5) & CLEARED
    assert ward.record.status is ConnectionStatus.ONLINE


def test_a_late_pong_clears_a_suspect(ward: Ward) -> None:
    ward.wait_for_ping()
    probed = ward.asked[-1]
    assert ward.wait(3) & SUSPECT
    assert ward.health.pong(ward.record, probed, 0, ward.clock.now) & (CLEARED | LATE) == CLEARED | LATE
    assert ward.record.status is ConnectionStatus.ONLINE


def test_a_program_that_hangs_is_dead_by_its_missing_pong(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.answer()
    content = kernel()
    ward.wait_for_ping(content)
    asked_ns = ward.clock.now
    found = 0
    while not found & DEAD:
        found = ward.tick(content)
    assert ward.figure("cause") == BY_NO_PONG
    assert 60 * SECOND <= ward.clock.now - asked_ns <= 62 * SECOND


def test_bytes_that_nobody_has_read_are_a_sign_of_life(ward: Ward) -> None:
    ward.wait_for_ping()
    assert ward.wait(3) & SUSPECT
    assert ward.wait(3, kernel(unread=5)) & CLEARED
    # The pong may be behind them: nobody is blamed for what we have not read.
    assert not ward.wait(1000, kernel(unread=5)) & DEAD
    assert ward.wait(60) & DEAD


def test_what_is_not_acknowledged_makes_suspect_without_a_ping(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.answer()
    ward.wait(10)
    facts = kernel(unacked=1, retransmits=2, last_sent_ms=9000, last_ack_ms=10_000)
    pings, others = ward.health.look([ward.record], ward.clock.now, [facts])
    assert pings == [ward.record]
    assert others == [(ward.record, SUSPECT | NEW_GRADE)]


@pytest.mark.parametrize("takes", [True, False])
def test_a_ping_that_cannot_leave_ends_only_who_takes_nothing(ward: Ward, takes: bool) -> None:
    ward.wait_for_ping()
    ward.answer()
    ward.wait_for_ping()
    ward.health.stuck(ward.record, ward.clock.now, True, 1000)
    found = 0
    for taken in range(100):
        found |= ward.tick(kernel(bytes_acked=taken if takes else 7))
    assert found & PING_FAILED
    assert bool(found & DEAD) == (not takes)
    assert ward.figure("cause") == (0 if takes else BY_NO_PONG)
    assert ward.figure("is_stuck") == 1
    ward.health.stuck(ward.record, ward.clock.now, False)
    assert ward.figure("is_stuck") == 0


def test_grades_get_worse_at_once_and_better_by_one(ward: Ward) -> None:
    ward.wait_for_ping()
    assert ward.answer(250 * MS) == NEW_GRADE
    assert ward.figure("grade") == 2
    grades = []
    for _ in range(40):
        ward.wait_for_ping()
        ward.answer(MS)
        grades.append(ward.figure("grade"))
    assert grades == sorted(grades, reverse=True)
    assert set(grades) == {2, 1, 0}


def test_pongs_that_answer_nothing(ward: Ward) -> None:
    assert ward.health.pong(ward.record, 0, 0, ward.clock.now) == UNASKED
    ward.wait_for_ping()
    assert ward.answer() == 0
    assert ward.answer() == UNASKED
    other = ward.registry.add("b")
    assert ward.health.pong(other, ward.asked[-1], 0, ward.clock.now) == 0


def test_three_late_answers_in_a_row_are_a_slower_path(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.answer(10 * MS)
    measured = []
    for _ in range(3):
        ward.wait_for_ping()
        number = ward.asked[-1]
        ward.tick()
        ward.clock.advance(SECOND // 2)
        assert ward.health.pong(ward.record, number, 0, ward.clock.now) & LATE
        measured.append(ward.figure("srtt_us"))
    assert measured == [10_000, 10_000, (7 * 10_000 + 1_500_000) // 8]
    assert ward.figure("late") >= 3  # and probes that nobody answered


def test_a_ping_of_a_sweep_that_is_forgotten_was_late(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.record.touch(ward.clock.now)
    ward.wait_for_ping()
    for _ in range(4096 - (ward.asked[1] - ward.asked[0])):
        ward.health.begin_sweep(ward.clock.now)
    ward.answer()
    assert (ward.figure("late"), ward.figure("pings")) == (1, 2)


def test_what_was_measured_while_the_loop_was_late_is_no_measure(ward: Ward) -> None:
    ward.wait_for_ping()
    assert ward.answer(1500 * MS) == 0
    assert ward.figure("srtt_us") == 0


def test_time_that_the_loop_was_late_is_nobodys_silence(ward: Ward) -> None:
    ward.wait_for_ping()
    ward.answer()
    ward.wait_for_ping()
    assert ward.tick(late_ns=HOUR) & DEAD == 0
    assert ward.health.totals()["credit_ns"] == HOUR
    assert ward.health.totals()["stalls"] == 1
    assert "lag" in ward.traced()


def test_a_delay_within_the_slack_is_not_credited(ward: Ward) -> None:
    ward.tick(late_ns=SECOND // 4)
    assert ward.health.totals()["credit_ns"] == 0
    assert ward.health.at(ward.clock.now) == ward.clock.now
    ward.tick(late_ns=SECOND // 4 + 1)
    assert ward.health.totals()["credit_ns"] == SECOND // 4 + 1


def test_more_delays_than_are_remembered(ward: Ward) -> None:
    before_ns = ward.clock.now
    for _ in range(100):
        ward.tick(late_ns=SECOND)
    assert ward.health.at(ward.clock.now) == ward.clock.now - 100 * SECOND
    # What is older than the oldest that is remembered stands at the credit of those that were forgotten.
    assert ward.health.at(before_ns) == before_ns - 36 * SECOND


@pytest.mark.parametrize("status", [ConnectionStatus.RECONNECTING, ConnectionStatus.CLOSING, ConnectionStatus.OFFLINE])
def test_who_is_leaving_is_left_alone(ward: Ward, status: ConnectionStatus) -> None:
    ward.record.status = status
    assert ward.wait(200) == 0
    assert ward.asked == []
    assert ward.record.status is status
    assert ward.record.deadline_ns > ward.clock.now


def test_who_left_its_registry_is_left_alone(ward: Ward) -> None:
    ward.registry.remove(ward.record)
    ward.clock.advance(500 * SECOND)
    ward.health.tick(ward.clock.now)
    assert ward.health.look([ward.record], ward.clock.now) == ([], [])
    assert ward.health.pong(ward.record, 0, 0, ward.clock.now) == UNASKED
    assert ward.record.deadline_ns is None


def test_unknown_records_are_not_due_again(ward: Ward) -> None:
    other = ward.registry.add("b")
    other.deadline_ns = 5
    assert ward.health.look([other], ward.clock.now) == ([], [])
    assert other.deadline_ns is None


def test_classes_learn_from_answers_how_long_to_wait(impl: Implementation) -> None:
    times_ns = {
        "tick_ns": 20 * SECOND,
        "silence_ns": 90 * SECOND,
        "interval_ns": 60 * SECOND,
        "interval_learn_ns": HOUR,
    }
    ward = Ward(impl, **times_ns, learn_ns=100 * HOUR, late_ns=SECOND // 10, risk_per_1000h=1.0)
    for number in range(200):
        ward.wait_for_ping()
        ward.answer(10 * MS if number % 5 else 950 * MS)
    totals = ward.health.totals()
    assert totals["watched_ns"][2] > 2 * HOUR
    # One answer in five took more than half a second: far more than one in 1,000 hours.
    assert SECOND in totals["wait_ns"]


@pytest.mark.parametrize(("allowed", "risk"), [(1e9, 8.0), (1e-9, 14.0), (0.0, 10.0)])
def test_the_risk_follows_the_pings_that_may_be_spent(impl: Implementation, allowed: float, risk: float) -> None:
    ward = Ward(impl, pings_per_h=allowed, tick_ns=101 * HOUR)
    ward.clock.advance(100 * HOUR)
    ward.health.look([ward.record], ward.clock.now)
    ward.health.begin_sweep(ward.clock.now)
    assert ward.health.totals()["risk"] == pytest.approx(risk)


def test_a_trace_keeps_the_last_of_what_was(impl: Implementation) -> None:
    ward = Ward(impl, trace=3)
    ward.wait_for_ping()
    ward.answer()
    ward.wait_for_ping()
    assert ward.traced() == ["pong", "ping"]
    ward.wait(100)
    assert len(ward.traced()) == 3
    assert ward.traced()[-1] == "dead"
    silent = Ward(impl, trace=0)
    silent.wait(100)
    assert silent.traced() == []


# ---- misuse, and who keeps whom alive --------------------------------------------------------------------------------


def test_misuse(ward: Ward) -> None:
    other = ward.registry.add("b")
    with pytest.raises(ValueError, match="is known already"):
        ward.health.add(ward.record, ward.clock.now)
    with pytest.raises(KeyError):
        ward.health.figures(other, ward.clock.now)
    with pytest.raises(KeyError):
        ward.health.trace(other)
    with pytest.raises(ValueError):
        ward.health.look([ward.record], ward.clock.now, [])
    with pytest.raises(KeyError):
        type(ward.health)({}, ward.clock.now)
    assert ward.health.remove(other) is False
    ward.health.spare(other, ward.clock.now)
    ward.health.stuck(other, ward.clock.now, True)
    assert len(ward.health) == 1
    assert ward.record in ward.health
    assert other not in ward.health


def test_native_names_what_it_finds(native: Implementation) -> None:
    module = importlib.import_module("wsfast._health")
    assert {bit: getattr(module, name.upper().replace(" ", "_")) for bit, name in NAMES.items()} == {
        bit: bit for bit in NAMES
    }
    assert module.TRACE == TRACE
    assert (module.BY_SILENCE, module.BY_NO_PONG) == (BY_SILENCE, BY_NO_PONG)


def test_native_takes_records_of_the_core_only(native: Implementation) -> None:
    ward = Ward(native)
    foreign = load_implementation("reference").Registry(1).add("a")
    for wrong in (foreign, None, object()):
        with pytest.raises(TypeError, match="ConnectionMeta of the core"):
            ward.health.add(wrong, ward.clock.now)
        with pytest.raises(TypeError, match="ConnectionMeta of the core"):
            ward.health.look([wrong], ward.clock.now)
        assert wrong not in ward.health
        assert ward.health.remove(wrong) is False
    assert len(ward.health) == 1


@pytest.mark.parametrize("how", ["remove", "end of the health"])
def test_records_are_released(impl: Implementation, how: str) -> None:
    ward = Ward(impl)
    ward.wait(100)  # so that there is a trace
    reference = weakref.ref(ward.record)
    ward.registry.remove(ward.record)
    held = ward.record
    del ward.record
    gc.collect()
    assert reference() is held
    del held
    gc.collect()
    assert reference() is not None
    if how == "remove":
        assert ward.health.remove(reference()) is True
        assert len(ward.health) == 0
    else:
        del ward.health
    gc.collect()
    assert reference() is None


def test_many_come_and_go(impl: Implementation) -> None:
    registry = impl.Registry(1, clock=FakeClock(START_NS))
    health = health_of(impl)(SETTINGS, START_NS)
    records = [registry.add(str(number)) for number in range(1000)]
    for record in records:
        health.add(record, START_NS)
    for record in records[::2]:
        assert health.remove(record) is True
        assert health.remove(record) is False
    assert len(health) == 500
    assert [record in health for record in records] == [False, True] * 500
    pings, others = health.look(records, START_NS - SECOND)
    assert (pings, others) == ([], [])
    assert [record.deadline_ns is None for record in records] == [True, False] * 500
