"""The TTFT benchmark, small: its arms do what they say. Speed itself is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcomm.cli import main

SMALL = "bench ttft -q --model random:64x2x4x2 --dtype float32 --agents 3 --prefix 40 --input 60".split()


def test_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--output` is a number of tokens and a folder."""
    assert main([*SMALL, "--output", "50", "--output", str(tmp_path), "--format", "json", "--repetitions", "2"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "ttft.json").read_text())
    assert doc["output_tokens"] == 50
    for i, agent in enumerate(doc["agents"]):
        assert agent["prompt_tokens"] == 40 + i + 60 + i * 54 + 12
        assert all(agent[f"{arm}_ms"] > 0 for arm in ("dense", "prefix_cache", "shared", "exact_hit"))
        assert all(len(times) == 2 for times in agent["all_ms"].values())
        assert agent["tokens_by_rung"]["exact"] >= 40 + i, "its own prefix"
    first, second, third = doc["agents"]
    assert first["tokens_by_rung"]["boundary"] == 0, "nobody was asked before it"
    # closing (16 of 12 + 50 tokens before it), headers (4 each), two at the start of every moved span
    assert second["computed_tokens"] <= 16 + 4 + 2 * 2
    assert third["computed_tokens"] <= 16 + 8 + 3 * 2


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--output", "50", "--repetitions", "1"]) == 0
    assert "dense / shared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "random:64x2"], "random:<hidden>"),
        (["--model", "random:65x2x4x2"], "heads must divide"),
        (["--agents", "0"], "--agents is 0"),
        (["--dtype", "float99"], "float99"),
    ],
)
def test_unusable_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *flags]) == 2
    assert said in capsys.readouterr().err
