"""`kvcomm demo`: three workloads, a five-agent team, every request densely and shared in turn."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvcomm.agents.team import Generator, Team
from kvcomm.backends.loading import dtype_named, load
from kvcomm.demo import on_processes, on_vllm, runner
from kvcomm.demo.on_processes import Processes
from kvcomm.demo.page import page, terminal
from kvcomm.demo.runner import RECORDED
from kvcomm.demo.summary import summarise
from kvcomm.demo.workloads import ROLES, SPARE, Task, default_team, make_task, own_questions
from kvcomm.errors import InputError
from kvcomm.replay.recording.recorder import Recorder
from kvcomm.report import document, dumps, write_json
from kvcomm.tiny import FOLDER

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm demo`."""
    parser.add_argument(
        "--model", default=str(FOLDER), metavar="ID", help="Hugging Face id or folder (default: the embedded model)"
    )
    parser.add_argument("--team", type=Path, metavar="FILE", help="a team as YAML instead of the built-in ones (docs/teams.md)")
    parser.add_argument("--requests", type=int, default=24, metavar="N", help="team requests in all (default: 24)")
    parser.add_argument("--agents", type=int, default=5, metavar="N", help="agents of the built-in teams (default: 5)")
    parser.add_argument("--documents", type=int, default=6, metavar="N", help="documents that every agent reads (default: 6)")
    parser.add_argument(
        "--backend", choices=("hf", "vllm"), default="hf", help="what runs the model: Hugging Face, or a vLLM in this process"
    )
    parser.add_argument(
        "--processes",
        action="store_true",
        help="also the team as processes that share through a server: each agent with a model of its own in memory",
    )
    parser.add_argument("--dtype", default="float32", help="the model's dtype (default: float32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the dense arm's calls to this file")


def measure(args: argparse.Namespace, record: Recorder | None = None) -> dict[str, Any]:
    """Runs the demo and returns its JSON document. Raises InputError for flags that cannot be used."""
    most = len(ROLES["math"]) + len(SPARE)
    for name, value, low, high in (
        ("requests", args.requests, 1, None),
        ("agents", args.agents, 2, most),
        ("documents", args.documents, 2, 26),
    ):
        if value < low or (high is not None and value > high):
            raise InputError(f"--{name} is {value}; it must be at least {low}" + (f" and at most {high}" if high else ""))
    if args.processes and args.backend != "hf":
        raise InputError(f"--processes is measured on --backend hf, not on {args.backend}; leave one of them out")
    team = own_questions(Team.from_yaml(args.team)) if args.team else None
    dtype_named(args.dtype)
    names = list(ROLES)
    teams = {name: team or default_team(name, args.agents) for name in names}
    rng = random.Random(args.seed)
    tasks = [
        make_task(rng, names[i % len(names)], teams[names[i % len(names)]].agents, args.documents) for i in range(args.requests)
    ]
    with _arms(args, teams) as generators:
        _warm_up(generators, teams, make_task(random.Random(~args.seed), names[0], teams[names[0]].agents, 2))
        arm = generators.get("processes")
        apart = arm if isinstance(arm, Processes) else None
        if apart:
            apart.begin()
        with tqdm(total=len(tasks) * len(generators), desc="requests x arms", disable=args.quiet, leave=False) as bar:
            calls = runner.run(
                generators, teams, tasks, seed=args.seed, tick=bar.update, record=record, reader=apart.reader if apart else None
            )
        tally, threads = apart.tally() if apart else None, torch.get_num_threads()
    summary = summarise(calls)
    doc = document(
        "kvcomm.demo/1",
        model=args.model if args.model != str(FOLDER) else "embedded",
        backend=args.backend,
        arms=list(generators),
        dtype=args.dtype,
        seed=args.seed,
        teams={name: {"agents": [a.name for a in t.agents], "graph": t.graph()} for name, t in teams.items()},
        processes=tally,
        all=summary.pop("all"),
        workloads=summary,
        example=[c for c in calls if c.request == 0 and c.arm in ("dense", "shared", "processes")],
    )
    doc["machine"]["torch_threads"] = threads  # as it ran
    return doc


@contextmanager
def _arms(args: argparse.Namespace, teams: Mapping[str, Team]) -> Iterator[Mapping[str, Generator]]:
    """One generator per arm, on the backend that was asked for."""
    if args.backend == "vllm":
        with on_vllm.arms(args.model, args.dtype, quiet=args.quiet) as generators:
            yield generators
        return
    backend = load(args.model, dtype=dtype_named(args.dtype))
    if args.processes:
        with _a_core_left(), on_processes.arms(backend, args.model, args.dtype, teams) as generators:
            yield generators
    else:
        yield runner.arms(backend)


@contextmanager
def _a_core_left() -> Iterator[None]:
    """Inside, torch computes on all cores but one, in every arm: the server runs beside the agents."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(min(threads, (os.cpu_count() or 2) - 1), 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _warm_up(generators: Mapping[str, Generator], teams: dict[str, Team], task: Task) -> None:
    """The first calls of a process pay for its set-up; they belong to no arm."""
    runner.run(generators, teams, [task], seed=0)


def run(args: argparse.Namespace) -> int:
    """1 where a record was asked for and calls are not in it."""
    with Recorder(args.record) if args.record else nullcontext() as record:
        doc = measure(args, record)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(terminal(doc))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "demo.json", doc)
        (args.output / "demo.html").write_text(page(doc), encoding="utf-8")
        if args.format == "terminal":
            print(f"\nwritten: {args.output / 'demo.json'}, {args.output / 'demo.html'}")
    if record is not None and args.format == "terminal":
        print(f"\nrecorded: {record.written} calls of the {RECORDED} arm in {args.record}")
    return 1 if record is not None and record.lost else 0
