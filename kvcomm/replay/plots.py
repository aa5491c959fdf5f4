"""The plots of a replay's page: times to first token, quality against time, and error over hops."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any

from kvcomm.plot import Canvas, Mark, Scale, Tick, scale_x, scale_y
from kvcomm.replay.results import Row

__all__ = ["COLOURS", "RUNG_COLOURS", "hops", "quality", "times"]

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "#7d8798",
        "prefix": "#d98a1f",
        "rotate": "#cf5b57",
        "boundary": "#4f86d1",
        "anchor": "#a06bc4",
        "auto": "#35a05a",
    }
)
RUNG_COLOURS: Mapping[str, str] = MappingProxyType(
    {"exact": "#d98a1f", "rotate": "#cf5b57", "boundary": "#4f86d1", "anchor": "#a06bc4", "dense": "#aab4c2"}
)
SHOWN = 400  # calls per policy that are drawn
FLOOR = 1e-7  # nats: a divergence below is as good as none, and drawn here


def times(rows: Sequence[Row]) -> Canvas | None:
    """A row of marks per policy, one mark per call, and a bar at their median."""
    found = {name: [(row, o.ttft_ms) for row in rows if (o := row.policies[name]).ttft_ms] for name in _names(rows)}
    found = {name: pairs for name, pairs in found.items() if pairs}
    if not found:
        return None
    every = [t for pairs in found.values() for _, t in pairs]
    x, y = scale_x(0.8 * min(every), 1.25 * max(every), log=True), scale_y(-0.6, len(found) - 0.4)
    lines = list(reversed(found))  # the first one on top
    canvas = Canvas(x, y, "time to first token, ms", "", x.ticks(), [Tick(y(i), name) for i, name in enumerate(lines)])
    rng = random.Random(0)
    for i, name in enumerate(lines):
        pairs = found[name] if len(found[name]) <= SHOWN else rng.sample(found[name], SHOWN)
        canvas.marks += [
            Mark(x(t), y(i + 0.5 * (rng.random() - 0.5)), COLOURS[name], f"{name}: call {row.number}, {row.agent}, {t:.1f} ms")
            for row, t in pairs
        ]
        middle = x(median(t for _, t in found[name]))
        canvas.line([(middle, y(i - 0.38)), (middle, y(i + 0.38))], COLOURS[name])
    return canvas


def quality(doc: dict[str, Any]) -> Canvas | None:
    """KL over the answer against the median time, one mark per policy."""
    points = {n: (p["ttft_ms"], p["kl"]) for n, p in doc["policies"].items() if p["kl"] is not None and p["ttft_ms"]}
    if not points:
        return None
    dense = doc["policies"]["dense"]["ttft_ms"]
    costs = [cost for cost, _ in points.values()] + ([dense] if dense else [])
    x = scale_x(0.7 * min(costs), 1.6 * max(costs), log=True)
    y = scale_y(FLOOR, 3 * max(10 * FLOOR, *(kl for _, kl in points.values())), log=True)
    canvas = Canvas(x, y, "time to first token, median ms", "KL from dense, nats", x.ticks(), _floored(y))
    if dense:
        canvas.line([(x(dense), y.start), (x(dense), y.end)], COLOURS["dense"], dashed=True)
    canvas.marks += [
        Mark(x(cost), y(kl), COLOURS[name], f"{name}: {cost:.1f} ms, KL {kl:.2g}") for name, (cost, kl) in points.items()
    ]
    canvas.name_marks(list(zip(canvas.marks, points, strict=True)))
    return canvas


def hops(doc: dict[str, Any]) -> Canvas | None:
    """KL over the answer by how many outputs led to a call; nothing where all calls are as deep."""
    depths = [found["hop"] for found in doc["hops"]]
    if len(depths) < 2:
        return None
    lines = {
        name: [(found["hop"], kl) for found in doc["hops"] if (kl := found["policies"][name]["kl"]) is not None]
        for name in doc["policies"]
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    most = max(kl for points in lines.values() for _, kl in points)
    x = scale_x(depths[0] - 0.2, depths[-1] + 0.2, right=90)
    y = scale_y(FLOOR, 3 * max(10 * FLOOR, most), log=True)
    ticks = [Tick(x(depth), str(depth)) for depth in depths[:: -(-len(depths) // 12)]]
    canvas = Canvas(x, y, "outputs in a row that led to the call", "KL from dense, nats", ticks, _floored(y))
    for name, points in lines.items():
        canvas.line([(x(d), y(kl)) for d, kl in points], COLOURS[name])
        canvas.marks += [Mark(x(d), y(kl), COLOURS[name], f"{name}: hop {d}, KL {kl:.2g}") for d, kl in points]
    canvas.name_ends([(x(points[-1][0]) + 10, y(points[-1][1]), name, COLOURS[name]) for name, points in lines.items()])
    return canvas


def _floored(y: Scale) -> list[Tick]:
    """Ticks of KL. The lowest one says that what is below it stands there as well."""
    return [Tick(t.at, "≤1e-7") if abs(t.at - y(FLOOR)) < 0.5 else t for t in y.ticks()]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].policies) if rows else []
