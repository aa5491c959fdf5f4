"""`kvcomm bench vllm` on a tiny model: every arm is measured, and does what its name says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcomm.bench import vllm as bench
from kvcomm.connectors import local
from kvcomm.errors import InputError


def test_document(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    sizes = ["--model", "random:128x2x2x1", "--dtype", "float32", "--agents", "3", "--prefix", "150", "--input", "200"]
    sizes += ["--output", "60", "--output", str(tmp_path), "--repetitions", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "kvcomm", "bench", "vllm", "--format", "json", "-q", *sizes],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    doc = json.loads(done.stdout)
    assert doc == json.loads((tmp_path / "vllm.json").read_text(encoding="utf-8"))
    assert (doc["schema"], doc["output_tokens"], len(doc["agents"])) == ("kvcomm.bench.vllm/1", 60, 3)
    for agent in doc["agents"]:
        assert all(agent[f"{arm}_ms"] > 0 and len(agent["all_ms"][arm]) == 2 for arm in bench.ARMS)
        assert agent["exact_hit_ms"] < agent["dense_ms"]
    for agent in doc["agents"][1:]:
        assert agent["reused_tokens"] > 0.8 * agent["prompt_tokens"]
        assert agent["fallback"] is None
    assert doc["later_agents"]["shared_over_exact_hit_max"] > 0


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="vLLM is not installed"):
        bench.measure(None)  # type: ignore[arg-type]  # it does not come to that
