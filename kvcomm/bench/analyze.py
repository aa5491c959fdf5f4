"""`kvcomm bench analyze`: how many prompt tokens a second `kvcomm analyze` reads, counts and compares, and in how much memory.

Two traces are made up, the second ten times as long: four agents of a session read everything that was said in it, every call
brings the definitions of its tools, sessions are interleaved by four, one JSON object a line. Each trace is analyzed in a
process of its own; time includes its start, reading and tokenising, and memory is the most that the process ever had.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcomm.errors import InputError, KVCommError
from kvcomm.report import document, dumps, write_json

__all__ = ["add_arguments", "measure", "run", "trace"]

AGENTS, TURNS, TOGETHER = 4, 16, 4
PLACES = {f"p{i}": {"type": "string"} for i in range(6)}
TOOLS = [{"type": "function", "function": {"name": f"tool_{i}", "parameters": {"properties": PLACES}}} for i in range(10)]
CHILD = """
import json, resource, sys, time
began, busy = time.perf_counter(), time.process_time()
from pathlib import Path
from kvcomm.replay.analysis.command import analyze
doc = analyze(Path(sys.argv[1]), tokenizer=Path(sys.argv[2]) if sys.argv[2:] else None)
print(json.dumps({
    "prompt_tokens": doc["prompt_tokens"], "calls": doc["calls"], "cross_agent_non_prefix": doc["cross_agent_non_prefix"],
    "s": time.perf_counter() - began, "cpu_s": time.process_time() - busy,
    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench analyze`."""
    parser.add_argument("--sessions", type=int, default=120, metavar="N", help="sessions of the shorter trace (default: 120)")
    parser.add_argument("--factor", type=int, default=10, metavar="N", help="how much longer the other one is (default: 10)")
    parser.add_argument("--words", type=int, default=150, metavar="N", help="words of a message, about (default: 150)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="count with this tokenizer.json (default: the estimate)")
    parser.add_argument("--seed", type=int, default=0)


def trace(sessions: int, words: int, seed: int) -> Iterator[dict[str, Any]]:
    """Calls of the made-up agents, one object each."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlcumwfgypb", k=rng.randrange(2, 10))) for _ in range(20_000)]
    for start in range(0, sessions, TOGETHER):
        chats = [_chat(f"session-{i}", vocabulary, words, rng) for i in range(start, min(start + TOGETHER, sessions))]
        for calls in zip(*chats, strict=True):
            yield from calls


def _chat(session: str, vocabulary: list[str], words: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    def text(count: int) -> str:
        chosen = rng.choices(vocabulary, k=max(1, round(count * rng.uniform(0.5, 1.5))))
        return " ".join(word + rng.choice(("", "", "", "", ",", ".\n")) for word in chosen)

    roles = [f"You are agent {i} of a team. {text(words)}" for i in range(AGENTS)]
    said = [(-1, text(words))]
    for turn in range(TURNS):
        me, output = turn % AGENTS, text(words)
        heard = [
            {"role": "assistant", "content": t} if who == me else {"role": "user", "content": t, "name": f"agent-{who}"}
            for who, t in said
        ]
        messages = [{"role": "system", "content": roles[me]}, *heard]
        yield {"session_id": session, "agent": f"agent-{me}", "messages": messages, "tools": TOOLS, "output": output}
        said.append((me, output))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document."""
    for name in ("sessions", "factor", "words"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    traces = []
    with tempfile.TemporaryDirectory() as folder:
        for sessions in (args.sessions, args.sessions * args.factor):
            path = Path(folder, "trace.jsonl")
            with path.open("w", encoding="utf-8") as file:
                for call in trace(sessions, args.words, args.seed):
                    file.write(json.dumps(call) + "\n")
            one = _analyzed(path, args.tokenizer)
            one |= {
                "sessions": sessions,
                "bytes": path.stat().st_size,
                "prompt_tokens_per_s": one["prompt_tokens"] / one["s"],
                "prompt_tokens_per_cpu_s": one["prompt_tokens"] / one["cpu_s"],
            }
            traces.append(one)
    return document(
        "kvcomm.bench.analyze/1",
        tokenizer=str(args.tokenizer) if args.tokenizer else "estimate",
        seed=args.seed,
        words=args.words,
        factor=args.factor,
        traces=traces,
        memory_of_longer_over_shorter=traces[1]["peak_memory_bytes"] / traces[0]["peak_memory_bytes"],
    )


def _analyzed(path: Path, tokenizer: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(path), *([str(tokenizer)] if tokenizer else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KVCommError(f"the analysis ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(f"agents in group chats, {AGENTS} in a session, {TURNS} calls each; tokens: {doc['tokenizer']}; one process each")
        print(
            f"{'sessions':>9} {'trace':>10} {'prompt tokens':>14} {'time':>9} {'tokens/s':>10} {'per CPU s':>10} {'memory':>9}"
        )
        for t in doc["traces"]:
            size, memory = t["bytes"] / 1e6, t["peak_memory_bytes"] / 1e6
            print(
                f"{t['sessions']:>9,} {size:>7,.1f} MB {t['prompt_tokens']:>14,} {t['s']:>7.1f} s "
                f"{t['prompt_tokens_per_s']:>10,.0f} {t['prompt_tokens_per_cpu_s']:>10,.0f} {memory:>6,.0f} MB"
            )
        print(f"{doc['factor']} times the trace takes {doc['memory_of_longer_over_shorter']:.2f} times the memory")
    if args.output:
        write_json(args.output / "analyze.json", doc)
    return 0
