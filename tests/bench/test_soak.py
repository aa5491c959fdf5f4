"""`kvcomm bench soak`, short; and the yardstick that it compares answers by."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from kvcomm.bench import soak
from kvcomm.cli import main
from kvcomm.connectors import local
from kvcomm.segments import ReuseReport


def test_document(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, "-m", "kvcomm", *"bench soak --requests 60 --format json -q --output".split(), str(tmp_path)],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    doc = json.loads(done.stdout)
    assert doc == json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert (doc["schema"], sum(doc["kinds"].values()), sum(doc["ended"].values())) == ("kvcomm.bench.soak/1", 60, 60)
    assert all(doc["checks"].values())
    assert doc["preemptions"] > 0
    assert doc["faults"] == 0
    assert doc["reuse_late"] > 0.5
    assert len(doc["reuse_by_twentieth"]) == 20


def answer(tokens: str, logprobs: tuple[float, ...]) -> soak.Asked:
    return soak.Asked("dense", [], 2, answer=tuple(map(ord, tokens)), logprobs=logprobs)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "far"),
    [
        ("ab", (-1.0, -2.0), 0.0),
        ("ab", (-1.0, -2.5), 0.5),  # the same answer from other K/V
        ("ac", (-1.0, -2.0), 0.0),  # a tie
        ("ac", (-1.0, -1.75), 0.25),  # another answer
        ("cz", (-1.0, -9.0), 0.0),  # what follows a difference cannot be compared
        ("a", (-1.0,), inf),
    ],
)
def test_distance(tokens: str, logprobs: tuple[float, ...], far: float) -> None:
    assert soak.distance(answer(tokens, logprobs), answer("ab", (-1.0, -2.0))) == far


def test_reuse_is_over_tokens() -> None:
    assert soak.reuse([ReuseReport("", 100, 90, 10), None, ReuseReport("", 300, 10, 290)]) == 0.25


def test_unusable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench soak -q --requests 3".split()) == 2
    assert "--requests is 3" in capsys.readouterr().err
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    assert main("bench soak -q".split()) == 2
    assert "vLLM is not installed" in capsys.readouterr().err
