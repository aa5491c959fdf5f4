"""The benchmark's document as text for a terminal."""

from __future__ import annotations

from typing import Any

from kvcomm.bench.fidelity.rows import value_of
from kvcomm.bench.fidelity.trial import CLASSES

__all__ = ["table"]

HEAD = f"{'method':<26}{'all':>7}{''.join(f'{c:>9}' for c in CLASSES)}{'KL':>8}{'reuse':>8}{'compute':>9}{'ms':>8}"


def table(doc: dict[str, Any]) -> str:
    """One block per base and value of the axis."""
    blocks: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in doc["methods"]:
        value = value_of(doc["axis"], row) if doc["axis"] else None
        title = row["base"] if value is None else f"{row['base']}, {doc['axis']} {value}"
        blocks.setdefault((title, row["name"]), {})[row["binding"]] = row
    lines, last = list[str](), ""
    for (title, name), by in blocks.items():
        if title != last:
            lines += ["", f"base: {title}", HEAD]
        last, whole = title, by["all"]
        lines.append(
            f"{name:<26}{whole['accuracy']:>7.3f}"
            + "".join(f"{by[c]['accuracy']:>9.3f}" if c in by else f"{'-':>9}" for c in CLASSES)
            + f"{whole['kl']:>8.3f}{whole['token_reuse_rate']:>8.3f}{whole['compute_share']:>9.3f}{whole['ttft_ms']:>8.1f}"
        )
    return "\n".join(lines)
