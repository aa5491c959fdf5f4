"""What is exported: sorted, real, and light to name."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import kvcomm

ROOT = Path(kvcomm.__file__).parent
NEED_MORE = ("kvcomm.connectors.vllm",)  # names there only exist where another package does; engines load them in its tests


def public_modules() -> list[str]:
    """Dotted names of modules without a leading underscore in any part."""
    folders = [ROOT, *(p for p in ROOT.iterdir() if p.is_dir())]
    found = set()
    for folder in folders:
        for file in folder.glob("*.py"):
            parts = file.relative_to(ROOT.parent).with_suffix("").parts
            if not any(p.startswith("_") for p in parts):
                found.add(".".join(parts))
    return sorted(found)


def export_order(name: str) -> tuple[int, str]:
    """CONSTANTS, Classes, functions, then by name: the linter's order."""
    bare = name.lstrip("_")
    return (0 if bare.isupper() and len(bare) > 1 else 1 if bare[0].isupper() else 2, name)


@pytest.mark.parametrize("name", public_modules())
def test_module_exports(name: str) -> None:
    """`__all__` is there, has no name twice, is in the linter's order, and every name in it exists."""
    module = import_module(name)
    exported = list(module.__all__)
    assert len(set(exported)) == len(exported)
    assert exported == sorted(exported, key=export_order)
    for each in () if name in NEED_MORE else exported:
        assert hasattr(module, each), each
    assert (module.__doc__ or "").strip(), "no docstring"


def test_facade_exports() -> None:
    assert kvcomm.__all__ == sorted(kvcomm.__all__)
    assert set(kvcomm.__all__) <= set(dir(kvcomm))
    for name in kvcomm.__all__:
        value = getattr(kvcomm, name)
        home = getattr(value, "__module__", "kvcomm")
        assert home.startswith("kvcomm.") or name == "__version__", name


def test_facade_knows_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = kvcomm.NoSuchThing  # type: ignore[attr-defined]  # that is the point


def test_errors_can_be_named_without_torch() -> None:
    code = "import sys, kvcomm; kvcomm.InputError, kvcomm.Config, kvcomm.ReuseReport; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "False\n", done.stderr
