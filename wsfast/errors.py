"""The exceptions of wsfast, in one shallow tree, by whose fault they are.

::

    WsfastError
    ├─ UsageError                  the caller's fault; never worth a retry
    │  ├─ InvalidName              also ValueError: an id or name is empty, too long, or has no UTF-8 form
    │  ├─ InvalidSetting           also ValueError: a number or choice outside what is allowed
    │  ├─ LimitExceeded            also ValueError: a documented limit of the registry would be passed
    │  ├─ MessageTooBig            also ValueError: a message is longer than the limit
    │  ├─ MetadataRejected         also ValueError: a change of metadata is not acceptable; has all ``problems``
    │  ├─ VersionConflict          also RuntimeError: the metadata has changed meanwhile; has the ``current`` version
    │  ├─ UnknownConnection        also KeyError: no connection has this id
    │  ├─ DuplicateConnection      also ValueError: the id is taken
    │  ├─ ForeignRecord            also ValueError: the record belongs to another registry
    │  ├─ DetachedRecord           also RuntimeError: the record was removed from its registry
    │  ├─ WrongThread              also RuntimeError: called off the event loop's thread
    │  └─ ManagerClosed            also RuntimeError: the manager is closed, or was never started
    ├─ BadHandshake                a peer does not keep to the protocol of resume (docs/resume.md)
    ├─ ClientClosed                a client that reconnects has ended, or will not come back; has ``because``
    ├─ QueueFull                   a client that is away has as much to send as it may keep
    └─ PeerError                   the fault of one connection; has ``client_id``
       ├─ PeerClosed               the connection is closed; has ``code`` and ``reason``
       ├─ PeerTooSlow              the connection does not keep up, so a message to it was dropped
       ├─ PermissionDenied         the connection lacks permissions; has ``missing``
       └─ PeerFailed               the connection broke in another way; has ``cause``

A plain wrong type is a ``TypeError`` and not part of this tree. Each class keeps its facts as fields and
makes its text from them, so that the native core and the reference cannot word the same fault differently.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "BadHandshake",
    "ClientClosed",
    "DetachedRecord",
    "DuplicateConnection",
    "ForeignRecord",
    "InvalidName",
    "InvalidSetting",
    "LimitExceeded",
    "ManagerClosed",
    "MessageTooBig",
    "MetadataRejected",
    "PeerClosed",
    "PeerError",
    "PeerFailed",
    "PeerTooSlow",
    "PermissionDenied",
    "Problem",
    "QueueFull",
    "UnknownConnection",
    "UsageError",
    "VersionConflict",
    "WrongThread",
    "WsfastError",
]

# A hostile id may be megabytes long: what goes into a message, and from there into a log, is cut here.
_SHOWN_CHARACTERS = 64
_SHOWN_PROBLEMS = 8


def _shown(value: object) -> str:
    """``repr`` of *value*, cut to a length that fits a log line."""
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        return f"{value[:_SHOWN_CHARACTERS]!r}..."
    text = repr(value)
    return text if len(text) <= 2 * _SHOWN_CHARACTERS else text[: 2 * _SHOWN_CHARACTERS] + "..."


class WsfastError(Exception):
    """Base of every exception that wsfast defines."""


class UsageError(WsfastError):
    """The caller's fault: the same call will fail again."""


class InvalidName(UsageError, ValueError):
    """An id or a name cannot be used.

    Attributes:
        kind: what it was to name: "client id", "user id", "group name", "tag key", ...
        problem: what is wrong with it, as the rest of a sentence.
    """

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(kind, problem)
        self.kind = kind
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.kind} {self.problem}"


class InvalidSetting(UsageError, ValueError):
    """A setting or argument is outside what is allowed.

    Attributes:
        name: of the setting.
        value: that was given.
        requirement: what it must be, as the rest of a sentence.
    """

    def __init__(self, name: str, value: object, requirement: str) -> None:
        super().__init__(name, value, requirement)
        self.name = name
        self.value = value
        self.requirement = requirement

    def __str__(self) -> str:
        return f"{self.name} must be {self.requirement}, not {_shown(self.value)}"


class LimitExceeded(UsageError, ValueError):
    """A limit of the registry would be passed.

    Attributes:
        what: is limited, in the plural, with its owner: "groups of one connection".
        limit: the most there may be; a setting of the registry.
    """

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(what, limit)
        self.what = what
        self.limit = limit

    def __str__(self) -> str:
        return f"too many {self.what}: the limit is {self.limit}"


class MessageTooBig(UsageError, ValueError):
    """A message is longer than the limit.

    Attributes:
        size: of the message, in bytes.
        limit: the largest size allowed, in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"a message of {self.size} bytes is over the limit of {self.limit}"


class Problem(NamedTuple):
    """One reason why a change of metadata was rejected."""

    key: str | None
    """Of the metadata; None if it is about the connection's metadata as a whole."""
    reason: str
    """As the rest of a sentence: "the value is over the limit of 16384 bytes"."""
    error: Exception | None = None
    """What a validator raised."""

    def __str__(self) -> str:
        reason = (
            self.reason if len(self.reason) <= 4 * _SHOWN_CHARACTERS else self.reason[: 4 * _SHOWN_CHARACTERS] + "..."
        )
        return reason if self.key is None else f"{_shown(self.key)}: {reason}"


