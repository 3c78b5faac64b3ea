"""What a reconnect promises: on a made-up clock, with randomness that is scripted or seeded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsfast.errors import InvalidSetting
from wsfast.reconnect import (
    CLOSE_CODES,
    RECONNECT,
    Admission,
    Advice,
    Aggressive,
    Conservative,
    Decision,
    DecorrelatedJitter,
    Default,
    EqualJitter,
    ExponentialBackoff,
    FixedInterval,
    FullJitter,
    Level,
    PolicyEngine,
    ReconnectHistory,
    Reconnector,
    ReconnectPolicy,
    ReconnectStrategy,
    RetryBudget,
    Slots,
    TokenBucket,
    Verdict,
    verdict_of,
)

NAN, INF = math.nan, math.inf
# The largest float that `random` returns.
ALMOST_1 = 1 - 2**-53

JITTERED: tuple[ReconnectStrategy, ...] = (
    ExponentialBackoff(),
    FullJitter(),
    EqualJitter(),
    DecorrelatedJitter(),
    Conservative(),
    Default(),
    Aggressive(),
)
ALL: tuple[ReconnectStrategy, ...] = (FixedInterval(), *JITTERED)

chances = st.floats(0, 1, exclude_max=True)
attempts = st.integers(0, 10_000)


class Script:
    """Randomness that returns what it is told to, and fails if it is asked for more."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def __call__(self) -> float:
        return self._values.pop(0)

    @property
    def is_used_up(self) -> bool:
        return not self._values


def client(*values: float, policy: ReconnectPolicy = RECONNECT, **options: Any) -> Reconnector:
    """A client whose randomness is scripted."""
    return Reconnector(PolicyEngine(policy), Script(*values), **options)


def wait_of(decision: Decision) -> float:
    assert decision.wait_s is not None
    return decision.wait_s


