"""The policies of wsfast.js are those of wsfast/reconnect.py: with the same random numbers, the same decisions."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.devtools import Page
from wsfast import errors, reconnect
from wsfast.reconnect import Advice, Level, PolicyEngine, Reconnector, ReconnectPolicy, ReconnectStrategy, Verdict
from wsfast.session import ClientSession, Welcome, offers, read_welcome

STRATEGIES = (
    reconnect.FixedInterval,
    reconnect.ExponentialBackoff,
    reconnect.FullJitter,
    reconnect.EqualJitter,
    reconnect.DecorrelatedJitter,
    reconnect.Default,
    reconnect.Aggressive,
    reconnect.Conservative,
)

MAKE = """
const strategy = ({ type, settings }) => new wsfast[type](settings);
const policyOf = (settings) => {
  const made = { ...settings };
  for (const name of ["default", "conservative", "aggressive"]) if (name in made) made[name] = strategy(made[name]);
  return new ReconnectPolicy(made);
};
"""


def camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def as_js(strategy: ReconnectStrategy) -> dict[str, Any]:
    settings = {camel(name): value for name, value in dataclasses.asdict(strategy).items()}  # type: ignore[call-overload]
    return {"type": type(strategy).__name__, "settings": settings}


def a_strategy(rng: random.Random) -> ReconnectStrategy:
    kind = rng.choice(STRATEGIES)
    settings: dict[str, Any] = {}
    if kind is reconnect.FixedInterval:
        settings["interval_s"] = rng.choice([1e-6, 0.3, 5.0, 1e6])
    elif rng.random() < 0.7:
        settings["base_s"] = rng.choice([1e-6, 0.1, 1.0, 7.5])
        settings["cap_s"] = settings["base_s"] * rng.choice([1.0, 8.0, 1000.0])
    if kind is reconnect.ExponentialBackoff:
        settings["jitter"] = rng.choice([0.01, 0.2, 1.0])
    if rng.random() < 0.3:
        settings["max_attempts"] = rng.choice([None, 0, 1, 5])
    return kind(**settings)


def some_settings(rng: random.Random) -> dict[str, Any]:
    choices: dict[str, Any] = {
        "default": lambda: a_strategy(rng),
        "conservative": lambda: a_strategy(rng),
        "aggressive": lambda: a_strategy(rng),
        "conservative_loss": rng.random,
        "aggressive_latency_s": rng.random,
        "lasting_s": lambda: rng.choice([0.0, 5.0, 30.0]),
        "least_told_s": lambda: rng.choice([0.0, 0.5, 2.0]),
        "most_told_s": lambda: rng.choice([2.0, 900.0]),
        "spread_jitter": rng.random,
        "delay_most_s": lambda: rng.choice([5.0, 60.0]),
        "hurry_s": lambda: rng.choice([0.1, 1.0]),
        "half_life_s": lambda: rng.choice([1.0, 60.0, 600.0]),
        "judged_from": lambda: rng.choice([1, 4]),
        "low_pace": lambda: rng.choice([0.5, 3.0]),
        "high_pace": lambda: rng.choice([0.1, 1.0]),
    }
    return {name: make() for name, make in choices.items() if rng.random() < 0.3}


def a_reason(rng: random.Random) -> str:
    seconds = rng.choice(["0", "0.25", "12.345", "999999999.999999999", "1e3", "-1", "", "0012", "1234567890"])
    parts = [rng.choice(["", "restart", "x=1", " ", f"retry-after={seconds}", f"spread={seconds} ", " retry-after=3"])]
    parts += [f"spread={rng.randint(0, 2000)}"] * (rng.random() < 0.3)
    parts += [rng.choice(["bye", f"retry-after={seconds}"])] * (rng.random() < 0.5)
    return rng.choice([";", "; ", ";\x0b", ";\u00a0", ","]).join(parts)


def steps(rng: random.Random) -> Iterator[dict[str, Any]]:
    """What happens to a client, one thing after the other; at intervals between nothing and minutes."""
    now_s = rng.uniform(0, 1e6)
    codes = [1000, 1001, 1005, 1006, 1006, 1006, 1011, 1012, 1013, 3008, 4000, 4401, 4408, 4408, 4429, 0, 70_000]
    for _ in range(rng.randint(1, 25)):
        now_s += rng.choice([0.0, rng.random(), rng.uniform(0, 300.0)])
        kind = rng.choice(["lost", "lost", "failed", "failed", "failed", "told"])
        step: dict[str, Any] = {"kind": kind, "nowS": now_s}
        if kind == "lost":
            step |= {"lastedS": rng.choice([0.0, 10.0, 31.0, 4000.0]), "code": rng.choice(codes)}
            step |= {"reason": a_reason(rng), "loss": rng.choice([0.0, 0.2, 0.9])}
            step |= {"latencyS": rng.choice([0.0, 0.01, 0.5])}
        elif kind == "failed":
            step |= {"verdict": rng.choice(["forbid", "delay", "normal", "normal", "normal", "hurry"])}
            step |= {"reason": a_reason(rng)}
            if rng.random() < 0.2:
                step["advice"] = {
                    "afterS": rng.choice([-1.0, 0.0, 3.0, 1e9, None]),
                    "withinS": rng.choice([-1.0, 0.0, 2.0]),
                }
                step["advice"]["spreadS"] = rng.choice([None, None, -1.0, 40.0])
        else:
            step["spreadS"] = rng.choice([None, -1.0, 0.0, 55.0, 1e9])
        yield step


def advice_of(step: dict[str, Any]) -> Advice | None:
    if "advice" in step:
        advice = step["advice"]
        return Advice(advice["afterS"], advice["withinS"], advice["spreadS"])
    return Advice.from_reason(step["reason"])


def by_python(policy: ReconnectPolicy, numbers: list[float], happened: list[dict[str, Any]]) -> list[Any]:
    """All that can be seen of a Reconnector after each step: what it decides, and what it knows."""
    drawn = iter(numbers)
    used = 0

    def draw() -> float:
        nonlocal used
        used += 1
        return next(drawn)

    reconnector = Reconnector(PolicyEngine(policy), draw)
    seen: list[Any] = []
    for step in happened:
        decision: Any = [None, None, None]
        if step["kind"] == "told":
            reconnector.told(step["spreadS"])
        elif step["kind"] == "failed":
            decision = reconnector.failed(step["nowS"], verdict=Verdict(step["verdict"]), advice=advice_of(step))
        else:
            decision = reconnector.lost(
                step["nowS"],
                step["lastedS"],
                step["code"],
                advice=advice_of(step),
                loss=step["loss"],
                latency_s=step["latencyS"],
            )
        history = reconnector.history
        seen.append([*decision, used, reconnector.attempt, int(reconnector.level), reconnector.spread_s,
                     history.attempts(step["nowS"]), history.success_rate(),
                     list(history.durations_s), list(history.codes)])  # fmt: skip
    return seen


BY_JS = (
    MAKE
    + """
