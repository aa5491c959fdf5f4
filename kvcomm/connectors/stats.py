"""What happened, for others to read: one request's summary in its response, and counters beside vLLM's own at /metrics.

`Stats` and `Exporter` have the methods that vLLM calls on its own classes of this kind; they need not be derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kvcomm.metrics import Counters
from kvcomm.segments import ReuseReport, SpanReport

__all__ = ["Exporter", "Stats", "reported", "summary"]

METRICS: Mapping[str, tuple[str | None, str]] = {  # name -> label, what it counts
    "requests": (None, "Finished requests."),
    "prompt_tokens": (None, "Prompt tokens of finished requests."),
    "reused_tokens": ("rung", "Prompt tokens served from stored KV, by rung."),
    "computed_tokens": ("rung", "Prompt tokens computed, by the rung of the span they belong to."),
    "fallbacks": ("reason", "Requests that reused nothing, by reason."),
    "faults": ("kind", "Stored KV or its handling failed, by kind; the requests were answered densely."),
}


REPORTED = (
    "agent",
    "prompt_tokens",
    "reused_tokens",
    "computed_tokens",
    "fallback",
    "declined",
    "match_ms",
    "plan_ms",
    "estimate_ms",
)  # fields of a report that a response has as they are


def summary(report: ReuseReport) -> dict[str, Any]:
    """`kv_transfer_params.kvcomm` of a response."""
    return {
        **{name: getattr(report, name) for name in REPORTED},
        "declined": dict(report.declined),
        "tokens_by_rung": dict(report.tokens_by_rung),
        "producers": sorted({span.producer for span in report.spans}),
        "spans": [asdict(span) for span in report.spans],
    }


def reported(answered: Mapping[str, Any] | None) -> ReuseReport | None:
    """The report in `kv_transfer_params` of a response; None where kvcomm said nothing."""
    said = (answered or {}).get("kvcomm")
    if said is None:
        return None
    return ReuseReport(**{name: said[name] for name in REPORTED}, spans=tuple(SpanReport(**span) for span in said["spans"]))


@dataclass
class Stats:
    """Increments since the last ones were taken: metric -> label value -> count."""

    data: dict[str, dict[str, int]] = field(default_factory=dict)
    _seen: dict[tuple[str, str], int] = field(default_factory=dict)

    def since(self, counters: Counters) -> Stats | None:
        """What `counters` has counted since the last call; None when nothing."""
        fresh: dict[str, dict[str, int]] = {}
        for name, labels in counters.counts().items():
            for label, count in labels.items():
                if more := count - self._seen.get((name, label), 0):
                    fresh.setdefault(name, {})[label] = more
                    self._seen[name, label] = count
        return Stats(fresh) if fresh else None

    def to_dict(self) -> dict[str, dict[str, int]]:
        return self.data

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: Stats) -> Stats:
        for name, labels in other.data.items():
            mine = self.data.setdefault(name, {})
            for label, count in labels.items():
                mine[label] = mine.get(label, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's log."""
        totals = {
            name: sum(self.data.get(name, {}).values()) for name in ("requests", "prompt_tokens", "reused_tokens", "faults")
        }
        return {f"kvcomm_{name}": count for name, count in totals.items()}


class Exporter:
    """Prometheus counters `kvcomm:<metric>_total` in the API server's registry, with vLLM's labels and ours."""

    def __init__(self, metric_types: Mapping[Any, Any], labels: list[str], values: Mapping[int, list[object]]) -> None:
        from prometheus_client import Counter

        self._values = values
        self._counters = {
            name: metric_types[Counter](
                name=f"kvcomm:{name}", documentation=text, labelnames=[*labels, label] if label else list(labels)
            )
            for name, (label, text) in METRICS.items()
        }
        for name, (label, _) in METRICS.items():
            if label is None:
                for engine in values.values():
                    self._counters[name].labels(*engine)  # shown from the start, as 0

    def observe(self, data: Mapping[str, Mapping[str, int]], engine_idx: int = 0) -> None:
        """Adds the increments of one engine."""
        for name, labels in data.items():
            for label, count in labels.items():
                own = [label] if METRICS[name][0] else []
                self._counters[name].labels(*self._values[engine_idx], *own).inc(count)