class TestStrategies:
    def test_fixed_interval_is_three_tries_five_seconds_apart(self) -> None:
        strategy = FixedInterval()
        assert strategy.max_attempts == 3
        assert [strategy.should_reconnect(attempt) for attempt in range(5)] == [True, True, True, False, False]
        assert [strategy.wait_s(attempt, 5.0, Script()) for attempt in range(3)] == [5.0, 5.0, 5.0]

    @pytest.mark.parametrize(
        ("strategy", "chance", "expected"),
        [
            (ExponentialBackoff(), 0.0, [1, 2, 4, 8, 16, 32, 60, 60]),
            (ExponentialBackoff(), 0.5, [0.9, 1.8, 3.6, 7.2, 14.4, 28.8, 54, 54]),
            (ExponentialBackoff(jitter=1), 0.75, [0.25, 0.5, 1, 2, 4, 8, 15, 15]),
            (FullJitter(), 0.0, [0] * 8),
            (FullJitter(), 0.5, [0.5, 1, 2, 4, 8, 16, 30, 30]),
            (EqualJitter(), 0.0, [0.5, 1, 2, 4, 8, 16, 30, 30]),
            (EqualJitter(), 0.5, [0.75, 1.5, 3, 6, 12, 24, 45, 45]),
            (Default(), 0.5, [2.5, 5, 10, 20, 30, 30, 30, 30]),
            (Aggressive(), 0.5, [0.5, 1, 2, 4, 8, 10, 10, 10]),
            (Conservative(), 0.5, [3.75, 7.5, 15, 30, 60, 90, 90, 90]),
        ],
        ids=str,
    )
    def test_the_formula(self, strategy: ReconnectStrategy, chance: float, expected: list[float]) -> None:
        for attempt, wait_s in enumerate(expected):
            random = Script(chance)
            assert strategy.wait_s(attempt, 0.0, random) == pytest.approx(wait_s)
            assert random.is_used_up

    def test_decorrelated_jitter_goes_on_from_its_previous_wait(self) -> None:
        strategy, waits = DecorrelatedJitter(1.0, 60.0), [0.0]
        for chance in (0.5, 0.5, 0.75, 0.0, 1 / 2):
            waits.append(strategy.wait_s(99, waits[-1], Script(chance)))
        assert waits == [0.0, 2.0, 3.5, 8.125, 1.0, 2.0]
        assert strategy.wait_s(0, 60.0, Script(0.9)) == 60.0

    @given(strategy=st.sampled_from(ALL), attempt=attempts, previous_s=st.floats(0, 1e6), chance=chances)
    def test_no_wait_is_negative_or_above_the_cap(
        self, strategy: Any, attempt: int, previous_s: float, chance: float
    ) -> None:
        wait_s = strategy.wait_s(attempt, previous_s, lambda: chance)
        assert 0 <= wait_s <= getattr(strategy, "cap_s", 5.0)

    @given(
        kind=st.sampled_from([ExponentialBackoff, FullJitter, EqualJitter, DecorrelatedJitter]),
        base_s=st.floats(1e-6, 1e6),
        factor=st.floats(1, 1e12),
        attempt=attempts,
        chance=chances,
    )
    def test_bounds_for_any_base_and_cap(
        self, kind: Any, base_s: float, factor: float, attempt: int, chance: float
    ) -> None:
        cap_s = max(base_s, min(1e6, base_s * factor))
        strategy = kind(base_s, cap_s)
        wait_s = strategy.wait_s(attempt, base_s, lambda: chance)
        least = {ExponentialBackoff: 0.8, FullJitter: 0.0, EqualJitter: 0.5, DecorrelatedJitter: 1.0}[kind]
        assert least * base_s * (1 - 1e-12) <= wait_s <= cap_s

    @given(
        strategy=st.sampled_from([each for each in JITTERED if not isinstance(each, DecorrelatedJitter)]),
        attempt=attempts,
        chance=chances,
    )
    def test_the_same_chance_never_waits_shorter_after_more_failures(
        self, strategy: Any, attempt: int, chance: float
    ) -> None:
        assert strategy.wait_s(attempt, 0.0, lambda: chance) <= strategy.wait_s(attempt + 1, 0.0, lambda: chance)

    @pytest.mark.parametrize("strategy", ALL, ids=str)
    def test_ten_thousand_failures_are_as_good_as_twenty(self, strategy: ReconnectStrategy) -> None:
        late = [strategy.wait_s(attempt, 7.0, Script(0.5)) for attempt in (20, 64, 1023, 1024, 1025, 10_000, 10**18)]
        assert len(set(late)) == 1

    @pytest.mark.parametrize("strategy", JITTERED, ids=str)
    def test_waits_are_spread_evenly_between_their_bounds(self, strategy: ReconnectStrategy) -> None:
        random = Random(1).random
        low, high = (strategy.wait_s(2, 1.0, Script(chance)) for chance in (0.0, ALMOST_1))
        low, high = min(low, high), max(low, high)
        tenths = Counter(
            min(9, int(10 * (strategy.wait_s(2, 1.0, random) - low) / (high - low))) for _ in range(10_000)
        )
        # 1,000 in each; five standard deviations are 150.
        assert all(850 < tenths[tenth] < 1150 for tenth in range(10))

    @pytest.mark.parametrize("strategy", JITTERED, ids=str)
    def test_all_but_the_baseline_have_jitter_and_go_on_for_ever(self, strategy: ReconnectStrategy) -> None:
        assert strategy.wait_s(3, 2.0, Script(0.1)) != strategy.wait_s(3, 2.0, Script(0.9))
        assert strategy.max_attempts is None
        assert strategy.should_reconnect(10**9)

    @pytest.mark.parametrize("kind", [FixedInterval, ExponentialBackoff, FullJitter, EqualJitter, DecorrelatedJitter])
    def test_attempts_can_be_limited(self, kind: Any) -> None:
        strategy = kind(max_attempts=2)
        assert [strategy.should_reconnect(attempt) for attempt in range(4)] == [True, True, False, False]
        assert not kind(max_attempts=0).should_reconnect(0)

    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (lambda: FixedInterval(0.0), "reconnect.interval_s must be from 1e-06 to 1e+06, not 0.0"),
            (lambda: FixedInterval(NAN), "reconnect.interval_s must be from 1e-06 to 1e+06, not nan"),
            (lambda: FullJitter(-1.0), "reconnect.base_s must be from 1e-06 to 1e+06, not -1.0"),
            (lambda: FullJitter(INF, INF), "reconnect.base_s must be from 1e-06 to 1e+06, not inf"),
            (lambda: EqualJitter(2.0, 1.0), "reconnect.cap_s must be from 2 to 1e+06, not 1.0"),
            (lambda: DecorrelatedJitter(1.0, NAN), "reconnect.cap_s must be from 1 to 1e+06, not nan"),
            (lambda: Default(cap_s=1.0), "reconnect.cap_s must be from 5 to 1e+06, not 1.0"),
            (lambda: ExponentialBackoff(jitter=0.0), "reconnect.jitter must be more than 0, up to 1, not 0.0"),
            (lambda: ExponentialBackoff(jitter=1.5), "reconnect.jitter must be more than 0, up to 1, not 1.5"),
            (
                lambda: FullJitter(max_attempts=-1),
                "reconnect.max_attempts must be a whole number from 0, or None, not -1",
            ),
        ],
    )
    def test_settings_out_of_bounds_are_refused(self, make: Callable[[], object], text: str) -> None:
        with pytest.raises(InvalidSetting) as caught:
            make()
        assert str(caught.value) == text

    def test_strategies_are_frozen_and_equal_by_their_numbers(self) -> None:
        with pytest.raises(FrozenInstanceError):
            FullJitter().base_s = 2.0  # type: ignore[misc]
        assert FullJitter(1.0) == FullJitter() != FullJitter(2.0)
        assert Default() != FullJitter(5.0, 60.0)


class TestCloseCodes:
    def test_the_table_covers_all_codes_in_order_without_gaps(self) -> None:
        assert CLOSE_CODES[0].first == 1000
        assert CLOSE_CODES[-1].last == 4999
        assert all(row.first <= row.last for row in CLOSE_CODES)
        assert all(below.last + 1 == above.first for below, above in pairwise(CLOSE_CODES))
        assert all(row.why for row in CLOSE_CODES)

    def test_each_code_means_what_its_row_says(self) -> None:
        for row in CLOSE_CODES:
            assert {verdict_of(code) for code in range(row.first, row.last + 1)} == {row.verdict}

    def test_which_forbid_delay_and_hurry(self) -> None:
        found: dict[Verdict, set[int]] = {verdict: set() for verdict in Verdict}
        for code in range(1000, 5000):
            found[verdict_of(code)].add(code)
        assert found[Verdict.FORBID] == {
            *(1000, 1008, 1010, 3000, 3003, 4400, 4401, 4403, 4404, 4409, 4410),
            *range(3500, 4000),
            *range(4500, 5000),
        }
        assert found[Verdict.DELAY] == {1002, 1003, 1007, 1009, 1012, 1013, 1015, 4429}
        assert found[Verdict.HURRY] == {4408}

    @pytest.mark.parametrize("code", [-1, 0, 999, 5000, 65535, 10**9])
    def test_what_is_no_close_code_is_as_good_as_1006(self, code: int) -> None:
        assert verdict_of(code) is verdict_of(1006) is Verdict.NORMAL


