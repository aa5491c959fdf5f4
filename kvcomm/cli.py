"""The command line: finds the chosen command, loads its module and nothing else, and turns errors into exit codes.

A command is a module with `add_arguments(parser) -> None` and `run(args) -> int`. Every command but those that pass
options on to another program has `--format`, `--output` and `--quiet`. Exit codes: 0 done, 1 something failed, 2 the input
cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from kvcomm._version import __version__
from kvcomm.errors import InputError, KVCommError, UnsupportedModel

__all__ = ["COMMANDS", "Command", "CommandModule", "main"]


class CommandModule(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own flags; the shared ones are there already."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit code. May raise KVCommError or OSError for `main` to report."""
        ...


@dataclass(frozen=True)
class Command:
    """One command: the words that choose it, its module, and a line of help."""

    words: tuple[str, ...]
    module: str
    help: str
    passes_on: bool = False  # what it does not know is for another program, and reaches it as `args.rest`; no shared flags


COMMANDS = (
    Command(("demo",), "kvcomm.demo.command", "a five-agent team answers real tasks, dense beside shared"),
    Command(
        ("analyze",),
        "kvcomm.replay.analysis.command",
        "what of recorded prompts could be reused, and how; no model",
    ),
    Command(("bench", "ttft"), "kvcomm.bench.ttft", "time to first token of each agent: dense, prefix cache, shared, limit"),
    Command(
        ("bench", "vllm"), "kvcomm.bench.vllm", "time to first token on a real vLLM: dense, prefix cache, shared, exact hit"
    ),
    Command(("bench", "soak"), "kvcomm.bench.soak", "thousands of mixed requests on a real vLLM: does anything fail or decay?"),
    Command(("bench", "fidelity"), "kvcomm.bench.fidelity.command", "answers under every way of reusing KV, beside dense"),
    Command(
        ("bench", "drift"), "kvcomm.bench.drift", "quality and reuse with anchors while documents change, and over a crash"
    ),
    Command(("bench", "anchors"), "kvcomm.bench.anchors", "what match, estimate and apply cost beside dense prefill"),
    Command(("bench", "predictors"), "kvcomm.bench.fidelity.predictors", "which sign tells that reuse would change an answer"),
    Command(("bench", "pool"), "kvcomm.bench.pool", "search among 10,000 to 1,000,000 anchor tokens: time, recall, bytes"),
    Command(("bench", "store"), "kvcomm.bench.store", "what the tiers cost beside a plain copy; lookups, many clients at once"),
    Command(("bench", "analyze"), "kvcomm.bench.analyze", "how fast traces are analyzed, and in how much memory"),
    Command(("replay",), "kvcomm.replay.command", "recorded calls served by a model under every policy, each beside dense"),
    Command(("vllm",), "kvcomm.connectors.serve", "vLLM's OpenAI server with the connector; other options are vLLM's", True),
    Command(("server",), "kvcomm.wire.command", "owns the KV of this host for all engines on it; `server status`: asks it"),
    Command(("store",), "kvcomm.wire.store_command", "list, check, clean up, export and import what a disk or a server keeps"),
    Command(("record",), "kvcomm.replay.recording.command", "pass an OpenAI API through, and write every call down"),
    Command(("doctor",), "kvcomm.doctor", "what is installed, what can be used here, what is missing"),
)
GROUPS = (("bench", "measure on this machine"),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; usage errors, `--help` and `--version` leave through SystemExit."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chosen = next((c for c in COMMANDS if tuple(argv[: len(c.words)]) == c.words), None)
    parser = _parser(chosen)
    if chosen is None:
        parser.parse_args(argv)  # --help, --version, or what is wrong; it returns when a command is missing
        parser.print_usage(sys.stderr)
        return 2
    try:
        args, rest = parser.parse_known_args(argv)
        if chosen.passes_on:
            args.rest = rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _load(chosen).run(args)
    except (KVCommError, OSError) as e:
        if os.environ.get("KVCOMM_DEBUG") == "1":
            raise
        print(f"kvcomm: {type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2 if isinstance(e, InputError | UnsupportedModel) else 1
    except KeyboardInterrupt:
        print("kvcomm: interrupted", file=sys.stderr)
        return 130


def _parser(chosen: Command | None) -> argparse.ArgumentParser:
    """All commands by name and help; only the chosen one with its flags, because those cost an import."""
    top = argparse.ArgumentParser(prog="kvcomm", description="A team of language-model agents shares its KV-cache.")
    top.add_argument("--version", action="version", version=f"kvcomm {__version__}")
    names = top.add_subparsers(metavar="COMMAND")
    groups = {}
    for name, text in GROUPS:
        groups[name] = names.add_parser(name, help=text, description=text).add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        *group, name = command.words
        within = groups[group[0]] if group else names
        # "resolve": a command may give a shared flag a wider meaning of its own
        parser = within.add_parser(
            name,
            help=command.help,
            description=command.help,
            conflict_handler="resolve",
            allow_abbrev=not command.passes_on,
        )
        if command is chosen:
            if not command.passes_on:
                _shared_arguments(parser)
            _load(command).add_arguments(parser)
    return top


def _shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("terminal", "json"), default="terminal", help="what is printed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the results into this folder")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only results")


def _load(command: Command) -> CommandModule:
    return cast("CommandModule", import_module(command.module))
