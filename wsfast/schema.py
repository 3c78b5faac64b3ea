"""Types of metadata, as msgspec knows them. The only module that imports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ["converter"]


def converter(kind: Any, strict: bool) -> Callable[[str, Any], Any]:
    """A validator that converts values to *kind*, or raises ``msgspec.ValidationError``.

    Raises:
        TypeError: msgspec does not know the type.
    """
    msgspec.json.Decoder(kind)  # so that a type that is no type is found now, and not by the first value

    def convert(_key: str, value: Any) -> Any:
        converted = msgspec.convert(value, kind, strict=strict)
        if converted is None and value is not None:  # "null", without strictness; a validator cannot say that
            raise ValueError("None is written as None")
        return converted

    return convert