return scenarios.map(({ settings, numbers, happened }) => {
  let used = 0;
  const reconnector = new Reconnector(policyOf(settings), () => numbers[used++]);
  return happened.map((step) => {
    const { kind, nowS, lastedS, code, reason, loss, latencyS, verdict, spreadS } = step;
    const advice = step.advice ?? (reason === undefined ? null : adviceFromReason(reason));
    let decision = { waitS: null, attempt: null, because: null };
    if (kind === "told") reconnector.told(spreadS);
    else if (kind === "failed") decision = reconnector.failed(nowS, { verdict, advice });
    else decision = reconnector.lost(nowS, lastedS, code, { advice, loss, latencyS });
    const { attempt, level, history } = reconnector;
    return [decision.waitS, decision.attempt, decision.because, used, attempt, level, reconnector.spreadS,
      history.attempts(nowS), history.successRate(), [...history.durationsS], [...history.codes]];
  });
});
"""
)


SCENARIOS = 400


async def test_decisions_are_those_of_python(page: Page) -> None:
    rng = random.Random(6)
    scenarios, expected = [], []
    for _ in range(SCENARIOS):
        settings = some_settings(rng)
        happened = list(steps(rng))
        # As many as the steps can draw, and their extremes too.
        numbers = [
            rng.choice([0.0, 1 - 2**-53, rng.random(), rng.random(), rng.random()]) for _ in range(3 * len(happened))
        ]
        expected.append(by_python(ReconnectPolicy(**settings), numbers, happened))
        shown = {
            camel(name): value if isinstance(value, int | float) else as_js(value) for name, value in settings.items()
        }
        scenarios.append({"settings": shown, "numbers": numbers, "happened": happened})

    found = await page.run(BY_JS, scenarios=scenarios)

    assert len(found) == SCENARIOS
    for scenario, by_js, by_py in zip(scenarios, found, expected, strict=True):
        assert same(by_js, by_py), json.dumps(scenario)
    # The scenarios are worth something if each reason has decided often.
    because = [decision[2] for decisions in expected for decision in decisions]
    for reason in ("forbidden", "given up", "told", "spread", "delay", "hurry", "strategy"):
        assert because.count(reason) > 20, reason
    assert {decision[5] for decisions in expected for decision in decisions} == {0, 1, 2}


def same(one: Any, other: Any) -> bool:
    """Whether they are equal, floats to 1e-9 of their size."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    return bool(one == other)


