"""`kvcomm bench soak`, short; and the yardstick that it compares answers by."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def record(tokens: str, ranked: list[dict[str, float]]) -> Any:
    """As vLLM keeps an answer."""
    at = [{token: SimpleNamespace(logprob=p) for token, p in step.items()} for step in ranked]
    return SimpleNamespace(token_ids=list(tokens), logprobs=at)


@pytest.mark.parametrize(
    ("answer", "logprobs", "far"),
    [
        ("ab", (-1.0, -2.0), 0.0),
        ("ab", (-1.0, -2.5), 0.5),  # the same answer from other K/V
        ("ac", (-1.0, -2.0), 0.25),  # another one that was nearly as likely
        ("cz", (-1.25, -9.0), 0.25),  # what follows a difference cannot be compared
        ("ad", (-1.0, -2.0), inf),  # another one that was not
        ("a", (-1.0,), inf),
    ],
)
def test_distance(answer: str, logprobs: tuple[float, ...], far: float) -> None:
    other = record("ab", [{"a": -1.0, "c": -1.25}, {"b": -2.0, "c": -2.25}])
    assert soak.distance(soak.Asked("dense", [], 2, answer=tuple(answer), logprobs=logprobs), other) == far  # type: ignore[arg-type]


def test_reuse_is_over_tokens() -> None:
    assert soak.reuse([ReuseReport("", 100, 90, 10), None, ReuseReport("", 300, 10, 290)]) == 0.25


def test_unusable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench soak -q --requests 3".split()) == 2
    assert "--requests is 3" in capsys.readouterr().err
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    assert main("bench soak -q".split()) == 2
    assert "vLLM is not installed" in capsys.readouterr().err
