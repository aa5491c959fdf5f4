"""`kvcomm bench fidelity`: every method on the same requests, beside dense, by binding class and base.

Under one setting, or with `--axis` at every value of that axis. All results in one folder share one page.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from kvcomm.backends.loading import load
from kvcomm.bench.fidelity import trial
from kvcomm.bench.fidelity.cases import BASES, Base
from kvcomm.bench.fidelity.methods import Method
from kvcomm.bench.fidelity.page import page
from kvcomm.bench.fidelity.rows import pairs, rows
from kvcomm.bench.fidelity.settings import AXES, Setting, along
from kvcomm.bench.fidelity.table import table
from kvcomm.errors import InputError
from kvcomm.report import document, dumps, write_json
from kvcomm.tiny import FOLDER

__all__ = ["METHODS", "add_arguments", "measure", "run"]

METHODS = (
    "dense naive rotate boundary:1 boundary:2 boundary:4 boundary:8 boundary:16 "
    "cacheblend:0.05 cacheblend:0.1 cacheblend:0.2 cacheblend:0.3 paper mean knn ridge ridge-shared edges "
    "paper+boundary:2 knn+boundary:2 ridge-shared+boundary:2 paper+residual:0.05 knn+refresh:0.05 ridge-shared+refresh:0.05 "
    "select+refresh:0.02 select+refresh:0.03 select+refresh:0.05 select+refresh:0.1 select+above:4 "
    "rotate+random:0.05 rotate+oracle:0.05"
).split()
QUICK = (
    "dense naive rotate boundary:2 boundary:8 cacheblend:0.1 paper mean ridge-shared select+refresh:0.05 select+above:4".split()
)
SWEEP = "dense rotate boundary:8 cacheblend:0.05 paper knn+refresh:0.05 select+refresh:0.05 select+above:4".split()
CODEC = "dense knn+refresh:0.05 select+refresh:0.05".split()


@dataclass(frozen=True)
class Preset:
    """What is used where a flag is not given."""

    templates: int
    requests: int
    anchors: int
    bases: tuple[Base, ...]
    methods: list[str]


FULL = Preset(6, 300, 50, BASES, METHODS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench fidelity`."""
    parser.add_argument("--model", default=str(FOLDER), metavar="ID", help="a model that speaks the language of kvcomm.tiny")
    parser.add_argument("--quick", action="store_true", help="2 templates, 24 requests, fewer methods: under a minute")
    parser.add_argument("--axis", choices=AXES, help="at every value of it: 60 requests each, fewer methods, base isolated")
    parser.add_argument("--at", nargs="+", default=(), metavar="VALUE", help="values of the axis, instead of its own")
    parser.add_argument("--templates", type=int, help="default: 6")
    parser.add_argument("--requests", type=int, help="over all templates; default: 300")
    parser.add_argument("--anchors", type=int, help="requests that each template learns from; default: 50")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument(
        "--fillers", type=int, nargs=2, default=(18, 26), metavar=("LEAST", "MOST"), help="sentences per document"
    )
    parser.add_argument("--bases", nargs="+", choices=BASES, help="default: all")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: about thirty")
    parser.add_argument("--codec", default="int8", help="how anchors are stored")
    parser.add_argument("--seed", type=int, default=0)


def _preset(args: argparse.Namespace) -> Preset:
    bases = tuple(args.bases or BASES)[:1]
    if args.quick:
        return Preset(2, 24, 10, bases, QUICK)
    if args.axis:
        return Preset(3, 60, 20, bases, CODEC if args.axis == "codec" else SWEEP)
    return FULL


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document. Raises InputError for unusable flags."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    preset = Preset(**{name: given.get(name, default) for name, default in asdict(_preset(args)).items()})
    if preset.requests < preset.templates or preset.templates < 1:
        raise InputError(
            f"{preset.requests} requests over {preset.templates} templates; at least one request per template is needed"
        )
    methods, each = [Method.parse(name) for name in preset.methods], preset.requests // preset.templates
    fixed = [Setting(b, args.documents, tuple(args.fillers), preset.anchors, "same", args.codec) for b in preset.bases]
    settings = [setting for one in fixed for setting in along(args.axis, tuple(args.at), one)]
    backend, trials, served = load(args.model, dtype="float32"), list[trial.Trial](), set[tuple[object, str]]()
    with tqdm(total=sum(preset.templates * (s.anchors + each) for s in settings), disable=args.quiet, leave=False) as bar:
        for setting in settings:
            # what learns nothing does the same at every setting that asks the same
            todo = [m for m in methods if m.estimator or (setting.asked, m.name) not in served]
            served |= {(setting.asked, m.name) for m in todo}
            trials.append(trial.run(backend, setting, todo, preset.templates, each, args.seed, bar.update))
    return document(
        "kvcomm.bench.fidelity/1", model=args.model, axis=args.axis, templates=preset.templates,
        requests=each * preset.templates, documents=args.documents, fillers=list(args.fillers), anchors=preset.anchors,
        codec=args.codec, seed=args.seed, methods=rows(trials), pairs=pairs(trials),
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    began = perf_counter()
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(f"{table(doc)}\n\n{doc['requests']} requests per setting, {perf_counter() - began:.0f} s")
    if args.output:
        folder, suffix = Path(args.output), f"-{args.axis}" if args.axis else ""
        write_json(folder / f"fidelity{suffix}.json", doc)
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("fidelity*.json"))]
        (folder / "fidelity.html").write_text(page([d for d in found if "axis" in d]), encoding="utf-8")
        if args.format == "terminal":
            print(f"written: {folder / f'fidelity{suffix}.json'}, {folder / 'fidelity.html'}")
    return 0