class TestAdvice:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0", Advice(0.0, 1.0)),
            ("7", Advice(7.0, 1.0)),
            (" 120 ", Advice(120.0, 12.0)),
            ("9" * 100, Advice(float("9" * 100), float("9" * 100) / 10)),
            *((text, None) for text in ("", "-1", "1.5", "1e3", "nan", "inf", "٣", "soon", "9" * 1000, "0x10")),
            ("Fri, 31 Dec 1999 23:59:59 GMT", None),
        ],
    )
    def test_retry_after_in_seconds(self, text: str, expected: Advice | None) -> None:
        assert Advice.from_retry_after(text) == expected

    @pytest.mark.parametrize("zone", ["GMT", "-0000", ""])
    def test_retry_after_as_a_date(self, zone: str) -> None:
        text = f"Fri, 31 Dec 1999 23:59:59 {zone}"
        assert Advice.from_retry_after(text, 946684799.0 - 50) == Advice(50.0, 5.0)
        assert Advice.from_retry_after(text, 946684799.0 + 50) == Advice(0.0, 1.0)

    @pytest.mark.parametrize(
        "text", ["Fri, 99 Dec 1999 23:59:59 GMT", "tomorrow", "", "Fri, 31 Dec 99999 23:59:59 GMT"]
    )
    def test_a_date_that_is_none(self, text: str) -> None:
        assert Advice.from_retry_after(text, 0.0) is None

    @pytest.mark.parametrize(
        ("reason", "expected"),
        [
            ("retry-after=12.5", Advice(12.5)),
            ("the server restarts; retry-after=12.500; spread=55.000", Advice(12.5, 0.0, 55.0)),
            ("spread=55;retry-after=3", Advice(3.0, 0.0, 55.0)),
            (" spread=55 ", Advice(None, 0.0, 55.0)),
            ("retry-after=1; retry-after=2", Advice(1.0)),
            *(
                (reason, None)
                for reason in (
                    "",
                    "too slow: too much waited to be sent; connect again",
                    "retry-after=",
                    "retry-after=-1",
                    "retry-after=nan",
                    "retry-after=1e9",
                    "retry-after=inf",
                    "retry-after=12345678901",
                    "retry-after=1.2.3",
                    "retry-after=٣",
                    "xretry-after=1",
                    "please retry-after=1",
                    "retry-after=1 s",
                )
            ),
            ("retry-after=-1; spread=2", Advice(None, 0.0, 2.0)),
        ],
    )
    def test_a_close_reason(self, reason: str, expected: Advice | None) -> None:
        assert Advice.from_reason(reason) == expected

    @given(
        after_s=st.none() | st.floats(0, 1e9 - 1),
        spread_s=st.none() | st.floats(0, 1e9 - 1),
        text=st.sampled_from(["", "the server restarts"]),
    )
    def test_what_is_told_in_a_reason_is_understood(
        self, after_s: float | None, spread_s: float | None, text: str
    ) -> None:
        reason = Advice(after_s, 0.0, spread_s).as_reason(text)
        assert len(reason) <= 49 + len(text)
        read = Advice.from_reason(reason) or Advice()
        for said, understood in ((after_s, read.after_s), (spread_s, read.spread_s)):
            assert understood == (None if said is None else pytest.approx(said, abs=0.0006))


