"""`kvcomm replay`: recorded calls served by a model under every policy, each beside dense."""

from __future__ import annotations

import argparse
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kvcomm._version import __version__
from kvcomm.errors import InputError
from kvcomm.replay.graph import Turn, order
from kvcomm.replay.policies import POLICIES, Policy, named
from kvcomm.replay.readers import Trace, read_trace
from kvcomm.replay.results import Log, Row, write_csv
from kvcomm.report import document, dumps, write_json
from kvcomm.tiny import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvcomm.replay.player import Player

__all__ = ["add_arguments", "run"]

OFFERED = {"hf": tuple(POLICIES), "vllm": tuple(name for name in POLICIES if name != "anchor")}  # backend -> policies
WRITTEN = ("calls.jsonl", "calls.csv", "replay.json", "replay.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm replay`."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file or folder of recorded calls, in any known format")
    parser.add_argument(
        "--model", default=str(FOLDER), metavar="ID", help="Hugging Face id or folder (default: the embedded model)"
    )
    parser.add_argument("--backend", choices=tuple(OFFERED), default="hf", help="what runs the model (default: hf)")
    parser.add_argument(
        "--policies",
        metavar="LIST",
        help=f"of {','.join(POLICIES)} (default: all that the backend has; dense is always there)",
    )
    parser.add_argument("--live", action="store_true", help="let outputs flow instead of keeping the recorded ones")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of a live output (default: 256)")
    parser.add_argument("--sessions", type=int, metavar="N", help="the first N sessions only")
    parser.add_argument("--across", action="store_true", help="let sessions find each other's text")
    parser.add_argument(
        "--positions", type=int, default=512, metavar="N", help="answer positions compared with dense, at most (default: 512)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens that the model may read, also beyond those it was made for: it gets worse there, dense as well",
    )
    parser.add_argument("--dtype", default="float32", help="the model's dtype (default: float32)")
    parser.add_argument("--strict", action="store_true", help="a broken record of the trace is an error")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which policies serve a call")


def run(args: argparse.Namespace) -> int:
    turns, trace = _turns(args)
    if args.backend == "vllm" and "anchor" in re.split(r"[\s,]+", args.policies or ""):
        raise InputError("policy 'anchor' needs --backend hf: on vLLM, anchors are a setting of the whole engine; leave it out")
    policies = named(",".join(OFFERED[args.backend]) if args.policies is None else args.policies, OFFERED[args.backend])
    if args.output:
        _prepare(args.output)
    with _player(args) as player:
        rows, doc = _replay(args, turns, trace, policies, player)
    if args.output:
        _write(args.output, rows, doc)
    if args.format == "json":
        print(dumps(doc))
    else:
        from kvcomm.replay.page import terminal

        print(terminal(doc))
        if args.output:
            print(f"\nwritten: {', '.join(str(args.output / name) for name in WRITTEN)}")
    if not doc["calls_served"]:
        reason = next(row.skipped for row in rows if row.skipped)
        raise InputError(f"none of the {len(rows)} calls could be replayed; the first one: {reason}")
    return 1 if any(row.failed for row in rows) else 0


def _turns(args: argparse.Namespace) -> tuple[list[Turn], Trace]:
    """The calls in order, and what of the trace could not be read. Raises InputError where there is nothing to replay."""
    for name, least in {"sessions": 1, "positions": 1, "max_new_tokens": 1, "context": 2}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    trace = read_trace(args.trace, strict=args.strict)
    turns = order(trace)
    if args.sessions is not None:
        first = list(dict.fromkeys(turn.call.session for turn in turns))[: args.sessions]
        turns = [turn for turn in turns if turn.call.session in first]
    if not turns:
        raise InputError(f"{args.trace} has no calls")
    return turns, trace


@contextmanager
def _player(args: argparse.Namespace) -> Iterator[Player]:
    if args.backend == "vllm":
        from kvcomm.replay import vllm

        player = vllm.start(args.model, args.dtype, args.context, args.positions, quiet=args.quiet)
        try:
            yield player
        finally:
            player.close()
        return
    from kvcomm.backends.loading import dtype_named, load
    from kvcomm.replay.hf import HFPlayer

    longer = {} if args.context is None else {"max_position_embeddings": args.context}
    backend = load(args.model, dtype=dtype_named(args.dtype), **longer)
    limit = backend.context_limit
    if args.context is not None and limit is not None and limit < args.context:
        raise InputError(f"--context is {args.context}, and this model's context stays {limit}; leave the flag out")
    if backend.tokenizer is not None:
        backend.tokenizer.model_max_length = 1 << 62  # it would warn of what is said here, call by call
    yield HFPlayer(backend, args.positions)


def _replay(
    args: argparse.Namespace, turns: list[Turn], trace: Trace, policies: tuple[Policy, ...], player: Player
) -> tuple[list[Row], dict[str, Any]]:
    from kvcomm.replay.runner import Options, replay, warm_up
    from kvcomm.replay.summary import summarise

    options = Options(policies, args.live, args.across, args.max_new_tokens, args.seed)
    model = args.model if args.model != str(FOLDER) else "embedded"
    facts = {
        "model": model,
        "backend": args.backend,
        "dtype": args.dtype,
        "live": args.live,
        "across_sessions": args.across,
        "positions": args.positions,
        "context": args.context,
        "max_new_tokens": args.max_new_tokens if args.live else None,
        "seed": args.seed,
    }
    head = {
        "kvcomm_version": __version__,
        "trace": _fingerprint(turns),
        **facts,
        "policies": _configured(policies),
        "identity": player.identity(),
    }
    with Log(args.output and args.output / "calls.jsonl", head) as log:
        resumed = len(log.rows)
        if resumed < len(turns):
            warm_up(player, options)
        with tqdm(total=len(turns), desc="calls", disable=args.quiet, leave=False) as bar:
            replay(turns, player, options, log, lambda _: bar.update())
    rows = [log.rows[turn.number] for turn in turns]
    names = [policy.name for policy in policies]
    return rows, document(
        "kvcomm.replay/1",
        trace=trace.name,
        **facts,
        context_tokens=player.limit,
        resumed_calls=resumed,
        about={policy.name: policy.about for policy in policies},
        formats=dict(trace.formats),
        unread=trace.skipped,
        unread_first=[str(problem) for problem in trace.problems],
        **summarise(rows, names),
    )


def _configured(policies: tuple[Policy, ...]) -> dict[str, Any]:
    from kvcomm.config import Config

    return {p.name: {"rule": p.rule, **asdict(Config.from_env(**p.changes))} for p in policies}


def _fingerprint(turns: list[Turn]) -> str:
    digest = blake2b(digest_size=12)
    for turn in turns:
        call = turn.call
        said = [
            call.session,
            call.agent,
            [(m.role, m.content) for m in call.messages],
            call.output,
            [asdict(r) for r in turn.reads],
        ]
        digest.update(json.dumps(said).encode())
    return f"{len(turns)} calls {digest.hexdigest()}"


def _prepare(folder: Path) -> None:
    """Makes the folder before a model is loaded in vain. Raises InputError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise InputError(f"--output {folder} cannot be made: {why}; give a folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--output {folder} may not be written to; give another folder")


def _write(folder: Path, rows: list[Row], doc: dict[str, Any]) -> None:
    from kvcomm.replay.page import page

    write_csv(folder / "calls.csv", rows)
    write_json(folder / "replay.json", doc)
    (folder / "replay.html").write_text(page(doc, rows), encoding="utf-8")
