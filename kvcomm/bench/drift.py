"""`kvcomm bench drift`: does reuse with anchors keep its quality and its rate while what is asked about changes?

Documents are prefilled alone, without the headers that requests put in front of them (half of the requests name other owners
there, which changes what is true), and asked about for a while; then others take their place, and the kind of document changes.
Every request is answered densely, shared, and shared without anchors (rotation and boundary alone). In the middle the shared
engine is lost: a new one has an empty store, and of the anchors what was last committed to the disk.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from kvcomm.anchors import snapshot
from kvcomm.backends.loading import load
from kvcomm.config import Config
from kvcomm.engine import KVComm, Output
from kvcomm.errors import InputError
from kvcomm.matching import TextIndex
from kvcomm.page import render
from kvcomm.plot import Canvas, scale_x, scale_y
from kvcomm.report import document, dumps, write_json
from kvcomm.tiny import FOLDER, tasks
from kvcomm.tiny.words import DOMAINS, ROLES, STYLES

__all__ = ["add_arguments", "measure", "page", "run"]

ALIVE = 6  # sets of documents that are asked about at one time
AGENTS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench drift`."""
    parser.add_argument("--model", default=str(FOLDER), metavar="ID", help="a model that speaks the language of kvcomm.tiny")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=5, help="of one request")
    parser.add_argument("--renew", type=int, default=10, metavar="N", help="a set of documents leaves every N requests")
    parser.add_argument("--windows", type=int, default=20, help="parts of the run that are reported apart")
    parser.add_argument("--store-mb", type=int, default=256)
    parser.add_argument("--anchor-mb", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)


ARMS = ("dense", "shared", "without_anchors")


@dataclass(frozen=True)
class Answer:
    """One arm's answer to one request."""

    right: bool
    output: Output


@dataclass(frozen=True)
class Question:
    """One request, and what it reads that was known before."""

    agent: str
    messages: list[dict[str, str]]
    item: tasks.Item
    contents: list[str]  # of the documents, each without its header


