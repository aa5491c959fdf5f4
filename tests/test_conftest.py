"""What `conftest.py` adds to pytest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

MODULES = {
    "test_skipped": 'import pytest\npytest.importorskip("no_such_thing")\n',
    "test_some": 'import pytest\ndef test(): pytest.skip("no_such_place")\ndef test_runs(): pass\n',
    "test_foreseen": "import pytest\n@pytest.mark.xfail\ndef test(): assert False\n",
}


def test_no_skips(tmp_path: Path) -> None:
    """A skip is no failure, but under the option it is, with its reason; an expected failure is neither."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    def run(*options: str) -> tuple[int, list[str]]:
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", *options]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout.splitlines()

    code, said = run()
    assert code == 0
    assert said[-1].startswith("1 passed, 2 skipped, 1 xfailed")
    code, said = run("--no-skips")
    assert code == 1
    assert said[-1].startswith("1 failed, 1 passed, 1 xfailed, 1 error")
    for name in ("no_such_thing", "no_such_place"):
        assert [line for line in said if "--no-skips: " in line and name in line]
