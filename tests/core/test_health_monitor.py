"""What a health monitor promises, whatever the implementation of the arithmetic; in the world of health_world.py."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import Implementation, load_implementation
from tests.core.health_world import (
    BASE,
    BYTES,
    DEFAULT,
    INTERVAL_S,
    NOTSENT,
    SECOND,
    SETTLED,
    Peer,
    World,
    first,
    ns,
)
from wsfast._health import (
    BY_NO_PONG,
    BY_SILENCE,
    CAN_LIMIT_RTO,
    CLEARED,
    DEAD,
    LATE,
    NEW_GRADE,
    PING_FAILED,
    SUSPECT,
    UNASKED,
)
from wsfast.adapters import Closed
from wsfast.connection import ConnectionStatus
from wsfast.errors import InvalidSetting, UnknownConnection
from wsfast.health import HEALTH, Grade, HealthPolicy, Thresholds

ONLINE, SUSPECTED = ConnectionStatus.ONLINE, ConnectionStatus.SUSPECT
NEVER = Thresholds(100.0, 100.0, 1.0, 1.0)

MakeWorld = Callable[..., World]


@pytest.fixture(params=["native", "reference"], scope="module")
def impl(request: pytest.FixtureRequest) -> Implementation:
    """Each implementation of the health of connections in turn."""
    return load_implementation(request.param)


# For what the other would take long, or does not do.
native_only = pytest.mark.parametrize("impl", ["native"], indirect=True)


@pytest.fixture
def make(impl: Implementation) -> MakeWorld:
    """Makes a world: see ``World``, without its first argument."""
    return lambda *arguments, **options: World(impl, *arguments, **options)


@pytest.fixture
def world(make: MakeWorld) -> World:
    return make()


class TestWhoIsAsked:
    def test_first_pings_of_connections_admitted_at_once_are_spread_over_the_interval(self, make: MakeWorld) -> None:
        world = make(chance=None)
        peers = [world.connect() for _ in range(2000)]
        world.run(INTERVAL_S)
        assert all(len(peer.pings) >= 1 for peer in peers)
        per_second = Counter(math.ceil(peer.pinged_s[0]) for peer in peers)
        assert set(per_second) == set(range(1, 14))
        # 154 of them on average; five standard deviations are 60.
        assert all(94 < count < 214 for count in per_second.values())

    @pytest.mark.parametrize("chance", [0, 16384, 32768, 65535])
    def test_the_first_ping_comes_at_its_chance_within_the_interval(self, make: MakeWorld, chance: int) -> None:
        world = make(chance=chance)
        peer = world.connect()
        world.run(INTERVAL_S)
        due_s = INTERVAL_S * chance / 65536
        assert len(peer.pings) >= 1
        assert max(due_s, 0.25) <= peer.pinged_s[0] < due_s + 0.5

    def test_whoever_has_sent_something_is_not_sent_an_early_first_ping(self, make: MakeWorld) -> None:
        world = make(chance=16384)
        peer = world.connect()
        world.plan(1.0, peer.record.touch)
        world.run(13.75)
        assert peer.pings == []
        world.run(14.0)
        assert peer.pinged_s == [14.0]

    @pytest.mark.parametrize("verb", ["touch", "received"])
    @pytest.mark.parametrize("every_s", [0.7, 5, 12.7])
    def test_whoever_sends_more_often_than_the_interval_is_never_asked(
        self, make: MakeWorld, every_s: float, verb: str
    ) -> None:
        world = make(chance=65535)
        peer = world.connect(None)
        world.repeat(every_s, peer.record.touch if verb == "touch" else lambda: peer.record.received(9), 500)
        world.run(499)
        assert peer.pings == []
        assert world.nobody_was_blamed()

    def test_whoever_is_quiet_is_asked_once_per_interval(self, world: World) -> None:
        peer = world.connect(0.01)
        world.run(1000)
        # 13 s after a pong, which comes 10 ms after its ping; at the next tick.
        assert peer.pinged_s == [INTERVAL_S * (1 + number) + 0.25 * number for number in range(75)]
        assert set(peer.ponged) == {0}
        assert world.explain(peer).interval_s == INTERVAL_S

    def test_known_good_links_are_asked_after_ping_interval_s(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, expected_wait_s=1.0))
        peer = world.connect(0.01)
        world.run(100)
        assert peer.pinged_s == [16.0, 32.25, 48.5, 64.75, 81.0, 97.25]

    def test_all_pings_of_a_sweep_are_the_same_and_those_of_others_differ(self, world: World) -> None:
        peers = [world.connect() for _ in range(5)]
        world.run(200)
        payloads = [[payload for _, payload in peer.pings] for peer in peers]
        assert payloads == [payloads[0]] * 5
        assert len(set(payloads[0])) == len(payloads[0]) == 15
        assert {len(payload) for payload in payloads[0]} == {8}

    def test_connections_that_are_closing_or_broken_are_left_alone(self, world: World) -> None:
        peers = [world.connect(None) for _ in range(3)]
        statuses = (ConnectionStatus.RECONNECTING, ConnectionStatus.CLOSING, ConnectionStatus.OFFLINE)
        for peer, status in zip(peers, statuses, strict=True):
            peer.record.status = status
        world.run(200)
        assert [peer.pings for peer in peers] == [peer.found for peer in peers] == [[], [], []]
        assert tuple(peer.record.status for peer in peers) == statuses
        assert all(peer.record.deadline_ns > world.clock.now for peer in peers)

    def test_a_connection_that_begins_to_close_while_suspect_stays_as_it_is(self, world: World) -> None:
        peer = world.connect(None)
        world.run(15)
        peer.record.status = ConnectionStatus.CLOSING
        assert world.pong(peer, peer.pings[0][1]) & CLEARED
        world.run(100)
        assert peer.record.status == ConnectionStatus.CLOSING
        assert len(peer.found) == 1

    def test_what_was_left_alone_begins_anew(self, world: World) -> None:
        peer = world.connect(first(3, None, 0.01))
        world.run(17)
        assert peer.pinged_s == [13.0, 14.0, 16.0]
        peer.record.status = ConnectionStatus.RECONNECTING
        world.run(60)
        peer.record.status = ONLINE
        world.run(200)
        assert [found & ~NEW_GRADE for _, found in peer.found] == [SUSPECT]
        assert peer.record.status == ONLINE
        assert len(peer.pings) > 10
        assert world.pong(peer, peer.pings[2][1]) == UNASKED

    def test_only_who_is_online_is_called_suspect(self, world: World) -> None:
        peer = world.connect(None)
        peer.record.status = ConnectionStatus.CONNECTING
        world.run(20)
        assert peer.found_s(SUSPECT) == [14.0]
        assert world.pong(peer, b"") & CLEARED
        assert peer.record.status == ConnectionStatus.CONNECTING

    def test_a_record_that_is_not_known_is_never_due_again(self, world: World) -> None:
        record = world.registry.add("strange")
        record.deadline_ns = 0
        look = world.monitor.look([record], world.clock.now)
        assert look == ([], [])
        assert record.deadline_ns is None
        assert world.monitor.pong(record, b"?", 0, world.clock.now) == 0
        world.monitor.stuck(record, world.clock.now, True, 1)

    def test_forgetting_and_admitting(self, world: World) -> None:
        peer = world.connect()
        with pytest.raises(ValueError, match="is known already"):
            world.monitor.admit(peer.record, world.clock.now)
        assert len(world.monitor) == 1
        for _ in range(2):
            world.monitor.forget(peer.record, world.clock.now, Closed(), 0)
            assert len(world.monitor) == 0
        for known in (world.monitor.grade, world.monitor.grades):
            with pytest.raises(KeyError):
                known(peer.record)

    @native_only
    def test_strange_records_are_refused(self, world: World) -> None:
        with pytest.raises(TypeError, match="must be a ConnectionMeta of the core, not str"):
            world.monitor.admit("c0", world.clock.now)  # type: ignore[arg-type]


class TestSilence:
    @pytest.mark.parametrize("last_s", [0.0, 3.1, 7.77, 40.0])
    def test_a_dead_link_is_dead_after_silence_s_and_not_before(self, world: World, last_s: float) -> None:
        peer = world.connect(None)
        if last_s:
            world.repeat(last_s / 10, peer.record.touch, last_s)
        world.run(last_s + 22.99)
        assert peer.found_s(DEAD) == []
        assert world.monitor.silent_s(peer.record, world.clock.now) == pytest.approx(world.now_s - last_s, abs=0.001)
        world.run(last_s + 23.25)
        [dead_s] = peer.found_s(DEAD)
        assert last_s + 23 <= dead_s <= last_s + 23.25
        assert peer.why_dead == f"no sign of life for {dead_s - last_s:.1f} s"

    def test_suspicion_comes_before_death_with_probes_between(self, world: World) -> None:
        peer = world.connect(None)
        world.run(13.75)
        assert (peer.pinged_s, peer.record.status) == ([13.0], ONLINE)
        world.run(60)
        assert peer.pinged_s == [13.0, 14.0, 16.0]
        assert peer.found == [(14.0, SUSPECT | NEW_GRADE), (23.0, DEAD)]
        assert peer.record.status == SUSPECTED
        assert world.monitor.stats() == {
            "pongs": 0, "late_pongs": 0, "unasked_pongs": 0, "suspects": 1, "deaths": 1, "failed_pings": 0,
            "late_ms": 0,
        }  # fmt: skip

    @pytest.mark.parametrize("probes", [0, 1, 2, 5])
    def test_no_more_probes_than_the_policy_says(self, make: MakeWorld, probes: int) -> None:
        world = make(replace(SETTLED, probes=probes, probe_interval_s=1.5))
        peer = world.connect(None)
        world.run(60)
        assert peer.pinged_s == [13.0] + [14.0 + 1.5 * number for number in range(probes)]
        assert peer.found_s(DEAD) == [23.0]

    def test_a_question_is_given_answer_s_whatever_the_silence_before(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, silence_s=6.0, expected_wait_s=1.0, answer_s=3.5))
        peer = world.connect(None)
        world.run(30)
        assert peer.pinged_s[0] == 5.0
        assert peer.found_s(DEAD) == [8.5]

    @pytest.mark.parametrize("how", ["touch", "received", "pong", "strange pong"])
    def test_any_byte_clears(self, world: World, how: str) -> None:
        peer = world.connect(None)
        world.run(14.9)
        assert peer.record.status == SUSPECTED
        world.clock.advance(ns(0.1))
        at_s = world.now_s
        if how == "touch":
            peer.record.touch()
        elif how == "received":
            peer.record.received(1)
        else:
            assert world.pong(peer, b"?" if how == "strange pong" else peer.pings[0][1]) & CLEARED
            assert peer.record.status == ONLINE
        world.run(22)
        assert peer.record.status == ONLINE
        assert peer.found_s(CLEARED) == ([] if "pong" in how else [16.0])
        assert peer.pinged_s == [13.0, 14.0]
        world.run(60)
        # It is asked again as usual.
        ping_s = math.ceil((at_s + INTERVAL_S) * 4) / 4
        assert peer.pinged_s[2:] == [ping_s, ping_s + 1, ping_s + 3]
        assert peer.found_s(SUSPECT) == [14.0, ping_s + 1]
        assert peer.found_s(DEAD) == [math.ceil((at_s + 23) * 4) / 4]
        assert world.monitor.suspects == 2

    def test_what_is_dead_is_found_once_and_left_alone(self, world: World) -> None:
        peer = world.connect(None)
        world.run(23)
        assert peer.found_s(DEAD) == [23.0]
        peer.record.touch()
        found, pings = list(peer.found), list(peer.pings)
        world.run(200)
        assert (peer.found, peer.pings, peer.record.status) == (found, pings, SUSPECTED)
        assert world.monitor.deaths == 1

    def test_an_answer_in_time_raises_no_suspicion(self, world: World) -> None:
        peer = world.connect(0.99)
        world.run(500)
        assert world.nobody_was_blamed()
        assert world.monitor.late_pongs == 0
        assert len(peer.pings) > 30

    def test_late_s_grows_with_what_round_trips_make_likely(self, world: World) -> None:
        """SRTT 0.9 s and RTTVAR 0.45 s: an answer is late after 2.7 s."""
        peer = world.connect(first(1, 0.9, None))
        world.run(40)
        assert peer.found_s(SUSPECT) == [peer.pinged_s[1] + 2.75]


class TestFrozenPeers:
    """The kernel of the peer acknowledges, its program does nothing."""

    def test_it_is_dead_when_a_ping_was_not_answered_for_timeout_s(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, None), kernel=True)
        world.run(56.2)
        assert peer.pinged_s == [13.0, 26.25, 27.25, 29.25]
        assert peer.found == [(27.25, SUSPECT | NEW_GRADE)]
        world.run(120)
        assert peer.found[1:] == [(26.25 + 30, DEAD)]
        assert peer.why_dead == "no sign of life: a ping was not answered in time"
        assert world.explain(peer).entries[-1].value == BY_NO_PONG

    def test_a_byte_before_that_clears(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, None), kernel=True)
        world.plan(55.0, peer.record.touch)
        world.run(58)
        assert peer.found_s(CLEARED) == [55.25]
        assert peer.found_s(DEAD) == []

    def test_acknowledgements_of_pushes_are_signs_of_life_but_not_for_longer_than_acks_s(self, world: World) -> None:
        peer = world.connect(0.01, kernel=True)
        world.repeat(5, lambda: world.push(peer), 300)
        world.run(290)
        # From each pong, which is the last byte: 30 s.
        assert peer.pinged_s == [13.0 + 30.25 * number for number in range(10)]
        assert world.nobody_was_blamed()

    def test_a_frozen_program_behind_pushes_is_found(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, None), kernel=True)
        world.repeat(5, lambda: world.push(peer), 300)
        world.run(290)
        assert peer.pinged_s[:2] == [13.0, 43.25]
        assert peer.found_s(SUSPECT) == [44.25]
        assert peer.found_s(DEAD) == [73.25]

    def test_it_is_found_though_something_is_always_on_its_way(self, world: World) -> None:
        """Its ping is acknowledged by whatever acknowledgement comes after it."""
        peer = world.connect(first(1, 0.4, None), kernel=True)
        assert peer.kernel is not None
        peer.kernel.rtt_s = 0.4
        world.repeat(0.2, lambda: world.push(peer), 100)
        world.run(90)
        dead = world.explain(peer).entries[-1]
        assert (dead.at_s, dead.value) == (peer.pinged_s[1] + 30, BY_NO_PONG)

    def test_timeout_s_begins_when_nothing_waits_in_our_kernel_any_more(self, world: World) -> None:
        """The ping may be among what waits there, though what is before it is acknowledged."""
        peer = world.connect(first(1, 0.01, None), kernel=True)
        kernel, begin_ns = peer.kernel, world.clock.now
        assert kernel is not None
        peer.facts = lambda now_ns: (
            BASE | NOTSENT, *kernel.facts(now_ns)[1:6], now_ns // 10**6, *kernel.facts(now_ns)[7:9],
            100 if ns(20) < now_ns - begin_ns < ns(40) else 0, 0,
        )  # fmt: skip
        world.run(100)
        # It is looked at every second from 26.25 s on, last before 40 s at 39.25 s.
        assert peer.found_s(SUSPECT) == [40.25]
        assert peer.found_s(DEAD) == [69.25]


class TestWhatTheKernelKnows:
    def test_it_is_not_believed_before_it_can_be_compared_to_a_pong(self, world: World) -> None:
        peer = world.connect(None, kernel=True)
        world.repeat(5, lambda: world.push(peer), 100)
        world.run(40)
        assert peer.pinged_s[0] == 13.0
        assert peer.found_s(DEAD) == [23.0]

    @pytest.mark.parametrize(("pong_s", "is_proxy"), [(0.001, False), (0.024, False), (0.025, True), (0.099, True)])
    def test_a_kernel_that_answers_far_sooner_than_the_peer_is_a_proxys(
        self, world: World, pong_s: float, is_proxy: bool
    ) -> None:
        """Far sooner: if the shortest pong took more than 4 of its round trips (of 1 ms), and 20 ms."""
        peer = world.connect(first(3, pong_s, None), kernel=True)
        world.repeat(5, lambda: world.push(peer), 200)
        world.run(200)
        dead, last_byte_s = world.explain(peer).entries[-1], peer.pinged_s[2] + pong_s
        if is_proxy:
            assert peer.pinged_s[:3] == [13.0, 26.25, 39.5]
            assert (dead.at_s, dead.value) == (math.ceil((last_byte_s + 23) * 4) / 4, BY_SILENCE)
        else:
            assert peer.pinged_s[:4] == [13.0, 43.25, 73.5, 103.75]
            assert (dead.at_s, dead.value) == (103.75 + 30, BY_NO_PONG)

    @pytest.mark.parametrize(("rtt_s", "is_believed"), [(0.001, True), (0.0004, False)])
    def test_one_that_was_believed_is_believed_until_it_answers_twice_as_soon(
        self, world: World, rtt_s: float, is_believed: bool
    ) -> None:
        """A pong took 44 ms: believed from 6 ms on (4 * 11), until less than 0.5 ms (8 * 5.5)."""
        peer = world.connect(0.044, kernel=True)
        assert peer.kernel is not None
        peer.kernel.rtt_s = 0.006
        world.repeat(5, lambda: world.push(peer), 100)
        world.run(45)
        assert peer.pinged_s == [13.0, 43.25]
        peer.kernel.rtt_s = rtt_s
        world.run(75)
        assert peer.pinged_s[2:] == ([73.5] if is_believed else [56.5, 69.75])
        assert world.nobody_was_blamed()

    def test_a_question_counts_from_when_the_kernel_is_believed_no_longer(self, world: World) -> None:
        peer = world.connect(first(1, 0.044, None), kernel=True)
        assert peer.kernel is not None
        peer.kernel.rtt_s = 0.006
        world.plan(35, lambda: setattr(peer.kernel, "rtt_s", 0.0))
        world.run(100)
        assert peer.pinged_s[1] == 26.25
        # Seen at 35.25 s. The last byte came at 13 s, but the question is given answer_s.
        assert peer.found_s(DEAD) == [38.25]
        assert world.explain(peer).entries[-1].value == BY_SILENCE

    def test_a_link_that_is_cut_is_suspected_by_its_pushes(self, world: World) -> None:
        peer = world.connect(0.01, kernel=True)
        world.repeat(5, lambda: world.push(peer), 100)
        world.run(27)
        assert peer.kernel is not None
        peer.kernel.is_cut = True
        peer.answer = lambda number: None
        world.run(100)
        # Looked at 13 s after the acknowledgement of the push at 25 s: that of 35 s is overdue.
        assert peer.pinged_s[:2] == [13.0, 38.25]
        assert peer.found_s(SUSPECT) == [38.25]
        assert peer.found_s(DEAD) == [48.25]
        assert peer.why_dead == "no sign of life for 23.2 s"

    @pytest.mark.parametrize(("retransmits", "first_s"), [(1, 26.25), (2, 27.0)])
    def test_what_was_sent_twice_more_is_a_question_already(
        self, world: World, retransmits: int, first_s: float
    ) -> None:
        peer = world.connect(first(1, 0.01, None), kernel=True)
        assert peer.kernel is not None
        world.run(25)
        peer.kernel.is_cut, peer.kernel.retransmits = True, retransmits
        world.plan(25.9, lambda: world.push(peer))
        world.run(26.9)
        # One time-out: a ping is sent when it is due. Two: none until the answer to what was sent is late.
        assert peer.pinged_s[1:] == [26.25][: 2 - retransmits]
        world.run(30)
        assert peer.pinged_s[1] == first_s
        assert peer.found_s(SUSPECT) == [27.0 if retransmits == 2 else 27.25]

    def test_something_is_always_on_its_way_on_a_busy_link(self, world: World) -> None:
        peer = world.connect(0.4, kernel=True)
        assert peer.kernel is not None
        peer.kernel.rtt_s = 0.4
        world.repeat(0.2, lambda: world.push(peer), 200)
        world.run(200)
        assert peer.kernel.facts(world.clock.now)[1] >= 1
        assert world.nobody_was_blamed()

    def test_a_ping_that_the_kernel_has_never_seen_is_not_acknowledged(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, None))
        acked_ns = world.clock.now + ns(13)
        peer.facts = lambda now_ns: (BASE, 0, 0, 1000, 1, max(now_ns - acked_ns, 0) // 10**6, 0, 0, 0, 0, 0)
        world.run(100)
        assert peer.found_s(DEAD) == [36.25]

    def test_a_link_that_is_cut_after_its_program_froze_died_of_silence(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, None), kernel=True)
        assert peer.kernel is not None
        world.run(32)
        assert peer.found_s(SUSPECT) == [27.25]
        peer.kernel.is_cut = True
        world.push(peer)
        world.run(100)
        # The last probe, of 29.25 s, was acknowledged.
        assert peer.found_s(DEAD) == [52.5]
        assert peer.why_dead == "no sign of life for 23.2 s"

    def test_an_acknowledgement_ends_a_question_that_no_ping_has_asked(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, probes=0))
        peer = world.connect(0.01, kernel=True)
        assert peer.kernel is not None
        world.repeat(5, lambda: world.push(peer), 100)
        world.run(27)
        peer.kernel.rtt_s = 12.0
        world.plan(30.5, lambda: setattr(peer.kernel, "rtt_s", 0.001))
        world.run(100)
        # The push at 30 s is acknowledged at 42 s, and all after it with it.
        assert peer.found_s(SUSPECT) == [38.25]
        assert peer.found_s(CLEARED) == [42.25]
        assert peer.found_s(DEAD) == []

    def test_the_share_that_was_sent_again_is_smoothed_and_makes_the_grade(self, world: World) -> None:
        peer = world.connect(0.01, kernel=True)
        assert peer.kernel is not None
        expected, last = 0, 0
        for number in range(1, 9):
            peer.kernel.bytes_sent += 1000
            peer.kernel.bytes_retrans += 500
            share = 500 * 1000 // (peer.kernel.bytes_sent - last)
            looked_s = INTERVAL_S * number + 0.25 * (number - 1)
            last = peer.kernel.bytes_sent
            expected = (7 * expected + share) // 8
            world.run(looked_s + 0.25)
            assert world.explain(peer).retransmitted == pytest.approx(expected / 1000, abs=0.02)
        assert world.explain(peer).retransmitted > 0.2
        assert world.monitor.grade(peer.record) == Grade.BAD

    def test_it_is_told_in_the_explanation(self, world: World) -> None:
        peer = world.connect(0.01)
        peer.facts = lambda now_ns: (BASE, 3, 0, 4321, 100, 100, 0, 0, 0, 0, 0)
        world.run(14)
        told = world.explain(peer)
        assert (told.kernel_latency_s, told.unacknowledged) == (0.004321, 3)


class TestOurOwnDelays:
    def test_an_hour_kills_nobody_and_is_credited_to_the_nanosecond(self, world: World) -> None:
        peers = [world.connect(0.01 * number) for number in range(1, 60)]
        for number in range(1, 9):
            world.plan(number * 1.5, peers[number].record.touch)
        world.run(20)
        before_h = world.monitor.at(world.clock.now)
        world.freeze(3600)
        assert world.monitor.late_s == 3600.0
        assert world.monitor.at(world.clock.now) == before_h + ns(0.25)
        assert world.monitor.stats()["late_ms"] == 3_600_000
        world.run(3800)
        assert world.nobody_was_blamed()
        assert world.monitor.late_pongs == 0

    def test_deadlines_move_by_it(self, world: World) -> None:
        peer = world.connect(None)
        world.run(10)
        world.freeze(3600)
        world.run(4000)
        assert peer.pinged_s == [3613.0, 3614.0, 3616.0]
        assert peer.found == [(3614.0, SUSPECT | NEW_GRADE), (3623.0, DEAD)]
        lag = [entry for entry in world.explain(peer).entries if entry.what == "lag"]
        assert [entry.value for entry in lag] == [3600.0]

    def test_a_round_trip_across_it_is_thrown_away(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, 0.5))
        world.run(26.25)
        assert len(peer.pings) == 2
        before = world.explain(peer)
        world.freeze(30)
        world.run(57)
        after = world.explain(peer)
        assert len(peer.ponged) == 2
        assert peer.ponged[1] == 0
        assert (after.latency_s, after.latency_variation_s, after.jitter_s, after.shortest_latency_s) == (
            before.latency_s, before.latency_variation_s, before.jitter_s, before.shortest_latency_s,
        )  # fmt: skip
        assert before.latency_s == 0.01

    @pytest.mark.parametrize(("answer_s", "is_late"), [(5.9, False), (6.4, True)])
    def test_a_ping_open_across_it_is_judged_by_the_health_clock(
        self, world: World, answer_s: float, is_late: bool
    ) -> None:
        peer = world.connect(answer_s)
        world.run(13)
        world.freeze(5)
        world.run(20)
        assert peer.ponged == [LATE | CLEARED if is_late else 0]
        assert peer.found_s(SUSPECT) == ([19.0] if is_late else [])

    def test_many_short_ones_add_up(self, world: World) -> None:
        peer = world.connect(None)
        world.tick_is_late_s = 0.1
        world.run(100)
        # Every tick of 0.25 s took 0.35 s.
        assert world.monitor.late_s == pytest.approx(0.1 * 285)
        assert [peer.pinged_s[0], *peer.found_s(SUSPECT), *peer.found_s(DEAD)] == pytest.approx(
            [52 * 0.35, 56 * 0.35, 92 * 0.35]
        )

    def test_what_is_within_lateness_s_is_not_credited(self, world: World) -> None:
        peer = world.connect(None)
        world.tick_is_late_s = 0.05
        world.run(60)
        assert world.monitor.late_s == 0
        assert 23 <= peer.found_s(DEAD)[0] <= 23.3

    def test_a_step_back_of_the_clock_harms_nobody(self, world: World) -> None:
        peers = [world.connect(0.02) for _ in range(20)]
        silent = world.connect(None)
        world.run(10)
        world.step_back(8)
        world.run(200)
        assert all(len(peer.pings) >= 12 and peer.found == [] for peer in peers)
        assert world.monitor.late_s == 0
        assert silent.found_s(DEAD) == [23.0]

    def test_the_health_clock_stands_still_from_when_a_tick_was_due_until_it_comes(self, world: World) -> None:
        """Also for moments of the past, as long as the delays since then are remembered."""
        chance, expected, late_ns = random.Random(3), [], 0
        monitor, now_ns = world.monitor, world.clock.now
        for _ in range(60):
            due_ns = now_ns + ns(0.25)
            delay_ns = chance.choice([0, ns(0.04), ns(0.06), ns(3)])
            credited_ns = delay_ns if delay_ns > ns(0.05) else 0
            expected += [(now_ns + ns(0.1), now_ns + ns(0.1) - late_ns), (due_ns, due_ns - late_ns)]
            expected += [(due_ns + part, due_ns - late_ns) for part in (credited_ns // 3, credited_ns)]
            now_ns = due_ns + delay_ns
            # Before the tick, it stands still since the tick was due, however late that is.
            assert monitor.at(now_ns) == due_ns - late_ns
            assert monitor.tick(now_ns) == credited_ns / SECOND
            late_ns += credited_ns
            assert monitor.at(now_ns) == now_ns - late_ns
        assert [monitor.at(at_ns) for at_ns, _ in expected] == [at_h for _, at_h in expected]

    def test_beyond_the_delays_that_are_remembered_the_clock_never_runs_backwards(self, world: World) -> None:
        monitor, begin_ns = world.monitor, world.clock.now
        now_ns = begin_ns
        for _ in range(200):
            now_ns += ns(1.25)
            assert monitor.tick(now_ns) == 1.0
        moments = [monitor.at(at_ns) for at_ns in range(begin_ns + ns(170 * 1.25), now_ns + 1, ns(0.05))]
        assert moments == sorted(moments)
        assert monitor.at(now_ns) == now_ns - ns(200)
        # A moment just before the oldest that is remembered, and one during the next.
        assert monitor.at(begin_ns + ns(136 * 1.25 + 0.1)) == begin_ns + ns(136 * 0.25 + 0.1)
        assert monitor.at(begin_ns + ns(137 * 1.25 + 0.5)) == begin_ns + ns(137 * 0.25 + 0.25)


def rfc_6298(rtts_s: list[float]) -> tuple[float, float]:
    """SRTT and RTTVAR (2.2, 2.3)."""
    srtt, rttvar = rtts_s[0], rtts_s[0] / 2
    for rtt in rtts_s[1:]:
        rttvar = 0.75 * rttvar + 0.25 * abs(srtt - rtt)
        srtt = 0.875 * srtt + 0.125 * rtt
    return srtt, rttvar


def rfc_3550(rtts_s: list[float]) -> float:
    """Jitter (6.4.1)."""
    jitter = 0.0
    for before, rtt in itertools.pairwise(rtts_s):
        jitter += (abs(rtt - before) - jitter) / 16
    return jitter


class TestPongs:
    @pytest.mark.parametrize("seed", range(5))
    def test_round_trips_are_smoothed_as_in_the_rfcs(self, world: World, seed: int) -> None:
        chance = random.Random(seed)
        rtts_s = [round(chance.uniform(0.001, 0.2), 6) for _ in range(40)]
        peer = world.connect(lambda number: rtts_s[number])
        for count in range(1, 41):
            world.run_to_pong(peer, count)
            told = world.explain(peer)
            srtt_s, rttvar_s = rfc_6298(rtts_s[:count])
            # In whole microseconds, rounded down at each step.
            assert told.latency_s == pytest.approx(srtt_s, abs=10e-6)
            assert told.latency_variation_s == pytest.approx(rttvar_s, abs=10e-6)
            assert told.jitter_s == pytest.approx(rfc_3550(rtts_s[:count]), abs=20e-6)
            assert told.shortest_latency_s == min(rtts_s[:count])
            assert peer.record.quality == pytest.approx((told.latency_s, told.jitter_s, told.loss))
        assert world.nobody_was_blamed()

    def test_known_sequence(self, world: World) -> None:
        """100, 200, 60 ms. RTTVAR: 50; 3/4 * 50 + 100/4 = 62.5; 3/4 * 62.5 + 52.5/4 = 60. SRTT: 100; 112.5; 105.9375.
        Jitter: 0; 100/16 = 6.25; 15/16 * 6.25 + 140/16 = 14.609.
        """
        peer = world.connect(lambda number: (0.1, 0.2, 0.06)[number])
        world.run(13.5)
        assert peer.record.quality == pytest.approx((0.1, 0, 0))
        world.run(36)
        told = world.explain(peer)
        assert (told.latency_s, told.latency_variation_s) == (0.105937, 0.06)
        assert (told.jitter_s, told.shortest_latency_s) == (0.014609, 0.06)

    def test_a_ping_that_left_later_than_its_sweep_is_measured_from_then(self, world: World) -> None:
        peer = world.connect(None)
        world.run(13)
        left_ns = world.clock.now + ns(0.06)
        world.clock.advance(ns(0.1))
        assert world.pong(peer, peer.pings[0][1], left_ns) == 0
        assert world.explain(peer).latency_s == 0.04

    def test_when_it_left_says_nothing_of_older_pings(self, world: World) -> None:
        peer = world.connect(None)
        world.run(14)
        world.clock.advance(ns(0.1))
        assert world.pong(peer, peer.pings[0][1], world.clock.now - ns(0.05)) & LATE
        assert world.explain(peer).entries[0].value == 1.1

    def test_the_pong_of_an_older_ping_is_late_with_its_own_round_trip(self, world: World) -> None:
        peer = world.connect(first(1, 1.5, 0.6))
        world.run(15)
        assert peer.pinged_s == [13.0, 14.0]
        assert peer.ponged == [LATE | CLEARED, 0]
        told = world.explain(peer)
        assert [(entry.what, entry.value) for entry in told.entries if entry.what in ("late", "pong")] == [
            ("late", 1.5),
            ("pong", 0.6),
        ]
        assert (told.pings, told.late, told.latency_s) == (2, 1, 0.6)
        assert world.monitor.late_pongs == 1

    def test_a_pong_answers_all_pings_before_it(self, world: World) -> None:
        peer = world.connect(first(1, None, 0.6))
        world.run(15)
        assert peer.ponged == [CLEARED]
        told = world.explain(peer)
        assert (told.pings, told.late, told.latency_s, told.loss) == (2, 1, 0.6, 0.031)
        assert world.pong(peer, peer.pings[0][1]) == UNASKED

    def test_late_round_trips_count_only_if_the_link_stays_slow(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, probes=0))
        peer = world.connect(lambda number: 0.01 if number < 2 else 1.5)
        latencies = []
        for count in range(1, 6):
            world.run_to_pong(peer, count)
            latencies.append(world.explain(peer).latency_s)
        assert [bool(found & LATE) for found in peer.ponged] == [False, False, True, True, True]
        assert latencies == [0.01, 0.01, 0.01, 0.01, pytest.approx(0.01 * 7 / 8 + 1.5 / 8, abs=1e-5)]

    def test_late_answers_that_come_together_are_one(self, make: MakeWorld) -> None:
        """Of three alone it would follow that the link has become slower."""
        world = make(replace(SETTLED, probes=3))
        peer = world.connect(first(1, 0.01, None))
        world.run(33)
        before = world.explain(peer)
        assert (before.pings, before.late, before.loss) == (5, 1, 0.031)
        found = [world.pong(peer, payload) for _, payload in peer.pings[1:]]
        assert [bool(each & LATE) for each in found] == [True] * 4
        after = world.explain(peer)
        assert (after.latency_s, after.jitter_s, after.late, after.loss) == (0.01, 0, 1, 0.031)

    @pytest.mark.parametrize("case", ["unsolicited", "duplicate", "wrong", "empty", "long", "strange sweep", "future"])
    def test_what_answers_no_ping_is_a_sign_of_life_and_nothing_else(self, make: MakeWorld, case: str) -> None:
        world = make(chance=65535)
        early = world.connect(0.01)
        world.run(3)
        peer = world.connect(0.01)
        world.run(20)
        before = world.explain(peer)
        assert (len(early.pings), len(peer.pings), len(peer.ponged)) == (1, 1, 1)
        payload = {
            "unsolicited": b"12345678",
            "duplicate": peer.pings[0][1],
            "wrong": peer.pings[0][1][::-1],
            "empty": b"",
            "long": bytes(125),
            "strange sweep": early.pings[0][1],
            "future": world.monitor.begin_sweep(world.clock.now),
        }[case]
        assert world.pong(peer, payload) == UNASKED
        assert world.monitor.unasked_pongs == 1
        assert world.monitor.late_pongs == 0
        after = world.explain(peer)
        assert after.silence_s == 0 < before.silence_s
        assert replace(after, silence_s=before.silence_s) == before
        world.run(40)
        assert peer.pinged_s == [16.0, 33.0]

    def test_what_answers_no_ping_ends_a_question(self, world: World) -> None:
        peer = world.connect(None)
        world.run(13.5)
        assert world.pong(peer, b"") == UNASKED
        world.run(26)
        assert peer.found == []
        assert peer.pinged_s == [13.0]

    def test_pings_are_remembered_for_as_long_as_they_may_be_answered(self, make: MakeWorld) -> None:
        """Four of them: three probes follow a ping. All four are answered at last, the newest first."""
        world = make(replace(SETTLED, probes=3))
        peer = world.connect(None)
        world.run(19)
        assert len(peer.pings) == 4
        payloads = [payload for _, payload in peer.pings]
        assert world.pong(peer, payloads[3]) & CLEARED
        assert [world.pong(peer, payload) for payload in payloads[:3]] == [UNASKED] * 3
        peer = world.connect(None)
        world.run(38)
        assert len(peer.pings) == 4
        assert [world.pong(peer, payload) & UNASKED for _, payload in peer.pings] == [0] * 4

    def test_a_sweep_too_long_ago_is_forgotten(self, world: World) -> None:
        peer = world.connect(None)
        world.repeat(0.9, peer.record.touch, 2000)
        other = world.connect(None)
        world.run(13)
        peer.pings, payload = [], other.pings[0][1]
        for _ in range(4095):
            world.monitor.begin_sweep(world.clock.now)
        assert not world.pong(other, payload) & UNASKED
        world.run(26.5)
        payload = other.pings[-1][1]
        for _ in range(4096):
            world.monitor.begin_sweep(world.clock.now)
        assert world.pong(other, payload) & UNASKED


def late_at_odd(count: int, then_s: float | None) -> Callable[[int], float | None]:
    """Answers so many pings late, and one in time before each, so that the link is not taken to be slow."""
    return lambda number: then_s if number >= 2 * count else 1.5 if number % 2 else 0.01


class TestLoss:
    def test_it_is_the_share_of_the_last_32_that_were_not_answered_in_time(self, make: MakeWorld) -> None:
        """Those that there were not yet, were, so that the first late one is no disaster."""
        world = make(replace(SETTLED, probes=0))
        late = [number % 3 < 2 and number < 20 for number in range(60)]
        peer = world.connect(lambda number: 1.5 if late[number] else 0.01)
        for count in range(1, 61):
            world.run_to_pong(peer, count)
            assert world.explain(peer).loss == sum(late[:count][-32:]) * 1000 // 32 / 1000
            assert peer.record.quality.loss == pytest.approx(world.explain(peer).loss)
        assert (world.explain(peer).pings, world.explain(peer).late) == (60, 14)

    def test_a_ping_counts_as_soon_as_it_is_late_and_only_once(self, world: World) -> None:
        peer = world.connect(first(1, 4.0, 0.01))
        losses = []
        for until_s in (13.75, 14.0, 14.25, 18.0, 60.0):
            world.run(until_s)
            losses.append(world.explain(peer).loss)
        assert losses == [0, 0.031, 0.031, 0.031, 0.031]
        assert world.explain(peer).late == 1

    @pytest.mark.parametrize(("late", "factor", "silence_s"), [(5, 2, 23), (6, 1, 23), (6, 2, 46), (6, 3, 69)])
    def test_silence_s_is_longer_on_a_link_with_much_loss(
        self, make: MakeWorld, late: int, factor: int, silence_s: int
    ) -> None:
        """With the one that is not answered: six late pings of 32 are less than ``bad_loss``, seven are more."""
        world = make(replace(SETTLED, probes=0, bad_factor=factor))
        peer = world.connect(late_at_odd(late, None))
        world.run(400)
        last_s = peer.pinged_s[2 * late - 1] + 1.5
        assert peer.found_s(DEAD) == [math.ceil((last_s + silence_s) * 4) / 4]

    @pytest.mark.parametrize(("late", "factor", "timeout_s"), [(5, 2, 30), (6, 2, 60), (6, 3, 90)])
    def test_so_is_timeout_s(self, make: MakeWorld, late: int, factor: int, timeout_s: int) -> None:
        world = make(replace(SETTLED, probes=0, bad_factor=factor))
        peer = world.connect(late_at_odd(late, None), kernel=True)
        world.run(400)
        assert peer.found_s(DEAD) == [peer.pinged_s[2 * late] + timeout_s]

    def test_unanswered_probes_do_not_put_off_the_end(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, probes=10, probe_interval_s=0.5))
        peer = world.connect(first(3, 0.01, None))
        world.run(100)
        assert len(peer.pings) == 3 + 1 + 10
        assert (world.explain(peer).late, world.explain(peer).loss) == (1, 0.031)
        assert peer.found_s(DEAD) == [peer.pinged_s[2] + 23.25]

    @pytest.mark.parametrize(("answer_s", "interval_s"), [(0.1, 13.0), (0.101, 8.0)])
    def test_a_slow_link_is_asked_more_often(self, world: World, answer_s: float, interval_s: float) -> None:
        peer = world.connect(answer_s)
        world.run(60)
        assert world.explain(peer).interval_s == interval_s
        assert peer.pinged_s[2] - peer.pinged_s[1] == interval_s + 0.25

    def test_so_is_one_with_loss(self, make: MakeWorld) -> None:
        """Four late pings of 32 are more than a tenth, until the first of them is none of the last 32 any more."""
        world = make(replace(SETTLED, probes=0))
        peer = world.connect(late_at_odd(4, 0.01))
        intervals_s = []
        for count in range(1, 39):
            world.run_to_pong(peer, count)
            intervals_s.append(world.explain(peer).interval_s)
        assert intervals_s == [13.0] * 7 + [8.0] * 26 + [13.0] * 5

    # Asked after 40 s, and dead after 60 s, or 120 s once a ping was late: there is room for long waits.
    ROOMY = replace(
        SETTLED, probes=0, ping_interval_s=40.0, poor_interval_s=40.0, silence_s=60.0, bad_loss=0.0,
        peak_half_life_s=600.0,
    )  # fmt: skip

    @pytest.mark.parametrize(("wait_s", "interval_s"), [(8.0, 40.0), (20.0, 30.0), (30.0, 15.0), (40.0, 2.0)])
    def test_whoever_has_answered_late_is_asked_as_much_sooner(
        self, make: MakeWorld, wait_s: float, interval_s: float
    ) -> None:
        """So that 1.5 times that wait fits into ``silence_s``."""
        world = make(self.ROOMY, chance=0)
        peer = world.connect(first(1, wait_s, 0.0))
        world.run(wait_s + 0.5)
        assert world.explain(peer).interval_s == interval_s

    def test_and_the_usual_round_trip_with_four_variations_fits_too(self, make: MakeWorld) -> None:
        """SRTT 1/8 * 0.4 s, RTTVAR 1/4 * 0.4 s: 0.45 s."""
        world = make(self.ROOMY, chance=0)
        peer = world.connect(lambda number: (1e-6, 0.4, 20.0)[number])
        world.run(45)
        world.run(world.now_s + 60)
        assert len(peer.ponged) == 3
        assert world.explain(peer).interval_s == pytest.approx(30 - 0.45, abs=0.001)

    def test_a_long_wait_counts_half_after_each_peak_half_life_s(self, make: MakeWorld) -> None:
        world = make(self.ROOMY, chance=0)
        peer = world.connect(first(1, 40.0, 0.0))
        intervals_s = []
        for run_s in (635, 645, 1235, 1275):
            world.run(run_s)
            intervals_s.append(world.explain(peer).interval_s)
        assert intervals_s == pytest.approx([2.0, 30.0, 30.0, 40.0], abs=0.001)
        assert world.monitor.deaths == 0


class TestGrades:
    LATENCY_ONLY = replace(
        SETTLED,
        fair=replace(NEVER, latency_s=0.05),
        poor=replace(NEVER, latency_s=0.1),
        bad=replace(NEVER, latency_s=0.5),
    )

    @pytest.mark.parametrize(
        ("answer_s", "grade"),
        [(0.049, Grade.GOOD), (0.051, Grade.FAIR), (0.101, Grade.POOR), (0.501, Grade.BAD)],
    )
    def test_it_is_worse_at_once(self, make: MakeWorld, answer_s: float, grade: Grade) -> None:
        world = make(self.LATENCY_ONLY)
        peer = world.connect(answer_s)
        assert world.monitor.grade(peer.record) == Grade.GOOD
        world.run(14)
        assert world.monitor.grades(peer.record) == (grade, Grade.GOOD)
        assert peer.ponged == [NEW_GRADE if grade else 0]

    @pytest.mark.parametrize("measure", ["latency_s", "jitter_s", "loss", "retransmitted"])
    def test_each_measure_makes_it(self, make: MakeWorld, measure: str) -> None:
        limits = {"latency_s": 0.05, "jitter_s": 0.01, "loss": 0.03, "retransmitted": 0.02}
        # An answer after 0.95 s is late, but comes just before a tick would suspect the link for it.
        policy = replace(
            SETTLED, late_s=0.9, calm=200, fair=replace(NEVER, **{measure: limits[measure]}), poor=NEVER, bad=NEVER
        )
        answers: dict[str, Callable[[int], float]] = {
            "latency_s": lambda number: 0.06,
            "jitter_s": lambda number: 0.001 + 0.047 * (number % 2),
            "loss": lambda number: 0.95 if number == 4 else 0.01,
            "retransmitted": lambda number: 0.01,
        }
        for name, answer in answers.items():
            world = make(policy)
            peer = world.connect(answer, kernel=True)
            assert peer.kernel is not None
            if name == "retransmitted":
                peer.kernel.bytes_sent, peer.kernel.bytes_retrans = 1000, 300
            world.run(120)
            assert world.monitor.grade(peer.record) == (Grade.FAIR if name == measure else Grade.GOOD)
            assert world.nobody_was_blamed()

    @native_only
    @pytest.mark.parametrize("calm", [1, 2, 4])
    @pytest.mark.parametrize("seed", range(2))
    def test_it_is_better_by_one_after_so_many_looks_well_below_the_limit(
        self, make: MakeWorld, seed: int, calm: int
    ) -> None:
        world = make(replace(self.LATENCY_ONLY, calm=calm))
        chance = random.Random(seed)
        levels = [0.01, 0.045, 0.07, 0.09, 0.15, 0.3, 0.8]
        plan = [level for level in chance.choices(levels, k=20) for _ in range(12)]
        peer = world.connect(lambda number: plan[number])
        limits = [0.05, 0.1, 0.5]
        grade, calm_looks, changes = Grade.GOOD, 0, 0
        for count in range(1, len(plan) + 1):
            world.run_to_pong(peer, count)
            srtt_s = world.explain(peer).latency_s
            worst = Grade(sum(srtt_s > limit for limit in limits))
            is_calm = grade > 0 and srtt_s <= 0.8 * limits[grade - 1]
            calm_looks = calm_looks + 1 if is_calm else 0
            before = grade
            if worst > grade:
                grade, calm_looks = worst, 0
            elif calm_looks == calm:
                grade, calm_looks = Grade(grade - 1), 0
            assert world.monitor.grade(peer.record) == grade
            assert bool(peer.ponged[-1] & NEW_GRADE) == (grade != before)
            changes += grade != before
        assert changes >= 5
        assert world.nobody_was_blamed()

    @native_only
    def test_a_value_that_swings_around_a_limit_does_not_swing_the_grade(self, make: MakeWorld) -> None:
        world = make(self.LATENCY_ONLY)
        peer = world.connect(lambda number: 0.05 + 0.03 * (-1) ** (number // 6))
        latencies_s = set()
        for _ in range(300):
            world.run(world.now_s + 13.5)
            latencies_s.add(world.explain(peer).latency_s > 0.05)
        assert latencies_s == {False, True}
        assert sum(bool(found & NEW_GRADE) for found in peer.ponged) == 1

    @pytest.mark.parametrize("calm", [1, 3, 4])
    def test_whoever_is_suspect_is_bad_and_recovers_step_by_step(self, make: MakeWorld, calm: int) -> None:
        world = make(replace(self.LATENCY_ONLY, calm=calm))
        peer = world.connect(first(1, None, 0.01))
        world.run(14)
        assert world.monitor.grades(peer.record) == (Grade.BAD, Grade.GOOD)
        assert peer.found == [(14.0, SUSPECT | NEW_GRADE)]
        grades = []
        for count in range(1, 15):
            world.run_to_pong(peer, count)
            grades.append(world.monitor.grade(peer.record))
        steps = [Grade.BAD] * (calm - 1) + [Grade.POOR] * calm + [Grade.FAIR] * calm
        assert grades == steps + [Grade.GOOD] * (14 - len(steps))
        assert peer.ponged[0] == CLEARED | (NEW_GRADE if calm == 1 else 0)

    def test_calm_looks_before_it_became_worse_do_not_count(self, make: MakeWorld) -> None:
        """Fair since the first answer, and calm for the fifth and sixth. The seventh ping is not answered."""
        world = make(replace(self.LATENCY_ONLY, calm=3))
        peer = world.connect(lambda number: {0: 0.06, 6: None}.get(number, 0.001))
        grades = []
        for count in range(1, 10):
            world.run_to_pong(peer, count)
            grades.append(world.monitor.grade(peer.record))
        assert grades == [Grade.FAIR] * 6 + [Grade.BAD] * 2 + [Grade.POOR]

    @native_only
    def test_the_longest_calm_comes_to_its_end(self, make: MakeWorld) -> None:
        world = make(replace(self.LATENCY_ONLY, calm=255))
        peer = world.connect(lambda number: 0.06 if number == 0 else 0.001)
        # The fifth answer brings SRTT below 0.8 of the limit.
        grades = []
        for count in (1, 258, 259):
            world.run_to_pong(peer, count)
            grades.append(world.monitor.grade(peer.record))
        assert grades == [Grade.FAIR, Grade.FAIR, Grade.GOOD]


class TestStuckPings:
    """A ping waits behind other data that the peer does not take."""

    def block(self, world: World, kernel: bool = False) -> Peer:
        peer = world.connect(None, kernel=kernel)
        peer.is_blocked = True
        return peer

    def test_it_has_failed_after_ping_deadline_s_and_that_is_told_once(self, world: World) -> None:
        peer = self.block(world)
        world.run(17.99)
        assert (peer.found, peer.record.status) == ([], ONLINE)
        world.run(42.75)
        assert peer.found == [(18.0, PING_FAILED | SUSPECT | NEW_GRADE)]
        assert peer.record.status == SUSPECTED
        assert peer.pinged_s == [13.0]
        assert world.monitor.failed_pings == 1

    def test_it_ends_nobody_of_whom_the_kernel_says_that_it_takes_data(self, world: World) -> None:
        peer = self.block(world, kernel=True)
        assert peer.kernel is not None
        world.repeat(20, lambda: setattr(peer.kernel, "bytes_acked", peer.kernel.bytes_acked + 1000), 600)
        world.run(600)
        assert peer.found == [(18.0, PING_FAILED | SUSPECT | NEW_GRADE)]
        world.run(700)
        # Looked at every 5 s, beginning at 18 s: what was taken at 600 s was seen at 603 s.
        assert peer.found_s(DEAD) == [633.0]

    def test_nor_while_what_is_before_it_becomes_less(self, world: World) -> None:
        peer = self.block(world)
        left = itertools.count(4990, -10)
        world.repeat(20, lambda: world.monitor.stuck(peer.record, world.clock.now, True, next(left)), 600)
        world.run(600)
        assert peer.found == [(18.0, PING_FAILED | SUSPECT | NEW_GRADE)]
        world.run(700)
        assert peer.found_s(DEAD) == [630.0]

    @pytest.mark.parametrize("kernel", [False, True])
    def test_whoever_takes_nothing_is_dead_after_timeout_s(self, world: World, kernel: bool) -> None:
        """However often it is told that nothing has changed."""
        peer = self.block(world, kernel=kernel)
        for at_s in range(14, 43):
            world.plan(at_s, lambda: world.monitor.stuck(peer.record, world.clock.now, True, 5000))
        world.run(100)
        assert peer.found == [(18.0, PING_FAILED | SUSPECT | NEW_GRADE), (43.0, DEAD)]
        assert peer.why_dead == "no sign of life: a ping was not answered in time"

    def test_unless_it_sends_something(self, world: World) -> None:
        peer = self.block(world, kernel=True)
        world.plan(30, peer.record.touch)
        world.run(100)
        assert [found & ~NEW_GRADE for _, found in peer.found] == [PING_FAILED | SUSPECT, CLEARED, SUSPECT | DEAD]
        assert peer.found_s(DEAD) == [60.0]
        assert world.monitor.failed_pings == 1

    def test_it_is_not_followed_by_others(self, world: World) -> None:
        """Though what was sent before it is not acknowledged either."""
        peer = world.connect(first(1, 0.01, None), kernel=True)
        assert peer.kernel is not None
        world.run(25)
        peer.is_blocked = peer.kernel.is_cut = True
        world.plan(25.9, lambda: world.push(peer))
        world.run(100)
        assert peer.pinged_s == [13.0, 26.25]
        assert peer.found_s(SUSPECT) == [27.25]
        assert peer.found_s(DEAD) == [36.25]

    def test_once_it_has_left_it_is_a_question_as_any_other(self, world: World) -> None:
        peer = self.block(world)
        world.run(20)
        left_ns = world.clock.now
        for _ in range(2):
            world.monitor.stuck(peer.record, left_ns, False, 0)
        world.clock.advance(ns(0.2))
        assert world.pong(peer, peer.pings[0][1], left_ns) & (CLEARED | LATE | UNASKED) == CLEARED
        told = world.explain(peer)
        assert told.latency_s == 0.2
        assert [(entry.what, entry.value) for entry in told.entries if entry.what in ("stuck", "left")] == [
            ("stuck", 5000.0),
            ("left", 7.0),
        ]
        peer.is_blocked = False
        world.run(100)
        assert peer.found_s(DEAD) == [43.25]

    def test_left_and_not_answered(self, world: World) -> None:
        """The silence counts from the last sign of life, as always."""
        peer = self.block(world)
        world.run(18)
        world.monitor.stuck(peer.record, world.clock.now, False, 0)
        world.run(60)
        assert peer.found_s(DEAD) == [23.0]

    def test_the_next_one_that_fails_is_told_again(self, world: World) -> None:
        peer = self.block(world)
        world.run(20)
        world.monitor.stuck(peer.record, world.clock.now, False, 0)
        world.pong(peer, peer.pings[0][1], world.clock.now)
        world.run(60)
        assert peer.pinged_s == [13.0, 33.0]
        assert peer.found_s(PING_FAILED) == [18.0, 38.0]


class TestUnreadBytes:
    """What has come, and waits to be read by us."""

    def test_whoever_sends_is_not_suspected_though_nothing_is_read(self, world: World) -> None:
        peer = world.connect(None)
        peer.facts = lambda now_ns: (0,) * 10 + (now_ns // 10**7 % 10**6 + 1,)
        world.run(300)
        assert world.nobody_was_blamed()
        assert peer.record.status == ONLINE
        assert {entry.what for entry in world.explain(peer).entries} == {"ping", "unread"}

    def test_bytes_that_stay_the_same_are_no_sign_of_life_but_nobody_is_dead_behind_them(self, world: World) -> None:
        """The pong may have no room to come."""
        peer = world.connect(None)
        begin_ns = world.clock.now
        peer.facts = lambda now_ns: (0,) * 10 + (777 if now_ns - begin_ns < ns(500.1) else 0,)
        world.run(500)
        assert [entry.what for entry in world.explain(peer).entries if entry.what == "unread"] == []
        assert peer.found == [(14.0, SUSPECT | NEW_GRADE)]
        assert peer.pinged_s == [13.0, 14.0, 16.0]
        # They were read, which would have cleared it had it been all that was missed.
        world.run(600)
        assert peer.found[1:] == [(502.0, DEAD)]

    def test_nor_is_a_program_frozen_behind_which_they_lie(self, world: World) -> None:
        peer = world.connect(first(1, 0.01, None), kernel=True)
        kernel = peer.kernel
        assert kernel is not None
        peer.facts = lambda now_ns: (*kernel.facts(now_ns)[:10], 777)
        world.run(300)
        assert peer.found == [(27.25, SUSPECT | NEW_GRADE)]

    def test_they_help_nobody_whose_path_is_dead(self, world: World) -> None:
        """As pushes tell that are not acknowledged."""
        peer = world.connect(first(1, 0.01, None), kernel=True)
        kernel = peer.kernel
        assert kernel is not None
        peer.facts = lambda now_ns: (*kernel.facts(now_ns)[:10], 777)
        world.run(25)
        kernel.is_cut = True
        world.plan(25.9, lambda: world.push(peer))
        world.run(100)
        assert peer.found_s(DEAD) == [36.25]

    def test_what_had_come_before_the_ping_does_not_answer_it(self, world: World) -> None:
        peer = world.connect(None)
        begin_ns = world.clock.now
        peer.facts = lambda now_ns: (0,) * 10 + (500 if now_ns - begin_ns < ns(14.5) else 0,)
        world.run(100)
        assert peer.found_s(SUSPECT) == [14.0]
        assert peer.found_s(DEAD) == [23.0]

    def test_they_clear_a_suspect(self, world: World) -> None:
        peer = world.connect(None)
        begin_ns = world.clock.now
        peer.facts = lambda now_ns: (0,) * 10 + (500 if now_ns - begin_ns > ns(17) else 0,)
        world.run(25)
        assert peer.found_s(SUSPECT) == [14.0]
        assert peer.found_s(CLEARED) == [18.0]
        assert peer.record.status == ONLINE


@native_only
class TestLearning:
    def teach(self, world: World, wait_s: float) -> None:
        """Forty links of 10 ms, watched for 600 s each; each 20th answer takes *wait_s*."""
        for seed in range(40):
            world.connect(lambda number, seed=seed: wait_s if number % 20 == seed % 20 and number else 0.01)
        world.run(620)

    def interval_s(self, world: World, answer_s: float) -> float:
        """Of a connection with that round-trip time, once it is not young any more."""
        peer = world.connect(answer_s)
        world.run(world.now_s + 630)
        assert world.explain(peer).interval_s != world.policy.learning_interval_s
        return world.explain(peer).interval_s

    def test_young_ones_are_asked_every_learning_interval_s(self, make: MakeWorld) -> None:
        world = make(DEFAULT)
        peer = world.connect(0.01)
        world.run(700)
        steps_s = [round(b - a, 2) for a, b in itertools.pairwise(peer.pinged_s)]
        young = sum(at_s < 600 for at_s in peer.pinged_s[1:])
        assert set(steps_s[:young]) == {5.25}
        assert set(steps_s[young + 1 :]) == {13.25}

    @pytest.mark.parametrize(
        ("wait_s", "interval_s"), [(0.01, 16.0), (5.2, 16.0), (8.2, 14.5), (12.0, 10.5), (15.7, 7.0)]
    )
    def test_links_are_asked_as_soon_as_the_waits_of_their_class_demand(
        self, make: MakeWorld, wait_s: float, interval_s: float
    ) -> None:
        """What is left of ``silence_s``, waits being counted in steps of 0.5 s; 16 s at most."""
        world = make(replace(DEFAULT, probes=0))
        self.teach(world, wait_s)
        assert self.interval_s(world, 0.012) == interval_s

    def test_other_classes_learn_nothing_from_it(self, make: MakeWorld) -> None:
        world = make(replace(DEFAULT, probes=0))
        self.teach(world, 15.7)
        assert [self.interval_s(world, answer_s) for answer_s in (0.002, 0.007, 0.017)] == [INTERVAL_S] * 3

    def test_all_teach_first_and_one_of_four_later(self, make: MakeWorld) -> None:
        """After 20 hours."""
        world = make(DEFAULT)
        for _ in range(125):
            world.connect(0.01)
        world.run(620)
        late = [world.connect(0.01) for _ in range(100)]
        world.run(660)
        assert Counter(world.explain(peer).interval_s for peer in late) == {5.0: 25, 16.0: 75}

    @pytest.mark.parametrize("pings_per_h", [80.0, 105.0])
    def test_what_may_be_spent_on_pings_is_spent(self, make: MakeWorld, pings_per_h: float) -> None:
        """Long waits are rare: to allow for all of them would take 120 pings an hour, for none, 60."""
        chance = random.Random(1)
        policy = HealthPolicy(
            probes=0, ping_interval_s=60.0, poor_interval_s=60.0, silence_s=60.0, learning_interval_s=60.0,
            learning_s=1e5, poor_loss=1.0, pings_per_h=pings_per_h, tick_s=2.0, bad_factor=4, waits_per_1000h=20.0,
            peak_half_life_s=60.0, answer_s=40.0,
        )  # fmt: skip
        world = make(policy, chance=None)
        for _ in range(100):
            world.connect(lambda number: chance.uniform(3, 30) if chance.random() < 0.002 else 0.01)
        world.run(5 * 3600)
        before = sum(len(peer.pings) for peer in world.peers.values())
        world.run(10 * 3600)
        spent = sum(len(peer.pings) for peer in world.peers.values()) - before
        assert spent / 100 / 5 == pytest.approx(pings_per_h, rel=0.08)


class TestExplanations:
    GOLDEN_DEAD = """\