def questions(requests: int, documents: int, renew: int, rng: random.Random) -> Iterator[Question]:
    """The kind of documents changes from one third of the run to the next."""
    agents = list(zip(rng.sample(ROLES, AGENTS), STYLES * AGENTS, strict=False))
    alive: list[tasks.World] = []
    for i in range(requests):
        if i % renew == 0 or not alive:
            domain = list(DOMAINS.values())[i * len(DOMAINS) // requests]
            new = tasks.make_world(rng, domain, documents, fillers=(18, 26), explicit=0.4)
            alive = [*alive, new][-ALIVE:]
        world, (role, style) = rng.choice(alive), agents[i % AGENTS]
        if rng.random() < 0.5:
            world = renamed(world, rng)
        item = tasks.ask(rng, world, style)
        texts = world.documents(rng)
        messages = [
            {"role": "system", "content": tasks.role_text(role, style)},
            {"role": "user", "content": tasks.user_text(texts, [], [item])},
        ]
        yield Question(role, messages, item, [" " + text.partition(" : ")[2] for text in texts])


def renamed(world: tasks.World, rng: random.Random) -> tasks.World:
    """The same contents behind headers that name other owners; what else names an owner stays as it is."""
    old = [text.split(" :")[0].split()[-1] for bundle in world.bundles for text in bundle[:1]]
    inside = " ".join(text.partition(" : ")[2] for text in world.documents()).split()
    new = dict(zip(old, rng.sample([o for o in world.domain.owners if o not in {*old, *inside}], len(old)), strict=True))
    out = replace(world, facts={}, binding={}, bundles=[], memos={}, asked=set())
    for (owner, attribute), value in world.facts.items():
        named = owner not in new or world.binding[owner, attribute] != "header"
        key = (owner if named else new[owner], attribute)
        out.facts[key], out.binding[key] = value, world.binding[owner, attribute]
    for first, *rest in world.bundles:
        header, _, content = first.partition(" : ")
        name = header.split()[-1]
        out.bundles.append([f"{header.removesuffix(name)}{new[name]} : {content}", *rest])
    return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document. Raises InputError for unusable flags."""
    if args.requests < 2 * args.windows or args.windows < 1 or min(args.documents, args.renew) < 1:
        raise InputError(
            f"{args.requests} requests in {args.windows} windows, {args.documents} documents, renewed every {args.renew}: "
            "at least 2 requests per window, and 1 of each other"
        )
    backend = load(args.model, dtype="float32")
    config = Config(store_bytes=args.store_mb << 20, anchor_bytes=args.anchor_mb << 20)
    arms = {
        "dense": KVComm(backend, config=Config(mode="off")),
        "shared": KVComm(backend, config=config),
        "without_anchors": KVComm(backend, config=replace(config, anchors="off")),
    }
    rng, rows, done = random.Random(args.seed), list[dict[str, Any]](), list[dict[str, Answer]]()
    each = args.requests // args.windows
    lost = each * (args.windows // 2) + each // 2  # in the middle of a window, so that not everything is committed
    with TemporaryDirectory() as folder, tqdm(total=each * args.windows, disable=args.quiet, leave=False) as bar:
        for i, question in enumerate(questions(each * args.windows, args.documents, args.renew, rng), 1):
            done.append(_ask(question, arms, rng))
            if i == lost:
                arms["shared"], crash = _restarted(arms["shared"], folder)
            if i % each == 0:
                shared = arms["shared"]
                shared.anchors.check_integrity()
                assert isinstance(shared.index, TextIndex)
                shared.index.check_integrity()
                rows.append(_row(i, done, shared))
                snapshot.save(shared.anchors, folder)
                done = []
            bar.update()
    return document(
        "kvcomm.bench.drift/1", model=args.model, requests=each * args.windows, documents=args.documents, renew=args.renew,
        seed=args.seed, anchor_limit_bytes=config.anchor_bytes, store_limit_bytes=config.store_bytes,
        crash={"after": lost, **crash}, faults=arms["shared"].counters.total("faults"), windows=rows,
    )  # fmt: skip


def _restarted(shared: KVComm, folder: str) -> tuple[KVComm, dict[str, int]]:
    """A new engine with the anchors that `folder` holds, and how many there were and are."""
    new = KVComm(shared.backend, config=shared.config)
    loaded = snapshot.load(new.anchors, folder, shared.backend.fingerprint)
    return new, {"held_anchors": len(shared.anchors), "restored_anchors": loaded.anchors}


def _ask(question: Question, arms: Mapping[str, KVComm], rng: random.Random) -> dict[str, Answer]:
    """By arm. The arms take turns at being the first."""
    out = {}
    for arm in rng.sample(ARMS, len(ARMS)):
        for content in question.contents if arm != "dense" else ():
            arms[arm].prefill(content)
        output = arms[arm].generate(question.messages, agent=question.agent, max_new_tokens=32, do_sample=False)
        out[arm] = Answer(tasks.score([question.item], output.text) == [True], output)
    return out


def _row(end: int, done: list[dict[str, Answer]], shared: KVComm) -> dict[str, Any]:
    reports = [answers["shared"].output.report for answers in done]
    prompt = sum(r.prompt_tokens for r in reports)
    return {
        "end": end,  # requests so far
        "requests": len(done),
        **{f"accuracy_{arm}": fmean(answers[arm].right for answers in done) for arm in ARMS},
        "answers_equal": fmean(a["shared"].output.token_ids == a["dense"].output.token_ids for a in done),
        "token_reuse_rate": sum(r.reused_tokens for r in reports) / prompt,
        "anchor_rate": sum(r.tokens_by_rung["anchor"] for r in reports) / prompt,
        "learning_rate": fmean(r.fallback == "learning" for r in reports),
        **{f"ttft_{arm}_ms": median(answers[arm].output.ttft_ms for answers in done) for arm in ARMS},
        "learn_ms": median(r.learn_ms or 0.0 for r in reports),
        "anchors": len(shared.anchors),
        "anchor_bytes": shared.anchors.nbytes,
        "evicted": shared.anchors.stats().evicted,
    }


def page(doc: dict[str, Any]) -> str:
    """Quality and reuse over time, as one HTML file."""
    quality = {
        "dense": ("accuracy_dense", "#1c2330"),
        "shared": ("accuracy_shared", "#2f8f4e"),
        "without anchors": ("accuracy_without_anchors", "#c0504d"),
    }
    reuse = {
        "reused": ("token_reuse_rate", "#2f8f4e"),
        "by anchors": ("anchor_rate", "#7a5cb8"),
        "learned from": ("learning_rate", "#d98a1f"),
    }
    plots = [_over_time(doc, quality, "right answers"), _over_time(doc, reuse, "share of tokens, of requests")]
    return render(Path(__file__).with_name("drift.html"), doc=doc, plots=plots)


def _over_time(doc: dict[str, Any], lines: Mapping[str, tuple[str, str]], title: str) -> Canvas:
    x, y = scale_x(0, doc["windows"][-1]["end"], right=110), scale_y(0, 1.04)
    canvas = Canvas(x, y, "requests", title, x.ticks(), y.ticks())
    canvas.line([(x(doc["crash"]["after"]), y(0)), (x(doc["crash"]["after"]), y(1))], "#8b95a7", dashed=True)
    ends = []
    for name, (field, colour) in lines.items():
        points = [(x(w["end"]), y(w[field])) for w in doc["windows"]]
        canvas.line(points, colour)
        ends.append((points[-1][0] + 8, points[-1][1], name, colour))
    canvas.name_ends(ends)
    return canvas


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        names = [f"accuracy_{arm}" for arm in ARMS] + ["token_reuse_rate", "learning_rate", "ttft_dense_ms", "ttft_shared_ms"]
        print("  ".join(("requests", *names, "anchors")))
        for row in doc["windows"]:
            cells = [f"{row[name]:>{len(name)}.{1 if name.endswith('ms') else 3}f}" for name in names]
            print("  ".join([f"{row['end']:>8}", *cells, f"{row['anchors']:>7}"]))
        print(f"crash: {doc['crash']}; faults: {doc['faults']}")
    if args.output:
        write_json(Path(args.output) / "drift.json", doc)
        (Path(args.output) / "drift.html").write_text(page(doc), encoding="utf-8")
    return 0
