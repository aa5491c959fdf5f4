"""JSON that somebody else made: whatever its shape, these give what is asked for, or nothing."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["number", "sequence", "table", "text"]


def table(value: object) -> dict[str, Any]:
    """An object, or an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """An array, or an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str:
    """A text, or an empty one."""
    return value if isinstance(value, str) else ""


def number(value: object) -> int | float | None:
    """A finite number; true and false are none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
