"""Every example runs as a person runs it, in a process of its own, and says something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def test_there_are_examples() -> None:
    assert EXAMPLES, f"{FOLDER} has no examples"
    assert [p.name[:2] for p in EXAMPLES] == [f"{i:02d}" for i in range(1, len(EXAMPLES) + 1)], "examples are numbered from 01"


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.once] * (p.name >= "05"), id=p.stem) for p in EXAMPLES]
)  # from 05 on they start servers
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """Run in an empty folder: an example may write there, and needs nothing but an installed kvcomm and files beside itself."""
    done = subprocess.run([sys.executable, "-W", "error", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip(), "an example shows something"
