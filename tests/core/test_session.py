"""Sessions, and the protocol of docs/resume.md: each rule by itself, and all over a network that breaks anywhere."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.core.resume_world import TAKEN_OVER, Client, Close, Pipe, Thief, Wire, World
from wsfast.errors import BadHandshake, InvalidSetting
from wsfast.session import (
    PROTOCOL,
    READY,
    SESSIONS,
    ClientSession,
    Hello,
    Resumed,
    Session,
    SessionPolicy,
    Sessions,
    Welcome,
    inner_offers,
    is_ready,
    offers,
    read_hello,
    read_welcome,
    split_subprotocol,
    with_protocol,
)

NAN, INF = math.nan, math.inf
MOST = 2**53 - 1
POLICY = SessionPolicy(grace_s=10.0, lifetime_s=60.0, max_away=3)

counts = st.integers(0, MOST)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
seconds = st.floats(0, 1e9)


# ---- the subprotocol -------------------------------------------------------------------------------------------------


class TestSubprotocols:
    def test_what_a_client_offers(self) -> None:
        assert offers() == ["wsfast.1"] == [PROTOCOL]
        both = ["wsfast.1+chat.v2", "wsfast.1+chat.v1", "chat.v2", "chat.v1"]
        assert offers(["chat.v2", "chat.v1"]) == offers(iter(["chat.v2", "chat.v1"])) == both

    @pytest.mark.parametrize(
        ("subprotocol", "speaks", "name"),
        [
            (None, False, None),
            ("wsfast.1", True, None),
            ("wsfast.1+chat", True, "chat"),
            ("wsfast.1+a+b", True, "a+b"),
            ("wsfast.1+wsfast.1", True, "wsfast.1"),
            ("chat", False, "chat"),
            ("wsfast.10", False, "wsfast.10"),
            ("wsfast.10+chat", False, "wsfast.10+chat"),
            ("wsfast.2+chat", False, "wsfast.2+chat"),
            ("WSFAST.1", False, "WSFAST.1"),
            ("chat+wsfast.1", False, "chat+wsfast.1"),
            ("", False, ""),
        ],
    )
    def test_what_was_agreed_on(self, subprotocol: str | None, speaks: bool, name: str | None) -> None:
        assert split_subprotocol(subprotocol) == (speaks, name)
        if speaks:
            assert with_protocol(name) == subprotocol

    @pytest.mark.parametrize(
        ("offered", "inner"),
        [
            ([], None),
            (["chat"], None),
            (["wsfast.10", "x+wsfast.1"], None),
            (["wsfast.1"], []),
            (["chat", "wsfast.1"], []),
            (["wsfast.1", "wsfast.1+chat"], ["chat"]),
            (["b", "wsfast.1+b", "a", "wsfast.1+a", "c"], ["b", "a"]),
        ],
    )
    def test_what_a_server_chooses_among(self, offered: list[str], inner: list[str] | None) -> None:
        assert inner_offers(offered) == inner

    @given(st.lists(st.text("wsfat.1+-", min_size=1, max_size=12), max_size=5))
    def test_a_server_sees_what_a_client_wants(self, names: list[str]) -> None:
        if not any(split_subprotocol(name)[0] for name in names):
            assert inner_offers(offers(names)) == names


# ---- frames ----------------------------------------------------------------------------------------------------------


def frame(kind: str, **fields: Any) -> str:
    return json.dumps({"wsfast": kind, **fields})


def refused(call: Callable[[], object]) -> str:
    """Why, in a text that fits into the reason of a close frame (RFC 6455, 5.5)."""
    with pytest.raises(BadHandshake) as caught:
        call()
    assert len(str(caught.value).encode()) <= 123
    return str(caught.value)


READERS: dict[str, Callable[[str | bytes], object]] = {"hello": read_hello, "welcome": read_welcome}
GOOD = {"hello": frame("hello"), "welcome": frame("welcome", client_id="a", token="t", resumed=False)}
WELCOME = {"client_id": "a", "token": "t", "resumed": True}

BAD_COUNTS = [-1, MOST + 1, 2**63, 10**400, 1.0, 0.5, 1e3, NAN, INF, -INF, True, False, "1", None, [1], {}]
BAD_SECONDS = [-1, -0.001, 1e9 + 1, 10**400, NAN, INF, -INF, True, False, "1", [1], {}]


class TestFrames:
    def test_the_fields_are_those_of_the_page(self) -> None:
        assert json.loads(str(Hello())) == {"wsfast": "hello"}
        # A count without a session means nothing.
        assert json.loads(str(Hello(None, 5, 2))) == {"wsfast": "hello"}
        assert json.loads(str(Hello("t", 5, 2))) == {"wsfast": "hello", "token": "t", "received": 5, "attempt": 2}
        assert json.loads(str(Welcome("a", "t", True, 7, 180.0, 55.0))) == {
            "wsfast": "welcome",
            "client_id": "a",
            "token": "t",
            "resumed": True,
            "received": 7,
            "grace_s": 180.0,
            "spread_s": 55.0,
        }
        assert json.loads(READY) == {"wsfast": "ready"}

    @given(texts, counts, counts)
    def test_hellos_are_read_as_they_were_written(self, token: str, received: int, attempt: int) -> None:
        assert read_hello(str(Hello(token, received, attempt))) == (token, received, attempt)

    @given(st.builds(Welcome, texts, texts, st.booleans(), counts, seconds, st.none() | seconds))
    def test_welcomes_are_read_as_they_were_written(self, welcome: Welcome) -> None:
        assert read_welcome(str(welcome)) == welcome

    def test_what_is_absent_or_null(self) -> None:
        assert read_hello(frame("hello")) == read_hello(frame("hello", token=None)) == (None, 0, 0)
        bare = {"client_id": "a", "resumed": False}
        expected = ("a", None, False, 0, 0.0, None)
        assert read_welcome(frame("welcome", **bare)) == expected
        assert read_welcome(frame("welcome", **bare, token=None, grace_s=None, spread_s=None)) == expected

    def test_other_fields_are_ignored(self) -> None:
        more = {"version": 2, "é": [{"wsfast": "ready"}], "Token": 5, "": None}
        assert read_hello(frame("hello", token="t", received=1, attempt=1, **more)) == ("t", 1, 1)
        assert read_welcome(frame("welcome", **WELCOME, **more)) == ("a", "t", True, 0, 0.0, None)
        assert is_ready(frame("ready", **more))

    def test_of_a_field_that_is_there_twice_the_last_counts(self) -> None:
        assert read_hello('{"wsfast": "ready", "token": 5, "wsfast": "hello", "token": "t"}').token == "t"

    @pytest.mark.parametrize("kind", READERS)
    @pytest.mark.parametrize(
        "message",
        [
            "",
            " ",
            "hello",
            "5",
            "null",
            "true",
            '"hello"',
            '"wsfast"',
            "[]",
            '["wsfast"]',
            "{}",
            '{"wsfast": null}',
            '{"wsfast": 1}',
            '{"wsfast": true}',
            '{"wsfast": ["KIND"]}',
            '{"wsfast": {"KIND": 1}}',
            '{"wsfast": "KINDS"}',
            '{"wsfast": " KIND"}',
            '{"wsfast": "ready"}',
            '{"WSFAST": "KIND"}',
            '[{"wsfast": "KIND"}]',
            '{"wsfast": "KIND"',
            '{"wsfast": "KIND"} {}',
            '{"wsfast": "KIND",}',
            "{'wsfast': 'KIND'}",
            '\ufeff{"wsfast": "KIND"}',
            '{"wsfast": "KIND", "x": "\n"}',
            '{"wsfast": "KIND", "x": -}',
            "\0",
            "\ud800",
            "[" * 4096,
            '{"":' * 1024,
            '{"wsfast": "KIND", "x": ' + "[" * 4000,
            "9" * 4096,
        ],
    )
    def test_what_is_no_frame_is_refused(self, kind: str, message: str) -> None:
        refused(lambda: READERS[kind](message.replace("KIND", kind)))
        assert not is_ready(message.replace("KIND", kind)) or message == READY

    @pytest.mark.parametrize("kind", READERS)
    def test_each_frame_has_its_place(self, kind: str) -> None:
        others = {*GOOD.values(), READY} - {GOOD[kind]}
        for other in others:
            assert refused(lambda other=other: READERS[kind](other)) == f'{{"wsfast": "{kind}"}} must come first'
        assert not is_ready(GOOD[kind])

    @pytest.mark.parametrize("kind", READERS)
    def test_binary_messages_are_refused(self, kind: str) -> None:
        assert "binary" in refused(lambda: READERS[kind](GOOD[kind].encode()))
        assert not is_ready(READY.encode())

    @pytest.mark.parametrize("kind", READERS)
    def test_frames_have_no_more_than_4096_characters(self, kind: str) -> None:
        for padding in (" ", "\n"):
            assert READERS[kind](GOOD[kind].ljust(4096, padding)) == READERS[kind](GOOD[kind])
            assert "4096" in refused(lambda padding=padding: READERS[kind](GOOD[kind].ljust(4097, padding)))
        assert is_ready(READY.ljust(4096))
        assert not is_ready(READY.ljust(4097))
        assert not is_ready(READY.ljust(10**6))

    def test_nested_values_are_ignored_or_refused_but_never_fatal(self) -> None:
        for levels in range(50, 2001, 50):
            try:
                assert read_hello(f'{{"wsfast": "hello", "x": {"[" * levels}{"]" * levels}}}') == Hello()
            except BadHandshake:
                assert levels > 100

    @pytest.mark.parametrize("client_id", ["\0" * 256, "é" * 128, "字" * 85, "😀" * 64, '"' * 256, "\\" * 256])
    def test_what_a_server_says_always_fits(self, client_id: str) -> None:
        session = Sessions(SESSIONS, Random(1).randbytes).begin(0.0)
        welcome = Welcome(client_id, session.token, True, MOST, 1e9 / 3, 1e9 / 7)
        assert read_welcome(str(welcome)) == welcome
        assert read_hello(str(Hello(session.token, MOST, MOST))) == (session.token, MOST, MOST)

    @pytest.mark.parametrize("name", ["received", "attempt"])
    def test_counts_go_from_0_to_what_javascript_counts_exactly(self, name: str) -> None:
        for count in (0, 1, MOST):
            assert getattr(read_hello(frame("hello", token="t", **{name: count})), name) == count
        assert read_welcome(frame("welcome", **WELCOME, received=MOST)).received == MOST

    @pytest.mark.parametrize("count", BAD_COUNTS, ids=repr)
    def test_other_counts_are_refused(self, count: Any) -> None:
        for name in ("received", "attempt"):
            assert refused(lambda name=name: read_hello(frame("hello", **{name: count}))) == (
                f"{name} must be a whole number from 0 to 2**53 - 1"
            )
        assert "received" in refused(lambda: read_welcome(frame("welcome", **WELCOME, received=count)))

    @pytest.mark.parametrize("number", ["1e0", "1.0", "-0.5", "1e400", "9007199254740993.0", "0x10", "01", "+1", "١"])
    def test_whole_numbers_are_written_as_such(self, number: str) -> None:
        refused(lambda: read_hello(f'{{"wsfast": "hello", "received": {number}}}'))

    @pytest.mark.parametrize("name", ["grace_s", "spread_s"])
    def test_seconds(self, name: str) -> None:
        for value in (0, 1, 0.0, 1e-9, 55.5, 1e9, 10**9):
            read = getattr(read_welcome(frame("welcome", **WELCOME, **{name: value})), name)
            assert read == value
            assert type(read) is float

    @pytest.mark.parametrize("name", ["grace_s", "spread_s"])
    @pytest.mark.parametrize("value", BAD_SECONDS, ids=repr)
    def test_other_seconds_are_refused(self, name: str, value: Any) -> None:
        assert name in refused(lambda: read_welcome(frame("welcome", **WELCOME, **{name: value})))

    @pytest.mark.parametrize("token", [0, 1, True, False, 1.5, NAN, [], ["t"], {}, {"t": 1}], ids=repr)
    def test_a_token_is_a_string(self, token: Any) -> None:
        assert "token" in refused(lambda: read_hello(frame("hello", token=token)))
        assert "token" in refused(lambda: read_welcome(frame("welcome", client_id="a", resumed=False, token=token)))

    @pytest.mark.parametrize(
        "fields",
        [
            {"client_id": None},
            {"client_id": 5},
            {"client_id": ["a"]},
            {"resumed": None},
            {"resumed": 1},
            {"resumed": 0},
            {"resumed": "true"},
            {"token": None},
        ],
        ids=repr,
    )
    def test_bad_welcomes_are_refused(self, fields: dict[str, Any]) -> None:
        refused(lambda: read_welcome(frame("welcome", **{**WELCOME, **fields})))

    @pytest.mark.parametrize("missing", ["client_id", "token", "resumed"])
    def test_a_welcome_that_resumes_lacks_nothing(self, missing: str) -> None:
        refused(lambda: read_welcome(frame("welcome", **{name: WELCOME[name] for name in WELCOME if name != missing})))

    @given(texts | st.lists(st.none() | st.booleans() | st.floats() | texts, max_size=3).map(json.dumps))
    def test_anything_is_read_or_refused(self, message: str) -> None:
        for read in READERS.values():
            refused(lambda read=read: read(message))
        assert not is_ready(message)

    @given(
        st.dictionaries(
            st.sampled_from(["wsfast", "token", "received", "attempt", "client_id", "resumed", "grace_s", "spread_s"]),
            st.sampled_from(
                ["hello", "welcome", "ready", "t", 0, 1, 2**53, 0.5, -1, NAN, INF, None, True, False, [], {}]
            ),
        )
    )
    def test_any_fields_are_read_or_refused(self, fields: dict[str, Any]) -> None:
        kind = fields.get("wsfast")
        for name, read in READERS.items():
            try:
                found = read(json.dumps(fields))
            except BadHandshake:
                continue
            assert kind == name
            # What was read can be said again, and is the same.
            assert read(str(found)) == found or (isinstance(found, Hello) and found.token is None)
        assert is_ready(json.dumps(fields)) == (kind == "ready")


# ---- tokens ----------------------------------------------------------------------------------------------------------


class Bytes:
    """Random bytes that were asked for, in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self._random = Random(6)
        self.given: list[bytes] = []

    def __call__(self, nbytes: int) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else self._random.randbytes(nbytes)
        assert len(piece) == nbytes
        self.given.append(piece)
        return piece


