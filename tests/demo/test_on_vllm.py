"""The demo on a real vLLM, small: as the Hugging Face backend does on the same tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcomm.cli import main
from kvcomm.connectors import local
from kvcomm.demo.page import page, terminal

SMALL = "demo --requests 6 --documents 5 --agents 4 -q --format json".split()


def demo(*flags: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "kvcomm", *SMALL, *flags], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_as_the_other_backend(tmp_path: Path) -> None:
    """The same prompts, answers as good, tokens reused alike; what vLLM has no arm for is not shown."""
    pytest.importorskip("vllm")
    ours = demo("--backend", "vllm", "--output", str(tmp_path))
    theirs = demo("--backend", "hf")
    assert (ours["backend"], ours["arms"]) == ("vllm", ["dense", "prefix_cache", "shared"])
    assert (theirs["backend"], theirs["arms"]) == ("hf", ["dense", "prefix_cache", "shared", "rotate"])
    for name in ("accuracy_dense", "accuracy_shared", "answers_equal_to_dense"):
        assert ours["all"][name] == pytest.approx(theirs["all"][name], abs=0.05)
    assert ours["all"]["token_reuse_rate"] > 0.6
    assert ours["all"]["token_reuse_rate"] == pytest.approx(theirs["all"]["token_reuse_rate"], abs=0.02)
    assert ours["all"]["call_reuse_rate"] == theirs["all"]["call_reuse_rate"] == 1.0
    assert ours["all"]["accuracy_rotate"] is None
    assert all(ours["all"][f"ttft_{arm}_ms"] > 0 for arm in ours["arms"])
    for workload in ours["workloads"].values():
        for agent in workload["agents"]:
            assert sum(agent["tokens_by_rung"].values()) == pytest.approx(agent["prompt_tokens"])
    html = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert html == page(ours)
    assert "vLLM" in html
    assert "rotation alone" not in html
    assert "rotat" not in terminal(ours)


def test_a_model_that_is_not_there() -> None:
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, "-m", "kvcomm", *SMALL, "--backend", "vllm", "--model", "./nowhere"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "kvcomm: InputError: vLLM cannot load './nowhere'" in done.stderr.splitlines()[-1]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    assert main([*SMALL, "--backend", "vllm"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


def test_an_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*SMALL, "--backend", "llamacpp"])
    assert left.value.code == 2
    assert "llamacpp" in capsys.readouterr().err
