"""Metadata on a manager: what its loop, its events, its records and its connections have to do with it.

What a change is, and when it is rejected, is tested without a loop: tests/core/test_metadata.py.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import datetime
import gc
import logging
import re
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
from websockets.asyncio.server import ServerConnection

from tests.server.conftest import FakeLink, Seen, client, received, serving, until
from wsfast import (
    MISSING,
    ConnectionClosed,
    ConnectionManager,
    ConnectionOpened,
    ConnectionStatus,
    InvalidSetting,
    MetadataChanged,
    MetadataLimits,
    MetadataRejected,
    PeerClosed,
    PermissionDenied,
    Registry,
    UnknownConnection,
    VersionConflict,
    reference,
)
from wsfast.manager import Connection
from wsfast.metadata import Change

pytestmark = pytest.mark.usefixtures("fake_links")

GIL_IS_OFF = not getattr(sys, "_is_gil_enabled", lambda: True)()


@pytest.fixture
async def conn(manager: ConnectionManager) -> AsyncIterator[Connection]:
    async with manager.attach(FakeLink(), "a") as conn:
        yield conn


def as_tuple(change: Change) -> tuple[Any, ...]:
    return change.client_id, change.key, change.old, change.new, change.version


def reject_numbers(key: str, value: object) -> None:
    if isinstance(value, int):
        raise ValueError(f"{key} is no number")


async def in_thread(call: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, call)


async def test_the_example_of_the_documentation(manager: ConnectionManager) -> None:
    manager.metadata.add_validator(lambda _, name: name.strip(), key="name")

    async def tell_the_room(change: Change) -> None:
        if change.old is not MISSING:
            await manager.broadcast(f"{change.old} is now {change.new}", group="room")

    manager.metadata.add_notifier(tell_the_room, key="name")

    async def handler(ws: ServerConnection) -> None:
        async with manager.attach(ws, groups=["room"]) as conn:
            async for message in ws:
                manager.metadata.set(conn, "name", message)

    async with serving(handler) as url, client(url) as a, client(url) as b:
        await until(lambda: len(manager.registry) == 2)
        await a.send("  ann ")
        await a.send("bob")
        assert await received(b, 1) == ["ann is now bob"]
        assert await received(a, 1) == ["ann is now bob"]


class TestAttach:
    async def test_metadata_of_a_new_connection_is_checked(self, manager: ConnectionManager) -> None:
        manager.metadata.add_validator(lambda _, value: value * 2, key="k")
        notified: list[Change] = []
        manager.metadata.add_notifier(notified.append)
        seen = Seen(manager, MetadataChanged)
        async with manager.attach(FakeLink(), metadata={"k": 2, "gone": MISSING}) as conn:
            assert (dict(conn.metadata), conn.version) == ({"k": 4}, 0)
        assert notified == seen == []

    async def test_a_connection_with_metadata_that_is_rejected_is_not_registered(
        self, manager: ConnectionManager
    ) -> None:
        manager.metadata.add_validator(reject_numbers)
        seen, link = Seen(manager), FakeLink()
        with pytest.raises(MetadataRejected, match=r"^metadata rejected: 'k': k is no number; '': the key is empty$"):
            async with manager.attach(link, "a", metadata={"k": 2, "": "x"}):
                pass
        assert len(manager.registry) == 0
        assert seen == []
        assert link.open
        async with manager.attach(link, "a", metadata={"k": "x"}) as conn:
            assert manager.metadata.get(conn, "k") == "x"

    async def test_a_rejected_one_does_not_replace_another(self, manager: ConnectionManager, conn: Connection) -> None:
        manager.metadata.add_validator(reject_numbers)
        with pytest.raises(MetadataRejected):
            async with manager.attach(FakeLink(), "a", metadata={"k": 2}, on_duplicate="replace"):
                pass
        assert manager.registry["a"] is conn

    async def test_a_replacement_begins_anew(self, manager: ConnectionManager, conn: Connection) -> None:
        manager.metadata.set(conn, "k", 1)
        seen = Seen(manager, ConnectionClosed)
        async with manager.attach(FakeLink(), "a", on_duplicate="replace") as other:
            assert (dict(other.metadata), other.version) == ({}, 0)
            assert manager.metadata.snapshot("a") == (0, {})
            closed = seen[0]
            assert isinstance(closed, ConnectionClosed)
            assert closed.metadata == {"k": 1}


class TestAssignment:
    async def test_it_is_a_change_like_any_other(self, manager: ConnectionManager, conn: Connection) -> None:
        manager.metadata.add_validator(reject_numbers, key="b")
        notified: list[tuple[Any, ...]] = []
        manager.metadata.add_notifier(lambda change: notified.append(as_tuple(change)))
        conn.metadata = {"a": 1, "b": "x"}
        conn.metadata = {"a": 2}
        assert notified == [
            ("a", "a", MISSING, 1, 1),
            ("a", "b", MISSING, "x", 1),
            ("a", "a", 1, 2, 2),
            ("a", "b", "x", MISSING, 2),
        ]
        with pytest.raises(MetadataRejected):
            conn.metadata = {"a": 3, "b": 1}
        assert (dict(conn.metadata), conn.version) == ({"a": 2}, 2)
        with pytest.raises(TypeError, match="does not support item assignment"):
            conn.metadata["a"] = 3  # type: ignore[index]

    def test_without_a_manager_it_is_the_registrys(self) -> None:
        registry = Registry(record_type=Connection)
        record = registry.add("a")
        record.metadata = {"a": 1}
        assert (dict(record.metadata), record.version) == ({"a": 1}, 1)


class TestEvents:
    async def test_they_tell_what_changed(self, manager: ConnectionManager, conn: Connection) -> None:
        seen = Seen(manager, MetadataChanged)
        manager.metadata.update(conn, {"a": 1, "b": 2})
        manager.metadata.delete("a", "a")
        first, second = seen
        assert isinstance(first, MetadataChanged)
        assert isinstance(second, MetadataChanged)
        assert (first.conn, first.version, second.version) == (conn, 1, 2)
        assert [as_tuple(change) for change in first.changes] == [("a", "a", MISSING, 1, 1), ("a", "b", MISSING, 2, 1)]
        assert [as_tuple(change) for change in second.changes] == [("a", "a", 1, MISSING, 2)]

    async def test_values_stay_out_of_logs(self, manager: ConnectionManager, conn: Connection) -> None:
        seen = Seen(manager, MetadataChanged)
        changes: list[Change] = []
        manager.metadata.add_notifier(changes.append)
        manager.metadata.set(conn, "k", "secret")
        assert "secret" not in f"{seen[0]!r} {changes[0]!r}"

    async def test_they_follow_the_notifiers(self, manager: ConnectionManager, conn: Connection) -> None:
        order: list[str] = []
        manager.on(MetadataChanged, lambda _: order.append("event"))
        manager.metadata.add_notifier(lambda _: order.append("notifier"))
        manager.metadata.set(conn, "k", 1)
        assert order == ["notifier", "event"]

    async def test_async_subscribers_get_them_in_order(self, manager: ConnectionManager, conn: Connection) -> None:
        versions: list[int] = []

        async def subscriber(event: MetadataChanged) -> None:
            await asyncio.sleep(0)
            versions.append(event.version)

        manager.on(MetadataChanged, subscriber)
        for value in range(5):
            manager.metadata.set(conn, "k", value)
        await manager.events.join()
        assert versions == [1, 2, 3, 4, 5]

    async def test_a_subscriber_that_answers_for_ever_lets_others_in(
        self, manager: ConnectionManager, conn: Connection
    ) -> None:
        async def subscriber(event: MetadataChanged) -> None:
            manager.metadata.set(event.conn, "k", event.version)

        end = manager.on(MetadataChanged, subscriber)
        manager.metadata.set(conn, "k", 0)
        await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        end()
        await manager.events.join()
        assert conn.version > 100


class TestNotifiers:
    async def test_async_ones_are_called_in_order(self, manager: ConnectionManager, conn: Connection) -> None:
        called: list[tuple[str, int]] = []

        async def slow(change: Change) -> None:
            await asyncio.sleep(0)
            called.append(("slow", change.version))

        async def quick(change: Change) -> None:
            called.append(("quick", change.version))

        manager.metadata.add_notifier(slow, key="k")
        manager.metadata.add_notifier(quick, prefix="k")
        manager.metadata.set(conn, "k", 1)
        manager.metadata.set(conn, "k", 2)
        assert called == []
        await manager.events.join()
        assert called == [("slow", 1), ("quick", 1), ("slow", 2), ("quick", 2)]

    async def test_what_they_raise_is_logged_and_counted(
        self, manager: ConnectionManager, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fails_later(change: Change) -> None:
            raise RuntimeError("later")

        def fails(change: Change) -> None:
            raise RuntimeError("at once")

        called: list[Change] = []
        for notifier in (fails_later, fails, called.append):
            manager.metadata.add_notifier(notifier)
        with caplog.at_level(logging.ERROR):
            assert manager.metadata.set(conn, "k", "secret") == 1
            await manager.events.join()
        assert len(called) == 1
        assert manager.stats()["metadata_notifier_errors"] == 2
        assert [record.exc_info[1].args[0] for record in caplog.records if record.exc_info] == ["at once", "later"]  # type: ignore[union-attr]
        assert "secret" not in caplog.text

    async def test_one_that_closes_the_connection(self, manager: ConnectionManager, conn: Connection) -> None:
        async def dismiss(change: Change) -> None:
            await change.conn.close(4001, "dismissed")  # type: ignore[attr-defined]

        seen = Seen(manager, ConnectionClosed)
        manager.metadata.add_notifier(dismiss, key="banned")
        manager.metadata.set(conn, "banned", True)
        manager.metadata.set(conn, "other", 1)
        await manager.events.join()
        closed = seen[0]
        assert isinstance(closed, ConnectionClosed)
        assert (closed.code, dict(closed.metadata)) == (4000, {"banned": True, "other": 1})
        with pytest.raises(UnknownConnection):
            manager.metadata.set("a", "other", 2)
        with pytest.raises(PeerClosed):
            await conn.send("x")

    async def test_async_answers_to_answers_end(self, manager: ConnectionManager, conn: Connection) -> None:
        async def again(change: Change) -> None:
            await asyncio.sleep(0)
            manager.metadata.set(change.conn, "k", change.new + 1)

        manager.metadata.add_notifier(again, key="k")
        manager.metadata.set(conn, "k", 0)
        await manager.events.join()
        assert manager.metadata.get(conn, "k") == MetadataLimits().max_cascade
        assert manager.stats()["metadata_notifier_errors"] == 1

    async def test_tasks_that_they_start_are_answers_too(self, manager: ConnectionManager, conn: Connection) -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def later(value: int) -> None:
            manager.metadata.set(conn, "k", value)

        def again(change: Change) -> None:
            tasks.add(asyncio.get_running_loop().create_task(later(change.new + 1)))

        manager.metadata.add_notifier(again, key="k")
        manager.metadata.set(conn, "k", 0)
        while waiting := [task for task in tasks if not task.done()]:
            await asyncio.wait(waiting)
        assert manager.metadata.get(conn, "k") == MetadataLimits().max_cascade
        errors = [error for task in tasks if (error := task.exception()) is not None]
        assert [str(error) for error in errors] == [
            "too many changes of metadata in answer to each other: the limit is 16"
        ]

    async def test_before_the_start_there_is_nobody_to_call_async_ones(self, registry_name: str) -> None:
        manager = ConnectionManager(registry=registry_name)  # type: ignore[arg-type]
        called: list[Change] = []

        async def notifier(change: Change) -> None:
            called.append(change)

        manager.metadata.add_notifier(notifier)
        async with manager, manager.attach(FakeLink(), "a") as conn:
            manager.metadata.set(conn, "k", 1)
            await manager.events.join()
        assert len(called) == 1


class TestThreads:
    async def test_changes_from_other_threads_are_announced_on_the_loops(
        self, manager: ConnectionManager, conn: Connection
    ) -> None:
        announced: list[tuple[int, int]] = []
        manager.metadata.add_notifier(lambda change: announced.append((threading.get_ident(), change.version)))
        seen = Seen(manager, MetadataChanged)

        def change_often() -> None:
            for value in range(200):
                manager.metadata.set("a", "k", value)

        await asyncio.gather(in_thread(change_often), in_thread(change_often))
        manager.metadata.set("a", "k", "last")
        await until(lambda: len(announced) == 401)
        assert announced == [(threading.get_ident(), version) for version in range(1, 402)]
        assert [event.version for event in seen if isinstance(event, MetadataChanged)] == list(range(1, 402))

    async def test_no_update_is_lost(self, manager: ConnectionManager, conn: Connection) -> None:
        def count_up() -> None:
            for _ in range(100):
                while True:
                    version, metadata = manager.metadata.snapshot("a")
                    try:
                        manager.metadata.set("a", "n", metadata.get("n", 0) + 1, if_version=version)
                        break
                    except VersionConflict:
                        continue

        await asyncio.gather(*(in_thread(count_up) for _ in range(4)))
        assert manager.metadata.get("a", "n") == 400

    async def test_after_the_loop_is_closed(self, caplog: pytest.LogCaptureFixture) -> None:
        registry = Registry(record_type=Connection)
        manager = ConnectionManager(registry=registry)
        called: list[Change] = []
        manager.metadata.add_notifier(called.append)

        async def start() -> None:
            await manager.start()

        await in_thread(lambda: asyncio.run(start()))
        registry.add("a")
        assert manager.metadata.set("a", "k", 1) == 1
        assert called == []
        assert "the loop is closed" in caplog.text


class TestEnd:
    async def test_what_waits_is_announced_before_the_manager_ends(self, registry_name: str) -> None:
        manager = ConnectionManager(registry=registry_name)  # type: ignore[arg-type]
        plain: list[int] = []
        later: list[int] = []

        async def notifier(change: Change) -> None:
            later.append(change.version)

        manager.metadata.add_notifier(lambda change: plain.append(change.version))
        manager.metadata.add_notifier(notifier)
        async with manager, manager.attach(FakeLink(), "a"):
            worker = threading.Thread(target=manager.metadata.set, args=("a", "k", 1))
            worker.start()
            worker.join()  # while the loop has had no turn
            assert plain == []
        assert plain == later == [1]
        with pytest.raises(UnknownConnection):
            manager.metadata.set("a", "k", 1)

    async def test_the_last_metadata_is_in_the_last_event(self, manager: ConnectionManager) -> None:
        seen = Seen(manager, ConnectionClosed)
        async with manager.attach(FakeLink(), metadata={"a": 1}) as conn:
            manager.metadata.update(conn, {"a": 2, "b": 3})
        closed = seen[0]
        assert isinstance(closed, ConnectionClosed)
        assert closed.metadata == {"a": 2, "b": 3}

    async def test_a_manager_that_is_dropped_goes(self, registry_name: str) -> None:
        class Tracked(ConnectionManager):
            gone = False

            def __del__(self) -> None:
                type(self).gone = True

        manager = Tracked(registry=registry_name)  # type: ignore[arg-type]
        manager.metadata.add_notifier(lambda change: None)
        async with manager, manager.attach(FakeLink(), "a") as conn:
            manager.metadata.set(conn, "k", manager)
            del conn
        del manager
        gc.collect()
        assert Tracked.gone


class TestSettings:
    async def test_limits(self, registry_name: str) -> None:
        limits = MetadataLimits(max_key_bytes=3, max_value_bytes=10, max_keys=2, max_bytes=20)
        manager = ConnectionManager(registry=registry_name, metadata=limits)  # type: ignore[arg-type]
        async with manager, manager.attach(FakeLink(), "a") as conn:
            with pytest.raises(MetadataRejected) as caught:
                manager.metadata.update(conn, {"long": 1, "a": "x" * 11, "b": 1, "c": 2})
            assert [(problem.key, problem.reason) for problem in caught.value.problems] == [
                ("long", "the key is over the limit of 3 bytes in UTF-8"),
                ("a", "the value is over the limit of 10 bytes"),
                (None, "more than 2 keys"),
            ]
            assert manager.stats()["metadata_rejected"] == 1

    @pytest.mark.parametrize(
        ("name", "value", "requirement"),
        [
            ("max_key_bytes", 0, "1 or more"),
            ("max_value_bytes", 0, "1 or more"),
            ("max_keys", -1, "0 or more"),
            ("max_bytes", 0, "1 or more"),
            ("max_cascade", -1, "0 or more"),
            ("max_queued", 0, "1 or more"),
        ],
    )
    def test_bad_limits(self, name: str, value: int, requirement: str) -> None:
        with pytest.raises(InvalidSetting) as caught:
            MetadataLimits(**{name: value})
        assert str(caught.value) == f"metadata.{name} must be {requirement}, not {value}"

    def test_the_defaults_are_those_of_the_engines(self) -> None:
        settings = MetadataLimits().settings()
        metadata: Any = reference.Metadata.__init__
        assert {name: metadata.__kwdefaults__[name] for name in settings} == settings

    async def test_a_connection_without_metadata_costs_nothing(self, manager: ConnectionManager) -> None:
        if not isinstance(manager.registry, Registry):
            pytest.skip("the reference does not promise it")
        plain = Registry(record_type=Connection)
        manager.metadata.add_validator(reject_numbers)
        manager.metadata.add_notifier(lambda change: None)
        for number in range(1000):
            plain.add(f"{number}")
            manager.registry.add(f"{number}")
        manager.metadata.update_where({"k": MISSING})
        assert sys.getsizeof(manager.registry) == sys.getsizeof(plain)
        assert not any(manager.metadata.get(record, "k") for record in manager.registry.values())
        manager.registry.clear()


class TestPermissions:
    async def test_require(self, manager: ConnectionManager) -> None:
        async with manager.attach(FakeLink(), "a", permissions=["read", "publish"]) as conn:
            conn.require("publish")
            conn.require("publish", "read")
            conn.require()
            assert conn.allows("read")
            assert not conn.allows("admin")
            with pytest.raises(PermissionDenied) as caught:
                conn.require("admin", "read", "delete")
            assert (caught.value.client_id, caught.value.missing) == ("a", ("admin", "delete"))
            assert str(caught.value) == "connection 'a' lacks 'admin', 'delete'"
            conn.permissions = ["admin"]
            conn.require("admin")
            assert not conn.allows("read")

    async def test_equal_sets_are_one(self, manager: ConnectionManager) -> None:
        async with (
            manager.attach(FakeLink(), permissions=["a", "b"]) as one,
            manager.attach(FakeLink(), permissions=("b", "a")) as other,
        ):
            assert one.permissions is other.permissions


class TestTargets:
    async def test_broadcasts_go_by_indexed_facts(self, manager: ConnectionManager) -> None:
        async def sent_to(**filters: Any) -> set[str]:
            for link in links.values():
                link.got.clear()
            await manager.broadcast("x", **filters)
            return {client_id for client_id, link in links.items() if link.got}

        links = {name: FakeLink() for name in "abc"}
        async with (
            manager.attach(
                links["a"], "a", user_id="u", tags={"plan": "pro"}, groups=["g", "h"], device_type="ios"
            ) as a,
            manager.attach(links["b"], "b", user_id="u", tags={"plan": "free"}, groups=["g"]),
            manager.attach(links["c"], "c", groups=["g", "h"], device_type="ios"),
        ):
            assert await sent_to(group=["g", "h"]) == {"a", "c"}
            assert await sent_to(device_type="ios", not_tag="plan") == {"c"}
            assert await sent_to(not_device_type="ios") == {"b"}
            assert await sent_to(group="g", not_user="u") == {"c"}
            a.status = ConnectionStatus.SUSPECT
            assert await sent_to(status=ConnectionStatus.SUSPECT) == {"a"}
            assert await sent_to(not_status=[ConnectionStatus.SUSPECT], tag="plan") == {"b"}
            a.tags = {"plan": "free"}
            a.user_id = None
            a.device_type = None
            assert await sent_to(tag=("plan", "free")) == {"a", "b"}
            assert await sent_to(user="u") == {"b"}
            assert await sent_to(device_type="ios") == {"c"}
            assert await sent_to(group=None, status=None) == {"a", "b", "c"}
            with pytest.raises(TypeError, match=r"^to= cannot be combined with filters$"):
                await manager.broadcast("x", to=["a"], status=ConnectionStatus.ONLINE)
            with pytest.raises(TypeError, match="colour"):
                await manager.broadcast("x", colour="red")  # type: ignore[call-arg]

    async def test_metadata_for_many(self, manager: ConnectionManager) -> None:
        notified: list[str] = []
        manager.metadata.add_notifier(lambda change: notified.append(change.client_id))
        async with (
            manager.attach(FakeLink(), "a", groups=["g"]) as a,
            manager.attach(FakeLink(), "b", groups=["g"]) as b,
            manager.attach(FakeLink(), "c") as c,
        ):
            report = manager.metadata.update_where({"k": 1}, group="g")
            assert (report.changed, report.rejected) == (2, ())
            assert [dict(each.metadata) for each in (a, b, c)] == [{"k": 1}, {"k": 1}, {}]
            assert sorted(notified) == ["a", "b"]


class Profile(TypedDict):
    age: int
    name: str


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


@pytest.mark.skipif(GIL_IS_OFF, reason="msgspec has no build for this interpreter")
class TestDeclarations:
    @pytest.fixture(autouse=True)
    def msgspec(self) -> Any:
        import msgspec  # noqa: PLC0415

        return msgspec

    async def test_values_are_converted(self, manager: ConnectionManager, conn: Connection, msgspec: Any) -> None:
        manager.metadata.declare("role", Literal["admin", "user"])
        manager.metadata.declare("profile", Profile)
        manager.metadata.declare("point", Point)
        manager.metadata.declare("since", datetime.date)
        manager.metadata.declare("seats", Annotated[int, msgspec.Meta(ge=1)], strict=False)
        manager.metadata.declare("nickname", str | None)
        manager.metadata.update(
            conn,
            {
                "role": "admin",
                "profile": {"age": 1, "name": "ann"},
                "point": {"x": 1},
                "since": "2026-02-03",
                "seats": "5",
                "nickname": None,
                "anything": object,
            },
        )
        assert dict(conn.metadata) == {
            "role": "admin",
            "profile": {"age": 1, "name": "ann"},
            "point": Point(1),
            "since": datetime.date(2026, 2, 3),
            "seats": 5,
            "nickname": None,
            "anything": object,
        }
        point = Point(2, 3)
        manager.metadata.set(conn, "point", point)
        assert manager.metadata.get(conn, "point") is point

    async def test_what_does_not_fit_is_rejected_with_every_reason(
        self, manager: ConnectionManager, conn: Connection, msgspec: Any
    ) -> None:
        manager.metadata.declare("role", Literal["admin", "user"])
        manager.metadata.declare("profile", Profile)
        manager.metadata.declare("seats", int | None, strict=False)
        asked: list[str] = []
        manager.metadata.add_validator(lambda key, _: asked.append(key))
        with pytest.raises(MetadataRejected) as caught:
            manager.metadata.update(
                conn, {"role": "root", "profile": {"age": "1", "name": "x"}, "fine": 1, "seats": "null"}
            )
        assert [(problem.key, problem.reason) for problem in caught.value.problems] == [
            ("role", "Invalid enum value 'root'"),
            ("profile", "Expected `int`, got `str` - at `$.age`"),
            ("seats", "None is written as None"),
        ]
        assert isinstance(caught.value.problems[0].error, msgspec.ValidationError)
        assert asked == ["fine"]  # a wrong type is a last word
        assert (dict(conn.metadata), conn.version) == ({}, 0)

    async def test_declarations_can_be_taken_back(self, manager: ConnectionManager, conn: Connection) -> None:
        take_back = manager.metadata.declare("role", int)
        with pytest.raises(MetadataRejected):
            manager.metadata.set(conn, "role", "x")
        take_back()
        manager.metadata.set(conn, "role", "x")

    async def test_what_is_no_type_is_found_at_once(self, manager: ConnectionManager) -> None:
        with pytest.raises(TypeError, match="not supported"):
            manager.metadata.declare("role", 5)

    async def test_without_msgspec(self, manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "msgspec", None)
        monkeypatch.delitem(sys.modules, "wsfast.schema", raising=False)
        with pytest.raises(ImportError) as caught:
            manager.metadata.declare("role", int)
        assert str(caught.value) == "declared types need msgspec; try: pip install 'wsfast[metadata]'"


@pytest.mark.skipif(GIL_IS_OFF, reason="msgspec has no build for this interpreter")
async def test_the_page_of_the_documentation_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metadata.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    async with names["manager"] as manager, manager.attach(FakeLink(), "c-17", groups=["room:1"]) as names["conn"]:
        for block in others:
            code = compile(block, "docs/metadata.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            waits = eval(code, names)
            if waits is not None:
                await waits
        await manager.events.join()
    printed = capsys.readouterr().out
    assert "role Invalid enum value 'root' Invalid enum value 'root'\nseats must be 0 or more" in printed
    assert "1 ()\n" in printed
    assert manager.stats()["metadata_notifier_errors"] == 0


async def test_an_opened_connection_may_be_given_metadata_by_a_subscriber(manager: ConnectionManager) -> None:
    manager.on(ConnectionOpened, lambda event: manager.metadata.set(event.conn, "k", 1))
    async with manager.attach(FakeLink()) as conn:
        assert dict(conn.metadata) == {"k": 1}
