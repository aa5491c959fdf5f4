"""The envelope of every JSON document that kvcomm writes: schema, version, machine, and what was measured.

Knows nothing of what is reported. Every number's unit stands in its name (`ttft_ms`, `memory_bytes`); not measured is null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvcomm._version import __version__

__all__ = ["document", "dumps", "facts", "gib", "machine", "write_json"]


def document(schema: str, **body: object) -> dict[str, Any]:
    """A document `{schema, kvcomm_version, created_utc, machine, **body}`, ready for `dumps` and `write_json`.

    `schema` is `kvcomm.<what>/<version>`, for example `kvcomm.bench.ttft/1`. Dataclasses, numpy and torch scalars, tuples and
    paths anywhere in `body` become plain JSON types. Raises TypeError for anything else and ValueError for NaN or infinity:
    what was not measured is None.
    """
    head = {
        "schema": schema,
        "kvcomm_version": __version__,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    if clash := head.keys() & body.keys():
        raise TypeError(f"{', '.join(sorted(clash))}: filled in by document()")
    return {**head, **{name: _plain(value, name) for name, value in body.items()}}


def dumps(doc: Mapping[str, Any]) -> str:
    """The document as indented JSON text."""
    return json.dumps(doc, indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: str | os.PathLike[str], doc: Mapping[str, Any]) -> Path:
    """Write the document and return its path. Makes missing folders; readers see the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(dumps(doc) + "\n", encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def machine() -> dict[str, Any]:
    """What a number depends on. Imports nothing heavy: torch's facts are there when torch is already loaded, else None."""
    torch = sys.modules.get("torch")
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        "torch": None if torch is None else str(torch.__version__),
        "torch_threads": None if torch is None else int(torch.get_num_threads()),
    }


def facts(machine: Mapping[str, Any]) -> str:
    """What `machine` found, as a line to read; what is not known is left out."""
    named = {("memory" if name == "memory_bytes" else name): value for name, value in machine.items() if value is not None}
    return ", ".join(f"{name} {gib(value) if name == 'memory' else value}" for name, value in named.items())


def gib(size: int | None) -> str:
    """Bytes, for a person."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module has a name, if a less telling one
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _plain(value: object, where: str) -> Any:
    """JSON types only; `where` names the place in error messages."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; what was not measured is None")
        return float(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), where)
    if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0:  # a torch scalar too, without importing torch
        return _plain(value.item(), where)  # type: ignore[attr-defined]  # every 0-d array and tensor has item()
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
