"""`kvcomm bench anchors`: what serving a prompt with anchors costs, beside its dense prefill.

    prompt  | prefix (512) | header | text (512) | header | text (512) | ... | closing text |     texts were prefilled alone

The engine serves it whole, from the call of the model's generate to the first token's logits. `path_ms` is all that comes
before the pass: match, plan, estimate, assemble (rotation, copy, deviations). Twice: with texts that were used
before (`warm`), and with texts whose base no estimator has seen (`cold`). Arms take turns within one run.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.loading import dtype_named
from kvcomm.bench.ttft import VOCABULARY, first_token, random_model
from kvcomm.config import Config
from kvcomm.engine import KVComm, Rule
from kvcomm.errors import InputError
from kvcomm.learning import Learner
from kvcomm.report import document, dumps, write_json
from kvcomm.segments import ReuseReport

__all__ = ["add_arguments", "measure", "run"]

AGENT = "reader"
PARTS = ("match", "plan", "estimate", "assemble", "forward", "ttft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench anchors`."""
    parser.add_argument(
        "--model", default="random:1024x12x16x8", metavar="SPEC", help="random:<hidden>x<layers>x<heads>x<kv_heads>"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefix", type=int, default=512, help="tokens in front of the first text, the same in every prompt")
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512, help="of a text")
    parser.add_argument("--anchors", type=int, default=20)
    parser.add_argument("--estimators", nargs="+", default=["select"], metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)


class Reader:
    """An engine whose texts are computed alone, and prompts made of them."""

    def __init__(self, backend: HFBackend, args: argparse.Namespace, estimator: str) -> None:
        self.backend, self.args, self.random = backend, args, random.Random(args.seed)
        self.prefix = self._draw(args.prefix)
        self.comm = KVComm(backend, config=Config(estimator=estimator, anchors="all", explore=0.0))

    def texts(self) -> list[list[int]]:
        """New texts, their KV in the store."""
        learner, out = Learner(self.backend, self.comm.store, self.comm.index, self.comm.config), []
        for _ in range(self.args.texts):
            ids = self._draw(1 + self.args.tokens)
            learner.prefill(torch.tensor([ids]), 1, "", "")
            out.append(ids[1:])
        return out

    def prompt(self, texts: list[list[int]]) -> torch.Tensor:
        """[1, tokens]: the texts in a new order behind the agent's own prefix, with new headers."""
        ids = list(self.prefix)
        for text in self.random.sample(texts, len(texts)):
            ids += [*self._draw(4), *text]
        return torch.tensor([[*ids, *self._draw(12)]])

    def serve(self, prompt: torch.Tensor, rule: Rule = "auto") -> ReuseReport:
        with self.comm.attach(agent=AGENT, rule=rule):
            first_token(self.backend, prompt)
        return self.comm.reports[-1]

    def learn(self, texts: list[list[int]]) -> list[float]:
        """Dense requests until the pool has its anchors; milliseconds of learning per request."""
        spent: list[float] = []
        while len(self.comm.anchors) < self.args.anchors:
            before = len(self.comm.anchors)
            spent.append(self.serve(self.prompt(texts), "exact").learn_ms or 0.0)
            if len(self.comm.anchors) <= before:
                raise InputError(f"{before} anchors fill the pool, {self.args.anchors} were asked for; ask for fewer")
        return spent

    def _draw(self, tokens: int) -> list[int]:
        return [self.random.randrange(10, VOCABULARY) for _ in range(tokens)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document. Raises InputError for unusable flags."""
    if min(args.texts, args.anchors, args.repetitions) < 1 or args.tokens < 16 or args.prefix < 1:
        raise InputError(
            f"{args.texts} texts of {args.tokens} tokens behind {args.prefix}, {args.anchors} anchors, {args.repetitions} "
            "repetitions: texts need at least 16 tokens, and there must be at least 1 of all else"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    backend = random_model(args.model, dtype_named(args.dtype))
    with tqdm(total=len(args.estimators) * args.repetitions, disable=args.quiet, leave=False) as bar:
        rows = [_row(backend, args, estimator, bar) for estimator in args.estimators]
    return document(
        "kvcomm.bench.anchors/1", model=args.model, dtype=args.dtype, threads=torch.get_num_threads(), texts=args.texts,
        text_tokens=args.tokens, prefix_tokens=args.prefix, repetitions=args.repetitions, estimators=rows,
    )  # fmt: skip


def _row(backend: HFBackend, args: argparse.Namespace, estimator: str, bar: Any) -> dict[str, Any]:
    reader = Reader(backend, args, estimator)
    texts = reader.texts()
    learned = reader.learn(texts)
    reader.serve(reader.prompt(texts))  # what no call before it has run, and every base is known afterwards
    reports: dict[str, list[ReuseReport]] = {"warm": [], "cold": []}
    dense: list[float] = []
    for _ in range(args.repetitions):
        prompt = reader.prompt(texts)
        dense.append(first_token(backend, prompt, backend.cache(prompt.shape[1] + 1)))
        reports["warm"].append(reader.serve(prompt))
        reports["cold"].append(reader.serve(reader.prompt(reader.texts())))
        bar.update()
    dense_ms = median(dense)
    out: dict[str, Any] = {
        "estimator": estimator,
        "anchors": len(reader.comm.anchors),
        "bytes_per_anchor": reader.comm.anchors.nbytes / len(reader.comm.anchors),
        "learn_ms": median(learned),
        "prompt_tokens": reports["warm"][0].prompt_tokens,
        "dense_ms": dense_ms,
        "all_dense_ms": dense,
    }
    for state, some in reports.items():
        ms = {part: median(getattr(r, f"{part}_ms") or 0.0 for r in some) for part in PARTS}
        path = median(sum(getattr(r, f"{part}_ms") or 0.0 for part in PARTS[:4]) for r in some)
        out[state] = {
            **{f"{part}_ms": value for part, value in ms.items()},
            "path_ms": path,
            "path_over_dense": path / dense_ms,
            "ttft_over_dense": ms["ttft"] / dense_ms,
            "anchor_tokens": some[-1].tokens_by_rung["anchor"],
            "computed_tokens": some[-1].computed_tokens,
            "fallbacks": sorted({r.fallback for r in some if r.fallback}),
        }
    return out


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(f"{doc['model']}, {doc['dtype']}, {doc['threads']} threads; median of {doc['repetitions']}, milliseconds")
        print("estimator     bases      dense   match estimate  assemble     path  of dense     ttft")
        for row in doc["estimators"]:
            for state in ("warm", "cold"):
                r = row[state]
                print(
                    f"{row['estimator']:<14}{state:<7}{row['dense_ms']:>9.1f}{r['match_ms']:>8.1f}{r['estimate_ms']:>9.1f}"
                    f"{r['assemble_ms']:>10.1f}{r['path_ms']:>9.1f}{r['path_over_dense']:>10.1%}{r['ttft_ms']:>9.1f}"
                )
    if args.output:
        write_json(Path(args.output) / "anchors.json", doc)
    return 0
