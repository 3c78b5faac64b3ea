"""Who may come to a server, and what the others are told: on a made-up clock, with randomness that is scripted or
seeded."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsfast.errors import InvalidSetting
from wsfast.reconnect import HERD, RECONNECT, Advice, Herd, HerdPolicy, PolicyEngine, Reconnector

# Slots of 1 s, from 103 to 107, if it restarts at 100 with four connections.
POLICY = HerdPolicy(accept_rate=2.0, window_s=2.0, away_s=3.0)


def middle() -> float:
    """Randomness that has lost its interest."""
    return 0.5


def closing(connections: int, policy: HerdPolicy = POLICY, seed: int = 1, now_s: float = 100.0) -> Herd:
    """A herd whose server has begun to restart."""
    herd = Herd(policy, Random(seed).random, now_s)
    herd.close(connections, now_s, restarts=True)
    return herd


def after_of(advice: Advice | None) -> float:
    assert advice is not None
    assert advice.after_s is not None
    return advice.after_s


class TestPolicy:
    def test_the_defaults_are_those_of_clients(self) -> None:
        assert (HERD.delay_least_s, HERD.delay_most_s) == (RECONNECT.delay_least_s, RECONNECT.delay_most_s)
        assert not HERD.admission

    def test_it_does_not_change(self) -> None:
        with pytest.raises(FrozenInstanceError):
            HERD.accept_rate = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"accept_rate": 0.0}, "herd.accept_rate must be from 1e-06 to 1e+09, not 0.0"),
            ({"accept_rate": math.nan}, "herd.accept_rate must be from 1e-06 to 1e+09, not nan"),
            ({"window_s": -1.0}, "herd.window_s must be from 0 to 1e+06, not -1.0"),
            ({"away_s": math.inf}, "herd.away_s must be from 0 to 1e+06, not inf"),
            ({"burst_s": -0.1}, "herd.burst_s must be from 0 to 1e+06, not -0.1"),
            ({"least_s": 0.0}, "herd.least_s must be from 1e-06 to 1e+06, not 0.0"),
            ({"least_s": 10.0, "longest_s": 9.0}, "herd.longest_s must be from 10 to 1e+06, not 9.0"),
            ({"expected": -1}, "herd.expected must be a whole number from 0, not -1"),
            ({"expected": 1.5}, "herd.expected must be a whole number from 0, not 1.5"),
            ({"delay_least_s": -1.0}, "herd.delay_least_s must be from 0 to 1e+06, not -1.0"),
            ({"delay_least_s": 31.0}, "herd.delay_most_s must be from 31 to 1e+06, not 30.0"),
        ],
    )
    def test_bad_settings_are_refused(self, settings: dict[str, Any], text: str) -> None:
        with pytest.raises(InvalidSetting) as error:
            HerdPolicy(**settings)
        assert str(error.value) == text


class TestReasons:
    """What is told must fit a close frame, whatever the text for people is."""

    @given(
        text=st.text(st.characters(exclude_characters="=", exclude_categories=["Cs"]), max_size=200),
        after_s=st.floats(0, allow_nan=False) | st.none(),
        spread_s=st.floats(0, allow_nan=False) | st.none(),
    )
    def test_what_is_told_always_fits_and_can_be_read(
        self, text: str, after_s: float | None, spread_s: float | None
    ) -> None:
        reason = Advice(after_s, 0.0, spread_s).as_reason(text)
        assert len(reason.encode()) <= 123
        read = Advice.from_reason(reason) or Advice()
        for told, back in ((after_s, read.after_s), (spread_s, read.spread_s)):
            if told is None:
                assert back is None
            else:
                assert back == pytest.approx(min(told, 999_999_999), abs=0.0006)

    def test_the_text_is_cut_and_never_in_the_middle_of_a_character(self) -> None:
        reason = Advice(1.5, 0.0, 20.0).as_reason("é" * 61)
        assert reason == "é" * 44 + "; retry-after=1.500; spread=20.000"
        assert len(reason.encode()) == 122
        assert Advice().as_reason("x" * 124) == "x" * 123

    def test_what_has_room_is_left_as_it_is(self) -> None:
        assert Advice(12.3456).as_reason("the server restarts") == "the server restarts; retry-after=12.346"
        assert Advice(spread_s=5.0).as_reason() == "spread=5.000"


class TestAdmission:
    def test_everybody_is_let_in_unless_it_is_wanted_otherwise(self) -> None:
        herd = Herd(HerdPolicy(accept_rate=1.0), middle)
        assert [herd.admit(0.0) for _ in range(1000)] == [0.0] * 1000
        assert (herd.admitted, herd.turned_away) == (1000, 0)

    def test_a_burst_is_let_in_and_the_others_get_slots(self) -> None:
        herd = Herd(HerdPolicy(accept_rate=8.0, burst_s=0.375, admission=True), middle, 100.0)
        assert [herd.admit(100.0) for _ in range(6)] == [0.0, 0.0, 0.0, 1.0625, 1.1875, 1.3125]
        assert (herd.admitted, herd.turned_away) == (3, 3)
        assert herd.admit(100.125) == 0.0
        assert herd.admit(100.125) == 1.3125

    def test_plain_clients_that_come_together_are_let_in_at_the_rate(self) -> None:
        herd = Herd(HerdPolicy(accept_rate=100.0, admission=True), Random(5).random)
        due = [(0.0, number) for number in range(2000)]
        back: Counter[int] = Counter()
        while due:
            at_s, number = heapq.heappop(due)
            wait_s = herd.admit(at_s)
            if wait_s:
                # As a plain client that knows no more than the header, and waits no longer.
                heapq.heappush(due, (at_s + math.ceil(wait_s), number))
            else:
                back[int(at_s)] += 1
        assert sum(back.values()) == herd.admitted == 2000
        assert max(back.values()) <= 100
        assert max(back) <= 2000 / 100 + 1

    def test_who_is_turned_away_is_never_told_to_come_at_once(self) -> None:
        herd = Herd(HerdPolicy(accept_rate=1e9, least_s=1e-6, burst_s=0.0, admission=True), lambda: 0.0)
        assert herd.admit(0.0) == 0.0
        assert herd.admit(0.0) > 0.0


class TestRestart:
    def test_slots_and_the_spread_to_be_told_in_advance(self) -> None:
        herd = Herd(POLICY, middle)
        slots = herd.slots(4)
        assert (slots.connections, slots.accept_rate, slots.window_s, slots.away_s) == (4, 2.0, 2.0, 3.0)
        assert herd.spread_s(4) == slots.spread_s == 4.0
        assert [herd.spread_s(connections) for connections in (0, 1, 2, 100)] == [0.0, 1.0, 2.0, 52.0]
        expecting = Herd(HerdPolicy(accept_rate=2.0, window_s=2.0, expected=10), middle)
        assert [expecting.spread_s(connections) for connections in (0, 10, 100)] == [7.0, 7.0, 52.0]

    def test_each_is_told_a_slot_of_its_own(self) -> None:
        herd = Herd(POLICY, middle, 100.0)
        herd.close(4, 100.0, restarts=True)
        # Half of four is the third, half of three then the second; the last takes the place of the one that was drawn.
        told = [herd.farewell(100.0) for _ in range(4)]
        assert told == [Advice(after_s, 0.0, 4.0) for after_s in (5.5, 4.5, 6.5, 3.5)]

    @given(connections=st.integers(1, 200), rate=st.floats(0.5, 1000), seed=st.integers(0, 9))
    def test_all_slots_are_used(self, connections: int, rate: float, seed: int) -> None:
        policy = HerdPolicy(accept_rate=rate, away_s=3.0)
        herd = closing(connections, policy, seed)
        slot_s = herd.slots(connections).spread_s / connections
        told = sorted(after_of(herd.farewell(100.0)) for _ in range(connections))
        for number, after_s in enumerate(told):
            assert number * slot_s <= after_s - 3.0 + 1e-6
            assert after_s - 3.0 <= (number + 1) * slot_s + 1e-6

    def test_who_is_closed_first_does_not_come_back_first(self) -> None:
        herd = closing(10_000, HERD)
        told = [after_of(herd.farewell(100.0)) for _ in range(10_000)]
        # Of neighbours in the order of closing, as many come back in the other order. Five deviations are 250.
        assert abs(sum(first < second for first, second in pairwise(told)) - 5000) < 250
        for tenth in range(10):
            part = told[tenth * 1000 : tenth * 1000 + 1000]
            assert abs(sum(part) / 1000 - (5.0 + 7.5)) < 0.7

    @given(seed=st.integers(0, 9), passes_s=st.lists(st.floats(0, 0.5), min_size=6, max_size=6))
    def test_the_time_that_has_passed_is_subtracted(self, seed: int, passes_s: list[float]) -> None:
        at_once, later = closing(6, seed=seed), closing(6, seed=seed)
        now_s = 100.0
        for pass_s in passes_s:
            now_s += pass_s
            expected_s = 100.0 + after_of(at_once.farewell(100.0))
            assert now_s + after_of(later.farewell(now_s)) == pytest.approx(expected_s)

    def test_a_slot_that_has_passed_is_exchanged_for_one_behind_all_others(self) -> None:
        herd = Herd(POLICY, middle, 100.0)
        herd.close(4, 100.0, restarts=True)
        # The slots begin at 103 and end at 107.
        assert [after_of(herd.farewell(105.0)) for _ in range(4)] == [0.5, 2.25, 1.5, 2.75]
        # More than were counted come behind these, too.
        assert herd.farewell(106.0) == Advice(2.25, 0.0, 4.0)
        assert herd.farewell(200.0) == Advice(1.25, 0.0, 4.0)

    def test_a_drain_that_takes_long_brings_nobody_back_faster(self) -> None:
        policy = HerdPolicy(accept_rate=100.0, away_s=0.0)
        herd = closing(2000, policy)
        come: Counter[int] = Counter()
        for number in range(2000):
            now_s = 100.0 + number * 10 / 2000
            come[int(now_s + after_of(herd.farewell(now_s)))] += 1
        assert sum(come.values()) == 2000
        assert max(come.values()) <= 101
        assert max(come) < 100 + 1.3 * 20 + 5

    def test_a_shutdown_tells_nothing_and_turns_everybody_away(self) -> None:
        herd = Herd(POLICY, middle, 100.0)
        herd.close(4, 100.0, restarts=False)
        assert herd.farewell(100.0) is None
        assert herd.refusal(100.0) is None
        assert [herd.admit(100.0) for _ in range(2)] == pytest.approx([1.75, 2.25])  # behind that of the refusal
        assert (herd.admitted, herd.turned_away) == (0, 3)

    def test_who_comes_meanwhile_comes_back_among_the_others_and_then_behind_them(self) -> None:
        herd = closing(1000, HerdPolicy(accept_rate=100.0, away_s=3.0))
        assert herd.spread_s(1000) == 15.0
        told = [herd.admit(101.0) for _ in range(700)]
        assert herd.turned_away == 700
        assert len(set(told)) == 700
        # Those for whom the window has room are as the others; 0.2 is one deviation.
        assert 2.0 <= min(told[:500]) < 2.2
        assert 16.8 < max(told[:500]) <= 17.0
        assert abs(sum(told[:500]) / 500 - (2.0 + 7.5)) < 1.0
        assert all(17.0 + number / 100 <= told[500 + number] <= 17.0 + (number + 1) / 100 for number in range(200))
        come = Counter(int(after_of(herd.farewell(100.0))) for _ in range(1000))
        come.update(int(1.0 + after_s) for after_s in told)
        assert max(come.values()) <= 100 + 30  # 33 of these are random

    def test_who_was_let_in_and_is_too_late_is_told_the_same(self) -> None:
        herd = closing(1000, HerdPolicy(accept_rate=100.0, away_s=3.0))
        advice = herd.refusal(101.0)
        assert advice is not None
        assert advice.spread_s == 15.0
        assert 2.0 <= after_of(advice) <= 17.0
        assert herd.turned_away == 1

    def test_who_comes_when_the_server_should_be_back_is_not_told_to_come_at_once(self) -> None:
        herd = Herd(HerdPolicy(accept_rate=0.5, window_s=2.0), lambda: 0.0)
        herd.close(0, 0.0, restarts=True)
        assert [herd.admit(1000.0) for _ in range(3)] == [1.0, 1.0, 3.0]

    def test_a_flood_while_it_restarts_keeps_nobody_away_for_longer(self) -> None:
        herd = closing(100, HerdPolicy(accept_rate=10.0, away_s=3.0, longest_s=60.0))
        told = [herd.admit(100.0) for _ in range(10_000)]
        assert max(told) <= 60.0 + 3.0 + herd.slots(100).spread_s

    @pytest.mark.parametrize("connections", [0, 1])
    def test_few_connections(self, connections: int) -> None:
        herd = closing(connections)
        told = [after_of(herd.farewell(100.0)) for _ in range(connections)]
        assert all(3.0 <= after_s <= 3.0 + herd.slots(connections).spread_s for after_s in told)
        assert after_of(herd.farewell(100.0)) >= 3.0 + herd.slots(connections).spread_s

    def test_the_client_understands(self) -> None:
        advice = closing(1000, HERD).farewell(100.0)
        assert advice is not None
        reconnector = Reconnector(PolicyEngine(), middle)
        decision = reconnector.lost(0.0, 60.0, 1012, advice=Advice.from_reason(advice.as_reason("the server restarts")))
        assert decision.because == "told"
        assert decision.wait_s == pytest.approx(after_of(advice), abs=0.001)
        assert reconnector.spread_s == 6.0


class TestOverload:
    def test_one_is_told_a_time_between_those_of_the_policy(self) -> None:
        told = [after_of(Herd(HerdPolicy(least_s=0.5), Random(seed).random).overload(10.0)) for seed in range(200)]
        assert 5.5 <= min(told) < 7.0
        assert 28.0 < max(told) <= 30.6
        assert Herd(HERD, middle).overload(10.0).spread_s is None

    def test_a_herd_of_them_is_spread(self) -> None:
        herd = Herd(HerdPolicy(accept_rate=10.0), Random(2).random)
        come = Counter(int(after_of(herd.overload(0.0))) for _ in range(2000))
        assert max(come.values()) <= 40  # 10, and for so many the deviation is 3
        assert min(come) >= 6
        assert max(come) <= 6 + 25 + 200

    def test_they_and_those_who_are_turned_away_have_slots_among_each_other(self) -> None:
        herd = Herd(
            HerdPolicy(accept_rate=1.0, burst_s=0.0, admission=True, delay_least_s=5.0, delay_most_s=5.0), middle
        )
        assert herd.admit(0.0) == 0.0
        assert [herd.admit(0.0), after_of(herd.overload(0.0)), herd.admit(0.0)] == [1.5, 5.0 + 2.5, 3.5]
        assert (herd.admitted, herd.turned_away) == (1, 2)
