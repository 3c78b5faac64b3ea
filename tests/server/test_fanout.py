"""The binding of the fan-out, where Python code runs in the middle of its calls."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from wsfast import Registry
from wsfast._fanout import Fanout, Link


def nothing(link: Link) -> None:
    pass


def make_fanout() -> Fanout:
    return Fanout(
        wake_up=nothing,
        hand_over=nothing,
        has_room=nothing,
        held=nothing,
        ponged=nothing,
        passed_on=nothing,
        buffered=lambda link: link.in_transport,
        policy=0,
        max_bytes=2**20,
        low_bytes=2**19,
        max_age_ns=10**9,
        max_total_bytes=2**24,
    )


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