async def test_the_strategies_alone_are_those_of_python(page: Page) -> None:
    """Each of them by name, with its defaults and far beyond every cap."""
    asked = [(kind, attempt, number) for kind in STRATEGIES for attempt in (0, 1, 5, 64, 2000) for number in (0.0, 0.7)]
    found = await page.run(
        "return asked.map(([type, attempt, number]) => new wsfast[type]().waitS(attempt, 3, () => number))",
        asked=[(kind.__name__, attempt, number) for kind, attempt, number in asked],
    )
    assert same(found, [kind().wait_s(attempt, 3.0, lambda number=number: number) for kind, attempt, number in asked])  # type: ignore[misc]


async def test_each_close_code_means_the_same(page: Page) -> None:
    codes = [-1, *range(5100), 70_000]
    found = await page.run("return codes.map(verdictOf)", codes=codes)
    assert found == [reconnect.verdict_of(code).value for code in codes]


async def test_reasons_are_read_as_python_reads_them(page: Page) -> None:
    rng = random.Random(7)
    reasons = [a_reason(rng) for _ in range(2000)]
    found = await page.run("return reasons.map(adviceFromReason)", reasons=reasons)
    read = [Advice.from_reason(reason) for reason in reasons]
    assert found == [
        None if advice is None else {"afterS": advice.after_s, "withinS": advice.within_s, "spreadS": advice.spread_s}
        for advice in read
    ]
    assert sum(advice is not None for advice in read) > 500


DEFAULTS = "return { ...new ReconnectPolicy(), levels: Level }"


async def test_the_defaults_are_those_of_python(page: Page) -> None:
    found = await page.run(DEFAULTS)
    assert found.pop("levels") == {level.name: level.value for level in Level}
    expected = {}
    for each in dataclasses.fields(ReconnectPolicy):
        value = getattr(ReconnectPolicy(), each.name)
        expected[camel(each.name)] = value if isinstance(value, int | float) else as_js(value)["settings"]
    assert found == expected


async def test_settings_that_python_refuses_are_refused(page: Page) -> None:
    for settings in (
        {"conservative_loss": 1.1},
        {"spread_jitter": -0.1},
        {"lasting_s": -1.0},
        {"lasting_s": 1e7},
        {"hurry_s": 0.0},
        {"half_life_s": 0.0},
        {"low_pace": 0.0},
        {"remembered": -1},
        {"remembered": 1.5},
        {"judged_from": 0},
        {"least_told_s": 901.0},
        {"delay_least_s": 31.0},
        {"low_below": 0.95},
    ):
        with pytest.raises(errors.InvalidSetting):
            ReconnectPolicy(**settings)
        shown = {camel(name): value for name, value in settings.items()}
        body = "try { new ReconnectPolicy(settings) } catch (error) { return error.name }"
        assert await page.run(body, settings=shown) == "RangeError", settings


async def test_settings_that_are_none_are_refused(page: Page) -> None:
    tries = {
        "new ReconnectPolicy({lasting: 3})": "TypeError",
        "new FullJitter({base: 3})": "TypeError",
        "new FullJitter({baseS: 0})": "RangeError",
        "new FullJitter({baseS: '1'})": "RangeError",
        "new FullJitter({baseS: 9, capS: 8})": "RangeError",
        "new ExponentialBackoff({jitter: 0})": "RangeError",
        "new ExponentialBackoff({jitter: 1.1})": "RangeError",
        "new FixedInterval({intervalS: NaN})": "RangeError",
        "new FixedInterval({maxAttempts: -1})": "RangeError",
        "new FixedInterval({maxAttempts: 1.5})": "RangeError",
        "connect(url, {resumes: false})": "TypeError",
        "connect(url, {policy: {lasting: 3}})": "TypeError",
        "connect(url, {connectTimeoutS: 0})": "RangeError",
        "connect(url, {queue: {maxMessages: -1}})": "RangeError",
        "connect(url, {queue: {whenFull: 'wait'}})": "RangeError",
        "connect(url, {kept: {maxBytes: 1.5}})": "RangeError",
        "connect('no:address')": "SyntaxError",
        "connect(url, {subprotocols: ['a b']})": "SyntaxError",
    }
    body = "const url = 'ws://127.0.0.1:1/'; try { %s } catch (error) { return error.name }"
    assert {code: await page.run(body % code) for code in tries} == tries


