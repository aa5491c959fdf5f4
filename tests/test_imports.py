"""Imports go one way, and the core needs nothing but its declared requirements. Read from the syntax trees, nothing is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvcomm

ROOT = Path(kvcomm.__file__).parent

# A module imports only from lines above its own; modules on one line do not know each other.
LAYERS = (
    ("_version", "errors", "segments"),
    ("config",),
    ("answers", "fingerprint", "matching", "plain", "plot", "report", "rope"),
    ("codecs", "page"),
    ("anchors",),
    ("estimators",),
    ("store",),
    ("guard", "metrics", "policy"),
    ("who",),
    ("backends", "call", "request", "waiting"),
    ("correcting", "draft_check", "learning"),
    ("engine",),
    ("wire",),
    ("connectors",),
    ("replay",),
    ("agents",),
    ("bench", "demo", "doctor"),
    ("tiny.evaluate",),  # a script: measures the embedded model with all of the above
    ("cli",),
    ("__main__",),
)
PART_OF = {"streaming": "engine"}  # in a file of its own, but one place with it: its types name each other
ANYONE_BELOW = {"tiny": ("errors", "segments")}  # leaves beside the layers: what they may import
FREE = ("__init__", "testing")  # the facade, whose imports are lazy, and the fakes, which nobody imports

CORE = {
    "faiss",
    "ijson",
    "jinja2",
    "msgpack",
    "numpy",
    "packaging",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "xxhash",
    "yaml",
}
OPTIONAL = {  # who may name a package that a bare install does not have, and then only inside a function
    "connectors": {"prometheus_client", "vllm"},
    "replay": {"aiohttp", "multidict", "vllm", "yarl"},
    "agents": {"agents", "langchain_core", "langchain_huggingface", "langgraph", "smolagents"},
    "store": {"mooncake", "redis"},
}
WITH_THEM_ALONE: dict[tuple[str, ...], set[str]] = {
    ("connectors", "_vllm"): {"vllm"},
    ("replay", "recording", "_proxy"): {"aiohttp", "multidict", "yarl"},
}  # private modules that derive from classes of such a package


def modules() -> list[tuple[str, ...]]:
    """Every module's dotted parts below kvcomm, the links followed."""
    folders = [ROOT, *(p for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__")]
    files = {p for folder in folders for p in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))}
    return sorted(p.relative_to(ROOT).with_suffix("").parts for p in files)


def imports(parts: tuple[str, ...], *, top_level: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere, or only while it is being imported."""
    tree = ast.parse(ROOT.joinpath(*parts).with_suffix(".py").read_text(encoding="utf-8"))
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{'.'.join(parts)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        stack += ast.iter_child_nodes(node)
    return found


def unit_of(parts: tuple[str, ...]) -> str:
    """The entry of the table that a module belongs to: its own, or its package's."""
    dotted = ".".join(parts)
    return dotted if any(dotted in layer for layer in LAYERS) else PART_OF.get(parts[0], parts[0])


def own(names: set[str]) -> set[str]:
    """Units of kvcomm among imported names; a name that the facade itself defines counts as `__init__`."""
    known = set(modules())
    found = set()
    for name in names:
        top, *rest = name.split(".")
        if top != "kvcomm":
            continue
        prefixes = (tuple(rest[:n]) for n in range(len(rest), 0, -1))
        found.add(next((unit_of(p) for p in prefixes if p in known or (*p, "__init__") in known), "__init__"))
    return found


def may_import(unit: str) -> set[str]:
    """What the table allows a unit."""
    if unit in ANYONE_BELOW:
        return {unit, *ANYONE_BELOW[unit]}
    level = next(i for i, layer in enumerate(LAYERS) if unit in layer)
    return {unit, *(name for layer in LAYERS[:level] for name in layer), *ANYONE_BELOW}


@pytest.mark.parametrize("parts", modules(), ids=".".join)
def test_module_is_known_and_imports_go_one_way(parts: tuple[str, ...]) -> None:
    unit = unit_of(parts)
    known = {*ANYONE_BELOW, *FREE, *(name for layer in LAYERS for name in layer)}
    assert unit in known, f"kvcomm.{unit} has no place in the table of this test: give it one"
    if unit not in FREE:
        assert own(imports(parts)) <= may_import(unit)


@pytest.mark.parametrize("parts", modules(), ids=".".join)
def test_only_declared_packages(parts: tuple[str, ...]) -> None:
    allowed = CORE | {"kvcomm"} | set(sys.stdlib_module_names)
    outside = {name.split(".")[0] for name in imports(parts)} - allowed
    assert outside <= OPTIONAL.get(parts[0], set())
    at_once = {name.split(".")[0] for name in imports(parts, top_level=True)} - allowed
    assert at_once == WITH_THEM_ALONE.get(parts, set())


def test_no_cycles() -> None:
    """The graph of imports between single modules has an order."""
    names = {".".join(("kvcomm", *p)).removesuffix(".__init__"): p for p in modules()}
    graph: dict[str, set[str]] = {}
    for name, parts in names.items():
        wanted = imports(parts, top_level=True)
        graph[name] = {n for n in names if n in wanted or any(w.rpartition(".")[0] == n for w in wanted)} - {name, "kvcomm"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_the_reader_of_imports_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`imports` on a module written for it, against what is in its text."""
    text = (
        "from typing import TYPE_CHECKING\nimport a.b\nif TYPE_CHECKING:\n    import c\nelse:\n    import d\n"
        "def f():\n    from e import g\nclass H:\n    import i\n"
    )
    (tmp_path / "m.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imports(("m",)) == {"typing.TYPE_CHECKING", "a.b", "c", "d", "e.g", "i"}
    assert imports(("m",), top_level=True) == {"typing.TYPE_CHECKING", "a.b", "d", "i"}


@pytest.mark.parametrize(
    "name",
    [
        "kvcomm",
        "kvcomm.cli",
        "kvcomm.connectors.serve",
        "kvcomm.connectors.vllm",
        "kvcomm.doctor",
        "kvcomm.matching",
        "kvcomm.replay.analysis.command",
        "kvcomm.replay.readers",
        "kvcomm.replay.recording.command",
        "kvcomm.report",
        "kvcomm.segments",
        "kvcomm.wire.command",
        "kvcomm.wire.server",
        "kvcomm.wire.tiers",
    ],
)
def test_light_modules_load_no_torch(name: str) -> None:
    code = f"import sys, {name}; print(sorted({{'torch', 'transformers', 'faiss'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr
