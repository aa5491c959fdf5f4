"""How the demo's document looks: a table for the terminal, one self-contained page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomm.page import ms, percent, render

__all__ = ["gain", "page", "terminal"]

COLUMNS = (
    "agent",
    "prompt",
    "exact",
    "boundary",
    "computed",
    "dense ms",
    "prefix ms",
    "shared ms",
    "equal",
    "right dense",
    "right shared",
)


def terminal(doc: dict[str, Any]) -> str:
    """One table per workload, accuracy per binding class, and what was gained."""
    lines = []
    for name, w in doc["workloads"].items():
        rows = [_row(a) for a in w["agents"]]
        lines += [
            f"\n{name}: {w['requests']} requests, {len(rows)} agents, tokens and milliseconds per call",
            *_table(COLUMNS, rows),
        ]
        arms = {
            name: arm
            for name, arm in (("dense", "dense"), ("shared", "shared"), ("rotate only", "rotate"))
            if arm in doc["arms"]
        }
        classes = [
            (b, str(c["questions"]), *(percent(c[f"accuracy_{arm}"]) for arm in arms.values()))
            for b, c in w["bindings"].items()
        ]
        lines += ["", *_table(("fact is bound by", "questions to all", *arms), classes)]
    return "\n".join([*lines, "", gain(doc)])


def gain(doc: dict[str, Any]) -> str:
    """The one line that says what sharing was worth: every number in it is over the agents after the first."""
    a, later = doc["all"], doc["all"]["later_agents"]
    if not later["calls"]:
        return f"one agent: nobody to share with; accuracy {percent(a['accuracy_dense'])}"
    return (
        f"agents 2 and later: {percent(a['token_reuse_rate'])} of prompt tokens reused; "
        f"time to first token {ms(a['ttft_dense_ms'])} ms dense, "
        f"{ms(a['ttft_prefix_cache_ms'])} ms with an exact prefix cache, {ms(a['ttft_shared_ms'])} ms shared: "
        f"{ms(a['ttft_dense_ms'] - a['ttft_shared_ms'])} ms saved per call; "
        f"{percent(later['answers_equal_to_dense'])} of answers equal to dense, "
        f"accuracy {percent(later['accuracy_dense'])} dense, {percent(later['accuracy_shared'])} shared"
        + ("" if later["accuracy_rotate"] is None else f", {percent(later['accuracy_rotate'])} with rotation alone")
    )


def page(doc: dict[str, Any]) -> str:
    """The page as HTML; nothing is loaded from elsewhere."""
    return render(Path(__file__).parent / "demo.html", doc=doc, gain=gain(doc))


def _row(a: dict[str, Any]) -> tuple[str, ...]:
    rungs = a["tokens_by_rung"]
    return (
        a["agent"],
        f"{a['prompt_tokens']:.0f}",
        f"{rungs['exact']:.0f}",
        f"{rungs['boundary']:.0f}",
        f"{rungs['dense']:.0f}",
        ms(a["ttft_dense_ms"]),
        ms(a["ttft_prefix_cache_ms"]),
        ms(a["ttft_shared_ms"]),
        percent(a["answers_equal_to_dense"]),
        percent(a["accuracy_dense"]),
        percent(a["accuracy_shared"]),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    return [f"  {line}" for line in (lines[0], "-" * len(lines[0]), *lines[1:])]
