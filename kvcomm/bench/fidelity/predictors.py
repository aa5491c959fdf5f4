"""`kvcomm bench predictors`: which sign tells, before anything is emitted, that reuse would change the answer.

For every method and every sign of `signs.py`: the AUC for unsafe requests, and the accuracy of those kept by a bound on it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from kvcomm.backends.loading import load
from kvcomm.bench.fidelity.cases import BASES, case, templates
from kvcomm.bench.fidelity.early import Early
from kvcomm.bench.fidelity.methods import Method
from kvcomm.bench.fidelity.nearby import Nearby
from kvcomm.bench.fidelity.ranking import auc, auc_interval, kept_accuracy
from kvcomm.bench.fidelity.signs import Read, about, read
from kvcomm.bench.fidelity.trial import CLASSES, learn
from kvcomm.codecs import codec
from kvcomm.errors import InputError
from kvcomm.estimators.catalogue import make
from kvcomm.report import document, dumps, write_json
from kvcomm.tiny import FOLDER

__all__ = ["METHODS", "add_arguments", "measure", "run"]

METHODS = ("boundary:2", "paper", "knn", "select+refresh:0.02")
KEPT = (0.5, 0.7, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench predictors`."""
    parser.add_argument("--model", default=str(FOLDER), metavar="ID", help="a model that speaks the language of kvcomm.tiny")
    parser.add_argument("--templates", type=int, default=6)
    parser.add_argument("--requests", type=int, default=300, help="over all templates")
    parser.add_argument("--anchors", type=int, default=20, help="requests that each template learns from")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument(
        "--fillers", type=int, nargs=2, default=(18, 26), metavar=("LEAST", "MOST"), help="sentences per document"
    )
    parser.add_argument("--base", default="isolated", choices=BASES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--codec", default="int8", help="how anchors are stored")
    parser.add_argument("--seed", type=int, default=0)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document. Raises InputError for unusable flags."""
    if args.requests < args.templates or args.templates < 1 or args.documents < 2 or args.anchors < 1:
        raise InputError(
            f"{args.requests} requests over {args.templates} templates of {args.documents} documents after {args.anchors} "
            "learned from; at least one request per template, two documents and one to learn from are needed"
        )
    methods = [Method.parse(name) for name in args.methods]
    backend = load(args.model, dtype="float32")
    early, each = Early(backend), args.requests // args.templates
    reads: dict[str, list[Read]] = {m.name: [] for m in methods}
    with tqdm(total=args.templates * (args.anchors + each), disable=args.quiet, leave=False) as bar:
        for template in templates(args.templates, args.documents, tuple(args.fillers), args.seed):
            rng, nearby = random.Random(f"{args.seed} {template.name}"), Nearby()
            estimators = make({"knn", "select", *(m.estimator for m in methods if m.estimator)})
            pupils = {**estimators, nearby.name: nearby}
            learn(backend, template, args.base, pupils, codec(args.codec), args.anchors, rng)
            bar.update(args.anchors)
            for i in range(each):
                asked = case(backend, template, args.base, rng, CLASSES[i % len(CLASSES)])
                known = about(backend, asked, estimators, nearby)
                for method in methods:
                    reads[method.name].append(read(backend, asked, method, estimators, early, known))
                bar.update()
    return document(
        "kvcomm.bench.predictors/1", model=args.model, templates=args.templates, requests=each * args.templates,
        anchors=args.anchors, documents=args.documents, fillers=list(args.fillers), base=args.base, codec=args.codec,
        seed=args.seed, predictors=[row for name, some in reads.items() for row in rows(name, some)],
    )  # fmt: skip


def rows(method: str, reads: Sequence[Read]) -> list[dict[str, Any]]:
    """One per predictor. `auc` is None where all requests are safe, or none."""
    out, unsafe, right = [], [r.unsafe for r in reads], [r.right for r in reads]
    for name in reads[0].signs:
        scores = [r.signs[name] for r in reads]
        low, high = auc_interval(scores, unsafe) or (None, None)
        out.append(
            {
                "method": method,
                "predictor": name,
                "auc": auc(scores, unsafe),
                "auc_low": low,
                "auc_high": high,
                "unsafe_rate": fmean(unsafe),
                "accuracy": fmean(right),
                "kept": [{"share": share, "accuracy": kept_accuracy(scores, right, share)} for share in KEPT],
            }
        )
    return out


def table(doc: dict[str, Any]) -> str:
    """Predictors by method: AUC, then accuracy of the best half, 70 % and 90 %."""
    found, lines = doc["predictors"], []
    for method in dict.fromkeys(r["method"] for r in found):
        some = [r for r in found if r["method"] == method]
        lines.append(f"\n{method}: unsafe {some[0]['unsafe_rate']:.3f}, accuracy {some[0]['accuracy']:.3f}")
        lines.append(f"{'predictor':<22}{'AUC':>7}{'95 %':>15}" + "".join(f"{f'best {k:.0%}':>10}" for k in KEPT))
        for row in some:
            value = "      -" + " " * 15 if row["auc"] is None else f"{row['auc']:>7.3f}{_interval(row):>15}"
            lines.append(f"{row['predictor']:<22}{value}" + "".join(f"{k['accuracy']:>10.3f}" for k in row["kept"]))
    return "\n".join([*lines, f"\n{doc['requests']} requests"])


def _interval(row: dict[str, Any]) -> str:
    return f"{row['auc_low']:.3f}-{row['auc_high']:.3f}"


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    print(dumps(doc) if args.format == "json" else table(doc))
    if args.output:
        write_json(Path(args.output) / "predictors.json", doc)
    return 0
