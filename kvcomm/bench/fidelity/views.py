"""Which plots and tables the benchmark's page has: quality against cost per base, and what changes along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from kvcomm.bench.fidelity.methods import Method
from kvcomm.bench.fidelity.rows import value_of
from kvcomm.plot import Canvas, Mark, Scale, Tick, scale_x, scale_y

__all__ = ["FAMILIES", "Along", "along", "pareto"]

Row = dict[str, Any]

FAMILIES = {
    "dense": "#1c2330",
    "rotation or nothing": "#8b95a7",
    "boundary recompute": "#3b6fb5",
    "CacheBlend": "#d98a1f",
    "the paper": "#c0504d",
    "corrected from anchors": "#8a56ac",
    "chosen by anchors": "#2f8f4e",
    "control": "#8c6d4f",
}
SPARE = ("#3aa6a6", "#b5485d", "#6b7a1f", "#5a4fcf", "#e07b9b")  # for further methods of a family
FLOOR = 1e-5  # nats: a divergence below is as good as none


def family(name: str) -> str:
    """Of FAMILIES: what a method is drawn as."""
    method = Method.parse(name)
    if method.dense:
        return "dense"
    if method.chosen_by in ("random", "oracle"):
        return "control"
    if method.estimator == "paper":
        return "the paper"
    if method.estimator:
        return "chosen by anchors" if method.chosen_by in ("above", "refresh") else "corrected from anchors"
    if method.chosen_by:
        return "CacheBlend"
    return "boundary recompute" if method.boundary else "rotation or nothing"


def pareto(rows: Sequence[Row], quality: str, cost: str) -> Canvas:
    """`rows`: one per method. Quality `accuracy` (more is better) or `kl` (less is) against a cost.

    A line joins the methods that none beats in both, controls left out; they are the first ones to get a label.
    """
    better = -1 if quality == "kl" else 1
    values = [max(r["kl"], FLOOR) if quality == "kl" else r[quality] for r in rows]
    costs = [r[cost] for r in rows]
    x = scale_x(0.8 * min(costs), 1.25 * max(costs), log=True)
    y = scale_y(FLOOR, 2 * max(max(values), 10 * FLOOR), log=True) if quality == "kl" else _accuracy(min(values))
    names = {"ttft_ms": "time to first token, ms", "compute_share": "computed, share of a dense prefill"}
    canvas = Canvas(x, y, names[cost], "KL from dense, nats" if quality == "kl" else "right answers", x.ticks(), y.ticks())
    canvas.marks += [
        Mark(
            x(c), y(v), FAMILIES[family(r["name"])],
            f"{r['name']}: accuracy {r['accuracy']:.3f} ({r['accuracy_low']:.3f}-{r['accuracy_high']:.3f}), KL {r['kl']:.4f}, "
            f"reuse {r['token_reuse_rate']:.3f}, compute {r['compute_share']:.3f}, {r['ttft_ms']:.1f} ms",
        )
        for r, c, v in zip(rows, costs, values, strict=True)
    ]  # fmt: skip
    order = sorted(range(len(rows)), key=lambda i: (costs[i], -better * values[i]))
    real = [i for i in order if family(rows[i]["name"]) != "control"]
    front = [i for n, i in enumerate(real) if all(better * (values[i] - values[j]) > 0 for j in real[:n])]
    canvas.line([(canvas.marks[i].x, canvas.marks[i].y) for i in front], "#c9d2df")
    rest = sorted((i for i in order if i not in front), key=lambda i: -better * values[i])
    canvas.name_marks([(canvas.marks[i], rows[i]["name"]) for i in (*front, *rest)])
    return canvas


def _accuracy(least: float) -> Scale:
    """From a little below the least value to a little above 1."""
    low = max(0.0, least - 0.1)
    return scale_y(low, 1 + 0.04 * (1 - low))


@dataclass(frozen=True)
class Along:
    """One axis under one base, all binding classes together."""

    ticks: list[str]
    rows: dict[str, list[Row | None]]  # by method, one per tick; a method that has one result everywhere has it everywhere
    plot: Canvas


def along(axis: str, rows: Sequence[Row]) -> Along:
    """`rows`: all of one base that are over all binding classes."""
    values = dict.fromkeys(v for r in rows if (v := value_of(axis, r)) is not None)
    names = list(dict.fromkeys(r["name"] for r in rows))
    found = {(r["name"], value_of(axis, r)): r for r in rows}
    by = {name: [found.get((name, value), found.get((name, None))) for value in values] for name in names}
    return Along(list(values), by, _lines(axis, list(values), by))


def _lines(axis: str, ticks: Sequence[str], by: dict[str, list[Row | None]]) -> Canvas:
    least = min(r["accuracy"] for rows in by.values() for r in rows if r)
    x, y = scale_x(-0.2, len(ticks) - 0.8, right=160), _accuracy(least)
    titles = {"length": "tokens of a span", "anchors": "requests learned from", "distribution": "learned from"}
    places = [Tick(x(i), text) for i, text in enumerate(ticks)]
    canvas = Canvas(x, y, titles.get(axis, axis), "right answers", places, y.ticks())
    ends, free, spare = list[tuple[float, float, str, str]](), dict(FAMILIES), cycle(SPARE)
    for n, (name, rows) in enumerate(by.items()):
        colour, shift = free.pop(family(name), None) or next(spare), 2.5 * (n - len(by) / 2)
        seen = [(x(i) + shift, r) for i, r in enumerate(rows) if r]
        canvas.marks += [
            Mark(
                at, y(r["accuracy"]), colour,
                f"{name}: accuracy {r['accuracy']:.3f} ({r['accuracy_low']:.3f}-{r['accuracy_high']:.3f}), "
                f"reuse {r['token_reuse_rate']:.3f}",
                y(r["accuracy_low"]), y(r["accuracy_high"]),
            )
            for at, r in seen
        ]  # fmt: skip
        canvas.line([(at, y(r["accuracy"])) for at, r in seen], colour, dashed=rows[0] is not None and rows[0] is rows[-1])
        ends.append((x(len(ticks) - 1) + 18, y(seen[-1][1]["accuracy"]), name, colour))
    canvas.name_ends(ends)
    return canvas