def sessions(*pieces: bytes, policy: SessionPolicy = POLICY) -> Sessions:
    return Sessions(policy, Bytes(*pieces))


def encoded(token: bytes) -> str:
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def resume(all_sessions: Sessions, token: str, now_s: float = 0.0, attempt: int = 0) -> str:
    """Come back with a token that must be good; the next one."""
    session = all_sessions.find(token, now_s, attempt)
    assert session is not None
    all_sessions.resume(session)
    return session.token


class TestTokens:
    def test_a_token_is_16_bytes_to_look_up_and_128_random_bits(self) -> None:
        random = Bytes()
        all_sessions = Sessions(POLICY, random)
        session = all_sessions.begin(0.0)
        assert [len(piece) for piece in random.given] == [16, 16]
        assert session.token == encoded(b"".join(random.given))
        assert session.key == random.given[0]
        for number in range(3, 6):
            resume(all_sessions, session.token)
            assert [len(piece) for piece in random.given] == [16] * number
            assert session.token == encoded(session.key + random.given[-1])
            assert len(session.token) == 43

    def test_no_bit_of_a_token_is_idle(self) -> None:
        all_sessions = sessions()
        token = all_sessions.begin(0.0).token
        number = int.from_bytes(base64.urlsafe_b64decode(token + "="))
        for bit in range(256):
            assert all_sessions.find(encoded((number ^ (1 << bit)).to_bytes(32)), 0.0) is None
        assert all_sessions.find(token, 0.0) is not None

    @pytest.mark.parametrize("last", [0x00, 0x0F, 0xF0, 0xFF])
    def test_a_token_has_one_spelling(self, last: int) -> None:
        all_sessions = sessions(b"\xfb\xef\xbe\xff\xff\xff" + bytes(10), bytes(15) + bytes([last]))
        session = all_sessions.begin(0.0)
        token = session.token
        assert token.startswith("--" + "--" + "____")
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        # The last character has two bits to spare.
        assert [each for each in alphabet if all_sessions.find(token[:-1] + each, 0.0)] == [token[-1]]
        for other in (
            token.replace("-", "+"),
            token.replace("_", "/"),
            token.replace("-", "+", 1),
            token.swapcase(),
            token + "=",
            token + "==",
            token + "\n",
            token + "\0",
            "\n" + token,
            " " + token,
            token + " ",
            token[:20] + "\n" + token[20:],
            token[:20] + "." + token[20:],
            token[:20] + "=" + token[21:],
            token[:-1],
            token[1:],
            token + "A",
            token + token,
            token[:-1] + "=",
            token.replace("-", "－", 1),
            token.replace("_", "＿", 1),
            token.replace("A", "А", 1),  # Cyrillic
            "é" + token[1:],
            "\ud800" + token[1:],
        ):
            assert all_sessions.find(other, 0.0) is None
        assert all_sessions.find(token, 0.0) is session

    @pytest.mark.parametrize(
        "token",
        ["", "=", "A", "A" * 42, "A" * 43, "A" * 44, "A" * 10**6, "-" * 43, "\0" * 43, "é" * 43, "😀" * 43, "=" * 43],
    )
    def test_what_is_no_token_finds_nothing(self, token: str) -> None:
        all_sessions = sessions()
        assert all_sessions.find(token, 0.0) is None
        all_sessions.begin(0.0)
        assert all_sessions.find(token, 0.0) is None

    @given(st.text(max_size=50) | st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True))
    def test_nothing_that_is_made_up_is_found(self, token: str) -> None:
        all_sessions = sessions()
        all_sessions.begin(0.0)
        assert all_sessions.find(token, 0.0) is None

    def test_a_token_is_good_for_its_own_session(self) -> None:
        all_sessions = sessions()
        begun = [all_sessions.begin(0.0) for _ in range(50)]
        assert len({session.token for session in begun}) == 50
        for session in begun:
            assert all_sessions.find(session.token, 0.0) is session
        one, other = (base64.urlsafe_b64decode(session.token + "=") for session in begun[:2])
        assert all_sessions.find(encoded(one[:16] + other[16:]), 0.0) is None
        assert all_sessions.find(encoded(other[:16] + one[16:]), 0.0) is None
        assert all_sessions.find(encoded(one[16:] + one[:16]), 0.0) is None

    @pytest.mark.parametrize("presented", ["present", "former", "neither"])
    def test_both_secrets_are_compared_in_constant_time(self, monkeypatch: pytest.MonkeyPatch, presented: str) -> None:
        random = Bytes()
        all_sessions = Sessions(POLICY, random)
        former = all_sessions.begin(0.0).token
        present = resume(all_sessions, former)
        token = {"present": present, "former": former, "neither": encoded(random.given[0] + bytes(16))}[presented]
        compared: list[set[bytes]] = []

        class Spied(bytes):
            def __eq__(self, other: object) -> bool:
                raise AssertionError("not in constant time")

            __hash__ = bytes.__hash__

        def compare_digest(one: bytes, other: bytes) -> bool:
            compared.append({bytes(one), bytes(other)})
            return bytes(one) == bytes(other)

        session = all_sessions.find(present, 0.0)
        assert session is not None
        session._secret, session._former = Spied(session._secret), Spied(session._former)
        monkeypatch.setattr("wsfast.session.hmac.compare_digest", compare_digest)
        assert (all_sessions.find(token, 0.0) is None) == (presented == "neither")
        secret = base64.urlsafe_b64decode(token + "=")[16:]
        assert compared == [{random.given[2], secret}, {random.given[1], secret}]

    def test_the_former_token_is_good_until_the_new_one_is_confirmed(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(0.0)
        first = session.token
        second = resume(all_sessions, first)
        assert all_sessions.find(first, 0.0) is all_sessions.find(second, 0.0) is session
        session.confirm()
        assert all_sessions.find(first, 0.0) is None
        assert all_sessions.find(second, 0.0) is session

    def test_the_former_token_is_spent_when_the_client_comes_back_with_the_new_one(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(0.0)
        first = session.token
        second = resume(all_sessions, first)
        third = resume(all_sessions, second)
        assert [all_sessions.find(token, 0.0) for token in (first, second, third)] == [None, session, session]

    def test_welcomes_can_be_lost_as_often_as_it_happens(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(0.0)
        first = session.token
        issued = [resume(all_sessions, first, attempt=attempt) for attempt in range(1, 20)]
        # Those that were overtaken are not good: one of them is in the hands of nobody, or of a thief.
        assert [all_sessions.find(token, 0.0) for token in issued] == [None] * 18 + [session]
        assert all_sessions.find(first, 0.0) is session
        session.confirm()
        assert all_sessions.find(first, 0.0) is None
        assert all_sessions.find(issued[-1], 0.0) is session

    def test_to_look_for_a_session_changes_nothing(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(0.0)
        first = session.token
        second = resume(all_sessions, first, attempt=1)
        # By somebody who is not let in.
        assert all_sessions.find(second, 0.0, 9) is session
        assert all_sessions.find(first, 0.0, 9) is session
        assert session.token == second
        # Neither the token nor the attempt was used up.
        third = resume(all_sessions, first, attempt=2)
        assert third != second
        assert all_sessions.find(first, 0.0, 3) is session

    def test_a_hello_that_was_overtaken_finds_nothing(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(0.0)
        first = session.token
        second = resume(all_sessions, first, attempt=2)
        assert [all_sessions.find(first, 0.0, attempt) for attempt in (1, 2, 3)] == [None, None, session]
        # Who does not tell cannot be overtaken, and the count is that of one token.
        assert all_sessions.find(first, 0.0) is session
        assert all_sessions.find(second, 0.0, 1) is session
        third = resume(all_sessions, second, attempt=1)
        assert [all_sessions.find(second, 0.0, attempt) for attempt in (1, 2)] == [None, session]
        session.confirm()
        assert all_sessions.find(third, 0.0, 1) is session

    def test_a_session_that_ended_is_not_found(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(0.0)
        second = resume(all_sessions, first := session.token)
        for _ in range(2):
            all_sessions.end(session)
            assert all_sessions.find(first, 0.0) is all_sessions.find(second, 0.0) is None
        assert len(all_sessions) == 0
        # Another server, or the same after a restart, knows nothing of it.
        assert sessions().find(second, 0.0) is None

    def test_a_session_counts(self) -> None:
        session = sessions().begin(5.0)
        assert (session.received, session.began_s, session.owner) == (0, 5.0, None)
        session.took()
        session.took()
        assert session.received == 2


class TestAway:
    def away(self, count: int, **settings: Any) -> tuple[Sessions, list[Session]]:
        """So many sessions, and who left at which second is its place."""
        all_sessions = sessions(policy=SessionPolicy(grace_s=10.0, **settings))
        begun = [all_sessions.begin(0.0) for _ in range(count)]
        for second, session in enumerate(begun):
            assert all_sessions.leave(session, float(second)) is None
        return all_sessions, begun

    def test_nobody_is_waited_for_at_first(self) -> None:
        all_sessions = sessions()
        assert (len(all_sessions), all_sessions.away, all_sessions.next_due_s) == (0, 0, None)
        session = all_sessions.begin(0.0)
        assert (len(all_sessions), all_sessions.away, all_sessions.next_due_s) == (1, 0, None)
        assert all_sessions.due(INF) == []
        assert all_sessions.find(session.token, 60.0) is session

    def test_clients_are_waited_for_as_long_as_the_policy_says(self) -> None:
        all_sessions, (first, second, third) = self.away(3)
        assert (len(all_sessions), all_sessions.away, all_sessions.next_due_s) == (3, 3, 10.0)
        assert all_sessions.due(9.999) == []
        assert all_sessions.due(10.0) == [first]
        assert all_sessions.due(11.5) == [first, second]
        assert all_sessions.due(INF) == [first, second, third]
        # They stay until they are ended, but their tokens are not good any more.
        assert [all_sessions.find(each.token, 11.0) for each in (first, second, third)] == [None, None, third]
        assert [all_sessions.find(each.token, 9.999) for each in (first, second, third)] == [first, second, third]
        all_sessions.end(first)
        assert (len(all_sessions), all_sessions.away, all_sessions.next_due_s) == (2, 2, 11.0)

    def test_who_is_back_is_not_waited_for(self) -> None:
        all_sessions, (first, second) = self.away(2)
        resume(all_sessions, first.token, 5.0)
        assert (len(all_sessions), all_sessions.away, all_sessions.next_due_s) == (2, 1, 11.0)
        assert all_sessions.due(100.0) == [second]
        assert all_sessions.find(first.token, 59.0) is first
        # The time begins anew when it is lost again, and it is the last in the line then.
        all_sessions.leave(first, 6.0)
        assert all_sessions.due(100.0) == [second, first]
        assert all_sessions.due(15.0) == [second]

    def test_who_is_away_already_does_not_begin_anew(self) -> None:
        all_sessions, (first, second) = self.away(2)
        assert all_sessions.leave(first, 8.0) is None
        assert (all_sessions.away, all_sessions.next_due_s) == (2, 10.0)
        assert all_sessions.due(11.0) == [first, second]

    def test_who_ended_does_not_go_away(self) -> None:
        all_sessions, (first, second) = self.away(2)
        all_sessions.end(first)
        all_sessions.end(second)
        assert all_sessions.leave(first, 3.0) is None
        assert (len(all_sessions), all_sessions.away, all_sessions.due(100.0)) == (0, 0, [])

    def test_of_too_many_the_one_that_is_away_for_longest_is_given_up(self) -> None:
        all_sessions, begun = self.away(3, max_away=3)
        late = all_sessions.begin(0.0)
        assert all_sessions.leave(late, 3.0) is begun[0]
        all_sessions.end(begun[0])
        assert all_sessions.away == 3
        resume(all_sessions, begun[1].token, 4.0)
        assert all_sessions.leave(begun[1], 5.0) is None
        assert all_sessions.leave(all_sessions.begin(0.0), 6.0) is begun[2]

    def test_with_room_for_one_the_last_one_stays(self) -> None:
        all_sessions, (first,) = self.away(1, max_away=1)
        second = all_sessions.begin(0.0)
        assert all_sessions.leave(second, 1.0) is first

    def test_a_session_has_a_lifetime(self) -> None:
        all_sessions = sessions()
        session = all_sessions.begin(1000.0)
        for now_s in (1000.0, 1030.0, 1060.0):
            resume(all_sessions, session.token, now_s)
        assert all_sessions.find(session.token, 1060.001) is None
        all_sessions.leave(session, 1055.0)
        assert all_sessions.find(session.token, 1060.0) is session
        assert all_sessions.find(session.token, 1061.0) is None

    @given(st.lists(st.tuples(st.sampled_from(["begin", "leave", "resume", "end", "due"]), st.integers(0, 5), counts)))
    def test_whatever_the_order(self, steps: list[tuple[str, int, int]]) -> None:
        all_sessions = sessions(policy=SessionPolicy(grace_s=10.0, max_away=3))
        known: list[Session] = [all_sessions.begin(0.0)]
        gone: set[Session] = set()
        due: dict[Session, float] = {}
        now_s = 0.0
        for step, pick, wait in steps:
            now_s += wait % 7
            session = known[pick % len(known)]
            if step == "begin":
                known.append(all_sessions.begin(now_s))
            elif step == "leave":
                given_up = all_sessions.leave(session, now_s)
                if session not in gone:
                    due.setdefault(session, now_s + 10.0)
                assert given_up is (min(due, key=lambda each: due[each]) if len(due) > 3 else None)
                if given_up:
                    all_sessions.end(given_up)
                    gone.add(given_up)
                    del due[given_up]
            elif step == "resume":
                is_good = session not in gone and due.get(session, INF) > now_s
                assert (all_sessions.find(session.token, now_s) is session) == is_good
                if is_good:
                    all_sessions.resume(session)
                    due.pop(session, None)
            elif step == "end":
                all_sessions.end(session)
                gone.add(session)
                due.pop(session, None)
            assert all_sessions.due(now_s) == [each for each, due_s in due.items() if due_s <= now_s]
            assert all_sessions.next_due_s == min(due.values(), default=None)
            assert (len(all_sessions), all_sessions.away) == (len(known) - len(gone), len(due))


class TestPolicy:
    def test_the_default_waits_for_longer_than_it_keeps_nothing(self) -> None:
        assert SessionPolicy() == SESSIONS
        assert SESSIONS.grace_s < SESSIONS.max_age_s
        assert SESSIONS.grace_s < SESSIONS.lifetime_s

    @pytest.mark.parametrize("name", ["grace_s", "lifetime_s", "max_age_s", "hello_timeout_s"])
    def test_seconds(self, name: str) -> None:
        for value in (0.001, 1, 1e9):
            assert getattr(SessionPolicy(**{name: value}), name) == value
        for value in (0.0, 0.00099, -1.0, 1e9 + 1, INF, -INF, NAN):
            with pytest.raises(InvalidSetting, match=f"sessions.{name} must be from 0.001 to 1e\\+09, not "):
                SessionPolicy(**{name: value})
        for value in ("1", None, [1]):
            with pytest.raises(TypeError):
                SessionPolicy(**{name: value})

    @pytest.mark.parametrize("name", ["max_away", "max_messages", "max_bytes"])
    def test_limits(self, name: str) -> None:
        for value in (1, 2**63 - 1):
            assert getattr(SessionPolicy(**{name: value}), name) == value
        for value in (0, -1, 2**63, 1.0, 1.5, NAN, INF, "1", None):
            with pytest.raises(InvalidSetting, match=f"sessions.{name} must be a whole number from 1, not "):
                SessionPolicy(**{name: value})


# ---- the client's side -----------------------------------------------------------------------------------------------


def welcomed(**settings: Any) -> ClientSession:
    """A client that has a session."""
    session = ClientSession(**settings)
    assert session.welcomed(Welcome("a", "t")) == Resumed([], 0, 0)
    return session


def again(session: ClientSession, received: int, token: str = "u") -> Resumed:
    """It comes back, and is welcome."""
    return session.welcomed(Welcome("a", token, True, received))


class TestClientSession:
    def test_before_the_first_welcome(self) -> None:
        session = ClientSession()
        assert (session.client_id, session.token, session.received, session.sent, session.kept) == (None, None, 0, 0, 0)
        assert read_hello(session.hello()) == Hello()

    def test_the_first_welcome(self) -> None:
        session = welcomed()
        assert (session.client_id, session.token, session.received, session.sent, session.kept) == ("a", "t", 0, 0, 0)

    def test_hellos_tell_the_token_the_count_and_the_attempt(self) -> None:
        session = welcomed()
        session.took()
        session.took()
        assert [read_hello(session.hello()) for _ in range(3)] == [("t", 2, 1), ("t", 2, 2), ("t", 2, 3)]
        again(session, 0)
        assert read_hello(session.hello()) == ("u", 2, 1)
        session.welcomed(Welcome("b", "v"))
        assert read_hello(session.hello()) == ("v", 0, 1)

    def test_what_the_server_has_not_got_is_sent_again(self) -> None:
        session = welcomed()
        for message in ("a", b"b", "é", "", b""):
            session.sending(message)
        assert again(session, 2) == Resumed(["é", "", b""], 0, 0)
        assert (session.sent, session.kept) == (5, 3)
        # They are kept for the next time.
        assert again(session, 2) == Resumed(["é", "", b""], 0, 0)
        session.sending("f")
        assert again(session, 4) == Resumed([b"", "f"], 0, 0)
        assert again(session, 6) == Resumed([], 0, 0)
        assert (session.sent, session.kept) == (6, 0)

    def test_what_is_not_kept_is_told_and_not_counted(self) -> None:
        session = welcomed(max_kept=2)
        for message in "abcde":
            session.sending(message)
        assert again(session, 1) == Resumed(["d", "e"], 2, 0)
        assert (session.sent, session.kept) == (3, 2)
        # Half of what was sent again arrived, and more was sent: "e" and "f" push nothing out that has arrived.
        session.sending("f")
        session.sending("g")
        assert again(session, 2) == Resumed(["f", "g"], 1, 0)
        assert again(session, 4) == Resumed([], 0, 0)

    def test_a_client_may_keep_nothing(self) -> None:
        session = welcomed(max_kept=0)
        for _ in range(3):
            session.sending("a")
        assert session.kept == 0
        assert again(session, 1) == Resumed([], 2, 0)
        assert session.sent == 1

    def test_bytes_are_counted_as_they_go_over_the_wire(self) -> None:
        session = welcomed(max_kept_bytes=6)
        for message in ("字", "é", b"f"):
            session.sending(message)
        assert session.kept == 3
        session.sending("")
        assert session.kept == 4
        session.sending("g")
        assert again(session, 1) == Resumed(["é", b"f", "", "g"], 0, 0)
        session.sending("1234567")
        assert session.kept == 0
        # The room is there again.
        for message in ("123", "456"):
            session.sending(message)
        assert session.kept == 2
        session.forget()
        session.welcomed(Welcome("a", "t"))
        session.sending("123456")
        assert session.kept == 1

    def test_a_text_that_cannot_be_sent_changes_nothing(self) -> None:
        session = welcomed()
        with pytest.raises(UnicodeEncodeError):
            session.sending("\ud800")
        assert (session.sent, session.kept) == (0, 0)

    def test_a_new_session_begins_with_nothing(self) -> None:
        session = welcomed()
        session.took()
        for message in "abc":
            session.sending(message)
        assert session.welcomed(Welcome("b", "v")) == Resumed([], 0, 3)
        assert (session.client_id, session.token, session.received, session.sent, session.kept) == ("b", "v", 0, 0, 0)
        assert again(session, 0) == Resumed([], 0, 0)

    @pytest.mark.parametrize("max_kept", [0, 1, 1000])
    def test_all_are_unconfirmed_that_were_sent_after_the_last_count(self, max_kept: int) -> None:
        session = welcomed(max_kept=max_kept)
        for message in "abcde":
            session.sending(message)
        lost = again(session, 2).lost
        session.sending("f")
        assert session.forget() == 4 - lost
        assert session.forget() == 0

    def test_without_a_session_nothing_is_kept(self) -> None:
        session = ClientSession()
        session.welcomed(Welcome("a", None))
        session.took()
        session.sending("a")
        assert session.kept == 0
        assert read_hello(session.hello()) == Hello()
        assert session.welcomed(Welcome("a", "t")) == Resumed([], 0, 1)
        assert (session.received, session.sent) == (0, 0)
        session.sending("b")
        assert session.kept == 1

    @pytest.mark.parametrize("received", [0, 1, 5, MOST])
    def test_a_server_that_resumes_what_there_was_not_is_refused(self, received: int) -> None:
        session = welcomed()
        for message in "abc":
            session.sending(message)
        again(session, 2)
        refused(lambda: again(session, received, "v"))
        assert (session.token, session.sent, session.kept) == ("u", 3, 1)
        assert again(session, 3, "v") == Resumed([], 0, 0)

    def test_without_a_token_nothing_is_resumed(self) -> None:
        session = ClientSession()
        refused(lambda: again(session, 0))
        assert (session.client_id, session.token) == (None, None)
        session = welcomed()
        session.forget()
        refused(lambda: again(session, 0))

    @pytest.mark.parametrize("value", [-1, 1.5, NAN, INF, "1", None])
    def test_settings_out_of_bounds_are_refused(self, value: Any) -> None:
        for name in ("max_kept", "max_kept_bytes"):
            with pytest.raises(InvalidSetting, match=f"^{name} must be a whole number from 0, not "):
                ClientSession(**{name: value})

    @given(
        st.integers(0, 6),
        st.integers(0, 12),
        st.lists(st.integers(0, 9) | st.text("a字", max_size=6) | st.binary(max_size=6), max_size=40),
    )
    def test_against_a_list(self, max_kept: int, max_kept_bytes: int, steps: list[int | str | bytes]) -> None:
        """Numbers are comings back, at which the server has that many of what it had not."""
        session = welcomed(max_kept=max_kept, max_kept_bytes=max_kept_bytes)
        got = 0
        owed: list[str | bytes] = []
        kept: list[str | bytes] = []
        for step in steps:
            if not isinstance(step, int):
                session.sending(step)
                owed.append(step)
                kept.append(step)
                while len(kept) > max_kept or sum(len(_bytes(each)) for each in kept) > max_kept_bytes:
                    kept.pop(0)
            else:
                arrived = min(step, len(owed))
                got += arrived
                del owed[:arrived]
                kept = kept[max(0, len(kept) - len(owed)) :]
                assert again(session, got) == Resumed(kept, len(owed) - len(kept), 0)
                owed = list(kept)
            assert (session.kept, session.sent) == (len(kept), got + len(owed))
        assert session.forget() == len(owed)


def _bytes(message: str | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.encode()


# ---- both sides ------------------------------------------------------------------------------------------------------


class TestNetwork:
    @given(st.lists(texts | st.binary(max_size=40) | st.integers(1000, 4999).map(Close)), st.lists(st.integers(1, 50)))
    def test_what_is_written_arrives_whole_and_in_order(self, frames: list[Any], pieces: list[int]) -> None:
        pipe = Pipe()
        for each in frames:
            pipe.write(each)
        assert [each for piece in [*pieces, 10_000] for each in pipe.arrive(piece)] == frames

    @given(st.integers(0, 20), st.integers(0, 20))
    def test_what_is_cut_off_does_not_arrive(self, before: int, after: int) -> None:
        pipe = Pipe()
        for each in ("1234567", "1234567"):
            pipe.write(each)
        arrived = pipe.arrive(before)
        pipe.cut(after)
        pipe.write("never")
        assert arrived + pipe.arrive(100) == ["1234567"] * (min(20, before + after) // 10)


def connected(**settings: Any) -> tuple[World, Client]:
    """A world with one client that is welcome."""
    world = World(POLICY, **settings)
    (client,) = world.clients
    client.connect().settle()
    return world, client


def send(world: World, client: Client, up: int = 0, down: int = 0) -> None:
    """So many messages each way."""
    for _ in range(up):
        client.sends(world.message(client.name))
    for _ in range(down):
        assert client.life is not None
        world.server.sends(client.life, world.message("s"))


class TestStories:
    """What the machine below finds now and then, each for itself."""

    def broken(self, up: int, down: int, is_noticed: bool) -> tuple[World, Wire]:
        """Messages were on their way when a connection broke, and so they were when the next one broke that early."""
        world, client = connected()
        send(world, client, up=2, down=2)
        assert client.wire is not None
        client.wire.arrive_up(8)
        client.wire.arrive_down(8)
        client.wire.cut()
        if is_noticed:
            world.server.loses(client.wire)
        send(world, client, up=1, down=1)
        wire = client.connect()
        send(world, client, up=1, down=1)
        for _ in ("hello and welcome", "ready and the rest"):
            arrive, up = max(0, up), up - len(wire.up)
            wire.arrive_up(arrive)
            arrive, down = max(0, down), down - len(wire.down)
            wire.arrive_down(arrive)
        world.check()
        return world, wire

    def test_a_connection_may_break_after_any_byte(self) -> None:
        world, wire = self.broken(10_000, 10_000, True)
        (client,) = world.clients
        assert client.life is not None
        assert (client.resumed, len(client.given), len(client.life.given)) == (1, 4, 4)
        # Of one way each byte, of the other the ends of frames and what is in the middle of them.
        up, down = wire.up.ends, wire.down.ends
        breaks = {(each, other - back) for each in range(up[-1] + 1) for other in (1, *down) for back in (0, 1)}
        breaks |= {(other - back, each) for each in range(down[-1] + 1) for other in (1, *up) for back in (0, 1)}
        for number, (each_up, each_down) in enumerate(sorted(breaks)):
            world, _ = self.broken(each_up, each_down, is_noticed=number % 2 == 0)
            world.settle()
            assert (world.clients[0].fresh, world.clients[0].lost) == (1, 0)

    @pytest.mark.parametrize("arrived", ["hello", "welcome", "broken", "ready"])
    def test_a_hello_that_was_overtaken_takes_nothing_over(self, arrived: str) -> None:
        world, client = connected()
        send(world, client, up=1, down=1)
        late = client.connect()
        wire = client.connect()
        wire.arrive_up(10_000)
        if arrived != "hello":
            wire.arrive_down(10_000)
        if arrived == "broken":
            # What the client has is the new token, which the server does not know.
            wire.cut()
        if arrived == "ready":
            wire.arrive_up(10_000)
        late.arrive_up(10_000)
        assert wire.is_open
        wire.settle()
        late.settle()
        assert client.wire is wire
        world.settle()
        assert client.fresh == 1

    def test_a_welcome_that_was_overtaken_is_not_heard(self) -> None:
        world, client = connected()
        first = client.connect()
        first.arrive_up(10_000)
        second = client.connect()
        first.arrive_down(10_000)
        second.arrive_up(10_000)
        # The token of the first welcome is not good any more.
        assert first.down.arrive(10_000) == [Close(TAKEN_OVER)]
        second.cut()
        world.settle()
        assert (client.fresh, client.resumed) == (1, 1)

    def test_ready_and_the_loss_of_a_connection_that_was_taken_over_count_for_nothing(self) -> None:
        world, client = connected()
        first = client.connect()
        first.arrive_up(10_000)
        first.arrive_down(10_000)
        second = client.connect()
        second.arrive_up(10_000)
        # The client has the token of the first welcome; if this ready confirmed that of the second one, it had none.
        first.arrive_up(10_000)
        world.server.loses(first)
        second.cut()
        world.server.check()
        world.settle()
        assert client.fresh == 1

    def test_welcomes_and_readies_may_be_lost_again_and_again(self) -> None:
        world, client = connected()
        for lost in ("welcome", "welcome", "ready", "welcome", "ready", "ready", "welcome", "welcome"):
            send(world, client, up=1, down=1)
            wire = client.connect()
            wire.arrive_up(10_000)
            if lost == "ready":
                wire.arrive_down(10_000)
            wire.cut()
            world.check()
        world.settle()
        assert (client.fresh, client.lost) == (1, 0)

    @pytest.mark.parametrize("is_known", [True, False])
    @pytest.mark.parametrize("stolen", ["former", "present"])
    def test_a_thief_who_does_not_confirm(self, is_known: bool, stolen: str) -> None:
        world, client = connected()
        send(world, client, up=1, down=1)
        wire = client.connect()
        wire.arrive_up(10_000)
        wire.cut()
        former, present = list(world.tokens)[-2:]
        token = former if stolen == "former" else present
        Thief(world, is_known, Hello(token), []).wire.settle()
        world.settle()
        # Who comes with the token that the client has not even got is taken for the client, unless he is known.
        assert client.fresh == (2 if stolen == "present" and not is_known else 1)

    def test_a_thief_who_confirms_is_the_client_from_then_on(self) -> None:
        world, client = connected()
        send(world, client, up=1, down=1)
        assert client.life is not None
        (token,) = world.tokens
        thief = Thief(world, False, Hello(token), [READY, "thief:1"])
        thief.wire.settle()
        stolen = client.life
        client.wire.settle()
        assert client.wire is None
        world.settle()
        assert client.fresh == 2
        assert stolen.given == ["c0:1", "thief:1"] or stolen.given == ["thief:1"]

    def test_what_was_sent_again_is_cut_off_half_way(self) -> None:
        world, client = connected(max_kept=(4,))
        assert client.wire is not None
        client.wire.cut()
        send(world, client, up=6)
        wire = client.connect()
        wire.arrive_up(10_000)
        wire.arrive_down(10_000)
        assert client.lost == 2
        # Ready, and one and a half messages.
        wire.arrive_up(len(wire.up) - 15)
        send(world, client, up=4)
        world.settle()
        assert client.life is not None
        assert client.lost == 2 + 3
        assert client.life.given == ["c0:3", "c0:7", "c0:8", "c0:9", "c0:10"]

    def test_a_count_that_the_server_has_not_sent_ends_the_session(self) -> None:
        world, client = connected()
        (token,) = world.tokens
        Thief(world, False, Hello(token, 1), []).wire.settle()
        assert client.life is not None
        assert client.life.ended == "overflow"
        client.wire.settle()
        world.settle()
        assert client.fresh == 2


picks = st.integers(0, 7)
nbytes = st.just(10_000) | st.integers(0, 130)
attempts = st.sampled_from([0, 1, 2, 9])
# Now and then, as all that was going on is over then.
rarely = st.integers(0, 5)


class Resume(RuleBasedStateMachine):
    """All that can happen to two clients of a server."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(SessionPolicy())

    @initialize(
        retention=st.sampled_from([3, 1000]),
        max_kept=st.tuples(*[st.sampled_from([0, 2, 1000])] * 2),
        max_away=st.sampled_from([1, 1000]),
    )
    def start(self, retention: int, max_kept: tuple[int, ...], max_away: int) -> None:
        policy = SessionPolicy(grace_s=10.0, lifetime_s=60.0, max_away=max_away)
        self.world = World(policy, retention=retention, max_kept=max_kept)

    def client(self, pick: int) -> Client:
        return self.world.clients[pick % len(self.world.clients)]

    def wire(self, pick: int, way: str = "") -> Wire:
        """One of the latest, on which there is something under way; 0 is the latest."""
        wires = [wire for wire in self.world.wires if not way or getattr(wire, way)]
        return wires[-1 - pick % len(wires)]

    @rule(pick=picks, arrives=st.sampled_from(["nothing", "hello", "welcome", "all"]), is_overtaking=st.booleans())
    def client_connects(self, pick: int, arrives: str, is_overtaking: bool) -> None:
        former = self.client(pick).wire
        wire = self.client(pick).connect()
        if arrives != "nothing":
            wire.arrive_up(len(wire.up))
        if arrives in ("welcome", "all"):
            wire.arrive_down(len(wire.down))
        if is_overtaking and former is not None:
            former.arrive_up(len(former.up))
        if arrives == "all":
            wire.settle()

    @rule(pick=picks, count=st.integers(1, 4))
    def client_sends(self, pick: int, count: int) -> None:
        client = self.client(pick)
        for _ in range(count):
            client.sends(self.world.message(client.name))

    @precondition(lambda self: self.world.server.lives)
    @rule(pick=picks, count=st.integers(1, 4))
    def server_sends_to_one(self, pick: int, count: int) -> None:
        lives = self.world.server.lives
        for _ in range(count):
            self.world.server.sends(lives[-1 - pick % len(lives)], self.world.message("s"))

    @rule()
    def server_sends_to_all(self) -> None:
        message = self.world.message("s")
        for life in self.world.server.lives:
            self.world.server.sends(life, message)

    @precondition(lambda self: any(wire.up for wire in self.world.wires))
    @rule(pick=picks, count=nbytes)
    def bytes_arrive_at_the_server(self, pick: int, count: int) -> None:
        self.wire(pick, "up").arrive_up(count)

    @precondition(lambda self: any(wire.down for wire in self.world.wires))
    @rule(pick=picks, count=nbytes)
    def bytes_arrive_at_the_client(self, pick: int, count: int) -> None:
        self.wire(pick, "down").arrive_down(count)

    @precondition(lambda self: self.world.wires)
    @rule(pick=picks, up=nbytes, down=nbytes)
    def wire_is_cut(self, pick: int, up: int, down: int) -> None:
        self.wire(pick).cut(up, down)

    @rule(pick=picks)
    def client_finds_out(self, pick: int) -> None:
        self.client(pick).loses()

    @precondition(lambda self: self.world.wires)
    @rule(pick=picks)
    def server_finds_out(self, pick: int) -> None:
        self.world.server.loses(self.wire(pick))

    @rule(pick=picks, up=nbytes, down=nbytes)
    def both_find_out(self, pick: int, up: int, down: int) -> None:
        client = self.client(pick)
        if wire := client.wire:
            wire.arrive_up(up)
            wire.arrive_down(down)
            wire.cut()
            self.world.server.loses(wire)
        client.loses()

    @precondition(lambda self: any(client.old_tokens for client in self.world.clients))
    @rule(pick=picks, which=picks, attempt=attempts)
    def client_presents_a_token_that_it_once_had(self, pick: int, which: int, attempt: int) -> None:
        client = self.client(pick)
        if client.old_tokens:
            token = client.old_tokens[-1 - which % len(client.old_tokens)]
            client.connect(Hello(token, client.session.received, attempt))

    @precondition(lambda self: self.world.tokens)
    @rule(
        which=picks,
        received=st.none() | st.sampled_from([0, 2**53 - 1]),
        attempt=attempts,
        then=st.sampled_from([[], [READY], [READY, "thief:1", "thief:2"], ["thief:3", READY]]),
        is_known=st.booleans(),
        sure=rarely,
    )
    def thief_presents_a_token(
        self, which: int, received: int | None, attempt: int, then: list[str], is_known: bool, sure: int
    ) -> None:
        if sure:
            return
        token = list(self.world.tokens)[-1 - which % len(self.world.tokens)]
        sent = len(self.world.tokens[token].sent) if received is None else received
        Thief(self.world, is_known, Hello(token, sent, attempt), then).wire.settle()

    @rule(pick=picks, sure=rarely)
    def client_closes(self, pick: int, sure: int) -> None:
        if not sure:
            self.client(pick).closes()

    @precondition(lambda self: any(life.wire for life in self.world.server.lives))
    @rule(pick=picks, sure=rarely)
    def server_closes(self, pick: int, sure: int) -> None:
        lives = [life for life in self.world.server.lives if life.wire]
        if not sure:
            self.world.server.closes(lives[pick % len(lives)], 1000)

    @rule(seconds=st.sampled_from([0.5, 9.0, 10.0, 31.0]), is_noticed=st.booleans())
    def time_passes(self, seconds: float, is_noticed: bool) -> None:
        self.world.now_s += seconds
        if is_noticed:
            self.world.server.tick()

    @rule(sure=rarely)
    def server_restarts(self, sure: int) -> None:
        if not sure:
            self.world.restart()

    @invariant()
    def nothing_is_lost_doubled_or_out_of_order(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check()


def test_clients_miss_nothing_or_are_told() -> None:
    run_state_machine_as_test(Resume)
