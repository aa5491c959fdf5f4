"""`kvcomm analyze TRACE`: how much of the prompts of recorded runs could be reused, and how. No model, no torch, seconds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvcomm.errors import InputError
from kvcomm.replay.analysis.overlap import MIN_RUN
from kvcomm.replay.analysis.page import page, terminal
from kvcomm.replay.analysis.tokens import Tokens
from kvcomm.replay.analysis.totals import Agent, Totals, quantile
from kvcomm.replay.readers import Trace, read_trace
from kvcomm.report import document, dumps, write_json

__all__ = ["add_arguments", "analyze", "run"]

CLASSES = ("prefix", "prefix_own", "prefix_other", "cross", "own", "fresh")
KEYS = (
    "prefix_shareable",
    "prefix_shareable_own",
    "prefix_shareable_other_agents",
    "cross_agent_non_prefix",
    "own_non_prefix",
    "fresh",
)
LISTED = 200  # agents and pairs in the document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm analyze`."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="file or folder; its format is recognised (docs/analyze.md)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, or a folder with one (default: a quick estimate)"
    )
    parser.add_argument("--min-run", type=int, default=MIN_RUN, metavar="N", help=f"shortest run (default: {MIN_RUN})")
    parser.add_argument("--session", action="append", metavar="ID", help="only this session (may be given several times)")
    parser.add_argument("--strict", action="store_true", help="a record that cannot be read is an error")


def analyze(
    path: Path,
    *,
    tokenizer: Path | None = None,
    min_run: int = MIN_RUN,
    only: list[str] | None = None,
    strict: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """The JSON document. Raises InputError for a trace, tokenizer or number that cannot be used."""
    tokens = Tokens() if tokenizer is None else Tokens.from_file(tokenizer)
    if min_run < 2:
        raise InputError(f"--min-run is {min_run}; it must be at least 2")
    totals = Totals(tokens, min_run)
    trace = read_trace(path, strict=strict)
    others: set[str] = set()
    with tqdm(trace, unit=" calls", disable=quiet or None, leave=False) as calls:
        for call in calls:
            if only is None or call.session in only:
                totals.add(call)
            elif len(others) < 10:
                others.add(call.session)
    if only is not None and not totals.all.calls:
        raise InputError(f"--session is {', '.join(only)}; the trace has {', '.join(sorted(others))}")
    return _document(trace, totals)


def _document(trace: Trace, totals: Totals) -> dict[str, Any]:
    everything = totals.all
    agents = sorted(totals.agents.items(), key=lambda item: -item[1].tokens)
    return document(
        "kvcomm.analyze/1",
        trace=trace.name,
        formats=dict(trace.formats),
        tokenizer=totals.tokens.name,
        tokens_are_estimated=totals.tokens.estimated,
        min_run_tokens=totals.min_run,
        sessions=totals.sessions,
        calls=everything.calls,
        agents=len(agents),
        prompt_tokens=everything.tokens,
        **_shares(everything),
        cross_agent_share_of_rest=totals.addressable,
        tokens_per_call=_per_call(everything),
        found_by={
            **{f"runs_of_{n}_tokens": totals.share(totals.by_length[n]) for n in sorted(totals.by_length)},
            "whole_messages": totals.share(everything.whole_messages),
        },
        runs={
            "count": totals.runs.total(),
            "per_call": totals.runs.total() / max(1, everything.calls),
            "median_tokens": quantile(totals.runs, 0.5),
            "p95_tokens": quantile(totals.runs, 0.95),
            "longest_tokens": max(totals.runs, default=None),
            "by_length": _buckets(totals),
        },
        per_agent=[
            {"agent": name, "calls": a.calls, "prompt_tokens": a.tokens, **_shares(a), "tokens_per_call": _per_call(a)}
            for name, a in agents[:LISTED]
        ],
        pairs=[
            {"source": source, "reader": reader, "tokens": count, "share_of_prompt_tokens": totals.share(count)}
            for (source, reader), count in totals.pairs.most_common(LISTED)
        ],
        verdict=totals.verdict(),
        read={
            "skipped": trace.skipped,
            "problems": [str(p) for p in trace.problems],
            "calls_without_output": totals.unanswered,
            "calls_without_agent": totals.unnamed,
            "sessions_begun_anew": totals.forgotten,
        },
    )


def _shares(agent: Agent) -> dict[str, float]:
    return {key: getattr(agent, name) / max(1, agent.tokens) for key, name in zip(KEYS, CLASSES, strict=True)}


def _per_call(agent: Agent) -> dict[str, float]:
    counts = {key: getattr(agent, name) / max(1, agent.calls) for key, name in zip(KEYS, CLASSES, strict=True)}
    return {"prompt": agent.tokens / max(1, agent.calls), **counts}


def _buckets(totals: Totals) -> list[dict[str, int]]:
    """Runs by length: from each power of two, times the shortest, to the next."""
    out: list[dict[str, int]] = []
    low, longest = totals.min_run, max(totals.runs, default=0)
    while low <= longest:
        inside = {length: n for length, n in totals.runs.items() if low <= length < 2 * low}
        out.append({"from_tokens": low, "runs": sum(inside.values()), "tokens": sum(k * n for k, n in inside.items())})
        low *= 2
    return out


def run(args: argparse.Namespace) -> int:
    if (
        args.output
        and (taken := next((p for p in (args.output, *args.output.parents) if p.exists()), None))
        and not taken.is_dir()
    ):
        raise InputError(f"--output is {args.output}, and {taken} is a file; it must be a folder")
    doc = analyze(
        args.trace,
        tokenizer=args.tokenizer,
        min_run=args.min_run,
        only=args.session,
        strict=args.strict,
        quiet=args.quiet or args.format == "json",
    )
    print(dumps(doc) if args.format == "json" else terminal(doc))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "analyze.json", doc)
        (args.output / "analyze.html").write_text(page(doc), encoding="utf-8")
        if args.format == "terminal":
            print(f"\nwritten: {args.output / 'analyze.json'}, {args.output / 'analyze.html'}")
    return 0
