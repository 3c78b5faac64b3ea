"""The contract of ``wsfast._metadata``, which ``wsfast.reference.Metadata`` honours too.

Words used here:

* *metadata*: of a connection, a mapping of *keys* (names, in the sense of ``_core.pyi``, of at most
  ``max_key_bytes``) to values of any type. The engine keeps references and never copies a value: a value that was set
  must not be changed.
* *version*: of the metadata of a connection, ``ConnectionMeta.version``.
* *target*: a client id or a record. What is neither is ``TypeError("target must be a client id or a ConnectionMeta, not
  int")``; an id that nobody has is ``UnknownConnection``, a record that was removed ``DetachedRecord``, one of another
  registry ``ForeignRecord``.
* *changes*: a mapping of keys to new values, in order (else ``TypeError("changes must be a mapping, not list")``), read
  once, before anything else is done with it. The value ``MISSING`` deletes the key; a key that is not there is left out
  of the change.
* *size*: of a value, what ``size_of`` says; of metadata, the sum over its keys of the key in UTF-8 and the value.

A change goes through these steps, and what fails leaves everything as it was:

1. The target is looked up, and the types of the other arguments are checked, in the order of the signature.
2. Each key is checked, then its value runs through the validators for it, in the order in which they were added; then
   its size is checked. MISSING is not validated, and of what a ``replace`` is to leave out or ``delete`` is to delete,
   the key is not checked either. Everything that speaks against the change is collected, with what the
   next step finds, into one ``MetadataRejected``. A validator that returns MISSING makes a deletion of it, and no
   further one is asked.
3. The new metadata takes the place of the old, together with the version, if the record is still attached (else
   ``DetachedRecord``) and, where ``if_version`` was given, still at that version (else ``VersionConflict``; that comes
   before ``MetadataRejected``). If another thread, or a validator, was faster, this step begins again.
4. The change is queued to be announced, and announced unless this thread is inside an announcement already, or another
   thread is at it, or announcing is another thread's task (``run_on``). Whoever is at it goes on until nothing is
   queued.

A change of several keys is one version. A change that changes nothing (no keys, or only keys to delete that are not
there) passes the condition of ``if_version``, is no version, and is not announced.

The problems of step 2, as ``Problem(key, reason, error)``, in the order of the changes. For each key the first that
applies:

* ``the key is empty``, ``the key is over the limit of 128 bytes in UTF-8``, ``the key holds a lone surrogate, so it
  has no UTF-8 form``. A key that is no ``str`` is ``TypeError("metadata key must be str, not int")``, at once: before
  any validator is asked.
* one for each validator that raised an ``Exception``: its text, or the name of its type where it has none (or ``str``
  of it raises); ``error`` is the exception. The validators behind it are called all the same, with the value as it
  was, unless it was added with ``is_last_word``. Other exceptions come through unchanged, at once.
* ``the value is over the limit of 16384 bytes``, ``the value is nested more than 32 levels deep``: of what the
  validators made of it, if none of them raised.

Then, with None as the key, about the metadata as it would become: ``more than 64 keys``, counting all new keys but
those that cannot be keys; ``more than 65536 bytes in all``, without the keys whose value has a problem. Neither is a
problem of metadata that has no more keys, or no more bytes, than before. What ``Registry.add`` or an assignment to
``ConnectionMeta.metadata`` has put there counts as well; a value over *max_bytes* or nested too deep as *max_bytes* +
1.

Announcing a change calls, for each key in the order of the changes, the notifiers that there are for it by then, in the
order in which they were added, with a ``Change``; then ``publish`` with all of them. Changes of one connection are
announced in the order of their versions, whichever threads they come from. An ``Exception`` of a notifier, or of
*later* when it is handed one, is counted and given to ``failed`` with the notifier, and concerns nobody else; so is
one of ``publish``, with the first of its changes. A change for which there is no notifier and which nobody wants to
be published is not queued. A change that is made inside an announcement (also by an ``async`` notifier, and by tasks
that any of them starts) is an answer to it; answers to answers, and so on, are ``LimitExceeded("changes of metadata
in answer to each other", max_cascade)`` beyond *max_cascade* of them in a row, also where several registries answer
each other; found after step 1.

Threads: every method may be called from any thread, with and without the GIL. No Python code runs under a lock.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Unpack, final

from typing_extensions import disjoint_base

from wsfast._core import ConnectionMeta, Registry
from wsfast.connection import Filters, Snapshot, UpdateReport

__all__ = ["Change", "Metadata", "size_of"]

@final
class Change:
    """What happened to one key of one connection. Read-only; compares by identity. Made by ``Metadata`` alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def conn(self) -> ConnectionMeta:
        """The record; it may have been removed since."""
    @property
    def client_id(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def old(self) -> Any:
        """The former value, or MISSING."""
    @property
    def new(self) -> Any:
        """The value, or MISSING if the key was deleted."""
    @property
    def version(self) -> int:
        """Of the metadata since this change."""

@disjoint_base
class Metadata:
    """The metadata of the connections of a registry: checked, versioned, announced.

    Args:
        registry: whose connections they are.
        max_key_bytes: longest key, in bytes of UTF-8; no more than the registry's ``max_name_bytes`` holds in any case.
        max_value_bytes: largest value, in bytes as ``size_of`` counts.
        max_keys: most keys of one connection.
        max_bytes: largest metadata of one connection.
        max_cascade: how many changes may follow from one another inside announcements.
        max_queued: how many changes may wait to be announced; more are not announced, and counted.
        later: what calls ``async`` notifiers, in the order in which it is given them.
        wants: whether anybody wants changes to be published; asked once for each call.
        publish: told of each change, after its notifiers. Gets all ``Change`` of one version.

    Raises (from the constructor): ``InvalidSetting("max_key_bytes", value, "1 or more")`` and so on (``max_keys``,
    ``max_cascade``: "0 or more"); ``TypeError("max_key_bytes must be int, not str")``; ``OverflowError("max_key_bytes
    does not fit 64 bits")``; ``TypeError("registry must be a Registry, not str")``.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        max_key_bytes: int = 128,
        max_value_bytes: int = 16384,
        max_keys: int = 64,
        max_bytes: int = 65536,
        max_cascade: int = 16,
        max_queued: int = 100_000,
        later: Callable[[Callable[[Any], Awaitable[object]], Any], object] | None = None,
        wants: Callable[[], bool] | None = None,
        publish: Callable[[tuple[Change, ...]], object] | None = None,
    ) -> None: ...
    @property
    def registry(self) -> Registry: ...
    def get(self, target: str | ConnectionMeta, key: str, default: Any = None) -> Any:
        """The value of *key*, or *default* where there is none.

        Raises: as for a target; ``TypeError("metadata key must be str, not int")``. A string that cannot be a key is
        absent. Cost: O(1), one shard lock."""
    def snapshot(self, target: str | ConnectionMeta) -> Snapshot:
        """The version and all the metadata, of the same moment. Cost: O(1), one shard lock."""
    def set(self, target: str | ConnectionMeta, key: str, value: Any, *, if_version: int | None = None) -> int:
        """Give *key* a value; ``MISSING`` deletes it. Returns the version since then.

        Args:
            if_version: only if the metadata is at this version. ``TypeError("if_version must be int or None, not
                str")``.

        Cost: the validators and notifiers; O(keys of the connection), O(size of the value); one or two shard locks.
        """
    def update(self, target: str | ConnectionMeta, changes: Mapping[str, Any], *, if_version: int | None = None) -> int:
        """Make all changes, or none. Returns the version since then."""
    def replace(
        self, target: str | ConnectionMeta, metadata: Mapping[str, Any], *, if_version: int | None = None
    ) -> int:
        """Have these keys and values and no others; a value MISSING is as if the key were not there. Like an
        ``update`` that also deletes the other keys, which are announced after those of *metadata*, in the order in
        which they were there. Every key of *metadata* counts as changed. ``TypeError("metadata must be a mapping, not
        list")``."""
    def delete(self, target: str | ConnectionMeta, key: str, *, if_version: int | None = None) -> int:
        """Delete *key*, if it is there, also one that could not be set. Returns the version since then. A string that
        cannot be a key is not there."""
    def update_where(
        self,
        changes: Mapping[str, Any],
        *,
        to: Iterable[str | ConnectionMeta] | None = None,
        **filters: Unpack[Filters],
    ) -> UpdateReport:
        """Make all changes for each connection that matches all the filters now; without filters, for everybody.

        Checked once, before the connections are looked up; a rejected change is made for nobody. Each connection then
        has all changes or none, one after the other; one for which they change nothing counts as changed, one that is
        removed meanwhile is in neither part of the report, one whose limits would be passed is in its ``rejected``.
        Announcements follow after each few hundred connections, and at the end (if another thread is announcing, it
        may be sooner).

        Args:
            to: client ids and records instead of the filters (``TypeError("to= cannot be combined with filters")``;
                else ``TypeError("to must hold client ids and records, not int")``, also for *to* that is a ``str`` or
                no iterable). Those that are not in the registry are left out; one that is there twice counts once.

        Cost: as ``select``, and O(keys) for each connection. It waits for nothing and lets nobody else in between, on
        an event loop neither: pass some thousand at a time with *to* where they may be a million.
        """
    def check(self, metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What ``metadata`` of a new connection becomes: a ``replace`` for nobody, of nothing. None stays None.
        ``TypeError("metadata must be a mapping, not list")``."""
    def add_validator(
        self,
        validator: Callable[[str, Any], Any],
        *,
        key: str | None = None,
        prefix: str | None = None,
        is_last_word: bool = False,
    ) -> Callable[[], None]:
        """Have *validator* look at each new value for *key*, for keys with *prefix*, or for all.

        It is called as ``validator(key, value)``, on the thread that makes the change, without a lock. What it
        returns is the value from then on; None leaves it as it is, MISSING deletes the key. It raises to reject the
        value. What was set before is not looked at.

        Args:
            is_last_word: if it raises, no further validator is asked about this value.

        Returns:
            A function that takes the validator out again. Calling it again does nothing.

        Raises: ``TypeError("validator must be callable, not int")``; ``TypeError("key= cannot be combined with
            prefix=")``; ``InvalidName`` ("metadata key", "metadata key prefix", of at most *max_key_bytes*) and
            ``TypeError`` for names; ``TypeError("validator must not be async")``. In this order.
        """
    def add_notifier(
        self, notifier: Callable[[Change], object], *, key: str | None = None, prefix: str | None = None
    ) -> Callable[[], None]:
        """Have *notifier*, plain or ``async def``, called with each change of *key*, of keys with *prefix*, or of all.

        A plain one runs inside the announcement; an ``async`` one is given to *later*, without which it is a
        ``TypeError("an async notifier needs an event loop")``. Returns and raises as for ``add_validator``.
        """
    def run_on(self, thread: int | None, wake: Callable[[], object] | None) -> None:
        """Announce on the thread with this ident only; None: on any. From other threads, *wake* is called when
        something is queued for the first time since that thread has announced, and should have ``announce`` called
        there."""
    def announce(self) -> None:
        """Announce what is queued, if this thread may and nobody is at it already. An exception that is no
        ``Exception`` comes through and ends the announcement of its change; what is queued behind it waits for the
        next call, or change."""
    def failed(self, notifier: Callable[..., object], change: Change) -> None:
        """Called inside the ``except`` block where a notifier raised; for subclasses to override."""
    def stats(self) -> dict[str, int]:
        """Since the beginning: ``metadata_changes`` (versions), ``metadata_rejected`` and ``metadata_conflicts``
        (calls, those of ``check`` too, or connections of ``update_where``), ``metadata_notifier_errors``,
        ``metadata_unannounced`` (changes that found the queue full)."""

def size_of(value: Any, limit: int = ..., /) -> int:
    """How large a value is, in bytes: about what it takes when written down, and at least 1.

    None, a bool: 1. An int: 8, or the bytes of its magnitude if they are more. A float: 8, a complex: 16. A str: its
    bytes in UTF-8 (3 for a lone surrogate). bytes, bytearray, memoryview: their bytes. A
    list, tuple, set, frozenset: 8, and its items. A mapping (``collections.abc.Mapping``): 8, its keys and its
    values. A dataclass, an object with ``__struct_fields__``: 8 and its fields. Instances of subclasses likewise.
    Anything else: ``sys.getsizeof``.

    Stops counting beyond *limit* (default: 2**63 - 1), and returns more than it then; beyond 32 levels of containers in
    each other it returns -1, whichever it meets first: containers are gone through in order, each with all that it
    holds before the next, and its 8 are counted when it is met. Fields that have no value are left out. Of an
    instance of a subclass of a builtin type, what the builtin type holds is counted. What the code of the application
    raises comes through (``items``, ``__iter__``, ``__sizeof__``, a property).
    """