# ---- the protocol of resume ------------------------------------------------------------------------------------------

FINE = {"wsfast": "welcome", "client_id": "c", "token": "t", "resumed": False, "received": 0}
WELCOMES = [
    str(Welcome("c-1", "token", True, 12, 180.0, 55.0)),
    str(Welcome("\u00e4\u20ac", None)),
    json.dumps(FINE),
    json.dumps({**FINE, "grace_s": 3, "spread_s": None, "more": [1]}),
    json.dumps({name: value for name, value in FINE.items() if name not in ("token", "received")}),
    *(json.dumps({name: value for name, value in FINE.items() if name != left_out}) for left_out in FINE),
    *(
        json.dumps({**FINE, name: value})
        for name in FINE
        for value in (None, True, 0, 1, -1, 1.5, 2**53 - 1, 2**53, 1e300, "x", "", [], {})
    ),
    *(
        json.dumps({**FINE, name: value})
        for name in ("grace_s", "spread_s")
        for value in (True, 0, -1, 1e9, 1.1e9, math.inf, math.nan, "1", [])
    ),
    *("", "x", "null", "1", "[]", "{}", '"welcome"', "[" * 3000, '{"wsfast": "welcome"', '{"wsfast": "hello"}'),
    json.dumps({**FINE, "client_id": "c" * 4000}),
    json.dumps({**FINE, "client_id": "c" * 4100}),
]


async def test_welcomes_are_read_as_python_reads_them(page: Page) -> None:
    found = await page.run(
        "return welcomes.map((text) => { try { return readWelcome(text) } catch (error) { return error.name } })",
        welcomes=WELCOMES,
    )
    for text, by_js in zip(WELCOMES, found, strict=True):
        try:
            expected: Any = {camel(name): value for name, value in read_welcome(text)._asdict().items()}
        except errors.BadHandshake:
            expected = "BadHandshake"
        assert by_js == expected, text


async def test_offers_are_those_of_python(page: Page) -> None:
    for names in ([], ["chat"], ["chat.v2", "chat.v1"]):
        assert await page.run("return offers(names)", names=names) == offers(names)


async def test_a_client_session_counts_as_python_does(page: Page) -> None:
    """Any order of what may happen to it; also what a server says that does not keep to the protocol."""
    rng = random.Random(8)
    scripts = []
    for _ in range(200):
        script: list[Any] = []
        for number in range(rng.randint(1, 40)):
            if rng.random() < 0.75:
                script.append(rng.choice(["took", "x" * rng.randint(1, 9) + "\u20ac" * rng.randint(0, 3)]))
            else:
                token = rng.choice([f"t{number}", f"t{number}", None])
                script.append({"token": token, "resumed": rng.random() < 0.8, "received": rng.randint(0, 20)})
        scripts.append(script)

    found = await page.run(
        """return scripts.map((script) => {
             const session = new ClientSession(8, 40);
             return script.map((step) => {
               let came = null;
               try {
                 if (step === "took") session.took();
                 else if (typeof step === "string") session.sending({data: step, bytes: new Blob([step]).size});
                 else came = session.welcomed(step);
               } catch (error) { came = error.name; }
               if (came?.resend) came = [came.resend.map(({data}) => data), came.lost, came.unconfirmed];
               return [came, JSON.parse(session.hello()), session.sent, session.kept, session.received];
             });
           });""",
        scripts=scripts,
    )

    for script, by_js in zip(scripts, found, strict=True):
        session = ClientSession(8, 40)
        for step, seen in zip(script, by_js, strict=True):
            expected: Any = None
            try:
                if step == "took":
                    session.took()
                elif isinstance(step, str):
                    session.sending(step)
                else:
                    expected = list(session.welcomed(Welcome("c", **step)))
            except errors.BadHandshake:
                expected = "BadHandshake"
            hello = json.loads(session.hello())
            assert seen == [expected, hello, session.sent, session.kept, session.received]
