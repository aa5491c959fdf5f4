"""Trials as the rows of the benchmark's document. Every row tells by itself what it was measured under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean, median
from typing import Any

from kvcomm.bench.fidelity.methods import Method
from kvcomm.bench.fidelity.proportions import paired, wilson
from kvcomm.bench.fidelity.settings import AXES
from kvcomm.bench.fidelity.trial import CLASSES, Trial

__all__ = ["pairs", "rows", "value_of"]


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One per trial, method and binding class, and one for all classes."""
    found = [row for trial in trials for name in trial.outcomes for row in _rows(trial, name)]
    times = {_requests(row): row["ttft_ms"] for row in found if row["name"] == "dense"}
    for row in found:
        row["dense_ms"] = times.get(_requests(row))
    return found


def _requests(row: dict[str, Any]) -> tuple[object, ...]:
    """What rows over the same requests have in common."""
    return row["base"], row["binding"], row["documents"], row["fillers"]


def _rows(trial: Trial, name: str) -> list[dict[str, Any]]:
    setting, learns, out = trial.setting, Method.parse(name).estimator is not None, []
    for binding in (*CLASSES, "all"):
        some = [(a, o) for a, o in zip(trial.asked, trial.outcomes[name], strict=True) if binding in ("all", a.binding)]
        if not some:
            continue
        asked, outcomes = zip(*some, strict=True)
        right = sum(o.right for o in outcomes)
        low, high = wilson(right, len(some))
        out.append(
            {
                "name": name,
                "base": setting.base,
                "binding": binding,
                "documents": setting.documents,
                "fillers": setting.fillers,
                "span_tokens": fmean(a.span_tokens for a in trial.asked),
                "anchors": setting.anchors if learns else 0,
                "distribution": setting.distribution if learns else None,
                "codec": setting.codec if learns else None,
                "requests": len(some),
                "accuracy": right / len(some),
                "accuracy_low": low,
                "accuracy_high": high,
                "dense_accuracy": fmean(a.dense_right for a in asked),
                "kl": fmean(o.kl for o in outcomes),
                "top1": fmean(o.top1 for o in outcomes),
                "token_reuse_rate": fmean(o.reused for o in outcomes),
                "compute_share": fmean(o.compute for o in outcomes),
                "declined_rate": fmean(o.declined for o in outcomes),
                "went_dense_rate": fmean(o.went_dense for o in outcomes),
                "ttft_ms": median(sum(o.ms.values()) for o in outcomes),
                "split_ms": {part: median(o.ms[part] for o in outcomes) for part in outcomes[0].ms},
                "dense_ms": None,
                **(_bytes(trial) if learns else dict.fromkeys(BYTES)),
            }
        )
    return out


LEARNED = ("anchors", "distribution", "codec")  # axes that change what is learned, not what is asked
BYTES = ("bytes_per_anchor", "deviation_bytes_per_anchor", "bf16_deviation_bytes_per_anchor")


def _bytes(trial: Trial) -> dict[str, float | None]:
    """Everything that is stored, the deviation in it, and what that would be in bf16 at full rank."""
    sizes = [(s.stored, s.deviation, s.bf16) for s in trial.sizes]
    return dict(zip(BYTES, map(fmean, zip(*sizes, strict=True)), strict=True)) if sizes else dict.fromkeys(BYTES)


def value_of(axis: str, row: dict[str, Any]) -> str | None:
    """Where a row stands on an axis; None for a method that learns nothing, where the axis is about what is learned."""
    if axis in LEARNED and row["codec"] is None:
        return None
    return f"{row['span_tokens']:.0f}" if axis == "length" else str(row[AXES[axis].field])


def pairs(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every method against dense; and against itself with each earlier codec, over the same requests."""
    out = []
    for trial in trials:
        dense = [a.dense_right for a in trial.asked]
        out += [_pair(trial, name, "dense", None, dense) for name in trial.outcomes if name != "dense"]
    for first, then in combinations(trials, 2):
        if first.setting.asked == then.setting.asked and first.setting.codec != then.setting.codec:
            assert all((a.ids == b.ids).all() for a, b in zip(first.asked, then.asked, strict=True))
            out += [
                _pair(then, name, name, first.setting.codec, [o.right for o in first.outcomes[name]]) for name in then.outcomes
            ]
    return out


def _pair(trial: Trial, name: str, against: str, codec: str | None, before: Sequence[bool]) -> dict[str, Any]:
    setting = trial.setting
    return {
        "name": name,
        "base": setting.base,
        "documents": setting.documents,
        "fillers": setting.fillers,
        "anchors": setting.anchors,
        "distribution": setting.distribution,
        "codec": setting.codec,
        "against": against,
        "against_codec": codec,
        **asdict(paired(before, [o.right for o in trial.outcomes[name]])),
    }
