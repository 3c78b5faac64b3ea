"""The binding of the fan-out, where Python code runs in the middle of its calls."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from wsfast import InvalidSetting, Registry
from wsfast._fanout import DROPPED, POLICIES, TOO_SLOW, Fanout, Link, Message, _live


def nothing(link: Link) -> None:
    pass


def make_fanout(**settings: Any) -> Fanout:
    defaults: dict[str, Any] = {
        "wake_up": nothing,
        "hand_over": nothing,
        "has_room": nothing,
        "held": nothing,
        "ponged": nothing,
        "passed_on": nothing,
        "buffered": lambda link: link.in_transport,
        "policy": 0,
        "max_bytes": 2**20,
        "low_bytes": 2**19,
        "max_age_ns": 10**9,
        "max_total_bytes": 2**24,
        "kept_messages": 100,
        "kept_bytes": 2**20,
        "kept_age_ns": 10**12,
        "clock": lambda: 1,
    }
    return Fanout(**{**defaults, **settings})


@pytest.fixture
def fanout() -> Iterator[Fanout]:
    fanout = make_fanout()
    yield fanout
    fanout._check()
    for link in fanout.links():
        fanout.forget(link)


@pytest.mark.parametrize("everybody", [False, True])
def test_links_come_and_go_while_a_variant_is_encoded(fanout: Fanout, everybody: bool) -> None:
    registry = Registry()
    records = [registry.add(f"c{i}") for i in range(200)]

    def encode(payload: bytes, is_text: bool) -> bytes:
        for record in records[:50]:  # as a finaliser may do
            if (link := fanout.get(record)) is not None:
                fanout.forget(link)
        del link
        gc.collect()
        for record in records[100:]:  # more room is needed for all links
            if fanout.get(record) is None:
                fanout.admit(record, None)
        return payload[::-1]

    number = fanout.add_variant(encode)
    for record in records[:100]:
        fanout.admit(record, None, number)
    message = fanout.message(b"abc", False, 1)
    strangers = fanout.push(message, None if everybody else records)
    assert strangers == ([] if everybody else records[:50])
    assert message.targets == message.pending == 150
    assert [fanout.get(record).messages for record in records[50:]] == [1] * 150  # type: ignore[union-attr]


def test_a_push_that_fails_leaves_nobody_out_of_the_next(fanout: Fanout) -> None:
    def encode(payload: bytes, is_text: bool) -> bytes:
        raise ZeroDivisionError

    record = Registry().add("a")
    link = fanout.admit(record, None, fanout.add_variant(encode))
    other = fanout.admit(Registry().add("b"), None)
    with pytest.raises(ZeroDivisionError):
        fanout.push(fanout.message(b"1", False, 1), None, [record, other.record])
    fanout.push(fanout.message(b"2", False, 1), [other.record])
    assert (link.messages, other.messages) == (0, 1)


def test_a_message_of_another_fan_out_is_refused(fanout: Fanout) -> None:
    with pytest.raises(ValueError, match="another fan-out"):
        fanout.push(make_fanout().message(b"1", False, 1), None)
    assert len(fanout) == 0


def test_what_is_reported_about_a_link_goes_with_it(fanout: Fanout) -> None:
    fanout.wants_reports = True
    link = fanout.admit(Registry().add("a"), None)
    fanout.push(fanout.message(b"1", False, 1), None)
    fanout.forget(link)
    del link
    assert fanout.take_reports() == []


# ---- sessions --------------------------------------------------------------------------------------------------------


class Socket:
    """A connection object, of which nothing is asked here."""

    def __init__(self, at_the_end: Callable[[], object] = lambda: None) -> None:
        self.at_the_end = at_the_end

    def __del__(self) -> None:
        self.at_the_end()


def begin(fanout: Fanout, record: Any = None, ws: object = None) -> Link:
    """A link with a session that has been greeted, and whose greeting has left."""
    link = fanout.admit(Registry().add("a") if record is None else record, ws)
    fanout.begin_session(link)
    fanout.greet(link, b"hello", 1)
    assert texts(fanout, link) == ["hello"]
    return link


def push(fanout: Fanout, link: Link, text: str) -> Message:
    message = fanout.message(text.encode(), True, 1)
    fanout.push(message, [link.record], log=7)
    return message


def texts(fanout: Fanout, link: Link) -> list[str | bytes]:
    """What is sent to a link, which has no socket: through its adapter, until it has nothing."""
    sent = []
    while link.is_open and (text := link.peek_message()) is not None:
        sent.append(text)
        link.commit(1, 0)
    return sent


def come_back(fanout: Fanout, link: Link, received: int) -> Link:
    newer = fanout.resume(link, None, 0, False, received)
    assert newer is not None
    fanout.greet(newer, b"again", 2)
    return newer


def test_what_was_missed_comes_behind_the_greeting(fanout: Fanout) -> None:
    link = begin(fanout)
    record, live = link.record, [push(fanout, link, text) for text in "ab"]
    assert texts(fanout, link) == ["a", "b"] and link.has_session and link.owed == 0
    assert [message.sent for message in live] == [1, 1]
    pending = push(fanout, link, "c")
    link.close()
    away = push(fanout, link, "d")
    assert (pending.pending, pending.away, away.targets, away.away) == (0, 1, 1, 1)
    assert (link.is_away, link.is_behind, link.is_open, link.owed, link.lost_bytes) == (True, False, False, 2, 3)

    newer = fanout.resume(link, None, 0, False, 1)
    assert newer is not None and fanout.get(record) is newer and fanout.links() == [newer]
    assert (newer.is_away, newer.is_behind, newer.is_open, newer.owed, newer.messages) == (False, True, True, 3, 0)
    assert link.record is None and not link.has_session and link.owed == 0
    newest = push(fanout, newer, "e")
    assert newest.away == 1 and newer.owed == 4
    fanout.greet(newer, b"again", 2)
    assert not newer.is_behind and newer.owed == 0
    assert texts(fanout, newer) == ["again", "b", "c", "d", "e"]
    assert fanout.sessions == 1


def test_what_is_sent_again_is_counted_on_the_record_and_a_greeting_is_not(fanout: Fanout) -> None:
    registry = Registry()
    record = registry.add("a")
    link = begin(fanout, record)
    push(fanout, link, "four")
    texts(fanout, link)
    newer = come_back(fanout, link, 0)
    texts(fanout, newer)
    assert (record.messages_out, record.bytes_out) == (2, 8)


def test_a_session_is_begun_once_on_an_open_link_that_was_sent_nothing(fanout: Fanout) -> None:
    other = make_fanout()
    foreign, link = other.admit(Registry().add("a"), None), fanout.admit(Registry().add("b"), None)
    with pytest.raises(ValueError, match="another fan-out"):
        fanout.begin_session(foreign)
    push(fanout, link, "x")
    with pytest.raises(ValueError, match="has been sent something"):
        fanout.begin_session(link)
    assert texts(fanout, link) == ["x"]
    fanout.begin_session(link)
    with pytest.raises(ValueError, match="has a session already"):
        fanout.begin_session(link)
    closed = fanout.admit(Registry().add("c"), None)
    closed.close()
    with pytest.raises(ValueError, match="is closed"):
        fanout.begin_session(closed)
    fanout.forget(closed)
    with pytest.raises(ValueError, match="another fan-out"):
        fanout.begin_session(closed)
    assert fanout.sessions == 1 and not closed.has_session and not foreign.has_session
    other.forget(foreign)


def test_only_a_session_of_this_fan_out_is_resumed(fanout: Fanout) -> None:
    other = make_fanout()
    foreign, plain, link = begin(other), fanout.admit(Registry().add("b"), None), begin(fanout)
    with pytest.raises(ValueError, match="another fan-out"):
        fanout.resume(foreign, None, 0, False, 0)
    with pytest.raises(ValueError, match="has no session"):
        fanout.resume(plain, None, 0, False, 0)
    with pytest.raises(InvalidSetting, match="variant"):
        fanout.resume(link, None, 1, False, 0)
    for received in (-1, 2**63):
        with pytest.raises(InvalidSetting, match="received"):
            fanout.resume(link, None, 0, False, received)
    assert foreign.is_open and plain.is_open and link.is_open
    fanout.forget(link)
    with pytest.raises(ValueError, match="another fan-out"):
        fanout.resume(link, None, 0, False, 0)
    other.forget(foreign)


def test_a_count_that_cannot_be_changes_nothing(fanout: Fanout) -> None:
    link = begin(fanout)
    for text in "abc":
        push(fanout, link, text)
    texts(fanout, link)
    link.close()
    push(fanout, link, "d")
    assert fanout.resume(link, None, 0, False, 4) is None  # the last one was not handed to anybody
    assert link.is_away and link.owed == 1 and fanout.get(link.record) is link
    assert texts(fanout, come_back(fanout, link, 2)) == ["again", "c", "d"]


def test_what_is_not_kept_any_more_cannot_be_resumed() -> None:
    fanout = make_fanout(kept_messages=2)
    link = begin(fanout)
    for text in "abc":
        push(fanout, link, text)
    texts(fanout, link)
    link.close()
    assert fanout.resume(link, None, 0, False, 0) is None
    newer = come_back(fanout, link, 1)
    assert texts(fanout, newer) == ["again", "b", "c"]
    fanout.expire_kept(10**13)
    newer.close()
    assert fanout.resume(newer, None, 0, False, 2) is None
    assert texts(fanout, come_back(fanout, newer, 3)) == ["again"]
    for link in fanout.links():
        fanout.forget(link)
    assert fanout.queued_bytes == 0


def test_a_link_with_a_session_is_greeted_once_and_before_anything_else(fanout: Fanout) -> None:
    other = make_fanout()
    with pytest.raises(ValueError, match="another fan-out"):
        fanout.greet(other.admit(Registry().add("a"), None), b"hello", 1)
    record = Registry().add("b")
    link = fanout.admit(record, None)
    fanout.begin_session(link)
    push(fanout, link, "x")
    link.block(3)
    link.writable()
    fanout.ping(b"?", [record], 1)
    assert link.peek(1000) == (b"\x89\x01?", 1)
    link.commit(1, 0)
    assert link.messages == 0 and link.owed == 1
    fanout.greet(link, b"hello", 1)
    with pytest.raises(ValueError, match="greeted already"):
        fanout.greet(link, b"hello", 1)
    assert texts(fanout, link) == ["hello", "x"]
    with pytest.raises(ValueError, match="greeted already"):
        fanout.greet(link, b"hello", 1)
    push(fanout, link, "y")
    assert texts(fanout, link) == ["y"]
    plain = fanout.admit(Registry().add("c"), None)  # which is told that it has none
    fanout.greet(plain, b"hello", 1)
    assert texts(fanout, plain) == ["hello"] and not plain.has_session
    for link in other.links():
        other.forget(link)


def test_a_link_that_was_closed_before_is_not_greeted(fanout: Fanout) -> None:
    link = fanout.admit(Registry().add("a"), None)
    fanout.begin_session(link)
    push(fanout, link, "x")
    link.close()
    fanout.greet(link, b"hello", 1)
    assert (link.messages, link.owed, fanout.in_line) == (0, 1, 0)
    assert texts(fanout, come_back(fanout, link, 0)) == ["again", "x"]


def test_closing_and_forgetting_do_no_harm_twice(fanout: Fanout) -> None:
    link = begin(fanout)
    push(fanout, link, "x")
    link.close()
    link.close()
    assert link.owed == 1 and link.is_away
    fanout.forget(link)
    fanout.forget(link)
    link.close()
    link.leave()
    assert not link.is_away and not link.has_session and fanout.stats()["dropped"][3] == 1


def test_a_link_that_is_away_keeps_nothing_of_its_connection(fanout: Fanout) -> None:
    ws = Socket()
    gone = weakref.ref(ws)
    link = begin(fanout, ws=ws)
    del ws
    before = fanout.queued_bytes
    link.block(5000)
    link.fragment(True)
    assert fanout.queued_bytes == before + 5000
    link.leave()  # it is open still
    assert link.ws is gone() and link.is_waiting
    link.close()
    assert gone() is not None and fanout.has_waiting
    link.leave()
    assert gone() is None and link.ws is None
    assert not fanout.has_waiting and (link.in_transport, link.bytes) == (0, 0) and fanout.queued_bytes == before
    link.leave()
    assert link.is_away


def test_references_are_given_back(fanout: Fanout) -> None:
    record, sockets = Registry().add("a"), [Socket() for _ in range(3)]
    before = [sys.getrefcount(each) for each in (record, *sockets)]
    link = begin(fanout, record, sockets[0])
    newer = fanout.resume(link, sockets[1], 0, False, 0)
    assert newer is not None
    fanout.greet(newer, b"again", 1)
    assert fanout.resume(newer, sockets[2], 0, False, 9) is None
    newest = fanout.resume(newer, sockets[2], 0, False, 0)
    assert newest is not None and newest.record is record and newest.ws is sockets[2]
    assert link.ws is newer.ws is link.record is newer.record is None
    in_use = sys.getrefcount(newest)
    fanout.forget(newest)
    assert sys.getrefcount(newest) == in_use - 1
    assert [sys.getrefcount(each) for each in (record, *sockets)] == before


def test_what_callbacks_send_when_a_link_is_closed_to_be_resumed_is_not_missed() -> None:
    def has_room(link: Link) -> None:
        push(fanout, link, "from the callback")

    fanout = make_fanout(has_room=has_room)
    link = begin(fanout)
    link.block(100)
    push(fanout, link, "x")
    link.watch(0)
    newer = come_back(fanout, link, 0)
    assert texts(fanout, newer) == ["again", "x", "from the callback"]
    fanout.forget(newer)


def test_what_a_finaliser_of_the_former_connection_sends_is_not_missed(fanout: Fanout) -> None:
    record = Registry().add("a")
    texts_of_finaliser = []

    def at_the_end() -> None:
        link = fanout.get(record)
        assert link is not None and link.has_session
        texts_of_finaliser.append(push(fanout, link, "from the finaliser").away)

    link = begin(fanout, record, Socket(at_the_end))
    newer = come_back(fanout, link, 0)
    assert texts_of_finaliser == [1]
    assert texts(fanout, newer) == ["again", "from the finaliser"]


@pytest.mark.parametrize("what", ["forget", "resume"])
def test_a_callback_may_be_faster(what: str) -> None:
    newer: list[Link | None] = []

    def has_room(link: Link) -> None:
        if what == "forget":
            fanout.forget(link)
        else:
            newer.append(fanout.resume(link, None, 0, False, 0))

    fanout = make_fanout(has_room=has_room)
    link = begin(fanout)
    link.block(100)
    push(fanout, link, "x")
    link.watch(0)
    assert fanout.resume(link, None, 0, False, 0) is None
    assert fanout.sessions == len(fanout) == len(newer) == (what == "resume")
    for each in newer:
        assert each is not None
        fanout.greet(each, b"again", 1)
        assert texts(fanout, each) == ["again", "x"]
        fanout.forget(each)
    fanout._check()
    assert fanout.queued_bytes == 0


def test_messages_of_the_library_are_passed_on_until_the_link_is_forgotten() -> None:
    passed: list[tuple[Link, bytes, bool]] = []
    fanout = make_fanout(passed_on=lambda *what: passed.append(what))
    link = begin(fanout)
    link.pass_on(b"1", True)
    link.close()
    link.pass_on(b"2", False)
    newer = come_back(fanout, link, 0)
    link.pass_on(b"3", True)
    newer.pass_on(b"4", True)
    assert passed == [(link, b"1", True), (link, b"2", False), (newer, b"4", True)]
    fanout.forget(newer)
    newer.pass_on(b"5", True)
    assert len(passed) == 3


@pytest.mark.parametrize("policy", ["drop_oldest", "conflate"])
def test_a_client_that_comes_back_and_reads_nothing_is_not_sent_without_end(policy: str) -> None:
    fanout = make_fanout(policy=POLICIES[policy], max_bytes=2000, low_bytes=1000)
    fanout.wants_reports = True
    link = begin(fanout)
    link.close()
    for number in range(10):
        push(fanout, link, f"kept {number}")
    newer = fanout.resume(link, None, 0, False, 0)
    assert newer is not None
    newer.block(1)
    fanout.greet(newer, b"again", 1)
    assert newer.messages == 11 and not newer.is_behind
    for number in range(1000):
        push(fanout, newer, f"{number:50}")
    assert newer.bytes < 2100
    assert {what for _, what, *_ in fanout.take_reports()} == {DROPPED}
    newer.writable()
    got = texts(fanout, newer)
    assert got[:11] == ["again", *(f"kept {number}" for number in range(10))]
    assert got[11:] == [f"{number:50}" for number in range(1000 - len(got[11:]), 1000)]
    fanout.expire(10**12)
    again = come_back(fanout, newer, 10)  # what was dropped was not sent, so it is not counted
    assert texts(fanout, again) == ["again", *got[11:]]
    fanout.forget(again)


def test_who_is_given_up_because_the_log_has_moved_on_has_waited_for_no_time_that_is_known() -> None:
    fanout = make_fanout(kept_messages=2)
    link = fanout.admit(Registry().add("a"), None)
    fanout.begin_session(link)
    for text in "abc":
        push(fanout, link, text)
    fanout.greet(link, b"hello", 1)
    assert link.is_away and not link.is_behind
    ((reported, what, _, messages, nbytes, age_s),) = fanout.take_reports()
    assert (reported, what, nbytes, age_s) == (link, TOO_SLOW, 7, 0) and messages == 1
    assert fanout.resume(link, None, 0, False, 0) is None
    fanout.forget(link)


def test_the_object_that_a_transport_is_given_counts_as_kept() -> None:
    fanout = make_fanout(kept_bytes=5000)
    links = [begin(fanout), begin(fanout)]
    for _ in range(2):
        fanout.push(fanout.message(b"x" * 1000, True, 1), None, log=7)
        before = fanout.stats()["kept_bytes"]
        for link in links:
            data, _ = link.peek(1)
            assert len(data) == 1004 and fanout.stats()["kept_bytes"] == before + 1004
            link.commit(1, 0)
    # Without the objects, there would be room for one more.
    fanout.push(fanout.message(b"x" * 1000, True, 1), None, log=7)
    assert fanout.stats()["kept_messages"] == 2 and fanout.stats()["kept_bytes"] < 5000
    for link in links:
        fanout.forget(link)
    assert fanout.queued_bytes == 0


def test_a_fan_out_may_go_while_clients_are_away() -> None:
    gc.collect()
    before = _live()
    fanout: Fanout | None = make_fanout()
    assert fanout is not None
    for number in range(3):
        link = begin(fanout)
        push(fanout, link, str(number))
        if number:
            link.close()
    message = push(fanout, link, "x")
    assert fanout.sessions == 3
    del fanout, link
    gc.collect()
    assert message.away == 1  # it has the fan-out, as it is charged there
    del message
    gc.collect()
    assert _live() == before


def test_memory_is_given_back_with_the_last_session() -> None:
    gc.collect()
    before = _live()
    fanout = make_fanout(kept_messages=10_000, kept_bytes=2**30)
    links = [begin(fanout) for _ in range(50)]
    for number in range(2000):
        message = fanout.message(b"x" * 100, True, 1)
        fanout.push(message, None, [link.record for link in links[: number % 3]], log=number % 20)
        if number == 500:
            for link in links[::2]:
                link.close()
    del message
    for number, link in enumerate(links):
        if number % 3 == 0:
            links[number] = come_back(fanout, link, 0)
    fanout._check()
    stats = fanout.stats()
    assert (stats["sessions"], stats["kept_messages"]) == (50, 2000) and stats["kept_bytes"] > 200_000
    for link in links:
        assert fanout.queued_bytes > 0
        fanout.forget(link)
    assert (
        fanout.queued_bytes == fanout.sessions == fanout.stats()["kept_messages"] == fanout.stats()["kept_bytes"] == 0
    )
    del fanout, link, links
    gc.collect()
    assert _live() == before