class TestLearning:
    def test_a_new_history_knows_nothing(self) -> None:
        history = ReconnectHistory()
        assert history.success_rate() is None
        assert history.attempts(0.0) == history.attempts(1e9) == 0
        assert history.durations_s == history.codes == ()

    def test_what_happened_counts_half_after_the_half_life(self) -> None:
        history = ReconnectHistory(100.0)
        history.ended(0.0, 50.0, 1001, succeeded=True)
        assert [history.attempts(now_s) for now_s in (0, 100, 200, 1000)] == [1, 0.5, 0.25, 2**-10]
        history.failed(100.0)
        assert (history.attempts(100.0), history.successes(100.0)) == (1.5, 0.5)
        assert history.success_rate() == pytest.approx(0.5 / 1.5)
        history.failed(200.0)
        assert history.success_rate() == pytest.approx(0.25 / 1.75)

    def test_a_clock_that_goes_back_does_no_harm(self) -> None:
        history = ReconnectHistory(100.0)
        history.failed(1000.0)
        assert history.attempts(0.0) == 1
        history.failed(0.0)
        assert history.attempts(0.0) == 2

    def test_only_the_last_durations_and_codes_are_kept(self) -> None:
        history = ReconnectHistory(remembered=3)
        for number in range(1000):
            history.ended(number, number / 10, 4000 + number % 7, succeeded=False)
            history.failed(number)
        assert history.durations_s == (99.7, 99.8, 99.9)
        assert history.codes == tuple(4000 + number % 7 for number in (997, 998, 999))
        nothing = ReconnectHistory(remembered=0)
        nothing.ended(0.0, 1.0, 1006, succeeded=True)
        assert nothing.durations_s == nothing.codes == ()
        assert nothing.success_rate() == 1

    @given(
        outcomes=st.lists(st.tuples(st.floats(0, 1e7), st.sampled_from([None, False, True])), max_size=50),
    )
    def test_the_rate_is_a_share_and_the_numbers_are_bounded(self, outcomes: list[tuple[float, bool | None]]) -> None:
        history, now_s = ReconnectHistory(), 0.0
        for passed_s, succeeded in outcomes:
            now_s += passed_s
            if succeeded is None:
                history.failed(now_s)
            else:
                history.ended(now_s, passed_s, 1006, succeeded=succeeded)
            rate = history.success_rate()
            assert rate is not None
            assert 0 <= rate <= 1
            assert 1 <= history.attempts(now_s) <= len(outcomes)

    @pytest.mark.parametrize(
        ("successes", "failures", "level"),
        [
            (0, 0, Level.NORMAL),
            (0, 3, Level.NORMAL),
            (0, 4, Level.LOW),
            (3, 0, Level.NORMAL),
            (4, 0, Level.HIGH),
            (1, 3, Level.LOW),
            (2, 5, Level.LOW),
            (3, 7, Level.NORMAL),
            (29, 71, Level.LOW),
            (8, 2, Level.NORMAL),
            (9, 1, Level.HIGH),
            (89, 11, Level.NORMAL),
        ],
    )
    def test_levels(self, successes: int, failures: int, level: Level) -> None:
        history = ReconnectHistory()
        for _ in range(failures):
            history.failed(0.0)
        for _ in range(successes):
            history.ended(0.0, 60.0, 1006, succeeded=True)
        assert PolicyEngine().level(history, 0.0) is level

    def test_a_bad_past_is_forgotten(self) -> None:
        history, engine = ReconnectHistory(), PolicyEngine()
        for _ in range(8):
            history.failed(0.0)
        assert engine.level(history, 600.0) is Level.LOW
        assert engine.level(history, 600.1) is Level.NORMAL

    def test_the_level_is_judged_when_a_connection_is_lost_and_kept_for_the_outage(self) -> None:
        reconnector = client(*[0.5] * 40)
        assert reconnector.level is Level.NORMAL
        reconnector.lost(0.0, 3600.0)
        for now_s in range(1, 20):
            assert reconnector.failed(float(now_s)).wait_s == Default().wait_s(now_s, 0.0, Script(0.5))
            assert reconnector.level is Level.NORMAL
        # Made, and lost at once: now the past counts.
        assert reconnector.lost(20.0, 0.1).wait_s == 60.0
        assert reconnector.level is Level.LOW

    def test_waits_at_each_level(self) -> None:
        policy = replace(RECONNECT, judged_from=1)
        low = client(0.5, policy=policy)
        assert wait_of(low.lost(0.0, 0.1)) == 5.0
        assert low.level is Level.LOW
        high = client(0.5, policy=policy)
        assert wait_of(high.lost(0.0, 60.0)) == 1.25
        assert high.level is Level.HIGH

    @pytest.mark.parametrize(
        ("loss", "latency_s", "name"),
        [
            (0.0, 0.0, "default"),
            (0.3, 0.0, "default"),
            (0.3000001, 0.0, "conservative"),
            (1.0, 0.001, "conservative"),
            (0.3, 0.0499999, "aggressive"),
            (0.0, 1e-9, "aggressive"),
            (0.0, 0.05, "default"),
            (0.0, 5.0, "default"),
            (0.0, -1.0, "default"),
            (NAN, NAN, "default"),
            (INF, INF, "conservative"),
        ],
    )
    def test_the_choice_by_loss_and_latency(self, loss: float, latency_s: float, name: str) -> None:
        engine = PolicyEngine()
        assert engine.strategy(loss, latency_s) is getattr(engine.policy, name)

    def test_the_link_that_was_lost_chooses_until_the_next_one_is(self) -> None:
        reconnector = client(*[0.5] * 4)
        assert wait_of(reconnector.lost(0.0, 60.0, loss=0.5)) == 3.75
        assert wait_of(reconnector.failed(4.0)) == 7.5
        assert wait_of(reconnector.lost(100.0, 60.0, latency_s=0.01)) == 0.5
        assert wait_of(reconnector.failed(101.0)) == 1.0


