"""`kvcomm bench fidelity`: every method on the same requests, beside dense, by binding class and base.

Each template's estimators learn from `--anchors` requests first, one at a time, as a running system would.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

from tqdm import tqdm

from kvcomm.anchors.anchor import Anchor
from kvcomm.backends.hf import HFBackend
from kvcomm.backends.loading import load
from kvcomm.bench.fidelity.cases import BASES, Base, Case, Template, case, templates
from kvcomm.bench.fidelity.early import Early
from kvcomm.bench.fidelity.methods import Method, Outcome, deviation, serve
from kvcomm.codecs import codec
from kvcomm.codecs.base import Codec, pack, unpack
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimator
from kvcomm.estimators.catalogue import make
from kvcomm.report import document, dumps, write_json
from kvcomm.tiny import FOLDER, tasks

__all__ = ["METHODS", "add_arguments", "measure", "run"]

CLASSES: tuple[tasks.Binding, ...] = ("self", "header", "other", "two-hop")
METHODS = (
    "dense naive rotate boundary:1 boundary:2 boundary:4 boundary:8 boundary:16 "
    "cacheblend:0.05 cacheblend:0.1 cacheblend:0.2 cacheblend:0.3 paper mean knn ridge ridge-shared "
    "paper+boundary:2 knn+boundary:2 ridge-shared+boundary:2 paper+residual:0.05 knn+refresh:0.05 ridge-shared+refresh:0.05 "
    "select+refresh:0.02 select+refresh:0.03 select+refresh:0.05 select+refresh:0.1 "
    "rotate+random:0.05 rotate+oracle:0.05"
).split()
QUICK = "dense naive rotate boundary:2 boundary:8 cacheblend:0.1 paper mean ridge-shared select+refresh:0.05".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench fidelity`."""
    parser.add_argument("--model", default=str(FOLDER), metavar="ID", help="a model that speaks the language of kvcomm.tiny")
    parser.add_argument("--quick", action="store_true", help="2 templates, 24 requests, fewer methods: under a minute")
    parser.add_argument("--templates", type=int, default=6)
    parser.add_argument("--requests", type=int, default=300, help="over all templates")
    parser.add_argument("--anchors", type=int, default=50, help="requests that each template learns from")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument(
        "--fillers", type=int, nargs=2, default=(18, 26), metavar=("LEAST", "MOST"), help="sentences per document"
    )
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--codec", default="int8", help="how anchors are stored")
    parser.add_argument("--seed", type=int, default=0)


