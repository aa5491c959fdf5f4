"""The embedded model's report card: `python -m kvcomm.tiny.evaluate [--requests 400]` prints the tables of README.md.

Fresh worlds that training never saw. Dense accuracy by workload and binding class and by prompt length; then the same requests
with reused document KV, in two settings:

    producer   the KV of another agent's prompt, which read the same documents in another order (kvcomm's own case)
    isolated   every document's KV computed alone, as a retrieval cache would keep it

each without rotation (`naive`), with rotation alone (`rotate`), and with boundary and closing text recomputed (`boundary`).
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from kvcomm.backends.base import Backend
from kvcomm.backends.loading import load
from kvcomm.config import Config
from kvcomm.demo.workloads import CLASSES, FILLERS, default_team, make_task
from kvcomm.engine import KVComm, Prompt
from kvcomm.tiny import FOLDER, tasks
from kvcomm.tiny.words import DOMAINS

__all__ = ["held_out", "main", "reuse"]

LENGTHS = ((0, 3), (4, 10), (14, 20), (24, 30), (42, 48))  # filler sentences per document, for the length table
RUNGS = ("naive", "rotate", "boundary")
Scores = dict[tuple[str, str, str], list[bool]]  # (method, workload, binding) -> right or wrong, per question


def config(rung: str) -> Config:
    return Config(rung=rung, max_recompute=1.0)  # type: ignore[arg-type]  # one of RUNGS; everything reusable is reused


def reuse(backend: Backend, known: Iterable[Prompt], prompt: Prompt, rung: str) -> str:
    """The answer to `prompt` by an engine that has seen `known` and nothing else."""
    comm = KVComm(backend, config=config(rung))
    for text in known:
        comm.generate(text, max_new_tokens=1, do_sample=False)
    return comm.generate(prompt, max_new_tokens=96, do_sample=False).text


def held_out(
    backend: Backend, requests: int, documents: int, seed: int, *, fillers: tuple[int, int] = FILLERS, methods: bool = True
) -> tuple[Scores, float]:
    """Scores of every method, and the mean prompt length in tokens."""
    rng = random.Random(seed)
    scores: Scores = defaultdict(list)
    dense = KVComm(backend, config=Config(mode="off"))
    lengths = []
    for number in tqdm(range(requests), leave=False):
        workload = list(DOMAINS)[number % len(DOMAINS)]
        producer, consumer = default_team(workload, 2).agents
        task = make_task(rng, workload, (producer, consumer), documents, fillers)
        said = tasks.say(producer.name, tasks.answer_text(task.items[producer.name]))
        first: Prompt = list(producer.messages(task.fields, ""))
        prompt: Prompt = list(consumer.messages(task.fields, said))
        lengths.append(len(dense.encode(prompt)))
        answers = {"dense": dense.generate(prompt, max_new_tokens=96, do_sample=False).text}
        if methods:
            alone = ["<bos> " + text for text in task.bundles]
            for rung in RUNGS:
                answers[f"producer {rung}"] = reuse(backend, [first], prompt, rung)
                answers[f"isolated {rung}"] = reuse(backend, alone, prompt, rung)
        items = task.items[consumer.name]
        for method, answer in answers.items():
            for item, right in zip(items, tasks.score(items, answer), strict=True):
                scores[method, workload, item.binding].append(right)
    return scores, sum(lengths) / len(lengths)


def rate(scores: Scores, method: str, workload: str = "", binding: str = "") -> str:
    """Share of right answers, with their number."""
    right = [r for (m, w, b), rs in scores.items() if m == method and workload in ("", w) and binding in ("", b) for r in rs]
    return f"{sum(right) / len(right):.3f} ({len(right)})" if right else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the embedded model's report card")
    parser.add_argument("--model", default=str(FOLDER))
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="dense only")
    args = parser.parse_args(argv)
    backend = load(args.model, dtype="float32")
    scores, length = held_out(backend, args.requests, args.documents, args.seed, methods=not args.quick)
    methods = [
        m
        for m in ("dense", *(f"{base} {rung}" for base in ("producer", "isolated") for rung in RUNGS))
        if not args.quick or m == "dense"
    ]
    print(
        f"{args.requests} requests, {args.documents} documents, prompts of {length:.0f} tokens on average; "
        "right answers (questions)\n"
    )
    classes = [*CLASSES, "output"]
    rows = [[w, b or "all", *(rate(scores, m, w, b) for m in methods)] for w in DOMAINS for b in (*classes, "")]
    rows += [["all", b or "all", *(rate(scores, m, "", b) for m in methods)] for b in (*classes, "")]
    print(table(["workload", "bound by", *methods], rows))
    print("\nDense accuracy by prompt length\n")
    lines = []
    for fillers in LENGTHS:
        found, mean = held_out(backend, args.requests // 4, args.documents, args.seed + 1, fillers=fillers, methods=False)
        lines.append([f"{mean:.0f}", *(rate(found, "dense", w) for w in DOMAINS), rate(found, "dense")])
    print(table(["tokens", *DOMAINS, "all"], lines))


if __name__ == "__main__":
    main()