class MetadataRejected(UsageError, ValueError):
    """A change of metadata is not acceptable, and nothing of it was made. Attribute: ``problems``, every reason."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        shown = "; ".join(map(str, self.problems[:_SHOWN_PROBLEMS]))
        more = len(self.problems) - _SHOWN_PROBLEMS
        return f"metadata rejected: {shown}" + (f"; and {more} more" if more > 0 else "")


class _AboutOneConnection(UsageError):
    """What the faults that name one client id share."""

    text = "{}"

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client_id = client_id

    def __str__(self) -> str:
        return self.text.format(_shown(self.client_id))


class UnknownConnection(_AboutOneConnection, KeyError):
    """No connection has this id. Attribute: ``client_id``."""

    text = "no connection {} is registered"


class DuplicateConnection(_AboutOneConnection, ValueError):
    """The id belongs to a connection that is registered already. Attribute: ``client_id``."""

    text = "connection {} is already registered"


class ForeignRecord(_AboutOneConnection, ValueError):
    """A record was passed to a registry that did not make it. Attribute: ``client_id``."""

    text = "the record of {} belongs to another registry"


class DetachedRecord(_AboutOneConnection, RuntimeError):
    """A record was changed after it had left its registry. Attribute: ``client_id``."""

    text = "the record of {} was removed from its registry"


class VersionConflict(UsageError, RuntimeError):
    """A change was made on condition of a version that the metadata is not at.

    Attributes:
        client_id: of the connection.
        expected: the version that was asked for.
        current: the version that the metadata is at.
    """

    def __init__(self, client_id: str, expected: int, current: int) -> None:
        super().__init__(client_id, expected, current)
        self.client_id = client_id
        self.expected = expected
        self.current = current

    def __str__(self) -> str:
        return f"the metadata of {_shown(self.client_id)} is at version {self.current}, not {self.expected}"


class WrongThread(UsageError, RuntimeError):
    """A call that belongs on the event loop's thread came from another one. Attribute: ``call``."""

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call

    def __str__(self) -> str:
        return f"{self.call} must be called on the thread of the manager's event loop"


class ManagerClosed(UsageError, RuntimeError):
    """The manager takes no connections: it is closed, closing, or was never started. Attribute: ``state``."""

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state

    def __str__(self) -> str:
        return f"the manager is {self.state}"


class BadHandshake(WsfastError):
    """A peer has agreed to the protocol of resume and does not keep to it. Attribute: ``problem``, as a sentence."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem


class ClientClosed(WsfastError):
    """A client that reconnects has no connection, and will not have one any more.

    Attributes:
        because: "closed" by the application; "forbidden" by the server, which must not be tried again; "given up", as
            its strategy says after so many attempts; "failed", by the exception that is the cause; or "not started".
        code: with which the last connection was closed (RFC 6455, 7.4), or the status that its handshake got (HTTP).
        reason: the text that came with it; may be empty.
    """

    def __init__(self, because: str, code: int = 1006, reason: str = "") -> None:
        super().__init__(because, code, reason)
        self.because = because
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        with_reason = f" {_shown(self.reason)}" if self.reason else ""
        return f"the client is closed ({self.because}): {self.code}{with_reason}"


class QueueFull(WsfastError):
    """A client that is away has as much to send as it may keep. Attributes: ``messages``, ``nbytes`` that are kept."""

    def __init__(self, messages: int, nbytes: int) -> None:
        super().__init__(messages, nbytes)
        self.messages = messages
        self.nbytes = nbytes

    def __str__(self) -> str:
        return f"{self.messages} messages of {self.nbytes} bytes wait for the connection: no more are kept"


class PeerError(WsfastError):
    """The fault of one connection; the others are not concerned. Attribute: ``client_id``."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client_id = client_id

    def __str__(self) -> str:
        return f"connection {_shown(self.client_id)} failed"


class PeerClosed(PeerError):
    """The connection is closed.

    Attributes:
        client_id: of the connection.
        code: close code (RFC 6455, 7.4); 1006 where no close frame was seen.
        reason: the text that came with the code; may be empty.
    """

    def __init__(self, client_id: str, code: int = 1006, reason: str = "") -> None:
        super().__init__(client_id)
        self.args = (client_id, code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        with_reason = f" {_shown(self.reason)}" if self.reason else ""
        return f"connection {_shown(self.client_id)} is closed: {self.code}{with_reason}"


class PeerTooSlow(PeerError):
    """A message was dropped because too much waits for this connection. What is too much, and that it is dropped, is
    the manager's ``Backpressure``.
    """

    def __str__(self) -> str:
        return f"connection {_shown(self.client_id)} is too slow: a message to it was dropped"


class PermissionDenied(PeerError):
    """The connection lacks permissions. Attributes: ``client_id``, ``missing``, in the order in which they were asked
    for."""

    def __init__(self, client_id: str, missing: tuple[str, ...]) -> None:
        super().__init__(client_id)
        self.args = (client_id, missing)
        self.missing = missing

    def __str__(self) -> str:
        return f"connection {_shown(self.client_id)} lacks {', '.join(map(_shown, self.missing))}"


class PeerFailed(PeerError):
    """Sending to the connection failed for a reason of the library below. Attributes: ``client_id``, ``cause``."""

    def __init__(self, client_id: str, cause: BaseException) -> None:
        super().__init__(client_id)
        self.args = (client_id, cause)
        self.cause = cause

    def __str__(self) -> str:
        return f"connection {_shown(self.client_id)} failed: {type(self.cause).__name__}: {self.cause}"
