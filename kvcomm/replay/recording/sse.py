"""Server-sent events, out of a body that has ended, whole or not."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["events"]


def events(body: bytes) -> list[dict[str, Any]]:
    """The JSON objects among the events' data, in order. What is none ([DONE], comments, a cut end) is left out."""
    found = []
    blocks = body.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    for block in blocks:
        data = [line[5:].removeprefix(" ") for line in block.split("\n") if line.startswith("data:")]
        try:
            event = json.loads("\n".join(data))
        except ValueError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found
