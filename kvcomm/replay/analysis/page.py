"""How the document of `kvcomm analyze` looks: tables for the terminal, one self-contained page for a browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcomm.page import percent, render

__all__ = ["page", "terminal"]

# class, what it is called, what it means
CLASSES = (
    (
        "prefix_shareable",
        "prefix-shareable",
        "same beginning as an earlier prompt of the session: a prefix cache has it",
    ),
    ("cross_agent_non_prefix", "cross-agent, not a prefix", "stood in another agent's prompt or output: what kvcomm is for"),
    ("own_non_prefix", "own, not a prefix", "stood elsewhere in the agent's own earlier prompts or outputs"),
    ("fresh", "fresh", "new to the session"),
)
SHOWN = 12  # agents and pairs in the terminal
SIDE = 9  # agents on each side of the flow; the others are added up
WIDE, GAP, BAND = 220, 9, 240  # pixels of the flow: between the sides, between agents, of all tokens
LETTER, LONGEST = 7, 30  # pixels and letters of a name


def terminal(doc: dict[str, Any]) -> str:
    """Shares, agents, pairs, what coarser detectors would find, and the verdict."""
    per_call = doc["tokens_per_call"]
    rows = [(name, percent(doc[key]), f"{per_call[key]:,.0f}", says) for key, name, says in CLASSES]
    other = "  of it with other agents' prompts", percent(doc["prefix_shareable_other_agents"])
    rows.insert(1, (*other, f"{per_call['prefix_shareable_other_agents']:,.0f}", ""))
    lines = [headline(doc), "", *_table(("prompt tokens", "share", "per call", ""), rows, left=(0, 3)), ""]
    lines += _table(
        ("agent", "calls", "prompt", "prefix", "cross-agent", "own", "fresh"),
        [
            (
                a["agent"][:40],
                str(a["calls"]),
                f"{a['tokens_per_call']['prompt']:,.0f}",
                *(percent(a[key]) for key, _, _ in CLASSES),
            )
            for a in doc["per_agent"][:SHOWN]
        ],
    )
    if doc["pairs"]:
        pairs = [
            (p["reader"][:40], p["source"][:40], f"{p['tokens']:,}", percent(p["share_of_prompt_tokens"]))
            for p in doc["pairs"][:SHOWN]
        ]
        lines += ["", *_table(("reads", "what was first with", "tokens", "share"), pairs, left=(0, 1))]
    found = [(detector(name), percent(share)) for name, share in doc["found_by"].items()]
    lines += ["", *_table(("cross-agent, not a prefix, found by", "share"), found)]
    runs = doc["runs"]
    if runs["count"]:
        lines += ["", f"  {runs['count']:,} runs: median {runs['median_tokens']:,} tokens, 95 % up to {runs['p95_tokens']:,}"]
    lines += ["", *(f"  note: {note}" for note in notes(doc))]
    return "\n".join(_printable(line) for line in [*lines, "", doc["verdict"]])


def _printable(line: str) -> str:
    """Names may hold anything, also what a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def headline(doc: dict[str, Any]) -> str:
    formats = ", ".join(doc["formats"])
    counted = "estimated without a tokenizer" if doc["tokens_are_estimated"] else f"by {doc['tokenizer']}"
    return (
        f"{doc['trace']} ({formats}): {doc['sessions']:,} sessions, {doc['calls']:,} calls, {doc['agents']:,} agents, "
        f"{doc['prompt_tokens']:,} prompt tokens, {counted}"
    )


def detector(name: str) -> str:
    """`found_by`'s key in words."""
    return "equal whole messages" if name == "whole_messages" else f"runs of {name.split('_')[2]} tokens or more"


