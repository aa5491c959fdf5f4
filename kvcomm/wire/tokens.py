"""What a client from another host says to be let in: a token for each tenant, in a file of lines `tenant token`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from kvcomm.errors import InputError

__all__ = ["read_tokens", "token_of"]

log = logging.getLogger(__name__)


def read_tokens(path: Path | None) -> dict[str, str]:
    """By tenant; "*": any other one. Raises InputError for a file that holds none."""
    if path is None:
        return {}
    try:
        rows = [line.split() for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
        if os.stat(path).st_mode & 0o077:
            log.warning("%s can be read by other users; `chmod 600` it", path)
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"--token-file {path} cannot be read: {fault}") from fault
    if not rows or any(len(row) != 2 for row in rows):
        raise InputError(f"--token-file {path} must have lines `tenant token`, at least one; * as the tenant: any other one")
    return dict(rows)


def token_of(tokens: Mapping[str, str], tenant: str) -> str:
    """Empty where there is none."""
    return tokens.get(tenant, tokens.get("*", ""))