class TestBudgets:
    def test_a_bucket_lets_out_its_burst_and_then_its_rate(self) -> None:
        bucket = TokenBucket(2.0, 3.0, 100.0)
        assert [bucket.take(100.0) for _ in range(5)] == [True, True, True, False, False]
        assert [bucket.take(now_s) for now_s in (100.25, 100.5, 100.5, 101.0, 101.25)] == [
            *(False, True, False, True, False)
        ]

    @pytest.mark.parametrize("idle_s", [1.5, 2.0, 1e6, 1e300])
    def test_a_long_idle_time_fills_it_and_no_more(self, idle_s: float) -> None:
        bucket = TokenBucket(2.0, 3.0)
        while bucket.take(0.0):
            pass
        assert bucket.tokens(idle_s) == 3.0
        assert [bucket.take(idle_s) for _ in range(4)] == [True, True, True, False]

    def test_a_clock_that_goes_back_gives_and_takes_nothing(self) -> None:
        bucket = TokenBucket(1.0, 2.0, 10.0)
        assert [bucket.take(10.0), bucket.take(10.0)] == [True, True]
        assert [bucket.tokens(now_s) for now_s in (5.0, 10.0, 11.0)] == [0.0, 0.0, 1.0]

    def test_tokens_can_be_reserved(self) -> None:
        bucket = TokenBucket(2.0, 1.0)
        assert [bucket.reserve(0.0) for _ in range(4)] == [0.0, 0.5, 1.0, 1.5]
        assert bucket.tokens(0.0) == -3.0
        assert bucket.reserve(1.5) == 0.5
        bucket.add(100.0)
        assert bucket.tokens(1.5) == 1.0

    @given(gaps=st.lists(st.floats(0, 3), min_size=1, max_size=100), rate=st.floats(0.01, 100), burst=st.floats(1, 20))
    def test_no_span_of_time_lets_out_more_than_the_burst_and_the_rate(
        self, gaps: list[float], rate: float, burst: float
    ) -> None:
        bucket, now_s, taken = TokenBucket(rate, burst), 0.0, []
        for gap_s in gaps:
            now_s += gap_s
            for _ in range(5):
                if bucket.take(now_s):
                    taken.append(now_s)
        for first, begin_s in enumerate(taken):
            for last in range(first, len(taken)):
                assert last - first + 1 <= burst + (taken[last] - begin_s) * rate + 1e-6

    @pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (NAN, 1), (INF, 1), (1, 0.5), (1, NAN)])
    def test_bad_buckets_are_refused(self, rate: float, burst: float) -> None:
        with pytest.raises(InvalidSetting):
            TokenBucket(rate, burst)

    def test_a_budget_gives_each_attempt_beyond_it_a_turn_of_its_own(self) -> None:
        budget = RetryBudget(10.0, burst=3.0)
        assert [budget.wait_s(0.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])

    def test_five_connections_that_lasted_pay_for_one_attempt(self) -> None:
        budget = RetryBudget(1e-6, burst=1.0)
        assert budget.wait_s(0.0) == 0
        for _ in range(5):
            budget.succeeded()
        assert budget.wait_s(0.0) == pytest.approx(0, abs=1e-9)
        assert budget.wait_s(0.0) > 900_000

    def test_a_herd_in_one_process_keeps_to_its_budget(self) -> None:
        random, budget = Random(1).random, RetryBudget(10.0)
        engine = PolicyEngine(ReconnectPolicy.only(FullJitter()))
        due = [(wait_of(each.lost(0.0, 60.0)), each) for each in _herd(engine, random, 1000, budget)]
        made = []
        while (soonest := min(due, key=lambda pair: pair[0]))[0] < 300:
            due.remove(soonest)
            at_s, each = soonest
            made.append(at_s)
            due.append((at_s + wait_of(each.failed(at_s)), each))
        # The burst, a fifth of the 1,000 connections that had lasted, and 10 in each second.
        assert 0.9 * 3000 < len(made) <= 100 + 200 + 10 * 300
        # A fifth of each turn is paid by the connection that was lost: they are 0.08 s apart, and later 0.1 s.
        assert max(Counter(int(at_s) for at_s in made if at_s > 15).values()) <= 13

    def test_a_budget_delays_and_never_hurries(self) -> None:
        budget = RetryBudget(0.1, burst=1.0, per_success=0.0)
        first, second = (client(0.5, budget=budget) for _ in range(2))
        assert first.lost(0.0, 60.0) == Decision(2.5, 0, "strategy")
        assert second.lost(0.0, 60.0) == Decision(10.0, 0, "budget")

    def test_who_gives_up_spends_nothing(self) -> None:
        budget = RetryBudget(1.0, burst=1.0)
        assert client(budget=budget).lost(0.0, 0.0, 1008).wait_s is None
        assert budget.wait_s(0.0) == 0


def _herd(engine: PolicyEngine, random: Callable[[], float], count: int, budget: RetryBudget) -> Iterable[Reconnector]:
    return [Reconnector(engine, random, budget=budget) for _ in range(count)]


