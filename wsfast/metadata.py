"""Business facts on connections: what they may be, how much there may be of them, who is told when they change.

``manager.metadata`` of a ``ConnectionManager`` is a :class:`MetadataManager`. What it promises:

- **Checked first.** A change runs through the validators for its keys, in the order in which they were added, and must
  stay within :class:`MetadataLimits`. One that is rejected leaves nothing behind, and tells every reason.
- **Applied in one step**, against other threads and against the end of the connection. The version grows by one with
  each change; a change with ``if_version`` is made at that version only.
- **Announced last**, without a lock, in the order of the versions of a connection: to notifiers for the keys, then as a
  ``MetadataChanged`` event. A notifier may make changes; they are announced after the one that it is told of. How
  many may follow from one another is limited.
- **Nothing for nothing.** A connection without metadata costs no byte.

The work is the core's (csrc/_metadata.pyx), or that of ``wsfast.reference`` for registries in pure Python; this
module adds declared types, which need msgspec: ``pip install 'wsfast[metadata]'``. The reference is
``help(MetadataManager)``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsfast._metadata import Change, Metadata, size_of
from wsfast.errors import InvalidSetting

__all__ = ["METADATA", "Change", "Declarations", "MetadataLimits", "MetadataManager", "size_of"]

logger = logging.getLogger(__name__)


# The settings, and the least that each may be.
_LEAST = {"max_key_bytes": 1, "max_value_bytes": 1, "max_keys": 0, "max_bytes": 1, "max_cascade": 0, "max_queued": 1}


@dataclass(frozen=True, slots=True)
class MetadataLimits:
    """How much metadata there may be.

    Attributes:
        max_key_bytes: longest key, in bytes of UTF-8.
        max_value_bytes: largest value, in bytes as ``wsfast.metadata.size_of`` counts: about what it takes when
            written down.
        max_keys: most keys of one connection.
        max_bytes: largest metadata of one connection, keys and values together.
        max_cascade: how many changes may follow from one another, where notifiers answer changes with changes.
        max_queued: how many changes may wait to be announced; more are made, but not announced.
    """

    max_key_bytes: int = 128
    max_value_bytes: int = 16 * 2**10
    max_keys: int = 64
    max_bytes: int = 64 * 2**10
    max_cascade: int = 16
    max_queued: int = 100_000

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InvalidSetting(f"metadata.{name}", getattr(self, name), f"{least} or more")

    def settings(self) -> dict[str, int]:
        """The keywords of the engine."""
        return {name: getattr(self, name) for name in _LEAST}


METADATA = MetadataLimits()
"""The limits of a manager that was given none."""


class Declarations:
    """What there is beside either engine; mixed into it."""

    if TYPE_CHECKING:

        def add_validator(
            self,
            validator: Callable[[str, Any], Any],
            *,
            key: str | None = None,
            prefix: str | None = None,
            is_last_word: bool = False,
        ) -> Callable[[], None]: ...

    def declare(self, key: str, kind: Any, *, strict: bool = True) -> Callable[[], None]:
        """Have values of *key* be of a type: convert them to it, and reject those that do not fit.

        Args:
            kind: any type that msgspec knows: built-in types, ``Literal``, ``X | None``, ``Annotated`` with
                ``msgspec.Meta``, dataclasses, ``TypedDict``, ``NamedTuple``, enums, ``datetime``, ``msgspec.Struct``,
                and collections of these. A dict becomes a dataclass; an instance of a class is taken as it is,
                without a look into it; a str becomes what it stands for (dates, UUIDs, bytes in base64).
            strict: False: also convert ``"5"`` to 5, and the like.

        Returns:
            A function that takes the declaration back.

        Raises:
            TypeError: msgspec does not know the type.
            ImportError: msgspec is not installed.
            InvalidName: *key* cannot be a key.
        """
        try:
            schema = importlib.import_module("wsfast.schema")
        except ModuleNotFoundError as error:
            if error.name != "msgspec":
                raise
            raise ImportError("declared types need msgspec; try: pip install 'wsfast[metadata]'") from None
        # For those behind it, what does not have its type is no matter.
        return self.add_validator(schema.converter(kind, strict), key=key, is_last_word=True)

    def failed(self, notifier: Callable[..., object], change: Change) -> None:
        """Log that a notifier raised, inside its ``except`` block."""
        logger.exception("notifier %r failed on %r", notifier, change)


class MetadataManager(Declarations, Metadata):
    """The metadata of the connections of a native registry; see ``wsfast._metadata`` for what it does."""
