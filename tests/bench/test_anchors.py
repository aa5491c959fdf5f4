"""`kvcomm bench anchors` and `bench drift` at the smallest size: the document, and what its numbers must agree with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcomm.cli import main


def test_cost_of_the_anchor_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once per estimator; of 2 texts of 24 tokens all but boundaries, closing text and 5 % are reused."""
    flags = "--model random:32x2x2x1 --prefix 40 --texts 2 --tokens 24 --anchors 20 --repetitions 1 --estimators select mean"
    assert main(["bench", "anchors", *flags.split(), "--format", "json", "-q", "--output", str(tmp_path)]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "anchors.json").read_text())
    assert [row["estimator"] for row in doc["estimators"]] == ["select", "mean"]
    for row in doc["estimators"]:
        assert row["anchors"] >= 20
        assert row["prompt_tokens"] == 40 + 2 * (4 + 24) + 12
        for state in ("warm", "cold"):
            r = row[state]
            assert r["fallbacks"] == []
            assert 0 < r["anchor_tokens"] <= 48 - 2 * 2
            assert r["computed_tokens"] + r["anchor_tokens"] == row["prompt_tokens"] - 40  # the prefix is known
            assert 0 < r["path_ms"] < r["ttft_ms"]
            assert r["path_over_dense"] == pytest.approx(r["path_ms"] / row["dense_ms"])


def test_unusable_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench anchors --model random:32x2x2x1 --tokens 15".split()) == 2
    assert "at least 16 tokens" in capsys.readouterr().err


def test_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reuse comes with anchors, and a restart goes on with what was committed."""
    flags = "--requests 24 --windows 3 --documents 3 --renew 2 --format json -q"
    assert main(["bench", "drift", *flags.split(), "--output", str(tmp_path)]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert [w["end"] for w in doc["windows"]] == [8, 16, 24]
    first, *_, last = doc["windows"]
    assert first["learning_rate"] > last["learning_rate"]
    assert last["token_reuse_rate"] > 0.7
    assert last["anchor_rate"] > 0.5
    assert last["accuracy_shared"] >= last["accuracy_without_anchors"]
    assert all(w["anchor_bytes"] <= doc["anchor_limit_bytes"] for w in doc["windows"])
    assert doc["crash"]["after"] == 12
    assert doc["crash"]["held_anchors"] >= doc["crash"]["restored_anchors"] == doc["windows"][0]["anchors"]


def test_unusable_drift(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench drift --requests 5 --windows 3".split()) == 2
    assert "2 requests per window" in capsys.readouterr().err
