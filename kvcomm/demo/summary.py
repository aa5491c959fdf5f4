"""Turns recorded calls into the numbers that the demo reports. Not measured is None.

Which calls a number is over, in the block of a workload and in `all`:

    accuracy_*, answers_equal_to_dense, bindings, fallbacks    all agents
    token_reuse_rate, call_reuse_rate, ttft_*                  the agents after the first, which has nobody to reuse from
    later_agents: accuracy_*, answers_equal_to_dense           the same
    agents[i]                                                  that agent, in all rounds
    processes: answers_*, documents                            all agents; the rest is over those after the first
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from kvcomm.demo.runner import ARMS, Call
from kvcomm.segments import RUNGS

__all__ = ["summarise"]

PARTS = (
    "match_ms",
    "plan_ms",
    "estimate_ms",
    "assemble_ms",
    "forward_ms",
    "learn_ms",
)  # but the last, of the time to first token


def accuracy(calls: Iterable[Call], binding: str | None = None) -> float | None:
    """Share of questions answered exactly right, of one binding class or of all."""
    right = [r for c in calls for r, b in zip(c.right, c.bindings, strict=True) if binding in (None, b)]
    return sum(right) / len(right) if right else None


def ttft_ms(calls: Iterable[Call]) -> float | None:
    """Median time to first token. That of an exact prefix cache is without the search, which looks for moved text too: its own
    lookup is taken to cost nothing.
    """
    times = [
        c.report.ttft_ms - ((c.report.match_ms or 0.0) if c.arm == "prefix_cache" else 0.0)
        for c in calls
        if c.report.ttft_ms is not None
    ]
    return median(times) if times else None


def summarise(calls: Sequence[Call]) -> dict[str, Any]:
    """`{workload: {...}}` and, under `all`, everything together."""
    names = list(dict.fromkeys(c.workload for c in calls))
    return {**{name: _workload([c for c in calls if c.workload == name]) for name in names}, "all": _workload(calls)}


def _workload(calls: Sequence[Call]) -> dict[str, Any]:
    by_arm = {arm: [c for c in calls if c.arm == arm] for arm in ARMS}
    later = {arm: [c for c in calls if c.position > 1] for arm, calls in by_arm.items()}
    shared = later["shared"]
    bindings = sorted({b for c in calls for b in c.bindings})
    agents = list(dict.fromkeys((c.position, c.agent) for c in calls)) if len({c.workload for c in calls}) == 1 else []
    return {
        "requests": len({c.request for c in calls}),
        "calls": len(by_arm["shared"]),
        **_answers(by_arm),
        "later_agents": {"calls": len(shared), **_answers(later)},
        "token_reuse_rate": _token_reuse(shared),
        "call_reuse_rate": sum(any(s.rung != "exact" for s in c.report.spans) for c in shared) / len(shared)
        if shared
        else None,
        **{f"ttft_{arm}_ms": ttft_ms(later[arm]) for arm in ARMS},
        "bindings": {
            b: {
                "questions": sum(x == b for c in by_arm["dense"] for x in c.bindings),
                **{f"accuracy_{arm}": accuracy(by_arm[arm], b) for arm in ARMS},
            }
            for b in bindings
        },
        "agents": [_agent(position, agent, by_arm) for position, agent in sorted(agents)],
        "fallbacks": _fallbacks(by_arm["shared"]),
        "processes": _processes(by_arm, later) if by_arm["processes"] else None,
    }


def _agent(position: int, agent: str, by_arm: dict[str, list[Call]]) -> dict[str, Any]:
    mine = {arm: [c for c in calls if c.position == position] for arm, calls in by_arm.items()}
    shared = mine["shared"]
    return {
        "agent": agent,
        "position": position,
        "prompt_tokens": sum(c.report.prompt_tokens for c in shared) / len(shared) if shared else None,
        "tokens_by_rung": {r: sum(c.report.tokens_by_rung[r] for c in shared) / len(shared) for r in RUNGS} if shared else None,
        "token_reuse_rate": _token_reuse(shared),
        **{f"ttft_{arm}_ms": ttft_ms(mine[arm]) for arm in ARMS},
        **_answers(mine),
        "bindings": {
            b: {f"accuracy_{arm}": accuracy(mine[arm], b) for arm in ARMS}
            for b in sorted({b for c in shared for b in c.bindings})
        },
    }


def _answers(by_arm: Mapping[str, Sequence[Call]]) -> dict[str, float | None]:
    return {
        **{f"accuracy_{arm}": accuracy(by_arm[arm]) for arm in ARMS},
        "answers_equal_to_dense": _equal(by_arm["dense"], by_arm["shared"]),
    }


def _token_reuse(calls: Sequence[Call]) -> float | None:
    tokens = sum(c.report.prompt_tokens for c in calls)
    return sum(c.report.reused_tokens for c in calls) / tokens if tokens else None


def _equal(dense: Sequence[Call], shared: Sequence[Call]) -> float | None:
    """Share of calls whose answer is the dense run's, character for character."""
    texts = {(c.workload, c.request, c.round, c.position): c.text for c in dense}
    same = [texts[c.workload, c.request, c.round, c.position] == c.text for c in shared]
    return sum(same) / len(same) if same else None


def _processes(by_arm: Mapping[str, Sequence[Call]], later: Mapping[str, Sequence[Call]]) -> dict[str, Any]:
    """The team as processes, beside the same team in one."""
    apart, together = ttft_ms(later["processes"]), ttft_ms(later["shared"])
    read = [(c.request, passage.document) for c in by_arm["processes"] for passage in c.passages]
    return {
        "answers_equal_to_dense": _equal(by_arm["dense"], by_arm["processes"]),
        "answers_equal_to_shared": _equal(by_arm["shared"], by_arm["processes"]),
        "token_reuse_rate": _token_reuse(later["processes"]),
        "token_reuse_rate_shared": _token_reuse(later["shared"]),
        "ttft_ratio": apart / together if apart and together else None,
        "parts_ms": {arm: {part: _median(later[arm], part) for part in PARTS} for arm in ("shared", "processes")},
        "documents": {
            "distinct": len(set(read)),
            "read": len(read),
            "prefilled": {
                arm: sum(passage.prefilled for c in by_arm[arm] for passage in c.passages)
                for arm in ("dense", "shared", "processes")
            },
        },
    }


def _median(calls: Sequence[Call], part: str) -> float | None:
    """Of a field of the reports."""
    values = [value for c in calls if (value := getattr(c.report, part)) is not None]
    return median(values) if values else None


def _fallbacks(calls: Sequence[Call]) -> dict[str, int]:
    reasons = [c.report.fallback for c in calls if c.report.fallback]
    return {r: reasons.count(r) for r in dict.fromkeys(reasons)}
