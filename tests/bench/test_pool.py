"""The benchmark of the pool's size, small: its columns are what they say. Speed itself is not tested."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kvcomm.bench import pool
from kvcomm.errors import InputError

SMALL = "--rows 300,100 --dim 8 --queries 20 --k 3 --clusters 10 --batch 90 --repetitions 2".split()


def run(*flags: str, output: Path | None = None, form: str = "json") -> int:
    parser = argparse.ArgumentParser()
    parser.set_defaults(format=form, output=output, quiet=True)
    pool.add_arguments(parser)
    return pool.run(parser.parse_args([*SMALL, *flags]))


def test_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(output=tmp_path / "new") == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "new" / "pool.json").read_text())
    assert [p["rows"] for p in doc["pools"]] == [100, 300]
    for p in doc["pools"]:
        assert (p["structure"], p["recall"]) == ("flat", 1.0)
        assert p["bytes"] > p["rows"] * 8 * 4
        assert len(p["all_ms"]) == 2
        assert p["search_ms"] > 0
    assert doc["largest_over_smallest"] > 0


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--rows", "50", form="terminal") == 0
    out = capsys.readouterr().out
    assert "recall" in out
    assert "searching the largest" not in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "ten"], "--rows is 'ten'"),
        (["--rows", "0,5"], "--rows holds 0"),
        (["--k", "0"], "--k is 0"),
        (["--k", "101"], "--k is 101"),
    ],
)
def test_unusable_flags(flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(*flags)