class TestOneClient:
    def test_attempts_grow_until_a_connection_has_lasted(self) -> None:
        reconnector = client(*[0.5] * 8)
        found = [reconnector.lost(0.0, 30.0), *(reconnector.failed(now_s) for now_s in (5.0, 10.0, 30.0))]
        assert found == [Decision(wait_s, at, "strategy") for at, wait_s in enumerate((2.5, 5.0, 10.0, 20.0))]
        # A connection that was made and dropped is one more failure; one that has lasted is a new beginning.
        assert reconnector.lost(60.0, 29.999).attempt == 4
        assert reconnector.lost(120.0, 30.0) == Decision(2.5, 0, "strategy")

    @pytest.mark.parametrize("lasted_s", [0.0, -1.0, NAN])
    def test_connections_that_drop_at_once_are_not_made_in_a_loop(self, lasted_s: float) -> None:
        reconnector = client(*[0.5] * 5)
        waits = [wait_of(reconnector.lost(0.0, lasted_s)) for _ in range(3)]
        assert waits == [2.5, 5.0, 10.0]

    def test_decorrelated_jitter_begins_anew_after_a_connection_that_has_lasted(self) -> None:
        reconnector = client(*[0.5] * 5, policy=ReconnectPolicy.only(DecorrelatedJitter()))
        assert [wait_of(reconnector.lost(0.0, 60.0)), wait_of(reconnector.failed(2.0))] == [2.0, 3.5]
        assert wait_of(reconnector.lost(9.0, 60.0)) == 2.0

    def test_generation_1_gives_up_after_three_tries(self) -> None:
        reconnector = client(policy=ReconnectPolicy.only(FixedInterval()))
        assert [reconnector.lost(0.0, 60.0).wait_s, *(reconnector.failed(0.0).wait_s for _ in range(2))] == [5.0] * 3
        assert reconnector.failed(0.0) == reconnector.failed(0.0) == Decision(None, 3, "given up")

    @pytest.mark.parametrize("code", [1000, 1008, 1010, 3000, 3500, 4409, 4999])
    def test_codes_that_forbid_win_over_everything(self, code: int) -> None:
        reconnector = client()
        assert reconnector.lost(0.0, 60.0, code, advice=Advice(1.0, 0.0, 2.0)) == Decision(None, 0, "forbidden")

    def test_a_failure_can_forbid(self) -> None:
        assert client().failed(0.0, verdict=Verdict.FORBID) == Decision(None, 0, "forbidden")

    @pytest.mark.parametrize("code", [1012, 1013, 4429])
    def test_codes_that_delay_mean_5_to_30_seconds(self, code: int) -> None:
        for chance, wait_s in ((0.0, 5.0), (0.5, 17.5), (ALMOST_1, 30.0)):
            decision = client(0.5, chance).lost(0.0, 60.0, code)
            assert decision == Decision(pytest.approx(wait_s), 0, "delay")

    def test_a_delay_is_no_limit(self) -> None:
        reconnector = client(*[0.5] * 4, 0.9, 0.0)
        for _ in range(4):
            reconnector.failed(0.0)
        assert reconnector.lost(0.0, 0.0, 1013) == Decision(108.0, 4, "strategy")

    def test_hurry_is_for_the_first_attempt_alone(self) -> None:
        reconnector = client(0.25, 0.5, 0.5)
        assert reconnector.lost(0.0, 60.0, 4408) == Decision(0.25, 0, "hurry")
        assert reconnector.lost(1.0, 0.1, 4408) == Decision(5.0, 1, "strategy")

    def test_a_restart_never_hurries_unless_it_is_told_to(self) -> None:
        assert wait_of(client(0.0, 0.0).lost(0.0, 60.0, 1012)) == 5.0
        assert client(0.0).lost(0.0, 60.0, 1012, advice=Advice(0.0)) == Decision(0.0, 0, "told")


