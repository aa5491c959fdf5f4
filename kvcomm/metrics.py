"""Counts of one engine, and their text for Prometheus. Knows reports, nothing of how requests are served."""

from __future__ import annotations

from collections import Counter
from threading import Lock

from kvcomm.segments import ReuseReport

__all__ = ["Counters"]

_HELP = {
    "requests": "Finished requests.",
    "prompt_tokens": "Prompt tokens of finished requests.",
    "reused_tokens": "Prompt tokens served from stored KV, by rung.",
    "computed_tokens": "Prompt tokens computed, by the rung of the span they belong to; dense: outside every span.",
    "fallbacks": "Requests that reused nothing, or no more than an exact prefix, by reason.",
    "faults": "Stored KV or its handling failed, by kind; the requests were answered densely.",
}
_LABEL = {"reused_tokens": "rung", "computed_tokens": "rung", "fallbacks": "reason", "faults": "kind"}


class Counters:
    """What happened since it was made; only grows. Thread safe."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _HELP}  # metric -> label value -> count
        self._lock = Lock()

    def record(self, report: ReuseReport) -> None:
        """Count a finished request. A fallback is counted under its text up to the first colon, so that details which differ
        from request to request do not make a series each."""
        in_spans = sum(span.recomputed_tokens for span in report.spans)
        with self._lock:
            self._counts["requests"][""] += 1
            self._counts["prompt_tokens"][""] += report.prompt_tokens
            for span in report.spans:
                self._counts["reused_tokens"][span.rung] += span.reused_tokens
                self._counts["computed_tokens"][span.rung] += span.recomputed_tokens
            self._counts["computed_tokens"]["dense"] += report.computed_tokens - in_spans
            if report.fallback is not None:
                self._counts["fallbacks"][report.fallback.partition(":")[0]] += 1

    def fault(self, kind: str) -> None:
        """Count one fault; `kind` is a word of the caller's, of which there are few."""
        with self._lock:
            self._counts["faults"][kind] += 1

    def value(self, metric: str, label: str = "") -> int:
        """One count, by the metric's name in this module; 0 where nothing was counted, KeyError for an unknown name."""
        with self._lock:
            return self._counts[metric][label]

    def total(self, metric: str) -> int:
        """One metric over all its labels; KeyError for an unknown name."""
        with self._lock:
            return self._counts[metric].total()

    def render(self) -> str:
        """Prometheus text exposition format 0.0.4: `kvcomm_<metric>_total{<label>="<value>"} <count>`."""
        lines = []
        with self._lock:
            counts = {name: sorted(by_label.items()) for name, by_label in self._counts.items()}
        for name, rows in counts.items():
            lines += [f"# HELP kvcomm_{name}_total {_HELP[name]}", f"# TYPE kvcomm_{name}_total counter"]
            if name not in _LABEL:
                lines.append(f"kvcomm_{name}_total {dict(rows).get('', 0)}")
            else:
                lines += [f'kvcomm_{name}_total{{{_LABEL[name]}="{_escaped(label)}"}} {count}' for label, count in rows]
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
