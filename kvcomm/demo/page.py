"""How the demo's document looks: a table for the terminal, one self-contained page for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomm.page import ms, percent, render

__all__ = ["gain", "page", "terminal"]

SHORT = {"dense": "dense", "prefix_cache": "prefix", "shared": "shared", "processes": "processes"}  # arms with columns of times
JUDGED = ("dense", "shared", "processes")  # arms with columns of right answers


def terminal(doc: dict[str, Any]) -> str:
    """One table per workload, accuracy per binding class, and what was gained."""
    lines = []
    for name, w in doc["workloads"].items():
        rows = [_row(a, doc["arms"]) for a in w["agents"]]
        lines += [
            f"\n{name}: {w['requests']} requests, {len(rows)} agents, tokens and milliseconds per call",
            *_table(_columns(doc["arms"]), rows),
        ]
        arms = {
            name: arm
            for name, arm in (
                ("dense", "dense"),
                ("shared", "shared"),
                ("rotate only", "rotate"),
                ("processes", "processes"),
            )
            if arm in doc["arms"]
        }
        classes = [
            (b, str(c["questions"]), *(percent(c[f"accuracy_{arm}"]) for arm in arms.values()))
            for b, c in w["bindings"].items()
        ]
        lines += ["", *_table(("fact is bound by", "questions to all", *arms), classes)]
    return "\n".join([*lines, "", gain(doc), *([apart(doc)] if doc["processes"] else [])])


def gain(doc: dict[str, Any]) -> str:
    """The one line that says what sharing was worth: every number in it is over the agents after the first."""
    a, later = doc["all"], doc["all"]["later_agents"]
    prefix_ms = a["ttft_prefix_cache_ms"]
    if not later["calls"]:
        return f"one agent: nobody to share with; accuracy {percent(a['accuracy_dense'])}"
    return (
        f"agents 2 and later: {percent(a['token_reuse_rate'])} of prompt tokens reused; "
        f"time to first token {ms(a['ttft_dense_ms'])} ms dense, "
        + (f"{ms(prefix_ms)} ms with an exact prefix cache, " if prefix_ms is not None else "")
        + f"{ms(a['ttft_shared_ms'])} ms shared: "
        f"{ms(a['ttft_dense_ms'] - a['ttft_shared_ms'])} ms saved per call; "
        f"{percent(later['answers_equal_to_dense'])} of answers equal to dense, "
        f"accuracy {percent(later['accuracy_dense'])} dense, {percent(later['accuracy_shared'])} shared"
        + ("" if later["accuracy_rotate"] is None else f", {percent(later['accuracy_rotate'])} with rotation alone")
    )


def apart(doc: dict[str, Any]) -> str:
    """The line that says what became of the team as processes: times and tokens are over the agents after the first."""
    a, said, tally = doc["all"], doc["all"]["processes"], doc["processes"]
    documents, prefilled = said["documents"], said["documents"]["prefilled"]
    ratio = "-" if said["ttft_ratio"] is None else f"{said['ttft_ratio']:.2f} times"
    return (
        f"as processes: {documents['distinct']} documents, read {documents['read']} times, were prefilled "
        f"{prefilled['processes']} times ({prefilled['shared']} shared in one process, {prefilled['dense']} dense); "
        f"{percent(said['token_reuse_rate'])} of prompt tokens reused; time to first token {ms(a['ttft_processes_ms'])} ms, "
        f"{ratio} that of one process; {percent(said['answers_equal_to_shared'])} of answers equal to those of one process, "
        f"{percent(said['answers_equal_to_dense'])} to dense; "
        + (f"faults: {', '.join(f'{kind} {n}' for kind, n in tally['faults'].items())}" if tally["faults"] else "no faults")
    )


def page(doc: dict[str, Any]) -> str:
    """The page as HTML; nothing is loaded from elsewhere."""
    return render(Path(__file__).parent / "demo.html", doc=doc, gain=gain(doc), apart=apart(doc) if doc["processes"] else "")


def _columns(arms: Sequence[str]) -> tuple[str, ...]:
    return (
        *("agent", "prompt", "exact", "boundary", "computed"),
        *(f"{SHORT[arm]} ms" for arm in SHORT if arm in arms),
        "equal",
        *(f"right {arm}" for arm in JUDGED if arm in arms),
    )


def _row(a: dict[str, Any], arms: Sequence[str]) -> tuple[str, ...]:
    rungs = a["tokens_by_rung"]
    return (
        a["agent"],
        f"{a['prompt_tokens']:.0f}",
        *(f"{rungs[rung]:.0f}" for rung in ("exact", "boundary", "dense")),
        *(ms(a[f"ttft_{arm}_ms"]) for arm in SHORT if arm in arms),
        percent(a["answers_equal_to_dense"]),
        *(percent(a[f"accuracy_{arm}"]) for arm in JUDGED if arm in arms),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    return [f"  {line}" for line in (lines[0], "-" * len(lines[0]), *lines[1:])]