def notes(doc: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    read = doc["read"]
    said = []
    if doc["tokens_are_estimated"]:
        said.append("tokens are an estimate: --tokenizer counts with your model's own")
    if read["skipped"]:
        records = "1 record was" if read["skipped"] == 1 else f"{read['skipped']:,} records were"
        said.append(f"{records} left out, the first: {read['problems'][0]}")
    if read["calls_without_output"]:
        said.append(f"{read['calls_without_output']:,} calls have no output in the trace, and no later prompt shows it")
    if read["calls_without_agent"]:
        said.append(f"{read['calls_without_agent']:,} calls name no agent: they are told apart by their system message")
    if read["sessions_begun_anew"]:
        said.append(
            f"sessions were too many or too large to be remembered: {read['sessions_begun_anew']:,} times one was begun anew"
        )
    said.append("a prefix cache is taken to forget nothing within a session; where yours does, sharing is worth more")
    return said


def page(doc: dict[str, Any]) -> str:
    """The page as HTML; nothing is loaded from elsewhere."""
    return render(
        Path(__file__).parent / "analyze.html",
        doc=doc,
        classes=CLASSES,
        headline=headline(doc),
        notes=notes(doc),
        flow=_flow(doc["pairs"]),
        bars=_bars(doc["runs"]["by_length"]),
        detectors=[(detector(name), share) for name, share in doc["found_by"].items()],
    )


@dataclass(frozen=True)
class Band:
    """Tokens that one agent had and another reads, as an area between two columns. Pixels."""

    path: str
    colour: int
    title: str


@dataclass(frozen=True)
class Side:
    """An agent in a column."""

    y: float
    height: float
    name: str
    colour: int


@dataclass(frozen=True)
class Flow:
    sources: list[Side]
    readers: list[Side]
    bands: list[Band]
    height: float
    left: float  # room for the names of each side
    right: float
    wide: float = WIDE


def _flow(pairs: Sequence[dict[str, Any]]) -> Flow | None:
    """Columns of agents, those with most tokens first; an agent has the same colour on both sides."""
    if not pairs:
        return None
    counts = Counter({(p["source"], p["reader"]): p["tokens"] for p in pairs})
    columns = [_column(counts, side) for side in (0, 1)]
    merged: Counter[tuple[str, str]] = Counter()
    for (source, reader), tokens in counts.items():
        names = (source if source in columns[0] else "others", reader if reader in columns[1] else "others")
        merged[names] += tokens
    total = merged.total()
    colours = {name: i for i, name in enumerate(dict.fromkeys([*columns[0], *columns[1]]))}
    sides: list[list[Side]] = []
    at: list[dict[str, float]] = []
    for side, column in enumerate(columns):
        y, placed, begins = 0.0, [], {}
        for name in column:
            height = BAND * sum(n for pair, n in merged.items() if pair[side] == name) / total
            placed.append(Side(y, max(height, 1.0), name, colours[name]))
            begins[name] = y
            y += max(height, 5.0) + GAP
        sides.append(placed)
        at.append(begins)
    bands = []
    order = [{name: i for i, name in enumerate(column)} for column in columns]
    for (source, reader), tokens in sorted(merged.items(), key=lambda item: (order[0][item[0][0]], order[1][item[0][1]])):
        thick = BAND * tokens / total
        a, b = at[0][source], at[1][reader]
        at[0][source] += thick
        at[1][reader] += thick
        mid = WIDE / 2
        path = (
            f"M0,{a:.1f} C{mid:.0f},{a:.1f} {mid:.0f},{b:.1f} {WIDE},{b:.1f} L{WIDE},{b + thick:.1f} "
            f"C{mid:.0f},{b + thick:.1f} {mid:.0f},{a + thick:.1f} 0,{a + thick:.1f} Z"
        )
        bands.append(Band(path, colours[source], f"{reader} reads {tokens:,} tokens that {source} had first"))
    left, right = (20 + LETTER * min(LONGEST, max(len(s.name) for s in side)) for side in sides)
    return Flow(sides[0], sides[1], bands, max(s[-1].y + s[-1].height for s in sides) + 16, left, right)


def _column(counts: Counter[tuple[str, str]], side: int) -> list[str]:
    by_name: Counter[str] = Counter()
    for pair, tokens in counts.items():
        by_name[pair[side]] += tokens
    names = [name for name, _ in by_name.most_common(SIDE)]
    return names if len(by_name) <= SIDE else [*names, "others"]


@dataclass(frozen=True)
class Bar:
    """Runs of a range of lengths: their tokens as a share of the tallest bar's."""

    label: str
    height: float  # 0 to 1
    share: str  # of the tokens of all runs
    title: str


def _bars(buckets: Sequence[dict[str, int]]) -> list[Bar]:
    tallest, total = max((b["tokens"] for b in buckets), default=0), sum(b["tokens"] for b in buckets)
    return [
        Bar(
            str(b["from_tokens"]),
            b["tokens"] / tallest,
            percent(b["tokens"] / total),
            f"{b['runs']:,} runs, {b['tokens']:,} tokens",
        )
        for b in buckets
        if tallest
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    return [f"  {line.rstrip()}" for line in (lines[0], "-" * len(lines[0]), *lines[1:])]
