"""How a replay looks: a table for the terminal, one self-contained page for a browser."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomm.page import ms, percent, render
from kvcomm.replay.plots import COLOURS, RUNG_COLOURS, hops, quality, times
from kvcomm.replay.results import Row

__all__ = ["page", "terminal", "verdict"]

WORST = 3  # calls per policy that are shown
CHOICES = 8  # of such a call: where it differs from dense


def terminal(doc: dict[str, Any]) -> str:
    """A table of the policies, what was left out, and the verdict."""
    rows = [
        (
            name,
            ms(p["ttft_sum_ms"]),
            _times(p["dense_over_this_ttft_sum"]),
            _times(p["dense_over_this_ttft"]),
            percent(p["token_reuse_rate"]),
            nats(p["kl_first"]),
            nats(p["kl_early"]),
            nats(p["kl"]),
            percent(p["top1_first"]),
            percent(p["top1"]),
        )
        for name, p in doc["policies"].items()
    ]
    head = (
        "policy",
        "ttft sum ms",
        "dense / it",
        "median per call",
        "reused",
        "KL first",
        "first 8",
        "answer",
        "top-1 first",
        "answer",
    )
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    table = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in (head, *rows)
    ]
    return "\n".join([f"{doc['calls_served']} calls of {doc['sessions']} sessions", *table, *left_out(doc), "", verdict(doc)])


def verdict(doc: dict[str, Any]) -> str:
    """What kvcomm as it is was worth on this trace; the last policy where `auto` was not asked for."""
    if not doc["calls_served"]:
        return "No call was served."
    name = "auto" if "auto" in doc["policies"] else list(doc["policies"])[-1]
    p = doc["policies"][name]
    if p["kl"] is None:
        return f"Only dense was asked for: {ms(p['ttft_ms'])} ms to the first token (median)."
    return (
        f"{name}: {percent(p['token_reuse_rate'])} of prompt tokens not computed, first token "
        f"{_times(p['dense_over_this_ttft_sum'])} as fast as dense (all calls' times together; "
        f"{_times(p['dense_over_this_ttft'])} for the median call); dense's own first choice at "
        f"{percent(p['top1'])} of answer positions, KL {nats(p['kl'])} nats"
        + ("." if p["answers_equal_to_dense"] is None else f"; {percent(p['answers_equal_to_dense'])} of answers are dense's.")
    )


def left_out(doc: dict[str, Any]) -> list[str]:
    """What is not in the numbers, and what was changed to be readable for the model: a sentence each."""
    lines = [f"skipped, {number} calls: {reason}" for reason, number in doc["skipped"].items()]
    if doc["unread"]:
        lines.append(
            f"could not be read, {doc['unread']} records: {doc['unread_first'][0]}" + (" ..." if doc["unread"] > 1 else "")
        )
    return [*lines, *(f"{what}: {number} messages" for what, number in doc["changes"].items())]


def page(doc: dict[str, Any], rows: Sequence[Row]) -> str:
    """The page as HTML; nothing is loaded from elsewhere."""
    served = [row for row in rows if row.policies]
    plots = [plot for plot in (times(served), quality(doc), hops(doc)) if plot is not None]
    return render(
        Path(__file__).parent / "replay.html",
        doc=doc,
        verdict=verdict(doc),
        left_out=left_out(doc),
        plots=plots,
        colours=COLOURS,
        rungs=RUNG_COLOURS,
        worst=_worst(served, list(doc["policies"]), doc["live"]),
        nats=nats,
        times=_times,
    )


def nats(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}" if x < 1e-3 else f"{x:.3f}"


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}x"


def _worst(rows: Sequence[Row], policies: Sequence[str], live: bool) -> list[dict[str, Any]]:
    """Per policy the calls that are farthest from dense, and where."""
    found = []
    for name in policies:
        far = sorted((r for r in rows if r.policies[name].kl), key=lambda r: -(r.policies[name].kl or 0.0))
        calls = [
            {
                "row": row,
                "outcome": row.policies[name],
                "choices": row.policies[name].differs[:CHOICES],
                "more": max(0, len(row.policies[name].differs) - CHOICES),
                "diff": _diff(row.policies["dense"].text, row.policies[name].text) if live else [],
            }
            for row in far[:WORST]
        ]
        if calls:
            found.append({"policy": name, "calls": calls})
    return found


def _diff(dense: str | None, ours: str | None) -> list[tuple[str, str]]:
    """Pieces of two texts, by words: kind (same, dense, ours) and text."""
    a, b = (re.findall(r"\S+\s*|\s+", text or "") for text in (dense, ours))
    pieces: list[tuple[str, str]] = []
    for what, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if what == "equal":
            pieces.append(("same", "".join(a[i:j])))
            continue
        pieces += [(kind, text) for kind, text in (("dense", "".join(a[i:j])), ("ours", "".join(b[k:n]))) if text]
    return pieces