class TestWhatTheServerTells:
    def test_a_slot_is_kept_to(self) -> None:
        decision = client(0.7).lost(0.0, 60.0, 1012, advice=Advice.from_reason("bye; retry-after=37.25"))
        assert decision == Decision(37.25, 0, "told")

    def test_retry_after_overrides_the_backoff_and_is_spread(self) -> None:
        reconnector = client(*[0.5] * 4)
        for _ in range(3):
            reconnector.failed(0.0)
        assert reconnector.failed(0.0, advice=Advice.from_retry_after("2")) == Decision(2.5, 3, "told")
        assert client(0.5).failed(0.0, advice=Advice.from_retry_after("100")) == Decision(105.0, 0, "told")

    @pytest.mark.parametrize("after_s", [None, -1.0, -INF, NAN])
    def test_what_makes_no_sense_is_not_told(self, after_s: float | None) -> None:
        advice = Advice(after_s, NAN, after_s)
        assert client(0.5).lost(0.0, 60.0, advice=advice) == Decision(2.5, 0, "strategy")

    @pytest.mark.parametrize("after_s", [900.0, 901.0, 1e300, INF])
    def test_nobody_is_kept_away_for_long(self, after_s: float) -> None:
        assert client(0.5).lost(0.0, 60.0, advice=Advice(after_s)) == Decision(900.0, 0, "told")
        assert client(0.5).lost(0.0, 60.0, advice=Advice(0.0, after_s)) == Decision(450.0, 0, "told")
        reconnector = client(0.5)
        assert reconnector.lost(0.0, 60.0, advice=Advice(spread_s=after_s)) == Decision(450.0, 0, "spread")
        assert reconnector.spread_s == 900.0

    @given(
        after_s=st.none() | st.floats(),
        within_s=st.floats(),
        spread_s=st.none() | st.floats(),
        standing_s=st.none() | st.floats(),
        code=st.integers(0, 70_000),
        lasted_s=st.floats(),
        loss=st.floats(),
        latency_s=st.floats(),
        chance=chances,
    )
    def test_a_hostile_server_neither_breaks_nor_blocks_nor_spins_a_client(
        self,
        after_s: float | None,
        within_s: float,
        spread_s: float | None,
        standing_s: float | None,
        code: int,
        lasted_s: float,
        loss: float,
        latency_s: float,
        chance: float,
    ) -> None:
        advice = Advice(after_s, within_s, spread_s)
        reconnector = Reconnector(PolicyEngine(), lambda: chance)
        reconnector.told(standing_s)
        for number in range(4):
            decision = reconnector.lost(number * 60.0, lasted_s, code, advice=advice, loss=loss, latency_s=latency_s)
            if decision.wait_s is None:
                assert verdict_of(code) is Verdict.FORBID
                return
            assert 0 <= decision.wait_s <= 1800
            again = reconnector.failed(number * 60.0, advice=advice)
            assert 0 <= wait_of(again) <= 1800
            assert again.because != "told" or wait_of(again) >= 0.5

    def test_a_spread_is_kept_for_a_death_without_a_word(self) -> None:
        reconnector = client(0.25, 0.0, 0.5, 0.0, ALMOST_1)
        reconnector.told(80.0)
        assert reconnector.lost(0.0, 60.0) == Decision(20.0, 0, "spread")
        assert reconnector.failed(20.0) == Decision(84.0, 1, "spread")
        assert reconnector.failed(104.0) == Decision(pytest.approx(88.0), 2, "spread")

    def test_a_strategy_may_wait_longer_than_the_spread(self) -> None:
        reconnector = client(0.5, 0.5, 0.5)
        reconnector.told(4.0)
        assert reconnector.lost(0.0, 60.0) == Decision(2.0, 0, "spread")
        assert reconnector.failed(2.0) == Decision(5.0, 1, "strategy")

    def test_the_level_does_not_touch_a_spread(self) -> None:
        reconnector = client(*[0.9] * 20)
        for _ in range(8):
            reconnector.failed(0.0)
        reconnector.told(50.0)
        assert wait_of(reconnector.lost(0.0, 0.0)) == pytest.approx(50.0 * 1.9)
        assert reconnector.level is Level.LOW
        assert wait_of(reconnector.failed(0.0)) == pytest.approx(50.0 * 1.09)

    @pytest.mark.parametrize(("chance", "wait_s"), [(0.0, 5.0), (0.5, 30.0)])
    def test_a_delay_comes_before_the_spread(self, chance: float, wait_s: float) -> None:
        reconnector = client(chance, 0.0, chance)
        reconnector.told(50.0)
        assert reconnector.lost(0.0, 60.0, 1012) == Decision(wait_s, 0, "spread")
        again = reconnector.failed(30.0, verdict=Verdict.DELAY)
        assert again == Decision(pytest.approx(55.0 + 5.0 * chance), 1, "spread")

    def test_a_herd_whose_server_dies_again_before_connections_have_lasted_is_spread_anew(self) -> None:
        random, engine = Random(6).random, PolicyEngine()
        seconds: Counter[int] = Counter()
        for _ in range(20_000):
            reconnector = Reconnector(engine, random)
            reconnector.told(50.0)
            reconnector.lost(0.0, 60.0)
            # All are back after 50 s, and lose it at once.
            wait_s = wait_of(reconnector.lost(50.0, 0.1))
            assert wait_s >= 50
            seconds[int(wait_s)] += 1
        assert max(seconds.values()) < 500

    def test_told_anew_and_told_no_more(self) -> None:
        reconnector = client(*[0.5] * 9)
        reconnector.told(10.0)
        reconnector.lost(0.0, 60.0, advice=Advice(1.0, 0.0, 20.0))
        assert reconnector.spread_s == 20.0
        reconnector.failed(0.0, advice=Advice(1.0, 0.0, NAN))
        assert reconnector.spread_s == 20.0
        reconnector.told(None)
        assert reconnector.spread_s is None
        reconnector.told(-1.0)
        assert reconnector.spread_s is None

    def test_a_herd_that_was_told_a_spread_never_comes_faster_than_the_rate(self) -> None:
        count, spread_s, random = 20_000, 50.0, Random(2).random
        seconds: Counter[int] = Counter()
        engine = PolicyEngine()
        for _ in range(count):
            reconnector, now_s = Reconnector(engine, random), 0.0
            reconnector.told(spread_s)
            wait_s = wait_of(reconnector.lost(now_s, 60.0))
            while (now_s := now_s + wait_s) < 400:
                seconds[int(now_s)] += 1
                wait_s = wait_of(reconnector.failed(now_s))
        # 400 in each second; five standard deviations are 100.
        assert max(seconds.values()) < 500
        assert sum(seconds[second] for second in range(50)) == count


