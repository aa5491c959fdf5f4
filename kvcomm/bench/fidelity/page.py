"""The benchmark's page: all its documents, as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomm.bench.fidelity.trial import CLASSES
from kvcomm.bench.fidelity.views import FAMILIES, along, family, pareto
from kvcomm.page import render

__all__ = ["page"]

PLOTS = (("accuracy", "ttft_ms"), ("accuracy", "compute_share"), ("kl", "ttft_ms"), ("kl", "compute_share"))


def page(docs: Sequence[dict[str, Any]]) -> str:
    """`docs`: one without an axis, others with one each; any of them may be missing."""
    plain = [doc for doc in docs if doc["axis"] is None]
    views = []
    for doc in plain:
        for base in dict.fromkeys(r["base"] for r in doc["methods"]):
            rows = [r for r in doc["methods"] if r["base"] == base]
            whole = [r for r in rows if r["binding"] == "all"]
            by = {(r["name"], r["binding"]): r for r in rows}
            views.append((base, whole, by, [pareto(whole, *plot) for plot in PLOTS]))
    sweeps = []
    for doc in docs:
        for base in dict.fromkeys(r["base"] for r in doc["methods"]) if doc["axis"] else ():
            whole = [r for r in doc["methods"] if r["base"] == base and r["binding"] == "all"]
            sweeps.append((doc, base, along(doc["axis"], whole), [p for p in doc["pairs"] if p["base"] == base]))
    shown = {"docs": docs, "views": views, "sweeps": sweeps, "classes": CLASSES, "families": FAMILIES, "family": family}
    return render(Path(__file__).parent / "fidelity.html", **shown)