c0: closed by us after 62.750 s: 4408 no sign of life for 23.2 s
  bad; last sign of life 23.231 s ago; asked after 13.000 s
  latency 22.1 ms, at best 19.2, variation 8.4, jitter 1.2; the kernel's 0.0
  1 of 6 pings late, 3.1% of the last; 0.0% retransmitted, 0 segments not acknowledged; at most 4096 bytes waited
    13.000 s  ping, answered after 21.4 ms
    26.250 s  ping, answered after 30.0 ms
    39.500 s  ping, answered after 19.2 ms
    52.750 s  ping, not answered
    53.750 s  suspect: no sign of life for 14.230 s
    53.750 s  now bad
    53.750 s  ping, not answered
    55.750 s  ping, not answered
    62.750 s  dead"""
    GOLDEN_SPARED = """\
c0: open for 62.000 s
  bad; last sign of life 13.220 s ago; asked after 13.000 s
  latency 22.5 ms, at best 21.4, variation 10.2, jitter 0.5; the kernel's 0.1
  1 of 6 pings late, 3.1% of the last; 0.3% retransmitted, 2 segments not acknowledged; at most 123456 bytes waited
    13.000 s  ping, answered after 21.4 ms
    26.250 s  ping, answered late, after 6.500 s
    27.250 s  suspect: no sign of life for 14.228 s
    27.250 s  now bad
    27.250 s  ping, answered late, after 5.750 s
    29.250 s  ping, answered late, after 4.000 s
    32.750 s  no longer suspect
    48.750 s  our own loop was late by 2.500 s, which is credited
    48.750 s  ping, answered after 30.0 ms
    62.000 s  ping, not answered
    62.000 s  a ping cannot leave, 70000 bytes are before it"""

    def end(self, world: World, peer: Peer, closed: Closed | None = None) -> None:
        closed = closed or Closed(4408, peer.why_dead or "", "us")
        world.monitor.forget(peer.record, world.clock.now, closed, 4096)
        world.registry.remove(peer.record)

    def test_of_one_that_was_killed(self, world: World) -> None:
        peer = world.connect(lambda number: (0.0214, 0.03, 0.0192, None)[min(number, 3)])
        world.run(62.75)
        self.end(world, peer)
        world.run(100)
        told = world.monitor.explain("c0", None, world.clock.now, 0)
        assert str(told) == self.GOLDEN_DEAD

    def test_of_one_that_was_spared(self, world: World) -> None:
        peer = world.connect(lambda number: (0.0214, 6.5, 5.75, 4.0, 0.03, 0.02)[number])
        peer.facts = lambda now_ns: (BASE | BYTES, 2, 0, 100, 100, 100, 0, 10_000, 300, 0, 0)
        world.run(35)
        world.freeze(2.5)
        world.run(62)
        world.monitor.stuck(peer.record, world.clock.now, True, 70_000)
        told = world.monitor.explain("c0", peer.record, world.clock.now, 123_456)
        assert str(told) == self.GOLDEN_SPARED

    def test_a_ring_keeps_the_last_events(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, explain=5))
        peer = world.connect(0.02)
        world.run(14)
        assert [(entry.what, entry.at_s) for entry in world.explain(peer).entries] == [("pong", 13.0)]
        world.run(300)
        assert [entry.at_s for entry in world.explain(peer).entries] == peer.pinged_s[-5:]

    @native_only
    def test_explain_0_costs_nothing(self, make: MakeWorld) -> None:
        sizes = []
        for explain in (0, 16):
            world = make(replace(SETTLED, explain=explain))
            peer = world.connect(None)
            world.run(30)
            sizes.append(world.monitor._health.__sizeof__())
            assert (world.explain(peer).entries == ()) == (explain == 0)
        assert sizes[1] - sizes[0] == 16 * 16

    def test_explain_0_keeps_nothing(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, explain=0))
        peer = world.connect(None)
        self.end(world, peer, Closed())
        with pytest.raises(UnknownConnection):
            world.monitor.explain("c0", None, world.clock.now, 0)

    @pytest.mark.parametrize("kept", [0, 1, 3])
    def test_closed_connections_are_remembered_up_to_explain_closed(self, make: MakeWorld, kept: int) -> None:
        world = make(replace(SETTLED, explain_closed=kept))
        for peer in [world.connect() for _ in range(6)]:
            self.end(world, peer, Closed(1001, "away", "peer"))
        for number in range(6):
            if number >= 6 - kept:
                told = world.monitor.explain(f"c{number}", None, world.clock.now, 0)
                assert (told.closed, told.queue_peak_bytes) == ((1001, "away", "peer"), 4096)
            else:
                with pytest.raises(UnknownConnection, match=f"c{number}"):
                    world.monitor.explain(f"c{number}", None, world.clock.now, 0)

    def test_an_id_that_ends_twice_is_remembered_once_and_as_the_younger(self, make: MakeWorld) -> None:
        world = make(replace(SETTLED, explain_closed=2))
        for client_id in ("a", "b", "a", "c"):
            record = world.registry.add(client_id)
            world.monitor.admit(record, world.clock.now)
            world.monitor.forget(record, world.clock.now, Closed(), 0)
            world.registry.remove(record)
        world.monitor.explain("a", None, world.clock.now, 0)
        world.monitor.explain("c", None, world.clock.now, 0)
        with pytest.raises(UnknownConnection):
            world.monitor.explain("b", None, world.clock.now, 0)

    def test_who_had_the_id_before_is_told_too(self, world: World) -> None:
        record = world.registry.add("a")
        world.monitor.admit(record, world.clock.now)
        assert world.monitor.explain("a", record, world.clock.now, 0).previous is None
        world.clock.advance(ns(4))
        world.monitor.forget(record, world.clock.now, Closed(1006), 0)
        world.registry.remove(record)
        record = world.registry.add("a")
        unknown = world.monitor.explain("a", record, world.clock.now, 0)
        assert (unknown.age_s, unknown.closed) == (4.0, (1006, "", "network"))
        world.monitor.admit(record, world.clock.now)
        world.clock.advance(ns(1))
        told = world.monitor.explain("a", record, world.clock.now, 77)
        assert (told.age_s, told.closed, told.queue_peak_bytes) == (1.0, None, 77)
        assert told.previous == unknown


TIMES = (
    "ping_interval_s", "poor_interval_s", "shortest_interval_s", "silence_s", "timeout_s", "answer_s", "late_s",
    "probe_interval_s", "ping_deadline_s", "acks_s", "expected_wait_s", "learning_interval_s", "learning_s",
    "peak_half_life_s", "tick_s", "lateness_s", "waits_per_1000h", "poor_latency_s",
)  # fmt: skip


class TestPolicies:
    @pytest.mark.parametrize(
        ("name", "value"),
        [(name, value) for name in TIMES for value in (0, 9e-7, -1.0, 1e6, math.inf, math.nan)]
        + [(name, value) for name in ("poor_loss", "bad_loss") for value in (-0.01, 1.01, math.nan)]
        + [("probes", -1), ("probes", 101), ("probes", 1.5)]
        + [("bad_factor", 0), ("bad_factor", 101), ("bad_factor", 2.0)]
        + [("calm", 0), ("calm", 256), ("explain", -1), ("explain", 10_001)]
        + [("explain_closed", -1), ("explain_closed", 10**9 + 1)]
        + [("retransmit_s", 0.99), ("retransmit_s", 120.1), ("pings_per_h", 0), ("pings_per_h", -1.0)]
        + [("silence_s", 5.0), ("shortest_interval_s", 5.1)],
    )
    def test_what_is_impossible_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidSetting) as caught:
            HealthPolicy(**{name: value})
        assert caught.value.name == f"health.{name}"
        assert caught.value.value is value
        assert f"health.{name} must be {caught.value.requirement}, not {value!r}" in str(caught.value)

    @pytest.mark.parametrize(
        "settings",
        [
            {"probes": 0}, {"probes": 100}, {"bad_factor": 1}, {"calm": 255}, {"explain": 10_000},
            {"explain_closed": 0}, {"retransmit_s": 1}, {"retransmit_s": 120}, {"retransmit_s": None},
            {"pings_per_h": None}, {"silence_s": 5.1}, {"shortest_interval_s": 5.0}, {"poor_loss": 0, "bad_loss": 1},
            {"peak_half_life_s": 1e-6},
        ],
    )  # fmt: skip
    def test_what_is_possible_is_taken(self, make: MakeWorld, settings: dict[str, Any]) -> None:
        world = make(HealthPolicy(**settings))
        peer = world.connect(1.2)
        world.run(20)
        assert peer.ponged

    @pytest.mark.parametrize("interval_s", [0, -1, 1e6, math.nan])
    def test_every_refuses_impossible_intervals(self, interval_s: float) -> None:
        with pytest.raises(InvalidSetting, match=r"health\.ping_interval_s"):
            HealthPolicy.every(interval_s)

    def test_the_default_is_that_of_the_internet(self) -> None:
        assert HealthPolicy() == HealthPolicy.internet() == HealthPolicy.every(16.0) == HEALTH
        assert HEALTH.silence_s == (23 if CAN_LIMIT_RTO else 28)

    def test_every_goes_with_the_interval(self) -> None:
        policy = HealthPolicy.every(48.0, probes=1, answer_s=7.0)
        assert (policy.timeout_s, policy.acks_s, policy.poor_interval_s) == (90.0, 90.0, 24.0)
        assert policy.silence_s == 3 * HEALTH.silence_s
        assert (policy.probes, policy.answer_s, policy.pings_per_h, policy.retransmit_s) == (1, 7.0, 59.0, 6.0)
        assert (policy.late_s, policy.tick_s, policy.lateness_s) == (1.0, 0.25, 0.05)
        assert (policy.fair, policy.ping_deadline_s) == (HEALTH.fair, 5.0)
        quick = HealthPolicy.every(0.16)
        assert (quick.late_s, quick.tick_s, quick.retransmit_s) == (0.02, 0.01, 1.0)
        assert (quick.silence_s, quick.lateness_s) == pytest.approx((HEALTH.silence_s / 100, HEALTH.silence_s / 2000))

    @pytest.mark.parametrize(
        ("policy", "ratio"),
        [(HealthPolicy.lan(), 0.25), (HealthPolicy.internet(), 1), (HealthPolicy.mobile(), 2)],
        ids=["lan", "internet", "mobile"],
    )
    def test_presets_differ_in_how_soon_they_find_out_and_what_that_costs(
        self, make: MakeWorld, policy: HealthPolicy, ratio: float
    ) -> None:
        world = make(replace(policy, learning_s=0.001))
        dead, alive = world.connect(None), world.connect(0.01)
        world.run(928)
        assert 0 <= dead.found_s(DEAD)[0] - HEALTH.silence_s * ratio <= 0.25
        interval_s = min(HEALTH.silence_s - HEALTH.expected_wait_s, HEALTH.ping_interval_s) * ratio
        assert len(alive.pings) == pytest.approx(928 / (interval_s + 0.25), rel=0.05)
        assert alive.found == []