class TestTheServersSide:
    def test_slots_are_exact(self) -> None:
        slots = Slots(100, 10.0, window_s=5.0, away_s=3.0)
        assert slots.spread_s == 15.0
        assert slots.wait_s(0, Script(0.0)) == 3.0
        assert slots.wait_s(50, Script(0.5)) == pytest.approx(3.0 + 15.0 * 0.505)
        assert slots.wait_s(99, Script(ALMOST_1)) == pytest.approx(18.0)

    @given(
        connections=st.integers(1, 300),
        rate=st.floats(0.1, 1000),
        window_s=st.floats(0, 60),
        seed=st.integers(0, 9),
    )
    def test_each_slot_is_used_once_and_never_faster_than_the_rate(
        self, connections: int, rate: float, window_s: float, seed: int
    ) -> None:
        slots, random = Slots(connections, rate, window_s), Random(seed).random
        waits = [slots.wait_s(number, random) for number in range(connections)]
        assert waits == sorted(waits)
        assert waits[0] >= 0
        assert waits[-1] <= slots.spread_s
        for first in range(0, connections, 7):
            for last in range(first, connections, 5):
                # A span has room for the slots that it covers, and one at each end.
                assert last - first + 1 <= (waits[last] - waits[first]) * rate * (1 + 1e-9) + 2 + 1e-6

    def test_slots_are_spread_uniformly(self) -> None:
        slots, random = Slots(10_000, 1000.0), Random(3).random
        tenths = Counter(int(slots.wait_s(number, random) / slots.spread_s * 10) for number in range(10_000))
        assert all(tenths[tenth] == 1000 for tenth in range(10))

    def test_a_server_without_connections_has_no_slots(self) -> None:
        slots = Slots(0, 10.0)
        assert slots.spread_s == 5.0
        for number in (0, -1):
            with pytest.raises(InvalidSetting, match="number must be from 0 to -1"):
                slots.wait_s(number, Script())

    @pytest.mark.parametrize("settings", [{"connections": -1}, {"accept_rate": 0}, {"window_s": -1}, {"away_s": NAN}])
    def test_bad_slots_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InvalidSetting):
            Slots(**{"connections": 1, "accept_rate": 1.0, **settings})

    def test_who_finds_no_token_gets_a_slot_behind_the_others(self) -> None:
        admission = Admission(10.0, lambda: 0.5, burst_s=0.3, now_s=100.0)
        assert [admission.ask(100.0) for _ in range(3)] == [0.0] * 3
        assert [admission.ask(100.0) for _ in range(3)] == pytest.approx([1.05, 1.15, 1.25])
        # 0.35 s later three more may come in; the slots go on behind those that were given.
        assert [admission.ask(100.35) for _ in range(4)] == pytest.approx([0.0, 0.0, 0.0, 1.05])

    def test_slots_begin_anew_when_all_are_over(self) -> None:
        admission = Admission(1.0, lambda: 0.0)
        assert [admission.ask(0.0) for _ in range(4)] == [0.0, 1.0, 2.0, 3.0]
        assert [admission.ask(1000.0) for _ in range(3)] == [0.0, 1.0, 2.0]

    def test_a_flood_keeps_nobody_away_for_longer(self) -> None:
        random = Random(4).random
        admission = Admission(10.0, random, longest_s=60.0)
        waits = [admission.ask(0.0) for _ in range(10_000)]
        assert max(waits) <= 60.0
        assert all(wait_s > 30.0 for wait_s in waits[1000:])
        later = Counter(int(wait_s / 10) for wait_s in waits[1000:])
        assert all(2700 < later[tenth] < 3300 for tenth in (3, 4, 5))

    def test_those_who_come_back_in_their_slots_are_let_in(self) -> None:
        random = Random(5).random
        admission = Admission(100.0, random)
        due = [(0.0, number) for number in range(2000)]
        asked: Counter[int] = Counter()
        while due:
            at_s, number = due.pop(0)
            asked[number] += 1
            if wait_s := admission.ask(at_s):
                due.append((at_s + wait_s, number))
                due.sort()
        assert sum(asked.values()) < 2.1 * 2000
        assert at_s < 1.1 * 2000 / 100 + 1

    @pytest.mark.parametrize(
        "settings", [{"accept_rate": 0.0}, {"burst_s": -1.0}, {"least_s": NAN}, {"least_s": 10.0, "longest_s": 5.0}]
    )
    def test_bad_admissions_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InvalidSetting):
            Admission(**{"accept_rate": 1.0, "random": Script(), **settings})


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"conservative_loss": 1.5}, "reconnect.conservative_loss must be from 0 to 1, not 1.5"),
            ({"low_below": NAN}, "reconnect.low_below must be from 0 to 1, not nan"),
            ({"lasting_s": -1.0}, "reconnect.lasting_s must be from 0 to 1e+06, not -1.0"),
            ({"most_told_s": INF}, "reconnect.most_told_s must be from 0 to 1e+06, not inf"),
            ({"hurry_s": 0.0}, "reconnect.hurry_s must be from 1e-06 to 1e+06, not 0.0"),
            ({"low_pace": 0.0}, "reconnect.low_pace must be from 0.001 to 1000, not 0.0"),
            ({"remembered": -1}, "reconnect.remembered must be a whole number from 0 to 10000, not -1"),
            ({"judged_from": 1.5}, "reconnect.judged_from must be a whole number from 1 to 10000, not 1.5"),
            ({"delay_least_s": 31.0}, "reconnect.delay_least_s must be no more than delay_most_s, not 31.0"),
            ({"least_told_s": 901.0}, "reconnect.least_told_s must be no more than most_told_s, not 901.0"),
            ({"low_below": 0.95}, "reconnect.low_below must be no more than high_from, not 0.95"),
        ],
    )
    def test_settings_out_of_bounds_are_refused(self, settings: dict[str, Any], text: str) -> None:
        with pytest.raises(InvalidSetting) as caught:
            replace(RECONNECT, **settings)
        assert str(caught.value) == text

    def test_the_numbers_of_the_design(self) -> None:
        assert (RECONNECT.conservative_loss, RECONNECT.aggressive_latency_s, RECONNECT.low_below) == (0.3, 0.05, 0.3)
        assert FixedInterval() == FixedInterval(5.0, 3)

    def test_only_one_strategy(self) -> None:
        strategy = FullJitter(3.0)
        engine = PolicyEngine(ReconnectPolicy.only(strategy))
        assert engine.strategy(0.9, 0.0) is engine.strategy(0.0, 0.01) is engine.strategy(0.0, 0.0) is strategy
        assert [engine.pace(level) for level in Level] == [1.0, 1.0, 1.0]