def learn(
    backend: HFBackend,
    template: Template,
    base: Base,
    estimators: dict[str, Estimator],
    store: Codec,
    count: int,
    rng: random.Random,
) -> list[int]:
    """Feeds the estimators the anchors of `count` requests, as they would come back from storage; returns bytes per anchor."""
    sizes = []
    for i in range(count):
        seen = case(backend, template, base, rng, CLASSES[i % len(CLASSES)])
        for number, piece in enumerate(seen.pieces):
            span = piece.span
            parts = deviation(backend, seen, number)
            anchor = Anchor(
                piece.slot, seen.ids[span.start : span.end], pack(store, parts[0]), pack(store, parts[1]),
                backend.context(seen.ids[: span.start]), span.segment.context, seen.ids[: span.start], backend.fingerprint,
            )  # fmt: skip
            sizes.append(anchor.nbytes)
            kept = unpack(store, anchor.base), unpack(store, anchor.deviation)
            for estimator in estimators.values():
                estimator.learn(anchor, *kept)
    return sizes


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document. Raises InputError for unusable flags."""
    if args.quick:
        args.templates, args.requests, args.anchors, args.bases = 2, 24, 10, list(args.bases)[:1]
    if args.requests < args.templates or args.templates < 1 or args.documents < 2:
        raise InputError(
            f"{args.requests} requests over {args.templates} templates of {args.documents} documents; "
            "at least one request per template and two documents are needed"
        )
    methods = [Method.parse(name) for name in args.methods or (QUICK if args.quick else METHODS)]
    backend = load(args.model, dtype="float32")
    early, store = Early(backend), codec(args.codec)
    rows: list[dict[str, Any]] = []
    each = args.requests // args.templates
    total = len(args.bases) * args.templates * (args.anchors + each)
    with tqdm(total=total, disable=args.quiet, leave=False) as bar:
        for base in args.bases:
            outcomes: dict[str, list[tuple[Case, Outcome]]] = {m.name: [] for m in methods}
            sizes: list[int] = []
            for template in templates(args.templates, args.documents, tuple(args.fillers), args.seed):
                rng = random.Random(f"{args.seed} {template.name}")
                estimators = make({m.estimator for m in methods if m.estimator})
                sizes += learn(backend, template, base, estimators, store, args.anchors, rng)
                bar.update(args.anchors)
                for i in range(each):
                    asked = case(backend, template, base, rng, CLASSES[i % len(CLASSES)])
                    for method in rng.sample(methods, len(methods)):
                        outcomes[method.name].append((asked, serve(backend, asked, method, estimators, early)))
                    bar.update()
            for method in methods:
                rows += _rows(method, base, args.anchors, outcomes[method.name], fmean(sizes) if sizes else None)
    _beside_dense(rows)
    return document(
        "kvcomm.bench.fidelity/1", model=args.model, templates=args.templates, requests=each * args.templates,
        documents=args.documents, fillers=list(args.fillers), codec=args.codec, seed=args.seed, methods=rows,
    )  # fmt: skip


def _rows(
    method: Method, base: Base, anchors: int, served: Sequence[tuple[Case, Outcome]], size: float | None
) -> list[dict[str, Any]]:
    """One row per binding class and one for all."""
    rows = []
    for binding in (*CLASSES, "all"):
        some = [(c, o) for c, o in served if binding in ("all", c.binding)]
        if not some:
            continue
        right = sum(o.right for _, o in some)
        low, high = wilson(right, len(some))
        outcomes = [o for _, o in some]
        rows.append(
            {
                "name": method.name,
                "base": base,
                "binding": binding,
                "anchors": anchors if method.estimator else 0,
                "requests": len(some),
                "accuracy": right / len(some),
                "accuracy_low": low,
                "accuracy_high": high,
                "dense_accuracy": fmean(c.dense_right for c, _ in some),
                "kl": fmean(o.kl for o in outcomes),
                "top1": fmean(o.top1 for o in outcomes),
                "token_reuse_rate": fmean(o.reused for o in outcomes),
                "compute_share": fmean(o.compute for o in outcomes),
                "declined_rate": fmean(o.declined for o in outcomes),
                "went_dense_rate": fmean(o.went_dense for o in outcomes),
                "ttft_ms": median(sum(o.ms.values()) for o in outcomes),
                "split_ms": {name: median(o.ms[name] for o in outcomes) for name in outcomes[0].ms},
                "dense_ms": None,
                "bytes_per_anchor": size if method.estimator else None,
            }
        )
    return rows


def _beside_dense(rows: list[dict[str, Any]]) -> None:
    """Fills in the dense time of the same requests, where dense ran."""
    times = {(r["base"], r["binding"]): r["ttft_ms"] for r in rows if r["name"] == "dense"}
    for row in rows:
        row["dense_ms"] = times.get((row["base"], row["binding"]))


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p, z2 = right / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def run(args: argparse.Namespace) -> int:
    began = perf_counter()
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        for base in dict.fromkeys(r["base"] for r in doc["methods"]):
            print(f"\nbase: {base}")
            print(
                f"{'method':<22}{'all':>7}"
                + "".join(f"{c:>9}" for c in CLASSES)
                + f"{'KL':>8}{'reuse':>8}{'compute':>9}{'ms':>8}"
            )
            for name in dict.fromkeys(r["name"] for r in doc["methods"]):
                by = {r["binding"]: r for r in doc["methods"] if r["name"] == name and r["base"] == base}
                whole = by["all"]
                cost = f"{whole['token_reuse_rate']:>8.3f}{whole['compute_share']:>9.3f}{whole['ttft_ms']:>8.1f}"
                print(
                    f"{name:<22}{whole['accuracy']:>7.3f}"
                    + "".join(f"{by[c]['accuracy']:>9.3f}" if c in by else f"{'-':>9}" for c in CLASSES)
                    + f"{whole['kl']:>8.3f}{cost}"
                )
        print(f"\n{doc['requests']} requests, {perf_counter() - began:.0f} s")
    if args.output:
        write_json(Path(args.output) / "fidelity.json", doc)
    return 0
