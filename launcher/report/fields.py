"""Fields of journal entries, as far as they have the shape that is expected. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    return value if isinstance(value, str) else ""


def integer(fields: Mapping[str, Any], key: str) -> int | None:
    value = fields.get(key)
    return value if type(value) is int and abs(value) < 1 << 62 else None


def number(fields: Mapping[str, Any], key: str) -> float | None:
    """Finite and not negative, as all that we write."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e15 else None
