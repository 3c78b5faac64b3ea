"""The event bus: who is called, in which order, and what a bad subscriber cannot do."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any

import pytest

from wsfast.errors import InvalidSetting
from wsfast.events import ConnectionClosed, ConnectionOpened, Event, EventBus


@dataclass(frozen=True, slots=True)
class Ping(Event):
    number: int = 0


@dataclass(frozen=True, slots=True)
class LoudPing(Ping):
    pass


def test_a_subscriber_of_a_type_receives_it_and_its_subtypes() -> None:
    bus = EventBus()
    pings: list[Event] = []
    loud: list[Event] = []
    everything: list[Event] = []
    bus.on(Ping, pings.append)
    bus.on(LoudPing, loud.append)
    bus.on(Event, everything.append)
    other = ConnectionOpened(None)  # type: ignore[arg-type]
    events = [Ping(1), LoudPing(2), other]
    for event in events:
        bus.publish(event)
    assert pings == events[:2]
    assert loud == events[1:2]
    assert everything == events


def test_callbacks_run_inside_publish_in_the_order_of_subscription() -> None:
    bus = EventBus()
    calls: list[str] = []
    bus.on(Ping, lambda event: calls.append("first"))
    bus.on(Event, lambda event: calls.append("second"))
    bus.on(Ping, lambda event: calls.append("third"))
    bus.publish(Ping())
    assert calls == ["first", "second", "third"]


def test_unsubscribing_ends_one_subscription_and_may_be_repeated() -> None:
    bus = EventBus()
    calls: list[Event] = []
    callback = calls.append
    first = bus.on(Ping, callback)
    bus.on(Ping, callback)
    first()
    first()
    bus.publish(Ping())
    assert len(calls) == 1


def test_a_subscriber_may_unsubscribe_inside_its_own_call() -> None:
    bus = EventBus()
    calls: list[str] = []

    def once(event: Ping) -> None:
        calls.append("once")
        end()

    end = bus.on(Ping, once)
    bus.on(Ping, lambda event: calls.append("always"))
    bus.publish(Ping())
    bus.publish(Ping())
    assert calls == ["once", "always", "always"]


def test_wants_follows_the_subscriptions() -> None:
    bus = EventBus()
    assert not bus.wants(LoudPing)
    end = bus.on(Ping, lambda event: None)
    assert bus.wants(LoudPing)
    assert not bus.wants(ConnectionOpened)
    end()
    assert not bus.wants(LoudPing)


@pytest.mark.parametrize("event_type", [int, Ping(1), "Ping"])
def test_only_events_can_be_subscribed_to(event_type: Any) -> None:
    with pytest.raises(TypeError, match="event_type must be a subclass of Event"):
        EventBus().on(event_type, print)


def test_a_callback_has_to_be_callable() -> None:
    with pytest.raises(TypeError, match="callback must be callable, not str"):
        EventBus().on(Ping, "print")  # type: ignore[arg-type]


def test_the_queue_needs_room() -> None:
    with pytest.raises(InvalidSetting, match="max_queued must be 1 or more, not 0"):
        EventBus(max_queued=0)


def test_a_failing_subscriber_is_counted_and_logged_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    calls: list[Event] = []

    def fail(event: Ping) -> None:
        raise RuntimeError("on purpose")

    bus.on(Ping, fail)
    bus.on(Ping, calls.append)
    with caplog.at_level(logging.ERROR, "wsfast.events"):
        bus.publish(Ping())
    assert calls == [Ping()]
    assert bus.errors == 1
    assert "on purpose" in caplog.text
    assert "Ping" in caplog.text


async def test_asynchronous_callbacks_run_one_at_a_time_in_order() -> None:
    bus = EventBus()
    calls: list[tuple[str, int]] = []

    async def slow(event: Ping) -> None:
        calls.append(("begin", event.number))
        await asyncio.sleep(0)
        calls.append(("end", event.number))

    bus.on(Ping, slow)
    for number in range(3):
        bus.publish(Ping(number))
    assert calls == []
    await bus.join()
    assert calls == [(what, number) for number in range(3) for what in ("begin", "end")]


async def test_a_method_a_partial_and_an_object_with_an_asynchronous_call_are_asynchronous() -> None:
    calls: list[str] = []

    class Subscriber:
        async def method(self, event: Ping) -> None:
            calls.append("method")

        async def __call__(self, event: Ping) -> None:
            calls.append("object")

    async def partial(name: str, event: Ping) -> None:
        calls.append(name)

    bus = EventBus()
    bus.on(Ping, Subscriber().method)
    bus.on(Ping, Subscriber())
    bus.on(Ping, functools.partial(partial, "partial"))
    bus.publish(Ping())
    await bus.join()
    assert calls == ["method", "object", "partial"]


async def test_a_failing_asynchronous_subscriber_does_not_end_the_queue() -> None:
    bus = EventBus()
    numbers: list[int] = []

    async def fail_on_even(event: Ping) -> None:
        if event.number % 2 == 0:
            raise RuntimeError("even")
        numbers.append(event.number)

    bus.on(Ping, fail_on_even)
    for number in range(4):
        bus.publish(Ping(number))
    await bus.join()
    assert numbers == [1, 3]
    assert bus.errors == 2


async def test_a_full_queue_drops_the_newest_and_logs_once_per_burst(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus(max_queued=2)
    numbers: list[int] = []

    async def note(event: Ping) -> None:
        numbers.append(event.number)

    bus.on(Ping, note)
    with caplog.at_level(logging.WARNING, "wsfast.events"):
        for burst in range(2):
            for number in range(5):
                bus.publish(Ping(10 * burst + number))
            await bus.join()
    assert numbers == [0, 1, 10, 11]
    assert bus.dropped == 6
    assert len(caplog.records) == 2


async def test_close_lets_waiting_calls_finish() -> None:
    bus = EventBus()
    numbers: list[int] = []

    async def note(event: Ping) -> None:
        await asyncio.sleep(0)
        numbers.append(event.number)

    bus.on(Ping, note)
    for number in range(3):
        bus.publish(Ping(number))
    await bus.close(10.0)
    assert numbers == [0, 1, 2]
    assert bus.dropped == 0


async def test_close_gives_up_on_a_subscriber_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    cancelled = asyncio.Event()

    async def hang(event: Ping) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    bus.on(Ping, hang)
    for number in range(3):
        bus.publish(Ping(number))
    await asyncio.sleep(0)
    await bus.close(0.0)
    await cancelled.wait()
    assert bus.dropped == 2
    assert "still running" in caplog.text


async def test_asynchronous_callbacks_do_not_run_in_the_context_of_a_publisher() -> None:
    colour = contextvars.ContextVar("colour", default="none")
    colour.set("of the bus")
    bus = EventBus()
    seen: list[str] = []

    async def note(event: Ping) -> None:
        seen.append(colour.get())
        colour.set("of a callback")

    bus.on(Ping, note)
    for _ in range(2):  # each with a task of its own
        token = colour.set("of a publisher")
        bus.publish(Ping())
        colour.reset(token)
        await bus.join()
    assert seen == ["of the bus", "of the bus"]


def test_without_a_loop_nothing_waits_for_one() -> None:
    bus = EventBus()
    called: list[object] = []

    async def call(argument: object) -> None:
        called.append(argument)

    async def later() -> None:
        bus.enqueue(call, "with a loop")
        await bus.join()

    with pytest.raises(RuntimeError):
        bus.enqueue(call, "without a loop")
    asyncio.run(later())
    assert called == ["with a loop"]


def test_a_subscription_that_ends_while_another_thread_asks_hides_no_other() -> None:
    bus = EventBus()

    class Interrupted(type):
        def __subclasscheck__(cls, subclass: type) -> bool:
            end()
            return False

    class Watched(Event, metaclass=Interrupted):
        pass

    end = bus.on(Watched, lambda event: None)
    bus.on(Ping, lambda event: None)
    assert bus.wants(Ping)
    assert bus.wants(Ping)


async def test_the_bus_goes_on_after_its_task_was_cancelled() -> None:
    bus = EventBus()
    calls: list[Event] = []

    async def note(event: Ping) -> None:
        calls.append(event)

    bus.on(Ping, note)
    bus.publish(Ping(1))
    await bus.close(0.0)  # before the task has even begun
    bus.publish(Ping(2))
    await bus.join()
    assert calls[-1] == Ping(2)


def test_events_cannot_be_changed_and_keep_secrets_out_of_logs() -> None:
    event = ConnectionClosed(
        conn=None,  # type: ignore[arg-type]
        code=1000,
        reason="",
        by="peer",
        duration_s=1.5,
        session={"password": "hunter2"},
        metadata={"token": "hunter2"},
        groups=frozenset(),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.code = 1001  # type: ignore[misc]
    assert not hasattr(event, "__dict__")
    assert "hunter2" not in repr(event)
